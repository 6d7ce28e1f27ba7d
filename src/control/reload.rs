//! `SET`, `RELOAD`, and the watch on proxy.toml. A wrong edit is refused whole and the running settings stay.

use super::{
    Controller,
    managed::{ManagedShadow, lock},
};
use crate::{
    config::{self, Config, FeedKind, MirrorWrites, SchemaSource, ShadowConfig},
    console::{Answer, CommandError},
    metadata::Severity,
    net::changed_at,
    schema::mapping::Rules,
    traffic::route::{Percent, Serving},
};
use serde_json::json;
use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime},
};

/// How often the file's modification time is looked at.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

const KNOBS: &str = "sample_reads, serve_reads, consistency, hedge_after, mirror_writes, revert.window, revert.min_requests, revert.error_rate, \
     revert.mismatch_rate, revert.latency_ratio, revert.latency_floor, revert.max_lag, revert.max_connections, revert.max_active, \
     revert.max_cpu_cores, revert.max_locks_waiting, shift.steps, shift.hold, shift.min_served, shift.order, adapt.auto_approve";

impl Controller {
    /// `SET <shadow> <knob> = <value>`: until the next restart or reload.
    pub(super) fn set(&self, name: &str, knob: &str, value: &str, who: &str) -> Result<Answer, CommandError> {
        let (managed, shadow) = self.shadow(name)?;
        // one parser for the file and for SET: the value is put into a file of its own
        let (section, key) = knob.split_once('.').map_or(("", knob), |(section, key)| (section, key));
        let known = KNOBS.split(", ").any(|known| known.trim() == knob);
        if !known {
            return Err(CommandError::Syntax(format!("\"{knob}\" is not a knob of a shadow; the knobs are {KNOBS}")));
        }
        let value = value.trim();
        let value = match key {
            "mirror_writes" | "consistency" | "hedge_after" | "window" | "max_lag" | "latency_floor" | "hold" | "order" => {
                format!("\"{}\"", value.replace(['"', '\\'], ""))
            }
            "steps" => format!("[{}]", value.trim_matches(['[', ']']).replace('%', "")),
            "min_requests" | "max_active" | "max_locks_waiting" | "min_served" => value.to_owned(),
            _ => {
                let number = value.trim_end_matches('%').trim();
                if number.contains('.') { number.to_owned() } else { format!("{number}.0") }
            }
        };
        let header = if section.is_empty() { String::new() } else { format!("[database.shadow.{section}]\n") };
        let text = format!(
            "[[database]]\nname = \"d\"\nsource = \"postgres://u@source/d\"\n[[database.shadow]]\nname = \"s\"\nurl = \"postgres://u@shadow/d\"\n{header}{key} = {value}\n"
        );
        let parsed = config::parse(&text, "SET", &|_| None).map_err(|error| {
            let reason = error.to_string();
            CommandError::Syntax(reason.split_once(": ").map_or(reason.clone(), |(_, reason)| reason.to_owned()))
        })?;
        let Some(given) = parsed.databases.first().and_then(|database| database.shadows.first()) else {
            return Err(CommandError::Syntax("the value was not understood".into()));
        };
        let mut changed: ShadowConfig = (**shadow.config.load()).clone();
        match (section, key) {
            ("", "sample_reads") => changed.sample_reads = given.sample_reads,
            ("", "serve_reads") => changed.serve_reads = given.serve_reads,
            ("", "consistency") => changed.consistency = given.consistency,
            ("", "hedge_after") => changed.hedge_after = given.hedge_after,
            ("", "mirror_writes") => changed.mirror_writes = given.mirror_writes,
            ("revert", "window") => changed.revert.window = given.revert.window,
            ("revert", "min_requests") => changed.revert.min_requests = given.revert.min_requests,
            ("revert", "error_rate") => changed.revert.error_rate = given.revert.error_rate,
            ("revert", "mismatch_rate") => changed.revert.mismatch_rate = given.revert.mismatch_rate,
            ("revert", "latency_ratio") => changed.revert.latency_ratio = given.revert.latency_ratio,
            ("revert", "latency_floor") => changed.revert.latency_floor = given.revert.latency_floor,
            ("revert", "max_lag") => changed.revert.max_lag = given.revert.max_lag,
            ("revert", "max_connections") => changed.revert.max_connections = given.revert.max_connections,
            ("revert", "max_active") => changed.revert.max_active = given.revert.max_active,
            ("revert", "max_cpu_cores") => changed.revert.max_cpu_cores = given.revert.max_cpu_cores,
            ("revert", "max_locks_waiting") => changed.revert.max_locks_waiting = given.revert.max_locks_waiting,
            ("shift", "min_served") => changed.shift.min_served = given.shift.min_served,
            ("shift", "order") => changed.shift.order = given.shift.order,
            ("shift", "steps") => changed.shift.steps.clone_from(&given.shift.steps),
            ("shift", "hold") => changed.shift.hold = given.shift.hold,
            (_, _) => changed.adapt.auto_approve = given.adapt.auto_approve,
        }
        if managed.database.route.load().owner == shadow.route.target && section.is_empty() {
            return Err(CommandError::Refused(format!(
                "{name} owns the writes of {}: it takes no copies and serves everything",
                managed.database.name
            )));
        }
        if key == "serve_reads" && changed.serve_reads > 0.0 && changed.feed == FeedKind::Mirror {
            return Err(CommandError::Refused(format!(
                "{} is fed by mirrored writes and answers no reads; they can be sampled",
                changed.name
            )));
        }
        if key == "serve_reads" && changed.serve_reads > 0.0 && !shadow.route.in_step.load(Ordering::SeqCst) {
            return Err(CommandError::Refused(format!("shadow {name} is not in step with the source: SHOW FEED says why")));
        }
        shadow.apply(&changed, section.is_empty().then_some(key), false);
        let message = format!("{knob} of {name} set to {} by {who}, until the next restart or reload", value.trim_matches('"'));
        self.repository.record(Severity::Info, "config", &managed.database.name, name, &message, json!({}));
        Ok(Answer { tag: "SET".into(), notices: vec![message], ..Answer::default() })
    }

