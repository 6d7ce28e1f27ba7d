//! What a session notes while it relays: counters, the fence, reads captured for comparison, and write transactions
//! remembered for rehearsal. Nothing here waits, and nothing is noted that no shadow wants.

use super::{
    conversation::{Cycle, Finished},
    relay::Relay,
};
use crate::{
    sql::{Class, Kind, TransactionVerb},
    traffic::{
        copies::{Copy, Dropped, RehearsedStep, RehearsedTransaction, SampledRead},
        database::monotonic_ms,
        fence::Needed,
        mirror::{MirroredStep, MirroredTransaction},
        route::ShadowRoute,
    },
    wire,
};
use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

/// Bytes of a write transaction remembered for rehearsal; larger ones are left out.
const TRANSACTION_BYTES_MAX: usize = 256 << 10;
/// Statements of a write transaction remembered for rehearsal.
const TRANSACTION_STEPS_MAX: usize = 200;

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

    /// Draws whether the cycle just taken is a read to be compared.
    pub(super) fn maybe_sample(&mut self) {
        if !self.conversation.recording || self.conversation.status() != wire::backend::TransactionStatus::Idle {
            return;
        }
        let route = self.database.route.load();
        let Some(cycle) = self.conversation.newest() else { return };
        let is_read = !cycle.wrote && !cycle.opaque && cycle.executed.len() == 1 && cycle.executed.iter().all(|e| e.class.single);
        if !is_read || !self.database.knows_facts() || !self.conversation.pins.is_empty() || !self.conversation.is_alone() {
            return;
        }
        let draw = &mut self.sample_draw;
        self.drawn.clear();
        for shadow in route.shadows.iter().filter(|shadow| shadow.in_step.load(Ordering::Relaxed)) {
            let times = shadow.sample_reads.draw(|| draw.draw());
            if times > 0 && may_copy(shadow, self.info.id) {
                self.drawn.push((shadow.clone(), times));
            }
        }
        if !self.drawn.is_empty() {
            self.conversation.capture_newest();
        }
    }

    pub(super) fn finished(&mut self, finished: Finished) {
        let Finished { cycle, status, state_changed } = finished;
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
            if let Kind::Transaction(verb) = executed.class.kind {
                match verb {
                    _ if !executed.class.single => remembered.not_mirrored = Some("several statements in one message"),
                    TransactionVerb::Commit => remembered.committed = Some(executed.tags.first().is_none_or(|tag| &tag[..] != b"ROLLBACK")),
                    TransactionVerb::Rollback => remembered.committed = Some(false),
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
