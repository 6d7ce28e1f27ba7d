//! A new process takes over from the running one: no connection is refused, none is dropped, and at no moment do two processes
//! hold feeds or decide about cutovers.
//!
//! The listening sockets themselves are handed over (`SCM_RIGHTS`, unix(7)), so that whoever stands in their queue is
//! served by the new process. `SO_REUSEPORT` alone would reset those who wait in the queue of the socket that closes (ip-sysctl,
//! `tcp_migrate_req`). The old process gives up feeds and the metadata repository first, goes on with the sessions it has until they
//! end, and takes everything back if the new process dies before it is ready.
//!
//! Meeting point: an abstract Unix socket (unix(7)) named after the metadata file, for processes of the same user only.

use super::{Controller, managed::lock, start};
use crate::metadata::Severity;
use bytes::Bytes;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::{fs::MetadataExt, net as unix},
    },
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::{UnixListener, UnixStream},
};

/// Listening sockets handed over at most: clients' two and HTTP's.
const SOCKETS_MAX: usize = 3;
/// Longest message between two processes.
const MESSAGE_BYTES_MAX: usize = 4 << 10;
/// How long the old process may take to end its feeds, and the new one to become ready.
const HANDOVER_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the repository may still belong to a new process that has just died.
const REPOSITORY_TIMEOUT: Duration = Duration::from_secs(10);

/// What one process says to the other: one JSON document a connection and direction.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Request {
    /// Hand over.
    TakeOver { pid: u32 },
    /// A CancelRequest whose key the new process does not know.
    Cancel { pid: i32, key: Vec<u8> },
    /// How many sessions are left?
    Sessions,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Reply {
    /// With the sockets beside it.
    Handed {
        pid: u32,
        http: bool,
        #[serde(default)]
        unix: bool,
    },
    Refused {
        reason: String,
    },
    Sessions {
        left: usize,
    },
}

/// The sockets a process accepts on.
#[derive(Debug)]
pub(super) struct Listeners {
    pub clients: std::net::TcpListener,
    pub http: Option<std::net::TcpListener>,
    pub unix: Option<unix::UnixListener>,
}

impl Listeners {
    /// The same sockets under new descriptors, for the runtime.
    pub fn duplicate(&self) -> io::Result<Listeners> {
        let http = self.http.as_ref().map(std::net::TcpListener::try_clone).transpose()?;
        let unix = self.unix.as_ref().map(unix::UnixListener::try_clone).transpose()?;
        Ok(Listeners { clients: self.clients.try_clone()?, http, unix })
    }
}

/// The process that has handed over and still serves its sessions.
#[derive(Clone, Copy, Debug)]
pub(super) struct Predecessor {
    /// Its process id.
    pub pid: u32,
}

impl Predecessor {
    /// Sessions it still serves; `None`: it has ended.
    pub async fn sessions(self) -> Option<usize> {
        let asked = async {
            let mut stream = connect(&format!("understudy-{}", self.pid)).await.ok()?;
            send(&mut stream, &Request::Sessions).await.ok()?;
            match receive(&mut stream).await.ok()? {
                Reply::Sessions { left } => Some(left),
                Reply::Handed { .. } | Reply::Refused { .. } => None,
            }
        };
        tokio::time::timeout(Duration::from_secs(3), asked).await.unwrap_or(Some(0))
    }

    /// Passes a CancelRequest on.
    pub async fn cancel(self, pid: i32, key: Bytes) {
        if let Ok(mut stream) = connect(&format!("understudy-{}", self.pid)).await {
            let _ = send(&mut stream, &Request::Cancel { pid, key: key.to_vec() }).await;
        }
    }
}

/// What was handed over, before the new process has said that it is ready: dropped, the old process takes it back.
pub(super) struct Handover {
    stream: UnixStream,
    pub predecessor: Predecessor,
    pub listeners: Listeners,
}

impl Handover {
    /// The new process serves: the old one gives up for good.
    pub async fn confirm(mut self) {
        let _ = self.stream.write_all(b"1").await;
        let _ = self.stream.shutdown().await;
    }
}

/// The name at which the process that owns a metadata file can be met.
fn meeting_point(metadata: &Path) -> io::Result<String> {
    let file = std::fs::metadata(metadata)?;
    Ok(format!("understudy-{}-{}", file.dev(), file.ino()))
}

fn bind(name: &str) -> io::Result<UnixListener> {
    let listener = unix::UnixListener::bind_addr(&unix::SocketAddr::from_abstract_name(name)?)?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

async fn connect(name: &str) -> io::Result<UnixStream> {
    let stream = unix::UnixStream::connect_addr(&unix::SocketAddr::from_abstract_name(name)?)?;
    stream.set_nonblocking(true)?;
    let stream = UnixStream::from_std(stream)?;
    same_user(&stream)?;
    Ok(stream)
}

/// Abstract sockets have no permissions: both ends look who the other is.
fn same_user(stream: &UnixStream) -> io::Result<()> {
    let peer = stream.peer_cred()?.uid();
    if peer == rustix::process::geteuid().as_raw() || peer == 0 {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("the process at the other end belongs to another user ({peer})")))
}

