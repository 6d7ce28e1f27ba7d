//! Sessions in transaction mode: a server connection is borrowed when a transaction begins and returned when everything of
//! it is answered, unless something pins the session to it. What may have changed meanwhile is asked of the server
//! before it goes to somebody else.

use super::{
    conversation::{Conversation, Touched, memmem},
    front_door::CancelTarget,
    relay::{CLOSING, DRAIN_LOOK, Next, Relay, TERMINATED, drop_front},
    sockets::Wanted,
};
use crate::{
    backend,
    pool::{Backend, Parameters, Pool, PoolError, Server, Settings, Taken, Waiting, Welcome, bring, literal},
    traffic::database::{pin, state},
    wire::{
        self, Header,
        backend::{ErrorFields, TransactionStatus, put_error},
        put, put_cstr, take_cstr,
    },
};
use bytes::{Bytes, BytesMut};
use std::{
    future::poll_fn,
    io,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};
use tokio::sync::Notify;

/// Longest cycle that is kept, so that it can be sent again when a statement's plan turns out to be stale.
const AGAIN_BYTES_MAX: usize = 8 << 10;
/// Connections tried when one after the other breaks while it is made ready.
const READY_ATTEMPTS: usize = 3;
/// Making a connection as new again that a session has left.
const RESET_TIMEOUT: Duration = Duration::from_secs(5);
/// A statement that nobody waits for any more.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(5);

/// What a session needs to borrow.
pub(super) struct Pooling {
    pub pool: Arc<Pool>,
    /// As the client asked for at its start-up.
    startup: Arc<Settings>,
    /// As they are now.
    settings: Arc<Settings>,
    /// What the client has been told by ParameterStatus.
    told: Arc<Parameters>,
    /// The connection that was lent last: the unnamed statement is on it, if nobody else has used it since.
    last: Option<Arc<Backend>>,
    /// Borrowed, and not yet ready.
    unready: Option<Box<Server>>,
    waiting: Option<Waiting>,
    /// The running cycle, as the client sent it, if a transaction has begun with it; empty behind its end.
    again: BytesMut,
    /// Its error has been kept back; its ReadyForQuery is still to come.
    begins_again: bool,
    /// It is to be sent again.
    go_on: bool,
    /// The connection was borrowed for the message at the front.
    just_borrowed: bool,
    /// Up to the end of its cycle nothing of the client is looked at: it has been refused.
    refusing: bool,
}

impl Pooling {
    /// For a client that has logged in.
    pub fn new(pool: Arc<Pool>, welcome: Welcome) -> Box<Self> {
        Box::new(Pooling {
            pool,
            startup: welcome.settings.clone(),
            settings: welcome.settings,
            told: welcome.parameters,
            last: None,
            unready: None,
            waiting: None,
            again: BytesMut::new(),
            begins_again: false,
            go_on: false,
            just_borrowed: false,
            refusing: false,
        })
    }

    /// The cycle at the front is being refused.
    #[inline]
    pub fn is_refusing(&self) -> bool {
        self.refusing
    }

    /// The cycle that is being answered is to be sent again: until its ReadyForQuery nothing may stand behind it.
    #[inline]
    pub fn is_beginning_again(&self) -> bool {
        self.begins_again
    }
}

impl Relay {
    /// At a boundary without a server: what to do with the message at the front. `None`: nothing, it is skipped.
    pub(super) fn before_borrowing(&mut self, header: Header) -> Option<Next> {
        // what is left of a COPY that the server has given up, and a Flush with nothing before it, begin nothing
        if matches!(header.tag, b'd' | b'c' | b'f') || (header.tag == b'H' && header.len == 5) {
            self.client_skip = header.len;
            return None;
        }
        Some(if self.database.gate.is_closed() { Next::Held } else { Next::Borrow })
    }

    /// The server at hand was borrowed for the message at the front.
    #[inline]
    pub(super) fn has_just_borrowed(&self) -> bool {
        self.pooling.as_ref().is_some_and(|pooling| pooling.just_borrowed)
    }

    /// Borrows, if that can be done at once.
    pub(super) fn borrow(&mut self) -> bool {
        let Some(pooling) = &mut self.pooling else { return false };
        match pooling.pool.take(&pooling.settings) {
            Taken::Now(server) => {
                if server.is_ready_for(&pooling.settings) {
                    self.adopt_lent(*server);
                    return true;
                }
                pooling.unready = Some(server);
            }
            Taken::Queued(waiting) => pooling.waiting = Some(waiting),
        }
        false
    }

