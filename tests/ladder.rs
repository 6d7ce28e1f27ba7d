//! Faults of a real shadow while the ladder serves from it: each takes the reads back, with its own reason, and no client sees an error.

#[path = "proxy/harness.rs"]
mod harness;
mod support;

use harness::{Proxy, connect, database_text, section, url_text, wait_until};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};
use support::{Options, Server};

/// For a condition on a slow, loaded machine.
const PATIENCE: Duration = Duration::from_secs(100);
const SCHEMA: &str = "
    CREATE TABLE item (id int PRIMARY KEY, v int NOT NULL);
    INSERT INTO item SELECT k, k * 10 FROM generate_series(1, 1000) k;
    CREATE TABLE beat (id int PRIMARY KEY, v int NOT NULL);
    INSERT INTO beat VALUES (1, 0);
    CREATE FUNCTION weighed(int) RETURNS int LANGUAGE sql STABLE AS 'SELECT $1';
";
const READ: &str = "SELECT weighed(v) FROM item WHERE id = $1";

struct Stage {
    proxy: Proxy,
    source: Server,
    shadow: Server,
}

impl Stage {
    async fn start() -> Stage {
        let source = Server::start(15, Options::default()).await.unwrap();
        let shadow = Server::start_like(&source, 18, Options::default()).await.unwrap();
        source.create_database("shop").await.unwrap();
        shadow.create_database("shop").await.unwrap();
        connect(&source.app_url("shop")).await.batch_execute(SCHEMA).await.unwrap();
        // The floor keeps a loaded machine's noise out; each fault is far beyond it.
        let text = format!(
            "{}\n[[database.shadow]]\nname = \"pg18\"\nurl = \"{}\"\nsample_reads = 50.0\nhedge_after = \"3s\"\n[database.shadow.revert]\n\
             window = \"4s\"\nmin_requests = 10\nerror_rate = 20.0\nmismatch_rate = 20.0\nlatency_ratio = 4.0\nlatency_floor = \"600ms\"\n\
             max_lag = \"15s\"\n[database.shadow.shift]\nsteps = [30, 60]\nhold = \"1h\"\n",
            database_text(&source),
            url_text(&shadow.superuser_url("shop"))
        );
        let proxy = Proxy::start("ladder", "", &text);
        proxy.rows("SHADOW START pg18").await;
        let stage = Stage { proxy, source, shadow };
        stage.in_step().await;
        stage
    }

    async fn in_step(&self) {
        wait_until("the shadow is in step", PATIENCE, || async {
            let shadow = self.proxy.shadow().await;
            shadow.health == "healthy" && shadow.feed.state == "streaming"
        })
        .await;
    }

    async fn served(&self) -> u64 {
        self.proxy.shadow().await.served.reads
    }

    /// Climbs to a step (from 1), lets reads be served there, breaks the shadow, and waits for the way back.
    async fn falls(&self, step: usize, word: &str, fault: impl AsyncFnOnce()) {
        self.in_step().await;
        let reverts = self.proxy.shadow().await.revert.map_or(0, |revert| revert.count);
        self.proxy.rows("SHIFT START pg18").await;
        if step == 2 {
            self.proxy.rows("SET pg18 shift.hold = '100ms'").await;
            wait_until("the second step", PATIENCE, || async { self.proxy.shadow().await.serve_reads == 60.0 }).await;
            self.proxy.rows("SET pg18 shift.hold = '1h'").await;
        }
        let before = self.served().await;
        wait_until("reads are served", PATIENCE, || async { self.served().await > before + 20 }).await;
        fault().await;
        wait_until("reads went back", PATIENCE, || async { self.proxy.shadow().await.revert.is_some_and(|revert| revert.count > reverts) })
            .await;
        let shadow = self.proxy.shadow().await;
        let reason = shadow.revert.unwrap().reason;
        assert!(reason.starts_with(word), "step {step}: {reason}");
        assert_eq!((shadow.serve_reads, shadow.shift.as_str()), (0.0, "reverted"), "step {step}");
        let alerts = self.proxy.rows("SHOW ALERTS").await;
        assert!(
            alerts.iter().any(|alert| alert["message"].as_str().is_some_and(|text| text.contains(&reason)) && !alert["data"].is_null()),
            "step {step}: an alert with the figures: {alerts:#?}"
        );
    }

