//! The snapshot copy on real servers: in parts, interrupted, against changes of the owner, with what does not fit.

#[path = "support/feed_play.rs"]
mod play;
#[path = "support/feed_servers.rs"]
mod servers;

use play::{assert_equal, assert_same_catalog, catch_up, eventually, spec, start, streaming};
use servers::Server;
use tokio_postgres::Client;
use understudy::{
    cdc::{self, Feed, Start},
    metadata::{ProposalState, Repository, Severity},
};

async fn count(client: &Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).await.unwrap().get(0)
}

/// No table is set aside any more.
async fn released(feed: &Feed, owner: &Client, repository: &Repository) {
    let deadline = std::time::Instant::now() + play::PATIENCE;
    loop {
        catch_up(feed, owner).await;
        let held = feed.state().held_tables;
        if held.is_empty() {
            return;
        }
        let events: Vec<_> =
            repository.events(0, 1000, false).unwrap().iter().rev().take(12).map(|e| format!("{} {}", e.message, e.data)).collect();
        assert!(std::time::Instant::now() < deadline, "{held:?} were not released; {}", events.join("\n"));
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

/// Something of every kind that a copy must bring besides plain tables.
const WORLD: &str = "
CREATE ROLE reader NOLOGIN; CREATE ROLE writer LOGIN PASSWORD 'x' IN ROLE reader;
CREATE COLLATION german (provider = icu, locale = 'de-u-kn-true');
CREATE EXTENSION hstore; CREATE EXTENSION citext;
CREATE SCHEMA sales AUTHORIZATION writer;
CREATE TABLE sales.wide (id bigint GENERATED ALWAYS AS IDENTITY (START 100 INCREMENT 3) PRIMARY KEY, v text COLLATE german UNIQUE,
  twice bigint GENERATED ALWAYS AS (id * 2) STORED, h hstore, c citext CHECK (length(c) < 100), r int4range, EXCLUDE USING gist (r WITH &&));
CREATE INDEX wide_expr ON sales.wide (lower(v)) WHERE id > 5; CREATE INDEX wide_plain ON sales.wide (v, id); CREATE INDEX wide_cover ON sales.wide (c) INCLUDE (twice);
CREATE STATISTICS sales.wide_stats ON v, c FROM sales.wide;
COMMENT ON TABLE sales.wide IS 'wide; Type: INDEX; it''s'; COMMENT ON COLUMN sales.wide.v IS 'v'; COMMENT ON INDEX sales.wide_expr IS 'i';
GRANT SELECT ON sales.wide TO reader; GRANT USAGE ON SCHEMA sales TO reader; ALTER DEFAULT PRIVILEGES IN SCHEMA sales GRANT SELECT ON TABLES TO reader;
INSERT INTO sales.wide (v, h, c, r) SELECT 'v' || g, hstore('k', g::text), 'C' || g, int4range(g, g + 1) FROM generate_series(1, 3000) g;
CREATE TABLE parent (id integer PRIMARY KEY, v text); CREATE TABLE child (w integer) INHERITS (parent); ALTER TABLE child ADD PRIMARY KEY (id);
INSERT INTO parent SELECT g, 'p' FROM generate_series(1, 50) g; INSERT INTO child SELECT g, 'c', g FROM generate_series(1, 70) g;
CREATE TABLE ranges (id integer, at date, v text, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
CREATE TABLE ranges_old PARTITION OF ranges FOR VALUES FROM ('2020-01-01') TO ('2021-01-01');
CREATE TABLE ranges_new PARTITION OF ranges FOR VALUES FROM ('2021-01-01') TO ('2022-01-01') PARTITION BY HASH (id);
CREATE TABLE ranges_new_0 PARTITION OF ranges_new FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE ranges_new_1 PARTITION OF ranges_new FOR VALUES WITH (MODULUS 2, REMAINDER 1);
CREATE INDEX ranges_v ON ranges (v);
INSERT INTO ranges SELECT g, date '2020-01-01' + g % 700, 'x' || g FROM generate_series(1, 4000) g;
CREATE TABLE orphans (id integer) PARTITION BY LIST (id);
CREATE TABLE referring (id integer PRIMARY KEY, wide bigint REFERENCES sales.wide DEFERRABLE, self integer REFERENCES referring);
INSERT INTO referring SELECT g, 100 + 3 * g, CASE WHEN g > 1 THEN g - 1 END FROM generate_series(1, 100) g;
CREATE TABLE nothing (); INSERT INTO nothing DEFAULT VALUES; INSERT INTO nothing DEFAULT VALUES;
CREATE UNLOGGED TABLE scratch (id integer);
CREATE SEQUENCE tickets AS smallint START 7 INCREMENT -1 MAXVALUE 10 MINVALUE -100 CACHE 5; SELECT nextval('tickets');
CREATE FUNCTION total() RETURNS bigint LANGUAGE sql STABLE AS 'SELECT count(*) FROM public.parent';
CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.v := NEW.v || '!'; RETURN NEW; END $$;
CREATE TRIGGER stamp BEFORE INSERT ON parent FOR EACH ROW EXECUTE FUNCTION stamp();
CREATE VIEW seen AS SELECT id, v FROM sales.wide; CREATE RULE ignore AS ON DELETE TO seen DO INSTEAD NOTHING;
CREATE MATERIALIZED VIEW counted AS SELECT total() AS n; CREATE UNIQUE INDEX counted_n ON counted (n);
ALTER TABLE parent ENABLE ROW LEVEL SECURITY; CREATE POLICY own ON parent FOR SELECT TO reader USING (id < 10);
ALTER TABLE sales.wide CLUSTER ON wide_plain;
SELECT lo_from_bytea(70001, 'small'), lo_from_bytea(70002, decode(repeat('00ff10', 3000000), 'hex')), lo_from_bytea(70003, '');
ALTER LARGE OBJECT 70001 OWNER TO writer;
";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_of_a_database_is_copied() {
    let (old, new) = (Server::start(15, ""), Server::start(18, ""));
    let (owner, follower) = (old.create("world").await, new.create("world").await);
    owner.batch_execute(WORLD).await.unwrap();
    let mut spec = spec(&old, &new, "world");
    spec.copy.workers = 4;
    let repository = Repository::in_memory().unwrap();
    let feed = start(&spec, Start::Copy, &repository);
    streaming(&feed).await;
    assert_equal(&owner, &follower, "after the copy").await;
    let alerts: Vec<_> = repository.events(0, 1000, true).unwrap().into_iter().filter(|e| e.severity == Severity::Alert).collect();
    assert!(alerts.is_empty(), "{alerts:?}");
    assert!(assert_same_catalog(&owner, &follower, "after the copy").await > 80);
    let objects = "SELECT string_agg(concat_ws(' ', oid, pg_get_userbyid(lomowner), length(lo_get(oid)), md5(lo_get(oid))), ',' ORDER BY oid) FROM pg_largeobject_metadata";
    let (left, right) = (owner.query_one(objects, &[]).await.unwrap(), follower.query_one(objects, &[]).await.unwrap());
    assert_eq!(left.get::<_, &str>(0), right.get::<_, &str>(0));
    assert!(left.get::<_, &str>(0).starts_with("70001 writer 5 "));
    let member = "SELECT count(*) FROM pg_auth_members WHERE pg_get_userbyid(member) = 'writer' AND pg_get_userbyid(roleid) = 'reader'";
    assert_eq!(count(&follower, member).await, 1);
    let state = feed.state().copy;
    assert!(state.done && state.tables_done == state.tables && state.seconds_left.is_none(), "{state:?}");
    assert_eq!(state.rows as i64, 3000 + 50 + 70 + 4000 + 100 + 2, "{state:?}");
    feed.stop().await;
    cdc::disarm(&spec).await.unwrap();
    for client in [&owner, &follower] {
        assert_eq!(count(client, "SELECT count(*) FROM pg_namespace WHERE nspname = 'understudy'").await, 0);
    }
}

/// A copy that is killed again and again, under writes, keeps what it has and ends equal.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interrupted_copy_goes_on() {
    let (old, new) = (Server::start(15, ""), Server::start(18, ""));
    let (owner, mut follower) = (old.create("again").await, new.create("again").await);
    owner
        .batch_execute(
            "CREATE TYPE mood AS ENUM ('a', 'b');
             CREATE TABLE parted (id integer PRIMARY KEY, v text) PARTITION BY RANGE (id);
             CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (0) TO (5000); CREATE TABLE parted_2 PARTITION OF parted FOR VALUES FROM (5000) TO (1000000);
             INSERT INTO parted SELECT g, md5(g::text) FROM generate_series(1, 9000) g",
        )
        .await
        .unwrap();
    for table in 0..30 {
        owner
            .batch_execute(&format!(
                "CREATE TABLE t{table} (id integer PRIMARY KEY, v text, m mood); CREATE INDEX ON t{table} (v);
                 INSERT INTO t{table} SELECT g, repeat(md5(g::text), 10), 'a' FROM generate_series(1, 4000) g"
            ))
            .await
            .unwrap();
    }
    let spec = spec(&old, &new, "again");
    let repository = Repository::in_memory().unwrap();
    let (stop, mut stopped) = tokio::sync::oneshot::channel::<()>();
    let writer = old.client("again").await;
    let writing = tokio::spawn(async move {
        let mut n = 0;
        while stopped.try_recv().is_err() {
            n += 1;
            let t = n % 30;
            let sql = format!(
                "BEGIN; UPDATE t{t} SET v = 'w{n}' WHERE id = {}; DELETE FROM t{t} WHERE id = {}; INSERT INTO t{t} VALUES ({}, 'n', 'b');
                 UPDATE parted SET id = id + 10000 WHERE id = {n}; COMMIT",
                n % 4000 + 1,
                (n * 7) % 4000 + 1,
                10_000 + n
            );
            writer.batch_execute(&sql).await.unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(3)).await;
        }
    });
    let parts = "SELECT count(*) FROM understudy.copy_part";
    let mut kept = 0;
    for round in 0..4_i64 {
        let feed = start(&spec, Start::Copy, &repository);
        eventually("copying some tables", async || {
            assert!(!feed.is_streaming(), "the copy was over before it could be killed in round {round}");
            let there: i64 = match follower.query_one("SELECT count(*) FROM pg_class WHERE relname = 'copy_part'", &[]).await {
                Ok(row) if row.get::<_, i64>(0) > 0 => count(&follower, parts).await,
                _ => 0,
            };
            there > kept + 3
        })
        .await;
        drop(feed);
        if round == 1 {
            // Changes of the schema while nobody copies: some fit what is there, some do not.
            owner
                .batch_execute(
                    "ALTER TABLE t0 ADD COLUMN extra integer DEFAULT 7; ALTER TABLE t29 ADD COLUMN extra integer DEFAULT 7;
                     ALTER TABLE t28 ALTER COLUMN id TYPE bigint; CREATE TABLE born (id integer PRIMARY KEY); INSERT INTO born VALUES (1);
                     ALTER TYPE mood ADD VALUE 'c'",
                )
                .await
                .unwrap();
            owner
                .batch_execute("UPDATE t27 SET m = 'c' WHERE id % 10 = 0; TRUNCATE t26; INSERT INTO t26 VALUES (1, 'only', 'c')")
                .await
                .unwrap();
        }
        if round == 2 {
            new.crash();
            follower = new.client("again").await;
        }
        kept = count(&follower, parts).await;
        assert!(kept > 3, "{kept} parts are kept in round {round}");
    }
    let feed = start(&spec, Start::Copy, &repository);
    streaming(&feed).await;
    stop.send(()).unwrap();
    writing.await.unwrap();
    released(&feed, &owner, &repository).await;
    assert_equal(&owner, &follower, "after four interruptions").await;
    assert_eq!(feed.state().findings, 0, "{:?}", feed.state());
    let events = repository.events(0, 1000, false).unwrap();
    assert!(events.iter().any(|event| event.message.contains("the tables that it had completed are kept")), "{events:?}");
    assert!(!events.iter().any(|event| event.message.contains("it starts over")));
    assert_eq!(count(&follower, "SELECT count(*) FROM pg_index WHERE indrelid::regclass::text ~ '^t[0-9]' AND indisvalid").await, 60);
    feed.stop().await;
    cdc::disarm(&spec).await.unwrap();
    assert_eq!(cdc::leftovers(&spec.from).await.unwrap(), Vec::<String>::new());
}

