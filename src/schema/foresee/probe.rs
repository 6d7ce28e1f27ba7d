//! Asks the live rows, read-only and within limits, what a data-dependent step would meet. Failing rows are counted and named by key only: no value
//! leaves the server.

use super::{Action, Name};
use crate::schema::{
    SchemaError,
    catalog::{Catalog, Table},
    quote,
};
use tokio_postgres::Client;

/// Rows that one probe looks at.
pub const ROWS_MAX: i64 = 20_000;
/// Time for one probe: a check must not load the source.
const LIMITS: &str = "SET statement_timeout = '10s'; SET lock_timeout = '1s'; SET default_transaction_read_only = on";
/// Rows named as examples.
const EXAMPLES_MAX: usize = 3;

/// What the rows say.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Probe {
    /// Rows looked at.
    pub rows: i64,
    /// Rows that would fail.
    pub failing: i64,
    /// Keys of some of them.
    pub examples: Vec<String>,
}

impl Probe {
    /// For people: "2 of 50 rows would fail, for instance id 7, 9".
    pub fn words(&self) -> String {
        match self.failing {
            0 => format!("probe: 0 of {} rows fail", self.rows),
            failing if self.examples.is_empty() => format!("probe: {failing} of {} rows fail", self.rows),
            failing => format!("probe: {failing} of {} rows fail, for instance key {}", self.rows, self.examples.join(", ")),
        }
    }

    /// Share of the rows that pass, with one row of doubt for what was not looked at.
    pub fn certainty(&self) -> f64 {
        if self.failing > 0 { 0.0 } else { (self.rows as f64 + 1.0) / (self.rows as f64 + 2.0) }
    }
}

/// Facts about a table that the plan needs and the catalog does not have.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TableFacts {
    /// Rows, by the planner's estimate (exact 0 when empty).
    pub rows: i64,
    /// Bytes with TOAST, without indexes.
    pub bytes: i64,
    /// (column, object): what forbids a type change or a drop of the column.
    pub dependents: Vec<(String, String)>,
    /// Functions whose body has this table's name as a word, with their bodies' words.
    pub functions: Vec<(String, Vec<String>)>,
}

/// The table that a step names, if it was there before the migration.
pub fn found<'a>(catalog: &'a Catalog, name: &Name) -> Option<&'a Table> {
    if !name.schema.is_empty() {
        return catalog.table(&name.schema, &name.name);
    }
    catalog.table("public", &name.name).or_else(|| catalog.tables.values().find(|table| table.name == name.name))
}

fn key_text(table: &Table) -> String {
    let key: Vec<String> = table.primary_key().iter().map(|name| format!("t.{}::text", quote::ident(name))).collect();
    if key.is_empty() { "'(no key)'".into() } else { format!("concat_ws('|', {})", key.join(", ")) }
}

/// Facts about one table.
///
/// # Errors
/// [`SchemaError::Server`]
pub async fn table_facts(client: &Client, table: &Table) -> Result<TableFacts, SchemaError> {
    let failed = |error| SchemaError::server("read facts about a table", error);
    let row = client
        .query_one(
            "SELECT greatest(c.reltuples, 0)::bigint, pg_catalog.pg_table_size(c.oid) FROM pg_catalog.pg_class c WHERE c.oid = $1::bigint::oid",
            &[&table.oid],
        )
        .await
        .map_err(failed)?;
    let mut facts = TableFacts { rows: row.get(0), bytes: row.get(1), ..TableFacts::default() };
    if facts.rows == 0 && table.holds_rows() {
        let query = format!("SELECT count(*) FROM (SELECT FROM {} LIMIT {ROWS_MAX}) s", table.qualified());
        facts.rows = client.query_one(&query, &[]).await.map_err(failed)?.get(0);
    }
    let dependents = client
        .query(
            "SELECT DISTINCT a.attname::text, pg_catalog.pg_describe_object(d.classid, d.objid, 0)
             FROM pg_catalog.pg_depend d
             JOIN pg_catalog.pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
             WHERE d.refclassid = 'pg_catalog.pg_class'::regclass AND d.refobjid = $1::bigint::oid AND d.refobjsubid > 0
               AND d.classid IN ('pg_catalog.pg_rewrite'::regclass, 'pg_catalog.pg_policy'::regclass, 'pg_catalog.pg_trigger'::regclass)
             ORDER BY 1, 2",
            &[&table.oid],
        )
        .await
        .map_err(failed)?;
    facts.dependents = dependents.iter().map(|row| (row.get(0), row.get(1))).collect();
    let functions = client
        .query(
            "SELECT p.oid::regprocedure::text, p.prosrc FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_language l ON l.oid = p.prolang
             WHERE l.lanname IN ('sql', 'plpgsql') AND pg_catalog.strpos(p.prosrc, $1) > 0 ORDER BY 1 LIMIT 200",
            &[&table.name],
        )
        .await
        .map_err(failed)?;
    let words = |body: String| body.split(|c: char| !c.is_alphanumeric() && c != '_').map(str::to_owned).collect::<Vec<_>>();
    let named = functions.iter().map(|row| (row.get(0), words(row.get(1))));
    facts.functions = named.filter(|(_, words): &(String, Vec<String>)| words.contains(&table.name)).collect();
    Ok(facts)
}

