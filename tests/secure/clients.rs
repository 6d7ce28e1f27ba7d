//! psql with libpq's own parameters, and raw bytes.
#![allow(dead_code)]

use crate::{harness::Proxy, support::find_client};
use std::{
    io::{Read, Write},
    net::TcpStream,
    process::{Command, Stdio},
    time::Duration,
};
use understudy::config::ServerUrl;

/// What psql has said, and how it ended.
#[derive(Debug)]
pub struct Said {
    pub ok: bool,
    pub output: String,
    pub errors: String,
}

/// `sql` with `parameters` ("key=value …") added to the connection's.
pub fn psql(url: &ServerUrl, parameters: &str, sql: &str) -> Said {
    let output = Command::new(find_client("psql").unwrap())
        .args(["-X", "-A", "-t", "-v", "VERBOSITY=verbose", "-d"])
        .arg(format!("host={} port={} dbname={} {parameters}", url.host, url.port, url.dbname))
        .env("PGUSER", &url.user)
        .args(["-c", sql])
        .env("PGPASSWORD", url.password.as_ref().map_or("", |password| password.expose()))
        .env("PGCONNECT_TIMEOUT", "30")
        .env("HOME", "/nonexistent")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).trim().to_owned();
    Said { ok: output.status.success(), output: text(output.stdout), errors: text(output.stderr) }
}

impl Said {
    pub fn is(&self, what: &str) {
        assert!(self.ok && self.output == what, "{what}: {self:?}");
    }

    pub fn fails(&self, part: &str) {
        assert!(!self.ok && self.errors.contains(part), "{part}: {self:?}");
    }
}

pub fn raw(proxy: &Proxy, bytes: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(("127.0.0.1", proxy.listen)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    stream.write_all(bytes).unwrap();
    stream
}

/// Exactly so many bytes.
pub fn take(stream: &mut TcpStream, bytes: usize) -> Vec<u8> {
    let mut taken = vec![0; bytes];
    stream.read_exact(&mut taken).unwrap();
    taken
}

/// Everything up to the end of the connection.
pub fn rest(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    bytes
}

pub const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];
pub const GSS_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x30];

/// A start-up packet.
pub fn startup(version: i32, parameters: &[(&str, &str)]) -> Vec<u8> {
    let mut bytes = vec![0; 4];
    bytes.extend_from_slice(&version.to_be_bytes());
    for (name, value) in parameters {
        bytes.extend([name.as_bytes(), b"\0", value.as_bytes(), b"\0"].concat());
    }
    bytes.push(0);
    let length = (bytes.len() as u32).to_be_bytes();
    bytes[..4].copy_from_slice(&length);
    bytes
}

/// One message of a server.
pub fn message(stream: &mut TcpStream) -> (u8, Vec<u8>) {
    let head = take(stream, 5);
    let length = u32::from_be_bytes(head[1..].try_into().unwrap()) as usize;
    (head[0], take(stream, length - 4))
}
