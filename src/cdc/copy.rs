//! The snapshot copy: slot and snapshot in one command, schema at that snapshot, rows by several workers, indexes and
//! constraints afterwards. What was made on the follower is written down in the same transaction that makes it, so that a copy
//! that was interrupted takes back exactly its own work and starts over.
//! Source: PostgreSQL documentation, "Streaming Replication Protocol" (CREATE_REPLICATION_SLOT), "Snapshot Synchronization
//! Functions".

use super::{
    CdcError,
    dump::{self, Section},
    error::{Attempt, describe},
    install,
    names::{SCHEMA, ident, literal, qualified},
    roles, sequences, session,
    shared::{Phase, Shared, lock},
};
use crate::{backend::Connection, lsn::Lsn, metadata::Severity};
use bytes::Bytes;
use futures_util::{SinkExt, TryStreamExt};
use std::{
    collections::VecDeque,
    pin::pin,
    sync::{Arc, Mutex, atomic::Ordering},
    time::{Duration, Instant},
};
use tokio_postgres::{Client, error::SqlState};

/// A transaction that has written and stays open longer than this holds up the creation of the slot: it is named.
const OPEN_WRITER: &str = "3 seconds";

/// How often those who hold it up are looked at.
const OPEN_WRITER_PERIOD: Duration = Duration::from_secs(5);

/// Rows assumed per 8-kB page where there are no statistics.
const ROWS_PER_PAGE_GUESS: i64 = 50;

/// One table to copy.
struct Table {
    name: String,
    out: String,
    into: String,
}

/// Makes the follower equal to the owner at one position and returns it. Does nothing when that was done before.
pub(super) async fn run(shared: &Shared) -> Result<(), CdcError> {
    let (spec, feed) = (&shared.spec, shared.feed.as_str());
    let owner = session::connect(&spec.from, "copy").await?;
    let version = install::check_owner(&owner, &spec.from).await?;
    let follower = session::connect_writer(&spec.to, "copy").await?;
    install::target_tables(&follower).await?;
    let phase =
        follower.query_opt("SELECT phase FROM understudy.progress WHERE feed = $1", &[&feed]).await.attempt("read the feed's progress")?;
    match phase.as_ref().map(|row| row.get::<_, &str>(0)) {
        Some("streaming") => {
            shared.copy.done.store(true, Ordering::Relaxed);
            return Ok(());
        }
        // it equalled the owner at a marker: there is nothing to copy
        Some(phase) if install::awaited_marker(phase).is_some() => {
            shared.copy.done.store(true, Ordering::Relaxed);
            return Ok(());
        }
        Some(_) => clean(shared, &follower).await?,
        None => {}
    }
    shared.set_phase(Phase::Copying);
    shared.copy.reset();
    let pg_dump = dump::find(version / 10_000).await?;
    install::drop_slot(&owner, feed).await?;
    refuse_conflicts(shared, &owner, &follower).await?;
    install::forget(&follower, feed).await?;
    follower
        .execute("INSERT INTO understudy.progress (feed, phase, commit_lsn, end_lsn) VALUES ($1, 'copying', '0/0', '0/0')", &[&feed])
        .await
        .attempt("store the feed's progress")?;
    for warning in install::prepare_owner(&owner, feed).await? {
        shared.event(Severity::Warning, &warning, serde_json::json!({}));
    }
    // Holds the snapshot until its importers have it; it must stay idle.
    let mut exporter = session::connect_replication(&spec.from).await?;
    let (consistent, snapshot) = create_slot(shared, &owner, &mut exporter, version, feed, false).await?;
    let keeper = import(shared, &snapshot, "copy keeper").await?;
    shared.event(
        Severity::Info,
        "the copy began at one snapshot of the owner",
        serde_json::json!({"lsn": consistent.to_string(), "workers": spec.copy_workers}),
    );
    warn_of_what_stays_behind(shared, &keeper).await?;
    for problem in roles::copy(&keeper, &follower).await? {
        shared.event(Severity::Warning, &problem, serde_json::json!({}));
    }
    let target_version = session::version(&follower).await?;
    let schema = dump::run(&pg_dump, &spec.from, Section::PreData, &snapshot).await?;
    restore_schema(shared, &dump::fit(&schema, target_version)).await?;
    copy_rows(shared, &keeper, &snapshot).await?;
    let schema = dump::run(&pg_dump, &spec.from, Section::PostData, &snapshot).await?;
    let builder = session::connect_writer(&spec.to, "copy schema").await?;
    builder.batch_execute("SET maintenance_work_mem = '128MB'").await.attempt("set up a session")?;
    builder.batch_execute(&dump::fit(&schema, target_version)).await.attempt("build indexes and constraints on the follower")?;
    sequences::advance(&owner, &follower).await?;
    refresh_materialized_views(shared, &keeper, &follower).await?;
    follower.batch_execute("ANALYZE").await.attempt("analyze the follower")?;
    shared.adapter.baseline(&keeper).await?;
    // The fact that makes the copy valid: from here on a restart goes on with the stream.
    let stored = follower
        .execute(
            "UPDATE understudy.progress SET phase = 'streaming', commit_lsn = $2::text::pg_lsn, end_lsn = $2::text::pg_lsn, at = now()
             WHERE feed = $1",
            &[&feed, &consistent.to_string()],
        )
        .await
        .attempt("store the feed's progress")?;
    if stored != 1 {
        return Err(CdcError::Protocol("the feed's progress vanished during the copy".into()));
    }
    drop(exporter);
    *lock(&shared.copy.ended) = Some(Instant::now());
    shared.copy.done.store(true, Ordering::Relaxed);
    let state = shared.state().copy;
    shared.event(
        Severity::Info,
        "the copy is complete; the change stream follows from its snapshot",
        serde_json::json!({"tables": state.tables, "rows": state.rows, "bytes": state.bytes, "seconds": state.seconds}),
    );
    Ok(())
}

