//! The snapshot copy: slot and snapshot in one command, schema at that snapshot, rows by several workers, indexes and constraints
//! afterwards.
//!
//! An exported snapshot ends with the session that exported it, so a copy whose process (or owner) died cannot go on at the same
//! one. It keeps what is whole: each table that had arrived is remembered in the transaction of its rows. The others are
//! copied at a new snapshot, and what the stream, which starts at the first one, says about them before the second is left out:
//! the way of native table synchronisation. What was made on the follower is written down in the transaction that makes it, so that a
//! copy that cannot go on (its slot is gone) takes back exactly its own work and starts over.
//! Source: PostgreSQL documentation, "Streaming Replication Protocol" (CREATE_REPLICATION_SLOT), "Snapshot Synchronization
//! Functions", "Logical Replication Architecture: Initial Snapshot".

use super::{
    CdcError, copy_objects, copy_plan,
    copy_rows::{self, Left, LeftOut},
    copy_schema,
    dump::{self, Section},
    error::Attempt,
    install, mapped,
    names::{SCHEMA, ident, literal, qualified},
    poll, roles, sequences, session,
    shared::{HeldState, Phase, Shared, TableName},
};
use crate::{
    backend::Connection,
    lsn::Lsn,
    metadata::{ProposalDraft, Severity},
};
use bytes::Bytes;
use futures_util::{SinkExt, TryStreamExt};
use std::{collections::BTreeSet, pin::pin, sync::atomic::Ordering, time::Duration};
use tokio_postgres::Client;

/// A transaction that has written and stays open longer than this holds up the creation of the slot: it is named.
const OPEN_WRITER: &str = "3 seconds";

/// How often those who hold it up are looked at.
const OPEN_WRITER_PERIOD: Duration = Duration::from_secs(5);

/// `invalid_text_representation`: what an enum says to a label that it does not have.
const UNKNOWN_LABEL: &str = "22P02";

/// What a copy needs all the time.
pub(super) struct Ends<'a> {
    pub shared: &'a Shared,
    /// Session on the owner without a snapshot.
    pub owner: Client,
    pub follower: Client,
    /// `server_version_num` of owner and follower.
    pub versions: (u32, u32),
}

/// Makes the follower equal to the owner at one position, as far as its stream does not know better. Does nothing when that was done
/// before; goes on where an earlier run was interrupted.
pub(super) async fn run(shared: &Shared) -> Result<(), CdcError> {
    let (spec, feed) = (&shared.spec, shared.feed.as_str());
    let owner = session::connect(&spec.from, "copy").await?;
    let version = install::check_owner(&owner, &spec.from).await?;
    let follower = session::connect_writer(&spec.to, "copy").await?;
    install::target_tables(&follower).await?;
    let stored = follower
        .query_opt("SELECT phase, end_lsn::text FROM understudy.progress WHERE feed = $1", &[&feed])
        .await
        .attempt("read the feed's progress")?;
    let target_version = session::version(&follower).await?;
    let ends = Ends { shared, owner, follower, versions: (version, target_version) };
    let consistent = match stored.as_ref().map(|row| (row.get::<_, &str>(0), row.get::<_, &str>(1))) {
        // It follows already, or it equalled the owner at a marker: there is nothing to copy.
        Some((phase, _)) if phase == "streaming" || install::awaited_marker(phase).is_some() => {
            shared.copy.done.store(true, Ordering::Relaxed);
            return Ok(());
        }
        // Tables of the follower's own are filled at one snapshot or not at all.
        Some(("loading", position)) if !spec.existing() && ends.slot_holds(session::lsn(position)?).await? => {
            copy_rows::end_predecessors(&ends.follower).await?;
            shared.set_phase(Phase::Copying);
            shared.copy.reset();
            let consistent = session::lsn(position)?;
            ends.go_on().await?;
            consistent
        }
        stored => {
            shared.set_phase(Phase::Copying);
            shared.copy.reset();
            if stored.is_some() {
                copy_rows::end_predecessors(&ends.follower).await?;
                clean(shared, &ends.follower).await?;
            }
            ends.begin().await?
        }
    };
    copy_schema::build(shared, &ends.follower).await?;
    sequences::advance(&ends.owner, &ends.follower, spec).await?;
    if !spec.existing() {
        copy_schema::refresh_materialized_views(shared, &ends.owner, &ends.follower).await?;
    }
    ends.complete(consistent).await?;
    // Beside the stream: nothing that follows is wrong without statistics.
    shared.analyze.store(true, Ordering::Release);
    Ok(())
}

