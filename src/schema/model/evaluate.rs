//! Cross-validation grouped by project, against baselines that are code: rules and majority table (T1), name similarity (T2), names alone (T5).

use super::{data, matching, reference, t1, train_t1};
use crate::schema::SchemaError;
use serde::Serialize;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

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

fn score(rows: &[(&t1::Row, t1::Counts)]) -> Score {
    let mut result = Score::default();
    let mut bins = [(0.0, 0.0, 0.0); BINS];
    for (row, answer) in rows {
        let Some(class) = row.class else { continue };
        let mut order: Vec<usize> = (0..t1::CLASS_COUNT).collect();
        order.sort_by(|a, b| answer[*b].total_cmp(&answer[*a]));
        let hit = f64::from(u8::from(order[0] == class));
        result.rows += row.weight;
        result.top1 += row.weight * hit;
        result.top3 += row.weight * f64::from(u8::from(order[..3].contains(&class)));
        result.brier += row.weight * answer.iter().enumerate().map(|(at, p)| (p - f64::from(u8::from(at == class))).powi(2)).sum::<f64>();
        let confidence = answer[order[0]];
        let bin = &mut bins[((confidence * BINS as f64) as usize).min(BINS - 1)];
        bin.0 += row.weight * confidence;
        bin.1 += row.weight * hit;
        bin.2 += row.weight;
    }
    let total = result.rows.max(1e-9);
    result.top1 /= total;
    result.top3 /= total;
    result.brier /= total;
    result.ece = bins.iter().map(|(confidence, hits, _)| (confidence - hits).abs()).sum::<f64>() / total;
    result.reliability = bins.iter().filter(|bin| bin.2 > 0.0).map(|bin| (bin.0 / bin.2, bin.1 / bin.2, bin.2)).collect();
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

fn match_score((hits, wrong, missed): (f64, f64, f64)) -> MatchScore {
    let precision = if hits + wrong > 0.0 { hits / (hits + wrong) } else { 0.0 };
    let recall = if hits + missed > 0.0 { hits / (hits + missed) } else { 0.0 };
    MatchScore { precision, recall, f1: matching::f1((hits, wrong, missed)) }
}

fn t2_report(slice: &str, pairs: &[matching::Pair], features: &[Vec<f64>], baseline: usize, report: &mut Report) {
    let folds = folds(pairs.iter().map(|pair| pair.project.as_str()));
    let names: BTreeSet<&str> = BTreeSet::from(["model", "name similarity"]);
    for name in names {
        let mut sum = (0.0, 0.0, 0.0);
        for fold in 0..FOLDS {
            let part = |inside: bool| {
                let at: Vec<usize> = (0..pairs.len()).filter(|at| (fold_of(&folds, &pairs[*at].project) == fold) == inside).collect();
                let own: Vec<matching::Pair> = at.iter().map(|at| pairs[*at].clone()).collect();
                let values: Vec<Vec<f64>> =
                    at.iter().map(|at| if name == "model" { features[*at].clone() } else { vec![features[*at][baseline]] }).collect();
                (own, values)
            };
            let ((train, train_features), (test, test_features)) = (part(false), part(true));
            let model = matching::train(&train, &train_features);
            let found = matching::confusion(&matching::scored(&test, &test_features, &model), model.threshold);
            sum = (sum.0 + found.0, sum.1 + found.1, sum.2 + found.2);
        }
        report.t2.entry(slice.into()).or_default().insert(name.into(), match_score(sum));
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
    let columns = matching::column_pairs(&folder.join("t2_column_match.csv"))?;
    let jaro_winkler = 2;
    t2_report("columns", &columns, &matching::column_features(&columns, false), jaro_winkler, &mut report);
    t2_report("columns with position", &columns, &matching::column_features(&columns, true), jaro_winkler, &mut report);
    let tables = matching::table_pairs(&folder.join("t2_table_match.csv"))?;
    t2_report("tables", &tables, &matching::table_features(&tables), 5, &mut report);
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
