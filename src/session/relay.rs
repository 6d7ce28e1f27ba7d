//! The relay: moves bytes both ways, never blocks one direction on the other, and keeps the [`Conversation`] informed.

use super::{
    conversation::{Conversation, Forward, FromServer},
    front_door::{CancelTarget, FrontDoor},
    limits::{Bounds, Farewell, LENGTH, TOO_LONG, TOO_MUCH},
    moving::Attachments,
    observing::Remembered,
    pooled::Pooling,
    sockets::{Wanted, give_back},
};
use crate::{
    net::Stream,
    pool::Server,
    sql::{Later, LookUp},
    traffic::{
        cancelling::Place,
        copies::Identity,
        database::{Database, SessionInfo},
        fence::Needed,
        route::{Evenly, Route, ShadowRoute},
    },
    wire::{self, WireError, backend::put_error},
};
use bytes::{Buf, BytesMut};
use std::{
    borrow::Cow,
    future::poll_fn,
    io,
    sync::{Arc, Mutex, atomic::Ordering},
    task::Waker,
    time::{Duration, Instant},
};

/// Messages of a client up to this size are looked at whole; larger ones are streamed through unclassified.
const INSPECT_BYTES_MAX: usize = 256 << 10;
/// Of a message that is streamed through, this much must have come first: the names in it are shorter.
const LARGE_START_BYTES: usize = 1 << 10;
/// Bytes waiting for one side that stop reading from the other.
pub(super) const WAITING_BYTES_MAX: usize = 256 << 10;
/// How often a session looks whether it may end, while the front door closes.
pub(super) const DRAIN_LOOK: Duration = Duration::from_millis(50);
/// How long after `close` a session inside a transaction may go on.
const DRAIN_GRACE: Duration = Duration::from_secs(30);
/// How long a client may go on sending after what it was refused.
const LINGER: Duration = Duration::from_secs(10);

pub(super) static TERMINATED: Farewell =
    Farewell { code: "57P01", message: Cow::Borrowed("terminating connection due to administrator command"), hint: None };
pub(super) static CLOSING: Farewell = Farewell { code: "57P01", message: Cow::Borrowed("understudy is shutting down"), hint: None };

/// One session.
pub(super) struct Relay {
    pub door: Arc<FrontDoor>,
    pub database: Arc<Database>,
    pub info: Arc<SessionInfo>,
    pub identity: Arc<Identity>,
    pub client: Stream,
    pub from_client: BytesMut,
    pub to_client: BytesMut,
    /// `None`: none is lent to this session now.
    pub server: Option<Server>,
    /// How server connections are borrowed; `None`: the session has one of its own.
    pub pooling: Option<Box<Pooling>>,
    pub to_server: BytesMut,
    pub conversation: Conversation,
    pub attachments: Attachments,
    pub needed: Needed,
    pub cancel: Arc<Mutex<CancelTarget>>,
    /// The read at the front of `from_client` failed on this shadow: the owner answers it, and tells whose fault it was.
    pub fallback_of: Option<Arc<ShadowRoute>>,
    /// False: the cycle at the front is for the owner, whatever the draw says.
    pub serve_next: bool,
    /// Grows when session state changed that a standby would have to be told.
    pub state_version: u64,
    route: Arc<Route>,
    /// The waker that the mailbox has.
    pub registered: Option<Waker>,
    pub(super) entry: Entry,
    pub client_skip: usize,
    pub server_skip: usize,
    /// Nothing more comes from the client; it may still read what it has asked for.
    pub client_ended: bool,
    /// Nothing can be sent to the client any more.
    pub client_gone: bool,
    /// The client's last read filled its buffer.
    pub client_bulk: bool,
    /// Reads that brought bytes of the client.
    pub client_reads: u64,
    pub bounds: Bounds,
    /// The client is told this and the session ends, once what it asked for before is answered.
    farewell: Option<Farewell>,
    /// The client may still be sending what was refused.
    lingers: bool,
    pub server_gone: bool,
    pub remembered: Option<Remembered>,
    /// Shadows that drew the read being captured, and how often each runs it.
    pub drawn: super::observing::Drawn,
    /// The READ ONLY transaction that is being copied.
    pub reading: Option<super::observing::Reading>,
    /// The running transaction has changed the schema.
    pub schema_changed: bool,
    closing_since: Option<Instant>,
    /// Decides which reads are served.
    pub serve_draw: Evenly,
    /// Decides which are copied.
    pub sample_draw: Evenly,
}

