//! One raw connection.

use crate::{
    config::ServerUrl,
    net::Stream,
    wire::{self, Message, WireError, backend::ErrorFields, frontend, put, put_cstr, take_cstr, take_i32},
};
use bytes::{Bytes, BytesMut};
use postgres_protocol::authentication::{md5_hash, sasl};
use std::{io, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixStream},
};

/// Longest time to reach a server and log in.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

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

/// Connects to a server.
///
/// # Errors
/// [`BackendError::Connect`], [`BackendError::Timeout`]
pub async fn connect(url: &ServerUrl) -> Result<Stream, BackendError> {
    let server = format!("{}:{}", url.host, url.port);
    let connecting = async {
        if url.host.starts_with('/') {
            UnixStream::connect(format!("{}/.s.PGSQL.{}", url.host, url.port)).await.map(Stream::Unix)
        } else {
            let stream = TcpStream::connect((url.host.as_str(), url.port)).await?;
            stream.set_nodelay(true)?;
            Ok(Stream::Tcp(stream))
        }
    };
    match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(source)) => Err(BackendError::Connect { server, source }),
        Err(_) => Err(BackendError::Timeout { server }),
    }
}

/// A logged-in connection: whole messages in, raw bytes out.
#[derive(Debug)]
pub struct Connection {
    /// The socket.
    pub stream: Stream,
    /// Bytes read and not yet taken as messages.
    pub buffer: BytesMut,
    /// ParameterStatus values of the start-up, in order.
    pub parameters: Vec<(Bytes, Bytes)>,
    /// Process id and key for CancelRequest.
    pub key: (i32, Bytes),
}

impl Connection {
    /// Connects and logs in. `parameters` are start-up parameters besides `user` and `database`
    /// (such as `application_name`, `replication`).
    ///
    /// # Errors
    /// [`BackendError`]
    pub async fn open(url: &ServerUrl, parameters: &[(&[u8], &[u8])]) -> Result<Self, BackendError> {
        match tokio::time::timeout(CONNECT_TIMEOUT, Self::open_unbounded(url, parameters)).await {
            Ok(result) => result,
            Err(_) => Err(BackendError::Timeout { server: format!("{}:{}", url.host, url.port) }),
        }
    }

    async fn open_unbounded(url: &ServerUrl, parameters: &[(&[u8], &[u8])]) -> Result<Self, BackendError> {
        let stream = connect(url).await?;
        let mut connection =
            Connection { stream, buffer: BytesMut::with_capacity(8 << 10), parameters: Vec::new(), key: (0, Bytes::new()) };
        let mut startup = BytesMut::new();
        let identity = [(&b"user"[..], url.user.as_bytes()), (b"database", url.dbname.as_bytes())];
        frontend::put_startup(&mut startup, identity.into_iter().chain(parameters.iter().copied()));
        connection.send(&startup).await?;
        connection.log_in(url).await?;
        loop {
            let message = connection.receive().await?;
            match message.tag {
                b'S' => {
                    let mut rest = &message.body[..];
                    if let (Some(name), Some(value)) = (take_cstr(&mut rest), take_cstr(&mut rest)) {
                        connection.parameters.push((message.body.slice_ref(name), message.body.slice_ref(value)));
                    }
                }
                b'K' => {
                    let mut rest = &message.body[..];
                    let pid = take_i32(&mut rest).ok_or(WireError::Truncated('K'))?;
                    connection.key = (pid, message.body.slice_ref(rest));
                }
                b'Z' => return Ok(connection),
                b'E' => return Err(BackendError::Server(ErrorFields::parse(&message.body))),
                _ => {}
            }
        }
    }

