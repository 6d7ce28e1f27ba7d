//! `SHOW WHAT IF`: the shadows of one source beside each other. Each was given copies of the same traffic; what differs is what was tried:
//! other indexes, settings, versions.

use super::{
    Controller, explain,
    managed::{Managed, ManagedShadow, lock},
    show::table,
};
use crate::{
    console::Answer,
    monitor::{ResourceSample, StatementProfile},
};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// Statements shown per database, costliest first.
const STATEMENTS_MAX: usize = 50;
/// Indexes and settings shown per database.
const OBJECTS_MAX: usize = 100;

/// How much slower (above 1) or faster a shadow is for the statements that all shadows have run, weighted by the source's time for them.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Mix {
    ratio: f64,
    low: f64,
    high: f64,
}

/// Over the statements that every shadow has enough pairs of. Empty: there is none.
fn mixes(shadows: &[BTreeMap<u64, StatementProfile>]) -> Vec<Mix> {
    let Some(first) = shadows.first() else { return Vec::new() };
    let comparison = |shadow: &BTreeMap<u64, StatementProfile>, key: &u64| shadow.get(key).and_then(|statement| statement.comparison);
    let common: Vec<(u64, f64)> = first
        .iter()
        .filter(|(key, _)| shadows.iter().all(|shadow| comparison(shadow, key).is_some()))
        .map(|(key, statement)| (*key, statement.source.count as f64 * statement.source.p50_us.max(1) as f64))
        .collect();
    let all: f64 = common.iter().map(|(_, weight)| weight).sum();
    if all <= 0.0 {
        return Vec::new();
    }
    let mix = |shadow: &BTreeMap<u64, StatementProfile>| {
        common.iter().filter_map(|(key, weight)| Some((comparison(shadow, key)?, weight / all))).fold(
            Mix { ratio: 0.0, low: 0.0, high: 0.0 },
            |sum, (found, weight)| Mix {
                ratio: sum.ratio + weight * found.ratio,
                low: sum.low + weight * found.low,
                high: sum.high + weight * found.high,
            },
        )
    };
    shadows.iter().map(mix).collect()
}

/// Which is fastest, if the intervals say so.
fn fastest(names: &[String], mixes: &[Mix]) -> Option<String> {
    let mut order: Vec<(&String, &Mix)> = names.iter().zip(mixes).collect();
    order.sort_by(|a, b| a.1.ratio.total_cmp(&b.1.ratio));
    let [(name, best), (next, second), ..] = order.as_slice() else { return None };
    let beyond = best.high < second.low;
    Some(if beyond {
        format!(
            "{name} is the fastest for this traffic: {:.2} times the source's latency ({:.2} to {:.2}), {next} {:.2} times",
            best.ratio, best.low, best.high, second.ratio
        )
    } else {
        format!(
            "{name} ({:.2} times the source's latency) and {next} ({:.2} times) are as fast as each other, as far as is known",
            best.ratio, second.ratio
        )
    })
}

struct Rows {
    database: String,
    /// All shadows of the file; those of other databases stay empty.
    columns: Vec<String>,
    rows: Vec<Vec<Value>>,
}

impl Rows {
    fn add(&mut self, section: &str, what: impl Into<String>, source: Value, by_shadow: &BTreeMap<String, Value>) {
        let mut values = vec![json!(self.database), json!(section), json!(what.into()), source];
        values.extend(self.columns.iter().map(|name| by_shadow.get(name).cloned().unwrap_or(Value::Null)));
        self.rows.push(values);
    }
}

impl Controller {
    pub(super) async fn show_what_if(&self) -> Answer {
        let columns: Vec<String> = self.databases.iter().flat_map(|managed| &managed.shadows).map(|shadow| shadow.name()).collect();
        let mut heads: Vec<String> = ["database", "section", "what", "source"].map(String::from).to_vec();
        heads.extend(columns.iter().cloned());
        let (mut rows, mut notices) = (Vec::new(), Vec::new());
        for managed in &self.databases {
            let mut of_database = Rows { database: managed.database.name.clone(), columns: columns.clone(), rows: Vec::new() };
            notices.extend(compare(managed, &mut of_database).await);
            rows.append(&mut of_database.rows);
        }
        let heads: Vec<&str> = heads.iter().map(String::as_str).collect();
        Answer { notices, ..table(&heads, rows) }
    }
}

