//! The procedure: from one owner to the other.

use super::{CutoverError, step::Step};
use crate::{
    cdc::{self, Feed, FeedSpec},
    console::state::CutoverState,
    lsn::Lsn,
    metadata::{Owner, Repository, Severity},
    traffic::{database::Database, route::Target},
};
use serde_json::json;
use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};
use tokio_postgres::Client;

/// Sessions get this long to open their connections to the next owner, before anything is held.
const ARM_SESSIONS_TIMEOUT: Duration = Duration::from_secs(10);
/// The feed gets this long to catch up, before anything is held.
const CATCH_UP_TIMEOUT: Duration = Duration::from_secs(30);
/// Running transactions get this long to end while new ones wait; then the attempt is taken back.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
/// The marker gets this long to be applied while clients wait; then the attempt is taken back.
const MARKER_TIMEOUT: Duration = Duration::from_secs(5);
/// Sessions get this long to go over to the new owner, before they are expelled from the old one.
const MOVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Anything else that the next owner is asked while clients wait: a server that hangs must not hang them.
const HELD_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection is open, with its settings, within this time.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Publication, capture and slot of the way back; their locks are asked for in short attempts, with pauses between them.
const ARM_TIMEOUT: Duration = Duration::from_secs(90);
/// Taking the prepared way back away again. What cannot be removed now is reused by the next attempt or removed by SHADOW STOP.
const DISARM_TIMEOUT: Duration = Duration::from_secs(15);
/// Every statement on the old owner while clients wait.
const LOCK_TIMEOUT: &str = "2s";

/// Publishes a route: owner, epoch, standby.
type Publish = Box<dyn Fn(Arc<Target>, i64, Option<Arc<Target>>) + Send + Sync>;

/// What a switch needs. `from` owns the writes now.
pub struct Switch {
    /// `cutover` or `rollback`
    pub kind: &'static str,
    /// As sessions see it.
    pub database: Arc<Database>,
    /// Journal and ownership.
    pub repository: Repository,
    /// Shadow's name, for events.
    pub shadow: String,
    /// The owner now.
    pub from: Arc<Target>,
    /// The next owner.
    pub to: Arc<Target>,
    /// The next owner as stored.
    pub next: Owner,
    /// The feed `from` → `to`.
    pub feed: Feed,
    /// Its description.
    pub feed_spec: FeedSpec,
    /// The way back, `to` → `from`.
    pub opposite: FeedSpec,
    /// Publishes a route: owner, epoch, standby.
    pub publish: Publish,
    /// Starts the opposite feed from a marker.
    pub start_opposite: Box<dyn Fn(String) + Send + Sync>,
    /// For tests: the name of the step at which the process dies, as if killed.
    pub crash_at: Option<String>,
    /// Keeps the state that operators see.
    pub report: Box<dyn Fn(CutoverState) + Send + Sync>,
}

struct Progress {
    began: Instant,
    state: CutoverState,
    run: i64,
    /// The next owner was read-only before: a former owner. That comes back if this is taken back.
    was_fenced: bool,
}

type Failure = (Step, String);

impl Switch {
    /// What stands in the way, before anything is touched. Empty: nothing.
    pub async fn obstacles(&self) -> Vec<String> {
        let mut found = Vec::new();
        if !self.feed.is_streaming() {
            found.push(format!("the feed from {} to {} is not streaming (SHOW FEED says why)", self.from.name, self.to.name));
        }
        let held = self.feed.state().held_tables;
        if !held.is_empty() {
            found.push(format!("rows of {} wait for a decision on a proposal: SHOW PROPOSALS, then APPROVE or REJECT", held.join(", ")));
        }
        for session in &self.database.sessions {
            let pins = session.immovable();
            if !pins.is_empty() {
                found.push(format!(
                    "session {} of {} from {} cannot be moved: {}",
                    session.id,
                    session.user,
                    session.peer,
                    pins.join(", ")
                ));
            }
        }
        for target in [&self.from, &self.to] {
            if let Err(error) = connect(target).await {
                found.push(format!("cannot connect to {} ({}): {error}", target.name, target.url));
            }
        }
        if let Ok(client) = connect(&self.from).await {
            let prepared = client
                .query_one("SELECT count(*) FROM pg_catalog.pg_prepared_xacts WHERE database = pg_catalog.current_database()", &[])
                .await;
            if let Ok(count) = prepared.and_then(|row| row.try_get::<_, i64>(0))
                && count > 0
            {
                found.push(format!("{count} prepared transactions on {}: COMMIT PREPARED or ROLLBACK PREPARED them first", self.from.name));
            }
        }
        found
    }

