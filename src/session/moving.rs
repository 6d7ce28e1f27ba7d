//! Connections of a session besides the one to the owner: to shadows that serve its reads, and to the next owner, opened
//! before a cutover needs it. And the move itself: between two transactions, with settings, LISTEN and prepared
//! statements rebuilt on the other side.

use super::{front_door::CancelTarget, relay::Relay, start_up::ask};
use crate::{
    backend::{BackendError, Connection},
    pool::{Server, literal},
    traffic::{
        copies::Identity,
        database::{Database, SessionInfo},
        route::{Route, Target},
    },
    wire::{self, Message, put, put_cstr},
};
use bytes::Bytes;
use std::{
    collections::{HashMap, HashSet},
    io,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    runtime::Handle,
    task::JoinHandle,
};

/// After a failed attempt a session leaves a server alone for this long.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// A session that cannot reach its new owner for this long ends with an error.
const MOVE_TIMEOUT: Duration = Duration::from_secs(15);
/// A connection to the next owner is tried this often, until the cutover goes on or is given up.
const STANDBY_ATTEMPTS: u32 = 40;
/// Fingerprints remembered as not servable.
const REFUSED_MAX: usize = 1_000;

/// A connection to a server that is not the owner (yet).
pub(super) struct Attachment {
    pub target: Arc<Target>,
    pub server: Server,
    /// Statement text and parameter types → name on that server.
    pub prepared: HashMap<(Bytes, Bytes), Bytes>,
    /// Names given so far.
    pub names: u64,
    /// Fingerprints that cannot be served from here.
    pub refused: HashSet<u64>,
    /// The version of the session's state that it has.
    pub state_version: u64,
    /// Opened to become the owner's connection; the others refuse writes and are never adopted.
    pub writable: bool,
}

struct Opening {
    writable: bool,
    handle: JoinHandle<Result<Connection, BackendError>>,
}

/// All attachments of a session.
pub(super) struct Attachments {
    /// Where connections are opened and logged in, so that this costs no other session of the thread anything.
    background: Handle,
    ready: Vec<Attachment>,
    opening: Vec<(Arc<Target>, Opening)>,
    failed: Vec<(Arc<Target>, Instant)>,
}

impl Attachment {
    /// Called on the session's thread. `None`: its socket could not be brought there.
    fn new(target: Arc<Target>, connection: Connection, writable: bool) -> Option<Self> {
        Some(Attachment {
            server: Server::from_connection(connection, target.clone(), 0).rebind().ok()?,
            target,
            prepared: HashMap::new(),
            names: 0,
            refused: HashSet::new(),
            state_version: 0,
            writable,
        })
    }

    pub async fn send(&mut self, bytes: &[u8]) -> Result<(), io::Error> {
        self.server.stream.write_all(bytes).await
    }

