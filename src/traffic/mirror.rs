//! Mirrored writes, applied: for sources where logical decoding cannot be had. Every write transaction that clients end is run on
//! the shadow as they wrote it, one after another in the order in which their ends were seen here, and committed there if it was committed.
//!
//! What is promised is less than what the change stream promises. The shadow runs statements, not rows: `now()`, `random()` and
//! sequences under concurrency give it other values; what goes around the proxy never comes; what could not be remembered or failed
//! here is missing. Such transactions are counted with their reason as *diverged*; values that differ are found by comparing rows.
//! Transactions that were rolled back are run, too, and rolled back: they move sequences.
//!
//! No client ever waits for it: the queue is bounded, what does not fit has diverged.

use super::{
    copies::{ByteBudget, Identity, Permit, RehearsedStep},
    database::Database,
    observations::{Counter, Reasons},
    route::ShadowRoute,
    runner::{RunError, Runner},
};
use crate::sql::{Kind, TransactionVerb};
use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::sync::{mpsc, watch};

/// Transactions that wait; with the byte budget of all copies this bounds memory.
const QUEUE_LENGTH_MAX: usize = 65_536;

/// Longest time a statement may run on the shadow: the others wait behind it.
const STATEMENT_LIMIT: Duration = Duration::from_secs(120);

/// Before a shadow that cannot be reached is tried again.
const RETRY: Duration = Duration::from_millis(500);

/// What a transaction costs besides its bytes, per statement.
const STEP_BYTES: usize = 512;

/// One statement of a mirrored transaction.
#[derive(Debug)]
pub struct MirroredStep {
    /// What, and what the owner answered.
    pub step: RehearsedStep,
    /// It failed on the owner.
    pub failed: bool,
}

/// A write transaction that has ended on the owner.
#[derive(Debug)]
pub struct MirroredTransaction {
    /// Who.
    pub identity: Arc<Identity>,
    /// With BEGIN and savepoints, without COMMIT or ROLLBACK.
    pub steps: Vec<MirroredStep>,
    /// How it ended.
    pub committed: bool,
}

struct Queued {
    transaction: MirroredTransaction,
    at: Instant,
    /// The copy behind which it was recorded.
    generation: u64,
    _permit: Permit,
}

/// What the worker looks at before it begins a transaction.
#[derive(Default)]
struct State {
    /// While above zero nothing is begun.
    pauses: usize,
    /// Raised with each copy's snapshot: what was recorded before is in the snapshot, and must not be run again.
    generation: u64,
}

/// The writes of one database on their way to one shadow.
pub struct Mirror {
    recording: AtomicBool,
    queue: mpsc::Sender<Queued>,
    receiver: Mutex<Option<mpsc::Receiver<Queued>>>,
    budget: Arc<ByteBudget>,
    offered: AtomicU64,
    done: watch::Sender<u64>,
    state: watch::Sender<State>,
    /// Held while a transaction is run.
    running: tokio::sync::Mutex<()>,
    front: Mutex<Option<Instant>>,
    /// Committed here as on the owner.
    pub applied: Counter,
    /// Not on the shadow, or not in the same way.
    pub diverged: Counter,
    /// Why.
    pub reasons: Reasons,
}

/// Nothing is begun on the shadow while this lives.
pub struct Pause(Arc<ShadowRoute>);

impl Drop for Pause {
    fn drop(&mut self) {
        self.0.mirror.state.send_modify(|state| state.pauses -= 1);
    }
}

impl Mirror {
    /// A mirror that records nothing yet.
    pub fn new(budget: Arc<ByteBudget>) -> Self {
        let (queue, receiver) = mpsc::channel(QUEUE_LENGTH_MAX);
        Mirror {
            recording: AtomicBool::new(false),
            queue,
            receiver: Mutex::new(Some(receiver)),
            budget,
            offered: AtomicU64::new(0),
            done: watch::Sender::new(0),
            state: watch::Sender::default(),
            running: tokio::sync::Mutex::default(),
            front: Mutex::default(),
            applied: Counter::default(),
            diverged: Counter::default(),
            reasons: Reasons::default(),
        }
    }

    /// Sessions hand their write transactions over.
    pub fn is_recording(&self) -> bool {
        self.recording.load(Ordering::Acquire)
    }

    /// What is recorded is run at once: no copy is being made, nothing is being compared.
    pub fn is_applying(&self) -> bool {
        self.is_recording() && self.state.borrow().pauses == 0
    }