/// What the client's side needs next.
pub(super) enum Next {
    /// Sockets.
    Io,
    /// The gate is closed.
    Held,
    /// The owner has changed.
    Move,
    /// A transaction begins, and needs a server connection.
    Borrow,
    /// The read at the front may be answered by this shadow.
    Serve(Box<super::serving::Plan>),
    /// The message at the front is being parsed.
    Classify(Later),
    /// The client said goodbye.
    End,
}

/// A transaction's place behind the gate, given back even if the session's task panics: a cutover would wait for it for ever.
pub(super) struct Entry {
    database: Arc<Database>,
    pub inside: bool,
}

impl Entry {
    fn leave(&mut self) {
        if std::mem::take(&mut self.inside) {
            self.database.gate.leave();
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.leave();
    }
}

impl Relay {
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        door: Arc<FrontDoor>,
        database: Arc<Database>,
        info: Arc<SessionInfo>,
        identity: Arc<Identity>,
        client: Stream,
        from_client: BytesMut,
        server: Option<Server>,
        pooling: Option<Box<Pooling>>,
        cancel: Arc<Mutex<CancelTarget>>,
    ) -> Self {
        let (serve_draw, sample_draw) = (Evenly::new(info.id, 0), Evenly::new(info.id, 1));
        Relay {
            route: database.route.load_full(),
            registered: None,
            attachments: Attachments::new(door.threads.background().clone()),
            entry: Entry { database: database.clone(), inside: false },
            door,
            database,
            info,
            identity,
            client,
            from_client,
            to_client: BytesMut::new(),
            server,
            pooling,
            to_server: BytesMut::new(),
            conversation: Conversation::default(),
            needed: Needed::default(),
            cancel,
            fallback_of: None,
            serve_next: true,
            state_version: 0,
            client_skip: 0,
            server_skip: 0,
            client_ended: false,
            client_gone: false,
            client_bulk: false,
            client_reads: 0,
            bounds: Bounds::default(),
            farewell: None,
            lingers: false,
            server_gone: false,
            remembered: None,
            drawn: Vec::new(),
            reading: None,
            schema_changed: false,
            closing_since: None,
            serve_draw,
            sample_draw,
        }
    }

    /// Until one side ends, on the runtime that this is called on.
    pub async fn run(mut self: Box<Self>) {
        let from_server = self.server.as_mut().map(|server| &mut server.from);
        for buffer in [Some(&mut self.from_client), from_server].into_iter().flatten().filter(|buffer| buffer.is_empty()) {
            *buffer = BytesMut::new(); // what the log-in read into; from here on buffers are lent
        }
        match (self.client.rebind(), self.server.take().map(Server::here).transpose()) {
            (Ok(client), Ok(server)) => (self.client, self.server) = (client, server),
            (Err(error), _) | (_, Err(error)) => {
                return tracing::error!(session = self.info.id, %error, "cannot move a session to its thread");
            }
        }
        let result = self.relay().await;
        self.entry.leave();
        if let Err(error) = result {
            tracing::debug!(session = self.info.id, %error, "session ended");
        }
        // what the server said last (a FATAL) still belongs to the client
        if !self.to_client.is_empty() && !self.client_gone {
            let bytes = std::mem::take(&mut self.to_client);
            let _ = tokio::time::timeout(Duration::from_secs(5), tokio::io::AsyncWriteExt::write_all(&mut self.client, &bytes)).await;
        }
        self.part_with_server().await;
        if self.lingers && !self.client_gone {
            let _ = tokio::time::timeout(LINGER, self.read_to_the_end()).await;
        }
    }

    /// Closing a socket with bytes unread resets the connection, and with it goes the error that the client has not read yet (RFC 9293,
    /// 3.6.1): what it still sends is thrown away until it has seen our end.
    async fn read_to_the_end(&mut self) -> io::Result<()> {
        self.from_client = BytesMut::with_capacity(16 << 10);
        tokio::io::AsyncWriteExt::shutdown(&mut self.client).await?;
        while tokio::io::AsyncReadExt::read_buf(&mut self.client, &mut self.from_client).await? > 0 {
            self.from_client.clear();
        }
        Ok(())
    }