impl Ends<'_> {
    /// The slot still holds everything behind the copy's position.
    pub(super) async fn slot_holds(&self, consistent: Lsn) -> Result<bool, CdcError> {
        let row = self
            .owner
            .query_opt(
                "SELECT coalesce(confirmed_flush_lsn, '0/0')::text, coalesce(wal_status, '') FROM pg_replication_slots
                 WHERE slot_name = $1 AND plugin = 'pgoutput' AND database = current_database()",
                &[&self.shared.feed],
            )
            .await
            .attempt("look for the replication slot")?;
        let Some(row) = row else { return Ok(false) };
        Ok(row.get::<_, &str>(1) != "lost" && session::lsn(row.get(0))? <= consistent)
    }

    /// A copy from nothing. Returns its position.
    async fn begin(&self) -> Result<Lsn, CdcError> {
        let Ends { shared, owner, follower, versions } = self;
        let (spec, feed) = (&shared.spec, shared.feed.as_str());
        let existing = spec.existing();
        let pg_dump = if existing { None } else { Some(dump::find(versions.0 / 10_000).await?) };
        install::drop_slot(owner, feed).await?;
        if !existing {
            refuse_conflicts(shared, owner, follower).await?;
        }
        install::forget(follower, feed).await?;
        follower
            .execute("INSERT INTO understudy.progress (feed, phase, commit_lsn, end_lsn) VALUES ($1, 'copying', '0/0', '0/0')", &[&feed])
            .await
            .attempt("store the feed's progress")?;
        for warning in install::prepare_owner(owner, feed).await? {
            shared.event(Severity::Warning, &warning, serde_json::json!({}));
        }
        // Holds the snapshot until its importers have it; it must stay idle.
        let mut exporter = session::connect_replication(&spec.from).await?;
        let (consistent, snapshot) = create_slot(shared, owner, &mut exporter, versions.0, feed, false).await?;
        let keeper = import(shared, &snapshot, "copy keeper").await?;
        shared.event(
            Severity::Info,
            "the copy began at one snapshot of the owner",
            serde_json::json!({"lsn": consistent.to_string(), "workers": spec.copy.workers}),
        );
        warn_of_what_stays_behind(shared, &keeper).await?;
        for problem in roles::copy(&keeper, follower).await? {
            shared.event(Severity::Warning, &problem, serde_json::json!({}));
        }
        match &pg_dump {
            Some(pg_dump) => {
                // Both halves now: the second must fit the first, whatever happens on the owner meanwhile.
                let (first, second) = futures_util::future::try_join(
                    dump::run(pg_dump, &spec.from, Section::PreData, &snapshot),
                    dump::run(pg_dump, &spec.from, Section::PostData, &snapshot),
                )
                .await?;
                copy_objects::copy(shared, &keeper, follower).await?;
                shared.adapter.baseline(&keeper).await?;
                poll::begin(shared, &keeper, follower).await?;
                copy_schema::restore(shared, &dump::fit(&first, versions.1), &dump::fit(&second, versions.1), consistent).await?;
            }
            None => {
                mapped::adopt(shared, &keeper, follower, consistent).await?;
                copy_objects::copy(shared, &keeper, follower).await?;
                shared.adapter.baseline(&keeper).await?;
                poll::begin(shared, &keeper, follower).await?;
            }
        }
        let plan = copy_plan::make(&keeper, spec, Some(feed), *versions, &BTreeSet::new()).await?;
        let left = self.copy_rows(&plan, &snapshot, 0).await?;
        self.set_aside(left, consistent, false).await?;
        drop(exporter);
        Ok(consistent)
    }

    /// The rest of a copy that was interrupted behind its schema.
    async fn go_on(&self) -> Result<(), CdcError> {
        static NUMBER: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let Ends { shared, owner, follower, versions } = self;
        let whole = copy_rows::whole(shared, follower).await?;
        let aside: BTreeSet<TableName> = follower
            .query("SELECT schema_name, table_name FROM understudy.held_table WHERE feed = $1 AND state <> 'copied'", &[&shared.feed])
            .await
            .attempt("read which tables are set aside")?
            .iter()
            .map(|row| (row.get(0), row.get(1)))
            .collect();
        let mut exporter = session::connect_replication(&shared.spec.from).await?;
        let slot = format!("understudy_resume_{}_{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let (again, snapshot) = create_slot(shared, owner, &mut exporter, versions.0, &slot, true).await?;
        let keeper = import(shared, &snapshot, "copy keeper").await?;
        let settled: BTreeSet<TableName> = whole.union(&aside).cloned().collect();
        let mut plan = copy_plan::make(&keeper, &shared.spec, Some(&shared.feed), *versions, &settled).await?;
        let mut left = LeftOut::new();
        for unit in &plan.units {
            if shape(&keeper, &unit.table).await? != shape(follower, &unit.table).await? {
                left.insert(unit.table.clone(), Left::Changed("it was changed on the owner while the copy was interrupted".into()));
            }
        }
        let gone: Vec<TableName> = self.unknown_to_owner(&keeper, &settled).await?;
        plan.parts.retain(|part| plan.units.get(part.unit).is_some_and(|unit| !left.contains_key(&unit.table)));
        shared.event(
            Severity::Warning,
            "an earlier copy did not finish: the tables that it had completed are kept, the others are copied at a new snapshot",
            serde_json::json!({"kept": settled.len(), "copied": plan.units.len(), "lsn": again.to_string()}),
        );
        // Before the rows: what the stream says about these tables up to the new snapshot is in their rows already.
        for table in plan.units.iter().map(|unit| &unit.table).filter(|table| !left.contains_key(*table)).chain(&gone) {
            self.hold(table, HeldState::Copied, 0, "it was copied at a later snapshot than others", again, false).await?;
        }
        // Those that the follower does not have yet come with the stream.
        let mut here = LeftOut::new();
        for (table, why) in left {
            if shape(follower, &table).await?.is_some() {
                here.insert(table, why);
            }
        }
        here.extend(self.copy_rows(&plan, &snapshot, settled.len() as u64).await?);
        self.set_aside(here, again, true).await?;
        drop(exporter);
        Ok(())
    }

    /// Tables of the follower's copy that the owner has dropped since, and that are not whole.
    async fn unknown_to_owner(&self, keeper: &Client, settled: &BTreeSet<TableName>) -> Result<Vec<TableName>, CdcError> {
        let theirs: BTreeSet<TableName> =
            install::user_tables(keeper).await?.into_iter().map(|table| (table.schema, table.table)).collect();
        let ours = install::user_tables(&self.follower).await?.into_iter().map(|table| (table.schema, table.table));
        Ok(ours.filter(|table| !theirs.contains(table) && !settled.contains(table)).collect())
    }

    pub(super) async fn copy_rows(&self, plan: &copy_plan::CopyPlan, snapshot: &str, before: u64) -> Result<LeftOut, CdcError> {
        let copy = &self.shared.copy;
        copy.tables.store(plan.units.len() as u64 + before, Ordering::Relaxed);
        copy.tables_done.store(before, Ordering::Relaxed);
        copy.rows_estimated.store(plan.rows_estimated, Ordering::Relaxed);
        copy_rows::run(self.shared, &self.owner, plan, snapshot).await
    }

    /// Tables that the copy had to leave out. Those that the owner changed meanwhile are copied again when the stream has brought
    /// the change; those that the follower refuses wait for a person. The others go on without them.
    pub(super) async fn set_aside(&self, left: LeftOut, since: Lsn, resumed: bool) -> Result<(), CdcError> {
        for (table, why) in left {
            match why {
                Left::Changed(reason) => {
                    self.hold(&table, HeldState::Recopy, 0, &reason, since, true).await?;
                    let data = serde_json::json!({"table": format!("{}.{}", table.0, table.1), "reason": reason});
                    self.shared.event(Severity::Warning, "a table is copied again once the stream has brought its change", data);
                }
                // The stream has still to bring a label that the rows at the later snapshot use already.
                Left::Refused { reason, code } if resumed && code == UNKNOWN_LABEL => {
                    self.hold(&table, HeldState::Recopy, 0, &reason, since, true).await?;
                }
                Left::Refused { reason, code } => {
                    let proposal = self.propose(&table, &reason)?;
                    self.hold(&table, HeldState::Waiting, proposal, &reason, since, true).await?;
                    self.shared.event(
                        Severity::Alert,
                        "the follower cannot take the rows of a table: it is set aside, the others go on",
                        serde_json::json!({"table": format!("{}.{}", table.0, table.1), "reason": reason, "sqlstate": code,
                            "proposal": proposal, "what_next": "take the cause away, then APPROVE the proposal: the table is copied again"}),
                    );
                }
            }
        }
        Ok(())
    }

    fn propose(&self, table: &TableName, reason: &str) -> Result<i64, CdcError> {
        let object = format!("{}.{}", table.0, table.1);
        let draft = ProposalDraft {
            change: format!("{object} could not be copied to the follower: {reason}"),
            object,
            kind: "held_table".into(),
            sql: Vec::new(),
            undo: Vec::new(),
            alternatives: Vec::new(),
            confidence: 0.0,
            why: "the copy met a row that the follower refuses; take the cause away there, then APPROVE, or APPROVE … AS '<sql>' with \
                  what takes it away"
                .into(),
            loses_data: false,
            holds_table: true,
            outside_transaction: false,
            if_rejected: "the table stays empty on the follower, its changes are spooled there".into(),
        };
        Ok(self.shared.repository.propose(&self.shared.spec.database, &self.shared.spec.shadow, &draft)?)
    }

    pub(super) async fn hold(
        &self,
        table: &TableName,
        state: HeldState,
        proposal: i64,
        reason: &str,
        since: Lsn,
        recopy: bool,
    ) -> Result<(), CdcError> {
        self.follower
            .execute(
                "INSERT INTO understudy.held_table (feed, schema_name, table_name, proposal, state, reason, since_lsn, recopy)
                 VALUES ($1, $2, $3, $4, $5, $6, $7::text::pg_lsn, $8)
                 ON CONFLICT (feed, schema_name, table_name) DO UPDATE SET proposal = excluded.proposal, state = excluded.state,
                   reason = excluded.reason, since_lsn = excluded.since_lsn, recopy = excluded.recopy",
                &[&self.shared.feed, &table.0, &table.1, &proposal, &state.as_str(), &reason, &since.to_string(), &recopy],
            )
            .await
            .attempt("set a table aside")
            .map(|_| ())
    }

    async fn complete(&self, consistent: Lsn) -> Result<(), CdcError> {
        let shared = self.shared;
        self.start_streaming("loading", consistent).await?;
        let state = shared.state().copy;
        shared.event(
            Severity::Info,
            "the copy is complete; the change stream follows from its snapshot",
            serde_json::json!({"tables": state.tables, "rows": state.rows, "bytes": state.bytes, "seconds": state.seconds}),
        );
        Ok(())
    }

    /// The fact that makes the rows valid: a restart goes on with the stream from here on, and not with what `phase` says.
    pub(super) async fn start_streaming(&self, phase: &str, consistent: Lsn) -> Result<(), CdcError> {
        let feed = literal(&self.shared.feed);
        let row = self
            .follower
            .query_one(
                &format!(
                    "WITH parts AS (DELETE FROM {SCHEMA}.copy_part WHERE feed = {feed}), steps AS (DELETE FROM {SCHEMA}.copy_step WHERE feed = {feed}),
                          schemas AS (DELETE FROM {SCHEMA}.copy_schema WHERE feed = {feed}),
                          stored AS (UPDATE {SCHEMA}.progress SET phase = 'streaming', at = now()
                                     WHERE feed = {feed} AND phase = $2 AND end_lsn = $1::text::pg_lsn RETURNING 1)
                     SELECT count(*) FROM stored"
                ),
                &[&consistent.to_string(), &phase],
            )
            .await
            .attempt("store the feed's progress")?;
        if row.get::<_, i64>(0) != 1 {
            return Err(CdcError::Protocol(format!("the feed's progress (phase {phase}) vanished meanwhile")));
        }
        self.shared.copy.end();
        Ok(())
    }
}

