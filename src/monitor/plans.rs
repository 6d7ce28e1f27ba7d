//! Two plans of one statement, and what would help the slower: in words. Pure; `control` asks the servers.
//!
//! Source: PostgreSQL documentation, "Using EXPLAIN", "Statistics Used by the Planner", "Query Planning" (settings).

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// Nodes of a plan that are looked at: more are a plan that nobody reads in words.
const NODES_MAX: usize = 200;
/// Estimates that differ by this factor are said to differ.
const ESTIMATE_FACTOR: f64 = 5.0;
/// Settings that change plans or the memory and parallelism of their execution.
pub const SETTINGS: [&str; 28] = [
    "work_mem",
    "shared_buffers",
    "effective_cache_size",
    "maintenance_work_mem",
    "hash_mem_multiplier",
    "random_page_cost",
    "seq_page_cost",
    "cpu_tuple_cost",
    "cpu_index_tuple_cost",
    "cpu_operator_cost",
    "effective_io_concurrency",
    "default_statistics_target",
    "jit",
    "jit_above_cost",
    "max_parallel_workers_per_gather",
    "max_parallel_workers",
    "parallel_setup_cost",
    "parallel_tuple_cost",
    "enable_seqscan",
    "enable_indexscan",
    "enable_indexonlyscan",
    "enable_bitmapscan",
    "enable_hashjoin",
    "enable_mergejoin",
    "enable_nestloop",
    "join_collapse_limit",
    "from_collapse_limit",
    "plan_cache_mode",
];

/// A step of a plan.
#[derive(Clone, Debug, PartialEq)]
struct Node {
    kind: String,
    relation: Option<String>,
    index: Option<String>,
    rows: f64,
}

/// A plan, flattened in the order of EXPLAIN.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    nodes: Vec<Node>,
    /// The planner's own.
    pub cost: f64,
}

impl Plan {
    /// From `EXPLAIN (VERBOSE, FORMAT JSON)`.
    pub fn parse(document: &Value) -> Option<Plan> {
        let root = document.get(0)?.get("Plan")?;
        let mut nodes = Vec::new();
        walk(root, &mut nodes);
        Some(Plan { nodes, cost: root.get("Total Cost")?.as_f64()? })
    }

    /// Names of the relations that it reads; with their schema where that is not `public`.
    pub fn relations(&self) -> BTreeSet<String> {
        self.nodes.iter().filter_map(|node| node.relation.clone()).collect()
    }

    fn access(&self) -> BTreeMap<&str, BTreeSet<String>> {
        let mut ways: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
        for node in &self.nodes {
            if let Some(relation) = &node.relation {
                let way = match &node.index {
                    Some(index) => format!("{} by {index}", node.kind),
                    None => node.kind.clone(),
                };
                ways.entry(relation).or_default().insert(way);
            }
        }
        ways
    }

    /// Joins, sorts, aggregates and what makes it parallel, in order.
    fn shape(&self) -> Vec<&str> {
        self.nodes.iter().filter(|node| node.relation.is_none() && node.index.is_none()).map(|node| node.kind.as_str()).collect()
    }

    fn rows(&self) -> f64 {
        self.nodes.first().map_or(0.0, |node| node.rows)
    }
}

fn walk(plan: &Value, nodes: &mut Vec<Node>) {
    if nodes.len() >= NODES_MAX {
        return;
    }
    let text = |key: &str| plan.get(key).and_then(Value::as_str).map(str::to_owned);
    let relation = match (text("Schema"), text("Relation Name")) {
        (Some(schema), Some(name)) if schema != "public" => Some(format!("{schema}.{name}")),
        (_, name) => name,
    };
    let mut kind = text("Node Type").unwrap_or_else(|| "step".into());
    if let Some(strategy) = text("Strategy").filter(|strategy| strategy != "Plain") {
        kind = format!("{strategy} {kind}");
    }
    // a bitmap heap scan names the relation, the bitmap index scan below it the index
    nodes.push(Node { kind, relation, index: text("Index Name"), rows: plan.get("Plan Rows").and_then(Value::as_f64).unwrap_or(0.0) });
    for child in plan.get("Plans").and_then(Value::as_array).into_iter().flatten() {
        walk(child, nodes);
    }
}

