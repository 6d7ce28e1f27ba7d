//! Fills a column without data on the shadow with synthetic values: small transactions in primary-key order, only rows where it is NULL, so that it
//! can be broken off and run again at any time.

use super::{
    Adapter, SchemaError,
    catalog::{Catalog, Column, Table},
    distribution, learn,
    model::{Model, live, t1},
    quote,
    synthetic::{Facts, Generator},
};
use crate::metadata::{Proposal, ProposalState};
use serde::{Deserialize, Serialize};
use tokio_postgres::{Client, SimpleQueryMessage};

/// Rows per transaction: a few milliseconds each, so that the feed's own writes to the table wait no longer.
const BATCH_ROWS: usize = 1000;
/// Parent keys that children are spread over.
const PARENTS_MAX: usize = 10_000;

/// What to fill, kept in the proposal's first statement: a comment, harmless if it is ever run as SQL.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Order {
    pub(super) schema: String,
    pub(super) table: String,
    pub(super) column: String,
    /// The model's class.
    pub(super) class: String,
    /// NOT NULL afterwards.
    pub(super) not_null: bool,
}

const MARKER: &str = "-- fill ";

/// The comment on a column whose values are made up.
const SYNTHETIC: &str = "understudy: synthetic values";

impl Order {
    pub(super) fn to_sql(&self) -> String {
        // JSON on one line: no name can end the comment
        format!("{MARKER}{}", serde_json::json!(self))
    }

    pub(super) fn from_sql(sql: &[String]) -> Option<Self> {
        sql.iter().find_map(|line| serde_json::from_str(line.strip_prefix(MARKER)?).ok())
    }
}

/// Allowed values of a CHECK like `status = ANY (ARRAY['a'::text, 'b'::text])`, or `status IN (…)`, which deparses to it.
fn check_list(definition: &str) -> Vec<String> {
    let Some((_, rest)) = definition.split_once("ARRAY[") else { return vec![] };
    let mut values = Vec::new();
    let mut rest = rest;
    while let Some(start) = rest.find('\'') {
        let mut value = String::new();
        let mut letters = rest[start + 1..].char_indices().peekable();
        let mut end = None;
        while let Some((at, letter)) = letters.next() {
            match (letter, letters.peek()) {
                ('\'', Some((_, '\''))) => {
                    value.push('\'');
                    letters.next();
                }
                ('\'', _) => {
                    end = Some(start + 1 + at + 1);
                    break;
                }
                _ => value.push(letter),
            }
        }
        let Some(end) = end else { break };
        values.push(value);
        rest = &rest[end..];
    }
    values
}

/// A moment of the same row that comes before or after this one, by their names.
fn beside(table: &Table, column: &Column) -> Option<(String, bool)> {
    let moment = |column: &Column| column.type_name.starts_with("timestamp") || column.type_name == "date";
    let words = t1::tokens(&column.name);
    let mut others = table.columns.iter().filter(|other| other.num != column.num && moment(column) && moment(other));
    others.find_map(|other| Some((other.name.clone(), distribution::comes_after(&words, &t1::tokens(&other.name))?)))
}

pub(super) async fn texts(client: &Client, what: &str, sql: &str) -> Result<Vec<Vec<Option<String>>>, SchemaError> {
    let answer = client.simple_query(sql).await.map_err(|error| SchemaError::server(what, error))?;
    Ok(answer
        .iter()
        .filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some((0..row.len()).map(|at| row.get(at).map(str::to_owned)).collect()),
            _ => None,
        })
        .collect())
}