    /// Carries it out. Runs to its end or its undoing whatever happens to the console that asked for it.
    ///
    /// # Errors
    /// [`CutoverError`]
    pub async fn run(&self) -> Result<CutoverState, CutoverError> {
        let obstacles = self.obstacles().await;
        if !obstacles.is_empty() {
            return Err(CutoverError::Refused(format!(
                "{} of {} is not possible now: {}",
                self.kind,
                self.database.name,
                obstacles.join("; ")
            )));
        }
        let run = self.repository.next_run(&self.database.name).map_err(|error| CutoverError::Refused(error.to_string()))?;
        let state =
            CutoverState { kind: self.kind.into(), from: self.from.name.clone(), to: self.to.name.clone(), ..CutoverState::default() };
        let refused = |error: String| CutoverError::Refused(format!("cannot look at {}: {error}", self.to.name));
        let on_to = connect(&self.to).await.map_err(refused)?;
        let was_fenced = is_fenced(&on_to).await.map_err(refused)?;
        let mut progress = Progress { began: Instant::now(), state, run, was_fenced };
        let marker = format!("{}-{}-{}", self.database.name, run, self.kind);
        let old_epoch = self.database.route.load().epoch;
        match self.until_flip(&mut progress, &marker, on_to).await {
            Ok((fence, held_at, changes)) => self.after_flip(progress, marker, fence, held_at, changes).await,
            Err((step, reason)) => {
                self.undo(&mut progress, old_epoch, step, &reason).await;
                Err(CutoverError::Undone { step: step.name(), reason, owner: self.from.name.clone() })
            }
        }
    }

    /// Writes a step into the journal.
    fn enter(&self, progress: &mut Progress, step: Step, data: serde_json::Value) -> Result<(), Failure> {
        self.repository.journal(&self.database.name, progress.run, step.name(), data).map_err(|error| (step, error.to_string()))?;
        self.note(progress, step);
        Ok(())
    }

    fn note(&self, progress: &mut Progress, step: Step) {
        progress.state.steps.push((step.name().into(), progress.began.elapsed().as_secs_f64() * 1000.0));
        progress.state.state = format!("running: {}", step.name());
        (self.report)(progress.state.clone());
        if self.crash_at.as_deref() == Some(step.name()) {
            // a test's kill -9, at a moment that only we can hit
            std::process::abort();
        }
    }

