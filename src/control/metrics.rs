//! Samples for `/metrics`: `understudy_<component>_<noun>_<unit>[_total]`, labels database, shadow and few bounded others.

use super::{Controller, managed::lock};
use crate::{
    console::{Metric, state::ShadowState},
    monitor::LatencySummary,
};

struct Samples(Vec<Metric>);

impl Samples {
    fn counter(&mut self, name: &'static str, help: &'static str, labels: &[(&'static str, &str)], value: u64) {
        self.push(name, help, "counter", labels, value as f64);
    }

    fn gauge(&mut self, name: &'static str, help: &'static str, labels: &[(&'static str, &str)], value: f64) {
        self.push(name, help, "gauge", labels, value);
    }

    fn push(&mut self, name: &'static str, help: &'static str, kind: &'static str, labels: &[(&'static str, &str)], value: f64) {
        let labels = labels.iter().map(|(label, value)| (*label, (*value).to_owned())).collect();
        self.0.push(Metric { name, help, kind, labels, value });
    }

    fn latency(&mut self, name: &'static str, help: &'static str, labels: &[(&'static str, &str)], summary: &LatencySummary) {
        let quantiles =
            [("0.5", summary.p50_us), ("0.9", summary.p90_us), ("0.99", summary.p99_us), ("0.999", summary.p999_us), ("1", summary.max_us)];
        for (quantile, micros) in quantiles {
            let mut labels = labels.to_vec();
            labels.push(("quantile", quantile));
            self.gauge(name, help, &labels, micros as f64 / 1e6);
        }
    }
}

impl Controller {
    pub(super) fn metrics(&self) -> Vec<Metric> {
        let state = self.state();
        let mut samples = Samples(Vec::new());
        samples.gauge("understudy_proxy_uptime_seconds", "Seconds since the process started", &[], state.uptime_s);
        samples.gauge("understudy_traffic_copies_bytes", "Bytes held by all shadow work together", &[], self.budget.used() as f64);
        for managed in &self.databases {
            let shadows = managed.shadows.iter().map(|shadow| (shadow.name(), shadow.health.clone()));
            for (server, health) in std::iter::once(("source".to_owned(), managed.health.clone())).chain(shadows) {
                if let Some(up) = lock(&health).up {
                    let labels = [("database", managed.database.name.as_str()), ("server", server.as_str())];
                    samples.gauge("understudy_monitor_server_up", "1 while the server answers", &labels, f64::from(u8::from(up)));
                }
            }
            for shadow in &managed.shadows {
                let name = shadow.name();
                let labels = [("database", managed.database.name.as_str()), ("shadow", name.as_str())];
                let slower = lock(&shadow.measured.findings).len() as f64;
                samples.gauge(
                    "understudy_monitor_slower_statements",
                    "Kinds of statements that are slower on the shadow beyond chance",
                    &labels,
                    slower,
                );
                if let Ok(forecast) = shadow.measured.forecast(100.0) {
                    let p99_s = forecast.p99_us.value / 1e6;
                    samples.gauge(
                        "understudy_monitor_forecast_p99_seconds",
                        "Expected p99 of the shadow at a share of 100 %",
                        &labels,
                        p99_s,
                    );
                }
            }
        }
        for database in &state.databases {
            let labels = [("database", database.name.as_str())];
            samples.gauge("understudy_proxy_clients", "Client connections", &labels, database.clients as f64);
            samples.counter("understudy_proxy_requests_total", "Request cycles that ended", &labels, database.requests);
            samples.counter("understudy_proxy_transactions_total", "Transactions that ended", &labels, database.transactions);
            samples.counter("understudy_proxy_errors_total", "Errors that servers sent to clients", &labels, database.errors);
            samples.gauge("understudy_proxy_held", "1 while new transactions wait", &labels, f64::from(u8::from(database.held)));
            samples.gauge("understudy_cutover_epoch", "Version of the ownership of writes", &labels, database.epoch as f64);
            samples.latency("understudy_proxy_latency_seconds", "Latency of the owner's answers", &labels, &database.latency);
            for shadow in &database.shadows {
                self.shadow_metrics(&mut samples, &database.name, shadow);
            }
        }
        samples.0
    }

    fn shadow_metrics(&self, samples: &mut Samples, database: &str, shadow: &ShadowState) {
        let labels = [("database", database), ("shadow", shadow.name.as_str())];
        let with = |label: &'static str, value: &'static str| [labels[0], labels[1], (label, value)];
        samples.gauge("understudy_traffic_sample_reads_percent", "Share of reads copied", &labels, shadow.sample_reads);
        samples.gauge("understudy_traffic_serve_reads_percent", "Share of reads answered by the shadow", &labels, shadow.serve_reads);
        samples.gauge(
            "understudy_traffic_healthy",
            "1 while the shadow is in step and answers",
            &labels,
            f64::from(u8::from(shadow.health == "healthy")),
        );
        samples.latency("understudy_traffic_owner_latency_seconds", "Owner's side of paired executions", &labels, &shadow.source_latency);
        samples.latency("understudy_traffic_shadow_latency_seconds", "Shadow's side of paired executions", &labels, &shadow.shadow_latency);
        let compare = &shadow.compare;
        for (verdict, number) in
            [("same", compare.same), ("different", compare.different), ("undecided", compare.undecided), ("dropped", compare.dropped)]
        {
            samples.counter("understudy_traffic_comparisons_total", "Sampled reads by verdict", &with("verdict", verdict), number);
        }
        let rehearsal = &shadow.rehearsal;
        samples.counter(
            "understudy_traffic_rehearsed_transactions_total",
            "Write transactions rehearsed and rolled back",
            &labels,
            rehearsal.transactions,
        );
        samples.counter(
            "understudy_traffic_rehearsal_errors_total",
            "Rehearsed statements that failed on the shadow only",
            &labels,
            rehearsal.errors,
        );
        samples.counter(
            "understudy_traffic_rehearsal_mismatches_total",
            "Rehearsed statements with another command tag",
            &labels,
            rehearsal.tag_mismatches,
        );
        let served = &shadow.served;
        for (outcome, number) in [("served", served.reads), ("fallback", served.fallbacks), ("fenced", served.fenced)] {
            samples.counter(
                "understudy_traffic_served_reads_total",
                "Reads meant for the shadow by outcome",
                &with("outcome", outcome),
                number,
            );
        }
        samples.counter(
            "understudy_traffic_reverts_total",
            "Times that serving went back by itself or by command",
            &labels,
            shadow.revert.as_ref().map_or(0, |revert| revert.count),
        );
        let feed = &shadow.feed;
        samples.counter("understudy_cdc_changes_total", "Row changes applied", &labels, feed.changes);
        samples.counter("understudy_cdc_transactions_total", "Transactions applied", &labels, feed.transactions);
        samples.counter("understudy_cdc_findings_total", "Rows that were missing or already there", &labels, feed.findings);
        samples.gauge("understudy_cdc_lag_seconds", "Age of the oldest change not yet applied", &labels, feed.lag_ms.now / 1000.0);
        samples.gauge("understudy_cdc_applied_bytes", "Applied position as a number", &labels, feed.applied_lsn.0 as f64);
        samples.gauge("understudy_cdc_held_tables", "Tables whose rows wait for a decision", &labels, feed.held_tables.len() as f64);
        samples.gauge("understudy_cdc_copied_rows", "Rows copied", &labels, feed.copy.rows as f64);
    }
}
