//! `SHIFT START`, `SHIFT STOP` and `REVERT`.

use super::{
    Controller,
    commands::tagged,
    managed::{ManagedShadow, lock},
    profile,
};
use crate::{
    cdc::Direction,
    config::{FeedKind, ShiftOrder},
    console::{Answer, CommandError},
    metadata::Severity,
    traffic::ladder::Ladder,
};
use serde_json::json;
use std::{
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

impl Controller {
    pub(super) fn shift_start(&self, name: &str, who: &str) -> Result<Answer, CommandError> {
        let (managed, shadow) = self.shadow(name)?;
        answers_reads(shadow)?;
        let feed = shadow.feed().filter(|(feed, direction)| *direction == Direction::Forward && feed.is_streaming());
        if feed.is_none() {
            return Err(CommandError::Refused(format!("shadow {name} is not in step with the source: SHOW FEED says why")));
        }
        let config = shadow.config.load();
        if let Some(reason) = config.shift.calendar.closed(jiff::Timestamp::now()) {
            return Err(CommandError::Refused(format!(
                "no step of {name} may be taken now: {reason}; see [database.shadow.shift] in proxy.toml"
            )));
        }
        let proven = (config.shift.order == ShiftOrder::Proven).then(|| profile::proven(&shadow.route.observations.profile.statements()));
        if proven.as_ref().is_some_and(|proven| proven.is_empty()) {
            return Err(CommandError::Refused(format!(
                "shift.order is \"proven\" and no statement of {name} is proven yet (SHOW PROFILE): SET {name} sample_reads = 10, and wait for traffic"
            )));
        }
        shadow.route.observations.forget(config.revert.window);
        let (ladder, percent) = Ladder::start(&config.shift, Instant::now());
        shadow.served_before_step.store(shadow.route.observations.served.get(), Ordering::SeqCst);
        {
            let mut current = lock(&shadow.ladder);
            *current = ladder;
            shadow.route.first.store(proven.filter(|_| ladder.is_climbing(&config.shift)).map(Arc::new));
            shadow.route.serve_reads.set(percent);
        }
        let steps = config.shift.steps.iter().map(|step| format!("{step} %")).collect::<Vec<_>>().join(", ");
        let message = format!("shift of {name} started by {who}: {steps}, each held for {} s", config.shift.hold.as_secs_f64());
        self.repository.record(Severity::Info, "traffic", &managed.database.name, name, &message, json!({"served_percent": percent}));
        Ok(tagged("SHIFT START", message))
    }

    pub(super) fn shift_stop(&self, name: &str, who: &str) -> Result<Answer, CommandError> {
        let (managed, shadow) = self.shadow(name)?;
        *lock(&shadow.ladder) = Ladder::Idle;
        shadow.route.first.store(None);
        let message =
            format!("shift of {name} stopped by {who}: it stays at {} %; REVERT {name} takes it to 0", shadow.route.serve_reads.get());
        self.repository.record(Severity::Info, "traffic", &managed.database.name, name, &message, json!({}));
        Ok(tagged("SHIFT STOP", message))
    }

    pub(super) fn revert(&self, name: &str, who: &str) -> Result<Answer, CommandError> {
        let (managed, shadow) = self.shadow(name)?;
        shadow.revert(&format!("asked for by {who}"), None);
        self.repository.record(
            Severity::Warning,
            "traffic",
            &managed.database.name,
            name,
            &format!("reads went back from {name} to the owner: asked for by {who}"),
            json!({}),
        );
        Ok(tagged("REVERT", format!("{name} answers no reads any more")))
    }
}

/// Refuses what a shadow that is fed by mirrored writes cannot do.
pub(super) fn answers_reads(shadow: &ManagedShadow) -> Result<(), CommandError> {
    if shadow.config.load().feed == FeedKind::Mirror {
        let name = shadow.name();
        return Err(CommandError::Refused(format!(
            "{name} is fed by mirrored writes: its rows are not proven to be the owner's, so it answers no reads; they can be sampled \
             (SET {name} sample_reads = 10)"
        )));
    }
    Ok(())
}
