//! The tables of `SHOW`.

use super::{
    Controller,
    managed::lock,
    state::{database_state, feed_state},
};
use crate::{
    config::MirrorWrites,
    console::{Answer, CommandError, command::Topic},
    monitor::LatencySummary,
};
use serde_json::{Value, json};
use std::sync::atomic::Ordering;

/// Events shown.
const EVENTS_MAX: usize = 100;

pub(super) fn table(columns: &[&str], rows: Vec<Vec<Value>>) -> Answer {
    Answer { columns: columns.iter().map(|name| (*name).to_owned()).collect(), rows, tag: "SHOW".into(), notices: Vec::new() }
}

pub(super) fn latency(summary: &LatencySummary) -> [Value; 6] {
    let ms = |micros: u64| json!(micros as f64 / 1000.0);
    [json!(summary.count), ms(summary.p50_us), ms(summary.p90_us), ms(summary.p99_us), ms(summary.p999_us), ms(summary.max_us)]
}

pub(super) fn row(values: impl IntoIterator<Item = Value>) -> Vec<Value> {
    values.into_iter().collect()
}

impl Controller {
    pub(super) async fn show(&self, topic: Topic) -> Result<Answer, CommandError> {
        Ok(match topic {
            Topic::Version => table(&["version"], vec![vec![json!(format!("understudy {}", env!("CARGO_PKG_VERSION")))]]),
            Topic::Config => self.show_config(),
            Topic::Databases => self.show_databases(),
            Topic::Shadows => self.show_shadows(),
            Topic::Clients => self.show_clients(),
            Topic::Servers => self.show_servers(),
            Topic::Pools => self.show_pools(),
            Topic::Stats => self.show_stats(),
            Topic::Routes => self.show_routes(),
            Topic::Latency => self.show_latency(),
            Topic::LatencyByQuery => self.show_latency_by_query(),
            Topic::Mismatches => self.show_mismatches(),
            Topic::Feed => self.show_feed(),
            Topic::Schema | Topic::Drift => self.show_drift(topic == Topic::Drift).await?,
            Topic::Proposals => self.show_proposals()?,
            Topic::Events => self.show_events(false)?,
            Topic::Alerts => self.show_events(true)?,
            Topic::Cutover => self.show_cutover(),
            Topic::Mapping => self.show_mapping().await?,
            Topic::SchemaVersions => self.schema_versions()?,
            Topic::Leftovers => self.show_leftovers().await,
            Topic::Profile => self.show_profile(),
            Topic::Forecast => self.show_forecast(),
            Topic::Resources => self.show_resources()?,
            Topic::Report => self.show_report()?,
            Topic::WhatIf => self.show_what_if().await,
            Topic::Help => crate::console::command::help(),
        })
    }

