//! A source without logical decoding (`wal_level = replica`): the shadow is copied at one snapshot and fed by mirrored writes, through
//! a running proxy.

#[path = "support/feed_play.rs"]
mod play;
#[path = "support/feed_servers.rs"]
mod servers;

use play::{assert_equal, eventually};
use servers::Server;
use std::{
    net::TcpListener,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

const SCHEMA: &str = "
CREATE TABLE account (id integer PRIMARY KEY, n bigint NOT NULL DEFAULT 0, v text);
CREATE TABLE entry (id bigserial PRIMARY KEY, account integer REFERENCES account, at timestamptz, v text);
CREATE TABLE keyless (a integer, b text);
INSERT INTO account SELECT g, 0, md5(g::text) FROM generate_series(1, 2000) g;
INSERT INTO entry (account, v) SELECT g % 2000 + 1, 'old' FROM generate_series(1, 20000) g;
INSERT INTO keyless SELECT g, 'k' FROM generate_series(1, 100) g;
";

struct Proxy {
    child: Child,
    folder: PathBuf,
    port: u16,
}

impl Proxy {
    fn start(source: &Server, shadow: &Server) -> Self {
        static NUMBER: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("understudy-mirror-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let config = format!(
            "[proxy]\nlisten = \"127.0.0.1:{port}\"\nmetadata = \"sqlite:{}/understudy.db\"\n[[database]]\nname = \"shop\"\n\
             source = \"postgres://postgres@127.0.0.1:{}/shop\"\n[[database.shadow]]\nname = \"copy\"\n\
             url = \"postgres://postgres@127.0.0.1:{}/shop\"\nfeed = \"mirror\"\nsample_reads = 50.0\n",
            folder.display(),
            source.port,
            shadow.port
        );
        std::fs::write(folder.join("proxy.toml"), config).unwrap();
        let child = Self::spawn(&folder);
        Proxy { child, folder, port }
    }

    fn spawn(folder: &std::path::Path) -> Child {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(folder.join("log")).unwrap();
        Command::new(env!("CARGO_BIN_EXE_understudy"))
            .arg("run")
            .arg("--config")
            .arg(folder.join("proxy.toml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap()
    }

    async fn connect(&self, database: &str) -> Client {
        let url = format!("host=127.0.0.1 port={} user=postgres dbname={database}", self.port);
        let deadline = std::time::Instant::now() + play::PATIENCE;
        loop {
            match tokio_postgres::connect(&url, NoTls).await {
                Ok((client, connection)) => {
                    tokio::spawn(connection);
                    return client;
                }
                Err(error) => {
                    let log = std::fs::read_to_string(self.folder.join("log")).unwrap_or_default();
                    assert!(std::time::Instant::now() < deadline, "{error}\n{log}");
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The first row of the console's answer, by column, or its error.
    async fn tell(&self, command: &str) -> Result<Vec<(String, String)>, String> {
        let console = self.connect("understudy").await;
        let messages = console.simple_query(command).await.map_err(|error| match error.as_db_error() {
            Some(db) => db.message().to_owned(),
            None => error.to_string(),
        })?;
        for message in messages {
            if let SimpleQueryMessage::Row(row) = message {
                let columns = row.columns().iter().enumerate();
                return Ok(columns.map(|(at, column)| (column.name().to_owned(), row.get(at).unwrap_or_default().to_owned())).collect());
            }
        }
        Ok(Vec::new())
    }

    async fn feed(&self) -> (String, u64) {
        let row = self.tell("SHOW FEED").await.unwrap();
        let value = |name: &str| row.iter().find(|(column, _)| column == name).map(|(_, value)| value.clone()).unwrap_or_default();
        (value("state"), value("findings").parse().unwrap_or(0))
    }

    async fn mirroring(&self) {
        eventually("mirroring", async || {
            let (state, _) = self.feed().await;
            assert!(!state.starts_with("failed"), "{state}");
            state.starts_with("mirroring")
        })
        .await;
    }

    /// Until nothing waits of what was [`handed_over`].
    async fn settled(&self) {
        eventually("applying what waits", async || self.feed().await.0.contains(" 0 wait")).await;
    }
}

/// A client has its answer a moment before its transaction is handed over; the next answer comes behind that.
async fn handed_over(client: &Client) {
    client.batch_execute("SELECT 1").await.unwrap();
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mirrored_writes_feed_a_shadow() {
    let (old, new) = (Server::start(15, "wal_level = replica"), Server::start(18, "wal_level = replica"));
    let (source, shadow) = (old.create("shop").await, new.create("shop").await);
    source.batch_execute(SCHEMA).await.unwrap();
    let mut proxy = Proxy::start(&old, &new);
    // One session writes all the time, also while the copy is made: each of its transactions is there once.
    let over = Arc::new(AtomicBool::new(false));
    let writing = tokio::spawn({
        let (client, over) = (proxy.connect("shop").await, over.clone());
        async move {
            let mut number = 0_u32;
            while !over.load(Ordering::Relaxed) {
                number += 1;
                let id = (number % 2000 + 1) as i32;
                match number % 5 {
                    0 => {
                        let sql = format!("INSERT INTO entry (account, v) VALUES ({id}, 'rolled back')");
                        client.batch_execute("BEGIN").await.unwrap();
                        client.batch_execute(&sql).await.unwrap();
                        client.batch_execute("ROLLBACK").await.unwrap();
                    }
                    1 => {
                        client.batch_execute("BEGIN").await.unwrap();
                        client.execute("INSERT INTO entry (account, v) VALUES ($1, $2)", &[&id, &"new"]).await.unwrap();
                        client.execute("UPDATE account SET n = n + 1 WHERE id = $1", &[&id]).await.unwrap();
                        client.batch_execute("SAVEPOINT s").await.unwrap();
                        client.batch_execute("INSERT INTO account (id) VALUES (1)").await.unwrap_err();
                        client.batch_execute("ROLLBACK TO s").await.unwrap();
                        client.batch_execute("COMMIT").await.unwrap();
                    }
                    2 => {
                        // Fails, and takes a value of the sequence with it.
                        client.batch_execute("INSERT INTO entry (account, v) VALUES (-1, 'no such account')").await.unwrap_err();
                    }
                    3 => drop(client.query("SELECT v FROM account WHERE id = $1", &[&id]).await.unwrap()),
                    _ => {
                        client.execute("INSERT INTO keyless VALUES ($1, 'n')", &[&id]).await.unwrap();
                        client.execute("DELETE FROM keyless WHERE a = $1", &[&(id - 7)]).await.unwrap();
                    }
                }
            }
            handed_over(&client).await;
            number
        }
    });
    proxy.tell("SHADOW START copy").await.unwrap();
    proxy.mirroring().await;
    let settings = proxy.connect("understudy").await.simple_query("SHOW CONFIG").await.unwrap();
    let shown = settings.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => (row.get(0) == Some("shop.copy.mirror_writes")).then(|| row.get(1).unwrap_or_default().to_owned()),
        _ => None,
    });
    assert_eq!(shown.as_deref(), Some("apply"));
    let more = proxy.connect("shop").await;
    more.batch_execute("ALTER TABLE account ADD COLUMN w integer DEFAULT 7").await.unwrap();
    more.batch_execute("CREATE INDEX CONCURRENTLY account_n ON account (n)").await.unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    // Clients wait for it only so long: on a slow machine it may have to be tried again.
    eventually("comparing under load", async || match proxy.tell("VERIFY copy").await {
        Err(error) => {
            assert!(error.contains("try again"), "under load: {error}");
            false
        }
        Ok(_) => true,
    })
    .await;
    over.store(true, Ordering::Relaxed);
    assert!(writing.await.unwrap() > 100);
    proxy.settled().await;
    let (state, diverged) = proxy.feed().await;
    assert_eq!(diverged, 0, "{state}");
    assert_equal(&source, &shadow, "what one session wrote").await;

    // What is less: values of their own, a COPY, and writes that go around the proxy.
    more.batch_execute("UPDATE entry SET at = clock_timestamp() WHERE id <= 10").await.unwrap();
    let sink = more.copy_in::<_, bytes::Bytes>("COPY keyless FROM STDIN").await.unwrap();
    futures_util::pin_mut!(sink);
    futures_util::SinkExt::send(&mut sink, bytes::Bytes::from_static(b"7\tcopied\n")).await.unwrap();
    sink.finish().await.unwrap();
    handed_over(&more).await;
    source.batch_execute("INSERT INTO account (id) VALUES (100000)").await.unwrap();
    proxy.settled().await;
    let (state, diverged) = proxy.feed().await;
    assert_eq!(diverged, 1, "{state}");
    let found = proxy.tell("VERIFY copy").await.unwrap_err();
    assert!(found.starts_with("12 differences"), "{found}");
    proxy.tell("VERIFY copy REPAIR").await.unwrap_err();
    let left = proxy.tell("VERIFY copy").await.unwrap_err();
    assert!(left.contains("1 differences") && left.contains("public.keyless"), "only the table without a key is left: {left}");
    source.batch_execute("DELETE FROM keyless WHERE b = 'copied'").await.unwrap();
    proxy.tell("VERIFY copy").await.unwrap();

    // It promises less, and says so.
    let refused = proxy.tell("CUTOVER copy").await.unwrap_err();
    assert!(refused.contains("clients' statements, not the source's rows"), "{refused}");
    assert!(proxy.tell("SET copy serve_reads = 5").await.unwrap_err().contains("answers no reads"));

    // The process ends and comes back: it goes on, and says what may be missing.
    proxy.child.kill().unwrap();
    proxy.child.wait().unwrap();
    proxy.child = Proxy::spawn(&proxy.folder);
    proxy.mirroring().await;
    let again = proxy.connect("shop").await;
    again.batch_execute("UPDATE account SET n = -1 WHERE id = 5").await.unwrap();
    handed_over(&again).await;
    proxy.settled().await;
    assert_equal(&source, &shadow, "after a restart").await;

    // A shadow that is away costs clients nothing, and gets what it missed.
    new.kill_only();
    for id in 0..20 {
        again.execute("UPDATE account SET v = 'while away' WHERE id = $1", &[&(10 + id)]).await.unwrap();
    }
    new.boot_again();
    handed_over(&again).await;
    proxy.settled().await;
    let shadow = new.client("shop").await;
    assert_equal(&source, &shadow, "after the shadow came back").await;
    proxy.tell("SHADOW STOP copy").await.unwrap();
    let left: i64 = source
        .query_one("SELECT (SELECT count(*) FROM pg_publication) + (SELECT count(*) FROM pg_namespace WHERE nspname = 'understudy')", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(left, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_runs_twice_nobody_waits_long_and_the_end_loses_nothing() {
    let (old, new) = (Server::start(15, "wal_level = replica"), Server::start(18, "wal_level = replica"));
    let (source, shadow) = (old.create("shop").await, new.create("shop").await);
    source
        .batch_execute(
            "CREATE TABLE counter (id integer PRIMARY KEY, n bigint NOT NULL); INSERT INTO counter VALUES (1, 0);
             CREATE TABLE entry (id bigserial PRIMARY KEY);
             CREATE FUNCTION fits(integer) RETURNS boolean IMMUTABLE LANGUAGE sql AS
                 $$ SELECT current_setting('server_version_num')::integer < 160000 $$;
             CREATE TABLE picky (id integer PRIMARY KEY, CONSTRAINT fits CHECK (public.fits(id))); INSERT INTO picky VALUES (1)",
        )
        .await
        .unwrap();
    let mut proxy = Proxy::start(&old, &new);
    let client = proxy.connect("shop").await;
    let add = async || {
        let update = client.batch_execute("UPDATE counter SET n = n + 1 WHERE id = 1");
        tokio::time::timeout(play::PATIENCE, update).await.expect("a client waits without limit").unwrap();
        handed_over(&client).await;
    };
    let failed = async |why: &str| {
        eventually(why, async || {
            let (state, _) = proxy.feed().await;
            assert!(!state.starts_with("mirroring"), "{why}");
            state.starts_with("failed")
        })
        .await;
    };

    // While clients are at rest, something on the source is locked for good.
    let locker = old.client("shop").await;
    locker.batch_execute("BEGIN; ALTER SEQUENCE entry_id_seq RENAME TO elsewhere").await.unwrap();
    proxy.tell("SHADOW START copy").await.unwrap();
    eventually("waiting for the lock", async || {
        source.query_one("SELECT count(*) FROM pg_locks WHERE NOT granted", &[]).await.unwrap().get::<_, i64>(0) > 0
    })
    .await;
    add().await;
    failed("clients go on, and the copy does not begin").await;
    locker.batch_execute("ROLLBACK").await.unwrap();

    // A copy fails behind its snapshot; what was written since is in the next one's.
    proxy.tell("SHADOW START copy").await.unwrap();
    failed("the shadow refuses a table").await;
    for _ in 0..5 {
        add().await;
    }
    source.batch_execute("ALTER TABLE picky DROP CONSTRAINT fits").await.unwrap();
    proxy.tell("SHADOW START copy").await.unwrap();
    proxy.mirroring().await;
    add().await;
    proxy.settled().await;
    assert_equal(&source, &shadow, "after a copy that had failed").await;

    // Each of the two has committed one row and rolled one back; what is not carried is counted.
    for sql in ["BEGIN", "INSERT INTO counter VALUES (101, 0)", "COMMIT AND CHAIN", "INSERT INTO counter VALUES (102, 0)", "ROLLBACK"] {
        client.batch_execute(sql).await.unwrap();
    }
    for sql in ["BEGIN", "INSERT INTO counter VALUES (103, 0)", "ROLLBACK AND CHAIN", "INSERT INTO counter VALUES (104, 0)", "COMMIT"] {
        client.batch_execute(sql).await.unwrap();
    }
    add().await;
    proxy.settled().await;
    let (state, diverged) = proxy.feed().await;
    assert_eq!(diverged, 2, "{state}");
    source.batch_execute("DELETE FROM counter WHERE id IN (101, 104)").await.unwrap();
    assert_equal(&source, &shadow, "what chains wrote is on the shadow in no case").await;

    // What waits when an operator ends the process is run before it ends.
    shadow.batch_execute("BEGIN; LOCK TABLE counter IN ACCESS EXCLUSIVE MODE").await.unwrap();
    for _ in 0..3 {
        add().await;
    }
    proxy.tell("SHUTDOWN").await.ok();
    eventually("shutting down", async || std::fs::read_to_string(proxy.folder.join("log")).unwrap_or_default().contains("shutting down"))
        .await;
    shadow.batch_execute("COMMIT").await.unwrap();
    let deadline = std::time::Instant::now() + play::PATIENCE;
    while proxy.child.try_wait().unwrap().is_none() {
        assert!(std::time::Instant::now() < deadline, "the process does not end");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_equal(&source, &shadow, "after an orderly end").await;
}