/// Rows that the follower refuses do not stop the copy of the others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_cannot_be_copied_waits_for_a_person() {
    let (old, new) = (Server::start(15, ""), Server::start(18, ""));
    let (owner, follower) = (old.create("refused").await, new.create("refused").await);
    owner
        .batch_execute(
            "CREATE ROLE lonely; CREATE TABLE named (id integer PRIMARY KEY, r regrole); INSERT INTO named VALUES (1, 'lonely'), (2, 'postgres');
             CREATE TABLE plain (id integer PRIMARY KEY); INSERT INTO plain VALUES (1);
             CREATE TABLE doubled (id integer, v text); INSERT INTO doubled VALUES (1, 'a'), (1, 'b')",
        )
        .await
        .unwrap();
    let spec = spec(&old, &new, "refused");
    let repository = Repository::in_memory().unwrap();
    let feed = start(&spec, Start::Copy, &repository);
    streaming(&feed).await;
    assert_eq!(feed.state().held_tables, ["public.named"]);
    owner
        .batch_execute("INSERT INTO plain VALUES (2); INSERT INTO named VALUES (3, 'postgres'); UPDATE named SET id = 4 WHERE id = 1")
        .await
        .unwrap();
    catch_up(&feed, &owner).await;
    assert_eq!(count(&follower, "SELECT count(*) FROM plain").await, 2);
    let proposals = repository.proposals(None).unwrap();
    let waiting = proposals.iter().find(|proposal| proposal.state == ProposalState::Pending).unwrap();
    assert!(waiting.draft.change.contains("public.named could not be copied"), "{}", waiting.draft.change);
    feed.approve(waiting, Some("CREATE ROLE lonely"), "test").await.unwrap();
    eventually("copying it again", async || feed.state().held_tables.is_empty()).await;
    catch_up(&feed, &owner).await;
    assert_equal(&owner, &follower, "after the approval").await;
    feed.stop().await;
    cdc::disarm(&spec).await.unwrap();
}