impl Adapter {
    /// How the column would be filled; `None`: nothing plausible fits.
    pub(super) async fn generator(
        &self,
        catalog: &Catalog,
        table: &Table,
        column: &Column,
        class: &str,
        shadow: &Client,
    ) -> Result<Option<Generator>, SchemaError> {
        let written = self.rules.load().fill(&table.schema, &table.name, &column.name).cloned();
        let mut facts = Facts { class: class.to_owned(), written, ..Facts::default() };
        let alone = |columns: &[i16]| columns == [column.num];
        facts.unique = table.indexes.iter().any(|index| index.unique && alone(&index.columns));
        let key = table.primary_key();
        facts.integer_key = key.len() == 1
            && table.column(key[0]).is_some_and(|column| matches!(column.type_name.as_str(), "integer" | "bigint" | "smallint"));
        if let Some(item) = catalog.types.values().find(|item| item.oid == column.type_oid && item.kind == "e") {
            facts.allowed = item.labels.iter().map(|label| label.label.clone()).collect();
        }
        if let Some(check) = table.constraints.iter().find(|item| item.kind == "c" && alone(&item.columns)) {
            let list = check_list(&check.def);
            if !list.is_empty() {
                facts.allowed = list;
            }
        }
        let reference = table.constraints.iter().find(|item| item.kind == "f" && item.columns.contains(&column.num));
        if let Some(foreign) = reference {
            let (1, Some(parent)) = (foreign.columns.len(), &foreign.references) else { return Ok(None) };
            let Some((_, rest)) = foreign.def.split_once("REFERENCES ") else { return Ok(None) };
            let Some(parent_column) = rest.split_once('(').and_then(|(_, rest)| rest.split_once(')')).map(|(name, _)| name) else {
                return Ok(None);
            };
            let sql = format!(
                "SELECT {parent_column}::text FROM {parent} WHERE {parent_column} IS NOT NULL ORDER BY {parent_column} LIMIT {PARENTS_MAX}"
            );
            facts.parents =
                Some(texts(shadow, "read the parents' keys", &sql).await?.into_iter().filter_map(|mut row| row.pop().flatten()).collect());
        }
        let sister = catalog.tables.values().find(|other| {
            other.oid != table.oid
                && other.kind == "r"
                && !other.is_partition
                && other.column(&column.name).is_some_and(|twin| twin.type_name == column.type_name)
        });
        if let (Some(sister), false, true) = (sister, facts.unique, facts.parents.is_none()) {
            facts.learnt = Some(learn::learnt(shadow, sister, table, column).await?);
        }
        let checks: Vec<&str> =
            table.constraints.iter().filter(|item| item.kind == "c" && alone(&item.columns)).map(|item| item.def.as_str()).collect();
        let smallest = if matches!(column.type_name.as_str(), "smallint" | "integer" | "bigint") { 1.0 } else { 0.01 };
        for check in &checks {
            let (low, high) = distribution::limits(check, &column.name, smallest);
            facts.limits = (low.or(facts.limits.0), high.or(facts.limits.1));
        }
        facts.beside = beside(table, column);
        let Some(generator) = Generator::new(&self.database, &table.plain(), column, &facts) else { return Ok(None) };
        let fits = learn::fits(shadow, column, &checks, &generator).await?;
        Ok(fits.then_some(generator))
    }

    /// Carries out a `fill_column` proposal on the shadow and returns how many rows got a value. May be broken off and run again: rows that have a
    /// value are left alone, and the same row gets the same value.
    ///
    /// # Errors
    /// [`SchemaError::Proposal`]: it is no such proposal, or the column is gone; [`SchemaError::Server`]: the shadow refused (what was filled stays).
    pub async fn fill(&self, proposal: &Proposal, shadow: &Client) -> Result<u64, SchemaError> {
        let Some(order) = Order::from_sql(&proposal.draft.sql) else {
            return Err(SchemaError::Proposal(format!("proposal {} is not a fill_column proposal: run its SQL instead", proposal.id)));
        };
        let catalog = Catalog::load(shadow).await?;
        let found = catalog.table(&order.schema, &order.table).and_then(|table| Some((table, table.column(&order.column)?)));
        let Some((table, column)) = found else {
            return Err(SchemaError::Proposal(format!(
                "column {} of {}.{} is no longer on the shadow: REJECT proposal {}",
                order.column, order.schema, order.table, proposal.id
            )));
        };
        let Some(generator) = self.generator(&catalog, table, column, &order.class, shadow).await? else {
            return Err(SchemaError::Proposal(format!(
                "no plausible values for column {} of {}: APPROVE {} AS '<your own UPDATE>'",
                order.column,
                table.plain(),
                proposal.id
            )));
        };
        let rows = fill_rows(shadow, table, column, &generator).await?;
        if order.not_null && !column.not_null {
            set_not_null(shadow, table, column).await?;
        }
        mark(shadow, table, column).await?;
        Ok(rows)
    }
}

impl Adapter {
    /// Gives rows that came through the feed after a column was filled their values too: the same as a fill at any other time would. Cheap when
    /// there is nothing to do; meant to be called every few seconds. Returns how many rows got a value.
    ///
    /// # Errors
    /// [`SchemaError::Server`]
    pub async fn refill(&self, shadow: &Client) -> Result<u64, SchemaError> {
        let mut rows = 0;
        for proposal in self.repository.proposals(Some(&self.database))? {
            let done = matches!(proposal.state, ProposalState::Approved | ProposalState::AutoApplied);
            if done && proposal.shadow == self.shadow && proposal.draft.kind == "fill_column" {
                rows += match self.fill(&proposal, shadow).await {
                    // the column went away, or a person filled it with SQL of their own
                    Err(SchemaError::Proposal(_)) => 0,
                    other => other?,
                };
            }
        }
        Ok(rows)
    }
}

