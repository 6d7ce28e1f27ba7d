//! The feed as the rest of the product sees it, and the supervisor that keeps it alive.

use super::{
    CdcError, Direction, FeedSpec,
    applier::{Applier, Command, StartPoint},
    chores, copy,
    error::Attempt,
    guard, install,
    mirror::{self, Boundary},
    owner as identity, poll, resync, session,
    shared::{Phase, Shared, lock},
    stream,
};
use crate::{
    console::state::FeedState,
    lsn::Lsn,
    metadata::{Proposal, ProposalState, Repository, Severity},
    schema::{Adapter, approval},
};
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::sleep,
};

/// First pause after a lost connection; it doubles up to [`BACKOFF_MAX`].
const BACKOFF_MIN: Duration = Duration::from_millis(50);

/// Longest pause: a server that comes back is noticed within it.
const BACKOFF_MAX: Duration = Duration::from_secs(3);

/// A feed that ran this long starts its back-off anew.
const HEALTHY_AFTER: Duration = Duration::from_secs(10);

/// Commands waiting for the applier: people give them one at a time.
const COMMANDS_MAX: usize = 16;

/// How long a waiter sees no progress before the owner's WAL is flushed by a heartbeat.
const PATIENCE: Duration = Duration::from_millis(10);

/// Where a feed begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// Install, copy, stream. Goes on streaming if the copy had finished or was never needed ([`super::arm_behind`]); takes back and repeats one that had not.
    Copy,
    /// The feed has lost its place: compare both sides, write what differs, and stream from a new slot. Goes on streaming once that is done.
    Resync,
    /// Go on from the stored progress, or from the marker of [`super::arm_behind`].
    Resume,
    /// The slot was made by [`super::arm`] and the follower equals the owner at the transaction with this marker: everything before
    /// it is discarded.
    AfterMarker(String),
}

/// Faults for tests and demonstrations.
#[derive(Clone, Debug, Default)]
pub struct Fault {
    /// The applier silently drops one insert or update of a keyed table, and clears the flag.
    pub lose_change: Arc<AtomicBool>,
    /// The spool for unfinished transactions counts as full once, and clears the flag.
    pub spool_full: Arc<AtomicBool>,
}

/// One direction of one shadow. Clones share it; when the last is dropped, the task ends.
#[derive(Clone)]
pub struct Feed {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    stop: watch::Sender<bool>,
    task: Mutex<Option<JoinHandle<()>>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(task) = lock(&self.task).take() {
            task.abort();
        }
    }
}

/// The applier stands at a position while this lives.
pub struct HoldGuard {
    shared: Arc<Shared>,
    id: u64,
}

impl Drop for HoldGuard {
    fn drop(&mut self) {
        self.shared.holds.send_modify(|holds| {
            holds.remove(&self.id);
        });
    }
}

impl Feed {
    /// Starts a feed; returns at once.
    pub fn start(spec: FeedSpec, start: Start, adapter: Arc<Adapter>, repository: Repository, fault: Fault) -> Feed {
        let (commands, receiver) = mpsc::channel(COMMANDS_MAX);
        let shared = Arc::new(Shared::new(spec, adapter, repository, fault, commands));
        let (stop, stopped) = watch::channel(false);
        let task = tokio::spawn(supervise(Arc::clone(&shared), start, receiver, stopped));
        Feed { inner: Arc::new(Inner { shared, stop, task: Mutex::new(Some(task)) }) }
    }

    /// Copies without a slot and has mirrored writes follow; returns at once. The writes are run by `traffic`.
    pub fn start_mirrored(spec: FeedSpec, boundary: Arc<dyn Boundary>, adapter: Arc<Adapter>, repository: Repository) -> Feed {
        let (commands, mut receiver) = mpsc::channel(COMMANDS_MAX);
        let shared = Arc::new(Shared::new(spec, adapter, repository, Fault::default(), commands));
        let (stop, mut stopped) = watch::channel(false);
        let worker = Arc::clone(&shared);
        let task = tokio::spawn(async move {
            let work = async {
                mirror::keep_trying(&worker, &boundary).await;
                // Nothing is asked of it that a feed with a stream would do.
                receiver.close();
                while receiver.try_recv().is_ok() {}
                std::future::pending::<()>().await;
            };
            tokio::select! {
                () = work => {}
                _ = stopped.wait_for(|stop| *stop) => {}
            }
            if !worker.is_streaming() {
                // A copy that was not finished: nothing may be run on what there is of it.
                boundary.abandon();
            }
            worker.set_phase(Phase::Stopped);
        });
        Feed { inner: Arc::new(Inner { shared, stop, task: Mutex::new(Some(task)) }) }
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.inner.shared
    }

