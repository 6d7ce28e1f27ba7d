//! One database as sessions see it: its route, gate, ticks, classifier and counters.

use super::{
    cancelling::Cancelling,
    fence::Ticks,
    gate::Gate,
    observations::Counter,
    pulse::Pulse,
    route::{Route, Target},
};
use crate::{
    config::{PoolConfig, Secret, ServerUrl, UserConfig},
    monitor::LatencyHistogram,
    sql::Classifier,
};
use arc_swap::ArcSwap;
use bytes::Bytes;
use dashmap::DashMap;
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicI64, AtomicU8, AtomicU64, Ordering},
    },
    task::{Context, Waker},
    time::Instant,
};
use tokio::sync::mpsc;

/// Shared by all sessions of a database and by the control plane.
pub struct Database {
    /// The name clients ask for.
    pub name: String,
    /// Where traffic goes. Swapped whole by [`Database::swap_route`].
    pub route: ArcSwap<Route>,
    /// Holds new transactions.
    pub gate: Gate,
    /// Positions of the owner.
    pub ticks: Ticks,
    /// What statements are.
    pub classifier: Classifier,
    /// Connected clients.
    pub sessions: DashMap<u64, Arc<SessionInfo>>,
    /// Request cycles that ended.
    pub requests: Counter,
    /// Transactions that ended.
    pub transactions: Counter,
    /// ErrorResponses forwarded to clients.
    pub errors: Counter,
    /// Of the owner's answers.
    pub latency: LatencyHistogram,
    /// How many server connections there may be, and for whom; as loaded last.
    pub pool: ArcSwap<PoolConfig>,
    users: Mutex<Vec<UserConfig>>,
    /// The route's epoch: all that a session looks at per transaction.
    epoch: AtomicI64,
    swapping: Mutex<()>,
    /// Schema changes seen, and up to which of them the classifier's facts have been refreshed.
    schema_changes: AtomicU64,
    facts_include: AtomicU64,
    /// Asks for the facts to be refreshed.
    pub refresh_facts: tokio::sync::Notify,
    /// What clients are about to do to the schema.
    pub planned: Planned,
}

/// One client connection, for SHOW CLIENTS and for a cutover's preparations.
#[derive(Debug)]
pub struct SessionInfo {
    /// Number of the session.
    pub id: u64,
    /// Client's address.
    pub peer: String,
    /// Role.
    pub user: String,
    /// `application_name` at start-up.
    pub application: String,
    /// When it connected.
    pub since: Instant,
    /// Epoch of the owner that this session is connected to.
    pub epoch: AtomicI64,
    /// Epoch of the route for whose standby this session has a connection ready.
    pub standby_ready: AtomicBool,
    /// Why it cannot be served by a shadow or moved; empty: it can.
    pub pins: Mutex<Vec<&'static str>>,
    /// Why the connection to a standby or shadow failed, if it did.
    pub attach_error: Mutex<Option<String>>,
    /// Request cycles that ended.
    pub requests: AtomicU64,
    /// It has a server connection for the time of a transaction only.
    pub pooled: bool,
    /// Waits for one, has one, has none: see [`state`].
    pub state: AtomicU8,
    /// What the session is told while it waits for its sockets.
    pub mailbox: Mailbox,
    /// What it is doing, for time limits.
    pub pulse: Pulse,
    /// Where a CancelRequest finds it when its server knows of no statement.
    pub cancelling: Cancelling,
}

/// News for one session. A session waits for its sockets most of its life, and registering for a handful of notifications
/// at each wait costs more than forwarding a query: so there is one place to look, and a waker that is set once.
#[derive(Debug, Default)]
pub struct Mailbox {
    news: AtomicBool,
    terminate: AtomicBool,
    waker: Mutex<Option<Waker>>,
}

