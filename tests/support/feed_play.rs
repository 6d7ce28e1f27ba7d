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
        copy_workers: 2,
    }
}

pub fn start(spec: &FeedSpec, start: Start, repository: &Repository) -> Feed {
    let adapter = Adapter::new(spec.database.clone(), spec.shadow.clone(), repository.clone(), Arc::new(ArcSwap::from_pointee(0.95)));
    Feed::start(spec.clone(), start, Arc::new(adapter), repository.clone(), Fault::default())
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

/// A seed from `UNDERSTUDY_SEED`, or a fresh one; printed, so that a failure can be played again.
pub fn seed(test: &str) -> u64 {
    let seed = std::env::var("UNDERSTUDY_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(|| fastrand::u64(..));
    println!("{test}: UNDERSTUDY_SEED={seed}");
    seed
}

/// How many rounds: `UNDERSTUDY_ROUNDS`, or a few that fit into `make test`.
pub fn rounds(few: usize) -> usize {
    std::env::var("UNDERSTUDY_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(few)
}
