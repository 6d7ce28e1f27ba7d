//! Comparison and repair on real servers of two majors, and under load.

#[path = "support/pair.rs"]
mod pair;

use async_trait::async_trait;
use pair::Server;
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};
use understudy::{
    lsn::Lsn,
    validate::{DifferenceKind, Follower, NoFollower, Options, Progress, Report, TableReport, ValidateError, verify},
};

const SCHEMA: &str = r#"
    CREATE TYPE mood AS ENUM ('sad', 'glad');
    CREATE TYPE pair AS (a int, b text);
    CREATE DOMAIN positive AS int CHECK (VALUE > 0);
    CREATE TABLE rich (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, n numeric(20, 6), j jsonb, js json, ts timestamptz, tsn timestamp,
        d date, t time, tz timetz, i interval, u uuid, a int[], at text[][], m mood, txt text, c char(5), v varchar(9), b bytea, p pair,
        f4 float4, f8 float8, bo boolean, ip inet, cd cidr, mac macaddr, bits bit varying(9), r int4range, mr nummultirange, x xml,
        tv tsvector, pt point, mo money, pos positive, g int GENERATED ALWAYS AS (id * 2) STORED);
    INSERT INTO rich (n, j, js, ts, tsn, d, t, tz, i, u, a, at, m, txt, c, v, b, p, f4, f8, bo, ip, cd, mac, bits, r, mr, x, tv, pt, mo, pos)
    SELECT k / 7.0, jsonb_build_object('k', k, 'é', '日本'), '{"a" :  1}', '2024-01-01'::timestamptz + k * interval '1 hour', 'infinity', '0044-03-15 BC',
        '12:00:00.123456', '12:00+02', interval '1 mon 2 days' * k, md5(k::text)::uuid, ARRAY[k, NULL], '{{a,"b c"},{NULL,"x,y"}}',
        (ARRAY['sad', 'glad'])[1 + k % 2]::mood, E'tab\there\nline\\back \u00e9\U0001F600 ' || k, 'ab', 'x', decode(md5(k::text), 'hex'), ROW(k, E'q"\\')::pair,
        k / 3.0::float4, CASE k % 3 WHEN 0 THEN 'NaN'::float8 WHEN 1 THEN '-0' ELSE 1e-300 END, k % 2 = 0, '10.0.0.1/8', '10.0.0.0/8', '08:00:2b:01:02:03',
        B'101', int4range(k, k + 5), '{[1,2),[3,4)}', '<a>é</a>', 'a:1 b:2'::tsvector, point(k, 0.1), 5, k
    FROM generate_series(1, 500) k;
    CREATE TABLE texts (k text, v text, PRIMARY KEY (k));
    INSERT INTO texts SELECT CASE k % 4 WHEN 0 THEN E'a\tb' WHEN 1 THEN 'Ä' WHEN 2 THEN '日本' ELSE E'z\\' END || k, 'v' FROM generate_series(1, 300) k;
    CREATE TABLE multi (a bigint, b uuid, c char(3), v int, UNIQUE (a, b, c));
    ALTER TABLE multi ALTER a SET NOT NULL, ALTER b SET NOT NULL, ALTER c SET NOT NULL;
    INSERT INTO multi SELECT k % 20 - 10, md5(k::text)::uuid, (k % 7)::text, k FROM generate_series(1, 300) k;
    CREATE TABLE keyless (a int, b text);
    INSERT INTO keyless SELECT k % 10, CASE WHEN k % 5 > 0 THEN 'v' || k % 50 END FROM generate_series(1, 300) k;
    CREATE TABLE parts (id int, at date, v text, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
    CREATE TABLE parts_a PARTITION OF parts FOR VALUES FROM ('2024-01-01') TO ('2024-07-01');
    CREATE TABLE parts_b PARTITION OF parts DEFAULT;
    INSERT INTO parts SELECT k, date '2024-01-01' + k, 'v' FROM generate_series(1, 300) k;
    CREATE TABLE parent (id int PRIMARY KEY); CREATE TABLE heir (x int) INHERITS (parent);
    INSERT INTO parent VALUES (1); INSERT INTO heir VALUES (2, 3);
    CREATE SCHEMA "Odd Schema"; CREATE TABLE "Odd Schema"."Ta""ble" ("select" int PRIMARY KEY, "Co l" text);
    INSERT INTO "Odd Schema"."Ta""ble" VALUES (1, 'x');
    CREATE TABLE empty (id int PRIMARY KEY);
    CREATE UNLOGGED TABLE volatile (id int);
    CREATE SCHEMA understudy; CREATE TABLE understudy.progress (id int);
"#;

async fn compare(owner: &Server, follower: &Server, options: &Options) -> Report {
    let (owner, follower) = (owner.url("postgres", "postgres"), follower.url("postgres", "postgres"));
    let progress = Progress::default();
    let report = verify::<NoFollower>(&owner, &follower, None, options, &progress).await.unwrap();
    let (done, total) = progress.tables();
    assert_eq!(done, total);
    report
}

fn table<'a>(report: &'a Report, name: &str) -> &'a TableReport {
    report.tables.iter().find(|table| table.name == name).unwrap()
}

