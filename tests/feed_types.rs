//! Every type that PostgreSQL knows, and those that people make, arrive unchanged: by the copy, and by insert, update and delete.
//!
//! `UNDERSTUDY_LONG=1` tries more pairs of majors, and values of 100 MB.

#[path = "support/feed_play.rs"]
mod play;
#[path = "support/feed_servers.rs"]
mod servers;

use play::{assert_equal, catch_up, spec, start, streaming};
use servers::Server;
use std::collections::BTreeSet;
use tokio_postgres::Client;
use understudy::{
    cdc::{self, Start},
    metadata::Repository,
};

/// Values of each type. A type of the server that is missing here fails the test: it must be thought of.
const SAMPLES: &[(&str, &[&str])] = &[
    ("bool", &["t", "f"]),
    ("bytea", &["", r"\x00ff10", r"\xdeadbeef5c"]),
    ("char", &["a", "", r"\200"]),
    ("name", &["n", "größe", ""]),
    ("int8", &["0", "-9223372036854775808", "9223372036854775807"]),
    ("int2", &["-32768", "32767"]),
    ("int2vector", &["1 2 3", ""]),
    ("int4", &["-2147483648", "2147483647", "0"]),
    ("regproc", &["now", "-"]),
    ("text", &["", "a", "ü☺\t\n\\ \"'{},;()", r"\N", "NULL", " "]),
    ("oid", &["0", "4294967295"]),
    ("tid", &["(0,1)", "(4294967295,65535)"]),
    ("xid", &["3", "4294967295"]),
    ("cid", &["0", "7"]),
    ("oidvector", &["1 2", ""]),
    ("json", &[r#"{"a" : 1,  "a":2}"#, "null", r#"[1.0, "\u00fc"]"#]),
    ("xml", &["<a>ü</a>", "<?xml version=\"1.0\"?><b c=\"1\"/>", "text"]),
    ("xid8", &["0", "18446744073709551615"]),
    ("point", &["(1.5,-2)", "(Infinity,NaN)", "(1e-300,1e300)"]),
    ("lseg", &["[(0,0),(1,0.1)]"]),
    ("path", &["[(0,0),(1,1),(2,0)]", "((0,0),(1,1),(2,0))"]),
    ("box", &["(2,2),(0,0)", "(1,1),(1,1)"]),
    ("polygon", &["((0,0),(1,1),(2,0))"]),
    ("line", &["{1,2,3}", "{-0.5,1,0}"]),
    ("float4", &["NaN", "Infinity", "-Infinity", "-0", "1.17549435e-38", "0.1", "3.4028235e38"]),
    ("float8", &["NaN", "Infinity", "-Infinity", "-0", "4.9406564584124654e-324", "0.1", "1.7976931348623157e308"]),
    ("unknown_is_no_column", &[]),
    ("circle", &["<(1,2),3.5>"]),
    ("money", &["12.34", "-92233720368547758.08"]),
    ("macaddr", &["08:00:2b:01:02:03"]),
    ("inet", &["10.0.0.1/8", "::1", "2001:db8::/32", "192.168.0.1"]),
    ("cidr", &["10.0.0.0/8", "2001:db8::/32"]),
    ("macaddr8", &["08:00:2b:01:02:03:04:05"]),
    ("aclitem", &["postgres=r/postgres", "=X/postgres"]),
    ("bpchar", &["a  ", ""]),
    ("varchar", &["", "vär"]),
    ("date", &["infinity", "-infinity", "0044-03-15 BC", "4713-11-24 BC", "5874897-12-31", "2024-02-29"]),
    ("time", &["00:00:00", "24:00:00", "23:59:59.999999"]),
    ("timestamp", &["infinity", "-infinity", "0044-03-15 01:02:03.000004 BC", "294276-12-31 23:59:59.999999", "4713-11-24 00:00:00 BC"]),
    ("timestamptz", &["infinity", "-infinity", "0044-03-15 01:02:03+05:30 BC", "2024-03-31 02:30:00.123456+01"]),
    ("interval", &["1 mon -3 days 04:05:06.7", "-178000000 years", "00:00:00.000001", "-1 days +23:00:00"]),
    ("timetz", &["00:00:00+15:59:59", "24:00:00-12", "12:00:00.5+02:30"]),
    ("bit", &["0", "1"]),
    ("varbit", &["", "10101", "1111111111"]),
    ("numeric", &["NaN", "Infinity", "-Infinity", "0.00", "-1.50", "1e131071", "1e-16383", "123456789012345678901234567890.123456789"]),
    ("refcursor", &["c", ""]),
    ("regprocedure", &["sum(integer)", "-"]),
    ("regoper", &["pg_catalog.||/", "0"]),
    ("regoperator", &["+(integer,integer)", "0"]),
    ("regclass", &["pg_class", "public.mine", "-"]),
    ("regcollation", &["\"C\"", "-"]),
    ("regtype", &["integer", "public.mood", "-"]),
    ("regrole", &["postgres", "somebody", "-"]),
    ("regnamespace", &["public", "-"]),
    ("regdatabase", &["postgres", "-"]),
    ("uuid", &["a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "00000000-0000-0000-0000-000000000000"]),
    ("pg_lsn", &["0/0", "FFFFFFFF/FFFFFFFF"]),
    ("tsvector", &["", "'a':1A,2B 'ü ''x':3", "'b'"]),
    ("tsquery", &["", "'a' & !'b' <2> 'c':*AB", "'x'"]),
    ("regconfig", &["english", "-"]),
    ("regdictionary", &["simple", "-"]),
    ("jsonb", &[r#"{"a": 1.00, "b": [null, true, "ü\n"]}"#, "null", "1e5", r#""""#]),
    ("jsonpath", &["$.a[*] ? (@ > 1)", "strict $"]),
    ("txid_snapshot", &["10:20:10,14"]),
    ("pg_snapshot", &["10:20:10,14"]),
    ("int4range", &["empty", "[1,5)", "(,)", "[,7)"]),
    ("numrange", &["empty", "[1.50,2)", "(,NaN]", "[-Infinity,Infinity]"]),
    ("tsrange", &["empty", "[2020-01-01,infinity)", "(,2020-01-01 BC]"]),
    ("tstzrange", &["empty", "[2020-01-01 00:00+02,)"]),
    ("daterange", &["empty", "[2020-01-01,2020-02-01)", "[-infinity,infinity]"]),
    ("int8range", &["empty", "[1,9223372036854775807)"]),
    ("int4multirange", &["{}", "{[1,2),[5,9)}"]),
    ("nummultirange", &["{}", "{[1.0,2],(3,)}"]),
    ("tsmultirange", &["{}", "{[2020-01-01,2020-02-01)}"]),
    ("tstzmultirange", &["{}", "{[2020-01-01 00:00+02,)}"]),
    ("datemultirange", &["{}", "{(,2020-01-01),[2021-01-01,)}"]),
    ("int8multirange", &["{}", "{[1,2)}"]),
    ("information_schema.cardinal_number", &["0", "7"]),
    ("information_schema.character_data", &["", "x"]),
    ("information_schema.sql_identifier", &["x"]),
    ("information_schema.time_stamp", &["2020-01-01 00:00:00.12+00"]),
    ("information_schema.yes_or_no", &["YES", "NO"]),
    // What people make.
    ("public.mood", &["sad", "happy ☺", "it's, \"quoted\""]),
    ("public.positive", &["1", "2147483647"]),
    ("public.code", &["ab", ""]),
    ("public.list", &["{}", "{1,NULL,3}", "[2:3]={1,2}"]),
    ("public.pair", &["(1.0,\"a,\"\"b\")", "(,)", "(NaN,\"\")"]),
    ("public.moods_multirange", &["{}", "{[sad,sad]}"]),
    ("public.nested", &[r#"("(1,x)",{sad},7,"[1.5,2)")"#, "(,,,)"]),
    ("public.span", &["empty", "[0.1,NaN]", "(-Infinity,1e300)"]),
    ("public.span_multi", &["{}", "{[0.1,0.2],(3,)}"]),
    ("public.moods", &["empty", "[sad,\"happy ☺\"]"]),
    ("ext.hstore", &["", r#""a"=>"1", "b"=>NULL, "ü,\""=>"=>""#]),
    ("ext.citext", &["", "MiXed ü"]),
    ("ext.ltree", &["", "Top.Science_1"]),
    ("ext.lquery", &["Top.*{1,2}.A|B@"]),
    ("ext.ltxtquery", &["A & !B*"]),
    ("ext.cube", &["(1, 2.5),(3, 4)", "()"]),
    ("ext.seg", &["1.5 .. 2.50", "~7"]),
    ("ext.isbn", &["978-0-393-04002-9"]),
];

/// No text, and no binary form either, is taken by their input functions: nobody, pg_dump included, can write a value of them.
const WITHOUT_INPUT: &[&str] = &[
    "pg_node_tree",
    "pg_ndistinct",
    "pg_dependencies",
    "pg_mcv_list",
    "pg_brin_bloom_summary",
    "pg_brin_minmax_multi_summary",
    "gtsvector",
];

const TYPES: &str = r#"
CREATE ROLE somebody LOGIN;
CREATE SCHEMA ext;
CREATE EXTENSION hstore SCHEMA ext; CREATE EXTENSION citext SCHEMA ext; CREATE EXTENSION ltree SCHEMA ext;
CREATE EXTENSION cube SCHEMA ext; CREATE EXTENSION seg SCHEMA ext; CREATE EXTENSION isn SCHEMA ext;
CREATE TABLE mine (id integer PRIMARY KEY);
CREATE TYPE mood AS ENUM ('sad', 'happy ☺', 'it''s, "quoted"');
CREATE DOMAIN positive AS integer CHECK (value > 0);
CREATE DOMAIN code AS varchar(7) DEFAULT 'none';
CREATE DOMAIN list AS integer[];
CREATE TYPE pair AS (x numeric, y text);
CREATE TYPE span AS RANGE (subtype = float8, subtype_diff = float8mi %MULTIRANGE%);
CREATE TYPE moods AS RANGE (subtype = mood);
CREATE TYPE nested AS (p pair, m mood[], d positive, s span);
"#;

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// Name of the table that holds a type.
fn table(prefix: &str, name: &str) -> String {
    format!("{prefix}_{}", name.replace('.', "_"))
}

/// The types of both servers, by name: those of `pg_catalog` without it.
async fn known(client: &Client) -> BTreeSet<String> {
    let rows = client
        .query(
            "SELECT CASE n.nspname WHEN 'pg_catalog' THEN '' ELSE n.nspname || '.' END || t.typname
             FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace
             WHERE t.typtype IN ('b', 'r', 'm', 'd', 'e', 'c') AND (t.typcategory <> 'A' OR t.typname IN ('int2vector', 'oidvector', 'list'))
               AND n.nspname NOT IN ('pg_toast', 'understudy') AND NOT (t.typtype = 'c' AND EXISTS (SELECT FROM pg_class c WHERE c.oid = t.typrelid AND c.relkind <> 'c'))",
            &[],
        )
        .await
        .unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

fn sql_name(name: &str) -> String {
    match name {
        "char" => "pg_catalog.\"char\"".into(),
        // Without a length, `bit` and `char` are those of length 1.
        "bpchar" => "char(5)".into(),
        "varchar" => "varchar(10)".into(),
        name if name.contains('.') => name.into(),
        name => format!("pg_catalog.{name}"),
    }
}

/// Rows `from` and up of one type: each value, alone and in arrays; NULL; empty; two dimensions.
fn rows(name: &str, values: &[&str], from: usize) -> String {
    let (sql_type, mut id, mut sql) = (sql_name(name), from, String::new());
    let array: Vec<String> = values.iter().map(|value| format!("{}::{sql_type}", quoted(value))).collect();
    let array = format!("ARRAY[{}, NULL]::{sql_type}[]", array.join(", "));
    let mut row = |value: String, array: String| {
        sql.push_str(&format!("INSERT INTO {} VALUES ({id}, {value}, {array});", table("keyed", name)));
        sql.push_str(&format!("INSERT INTO {} VALUES ({value}, {array});", table("keyless", name)));
        id += 1;
    };
    for value in values {
        row(format!("{}::{sql_type}", quoted(value)), array.clone());
    }
    row("NULL".into(), format!("'{{}}'::{sql_type}[]"));
    if let Some(value) = values.first().filter(|_| !matches!(name, "public.list" | "int2vector" | "oidvector")) {
        let value = format!("{}::{sql_type}", quoted(value));
        row(value.clone(), format!("ARRAY[[{value}, NULL], [NULL, {value}]]::{sql_type}[]"));
    }
    row("NULL".into(), "NULL".into());
    sql
}

/// Each row gets another row's values, keys change, rows go.
fn changes(name: &str) -> String {
    let (keyed, keyless) = (table("keyed", name), table("keyless", name));
    format!(
        "UPDATE {keyed} k SET v = o.v, a = o.a FROM {keyed} o WHERE o.id = k.id + 1 AND k.id % 2 = 1;
         UPDATE {keyed} SET id = -id WHERE id % 3 = 0;
         UPDATE {keyed} SET v = NULL, a = NULL WHERE id % 5 = 0;
         DELETE FROM {keyed} WHERE id % 7 = 0;
         UPDATE {keyless} SET a = NULL WHERE ctid = (SELECT min(ctid::text)::tid FROM {keyless});
         DELETE FROM {keyless} WHERE ctid = (SELECT max(ctid::text)::tid FROM {keyless});"
    )
}

async fn every_type(from: u32, to: u32) {
    let (old, new) = (Server::start(from, ""), Server::start(to, ""));
    let (owner, follower) = (old.create("types").await, new.create("types").await);
    let multirange = if from >= 14 { ", multirange_type_name = span_multi" } else { "" };
    owner.batch_execute(&TYPES.replace("%MULTIRANGE%", multirange)).await.unwrap();
    owner.batch_execute("SET search_path = public, ext").await.unwrap();
    let (there, here) = (known(&owner).await, known(&follower).await);
    let mut used = Vec::new();
    for name in &there {
        if WITHOUT_INPUT.contains(&name.as_str()) {
            let refused = owner.batch_execute(&format!("SELECT '1'::pg_catalog.{name}")).await.unwrap_err();
            assert_eq!(refused.code().unwrap().code(), "0A000", "{name}");
            continue;
        }
        let extension = name.starts_with("ext.");
        let sample = SAMPLES.iter().find(|(sample, _)| sample == name);
        let Some((_, values)) = sample else {
            assert!(extension, "type {name} has no sample here");
            continue;
        };
        // A built-in type that only one of the majors knows cannot be carried to the other.
        let multirange = name.contains("multi");
        if (name.contains('.') && !(multirange && to < 14)) || here.contains(name) {
            // Before 16 a "char" beyond ASCII has no text form that another server could read.
            let values = if name == "char" && from.min(to) < 16 { &values[..2] } else { *values };
            // 13 knows no infinite numbers.
            let values: Vec<&str> =
                values.iter().copied().filter(|v| from.min(to) > 13 || !(name.starts_with("num") && v.contains("Inf"))).collect();
            used.push((name.as_str(), values));
        }
    }
    // 13 knows no multiranges and a few others less.
    assert!(used.len() > if from.min(to) < 14 { 85 } else { 95 }, "{} types", used.len());
    for (name, values) in &used {
        let sql_type = sql_name(name);
        let ddl = format!(
            "CREATE TABLE {} (id integer PRIMARY KEY, v {sql_type}, a {sql_type}[]); CREATE TABLE {} (v {sql_type}, a {sql_type}[])",
            table("keyed", name),
            table("keyless", name)
        );
        owner.batch_execute(&ddl).await.unwrap_or_else(|error| panic!("{name}: {error:?}"));
        owner.batch_execute(&rows(name, values, 1)).await.unwrap_or_else(|error| panic!("{name}: {error:?}"));
    }
    owner
        .batch_execute(
            "CREATE TABLE strict (id integer PRIMARY KEY, v text NOT NULL, d positive NOT NULL); INSERT INTO strict VALUES (1, '', 1)",
        )
        .await
        .unwrap();
    let spec = spec(&old, &new, "types");
    let repository = Repository::in_memory().unwrap();
    let feed = start(&spec, Start::Copy, &repository);
    streaming(&feed).await;
    assert_equal(&owner, &follower, "after the copy").await;

    for (name, values) in &used {
        owner.batch_execute(&rows(name, values, 101)).await.unwrap();
    }
    catch_up(&feed, &owner).await;
    assert_equal(&owner, &follower, "after inserts").await;
    for (name, _) in &used {
        owner.batch_execute(&changes(name)).await.unwrap_or_else(|error| panic!("{name}: {error:?}"));
    }
    catch_up(&feed, &owner).await;
    assert_equal(&owner, &follower, "after updates and deletes").await;
    let state = feed.state();
    assert_eq!((state.findings, state.held_tables.len()), (0, 0), "{state:?}");
    for refused in
        ["INSERT INTO strict VALUES (2, NULL, 1)", "INSERT INTO strict VALUES (2, '', NULL)", "INSERT INTO strict VALUES (2, '', 0)"]
    {
        assert!(follower.batch_execute(refused).await.is_err(), "{refused}");
    }
    feed.stop().await;
    cdc::disarm(&spec).await.unwrap();
}

fn long() -> bool {
    std::env::var_os("UNDERSTUDY_LONG").is_some()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_type_arrives_on_a_newer_server() {
    every_type(15, 18).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_type_arrives_on_an_older_server() {
    every_type(18, 14).await;
}

/// The oldest owner, which has no messages in its stream.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_type_arrives_from_thirteen() {
    every_type(13, 18).await;
    every_type(13, 15).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_type_arrives_on_thirteen() {
    every_type(18, 13).await;
    every_type(15, 13).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_type_arrives_between_all_majors() {
    if !long() {
        return;
    }
    for from in 13..=18 {
        for to in 13..=18 {
            every_type(from, to).await;
        }
    }
}

/// Values that do not fit into one buffer, one page or one message of usual size.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn big_values_arrive() {
    let bytes: i64 = if long() { 100 << 20 } else { 3 << 20 };
    let (old, new) = (Server::start(15, ""), Server::start(18, ""));
    let (owner, follower) = (old.create("big").await, new.create("big").await);
    owner
        .batch_execute(&format!(
            "CREATE TABLE big (id integer PRIMARY KEY, t text, b bytea, j jsonb, n integer DEFAULT 0);
             CREATE TABLE big_keyless (t text, n integer);
             CREATE FUNCTION noise(bytes bigint) RETURNS text LANGUAGE sql AS
               $$ SELECT left(string_agg(md5(g::text || random()::text), ''), bytes::int) FROM generate_series(1, bytes / 32 + 1) g $$;
             INSERT INTO big SELECT 1, noise({bytes}), decode(noise({bytes}), 'hex'), NULL;
             INSERT INTO big SELECT 2, repeat('ü☺', ({bytes} / 8)::int), NULL, to_jsonb(noise({bytes} / 4));
             INSERT INTO big_keyless SELECT noise({bytes} / 4), 1"
        ))
        .await
        .unwrap();
    let spec = spec(&old, &new, "big");
    let repository = Repository::in_memory().unwrap();
    let feed = start(&spec, Start::Copy, &repository);
    streaming(&feed).await;
    let digest =
        "SELECT coalesce(string_agg(concat_ws(' ', id, n, length(t), md5(t), length(b), md5(b), md5(j::text)), E'\\n' ORDER BY id), '')
                  || (SELECT string_agg(concat_ws(' ', n, length(t), md5(t)), E'\\n' ORDER BY n) FROM big_keyless) FROM big";
    let same = async |when: &str| {
        let (left, right) = (owner.query_one(digest, &[]).await.unwrap(), follower.query_one(digest, &[]).await.unwrap());
        assert_eq!(left.get::<_, &str>(0), right.get::<_, &str>(0), "{when}");
    };
    same("after the copy").await;
    for change in [
        format!("INSERT INTO big SELECT 3, noise({bytes}), decode(noise({bytes}), 'hex'), to_jsonb(noise({bytes} / 4))"),
        // The big values did not change and are not sent.
        "UPDATE big SET n = n + 1".into(),
        "UPDATE big SET id = id + 10".into(),
        format!("UPDATE big SET t = noise({bytes}) WHERE id = 11"),
        "UPDATE big_keyless SET n = n + 1".into(),
        "DELETE FROM big WHERE id = 12".into(),
    ] {
        owner.batch_execute(&change).await.unwrap();
        catch_up(&feed, &owner).await;
        same(&change).await;
    }
    assert_eq!(feed.state().findings, 0, "{:?}", feed.state());
    feed.stop().await;
    cdc::disarm(&spec).await.unwrap();
}
