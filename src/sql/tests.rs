//! A table of statements and what they are; then properties of the key and the safety of the parser.

use super::{
    Kind::{Copy as COPY, Read as READ, SchemaChange as DDL, Unknown as UNKNOWN, Write as WRITE},
    facts::{Relation, STAYS},
    *,
};
use SessionEffect as S;
use TransactionVerb as T;
use proptest::prelude::*;

fn session(effect: S) -> Kind {
    Kind::Session(effect)
}

fn transaction(verb: T) -> Kind {
    Kind::Transaction(verb)
}

fn builtin() -> Classifier {
    Classifier::new(CatalogFacts::builtin_only())
}

fn with_catalog() -> Classifier {
    let functions = [("stable_fn", false), ("writing_fn", true)];
    let relations = [
        ("t", Relation::Readable),
        ("public.t", Relation::Readable),
        ("v", Relation::Readable),
        ("writing_view", Relation::Refused(WRITE)),
        ("matview", Relation::Refused(STAYS)),
        ("far", Relation::Foreign),
    ];
    Classifier::new(CatalogFacts::builtin_only().with(&functions, &relations))
}

#[test]
fn kinds_by_grammar() {
    let classifier = builtin();
    let table: Vec<(&str, Kind)> = vec![
        // Reads
        ("select 1", READ),
        ("SELECT * FROM t", READ),
        ("select * from s.t where id = $1", READ),
        ("(select 1)", READ),
        ("((select 1)) union all (select 2)", READ),
        ("values (1), (2)", READ),
        ("table t", READ),
        ("with a as (select 1) select * from a", READ),
        ("with recursive a(n) as (values (1) union all select n + 1 from a where n < 5) select sum(n) from a", READ),
        ("select a, count(*) from t group by rollup (a) having count(*) > 1 order by 2 desc nulls last", READ),
        ("select now(), current_timestamp, current_date, current_user", READ),
        ("select upper(name) || '!' from t where name like 'a%' and id in (1, 2, 3)", READ),
        ("select * from t where id between 1 and 5 and x is not null and y is distinct from 3", READ),
        ("select case when a > 1 then 'x' else 'y' end, coalesce(a, 0), nullif(a, 1), greatest(a, b) from t", READ),
        ("select x::int, cast(y as numeric(10, 2)), z::text[], '2024-01-01'::date, interval '1 day' from t", READ),
        ("select * from a join b using (id) left join lateral (select * from c where c.a = a.id) x on true", READ),
        ("select * from generate_series(1, 10) with ordinality g(n, o)", READ),
        ("select * from rows from (generate_series(1, 2), unnest(array[1, 2])) r", READ),
        ("select j -> 'a' ->> 'b', j @> '{}', j #>> '{a,b}' from t", READ),
        ("select jsonb_build_object('a', 1), to_jsonb(t) from t", READ),
        ("select json_object('a': 1), json_array(1, 2), j is json from t", READ),
        ("select * from json_table('[1]', '$[*]' columns (a int path '$')) x", READ),
        ("select exists (select 1 from t), array(select 1), (select max(a) from t), 1 = any (select 1)", READ),
        ("select rank() over (partition by a order by b) from t window w as (order by c)", READ),
        ("select string_agg(a, ',' order by a) filter (where b) from t", READ),
        ("select percentile_cont(0.5) within group (order by a) from t", READ),
        ("select extract(epoch from a), a at time zone 'UTC', date_trunc('day', a) from t", READ),
        ("select trim(both ' ' from a), substring(a from 1 for 2), position('a' in b), overlay(a placing 'x' from 1) from t", READ),
        ("select row(1, 2) = row(1, 2), (t).a, (array[1, 2])[1:2] from t", READ),
        ("select * from t tablesample system (10)", READ),
        ("select distinct on (a) * from t", READ),
        ("select a from t except select b from u intersect select c from v", READ),
        ("select md5(a), encode(b, 'hex'), to_tsvector('english', a) @@ to_tsquery('x') from t", READ),
        ("select * from t limit 5 offset 2", READ),
        ("select * from t order by a fetch first 5 rows with ties", READ),
        ("select pg_typeof(a), pg_size_pretty(5::bigint) from t", READ),
        ("select grouping(a), a from t group by cube (a)", READ),
        ("select U&'\\0061', E'\\'', $$x$$, b'01', x'ff', n'a'", READ),
        ("select a collate \"C\" from t order by a using <", READ),
        ("/* c */ select /* -- */ 1 -- d", READ),
        ("select 1; select 2", READ),
        ("select from t", READ),
        // Writes
        ("insert into t values (1)", WRITE),
        ("insert into t (a) select b from u returning id", WRITE),
        ("insert into t values (1) on conflict (a) do update set b = excluded.b where t.b < 1", WRITE),
        ("insert into t default values", WRITE),
        ("update t set a = a + 1, (b, c) = (select 1, 2) where id = 1", WRITE),
        ("update t set a = 1 where current of c", WRITE),
        ("delete from t using u where t.id = u.id", WRITE),
        ("merge into t using u on t.a = u.a when matched then update set b = 1 when not matched then insert values (1)", WRITE),
        ("with x as (insert into t values (1) returning *) select * from x", WRITE),
        ("with x as (delete from t returning *) insert into u select * from x", WRITE),
        ("select * from t for update", WRITE),
        ("select * from t for share of t nowait", WRITE),
        ("select * from t for no key update skip locked", WRITE),
        ("select * from (select * from t for key share) x", WRITE),
        ("with a as (select * from t for update) select * from a", WRITE),
        ("select nextval('s')", WRITE),
        ("select setval('s', 5)", WRITE),
        ("select pg_catalog.nextval('s')", WRITE),
        ("select random()", WRITE),
        ("select clock_timestamp()", WRITE),
        ("select gen_random_uuid()", WRITE),
        ("select * from t order by random()", WRITE),
        ("select * from t where id = (select nextval('s'))", WRITE),
        ("select coalesce(a, nextval('s')) from t", WRITE),
        ("select sum(a) over (order by nextval('s')) from t", WRITE),
        ("select count(*) filter (where random() < 0.5) from t", WRITE),
        ("select * from generate_series(1, nextval('s'))", WRITE),
        ("select * from t limit nextval('s')", WRITE),
        ("values (nextval('s'))", WRITE),
        ("select case when nextval('s') > 1 then 1 end", WRITE),
        ("select (array[1])[nextval('s')]", WRITE),
        ("select 1 union select nextval('s')", WRITE),
        ("select a from t group by a having random() > 0.5", WRITE),
        ("select * from a join b on random() < 0.1", WRITE),
        ("select * from xmltable('/a' passing query_to_xml('delete from t', true, true, '') columns b int)", WRITE),
        ("select lo_unlink(5)", WRITE),
        ("select pg_notify('a', 'b')", WRITE),
        ("select pg_logical_emit_message(true, 'a', 'b')", WRITE),
        ("select pg_sleep(1)", WRITE),
        ("select pg_terminate_backend(5)", WRITE),
        ("select query_to_xml('delete from t', true, true, '')", WRITE),
        ("notify a, 'b'", WRITE),
        ("lock table t in exclusive mode", WRITE),
        ("truncate t, u cascade", WRITE),
        ("vacuum t", WRITE),
        ("analyze", WRITE),
        ("reindex table t", WRITE),
        ("refresh materialized view m", WRITE),
        ("select 1; insert into t values (1)", WRITE),
        ("insert into t values (1); select 1", WRITE),
        ("set a.b = 1; delete from t", WRITE),
        ("begin; update t set a = 1; commit", WRITE),
        ("copy t from stdin; insert into t values (1)", WRITE),
        // Transactions
        ("begin", transaction(T::Begin { read_only: false })),
        ("BEGIN READ ONLY", transaction(T::Begin { read_only: true })),
        ("begin read write", transaction(T::Begin { read_only: false })),
        ("start transaction isolation level serializable, read only, deferrable", transaction(T::Begin { read_only: true })),
        ("commit", transaction(T::Commit)),
        ("end", transaction(T::Commit)),
        ("commit and chain", transaction(T::Commit)),
        ("rollback", transaction(T::Rollback)),
        ("abort", transaction(T::Rollback)),
        ("savepoint a", transaction(T::Savepoint)),
        ("release a", transaction(T::Savepoint)),
        ("rollback to savepoint a", transaction(T::Savepoint)),
        ("prepare transaction 'x'", transaction(T::Prepared)),
        ("commit prepared 'x'", transaction(T::Prepared)),
        ("rollback prepared 'x'", transaction(T::Prepared)),
        ("begin; select 1; commit", transaction(T::Begin { read_only: false })),
        // Sessions
        ("set search_path to a, b", session(S::Set)),
        ("set local a.b = 'c'", session(S::Set)),
        ("set role x", session(S::Set)),
        ("set session authorization x", session(S::Set)),
        ("set session characteristics as transaction read only", session(S::Set)),
        ("set transaction isolation level serializable", session(S::Set)),
        ("reset all", session(S::Reset)),
        ("reset search_path", session(S::Reset)),
        ("select set_config('a.b', 'c', false)", session(S::Set)),
        ("show search_path", STAYS),
        ("discard all", session(S::DiscardAll)),
        ("discard temp", session(S::Other)),
        ("listen a", session(S::Listen)),
        ("unlisten *", session(S::Unlisten)),
        ("declare c cursor for select 1", session(S::DeclareCursor)),
        ("declare c cursor with hold for select 1", session(S::DeclareHold)),
        ("fetch 5 from c", session(S::DeclareCursor)),
        ("move 5 in c", session(S::DeclareCursor)),
        ("close c", session(S::DeclareCursor)),
        ("prepare p as select 1", session(S::SqlPrepare)),
        ("execute p (1)", session(S::SqlExecute)),
        ("deallocate all", session(S::Deallocate)),
        ("load 'auto_explain'", session(S::Load)),
        ("set constraints all deferred", STAYS),
        ("create temp table x (a int)", session(S::TempTable)),
        ("create table pg_temp.x (a int)", session(S::TempTable)),
        ("create temporary view x as select 1", session(S::TempTable)),
        ("create temp sequence s", session(S::TempTable)),
        ("create temp table x as select 1", session(S::TempTable)),
        ("select 1 into temp x", session(S::TempTable)),
        ("select pg_advisory_lock(1)", session(S::AdvisoryLock)),
        ("select pg_try_advisory_xact_lock(1, 2)", session(S::AdvisoryLock)),
        ("select currval('s')", STAYS),
        ("select pg_export_snapshot()", session(S::Other)),
        // What only this server knows
        ("select * from pg_class", STAYS),
        ("select * from pg_catalog.pg_stat_activity", WRITE.min_of(STAYS)),
        ("select * from information_schema.tables", STAYS),
        ("select version()", STAYS),
        ("select current_setting('work_mem')", STAYS),
        ("select pg_backend_pid()", STAYS),
        ("select txid_current()", STAYS),
        ("select 't'::regclass", STAYS),
        ("select ctid, * from t", STAYS),
        ("select t.xmin from t", STAYS),
        ("select * from pg_temp.x", STAYS),
        ("", STAYS),
        (" ; ", STAYS),
        ("-- nothing", STAYS),
        // COPY
        ("copy t from stdin", COPY),
        ("copy t to stdout", COPY),
        ("copy (select 1) to stdout with (format binary)", COPY),
        ("copy t from program 'ls'", COPY),
        ("set a.b = 1; copy t from stdin", COPY),
        // DDL
        ("create table x (a int default nextval('s'))", DDL),
        ("create table x as select 1", DDL),
        ("select 1 into x", DDL),
        ("alter table t add b int", DDL),
        ("drop table t", DDL),
        ("create index on t (a)", DDL),
        ("create index concurrently i on t (lower(a))", DDL),
        ("create view v as select 1", DDL),
        ("create materialized view v as select 1", DDL),
        ("create or replace function f() returns int language sql as 'select 1'", DDL),
        ("create function f() returns int begin atomic select 1; end", DDL),
        ("create trigger g before insert on t execute function f()", DDL),
        ("create type x as enum ('a')", DDL),
        ("create type x as (a int)", DDL),
        ("alter type x add value 'b'", DDL),
        ("create schema x", DDL),
        ("create extension x", DDL),
        ("create role x", DDL),
        ("alter role x set a.b = 1", DDL),
        ("grant select on t to x", DDL),
        ("grant a to b", DDL),
        ("comment on table t is 'x'", DDL),
        ("alter table t rename to u", DDL),
        ("alter table t owner to x", DDL),
        ("alter table t set schema x", DDL),
        ("create sequence s", DDL),
        ("alter sequence s restart", DDL),
        ("create rule r as on insert to t do nothing", DDL),
        ("create aggregate a (int) (sfunc = x, stype = int)", DDL),
        ("create policy p on t", DDL),
        ("create publication p for all tables", DDL),
        ("create database d", DDL),
        ("alter system set work_mem = 5", DDL),
        ("reassign owned by a to b", DDL),
        ("import foreign schema a from server b into c", DDL),
        ("insert into t values (1); drop table t", DDL),
        ("begin; create table x (); commit", DDL),
        // Unknown
        ("do $$ begin delete from t; end $$", UNKNOWN),
        ("call p()", UNKNOWN),
        ("explain select 1", UNKNOWN),
        ("explain analyze delete from t", UNKNOWN),
        ("select unknown_function(1)", UNKNOWN),
        ("select * from unknown_function()", UNKNOWN),
        ("select 1 <&&&> 2", UNKNOWN),
        ("select '1'::unknown_type", UNKNOWN),
        ("this is not sql", UNKNOWN),
        ("select 1; this is not sql", UNKNOWN),
        ("select 'unterminated", UNKNOWN),
        ("select /* unterminated", UNKNOWN),
        ("select 'a\\' ; delete from t --'", UNKNOWN),
        ("select u&\"a\" uescape '!'", UNKNOWN),
        ("select 1; do 'x'", UNKNOWN),
        ("create table x (); call p()", UNKNOWN),
    ];
    assert!(table.len() >= 120);
    for (text, kind) in table {
        assert_eq!(classifier.classify(text.as_bytes()).kind, kind, "{text}");
    }
}

