//! Mirrored writes, rehearsed: whole transactions, in session order, run on the shadow and always rolled back.
//!
//! The feed brings the same rows, and it may have been faster: an INSERT then meets its own row, an UPDATE finds nothing
//! left to do. Such outcomes are *undecided*, never errors. What remains is evidence: a statement that fails on the
//! shadow whatever the data, or a row count that differs although nobody else touched the table.

use super::{
    copies::{RehearsedStep, RehearsedTransaction},
    database::Database,
    route::ShadowRoute,
    runner::{RunError, Runner},
};
use crate::{
    lsn::Lsn,
    sql::{Kind, TransactionVerb},
};
use bytes::Bytes;
use std::{sync::Arc, time::Duration};

/// Longest time a rehearsed statement may run, locks included: it must never hold the feed up for long.
const STATEMENT_LIMIT: Duration = Duration::from_secs(2);

/// Tells whether the feed has touched a table since a position. Given by the control plane.
pub trait Freshness: Send + Sync {
    /// `table`: as written in the statement. Unknown tables count as touched.
    fn changed_since(&self, table: &str, position: Lsn) -> bool;

    /// Whether rows of these tables (as written in a statement) wait elsewhere, so that the shadow's are not the owner's. `only`: the
    /// statement reads nothing else; else any table counts.
    fn sets_aside(&self, tables: &[String], only: bool) -> bool;
}

/// Rehearses the transactions of one queue.
pub struct Rehearser {
    shadow: Arc<ShadowRoute>,
    runner: Runner,
}

/// What a rehearsed statement shows.
#[derive(Debug, PartialEq)]
enum Outcome {
    Agrees,
    Fails(String),
    TagDiffers(String),
    Undecided(&'static str),
}

impl Rehearser {
    /// For a shadow.
    pub fn new(database: Arc<Database>, shadow: Arc<ShadowRoute>) -> Self {
        // a shadow that was the owner once is read-only by default; a rehearsal is rolled back anyway
        let set_up = "SET default_transaction_read_only = off; SET lock_timeout = '250ms'; SET statement_timeout = '1500ms'; SET synchronous_commit = off";
        Rehearser { runner: Runner::new(database, shadow.target.clone(), set_up, STATEMENT_LIMIT), shadow }
    }

    /// Runs a transaction, compares, rolls back.
    pub async fn rehearse(&mut self, transaction: &RehearsedTransaction) {
        if !self.shadow.caught_up(transaction.needed).await {
            self.shadow.observations.left_out.count("shadow did not catch up in time");
            return;
        }
        match self.run(transaction).await {
            Ok(true) => self.shadow.observations.rehearsed.increment(),
            Ok(false) => {}
            Err(error) => {
                self.runner.clear();
                self.shadow.observations.rehearsal_reasons.count(error.as_str());
            }
        }
    }

    /// `false`: it cannot be said in the shadow's schema, and is left out.
    async fn run(&mut self, transaction: &RehearsedTransaction) -> Result<bool, RunError> {
        let mut operations = Vec::with_capacity(transaction.steps.len());
        for step in &transaction.steps {
            match self.shadow.translate(&step.operation, &step.class.tables) {
                Ok(translated) => operations.push(translated.unwrap_or_else(|| step.operation.clone())),
                Err(reason) => {
                    self.shadow.observations.left_out.count(reason);
                    return Ok(false);
                }
            }
        }
        let explicit =
            transaction.steps.first().is_some_and(|step| matches!(step.class.kind, Kind::Transaction(TransactionVerb::Begin { .. })));
        if !explicit {
            self.runner.run_text(&transaction.identity, "BEGIN").await?;
        }
        for (number, (step, operation)) in transaction.steps.iter().zip(&operations).enumerate() {
            let (answer, latency) = match number {
                0 if explicit => self.runner.run_fresh(&transaction.identity, operation).await?,
                _ => self.runner.run(&transaction.identity, operation).await?,
            };
            let observations = &self.shadow.observations;
            if let (Some(owner_latency), None) = (step.owner_latency, &answer.sqlstate) {
                observations.owner_latency.record(owner_latency);
                observations.shadow_latency.record(latency);
                observations.profile.record_pair(step.class.fingerprint, &step.class.text, owner_latency, latency);
            }
            let touched = || self.touched(step, transaction.began_at);
            let outcome = judge(step, answer.sqlstate.as_deref(), &answer.tags, touched);
            let example = |what: &str| format!("{} (fingerprint {:016x}): {what}", step.class.text, step.class.fingerprint);
            let go_on = match outcome {
                Outcome::Agrees => true,
                Outcome::Undecided(reason) => {
                    observations.rehearsal_reasons.count(reason);
                    answer.sqlstate.is_none()
                }
                Outcome::Fails(what) => {
                    observations.rehearsal_errors.increment();
                    observations.rehearsal_reasons.example(example(&what));
                    false
                }
                Outcome::TagDiffers(what) => {
                    observations.tag_mismatches.increment();
                    observations.rehearsal_reasons.example(example(&what));
                    true
                }
            };
            if !go_on {
                break; // the transaction is aborted on the shadow: what follows would only say so
            }
        }
        self.runner.run_text(&transaction.identity, "ROLLBACK").await?;
        Ok(true)
    }

