//! What the feed's tests share: starting a feed, waiting for conditions, comparing both sides.
#![allow(dead_code)]

use super::servers::Server;
use arc_swap::ArcSwap;
use futures_util::TryStreamExt;
use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio_postgres::Client;
use understudy::{
    cdc::{Direction, Fault, Feed, FeedSpec, Start},
    lsn::Lsn,
    metadata::Repository,
    schema::Adapter,
};

/// Longest wait for a condition: generous, because the machine may be slow and busy.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub fn spec(from: &Server, to: &Server, database: &str) -> FeedSpec {
    FeedSpec {
        database: database.into(),
        shadow: "copy".into(),
        direction: Direction::Forward,
        from: from.url(database),
        to: to.url(database),
        rules: Default::default(),
        copy: understudy::config::CopyConfig::default(),
    }
}

pub fn start(spec: &FeedSpec, start: Start, repository: &Repository) -> Feed {
    start_faulty(spec, start, repository, &Fault::default())
}

/// A feed whose faults the test sets.
pub fn start_faulty(spec: &FeedSpec, start: Start, repository: &Repository, fault: &Fault) -> Feed {
    let adapter = Adapter::new(spec.database.clone(), spec.shadow.clone(), repository.clone(), Arc::new(ArcSwap::from_pointee(0.95)));
    Feed::start(spec.clone(), start, Arc::new(adapter), repository.clone(), fault.clone())
}

