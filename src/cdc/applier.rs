//! The applier: takes the stream's items in order and makes each transaction of the owner (or several, when behind) one
//! transaction of the follower, with the progress in it.
//!
//! Invariants: only a commit on the follower moves the progress; a position from a keep-alive counts only when it is taken from
//! the queue outside a transaction, which means that everything before it is applied; nothing at or behind a hold is begun.

use super::{
    CdcError, MARKER_PREFIX,
    batch::Pending,
    error::Attempt,
    known::Places,
    pgoutput::{Message, Relation},
    plan::Plan,
    session,
    shared::{Held, HeldState, Phase, Shared, TableName, lock, now_us},
    stream::{Item, Queue, caught_up},
};
use crate::{
    lsn::Lsn,
    metadata::{Proposal, ProposalState},
};
use bytes::Bytes;
use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, atomic::Ordering},
};
use tokio::sync::{mpsc, oneshot};
use tokio_postgres::Client;

/// How much of the stream becomes one transaction of the follower.
struct Limits {
    /// Transactions of the owner.
    transactions: usize,
    /// Row changes after which the group is closed at the next commit.
    changes: u64,
}

/// Near real time, when several transactions wait: few, so that none of them waits long for the others.
const LIVE: Limits = Limits { transactions: 100, changes: 2_000 };

/// Behind: as many as fold well. More save little and keep locks longer.
const BEHIND: Limits = Limits { transactions: 5_000, changes: 20_000 };

/// Row changes sent to the follower in one go.
const BATCH_CHANGES_MAX: usize = 20_000;

/// Bytes of row changes sent in one go; as arrays and COPY data they are in memory once more.
const BATCH_BYTES_MAX: usize = 8 << 20;

/// The prefix of the messages that the capture on the owner emits.
const DDL_PREFIX: &[u8] = b"understudy.ddl";

/// A lag below this counts as following live, in microseconds.
const LIVE_LAG_US: i64 = 1_000_000;

type Reply<T> = oneshot::Sender<Result<T, CdcError>>;

/// What others ask of the applier: done between two transactions.
pub(super) enum Command {
    /// Run a proposal's statements (or others instead) and let go of the table it holds.
    Approve { proposal: Box<Proposal>, sql: Option<String>, who: String, reply: Reply<String> },
    /// Set the table it holds aside for good.
    Reject { proposal: Box<Proposal>, who: String, reply: Reply<()> },
    /// Rows set a table aside before a look at the owner's catalog, whose message is applied: find out what becomes of them.
    TakeBack { table: TableName, places: Arc<Places>, reply: Reply<()> },
    /// A table was copied again at a position: replay what was spooled behind it.
    Release { table: TableName, reply: Reply<()> },
}

/// Why an applier starts where it starts.
#[derive(Clone, Debug)]
pub(super) struct StartPoint {
    /// End of the newest transaction that the follower has.
    pub end: Lsn,
    /// Discard everything up to the transaction with this marker.
    pub marker: Option<String>,
    /// The owner's position when the stream was opened: at or behind it the feed has caught up.
    pub owner: Lsn,
}

/// A transaction on the follower that is being filled.
#[derive(Default)]
pub(super) struct Group {
    /// BEGIN has been sent.
    pub begun: bool,
    pub batch: Vec<Pending>,
    pub batch_bytes: usize,
    pub changes: u64,
    /// Commit times of its transactions.
    commits_us: Vec<i64>,
    /// With the end of the transaction of each, which is known at its commit.
    markers: Vec<(String, Option<Lsn>)>,
    /// Position of the commit record of the transaction being read.
    pub commit_lsn: Lsn,
    end: Lsn,
    /// Proposals run in it: recorded as applied once it is committed.
    pub decided: Vec<(i64, String)>,
    /// Nothing may join it: the next transaction needs this one committed.
    pub alone: bool,
    /// There is something for the chores after it.
    pub chores: bool,
}

pub(super) struct Applier {
    pub shared: Arc<Shared>,
    pub client: Client,
    queue: Queue,
    start: StartPoint,
    pub relations: HashMap<u32, (Relation, Bytes)>,
    pub plans: HashMap<u32, Arc<Plan>>,
    pub statements: HashMap<String, tokio_postgres::Statement>,
    /// Relations whose shape has been spooled by this session.
    pub spooled_shapes: HashSet<u32>,
    /// Tables whose rows have no place on the follower, as far as asked.
    pub passed_over: HashMap<TableName, bool>,
}

impl Applier {
    pub fn new(shared: Arc<Shared>, client: Client, queue: Queue, start: StartPoint) -> Self {
        Applier {
            shared,
            client,
            queue,
            start,
            relations: HashMap::new(),
            plans: HashMap::new(),
            statements: HashMap::new(),
            spooled_shapes: HashSet::new(),
            passed_over: HashMap::new(),
        }
    }

