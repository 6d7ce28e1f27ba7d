//! `SHOW PROFILE`, `SHOW FORECAST` and `SHOW RESOURCES`.

use super::{
    Controller,
    managed::lock,
    profile::Kept,
    show::{row, table, utc},
};
use crate::{
    console::{Answer, CommandError},
    metadata::MeasureKind,
    monitor::{Forecast, Interval, ResourceSample},
};
use serde_json::{Value, json};

/// Statements shown per shadow.
const STATEMENTS_MAX: usize = 200;
/// Samples shown per server.
const SAMPLES_MAX: usize = 60;

pub(super) fn ms(micros: f64) -> Value {
    json!((micros).round() / 1000.0)
}

fn rounded(value: f64) -> Value {
    json!((value * 1000.0).round() / 1000.0)
}

impl Controller {
    pub(super) fn show_profile(&self) -> Answer {
        let mut rows = Vec::new();
        for shadow in self.databases.iter().flat_map(|managed| &managed.shadows) {
            let (rates, findings) = (lock(&shadow.measured.rates).clone(), lock(&shadow.measured.findings).clone());
            for statement in shadow.route.observations.profile.statements().into_iter().take(STATEMENTS_MAX) {
                let compared = statement.comparison;
                let finding = findings.get(&statement.fingerprint);
                rows.push(row([
                    json!(shadow.name()),
                    json!(format!("{:016x}", statement.fingerprint)),
                    json!(statement.verdict()),
                    json!(statement.shadow.count),
                    json!(rates.get(&statement.fingerprint).map(|rate| rounded(*rate))),
                    json!(statement.errors),
                    json!(statement.same),
                    json!(statement.different),
                    ms(statement.source.p50_us as f64),
                    ms(statement.source.p99_us as f64),
                    ms(statement.shadow.p50_us as f64),
                    ms(statement.shadow.p99_us as f64),
                    json!(compared.map(|compared| rounded(compared.ratio))),
                    json!(compared.map(|compared| rounded(compared.low))),
                    json!(compared.map(|compared| rounded(compared.high))),
                    json!(compared.map(|compared| compared.p)),
                    json!(finding.map(|finding| finding.describe())),
                    json!(statement.text),
                ]));
            }
        }
        let columns = [
            "shadow",
            "fingerprint",
            "verdict",
            "count",
            "per_s",
            "errors",
            "same",
            "different",
            "source_p50_ms",
            "source_p99_ms",
            "shadow_p50_ms",
            "shadow_p99_ms",
            "ratio",
            "ratio_low",
            "ratio_high",
            "p",
            "why",
            "query",
        ];
        table(&columns, rows)
    }

    /// The present forecast of each shadow, then those that were kept, newest first.
    pub(super) fn show_forecast(&self) -> Answer {
        let mut rows = Vec::new();
        for shadow in self.databases.iter().flat_map(|managed| &managed.shadows) {
            let name = shadow.name();
            match shadow.measured.forecast(100.0) {
                Ok(forecast) => rows.push(forecast_row(&name, "now", shadow.route.serve_reads.get(), &forecast, None)),
                Err(reason) => {
                    let mut values = vec![json!(name), json!(format!("none yet: {reason}"))];
                    values.resize(FORECAST_COLUMNS.len(), Value::Null);
                    rows.push(values);
                }
            }
            let kept = lock(&shadow.measured.forecasts).clone();
            rows.extend(kept.iter().rev().map(|kept| forecast_row(&name, &utc(kept.at_ms), kept.made_at, &kept.forecast, Some(kept))));
        }
        table(&FORECAST_COLUMNS, rows)
    }

    pub(super) fn show_resources(&self) -> Result<Answer, CommandError> {
        let mut rows = Vec::new();
        for managed in &self.databases {
            let database = &managed.database.name;
            let shadows = managed.shadows.iter().map(|shadow| shadow.name());
            for server in std::iter::once(String::new()).chain(shadows) {
                let kept = self.repository.measures(MeasureKind::Resources, database, &server, SAMPLES_MAX);
                for measure in kept.map_err(super::commands::failed)?.into_iter().rev() {
                    let Ok(sample) = serde_json::from_value::<ResourceSample>(measure.data) else { continue };
                    rows.push(row([
                        json!(database),
                        json!(if server.is_empty() { "source" } else { &server }),
                        json!(utc(measure.at_ms)),
                        json!(sample.connections),
                        json!(sample.active),
                        json!(sample.cpu_cores.map(rounded)),
                        rounded(sample.cache_hit_ratio),
                        rounded(sample.blocks_read_per_s),
                        rounded(sample.read_ms),
                        rounded(sample.write_ms),
                        rounded(sample.temp_bytes_per_s),
                        rounded(sample.transactions_per_s),
                        rounded(sample.wal_bytes_per_s),
                        json!(sample.locks_waiting),
                        rounded(sample.dead_rows_ratio),
                        json!(sample.checkpoints_timed),
                        json!(sample.checkpoints_requested),
                        json!(sample.receivers),
                        json!(sample.receivers_behind_bytes),
                        json!(sample.database_bytes),
                    ]));
                }
            }
        }
        let columns = [
            "database",
            "server",
            "at",
            "connections",
            "active",
            "cpu_cores",
            "cache_hit_ratio",
            "blocks_read_per_s",
            "read_ms",
            "write_ms",
            "temp_bytes_per_s",
            "transactions_per_s",
            "wal_bytes_per_s",
            "locks_waiting",
            "dead_rows_ratio",
            "checkpoints_timed",
            "checkpoints_requested",
            "receivers",
            "receivers_behind_bytes",
            "database_bytes",
        ];
        Ok(table(&columns, rows))
    }
}

const FORECAST_COLUMNS: [&str; 20] = [
    "shadow",
    "made",
    "made_at_percent",
    "for_percent",
    "reads_per_s",
    "beyond_seen",
    "p50_ms",
    "p50_low_ms",
    "p50_high_ms",
    "p99_ms",
    "p99_low_ms",
    "p99_high_ms",
    "active",
    "active_high",
    "cpu_cores",
    "cpu_cores_low",
    "cpu_cores_high",
    "points",
    "truth_p99_ms",
    "held",
];

fn forecast_row(name: &str, made: &str, made_at: f64, forecast: &Forecast, kept: Option<&Kept>) -> Vec<Value> {
    let cores = |part: fn(&Interval) -> f64| json!(forecast.cores.as_ref().map(|cores| rounded(part(cores))));
    row([
        json!(name),
        json!(made),
        json!(made_at),
        json!(forecast.share),
        rounded(forecast.rate),
        rounded(forecast.beyond),
        ms(forecast.p50_us.value),
        ms(forecast.p50_us.low),
        ms(forecast.p50_us.high),
        ms(forecast.p99_us.value),
        ms(forecast.p99_us.low),
        ms(forecast.p99_us.high),
        rounded(forecast.active.value),
        rounded(forecast.active.high),
        cores(|cores| cores.value),
        cores(|cores| cores.low),
        cores(|cores| cores.high),
        json!(forecast.points),
        json!(kept.and_then(|kept| kept.truth_p99_us).map(ms)),
        json!(kept.and_then(|kept| kept.held)),
    ])
}
