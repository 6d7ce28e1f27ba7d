//! The profile of a shadow: every few seconds a point of its load curve, forecasts and how true they were, statements that are slower
//! and why, and which statements are proven. Kept in the repository; nothing here is needed for serving or going back.

use super::{
    Controller,
    explain::{self, Finding},
    managed::{Managed, ManagedShadow, lock},
};
use crate::{
    config::ShiftOrder,
    metadata::{MeasureKind, Severity},
    monitor::{Forecast, Point, READS_MIN, StatementProfile, forecast},
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{Arc, Mutex, atomic::Ordering},
    time::{Duration, Instant},
};

/// Points that a forecast rests on: an hour at one every five seconds.
const POINTS_MAX: usize = 720;
/// Forecasts kept in memory, as many as the repository keeps.
const FORECASTS_MAX: usize = 50;
/// Findings kept per shadow: a person reads a few.
const FINDINGS_MAX: usize = 100;
/// Statements that are explained in one round: each takes two connections.
const EXPLAINED_MAX: usize = 3;
/// Chance that pairs which came after a first discovery confirm it by accident.
const CONFIRMED: f64 = 0.01;
/// How often statements are stored, and what is old is forgotten.
const STORE_INTERVAL: Duration = Duration::from_secs(60);
/// Statements stored each time, costliest first.
const STORED_MAX: usize = 50;
/// A forecast's truth is the median of so many points at its share.
const TRUTH_POINTS: usize = 3;
/// Shares that are this near are the same.
const SAME_SHARE: f64 = 0.5;

/// A forecast, kept until the truth is known.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Kept {
    /// Milliseconds since 1970.
    pub at_ms: i64,
    /// Percent that was served when it was made.
    pub made_at: f64,
    /// What is expected.
    pub forecast: Forecast,
    /// p99 that was seen at that share, in microseconds.
    pub truth_p99_us: Option<f64>,
    /// Whether that lies in the interval.
    pub held: Option<bool>,
    #[serde(skip)]
    id: i64,
    #[serde(skip)]
    truths: Vec<u64>,
}

/// What is measured of a shadow.
#[derive(Debug, Default)]
pub struct Measured {
    points: Mutex<VecDeque<Point>>,
    /// Newest last.
    pub forecasts: Mutex<Vec<Kept>>,
    /// By fingerprint.
    pub findings: Mutex<BTreeMap<u64, Finding>>,
    /// Executions per second, by fingerprint.
    pub rates: Mutex<HashMap<u64, f64>>,
}

impl Measured {
    /// From what was seen so far.
    ///
    /// # Errors
    /// What is missing.
    pub fn forecast(&self, share: f64) -> Result<Forecast, String> {
        let points: Vec<Point> = lock(&self.points).iter().copied().collect();
        forecast(&points, share)
    }
}

#[derive(Clone, Copy)]
struct Counts {
    at: Instant,
    served: u64,
    sampled: u64,
    dropped: u64,
    candidates: u64,
}

impl Counts {
    fn of(shadow: &ManagedShadow) -> Counts {
        let seen = &shadow.route.observations;
        Counts {
            at: Instant::now(),
            served: seen.served.get(),
            sampled: seen.sampled.get(),
            dropped: seen.dropped.get(),
            candidates: seen.candidates.get(),
        }
    }
}

/// What the shadow did since `before`, if the share was the same all the time.
fn point(shadow: &ManagedShadow, before: Counts, now: Counts, share: f64) -> Option<Point> {
    let (sampling, seconds) = (shadow.route.sample_reads.get(), now.at.duration_since(before.at).as_secs_f64());
    let copied = now.sampled.saturating_sub(before.sampled);
    let executed = copied.saturating_sub(now.dropped.saturating_sub(before.dropped)) as f64 * (sampling / 100.0).max(1.0);
    let reads = now.served.saturating_sub(before.served) + executed as u64;
    let all = if share > 0.0 {
        now.candidates.saturating_sub(before.candidates) as f64
    } else if sampling > 0.0 {
        copied as f64 * 100.0 / sampling.min(100.0)
    } else {
        return None;
    };
    let recent = shadow.route.observations.recent(now.at);
    let resources = lock(&shadow.health).resources.clone();
    if reads < READS_MIN || recent.count < READS_MIN || seconds <= 0.0 {
        return None;
    }
    Some(Point {
        share,
        rate: reads as f64 / seconds,
        all: all / seconds,
        reads,
        p50_us: recent.p50_us,
        p99_us: recent.p99_us,
        active: resources.as_ref().map_or(0.0, |sample| sample.active as f64),
        cores: resources.and_then(|sample| sample.cpu_cores),
    })
}