    /// Waits for a turn, and makes the connection ready.
    pub(super) async fn wait_for_server(&mut self) -> Result<(), io::Error> {
        for _ in 0..READY_ATTEMPTS {
            let Some(pooling) = &mut self.pooling else { return Ok(()) };
            let mut server = match pooling.unready.take() {
                Some(server) => *server,
                None => {
                    if pooling.waiting.is_none() && self.borrow() {
                        return Ok(());
                    }
                    if self.pooling.as_ref().is_some_and(|pooling| pooling.unready.is_some()) {
                        continue;
                    }
                    match self.queue().await? {
                        Some(server) => server,
                        None => return Ok(()),
                    }
                }
            };
            let Some(pooling) = &self.pooling else { return Ok(()) };
            let (pool, settings) = (pooling.pool.clone(), pooling.settings.clone());
            server = server.here()?;
            match bring(&mut server, &settings).await {
                Ok(()) => {
                    self.adopt_lent(server);
                    return Ok(());
                }
                Err(Some(body)) => {
                    pool.close(server);
                    let ErrorFields { code, message, .. } = ErrorFields::parse(&body);
                    let message = format!("understudy cannot restore the settings of this session on another server connection: {message}");
                    return self.say_last(&code, &message, None);
                }
                Err(None) => pool.close(server),
            }
        }
        let error = PoolError::Broken;
        self.say_last(error.code(), &error.to_string(), error.hint())
    }

    /// In the queue. `None`: given up; the cycle at the front has been refused.
    async fn queue(&mut self) -> Result<Option<Server>, io::Error> {
        let Some(pooling) = &mut self.pooling else { return Ok(None) };
        let (pool, Some(mut waiting)) = (pooling.pool.clone(), pooling.waiting.take()) else { return Ok(None) };
        let deadline = waiting.since + self.database.pool.load().queue_timeout;
        let cancelled = Arc::new(Notify::new());
        self.aim_cancel(CancelTarget::Queue(cancelled.clone()));
        self.info.state.store(state::WAITING, Ordering::Relaxed);
        if self.bounds.watched {
            self.beat(true); // it waits for us, not we for it
        }
        let result = loop {
            let wanted = Wanted {
                client: !self.client_gone && !self.client_ended && self.from_client.len() < 2 * super::relay::WAITING_BYTES_MAX,
                server: false,
            };
            let closing = self.door.is_closing();
            tokio::select! {
                biased;
                answer = waiting.server() => break match answer {
                    Ok(server) => Ok(Some(server)),
                    Err(error) => {
                        let hint = error.hint();
                        put_error(&mut self.to_client, "FATAL", error.code(), &error.to_string(), hint);
                        Err(io::Error::other(error))
                    }
                },
                () = cancelled.notified() => {
                    self.refuse("57014", "canceling statement due to user request", None);
                    break Ok(None);
                }
                () = tokio::time::sleep_until(deadline.into()) => {
                    let error = pool.timed_out();
                    self.refuse(error.code(), &error.to_string(), error.hint());
                    break Ok(None);
                }
                () = poll_fn(|context| self.poll_sockets(wanted, context)) => {}
                () = tokio::time::sleep(DRAIN_LOOK), if closing => {}
            }
            if self.client_gone {
                break Err(io::ErrorKind::ConnectionReset.into());
            }
            if self.info.mailbox.take() {
                Box::pin(self.read_news()).await;
                if self.info.mailbox.is_terminated() {
                    break self.say_goodbye(&TERMINATED).map(|()| None);
                }
            }
            if self.door.is_closing() {
                break self.say_goodbye(&CLOSING).map(|()| None);
            }
            if self.database.gate.is_closed() {
                break Ok(None); // waits before the gate, and then anew
            }
        };
        self.aim_cancel(CancelTarget::Nobody);
        self.info.state.store(state::IDLE, Ordering::Relaxed);
        result
    }

    /// The cycle at the front gets this instead of an answer.
    fn refuse(&mut self, code: &str, message: &str, hint: Option<&str>) {
        put_error(&mut self.to_client, "ERROR", code, message, hint);
        if let Some(pooling) = &mut self.pooling {
            pooling.refusing = true;
        }
    }

