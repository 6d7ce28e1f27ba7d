//! A session from its log-in to its end: registered for cancels and cutovers, then relayed.

use super::{
    front_door::{CancelTarget, Connected, FrontDoor, refuse},
    log_in::{Admitted, ClientKey, log_in},
    pooled::of_session,
    relay::Relay,
};
use crate::{
    auth::{Ended, scram::random},
    config::PoolMode,
    net::{ClientTls, Peer, Stream},
    pool::Server,
    traffic::{
        cancelling::Cancelling,
        copies::Identity,
        database::{Database, Mailbox, SessionInfo, pin},
        pulse::Pulse,
    },
};
use bytes::{Bytes, BytesMut};
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicI64, AtomicU8, AtomicU64},
    },
    time::Instant,
};
use tokio::io::AsyncWriteExt;

/// How often a replication connection looks whether it has been told to end, or understudy is shutting down.
const REPLICATION_LOOK: std::time::Duration = std::time::Duration::from_millis(500);

/// A client that has said who it is.
pub(super) struct Client {
    pub stream: Stream,
    /// Bytes that came behind the start-up packet.
    pub buffer: BytesMut,
    pub peer: Peer,
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
    let replication = client.parameters.iter().any(|(name, value)| &name[..] == b"replication" && replicates(value));
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
        pooled: !replication && database.pool.load().mode == PoolMode::Transaction,
        state: AtomicU8::default(),
        mailbox: Mailbox::default(),
        pulse: Pulse::default(),
        cancelling: Cancelling::default(),
    });
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
    let Admitted { server, pooling, login, version } = admitted;
    let target = server.as_ref().map_or(CancelTarget::Nobody, |server| CancelTarget::Server(server.backend.clone()));
    let cancel = Arc::new(Mutex::new(target));
    let (door, database) = (door.clone(), database.clone());
    let presence = Presence { door: door.clone(), database: database.clone(), id: info.id, key: key.of(version), _connected: connected };
    door.cancels.insert(presence.key.clone(), (cancel.clone(), info.clone()));
    info.epoch.store(server.as_ref().map_or(database.epoch(), |server| server.epoch), std::sync::atomic::Ordering::SeqCst);
    if replication {
        info.pins.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(pin::REPLICATION);
    }
    // From here on, not before: a cutover waits until every session has its connection to the next owner, and a client
    // that is slow to log in must not make it wait. Such a session looks at the owner before its first statement.
    database.sessions.insert(info.id, info.clone());
    let server = match server {
        Some(server) if replication => {
            // An owner that changes later is not followed: the positions are this server's. A walsender has no boundary at
            // which a SHUTDOWN could let it end.
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
        server => server,
    };
    // copies: the packet that they came in is larger than all of them
    let copied = |(name, value): (Bytes, Bytes)| (Bytes::copy_from_slice(&name), Bytes::copy_from_slice(&value));
    let parameters = of_session(&client.parameters).into_iter().map(copied).collect();
    let identity = Arc::new(Identity { user: info.user.clone(), parameters, login });
    let relay = Box::new(Relay::new(door.clone(), database, info, identity, client.stream, client.buffer, server, pooling, cancel));
    door.threads.spawn(async move {
        relay.run().await;
        drop(presence);
    });
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

/// Runs texts on a server between two transactions and returns the rows of the last one.
pub(super) async fn ask(server: &mut Server, text: &str) -> Option<Vec<Vec<Option<String>>>> {
    server.run(text).await.ok()
}