async fn send<T: Serialize>(stream: &mut UnixStream, message: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line).await
}

async fn receive<T: for<'de> Deserialize<'de>>(stream: &mut UnixStream) -> io::Result<T> {
    let mut line = Vec::new();
    while !line.ends_with(b"\n") && line.len() < MESSAGE_BYTES_MAX {
        if stream.read_buf(&mut line).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(serde_json::from_slice(&line)?)
}

/// Asks the running process to hand over. `None`: there is none.
///
/// # Errors
/// A sentence: why it does not hand over.
pub(super) async fn ask(metadata: &Path) -> Result<Option<Handover>, String> {
    let Ok(name) = meeting_point(metadata) else { return Ok(None) };
    let mut stream = match connect(&name).await {
        Ok(stream) => stream,
        Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) => return Ok(None),
        Err(error) => return Err(format!("cannot ask the running process to hand over: {error}")),
    };
    let broke = |error: io::Error| format!("the running process did not hand over: {error}. It goes on; see its log");
    send(&mut stream, &Request::TakeOver { pid: std::process::id() }).await.map_err(broke)?;
    let (reply, sockets) = tokio::time::timeout(HANDOVER_TIMEOUT, receive_sockets(&stream))
        .await
        .map_err(|_| format!("the running process did not hand over within {} s: see its log", HANDOVER_TIMEOUT.as_secs()))?
        .map_err(broke)?;
    let (pid, http, unix) = match reply {
        Reply::Handed { pid, http, unix } => (pid, http, unix),
        Reply::Refused { reason } => return Err(format!("the running process does not hand over: {reason}")),
        Reply::Sessions { .. } => return Err("the running process speaks another version of the takeover: SHUTDOWN it instead".into()),
    };
    let mut sockets = sockets.into_iter();
    let Some(clients) = sockets.next() else {
        return Err("the running process handed no socket over: SHUTDOWN it instead".into());
    };
    let http = if http { sockets.next() } else { None };
    let unix = if unix { sockets.next() } else { None };
    let listeners = Listeners { clients: clients.into(), http: http.map(Into::into), unix: unix.map(Into::into) };
    Ok(Some(Handover { stream, predecessor: Predecessor { pid }, listeners }))
}

async fn receive_sockets(stream: &UnixStream) -> io::Result<(Reply, Vec<OwnedFd>)> {
    stream
        .async_io(Interest::READABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS_MAX))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut bytes = [0; MESSAGE_BYTES_MAX];
            let got = recvmsg(stream.as_fd(), &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
            if got.bytes == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let mut sockets = Vec::new();
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                    sockets.extend(descriptors);
                }
            }
            Ok((serde_json::from_slice(bytes.get(..got.bytes).unwrap_or_default())?, sockets))
        })
        .await
}

async fn send_sockets(stream: &UnixStream, reply: &Reply, listeners: &Listeners) -> io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    let mut sockets = vec![listeners.clients.as_fd()];
    sockets.extend(listeners.http.as_ref().map(AsFd::as_fd));
    sockets.extend(listeners.unix.as_ref().map(AsFd::as_fd));
    stream
        .async_io(Interest::WRITABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS_MAX))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !control.push(SendAncillaryMessage::ScmRights(&sockets)) {
                return Err(io::Error::other("too many sockets to hand over"));
            }
            sendmsg(stream.as_fd(), &[IoSlice::new(&line)], &mut control, SendFlags::empty())?;
            Ok(())
        })
        .await
}

/// Waits for a successor. Returns when one has taken over; then this process only serves the sessions it has.
pub(super) async fn offer(controller: &Arc<Controller>) {
    let metadata = controller.config.load().proxy.metadata.clone();
    loop {
        let listener = match meeting_point(&metadata).and_then(|name| bind(&name)) {
            Ok(listener) => listener,
            Err(error) => {
                tracing::warn!(%error, "no other process can take over from this one: SHUTDOWN it before starting a new one");
                return std::future::pending().await;
            }
        };
        let Some((stream, pid)) = asked(&listener).await else { continue };
        drop(listener); // the successor will be met here
        if hand_over(controller, stream, pid).await {
            return;
        }
    }
}

/// The next process that asks for a takeover.
async fn asked(listener: &UnixListener) -> Option<(UnixStream, u32)> {
    let (mut stream, _) = listener.accept().await.ok()?;
    same_user(&stream).ok()?;
    match tokio::time::timeout(Duration::from_secs(3), receive(&mut stream)).await.ok()?.ok()? {
        Request::TakeOver { pid } => Some((stream, pid)),
        Request::Cancel { .. } | Request::Sessions => None,
    }
}

