//! Cross-validation grouped by project, against baselines that are code: rules and majority table (T1), name similarity (T2), width and past changes (T4), names alone (T5).

use super::{
    columns, data,
    learn::Shape,
    matching::{self, Kind, Pair},
    reference, similarity, soon, t1, tables, train_t1,
};
use crate::schema::SchemaError;
use serde::Serialize;
use std::{collections::BTreeMap, path::Path};

/// Folds of the cross-validation; all rows of a project are in one.
const FOLDS: usize = 10;
/// Bins of the calibration error.
const BINS: usize = 15;

/// One model on one slice.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Score {
    /// Weighted rows.
    pub rows: f64,
    /// Share right.
    pub top1: f64,
    /// Share among the three best.
    pub top3: f64,
    /// Expected calibration error.
    pub ece: f64,
    /// Multi-class Brier score.
    pub brier: f64,
    /// Reliability: mean confidence, share right, rows; bins that have rows.
    pub reliability: Vec<(f64, f64, f64)>,
}

/// F1 and its parts.
#[derive(Clone, Debug, Default, Serialize)]
pub struct MatchScore {
    /// Precision.
    pub precision: f64,
    /// Recall.
    pub recall: f64,
    /// F1.
    pub f1: f64,
    /// Expected calibration error; none for a baseline, whose numbers are no probabilities.
    pub ece: Option<f64>,
    /// Reliability: mean probability, share right, rows.
    pub reliability: Vec<(f64, f64, f64)>,
}

/// How well tables are ordered.
#[derive(Clone, Debug, Default, Serialize)]
pub struct OrderScore {
    /// Share of pairs (one that changes, one that does not) of one look at one project in the right order, mean over projects.
    pub auc: f64,
    /// Expected calibration error; none for a baseline, whose numbers are no probabilities.
    pub ece: Option<f64>,
    /// Brier score, likewise.
    pub brier: Option<f64>,
    /// Reliability: mean probability, share right, rows.
    pub reliability: Vec<(f64, f64, f64)>,
}

/// All of it: `task.slice.model` → score.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Training rows of T1.
    pub t1_rows: usize,
    /// `all` and `must_fill`, by model.
    pub t1: BTreeMap<String, BTreeMap<String, Score>>,
    /// Columns without and with position, tables; by model.
    pub t2: BTreeMap<String, BTreeMap<String, MatchScore>>,
    /// Which tables change soon, by model.
    pub t4: BTreeMap<String, OrderScore>,
    /// Share right: names alone, with the last target.
    pub t5: BTreeMap<String, f64>,
}

fn fold_of(projects: &BTreeMap<&str, usize>, project: &str) -> usize {
    projects.get(project).copied().unwrap_or(0)
}

/// Projects dealt out by size, largest first, so that the folds are even.
fn folds<'a>(rows: impl Iterator<Item = &'a str>) -> BTreeMap<&'a str, usize> {
    let mut sizes: BTreeMap<&str, usize> = BTreeMap::new();
    for project in rows {
        *sizes.entry(project).or_default() += 1;
    }
    let mut order: Vec<_> = sizes.into_iter().collect();
    order.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(b.0)));
    let mut load = [0usize; FOLDS];
    let mut result = BTreeMap::new();
    for (project, size) in order {
        let lightest = (0..FOLDS).min_by_key(|fold| load[*fold]).unwrap_or(0);
        load[lightest] += size;
        result.insert(project, lightest);
    }
    result
}

/// What was said against what was right, in bins of equal width.
#[derive(Default)]
struct Reliability {
    bins: [(f64, f64, f64); BINS],
}

impl Reliability {
    fn add(&mut self, said: f64, right: bool, weight: f64) {
        let bin = &mut self.bins[((said * BINS as f64) as usize).min(BINS - 1)];
        bin.0 += weight * said;
        bin.1 += weight * f64::from(u8::from(right));
        bin.2 += weight;
    }

    fn error(&self) -> f64 {
        let rows: f64 = self.bins.iter().map(|bin| bin.2).sum();
        self.bins.iter().map(|(said, right, _)| (said - right).abs()).sum::<f64>() / rows.max(1e-9)
    }

    fn table(&self) -> Vec<(f64, f64, f64)> {
        self.bins.iter().filter(|bin| bin.2 > 0.0).map(|bin| (bin.0 / bin.2, bin.1 / bin.2, bin.2)).collect()
    }
}

fn score(rows: &[(&t1::Row, t1::Counts)]) -> Score {
    let mut result = Score::default();
    let mut bins = Reliability::default();
    for (row, answer) in rows {
        let Some(class) = row.class else { continue };
        let mut order: Vec<usize> = (0..t1::CLASS_COUNT).collect();
        order.sort_by(|a, b| answer[*b].total_cmp(&answer[*a]));
        result.rows += row.weight;
        result.top1 += row.weight * f64::from(u8::from(order[0] == class));
        result.top3 += row.weight * f64::from(u8::from(order[..3].contains(&class)));
        result.brier += row.weight * answer.iter().enumerate().map(|(at, p)| (p - f64::from(u8::from(at == class))).powi(2)).sum::<f64>();
        bins.add(answer[order[0]], order[0] == class, row.weight);
    }
    let total = result.rows.max(1e-9);
    result.top1 /= total;
    result.top3 /= total;
    result.brier /= total;
    result.ece = bins.error();
    result.reliability = bins.table();
    result
}