/// A table that the owner rewrites or empties behind the snapshot looks empty to it: its rows must not be lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_owner_rewrites_during_the_copy_is_not_lost() {
    let (old, new) = (Server::start(15, ""), Server::start(18, ""));
    let (owner, follower) = (old.create("rewritten").await, new.create("rewritten").await);
    let mut ddl =
        "CREATE TABLE big (id integer PRIMARY KEY, v text); INSERT INTO big SELECT g, repeat('x', 1500) FROM generate_series(1, 40000) g;"
            .to_owned();
    for table in 0..6 {
        ddl.push_str(&format!("CREATE TABLE small{table} (id integer PRIMARY KEY, v integer); INSERT INTO small{table} SELECT g, g FROM generate_series(1, 1000) g;"));
    }
    owner.batch_execute(&ddl).await.unwrap();
    let mut spec = spec(&old, &new, "rewritten");
    // One worker: the small ones come behind the big one.
    spec.copy.workers = 1;
    let repository = Repository::in_memory().unwrap();
    let feed = start(&spec, Start::Copy, &repository);
    eventually("copying", async || feed.state().copy.rows > 0).await;
    owner
        .batch_execute(
            "ALTER TABLE small0 ALTER COLUMN v TYPE bigint; TRUNCATE small1; ALTER TABLE small2 ADD COLUMN w float DEFAULT random();
             ALTER TABLE small3 RENAME COLUMN v TO value; UPDATE small4 SET v = v + 1; CLUSTER small5 USING small5_pkey",
        )
        .await
        .unwrap();
    streaming(&feed).await;
    released(&feed, &owner, &repository).await;
    assert_equal(&owner, &follower, "after the rewrites").await;
    assert_eq!(feed.state().findings, 0, "{:?}", feed.state());
    feed.stop().await;
    cdc::disarm(&spec).await.unwrap();
}

