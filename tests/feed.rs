//! The CDC Agent on real servers.

#[path = "support/feed_servers.rs"]
mod servers;

use arc_swap::ArcSwap;
use futures_util::TryStreamExt;
use servers::Server;
use std::{
    collections::BTreeMap,
    process::{Child, Command, Stdio},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};
use tokio_postgres::Client;
use understudy::{
    cdc::{self, CdcError, Direction, Fault, Feed, FeedSpec, Start},
    lsn::Lsn,
    metadata::{ProposalState, Repository, Severity},
    schema::Adapter,
};

const PATIENCE: Duration = Duration::from_secs(40);

fn spec(from: &Server, to: &Server, database: &str, direction: Direction) -> FeedSpec {
    FeedSpec {
        database: database.into(),
        shadow: "copy".into(),
        direction,
        from: from.url(database),
        to: to.url(database),
        rules: Default::default(),
        copy: understudy::config::CopyConfig::default(),
    }
}

fn start(spec: &FeedSpec, start: Start, repository: &Repository, fault: &Fault) -> Feed {
    let adapter = Adapter::new(spec.database.clone(), spec.shadow.clone(), repository.clone(), Arc::new(ArcSwap::from_pointee(0.95)));
    Feed::start(spec.clone(), start, Arc::new(adapter), repository.clone(), fault.clone())
}

async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < deadline, "{what} did not happen");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn streaming(feed: &Feed) {
    eventually("streaming", async || {
        let state = feed.state().state;
        assert!(!state.starts_with("failed"), "{state}");

        feed.is_streaming()
    })
    .await;
}

async fn position(client: &Client) -> Lsn {
    client.query_one("SELECT pg_current_wal_insert_lsn()::text", &[]).await.unwrap().get::<_, &str>(0).parse().unwrap()
}

async fn catch_up(feed: &Feed, owner: &Client) {
    let lsn = position(owner).await;
    feed.wait_applied(lsn, PATIENCE).await.unwrap_or_else(|error| panic!("{error}; {:?}", feed.state()));
}

/// Every row of every user table, ordered, as COPY text.
async fn contents(client: &Client) -> BTreeMap<String, String> {
    client.batch_execute("SET timezone = 'UTC'; SET extra_float_digits = 3; SET intervalstyle = 'postgres'").await.unwrap();
    let tables = client
        .query(
            "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
             WHERE c.relkind IN ('r', 'm') AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'understudy')",
            &[],
        )
        .await
        .unwrap();
    let mut all = BTreeMap::new();
    for row in &tables {
        let table: String = row.get(0);
        let stream = client.copy_out(&format!("COPY (SELECT * FROM {table} t ORDER BY t::text COLLATE \"C\") TO STDOUT")).await.unwrap();
        let chunks: Vec<bytes::Bytes> = stream.try_collect().await.unwrap();
        all.insert(table, String::from_utf8(chunks.concat()).unwrap());
    }
    all
}

async fn assert_equal(owner: &Client, follower: &Client) {
    let (left, right) = (contents(owner).await, contents(follower).await);
    assert_eq!(left.keys().collect::<Vec<_>>(), right.keys().collect::<Vec<_>>());
    for (table, rows) in &left {
        assert!(rows == &right[table], "{table} differs: {} against {} bytes", rows.len(), right[table].len());
    }
}

