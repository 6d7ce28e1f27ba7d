//! Sampled reads: run on the shadow behind the fence, compared with what the client got, and confirmed before anything is
//! called a difference.
//!
//! A first comparison costs the source nothing: the shadow answers once it has applied everything the client's answer
//! could have seen. If the answers differ, the sandwich decides: ask the owner, wait until the shadow has caught up with
//! that, ask the shadow, ask the owner again. Only when the owner agrees with itself around the shadow's answer, several
//! times in a row, is a difference a difference. Everything else is *undecided*, with its reason counted.

use super::{
    answer::{Answer, Difference},
    copies::{Copy, Operation, Permit, SampledRead},
    database::{Database, monotonic_ms},
    rehearsal,
    route::ShadowRoute,
    runner::{RunError, Runner},
};
use crate::sql::Class;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

/// Longest time a copied statement may run.
const STATEMENT_LIMIT: Duration = Duration::from_secs(5);
/// Sandwiches in a row that must show the same difference.
const CONFIRMATIONS: usize = 2;
/// Sandwiches tried before a moving source makes it undecided.
const ATTEMPTS_MAX: usize = 5;

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
    };
    while let Some((copy, permit)) = queue.recv().await {
        let owns = worker.database.route.load().owner == worker.shadow.target; // since the copy was queued
        if !owns && worker.shadow.in_step.load(std::sync::atomic::Ordering::Relaxed) {
            match copy {
                Copy::Read(read) => worker.compare(&read).await,
                Copy::Write(transaction) => worker.rehearser.rehearse(&transaction).await,
            }
        } else {
            worker.shadow.observations.dropped.increment();
            worker.shadow.observations.compare_reasons.count("dropped: shadow is not in step");
        }
        drop(permit);
    }
}

struct Worker {
    database: Arc<Database>,
    shadow: Arc<ShadowRoute>,
    on_shadow: Runner,
    on_owner: Runner,
    rehearser: rehearsal::Rehearser,
}

enum Verdict {
    Same,
    Different(Difference),
    Undecided(&'static str),
    FailedOnShadow(String),
}

impl Worker {
    async fn compare(&mut self, read: &SampledRead) {
        let shadow = self.shadow.clone();
        let observations = &shadow.observations;
        let there = match shadow.translate(&read.operation, &read.class.tables) {
            Ok(translated) => translated,
            Err(reason) => {
                observations.undecided.increment();
                observations.compare_reasons.count(reason);
                return;
            }
        };
        let (mut verdict, mut compared) = (Verdict::Undecided("not run"), false);
        for _ in 0..read.times {
            let (outcome, latency) = self.first_look(read, there.as_ref()).await;
            if let Some(latency) = latency {
                let failed = matches!(outcome, Verdict::FailedOnShadow(_));
                observations.shadow_outcome(latency, failed, Instant::now());
                observations.owner_outcome(read.owner_latency, Instant::now());
                observations.owner_latency.record(read.owner_latency);
                observations.shadow_latency.record(latency);
                if !failed {
                    observations.profile.record_pair(read.class.fingerprint, &read.class.text, read.owner_latency, latency);
                }
            }
            if !compared {
                verdict = outcome;
                compared = true;
            }
        }
        if let Verdict::Different(found) = verdict {
            verdict = self.confirm(read, there.as_ref(), found).await;
        }
        let (profile, fingerprint) = (&observations.profile, read.class.fingerprint);
        match &verdict {
            Verdict::Same | Verdict::Different(_) => {
                profile.record_verdict(fingerprint, &read.class.text, matches!(verdict, Verdict::Same));
            }
            Verdict::FailedOnShadow(_) => profile.record_failure(fingerprint, &read.class.text),
            Verdict::Undecided(_) => {}
        }
        let example = |what: &str| format!("{} (fingerprint {:016x}): {what}", read.class.text, read.class.fingerprint);
        match verdict {
            Verdict::Same => {
                observations.same.increment();
                observations.decided(false, Instant::now());
            }
            Verdict::Different(difference) => {
                observations.different.increment();
                observations.decided(true, Instant::now());
                observations.compare_reasons.count(difference.as_str());
                observations.compare_reasons.example(example(difference.as_str()));
            }
            Verdict::Undecided(reason) => {
                observations.undecided.increment();
                observations.compare_reasons.count(reason);
            }
            Verdict::FailedOnShadow(reason) => {
                observations.compare_errors.increment();
                observations.undecided.increment();
                observations.compare_reasons.count(&reason);
                observations.compare_reasons.example(example(&reason));
            }
        }
    }

