//! The rows of a copy: workers that take parts from a queue, each with a reader at the snapshot and a writer. A part and the note
//! that it is there are one transaction of the follower.

use super::{
    CdcError, copy_plan,
    copy_plan::{CopyPlan, Part},
    error::{Attempt, Blame},
    names::{SCHEMA, literal, qualified},
    pump::{self, Broken, Meter},
    session,
    shared::{Shared, TableName, lock},
};
use crate::{backend::Connection, metadata::Severity};
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio_postgres::{Client, Statement};

/// How often the owner's health is looked at while rows are read.
const HEALTH_PERIOD: Duration = Duration::from_secs(1);

/// The owner's other standbys may be this far behind before reading rests: the WAL of what the copy makes hot, and its reading,
/// compete with theirs.
const STANDBY_LAG_MAX: &str = "10 seconds";

/// How long a worker rests before it looks again whether it may go on.
const REST: Duration = Duration::from_millis(200);

/// Why a unit was not copied.
#[derive(Clone, Debug)]
pub(super) enum Left {
    /// Changed on the owner since the snapshot: to be copied at a later one.
    Changed(String),
    /// The follower (or the owner) refuses its rows: a person must look.
    Refused { reason: String, code: String },
}

/// What a copy of rows did not bring, by table.
pub(super) type LeftOut = BTreeMap<TableName, Left>;

struct Work<'a> {
    shared: &'a Shared,
    plan: &'a CopyPlan,
    queue: Mutex<VecDeque<&'a Part>>,
    /// Parts still to come of each unit.
    missing: Vec<AtomicUsize>,
    left_out: Mutex<LeftOut>,
    resting: AtomicBool,
    look: Statement,
}

/// Copies every part of a plan at a snapshot. `owner` is a session without it.
pub(super) async fn run(shared: &Shared, owner: &Client, plan: &CopyPlan, snapshot: &str) -> Result<LeftOut, CdcError> {
    let work = Work {
        shared,
        plan,
        queue: Mutex::new(plan.parts.iter().collect()),
        missing: plan.units.iter().map(|unit| AtomicUsize::new(unit.parts)).collect(),
        left_out: Mutex::default(),
        resting: AtomicBool::new(false),
        look: copy_plan::prepare_look(owner).await?,
    };
    let empty = plan.units.iter().filter(|unit| unit.parts == 0).count() as u64;
    shared.copy.tables_done.fetch_add(empty, Ordering::Relaxed);
    let workers = shared.spec.copy.workers.clamp(1, plan.parts.len().max(1));
    let mut sessions = Vec::with_capacity(workers);
    for _ in 0..workers {
        sessions.push((reader(shared, snapshot).await?, session::connect_raw_writer(&shared.spec.to, "copy writer").await?));
    }
    let workers = sessions.into_iter().map(|(reader, writer)| worker(&work, owner, reader, writer));
    tokio::select! {
        result = futures_util::future::try_join_all(workers) => { result?; }
        result = watch_health(&work, owner) => result?,
    }
    Ok(work.left_out.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner))
}

/// A raw session of the owner that sees the snapshot.
async fn reader(shared: &Shared, snapshot: &str) -> Result<Connection, CdcError> {
    let mut reader = session::connect_raw(&shared.spec.from, "copy reader", &[]).await?;
    let begin = format!(
        "SET row_security = off; BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT {}; SAVEPOINT part",
        literal(snapshot)
    );
    session::run_raw(&mut reader, &begin, "import the copy's snapshot").await?;
    Ok(reader)
}

async fn worker(work: &Work<'_>, owner: &Client, mut reader: Connection, mut writer: Connection) -> Result<(), CdcError> {
    loop {
        let Some(part) = lock(&work.queue).pop_front() else { return Ok(()) };
        let Some(unit) = work.plan.units.get(part.unit) else { continue };
        if lock(&work.left_out).contains_key(&unit.table) {
            continue;
        }
        match copy_part(work, owner, &mut reader, &mut writer, part, unit.parts).await? {
            None => {
                if work.missing.get(part.unit).is_some_and(|missing| missing.fetch_sub(1, Ordering::AcqRel) == 1) {
                    work.shared.copy.tables_done.fetch_add(1, Ordering::Relaxed);
                }
            }
            Some(left) => {
                lock(&work.left_out).insert(unit.table.clone(), left);
            }
        }
    }
}