    /// Reads which tables are set aside.
    pub async fn load_held(&self) -> Result<(), CdcError> {
        let rows = self
            .client
            .query(
                "SELECT schema_name, table_name, proposal, state, reason, since_lsn::text, recopy
                 FROM understudy.held_table WHERE feed = $1",
                &[&self.shared.feed],
            )
            .await
            .attempt("read which tables are set aside")?;
        let mut held = std::collections::BTreeMap::new();
        for row in &rows {
            let entry = Held {
                proposal: row.get(2),
                state: HeldState::parse(row.get(3)),
                reason: row.get(4),
                since: session::lsn(row.get(5))?,
                recopy: row.get(6),
            };
            held.insert((row.get(0), row.get(1)), entry);
        }
        *lock(&self.shared.held) = held;
        Ok(())
    }

    /// Applies until the reader ends (`Ok`) or something breaks.
    pub async fn run(&mut self, commands: &mut mpsc::Receiver<Command>) -> Result<(), CdcError> {
        loop {
            let item = tokio::select! {
                biased;
                Some(command) = commands.recv() => {
                    self.command(command).await?;
                    continue;
                }
                item = self.queue.next() => item,
            };
            let Some(item) = item else { return Ok(()) };
            self.shared.connected.store(true, Ordering::Release);
            match item {
                Item::KeepAlive(sent) => self.keep_alive(sent),
                Item::Message(Message::Begin { commit_lsn, commit_us, .. }, _) => {
                    self.admit(commit_lsn, commands).await?;
                    if !self.group(commit_lsn, commit_us).await? {
                        return Ok(());
                    }
                }
                // Not part of a transaction: heartbeats and other people's messages.
                Item::Message(Message::Logical { transactional: false, .. }, _) => {}
                Item::Message(message, _) => {
                    return Err(CdcError::Protocol(format!("{} outside a transaction", kind_of(&message))));
                }
            }
        }
    }

    fn hold_position(&self) -> Option<Lsn> {
        self.shared.holds.borrow().values().min().copied()
    }

    fn keep_alive(&mut self, sent: Lsn) {
        // Before the marker nothing counts as applied: the slot must not move past what a restart needs to see again.
        if self.start.marker.is_some() {
            return;
        }
        self.shared.advance_applied(self.hold_position().map_or(sent, |hold| hold.min(sent)));
        if self.queue.peek().is_none() {
            caught_up(&self.shared);
        }
        if sent >= self.start.owner {
            self.live();
        }
    }

    fn live(&self) {
        let mut phase = lock(&self.shared.phase);
        if *phase == Phase::CatchingUp {
            *phase = Phase::Streaming;
        }
    }

    /// Waits until a transaction may begin. Announces it first, so that a hold placed at the same moment sees it.
    async fn admit(&mut self, commit_lsn: Lsn, commands: &mut mpsc::Receiver<Command>) -> Result<(), CdcError> {
        let mut holds = self.shared.holds.subscribe();
        loop {
            self.shared.in_flight.reset(commit_lsn);
            let hold = holds.borrow_and_update().values().min().copied();
            let Some(hold) = hold.filter(|hold| commit_lsn >= *hold) else { return Ok(()) };
            self.shared.in_flight.reset(Lsn::ZERO);
            // Commits arrive in order: all before the hold are applied.
            self.shared.advance_applied(hold);
            tokio::select! {
                changed = holds.changed() => {
                    if changed.is_err() {
                        return Err(CdcError::Stopped("the feed is gone".into()));
                    }
                }
                Some(command) = commands.recv() => self.command(command).await?,
            }
        }
    }

    /// Reads one transaction, and more while they are there already, and commits them. `false`: the reader ended.
    async fn group(&mut self, commit_lsn: Lsn, commit_us: i64) -> Result<bool, CdcError> {
        let mut group = Group { commit_lsn, ..Group::default() };
        let limits = if now_us() - commit_us < LIVE_LAG_US { LIVE } else { BEHIND };
        self.shared.oldest_us.store(commit_us, Ordering::Release);
        loop {
            if !self.transaction(&mut group).await? {
                return Ok(false);
            }
            if group.alone
                || group.changes >= limits.changes
                || group.commits_us.len() >= limits.transactions
                || self.start.marker.is_some()
            {
                break;
            }
            let Some(Item::Message(Message::Begin { commit_lsn, .. }, _)) = self.queue.peek() else { break };
            let next = *commit_lsn;
            self.shared.in_flight.reset(next);
            if self.hold_position().is_some_and(|hold| next >= hold) {
                self.shared.in_flight.reset(group.commit_lsn);
                break;
            }
            self.queue.next().await;
            group.commit_lsn = next;
        }
        self.commit(group).await?;
        self.shared.in_flight.reset(Lsn::ZERO);
        Ok(true)
    }