/// What a process that was killed and never came back has left is listed and taken away; what a feed uses is not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leftovers_are_listed_and_removed() {
    let (old, new) = (Server::start(15, ""), Server::start(18, ""));
    let (owner, follower) = (old.create("remains").await, new.create("remains").await);
    owner.batch_execute("CREATE TABLE t (id integer PRIMARY KEY); INSERT INTO t VALUES (1)").await.unwrap();
    let spec = spec(&old, &new, "remains");
    let repository = Repository::in_memory().unwrap();
    let feed = start(&spec, Start::Copy, &repository);
    streaming(&feed).await;
    let name = cdc::feed_name(&spec);
    // In use, and then only known to be wanted: neither is touched.
    assert_eq!(cdc::leftovers::remove(&spec.from, "other", &[]).await.unwrap(), vec![]);
    drop(feed);
    assert_eq!(cdc::leftovers::remove(&spec.from, "remains", std::slice::from_ref(&name)).await.unwrap(), vec![]);
    assert_eq!(cdc::leftovers::remove(&spec.to, "remains", std::slice::from_ref(&name)).await.unwrap(), vec![]);
    let feed = start(&spec, Start::Resume, &repository);
    streaming(&feed).await;
    owner.batch_execute("INSERT INTO t VALUES (2)").await.unwrap();
    catch_up(&feed, &owner).await;
    drop(feed);
    eventually("letting go of the slot", async || !cdc::leftovers::list(&spec.from).await.unwrap().iter().any(|leftover| leftover.active))
        .await;
    let removed = cdc::leftovers::remove(&spec.from, "remains", &[]).await.unwrap();
    let kinds: Vec<&str> = removed.iter().map(|leftover| leftover.kind.as_str()).collect();
    assert_eq!(kinds, ["event trigger", "event trigger", "event trigger", "publication", "replication slot", "schema"]);
    cdc::leftovers::remove(&spec.to, "remains", &[]).await.unwrap();
    for url in [&spec.from, &spec.to] {
        assert_eq!(cdc::leftovers::list(url).await.unwrap(), vec![]);
        assert_eq!(cdc::leftovers::remove(url, "remains", &[]).await.unwrap(), vec![]);
    }
    assert_equal(&owner, &follower, "after all of ours is gone").await;
}