    /// Everything there is to know, for people and scripts.
    pub fn state(&self) -> FeedState {
        self.shared().state()
    }

    /// What it connects.
    pub fn spec(&self) -> &FeedSpec {
        &self.shared().spec
    }

    /// Everything on the owner up to here is applied.
    pub fn applied(&self) -> Lsn {
        self.shared().applied()
    }

    /// The same, to wait on.
    pub fn applied_watch(&self) -> watch::Receiver<Lsn> {
        self.shared().applied_watch.subscribe()
    }

    /// Connected to both sides, and following live.
    pub fn is_streaming(&self) -> bool {
        self.shared().is_streaming()
    }

    /// Age of the oldest change that is not applied; while a side is unreachable, time since the feed last was up to date.
    pub fn lag(&self) -> Duration {
        self.shared().lag()
    }

    /// Waits until everything up to a position of the owner is applied.
    ///
    /// # Errors
    /// [`CdcError::Timeout`], [`CdcError::Stopped`]
    pub async fn wait_applied(&self, lsn: Lsn, timeout: Duration) -> Result<(), CdcError> {
        self.wait(timeout, &format!("applying everything up to {lsn}"), || (self.applied() >= lsn).then_some(Ok(()))).await
    }

    /// Waits until the transaction with a marker is applied, and returns its end.
    ///
    /// # Errors
    /// [`CdcError::Timeout`], [`CdcError::Stopped`]
    pub async fn wait_marker(&self, id: &str, timeout: Duration) -> Result<Lsn, CdcError> {
        self.wait(timeout, &format!("applying the marker {id}"), || self.shared().marker(id).map(Ok)).await
    }

    /// Applies every commit that ends at or before `lsn`, none behind it, and stands there until the guard is dropped.
    ///
    /// # Errors
    /// [`CdcError::Beyond`] if a later commit is already applied or being applied, [`CdcError::Timeout`], [`CdcError::Stopped`]
    pub async fn hold_at(&self, lsn: Lsn, timeout: Duration) -> Result<HoldGuard, CdcError> {
        let guard = self.hold_now();
        self.advance(&guard, lsn, timeout).await.map(|()| guard)
    }

    /// Starts no further transaction until the guard is dropped or [advanced](Feed::advance); one that is being applied
    /// still ends. A position that the owner reaches after this call is never passed.
    pub fn hold_now(&self) -> HoldGuard {
        let shared = self.shared();
        let id = shared.next_hold.fetch_add(1, Ordering::Relaxed);
        shared.holds.send_modify(|holds| {
            holds.insert(id, Lsn::ZERO);
        });
        HoldGuard { shared: Arc::clone(shared), id }
    }

    /// Lets a held feed go on to `lsn` exactly, and waits until it stands there.
    ///
    /// # Errors
    /// As [`Feed::hold_at`].
    pub async fn advance(&self, guard: &HoldGuard, lsn: Lsn, timeout: Duration) -> Result<(), CdcError> {
        let shared = self.shared();
        shared.holds.send_modify(|holds| {
            holds.insert(guard.id, lsn);
        });
        let reached = || {
            // Commits lie between positions: one that begins at or behind `lsn` ends behind it.
            let passing = shared.in_flight.load();
            let applied = shared.last_commit.load().max(if passing >= lsn { passing } else { Lsn::ZERO });
            if applied > lsn || passing >= lsn && passing != Lsn::ZERO {
                return Some(Err(CdcError::Beyond { wanted: lsn, applied }));
            }
            (shared.applied() >= lsn).then_some(Ok(()))
        };
        self.wait(timeout, &format!("standing at {lsn}"), reached).await
    }