impl Kind {
    /// The weaker of two: for rows that say "at least not a read".
    fn min_of(self, other: Kind) -> Kind {
        if self.strength() < other.strength() { self } else { other }
    }
}

#[test]
fn kinds_by_catalog() {
    let classifier = with_catalog();
    for (text, kind) in [
        ("select * from t", READ),
        ("select * from public.t", READ),
        ("select stable_fn(a) from t", READ),
        ("select * from v", READ),
        ("select app.writing_fn(a) from t", WRITE),
        ("select * from writing_fn(1)", WRITE),
        ("select * from t where id in (select writing_fn(1))", WRITE),
        ("select * from t order by writing_fn(a)", WRITE),
        ("with a as materialized (select writing_fn(1)) select 1", WRITE),
        ("select * from writing_view", WRITE),
        ("select * from t join writing_view using (id)", WRITE),
        ("select * from matview", STAYS),
        ("select * from far", STAYS),
        ("select * from created_since", STAYS),
        ("with created_since as (select 1) select * from created_since", READ),
        ("with writing_view as (select 1) select * from writing_view", WRITE),
        ("select * from elsewhere.t", STAYS),
        ("insert into t select * from writing_view", WRITE),
    ] {
        assert_eq!(classifier.classify(text.as_bytes()).kind, kind, "{text}");
    }
}