fn pgbench(server: &Server, database: &str, arguments: &[&str]) -> Child {
    Command::new("/usr/lib/postgresql/15/bin/pgbench")
        .args(["-h", "127.0.0.1", "-U", "postgres", "-p", &server.port.to_string()])
        .args(arguments)
        .arg(database)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

const RICH: &str = r#"
CREATE ROLE app LOGIN PASSWORD 'secret';
CREATE SCHEMA "größe";
CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy ☺');
CREATE TYPE pair AS (x numeric, y text);
CREATE DOMAIN positive AS integer CHECK (value > 0);
CREATE TABLE "größe"."tablé ""x""" (
    "schlüssel" bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, "näme" text, n numeric, f8 double precision, f4 real, j jsonb, js json,
    ts timestamptz, i interval, u uuid, a integer[], ta text[][], m mood, ma mood[], p pair, b bytea, d positive, c char(5), r int4range,
    x xml, pt point, ip inet, bits bit varying, money money, twice bigint GENERATED ALWAYS AS (schlüssel * 2) STORED, flag boolean, dt date);
ALTER TABLE "größe"."tablé ""x""" OWNER TO app;
CREATE TABLE keyless (a integer, b text, n numeric, j json, pt point);
CREATE TABLE parted (id integer, at date, v text, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM ('2020-01-01') TO ('2021-01-01');
CREATE TABLE parted_2 PARTITION OF parted FOR VALUES FROM ('2021-01-01') TO ('2022-01-01');
CREATE TABLE parted_keyless (id integer, v text) PARTITION BY LIST (id);
CREATE TABLE parted_keyless_1 PARTITION OF parted_keyless DEFAULT;
CREATE TABLE parent (id serial PRIMARY KEY, v text UNIQUE);
CREATE TABLE child (id integer GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, parent integer REFERENCES parent, big text, small integer);
CREATE TABLE two_keys (a integer, b text, v integer, PRIMARY KEY (a, b));
CREATE TABLE by_index (code text NOT NULL, v integer);
CREATE UNIQUE INDEX by_index_code ON by_index (code);
ALTER TABLE by_index REPLICA IDENTITY USING INDEX by_index_code;
CREATE TABLE only_key (id integer PRIMARY KEY);
CREATE TABLE deferred (id integer PRIMARY KEY DEFERRABLE);
CREATE TABLE trunc_a (id integer PRIMARY KEY);
CREATE TABLE trunc_b (id integer PRIMARY KEY REFERENCES trunc_a);
CREATE UNLOGGED TABLE scratch (id integer);
CREATE SEQUENCE lonely START 500 INCREMENT 7;
CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.v := NEW.v || '!'; RETURN NEW; END $$;
CREATE TRIGGER stamp BEFORE INSERT ON parent FOR EACH ROW EXECUTE FUNCTION stamp();
CREATE VIEW happy AS SELECT * FROM parent;
CREATE MATERIALIZED VIEW counted AS SELECT count(*) FROM parent;
"#;

/// Rows of every kind; `round` makes them differ.
fn rows(round: u32) -> String {
    format!(
        r#"
INSERT INTO "größe"."tablé ""x""" ("näme", n, f8, f4, j, js, ts, i, u, a, ta, m, ma, p, b, d, c, r, x, pt, ip, bits, money, flag, dt)
  VALUES ('Zoë ☃ \ " '' tab	nl
', 1.50, 0.1, 'NaN', '{{"a": 1.0, "b": [null, "ü"]}}', '{{"a" : 1,"a":2}}', '2024-02-29 12:34:56.789012+02', '1 mon -3 days 04:05:06.7',
    'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11', '{{1,NULL,-3}}', '{{{{a,"b c"}},{{"d,\"e",NULL}}}}', 'happy ☺', '{{sad,NULL}}', '(1.0,"a,""b")', '\x00ff27', 7, 'ab',
    '[1,5)', '<a>ü</a>', '(1.5,2)', '10.0.0.0/8', B'10101', 12.34, true, 'infinity'),
   (NULL, 'NaN', '-Infinity', 1e-10, 'null', NULL, '-infinity', NULL, NULL, '{{}}', NULL, NULL, NULL, ROW(NULL, ''), '', NULL, '', 'empty', NULL, NULL, NULL, B'', NULL, NULL, '0044-03-15 BC');
INSERT INTO keyless VALUES (1, 'a', 1.0, '{{"x":1}}', '(1,2)'), (1, 'a', 1.00, '{{"x":1}}', '(1,2)'), (1, 'a', 1.00, '{{"x":1}}', '(1,2)'), (NULL, NULL, NULL, NULL, NULL), ({round}, 'r', {round}, NULL, NULL);
INSERT INTO parted VALUES ({round}, '2020-05-05', 'first'), ({round}, '2021-05-05', 'second');
INSERT INTO parted_keyless VALUES ({round}, 'x'), ({round}, 'x');
INSERT INTO parent (v) VALUES ('p{round}');
INSERT INTO child (parent, big, small) SELECT id, (SELECT string_agg(md5(g::text || {round}), '') FROM generate_series(1, 1000) g), {round} FROM parent;
INSERT INTO two_keys VALUES ({round}, 'ключ', 1);
INSERT INTO by_index VALUES ('c{round}', 1);
INSERT INTO only_key VALUES ({round});
INSERT INTO deferred VALUES ({round} * 2), ({round} * 2 + 1);
INSERT INTO trunc_a VALUES ({round}) ON CONFLICT DO NOTHING;
INSERT INTO trunc_b VALUES ({round}) ON CONFLICT DO NOTHING;
SELECT nextval('lonely');
"#
    )
}

/// Changes of every kind to what `rows` made.
fn changes(round: u32) -> String {
    format!(
        r#"
BEGIN;
UPDATE "größe"."tablé ""x""" SET "näme" = coalesce("näme", '') || 'ß', j = NULL WHERE m IS NOT NULL;
UPDATE child SET small = small + 1;
UPDATE child SET id = -id WHERE id % 2 = 0;
UPDATE keyless SET b = 'changed' WHERE ctid = (SELECT ctid FROM keyless WHERE n::text = '1.00' LIMIT 1);
DELETE FROM keyless WHERE ctid = (SELECT ctid FROM keyless WHERE n::text = '1.0' LIMIT 1);
DELETE FROM keyless WHERE ctid = (SELECT ctid FROM keyless WHERE a IS NULL LIMIT 1);
UPDATE parted SET at = '2021-06-06' WHERE id = {round} AND at = '2020-05-05';
UPDATE parted_keyless SET v = 'y' WHERE ctid = (SELECT ctid FROM parted_keyless WHERE id = {round} LIMIT 1);
UPDATE two_keys SET b = b || '!', v = 2 WHERE a = {round};
UPDATE by_index SET code = code || 'x' WHERE code = 'c{round}';
UPDATE deferred SET id = id + 1 WHERE id < 1000; UPDATE deferred SET id = id + 1000 * {round} WHERE id < 1000;
DELETE FROM only_key WHERE id = {round} - 1;
SAVEPOINT s;
INSERT INTO only_key VALUES (999);
ROLLBACK TO s;
COMMIT;
BEGIN; INSERT INTO only_key VALUES (998); ROLLBACK;
TRUNCATE trunc_a CASCADE;
INSERT INTO trunc_a VALUES ({round} + 100);
"#
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_kind_of_row_arrives_and_nothing_is_left_behind() {
    every_kind_of_row(15, 18).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_kind_of_row_arrives_on_an_older_server() {
    every_kind_of_row(18, 14).await;
}

async fn every_kind_of_row(from: u32, to: u32) {
    let (old, new) = (Server::start(from, ""), Server::start(to, ""));
    let (owner, follower) = (old.create("rich").await, new.create("rich").await);
    owner.batch_execute(RICH).await.unwrap();
    owner.batch_execute(&rows(1)).await.unwrap();
    owner.batch_execute(&rows(2)).await.unwrap();
    owner.batch_execute("REFRESH MATERIALIZED VIEW counted").await.unwrap();
    let spec = spec(&old, &new, "rich", Direction::Forward);
    let repository = Repository::in_memory().unwrap();
    let feed = start(&spec, Start::Copy, &repository, &Fault::default());
    streaming(&feed).await;
    assert_equal(&owner, &follower).await;
    let copy = feed.state().copy;
    assert!(copy.done && copy.tables_done == copy.tables && copy.rows > 20, "{copy:?}");

    let before = position(&owner).await;
    for round in 3..6 {
        owner.batch_execute(&rows(round)).await.unwrap();
        owner.batch_execute(&changes(round)).await.unwrap();
    }
    catch_up(&feed, &owner).await;
    assert_equal(&owner, &follower).await;
    // What waited while nobody looked comes folded: many rows of every type at once.
    feed.stop().await;
    for round in 6..9 {
        owner.batch_execute(&rows(round)).await.unwrap();
        owner.batch_execute(&changes(round)).await.unwrap();
    }
    let columns = "\"näme\", n, f8, f4, j, js, ts, i, u, a, ta, m, ma, p, b, d, c, r, x, pt, ip, bits, money, flag, dt";
    let table = "\"größe\".\"tablé \"\"x\"\"\"";
    let many = format!("INSERT INTO {table} ({columns}) SELECT {columns} FROM {table}, generate_series(1, 5); UPDATE {table} SET f8 = f8");
    owner.batch_execute(&many).await.unwrap();
    let feed = start(&spec, Start::Resume, &repository, &Fault::default());
    catch_up(&feed, &owner).await;
    assert_equal(&owner, &follower).await;
    owner.batch_execute(&format!("UPDATE {table} SET d = 8; UPDATE parted SET v = v || 'x'")).await.unwrap();
    catch_up(&feed, &owner).await;
    assert_equal(&owner, &follower).await;
    streaming(&feed).await;
    owner.batch_execute("UPDATE child SET small = 0").await.unwrap();
    catch_up(&feed, &owner).await;
    assert!(feed.table_changed_since("public", "child", before));
    assert!(!feed.table_changed_since("public", "child", position(&owner).await));
    let state = feed.state();
    assert_eq!((state.findings, state.held_tables.len(), state.state.as_str()), (0, 0, "streaming"), "{state:?}");
    assert!(state.changes > 50 && feed.lag() < Duration::from_secs(5));

    // A role that owns something came along with its password.
    let role = "SELECT rolpassword LIKE 'SCRAM%' FROM pg_authid WHERE rolname = 'app'";
    assert!(follower.query_one(role, &[]).await.unwrap().get::<_, bool>(0));

    // Sequences are kept ahead, and set exactly on demand.
    let value = async |client: &Client| {
        let row = client.query_one("SELECT last_value FROM lonely", &[]).await.unwrap();
        row.get::<_, i64>(0)
    };
    let source = value(&owner).await;
    assert!(value(&follower).await > source);
    assert!(cdc::sync_sequences_exact(&owner, &follower, &spec).await.unwrap() >= 3);
    assert_eq!(value(&follower).await, source);

    feed.stop().await;
    assert_eq!(feed.state().state, "stopped");
    assert!(!cdc::leftovers(&spec.from).await.unwrap().is_empty());
    cdc::disarm(&spec).await.unwrap();
    cdc::disarm(&spec).await.unwrap();
    assert_eq!(cdc::leftovers(&spec.from).await.unwrap(), Vec::<String>::new());
    for client in [&owner, &follower] {
        let left = "SELECT count(*) FROM pg_namespace WHERE nspname = 'understudy'";
        assert_eq!(client.query_one(left, &[]).await.unwrap().get::<_, i64>(0), 0);
    }
    assert_equal(&owner, &follower).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kills_under_load_lose_and_repeat_nothing() {
    let (old, new) = (Server::start(15, ""), Server::start(18, ""));
    let (owner, follower) = (old.create("bench").await, new.create("bench").await);
    assert!(pgbench(&old, "bench", &["-i", "-s", "2", "-q"]).wait().unwrap().success());
    let spec = spec(&old, &new, "bench", Direction::Forward);
    let repository = Repository::in_memory().unwrap();
    let mut load = pgbench(&old, "bench", &["-c", "4", "-T", "14", "-R", "600"]);
    // A copy that is interrupted is taken back and starts over.
    let feed = start(&spec, Start::Copy, &repository, &Fault::default());
    eventually("copying", async || feed.state().copy.rows > 0).await;
    drop(feed);
    let mut feed = start(&spec, Start::Copy, &repository, &Fault::default());
    streaming(&feed).await;
    for round in 0..8 {
        tokio::time::sleep(Duration::from_millis(300 + 70 * round)).await;
        match round % 4 {
            0 => {
                // The agent dies.
                drop(feed);
                feed = start(&spec, Start::Resume, &repository, &Fault::default());
            }
            1 => {
                // The follower's backend dies of kill -9: the whole server restarts.
                let row = new
                    .client("postgres")
                    .await
                    .query_one("SELECT pid FROM pg_stat_activity WHERE application_name = 'understudy applier'", &[])
                    .await;
                if let Ok(row) = row {
                    Command::new("kill").args(["-9", &row.get::<_, i32>(0).to_string()]).status().unwrap();
                }
            }
            2 => {
                let kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'walsender'";
                let _ = owner.batch_execute(kill).await;
            }
            _ => new.crash(),
        }
        streaming(&feed).await;
    }
    assert!(load.wait().unwrap().success());
    catch_up(&feed, &owner).await;
    drop(follower);
    let follower = new.client("bench").await;
    assert_equal(&owner, &follower).await;
    let state = feed.state();
    assert_eq!((state.findings, state.held_tables.len()), (0, 0), "{state:?}");
    let count = "SELECT count(*) FROM pgbench_history";
    assert!(follower.query_one(count, &[]).await.unwrap().get::<_, i64>(0) > 1000);
    feed.stop().await;
}

/// The owner may forget only what the follower has on disk: what an applier stored without waiting for the disk is lost in a crash.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_of_the_follower_right_after_a_restart_loses_nothing() {
    let (old, new) = (Server::start(15, ""), Server::start(18, "wal_writer_delay = 10s\nbgwriter_delay = 10s"));
    let (owner, follower) = (old.create("disk").await, new.create("disk").await);
    owner.batch_execute("CREATE TABLE t (id integer PRIMARY KEY, v text)").await.unwrap();
    let spec = spec(&old, &new, "disk", Direction::Forward);
    let repository = Repository::in_memory().unwrap();
    let mut feed = start(&spec, Start::Copy, &repository, &Fault::default());
    streaming(&feed).await;
    drop(follower);
    for round in 0..3 {
        let rows = format!("INSERT INTO t SELECT g, 'v' FROM generate_series({round} * 100 + 1, {round} * 100 + 100) g");
        owner.batch_execute(&rows).await.unwrap();
        let end = position(&owner).await;
        feed.wait_applied(end, PATIENCE).await.unwrap();
        drop(feed);
        feed = start(&spec, Start::Resume, &repository, &Fault::default());
        streaming(&feed).await;
        // The first status message has told the owner what it may forget.
        tokio::time::sleep(Duration::from_millis(100)).await;
        new.crash();
        eventually("noticing the crash", async || !feed.is_streaming()).await;
        streaming(&feed).await;
    }
    catch_up(&feed, &owner).await;
    assert_equal(&owner, &new.client("disk").await).await;
    feed.stop().await;
    cdc::disarm(&spec).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn holds_are_exact_and_faults_are_seen() {
    let (old, new) = (Server::start(15, ""), Server::start(18, ""));
    let (owner, follower) = (old.create("hold").await, new.create("hold").await);
    owner.batch_execute("CREATE TABLE t (id integer PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'a'), (2, 'b')").await.unwrap();
    let spec = spec(&old, &new, "hold", Direction::Forward);
    let repository = Repository::in_memory().unwrap();
    let fault = Fault::default();
    let feed = start(&spec, Start::Copy, &repository, &fault);
    streaming(&feed).await;

    // A writer that never stops; the hold stands between two of its commits.
    let (stop, mut stopped) = tokio::sync::oneshot::channel::<()>();
    let writer = old.client("hold").await;
    let writing = tokio::spawn(async move {
        let mut id = 1000;
        while stopped.try_recv().is_err() {
            writer.execute("INSERT INTO t VALUES ($1, 'w')", &[&id]).await.unwrap();
            id += 1;
        }
    });
    let reader = old.client("hold").await;
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let (guard, upper) = loop {
            // The count lies between what is committed at the two positions.
            let first = position(&reader).await;
            match feed.hold_at(first, PATIENCE).await {
                Ok(guard) => break (guard, first),
                Err(CdcError::Beyond { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        };
        let count = async || follower.query_one("SELECT count(*) FROM t", &[]).await.unwrap().get::<_, i64>(0);
        let held = count().await;
        let stored =
            follower.query_one("SELECT end_lsn <= $1::text::pg_lsn FROM understudy.progress", &[&upper.to_string()]).await.unwrap();
        assert!(stored.get::<_, bool>(0));
        tokio::time::sleep(Duration::from_millis(150)).await;
        assert_eq!(count().await, held, "rows arrived behind the hold");
        assert_eq!(feed.applied(), upper);
        assert_eq!(feed.state().state, "held");
        drop(guard);
        eventually("going on", async || count().await > held).await;
    }
    stop.send(()).unwrap();
    writing.await.unwrap();
    catch_up(&feed, &owner).await;
    assert_equal(&owner, &follower).await;
    let now = position(&owner).await;
    assert!(matches!(feed.hold_at(Lsn(1), PATIENCE).await, Err(CdcError::Beyond { .. })));

    // A marker is seen exactly once its transaction is applied.
    let lsn = cdc::emit_marker(&owner, "here").await.unwrap();
    let end = feed.wait_marker("here", PATIENCE).await.unwrap();
    assert!(end > now && end <= lsn);
    assert!(matches!(feed.wait_marker("never", Duration::from_millis(100)).await, Err(CdcError::Timeout { .. })));

    // Rows changed behind the feed's back are findings, and put right.
    follower.batch_execute("DELETE FROM t WHERE id = 1; DELETE FROM t WHERE id = 2; INSERT INTO t VALUES (3, 'x')").await.unwrap();
    owner.batch_execute("UPDATE t SET v = 'A' WHERE id = 1").await.unwrap();
    owner.batch_execute("DELETE FROM t WHERE id = 2").await.unwrap();
    owner.batch_execute("INSERT INTO t VALUES (3, 'c')").await.unwrap();
    catch_up(&feed, &owner).await;
    assert_equal(&owner, &follower).await;
    assert_eq!(feed.state().findings, 3);
    assert!(feed.state().finding_examples[0].contains("public.t (id=1)"), "{:?}", feed.state().finding_examples);

    // A change that is lost makes them differ.
    fault.lose_change.store(true, Ordering::Release);
    owner.batch_execute("INSERT INTO t VALUES (4, 'lost')").await.unwrap();
    catch_up(&feed, &owner).await;
    assert!(!fault.lose_change.load(Ordering::Acquire));
    assert_ne!(contents(&owner).await, contents(&follower).await);
    feed.stop().await;
    cdc::disarm(&spec).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_does_not_fit_is_set_aside_and_comes_back() {
    let (old, new) = (Server::start(15, ""), Server::start(18, ""));
    let (owner, follower) = (old.create("aside").await, new.create("aside").await);
    owner
        .batch_execute(
            "CREATE TABLE a (id integer PRIMARY KEY, v text); CREATE TABLE b (id integer PRIMARY KEY); INSERT INTO a VALUES (1, 'x')",
        )
        .await
        .unwrap();
    let spec = spec(&old, &new, "aside", Direction::Forward);
    let repository = Repository::in_memory().unwrap();
    let feed = start(&spec, Start::Copy, &repository, &Fault::default());
    streaming(&feed).await;
    follower.batch_execute("ALTER TABLE a DROP COLUMN v").await.unwrap();
    owner.batch_execute("INSERT INTO a VALUES (2, 'y'); INSERT INTO b VALUES (1)").await.unwrap();
    owner
        .batch_execute(
            "BEGIN; UPDATE a SET v = 'z' WHERE id = 2; INSERT INTO b VALUES (2); TRUNCATE a; INSERT INTO a VALUES (5, 'w'); COMMIT",
        )
        .await
        .unwrap();
    catch_up(&feed, &owner).await;
    assert_eq!(feed.state().held_tables, ["public.a"]);
    assert_eq!(follower.query_one("SELECT count(*) FROM b", &[]).await.unwrap().get::<_, i64>(0), 2);
    assert!(repository.events(0, 100, true).unwrap().iter().any(|event| event.severity == Severity::Alert));
    // Nothing of it is lost in a restart.
    feed.stop().await;
    let feed = start(&spec, Start::Resume, &repository, &Fault::default());
    streaming(&feed).await;
    owner.batch_execute("INSERT INTO a VALUES (6, 'after')").await.unwrap();
    catch_up(&feed, &owner).await;
    assert_eq!(feed.state().held_tables, ["public.a"]);
    let waiting: Vec<_> = repository.proposals(Some("aside")).unwrap().into_iter().filter(|p| p.state == ProposalState::Pending).collect();
    assert_eq!(waiting.len(), 1);
    assert!(feed.approve(&waiting[0], Some("ALTER TABLE a ADD COLUM v text"), "test").await.is_err());
    assert!(feed.approve(&waiting[0], None, "test").await.is_err());
    assert_eq!(feed.state().held_tables, ["public.a"]);
    feed.approve(&waiting[0], Some("ALTER TABLE a ADD COLUMN v text"), "test").await.unwrap();
    assert_eq!(feed.state().held_tables, Vec::<String>::new());
    owner.batch_execute("INSERT INTO a VALUES (7, 'live')").await.unwrap();
    catch_up(&feed, &owner).await;
    assert_equal(&owner, &follower).await;
    assert_eq!(repository.proposal(waiting[0].id).unwrap().state, ProposalState::Approved);
    assert_eq!(feed.state().findings, 0);
    feed.stop().await;
}

/// A decision is recorded elsewhere: the follower must not forget its half of it in a crash.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rejection_survives_a_crash_of_the_follower() {
    let (old, new) = (Server::start(15, ""), Server::start(18, "wal_writer_delay = 10s\nbgwriter_delay = 10s"));
    let (owner, follower) = (old.create("rejected").await, new.create("rejected").await);
    owner.batch_execute("CREATE TABLE a (id integer PRIMARY KEY, v text)").await.unwrap();
    let spec = spec(&old, &new, "rejected", Direction::Forward);
    let repository = Repository::in_memory().unwrap();
    let feed = start(&spec, Start::Copy, &repository, &Fault::default());
    streaming(&feed).await;
    follower.batch_execute("ALTER TABLE a DROP COLUMN v").await.unwrap();
    drop(follower);
    owner.batch_execute("INSERT INTO a VALUES (1, 'x')").await.unwrap();
    eventually("setting the table aside", async || feed.state().held_tables == ["public.a"]).await;
    let waiting = repository.proposals(None).unwrap().into_iter().find(|proposal| proposal.state == ProposalState::Pending).unwrap();
    feed.reject(&waiting, "test").await.unwrap();
    new.crash();
    let states = new.client("rejected").await.query("SELECT state FROM understudy.held_table", &[]).await.unwrap();
    assert_eq!(states.iter().map(|row| row.get(0)).collect::<Vec<String>>(), ["rejected"]);
    assert_eq!(repository.proposal(waiting.id).unwrap().state, ProposalState::Rejected);
    feed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_way_back_starts_at_its_marker() {
    // 16 and 14: no pg_dump of 16 is needed, the follower equals the owner already.
    let (source, shadow) = (Server::start(14, ""), Server::start(16, ""));
    let (old, new) = (source.create("back").await, shadow.create("back").await);
    for client in [&old, &new] {
        client
            .batch_execute("CREATE TABLE t (id serial PRIMARY KEY, v text); CREATE TABLE k (v text); INSERT INTO t (v) VALUES ('same')")
            .await
            .unwrap();
    }
    let back = spec(&shadow, &source, "back", Direction::Reverse);
    let repository = Repository::in_memory().unwrap();
    cdc::arm(&back).await.unwrap();
    cdc::arm(&back).await.unwrap();
    // What the forward feed had brought lies before the marker and must not come back.
    new.batch_execute("INSERT INTO t (v) VALUES ('forward')").await.unwrap();
    old.batch_execute("INSERT INTO t (v) VALUES ('forward')").await.unwrap();
    cdc::emit_marker(&new, "switch").await.unwrap();
    new.batch_execute("INSERT INTO t (v) VALUES ('after'); INSERT INTO k VALUES ('x'), ('x')").await.unwrap();
    old.batch_execute("ALTER DATABASE back SET default_transaction_read_only = on").await.unwrap();
    let feed = start(&back, Start::AfterMarker("switch".into()), &repository, &Fault::default());
    streaming(&feed).await;
    feed.wait_marker("switch", PATIENCE).await.unwrap();
    new.batch_execute("DELETE FROM k WHERE ctid = (SELECT ctid FROM k LIMIT 1); UPDATE t SET v = v || '!'").await.unwrap();
    catch_up(&feed, &new).await;
    assert_equal(&new, &old).await;
    assert_eq!(feed.state().findings, 0);
    // A restart with the same words goes on.
    drop(feed);
    let feed = start(&back, Start::AfterMarker("switch".into()), &repository, &Fault::default());
    streaming(&feed).await;
    new.batch_execute("INSERT INTO t (v) VALUES ('again')").await.unwrap();
    catch_up(&feed, &new).await;
    assert_equal(&new, &old).await;
    assert_eq!(feed.state().findings, 0);
    feed.stop().await;
    cdc::disarm(&back).await.unwrap();
    assert_eq!(cdc::leftovers(&back.from).await.unwrap(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_work_says_what_to_do() {
    let (plain, newer) = (Server::start(15, "wal_level = replica"), Server::start(16, ""));
    let (a, b) = (plain.create("no").await, newer.create("no").await);
    let failed = async |spec: &FeedSpec, begin: Start| {
        let repository = Repository::in_memory().unwrap();
        let feed = start(spec, begin, &repository, &Fault::default());
        eventually("failing", async || {
            assert!(!feed.is_streaming(), "{:?} {:?}", feed.state(), repository.events(0, 100, false));
            feed.state().state.starts_with("failed")
        })
        .await;
        assert!(repository.events(0, 10, true).unwrap().iter().any(|event| event.message.contains("a person is needed")));
        assert!(matches!(feed.wait_applied(Lsn(1), PATIENCE).await, Err(CdcError::Stopped(_))));
        let state = feed.state().state;
        feed.stop().await;
        state
    };
    let from_plain = spec(&plain, &newer, "no", Direction::Forward);
    let state = failed(&from_plain, Start::Copy).await;
    assert!(state.contains("ALTER SYSTEM SET wal_level = logical"), "{state}");
    let from_newer = spec(&newer, &plain, "no", Direction::Forward);
    let state = failed(&from_newer, Start::Resume).await;
    assert!(state.contains("Start the feed with a copy"), "{state}");
    drop(plain);
    let (old, new) = (Server::start(15, ""), newer);
    let owner = old.create("no").await;
    for client in [&owner, &b] {
        client.batch_execute("CREATE TABLE t (id integer)").await.unwrap();
    }
    b.batch_execute("INSERT INTO t VALUES (1)").await.unwrap();
    let conflicting = spec(&old, &new, "no", Direction::Forward);
    let state = failed(&conflicting, Start::Copy).await;
    assert!(state.contains("already has 1 of the owner's tables"), "{state}");
    assert_eq!(b.query_one("SELECT count(*) FROM t", &[]).await.unwrap().get::<_, i64>(0), 1);
    assert_eq!(cdc::leftovers(&conflicting.from).await.unwrap(), Vec::<String>::new());
    drop(a);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn schema_changes_travel_in_the_stream() {
    let (old, new) = (Server::start(15, ""), Server::start(18, ""));
    let (owner, follower) = (old.create("ddl").await, new.create("ddl").await);
    owner
        .batch_execute(
            "CREATE TABLE o (id serial PRIMARY KEY, v text, n integer, gone text);
             INSERT INTO o (v, n) SELECT 'r' || g, g FROM generate_series(1, 500) g; CREATE TYPE mood AS ENUM ('a')",
        )
        .await
        .unwrap();
    let spec = spec(&old, &new, "ddl", Direction::Forward);
    let repository = Repository::in_memory().unwrap();
    let feed = start(&spec, Start::Copy, &repository, &Fault::default());
    streaming(&feed).await;
    let (stop, mut stopped) = tokio::sync::oneshot::channel::<()>();
    let writer = old.client("ddl").await;
    let writing = tokio::spawn(async move {
        let mut n = 0;
        while stopped.try_recv().is_err() {
            n += 1;
            // As much as an application, not as much as the machine can.
            tokio::time::sleep(Duration::from_millis(2)).await;
            writer.batch_execute(&format!("INSERT INTO o (v) VALUES ('w'); UPDATE o SET v = v || '.' WHERE id = {n}")).await.unwrap();
        }
    });
    for ddl in [
        "ALTER TABLE o ADD COLUMN note text DEFAULT 'x'",
        "ALTER TABLE o ADD COLUMN at timestamptz DEFAULT now()",
        "ALTER TABLE o ALTER COLUMN n TYPE bigint",
        "CREATE INDEX o_v ON o (v)",
        "BEGIN; INSERT INTO o (v) VALUES ('before'); ALTER TABLE o ADD COLUMN late integer; INSERT INTO o (v, late) VALUES ('after', 1); COMMIT",
        "ALTER TYPE mood ADD VALUE 'b'",
        "CREATE TABLE born (id integer PRIMARY KEY, v text); INSERT INTO born VALUES (1, 'x')",
        "CREATE TABLE keyless_born (v text)",
        "INSERT INTO keyless_born VALUES ('1'), ('2')",
        "UPDATE keyless_born SET v = '3' WHERE v = '1'",
        "ALTER TABLE o ADD COLUMN dice double precision DEFAULT random()",
    ] {
        owner.batch_execute(ddl).await.unwrap_or_else(|error| panic!("{ddl}: {error:?}"));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let settle = async |what: &str| {
        eventually(what, async || {
            catch_up(&feed, &owner).await;
            let pending: Vec<_> =
                repository.proposals(None).unwrap().into_iter().filter(|proposal| proposal.state == ProposalState::Pending).collect();
            for proposal in &pending {
                let _ = feed.approve(proposal, None, "test").await;
            }
            pending.is_empty() && feed.state().held_tables.is_empty()
        })
        .await;
    };
    settle("adapting under load").await;
    stop.send(()).unwrap();
    writing.await.unwrap();
    settle("adapting").await;
    for proposal in repository.proposals(None).unwrap() {
        assert_ne!(proposal.draft.kind, "held_table", "{}", proposal.draft.change);
    }
    assert_equal(&owner, &follower).await;
    assert_eq!(feed.state().findings, 0, "{:?}", feed.state());
    // Dropping a column loses data: it waits for a person, and nothing stands still meanwhile.
    owner.batch_execute("ALTER TABLE o DROP COLUMN gone; INSERT INTO o (v) VALUES ('without')").await.unwrap();
    catch_up(&feed, &owner).await;
    settle("dropping").await;
    assert_equal(&owner, &follower).await;
    feed.stop().await;
    cdc::disarm(&spec).await.unwrap();
    assert_eq!(cdc::leftovers(&spec.from).await.unwrap(), Vec::<String>::new());
}