/// A conversion row by row: a DO block catches what fails, and hands its counts over in a setting (nothing is written, so it may run read-only).
fn conversion(table: &Table, column: &str, expression: &str, new: &str) -> String {
    let row = format!(
        "SELECT {} AS k, t.{} AS v FROM {} t WHERE t.{} IS NOT NULL LIMIT {ROWS_MAX}",
        key_text(table),
        quote::ident(column),
        table.qualified(),
        quote::ident(column)
    );
    // The expression names the column: it gets a row of one with that name. Into a variable, not by a cast: as in ALTER TABLE, what is too long fails
    // there, where a cast would cut it.
    let convert = format!("SELECT {expression} FROM (SELECT $1 AS {}) one", quote::ident(column));
    let body = format!(
        "DECLARE r record; converted {new}; n bigint := 0; bad bigint := 0; keys text := '';
         BEGIN
           FOR r IN {row} LOOP
             n := n + 1;
             BEGIN
               EXECUTE {} INTO converted USING r.v;
             EXCEPTION WHEN data_exception OR integrity_constraint_violation THEN
               bad := bad + 1;
               IF bad <= {EXAMPLES_MAX} THEN keys := keys || E'\\n' || r.k; END IF;
             END;
           END LOOP;
           PERFORM pg_catalog.set_config('understudy.probe', n || E'\\n' || bad || keys, false);
         END",
        quote::literal(&convert)
    );
    format!("DO {}", quote::literal(&body))
}

/// A type of [`parse`](super::parse) as SQL: its names quoted, because they may have capitals.
fn type_sql(name: &str) -> String {
    let end = name.find(['(', '[']).unwrap_or(name.len());
    let (base, rest) = name.split_at(end);
    // `character` is grammar, not the name of a type
    let quoted = if base == "character" { base.to_owned() } else { base.split('.').map(quote::ident).collect::<Vec<_>>().join(".") };
    quoted + rest
}

async fn counted(client: &Client, rows: String, bad: String) -> Result<Probe, SchemaError> {
    let failed = |error| SchemaError::server("probe the rows", error);
    let rows: i64 = client.query_one(&rows, &[]).await.map_err(failed)?.get(0);
    let keys: Vec<String> = client.query(&bad, &[]).await.map_err(failed)?.iter().map(|row| row.get(0)).collect();
    Ok(Probe { rows, failing: keys.len() as i64, examples: keys.into_iter().take(EXAMPLES_MAX).collect() })
}

