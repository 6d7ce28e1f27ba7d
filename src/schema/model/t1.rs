//! T1: which value do existing rows get in a new column? A conditional logit with a few weights shared by all classes (log-linear pooling of
//! count tables), so that it stays calibrated on projects it has never seen. Inference needs a hash map and a softmax.

use serde::{Deserialize, Serialize};
use std::collections::HashMap;

/// What existing rows get.
pub const CLASSES: [&str; 14] = [
    "null",
    "false",
    "true",
    "zero",
    "one",
    "num_other",
    "empty_str",
    "str_const",
    "enum_label",
    "empty_obj",
    "empty_array",
    "now",
    "computed",
    "other",
];
/// Number of classes.
pub const CLASS_COUNT: usize = CLASSES.len();
const NULL: usize = 0;
const STR_CONST: usize = 7;
const COMPUTED: usize = 12;

/// Folds a label of the data into a class; `None`: not scored.
pub fn class_of(label: &str) -> Option<usize> {
    let folded = match label {
        "json_other" | "time_const" | "uuid" => "other",
        label => label,
    };
    CLASSES.iter().position(|class| *class == folded)
}

/// Counts of classes.
pub type Counts = [f64; CLASS_COUNT];

/// A column, as far as the model looks at it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ColumnCase {
    /// Table.
    pub table: String,
    /// Column.
    pub column: String,
    /// Type in any spelling.
    pub type_name: String,
    /// NOT NULL is wanted.
    pub not_null: bool,
    /// It refers to another table.
    pub foreign_key: bool,
    /// It is indexed.
    pub indexed: bool,
    /// UNIQUE or primary key.
    pub unique: bool,
    /// Name and type of the table's other columns.
    pub siblings: Vec<(String, String)>,
    /// A CHECK lists the allowed values.
    pub check_list: bool,
    /// The table is older than a few migrations.
    pub old_table: bool,
}

/// Coarse type: the vocabulary of the training data.
pub fn type_class(type_name: &str) -> &'static str {
    let name = type_name.trim().to_ascii_lowercase();
    if name.starts_with("enum:") {
        return "enum";
    }
    let name = name.strip_prefix("domain:").and_then(|rest| rest.rsplit_once('=')).map_or(name.as_str(), |(_, base)| base);
    if name.ends_with("[]") {
        return "array";
    }
    let base = name.split('(').next().unwrap_or(name).trim();
    match base {
        "boolean" | "bool" => "bool",
        "smallint" | "integer" | "bigint" | "int" | "int2" | "int4" | "int8" | "serial" | "bigserial" | "smallserial" => "int",
        "numeric" | "decimal" | "real" | "double precision" | "float4" | "float8" | "money" => "num",
        "text" | "varchar" | "character varying" | "char" | "character" | "bpchar" | "citext" | "name" => "text",
        "timestamptz" => "ts",
        base if base.starts_with("timestamp") => "ts",
        "date" => "date",
        "timetz" => "time",
        base if base.starts_with("time") => "time",
        "interval" => "interval",
        "json" | "jsonb" => "json",
        "uuid" => "uuid",
        "bytea" => "bytea",
        "inet" | "cidr" | "macaddr" => "inet",
        _ => "other",
    }
}

/// Words of an identifier: `isActiveUser`, `is_active_user` and `IsActiveUSER` are the same three.
pub fn tokens(name: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut previous_lower = false;
    for character in name.chars() {
        if !character.is_alphanumeric() || (character.is_uppercase() && previous_lower) {
            if !word.is_empty() {
                words.push(std::mem::take(&mut word));
            }
            if !character.is_alphanumeric() {
                previous_lower = false;
                continue;
            }
        }
        previous_lower = character.is_lowercase() || character.is_numeric();
        word.extend(character.to_lowercase());
    }
    if !word.is_empty() {
        words.push(word);
    }
    words
}