/// Takes back what an interrupted copy made on the follower, and nothing else.
async fn clean(shared: &Shared, follower: &Client) -> Result<(), CdcError> {
    let made = follower
        .query(&format!("SELECT kind, ident FROM {SCHEMA}.copied_table WHERE feed = $1 ORDER BY id DESC"), &[&shared.feed])
        .await
        .attempt("read what an interrupted copy made")?;
    for row in &made {
        let (kind, name): (&str, &str) = (row.get(0), row.get(1));
        let sql = format!("DROP {} IF EXISTS {name} CASCADE", kind.to_uppercase());
        follower.batch_execute(&sql).await.attempt("take back what an interrupted copy made")?;
    }
    install::forget(follower, &shared.feed).await?;
    shared.event(
        Severity::Warning,
        "an earlier copy did not finish: what it had made on the follower was taken back, and it starts over",
        serde_json::json!({"objects": made.len()}),
    );
    Ok(())
}

/// A follower that has tables of the same names is not ours to fill.
async fn refuse_conflicts(shared: &Shared, owner: &Client, follower: &Client) -> Result<(), CdcError> {
    let mut conflicts = Vec::new();
    for table in install::user_tables(owner).await? {
        let name = qualified(&table.schema, &table.table);
        let there = follower.query_one("SELECT to_regclass($1) IS NOT NULL", &[&name]).await.attempt("look at the follower's tables")?;
        if there.get(0) {
            conflicts.push(name);
        }
    }
    if conflicts.is_empty() {
        return Ok(());
    }
    let total = conflicts.len();
    conflicts.truncate(5);
    Err(CdcError::Setup(format!(
        "the follower {} already has {total} of the owner's tables ({}{}): nothing was touched. Give the shadow an empty database, \
         or drop them there",
        shared.spec.to,
        conflicts.join(", "),
        if total > conflicts.len() { ", …" } else { "" }
    )))
}

/// Creates the slot with an exported snapshot. It waits for every transaction that has written: those are named meanwhile.
pub(super) async fn create_slot(
    shared: &Shared,
    owner: &Client,
    exporter: &mut Connection,
    version: u32,
    name: &str,
    temporary: bool,
) -> Result<(Lsn, String), CdcError> {
    let export = if version >= 150_000 { "(SNAPSHOT 'export')" } else { "EXPORT_SNAPSHOT" };
    let temporary = if temporary { "TEMPORARY " } else { "" };
    let command = format!("CREATE_REPLICATION_SLOT {} {temporary}LOGICAL pgoutput {export}", ident(name));
    let mut creating = pin!(exporter.simple_query(&command));
    let mut ticker = tokio::time::interval(OPEN_WRITER_PERIOD);
    let rows = loop {
        tokio::select! {
            rows = &mut creating => break rows.map_err(|source| CdcError::Backend { what: "create the replication slot", source })?,
            _ = ticker.tick() => name_open_writers(shared, owner).await?,
        }
    };
    let row = rows.first().map(Vec::as_slice);
    let Some([_, Some(point), Some(snapshot), ..]) = row else {
        return Err(CdcError::Protocol("the server exported no snapshot with the slot".into()));
    };
    Ok((session::lsn(point)?, snapshot.clone()))
}

