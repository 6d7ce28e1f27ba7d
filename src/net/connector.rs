//! TLS towards servers, with libpq's rules about whom to believe.
//! Source: PostgreSQL documentation, "SSL Support" (libpq-ssl), "Parameter Key Words" (sslmode and its neighbours).

use super::{Stream, Tls, TlsError, acceptor::ALPN, certificate, files};
use crate::config::{RootCertificates, ServerUrl, SslMode};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::{
        Resumption, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_name,
    },
    crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::ParsedCertificate,
};
use std::{
    collections::HashMap,
    io,
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock},
    time::SystemTime,
};

/// Configurations kept; more urls than this are not expected, and the next one starts over.
const CONFIGURATIONS_MAX: usize = 256;

/// Same files, same rules, same host: same configuration.
type Key = (SslMode, crate::config::ServerTls, String);
type Known = HashMap<Key, (Vec<Option<SystemTime>>, Arc<ClientConfig>)>;

/// The client's side of a TLS handshake with the server of a url.
///
/// # Errors
/// [`TlsError`]: which file or what about the server is wrong, and what to do.
pub async fn connect(socket: Stream, url: &ServerUrl) -> Result<Stream, TlsError> {
    let config = configuration(url)?;
    // a path cannot be a name in a certificate; nothing is verified there
    let host = if url.host.starts_with('/') { "localhost" } else { &url.host };
    let name = ServerName::try_from(host.to_owned())
        .map_err(|_| TlsError::Handshake(format!("`{host}` is not a host name that a certificate can be for")))?;
    let stream = Tls::connect(socket, config, name).await.map_err(|error| TlsError::Handshake(explain(&error, url)))?;
    if url.tls.direct && stream.tls().is_none_or(|tls| tls.session().alpn_protocol() != Some(ALPN)) {
        // whoever does not confirm the protocol could be another service, to which our bytes mean something else
        return Err(TlsError::Handshake(format!("{}:{} does not confirm the protocol \"postgresql\" (ALPN)", url.host, url.port)));
    }
    Ok(stream)
}

/// The `tls-server-end-point` binding of the server that a stream is connected to.
pub fn server_end_point(stream: &Stream) -> Option<Vec<u8>> {
    stream.tls()?.session().peer_certificates()?.first().and_then(certificate::end_point)
}

/// A configuration is made once and again when one of its files has changed.
fn configuration(url: &ServerUrl) -> Result<Arc<ClientConfig>, TlsError> {
    static KNOWN: OnceLock<Mutex<Known>> = OnceLock::new();
    let roots = match &url.tls.roots {
        None => None,
        Some(RootCertificates::File(path)) => Some(path.clone()),
        Some(RootCertificates::System) => Some(files::system_roots()?),
    };
    let paths = roots.iter().chain(url.tls.identity.iter().flat_map(|(certificate, key)| [certificate, key]));
    let stamps = files::changed_at(paths.map(PathBuf::as_path));
    let key = (url.sslmode, url.tls.clone(), url.host.clone());
    let known = KNOWN.get_or_init(Mutex::default);
    if let Some((then, config)) = known.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).get(&key)
        && *then == stamps
    {
        return Ok(config.clone());
    }
    let config = Arc::new(build(url, roots)?);
    let mut known = known.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if known.len() >= CONFIGURATIONS_MAX {
        known.clear();
    }
    known.insert(key, (stamps, config.clone()));
    Ok(config)
}

