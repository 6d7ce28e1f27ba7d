//! Which tables and columns of two schemas are the same although their names differ: the model's opinion, for a person to write down.

use super::Rule;
use crate::schema::{
    catalog::{Catalog, Column, Table},
    model::{
        Model,
        matching::{Pair, Side, assign},
    },
};

fn side(table: &Table, column: &Column, at: usize) -> Side {
    let foreign = table.constraints.iter().find(|item| item.kind == "f" && item.columns == [column.num]);
    Side {
        name: column.name.clone(),
        type_name: if column.type_kind == "e" { format!("enum:{}", column.type_name) } else { column.type_name.clone() },
        not_null: column.not_null,
        default: column.default.clone().unwrap_or_default(),
        references: foreign.and_then(|item| item.references.clone()).unwrap_or_default(),
        ordinal: at as f64,
        width: table.columns.len() as f64,
        columns: Vec::new(),
    }
}

/// What the model holds for the same where names differ, with its confidence: tables first, then the columns of tables that belong together.
pub fn propose(source: &Catalog, shadow: &Catalog) -> Vec<(Rule, f64)> {
    let model = Model::shipped();
    let rows =
        |catalog: &Catalog| catalog.tables.values().filter(|table| table.holds_rows() && !table.is_partition).cloned().collect::<Vec<_>>();
    let (ours, theirs) = (rows(source), rows(shadow));
    let lonely = |tables: &[Table], other: &Catalog| {
        tables.iter().filter(|table| other.table(&table.schema, &table.name).is_none()).cloned().collect::<Vec<_>>()
    };
    let (removed, added) = (lonely(&ours, shadow), lonely(&theirs, source));
    let as_side = |table: &Table| Side {
        name: table.name.clone(),
        columns: table.columns.iter().map(|column| (column.name.clone(), column.type_name.clone())).collect(),
        ..Side::default()
    };
    let counts = (removed.len() as f64, added.len() as f64);
    let candidates: Vec<(&Table, &Table)> = removed.iter().flat_map(|old| added.iter().map(move |new| (old, new))).collect();
    let pairs: Vec<Pair> =
        candidates.iter().map(|(old, new)| Pair { old: as_side(old), new: as_side(new), counts, ..Pair::default() }).collect();
    let scores = model.same_tables(&pairs);
    let names: Vec<(String, String)> = candidates.iter().map(|(old, new)| (old.plain(), new.plain())).collect();
    let rated: Vec<(&str, &str, f64)> = names.iter().zip(&scores).map(|((old, new), p)| (old.as_str(), new.as_str(), *p)).collect();
    let mut twins: Vec<(&Table, &Table, f64)> =
        assign(&rated, model.t2_tables.threshold).into_iter().map(|at| (candidates[at].0, candidates[at].1, scores[at])).collect();
    twins.extend(ours.iter().filter_map(|table| Some((table, theirs.iter().find(|twin| twin.plain() == table.plain())?, 1.0))));
    let mut rules: Vec<(Rule, f64)> = twins.into_iter().filter_map(|(old, new, p)| columns_of(model, old, new, p)).collect();
    rules.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.source.cmp(&b.0.source)));
    rules
}

/// The rule for two tables that belong together; `None`: nothing differs in name.
fn columns_of(model: &Model, old: &Table, new: &Table, confidence: f64) -> Option<(Rule, f64)> {
    let lonely = |one: &Table, other: &Table| -> Vec<Side> {
        let columns = one.columns.iter().enumerate().filter(|(_, column)| other.column(&column.name).is_none());
        columns.map(|(at, column)| side(one, column, at)).collect()
    };
    let (removed, added) = (lonely(old, new), lonely(new, old));
    let kept: Vec<String> =
        old.columns.iter().filter(|column| new.column(&column.name).is_some()).map(|column| column.name.clone()).collect();
    let pair = |old: &Side, new: &Side| Pair {
        old: old.clone(),
        new: new.clone(),
        counts: (removed.len() as f64, added.len() as f64),
        kept: kept.clone(),
        ..Pair::default()
    };
    let pairs: Vec<Pair> = removed.iter().flat_map(|old| added.iter().map(|new| pair(old, new)).collect::<Vec<_>>()).collect();
    let scores = model.same_columns(&pairs, false);
    let rated: Vec<(&str, &str, f64)> =
        pairs.iter().zip(&scores).map(|(pair, p)| (pair.old.name.as_str(), pair.new.name.as_str(), *p)).collect();
    let chosen = assign(&rated, model.t2_columns.threshold);
    let renamed = (old.schema.as_str(), old.name.as_str()) != (new.schema.as_str(), new.name.as_str());
    if chosen.is_empty() && !renamed {
        return None;
    }
    let rule = Rule {
        source: old.plain(),
        shadow: if renamed { new.plain() } else { String::new() },
        columns: chosen.iter().map(|at| (rated[*at].0.to_owned(), rated[*at].1.to_owned())).collect(),
        ..Rule::default()
    };
    Some((rule, chosen.iter().map(|at| scores[*at]).fold(confidence, f64::min)))
}
