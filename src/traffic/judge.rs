//! The judge: from a window of observations to "go back" or not. Pure; needs no store, no lock, no second opinion.

use crate::{
    config::RevertConfig,
    monitor::{LatencySummary, ResourceSample, SlowShare, Window},
};
use std::time::{Duration, Instant};

/// Failed reads that are more than an accident.
const ERRORS_MIN: u64 = 3;
/// Standard deviations by which a share must exceed what chance explains (one-sided 99.87 %).
const CONFIDENCE: f64 = 3.0;
/// Standard deviations by which the owner's p99 may be higher than it was seen.
const OWNER_CONFIDENCE: f64 = 1.0;
/// The percentiles that are compared, as the share of answers that are slower: p99 is what people feel, p90 is known sooner and better.
pub(super) const TAILS: [f64; 2] = [0.01, 0.1];

/// A window of observations.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Health {
    /// Served and sampled reads that ended on the shadow.
    pub requests: u64,
    /// Of these, failed on the shadow only.
    pub errors: u64,
    /// Decided comparisons.
    pub compared: u64,
    /// Of these, different.
    pub different: u64,
    /// Owner's latency of reads.
    pub owner: LatencySummary,
    /// Shadow's latency of reads.
    pub shadow: LatencySummary,
    /// Answers of the shadow that are slower than the owner's slowest, per percentile.
    pub slow: [Slow; TAILS.len()],
    /// Age of the oldest unapplied change.
    pub lag: Duration,
    /// What its server is doing; `None`: not known.
    pub load: Option<Load>,
}

/// What a server is doing, as the least of the two newest samples: one alone may be a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Percent of `max_connections`.
    pub connections: f64,
    /// Sessions that run a statement.
    pub active: u64,
    /// Processor cores in use; `None`: not to be seen.
    pub cpu_cores: Option<f64>,
    /// Requests for locks that wait.
    pub locks_waiting: u64,
}

impl Load {
    /// Of one sample.
    pub fn of(sample: &ResourceSample) -> Load {
        Load {
            connections: 100.0 * sample.connections as f64 / sample.connections_max.max(1) as f64,
            active: sample.active,
            cpu_cores: sample.cpu_cores,
            locks_waiting: sample.locks_waiting,
        }
    }

    /// Figure by figure.
    #[must_use]
    pub fn least(self, other: Load) -> Load {
        Load {
            connections: self.connections.min(other.connections),
            active: self.active.min(other.active),
            cpu_cores: self.cpu_cores.zip(other.cpu_cores).map(|(a, b)| a.min(b)),
            locks_waiting: self.locks_waiting.min(other.locks_waiting),
        }
    }

    fn above(&self, limits: &RevertConfig) -> Option<String> {
        let over = |value: f64, limit: Option<f64>| limit.filter(|limit| value > *limit);
        if let Some(limit) = over(self.connections, limits.max_connections) {
            return Some(format!(
                "connections of the shadow's server, {:.0} % of its max_connections, are above max_connections {limit} %",
                self.connections
            ));
        }
        if let Some(limit) = over(self.active as f64, limits.max_active.map(|limit| limit as f64)) {
            return Some(format!("active sessions on the shadow's server, {}, are above max_active {limit}", self.active));
        }
        if let Some(limit) = self.cpu_cores.and_then(|cores| over(cores, limits.max_cpu_cores)) {
            return Some(format!(
                "processor use of the shadow's server, {:.2} cores, is above max_cpu_cores {limit}",
                self.cpu_cores.unwrap_or(0.0)
            ));
        }
        over(self.locks_waiting as f64, limits.max_locks_waiting.map(|limit| limit as f64)).map(|limit| {
            format!("locks that are waited for on the shadow's server, {}, are above max_locks_waiting {limit}", self.locks_waiting)
        })
    }
}

