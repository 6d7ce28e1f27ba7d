//! Two small learners and their mean: a logistic regression with products of a few features, and gradient-boosted trees that may only
//! rise (or fall) with features whose direction is known. The one is steady out of project, the other sees thresholds; their mean is calibrated.
//!
//! Sources: Friedman, "Greedy Function Approximation" (2001); second-order leaves and shrinkage as in Chen and Guestrin, "XGBoost" (2016).

use serde::{Deserialize, Serialize};

/// A training row.
#[derive(Clone, Debug)]
pub struct Example {
    /// What is seen.
    pub features: Vec<f64>,
    /// What is true.
    pub label: bool,
    /// How much it counts.
    pub weight: f64,
}

/// What is known about the features of a task.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Per feature: 1 more is never less likely, -1 more is never likelier, 0 unknown.
    pub direction: &'static [i8],
    /// Features whose products of two the regression sees too.
    pub crossed: &'static [usize],
    /// Share of the regression in the mean of the two scores.
    pub share: f64,
}

/// From a score in log-odds.
pub fn probability(score: f64) -> f64 {
    1.0 / (1.0 + (-score).exp())
}

fn rounded(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

/// A logistic regression.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct Logistic {
    /// One per feature.
    pub weights: Vec<f64>,
    /// Constant.
    pub bias: f64,
}

/// Gradient steps; the loss has converged to the third digit by then.
const STEPS: i32 = 300;
/// Ridge on standardised weights, in rows.
const RIDGE: f64 = 3.0;

impl Logistic {
    pub(super) fn score(&self, features: &[f64]) -> f64 {
        self.bias + self.weights.iter().zip(features).map(|(weight, value)| weight * value).sum::<f64>()
    }

    /// Fits by Adam on standardised features.
    pub(super) fn fit(rows: &[(Vec<f64>, bool, f64)]) -> Self {
        let width = rows.first().map_or(0, |(features, _, _)| features.len());
        let total = rows.iter().map(|(_, _, weight)| weight).sum::<f64>().max(1e-9);
        let mut mean = vec![0.0; width];
        let mut deviation = vec![0.0; width];
        for (features, _, weight) in rows {
            mean.iter_mut().zip(features).for_each(|(slot, value)| *slot += weight * value / total);
        }
        for (features, _, weight) in rows {
            deviation
                .iter_mut()
                .zip(features)
                .zip(&mean)
                .for_each(|((slot, value), mean)| *slot += weight * (value - mean).powi(2) / total);
        }
        let scale: Vec<f64> = deviation.iter().map(|variance| if *variance > 1e-9 { 1.0 / variance.sqrt() } else { 0.0 }).collect();
        let standard: Vec<Vec<f64>> = rows
            .iter()
            .map(|(features, _, _)| features.iter().zip(&mean).zip(&scale).map(|((value, mean), scale)| (value - mean) * scale).collect())
            .collect();
        let mut parameters = vec![0.0; width + 1];
        let (mut first, mut second) = (vec![0.0; width + 1], vec![0.0; width + 1]);
        for step in 1..=STEPS {
            let mut gradient: Vec<f64> = parameters.iter().map(|value| RIDGE * value / total).collect();
            gradient[width] = 0.0;
            for ((_, label, weight), values) in rows.iter().zip(&standard) {
                let score: f64 = parameters[width] + parameters.iter().zip(values).map(|(weight, value)| weight * value).sum::<f64>();
                let error = weight * (probability(score) - f64::from(u8::from(*label))) / total;
                gradient.iter_mut().zip(values).for_each(|(slot, value)| *slot += error * value);
                gradient[width] += error;
            }
            let rate = 0.1 / (1.0 + f64::from(step) / 100.0);
            for k in 0..=width {
                first[k] = 0.9 * first[k] + 0.1 * gradient[k];
                second[k] = 0.99 * second[k] + 0.01 * gradient[k] * gradient[k];
                let unbiased = first[k] / (1.0 - 0.9f64.powi(step));
                parameters[k] -= rate * unbiased / ((second[k] / (1.0 - 0.99f64.powi(step))).sqrt() + 1e-8);
            }
        }
        let weights: Vec<f64> = (0..width).map(|k| rounded(parameters[k] * scale[k])).collect();
        let bias = parameters[width] - weights.iter().zip(&mean).map(|(weight, mean)| weight * mean).sum::<f64>();
        Logistic { weights, bias: rounded(bias) }
    }
}

/// A tree's node: feature, threshold (a leaf's value), the nodes for at most and for more than the threshold.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Node(u16, f64, u16, u16);

/// In place of a feature: this is a leaf.
const LEAF: u16 = u16::MAX;

/// Gradient-boosted trees.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct Boosted {
    /// Where every score starts.
    pub base: f64,
    /// The root of each tree is its first node; children come after their parent.
    pub trees: Vec<Vec<Node>>,
}