/// Which count table a key belongs to.
const TABLES: usize = 5;
/// How much of the prior a key's counts are mixed with, in observations.
const SHRINKAGE: [f64; TABLES] = [1.5, 3.0, 4.0, 2.0, 4.0];
/// Memory: same type and nullability, same last word, same column, same first word.
const MEMORIES: usize = 4;
const MEMORY_SHRINKAGE: [f64; MEMORIES] = [4.0, 2.0, 0.7, 3.0];
/// 1 prior, [`TABLES`], [`MEMORIES`], cues.
pub const FEATURES: usize = 1 + TABLES + MEMORIES + 9;

fn stratum(case: &ColumnCase) -> String {
    format!("{}|{}", type_class(&case.type_name), u8::from(case.not_null))
}

/// Keys of a column in the count tables, in table order.
pub fn keys(case: &ColumnCase) -> [String; TABLES] {
    let class = type_class(&case.type_name);
    let null = u8::from(case.not_null);
    let words = tokens(&case.column);
    let table = tokens(&case.table);
    let last = words.last().map_or("", String::as_str);
    let first = words.first().map_or("", String::as_str);
    let two = words.iter().rev().take(2).rev().cloned().collect::<Vec<_>>().join("_");
    [
        format!("n|{}|{class}|{null}", words.join("_")),
        format!("l|{last}|{class}|{null}"),
        format!("f|{first}|{class}|{null}"),
        format!("2|{two}|{class}|{null}"),
        format!("t|{}|{class}|{null}", table.last().map_or("", String::as_str)),
    ]
}

/// What a database (or project) has done so far: its own columns and what their rows got.
#[derive(Clone, Debug, Default)]
pub struct ProjectMemory {
    counts: HashMap<String, Counts>,
}

impl ProjectMemory {
    fn keys(case: &ColumnCase) -> [String; MEMORIES] {
        let words = tokens(&case.column);
        let stratum = stratum(case);
        [
            format!("s|{stratum}"),
            format!("l|{}|{stratum}", words.last().map_or("", String::as_str)),
            format!("n|{}|{stratum}", words.join("_")),
            format!("f|{}|{stratum}", words.first().map_or("", String::as_str)),
        ]
    }

    /// Takes note of one column.
    pub fn learn(&mut self, case: &ColumnCase, class: usize, weight: f64) {
        for key in Self::keys(case) {
            if let Some(count) = self.counts.entry(key).or_insert([0.0; CLASS_COUNT]).get_mut(class) {
                *count += weight;
            }
        }
    }

    /// How many columns of the same type and nullability it knows, and how many of them got `class`.
    pub fn seen(&self, case: &ColumnCase, class: usize) -> (f64, f64) {
        self.counts.get(&Self::keys(case)[0]).map_or((0.0, 0.0), |counts| (counts.get(class).copied().unwrap_or(0.0), counts.iter().sum()))
    }
}

/// Count tables of many projects.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct Tables {
    /// Prior counts by type and nullability.
    pub prior: HashMap<String, Vec<f64>>,
    /// Counts by key, sparse: (class, count).
    pub keys: HashMap<String, Vec<(u8, f32)>>,
}

/// A row's features: `[feature][class]`.
pub type Features = [[f64; CLASS_COUNT]; FEATURES];

/// Weak evidence for every class, so that nothing is impossible.
const PRIOR_FLOOR: f64 = 0.25;

fn prior_of(counts: Option<&[f64]>) -> Counts {
    let mut prior = [0.0; CLASS_COUNT];
    for (class, slot) in prior.iter_mut().enumerate() {
        *slot = counts.and_then(|counts| counts.get(class)).copied().unwrap_or(0.0) + PRIOR_FLOOR;
    }
    let total: f64 = prior.iter().sum();
    prior.map(|count| count / total)
}

fn log_ratio(counts: &Counts, prior: &Counts, shrinkage: f64) -> Counts {
    let total: f64 = counts.iter().sum();
    let mut ratio = [0.0; CLASS_COUNT];
    if total > 0.0 {
        for class in 0..CLASS_COUNT {
            ratio[class] = ((counts[class] + shrinkage * prior[class]) / ((total + shrinkage) * prior[class])).ln();
        }
    }
    ratio
}

