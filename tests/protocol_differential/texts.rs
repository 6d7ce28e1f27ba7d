//! What the generated conversations say. Nothing here may answer differently the second time: no clocks, chance, process
//! ids, new oids in texts, or row order without ORDER BY.

pub const SCHEMA: &str = "
    CREATE TABLE item (id int PRIMARY KEY, v int NOT NULL, note text);
    CREATE TABLE sink (id int PRIMARY KEY, note text, day date);
    CREATE SEQUENCE numbers;
    CREATE VIEW dear AS SELECT id, v FROM item WHERE v > 100;
    CREATE FUNCTION fails(int) RETURNS int LANGUAGE plpgsql AS $$
        BEGIN RAISE EXCEPTION 'no %', $1 USING ERRCODE = 'P0002', HINT = 'ask for another', DETAIL = 'said by a test'; END $$;
    CREATE FUNCTION speaks(int) RETURNS int LANGUAGE plpgsql AS $$
        BEGIN RAISE NOTICE 'notice %', $1; RAISE WARNING 'warning %', $1; RETURN $1; END $$;
    CREATE FUNCTION sets() RETURNS text LANGUAGE sql AS $$ SELECT set_config('DateStyle', 'German, DMY', false) $$;
    CREATE PROCEDURE commits(int) LANGUAGE plpgsql AS $$
        BEGIN UPDATE item SET v = v + $1 WHERE id = 1; COMMIT; UPDATE item SET v = v + $1 WHERE id = 2; ROLLBACK; END $$;
    CREATE FUNCTION reset_state() RETURNS void LANGUAGE sql AS $$
        TRUNCATE item, sink;
        INSERT INTO item SELECT k, k * 10, CASE WHEN k % 5 > 0 THEN 'note ' || k END FROM generate_series(1, 30) k;
        SELECT setval('numbers', 1, false); SELECT NULL::void $$;
";

/// One row of text that stands for everything that a conversation can have changed.
pub const CONTENT: &str = "SELECT md5(coalesce((SELECT string_agg(i::text, ';' ORDER BY id) FROM item i), '')) || \
    md5(coalesce((SELECT string_agg(s::text, ';' ORDER BY id) FROM sink s), '')) || (SELECT last_value || '' FROM numbers)";

