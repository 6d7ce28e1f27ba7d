//! A read answered by a shadow. The answer is held back until it is whole (or too large to hold), so that whatever goes
//! wrong on the shadow ends in the owner's answer instead of an error. A slow answer is not waited for: after the
//! shadow's `hedge_after` the owner is asked.

use super::{
    conversation::{WholeCycle, cycle_length, whole_cycle},
    front_door::CancelTarget,
    moving::Attachment,
    relay::Relay,
};
use crate::{
    backend,
    config::Consistency,
    sql::{Class, Kind, LookUp},
    traffic::{answer::FIRST_USER_OID, cancelling::Place, database::monotonic_ms, fence::Needed, route::ShadowRoute},
    wire::{
        self,
        backend::{RowDescription, put_error},
        frontend::Parse,
        put, put_cstr,
    },
};
use bytes::{Bytes, BytesMut};
use std::{
    io,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

/// Longest request that is served elsewhere.
const REQUEST_BYTES_MAX: usize = 64 << 10;
/// Statements that one session keeps prepared on a shadow.
const PREPARED_MAX: usize = 256;
/// An answer is held back up to this size; a larger one is asked for again on the owner, where it streams.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// A read that a shadow may answer.
pub(super) struct Plan {
    shadow: Arc<ShadowRoute>,
    cycle: WholeCycle,
    class: Arc<Class>,
    /// The prepared statement that an Extended cycle binds, if it does not parse one itself.
    statement: Option<Arc<Parse>>,
    /// The shadow must have passed this first.
    wait_for: Option<Needed>,
}

enum Failure {
    /// The shadow or the way to it.
    Broken(&'static str),
    /// It answered with an error; the owner will tell whether it is the shadow's fault.
    Answered,
    /// Nothing is wrong, but it cannot be served.
    NotServable(&'static str),
}

impl Relay {
    /// Decides whether the cycle at the front of the client's buffer is answered by a shadow.
    pub(super) fn plan_to_serve(&mut self) -> Option<Plan> {
        if !self.database.route.load().shadows.iter().any(|shadow| shadow.serve_reads.get() > 0.0) {
            return None;
        }
        let route = self.route();
        let cycle = whole_cycle(&self.from_client, REQUEST_BYTES_MAX)?;
        let known = |text: &[u8]| match self.database.classifier.look_up(text) {
            LookUp::Known(class) => Some(class),
            LookUp::Later(_) => None, // the owner answers; the next one like it finds the class in the cache
        };
        let (class, statement) = match &cycle {
            WholeCycle::Simple { text, .. } => (known(text)?, None),
            WholeCycle::Extended { parse: Some(parse), .. } => (known(&parse.query)?, None),
            WholeCycle::Extended { bind, .. } => {
                let statement = self.conversation.statement(&bind.statement)?;
                // what it reaches may have changed since it was parsed
                (known(&statement.parse.query)?, Some(statement.parse.clone()))
            }
        };
        if class.kind != Kind::Read || !class.single || !self.database.knows_facts() {
            return None;
        }
        let mut draw = None;
        // Shares of several shadows stand beside each other.
        let mut from = 0;
        for shadow in &route.shadows {
            let share = shadow.serve_reads.hundredths();
            if share == 0 {
                continue;
            }
            let mine = from..from + share;
            from = mine.end;
            if shadow.holds_back(class.fingerprint) {
                shadow.observations.fallback_reasons.count("not proven yet: the ladder moves other statements first");
                continue;
            }
            shadow.observations.candidates.increment();
            let attached = self.attachments.get(&shadow.target).is_some();
            if !attached {
                // opened for the reads to come: this one is not kept waiting
                let next = route.standby.as_ref() == Some(&shadow.target);
                self.attachments.open(&self.database, &self.info, &self.identity, &shadow.target, false, next);
            }
            if !mine.contains(draw.get_or_insert_with(|| self.serve_draw.draw())) {
                continue;
            }
            if shadow.differs(&class.tables) {
                shadow.observations.fallback_reasons.count("the shadow has these tables in another shape: kept on the owner");
                continue;
            }
            if !shadow.in_step.load(Ordering::SeqCst) || !shadow.breaker.allows(monotonic_ms()) {
                shadow.observations.fallback_reasons.count("shadow not in step or failing: kept on the owner");
                continue;
            }
            let (fresh, wait_for) = match shadow.serving.load().consistency {
                Consistency::Session => (shadow.fence.allows(self.needed), None),
                Consistency::Bounded(bound) => (shadow.fence.allows(self.needed) && shadow.fence.is_within(bound, monotonic_ms()), None),
                // What this session has written lies before it.
                Consistency::Global => (true, Some(self.database.ticks.demand())),
            };
            if !fresh {
                shadow.observations.fenced.increment();
                continue;
            }
            let state_version = self.state_version;
            match self.attachments.get(&shadow.target) {
                Some(attachment) if attachment.state_version == state_version && !attachment.refused.contains(&class.fingerprint) => {}
                Some(_) | None => continue,
            }
            return Some(Plan { shadow: shadow.clone(), cycle, class, statement, wait_for });
        }
        None
    }

    /// Serves, or leaves the cycle at the front of the buffer for the owner.
    pub(super) async fn serve(&mut self, plan: Plan) -> Result<(), io::Error> {
        if !self.enter() {
            return Ok(()); // the gate has closed or the owner changed: looked at again
        }
        let Some(mut attachment) = self.attachments.take(&plan.shadow.target) else {
            self.leave();
            return Ok(());
        };
        let hedge_after = plan.shadow.serving.load().hedge_after;
        let mut time_left = hedge_after;
        if let Some(needed) = plan.wait_for {
            let began = Instant::now();
            self.info.cancelling.begin(Place::Gate);
            let fresh = tokio::time::timeout(hedge_after, plan.shadow.fence.wait(needed)).await.is_ok();
            let cancelled = self.info.cancelling.end();
            time_left = hedge_after.saturating_sub(began.elapsed());
            // An answer that had hardly time left would count against the shadow, where only the feed was slow.
            let fresh = fresh && time_left >= hedge_after / 2;
            if cancelled || !fresh {
                self.attachments.put_back(attachment);
                if cancelled {
                    self.cancel_front();
                } else {
                    plan.shadow.observations.fenced.increment();
                    self.keep_on_owner(None);
                }
                self.leave();
                return Ok(());
            }
        }
        // Behind the fence: a table that is set aside is told of before the fence passes what its rows miss.
        if plan.shadow.sets_aside(&plan.class) {
            plan.shadow.observations.fallback_reasons.count("rows that it reads are set aside by the feed: kept on the owner");
            self.attachments.put_back(attachment);
            self.keep_on_owner(None);
            self.leave();
            return Ok(());
        }
        let began = Instant::now();
        let previous = self.aim_cancel(CancelTarget::Server(attachment.server.backend.clone()));
        self.info.cancelling.begin(Place::Shadow);
        let outcome = match tokio::time::timeout(time_left, attachment.answer(&plan)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Failure::Broken("no answer within hedge_after")),
        };
        self.aim_cancel(previous);
        let cancelled = self.info.cancelling.end();
        let latency = began.elapsed();
        let observations = &plan.shadow.observations;
        let now = Instant::now();
        match outcome {
            Ok(answer) => {
                let (WholeCycle::Simple { len, .. } | WholeCycle::Extended { len, .. }) = plan.cycle;
                drop(self.from_client.split_to(len));
                self.to_client.extend_from_slice(&answer);
                observations.served.increment();
                observations.shadow_outcome(latency, false, now);
                observations.shadow_latency.record(latency);
                plan.shadow.breaker.outcome(true, monotonic_ms());
                self.database.requests.increment();
                self.database.transactions.increment();
                self.info.requests.fetch_add(1, Ordering::Relaxed);
                if let WholeCycle::Extended { parse: Some(parse), .. } = plan.cycle {
                    self.conversation.served_unnamed(Arc::new(parse), plan.class);
                }
                self.attachments.put_back(attachment);
            }
            Err(Failure::NotServable(reason)) => {
                observations.fallback_reasons.count(reason);
                attachment.refuse(plan.class.fingerprint);
                self.attachments.put_back(attachment);
                self.keep_on_owner(None);
            }
            Err(Failure::Answered) if cancelled => {
                // what the client wanted: the owner is not asked
                self.attachments.put_back(attachment);
                self.cancel_front();
            }
            Err(Failure::Answered) => {
                // whose fault it is, the owner's answer tells
                observations.fallbacks.increment();
                self.attachments.put_back(attachment);
                self.keep_on_owner(Some(plan.shadow.clone()));
            }
            Err(Failure::Broken(reason)) => {
                observations.fallbacks.increment();
                observations.fallback_reasons.count(reason);
                observations.shadow_outcome(latency, true, now);
                plan.shadow.breaker.outcome(false, monotonic_ms());
                let backend = attachment.server.backend.clone();
                drop(attachment);
                // the abandoned statement must not go on burning the shadow
                tokio::spawn(async move {
                    let _ =
                        tokio::time::timeout(Duration::from_secs(1), backend::cancel(&backend.target.url, backend.pid, &backend.key)).await;
                });
                self.keep_on_owner(None);
            }
        }
        self.leave();
        Ok(())
    }

    /// Answers the request at the front of the client's buffer, of which no server knows, as a server does that was asked to
    /// cancel it. One that has not come whole stays: its end is not known.
    pub(super) fn cancel_front(&mut self) {
        let Some(len) = cycle_length(&self.from_client) else { return };
        drop(self.from_client.split_to(len));
        put_error(&mut self.to_client, "ERROR", "57014", "canceling statement due to user request", None);
        put(&mut self.to_client, b'Z', |b| b.extend_from_slice(b"I"));
        self.info.requests.fetch_add(1, Ordering::Relaxed);
        self.serve_next = true;
    }

    /// The next cycle goes to the owner whatever the draw says.
    fn keep_on_owner(&mut self, blame: Option<Arc<ShadowRoute>>) {
        self.serve_next = false;
        self.fallback_of = blame;
    }
}

impl Attachment {
    /// Asks the shadow and returns the bytes for the client, ReadyForQuery included.
    async fn answer(&mut self, plan: &Plan) -> Result<BytesMut, Failure> {
        let broken = |_| Failure::Broken("connection to the shadow broke");
        let mut request = BytesMut::new();
        match &plan.cycle {
            WholeCycle::Simple { text, .. } => wire::frontend::put_query(&mut request, text),
            WholeCycle::Extended { parse, bind, describe, limit, .. } => {
                let own_name: Bytes = match (parse, &plan.statement) {
                    (Some(parse), _) => {
                        parse.put_as(&mut request, b"");
                        Bytes::new()
                    }
                    (None, Some(statement)) => self.prepare(statement).await?,
                    (None, None) => return Err(Failure::NotServable("unknown statement")),
                };
                bind.put_as(&mut request, b"", &own_name);
                if *describe {
                    put(&mut request, b'D', |b| b.extend_from_slice(b"P\0"));
                }
                put(&mut request, b'E', |b| {
                    put_cstr(b, b"");
                    b.extend_from_slice(&limit.to_be_bytes());
                });
                wire::frontend::put_sync(&mut request);
            }
        }
        self.send(&request).await.map_err(broken)?;
        let mut answer = BytesMut::new();
        let mut failed = None;
        loop {
            let message = self.receive().await.map_err(broken)?;
            match message.tag {
                b'E' => failed = failed.or(Some(Failure::Answered)),
                b'T' if describes_user_types(&message.body) => {
                    failed = Some(Failure::NotServable("answer has types whose oids differ between servers"))
                }
                b'S' | b'A' => continue, // of this connection, not of the client's
                b'Z' => {
                    return match failed {
                        Some(failure) => Err(failure),
                        None => {
                            put(&mut answer, b'Z', |b| b.extend_from_slice(&message.body));
                            Ok(answer)
                        }
                    };
                }
                _ => {}
            }
            if failed.is_none() {
                put(&mut answer, message.tag, |b| b.extend_from_slice(&message.body));
                if answer.len() > ANSWER_BYTES_MAX {
                    // read to its end and not kept: it is the answer that is large, nothing is wrong with the shadow
                    answer = BytesMut::new();
                    failed = Some(Failure::NotServable("answer too large to be held back"));
                }
            }
        }
    }

    /// Prepares a statement of the client here, under a name of our own.
    async fn prepare(&mut self, statement: &Arc<Parse>) -> Result<Bytes, Failure> {
        if let Some(name) = self.prepared.get(&(statement.query.clone(), statement.types.clone())) {
            return Ok(name.clone());
        }
        let mut request = BytesMut::new();
        if self.prepared.len() >= PREPARED_MAX {
            for (_, name) in self.prepared.drain() {
                close_statement(&mut request, &name);
            }
        }
        let name = Bytes::from(format!("understudy_{}", self.names));
        self.names += 1;
        statement.put_as(&mut request, &name);
        put(&mut request, b'D', |b| {
            b.extend_from_slice(b"S");
            put_cstr(b, &name);
        });
        wire::frontend::put_sync(&mut request);
        self.send(&request).await.map_err(|_| Failure::Broken("connection to the shadow broke"))?;
        let mut failure = None;
        loop {
            let message = self.receive().await.map_err(|_| Failure::Broken("connection to the shadow broke"))?;
            match message.tag {
                b'E' => failure = Some(Failure::Answered),
                b'T' if describes_user_types(&message.body) => {
                    failure = Some(Failure::NotServable("answer has types whose oids differ between servers"))
                }
                b'Z' => break,
                _ => {}
            }
        }
        match failure {
            Some(failure) => {
                let mut request = BytesMut::new();
                close_statement(&mut request, &name);
                wire::frontend::put_sync(&mut request);
                let broken = |_| Failure::Broken("connection to the shadow broke");
                self.send(&request).await.map_err(broken)?;
                while self.receive().await.map_err(broken)?.tag != b'Z' {}
                Err(failure)
            }
            None => {
                self.prepared.insert((statement.query.clone(), statement.types.clone()), name.clone());
                Ok(name)
            }
        }
    }
}

fn close_statement(request: &mut BytesMut, name: &Bytes) {
    put(request, b'C', |b| {
        b.extend_from_slice(b"S");
        put_cstr(b, name);
    });
}

fn describes_user_types(body: &Bytes) -> bool {
    RowDescription::parse(body).is_some_and(|description| description.columns.iter().any(|column| column.type_oid >= FIRST_USER_OID))
}