/// Features of a column. `own`: counts to leave out (the project's own, while training).
pub fn features(case: &ColumnCase, tables: &Tables, memory: &ProjectMemory, own: Option<&Tables>) -> Features {
    let mut result = [[0.0; CLASS_COUNT]; FEATURES];
    let stratum = stratum(case);
    let mut prior_counts: Vec<f64> = tables.prior.get(&stratum).cloned().unwrap_or_default();
    if let Some(own) = own.and_then(|own| own.prior.get(&stratum)) {
        prior_counts.iter_mut().zip(own).for_each(|(count, own)| *count = (*count - own).max(0.0));
    }
    let prior = prior_of(Some(&prior_counts));
    result[0] = prior.map(f64::ln);
    for (table, key) in keys(case).iter().enumerate() {
        let mut counts = [0.0; CLASS_COUNT];
        let mut add = |list: Option<&Vec<(u8, f32)>>, sign: f64| {
            for (class, count) in list.into_iter().flatten() {
                if let Some(slot) = counts.get_mut(usize::from(*class)) {
                    *slot = (*slot + sign * f64::from(*count)).max(0.0);
                }
            }
        };
        add(tables.keys.get(key), 1.0);
        add(own.and_then(|own| own.keys.get(key)), -1.0);
        result[1 + table] = log_ratio(&counts, &prior, SHRINKAGE[table]);
    }
    for (kind, key) in ProjectMemory::keys(case).iter().enumerate() {
        if let Some(counts) = memory.counts.get(key) {
            result[1 + TABLES + kind] = log_ratio(counts, &prior, MEMORY_SHRINKAGE[kind]);
        }
    }
    let cue = 1 + TABLES + MEMORIES;
    let words = tokens(&case.column);
    let class = type_class(&case.type_name);
    let similar = case.siblings.iter().any(|(name, type_name)| {
        let other = tokens(name);
        type_class(type_name) == class && words.iter().any(|word| word.len() > 2 && other.contains(word))
    });
    let flag = |value: bool| f64::from(u8::from(value));
    result[cue][COMPUTED] = flag(similar);
    result[cue + 1][COMPUTED] = flag(case.indexed);
    result[cue + 2][COMPUTED] = flag(case.foreign_key);
    result[cue + 3][COMPUTED] = flag(case.old_table);
    result[cue + 4][COMPUTED] = flag(case.unique);
    result[cue + 5][NULL] = flag(case.foreign_key);
    result[cue + 6][NULL] = flag(case.indexed);
    result[cue + 7][STR_CONST] = flag(case.check_list);
    result[cue + 8][COMPUTED] = flag(words.last().is_some_and(|word| word == "id"));
    result
}

/// Probabilities of the classes.
pub fn softmax(features: &Features, weights: &[f64]) -> Counts {
    let mut scores = [0.0; CLASS_COUNT];
    for (row, weight) in features.iter().zip(weights) {
        for class in 0..CLASS_COUNT {
            scores[class] += weight * row[class];
        }
    }
    let highest = scores.iter().copied().fold(f64::MIN, f64::max);
    let exponentials = scores.map(|score| (score - highest).exp());
    let total: f64 = exponentials.iter().sum();
    exponentials.map(|value| value / total)
}

/// A training row.
#[derive(Clone, Debug, Default)]
pub struct Row {
    /// Identifier in the data.
    pub id: String,
    /// Project, only to keep projects apart.
    pub project: String,
    /// Time in the project.
    pub seq: i64,
    /// The column.
    pub case: ColumnCase,
    /// The class; `None`: not scored.
    pub class: Option<usize>,
    /// Weight: repeats inside one migration count once.
    pub weight: f64,
    /// Class of the default that the catalogue showed; only to define slices.
    pub default_visible: String,
}

/// Each project counts at most this often per key, so that no project dominates.
const PER_PROJECT_MAX: f64 = 3.0;
/// Keys seen less often than this (over all projects) are not shipped.
const KEY_COUNT_MIN: f64 = 1.5;

