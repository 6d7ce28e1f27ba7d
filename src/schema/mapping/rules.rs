//! A mapping by name, as the feed, the copy, verification and the statements' translation need it: no catalog, both directions.

use super::{Rule, parts};
use crate::{
    config::FillRule,
    schema::catalog::{Catalog, Column, Table},
    sql::{Names, TableNames, Theirs},
};
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

/// What everybody who needs the rules shares; an edit of proxy.toml replaces them whole.
pub type SharedRules = Arc<arc_swap::ArcSwap<Rules>>;

/// Where a column of one side goes on the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target<'a> {
    /// Its name there; `None`: it is left out.
    pub name: Option<&'a str>,
    /// Its value there as an expression over the column's own name; `None`: the value as it is.
    pub using: Option<&'a str>,
}

/// Where a table of one side goes on the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Schema there.
    pub schema: String,
    /// Name there.
    pub table: String,
    /// It is not there: its rows are passed over.
    pub left_out: bool,
    columns: BTreeMap<String, String>,
    using: BTreeMap<String, String>,
}

impl Place {
    /// Where a column goes.
    pub fn column<'a>(&'a self, name: &'a str) -> Target<'a> {
        let place = self.columns.get(name).map_or(name, String::as_str);
        Target { name: (!place.is_empty()).then_some(place), using: self.using.get(name).map(String::as_str) }
    }
}

/// All rules of a shadow.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rules {
    /// The shadow has a schema of its own: nothing is created there, and every difference must be in the rules.
    pub existing: bool,
    /// Values that the operator wrote down for columns that only the shadow has.
    pub fills: Vec<FillRule>,
    rules: Vec<Rule>,
    there: HashMap<(String, String), Place>,
    back: HashMap<(String, String), Place>,
}

impl Rules {
    /// From what was written down; whether it fits is [`super::Mapping::new`]'s to say.
    pub fn new(existing: bool, rules: &[Rule]) -> Self {
        let mut all = Rules { existing, rules: rules.to_vec(), ..Rules::default() };
        for rule in rules {
            let from = parts(&rule.source);
            let to = if rule.shadow.is_empty() { from.clone() } else { parts(&rule.shadow) };
            let mut place = Place { schema: to.0.clone(), table: to.1.clone(), left_out: rule.left_out, ..Place::default() };
            let mut back = Place { schema: from.0.clone(), table: from.1.clone(), ..Place::default() };
            for (ours, theirs) in &rule.columns {
                place.columns.insert(ours.clone(), theirs.clone());
                if !theirs.is_empty() {
                    back.columns.insert(theirs.clone(), ours.clone());
                }
            }
            place.using.clone_from(&rule.using);
            for (ours, expression) in &rule.back {
                let theirs = rule.columns.get(ours).unwrap_or(ours);
                back.using.insert(theirs.clone(), expression.clone());
            }
            if !rule.left_out {
                all.back.insert(to, back);
            }
            all.there.insert(from, place);
        }
        all
    }

    /// For those who hand it around.
    pub fn shared(self) -> SharedRules {
        Arc::new(arc_swap::ArcSwap::from_pointee(self))
    }

    /// With values for columns that only the shadow has.
    #[must_use]
    pub fn filling(self, fills: &[FillRule]) -> Self {
        Rules { fills: fills.to_vec(), ..self }
    }

    /// What is written down for a column of the shadow.
    pub fn fill(&self, schema: &str, table: &str, column: &str) -> Option<&FillRule> {
        let whole = format!("{schema}.{table}.{column}");
        self.fills.iter().find(|rule| rule.column == whole || (schema == "public" && whole.strip_prefix("public.") == Some(&rule.column)))
    }

    /// As written.
    pub fn written(&self) -> &[Rule] {
        &self.rules
    }

    /// Where a table goes; `None`: nothing is written about it, it keeps its names. `back`: from the shadow to the source.
    pub fn place(&self, back: bool, schema: &str, table: &str) -> Option<&Place> {
        let places = if back { &self.back } else { &self.there };
        if places.is_empty() {
            return None;
        }
        places.get(&(schema.to_owned(), table.to_owned()))
    }