    /// Reads the rest of one transaction into the group. `false`: the reader ended.
    async fn transaction(&mut self, group: &mut Group) -> Result<bool, CdcError> {
        // The server starts at a transaction; those that the follower has already are read past.
        let known = group.commit_lsn < self.start.end;
        loop {
            let Some(item) = self.queue.next().await else { return Ok(false) };
            let Item::Message(message, raw) = item else { continue };
            match message {
                Message::Commit { end_lsn, commit_us, .. } => {
                    group.end = end_lsn;
                    group.markers.iter_mut().for_each(|(_, end)| *end = end.or(Some(end_lsn)));
                    group.commits_us.push(commit_us);
                    return Ok(true);
                }
                Message::Relation(relation) => {
                    // What is in the batch was sent under the old shape.
                    self.flush(group).await?;
                    self.plans.remove(&relation.oid);
                    self.spooled_shapes.remove(&relation.oid);
                    self.relations.insert(relation.oid, (relation, raw));
                }
                Message::Logical { transactional: true, prefix, content, lsn } => {
                    if prefix == MARKER_PREFIX.as_bytes() {
                        let id = String::from_utf8_lossy(&content).into_owned();
                        group.markers.push((id, None));
                    } else if prefix == DDL_PREFIX && !known && self.start.marker.is_none() {
                        self.adapt(group, &content, lsn).await?;
                    }
                }
                Message::Insert { .. } | Message::Update { .. } | Message::Delete { .. } | Message::Truncate { .. } => {
                    if !known && self.start.marker.is_none() {
                        self.change(group, message, raw).await?;
                    }
                }
                Message::Origin | Message::Type | Message::Logical { transactional: false, .. } => {}
                Message::Begin { .. } => return Err(CdcError::Protocol("a transaction inside a transaction".into())),
            }
        }
    }

    /// Takes one row change (or TRUNCATE) into the group.
    async fn change(&mut self, group: &mut Group, message: Message, raw: Bytes) -> Result<(), CdcError> {
        let relation = match &message {
            Message::Truncate { relations, restart_identity, .. } => {
                let (relations, restart) = (relations.clone(), *restart_identity);
                return self.truncate(group, &relations, restart).await;
            }
            Message::Insert { relation, .. } | Message::Update { relation, .. } | Message::Delete { relation, .. } => *relation,
            other => return Err(CdcError::Protocol(format!("{} is not a row change", kind_of(other)))),
        };
        group.changes += 1;
        let table = self.table_of(relation)?;
        if self.passed_over(&table).await? {
            return Ok(());
        }
        if !self.plans.contains_key(&relation) && self.try_plan(relation, &table).await?.is_err() {
            self.overtaken(group).await?;
        }
        let held = lock(&self.shared.held).get(&table).map(|held| (held.state, held.since));
        match held {
            // The copy of its rows is younger than this change.
            Some((HeldState::Copied, since)) if group.commit_lsn < since => return Ok(()),
            Some(_) => return self.spool(group, relation, raw).await,
            None => {}
        }
        let Some(plan) = self.plan(group, relation, &table).await? else { return self.spool(group, relation, raw).await };
        if plan.keyed()
            && matches!(message, Message::Insert { .. } | Message::Update { .. })
            && self.shared.fault.lose_change.swap(false, Ordering::AcqRel)
        {
            return Ok(());
        }
        self.push(group, Pending::Row { relation, message, raw }).await
    }

    /// A row that does not fit may have overtaken the message that says why: pgoutput merges a transaction and its subtransactions
    /// by position, a message counts with the end of its record and a row with the start of its own, which is the same place
    /// (`logicalmsg_decode`, `ReorderBufferIterCompare`). Then the message is the very next item, and is taken first.
    async fn overtaken(&mut self, group: &mut Group) -> Result<(), CdcError> {
        let Some(Item::Message(Message::Logical { transactional: true, prefix, content, lsn }, _)) = self.queue.peek_next().await else {
            return Ok(());
        };
        if prefix != DDL_PREFIX {
            return Ok(());
        }
        let (content, lsn) = (content.clone(), *lsn);
        self.queue.next().await;
        self.adapt(group, &content, lsn).await
    }

