//! The schema of a copy: its first half before the rows, in one transaction; its second half (indexes, constraints, triggers)
//! after them, each entry remembered with what it makes, indexes of different tables at the same time.

use super::{
    CdcError,
    dump::{self, Entry},
    error::{Attempt, Blame, blame, describe},
    names::{SCHEMA, qualified},
    session,
    shared::Shared,
};
use crate::{lsn::Lsn, metadata::Severity};
use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};
use tokio::sync::{RwLock, Semaphore};
use tokio_postgres::{Client, error::SqlState};

/// Memory for building one index: more is faster up to about here, and there are a few at a time.
const INDEX_MEMORY: &str = "256MB";

/// Catalogs whose new rows are the objects that a restore made.
const CATALOGS: &[&str] = &["pg_namespace", "pg_extension", "pg_class", "pg_type", "pg_proc", "pg_collation", "pg_operator"];

/// Runs the first half of the schema in one transaction that also writes down what it made, keeps the second half for later, and
/// stores the position: from here on an interrupted copy goes on.
pub(super) async fn restore(shared: &Shared, first: &str, second: &str, consistent: Lsn) -> Result<(), CdcError> {
    let client = session::connect_writer(&shared.spec.to, "copy schema").await?;
    let list = |body: &dyn Fn(&str) -> String| CATALOGS.iter().map(|c| body(c)).collect::<Vec<_>>().join(" UNION ALL ");
    let everything = list(&|catalog| format!("SELECT 'pg_catalog.{catalog}'::regclass::oid AS catalog, oid FROM pg_catalog.{catalog}"));
    // The temporary schema itself must not count as new.
    client.batch_execute("CREATE TEMP TABLE understudy_before (catalog oid, oid oid)").await.attempt("prepare the follower")?;
    client.batch_execute(&format!("BEGIN; INSERT INTO pg_temp.understudy_before {everything};")).await.attempt("prepare the follower")?;
    client.batch_execute(first).await.map_err(|source| match source.code() {
        Some(&SqlState::FEATURE_NOT_SUPPORTED | &SqlState::UNDEFINED_FILE) => CdcError::Setup(format!(
            "the follower cannot take the owner's schema: {}. Install the missing extension on the follower's machine; nothing was \
             changed there",
            describe(&source)
        )),
        _ => CdcError::Setup(format!(
            "the follower did not take the owner's schema: {}. Give the shadow an empty database, or drop what is in the way; \
             nothing was changed there",
            describe(&source)
        )),
    })?;
    client
        .execute(
            &format!(
                "INSERT INTO understudy.copied_table (feed, kind, ident)
                 SELECT $1, o.type, o.identity FROM ({everything}) a, LATERAL pg_catalog.pg_identify_object(a.catalog, a.oid, 0) o
                 WHERE NOT EXISTS (SELECT FROM pg_temp.understudy_before b WHERE b.catalog = a.catalog AND b.oid = a.oid)
                   AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d
                     WHERE d.classid = a.catalog AND d.objid = a.oid AND d.deptype IN ('i', 'e', 'P', 'S'))
                   AND o.type IN ('schema', 'extension', 'table', 'view', 'materialized view', 'sequence', 'foreign table', 'type',
                     'function', 'procedure', 'aggregate', 'collation', 'operator')
                   AND coalesce(o.schema, '') !~ '^pg_' AND coalesce(o.name, '') !~ '^pg_'
                 ORDER BY a.oid"
            ),
            &[&shared.feed],
        )
        .await
        .attempt("write down what the copy made")?;
    client
        .execute("INSERT INTO understudy.copy_schema (feed, post_data) VALUES ($1, $2)", &[&shared.feed, &second])
        .await
        .attempt("keep the second half of the schema")?;
    client
        .execute(
            "UPDATE understudy.progress SET phase = 'loading', commit_lsn = $2::text::pg_lsn, end_lsn = $2::text::pg_lsn, at = now()
             WHERE feed = $1",
            &[&shared.feed, &consistent.to_string()],
        )
        .await
        .attempt("store the feed's progress")?;
    client.batch_execute("COMMIT").await.attempt("create the schema on the follower")
}

