//! Large things, slow readers, hostile texts, replication: nobody stalls anybody, memory stays, the process lives.

use crate::{
    Stage,
    raw::{PATIENCE, Raw, Request, codes, startup, tags},
    support::find_client,
};
use bytes::BytesMut;
use std::{fs, path::Path, process::Command, time::Duration};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use understudy::wire;

/// A value that no proxy can hold without being seen to.
const LARGE_BYTES: usize = 200 << 20;
/// What the proxy may grow by meanwhile.
const GROWTH_BYTES_MAX: u64 = 64 << 20;

fn resident(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// Runs `work` and returns by how much the proxy's resident memory grew at most.
async fn growth(stage: &Stage, work: impl Future<Output = ()>) -> u64 {
    let pid = stage.proxy.pid();
    let (before, mut most) = (resident(pid), 0);
    let mut tick = tokio::time::interval(Duration::from_millis(5));
    tokio::pin!(work);
    loop {
        tokio::select! {
            () = &mut work => return most,
            _ = tick.tick() => most = most.max(resident(pid).saturating_sub(before)),
        }
    }
}

/// Reads messages without keeping their bodies, up to the `n`th ReadyForQuery; bytes of the largest.
async fn largest(raw: &mut Raw, n: usize) -> usize {
    let (mut most, mut ready) = (0, 0);
    while ready < n {
        while raw.buffer.len() < 5 {
            assert_ne!(tokio::time::timeout(PATIENCE, raw.stream.read_buf(&mut raw.buffer)).await.unwrap().unwrap(), 0);
        }
        let header = wire::peek(&raw.buffer).unwrap().unwrap();
        ready += usize::from(header.tag == b'Z');
        most = most.max(header.len);
        let mut left = header.len;
        loop {
            let part = left.min(raw.buffer.len());
            drop(raw.buffer.split_to(part));
            left -= part;
            if left == 0 {
                break;
            }
            raw.buffer.reserve(256 << 10);
            assert_ne!(tokio::time::timeout(PATIENCE, raw.stream.read_buf(&mut raw.buffer)).await.unwrap().unwrap(), 0);
        }
    }
    most
}

/// 14: 200 MB as a statement, a parameter, a row, and COPY both ways, through little memory.
pub async fn large(stage: &Stage) {
    let mut raw = stage.raw().await;
    let block = vec![b'x'; 1 << 20];
    let send = async |raw: &mut Raw, tag: u8, head: &[u8], tail: &[u8]| {
        let length = (4 + head.len() + LARGE_BYTES + tail.len()) as u32;
        raw.send(&[&[tag][..], &length.to_be_bytes(), head].concat()).await;
        for _ in 0..LARGE_BYTES / block.len() {
            raw.send(&block).await;
        }
        raw.send(tail).await;
    };
    let grown = growth(stage, async {
        raw.query("CREATE TEMP TABLE big (t text)").await;
        raw.query("ALTER TABLE big ALTER t SET STORAGE EXTERNAL").await;
        send(&mut raw, b'Q', b"SELECT length('", b"')\0").await;
        assert_eq!(tags(&raw.until_ready(1).await), "TDCZ", "a Query");
        raw.send(&Request::new().parse("big", "SELECT length($1)", &[25]).0).await;
        let head = [&b"\0big\0\0\0\0\x01"[..], &(LARGE_BYTES as u32).to_be_bytes()].concat();
        send(&mut raw, b'B', &head, b"\0\0").await;
        raw.send(&Request::new().execute("", 0).sync().0).await;
        let seen = raw.until_ready(1).await;
        assert_eq!(tags(&seen), "12DCZ", "a parameter");
        assert!(seen[2].body.ends_with(LARGE_BYTES.to_string().as_bytes()));
        raw.send(&Request::new().query("COPY big FROM STDIN").0).await;
        send(&mut raw, b'd', b"", b"\n").await;
        raw.send(&Request::new().copy_done().0).await;
        assert_eq!(tags(&raw.until_ready(1).await), "GCZ", "CopyData");
        raw.send(&Request::new().query("SELECT t FROM big").query("COPY big TO STDOUT").0).await;
        assert!(largest(&mut raw, 2).await > LARGE_BYTES, "a row");
    })
    .await;
    eprintln!("    {} MB both ways grew the proxy by {:.1} MB at most", LARGE_BYTES >> 20, grown as f64 / 1048576.0);
    assert!(grown < GROWTH_BYTES_MAX, "{grown} bytes");
    assert_eq!(raw.value("SELECT 1").await, "1");
}

/// 40: clients that do not read, or read while they do not stop writing, stall nobody and cost a bounded amount.
pub async fn slow(stage: &Stage) {
    // sessions are spread over the threads: there is a witness beside each of the others
    let mut witnesses = Vec::new();
    for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
        witnesses.push(stage.raw().await);
    }
    let grown = growth(stage, async {
        let mut lazy = vec![stage.raw().await];
        lazy[0].send(&Request::new().query("SELECT repeat('x', 256 << 20)").0).await;
        for _ in 0..8 {
            let mut raw = stage.raw().await;
            raw.send(&Request::new().query("SELECT repeat('x', 50000000)").query("SELECT generate_series(1, 2000000)").0).await;
            lazy.push(raw);
        }
        for _ in 0..100 {
            for witness in &mut witnesses {
                assert_eq!(witness.value("SELECT 1").await, "1", "others go on");
            }
        }
        // a pipeline whose answers are not read while it is written: both directions must move
        let mut raw = stage.raw().await;
        let mut bytes = BytesMut::new();
        for _ in 0..3000 {
            bytes.extend_from_slice(&Request::new().query(format!("SELECT '{}'", "y".repeat(20_000))).0);
        }
        let (mut read, mut write) = raw.stream.split();
        let writing = async {
            write.write_all(&bytes).await.unwrap();
        };
        let reading = async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            let (mut left, mut buffer) = (3000usize * 20_000, vec![0; 1 << 16]);
            while left > 0 {
                let read = tokio::time::timeout(PATIENCE, read.read(&mut buffer)).await.expect("stalled").unwrap();
                assert_ne!(read, 0);
                left = left.saturating_sub(read);
            }
        };
        tokio::join!(writing, reading);
        drop(lazy);
    })
    .await;
    eprintln!(
        "    9 clients that do not read, one of them a cell of 256 MB, and a pipeline of 60 MB both ways, grew the proxy by {:.1} MB",
        grown as f64 / 1048576.0
    );
    assert!(grown < GROWTH_BYTES_MAX, "{grown} bytes");
}