    /// Adds to the batch and sends it when it is full.
    pub async fn push(&mut self, group: &mut Group, pending: Pending) -> Result<(), CdcError> {
        group.batch_bytes += pending.bytes();
        group.batch.push(pending);
        if group.batch.len() >= BATCH_CHANGES_MAX || group.batch_bytes >= BATCH_BYTES_MAX {
            self.flush(group).await?;
        }
        Ok(())
    }

    /// Schema and name of a relation of the stream.
    pub fn table_of(&self, relation: u32) -> Result<TableName, CdcError> {
        self.relations
            .get(&relation)
            .map(|(relation, _)| (relation.schema.clone(), relation.name.clone()))
            .ok_or_else(|| CdcError::Protocol("a change of a table that was not described".into()))
    }

    /// Opens the follower's transaction if that has not happened. Deferrable constraints are checked at its end: the owner
    /// changed several rows in one statement where we need several.
    pub async fn begin(&mut self, group: &mut Group) -> Result<(), CdcError> {
        if !group.begun {
            self.client.batch_execute(BEGIN).await.attempt("begin a transaction on the follower")?;
            group.begun = true;
        }
        Ok(())
    }

    /// Commits the group: rows and progress are one fact.
    async fn commit(&mut self, mut group: Group) -> Result<(), CdcError> {
        self.flush(&mut group).await?;
        let reached = match &self.start.marker {
            Some(marker) if group.markers.iter().any(|(id, _)| id == marker) => true,
            Some(_) => return Ok(()),
            None => false,
        };
        if reached {
            self.client
                .execute(
                    "INSERT INTO understudy.progress (feed, phase, commit_lsn, end_lsn)
                     VALUES ($1, 'streaming', $2::text::pg_lsn, $3::text::pg_lsn)
                     ON CONFLICT (feed) DO UPDATE SET phase = excluded.phase, commit_lsn = excluded.commit_lsn, end_lsn = excluded.end_lsn,
                         at = now()",
                    &[&self.shared.feed, &group.commit_lsn.to_string(), &group.end.to_string()],
                )
                .await
                .attempt("store the feed's first progress")?;
            self.start.marker = None;
        } else if group.begun {
            let statement = self.prepared(PROGRESS).await?;
            let (commit, end) = (group.commit_lsn.to_string(), group.end.to_string());
            let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 3] = [&self.shared.feed, &commit, &end];
            let progress = self.client.execute(&statement, &parameters);
            let commit = self.client.batch_execute("COMMIT");
            // Polled in this order: both are sent before the first answer is awaited.
            let (stored, committed) = futures_util::future::join(progress, commit).await;
            if stored.attempt("store the progress")? != 1 {
                return Err(CdcError::Setup(
                    "the feed's progress was removed from the follower (understudy.progress): copy the shadow again".into(),
                ));
            }
            committed.attempt("commit on the follower")?;
        }
        self.committed(&group);
        Ok(())
    }

    fn committed(&mut self, group: &Group) {
        let now = now_us();
        let mut newest = 0;
        for commit_us in &group.commits_us {
            self.shared.record_lag(*commit_us, now);
            newest = newest.max(*commit_us);
        }
        self.shared.changes.fetch_add(group.changes, Ordering::Relaxed);
        if group.begun {
            self.shared.transactions.fetch_add(group.commits_us.len() as u64, Ordering::Relaxed);
        }
        for (id, sql) in &group.decided {
            self.decide(*id, ProposalState::AutoApplied, "policy", sql, "");
        }
        for (marker, end) in &group.markers {
            self.shared.marker_seen(marker, end.unwrap_or(group.end));
        }
        if group.chores {
            self.shared.chores.notify_one();
        }
        self.shared.last_commit.advance(group.end);
        self.shared.advance_applied(group.end);
        if self.queue.peek().is_none() {
            caught_up(&self.shared);
        }
        if now - newest < LIVE_LAG_US {
            self.live();
        }
    }
}

/// How every transaction of the applier begins.
pub(super) const BEGIN: &str = "BEGIN; SET CONSTRAINTS ALL DEFERRED";

/// Moves the progress, inside the transaction that makes it true.
const PROGRESS: &str =
    "UPDATE understudy.progress SET commit_lsn = $2::text::pg_lsn, end_lsn = $3::text::pg_lsn, at = now() WHERE feed = $1";

fn kind_of(message: &Message) -> &'static str {
    match message {
        Message::Begin { .. } => "a begin",
        Message::Commit { .. } => "a commit",
        Message::Origin => "an origin",
        Message::Relation(_) => "a relation",
        Message::Type => "a type",
        Message::Insert { .. } => "an insert",
        Message::Update { .. } => "an update",
        Message::Delete { .. } => "a delete",
        Message::Truncate { .. } => "a truncate",
        Message::Logical { .. } => "a message",
    }
}
