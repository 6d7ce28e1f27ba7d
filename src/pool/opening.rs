//! Connections come and go: opened for those who wait, again after a failure, in advance at the next owner; closed when they
//! are old, idle or of an earlier epoch.

use super::{
    Known, Pool, PoolError, Pooled, Server, Settings,
    lending::{Inner, Startup},
    lock,
    server::Slot,
};
use crate::{
    auth::ServerLogin,
    backend::{BackendError, Connection},
    config::PoolMode,
    traffic::route::{Route, Target},
};
use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};
use tokio::task::AbortHandle;

/// Connections of one pool being opened at the same time: a log-in costs a server a process.
const OPENING_MAX: usize = 4;
/// Pause after a failure; it doubles.
const RETRY_MIN: Duration = Duration::from_millis(100);
/// Longest pause.
const RETRY_MAX: Duration = Duration::from_secs(2);
/// Attempts to open one connection at the next owner, [`RETRY_MAX`] apart at most.
const STANDBY_ATTEMPTS: u32 = 10;

/// After failures.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
    /// Nothing is opened before.
    until: Option<Instant>,
    /// What the last failure was.
    pub error: Option<String>,
}

/// Connections to the owner to come.
pub(super) struct Warm {
    target: Arc<Target>,
    pub servers: Vec<Server>,
    ready: bool,
    task: Option<AbortHandle>,
}

impl Drop for Warm {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

fn pause(failures: u32) -> Duration {
    RETRY_MIN.saturating_mul(1 << failures.min(10)).min(RETRY_MAX)
}

/// The next attempt would end the same way.
fn is_final(error: &BackendError) -> bool {
    match error {
        BackendError::Authentication { .. } | BackendError::NoTls { .. } | BackendError::Tls(_) => true,
        // not admitted, no such database, a parameter that does not exist; but a server that is full or starting is asked again
        BackendError::Server(fields) => matches!(fields.code.get(..2), Some("28" | "3D" | "22" | "42" | "0A")),
        BackendError::Connect { .. } | BackendError::Timeout { .. } | BackendError::Io(_) | BackendError::Protocol(_) => false,
    }
}

impl Pool {
    /// Opens as many as are missing.
    pub(super) fn open_for_waiters(self: &Arc<Self>) {
        loop {
            let mut inner = lock(&self.inner);
            if inner.opening >= inner.waiters.len().min(OPENING_MAX) || inner.backoff.until.is_some_and(|until| Instant::now() < until) {
                return;
            }
            let Some(startup) = inner.waiters.get(inner.opening).map(|waiter| waiter.startup.clone()) else { return };
            if inner.total < inner.size {
                self.open(&mut inner, startup);
                continue;
            }
            // one that was opened with other start-up parameters stands in the way
            if inner.idle.is_empty() {
                return;
            }
            let unfit = inner.idle.remove(0).server;
            drop(inner);
            self.close(unfit); // comes back here
        }
    }

    fn open(self: &Arc<Self>, inner: &mut Inner, startup: Startup) {
        inner.total += 1;
        inner.opening += 1;
        let slot = Slot(self.clone());
        let pool = self.clone();
        self.background.spawn(async move {
            let opened = pool.connect(&startup).await;
            {
                let mut inner = lock(&pool.inner);
                inner.opening = inner.opening.saturating_sub(1);
                match &opened {
                    Ok(_) => inner.backoff = Backoff::default(),
                    Err(error) => {
                        let wait = pause(inner.backoff.failures);
                        let failures = inner.backoff.failures.saturating_add(1);
                        inner.backoff = Backoff { failures, until: Some(Instant::now() + wait), error: Some(error.to_string()) };
                    }
                }
            }
            match opened {
                Ok((connection, target, epoch)) => {
                    let server = pool.adopt(Server::from_connection(connection, target, epoch), startup, slot);
                    pool.put(server);
                }
                Err(error) => {
                    drop(slot);
                    tracing::warn!(pool = %pool.name(), %error, "cannot open a server connection");
                    let alone = lock(&pool.inner).total == 0;
                    if is_final(&error) && alone {
                        let error = Arc::new(error);
                        return pool.refuse_all(|| PoolError::Refused(copy(&error)));
                    }
                    let until = lock(&pool.inner).backoff.until;
                    if let Some(until) = until {
                        tokio::time::sleep_until(until.into()).await;
                    }
                    pool.open_for_waiters();
                }
            }
        });
    }

    fn adopt(&self, mut server: Server, startup: Startup, slot: Slot) -> Server {
        server.pooled = Some(Box::new(Pooled {
            slot: Some(slot),
            known: Known::new(self.database.pool.load().prepared_statements),
            settings: self.intern(Settings::default()),
            startup,
            place: 0,
            born: Instant::now(),
            used_by: 0,
        }));
        server
    }

    /// Connects to the owner, once new transactions may begin there.
    async fn connect(&self, startup: &Startup) -> Result<(Connection, Arc<Target>, i64), BackendError> {
        loop {
            self.database.gate.wait_open().await;
            let route = self.database.route.load_full();
            let connection = self.log_in(&route.owner, startup).await?;
            if self.database.epoch() == route.epoch {
                return Ok((connection, route.owner.clone(), route.epoch));
            }
        }
    }

    async fn log_in(&self, target: &Target, startup: &Startup) -> Result<Connection, BackendError> {
        let url = self.database.url_for(target, &self.user);
        let login = match &url.password {
            Some(password) => ServerLogin::Password(password.clone()),
            None => lock(&self.login).clone(),
        };
        let parameters: Vec<(&[u8], &[u8])> = startup.iter().map(|(name, value)| (&name[..], &value[..])).collect();
        Connection::open_as(&url, &self.user, &login, &parameters).await
    }