    /// Waits for a condition on the applied position, and hurries the owner meanwhile.
    async fn wait<T>(&self, timeout: Duration, what: &str, condition: impl Fn() -> Option<Result<T, CdcError>>) -> Result<T, CdcError> {
        let shared = self.shared();
        if let Some(result) = condition() {
            return result;
        }
        let deadline = tokio::time::Instant::now() + timeout;
        let _waiting = shared.waiting();
        let mut applied = shared.applied_watch.subscribe();
        loop {
            applied.borrow_and_update();
            if let Some(result) = condition() {
                return result;
            }
            let phase = lock(&shared.phase).clone();
            match phase {
                Phase::Failed(why) => return Err(CdcError::Stopped(why)),
                Phase::Stopped => return Err(CdcError::Stopped("it was told to stop".into())),
                Phase::Starting
                | Phase::Copying
                | Phase::Resyncing
                | Phase::CatchingUp
                | Phase::Streaming
                | Phase::Mirroring
                | Phase::Retrying(_) => {}
            }
            let now = tokio::time::Instant::now();
            if now >= deadline {
                return Err(CdcError::Timeout { what: what.to_owned(), after: timeout });
            }
            if tokio::time::timeout_at(deadline.min(now + PATIENCE), applied.changed()).await.is_err() {
                shared.nudge.notify_one();
            }
        }
    }

    /// Whether a table has a change whose commit ends behind `lsn`, as far as the stream was received; always for tables set aside.
    /// Partitions count as their root.
    pub fn table_changed_since(&self, schema: &str, table: &str, lsn: Lsn) -> bool {
        self.shared().touched_since(&(schema.to_owned(), table.to_owned()), lsn)
    }

    /// The same for a table named without its schema: whichever schema the search path means.
    pub fn table_name_changed_since(&self, table: &str, lsn: Lsn) -> bool {
        self.shared().name_touched_since(table, lsn)
    }

    /// Whether one of these tables (`schema.table` or `table`) is set aside: its rows here are not the owner's. `only` false: whether
    /// any is. A table is told of before the position behind which its rows are missing counts as applied.
    pub fn sets_aside(&self, tables: &[String], only: bool) -> bool {
        let held = lock(&self.shared().held);
        let means = |named: &String, (schema, table): &(String, String)| match named.split_once('.') {
            Some(named) => named == (schema.as_str(), table.as_str()),
            None => named == table,
        };
        !held.is_empty() && (!only || held.keys().any(|held| tables.iter().any(|named| means(named, held))))
    }

    /// Runs a waiting proposal on the follower between two transactions, replays what was spooled for its table, and records
    /// the decision. `sql`: instead of the suggestion; tried first in a transaction that is rolled back. Returns what was run.
    ///
    /// # Errors
    /// [`CdcError`]; then nothing was changed and the proposal waits on.
    pub async fn approve(&self, proposal: &Proposal, sql: Option<&str>, who: &str) -> Result<String, CdcError> {
        if proposal.draft.outside_transaction {
            return self.approve_outside(proposal, sql, who).await;
        }
        let (proposal, sql, who) = (Box::new(proposal.clone()), sql.map(str::to_owned), who.to_owned());
        self.ask(|reply| Command::Approve { proposal, sql, who, reply }).await
    }

