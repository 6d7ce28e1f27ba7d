//! The relay: moves bytes both ways, never blocks one direction on the other, and keeps the [`Conversation`] informed.

use super::{
    conversation::{Conversation, Cycle, Finished, FromServer},
    front_door::{CancelTarget, FrontDoor},
    moving::Attachments,
};
use crate::{
    net::Stream,
    sql::{Kind, TransactionVerb},
    traffic::{
        copies::{Copy, Identity, RehearsedStep, RehearsedTransaction, SampledRead},
        database::{Database, SessionInfo},
        fence::Needed,
        route::{Route, ShadowRoute},
    },
    wire::{self, backend::put_error},
};
use bytes::{Bytes, BytesMut};
use std::{
    io,
    sync::{Arc, Mutex, atomic::Ordering},
    time::{Duration, Instant},
};
use tokio::{io::Interest, sync::watch};

/// Messages of a client up to this size are looked at whole; larger ones are streamed through unclassified.
const INSPECT_BYTES_MAX: usize = 256 << 10;
/// Of a message that is streamed through, this much must have come first: the names in it are shorter.
const LARGE_START_BYTES: usize = 1 << 10;
/// Bytes read at once.
const READ_BYTES: usize = 16 << 10;
/// Bytes waiting for one side that stop reading from the other.
const WAITING_BYTES_MAX: usize = 256 << 10;
/// Bytes of a write transaction remembered for rehearsal; larger ones are left out.
const TRANSACTION_BYTES_MAX: usize = 256 << 10;
/// Statements of a write transaction remembered for rehearsal.
const TRANSACTION_STEPS_MAX: usize = 200;
/// How long after `close` a session inside a transaction may go on.
const DRAIN_GRACE: Duration = Duration::from_secs(30);

/// The connection to the owner.
#[derive(Debug)]
pub(super) struct Server {
    pub stream: Stream,
    pub from: BytesMut,
    pub key: (i32, Bytes),
    pub parameters: Vec<(Bytes, Bytes)>,
    pub epoch: i64,
}