/// Measures a shadow for as long as the process lives.
pub(super) async fn measure(controller: Arc<Controller>, managed: Arc<Managed>, shadow: Arc<ManagedShadow>) {
    remember(&controller, &managed, &shadow);
    let mut counts = Counts::of(&shadow);
    let mut share = shadow.route.serve_reads.get();
    let mut last_forecast_at: Option<f64> = None;
    let mut suspects: HashMap<u64, u64> = HashMap::new();
    let mut stored = Instant::now();
    let mut executions: HashMap<u64, u64> = HashMap::new();
    loop {
        let interval = controller.config.load().proxy.profile.interval;
        tokio::time::sleep(interval).await;
        if controller.handed_over.load(Ordering::SeqCst) {
            continue;
        }
        let statements = shadow.route.observations.profile.statements();
        prove(&shadow, &statements);
        explain_slower(&controller, &managed, &shadow, &statements, &mut suspects).await;
        // a point is a whole window at one share
        let now = Counts::of(&shadow);
        let serving = shadow.route.serve_reads.get();
        if serving != share {
            (share, counts) = (serving, now);
        } else if now.at.duration_since(counts.at) >= shadow.config.load().revert.window {
            let seconds = now.at.duration_since(counts.at).as_secs_f64();
            let rate = |statement: &StatementProfile| {
                let before = executions.insert(statement.fingerprint, statement.shadow.count).unwrap_or(0);
                (statement.fingerprint, statement.shadow.count.saturating_sub(before) as f64 / seconds)
            };
            *lock(&shadow.measured.rates) = statements.iter().map(rate).collect();
            if let Some(point) = point(&shadow, counts, now, share) {
                add(&controller, &managed, &shadow, point);
                if last_forecast_at != Some(share) && foretell(&controller, &managed, &shadow, share) {
                    last_forecast_at = Some(share);
                }
            }
            counts = now;
        }
        if stored.elapsed() >= STORE_INTERVAL {
            stored = Instant::now();
            store(&controller, &managed, &shadow, &statements);
        }
    }
}

/// What an earlier process has measured.
fn remember(controller: &Controller, managed: &Managed, shadow: &ManagedShadow) {
    let (database, name) = (&managed.database.name, shadow.name());
    let read = |kind, limit| controller.repository.measures(kind, database, &name, limit).unwrap_or_default();
    let points = read(MeasureKind::Point, POINTS_MAX).into_iter().filter_map(|measure| serde_json::from_value(measure.data).ok());
    *lock(&shadow.measured.points) = points.collect();
    let forecasts = read(MeasureKind::Forecast, FORECASTS_MAX).into_iter();
    *lock(&shadow.measured.forecasts) =
        forecasts.filter_map(|measure| Some(Kept { id: measure.id, ..serde_json::from_value(measure.data).ok()? })).collect();
    for measure in read(MeasureKind::Finding, FINDINGS_MAX) {
        if let Ok(finding) = serde_json::from_value::<Finding>(measure.data)
            && let Ok(fingerprint) = u64::from_str_radix(&finding.fingerprint, 16)
        {
            lock(&shadow.measured.findings).insert(fingerprint, finding);
        }
    }
}

/// Which statements may move first, while a ladder wants to know.
fn prove(shadow: &ManagedShadow, statements: &[StatementProfile]) {
    let config = shadow.config.load();
    let ladder = lock(&shadow.ladder);
    if config.shift.order == ShiftOrder::Proven && ladder.is_climbing(&config.shift) {
        shadow.route.first.store(Some(Arc::new(proven(statements))));
    }
}

/// Fingerprints of proven statements.
pub(super) fn proven(statements: &[StatementProfile]) -> std::collections::HashSet<u64> {
    statements.iter().filter(|statement| statement.verdict() == "proven").map(|statement| statement.fingerprint).collect()
}

/// Slower statements that other pairs confirm are looked into once.
async fn explain_slower(
    controller: &Controller,
    managed: &Managed,
    shadow: &ManagedShadow,
    statements: &[StatementProfile],
    suspects: &mut HashMap<u64, u64>,
) {
    let profile = &shadow.route.observations.profile;
    // what is no discovery any more was none, or was mended: it may become one again
    suspects.retain(|fingerprint, _| statements.iter().any(|statement| statement.fingerprint == *fingerprint && statement.slower));
    lock(&shadow.measured.findings).retain(|fingerprint, _| {
        statements.iter().all(|statement| statement.fingerprint != *fingerprint || statement.slower || statement.comparison.is_none())
    });
    let mut explained = 0;
    for statement in statements.iter().filter(|statement| statement.slower) {
        let fingerprint = statement.fingerprint;
        let since = *suspects.entry(fingerprint).or_insert_with(|| profile.pairs_seen(fingerprint));
        let known = lock(&shadow.measured.findings).contains_key(&fingerprint);
        if known || explained == EXPLAINED_MAX || lock(&shadow.measured.findings).len() >= FINDINGS_MAX {
            continue;
        }
        let Some(comparison) = profile.compare_after(fingerprint, since).filter(|comparison| comparison.p < CONFIRMED) else { continue };
        explained += 1;
        let finding = explain::look_into(managed, shadow, fingerprint, &statement.text, comparison).await;
        let (database, name) = (&managed.database.name, shadow.name());
        let message = format!(
            "a statement is {:.1} times slower on {name} ({:.1} to {:.1}, {} pairs): {} (fingerprint {}). {}",
            comparison.ratio,
            comparison.low,
            comparison.high,
            comparison.pairs,
            finding.text,
            finding.fingerprint,
            finding.describe()
        );
        let data = json!(finding);
        if let Err(error) = controller.repository.keep(MeasureKind::Finding, database, &name, &data) {
            tracing::warn!(%error, "a finding was not kept");
        }
        lock(&shadow.measured.findings).insert(fingerprint, finding);
        controller.repository.record(Severity::Warning, "monitor", database, &name, &message, data);
    }
}

