//! Why a statement is slower on the shadow: the plans of both sides, what differs in words, what would help. Nothing is executed:
//! plain EXPLAIN, in a read-only transaction that is rolled back. Literals were never kept, so that plans are those for any value
//! (generic plans): by `EXPLAIN (GENERIC_PLAN)` from PostgreSQL 16 on, before that by a prepared statement under
//! `plan_cache_mode = force_generic_plan`. The role is that of the url, which may have another search_path or policies than the client's.

use super::{
    commands::connect,
    managed::{Managed, ManagedShadow, lock},
};
use crate::{
    config::ServerUrl,
    monitor::{
        Comparison,
        plans::{Plan, SETTINGS, Side, TableFacts, differences, essence, hints},
    },
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, sync::Mutex, time::Duration};
use tokio_postgres::{Client, SimpleQueryMessage};

/// Longest time for both plans and what the servers know.
const PATIENCE: Duration = Duration::from_secs(10);
/// Planning takes longer than this only where something is wrong.
const SET_UP: &str = "SET statement_timeout = '5s'; SET lock_timeout = '1s'; BEGIN READ ONLY";

/// Why a statement is slower.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Finding {
    /// Fingerprint, 16 hexadecimal digits.
    pub fingerprint: String,
    /// Literals replaced, bounded.
    pub text: String,
    /// Shadow against source.
    pub comparison: Option<Comparison>,
    /// How the plans were got, or why they were not.
    pub method: String,
    /// What differs between the plans.
    pub differences: Vec<String>,
    /// What would help, likeliest first.
    pub hints: Vec<String>,
}

impl Finding {
    /// In a sentence, for an event and a table.
    pub fn describe(&self) -> String {
        let plans = if self.differences.is_empty() { self.method.clone() } else { format!("plans: {}", self.differences.join("; ")) };
        let help = if self.hints.is_empty() { String::new() } else { format!(". What would help: {}", self.hints.join("; ")) };
        format!("{plans}{help}")
    }
}

/// Looks into one statement. Never fails: what could not be asked is said in the finding.
pub(super) async fn look_into(managed: &Managed, shadow: &ManagedShadow, fingerprint: u64, text: &str, comparison: Comparison) -> Finding {
    let finding =
        Finding { fingerprint: format!("{fingerprint:016x}"), text: text.to_owned(), comparison: Some(comparison), ..Finding::default() };
    if text.ends_with('…') {
        return Finding { method: "no plan: the statement is longer than what is kept of it".into(), ..finding };
    }
    if text.contains(';') {
        return Finding { method: "no plan: several statements in one".into(), ..finding };
    }
    let there = match shadow.route.names.load().as_ref() {
        None => text.to_owned(),
        Some(names) => match names.translate(text, true) {
            Ok(there) => there,
            Err(reason) => return Finding { method: format!("no plan: {reason}"), ..finding },
        },
    };
    match tokio::time::timeout(PATIENCE, both(managed, shadow, text, &there)).await {
        Ok(Ok((method, differences, hints))) => Finding { method, differences, hints, ..finding },
        Ok(Err(reason)) => Finding { method: format!("no plan: {reason}"), ..finding },
        Err(_) => Finding { method: format!("no plan: no answer within {} s", PATIENCE.as_secs()), ..finding },
    }
}

async fn both(managed: &Managed, shadow: &ManagedShadow, here: &str, there: &str) -> Result<(String, Vec<String>, Vec<String>), String> {
    let owner = managed.database.route.load().owner.url.clone();
    let (on_owner, on_shadow) = (open(&owner).await?, open(&shadow.config.load().url).await?);
    let (source_plan, method) = explain(&on_owner, here).await.map_err(|error| format!("the source says: {error}"))?;
    let (shadow_plan, there_method) = explain(&on_shadow, there).await.map_err(|error| format!("the shadow says: {error}"))?;
    let mut relations: Vec<String> = source_plan.relations().into_iter().chain(shadow_plan.relations()).collect();
    relations.sort_unstable();
    relations.dedup();
    let hit_ratio = |health: &Mutex<super::ServerHealth>| lock(health).resources.as_ref().map(|sample| sample.cache_hit_ratio);
    let (hit_here, hit_there) = (hit_ratio(&managed.health), hit_ratio(&shadow.health));
    let source = Side { cache_hit_ratio: hit_here, ..side(&on_owner, &relations).await? };
    let target = Side { cache_hit_ratio: hit_there, ..side(&on_shadow, &relations).await? };
    let method = if method == there_method { method.to_owned() } else { format!("{method} on the source, {there_method} on the shadow") };
    let words = differences(&source_plan, &shadow_plan);
    let method = if words.is_empty() { format!("the same plan on both sides ({method})") } else { method };
    Ok((method, words, hints(Some(&source_plan), &source, &target)))
}

async fn open(url: &ServerUrl) -> Result<Client, String> {
    let client = connect(url, "understudy explain").await.map_err(|error| error.to_string())?;
    client.batch_execute(SET_UP).await.map_err(|error| detail(&error))?;
    Ok(client)
}

fn detail(error: &tokio_postgres::Error) -> String {
    error.as_db_error().map_or_else(|| error.to_string(), |error| error.message().to_owned())
}

