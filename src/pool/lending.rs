//! The pool: who has a connection, who waits for one.

use super::{
    Parameters, PoolError, Server, Settings, here, lock,
    opening::{Backoff, Warm},
    welcome::Welcomes,
};
use crate::{auth::ServerLogin, traffic::database::Database};
use bytes::{Bytes, BytesMut};
use std::{
    collections::VecDeque,
    fmt,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio::{runtime::Handle, sync::oneshot};

/// Start-up parameters that a connection was, or must be, opened with.
pub(super) type Startup = Arc<Vec<(Bytes, Bytes)>>;

/// Connections for one database and one role.
pub struct Pool {
    /// Which database.
    pub database: Arc<Database>,
    /// Which role.
    pub user: String,
    pub(super) login: Mutex<ServerLogin>,
    pub(super) background: Handle,
    pub(super) inner: Mutex<Inner>,
    pub(super) welcomes: Mutex<Welcomes>,
    /// Of connections that serve many sessions: none.
    pub(super) plain: Startup,
}

pub(super) struct Inner {
    pub idle: Vec<Parked>,
    pub waiters: VecDeque<Waiter>,
    /// Connections that exist or are being opened.
    pub total: usize,
    pub opening: usize,
    pub size: usize,
    pub lifetime: Duration,
    /// Of the route that was followed last.
    pub epoch: i64,
    pub backoff: Backoff,
    pub warm: Option<Warm>,
}

/// A connection that nobody uses.
pub(super) struct Parked {
    pub server: Server,
    pub since: Instant,
}

pub(super) struct Waiter {
    pub startup: Startup,
    pub since: Instant,
    answer: oneshot::Sender<Result<Server, PoolError>>,
}

/// What became of a wish.
pub enum Taken {
    /// At once.
    Now(Box<Server>),
    /// Others were first.
    Queued(Waiting),
}

/// A place in the queue; given up when dropped.
pub struct Waiting {
    pool: Arc<Pool>,
    receiver: oneshot::Receiver<Result<Server, PoolError>>,
    answered: bool,
    /// Since when.
    pub since: Instant,
}

/// For SHOW POOLS.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    /// Lent.
    pub active: usize,
    /// Parked.
    pub idle: usize,
    /// Being opened.
    pub opening: usize,
    /// Clients in the queue.
    pub waiting: usize,
    /// Of the one that waits longest.
    pub longest_wait: Duration,
    /// Why none could be opened, if that is so.
    pub error: Option<String>,
    /// Opened at the next owner in advance.
    pub standby: usize,
}

impl Pool {
    pub(super) fn new(database: Arc<Database>, user: &str, background: Handle) -> Arc<Self> {
        let settings = database.pool.load();
        let inner = Inner {
            idle: Vec::new(),
            waiters: VecDeque::new(),
            total: 0,
            opening: 0,
            size: settings.size.unwrap_or(usize::MAX),
            lifetime: settings.server_lifetime,
            epoch: database.epoch(),
            backoff: Backoff::default(),
            warm: None,
        };
        drop(settings);
        Arc::new(Pool {
            database,
            user: user.to_owned(),
            login: Mutex::default(),
            background,
            inner: Mutex::new(inner),
            welcomes: Mutex::default(),
            plain: Startup::default(),
        })
    }

    /// For people.
    pub fn name(&self) -> String {
        format!("{}@{}", self.user, self.database.name)
    }

    /// The role has logged in with this: so can we.
    pub(super) fn learn(&self, login: &ServerLogin) {
        if *login != ServerLogin::Nothing {
            lock(&self.login).clone_from(login);
        }
    }

    /// A connection that many sessions use in turn, best one that has these settings already; or a place in the queue.
    pub fn take(self: &Arc<Self>, settings: &Arc<Settings>) -> Taken {
        self.take_with(&self.plain.clone(), Some(settings))
    }

    /// A connection for a whole session, opened with its start-up parameters.
    pub fn take_for_session(self: &Arc<Self>, startup: Vec<(Bytes, Bytes)>) -> Taken {
        self.take_with(&Arc::new(startup), None)
    }

    fn take_with(self: &Arc<Self>, startup: &Startup, settings: Option<&Arc<Settings>>) -> Taken {
        let epoch = self.database.epoch();
        let mut dead = Vec::new();
        let mut inner = lock(&self.inner);
        if inner.epoch != epoch {
            drop(inner);
            self.follow(&self.database.route.load_full());
            inner = lock(&self.inner);
        }
        if inner.waiters.is_empty() {
            while let Some(at) = inner.best(startup, settings) {
                let mut server = inner.idle.remove(at).server;
                if server.epoch == epoch && server.is_alive() {
                    drop(inner);
                    dead.into_iter().for_each(|server| self.close(server));
                    return Taken::Now(Box::new(server));
                }
                dead.push(server);
            }
        }
        let (answer, receiver) = oneshot::channel();
        let since = Instant::now();
        inner.waiters.push_back(Waiter { startup: startup.clone(), since, answer });
        drop(inner);
        dead.into_iter().for_each(|server| self.close(server));
        self.open_for_waiters();
        Taken::Queued(Waiting { pool: self.clone(), receiver, answered: false, since })
    }

