//! The judge: from a window of observations to "go back" or not. Pure; needs no store, no lock, no second opinion.

use crate::{
    config::RevertConfig,
    monitor::{LatencySummary, SlowShare, Window},
};
use std::time::{Duration, Instant};

/// Failed reads that are more than an accident.
const ERRORS_MIN: u64 = 3;
/// Standard deviations by which a share must exceed what chance explains (one-sided 99.87 %).
const CONFIDENCE: f64 = 3.0;
/// Standard deviations by which the owner's p99 may be higher than it was seen.
const OWNER_CONFIDENCE: f64 = 1.0;
/// The percentiles that are compared, as the share of answers that are slower: p99 is what people feel, p90 is known sooner and better.
const TAILS: [f64; 2] = [0.01, 0.1];

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

/// Compares the two sides' windows; the owner's has `count` latencies.
pub fn slow(owner: &Window, count: u64, shadow: &Window, limits: &RevertConfig, now: Instant) -> [Slow; TAILS.len()] {
    TAILS.map(|tail| {
        let at_most_us = owner.value_at(at_most(tail, count), now);
        let from_us = ((at_most_us as f64 * limits.latency_ratio) as u64).max(limits.latency_floor.as_micros() as u64);
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
        };
        assert_eq!(verdict(&healthy, &limits()), None, "at the limit is still healthy");
        for (health, word) in [
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
            let (owner, shadow) = (Window::new(Duration::from_secs(2)), Window::new(Duration::from_secs(2)));
            (0..1_000).for_each(|_| owner.record(Duration::from_micros(us), start));
            slow(&owner, 1_000, &shadow, &limits(), start).map(|slow| slow.from_us)
        };
        assert_eq!(from_us(100), [5_000, 5_000], "a ratio of two tiny latencies is noise");
        assert!(from_us(10_000).iter().all(|us| us.abs_diff(20_000) <= 400));
        assert_eq!(at_most(0.01, 50), 1.0, "of few, the slowest");
        assert!(at_most(0.01, 1_000) < 0.9935 && at_most(0.01, 1_000_000) < 0.9902);
    }

    /// What a server's answers look like: lognormal with a heavy tail, now and then a stall that delays everybody.
    struct Server {
        chance: fastrand::Rng,
        median_us: f64,
        stalled_until: Duration,
    }

    impl Server {
        fn new(seed: u64, median_us: f64) -> Self {
            Server { chance: fastrand::Rng::with_seed(seed), median_us, stalled_until: Duration::ZERO }
        }

        fn answer(&mut self, at: Duration) -> Duration {
            // Box-Muller
            let (u, v) = (self.chance.f64().max(1e-12), self.chance.f64());
            let normal = (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos();
            let mut us = self.median_us * (0.8 * normal).exp();
            if self.chance.f64() < 0.002 {
                us *= 20.0; // a checkpoint, a cold page
            }
            if self.chance.f64() < 0.000_05 {
                self.stalled_until = at + Duration::from_millis(self.chance.u64(20..120));
            }
            Duration::from_micros(us as u64) + self.stalled_until.saturating_sub(at)
        }
    }

    /// Plays 20 s of 400 reads per second, half of them served; says when the judge went back.
    fn play(seed: u64, mut fault: impl FnMut(Duration, &mut fastrand::Rng) -> (f64, bool, bool)) -> Option<(Duration, String)> {
        let limits = RevertConfig { window: Duration::from_secs(2), latency_floor: Duration::from_millis(2), ..limits() };
        let observations = crate::traffic::observations::Observations::new(limits.window);
        let (mut owner, mut shadow) = (Server::new(seed, 700.0), Server::new(seed ^ 0x5eed, 800.0));
        let mut chance = fastrand::Rng::with_seed(!seed);
        let start = std::time::Instant::now();
        for read in 0..8_000_u64 {
            let at = Duration::from_micros(read * 2_500);
            let now = start + at;
            if chance.bool() {
                observations.owner_outcome(owner.answer(at), now);
            } else {
                let (slower, fails, differs) = fault(at, &mut chance);
                // ordinary noise: one read in two thousand fails on the shadow only
                observations.shadow_outcome(shadow.answer(at).mul_f64(slower), fails || chance.u32(0..2_000) == 0, now);
                observations.decided(differs, now);
            }
            if read % 80 == 0
                && let Some(reason) = verdict(&observations.health(Duration::ZERO, &limits, now).0, &limits)
            {
                return Some((at, reason));
            }
        }
        None
    }

    #[test]
    fn a_hundred_healthy_runs_and_no_revert() {
        for seed in 0..100 {
            assert_eq!(play(seed, |_, _| (1.0, false, false)), None, "seed {seed}");
        }
    }

    #[test]
    fn every_fault_is_answered_within_one_window() {
        let begins = Duration::from_secs(10);
        for seed in 0..20 {
            for (word, slower, failing, differing) in
                [("latency", 8.0, 0.0, 0.0), ("error", 1.0, 0.1, 0.0), ("mismatch", 1.0, 0.0, 0.02), ("latency", 50.0, 0.0, 0.0)]
            {
                let reverted = play(seed, |at, chance| {
                    let ill = at >= begins;
                    let drawn = (chance.f64() < failing, chance.f64() < differing);
                    if ill { (slower, drawn.0, drawn.1) } else { (1.0, false, false) }
                });
                let (at, reason) = reverted.unwrap_or_else(|| panic!("seed {seed}: {word} was not noticed"));
                assert!(reason.starts_with(word) && at >= begins, "seed {seed}: {reason} at {at:?}");
                assert!(at - begins <= Duration::from_secs(2), "seed {seed}: {word} noticed after {:?}", at - begins);
            }
        }
    }
}