/// Gives everything but the sessions to another process. False: it stays here.
async fn hand_over(controller: &Arc<Controller>, mut stream: UnixStream, pid: u32) -> bool {
    let mut turns = Vec::new();
    let mut hindrance = controller.predecessor_sessions().await.map(|left| {
        format!("it took over itself a while ago, and the process before it still serves {left} sessions: wait for their end, or end that process")
    });
    for managed in &controller.databases {
        let name = &managed.database.name;
        match managed.switching.try_lock() {
            Ok(turn) => turns.push(turn),
            Err(_) => hindrance = Some(format!("a cutover of {name} is running: try again when it is done")),
        }
        if managed.paused.load(Ordering::SeqCst) {
            hindrance = Some(format!("{name} is paused: RESUME {name} first"));
        }
    }
    if let Some(reason) = hindrance {
        let _ = send(&mut stream, &Reply::Refused { reason }).await;
        return false;
    }
    // from here on this process decides nothing and its shadows serve nothing
    controller.handed_over.store(true, Ordering::SeqCst);
    for managed in &controller.databases {
        for shadow in &managed.shadows {
            shadow.route.in_step.store(false, Ordering::SeqCst);
            shadow.route.freshness.store(None);
            *lock(&shadow.adapter) = None;
            let feed = lock(&shadow.feed).take();
            if let Some((feed, _)) = feed {
                feed.stop().await;
            }
        }
    }
    let message = format!("process {pid} takes over; this one goes on with the {} sessions it has", controller.door.connected());
    controller.repository.record(Severity::Info, "control", "", "", &message, json!({"pid": pid}));
    controller.stop_listening().await;
    let handed = match controller.repository.release() {
        Ok(()) => {
            let sockets = lock(&controller.listeners).as_ref().map(Listeners::duplicate).transpose();
            match sockets {
                Ok(Some(sockets)) => {
                    let reply = Reply::Handed { pid: std::process::id(), http: sockets.http.is_some(), unix: sockets.unix.is_some() };
                    send_sockets(&stream, &reply, &sockets).await
                }
                Ok(None) => Err(io::Error::other("this process is shutting down")),
                Err(error) => Err(error),
            }
        }
        Err(error) => Err(io::Error::other(error.to_string())),
    };
    // at least one byte: ready; none: it died, and its descriptors with it
    let confirmed = async {
        handed?;
        stream.read_u8().await
    };
    match tokio::time::timeout(HANDOVER_TIMEOUT, confirmed).await {
        Ok(Ok(_)) => {
            drop(lock(&controller.listeners).take());
            tracing::info!(pid, "the new process is ready");
            true
        }
        outcome => {
            let reason = match outcome {
                Ok(Err(error)) => error.to_string(),
                _ => format!("not ready within {} s", HANDOVER_TIMEOUT.as_secs()),
            };
            drop(stream);
            take_back(controller, pid, &reason).await;
            false
        }
    }
}

async fn take_back(controller: &Arc<Controller>, pid: u32, reason: &str) {
    let path = controller.config.load().proxy.metadata.clone();
    let deadline = tokio::time::Instant::now() + REPOSITORY_TIMEOUT;
    while let Err(error) = controller.repository.take_again(&path) {
        if tokio::time::Instant::now() > deadline {
            tracing::error!(%error, "the metadata repository cannot be had back: this process serves, but follows no shadow. Start another with --takeover");
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    controller.handed_over.store(false, Ordering::SeqCst);
    for managed in &controller.databases {
        if let Err(error) = start::resume_feeds(controller, managed, None) {
            tracing::error!(database = %managed.database.name, %error, "cannot go on with the feeds");
        }
    }
    if let Err(error) = controller.start_listening() {
        tracing::error!(%error, "cannot listen again: start another process with --takeover");
    }
    let message = format!("process {pid}, which wanted to take over, did not become ready ({reason}): everything stays with this process");
    controller.repository.record(Severity::Alert, "control", "", "", &message, json!({"pid": pid}));
}

/// After a takeover: cancel requests of the sessions that are left reach them through the new process.
pub(super) async fn answer_successor(controller: Arc<Controller>) {
    let listener = match bind(&format!("understudy-{}", std::process::id())) {
        Ok(listener) => listener,
        Err(error) => return tracing::warn!(%error, "cancel requests of the sessions that are left do not reach this process"),
    };
    loop {
        let Ok((mut stream, _)) = listener.accept().await else { continue };
        let controller = controller.clone();
        tokio::spawn(async move {
            if same_user(&stream).is_err() {
                return;
            }
            match tokio::time::timeout(Duration::from_secs(3), receive(&mut stream)).await {
                Ok(Ok(Request::Cancel { pid, key })) => controller.door.cancel(pid, key.into()).await,
                Ok(Ok(Request::Sessions)) => {
                    let _ = send(&mut stream, &Reply::Sessions { left: controller.door.connected() }).await;
                }
                Ok(Ok(Request::TakeOver { .. })) => {
                    let reason = "it has handed over already".to_owned();
                    let _ = send(&mut stream, &Reply::Refused { reason }).await;
                }
                Ok(Err(_)) | Err(_) => {}
            }
        });
    }
}
