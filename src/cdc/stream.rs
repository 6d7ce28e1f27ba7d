//! The reader: owns the replication connection, answers the server, decodes, and hands items to the applier through a queue
//! that is bounded by bytes. It never waits for the applier with its hands full: a full queue stops the reading, not the answers.

use super::{
    CdcError,
    names::{feed_name, ident},
    pgoutput::{Envelope, Message, encode_status},
    session,
    shared::{Shared, TableName, lock, now_us},
};
use crate::{
    backend::{BackendError, Connection},
    lsn::Lsn,
    wire::{backend::ErrorFields, frontend, put},
};
use bytes::{Bytes, BytesMut};
use std::{
    collections::HashMap,
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
    items: mpsc::UnboundedReceiver<Item>,
    budget: Arc<Budget>,
    peeked: Option<Item>,
}

impl Queue {
    /// The next item; `None`: the reader ended. Cancel-safe.
    pub async fn next(&mut self) -> Option<Item> {
        if let Some(item) = self.peeked.take() {
            return Some(item);
        }
        let item = self.items.recv().await?;
        self.budget.remove(cost(&item));
        Some(item)
    }

    /// Looks at the next item, waiting for it. For the inside of a transaction, where there always is one.
    pub async fn peek_next(&mut self) -> Option<&Item> {
        if self.peeked.is_none() {
            self.peeked = self.next().await;
        }
        self.peeked.as_ref()
    }

    /// Looks at the next item if one is there already.
    pub fn peek(&mut self) -> Option<&Item> {
        if self.peeked.is_none() {
            let item = self.items.try_recv().ok()?;
            self.budget.remove(cost(&item));
            self.peeked = Some(item);
        }
        self.peeked.as_ref()
    }
}

/// A queue's two ends.
pub(super) fn queue() -> (Sender, Queue) {
    let (sender, items) = mpsc::unbounded_channel();
    let budget = Arc::new(Budget::default());
    (Sender { items: sender, budget: Arc::clone(&budget) }, Queue { items, budget, peeked: None })
}

/// The reader's end of the queue.
pub(super) struct Sender {
    items: mpsc::UnboundedSender<Item>,
    budget: Arc<Budget>,
}

/// Opens the stream from `start` (the server begins at the slot's confirmed position if that is later).
pub(super) async fn open(shared: &Shared, start: Lsn) -> Result<Connection, CdcError> {
    let feed = feed_name(&shared.spec);
    let deadline = Instant::now() + SLOT_BUSY;
    loop {
        let mut connection = session::connect_replication(&shared.spec.from).await?;
        let command = format!(
            "START_REPLICATION SLOT {} LOGICAL {start} (proto_version '1', publication_names '{}', messages 'true')",
            ident(&feed),
            ident(&feed)
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
                            "the replication slot {feed} cannot be used any more ({}): changes are lost, so the shadow must be \
                             copied again (drop its database and start the feed anew)",
                            fields.message
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
pub(super) async fn read(shared: Arc<Shared>, mut connection: Connection, sender: Sender) -> Result<(), CdcError> {
    let mut status = interval(STATUS_PERIOD);
    status.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut hurry = interval(HURRY_PERIOD);
    hurry.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut probe = interval(PROBE_PERIOD);
    probe.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut decoder = Decoder::default();
    let broke = |source| CdcError::Backend { what: "follow the change stream", source };
    loop {
        let full = sender.budget.full();
        let waiting = shared.waiters.load(Ordering::Acquire) > 0;
        let behind = !shared.is_streaming();
        let message = tokio::select! {
            message = connection.receive(), if !full => message.map_err(broke)?,
            () = sender.budget.drained.notified(), if full => continue,
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
        };
        match message.tag {
            b'd' => match Envelope::decode(&message.body)? {
                Envelope::Data { server_end, payload } => {
                    shared.received.advance(server_end);
                    let item = Item::Message(decoder.decode(&shared, &payload)?, payload);
                    sender.budget.add(cost(&item));
                    if sender.items.send(item).is_err() {
                        return Ok(());
                    }
                }
                Envelope::KeepAlive { sent, reply } => {
                    shared.received.advance(sent);
                    let item = Item::KeepAlive(sent);
                    sender.budget.add(cost(&item));
                    if sender.items.send(item).is_err() {
                        return Ok(());
                    }
                    if reply {
                        send_status(&shared, &mut connection, false).await?;
                    }
                }
            },
            b'E' => {
                let fields = ErrorFields::parse(&message.body);
                // Decoding old WAL with a publication that was made after it.
                if fields.code == "42704" && fields.message.contains("publication") {
                    return Err(CdcError::Setup(format!(
                        "{}: the publication was dropped while the feed needed it; the shadow must be copied again",
                        fields.message
                    )));
                }
                return Err(broke(BackendError::Server(fields)));
            }
            b'c' => return Err(CdcError::Protocol("the server ended the change stream (it is shutting down)".into())),
            _ => {}
        }
    }
}

async fn send_status(shared: &Shared, connection: &mut Connection, reply: bool) -> Result<(), CdcError> {
    let body = encode_status(shared.received.load(), shared.confirmed.load(), now_us(), reply);
    let mut message = BytesMut::with_capacity(body.len() + 5);
    put(&mut message, b'd', |b| b.extend_from_slice(&body));
    connection.send(&message).await.map_err(|source| CdcError::Backend { what: "answer the server", source })
}

/// Decodes and keeps note, at the moment of receipt, of what each table's newest change is.
#[derive(Default)]
struct Decoder {
    names: HashMap<u32, TableName>,
    commit: Lsn,
}

impl Decoder {
    fn decode(&mut self, shared: &Shared, payload: &Bytes) -> Result<Message, CdcError> {
        let message = Message::decode(payload)?;
        match &message {
            Message::Begin { commit_lsn, commit_us, .. } => {
                self.commit = *commit_lsn;
                // Only the applier clears it, after it has seen this item.
                let _ = shared.oldest_us.compare_exchange(0, *commit_us, Ordering::AcqRel, Ordering::Acquire);
            }
            Message::Relation(relation) => {
                self.names.insert(relation.oid, (relation.schema.clone(), relation.name.clone()));
            }
            Message::Insert { relation, .. } | Message::Update { relation, .. } | Message::Delete { relation, .. } => {
                self.touch(shared, *relation);
            }
            Message::Truncate { relations, .. } => relations.iter().for_each(|relation| self.touch(shared, *relation)),
            Message::Commit { .. } | Message::Origin | Message::Type | Message::Logical { .. } => {}
        }
        Ok(message)
    }

    fn touch(&self, shared: &Shared, relation: u32) {
        if let Some(name) = self.names.get(&relation) {
            shared.touch(name, self.commit);
        }
    }
}

/// The feed is up to date: nothing received waits.
pub(super) fn caught_up(shared: &Shared) {
    shared.oldest_us.store(0, Ordering::Release);
    *lock(&shared.caught_up) = Instant::now();
}