    /// `RELOAD`
    pub(super) fn reload(&self) -> Result<Answer, CommandError> {
        match config::load(&self.config_path) {
            Ok(config) => {
                let notices = self.adopt(config).map_err(CommandError::Refused)?;
                Ok(Answer { tag: "RELOAD".into(), notices, ..Answer::default() })
            }
            Err(error) => Err(CommandError::Refused(format!("{error}. The running settings stay"))),
        }
    }

    /// Takes over what can change in a running process; the rest is refused whole.
    fn adopt(&self, config: Config) -> Result<Vec<String>, String> {
        let running = self.config.load();
        let mut fixed = Vec::new();
        let (old, new) = (&running.proxy, &config.proxy);
        if (old.listen, &old.unix_socket, old.http, &old.metadata, old.shadow_memory_bytes_max)
            != (new.listen, &new.unix_socket, new.http, &new.metadata, new.shadow_memory_bytes_max)
        {
            fixed.push("listen, unix_socket_dir, unix_socket_mode, http, metadata and shadow_memory of [proxy]".to_owned());
        }
        let names = |config: &Config| -> Vec<(String, Vec<String>)> {
            config
                .databases
                .iter()
                .map(|database| (database.name.clone(), database.shadows.iter().map(|shadow| shadow.name.clone()).collect()))
                .collect()
        };
        if names(&running) != names(&config) {
            fixed.push("the list of databases and shadows".to_owned());
        } else {
            for (old, new) in running.databases.iter().zip(&config.databases) {
                let urls = |database: &config::DatabaseConfig| {
                    let shadows: Vec<_> = database.shadows.iter().map(|shadow| (shadow.url.clone(), shadow.feed, shadow.schema)).collect();
                    (database.source.clone(), shadows)
                };
                if urls(old) != urls(new) {
                    fixed.push(format!("urls, feed and schema of {}", old.name));
                }
            }
        }
        if !fixed.is_empty() {
            return Err(format!(
                "{} cannot change in a running process: undo that edit, or restart. The running settings stay",
                fixed.join("; ")
            ));
        }
        let (acceptor, policy) = super::start::access(&config).map_err(|error| format!("{error}. The running settings stay"))?;
        self.door.set_tls(acceptor);
        self.door.set_policy(policy);
        for (managed, database) in self.databases.iter().zip(&config.databases) {
            managed.database.set_users(database.users.clone());
            managed.database.pool.store(Arc::new(database.pool.clone()));
            let before = managed.config.swap(Arc::new(database.clone()));
            for ((shadow, new), file) in managed.shadows.iter().zip(&database.shadows).zip(&before.shadows) {
                shadow.apply(new, None, file.serve_reads != new.serve_reads);
            }
        }
        self.door.pools().look();
        self.door.set_limits(super::start::limits(&config));
        self.config.store(Arc::new(config));
        let message = format!("{} reloaded", self.config_path.display());
        self.repository.record(Severity::Info, "config", "", "", &message, json!({}));
        Ok(vec![message])
    }

