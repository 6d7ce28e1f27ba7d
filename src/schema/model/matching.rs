//! T2: which removed and added columns (or tables) are the same thing under a new name? For two lineages only: inside one database attribute
//! numbers answer exactly. Logistic regression over similarities, and over how much better a pair is than its rivals.

use super::{
    data::Table,
    t1::{tokens, type_class},
};
use crate::schema::SchemaError;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    path::Path,
};

/// A logistic regression.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct Logistic {
    /// One per feature.
    pub weights: Vec<f64>,
    /// Constant.
    pub bias: f64,
    /// Probability from which a pair counts as the same, chosen on the training data.
    pub threshold: f64,
}

impl Logistic {
    /// Probability.
    pub fn predict(&self, features: &[f64]) -> f64 {
        let score: f64 = self.bias + self.weights.iter().zip(features).map(|(weight, value)| weight * value).sum::<f64>();
        1.0 / (1.0 + (-score).exp())
    }

    /// Shorter numbers for the file.
    pub(super) fn rounded(mut self) -> Self {
        let round = |value: f64| (value * 1e4).round() / 1e4;
        self.weights.iter_mut().for_each(|weight| *weight = round(*weight));
        self.bias = round(self.bias);
        self
    }
}

/// Gradient steps; converged by then.
const STEPS: usize = 400;
/// Ridge, in rows.
const RIDGE: f64 = 1.0;

/// Fits by Adam.
pub fn fit(rows: &[(Vec<f64>, bool)]) -> Logistic {
    let width = rows.first().map_or(0, |(features, _)| features.len());
    let mut parameters = vec![0.0; width + 1];
    let (mut first, mut second) = (vec![0.0; width + 1], vec![0.0; width + 1]);
    let total = rows.len().max(1) as f64;
    for step in 1..=STEPS {
        let mut gradient: Vec<f64> = parameters.iter().map(|value| RIDGE * value / total).collect();
        gradient[width] = 0.0;
        for (features, label) in rows {
            let score: f64 = parameters[width] + parameters.iter().zip(features).map(|(weight, value)| weight * value).sum::<f64>();
            let error = (1.0 / (1.0 + (-score).exp()) - f64::from(u8::from(*label))) / total;
            gradient.iter_mut().zip(features).for_each(|(slot, value)| *slot += error * value);
            gradient[width] += error;
        }
        for k in 0..=width {
            first[k] = 0.9 * first[k] + 0.1 * gradient[k];
            second[k] = 0.99 * second[k] + 0.01 * gradient[k] * gradient[k];
            let unbiased = first[k] / (1.0 - 0.9f64.powi(step as i32));
            parameters[k] -= 0.1 * unbiased / ((second[k] / (1.0 - 0.99f64.powi(step as i32))).sqrt() + 1e-8);
        }
    }
    let bias = parameters.pop().unwrap_or(0.0);
    Logistic { weights: parameters, bias, threshold: 0.5 }
}

/// Longest name that is compared letter by letter: identifiers have at most 63 bytes; a longer one is cut.
const NAME_MAX: usize = 128;

fn letters(name: &str) -> Vec<char> {
    name.chars().take(NAME_MAX).flat_map(char::to_lowercase).collect()
}

/// Levenshtein distance turned into a similarity of 0 to 1.
pub fn levenshtein_ratio(a: &str, b: &str) -> f64 {
    let (a, b) = (letters(a), letters(b));
    let longest = a.len().max(b.len());
    if longest == 0 {
        return 1.0;
    }
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let cost = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = cost.min(row[j] + 1).min(diagonal + 1);
        }
    }
    1.0 - row[b.len()] as f64 / longest as f64
}