/// A database that nobody writes to does not hold back the WAL that others on its server write.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_database_holds_nothing_back() {
    let (old, new) = (Server::start(15, ""), Server::start(18, ""));
    let (owner, busy) = (old.create("idle").await, old.create("busy").await);
    new.create("idle").await;
    owner.batch_execute("CREATE TABLE t (id integer PRIMARY KEY)").await.unwrap();
    let spec = spec(&old, &new, "idle");
    let repository = Repository::in_memory().unwrap();
    let feed = start(&spec, Start::Copy, &repository);
    streaming(&feed).await;
    busy.batch_execute("CREATE TABLE b AS SELECT g, repeat('x', 100) FROM generate_series(1, 50000) g").await.unwrap();
    let target = play::position(&busy).await;
    eventually("moving the slot of an idle database", async || {
        let sql = "SELECT count(*) FROM pg_replication_slots WHERE confirmed_flush_lsn >= $1::text::pg_lsn";
        owner.query_one(sql, &[&target.to_string()]).await.unwrap().get::<_, i64>(0) == 1
    })
    .await;
    feed.stop().await;
    cdc::disarm(&spec).await.unwrap();
}

/// 13 has no logical messages: what they say is rows there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thirteen_owns_and_follows() {
    let (thirteen, eighteen) = (Server::start(13, ""), Server::start(18, ""));
    let repository = Repository::in_memory().unwrap();
    for (from, to, database) in [(&thirteen, &eighteen, "older"), (&eighteen, &thirteen, "newer")] {
        let (owner, follower) = (from.create(database).await, to.create(database).await);
        owner
            .batch_execute(
                "CREATE TABLE t (id integer PRIMARY KEY, v text, n numeric, a integer[], j jsonb, d date);
                 INSERT INTO t SELECT g, md5(g::text), g / 7.0, ARRAY[g, NULL], jsonb_build_object('g', g), '2020-01-01' FROM generate_series(1, 3000) g;
                 CREATE TABLE p (id integer, at integer, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
                 CREATE TABLE p_1 PARTITION OF p FOR VALUES FROM (0) TO (10); CREATE TABLE p_2 PARTITION OF p FOR VALUES FROM (10) TO (20);
                 INSERT INTO p SELECT g, g % 20 FROM generate_series(1, 100) g; CREATE TABLE keyless (a integer)",
            )
            .await
            .unwrap();
        let spec = spec(from, to, database);
        let mut feed = start(&spec, Start::Copy, &repository);
        streaming(&feed).await;
        for round in 0..3 {
            owner
                .batch_execute(&format!(
                    "BEGIN; INSERT INTO t (id) VALUES (-{round}); ALTER TABLE t ADD COLUMN w{round} timestamptz DEFAULT now();
                     INSERT INTO t (id, w{round}) VALUES (100000 + {round}, '2020-01-01'); COMMIT;
                     UPDATE t SET v = v || 'x' WHERE id % 3 = 0; DELETE FROM t WHERE id % 5 = {round};
                     ALTER TABLE t ADD COLUMN r{round} double precision DEFAULT random(); UPDATE p SET at = 15 WHERE at = {round};
                     CREATE TABLE born{round} (id integer PRIMARY KEY); INSERT INTO born{round} VALUES (1); INSERT INTO keyless VALUES ({round})"
                ))
                .await
                .unwrap();
            if round == 1 {
                drop(feed);
                feed = start(&spec, Start::Copy, &repository);
            }
        }
        let marker = cdc::emit_marker(&owner, "here").await.unwrap();
        assert!(feed.wait_marker("here", play::PATIENCE).await.unwrap() <= marker);
        released(&feed, &owner, &repository).await;
        assert_equal(&owner, &follower, database).await;
        assert_eq!(feed.state().findings, 0, "{:?}", feed.state());
        feed.stop().await;
        cdc::disarm(&spec).await.unwrap();
        assert_eq!(cdc::leftovers(&spec.from).await.unwrap(), Vec::<String>::new());
    }
}
