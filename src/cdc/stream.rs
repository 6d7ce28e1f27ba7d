//! The reader: owns the replication connection, answers the server, decodes, and hands items to the applier through a queue
//! that is bounded by bytes. It never waits for the applier with its hands full: a full queue stops the reading, not the answers.
//! Big transactions arrive before they have ended; they wait in a [`Spool`] and reach the applier whole, at their commit's place.

use super::{
    CdcError,
    names::{feed_name, ident},
    pgoutput::{Control, Envelope, Message, Value, encode_status},
    session,
    shared::{Shared, TableName, lock, now_us},
    spool::{Replay, Spool, SpoolError},
};
use crate::{
    backend::{BackendError, Connection},
    lsn::Lsn,
    metadata::Severity,
    wire::{self, backend::ErrorFields, frontend, put},
};
use bytes::{Bytes, BytesMut};
use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{
    sync::{Notify, mpsc},
    time::{MissedTickBehavior, interval},
};

/// Bytes of the stream in memory, between reader and applier. One message may exceed it (a row can have 1 GB); then it is alone.
const QUEUE_BYTES_MAX: usize = 32 << 20;

/// Handed over at a time, and read from the socket at a time.
const PART_BYTES_MAX: usize = 256 << 10;
const READ_BYTES: usize = 64 << 10;

/// What each queued item costs besides its bytes.
const ITEM_BYTES: usize = 256;

/// Longest silence towards the server: well below its `wal_sender_timeout` (60 s by default).
const STATUS_PERIOD: Duration = Duration::from_secs(1);

/// How often the server is asked for its position while somebody waits.
const HURRY_PERIOD: Duration = Duration::from_millis(3);

/// How often the server is asked for its position until the feed has caught up: an idle server says nothing by itself.
const PROBE_PERIOD: Duration = Duration::from_millis(50);

/// How long the slot may stay taken by a connection of ours that just broke.
const SLOT_BUSY: Duration = Duration::from_secs(20);

/// What the applier gets, in stream order.
#[derive(Debug)]
pub(super) enum Item {
    /// A decoded message, with its bytes (for spooling).
    Message(Message, Bytes),
    /// Everything before this position has been sent.
    KeepAlive(Lsn),
}

/// Bytes in the queue.
#[derive(Default)]
pub(super) struct Budget {
    bytes: AtomicUsize,
    drained: Notify,
}

impl Budget {
    fn full(&self) -> bool {
        self.bytes.load(Ordering::Acquire) >= QUEUE_BYTES_MAX
    }

    fn add(&self, bytes: usize) {
        self.bytes.fetch_add(bytes, Ordering::AcqRel);
    }

    fn remove(&self, bytes: usize) {
        let before = self.bytes.fetch_sub(bytes, Ordering::AcqRel);
        if before >= QUEUE_BYTES_MAX && before - bytes < QUEUE_BYTES_MAX {
            self.drained.notify_one();
        }
    }
}

fn cost(item: &Item) -> usize {
    match item {
        Item::Message(_, raw) => ITEM_BYTES + raw.len(),
        Item::KeepAlive(_) => ITEM_BYTES,
    }
}

/// The applier's end of the queue.
pub(super) struct Queue {
    items: mpsc::UnboundedReceiver<Vec<Item>>,
    budget: Arc<Budget>,
    /// Taken from the channel, not from the queue.
    near: VecDeque<Item>,
}

impl Queue {
    fn arrived(&mut self, items: Vec<Item>) {
        self.budget.remove(items.iter().map(cost).sum());
        self.near = items.into();
    }

    /// The next item; `None`: the reader ended. Cancel-safe.
    pub async fn next(&mut self) -> Option<Item> {
        while self.near.is_empty() {
            let items = self.items.recv().await?;
            self.arrived(items);
        }
        self.near.pop_front()
    }

    /// Looks at the next item, waiting for it. For the inside of a transaction, where there always is one.
    pub async fn peek_next(&mut self) -> Option<&Item> {
        while self.near.is_empty() {
            let items = self.items.recv().await?;
            self.arrived(items);
        }
        self.near.front()
    }

    /// Looks at the next item if one is there already.
    pub fn peek(&mut self) -> Option<&Item> {
        while self.near.is_empty() {
            let items = self.items.try_recv().ok()?;
            self.arrived(items);
        }
        self.near.front()
    }
}

/// A queue's two ends.
pub(super) fn queue() -> (Sender, Queue) {
    let (sender, items) = mpsc::unbounded_channel();
    let budget = Arc::new(Budget::default());
    (
        Sender { items: sender, budget: Arc::clone(&budget), pending: Vec::new(), pending_bytes: 0 },
        Queue { items, budget, near: VecDeque::new() },
    )
}

