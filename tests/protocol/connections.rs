//! Start-up, refusals, cancels, floods.

use crate::{
    Stage,
    harness::wait_until,
    raw::{Raw, Request, codes, startup, tags},
};
use bytes::BytesMut;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use understudy::wire::{Message, frontend};

const SSL: &[u8] = b"\0\0\0\x08\x04\xd2\x16\x2f";
const GSS: &[u8] = b"\0\0\0\x08\x04\xd2\x16\x30";

fn logged_in() -> BytesMut {
    startup(196_608, &[(b"user", b"app"), (b"database", b"shop")])
}

/// Sends and reads to the end or to the first ReadyForQuery; keys blanked.
async fn greeting(port: u16, bytes: &[u8]) -> Vec<Message> {
    let mut raw = Raw::connect(port).await;
    raw.send(bytes).await;
    let mut seen = Vec::new();
    while let Some(message) = raw.next().await {
        let last = message.tag == b'Z';
        seen.push(if message.tag == b'K' { Message { tag: b'K', body: bytes::Bytes::new() } } else { message });
        if last {
            break;
        }
    }
    seen
}

/// 1, 2, 7, 8: encryption asked for in any order, once each; clients that leave early; nothing of it in the log.
pub async fn encryption(stage: &Stage) {
    for order in [&[GSS, SSL][..], &[SSL, GSS], &[SSL], &[GSS], &[]] {
        let mut raw = Raw::connect(stage.proxy.listen).await;
        for request in order {
            raw.send(request).await;
            let mut answer = [0];
            raw.stream.read_exact(&mut answer).await.unwrap();
            assert_eq!(&answer, b"N");
        }
        raw.send(&logged_in()).await;
        assert!(tags(&raw.until_ready(1).await).ends_with('Z'));
    }
    let mut raw = Raw::connect(stage.proxy.listen).await;
    for _ in 0..2 {
        raw.send(SSL).await;
    }
    let mut rest = Vec::new();
    raw.stream.read_to_end(&mut rest).await.unwrap();
    assert!(rest.starts_with(b"NE"), "asked for twice");
    // what stands behind a request came in clear, whoever sent it (CVE-2021-23214)
    for request in [SSL, GSS] {
        let mut raw = Raw::connect(stage.proxy.listen).await;
        raw.send(&[request, &logged_in()[..]].concat()).await;
        let mut rest = Vec::new();
        let _ = raw.stream.read_to_end(&mut rest).await;
        assert!(rest.starts_with(b"NE") && rest.windows(5).any(|part| part == b"08P01"), "{}", rest.escape_ascii());
    }
    let before = stage.proxy.log_text();
    for bytes in [&b""[..], &SSL[..3], SSL, GSS, &logged_in()[..9]] {
        for _ in 0..20 {
            let mut raw = Raw::connect(stage.proxy.listen).await;
            raw.send(bytes).await;
        }
    }
    assert_eq!(greeting(stage.proxy.listen, &logged_in()).await.last().map(|message| message.tag), Some(b'Z'));
    assert_eq!(stage.proxy.log_text(), before, "health checks make no noise");
}

/// 4, 5, 11, 48: what the server says to a start-up packet arrives as it is, refusals as well.
pub async fn start_up(stage: &Stage) {
    let packet = |more: &[(&[u8], &[u8])]| {
        let mut parameters: Vec<(&[u8], &[u8])> = vec![(b"user", b"app"), (b"database", b"shop")];
        parameters.extend_from_slice(more);
        startup(196_608, &parameters)
    };
    let other = |user: &[u8]| startup(196_608, &[(b"user", user), (b"database", b"shop")]);
    let long = "x".repeat(9_000);
    for (what, bytes) in [
        ("options", packet(&[(b"options", b"-c DateStyle=SQL\\ ,DMY --application_name=o -c app.x=\\\\")])),
        ("notices during the log-in", packet(&[(b"options", b"-c client_min_messages=debug5")])),
        ("a wrong option", packet(&[(b"options", b"-c nonsense")])),
        ("an unknown setting", packet(&[(b"no_such_setting", b"1")])),
        ("a wrong value", packet(&[(b"client_encoding", b"KLINGON")])),
        ("twice the same", packet(&[(b"application_name", b"a"), (b"application_name", b"b"), (b"DateStyle", b"ISO")])),
        ("almost too long", packet(&[(b"application_name", long.as_bytes())])),
        ("no replication", packet(&[(b"replication", b"off")])),
        ("a nonsensical replication", packet(&[(b"replication", b"perhaps")])),
        ("protocol 3.2", startup(196_610, &[(b"user", b"app"), (b"database", b"shop")])),
        ("protocol 3.9999", startup(196_608 + 9_999, &[(b"user", b"app"), (b"database", b"shop"), (b"_pq_.nothing", b"1")])),
        ("nobody", other(b"nobody_here")),
        ("no login", other(b"locked_out")),
        ("no connection left", other(b"limited")),
        ("not UTF-8", other(b"\xe9\xe8")),
    ] {
        let [direct, proxied] = [greeting(stage.source.server.port(), &bytes).await, greeting(stage.proxy.listen, &bytes).await];
        assert_eq!(proxied, direct, "{what}");
    }
    // one byte at a time
    let mut raw = Raw::connect(stage.proxy.listen).await;
    for byte in SSL {
        raw.send(&[*byte]).await;
    }
    raw.stream.read_exact(&mut [0]).await.unwrap();
    for byte in logged_in() {
        raw.send(&[byte]).await;
    }
    raw.until_ready(1).await;
    // and the user's name is the database's when there is none
    let seen = greeting(stage.proxy.listen, &startup(196_608, &[(b"user", b"shop")])).await;
    assert_eq!(codes(&seen), ["28000"], "the role does not exist: the server was asked");
    for (bytes, code) in [
        (startup(196_608, &[(b"database", b"shop")]), "28000"),
        (startup(196_608, &[(b"user", b"app"), (b"database", b"elsewhere")]), "3D000"),
        (startup(196_608, &[(b"user", &[b'u'; 10_001])]), "08P01"),
        (startup(131_072, &[(b"user", b"app")]), "0A000"),
    ] {
        assert_eq!(codes(&greeting(stage.proxy.listen, &bytes).await), [code]);
    }
}