/// Counts of one project, capped.
pub fn project_tables(rows: &[&Row]) -> Tables {
    let mut tables = Tables::default();
    let mut keyed: HashMap<String, Counts> = HashMap::new();
    for row in rows {
        let Some(class) = row.class else { continue };
        let prior = tables.prior.entry(stratum(&row.case)).or_insert_with(|| vec![0.0; CLASS_COUNT]);
        prior[class] += row.weight;
        for key in keys(&row.case) {
            keyed.entry(key).or_insert([0.0; CLASS_COUNT])[class] += row.weight;
        }
    }
    for counts in tables.prior.values_mut() {
        // a large project shapes the prior, but does not own it
        let total: f64 = counts.iter().sum();
        let scale = if total > 40.0 { 40.0 / total } else { 1.0 };
        counts.iter_mut().for_each(|count| *count *= scale);
    }
    for (key, counts) in keyed {
        let total: f64 = counts.iter().sum();
        let scale = if total > PER_PROJECT_MAX { PER_PROJECT_MAX / total } else { 1.0 };
        let sparse =
            counts.iter().enumerate().filter(|(_, count)| **count > 0.0).map(|(class, count)| (class as u8, (count * scale) as f32));
        tables.keys.insert(key, sparse.collect());
    }
    tables
}

/// Adds up projects.
pub fn merge<'a>(projects: impl Iterator<Item = &'a Tables>) -> Tables {
    let mut sum = Tables::default();
    let mut keyed: HashMap<&str, Counts> = HashMap::new();
    for project in projects {
        for (key, counts) in &project.prior {
            let slot = sum.prior.entry(key.clone()).or_insert_with(|| vec![0.0; CLASS_COUNT]);
            slot.iter_mut().zip(counts).for_each(|(slot, count)| *slot += count);
        }
        for (key, counts) in &project.keys {
            let slot = keyed.entry(key).or_insert([0.0; CLASS_COUNT]);
            counts.iter().for_each(|(class, count)| slot[usize::from(*class)] += f64::from(*count));
        }
    }
    for (key, counts) in keyed {
        let sparse = counts.iter().enumerate().filter(|(_, count)| **count > 0.0);
        sum.keys.insert(key.to_owned(), sparse.map(|(class, count)| (class as u8, *count as f32)).collect());
    }
    sum
}

/// Leaves out keys that only one sighting supports.
pub fn prune(tables: &mut Tables) {
    tables.keys.retain(|_, counts| counts.iter().map(|(_, count)| f64::from(*count)).sum::<f64>() > KEY_COUNT_MIN);
    for counts in tables.keys.values_mut() {
        counts.iter_mut().for_each(|(_, count)| *count = (*count * 100.0).round() / 100.0);
    }
    for counts in tables.prior.values_mut() {
        counts.iter_mut().for_each(|count| *count = (*count * 100.0).round() / 100.0);
    }
}

/// Gradient steps; the loss has converged to the third digit by then.
const STEPS: usize = 250;
/// Ridge towards the start values, in rows.
const RIDGE: f64 = 3.0;

/// Weights to start from: believe the prior, a little of everything else.
fn start() -> Vec<f64> {
    let mut weights = vec![0.25; FEATURES];
    weights[0] = 1.0;
    weights[1 + TABLES + MEMORIES..].iter_mut().for_each(|weight| *weight = 0.0);
    weights
}

