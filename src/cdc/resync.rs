//! A follower whose feed has lost its place (the slot is gone or invalidated, the owner failed over or was restored) is brought back
//! into step by what differs: a new slot gives a position and a snapshot, every table is compared with that snapshot, and only rows
//! that differ are written. Then the stream goes on from the new position.
//!
//! Only on a person's word: rows that only the follower has are deleted. It can be interrupted and goes on: a table that is equal is
//! noted in the transaction that made it so, the others are compared with a later snapshot, and what the stream says of them before
//! that is left out (as in an interrupted copy). Tables whose columns changed meanwhile are copied whole, once the stream has
//! brought the change, which is written into it here.

use super::{
    CdcError,
    copy::{self, Ends, shape},
    copy_plan::{self, CopyPlan, Part, Unit},
    copy_rows::{self, Left, LeftOut},
    copy_schema,
    error::Attempt,
    feed::await_predecessor,
    install,
    names::{SCHEMA, literal},
    poll, sequences, session,
    shared::{HeldState, Phase, Shared, TableName, lock},
};
use crate::{
    lsn::Lsn,
    metadata::Severity,
    validate::{Settled, Settler, ValidateError},
};
use std::{
    collections::{BTreeSet, VecDeque},
    sync::{Mutex, atomic::Ordering},
};
use tokio_postgres::Client;

/// The phase of a feed whose follower is being brought back into step.
const PHASE: &str = "resync";

/// Whether an earlier resync has not ended.
pub(super) async fn is_under_way(shared: &Shared) -> Result<bool, CdcError> {
    let follower = session::connect(&shared.spec.to, "resync").await?;
    let there =
        follower.query_one("SELECT to_regclass('understudy.progress') IS NOT NULL", &[]).await.attempt("look for the schema understudy")?;
    if !there.get::<_, bool>(0) {
        return Ok(false);
    }
    let row = follower
        .query_opt("SELECT FROM understudy.progress WHERE feed = $1 AND phase = $2", &[&shared.feed, &PHASE])
        .await
        .attempt("read the feed's progress")?;
    Ok(row.is_some())
}

/// What all tables together took.
#[derive(Default)]
struct Tally {
    tables: u64,
    rows: u64,
    removed: u64,
    written: u64,
}

/// Makes the follower equal to the owner at one position by what differs; goes on where an earlier run was interrupted.
pub(super) async fn run(shared: &Shared) -> Result<(), CdcError> {
    let (spec, feed) = (&shared.spec, shared.feed.as_str());
    if spec.existing() {
        return Err(CdcError::Setup(
            "a shadow with a schema of its own cannot be resynced: VERIFY … REPAIR while its feed runs, or SHADOW STOP, empty its tables and \
             start it again"
                .into(),
        ));
    }
    let owner = session::connect(&spec.from, "copy").await?;
    let version = install::check_owner(&owner, &spec.from).await?;
    let follower = session::connect_writer(&spec.to, "copy").await?;
    install::target_tables(&follower).await?;
    await_predecessor(&follower, feed).await?;
    copy_rows::end_predecessors(&follower).await?;
    shared.set_phase(Phase::Resyncing);
    shared.copy.reset();
    let target_version = session::version(&follower).await?;
    let ends = Ends { shared, owner, follower, versions: (version, target_version) };
    let stored = ends
        .follower
        .query_opt("SELECT phase, end_lsn::text FROM understudy.progress WHERE feed = $1", &[&feed])
        .await
        .attempt("read the feed's progress")?;
    let position = match &stored {
        None => {
            return Err(CdcError::Setup(format!(
                "{} holds nothing of the feed {feed}: there is nothing to compare, start it with a copy",
                spec.to
            )));
        }
        Some(row) if row.get::<_, &str>(0) == PHASE => Some(session::lsn(row.get(1))?),
        Some(row) if row.get::<_, &str>(0) == "streaming" => None,
        Some(_) => return Err(CdcError::Setup("the shadow's copy has not ended: start it (SHADOW START), not a resync".into())),
    };
    let mut exporter = session::connect_replication(&spec.from).await?;
    let (consistent, at, snapshot) = match position {
        Some(consistent) if consistent > Lsn::ZERO && ends.slot_holds(consistent).await? => {
            let (again, snapshot) = copy::create_slot(shared, &ends.owner, &mut exporter, version, &temporary_name(), true).await?;
            (consistent, again, snapshot)
        }
        _ => {
            begin(&ends).await?;
            let (consistent, snapshot) = copy::create_slot(shared, &ends.owner, &mut exporter, version, feed, false).await?;
            store_position(&ends.follower, feed, consistent).await?;
            (consistent, consistent, snapshot)
        }
    };
    let keeper = copy::import(shared, &snapshot, "copy keeper").await?;
    let tally = settle_tables(&ends, &keeper, &snapshot, (consistent, at)).await?;
    drop(exporter);
    sequences::advance(&ends.owner, &ends.follower, spec).await?;
    copy_schema::refresh_materialized_views(shared, &ends.owner, &ends.follower).await?;
    // Behind the slot's position, so that the stream brings what changed in the schema while there was no stream.
    poll::tell_what_changed(shared, &ends.owner).await?;
    complete(&ends, consistent, &tally).await
}

