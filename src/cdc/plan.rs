//! How a change of one relation becomes a statement on the follower. Pure: the relation as the stream describes it, the table as
//! the follower has it, and a change in; SQL text and parameters out. Columns meet by name.

use super::{
    names::{ident, qualified},
    pgoutput::{Relation, Tuple, Value},
    session::Text,
};
use std::collections::HashMap;

/// One column of the follower's table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TargetColumn {
    /// Type without its modifier, qualified: what a parameter is cast to.
    pub type_name: String,
    /// Computed by the follower: never written.
    pub generated: bool,
    /// GENERATED ALWAYS AS IDENTITY: cannot be updated.
    pub identity_always: bool,
    /// An array of its type holds one value per element, separated by commas.
    pub listable: bool,
    /// Its value is computed from the stream's.
    pub using: Option<Using>,
}

/// An expression over one column of the owner, written by the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Using {
    /// The column's name on the owner, as the expression says it.
    pub column: String,
    /// Its type there.
    pub type_name: String,
    pub expression: String,
}

impl TargetColumn {
    /// A value of the stream, given as SQL of its text, as this column takes it.
    pub fn value(&self, text: &str) -> String {
        match &self.using {
            None => format!("{text}::{}", self.type_name),
            Some(Using { column, type_name, expression }) => {
                format!("(SELECT {expression} FROM (SELECT {text}::{type_name} AS {}) AS v)", ident(column))
            }
        }
    }
}

/// How changes of a table may be taken together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Folding {
    /// Not at all: something on the follower sees each change (a trigger or rule that fires for a feed, row security).
    #[default]
    Never,
    /// Rows that are inserted one after the other: something besides the key is unique, or there is no key.
    Inserts,
    /// The last state of each key.
    ByKey,
}

/// The follower's table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct TargetTable {
    pub columns: HashMap<String, TargetColumn>,
    /// Names of the primary key's columns, in order; empty: none.
    pub primary_key: Vec<String>,
    /// Rows live in its partitions.
    pub partitioned: bool,
    /// Something fires for each change.
    pub watched: bool,
    /// Columns of each unique index, also of partitions, none for one that is not only columns or is checked at another time.
    pub unique: Vec<Vec<String>>,
}

/// A relation and the table that takes its rows.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub relation: Relation,
    /// By position in the relation.
    pub(super) columns: Vec<TargetColumn>,
    /// Positions that identify a row; empty: the whole row does.
    key: Vec<usize>,
    target: String,
    partitioned: bool,
    folding: Folding,
}

/// The stream's table does not fit the follower's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Misfit {
    #[error("the follower has no such table")]
    NoTable,
    #[error("the follower's table has no column {0}")]
    NoColumn(String),
    #[error("its shape is newer than what is known of the owner's schema yet")]
    Ahead,
    #[error("the change has {0} values for {1} columns")]
    Values(usize, usize),
    #[error("the change does not say which row it concerns")]
    NoIdentity,
}

/// SQL and its parameters.
pub(super) type Statement = (String, Vec<Text>);

fn text(value: &Value) -> Text {
    match value {
        Value::Null | Value::Unchanged => Text(None),
        Value::Text(bytes) => Text(Some(bytes.clone())),
    }
}

/// Collects parameters while SQL is written.
#[derive(Default)]
struct Writer {
    sql: String,
    parameters: Vec<Text>,
}

impl Writer {
    fn push(&mut self, sql: &str) {
        self.sql.push_str(sql);
    }

    fn parameter(&mut self, value: &Value, target: &TargetColumn) {
        self.parameters.push(text(value));
        self.sql.push_str(&target.value(&format!("${}", self.parameters.len())));
    }
}

impl Plan {
    pub fn new(relation: &Relation, table: Option<&TargetTable>) -> Result<Self, Misfit> {
        let table = table.ok_or(Misfit::NoTable)?;
        let columns: Vec<TargetColumn> = relation
            .columns
            .iter()
            .map(|column| table.columns.get(&column.name).cloned().ok_or_else(|| Misfit::NoColumn(column.name.clone())))
            .collect::<Result<_, _>>()?;
        let position = |name: &String| relation.columns.iter().position(|column| column.name == *name);
        let key = if relation.identity == b'f' {
            // The whole old row is sent: the follower's own primary key finds it faster, where all of it is there.
            let key: Option<Vec<usize>> = table.primary_key.iter().map(position).collect();
            key.unwrap_or_default()
        } else {
            relation.columns.iter().enumerate().filter(|(_, column)| column.key).map(|(position, _)| position).collect()
        };
        let folding = folding(relation, table, &key, &columns);
        let target = qualified(&relation.schema, &relation.name);
        Ok(Plan { columns, key, target, partitioned: table.partitioned, folding, relation: relation.clone() })
    }