/// Chosen by grouped cross-validation: more trees or depth only learn the projects.
const TREES: usize = 120;
const DEPTH: usize = 3;
const RATE: f64 = 0.08;
/// Least weight (curvature) of a leaf, and its ridge.
const LEAF_WEIGHT_MIN: f64 = 8.0;
const LEAF_RIDGE: f64 = 8.0;
/// Share of the features that a tree may look at, in 1024ths.
const FEATURE_SHARE: usize = 614;
/// Thresholds tried per feature.
const CUTS_MAX: usize = 24;

struct Grown<'a> {
    bins: &'a [Vec<u8>],
    cuts: &'a [Vec<f64>],
    slopes: &'a [(f64, f64)],
    usable: &'a [usize],
    direction: &'static [i8],
}

struct Split {
    gain: f64,
    feature: usize,
    bin: usize,
    middle: f64,
}

impl Grown<'_> {
    fn sums(&self, members: &[usize]) -> (f64, f64) {
        members.iter().fold((0.0, 0.0), |sum, at| (sum.0 + self.slopes[*at].0, sum.1 + self.slopes[*at].1))
    }

    fn best_split(&self, members: &[usize], bounds: (f64, f64)) -> Option<Split> {
        let (slope, curve) = self.sums(members);
        let gain_of = |slope: f64, curve: f64| slope * slope / (curve + LEAF_RIDGE);
        let mut best: Option<Split> = None;
        for &feature in self.usable {
            let cuts = self.cuts[feature].len();
            let mut sums = vec![(0.0, 0.0); cuts + 1];
            for at in members {
                let slot = &mut sums[usize::from(self.bins[feature][*at])];
                slot.0 += self.slopes[*at].0;
                slot.1 += self.slopes[*at].1;
            }
            let (mut left_slope, mut left_curve) = (0.0, 0.0);
            for (bin, sum) in sums.iter().take(cuts).enumerate() {
                left_slope += sum.0;
                left_curve += sum.1;
                let (right_slope, right_curve) = (slope - left_slope, curve - left_curve);
                if left_curve < LEAF_WEIGHT_MIN || right_curve < LEAF_WEIGHT_MIN {
                    continue;
                }
                let (left, right) = (leaf(left_slope, left_curve, bounds), leaf(right_slope, right_curve, bounds));
                match self.direction.get(feature) {
                    Some(1) if left > right => continue,
                    Some(-1) if left < right => continue,
                    _ => {}
                }
                let gain = gain_of(left_slope, left_curve) + gain_of(right_slope, right_curve) - gain_of(slope, curve);
                if gain > best.as_ref().map_or(1e-6, |best| best.gain) {
                    best = Some(Split { gain, feature, bin, middle: f64::midpoint(left, right) });
                }
            }
        }
        best
    }

    /// Grows one tree and adds its values to `scores`.
    fn tree(&self, scores: &mut [f64]) -> Vec<Node> {
        let mut nodes = vec![Node(LEAF, 0.0, 0, 0)];
        let mut open = vec![(0usize, (0..scores.len()).collect::<Vec<usize>>(), 0usize, (f64::MIN, f64::MAX))];
        while let Some((at, members, depth, bounds)) = open.pop() {
            let split = if depth < DEPTH { self.best_split(&members, bounds) } else { None };
            let Some(split) = split else {
                let (slope, curve) = self.sums(&members);
                let value = rounded(RATE * leaf(slope, curve, bounds));
                nodes[at] = Node(LEAF, value, 0, 0);
                members.iter().for_each(|member| scores[*member] += value);
                continue;
            };
            let (left, right): (Vec<usize>, Vec<usize>) =
                members.iter().partition(|member| usize::from(self.bins[split.feature][**member]) <= split.bin);
            let next = nodes.len();
            nodes.extend([Node(LEAF, 0.0, 0, 0), Node(LEAF, 0.0, 0, 0)]);
            nodes[at] = Node(split.feature as u16, self.cuts[split.feature][split.bin], next as u16, next as u16 + 1);
            let (low, high) = ((bounds.0, split.middle), (split.middle, bounds.1));
            let (for_left, for_right) = match self.direction.get(split.feature) {
                Some(1) => (low, high),
                Some(-1) => (high, low),
                _ => (bounds, bounds),
            };
            open.push((next, left, depth + 1, for_left));
            open.push((next + 1, right, depth + 1, for_right));
        }
        nodes
    }
}

fn leaf(slope: f64, curve: f64, bounds: (f64, f64)) -> f64 {
    (-slope / (curve + LEAF_RIDGE)).clamp(bounds.0, bounds.1)
}

/// Thresholds of one feature: between its values where there are few, else quantiles.
fn cuts(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    let mut distinct = values.clone();
    distinct.dedup();
    if distinct.len() <= CUTS_MAX {
        return distinct.windows(2).map(|pair| rounded(f64::midpoint(pair[0], pair[1]))).collect();
    }
    let mut cuts: Vec<f64> = (1..CUTS_MAX).map(|part| rounded(values[part * values.len() / CUTS_MAX])).collect();
    cuts.dedup();
    cuts
}

