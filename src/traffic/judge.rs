//! The judge: from a window of observations to "go back" or not. Pure; needs no store, no lock, no second opinion.

use crate::{config::RevertConfig, monitor::LatencySummary};
use std::time::Duration;

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
    /// Age of the oldest unapplied change.
    pub lag: Duration,
}

/// Why serving must stop: a sentence with the figures, or `None`.
pub fn verdict(health: &Health, limits: &RevertConfig) -> Option<String> {
    if health.lag > limits.max_lag {
        return Some(format!("lag {:.1} s is above max_lag {:.1} s", health.lag.as_secs_f64(), limits.max_lag.as_secs_f64()));
    }
    let percent = |part: u64, whole: u64| 100.0 * part as f64 / whole.max(1) as f64;
    let enough = |number: u64| number >= limits.min_requests;
    let error_rate = percent(health.errors, health.requests);
    if enough(health.requests) && error_rate > limits.error_rate {
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
    let floor = limits.latency_floor.as_micros() as u64;
    let judged = enough(health.shadow.count) && enough(health.owner.count) && health.shadow.p99_us > floor;
    let ratio = health.shadow.p99_us as f64 / health.owner.p99_us.max(1) as f64;
    if judged && ratio > limits.latency_ratio {
        return Some(format!(
            "latency ratio {ratio:.1} is above latency_ratio {} (p99 {:.1} ms on the shadow, {:.1} ms on the owner)",
            limits.latency_ratio,
            health.shadow.p99_us as f64 / 1000.0,
            health.owner.p99_us as f64 / 1000.0
        ));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> RevertConfig {
        RevertConfig {
            window: Duration::from_secs(10),
            min_requests: 50,
            error_rate: 1.0,
            mismatch_rate: 0.1,
            latency_ratio: 2.0,
            latency_floor: Duration::from_millis(5),
            max_lag: Duration::from_secs(5),
        }
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
            lag: Duration::from_secs(5),
        };
        assert_eq!(verdict(&healthy, &limits()), None, "at the limit is still healthy");
        for (health, word) in [
            (Health { errors: 11, ..healthy }, "error rate"),
            (Health { different: 2, ..healthy }, "mismatch rate"),
            (Health { shadow: latency(1000, 8001), ..healthy }, "latency ratio"),
            (Health { lag: Duration::from_millis(5001), ..healthy }, "lag"),
        ] {
            let reason = verdict(&health, &limits());
            assert!(reason.as_deref().is_some_and(|reason| reason.starts_with(word)), "{word}: {reason:?}");
        }
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
            ..Health::default()
        };
        assert_eq!(verdict(&few, &limits()), None);
        assert!(verdict(&Health { lag: Duration::from_secs(6), ..few }, &limits()).is_some());
    }

    #[test]
    fn a_ratio_of_two_tiny_latencies_is_noise() {
        let tiny = Health { owner: latency(1000, 100), shadow: latency(1000, 4900), ..Health::default() };
        assert_eq!(verdict(&tiny, &limits()), None);
    }
}