async fn explain(client: &Client, text: &str) -> Result<(Plan, &'static str), String> {
    let version = client.query_one("SELECT current_setting('server_version_num')::int4", &[]).await.map_err(|error| detail(&error))?;
    let version: i32 = version.try_get(0).map_err(|error| error.to_string())?;
    let (statement, method) = if !text.contains('$') {
        (format!("EXPLAIN (VERBOSE, FORMAT JSON) {text}"), "plain EXPLAIN")
    } else if version >= 160_000 {
        (format!("EXPLAIN (GENERIC_PLAN, VERBOSE, FORMAT JSON) {text}"), "EXPLAIN (GENERIC_PLAN)")
    } else {
        let prepared = format!("SET LOCAL plan_cache_mode = force_generic_plan; PREPARE understudy_explain AS {text}");
        client.batch_execute(&prepared).await.map_err(|error| detail(&error))?;
        let count =
            "SELECT coalesce(array_length(parameter_types, 1), 0) FROM pg_catalog.pg_prepared_statements WHERE name = 'understudy_explain'";
        let parameters: i32 = client.query_one(count, &[]).await.and_then(|row| row.try_get(0)).map_err(|error| detail(&error))?;
        let nulls = vec!["NULL"; usize::try_from(parameters).unwrap_or(0)].join(", ");
        let call = if nulls.is_empty() { String::new() } else { format!("({nulls})") };
        (format!("EXPLAIN (VERBOSE, FORMAT JSON) EXECUTE understudy_explain{call}"), "a prepared statement's generic plan")
    };
    let answer = client.simple_query(&statement).await.map_err(|error| detail(&error))?;
    // ours, not the server's: it must not look like a setting that differs
    client.batch_execute("SET LOCAL plan_cache_mode TO DEFAULT").await.map_err(|error| detail(&error))?;
    let document = answer.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0).and_then(|text| serde_json::from_str(text).ok()),
        _ => None,
    });
    let plan = document.as_ref().and_then(Plan::parse).ok_or("its plan was not understood")?;
    Ok((plan, method))
}

async fn side(client: &Client, relations: &[String]) -> Result<Side, String> {
    const TABLES: &str = "SELECT CASE WHEN n.nspname = 'public' THEN c.relname::text ELSE n.nspname || '.' || c.relname END AS name,
            pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname), c.reltuples::float8,
            EXISTS (SELECT FROM pg_catalog.pg_stats AS s WHERE s.schemaname = n.nspname AND s.tablename = c.relname),
            coalesce(pg_catalog.pg_stat_get_mod_since_analyze(c.oid), 0)::float8, coalesce(pg_catalog.pg_stat_get_dead_tuples(c.oid), 0)::float8
        FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
        WHERE c.relkind IN ('r', 'm', 'p') AND CASE WHEN n.nspname = 'public' THEN c.relname::text ELSE n.nspname || '.' || c.relname END = ANY ($1)";
    const INDEXES: &str = "SELECT CASE WHEN n.nspname = 'public' THEN c.relname::text ELSE n.nspname || '.' || c.relname END AS name,
            i.relname::text, pg_catalog.pg_get_indexdef(x.indexrelid), x.indisvalid AND x.indisready
        FROM pg_catalog.pg_index AS x JOIN pg_catalog.pg_class AS c ON c.oid = x.indrelid JOIN pg_catalog.pg_class AS i ON i.oid = x.indexrelid
            JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
        WHERE CASE WHEN n.nspname = 'public' THEN c.relname::text ELSE n.nspname || '.' || c.relname END = ANY ($1)";
    const KNOBS: &str = "SELECT name, setting || coalesce(' (' || unit || ')', '') FROM pg_catalog.pg_settings WHERE name = ANY ($1)";
    let read = async {
        let mut tables: BTreeMap<String, TableFacts> = BTreeMap::new();
        for row in client.query(TABLES, &[&relations]).await? {
            let facts = TableFacts {
                qualified: row.try_get(1)?,
                rows: row.try_get(2)?,
                analyzed: row.try_get(3)?,
                changed: row.try_get(4)?,
                dead: row.try_get(5)?,
                indexes: BTreeMap::new(),
            };
            tables.insert(row.try_get(0)?, facts);
        }
        for row in client.query(INDEXES, &[&relations]).await? {
            if let Some(table) = tables.get_mut(row.try_get::<_, &str>(0)?) {
                table.indexes.insert(row.try_get(1)?, (row.try_get(2)?, row.try_get(3)?));
            }
        }
        let mut settings = BTreeMap::new();
        for row in client.query(KNOBS, &[&&SETTINGS[..]]).await? {
            settings.insert(row.try_get(0)?, row.try_get(1)?);
        }
        Ok::<_, tokio_postgres::Error>(Side { tables, settings, cache_hit_ratio: None })
    };
    read.await.map_err(|error| detail(&error))
}

/// What shadows of one source may differ in.
pub(super) struct Facts {
    /// Settings that change plans.
    pub settings: BTreeMap<String, String>,
    /// Table and what makes an index the same → its name.
    pub indexes: BTreeMap<String, String>,
}

/// Of a server.
pub(super) async fn facts(url: &ServerUrl) -> Result<Facts, String> {
    const INDEXES: &str = "SELECT n.nspname || '.' || c.relname, i.relname::text, pg_catalog.pg_get_indexdef(x.indexrelid)
        FROM pg_catalog.pg_index AS x JOIN pg_catalog.pg_class AS c ON c.oid = x.indrelid JOIN pg_catalog.pg_class AS i ON i.oid = x.indexrelid
            JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
        WHERE x.indisvalid AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'understudy') AND n.nspname NOT LIKE 'pg\\_%'";
    let client = open(url).await?;
    let settings = side(&client, &[]).await?.settings;
    let mut indexes = BTreeMap::new();
    for row in client.query(INDEXES, &[]).await.map_err(|error| detail(&error))? {
        let text = |column: usize| row.try_get::<_, String>(column).map_err(|error| error.to_string());
        indexes.insert(format!("{} {}", text(0)?, essence(&text(2)?)), text(1)?);
    }
    Ok(Facts { settings, indexes })
}
