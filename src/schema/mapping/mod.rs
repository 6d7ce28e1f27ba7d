//! A shadow whose schema differs on purpose: which of its tables and columns are which of the source's. Pure: written down in proxy.toml, checked whole
//! against both catalogs ([`Mapping`]), then applied by name to relations as the stream names them ([`Rules`]); and its inverse, with a statement per
//! column whether the way there and back loses anything. What only changed its name can be proposed ([`propose`]).
//!
//! Deliberately absent: one table split over two, or two joined into one. A row of the stream would become two rows with keys of their own, whose
//! halves a reverse feed could not put together again without knowing which half of which row has arrived; views on the shadow give the same shape
//! without that. Values travel as text and are read by the shadow's type (or computed by the expression that is written down), so a mapping names
//! columns and never values.
//!
//! Invariants: a mapping that passes [`Mapping::new`] sends every source column to one column or says that it is left out; no two meet in one; the key of
//! a row is never left out; its inverse maps back exactly what it kept.

mod change;
mod propose;
mod rules;

pub use crate::config::MapRule as Rule;
pub(super) use change::questions;
pub use propose::propose;
pub use rules::{Place, Rules, SharedRules, Target};

use super::{
    catalog::{Catalog, Column, Table},
    rules::types::{TypeName, Verdict, verdict},
};
use std::collections::{BTreeMap, BTreeSet};

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
    /// Expressions that were written down for the way there and the way back: whoever wrote both says that they undo each other.
    pub written: (bool, bool),
}

impl MappedColumn {
    /// Every value comes back as it was, or is refused aloud.
    pub fn lossless(&self) -> bool {
        if self.written.0 {
            return self.written.1;
        }
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

/// Where a rule stands.
fn line(rule: &Rule) -> String {
    if rule.line == 0 { String::new() } else { format!("proxy.toml line {}: ", rule.line) }
}

/// Names listed in a message before the rest is only counted.
const NAMED_MAX: usize = 20;

fn listed(what: &str, names: &[String]) -> String {
    let more = names.len().saturating_sub(NAMED_MAX);
    let shown = names.get(..NAMED_MAX).unwrap_or(names).join(", ");
    if more == 0 { format!("{what}: {shown}") } else { format!("{what}: {shown} and {more} more") }
}

fn tables_of(catalog: &Catalog) -> String {
    let mut names: Vec<String> =
        catalog.tables.values().filter(|table| table.holds_rows() && !table.is_partition).map(Table::plain).collect();
    names.sort();
    listed("there are", &names)
}

fn columns_of(table: &Table) -> String {
    listed("it has", &table.columns.iter().map(|column| column.name.clone()).collect::<Vec<_>>())
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
                wrong.push(format!(
                    "{}the mapping names table {}, which the source does not have: correct its name ({})",
                    line(rule),
                    rule.source,
                    tables_of(source)
                ));
            } else if named.insert(key, rule).is_some() {
                wrong.push(format!("{}the mapping names table {} twice: keep one", line(rule), rule.source));
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
                None if rule.source.is_empty() => wrong.push(format!(
                    "table {} of the source is not on the shadow ({}): create it there, or write [[database.shadow.map]] with source = \"{}\" and \
                     shadow = its name there or left_out = true",
                    table.plain(),
                    tables_of(shadow),
                    table.plain()
                )),
                None => wrong.push(format!(
                    "{}the mapping sends {} to {}, which the shadow does not have ({}): create it there, or say left_out = true",
                    line(rule),
                    table.plain(),
                    if rule.shadow.is_empty() { &rule.source } else { &rule.shadow },
                    tables_of(shadow)
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

    /// All tables, by their name on the source.
    pub fn tables(&self) -> impl Iterator<Item = &MappedTable> {
        self.tables.values()
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
                    written: (column.written.1, column.written.0),
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
            losses.extend(lossy.map(|column| match column.written {
                (true, _) => format!("{name}.{}: there by an expression, and no expression leads back: write one in `back`", column.source),
                _ => format!("{name}.{}: there: {}; back: {}", column.source, column.there.explain(), column.back.explain()),
            }));
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
        let there = columns_of(table);
        wrong.push(format!(
            "{}the mapping names column {name}.{unknown}, which the source does not have: correct its name ({there})",
            line(rule)
        ));
    }
    for unknown in rule.using.keys().filter(|column| table.column(column).is_none()) {
        wrong.push(format!("{}`using` names column {name}.{unknown}, which the source does not have: correct its name", line(rule)));
    }
    let key: BTreeSet<&str> = table.primary_key().into_iter().collect();
    for column in &table.columns {
        let written = rule.columns.get(&column.name);
        let place = written.map_or(column.name.as_str(), String::as_str);
        let Some(found) = twin.column(place).filter(|_| !place.is_empty()) else {
            if key.contains(column.name.as_str()) {
                wrong.push(format!(
                    "{}{name}.{} is part of the primary key and has no place on the shadow: rows could not be found again ({})",
                    line(rule),
                    column.name,
                    columns_of(twin)
                ));
            } else if written.is_some() && !place.is_empty() {
                wrong.push(format!(
                    "{}the mapping sends {name}.{} to {place}, which {} does not have: correct its name, or leave it out with \"\" ({})",
                    line(rule),
                    column.name,
                    twin.plain(),
                    columns_of(twin)
                ));
            } else if written.is_none() {
                wrong.push(format!(
                    "{}column {name}.{} has no place on the shadow: write its name there into `columns`, or \"\" to leave it out ({})",
                    line(rule),
                    column.name,
                    columns_of(twin)
                ));
            }
            mapped.left_out.push(column.name.clone());
            continue;
        };
        let (there, back) = (retyped(column, found), retyped(found, column));
        let written = (rule.using.contains_key(&column.name), rule.back.contains_key(&column.name));
        if there == Verdict::NoCast && !written.0 {
            wrong.push(format!(
                "{}{name}.{} ({}) cannot become {} ({}): {}; write an expression in `using`",
                line(rule),
                column.name,
                column.type_name,
                found.name,
                found.type_name,
                there.explain()
            ));
        }
        if mapped.columns.iter().any(|other| other.shadow == found.name) {
            wrong.push(format!("{}two columns of {name} go to {}: leave one of them out", line(rule), found.name));
        }
        mapped.columns.push(MappedColumn { source: column.name.clone(), shadow: found.name.clone(), there, back, written });
    }
    for column in twin.columns.iter().filter(|column| !mapped.columns.iter().any(|other| other.shadow == column.name)) {
        if column.not_null && column.default.is_none() && column.identity.is_empty() && column.generated.is_empty() {
            wrong.push(format!(
                "{}{}.{} is NOT NULL without a default, and no column of {name} fills it: give it a default on the shadow",
                line(rule),
                twin.plain(),
                column.name
            ));
        }
        mapped.added.push(column.name.clone());
    }
    mapped
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
            (vec![Rule { shadow: "crm.nobody".into(), ..rule(&[]) }], &shadow, "does not have (there are: crm.person): create it"),
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