async fn compare(managed: &Managed, rows: &mut Rows) -> Option<String> {
    let names: Vec<String> = managed.shadows.iter().map(|shadow| shadow.name()).collect();
    let by_shadow = |value: &dyn Fn(&ManagedShadow) -> Value| -> BTreeMap<String, Value> {
        managed.shadows.iter().map(|shadow| (shadow.name(), value(shadow))).collect()
    };
    let profiles: Vec<BTreeMap<u64, StatementProfile>> = managed
        .shadows
        .iter()
        .map(|shadow| {
            shadow.route.observations.profile.statements().into_iter().map(|statement| (statement.fingerprint, statement)).collect()
        })
        .collect();
    let mixes = mixes(&profiles);
    if !mixes.is_empty() {
        let part = |part: fn(&Mix) -> f64| {
            names.iter().zip(&mixes).map(|(name, mix)| (name.clone(), round(part(mix)))).collect::<BTreeMap<_, _>>()
        };
        rows.add("traffic", "latency against the source, all statements that every shadow has run", json!(1.0), &part(|mix| mix.ratio));
        rows.add("traffic", "… at least", json!(1.0), &part(|mix| mix.low));
        rows.add("traffic", "… at most", json!(1.0), &part(|mix| mix.high));
    }
    let seen =
        |value: fn(&crate::traffic::observations::Observations) -> u64| by_shadow(&move |shadow| json!(value(&shadow.route.observations)));
    rows.add("answers", "same", Value::Null, &seen(|seen| seen.same.get()));
    rows.add("answers", "different", Value::Null, &seen(|seen| seen.different.get()));
    rows.add("answers", "undecided", Value::Null, &seen(|seen| seen.undecided.get()));
    rows.add("answers", "errors", Value::Null, &seen(|seen| seen.compare_errors.get()));
    rows.add("writes", "rehearsed transactions", Value::Null, &seen(|seen| seen.rehearsed.get()));
    rows.add("writes", "errors and other row counts", Value::Null, &seen(|seen| seen.rehearsal_errors.get() + seen.tag_mismatches.get()));
    type Figure = fn(&ResourceSample) -> Value;
    let figures: [(&str, Figure); 8] = [
        ("server version", |sample| json!(sample.server_version_num)),
        ("database bytes", |sample| json!(sample.database_bytes)),
        ("active sessions", |sample| json!(sample.active)),
        ("processor cores in use", |sample| json!(sample.cpu_cores.map(|cores| (cores * 100.0).round() / 100.0))),
        ("cache hit ratio", |sample| round(sample.cache_hit_ratio)),
        ("pages read per second", |sample| round(sample.blocks_read_per_s)),
        ("temporary bytes per second", |sample| round(sample.temp_bytes_per_s)),
        ("dead rows ratio", |sample| round(sample.dead_rows_ratio)),
    ];
    for (what, figure) in figures {
        let source = lock(&managed.health).resources.as_ref().map_or(Value::Null, figure);
        rows.add("server", what, source, &by_shadow(&move |shadow| lock(&shadow.health).resources.as_ref().map_or(Value::Null, figure)));
    }
    let mut costs: BTreeMap<u64, u64> = BTreeMap::new();
    for statement in profiles.iter().flat_map(BTreeMap::values) {
        *costs.entry(statement.fingerprint).or_default() += statement.total_us;
    }
    let mut order: Vec<(u64, u64)> = costs.into_iter().map(|(fingerprint, cost)| (cost, fingerprint)).collect();
    order.sort_unstable_by(|a, b| b.cmp(a));
    for (_, fingerprint) in order.into_iter().take(STATEMENTS_MAX) {
        let found: Vec<(&String, &StatementProfile)> =
            names.iter().zip(&profiles).filter_map(|(name, profile)| Some((name, profile.get(&fingerprint)?))).collect();
        let Some((_, first)) = found.first() else { continue };
        let p50 = |statement: &StatementProfile| json!(statement.shadow.p50_us as f64 / 1000.0);
        let source = json!(first.source.p50_us as f64 / 1000.0);
        rows.add("p50 ms", first.text.clone(), source, &found.iter().map(|(name, statement)| ((*name).clone(), p50(statement))).collect());
        let ratio = |statement: &StatementProfile| statement.comparison.map_or(Value::Null, |compared| round(compared.ratio));
        rows.add(
            "ratio",
            first.text.clone(),
            json!(1.0),
            &found.iter().map(|(name, statement)| ((*name).clone(), ratio(statement))).collect(),
        );
    }
    differing(managed, rows).await;
    fastest(&names, &mixes)
}