pub async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < deadline, "{what} did not happen");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub async fn streaming(feed: &Feed) {
    let (deadline, mut tried) = (Instant::now() + PATIENCE, String::new());
    while !feed.is_streaming() {
        let state = feed.state().state;
        assert!(!state.starts_with("failed"), "{state}");
        if state.starts_with("retrying") {
            tried = state;
        }
        assert!(Instant::now() < deadline, "streaming did not happen: {:?}; before: {tried}", feed.state());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub async fn position(client: &Client) -> Lsn {
    client.query_one("SELECT pg_current_wal_insert_lsn()::text", &[]).await.unwrap().get::<_, &str>(0).parse().unwrap()
}

pub async fn catch_up(feed: &Feed, owner: &Client) {
    let lsn = position(owner).await;
    feed.wait_applied(lsn, PATIENCE).await.unwrap_or_else(|error| panic!("{error}; {:?}", feed.state()));
}

/// Every row of every user table and materialized view, ordered, as COPY text.
pub async fn contents(client: &Client) -> BTreeMap<String, String> {
    client.batch_execute("SET timezone = 'UTC'; SET extra_float_digits = 3; SET intervalstyle = 'postgres'").await.unwrap();
    let tables = client
        .query(
            "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
             WHERE c.relkind IN ('r', 'm') AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'understudy') AND n.nspname !~ '^pg_'",
            &[],
        )
        .await
        .unwrap();
    let mut all = BTreeMap::new();
    for row in &tables {
        let table: String = row.get(0);
        let stream =
            client.copy_out(&format!("COPY (SELECT * FROM ONLY {table} t ORDER BY t::text COLLATE \"C\") TO STDOUT")).await.unwrap();
        let chunks: Vec<bytes::Bytes> = stream.try_collect().await.unwrap();
        all.insert(table, String::from_utf8(chunks.concat()).unwrap());
    }
    all
}

/// The first line in which two texts differ, for a message that one can read.
pub fn first_difference(left: &str, right: &str) -> String {
    let (mut a, mut b) = (left.lines(), right.lines());
    loop {
        match (a.next(), b.next()) {
            (None, None) => return "no difference".into(),
            (x, y) if x == y => {}
            (x, y) => {
                let cut = |line: Option<&str>| line.map_or("(nothing)".to_owned(), |line| line.chars().take(300).collect());
                return format!("owner:    {}\nfollower: {}", cut(x), cut(y));
            }
        }
    }
}

pub async fn assert_equal(owner: &Client, follower: &Client, when: &str) {
    let (left, right) = (contents(owner).await, contents(follower).await);
    assert_eq!(left.keys().collect::<Vec<_>>(), right.keys().collect::<Vec<_>>(), "{when}");
    for (table, rows) in &left {
        assert!(
            rows == &right[table],
            "{when}: {table} differs: {} against {} rows\n{}",
            rows.lines().count(),
            right[table].lines().count(),
            first_difference(rows, &right[table])
        );
    }
}

/// A seed from `UNDERSTUDY_SEED` (a number, or `random`), or always the same; printed, so that a failure can be played again.
pub fn seed(test: &str) -> u64 {
    let seed = match std::env::var("UNDERSTUDY_SEED") {
        Ok(text) if text == "random" => fastrand::u64(..),
        Ok(text) => text.parse().expect("UNDERSTUDY_SEED is a number, or random"),
        Err(_) => 20_261_123, // `make test` plays the same every time; long runs look further
    };
    println!("{test}: UNDERSTUDY_SEED={seed}");
    seed
}

/// How many rounds: `UNDERSTUDY_ROUNDS`, or a few that fit into `make test`.
pub fn rounds(few: usize) -> usize {
    std::env::var("UNDERSTUDY_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(few)
}

/// The catalog as text, without oids: what pg_dump would say, by name.
pub async fn catalog(client: &Client) -> Vec<String> {
    client.batch_execute("SET search_path = pg_catalog").await.unwrap();
    let deadline = Instant::now() + PATIENCE;
    loop {
        // An object may go while the catalog is read.
        match try_catalog(client).await {
            Ok(lines) => return lines,
            Err(error) => assert!(Instant::now() < deadline, "{error:?}"),
        }
    }
}

async fn try_catalog(client: &Client) -> Result<Vec<String>, tokio_postgres::Error> {
    let rows = client
        .query(
            "SELECT x FROM (
               SELECT 'index ' || i.indexrelid::regclass || ' ' || pg_get_indexdef(i.indexrelid) || i.indisvalid::text || i.indisclustered || i.indisreplident AS x, c.relnamespace
               FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
               UNION ALL SELECT 'constraint ' || k.conrelid::regclass || ' ' || k.conname || ' ' || pg_get_constraintdef(k.oid) || k.convalidated, k.connamespace
               FROM pg_constraint k WHERE k.conrelid <> 0 AND k.contype <> 'n'
               UNION ALL SELECT 'trigger ' || tgrelid::regclass || ' ' || pg_get_triggerdef(t.oid), c.relnamespace FROM pg_trigger t JOIN pg_class c ON c.oid = tgrelid WHERE NOT tgisinternal
               UNION ALL SELECT 'rule ' || pg_get_ruledef(r.oid), c.relnamespace FROM pg_rewrite r JOIN pg_class c ON c.oid = ev_class WHERE rulename <> '_RETURN'
               UNION ALL SELECT 'policy ' || polname || pg_get_expr(polqual, polrelid), c.relnamespace FROM pg_policy JOIN pg_class c ON c.oid = polrelid
               UNION ALL SELECT 'statistics ' || pg_get_statisticsobjdef(oid), stxnamespace FROM pg_statistic_ext
               UNION ALL SELECT 'comment ' || (pg_identify_object(classoid, objoid, objsubid)).identity || ' ' || description, (SELECT oid FROM pg_namespace WHERE nspname = 'public')
               FROM pg_description WHERE objoid >= 16384 AND classoid <> 'pg_extension'::regclass AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = classoid AND d.objid = objoid AND d.deptype = 'e')
                 AND (pg_identify_object(classoid, objoid, objsubid)).identity !~ 'understudy'
               UNION ALL SELECT 'relation ' || c.oid::regclass || ' ' || c.relkind::text || c.relpersistence::text || ' ' || pg_get_userbyid(relowner) || relrowsecurity || coalesce((SELECT string_agg(privilege_type || ' ' || grantee::regrole, ',' ORDER BY privilege_type) FROM aclexplode(relacl) WHERE grantee <> relowner), ''), relnamespace
               FROM pg_class c WHERE c.relkind IN ('r', 'p', 'v', 'm', 'S', 'f')
               UNION ALL SELECT 'column ' || attrelid::regclass || ' ' || attname || ' ' || format_type(atttypid, atttypmod) || ' ' || attnotnull || attidentity::text || attgenerated::text
                 || coalesce((SELECT collname FROM pg_collation k WHERE k.oid = attcollation AND k.oid >= 16384), '') || coalesce(pg_get_expr(d.adbin, d.adrelid), ''), c.relnamespace
               FROM pg_attribute a JOIN pg_class c ON c.oid = attrelid LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
               WHERE attnum > 0 AND NOT attisdropped AND c.relkind IN ('r', 'p', 'v', 'm')
               UNION ALL SELECT 'parent ' || inhrelid::regclass || ' ' || inhparent::regclass || ' ' || coalesce(pg_get_expr(c.relpartbound, c.oid), ''), c.relnamespace FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid
               UNION ALL SELECT 'schema ' || nspname || pg_get_userbyid(nspowner) || coalesce(nspacl::text, ''), oid FROM pg_namespace WHERE nspname <> 'public'
               UNION ALL SELECT 'function ' || p.oid::regprocedure || md5(prosrc), pronamespace FROM pg_proc p WHERE NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')
               UNION ALL SELECT 'extension ' || extname, extnamespace FROM pg_extension
               UNION ALL SELECT 'type ' || format_type(t.oid, NULL) || coalesce((SELECT string_agg(enumlabel, ',' ORDER BY enumsortorder) FROM pg_enum WHERE enumtypid = t.oid), ''), typnamespace
                 FROM pg_type t LEFT JOIN pg_class k ON k.oid = t.typrelid WHERE (t.typtype IN ('e', 'd') OR k.relkind = 'c') AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = t.oid AND d.deptype = 'e')
             ) all_of_it JOIN pg_namespace n ON n.oid = relnamespace
             WHERE n.nspname !~ '^(pg_|information_schema|understudy)' ORDER BY 1",
            &[],
        )
        .await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Both sides have the same schema. Returns how many lines of it there are.
pub async fn assert_same_catalog(owner: &Client, follower: &Client, when: &str) -> usize {
    let (left, right) = (catalog(owner).await, catalog(follower).await);
    let differences: Vec<_> = left
        .iter()
        .filter(|line| !right.contains(line))
        .map(|line| format!("owner only: {line}"))
        .chain(right.iter().filter(|line| !left.contains(line)).map(|line| format!("follower only: {line}")))
        .collect();
    assert!(differences.is_empty(), "{when}:\n{}", differences.join("\n"));
    left.len()
}
