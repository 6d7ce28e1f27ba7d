//! Accepts connections, reads the first packet, and sends each where it belongs: a database, the console, a cancel.

use super::{
    arrival::{Arrival, Turned, arrive},
    limits::{self, Limits},
    lookup::Lookup,
    start_up,
    threads::Threads,
};
use crate::{
    auth::Policy,
    backend,
    net::{self, Acceptor, ClientTls, Listener, Peer, Stream},
    pool::{Backend, Pools},
    traffic::{
        cancelling::Place,
        database::{Database, SessionInfo},
    },
    wire::{backend::put_error, frontend::Startup},
};
use arc_swap::{ArcSwap, ArcSwapOption};
use bytes::{Bytes, BytesMut};
use dashmap::DashMap;
use std::{
    collections::HashMap,
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncWrite, AsyncWriteExt},
    sync::Notify,
};

/// The database name that is the console.
const CONSOLE: &[u8] = b"understudy";

/// Connections that have not said who they are, beyond as many as there may be clients: cancels, health checks, who is late.
const ARRIVING_MORE: usize = 1_000;

type StrangerHandler = dyn Fn(i32, Bytes) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync;
/// Gets what the client has sent so far, from its start-up packet on.
type Handler = dyn Fn(Stream, BytesMut, Peer, Option<ClientTls>) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync;

/// Where a CancelRequest must go at this moment.
#[derive(Clone, Debug, Default)]
pub(super) enum CancelTarget {
    /// Nothing is done for the session.
    #[default]
    Nobody,
    /// The server that works for it.
    Server(Arc<Backend>),
    /// It waits for one.
    Queue(Arc<Notify>),
}

/// A server that counts as being cancelled.
pub(super) struct Announced(Arc<Backend>);

/// Where a session's requests are.
type Cancellable = (Arc<Mutex<CancelTarget>>, Arc<SessionInfo>);

/// Everything that sessions share, and the listener's side of it.
pub struct FrontDoor {
    databases: ArcSwap<HashMap<String, Arc<Database>>>,
    console: Box<Handler>,
    /// Who is asked about a CancelRequest whose key is not ours.
    strangers: OnceLock<Box<StrangerHandler>>,
    pub(super) limits: ArcSwap<Limits>,
    /// For who watches over the times among them.
    pub(super) limits_changed: Arc<Notify>,
    pub(super) cancels: DashMap<(i32, Bytes), Cancellable>,
    connected: AtomicUsize,
    /// Connections accepted whose client has not yet said who it is, or is being logged in.
    arriving: AtomicUsize,
    next_id: AtomicU64,
    closing: AtomicBool,
    acceptor: ArcSwapOption<Acceptor>,
    policy: ArcSwap<Policy>,
    pub(super) lookup: Lookup,
    /// Backends to which a CancelRequest is on its way, with their number.
    cancelling: DashMap<(String, i32), usize>,
    /// How many are.
    cancels_running: AtomicUsize,
    cancelled: Notify,
    pub(super) threads: Threads,
    pools: Arc<Pools>,
}

impl FrontDoor {
    /// With the databases that exist, and whom to hand console connections to.
    pub fn new(databases: HashMap<String, Arc<Database>>, limits: Limits, console: Box<Handler>) -> Arc<Self> {
        let door = Arc::new(FrontDoor {
            databases: ArcSwap::from_pointee(databases),
            console,
            strangers: OnceLock::new(),
            limits: ArcSwap::from_pointee(limits),
            limits_changed: Arc::default(),
            cancels: DashMap::new(),
            connected: AtomicUsize::new(0),
            arriving: AtomicUsize::new(0),
            next_id: AtomicU64::new(1),
            closing: AtomicBool::new(false),
            acceptor: ArcSwapOption::empty(),
            policy: ArcSwap::from_pointee(Policy::default()),
            lookup: Lookup::default(),
            cancelling: DashMap::new(),
            cancels_running: AtomicUsize::new(0),
            cancelled: Notify::new(),
            threads: Threads::start(),
            pools: Pools::start(),
        });
        tokio::spawn(limits::watch(Arc::downgrade(&door)));
        door
    }

