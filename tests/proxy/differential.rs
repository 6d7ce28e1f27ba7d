//! Conversations from a seeded generator, right and wrong ones, over raw sockets: directly and through the proxy the
//! server's bytes must be the same.

use crate::{harness::Proxy, support::Server};
use bytes::BytesMut;
use std::time::Duration;
use understudy::{
    backend::Connection,
    config::ServerUrl,
    wire::{frontend, put, put_cstr},
};

const CONVERSATIONS: u64 = 40;
/// Ends every conversation, whatever state it is in.
const LAST: &str = "SELECT 'the end of it'";

const TEXTS: [&str; 16] = [
    "SELECT 1",
    "SELECT id, v FROM item ORDER BY id LIMIT 5",
    "SELECT $1::int + 1",
    "SELECT note FROM item WHERE id = $1::int",
    "SELECT 1 / 0",
    "SELECT nonsense",
    "SELEC 1",
    "",
    "BEGIN",
    "COMMIT",
    "ROLLBACK",
    "SAVEPOINT a",
    "UPDATE item SET v = v WHERE id = 3",
    "SET application_name = 'gen'",
    "SELECT generate_series(1, 2000)",
    "DO $$ BEGIN RAISE NOTICE 'seen'; END $$",
];
const NAMES: [&[u8]; 3] = [b"", b"a", b"b\xc3\xa4"];

fn message(bytes: &mut BytesMut, random: &mut fastrand::Rng) {
    let text = TEXTS[random.usize(..TEXTS.len())];
    let (name, other) = (NAMES[random.usize(..NAMES.len())], NAMES[random.usize(..NAMES.len())]);
    match random.u32(0..100) {
        0..14 => frontend::put_query(bytes, text.as_bytes()),
        14..18 => frontend::put_query(bytes, format!("{text}; SELECT 2; {}", TEXTS[random.usize(..TEXTS.len())]).as_bytes()),
        18..36 => put(bytes, b'P', |b| {
            put_cstr(b, name);
            put_cstr(b, text.as_bytes());
            b.extend_from_slice(&[0, 0]);
        }),
        36..54 => put(bytes, b'B', |b| {
            put_cstr(b, other);
            put_cstr(b, name);
            // sometimes one parameter, sometimes none, whatever the statement wants; results in text or binary
            let parameters: &[u8] = if random.bool() { &[0, 0, 0, 1, 0, 0, 0, 1, b'7'] } else { &[0, 0, 0, 0] };
            b.extend_from_slice(parameters);
            b.extend_from_slice(if random.bool() { &[0, 1, 0, 1][..] } else { &[0, 0] });
        }),
        54..62 => put(bytes, b'D', |b| {
            b.extend_from_slice(if random.bool() { b"S" } else { b"P" });
            put_cstr(b, name);
        }),
        62..76 => put(bytes, b'E', |b| {
            put_cstr(b, name);
            b.extend_from_slice(&random.i32(0..4).to_be_bytes());
        }),
        76..80 => put(bytes, b'H', |_| {}),
        80..86 => put(bytes, b'C', |b| {
            b.extend_from_slice(if random.bool() { b"S" } else { b"P" });
            put_cstr(b, name);
        }),
        86..97 => frontend::put_sync(bytes),
        97 => {
            // COPY with one good row, maybe a wrong one, in one go
            frontend::put_query(bytes, b"COPY pg_temp.sink FROM STDIN");
            put(bytes, b'd', |b| b.extend_from_slice(b"1\n"));
            if random.bool() {
                put(bytes, b'd', |b| b.extend_from_slice(b"x\n"));
            }
            put(bytes, b'c', |_| {});
        }
        98 => frontend::put_query(bytes, b"COPY (SELECT generate_series(1, 500)) TO STDOUT"),
        // function call: int4pl(1, 2) in text
        _ => put(bytes, b'F', |b| {
            b.extend_from_slice(&177u32.to_be_bytes());
            b.extend_from_slice(&[0, 0, 0, 2, 0, 0, 0, 1, b'1', 0, 0, 0, 1, b'2', 0, 0]);
        }),
    }
}

fn conversation(seed: u64) -> BytesMut {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bytes = BytesMut::new();
    frontend::put_query(&mut bytes, b"CREATE TEMP TABLE sink (id int)");
    for _ in 0..random.usize(5..60) {
        message(&mut bytes, &mut random);
    }
    frontend::put_sync(&mut bytes);
    frontend::put_query(&mut bytes, b"ROLLBACK");
    frontend::put_query(&mut bytes, LAST.as_bytes());
    bytes
}

/// Sends in pieces of a seeded size and collects the answer, ParameterStatus of the log-in included. The connection is open.
async fn converse(url: &ServerUrl, conversation: &[u8], seed: u64) -> (Connection, Vec<u8>) {
    let mut connection = Connection::open(url, &[(b"application_name", b"generated")]).await.unwrap();
    let mut random = fastrand::Rng::with_seed(seed ^ u64::from(url.port));
    let mut answer = Vec::new();
    for (name, value) in &connection.parameters {
        answer.extend_from_slice(name);
        answer.extend_from_slice(value);
    }
    let mut rest = conversation;
    while !rest.is_empty() {
        let (piece, tail) = rest.split_at(random.usize(1..=400).min(rest.len()));
        connection.send(piece).await.unwrap();
        rest = tail;
        if random.u8(..) < 30 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    let mut last = false;
    loop {
        let message = match tokio::time::timeout(Duration::from_secs(20), connection.receive()).await {
            Ok(Ok(message)) => message,
            other => panic!("seed {seed}: {other:?} after {} bytes", answer.len()),
        };
        answer.push(message.tag);
        answer.extend_from_slice(&(message.body.len() as u32).to_be_bytes());
        answer.extend_from_slice(&message.body);
        last |= message.tag == b'D' && message.body.ends_with(b"the end of it");
        if last && message.tag == b'Z' {
            return (connection, answer);
        }
    }
}

pub async fn generated(server: &Server, proxy: &Proxy) {
    let url = server.app_url("shop");
    let through = proxy.through(&url);
    let (mut total, mut left_open) = (0, Vec::new());
    for seed in 0..CONVERSATIONS {
        let bytes = conversation(seed);
        let ((_, direct), (connection, proxied)) = tokio::join!(converse(&url, &bytes, seed), converse(&through, &bytes, seed));
        if direct != proxied {
            let at = direct.iter().zip(&proxied).take_while(|(a, b)| a == b).count();
            let around = |bytes: &[u8]| {
                String::from_utf8_lossy(&bytes[at.saturating_sub(200).min(bytes.len())..(at + 100).min(bytes.len())]).into_owned()
            };
            panic!("seed {seed}: answers differ at byte {at}\n--- direct\n{:?}\n--- proxy\n{:?}", around(&direct), around(&proxied));
        }
        total += direct.len();
        // all is answered: a session that still counts as inside a transaction could never be held or moved
        if proxy.rows("SHOW POOLS").await[0]["in_transaction"] != 0 {
            left_open.push(seed);
        }
        drop(connection);
    }
    assert!(left_open.is_empty(), "sessions are taken to be in a transaction after these conversations: {left_open:?}");
    assert!(total > 100_000, "the conversations say too little: {total} bytes");
    // no transaction is left counted as open
    let paused = tokio::time::timeout(Duration::from_secs(10), proxy.tell("PAUSE shop")).await.expect("something holds a PAUSE up");
    assert_eq!(paused.code, 0, "{}", paused.stderr);
    proxy.rows("RESUME shop").await;
}