/// No text can stop or kill the process; the server's verdict is the client's.
pub async fn hostile(stage: &Stage) {
    let mut raw = stage.raw().await;
    let mut witness = stage.raw().await;
    let sum = vec!["1"; 4_000].join(" + ");
    let deep = format!("SELECT {}1{}", "(".repeat(100_000), ")".repeat(100_000));
    let list = (0..1_400_000).map(|k| k.to_string()).collect::<Vec<_>>().join(",");
    let cases = format!("SELECT {} 1 {}", "CASE WHEN true THEN ".repeat(20_000), "END ".repeat(20_000));
    for text in [
        format!("SELECT {sum}"),
        deep,
        format!("SELECT 1 WHERE 5 IN ({list})"),
        cases,
        format!("SELECT {}1", "NOT ".repeat(50_000)),
        format!("SELECT '{}", "'' ".repeat(100_000)),
        format!("SELECT {}", "/*".repeat(2_000)), // more takes PostgreSQL itself a minute
        format!("SELECT $a${}", "$b$ $a ".repeat(100_000)),
        format!("SELECT {}", "a.".repeat(100_000)),
        "SELECT 1;".repeat(5_000),
        format!("SELECT {}1", "@ ".repeat(50_000)),
        "SELECT \u{1}\u{7f}\u{fffe} \\x".into(),
    ] {
        for request in [Request::new().query(&text), Request::new().run(&text).sync()] {
            raw.send(&request.0).await;
            let seen = raw.until_ready(1).await;
            assert!(seen.iter().all(|message| message.tag != b'E') || codes(&seen).iter().all(|code| code != "08006"));
            assert_eq!(witness.value("SELECT 1").await, "1");
        }
    }
    assert!(!stage.proxy.log_text().contains("panicked"));
}

