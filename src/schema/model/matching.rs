//! T2: which removed and added columns (or tables) are the same thing under a new name? For two lineages only: inside one database attribute
//! numbers answer exactly. Here: the pairs, where they come from, one partner for each, and how an answer is scored. The features are in
//! `columns` and `tables`, the learner in `learn`.

use super::{
    data::Table,
    learn::{Example, Matcher, Shape},
};
use crate::schema::SchemaError;
use std::{
    collections::{BTreeMap, HashSet},
    path::Path,
};

/// One side of a pair: a column, or a table (then only `name` and `columns` count).
#[derive(Clone, Debug, Default)]
pub struct Side {
    /// Name.
    pub name: String,
    /// Type in any spelling.
    pub type_name: String,
    /// NOT NULL.
    pub not_null: bool,
    /// Class of its default.
    pub default: String,
    /// Table that it refers to, or empty.
    pub references: String,
    /// Ordinal position, from 0.
    pub ordinal: f64,
    /// Columns of its table.
    pub width: f64,
    /// Of a table: its columns in order, names and types.
    pub columns: Vec<(String, String)>,
}

/// A removed and an added column of one table, or a removed and an added table.
#[derive(Clone, Debug, Default)]
pub struct Pair {
    /// Identifier in the data.
    pub id: String,
    /// Project, only to keep projects apart.
    pub project: String,
    /// One comparison of one table (columns) or of one schema (tables).
    pub group: String,
    /// One comparison of one schema.
    pub event: String,
    /// Removed.
    pub old: Side,
    /// Added.
    pub new: Side,
    /// Columns (tables) removed and added in the group.
    pub counts: (f64, f64),
    /// Names of columns that are on both sides.
    pub kept: Vec<String>,
    /// The same thing; `None`: not scored.
    pub same: Option<bool>,
}

/// Pairs of columns or of tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `t2_column_match.csv`
    Columns,
    /// `t2_table_match.csv`
    Tables,
}

/// Largest group that is scored.
const GROUP_MAX: usize = 400;

/// Pairs of a file.
///
/// # Errors
/// [`SchemaError::Model`]
pub fn pairs(path: &Path, kind: Kind) -> Result<Vec<Pair>, SchemaError> {
    let table = Table::read(path)?;
    let own: [&str; 2] = if kind == Kind::Columns { ["old_type", "new_type"] } else { ["old_cols", "new_cols"] };
    table.require(path, &["row_id", "group", "old", "new", own[0], own[1]])?;
    let pair = |row: super::data::Record<'_>| {
        let side = |prefix: &str| {
            let field = |name: &str| row.get(&format!("{prefix}_{name}"));
            let columns = field("cols").split_whitespace().map(|entry| {
                let (name, type_name) = entry.trim_end_matches('!').split_once(':').unwrap_or((entry, ""));
                (name.to_owned(), type_name.to_owned())
            });
            Side {
                name: row.get(prefix).to_owned(),
                type_name: field("type").to_owned(),
                not_null: field("nn") == "1",
                default: field("default").to_owned(),
                references: field("fk").to_owned(),
                ordinal: row.number(&format!("{prefix}_pos")),
                width: row.number(&format!("n_{prefix}_cols")).max(1.0),
                columns: columns.collect(),
            }
        };
        let group = row.get("group");
        // the group of a column pair ends with its table
        let event = if kind == Kind::Columns { group.rsplit_once('|').map_or(group, |(event, _)| event) } else { group };
        Pair {
            id: row.get("row_id").to_owned(),
            project: row.get("project").to_owned(),
            group: format!("{group}|{}", row.get("window")),
            event: format!("{event}|{}", row.get("window")),
            old: side("old"),
            new: side("new"),
            counts: (row.number("n_removed"), row.number("n_added")),
            kept: row.get("kept").split_whitespace().map(str::to_owned).collect(),
            same: match row.get("truth") {
                "rename" | "copy" | "derived" => Some(true),
                "none" => Some(false),
                _ => None,
            },
        }
    };
    Ok(table.rows().map(pair).collect())
}

/// Members of each group, in order.
pub(super) fn groups(pairs: &[Pair]) -> BTreeMap<&str, Vec<usize>> {
    let mut groups: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (at, pair) in pairs.iter().enumerate() {
        groups.entry(&pair.group).or_default().push(at);
    }
    groups
}

/// How much better each pair of a group is than its best rival (another pair with its old or its new name), for each of `N` similarities.
pub(super) struct Margins<'a, const N: usize> {
    best: BTreeMap<(bool, &'a str), [(f64, f64); N]>,
}

impl<'a, const N: usize> Margins<'a, N> {
    pub(super) fn new(members: impl Iterator<Item = (&'a Pair, &'a [f64; N])>) -> Self {
        let mut best: BTreeMap<(bool, &str), [(f64, f64); N]> = BTreeMap::new();
        for (pair, values) in members {
            for key in [(true, pair.old.name.as_str()), (false, pair.new.name.as_str())] {
                for (slot, value) in best.entry(key).or_insert([(0.0, 0.0); N]).iter_mut().zip(values) {
                    if *value > slot.0 {
                        *slot = (*value, slot.0);
                    } else if *value > slot.1 {
                        slot.1 = *value;
                    }
                }
            }
        }
        Margins { best }
    }

