//! From a url to a byte stream, encrypted as the url's `sslmode` says, and requests to cancel.

use super::{BackendError, CONNECT_TIMEOUT};
use crate::{
    config::{ServerUrl, SslMode},
    net::{self, Stream},
    wire::frontend,
};
use bytes::BytesMut;
use std::io;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixStream},
};

/// SSLRequest: length and code.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

/// One way to reach a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// In clear.
    Plain,
    /// TLS, or not at all.
    Tls,
    /// TLS if the server agrees to it.
    IfOffered,
}

/// The ways that a url allows, in the order in which they are tried: the next one when the server's pg_hba.conf refuses the
/// one before (SQLSTATE 28000), as libpq does for `allow` and `prefer`.
pub fn attempts(url: &ServerUrl) -> &'static [Encryption] {
    if url.host.starts_with('/') {
        return &[Encryption::Plain]; // as libpq: PostgreSQL speaks no TLS on Unix sockets
    }
    match url.sslmode {
        SslMode::Disable => &[Encryption::Plain],
        SslMode::Allow => &[Encryption::Plain, Encryption::Tls],
        SslMode::Prefer => &[Encryption::IfOffered, Encryption::Plain],
        SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => &[Encryption::Tls],
    }
}

/// After this refusal of one of [`attempts`] the next one may do better.
pub fn is_about_encryption(sqlstate: &str, encryption: Encryption, stream: &Stream) -> bool {
    // where TLS was not to be had, doing without has been tried already
    sqlstate == "28000" && (encryption != Encryption::IfOffered || stream.tls().is_some())
}

/// Connects to a server in the first way that its url allows.
///
/// # Errors
/// [`BackendError::Connect`], [`BackendError::Timeout`], [`BackendError::Tls`], [`BackendError::NoTls`]
pub async fn connect(url: &ServerUrl) -> Result<Stream, BackendError> {
    connect_as(url, attempts(url).first().copied().unwrap_or(Encryption::Plain)).await
}

/// Connects to a server in one way.
///
/// # Errors
/// As [`connect`].
pub async fn connect_as(url: &ServerUrl, encryption: Encryption) -> Result<Stream, BackendError> {
    match tokio::time::timeout(CONNECT_TIMEOUT, reach(url, encryption)).await {
        Ok(reached) => reached,
        Err(_) => Err(BackendError::Timeout { server: format!("{}:{}", url.host, url.port) }),
    }
}

async fn reach(url: &ServerUrl, encryption: Encryption) -> Result<Stream, BackendError> {
    let server = || format!("{}:{}", url.host, url.port);
    let failed = |source| BackendError::Connect { server: server(), source };
    let stream = socket(url).await.map_err(failed)?;
    match encryption {
        Encryption::Plain => Ok(stream),
        Encryption::Tls if url.tls.direct => Ok(Box::pin(net::connect_tls(stream, url)).await?),
        Encryption::Tls | Encryption::IfOffered => match (request_tls(stream).await.map_err(failed)?, encryption) {
            (Ok(stream), _) => match Box::pin(net::connect_tls(stream, url)).await {
                Ok(stream) => Ok(stream),
                // it offered TLS and could not do it: with `prefer` plain is as good
                Err(_) if encryption == Encryption::IfOffered => socket(url).await.map_err(failed),
                Err(error) => Err(error.into()),
            },
            (Err(stream), Encryption::IfOffered) => Ok(stream),
            (Err(_), _) => Err(BackendError::NoTls { server: server(), sslmode: url.sslmode.as_str() }),
        },
    }
}

async fn socket(url: &ServerUrl) -> io::Result<Stream> {
    if url.host.starts_with('/') {
        return UnixStream::connect(format!("{}/.s.PGSQL.{}", url.host, url.port)).await.map(Stream::Unix);
    }
    let stream = TcpStream::connect((url.host.as_str(), url.port)).await?;
    net::tune(&stream, &url.tcp);
    Ok(Stream::Tcp(stream))
}

/// Asks for TLS; `Err` inside: the server said no. Exactly one byte is read: what came behind it unencrypted could have been put
/// there by somebody in the middle (CVE-2021-23222), and becomes part of the handshake, which it breaks.
async fn request_tls(mut stream: Stream) -> io::Result<Result<Stream, Stream>> {
    stream.write_all(&SSL_REQUEST).await?;
    let mut answer = [0];
    stream.read_exact(&mut answer).await?;
    match answer {
        [b'S'] => Ok(Ok(stream)),
        [b'N'] => Ok(Err(stream)),
        // an error message here is not authenticated and says nothing reliable (CVE-2024-10977)
        [b'E'] => Err(io::Error::other("the server answered the request for TLS with an error: its log says why")),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "it answered the request for TLS with what is not PostgreSQL's protocol")),
    }
}

/// Asks a server to cancel what the connection with this key is doing, and waits until it has done so.
///
/// # Errors
/// [`BackendError`]
pub async fn cancel(url: &ServerUrl, pid: i32, key: &[u8]) -> Result<(), BackendError> {
    let mut stream = connect(url).await?;
    let mut request = BytesMut::new();
    frontend::put_cancel(&mut request, pid, key);
    stream.write_all(&request).await?;
    // The server closes without an answer once it has handled the request: waiting for that keeps a late cancel
    // from hitting the next statement of the same connection.
    let mut rest = [0; 16];
    let _ = tokio::time::timeout(CONNECT_TIMEOUT, stream.read(&mut rest)).await;
    Ok(())
}