/// For `Query`, and, where it is one statement without parameters, for `Parse`.
pub const PLAIN: &[&str] = &[
    "SELECT 1",
    "SELECT 1 AS a, NULL AS b, 'text' AS c, 1.5::numeric AS d, true AS e",
    "SELECT id, v, note FROM item ORDER BY id LIMIT 5",
    "SELECT i.id, s.note FROM item i LEFT JOIN sink s USING (id) ORDER BY i.id LIMIT 4",
    "SELECT count(*), sum(v) FROM item",
    "SELECT count(*) FROM dear",
    "SELECT * FROM item WHERE false",
    "SELECT",
    "SELECT FROM item ORDER BY id LIMIT 3",
    "SELECT generate_series(1, 300)",
    "SELECT repeat('x', 3000) FROM generate_series(1, 20)",
    "SELECT repeat('y', 400000)",
    "SELECT '{1,2,NULL}'::int[], '{\"a\": [1, 2]}'::jsonb, '\\xdeadbeef'::bytea, 'NaN'::float8, '1 day'::interval",
    "SELECT '2024-02-29'::date, '2024-02-29 12:34:56.789'::timestamp, '2024-02-29 12:34:56+00'::timestamptz",
    "SELECT E'\\u00e4\\u20ac', U&'\\00df'",
    "SELECT speaks(1)",
    "SELECT fails(2)",
    "SELECT fails(v) FROM item ORDER BY id",
    "SELECT 1 / (3 - id) FROM item ORDER BY id",
    "SELECT 1 / 0",
    "SELECT nonsense",
    "SELECT * FROM nowhere",
    "SELEC 1",
    "SELECT 'unterminated",
    "SELECT $1",
    "SELECT ($1)::int",
    "",
    ";",
    " ; ; ",
    "/* only */ -- a comment",
    "/* traceparent='00-1-2-01' */ SELECT 1 /* behind */;",
    "BEGIN",
    "BEGIN READ ONLY",
    "BEGIN ISOLATION LEVEL SERIALIZABLE",
    "START TRANSACTION",
    "COMMIT",
    "COMMIT AND CHAIN",
    "END",
    "ROLLBACK",
    "ROLLBACK AND CHAIN",
    "ABORT",
    "SAVEPOINT a",
    "RELEASE a",
    "ROLLBACK TO a",
    "PREPARE TRANSACTION 'x'",
    "INSERT INTO sink VALUES (nextval('numbers'), 'row') RETURNING id, note",
    "INSERT INTO sink VALUES (1, 'twice')",
    "INSERT INTO item VALUES (99, 1) ON CONFLICT DO NOTHING",
    "UPDATE item SET v = v + 1 WHERE id = 3",
    "UPDATE item SET v = v - 1 WHERE id BETWEEN 5 AND 8",
    "UPDATE item SET v = NULL WHERE id = 4",
    "DELETE FROM item WHERE id = 30",
    "WITH w AS (UPDATE item SET note = 'w' WHERE id = 9 RETURNING id) SELECT * FROM w",
    "SELECT id FROM item WHERE id = 2 FOR UPDATE",
    "SELECT nextval('numbers')",
    "CALL commits(1)",
    "DO $$ BEGIN RAISE NOTICE 'seen'; END $$",
    "DO $$ BEGIN PERFORM 1 / 0; EXCEPTION WHEN division_by_zero THEN RAISE NOTICE 'caught'; END $$",
    "EXPLAIN (COSTS OFF) SELECT 1",
    "VALUES (1, 'a'), (2, 'b')",
    "TABLE dear",
    "SHOW server_version",
    "SHOW ALL OF IT",
    "TRUNCATE sink",
    "LOCK TABLE sink",
    "VACUUM item",
    "CHECKPOINT",
];

/// What changes or needs the session.
pub const SESSION: &[&str] = &[
    "SET application_name = 'renamed'",
    "SET application_name TO DEFAULT",
    "SET DateStyle = 'SQL, DMY'",
    "SET LOCAL DateStyle = 'ISO, YMD'",
    "SET TimeZone = 'Asia/Tokyo'; SET IntervalStyle = 'iso_8601'",
    "SET extra_float_digits = 0",
    "SET bytea_output = 'escape'",
    "SET client_encoding = 'LATIN1'",
    "SET client_encoding = 'UTF8'",
    "SET NAMES 'nonsense'",
    "SET standard_conforming_strings = off",
    "SELECT 'a\\'; SELECT 2; --'",
    "RESET standard_conforming_strings",
    "SET app.tenant = '7'",
    "SELECT current_setting('app.tenant', true)",
    "SELECT set_config('TimeZone', 'Europe/Berlin', true)",
    "SELECT set_config('application_name', 'configured', false)",
    "SELECT sets()",
    "SET search_path = pg_catalog",
    "SET search_path = public, pg_catalog",
    "SET statement_timeout = '40ms'; SELECT pg_sleep(5)",
    "SET statement_timeout = 0",
    "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
    "SET default_transaction_read_only = off",
    "SET default_transaction_read_only = on",
    "SET ROLE none",
    "SET ROLE missing",
    "RESET ALL",
    "SHOW DateStyle",
    "SHOW search_path",
    "DISCARD ALL",
    "DISCARD PLANS",
    "DISCARD TEMP",
    "DEALLOCATE ALL",
    "DEALLOCATE a",
    "DEALLOCATE PREPARE \"b\u{e4}\"",
    "PREPARE a AS SELECT v FROM item WHERE id = 1",
    "PREPARE sqlp (int) AS SELECT $1 + 1",
    "EXECUTE a",
    "EXECUTE sqlp (4)",
    "EXECUTE missing",
    "CREATE TEMP TABLE IF NOT EXISTS plan (k int, t text)",
    "CREATE TEMP TABLE IF NOT EXISTS plan (k int, t text) ON COMMIT DROP",
    "INSERT INTO plan VALUES (1, 'one')",
    "SELECT * FROM plan ORDER BY k",
    "ALTER TABLE plan ADD COLUMN more int DEFAULT 3",
    "ALTER TABLE plan ALTER COLUMN k TYPE bigint",
    "DROP TABLE plan",
    "LISTEN news",
    "LISTEN other",
    "UNLISTEN news",
    "UNLISTEN *",
    "NOTIFY news, 'own'",
    "NOTIFY other; NOTIFY news, 'second'",
    "SELECT pg_notify('news', 'k' || id) FROM item WHERE id < 4 ORDER BY id",
    "DECLARE c CURSOR FOR SELECT id FROM item ORDER BY id",
    "DECLARE c SCROLL CURSOR WITH HOLD FOR SELECT id, note FROM item ORDER BY id",
    "FETCH 3 FROM c",
    "FETCH BACKWARD 1 FROM c",
    "MOVE 2 IN c",
    "CLOSE c",
    "CLOSE ALL",
    "SELECT pg_advisory_lock(7)",
    "SELECT pg_advisory_xact_lock(8)",
    "SELECT pg_advisory_unlock_all()",
    "SELECT lo_create(4711)",
    "SELECT lo_unlink(4711)",
    "LOAD 'plpgsql'",
];