    /// Skips what the client sends up to the end of the refused cycle. False: its end has not come yet.
    pub(super) fn refuse_cycle(&mut self) -> Result<bool, io::Error> {
        loop {
            let part = self.client_skip.min(self.from_client.len());
            self.client_skip -= part;
            drop_front(&mut self.from_client, part);
            let header = match wire::peek(&self.from_client) {
                Ok(Some(header)) if self.client_skip == 0 => header,
                Ok(_) => return Ok(false),
                Err(error) => {
                    put_error(&mut self.to_client, "FATAL", "08P01", &error.to_string(), None);
                    return Err(io::Error::new(io::ErrorKind::InvalidData, error));
                }
            };
            let ends = matches!(header.tag, b'Q' | b'F' | b'S');
            if ends {
                put(&mut self.to_client, b'Z', |b| b.extend_from_slice(b"I"));
            }
            if (ends || header.tag == b'X')
                && let Some(pooling) = &mut self.pooling
            {
                pooling.refusing = false;
            }
            if header.tag == b'X' {
                return Ok(true);
            }
            self.client_skip = header.len;
            if ends {
                return Ok(true);
            }
        }
    }

    /// From now on this connection is the session's.
    fn adopt_lent(&mut self, mut server: Server) {
        let Some(pooling) = &mut self.pooling else { return };
        let Some(pooled) = &mut server.pooled else { return };
        let same = pooling.last.as_ref().is_some_and(|last| Arc::ptr_eq(last, &server.backend));
        if !same || pooled.used_by != self.info.id {
            self.conversation.generation += 1; // another's unnamed statement, or none
            pooled.used_by = self.info.id;
            pooling.last = Some(server.backend.clone());
        }
        self.conversation.known = Some(std::mem::take(&mut pooled.known));
        self.conversation.salt = pooling.settings.salt();
        if server.parameters.hash() != pooling.told.hash() {
            for (name, value) in server.parameters.differing(&pooling.told) {
                put(&mut self.to_client, b'S', |b| {
                    put_cstr(b, name);
                    put_cstr(b, value);
                });
            }
            pooling.told = Arc::new(server.parameters.clone());
        }
        pooling.just_borrowed = true;
        (self.server_gone, self.server_skip) = (false, 0);
        self.info.epoch.store(server.epoch, Ordering::SeqCst);
        self.info.state.store(state::ACTIVE, Ordering::Relaxed);
        *self.cancel.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = CancelTarget::Server(server.backend.clone());
        self.server = Some(server);
    }

    /// A transaction has begun: its first cycle is kept while it may have to be sent again.
    pub(super) fn keep_for_again(&mut self) {
        let Some(pooling) = &mut self.pooling else { return };
        pooling.just_borrowed = false;
        pooling.again.clear();
        if let Some(len) = binds_known(&self.from_client, &self.conversation) {
            pooling.again.extend_from_slice(self.from_client.get(..len).unwrap_or_default());
        }
    }

    /// The cycle at the front has been answered: another one's error must not send it again.
    #[inline]
    pub(super) fn forget_again(&mut self) {
        if let Some(pooling) = &mut self.pooling {
            pooling.again.clear();
        }
    }

    /// An error of the server, `run` bytes behind the front of its buffer. True: it was kept back, because its cause is that the
    /// connection is not what the client takes it for; the cycle begins again when the server is ready.
    pub(super) fn begins_again(&mut self, run: usize, header: Header) -> bool {
        let Some(body) = self.server.as_ref().and_then(|server| server.from.get(run + 5..run + header.len)) else { return false };
        // columns that are others than the client knows of, it must be told of: by the Describe that it sends, or by this error
        let (stale, may_repeat) = match field(body, b'C') {
            Some(b"26000") => (true, true),
            Some(b"0A000") => {
                let told = self.pooling.as_ref().is_some_and(|pooling| describes_portal(&pooling.again));
                (field(body, b'R') == Some(b"RevalidateCachedQuery"), told)
            }
            _ => (false, false),
        };
        if !stale {
            return false;
        }
        if let Some(known) = &mut self.conversation.known {
            known.clear(); // prepared anew when they are used next
        }
        let Some(pooling) = self.pooling.as_mut().filter(|pooling| may_repeat && !pooling.again.is_empty()) else { return false };
        if !self.conversation.is_unanswered() || self.conversation.status() != TransactionStatus::Idle {
            return false;
        }
        pooling.begins_again = true;
        self.forward_server(run);
        self.drop_from_server(header.len);
        true
    }

