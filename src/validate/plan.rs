//! Which tables to compare, in which order to read them, and which columns: decided from both catalogs.

use super::{Difference, DifferenceKind, TableReport, ValidateError, session::Session};
use std::collections::{BTreeMap, BTreeSet};

/// A column of one side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Column {
    pub name: String,
    /// As `format_type` writes it.
    pub sql_type: String,
    pub generated: bool,
}

/// A table of one side.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(super) struct Table {
    pub partitioned: bool,
    pub unlogged: bool,
    pub extension: bool,
    pub rows_estimated: u64,
    pub bytes: u64,
    pub columns: Vec<Column>,
    /// Primary key, else the first unique index over columns that are not null.
    pub key: Vec<String>,
}

/// By schema and name.
pub(super) type Tables = BTreeMap<(String, String), Table>;

/// How the values of a key column are ordered, on the servers and here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Both sides have an integer type.
    Integer,
    /// By the bytes of the text (`COLLATE "C"`); null first.
    Text,
    /// A type whose own order is that of its text's bytes (uuid), so that an index can give it.
    Native,
}

/// One table to compare.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub schema: String,
    pub name: String,
    /// Read first, in this order; all common columns when the table has no key.
    pub key: Vec<(String, Order)>,
    /// The table has a key: rows can be told apart.
    pub keyed: bool,
    /// The other common columns.
    pub others: Vec<String>,
    pub notes: Vec<String>,
    pub rows_estimated: u64,
    pub bytes: u64,
    pub owner_query: String,
    pub follower_query: String,
    /// As a FROM item, with `ONLY` where heirs are tables of their own.
    pub owner_from: String,
    /// Likewise.
    pub follower_from: String,
    /// Columns to write when repairing: name and the follower's type.
    pub writable: Vec<Column>,
}

/// Names, quoted.
pub(super) fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Reads one side's catalog, in the session's snapshot.
pub(super) async fn load(session: &Session) -> Result<Tables, ValidateError> {
    let fail = |error: tokio_postgres::Error| session.error("reading the catalog", &error);
    let mut tables = Tables::new();
    for row in session.client.query(TABLES, &[]).await.map_err(fail)? {
        let (key, value): ((String, String), Table) = (
            (row.get(0), row.get(1)),
            Table {
                partitioned: row.get(2),
                unlogged: row.get(3),
                extension: row.get(4),
                rows_estimated: row.get::<_, i64>(5).max(0) as u64,
                bytes: row.get::<_, i64>(6).max(0) as u64,
                columns: Vec::new(),
                key: row.get(7),
            },
        );
        tables.insert(key, value);
    }
    for row in session.client.query(COLUMNS, &[]).await.map_err(fail)? {
        if let Some(table) = tables.get_mut(&(row.get(0), row.get(1))) {
            table.columns.push(Column { name: row.get(2), sql_type: row.get(3), generated: row.get(4) });
        }
    }
    Ok(tables)
}

/// What to compare, and reports of what cannot be compared.
pub(super) fn decide(owner: &Tables, follower: &Tables, only: Option<&[String]>) -> Result<(Vec<Plan>, Vec<TableReport>), ValidateError> {
    let (mut plans, mut settled) = (Vec::new(), Vec::new());
    let names: BTreeSet<_> = owner.keys().chain(follower.keys()).collect();
    let wanted =
        |schema: &str, name: &str| only.is_none_or(|only| only.iter().any(|text| text == name || text == &format!("{schema}.{name}")));
    for text in only.unwrap_or_default() {
        if !names.iter().any(|(schema, name)| text == name || text == &format!("{schema}.{name}")) {
            return Err(ValidateError::NoSuchTable(text.clone()));
        }
    }
    for (schema, name) in names {
        if !wanted(schema, name) {
            continue;
        }
        let key = (schema.clone(), name.clone());
        match (owner.get(&key), follower.get(&key)) {
            (Some(a), _) if a.unlogged => {
                settled.push(report(&key, Some("unlogged: no feed carries its rows".into())));
            }
            (Some(a), _) if a.extension => settled.push(report(&key, Some("belongs to an extension".into()))),
            (None, Some(b)) if b.unlogged || b.extension => {}
            (Some(a), Some(b)) => match plan(schema, name, a, b) {
                Some(plan) => plans.push(plan),
                None => settled.push(report(&key, Some("the two sides have no column in common".into()))),
            },
            (Some(_), None) => settled.push(one_sided(&key, DifferenceKind::Missing)),
            (None, _) => settled.push(one_sided(&key, DifferenceKind::Extra)),
        }
    }
    // Large ones first: the last worker then has little to wait for.
    plans.sort_by_key(|plan| std::cmp::Reverse(plan.bytes));
    Ok((plans, settled))
}