#[test]
fn details() {
    let classifier = with_catalog();
    let class = |text: &str| classifier.classify(text.as_bytes());
    assert!(class("select * from t order by a").ordered);
    assert!(!class("select * from (select * from t order by a) x").ordered);
    for (text, limited) in [
        ("select * from t limit 5", true),
        ("select * from t order by a limit 5", false),
        ("select * from t offset 5", true),
        ("select * from (select * from t limit 1) x order by a", true),
        ("select distinct on (a) * from t", true),
        ("select distinct on (a) * from t order by a, b", false),
        ("select distinct a from t", false),
        ("select * from t tablesample bernoulli (1)", true),
        ("select array_agg(a) from t", true),
        ("select array_agg(a order by a) from t", false),
        ("select row_number() over () from t", true),
        ("select row_number() over (order by a) from t", false),
        ("select count(*) from t", false),
    ] {
        assert_eq!(class(text).limited, limited, "{text}");
    }
    assert_eq!(class("select * from t a, public.t, t b, (with c as (select 1) select * from c) d").tables, ["t", "public.t"]);
    assert_eq!(class("insert into t select * from v").tables, ["t", "v"]);
    assert!(class("insert into t values (1) returning a").returns_rows);
    assert!(!class("insert into t values (1)").returns_rows);
    assert!(class("select 1").single && !class("select 1; select 2").single && !class("").single);
    assert_eq!(class("set a.b = 1; listen c; set d.e = 2").session_effects, [S::Set, S::Listen]);
    for text in ["set local a.b = 1", "show a.b", "set transaction read only", "select pg_advisory_xact_lock(1)", "fetch c", "select 1"] {
        assert!(class(text).session_effects.is_empty(), "{text}");
    }
    assert_eq!(class("insert into t select set_config('a.b', 'c', false)").session_effects, [S::Set]);
}

