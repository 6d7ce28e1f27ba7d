//! The initial copy of one big table and of many tables, schema, indexes and rows: by our feed and by four peers.

use super::{
    Figures, Outcome, Settings,
    place::{PATIENCE, Place, start, text, until, value},
};
use std::time::{Duration, Instant};
use understudy::cdc::{self, Start};

const METHODS: [&str; 5] = ["understudy", "pg_dump | psql", "pg_dump -j | pg_restore -j", "pgcopydb", "native subscription"];

pub async fn prepare(place: &Place, settings: &Settings) -> Outcome<()> {
    let source = place.on_source("postgres").await?;
    for database in ["big", "many"] {
        source.batch_execute(&format!("CREATE DATABASE {database}")).await.map_err(text)?;
    }
    let row = "g AS id, g % 1000 AS kind, md5(g::text) AS name, now() AS at, (g * 1.5)::numeric(12, 2) AS price, repeat('x', 60) AS filler";
    let big = place.on_source("big").await?;
    big.batch_execute(&format!(
        "CREATE TABLE big AS SELECT {row} FROM generate_series(1, {}) g; ALTER TABLE big ADD PRIMARY KEY (id); CREATE INDEX ON big (name)",
        settings.rows
    ))
    .await
    .map_err(text)?;
    // Not in the batch: that is one transaction.
    big.batch_execute("VACUUM ANALYZE big").await.map_err(text)?;
    let many = place.on_source("many").await?;
    for number in 0..settings.tables {
        many.batch_execute(&format!(
            "CREATE TABLE t{number} AS SELECT {row} FROM generate_series(1, {}) g; ALTER TABLE t{number} ADD PRIMARY KEY (id)",
            (settings.rows / settings.tables.max(1) / 2).max(10)
        ))
        .await
        .map_err(text)?;
    }
    many.batch_execute("VACUUM ANALYZE").await.map_err(text)
}

pub async fn round(place: &Place, round: u64, figures: &mut Figures) -> Outcome<()> {
    println!("copy, round {}", round + 1);
    for database in ["big", "many"] {
        let part = if database == "big" { "copy of one big table" } else { "copy of many tables" };
        for turn in 0..METHODS.len() {
            let Some(method) = METHODS.get((turn + round as usize) % METHODS.len()) else { continue };
            place.fresh("copied").await?;
            for server in [&place.source, &place.target] {
                server.connect("postgres").await.map_err(text)?.batch_execute("CHECKPOINT").await.map_err(text)?;
            }
            let Some(seconds) = one(place, method, database).await? else {
                println!("  pgcopydb is not installed (apt-get install pgcopydb): left out");
                continue;
            };
            figures.add(part, method, "seconds", seconds.as_secs_f64());
            compare(place, database, method).await?;
            place.on_target("postgres").await?.batch_execute("DROP DATABASE copied WITH (FORCE)").await.map_err(text)?;
        }
    }
    Ok(())
}

async fn one(place: &Place, method: &str, database: &str) -> Outcome<Option<Duration>> {
    let begun = Instant::now();
    match method {
        "understudy" => {
            let spec = place.spec(database, "copied");
            let feed = start(&spec, Start::Copy)?;
            while !feed.state().copy.done {
                let state = feed.state().state;
                if state.starts_with("failed") || begun.elapsed() > PATIENCE {
                    return Err(format!("the copy does not end: {state}"));
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            let taken = begun.elapsed();
            feed.stop().await;
            cdc::disarm(&spec).await.map_err(text)?;
            return Ok(Some(taken));
        }
        "pg_dump | psql" => {
            place.run(&format!("pg_dump -p $S {database} | psql -q -X -o /dev/null -v ON_ERROR_STOP=1 -p $T copied")).await?;
        }
        "pg_dump -j | pg_restore -j" => {
            let script = format!(
                "rm -rf $TMP_FOLDER; trap 'rm -rf $TMP_FOLDER' EXIT; pg_dump -p $S -Fd -j2 -Z0 -f $TMP_FOLDER {database}; pg_restore -p $T -j2 -d copied $TMP_FOLDER"
            );
            place.run(&script).await?;
        }
        "pgcopydb" => {
            if std::process::Command::new("pgcopydb").arg("--version").output().is_err() {
                return Ok(None);
            }
            let script = format!(
                "rm -rf $TMP_FOLDER; trap 'rm -rf $TMP_FOLDER' EXIT; pgcopydb clone --no-owner --no-acl --no-comments --table-jobs 2 --index-jobs 2 --dir $TMP_FOLDER \
                 --source \"postgres://postgres@127.0.0.1:$S/{database}\" --target \"postgres://postgres@127.0.0.1:$T/copied\" > /dev/null"
            );
            place.run(&script).await?;
        }
        _ => {
            // A subscription copies rows only: the tables with their keys come first.
            place.run(&format!("pg_dump -s -p $S {database} | psql -q -X -o /dev/null -v ON_ERROR_STOP=1 -p $T copied")).await?;
            let (owner, follower) = (place.on_source(database).await?, place.on_target("copied").await?);
            owner.batch_execute("CREATE PUBLICATION everything FOR ALL TABLES").await.map_err(text)?;
            follower
                .batch_execute(&format!("CREATE SUBSCRIPTION copying CONNECTION '{}' PUBLICATION everything", place.source_words(database)))
                .await
                .map_err(text)?;
            // `s` and `r`: the rows are there, and only the changes since then are left.
            until(&follower, "the native copy", "SELECT bool_and(srsubstate IN ('s', 'r')) FROM pg_subscription_rel").await?;
            let taken = begun.elapsed();
            follower.batch_execute("DROP SUBSCRIPTION copying").await.map_err(text)?;
            owner.batch_execute("DROP PUBLICATION everything").await.map_err(text)?;
            return Ok(Some(taken));
        }
    }
    Ok(Some(begun.elapsed()))
}

/// Nobody's figure counts unless rows and indexes are there.
async fn compare(place: &Place, database: &str, method: &str) -> Outcome<()> {
    let tables = "SELECT count(*) || ' tables, ' || (SELECT count(*) FROM pg_indexes WHERE schemaname = 'public') || ' indexes' FROM pg_tables WHERE schemaname = 'public'";
    let rows = if database == "big" { "SELECT count(*) || '/' || sum(id) FROM big" } else { "SELECT count(*) || '/' || sum(id) FROM t0" };
    let (owner, follower) = (place.on_source(database).await?, place.on_target("copied").await?);
    for sql in [tables, rows] {
        let (wanted, found) = (value(&owner, sql).await?, value(&follower, sql).await?);
        if wanted != found {
            return Err(format!("{method} left {found} instead of {wanted}"));
        }
    }
    Ok(())
}
