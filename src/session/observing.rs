//! What a session notes while it relays: counters, the fence, reads captured for comparison, and write transactions
//! remembered for rehearsal. Nothing here waits, and nothing is noted that no shadow wants.

use super::{
    conversation::{Cycle, Finished},
    relay::Relay,
};
use crate::{
    sql::{Class, Kind, SessionEffect, TransactionVerb},
    traffic::{
        comparator::NOISE,
        copies::{Copy, Dropped, RehearsedStep, RehearsedTransaction, SampledRead, SampledStep, SampledTransaction},
        database::monotonic_ms,
        fence::Needed,
        mirror::{MirroredStep, MirroredTransaction},
        route::ShadowRoute,
    },
    wire,
};
use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

/// Bytes of a write transaction remembered for rehearsal; larger ones are left out.
const TRANSACTION_BYTES_MAX: usize = 256 << 10;
/// Statements of a write transaction remembered for rehearsal.
const TRANSACTION_STEPS_MAX: usize = 200;
/// Why what follows COMMIT or ROLLBACK without a new beginning is neither rehearsed nor mirrored.
const GOES_ON: &str = "goes on behind COMMIT or ROLLBACK (AND CHAIN)";

/// A write transaction being remembered.
#[derive(Debug)]
pub(super) struct Remembered {
    steps: Vec<RehearsedStep>,
    bytes: usize,
    left_out: Option<&'static str>,
    /// Why it cannot be run again and committed.
    not_mirrored: Option<&'static str>,
    /// How it ended, if COMMIT or ROLLBACK was seen.
    committed: Option<bool>,
    /// Some statement of it failed.
    failed: bool,
    /// Steps that failed on the owner, by number.
    failures: Vec<usize>,
    wrote: bool,
    began_at: crate::lsn::Lsn,
    needed: Needed,
}

/// A READ ONLY transaction whose answers are to be compared.
pub(super) struct Reading {
    shadows: Drawn,
    steps: Vec<SampledStep>,
    bytes: usize,
    /// A statement of it has failed: what follows would only say so.
    failed: bool,
}

/// Shadows that shall run a read, and how many times.
pub(super) type Drawn = Vec<(Arc<ShadowRoute>, u64)>;

/// Statements of a READ ONLY transaction that are copied.
const READING_STEPS_MAX: usize = 64;

/// Whether a copy would be of any use, counted where it would not: nothing is captured for a shadow that is stopped or gone.
fn may_copy(shadow: &ShadowRoute, session: u64) -> bool {
    let observations = &shadow.observations;
    let reason = if !shadow.copy_breaker.allows(monotonic_ms()) {
        observations.unavailable(Instant::now());
        "dropped: shadow cannot be reached"
    } else if !shadow.queue.has_room(session) {
        Dropped::QueueFull.as_str()
    } else {
        return true;
    };
    observations.sampled.increment();
    observations.dropped.increment();
    observations.compare_reasons.count(reason);
    false
}

impl Relay {
    pub(super) fn begin_transaction(&mut self) {
        self.serve_next = true;
        self.start_remembering();
    }

    fn start_remembering(&mut self) {
        let route = self.database.route.load();
        self.conversation.recording = route.shadows.iter().any(|shadow| shadow.is_interested());
        let rehearse = route.shadows.iter().any(|shadow| shadow.rehearse.load(Ordering::Relaxed) && shadow.in_step.load(Ordering::Relaxed));
        let mirrored = route.shadows.iter().any(|shadow| shadow.mirror.is_recording());
        self.remembered = (rehearse || mirrored).then(|| Remembered {
            steps: Vec::new(),
            bytes: 0,
            left_out: None,
            not_mirrored: None,
            committed: None,
            failed: false,
            failures: Vec::new(),
            wrote: false,
            began_at: self.database.ticks.newest(),
            needed: self.database.ticks.needed_now(),
        });
    }

    /// Draws whether the cycle just taken is a read to be compared, or begins a transaction of such.
    pub(super) fn maybe_sample(&mut self) {
        if !self.conversation.recording {
            return;
        }
        if self.reading.is_some() {
            return self.conversation.capture_newest();
        }
        if self.conversation.status() != wire::backend::TransactionStatus::Idle {
            return;
        }
        let Some(cycle) = self.conversation.newest() else { return };
        let [executed] = cycle.executed.as_slice() else { return };
        let begins = executed.class.kind == Kind::Transaction(TransactionVerb::Begin { read_only: true });
        let reads = executed.class.kind == Kind::Read && !cycle.wrote;
        if !(begins || reads) || cycle.opaque || !executed.class.single {
            return;
        }
        let fingerprint = executed.class.fingerprint;
        if !self.database.knows_facts() || !self.conversation.pins.is_empty() || !self.conversation.is_alone() {
            return;
        }
        self.draw_shadows(fingerprint, begins);
        if self.drawn.is_empty() {
            return;
        }
        if begins {
            let shadows = std::mem::take(&mut self.drawn);
            self.reading = Some(Reading { shadows, steps: Vec::new(), bytes: 0, failed: false });
        } else {
            self.conversation.capture_newest();
        }
    }