fn build(url: &ServerUrl, roots: Option<PathBuf>) -> Result<ClientConfig, TlsError> {
    let provider = Arc::new(ring::default_provider());
    let failed = |what, path: &PathBuf, reason: String| TlsError::File { what, path: path.clone(), reason };
    let mut verifier =
        Verifier { chain: None, pinned: Vec::new(), check_name: url.sslmode == SslMode::VerifyFull, provider: provider.clone() };
    // with a root file, `require` verifies as well (libpq does, for compatibility), the weaker modes do not
    if let (Some(path), SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull) = (&roots, url.sslmode) {
        verifier.pinned = files::certificates("sslrootcert", path)?;
        let mut store = RootCertStore::empty();
        let (added, _) = store.add_parsable_certificates(verifier.pinned.iter().cloned());
        if added == 0 {
            return Err(failed("sslrootcert", path, "holds no certificate that can be an authority".into()));
        }
        let chain = WebPkiServerVerifier::builder_with_provider(Arc::new(store), provider.clone()).build();
        verifier.chain = Some(chain.map_err(|error| failed("sslrootcert", path, error.to_string()))?);
    }
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| TlsError::Handshake(error.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match &url.tls.identity {
        None => builder.with_no_client_auth(),
        Some((path, key)) => builder
            .with_client_auth_cert(files::certificates("sslcert", path)?, files::private_key(key)?)
            .map_err(|error| failed("sslcert", path, format!("does not fit the key {}: {error}", key.display())))?,
    };
    config.resumption = Resumption::disabled(); // PostgreSQL resumes no sessions
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(config)
}

/// Whom to believe.
#[derive(Debug)]
struct Verifier {
    /// `None`: anybody. The connection is private, but its other end may be somebody else.
    chain: Option<Arc<WebPkiServerVerifier>>,
    /// Certificates of the root file: a server that shows one of them itself is known, whatever it says about being an
    /// authority. That is how self-signed server certificates are used.
    pinned: Vec<CertificateDer<'static>>,
    check_name: bool,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    fn check_host(&self, certificate: &CertificateDer<'_>, host: &ServerName<'_>) -> Result<(), Error> {
        match verify_server_name(&ParsedCertificate::try_from(certificate)?, host) {
            Err(error) if is_other_name(&error) => by_common_name(certificate, host).then_some(()).ok_or(error),
            result => result,
        }
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        host: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let Some(chain) = &self.chain else { return Ok(ServerCertVerified::assertion()) };
        if self.pinned.iter().any(|known| known == end_entity) {
            if self.check_name {
                self.check_host(end_entity, host)?;
            }
            return Ok(ServerCertVerified::assertion());
        }
        match chain.verify_server_cert(end_entity, intermediates, host, ocsp_response, now) {
            // the chain is looked at before the name: it was good
            Err(error) if is_other_name(&error) && (!self.check_name || by_common_name(end_entity, host)) => {
                Ok(ServerCertVerified::assertion())
            }
            result => result,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.unless_anybody(verify_tls12_signature(message, certificate, signature, &self.provider.signature_verification_algorithms))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.unless_anybody(verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms))
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl Verifier {
    /// Where anybody will do, so will a certificate that the verifier cannot read (version 1, as PostgreSQL's manual made
    /// them for long): who is in the middle could show one of his own.
    fn unless_anybody(&self, result: Result<HandshakeSignatureValid, Error>) -> Result<HandshakeSignatureValid, Error> {
        match result {
            Err(Error::InvalidCertificate(_)) if self.chain.is_none() => Ok(HandshakeSignatureValid::assertion()),
            result => result,
        }
    }
}

fn is_other_name(error: &Error) -> bool {
    matches!(error, Error::InvalidCertificate(CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. }))
}

/// A certificate without names of hosts is for the host of its common name (libpq still takes it; RFC 2818 does not).
fn by_common_name(certificate: &CertificateDer<'_>, host: &ServerName<'_>) -> bool {
    let (Some(name), false) = (certificate::common_name(certificate), certificate::names_hosts(certificate)) else { return false };
    let host = host.to_str();
    match name.strip_prefix("*.") {
        Some(suffix) => host.split_once('.').is_some_and(|(label, rest)| !label.is_empty() && rest.eq_ignore_ascii_case(suffix)),
        None => name.eq_ignore_ascii_case(&host),
    }
}

/// What to tell a person.
fn explain(error: &io::Error, url: &ServerUrl) -> String {
    let server = format!("{}:{}", url.host, url.port);
    let roots = match &url.tls.roots {
        Some(RootCertificates::File(path)) => path.display().to_string(),
        _ => "the system's certificates".into(),
    };
    let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) else {
        return match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset if url.tls.direct => format!(
                "{server} ended the connection during the handshake: sslnegotiation=direct needs PostgreSQL 17 or newer with ssl = on"
            ),
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => format!("{server} ended the connection during the handshake"),
            _ => format!("the handshake with {server} failed: {error}"),
        };
    };
    match tls {
        Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            format!("the certificate of {server} comes from none of the authorities in {roots}: give the right one as sslrootcert")
        }
        Error::InvalidCertificate(CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. }) => {
            let numeric = url.host.parse::<IpAddr>().is_ok();
            let name = if numeric { "address" } else { "name" };
            format!(
                "the certificate of {server} is not for the {name} {}: use a host that it names in the url, or sslmode=verify-ca",
                url.host
            )
        }
        Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
            format!("the certificate of {server} has expired: renew it there")
        }
        Error::InvalidCertificate(reason) => format!(
            "the certificate of {server} cannot be verified: {reason}. Certificates must be of version 3 (openssl x509 -req … -extfile)"
        ),
        Error::AlertReceived(alert) => format!(
            "{server} refused the handshake ({alert:?}): if it asks for a client certificate, sslcert and sslkey must be one that it knows"
        ),
        other => format!("the handshake with {server} failed: {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_server_and_the_remedy() {
        let url = ServerUrl::parse("postgres://a@db.example:5433/d?sslmode=verify-full&sslrootcert=/ca.crt").unwrap();
        let say = |error| explain(&io::Error::new(io::ErrorKind::InvalidData, error), &url);
        let unknown = say(Error::InvalidCertificate(CertificateError::UnknownIssuer));
        assert!(unknown.contains("db.example:5433") && unknown.contains("/ca.crt"), "{unknown}");
        assert!(say(Error::InvalidCertificate(CertificateError::NotValidForName)).contains("verify-ca"));
        assert!(say(Error::InvalidCertificate(CertificateError::Expired)).contains("expired"));
    }
}