    /// How its changes may be taken together.
    pub fn folding(&self) -> Folding {
        self.folding
    }

    /// Positions of the columns that identify a row.
    pub fn key(&self) -> &[usize] {
        &self.key
    }

    /// The table as a statement names it that adds rows.
    pub fn target(&self) -> &str {
        &self.target
    }

    /// The table as a statement names it that finds rows: tables that inherit from it have their own changes.
    pub fn rows_of(&self) -> String {
        if self.partitioned { self.target.clone() } else { format!("ONLY {}", self.target) }
    }

    /// Rows of this table can be told apart by a key.
    pub fn keyed(&self) -> bool {
        !self.key.is_empty()
    }

    fn check(&self, tuple: &Tuple) -> Result<(), Misfit> {
        if tuple.len() == self.columns.len() { Ok(()) } else { Err(Misfit::Values(tuple.len(), self.columns.len())) }
    }

    /// Name, follower's column and value of each column.
    fn each<'a>(&'a self, tuple: &'a Tuple) -> impl Iterator<Item = (usize, &'a str, &'a TargetColumn, &'a Value)> {
        self.relation
            .columns
            .iter()
            .zip(&self.columns)
            .zip(tuple)
            .enumerate()
            .map(|(position, ((column, target), value))| (position, column.name.as_str(), target, value))
    }

    pub fn insert(&self, new: &Tuple) -> Result<Statement, Misfit> {
        self.check(new)?;
        let mut writer = Writer::default();
        let written: Vec<_> = self.each(new).filter(|(_, _, target, value)| !target.generated && **value != Value::Unchanged).collect();
        if written.is_empty() {
            return Ok((format!("INSERT INTO {} DEFAULT VALUES", self.target), Vec::new()));
        }
        let names: Vec<String> = written.iter().map(|(_, name, ..)| ident(name)).collect();
        writer.push(&format!("INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE VALUES (", self.target, names.join(", ")));
        for (number, (_, _, target, value)) in written.into_iter().enumerate() {
            writer.push(if number > 0 { ", " } else { "" });
            writer.parameter(value, target);
        }
        writer.push(")");
        Ok((writer.sql, writer.parameters))
    }

    /// `None`: nothing to change on the follower (only computed columns, or none, were sent).
    pub fn update(&self, old: Option<&Tuple>, new: &Tuple) -> Result<Option<Statement>, Misfit> {
        self.check(new)?;
        let mut writer = Writer::default();
        writer.push(&format!("UPDATE {} SET ", self.rows_of()));
        let mut first = true;
        for (position, name, target, value) in self.each(new) {
            // Without an old key the key did not change.
            let same_key = old.is_none() && self.key.contains(&position);
            if target.generated || target.identity_always || same_key || *value == Value::Unchanged {
                continue;
            }
            writer.push(if first { "" } else { ", " });
            first = false;
            writer.push(&format!("{} = ", ident(name)));
            writer.parameter(value, target);
        }
        if first {
            return Ok(None);
        }
        self.find(&mut writer, old.unwrap_or(new))?;
        Ok(Some((writer.sql, writer.parameters)))
    }

    pub fn delete(&self, old: &Tuple) -> Result<Statement, Misfit> {
        let mut writer = Writer::default();
        writer.push(&format!("DELETE FROM {}", self.rows_of()));
        self.find(&mut writer, old)?;
        Ok((writer.sql, writer.parameters))
    }

    /// WHERE that finds the one row a tuple identifies.
    fn find(&self, writer: &mut Writer, tuple: &Tuple) -> Result<(), Misfit> {
        self.check(tuple)?;
        if self.key.is_empty() {
            if self.relation.identity != b'f' {
                return Err(Misfit::NoIdentity);
            }
            return self.find_by_row(writer, tuple);
        }
        for (number, position) in self.key.iter().enumerate() {
            let (Some(column), Some(target), Some(value)) =
                (self.relation.columns.get(*position), self.columns.get(*position), tuple.get(*position))
            else {
                return Err(Misfit::NoIdentity);
            };
            let Value::Text(_) = value else { return Err(Misfit::NoIdentity) };
            writer.push(if number > 0 { " AND " } else { " WHERE " });
            writer.push(&format!("{} = ", ident(&column.name)));
            writer.parameter(value, target);
        }
        Ok(())
    }

    /// One of the rows that equal the old row. Equality is that of the text forms: 1.0 and 1.00, two spellings of an interval,
    /// or jsonb numbers are equal to their types' operators but are different rows, and json, xml and points have no operator.
    fn find_by_row(&self, writer: &mut Writer, tuple: &Tuple) -> Result<(), Misfit> {
        writer.push(&format!(" WHERE (tableoid, ctid) = (SELECT tableoid, ctid FROM {}", self.rows_of()));
        let mut first = true;
        for (_, name, target, value) in self.each(tuple) {
            if target.generated {
                continue;
            }
            writer.push(if first { " WHERE " } else { " AND " });
            first = false;
            match value {
                Value::Null => writer.push(&format!("{} IS NULL", ident(name))),
                Value::Unchanged => return Err(Misfit::NoIdentity),
                Value::Text(_) => {
                    writer.push(&format!("{}::text COLLATE \"C\" = (", ident(name)));
                    writer.parameter(value, target);
                    writer.push(")::text COLLATE \"C\"");
                }
            }
        }
        writer.push(" LIMIT 1)");
        Ok(())
    }

    /// The columns that identify a row with their values, for a finding. Never more than the key.
    pub fn key_text(&self, tuple: &Tuple) -> String {
        if self.key.is_empty() {
            return "no key".to_owned();
        }
        let parts: Vec<String> = self
            .each(tuple)
            .filter(|(position, ..)| self.key.contains(position))
            .map(|(_, name, _, value)| match value {
                Value::Text(bytes) => format!("{name}={}", String::from_utf8_lossy(bytes).chars().take(80).collect::<String>()),
                Value::Null | Value::Unchanged => format!("{name}=?"),
            })
            .collect();
        parts.join(", ")
    }

    /// The new row with what was not sent taken from the old row, where that is known (full identity).
    pub fn whole(&self, old: Option<&Tuple>, new: &Tuple) -> Option<Tuple> {
        new.iter()
            .enumerate()
            .map(|(position, value)| match value {
                Value::Unchanged => old.and_then(|old| old.get(position)).filter(|value| **value != Value::Unchanged).cloned(),
                value => Some(value.clone()),
            })
            .collect()
    }
}

