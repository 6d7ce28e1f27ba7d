//! Server connections that several clients use in turn: one pool per database and role, with a size, a queue in the order of
//! arrival, and rules for how long a connection lives.
//!
//! A [`Server`] is lent to a session and comes back with [`Pool::put`]; however it is lost, its place is free again. It is
//! parked on the thread that used it last, so that the next session there finds it registered with its own runtime; another
//! thread registers it anew. What a connection knows (settings, prepared statements) travels with it.
//!
//! Deliberately absent: the protocol between client and server (that is `session`), who may log in (that is `auth`).
//! Invariants: never more connections than the size, but for a moment after it has been made smaller and during a cutover;
//! who waits is served in order; a connection of an earlier epoch is never lent; nothing is handed on that was not asked back
//! whole: who returns a connection has seen its last answer.
//! Sources: PgBouncer's documentation ("SHOW POOLS", "pool_mode", "query_wait_timeout"); PostgreSQL documentation, "RESET",
//! "DISCARD", "Asynchronous Operations".

mod known;
mod lending;
mod opening;
mod server;
mod settings;
mod welcome;

pub use known::{Known, StatementKey};
pub use lending::{Figures, Pool, Taken, Waiting};
pub use server::{Backend, Parameters, Pooled, Server, next};
pub use settings::{Settings, literal, one_setting};
pub use welcome::{Welcome, bring};

use crate::{auth::ServerLogin, backend::BackendError, traffic::database::Database};
use std::{
    cell::Cell,
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};
use tokio::runtime::Handle;

/// How often pools are looked over: lifetimes are minutes.
const SWEEP: Duration = Duration::from_secs(1);

thread_local! {
    static HERE: Cell<u32> = const { Cell::new(0) };
}

/// Gives the thread's runtime a number; 0 is that of everything else.
pub fn set_here(number: u32) {
    HERE.set(number);
}

/// The number of the runtime that sockets are watched by on this thread.
fn here() -> u32 {
    HERE.get()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// A client gets no server connection.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// All are in use, or none can be opened.
    #[error("no server connection of pool \"{pool}\" became free within queue_timeout ({seconds} s): {why}")]
    Timeout {
        /// Role and database.
        pool: String,
        /// As configured.
        seconds: f64,
        /// What stood in the way.
        why: String,
    },
    /// The server does not let us in, and will not the next time.
    #[error("understudy cannot log in at the server: {0}")]
    Refused(BackendError),
    /// The server refuses a setting that the client asks for.
    #[error("{message}")]
    Setting {
        /// SQLSTATE
        code: String,
        /// The server's words.
        message: String,
    },
    /// The connection broke while it was made ready.
    #[error("the connection to the server broke while it was made ready")]
    Broken,
    /// In the client's start-up packet.
    #[error("{0} cannot be followed from server to server")]
    Startup(String),
}

impl PoolError {
    /// SQLSTATE.
    pub fn code(&self) -> &str {
        match self {
            PoolError::Timeout { .. } => "53300",
            PoolError::Refused(BackendError::Server(fields)) if !fields.code.is_empty() => &fields.code,
            PoolError::Refused(_) => "28000",
            PoolError::Setting { code, .. } => code,
            PoolError::Broken => "08006",
            PoolError::Startup(_) => "0A000",
        }
    }

    /// What to do.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            PoolError::Timeout { .. } => {
                Some("SHOW POOLS and SHOW CLIENTS of understudy say who has them; size and queue_timeout in [proxy.pool] are the limits")
            }
            PoolError::Refused(_) => Some("see the log of understudy; a [[database.user]] with a password in proxy.toml helps"),
            PoolError::Setting { .. } => None,
            PoolError::Broken => Some("see SHOW SERVERS and the log of understudy"),
            PoolError::Startup(_) => Some("in transaction mode options may contain -c name=value and --name=value only"),
        }
    }
}

/// All pools.
#[derive(Debug)]
pub struct Pools {
    pools: Mutex<HashMap<(String, String), Arc<Pool>>>,
    background: Handle,
}

impl Pools {
    /// None so far. Must be called on the runtime where connections are to be opened.
    pub fn start() -> Arc<Self> {
        let pools = Arc::new(Pools { pools: Mutex::default(), background: Handle::current() });
        let watched = Arc::downgrade(&pools);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(SWEEP).await;
                let Some(pools) = watched.upgrade() else { return };
                pools.all().iter().for_each(Pool::sweep);
            }
        });
        pools
    }

    /// The pool of a database and a role that has just logged in with this.
    pub fn of(&self, database: &Arc<Database>, user: &str, login: &ServerLogin) -> Arc<Pool> {
        let key = (database.name.clone(), user.to_owned());
        let pool = lock(&self.pools).entry(key).or_insert_with(|| Pool::new(database.clone(), user, self.background.clone())).clone();
        pool.learn(login);
        pool
    }

    /// Sorted by database and role.
    pub fn all(&self) -> Vec<Arc<Pool>> {
        let mut all: Vec<_> = lock(&self.pools).values().cloned().collect();
        all.sort_by(|a, b| (&a.database.name, &a.user).cmp(&(&b.database.name, &b.user)));
        all
    }

    /// After a change of settings or of the route.
    pub fn look(&self) {
        self.all().iter().for_each(Pool::sweep);
    }
}