impl Boosted {
    fn score(&self, features: &[f64]) -> f64 {
        let of_tree = |tree: &Vec<Node>| {
            let mut at = 0usize;
            // a file may be damaged: children come after their parent, so this ends
            while let Some(Node(feature, value, low, high)) = tree.get(at) {
                if *feature == LEAF {
                    return *value;
                }
                let next = if features.get(usize::from(*feature)).is_some_and(|seen| seen <= value) { *low } else { *high };
                if usize::from(next) <= at {
                    return 0.0;
                }
                at = usize::from(next);
            }
            0.0
        };
        self.base + self.trees.iter().map(of_tree).sum::<f64>()
    }

    fn fit(rows: &[Example], direction: &'static [i8]) -> Self {
        let width = rows.first().map_or(0, |row| row.features.len());
        let cuts: Vec<Vec<f64>> = (0..width).map(|k| cuts(rows.iter().map(|row| row.features[k]).collect())).collect();
        let bins: Vec<Vec<u8>> = cuts
            .iter()
            .enumerate()
            .map(|(k, cuts)| rows.iter().map(|row| cuts.partition_point(|cut| *cut < row.features[k]) as u8).collect())
            .collect();
        let weight = |wanted: bool| rows.iter().filter(|row| row.label == wanted).map(|row| row.weight).sum::<f64>().max(1e-3);
        let base = rounded((weight(true) / weight(false)).ln());
        let mut scores = vec![base; rows.len()];
        let mut trees = Vec::with_capacity(TREES);
        for turn in 0..TREES {
            let slopes: Vec<(f64, f64)> = rows
                .iter()
                .zip(&scores)
                .map(|(row, score)| {
                    let p = probability(*score);
                    (row.weight * (p - f64::from(u8::from(row.label))), row.weight * (p * (1.0 - p)).max(1e-6))
                })
                .collect();
            // which features this tree may use: fixed by a hash, so that the same data gives the same bytes
            let hash = |k: usize| ((k.wrapping_mul(2_654_435_761) ^ turn.wrapping_mul(40_503)).wrapping_mul(2_246_822_519) >> 7) & 1023;
            let usable: Vec<usize> = (0..width).filter(|k| hash(*k) < FEATURE_SHARE).collect();
            let grown = Grown { bins: &bins, cuts: &cuts, slopes: &slopes, usable: &usable, direction };
            trees.push(grown.tree(&mut scores));
        }
        Boosted { base, trees }
    }
}

/// The mean of both.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct Matcher {
    /// On the features and their products.
    pub logistic: Logistic,
    /// On the features.
    pub boosted: Boosted,
    /// Probability from which a pair counts as the same.
    pub threshold: f64,
}

/// The regression's score beyond this says no more: one strange feature must not outvote the trees.
const SCORE_MAX: f64 = 8.0;

fn with_products(features: &[f64], crossed: &[usize]) -> Vec<f64> {
    let mut all = features.to_vec();
    for (at, one) in crossed.iter().enumerate() {
        all.extend(crossed[at + 1..].iter().map(|other| features[*one] * features[*other]));
    }
    all
}

impl Matcher {
    /// Probability that the pair is the same thing.
    pub fn predict(&self, features: &[f64], shape: Shape) -> f64 {
        let regression = self.logistic.score(&with_products(features, shape.crossed)).clamp(-SCORE_MAX, SCORE_MAX);
        probability(shape.share * regression + (1.0 - shape.share) * self.boosted.score(features))
    }

    /// Fits both.
    pub fn fit(rows: &[Example], shape: Shape) -> Self {
        let crossed: Vec<_> = rows.iter().map(|row| (with_products(&row.features, shape.crossed), row.label, row.weight)).collect();
        Matcher { logistic: Logistic::fit(&crossed), boosted: Boosted::fit(rows, shape.direction), threshold: 0.5 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape { direction: &[1, 0], crossed: &[0, 1], share: 0.5 };

    /// The second feature decides only together with the first one: neither alone would do.
    fn rows() -> Vec<Example> {
        (0..400)
            .map(|at| {
                let (a, b) = (f64::from(at % 20) / 20.0, f64::from(at / 20 % 2));
                Example { features: vec![a, b], label: a > 0.5 && b > 0.5, weight: 1.0 }
            })
            .collect()
    }

    #[test]
    fn it_learns_and_rises_where_it_must() {
        let model = Matcher::fit(&rows(), SHAPE);
        assert!(model.predict(&[0.9, 1.0], SHAPE) > 0.8);
        assert!(model.predict(&[0.9, 0.0], SHAPE) < 0.2);
        assert!(model.predict(&[0.1, 1.0], SHAPE) < 0.2);
        let mut before = f64::MIN;
        for step in 0..100 {
            let score = model.boosted.score(&[f64::from(step) / 100.0, 1.0]);
            assert!(score >= before, "falls at {step}");
            before = score;
        }
        assert_eq!(Matcher::fit(&rows(), SHAPE), model, "the same data gives the same model");
    }

    #[test]
    fn a_damaged_tree_ends() {
        let damaged = Boosted { base: 0.0, trees: vec![vec![Node(0, 0.5, 0, 0)], vec![Node(7, 0.5, 9, 9)], vec![]] };
        assert_eq!(damaged.score(&[0.1]), 0.0);
    }
}
