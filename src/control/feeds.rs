//! `SHADOW START`, `RESYNC` and `STOP`, and what feeds leave behind.

use super::{
    Controller,
    commands::{failed, tagged},
    managed::lock,
};
use crate::{
    cdc::{self, Direction, Start},
    config::FeedKind,
    console::{Answer, CommandError},
    metadata::Severity,
};
use serde_json::json;
use std::sync::atomic::Ordering;

impl Controller {
    pub(super) fn shadow_start(&self, name: &str) -> Result<Answer, CommandError> {
        let (managed, shadow) = self.shadow(name)?;
        let kind = shadow.config.load().feed;
        if kind == FeedKind::None {
            return Err(CommandError::Refused(format!("shadow {name} has feed \"none\" in proxy.toml: nothing to start")));
        }
        if managed.database.route.load().owner.name != "source" {
            return Err(CommandError::Refused(format!(
                "{} owns the writes of {}: ROLLBACK {} first",
                managed.database.route.load().owner.name,
                managed.database.name,
                managed.database.name
            )));
        }
        if let Some((feed, _)) = shadow.feed()
            && !feed.state().state.starts_with("failed")
        {
            return Err(CommandError::Refused(format!("shadow {name} is already started: SHOW FEED says how far it is")));
        }
        self.repository.set_started(&managed.database.name, name, true).map_err(failed)?;
        match kind {
            FeedKind::Mirror => managed.start_mirror(shadow, &self.repository, false),
            FeedKind::Cdc | FeedKind::None => {
                managed.start_feed(shadow, Direction::Forward, Start::Copy, &self.repository);
            }
        }
        self.repository.record(
            Severity::Info,
            "cdc",
            &managed.database.name,
            name,
            &format!("shadow {name} is being created: SHOW FEED shows progress and time left"),
            json!({}),
        );
        Ok(tagged(
            "SHADOW START",
            format!("shadow {name} is being created: schema, data, then the change stream. SHOW FEED shows progress and time left"),
        ))
    }

    pub(super) async fn shadow_resync(&self, name: &str, who: &str) -> Result<Answer, CommandError> {
        let (managed, shadow) = self.shadow(name)?;
        let _turn = managed.switching.try_lock().map_err(|_| CommandError::Refused("a cutover is running: wait for its end".into()))?;
        let Some((feed, direction)) = shadow.feed() else {
            return Err(CommandError::Refused(format!("shadow {name} has no feed: SHADOW START {name} copies it")));
        };
        if shadow.config.load().feed == FeedKind::Mirror {
            return Err(CommandError::Refused(format!(
                "{name} is fed by mirrored writes, which have no place in a stream to come back to: SHADOW STOP {name} and SHADOW START {name} \
                 copy it again"
            )));
        }
        if shadow.rules.load().existing {
            return Err(CommandError::Refused(format!(
                "{name} has schema = \"existing\": a resync compares rows under the owner's names and types. SHADOW STOP {name}, empty its \
                 tables, and SHADOW START {name} copies it again"
            )));
        }
        if !feed.state().state.starts_with("failed") {
            return Err(CommandError::Refused(format!(
                "the feed of {name} has not lost its place: SHOW FEED says how it is, VERIFY {name} REPAIR puts rows right while it runs"
            )));
        }
        shadow.stop_serving();
        shadow.route.in_step.store(false, Ordering::SeqCst);
        feed.stop().await;
        managed.start_feed(shadow, direction, Start::Resync, &self.repository);
        let message = format!("{who} asked for a resync of {name}: both sides are compared, and what differs is written");
        self.repository.record(Severity::Info, "cdc", &managed.database.name, name, &message, json!({}));
        Ok(tagged(
            "SHADOW RESYNC",
            format!(
                "{name} is compared with the owner, and only what differs is written; then it follows again. SHOW FEED shows progress and time left"
            ),
        ))
    }

    pub(super) async fn shadow_stop(&self, name: &str) -> Result<Answer, CommandError> {
        let (managed, shadow) = self.shadow(name)?;
        if managed.database.route.load().owner == shadow.route.target {
            return Err(CommandError::Refused(format!(
                "{name} owns the writes of {}: ROLLBACK {} first",
                managed.database.name, managed.database.name
            )));
        }
        let _turn = managed.switching.try_lock().map_err(|_| CommandError::Refused("a cutover is running: wait for its end".into()))?;
        self.repository.set_started(&managed.database.name, name, false).map_err(failed)?;
        shadow.stop_serving();
        shadow.route.in_step.store(false, Ordering::SeqCst);
        shadow.route.mirror.record(false);
        let feed = lock(&shadow.feed).take();
        shadow.route.freshness.store(None);
        *lock(&shadow.adapter) = None;
        if let Some((feed, _)) = feed {
            feed.stop().await;
        }
        for direction in [Direction::Forward, Direction::Reverse] {
            cdc::disarm(&managed.feed_spec(shadow, direction)).await.map_err(failed)?;
        }
        // It was fenced if it has been the owner; nobody depends on that any more.
        crate::cutover::switch::lift_fence(&shadow.route.target).await.map_err(CommandError::Failed)?;
        self.repository.record(
            Severity::Info,
            "cdc",
            &managed.database.name,
            name,
            &format!("shadow {name} is stopped: slot, publication and triggers are gone from the servers; its data stays"),
            json!({}),
        );
        Ok(tagged("SHADOW STOP", format!("shadow {name} is stopped; slot, publication and triggers are removed, its data stays")))
    }

    pub(super) async fn remove_leftovers(&self, name: &str, who: &str) -> Result<Answer, CommandError> {
        let managed = self.database(name)?;
        let _turn = managed.switching.try_lock().map_err(|_| CommandError::Refused("a cutover is running: wait for its end".into()))?;
        let mut keep = Vec::new();
        for shadow in &managed.shadows {
            // A started shadow needs the feed that runs, and after a cutover the one that is ready to.
            if self.repository.is_started(name, &shadow.name()).map_err(failed)?
                || managed.database.route.load().owner == shadow.route.target
            {
                keep.extend(
                    [Direction::Forward, Direction::Reverse].map(|direction| cdc::feed_name(&managed.feed_spec(shadow, direction))),
                );
            }
        }
        let mut removed = Vec::new();
        for (server, url) in managed.servers() {
            let gone = cdc::leftovers::remove(&url, name, &keep).await.map_err(|error| failed(format!("{server}: {error}")))?;
            removed.extend(gone.iter().map(|leftover| format!("{server}: {leftover}")));
        }
        if !removed.is_empty() {
            let message = format!("leftovers of {name} were removed: {}", removed.join(", "));
            self.repository.record(Severity::Info, "cdc", name, "", &message, json!({"by": who}));
        }
        let notices = if removed.is_empty() { vec!["there was nothing to remove".to_owned()] } else { removed };
        Ok(Answer { tag: "REMOVE LEFTOVERS".into(), notices, ..Answer::default() })
    }

    pub(super) fn lose_change(&self, name: &str) -> Result<Answer, CommandError> {
        let (_, shadow) = self.shadow(name)?;
        if !self.faults_allowed {
            return Err(CommandError::Refused("faults are for tests: start understudy with UNDERSTUDY_FAULT=lose-change".into()));
        }
        shadow.fault.lose_change.store(true, Ordering::SeqCst);
        Ok(tagged("FAULT", "the next row change is dropped before it is applied"))
    }
}