    fn draw_shadows(&mut self, fingerprint: u64, whole_transaction: bool) {
        let route = self.database.route.load();
        let (draw, session) = (&mut self.sample_draw, self.info.id);
        self.drawn.clear();
        let mut now_ms = None;
        for shadow in route.shadows.iter().filter(|shadow| shadow.in_step.load(Ordering::Relaxed)) {
            if shadow.sample_reads.is_zero() {
                continue;
            }
            let now_ms = *now_ms.get_or_insert_with(monotonic_ms);
            if shadow.quota.is_noise(fingerprint, now_ms) {
                shadow.observations.compare_reasons.count(NOISE);
                continue;
            }
            let mut times = shadow.sample_reads.draw(|| draw.draw());
            if times == 0 && !whole_transaction && shadow.quota.is_unseen(fingerprint, now_ms) {
                times = 1;
            }
            if times == 0 || !may_copy(shadow, session) {
                continue;
            }
            let per_second = shadow.sample_per_query.load(Ordering::Relaxed);
            if shadow.quota.take(fingerprint, now_ms, per_second, shadow.queue.is_pressed(session)) {
                self.drawn.push((shadow.clone(), times));
            } else {
                let observations = &shadow.observations;
                observations.sampled.increment();
                observations.dropped.increment();
                observations.compare_reasons.count("dropped: a frequent statement left its place to others");
            }
        }
    }

    /// Adds a cycle of a READ ONLY transaction that is being copied.
    fn read_on(&mut self, cycle: &mut Cycle, latency: Duration) {
        let Some(reading) = &mut self.reading else { return };
        let answer = cycle.capture.take();
        let step = match cycle.executed.as_slice() {
            _ if reading.failed => None,
            // a statement prepared or closed
            [] if !cycle.opaque && !cycle.failed => None,
            [executed] if !cycle.opaque && executed.class.single => {
                let class = &executed.class;
                let (as_is, compared) = match class.kind {
                    Kind::Transaction(TransactionVerb::Begin { .. }) => (true, false),
                    Kind::Read => (true, true),
                    Kind::Session(SessionEffect::DeclareCursor) => (true, class.returns_rows),
                    // SET LOCAL, SET TRANSACTION
                    Kind::Session(SessionEffect::Set) if class.session_effects.is_empty() => (true, false),
                    Kind::Session(SessionEffect::Other) if class.session_effects.is_empty() => (!class.returns_rows, false),
                    Kind::Transaction(TransactionVerb::Commit | TransactionVerb::Rollback) => (false, false),
                    _ => return self.stop_reading("a READ ONLY transaction with statements that cannot be copied"),
                };
                reading.failed = cycle.failed;
                as_is.then(|| SampledStep {
                    operation: executed.operation.clone(),
                    class: class.clone(),
                    answer: answer.filter(|_| compared),
                    owner_latency: latency,
                })
            }
            _ => return self.stop_reading("a READ ONLY transaction with several statements in one message"),
        };
        let Some(step) = step else { return };
        reading.bytes += step.operation.bytes();
        if reading.bytes > TRANSACTION_BYTES_MAX || reading.steps.len() >= READING_STEPS_MAX {
            return self.stop_reading("a READ ONLY transaction too large to be copied");
        }
        reading.steps.push(step);
    }

    fn stop_reading(&mut self, reason: &'static str) {
        for (shadow, _) in self.reading.take().into_iter().flat_map(|reading| reading.shadows) {
            shadow.observations.compare_reasons.count(reason);
        }
    }

    /// Hands the READ ONLY transaction that has ended over.
    fn offer_reading(&mut self) {
        let Some(Reading { shadows, steps, .. }) = self.reading.take() else { return };
        let needed = self.database.ticks.needed_now();
        let transaction = SampledTransaction { identity: self.identity.clone(), steps, needed };
        for (shadow, times) in shadows {
            for _ in 0..times {
                let copy = Copy::Reads(Box::new(transaction.clone()));
                let answers = copy.answers();
                if answers == 0 {
                    break;
                }
                shadow.observations.sampled.add(answers);
                if let Err(dropped) = shadow.queue.offer(self.info.id, copy) {
                    shadow.observations.dropped.add(answers);
                    shadow.observations.compare_reasons.count(dropped.as_str());
                }
            }
        }
    }