    /// A statement that must not run in a transaction has a session of its own; the feed goes on beside it. What a person gives instead is
    /// tried and run in a transaction wherever that is possible; where it is not, the invalid index that a failure leaves is taken away.
    async fn approve_outside(&self, proposal: &Proposal, sql: Option<&str>, who: &str) -> Result<String, CdcError> {
        let given = sql.map(approval::read).transpose()?;
        let follower = session::connect_writer(&self.shared().spec.to, "approval").await?;
        let waiting = follower
            .query_opt("SELECT FROM understudy.deferred WHERE feed = $1 AND proposal = $2", &[&self.shared().feed, &proposal.id])
            .await
            .attempt("look at stored statements")?;
        if waiting.is_some() {
            return Err(CdcError::Protocol(format!(
                "the statements of proposal {} are being run by policy already: wait for their end",
                proposal.id
            )));
        }
        // Asked after the stored statements: the policy records its decision before it forgets them.
        let proposal = &self.shared().repository.proposal(proposal.id)?;
        super::held::approvable(proposal)?;
        let run = format!("run the statements of proposal {}", proposal.id);
        match (sql, given) {
            (Some(sql), Some(approval::Given::Transaction)) => {
                let begin = "SET search_path TO DEFAULT; SET lock_timeout = '10s'; BEGIN";
                follower.batch_execute(begin).await.attempt("try the statements")?;
                let tried = follower.batch_execute(sql).await;
                follower.batch_execute("ROLLBACK").await.attempt("undo the trial")?;
                tried.attempt("run the statements as a trial (nothing was changed, the proposal waits on)")?;
                follower.batch_execute("BEGIN").await.attempt(&run)?;
                // Dropping the session undoes what a failure leaves open.
                follower.batch_execute(sql).await.attempt(&run)?;
                follower.batch_execute("COMMIT").await.attempt(&run)?;
            }
            _ => {
                let statements = match sql {
                    Some(sql) => vec![sql.to_owned()],
                    None if proposal.draft.kind == "create_index" => chores::as_it_is_now(self.shared(), proposal.clone()).await?,
                    None => proposal.draft.sql.clone(),
                };
                let before = invalid_indexes(&follower).await?;
                if sql.is_some() {
                    follower.batch_execute("SET search_path TO DEFAULT").await.attempt("set up a session")?;
                }
                for statement in &statements {
                    if let Err(source) = follower.batch_execute(statement).await {
                        let left = invalid_indexes(&follower).await?;
                        for (index, _) in left.difference(&before).filter(|(_, name)| statement.contains(name.as_str())) {
                            follower.batch_execute(&format!("DROP INDEX {index}")).await.attempt("take an unfinished index away")?;
                        }
                        return Err(CdcError::Postgres { what: run, source });
                    }
                }
            }
        }
        if sql.is_none() && chores::dropped_meanwhile(self.shared(), proposal.id).await? {
            chores::undo_half(self.shared(), &follower, proposal.id).await;
            let note = "the owner dropped or renamed it meanwhile";
            self.shared().repository.decide(proposal.id, ProposalState::Superseded, who, "", note)?;
            return Err(CdcError::Setup(format!("proposal {}: {note}. Nothing was changed", proposal.id)));
        }
        let ran = sql.map_or_else(|| proposal.draft.sql.join(";\n"), str::to_owned);
        self.shared().repository.decide(proposal.id, ProposalState::Approved, who, &ran, "")?;
        Ok(ran)
    }

    /// Records that a proposal is not wanted. A table that it holds stays set aside for good.
    ///
    /// # Errors
    /// [`CdcError`]
    pub async fn reject(&self, proposal: &Proposal, who: &str) -> Result<(), CdcError> {
        let (proposal, who) = (Box::new(proposal.clone()), who.to_owned());
        self.ask(|reply| Command::Reject { proposal, who, reply }).await
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<Result<T, CdcError>>) -> Command) -> Result<T, CdcError> {
        let (reply, answer) = oneshot::channel();
        let gone = || CdcError::Stopped("it cannot be asked now; try again when SHOW FEED says streaming".into());
        self.shared().commands.try_send(command(reply)).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Ends the task and waits for it. Slot and progress stay.
    pub async fn stop(&self) {
        self.inner.stop.send_replace(true);
        let task = lock(&self.inner.task).take();
        if let Some(task) = task
            && let Err(error) = task.await
        {
            tracing::error!(%error, "the task of a feed ended badly");
        }
        self.shared().set_phase(Phase::Stopped);
    }
}

