//! A sliding window of latencies and counters: "p99 over the last 10 s". Time is an argument.

use super::{
    LatencySummary,
    histogram::{add, empty, locked, record_us, summarize, to_us},
};
use hdrhistogram::Histogram;
use std::{
    ops::Range,
    sync::Mutex,
    time::{Duration, Instant},
};

/// The window moves in steps of a twentieth: a figure covers between 95 % and 100 % of the configured length.
const BUCKETS: usize = 20;

/// Two digits (1 %) are enough to judge a ratio, and keep a window below 200 kB.
const DIGITS: u8 = 2;

/// What happened in the window besides latencies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WindowCounts {
    /// Requests that failed.
    pub errors: u64,
    /// Comparisons that were decided, same or different.
    pub compared: u64,
    /// Comparisons that differ.
    pub different: u64,
}

/// How much of a window was slow, apart from its worst moment: the two neighbouring twentieths with the most of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlowShare {
    /// Latencies above the bound.
    pub above: u64,
    /// Latencies.
    pub of: u64,
}

/// A sliding window. All methods take the time; times that go backward are counted where they belong, or not at all when
/// that part has left the window.
#[derive(Debug)]
pub struct Window {
    bucket_length: Duration,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// The first time that was recorded: bucket numbers count from it.
    start: Option<Instant>,
    buckets: Vec<Bucket>,
}

#[derive(Debug)]
struct Bucket {
    /// Number of the bucket since `start`; the slot is this modulo [`BUCKETS`].
    number: u64,
    latencies: Histogram<u32>,
    counts: WindowCounts,
}

impl Window {
    /// An empty window over the last `length`, which is at least 20 ms.
    pub fn new(length: Duration) -> Self {
        let bucket_length = (length / BUCKETS as u32).max(Duration::from_millis(1));
        let buckets =
            (0..BUCKETS as u64).map(|number| Bucket { number, latencies: empty(DIGITS), counts: WindowCounts::default() }).collect();
        Window { bucket_length, state: Mutex::new(State { start: None, buckets }) }
    }

    /// Records one latency.
    pub fn record(&self, latency: Duration, now: Instant) {
        self.with_bucket(now, |bucket| record_us(&mut bucket.latencies, to_us(latency)));
    }

    /// Counts one failed request.
    pub fn record_error(&self, now: Instant) {
        self.with_bucket(now, |bucket| bucket.counts.errors += 1);
    }

    /// Counts one decided comparison.
    pub fn record_comparison(&self, same: bool, now: Instant) {
        self.with_bucket(now, |bucket| {
            bucket.counts.compared += 1;
            bucket.counts.different += u64::from(!same);
        });
    }

    /// Latencies of the window that ends now.
    pub fn summary(&self, now: Instant) -> LatencySummary {
        let mut total = empty::<u32>(DIGITS);
        self.for_each_bucket(now, |bucket| add(&mut total, &bucket.latencies));
        summarize(&total)
    }

    /// The value that `quantile` of the window's latencies are not above, in microseconds, without the worst moment: the one with
    /// the most that the quantile of all would call slow. 0: nothing was recorded.
    pub fn value_at(&self, quantile: f64, now: Instant) -> u64 {
        let mut total = empty::<u32>(DIGITS);
        self.for_each_bucket(now, |bucket| add(&mut total, &bucket.latencies));
        let worst = self.worst_moment(total.value_at_quantile(quantile.min(0.9)), now);
        let mut rest = empty::<u32>(DIGITS);
        self.for_each_bucket(now, |bucket| {
            if !worst.contains(&bucket.number) {
                add(&mut rest, &bucket.latencies);
            }
        });
        let kept = if rest.is_empty() { total } else { rest };
        if kept.is_empty() { 0 } else { kept.value_at_quantile(quantile) }
    }

    /// Latencies of the window above a bound in microseconds, without the worst moment: a server that stands still once is not
    /// slow, and one that stands still for longer than a moment, or again, is.
    pub fn slower_than(&self, bound_us: u64, now: Instant) -> SlowShare {
        let worst = self.worst_moment(bound_us, now);
        let mut share = SlowShare::default();
        self.for_each_bucket(now, |bucket| {
            if !worst.contains(&bucket.number) {
                share.above += bucket.above(bound_us);
                share.of += bucket.latencies.len();
            }
        });
        share
    }

    /// The numbers of the two neighbouring twentieths that have the most latencies above a bound. Empty: none has any.
    fn worst_moment(&self, bound_us: u64, now: Instant) -> Range<u64> {
        let mut parts = Vec::with_capacity(BUCKETS);
        self.for_each_bucket(now, |bucket| parts.push((bucket.number, bucket.above(bound_us))));
        let above = |number: u64| parts.iter().find(|part| part.0 == number).map_or(0, |part| part.1);
        let moments = parts.iter().map(|(number, here)| (here + above(number + 1), *number));
        moments.max().filter(|(above, _)| *above > 0).map_or(0..0, |(_, number)| number..number + 2)
    }

