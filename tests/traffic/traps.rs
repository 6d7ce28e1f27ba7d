//! Statements that must never be run on a shadow as reads, however harmless they look.

use crate::stage::Stage;

pub const SCHEMA: &str = "
    CREATE TABLE trap (id serial PRIMARY KEY, v int DEFAULT 0, at timestamptz DEFAULT clock_timestamp());
    INSERT INTO trap (v) SELECT k FROM generate_series(1, 20) k;
    CREATE SEQUENCE numbers;
    CREATE FUNCTION springs(int) RETURNS int LANGUAGE sql VOLATILE AS 'INSERT INTO trap (v) VALUES ($1) RETURNING v';
    CREATE FUNCTION mixed(int) RETURNS int LANGUAGE sql STABLE AS 'SELECT $1';
    CREATE FUNCTION mixed(text) RETURNS int LANGUAGE sql VOLATILE AS 'INSERT INTO trap (v) VALUES (1) RETURNING v';
    CREATE FUNCTION calm(int) RETURNS int LANGUAGE sql STABLE AS 'SELECT $1';
    CREATE FUNCTION total(trap) RETURNS int LANGUAGE sql VOLATILE AS 'SELECT springs(1)';
    CREATE VIEW springing AS SELECT id, springs(v) AS v FROM trap;
    CREATE VIEW over_springing AS SELECT id FROM springing;
    CREATE VIEW ruled AS SELECT id, v FROM trap;
    CREATE RULE redirect AS ON UPDATE TO ruled DO INSTEAD INSERT INTO trap (v) VALUES (new.v);
    CREATE PROCEDURE proc() LANGUAGE sql AS 'INSERT INTO trap (v) VALUES (2)';
    CREATE SCHEMA other;
    CREATE FUNCTION other.lower(text) RETURNS text LANGUAGE sql VOLATILE AS 'SELECT springs(1)::text';
";

/// Only on the source: nobody asks the shadow for them.
const LATER: &str = "
    CREATE FUNCTION adds(int, int) RETURNS int LANGUAGE sql VOLATILE AS 'SELECT springs($1)';
    CREATE AGGREGATE summed (int) (sfunc = adds, stype = int);
    CREATE OPERATOR <!> (leftarg = int, rightarg = int, function = adds);
    CREATE TYPE parcel AS (a int);
    CREATE FUNCTION unpack(text) RETURNS parcel LANGUAGE sql VOLATILE AS 'SELECT ROW(springs(1))::parcel';
    CREATE CAST (text AS parcel) WITH FUNCTION unpack(text);
    CREATE DOMAIN costly AS int CHECK (springs(VALUE) > 0);
";

