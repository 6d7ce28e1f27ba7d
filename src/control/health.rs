//! Whether each server answers and what it is doing: asked every few seconds (`[proxy.profile]`), with longer pauses while it does not answer; the change
//! from one to the other is an event.

use super::{
    Controller,
    managed::{Managed, lock},
};
use crate::{
    config::ServerUrl,
    metadata::{MeasureKind, Severity},
    monitor::{self, ResourceSample},
    traffic::judge::Load,
};
use serde_json::json;
use std::{
    sync::{Arc, Mutex, atomic::Ordering},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Longest pause while a server does not answer.
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// How often tables are looked at as well: dead rows grow slowly, and an application may have ten thousand tables.
const THOROUGH_INTERVAL: Duration = Duration::from_secs(60);
/// A server that has not answered by then does not answer.
const TIMEOUT: Duration = Duration::from_secs(3);
/// Pause after the first failure; it doubles up to [`BACKOFF_MAX`].
const BACKOFF_MIN: Duration = Duration::from_millis(500);
/// Failures in a row that make a server count as down: one may be a connection that a restart has cut.
const FAILURES_DOWN: u64 = 2;

/// What is known of a server.
#[derive(Clone, Debug, Default)]
pub struct ServerHealth {
    /// `None`: not asked yet.
    pub up: Option<bool>,
    /// Milliseconds since 1970 of the last change.
    pub since_ms: i64,
    /// Failures in a row.
    pub failures: u64,
    /// What the last failure was.
    pub error: Option<String>,
    /// The newest sample, with rates since the one before; nothing while the server cannot be asked.
    pub resources: Option<ResourceSample>,
    /// The sample before it.
    before: Option<ResourceSample>,
}

/// A change worth an event.
#[derive(Debug, PartialEq, Eq)]
enum Change {
    Down,
    Up,
}

impl ServerHealth {
    fn answered(&mut self, sample: ResourceSample, now_ms: i64) -> Option<Change> {
        self.failures = 0;
        self.error = None;
        self.before = self.resources.replace(sample);
        let before = self.up.replace(true);
        if before != Some(true) {
            self.since_ms = now_ms;
        }
        (before == Some(false)).then_some(Change::Up)
    }

    /// What the server was doing in both of the newest samples; `None`: there are not two.
    pub fn load(&self) -> Option<Load> {
        self.resources.as_ref().zip(self.before.as_ref()).map(|(now, before)| Load::of(now).least(Load::of(before)))
    }

    fn failed(&mut self, error: String, now_ms: i64) -> Option<Change> {
        self.failures += 1;
        self.error = Some(error);
        self.resources = None;
        if self.failures < FAILURES_DOWN || self.up == Some(false) {
            return None;
        }
        self.up = Some(false);
        self.since_ms = now_ms;
        Some(Change::Down)
    }

    /// Before the next question.
    fn pause(&self, interval: Duration) -> Duration {
        match self.failures {
            0 => interval,
            failures => BACKOFF_MIN.saturating_mul(1 << failures.min(10)).min(BACKOFF_MAX),
        }
    }

    /// For people.
    pub fn state(&self) -> &'static str {
        match self.up {
            None => "not asked yet",
            Some(true) => "up",
            Some(false) => "down",
        }
    }
}

fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_millis() as i64)
}

/// Asks a server for as long as the process lives. `name`: `source`, or the shadow's.
pub(super) async fn watch(
    controller: Arc<Controller>,
    managed: Arc<Managed>,
    name: String,
    url: impl Fn() -> ServerUrl,
    health: Arc<Mutex<ServerHealth>>,
) {
    let mut session: Option<tokio_postgres::Client> = None;
    let mut earlier: Option<(ResourceSample, Instant)> = None;
    let mut looked_at_tables: Option<Instant> = None;
    loop {
        let thorough = looked_at_tables.is_none_or(|at| at.elapsed() >= THOROUGH_INTERVAL);
        let asked = async {
            let client = match session.take() {
                Some(client) => client,
                None => super::commands::connect(&url(), "understudy monitor").await.map_err(|error| error.to_string())?,
            };
            let mut sample = monitor::sample(&client, thorough).await.map_err(|error| error.to_string())?;
            if !thorough {
                sample.dead_rows_ratio = earlier.as_ref().map_or(0.0, |(before, _)| before.dead_rows_ratio);
            }
            Ok((client, sample))
        };
        let answer =
            tokio::time::timeout(TIMEOUT, asked).await.unwrap_or_else(|_| Err(format!("no answer within {} s", TIMEOUT.as_secs())));
        let change = match answer {
            Ok((client, sample)) => {
                let now = Instant::now();
                let rated = match &earlier {
                    Some((before, at)) => sample.clone().rates_since(before, now.duration_since(*at)),
                    None => sample.clone(),
                };
                earlier = Some((sample, now));
                session = Some(client);
                if thorough {
                    looked_at_tables = Some(now);
                }
                keep(&controller, &managed, &name, &rated);
                lock(&health).answered(rated, now_ms())
            }
            Err(error) => {
                earlier = None;
                lock(&health).failed(error, now_ms())
            }
        };
        if let Some(change) = change
            && !controller.handed_over.load(Ordering::SeqCst)
        {
            tell(&controller, &managed, &name, &url(), &lock(&health).clone(), &change);
        }
        let pause = lock(&health).pause(controller.config.load().proxy.profile.interval);
        tokio::time::sleep(pause).await;
    }
}

