//! TLS towards clients.

use super::{Stream, Tls, TlsError, certificate, files};
use crate::config::{TlsConfig, TlsVersion};
use rustls::{
    RootCertStore, ServerConfig,
    crypto::ring,
    server::{NoServerSessionStorage, WebPkiClientVerifier},
    version::{TLS12, TLS13},
};
use std::{io, sync::Arc};

/// What ALPN calls PostgreSQL's protocol (PostgreSQL documentation, "SSL Session Encryption").
pub(super) const ALPN: &[u8] = b"postgresql";

/// Certificate, key and rules as read from the files, immutable: a reload makes a new one for the next clients.
pub struct Acceptor {
    config: Arc<ServerConfig>,
    end_point: Option<Vec<u8>>,
    /// Clients that do not ask for TLS are refused.
    pub required: bool,
}

/// What is known of a client that came over TLS.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientTls {
    /// It asked for the protocol "postgresql", as direct TLS must.
    pub negotiated_protocol: bool,
    /// The common name of the certificate that it has proven to own and that one of our authorities has signed.
    pub common_name: Option<String>,
    /// It has shown such a certificate.
    pub has_certificate: bool,
    /// `tls-server-end-point` of our certificate, for SCRAM-SHA-256-PLUS.
    pub end_point: Option<Vec<u8>>,
}

impl Acceptor {
    /// Reads the files.
    ///
    /// # Errors
    /// [`TlsError::File`]
    pub fn load(config: &TlsConfig) -> Result<Self, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let chain = files::certificates("certificate", &config.certificate)?;
        let key = files::private_key(&config.key)?;
        let versions: &[_] = match config.min_version {
            TlsVersion::V1_2 => &[&TLS13, &TLS12],
            TlsVersion::V1_3 => &[&TLS13],
        };
        let failed = |what, path: &std::path::Path, reason: String| TlsError::File { what, path: path.to_owned(), reason };
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(versions)
            .map_err(|error| TlsError::Handshake(error.to_string()))?;
        let builder = match &config.client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let mut roots = RootCertStore::empty();
                for authority in files::certificates("client_ca", path)? {
                    roots.add(authority).map_err(|error| failed("client_ca", path, error.to_string()))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).allow_unauthenticated();
                builder.with_client_cert_verifier(verifier.build().map_err(|error| failed("client_ca", path, error.to_string()))?)
            }
        };
        let end_point = chain.first().and_then(certificate::end_point);
        let mut server = builder.with_single_cert(chain, key).map_err(|error| {
            failed("certificate", &config.certificate, format!("does not fit the key {}: {error}", config.key.display()))
        })?;
        // libpq resumes no sessions; without tickets a handshake is shorter and no key of one client outlives it here
        server.send_tls13_tickets = 0;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Acceptor { config: Arc::new(server), end_point, required: config.required })
    }

    /// The handshake with a client.
    ///
    /// # Errors
    /// As [`Tls::accept`].
    pub async fn accept(&self, socket: Stream) -> io::Result<(Stream, ClientTls)> {
        let stream = Tls::accept(socket, self.config.clone()).await?;
        let mut client = ClientTls { end_point: self.end_point.clone(), ..ClientTls::default() };
        if let Some(tls) = stream.tls() {
            let shown = tls.session().peer_certificates().and_then(|chain| chain.first());
            client.negotiated_protocol = tls.session().alpn_protocol() == Some(ALPN);
            client.has_certificate = shown.is_some();
            client.common_name = shown.and_then(certificate::common_name);
        }
        Ok((stream, client))
    }
}

impl std::fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Acceptor").finish_non_exhaustive()
    }
}
