//! Ends of clients, of connections, of servers; and what operators do.

use crate::{
    harness::{ask, wait_until},
    raw::{PATIENCE, Request, codes, tags},
    stage::{Stage, pid},
    support::Shutdown,
};
use understudy::wire::backend::ErrorFields;

pub async fn leaves(stage: &Stage) {
    let admin = stage.direct().await;
    let active = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app' AND state <> 'idle'";
    for how in [
        "closes",
        "says goodbye",
        "inside a failed one",
        "in the middle of a message",
        "in the middle of a batch",
        "in a copy",
        "in a statement",
    ] {
        let mut raw = stage.raw().await;
        let begin = if how == "inside a failed one" { "BEGIN; UPDATE item SET v = 0; SELECT 1/0" } else { "BEGIN; UPDATE item SET v = 0" };
        raw.query(begin).await;
        match how {
            "says goodbye" => raw.send(&Request::new().raw(b'X', b"").0).await,
            "in the middle of a message" => raw.send(&Request::new().query("COMMIT").0[..8]).await,
            "in the middle of a batch" => raw.send(&Request::new().parse("", "COMMIT", &[]).bind("", "", &[], &[], &[]).0).await,
            "in a copy" => {
                raw.send(&Request::new().query("COPY item FROM STDIN").0).await;
                assert_eq!(raw.receive().await.tag, b'G');
            }
            "in a statement" => {
                raw.send(&Request::new().query("SELECT pg_sleep(1000)").0).await;
                let runs = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app' AND state = 'active' AND wait_event = 'PgSleep'";
                wait_until("it runs", PATIENCE, || async { ask(&admin, runs).await != "0" }).await;
                // gone for good: the answer could not be delivered
                socket2::SockRef::from(&raw.stream).set_linger(Some(std::time::Duration::ZERO)).unwrap();
            }
            _ => {}
        }
        drop(raw);
        let mut next = stage.raw().await;
        assert_eq!(next.value("SELECT min(v) > 0 FROM item").await, "t", "{how}");
        let seen = next.query("SELECT now() = statement_timestamp()").await;
        assert_eq!(seen.last().unwrap().body, b"I"[..], "{how}");
        wait_until(how, PATIENCE, || async { ask(&admin, active).await == "0" }).await;
    }
    // settings and locks of a session that has ended are nobody's
    let mut raw = stage.raw().await;
    raw.query("SET work_mem = '9MB'; SELECT pg_advisory_lock(5); CREATE TEMP TABLE left_over (id int)").await;
    drop(raw);
    let mut next = stage.raw().await;
    assert_eq!(next.value("SHOW work_mem").await, "4MB");
    assert_eq!(next.value("SELECT to_regclass('left_over') IS NULL").await, "t");
    assert_eq!(ask(&admin, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'").await, "0");
    // who leaves after its last request gets it done
    let mut raw = stage.raw().await;
    raw.send(&Request::new().query("UPDATE item SET v = 77 WHERE id = 7").raw(b'X', b"").0).await;
    raw.until_closed().await;
    assert_eq!(next.value("SELECT v FROM item WHERE id = 7").await, "77");
}

/// What a listener that has gone was still to hear is nobody's.
pub async fn notifications(stage: &Stage) {
    let admin = stage.direct().await;
    let mut listener = stage.raw().await;
    listener.query("LISTEN news").await;
    listener.query("BEGIN").await; // until its end the server keeps what it hears
    admin.batch_execute("NOTIFY news, 'late'").await.unwrap();
    drop(listener);
    let mut next = stage.raw().await;
    assert_eq!(tags(&next.query("SET statement_timeout = 0").await), "CZ"); // understudy asks something behind it
    assert_eq!(tags(&next.query("SELECT 1").await), "TDCZ");
}

/// A message that is none: the answer is its sender's, and nobody else hears of it.
pub async fn unknown_messages(stage: &Stage) {
    for (tag, batch, number) in [(b'z', false, "122"), (b'p', false, "112"), (b'z', true, "122")] {
        let mut raw = stage.raw().await;
        raw.query("SELECT 1").await;
        let request = if batch { Request::new().run("SELECT 2") } else { Request::new() };
        raw.send(&request.raw(tag, b"what").0).await;
        let seen = raw.until_closed().await;
        let last = ErrorFields::parse(&seen.last().unwrap().body);
        let message = format!("invalid frontend message type {number}");
        assert_eq!((last.severity.as_str(), last.code.as_str(), last.message), ("FATAL", "08P01", message));
        let mut next = stage.raw().await;
        assert_eq!(tags(&next.query("SELECT 3").await), "TDCZ");
    }
    // also of one that waits for a connection meanwhile
    let (mut holder, mut raw, mut waits) = (stage.raw().await, stage.raw().await, stage.raw().await);
    holder.query("BEGIN").await;
    raw.send(&Request::new().raw(b'z', b"what").0).await;
    waits.send(&Request::new().query("SELECT 4").0).await;
    assert_eq!(codes(&raw.until_closed().await), ["08P01"]);
    holder.query("COMMIT").await;
    assert_eq!(tags(&waits.until_ready(1).await), "TDCZ");
}

pub async fn terminated(stage: &Stage) {
    let admin = stage.direct().await;
    let client = stage.client().await;
    for _ in 0..3 {
        let own = pid(&client).await;
        ask(&admin, &format!("SELECT pg_terminate_backend({own})")).await;
        wait_until("it is gone", PATIENCE, || async {
            ask(&admin, &format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {own}")).await == "0"
        })
        .await;
        assert_ne!(pid(&client).await, own, "the client has seen nothing of it");
    }
    // inside a transaction it is the client's to know, and its session ends, as without a pool
    let mut raw = stage.raw().await;
    raw.query("BEGIN").await;
    let own = raw.value("SELECT pg_backend_pid()").await;
    ask(&admin, &format!("SELECT pg_terminate_backend({own})")).await;
    assert_eq!(codes(&raw.until_closed().await), ["57P01"]);
    pid(&client).await;
}

pub async fn operators(stage: &Stage) {
    let client = stage.client().await;
    let mut holder = stage.raw().await;
    holder.query("BEGIN").await;
    let pause = async { stage.proxy.rows("PAUSE shop").await };
    let ending = async {
        wait_until("it is held", PATIENCE, || async { stage.pool("held").await == true }).await;
        holder.query("COMMIT").await;
    };
    futures_util::join!(pause, ending);
    let mut waiting = stage.raw().await;
    waiting.send(&Request::new().query("SELECT 'after'").0).await;
    assert_eq!((stage.pool("in_transaction").await, stage.pool("sv_active").await), (0.into(), 0.into()));
    stage.proxy.rows("RESUME shop").await;
    assert_eq!(tags(&waiting.until_ready(1).await), "TDCZ");
    // RECONNECT: a new connection for the next transaction; a pinned session moves with what it has
    let mut pinned = stage.raw_with(&[(b"application_name", b"moving")]).await;
    pinned.query("LISTEN news; SET work_mem = '7MB'").await;
    pinned.query("PREPARE mine AS SELECT 'mine'").await;
    let own = pinned.value("SELECT pg_backend_pid()").await;
    stage.proxy.rows("RECONNECT shop").await;
    wait_until("it has moved", PATIENCE, || async {
        ask(&stage.direct().await, &format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {own}")).await == "0"
    })
    .await;
    assert_eq!(pinned.value("SHOW work_mem").await, "7MB");
    assert_eq!(pinned.value("EXECUTE mine").await, "mine");
    stage.direct().await.batch_execute("NOTIFY news, 'heard'").await.unwrap();
    assert_eq!(pinned.receive().await.tag, b'A');
    pinned.query("UNLISTEN *; DEALLOCATE ALL").await;
    stage.until_shown("moving", "state", "idle").await;
    let own = pid(&client).await;
    stage.proxy.rows("RECONNECT shop").await;
    assert_ne!(pid(&client).await, own);
    // sizes change at once, both ways
    stage.proxy.edit("size = 1\n", "size = 3\n");
    stage.proxy.rows("RELOAD").await;
    let mut three = vec![stage.raw().await, stage.raw().await, stage.raw().await];
    for raw in &mut three {
        raw.query("BEGIN").await;
    }
    assert_eq!(stage.pool("sv_active").await, 3);
    stage.proxy.edit("size = 3\n", "size = 1\n");
    stage.proxy.rows("RELOAD").await;
    for raw in &mut three {
        raw.query("COMMIT").await;
    }
    stage.until("sv_idle", 1).await;
    stage.until("sv_active", 0).await;
}

pub async fn ages(stage: &Stage) {
    let client = stage.client().await;
    let own = pid(&client).await;
    stage.proxy.edit("server_idle_timeout = \"1h\"", "server_idle_timeout = \"10ms\"");
    stage.proxy.rows("RELOAD").await;
    stage.until("sv_idle", 0).await;
    assert_ne!(pid(&client).await, own);
    stage.proxy.edit("server_idle_timeout = \"10ms\"", "server_idle_timeout = \"1h\"\nserver_lifetime = \"10ms\"");
    stage.proxy.rows("RELOAD").await;
    let own = pid(&client).await;
    wait_until("another", PATIENCE, || async { pid(&client).await != own }).await;
    stage.proxy.edit("server_lifetime = \"10ms\"", "min_size = 1");
    stage.proxy.rows("RELOAD").await;
    stage.until("sv_idle", 1).await; // though nobody asks for one
}

pub async fn away(stage: &Stage) {
    let client = stage.client().await;
    pid(&client).await;
    stage.server.stop(Shutdown::Fast).unwrap();
    let waiting = tokio::spawn(async move { (ask(&client, "SELECT 'back'").await, client) });
    stage.until("cl_waiting", 1).await;
    wait_until("why is said", PATIENCE, || async {
        stage.pool("error").await.as_str().is_some_and(|error| error.contains("cannot reach"))
    })
    .await;
    stage.server.restart().unwrap();
    let (answer, client) = tokio::time::timeout(PATIENCE, waiting).await.unwrap().unwrap();
    assert_eq!(answer, "back");
    pid(&client).await;
}