/// A value in text and in binary; NULL is none.
pub type Parameter = (Option<&'static [u8]>, Option<&'static [u8]>);

/// Text, types and parameters of a statement.
pub struct Parameterised {
    pub text: &'static str,
    pub types: &'static [u32],
    pub parameters: &'static [Parameter],
}

const INT_7: Parameter = (Some(b"7"), Some(&[0, 0, 0, 7]));
const INT_0: Parameter = (Some(b"0"), Some(&[0, 0, 0, 0]));
const NULL: Parameter = (None, None);
const WORD: Parameter = (Some(b"w\xc3\xb6rd"), Some(b"w\xc3\xb6rd"));

pub const PARAMETERISED: &[Parameterised] = &[
    Parameterised { text: "SELECT $1::int + 1", types: &[], parameters: &[INT_7] },
    Parameterised { text: "SELECT $1::int + 1", types: &[23], parameters: &[INT_7] },
    Parameterised { text: "SELECT id, v, note FROM item WHERE id <= $1 ORDER BY id", types: &[], parameters: &[INT_7] },
    Parameterised { text: "SELECT note FROM item WHERE id = $1", types: &[0], parameters: &[NULL] },
    Parameterised { text: "SELECT $1::text || $2::text, length($1)", types: &[25, 25], parameters: &[WORD, WORD] },
    Parameterised { text: "SELECT 100 / $1::int", types: &[], parameters: &[INT_0] },
    Parameterised { text: "SELECT generate_series(1, $1::int)", types: &[], parameters: &[INT_7] },
    Parameterised { text: "UPDATE item SET v = v + $1 WHERE id = $2", types: &[], parameters: &[INT_7, INT_7] },
    Parameterised {
        text: "INSERT INTO sink (id, note) VALUES ($1, $2) ON CONFLICT (id) DO UPDATE SET note = excluded.note RETURNING *",
        types: &[],
        parameters: &[INT_7, WORD],
    },
    Parameterised { text: "INSERT INTO sink (id, note) VALUES ($1, $2)", types: &[], parameters: &[INT_7, NULL] },
    Parameterised { text: "DELETE FROM sink WHERE id = $1 RETURNING note", types: &[], parameters: &[INT_7] },
    Parameterised { text: "SELECT set_config('application_name', $1, false)", types: &[], parameters: &[WORD] },
    Parameterised { text: "SELECT pg_notify('news', $1)", types: &[], parameters: &[WORD] },
    Parameterised { text: "SELECT speaks($1)", types: &[], parameters: &[INT_7] },
    Parameterised { text: "SELECT $1::int, $2::int", types: &[], parameters: &[INT_7] },
    Parameterised { text: "SELECT $1::nosuchtype", types: &[], parameters: &[INT_7] },
    Parameterised { text: "SELECT $1::date, $2::float8", types: &[], parameters: &[(Some(b"2024-02-29"), None), (Some(b"1.5"), None)] },
];