/// Fits the shared weights by Adam on the weighted log-likelihood.
pub fn fit(rows: &[(Features, usize, f64)]) -> Vec<f64> {
    let start = start();
    let mut weights = start.clone();
    let (mut first, mut second) = (vec![0.0; FEATURES], vec![0.0; FEATURES]);
    let total: f64 = rows.iter().map(|(_, _, weight)| weight).sum::<f64>().max(1.0);
    for step in 1..=STEPS {
        let mut gradient: Vec<f64> = weights.iter().zip(&start).map(|(weight, start)| RIDGE * (weight - start) / total).collect();
        for (features, class, weight) in rows {
            let probabilities = softmax(features, &weights);
            for (slot, row) in gradient.iter_mut().zip(features) {
                let expected: f64 = row.iter().zip(&probabilities).map(|(value, probability)| value * probability).sum();
                *slot += weight * (expected - row[*class]) / total;
            }
        }
        let rate = 0.05 / (1.0 + step as f64 / 100.0);
        for k in 0..FEATURES {
            first[k] = 0.9 * first[k] + 0.1 * gradient[k];
            second[k] = 0.99 * second[k] + 0.01 * gradient[k] * gradient[k];
            let unbiased = first[k] / (1.0 - 0.9f64.powi(step as i32));
            let scale = (second[k] / (1.0 - 0.99f64.powi(step as i32))).sqrt() + 1e-8;
            weights[k] -= rate * unbiased / scale;
        }
    }
    weights
}

/// Pairs every row with the memory of its project before its migration, in time order.
pub fn with_memory<'a, T>(rows: &[&'a Row], mut each: impl FnMut(&'a Row, &ProjectMemory) -> T) -> Vec<T> {
    let mut order: Vec<usize> = (0..rows.len()).collect();
    order.sort_by(|a, b| (&rows[*a].project, rows[*a].seq).cmp(&(&rows[*b].project, rows[*b].seq)));
    let mut result: Vec<Option<T>> = (0..rows.len()).map(|_| None).collect();
    let mut memory = ProjectMemory::default();
    let mut waiting: Vec<usize> = Vec::new();
    for at in order {
        if let Some(last) = waiting.last().map(|last| rows[*last]) {
            if last.project != rows[at].project {
                memory = ProjectMemory::default();
                waiting.clear();
            } else if last.seq != rows[at].seq {
                for done in waiting.drain(..) {
                    if let Some(class) = rows[done].class {
                        memory.learn(&rows[done].case, class, rows[done].weight);
                    }
                }
            }
        }
        result[at] = Some(each(rows[at], &memory));
        waiting.push(at);
    }
    result.into_iter().flatten().collect()
}

/// What the rules would answer: the baseline that the model must beat.
pub fn rule(case: &ColumnCase) -> usize {
    let class = |name: &str| class_of(name).unwrap_or(NULL);
    if !case.not_null {
        return NULL;
    }
    match type_class(&case.type_name) {
        "bool" => class("false"),
        "int" | "num" => class("zero"),
        "text" => class("empty_str"),
        "enum" => class("enum_label"),
        "ts" | "date" | "time" => class("now"),
        "json" => class("empty_obj"),
        "array" => class("empty_array"),
        _ => COMPUTED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn words() {
        for name in ["isActiveUser", "is_active_user", "IsActive__User"] {
            assert_eq!(tokens(name), ["is", "active", "user"]);
        }
        assert_eq!(tokens("URL2"), ["url2"]);
        assert!(tokens("__").is_empty());
    }

    #[test]
    fn types() {
        for (name, class) in [
            ("character varying(20)", "text"),
            ("timestamp without time zone", "ts"),
            ("timestamp(3)", "ts"),
            ("enum:mood", "enum"),
            ("domain:wt_name=text", "text"),
            ("integer[]", "array"),
            ("numeric(10,2)", "num"),
        ] {
            assert_eq!(type_class(name), class, "{name}");
        }
    }

    proptest! {
        #[test]
        fn probabilities_sum_to_one(table in ".{0,12}", column in ".{0,12}", type_name in "[a-z]{1,9}", not_null: bool) {
            let case = ColumnCase { table, column, type_name, not_null, ..ColumnCase::default() };
            let mut memory = ProjectMemory::default();
            memory.learn(&case, 3, 1.0);
            let features = features(&case, &Tables::default(), &memory, None);
            let sum: f64 = softmax(&features, &start()).iter().sum();
            prop_assert!((sum - 1.0).abs() < 1e-9);
        }
    }
}