/// A write transaction being remembered.
#[derive(Debug)]
struct Remembered {
    steps: Vec<RehearsedStep>,
    bytes: usize,
    left_out: Option<&'static str>,
    wrote: bool,
    began_at: crate::lsn::Lsn,
    needed: Needed,
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
    route_changed: watch::Receiver<u64>,
    inside: bool,
    pub client_skip: usize,
    pub server_skip: usize,
    /// Nothing more comes from the client; it may still read what it has asked for.
    client_ended: bool,
    /// Nothing can be sent to the client any more.
    client_gone: bool,
    pub server_gone: bool,
    remembered: Option<Remembered>,
    /// Shadows that drew the read being captured, and how often each runs it.
    drawn: Vec<(Arc<ShadowRoute>, u64)>,
    /// The running transaction has changed the schema.
    schema_changed: bool,
    closing_since: Option<Instant>,
    draw: fastrand::Rng,
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
    /// The client said goodbye.
    End,
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
        let route_changed = database.watch_route();
        Relay {
            route: database.route.load_full(),
            route_changed,
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
            attachments: Attachments::default(),
            needed: Needed::default(),
            cancel,
            fallback_of: None,
            serve_next: true,
            state_version: 0,
            inside: false,
            client_skip: 0,
            server_skip: 0,
            client_ended: false,
            client_gone: false,
            server_gone: false,
            remembered: None,
            drawn: Vec::new(),
            schema_changed: false,
            closing_since: None,
            draw: fastrand::Rng::new(),
        }
    }

    /// Until one side ends.
    pub async fn run(mut self) {
        let result = self.relay().await;
        if self.inside {
            self.database.gate.leave();
        }
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
                Next::Serve(plan) => {
                    self.serve(*plan).await?;
                    self.try_write()?; // the answer goes out before the next read is looked at
                    continue;
                }
            };
            self.take_from_server()?;
            self.try_write()?;
            if self.client_gone {
                self.to_client.clear(); // or the server, not read from, would never take what is left for it
            }
            if self.server_gone && self.to_client.is_empty() {
                return Ok(());
            }
            let left = self.client_ended && !held && self.to_client.is_empty() && !self.conversation.owes_answers();
            if (self.client_gone || left) && self.to_server.is_empty() {
                return Ok(());
            }
            self.wait(held).await?;
        }
    }

    /// Waits for whatever can happen next and takes the bytes that came.
    async fn wait(&mut self, held: bool) -> Result<(), io::Error> {
        let read_client = !self.client_gone
            && !self.client_ended
            && !held
            && self.to_server.len() < WAITING_BYTES_MAX
            && self.from_client.len() < 2 * INSPECT_BYTES_MAX;
        let read_server = !self.server_gone && self.to_client.len() < WAITING_BYTES_MAX;
        let client_interest = interest(read_client, !self.to_client.is_empty() && !self.client_gone);
        let server_interest = interest(read_server, !self.to_server.is_empty() && !self.server_gone);
        let (mut client_ready, mut server_ready) = (false, false);
        let stopped = self.door.stop.notified(); // before the look: a stop between the two would be missed
        let stop_poll = self.closing_since.is_some() || self.door.is_closing();
        tokio::select! {
            biased;
            result = self.server.stream.ready(server_interest.unwrap_or(Interest::READABLE)), if server_interest.is_some() => {
                result?;
                server_ready = true;
            }
            result = self.client.ready(client_interest.unwrap_or(Interest::READABLE)), if client_interest.is_some() => {
                result?;
                client_ready = true;
            }
            () = self.database.gate.wait_open(), if held => {}
            result = self.route_changed.changed() => {
                if result.is_ok() {
                    self.route_changed.borrow_and_update();
                    self.route = self.database.route.load_full();
                    self.attachments.prepare(&self.database, &self.info, &self.identity, &self.route);
                    self.prepare_standby().await;
                }
            }
            () = self.info.terminate.notified() => return self.say_goodbye("57P01", "terminating connection due to administrator command"),
            () = stopped => {}
            () = tokio::time::sleep(Duration::from_millis(50)), if stop_poll => {}
        }
        if self.door.is_closing() {
            let since = *self.closing_since.get_or_insert_with(Instant::now);
            if self.conversation.at_boundary() || since.elapsed() > DRAIN_GRACE {
                return self.say_goodbye("57P01", "understudy is shutting down");
            }
        }
        if server_ready && read_server {
            self.server.from.reserve(READ_BYTES);
            match self.server.stream.try_read_buf(&mut self.server.from) {
                Ok(0) => self.server_gone = true,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => self.server_gone = true,
            }
        }
        if client_ready && read_client {
            self.from_client.reserve(READ_BYTES);
            match self.client.try_read_buf(&mut self.from_client) {
                Ok(0) => self.client_ended = true,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => self.client_gone = true,
            }
        }
        Ok(())
    }

    fn say_goodbye(&mut self, code: &str, message: &str) -> Result<(), io::Error> {
        put_error(&mut self.to_client, "FATAL", code, message, None);
        Err(io::Error::new(io::ErrorKind::ConnectionAborted, message.to_owned()))
    }

    fn try_write(&mut self) -> Result<(), io::Error> {
        while !self.to_client.is_empty() && !self.client_gone {
            match self.client.try_write(&self.to_client) {
                Ok(written) => drop(self.to_client.split_to(written)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => self.client_gone = true,
            }
        }
        while !self.to_server.is_empty() && !self.server_gone {
            match self.server.stream.try_write(&self.to_server) {
                Ok(written) => drop(self.to_server.split_to(written)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => self.server_gone = true,
            }
        }
        Ok(())
    }

    async fn flush_server(&mut self) {
        let bytes = std::mem::take(&mut self.to_server);
        let _ = tokio::time::timeout(Duration::from_secs(5), tokio::io::AsyncWriteExt::write_all(&mut self.server.stream, &bytes)).await;
    }

    /// Takes whole messages of the client and appends what is to be forwarded.
    fn next_of_client(&mut self) -> Result<Next, io::Error> {
        let idle = self.client_skip == 0 && !self.inside && self.conversation.at_boundary();
        if idle && self.server.epoch != self.database.route.load().epoch {
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
                Err(error) => {
                    put_error(&mut self.to_client, "FATAL", "08P01", &error.to_string(), None);
                    return Err(io::Error::new(io::ErrorKind::InvalidData, error));
                }
            };
            if self.conversation.at_boundary() && !self.inside {
                if header.tag == b'X' {
                    run += header.len.min(available);
                    self.forward_client(run);
                    return Ok(Next::End);
                }
                if self.server.epoch != self.database.route.load().epoch {
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
                // the server answers what came before; nothing of the client is looked at behind it
                self.client_ended = true;
                self.forward_client(run);
                self.from_client.clear();
                return Ok(Next::Io);
            }
            let forward = self.conversation.from_client(header.tag, body, &self.database.classifier);
            if matches!(header.tag, b'Q' | b'S') {
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

    fn forward_client(&mut self, bytes: usize) {
        if bytes == 0 {
            return;
        }
        let part = self.from_client.split_to(bytes.min(self.from_client.len()));
        if self.to_server.is_empty() {
            self.to_server = part;
        } else {
            self.to_server.extend_from_slice(&part);
        }
    }

    /// Enters the gate for a transaction.
    pub fn enter(&mut self) -> bool {
        if !self.inside {
            self.inside = self.database.gate.try_enter();
            // the owner may have changed between the look at the epoch and the entry
            if self.inside && self.server.epoch != self.database.route.load().epoch {
                self.leave();
            }
        }
        self.inside
    }

    /// Leaves the gate after a transaction.
    pub fn leave(&mut self) {
        if std::mem::take(&mut self.inside) {
            self.database.gate.leave();
        }
    }

    fn begin_transaction(&mut self) {
        self.serve_next = true;
        let route = self.database.route.load();
        self.conversation.recording = route.shadows.iter().any(|shadow| shadow.is_interested());
        let rehearse = route.shadows.iter().any(|shadow| shadow.rehearse.load(Ordering::Relaxed) && shadow.in_step.load(Ordering::Relaxed));
        self.remembered = rehearse.then(|| Remembered {
            steps: Vec::new(),
            bytes: 0,
            left_out: None,
            wrote: false,
            began_at: self.database.ticks.newest(),
            needed: self.database.ticks.needed_now(),
        });
    }

    /// Draws whether the cycle just taken is a read to be compared.
    fn maybe_sample(&mut self) {
        if !self.conversation.recording || self.conversation.status() != wire::backend::TransactionStatus::Idle {
            return;
        }
        let route = self.database.route.load();
        let Some(cycle) = self.conversation.newest() else { return };
        let is_read = !cycle.wrote && !cycle.opaque && cycle.executed.len() == 1 && cycle.executed.iter().all(|e| e.class.single);
        if !is_read || !self.database.knows_facts() || !self.conversation.pins.is_empty() || !self.conversation.is_alone() {
            return;
        }
        let draw = &mut self.draw;
        self.drawn.clear();
        for shadow in route.shadows.iter().filter(|shadow| shadow.in_step.load(Ordering::Relaxed)) {
            let times = shadow.sample_reads.draw(|| draw.u64(0..10_000));
            if times > 0 {
                self.drawn.push((shadow.clone(), times));
            }
        }
        if !self.drawn.is_empty() {
            self.conversation.capture_newest();
        }
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
                    self.finished(*finished);
                }
            }
        }
        self.forward_server(run);
        Ok(())
    }

    fn forward_server(&mut self, bytes: usize) {
        if bytes == 0 {
            return;
        }
        let part = self.server.from.split_to(bytes.min(self.server.from.len()));
        if self.to_client.is_empty() {
            self.to_client = part;
        } else {
            self.to_client.extend_from_slice(&part);
        }
    }

    fn finished(&mut self, finished: Finished) {
        let Finished { cycle, status, state_changed } = finished;
        let latency = cycle.sent.elapsed();
        self.database.requests.increment();
        self.info.requests.fetch_add(1, Ordering::Relaxed);
        self.database.latency.record(latency);
        if state_changed {
            self.state_version += 1;
            *self.info.pins.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = self.conversation.pins.clone();
        }
        if cycle.wrote {
            self.needed = self.database.ticks.needed_now();
            let changes_schema = cycle.executed.iter().any(|executed| executed.class.kind == Kind::SchemaChange);
            self.schema_changed |= changes_schema;
            // at the statement, and again when the transaction that holds it has become visible
            if changes_schema || (self.schema_changed && status == wire::backend::TransactionStatus::Idle) {
                self.database.facts_are_stale();
            }
        }
        if status == wire::backend::TransactionStatus::Idle {
            self.schema_changed = false;
        }
        if let Some(shadow) = self.fallback_of.take() {
            // the owner has answered what the shadow could not: a failure of the shadow only, unless it fails here too
            if !cycle.failed {
                shadow.observations.fallback_reasons.count("the shadow answered with an error");
            }
            shadow.observations.shadow_outcome(latency, !cycle.failed, Instant::now());
            shadow.breaker.outcome(cycle.failed, crate::traffic::database::monotonic_ms());
        }
        if !cycle.wrote && !cycle.failed {
            let route = self.database.route.load();
            for shadow in route.shadows.iter().filter(|shadow| shadow.serve_reads.get() > 0.0) {
                shadow.observations.owner_outcome(latency, Instant::now());
            }
        }
        self.remember(cycle, latency);
        if status == wire::backend::TransactionStatus::Idle {
            self.database.transactions.increment();
            self.offer_transaction();
            if self.conversation.at_boundary() {
                self.leave();
            }
        }
    }

    /// Hands a captured read over, or adds the cycle to the transaction that is being remembered.
    fn remember(&mut self, cycle: Cycle, latency: Duration) {
        let alone = cycle.executed.len() == 1;
        if let Some(answer) = cycle.capture {
            let Some(executed) = cycle.executed.into_iter().next() else { return };
            let Some(operation) = executed.operation else { return };
            // what other sessions committed before this answer may be in it as well
            let needed = self.database.ticks.needed_now();
            for (shadow, times) in self.drawn.drain(..) {
                let read = SampledRead {
                    identity: self.identity.clone(),
                    operation: operation.clone(),
                    class: executed.class.clone(),
                    answer: answer.clone(),
                    owner_latency: latency,
                    needed,
                    times,
                };
                shadow.observations.sampled.increment();
                if let Err(dropped) = shadow.queue.offer(self.info.id, Copy::Read(Box::new(read))) {
                    shadow.observations.dropped.increment();
                    shadow.observations.compare_reasons.count(dropped.as_str());
                }
            }
            return;
        }
        let Some(remembered) = &mut self.remembered else { return };
        if cycle.opaque {
            remembered.left_out = Some("message too large or of a kind that is not copied");
        }
        if cycle.failed {
            remembered.left_out = Some("failed on the owner");
        }
        remembered.wrote |= cycle.wrote;
        for executed in cycle.executed {
            match executed.class.kind {
                // `RELEASE s; COMMIT` counts as its first verb: on the shadow its COMMIT would be carried out
                Kind::Transaction(_) if !executed.class.single => remembered.left_out = Some("several statements in one message"),
                Kind::Transaction(TransactionVerb::Commit) => continue,
                Kind::Transaction(TransactionVerb::Rollback) => remembered.left_out = Some("rolled back by the client"),
                Kind::Transaction(TransactionVerb::Prepared) => remembered.left_out = Some("two-phase commit"),
                Kind::Transaction(_) | Kind::Read => {}
                _ if !executed.class.single => remembered.left_out = Some("several statements in one message"),
                _ if !executed.class.rehearsable => remembered.left_out = executed.class.left_out.or(Some("cannot be rolled back")),
                _ => {}
            }
            let Some(operation) = executed.operation else {
                remembered.left_out.get_or_insert("began before rehearsing was switched on");
                continue;
            };
            remembered.bytes += operation.bytes();
            if remembered.bytes > TRANSACTION_BYTES_MAX || remembered.steps.len() >= TRANSACTION_STEPS_MAX {
                remembered.left_out = Some("transaction too large");
                remembered.steps.clear();
                continue;
            }
            remembered.steps.push(RehearsedStep {
                operation,
                class: executed.class,
                tags: executed.tags,
                owner_latency: alone.then_some(latency),
            });
        }
    }

    fn offer_transaction(&mut self) {
        let Some(remembered) = self.remembered.take() else { return };
        let writes = remembered.steps.iter().any(|step| !matches!(step.class.kind, Kind::Read | Kind::Transaction(_) | Kind::Session(_)));
        if !remembered.wrote || (!writes && remembered.left_out.is_none()) {
            return;
        }
        let route = self.database.route.load();
        for shadow in route.shadows.iter().filter(|shadow| shadow.rehearse.load(Ordering::Relaxed)) {
            let observations = &shadow.observations;
            let reason = match (remembered.left_out, self.conversation.pins.is_empty()) {
                (Some(reason), _) => Some(reason),
                (None, false) => Some("session state that the shadow does not share"),
                (None, true) => None,
            };
            if let Some(reason) = reason {
                observations.left_out.count(reason);
                continue;
            }
            let transaction = RehearsedTransaction {
                identity: self.identity.clone(),
                steps: remembered.steps.clone(),
                began_at: remembered.began_at,
                needed: remembered.needed,
            };
            if let Err(dropped) = shadow.queue.offer(self.info.id, Copy::Write(Box::new(transaction))) {
                observations.left_out.count(dropped.as_str());
            }
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

fn interest(read: bool, write: bool) -> Option<Interest> {
    match (read, write) {
        (true, true) => Some(Interest::READABLE | Interest::WRITABLE),
        (true, false) => Some(Interest::READABLE),
        (false, true) => Some(Interest::WRITABLE),
        (false, false) => None,
    }
}

/// Keeps a ParameterStatus, so that a later server's values can be told from it.
pub(super) fn note_parameter(parameters: &mut Vec<(Bytes, Bytes)>, mut body: &[u8]) {
    let (Some(name), Some(value)) = (wire::take_cstr(&mut body), wire::take_cstr(&mut body)) else { return };
    match parameters.iter_mut().find(|(known, _)| known == name) {
        Some((_, known)) => *known = Bytes::copy_from_slice(value),
        None => parameters.push((Bytes::copy_from_slice(name), Bytes::copy_from_slice(value))),
    }
}
