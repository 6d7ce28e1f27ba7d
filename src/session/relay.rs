//! The relay: moves bytes both ways, never blocks one direction on the other, and keeps the [`Conversation`] informed.

use super::{
    conversation::{Conversation, FromServer},
    front_door::{CancelTarget, FrontDoor},
    limits::{Bounds, Farewell, LENGTH, TOO_LONG, TOO_MUCH},
    moving::Attachments,
    observing::Remembered,
    sockets::{Wanted, give_back},
};
use crate::{
    net::Stream,
    sql::{Later, LookUp},
    traffic::{
        cancelling::Place,
        copies::Identity,
        database::{Database, SessionInfo},
        fence::Needed,
        route::{Route, ShadowRoute},
    },
    wire::{self, WireError, backend::put_error},
};
use bytes::{Buf, Bytes, BytesMut};
use std::{
    future::poll_fn,
    io,
    sync::{Arc, Mutex},
    task::Waker,
    time::{Duration, Instant},
};

/// Messages of a client up to this size are looked at whole; larger ones are streamed through unclassified.
const INSPECT_BYTES_MAX: usize = 256 << 10;
/// Of a message that is streamed through, this much must have come first: the names in it are shorter.
const LARGE_START_BYTES: usize = 1 << 10;
/// Bytes waiting for one side that stop reading from the other.
const WAITING_BYTES_MAX: usize = 256 << 10;
/// How often a session looks whether it may end, while the front door closes.
const DRAIN_LOOK: Duration = Duration::from_millis(50);
/// How long after `close` a session inside a transaction may go on.
const DRAIN_GRACE: Duration = Duration::from_secs(30);

static TERMINATED: Farewell = Farewell { code: "57P01", message: "terminating connection due to administrator command", hint: None };
static CLOSING: Farewell = Farewell { code: "57P01", message: "understudy is shutting down", hint: None };

/// The connection to the owner.
#[derive(Debug)]
pub(super) struct Server {
    pub stream: Stream,
    pub from: BytesMut,
    pub key: (i32, Bytes),
    pub parameters: Vec<(Bytes, Bytes)>,
    pub epoch: i64,
    /// The last read filled its buffer.
    pub bulk: bool,
}

/// One session.
pub(super) struct Relay {
    pub door: Arc<FrontDoor>,
    pub database: Arc<Database>,
    pub info: Arc<SessionInfo>,
    pub identity: Arc<Identity>,
    pub client: Stream,
    pub from_client: BytesMut,
    pub to_client: BytesMut,
    pub server: Server,
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
    entry: Entry,
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
    farewell: Option<&'static Farewell>,
    pub server_gone: bool,
    pub remembered: Option<Remembered>,
    /// Shadows that drew the read being captured, and how often each runs it.
    pub drawn: Vec<(Arc<ShadowRoute>, u64)>,
    /// The running transaction has changed the schema.
    pub schema_changed: bool,
    closing_since: Option<Instant>,
    pub draw: fastrand::Rng,
}

/// What the client's side needs next.
enum Next {
    /// Sockets.
    Io,
    /// The gate is closed.
    Held,
    /// The owner has changed.
    Move,
    /// The read at the front may be answered by this shadow.
    Serve(Box<super::serving::Plan>),
    /// The message at the front is being parsed.
    Classify(Later),
    /// The client said goodbye.
    End,
}

