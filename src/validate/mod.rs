//! Live, LSN-exact comparison of two databases, row by row, and repair on a person's word.
//!
//! How (snapshot pair): on the owner a temporary logical slot with an exported snapshot gives the only exact pair of a WAL
//! position and a snapshot. The follower's feed is held exactly there, snapshots are opened on the follower, and the feed
//! goes on: it pauses for milliseconds, however long the comparison takes. Then every table is read in key order from both
//! snapshots and merged.
//!
//! Deliberately absent: continuous checking, ranges of one table in parallel, sequences (the follower's are behind by
//! design until a cutover sets them), large objects, roles.
//!
//! Invariants
//! - No false alarm: both sides are read at one position of the owner's log; keys are ordered the same way on both
//!   (integers as integers, everything else by the bytes of its text), sessions have pinned settings.
//! - Bounded memory: rows are streamed; examples and keys to repair are counted.
//! - A report holds no values except keys, and of rows without a key only a hash.
//! - Nothing is written unless `repair` was said, and then only on the follower while its feed is held.
//! - The snapshots keep vacuum from cleaning up as long as the longest table takes, on both sides; they end with the last one.
//! - No exit path leaves a slot behind: the slot is temporary, and its connection ends before the comparison starts.
//!
//! Sources: PostgreSQL documentation, "CREATE_REPLICATION_SLOT", "SET TRANSACTION"; Vitess VDiff v2 (`table_differ.go`).

mod compare;
mod plan;
mod repair;
mod run;
mod session;
mod settle;
mod snapshot;

pub use run::verify;
pub use settle::{Settled, Settler};

use crate::{backend::BackendError, lsn::Lsn};
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use std::{
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Whoever applies the owner's changes on the follower.
#[async_trait]
pub trait Follower: Send + Sync {
    /// Dropping it lets the feed go on.
    type Hold: Send + Sync;

    /// Starts no further transaction until the hold is dropped: a position that the owner reaches later is not passed.
    fn hold(&self) -> Self::Hold;

    /// Lets a held feed go on until every commit that ends at or before `lsn` is applied and none beyond, and stand there
    /// until the hold is dropped. The error is a sentence for people.
    async fn advance(&self, hold: &Self::Hold, lsn: Lsn, timeout: Duration) -> Result<(), String>;

    /// Follows by positions of the owner's log. Else [`Follower::at_rest`] is called instead of the two above.
    fn has_positions(&self) -> bool {
        true
    }

    /// Does `take` while nobody writes on the owner and the follower has everything; the follower then stands still until the hold is
    /// dropped, while the owner goes on.
    async fn at_rest(&self, _take: AtRest<'_>) -> Result<Self::Hold, String> {
        Err("it follows by positions".into())
    }
}

/// What is done while nobody writes.
pub type AtRest<'a> = std::pin::Pin<Box<dyn Future<Output = Result<(), ValidateError>> + Send + 'a>>;

/// For databases that no feed connects (they rest, or differ by design): never called.
#[derive(Debug)]
pub struct NoFollower;

#[async_trait]
impl Follower for NoFollower {
    type Hold = ();

    fn hold(&self) {}

    async fn advance(&self, (): &(), _: Lsn, _: Duration) -> Result<(), String> {
        Ok(())
    }
}

/// What to compare and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// Only these (`table` or `schema.table`); `None`: all.
    pub tables: Option<Vec<String>>,
    /// Make the follower equal where it differs. Only on a person's explicit command.
    pub repair: bool,
    /// Tables compared at the same time; two connections each.
    pub workers: usize,
    /// Differences described per table; all are counted.
    pub examples_max: usize,
}

impl Default for Options {
    fn default() -> Self {
        Options { tables: None, repair: false, workers: 2, examples_max: 10 }
    }
}

/// How far a comparison is; read by others while it runs.
#[derive(Debug, Default)]
pub struct Progress {
    tables_done: AtomicU64,
    tables_total: AtomicU64,
    rows: AtomicU64,
    rows_estimated: AtomicU64,
    started: OnceLock<Instant>,
}

impl Progress {
    /// Tables finished and tables in all.
    pub fn tables(&self) -> (u64, u64) {
        (self.tables_done.load(Ordering::Relaxed), self.tables_total.load(Ordering::Relaxed))
    }

    /// Rows of the owner read, and the planner's estimate of all of them.
    pub fn rows(&self) -> (u64, u64) {
        let rows = self.rows.load(Ordering::Relaxed);
        (rows, self.rows_estimated.load(Ordering::Relaxed).max(rows))
    }