    /// Counters of the window that ends now.
    pub fn counts(&self, now: Instant) -> WindowCounts {
        let mut total = WindowCounts::default();
        self.for_each_bucket(now, |bucket| {
            total.errors += bucket.counts.errors;
            total.compared += bucket.counts.compared;
            total.different += bucket.counts.different;
        });
        total
    }

    /// Forgets everything: after a revert the past must not count against the next try.
    pub fn clear(&self) {
        for bucket in &mut locked(&self.state).buckets {
            bucket.clear(bucket.number);
        }
    }

    fn bucket_number(&self, start: Instant, now: Instant) -> u64 {
        let number = now.saturating_duration_since(start).as_nanos() / self.bucket_length.as_nanos();
        u64::try_from(number).unwrap_or(u64::MAX)
    }

    fn for_each_bucket(&self, now: Instant, mut visit: impl FnMut(&Bucket)) {
        let state = locked(&self.state);
        let Some(start) = state.start else { return };
        let newest = self.bucket_number(start, now);
        let in_window = |bucket: &&Bucket| bucket.number <= newest && newest - bucket.number < BUCKETS as u64;
        state.buckets.iter().filter(in_window).for_each(&mut visit);
    }

    fn with_bucket(&self, now: Instant, change: impl FnOnce(&mut Bucket)) {
        let mut state = locked(&self.state);
        let number = self.bucket_number(*state.start.get_or_insert(now), now);
        let slot = (number % BUCKETS as u64) as usize;
        let Some(bucket) = state.buckets.get_mut(slot) else { return };
        if bucket.number < number {
            bucket.clear(number);
        }
        if bucket.number == number {
            change(bucket);
        }
    }
}

impl Bucket {
    /// Latencies above a bound in microseconds.
    fn above(&self, bound_us: u64) -> u64 {
        let latencies = &self.latencies;
        if latencies.max() > bound_us { latencies.len().saturating_sub(latencies.count_between(0, bound_us)) } else { 0 }
    }

    fn clear(&mut self, number: u64) {
        self.number = number;
        self.latencies.reset();
        self.counts = WindowCounts::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window() -> (Window, Instant) {
        let start = Instant::now();
        (Window::new(Duration::from_secs(10)), start)
    }

    #[test]
    fn old_values_leave() {
        let (window, start) = window();
        let at = |ms| start + Duration::from_millis(ms);
        for ms in 0..1_000 {
            window.record(Duration::from_millis(100), at(ms));
        }
        window.record(Duration::from_millis(1), at(9_000));
        assert_eq!(window.summary(at(9_000)).count, 1_001);
        assert!(window.summary(at(9_000)).p99_us >= 99_000);
        // the last half second of the first second is still inside at 10.4 s, nothing of it at 11 s
        assert_eq!(window.summary(at(10_499)).count, 501);
        assert_eq!(window.summary(at(11_000)).count, 1);
        assert!(window.summary(at(11_000)).max_us <= 1_010);
        assert_eq!(window.summary(at(60_000)).count, 0);
    }

    #[test]
    fn a_slot_is_used_again() {
        let (window, start) = window();
        for round in 0..5 {
            let now = start + Duration::from_secs(10 * round);
            window.record(Duration::from_millis(1), now);
            window.record_error(now);
            assert_eq!((window.summary(now).count, window.counts(now).errors), (1, 1), "round {round}");
        }
    }

    #[test]
    fn late_values_count_where_they_belong() {
        let (window, start) = window();
        let at = |s| start + Duration::from_secs(s);
        window.record_error(start);
        window.record_comparison(true, at(30));
        window.record_comparison(false, at(25));
        window.record_comparison(false, at(20)); // its slot belongs to 30 s by now
        window.record_comparison(false, start - Duration::from_secs(1));
        assert_eq!(window.counts(at(30)), WindowCounts { errors: 0, compared: 2, different: 1 });
    }

    #[test]
    fn what_is_slow_is_counted_without_the_worst_moment() {
        let (window, start) = window();
        let at = |ms| start + Duration::from_millis(ms);
        for ms in 0..4_000 {
            // twentieths are 500 ms: a stall over the border of two, and a single slow one elsewhere
            window.record(Duration::from_millis(if (1_490..1_510).contains(&ms) || ms == 3_000 { 50 } else { 1 }), at(ms));
        }
        assert_eq!(window.slower_than(5_000, at(4_000)), SlowShare { above: 1, of: 3_000 });
        assert_eq!(window.slower_than(60_000, at(4_000)).above, 0);
        assert_eq!(window.slower_than(5_000, at(60_000)), SlowShare::default());
        assert!(window.value_at(0.9, at(4_000)).abs_diff(1_000) <= 10 && window.value_at(1.0, at(4_000)) >= 50_000);
        assert_eq!(window.value_at(1.0, at(60_000)), 0);
    }

    #[test]
    fn clear_forgets() {
        let (window, start) = window();
        window.record(Duration::from_millis(1), start);
        window.record_error(start);
        window.clear();
        assert_eq!((window.summary(start).count, window.counts(start)), (0, WindowCounts::default()));
        window.record(Duration::from_millis(1), start);
        assert_eq!(window.summary(start).count, 1);
    }
}