/// The applier has ended.
struct Gone;

/// The reader's end of the queue. Items go out in parts: what was received together is handed over together.
pub(super) struct Sender {
    items: mpsc::UnboundedSender<Vec<Item>>,
    budget: Arc<Budget>,
    pending: Vec<Item>,
    pending_bytes: usize,
}

impl Sender {
    fn push(&mut self, item: Item) {
        self.pending_bytes += cost(&item);
        self.pending.push(item);
    }

    /// Hands over what was pushed.
    fn flush(&mut self) -> Result<(), Gone> {
        if self.pending.is_empty() {
            return Ok(());
        }
        self.budget.add(std::mem::take(&mut self.pending_bytes));
        self.items.send(std::mem::take(&mut self.pending)).map_err(|_| Gone)
    }
}

/// pgoutput's newest version that a server offers, and whether it sends big transactions before they have ended.
fn protocol(connection: &Connection) -> (u32, bool) {
    let version = connection.parameters.iter().find(|(name, _)| &name[..] == b"server_version").map(|(_, value)| &value[..]);
    let digits = version.unwrap_or_default().iter().take_while(|byte| byte.is_ascii_digit());
    match digits.fold(0_u32, |number, digit| number.saturating_mul(10).saturating_add(u32::from(digit - b'0'))) {
        0..=13 => (1, false),
        14 => (2, true),
        15 => (3, true),
        _ => (4, true),
    }
}