/// Copies one part and notes it, or says why the unit must be left out. `Err`: the copy as a whole cannot go on now.
async fn copy_part(
    work: &Work<'_>,
    owner: &Client,
    reader: &mut Connection,
    writer: &mut Connection,
    part: &Part,
    parts: usize,
) -> Result<Option<Left>, CdcError> {
    let Some(unit) = work.plan.units.get(part.unit) else { return Ok(None) };
    let begin = if part.freeze { format!("BEGIN; TRUNCATE ONLY {}", part.name) } else { "BEGIN".to_owned() };
    session::run_raw(writer, &begin, "begin to load a table").await?;
    let copied = pump::run(reader, writer, (&part.out, &part.into, &part.name), work).await;
    let left = match copied {
        Ok(carried) => {
            work.shared.copy.rows.fetch_sub(carried.frames.saturating_sub(carried.rows), Ordering::Relaxed);
            tracing::debug!(table = part.name, part = part.number, rows = carried.rows, "a part of the copy is there");
            match copy_plan::look(owner, &work.look, part.oid).await? {
                Some(look) if look == part.look => None,
                Some(_) => Some(Left::Changed("it was changed on the owner while it was being copied".into())),
                None => Some(Left::Changed("it was dropped on the owner while it was being copied".into())),
            }
        }
        Err(Broken { blame: Blame::Moment, error }) => return Err(error),
        Err(Broken { error, .. }) => match copy_plan::look(owner, &work.look, part.oid).await? {
            Some(look) if look == part.look => {
                let code = if let CdcError::Refused { code, .. } = &error { code.clone() } else { String::new() };
                Some(Left::Refused { reason: error.to_string(), code })
            }
            _ => Some(Left::Changed("it was changed on the owner while it was being copied".into())),
        },
    };
    let end = match &left {
        Some(_) => "ROLLBACK".to_owned(),
        None => format!(
            "INSERT INTO {SCHEMA}.copy_part (feed, schema_name, table_name, part, parts) VALUES ({}, {}, {}, {}, {parts}); COMMIT",
            literal(&work.shared.feed),
            literal(&unit.table.0),
            literal(&unit.table.1),
            part.number
        ),
    };
    // Locks taken behind a savepoint end with it: the owner's tables are locked (ACCESS SHARE) only while they are read.
    futures_util::future::try_join(
        session::run_raw(reader, "ROLLBACK TO SAVEPOINT part", "end the reading of a table"),
        session::run_raw(writer, &end, "store a part of the copy"),
    )
    .await?;
    Ok(left)
}

impl Meter for Work<'_> {
    async fn moved(&self, rows: u64, bytes: u64) {
        self.shared.copy.rows.fetch_add(rows, Ordering::Relaxed);
        self.shared.copy.bytes.fetch_add(bytes, Ordering::Relaxed);
        while self.resting.load(Ordering::Relaxed) {
            tokio::time::sleep(REST).await;
        }
    }
}

/// Lets the workers rest while the owner's other standbys are behind. Ends only with an error.
async fn watch_health(work: &Work<'_>, owner: &Client) -> Result<(), CdcError> {
    loop {
        tokio::time::sleep(HEALTH_PERIOD).await;
        let row = owner
            .query_opt(
                &format!(
                    "SELECT application_name, extract(epoch FROM replay_lag)::int8 FROM pg_stat_replication
                     WHERE application_name NOT LIKE 'understudy%' AND replay_lag > interval '{STANDBY_LAG_MAX}'
                     ORDER BY replay_lag DESC LIMIT 1"
                ),
                &[],
            )
            .await
            .attempt("look at the owner's standbys")?;
        let rest = row.is_some();
        if work.resting.swap(rest, Ordering::Relaxed) != rest {
            let message = if rest {
                "the copy rests: a standby of the owner has fallen behind"
            } else {
                "the copy goes on: the owner's standbys have caught up"
            };
            let data = row.map_or_else(
                || serde_json::json!({}),
                |row| serde_json::json!({"standby": row.get::<_, String>(0), "replay_lag_s": row.get::<_, i64>(1)}),
            );
            work.shared.event(Severity::Warning, message, data);
        }
    }
}

/// How long sessions of a copy that was killed may take to end.
const PREDECESSORS_TIMEOUT: Duration = Duration::from_secs(30);

/// Ends the sessions that a killed copy has left on the follower. One of them may still have a COMMIT to carry out: only when they
/// are gone it is certain which tables are whole.
pub(super) async fn end_predecessors(follower: &Client) -> Result<(), CdcError> {
    let deadline = tokio::time::Instant::now() + PREDECESSORS_TIMEOUT;
    loop {
        let rows = follower
            .query(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
                 AND application_name IN ('understudy copy writer', 'understudy copy schema')",
                &[],
            )
            .await
            .attempt("end the sessions of an earlier copy")?;
        if rows.is_empty() {
            return Ok(());
        }
        if tokio::time::Instant::now() > deadline {
            return Err(CdcError::Protocol("sessions of an earlier copy on the follower do not end".into()));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Empties what an interrupted copy has of tables that are not whole, and forgets its parts. Returns the tables that are whole.
pub(super) async fn whole(shared: &Shared, follower: &Client) -> Result<std::collections::BTreeSet<TableName>, CdcError> {
    let rows = follower
        .query(
            "SELECT p.schema_name, p.table_name, count(*) = max(p.parts), bool_or(c.relkind = 'p') FROM understudy.copy_part p
             JOIN pg_namespace n ON n.nspname = p.schema_name JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = p.table_name
             WHERE p.feed = $1 GROUP BY 1, 2",
            &[&shared.feed],
        )
        .await
        .attempt("read how far the copy came")?;
    let mut whole = std::collections::BTreeSet::new();
    for row in &rows {
        let table: TableName = (row.get(0), row.get(1));
        if row.get(2) {
            whole.insert(table);
            continue;
        }
        // Without ONLY, tables that inherit from it would be emptied, too.
        let name = format!("{}{}", if row.get(3) { "" } else { "ONLY " }, qualified(&table.0, &table.1));
        follower
            .batch_execute(&format!(
                "BEGIN; TRUNCATE {name}; DELETE FROM understudy.copy_part WHERE feed = {} AND schema_name = {} AND table_name = {}; COMMIT",
                literal(&shared.feed),
                literal(&table.0),
                literal(&table.1)
            ))
            .await
            .attempt("empty a table that was copied in part")?;
    }
    Ok(whole)
}
