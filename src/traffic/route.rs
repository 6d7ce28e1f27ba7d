//! The routing snapshot: one immutable value per database that sessions read and the control plane swaps whole.

use super::{
    copies::{CopyQueue, Operation},
    fence::{Fence, Needed},
    mirror::Mirror,
    observations::Observations,
    quota::Quota,
    rehearsal::Freshness,
};
use crate::{
    config::{Consistency, IgnoreRule, ServerUrl},
    sql::Class,
    wire::frontend::Parse,
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// A server that sessions can be connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// `source`, or the shadow's name.
    pub name: String,
    /// Where.
    pub url: ServerUrl,
}

/// Where the traffic of one database goes.
#[derive(Clone)]
pub struct Route {
    /// Version of the ownership: a session whose owner has another one moves before it forwards anything.
    pub epoch: i64,
    /// Takes the writes and every read that is not served elsewhere.
    pub owner: Arc<Target>,
    /// Where sessions open a second connection in advance, because a cutover is about to move them there.
    pub standby: Option<Arc<Target>>,
    /// Shadows that may get copies or serve reads: none of them is the owner.
    pub shadows: Vec<Arc<ShadowRoute>>,
}

/// One shadow as sessions see it. Knobs are atomics: a revert is one store, seen by every session at its next statement.
pub struct ShadowRoute {
    /// Where.
    pub target: Arc<Target>,
    /// Percent of reads copied.
    pub sample_reads: Percent,
    /// Percent of reads answered here.
    pub serve_reads: Percent,
    /// Rehearse write transactions.
    pub rehearse: AtomicBool,
    /// Set while the feed keeps the shadow in step; without it nothing is served.
    pub in_step: AtomicBool,
    /// Read-your-writes.
    pub fence: Fence,
    /// Whether the feed has touched a table lately; empty while there is no feed.
    pub freshness: arc_swap::ArcSwapOption<Box<dyn Freshness>>,
    /// How its tables are called, where they differ on purpose.
    pub names: arc_swap::ArcSwapOption<crate::sql::Names>,
    /// Where committed writes go, for a shadow that is fed by them.
    pub mirror: Mirror,
    /// Where copies go.
    pub queue: CopyQueue,
    /// Which reads of the share are copied.
    pub quota: Quota,
    /// Reads of one statement copied per second at most; 0: no limit.
    pub sample_per_query: AtomicU32,
    /// Differences of answers that are expected.
    pub ignore: arc_swap::ArcSwap<Vec<IgnoreRule>>,
    /// What was seen.
    pub observations: Observations,
    /// Stops serving for a moment after failures in a row, before the judge has spoken.
    pub breaker: Breaker,
    /// Stops copying reads for a moment while the shadow cannot be reached: capturing them would cost the clients something.
    pub copy_breaker: Breaker,
    /// How it answers reads.
    pub serving: arc_swap::ArcSwap<Serving>,
    /// While a ladder moves proven statements first: their fingerprints. Empty: every read may be served.
    pub first: arc_swap::ArcSwapOption<std::collections::HashSet<u64>>,
}

/// Rules for the reads that a shadow answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Serving {
    /// An answer that takes longer than this is asked for again on the owner.
    pub hedge_after: Duration,
    /// How fresh it must be.
    pub consistency: Consistency,
}

/// A percentage that can be stored and read without a lock. Hundredths of a percent.
#[derive(Debug, Default)]
pub struct Percent(AtomicU64);

impl Percent {
    /// From percent.
    pub fn new(percent: f64) -> Self {
        let this = Percent::default();
        this.set(percent);
        this
    }

    /// Stores.
    pub fn set(&self, percent: f64) {
        self.0.store((percent.max(0.0) * 100.0).round() as u64, Ordering::SeqCst);
    }

    /// In percent.
    pub fn get(&self) -> f64 {
        self.hundredths() as f64 / 100.0
    }

