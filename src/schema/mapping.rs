//! A shadow whose schema differs on purpose: which of its tables and columns are which of the source's. Pure: written down (or proposed by the model and
//! approved), checked whole against both catalogs, then applied to relations as the stream names them; and its inverse, with a statement per column
//! whether the way there and back loses anything.
//!
//! Deliberately absent: where it is written, and the applier's use of it. Values travel as text and are cast to the shadow's type, as the feed does it,
//! so a mapping names columns and never values.
//!
//! Invariants: a mapping that passes [`Mapping::new`] sends every source column to one column or says that it is left out; no two meet in one; the key of
//! a row is never left out; its inverse maps back exactly what it kept.

use super::{
    catalog::{Catalog, Column, Table},
    model::{
        Model,
        matching::{Pair, Side, assign},
    },
    rules::types::{TypeName, Verdict, verdict},
};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// What is written down for one table of the source.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// `schema.table` on the source.
    pub source: String,
    /// `schema.table` on the shadow; empty: the same name.
    #[serde(default)]
    pub shadow: String,
    /// The shadow does not have it.
    #[serde(default)]
    pub left_out: bool,
    /// Source column → shadow column; an empty name: left out. What is not named keeps its name.
    #[serde(default)]
    pub columns: BTreeMap<String, String>,
}

/// A column that both sides have.
#[derive(Clone, Debug, PartialEq)]
pub struct MappedColumn {
    /// Name on the source.
    pub source: String,
    /// Name on the shadow.
    pub shadow: String,
    /// The way there.
    pub there: Verdict,
    /// The way back.
    pub back: Verdict,
}

impl MappedColumn {
    /// Every value comes back as it was.
    pub fn lossless(&self) -> bool {
        !self.there.loses_data()
            && matches!(self.back, Verdict::Free | Verdict::Rewrite | Verdict::DataDependent | Verdict::Parse | Verdict::UsingSafe)
    }
}

/// A table that both sides have.
#[derive(Clone, Debug, PartialEq)]
pub struct MappedTable {
    /// Schema and name on the source.
    pub source: (String, String),
    /// Schema and name on the shadow.
    pub shadow: (String, String),
    /// In the source's order.
    pub columns: Vec<MappedColumn>,
    /// Columns of the source that the shadow lacks.
    pub left_out: Vec<String>,
    /// Columns of the shadow that the source lacks: they get their default, or synthetic values.
    pub added: Vec<String>,
}

/// All tables of the source that have a place on the shadow.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Mapping {
    tables: BTreeMap<(String, String), MappedTable>,
}

/// `schema.table`, or a table of `public`.
fn parts(name: &str) -> (String, String) {
    let (schema, table) = name.split_once('.').unwrap_or(("public", name));
    (schema.to_owned(), table.to_owned())
}

fn type_of(column: &Column) -> TypeName {
    TypeName::parse(&column.type_name, &column.type_kind)
}

fn retyped(from: &Column, to: &Column) -> Verdict {
    if from.type_name == to.type_name { Verdict::Free } else { verdict(&type_of(from), &type_of(to)) }
}

impl Mapping {
    /// Checks the rules whole. Tables without a rule keep their names, as far as the shadow has them.
    ///
    /// # Errors
    /// Every reason, each with what to do.
    pub fn new(rules: &[Rule], source: &Catalog, shadow: &Catalog) -> Result<Self, Vec<String>> {
        let mut wrong = Vec::new();
        let mut mapping = Mapping::default();
        let mut named: BTreeMap<(String, String), &Rule> = BTreeMap::new();
        for rule in rules {
            let key = parts(&rule.source);
            if source.table(&key.0, &key.1).is_none_or(|table| !table.holds_rows()) {
                wrong.push(format!("the mapping names table {}, which the source does not have: correct its name", rule.source));
            } else if named.insert(key, rule).is_some() {
                wrong.push(format!("the mapping names table {} twice: keep one", rule.source));
            }
        }
        let nothing = Rule::default();
        for table in source.tables.values().filter(|table| table.holds_rows() && !table.is_partition) {
            let key = (table.schema.clone(), table.name.clone());
            let rule = named.get(&key).copied().unwrap_or(&nothing);
            if rule.left_out {
                continue;
            }
            let place = if rule.shadow.is_empty() { key.clone() } else { parts(&rule.shadow) };
            match shadow.table(&place.0, &place.1).filter(|twin| twin.holds_rows()) {
                Some(twin) => drop(mapping.tables.insert(key, map_table(table, twin, rule, &mut wrong))),
                // without a rule it is drift, which has its own proposals
                None if rule.source.is_empty() => {}
                None => wrong.push(format!(
                    "the mapping sends {} to {}, which the shadow does not have: create it there, or say left_out = true",
                    table.plain(),
                    if rule.shadow.is_empty() { &rule.source } else { &rule.shadow }
                )),
            }
        }
        let mut taken: BTreeMap<&(String, String), &(String, String)> = BTreeMap::new();
        for table in mapping.tables.values() {
            if let Some(other) = taken.insert(&table.shadow, &table.source) {
                wrong.push(format!(
                    "the mapping sends {}.{} and {}.{} to one table {}.{}: choose one",
                    other.0, other.1, table.source.0, table.source.1, table.shadow.0, table.shadow.1
                ));
            }
        }
        if wrong.is_empty() { Ok(mapping) } else { Err(wrong) }
    }

