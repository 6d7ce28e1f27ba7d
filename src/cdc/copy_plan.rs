//! What there is to copy: each published table as a unit, its rows as parts (partitions, and ranges of pages of what is big), and
//! the two COPY commands of each part.
//!
//! A unit is copied at one snapshot, whole or not at all: that is the granule of resuming.

use super::{
    CdcError, FeedSpec,
    copy::PARTITIONS,
    error::Attempt,
    mapped,
    names::{ident, qualified},
    shared::TableName,
};
use std::collections::BTreeSet;
use tokio_postgres::{Client, Statement};

/// From this size on a table is split, if there is more than one worker: below it one worker is done before a second has begun.
const SPLIT_BYTES_MIN: i64 = 256 << 20;

/// Size of a part of a split table: small enough that the workers end together, large enough that beginning one costs nothing.
const PART_BYTES: i64 = 128 << 20;

/// Most parts of a table.
const PARTS_MAX: i64 = 256;

/// From this size on a table is loaded frozen, which needs a TRUNCATE of its own: below it that costs more than it saves.
const FREEZE_BYTES_MIN: i64 = 1 << 20;

/// Rows assumed per 8-kB page where there are no statistics.
const ROWS_PER_PAGE_GUESS: i64 = 50;

const PAGE_BYTES: i64 = 8192;

/// Base types whose binary form is the same in all majors and means the same on every server: no oids in it (as in regclass), no
/// settings (money), no versions of an extension. Their arrays (`typarray` is as fixed as they are) count as well.
const BINARY: &[&str] = &[
    "bool",
    "bytea",
    "char",
    "name",
    "int8",
    "int2",
    "int4",
    "text",
    "oid",
    "json",
    "jsonb",
    "float4",
    "float8",
    "uuid",
    "bpchar",
    "varchar",
    "date",
    "time",
    "timestamp",
    "timestamptz",
    "timetz",
    "numeric",
    "inet",
    "cidr",
    "macaddr",
    "macaddr8",
    "bit",
    "varbit",
    "point",
    "lseg",
    "path",
    "box",
    "polygon",
    "circle",
    "line",
];

/// `interval` got infinities in 17, which an older server would take in binary form for ordinary values.
const INTERVAL_INFINITE: u32 = 170_000;

/// A published table.
#[derive(Clone, Debug)]
pub(super) struct Unit {
    pub table: TableName,
    /// How many parts it has.
    pub parts: usize,
}

/// Rows that one COPY carries.
#[derive(Clone, Debug)]
pub(super) struct Part {
    /// Index of its unit.
    pub unit: usize,
    pub number: usize,
    /// The table whose rows these are: the unit's own, or a partition.
    pub name: String,
    pub oid: u32,
    /// What it looked like at the snapshot: storage and columns.
    pub look: String,
    pub bytes: i64,
    pub out: String,
    pub into: String,
    /// Emptied in the loading transaction first, so that its rows can be stored frozen.
    pub freeze: bool,
}

/// Everything to copy, parts by size, largest first.
#[derive(Debug, Default)]
pub(super) struct CopyPlan {
    pub units: Vec<Unit>,
    pub parts: Vec<Part>,
    pub rows_estimated: u64,
}

/// Storage and columns of a relation: what must not have changed between the snapshot and the reading of its rows, because a
/// table that was rewritten or truncated meanwhile looks empty to the older snapshot (PostgreSQL documentation, "Caveats" of MVCC).
const LOOK: &str = "c.relfilenode::text || ' ' || coalesce((SELECT string_agg(concat_ws(' ', a.attnum, a.attname, a.atttypid, a.atttypmod), ',' ORDER BY a.attnum)
    FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped), '')";

/// Prepares [`look`].
pub(super) async fn prepare_look(client: &Client) -> Result<Statement, CdcError> {
    client.prepare(&format!("SELECT {LOOK} FROM pg_class c WHERE c.oid = $1")).await.attempt("look at a table that is being copied")
}

