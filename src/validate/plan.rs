//! Which tables to compare, in which order to read them, and which columns: decided from both catalogs.

use super::{Difference, DifferenceKind, TableReport, ValidateError, session::Session};
use crate::schema::mapping::{Place, Rules};
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
    /// Columns to write when repairing.
    pub writable: Vec<Writable>,
    /// The follower's table, and its names of the key's columns.
    pub follower_table: (String, String),
    pub follower_key: Vec<String>,
}

/// A column that a repair writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Writable {
    /// The owner's value as SQL.
    pub value: String,
    /// The follower's name and type.
    pub name: String,
    pub sql_type: String,
}

/// Names, quoted.
pub(super) fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// [`load`] in a session's snapshot, without keeping the locks that it takes: `pg_partition_tree()` locks every partition until its
/// transaction ends, and DETACH and DROP would wait as long as a comparison takes.
pub(super) async fn load_in_snapshot(session: &Session) -> Result<Tables, ValidateError> {
    session.run("reading the catalog", "SAVEPOINT catalog").await?;
    let tables = load(session).await?;
    session.run("reading the catalog", "ROLLBACK TO catalog; RELEASE catalog").await?;
    Ok(tables)
}

/// Reads one side's catalog.
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

/// What to compare, and reports of what cannot be compared. `mapping`: where the owner's tables and columns are on the follower.
pub(super) fn decide(
    owner: &Tables,
    follower: &Tables,
    only: Option<&[String]>,
    mapping: &Mapping<'_>,
) -> Result<(Vec<Plan>, Vec<TableReport>), ValidateError> {
    let (mut plans, mut settled) = (Vec::new(), Vec::new());
    let taken: BTreeSet<(String, String)> =
        owner.keys().filter_map(|key| mapping.place(key)).map(|place| (place.schema.clone(), place.table.clone())).collect();
    let names: BTreeSet<_> = owner.keys().chain(follower.keys().filter(|key| !taken.contains(*key))).collect();
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
        let place = mapping.place(&key);
        let there = place.map_or_else(|| key.clone(), |place| (place.schema.clone(), place.table.clone()));
        match (owner.get(&key), follower.get(&there).filter(|_| owner.contains_key(&key) || !taken.contains(&key))) {
            (Some(_), _) if place.is_some_and(|place| place.left_out) => {
                settled.push(report(&key, Some("left out on the other side by the mapping".into())));
            }
            (None, Some(_)) if mapping.rules.existing => {
                settled.push(report(&key, Some("only on the side whose schema differs on purpose".into())));
            }
            (Some(_), None) if mapping.rules.existing && mapping.back => {
                settled.push(report(&key, Some("only on the side whose schema differs on purpose".into())));
            }
            (Some(a), _) if a.unlogged => {
                settled.push(report(&key, Some("unlogged: no feed carries its rows".into())));
            }
            (Some(a), _) if a.extension => settled.push(report(&key, Some("belongs to an extension".into()))),
            (None, Some(b)) if b.unlogged || b.extension => {}
            (Some(a), Some(b)) => match plan(&key, &there, a, b, mapping) {
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

/// A column of both sides: the owner's, the follower's, and the owner's value as the follower has it.
type Pair<'a> = (&'a Column, &'a Column, String);

/// A type that every server knows, so that a value can be cast to it anywhere.
fn builtin(sql_type: &str) -> bool {
    sql_type.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b" (),[]".contains(&byte))
}

fn pairs<'a>(
    key: &(String, String),
    owner: &'a Table,
    follower: &'a Table,
    mapping: &Mapping<'_>,
    notes: &mut Vec<String>,
) -> Vec<Pair<'a>> {
    let place = mapping.place(key);
    let mut common: Vec<Pair<'a>> = Vec::new();
    for column in &owner.columns {
        let goes = place.map(|place| place.column(&column.name));
        let name = goes.as_ref().map_or(Some(column.name.as_str()), |goes| goes.name);
        let Some(theirs) = name.and_then(|name| follower.columns.iter().find(|theirs| theirs.name == name)) else {
            notes.push(format!("column {} is only on the owner", column.name));
            continue;
        };
        let mut value = quote(&column.name);
        if let Some(expression) = goes.and_then(|goes| goes.using) {
            notes.push(format!("column {} is computed on the follower: compared with the expression's value on the owner", column.name));
            value = format!("({expression})");
        }
        if theirs.sql_type != column.sql_type {
            // Where types differ on purpose, the value is what the follower's type makes of it.
            let cast = mapping.rules.existing && builtin(&theirs.sql_type);
            let how = if cast { "compared as that type" } else { "compared as text" };
            let (ours, to) = (&column.sql_type, &theirs.sql_type);
            notes.push(format!("column {} is {ours} on the owner and {to} on the follower: {how}", column.name));
            if cast {
                value = format!("({value})::{to}");
            }
        }
        common.push((column, theirs, value));
    }
    common
}