/// Settings and indexes that are not the same everywhere.
async fn differing(managed: &Managed, rows: &mut Rows) {
    let mut all = Vec::new();
    for (name, url) in managed.servers() {
        match tokio::time::timeout(std::time::Duration::from_secs(5), explain::facts(&url)).await {
            Ok(Ok(facts)) => all.push((name, facts)),
            Ok(Err(reason)) => rows.add("error", format!("{name} could not be asked: {reason}"), Value::Null, &BTreeMap::new()),
            Err(_) => rows.add("error", format!("{name} did not answer in time"), Value::Null, &BTreeMap::new()),
        }
    }
    for (section, part) in [("setting", 0), ("index", 1)] {
        let of = |facts: &explain::Facts| if part == 0 { facts.settings.clone() } else { facts.indexes.clone() };
        let keys: BTreeSet<String> = all.iter().flat_map(|(_, facts)| of(facts).into_keys()).collect();
        let mut shown = 0;
        for key in keys {
            let values: BTreeMap<String, Option<String>> = all.iter().map(|(name, facts)| (name.clone(), of(facts).remove(&key))).collect();
            let differ = values.values().collect::<BTreeSet<_>>().len() > 1;
            if !differ || shown == OBJECTS_MAX {
                continue;
            }
            shown += 1;
            let shown = |value: &Option<String>| value.as_ref().map_or(json!("none"), |value| json!(value));
            let source = values.get("source").map_or(Value::Null, shown);
            rows.add(section, key, source, &values.iter().map(|(name, value)| (name.clone(), shown(value))).collect());
        }
    }
}

fn round(value: f64) -> Value {
    json!((value * 1000.0).round() / 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::{Comparison, LatencySummary};

    fn profile(entries: &[(u64, u64, f64)]) -> BTreeMap<u64, StatementProfile> {
        let statement = |(fingerprint, count, ratio): &(u64, u64, f64)| {
            let latency = LatencySummary { count: *count, p50_us: 1_000, ..LatencySummary::default() };
            let comparison =
                (*ratio > 0.0).then_some(Comparison { pairs: 100, ratio: *ratio, low: ratio * 0.9, high: ratio * 1.1, p: 0.5 });
            let text = String::new();
            let (errors, same, different, total_us) = (0, 0, 0, 0);
            let statement = StatementProfile {
                fingerprint: *fingerprint,
                text,
                source: latency,
                shadow: latency,
                total_us,
                errors,
                same,
                different,
                comparison,
                slower: false,
            };
            (*fingerprint, statement)
        };
        entries.iter().map(statement).collect()
    }

    #[test]
    fn shadows_are_compared_by_what_all_of_them_have_run() {
        let (a, b) = (profile(&[(1, 300, 1.0), (2, 100, 3.0), (3, 900, 0.1)]), profile(&[(1, 300, 0.5), (2, 100, 0.5), (3, 900, 0.0)]));
        let found = mixes(&[a, b]);
        assert!((found[0].ratio - 1.5).abs() < 1e-9 && (found[1].ratio - 0.5).abs() < 1e-9, "{found:?}");
        let names = ["slow".to_owned(), "fast".to_owned()];
        assert!(fastest(&names, &found).unwrap().starts_with("fast is the fastest for this traffic: 0.50 times"));
        let near = [Mix { ratio: 1.0, low: 0.9, high: 1.1 }, Mix { ratio: 1.05, low: 0.95, high: 1.15 }];
        assert!(fastest(&names, &near).unwrap().contains("as fast as each other"));
        assert_eq!(fastest(&names[..1], &near[..1]), None);
        assert!(mixes(&[profile(&[(1, 1, 1.0)]), profile(&[(2, 1, 1.0)])]).is_empty() && mixes(&[]).is_empty());
    }
}
