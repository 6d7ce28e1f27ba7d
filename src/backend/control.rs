//! tokio-postgres clients for the control plane, over our own streams: one code decides about TLS for all connections.

use super::{BackendError, CONNECT_TIMEOUT, Encryption, attempts, connect_as};
use crate::{
    config::{ChannelBinding, ServerUrl},
    net::{Stream, server_end_point},
};
use std::{future::Ready, io};
use tokio_postgres::{
    Client, Connection,
    config::{ChannelBinding as TokioBinding, SslMode, SslNegotiation},
    error::SqlState,
    tls::{self, TlsConnect, TlsStream},
};

/// A control connection could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The server was not reached, or TLS could not be agreed upon.
    #[error("{0}")]
    Reach(#[from] BackendError),
    /// The log-in failed.
    #[error("{}", describe(.0))]
    LogIn(tokio_postgres::Error),
}

/// The server's own words where it has said something.
fn describe(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(db) => format!("{} (SQLSTATE {})", db.message(), db.code().code()),
        None => std::error::Error::source(error).map_or_else(|| error.to_string(), |source| format!("{error}: {source}")),
    }
}

impl ControlError {
    /// SQLSTATE, if the server has answered.
    pub fn code(&self) -> Option<&SqlState> {
        match self {
            ControlError::LogIn(error) => error.code(),
            ControlError::Reach(_) => None,
        }
    }
}

/// Opens a connection. As with tokio-postgres, the second half must be polled (spawned) for the first to work.
///
/// # Errors
/// [`ControlError`]
pub async fn control(url: &ServerUrl, application_name: &str) -> Result<(Client, Connection<Stream, Established>), ControlError> {
    let attempts = attempts(url);
    let mut refused = None;
    for encryption in attempts {
        let stream = match connect_as(url, *encryption).await {
            Ok(stream) => stream,
            Err(error) => return Err(refused.unwrap_or(ControlError::Reach(error))),
        };
        let plain_at_last = *encryption == Encryption::IfOffered && stream.tls().is_none();
        let mut config = url.to_tokio(application_name);
        config.channel_binding(match url.tls.channel_binding {
            ChannelBinding::Disable => TokioBinding::Disable,
            ChannelBinding::Prefer => TokioBinding::Prefer,
            ChannelBinding::Require => TokioBinding::Require,
        });
        if stream.tls().is_some() {
            // what the library calls a direct handshake has happened already
            config.ssl_mode(SslMode::Require).ssl_negotiation(SslNegotiation::Direct);
        }
        match tokio::time::timeout(CONNECT_TIMEOUT, config.connect_raw(stream, Handed)).await {
            Err(_) => return Err(BackendError::Timeout { server: format!("{}:{}", url.host, url.port) }.into()),
            Ok(Ok(connected)) => return Ok(connected),
            Ok(Err(error)) => {
                let other = error.code() == Some(&SqlState::INVALID_AUTHORIZATION_SPECIFICATION) && !plain_at_last;
                let first = refused.unwrap_or(ControlError::LogIn(error));
                if !other {
                    return Err(first);
                }
                refused = Some(first);
            }
        }
    }
    Err(refused.unwrap_or_else(|| BackendError::Protocol("no way to connect is allowed".into()).into()))
}

/// Hands a stream on whose handshake has been done.
#[derive(Clone, Copy, Debug)]
struct Handed;

impl TlsConnect<Stream> for Handed {
    type Stream = Established;
    type Error = io::Error;
    type Future = Ready<io::Result<Established>>;

    fn connect(self, stream: Stream) -> Self::Future {
        std::future::ready(Ok(Established(stream)))
    }
}

/// A TLS stream that can tell tokio-postgres what SCRAM binds to.
#[derive(Debug)]
pub struct Established(Stream);

impl TlsStream for Established {
    fn channel_binding(&self) -> tls::ChannelBinding {
        match server_end_point(&self.0) {
            Some(end_point) => tls::ChannelBinding::tls_server_end_point(end_point),
            None => tls::ChannelBinding::none(),
        }
    }
}

impl tokio::io::AsyncRead for Established {
    fn poll_read(
        self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
        buffer: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut self.get_mut().0).poll_read(context, buffer)
    }
}

impl tokio::io::AsyncWrite for Established {
    fn poll_write(
        self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
        bytes: &[u8],
    ) -> std::task::Poll<io::Result<usize>> {
        std::pin::Pin::new(&mut self.get_mut().0).poll_write(context, bytes)
    }

    fn poll_flush(self: std::pin::Pin<&mut Self>, context: &mut std::task::Context<'_>) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut self.get_mut().0).poll_flush(context)
    }

    fn poll_shutdown(self: std::pin::Pin<&mut Self>, context: &mut std::task::Context<'_>) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut self.get_mut().0).poll_shutdown(context)
    }
}