/// A table `c` and all its partitions, as a LATERAL subquery with a column `oid`. `pg_partition_tree` would lock each of them until
/// the end of the snapshot.
pub(super) const PARTITIONS: &str = "(WITH RECURSIVE tree(oid) AS (SELECT c.oid UNION ALL
    SELECT i.inhrelid FROM tree JOIN pg_inherits i ON i.inhparent = tree.oid JOIN pg_class k ON k.oid = i.inhrelid AND k.relispartition)
    SELECT tree.oid FROM tree)";

/// Columns of a table and of its partitions, as far as rows know them; `None`: it is not there.
pub(super) async fn shape(client: &Client, table: &TableName) -> Result<Option<String>, CdcError> {
    let row = client
        .query_one(
            &format!(
                "SELECT string_agg(concat_ws(' ', l.oid::regclass, a.attname, format_type(a.atttypid, a.atttypmod), a.attgenerated), ',' ORDER BY l.oid::regclass::text, a.attname)
             FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
             CROSS JOIN LATERAL {PARTITIONS} l
             LEFT JOIN pg_attribute a ON a.attrelid = l.oid AND a.attnum > 0 AND NOT a.attisdropped
             WHERE n.nspname = $1 AND c.relname = $2 AND c.relkind IN ('r', 'p')"
            ),
            &[&table.0, &table.1],
        )
        .await
        .attempt("compare a table's columns")?;
    Ok(row.get(0))
}

