//! Is a statement slower on the shadow than on its owner, beyond chance? From the newest paired executions of it.
//!
//! The test is Wilcoxon's signed rank test of the logarithms of the ratios: latencies are skewed and multiply, their logarithms are
//! near enough to symmetric, and ranks do not care for the size of a stall. Tested is not "slower at all", which is true of any two
//! servers once there are enough pairs, but slower by more than [`MARGIN`]. Many statements are tested at once, so their p values are
//! held against Benjamini and Hochberg's bound: it keeps the share of false ones among those that are shown, also when the statements
//! depend on one another in the same direction (a slow disk makes them all slow). Holm's bound, which keeps the chance of a single
//! false one, would hide most of the true ones among two thousand statements, and the list is read by a person.
//!
//! Sources: Wilcoxon, "Individual Comparisons by Ranking Methods" (1945); Benjamini and Hochberg (1995), Benjamini and Yekutieli (2001).

use std::collections::VecDeque;

/// Newest pairs kept of a statement: enough to tell 1.3 times from 1.2 times, 2 kB.
pub const PAIRS_MAX: usize = 256;
/// Fewer decide nothing: the normal approximation of the rank sum needs them.
pub const PAIRS_MIN: usize = 30;
/// A statement is slower when its latency is beyond this ratio: less than that is another machine, not another plan.
pub const MARGIN: f64 = 1.2;
/// Share of false ones among the statements that are called slower.
pub const FALSE_DISCOVERIES: f64 = 0.01;
/// Standard deviations of the interval around the ratio (95 %).
const INTERVAL: f64 = 1.96;

/// The newest pairs of one statement, in microseconds: source, shadow.
#[derive(Debug, Default)]
pub struct Pairs {
    newest: VecDeque<(u32, u32)>,
    seen: u64,
}

impl Pairs {
    /// Adds one.
    pub fn add(&mut self, source_us: u64, shadow_us: u64) {
        let bounded = |us: u64| u32::try_from(us.max(1)).unwrap_or(u32::MAX);
        if self.newest.len() == PAIRS_MAX {
            self.newest.pop_front();
        }
        self.newest.push_back((bounded(source_us), bounded(shadow_us)));
        self.seen += 1;
    }

    /// All that were ever added.
    pub fn seen(&self) -> u64 {
        self.seen
    }

    /// What the pairs say that came after the first `after`; `None`: too few of them.
    pub fn compare(&self, after: u64) -> Option<Comparison> {
        let fresh = usize::try_from(self.seen.saturating_sub(after)).unwrap_or(usize::MAX).min(self.newest.len());
        let logs: Vec<f64> = self
            .newest
            .iter()
            .skip(self.newest.len() - fresh)
            .map(|(source, shadow)| (f64::from(*shadow) / f64::from(*source)).ln())
            .collect();
        compare(logs)
    }
}

/// How a statement's latency on the shadow compares.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Comparison {
    /// Pairs looked at.
    pub pairs: u64,
    /// Median of shadow / source.
    pub ratio: f64,
    /// Lower end of its 95 % interval.
    pub low: f64,
    /// Upper end.
    pub high: f64,
    /// How likely such pairs are if the statement were not slower than [`MARGIN`] times.
    pub p: f64,
}

fn compare(mut logs: Vec<f64>) -> Option<Comparison> {
    if logs.len() < PAIRS_MIN {
        return None;
    }
    let p = signed_rank(logs.iter().map(|log| log - MARGIN.ln()).collect());
    logs.sort_unstable_by(f64::total_cmp);
    let n = logs.len() as f64;
    // order statistics around the median: a binomial's, whatever the distribution is
    let half = INTERVAL * n.sqrt() / 2.0;
    let at = |place: f64| logs.get((place.max(0.0) as usize).min(logs.len() - 1)).copied().unwrap_or(0.0).exp();
    let (low, high) = (at((n / 2.0 - half).floor()), at((n / 2.0 + half).ceil()));
    Some(Comparison { pairs: logs.len() as u64, ratio: at((n / 2.0).floor()), low, high, p })
}

/// One-sided: how likely a rank sum of the positive ones as large as this is when they are as often and as far below 0 as above.
fn signed_rank(mut differences: Vec<f64>) -> f64 {
    differences.retain(|difference| *difference != 0.0);
    differences.sort_unstable_by(|a, b| a.abs().total_cmp(&b.abs()));
    let n = differences.len() as f64;
    let (mut positive, mut ties, mut rank) = (0.0, 0.0, 0.0);
    for group in differences.chunk_by(|a, b| a.abs() == b.abs()) {
        let size = group.len() as f64;
        let mean_rank = rank + (size + 1.0) / 2.0;
        positive += mean_rank * group.iter().filter(|difference| **difference > 0.0).count() as f64;
        ties += size * size * size - size;
        rank += size;
    }
    let variance = n * (n + 1.0) * (2.0 * n + 1.0) / 24.0 - ties / 48.0;
    if variance <= 0.0 {
        return 1.0;
    }
    upper_tail((positive - n * (n + 1.0) / 4.0 - 0.5) / variance.sqrt())
}