pub(super) fn plan(
    names: &(String, String),
    there: &(String, String),
    owner: &Table,
    follower: &Table,
    mapping: &Mapping<'_>,
) -> Option<Plan> {
    let (schema, name) = names;
    let mut notes = Vec::new();
    let common = pairs(names, owner, follower, mapping, &mut notes);
    for column in &follower.columns {
        if !common.iter().any(|(_, theirs, _)| theirs.name == column.name) {
            notes.push(format!("column {} is only on the follower", column.name));
        }
    }
    if common.is_empty() {
        return None;
    }
    let ours = |name: &str| common.iter().find(|(column, ..)| column.name == name);
    let theirs = |name: &str| common.iter().find(|(_, column, _)| column.name == name);
    // A unique key of either side, by the columns of that side.
    let by_owner: Option<Vec<&Pair<'_>>> = owner.key.iter().map(|name| ours(name)).collect();
    let by_follower: Option<Vec<&Pair<'_>>> = follower.key.iter().map(|name| theirs(name)).collect();
    let chosen = [by_owner, by_follower].into_iter().flatten().find(|key| !key.is_empty());
    let ordered = |pair: &Pair<'_>| match mapping.place(names).and_then(|place| place.column(&pair.0.name).using) {
        None => order(pair.0, pair.1),
        Some(_) => Order::Text,
    };
    let keyed: Vec<(&Pair<'_>, Order)> = match &chosen {
        Some(pairs) => pairs.iter().map(|pair| (*pair, ordered(pair))).collect(),
        None => common.iter().map(|pair| (pair, Order::Text)).collect(),
    };
    let rest: Vec<&Pair<'_>> = common.iter().filter(|pair| !keyed.iter().any(|(key, _)| key.0.name == pair.0.name)).collect();
    let writable = common.iter().filter(|(_, theirs, _)| !theirs.generated).map(|(_, theirs, value)| Writable {
        value: value.clone(),
        name: theirs.name.clone(),
        sql_type: theirs.sql_type.clone(),
    });
    let writable = writable.collect();
    let (owner_from, follower_from) = (from_clause(schema, name, owner), from_clause(&there.0, &there.1, follower));
    let query = |from: &str, value: &dyn Fn(&Pair<'_>) -> String| {
        let key: Vec<(String, Order)> = keyed.iter().map(|(pair, order)| (value(pair), *order)).collect();
        select(from, &key, &rest.iter().map(|pair| value(pair)).collect::<Vec<_>>())
    };
    let key: Vec<(String, Order)> = keyed.iter().map(|(pair, order)| (pair.0.name.clone(), *order)).collect();
    let others: Vec<String> = rest.iter().map(|pair| pair.0.name.clone()).collect();
    Some(Plan {
        owner_query: query(&owner_from, &|pair| pair.2.clone()),
        follower_query: query(&follower_from, &|pair| quote(&pair.1.name)),
        follower_table: there.clone(),
        follower_key: keyed.iter().map(|(pair, _)| pair.1.name.clone()).collect(),
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

/// Where the owner's tables and columns are on the follower.
pub(super) struct Mapping<'a> {
    pub rules: &'a Rules,
    /// The owner is the shadow.
    pub back: bool,
}

impl Mapping<'_> {
    fn place(&self, key: &(String, String)) -> Option<&Place> {
        self.rules.place(self.back, &key.0, &key.1)
    }
}

/// A plain table's own rows only (its heirs are tables of their own); a partitioned table's rows are its partitions'.
fn from_clause(schema: &str, name: &str, table: &Table) -> String {
    format!("{}{}.{}", if table.partitioned { "" } else { "ONLY " }, quote(schema), quote(name))
}