    /// Runs the read on the shadow behind its fence and compares with the client's answer.
    async fn first_look(&mut self, read: &SampledRead, there: Option<&Operation>) -> (Verdict, Option<Duration>) {
        if !self.shadow.caught_up(read.needed).await {
            return (Verdict::Undecided("shadow did not catch up in time"), None);
        }
        let (answer, latency) = match self.on_shadow.run_fresh(&read.identity, there.unwrap_or(&read.operation)).await {
            Ok((mut answer, latency)) => {
                self.shadow.copy_breaker.outcome(true, monotonic_ms());
                if there.is_some() {
                    answer.typed_like(&read.answer);
                }
                (answer, latency)
            }
            Err(error) => {
                self.shadow.copy_breaker.outcome(false, monotonic_ms());
                let elapsed = if matches!(error, RunError::Timeout) { STATEMENT_LIMIT } else { Duration::ZERO };
                return (Verdict::FailedOnShadow(error.as_str().to_owned()), Some(elapsed));
            }
        };
        let verdict = match (read.answer.difference(&answer, read.class.ordered), &answer.sqlstate) {
            (None, _) => Verdict::Same,
            (Some(Difference::Sqlstate), _) if read.answer.sqlstate.as_deref().is_some_and(is_of_a_name) => {
                Verdict::Undecided("the owner refused a name of the message, and ran nothing")
            }
            (Some(Difference::Sqlstate), Some(code)) if is_of_the_server(code) => {
                Verdict::FailedOnShadow(format!("failed on the shadow: SQLSTATE {code}"))
            }
            (Some(difference), _) => Verdict::Different(difference),
        };
        (verdict, Some(latency))
    }

    /// Owner, shadow, owner: until the owner agrees with itself around a shadow's answer often enough.
    async fn confirm(&mut self, read: &SampledRead, there: Option<&Operation>, first: Difference) -> Verdict {
        if let Some(reason) = may_vary(&read.class, &read.operation, &read.answer, first) {
            return Verdict::Undecided(reason);
        }
        let owner = self.database.route.load().owner.clone();
        self.on_owner.retarget(&owner);
        let (mut confirmed, mut found) = (0, first);
        for _ in 0..ATTEMPTS_MAX {
            let Ok((before, _)) = self.on_owner.run_fresh(&read.identity, &read.operation).await else {
                return Verdict::Undecided("the owner could not be asked again");
            };
            if !self.shadow.caught_up(self.database.ticks.needed_now()).await {
                return Verdict::Undecided("shadow did not catch up in time");
            }
            let asked = there.unwrap_or(&read.operation);
            let Ok((mut on_shadow, _)) = self.on_shadow.run_fresh(&read.identity, asked).await else {
                return Verdict::Undecided("shadow failed while a difference was being confirmed");
            };
            if there.is_some() {
                on_shadow.typed_like(&before);
            }
            let Ok((after, _)) = self.on_owner.run_fresh(&read.identity, &read.operation).await else {
                return Verdict::Undecided("the owner could not be asked again");
            };
            if before.difference(&after, read.class.ordered).is_some() {
                confirmed = 0;
                continue;
            }
            match before.difference(&on_shadow, read.class.ordered) {
                None => return Verdict::Same,
                Some(difference) => {
                    found = difference;
                    confirmed += 1;
                    if confirmed == CONFIRMATIONS {
                        return match may_vary(&read.class, &read.operation, &before, found) {
                            Some(reason) => Verdict::Undecided(reason),
                            None => Verdict::Different(found),
                        };
                    }
                }
            }
        }
        let _ = found;
        Verdict::Undecided("the owner's answer kept changing")
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

/// Answers that may differ between two servers with equal data, by the SQL standard or by floating point.
fn may_vary(class: &Class, operation: &Operation, answer: &Answer, difference: Difference) -> Option<&'static str> {
    const FLOATS: [u32; 4] = [700, 701, 1021, 1022];
    let of_rows = matches!(difference, Difference::Values | Difference::Order | Difference::RowCount);
    let text = class.text.to_ascii_lowercase();
    if answer.binary_user_type {
        return Some("binary values of a user's type are not comparable");
    }
    if difference == Difference::Order {
        return Some("rows in another order: ORDER BY may leave ties open");
    }
    if of_rows && (class.limited || text.contains("limit") || text.contains("fetch ") || text.contains("distinct on")) {
        return Some("LIMIT may cut between equal rows");
    }
    if of_rows && matches!(operation, Operation::Extended { limit, .. } if *limit != 0) {
        return Some("a row limit of the Execute may cut between equal rows");
    }
    if of_rows
        && ["array_agg", "string_agg", "json_agg", "jsonb_agg", "xmlagg", "row_number", "rank", "ntile"]
            .iter()
            .any(|word| text.contains(word))
    {
        return Some("an aggregate or window depends on the order of rows");
    }
    // a prepared statement's answer is not described to the client; the answers that confirm a difference are
    let has_floats = answer.columns.as_ref().is_some_and(|columns| columns.iter().any(|(_, oid)| FLOATS.contains(oid)));
    if difference == Difference::Values && has_floats && (text.contains("sum") || text.contains("avg")) {
        return Some("floating point sums depend on the order of rows");
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_cut_by_the_client_are_not_compared_by_value() {
        use crate::{sql, wire::frontend::Parse};
        let class = sql::Classifier::new(sql::CatalogFacts::builtin_only()).classify(b"select 1");
        let parse = Arc::new(Parse { name: Default::default(), query: Default::default(), types: Default::default() });
        let operation = |limit| Operation::Extended { parse: parse.clone(), bind: Default::default(), limit, parsed_here: true };
        assert!(may_vary(&class, &operation(1), &Answer::default(), Difference::Values).is_some());
        assert!(may_vary(&class, &operation(0), &Answer::default(), Difference::RowCount).is_none());
    }

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