    pub(super) fn finished(&mut self, finished: Finished) {
        let Finished { mut cycle, status, state_changed } = finished;
        let latency = cycle.latency();
        self.database.requests.increment();
        self.info.requests.fetch_add(1, Ordering::Relaxed);
        self.database.latency.record(latency);
        if state_changed {
            self.state_version += 1;
            *self.info.pins.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = self.conversation.pins.clone();
        }
        if cycle.wrote {
            self.needed = self.database.ticks.needed_now();
            let changes_schema = cycle.changes_schema;
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
            shadow.breaker.outcome(cycle.failed, monotonic_ms());
        }
        if !cycle.wrote && !cycle.failed && cycle.executed.iter().all(|executed| executed.class.kind == Kind::Read) {
            let route = self.database.route.load();
            for shadow in route.shadows.iter().filter(|shadow| shadow.serve_reads.get() > 0.0) {
                shadow.observations.owner_outcome(latency, Instant::now());
            }
        }
        self.read_on(&mut cycle, latency);
        self.remember(cycle, latency);
        if status != wire::backend::TransactionStatus::Idle {
            self.chained();
        }
        if status == wire::backend::TransactionStatus::Idle {
            self.database.transactions.increment();
            self.offer_reading();
            self.offer_transaction();
            if self.conversation.at_boundary() {
                self.leave();
            } else {
                // The client has sent the next one already.
                self.start_remembering();
            }
        }
    }