fn add(controller: &Controller, managed: &Managed, shadow: &ManagedShadow, point: Point) {
    let (database, name) = (&managed.database.name, shadow.name());
    {
        let mut points = lock(&shadow.measured.points);
        if points.len() == POINTS_MAX {
            points.pop_front();
        }
        points.push_back(point);
    }
    if let Err(error) = controller.repository.keep(MeasureKind::Point, database, &name, &json!(point)) {
        tracing::warn!(%error, "a measurement was not kept");
    }
    let mut told = Vec::new();
    for kept in lock(&shadow.measured.forecasts).iter_mut() {
        if kept.truth_p99_us.is_some() || (kept.forecast.share - point.share).abs() > SAME_SHARE {
            continue;
        }
        kept.truths.push(point.p99_us);
        if kept.truths.len() < TRUTH_POINTS {
            continue;
        }
        kept.truths.sort_unstable();
        let truth = kept.truths.get(TRUTH_POINTS / 2).copied().unwrap_or(0) as f64;
        (kept.truth_p99_us, kept.held) = (Some(truth), Some(kept.forecast.p99_us.holds(truth)));
        told.push(kept.clone());
    }
    for kept in told {
        if let Err(error) = controller.repository.amend(kept.id, &json!(kept)) {
            tracing::warn!(%error, "the truth of a forecast was not kept");
        }
        let ms = |micros: f64| micros / 1000.0;
        let expected = kept.forecast.p99_us;
        let message = format!(
            "the forecast of {name} for {} %, made at {} %, said a p99 of {:.1} ms ({:.1} to {:.1}): it is {:.1} ms, {}",
            kept.forecast.share,
            kept.made_at,
            ms(expected.value),
            ms(expected.low),
            ms(expected.high),
            ms(kept.truth_p99_us.unwrap_or(0.0)),
            if kept.held == Some(true) { "as foretold" } else { "outside of it" }
        );
        controller.repository.record(Severity::Info, "monitor", database, &name, &message, json!(kept));
    }
}

/// Forecasts the next step and 100 %. True: there is one.
fn foretell(controller: &Controller, managed: &Managed, shadow: &ManagedShadow, share: f64) -> bool {
    let next = shadow.config.load().shift.steps.iter().copied().find(|step| *step > share + SAME_SHARE);
    let mut targets: Vec<f64> = next.into_iter().chain([100.0]).filter(|target| *target > share + SAME_SHARE).collect();
    targets.dedup();
    let mut made = false;
    for target in targets {
        let Ok(forecast) = shadow.measured.forecast(target) else { continue };
        let mut kept = Kept {
            at_ms: jiff::Timestamp::now().as_millisecond(),
            made_at: share,
            forecast,
            truth_p99_us: None,
            held: None,
            id: 0,
            truths: Vec::new(),
        };
        match controller.repository.keep(MeasureKind::Forecast, &managed.database.name, &shadow.name(), &json!(kept)) {
            Ok(id) => kept.id = id,
            Err(error) => tracing::warn!(%error, "a forecast was not kept"),
        }
        let mut forecasts = lock(&shadow.measured.forecasts);
        if forecasts.len() == FORECASTS_MAX {
            forecasts.remove(0);
        }
        forecasts.push(kept);
        made = true;
    }
    made
}

/// Forgets what is older than `profile.retention`, for as long as the process lives.
pub(super) async fn forget(controller: Arc<Controller>) {
    loop {
        tokio::time::sleep(STORE_INTERVAL).await;
        if controller.handed_over.load(Ordering::SeqCst) {
            continue;
        }
        let age_ms = i64::try_from(controller.config.load().proxy.profile.retention.as_millis()).unwrap_or(i64::MAX);
        let repository = controller.repository.clone();
        let forgotten = tokio::task::spawn_blocking(move || repository.forget_measures(age_ms)).await;
        if let Ok(Err(error)) = forgotten {
            tracing::warn!(%error, "old measurements were not removed");
        }
    }
}

fn store(controller: &Controller, managed: &Managed, shadow: &ManagedShadow, statements: &[StatementProfile]) {
    if statements.is_empty() {
        return;
    }
    let (repository, database, name) = (controller.repository.clone(), managed.database.name.clone(), shadow.name());
    let document = json!(statements.iter().take(STORED_MAX).collect::<Vec<_>>());
    tokio::task::spawn_blocking(move || {
        if let Err(error) = repository.keep(MeasureKind::Profile, &database, &name, &document) {
            tracing::warn!(%error, "the profile was not kept");
        }
    });
}
