//! Accepts connections, reads the first packet, and sends each where it belongs: a database, the console, a cancel.

use super::{start_up, threads::Threads};
use crate::{
    backend,
    net::Stream,
    traffic::database::Database,
    wire::{
        backend::put_error,
        frontend::{STARTUP_BYTES_MAX, Startup},
    },
};
use arc_swap::ArcSwap;
use bytes::{Bytes, BytesMut};
use dashmap::DashMap;
use std::{
    collections::HashMap,
    future::Future,
    hash::{BuildHasher, Hasher, RandomState},
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Notify,
};

/// The database name that is the console.
const CONSOLE: &[u8] = b"understudy";
/// How long a client may take to say who it is and to log in.
pub(super) const LOGIN_TIMEOUT: Duration = Duration::from_secs(60);
/// How often an incomplete first packet is looked at again.
const PEEK_INTERVAL: Duration = Duration::from_millis(3);

/// Limits of the front door.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Client connections at once; the next one gets SQLSTATE 53300.
    pub clients_max: usize,
}

type StrangerHandler = dyn Fn(i32, Bytes) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync;
type Handler = dyn Fn(TcpStream, SocketAddr) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync;

/// Where a CancelRequest must go: the server that serves the session at this moment.
#[derive(Clone, Debug)]
pub(super) struct CancelTarget {
    pub url: crate::traffic::route::Target,
    pub pid: i32,
    pub key: Bytes,
}

/// Everything that sessions share, and the listener's side of it.
pub struct FrontDoor {
    databases: ArcSwap<HashMap<String, Arc<Database>>>,
    console: Box<Handler>,
    /// Who is asked about a CancelRequest whose key is not ours.
    strangers: OnceLock<Box<StrangerHandler>>,
    limits: Mutex<Limits>,
    pub(super) cancels: DashMap<(i32, Bytes), Arc<Mutex<CancelTarget>>>,
    connected: AtomicUsize,
    /// Connections accepted whose client has not yet said who it is, or is being logged in.
    arriving: AtomicUsize,
    next_id: AtomicU64,
    closing: AtomicBool,
    stop: Notify,
    secrets: RandomState,
    pub(super) threads: Threads,
}

impl FrontDoor {
    /// With the databases that exist, and whom to hand console connections to.
    pub fn new(databases: HashMap<String, Arc<Database>>, limits: Limits, console: Box<Handler>) -> Arc<Self> {
        Arc::new(FrontDoor {
            databases: ArcSwap::from_pointee(databases),
            console,
            strangers: OnceLock::new(),
            limits: Mutex::new(limits),
            cancels: DashMap::new(),
            connected: AtomicUsize::new(0),
            arriving: AtomicUsize::new(0),
            next_id: AtomicU64::new(1),
            closing: AtomicBool::new(false),
            stop: Notify::new(),
            secrets: RandomState::new(),
            threads: Threads::start(),
        })
    }