    /// An error of the server, `run` bytes behind the front of its buffer. True: it spoke of a statement by our name, and now
    /// stands there with the client's.
    pub(super) fn renames(&mut self, run: usize, header: Header) -> bool {
        let Some(server) = &mut self.server else { return false };
        let Some(body) = server.from.get(run + 5..run + header.len) else { return false };
        let Some((ours, client)) = self.conversation.named_in(body) else { return false };
        let Some(at) = memmem(body, &ours).filter(|_| memmem(&client, &ours).is_none()) else { return false };
        let (before, after) = (body.get(..at).unwrap_or_default(), body.get(at + ours.len()..).unwrap_or_default());
        let mut message = BytesMut::new();
        put(&mut message, b'E', |b| [before, &client, after].into_iter().for_each(|part| b.extend_from_slice(part)));
        let rest = server.from.split_off(run);
        server.from.extend_from_slice(&message);
        server.from.extend_from_slice(rest.get(header.len..).unwrap_or_default());
        true
    }

    /// ReadyForQuery, `run` bytes behind the front of the server's buffer. True: it belongs to an error that was kept back.
    pub(super) fn goes_on(&mut self, run: usize, header: Header) -> bool {
        let Some(pooling) = self.pooling.as_mut().filter(|pooling| pooling.begins_again) else { return false };
        (pooling.begins_again, pooling.go_on) = (false, true);
        let mut again = std::mem::take(&mut pooling.again);
        again.extend_from_slice(&self.from_client);
        self.from_client = again;
        self.conversation.forget_only_cycle();
        self.forward_server(run);
        self.drop_from_server(header.len);
        true
    }

    /// Whether there is something to be sent again.
    #[inline]
    pub(super) fn takes_go_on(&mut self) -> bool {
        self.pooling.as_mut().is_some_and(|pooling| std::mem::take(&mut pooling.go_on))
    }

    /// Between two transactions, everything answered, nothing under way.
    fn is_quiet(&self) -> bool {
        self.conversation.at_boundary()
            && !self.entry.inside
            && self.to_server.is_empty()
            && self.client_skip == 0
            && self.server_skip == 0
            && !self.server_gone
    }

    fn is_pinned(&self) -> bool {
        self.conversation.pins.iter().any(|pin| *pin != pin::SETTINGS)
    }

    /// The connection may go to another session, or must be asked whether it may.
    #[inline]
    pub(super) fn is_done_with_server(&self) -> bool {
        self.server.as_ref().is_some_and(|server| server.from.is_empty())
            && self.is_quiet()
            && (!self.conversation.touched.is_empty() || !self.is_pinned())
    }

    /// Returns the connection, if that can be done at once.
    pub(super) fn return_server(&mut self) -> bool {
        let leaves_nothing = |conversation: &Conversation| {
            conversation.touched.is_empty() && conversation.known.as_ref().is_some_and(|known| known.leftovers.is_empty())
        };
        if !leaves_nothing(&self.conversation) {
            return false;
        }
        let Some(pooling) = &mut self.pooling else { return false };
        pooling.again.clear();
        super::sockets::give_back(&mut pooling.again);
        pooling.just_borrowed = false;
        *self.cancel.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = CancelTarget::Nobody;
        if self.server.as_ref().is_some_and(|server| self.door.is_being_cancelled(&server.backend)) {
            return false;
        }
        self.put_back();
        true
    }

    /// Hands the connection back as it is.
    fn put_back(&mut self) {
        let (Some(pooling), Some(mut server)) = (&mut self.pooling, self.server.take()) else { return };
        if server.parameters.hash() != pooling.told.hash() {
            pooling.told = Arc::new(server.parameters.clone()); // they have been forwarded
        }
        if let (Some(pooled), Some(known)) = (&mut server.pooled, self.conversation.known.take()) {
            pooled.known = known;
        }
        self.info.state.store(state::IDLE, Ordering::Relaxed);
        pooling.pool.put(server);
    }

