//! Every parser of untrusted bytes, fed with broken ones: mutations of a small corpus, from a seed, a bounded number in
//! `make test`. Coverage-guided fuzzing needs a nightly compiler, which this project does not; the targets are functions of
//! a byte slice, as such a fuzzer wants them.
//!
//! - `UNDERSTUDY_FUZZ_FACTOR=500` tries so many times as many inputs; `UNDERSTUDY_FUZZ_SEED=7` draws others.
//! - `UNDERSTUDY_FUZZ_TARGET=sql` tries one target only.
//!
//! What reads from a socket by itself, the log-in at a server (SCRAM included), is fed through one.

#[path = "protocol_fuzz/targets.rs"]
mod targets;

use bytes::BytesMut;
use fastrand::Rng;
use std::panic::{AssertUnwindSafe, catch_unwind};
use targets::TARGETS;
use tokio::{io::AsyncReadExt, io::AsyncWriteExt, net::TcpListener};
use understudy::{backend::Connection, config::ServerUrl, wire::put};

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text}: not a number")))
}

/// Numbers at the edges of what length words and counts may be.
const EDGES: [u32; 10] = [0, 1, 3, 4, 0x7f, 0x80, 0x7fff, 0xffff, 0x7fff_ffff, 0xffff_ffff];
/// Inputs do not grow without end.
const INPUT_BYTES_MAX: usize = 4_000;

/// One of the corpus, changed in a few places.
fn mutated(corpus: &[Vec<u8>], random: &mut Rng) -> Vec<u8> {
    let mut bytes = corpus[random.usize(..corpus.len())].clone();
    for _ in 0..random.usize(1..8) {
        let at = random.usize(..=bytes.len());
        let end = (at + random.usize(..12)).min(bytes.len());
        match random.u32(..9) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.u32(..8),
            1 if at < bytes.len() => bytes[at] = random.u8(..),
            2 => bytes.insert(at, *b"\0'\"\\;$(/\xff-"[..].get(random.usize(..11)).unwrap_or(&0)),
            3 => drop(bytes.drain(at..end)),
            4 => bytes.splice(at..at, bytes[at..end].to_vec()).for_each(drop),
            5 => bytes.truncate(at),
            6 if at + 4 <= bytes.len() => bytes[at..at + 4].copy_from_slice(&EDGES[random.usize(..EDGES.len())].to_be_bytes()),
            7 if at + 2 <= bytes.len() => bytes[at..at + 2].copy_from_slice(&(EDGES[random.usize(..EDGES.len())] as u16).to_be_bytes()),
            _ => {
                let other = &corpus[random.usize(..corpus.len())];
                let from = random.usize(..=other.len());
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
        }
    }
    bytes.truncate(INPUT_BYTES_MAX);
    bytes
}

#[test]
fn no_bytes_break_a_parser() {
    let (seed, factor) = (number("UNDERSTUDY_FUZZ_SEED", 1), number("UNDERSTUDY_FUZZ_FACTOR", 1));
    let only = std::env::var("UNDERSTUDY_FUZZ_TARGET").ok();
    let wanted: Vec<_> = TARGETS.iter().filter(|target| only.as_ref().is_none_or(|only| only == target.name)).collect();
    assert!(!wanted.is_empty(), "there is no target {only:?}");
    for target in wanted {
        let began = std::time::Instant::now();
        let corpus = (target.corpus)();
        let mut random = Rng::with_seed(seed);
        let inputs = target.inputs * factor;
        for number in 0..inputs + corpus.len() as u64 {
            let input = corpus.get(number as usize).cloned().unwrap_or_else(|| mutated(&corpus, &mut random));
            if catch_unwind(AssertUnwindSafe(|| (target.run)(&input))).is_err() {
                panic!("target {}, input {number} of seed {seed}: b\"{}\"", target.name, input.escape_ascii());
            }
        }
        eprintln!("    {}: {inputs} inputs of seed {seed} in {:.1} s", target.name, began.elapsed().as_secs_f64());
    }
}

/// What a server may say to a log-in.
fn log_ins() -> Vec<Vec<u8>> {
    let message = |tag: u8, body: &[u8]| {
        let mut bytes = BytesMut::new();
        put(&mut bytes, tag, |b| b.extend_from_slice(body));
        bytes.to_vec()
    };
    let done =
        [message(b'R', b"\0\0\0\0"), message(b'S', b"TimeZone\0UTC\0"), message(b'K', b"\0\0\0\x01abcd"), message(b'Z', b"I")].concat();
    let sasl = message(b'R', b"\0\0\0\x0aSCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0");
    vec![
        done.clone(),
        [message(b'R', b"\0\0\0\x03"), done.clone()].concat(),
        [message(b'R', b"\0\0\0\x05salt"), done.clone()].concat(),
        [sasl.clone(), message(b'R', b"\0\0\0\x0br=abc,s=QSXCR+Q6sek8bf92,i=4096"), message(b'R', b"\0\0\0\x0cv=AAAA"), done].concat(),
        [sasl, message(b'E', b"SFATAL\0C28P01\0Mno\0\0")].concat(),
        message(b'v', b"\0\x03\0\0\0\0\0\x01_pq_.x\0"),
    ]
}

/// A server that says anything: the log-in ends, as an error or not, and does not take the process with it.
#[tokio::test(flavor = "multi_thread")]
async fn no_server_breaks_a_log_in() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let url = ServerUrl::parse(&format!("postgres://app:secret@127.0.0.1:{port}/shop?sslmode=disable")).unwrap();
    let seed = number("UNDERSTUDY_FUZZ_SEED", 1);
    let mut random = Rng::with_seed(seed);
    let corpus = log_ins();
    for input in 0..300 * number("UNDERSTUDY_FUZZ_FACTOR", 1) {
        let bytes = if (input as usize) < corpus.len() { corpus[input as usize].clone() } else { mutated(&corpus, &mut random) };
        let answering = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.read(&mut [0; 1024]).await;
            let _ = stream.write_all(&bytes).await;
            let _ = stream.shutdown().await;
            // reads on, so that what the client still sends does not become a reset
            let _ = stream.read_to_end(&mut Vec::new()).await;
        };
        let logging_in = tokio::spawn({
            let url = url.clone();
            async move { Connection::open(&url, &[]).await.map(drop) }
        });
        let (result, ()) = tokio::join!(logging_in, answering);
        match result {
            Ok(Err(error)) => assert!(!error.to_string().contains("secret"), "{error}"),
            Ok(Ok(())) => {}
            Err(panic) => panic!("input {input} of seed {seed}: {panic}: b\"{}\"", bytes.escape_ascii()),
        }
    }
}
