//! Asks a server what a column of the same name and type teaches about values, once for each column to fill: the answer is kept on the shadow,
//! so that the same row gets the same value whenever it is asked, whatever the other column holds by then.

use super::{
    SchemaError,
    catalog::{Column, Table},
    distribution::{COUNT_MIN, Learnt},
    fill::texts,
    model::t1::type_class,
    quote,
    synthetic::Generator,
};
use tokio_postgres::Client;

/// Rows of another table that are looked at.
const SAMPLE_ROWS: usize = 10_000;
/// Values that are tried against a CHECK or a domain before any row gets one.
const TRIED_VALUES: usize = 1000;

/// Where answers are kept: beside the rows that they describe, and not in messages, proposals or our own files.
const KEPT: &str = "CREATE SCHEMA IF NOT EXISTS understudy;
CREATE TABLE IF NOT EXISTS understudy.learnt (
    schema_name text NOT NULL, table_name text NOT NULL, column_name text NOT NULL, learnt text NOT NULL,
    PRIMARY KEY (schema_name, table_name, column_name))";

/// What `sister` has in a column named and typed as `column` of `table`.
///
/// # Errors
/// [`SchemaError::Server`]
pub(super) async fn learnt(shadow: &Client, sister: &Table, table: &Table, column: &Column) -> Result<Learnt, SchemaError> {
    let what = "keep what a sister column teaches";
    let there = texts(shadow, what, "SELECT 1 WHERE to_regclass('understudy.learnt') IS NOT NULL").await?;
    let typed = format!("{} {}", column.name, column.type_name);
    let at = [&table.schema, &table.name, &typed].map(|name| quote::literal(name)).join(", ");
    if !there.is_empty() {
        let find = format!("SELECT learnt FROM understudy.learnt WHERE (schema_name, table_name, column_name) = ({at})");
        let kept = texts(shadow, what, &find).await?.pop().and_then(|mut row| row.pop()).flatten();
        if let Some(learnt) = kept.and_then(|text| serde_json::from_str(&text).ok()) {
            return Ok(learnt);
        }
    }
    let learnt = ask(shadow, sister, column).await?;
    if learnt.frequent.is_empty() && learnt.bounds.is_empty() && learnt.formats.is_empty() {
        // The other column may have more to say later.
        return Ok(learnt);
    }
    let text = serde_json::to_string(&learnt).map_err(|error| SchemaError::Catalog(error.to_string()))?;
    let insert = format!("INSERT INTO understudy.learnt VALUES ({at}, {}) ON CONFLICT DO NOTHING", quote::literal(&text));
    let keep = if there.is_empty() { format!("{KEPT}; {insert}") } else { insert };
    if let Err(error) = shadow.batch_execute(&format!("BEGIN READ WRITE; {keep}; COMMIT")).await {
        // Without the right to keep it the values follow the other column.
        shadow.batch_execute("ROLLBACK").await.map_err(|error| SchemaError::server(what, error))?;
        tracing::warn!(error = %SchemaError::server(what, error), "what a column teaches about values could not be kept on the shadow");
    }
    Ok(learnt)
}

async fn ask(shadow: &Client, sister: &Table, column: &Column) -> Result<Learnt, SchemaError> {
    let name = quote::ident(&column.name);
    let number = match type_class(&column.type_name) {
        "int" | "num" => "v::float8",
        "ts" | "date" => "extract(epoch FROM v)::float8",
        _ => "NULL::float8",
    };
    let what = "read a sister column's values";
    let parsed = |text: Option<&Option<String>>| text.cloned().flatten().and_then(|text| text.parse::<f64>().ok());
    // The first rows of a large table are its oldest ones: what ANALYZE drew at random says more, if it has been there.
    let sample = format!("SELECT v::text, {number} FROM (SELECT {name} AS v FROM {} LIMIT {SAMPLE_ROWS}) s", sister.qualified());
    let rows: Vec<_> =
        texts(shadow, what, &sample).await?.into_iter().map(|row| (row.first().cloned().flatten(), parsed(row.get(1)))).collect();
    let mut learnt = Learnt::from_sample(&rows);
    if rows.len() < SAMPLE_ROWS {
        return Ok(learnt);
    }
    let own = format!(
        "FROM pg_catalog.pg_stats WHERE schemaname = {} AND tablename = {} AND attname = {} AND NOT inherited",
        quote::literal(&sister.schema),
        quote::literal(&sister.name),
        quote::literal(&column.name)
    );
    let what = "read a sister column's statistics";
    let shares = format!(
        "SELECT null_frac, f.value, f.share FROM (SELECT null_frac, most_common_vals::text::text[] AS vals, most_common_freqs AS freqs {own}) s
         LEFT JOIN LATERAL unnest(vals, freqs) AS f (value, share) ON true"
    );
    let shares = texts(shadow, what, &shares).await?;
    let Some(nulls) = parsed(shares.first().and_then(|row| row.first())) else { return Ok(learnt) };
    let others = (1.0 - nulls).max(1e-9);
    let rows_of_sister = format!("SELECT greatest(reltuples, {SAMPLE_ROWS}) FROM pg_catalog.pg_class WHERE oid = {}::oid", sister.oid);
    let total = parsed(texts(shadow, what, &rows_of_sister).await?.first().and_then(|row| row.first())).unwrap_or(SAMPLE_ROWS as f64);
    learnt.nulls = nulls;
    learnt.frequent = shares
        .iter()
        .filter_map(|row| Some((row.get(1)?.clone()?, parsed(row.get(2))?)))
        .filter(|(_, share)| share * total >= COUNT_MIN as f64)
        .map(|(value, share)| (value, share / others))
        .collect();
    if number.starts_with("NULL") {
        return Ok(learnt);
    }
    let bounds =
        format!("SELECT {number} FROM (SELECT unnest(histogram_bounds::text::text[])::{} AS v {own}) s ORDER BY 1", column.type_name);
    let bounds: Vec<f64> =
        texts(shadow, what, &bounds).await?.iter().filter_map(|row| parsed(row.first())).filter(|bound| bound.is_finite()).collect();
    if bounds.len() > 1 {
        learnt.bounds = bounds;
    }
    Ok(learnt)
}

/// Values of the generator satisfy the column's checks and domain: asked of the server, on values alone.
///
/// # Errors
/// [`SchemaError::Server`]: it could not be asked.
pub(super) async fn fits(shadow: &Client, column: &Column, checks: &[&str], generator: &Generator) -> Result<bool, SchemaError> {
    if checks.is_empty() && column.type_kind != "d" {
        return Ok(true);
    }
    let conditions: Vec<&str> = checks
        .iter()
        .map(|check| check.trim_start_matches("CHECK ").trim_end_matches(" NOT VALID").trim_end_matches(" NO INHERIT"))
        .collect();
    let condition = if conditions.is_empty() { "true".to_owned() } else { conditions.join(" AND ") };
    let values: Vec<String> = (0..TRIED_VALUES).filter_map(|key| generator.value(&key.to_string())).collect();
    let query = format!(
        "SELECT count(*) FROM unnest($1::text[]) AS u (x), LATERAL (SELECT u.x::{} AS {}) t WHERE NOT ({condition})",
        column.type_name,
        quote::ident(&column.name)
    );
    match shadow.query_one(&query, &[&values]).await {
        Ok(row) => Ok(row.get::<_, i64>(0) == 0),
        // A value that the type, the domain or the condition refuses.
        Err(error) if error.as_db_error().is_some() => Ok(false),
        Err(error) => Err(SchemaError::server("try values against a check", error)),
    }
}
