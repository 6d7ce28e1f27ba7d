//! Start-up: the client's parameters go to the owner, authentication is relayed (trust, password, md5, SCRAM), the
//! cancellation key is replaced by our own.

use super::{
    front_door::{CancelTarget, FrontDoor, LOGIN_TIMEOUT, reach, refuse},
    relay::{Relay, Server, note_parameter},
};
use crate::{
    net::Stream,
    traffic::{
        copies::Identity,
        database::{Database, Mailbox, SessionInfo, pin},
    },
    wire::{self, Message, backend::TransactionStatus, frontend, put, put_sized, take_cstr, take_i32},
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

/// Longest message of a client during authentication (`PG_MAX_AUTH_TOKEN_LENGTH`, `src/include/libpq/auth.h`).
const AUTH_BYTES_MAX: usize = 65_535;

/// How often a replication connection looks whether it has been told to end, or understudy is shutting down.
const REPLICATION_LOOK: std::time::Duration = std::time::Duration::from_millis(500);

/// A client that has said who it is.
pub(super) struct Client {
    pub stream: Stream,
    pub peer: SocketAddr,
    pub version: i32,
    pub parameters: Vec<(Bytes, Bytes)>,
}

/// Serves a client until it ends.
pub(super) async fn run(door: Arc<FrontDoor>, database: Arc<Database>, client: Client, id: u64) {
    let find =
        |name: &[u8]| client.parameters.iter().find(|(key, _)| key == name).map(|(_, value)| String::from_utf8_lossy(value).into_owned());
    let info = Arc::new(SessionInfo {
        id,
        peer: client.peer.to_string(),
        user: find(b"user").unwrap_or_default(),
        application: find(b"application_name").unwrap_or_default(),
        since: Instant::now(),
        epoch: AtomicI64::new(0),
        standby_ready: AtomicBool::new(false),
        pins: Mutex::new(Vec::new()),
        attach_error: Mutex::new(None),
        requests: AtomicU64::new(0),
        mailbox: Mailbox::default(),
    });
    let replication = client.parameters.iter().any(|(name, value)| &name[..] == b"replication" && replicates(value));
    let key = door.cancel_key(id);
    serve(&door, &database, client, info, &key, replication).await;
    door.cancels.remove(&key);
    database.sessions.remove(&id);
}

async fn serve(
    door: &Arc<FrontDoor>,
    database: &Arc<Database>,
    mut client: Client,
    info: Arc<SessionInfo>,
    key: &(i32, Bytes),
    replication: bool,
) {
    let (stream, owner, epoch) = match reach(database).await {
        Ok(reached) => reached,
        Err(error) => {
            tracing::warn!(database = %database.name, %error, "cannot connect a client to the owner of the writes");
            let message = format!("understudy cannot reach the server of database \"{}\"", database.name);
            return refuse(&mut client.stream, "08006", &message, Some("see SHOW SERVERS and the log of understudy")).await;
        }
    };
    let mut server = Server { stream, from: BytesMut::new(), key: (0, Bytes::new()), parameters: Vec::new(), epoch, bulk: false };
    let mut startup = BytesMut::new();
    put_sized(&mut startup, |b| {
        b.extend_from_slice(&client.version.to_be_bytes());
        let mut named = false;
        for (name, value) in &client.parameters {
            wire::put_cstr(b, name);
            if &name[..] == b"database" {
                named = true;
                wire::put_cstr(b, owner.url.dbname.as_bytes());
            } else {
                wire::put_cstr(b, value);
            }
        }
        if !named {
            wire::put_cstr(b, b"database");
            wire::put_cstr(b, owner.url.dbname.as_bytes());
        }
        b.extend_from_slice(&[0]);
    });
    let mut from_client = BytesMut::new();
    let target = CancelTarget { url: (*owner).clone(), pid: 0, key: Bytes::new() };
    let cancel = Arc::new(Mutex::new(target));
    let log_in = log_in(&mut client.stream, &mut from_client, &mut server, &startup, key);
    match tokio::time::timeout(LOGIN_TIMEOUT, log_in).await {
        Ok(Some(())) => {}
        Ok(None) => return,
        Err(_) => return refuse(&mut client.stream, "08P01", "login took too long", None).await,
    }
    {
        let mut target = cancel.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        (target.pid, target.key) = server.key.clone();
    }
    door.cancels.insert(key.clone(), cancel.clone());
    info.epoch.store(epoch, std::sync::atomic::Ordering::SeqCst);
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
            () = pass_through(client.stream, from_client, server) => {}
            () = closing => {}
        }
        return;
    }
    let own = |name: &Bytes| [&b"user"[..], b"database", b"replication"].contains(&&name[..]);
    let parameters = client.parameters.iter().filter(|(name, _)| !own(name)).cloned().collect();
    let identity = Arc::new(Identity { user: info.user.clone(), parameters });
    let relay = Relay::new(door.clone(), database.clone(), info, identity, client.stream, from_client, server, cancel);
    door.threads.run(relay.run()).await;
}

/// Relays until the first ReadyForQuery. `None`: one side went away, and the other has been told what there was to tell.
async fn log_in(client: &mut Stream, from_client: &mut BytesMut, server: &mut Server, startup: &[u8], key: &(i32, Bytes)) -> Option<()> {
    server.stream.write_all(startup).await.ok()?;
    let mut to_client = BytesMut::new();
    loop {
        let message = next(&mut server.stream, &mut server.from).await?;
        let mut body = &message.body[..];
        match message.tag {
            b'K' => {
                let pid = take_i32(&mut body)?;
                server.key = (pid, message.body.slice_ref(body));
                put(&mut to_client, b'K', |b| {
                    b.extend_from_slice(&key.0.to_be_bytes());
                    b.extend_from_slice(&key.1);
                });
                continue;
            }
            b'S' => {
                let (name, value) = (take_cstr(&mut body)?, take_cstr(&mut body)?);
                server.parameters.push((Bytes::copy_from_slice(name), Bytes::copy_from_slice(value)));
            }
            _ => {}
        }
        put(&mut to_client, message.tag, |b| b.extend_from_slice(&message.body));
        let answer_wanted = message.tag == b'R' && !matches!(message.body.get(..4), Some([0, 0, 0, 0 | 12]));
        let ready = message.tag == b'Z' && TransactionStatus::parse(&message.body).is_some();
        if answer_wanted || ready || message.tag == b'E' || to_client.len() > AUTH_BYTES_MAX {
            client.write_all(&to_client).await.ok()?;
            to_client.clear();
        }
        if ready {
            return Some(());
        }
        if message.tag == b'E' {
            return None;
        }
        if answer_wanted {
            let answer = next(client, from_client).await?;
            if answer.tag != b'p' || answer.body.len() > AUTH_BYTES_MAX {
                return None;
            }
            let mut bytes = BytesMut::new();
            put(&mut bytes, b'p', |b| b.extend_from_slice(&answer.body));
            server.stream.write_all(&bytes).await.ok()?;
        }
    }
}

async fn next<S: AsyncRead + Unpin>(stream: &mut S, buffer: &mut BytesMut) -> Option<Message> {
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
