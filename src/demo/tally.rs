//! What the clients of the demo experienced, counted as it happens, so that every chapter can say what it cost them.

use hdrhistogram::Histogram;
use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

/// Error messages kept, to look for a cause.
const MESSAGES_MAX: usize = 20;
/// Longest latency that the histogram tells apart: a minute.
const LATENCY_US_MAX: u64 = 60_000_000;

/// Shared by all clients of a run.
pub struct Tally {
    transactions: AtomicU64,
    failed_statements: AtomicU64,
    dropped_connections: AtomicU64,
    stale: AtomicU64,
    reads_checked: AtomicU64,
    slowest_us: AtomicU64,
    latency: Mutex<Histogram<u64>>,
    messages: Mutex<Vec<String>>,
}

/// Failures so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Failures {
    /// Statements that a client saw fail.
    pub failed_statements: u64,
    /// Connections that a client lost, or could not open.
    pub dropped_connections: u64,
}

impl Failures {
    /// Both together.
    pub fn total(self) -> u64 {
        self.failed_statements + self.dropped_connections
    }

    /// What has been added since.
    pub fn since(self, earlier: Failures) -> Failures {
        Failures {
            failed_statements: self.failed_statements.saturating_sub(earlier.failed_statements),
            dropped_connections: self.dropped_connections.saturating_sub(earlier.dropped_connections),
        }
    }
}

impl Default for Tally {
    fn default() -> Self {
        let latency = Histogram::new_with_bounds(1, LATENCY_US_MAX, 3).unwrap_or_else(|_| Histogram::new(3).unwrap_or_else(|_| unreachable_histogram()));
        Tally {
            transactions: AtomicU64::new(0),
            failed_statements: AtomicU64::new(0),
            dropped_connections: AtomicU64::new(0),
            stale: AtomicU64::new(0),
            reads_checked: AtomicU64::new(0),
            slowest_us: AtomicU64::new(0),
            latency: Mutex::new(latency),
            messages: Mutex::default(),
        }
    }
}