    pub(super) fn of(&self, pair: &Pair, kind: usize, value: f64) -> f64 {
        let rival = |key: (bool, &str)| {
            let (first, second) = self.best.get(&key).and_then(|best| best.get(kind)).copied().unwrap_or_default();
            if value >= first { second } else { first }
        };
        value - rival((true, &pair.old.name)).max(rival((false, &pair.new.name)))
    }
}

/// At most one partner per name: the best pairs first.
pub fn assign(pairs: &[(&str, &str, f64)], threshold: f64) -> HashSet<usize> {
    let mut order: Vec<usize> = (0..pairs.len()).filter(|at| pairs[*at].2 >= threshold).collect();
    order.sort_by(|a, b| pairs[*b].2.total_cmp(&pairs[*a].2));
    let (mut olds, mut news, mut chosen) = (HashSet::new(), HashSet::new(), HashSet::new());
    for at in order {
        let (old, new, _) = pairs[at];
        if !olds.contains(old) && !news.contains(new) {
            olds.insert(old);
            news.insert(new);
            chosen.insert(at);
        }
    }
    chosen
}

/// A scored row: group, old name, new name, probability, truth.
pub type Scored<'a> = (&'a str, &'a str, &'a str, f64, bool);

/// True positives, false positives, false negatives after the 1:1 assignment inside groups.
pub fn confusion(rows: &[Scored<'_>], threshold: f64) -> (f64, f64, f64) {
    let mut groups: BTreeMap<&str, Vec<&Scored<'_>>> = BTreeMap::new();
    for row in rows {
        groups.entry(row.0).or_default().push(row);
    }
    let mut counts = (0.0, 0.0, 0.0);
    for members in groups.values().filter(|members| members.len() <= GROUP_MAX) {
        let pairs: Vec<(&str, &str, f64)> = members.iter().map(|row| (row.1, row.2, row.3)).collect();
        let chosen = assign(&pairs, threshold);
        for (at, row) in members.iter().enumerate() {
            match (chosen.contains(&at), row.4) {
                (true, true) => counts.0 += 1.0,
                (true, false) => counts.1 += 1.0,
                (false, true) => counts.2 += 1.0,
                (false, false) => {}
            }
        }
    }
    counts
}

/// F1 of a confusion.
pub fn f1((hits, wrong, missed): (f64, f64, f64)) -> f64 {
    if hits == 0.0 { 0.0 } else { 2.0 * hits / (2.0 * hits + wrong + missed) }
}

/// The threshold of `values` with the best F1: for baselines, whose numbers are no probabilities.
pub fn best_threshold(pairs: &[&Pair], values: &[f64]) -> f64 {
    let rows = scored(pairs, values);
    let candidates = (2..=98).step_by(4).map(|percent| f64::from(percent) / 100.0);
    candidates.map(|threshold| (f1(confusion(&rows, threshold)), threshold)).max_by(|a, b| a.0.total_cmp(&b.0)).map_or(0.5, |best| best.1)
}

/// Scored pairs with their numbers.
pub fn scored<'a>(pairs: &[&'a Pair], values: &[f64]) -> Vec<Scored<'a>> {
    let row =
        |(pair, value): (&&'a Pair, &f64)| Some((pair.group.as_str(), pair.old.name.as_str(), pair.new.name.as_str(), *value, pair.same?));
    pairs.iter().zip(values).filter_map(row).collect()
}

/// Probability from which a pair counts as the same. Where probabilities are calibrated, F1 is best at half of the F1 that is reached
/// (Lipton et al., "Optimal Thresholding of Classifiers to Maximize F1", 2014): near .42 for .84 and .46 for .92.
const THRESHOLD: f64 = 0.42;

/// Trains on pairs with their features.
pub fn train(pairs: &[&Pair], features: &[&[f64]], shape: Shape) -> Matcher {
    let mut sizes: BTreeMap<&str, f64> = BTreeMap::new();
    pairs.iter().for_each(|pair| *sizes.entry(&pair.project).or_default() += 1.0);
    // a project with a hundred times the pairs counts ten times as much
    let weight = |pair: &Pair| 10.0 / sizes.get(pair.project.as_str()).copied().unwrap_or(1.0).sqrt();
    let example =
        |(pair, features): (&&Pair, &&[f64])| Some(Example { features: features.to_vec(), label: pair.same?, weight: weight(pair) });
    let rows: Vec<Example> = pairs.iter().zip(features).filter_map(example).collect();
    Matcher { threshold: THRESHOLD, ..Matcher::fit(&rows, shape) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_partner_each() {
        let pairs = [("a", "x", 0.9), ("a", "y", 0.8), ("b", "x", 0.7), ("b", "y", 0.6)];
        assert_eq!(assign(&pairs, 0.5), HashSet::from([0, 3]));
    }

    #[test]
    fn a_margin_is_over_the_best_rival() {
        let pair = |old: &str, new: &str| Pair {
            old: Side { name: old.into(), ..Side::default() },
            new: Side { name: new.into(), ..Side::default() },
            ..Pair::default()
        };
        let (pairs, values) = ([pair("a", "x"), pair("a", "y"), pair("b", "x")], [[0.9], [0.5], [0.7]]);
        let margins = Margins::new(pairs.iter().zip(&values));
        for (at, expected) in [0.2, -0.4, -0.2].into_iter().enumerate() {
            assert!((margins.of(&pairs[at], 0, values[at][0]) - expected).abs() < 1e-9);
        }
    }
}
