//! `SIMULATE CUTOVER` and `SHOW REPORT`: for a while the shadow answers a share of the reads, every write is rehearsed and answers are
//! compared; then the real cutover is run dry. What comes out is a readiness report.

use super::{
    Controller,
    commands::{connect, failed},
    managed::{Managed, ManagedShadow, lock},
    readiness::{Pause, Readiness, STATEMENTS_MAX},
    report_page,
    shift::answers_reads,
    show::{row, table, utc},
};
use crate::{
    cdc,
    config::{FeedKind, ServerUrl},
    console::{Answer, CommandError},
    cutover::switch::DRAIN_TIMEOUT,
    metadata::{MeasureKind, Severity},
    traffic::{observations::Observations, route::Percent},
};
use serde_json::json;
use std::{
    collections::BTreeMap,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};
use tokio_postgres::Client;

/// How often the running transactions are looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// Sampled meanwhile if proxy.toml says less: a simulation without compared answers shows little.
const SAMPLE_PERCENT: f64 = 10.0;
/// Markers sent to see how long one takes.
const MARKERS: u32 = 3;
/// A marker that has not come through by then makes a long pause.
const MARKER_TIMEOUT: Duration = Duration::from_secs(10);
/// Journal entries, and round trips to the old and the new owner, that a cutover makes while clients wait.
const JOURNAL_ENTRIES: f64 = 6.0;
const ROUND_TRIPS: (f64, f64) = (6.0, 4.0);

struct Before {
    served: u64,
    fallbacks: u64,
    fenced: u64,
    candidates: u64,
    same: u64,
    different: u64,
    undecided: u64,
    compare_errors: u64,
    rehearsed: u64,
    rehearsal_errors: u64,
    tag_mismatches: u64,
    left_out: BTreeMap<String, u64>,
    client_errors: u64,
    reverts: u64,
}

impl Before {
    fn of(managed: &Managed, shadow: &ManagedShadow) -> Self {
        let seen: &Observations = &shadow.route.observations;
        Before {
            served: seen.served.get(),
            fallbacks: seen.fallbacks.get(),
            fenced: seen.fenced.get(),
            candidates: seen.candidates.get(),
            same: seen.same.get(),
            different: seen.different.get(),
            undecided: seen.undecided.get(),
            compare_errors: seen.compare_errors.get(),
            rehearsed: seen.rehearsed.get(),
            rehearsal_errors: seen.rehearsal_errors.get(),
            tag_mismatches: seen.tag_mismatches.get(),
            left_out: seen.left_out.counts(),
            client_errors: managed.database.errors.get(),
            reverts: lock(&shadow.reverted).as_ref().map_or(0, |state| state.count),
        }
    }

    /// What came since then.
    fn since(&self, now: Before) -> Readiness {
        let left_out = now.left_out.into_iter().filter_map(|(reason, number)| {
            let more = number.saturating_sub(self.left_out.get(&reason).copied().unwrap_or(0));
            (more > 0).then_some((reason, more))
        });
        Readiness {
            served: now.served - self.served,
            fallbacks: now.fallbacks - self.fallbacks,
            fenced: now.fenced - self.fenced,
            candidates: now.candidates - self.candidates,
            same: now.same - self.same,
            different: now.different - self.different,
            undecided: now.undecided - self.undecided,
            compare_errors: now.compare_errors - self.compare_errors,
            rehearsed: now.rehearsed - self.rehearsed,
            rehearsal_errors: now.rehearsal_errors - self.rehearsal_errors,
            tag_mismatches: now.tag_mismatches - self.tag_mismatches,
            left_out: left_out.collect(),
            client_errors: now.client_errors - self.client_errors,
            ..Readiness::default()
        }
    }
}

/// Raises copies for the simulation, and takes them back when it ends, whatever happens, unless somebody else has changed them.
struct Raised<'a> {
    shadow: &'a ManagedShadow,
    sampled_before: f64,
    sampled: f64,
    rehearse: bool,
}

impl<'a> Raised<'a> {
    fn new(shadow: &'a ManagedShadow) -> Self {
        let route = &shadow.route;
        let sampled_before = route.sample_reads.get();
        let sampled = sampled_before.max(SAMPLE_PERCENT);
        route.sample_reads.set(sampled);
        let rehearse = shadow.config.load().feed == FeedKind::Cdc && !route.rehearse.swap(true, Ordering::SeqCst);
        Raised { shadow, sampled_before, sampled, rehearse }
    }
}

