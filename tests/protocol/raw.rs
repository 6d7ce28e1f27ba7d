//! A client of raw bytes: what it sends and what comes back is exactly what a test says and sees.
#![allow(dead_code)]

use bytes::{Bytes, BytesMut};
use std::{io, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use understudy::wire::{self, Message, backend::ErrorFields, frontend, put, put_cstr, put_sized, take_i32};

/// No test asserts speed: this only ends what would never end.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A start-up packet.
pub fn startup(version: i32, parameters: &[(&[u8], &[u8])]) -> BytesMut {
    let mut bytes = BytesMut::new();
    put_sized(&mut bytes, |b| {
        b.extend_from_slice(&version.to_be_bytes());
        for (name, value) in parameters {
            put_cstr(b, name);
            put_cstr(b, value);
        }
        b.extend_from_slice(&[0]);
    });
    bytes
}

/// A connection that has been opened, and maybe logged in.
pub struct Raw {
    pub stream: TcpStream,
    pub buffer: BytesMut,
    /// What the server said during the log-in, BackendKeyData left out.
    pub greeting: Vec<Message>,
    pub key: (i32, Bytes),
}

impl Raw {
    /// Only connects.
    pub async fn connect(port: u16) -> Raw {
        let stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Raw { stream, buffer: BytesMut::new(), greeting: Vec::new(), key: (0, Bytes::new()) }
    }

    /// Logs in as `app` to `database`, protocol 3.0; the server trusts.
    pub async fn open(port: u16, database: &str) -> Raw {
        Raw::open_with(port, &startup(196_608, &[(b"user", b"app"), (b"database", database.as_bytes())])).await
    }

    /// With this start-up packet, which must succeed.
    pub async fn open_with(port: u16, packet: &[u8]) -> Raw {
        let mut raw = Raw::connect(port).await;
        raw.send(packet).await;
        loop {
            let message = raw.receive().await;
            match message.tag {
                b'K' => {
                    let mut rest = &message.body[..];
                    let pid = take_i32(&mut rest).unwrap();
                    raw.key = (pid, message.body.slice_ref(rest));
                }
                b'E' => panic!("log-in refused: {:?}", ErrorFields::parse(&message.body)),
                tag => {
                    raw.greeting.push(message);
                    if tag == b'Z' {
                        return raw;
                    }
                }
            }
        }
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// The next message; `None`: the other side has closed.
    pub async fn next(&mut self) -> Option<Message> {
        loop {
            if let Some(message) = wire::take(&mut self.buffer).unwrap() {
                return Some(message);
            }
            self.buffer.reserve(16 << 10);
            match tokio::time::timeout(PATIENCE, self.stream.read_buf(&mut self.buffer)).await {
                Ok(Ok(0)) => return None,
                Ok(Ok(_)) => {}
                Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionReset => return None,
                Ok(Err(error)) => panic!("{error}"),
                Err(_) => panic!("nothing came within {PATIENCE:?}"),
            }
        }
    }

    pub async fn receive(&mut self) -> Message {
        self.next().await.expect("the connection was closed")
    }

    /// Messages up to and with the `n`th ReadyForQuery.
    pub async fn until_ready(&mut self, n: usize) -> Vec<Message> {
        let (mut seen, mut ready) = (Vec::new(), 0);
        while ready < n {
            let message = self.receive().await;
            ready += usize::from(message.tag == b'Z');
            seen.push(message);
        }
        seen
    }

    /// Messages until the other side closes.
    pub async fn until_closed(&mut self) -> Vec<Message> {
        let mut seen = Vec::new();
        while let Some(message) = self.next().await {
            seen.push(message);
        }
        seen
    }

    /// Sends a `Query` and collects its answer.
    pub async fn query(&mut self, text: &str) -> Vec<Message> {
        let mut bytes = BytesMut::new();
        frontend::put_query(&mut bytes, text.as_bytes());
        self.send(&bytes).await;
        self.until_ready(1).await
    }

    /// The first value that a `Query` answers with.
    pub async fn value(&mut self, text: &str) -> String {
        let seen = self.query(text).await;
        let row = seen.iter().find(|message| message.tag == b'D').unwrap_or_else(|| panic!("{text}: {}", tags(&seen)));
        let values = wire::backend::data_row(&row.body).unwrap();
        String::from_utf8_lossy(values[0].unwrap_or(b"NULL")).into_owned()
    }
}

/// The tags in order, for assertions: `"TDCZ"`.
pub fn tags(messages: &[Message]) -> String {
    messages.iter().map(|message| message.tag as char).collect()
}

/// SQLSTATEs of the errors in order.
pub fn codes(messages: &[Message]) -> Vec<String> {
    messages.iter().filter(|message| message.tag == b'E').map(|message| ErrorFields::parse(&message.body).code).collect()
}

/// For building requests.
#[derive(Default, Clone)]
pub struct Request(pub BytesMut);

impl Request {
    pub fn new() -> Self {
        Request::default()
    }

    pub fn raw(mut self, tag: u8, body: &[u8]) -> Self {
        put(&mut self.0, tag, |b| b.extend_from_slice(body));
        self
    }

    pub fn query(mut self, text: impl AsRef<[u8]>) -> Self {
        frontend::put_query(&mut self.0, text.as_ref());
        self
    }

    pub fn parse(mut self, name: &str, text: impl AsRef<[u8]>, types: &[u32]) -> Self {
        put(&mut self.0, b'P', |b| {
            put_cstr(b, name.as_bytes());
            put_cstr(b, text.as_ref());
            b.extend_from_slice(&(types.len() as u16).to_be_bytes());
            for oid in types {
                b.extend_from_slice(&oid.to_be_bytes());
            }
        });
        self
    }

    /// Format codes and parameters as they are to be sent.
    pub fn bind(mut self, portal: &str, statement: &str, formats: &[i16], parameters: &[Option<&[u8]>], results: &[i16]) -> Self {
        put(&mut self.0, b'B', |b| {
            put_cstr(b, portal.as_bytes());
            put_cstr(b, statement.as_bytes());
            b.extend_from_slice(&(formats.len() as u16).to_be_bytes());
            for format in formats {
                b.extend_from_slice(&format.to_be_bytes());
            }
            b.extend_from_slice(&(parameters.len() as u16).to_be_bytes());
            for parameter in parameters {
                match parameter {
                    Some(value) => {
                        b.extend_from_slice(&(value.len() as i32).to_be_bytes());
                        b.extend_from_slice(value);
                    }
                    None => b.extend_from_slice(&(-1i32).to_be_bytes()),
                }
            }
            b.extend_from_slice(&(results.len() as u16).to_be_bytes());
            for format in results {
                b.extend_from_slice(&format.to_be_bytes());
            }
        });
        self
    }

    /// A statement without parameters: parsed, bound and executed without a name.
    pub fn run(self, text: impl AsRef<[u8]>) -> Self {
        self.parse("", text, &[]).bind("", "", &[], &[], &[]).execute("", 0)
    }

    /// A prepared statement without parameters, bound and executed.
    pub fn run_prepared(self, name: &str) -> Self {
        self.bind("", name, &[], &[], &[]).execute("", 0)
    }

    fn named(mut self, tag: u8, kind: u8, name: &str) -> Self {
        put(&mut self.0, tag, |b| {
            b.extend_from_slice(&[kind]);
            put_cstr(b, name.as_bytes());
        });
        self
    }

    /// `kind`: `b'S'` or `b'P'`.
    pub fn describe(self, kind: u8, name: &str) -> Self {
        self.named(b'D', kind, name)
    }

    pub fn close(self, kind: u8, name: &str) -> Self {
        self.named(b'C', kind, name)
    }

    pub fn execute(mut self, portal: &str, rows: i32) -> Self {
        put(&mut self.0, b'E', |b| {
            put_cstr(b, portal.as_bytes());
            b.extend_from_slice(&rows.to_be_bytes());
        });
        self
    }

    pub fn flush(self) -> Self {
        self.raw(b'H', b"")
    }

    pub fn sync(self) -> Self {
        self.raw(b'S', b"")
    }

    pub fn copy_data(self, data: &[u8]) -> Self {
        self.raw(b'd', data)
    }

    pub fn copy_done(self) -> Self {
        self.raw(b'c', b"")
    }

    pub fn copy_fail(self, why: &str) -> Self {
        self.raw(b'f', format!("{why}\0").as_bytes())
    }

    /// Oid of the function, arguments in text, result in `format`.
    pub fn call(mut self, oid: u32, arguments: &[&[u8]], format: i16) -> Self {
        put(&mut self.0, b'F', |b| {
            b.extend_from_slice(&oid.to_be_bytes());
            b.extend_from_slice(&[0, 0]);
            b.extend_from_slice(&(arguments.len() as u16).to_be_bytes());
            for argument in arguments {
                b.extend_from_slice(&(argument.len() as u32).to_be_bytes());
                b.extend_from_slice(argument);
            }
            b.extend_from_slice(&format.to_be_bytes());
        });
        self
    }
}