    /// Looks at modification times and reloads after an edit: of the file itself, and of certificates, user lists and rules.
    pub(super) async fn watch_file(self: Arc<Self>) {
        let mut known = self.modified();
        loop {
            tokio::time::sleep(WATCH_INTERVAL).await;
            let now = self.modified();
            // a file that is away for a moment is being replaced
            if now == known || now.contains(&None) || self.handed_over.load(Ordering::SeqCst) {
                continue;
            }
            known = now;
            if let Err(error) = self.reload() {
                self.repository.record(
                    Severity::Alert,
                    "config",
                    "",
                    "",
                    &format!("an edit of the configuration was refused: {error}"),
                    json!({}),
                );
            }
        }
    }
}

impl Controller {
    fn modified(&self) -> Vec<Option<SystemTime>> {
        let config = self.config.load();
        let mut files = config.proxy.auth.files();
        files.extend(config.proxy.tls.iter().flat_map(config::TlsConfig::files));
        changed_at(std::iter::once(&self.config_path).chain(&files).map(|path| path.as_path()))
    }
}

impl ManagedShadow {
    /// Takes new settings over. `only`: the single knob of the shadow itself that was SET; `None`: those that differ from
    /// the settings before, so that a reload does not undo what a ladder or a revert has done to others.
    /// `file_changes_serving`: the edit itself is about serve_reads; else a reload ends a SET of it only where neither a ladder
    /// nor a revert has moved it since.
    fn apply(&self, new: &ShadowConfig, only: Option<&str>, file_changes_serving: bool) {
        let old = self.config.load_full();
        let wanted = |knob: &str, differs: bool| only.map_or(differs, |only| only == knob);
        if wanted("sample_reads", old.sample_reads != new.sample_reads) {
            self.route.sample_reads.set(new.sample_reads);
        }
        self.route.sample_per_query.store(new.sample_per_query, Ordering::Relaxed);
        self.route.ignore.store(Arc::new(new.ignore.clone()));
        let as_set = self.route.serve_reads.get() == Percent::new(old.serve_reads).get();
        if wanted("serve_reads", old.serve_reads != new.serve_reads && (as_set || file_changes_serving)) {
            self.route.observations.forget(new.revert.window);
            self.route.serve_reads.set(new.serve_reads);
            *lock(&self.ladder) = crate::traffic::ladder::Ladder::Idle;
        }
        if wanted("mirror_writes", old.mirror_writes != new.mirror_writes) {
            let rehearse = new.mirror_writes == MirrorWrites::Rehearse && new.feed == FeedKind::Cdc;
            self.route.rehearse.store(rehearse, Ordering::SeqCst);
        }
        self.route.serving.store(Arc::new(Serving { hedge_after: new.hedge_after, consistency: new.consistency }));
        if old.revert.window != new.revert.window {
            self.route.observations.forget(new.revert.window);
        }
        self.auto_approve.store(Arc::new(new.adapt.auto_approve));
        if old.map != new.map || old.fill != new.fill {
            self.rules.store(Arc::new(Rules::new(new.schema == SchemaSource::Existing, &new.map).filling(&new.fill)));
        }
        self.config.store(Arc::new(new.clone()));
    }
}