    /// Asks the connection what the transaction has left on it, and returns it unless that pins the session.
    pub(super) async fn settle(&mut self) -> Result<(), io::Error> {
        let Some(mut server) = self.server.take() else { return Ok(()) };
        self.aim_cancel(CancelTarget::Nobody);
        self.door.cancels_settled(&server.backend).await; // or one of the client's would hit our own question
        let asked = self.ask_what_is_left(&mut server).await;
        self.to_client.extend_from_slice(&std::mem::take(&mut server.heard));
        let backend = server.backend.clone();
        self.server = Some(server);
        *self.info.pins.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = self.conversation.pins.clone();
        if asked.is_none() {
            self.server_gone = true;
            return self.say_last("08006", "the connection to the server broke before this session's settings could be read", None);
        }
        if self.is_pinned() {
            self.info.state.store(state::PINNED, Ordering::Relaxed);
            self.aim_cancel(CancelTarget::Server(backend));
        } else {
            self.put_back();
        }
        Ok(())
    }

    /// `None`: the connection is broken.
    async fn ask_what_is_left(&mut self, server: &mut Server) -> Option<()> {
        let leftovers = self.conversation.known.as_mut().map(|known| std::mem::take(&mut known.leftovers)).unwrap_or_default();
        if !leftovers.is_empty() && matches!(server.exchange(&Conversation::closing_request(&leftovers)).await, Err(None)) {
            return None;
        }
        let touched = std::mem::take(&mut self.conversation.touched);
        if touched.is_empty() {
            return Some(());
        }
        let text = question(&touched, &self.conversation.custom_names(), &self.info.user);
        let rows = match server.run(&text).await {
            Ok(rows) => rows,
            Err(None) => return None,
            Err(Some(_)) => {
                // its own statement_timeout, perhaps: what is not known exactly stays where it is
                self.conversation.pin(pin::OTHER);
                return Some(());
            }
        };
        let (pooling, pooled) = (self.pooling.as_mut()?, server.pooled.as_mut()?);
        let answer = Answer::read(rows);
        if answer.unreadable {
            self.conversation.pin(pin::OTHER);
        }
        if touched.all {
            pooling.settings = pooling.pool.intern(answer.settings.over(&pooling.startup));
            pooled.settings = pooling.pool.intern(answer.settings);
        } else if !touched.names.is_empty() {
            let mut settings = (*pooled.settings).clone();
            for name in &touched.names {
                match answer.settings.get(name) {
                    Some(value) => settings.set(name, value),
                    None => settings.remove(name),
                }
            }
            pooled.settings = pooling.pool.intern(settings);
            pooling.settings = pooled.settings.clone();
        }
        self.conversation.salt = pooling.settings.salt();
        let changed = pooling.settings != pooling.startup;
        self.conversation.settle_pins(touched.pins.then_some(answer.pins), changed);
        Some(())
    }

    /// The owner has changed while the session has a connection to the one before, between two transactions.
    pub(super) async fn move_pooled(&mut self) -> Result<(), io::Error> {
        if !self.is_pinned() {
            self.put_back(); // which closes it
            return Ok(());
        }
        let route = self.route();
        let Some(server) = &mut self.server else { return Ok(()) };
        if *server.backend.target == *route.owner && !self.info.immovable().is_empty() {
            // RECONNECT: what cannot be carried over is worth more than a new connection
            server.epoch = route.epoch;
            self.info.epoch.store(route.epoch, Ordering::SeqCst);
            return Ok(());
        }
        let channels = server.run("SELECT * FROM pg_catalog.pg_listening_channels()").await;
        let prepared = server.run("SELECT statement FROM pg_catalog.pg_prepared_statements WHERE from_sql").await;
        self.to_client.extend_from_slice(&std::mem::take(&mut server.heard));
        let (Ok(channels), Ok(prepared)) = (channels, prepared) else {
            tracing::error!(session = self.info.id, "the old owner closed this session before its state could be read");
            return self.say_goodbye(&TERMINATED);
        };
        if let Some(mut old) = self.server.take() {
            if let Some(pooled) = &mut old.pooled {
                pooled.give_up_slot();
            }
            tokio::spawn(old.terminate());
        }
        self.conversation.known = None;
        if !self.borrow() {
            self.wait_for_server().await?;
        }
        let Some(server) = &mut self.server else {
            return self.say_last("08006", "understudy moved this database and found no connection to the new server in time", None);
        };
        let listen = channels.iter().flatten().flatten().map(|channel| format!("LISTEN \"{}\"; ", channel.replace('"', "\"\"")));
        let mut failed = server.run(&listen.collect::<String>()).await.is_err();
        for statement in prepared.iter().flatten().flatten() {
            failed |= matches!(server.run(statement).await, Err(None));
        }
        self.to_client.extend_from_slice(&std::mem::take(&mut server.heard));
        if failed {
            return self.say_last("08006", "the connection to the new server broke", None);
        }
        if let Some(pooling) = &mut self.pooling {
            pooling.just_borrowed = false;
        }
        self.info.state.store(state::PINNED, Ordering::Relaxed);
        Ok(())
    }