/// Opens the stream from `start` (the server begins at the slot's confirmed position if that is later).
pub(super) async fn open(shared: &Shared, start: Lsn) -> Result<Connection, CdcError> {
    let feed = feed_name(&shared.spec);
    let deadline = Instant::now() + SLOT_BUSY;
    loop {
        let mut connection = session::connect_replication(&shared.spec.from).await?;
        let (version, unfinished) = protocol(&connection);
        let unfinished = unfinished && !shared.whole_only.load(Ordering::Acquire);
        let command = format!(
            "START_REPLICATION SLOT {} LOGICAL {start} (proto_version '{version}', publication_names '{}'{}{})",
            ident(&feed),
            ident(&feed),
            if version > 1 { ", messages 'true'" } else { "" },
            if unfinished { ", streaming 'on'" } else { "" }
        );
        let mut request = BytesMut::new();
        frontend::put_query(&mut request, command.as_bytes());
        let failed = |source| CdcError::Backend { what: "start the change stream", source };
        connection.send(&request).await.map_err(failed)?;
        loop {
            let message = connection.receive().await.map_err(failed)?;
            match message.tag {
                b'W' => return Ok(connection),
                b'E' => {
                    let fields = ErrorFields::parse(&message.body);
                    // The server has not yet noticed that our last connection is gone.
                    if fields.code == "55006" && Instant::now() < deadline {
                        break;
                    }
                    // 42704: the slot is gone; 55000: it was invalidated.
                    if fields.code == "42704" || (fields.code == "55000" && fields.message.contains("slot")) {
                        return Err(CdcError::Setup(format!(
                            "the replication slot {feed} cannot be used any more ({}): changes are lost. {}",
                            fields.message,
                            super::owner::again(&shared.spec.shadow)
                        )));
                    }
                    return Err(failed(BackendError::Server(fields)));
                }
                _ => {}
            }
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Reads until the connection breaks or the applier is gone.
pub(super) async fn read(shared: Arc<Shared>, mut connection: Connection, mut sender: Sender) -> Result<(), CdcError> {
    let mut status = interval(STATUS_PERIOD);
    status.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut hurry = interval(HURRY_PERIOD);
    hurry.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut probe = interval(PROBE_PERIOD);
    probe.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut decoder = Decoder {
        spool: Spool::at(shared.spec.copy.spool_folder.clone(), shared.spec.copy.spool_mib_max),
        names: HashMap::new(),
        commit: Lsn::ZERO,
        touched: None,
        open: None,
        replay: None,
        said: None,
    };
    let broke = |source| CdcError::Backend { what: "follow the change stream", source };
    enlarge(&mut connection.buffer);
    let mut answered = Instant::now();
    loop {
        let full = sender.budget.full();
        let replaying = decoder.replay.is_some();
        if replaying && !full {
            decoder.replay_some(&shared, &mut sender).await?;
            if sender.flush().is_err() {
                return Ok(());
            }
            if answered.elapsed() >= STATUS_PERIOD {
                answered = Instant::now();
                send_status(&shared, &mut connection, false).await?;
            }
            tokio::task::consume_budget().await;
            continue;
        }
        let waiting = shared.waiters.load(Ordering::Acquire) > 0;
        let behind = !shared.is_streaming();
        let message = tokio::select! {
            biased;
            _ = status.tick() => {
                send_status(&shared, &mut connection, false).await?;
                continue;
            }
            _ = probe.tick(), if behind => {
                send_status(&shared, &mut connection, true).await?;
                continue;
            }
            _ = hurry.tick(), if waiting => {
                send_status(&shared, &mut connection, true).await?;
                continue;
            }
            () = shared.wake.notified() => {
                let waiting = shared.waiters.load(Ordering::Acquire) > 0;
                send_status(&shared, &mut connection, waiting).await?;
                continue;
            }
            () = sender.budget.drained.notified(), if full => continue,
            message = connection.receive(), if !full && !replaying => message.map_err(broke)?,
        };
        let mut next = Some(message);
        let mut asked = false;
        // What has arrived together is handed over together.
        while let Some(message) = next {
            match message.tag {
                b'd' => asked |= decoder.take(&shared, &mut sender, &message.body).await?,
                b'E' => {
                    let fields = ErrorFields::parse(&message.body);
                    // Decoding old WAL with a publication that was made after it.
                    if fields.code == "42704" && fields.message.contains("publication") {
                        return Err(CdcError::Setup(format!(
                            "{}: the publication was dropped while the feed needed it. {}",
                            fields.message,
                            super::owner::again(&shared.spec.shadow)
                        )));
                    }
                    return Err(broke(BackendError::Server(fields)));
                }
                b'c' => return Err(CdcError::Protocol("the server ended the change stream (it is shutting down)".into())),
                _ => {}
            }
            let more = sender.pending_bytes < PART_BYTES_MAX && decoder.replay.is_none();
            next = if more { wire::take(&mut connection.buffer).map_err(|error| broke(error.into()))? } else { None };
        }
        if sender.flush().is_err() {
            return Ok(());
        }
        if asked {
            send_status(&shared, &mut connection, false).await?;
        }
    }
}

/// Fewer, larger reads: a walsender that is behind fills the socket faster than small reads empty it.
fn enlarge(buffer: &mut BytesMut) {
    let mut larger = BytesMut::with_capacity(READ_BYTES);
    larger.extend_from_slice(buffer);
    *buffer = larger;
}

async fn send_status(shared: &Shared, connection: &mut Connection, reply: bool) -> Result<(), CdcError> {
    let body = encode_status(shared.received.load(), shared.confirmed.load(), now_us(), reply);
    let mut message = BytesMut::with_capacity(body.len() + 5);
    put(&mut message, b'd', |b| b.extend_from_slice(&body));
    connection.send(&message).await.map_err(|source| CdcError::Backend { what: "answer the server", source })
}

/// Decodes and keeps note, at the moment of receipt, of what each table's newest change is.
struct Decoder {
    names: HashMap<u32, TableName>,
    commit: Lsn,
    /// The last table noted and with what: most changes concern the table of the one before.
    touched: Option<(u32, Lsn)>,
    spool: Spool,
    /// The unfinished transaction whose part is being received.
    open: Option<u32>,
    /// The relation whose rows are messages: on 13.
    said: Option<u32>,
    /// A transaction that was received before it ended, on its way to the applier, and its end.
    replay: Option<(Replay, Message)>,
}

impl Decoder {
    /// Takes the content of a CopyData; `true`: the server wants an answer.
    async fn take(&mut self, shared: &Shared, sender: &mut Sender, body: &Bytes) -> Result<bool, CdcError> {
        match Envelope::decode(body)? {
            Envelope::Data { start, server_end, payload } => {
                shared.received.advance(server_end);
                if let Some(control) = Control::decode(&payload)? {
                    self.control(shared, sender, control).await?;
                } else if let Some(xid) = self.open {
                    self.keep(shared, xid, &payload).await?;
                } else {
                    let message = self.decode(shared, &payload, start)?;
                    sender.push(Item::Message(message, payload));
                }
                Ok(false)
            }
            Envelope::KeepAlive { sent, reply } => {
                shared.received.advance(sent);
                sender.push(Item::KeepAlive(sent));
                Ok(reply)
            }
        }
    }

    async fn control(&mut self, shared: &Shared, sender: &mut Sender, control: Control) -> Result<(), CdcError> {
        match control {
            Control::Start { xid } => self.open = Some(xid),
            Control::Stop => self.open = None,
            Control::Abort { xid, subxid } => self.spool.abort(xid, subxid),
            Control::Commit { xid, commit_lsn, end_lsn, commit_us } => {
                let replay = self.spool.commit(xid).await?;
                for (relation, name) in &replay.touched {
                    if let Some(name) = name.as_ref().or_else(|| self.names.get(relation)) {
                        shared.touch(name, commit_lsn);
                    }
                }
                let begin = Message::Begin { commit_lsn, commit_us, xid };
                self.note(shared, &begin);
                sender.push(Item::Message(begin, Bytes::new()));
                self.replay = Some((replay, Message::Commit { commit_lsn, end_lsn, commit_us }));
            }
        }
        Ok(())
    }

    /// Keeps a change of an unfinished transaction. Where that is not possible, the stream begins anew without such.
    async fn keep(&mut self, shared: &Shared, xid: u32, payload: &[u8]) -> Result<(), CdcError> {
        // An origin belongs to the whole and has no transaction in it; a type is not needed.
        if matches!(payload.first(), Some(b'O' | b'Y')) {
            return Ok(());
        }
        let (subxid, kind, rest) = Control::split(payload)?;
        let kept = if shared.fault.spool_full.swap(false, Ordering::AcqRel) {
            Err(SpoolError::Full(0))
        } else {
            self.spool.add(xid, subxid, kind, rest).await
        };
        if let Err(error @ (SpoolError::Full(_) | SpoolError::Disk { .. })) = &kept {
            shared.whole_only.store(true, Ordering::Release);
            shared.event(
                Severity::Alert,
                "a big unfinished transaction does not fit on this machine's disk: until the feed is started again, the owner keeps such                  transactions on its own disk until they end. Nothing is lost",
                serde_json::json!({"reason": error.to_string()}),
            );
        }
        Ok(kept?)
    }

    /// Hands over a part of a transaction that was received before it ended.
    async fn replay_some(&mut self, shared: &Shared, sender: &mut Sender) -> Result<(), CdcError> {
        while sender.pending_bytes < PART_BYTES_MAX {
            let Some((replay, _)) = &mut self.replay else { return Ok(()) };
            match replay.next().await? {
                Some(raw) => {
                    // Only what has no messages of its own says things by rows, and that sends nothing early.
                    let message = self.decode(shared, &raw, Lsn::ZERO)?;
                    sender.push(Item::Message(message, raw));
                }
                None => {
                    if let Some((_, commit)) = self.replay.take() {
                        sender.push(Item::Message(commit, Bytes::new()));
                    }
                }
            }
        }
        Ok(())
    }

    fn decode(&mut self, shared: &Shared, payload: &Bytes, start: Lsn) -> Result<Message, CdcError> {
        let message = self.heard(Message::decode(payload)?, start);
        self.note(shared, &message);
        Ok(message)
    }

    /// Rows of the owner's table of messages are what they say; what else happens to that table is nothing.
    fn heard(&mut self, message: Message, lsn: Lsn) -> Message {
        match message {
            Message::Relation(relation) if (relation.schema.as_str(), relation.name.as_str()) == ("understudy", "message") => {
                self.said = Some(relation.oid);
                Message::Type
            }
            Message::Insert { relation, new } if Some(relation) == self.said => match <[Value; 3]>::try_from(new) {
                Ok([_, Value::Text(prefix), Value::Text(content)]) => Message::Logical { transactional: true, lsn, prefix, content },
                _ => Message::Type,
            },
            Message::Update { relation, .. } | Message::Delete { relation, .. } if Some(relation) == self.said => Message::Type,
            message => message,
        }
    }

    fn note(&mut self, shared: &Shared, message: &Message) {
        match message {
            Message::Begin { commit_lsn, commit_us, .. } => {
                self.commit = *commit_lsn;
                // Only the applier clears it, after it has seen this item.
                let _ = shared.oldest_us.compare_exchange(0, *commit_us, Ordering::AcqRel, Ordering::Acquire);
            }
            Message::Relation(relation) => {
                self.touched = None;
                self.names.insert(relation.oid, (relation.schema.clone(), relation.name.clone()));
            }
            Message::Insert { relation, .. } | Message::Update { relation, .. } | Message::Delete { relation, .. } => {
                self.touch(shared, *relation);
            }
            Message::Truncate { relations, .. } => relations.iter().for_each(|relation| self.touch(shared, *relation)),
            Message::Commit { .. } | Message::Origin | Message::Type | Message::Logical { .. } => {}
        }
    }

    fn touch(&mut self, shared: &Shared, relation: u32) {
        if self.touched != Some((relation, self.commit))
            && let Some(name) = self.names.get(&relation)
        {
            shared.touch(name, self.commit);
            self.touched = Some((relation, self.commit));
        }
    }
}

/// The feed is up to date: nothing received waits.
pub(super) fn caught_up(shared: &Shared) {
    shared.oldest_us.store(0, Ordering::Release);
    *lock(&shared.caught_up) = Instant::now();
}