    /// The source's catalog under the shadow's names, without what is left out there: for comparing by name.
    #[must_use]
    pub fn as_on_shadow(&self, source: &Catalog) -> Catalog {
        let mut catalog = source.clone();
        if self.there.is_empty() {
            return catalog;
        }
        let rename = |table: &mut Table| {
            let Some(place) = self.place(false, &table.schema, &table.name) else { return true };
            let named = |column: &Column| place.column(&column.name).name.map(|name| Column { name: name.to_owned(), ..column.clone() });
            table.columns = table.columns.iter().filter_map(named).collect();
            table.schema.clone_from(&place.schema);
            table.name.clone_from(&place.table);
            !place.left_out
        };
        catalog.tables.retain(|_, table| rename(table));
        catalog
    }
}

/// Types whose values read the same in text form, although they are others.
fn alike(ours: &str, theirs: &str) -> bool {
    let widens = |from: &str, to: &str| matches!((from, to), ("smallint", "integer" | "bigint") | ("integer", "bigint"));
    let text = |name: &str| name == "text" || name.starts_with("character varying");
    ours == theirs || widens(ours, theirs) || widens(theirs, ours) || (text(ours) && text(theirs))
}

impl Rules {
    /// What the source's tables and columns are called on the shadow, for statements.
    pub fn names(&self, source: &Catalog, shadow: &Catalog) -> Names {
        let mut names = Names::default();
        for table in source.tables.values().filter(|table| table.holds_rows()) {
            let place = self.place(false, &table.schema, &table.name);
            let at = place.map_or((&table.schema, &table.name), |place| (&place.schema, &place.table));
            let there = shadow.table(at.0, at.1).filter(|there| there.holds_rows() && place.is_none_or(|place| !place.left_out));
            let column = |column: &Column| {
                let goes = place.map(|place| place.column(&column.name));
                let name = goes.as_ref().map_or(Some(column.name.as_str()), |goes| goes.name);
                let found = name.and_then(|name| there.and_then(|there| there.column(name)));
                let computed = goes.is_some_and(|goes| goes.using.is_some());
                let same_type = !computed && found.is_some_and(|found| found.type_name == column.type_name);
                let alike = !computed && found.is_none_or(|found| alike(&column.type_name, &found.type_name));
                (column.name.clone(), Theirs { name: found.map(|found| found.name.clone()), alike, same_type })
            };
            let columns: HashMap<String, Theirs> = table.columns.iter().map(column).collect();
            let taken = |name: &String| columns.values().any(|theirs| theirs.name.as_ref() == Some(name));
            let added = there.map(|there| there.columns.iter().map(|column| column.name.clone()).filter(|name| !taken(name)).collect());
            let shape =
                |table: &Table| table.columns.iter().map(|column| (column.name.clone(), column.type_name.clone())).collect::<Vec<_>>();
            let same = there.is_some_and(|there| {
                (&there.schema, &there.name) == (&table.schema, &table.name)
                    && shape(there) == shape(table)
                    && columns.iter().all(|(name, theirs)| theirs.same_type && theirs.name.as_ref() == Some(name))
            });
            names.add(
                &table.name,
                TableNames {
                    schema: table.schema.clone(),
                    there: there.map(|there| (there.schema.clone(), there.name.clone())),
                    columns,
                    added: added.unwrap_or_default(),
                    same,
                },
            );
        }
        names
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_there_and_back() {
        let rule = Rule {
            source: "orders".into(),
            shadow: "sales.purchases".into(),
            columns: [("total", "amount"), ("note", "")].map(|(a, b)| (a.to_owned(), b.to_owned())).into(),
            using: [("total".to_owned(), "total * 100".to_owned())].into(),
            back: [("total".to_owned(), "amount / 100".to_owned())].into(),
            ..Rule::default()
        };
        let rules = Rules::new(true, &[rule, Rule { source: "gone".into(), left_out: true, ..Rule::default() }]);
        let place = rules.place(false, "public", "orders").unwrap();
        assert_eq!((place.schema.as_str(), place.table.as_str()), ("sales", "purchases"));
        assert_eq!(place.column("total"), Target { name: Some("amount"), using: Some("total * 100") });
        assert_eq!(place.column("note"), Target { name: None, using: None });
        assert_eq!(place.column("later"), Target { name: Some("later"), using: None });
        let back = rules.place(true, "sales", "purchases").unwrap();
        assert_eq!(back.column("amount"), Target { name: Some("total"), using: Some("amount / 100") });
        assert_eq!((back.schema.as_str(), back.table.as_str()), ("public", "orders"));
        assert!(rules.place(false, "public", "gone").unwrap().left_out);
        assert!(rules.place(true, "public", "gone").is_none() && rules.place(false, "sales", "purchases").is_none());
    }
}