/// Share of a normal distribution above `z`. Numerical Recipes' erfc: relative error below 1.2e-7 everywhere.
pub(super) fn upper_tail(z: f64) -> f64 {
    const COEFFICIENTS: [f64; 10] = [
        -1.265_512_23,
        1.000_023_68,
        0.374_091_96,
        0.096_784_18,
        -0.186_288_06,
        0.278_868_07,
        -1.135_203_98,
        1.488_515_87,
        -0.822_152_23,
        0.170_872_77,
    ];
    let x = z / std::f64::consts::SQRT_2;
    let t = 1.0 / (1.0 + 0.5 * x.abs());
    let polynomial = COEFFICIENTS.iter().rev().fold(0.0, |sum, coefficient| sum * t + coefficient);
    let tail = 0.5 * t * (-x * x + polynomial).exp();
    if x >= 0.0 { tail } else { 1.0 - tail }
}

/// Which of these p values are discoveries, so that at most a share `rate` of those that are is false (Benjamini, Hochberg).
pub fn discoveries(values: &[f64], rate: f64) -> Vec<bool> {
    let mut sorted: Vec<f64> = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let all = sorted.len() as f64;
    let bound = sorted.iter().enumerate().rev().find(|(place, p)| **p <= rate * (place + 1) as f64 / all).map(|(_, p)| *p);
    values.iter().map(|p| bound.is_some_and(|bound| *p <= bound)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normal(chance: &mut fastrand::Rng) -> f64 {
        let (u, v) = (chance.f64().max(1e-12), chance.f64());
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    }

    /// A statement whose latency on the shadow is `ratio` times the source's, both with heavy noise and stalls now and then.
    fn played(seed: u64, pairs: usize, ratio: f64) -> Pairs {
        let mut chance = fastrand::Rng::with_seed(seed);
        let mut played = Pairs::default();
        for _ in 0..pairs {
            let mut latency = |median: f64| {
                let stall = if chance.u32(0..100) == 0 { 30.0 } else { 1.0 };
                (median * stall * (0.7 * normal(&mut chance)).exp()) as u64
            };
            played.add(latency(1_000.0), latency(1_000.0 * ratio));
        }
        played
    }

    #[test]
    fn tails_of_the_normal_distribution() {
        for (z, expected) in [(0.0, 0.5), (1.959_964, 0.025), (-1.959_964, 0.975), (3.090_232, 0.001), (6.0, 9.865_876e-10)] {
            assert!((upper_tail(z) / expected - 1.0).abs() < 1e-5, "{z}: {}", upper_tail(z));
        }
    }

    #[test]
    fn a_rank_sum_worked_out_by_hand() {
        // |x| ranked 1, 2.5, 2.5, 4: positive 1 + 2.5 + 4 of 10; ties 2^3 - 2
        let p = signed_rank(vec![1.0, 2.0, -2.0, 3.0, 0.0]);
        let z = (7.5 - 5.0 - 0.5) / (4.0 * 5.0 * 9.0 / 24.0 - 6.0 / 48.0_f64).sqrt();
        assert!((p - upper_tail(z)).abs() < 1e-12);
        assert_eq!(signed_rank(vec![0.0; 50]), 1.0);
    }

    #[test]
    fn two_hundred_statements_as_fast_as_ever_and_none_is_called_slower() {
        let comparisons: Vec<_> = (0..200).map(|seed| played(seed, 256, 1.0).compare(0).unwrap()).collect();
        let values: Vec<f64> = comparisons.iter().map(|comparison| comparison.p).collect();
        assert!(discoveries(&values, FALSE_DISCOVERIES).iter().all(|found| !found));
        let missed = comparisons.iter().filter(|comparison| comparison.low > 1.0 || comparison.high < 1.0).count();
        assert!(missed <= 20, "a 95 % interval that misses {missed} of 200 times");
    }

    #[test]
    fn slower_ones_are_found_among_many() {
        let ratio = |seed: u64| if seed.is_multiple_of(10) { 2.5 } else { 1.0 };
        let values: Vec<f64> = (0..200).map(|seed| played(seed, 120, ratio(seed)).compare(0).unwrap().p).collect();
        let found = discoveries(&values, FALSE_DISCOVERIES);
        for (seed, found) in (0..).zip(found) {
            assert_eq!(found, seed % 10 == 0, "statement {seed}");
        }
    }

    #[test]
    fn few_pairs_decide_nothing_and_only_fresh_ones_confirm() {
        let pairs = played(1, PAIRS_MIN - 1, 9.0);
        assert_eq!(pairs.compare(0), None);
        let pairs = played(1, 400, 9.0);
        assert_eq!((pairs.seen(), pairs.compare(0).unwrap().pairs, pairs.compare(350).unwrap().pairs), (400, 256, 50));
        assert_eq!(pairs.compare(390), None);
        let ratio = pairs.compare(0).unwrap();
        assert!(ratio.low > 6.0 && ratio.high < 14.0 && ratio.p < 1e-9, "{ratio:?}");
        assert!(discoveries(&[], 0.01).is_empty());
    }
}
