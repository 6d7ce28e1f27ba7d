//! What a planned migration will do, before it is run: step by step, to the source, the shadow, the feed, the traffic and the way back, and how sure
//! that is. `understudy check --ddl` shows it; the same function assesses DDL that a client sends.
//!
//! Deliberately absent: running anything of the migration; locks on the tables it names (probes only read, with limits).
//!
//! Invariants: what PostgreSQL would refuse, or what would lose data unseen, is never called fine; a step that is not understood says so.
//!
//! Sources: PostgreSQL documentation, "ALTER TABLE" (Notes), "Explicit Locking"; the verdict table of `rules`.

mod parse;
pub mod probe;

pub use parse::{Action, Name, NewColumn, parse};

use super::{
    catalog::{Catalog, Column, Table},
    quote,
    rules::{
        types::{TypeName, Verdict, verdict},
        using::using,
    },
};
use probe::{Probe, TableFacts, found};
use serde::Serialize;
use std::collections::BTreeMap;

/// One step of the migration, for people and for scripts.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Step {
    /// Line of the file on which its statement starts.
    pub line: usize,
    /// What it does, without literals.
    pub step: String,
    /// On the source.
    pub source: String,
    /// On the shadow.
    pub shadow: String,
    /// In the feed.
    pub feed: String,
    /// To the live traffic.
    pub traffic: String,
    /// For the way back.
    pub rollback: String,
    /// How sure this is.
    pub confidence: f64,
    /// Something would break.
    pub breaks: bool,
    /// What to do instead.
    pub remedy: String,
}

/// What was asked of the source before.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// By table oid.
    pub tables: BTreeMap<i64, TableFacts>,
    /// By number of the action; an error's words where the rows could not be asked.
    pub probes: BTreeMap<usize, Result<Probe, String>>,
}

/// Bytes per second that a rewrite moves, conservatively: one pass of reading, writing and WAL on ordinary disks.
const REWRITE_BYTES_PER_SECOND: i64 = 50 << 20;
/// Bytes per second of a scan.
const SCAN_BYTES_PER_SECOND: i64 = 200 << 20;

const CATALOG_ONLY: &str = "a catalog change: an exclusive lock for a moment";
const FOLLOWS: &str = "the engine carries it out at its place in the stream";
const FLOWS: &str = "goes on";

fn seconds(bytes: i64, rate: i64) -> String {
    match bytes / rate {
        0 => "less than a second".into(),
        seconds if seconds < 120 => format!("about {seconds} s"),
        seconds => format!("about {} min", seconds / 60),
    }
}

/// The migration's steps against a source and, if it is known, a shadow. `source` is the catalog before the migration.
pub fn foresee(actions: &[(usize, Action)], source: &Catalog, shadow: Option<&Catalog>, facts: &Facts) -> Vec<Step> {
    let mut state = State { now: source.clone(), shadow, facts, fresh: Vec::new() };
    let mut steps = Vec::new();
    for (number, (line, action)) in actions.iter().enumerate() {
        if matches!(action, Action::Session) {
            continue;
        }
        let mut step = state.step(number, action);
        step.line = *line;
        state.apply(action);
        steps.push(step);
    }
    steps
}

struct State<'a> {
    /// The source's schema as the steps so far leave it.
    now: Catalog,
    shadow: Option<&'a Catalog>,
    facts: &'a Facts,
    /// Tables that the migration itself made: they are empty, and nobody uses them.
    fresh: Vec<Name>,
}

/// A step that works, until something is found.
fn fine(what: String) -> Step {
    Step {
        step: what,
        source: CATALOG_ONLY.into(),
        shadow: FOLLOWS.into(),
        feed: FLOWS.into(),
        traffic: "not affected".into(),
        rollback: "lossless".into(),
        confidence: 0.97,
        ..Step::default()
    }
}

fn breaking(mut step: Step, why: String, remedy: &str, confidence: f64) -> Step {
    step.breaks = true;
    step.source = why;
    step.remedy = remedy.into();
    step.confidence = confidence;
    step
}