    fn touched(&self, step: &RehearsedStep, since: Lsn) -> bool {
        let freshness = self.shadow.freshness.load();
        match &*freshness {
            Some(freshness) => step.class.tables.is_empty() || step.class.tables.iter().any(|table| freshness.changed_since(table, since)),
            None => true,
        }
    }
}

fn judge(step: &RehearsedStep, sqlstate: Option<&str>, tags: &[Bytes], touched: impl Fn() -> bool) -> Outcome {
    match sqlstate {
        None if tags == step.tags => Outcome::Agrees,
        None if touched() => Outcome::Undecided("row count differs, but the feed had touched the table"),
        None => Outcome::TagDiffers(format!("command tag {} on the shadow, {} on the owner", join(tags), join(&step.tags))),
        Some("23505" | "23503" | "23P01") => Outcome::Undecided("the feed had already brought the rows"),
        Some("40001" | "40P01" | "55P03" | "57014") => Outcome::Undecided("a lock was busy"),
        Some(code) if code.starts_with("08") || code.starts_with("53") || code.starts_with("57") => {
            Outcome::Undecided("the shadow was not available")
        }
        Some(code) if code.starts_with("22") || code.starts_with("23") => match touched() {
            true => Outcome::Undecided("failed on data that the feed had touched"),
            false => Outcome::Fails(format!("failed on the shadow: SQLSTATE {code}")),
        },
        Some(code) => Outcome::Fails(format!("failed on the shadow: SQLSTATE {code}")),
    }
}

fn join(tags: &[Bytes]) -> String {
    let tags: Vec<_> = tags.iter().map(|tag| String::from_utf8_lossy(tag)).collect();
    tags.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sql::{CatalogFacts, Classifier};
    use crate::traffic::copies::Operation;

    fn step(tag: &'static str) -> RehearsedStep {
        RehearsedStep {
            operation: Operation::Simple(Bytes::new()),
            class: Classifier::new(CatalogFacts::builtin_only()).classify(b"UPDATE t SET a = 1"),
            tags: vec![Bytes::from(tag)],
            owner_latency: None,
        }
    }

    #[test]
    fn the_feed_being_faster_is_not_an_error() {
        let step = step("UPDATE 1");
        let tag = |tag: &'static str| [Bytes::from(tag)];
        let fails = |code: &str| Outcome::Fails(format!("failed on the shadow: SQLSTATE {code}"));
        assert_eq!(judge(&step, None, &tag("UPDATE 1"), || false), Outcome::Agrees);
        assert!(matches!(judge(&step, None, &tag("UPDATE 0"), || true), Outcome::Undecided(_)));
        assert!(matches!(judge(&step, None, &tag("UPDATE 0"), || false), Outcome::TagDiffers(_)));
        assert!(matches!(judge(&step, Some("23505"), &[], || false), Outcome::Undecided(_)));
        assert!(matches!(judge(&step, Some("55P03"), &[], || false), Outcome::Undecided(_)));
        assert_eq!(judge(&step, Some("42703"), &[], || true), fails("42703"));
        assert_eq!(judge(&step, Some("22001"), &[], || false), fails("22001"));
    }
}