fn temporary_name() -> String {
    format!("understudy_resync_{:016x}", fastrand::u64(..))
}

/// Forgets the old place: from here on the follower is not in step, whatever happens.
async fn begin(ends: &Ends<'_>) -> Result<(), CdcError> {
    let Ends { shared, owner, follower, .. } = ends;
    let feed = literal(&shared.feed);
    follower
        .batch_execute(&format!(
            "BEGIN; SET LOCAL synchronous_commit = on;
             UPDATE {SCHEMA}.progress SET phase = '{PHASE}', commit_lsn = '0/0', end_lsn = '0/0', at = now() WHERE feed = {feed};
             DELETE FROM {SCHEMA}.spool WHERE feed = {feed}; DELETE FROM {SCHEMA}.copy_part WHERE feed = {feed};
             DELETE FROM {SCHEMA}.confirmed WHERE feed = {feed}; DELETE FROM {SCHEMA}.owner WHERE feed = {feed};
             DELETE FROM {SCHEMA}.held_table WHERE feed = {feed} AND state IN ('recopy', 'copied');
             COMMIT"
        ))
        .await
        .attempt("forget the feed's old place")?;
    install::drop_slot(owner, &shared.feed).await?;
    for warning in install::prepare_owner(owner, &shared.feed).await? {
        shared.event(Severity::Warning, &warning, serde_json::json!({}));
    }
    Ok(())
}

async fn store_position(follower: &Client, feed: &str, consistent: Lsn) -> Result<(), CdcError> {
    // What waits for a person still does; its rows are copied once it is decided, since its spool is gone.
    let (feed, lsn) = (literal(feed), literal(&consistent.to_string()));
    follower
        .batch_execute(&format!(
            "BEGIN; SET LOCAL synchronous_commit = on;
             UPDATE {SCHEMA}.progress SET commit_lsn = {lsn}, end_lsn = {lsn}, at = now() WHERE feed = {feed} AND phase = '{PHASE}';
             UPDATE {SCHEMA}.held_table SET recopy = true, since_lsn = {lsn} WHERE feed = {feed}; COMMIT"
        ))
        .await
        .attempt("store the feed's new place")
}

