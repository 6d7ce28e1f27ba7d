//! Sampled reads: run on the shadow behind the fence, compared with what the client got, and confirmed before anything is
//! called a difference.
//!
//! A first comparison costs the source nothing: the shadow answers once it has applied everything the client's answer
//! could have seen. If the answers differ, the sandwich decides: ask the owner, wait until the shadow has caught up with
//! that, ask the shadow, ask the owner again. Only when the owner agrees with itself around the shadow's answer, several
//! times in a row, is a difference a difference. Everything else is *undecided*, with its reason counted.

use super::{
    again,
    answer::{Answer, Difference},
    copies::{Copy, Identity, Operation, Permit, SampledRead, SampledTransaction},
    database::{Database, monotonic_ms},
    fence::Needed,
    rehearsal,
    route::ShadowRoute,
    runner::{RunError, Runner},
};
use crate::sql::Class;
use bytes::Bytes;
use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

/// Longest time a copied statement may run.
const STATEMENT_LIMIT: Duration = Duration::from_secs(5);
/// The feed holds rows back, so answers may differ.
const SET_ASIDE: &str = "rows that it reads are set aside by the feed";
/// With nothing left to do a worker is away for this long, and nobody wakes it: what came meanwhile is done in one go. A wake-up per
/// copy would cost the clients more than the copy.
const ABSENCE: Duration = Duration::from_millis(5);
/// The columns of a statement whose answers come without a description are asked for again after this time.
const DESCRIPTION_AGE: Duration = Duration::from_secs(60);
/// Statements whose columns are remembered; beyond it they are all forgotten.
const DESCRIPTIONS_MAX: usize = 500;

/// Work on copies of one queue of a shadow until the queue's other end is gone.
pub async fn work(database: Arc<Database>, shadow: Arc<ShadowRoute>, mut queue: mpsc::Receiver<(Copy, Permit)>) {
    let owner = database.route.load().owner.clone();
    let read_only = "SET default_transaction_read_only = on; SET statement_timeout = '5s'";
    let mut worker = Worker {
        on_shadow: Runner::new(database.clone(), shadow.target.clone(), read_only, STATEMENT_LIMIT),
        on_owner: Runner::new(database.clone(), owner, read_only, STATEMENT_LIMIT),
        rehearser: rehearsal::Rehearser::new(database.clone(), shadow.clone()),
        database,
        shadow,
        described: HashMap::new(),
        explained: HashMap::new(),
    };
    worker.on_owner.keep_rows(true);
    while let Some((copy, permit)) = queue.recv().await {
        worker.take(copy, permit).await;
        while let Ok((copy, permit)) = queue.try_recv() {
            worker.take(copy, permit).await;
        }
        tokio::time::sleep(ABSENCE).await;
    }
}

/// Names and types, where they are known.
type Columns = Option<Vec<(Bytes, u32)>>;

/// Why a read is not copied that could be.
pub const NOISE: &str = "not copied: the owner gives another answer each time";

/// What one worker has.
pub(super) struct Worker {
    pub(super) database: Arc<Database>,
    pub(super) shadow: Arc<ShadowRoute>,
    pub(super) on_shadow: Runner,
    pub(super) on_owner: Runner,
    rehearser: rehearsal::Rehearser,
    /// Columns on the owner, by statement, of answers that come without them.
    described: HashMap<u64, (Instant, Columns)>,
    /// Whose plans were asked for, and when.
    pub(super) explained: HashMap<u64, Instant>,
}

/// What a comparison has shown.
pub(super) enum Verdict {
    Same,
    Different(Difference),
    /// The same, by a rule or where the statement leaves it open.
    Excused(String),
    /// The same difference several times around an owner that agrees with itself; with evidence.
    Confirmed(Difference, String),
    Undecided(&'static str),
    FailedOnShadow(String),
}

/// A read as both sides are asked.
pub(super) struct Asked<'a> {
    pub(super) identity: &'a Arc<Identity>,
    pub(super) class: &'a Class,
    pub(super) operation: &'a Operation,
    /// What the client got.
    pub(super) answer: &'a Answer,
    pub(super) needed: Needed,
}