/// Kind, key and columns of a table's only difference.
fn only(report: &Report, name: &str) -> (DifferenceKind, String, Vec<String>) {
    let table = table(report, name);
    assert_eq!(table.differences, 1, "{table:?}");
    (table.examples[0].kind, table.examples[0].key.clone(), table.examples[0].columns.clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn two_majors_equal_then_each_difference_found_then_repaired() {
    let (old, new) = (Server::start(15, &[]), Server::start(18, &[]));
    old.run("postgres", SCHEMA).await;
    new.run("postgres", SCHEMA).await;
    let report = compare(&old, &new, &Options::default()).await;
    assert_eq!(report.differences, 0, "{report:#?}");
    assert!(report.tables.iter().all(|table| table.skipped.is_none() == (table.name != "volatile")), "{report:#?}");
    assert_eq!(report.rows, 500 + 300 + 300 + 300 + 300 + 1 + 1 + 1);
    assert!(!report.tables.iter().any(|table| table.schema == "understudy" || table.name == "parts_a"));

    let damages = [
        "UPDATE rich SET n = n + 0.000001 WHERE id = 42",
        "DELETE FROM texts WHERE k = E'a\\tb4'",
        "INSERT INTO multi VALUES (-3, '00000000-0000-0000-0000-000000000000', 'x', 1)",
        "UPDATE keyless SET b = 'other' WHERE ctid = (SELECT min(ctid) FROM keyless WHERE b = 'v1')",
        "UPDATE parts SET v = '日本' WHERE id = 250",
        "UPDATE \"Odd Schema\".\"Ta\"\"ble\" SET \"Co l\" = NULL",
        "DELETE FROM ONLY parent WHERE id = 1; INSERT INTO heir VALUES (1, 1)",
        "CREATE TABLE only_here (id int)",
    ];
    new.run("postgres", &damages.join(";")).await;
    let report = compare(&old, &new, &Options::default()).await;
    assert_eq!(only(&report, "rich"), (DifferenceKind::Changed, "id=42".into(), vec!["n".into()]));
    assert_eq!(only(&report, "texts"), (DifferenceKind::Missing, "k=a\tb4".into(), vec![]));
    let extra = "a=-3, b=00000000-0000-0000-0000-000000000000, c=x";
    assert_eq!(only(&report, "multi"), (DifferenceKind::Extra, extra.into(), vec![]));
    assert_eq!(table(&report, "keyless").differences, 2);
    assert!(table(&report, "keyless").examples.iter().all(|example| example.key.starts_with("row hash ")));
    assert_eq!(only(&report, "parts"), (DifferenceKind::Changed, "id=250, at=2024-09-07".into(), vec!["v".into()]));
    assert_eq!(only(&report, "Ta\"ble"), (DifferenceKind::Changed, "select=1".into(), vec!["Co l".into()]));
    assert_eq!(only(&report, "parent"), (DifferenceKind::Missing, "id=1".into(), vec![]));
    assert_eq!(only(&report, "only_here"), (DifferenceKind::Extra, "table".into(), vec![]));
    assert_eq!(table(&report, "heir").differences, 1);
    assert_eq!(report.differences, 10);

    let text = serde_json::to_string(&report).unwrap();
    assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
    assert!(!text.contains("日本") && !text.contains("other"), "a report holds no values: {text}");

    // Triggers and foreign keys stay silent during a repair.
    new.run(
        "postgres",
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''fired''; END';
        CREATE TRIGGER refuse BEFORE INSERT OR DELETE ON rich FOR EACH ROW EXECUTE FUNCTION refuse()",
    )
    .await;
    let report = compare(&old, &new, &Options { repair: true, ..Options::default() }).await;
    assert_eq!(table(&report, "rich").repaired, 1);
    let report = compare(&old, &new, &Options::default()).await;
    let left: Vec<_> = report.tables.iter().filter(|table| table.differences > 0).map(|table| table.name.as_str()).collect();
    assert_eq!(left, ["heir", "keyless", "only_here"], "tables without key and tables on one side need a person");
    assert_eq!(table(&report, "heir").differences, 1, "a repair of the parent leaves the heir's rows alone");

    // Columns on one side and other types are notes; keys of other integer types order alike.
    new.run("postgres", "ALTER TABLE multi ALTER a TYPE int, ADD more text; ALTER TABLE parts DROP COLUMN v").await;
    let options = Options { tables: Some(vec!["multi".into(), "public.parts".into()]), ..Options::default() };
    let report = compare(&old, &new, &options).await;
    assert_eq!((report.tables.len(), report.differences), (2, 0), "{report:#?}");
    assert_eq!(table(&report, "multi").notes.len(), 2, "{report:#?}");
    assert_eq!(table(&report, "parts").notes.len(), 1);

    let options = Options { tables: Some(vec!["nope".into()]), ..Options::default() };
    let (a, b) = (old.url("postgres", "postgres"), new.url("postgres", "postgres"));
    let error = verify::<NoFollower>(&a, &b, None, &options, &Progress::default()).await.unwrap_err();
    assert!(matches!(error, ValidateError::NoSuchTable(name) if name == "nope"));
}

#[tokio::test(flavor = "multi_thread")]
async fn other_majors_read_alike_and_what_cannot_be_read_is_said() {
    for (old, new) in [(14, 17), (16, 18)] {
        let (old, new) = (Server::start(old, &[]), Server::start(new, &[]));
        old.run("postgres", SCHEMA).await;
        new.run("postgres", SCHEMA).await;
        let report = compare(&old, &new, &Options::default()).await;
        assert_eq!((report.differences, report.unread), (0, 0), "{report:#?}");

        new.run("postgres", "CREATE ROLE weak LOGIN; GRANT SELECT ON texts, multi TO weak").await;
        let (owner, follower) = (old.url("postgres", "postgres"), new.url("weak", "postgres"));
        let tables = Some(["texts", "rich", "multi"].map(str::to_owned).to_vec());
        let options = Options { tables, workers: 1, ..Options::default() };
        let report = verify::<NoFollower>(&owner, &follower, None, &options, &Progress::default()).await.unwrap();
        assert_eq!((report.unread, report.differences, table(&report, "texts").rows, table(&report, "multi").rows), (1, 0, 300, 300));
        assert!(table(&report, "rich").skipped.as_ref().is_some_and(|reason| reason.contains("permission denied")), "{report:#?}");
    }
}

/// Stands for a feed that is always where it should be: the owner itself.
#[derive(Default)]
struct Myself {
    held: Arc<AtomicBool>,
    at: Mutex<Vec<Lsn>>,
}

struct Held(Arc<AtomicBool>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

#[async_trait]
impl Follower for Myself {
    type Hold = Held;

    fn hold(&self) -> Held {
        self.held.store(true, Ordering::SeqCst);
        Held(Arc::clone(&self.held))
    }

    async fn advance(&self, _: &Held, lsn: Lsn, _: Duration) -> Result<(), String> {
        self.at.lock().unwrap().push(lsn);
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_under_load_equals_itself_and_keeps_no_slot() {
    let server = Server::start(15, &["wal_level=logical"]);
    server
        .run("postgres", "CREATE TABLE t (id int PRIMARY KEY, v int, pad text); INSERT INTO t SELECT k, 0, repeat('x', 50) FROM generate_series(1, 200000) k")
        .await;
    let (stop, writes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut writers = Vec::new();
    for number in 0..3 {
        let (client, stop, writes) = (server.client("postgres").await, Arc::clone(&stop), Arc::clone(&writes));
        writers.push(tokio::spawn(async move {
            let mut random = fastrand::Rng::with_seed(number);
            while !stop.load(Ordering::SeqCst) {
                let (a, b) = (random.i32(1..200_000), random.i32(1..200_000));
                let text = format!("UPDATE t SET v = v + 1 WHERE id = {a}; DELETE FROM t WHERE id = {b}; INSERT INTO t VALUES ({b}, 1) ON CONFLICT DO NOTHING");
                client.batch_execute(&text).await.unwrap();
                writes.fetch_add(1, Ordering::SeqCst);
            }
        }));
    }
    let url = server.url("postgres", "postgres");
    let feed = Myself::default();
    for _ in 0..3 {
        let before = writes.load(Ordering::SeqCst);
        let progress = Progress::default();
        let report = verify(&url, &url, Some(&feed), &Options::default(), &progress).await.unwrap();
        assert_eq!((report.differences, report.rows), (0, 200_000), "{report:#?}");
        assert_eq!(progress.rows().0, 200_000);
        assert!(writes.load(Ordering::SeqCst) > before, "the load went on");
        assert!(!feed.held.load(Ordering::SeqCst), "the feed goes on");
        assert_eq!(feed.at.lock().unwrap().last(), Some(&report.lsn));
    }
    stop.store(true, Ordering::SeqCst);
    for writer in writers {
        writer.await.unwrap();
    }
    let positions = feed.at.lock().unwrap().clone();
    assert!(positions.windows(2).all(|pair| pair[0] < pair[1]), "{positions:?}");
    let slots = server.client("postgres").await.query("SELECT 1 FROM pg_replication_slots", &[]).await.unwrap();
    assert!(slots.is_empty());
}

/// Knows from the change stream how many rows were committed at a position.
struct Counter {
    client: tokio_postgres::Client,
    expected: AtomicU64,
}

#[async_trait]
impl Follower for Counter {
    type Hold = ();

    fn hold(&self) {}

    async fn advance(&self, (): &(), lsn: Lsn, _: Duration) -> Result<(), String> {
        // The position to decode to may lie inside a transaction; what counts is each one's own end.
        let text = format!(
            "SELECT data FROM pg_logical_slot_peek_binary_changes('witness', '{}', NULL, 'proto_version', '1', 'publication_names', 'p')",
            Lsn(lsn.0 + 8192)
        );
        let (mut counted, mut pending) = (0, 0);
        for row in self.client.query(&text, &[]).await.map_err(|error| error.to_string())? {
            let data: Vec<u8> = row.get(0);
            match data[0] {
                b'I' => pending += 1,
                // Commit: flags, its own position, its end.
                b'C' => {
                    let end = Lsn(u64::from_be_bytes(data[10..18].try_into().unwrap()));
                    counted += if end <= lsn { pending } else { 0 };
                    pending = 0;
                }
                _ => {}
            }
        }
        self.expected.store(counted, Ordering::SeqCst);
        Ok(())
    }
}

/// The snapshot holds exactly the transactions whose end is at or before the position that the feed is held at.
#[tokio::test(flavor = "multi_thread")]
async fn position_and_snapshot_are_one_pair_under_load() {
    let server = Server::start(15, &["wal_level=logical"]);
    server.run("postgres", "CREATE TABLE log (id bigserial PRIMARY KEY, v int); CREATE PUBLICATION p FOR TABLE log").await;
    server.run("postgres", "SELECT pg_create_logical_replication_slot('witness', 'pgoutput')").await;
    let stop = Arc::new(AtomicBool::new(false));
    let mut writers = Vec::new();
    for rows in 1..=4 {
        let (client, stop) = (server.client("postgres").await, Arc::clone(&stop));
        writers.push(tokio::spawn(async move {
            while !stop.load(Ordering::SeqCst) {
                client.batch_execute(&format!("INSERT INTO log (v) SELECT generate_series(1, {rows})")).await.unwrap();
            }
        }));
    }
    let url = server.url("postgres", "postgres");
    let counter = Counter { client: server.client("postgres").await, expected: AtomicU64::new(0) };
    let mut last = 0;
    for _ in 0..12 {
        let report = verify(&url, &url, Some(&counter), &Options::default(), &Progress::default()).await.unwrap();
        assert_eq!((report.rows, report.differences), (counter.expected.load(Ordering::SeqCst), 0), "at {}", report.lsn);
        assert!(report.rows > last, "the load went on");
        last = report.rows;
    }
    stop.store(true, Ordering::SeqCst);
    for writer in writers {
        writer.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn open_writers_are_named_and_refusals_say_what_to_do() {
    let (server, plain) = (Server::start(15, &["wal_level=logical"]), Server::start(18, &["wal_level=replica"]));
    server.run("postgres", "CREATE TABLE t (id int PRIMARY KEY)").await;
    let writer = server.client("postgres").await;
    let pid: i32 = writer.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    writer.batch_execute("BEGIN; INSERT INTO t VALUES (1)").await.unwrap();
    let url = server.url("postgres", "postgres");
    let error = verify(&url, &url, Some(&Myself::default()), &Options::default(), &Progress::default()).await.unwrap_err().to_string();
    assert!(error.contains(&format!("pid {pid} ")) && error.contains("pg_terminate_backend"), "{error}");
    let waiting = "SELECT 1 FROM pg_stat_activity WHERE application_name = 'understudy verify' AND backend_type = 'walsender'";
    for _ in 0..100 {
        if writer.query(waiting, &[]).await.unwrap().is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let slots = writer.query("SELECT 1 FROM pg_replication_slots", &[]).await.unwrap();
    assert!(slots.is_empty(), "no slot is left behind");

    let url = plain.url("postgres", "postgres");
    let error = verify(&url, &url, Some(&Myself::default()), &Options::default(), &Progress::default()).await.unwrap_err().to_string();
    assert!(error.contains("wal_level"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_show_no_values_and_partitions_stay_unlocked() {
    let server = Server::start(15, &[]);
    server.run("postgres", "CREATE DATABASE other").await;
    let tables =
        "CREATE TABLE big (id int PRIMARY KEY, v text); INSERT INTO big SELECT k, repeat('x', 50) FROM generate_series(1, 200000) k;
        CREATE TABLE parts (id int) PARTITION BY RANGE (id);
        CREATE TABLE parts_a PARTITION OF parts FOR VALUES FROM (0) TO (10); CREATE TABLE parts_b PARTITION OF parts DEFAULT;";
    for (database, table) in [("postgres", "(id int PRIMARY KEY, v text)"), ("other", "(id int PRIMARY KEY, v int)")] {
        server.run(database, &format!("{tables} CREATE TABLE t {table}")).await;
    }
    server.run("postgres", "INSERT INTO t VALUES (1, 'hidden-value')").await;
    let (owner, follower) = (server.url("postgres", "postgres"), server.url("postgres", "other"));
    let options = Options { tables: Some(vec!["t".into()]), repair: true, ..Options::default() };
    let error = verify::<NoFollower>(&owner, &follower, None, &options, &Progress::default()).await.unwrap_err().to_string();
    assert!(error.contains("22P02") && !error.contains("hidden"), "{error}");

    // While one table is compared, the partitions of another are free.
    let options = Options { tables: Some(vec!["big".into()]), workers: 1, ..Options::default() };
    let progress = Arc::new(Progress::default());
    let comparing = tokio::spawn({
        let progress = progress.clone();
        async move { verify::<NoFollower>(&owner, &follower, None, &options, &progress).await.unwrap() }
    });
    let client = server.client("postgres").await;
    while progress.tables().1 == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let locks = "SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid) JOIN pg_class c ON c.oid = l.relation
        WHERE a.application_name = 'understudy verify' AND c.relname LIKE 'parts%'";
    assert_eq!(client.query_one(locks, &[]).await.unwrap().get::<_, i64>(0), 0);
    assert_eq!(comparing.await.unwrap().differences, 0);
}