/// Compares every table with the snapshot at `at`, and makes it equal.
async fn settle_tables(ends: &Ends<'_>, keeper: &Client, snapshot: &str, (consistent, at): (Lsn, Lsn)) -> Result<Tally, CdcError> {
    let Ends { shared, follower, versions, .. } = ends;
    let whole = copy_rows::whole(shared, follower).await?;
    let aside: BTreeSet<TableName> = follower
        .query("SELECT schema_name, table_name FROM understudy.held_table WHERE feed = $1 AND state <> 'copied'", &[&shared.feed])
        .await
        .attempt("read which tables are set aside")?
        .iter()
        .map(|row| (row.get(0), row.get(1)))
        .collect();
    let settled: BTreeSet<TableName> = whole.union(&aside).cloned().collect();
    let plan = copy_plan::make(keeper, &shared.spec, Some(&shared.feed), *versions, &settled).await?;
    shared.event(
        Severity::Info,
        "the resync began: every table is compared with one snapshot of the owner, and what differs is written",
        serde_json::json!({"lsn": at.to_string(), "tables": plan.units.len(), "done_before": whole.len()}),
    );
    let mut left = LeftOut::new();
    for unit in &plan.units {
        if shape(keeper, &unit.table).await? != shape(follower, &unit.table).await? {
            left.insert(unit.table.clone(), Left::Changed("its columns differ from the owner's".into()));
        }
    }
    let copy = &shared.copy;
    copy.tables.store(plan.units.len() as u64 + settled.len() as u64, Ordering::Relaxed);
    copy.tables_done.store(settled.len() as u64, Ordering::Relaxed);
    copy.rows_estimated.store(plan.rows_estimated, Ordering::Relaxed);
    if at > consistent {
        // Before the rows: what the stream says of these tables up to the new snapshot is in their rows already.
        for unit in plan.units.iter().filter(|unit| !left.contains_key(&unit.table)) {
            ends.hold(&unit.table, HeldState::Copied, 0, "it was compared at a later snapshot than others", at, false).await?;
        }
    }
    let queue: Mutex<VecDeque<(usize, &Unit)>> =
        Mutex::new(plan.units.iter().enumerate().filter(|(_, unit)| !left.contains_key(&unit.table)).collect());
    let workers = shared.spec.copy.workers.clamp(1, plan.units.len().max(1));
    let results = futures_util::future::try_join_all((0..workers).map(|_| worker(ends, &plan, &queue, snapshot))).await?;
    let mut tally = Tally { tables: plan.units.len() as u64, ..Tally::default() };
    for (settled, worker_left) in results {
        for one in settled {
            tally.rows += one.rows;
            tally.removed += one.removed;
            tally.written += one.written;
        }
        left.extend(worker_left);
    }
    ends.set_aside(left, at, true).await?;
    Ok(tally)
}

async fn worker(
    ends: &Ends<'_>,
    plan: &CopyPlan,
    queue: &Mutex<VecDeque<(usize, &Unit)>>,
    snapshot: &str,
) -> Result<(Vec<Settled>, LeftOut), CdcError> {
    let Ends { shared, owner, .. } = ends;
    let look = copy_plan::prepare_look(owner).await?;
    let settler = Settler::open(&shared.spec.from, &shared.spec.to, snapshot).await?;
    let (mut done, mut left) = (Vec::new(), LeftOut::new());
    loop {
        let next = lock(queue).pop_front();
        let Some((number, unit)) = next else { return Ok((done, left)) };
        let parts: Vec<&Part> = plan.parts.iter().filter(|part| part.unit == number).collect();
        let note = format!(
            "INSERT INTO {SCHEMA}.copy_part (feed, schema_name, table_name, part, parts) VALUES ({}, {}, {}, 0, 1)",
            literal(&shared.feed),
            literal(&unit.table.0),
            literal(&unit.table.1)
        );
        // A table that was rewritten or truncated behind the snapshot looks empty to it.
        let still = async || {
            for part in &parts {
                if !matches!(copy_plan::look(owner, &look, part.oid).await, Ok(Some(found)) if found == part.look) {
                    return false;
                }
            }
            true
        };
        match settler.table(&unit.table.0, &unit.table.1, &note, &shared.copy.rows, still).await {
            Ok(Some(settled)) => {
                tracing::debug!(table = unit.table.1, removed = settled.removed, written = settled.written, "a table is equal again");
                done.push(settled);
            }
            Ok(None) => {
                left.insert(unit.table.clone(), Left::Changed("it was changed on the owner while it was compared".into()));
            }
            Err(ValidateError::Sql { side: "follower", reason, .. }) if settler.is_alive() => {
                left.insert(unit.table.clone(), Left::Refused { reason, code: String::new() });
            }
            Err(error) => return Err(error.into()),
        }
        shared.copy.tables_done.fetch_add(1, Ordering::Relaxed);
    }
}

async fn complete(ends: &Ends<'_>, consistent: Lsn, tally: &Tally) -> Result<(), CdcError> {
    let shared = ends.shared;
    ends.start_streaming(PHASE, consistent).await?;
    shared.event(
        Severity::Info,
        "the resync is complete: the follower equals the owner again, and the change stream follows",
        serde_json::json!({"tables": tally.tables, "rows_compared": tally.rows, "rows_removed": tally.removed, "rows_written": tally.written,
            "seconds": shared.state().copy.seconds}),
    );
    Ok(())
}