/// A key column: quoted name and type.
fn key_of(table: &Table) -> Vec<(String, String)> {
    table
        .primary_key()
        .iter()
        .filter_map(|name| table.column(name))
        .map(|column| (quote::ident(&column.name), column.type_name.clone()))
        .collect()
}

async fn fill_rows(shadow: &Client, table: &Table, column: &Column, generator: &Generator) -> Result<u64, SchemaError> {
    let mut key = key_of(table);
    // Without a key: the row's address finds it inside one transaction, its content is what the value is made from.
    let keyless = key.is_empty();
    if keyless {
        key.push(("ctid".into(), "tid".into()));
    }
    let name = quote::ident(&column.name);
    let names = key.iter().map(|(name, _)| format!("t.{name}")).collect::<Vec<_>>().join(", ");
    let as_text = key.iter().map(|(name, _)| format!("t.{name}::text")).collect::<Vec<_>>().join(", ");
    let content = if keyless { ", t::text" } else { "" };
    let other = match &generator.beside {
        Some((other, _)) => format!("extract(epoch FROM t.{})::text, ", quote::ident(other)),
        None => String::new(),
    };
    let mut after = String::new();
    let mut filled = 0;
    loop {
        let step = "fill a column";
        shadow
            .batch_execute("BEGIN READ WRITE; SET LOCAL session_replication_role = replica; SET LOCAL lock_timeout = '5s'")
            .await
            .map_err(|error| SchemaError::server(step, error))?;
        let batch = one_batch(
            shadow,
            table,
            column,
            generator,
            &key,
            &format!(
                "SELECT {other}{as_text}{content} FROM {} t WHERE t.{name} IS NULL{after} ORDER BY {names} LIMIT {BATCH_ROWS}",
                table.qualified()
            ),
        )
        .await;
        match batch {
            Ok((count, last)) => {
                shadow.batch_execute("COMMIT").await.map_err(|error| SchemaError::server(step, error))?;
                filled += count;
                let Some(last) = last else { return Ok(filled) };
                let values: Vec<String> =
                    last.iter().zip(&key).map(|(value, (_, type_name))| format!("{}::{type_name}", quote::literal(value))).collect();
                after = format!(" AND ({names}) > ({})", values.join(", "));
            }
            Err(error) => {
                // The first error is the one that counts; a broken connection has rolled back by itself.
                let _ = shadow.batch_execute("ROLLBACK").await;
                return Err(error);
            }
        }
    }
}

/// Fills one batch; the last key of it, or `None` when there was no row.
async fn one_batch(
    shadow: &Client,
    table: &Table,
    column: &Column,
    generator: &Generator,
    key: &[(String, String)],
    select: &str,
) -> Result<(u64, Option<Vec<String>>), SchemaError> {
    let rows = texts(shadow, "read rows without a value", select).await?;
    let mut columns: Vec<Vec<String>> = vec![Vec::new(); key.len()];
    let mut values = Vec::new();
    let mut last = None;
    for mut row in rows {
        let other = generator.beside.as_ref().filter(|_| !row.is_empty()).and_then(|_| row.remove(0)).and_then(|text| text.parse().ok());
        let row: Vec<String> = row.into_iter().map(Option::unwrap_or_default).collect();
        let identity = if row.len() > key.len() { row[key.len()..].join("|") } else { row.join("|") };
        last = Some(row.iter().take(key.len()).cloned().collect());
        if let Some(value) = generator.value_beside(&identity, other) {
            columns.iter_mut().zip(&row).for_each(|(column, value)| column.push(value.clone()));
            values.push(value);
        }
    }
    if values.is_empty() {
        return Ok((0, last));
    }
    let list = (1..=key.len()).map(|at| format!("k{at}")).collect::<Vec<_>>().join(", ");
    let arrays = (1..=key.len() + 1).map(|at| format!("${at}::text[]")).collect::<Vec<_>>().join(", ");
    let same = key
        .iter()
        .enumerate()
        .map(|(at, (name, type_name))| format!("t.{name} = v.k{}::{type_name}", at + 1))
        .collect::<Vec<_>>()
        .join(" AND ");
    let name = quote::ident(&column.name);
    let update = format!(
        "UPDATE {} t SET {name} = v.value::{} FROM unnest({arrays}) AS v({list}, value) WHERE {same} AND t.{name} IS NULL",
        table.qualified(),
        column.type_name
    );
    columns.push(values);
    let parameters: Vec<&(dyn tokio_postgres::types::ToSql + Sync)> = columns.iter().map(|column| column as _).collect();
    let count = shadow.execute(&update, &parameters).await.map_err(|error| SchemaError::server("write synthetic values", error))?;
    Ok((count, last))
}