impl Drop for Raised<'_> {
    fn drop(&mut self) {
        let route = &self.shadow.route;
        if route.sample_reads.get() == self.sampled {
            route.sample_reads.set(self.sampled_before);
        }
        if self.rehearse {
            route.rehearse.store(false, Ordering::SeqCst);
        }
    }
}

/// Ages of the oldest running transaction of a client, in milliseconds, one per look.
async fn watch_transactions(url: ServerUrl, until: Instant) -> Vec<f64> {
    const OLDEST: &str = "SELECT coalesce(max(extract(epoch FROM clock_timestamp() - xact_start)), 0)::float8 * 1000
        FROM pg_catalog.pg_stat_activity WHERE datname = pg_catalog.current_database() AND pid <> pg_catalog.pg_backend_pid()
            AND backend_type = 'client backend' AND application_name NOT LIKE 'understudy%'";
    let mut ages = Vec::new();
    let client = connect(&url, "understudy simulate").await;
    while Instant::now() < until {
        if let Ok(client) = &client
            && let Ok(age) = client.query_one(OLDEST, &[]).await.and_then(|row| row.try_get::<_, f64>(0))
        {
            ages.push(age.max(0.0));
        }
        tokio::time::sleep(LOOK_INTERVAL.min(until.saturating_duration_since(Instant::now()))).await;
    }
    ages.sort_unstable_by(f64::total_cmp);
    ages
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

/// The quicker half of a few round trips.
async fn round_trip(client: &Client) -> Result<f64, String> {
    let mut times = Vec::new();
    for _ in 0..5 {
        let began = Instant::now();
        client.query_one("SELECT 1", &[]).await.map_err(|error| error.to_string())?;
        times.push(milliseconds(began));
    }
    times.sort_unstable_by(f64::total_cmp);
    Ok(times.get(2).copied().unwrap_or(0.0))
}

impl Controller {
    pub(super) async fn simulate(&self, name: &str, percent: f64, duration: Duration) -> Result<Answer, CommandError> {
        let (managed, shadow) = self.shadow(name)?;
        answers_reads(shadow)?;
        let _turn = shadow
            .busy
            .try_lock()
            .map_err(|_| CommandError::Refused(format!("another simulation or verification of {name} is running")))?;
        if !shadow.route.in_step.load(Ordering::SeqCst) {
            return Err(CommandError::Refused(format!("shadow {name} is not in step with the source: SHOW FEED says why")));
        }
        let observations = &shadow.route.observations;
        let before = Before::of(managed, shadow);
        observations.forget(shadow.config.load().revert.window);
        let raised = Raised::new(shadow);
        let earlier = shadow.route.serve_reads.get();
        shadow.route.serve_reads.set(percent);
        let owner = managed.database.route.load().owner.url.clone();
        let ages = watch_transactions(owner.clone(), Instant::now() + duration).await;
        let reverted = lock(&shadow.reverted).as_ref().filter(|state| state.count > before.reverts).map(|state| state.reason.clone());
        let (health, _) = observations.health(Duration::ZERO, &shadow.config.load().revert, Instant::now());
        {
            // only what this simulation has set: a ladder's step, a revert, SHADOW STOP or a cutover meanwhile stays
            let _still = lock(&shadow.ladder);
            if reverted.is_none() && shadow.route.serve_reads.get() == Percent::new(percent).get() {
                shadow.route.serve_reads.set(earlier);
            }
        }
        drop(raised);
        let mut report = before.since(Before::of(managed, shadow));
        report.obstacles = match self.switch(managed, shadow, true) {
            Ok(switch) => switch.obstacles().await,
            Err(error) => vec![error.to_string()],
        };
        let place = (ages.len() as f64 * 0.95) as usize;
        let transactions_ms = ages.get(place.min(ages.len().saturating_sub(1))).copied().unwrap_or(0.0);
        let (marker_ms, steps_ms) = match self.measure_steps(managed, shadow, &owner).await {
            Ok(measured) => measured,
            Err(reason) => {
                report.obstacles.push(format!("the pause could not be predicted: {reason}"));
                (0.0, 0.0)
            }
        };
        (report.database, report.shadow) = (managed.database.name.clone(), name.to_owned());
        (report.percent, report.seconds, report.at_ms) = (percent, duration.as_secs_f64(), jiff::Timestamp::now().as_millisecond());
        (report.owner, report.shadow_latency, report.reverted) = (health.owner, health.shadow, reverted);
        report.pause = Pause::new(transactions_ms, marker_ms, steps_ms);
        report.longest_transaction_ms = ages.last().copied().unwrap_or(0.0);
        match shadow.measured.forecast(100.0) {
            Ok(forecast) => report.forecast = Some(forecast),
            Err(reason) => report.no_forecast = Some(reason),
        }
        report.statements = observations.profile.statements();
        report.statements.truncate(STATEMENTS_MAX);
        report.findings =
            lock(&shadow.measured.findings).values().map(|finding| (finding.fingerprint.clone(), finding.describe())).collect();
        let report = report.judged(&shadow.config.load().revert, DRAIN_TIMEOUT.as_secs_f64() * 1000.0);
        self.repository.keep(MeasureKind::Report, &managed.database.name, name, &json!(report)).map_err(failed)?;
        let message = format!(
            "simulated cutover of {name} at {percent} % for {} s: {} reads served, {} fell back. {}",
            report.seconds,
            report.served,
            report.fallbacks,
            report.sentence()
        );
        let severity = if report.go { Severity::Info } else { Severity::Warning };
        let data = json!({"go": report.go, "served": report.served, "fallbacks": report.fallbacks, "fenced": report.fenced,
            "blockers": report.blockers, "pause": report.pause});
        self.repository.record(severity, "traffic", &managed.database.name, name, &message, data);
        let rows = report.lines().into_iter().map(|(section, what, value)| row([json!(section), json!(what), json!(value)]));
        let mut notices = vec![message];
        if let Some(http) = self.config.load().proxy.http {
            notices.push(format!("as a page: http://{http}/report/{name}; as JSON: http://{http}/api/report/{name}"));
        }
        Ok(Answer {
            columns: ["section", "what", "value"].map(String::from).to_vec(),
            rows: rows.collect(),
            tag: "SIMULATE".into(),
            notices,
        })
    }

    /// How long a marker takes, and the steps of a cutover around it: by real markers, round trips and a real journal entry's disk.
    async fn measure_steps(&self, managed: &Managed, shadow: &ManagedShadow, owner: &ServerUrl) -> Result<(f64, f64), String> {
        let on_owner = connect(owner, "understudy simulate").await.map_err(|error| error.to_string())?;
        let on_shadow = connect(&shadow.config.load().url, "understudy simulate").await.map_err(|error| error.to_string())?;
        let (there, here) = (round_trip(&on_owner).await?, round_trip(&on_shadow).await?);
        let (feed, _) = shadow.feed().ok_or("the feed is not running")?;
        let mut marker_ms = 0.0_f64;
        for number in 0..MARKERS {
            let marker = format!("{}-simulate-{}-{number}", managed.database.name, jiff::Timestamp::now().as_millisecond());
            let began = Instant::now();
            cdc::emit_marker(&on_owner, &marker).await.map_err(|error| error.to_string())?;
            feed.wait_marker(&marker, MARKER_TIMEOUT).await.map_err(|error| error.to_string())?;
            marker_ms = marker_ms.max(milliseconds(began));
        }
        let began = Instant::now();
        self.repository.keep(MeasureKind::Profile, "", "", &json!("how long the disk takes")).map_err(|error| error.to_string())?;
        let journal = milliseconds(began);
        Ok((marker_ms, JOURNAL_ENTRIES * journal + ROUND_TRIPS.0 * there + ROUND_TRIPS.1 * here))
    }

    fn newest_report(&self, database: &str, shadow: &str) -> Option<Readiness> {
        let measure = self.repository.measures(MeasureKind::Report, database, shadow, 1).ok()?.pop()?;
        serde_json::from_value(measure.data).ok()
    }

    /// The newest report of a shadow, as a document and as a page.
    pub(super) fn report(&self, name: &str) -> Option<crate::console::Report> {
        let (managed, shadow) = self.shadow(name).ok()?;
        let report = self.newest_report(&managed.database.name, &shadow.name())?;
        Some(crate::console::Report { document: json!(report), page: report_page::page(&report) })
    }

    pub(super) fn show_report(&self) -> Result<Answer, CommandError> {
        let mut rows = Vec::new();
        for managed in &self.databases {
            for shadow in &managed.shadows {
                let Some(report) = self.newest_report(&managed.database.name, &shadow.name()) else { continue };
                rows.push(row([
                    json!(report.shadow),
                    json!(utc(report.at_ms)),
                    json!(report.verdict()),
                    json!(report.sentence()),
                    json!(report.percent),
                    json!(report.seconds),
                    json!(report.served),
                    json!(report.pause.low_ms),
                    json!(report.pause.high_ms),
                    json!(report),
                ]));
            }
        }
        let columns = ["shadow", "at", "verdict", "why", "percent", "seconds", "served", "pause_low_ms", "pause_high_ms", "document"];
        Ok(table(&columns, rows))
    }
}
