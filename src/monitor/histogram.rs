//! A latency histogram that many threads write at once.

use super::LatencySummary;
use hdrhistogram::Histogram;
use std::{
    cell::Cell,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

/// Longer latencies count as this one: 60 s, where clients have given up and precision no longer helps.
pub const LATENCY_MAX_US: u64 = 60_000_000;

/// Three digits: 1.234 ms is told from 1.235 ms. About 140 kB per shard when values reach the maximum.
const DIGITS: u8 = 3;

/// Enough that the worker threads of a usual machine rarely meet; more would make `summary` slower for nothing.
const SHARDS: usize = 8;

/// An HDR histogram of latencies from 1 µs to 60 s. Threads write to their own shard, so that recording does not contend.
#[derive(Debug)]
pub struct LatencyHistogram {
    shards: [Mutex<Histogram<u64>>; SHARDS],
}

impl Default for LatencyHistogram {
    fn default() -> Self {
        Self::new()
    }
}

impl LatencyHistogram {
    /// An empty histogram. Its memory grows with the largest value recorded.
    pub fn new() -> Self {
        LatencyHistogram { shards: std::array::from_fn(|_| Mutex::new(empty(DIGITS))) }
    }

    /// Records one latency.
    pub fn record(&self, latency: Duration) {
        record_us(&mut locked(&self.shards[shard_of_this_thread()]), to_us(latency));
    }

    /// The summary of everything recorded since the start or the last [`reset`](Self::reset).
    pub fn summary(&self) -> LatencySummary {
        summarize(&self.snapshot())
    }

    /// Adds everything that `other` has recorded.
    pub fn merge(&self, other: &LatencyHistogram) {
        // `other` is copied first: no two shards are ever locked together, so merging in both directions cannot deadlock.
        let copied = other.snapshot();
        add(&mut locked(&self.shards[shard_of_this_thread()]), &copied);
    }

    /// Forgets everything.
    pub fn reset(&self) {
        for shard in &self.shards {
            locked(shard).reset();
        }
    }

    fn snapshot(&self) -> Histogram<u64> {
        let mut total = empty(DIGITS);
        for shard in &self.shards {
            add(&mut total, &locked(shard));
        }
        total
    }
}

/// An empty histogram that grows up to [`LATENCY_MAX_US`], because [`record_us`] clamps.
pub(super) fn empty<T: hdrhistogram::Counter>(digits: u8) -> Histogram<T> {
    Histogram::new(digits.min(5)).expect("0 to 5 digits are accepted by hdrhistogram")
}

/// Records a value after clamping it to 1 µs … 60 s; counters saturate.
pub(super) fn record_us<T: hdrhistogram::Counter>(histogram: &mut Histogram<T>, us: u64) {
    // A growing histogram takes every clamped value; only a failed allocation could refuse, and that aborts.
    let _ = histogram.record(us.clamp(1, LATENCY_MAX_US));
}

/// Adds `source` to `target`; both grow as needed.
pub(super) fn add<T: hdrhistogram::Counter>(target: &mut Histogram<T>, source: &Histogram<T>) {
    // Both were made by `empty` with the same digits, so that no value of one is out of the other's range.
    let _ = target.add(source);
}

/// Whole microseconds, rounded up: a latency below 1 µs is not free.
pub(super) fn to_us(latency: Duration) -> u64 {
    u64::try_from(latency.as_nanos().div_ceil(1_000)).unwrap_or(u64::MAX)
}

/// The five figures that people read.
pub(super) fn summarize<T: hdrhistogram::Counter>(histogram: &Histogram<T>) -> LatencySummary {
    if histogram.is_empty() {
        return LatencySummary::default();
    }
    let max_us = histogram.max().min(LATENCY_MAX_US);
    let at = |quantile| histogram.value_at_quantile(quantile).min(max_us);
    LatencySummary { count: histogram.len(), p50_us: at(0.5), p90_us: at(0.9), p99_us: at(0.99), p999_us: at(0.999), max_us }
}

/// A lock whose holder panicked still holds a usable histogram: each record is one step.
pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn shard_of_this_thread() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static SHARD: Cell<Option<usize>> = const { Cell::new(None) };
    }
    SHARD
        .try_with(|shard| {
            shard.get().unwrap_or_else(|| {
                let mine = NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS;
                shard.set(Some(mine));
                mine
            })
        })
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_empty_histogram_has_an_empty_summary() {
        assert_eq!(LatencyHistogram::new().summary(), LatencySummary::default());
    }

    #[test]
    fn percentiles_are_right_to_three_digits() {
        let histogram = LatencyHistogram::new();
        for us in 1..=10_000 {
            histogram.record(Duration::from_micros(us));
        }
        let summary = histogram.summary();
        assert_eq!(summary.count, 10_000);
        for (value, expected) in
            [(summary.p50_us, 5_000), (summary.p90_us, 9_000), (summary.p99_us, 9_900), (summary.p999_us, 9_990), (summary.max_us, 10_000)]
        {
            assert!(value.abs_diff(expected) * 1_000 <= expected, "{value} is not {expected}");
        }
    }

    #[test]
    fn extremes_are_clamped() {
        let histogram = LatencyHistogram::new();
        histogram.record(Duration::ZERO);
        histogram.record(Duration::MAX);
        let summary = histogram.summary();
        assert_eq!((summary.count, summary.p50_us, summary.max_us), (2, 1, LATENCY_MAX_US));
    }

    #[test]
    fn threads_merge_and_reset() {
        let histogram = std::sync::Arc::new(LatencyHistogram::new());
        let writers: Vec<_> = (0..16)
            .map(|_| {
                let histogram = histogram.clone();
                std::thread::spawn(move || (0..1_000).for_each(|us| histogram.record(Duration::from_micros(us))))
            })
            .collect();
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        assert_eq!(histogram.summary().count, 16_000);
        histogram.merge(&histogram);
        assert_eq!(histogram.summary().count, 32_000);
        histogram.reset();
        assert_eq!(histogram.summary(), LatencySummary::default());
    }

    proptest! {
        #[test]
        fn percentiles_never_cross(values in prop::collection::vec(0u64..200_000_000, 1..200)) {
            let histogram = LatencyHistogram::new();
            values.iter().for_each(|us| histogram.record(Duration::from_micros(*us)));
            let s = histogram.summary();
            prop_assert_eq!(s.count, values.len() as u64);
            prop_assert!(s.p50_us <= s.p90_us && s.p90_us <= s.p99_us && s.p99_us <= s.p999_us && s.p999_us <= s.max_us);
        }
    }
}
