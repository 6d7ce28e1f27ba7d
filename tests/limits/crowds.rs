//! Many clients at once, most of them up to nothing.

use crate::{
    Raw, Stage,
    harness::wait_until,
    raw::{PATIENCE, Request, startup, tags},
};
use std::{fs, time::Duration};
use tokio::io::AsyncWriteExt;

/// Idle clients that are measured.
const IDLE: usize = 250;
/// What each may add to the resident memory: what issue and users are promised. It is some 12 kB (ARCHITECTURE.md), more where fewer
/// are measured.
const IDLE_BYTES_MAX: u64 = 20_000;

/// Resident bytes of a process.
pub fn resident(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

fn logged_in() -> bytes::BytesMut {
    startup(196_608, &[(b"user", b"app"), (b"database", b"shop")])
}

/// Some work of each kind, then nothing.
async fn work(raw: &mut Raw) {
    raw.query("SELECT repeat('x', 5000)").await;
    let bind = |request: Request| request.bind("", "s", &[], &[Some(b"3")], &[]).execute("", 0).sync();
    raw.send(&bind(bind(Request::new().parse("s", "SELECT repeat('y', 3000 * $1)", &[23]))).0).await;
    assert_eq!(tags(&raw.until_ready(2).await), "12DCZ2DCZ");
    raw.query("BEGIN; SELECT 1; COMMIT").await;
}

/// A client that has worked and now waits costs little.
pub async fn idle(stage: &Stage) {
    let pid = stage.proxy.pid();
    let mut first = Vec::new();
    for _ in 0..30 {
        let mut raw = stage.raw().await; // what the first ones allocate is not each one's
        work(&mut raw).await;
        first.push(raw);
    }
    let before = resident(pid);
    let mut idle = Vec::new();
    for _ in 0..IDLE {
        let mut raw = stage.raw().await;
        work(&mut raw).await;
        idle.push(raw);
    }
    let each = resident(pid).saturating_sub(before) / IDLE as u64;
    eprintln!("    an idle client has {each} bytes");
    assert!(each <= IDLE_BYTES_MAX, "{each} bytes each");
    drop((first, idle));
    wait_until("all of them are gone", PATIENCE, || async { stage.clients().await == 0 }).await;
}

/// Thousands of connections opened and closed at once, with and without a start-up packet; memory is there for the next.
pub async fn floods(stage: &Stage) {
    let mut witness = stage.raw().await;
    let port = stage.proxy.listen;
    let flood = async |connections: usize, bytes: &[u8]| {
        for _ in 0..connections / 100 {
            let connects = (0..100).map(|_| async {
                let mut raw = Raw::connect(port).await;
                let _ = raw.stream.write_all(bytes).await;
            });
            futures_util::future::join_all(connects).await;
        }
    };
    let mut sizes = Vec::new();
    for _ in 0..3 {
        let log_in = logged_in();
        let harmless = async {
            flood(1_000, b"").await;
            flood(500, &log_in[..7]).await;
            flood(500, &log_in).await;
            let mut silent = Vec::new();
            for _ in 0..300 {
                silent.push(Raw::connect(port).await);
            }
            silent
        };
        let watching = async {
            for _ in 0..100 {
                assert_eq!(witness.value("SELECT 1").await, "1");
            }
        };
        let (silent, ()) = tokio::join!(harmless, watching);
        drop(silent);
        wait_until("only the witness is left", PATIENCE, || async { stage.clients().await == 1 }).await;
        sizes.push(resident(stage.proxy.pid()));
    }
    eprintln!("    resident after each of three floods: {:?} MB", sizes.iter().map(|size| size >> 20).collect::<Vec<_>>());
    assert!(sizes[2] <= sizes[0] + (8 << 20), "each flood leaves something behind: {sizes:?}");
}

/// Clients that send a byte now and then, before and after the log-in, keep nobody from anything; `login_timeout` ends the first.
pub async fn dripping(stage: &Stage) {
    let mut witness = stage.raw().await;
    let (log_in, query) = (logged_in(), Request::new().query("SELECT 'drop by drop'").0);
    let mut before = Vec::new();
    let mut after = Vec::new();
    for _ in 0..40 {
        before.push(Raw::connect(stage.proxy.listen).await);
        after.push(stage.raw().await);
    }
    for at in 0..query.len() {
        for raw in &mut after {
            raw.send(&query[at..=at]).await;
        }
        for raw in &mut before {
            raw.send(&log_in[at % 20..=at % 20]).await;
        }
        assert_eq!(witness.value("SELECT 1").await, "1");
    }
    for raw in &mut after {
        assert_eq!(tags(&raw.until_ready(1).await), "TDCZ");
    }
    let timed_out = async {
        for raw in &mut before {
            while raw.next().await.is_some() {}
        }
    };
    tokio::time::timeout(Duration::from_secs(60), timed_out).await.expect("login_timeout ends who does not finish");
}