/// Jaro-Winkler similarity.
pub fn jaro_winkler(a: &str, b: &str) -> f64 {
    let (a, b) = (letters(a), letters(b));
    if a.is_empty() || b.is_empty() {
        return f64::from(u8::from(a == b));
    }
    let window = (a.len().max(b.len()) / 2).saturating_sub(1);
    let mut taken = vec![false; b.len()];
    let mut matched = Vec::new();
    for (i, x) in a.iter().enumerate() {
        let from = i.saturating_sub(window);
        let found = (from..b.len().min(i + window + 1)).find(|j| !taken[*j] && b[*j] == *x);
        if let Some(j) = found {
            taken[j] = true;
            matched.push(*x);
        }
    }
    if matched.is_empty() {
        return 0.0;
    }
    let other: Vec<char> = b.iter().zip(&taken).filter(|(_, taken)| **taken).map(|(letter, _)| *letter).collect();
    let swaps = matched.iter().zip(&other).filter(|(x, y)| x != y).count() as f64 / 2.0;
    let m = matched.len() as f64;
    let jaro = (m / a.len() as f64 + m / b.len() as f64 + (m - swaps) / m) / 3.0;
    let prefix = a.iter().zip(&b).take(4).take_while(|(x, y)| x == y).count() as f64;
    jaro + prefix * 0.1 * (1.0 - jaro)
}

fn jaccard<T: Ord>(a: &BTreeSet<T>, b: &BTreeSet<T>) -> f64 {
    let union = a.union(b).count();
    if union == 0 { 0.0 } else { a.intersection(b).count() as f64 / union as f64 }
}

/// Jaccard of three-letter pieces.
pub fn trigram(a: &str, b: &str) -> f64 {
    let pieces = |name: &str| {
        let padded: Vec<char> = std::iter::once(' ').chain(letters(name)).chain(std::iter::once(' ')).collect();
        padded.windows(3).map(|piece| piece.iter().collect::<String>()).collect::<BTreeSet<_>>()
    };
    jaccard(&pieces(a), &pieces(b))
}

fn token_jaccard(a: &str, b: &str) -> f64 {
    jaccard(&tokens(a).into_iter().collect(), &tokens(b).into_iter().collect())
}

/// One side of a pair of columns.
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
    /// Relative ordinal position.
    pub position: f64,
}

/// A removed and an added column of one table.
#[derive(Clone, Debug, Default)]
pub struct Pair {
    /// Identifier in the data.
    pub id: String,
    /// Project, only to keep projects apart.
    pub project: String,
    /// One table diff.
    pub group: String,
    /// Removed.
    pub old: Side,
    /// Added.
    pub new: Side,
    /// Columns removed and added in the group.
    pub counts: (f64, f64),
    /// Position moved by so many columns.
    pub moved: f64,
    /// The same thing; `None`: not scored.
    pub same: Option<bool>,
}

/// Largest group that is scored.
const GROUP_MAX: usize = 400;

/// Pairs of a file.
///
/// # Errors
/// [`SchemaError::Model`]
pub fn column_pairs(path: &Path) -> Result<Vec<Pair>, SchemaError> {
    let table = Table::read(path)?;
    table.require(path, &["row_id", "group", "old", "new", "old_type", "new_type"])?;
    Ok(table
        .rows()
        .map(|row| {
            let side = |prefix: &str| {
                let field = |name: &str| row.get(&format!("{prefix}_{name}"));
                let width: f64 = row.number(&format!("n_{prefix}_cols")).max(1.0);
                Side {
                    name: row.get(prefix).to_owned(),
                    type_name: field("type").to_owned(),
                    not_null: field("nn") == "1",
                    default: field("default").to_owned(),
                    references: field("fk").to_owned(),
                    position: row.number(&format!("{prefix}_pos")) / width,
                }
            };
            Pair {
                id: row.get("row_id").to_owned(),
                project: row.get("project").to_owned(),
                group: row.get("group").to_owned() + "|" + row.get("window"),
                old: side("old"),
                new: side("new"),
                counts: (row.number("n_removed"), row.number("n_added")),
                moved: row.number("new_pos") - row.number("old_pos"),
                same: match row.get("truth") {
                    "rename" | "copy" | "derived" => Some(true),
                    "none" => Some(false),
                    _ => None,
                },
            }
        })
        .collect())
}