    /// Hands a captured read over, or adds the cycle to the transaction that is being remembered.
    fn remember(&mut self, cycle: Cycle, latency: Duration) {
        let alone = cycle.executed.len() == 1;
        if let Some(answer) = cycle.capture {
            let Some(executed) = cycle.executed.into_iter().next() else { return };
            if answer.sqlstate.as_deref() == Some("57014") {
                // cancelled, or out of time: a shadow shall not do for nobody what the owner has given up
                for (shadow, _) in self.drawn.drain(..) {
                    shadow.observations.compare_reasons.count("not copied: the client has cancelled it");
                }
                return;
            }
            // what other sessions committed before this answer may be in it as well
            let needed = self.database.ticks.needed_now();
            for (shadow, times) in self.drawn.drain(..) {
                let read = SampledRead {
                    identity: self.identity.clone(),
                    operation: executed.operation.clone(),
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
        let cycle_failed = cycle.failed;
        if cycle.opaque {
            remembered.left_out = Some("message too large or of a kind that is not copied");
            remembered.not_mirrored = remembered.left_out;
        }
        if cycle.failed {
            remembered.left_out = Some("failed on the owner");
            remembered.failed = true;
            if !alone {
                remembered.not_mirrored = Some("failed in a message with others");
            }
        }
        remembered.wrote |= cycle.wrote;
        for executed in cycle.executed {
            if remembered.committed.is_some() {
                (remembered.left_out, remembered.not_mirrored) = (Some(GOES_ON), Some(GOES_ON));
            }
            if let Kind::Transaction(verb) = executed.class.kind {
                match verb {
                    _ if !executed.class.single => remembered.not_mirrored = Some("several statements in one message"),
                    TransactionVerb::Commit => {
                        let committed = executed.tags.first().is_none_or(|tag| &tag[..] != b"ROLLBACK");
                        remembered.committed = Some(committed || remembered.committed == Some(true));
                    }
                    TransactionVerb::Rollback => remembered.committed = Some(remembered.committed == Some(true)),
                    TransactionVerb::Prepared => remembered.not_mirrored = Some("two-phase commit"),
                    TransactionVerb::Begin { .. } | TransactionVerb::Savepoint => {}
                }
                if matches!(verb, TransactionVerb::Rollback) {
                    remembered.left_out = Some("rolled back by the client");
                    continue;
                }
            } else if let Some(reason) = not_mirrored(&executed.class) {
                remembered.not_mirrored = Some(reason);
            }
            match executed.class.kind {
                // `RELEASE s; COMMIT` counts as its first verb: on the shadow its COMMIT would be carried out
                Kind::Transaction(_) if !executed.class.single => remembered.left_out = Some("several statements in one message"),
                Kind::Transaction(TransactionVerb::Commit) => continue,
                Kind::Transaction(TransactionVerb::Prepared) => remembered.left_out = Some("two-phase commit"),
                Kind::Transaction(_) | Kind::Read => {}
                // SHOW, the catalog, currval(): answered by the owner alone, and nothing depends on it
                Kind::Session(SessionEffect::Other) if is_answered_by_owner(&executed.class) => continue,
                // SET CONSTRAINTS: what follows may depend on it
                Kind::Session(SessionEffect::Other) if executed.class.is_idle() && executed.class.single => {}
                // SET LOCAL ends with the transaction, here and there; cursors too
                Kind::Session(SessionEffect::Set) if executed.class.session_effects.is_empty() && executed.class.single => {}
                Kind::Session(SessionEffect::DeclareCursor) if executed.class.single => {}
                Kind::Session(SessionEffect::AdvisoryLock) => remembered.left_out = Some("advisory locks belong to the session"),
                Kind::Session(SessionEffect::Other) => remembered.left_out = Some("reads what is not replicated"),
                Kind::SchemaChange => remembered.left_out = Some("schema changes reach the shadow with the feed"),
                Kind::Copy => remembered.left_out = Some("COPY: its data are not remembered"),
                _ if !executed.class.single => remembered.left_out = Some("several statements in one message"),
                _ if !executed.class.rehearsable => remembered.left_out = executed.class.left_out.or(Some("cannot be rolled back")),
                _ => {}
            }
            remembered.bytes += executed.operation.bytes();
            if remembered.bytes > TRANSACTION_BYTES_MAX || remembered.steps.len() >= TRANSACTION_STEPS_MAX {
                remembered.left_out = Some("transaction too large");
                remembered.not_mirrored = remembered.left_out;
                remembered.steps.clear();
                continue;
            }
            if cycle_failed {
                remembered.failures.push(remembered.steps.len());
            }
            remembered.steps.push(RehearsedStep {
                operation: executed.operation,
                class: executed.class,
                tags: executed.tags,
                owner_latency: alone.then_some(latency),
            });
        }
    }

    /// A transaction that has ended and goes on in the next one: what was committed is counted now, whatever becomes of the rest.
    fn chained(&mut self) {
        let Some(remembered) = &mut self.remembered else { return };
        let Some(committed) = remembered.committed.take() else { return };
        (remembered.left_out, remembered.not_mirrored) = (Some(GOES_ON), Some(GOES_ON));
        if !std::mem::take(&mut remembered.wrote) || !committed {
            return;
        }
        let route = self.database.route.load();
        for shadow in &route.shadows {
            if shadow.mirror.is_recording() {
                shadow.mirror.diverge(GOES_ON);
            }
            if shadow.rehearse.load(Ordering::Relaxed) {
                shadow.observations.left_out.count(GOES_ON);
            }
        }
    }

    /// Hands the transaction to the shadows that live by mirrored writes.
    fn mirror(&self, remembered: &Remembered) {
        let route = self.database.route.load();
        for shadow in route.shadows.iter().filter(|shadow| shadow.mirror.is_recording()) {
            if !remembered.wrote {
                continue;
            }
            // Without COMMIT or ROLLBACK: a statement of its own, which the server commits unless it fails.
            let explicit = remembered.steps.first().is_some_and(|step| matches!(step.class.kind, Kind::Transaction(_)));
            let committed = remembered.committed.unwrap_or(!explicit && !remembered.failed);
            let state = (!self.conversation.pins.is_empty()).then_some("session state that the shadow does not share");
            match remembered.not_mirrored.or(state) {
                Some(reason) if committed || remembered.committed.is_none() && explicit => shadow.mirror.diverge(reason),
                Some(_) => {}
                None => {
                    let steps = remembered.steps.iter().enumerate();
                    let step = |(number, step): (usize, &RehearsedStep)| MirroredStep {
                        step: step.clone(),
                        failed: remembered.failures.contains(&number),
                    };
                    shadow.mirror.offer(MirroredTransaction {
                        identity: self.identity.clone(),
                        steps: steps.map(step).collect(),
                        committed,
                    });
                }
            }
        }
    }

    fn offer_transaction(&mut self) {
        let Some(remembered) = self.remembered.take() else { return };
        self.mirror(&remembered);
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
}

/// SHOW, `currval()`, a query of the catalog.
fn is_answered_by_owner(class: &Class) -> bool {
    class.session_effects.is_empty()
        && class.returns_rows
        && class.tables.iter().all(|table| ["pg_", "information_schema."].iter().any(|catalog| table.starts_with(catalog)))
}

/// Why a statement cannot be run again elsewhere and committed there.
fn not_mirrored(class: &Class) -> Option<&'static str> {
    match class.kind {
        Kind::Read | Kind::Session(_) | Kind::Transaction(_) => None,
        Kind::Copy if class.text.to_ascii_uppercase().contains(" TO STDOUT") => None,
        Kind::Copy => Some("the data of a COPY are not remembered"),
        Kind::Write | Kind::SchemaChange | Kind::Unknown if !class.single => Some("several statements in one message"),
        Kind::Write | Kind::SchemaChange | Kind::Unknown => class.left_out.filter(|reason| reason.contains("third server")),
    }
}