#[test]
fn what_may_be_rehearsed() {
    let classifier = with_catalog();
    for (text, rehearsable) in [
        ("insert into t values (1)", true),
        ("insert into t values (nextval('s'), gen_random_uuid(), now(), random())", true),
        ("update t set a = 1 returning *", true),
        ("delete from t", true),
        ("merge into t using v on t.a = v.a when matched then delete", true),
        ("select * from t for update", true),
        ("with x as (delete from t returning a) select * from x", true),
        ("insert into t select writing_fn(1)", true),
        ("select writing_fn(1)", false),
        ("select nextval('s')", true),
        ("notify a", false),
        ("copy t from program 'x'", false),
        ("do 'x'", false),
        ("call p()", false),
        ("insert into t select dblink_exec('x', 'y')", false),
        ("insert into t select lo_import('x')", false),
        ("insert into t select pg_advisory_xact_lock(1)", false),
        ("insert into t select setval('s', 1)", false),
        ("insert into t select pg_terminate_backend(1)", false),
        ("insert into t select unknown_function(1)", false),
        ("insert into far values (1)", false),
        ("insert into created_since values (1)", false),
        ("vacuum t", false),
        ("truncate t", false),
        ("alter table t add x int", false),
        ("insert into t values (1); insert into t values (2)", false),
        ("lock t", false),
    ] {
        let class = classifier.classify(text.as_bytes());
        assert_eq!(class.rehearsable, rehearsable, "{text}: {class:?}");
        if matches!(class.kind, WRITE) {
            assert_eq!(class.left_out.is_none(), rehearsable, "{text}: {class:?}");
        }
    }
}