    /// Takes a connection back, whose last answer has been seen: for the first who waits, or to be parked.
    pub fn put(self: &Arc<Self>, mut server: Server) {
        let now = Instant::now();
        server.heard = BytesMut::new(); // of one who listened and has gone
        let Some(pooled) = &server.pooled else { return self.close(server) };
        let age = now.saturating_duration_since(pooled.born);
        if server.epoch != self.database.epoch() {
            return self.close(server);
        }
        let mut inner = lock(&self.inner);
        if age < inner.lifetime && inner.total <= inner.size {
            loop {
                let startup = |server: &Server| server.pooled.as_ref().map(|pooled| pooled.startup.clone());
                match inner.waiters.front() {
                    Some(waiter) if startup(&server).as_ref() != Some(&waiter.startup) => break,
                    Some(_) => {}
                    None => return inner.idle.push(Parked { server, since: now }),
                }
                let Some(waiter) = inner.waiters.pop_front() else { break };
                match waiter.answer.send(Ok(server)) {
                    Err(Ok(back)) => server = back, // it has gone
                    Ok(()) | Err(Err(_)) => return,
                }
            }
        }
        drop(inner);
        self.close(server);
    }

    /// Ends a connection; its place is free at once.
    pub fn close(&self, mut server: Server) {
        server.pooled = None;
        self.background.spawn(server.terminate());
    }

    pub(super) fn slot_freed(self: Arc<Self>) {
        {
            let mut inner = lock(&self.inner);
            inner.total = inner.total.saturating_sub(1);
            if inner.waiters.is_empty() {
                return;
            }
        }
        self.open_for_waiters();
    }

    /// Tells everyone in the queue that it is of no use.
    pub(super) fn refuse_all(&self, error: impl Fn() -> PoolError) {
        let waiters = std::mem::take(&mut lock(&self.inner).waiters);
        for waiter in waiters {
            let _ = waiter.answer.send(Err(error()));
        }
    }

    /// The error of whoever has waited too long.
    pub fn timed_out(&self) -> PoolError {
        let (figures, size) = (self.figures(), lock(&self.inner).size);
        let why = match figures.error {
            Some(error) => error,
            None => format!("{} of {size} are in use and {} clients wait", figures.active, figures.waiting),
        };
        PoolError::Timeout { pool: self.name(), seconds: self.database.pool.load().queue_timeout.as_secs_f64(), why }
    }

    /// What there is.
    pub fn figures(&self) -> Figures {
        let inner = lock(&self.inner);
        Figures {
            active: inner.total.saturating_sub(inner.idle.len() + inner.opening),
            idle: inner.idle.len(),
            opening: inner.opening,
            waiting: inner.waiters.len(),
            longest_wait: inner.waiters.front().map_or(Duration::ZERO, |waiter| waiter.since.elapsed()),
            error: inner.backoff.error.clone(),
            standby: inner.warm.as_ref().map_or(0, |warm| warm.servers.len()),
        }
    }
}

impl Inner {
    /// Of the parked connections that fit: one with the settings, registered here; else one registered here; else any. The
    /// one used last is the one whose memory is warm.
    fn best(&self, startup: &Startup, settings: Option<&Arc<Settings>>) -> Option<usize> {
        let place = here();
        let mut second = None;
        for (at, parked) in self.idle.iter().enumerate().rev() {
            let Some(pooled) = &parked.server.pooled else { continue };
            if pooled.startup != *startup {
                continue;
            }
            let near = pooled.place == place;
            if near && settings.is_none_or(|settings| Arc::ptr_eq(settings, &pooled.settings)) {
                return Some(at);
            }
            second = match second {
                Some((at, true)) => Some((at, true)),
                None | Some((_, false)) if near => Some((at, true)),
                other => other.or(Some((at, false))),
            };
        }
        second.map(|(at, _)| at)
    }
}

impl Waiting {
    /// When its turn has come. Cancel-safe.
    ///
    /// # Errors
    /// [`PoolError`]
    pub async fn server(&mut self) -> Result<Server, PoolError> {
        let answer = (&mut self.receiver).await;
        self.answered = true;
        answer.unwrap_or(Err(PoolError::Broken))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if self.answered {
            return;
        }
        self.receiver.close();
        match self.receiver.try_recv() {
            Ok(Ok(server)) => self.pool.put(server),
            _ => lock(&self.pool.inner).waiters.retain(|waiter| !waiter.answer.is_closed()),
        }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("database", &self.database.name).field("user", &self.user).finish_non_exhaustive()
    }
}

/// What clients were told of a server's parameters.
impl Parameters {
    /// Those that differ from what was told before.
    pub fn differing<'a>(&'a self, before: &'a Parameters) -> impl Iterator<Item = &'a (Bytes, Bytes)> {
        self.list().iter().filter(|(name, value)| before.get(name) != Some(value))
    }
}