/// Values are SQL.
fn select(from: &str, key: &[(String, Order)], others: &[String]) -> String {
    let selected = |(value, order): &(String, Order)| match order {
        Order::Integer | Order::Native => value.clone(),
        Order::Text => format!("{value}::text"),
    };
    let columns: Vec<String> = key.iter().map(selected).chain(others.iter().cloned()).collect();
    let sorted = |(value, order): &(String, Order)| match order {
        Order::Integer | Order::Native => value.clone(),
        Order::Text => format!("{value}::text COLLATE pg_catalog.\"C\" NULLS FIRST"),
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
    use crate::schema::mapping::Rule;

    fn table(columns: &[(&str, &str)], key: &[&str]) -> Table {
        let columns =
            columns.iter().map(|(name, sql_type)| Column { name: (*name).into(), sql_type: (*sql_type).into(), generated: false });
        Table { columns: columns.collect(), key: key.iter().map(|name| (*name).to_owned()).collect(), ..Table::default() }
    }

    fn planned(owner: &Table, follower: &Table) -> Plan {
        let name = ("s".to_owned(), "t".to_owned());
        plan(&name, &name, owner, follower, &Mapping { rules: &Rules::default(), back: false }).unwrap()
    }

    #[test]
    fn a_mapped_table_is_read_under_its_names() {
        let rule = Rule {
            source: "s.t".into(),
            shadow: "x.u".into(),
            columns: [("v", "w"), ("gone", "")].map(|(a, b)| (a.to_owned(), b.to_owned())).into(),
            using: [("at".to_owned(), "at AT TIME ZONE 'UTC'".to_owned())].into(),
            ..Rule::default()
        };
        let rules = Rules::new(true, &[rule]);
        let owner =
            table(&[("id", "integer"), ("v", "character varying(9)"), ("gone", "text"), ("at", "timestamp without time zone")], &["id"]);
        let follower = table(&[("id", "bigint"), ("w", "text"), ("at", "timestamp with time zone")], &["id"]);
        let (here, there) = (("s".to_owned(), "t".to_owned()), ("x".to_owned(), "u".to_owned()));
        let plan = plan(&here, &there, &owner, &follower, &Mapping { rules: &rules, back: false }).unwrap();
        assert_eq!(
            plan.owner_query,
            "COPY (SELECT (\"id\")::bigint, (\"v\")::text, ((at AT TIME ZONE 'UTC'))::timestamp with time zone FROM ONLY \"s\".\"t\" ORDER BY \
             (\"id\")::bigint) TO STDOUT"
        );
        assert_eq!(plan.follower_query, r#"COPY (SELECT "id", "w", "at" FROM ONLY "x"."u" ORDER BY "id") TO STDOUT"#);
        let (owners, followers): (Tables, Tables) = ([(here.clone(), owner)].into(), [(there, follower)].into());
        let (plans, settled) = decide(&owners, &followers, None, &Mapping { rules: &rules, back: false }).unwrap();
        assert_eq!((plans.len(), settled.len()), (1, 0), "{settled:?}");
        let (plans, settled) = decide(&followers, &owners, None, &Mapping { rules: &rules, back: true }).unwrap();
        assert_eq!((plans.len(), settled.len()), (1, 0), "{settled:?}");
        assert_eq!(plans[0].follower_table, here);
    }

    #[test]
    fn the_key_decides_the_order() {
        let owner = table(&[("v", "text"), ("id", "integer")], &["id"]);
        let follower = table(&[("id", "bigint"), ("v", "text"), ("new", "text")], &["id"]);
        let plan = planned(&owner, &follower);
        assert_eq!(plan.key, [("id".to_owned(), Order::Integer)]);
        assert_eq!(plan.owner_query, r#"COPY (SELECT "id", "v" FROM ONLY "s"."t" ORDER BY "id") TO STDOUT"#);
        assert_eq!(plan.notes.len(), 2, "{:?}", plan.notes);
    }

    #[test]
    fn without_a_key_whole_rows_are_the_key() {
        let side = table(&[("a\"b", "text"), ("c", "integer")], &[]);
        let plan = planned(&side, &side);
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
        let rules = Rules::default();
        let same = Mapping { rules: &rules, back: false };
        let (_, settled) = decide(&one, &Tables::new(), None, &same).unwrap();
        assert_eq!(settled[0].examples[0].kind, DifferenceKind::Missing);
        let (_, settled) = decide(&Tables::new(), &one, None, &same).unwrap();
        assert_eq!(settled[0].examples[0].kind, DifferenceKind::Extra);
        assert!(decide(&one, &one, Some(&["nope".to_owned()]), &same).is_err());
        assert_eq!(decide(&one, &one, Some(&["s.t".to_owned()]), &same).unwrap().0.len(), 1);
    }
}