impl Mailbox {
    /// The route or the state of the front door has changed: look again.
    pub fn post(&self) {
        self.news.store(true, Ordering::SeqCst);
        if let Some(waker) = &*self.waker.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) {
            waker.wake_by_ref();
        }
    }

    /// The session shall end.
    pub fn terminate(&self) {
        self.terminate.store(true, Ordering::SeqCst);
        self.post();
    }

    /// Has [`Mailbox::terminate`] been called?
    pub fn is_terminated(&self) -> bool {
        self.terminate.load(Ordering::SeqCst)
    }

    /// There is news, or `context` will be woken when there is. `registered` belongs to the session: the waker that this
    /// mailbox has.
    #[inline]
    pub fn poll_news(&self, registered: &mut Option<Waker>, context: &Context<'_>) -> bool {
        if !registered.as_ref().is_some_and(|waker| waker.will_wake(context.waker())) {
            *registered = Some(context.waker().clone());
            self.waker.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone_from(registered);
        }
        self.news.load(Ordering::SeqCst)
    }

    /// Takes the news.
    pub fn take(&self) -> bool {
        self.news.swap(false, Ordering::SeqCst)
    }
}

/// Schema changes that clients have sent, for whoever assesses them. A few wait; what comes while they do is not assessed.
#[derive(Debug)]
pub struct Planned {
    sender: mpsc::Sender<Bytes>,
    receiver: Mutex<Option<mpsc::Receiver<Bytes>>>,
}

/// Schema changes that wait to be assessed, each at most 64 KiB.
const PLANNED_MAX: usize = 16;

impl Default for Planned {
    fn default() -> Self {
        let (sender, receiver) = mpsc::channel(PLANNED_MAX);
        Planned { sender, receiver: Mutex::new(Some(receiver)) }
    }
}

impl Planned {
    /// Hands a text over; never waits.
    pub fn offer(&self, text: Bytes) {
        // Full: the engine meets the change in the stream all the same.
        let _ = self.sender.try_send(text);
    }

    /// The other end, once.
    pub fn receiver(&self) -> Option<mpsc::Receiver<Bytes>> {
        self.receiver.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take()
    }
}

/// [`SessionInfo::state`] of pooled sessions.
pub mod state {
    /// Between transactions.
    pub const IDLE: u8 = 0;
    /// In the pool's queue.
    pub const WAITING: u8 = 1;
    /// Has a server connection.
    pub const ACTIVE: u8 = 2;
    /// Keeps it between transactions, too.
    pub const PINNED: u8 = 3;
}

impl SessionInfo {
    /// In words.
    pub fn state_name(&self) -> &'static str {
        if !self.pooled {
            return "session";
        }
        match self.state.load(Ordering::Relaxed) {
            state::IDLE => "idle",
            state::WAITING => "waiting",
            state::ACTIVE => "active",
            _ => "pinned",
        }
    }

    /// Pins that stand in the way of moving this session to another server.
    pub fn immovable(&self) -> Vec<&'static str> {
        let pins = self.pins.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        pins.iter()
            .copied()
            .filter(|pin| matches!(*pin, pin::TEMPORARY_TABLE | pin::HELD_CURSOR | pin::ADVISORY_LOCK | pin::REPLICATION))
            .collect()
    }
}

/// What keeps a session on its server.
#[allow(missing_docs)]
pub mod pin {
    pub const SETTINGS: &str = "session settings";
    pub const LISTEN: &str = "LISTEN";
    pub const SQL_PREPARE: &str = "SQL PREPARE";
    pub const TEMPORARY_TABLE: &str = "temporary table";
    pub const HELD_CURSOR: &str = "cursor WITH HOLD";
    pub const ADVISORY_LOCK: &str = "advisory lock";
    pub const REPLICATION: &str = "replication connection";
    pub const LARGE_STATEMENT: &str = "prepared statement above 256 KiB";
    pub const OTHER: &str = "session state of unknown kind";
}

impl Database {
    /// A database with its first route.
    pub fn new(name: String, route: Route, classifier: Classifier, users: Vec<UserConfig>) -> Self {
        Database {
            name,
            epoch: AtomicI64::new(route.epoch),
            swapping: Mutex::new(()),
            route: ArcSwap::from_pointee(route),
            gate: Gate::default(),
            ticks: Ticks::default(),
            classifier,
            sessions: DashMap::new(),
            requests: Counter::default(),
            transactions: Counter::default(),
            errors: Counter::default(),
            latency: LatencyHistogram::new(),
            pool: ArcSwap::default(),
            users: Mutex::new(users),
            schema_changes: AtomicU64::new(0),
            facts_include: AtomicU64::new(0),
            refresh_facts: tokio::sync::Notify::new(),
            planned: Planned::default(),
        }
    }