/// A key that is unique on the follower, and nothing else that is: then the last state of each key is all that matters.
fn folding(relation: &Relation, table: &TargetTable, key: &[usize], columns: &[TargetColumn]) -> Folding {
    // Keys that are computed may meet.
    let computed = key.iter().any(|position| columns.get(*position).is_some_and(|column| column.using.is_some()));
    if table.watched || computed || columns.iter().all(|column| column.generated) {
        return Folding::Never;
    }
    let key: Vec<&str> = key.iter().filter_map(|position| relation.columns.get(*position)).map(|column| column.name.as_str()).collect();
    let holds_key = |index: &Vec<String>| key.iter().all(|name| index.iter().any(|column| column == name));
    let is_key = |index: &Vec<String>| index.len() == key.len() && holds_key(index);
    if !key.is_empty() && table.unique.iter().any(is_key) && table.unique.iter().all(holds_key) { Folding::ByKey } else { Folding::Inserts }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cdc::pgoutput::Column;
    use bytes::Bytes;

    fn relation(identity: u8, columns: &[(&str, bool)]) -> Relation {
        let columns = columns.iter().map(|(name, key)| Column { key: *key, name: (*name).into(), type_oid: 23 }).collect();
        Relation { oid: 1, schema: "s".into(), name: "t".into(), identity, columns }
    }

    fn table(columns: &[(&str, &str)], primary_key: &[&str]) -> TargetTable {
        let columns = columns
            .iter()
            .map(|(name, flags)| {
                let column = TargetColumn {
                    type_name: "integer".into(),
                    generated: flags.contains('g'),
                    identity_always: flags.contains('i'),
                    listable: !flags.contains('a'),
                    using: None,
                };
                ((*name).to_owned(), column)
            })
            .collect();
        let primary_key: Vec<String> = primary_key.iter().map(|name| (*name).to_owned()).collect();
        let unique = if primary_key.is_empty() { Vec::new() } else { vec![primary_key.clone()] };
        TargetTable { columns, primary_key, unique, ..TargetTable::default() }
    }

    fn value(text: &'static str) -> Value {
        match text {
            "null" => Value::Null,
            "same" => Value::Unchanged,
            text => Value::Text(Bytes::from_static(text.as_bytes())),
        }
    }

    fn row(values: &[&'static str]) -> Tuple {
        values.iter().map(|text| value(text)).collect()
    }

    #[test]
    fn writes_statements() {
        let target = table(&[("id", "i"), ("a\"b", ""), ("g", "g"), ("extra", "")], &["id"]);
        let plan = Plan::new(&relation(b'd', &[("id", true), ("a\"b", false), ("g", false)]), Some(&target)).unwrap();
        assert_eq!(
            plan.insert(&row(&["1", "null", "9"])).unwrap().0,
            "INSERT INTO \"s\".\"t\" (\"id\", \"a\"\"b\") OVERRIDING SYSTEM VALUE VALUES ($1::integer, $2::integer)"
        );
        assert_eq!(
            plan.update(None, &row(&["1", "2", "9"])).unwrap().unwrap().0,
            "UPDATE ONLY \"s\".\"t\" SET \"a\"\"b\" = $1::integer WHERE \"id\" = $2::integer"
        );
        assert_eq!(plan.update(None, &row(&["1", "same", "same"])).unwrap(), None);
        assert_eq!(plan.delete(&row(&["1", "null", "null"])).unwrap().0, "DELETE FROM ONLY \"s\".\"t\" WHERE \"id\" = $1::integer");
        assert_eq!(plan.key_text(&row(&["1", "2", "3"])), "id=1");
    }

    #[test]
    fn finds_whole_rows() {
        let plan = Plan::new(&relation(b'f', &[("a", true), ("b", true)]), Some(&table(&[("a", ""), ("b", "")], &[]))).unwrap();
        assert_eq!(
            plan.delete(&row(&["1", "null"])).unwrap().0,
            "DELETE FROM ONLY \"s\".\"t\" WHERE (tableoid, ctid) = (SELECT tableoid, ctid FROM ONLY \"s\".\"t\" WHERE \"a\"::text COLLATE \"C\" = \
             ($1::integer)::text COLLATE \"C\" AND \"b\" IS NULL LIMIT 1)"
        );
        let with_key = Plan::new(&relation(b'f', &[("a", true), ("b", true)]), Some(&table(&[("a", ""), ("b", "")], &["a"]))).unwrap();
        assert_eq!(
            with_key.update(Some(&row(&["1", "2"])), &row(&["3", "same"])).unwrap().unwrap().0,
            "UPDATE ONLY \"s\".\"t\" SET \"a\" = $1::integer WHERE \"a\" = $2::integer"
        );
        assert_eq!(with_key.whole(Some(&row(&["1", "2"])), &row(&["3", "same"])), Some(row(&["3", "2"])));
        assert_eq!(with_key.whole(None, &row(&["3", "same"])), None);
    }

    #[test]
    fn says_what_does_not_fit() {
        let source = relation(b'd', &[("id", true), ("new", false)]);
        assert_eq!(Plan::new(&source, None).unwrap_err(), Misfit::NoTable);
        assert_eq!(Plan::new(&source, Some(&table(&[("id", "")], &[]))).unwrap_err(), Misfit::NoColumn("new".into()));
        let plan = Plan::new(&source, Some(&table(&[("id", ""), ("new", "")], &[]))).unwrap();
        assert_eq!(plan.insert(&row(&["1"])), Err(Misfit::Values(1, 2)));
        assert_eq!(plan.delete(&row(&["null", "1"])), Err(Misfit::NoIdentity));
        let keyless = Plan::new(&relation(b'n', &[("id", false)]), Some(&table(&[("id", "")], &[]))).unwrap();
        assert_eq!(keyless.delete(&row(&["1"])), Err(Misfit::NoIdentity));
    }
}