    fn show_config(&self) -> Answer {
        let config = self.config.load();
        let limits = &config.proxy.limits;
        let seconds = |time: Option<std::time::Duration>| time.map_or(json!("off"), |time| json!(format!("{} s", time.as_secs_f64())));
        let mut rows = vec![
            vec![json!("file"), json!(self.config_path.display().to_string())],
            vec![json!("proxy.listen"), json!(config.proxy.listen.to_string())],
            vec![json!("proxy.http"), json!(config.proxy.http.map(|address| address.to_string()))],
            vec![json!("proxy.metadata"), json!(format!("sqlite:{}", config.proxy.metadata.display()))],
            vec![json!("proxy.pool_mode"), json!(config.proxy.pool.mode.as_str())],
            vec![json!("proxy.max_clients"), json!(limits.clients_max)],
            vec![json!("proxy.max_message"), json!(limits.message_bytes_max)],
            vec![json!("proxy.client_memory"), json!(limits.client_bytes_max)],
            vec![json!("proxy.login_timeout"), seconds(Some(limits.login_timeout))],
            vec![json!("proxy.idle_in_transaction_timeout"), seconds(limits.idle_in_transaction_timeout)],
            vec![json!("proxy.client_idle_timeout"), seconds(limits.client_idle_timeout)],
            vec![json!("proxy.query_timeout"), seconds(limits.query_timeout)],
            vec![json!("proxy.shadow_memory"), json!(config.proxy.shadow_memory_bytes_max)],
        ];
        for managed in &self.databases {
            let database = managed.config.load();
            rows.push(vec![json!(format!("{}.source", database.name)), json!(database.source.to_string())]);
            let pool = &database.pool;
            let key = |knob: &str| json!(format!("{}.pool.{knob}", database.name));
            rows.push(vec![json!(format!("{}.pool_mode", database.name)), json!(pool.mode.as_str())]);
            rows.push(vec![key("size"), json!(pool.size)]);
            rows.push(vec![key("min_size"), json!(pool.min_size)]);
            rows.push(vec![key("queue_timeout"), json!(pool.queue_timeout.as_secs_f64())]);
            rows.push(vec![key("server_lifetime"), json!(pool.server_lifetime.as_secs_f64())]);
            rows.push(vec![key("server_idle_timeout"), json!(pool.server_idle_timeout.as_secs_f64())]);
            rows.push(vec![key("reset_query"), json!(pool.reset_query)]);
            rows.push(vec![key("prepared_statements"), json!(pool.prepared_statements)]);
            for shadow in &managed.shadows {
                let config = shadow.config.load();
                let key = |knob: &str| json!(format!("{}.{}.{knob}", database.name, config.name));
                rows.push(vec![key("url"), json!(config.url.to_string())]);
                rows.push(vec![key("feed"), json!(config.feed)]);
                // What SET has changed; a feed of mirrored writes always applies them.
                let mirror_writes = match (config.mirror_writes, shadow.route.rehearse.load(Ordering::SeqCst)) {
                    (MirrorWrites::Apply, _) => MirrorWrites::Apply,
                    (_, true) => MirrorWrites::Rehearse,
                    (_, false) => MirrorWrites::Off,
                };
                rows.push(vec![key("mirror_writes"), json!(mirror_writes)]);
                rows.push(vec![key("sample_reads"), json!(shadow.route.sample_reads.get())]);
                rows.push(vec![key("sample_per_query"), json!(config.sample_per_query)]);
                rows.push(vec![key("serve_reads"), json!(shadow.route.serve_reads.get())]);
                rows.push(vec![key("consistency"), json!(config.consistency.to_string())]);
                rows.push(vec![key("hedge_after"), json!(config.hedge_after.as_secs_f64())]);
                rows.extend(config.ignore.iter().map(|rule| vec![key(&format!("ignore.{}", rule.name)), json!(rule)]));
                rows.push(vec![key("revert"), json!(config.revert)]);
                rows.push(vec![key("shift"), json!(config.shift)]);
                rows.push(vec![key("adapt"), json!(config.adapt)]);
            }
        }
        table(&["setting", "value"], rows)
    }

    fn show_databases(&self) -> Answer {
        let rows = self.databases.iter().map(|managed| {
            let state = database_state(managed);
            row([
                json!(state.name),
                json!(state.owner),
                json!(state.epoch),
                json!(state.source_url),
                json!(state.shadows.len()),
                json!(state.clients),
                json!(state.held),
            ])
        });
        table(&["database", "owner", "epoch", "source", "shadows", "clients", "held"], rows.collect())
    }

    fn show_shadows(&self) -> Answer {
        let mut rows = Vec::new();
        for managed in &self.databases {
            let state = database_state(managed);
            for shadow in state.shadows {
                rows.push(row([
                    json!(state.name),
                    json!(shadow.name),
                    json!(shadow.url),
                    json!(shadow.health),
                    json!(shadow.feed.state),
                    json!(shadow.feed.lag_ms.now),
                    json!(shadow.sample_reads),
                    json!(shadow.serve_reads),
                    json!(shadow.mirror_writes),
                    json!(shadow.shift),
                    json!(shadow.revert.map(|revert| revert.reason)),
                ]));
            }
        }
        table(
            &[
                "database",
                "shadow",
                "url",
                "health",
                "feed",
                "lag_ms",
                "sample_reads",
                "serve_reads",
                "mirror_writes",
                "shift",
                "last_revert",
            ],
            rows,
        )
    }

    fn show_routes(&self) -> Answer {
        let mut rows = Vec::new();
        for managed in &self.databases {
            let route = managed.database.route.load();
            let served: f64 = route.shadows.iter().map(|shadow| shadow.serve_reads.get()).sum();
            rows.push(row([
                json!(managed.database.name),
                json!(route.owner.name),
                json!("all"),
                json!((100.0 - served).max(0.0)),
                json!(0.0),
                json!("off"),
            ]));
            for shadow in &route.shadows {
                let rehearse = match (shadow.mirror.is_recording(), shadow.rehearse.load(Ordering::SeqCst)) {
                    (true, _) => "apply",
                    (false, true) => "rehearse",
                    (false, false) => "off",
                };
                rows.push(row([
                    json!(managed.database.name),
                    json!(shadow.target.name),
                    json!("none"),
                    json!(shadow.serve_reads.get()),
                    json!(shadow.sample_reads.get()),
                    json!(rehearse),
                ]));
            }
        }
        table(&["database", "server", "writes", "reads_percent", "sampled_percent", "mirrored_writes"], rows)
    }