/// What is slow, by one percentile of the owner.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Slow {
    /// Share of the owner's answers that are slower than the percentile.
    pub tail: f64,
    /// Answers of the shadow above this are slow, in microseconds: `latency_ratio` times what the owner's percentile may be at most.
    pub from_us: u64,
    /// How many were, apart from the worst moment.
    pub share: SlowShare,
}

/// From where on an answer of the shadow is slow, per percentile, in microseconds: by the owner's window, which has `count` latencies.
pub fn bounds(owner: &Window, count: u64, limits: &RevertConfig, now: Instant) -> [u64; TAILS.len()] {
    TAILS.map(|tail| {
        let at_most_us = owner.value_at(at_most(tail, count), now);
        ((at_most_us as f64 * limits.latency_ratio) as u64).max(limits.latency_floor.as_micros() as u64)
    })
}

/// What of the shadow's window is slow by these bounds.
pub fn slow(bounds: [u64; TAILS.len()], shadow: &Window, now: Instant) -> [Slow; TAILS.len()] {
    let mut bounds = bounds.into_iter();
    TAILS.map(|tail| {
        let from_us = bounds.next().unwrap_or(u64::MAX);
        Slow { tail, from_us, share: shadow.slower_than(from_us, now) }
    })
}

/// The quantile of `count` observations that the true percentile is not above: an order statistic (normal approximation of
/// the binomial), the maximum where there are too few to tell.
fn at_most(tail: f64, count: u64) -> f64 {
    let deviation = (tail * (1.0 - tail) / count.max(1) as f64).sqrt();
    (1.0 - tail + OWNER_CONFIDENCE * deviation).min(1.0)
}

