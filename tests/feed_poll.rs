//! An owner on which we may not create event triggers: its catalog is looked at every other second. Here several changes, and rows written
//! between them, fall between two looks.

#[path = "support/feed_play.rs"]
mod play;
#[path = "support/feed_servers.rs"]
mod servers;

use play::{PATIENCE, contents, first_difference, spec, start, streaming};
use servers::Server;
use std::time::{Duration, Instant};
use understudy::{
    cdc::{self, Start},
    metadata::{ProposalState, Repository},
};

const BEFORE: &str = "
CREATE TABLE twice (id integer PRIMARY KEY, v text);
CREATE TABLE there_and_back (id integer PRIMARY KEY, v text);
CREATE TABLE heir (id integer PRIMARY KEY, v text);
CREATE TABLE testator (id integer PRIMARY KEY, v text);
CREATE TABLE swapped (id integer PRIMARY KEY, a text, b text);
CREATE TABLE swapped_for_good (id integer PRIMARY KEY, a text, b text);
CREATE TABLE passing (id integer PRIMARY KEY, v text);
CREATE TABLE late_default (id integer PRIMARY KEY);
CREATE TABLE recomputed (id integer PRIMARY KEY, v integer);
CREATE TABLE computed (id integer PRIMARY KEY, v integer, w integer GENERATED ALWAYS AS (v * 2) STORED);
CREATE TABLE emptied (id integer PRIMARY KEY, v text);
CREATE TABLE full_one (id integer PRIMARY KEY, v text);
CREATE TABLE parted (id integer, at integer, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (0) TO (10);
CREATE TABLE parted_2 PARTITION OF parted FOR VALUES FROM (10) TO (20);
CREATE TABLE parted_3 PARTITION OF parted FOR VALUES FROM (20) TO (30);
CREATE SCHEMA apart;
CREATE TABLE apart.t (id integer PRIMARY KEY, v text);
CREATE TABLE joining (id integer NOT NULL, at integer NOT NULL, PRIMARY KEY (id, at));
INSERT INTO twice SELECT g, 'old' FROM generate_series(1, 50) g;
INSERT INTO there_and_back SELECT g, 'old' FROM generate_series(1, 50) g;
INSERT INTO heir SELECT g, 'heir' FROM generate_series(1, 50) g;
INSERT INTO testator SELECT g, 'testator' FROM generate_series(1, 50) g;
INSERT INTO swapped SELECT g, 'a', 'b' FROM generate_series(1, 50) g;
INSERT INTO swapped_for_good SELECT g, 'a', 'b' FROM generate_series(1, 50) g;
INSERT INTO passing SELECT g, 'old' FROM generate_series(1, 50) g;
INSERT INTO late_default SELECT g FROM generate_series(1, 50) g;
INSERT INTO recomputed SELECT g, g FROM generate_series(1, 50) g;
INSERT INTO computed (id, v) SELECT g, g FROM generate_series(1, 50) g;
INSERT INTO emptied SELECT g, 'old' FROM generate_series(1, 50) g;
INSERT INTO full_one SELECT g, 'old' FROM generate_series(1, 50) g;
INSERT INTO parted SELECT g, g % 30 FROM generate_series(1, 90) g;
INSERT INTO joining SELECT g, 35 FROM generate_series(1, 5) g";

/// Each statement a transaction of its own.
const BETWEEN: &[&str] = &[
    // Rows under a name that the table has only between two looks.
    "ALTER TABLE twice RENAME TO twice_b",
    "INSERT INTO twice_b VALUES (100, 'between')",
    "ALTER TABLE twice_b RENAME TO twice_c",
    "INSERT INTO twice_c VALUES (101, 'behind')",
    "ALTER TABLE there_and_back RENAME TO away",
    "UPDATE away SET v = 'away' WHERE id < 10",
    "ALTER TABLE away RENAME TO there_and_back",
    // A name that another table had.
    "DROP TABLE testator",
    "ALTER TABLE heir RENAME TO testator",
    "INSERT INTO testator VALUES (100, 'heir')",
    "DELETE FROM testator WHERE id < 5",
    // What a TRUNCATE meant.
    "ALTER TABLE full_one RENAME TO spared",
    "ALTER TABLE emptied RENAME TO full_one",
    "TRUNCATE full_one",
    "ALTER TABLE full_one RENAME TO emptied",
    "ALTER TABLE spared RENAME TO full_one",
    // Columns that change their names with each other.
    "ALTER TABLE swapped RENAME a TO c",
    "ALTER TABLE swapped RENAME b TO a",
    "ALTER TABLE swapped RENAME c TO b",
    "INSERT INTO swapped (id, a, b) VALUES (100, 'b', 'a')",
    "ALTER TABLE swapped RENAME b TO c",
    "ALTER TABLE swapped RENAME a TO b",
    "ALTER TABLE swapped RENAME c TO a",
    "ALTER TABLE swapped_for_good RENAME a TO c",
    "ALTER TABLE swapped_for_good RENAME b TO a",
    "ALTER TABLE swapped_for_good RENAME c TO b",
    "INSERT INTO swapped_for_good (id, a, b) VALUES (100, 'x', 'y')",
    // A column that comes and goes.
    "ALTER TABLE passing ADD COLUMN w integer DEFAULT 1",
    "INSERT INTO passing VALUES (100, 'passing', 2)",
    "ALTER TABLE passing DROP COLUMN w",
    "INSERT INTO passing VALUES (101, 'behind')",
    // A default that comes after the column and the rows.
    "ALTER TABLE late_default ADD COLUMN v integer",
    "INSERT INTO late_default (id) VALUES (100)",
    "ALTER TABLE late_default ALTER COLUMN v SET DEFAULT 7",
    "INSERT INTO late_default (id) VALUES (101)",
    // Values that no row of the stream brings.
    "ALTER TABLE recomputed ALTER COLUMN v TYPE integer USING v + 1000",
    "ALTER TABLE computed ALTER COLUMN w DROP EXPRESSION",
    "INSERT INTO computed VALUES (100, 1, 77)",
    // Partitions that are tables of their own, for good or for a moment, and a table that becomes one.
    "ALTER TABLE parted DETACH PARTITION parted_1",
    "INSERT INTO parted_1 VALUES (1000, 1)",
    "DELETE FROM parted_1 WHERE id = 30",
    "ALTER TABLE parted DETACH PARTITION parted_2",
    "INSERT INTO parted_2 VALUES (1000, 12)",
    "ALTER TABLE parted ATTACH PARTITION parted_2 FOR VALUES FROM (10) TO (20)",
    "ALTER TABLE parted ATTACH PARTITION joining FOR VALUES FROM (30) TO (40)",
    "INSERT INTO parted VALUES (1001, 35)",
    // A schema with another name, and what is in it changed.
    "ALTER SCHEMA apart RENAME TO elsewhere",
    "ALTER TABLE elsewhere.t RENAME COLUMN v TO w",
    "INSERT INTO elsewhere.t VALUES (100, 'behind')",
    "ALTER TABLE elsewhere.t SET SCHEMA public",
    "DROP SCHEMA elsewhere",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_happens_between_two_looks_arrives() {
    let (old, new) = (Server::start(15, ""), Server::start(18, ""));
    old.client("postgres").await.batch_execute("CREATE ROLE app LOGIN REPLICATION").await.unwrap();
    let (_, follower) = (old.create("between").await, new.create("between").await);
    old.client("postgres").await.batch_execute("ALTER DATABASE between OWNER TO app").await.unwrap();
    let mut spec = spec(&old, &new, "between");
    spec.from.user = "app".into();
    let (owner, connection) = spec.from.to_tokio("application").connect(tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    owner.batch_execute(BEFORE).await.unwrap();
    let repository = Repository::in_memory().unwrap();
    let feed = start(&spec, Start::Copy, &repository);
    streaming(&feed).await;
    // A first look, so that what follows lies between two.
    owner.batch_execute("CREATE TABLE first_look (id integer PRIMARY KEY)").await.unwrap();
    play::eventually("a first look", async || {
        follower.query_one("SELECT to_regclass('first_look') IS NOT NULL", &[]).await.unwrap().get::<_, bool>(0)
    })
    .await;
    for statement in BETWEEN {
        owner.batch_execute(statement).await.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
    }
    let deadline = Instant::now() + PATIENCE;
    let mut apart = String::from("not compared yet");
    while !apart.is_empty() {
        let events =
            || repository.events(0, 1000, false).unwrap().iter().map(|e| format!("{} {}\n", e.message, e.data)).collect::<String>();
        assert!(Instant::now() < deadline, "{apart}\n{:?}\n{}", feed.state(), events());
        tokio::time::sleep(Duration::from_millis(100)).await;
        let waiting: Vec<_> =
            repository.proposals(None).unwrap().into_iter().filter(|proposal| proposal.state == ProposalState::Pending).collect();
        // Of what a person is asked here only the drops are agreed to; tables that rows have set aside come back by themselves.
        for proposal in waiting.iter().filter(|proposal| proposal.draft.kind.starts_with("drop_")) {
            let _ = feed.approve(proposal, None, "test").await;
        }
        let held = feed.state().held_tables;
        if !waiting.is_empty() || !held.is_empty() {
            apart = format!("{} proposals, {held:?}: {waiting:?}", waiting.len());
            continue;
        }
        let (left, right) = (contents(&owner).await, contents(&follower).await);
        apart = match left.iter().find(|(table, rows)| right.get(*table) != Some(rows)) {
            Some((table, rows)) => format!("{table}: {}", first_difference(rows, right.get(table).map_or("", String::as_str))),
            None if left.len() != right.len() => format!("{:?} against {:?}", left.keys(), right.keys()),
            None => String::new(),
        };
    }
    feed.stop().await;
    cdc::disarm(&spec).await.unwrap();
}