    fn show_latency(&self) -> Answer {
        let mut rows = Vec::new();
        for managed in &self.databases {
            for shadow in database_state(managed).shadows {
                for (side, summary) in [("source", &shadow.source_latency), ("shadow", &shadow.shadow_latency)] {
                    let mut values = vec![json!(managed.database.name), json!(shadow.name), json!(side)];
                    values.extend(latency(summary));
                    rows.push(values);
                }
            }
        }
        table(&["database", "shadow", "side", "count", "p50_ms", "p90_ms", "p99_ms", "p999_ms", "max_ms"], rows)
    }

    fn show_latency_by_query(&self) -> Answer {
        let mut rows = Vec::new();
        for managed in &self.databases {
            for shadow in database_state(managed).shadows {
                for query in &shadow.queries {
                    for (side, summary) in [("source", &query.source), ("shadow", &query.shadow)] {
                        let mut values = vec![json!(shadow.name), json!(query.fingerprint), json!(side)];
                        values.extend(latency(summary));
                        values.push(json!(query.text));
                        rows.push(values);
                    }
                }
            }
        }
        table(&["shadow", "fingerprint", "side", "count", "p50_ms", "p90_ms", "p99_ms", "p999_ms", "max_ms", "query"], rows)
    }

    fn show_mismatches(&self) -> Answer {
        let mut rows = Vec::new();
        for managed in &self.databases {
            for shadow in database_state(managed).shadows {
                let lists = [
                    ("comparison", &shadow.compare.reasons),
                    ("rehearsal", &shadow.rehearsal.undecided),
                    ("left out", &shadow.rehearsal.left_out),
                ];
                for (kind, reasons) in lists {
                    rows.extend(
                        reasons.iter().map(|(reason, number)| row([json!(shadow.name), json!(kind), json!(number), json!(reason)])),
                    );
                }
                for (kind, examples) in
                    [("example of a comparison", &shadow.compare.examples), ("example of a rehearsal", &shadow.rehearsal.examples)]
                {
                    rows.extend(examples.iter().map(|example| row([json!(shadow.name), json!(kind), Value::Null, json!(example)])));
                }
            }
        }
        table(&["shadow", "kind", "number", "what"], rows)
    }

    fn show_feed(&self) -> Answer {
        let mut rows = Vec::new();
        for managed in &self.databases {
            for shadow in &managed.shadows {
                let feed = feed_state(shadow);
                rows.push(row([
                    json!(managed.database.name),
                    json!(shadow.name()),
                    json!(feed.direction),
                    json!(feed.state),
                    json!(feed.applied_lsn.to_string()),
                    json!(feed.received_lsn.to_string()),
                    json!(feed.lag_ms.now),
                    json!(feed.transactions),
                    json!(feed.changes),
                    json!(feed.copy.rows),
                    json!(feed.copy.rows_estimated),
                    json!(feed.copy.bytes),
                    json!(feed.copy.seconds_left),
                    json!(feed.held_tables.join(", ")),
                    json!(feed.findings),
                    json!(feed.finding_examples.join("; ")),
                ]));
            }
        }
        let columns = [
            "database",
            "shadow",
            "direction",
            "state",
            "applied_lsn",
            "received_lsn",
            "lag_ms",
            "transactions",
            "changes",
            "copied_rows",
            "rows_estimated",
            "copied_bytes",
            "copy_seconds_left",
            "held_tables",
            "findings",
            "finding_examples",
        ];
        table(&columns, rows)
    }