    /// Looks after connections that nobody uses, and after changed settings.
    pub(super) fn sweep(self: &Arc<Self>) {
        self.follow(&self.database.route.load_full());
        let settings = self.database.pool.load_full();
        let now = Instant::now();
        let epoch = self.database.epoch();
        let mut ended = Vec::new();
        {
            let mut inner = lock(&self.inner);
            inner.size = settings.size.unwrap_or(usize::MAX);
            inner.lifetime = settings.server_lifetime;
            let least = if settings.mode == PoolMode::Transaction { settings.min_size } else { 0 };
            let mut kept = Vec::with_capacity(inner.idle.len());
            let (mut too_many, mut count) = (inner.total.saturating_sub(inner.size), inner.total);
            // the front has been idle longest
            for mut parked in inner.idle.drain(..) {
                let born = parked.server.pooled.as_ref().map_or(now, |pooled| pooled.born);
                let unused = now.saturating_duration_since(parked.since) >= settings.server_idle_timeout && count > least;
                let old = now.saturating_duration_since(born) >= settings.server_lifetime;
                if too_many > 0 || unused || old || parked.server.epoch != epoch || !parked.server.is_alive() {
                    (too_many, count) = (too_many.saturating_sub(1), count.saturating_sub(1));
                    ended.push(parked.server);
                } else {
                    kept.push(parked);
                }
            }
            inner.idle = kept;
        }
        ended.into_iter().for_each(|server| self.close(server));
        let mut inner = lock(&self.inner);
        let least = if settings.mode == PoolMode::Transaction { settings.min_size.min(inner.size) } else { 0 };
        let may = inner.backoff.until.is_none_or(|until| now >= until) && !self.database.gate.is_closed();
        if may && inner.total < least && inner.opening < OPENING_MAX {
            self.open(&mut inner, self.plain.clone());
        }
        drop(inner);
        self.open_for_waiters();
    }

    /// Follows the route: opens connections to the next owner in advance, goes over to them when it is the owner, closes
    /// those to earlier ones.
    pub fn follow(self: &Arc<Self>, route: &Arc<Route>) {
        let mut inner = lock(&self.inner);
        let mut left = Vec::new();
        if inner.epoch != route.epoch && route.epoch == self.database.epoch() {
            inner.epoch = route.epoch;
            inner.backoff = Backoff::default();
            left.extend(std::mem::take(&mut inner.idle).into_iter().map(|parked| parked.server));
            lock(&self.welcomes).forget();
        }
        let mut come = Vec::new();
        match (&route.standby, &mut inner.warm) {
            (Some(target), Some(warm)) if warm.target == *target => {
                if warm.ready {
                    self.tell_ready();
                }
            }
            (Some(target), _) => {
                let number = inner.total.clamp(1, inner.size);
                let task = self.background.spawn(self.clone().warm_up(target.clone(), number)).abort_handle();
                inner.warm = Some(Warm { target: target.clone(), servers: Vec::new(), ready: false, task: Some(task) });
            }
            (None, Some(_)) => {
                if let Some(mut warm) = inner.warm.take() {
                    let servers = std::mem::take(&mut warm.servers);
                    if warm.target == route.owner { come = servers } else { left.extend(servers) }
                }
            }
            (None, None) => {}
        }
        inner.total += come.len();
        drop(inner);
        for mut server in come {
            server.epoch = route.epoch;
            let server = self.adopt(server, self.plain.clone(), Slot(self.clone()));
            self.put(server);
        }
        left.into_iter().for_each(|server| self.close(server));
    }

    /// Opens connections to the next owner, so that the pause contains no log-in.
    async fn warm_up(self: Arc<Self>, target: Arc<Target>, number: usize) {
        for _ in 0..number {
            let mut attempts = 0;
            let opened = loop {
                match self.log_in(&target, &self.plain).await {
                    Ok(connection) => break Some(connection),
                    Err(failure) => {
                        self.tell_failure(&failure);
                        attempts += 1;
                        if is_final(&failure) || attempts >= STANDBY_ATTEMPTS {
                            break None;
                        }
                        tokio::time::sleep(pause(attempts)).await;
                    }
                }
            };
            let Some(connection) = opened else { return };
            let mut inner = lock(&self.inner);
            let Some(warm) = inner.warm.as_mut().filter(|warm| warm.target == target) else { return };
            warm.servers.push(Server::from_connection(connection, target.clone(), 0));
        }
        if let Some(warm) = lock(&self.inner).warm.as_mut().filter(|warm| warm.target == target) {
            (warm.ready, warm.task) = (true, None);
        }
        self.tell_ready();
    }

    /// The sessions of this pool can go over to the next owner.
    fn tell_ready(&self) {
        for session in self.database.sessions.iter().filter(|session| session.pooled && session.user == self.user) {
            session.standby_ready.store(true, Ordering::SeqCst);
        }
    }

    fn tell_failure(&self, error: &BackendError) {
        for session in self.database.sessions.iter().filter(|session| session.pooled && session.user == self.user) {
            *lock(&session.attach_error) = Some(error.to_string());
        }
    }
}

/// The words of an error for each of several who wait.
fn copy(error: &BackendError) -> BackendError {
    match error {
        BackendError::Server(fields) => BackendError::Server(fields.clone()),
        BackendError::Authentication { user, reason } => BackendError::Authentication { user: user.clone(), reason: reason.clone() },
        other => BackendError::Protocol(other.to_string()),
    }
}