    /// From the next transaction on, or no more.
    pub fn record(&self, on: bool) {
        self.recording.store(on, Ordering::Release);
    }

    /// Records behind a snapshot that is being taken, with no transaction open: what waits is in it.
    pub fn record_anew(&self) {
        self.state.send_modify(|state| state.generation += 1);
        self.record(true);
    }

    /// Records no more and forgets what waits: there is no shadow (yet) that it belongs to.
    pub fn abandon(&self) {
        self.record(false);
        self.state.send_modify(|state| state.generation += 1);
    }

    /// Waits until no transaction is being run. False: not in time. While paused none is begun.
    pub async fn at_rest(&self, timeout: Duration) -> bool {
        tokio::time::timeout(timeout, self.running.lock()).await.is_ok()
    }

    /// Takes a transaction; never waits.
    pub fn offer(&self, transaction: MirroredTransaction) {
        let bytes = transaction.steps.iter().map(|step| step.step.operation.bytes() + STEP_BYTES).sum();
        let Some(permit) = self.budget.take(bytes) else { return self.diverge("dropped: memory budget full") };
        let Ok(place) = self.queue.try_reserve() else { return self.diverge("dropped: queue full") };
        // Counted before it can be done: else `drained` could return one too early.
        self.offered.fetch_add(1, Ordering::AcqRel);
        let generation = self.state.borrow().generation;
        place.send(Queued { transaction, at: Instant::now(), generation, _permit: permit });
    }

    /// A committed transaction is not on the shadow, or not in the same way.
    pub fn diverge(&self, reason: &str) {
        self.diverged.increment();
        self.reasons.count(reason);
    }

    /// Transactions that wait.
    pub fn waiting(&self) -> u64 {
        self.offered.load(Ordering::Acquire).saturating_sub(*self.done.borrow())
    }

    /// Age of the transaction that is being run.
    pub fn lag(&self) -> Duration {
        self.front.lock().unwrap_or_else(PoisonError::into_inner).map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// Waits until everything offered so far has been run. False: not in time.
    pub async fn drained(&self, timeout: Duration) -> bool {
        let wanted = self.offered.load(Ordering::Acquire);
        let mut done = self.done.subscribe();
        tokio::time::timeout(timeout, done.wait_for(|done| *done >= wanted)).await.is_ok_and(|result| result.is_ok())
    }

    /// Waits until a transaction of this generation may be run. `None`: it is in the snapshot of a newer copy.
    async fn turn(&self, generation: u64) -> Option<tokio::sync::MutexGuard<'_, ()>> {
        let mut state = self.state.subscribe();
        loop {
            state.wait_for(|state| state.pauses == 0 || state.generation != generation).await.ok()?;
            let running = self.running.lock().await;
            // Paused meanwhile: whoever paused may have looked whether something runs.
            let state = self.state.borrow();
            if state.generation != generation {
                return None;
            }
            if state.pauses == 0 {
                return Some(running);
            }
        }
    }

    fn set_front(&self, at: Option<Instant>) {
        *self.front.lock().unwrap_or_else(PoisonError::into_inner) = at;
    }
}

/// Lets nothing be begun until the guard is dropped.
pub fn pause(shadow: &Arc<ShadowRoute>) -> Pause {
    shadow.mirror.state.send_modify(|state| state.pauses += 1);
    Pause(Arc::clone(shadow))
}

/// Applies what sessions hand over, for as long as the process lives.
pub async fn apply(database: Arc<Database>, shadow: Arc<ShadowRoute>) {
    let receiver = shadow.mirror.receiver.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some(mut receiver) = receiver else { return };
    // A commit that the shadow forgets in a crash is not run again: they wait for its disk.
    let set_up = "SET default_transaction_read_only = off; SET statement_timeout = '110s'";
    let mut runner = Runner::new(database, shadow.target.clone(), set_up, STATEMENT_LIMIT);
    let mirror = &shadow.mirror;
    while let Some(queued) = receiver.recv().await {
        mirror.set_front(Some(queued.at));
        if let Some(_running) = mirror.turn(queued.generation).await {
            carry_out(&mut runner, &shadow, &queued.transaction).await;
        }
        mirror.set_front(None);
        // Gives its bytes back before it counts.
        drop(queued);
        mirror.done.send_modify(|done| *done += 1);
    }
}