    /// Everything that can be taken back. Returns the connection that holds the locks, when the gate was closed, and how
    /// many changes the feed had applied at the marker.
    async fn until_flip(&self, progress: &mut Progress, marker: &str, on_to: Client) -> Result<(Client, Instant, u64), Failure> {
        let at = |step: Step| move |error: String| (step, error);
        self.enter(
            progress,
            Step::ArmOppositeFeed,
            json!({"kind": self.kind, "shadow": self.shadow, "from": self.from.name, "to": self.to.name, "marker": marker,
                "was_fenced": progress.was_fenced}),
        )?;
        let arm = async {
            writable(&on_to, &self.to, true).await?;
            cdc::arm_behind(&self.opposite, &opposite(marker)).await.map_err(|error| error.to_string())
        };
        within(ARM_TIMEOUT, &self.to, arm).await.map_err(at(Step::ArmOppositeFeed))?;

        self.enter(progress, Step::ArmSessions, json!({}))?;
        let epoch = self.database.route.load().epoch;
        (self.publish)(self.from.clone(), epoch, Some(self.to.clone()));
        self.arm_sessions().await.map_err(at(Step::ArmSessions))?;

        self.enter(progress, Step::CatchUp, json!({}))?;
        let on_from = connect(&self.from).await.map_err(at(Step::CatchUp))?;
        let locks = connect(&self.from).await.map_err(at(Step::CatchUp))?;
        let tables = tables_to_lock(&on_from).await.map_err(at(Step::CatchUp))?;
        let position = position_of(&on_from).await.map_err(at(Step::CatchUp))?;
        self.feed.wait_applied(position, CATCH_UP_TIMEOUT).await.map_err(|error| (Step::CatchUp, error.to_string()))?;

        self.enter(progress, Step::Hold, json!({}))?;
        let held_at = Instant::now();
        self.database.gate.close();
        if tokio::time::timeout(DRAIN_TIMEOUT, self.database.gate.drained()).await.is_err() {
            let open = self.database.gate.active();
            let which = open_transactions(&on_from).await.unwrap_or_default();
            return Err((
                Step::Hold,
                format!("{open} transactions were still open after {} s ({which}): end them and try again", DRAIN_TIMEOUT.as_secs()),
            ));
        }

        self.enter(progress, Step::Fence, json!({}))?;
        writable(&on_from, &self.from, false).await.map_err(at(Step::Fence))?;
        // a short deadlock_timeout makes an autovacuum that stands in the way give up at once (superusers only)
        let _ = locks.batch_execute("SET deadlock_timeout = '10ms'").await;
        locks
            .batch_execute(&format!("SET lock_timeout = '{LOCK_TIMEOUT}'; BEGIN; {tables}"))
            .await
            .map_err(|error| (Step::Fence, detail(&error)))?;

        self.enter(progress, Step::Marker, json!({}))?;
        let behind = cdc::emit_marker(&on_from, marker).await.map_err(|error| (Step::Marker, error.to_string()))?;
        self.feed.wait_marker(marker, MARKER_TIMEOUT).await.map_err(|error| (Step::Marker, error.to_string()))?;
        let changes = self.feed.state().changes;

        self.enter(progress, Step::Sequences, json!({"position": behind}))?;
        let sequences = async { cdc::sync_sequences_exact(&on_from, &on_to, &self.feed_spec).await.map_err(|error| error.to_string()) };
        within(HELD_TIMEOUT, &self.to, sequences).await.map_err(at(Step::Sequences))?;

        self.enter(progress, Step::OppositeMarker, json!({}))?;
        let emit = async { cdc::emit_marker(&on_to, &opposite(marker)).await.map_err(|error| error.to_string()) };
        within(HELD_TIMEOUT, &self.to, emit).await.map_err(at(Step::OppositeMarker))?;
        Ok((locks, held_at, changes))
    }

