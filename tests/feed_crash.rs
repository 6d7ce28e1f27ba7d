//! SIGKILL at random moments: of the feed (its tasks vanish between two polls), of the owner, of the follower; during copy, catch-up, live
//! flow and schema changes. After each round every row of both sides is compared.
//!
//! `UNDERSTUDY_SEED=…` plays a run again (what dies when; the machine's own timing is its own), `UNDERSTUDY_ROUNDS=300` makes it long.

#[path = "support/feed_play.rs"]
mod play;
#[path = "support/feed_servers.rs"]
mod servers;

use fastrand::Rng;
use play::{assert_equal, catch_up, spec, start};
use servers::Server;
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::sync::RwLock;
use understudy::{
    cdc::{self, Feed, Start},
    metadata::{ProposalState, Repository},
};

const SCHEMA: &str = "
CREATE TYPE mood AS ENUM ('sad', 'happy');
CREATE TABLE keyed (id integer PRIMARY KEY, n bigint NOT NULL DEFAULT 0, v text, m mood);
CREATE TABLE keyless (a integer, b text);
CREATE TABLE parted (id integer, at integer, v text, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (0) TO (500); CREATE TABLE parted_2 PARTITION OF parted FOR VALUES FROM (500) TO (1000);
CREATE TABLE wide (id integer PRIMARY KEY, small integer, big text);
CREATE TABLE parent (id integer PRIMARY KEY); CREATE TABLE child (id integer PRIMARY KEY, parent integer NOT NULL REFERENCES parent);
CREATE TABLE counters (id integer PRIMARY KEY, n bigint NOT NULL);
INSERT INTO keyed SELECT g, 0, md5(g::text), 'sad' FROM generate_series(1, 3000) g;
INSERT INTO keyless SELECT g, md5(g::text) FROM generate_series(1, 300) g;
INSERT INTO parted SELECT g, g % 1000, md5(g::text) FROM generate_series(1, 3000) g;
INSERT INTO wide SELECT g, g, (SELECT string_agg(md5(g::text || i), '') FROM generate_series(1, 100) i) FROM generate_series(1, 300) g;
INSERT INTO parent SELECT generate_series(1, 100); INSERT INTO child SELECT g, g % 100 + 1 FROM generate_series(1, 500) g;
INSERT INTO counters SELECT g, 0 FROM generate_series(1, 10) g;
";

/// One transaction of an application.
fn transaction(rng: &mut Rng, next: &AtomicU32) -> String {
    let mut sql = "BEGIN;".to_owned();
    for _ in 0..rng.u32(1..5) {
        let (id, fresh) = (rng.u32(1..3000), next.fetch_add(1, Ordering::Relaxed));
        let statement = match rng.u32(0..14) {
            0 => format!("UPDATE keyed SET n = n + 1, v = v || 'x' WHERE id = {id}"),
            1 => format!("INSERT INTO keyed (id, v, m) VALUES ({fresh}, 'new', 'happy')"),
            2 => format!("DELETE FROM keyed WHERE id = {id}"),
            3 => format!("UPDATE keyed SET id = {fresh} WHERE id = {id}"),
            4 => format!("INSERT INTO keyless VALUES ({}, 'k'), ({0}, 'k')", id % 50),
            5 => "UPDATE keyless SET b = b || '.' WHERE ctid = (SELECT ctid FROM keyless ORDER BY random() LIMIT 1)".into(),
            6 => "DELETE FROM keyless WHERE ctid = (SELECT ctid FROM keyless ORDER BY random() LIMIT 1)".into(),
            7 => format!("UPDATE parted SET at = {} WHERE id = {id}", rng.u32(0..1000)),
            8 => format!("UPDATE wide SET small = small + 1 WHERE id % 30 = {}", id % 30),
            9 => format!("UPDATE wide SET big = md5(random()::text) || big WHERE id = {}", id % 300),
            10 => format!("INSERT INTO parent VALUES ({fresh}); INSERT INTO child VALUES ({fresh}, {fresh})"),
            11 => format!("SAVEPOINT s; INSERT INTO keyed VALUES ({fresh}); UPDATE counters SET n = -1; ROLLBACK TO s"),
            12 => format!("SAVEPOINT s; INSERT INTO keyed (id) VALUES ({fresh}); RELEASE s"),
            _ => format!("UPDATE keyed SET n = n + 1 WHERE id BETWEEN {id} AND {}", id + rng.u32(0..200)),
        };
        sql.push_str(&statement);
        sql.push(';');
    }
    // Every transaction adds to one of few rows: one that is applied twice or not at all shows.
    sql.push_str(&format!("UPDATE counters SET n = n + 1 WHERE id = {};", rng.u32(1..11)));
    sql.push_str(if rng.u32(0..10) == 0 { "ROLLBACK" } else { "COMMIT" });
    sql
}

/// A change of the owner's schema that the feed follows by itself, or with an approval that the test gives.
fn schema_change(rng: &mut Rng, number: usize) -> String {
    match rng.u32(0..9) {
        0 => format!("ALTER TABLE keyed ADD COLUMN c{number} integer DEFAULT {number}"),
        1 => format!("ALTER TABLE keyless ADD COLUMN d{number} double precision DEFAULT random()"),
        2 => format!("CREATE TABLE born{number} (id integer PRIMARY KEY, v text); INSERT INTO born{number} VALUES (1, 'a'), (2, 'b')"),
        3 => format!(
            "BEGIN; ALTER TABLE parent ADD COLUMN e{number} text; INSERT INTO parent (id, e{number}) VALUES ({number} + 1000000, 'e'); COMMIT"
        ),
        4 => format!("ALTER TYPE mood ADD VALUE 'm{number}'"),
        5 => format!("CREATE INDEX i{number} ON keyed (v, n)"),
        6 => format!(
            "ALTER TABLE wide ADD COLUMN at{number} timestamptz DEFAULT now(); ALTER TABLE wide RENAME COLUMN at{number} TO bt{number}"
        ),
        7 => format!("BEGIN; ALTER TABLE keyed ADD COLUMN gone{number} integer; ROLLBACK; UPDATE keyed SET n = n + 1 WHERE id < 10"),
        _ => format!("ALTER TABLE counters ADD COLUMN f{number} integer; ALTER TABLE counters DROP COLUMN f{number}"),
    }
}

/// Until the feed streams and no table is set aside; what waits for a person is approved.
async fn settle(feed: &Feed, repository: &Repository, what: &str) {
    let deadline = Instant::now() + play::PATIENCE;
    loop {
        let state = feed.state();
        assert!(!state.state.starts_with("failed"), "{what}: {}", state.state);
        if feed.is_streaming() {
            for proposal in repository.proposals(None).unwrap() {
                if proposal.state == ProposalState::Pending {
                    let _ = feed.approve(&proposal, None, "test").await;
                }
            }
            if state.held_tables.is_empty() {
                return;
            }
        }
        if Instant::now() > deadline {
            let events: Vec<_> =
                repository.events(0, 1000, false).unwrap().iter().rev().take(15).map(|e| format!("{} {}", e.message, e.data)).collect();
            panic!("{what}: not settled: {state:?}\n{}", events.join("\n"));
        }
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_dies_when_no_row_is_lost_or_doubled() {
    let seed = play::seed("whatever_dies_when_no_row_is_lost_or_doubled");
    let mut rng = Rng::with_seed(seed);
    let (old, new) = (Arc::new(Server::start(15, "")), Server::start(18, ""));
    old.create("crash").await.batch_execute(SCHEMA).await.unwrap();
    new.create("crash").await;
    let spec = spec(&old, &new, "crash");
    let repository = Repository::in_memory().unwrap();
    // The application goes on whatever happens, except while the rows are compared.
    let (gate, over) = (Arc::new(RwLock::new(())), Arc::new(AtomicBool::new(false)));
    let next = Arc::new(AtomicU32::new(10_000));
    let application = tokio::spawn({
        let (old, gate, over, next, mut rng) = (Arc::clone(&old), Arc::clone(&gate), Arc::clone(&over), Arc::clone(&next), rng.fork());
        async move {
            let mut client = None;
            while !over.load(Ordering::Relaxed) {
                let _pass = gate.read().await;
                let connected = match client.take() {
                    Some(client) => Some(client),
                    None => match old.url("crash").to_tokio("application").connect(tokio_postgres::NoTls).await {
                        Ok((client, connection)) => {
                            tokio::spawn(connection);
                            Some(client)
                        }
                        Err(_) => None,
                    },
                };
                if let Some(connected) = connected
                    && connected.batch_execute(&transaction(&mut rng, &next)).await.is_ok()
                {
                    client = Some(connected);
                }
                drop(_pass);
                tokio::time::sleep(Duration::from_millis(rng.u64(1..6))).await;
            }
        }
    });
    let mut feed = start(&spec, Start::Copy, &repository);
    let mut findings = 0;
    for round in 0..play::rounds(14) {
        let moment = rng.u32(0..4);
        let victim = rng.u32(0..4);
        let name = format!(
            "round {round}: {} dies during {}",
            ["the feed", "the owner", "the follower", "everything"][victim as usize],
            ["the copy", "catch-up", "live flow", "a schema change"][moment as usize]
        );
        println!("{name}");
        match moment {
            0 => {
                feed.stop().await;
                cdc::disarm(&spec).await.unwrap_or_else(|error| panic!("{name}: {error}"));
                new.client("postgres").await.batch_execute("DROP DATABASE crash WITH (FORCE)").await.unwrap();
                new.create("crash").await;
                feed = start(&spec, Start::Copy, &repository);
                tokio::time::sleep(Duration::from_millis(rng.u64(0..1500))).await;
            }
            1 => {
                drop(feed);
                tokio::time::sleep(Duration::from_millis(300)).await;
                feed = start(&spec, Start::Copy, &repository);
                tokio::time::sleep(Duration::from_millis(rng.u64(0..250))).await;
            }
            2 => tokio::time::sleep(Duration::from_millis(rng.u64(0..400))).await,
            _ => {
                let sql = schema_change(&mut rng, round);
                println!("  {sql}");
                let client = old.client("crash").await;
                client.batch_execute(&sql).await.unwrap_or_else(|error| panic!("{name}: {sql}: {error:?}"));
                tokio::time::sleep(Duration::from_millis(rng.u64(0..60))).await;
            }
        }
        // Dropped, its tasks vanish where they stand.
        let survivor = (victim != 0 && victim != 3).then_some(feed);
        if victim == 1 || victim == 3 {
            old.kill_only();
        }
        if victim == 2 || victim == 3 {
            new.kill();
        }
        if victim == 1 || victim == 3 {
            old.boot_again();
        }
        feed = match survivor {
            Some(feed) => feed,
            None => start(&spec, Start::Copy, &repository),
        };
        settle(&feed, &repository, &name).await;
        let _still = gate.write().await;
        let (owner, follower) = (old.client("crash").await, new.client("crash").await);
        catch_up(&feed, &owner).await;
        settle(&feed, &repository, &name).await;
        catch_up(&feed, &owner).await;
        assert_equal(&owner, &follower, &name).await;
        findings += feed.state().findings;
        assert_eq!(findings, 0, "{name}: {:?}", feed.state());
    }
    over.store(true, Ordering::Relaxed);
    application.await.unwrap();
    let owner = old.client("crash").await;
    let done: i64 = owner.query_one("SELECT sum(n)::int8 FROM counters", &[]).await.unwrap().get(0);
    assert!(done > 100, "the application committed only {done} transactions");
    feed.stop().await;
    cdc::disarm(&spec).await.unwrap();
    assert_eq!(cdc::leftovers(&spec.from).await.unwrap(), Vec::<String>::new());
}