/// A transaction's place behind the gate, given back even if the session's task panics: a cutover would wait for it for ever.
struct Entry {
    database: Arc<Database>,
    inside: bool,
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
        server: Server,
        cancel: Arc<Mutex<CancelTarget>>,
    ) -> Self {
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
            server_gone: false,
            remembered: None,
            drawn: Vec::new(),
            schema_changed: false,
            closing_since: None,
            draw: fastrand::Rng::new(),
        }
    }

    /// Until one side ends, on the runtime that this is called on.
    pub async fn run(mut self: Box<Self>) {
        for buffer in [&mut self.from_client, &mut self.server.from].into_iter().filter(|buffer| buffer.is_empty()) {
            *buffer = BytesMut::new(); // what the log-in read into; from here on buffers are lent
        }
        match (self.client.rebind(), self.server.stream.rebind()) {
            (Ok(client), Ok(server)) => (self.client, self.server.stream) = (client, server),
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
        if !self.server_gone {
            self.server.terminate().await;
        }
    }

    async fn relay(&mut self) -> Result<(), io::Error> {
        self.take_limits(false);
        self.attachments.prepare(&self.database, &self.info, &self.identity, &self.route);
        loop {
            let held = match self.next_of_client()? {
                Next::Io => false,
                Next::Held => true,
                Next::End => {
                    self.flush_server().await;
                    return Ok(());
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
            if self.client_gone {
                self.to_client.clear(); // or the server, not read from, would never take what is left for it
            }
            if self.server_gone && self.to_client.is_empty() {
                return Ok(());
            }
            let left = self.client_ended && !held && self.to_client.is_empty() && !self.conversation.owes_answers();
            if (self.client_gone || left) && self.to_server.is_empty() {
                return match self.farewell.take() {
                    Some(farewell) => self.say_goodbye(farewell),
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
    async fn read_news(&mut self) {
        let route = self.database.route.load_full();
        if !Arc::ptr_eq(&route, &self.route) {
            self.route = route;
            self.attachments.prepare(&self.database, &self.info, &self.identity, &self.route);
            self.prepare_standby().await;
        }
    }

    pub(super) fn say_goodbye(&mut self, farewell: &'static Farewell) -> Result<(), io::Error> {
        if self.server_skip == 0 {
            put_error(&mut self.to_client, "FATAL", farewell.code, farewell.message, farewell.hint);
        } // else it would stand in the middle of a row
        Err(io::Error::new(io::ErrorKind::ConnectionAborted, farewell.message))
    }

    /// Nothing more is taken from the client. What it asked for before (`run` bytes) is still carried out and answered.
    fn refuse_rest(&mut self, run: usize, farewell: &'static Farewell) -> Next {
        self.forward_client(run);
        self.from_client.clear();
        (self.client_ended, self.farewell) = (true, Some(farewell));
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
        if !self.to_server.is_empty() && !self.server_gone {
            match write_now(&self.to_server, |rest| self.server.stream.try_write(rest)) {
                Ok(written) => drop_front(&mut self.to_server, written),
                Err(_) => self.server_gone = true,
            }
        }
    }

    async fn flush_server(&mut self) {
        let bytes = std::mem::take(&mut self.to_server);
        let _ = tokio::time::timeout(Duration::from_secs(5), tokio::io::AsyncWriteExt::write_all(&mut self.server.stream, &bytes)).await;
    }

    /// Takes whole messages of the client and appends what is to be forwarded.
    fn next_of_client(&mut self) -> Result<Next, io::Error> {
        let idle = self.client_skip == 0 && !self.entry.inside && self.conversation.at_boundary();
        if idle && self.server.epoch != self.database.epoch() {
            // also with nothing to forward: the old owner may end this connection at any moment
            return Ok(if self.database.gate.is_closed() { Next::Held } else { Next::Move });
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
                Err(WireError::Length(_) | WireError::Truncated(_)) => return Ok(self.refuse_rest(run, &LENGTH)),
            };
            if header.len > self.bounds.message_bytes_max {
                return Ok(self.refuse_rest(run, &TOO_LONG));
            }
            if self.conversation.is_full() && !matches!(header.tag, b'd' | b'c' | b'f') {
                break Next::Io; // the server answers first
            }
            if self.conversation.at_boundary() && !self.entry.inside {
                if header.tag == b'X' {
                    run += header.len.min(available);
                    self.forward_client(run);
                    return Ok(Next::End);
                }
                if self.server.epoch != self.database.epoch() {
                    break if self.database.gate.is_closed() { Next::Held } else { Next::Move };
                }
                if run == 0
                    && self.serve_next
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
                // What is left of a COPY that the server has given up begins nothing and is never answered.
                if !matches!(header.tag, b'd' | b'c' | b'f') {
                    if !self.enter() {
                        break Next::Held;
                    }
                    self.begin_transaction();
                }
            }
            if available < header.len && (header.len > INSPECT_BYTES_MAX || header.tag == b'd') {
                let named = available >= LARGE_START_BYTES || header.len <= INSPECT_BYTES_MAX;
                if matches!(header.tag, b'P' | b'B') && !named {
                    break Next::Io; // the names stand at its start
                }
                let start = self.from_client.get(run + 5..run + available).unwrap_or_default();
                if let Some(before) = self.conversation.large_message(header.tag, start) {
                    self.forward_client(run);
                    run = 0;
                    self.to_server.extend_from_slice(&before);
                }
                self.client_skip = header.len;
                continue;
            }
            let Some(body) = self.from_client.get(run + 5..run + header.len) else { break Next::Io };
            if header.tag == b'X' {
                // The server answers what came before, and then ends, whatever we think is owed; nothing of the client is
                // looked at behind it.
                self.client_ended = true;
                self.forward_client(run + header.len);
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
                return Ok(self.refuse_rest(run, &TOO_MUCH));
            }
            if matches!(header.tag, b'Q' | b'S') {
                if let Some(text) = self.conversation.take_schema_text() {
                    self.database.planned.offer(text);
                }
                self.maybe_sample();
            }
            if let Some(before) = forward.before {
                self.forward_client(run);
                run = 0;
                self.to_server.extend_from_slice(&before);
            }
            run += header.len;
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
        if self.to_server.is_empty() && !self.server_gone {
            let run = self.from_client.get(..bytes).unwrap_or_default();
            match write_now(run, |rest| self.server.stream.try_write(rest)) {
                Ok(written) => put_off(&mut self.from_client, bytes, written, &mut self.to_server),
                Err(_) => self.server_gone = true,
            }
        } else {
            put_off(&mut self.from_client, bytes, 0, &mut self.to_server);
        }
    }

    /// Enters the gate for a transaction.
    pub fn enter(&mut self) -> bool {
        if !self.entry.inside {
            self.entry.inside = self.database.gate.try_enter();
            // the owner may have changed between the look at the epoch and the entry
            if self.entry.inside && self.server.epoch != self.database.epoch() {
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
            let Some(rest) = self.server.from.get(run..) else { break };
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
            let Some(body) = rest.get(5..header.len) else { break };
            match header.tag {
                b'E' => self.database.errors.increment(),
                b'S' => note_parameter(&mut self.server.parameters, body),
                _ => {}
            }
            match self.conversation.from_server(header.tag, body) {
                FromServer::Forward => run += header.len,
                FromServer::Swallow => {
                    self.forward_server(run);
                    drop(self.server.from.split_to(header.len));
                    run = 0;
                }
                FromServer::Finished(finished) => {
                    run += header.len;
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
    fn forward_server(&mut self, bytes: usize) {
        let bytes = bytes.min(self.server.from.len());
        if self.to_client.is_empty() && !self.client_gone {
            let run = self.server.from.get(..bytes).unwrap_or_default();
            match write_now(run, |rest| self.client.try_write(rest)) {
                Ok(written) => put_off(&mut self.server.from, bytes, written, &mut self.to_client),
                Err(_) => self.client_gone = true,
            }
        } else {
            put_off(&mut self.server.from, bytes, 0, &mut self.to_client);
        }
    }

    /// The route that this session has seen last.
    pub fn route(&self) -> Arc<Route> {
        self.database.route.load_full()
    }

    /// Chance, 0 to 9,999.
    pub fn chance(&mut self) -> u64 {
        self.draw.u64(0..10_000)
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
fn drop_front(buffer: &mut BytesMut, bytes: usize) {
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

/// Keeps a ParameterStatus, so that a later server's values can be told from it.
pub(super) fn note_parameter(parameters: &mut Vec<(Bytes, Bytes)>, mut body: &[u8]) {
    let (Some(name), Some(value)) = (wire::take_cstr(&mut body), wire::take_cstr(&mut body)) else { return };
    match parameters.iter_mut().find(|(known, _)| known == name) {
        Some((_, known)) => *known = Bytes::copy_from_slice(value),
        None => parameters.push((Bytes::copy_from_slice(name), Bytes::copy_from_slice(value))),
    }
}