/// What the shadow's plan does otherwise than the source's. Empty: nothing.
pub fn differences(source: &Plan, shadow: &Plan) -> Vec<String> {
    let mut words = Vec::new();
    let (here, there) = (source.access(), shadow.access());
    let list = |ways: &BTreeSet<String>| ways.iter().cloned().collect::<Vec<_>>().join(" and ");
    for (relation, ways) in &here {
        match there.get(relation) {
            Some(others) if others == ways => {}
            Some(others) => words.push(format!("{relation}: {} on the source, {} on the shadow", list(ways), list(others))),
            None => words.push(format!("{relation}: {} on the source, not read on the shadow", list(ways))),
        }
    }
    for (relation, ways) in there.iter().filter(|(relation, _)| !here.contains_key(*relation)) {
        words.push(format!("{relation}: {} on the shadow, not read on the source", list(ways)));
    }
    if source.shape() != shadow.shape() {
        let shape = |plan: &Plan| if plan.shape().is_empty() { "nothing".to_owned() } else { plan.shape().join(", ") };
        words.push(format!("around the tables: {} on the source, {} on the shadow", shape(source), shape(shadow)));
    }
    if apart(source.rows(), shadow.rows()) {
        words.push(format!("rows expected: {:.0} by the source, {:.0} by the shadow", source.rows(), shadow.rows()));
    }
    words
}

fn apart(a: f64, b: f64) -> bool {
    let (a, b) = (a.max(1.0), b.max(1.0));
    a / b > ESTIMATE_FACTOR || b / a > ESTIMATE_FACTOR
}

/// What a server knows of a table.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TableFacts {
    /// By schema and name, for statements to be typed.
    pub qualified: String,
    /// `reltuples`; negative: never counted.
    pub rows: f64,
    /// Statistics exist.
    pub analyzed: bool,
    /// Rows changed since they were made.
    pub changed: f64,
    /// Dead rows.
    pub dead: f64,
    /// Name → definition behind `INDEX name`, as `pg_get_indexdef` writes it, and whether it is valid.
    pub indexes: BTreeMap<String, (String, bool)>,
}

/// What a server is set to, and knows of the tables of a plan.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Side {
    /// By relation name, as plans write it.
    pub tables: BTreeMap<String, TableFacts>,
    /// Setting → value with unit.
    pub settings: BTreeMap<String, String>,
    /// Share of pages found in shared buffers, 0 to 1.
    pub cache_hit_ratio: Option<f64>,
}

/// Of an index's definition, what must be equal to be the same: uniqueness, method, columns; not its name.
pub fn essence(definition: &str) -> String {
    let unique = definition.starts_with("CREATE UNIQUE");
    let rest = definition.split_once(" USING ").map_or(definition, |(_, rest)| rest);
    format!("{unique} {rest}")
}