/// Says in the catalog that the column's values are made up, unless a comment stands there already.
async fn mark(shadow: &Client, table: &Table, column: &Column) -> Result<(), SchemaError> {
    let what = "mark a column as synthetic";
    let query = format!("SELECT pg_catalog.col_description({}::oid, {}) IS NULL", table.oid, column.num);
    let bare: bool = shadow.query_one(&query, &[]).await.map_err(|error| SchemaError::server(what, error))?.get(0);
    if bare {
        let sql = format!("COMMENT ON COLUMN {}.{} IS {}", table.qualified(), quote::ident(&column.name), quote::literal(SYNTHETIC));
        shadow.batch_execute(&sql).await.map_err(|error| SchemaError::server(what, error))?;
    }
    Ok(())
}

/// SET NOT NULL without reading the table under an exclusive lock: a valid CHECK proves it (major 12 and later).
async fn set_not_null(shadow: &Client, table: &Table, column: &Column) -> Result<(), SchemaError> {
    let (name, relation) = (quote::ident(&column.name), table.qualified());
    for statement in [
        format!("ALTER TABLE {relation} ADD CONSTRAINT understudy_filled CHECK ({name} IS NOT NULL) NOT VALID"),
        format!("ALTER TABLE {relation} VALIDATE CONSTRAINT understudy_filled"),
        format!("ALTER TABLE {relation} ALTER COLUMN {name} SET NOT NULL"),
        format!("ALTER TABLE {relation} DROP CONSTRAINT understudy_filled"),
    ] {
        shadow.batch_execute(&statement).await.map_err(|error| SchemaError::server("make a filled column NOT NULL", error))?;
    }
    Ok(())
}

/// The model's answer for a column: best class, its probability, the probability of NULL, and the reason.
pub(super) fn predicted(
    catalog: &Catalog,
    table: &Table,
    column: &Column,
    lessons: &[(Order, String, f64)],
) -> (&'static str, f64, f64, String) {
    let mut memory = live::memory(catalog, Some((&table.schema, &table.name, &column.name)));
    let mut taught = 0;
    for (order, class, weight) in lessons {
        // The column may be gone from the table since; what it was called still says something.
        let host = catalog.table(&order.schema, &order.table).unwrap_or(table);
        let learnt = match host.column(&order.column) {
            Some(known) => live::case(host, known),
            None => live::case(host, &Column { name: order.column.clone(), not_null: order.not_null, num: -1, ..column.clone() }),
        };
        if let Some(class) = t1::class_of(class) {
            memory.learn(&learnt, class, *weight);
            taught += 1;
        }
    }
    let case = live::case(table, column);
    let answer = Model::shipped().value_for_existing_rows(&case, &memory);
    let null = answer[0];
    let best = (1..t1::CLASS_COUNT).max_by(|a, b| answer[*a].total_cmp(&answer[*b])).unwrap_or(1);
    let (same, all) = memory.seen(&case, best);
    let nullable = if column.not_null { "NOT NULL" } else { "nullable" };
    let why = format!(
        "{nullable} {}; {same:.0} of {all:.0} such columns here start as {}; model: {:.0} % {}, {:.0} % NULL",
        column.type_name,
        t1::CLASSES[best],
        answer[best] * 100.0,
        t1::CLASSES[best],
        null * 100.0
    ) + &if taught > 0 { format!("; {taught} decisions of people about values count in it") } else { String::new() };
    (t1::CLASSES[best], answer[best], null, why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn check_lists() {
        assert_eq!(check_list("CHECK ((s = ANY (ARRAY['a'::text, 'it''s'::text])))"), ["a", "it's"]);
        assert_eq!(check_list("CHECK ((n > 0))"), Vec::<String>::new());
        assert_eq!(check_list("CHECK ((s = ANY (ARRAY['a"), Vec::<String>::new());
    }

    proptest! {
        #[test]
        fn an_order_survives_any_name(schema in ".{0,10}", table in ".{0,10}", column in "\\PC*") {
            let order = Order { schema, table, column, class: "null".into(), not_null: true };
            let sql = order.to_sql();
            prop_assert!(!sql.contains('\n'));
            prop_assert_eq!(Order::from_sql(&[sql]), Some(order));
        }
    }
}
