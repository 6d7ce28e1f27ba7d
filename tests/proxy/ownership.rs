//! Sessions of every kind through a cutover and back.

use crate::{
    harness::{ask, connect, sqlstate},
    shadow::Pair,
};
use std::time::Duration;
use tokio_postgres::{AsyncMessage, Client, NoTls};

async fn catalog(pair: &Pair) -> Vec<String> {
    let mut seen = Vec::new();
    for server in [&pair.source, &pair.shadow] {
        let client = server.connect("shop").await.unwrap();
        for text in [
            "SELECT count(*) FROM pg_replication_slots",
            "SELECT coalesce(string_agg(pubname, ',' ORDER BY pubname), '') FROM pg_publication",
            "SELECT coalesce(string_agg(evtname, ',' ORDER BY evtname), '') FROM pg_event_trigger",
            "SELECT coalesce(string_agg(setconfig::text, ','), '') FROM pg_db_role_setting",
        ] {
            seen.push(ask(&client, text).await);
        }
    }
    seen
}

pub async fn named_obstacle(pair: &Pair) {
    let client = pair.client().await;
    client.batch_execute("CREATE TEMP TABLE scratch (id int)").await.unwrap();
    for words in ["CUTOVER pg18 DRY RUN", "CUTOVER pg18"] {
        let refused = pair.proxy.tell(words).await;
        assert_eq!(refused.code, 1, "{words}: {}", refused.stderr);
        assert!(refused.stderr.contains("temporary table") && refused.stderr.contains("session "), "{words}: {}", refused.stderr);
    }
    assert_eq!(pair.proxy.state().await.databases[0].owner, "source");
    assert_eq!(ask(&client, "SELECT count(*) FROM scratch").await, "0", "the session goes on");
    drop(client);
    crate::harness::wait_until("the session has ended", Duration::from_secs(5), || async {
        pair.proxy.state().await.databases[0].clients == 0
    })
    .await;
}

pub async fn dry_run(pair: &Pair) {
    let client = pair.client().await;
    let (before, state) = (catalog(pair).await, pair.proxy.state().await);
    let rows = pair.proxy.rows("CUTOVER pg18 DRY RUN").await;
    assert!(rows.len() > 5, "the steps are listed: {rows:?}");
    let after = pair.proxy.state().await;
    assert_eq!(catalog(pair).await, before);
    assert_eq!((&after.databases[0].owner, after.databases[0].epoch), (&state.databases[0].owner, state.databases[0].epoch));
    assert_eq!(ask(&client, "SELECT current_setting('server_version_num')::int / 10000").await, "15");
}

/// A session with everything that can be moved, and what it hears.
struct Rich {
    client: Client,
    statement: tokio_postgres::Statement,
    heard: tokio::sync::mpsc::UnboundedReceiver<String>,
}