const TRAPS: &[&str] = &[
    "SELECT springs(1)",
    "SELECT * FROM springing WHERE id = 1",
    "SELECT id FROM over_springing WHERE id = 1",
    "SELECT mixed('a')",
    "SELECT other.lower('A')",
    "SELECT t.total FROM trap t WHERE id = 1",
    "SELECT (t).total FROM trap t WHERE id = 1",
    "SELECT id FROM trap WHERE springs(id) > 0 AND id = 1",
    "SELECT id FROM trap ORDER BY springs(id) LIMIT 1",
    "SELECT count(*) FILTER (WHERE springs(1) > 0) FROM trap WHERE id = 1",
    "SELECT CASE WHEN true THEN nextval('numbers') END",
    "SELECT setval('numbers', 5)",
    "VALUES (nextval('numbers'))",
    "SELECT * FROM generate_series(1, nextval('numbers')) LIMIT 1",
    "WITH w AS (INSERT INTO trap (v) VALUES (3) RETURNING id) SELECT * FROM w",
    "WITH w AS (DELETE FROM trap WHERE id = 0 RETURNING id) SELECT count(*) FROM w",
    "SELECT v FROM trap WHERE id = 1 FOR UPDATE",
    "SELECT v FROM (SELECT v FROM trap WHERE id = 1 FOR SHARE) x",
    "SELECT v INTO kept FROM trap",
    "CREATE TEMPORARY TABLE away AS SELECT v FROM trap",
    "UPDATE ruled SET v = 4 WHERE id = 1",
    "INSERT INTO trap DEFAULT VALUES RETURNING id",
    "DO $$ BEGIN PERFORM springs(5); END $$",
    "CALL proc()",
    "EXPLAIN ANALYZE INSERT INTO trap (v) VALUES (6)",
    "EXPLAIN (ANALYZE) SELECT springs(7)",
    "SELECT pg_advisory_lock(1), pg_advisory_unlock(1)",
    "SELECT pg_try_advisory_xact_lock(1)",
    "SELECT pg_notify('here', 'there')",
    "NOTIFY here",
    "SELECT set_config('work_mem', '8MB', false)",
    "SELECT lo_create(0)",
    "SELECT lo_from_bytea(0, 'x')",
    "COPY (SELECT 1) TO PROGRAM 'true'",
    "COPY trap TO '/dev/null'",
    "SELECT dblink('dbname=shop', 'select 1')",
    "SELECT query_to_xml('delete from trap where id = 0', true, true, '')",
    "SELECT pg_logical_emit_message(false, 'a', 'b')",
    "SELECT pg_terminate_backend(0)",
    "SELECT pg_reload_conf()",
    "SELECT txid_current()",
    "SELECT pg_backend_pid()",
    "SELECT random(), gen_random_uuid(), clock_timestamp()",
    "SELECT pg_sleep(0.001)",
    "SELECT * FROM pg_stat_activity LIMIT 1",
    "SELECT last_value FROM numbers",
    "SELECT currval('numbers')",
    "SHOW work_mem",
    "PREPARE p AS SELECT springs(8)",
    "EXECUTE p",
    "LOCK TABLE trap IN ACCESS SHARE MODE",
    "TRUNCATE away",
    "SELECT 1; SELECT springs(9)",
    "BEGIN; SELECT springs(10); COMMIT",
    "SELECT summed(1)",
    "SELECT 1 <!> 2",
    "SELECT 'x'::text::parcel",
    "SELECT 1::costly",
];

pub async fn sprung(stage: &Stage) {
    let client = stage.client().await;
    for text in LATER.split(";\n").map(str::trim).filter(|text| !text.is_empty()) {
        client.simple_query(text).await.unwrap();
    }
    for (number, text) in TRAPS.iter().enumerate() {
        // each in both protocols, on a session of its own: what one leaves behind must not be what keeps the next where it is
        let client = stage.client().await;
        let marked = format!("{text} /* trap {number} */");
        let simple = client.simple_query(&marked).await;
        if let Err(error) = &simple {
            assert!(error.as_db_error().is_some(), "{text}: {error}");
        }
        if !text.contains(';') && !text.starts_with("COPY") {
            let _ = client.query(&marked, &[]).await;
        }
    }
    // the function is another one the moment that its owner says so
    client.simple_query("SELECT calm(1)").await.unwrap();
    for round in 0..20 {
        let (kind, body) =
            if round % 2 == 0 { ("VOLATILE", "INSERT INTO trap (v) VALUES ($1) RETURNING v") } else { ("STABLE", "SELECT $1") };
        client.simple_query(&format!("CREATE OR REPLACE FUNCTION calm(int) RETURNS int LANGUAGE sql {kind} AS '{body}'")).await.unwrap();
        if round % 2 == 0 {
            client.simple_query("SELECT calm(1) /* trap 1000 */").await.unwrap();
            client.query("SELECT calm(2) /* trap 1000 */", &[]).await.unwrap();
        }
    }
    // when the facts are there again, reads are copied again
    let before = stage.compare().await.same;
    crate::harness::wait_until("reads are compared", crate::stage::PATIENCE, || async {
        client.simple_query("SELECT id, v FROM trap WHERE id = 2 /* copied */").await.unwrap();
        stage.compare().await.same > before
    })
    .await;
    stage.settled().await;
    let log = stage.copies_log();
    assert!(log.contains("/* copied */"), "the log shows what is copied: {log}");
    let reached: Vec<&str> = log.lines().filter(|line| line.contains("/* trap")).collect();
    assert!(reached.is_empty(), "these reached the shadow: {reached:#?}");
}
