//! What the feed does with big transactions that have not ended, with prepared ones, and with a backlog.

#[path = "support/feed_play.rs"]
mod play;
#[path = "support/feed_servers.rs"]
mod servers;

use play::{catch_up, eventually, spec, start_faulty as start, streaming};
use servers::Server;
use std::sync::atomic::Ordering;
use tokio_postgres::Client;
use understudy::{
    cdc::{self, Fault, Feed, Start},
    lsn::Lsn,
    metadata::Repository,
};

async fn digest(client: &Client, table: &str) -> (i64, Option<String>) {
    let sql = format!("SELECT count(*), md5(string_agg(t::text, '|' ORDER BY t::text COLLATE \"C\")) FROM {table} t");
    let row = client.query_one(&sql, &[]).await.unwrap();
    (row.get(0), row.get(1))
}

async fn assert_equal(owner: &Client, follower: &Client, tables: &[&str]) {
    for table in tables {
        assert_eq!(digest(owner, table).await, digest(follower, table).await, "{table}");
    }
}

async fn run(client: &Client, sql: &str) {
    client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unfinished_transactions_arrive_whole_or_not_at_all() {
    let settings = "logical_decoding_work_mem = 64kB\nmax_prepared_transactions = 10";
    let (first, second) = tokio::join!(unfinished(14, 18, settings), unfinished(18, 15, settings));
    assert!(first && second);
    // Protocol version 3.
    assert!(unfinished(15, 15, settings).await);
}

async fn unfinished(from: u32, to: u32, settings: &str) -> bool {
    let (old, new) = (Server::start(from, settings), Server::start(to, ""));
    let (owner, follower) = (old.create("big").await, new.create("big").await);
    run(&owner, "CREATE TABLE t (id integer PRIMARY KEY, v text); CREATE TABLE k (id integer, v text)").await;
    let spec = spec(&old, &new, "big");
    let (repository, fault) = (Repository::in_memory().unwrap(), Fault::default());
    let feed = start(&spec, Start::Copy, &repository, &fault);
    streaming(&feed).await;
    let rows =
        |table: &str, from: u32, to: u32| format!("INSERT INTO {table} SELECT g, repeat('x', 100) FROM generate_series({from}, {to}) g");

    // Open at the same time: one that will commit (a part of it rolled back, a schema change in it), one of another table, one that
    // will be rolled back, one that is prepared.
    let (a, b, c, d) = (old.client("big").await, old.client("big").await, old.client("big").await, old.client("big").await);
    run(&a, &format!("BEGIN; {}", rows("t", 1, 4000))).await;
    run(&b, &format!("BEGIN; {}", rows("k", 1, 3000))).await;
    run(&c, &format!("BEGIN; {}", rows("k", 50_000, 53_000))).await;
    run(&d, &format!("BEGIN; {}; PREPARE TRANSACTION 'later'", rows("k", 20_000, 23_000))).await;
    run(&a, &format!("SAVEPOINT s; {}; UPDATE t SET v = 'gone' WHERE id < 1000; ROLLBACK TO s", rows("t", 10_001, 14_000))).await;
    run(&a, "SAVEPOINT kept; ALTER TABLE t ADD COLUMN n integer; UPDATE t SET n = id WHERE id % 2 = 0; RELEASE kept").await;
    run(&a, "SAVEPOINT undone; ALTER TABLE t ADD COLUMN never integer; UPDATE t SET never = id; ROLLBACK TO undone").await;
    run(&a, "UPDATE t SET id = -id WHERE id <= 100; DELETE FROM t WHERE id BETWEEN 200 AND 300").await;
    // Nothing of them shows, and what is committed meanwhile is not kept waiting.
    run(&owner, "INSERT INTO k VALUES (0, 'small')").await;
    catch_up(&feed, &owner).await;
    assert_eq!(digest(&follower, "t").await.0, 0);
    assert_eq!(digest(&follower, "k").await.0, 1);
    let streamed = "SELECT stream_txns >= 3 FROM pg_stat_replication_slots";
    eventually("sending unfinished transactions", async || owner.query_one(streamed, &[]).await.unwrap().get(0)).await;
    // The connection breaks in the middle: everything unfinished comes anew.
    run(&owner, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'walsender'").await;
    run(&c, &format!("{}; ROLLBACK", rows("k", 60_000, 63_000))).await;
    run(&a, "INSERT INTO t VALUES (0, 'last', 1); COMMIT").await;
    run(&b, "COMMIT").await;
    catch_up(&feed, &owner).await;
    assert_equal(&owner, &follower, &["t", "k"]).await;
    assert_eq!(digest(&follower, "k").await.0, 3001, "prepared is not committed");
    run(&owner, "COMMIT PREPARED 'later'").await;
    catch_up(&feed, &owner).await;
    assert_equal(&owner, &follower, &["t", "k"]).await;

    // Also the newest change of a table is known, and a spool that is full changes nothing but the way.
    let before: Lsn = owner.query_one("SELECT pg_current_wal_insert_lsn()::text", &[]).await.unwrap().get::<_, &str>(0).parse().unwrap();
    fault.spool_full.store(true, Ordering::Release);
    run(&a, &rows("k", 70_000, 74_000)).await;
    catch_up(&feed, &owner).await;
    assert_equal(&owner, &follower, &["t", "k"]).await;
    assert!(feed.table_changed_since("public", "k", before) && !feed.table_changed_since("public", "t", before));
    assert!(repository.events(0, 50, true).unwrap().iter().any(|event| event.message.contains("does not fit on this machine's disk")));
    let state = feed.state();
    assert_eq!((state.findings, state.held_tables.len()), (0, 0), "{state:?}");
    feed.stop().await;
    cdc::disarm(&spec).await.unwrap();
    true
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backlog_is_folded_and_differences_are_named() {
    let (old, new) = (Server::start(15, ""), Server::start(18, ""));
    let (owner, follower) = (old.create("backlog").await, new.create("backlog").await);
    run(
        &owner,
        "CREATE TABLE t (id integer PRIMARY KEY, v text, w integer);
         CREATE TABLE two (id integer PRIMARY KEY, u integer UNIQUE DEFERRABLE, v text);
         CREATE TABLE chain (id integer PRIMARY KEY, u integer UNIQUE, v text);
         CREATE TABLE heir () INHERITS (t);
         CREATE TABLE log (at integer, v text);
         ALTER TABLE heir ADD PRIMARY KEY (id);
         INSERT INTO t SELECT g, 'v', g FROM generate_series(1, 200) g; INSERT INTO heir VALUES (1, 'other', 1);
         INSERT INTO two SELECT g, g, 'v' FROM generate_series(1, 20) g; INSERT INTO chain SELECT g, g, 'v' FROM generate_series(1, 20) g",
    )
    .await;
    let tables = ["ONLY t", "heir", "two", "chain", "log"];
    let spec = spec(&old, &new, "backlog");
    let (repository, fault) = (Repository::in_memory().unwrap(), Fault::default());
    let feed = start(&spec, Start::Copy, &repository, &fault);
    streaming(&feed).await;
    // Something on the follower that must see each change.
    run(
        &follower,
        "CREATE TABLE seen (id integer, v text);
         CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.seen VALUES (NEW.id, NEW.v); RETURN NULL; END $$;
         CREATE TRIGGER see AFTER UPDATE ON heir FOR EACH ROW EXECUTE FUNCTION see(); ALTER TABLE heir ENABLE ALWAYS TRIGGER see",
    )
    .await;
    feed.stop().await;
    for round in 1..=150 {
        run(
            &owner,
            &format!(
                "BEGIN; UPDATE ONLY t SET v = 'r{round}', w = w + 1 WHERE id % 50 = {round} % 50; INSERT INTO log VALUES ({round}, 'a,\"b\\{round}');
                 DELETE FROM ONLY t WHERE id = {round}; INSERT INTO t VALUES ({round} + 1000, NULL, {round}); COMMIT;
                 INSERT INTO t VALUES ({round}, 'back', 0);
                 BEGIN; UPDATE chain SET u = -u WHERE id = {round} % 20 + 1; UPDATE chain SET u = {round} + 100 WHERE id = {round} % 20 + 1; COMMIT;
                 UPDATE two SET u = 21 - u; UPDATE ONLY t SET id = id + 100000 WHERE id = {round} + 1000 AND {round} % 10 = 0;
                 UPDATE heir SET v = 'h{round}'"
            ),
        )
        .await;
    }
    // Behind our back: a row that will be updated goes, a row that will be inserted is there already.
    run(&follower, "SET session_replication_role = replica; DELETE FROM ONLY t WHERE id = 177; INSERT INTO t VALUES (1033, 'early', 0)")
        .await;
    let feed = start(&spec, Start::Resume, &repository, &fault);
    catch_up(&feed, &owner).await;
    assert_equal(&owner, &follower, &tables).await;
    let state = feed.state();
    assert_eq!(state.findings, 2, "{state:?}");
    for key in ["public.t (id=177)", "public.t (id=1033)"] {
        assert!(state.finding_examples.iter().any(|example| example.contains(key)), "{state:?}");
    }
    assert_eq!(digest(&follower, "seen").await.0, 150, "each change of a watched table is seen");
    // A table that stops fitting in the middle of a backlog: what is left of it waits in order, the others go on.
    feed.stop().await;
    run(&follower, "ALTER TABLE log ADD CONSTRAINT small CHECK (at < 3000)").await;
    for part in [1000, 2500, 3500, 1500] {
        run(&owner, &format!("INSERT INTO log SELECT {part} + g, 'x' FROM generate_series(0, 899) g; UPDATE ONLY t SET w = w + 1")).await;
    }
    run(&owner, "UPDATE log SET v = 'y' WHERE at = 1100").await;
    let feed = start(&spec, Start::Resume, &repository, &fault);
    catch_up(&feed, &owner).await;
    assert_eq!(feed.state().held_tables, ["public.log"]);
    assert_equal(&owner, &follower, &["ONLY t"]).await;
    let proposal = repository.proposals(None).unwrap().into_iter().find(|proposal| proposal.draft.kind == "held_table").unwrap();
    feed.approve(&proposal, Some("ALTER TABLE log DROP CONSTRAINT small"), "test").await.unwrap();
    catch_up(&feed, &owner).await;
    assert_equal(&owner, &follower, &tables).await;
    assert_eq!(feed.state().held_tables.len(), 0);
    // Without differences nothing is found.
    feed.stop().await;
    run(
        &owner,
        "UPDATE ONLY t SET w = w + 1; UPDATE ONLY t SET v = v || '!'; INSERT INTO log SELECT g, NULL FROM generate_series(1, 100) g",
    )
    .await;
    let feed = start(&spec, Start::Resume, &repository, &fault);
    catch_up(&feed, &owner).await;
    assert_equal(&owner, &follower, &tables).await;
    assert_eq!((feed.state().findings, feed.state().held_tables.len()), (0, 0), "{:?}", feed.state());
    feed.stop().await;
    cdc::disarm(&spec).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_that_lost_commits_is_noticed() {
    let (old, new) = (Server::start(15, ""), Server::start(18, ""));
    let (owner, follower) = (old.create("moved").await, new.create("moved").await);
    run(&owner, "CREATE TABLE t (id integer PRIMARY KEY)").await;
    let spec = spec(&old, &new, "moved");
    let repository = Repository::in_memory().unwrap();
    let mut feed = start(&spec, Start::Copy, &repository, &Fault::default());
    streaming(&feed).await;
    run(&owner, "INSERT INTO t VALUES (1)").await;
    catch_up(&feed, &owner).await;
    drop(owner);
    // Nothing was lost: the feed goes on, and says so.
    old.fail_over(false);
    let owner = old.client("moved").await;
    run(&owner, "INSERT INTO t VALUES (2)").await;
    let goes_on = async |feed: &Feed, rows: i64| {
        eventually("going on", async || {
            let state = feed.state().state;
            assert!(!state.starts_with("failed"), "{state}");
            digest(&follower, "t").await.0 == rows
        })
        .await;
    };
    goes_on(&feed, 2).await;
    assert!(repository.events(0, 50, false).unwrap().iter().any(|event| event.message.contains("the owner failed over")));
    drop(owner);
    // The newest commit was not there yet where the server is promoted; the new owner soon is further on than the follower.
    old.stop_and_keep();
    old.start_again();
    let owner = old.client("moved").await;
    run(&owner, "INSERT INTO t VALUES (3)").await;
    goes_on(&feed, 3).await;
    drop(owner);
    feed.stop().await;
    old.fail_over(true);
    let owner = old.client("moved").await;
    run(&owner, "INSERT INTO t SELECT generate_series(10, 10000)").await;
    feed = start(&spec, Start::Resume, &repository, &Fault::default());
    eventually("noticing what was lost", async || feed.state().state.starts_with("failed")).await;
    let state = feed.state().state;
    assert!(state.contains("failed over (timeline 3 after 2)") && state.contains("SHADOW RESYNC"), "{state}");
    assert_eq!(digest(&follower, "t").await.0, 3);
    feed.stop().await;
}
