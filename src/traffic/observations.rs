//! What was seen of one shadow: totals for people, and a sliding window for the judge.

use super::judge::{self, Health};
use crate::{
    config::RevertConfig,
    monitor::{LatencyHistogram, LatencySummary, QueryProfile, Window},
};
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Examples kept for people.
const EXAMPLES_MAX: usize = 20;
/// Different reasons kept; they are constants of the program, so this is never reached by traffic.
const REASONS_MAX: usize = 100;
/// Buckets of the sliding window.
const BUCKETS: u32 = 20;

/// A counter that many tasks add to.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds one.
    pub fn increment(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The sum.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Reason → number, and the newest examples.
#[derive(Debug, Default)]
pub struct Reasons {
    counts: Mutex<BTreeMap<String, u64>>,
    examples: Mutex<VecDeque<String>>,
}

impl Reasons {
    /// Counts a reason: a phrase of the program, never text of a client.
    pub fn count(&self, reason: &str) {
        let mut counts = lock(&self.counts);
        if let Some(number) = counts.get_mut(reason) {
            *number += 1;
        } else if counts.len() < REASONS_MAX {
            counts.insert(reason.to_owned(), 1);
        }
    }

    /// Keeps an example for people: fingerprints and normalised text only.
    pub fn example(&self, text: String) {
        let mut examples = lock(&self.examples);
        if examples.len() == EXAMPLES_MAX {
            examples.pop_front();
        }
        examples.push_back(text);
    }

    /// All reasons.
    pub fn counts(&self) -> BTreeMap<String, u64> {
        lock(&self.counts).clone()
    }

    /// Newest examples, oldest first.
    pub fn examples(&self) -> Vec<String> {
        lock(&self.examples).iter().cloned().collect()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[derive(Debug, Clone, Copy, Default)]
struct Bucket {
    number: u64,
    requests: u64,
    errors: u64,
    compared: u64,
    different: u64,
    first_bad: Option<Instant>,
}

/// Everything that was seen of one shadow.
#[derive(Debug)]
pub struct Observations {
    /// Reads copied for comparison.
    pub sampled: Counter,
    /// Answers equal.
    pub same: Counter,
    /// Answers different.
    pub different: Counter,
    /// Neither could be said.
    pub undecided: Counter,
    /// Copies dropped.
    pub dropped: Counter,
    /// Sampled reads that failed on the shadow only.
    pub compare_errors: Counter,
    /// Of comparisons.
    pub compare_reasons: Reasons,
    /// Transactions rehearsed.
    pub rehearsed: Counter,
    /// Statements that failed on the shadow only.
    pub rehearsal_errors: Counter,
    /// Command tags that differ.
    pub tag_mismatches: Counter,
    /// Of rehearsals that decided nothing, with examples of errors and mismatches.
    pub rehearsal_reasons: Reasons,
    /// Of transactions that were not rehearsed.
    pub left_out: Reasons,
    /// Reads answered by the shadow.
    pub served: Counter,
    /// Run again on the owner.
    pub fallbacks: Counter,
    /// Why.
    pub fallback_reasons: Reasons,
    /// Kept on the owner by the fence.
    pub fenced: Counter,
    /// Reads that could have been served.
    pub candidates: Counter,
    /// Owner's side of paired executions.
    pub owner_latency: LatencyHistogram,
    /// Shadow's side.
    pub shadow_latency: LatencyHistogram,
    /// Per fingerprint.
    pub profile: QueryProfile,
    window: Mutex<RecentPast>,
}

#[derive(Debug)]
struct RecentPast {
    began: Instant,
    length: Duration,
    buckets: [Bucket; BUCKETS as usize],
    owner: Window,
    shadow: Window,
    baseline: Option<Baseline>,
}

/// The owner as it was when it answered enough reads to be compared with: at a share of 100 % it answers none.
#[derive(Debug, Clone, Copy)]
struct Baseline {
    at: Instant,
    owner: LatencySummary,
    bounds: [u64; judge::TAILS.len()],
    /// When the window had the most latencies, lately, and how many.
    peak: (Instant, u64),
}

/// A baseline that is older says too little of the owner under the present load.
const BASELINE_AGE_MAX: Duration = Duration::from_secs(3600);
/// A window with less than half of the latencies that one had within this time is running empty.
const BASELINE_FRESH: Duration = Duration::from_secs(60);

impl RecentPast {
    fn new(length: Duration, now: Instant) -> Self {
        let window = || Window::new(length);
        RecentPast { began: now, length, buckets: Default::default(), owner: window(), shadow: window(), baseline: None }
    }

    /// The owner's latency and what it makes slow: of the window, or as remembered where the window has too few, or is running empty.
    fn compared_with(&mut self, limits: &RevertConfig, now: Instant) -> Baseline {
        let owner = self.owner.summary(now);
        let known = self.baseline.filter(|known| now.saturating_duration_since(known.at) < BASELINE_AGE_MAX);
        let peak = known.map(|known| known.peak).filter(|(at, _)| now.saturating_duration_since(*at) < BASELINE_FRESH);
        let peak = peak.filter(|(_, count)| *count > owner.count).unwrap_or((now, owner.count));
        let here = Baseline { at: now, owner, bounds: judge::bounds(&self.owner, owner.count, limits, now), peak };
        if owner.count >= limits.min_requests && owner.count * 2 >= peak.1 {
            self.baseline = Some(here);
            return here;
        }
        known.unwrap_or(here)
    }

    fn number(&self, now: Instant) -> u64 {
        let width = (self.length / BUCKETS).max(Duration::from_millis(1));
        (now.saturating_duration_since(self.began).as_nanos() / width.as_nanos()) as u64
    }

    fn bucket(&mut self, now: Instant) -> &mut Bucket {
        let number = self.number(now);
        let bucket = &mut self.buckets[(number % u64::from(BUCKETS)) as usize];
        if bucket.number != number {
            *bucket = Bucket { number, ..Bucket::default() };
        }
        bucket
    }
}

impl Observations {
    /// With the window that the judge looks at.
    pub fn new(window: Duration) -> Self {
        Observations {
            sampled: Counter::default(),
            same: Counter::default(),
            different: Counter::default(),
            undecided: Counter::default(),
            dropped: Counter::default(),
            compare_errors: Counter::default(),
            compare_reasons: Reasons::default(),
            rehearsed: Counter::default(),
            rehearsal_errors: Counter::default(),
            tag_mismatches: Counter::default(),
            rehearsal_reasons: Reasons::default(),
            left_out: Reasons::default(),
            served: Counter::default(),
            fallbacks: Counter::default(),
            fallback_reasons: Reasons::default(),
            fenced: Counter::default(),
            candidates: Counter::default(),
            owner_latency: LatencyHistogram::new(),
            shadow_latency: LatencyHistogram::new(),
            profile: QueryProfile::new(),
            window: Mutex::new(RecentPast::new(window, Instant::now())),
        }
    }

    /// A served or sampled read ended on the shadow.
    pub fn shadow_outcome(&self, latency: Duration, failed: bool, now: Instant) {
        let mut recent = lock(&self.window);
        let bucket = recent.bucket(now);
        bucket.requests += 1;
        if failed {
            bucket.errors += 1;
            bucket.first_bad.get_or_insert(now);
        }
        recent.shadow.record(latency, now);
    }

    /// Sessions keep their reads because the shadow has just failed several times: counts as one more failure.
    pub fn unavailable(&self, now: Instant) {
        let mut recent = lock(&self.window);
        let bucket = recent.bucket(now);
        bucket.requests += 1;
        bucket.errors += 1;
        bucket.first_bad.get_or_insert(now);
    }

    /// A comparable read ended on the owner.
    pub fn owner_outcome(&self, latency: Duration, now: Instant) {
        lock(&self.window).owner.record(latency, now);
    }

    /// A comparison was decided.
    pub fn decided(&self, different: bool, now: Instant) {
        let mut recent = lock(&self.window);
        let bucket = recent.bucket(now);
        bucket.compared += 1;
        if different {
            bucket.different += 1;
            bucket.first_bad.get_or_insert(now);
        }
    }

    /// The window as the judge sees it, and when its first bad observation was.
    pub fn health(&self, lag: Duration, limits: &RevertConfig, now: Instant) -> (Health, Option<Instant>) {
        let mut recent = lock(&self.window);
        let newest = recent.number(now);
        let compared_with = recent.compared_with(limits, now);
        let mut health = Health {
            lag,
            owner: compared_with.owner,
            shadow: recent.shadow.summary(now),
            slow: judge::slow(compared_with.bounds, &recent.shadow, now),
            ..Health::default()
        };
        let mut first_bad = None;
        for bucket in &recent.buckets {
            if bucket.number + u64::from(BUCKETS) > newest {
                health.requests += bucket.requests;
                health.errors += bucket.errors;
                health.compared += bucket.compared;
                health.different += bucket.different;
                first_bad = match (first_bad, bucket.first_bad) {
                    (Some(a), Some(b)) => Some(std::cmp::min::<Instant>(a, b)),
                    (a, b) => a.or(b),
                };
            }
        }
        (health, first_bad)
    }

    /// The shadow's latency in the window.
    pub fn recent(&self, now: Instant) -> LatencySummary {
        lock(&self.window).shadow.summary(now)
    }

    /// Forgets the recent past (after a revert, or when the window's length changes), keeps the totals.
    pub fn forget(&self, window: Duration) {
        *lock(&self.window) = RecentPast::new(window, Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_slides() {
        let observations = Observations::new(Duration::from_secs(2));
        let start = Instant::now();
        for i in 0..10 {
            observations.shadow_outcome(Duration::from_millis(1), i % 2 == 0, start);
        }
        observations.decided(true, start);
        let (health, first_bad) = observations.health(Duration::ZERO, &judge::tests::limits(), start + Duration::from_secs(1));
        assert_eq!((health.requests, health.errors, health.compared, health.different), (10, 5, 1, 1));
        assert_eq!(first_bad, Some(start));
        let (health, first_bad) = observations.health(Duration::ZERO, &judge::tests::limits(), start + Duration::from_secs(4));
        assert_eq!((health.requests, health.compared, first_bad), (0, 0, None));
    }

    #[test]
    fn the_owner_is_remembered_when_it_answers_no_reads_any_more() {
        let (observations, limits) = (Observations::new(Duration::from_secs(2)), judge::tests::limits());
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        (0..1_000).for_each(|ms| observations.owner_outcome(Duration::from_millis(1), at(ms)));
        let (before, _) = observations.health(Duration::ZERO, &limits, at(1_000));
        (4_000..5_000).for_each(|ms| observations.shadow_outcome(Duration::from_millis(40), false, at(ms)));
        let (health, _) = observations.health(Duration::ZERO, &limits, at(5_000));
        assert_eq!((health.owner.count, before.owner.count), (1_000, 1_000));
        assert!(judge::verdict(&health, &limits).is_some_and(|reason| reason.starts_with("latency")));
        observations.forget(Duration::from_secs(2));
        assert_eq!(observations.health(Duration::ZERO, &limits, at(5_000)).0.owner.count, 0);
    }
}
