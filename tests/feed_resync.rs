//! A feed that has lost its place (slot dropped behind our back, failover that lost commits) is brought back by what differs.

#[path = "support/feed_play.rs"]
mod play;
#[path = "support/feed_servers.rs"]
mod servers;

use play::{assert_equal, assert_same_catalog, catch_up, eventually, spec, start, streaming};
use servers::Server;
use std::time::Duration;
use tokio_postgres::Client;
use understudy::{
    cdc::{self, Feed, Start},
    metadata::{ProposalState, Repository},
};

const SCHEMA: &str = "
CREATE TABLE numbered (id integer PRIMARY KEY, u text UNIQUE, v text);
CREATE TABLE named (name text PRIMARY KEY, v integer);
CREATE TABLE pairs (a bigint, b date, v text, PRIMARY KEY (a, b));
CREATE TABLE ids (id uuid PRIMARY KEY, v text);
CREATE TABLE keyless (a integer, b text);
CREATE TABLE parted (id integer, at integer, v text, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (0) TO (500); CREATE TABLE parted_2 PARTITION OF parted FOR VALUES FROM (500) TO (1000);
CREATE TABLE referred (id integer PRIMARY KEY); CREATE TABLE refers (id integer PRIMARY KEY, to_ integer REFERENCES referred);
CREATE TABLE changed (id integer PRIMARY KEY, v text);
INSERT INTO numbered SELECT g, 'u' || g, md5(g::text) FROM generate_series(1, 5000) g;
INSERT INTO named SELECT E'n\\\\''\t' || g, g FROM generate_series(1, 500) g;
INSERT INTO pairs SELECT g % 100, date '2020-01-01' + g, 'p' FROM generate_series(1, 500) g;
INSERT INTO ids SELECT md5(g::text)::uuid, 'i' FROM generate_series(1, 500) g;
INSERT INTO keyless SELECT g, 'k' FROM generate_series(1, 50) g;
INSERT INTO parted SELECT g, g % 1000, md5(g::text) FROM generate_series(1, 3000) g;
INSERT INTO referred SELECT generate_series(1, 50); INSERT INTO refers SELECT g, g FROM generate_series(1, 50) g;
INSERT INTO changed SELECT g, 'c' FROM generate_series(1, 100) g;
";

/// What happened while there was no slot, and how many rows of the owner a resync must write for it.
const MEANWHILE: (&str, u64, u64) = (
    "
UPDATE numbered SET v = 'new' WHERE id % 1000 = 0; -- 5 written, 5 removed
DELETE FROM numbered WHERE id BETWEEN 11 AND 20; -- 10 removed
INSERT INTO numbered SELECT g, 'u' || g, 'born' FROM generate_series(6001, 6007) g; -- 7 written
UPDATE numbered SET u = 'swap' WHERE id = 1; UPDATE numbered SET u = 'u1' WHERE id = 4999; UPDATE numbered SET u = 'u4999' WHERE id = 1; -- 2, 2
UPDATE named SET v = -1 WHERE v IN (7, 9); -- 2, 2
DELETE FROM pairs WHERE a = 3; -- 5 removed
INSERT INTO ids VALUES ('00000000-0000-0000-0000-000000000001', 'x'); -- 1
UPDATE parted SET at = at + 500 WHERE id IN (1, 2); -- a key that changed: 2, 2
INSERT INTO refers VALUES (51, 50); -- 1
",
    20,
    26,
);

async fn changed(client: &Client) {
    client.batch_execute(MEANWHILE.0).await.unwrap();
}

fn lost(feed: &Feed) -> bool {
    let state = feed.state().state;
    state.starts_with("failed") && state.contains("SHADOW RESYNC copy")
}

fn newest_resync(repository: &Repository) -> serde_json::Value {
    let events = repository.events(0, 1000, false).unwrap();
    events.iter().rev().find(|event| event.message.starts_with("the resync is complete")).expect("a resync has ended").data.clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_slot_costs_only_what_differs() {
    let (old, new) = (Server::start(15, ""), Server::start(18, ""));
    let owner = old.create("lost").await;
    let follower = new.create("lost").await;
    owner.batch_execute(SCHEMA).await.unwrap();
    let (spec, repository) = (spec(&old, &new, "lost"), Repository::in_memory().unwrap());
    let slot = cdc::feed_name(&spec);
    let feed = start(&spec, Start::Copy, &repository);
    streaming(&feed).await;
    feed.stop().await;
    let drop_slot = format!("SELECT pg_drop_replication_slot('{slot}')");
    // The walsender notices the end of its connection by and by.
    eventually("the slot is dropped", async || owner.batch_execute(&drop_slot).await.is_ok()).await;
    changed(&owner).await;
    let feed = start(&spec, Start::Copy, &repository);
    eventually("the feed says that its slot is lost", async || lost(&feed)).await;
    feed.stop().await;

    let feed = start(&spec, Start::Resync, &repository);
    streaming(&feed).await;
    catch_up(&feed, &owner).await;
    let event = newest_resync(&repository);
    let (written, removed) = (event["rows_written"].as_u64().unwrap(), event["rows_removed"].as_u64().unwrap());
    assert_eq!((written, removed), (MEANWHILE.1, MEANWHILE.2), "{event}");
    assert!(event["rows_compared"].as_u64().unwrap() > 9000, "{event}");
    assert_equal(&owner, &follower, "after the resync").await;
    owner.batch_execute("UPDATE numbered SET v = v || '.'; INSERT INTO keyless VALUES (1, 'z')").await.unwrap();
    catch_up(&feed, &owner).await;
    assert_equal(&owner, &follower, "the stream goes on").await;
    assert_eq!(feed.state().findings, 0, "{:?}", feed.state());

    // Once more, with changes of the schema, a table without a key that differs, writers all the time, and interruptions.
    feed.stop().await;
    eventually("the slot is dropped", async || owner.batch_execute(&drop_slot).await.is_ok()).await;
    owner
        .batch_execute(
            "UPDATE numbered SET v = 'again' WHERE id % 7 = 0; DELETE FROM keyless WHERE a < 5; TRUNCATE referred, refers;
             ALTER TABLE changed ADD COLUMN added timestamptz DEFAULT now(); INSERT INTO changed VALUES (1000, 'x');
             ALTER TABLE ids RENAME TO idents; INSERT INTO idents VALUES ('00000000-0000-0000-0000-000000000002', 'y');
             CREATE TABLE born (id integer PRIMARY KEY); INSERT INTO born VALUES (1), (2);
             CREATE FUNCTION f() RETURNS integer LANGUAGE sql AS 'SELECT 1'",
        )
        .await
        .unwrap();
    let writer = old.client("lost").await;
    let over = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let writing = tokio::spawn({
        let over = over.clone();
        async move {
            let mut id = 100_000;
            while !over.load(std::sync::atomic::Ordering::Relaxed) {
                id += 1;
                let sql = format!(
                    "INSERT INTO numbered VALUES ({id}, '{id}', 'w'); UPDATE parted SET v = v || 'w' WHERE id = {};
                     INSERT INTO born VALUES ({id}); INSERT INTO changed VALUES ({id}, 'w')",
                    id % 3000
                );
                writer.batch_execute(&sql).await.unwrap();
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    });
    for pause in [30, 120, 250, 400] {
        let feed = start(&spec, Start::Resync, &repository);
        tokio::time::sleep(Duration::from_millis(pause)).await;
        drop(feed);
    }
    // A restart of the process knows nothing of the command: it goes on with what was begun.
    let feed = start(&spec, Start::Resync, &repository);
    eventually("a resync is under way", async || {
        let row = follower.query_opt("SELECT FROM understudy.progress WHERE phase = 'resync'", &[]).await.unwrap();
        row.is_some() || feed.is_streaming()
    })
    .await;
    drop(feed);
    let feed = start(&spec, Start::Copy, &repository);
    streaming(&feed).await;
    eventually("all tables follow", async || {
        for proposal in repository.proposals(None).unwrap() {
            if proposal.state == ProposalState::Pending {
                let _ = feed.approve(&proposal, None, "test").await;
            }
        }
        feed.state().held_tables.is_empty()
    })
    .await;
    over.store(true, std::sync::atomic::Ordering::Relaxed);
    writing.await.unwrap();
    catch_up(&feed, &owner).await;
    eventually("no table is set aside", async || feed.state().held_tables.is_empty()).await;
    catch_up(&feed, &owner).await;
    assert_equal(&owner, &follower, "after an interrupted resync").await;
    assert_same_catalog(&owner, &follower, "after an interrupted resync").await;
    assert_eq!(feed.state().findings, 0, "{:?}", feed.state());
    feed.stop().await;
    cdc::disarm(&spec).await.unwrap();
    assert_eq!(cdc::leftovers(&spec.from).await.unwrap(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_that_lost_commits_is_put_right() {
    let (old, new) = (Server::start(16, ""), Server::start(16, ""));
    let owner = old.create("moved").await;
    new.create("moved").await;
    owner.batch_execute(SCHEMA).await.unwrap();
    let (spec, repository) = (spec(&old, &new, "moved"), Repository::in_memory().unwrap());
    let feed = start(&spec, Start::Copy, &repository);
    streaming(&feed).await;
    owner.batch_execute("CHECKPOINT").await.unwrap();
    feed.stop().await;
    drop(owner);
    old.stop_and_keep();
    old.start_again();
    let owner = old.client("moved").await;
    let feed = start(&spec, Start::Copy, &repository);
    streaming(&feed).await;
    changed(&owner).await;
    catch_up(&feed, &owner).await;
    feed.stop().await;
    drop(owner);
    old.fail_over(true);
    let owner = old.client("moved").await;
    let feed = start(&spec, Start::Copy, &repository);
    eventually("the feed says that commits are lost", async || lost(&feed)).await;
    feed.stop().await;
    let feed = start(&spec, Start::Resync, &repository);
    streaming(&feed).await;
    catch_up(&feed, &owner).await;
    let event = newest_resync(&repository);
    // The way back: what the owner lost is removed, what it had is written.
    assert_eq!((event["rows_written"].as_u64(), event["rows_removed"].as_u64()), (Some(MEANWHILE.2), Some(MEANWHILE.1)), "{event}");
    let follower = new.client("moved").await;
    assert_equal(&owner, &follower, "after the failover").await;
    feed.stop().await;
    cdc::disarm(&spec).await.unwrap();
}