    /// Publishes a new route and wakes every session, so that idle ones follow too.
    pub fn swap_route(&self, route: Route) {
        {
            let _one_at_a_time = self.swapping.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let epoch = route.epoch;
            self.route.store(Arc::new(route));
            self.epoch.store(epoch, Ordering::SeqCst);
        }
        self.post_all();
    }

    /// The epoch of the route. Whoever sees a new one here finds its route in [`Database::route`].
    #[inline]
    pub fn epoch(&self) -> i64 {
        self.epoch.load(Ordering::SeqCst)
    }

    /// Makes every session look at what has changed.
    pub fn post_all(&self) {
        for session in &self.sessions {
            session.mailbox.post();
        }
    }

    /// Replaces the known credentials after a reload.
    pub fn set_users(&self, users: Vec<UserConfig>) {
        *self.users.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = users;
    }

    /// How to log in at a server as a client's role: with the url's password if it is the url's role, with a configured
    /// one, or without any (which works where the server trusts us).
    pub fn url_for(&self, target: &Target, user: &str) -> ServerUrl {
        if target.url.user == user {
            return target.url.clone();
        }
        let users = self.users.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let password: Option<Secret> = users.iter().find(|known| known.name == user).map(|known| known.password.clone());
        target.url.with_credentials(user, password)
    }

    /// A schema change has passed: until the classifier's facts are refreshed nothing counts as a read for a shadow.
    pub fn facts_are_stale(&self) {
        self.schema_changes.fetch_add(1, Ordering::SeqCst);
        self.refresh_facts.notify_one();
    }

    /// Schema changes seen so far; to be given to [`Database::facts_refreshed`] by whoever now loads the facts.
    pub fn schema_changes(&self) -> u64 {
        self.schema_changes.load(Ordering::SeqCst)
    }

    /// The facts were loaded after that many schema changes.
    pub fn facts_refreshed(&self, after: u64) {
        self.facts_include.fetch_max(after, Ordering::SeqCst);
    }

    /// The classifier knows every function and view that this proxy has seen created.
    pub fn knows_facts(&self) -> bool {
        self.facts_include.load(Ordering::SeqCst) == self.schema_changes.load(Ordering::SeqCst)
    }

    /// Client connections now.
    pub fn clients(&self) -> u64 {
        self.sessions.len() as u64
    }
}

impl std::fmt::Debug for Database {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Database").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Milliseconds of a monotonic clock, for [`super::route::Breaker`].
pub fn monotonic_ms() -> u64 {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_millis() as u64
}

/// Marks an atomic flag; a readable shorthand for sessions.
pub fn set(flag: &AtomicBool, value: bool) {
    flag.store(value, Ordering::SeqCst);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{future::poll_fn, task::Poll, time::Duration};

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_news_is_lost() {
        let mailbox = Arc::new(Mailbox::default());
        let seen = Arc::new(AtomicU64::new(0));
        let reader = tokio::spawn({
            let (mailbox, seen) = (mailbox.clone(), seen.clone());
            async move {
                let mut registered = None;
                while !mailbox.is_terminated() {
                    poll_fn(|context| if mailbox.poll_news(&mut registered, context) { Poll::Ready(()) } else { Poll::Pending }).await;
                    mailbox.take();
                    seen.fetch_add(1, Ordering::SeqCst);
                }
            }
        });
        for round in 0..5_000 {
            let before = seen.load(Ordering::SeqCst);
            mailbox.post();
            let deadline = Instant::now() + Duration::from_secs(60);
            while seen.load(Ordering::SeqCst) == before {
                assert!(Instant::now() < deadline, "round {round}: nobody woke up");
                tokio::task::yield_now().await;
            }
        }
        mailbox.terminate();
        reader.await.unwrap();
    }
}