    async fn on_shadow(&self, text: &str) {
        self.shadow.connect("shop").await.unwrap().batch_execute(text).await.unwrap();
    }

    async fn both_steps(&self, word: &str, break_it: &str, mend_it: &str) {
        for step in [1, 2] {
            self.falls(step, word, async || self.on_shadow(break_it).await).await;
            self.on_shadow(mend_it).await;
        }
    }
}

struct Load {
    stop: Arc<AtomicBool>,
    errors: Arc<AtomicU64>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    async fn start(stage: &Stage) -> Load {
        let (stop, errors) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut tasks = Vec::new();
        for number in 0..6 {
            let client = connect(&stage.proxy.through(&stage.source.app_url("shop"))).await;
            let (stop, errors) = (stop.clone(), errors.clone());
            tasks.push(tokio::spawn(async move {
                let read = client.prepare(READ).await.unwrap();
                for round in number.. {
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                    let wrote = number == 0 && round % 20 == 0;
                    let outcome = match wrote {
                        true => client.execute("UPDATE beat SET v = v + 1", &[]).await.map(|_| ()),
                        false => client.query_one(&read, &[&(1 + round % 1000)]).await.map(|row| {
                            let v: i32 = row.get(0);
                            assert!(v == (1 + round % 1000) * 10 || v == -1);
                        }),
                    };
                    errors.fetch_add(u64::from(outcome.is_err()), Ordering::SeqCst);
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }));
        }
        Load { stop, errors, tasks }
    }

    async fn end(self) {
        self.stop.store(true, Ordering::SeqCst);
        for task in self.tasks {
            task.await.unwrap();
        }
        assert_eq!(self.errors.load(Ordering::SeqCst), 0, "no client saw an error");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_fault_of_a_shadow_takes_the_reads_back() {
    let stage = Stage::start().await;
    let load = Load::start(&stage).await;
    let slow =
        "CREATE OR REPLACE FUNCTION weighed(int) RETURNS int LANGUAGE plpgsql STABLE AS 'BEGIN PERFORM pg_sleep(1.2); RETURN $1; END'";
    let quick = "CREATE OR REPLACE FUNCTION weighed(int) RETURNS int LANGUAGE sql STABLE AS 'SELECT $1'";
    section("slow", stage.both_steps("latency", slow, quick)).await;
    let failing = "CREATE OR REPLACE FUNCTION weighed(int) RETURNS int LANGUAGE plpgsql STABLE AS 'BEGIN RAISE EXCEPTION USING ERRCODE = ''57000''; END'";
    section("errors", stage.both_steps("error", failing, quick)).await;
    let wrong = "BEGIN; SET LOCAL session_replication_role = replica; UPDATE item SET v = -1; COMMIT";
    let right = "BEGIN; SET LOCAL session_replication_role = replica; UPDATE item SET v = id * 10; COMMIT";
    section("wrong answers", stage.both_steps("mismatch", wrong, right)).await;
    section("lag", async {
        let lock = stage.shadow.connect("shop").await.unwrap();
        stage
            .falls(1, "lag", async || {
                stage.proxy.rows("SET pg18 revert.max_lag = '2s'").await;
                lock.batch_execute("BEGIN; LOCK TABLE beat IN EXCLUSIVE MODE").await.unwrap();
            })
            .await;
        lock.batch_execute("ROLLBACK").await.unwrap();
        stage.proxy.rows("SET pg18 revert.max_lag = '15s'").await;
    })
    .await;
    section("half-open", async {
        stage.falls(1, "", async || stage.shadow.pause().unwrap()).await;
        stage.shadow.resume().unwrap();
    })
    .await;
    section("dead", stage.falls(1, "", async || stage.shadow.kill9().unwrap())).await;
    load.end().await;
}