    /// Accepts until its task is aborted. While the door closes, who comes is told so: the socket lives on for a successor,
    /// and a connection that nobody accepts would wait for its answer.
    pub async fn listen(self: Arc<Self>, listener: Listener) {
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => {
                    let arriving = self.arriving.fetch_add(1, Ordering::SeqCst);
                    if arriving > self.limits().clients_max.saturating_add(ARRIVING_MORE) {
                        self.arriving.fetch_sub(1, Ordering::SeqCst);
                        continue; // a flood of those who say nothing: closed at once
                    }
                    tokio::spawn(self.clone().admit(stream, peer));
                }
                Err(error) => {
                    // out of file descriptors, usually: let some connections end before trying again
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }

    /// Lets nobody in any more; sessions end at their next boundary.
    pub fn close(&self) {
        self.closing.store(true, Ordering::SeqCst);
        for database in self.databases.load().values() {
            database.post_all();
        }
    }

    /// In force now.
    pub(super) fn limits(&self) -> Limits {
        **self.limits.load()
    }

    pub(super) fn for_each_session(&self, mut visit: impl FnMut(&SessionInfo)) {
        for database in self.databases.load().values() {
            database.sessions.iter().for_each(|session| visit(&session));
        }
    }

    /// Client connections now.
    pub fn connected(&self) -> usize {
        self.connected.load(Ordering::SeqCst)
    }

    /// Connections accepted that are not (yet) sessions.
    pub fn arriving(&self) -> usize {
        self.arriving.load(Ordering::SeqCst)
    }

    /// SHUTDOWN has begun.
    pub fn is_closing(&self) -> bool {
        self.closing.load(Ordering::SeqCst)
    }

    /// Takes certificate and key over, or TLS away; for the next clients.
    pub fn set_tls(&self, acceptor: Option<Acceptor>) {
        self.acceptor.store(acceptor.map(Arc::new));
    }

    /// Takes rules and users over; for the next clients.
    pub fn set_policy(&self, policy: Policy) {
        self.policy.store(Arc::new(policy));
        self.lookup.forget_all();
    }

    pub(super) fn policy(&self) -> Arc<Policy> {
        self.policy.load_full()
    }

    async fn admit(self: Arc<Self>, stream: Stream, peer: Peer) {
        let arriving = Arriving(&self.arriving);
        let limits = self.limits();
        if let Some(socket) = stream.tcp() {
            net::tune(socket, &limits.tcp);
        }
        let deadline = Instant::now() + limits.login_timeout;
        // nobody listens on a Unix socket: no TLS, and none demanded, as in PostgreSQL
        let acceptor = self.acceptor.load_full().filter(|_| peer.address().is_some());
        let required = acceptor.as_ref().is_some_and(|acceptor| acceptor.required);
        // boxed: the room for handshakes is given back before the session begins
        let arrival = match tokio::time::timeout_at(deadline.into(), Box::pin(arrive(stream, acceptor))).await {
            Ok(Ok(arrival)) => arrival,
            Ok(Err(Turned::Gone)) | Err(_) => return,
            Ok(Err(Turned::Refused { mut stream, code, message, hint })) => return refuse(&mut stream, code, &message, hint).await,
        };
        let Arrival { mut stream, tls, startup, packet, behind } = arrival;
        match startup {
            Startup::Cancel { pid, key } => {
                // the connection stays open until the server has confirmed, as PostgreSQL's does
                self.cancel(pid, key).await;
                let _ = stream.shutdown().await;
            }
            Startup::Parameters { version, parameters } => {
                let client = start_up::Client { stream, buffer: behind, peer, tls, version, parameters };
                self.welcome(client, packet, arriving, required, deadline).await;
            }
            Startup::Ssl | Startup::GssEncryption => {}
        }
    }

    async fn welcome(
        self: &Arc<Self>,
        mut client: start_up::Client,
        packet: Bytes,
        arriving: Arriving<'_>,
        tls_required: bool,
        deadline: Instant,
    ) {
        let stream = &mut client.stream;
        if tls_required && client.tls.is_none() {
            let hint = "connect with sslmode=require or stronger";
            return refuse(stream, "28000", "understudy takes connections over TLS only", Some(hint)).await;
        }
        let find = |name: &[u8]| client.parameters.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value.clone());
        let Some(user) = find(b"user").filter(|user| !user.is_empty()) else {
            return refuse(stream, "28000", "no PostgreSQL user name specified in startup packet", None).await;
        };
        let mut name = find(b"database").filter(|name| !name.is_empty()).unwrap_or_else(|| user.clone());
        // a physical replication connection names no database: pg_basebackup says "replication"
        if &name[..] == b"replication" && find(b"replication").is_some_and(|value| start_up::replicates(&value)) {
            let databases = self.databases.load();
            if let (1, Some(only)) = (databases.len(), databases.keys().next()) {
                name = Bytes::copy_from_slice(only.as_bytes());
            }
        }
        if name == CONSOLE {
            drop(arriving);
            let mut first = BytesMut::from(&packet[..]); // it reads the start-up packet itself
            first.extend_from_slice(&client.buffer);
            return (self.console)(client.stream, first, client.peer, client.tls).await;
        }
        let name = String::from_utf8_lossy(&name).into_owned();
        let Some(database) = self.databases.load().get(&name).cloned() else {
            let hint = "the names are those of [[database]] in proxy.toml; the console is the database \"understudy\"";
            return refuse(stream, "3D000", &format!("database \"{name}\" is not served by this understudy"), Some(hint)).await;
        };
        let limit = self.limits().clients_max;
        if self.is_closing() {
            return refuse(stream, "57P03", "understudy is shutting down", None).await;
        }
        let before = self.connected.fetch_add(1, Ordering::SeqCst);
        let connected = Connected(self.clone());
        drop(arriving); // counted as a session first: it is never counted nowhere
        if before < limit {
            let id = self.next_id.fetch_add(1, Ordering::Relaxed);
            Box::pin(start_up::run(self.clone(), database, client, connected, id, deadline)).await;
        } else {
            let hint = "raise max_clients in proxy.toml";
            refuse(stream, "53300", "too many clients: understudy's limit is reached", Some(hint)).await;
        }
    }