    /// The session is over: what becomes of the connection it has.
    pub(super) async fn part_with_server(&mut self) {
        if let Some(pooling) = &mut self.pooling {
            (pooling.waiting, pooling.unready) = (None, None);
        }
        let quiet = self.is_quiet() && self.server.as_ref().is_some_and(|server| server.from.is_empty());
        if quiet && self.pooling.is_some() && !self.is_pinned() && self.return_server() {
            return;
        }
        self.aim_cancel(CancelTarget::Nobody);
        let Some(mut server) = self.server.take() else { return };
        if let (Some(pooled), Some(known)) = (&mut server.pooled, self.conversation.known.take()) {
            pooled.known = known; // what it may hold at most is in there
        }
        let Some(pool) = server.pooled.as_ref().and_then(|pooled| pooled.pool()) else {
            if !self.server_gone {
                server.terminate().await;
            }
            return;
        };
        let owes = self.conversation.is_mid_cycle() || !self.to_server.is_empty() || self.client_skip > 0 || self.server_skip > 0;
        if self.server_gone || server.epoch != self.database.epoch() {
            return pool.close(server);
        }
        let (door, in_transaction) = (self.door.clone(), self.conversation.status() != TransactionStatus::Idle);
        let reset = self.database.pool.load().reset_query.clone();
        door.threads.background().clone().spawn(async move {
            if owes || !server.from.is_empty() {
                // half a message, or a statement whose answer nobody reads
                let backend = server.backend.clone();
                pool.close(server);
                let _ = tokio::time::timeout(CANCEL_TIMEOUT, backend::cancel(&backend.target.url, backend.pid, &backend.key)).await;
                return;
            }
            door.cancels_settled(&server.backend).await;
            let Ok(mut server) = server.here() else { return };
            let renew = async {
                if in_transaction {
                    server.run("ROLLBACK").await?;
                }
                server.run(&reset).await
            };
            match tokio::time::timeout(RESET_TIMEOUT, renew).await {
                Ok(Ok(_)) => {
                    if let Some(pooled) = &mut server.pooled {
                        pooled.known.clear();
                        pooled.settings = pool.intern(Settings::default());
                    }
                    pool.put(server);
                }
                Ok(Err(_)) | Err(_) => pool.close(server),
            }
        });
    }
}

/// A field of an ErrorResponse.
fn field(mut body: &[u8], kind: u8) -> Option<&[u8]> {
    loop {
        let (found, rest) = body.split_first()?;
        body = rest;
        let text = take_cstr(&mut body)?;
        if *found == kind {
            return Some(text);
        }
    }
}

/// The length of the cycle at the front, if it is whole, short, and begins with a Bind or Describe of a statement that the
/// connection is believed to have.
fn binds_known(buffer: &[u8], conversation: &Conversation) -> Option<usize> {
    let header = wire::peek(buffer).ok()??;
    let mut body = buffer.get(5..header.len)?;
    match header.tag {
        b'B' => {
            take_cstr(&mut body)?;
        }
        b'D' if body.first() == Some(&b'S') => body = body.get(1..)?,
        _ => return None,
    }
    let name = take_cstr(&mut body).filter(|name| !name.is_empty())?;
    conversation.statement(name)?.key?;
    let mut at = 0;
    while at < AGAIN_BYTES_MAX {
        let header = wire::peek(buffer.get(at..)?).ok()??;
        at += header.len;
        match header.tag {
            b'S' => return Some(at).filter(|at| *at <= AGAIN_BYTES_MAX && *at <= buffer.len()),
            b'B' | b'D' | b'E' | b'P' | b'C' | b'H' => {}
            _ => return None,
        }
    }
    None
}

/// A whole cycle asks for the columns of what it has bound.
fn describes_portal(mut cycle: &[u8]) -> bool {
    while let Ok(Some(header)) = wire::peek(cycle) {
        if header.tag == b'D' && cycle.get(5) == Some(&b'P') {
            return true;
        }
        cycle = cycle.get(header.len..).unwrap_or_default();
    }
    false
}