    /// A table of the source.
    pub fn table(&self, schema: &str, name: &str) -> Option<&MappedTable> {
        self.tables.get(&(schema.to_owned(), name.to_owned()))
    }

    /// The way back, for the reverse feed.
    #[must_use]
    pub fn inverse(&self) -> Mapping {
        let turned = |table: &MappedTable| MappedTable {
            source: table.shadow.clone(),
            shadow: table.source.clone(),
            columns: table
                .columns
                .iter()
                .map(|column| MappedColumn {
                    source: column.shadow.clone(),
                    shadow: column.source.clone(),
                    there: column.back,
                    back: column.there,
                })
                .collect(),
            left_out: table.added.clone(),
            added: table.left_out.clone(),
        };
        Mapping { tables: self.tables.values().map(|table| (table.shadow.clone(), turned(table))).collect() }
    }

    /// Why a rollback through the reverse feed would not give back every value; empty: it would.
    pub fn losses(&self) -> Vec<String> {
        let mut losses = Vec::new();
        for table in self.tables.values() {
            let name = format!("{}.{}", table.source.0, table.source.1);
            losses.extend(
                table
                    .left_out
                    .iter()
                    .map(|column| format!("{name}.{column} is left out on the shadow: rows written there have no value for it")),
            );
            let lossy = table.columns.iter().filter(|column| !column.lossless());
            losses.extend(
                lossy.map(|column| format!("{name}.{}: there: {}; back: {}", column.source, column.there.explain(), column.back.explain())),
            );
        }
        losses
    }
}

impl MappedTable {
    /// For each column as the stream names them: its name on the shadow, or `None` where it is left out. A column that the mapping does not know came
    /// later and keeps its name.
    pub fn names<'a>(&'a self, columns: &[&'a str]) -> Vec<Option<&'a str>> {
        let place = |name: &'a str| match self.columns.iter().find(|column| column.source == name) {
            Some(column) => Some(column.shadow.as_str()),
            None if self.left_out.iter().any(|left_out| left_out == name) => None,
            None => Some(name),
        };
        columns.iter().map(|name| place(name)).collect()
    }
}