/// Keeps a sample with the measurements; a disk that is slow or full holds nothing up.
fn keep(controller: &Controller, managed: &Managed, name: &str, sample: &ResourceSample) {
    if controller.handed_over.load(Ordering::SeqCst) {
        return;
    }
    let (repository, database) = (controller.repository.clone(), managed.database.name.clone());
    let server = if name == "source" { String::new() } else { name.to_owned() };
    let Ok(data) = serde_json::to_value(sample) else { return };
    tokio::task::spawn_blocking(move || {
        if let Err(error) = repository.keep(MeasureKind::Resources, &database, &server, &data) {
            tracing::warn!(%error, "a sample of a server's resources was not kept");
        }
    });
}

fn tell(controller: &Controller, managed: &Managed, name: &str, url: &ServerUrl, health: &ServerHealth, change: &Change) {
    let database = &managed.database.name;
    let owner = managed.database.route.load().owner.name == name;
    let which = if name == "source" { "the source".to_owned() } else { format!("shadow {name}") };
    let (severity, message) = match change {
        Change::Up => (Severity::Info, format!("{which} of {database} at {}:{} answers again", url.host, url.port)),
        Change::Down => {
            let effect = if owner {
                "it owns the writes: clients get errors until it is back"
            } else {
                "no client notices: the owner answers everything; the feed goes on when it is back"
            };
            let reason = health.error.as_deref().unwrap_or("unknown");
            (
                Severity::Alert,
                format!(
                    "{which} of {database} at {}:{} does not answer: {reason}. {effect}. It is asked again every few seconds",
                    url.host, url.port
                ),
            )
        }
    };
    let shadow = if name == "source" { "" } else { name };
    controller.repository.record(severity, "monitor", database, shadow, &message, json!({"server": name, "owner": owner}));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_failure_is_no_outage_and_each_outage_is_told_once() {
        let mut health = ServerHealth::default();
        assert_eq!((health.state(), health.pause(BACKOFF_MAX)), ("not asked yet", BACKOFF_MAX));
        assert_eq!(health.answered(ResourceSample::default(), 1), None);
        assert_eq!((health.state(), health.since_ms), ("up", 1));
        assert_eq!(health.failed("x".into(), 2), None);
        assert_eq!((health.state(), health.resources.is_none()), ("up", true));
        assert_eq!(health.answered(ResourceSample::default(), 3), None);
        assert_eq!(health.failed("x".into(), 4), None);
        assert_eq!(health.failed("y".into(), 5), Some(Change::Down));
        assert_eq!((health.state(), health.since_ms, health.error.as_deref()), ("down", 5, Some("y")));
        assert_eq!(health.failed("z".into(), 6), None);
        assert_eq!(health.answered(ResourceSample::default(), 7), Some(Change::Up));
        assert_eq!((health.state(), health.since_ms, health.failures), ("up", 7, 0));
    }

    #[test]
    fn pauses_grow_and_stay_bounded() {
        let mut health = ServerHealth::default();
        let mut before = Duration::ZERO;
        for _ in 0..100 {
            health.failed(String::new(), 0);
            assert!(health.pause(BACKOFF_MAX) >= before && health.pause(BACKOFF_MAX) <= BACKOFF_MAX);
            before = health.pause(BACKOFF_MAX);
        }
        assert_eq!(before, BACKOFF_MAX);
    }
}
