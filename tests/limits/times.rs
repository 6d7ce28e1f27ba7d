//! Limits of time. The limits are short and waits are long: a slow machine makes this slower, not wrong.

use crate::{
    Stage,
    harness::{ask, wait_until},
    last_words,
    raw::{PATIENCE, Request, codes, tags},
};
use std::time::{Duration, Instant};

const NONE: &str = "max_clients = 50";

/// With this limit for the sessions that are there already; it is taken away again.
async fn with(stage: &Stage, limit: &str, work: impl Future<Output = ()>) {
    let text = format!("{NONE}\n{limit}");
    stage.reload(NONE, &text).await;
    work.await;
    stage.reload(&text, NONE).await;
}

/// What the server itself says when its own limit ends a session.
async fn of_the_server(stage: &Stage, setting: &str, begin: &str) -> (String, String, String) {
    let mut direct = crate::Raw::open(stage.source.server.port(), "shop").await;
    direct.query(&format!("SET {setting} = '20ms'")).await;
    if !begin.is_empty() {
        direct.query(begin).await;
    }
    last_words(&mut direct).await
}

pub async fn idle_in_transaction(stage: &Stage) {
    let words = of_the_server(stage, "idle_in_transaction_session_timeout", "BEGIN").await;
    let [mut lazy, mut half, mut failed, mut copying, mut outside, mut busy, mut diligent] = [
        stage.raw().await,
        stage.raw().await,
        stage.raw().await,
        stage.raw().await,
        stage.raw().await,
        stage.raw().await,
        stage.raw().await,
    ];
    for raw in [&mut lazy, &mut busy, &mut diligent] {
        raw.query("BEGIN").await;
    }
    lazy.query("INSERT INTO item VALUES (1, 1, 'never')").await;
    half.send(&Request::new().parse("", "SELECT 1", &[]).bind("", "", &[], &[], &[]).flush().0).await;
    assert_eq!([half.receive().await.tag, half.receive().await.tag], *b"12");
    failed.send(&Request::new().parse("", "SELEC 1", &[]).bind("", "", &[], &[], &[]).execute("", 0).flush().0).await;
    assert_eq!(failed.receive().await.tag, b'E');
    copying.send(&Request::new().query("COPY item FROM STDIN").copy_data(b"2\t2\t").0).await;
    assert_eq!(copying.receive().await.tag, b'G');
    with(stage, "idle_in_transaction_timeout = \"1500ms\"", async {
        // what the server takes long for is not the client's idleness
        busy.send(&Request::new().query("SELECT pg_sleep(4)").0).await;
        let (began, mut longest, mut last) = (Instant::now(), Duration::ZERO, Instant::now());
        while began.elapsed() < Duration::from_secs(4) {
            if tags(&diligent.query("SELECT 1").await) != "TDCZ" {
                break;
            }
            (longest, last) = (longest.max(last.elapsed()), Instant::now());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(longest > Duration::from_secs(1) || tags(&diligent.query("COMMIT").await) == "CZ", "it was never idle for long");
        for raw in [&mut lazy, &mut half, &mut failed, &mut copying] {
            assert_eq!(last_words(raw).await, words);
        }
        assert_eq!(tags(&busy.until_ready(1).await), "TDCZ");
        assert_eq!(outside.value("SELECT count(*) FROM item").await, "0", "rolled back, and an idle client goes on");
    })
    .await;
}

pub async fn idle(stage: &Stage) {
    let words = of_the_server(stage, "idle_session_timeout", "").await;
    let [mut idle, mut slow, mut inside] = [stage.raw().await, stage.raw().await, stage.raw().await];
    inside.query("BEGIN").await;
    with(stage, "client_idle_timeout = \"1s\"", async {
        slow.send(b"Q\0\0\0").await; // begins, and does not go on
        for raw in [&mut idle, &mut slow] {
            assert_eq!(last_words(raw).await, words);
        }
        let mut late = stage.raw().await;
        assert_eq!(last_words(&mut late).await, words, "who comes later, too");
    })
    .await;
    assert_eq!(tags(&inside.query("COMMIT").await), "CZ", "a transaction is not this limit's business");
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(inside.value("SELECT 1").await, "1", "off again");
}

pub async fn queries(stage: &Stage) {
    let operator = stage.source.server.connect("shop").await.unwrap();
    let [mut long, mut idle] = [stage.raw().await, stage.raw().await];
    idle.query("BEGIN").await;
    with(stage, "query_timeout = \"1s\"", async {
        long.send(&Request::new().query("SELECT 'a'").query("SELECT pg_sleep(300)").0).await;
        let seen = long.until_closed().await;
        assert_eq!((tags(&seen).as_str(), codes(&seen)), ("TDCZE", vec!["57014".to_owned()]));
        let running = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(300)%' AND pid <> pg_backend_pid()";
        wait_until("the server has stopped it, too", PATIENCE, || async { ask(&operator, running).await == "0" }).await;
    })
    .await;
    assert_eq!(tags(&idle.query("COMMIT").await), "CZ", "idleness is not this limit's business");
}
