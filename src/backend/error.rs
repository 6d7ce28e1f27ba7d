//! What can go wrong on the way to a server.

use super::CONNECT_TIMEOUT;
use crate::{
    net::TlsError,
    wire::{WireError, backend::ErrorFields},
};
use std::io;

/// A connection could not be opened or broke.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The server could not be reached.
    #[error("cannot reach {server}: {source}")]
    Connect {
        /// Host and port.
        server: String,
        /// From the operating system.
        source: io::Error,
    },
    /// Nothing was heard in time.
    #[error("{server} did not answer within {} s", CONNECT_TIMEOUT.as_secs())]
    Timeout {
        /// Host and port.
        server: String,
    },
    /// TLS could not be had, and the url insists on it.
    #[error("{0}")]
    Tls(#[from] TlsError),
    /// The url asks for TLS, and the server does not speak it.
    #[error(
        "{server} does not speak TLS, which sslmode={sslmode} of its url demands: switch it on there (ssl = on, ssl_cert_file, ssl_key_file), \
         or use sslmode=prefer on a network that you trust"
    )]
    NoTls {
        /// Host and port.
        server: String,
        /// As in the url.
        sslmode: &'static str,
    },
    /// The connection broke later.
    #[error("connection to the server broke: {0}")]
    Io(#[from] io::Error),
    /// The server answered with an error.
    #[error("the server refused: {} (SQLSTATE {})", .0.message, .0.code)]
    Server(ErrorFields),
    /// The server asks for a way to log in that we cannot do.
    #[error("cannot log in as {user}: {reason}")]
    Authentication {
        /// Role.
        user: String,
        /// What was asked for, and what to do.
        reason: String,
    },
    /// The server sent bytes that are not the protocol.
    #[error("the server broke the protocol: {0}")]
    Protocol(String),
}

impl From<WireError> for BackendError {
    fn from(error: WireError) -> Self {
        BackendError::Protocol(error.to_string())
    }
}
