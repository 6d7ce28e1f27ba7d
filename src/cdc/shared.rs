//! What the tasks of a feed share with each other and with the rest of the product. Small locks, never held across an await.

use super::{Fault, FeedSpec, applier::Command, names::feed_name};
use crate::{
    console::state::{CopyState, FeedState, LagState},
    lsn::{AtomicLsn, Lsn},
    metadata::{Repository, Severity},
    schema::Adapter,
};
use hdrhistogram::Histogram;
use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use tokio::sync::{Notify, mpsc, watch};

/// Findings kept as examples.
const EXAMPLES_MAX: usize = 20;

/// Markers remembered for `wait_marker`: a cutover uses a handful.
const MARKERS_MAX: usize = 256;

/// Tables whose newest change is remembered one by one; beyond it the answer is "changed" for tables not remembered.
const TABLES_MAX: usize = 50_000;

/// Longest lag the histogram tells apart, in milliseconds (a day).
const LAG_MS_MAX: u64 = 86_400_000;

/// Where a feed stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Starting,
    Copying,
    /// Compared with the owner and made equal, after the feed has lost its place.
    Resyncing,
    CatchingUp,
    Streaming,
    /// Fed by mirrored writes.
    Mirroring,
    Retrying(String),
    Failed(String),
    Stopped,
}

/// Why a table is set aside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Held {
    pub proposal: i64,
    pub state: HeldState,
    pub reason: String,
    pub since: Lsn,
    /// Its rows must be copied again once the proposal is decided.
    pub recopy: bool,
}

/// What must happen before a table set aside goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HeldState {
    /// A person approves a proposal.
    Waiting,
    /// A person rejected it: set aside for good.
    Rejected,
    /// Its rows are copied again.
    Recopy,
    /// They have been copied; `since` is the position of the copy: what was spooled behind it is replayed.
    Copied,
}

impl HeldState {
    pub fn as_str(self) -> &'static str {
        match self {
            HeldState::Waiting => "waiting",
            HeldState::Rejected => "rejected",
            HeldState::Recopy => "recopy",
            HeldState::Copied => "copied",
        }
    }

    pub fn parse(text: &str) -> Self {
        [HeldState::Rejected, HeldState::Recopy, HeldState::Copied].into_iter().find(|s| s.as_str() == text).unwrap_or(HeldState::Waiting)
    }
}

/// Schema and name of a table.
pub(super) type TableName = (String, String);

/// Progress of the copy.
#[derive(Default)]
pub(super) struct CopyProgress {
    pub tables: AtomicU64,
    pub tables_done: AtomicU64,
    pub rows: AtomicU64,
    pub rows_estimated: AtomicU64,
    pub bytes: AtomicU64,
    pub done: AtomicBool,
    pub started: Mutex<Option<Instant>>,
    pub ended: Mutex<Option<Instant>>,
}

impl CopyProgress {
    pub fn reset(&self) {
        for counter in [&self.tables, &self.tables_done, &self.rows, &self.rows_estimated, &self.bytes] {
            counter.store(0, Ordering::Relaxed);
        }
        self.done.store(false, Ordering::Relaxed);
        *lock(&self.started) = Some(Instant::now());
        *lock(&self.ended) = None;
    }

    /// Nothing more is copied.
    pub fn end(&self) {
        *lock(&self.ended) = Some(Instant::now());
        self.done.store(true, Ordering::Relaxed);
    }

    fn state(&self) -> CopyState {
        let started = *lock(&self.started);
        let ended = *lock(&self.ended);
        let seconds = started.map_or(0.0, |started| ended.unwrap_or_else(Instant::now).duration_since(started).as_secs_f64());
        let (rows, estimated) = (self.rows.load(Ordering::Relaxed), self.rows_estimated.load(Ordering::Relaxed));
        let done = self.done.load(Ordering::Relaxed);
        let seconds_left = (!done && rows > 0 && estimated > rows).then(|| seconds / rows as f64 * (estimated - rows) as f64);
        CopyState {
            tables_done: self.tables_done.load(Ordering::Relaxed),
            tables: self.tables.load(Ordering::Relaxed),
            rows,
            rows_estimated: estimated,
            bytes: self.bytes.load(Ordering::Relaxed),
            seconds,
            seconds_left,
            done,
        }
    }
}