    async fn relay(&mut self) -> Result<(), io::Error> {
        self.take_limits(false);
        self.follow_route();
        loop {
            let held = match self.next_of_client()? {
                Next::Io => false,
                Next::Held => true,
                Next::End => {
                    self.flush_server().await;
                    return Ok(());
                }
                Next::Borrow => {
                    self.try_write();
                    if !self.borrow() {
                        Box::pin(self.wait_for_server()).await?;
                    }
                    continue;
                }
                Next::Move => {
                    if !self.to_server.is_empty() {
                        self.flush_server().await;
                    }
                    self.move_to_owner().await?;
                    continue;
                }
                Next::Classify(later) => {
                    self.try_write();
                    self.conversation.class_ahead = Some(later.wait().await);
                    continue;
                }
                Next::Serve(plan) => {
                    Box::pin(self.serve(*plan)).await?;
                    self.try_write(); // the answer goes out before the next read is looked at
                    continue;
                }
            };
            self.take_from_server()?;
            self.try_write();
            if self.takes_go_on() {
                continue;
            }
            if self.pooling.is_some() && self.is_done_with_server() {
                if !self.return_server() {
                    Box::pin(self.settle()).await?;
                }
                if !self.from_client.is_empty() {
                    continue; // the next transaction has come already
                }
            }
            if self.client_gone {
                self.to_client.clear(); // or the server, not read from, would never take what is left for it
            }
            if self.server_gone && self.to_client.is_empty() {
                return Ok(());
            }
            let left = self.client_ended && !held && self.to_client.is_empty() && !self.conversation.owes_answers();
            if (self.client_gone || left) && self.to_server.is_empty() {
                return match self.farewell.take() {
                    Some(farewell) => self.say_goodbye(&farewell),
                    None => Ok(()),
                };
            }
            self.wait(held).await?;
        }
    }

    /// Waits for whatever can happen next and takes the bytes that came.
    async fn wait(&mut self, held: bool) -> Result<(), io::Error> {
        let wanted = Wanted {
            client: !self.client_gone
                && !self.client_ended
                && !held
                && self.to_server.len() < WAITING_BYTES_MAX
                && self.from_client.len() < 2 * INSPECT_BYTES_MAX,
            server: !self.server_gone && self.to_client.len() < WAITING_BYTES_MAX,
        };
        if self.bounds.watched {
            self.beat(held);
        }
        if held || self.door.is_closing() {
            if held {
                self.info.cancelling.begin(Place::Gate);
            }
            Box::pin(self.wait_for_more(wanted, held)).await;
            if held && self.info.cancelling.end() {
                self.cancel_front();
            }
        } else {
            poll_fn(|context| self.poll_sockets(wanted, context)).await;
        }
        if self.info.mailbox.take() {
            Box::pin(self.read_news()).await;
            if self.info.mailbox.is_terminated() {
                return self.say_goodbye(&TERMINATED);
            }
            self.end_if_overdue()?;
            self.take_limits(true);
        }
        if self.door.is_closing() {
            let since = *self.closing_since.get_or_insert_with(Instant::now);
            if self.conversation.at_boundary() || since.elapsed() > DRAIN_GRACE {
                return self.say_goodbye(&CLOSING);
            }
        }
        Ok(())
    }

    /// Waits for the sockets and for what is rare.
    async fn wait_for_more(&mut self, wanted: Wanted, held: bool) {
        let database = self.database.clone();
        let closing = self.door.is_closing();
        tokio::select! {
            biased;
            () = poll_fn(|context| self.poll_sockets(wanted, context)) => {}
            () = database.gate.wait_open(), if held => {}
            () = tokio::time::sleep(DRAIN_LOOK), if closing => {}
        }
    }

    /// The route may have changed.
    pub(super) async fn read_news(&mut self) {
        let route = self.database.route.load_full();
        if !Arc::ptr_eq(&route, &self.route) {
            self.route = route;
            self.follow_route();
            self.prepare_standby().await;
        }
    }

    /// Opens what the route will need, closes what it no longer names.
    fn follow_route(&mut self) {
        let own_standby = self.pooling.is_none();
        self.attachments.prepare(&self.database, &self.info, &self.identity, &self.route, own_standby);
        if let Some(pooling) = &self.pooling {
            pooling.pool.follow(&self.route);
            if self.server.is_none() {
                self.info.epoch.store(self.route.epoch, Ordering::SeqCst);
            }
        }
    }

    pub(super) fn say_goodbye(&mut self, farewell: &Farewell) -> Result<(), io::Error> {
        self.say_last(farewell.code, &farewell.message, farewell.hint)
    }

