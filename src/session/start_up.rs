//! A session from its log-in to its end: registered for cancels and cutovers, then relayed.

use super::{
    front_door::{CancelTarget, Connected, FrontDoor, refuse},
    log_in::{Admitted, ClientKey, log_in},
    relay::{Relay, Server, note_parameter},
};
use crate::{
    auth::{Ended, scram::random},
    net::{ClientTls, Stream},
    traffic::{
        cancelling::Cancelling,
        copies::Identity,
        database::{Database, Mailbox, SessionInfo, pin},
        pulse::Pulse,
    },
    wire::{self, Message, frontend, put},
};
use bytes::{Bytes, BytesMut};
use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicI64, AtomicU64},
    },
    time::Instant,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};

/// How often a replication connection looks whether it has been told to end, or understudy is shutting down.
const REPLICATION_LOOK: std::time::Duration = std::time::Duration::from_millis(500);

/// A client that has said who it is.
pub(super) struct Client {
    pub stream: Stream,
    /// Bytes that came behind the start-up packet.
    pub buffer: BytesMut,
    pub peer: SocketAddr,
    /// `None`: not over TLS.
    pub tls: Option<ClientTls>,
    pub version: i32,
    pub parameters: Vec<(Bytes, Bytes)>,
}

impl Client {
    /// Of a parameter that comes several times the last one counts, as in PostgreSQL.
    pub fn parameter(&self, name: &[u8]) -> Option<&Bytes> {
        self.parameters.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value)
    }
}

/// Logs a client in and hands it to its session thread: whatever the log-in needed is given back then.
pub(super) async fn run(door: Arc<FrontDoor>, database: Arc<Database>, client: Client, connected: Connected, id: u64, deadline: Instant) {
    let find = |name: &[u8]| client.parameter(name).map(|value| String::from_utf8_lossy(value).into_owned());
    let info = Arc::new(SessionInfo {
        id,
        peer: client.peer.to_string(),
        user: find(b"user").map(role).unwrap_or_default(),
        application: find(b"application_name").unwrap_or_default(),
        since: Instant::now(),
        epoch: AtomicI64::new(0),
        standby_ready: AtomicBool::new(false),
        pins: Mutex::new(Vec::new()),
        attach_error: Mutex::new(None),
        requests: AtomicU64::new(0),
        mailbox: Mailbox::default(),
        pulse: Pulse::default(),
        cancelling: Cancelling::default(),
    });
    let replication = client.parameters.iter().any(|(name, value)| &name[..] == b"replication" && replicates(value));
    let key = ClientKey { pid: (id as i32) & i32::MAX, secret: random() };
    serve(&door, &database, client, connected, info, &key, replication, deadline).await;
}

/// A role's name as the server will take it (`NAMEDATALEN`): a longer one must not slip past a rule for the short one.
fn role(mut name: String) -> String {
    name.truncate(name.floor_char_boundary(63));
    name
}

/// A session as others see it, until it ends, even by a panic. Fields are dropped in this order.
struct Presence {
    door: Arc<FrontDoor>,
    database: Arc<Database>,
    id: u64,
    /// Whoever has this key may cancel what the session does.
    key: (i32, Bytes),
    _connected: Connected,
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.door.cancels.remove(&self.key);
        self.database.sessions.remove(&self.id);
    }
}