    async fn show_drift(&self, only_differences: bool) -> Result<Answer, CommandError> {
        let failed = |error: String| CommandError::Failed(error);
        let mut rows = Vec::new();
        for managed in &self.databases {
            for shadow in &managed.shadows {
                let adapter = lock(&shadow.adapter).clone();
                let Some(adapter) = adapter else {
                    rows.push(row([
                        json!(shadow.name()),
                        Value::Null,
                        json!("not started: SHADOW START"),
                        Value::Null,
                        Value::Null,
                        Value::Null,
                        Value::Null,
                    ]));
                    continue;
                };
                let source = super::commands::connect(&managed.config.load().source, "understudy drift")
                    .await
                    .map_err(|error| failed(error.to_string()))?;
                let target = super::commands::connect(&shadow.config.load().url, "understudy drift")
                    .await
                    .map_err(|error| failed(error.to_string()))?;
                for found in adapter.drift(&source, &target).await.map_err(|error| failed(error.to_string()))? {
                    let found = serde_json::to_value(found).unwrap_or_default();
                    let field = |name: &str| found.get(name).cloned().unwrap_or(Value::Null);
                    rows.push(row([
                        json!(shadow.name()),
                        field("object"),
                        field("kind"),
                        field("source"),
                        field("shadow"),
                        field("proposal"),
                        field("changes_soon"),
                    ]));
                }
            }
        }
        if !only_differences && rows.is_empty() {
            rows.push(row([
                Value::Null,
                json!("all"),
                json!("source and shadow have the same schema"),
                Value::Null,
                Value::Null,
                Value::Null,
                Value::Null,
            ]));
        }
        Ok(table(&["shadow", "object", "kind", "source_has", "shadow_has", "proposal", "changes_soon"], rows))
    }

    fn show_proposals(&self) -> Result<Answer, CommandError> {
        let proposals = self.repository.proposals(None).map_err(|error| CommandError::Failed(error.to_string()))?;
        let rows = proposals.into_iter().map(|proposal| {
            let shadow = self.databases.iter().flat_map(|managed| &managed.shadows).find(|shadow| shadow.name() == proposal.shadow);
            let statements = shadow.map(|shadow| super::ahead::concerned_by(shadow, &proposal)).unwrap_or_default();
            let draft = proposal.draft;
            row([
                json!(proposal.id),
                json!(proposal.shadow),
                json!(proposal.state.as_str()),
                json!(draft.object),
                json!(draft.change),
                json!((draft.confidence * 1000.0).round() / 1000.0),
                json!(draft.why),
                json!(draft.loses_data),
                json!(draft.holds_table),
                json!(draft.sql.join("; ")),
                json!(draft.undo.join("; ")),
                json!(draft.alternatives.join(" | ")),
                json!(statements.join(", ")),
                json!(draft.if_rejected),
                json!(proposal.decided_by),
                json!(if proposal.decided_ms == 0 { String::new() } else { utc(proposal.decided_ms) }),
                json!(proposal.note),
            ])
        });
        let columns = [
            "id",
            "shadow",
            "state",
            "object",
            "change",
            "confidence",
            "why",
            "loses_data",
            "holds_table",
            "sql",
            "undo",
            "alternatives",
            "statements",
            "if_rejected",
            "decided_by",
            "decided_at",
            "note",
        ];
        Ok(table(&columns, rows.collect()))
    }

    fn show_events(&self, alerts_only: bool) -> Result<Answer, CommandError> {
        let events = self.repository.events(0, EVENTS_MAX, alerts_only).map_err(|error| CommandError::Failed(error.to_string()))?;
        let rows = events.into_iter().map(|event| {
            row([
                json!(event.id),
                json!(event.at_ms),
                json!(event.severity),
                json!(event.component),
                json!(event.database),
                json!(event.shadow),
                json!(event.message),
                event.data,
            ])
        });
        Ok(table(&["id", "at_ms", "severity", "component", "database", "shadow", "message", "data"], rows.collect()))
    }

    fn show_cutover(&self) -> Answer {
        let mut rows = Vec::new();
        for managed in &self.databases {
            if let Some(state) = lock(&managed.cutover).clone() {
                for (step, ms) in &state.steps {
                    rows.push(row([
                        json!(managed.database.name),
                        json!(state.kind),
                        json!(state.from),
                        json!(state.to),
                        json!(step),
                        json!(ms),
                        json!(state.state),
                        json!(state.pause_ms),
                    ]));
                }
            }
        }
        table(&["database", "kind", "from", "to", "step", "ms", "state", "pause_ms"], rows)
    }
}

/// Milliseconds since 1970 as `2026-11-23 02:10:05Z`.
pub(super) fn utc(ms: i64) -> String {
    let (days, seconds) = (ms.div_euclid(86_400_000), ms.rem_euclid(86_400_000) / 1000);
    // Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms": civil_from_days
    let shifted = days + 719_468;
    let (era, of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}Z", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    #[test]
    fn dates() {
        for (ms, expected) in
            [(0, "1970-01-01 00:00:00Z"), (951_782_400_000, "2000-02-29 00:00:00Z"), (1_795_399_805_123, "2026-11-23 02:10:05Z")]
        {
            assert_eq!(super::utc(ms), expected);
        }
    }
}