/// How running a transaction ended.
#[derive(Debug, PartialEq)]
enum Outcome {
    Applied,
    /// As the owner rolled it back.
    RolledBack,
    Diverged(String),
    /// Nothing is certain but that nothing was committed.
    Unreachable(&'static str),
}

async fn carry_out(runner: &mut Runner, shadow: &ShadowRoute, transaction: &MirroredTransaction) {
    let mirror = &shadow.mirror;
    let mut refused = false;
    loop {
        match run(runner, transaction).await {
            Outcome::Applied => return mirror.applied.increment(),
            Outcome::RolledBack => return,
            Outcome::Diverged(reason) => {
                if transaction.committed {
                    mirror.diverge(&reason);
                }
                return;
            }
            Outcome::Unreachable(reason) => {
                runner.start_over();
                // A recording that has ended wants nothing more.
                if !mirror.is_recording() {
                    return mirror.diverge(reason);
                }
                if !reachable(shadow).await {
                    tokio::time::sleep(RETRY).await;
                } else if refused {
                    // The server is there, twice in a row: it is this role or this statement.
                    return mirror.diverge(reason);
                } else {
                    refused = true;
                    continue;
                }
                refused = false;
            }
        }
    }
}

async fn reachable(shadow: &ShadowRoute) -> bool {
    match crate::backend::control(&shadow.target.url, "understudy mirror").await {
        Ok((client, connection)) => {
            let driving = tokio::spawn(connection);
            let answers = client.simple_query("SELECT 1").await.is_ok();
            driving.abort();
            answers
        }
        Err(_) => false,
    }
}

async fn run(runner: &mut Runner, transaction: &MirroredTransaction) -> Outcome {
    let lost = |error: RunError| Outcome::Unreachable(error.as_str());
    let Some(first) = transaction.steps.first() else { return Outcome::RolledBack };
    let identity = &transaction.identity;
    // Some DDL refuses to run in a transaction, and alone it needs none.
    let bare = transaction.committed && transaction.steps.len() == 1 && first.step.class.kind == Kind::SchemaChange;
    let explicit = matches!(first.step.class.kind, Kind::Transaction(TransactionVerb::Begin { .. }));
    if !explicit
        && !bare
        && let Err(error) = runner.run_text(identity, "BEGIN").await
    {
        return lost(error);
    }
    let mut differs = None;
    for (number, MirroredStep { step, failed }) in transaction.steps.iter().enumerate() {
        let fresh = number == 0 && (explicit || bare);
        let answer = if fresh { runner.run_fresh(identity, &step.operation).await } else { runner.run(identity, &step.operation).await };
        let answer = match answer {
            Ok((answer, _)) => answer,
            Err(_) if bare => return Outcome::Diverged("the outcome of a schema change is not known".into()),
            Err(error) => return lost(error),
        };
        match (&answer.sqlstate, failed) {
            (Some(_), true) => {}
            (Some(code), false) => {
                if !bare && runner.run_text(identity, "ROLLBACK").await.is_err() {
                    runner.clear();
                }
                return Outcome::Diverged(format!("failed on the shadow: SQLSTATE {code}"));
            }
            (None, true) => differs = Some("failed on the owner only"),
            (None, false) if answer.tags != step.tags => differs = Some("another number of rows on the shadow"),
            (None, false) => {}
        }
    }
    if bare {
        return differs.map_or(Outcome::Applied, |reason| Outcome::Diverged(reason.into()));
    }
    if !transaction.committed {
        return match runner.run_text(identity, "ROLLBACK").await {
            Ok(_) => Outcome::RolledBack,
            Err(error) => lost(error),
        };
    }
    match (runner.run_text(identity, "COMMIT").await, differs) {
        (Err(_), _) => {
            runner.clear();
            Outcome::Diverged("the outcome of a commit is not known".into())
        }
        (Ok(answer), _) if answer.sqlstate.is_some() => {
            Outcome::Diverged(format!("failed on the shadow: SQLSTATE {}", answer.sqlstate.unwrap_or_default()))
        }
        (Ok(answer), _) if answer.tags.first().is_some_and(|tag| &tag[..] != b"COMMIT") => {
            Outcome::Diverged("rolled back on the shadow".into())
        }
        (Ok(_), Some(reason)) => Outcome::Diverged(reason.into()),
        (Ok(_), None) => Outcome::Applied,
    }
}