/// Takes back what an interrupted copy made on the follower, and nothing else.
pub(super) async fn clean(shared: &Shared, follower: &Client) -> Result<(), CdcError> {
    let made = follower
        .query(&format!("SELECT kind, ident FROM {SCHEMA}.copied_table WHERE feed = $1 ORDER BY id DESC"), &[&shared.feed])
        .await
        .attempt("read what an interrupted copy made")?;
    for row in &made {
        let (kind, name): (&str, &str) = (row.get(0), row.get(1));
        // Tables of the follower's own are emptied (foreign keys do not fire for this session's DELETE), others are ours.
        let sql =
            if kind == "rows" { format!("DELETE FROM {name}") } else { format!("DROP {} IF EXISTS {name} CASCADE", kind.to_uppercase()) };
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
pub(super) async fn refuse_conflicts(shared: &Shared, owner: &Client, follower: &Client) -> Result<(), CdcError> {
    let mut conflicts = Vec::new();
    let names: Vec<String> = install::user_tables(owner).await?.iter().map(|table| qualified(&table.schema, &table.table)).collect();
    let there = follower
        .query("SELECT name FROM unnest($1::text[]) AS name WHERE to_regclass(name) IS NOT NULL", &[&names])
        .await
        .attempt("look at the follower's tables")?;
    conflicts.extend(there.iter().map(|row| row.get::<_, String>(0)));
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
                "SELECT pid, extract(epoch FROM now() - xact_start)::int8, coalesce(application_name, ''), coalesce(usename::text, ''),
                        coalesce(state, '') FROM pg_stat_activity
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
    let writers: Vec<serde_json::Value> = rows
        .iter()
        .map(|row| {
            serde_json::json!({"pid": row.get::<_, i32>(0), "open_s": row.get::<_, i64>(1), "application": row.get::<_, &str>(2),
                "user": row.get::<_, &str>(3), "state": row.get::<_, &str>(4)})
        })
        .collect();
    shared.event(
        Severity::Warning,
        "creating the replication slot waits for open transactions that have written: let them end, or end them \
         (SELECT pg_terminate_backend(<pid>) on the owner)",
        serde_json::json!({"transactions": writers}),
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

pub(super) async fn warn_of_what_stays_behind(shared: &Shared, keeper: &Client) -> Result<(), CdcError> {
    let row = keeper
        .query_one(
            "SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
             WHERE c.relkind = 'r' AND c.relpersistence = 'u' AND n.nspname !~ '^pg_'",
            &[],
        )
        .await
        .attempt("look for what is not replicated")?;
    let unlogged: i64 = row.get(0);
    if unlogged > 0 {
        let message = "rows of unlogged tables are not in the change stream and were not copied: the tables exist on the follower, empty";
        shared.event(Severity::Warning, message, serde_json::json!({"tables": unlogged}));
    }
    Ok(())
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