impl Worker {
    async fn take(&mut self, copy: Copy, permit: Permit) {
        let owns = self.database.route.load().owner == self.shadow.target; // since the copy was queued
        if !owns && self.shadow.in_step.load(std::sync::atomic::Ordering::Relaxed) {
            match copy {
                Copy::Read(read) => self.compare(&read).await,
                Copy::Reads(transaction) => self.compare_all(&transaction).await,
                Copy::Write(transaction) => self.rehearser.rehearse(&transaction).await,
            }
        } else {
            let observations = &self.shadow.observations;
            let reasons = if matches!(copy, Copy::Write(_)) { &observations.left_out } else { &observations.compare_reasons };
            observations.dropped.add(copy.answers());
            reasons.count("dropped: shadow is not in step");
        }
        drop(permit);
    }

    /// The operation as the shadow understands it; `None`: as it is.
    pub(super) fn there(&self, operation: &Operation, class: &Class) -> Result<Option<Operation>, &'static str> {
        let translated = self.shadow.translate(operation, &class.tables)?;
        let plain = again::without_user_types(translated.as_ref().unwrap_or(operation));
        Ok(plain.or(translated))
    }

    async fn compare(&mut self, read: &SampledRead) {
        if self.shadow.quota.is_noise(read.class.fingerprint, monotonic_ms()) {
            // found out since it was queued
            self.shadow.observations.dropped.increment();
            return self.shadow.observations.compare_reasons.count(NOISE);
        }
        let asked =
            Asked { identity: &read.identity, class: &read.class, operation: &read.operation, answer: &read.answer, needed: read.needed };
        let mut verdict = Verdict::Undecided("not run");
        for number in 0..read.times {
            let (outcome, latency) = self.first_look(&asked).await;
            if let Some(latency) = latency {
                self.measured(&read.class, read.owner_latency, latency, matches!(outcome, Verdict::FailedOnShadow(_)));
            }
            if number == 0 {
                verdict = outcome;
            }
        }
        if let Verdict::Different(found) = verdict {
            verdict = self.confirm(&asked, found).await;
        }
        self.decide(&read.class, verdict);
    }

    fn measured(&self, class: &Class, owner: Duration, shadow: Duration, failed: bool) {
        let observations = &self.shadow.observations;
        let now = Instant::now();
        observations.shadow_outcome(shadow, failed, now);
        observations.owner_outcome(owner, now);
        observations.owner_latency.record(owner);
        observations.shadow_latency.record(shadow);
        if !failed {
            observations.profile.record_pair(class.fingerprint, &class.text, owner, shadow);
        }
    }

    fn decide(&self, class: &Class, verdict: Verdict) {
        let observations = &self.shadow.observations;
        let profile = &observations.profile;
        let verdict = match verdict {
            Verdict::Confirmed(..) | Verdict::Different(_) | Verdict::FailedOnShadow(_) if self.shadow.sets_aside(class) => {
                Verdict::Undecided(SET_ASIDE)
            }
            verdict => verdict,
        };
        match &verdict {
            Verdict::Same | Verdict::Excused(_) => profile.record_verdict(class.fingerprint, &class.text, true),
            Verdict::Confirmed(..) => profile.record_verdict(class.fingerprint, &class.text, false),
            Verdict::FailedOnShadow(_) => profile.record_failure(class.fingerprint, &class.text),
            Verdict::Different(_) | Verdict::Undecided(_) => {}
        }
        let example = |what: &str| format!("{} (fingerprint {:016x}): {what}", class.text, class.fingerprint);
        let undecided = |reason: &str| {
            observations.undecided.increment();
            observations.compare_reasons.count(reason);
        };
        match verdict {
            Verdict::Same => {
                observations.same.increment();
                observations.decided(false, Instant::now());
            }
            Verdict::Excused(rule) => {
                observations.same.increment();
                observations.compare_reasons.count(&rule);
                observations.decided(false, Instant::now());
            }
            Verdict::Confirmed(difference, evidence) => {
                observations.different.increment();
                observations.decided(true, Instant::now());
                observations.compare_reasons.count(difference.as_str());
                observations.compare_reasons.example(example(&format!("{}: {evidence}", difference.as_str())));
            }
            Verdict::Different(_) => undecided("the difference was not confirmed"),
            Verdict::Undecided(reason) => undecided(reason),
            Verdict::FailedOnShadow(reason) => {
                observations.compare_errors.increment();
                undecided(&reason);
                observations.compare_reasons.example(example(&reason));
            }
        }
    }

    /// Runs the read on the shadow behind its fence and compares with the client's answer.
    async fn first_look(&mut self, read: &Asked<'_>) -> (Verdict, Option<Duration>) {
        let there = match self.there(read.operation, read.class) {
            Ok(there) => there,
            Err(reason) => return (Verdict::Undecided(reason), None),
        };
        if !self.shadow.caught_up(read.needed).await {
            return (Verdict::Undecided("shadow did not catch up in time"), None);
        }
        if self.shadow.sets_aside(read.class) {
            return (Verdict::Undecided(SET_ASIDE), None);
        }
        let ran = self.on_shadow.run_fresh(read.identity, there.as_ref().unwrap_or(read.operation)).await;
        let (mut answer, latency) = match self.came_back(ran) {
            Ok(came) => came,
            Err((verdict, elapsed)) => return (verdict, Some(elapsed)),
        };
        let mut given = std::borrow::Cow::Borrowed(read.answer);
        if read.answer.columns.is_none() && read.answer.sqlstate.is_none() && answer.columns.is_some() {
            given.to_mut().columns = self.described(read).await;
        }
        if self.shadow.differs(&read.class.tables) {
            answer.typed_like(&given);
        }
        (first_verdict(&given, &answer, read), Some(latency))
    }

    /// Tells the breaker.
    fn came_back(&self, ran: Result<(Answer, Duration), RunError>) -> Result<(Answer, Duration), (Verdict, Duration)> {
        self.shadow.copy_breaker.outcome(ran.is_ok(), monotonic_ms());
        ran.map_err(|error| {
            let elapsed = if matches!(error, RunError::Timeout) { STATEMENT_LIMIT } else { Duration::ZERO };
            (Verdict::FailedOnShadow(error.as_str().to_owned()), elapsed)
        })
    }

    /// The columns of a prepared statement's answer on the owner, which the client has not asked for this time: asked for once a minute.
    async fn described(&mut self, read: &Asked<'_>) -> Columns {
        let Operation::Extended { parse, .. } = read.operation else { return None };
        let mut hasher = DefaultHasher::new();
        (&parse.query, &parse.types).hash(&mut hasher);
        let statement = hasher.finish();
        if let Some((at, columns)) = self.described.get(&statement)
            && at.elapsed() < DESCRIPTION_AGE
        {
            return columns.clone();
        }
        let owner = self.database.route.load().owner.clone();
        self.on_owner.retarget(&owner);
        let columns = self.on_owner.run_fresh(read.identity, read.operation).await.ok().and_then(|(answer, _)| answer.columns);
        if self.described.len() >= DESCRIPTIONS_MAX {
            self.described.clear();
        }
        self.described.insert(statement, (Instant::now(), columns.clone()));
        columns
    }

    /// A READ ONLY transaction: all its statements on one connection of the shadow, then each answer by itself.
    async fn compare_all(&mut self, transaction: &SampledTransaction) {
        let verdicts = self.run_all(transaction).await;
        let answered = transaction.steps.iter().filter_map(|step| step.answer.as_ref().map(|answer| (step, answer)));
        for ((step, answer), verdict) in answered.zip(verdicts) {
            let verdict = match verdict {
                Verdict::Different(_) if step.class.kind != crate::sql::Kind::Read => {
                    Verdict::Undecided("rows of a cursor that has moved on since")
                }
                Verdict::Different(found) => {
                    let asked = Asked {
                        identity: &transaction.identity,
                        class: &step.class,
                        operation: &step.operation,
                        answer,
                        needed: transaction.needed,
                    };
                    self.confirm(&asked, found).await
                }
                other => other,
            };
            self.decide(&step.class, verdict);
        }
    }

    /// One verdict for each statement with an answer.
    async fn run_all(&mut self, transaction: &SampledTransaction) -> Vec<Verdict> {
        let mut verdicts = Vec::new();
        let expected = transaction.steps.iter().filter(|step| step.answer.is_some()).count();
        if !self.shadow.caught_up(transaction.needed).await {
            verdicts.resize_with(expected, || Verdict::Undecided("shadow did not catch up in time"));
            return verdicts;
        }
        for (number, step) in transaction.steps.iter().enumerate() {
            let there = match self.there(&step.operation, &step.class) {
                Ok(there) => there,
                Err(reason) => {
                    verdicts.resize_with(expected, || Verdict::Undecided(reason));
                    break;
                }
            };
            let operation = there.as_ref().unwrap_or(&step.operation);
            let ran = match number {
                0 => self.on_shadow.run_fresh(&transaction.identity, operation).await,
                _ => self.on_shadow.run(&transaction.identity, operation).await,
            };
            let (mut answer, latency) = match self.came_back(ran) {
                Ok(came) => came,
                Err(_) => {
                    verdicts.resize_with(expected, || Verdict::Undecided("the shadow failed within a transaction"));
                    return verdicts; // the connection is gone, and the transaction with it
                }
            };
            let Some(given) = &step.answer else { continue };
            if self.shadow.differs(&step.class.tables) {
                answer.typed_like(given);
            }
            let read = Asked {
                identity: &transaction.identity,
                class: &step.class,
                operation: &step.operation,
                answer: given,
                needed: transaction.needed,
            };
            let verdict = first_verdict(given, &answer, &read);
            self.measured(&step.class, step.owner_latency, latency, matches!(verdict, Verdict::FailedOnShadow(_)));
            verdicts.push(verdict);
            if answer.sqlstate.is_some() {
                verdicts.resize_with(expected, || Verdict::Undecided("behind a statement that failed"));
                break;
            }
        }
        if self.on_shadow.run_text(&transaction.identity, "ROLLBACK").await.is_err() {
            self.on_shadow.clear();
        }
        verdicts
    }
}