pub(super) struct Shared {
    pub spec: FeedSpec,
    pub feed: String,
    pub adapter: Arc<Adapter>,
    pub repository: Repository,
    pub fault: Fault,
    pub phase: Mutex<Phase>,
    pub copy: CopyProgress,
    pub applied: AtomicLsn,
    pub applied_watch: watch::Sender<Lsn>,
    /// End of the newest applied commit (never moved by a keep-alive).
    pub last_commit: AtomicLsn,
    /// Commit record of the transaction being applied; zero: none. Announced before holds are looked at.
    pub in_flight: AtomicLsn,
    /// Newest position that the owner reported.
    pub received: AtomicLsn,
    /// Applied and durable on the follower: what the owner may forget.
    pub confirmed: AtomicLsn,
    pub changes: AtomicU64,
    pub transactions: AtomicU64,
    findings: AtomicU64,
    examples: Mutex<VecDeque<String>>,
    pub held: Mutex<BTreeMap<TableName, Held>>,
    touched: Mutex<HashMap<TableName, Lsn>>,
    markers: Mutex<VecDeque<(String, Lsn)>>,
    /// Positions at which somebody holds the applier.
    pub holds: watch::Sender<BTreeMap<u64, Lsn>>,
    pub next_hold: AtomicU64,
    lag: Mutex<Histogram<u64>>,
    /// Commit time of the oldest change not yet applied, in microseconds since 1970; 0: none.
    pub oldest_us: AtomicI64,
    pub caught_up: Mutex<Instant>,
    /// Unfinished transactions did not fit into the spool: the owner keeps them until they end.
    pub whole_only: AtomicBool,
    /// A copy has ended, and its tables have no statistics yet.
    pub analyze: AtomicBool,
    /// Schema changes are found by looking at the owner's catalog.
    pub polled: AtomicBool,
    /// Connected to both sides and following.
    pub connected: AtomicBool,
    /// Tasks that wait for a position: while there are any, the owner is asked for its position every few milliseconds.
    pub waiters: AtomicUsize,
    /// Somebody began to wait, or a position was confirmed: the reader sends a status message.
    pub wake: Notify,
    /// A waiter sees no progress: the owner's WAL is flushed by a heartbeat.
    pub nudge: Notify,
    /// A table waits to be copied again, or statements wait to be run outside a transaction.
    pub chores: Notify,
    pub chores_deferred: Notify,
    pub commands: mpsc::Sender<Command>,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic elsewhere must not stop the feed's figures; each critical section leaves whole values.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn now_us() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_micros() as i64)
}