/// Features of all pairs; rivals are looked for inside each group.
pub fn column_features(pairs: &[Pair], positions: bool) -> Vec<Vec<f64>> {
    let mut groups: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (at, pair) in pairs.iter().enumerate() {
        groups.entry(&pair.group).or_default().push(at);
    }
    let mut result = vec![Vec::new(); pairs.len()];
    for members in groups.values() {
        let similarity: Vec<[f64; 3]> = members
            .iter()
            .map(|at| {
                let (old, new) = (&pairs[*at].old.name, &pairs[*at].new.name);
                [trigram(old, new), levenshtein_ratio(old, new), jaro_winkler(old, new)]
            })
            .collect();
        // the best and the second best of each name, so that a pair's best rival is found without comparing all with all
        let mut best: BTreeMap<(bool, &str, usize), (f64, f64)> = BTreeMap::new();
        for (slot, at) in members.iter().enumerate() {
            for (is_old, name) in [(true, pairs[*at].old.name.as_str()), (false, pairs[*at].new.name.as_str())] {
                for (kind, value) in similarity[slot].into_iter().take(2).enumerate() {
                    let entry = best.entry((is_old, name, kind)).or_insert((0.0, 0.0));
                    if value > entry.0 {
                        *entry = (value, entry.0);
                    } else if value > entry.1 {
                        entry.1 = value;
                    }
                }
            }
        }
        for (slot, at) in members.iter().enumerate() {
            let pair = &pairs[*at];
            let rival = |kind: usize| {
                let value = similarity[slot][kind];
                [(true, pair.old.name.as_str()), (false, pair.new.name.as_str())]
                    .iter()
                    .filter_map(|(is_old, name)| best.get(&(*is_old, *name, kind)))
                    .map(|(first, second)| if value >= *first { *second } else { *first })
                    .fold(0.0, f64::max)
            };
            result[*at] = pair_features(pair, similarity[slot], [rival(0), rival(1)], positions);
        }
    }
    result
}

fn pair_features(pair: &Pair, similarity: [f64; 3], rivals: [f64; 2], positions: bool) -> Vec<f64> {
    let flag = |value: bool| f64::from(u8::from(value));
    let (old, new) = (&pair.old, &pair.new);
    let plain_default = |default: &str| matches!(default, "" | "none" | "null");
    let class = type_class(&old.type_name);
    let (old_words, new_words) = (tokens(&old.name), tokens(&new.name));
    let same_type = old.type_name == new.type_name;
    let one_to_one = pair.counts.0 <= 1.0 && pair.counts.1 <= 1.0;
    let mut features = vec![
        similarity[0],
        similarity[1],
        similarity[2],
        token_jaccard(&old.name, &new.name),
        flag(same_type),
        flag(class == type_class(&new.type_name)),
        flag(same_type && !matches!(class, "text" | "int" | "bool" | "ts")),
        flag(old.not_null == new.not_null),
        flag(!old.references.is_empty() && old.references == new.references),
        flag(old.references.is_empty() != new.references.is_empty()),
        flag(old.default == new.default && !plain_default(&old.default)),
        similarity[0] - rivals[0],
        similarity[1] - rivals[1],
        (pair.counts.0 * pair.counts.1).max(1.0).ln(),
        flag(one_to_one),
        flag(old_words.last() == new_words.last()),
    ];
    if positions {
        features.extend([
            (old.position - new.position).abs(),
            flag(pair.moved == 0.0),
            flag(pair.moved.abs() <= 1.0),
            flag(pair.moved > 3.0),
        ]);
    }
    features
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

/// The threshold with the best F1.
pub fn best_threshold(rows: &[Scored<'_>]) -> f64 {
    let candidates = (10..=90).step_by(5).map(|percent| f64::from(percent) / 100.0);
    candidates.map(|threshold| (f1(confusion(rows, threshold)), threshold)).max_by(|a, b| a.0.total_cmp(&b.0)).map_or(0.5, |best| best.1)
}

/// Scored pairs with their probabilities.
pub fn scored<'a>(pairs: &'a [Pair], features: &[Vec<f64>], model: &Logistic) -> Vec<Scored<'a>> {
    pairs
        .iter()
        .zip(features)
        .filter_map(|(pair, features)| {
            Some((pair.group.as_str(), pair.old.name.as_str(), pair.new.name.as_str(), model.predict(features), pair.same?))
        })
        .collect()
}

/// Trains T2 for columns, with its threshold.
pub fn train_columns(pairs: &[Pair], positions: bool) -> Logistic {
    let features = column_features(pairs, positions);
    train(pairs, &features)
}

/// Trains on features that are already there.
pub fn train(pairs: &[Pair], features: &[Vec<f64>]) -> Logistic {
    let rows: Vec<(Vec<f64>, bool)> =
        pairs.iter().zip(features).filter_map(|(pair, features)| Some((features.clone(), pair.same?))).collect();
    let mut model = fit(&rows);
    model.threshold = best_threshold(&scored(pairs, features, &model));
    model
}