    /// Ends the session with an error.
    pub(super) fn say_last(&mut self, code: &str, message: &str, hint: Option<&str>) -> Result<(), io::Error> {
        if self.server_skip == 0 {
            put_error(&mut self.to_client, "FATAL", code, message, hint);
        } // else it would stand in the middle of a row
        Err(io::Error::new(io::ErrorKind::ConnectionAborted, message.to_owned()))
    }

    /// Nothing more is taken from the client. What it asked for before (`run` bytes) is still carried out and answered.
    fn refuse_rest(&mut self, run: usize, farewell: Farewell) -> Next {
        self.forward_client(run);
        self.from_client.clear();
        (self.client_ended, self.farewell, self.lingers) = (true, Some(farewell), true);
        Next::Io
    }

    /// Sends what waits, as far as the sockets take it.
    pub(super) fn try_write(&mut self) {
        if !self.to_client.is_empty() && !self.client_gone {
            match write_now(&self.to_client, |rest| self.client.try_write(rest)) {
                Ok(written) => drop_front(&mut self.to_client, written),
                Err(_) => self.client_gone = true,
            }
        }
        if let Some(server) = self.server.as_mut().filter(|_| !self.to_server.is_empty() && !self.server_gone) {
            match write_now(&self.to_server, |rest| server.stream.try_write(rest)) {
                Ok(written) => drop_front(&mut self.to_server, written),
                Err(_) => self.server_gone = true,
            }
        }
    }

    async fn flush_server(&mut self) {
        let bytes = std::mem::take(&mut self.to_server);
        let Some(server) = &mut self.server else { return };
        let _ = tokio::time::timeout(Duration::from_secs(5), tokio::io::AsyncWriteExt::write_all(&mut server.stream, &bytes)).await;
    }

    /// Takes whole messages of the client and appends what is to be forwarded.
    fn next_of_client(&mut self) -> Result<Next, io::Error> {
        let idle = self.client_skip == 0 && !self.entry.inside && self.conversation.at_boundary();
        if idle && self.is_elsewhere() {
            // also with nothing to forward: the old owner may end this connection at any moment
            return Ok(if self.database.gate.is_closed() { Next::Held } else { Next::Move });
        }
        if self.pooling.as_ref().is_some_and(|pooling| pooling.is_refusing()) && !self.refuse_cycle()? {
            return Ok(Next::Io);
        }
        if self.pooling.as_ref().is_some_and(|pooling| pooling.is_beginning_again()) {
            return Ok(Next::Io);
        }
        let mut run = 0; // contiguous bytes at the front of `from_client` that are forwarded as they are
        let next = loop {
            let rest = self.from_client.get(run..).unwrap_or_default();
            let available = rest.len();
            if self.client_skip > 0 {
                let part = self.client_skip.min(available);
                self.client_skip -= part;
                run += part;
                if self.client_skip > 0 {
                    break Next::Io;
                }
                continue;
            }
            let header = match wire::peek(rest) {
                Ok(Some(header)) => header,
                Ok(None) => break Next::Io,
                Err(WireError::Length(_) | WireError::Truncated(_)) => return Ok(self.refuse_rest(run, LENGTH.clone())),
            };
            if header.len > self.bounds.message_bytes_max {
                return Ok(self.refuse_rest(run, TOO_LONG.clone()));
            }
            if self.pooling.is_some()
                && let Some(farewell) = Farewell::to_unknown(header.tag)
            {
                return Ok(self.refuse_rest(run, farewell));
            }
            if self.conversation.is_full() && !matches!(header.tag, b'd' | b'c' | b'f') {
                break Next::Io; // the server answers first
            }
            if self.conversation.at_boundary() && !self.entry.inside {
                if header.tag == b'X' {
                    if self.pooling.is_none() {
                        run += header.len.min(available);
                    }
                    self.forward_client(run);
                    return Ok(Next::End);
                }
                if self.is_elsewhere() {
                    break if self.database.gate.is_closed() { Next::Held } else { Next::Move };
                }
                if run == 0
                    && self.serve_next
                    && !self.has_just_borrowed()
                    && self.to_client.len() < WAITING_BYTES_MAX // a pipeline of reads must not pile up answers
                    && !self.database.gate.is_closed()
                    && let Some(plan) = self.plan_to_serve()
                {
                    break Next::Serve(Box::new(plan));
                }
                let whole = available >= header.len || header.len > INSPECT_BYTES_MAX;
                if !whole {
                    break Next::Io;
                }
                if self.server.is_none() {
                    match self.before_borrowing(header) {
                        Some(next) => break next,
                        None => continue,
                    }
                }
                // What is left of a COPY that the server has given up begins nothing and is never answered.
                if !matches!(header.tag, b'd' | b'c' | b'f') {
                    if !self.enter() {
                        break Next::Held;
                    }
                    self.begin_transaction();
                    if self.pooling.is_some() && run == 0 {
                        self.keep_for_again();
                    }
                }
            }
            if available < header.len && (header.len > INSPECT_BYTES_MAX || header.tag == b'd') {
                let named = available >= LARGE_START_BYTES || header.len <= INSPECT_BYTES_MAX;
                if matches!(header.tag, b'P' | b'B') && !named {
                    break Next::Io; // the names stand at its start
                }
                let start = self.from_client.get(run + 5..run + available).unwrap_or_default();
                let Forward { before, instead } = self.conversation.large_message(header.tag, header.len, start);
                if let Some(before) = before {
                    self.forward_before(run, &before, instead);
                    run = 0;
                }
                self.client_skip = header.len - instead;
                continue;
            }
            let Some(body) = self.from_client.get(run + 5..run + header.len) else { break Next::Io };
            if header.tag == b'X' {
                // The server answers what came before, and then ends, whatever we think is owed; nothing of the client is
                // looked at behind it.
                self.client_ended = true;
                let goodbye = if self.pooling.is_none() { header.len } else { 0 }; // a pooled connection goes on
                self.forward_client(run + goodbye);
                self.from_client.clear();
                return Ok(Next::Io);
            }
            if self.conversation.class_ahead.is_none()
                && let Some(text) = Conversation::text_in(header.tag, body)
            {
                match self.database.classifier.look_up(text) {
                    LookUp::Known(class) => self.conversation.class_ahead = Some(class),
                    LookUp::Later(later) => {
                        self.forward_client(run);
                        return Ok(Next::Classify(later)); // the gate is not left: it has begun
                    }
                }
            }
            let forward = self.conversation.from_client(header.tag, body, &self.database.classifier);
            self.conversation.class_ahead = None;
            if self.conversation.memory.is_over {
                return Ok(self.refuse_rest(run, TOO_MUCH.clone()));
            }
            if matches!(header.tag, b'Q' | b'S') {
                if let Some(text) = self.conversation.take_schema_text() {
                    self.database.planned.offer(text);
                }
                self.maybe_sample();
            }
            if let Some(before) = forward.before {
                self.forward_before(run, &before, forward.instead);
                run = 0;
            }
            run += header.len - forward.instead;
        };
        self.forward_client(run);
        if self.conversation.at_boundary() {
            // what was forwarded is not answered (CopyData behind a failed COPY, a Flush): no ReadyForQuery will let us out
            self.leave();
        }
        Ok(next)
    }