fn first_verdict(given: &Answer, on_shadow: &Answer, read: &Asked<'_>) -> Verdict {
    match (given.difference(on_shadow, read.class.ordered), &on_shadow.sqlstate) {
        (None, _) => Verdict::Same,
        (Some(Difference::Sqlstate), _) if given.sqlstate.as_deref().is_some_and(is_of_a_name) => {
            Verdict::Undecided("the owner refused a name of the message, and ran nothing")
        }
        (Some(Difference::Sqlstate), _) if given.sqlstate.as_deref().is_some_and(is_of_the_server) => {
            Verdict::Undecided("interrupted on the owner")
        }
        (Some(Difference::Sqlstate), Some(code)) if is_of_the_server(code) => {
            Verdict::FailedOnShadow(format!("failed on the shadow: SQLSTATE {code}"))
        }
        (Some(Difference::Sqlstate), Some(code))
            if matches!(code.as_str(), "42804" | "22P03" | "42704") && again::has_binary_parameters(read.operation) =>
        {
            Verdict::Undecided("a binary parameter of a user's type has other oids there")
        }
        (Some(difference), _) => Verdict::Different(difference),
    }
}

/// A statement or portal that does not exist, or exists already: what a pipeline meant by the name is the owner's secret.
fn is_of_a_name(code: &str) -> bool {
    matches!(code, "26000" | "34000" | "42P05" | "42P03")
}

/// Classes of errors that say something about the server, not about the data or the statement: connection (08), resources
/// (53), operator intervention (57), system (58), and locks that were busy (40, 55).
fn is_of_the_server(code: &str) -> bool {
    ["08", "40", "53", "55", "57", "58", "XX"].iter().any(|class| code.starts_with(class))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_trouble_is_not_a_difference_of_answers() {
        for code in ["57P03", "53300", "08006", "40P01", "55P03", "57014"] {
            assert!(is_of_the_server(code), "{code}");
        }
        for code in ["42P01", "42703", "22012", "23505", "42501"] {
            assert!(!is_of_the_server(code), "{code}");
        }
    }
}
