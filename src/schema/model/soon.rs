//! T4: which tables will change soon, within about 20 migrations. Weak but calibrated: it orders warnings and decides nothing.
//!
//! Two regressions: on what a catalog shows, and with what was seen of each table's history. A table that is wide and referred to changes
//! most; trees, names and neighbours that changed lately added nothing out of project.

use super::{data, learn};
use crate::{
    metadata::Proposal,
    schema::{
        SchemaError,
        catalog::{Catalog, Table},
        quote,
    },
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

/// What a catalog shows of a table, and then its history.
pub const FEATURES: usize = 17;
/// The first of them: without history.
pub const STRUCTURE: usize = 11;

/// Changes seen in as many migrations tell more than the catalog alone.
const HISTORY_MIN: usize = 20;
/// Changes that are no further apart are one migration.
const MIGRATION_MS: i64 = 60_000;

/// What was learnt.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct Soon {
    /// From the catalog alone.
    pub structure: learn::Logistic,
    /// With the history.
    pub history: learn::Logistic,
}

/// Counts of one table, as in the training data.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Counts {
    /// Columns, indexes, columns that may be NULL, foreign keys out and in.
    pub structure: [f64; 5],
    /// Columns that are JSON, enums, text, boolean.
    pub types: [f64; 4],
    /// Tables in the schema.
    pub tables: f64,
    /// Changes ever, in the last 5 and 20 migrations, migrations since the last one, migrations seen of the table.
    pub history: [f64; 5],
}

impl Counts {
    /// As the regressions see them.
    pub fn features(&self) -> [f64; FEATURES] {
        let log = |value: f64| (1.0 + value.max(0.0)).ln();
        let [columns, indexes, nullable, out, into] = self.structure;
        let [json, enums, text, flags] = self.types;
        let [all, five, twenty, since, age] = self.history;
        [
            log(columns),
            log(indexes),
            nullable / columns.max(1.0),
            log(out),
            log(into),
            log(json),
            log(enums),
            log(text),
            log(flags),
            log(self.tables),
            log(columns) * log(into),
            log(all),
            log(five),
            log(twenty),
            log(since),
            log(age),
            all / age.max(1.0),
        ]
    }
}

/// A row of the training data.
pub(super) struct Row {
    pub(super) project: String,
    /// One look at one project's tables.
    pub(super) look: String,
    pub(super) counts: Counts,
    pub(super) changed: bool,
}

/// T4 rows of a file, in file order.
///
/// # Errors
/// [`SchemaError::Model`]
pub(super) fn rows(path: &Path) -> Result<Vec<Row>, SchemaError> {
    let table = data::Table::read(path)?;
    table.require(path, &["row_id", "project", "t", "ncols", "n_changes", "y_changed"])?;
    let row = |row: data::Record<'_>| {
        let number = |name: &str| row.number(name);
        let nullable = number("share_nullable") * number("ncols");
        Row {
            project: row.get("project").to_owned(),
            look: row.get("t").to_owned(),
            counts: Counts {
                structure: [number("ncols"), number("n_index"), nullable, number("fk_out"), number("fk_in")],
                types: ["n_json", "n_enum", "n_text", "n_bool"].map(number),
                tables: number("n_tables"),
                history: ["n_changes", "chg5", "chg20", "since_last", "age"].map(number),
            },
            changed: row.flag("y_changed"),
        }
    };
    Ok(table.rows().map(row).collect())
}

impl Soon {
    /// Fits both regressions.
    pub(super) fn fit(rows: &[&Row]) -> Self {
        let mut sizes: BTreeMap<&str, f64> = BTreeMap::new();
        rows.iter().for_each(|row| *sizes.entry(&row.project).or_default() += 1.0);
        // a project with a hundred times the tables counts ten times as much
        let weight = |row: &Row| 10.0 / sizes.get(row.project.as_str()).copied().unwrap_or(1.0).sqrt();
        let examples = |width: usize| -> Vec<(Vec<f64>, bool, f64)> {
            rows.iter().map(|row| (row.counts.features().into_iter().take(width).collect(), row.changed, weight(row))).collect()
        };
        Soon { structure: learn::Logistic::fit(&examples(STRUCTURE)), history: learn::Logistic::fit(&examples(FEATURES)) }
    }

    /// Probability that the table changes within about 20 migrations.
    pub fn predict(&self, counts: &Counts, with_history: bool) -> f64 {
        let features = counts.features();
        learn::probability(if with_history {
            self.history.score(&features)
        } else {
            self.structure.score(features.get(..STRUCTURE).unwrap_or(&[]))
        })
    }