#[test]
fn literals_and_comments_share_an_entry() {
    let classifier = builtin();
    let first = classifier.classify(b"select * from t where a = 1 and b = 'x'");
    for text in [
        "select * from t where a = 99 and b = 'it''s'",
        "select * from t  where a = 2 /* traceparent=1 */ and b = $$y$$",
        "/* c */ select * from t where a = 2\tand b = E'\\''",
        "select * from t where a = 1 and b = 'x';",
    ] {
        let again = classifier.cached(text.as_bytes());
        assert!(again.is_some_and(|again| Arc::ptr_eq(&again, &first)), "{text}");
    }
    for text in [
        "select * from t where a = 1.5 and b = 'x'",
        "select * from t where a = 'x' and b = 1",
        "select * from u where a = 1 and b = 'x'",
        "select * from t where a = 1 and b = null",
        "select * from t where a = 1 and b = b'1'",
        "select * from \"t\" where a = 1 and b = 'x'",
    ] {
        assert!(classifier.cached(text.as_bytes()).is_none(), "{text}");
    }
    assert_eq!(&*first.text, "select * from t where a = $1 and b = $2");
    assert_eq!(&*classifier.classify(b"select $2, 5, $1").text, "select $2, $3, $1");
    assert_eq!(&*classifier.classify(b"create role x password 'secret'").text, "create role x password $1");
    let long = format!("select {}", "abcdef, ".repeat(100));
    assert_eq!(classifier.classify(long.as_bytes()).text.chars().count(), TEXT_CHARS_MAX);
}

