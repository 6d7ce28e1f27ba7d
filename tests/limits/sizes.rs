//! Limits of size.

use crate::crowds::resident;
use crate::{
    Raw, Stage, errors, last_words,
    raw::{PATIENCE, Request, codes, tags},
};
use bytes::BytesMut;
use tokio::io::AsyncReadExt;

const NONE: &str = "max_clients = 50";

pub async fn lengths(stage: &Stage) {
    for length in [0u32, 3, 0x4000_0000, 0x7fff_ffff, 0x8000_0000, u32::MAX] {
        let mut raw = stage.raw().await;
        // what was asked for before is answered, what stands behind it is nothing
        let bad = [&b"Q"[..], &length.to_be_bytes(), b"SELECT 2\0"].concat();
        raw.send(&[&Request::new().query("SELECT 1").0[..], &bad].concat()).await;
        let seen = raw.until_closed().await;
        assert_eq!(tags(&seen), "TDCZE", "{length:x}");
        let error = &errors(&seen)[0];
        assert_eq!((error.code.as_str(), error.message.as_str()), ("08P01", "invalid message length"));
    }
    for length in [0u32, 7, 10_001, 0x7fff_ffff] {
        let mut raw = Raw::connect(stage.proxy.listen).await;
        raw.send(&[&length.to_be_bytes()[..], &[0; 16]].concat()).await;
        assert_eq!(last_words(&mut raw).await.1, "08P01", "start-up, {length:x}");
    }
}

pub async fn messages(stage: &Stage) {
    let limited = format!("{NONE}\nmax_message = \"64kB\"");
    let mut before = stage.raw().await;
    stage.reload(NONE, &limited).await;
    assert_eq!(tags(&before.query(&format!("SELECT '{}'", "x".repeat(60_000))).await), "TDCZ");
    for request in [
        Request::new().query(format!("SELECT '{}'", "x".repeat(70_000))),
        Request::new().parse("", format!("SELECT '{}'", "x".repeat(20_000_000)), &[]),
        Request::new().query("COPY item FROM STDIN").copy_data(&[b'x'; 70_000]),
    ] {
        let mut raw = stage.raw().await;
        raw.query("BEGIN").await;
        // the answer comes before the end of what is refused, and lives through it
        raw.send(&request.0).await;
        let seen = raw.until_closed().await;
        assert_eq!(codes(&seen), ["54000"], "{}", tags(&seen));
    }
    before.send(&Request::new().query(format!("SELECT '{}'", "x".repeat(70_000))).0).await;
    assert_eq!(last_words(&mut before).await.1, "54000", "a session that was there before the limit");
    stage.reload(&limited, NONE).await;
}

pub async fn memory(stage: &Stage) {
    let limited = format!("{NONE}\nclient_memory = \"1MB\"");
    let (mut greedy, mut modest) = (stage.raw().await, stage.raw().await);
    stage.reload(NONE, &limited).await;
    let comment = "x".repeat(10_000);
    let mut kept = 0;
    let refused = loop {
        let request = Request::new().parse(&format!("s{kept}"), format!("SELECT 1 /* {comment} */"), &[]).sync();
        greedy.send(&request.0).await;
        match greedy.next().await.map(|message| (message.tag, message)) {
            Some((b'1', _)) => kept += 1,
            Some((b'E', message)) => break errors(&[message]).remove(0),
            other => panic!("{other:?}"),
        }
        assert_eq!(greedy.receive().await.tag, b'Z');
        // one that closes what it prepares may go on for ever
        let request = Request::new().parse("mine", format!("SELECT 1 /* {comment} */"), &[]).close(b'S', "mine").sync();
        modest.send(&request.0).await;
        assert_eq!(tags(&modest.until_ready(1).await), "13Z");
    };
    assert_eq!((refused.severity.as_str(), refused.code.as_str()), ("FATAL", "53200"));
    assert!((90..130).contains(&kept), "{kept} statements of 10 kB");
    assert!(greedy.next().await.is_none());
    assert_eq!(modest.value("SELECT 1").await, "1");
    stage.reload(&limited, NONE).await;
}

/// A million Syncs, whose answers nobody reads, cost a bounded amount; then all of them are answered.
pub async fn unread(stage: &Stage) {
    const SYNCS: usize = 1_000_000;
    let mut raw = stage.raw().await;
    let before = resident(stage.proxy.pid());
    let bytes = b"S\0\0\0\x04".repeat(SYNCS);
    let (mut read, mut write) = raw.stream.split();
    let writing = async { tokio::io::AsyncWriteExt::write_all(&mut write, &bytes).await.unwrap() };
    let reading = async {
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
        let grown = resident(stage.proxy.pid()).saturating_sub(before);
        let (mut left, mut buffer) = (SYNCS * 6, BytesMut::with_capacity(1 << 16));
        while left > 0 {
            buffer.clear();
            let read = tokio::time::timeout(PATIENCE, read.read_buf(&mut buffer)).await.expect("stalled").unwrap();
            assert_ne!(read, 0);
            left -= read;
        }
        grown
    };
    let ((), grown) = tokio::join!(writing, reading);
    eprintln!("    a million Syncs grew the proxy by {:.1} MB", grown as f64 / 1048576.0);
    assert!(grown < 32 << 20, "{grown} bytes");
    assert_eq!(raw.value("SELECT 1").await, "1");
}

/// The longest message that PostgreSQL takes passes, and does not stay in the proxy.
pub async fn gigabyte(stage: &Stage) {
    const LONGEST: u32 = 0x3fff_fffe; // PQ_LARGE_MESSAGE_LIMIT
    let mut raw = stage.raw().await;
    let mut witness = stage.raw().await;
    raw.query("CREATE TEMP TABLE long (t text)").await;
    raw.send(&Request::new().query("COPY long FROM STDIN").0).await;
    assert_eq!(raw.receive().await.tag, b'G');
    let before = resident(stage.proxy.pid());
    let mut grown = 0;
    raw.send(&[&b"d"[..], &LONGEST.to_be_bytes()].concat()).await;
    let line = [&vec![b'x'; (1 << 20) - 1][..], b"\n"].concat();
    let mut left = LONGEST as usize - 4;
    while left > 0 {
        let part = left.min(line.len());
        raw.send(&line[..part]).await;
        left -= part;
        grown = grown.max(resident(stage.proxy.pid()).saturating_sub(before));
        if left % (64 << 20) < part {
            assert_eq!(witness.value("SELECT 1").await, "1", "others go on");
        }
    }
    raw.send(&Request::new().copy_fail("enough").0).await;
    assert_eq!(codes(&raw.until_ready(1).await), ["57014"]);
    eprintln!("    a gigabyte in one message grew the proxy by {:.1} MB", grown as f64 / 1048576.0);
    assert!(grown < 32 << 20, "{grown} bytes");
}