    /// In hundredths of a percent.
    #[inline]
    pub fn hundredths(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Nothing is drawn.
    #[inline]
    pub fn is_zero(&self) -> bool {
        self.hundredths() == 0
    }

    /// How many times this one counts, given chance as a number in 0..10,000: 250 % gives 2 or 3.
    #[inline]
    pub fn draw(&self, chance: impl FnOnce() -> u64) -> u64 {
        let hundredths = self.0.load(Ordering::Relaxed);
        if hundredths == 0 {
            return 0;
        }
        hundredths / 10_000 + u64::from(chance() < hundredths % 10_000)
    }
}

/// Numbers in 0..10,000 that are spread evenly, however few are drawn: of 10,000 in a row of one session, and of 10,000 first
/// ones of so many sessions, a share is hit as often as it says, where those of chance would miss by half a percent and more.
/// A Weyl sequence with the golden ratio (Kuipers and Niederreiter, Uniform Distribution of Sequences, 1974): no period that
/// statements may have falls in with it.
#[derive(Clone, Copy, Debug)]
pub struct Evenly(u64);

/// 2^64 / φ.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
/// 2^64 (√2 - 1): where sessions start.
const SILVER: u64 = 0x6A09_E667_F3BC_C909;

impl Evenly {
    /// The sequence of a session; `salt`: another one for another purpose.
    pub fn new(session: u64, salt: u64) -> Self {
        Evenly(session.wrapping_mul(SILVER).wrapping_add(salt.wrapping_mul(GOLDEN >> 7)))
    }

    /// The next one.
    #[inline]
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        ((self.0 >> 32) * 10_000) >> 32
    }
}

/// Failures in a row stop serving until a deadline; the first success closes it again.
#[derive(Debug, Default)]
pub struct Breaker {
    failures: AtomicU64,
    open_until_ms: AtomicU64,
}

/// Failures in a row that open the breaker.
const BREAKER_FAILURES: u64 = 3;
/// How long it stays open.
const BREAKER_OPEN_MS: u64 = 500;

impl Breaker {
    /// May serve at this time (milliseconds of any monotonic clock)?
    pub fn allows(&self, now_ms: u64) -> bool {
        now_ms >= self.open_until_ms.load(Ordering::Relaxed)
    }

    /// Counts an outcome.
    pub fn outcome(&self, succeeded: bool, now_ms: u64) {
        if succeeded {
            self.failures.store(0, Ordering::Relaxed);
        } else if self.failures.fetch_add(1, Ordering::Relaxed) + 1 >= BREAKER_FAILURES {
            self.open_until_ms.store(now_ms + BREAKER_OPEN_MS, Ordering::Relaxed);
        }
    }
}

/// Longest wait of a copy for the shadow to catch up with it; then it decides nothing.
const CATCH_UP_TIMEOUT: Duration = Duration::from_secs(5);
/// How often the fence is looked at meanwhile.
const FENCE_POLL: Duration = Duration::from_millis(2);

impl ShadowRoute {
    /// Whether these tables (as a statement names them) are others here: such statements are never served, and copied only in translation.
    pub fn differs(&self, tables: &[String]) -> bool {
        self.names.load().as_ref().is_some_and(|names| names.concerns(tables))
    }

    /// Whether rows that a statement of this class reads are set aside by the feed.
    pub fn sets_aside(&self, class: &Class) -> bool {
        self.freshness.load().as_ref().is_none_or(|feed| feed.sets_aside(&class.tables, class.reads_them_only))
    }