#[test]
fn new_facts_empty_the_cache() {
    let classifier = builtin();
    assert_eq!(classifier.classify(b"select later()").kind, UNKNOWN);
    classifier.replace_facts(CatalogFacts::builtin_only().with(&[("later", false)], &[]));
    assert!(classifier.cached(b"select later()").is_none());
    assert_eq!(classifier.classify(b"select later()").kind, READ);
}

#[test]
fn the_cache_is_bounded() {
    let classifier = builtin();
    for number in 0..20_100 {
        classifier.classify(format!("select a{number}").as_bytes());
    }
    assert!(classifier.cached(b"select a5").is_none());
    assert!(classifier.cached(b"select a20099").is_some());
}

/// As in a tokio worker: 2 MiB of stack. Each text returns; none overflows.
#[test]
fn hostile_nesting_returns() {
    let run = || {
        let classifier = builtin();
        for count in [1, 10, 40, 60, 100, 119, 121, 500, 4_000, 20_000] {
            for text in [
                format!("select 1{}", "+1".repeat(count)),
                format!("select a{}", " or a=1 and b".repeat(count)),
                format!("select {}1{}", "(".repeat(count), ")".repeat(count)),
                format!("select {}1{}", "case when a then ".repeat(count), " end".repeat(count)),
                format!("select {}1", "- ".repeat(count)),
                format!("select {}true", "not ".repeat(count)),
                format!("select 1{}", " union select 1".repeat(count)),
                format!("select a{}", "::int".repeat(count)),
                format!("select {}", "f(".repeat(count)),
                format!("select * from a{}", " join a using (b)".repeat(count)),
                format!("select {}1{}", "(select ".repeat(count), ")".repeat(count)),
                format!("insert into t values {}(1)", "(1),".repeat(count)),
                "begin;".repeat(count),
            ] {
                let class = classifier.classify(text.as_bytes());
                assert!(matches!(class.kind, READ | WRITE | UNKNOWN | Kind::Transaction(_)), "{}", text.get(..40).unwrap_or(&text));
            }
        }
    };
    std::thread::Builder::new().stack_size(2 << 20).spawn(run).unwrap().join().unwrap();
}

#[test]
fn too_long_and_not_utf8_pass_unclassified() {
    let classifier = builtin();
    assert_eq!(classifier.classify(b"select '\xff'").kind, UNKNOWN);
    assert_eq!(classifier.classify(format!("select '{}'", "x".repeat(300_000)).as_bytes()).kind, UNKNOWN);
    // On the parser threads, which other tests keep busy: late at most.
    let long = format!("select '{}'", "x".repeat(200_000));
    while classifier.cached(long.as_bytes()).is_none() {
        classifier.classify(long.as_bytes());
    }
    assert_eq!(classifier.classify(long.as_bytes()).kind, READ);
    let tag = "a".repeat(100_000);
    assert_eq!(classifier.classify(format!("select ${tag}${tag}").as_bytes()).kind, UNKNOWN);
}

/// `?` becomes a literal of the kind that its digit says.
fn fill(template: &str, values: &[(u32, String)]) -> String {
    let mut text = String::new();
    let mut values = values.iter().cycle();
    for part in template.split_inclusive('?') {
        text.push_str(part.trim_end_matches('?'));
        if part.ends_with('?') {
            let (number, string) = values.next().unwrap();
            match number % 4 {
                0 => text.push_str(&number.to_string()),
                1 => text.push_str(&format!("{number}.5e3")),
                2 => text.push_str(&format!("'{}'", string.replace('\'', "''").replace('\\', ""))),
                _ => text.push_str(&format!("$q${}$q$", string.replace('$', ""))),
            }
        }
    }
    text
}