    /// Tells whom to ask about a CancelRequest whose key is not ours; once.
    pub fn ask_about_strangers(&self, handler: Box<StrangerHandler>) {
        let _ = self.strangers.set(handler);
    }

    /// Passes a CancelRequest on to the server that works for the session with this key, and to nobody if there is none.
    pub async fn cancel(&self, pid: i32, key: Bytes) {
        let known = self.cancels.get(&(pid, key.clone())).map(|entry| entry.value().clone());
        let Some((target, session)) = known else {
            if let Some(ask) = self.strangers.get() {
                ask(pid, key).await;
            }
            return;
        };
        if session.cancelling.ask() == Some(Place::Gate) {
            session.mailbox.post(); // it answers by itself: its server has nothing to cancel, and must not get it late
            return;
        }
        if let Some(announced) = self.announce_cancel(&target) {
            self.send_cancel(announced).await;
        }
    }

    /// Whoever works for a session is about to get a CancelRequest: [`FrontDoor::send_cancel`] must follow. `None`: nobody has to.
    pub(super) fn announce_cancel(&self, target: &Mutex<CancelTarget>) -> Option<Announced> {
        // under the lock: whoever aims the session elsewhere afterwards sees it
        let target = target.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match &*target {
            CancelTarget::Nobody => None,
            CancelTarget::Queue(notify) => {
                notify.notify_one();
                None
            }
            CancelTarget::Server(backend) => {
                self.cancels_running.fetch_add(1, Ordering::SeqCst);
                *self.cancelling.entry(address(backend)).or_insert(0) += 1;
                Some(Announced(backend.clone()))
            }
        }
    }

    /// Until the server has confirmed.
    pub(super) async fn send_cancel(&self, Announced(backend): Announced) {
        let announced = address(&backend);
        if let Err(error) = backend::cancel(&backend.target.url, backend.pid, &backend.key).await {
            tracing::warn!(%error, server = %backend.target.name, "cannot pass a cancel request on");
        }
        self.cancelling.entry(announced.clone()).and_modify(|number| *number = number.saturating_sub(1));
        self.cancelling.remove_if(&announced, |_, number| *number == 0);
        self.cancels_running.fetch_sub(1, Ordering::SeqCst);
        self.cancelled.notify_waiters();
    }

    /// A CancelRequest is on its way to this backend. To be asked after it has been aimed elsewhere.
    #[inline]
    pub(super) fn is_being_cancelled(&self, backend: &Backend) -> bool {
        self.cancels_running.load(Ordering::SeqCst) > 0 && self.cancelling.contains_key(&address(backend))
    }

    /// Waits until no CancelRequest is on its way to a backend any more: before it works for another client, or the cancel of
    /// the one would hit the other.
    pub(super) async fn cancels_settled(&self, backend: &Backend) {
        loop {
            let settled = self.cancelled.notified(); // before the look
            if !self.is_being_cancelled(backend) {
                return;
            }
            settled.await;
        }
    }

    /// All pools.
    pub fn pools(&self) -> &Arc<Pools> {
        &self.pools
    }
}

fn address(backend: &Backend) -> (String, i32) {
    (backend.target.url.to_string(), backend.pid)
}

/// Counts a client as connected until it is dropped.
pub(super) struct Connected(Arc<FrontDoor>);

impl Drop for Connected {
    fn drop(&mut self) {
        self.0.connected.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Counts a connection as arriving until it is dropped.
struct Arriving<'a>(&'a AtomicUsize);

impl Drop for Arriving<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Says why and closes.
pub(super) async fn refuse<S: AsyncWrite + Unpin>(stream: &mut S, code: &str, message: &str, hint: Option<&str>) {
    let mut answer = BytesMut::new();
    put_error(&mut answer, "FATAL", code, message, hint);
    let _ = stream.write_all(&answer).await;
    let _ = stream.shutdown().await;
}