fn map_table(table: &Table, twin: &Table, rule: &Rule, wrong: &mut Vec<String>) -> MappedTable {
    let name = table.plain();
    let mut mapped = MappedTable {
        source: (table.schema.clone(), table.name.clone()),
        shadow: (twin.schema.clone(), twin.name.clone()),
        columns: Vec::new(),
        left_out: Vec::new(),
        added: Vec::new(),
    };
    for unknown in rule.columns.keys().filter(|column| table.column(column).is_none()) {
        wrong.push(format!("the mapping names column {name}.{unknown}, which the source does not have: correct its name"));
    }
    let key: BTreeSet<&str> = table.primary_key().into_iter().collect();
    for column in &table.columns {
        let written = rule.columns.get(&column.name);
        let place = written.map_or(column.name.as_str(), String::as_str);
        let Some(found) = twin.column(place).filter(|_| !place.is_empty()) else {
            if key.contains(column.name.as_str()) {
                wrong.push(format!(
                    "{name}.{} is part of the primary key and has no place on the shadow: rows could not be found again",
                    column.name
                ));
            } else if written.is_some() && !place.is_empty() {
                wrong.push(format!(
                    "the mapping sends {name}.{} to {place}, which {} does not have: correct its name, or leave it out with \"\"",
                    column.name,
                    twin.plain()
                ));
            }
            mapped.left_out.push(column.name.clone());
            continue;
        };
        let (there, back) = (retyped(column, found), retyped(found, column));
        if there == Verdict::NoCast {
            wrong.push(format!(
                "{name}.{} ({}) cannot become {} ({}): {}",
                column.name,
                column.type_name,
                found.name,
                found.type_name,
                there.explain()
            ));
        }
        if mapped.columns.iter().any(|other| other.shadow == found.name) {
            wrong.push(format!("two columns of {name} go to {}: leave one of them out", found.name));
        }
        mapped.columns.push(MappedColumn { source: column.name.clone(), shadow: found.name.clone(), there, back });
    }
    for column in twin.columns.iter().filter(|column| !mapped.columns.iter().any(|other| other.shadow == column.name)) {
        if column.not_null && column.default.is_none() && column.identity.is_empty() && column.generated.is_empty() {
            wrong.push(format!(
                "{}.{} is NOT NULL without a default, and no column of {name} fills it: give it a default on the shadow",
                twin.plain(),
                column.name
            ));
        }
        mapped.added.push(column.name.clone());
    }
    mapped
}

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
        left_out: false,
        columns: chosen.iter().map(|at| (rated[*at].0.to_owned(), rated[*at].1.to_owned())).collect(),
    };
    Some((rule, chosen.iter().map(|at| scores[*at]).fold(confidence, f64::min)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::catalog::Constraint;

    fn table(oid: i64, schema: &str, name: &str, columns: &[(&str, &str)]) -> Table {
        let column = |(at, (name, type_name)): (usize, &(&str, &str))| Column {
            num: at as i16 + 1,
            name: (*name).into(),
            type_name: type_name.trim_end_matches('!').into(),
            type_kind: "b".into(),
            not_null: type_name.ends_with('!'),
            ..Column::default()
        };
        let key = Constraint { kind: "p".into(), columns: vec![1], ..Constraint::default() };
        Table {
            oid,
            schema: schema.into(),
            name: name.into(),
            kind: "r".into(),
            columns: columns.iter().enumerate().map(column).collect(),
            constraints: vec![key],
            ..Table::default()
        }
    }

    fn catalog(tables: Vec<Table>) -> Catalog {
        Catalog { tables: tables.into_iter().map(|table| (table.oid, table)).collect(), ..Catalog::default() }
    }

    const OLD: [(&str, &str); 6] = [
        ("id", "integer!"),
        ("full_name", "text"),
        ("email_address", "text"),
        ("joined", "timestamp with time zone"),
        ("legacy", "text"),
        ("amount", "numeric(10,2)"),
    ];
    const NEW: [(&str, &str); 6] = [
        ("id", "bigint!"),
        ("name", "text"),
        ("email_address", "character varying(200)"),
        ("joined", "date"),
        ("tier", "text"),
        ("amount", "numeric(10,2)"),
    ];

    fn sides() -> (Catalog, Catalog) {
        (catalog(vec![table(1, "public", "users", &OLD)]), catalog(vec![table(9, "crm", "person", &NEW)]))
    }

    fn rule(columns: &[(&str, &str)]) -> Rule {
        Rule {
            source: "users".into(),
            shadow: "crm.person".into(),
            columns: columns.iter().map(|(from, to)| ((*from).into(), (*to).into())).collect(),
            ..Rule::default()
        }
    }

    #[test]
    fn a_mapping_there_and_back() {
        let (source, shadow) = sides();
        let mapping = Mapping::new(&[rule(&[("full_name", "name"), ("legacy", "")])], &source, &shadow).unwrap();
        let users = mapping.table("public", "users").unwrap();
        assert_eq!(users.names(&["id", "legacy", "full_name", "later"]), [Some("id"), None, Some("name"), Some("later")]);
        assert_eq!((users.left_out.as_slice(), users.added.as_slice()), (&["legacy".to_owned()][..], &["tier".to_owned()][..]));
        let losses = mapping.losses();
        assert!(losses.len() == 2 && losses[0].contains("legacy") && losses[1].contains("joined"), "{losses:?}");
        let back = mapping.inverse();
        assert_eq!(back.table("crm", "person").unwrap().names(&["name", "tier"]), [Some("full_name"), None]);
        assert_eq!(back.inverse(), mapping);
    }

    #[test]
    fn a_wrong_mapping_is_refused_whole_with_reasons() {
        let (source, shadow) = sides();
        let strict = catalog(vec![table(9, "crm", "person", &[("id", "bigint!"), ("must", "text!"), ("joined", "boolean")])]);
        for (rules, shadow, reason) in [
            (vec![Rule { source: "nowhere".into(), ..Rule::default() }], &shadow, "nowhere"),
            (vec![rule(&[]), rule(&[])], &shadow, "twice"),
            (vec![Rule { shadow: "crm.nobody".into(), ..rule(&[]) }], &shadow, "does not have: create it"),
            (vec![rule(&[("nothing", "name")])], &shadow, "public.users.nothing"),
            (vec![rule(&[("full_name", "nothing")])], &shadow, "to nothing"),
            (vec![rule(&[("id", "")])], &shadow, "primary key"),
            (vec![rule(&[("full_name", "email_address")])], &shadow, "two columns"),
            (vec![rule(&[])], &strict, "NOT NULL without a default"),
            (vec![rule(&[])], &strict, "cannot become"),
        ] {
            let wrong = Mapping::new(&rules, &source, shadow).unwrap_err();
            assert!(wrong.iter().any(|line| line.contains(reason)), "{reason}: {wrong:?}");
        }
    }

    #[test]
    fn what_only_changed_its_name_is_proposed() {
        let (source, shadow) = (
            catalog(vec![table(1, "public", "orders", &OLD)]),
            catalog(vec![table(9, "public", "orders", &[OLD[0], OLD[1], ("email_adress", "text"), OLD[3], OLD[4], OLD[5]])]),
        );
        let proposed = propose(&source, &shadow);
        assert_eq!(proposed.len(), 1, "{proposed:?}");
        assert_eq!(proposed[0].0.columns, BTreeMap::from([("email_address".to_owned(), "email_adress".to_owned())]));
        assert!((0.4..=1.0).contains(&proposed[0].1));
        assert!(propose(&source, &source).is_empty());
    }
}