    /// Sends the front of the client's buffer on: at once as far as the socket takes it.
    fn forward_client(&mut self, bytes: usize) {
        let bytes = bytes.min(self.from_client.len());
        let Some(server) = &mut self.server else {
            // between two transactions, with nothing that is answered
            return drop_front(&mut self.from_client, bytes);
        };
        if self.to_server.is_empty() && !self.server_gone {
            let run = self.from_client.get(..bytes).unwrap_or_default();
            match write_now(run, |rest| server.stream.try_write(rest)) {
                Ok(written) => put_off(&mut self.from_client, bytes, written, &mut self.to_server),
                Err(_) => self.server_gone = true,
            }
        } else {
            put_off(&mut self.from_client, bytes, 0, &mut self.to_server);
        }
    }

    /// Sends the front of the client's buffer on, and behind it bytes of ours, which stand for so many of the client's. All of it
    /// waits, so that it goes out at once with what follows.
    fn forward_before(&mut self, run: usize, before: &[u8], instead: usize) {
        let run = run.min(self.from_client.len());
        put_off(&mut self.from_client, run, 0, &mut self.to_server);
        self.to_server.extend_from_slice(before);
        drop_front(&mut self.from_client, instead);
    }

    /// The owner is another than that of the session's server.
    #[inline]
    fn is_elsewhere(&self) -> bool {
        self.server.as_ref().is_some_and(|server| server.epoch != self.database.epoch())
    }

    /// Enters the gate for a transaction.
    pub fn enter(&mut self) -> bool {
        if !self.entry.inside {
            self.entry.inside = self.database.gate.try_enter();
            // the owner may have changed between the look at the epoch and the entry
            if self.entry.inside && self.is_elsewhere() {
                self.leave();
            }
        }
        self.entry.inside
    }

