//! Certificates and keys in files: read, named in errors, and read again when they change.

use rustls::pki_types::{
    CertificateDer, PrivateKeyDer,
    pem::{Error as PemError, PemObject},
};
use std::{
    path::{Path, PathBuf},
    time::SystemTime,
};

/// TLS could not be set up or agreed upon.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum TlsError {
    /// A file is of no use.
    #[error("{what} {path}: {reason}", path = .path.display())]
    File {
        /// `certificate`, `private key`, …
        what: &'static str,
        /// As configured.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// The other side and we did not come to terms.
    #[error("TLS: {0}")]
    Handshake(String),
}

fn refuse(what: &'static str, path: &Path, reason: impl Into<String>) -> TlsError {
    TlsError::File { what, path: path.to_owned(), reason: reason.into() }
}

fn explain(what: &'static str, path: &Path, error: PemError) -> TlsError {
    match error {
        PemError::Io(error) => refuse(what, path, format!("cannot be read: {error}")),
        PemError::NoItemsFound => refuse(what, path, "holds none in PEM form (-----BEGIN …-----)"),
        other => refuse(what, path, format!("is not PEM: {other:?}")),
    }
}

/// All certificates of a file, in order.
pub(super) fn certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = CertificateDer::pem_file_iter(path).map_err(|error| explain(what, path, error))?;
    let found: Vec<_> = read.collect::<Result<_, _>>().map_err(|error| explain(what, path, error))?;
    if found.is_empty() {
        return Err(explain(what, path, PemError::NoItemsFound));
    }
    Ok(found)
}

/// The first private key of a file (PKCS #8, PKCS #1 or SEC 1).
pub(super) fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        if text.contains("ENCRYPTED") {
            let remedy = "has a passphrase, which understudy cannot ask for: openssl pkey -in KEY -out KEY-WITHOUT";
            return refuse("private key", path, remedy);
        }
        explain("private key", path, error)
    })
}

/// Where systems keep the authorities they trust (the list of Go's crypto/x509, `root_linux.go`).
const SYSTEM_ROOTS: &[&str] = &[
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/tls/cacert.pem",
    "/etc/ssl/cert.pem",
];

/// The file of this machine's trusted authorities; `SSL_CERT_FILE` names another one, as for OpenSSL.
pub(super) fn system_roots() -> Result<PathBuf, TlsError> {
    if let Some(path) = std::env::var_os("SSL_CERT_FILE") {
        return Ok(path.into());
    }
    SYSTEM_ROOTS.iter().map(PathBuf::from).find(|path| path.exists()).ok_or_else(|| {
        let path = SYSTEM_ROOTS.first().map(PathBuf::from).unwrap_or_default();
        refuse("system certificates", &path, "are not there: install the package ca-certificates, or set SSL_CERT_FILE")
    })
}

/// When files were changed last; what is not there has no time.
pub fn changed_at<'a>(paths: impl IntoIterator<Item = &'a Path>) -> Vec<Option<SystemTime>> {
    paths.into_iter().map(|path| std::fs::metadata(path).and_then(|found| found.modified()).ok()).collect()
}