    pub async fn receive(&mut self) -> Result<Message, io::Error> {
        loop {
            match wire::take(&mut self.server.from) {
                Ok(Some(message)) => return Ok(message),
                Ok(None) => {}
                Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
            }
            self.server.from.reserve(8 << 10);
            if self.server.stream.read_buf(&mut self.server.from).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// False: the server has said goodbye or closed while nothing was asked of it.
    fn is_alive(&mut self) -> bool {
        match self.server.stream.try_read_buf(&mut self.server.from) {
            Ok(0) => return false,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return false,
        }
        // what comes unasked is a notice, a changed parameter, or a FATAL
        loop {
            match wire::take(&mut self.server.from) {
                Ok(Some(message)) if message.tag == b'E' => return false,
                Ok(Some(_)) => {}
                Ok(None) => return true,
                Err(_) => return false,
            }
        }
    }

    /// Remembers a fingerprint as not servable from here.
    pub fn refuse(&mut self, fingerprint: u64) {
        if self.refused.len() >= REFUSED_MAX {
            self.refused.clear();
        }
        self.refused.insert(fingerprint);
    }
}

impl Attachments {
    /// None so far.
    pub fn new(background: Handle) -> Self {
        Attachments { background, ready: Vec::new(), opening: Vec::new(), failed: Vec::new() }
    }

    /// Follows the route: opens what it will need, closes what it no longer names.
    /// `own_standby`: also to the next owner.
    pub fn prepare(
        &mut self,
        database: &Arc<Database>,
        info: &Arc<SessionInfo>,
        identity: &Arc<Identity>,
        route: &Route,
        own_standby: bool,
    ) {
        let wanted = |target: &Arc<Target>| {
            route.standby.as_ref() == Some(target) || route.owner == *target || route.shadows.iter().any(|shadow| shadow.target == *target)
        };
        // A connection opened to serve reads may have begun when its server still refused writes by default, and refuses
        // them by our own setting: it must not become the owner's.
        let next_owner = |target: &Arc<Target>| route.standby.as_ref() == Some(target) || route.owner == *target;
        self.ready.retain(|attachment| wanted(&attachment.target) && attachment.writable == next_owner(&attachment.target));
        self.opening.retain(|(target, opening)| {
            let keep = wanted(target) && opening.writable == next_owner(target);
            if !keep {
                opening.handle.abort();
            }
            keep
        });
        match &route.standby {
            None => info.standby_ready.store(false, Ordering::SeqCst),
            Some(_) if !own_standby => {}
            Some(target) => {
                let target = target.clone();
                self.open(database, info, identity, &target, true, true);
            }
        }
    }

    /// Starts opening a connection in the background, unless there is one.
    pub fn open(
        &mut self,
        database: &Arc<Database>,
        info: &Arc<SessionInfo>,
        identity: &Arc<Identity>,
        target: &Arc<Target>,
        standby: bool,
        writable: bool,
    ) {
        if self.ready.iter().any(|attachment| attachment.target == *target) {
            if standby {
                info.standby_ready.store(true, Ordering::SeqCst);
            }
            return;
        }
        self.failed.retain(|(_, since)| since.elapsed() < RETRY_AFTER);
        if self.opening.iter().any(|(opening, ..)| opening == target)
            || (!standby && self.failed.iter().any(|(failed, _)| failed == target))
        {
            return;
        }
        let url = database.url_for(target, &info.user);
        let (identity, info) = (identity.clone(), info.clone());
        let opening = self.background.spawn(async move {
            let parameters: Vec<(&[u8], &[u8])> = identity.parameters.iter().map(|(name, value)| (&name[..], &value[..])).collect();
            let mut opened = Connection::open_as(&url, &url.user, &identity.login_at(&url), &parameters).await;
            for _ in 1..STANDBY_ATTEMPTS {
                if !standby || opened.is_ok() {
                    break;
                }
                *info.attach_error.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = opened.as_ref().err().map(ToString::to_string);
                tokio::time::sleep(RETRY_AFTER / 2).await;
                opened = Connection::open_as(&url, &url.user, &identity.login_at(&url), &parameters).await;
            }
            if let (false, Ok(connection)) = (writable, &mut opened)
                && let Err(error) = connection.simple_query("SET default_transaction_read_only = on").await
            {
                opened = Err(error);
            }
            let error = opened.as_ref().err().map(ToString::to_string);
            if standby && opened.is_ok() {
                info.standby_ready.store(true, Ordering::SeqCst);
            }
            *info.attach_error.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = error;
            opened
        });
        self.opening.push((target.clone(), Opening { writable, handle: opening }));
    }

    /// Moves connections that have been opened meanwhile to the ready ones.
    async fn collect(&mut self) {
        let mut at = 0;
        while let Some((_, opening)) = self.opening.get(at) {
            if !opening.handle.is_finished() {
                at += 1;
                continue;
            }
            let (target, Opening { writable, handle }) = self.opening.swap_remove(at);
            let opened = handle.await.ok().and_then(Result::ok);
            match opened.and_then(|connection| Attachment::new(target.clone(), connection, writable)) {
                Some(attachment) => self.ready.push(attachment),
                None => self.failed.push((target, Instant::now())),
            }
        }
    }

    /// The connection to a server, if it is ready. One that the server has closed meanwhile (a restart, an idle limit) is
    /// dropped here, before a read is entrusted to it.
    pub fn get(&mut self, target: &Arc<Target>) -> Option<&Attachment> {
        self.collect_finished();
        self.ready.retain_mut(|attachment| attachment.target != *target || attachment.is_alive());
        self.ready.iter().find(|attachment| attachment.target == *target)
    }

    /// [`Attachments::collect`] without waiting: finished handles are ready at once.
    fn collect_finished(&mut self) {
        if self.opening.iter().any(|(_, opening)| opening.handle.is_finished()) {
            futures_util::FutureExt::now_or_never(self.collect());
        }
    }

    /// Takes the connection to a server out.
    pub fn take(&mut self, target: &Arc<Target>) -> Option<Attachment> {
        self.collect_finished();
        let at = self.ready.iter().position(|attachment| attachment.target == *target)?;
        Some(self.ready.swap_remove(at))
    }

    /// Puts it back.
    pub fn put_back(&mut self, attachment: Attachment) {
        self.ready.push(attachment);
    }

    /// The last attempt to connect to a server has failed a moment ago.
    fn has_failed(&self, target: &Arc<Target>) -> bool {
        self.failed.iter().any(|(failed, since)| failed == target && since.elapsed() < RETRY_AFTER)
    }

    /// Waits for the connection to a server that a session moves to.
    async fn wait_for(&mut self, target: &Arc<Target>) -> Option<Attachment> {
        self.opening.retain(|(opening, how)| opening != target || how.writable);
        if let Some(at) = self.opening.iter().position(|(opening, _)| opening == target) {
            let (target, Opening { handle, .. }) = self.opening.swap_remove(at);
            let opened = handle.await.ok().and_then(Result::ok);
            match opened.and_then(|connection| Attachment::new(target.clone(), connection, true)) {
                Some(attachment) => return Some(attachment),
                None => self.failed.push((target, Instant::now())),
            }
        }
        self.ready.retain_mut(|attachment| attachment.target != *target || (attachment.writable && attachment.is_alive()));
        self.take(target)
    }
}

impl Relay {
    /// Goes on at the new owner. Called at a boundary, outside the gate, when the route's epoch is not the server's.
    pub(super) async fn move_to_owner(&mut self) -> Result<(), io::Error> {
        if self.pooling.is_some() {
            return Box::pin(self.move_pooled()).await;
        }
        let deadline = Instant::now() + MOVE_TIMEOUT;
        loop {
            let route = self.route();
            if let Some(mut attachment) = self.attachments.wait_for(&route.owner).await
                && self.bring_state(&mut attachment).await.is_some()
            {
                self.adopt(attachment.server, &route);
                return Ok(());
            }
            if self.server_gone && self.state_version != 0 {
                tracing::error!(session = self.info.id, "the old owner closed this session before its settings could be read");
                wire::backend::put_error(
                    &mut self.to_client,
                    "FATAL",
                    "57P01",
                    "terminating connection due to administrator command",
                    None,
                );
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            // RECONNECT: a session that cannot log in again is better off where it is than ended
            if !self.server_gone && self.attachments.has_failed(&route.owner) && self.is_connected_to(&route.owner) {
                if let Some(server) = &mut self.server {
                    server.epoch = route.epoch;
                }
                self.info.epoch.store(route.epoch, Ordering::SeqCst);
                return Ok(());
            }
            if Instant::now() > deadline {
                let reason = self.info.attach_error.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone();
                tracing::error!(session = self.info.id, user = %self.info.user, owner = %route.owner.name, ?reason, "a session cannot follow the owner of the writes");
                wire::backend::put_error(
                    &mut self.to_client,
                    "FATAL",
                    "08006",
                    "understudy moved this database and cannot log this session in at the new server",
                    None,
                );
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            self.attachments.open(&self.database, &self.info, &self.identity, &route.owner, false, true);
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    fn is_connected_to(&self, target: &Target) -> bool {
        self.server.as_ref().is_some_and(|server| *server.backend.target == *target)
    }

    fn adopt(&mut self, mut server: Server, route: &Arc<Route>) {
        server.epoch = route.epoch;
        for (name, value) in server.parameters.list() {
            let known = self.server.as_ref().and_then(|old| old.parameters.get(name));
            if known != Some(value) {
                put(&mut self.to_client, b'S', |b| {
                    put_cstr(b, name);
                    put_cstr(b, value);
                });
            }
        }
        self.to_client.extend_from_slice(&std::mem::take(&mut server.heard));
        (self.server_gone, self.server_skip) = (false, 0);
        self.conversation.generation += 1;
        self.info.epoch.store(route.epoch, Ordering::SeqCst);
        self.aim_cancel(CancelTarget::Server(server.backend.clone()));
        if let Some(old) = self.server.replace(server) {
            tokio::spawn(old.terminate());
        }
    }

    /// Brings settings and registrations to a standby before it is needed, if the session stands between two transactions.
    pub(super) async fn prepare_standby(&mut self) {
        let route = self.route();
        let Some(target) = &route.standby else { return };
        if self.pooling.is_some()
            || self.state_version == 0
            || !self.conversation.at_boundary()
            || !self.to_server.is_empty()
            || self.client_skip > 0
        {
            return;
        }
        if let Some(mut attachment) = self.attachments.take(target)
            && self.bring_state(&mut attachment).await.is_some()
        {
            self.attachments.put_back(attachment);
        }
    }

    /// Makes an attachment's session state equal to the session's. `None`: the attachment broke.
    async fn bring_state(&mut self, attachment: &mut Attachment) -> Option<()> {
        if attachment.state_version == self.state_version {
            return Some(());
        }
        let server = self.server.as_mut()?;
        // What SET, RESET, set_config() and their rollbacks have left is what the server says it is.
        let settings = ask(
            server,
            "SELECT name, setting FROM pg_catalog.pg_settings WHERE source = 'session' AND context IN ('user', 'superuser')
             UNION ALL SELECT 'role', pg_catalog.current_setting('role') WHERE pg_catalog.current_setting('role') <> 'none'",
        )
        .await;
        let channels = ask(server, "SELECT * FROM pg_catalog.pg_listening_channels()").await;
        let prepared = ask(server, "SELECT statement FROM pg_catalog.pg_prepared_statements WHERE from_sql").await;
        let custom = self.conversation.custom_settings();
        let custom = match custom.is_empty() {
            true => Some(Vec::new()),
            false => ask(server, &custom).await,
        };
        // between two messages, for the session is between two transactions
        self.to_client.extend_from_slice(&std::mem::take(&mut server.heard));
        attachment.server.heard.clear(); // of channels that it may not listen to any more
        let (Some(settings), Some(custom), true) = (&settings, &custom, channels.is_some() && prepared.is_some()) else {
            // going on with another search_path or role than the client has set would be worse than an end
            self.server_gone = true;
            return None;
        };
        let mut text = String::from("RESET ALL; UNLISTEN *; ");
        for row in settings.iter().chain(custom) {
            if let [Some(name), Some(setting)] = &row[..] {
                text.push_str(&format!("SELECT pg_catalog.set_config({}, {}, false); ", literal(name), literal(setting)));
            }
        }
        for channel in channels.iter().flatten().flat_map(|row| row.iter().flatten()) {
            text.push_str(&format!("LISTEN \"{}\"; ", channel.replace('"', "\"\"")));
        }
        ask(&mut attachment.server, &text).await?;
        for statement in prepared.iter().flatten().flat_map(|row| row.iter().flatten()) {
            // one that exists already is refused, which is as good
            let _ = ask(&mut attachment.server, statement).await;
        }
        attachment.state_version = self.state_version;
        Some(())
    }

    /// A CancelRequest of the client goes there from now on. Returns where it went before.
    pub(super) fn aim_cancel(&mut self, target: CancelTarget) -> CancelTarget {
        std::mem::replace(&mut *self.cancel.lock().unwrap_or_else(|poisoned| poisoned.into_inner()), target)
    }
}