/// Table pairs of a file: `default` carries the columns.
///
/// # Errors
/// [`SchemaError::Model`]
pub fn table_pairs(path: &Path) -> Result<Vec<Pair>, SchemaError> {
    let table = Table::read(path)?;
    table.require(path, &["row_id", "group", "old", "new", "old_cols", "new_cols"])?;
    Ok(table
        .rows()
        .map(|row| {
            let side = |prefix: &str| Side {
                name: row.get(prefix).to_owned(),
                default: row.get(&format!("{prefix}_cols")).to_owned(),
                ..Side::default()
            };
            Pair {
                id: row.get("row_id").to_owned(),
                project: row.get("project").to_owned(),
                group: row.get("group").to_owned() + "|" + row.get("window"),
                old: side("old"),
                new: side("new"),
                counts: (row.number("n_removed"), row.number("n_added")),
                moved: 0.0,
                same: Some(row.get("truth") == "rename"),
            }
        })
        .collect())
}

/// Features of table pairs.
pub fn table_features(pairs: &[Pair]) -> Vec<Vec<f64>> {
    let columns = |side: &Side| side.default.split_whitespace().map(str::to_owned).collect::<BTreeSet<_>>();
    let names = |columns: &BTreeSet<String>| {
        columns.iter().map(|entry| entry.split(':').next().unwrap_or("").to_lowercase()).collect::<BTreeSet<_>>()
    };
    let values: Vec<[f64; 2]> = pairs
        .iter()
        .map(|pair| {
            let (old, new) = (columns(&pair.old), columns(&pair.new));
            [jaccard(&old, &new), jaccard(&names(&old), &names(&new))]
        })
        .collect();
    let mut best: BTreeMap<(&str, bool, &str), (f64, f64)> = BTreeMap::new();
    for (pair, value) in pairs.iter().zip(&values) {
        for (is_old, name) in [(true, &pair.old.name), (false, &pair.new.name)] {
            let entry = best.entry((&pair.group, is_old, name)).or_insert((0.0, 0.0));
            if value[1] > entry.0 {
                *entry = (value[1], entry.0);
            } else if value[1] > entry.1 {
                entry.1 = value[1];
            }
        }
    }
    pairs
        .iter()
        .zip(&values)
        .map(|(pair, value)| {
            let rival = [(true, pair.old.name.as_str()), (false, pair.new.name.as_str())]
                .iter()
                .filter_map(|(is_old, name)| best.get(&(pair.group.as_str(), *is_old, *name)))
                .map(|(first, second)| if value[1] >= *first { *second } else { *first })
                .fold(0.0, f64::max);
            let (old, new) = (&pair.old.name, &pair.new.name);
            vec![
                value[0],
                value[1],
                value[1] - rival,
                trigram(old, new),
                levenshtein_ratio(old, new),
                jaro_winkler(old, new),
                token_jaccard(old, new),
                (pair.counts.0 * pair.counts.1).max(1.0).ln(),
            ]
        })
        .collect()
}

/// Trains T2 for tables.
pub fn train_tables(pairs: &[Pair]) -> Logistic {
    train(pairs, &table_features(pairs))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn similarities() {
        assert!((jaro_winkler("martha", "marhta") - 0.961).abs() < 0.001);
        assert!((levenshtein_ratio("kitten", "sitting") - 4.0 / 7.0).abs() < 1e-9);
        assert_eq!(trigram("abc", "abc"), 1.0);
    }

    #[test]
    fn one_partner_each() {
        let pairs = [("a", "x", 0.9), ("a", "y", 0.8), ("b", "x", 0.7), ("b", "y", 0.6)];
        assert_eq!(assign(&pairs, 0.5), HashSet::from([0, 3]));
    }

    proptest! {
        #[test]
        fn similarities_stay_between_0_and_1(a in ".{0,20}", b in ".{0,20}") {
            for value in [jaro_winkler(&a, &b), levenshtein_ratio(&a, &b), trigram(&a, &b), token_jaccard(&a, &b)] {
                prop_assert!((0.0..=1.0 + 1e-9).contains(&value));
            }
        }
    }
}