    async fn log_in(&mut self, url: &ServerUrl) -> Result<(), BackendError> {
        let refuse = |reason: &str| BackendError::Authentication { user: url.user.clone(), reason: reason.to_owned() };
        let password = || {
            url.password.as_ref().map(|password| password.expose().as_bytes().to_vec()).ok_or_else(|| {
                refuse("the server asks for a password and none is configured: put it into the url or add a [[database.user]]")
            })
        };
        let mut scram: Option<sasl::ScramSha256> = None;
        loop {
            let message = self.receive().await?;
            match message.tag {
                b'E' => return Err(BackendError::Server(ErrorFields::parse(&message.body))),
                b'R' => {}
                b'N' | b'v' => continue,
                tag => return Err(BackendError::Protocol(format!("unexpected message {:?} during log-in", tag as char))),
            }
            let mut rest = &message.body[..];
            let mut answer = BytesMut::new();
            match take_i32(&mut rest).ok_or(WireError::Truncated('R'))? {
                0 => return Ok(()),
                3 => {
                    let password = password()?;
                    put(&mut answer, b'p', |b| put_cstr(b, &password));
                }
                5 => {
                    let salt: [u8; 4] = rest.try_into().map_err(|_| WireError::Truncated('R'))?;
                    let hash = md5_hash(url.user.as_bytes(), &password()?, salt);
                    put(&mut answer, b'p', |b| put_cstr(b, hash.as_bytes()));
                }
                10 => {
                    let mut offered = Vec::new();
                    while let Some(mechanism) = take_cstr(&mut rest).filter(|m| !m.is_empty()) {
                        offered.push(mechanism);
                    }
                    if !offered.contains(&sasl::SCRAM_SHA_256.as_bytes()) {
                        return Err(refuse("the server offers no SASL mechanism that understudy knows (SCRAM-SHA-256)"));
                    }
                    let state = sasl::ScramSha256::new(&password()?, sasl::ChannelBinding::unsupported());
                    put(&mut answer, b'p', |b| {
                        put_cstr(b, sasl::SCRAM_SHA_256.as_bytes());
                        b.extend_from_slice(&(state.message().len() as i32).to_be_bytes());
                        b.extend_from_slice(state.message());
                    });
                    scram = Some(state);
                }
                11 => {
                    let state = scram.as_mut().ok_or_else(|| BackendError::Protocol("SASL out of order".into()))?;
                    state.update(rest).map_err(|error| refuse(&format!("SCRAM failed: {error}")))?;
                    put(&mut answer, b'p', |b| b.extend_from_slice(state.message()));
                }
                12 => {
                    let state = scram.as_mut().ok_or_else(|| BackendError::Protocol("SASL out of order".into()))?;
                    state
                        .finish(rest)
                        .map_err(|error| refuse(&format!("the server failed to prove that it knows the password: {error}")))?;
                    continue;
                }
                kind => return Err(refuse(&format!("the server asks for authentication method {kind}, which understudy cannot do"))),
            }
            self.send(&answer).await?;
        }
    }

    /// Sends raw bytes.
    ///
    /// # Errors
    /// [`BackendError::Io`]
    pub async fn send(&mut self, bytes: &[u8]) -> Result<(), BackendError> {
        self.stream.write_all(bytes).await.map_err(BackendError::Io)
    }

    /// The next whole message. Cancel-safe: bytes read so far stay in the buffer.
    ///
    /// # Errors
    /// [`BackendError`]; a closed connection is [`io::ErrorKind::UnexpectedEof`].
    pub async fn receive(&mut self) -> Result<Message, BackendError> {
        loop {
            if let Some(message) = wire::take(&mut self.buffer)? {
                return Ok(message);
            }
            self.buffer.reserve(8 << 10);
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Err(BackendError::Io(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection")));
            }
        }
    }

    /// Runs one simple query and returns its rows as text. For replication commands and session set-up.
    ///
    /// # Errors
    /// [`BackendError::Server`] with the first error; the connection stays usable.
    pub async fn simple_query(&mut self, text: &str) -> Result<Vec<Vec<Option<String>>>, BackendError> {
        let mut request = BytesMut::new();
        frontend::put_query(&mut request, text.as_bytes());
        self.send(&request).await?;
        let (mut rows, mut failure) = (Vec::new(), None);
        loop {
            let message = self.receive().await?;
            match message.tag {
                b'D' => {
                    let values = wire::backend::data_row(&message.body).ok_or(WireError::Truncated('D'))?;
                    rows.push(values.into_iter().map(|value| value.map(|v| String::from_utf8_lossy(v).into_owned())).collect());
                }
                b'E' => failure = Some(ErrorFields::parse(&message.body)),
                b'Z' => return failure.map_or(Ok(rows), |fields| Err(BackendError::Server(fields))),
                _ => {}
            }
        }
    }
}

/// Asks a server to cancel what the connection with this key is doing.
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