const TEMPLATES: [&str; 12] = [
    "select ? from t where a = ? and b in (?, ?) -- c\n limit ?",
    "select -? , a - ?, - ?::int, ?::numeric(10)",
    "insert into t (a, b) values (?, ?), (?, ?) returning ?",
    "update t set a = ? where b = ? or c like ?",
    "with x as (select ? as a) delete from t using x where t.a = ?",
    "select f(?, a[?], x => ?) from generate_series(?, ?)",
    "select case when a = ? then ? else ? end order by ?",
    "select interval ?, date ?, ?::varchar(?), cast(? as float(?))",
    "select ?; insert into t values (?)",
    "set a.b = ?",
    "select nextval(?), float(?), array[?, ?]",
    "execute p(?, ?)",
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Equal keys, equal classes: what the cache relies on.
    #[test]
    fn equal_keys_mean_equal_classes(
        template in 0..TEMPLATES.len(),
        a in proptest::collection::vec((0u32..5000, "[a-z'\\\\ é;-]{0,8}"), 1..5),
        b in proptest::collection::vec((0u32..5000, "[a-z'\\\\ é;-]{0,8}"), 1..5),
    ) {
        let (one, two) = (fill(TEMPLATES[template], &a), fill(TEMPLATES[template], &b));
        let (mut key_one, mut key_two) = (Vec::new(), Vec::new());
        let (shape_one, shape_two) = (normalise::normalise(&one, &mut key_one), normalise::normalise(&two, &mut key_two));
        if shape_one.is_ok() && shape_two.is_ok() && key_one == key_two {
            let facts = CatalogFacts::builtin_only();
            let shown: Arc<str> = Arc::from("");
            prop_assert_eq!(analyse::class(&one, shown.clone(), &facts), analyse::class(&two, shown, &facts), "{}\n{}", one, two);
        }
    }

    /// The key of a text in which only literals of the same kind differ is the same.
    #[test]
    fn same_kinds_of_literals_give_one_key(template in 0..TEMPLATES.len(), a in "[a-z' é;-]{0,8}", b in "[a-z' é;-]{0,8}") {
        let (mut key_one, mut key_two) = (Vec::new(), Vec::new());
        normalise::normalise(&fill(TEMPLATES[template], &[(2, a)]), &mut key_one).unwrap();
        normalise::normalise(&fill(TEMPLATES[template], &[(2, b)]), &mut key_two).unwrap();
        prop_assert_eq!(key_one, key_two);
    }

    /// A text and the canonical text of its key are the same to the grammar. As all texts with one key share that canonical
    /// text, a key never stands for two classes.
    #[test]
    fn a_key_keeps_the_structure(pieces in proptest::collection::vec(
        "(select |from |where |t |a |b|'x''y'|'a\\\\b'|E'q\\\\'r'|\\$\\$ ; \\$\\$|\\$a\\$'\\$a\\$|/\\* ' \\*/|-- '\n|\n|5|2147483648|1\\.5|\\.5|1e3|1\\.|0xF|1_0|b'01'|x'f'|N'n'|U&'u'|-|- |\\+|\\*|=|,|, |\\(|\\)|\\[|\\]|:|::|int|float\\(|varchar\\(| |;|\"q\"|\\$1|@|<|insert into t values \\(|interval |create table x as |comment on table t is |limit |in \\()", 1..14)) {
        let text = format!("select {}", pieces.concat());
        let mut key = Vec::new();
        if normalise::normalise(&text, &mut key).is_ok() {
            let (facts, shown): (_, Arc<str>) = (CatalogFacts::builtin_only(), Arc::from(""));
            let canonical = normalise::refill(&key);
            let (one, two) = (analyse::class(&text, shown.clone(), &facts), analyse::class(&canonical, shown, &facts));
            // What is no SQL may share a key with what is: the server refuses it, whatever it was taken for.
            if one.is_some() {
                prop_assert_eq!(one, two, "{}\n{}", text, canonical);
            }
        }
    }

    #[test]
    fn any_bytes_have_a_class(bytes: Vec<u8>) {
        builtin().classify(&bytes);
    }

    #[test]
    fn any_soup_of_tokens_has_a_class(tokens in proptest::collection::vec("select|from|t|'|\"|\\$\\$|\\$a\\$|/\\*|\\*/|--|\n|E'|\\\\|1|\\.|e5|0x|_|;|\\(|\\)|,|::|u&|case|insert into|é|\\$1| ", 0..40)) {
        builtin().classify(tokens.concat().as_bytes());
    }
}