/// Asks the rows about one action; `None`: there is nothing to ask, or the table was not there before.
///
/// # Errors
/// [`SchemaError::Server`]: a limit was reached, or the server refused.
pub async fn ask(client: &Client, catalog: &Catalog, action: &Action) -> Result<Option<Probe>, SchemaError> {
    let failed = |error| SchemaError::server("probe the rows", error);
    let sample = |table: &Table| format!("SELECT count(*) FROM (SELECT FROM {} LIMIT {ROWS_MAX}) s", table.qualified());
    let bad = |table: &Table, condition: &str| {
        format!("SELECT {} FROM {} t WHERE {condition} LIMIT {ROWS_MAX}", key_text(table), table.qualified())
    };
    let columns = |names: &[String]| names.iter().map(|name| format!("t.{}", quote::ident(name))).collect::<Vec<_>>();
    let exist = |table: &Table, names: &[String]| !names.is_empty() && names.iter().all(|name| table.column(name).is_some());
    client.batch_execute(LIMITS).await.map_err(failed)?;
    match action {
        Action::SetNotNull { table, column } => {
            let Some(table) = found(catalog, table).filter(|table| table.column(column).is_some()) else { return Ok(None) };
            counted(client, sample(table), bad(table, &format!("t.{} IS NULL", quote::ident(column)))).await.map(Some)
        }
        Action::Unique { table, columns: names, .. } | Action::Index { table, columns: names, unique: true, partial: false, .. } => {
            let Some(table) = found(catalog, table).filter(|table| exist(table, names)) else { return Ok(None) };
            let list = columns(names).join(", ");
            let not_null = columns(names).iter().map(|name| format!("{name} IS NOT NULL")).collect::<Vec<_>>().join(" AND ");
            let query = format!(
                "SELECT min({}) FROM {} t WHERE {not_null} GROUP BY {list} HAVING count(*) > 1 LIMIT {ROWS_MAX}",
                key_text(table),
                table.qualified()
            );
            counted(client, sample(table), query).await.map(Some)
        }
        Action::ForeignKey { table, columns: names, parent, parent_columns, valid: true } => {
            let (Some(table), Some(parent)) = (found(catalog, table), found(catalog, parent)) else { return Ok(None) };
            let key: Vec<String> = match parent_columns.is_empty() {
                true => parent.primary_key().iter().map(|name| (*name).to_owned()).collect(),
                false => parent_columns.clone(),
            };
            if !exist(table, names) || !exist(parent, &key) || key.len() != names.len() {
                return Ok(None);
            }
            let same: Vec<String> = columns(names).iter().zip(&key).map(|(own, key)| format!("{own} = p.{}", quote::ident(key))).collect();
            let not_null = columns(names).iter().map(|name| format!("{name} IS NOT NULL")).collect::<Vec<_>>().join(" AND ");
            let orphan = format!("{not_null} AND NOT EXISTS (SELECT FROM {} p WHERE {})", parent.qualified(), same.join(" AND "));
            counted(client, sample(table), bad(table, &orphan)).await.map(Some)
        }
        Action::Check { table, expression: Some(expression), valid: true } => {
            let Some(table) = found(catalog, table) else { return Ok(None) };
            counted(client, sample(table), bad(table, &format!("NOT ({expression})"))).await.map(Some)
        }
        Action::Retype { table, column, type_name, using } => {
            let Some(table) = found(catalog, table).filter(|table| table.column(column).is_some()) else { return Ok(None) };
            let expression = using.clone().unwrap_or_else(|| quote::ident(column));
            retype(client, table, column, &expression, type_name).await.map(Some)
        }
        _ => Ok(None),
    }
}

/// How many values of a column `expression` does not turn into `new`.
///
/// # Errors
/// [`SchemaError::Server`]
pub async fn retype(client: &Client, table: &Table, column: &str, expression: &str, new: &str) -> Result<Probe, SchemaError> {
    let failed = |error| SchemaError::server("probe the rows", error);
    client.batch_execute(&conversion(table, column, expression, &type_sql(new))).await.map_err(failed)?;
    let answer: String = client.query_one("SELECT pg_catalog.current_setting('understudy.probe')", &[]).await.map_err(failed)?.get(0);
    let mut lines = answer.lines();
    let mut number = || lines.next().and_then(|line| line.parse().ok()).unwrap_or(0);
    let (rows, failing) = (number(), number());
    Ok(Probe { rows, failing, examples: lines.map(str::to_owned).collect() })
}

/// Time for a probe inside the applier's transaction: the stream waits for it.
const INSIDE_LIMITS: &str = "SAVEPOINT understudy_probe; SET LOCAL statement_timeout = '2s'";

/// Asks the rows about the type change that `statements` make of `table`, inside the caller's transaction, which is afterwards as it was. `None`: they
/// change no type, or the rows could not be asked in time.
pub async fn inside_transaction(client: &Client, table: &Table, statements: &[String]) -> Option<Probe> {
    let actions = super::parse(&statements.join(";\n")).ok()?;
    let (column, type_name, using) = actions.into_iter().find_map(|(_, action)| match action {
        Action::Retype { column, type_name, using, .. } => Some((column, type_name, using)),
        _ => None,
    })?;
    let expression = using.unwrap_or_else(|| quote::ident(&column));
    client.batch_execute(INSIDE_LIMITS).await.ok()?;
    let answer = retype(client, table, &column, &expression, &type_name).await;
    // A connection that cannot take this back says so at the caller's next statement.
    client.batch_execute("ROLLBACK TO SAVEPOINT understudy_probe; RELEASE SAVEPOINT understudy_probe").await.ok()?;
    answer.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_quoted() {
        for (name, expected) in [
            ("int4", "\"int4\""),
            ("public.Mood", "\"public\".\"Mood\""),
            ("numeric(10,2)", "\"numeric\"(10,2)"),
            ("text[]", "\"text\"[]"),
            ("character(3)", "character(3)"),
        ] {
            assert_eq!(type_sql(name), expected);
        }
    }

    #[test]
    fn certainty() {
        let probe = |rows, failing| Probe { rows, failing, examples: vec![] };
        assert_eq!(probe(50, 1).certainty(), 0.0);
        assert!(probe(50, 0).certainty() > probe(0, 0).certainty());
        assert_eq!(probe(50, 1).words(), "probe: 1 of 50 rows fail");
    }
}