/// Builds what the second half of the schema says, in its order: indexes and constraints of different tables at the same time.
pub(super) async fn build(shared: &Shared, follower: &Client) -> Result<(), CdcError> {
    let feed = &shared.feed;
    let text: String = follower
        .query_one("SELECT post_data FROM understudy.copy_schema WHERE feed = $1", &[feed])
        .await
        .attempt("read the second half of the schema")?
        .get(0);
    let done: BTreeSet<i32> = follower
        .query("SELECT entry FROM understudy.copy_step WHERE feed = $1", &[feed])
        .await
        .attempt("read how far the copy came")?
        .iter()
        .map(|row| row.get(0))
        .collect();
    let (preamble, entries) = dump::entries(&text);
    let todo: Vec<(i32, Entry<'_>)> = (0_i32..).zip(entries).filter(|(number, _)| !done.contains(number)).collect();
    let workers = shared.spec.copy.workers.max(1);
    let mut sessions = Vec::with_capacity(workers);
    for _ in 0..workers.min(todo.len().max(1)) {
        let client = session::connect_writer(&shared.spec.to, "copy schema").await?;
        client.batch_execute(&format!("{preamble}\nSET maintenance_work_mem = '{INDEX_MEMORY}'")).await.attempt("set up a session")?;
        sessions.push(client);
    }
    for batch in todo.chunk_by(|(_, a), (_, b)| a.builds_on_one_table() && b.builds_on_one_table()) {
        build_batch(shared, &sessions, batch).await?;
    }
    Ok(())
}

/// Entries that do not need each other. Indexes of one table can be built beside each other; a constraint has its table alone.
async fn build_batch(shared: &Shared, sessions: &[Client], batch: &[(i32, Entry<'_>)]) -> Result<(), CdcError> {
    let mut tables: HashMap<&str, Arc<RwLock<()>>> = HashMap::new();
    for (_, entry) in batch {
        tables.entry(entry.table().unwrap_or_default()).or_default();
    }
    let free = Semaphore::new(sessions.len());
    let idle = std::sync::Mutex::new(sessions.iter().collect::<Vec<_>>());
    let builds = batch.iter().map(|(number, entry)| {
        let (free, idle) = (&free, &idle);
        let table = entry.table().and_then(|table| tables.get(table)).map(Arc::clone);
        async move {
            // The table first: who waits for it must not keep a session from others.
            let (_alone, _beside) = match (&table, entry.is_index()) {
                (Some(table), false) => (Some(table.write().await), None),
                (Some(table), true) => (None, Some(table.read().await)),
                (None, _) => (None, None),
            };
            let _permit = free.acquire().await.map_err(|_| CdcError::Protocol("the copy ended".into()))?;
            let session = super::shared::lock(idle).pop().ok_or_else(|| CdcError::Protocol("no session is free".into()))?;
            let result = build_one(shared, session, *number, entry).await;
            super::shared::lock(idle).push(session);
            result
        }
    });
    futures_util::future::try_join_all(builds).await.map(|_: Vec<()>| ())
}

/// One entry and the note that it is done. What the follower refuses is told to a person, and the others go on: the rows are right
/// without it, and SHOW DRIFT shows what is missing.
async fn build_one(shared: &Shared, session: &Client, number: i32, entry: &Entry<'_>) -> Result<(), CdcError> {
    let note = format!("INSERT INTO {SCHEMA}.copy_step (feed, entry) VALUES ({}, {number})", super::names::literal(&shared.feed));
    let Err(source) = session.batch_execute(&format!("BEGIN;\n{}\n;{note}; COMMIT", entry.sql)).await else { return Ok(()) };
    let reason = describe(&source);
    if blame(&source) == Blame::Moment {
        return Err(CdcError::Postgres { what: format!("build {} {}", entry.kind.to_lowercase(), entry.name), source });
    }
    session.batch_execute("ROLLBACK").await.attempt("undo on the follower")?;
    session.batch_execute(&note).await.attempt("store how far the copy came")?;
    shared.event(
        Severity::Alert,
        "the follower refused a part of the owner's schema: make it there by hand, or take the cause away on the owner",
        serde_json::json!({"kind": entry.kind, "name": entry.name, "reason": reason}),
    );
    Ok(())
}

/// Gathers statistics of every table, as many at a time as there are workers: without them the first queries are slow. A table
/// that is gone is no error.
pub(super) async fn analyze(shared: &Shared, follower: &Client) -> Result<(), CdcError> {
    let rows = follower
        .query(
            "SELECT n.nspname::text, c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
             WHERE c.relkind IN ('r', 'm') AND n.nspname NOT IN ('information_schema', 'understudy') AND n.nspname !~ '^pg_'
             ORDER BY c.relpages DESC",
            &[],
        )
        .await
        .attempt("list the follower's tables")?;
    let queue = std::sync::Mutex::new(rows.iter().map(|row| qualified(row.get(0), row.get(1))).collect::<std::collections::VecDeque<_>>());
    let workers = (0..shared.spec.copy.workers.clamp(1, rows.len().max(1))).map(|_| async {
        let client = session::connect_writer(&shared.spec.to, "copy schema").await?;
        loop {
            let Some(table) = super::shared::lock(&queue).pop_front() else { return Ok::<(), CdcError>(()) };
            if let Err(source) = client.batch_execute(&format!("ANALYZE {table}")).await
                && source.code() != Some(&SqlState::UNDEFINED_TABLE)
            {
                return Err(CdcError::Postgres { what: "analyze the follower".into(), source });
            }
        }
    });
    futures_util::future::try_join_all(workers).await.map(|_: Vec<()>| ())
}

/// Their contents are not in the stream: computed on the follower, in the order they were made, twice for those that read others.
pub(super) async fn refresh_materialized_views(shared: &Shared, owner: &Client, follower: &Client) -> Result<(), CdcError> {
    let rows = owner
        .query(
            "SELECT n.nspname::text, c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
             WHERE c.relkind = 'm' AND c.relispopulated ORDER BY c.oid",
            &[],
        )
        .await
        .attempt("list materialized views")?;
    let mut views: Vec<String> = rows.iter().map(|row| qualified(row.get(0), row.get(1))).collect();
    while !views.is_empty() {
        let before = views.len();
        let mut failed = Vec::new();
        for view in views {
            if let Err(error) = follower.batch_execute(&format!("REFRESH MATERIALIZED VIEW {view}")).await {
                failed.push((view, describe(&error)));
            }
        }
        if failed.len() == before {
            for (view, reason) in &failed {
                let message = "a materialized view could not be filled on the follower: run REFRESH MATERIALIZED VIEW there";
                shared.event(Severity::Warning, message, serde_json::json!({"view": view, "reason": reason}));
            }
            return Ok(());
        }
        views = failed.into_iter().map(|(view, _)| view).collect();
    }
    Ok(())
}