    /// All tables of a catalog by `schema.table`, with what was seen of their history in proposals.
    pub fn tables(&self, catalog: &Catalog, seen: &[Proposal]) -> BTreeMap<String, f64> {
        let migrations = migrations(seen);
        let known = migrations.len() >= HISTORY_MIN;
        let mut referred: BTreeMap<&str, f64> = BTreeMap::new();
        for constraint in catalog.tables.values().flat_map(|table| &table.constraints) {
            if let Some(target) = &constraint.references {
                *referred.entry(target).or_default() += 1.0;
            }
        }
        let tables: Vec<&Table> = catalog.tables.values().filter(|table| table.holds_rows() && !table.is_partition).collect();
        let one = |table: &&Table| {
            let count = |wanted: &dyn Fn(&str, &str) -> bool| {
                table.columns.iter().filter(|column| wanted(&column.type_name, &column.type_kind)).count() as f64
            };
            let into = [table.qualified(), quote_when_needed(table)].iter().filter_map(|name| referred.get(name.as_str())).sum();
            let changes: Vec<usize> =
                migrations.iter().enumerate().filter(|(_, names)| names.contains(&table.plain())).map(|(at, _)| at).collect();
            let last = |many: usize| changes.iter().filter(|at| **at + many >= migrations.len()).count() as f64;
            let since = changes.last().map_or(migrations.len(), |at| migrations.len() - at);
            let counts = Counts {
                structure: [
                    table.columns.len() as f64,
                    table.indexes.len() as f64,
                    table.columns.iter().filter(|column| !column.not_null).count() as f64,
                    table.constraints.iter().filter(|constraint| constraint.kind == "f").count() as f64,
                    into,
                ],
                types: [
                    count(&|name, _| name.starts_with("json")),
                    count(&|_, kind| kind == "e"),
                    count(&|name, _| name == "text" || name.starts_with("character")),
                    count(&|name, _| name == "boolean"),
                ],
                tables: tables.len() as f64,
                history: [changes.len() as f64, last(5), last(20), since as f64, migrations.len() as f64],
            };
            (table.plain(), self.predict(&counts, known))
        };
        tables.iter().map(one).collect()
    }
}

/// `format('%I.%I')` quotes only where it must.
fn quote_when_needed(table: &Table) -> String {
    let plain = |name: &str| {
        let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        let bare = name.chars().all(fits) && !name.starts_with(|c: char| c.is_ascii_digit());
        if bare { name.to_owned() } else { quote::ident(name) }
    };
    format!("{}.{}", plain(&table.schema), plain(&table.name))
}

/// The tables that each migration named, oldest first.
fn migrations(seen: &[Proposal]) -> Vec<BTreeSet<String>> {
    let mut order: Vec<(i64, &str)> = seen.iter().map(|one| (one.at_ms, one.draft.object.as_str())).collect();
    order.sort_unstable();
    let (mut migrations, mut last): (Vec<BTreeSet<String>>, i64) = (Vec::new(), i64::MIN);
    for (at, object) in order {
        if migrations.is_empty() || at.saturating_sub(last) > MIGRATION_MS {
            migrations.push(BTreeSet::new());
        }
        last = at;
        if let Some(names) = migrations.last_mut() {
            names.insert(object.to_owned());
        }
    }
    migrations
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::catalog::{Column, Constraint};

    #[test]
    fn a_wide_table_that_others_refer_to_comes_first() {
        let table = |oid: i64, name: &str, width: i16, target: Option<&str>| Table {
            oid,
            schema: "public".into(),
            name: name.into(),
            kind: "r".into(),
            columns: (1..=width)
                .map(|num| Column { num, name: format!("c{num}"), type_name: "text".into(), ..Column::default() })
                .collect(),
            constraints: target
                .map(|target| Constraint { kind: "f".into(), references: Some(target.into()), ..Constraint::default() })
                .into_iter()
                .collect(),
            ..Table::default()
        };
        let tables = [table(1, "orders", 30, None), table(2, "tags", 2, Some("public.orders")), table(3, "log", 3, Some("public.orders"))];
        let catalog = Catalog { tables: tables.into_iter().map(|table| (table.oid, table)).collect(), ..Catalog::default() };
        let soon = super::super::Model::shipped().soon.tables(&catalog, &[]);
        assert!(soon["public.orders"] > soon["public.log"] && soon["public.log"] >= soon["public.tags"], "{soon:?}");
        assert!(soon.values().all(|p| (0.0..=1.0).contains(p)));
    }
}