async fn name_open_writers(shared: &Shared, owner: &Client) -> Result<(), CdcError> {
    let rows = owner
        .query(
            &format!(
                "SELECT pid, extract(epoch FROM now() - xact_start)::int8 FROM pg_stat_activity
                 WHERE backend_xid IS NOT NULL AND pid <> pg_backend_pid() AND xact_start < now() - interval '{OPEN_WRITER}'
                 ORDER BY xact_start LIMIT 10"
            ),
            &[],
        )
        .await
        .attempt("look for long transactions on the owner")?;
    if rows.is_empty() {
        return Ok(());
    }
    let pids: Vec<i32> = rows.iter().map(|row| row.get(0)).collect();
    shared.event(
        Severity::Warning,
        "creating the replication slot waits for open transactions that have written: end them, or look what holds them \
         (pg_stat_activity on the owner)",
        serde_json::json!({"pids": pids, "oldest_s": rows.first().map(|row| row.get::<_, i64>(1))}),
    );
    Ok(())
}

/// A session on the owner that sees the snapshot.
pub(super) async fn import(shared: &Shared, snapshot: &str, role: &str) -> Result<Client, CdcError> {
    let client = session::connect(&shared.spec.from, role).await?;
    client
        .batch_execute(&format!(
            "SET row_security = off; BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT {}",
            literal(snapshot)
        ))
        .await
        .attempt("import the copy's snapshot")?;
    Ok(client)
}

async fn warn_of_what_stays_behind(shared: &Shared, keeper: &Client) -> Result<(), CdcError> {
    let row = keeper
        .query_one(
            "SELECT (SELECT count(*) FROM pg_largeobject_metadata),
                    (SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                     WHERE c.relkind = 'r' AND c.relpersistence = 'u' AND n.nspname !~ '^pg_')",
            &[],
        )
        .await
        .attempt("look for what is not replicated")?;
    let (objects, unlogged): (i64, i64) = (row.get(0), row.get(1));
    if objects > 0 {
        let message = "large objects are not carried by logical replication and were not copied: move them to bytea columns, or copy \
                       them by hand at the cutover";
        shared.event(Severity::Warning, message, serde_json::json!({"large_objects": objects}));
    }
    if unlogged > 0 {
        let message = "rows of unlogged tables are not in the change stream and were not copied: the tables exist on the follower, empty";
        shared.event(Severity::Warning, message, serde_json::json!({"tables": unlogged}));
    }
    Ok(())
}

/// Catalogs whose new rows are the objects that a restore made.
const CATALOGS: &[&str] = &["pg_namespace", "pg_extension", "pg_class", "pg_type", "pg_proc", "pg_collation", "pg_operator"];