/// What must be asked after a transaction.
fn question(touched: &Touched, custom: &[String], user: &str) -> String {
    let mut parts = Vec::new();
    let one = |name: &str| format!("SELECT 's', {0}, pg_catalog.current_setting({0}, true)", literal(name));
    if touched.all {
        parts.push(
            "SELECT 's', name, pg_catalog.current_setting(name) FROM pg_catalog.pg_settings \
             WHERE source = 'session' AND context IN ('user', 'superuser')"
                .to_owned(),
        );
        parts.push("SELECT 's', 'role', pg_catalog.current_setting('role')".to_owned());
        parts.push(format!("SELECT 's', 'session_authorization', session_user::text WHERE session_user <> {}", literal(user)));
        parts.extend(custom.iter().map(|name| one(name)));
    } else {
        parts.extend(touched.names.iter().map(|name| one(name)));
    }
    if touched.pins {
        for (what, from) in [
            (pin::LISTEN, "pg_catalog.pg_listening_channels()"),
            (pin::HELD_CURSOR, "pg_catalog.pg_cursors WHERE is_holdable"),
            (pin::SQL_PREPARE, "pg_catalog.pg_prepared_statements WHERE from_sql"),
            (pin::ADVISORY_LOCK, "pg_catalog.pg_locks WHERE locktype = 'advisory' AND pid = pg_catalog.pg_backend_pid()"),
            (pin::TEMPORARY_TABLE, "pg_catalog.pg_class WHERE relnamespace = pg_catalog.pg_my_temp_schema()"),
            (pin::TEMPORARY_TABLE, "pg_catalog.pg_proc WHERE pronamespace = pg_catalog.pg_my_temp_schema()"),
            (pin::TEMPORARY_TABLE, "pg_catalog.pg_type WHERE typnamespace = pg_catalog.pg_my_temp_schema()"),
        ] {
            let from = match from.strip_suffix("pg_catalog.pg_my_temp_schema()") {
                // without such a schema the catalog need not be read
                Some(_) => format!("{from} AND pg_catalog.pg_my_temp_schema() <> 0"),
                None => from.to_owned(),
            };
            parts.push(format!("SELECT 'p', '{what}', NULL WHERE EXISTS (SELECT FROM {from})"));
        }
    }
    parts.join(" UNION ALL ")
}

/// What the server said.
#[derive(Default)]
struct Answer {
    settings: Settings,
    pins: Vec<&'static str>,
    /// A value came in an encoding that is not ours.
    unreadable: bool,
}

impl Answer {
    fn read(rows: Vec<Vec<Option<String>>>) -> Self {
        let mut answer = Answer::default();
        for row in rows {
            match &row[..] {
                [Some(kind), Some(name), Some(value)] if kind == "s" => {
                    answer.unreadable |= value.contains('\u{fffd}');
                    if !(name == "role" && value == "none") {
                        answer.settings.set(name, value);
                    }
                }
                [Some(kind), Some(name), _] if kind == "p" => {
                    let known = [pin::LISTEN, pin::HELD_CURSOR, pin::SQL_PREPARE, pin::ADVISORY_LOCK, pin::TEMPORARY_TABLE];
                    let found = known.into_iter().find(|pin| pin == name).unwrap_or(pin::OTHER);
                    if !answer.pins.contains(&found) {
                        answer.pins.push(found);
                    }
                }
                _ => {}
            }
        }
        answer
    }
}

/// The parameters that decide what a session's settings are at its start.
pub(super) fn of_session(parameters: &[(Bytes, Bytes)]) -> Vec<(Bytes, Bytes)> {
    let own = |name: &Bytes| [&b"user"[..], b"database", b"replication"].contains(&&name[..]) || name.starts_with(b"_pq_.");
    parameters.iter().filter(|(name, _)| !own(name)).cloned().collect()
}

/// Waits for a connection that is to be a session's own, for as long as the queue allows.
pub(super) async fn whole_session(pool: &Arc<Pool>, startup: Vec<(Bytes, Bytes)>) -> Result<Server, PoolError> {
    let server = match pool.take_for_session(startup) {
        Taken::Now(server) => *server,
        Taken::Queued(mut waiting) => {
            let deadline = Instant::now() + pool.database.pool.load().queue_timeout;
            match tokio::time::timeout_at(deadline.into(), waiting.server()).await {
                Ok(server) => server?,
                Err(_) => return Err(pool.timed_out()),
            }
        }
    };
    server.here().map_err(|_| PoolError::Broken)
}
