//! `SHOW CLIENTS`, `SERVERS`, `POOLS`, `STATS` and `LEFTOVERS`: who is connected, and what is there.

use super::{
    Controller,
    managed::lock,
    show::{latency, row, table},
    state::database_state,
};
use crate::{
    cdc::{self, Direction},
    console::Answer,
    pool::Figures,
};
use serde_json::{Value, json};
use std::sync::atomic::Ordering;

impl Controller {
    /// What is there on each server, and whether a started shadow uses it.
    pub(super) async fn show_leftovers(&self) -> Answer {
        let mut rows = Vec::new();
        for managed in &self.databases {
            let name = &managed.database.name;
            let started: Vec<String> = managed
                .shadows
                .iter()
                .filter(|shadow| self.repository.is_started(name, &shadow.name()).unwrap_or(true))
                .flat_map(|shadow| [Direction::Forward, Direction::Reverse].map(|way| cdc::feed_name(&managed.feed_spec(shadow, way))))
                .collect();
            for (server, url) in managed.servers() {
                match cdc::leftovers::list(&url).await {
                    Ok(found) => rows.extend(found.into_iter().map(|leftover| {
                        // The schema and the triggers serve every feed.
                        let used = started.contains(&leftover.name) || (!started.is_empty() && !leftover.name.contains(name.as_str()));
                        let used = used || leftover.active;
                        vec![json!(name), json!(server), json!(leftover.kind), json!(leftover.name), json!(leftover.active), json!(used)]
                    })),
                    Err(error) => {
                        rows.push(vec![json!(name), json!(server), json!("error"), json!(error.to_string()), json!(false), json!(false)])
                    }
                }
            }
        }
        table(&["database", "server", "kind", "name", "active", "used"], rows)
    }

    pub(super) fn show_clients(&self) -> Answer {
        let mut rows = Vec::new();
        for managed in &self.databases {
            for session in &managed.database.sessions {
                let pins = lock(&session.pins).join(", ");
                let error = lock(&session.attach_error).clone();
                rows.push(row([
                    json!(session.id),
                    json!(managed.database.name),
                    json!(session.user),
                    json!(session.peer),
                    json!(session.application),
                    json!(session.since.elapsed().as_secs()),
                    json!(session.requests.load(Ordering::Relaxed)),
                    json!(session.epoch.load(Ordering::SeqCst)),
                    json!(session.state_name()),
                    json!(pins),
                    json!(error),
                ]));
            }
        }
        table(&["id", "database", "user", "peer", "application", "age_s", "requests", "epoch", "state", "pinned_by", "shadow_error"], rows)
    }

    pub(super) fn show_servers(&self) -> Answer {
        let mut rows = Vec::new();
        for managed in &self.databases {
            let mut servers = vec![("source".to_owned(), managed.config.load().source.to_string(), managed.health.clone())];
            servers
                .extend(managed.shadows.iter().map(|shadow| (shadow.name(), shadow.config.load().url.to_string(), shadow.health.clone())));
            let owner = managed.database.route.load().owner.name.clone();
            let pools = self.door.pools().all();
            let figures = pools.iter().filter(|pool| pool.database.name == managed.database.name).map(|pool| pool.figures());
            let (used, idle) = figures.fold((0, 0), |(used, idle), figures| (used + figures.active, idle + figures.idle));
            for (name, url, health) in servers {
                let (used, idle) = if name == owner { (used, idle) } else { (0, 0) };
                let health = lock(&health).clone();
                rows.push(row([
                    json!(managed.database.name),
                    json!(name),
                    json!(url),
                    json!(health.state()),
                    json!(health.since_ms),
                    json!(health.failures),
                    json!(health.resources),
                    json!(used),
                    json!(idle),
                    json!(health.error),
                ]));
            }
        }
        table(&["database", "server", "url", "state", "since_ms", "failures", "resources", "pool_active", "pool_idle", "error"], rows)
    }

    /// One row per database and role that has a pool, one per database that has none. The columns that PgBouncer has are
    /// called as there.
    pub(super) fn show_pools(&self) -> Answer {
        let pools = self.door.pools().all();
        let mut rows = Vec::new();
        for managed in &self.databases {
            let database = &managed.database;
            let settings = database.pool.load();
            let mut add = |user: Value, clients: u64, figures: Figures| {
                let wait = figures.longest_wait;
                rows.push(row([
                    json!(database.name),
                    user,
                    json!(settings.mode.as_str()),
                    json!(clients),
                    json!(database.gate.active()),
                    json!(database.gate.is_closed()),
                    json!(figures.active),
                    json!(figures.waiting),
                    json!(figures.active),
                    json!(figures.idle),
                    json!(figures.opening),
                    json!(figures.standby),
                    json!(wait.as_secs()),
                    json!(wait.subsec_micros()),
                    json!(settings.size),
                    json!(figures.error),
                ]));
            };
            let own: Vec<_> = pools.iter().filter(|pool| pool.database.name == database.name).collect();
            for pool in &own {
                let clients = database.sessions.iter().filter(|session| session.user == pool.user).count() as u64;
                add(json!(pool.user), clients, pool.figures());
            }
            if own.is_empty() {
                add(Value::Null, database.clients(), Figures::default());
            }
        }
        table(
            &[
                "database",
                "user",
                "mode",
                "clients",
                "in_transaction",
                "held",
                "cl_active",
                "cl_waiting",
                "sv_active",
                "sv_idle",
                "sv_login",
                "sv_standby",
                "maxwait",
                "maxwait_us",
                "pool_size",
                "error",
            ],
            rows,
        )
    }

    pub(super) fn show_stats(&self) -> Answer {
        let rows = self.databases.iter().map(|managed| {
            let state = database_state(managed);
            let mut values = vec![json!(state.name), json!(state.requests), json!(state.transactions), json!(state.errors)];
            values.extend(latency(&state.latency));
            values
        });
        table(
            &["database", "requests", "transactions", "errors", "count", "p50_ms", "p90_ms", "p99_ms", "p999_ms", "max_ms"],
            rows.collect(),
        )
    }
}
