//! What the clients of the demo experienced, counted as it happens, so that every chapter can say what it cost them.

use crate::monitor::{LatencyHistogram, LatencySummary};
use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

/// Error messages kept, to look for a cause.
const MESSAGES_MAX: usize = 20;

/// Shared by all clients of a run.
#[derive(Default)]
pub struct Tally {
    transactions: AtomicU64,
    failed_statements: AtomicU64,
    dropped_connections: AtomicU64,
    stale: AtomicU64,
    reads_checked: AtomicU64,
    slowest_us: AtomicU64,
    latency: LatencyHistogram,
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

impl Tally {
    /// Transactions that a client was told are committed, and reads that were answered.
    pub fn committed(&self, number: u64) {
        self.transactions.fetch_add(number, Relaxed);
    }

    /// How long a client waited for one transaction or read.
    pub fn waited(&self, latency: Duration) {
        self.latency.record(latency);
        self.slowest_us.fetch_max(u64::try_from(latency.as_micros()).unwrap_or(u64::MAX), Relaxed);
    }

    /// The same, known only afterwards from a log: it says nothing about the present.
    pub fn had_waited(&self, latency: Duration) {
        self.latency.record(latency);
    }

    /// A client saw a statement fail.
    pub fn statement_failed(&self, message: String) {
        self.failed_statements.fetch_add(1, Relaxed);
        self.keep(message);
    }

    /// A client lost its connection or could not open one.
    pub fn connection_dropped(&self, message: String) {
        self.dropped_connections.fetch_add(1, Relaxed);
        self.keep(message);
    }

    /// A client read back its own acknowledged write: `fresh` if the answer had it.
    pub fn read_checked(&self, fresh: bool, what: &str) {
        self.reads_checked.fetch_add(1, Relaxed);
        if !fresh {
            self.stale.fetch_add(1, Relaxed);
            self.keep(format!("stale read: {what}"));
        }
    }

    /// Committed so far.
    pub fn transactions(&self) -> u64 {
        self.transactions.load(Relaxed)
    }

    /// Failures so far.
    pub fn failures(&self) -> Failures {
        Failures { failed_statements: self.failed_statements.load(Relaxed), dropped_connections: self.dropped_connections.load(Relaxed) }
    }

    /// Own writes read back: (checked, stale).
    pub fn reads(&self) -> (u64, u64) {
        (self.reads_checked.load(Relaxed), self.stale.load(Relaxed))
    }

    /// The longest wait since the last call, in microseconds.
    pub fn take_slowest_us(&self) -> u64 {
        self.slowest_us.swap(0, Relaxed)
    }

    /// All waits.
    pub fn latency(&self) -> LatencySummary {
        self.latency.summary()
    }

    /// The first failures, for people.
    pub fn messages(&self) -> Vec<String> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn keep(&self, message: String) {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        if messages.len() < MESSAGES_MAX {
            messages.push(message);
        }
    }
}