/// A relation's present look; `None`: it is gone.
pub(super) async fn look(client: &Client, prepared: &Statement, oid: u32) -> Result<Option<String>, CdcError> {
    let row = client.query_opt(prepared, &[&oid]).await.attempt("look at a table that is being copied")?;
    Ok(row.map(|row| row.get(0)))
}

/// Lists the tables of the feed (`None`: every table that one would have) as the snapshot of `keeper` sees them, without those in `done`.
pub(super) async fn make(
    keeper: &Client,
    spec: &FeedSpec,
    feed: Option<&str>,
    versions: (u32, u32),
    done: &BTreeSet<TableName>,
) -> Result<CopyPlan, CdcError> {
    let rows = keeper
        .query(
            &format!(
                "SELECT n.nspname::text, c.relname::text, ln.nspname::text, l.relname::text, l.oid, {},
                        coalesce(pg_table_size(l.oid), 0)::int8, coalesce(pg_relation_size(l.oid), 0)::int8 / {PAGE_BYTES},
                        CASE WHEN l.reltuples >= 0 AND l.relpages > 0 THEN l.reltuples::int8
                             ELSE coalesce(pg_relation_size(l.oid), 0) / {PAGE_BYTES} * {ROWS_PER_PAGE_GUESS} END::int8,
                        coalesce(am.amname = 'heap', false),
                        (SELECT array_agg(a.attname::text ORDER BY a.attnum) FROM pg_attribute a
                         WHERE a.attrelid = l.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''),
                        (SELECT array_agg(CASE WHEN tn.nspname <> 'pg_catalog' AND e.typtype <> 'e' THEN '?'
                                               WHEN e.typtype = 'e' THEN CASE WHEN e.oid = t.oid THEN 'bool' ELSE '?' END
                                               ELSE e.typname END::text)
                         FROM pg_attribute a JOIN pg_type d ON d.oid = a.atttypid
                         JOIN pg_type t ON t.oid = CASE WHEN d.typtype = 'd' THEN d.typbasetype ELSE d.oid END
                         JOIN pg_type e ON e.oid = CASE WHEN t.typcategory = 'A' AND t.typelem <> 0 AND t.typlen = -1 THEN t.typelem ELSE t.oid END
                         JOIN pg_namespace tn ON tn.oid = e.typnamespace
                         WHERE a.attrelid = l.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '')
                 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                 LEFT JOIN LATERAL {PARTITIONS} x ON EXISTS (SELECT FROM pg_class k WHERE k.oid = x.oid AND k.relkind IN ('r', 'f'))
                 LEFT JOIN pg_class l ON l.oid = x.oid AND l.relkind = 'r' LEFT JOIN pg_namespace ln ON ln.oid = l.relnamespace
                 LEFT JOIN pg_am am ON am.oid = l.relam
                 WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relpersistence = 'p' AND n.nspname NOT IN ('information_schema', 'understudy')
                   AND n.nspname !~ '^pg_' AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
                   AND ($1::text IS NULL OR EXISTS (SELECT FROM pg_publication_rel p JOIN pg_publication pub ON pub.oid = p.prpubid
                        WHERE p.prrelid = c.oid AND pub.pubname = $1))
                 ORDER BY 1, 2, 3, 4",
                LOOK.replace("c.", "l.")
            ),
            &[&feed],
        )
        .await
        .attempt("list the tables to copy")?;
    let mut plan = CopyPlan::default();
    let (rules, workers) = (spec.rules.load_full(), spec.copy.workers);
    for row in &rows {
        let table: TableName = (row.get(0), row.get(1));
        if done.contains(&table) || mapped::left_out(&rules, &table) {
            continue;
        }
        if plan.units.last().is_none_or(|unit| unit.table != table) {
            plan.units.push(Unit { table, parts: 0 });
        }
        let Some(oid) = row.get::<_, Option<u32>>(4) else { continue };
        let unit = plan.units.len() - 1;
        let name = qualified(row.get(2), row.get(3));
        let (bytes, pages, heap): (i64, i64, bool) = (row.get(6), row.get(7), row.get(9));
        plan.rows_estimated += row.get::<_, i64>(8).max(0) as u64;
        let columns = row.get::<_, Option<Vec<String>>>(10).unwrap_or_default();
        let types = row.get::<_, Option<Vec<String>>>(11).unwrap_or_default();
        let list = columns.iter().map(|c| ident(c)).collect::<Vec<_>>().join(", ");
        // A table without columns still has a number of rows, which only the text form knows.
        let binary = !columns.is_empty() && types.iter().all(|name| binary(name, versions));
        let format = if binary { " WITH (FORMAT binary)" } else { "" };
        let named = if columns.is_empty() { name.clone() } else { format!("{name} ({list})") };
        let split = workers > 1 && heap && !columns.is_empty() && bytes >= SPLIT_BYTES_MIN;
        let count = if split { ((bytes + PART_BYTES - 1) / PART_BYTES).clamp(1, PARTS_MAX.min(pages.max(1))) } else { 1 };
        let freeze = !split && !rules.existing && bytes >= FREEZE_BYTES_MIN;
        let into = match (freeze, binary) {
            (true, true) => format!("COPY {named} FROM STDIN WITH (FORMAT binary, FREEZE)"),
            (true, false) => format!("COPY {named} FROM STDIN WITH (FREEZE)"),
            (false, _) => format!("COPY {named} FROM STDIN{format}"),
        };
        for range in 0..count {
            // Pages that came behind the last one since belong to the last range.
            let from = format!("ctid >= '({},0)'", pages * range / count);
            let to = if range + 1 < count { format!(" AND ctid < '({},0)'", pages * (range + 1) / count) } else { String::new() };
            let (out, into) = if let (true, Some(unit)) = (rules.existing, plan.units.get(unit)) {
                let limits = if count == 1 { String::new() } else { format!(" WHERE {from}{to}") };
                mapped::copy_commands(&rules, spec.direction, &unit.table, &format!("ONLY {name}"), &columns, &limits)
            } else if count == 1 {
                (format!("COPY {named} TO STDOUT{format}"), into.clone())
            } else {
                (format!("COPY (SELECT {list} FROM ONLY {name} WHERE {from}{to}) TO STDOUT{format}"), into.clone())
            };
            let number = plan.units.get(unit).map_or(0, |unit| unit.parts);
            plan.parts.push(Part { unit, number, name: name.clone(), oid, look: row.get(5), bytes: bytes / count, out, into, freeze });
            if let Some(unit) = plan.units.get_mut(unit) {
                unit.parts += 1;
            }
        }
    }
    plan.parts.sort_by_key(|part| std::cmp::Reverse(part.bytes));
    Ok(plan)
}

/// Whether a column of this base type may travel in binary form between servers of these versions.
fn binary(name: &str, (from, to): (u32, u32)) -> bool {
    match name {
        "interval" => (from >= INTERVAL_INFINITE) == (to >= INTERVAL_INFINITE),
        name => BINARY.contains(&name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_means_another_thing_elsewhere_travels_as_text() {
        for (name, versions, expected) in [
            ("int4", (150_000, 180_000), true),
            ("regclass", (150_000, 150_000), false),
            ("money", (150_000, 150_000), false),
            ("tsvector", (150_000, 180_000), false),
            ("interval", (150_000, 180_000), false),
            ("interval", (180_000, 140_000), false),
            ("interval", (140_000, 150_000), true),
            ("interval", (170_000, 180_000), true),
            ("?", (150_000, 150_000), false),
        ] {
            assert_eq!(binary(name, versions), expected, "{name} {versions:?}");
        }
    }
}