    /// A copied operation as this shadow understands it; `None`: as it is.
    ///
    /// # Errors
    /// Why it is left out, for a counter.
    pub fn translate(&self, operation: &Operation, tables: &[String]) -> Result<Option<Operation>, &'static str> {
        let names = self.names.load();
        let Some(names) = names.as_ref().filter(|names| names.concerns(tables)) else { return Ok(None) };
        let utf8 = |text: &[u8]| std::str::from_utf8(text).map(str::to_owned).map_err(|_| "mapped: not understood");
        match operation {
            Operation::Simple(text) => Ok(Some(Operation::Simple(names.translate(&utf8(text)?, false)?.into()))),
            Operation::Extended { parse, bind, limit, parsed_here } => {
                let query = names.translate(&utf8(&parse.query)?, true)?.into();
                let parse = Arc::new(Parse { query, ..(**parse).clone() });
                Ok(Some(Operation::Extended { parse, bind: bind.clone(), limit: *limit, parsed_here: *parsed_here }))
            }
        }
    }

    /// Whether reads of this fingerprint wait for their turn: the ladder has not come to them yet.
    pub fn holds_back(&self, fingerprint: u64) -> bool {
        self.first.load().as_ref().is_some_and(|first| !first.contains(&fingerprint))
    }

    /// Waits until the shadow has passed a tick. False: it did not in time, or it is out of step. For copies; no client
    /// ever waits here.
    pub async fn caught_up(&self, needed: Needed) -> bool {
        let deadline = Instant::now() + CATCH_UP_TIMEOUT;
        while !self.fence.allows(needed) {
            if Instant::now() > deadline || !self.in_step.load(Ordering::Relaxed) {
                return false;
            }
            tokio::time::sleep(FENCE_POLL).await;
        }
        true
    }

    /// Does this shadow want anything from sessions at all?
    pub fn is_interested(&self) -> bool {
        self.mirror.is_recording()
            || self.in_step.load(Ordering::Relaxed)
                && (self.sample_reads.0.load(Ordering::Relaxed) > 0
                    || self.serve_reads.0.load(Ordering::Relaxed) > 0
                    || self.rehearse.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn more_than_a_hundred_percent_repeats() {
        let percent = Percent::new(250.0);
        assert_eq!((percent.draw(|| 4999), percent.draw(|| 5000)), (3, 2));
        assert_eq!(Percent::new(0.0).draw(|| 0), 0);
        assert_eq!(Percent::new(100.0).draw(|| 9999), 1);
    }

    #[test]
    fn the_breaker_opens_after_failures_in_a_row_only() {
        let breaker = Breaker::default();
        for round in 0..10 {
            breaker.outcome(false, round);
            breaker.outcome(false, round);
            breaker.outcome(true, round);
        }
        assert!(breaker.allows(10));
        for _ in 0..BREAKER_FAILURES {
            breaker.outcome(false, 100);
        }
        assert!(!breaker.allows(101));
        assert!(breaker.allows(100 + BREAKER_OPEN_MS));
    }

    #[test]
    fn shares_are_exact_over_ten_thousand() {
        for share in [1u64, 50, 500, 2500, 5000, 9999] {
            for (sessions, each) in [(1u64, 10_000u64), (10, 1000), (100, 100), (1000, 10), (10_000, 1)] {
                let first = 77; // ids of sessions that came before
                let hits: u64 = (first..first + sessions)
                    .map(|session| {
                        let mut evenly = Evenly::new(session, 0);
                        (0..each).filter(|_| evenly.draw() < share).count() as u64
                    })
                    .sum();
                assert!(hits.abs_diff(share) <= 50, "{hits} of 10,000 instead of {share}: {sessions} sessions with {each} statements each");
            }
            // every third statement only, as where a workload has a period
            let mut evenly = Evenly::new(5, 1);
            let hits = (0..30_000u64).filter(|at| evenly.draw() < share && at % 3 == 0).count() as u64;
            assert!(hits.abs_diff(share) <= 50, "{hits} instead of {share}");
        }
    }

    proptest! {
        #[test]
        fn shares_are_exact_over_all_chances(hundredths in 0u64..30_000) {
            let percent = Percent::new(hundredths as f64 / 100.0);
            let total: u64 = (0..10_000).map(|chance| percent.draw(|| chance)).sum();
            prop_assert_eq!(total, hundredths);
        }
    }
}