/// 15: a replication connection is relayed whole, pinned, and visible; COPY BOTH ends from either side.
pub async fn replication(stage: &Stage) {
    let login: [(&[u8], &[u8]); 3] = [(b"user", b"postgres"), (b"database", b"shop"), (b"replication", b"database")];
    let mut raw = Raw::open_with(stage.proxy.listen, &startup(196_608, &login)).await;
    assert_eq!(tags(&raw.query("IDENTIFY_SYSTEM").await), "TDCZ");
    let clients = stage.proxy.rows("SHOW CLIENTS").await;
    assert!(clients.iter().any(|row| row.to_string().contains("replication connection")), "{clients:?}");
    raw.query("CREATE_REPLICATION_SLOT through LOGICAL test_decoding").await;
    raw.send(&Request::new().query("START_REPLICATION SLOT through LOGICAL 0/0").0).await;
    assert_eq!(raw.receive().await.tag, b'W', "CopyBothResponse");
    let mut other = stage.raw().await;
    other.query("INSERT INTO item VALUES (5000, 1, 'replicated')").await;
    loop {
        let message = raw.receive().await;
        assert_eq!(message.tag, b'd');
        if message.body.first() == Some(&b'w') && message.body.windows(10).any(|part| part == b"replicated") {
            break;
        }
    }
    raw.send(&Request::new().copy_done().0).await;
    let seen = raw.until_ready(1).await;
    let seen: Vec<_> = seen.into_iter().filter(|message| message.tag != b'd').collect();
    assert!(tags(&seen).starts_with('c') && tags(&seen).ends_with("CZ"), "{}", tags(&seen));
    raw.query("DROP_REPLICATION_SLOT through").await;
    drop(raw);

    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("protocol-replication");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    let port = stage.proxy.listen.to_string();
    let run = async |name: &str, arguments: &[&str]| {
        let mut command = Command::new(find_client(name).unwrap_or_else(|| panic!("{name} is missing: run `scripts/setup`")));
        command.args(["-h", "127.0.0.1", "-p", &port, "-U", "postgres"]).args(arguments).env("LC_ALL", "C.UTF-8");
        let output = tokio::process::Command::from(command).kill_on_drop(true).output();
        let output = tokio::time::timeout(PATIENCE * 2, output).await.unwrap_or_else(|_| panic!("{name} hangs")).unwrap();
        assert!(output.status.success(), "{name} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    run("pg_recvlogical", &["-d", "shop", "--slot", "recv", "--create-slot", "-P", "test_decoding"]).await;
    other.query("INSERT INTO item VALUES (5001, 1, 'received')").await;
    let end = other.value("SELECT pg_current_wal_insert_lsn()").await;
    let file = folder.join("received");
    run("pg_recvlogical", &["-d", "shop", "--slot", "recv", "--start", "--endpos", &end, "-f", file.to_str().unwrap()]).await;
    assert!(fs::read_to_string(&file).unwrap().contains("5001"));
    run("pg_recvlogical", &["-d", "shop", "--slot", "recv", "--drop-slot"]).await;
    let backup = folder.join("backup");
    run("pg_basebackup", &["-D", backup.to_str().unwrap(), "-X", "stream", "-c", "fast", "--no-sync"]).await;
    assert!(backup.join("backup_manifest").exists() && backup.join("global/pg_control").exists());
    let _ = fs::remove_dir_all(&folder);
    other.query("DELETE FROM item WHERE id >= 5000").await;
}