/// Keeps a feed going until it is told to stop or a person is needed.
async fn supervise(shared: Arc<Shared>, start: Start, mut commands: mpsc::Receiver<Command>, mut stopped: watch::Receiver<bool>) {
    let work = async {
        let (mut backoff, mut baseline) = (BACKOFF_MIN, !matches!(start, Start::Copy | Start::Resync));
        let mut resync = start == Start::Resync;
        loop {
            let began = Instant::now();
            let Err(error) = stream_once(&shared, &start, &mut baseline, &mut resync, &mut commands).await;
            shared.connected.store(false, Ordering::Release);
            shared.in_flight.reset(Lsn::ZERO);
            if error.is_permanent() {
                fail(&shared, &error);
                // Nobody will answer: those who ask are told so.
                commands.close();
                while commands.try_recv().is_ok() {}
                std::future::pending::<()>().await;
            }
            if began.elapsed() > HEALTHY_AFTER {
                backoff = BACKOFF_MIN;
            }
            tracing::warn!(feed = shared.feed, %error, "the feed was interrupted");
            if backoff == BACKOFF_MAX {
                let data = serde_json::json!({"feed": shared.feed, "reason": error.to_string()});
                shared.event(Severity::Warning, "the feed cannot go on at the moment; it keeps trying", data);
            }
            shared.set_phase(Phase::Retrying(error.to_string()));
            sleep(backoff).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    };
    tokio::select! {
        () = work => {}
        () = guard::watch(&shared) => {}
        // A sender that is gone means that the feed was dropped.
        _ = stopped.wait_for(|stop| *stop) => {}
    }
    shared.connected.store(false, Ordering::Release);
    shared.set_phase(Phase::Stopped);
}

pub(super) fn fail(shared: &Shared, error: &CdcError) {
    shared.set_phase(Phase::Failed(error.to_string()));
    shared.event(
        Severity::Alert,
        "the feed stopped: a person is needed. Put right what the reason says, then start the feed again",
        serde_json::json!({"feed": shared.feed, "reason": error.to_string()}),
    );
}

/// Indexes that a build has not finished: qualified, and their names alone.
async fn invalid_indexes(follower: &tokio_postgres::Client) -> Result<std::collections::BTreeSet<(String, String)>, CdcError> {
    let query = "SELECT format('%I.%I', n.nspname, c.relname), c.relname::text FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid
         JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE NOT i.indisvalid";
    let rows = follower.query(query, &[]).await.attempt("look for unfinished indexes")?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// The position to start at, as the follower stores it.
struct Progress {
    end: Lsn,
    confirmed: Lsn,
}

/// How long an applier that died with its process may still hold its session on the follower.
const PREDECESSOR_TIMEOUT: Duration = Duration::from_secs(30);

/// How long one attempt waits for a standby to be promoted; the next attempt waits again.
const PROMOTION_TIMEOUT: Duration = Duration::from_secs(10);

/// In a failover the owner's address leads to a standby for a moment: no reason to give up for good.
async fn await_primary(spec: &FeedSpec) -> Result<(), CdcError> {
    let owner = session::connect(&spec.from, "feed").await?;
    let deadline = Instant::now() + PROMOTION_TIMEOUT;
    loop {
        let row = owner.query_one("SELECT pg_is_in_recovery()", &[]).await.attempt("ask the owner whether it is a standby")?;
        if !row.get::<_, bool>(0) {
            return Ok(());
        }
        if Instant::now() > deadline {
            let what = format!("the promotion of {}:{}, which is a standby (the feed needs the primary),", spec.from.host, spec.from.port);
            return Err(CdcError::Timeout { what, after: PROMOTION_TIMEOUT });
        }
        sleep(Duration::from_millis(100)).await;
    }
}

/// Takes the lock that a feed's applier holds for as long as its session lives. What an applier that was killed had sent
/// may still be committed by its backend: progress is read only when that backend is gone.
pub(super) async fn await_predecessor(follower: &tokio_postgres::Client, feed: &str) -> Result<(), CdcError> {
    let deadline = tokio::time::Instant::now() + PREDECESSOR_TIMEOUT;
    loop {
        let row = follower
            .query_one("SELECT pg_try_advisory_lock(hashtextextended($1, 0))", &[&feed])
            .await
            .attempt("take the applier's lock on the follower")?;
        if row.try_get::<_, bool>(0).attempt("take the applier's lock on the follower")? {
            return Ok(());
        }
        if tokio::time::Instant::now() > deadline {
            return Err(CdcError::Protocol(format!(
                "another applier of {feed} is still connected to the follower: another understudy process with the same configuration?"
            )));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The applier commits without waiting for the disk, so what an earlier one stored may still be lost in a crash of the follower. It
/// becomes the position that the owner may forget only after a synchronous commit behind it.
async fn make_durable(client: &tokio_postgres::Client, feed: &str) -> Result<(), CdcError> {
    client.batch_execute("SET synchronous_commit = on").await.attempt("set up a session")?;
    client
        .execute(
            "INSERT INTO understudy.confirmed (feed, lsn) SELECT feed, end_lsn FROM understudy.progress WHERE feed = $1 AND phase = 'streaming'
             ON CONFLICT (feed) DO UPDATE SET lsn = greatest(confirmed.lsn, excluded.lsn)",
            &[&feed],
        )
        .await
        .attempt("make the feed's progress durable")?;
    client.batch_execute("SET synchronous_commit = off").await.attempt("set up a session")
}

async fn read_progress(client: &tokio_postgres::Client, feed: &str) -> Result<Option<Progress>, CdcError> {
    let row = client
        .query_opt(
            "SELECT p.end_lsn::text, greatest(c.lsn, p.end_lsn)::text FROM understudy.progress p
             LEFT JOIN understudy.confirmed c ON c.feed = p.feed WHERE p.feed = $1 AND p.phase = 'streaming'",
            &[&feed],
        )
        .await
        .attempt("read the feed's progress")?;
    row.map(|row| Ok(Progress { end: session::lsn(row.get(0))?, confirmed: session::lsn(row.get(1))? })).transpose()
}

/// The marker behind which the feed begins, while it has not met it.
async fn read_awaited_marker(client: &tokio_postgres::Client, feed: &str) -> Result<Option<String>, CdcError> {
    let row =
        client.query_opt("SELECT phase FROM understudy.progress WHERE feed = $1", &[&feed]).await.attempt("read the feed's progress")?;
    Ok(row.and_then(|row| install::awaited_marker(row.get(0)).map(str::to_owned)))
}

/// Connects everything and streams until something breaks: it never returns without an error.
async fn stream_once(
    shared: &Arc<Shared>,
    start: &Start,
    baseline: &mut bool,
    resync: &mut bool,
    commands: &mut mpsc::Receiver<Command>,
) -> Result<std::convert::Infallible, CdcError> {
    let spec = &shared.spec;
    await_primary(spec).await?;
    if *resync || resync::is_under_way(shared).await? {
        resync::run(shared).await?;
        *resync = false;
    } else if *start == Start::Copy {
        copy::run(shared).await?;
    }
    let follower = session::connect_writer(&spec.to, "applier").await?;
    install::target_tables(&follower).await?;
    let owner = session::connect(&spec.from, "feed").await?;
    install::check_owner(&owner, &spec.from).await?;
    await_predecessor(&follower, &shared.feed).await?;
    make_durable(&follower, &shared.feed).await?;
    let progress = read_progress(&follower, &shared.feed).await?;
    let awaited = read_awaited_marker(&follower, &shared.feed).await?;
    let marker = match (start, &progress) {
        (Start::AfterMarker(id), None) => Some(id.clone()),
        (_, None) if awaited.is_some() => awaited,
        (Start::Resume | Start::Resync, None) => {
            return Err(CdcError::Setup(format!(
                "{} holds no progress of the feed {}: it was never copied, or its database was replaced. Start the feed with a copy",
                spec.to, shared.feed
            )));
        }
        _ => None,
    };
    let end = progress.as_ref().map_or(Lsn::ZERO, |progress| progress.end);
    let moved = identity::check(&spec.from, &follower, &shared.feed, &spec.shadow, end).await?;
    check_slot(shared, &owner, progress.as_ref(), moved).await?;
    if moved {
        let data = serde_json::json!({"feed": shared.feed, "lsn": end.to_string()});
        shared.event(Severity::Warning, "the owner failed over; it has everything that the follower has, and the feed goes on", data);
    }
    // The engine remembers where it stood across restarts of ours; a feed that begins here has nothing to remember.
    if *baseline && (progress.is_none() || !remembered(shared)?) {
        shared.adapter.baseline(&owner).await?;
    }
    *baseline = false;
    let (end, confirmed) = progress.map_or((Lsn::ZERO, Lsn::ZERO), |progress| (progress.end, progress.confirmed));
    // The follower may have lost its newest commits in a crash: what it stores is what counts.
    shared.applied.reset(confirmed);
    shared.applied_watch.send_replace(confirmed);
    shared.last_commit.reset(end);
    shared.confirmed.reset(confirmed);
    shared.oldest_us.store(0, Ordering::Release);
    let row = owner.query_one("SELECT pg_current_wal_flush_lsn()::text", &[]).await.attempt("read the WAL position")?;
    let start = StartPoint { end, marker, owner: session::lsn(row.get(0))? };
    shared.polled.store(!poll::is_captured(&owner).await?, Ordering::Release);
    let (sender, queue) = stream::queue();
    let mut applier = Applier::new(Arc::clone(shared), follower, queue, start);
    applier.load_held().await?;
    let connection = stream::open(shared, end).await?;
    shared.set_phase(Phase::CatchingUp);
    let mut reader = tokio::task::JoinSet::new();
    reader.spawn(stream::read(Arc::clone(shared), connection, sender));
    let mut chores = chores::start(shared);
    // Positions that servers report may stop a few bytes short at the end of a WAL page: a commit behind ours ends that.
    shared.nudge.notify_one();
    let ended = tokio::select! {
        result = applier.run(commands) => result,
        Some(result) = chores.join_next() => result.unwrap_or_else(|error| Err(CdcError::Protocol(format!("a task of the feed failed: {error}")))),
    };
    ended?;
    // The applier saw the end of the queue: the reader knows why.
    match reader.join_next().await {
        Some(Ok(Err(error))) => Err(error),
        _ => Err(CdcError::Protocol("the change stream ended".into())),
    }
}

/// Whether the engine knows this owner's schema from before.
fn remembered(shared: &Shared) -> Result<bool, CdcError> {
    Ok(shared.adapter.has_baseline()?)
}

/// The slot must be there, usable, and not ahead of what the follower has.
async fn check_slot(shared: &Shared, owner: &tokio_postgres::Client, progress: Option<&Progress>, moved: bool) -> Result<(), CdcError> {
    let feed = &shared.feed;
    let again = format!("changes are lost. {}", identity::again(&shared.spec.shadow));
    let row = owner
        .query_opt(
            "SELECT coalesce(confirmed_flush_lsn, '0/0')::text, coalesce(wal_status, ''), plugin::text, database = current_database()
             FROM pg_replication_slots WHERE slot_name = $1",
            &[feed],
        )
        .await
        .attempt("look for the replication slot")?;
    let Some(row) = row else {
        let why = if moved { " (it failed over, and slots stay behind unless they are made for failover)" } else { "" };
        return Err(CdcError::Setup(format!("the replication slot {feed} is not on {}{why}: {again}", shared.spec.from)));
    };
    if row.get::<_, &str>(1) == "lost" {
        return Err(CdcError::Setup(format!(
            "the replication slot {feed} was invalidated (max_slot_wal_keep_size on {}): {again}",
            shared.spec.from
        )));
    }
    if row.get::<_, &str>(2) != "pgoutput" || !row.get::<_, bool>(3) {
        return Err(CdcError::Setup(format!("the replication slot {feed} belongs to something else: drop it, or rename the shadow")));
    }
    let flushed = session::lsn(row.get(0))?;
    if progress.is_some_and(|progress| flushed > progress.confirmed) {
        return Err(CdcError::Setup(format!(
            "the owner has already forgotten changes up to {flushed}, the follower has them only up to {} (was it restored from a \
             backup?): {again}",
            progress.map_or(Lsn::ZERO, |progress| progress.confirmed)
        )));
    }
    Ok(())
}

impl std::fmt::Debug for Feed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let direction = match self.spec().direction {
            Direction::Forward => "forward",
            Direction::Reverse => "reverse",
        };
        f.debug_struct("Feed").field("name", &self.shared().feed).field("direction", &direction).finish_non_exhaustive()
    }
}