    /// Leaves the gate after a transaction.
    pub fn leave(&mut self) {
        self.entry.leave();
    }

    /// Takes messages of the server and appends what is for the client.
    fn take_from_server(&mut self) -> Result<(), io::Error> {
        let mut run = 0;
        while self.to_client.len() + run < WAITING_BYTES_MAX {
            let Some(rest) = self.server.as_ref().and_then(|server| server.from.get(run..)) else { break };
            if self.server_skip > 0 {
                let part = self.server_skip.min(rest.len());
                self.server_skip -= part;
                run += part;
                if self.server_skip > 0 {
                    break;
                }
                continue;
            }
            let header = match wire::peek(rest) {
                Ok(Some(header)) => header,
                Ok(None) => break,
                Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
            };
            let streams = matches!(header.tag, b'D' | b'd') && !self.conversation.is_capturing();
            if streams || (rest.len() < header.len && header.len > INSPECT_BYTES_MAX) {
                self.conversation.drop_capture_if(header.len > INSPECT_BYTES_MAX);
                self.server_skip = header.len;
                continue;
            }
            if rest.len() < header.len {
                break;
            }
            match header.tag {
                b'E' => {
                    if self.pooling.is_some() && self.begins_again(run, header) {
                        run = 0;
                        continue;
                    }
                    if self.pooling.is_some() && self.renames(run, header) {
                        continue;
                    }
                    self.database.errors.increment();
                }
                b'S' => {
                    if let Some(server) = &mut self.server {
                        let body = server.from.get(run + 5..run + header.len).unwrap_or_default();
                        server.parameters.note(body);
                    }
                    self.conversation.parameter_changed();
                }
                b'Z' if self.pooling.is_some() && self.goes_on(run, header) => {
                    run = 0;
                    continue;
                }
                _ => {}
            }
            let Some(body) = self.server.as_ref().and_then(|server| server.from.get(run + 5..run + header.len)) else { break };
            match self.conversation.from_server(header.tag, body) {
                FromServer::Forward => run += header.len,
                FromServer::Swallow => {
                    self.forward_server(run);
                    self.drop_from_server(header.len);
                    run = 0;
                }
                FromServer::Finished(finished) => {
                    run += header.len;
                    self.forget_again();
                    if finished.cycle.capture.is_some() || self.remembered.is_some() {
                        self.forward_server(run); // handing copies over is not for the client to wait for
                        run = 0;
                    }
                    self.finished(*finished);
                }
            }
        }
        self.forward_server(run);
        Ok(())
    }

    /// Sends the front of the server's buffer on: at once as far as the socket takes it.
    pub(super) fn forward_server(&mut self, bytes: usize) {
        let Some(server) = &mut self.server else { return };
        let bytes = bytes.min(server.from.len());
        if self.to_client.is_empty() && !self.client_gone {
            let run = server.from.get(..bytes).unwrap_or_default();
            match write_now(run, |rest| self.client.try_write(rest)) {
                Ok(written) => put_off(&mut server.from, bytes, written, &mut self.to_client),
                Err(_) => self.client_gone = true,
            }
        } else {
            put_off(&mut server.from, bytes, 0, &mut self.to_client);
        }
    }

    /// Takes bytes from the front of the server's buffer that are not for the client.
    pub(super) fn drop_from_server(&mut self, bytes: usize) {
        if let Some(server) = &mut self.server {
            drop_front(&mut server.from, bytes);
        }
    }

    /// The route that this session has seen last.
    pub fn route(&self) -> Arc<Route> {
        self.database.route.load_full()
    }
}

/// Writes until nothing is left or the socket takes no more; returns how much went out.
#[inline]
fn write_now(bytes: &[u8], mut write: impl FnMut(&[u8]) -> io::Result<usize>) -> io::Result<usize> {
    let mut written = 0;
    while let Some(rest) = bytes.get(written..).filter(|rest| !rest.is_empty()) {
        match write(rest) {
            Ok(part) => written += part,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(written)
}

#[inline]
pub(super) fn drop_front(buffer: &mut BytesMut, bytes: usize) {
    buffer.advance(bytes.min(buffer.len()));
    give_back(buffer);
}

/// Takes `bytes` from the front of a buffer, of which `written` have gone out: the rest waits.
#[inline]
fn put_off(from: &mut BytesMut, bytes: usize, written: usize, waiting: &mut BytesMut) {
    if written < bytes {
        waiting.extend_from_slice(from.get(written..bytes).unwrap_or_default());
    }
    from.advance(bytes);
    give_back(from);
}