    async fn after_flip(
        &self,
        mut progress: Progress,
        marker: String,
        locks: Client,
        held_at: Instant,
        changes: u64,
    ) -> Result<CutoverState, CutoverError> {
        let owner = match self.repository.flip(&self.database.name, progress.run, &self.next) {
            Ok(ownership) => ownership,
            Err(error) => {
                let epoch = self.database.route.load().epoch;
                drop(locks);
                self.undo(&mut progress, epoch, Step::Flip, &error.to_string()).await;
                return Err(CutoverError::Undone { step: Step::Flip.name(), reason: error.to_string(), owner: self.from.name.clone() });
            }
        };
        self.note(&mut progress, Step::Flip);
        (self.publish)(self.to.clone(), owner.epoch, None);
        self.database.gate.open();
        progress.state.pause_ms = held_at.elapsed().as_secs_f64() * 1000.0;
        self.note(&mut progress, Step::Release);
        match self.finish(&mut progress, &marker, locks, changes, owner.epoch).await {
            Ok(()) => {
                progress.state.state = "done".into();
                (self.report)(progress.state.clone());
                let message = format!(
                    "{}: {} owns the writes of {} now; clients waited {:.0} ms. The way back is open: {}",
                    self.kind,
                    self.to.name,
                    self.database.name,
                    progress.state.pause_ms,
                    if self.next == Owner::Source {
                        format!("CUTOVER {}", self.shadow)
                    } else {
                        format!("ROLLBACK {}", self.database.name)
                    }
                );
                self.repository.record(
                    Severity::Info,
                    "cutover",
                    &self.database.name,
                    &self.shadow,
                    &message,
                    json!({"pause_ms": progress.state.pause_ms, "epoch": owner.epoch}),
                );
                Ok(progress.state)
            }
            Err((step, reason)) => {
                progress.state.state = format!("unfinished: {reason}");
                (self.report)(progress.state.clone());
                let message = format!(
                    "{}: {} owns the writes of {}, but step {} failed: {reason}. Restarting understudy repeats it",
                    self.kind,
                    self.to.name,
                    self.database.name,
                    step.name()
                );
                self.repository.record(Severity::Alert, "cutover", &self.database.name, &self.shadow, &message, json!({}));
                Err(CutoverError::Unfinished { step: step.name(), reason, owner: self.to.name.clone() })
            }
        }
    }

    /// What is left when clients already go on at the new owner. The locks on the old one are held until nobody else is
    /// connected there.
    async fn finish(&self, progress: &mut Progress, marker: &str, locks: Client, changes: u64, epoch: i64) -> Result<(), Failure> {
        self.enter(progress, Step::Expel, json!({}))?;
        self.sessions_moved(epoch).await;
        expel(&locks).await.map_err(|error| (Step::Expel, error))?;
        let _ = locks.batch_execute("ROLLBACK").await;

        self.enter(progress, Step::Prove, json!({}))?;
        let on_from = connect(&self.from).await.map_err(|error| (Step::Prove, error))?;
        let proof = format!("{marker}-proof");
        cdc::emit_marker(&on_from, &proof).await.map_err(|error| (Step::Prove, error.to_string()))?;
        self.feed.wait_marker(&proof, CATCH_UP_TIMEOUT).await.map_err(|error| (Step::Prove, error.to_string()))?;
        let foreign = self.feed.state().changes - changes;
        if foreign > 0 {
            let message = format!(
                "{foreign} row changes were committed on {} behind the cutover's marker by somebody who goes around understudy. They were carried to {} in order; find that client and stop it",
                self.from.name, self.to.name
            );
            self.repository.record(Severity::Alert, "cutover", &self.database.name, &self.shadow, &message, json!({"changes": foreign}));
        }

        self.enter(progress, Step::StopFeed, json!({}))?;
        self.feed.stop().await;
        cdc::disarm(&self.feed_spec).await.map_err(|error| (Step::StopFeed, error.to_string()))?;

        self.enter(progress, Step::StartOppositeFeed, json!({}))?;
        (self.start_opposite)(opposite(marker));
        self.enter(progress, Step::Done, json!({"pause_ms": progress.state.pause_ms}))
    }