    /// Accepts until [`FrontDoor::close`].
    pub async fn listen(self: Arc<Self>, listener: TcpListener) {
        loop {
            let stopped = self.stop.notified();
            if self.closing.load(Ordering::SeqCst) {
                return;
            }
            tokio::select! {
                () = stopped => {}
                accepted = listener.accept() => match accepted {
                    Ok((stream, peer)) => {
                        self.arriving.fetch_add(1, Ordering::SeqCst);
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
    }

    /// Stops accepting; idle sessions are asked to end by `stop`.
    pub fn close(&self) {
        self.closing.store(true, Ordering::SeqCst);
        self.stop.notify_waiters();
        for database in self.databases.load().values() {
            database.post_all();
        }
    }

    /// Takes new limits over; for the next clients.
    pub fn set_limits(&self, limits: Limits) {
        *self.limits.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = limits;
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

    async fn admit(self: Arc<Self>, mut stream: TcpStream, peer: SocketAddr) {
        let _ = stream.set_nodelay(true);
        let arriving = Arriving(&self.arriving);
        let first = tokio::time::timeout(LOGIN_TIMEOUT, self.first_packet(&mut stream)).await;
        let (startup, raw_len) = match first {
            Ok(Ok(Some(first))) => first,
            Ok(Ok(None)) | Err(_) => return,
            Ok(Err(reason)) => return refuse(&mut stream, "08P01", &reason, None).await,
        };
        match startup {
            Startup::Cancel { pid, key } => {
                // what is not read would make the close a reset
                let read = stream.read_exact(&mut vec![0; raw_len]).await;
                self.cancel(pid, key).await;
                drop((read, stream)); // not before: drivers take the close for "done", and a late cancel would hit their next statement
            }
            Startup::Parameters { version, parameters } => {
                let find = |name: &[u8]| parameters.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
                let Some(user) = find(b"user").filter(|user| !user.is_empty()) else {
                    return refuse(&mut stream, "28000", "no PostgreSQL user name specified in startup packet", None).await;
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
                    return (self.console)(stream, peer).await; // it reads the start-up packet itself
                }
                let mut raw = vec![0; raw_len];
                if stream.read_exact(&mut raw).await.is_err() {
                    return;
                }
                let name = String::from_utf8_lossy(&name).into_owned();
                let Some(database) = self.databases.load().get(&name).cloned() else {
                    let hint = "the names are those of [[database]] in proxy.toml; the console is the database \"understudy\"";
                    return refuse(&mut stream, "3D000", &format!("database \"{name}\" is not served by this understudy"), Some(hint))
                        .await;
                };
                let limit = self.limits.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clients_max;
                if self.is_closing() {
                    return refuse(&mut stream, "57P03", "understudy is shutting down", None).await;
                }
                let before = self.connected.fetch_add(1, Ordering::SeqCst);
                drop(arriving); // counted as a session first: it is never counted nowhere
                if before < limit {
                    let client = start_up::Client { stream: Stream::Tcp(stream), peer, version, parameters };
                    start_up::run(self.clone(), database, client, self.next_id.fetch_add(1, Ordering::Relaxed)).await;
                } else {
                    let hint = "raise max_clients in proxy.toml";
                    refuse(&mut stream, "53300", "too many clients: understudy's limit is reached", Some(hint)).await;
                }
                self.connected.fetch_sub(1, Ordering::SeqCst);
            }
            Startup::Ssl | Startup::GssEncryption => {}
        }
    }

    /// Reads up to the first packet that says who the client is. A start-up packet is only looked at, not taken, because
    /// the console reads it again. `None`: the client went away.
    async fn first_packet(&self, stream: &mut TcpStream) -> Result<Option<(Startup, usize)>, String> {
        let (mut asked_ssl, mut asked_gss) = (false, false);
        let mut buffer = BytesMut::new();
        loop {
            let Some(body) = peek_packet(stream, &mut buffer).await? else { return Ok(None) };
            let raw_len = body.len() + 4;
            let startup = Startup::parse(&body).ok_or_else(|| unsupported(&body))?;
            match &startup {
                Startup::Ssl if !asked_ssl => asked_ssl = true,
                Startup::GssEncryption if !asked_gss => asked_gss = true,
                Startup::Ssl | Startup::GssEncryption => return Err("encryption was asked for twice".into()),
                Startup::Cancel { .. } | Startup::Parameters { .. } => return Ok(Some((startup, raw_len))),
            }
            let mut request = [0; 8];
            let answered = async {
                stream.read_exact(&mut request).await?;
                stream.write_all(b"N").await
            };
            if answered.await.is_err() {
                return Ok(None);
            }
        }
    }

    /// Tells whom to ask about a CancelRequest whose key is not ours; once.
    pub fn ask_about_strangers(&self, handler: Box<StrangerHandler>) {
        let _ = self.strangers.set(handler);
    }

    /// Passes a CancelRequest on to the server that works for the session with this key, and to nobody if there is none.
    pub async fn cancel(&self, pid: i32, key: Bytes) {
        let known = self.cancels.get(&(pid, key.clone())).map(|entry| entry.value().clone());
        let Some(target) = known else {
            if let Some(ask) = self.strangers.get() {
                ask(pid, key).await;
            }
            return;
        };
        let target = target.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone();
        if let Err(error) = backend::cancel(&target.url.url, target.pid, &target.key).await {
            tracing::warn!(%error, server = %target.url.name, "cannot pass a cancel request on");
        }
    }

    /// A key for CancelRequest that cannot be guessed: SipHash under a key from the operating system.
    pub(super) fn cancel_key(&self, id: u64) -> (i32, Bytes) {
        let mut hasher = self.secrets.build_hasher();
        hasher.write_u64(id);
        let secret = hasher.finish();
        let pid = (id as i32) & i32::MAX;
        (pid, Bytes::copy_from_slice(&secret.to_be_bytes()[..4]))
    }
}

/// Counts a connection as arriving until it is dropped.
struct Arriving<'a>(&'a AtomicUsize);

impl Drop for Arriving<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn unsupported(body: &[u8]) -> String {
    let version = body.first_chunk::<4>().map(|bytes| i32::from_be_bytes(*bytes)).unwrap_or_default();
    format!("unsupported frontend protocol {}.{}: understudy speaks 3.0 to 3.2", version >> 16, version & 0xffff)
}

/// Waits until a whole packet (length word and body) can be looked at. `None`: the client went away.
async fn peek_packet(stream: &mut TcpStream, buffer: &mut BytesMut) -> Result<Option<Bytes>, String> {
    buffer.resize(STARTUP_BYTES_MAX + 4, 0);
    loop {
        let available = match stream.peek(buffer).await {
            Ok(0) => return Ok(None),
            Ok(available) => available,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return Ok(None),
        };
        if let Some(length) = buffer.first_chunk::<4>().filter(|_| available >= 4) {
            let length = u32::from_be_bytes(*length) as usize;
            if length >> 24 == 0x16 {
                return Err("direct TLS is not available in this version: connect without sslnegotiation=direct".into());
            }
            if !(8..=STARTUP_BYTES_MAX).contains(&length) {
                return Err("invalid length of startup packet".into());
            }
            if available >= length {
                return Ok(Some(Bytes::copy_from_slice(&buffer[4..length])));
            }
        }
        tokio::time::sleep(PEEK_INTERVAL).await;
    }
}

/// Says why and closes.
pub(super) async fn refuse<S: AsyncWrite + Unpin>(stream: &mut S, code: &str, message: &str, hint: Option<&str>) {
    let mut answer = BytesMut::new();
    put_error(&mut answer, "FATAL", code, message, hint);
    let _ = stream.write_all(&answer).await;
    let _ = stream.shutdown().await;
}

/// A connection to where a database's owner is.
pub(super) async fn reach(database: &Database) -> Result<(Stream, Arc<crate::traffic::route::Target>, i64), backend::BackendError> {
    loop {
        database.gate.wait_open().await;
        let route = database.route.load_full();
        let stream = backend::connect(&route.owner.url).await?;
        if database.route.load().epoch == route.epoch {
            return Ok((stream, route.owner.clone(), route.epoch));
        }
    }
}