/// Counts as a waiter while it lives.
pub(super) struct Waiting<'a>(&'a Shared);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiters.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Shared {
    /// Makes the reader ask the owner for its position every few milliseconds, as long as the guard lives.
    pub fn waiting(&self) -> Waiting<'_> {
        self.waiters.fetch_add(1, Ordering::AcqRel);
        self.wake.notify_one();
        Waiting(self)
    }

    pub fn new(spec: FeedSpec, adapter: Arc<Adapter>, repository: Repository, fault: Fault, commands: mpsc::Sender<Command>) -> Self {
        let mut lag = Histogram::new_with_bounds(1, LAG_MS_MAX, 3).unwrap_or_else(|_| {
            // Bounds are constants that the constructor accepts.
            unreachable!("constant histogram bounds")
        });
        lag.auto(false);
        Shared {
            feed: feed_name(&spec),
            spec,
            adapter,
            repository,
            fault,
            phase: Mutex::new(Phase::Starting),
            copy: CopyProgress::default(),
            applied: AtomicLsn::default(),
            applied_watch: watch::Sender::new(Lsn::ZERO),
            last_commit: AtomicLsn::default(),
            in_flight: AtomicLsn::default(),
            received: AtomicLsn::default(),
            confirmed: AtomicLsn::default(),
            changes: AtomicU64::new(0),
            transactions: AtomicU64::new(0),
            findings: AtomicU64::new(0),
            examples: Mutex::default(),
            held: Mutex::default(),
            touched: Mutex::default(),
            markers: Mutex::default(),
            holds: watch::Sender::new(BTreeMap::new()),
            next_hold: AtomicU64::new(0),
            lag: Mutex::new(lag),
            oldest_us: AtomicI64::new(0),
            caught_up: Mutex::new(Instant::now()),
            whole_only: AtomicBool::new(false),
            analyze: AtomicBool::new(false),
            polled: AtomicBool::new(false),
            connected: AtomicBool::new(false),
            waiters: AtomicUsize::new(0),
            wake: Notify::new(),
            nudge: Notify::new(),
            chores: Notify::new(),
            chores_deferred: Notify::new(),
            commands,
        }
    }

    pub fn event(&self, severity: Severity, message: &str, data: serde_json::Value) {
        self.repository.record(severity, "cdc", &self.spec.database, &self.spec.shadow, message, data);
    }

    pub fn set_phase(&self, phase: Phase) {
        *lock(&self.phase) = phase;
    }

    pub fn applied(&self) -> Lsn {
        self.applied.load()
    }

    /// The only way forward: called by the applier after a commit, or for a keep-alive with nothing pending.
    pub fn advance_applied(&self, lsn: Lsn) {
        if lsn > self.applied.load() {
            self.applied.advance(lsn);
            self.applied_watch.send_replace(lsn);
        }
    }

    /// A row was missing or already there.
    pub fn finding(&self, table: &TableName, key: &str, what: &str) {
        let count = self.findings.fetch_add(1, Ordering::Relaxed) + 1;
        let text = format!("{}.{} ({key}): {what}", table.0, table.1);
        let mut examples = lock(&self.examples);
        if examples.len() == EXAMPLES_MAX {
            examples.pop_front();
        }
        examples.push_back(text);
        drop(examples);
        // Every finding is counted; the first of each power of ten is an alert, so that a storm stays readable.
        if count.to_string().trim_end_matches('0') == "1" {
            self.event(
                Severity::Alert,
                "the follower differed from the owner where a change was applied; it was put right, VERIFY shows the rest",
                serde_json::json!({"table": format!("{}.{}", table.0, table.1), "key": key, "what": what, "findings": count}),
            );
        }
    }

    pub fn touch(&self, table: &TableName, commit_lsn: Lsn) {
        let mut touched = lock(&self.touched);
        if let Some(lsn) = touched.get_mut(table) {
            *lsn = (*lsn).max(commit_lsn);
        } else if touched.len() < TABLES_MAX {
            touched.insert(table.clone(), commit_lsn);
        }
    }

    pub fn touched_since(&self, table: &TableName, lsn: Lsn) -> bool {
        if lock(&self.held).contains_key(table) {
            return true;
        }
        let touched = lock(&self.touched);
        match touched.get(table) {
            // A commit record that begins at or behind `lsn` ends behind it; positions lie between records.
            Some(commit) => *commit >= lsn,
            None => touched.len() >= TABLES_MAX,
        }
    }

    /// The same for a table named without its schema: any table of that name counts, and none counts as touched.
    pub fn name_touched_since(&self, name: &str, lsn: Lsn) -> bool {
        if lock(&self.held).keys().any(|(_, table)| table == name) {
            return true;
        }
        let touched = lock(&self.touched);
        let mut commits = touched.iter().filter(|((_, table), _)| table == name).map(|(_, commit)| *commit).peekable();
        commits.peek().is_none() || commits.any(|commit| commit >= lsn)
    }

    pub fn marker_seen(&self, id: &str, end: Lsn) {
        let mut markers = lock(&self.markers);
        if markers.len() == MARKERS_MAX {
            markers.pop_front();
        }
        markers.push_back((id.to_owned(), end));
    }

    pub fn marker(&self, id: &str) -> Option<Lsn> {
        lock(&self.markers).iter().rev().find(|(seen, _)| seen == id).map(|(_, lsn)| *lsn)
    }

    pub fn record_lag(&self, commit_us: i64, now_us: i64) {
        let ms = u64::try_from((now_us - commit_us) / 1000).unwrap_or(0);
        lock(&self.lag).saturating_record(ms.max(1));
    }

    pub fn lag(&self) -> Duration {
        if !self.connected.load(Ordering::Acquire) {
            return lock(&self.caught_up).elapsed();
        }
        match self.oldest_us.load(Ordering::Acquire) {
            0 => Duration::ZERO,
            oldest => Duration::from_micros(u64::try_from(now_us() - oldest).unwrap_or(0)),
        }
    }

    pub fn is_streaming(&self) -> bool {
        matches!(*lock(&self.phase), Phase::Streaming | Phase::Mirroring)
    }

    pub fn state(&self) -> FeedState {
        let phase = lock(&self.phase).clone();
        let state = match phase {
            Phase::Starting => "starting".to_owned(),
            Phase::Copying => "copying".to_owned(),
            Phase::Resyncing => "resyncing".to_owned(),
            Phase::CatchingUp => "catching up".to_owned(),
            Phase::Streaming if !self.holds.borrow().is_empty() => "held".to_owned(),
            Phase::Streaming => "streaming".to_owned(),
            Phase::Mirroring => "mirroring".to_owned(),
            Phase::Retrying(why) => format!("retrying: {why}"),
            Phase::Failed(why) => format!("failed: {why}"),
            Phase::Stopped => "stopped".to_owned(),
        };
        let lag = {
            let histogram = lock(&self.lag);
            LagState {
                now: self.lag().as_secs_f64() * 1000.0,
                p50: histogram.value_at_quantile(0.5) as f64,
                p99: histogram.value_at_quantile(0.99) as f64,
                max: histogram.max() as f64,
            }
        };
        FeedState {
            state,
            direction: match self.spec.direction {
                super::Direction::Forward => "forward".to_owned(),
                super::Direction::Reverse => "reverse".to_owned(),
            },
            applied_lsn: self.applied(),
            received_lsn: self.received.load(),
            changes: self.changes.load(Ordering::Relaxed),
            transactions: self.transactions.load(Ordering::Relaxed),
            lag_ms: lag,
            copy: self.copy.state(),
            held_tables: lock(&self.held).keys().map(|(schema, table)| format!("{schema}.{table}")).collect(),
            findings: self.findings.load(Ordering::Relaxed),
            finding_examples: lock(&self.examples).iter().cloned().collect(),
        }
    }
}