/// 6, 38: a cancel hits its own statement, is done when its connection is closed, and is never late.
pub async fn cancels(stage: &Stage) {
    let mut raw = stage.raw().await;
    let operator = stage.source.server.connect("shop").await.unwrap();
    let sleeping = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
    let mut request = BytesMut::new();
    frontend::put_cancel(&mut request, raw.key.0, &raw.key.1);
    for round in 0..15 {
        raw.send(&Request::new().query("SELECT pg_sleep(60)").0).await;
        wait_until("it sleeps", Duration::from_secs(60), || async { crate::harness::ask(&operator, sleeping).await == "1" }).await;
        let mut other = Raw::connect(stage.proxy.listen).await;
        other.send(&request).await;
        let mut said = Vec::new();
        other.stream.read_to_end(&mut said).await.unwrap();
        assert!(said.is_empty(), "a cancel request is not answered");
        // closed means done: drivers send their next statement now
        let seen = raw.until_ready(1).await;
        assert_eq!(codes(&seen), ["57014"]);
        assert_eq!(tags(&raw.query("SELECT count(*) FROM generate_series(1, 20000)").await), "TDCZ", "round {round}: a late cancel");
        // a request that finds nothing to cancel is over when its connection is closed, too
        let mut other = Raw::connect(stage.proxy.listen).await;
        other.send(&request).await;
        other.stream.read_to_end(&mut said).await.unwrap();
        assert_eq!(tags(&raw.query("SELECT count(*) FROM generate_series(1, 20000)").await), "TDCZ", "round {round}: a late cancel");
    }
    for length in [8, 11, 300] {
        // a key that cannot be one
        let mut other = Raw::connect(stage.proxy.listen).await;
        let mut bytes = BytesMut::new();
        frontend::put_cancel(&mut bytes, raw.key.0, &vec![7; length - 8 + usize::from(length > 8)]);
        other.send(&bytes).await;
        other.stream.read_to_end(&mut Vec::new()).await.unwrap();
    }
}

/// Half-open and byte-at-a-time clients and a flood of connects leave others alone and leave nothing behind.
pub async fn floods(stage: &Stage) {
    let mut witness = stage.raw().await;
    let mut half = Vec::new();
    for k in 0..300 {
        let mut raw = Raw::connect(stage.proxy.listen).await;
        raw.send(&logged_in()[..k % 20]).await;
        half.push(raw);
    }
    let request = [&logged_in()[..], &Request::new().query("SELECT 'byte by byte'").0].concat();
    let burst = async {
        for _ in 0..20 {
            let connects = (0..50).map(|_| async {
                let mut raw = Raw::connect(stage.proxy.listen).await;
                let _ = raw.stream.write_all(&logged_in()).await;
            });
            futures_util::future::join_all(connects).await;
        }
    };
    let dripping = async {
        // the server has 100 places, and the burst may hold them all for a moment
        for _ in 0..100 {
            let mut slow = Raw::connect(stage.proxy.listen).await;
            for byte in &request {
                if slow.stream.write_all(&[*byte]).await.is_err() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            let mut ready = 0;
            while let Some(message) = slow.next().await {
                ready += usize::from(message.tag == b'Z');
                if ready == 2 {
                    return;
                }
                if message.tag == b'E' {
                    assert!(message.body.windows(6).any(|field| field == b"C53300"), "{message:?}");
                }
            }
        }
        panic!("a client that sends byte by byte was never let in");
    };
    let watching = async {
        for _ in 0..50 {
            assert_eq!(witness.value("SELECT 1").await, "1");
        }
    };
    tokio::join!(burst, dripping, watching);
    drop(half);
    wait_until("only the witness is left", Duration::from_secs(60), || async { stage.proxy.state().await.databases[0].clients == 1 }).await;
    assert_eq!(witness.value("SELECT 1").await, "1");
}