/// What would help the shadow, likeliest first: missing index, stale statistics, other setting.
pub fn hints(plan: Option<&Plan>, source: &Side, shadow: &Side) -> Vec<String> {
    let mut words = Vec::new();
    let used: BTreeSet<&str> = plan.into_iter().flat_map(|plan| plan.nodes.iter().filter_map(|node| node.index.as_deref())).collect();
    let (mut likely, mut possible) = (Vec::new(), Vec::new());
    for (name, here) in &source.tables {
        let Some(there) = shadow.tables.get(name) else { continue };
        for (index, (definition, valid)) in here.indexes.iter().filter(|(_, (_, valid))| *valid) {
            let _ = valid;
            let twin = there.indexes.iter().find(|(_, (other, _))| essence(other) == essence(definition));
            match twin {
                Some((twin, (_, false))) => {
                    likely.push(format!("index {twin} on the shadow is invalid: REINDEX INDEX CONCURRENTLY {twin}"))
                }
                Some(_) => {}
                None if used.contains(index.as_str()) => likely.push(format!("missing index, which the source uses for it: {definition}")),
                None => possible.push(format!("missing index on {name}, which the source has: {definition}")),
            }
        }
        let table = if there.qualified.is_empty() { name } else { &there.qualified };
        if !there.analyzed {
            likely.push(format!("no statistics on {table}: ANALYZE {table}"));
        } else if there.changed > (there.rows.max(0.0) * 0.2).max(1_000.0) {
            likely.push(format!("stale statistics on {table} ({:.0} rows changed since): ANALYZE {table}", there.changed));
        } else if apart(here.rows, there.rows) {
            likely.push(format!(
                "{table} has {:.0} rows by the source's statistics, {:.0} by the shadow's: ANALYZE {table}",
                here.rows, there.rows
            ));
        }
        if there.dead > (there.rows.max(0.0) * 0.5).max(10_000.0) && there.dead > 2.0 * here.dead {
            possible.push(format!("{:.0} dead rows in {table} on the shadow, {:.0} on the source: VACUUM {table}", there.dead, here.dead));
        }
    }
    words.append(&mut likely);
    words.append(&mut possible);
    for name in SETTINGS {
        if let (Some(here), Some(there)) = (source.settings.get(name), shadow.settings.get(name))
            && here != there
        {
            words.push(format!("other setting: {name} is {there} on the shadow, {here} on the source"));
        }
    }
    if let (Some(here), Some(there)) = (source.cache_hit_ratio, shadow.cache_hit_ratio)
        && there + 0.02 < here
    {
        words.push(format!(
            "cold cache: {:.1} % of the pages found in it on the shadow, {:.1} % on the source",
            there * 100.0,
            here * 100.0
        ));
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn plan(node: Value) -> Plan {
        Plan::parse(&json!([{ "Plan": node }])).unwrap()
    }

    fn table(indexes: &[(&str, &str)], analyzed: bool) -> TableFacts {
        let indexes = indexes.iter().map(|(name, definition)| ((*name).to_owned(), ((*definition).to_owned(), true))).collect();
        TableFacts { qualified: "public.orders".into(), rows: 1e5, analyzed, indexes, ..TableFacts::default() }
    }

    fn side(table: TableFacts, settings: &[(&str, &str)]) -> Side {
        let settings = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Side { tables: [("orders".to_owned(), table)].into(), settings, cache_hit_ratio: None }
    }

    #[test]
    fn a_missing_index_is_seen_in_the_plans_and_named() {
        let source = plan(
            json!({"Node Type": "Index Scan", "Relation Name": "orders", "Index Name": "by_customer", "Plan Rows": 3, "Total Cost": 8.0}),
        );
        let shadow = plan(json!({"Node Type": "Gather", "Plan Rows": 3, "Total Cost": 900.0, "Plans": [
            {"Node Type": "Seq Scan", "Relation Name": "orders", "Plan Rows": 3, "Total Cost": 890.0}]}));
        let words = differences(&source, &shadow);
        assert_eq!(
            words,
            [
                "orders: Index Scan by by_customer on the source, Seq Scan on the shadow",
                "around the tables: nothing on the source, Gather on the shadow"
            ]
        );
        assert!(differences(&source, &source).is_empty());
        let definition = "CREATE INDEX by_customer ON public.orders USING btree (customer)";
        let here = side(table(&[("by_customer", definition)], true), &[("work_mem", "64MB")]);
        let there = side(table(&[], true), &[("work_mem", "4MB")]);
        assert_eq!(
            hints(Some(&source), &here, &there),
            [
                format!("missing index, which the source uses for it: {definition}"),
                "other setting: work_mem is 4MB on the shadow, 64MB on the source".into()
            ]
        );
        // the same index under another name is the same index
        let renamed = side(table(&[("x", "CREATE INDEX x ON public.orders USING btree (customer)")], true), &[]);
        assert!(hints(Some(&source), &here, &renamed).is_empty());
    }

    #[test]
    fn statistics_invalid_indexes_and_cold_caches() {
        let definition = "CREATE INDEX i ON public.orders USING btree (id)";
        let here = Side { cache_hit_ratio: Some(0.99), ..side(table(&[("i", definition)], true), &[]) };
        let mut there = Side { cache_hit_ratio: Some(0.7), ..side(table(&[("i", definition)], false), &[]) };
        there.tables.get_mut("orders").unwrap().indexes.get_mut("i").unwrap().1 = false;
        let words = hints(None, &here, &there).join("\n");
        for expected in ["REINDEX INDEX CONCURRENTLY i", "ANALYZE public.orders", "cold cache: 70.0 %"] {
            assert!(words.contains(expected), "{expected}: {words}");
        }
        let stale = TableFacts { changed: 50_000.0, ..table(&[("i", definition)], true) };
        assert!(hints(None, &here, &side(stale, &[])).join("").contains("stale statistics"));
        let fewer = TableFacts { rows: 10.0, ..table(&[("i", definition)], true) };
        assert!(hints(None, &here, &side(fewer, &[])).join("").contains("10 by the shadow"));
    }
}