    /// Time left at the pace so far; `None` before there is one.
    pub fn eta(&self) -> Option<Duration> {
        let (rows, estimated) = self.rows();
        let elapsed = self.started.get()?.elapsed().as_secs_f64();
        (rows > 0).then(|| Duration::from_secs_f64(elapsed * (estimated - rows) as f64 / rows as f64))
    }

    fn start(&self, tables: usize, rows_estimated: u64) {
        self.tables_total.store(tables as u64, Ordering::Relaxed);
        self.rows_estimated.store(rows_estimated, Ordering::Relaxed);
        let _ = self.started.set(Instant::now());
    }
}

/// What a comparison found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The owner's position at which both sides were read.
    pub lsn: Lsn,
    /// In order of schema and name.
    pub tables: Vec<TableReport>,
    /// Rows of the owner that were compared.
    pub rows: u64,
    /// Differences in all tables.
    pub differences: u64,
    /// Tables that could not be read (`TableReport::skipped` says why): while this is not 0, the comparison proves nothing
    /// about them. Tables left out by design are not counted.
    #[serde(default)]
    pub unread: u64,
    /// From start to end.
    pub seconds: f64,
    /// How long the feed was held.
    pub pause_ms: f64,
}

/// One table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TableReport {
    /// Schema.
    pub schema: String,
    /// Table.
    pub name: String,
    /// Rows of the owner.
    pub rows: u64,
    /// Time spent on it.
    pub seconds: f64,
    /// Rows that differ; a table that one side lacks counts as one.
    pub differences: u64,
    /// The first few.
    pub examples: Vec<Difference>,
    /// Why it was not compared.
    pub skipped: Option<String>,
    /// What is not the same and is no difference of data: columns on one side only, other types.
    #[serde(default)]
    pub notes: Vec<String>,
    /// Rows made equal (with `repair`).
    #[serde(default)]
    pub repaired: u64,
}

/// Which way a row differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DifferenceKind {
    /// The follower lacks it.
    Missing,
    /// The owner lacks it.
    Extra,
    /// Both have it, with other values.
    Changed,
}

/// One row that differs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// Which way.
    pub kind: DifferenceKind,
    /// `id=42`; `row hash …` in tables without a key; `table` when the table itself is missing.
    pub key: String,
    /// Names of the columns that differ (`Changed` only).
    pub columns: Vec<String>,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.kind {
            DifferenceKind::Missing => write!(f, "{}: missing on the follower", self.key),
            DifferenceKind::Extra => write!(f, "{}: only on the follower", self.key),
            DifferenceKind::Changed => write!(f, "{}: {} differ", self.key, self.columns.join(", ")),
        }
    }
}

/// A comparison could not be made or finished.
#[derive(Debug, thiserror::Error)]
pub enum ValidateError {
    /// A server could not be reached, or broke.
    #[error("{side}: {reason}")]
    Connect {
        /// `owner` or `follower`
        side: &'static str,
        /// From the server or the operating system; what to do is in it.
        reason: String,
    },
    /// A statement failed.
    #[error("{side}: {action} failed: {reason}")]
    Sql {
        /// `owner` or `follower`
        side: &'static str,
        /// What was attempted.
        action: &'static str,
        /// SQLSTATE and message.
        reason: String,
    },
    /// The slot could not be created.
    #[error("owner: cannot create a temporary replication slot: {0}; it needs wal_level=logical, a free slot and a role with REPLICATION")]
    Slot(#[source] BackendError),
    /// Slot creation waits for running write transactions.
    #[error(
        "owner: no consistent point within {seconds} s, as write transactions are still open: {holders}; \
         end them (SELECT pg_terminate_backend(pid)) or try again later"
    )]
    OpenTransactions {
        /// The deadline.
        seconds: u64,
        /// `pid 123 (since 40 s, idle in transaction)`, …
        holders: String,
    },
    /// The feed could not be held at the position.
    #[error("the feed could not be held at {lsn}: {reason}")]
    Hold {
        /// The owner's position.
        lsn: Lsn,
        /// From the feed.
        reason: String,
    },
    /// Both sides could not be brought to rest.
    #[error("both sides could not be brought to rest: {0}")]
    Rest(String),
    /// A table was asked for that neither side has.
    #[error("there is no table `{0}` on either side: write it as schema.table")]
    NoSuchTable(String),
}