impl Rich {
    async fn open(pair: &Pair) -> Rich {
        let url = pair.proxy.through(&pair.source.app_url("shop"));
        let mut config = tokio_postgres::Config::new();
        config.host("127.0.0.1").port(url.port).user(&url.user).dbname("shop").password(url.password.as_ref().unwrap().expose());
        let (client, mut connection) = config.application_name("rich").connect(NoTls).await.unwrap();
        let (sender, heard) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Some(Ok(message)) = std::future::poll_fn(|context| connection.poll_message(context)).await {
                if let AsyncMessage::Notification(notification) = message {
                    let _ = sender.send(notification.payload().to_owned());
                }
            }
        });
        let statement = client.prepare("SELECT v FROM item WHERE id = $1").await.unwrap();
        client.batch_execute("SET TimeZone = 'Asia/Tokyo'; SET work_mem = '5MB'; SET \"my.own\" = 'it''s \\ ä'").await.unwrap();
        client.batch_execute("LISTEN \"Wide News\"").await.unwrap();
        client.batch_execute("PREPARE plan (int) AS SELECT note FROM item WHERE id = $1").await.unwrap();
        Rich { client, statement, heard }
    }

    async fn check(&mut self, pair: &Pair, major: u32) {
        let client = &self.client;
        assert_eq!(ask(client, "SELECT current_setting('server_version_num')::int / 10000").await, major.to_string());
        assert_eq!(client.query_one(&self.statement, &[&7]).await.unwrap().get::<_, i32>(0), 70, "protocol-level statement");
        assert_eq!(ask(client, "EXECUTE plan (7)").await, "note 7", "SQL PREPARE");
        assert_eq!(ask(client, "SHOW TimeZone").await, "Asia/Tokyo");
        assert_eq!(ask(client, "SHOW work_mem").await, "5MB");
        assert_eq!(ask(client, "SHOW \"my.own\"").await, "it's \\ ä");
        let server = if major == 15 { &pair.source } else { &pair.shadow };
        let other = connect(&server.superuser_url("shop")).await;
        other.batch_execute(&format!("SET default_transaction_read_only = off; NOTIFY \"Wide News\", 'from {major}'")).await.unwrap();
        let heard = tokio::time::timeout(Duration::from_secs(5), self.heard.recv()).await.expect("LISTEN has moved").unwrap();
        assert_eq!(heard, format!("from {major}"));
        let token = client.cancel_token();
        let (cancelled, ()) = tokio::join!(client.simple_query("SELECT pg_sleep(20)"), async {
            tokio::time::sleep(Duration::from_millis(200)).await;
            token.cancel_query(NoTls).await.unwrap();
        });
        assert_eq!(sqlstate(cancelled), "57014", "cancel follows the session");
        let later = client.prepare("SELECT count(*) FROM item WHERE v > $1").await.unwrap();
        assert_eq!(client.query_one(&later, &[&0]).await.unwrap().get::<_, i64>(0), 100);
    }
}

pub async fn live_sessions(pair: &Pair) {
    let mut rich = Rich::open(pair).await;
    rich.check(pair, 15).await;
    let writer = pair.client().await;
    let writing = |client: Client| {
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let done = stop.clone();
        let task = tokio::spawn(async move {
            let mut rounds = 0i64;
            while !done.load(std::sync::atomic::Ordering::SeqCst) {
                client.execute("UPDATE counter SET v = v + 1 WHERE id = 8", &[]).await.unwrap();
                rounds += 1;
            }
            rounds
        });
        (stop, task)
    };
    let (stop, task) = writing(writer);
    let moved = pair.proxy.tell("CUTOVER pg18").await;
    assert_eq!(moved.code, 0, "{}\n{}", moved.stderr, pair.proxy.log_text());
    assert_eq!(pair.proxy.state().await.databases[0].owner, "pg18");
    rich.check(pair, 18).await;
    let mut on_shadow = Rich::open(pair).await;
    on_shadow.check(pair, 18).await;
    assert_eq!(rich.heard.recv().await.unwrap(), "from 18", "told of the other session's notification, too");
    assert_eq!(pair.proxy.tell("CUTOVER pg18").await.code, 1, "it owns the writes already");

    let back = pair.proxy.tell("ROLLBACK shop").await;
    assert_eq!(back.code, 0, "{}\n{}", back.stderr, pair.proxy.log_text());
    assert_eq!(pair.proxy.state().await.databases[0].owner, "source");
    rich.check(pair, 15).await;
    on_shadow.heard.recv().await.unwrap();
    on_shadow.check(pair, 15).await;
    stop.store(true, std::sync::atomic::Ordering::SeqCst);
    let rounds = task.await.expect("the writer saw no error");
    assert_eq!(ask(&rich.client, "SELECT v FROM counter WHERE id = 8").await, rounds.to_string(), "nothing lost, nothing twice");
    assert_eq!(pair.proxy.tell("ROLLBACK shop").await.code, 1, "there is nothing to go back from");
}