/// Runs the first half of the schema in one transaction that also writes down what it made.
async fn restore_schema(shared: &Shared, schema: &str) -> Result<(), CdcError> {
    let client = session::connect_writer(&shared.spec.to, "copy schema").await?;
    let list = |body: &dyn Fn(&str) -> String| CATALOGS.iter().map(|c| body(c)).collect::<Vec<_>>().join(" UNION ALL ");
    let everything = list(&|catalog| format!("SELECT 'pg_catalog.{catalog}'::regclass::oid AS catalog, oid FROM pg_catalog.{catalog}"));
    // The temporary schema itself must not count as new.
    client.batch_execute("CREATE TEMP TABLE understudy_before (catalog oid, oid oid)").await.attempt("prepare the follower")?;
    client.batch_execute(&format!("BEGIN; INSERT INTO pg_temp.understudy_before {everything};")).await.attempt("prepare the follower")?;
    client.batch_execute(schema).await.map_err(|source| match source.code() {
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
    client.batch_execute("COMMIT").await.attempt("create the schema on the follower")
}

/// Copies all rows at the snapshot, `copy_workers` tables at a time, largest first.
async fn copy_rows(shared: &Shared, keeper: &Client, snapshot: &str) -> Result<(), CdcError> {
    let rows = keeper
        .query(
            "SELECT n.nspname::text, c.relname::text, c.relkind = 'p',
                    (SELECT array_agg(a.attname::text ORDER BY a.attnum) FROM pg_attribute a
                     WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''),
                    t.bytes::int8, t.rows::int8
             FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
             JOIN pg_publication_rel p ON p.prrelid = c.oid JOIN pg_publication pub ON pub.oid = p.prpubid AND pub.pubname = $1,
             LATERAL (SELECT sum(pg_table_size(l.oid)) AS bytes,
                             sum(CASE WHEN l.reltuples >= 0 AND l.relpages > 0 THEN l.reltuples::int8
                                      ELSE pg_relation_size(l.oid) / 8192 * $2 END) AS rows
                      FROM pg_class l WHERE l.oid = c.oid OR l.oid IN (SELECT relid FROM pg_partition_tree(c.oid) WHERE isleaf)) t
             ORDER BY t.bytes DESC, 1, 2",
            &[&shared.feed, &ROWS_PER_PAGE_GUESS],
        )
        .await
        .attempt("list the tables to copy")?;
    let mut estimated = 0;
    let tables: VecDeque<Table> = rows
        .iter()
        .map(|row| {
            estimated += row.get::<_, Option<i64>>(5).unwrap_or(0).max(0) as u64;
            let name = qualified(row.get(0), row.get(1));
            let columns = row.get::<_, Option<Vec<String>>>(3).unwrap_or_default();
            let list = columns.iter().map(|c| ident(c)).collect::<Vec<_>>().join(", ");
            let out = if row.get(2) { format!("(SELECT {list} FROM {name})") } else { format!("{name} ({list})") };
            // A table without columns still has a number of rows.
            let (out, into) = if columns.is_empty() { (name.clone(), name.clone()) } else { (out, format!("{name} ({list})")) };
            Table { out: format!("COPY {out} TO STDOUT"), into: format!("COPY {into} FROM STDIN"), name }
        })
        .collect();
    shared.copy.tables.store(tables.len() as u64, Ordering::Relaxed);
    shared.copy.rows_estimated.store(estimated, Ordering::Relaxed);
    let workers = shared.spec.copy_workers.clamp(1, tables.len().max(1));
    let queue = Arc::new(Mutex::new(tables));
    let mut sessions = Vec::with_capacity(workers);
    for _ in 0..workers {
        let source = import(shared, snapshot, "copy reader").await?;
        let target = session::connect_writer(&shared.spec.to, "copy writer").await?;
        sessions.push((source, target));
    }
    let work = sessions.iter().map(|(source, target)| async {
        loop {
            let Some(table) = lock(&queue).pop_front() else { return Ok(()) };
            copy_table(shared, source, target, &table).await?;
            shared.copy.tables_done.fetch_add(1, Ordering::Relaxed);
        }
    });
    futures_util::future::try_join_all(work).await.map(|_: Vec<()>| ())
}

async fn copy_table(shared: &Shared, source: &Client, target: &Client, table: &Table) -> Result<(), CdcError> {
    stream_table(source, target, &table.out, &table.into, &table.name, |bytes| {
        shared.copy.rows.fetch_add(1, Ordering::Relaxed);
        shared.copy.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    })
    .await
    .map(|_| ())
}

/// Carries one table's rows over. The server sends one CopyData per row, so `row` is called once for each.
pub(super) async fn stream_table(
    source: &Client,
    target: &Client,
    out: &str,
    into: &str,
    name: &str,
    row: impl Fn(usize),
) -> Result<u64, CdcError> {
    let mut stream = pin!(source.copy_out(out).await.attempt(&format!("read {name}"))?);
    let mut sink = pin!(target.copy_in::<_, Bytes>(into).await.attempt(&format!("write {name}"))?);
    while let Some(chunk) = stream.try_next().await.attempt(&format!("read {name}"))? {
        row(chunk.len());
        sink.feed(chunk).await.attempt(&format!("write {name}"))?;
    }
    sink.finish().await.attempt(&format!("write {name}"))
}

/// Their contents are not in the stream: computed on the follower, in the order they were made, twice for those that read others.
async fn refresh_materialized_views(shared: &Shared, keeper: &Client, follower: &Client) -> Result<(), CdcError> {
    let rows = keeper
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