#[allow(clippy::too_many_arguments)]
async fn serve(
    door: &Arc<FrontDoor>,
    database: &Arc<Database>,
    mut client: Client,
    connected: Connected,
    info: Arc<SessionInfo>,
    key: &ClientKey,
    replication: bool,
    deadline: Instant,
) {
    // boxed: what a log-in needs is given back before the first statement
    let log_in = Box::pin(log_in(door, database, &mut client, &info, key));
    let admitted = match tokio::time::timeout_at(deadline.into(), log_in).await {
        Ok(Ok(admitted)) => admitted,
        Ok(Err(Ended::Gone)) => return,
        Ok(Err(Ended::Denied(denial))) => return refuse(&mut client.stream, denial.code, &denial.message, denial.hint).await,
        Err(_) => {
            let hint = "login_timeout in proxy.toml says how long a log-in may take";
            return refuse(&mut client.stream, "57014", "canceling authentication due to timeout", Some(hint)).await;
        }
    };
    let Admitted { server, owner, login, version } = admitted;
    let (pid, secret) = server.key.clone();
    let cancel = Arc::new(Mutex::new(CancelTarget { url: (*owner).clone(), pid, key: secret }));
    let (door, database) = (door.clone(), database.clone());
    let presence = Presence { door: door.clone(), database: database.clone(), id: info.id, key: key.of(version), _connected: connected };
    door.cancels.insert(presence.key.clone(), (cancel.clone(), info.clone()));
    info.epoch.store(server.epoch, std::sync::atomic::Ordering::SeqCst);
    if replication {
        info.pins.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(pin::REPLICATION);
    }
    // From here on, not before: a cutover waits until every session has its connection to the next owner, and a client
    // that is slow to log in must not make it wait. Such a session looks at the owner before its first statement.
    database.sessions.insert(info.id, info.clone());
    if replication {
        // An owner that changes later is not followed: the positions are this server's. A walsender has no boundary at which
        // a SHUTDOWN could let it end.
        let closing = async {
            while !door.is_closing() && !info.mailbox.is_terminated() {
                tokio::time::sleep(REPLICATION_LOOK).await;
            }
        };
        tokio::select! {
            () = pass_through(client.stream, client.buffer, server) => {}
            () = closing => {}
        }
        return;
    }
    let own = |name: &Bytes| [&b"user"[..], b"database", b"replication"].contains(&&name[..]) || name.starts_with(b"_pq_.");
    // copies: the packet that they came in is larger than all of them
    let copied = |(name, value): &(Bytes, Bytes)| (Bytes::copy_from_slice(name), Bytes::copy_from_slice(value));
    let parameters = client.parameters.iter().filter(|(name, _)| !own(name)).map(copied).collect();
    let identity = Arc::new(Identity { user: info.user.clone(), parameters, login });
    let relay = Box::new(Relay::new(door.clone(), database, info, identity, client.stream, client.buffer, server, cancel));
    door.threads.spawn(async move {
        relay.run().await;
        drop(presence);
    });
}

pub(super) async fn next<S: AsyncRead + Unpin>(stream: &mut S, buffer: &mut BytesMut) -> Option<Message> {
    loop {
        if wire::peek(buffer).ok()?.is_some_and(|header| header.len > 1 << 20) {
            return None;
        }
        if let Some(message) = wire::take(buffer).ok()? {
            return Some(message);
        }
        buffer.reserve(4 << 10);
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
}

/// What `replication` means at start-up: `database`, or a boolean as PostgreSQL reads them (`src/backend/utils/adt/bool.c`).
/// What is neither is relayed to be refused.
pub(super) fn replicates(value: &[u8]) -> bool {
    let value = value.to_ascii_lowercase();
    let no = |word: &[u8], least: usize| value.len() >= least && word.starts_with(&value);
    !(no(b"false", 1) || no(b"no", 1) || no(b"off", 2) || value == b"0")
}

/// A replication connection: the walsender's sub-protocol is nobody's business but the two ends'.
async fn pass_through(mut client: Stream, from_client: BytesMut, mut server: Server) {
    let early = async {
        server.stream.write_all(&from_client).await?;
        client.write_all(&server.from).await
    };
    if early.await.is_ok() {
        let _ = tokio::io::copy_bidirectional(&mut client, &mut server.stream).await;
    }
}

impl Server {
    /// Ends the connection the way clients do.
    pub(super) async fn terminate(mut self) {
        let mut bytes = BytesMut::new();
        put(&mut bytes, b'X', |_| {});
        let _ = self.stream.write_all(&bytes).await;
        let _ = self.stream.shutdown().await;
    }

    /// From a connection that we opened ourselves.
    pub(super) fn from_connection(connection: crate::backend::Connection, epoch: i64) -> Self {
        let crate::backend::Connection { stream, buffer, parameters, key } = connection;
        Server { stream, from: buffer, key, parameters, epoch, bulk: false }
    }
}

/// Runs texts on a server between two transactions and returns the rows of the last one.
pub(super) async fn ask(server: &mut Server, text: &str) -> Option<Vec<Vec<Option<String>>>> {
    let mut request = BytesMut::new();
    frontend::put_query(&mut request, text.as_bytes());
    server.stream.write_all(&request).await.ok()?;
    let (mut rows, mut failed) = (Vec::new(), false);
    loop {
        let message = next(&mut server.stream, &mut server.from).await?;
        match message.tag {
            // what we set here must not reach the client later as the value of its start-up
            b'S' => note_parameter(&mut server.parameters, &message.body),
            b'T' => rows.clear(),
            b'D' => {
                let values = wire::backend::data_row(&message.body)?;
                rows.push(values.into_iter().map(|value| value.map(|bytes| String::from_utf8_lossy(bytes).into_owned())).collect());
            }
            b'E' => failed = true,
            b'Z' => return (!failed).then_some(rows),
            _ => {}
        }
    }
}