impl State<'_> {
    fn table(&self, name: &Name) -> Option<&Table> {
        found(&self.now, name)
    }

    fn about(&self, name: &Name) -> TableFacts {
        self.table(name).and_then(|table| self.facts.tables.get(&table.oid)).cloned().unwrap_or_default()
    }

    fn is_fresh(&self, name: &Name) -> bool {
        self.fresh.iter().any(|fresh| fresh.name == name.name && (fresh.schema == name.schema || name.schema.is_empty()))
    }

    fn probe(&self, number: usize) -> Option<&Result<Probe, String>> {
        self.facts.probes.get(&number)
    }

    fn shadow_column(&self, table: &Name, column: &str) -> Option<(&Table, &Column)> {
        let found = self.table(table)?;
        let twin = self.shadow?.table(&found.schema, &found.name)?;
        Some((twin, twin.column(column)?))
    }

    /// Objects and functions that use the column.
    fn users(&self, table: &Name, column: &str) -> (Vec<String>, Vec<String>) {
        let about = self.about(table);
        let dependents = about.dependents.iter().filter(|(used, _)| used == column).map(|(_, object)| object.clone());
        let functions = about.functions.iter().filter(|(_, words)| words.iter().any(|word| word == column)).map(|(name, _)| name.clone());
        (dependents.collect(), functions.collect())
    }

    /// What is only known when the rows are asked.
    fn asked(&self, number: usize, mut step: Step, table: &Name, works: &str, fails: &str, remedy: &str) -> Step {
        if self.is_fresh(table) {
            step.source = "the table is new and empty: nothing to check".into();
            return step;
        }
        match self.probe(number) {
            Some(Ok(probe)) if probe.failing > 0 => breaking(step, format!("fails with {fails}: {}", probe.words()), remedy, 0.99),
            Some(Ok(probe)) => {
                step.source = format!("{works}; {}", probe.words());
                step.confidence *= probe.certainty();
                step
            }
            Some(Err(why)) => {
                step.source = format!("{works}, unless rows fail with {fails}; the rows could not be asked: {why}");
                step.confidence = 0.5;
                step
            }
            None => {
                step.source =
                    format!("{works}, unless rows fail with {fails}; an earlier step changes what they are, so they were not asked");
                step.confidence = 0.6;
                step
            }
        }
    }

    fn missing(&self, step: Step, table: &Name, column: Option<&str>) -> Option<Step> {
        let Some(found) = self.table(table) else {
            return Some(breaking(step, format!("fails: there is no table {table} (42P01)"), "correct the name", 0.95));
        };
        let column = column.filter(|column| found.column(column).is_none())?;
        Some(breaking(step, format!("fails: {table} has no column {column} (42703)"), "correct the name", 0.95))
    }

    fn step(&self, number: usize, action: &Action) -> Step {
        match action {
            Action::CreateTable { table, primary_key, .. } => {
                let mut step = fine(format!("create table {table}"));
                if self.table(table).is_some() {
                    return breaking(
                        step,
                        format!("fails if {table} is still there (42P07)"),
                        "CREATE TABLE IF NOT EXISTS, or another name",
                        0.9,
                    );
                }
                if !primary_key {
                    step.feed = "without a primary key its UPDATEs and DELETEs are found by the whole row: slow on large tables".into();
                    step.remedy = "give it a primary key".into();
                }
                step
            }
            Action::DropTable { table, cascade } => self.drop_table(table, *cascade),
            Action::RenameTable { table, to } => {
                let step = fine(format!("rename table {table} to {to}"));
                if let Some(missing) = self.missing(step.clone(), table, None) {
                    return missing;
                }
                let functions: Vec<String> = self.about(table).functions.into_iter().map(|(name, _)| name).collect();
                self.renamed(step, &format!("statements that name {table}"), &functions)
            }
            Action::AddColumn { table, column } => self.add_column(table, column),
            Action::DropColumn { table, column, cascade } => self.drop_column(table, column, *cascade),
            Action::RenameColumn { table, column, to } => {
                let step = fine(format!("rename column {table}.{column} to {to}"));
                if let Some(missing) = self.missing(step.clone(), table, Some(column)) {
                    return missing;
                }
                let (_, functions) = self.users(table, column);
                self.renamed(step, &format!("statements that name {table}.{column}"), &functions)
            }
            Action::Retype { table, column, type_name, using } => self.retype(number, table, column, type_name, using.as_deref()),
            Action::SetNotNull { table, column } => {
                let mut step = fine(format!("{table}.{column} SET NOT NULL"));
                if let Some(missing) = self.missing(step.clone(), table, Some(column)) {
                    return missing;
                }
                let scan = seconds(self.about(table).bytes, SCAN_BYTES_PER_SECOND);
                step.traffic = format!("reads and writes of {table} wait while it is read once under an exclusive lock ({scan})");
                step.remedy = "ADD CHECK (… IS NOT NULL) NOT VALID, VALIDATE CONSTRAINT, then SET NOT NULL: no long lock".into();
                self.asked(number, step, table, "the table is read once", "23502", "fill the NULLs first")
            }
            Action::DropNotNull { table, column } => {
                let step = fine(format!("{table}.{column} DROP NOT NULL"));
                self.missing(step.clone(), table, Some(column)).unwrap_or(Step {
                    rollback: "rows with NULL that come afterwards stand in the way of a rollback to NOT NULL".into(),
                    ..step
                })
            }
            Action::Default { table, column } => {
                let step = fine(format!("default of {table}.{column}"));
                self.missing(step.clone(), table, Some(column)).unwrap_or(step)
            }
            Action::Unique { table, columns, primary } => {
                let what = if *primary { "primary key" } else { "unique constraint" };
                let mut step = fine(format!("{what} on {table} ({})", columns.join(", ")));
                if let Some(missing) = self.missing(step.clone(), table, None) {
                    return missing;
                }
                let scan = seconds(self.about(table).bytes, SCAN_BYTES_PER_SECOND);
                step.traffic = format!("reads and writes of {table} wait while the index is built ({scan})");
                step.remedy = "CREATE UNIQUE INDEX CONCURRENTLY, then ADD CONSTRAINT … USING INDEX".into();
                self.asked(number, step, table, "the index is built", "23505", "remove the duplicates first")
            }
            Action::ForeignKey { table, columns, parent, valid, .. } => {
                let mut step = fine(format!("foreign key {table} ({}) to {parent}", columns.join(", ")));
                if let Some(missing) = self.missing(step.clone(), table, None) {
                    return missing;
                }
                if !valid {
                    return step;
                }
                step.traffic = format!("writes of {table} and {parent} wait while all rows are checked");
                step.remedy = "ADD … NOT VALID, then VALIDATE CONSTRAINT: writes go on".into();
                self.asked(number, step, table, "all rows are checked", "23503", "remove the orphans first")
            }
            Action::Check { table, valid, .. } => {
                let mut step = fine(format!("check on {table}"));
                if let Some(missing) = self.missing(step.clone(), table, None) {
                    return missing;
                }
                if !valid {
                    return step;
                }
                step.traffic = format!("reads and writes of {table} wait while all rows are checked");
                step.remedy = "ADD … NOT VALID, then VALIDATE CONSTRAINT: nothing waits".into();
                self.asked(number, step, table, "all rows are checked", "23514", "correct the rows first")
            }
            Action::DropConstraint { table, name } => {
                let step = fine(format!("drop constraint {name} of {table}"));
                self.missing(step.clone(), table, None)
                    .unwrap_or(Step { rollback: "rows that it would refuse stand in the way of putting it back".into(), ..step })
            }
            Action::Index { table, columns, unique, concurrent, .. } => {
                let kind = if *unique { "unique index" } else { "index" };
                let mut step = fine(format!("{kind} on {table} ({})", columns.join(", ")));
                if let Some(missing) = self.missing(step.clone(), table, None) {
                    return missing;
                }
                step.shadow = "built there after the commit, without blocking the feed".into();
                if !concurrent && !self.is_fresh(table) {
                    let scan = seconds(self.about(table).bytes, SCAN_BYTES_PER_SECOND);
                    step.traffic = format!("writes of {table} wait while it is built ({scan})");
                    step.remedy = "CREATE INDEX CONCURRENTLY".into();
                }
                if *unique { self.asked(number, step, table, "the index is built", "23505", "remove the duplicates first") } else { step }
            }
            Action::EnumValue { name } => {
                let mut step = fine(format!("a new label of {name}"));
                step.feed = "the owner's transaction is committed alone on the shadow: a new label is usable only then (55P04)".into();
                step.rollback = "a label cannot be dropped again; rows that use it stand in the way of an older schema".into();
                step
            }
            Action::CreateType { name } => fine(format!("create type {name}")),
            Action::Truncate { table } => {
                let mut step = fine(format!("truncate {table}"));
                step.source = "all rows go".into();
                step.shadow = "all rows go there too".into();
                step.rollback = "the rows are lost on both sides".into();
                step.remedy = "a person should mean it: take a backup first".into();
                step.confidence = 0.9;
                step
            }
            Action::Rows => Step {
                source: "changes rows".into(),
                shadow: "gets the rows through the feed".into(),
                ..fine("a statement on rows".into())
            },
            Action::Session => fine("session".into()),
            Action::Other(what) => Step {
                source: "not assessed".into(),
                shadow: "the engine proposes what it understands of it, else it asks".into(),
                rollback: "unknown".into(),
                confidence: 0.4,
                remedy: "rehearse it on a copy".into(),
                ..fine(what.clone())
            },
        }
    }

    fn renamed(&self, mut step: Step, statements: &str, functions: &[String]) -> Step {
        step.traffic = format!("{statements} fail from this moment on, on the source and on the shadow alike");
        step.shadow = format!("{FOLLOWS}: attribute numbers and oids tell a rename from a drop");
        step.remedy = "deploy the application at the same moment, or keep the old name as a view or a generated column for a while".into();
        if !functions.is_empty() {
            step.breaks = true;
            step.source = format!("{CATALOG_ONLY}; functions that name it fail when they are called: {}", functions.join(", "));
            step.remedy = "replace those functions in the same migration".into();
            step.confidence = 0.8;
        }
        step
    }

    fn drop_table(&self, table: &Name, cascade: bool) -> Step {
        let step = fine(format!("drop table {table}"));
        if let Some(missing) = self.missing(step.clone(), table, None) {
            return missing;
        }
        let about = self.about(table);
        let views: Vec<String> = about.dependents.iter().map(|(_, object)| object.clone()).collect();
        if !views.is_empty() && !cascade {
            return breaking(step, format!("fails: {} depend on it (2BP01)", views.join(", ")), "drop or change them first", 0.95);
        }
        Step {
            source: format!("the table and about {} rows are gone", about.rows),
            shadow: "keeps the table: dropping it there destroys rows, so a proposal asks a person".into(),
            feed: format!("{table} gets no more rows"),
            traffic: format!("statements that name {table} fail"),
            rollback: "rows that were dropped here are on the shadow only until its proposal is approved".into(),
            remedy: "rename it first, and drop it when nobody has missed it".into(),
            confidence: 0.95,
            ..step
        }
    }

    fn add_column(&self, table: &Name, column: &NewColumn) -> Step {
        let mut step = fine(format!("add column {table}.{} ({})", column.name, column.type_name));
        if let Some(missing) = self.missing(step.clone(), table, None) {
            return missing;
        }
        if self.table(table).is_some_and(|found| found.column(&column.name).is_some()) {
            return breaking(
                step,
                format!("fails: {table} has a column {} already (42701)", column.name),
                "ADD COLUMN IF NOT EXISTS",
                0.95,
            );
        }
        let about = self.about(table);
        if column.not_null && !column.filled && about.rows > 0 && !self.is_fresh(table) {
            let why = format!("fails with 23502: NOT NULL without a default, and the table has rows (about {})", about.rows);
            return breaking(step, why, "give it a DEFAULT, or add it nullable, fill it, then SET NOT NULL", 0.98);
        }
        if column.volatile {
            let time = seconds(about.bytes, REWRITE_BYTES_PER_SECOND);
            step.source = "the table is rewritten: every row gets a value of its own".into();
            step.traffic = format!("reads and writes of {table} wait for the rewrite ({time})");
            step.feed = format!("{table} is copied again: a rewrite tells the stream nothing of the values");
        }
        if let Some((_, twin)) = self.shadow_column(table, &column.name) {
            let same = TypeName::parse(&twin.type_name, &twin.type_kind) == TypeName::parse(&column.type_name, "b");
            if same {
                step.shadow = "has such a column already: nothing to do, its own values give way to the source's".into();
            } else {
                step.shadow = format!("has a column {} of type {} already: a proposal asks", column.name, twin.type_name);
                step.confidence = 0.6;
            }
        } else {
            step.shadow = format!("{FOLLOWS}; rows that are there get exactly what the source's rows have");
        }
        step.rollback = "lossless; what is written into the column afterwards is not in the old schema".into();
        step
    }

    fn drop_column(&self, table: &Name, column: &str, cascade: bool) -> Step {
        let step = fine(format!("drop column {table}.{column}"));
        if let Some(missing) = self.missing(step.clone(), table, Some(column)) {
            return missing;
        }
        let (dependents, functions) = self.users(table, column);
        if !dependents.is_empty() && !cascade {
            return breaking(step, format!("fails: {} depend on it (2BP01)", dependents.join(", ")), "change them first", 0.95);
        }
        let mut step = Step {
            shadow: "keeps the column and its values: dropping it there destroys data, so a proposal asks a person".into(),
            feed: "goes on; new rows have NULL or the default there".into(),
            traffic: format!("statements that name {table}.{column} fail"),
            rollback: "not lossless: rows written afterwards have no value for it".into(),
            confidence: 0.95,
            ..step
        };
        if !functions.is_empty() {
            step.breaks = true;
            step.source = format!("succeeds, and functions that name it fail when they are called: {}", functions.join(", "));
            step.remedy = "replace those functions first".into();
            step.confidence = 0.8;
        }
        step
    }

    fn retype(&self, number: usize, table: &Name, column: &str, type_name: &str, expression: Option<&str>) -> Step {
        let mut step = fine(format!("{table}.{column} becomes {type_name}"));
        if let Some(missing) = self.missing(step.clone(), table, Some(column)) {
            return missing;
        }
        let Some(old) = self.table(table).and_then(|found| found.column(column)) else { return step };
        let enum_of =
            |name: &str| self.now.types.values().any(|item| item.kind == "e" && name.rsplit('.').next() == Some(item.name.as_str()));
        let (from, to) =
            (TypeName::parse(&old.type_name, &old.type_kind), TypeName::parse(type_name, if enum_of(type_name) { "e" } else { "b" }));
        let found = verdict(&from, &to);
        let (dependents, functions) = self.users(table, column);
        if !dependents.is_empty() {
            let why = format!("fails with 0A000: {} depend on the column", dependents.join(", "));
            return breaking(step, why, "drop them before and create them again after it, in one transaction", 0.95);
        }
        if !found.works_alone() && expression.is_none() {
            let suggestion = using(&from, &to, type_name, &quote::ident(column)).expressions.swap_remove(0);
            let why = format!("fails with 42804: {} to {type_name}: {}", old.type_name, found.explain());
            return breaking(step, why, &format!("add USING {suggestion}"), 0.97);
        }
        let time = seconds(self.about(table).bytes, REWRITE_BYTES_PER_SECOND);
        if found != Verdict::Free || expression.is_some() {
            step.traffic = format!("reads and writes of {table} wait for the rewrite ({time})");
        }
        step.confidence = found.confidence();
        step.shadow = match expression {
            Some(_) => "is converted the same way as far as it can be, then the table is copied again: the source's values count".into(),
            None if found.loses_data() => "a proposal asks a person: values lose digits, time of day or order".into(),
            None => FOLLOWS.into(),
        };
        if expression.is_some() {
            step.feed = format!("{table} is copied again: a rewrite tells the stream nothing of the values");
        }
        step.rollback = match verdict(&to, &from) {
            Verdict::Free | Verdict::Rewrite if !found.loses_data() => "lossless".into(),
            back if found.loses_data() => format!("not lossless: {}; and back: {}", found.explain(), back.explain()),
            back => format!("values written afterwards may not fit the old type: {}", back.explain()),
        };
        if !functions.is_empty() {
            step.traffic += &format!("; functions that name the column may want another type: {}", functions.join(", "));
        }
        let works = format!("{} to {type_name}: {}", old.type_name, found.explain());
        if matches!(found, Verdict::Free | Verdict::Rewrite) && expression.is_none() {
            step.source = works;
            return step;
        }
        self.asked(
            number,
            step,
            table,
            &works,
            "a value that does not convert (22P02, 22001 or 22003)",
            "correct those rows, or write a USING expression",
        )
    }

    /// Follows the migration.
    fn apply(&mut self, action: &Action) {
        let oid = |table: &Table| table.oid;
        match action {
            Action::CreateTable { table, columns, .. } if self.table(table).is_none() => {
                let columns = columns.iter().enumerate().map(|(at, column)| as_column(column, at as i16 + 1)).collect();
                let schema = if table.schema.is_empty() { "public".to_owned() } else { table.schema.clone() };
                let next = self.now.tables.keys().next_back().copied().unwrap_or(0) + 1;
                let made = Table { oid: next, schema, name: table.name.clone(), kind: "r".into(), columns, ..Table::default() };
                self.now.tables.insert(next, made);
                self.fresh.push(table.clone());
            }
            Action::DropTable { table, .. } => {
                if let Some(oid) = self.table(table).map(oid) {
                    self.now.tables.remove(&oid);
                }
            }
            Action::RenameTable { table, to } => self.change(table, |found| found.name.clone_from(to)),
            Action::AddColumn { table, column } => self.change(table, |found| {
                let next = found.columns.iter().map(|column| column.num).max().unwrap_or(0).saturating_add(1);
                found.columns.push(as_column(column, next));
            }),
            Action::DropColumn { table, column, .. } => self.change(table, |found| found.columns.retain(|other| other.name != *column)),
            Action::RenameColumn { table, column, to } => self.change(table, |found| {
                found.columns.iter_mut().filter(|other| other.name == *column).for_each(|other| other.name.clone_from(to));
            }),
            Action::Retype { table, column, type_name, .. } => self.change(table, |found| {
                found.columns.iter_mut().filter(|other| other.name == *column).for_each(|other| other.type_name.clone_from(type_name));
            }),
            _ => {}
        }
    }

    fn change(&mut self, name: &Name, change: impl FnOnce(&mut Table)) {
        let oid = self.table(name).map(|table| table.oid);
        if let Some(table) = oid.and_then(|oid| self.now.tables.get_mut(&oid)) {
            change(table);
        }
    }
}

