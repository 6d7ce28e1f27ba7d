//! The comparison from start to end.

use super::{
    Follower, Options, Progress, Report, TableReport, ValidateError,
    compare::{Rows, Step, Tally},
    plan::{self, Plan},
    repair,
    session::Session,
    snapshot,
};
use crate::config::ServerUrl;
use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError, atomic::Ordering},
    time::Instant,
};

/// Most tables compared at the same time, whatever was asked for: each costs a connection on both servers.
const WORKERS_MAX: usize = 16;

/// Compares every table of `owner` with `follower_url`. With a `follower` (the feed between them) both sides are read at
/// one position of the owner's log while writes go on; without, the result is exact only if nobody writes.
///
/// # Errors
/// [`ValidateError`]. A table that cannot be read is reported as skipped, with the reason.
pub async fn verify<F: Follower>(
    owner: &ServerUrl,
    follower_url: &ServerUrl,
    follower: Option<&F>,
    options: &Options,
    progress: &Progress,
) -> Result<Report, ValidateError> {
    let started = Instant::now();
    let workers = options.workers.clamp(1, WORKERS_MAX);
    let pair = snapshot::pair(owner, follower_url, follower, workers, false).await?;
    let (Some(first_owner), Some(first_follower)) = (pair.owners.first(), pair.followers.first()) else {
        return Err(ValidateError::Connect { side: "owner", reason: "no session was opened".into() });
    };
    let mapping = plan::Mapping { rules: &options.rules, back: options.back };
    let owner_tables = plan::load_in_snapshot(first_owner).await?;
    let follower_tables = plan::load_in_snapshot(first_follower).await?;
    let (plans, mut tables) = plan::decide(&owner_tables, &follower_tables, options.tables.as_deref(), &mapping)?;
    progress.start(plans.len(), plans.iter().map(|plan| plan.rows_estimated).sum());

    let queue = Mutex::new(plans.iter().collect::<VecDeque<&Plan>>());
    let sessions = pair.owners.iter().zip(&pair.followers);
    let worker = |(owner, follower)| compare_tables(owner, follower, &queue, options, progress);
    let results = futures_util::future::try_join_all(sessions.map(worker)).await?;
    let (lsn, mut pause) = (pair.lsn, pair.pause);
    // Their snapshots hold back vacuum: end them before anything else.
    drop(pair);

    let mut damaged = Vec::new();
    // What `decide` has skipped, it has skipped by design.
    let unread = results.iter().flatten().filter(|(_, report, _)| report.skipped.is_some()).count() as u64;
    for (plan, report, keys) in results.into_iter().flatten() {
        if !keys.is_empty() {
            damaged.push((plan, tables.len(), keys));
        }
        tables.push(report);
    }
    if options.repair && !damaged.is_empty() {
        let pair = snapshot::pair(owner, follower_url, follower, 1, true).await?;
        let held = Instant::now();
        for (plan, index, keys) in damaged {
            let repaired = repair::table(&pair, follower_url, plan, &keys).await?;
            if let Some(report) = tables.get_mut(index) {
                report.repaired = repaired;
            }
        }
        pause += pair.pause + held.elapsed();
    }
    tables.sort_by(|a, b| (&a.schema, &a.name).cmp(&(&b.schema, &b.name)));
    Ok(Report {
        lsn,
        rows: tables.iter().map(|table| table.rows).sum(),
        differences: tables.iter().map(|table| table.differences).sum(),
        unread,
        tables,
        seconds: started.elapsed().as_secs_f64(),
        pause_ms: pause.as_secs_f64() * 1e3,
    })
}

type Compared<'a> = (&'a Plan, TableReport, Vec<Vec<String>>);

/// One worker: takes tables until none is left.
async fn compare_tables<'a>(
    owner: &Session,
    follower: &Session,
    queue: &Mutex<VecDeque<&'a Plan>>,
    options: &Options,
    progress: &Progress,
) -> Result<Vec<Compared<'a>>, ValidateError> {
    let mut done = Vec::new();
    loop {
        let next = queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let Some(plan) = next else { return Ok(done) };
        let started = Instant::now();
        let mut report = plan::report(&(plan.schema.clone(), plan.name.clone()), None);
        report.notes = plan.notes.clone();
        // A failed statement must not cost the snapshot.
        for session in [owner, follower] {
            session.run("starting a table", "SAVEPOINT one_table").await?;
        }
        let mut tally = Tally::default();
        match compare_table(owner, follower, plan, options, progress, &mut tally).await {
            Ok(()) => {}
            Err(ValidateError::Sql { side, action, reason }) if !owner.client.is_closed() && !follower.client.is_closed() => {
                report.skipped = Some(format!("{action} on the {side} failed: {reason}"));
            }
            Err(error) => return Err(error),
        }
        for session in [owner, follower] {
            session.run("ending a table", "ROLLBACK TO one_table; RELEASE one_table").await?;
        }
        (report.rows, report.differences, report.examples) = (tally.rows, tally.differences, tally.examples);
        report.seconds = started.elapsed().as_secs_f64();
        if !plan.keyed && report.differences > 0 {
            report.notes.push("has no key: a changed row counts as one missing and one extra, and cannot be repaired by key".into());
        }
        progress.tables_done.fetch_add(1, Ordering::Relaxed);
        done.push((plan, report, tally.keys));
    }
}

async fn compare_table(
    owner: &Session,
    follower: &Session,
    plan: &Plan,
    options: &Options,
    progress: &Progress,
    tally: &mut Tally,
) -> Result<(), ValidateError> {
    let start = async |session: &Session, query: &str| {
        let stream = session.client.copy_out(query).await.map_err(|error| session.error("reading a table", &error))?;
        Ok::<_, ValidateError>(Rows::new(stream, session.side))
    };
    let mut rows_owner = start(owner, &plan.owner_query).await?;
    let mut rows_follower = start(follower, &plan.follower_query).await?;
    let (mut ours, mut theirs) = (rows_owner.next().await?, rows_follower.next().await?);
    loop {
        let step = tally.step(plan, ours.as_deref(), theirs.as_deref(), options.examples_max);
        if matches!(step, Step::Owner | Step::Both) {
            ours = rows_owner.next().await?;
            progress.rows.fetch_add(1, Ordering::Relaxed);
        }
        if matches!(step, Step::Follower | Step::Both) {
            theirs = rows_follower.next().await?;
        }
        if step == Step::Done {
            return Ok(());
        }
    }
}