pub(super) fn report((schema, name): &(String, String), skipped: Option<String>) -> TableReport {
    TableReport {
        schema: schema.clone(),
        name: name.clone(),
        rows: 0,
        seconds: 0.0,
        differences: 0,
        examples: Vec::new(),
        skipped,
        notes: Vec::new(),
        repaired: 0,
    }
}

fn one_sided(key: &(String, String), kind: DifferenceKind) -> TableReport {
    let example = Difference { kind, key: "table".into(), columns: Vec::new() };
    TableReport { differences: 1, examples: vec![example], ..report(key, None) }
}

pub(super) fn plan(schema: &str, name: &str, owner: &Table, follower: &Table) -> Option<Plan> {
    let mut notes = Vec::new();
    let other = |column: &Column| follower.columns.iter().find(|theirs| theirs.name == column.name);
    let mut common = Vec::new();
    for column in &owner.columns {
        match other(column) {
            None => notes.push(format!("column {} is only on the owner", column.name)),
            Some(theirs) => {
                if theirs.sql_type != column.sql_type {
                    let (ours, theirs) = (&column.sql_type, &theirs.sql_type);
                    notes.push(format!("column {} is {ours} on the owner and {theirs} on the follower: compared as text", column.name));
                }
                common.push((column, theirs));
            }
        }
    }
    for column in &follower.columns {
        if !owner.columns.iter().any(|ours| ours.name == column.name) {
            notes.push(format!("column {} is only on the follower", column.name));
        }
    }
    if common.is_empty() {
        return None;
    }
    let find = |name: &str| common.iter().find(|(column, _)| column.name == name).copied();
    let usable = |key: &[String]| !key.is_empty() && key.iter().all(|name| find(name).is_some());
    let chosen = [&owner.key, &follower.key].into_iter().find(|key| usable(key));
    let key: Vec<(String, Order)> = match chosen {
        Some(names) => names.iter().filter_map(|name| find(name)).map(|(a, b)| (a.name.clone(), order(a, b))).collect(),
        None => common.iter().map(|(column, _)| (column.name.clone(), Order::Text)).collect(),
    };
    let others: Vec<String> =
        common.iter().map(|(column, _)| column.name.clone()).filter(|name| !key.iter().any(|(own, _)| own == name)).collect();
    let writable = common.iter().filter(|(_, theirs)| !theirs.generated).map(|(_, theirs)| (*theirs).clone()).collect();
    let (owner_from, follower_from) = (from_clause(schema, name, owner), from_clause(schema, name, follower));
    Some(Plan {
        owner_query: select(&owner_from, &key, &others),
        follower_query: select(&follower_from, &key, &others),
        owner_from,
        follower_from,
        schema: schema.to_owned(),
        name: name.to_owned(),
        keyed: chosen.is_some(),
        key,
        others,
        notes,
        rows_estimated: owner.rows_estimated,
        bytes: owner.bytes,
        writable,
    })
}

fn order(owner: &Column, follower: &Column) -> Order {
    let integer = |column: &Column| matches!(column.sql_type.as_str(), "smallint" | "integer" | "bigint");
    match (integer(owner) && integer(follower), owner.sql_type.as_str(), follower.sql_type.as_str()) {
        (true, _, _) => Order::Integer,
        (false, "uuid", "uuid") => Order::Native,
        _ => Order::Text,
    }
}

/// A plain table's own rows only (its heirs are tables of their own); a partitioned table's rows are its partitions'.
fn from_clause(schema: &str, name: &str, table: &Table) -> String {
    format!("{}{}.{}", if table.partitioned { "" } else { "ONLY " }, quote(schema), quote(name))
}

fn select(from: &str, key: &[(String, Order)], others: &[String]) -> String {
    let selected = |(name, order): &(String, Order)| match order {
        Order::Integer | Order::Native => quote(name),
        Order::Text => format!("{}::text", quote(name)),
    };
    let columns: Vec<String> = key.iter().map(selected).chain(others.iter().map(|name| quote(name))).collect();
    let sorted = |(name, order): &(String, Order)| match order {
        Order::Integer | Order::Native => quote(name),
        Order::Text => format!("{}::text COLLATE pg_catalog.\"C\" NULLS FIRST", quote(name)),
    };
    // Names in ORDER BY that stand alone would mean the output columns, whose order is the same.
    let order_by: Vec<String> = key.iter().map(sorted).collect();
    format!("COPY (SELECT {} FROM {from} ORDER BY {}) TO STDOUT", columns.join(", "), order_by.join(", "))
}

