//! Carries out what the controller of the ladder decides, a few times per second. Going back is one store into an atomic; telling about
//! it comes afterwards and may wait for a disk.

use super::{
    Controller,
    managed::{Managed, ManagedShadow, lock},
};
use crate::{
    cdc::Feed,
    config::{FeedKind, ShiftOrder},
    metadata::Severity,
    traffic::{
        database::monotonic_ms,
        judge::Health,
        ladder::{Decision, Seen},
    },
};
use serde_json::{Value, json};
use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

/// How often the controller is asked.
const INTERVAL: Duration = Duration::from_millis(50);

pub(super) fn lag_of(shadow: &ManagedShadow, feed: &Feed) -> Duration {
    if shadow.config.load().feed == FeedKind::Mirror { shadow.route.mirror.lag() } else { feed.lag() }
}

/// The figures that led to a decision.
fn figures(health: &Health, percent: f64) -> Value {
    json!({"served_percent": percent, "requests": health.requests, "errors": health.errors, "compared": health.compared,
        "different": health.different, "owner_reads": health.owner.count, "owner_p99_us": health.owner.p99_us,
        "shadow_p99_us": health.shadow.p99_us, "lag_ms": u64::try_from(health.lag.as_millis()).unwrap_or(u64::MAX),
        "slower_than_owner_p99": {"from_us": health.slow[0].from_us, "answers": health.slow[0].share.above, "of": health.slow[0].share.of},
        "connections_percent": health.load.map(|load| load.connections), "active": health.load.map(|load| load.active),
        "cpu_cores": health.load.and_then(|load| load.cpu_cores), "locks_waiting": health.load.map(|load| load.locks_waiting)})
}

/// Judges a shadow's health; goes back, climbs or holds.
pub(super) async fn judge_and_climb(controller: Arc<Controller>, managed: Arc<Managed>, shadow: Arc<ManagedShadow>) {
    let mut interval = tokio::time::interval(INTERVAL);
    let mut held: Option<String> = None;
    loop {
        interval.tick().await;
        if controller.handed_over.load(Ordering::SeqCst) {
            continue;
        }
        let max_lag = shadow.config.load().revert.max_lag;
        let in_step = shadow.feed().is_some_and(|(feed, direction)| {
            managed.feeds_from_owner(direction) && feed.is_streaming() && lag_of(&shadow, &feed) <= max_lag
        });
        let was_in_step = shadow.route.in_step.swap(in_step, Ordering::SeqCst);
        let serving = shadow.route.serve_reads.get();
        if serving <= 0.0 {
            continue;
        }
        if was_in_step != in_step {
            tracing::warn!(database = %managed.database.name, shadow = %shadow.name(), in_step, "a serving shadow has changed its step with the owner");
        }
        let now = Instant::now();
        let config = shadow.config.load();
        if !in_step || !shadow.route.breaker.allows(monotonic_ms()) {
            // sessions keep their reads for the moment: that is what a failing shadow, or one that is gone, looks like
            shadow.route.observations.unavailable(now);
        }
        let lag = match shadow.feed() {
            Some((feed, _)) => lag_of(&shadow, &feed),
            None => Duration::MAX,
        };
        let (mut health, first_bad) = shadow.route.observations.health(lag, &config.revert, now);
        health.load = lock(&shadow.health).load();
        let served = shadow.route.observations.served.get();
        let closed = config.shift.calendar.closed(jiff::Timestamp::now());
        let decision = {
            let mut ladder = lock(&shadow.ladder);
            let seen = Seen {
                health: &health,
                served: served.saturating_sub(shadow.served_before_step.load(Ordering::SeqCst)),
                closed: closed.as_deref(),
                now,
            };
            let (next, decision) = ladder.decide(&seen, &config.revert, &config.shift);
            match &decision {
                Decision::Revert(_) => shadow.route.serve_reads.set(0.0),
                // under the lock: never behind a revert that came between
                Decision::Promote(percent) => {
                    shadow.route.serve_reads.set(*percent);
                    shadow.served_before_step.store(served, Ordering::SeqCst);
                }
                Decision::Stay | Decision::Hold(_) | Decision::Finish => {}
            }
            *ladder = next;
            if !(config.shift.order == ShiftOrder::Proven && next.is_climbing(&config.shift)) {
                shadow.route.first.store(None);
            }
            decision
        };
        let (database, name) = (managed.database.name.clone(), shadow.name());
        let told = match decision {
            Decision::Stay => None,
            Decision::Hold(reason) => (held.as_ref() != Some(&reason)).then(|| {
                let message = format!("shift: {name} stays at {serving} % of the reads of {database} for now: {reason}");
                let data = figures(&health, serving);
                held = Some(reason);
                (Severity::Info, message, data)
            }),
            Decision::Promote(percent) => {
                held = None;
                let message = format!("shift: {name} now answers {percent} % of the reads of {database}");
                Some((Severity::Info, message, figures(&health, percent)))
            }
            Decision::Finish => {
                held = None;
                let message = format!("shift: {name} has held the last step; its reads stay there. Next: CUTOVER {name}");
                Some((Severity::Info, message, figures(&health, serving)))
            }
            Decision::Revert(reason) => {
                held = None;
                let first_bad = first_bad.or_else(|| now.checked_sub(lag.min(config.revert.max_lag)));
                let state = shadow.revert(&reason, first_bad);
                let message = format!(
                    "reads of database {database} went back from shadow {name} to the owner: {reason}. Clients were answered by the owner. \
                     When the cause is mended: SHIFT START {name}"
                );
                let data = json!({"reason": reason, "served_percent": serving, "reaction_ms": state.reaction_ms, "health": figures(&health, serving)});
                Some((Severity::Alert, message, data))
            }
        };
        if let Some((severity, message, data)) = told {
            let repository = controller.repository.clone();
            tokio::task::spawn_blocking(move || repository.record(severity, "traffic", &database, &name, &message, data));
        }
    }
}