fn t1_report(rows: &[t1::Row], report: &mut Report) {
    let folds = folds(rows.iter().map(|row| row.project.as_str()));
    let mut answers: BTreeMap<&str, Vec<(&t1::Row, t1::Counts)>> = BTreeMap::new();
    for fold in 0..FOLDS {
        let (test, train): (Vec<&t1::Row>, Vec<&t1::Row>) = rows.iter().partition(|row| fold_of(&folds, &row.project) == fold);
        let (mut tables, weights) = train_t1(&train);
        t1::prune(&mut tables);
        let majority: Vec<f64> = std::iter::once(1.0).chain(std::iter::repeat_n(0.0, t1::FEATURES - 1)).collect();
        let fresh = t1::ProjectMemory::default();
        t1::with_memory(&test, |row, memory| {
            let features = t1::features(&row.case, &tables, memory, None);
            answers.entry("pooling").or_default().push((row, t1::softmax(&features, &weights)));
            let cold = t1::features(&row.case, &tables, &fresh, None);
            answers.entry("pooling without memory").or_default().push((row, t1::softmax(&cold, &weights)));
            answers.entry("majority table").or_default().push((row, t1::softmax(&features, &majority)));
            let mut rule = [0.0; t1::CLASS_COUNT];
            rule[t1::rule(&row.case)] = 1.0;
            answers.entry("rules").or_default().push((row, rule));
        });
    }
    for (name, rows) in answers {
        let must: Vec<_> = rows.iter().filter(|(row, _)| row.case.not_null).copied().collect();
        report.t1.entry("all".into()).or_default().insert(name.into(), score(&rows));
        report.t1.entry("must_fill".into()).or_default().insert(name.into(), score(&must));
    }
}

fn match_score((hits, wrong, missed): (f64, f64, f64), bins: Option<&Reliability>) -> MatchScore {
    let precision = if hits + wrong > 0.0 { hits / (hits + wrong) } else { 0.0 };
    let recall = if hits + missed > 0.0 { hits / (hits + missed) } else { 0.0 };
    MatchScore {
        precision,
        recall,
        f1: matching::f1((hits, wrong, missed)),
        ece: bins.map(Reliability::error),
        reliability: bins.map_or(vec![], Reliability::table),
    }
}