    /// Waits until the sessions have gone over. They read their settings, LISTENs and prepared statements from the old
    /// owner while they move: expelled before that, they would go on without. One that cannot follow ends by itself.
    async fn sessions_moved(&self, epoch: i64) {
        let deadline = Instant::now() + MOVE_TIMEOUT;
        let left = || self.database.sessions.iter().any(|session| session.epoch.load(Ordering::SeqCst) < epoch);
        while left() && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Takes everything back: the old owner goes on.
    async fn undo(&self, progress: &mut Progress, epoch: i64, step: Step, reason: &str) {
        if let Ok(client) = connect(&self.from).await {
            let _ = writable(&client, &self.from, true).await;
        }
        (self.publish)(self.from.clone(), epoch, None);
        self.database.gate.open();
        if let Err(error) = clear_the_way(&self.to, &self.opposite, progress.was_fenced).await {
            tracing::warn!(%error, "cannot remove the prepared way back; the next attempt or SHADOW STOP removes it");
        }
        let _ = self.repository.journal(&self.database.name, progress.run, "undone", json!({"step": step.name(), "reason": reason}));
        progress.state.state = format!("undone: {reason}");
        (self.report)(progress.state.clone());
        let message = format!(
            "{} of {} was taken back at step {}: {reason}. {} still owns the writes; clients go on there. Mend the cause and try again",
            self.kind,
            self.database.name,
            step.name(),
            self.from.name
        );
        self.repository.record(Severity::Alert, "cutover", &self.database.name, &self.shadow, &message, json!({"step": step.name()}));
    }

    /// Waits until every session has its connection to the next owner.
    async fn arm_sessions(&self) -> Result<(), String> {
        let deadline = Instant::now() + ARM_SESSIONS_TIMEOUT;
        loop {
            let mut missing = Vec::new();
            for session in &self.database.sessions {
                if !session.standby_ready.load(Ordering::SeqCst) {
                    let reason = session.attach_error.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone();
                    missing.push(format!(
                        "session {} of {} ({})",
                        session.id,
                        session.user,
                        reason.unwrap_or_else(|| "not yet connected".into())
                    ));
                }
            }
            if missing.is_empty() {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(format!(
                    "{} sessions could not connect to {}: {}. If their roles differ from the url's, add a [[database.user]] with their password",
                    missing.len(),
                    self.to.name,
                    missing.first().cloned().unwrap_or_default()
                ));
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// The marker of the way back that belongs to a marker.
pub(super) fn opposite(marker: &str) -> String {
    format!("{marker}-opposite")
}

/// Gives up on a server that does not answer.
async fn within<T>(limit: Duration, target: &Target, work: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    match tokio::time::timeout(limit, work).await {
        Ok(result) => result,
        Err(_) => Err(format!("no answer from {} within {} s", target.name, limit.as_secs())),
    }
}

pub(super) async fn connect(target: &Target) -> Result<Client, String> {
    let open = async {
        let (client, connection) = crate::backend::control(&target.url, "understudy cutover").await.map_err(|error| error.to_string())?;
        tokio::spawn(connection);
        client
            .batch_execute(
                "SET default_transaction_read_only = off; SET statement_timeout = '30s'; SET idle_in_transaction_session_timeout = 0",
            )
            .await
            .map_err(|error| detail(&error))?;
        Ok(client)
    };
    within(CONNECT_TIMEOUT, target, open).await
}

/// Takes a prepared way back away: the fence of a former owner stands again, slot and publication are gone.
pub(super) async fn clear_the_way(to: &Target, opposite: &FeedSpec, fenced: bool) -> Result<(), String> {
    let work = async {
        if fenced {
            writable(&connect(to).await?, to, false).await?;
        }
        cdc::disarm(opposite).await.map_err(|error| error.to_string())
    };
    within(DISARM_TIMEOUT, to, work).await
}

/// Whether new connections to the database of this connection are read-only by default.
async fn is_fenced(client: &Client) -> Result<bool, String> {
    let text = "SELECT EXISTS (SELECT FROM pg_catalog.pg_db_role_setting s JOIN pg_catalog.pg_database d ON d.oid = s.setdatabase
        WHERE d.datname = pg_catalog.current_database() AND s.setrole = 0 AND 'default_transaction_read_only=on' = ANY (s.setconfig))";
    client.query_one(text, &[]).await.and_then(|row| row.try_get(0)).map_err(|error| detail(&error))
}

/// Sets or resets the read-only default of a database: the soft layer of the fence, for whoever goes around the proxy.
pub(super) async fn writable(client: &Client, target: &Target, writable: bool) -> Result<(), String> {
    let name = target.url.dbname.replace('"', "\"\"");
    let text = match writable {
        true => format!("ALTER DATABASE \"{name}\" RESET default_transaction_read_only"),
        false => format!("ALTER DATABASE \"{name}\" SET default_transaction_read_only = on"),
    };
    client.batch_execute(&text).await.map_err(|error| detail(&error))
}

/// Takes the fence away from a former owner that is let go. Only for a database that nobody writes to through the proxy.
///
/// # Errors
/// The server's words.
pub async fn lift_fence(target: &Target) -> Result<(), String> {
    let client = connect(target).await?;
    let fenced = "SELECT EXISTS (SELECT FROM pg_catalog.pg_db_role_setting s JOIN pg_catalog.pg_database d ON d.oid = s.setdatabase
        WHERE d.datname = pg_catalog.current_database() AND s.setrole = 0 AND 'default_transaction_read_only=on' = ANY (s.setconfig))";
    let row = client.query_one(fenced, &[]).await.map_err(|error| detail(&error))?;
    match row.try_get(0) {
        Ok(true) => writable(&client, target, true).await,
        _ => Ok(()),
    }
}

/// Ends the connections of everyone but understudy to the database of this connection.
pub(super) async fn expel(client: &Client) -> Result<(), String> {
    let text = "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity
        WHERE datname = pg_catalog.current_database() AND pid <> pg_catalog.pg_backend_pid()
          AND backend_type = 'client backend' AND application_name NOT LIKE 'understudy%'";
    client.batch_execute(text).await.map_err(|error| detail(&error))
}

async fn position_of(client: &Client) -> Result<Lsn, String> {
    let row = client.query_one("SELECT pg_catalog.pg_current_wal_insert_lsn()::text", &[]).await.map_err(|error| detail(&error))?;
    let text: String = row.try_get(0).map_err(|error| error.to_string())?;
    text.parse().map_err(|error: crate::lsn::ParseLsnError| error.to_string())
}

/// The oldest open transactions of others, for people.
async fn open_transactions(client: &Client) -> Result<String, String> {
    let text = "SELECT pg_catalog.format('process %s on the server, user %s, application \"%s\", open for %s s, %s', pid, usename, application_name,
                pg_catalog.round(extract(epoch FROM pg_catalog.clock_timestamp() - xact_start)), state)
        FROM pg_catalog.pg_stat_activity WHERE datname = pg_catalog.current_database() AND xact_start IS NOT NULL
            AND backend_type = 'client backend' AND application_name NOT LIKE 'understudy%' ORDER BY xact_start LIMIT 5";
    let rows = client.query(text, &[]).await.map_err(|error| detail(&error))?;
    let lines: Vec<String> = rows.iter().filter_map(|row| row.try_get(0).ok()).collect();
    Ok(lines.join("; "))
}

/// One LOCK statement over all user tables; empty when there are none. EXCLUSIVE lets readers in.
async fn tables_to_lock(client: &Client) -> Result<String, String> {
    let rows = client
        .query(
            "SELECT pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname)
             FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
             WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relpersistence <> 't'
               AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'understudy') AND n.nspname NOT LIKE 'pg\\_%'
             ORDER BY c.oid",
            &[],
        )
        .await
        .map_err(|error| detail(&error))?;
    let names: Vec<String> = rows.iter().filter_map(|row| row.try_get(0).ok()).collect();
    Ok(if names.is_empty() { String::new() } else { format!("LOCK TABLE {} IN EXCLUSIVE MODE", names.join(", ")) })
}

/// The server's own words, where there are some.
pub(super) fn detail(error: &tokio_postgres::Error) -> String {
    error.as_db_error().map_or_else(|| error.to_string(), |server| format!("{} (SQLSTATE {})", server.message(), server.code().code()))
}