/// Partitions are compared through their root; `understudy` is ours. A table that was never analysed is taken to have rows of
/// 100 bytes.
const TABLES: &str = "
    SELECT n.nspname::text, c.relname::text, c.relkind = 'p', c.relpersistence = 'u',
           EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass
                   AND d.objid = c.oid AND d.deptype = 'e'),
           tree.rows, tree.bytes,
           coalesce((SELECT array_agg(a.attname::text ORDER BY k.n)
            FROM (SELECT i.indkey, i.indnkeyatts FROM pg_catalog.pg_index i
                  WHERE i.indrelid = c.oid AND i.indisunique AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL
                    AND NOT EXISTS (SELECT FROM unnest(i.indkey[0:i.indnkeyatts - 1]) u(n)
                        JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum = u.n WHERE NOT a.attnotnull)
                  ORDER BY i.indisprimary DESC, i.indnkeyatts, i.indexrelid LIMIT 1) i,
                 unnest(i.indkey[0:i.indnkeyatts - 1]) WITH ORDINALITY k(attnum, n)
            JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.attnum), '{}')
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace,
    LATERAL (SELECT coalesce(sum(CASE WHEN p.reltuples < 0 THEN pg_catalog.pg_relation_size(p.oid) / 100 ELSE p.reltuples END), 0)::bigint AS rows,
                    coalesce(sum(pg_catalog.pg_relation_size(p.oid)), 0)::bigint AS bytes
             FROM pg_catalog.pg_class p
             WHERE p.oid = c.oid OR c.relkind = 'p' AND p.relkind = 'r'
                   AND p.oid IN (SELECT t.relid FROM pg_catalog.pg_partition_tree(c.oid) t)) tree
    WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relpersistence <> 't'
      AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'understudy') AND n.nspname !~ '^pg_(toast|temp)'";

const COLUMNS: &str = "
    SELECT n.nspname::text, c.relname::text, a.attname::text, pg_catalog.format_type(a.atttypid, a.atttypmod), a.attgenerated <> ''
    FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_class c ON c.oid = a.attrelid
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE a.attnum > 0 AND NOT a.attisdropped AND c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relpersistence <> 't'
      AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'understudy') AND n.nspname !~ '^pg_(toast|temp)'
    ORDER BY 1, 2, a.attnum";

#[cfg(test)]
mod tests {
    use super::*;

    fn table(columns: &[(&str, &str)], key: &[&str]) -> Table {
        let columns =
            columns.iter().map(|(name, sql_type)| Column { name: (*name).into(), sql_type: (*sql_type).into(), generated: false });
        Table { columns: columns.collect(), key: key.iter().map(|name| (*name).to_owned()).collect(), ..Table::default() }
    }

    #[test]
    fn the_key_decides_the_order() {
        let owner = table(&[("v", "text"), ("id", "integer")], &["id"]);
        let follower = table(&[("id", "bigint"), ("v", "text"), ("new", "text")], &["id"]);
        let plan = plan("s", "t", &owner, &follower).unwrap();
        assert_eq!(plan.key, [("id".to_owned(), Order::Integer)]);
        assert_eq!(plan.owner_query, r#"COPY (SELECT "id", "v" FROM ONLY "s"."t" ORDER BY "id") TO STDOUT"#);
        assert_eq!(plan.notes.len(), 2, "{:?}", plan.notes);
    }

    #[test]
    fn without_a_key_whole_rows_are_the_key() {
        let side = table(&[("a\"b", "text"), ("c", "integer")], &[]);
        let plan = plan("s", "t", &side, &side).unwrap();
        assert!(!plan.keyed && plan.others.is_empty());
        assert!(
            plan.owner_query.contains(r#"ORDER BY "a""b"::text COLLATE pg_catalog."C" NULLS FIRST, "c"::text"#),
            "{}",
            plan.owner_query
        );
    }

    #[test]
    fn a_table_on_one_side_is_a_difference() {
        let one: Tables = [(("s".to_owned(), "t".to_owned()), table(&[("a", "text")], &[]))].into();
        let (_, settled) = decide(&one, &Tables::new(), None).unwrap();
        assert_eq!(settled[0].examples[0].kind, DifferenceKind::Missing);
        let (_, settled) = decide(&Tables::new(), &one, None).unwrap();
        assert_eq!(settled[0].examples[0].kind, DifferenceKind::Extra);
        assert!(decide(&one, &one, Some(&["nope".to_owned()])).is_err());
        assert_eq!(decide(&one, &one, Some(&["s.t".to_owned()])).unwrap().0.len(), 1);
    }
}
