//! Peers that do not speak the protocol, stop in the middle, or speak another one.

use crate::{
    harness::{Proxy, ask, connect, sqlstate, try_connect},
    support::Server,
};
use std::time::Duration;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use understudy::backend::Connection;

async fn raw(proxy: &Proxy, bytes: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(("127.0.0.1", proxy.listen)).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    stream
}

/// What comes back until the proxy closes; `None`: it does not close.
async fn answer(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut bytes)).await;
    read.ok().map(|_| bytes)
}

pub async fn nonsense(source: &Server, proxy: &mut Proxy) {
    let url = proxy.through(&source.app_url("shop"));
    let witness = connect(&url).await;
    let startup = |version: [u8; 4], parameters: &[u8]| {
        let mut bytes = ((8 + parameters.len()) as u32).to_be_bytes().to_vec();
        bytes.extend_from_slice(&version);
        bytes.extend_from_slice(parameters);
        bytes
    };
    // refused at once, with a reason
    for (what, bytes) in [
        ("an HTTP request", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
        ("zeros", vec![0; 64]),
        ("ones", vec![0xff; 64]),
        ("a TLS handshake", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa".to_vec()),
        ("protocol 2", startup([0, 2, 0, 0], b"user\0app\0\0")),
        ("no user", startup([0, 3, 0, 0], b"database\0shop\0\0")),
        ("no end of parameters", startup([0, 3, 0, 0], b"user\0app\0database")),
        ("no parameters at all", startup([0, 3, 0, 0], b"")),
    ] {
        let mut stream = raw(proxy, &bytes).await;
        let said = answer(&mut stream).await.unwrap_or_else(|| panic!("{what}: the connection stays open"));
        assert!(said.first() == Some(&b'E'), "{what}: {}", String::from_utf8_lossy(&said));
        assert!(
            said.windows(5).any(|window| window == b"08P01" || window == b"28000" || window == b"0A000"),
            "{what}: {}",
            String::from_utf8_lossy(&said)
        );
    }
    // half of something: kept waiting without holding anybody up
    let mut half = Vec::new();
    let whole = startup([0, 3, 0, 0], b"user\0app\0database\0shop\0\0");
    for length in [1, 4, 9, whole.len() - 1] {
        half.push(raw(proxy, &whole[..length]).await);
    }
    half.push(raw(proxy, &whole).await); // and never answers the password request
    for bytes in [&b"\0\0\0\x08\x04\xd2\x16\x2f"[..], b"\0\0\0\x08\x04\xd2\x16\x30"] {
        half.push(raw(proxy, bytes).await); // asks for encryption, then nothing
    }
    drop(raw(proxy, &whole[..7]).await);
    drop(raw(proxy, &whole).await);
    // after log-in: a length that cannot be, an unknown type, a cut message
    let mut connection = Connection::open(&url, &[]).await.unwrap();
    connection.send(b"Q\xff\xff\xff\xff").await.unwrap();
    let message = tokio::time::timeout(Duration::from_secs(5), connection.receive()).await.unwrap().unwrap();
    assert_eq!(message.tag, b'E');
    for bytes in
        [&b"\x01\0\0\0\x04"[..], b"Q\0\0\0\x04", b"B\0\0\0\x06\0x", b"P\0\0\0\x05a", b"E\0\0\0\x04", b"F\0\0\0\x05\0", b"p\0\0\0\x05\0"]
    {
        let mut connection = Connection::open(&url, &[]).await.unwrap();
        connection.send(bytes).await.unwrap();
        connection.send(b"S\0\0\0\x04").await.unwrap();
        let message = tokio::time::timeout(Duration::from_secs(5), connection.receive()).await;
        let message = message.unwrap_or_else(|_| panic!("{bytes:?}: no answer"));
        assert!(message.is_err() || message.unwrap().tag == b'E', "{bytes:?}");
    }
    let mut cut = Connection::open(&url, &[]).await.unwrap();
    cut.send(b"Q\0\0\x01\0SELECT").await.unwrap();
    drop(cut);
    // seeded rubbish after log-in
    let mut random = fastrand::Rng::with_seed(15);
    for _ in 0..20 {
        let mut connection = Connection::open(&url, &[]).await.unwrap();
        let bytes: Vec<u8> = (0..random.usize(1..300)).map(|_| random.u8(..)).collect();
        connection.send(&bytes).await.unwrap();
    }
    // the console and the HTTP side are no softer
    for bytes in [&b"\0\0\0\x20\0\x03\0\0user\0o\0database\0understudy"[..], b"\0\0\0\x0e\0\x03\0\0\0\0\0\0\0\0"] {
        drop(raw(proxy, bytes).await);
    }
    let mut http = TcpStream::connect(("127.0.0.1", proxy.http)).await.unwrap();
    http.write_all(&[0xff; 2000]).await.unwrap();
    answer(&mut http).await.expect("the HTTP side closes");

    assert_eq!(ask(&witness, "SELECT 1").await, "1", "others go on");
    assert_eq!(ask(&connect(&url).await, "SELECT 2").await, "2", "and come");
    assert_eq!(sqlstate(try_connect(&understudy::config::ServerUrl { dbname: "".into(), ..url.clone() }).await), "3D000");
    assert!(proxy.is_running());
    drop(half);
    let log = proxy.log_text();
    assert!(!log.contains("panicked"), "{log}");
    // nothing that has gone is still counted as open
    let paused = tokio::time::timeout(Duration::from_secs(10), proxy.tell("PAUSE shop")).await.expect("something holds a PAUSE up");
    assert_eq!(paused.code, 0, "{}", paused.stderr);
    proxy.rows("RESUME shop").await;
}