/// A baseline: one similarity of a pair.
type Baseline = (&'static str, fn(&Pair) -> f64);

fn name_similarity(pair: &Pair) -> f64 {
    similarity::jaro_winkler(&pair.old.name, &pair.new.name)
}

fn name_and_type(pair: &Pair) -> f64 {
    name_similarity(pair) * if pair.old.type_name == pair.new.type_name { 1.0 } else { 0.5 }
}

fn same_columns(pair: &Pair) -> f64 {
    let names = |side: &matching::Side| side.columns.iter().map(|column| column.0.to_lowercase()).collect();
    similarity::jaccard(&names(&pair.old), &names(&pair.new))
}

fn t2_report(slice: &str, pairs: &[Pair], features: &[&[f64]], shape: Shape, baselines: &[Baseline], report: &mut Report) {
    let folds = folds(pairs.iter().map(|pair| pair.project.as_str()));
    let mut sums: BTreeMap<&str, (f64, f64, f64)> = BTreeMap::new();
    let mut bins = Reliability::default();
    for fold in 0..FOLDS {
        let (test, train): (Vec<usize>, Vec<usize>) = (0..pairs.len()).partition(|at| fold_of(&folds, &pairs[*at].project) == fold);
        let of = |at: &[usize]| at.iter().map(|at| &pairs[*at]).collect::<Vec<_>>();
        let (test_pairs, train_pairs) = (of(&test), of(&train));
        let model = matching::train(&train_pairs, &train.iter().map(|at| features[*at]).collect::<Vec<_>>(), shape);
        let mut answers = vec![("model", test.iter().map(|at| model.predict(features[*at], shape)).collect::<Vec<f64>>(), model.threshold)];
        for (name, baseline) in baselines {
            let numbers = |pairs: &[&Pair]| pairs.iter().map(|pair| baseline(pair)).collect::<Vec<f64>>();
            answers.push((name, numbers(&test_pairs), matching::best_threshold(&train_pairs, &numbers(&train_pairs))));
        }
        for (name, values, threshold) in answers {
            let rows = matching::scored(&test_pairs, &values);
            if name == "model" {
                rows.iter().for_each(|row| bins.add(row.3, row.4, 1.0));
            }
            let found = matching::confusion(&rows, threshold);
            let sum = sums.entry(name).or_default();
            *sum = (sum.0 + found.0, sum.1 + found.1, sum.2 + found.2);
        }
    }
    for (name, sum) in sums {
        let bins = (name == "model").then_some(&bins);
        report.t2.entry(slice.into()).or_default().insert(name.into(), match_score(sum, bins));
    }
}

/// Mean over projects of the mean over looks of the share of pairs in the right order; ties are half right.
fn order_auc(rows: &[(&soon::Row, f64)]) -> f64 {
    type Look = (Vec<f64>, Vec<f64>);
    let mut looks: BTreeMap<(&str, &str), Look> = BTreeMap::new();
    for (row, value) in rows {
        let (changed, same) = looks.entry((&row.project, &row.look)).or_default();
        if row.changed { changed.push(*value) } else { same.push(*value) }
    }
    let mut projects: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for ((project, _), (changed, same)) in looks.iter().filter(|(_, (changed, same))| !changed.is_empty() && !same.is_empty()) {
        let right =
            |one: &f64| same.iter().map(|other| if one > other { 1.0 } else { 0.5 * f64::from(u8::from(one == other)) }).sum::<f64>();
        let sum: f64 = changed.iter().map(right).sum();
        projects.entry(project).or_default().push(sum / (changed.len() * same.len()) as f64);
    }
    let means: Vec<f64> = projects.values().map(|looks| looks.iter().sum::<f64>() / looks.len() as f64).collect();
    means.iter().sum::<f64>() / means.len().max(1) as f64
}

fn t4_report(rows: &[soon::Row], report: &mut Report) {
    let folds = folds(rows.iter().map(|row| row.project.as_str()));
    let mut answers: BTreeMap<&str, Vec<(&soon::Row, f64)>> = BTreeMap::new();
    for fold in 0..FOLDS {
        let (test, train): (Vec<&soon::Row>, Vec<&soon::Row>) = rows.iter().partition(|row| fold_of(&folds, &row.project) == fold);
        let model = soon::Soon::fit(&train);
        for row in test {
            let [columns, ..] = row.counts.structure;
            let [changes, _, _, since, _] = row.counts.history;
            answers.entry("model").or_default().push((row, model.predict(&row.counts, false)));
            answers.entry("model with history").or_default().push((row, model.predict(&row.counts, true)));
            answers.entry("widest table").or_default().push((row, columns));
            answers.entry("most changed").or_default().push((row, changes));
            answers.entry("changed last").or_default().push((row, -since));
        }
    }
    for (name, rows) in answers {
        let mut score = OrderScore { auc: order_auc(&rows), ..OrderScore::default() };
        if name.starts_with("model") {
            let mut bins = Reliability::default();
            rows.iter().for_each(|(row, said)| bins.add(*said, row.changed, 1.0));
            let brier = rows.iter().map(|(row, said)| (said - f64::from(u8::from(row.changed))).powi(2)).sum::<f64>();
            (score.ece, score.brier) = (Some(bins.error()), Some(brier / rows.len().max(1) as f64));
            score.reliability = bins.table();
        }
        report.t4.insert(name.into(), score);
    }
}

/// Evaluates on a folder of CSV files (all projects in it).
///
/// # Errors
/// [`SchemaError::Model`]
pub fn evaluate(folder: &Path) -> Result<Report, SchemaError> {
    let rows: Vec<t1::Row> = data::t1_rows(&folder.join("t1_default.csv"))?.into_iter().filter(|row| row.class.is_some()).collect();
    let mut report = Report { t1_rows: rows.len(), ..Report::default() };
    t1_report(&rows, &mut report);
    let pairs = matching::pairs(&folder.join("t2_column_match.csv"), Kind::Columns)?;
    let features = columns::features(&pairs);
    let baselines: [Baseline; 2] = [("name similarity", name_similarity), ("name similarity and type", name_and_type)];
    let plain: Vec<&[f64]> = features.iter().map(|features| &features[..columns::PLAIN]).collect();
    t2_report("columns", &pairs, &plain, columns::SHAPE, &baselines, &mut report);
    let all: Vec<&[f64]> = features.iter().map(Vec::as_slice).collect();
    t2_report("columns with position", &pairs, &all, columns::SHAPE_WITH_POSITION, &baselines, &mut report);
    let pairs = matching::pairs(&folder.join("t2_table_match.csv"), Kind::Tables)?;
    let features = tables::features(&pairs);
    let baselines: [Baseline; 2] = [("name similarity", name_similarity), ("same column names", same_columns)];
    t2_report("tables", &pairs, &features.iter().map(Vec::as_slice).collect::<Vec<_>>(), tables::SHAPE, &baselines, &mut report);
    t4_report(&soon::rows(&folder.join("t4_table_drift.csv"))?, &mut report);
    let path = folder.join("t5_fk_target.csv");
    let references = super::cli::reference_rows(&path, &folder.join("table_lifetimes.csv"))?;
    for with_last in [false, true] {
        let mut hits = 0.0;
        for row in &references {
            let last = row.last_target.as_deref().filter(|_| with_last);
            let ranked = reference::rank(&row.table, &row.column, last, row.candidates.iter().map(String::as_str));
            hits += f64::from(u8::from(ranked.first().is_some_and(|first| *first == row.truth)));
        }
        let name = if with_last { "names and last target" } else { "names alone" };
        report.t5.insert(name.into(), hits / references.len().max(1) as f64);
    }
    Ok(report)
}
