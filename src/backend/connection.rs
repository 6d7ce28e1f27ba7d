//! One raw connection.

use super::{BackendError, CONNECT_TIMEOUT, attempts, connect_as, is_about_encryption};
use crate::{
    auth::ServerLogin,
    config::ServerUrl,
    net::Stream,
    wire::{self, Message, WireError, backend::ErrorFields, frontend, take_cstr, take_i32},
};
use bytes::{Bytes, BytesMut};
use std::io;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// What every server of the field speaks.
const PROTOCOL_3_0: i32 = 3 << 16;

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
    /// Connects and logs in as the url says. `parameters` are start-up parameters besides `user` and `database` (such as
    /// `application_name`, `replication`).
    ///
    /// # Errors
    /// [`BackendError`]
    pub async fn open(url: &ServerUrl, parameters: &[(&[u8], &[u8])]) -> Result<Self, BackendError> {
        Self::open_as(url, &url.user, &ServerLogin::from(url.password.as_ref()), parameters).await
    }

    /// The same as another role: of the url only server, database and TLS count.
    ///
    /// # Errors
    /// [`BackendError`]
    pub async fn open_as(url: &ServerUrl, user: &str, login: &ServerLogin, parameters: &[(&[u8], &[u8])]) -> Result<Self, BackendError> {
        Self::open_version(PROTOCOL_3_0, url, user, login, parameters).await
    }

    /// The same, with a protocol version (major in the upper 16 bits): from 3.2 on, keys for cancelling are longer. An older
    /// server says so and goes on with its own.
    ///
    /// # Errors
    /// [`BackendError`]
    pub async fn open_version(
        version: i32,
        url: &ServerUrl,
        user: &str,
        login: &ServerLogin,
        parameters: &[(&[u8], &[u8])],
    ) -> Result<Self, BackendError> {
        let opening = async {
            let attempts = attempts(url);
            let mut refused = None;
            for encryption in attempts {
                let stream = match connect_as(url, *encryption).await {
                    Ok(stream) => stream,
                    Err(error) => return Err(refused.unwrap_or(error)),
                };
                let mut connection =
                    Connection { stream, buffer: BytesMut::with_capacity(8 << 10), parameters: Vec::new(), key: (0, Bytes::new()) };
                match Box::pin(connection.start(version, url, user, login, parameters)).await {
                    Ok(()) => return Ok(connection),
                    Err(BackendError::Server(fields)) if is_about_encryption(&fields.code, *encryption, &connection.stream) => {
                        refused = refused.or(Some(BackendError::Server(fields)));
                    }
                    Err(error) => return Err(refused.unwrap_or(error)),
                }
            }
            Err(refused.unwrap_or_else(|| BackendError::Protocol("no way to connect is allowed".into())))
        };
        match tokio::time::timeout(CONNECT_TIMEOUT, opening).await {
            Ok(result) => result,
            Err(_) => Err(BackendError::Timeout { server: format!("{}:{}", url.host, url.port) }),
        }
    }

    async fn start(
        &mut self,
        version: i32,
        url: &ServerUrl,
        user: &str,
        login: &ServerLogin,
        parameters: &[(&[u8], &[u8])],
    ) -> Result<(), BackendError> {
        let mut startup = BytesMut::new();
        let identity = [(&b"user"[..], user.as_bytes()), (b"database", url.dbname.as_bytes())];
        frontend::put_startup(&mut startup, version, identity.into_iter().chain(parameters.iter().copied()));
        self.send(&startup).await?;
        self.log_in(user, login, url.tls.channel_binding).await?;
        loop {
            let message = self.receive().await?;
            match message.tag {
                b'S' => {
                    let mut rest = &message.body[..];
                    if let (Some(name), Some(value)) = (take_cstr(&mut rest), take_cstr(&mut rest)) {
                        self.parameters.push((message.body.slice_ref(name), message.body.slice_ref(value)));
                    }
                }
                b'K' => {
                    let mut rest = &message.body[..];
                    let pid = take_i32(&mut rest).ok_or(WireError::Truncated('K'))?;
                    self.key = (pid, message.body.slice_ref(rest));
                }
                b'Z' => return Ok(()),
                b'E' => return Err(BackendError::Server(ErrorFields::parse(&message.body))),
                _ => {}
            }
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
        self.rows().await
    }

    /// Runs one statement with text parameters and returns its rows as text. Nothing of a parameter is ever part of the text.
    ///
    /// # Errors
    /// As [`Connection::simple_query`].
    pub async fn query(&mut self, text: &str, parameters: &[&str]) -> Result<Vec<Vec<Option<String>>>, BackendError> {
        let mut request = BytesMut::new();
        wire::put(&mut request, b'P', |b| {
            wire::put_cstr(b, b"");
            wire::put_cstr(b, text.as_bytes());
            b.extend_from_slice(&[0, 0]);
        });
        wire::put(&mut request, b'B', |b| {
            b.extend_from_slice(&[0, 0, 0, 0]); // unnamed portal and statement, all formats text
            b.extend_from_slice(&(parameters.len() as i16).to_be_bytes());
            for parameter in parameters {
                b.extend_from_slice(&(parameter.len() as i32).to_be_bytes());
                b.extend_from_slice(parameter.as_bytes());
            }
            b.extend_from_slice(&[0, 0]);
        });
        wire::put(&mut request, b'E', |b| b.extend_from_slice(&[0; 5]));
        frontend::put_sync(&mut request);
        self.send(&request).await?;
        self.rows().await
    }

    async fn rows(&mut self) -> Result<Vec<Vec<Option<String>>>, BackendError> {
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