/// Why serving must stop: a sentence with the figures, or `None`.
///
/// A latency is a matter of chance. The shadow is slow when more of its answers than chance explains are slower than
/// `latency_ratio` times the owner's p99 or p90 (which says that its own is, too), also without the worst moment.
pub fn verdict(health: &Health, limits: &RevertConfig) -> Option<String> {
    if health.lag > limits.max_lag {
        return Some(format!("lag {:.1} s is above max_lag {:.1} s", health.lag.as_secs_f64(), limits.max_lag.as_secs_f64()));
    }
    if let Some(reason) = health.load.and_then(|load| load.above(limits)) {
        return Some(reason);
    }
    let percent = |part: u64, whole: u64| 100.0 * part as f64 / whole.max(1) as f64;
    let enough = |number: u64| number >= limits.min_requests;
    let error_rate = percent(health.errors, health.requests);
    if enough(health.requests) && error_rate > limits.error_rate && health.errors >= ERRORS_MIN {
        return Some(format!(
            "error rate {error_rate:.1} % is above error_rate {} % ({} of {} reads failed on the shadow)",
            limits.error_rate, health.errors, health.requests
        ));
    }
    let mismatch_rate = percent(health.different, health.compared);
    if enough(health.compared) && mismatch_rate > limits.mismatch_rate {
        return Some(format!(
            "mismatch rate {mismatch_rate:.2} % is above mismatch_rate {} % ({} of {} answers differ)",
            limits.mismatch_rate, health.different, health.compared
        ));
    }
    for slow in health.slow {
        let expected = slow.share.of as f64 * slow.tail;
        let many = slow.share.above as f64 > expected + CONFIDENCE * expected.sqrt();
        if enough(slow.share.of) && enough(health.owner.count) && many {
            let ratio = health.shadow.p99_us as f64 / health.owner.p99_us.max(1) as f64;
            return Some(format!(
                "latency ratio {ratio:.1} is above latency_ratio {} (p99 {:.1} ms on the shadow, {:.1} ms on the owner; apart from its \
                 worst moment, {} of {} answers of the shadow took longer than {:.1} ms, {} times the owner's p{:.0})",
                limits.latency_ratio,
                health.shadow.p99_us as f64 / 1000.0,
                health.owner.p99_us as f64 / 1000.0,
                slow.share.above,
                slow.share.of,
                slow.from_us as f64 / 1000.0,
                limits.latency_ratio,
                100.0 - 100.0 * slow.tail
            ));
        }
    }
    None
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn limits() -> RevertConfig {
        RevertConfig {
            window: Duration::from_secs(10),
            min_requests: 50,
            error_rate: 1.0,
            mismatch_rate: 0.1,
            latency_ratio: 2.0,
            latency_floor: Duration::from_millis(5),
            max_lag: Duration::from_secs(5),
            max_connections: Some(90.0),
            max_active: Some(40),
            max_cpu_cores: Some(2.0),
            max_locks_waiting: Some(10),
        }
    }

    fn slow_p99(above: u64, of: u64) -> [Slow; 2] {
        [Slow { tail: 0.01, from_us: 8_000, share: SlowShare { above, of } }, Slow::default()]
    }

    fn latency(count: u64, p99_us: u64) -> LatencySummary {
        LatencySummary { count, p99_us, ..LatencySummary::default() }
    }

    #[test]
    fn each_limit_decides_by_itself() {
        let healthy = Health {
            requests: 1000,
            errors: 10,
            compared: 1000,
            different: 1,
            owner: latency(1000, 4000),
            shadow: latency(1000, 8000),
            slow: slow_p99(19, 1000),
            lag: Duration::from_secs(5),
            load: Some(Load { connections: 90.0, active: 40, cpu_cores: Some(2.0), locks_waiting: 10 }),
        };
        assert_eq!(verdict(&healthy, &limits()), None, "at the limit is still healthy");
        let load = healthy.load.unwrap();
        for (health, word) in [
            (Health { load: Some(Load { connections: 91.0, ..load }), ..healthy }, "connections"),
            (Health { load: Some(Load { active: 41, ..load }), ..healthy }, "active"),
            (Health { load: Some(Load { cpu_cores: Some(2.1), ..load }), ..healthy }, "processor"),
            (Health { load: Some(Load { locks_waiting: 11, ..load }), ..healthy }, "locks"),
            (Health { errors: 11, ..healthy }, "error rate"),
            (Health { different: 2, ..healthy }, "mismatch rate"),
            (Health { slow: slow_p99(20, 1000), ..healthy }, "latency ratio"),
            (Health { lag: Duration::from_millis(5001), ..healthy }, "lag"),
        ] {
            let reason = verdict(&health, &limits());
            assert!(reason.as_deref().is_some_and(|reason| reason.starts_with(word)), "{word}: {reason:?}");
        }
        assert_eq!(verdict(&Health { requests: 50, errors: 2, ..healthy }, &limits()), None, "two failures are an accident");
    }

    #[test]
    fn too_few_observations_decide_nothing_but_lag_does() {
        let few = Health {
            requests: 49,
            errors: 49,
            compared: 49,
            different: 49,
            owner: latency(49, 1),
            shadow: latency(49, 90_000),
            slow: slow_p99(49, 49),
            ..Health::default()
        };
        assert_eq!(verdict(&few, &limits()), None);
        assert!(verdict(&Health { lag: Duration::from_secs(6), ..few }, &limits()).is_some());
    }

    #[test]
    fn the_floor_and_the_owners_uncertainty_are_respected() {
        let start = Instant::now();
        let from_us = |us: u64| {
            let owner = Window::new(Duration::from_secs(2));
            (0..1_000).for_each(|_| owner.record(Duration::from_micros(us), start));
            bounds(&owner, 1_000, &limits(), start)
        };
        assert_eq!(from_us(100), [5_000, 5_000], "a ratio of two tiny latencies is noise");
        assert!(from_us(10_000).iter().all(|us| us.abs_diff(20_000) <= 400));
        assert_eq!(at_most(0.01, 50), 1.0, "of few, the slowest");
        assert!(at_most(0.01, 1_000) < 0.9935 && at_most(0.01, 1_000_000) < 0.9902);
    }
}