fn as_column(column: &NewColumn, num: i16) -> Column {
    Column {
        num,
        name: column.name.clone(),
        type_name: column.type_name.clone(),
        type_kind: "b".into(),
        not_null: column.not_null,
        ..Column::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn catalog() -> Catalog {
        let column = |num, name: &str, type_name: &str| Column {
            num,
            name: name.into(),
            type_name: type_name.into(),
            type_kind: "b".into(),
            ..Column::default()
        };
        let table = Table {
            oid: 1,
            schema: "public".into(),
            name: "item".into(),
            kind: "r".into(),
            columns: vec![column(1, "id", "integer"), column(2, "tag", "text")],
            ..Table::default()
        };
        Catalog { tables: [(1, table)].into(), ..Catalog::default() }
    }

    fn steps(sql: &str, probe: Option<Probe>) -> Vec<Step> {
        let about = TableFacts {
            rows: 50,
            bytes: 1 << 30,
            dependents: vec![("tag".into(), "view item_tags".into())],
            functions: vec![("total(integer)".into(), vec!["id".into(), "item".into()])],
        };
        let probes = probe.map(|probe| (0, Ok(probe))).into_iter().collect();
        let facts = Facts { tables: [(1, about)].into(), probes };
        foresee(&parse(sql).unwrap(), &catalog(), Some(&catalog()), &facts)
    }

    #[test]
    fn what_breaks_is_named_with_its_reason() {
        let bad = Some(Probe { rows: 50, failing: 2, examples: vec!["7".into(), "9".into()] });
        for (sql, probe, reason) in [
            ("ALTER TABLE item ADD a int NOT NULL", None, "23502"),
            ("ALTER TABLE item ADD tag int", None, "42701"),
            ("ALTER TABLE item ALTER id SET NOT NULL", bad.clone(), "instance key 7, 9"),
            ("ALTER TABLE item ADD UNIQUE (id)", bad.clone(), "23505"),
            ("ALTER TABLE item ALTER tag TYPE varchar(3)", None, "0A000"),
            ("ALTER TABLE item ALTER id TYPE date", None, "42804"),
            ("ALTER TABLE item DROP tag", None, "2BP01"),
            ("ALTER TABLE item DROP id", None, "total(integer)"),
            ("ALTER TABLE item RENAME id TO nr", None, "total(integer)"),
            ("ALTER TABLE item ALTER id TYPE smallint", bad, "2 of 50 rows fail"),
            ("ALTER TABLE nowhere ADD a int", None, "42P01"),
            ("DROP TABLE item", None, "2BP01"),
        ] {
            let step = steps(sql, probe).remove(0);
            assert!(step.breaks && step.source.contains(reason), "{sql}: {step:?}");
            assert!(!step.remedy.is_empty(), "{sql}");
        }
    }

    #[test]
    fn what_works_does_not_break_and_says_what_it_costs() {
        let good = Some(Probe { rows: 50, failing: 0, examples: vec![] });
        for (sql, probe, words) in [
            ("ALTER TABLE item ADD a int", None, "exactly what the source's rows have"),
            ("ALTER TABLE item ADD a uuid DEFAULT gen_random_uuid()", None, "copied again"),
            ("ALTER TABLE item ALTER id TYPE bigint", None, "wait for the rewrite (about 20 s)"),
            ("ALTER TABLE item ALTER id SET NOT NULL", good.clone(), "0 of 50 rows fail"),
            ("CREATE INDEX ON item (id)", None, "CREATE INDEX CONCURRENTLY"),
            ("CREATE TABLE n (a int)", None, "primary key"),
            ("ALTER TABLE item ALTER id TYPE real", good, "not lossless"),
            ("DROP TABLE item CASCADE", None, "asks a person"),
            ("CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'", None, "not assessed"),
        ] {
            let step = steps(sql, probe).remove(0);
            assert!(!step.breaks && format!("{step:?}").contains(words), "{sql}: {step:?}");
        }
    }

    #[test]
    fn later_steps_see_what_earlier_ones_did() {
        let steps =
            steps("CREATE TABLE n (a int); ALTER TABLE n ADD b int NOT NULL; ALTER TABLE n RENAME b TO c; ALTER TABLE n DROP b", None);
        assert_eq!(steps.iter().map(|step| step.breaks).collect::<Vec<_>>(), [false, false, false, true]);
        assert!(steps[3].source.contains("42703"));
    }
}
