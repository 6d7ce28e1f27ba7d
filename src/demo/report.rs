//! What the demo found, for scripts (`report.json`) and for people. The verdict is a conclusion: `pass` only if every
//! zero is a zero and everything that was to happen was seen to happen.

mod paper;

use super::checker::Findings;
use crate::monitor::LatencySummary;
use serde::Serialize;
use std::collections::BTreeMap;

/// The whole run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// `pass` or `fail`
    pub verdict: String,
    /// Why it failed; empty otherwise.
    pub failures: Vec<String>,
    /// Which way of breaking it was asked for.
    #[serde(rename = "break")]
    pub broken: Option<String>,
    /// Where the story ended early; what comes after is not judged.
    pub stopped_at: Option<String>,
    /// A shorter run.
    pub quick: bool,
    /// Seconds from the first line to the last.
    pub seconds: f64,
    /// What `SELECT version()` says.
    pub versions: Versions,
    /// All clients together.
    pub clients: Clients,
    /// The copy.
    pub copy: Copy,
    /// The change stream.
    pub feed: Feed,
    /// Mirrored writes.
    pub rehearsal: Rehearsal,
    /// Sampled reads.
    pub compare: Compare,
    /// Both sides of the same statements.
    pub latency: Latency,
    /// Schema changes.
    pub schema: Schema,
    /// The simulated cutover.
    pub simulated_cutover: Simulated,
    /// Reads answered by the shadow.
    pub served: Served,
    /// The slowest revert that a fault caused.
    pub revert: Revert,
    /// Each of them.
    pub reverts: Vec<Revert>,
    /// Reverts that no fault of ours explains.
    pub unexplained_reverts: u64,
    /// The cutover.
    pub cutover: Move,
    /// The rollback.
    pub rollback: Move,
    /// Each VERIFY.
    pub validation: Vec<Validation>,
    /// The ledger against the final owner.
    pub checker: Option<Findings>,
    /// What was left on the servers after SHADOW STOP.
    pub left_behind: Vec<String>,
}

#[derive(Clone, Debug, Default, Serialize)]
#[allow(missing_docs)]
pub struct Versions {
    pub source: String,
    pub shadow: String,
}

/// What the clients experienced.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Clients {
    /// Transactions and reads that were answered; pgbench's by its log.
    pub transactions: u64,
    /// Statements that failed.
    pub failed_statements: u64,
    /// Connections lost or refused.
    pub dropped_connections: u64,
    /// pgbench processes run.
    pub pgbench_rounds: u64,
    /// Own writes read back.
    pub reads_checked: u64,
    /// As the clients saw it.
    pub latency: LatencySummary,
    /// The first failures.
    pub messages: Vec<String>,
}

#[derive(Clone, Debug, Default, Serialize)]
#[allow(missing_docs)]
pub struct Copy {
    pub tables: u64,
    pub rows: u64,
    pub bytes: u64,
    pub seconds: f64,
}

/// The change stream.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Feed {
    /// Row changes applied.
    pub changes: u64,
    /// Transactions applied.
    pub transactions: u64,
    /// From commit to commit.
    pub lag_ms: Lag,
    /// Rows that were missing or already there when a change came.
    pub findings: u64,
}

#[derive(Clone, Debug, Default, Serialize)]
#[allow(missing_docs)]
pub struct Lag {
    pub p50: f64,
    pub p99: f64,
    pub max: f64,
}

#[derive(Clone, Debug, Default, Serialize)]
#[allow(missing_docs)]
pub struct Rehearsal {
    pub transactions: u64,
    pub errors: u64,
    pub tag_mismatches: u64,
    pub undecided: BTreeMap<String, u64>,
    pub left_out: BTreeMap<String, u64>,
    pub examples: Vec<String>,
}

#[derive(Clone, Debug, Default, Serialize)]
#[allow(missing_docs)]
pub struct Compare {
    pub sampled: u64,
    pub same: u64,
    pub different: u64,
    pub undecided: u64,
    pub dropped: u64,
    pub errors: u64,
    pub reasons: BTreeMap<String, u64>,
    pub examples: Vec<String>,
}

#[derive(Clone, Debug, Default, Serialize)]
#[allow(missing_docs)]
pub struct Latency {
    pub source: LatencySummary,
    pub shadow: LatencySummary,
}

/// Schema changes and what became of them.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Schema {
    /// DDL statements that the demo ran.
    pub changes: u64,
    /// Proposals made.
    pub proposals: u64,
    /// Applied by policy.
    pub auto_applied: u64,
    /// Approved by a person and applied.
    pub approved: u64,
    /// Rejected.
    pub rejected: u64,
    /// Failed.
    pub failed: u64,
    /// Still waiting at the end.
    pub pending: u64,
    /// Changes that did not arrive there.
    pub missing_on_shadow: Vec<String>,
    /// Rows of the shadow's own new column that have a synthetic value.
    pub synthetic_values: u64,
}

#[derive(Clone, Debug, Default, Serialize)]
#[allow(missing_docs)]
pub struct Simulated {
    pub percent: f64,
    pub seconds: f64,
    pub reads: u64,
    pub failed_statements: u64,
}

/// Reads answered by the shadow.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Served {
    /// Answered by the shadow.
    pub reads: u64,
    /// Failed there before the first byte, answered by the owner.
    pub fallbacks: u64,
    /// Kept on the owner by the fence.
    pub fenced: u64,
    /// Clients that did not see their own acknowledged write.
    pub stale: u64,
}

/// One revert.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Revert {
    /// Whether serving went back to 0 by itself.
    pub triggered: bool,
    /// What was done to the shadow.
    pub fault: String,
    /// The proxy's reason.
    pub reason: String,
    /// From the fault to serving stopped, seen from outside.
    pub reaction_ms: f64,
    /// What proxy.toml allows for it.
    pub window_ms: f64,
    /// The proxy's own figure: from the first bad observation.
    pub reported_ms: f64,
    /// Failed statements and lost connections from the fault until it healed.
    pub client_errors: u64,
}

/// A cutover or a rollback.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Move {
    /// The proxy's figure: hold to release.
    pub pause_ms: f64,
    /// The longest that one of our clients waited around it.
    pub client_pause_ms: f64,
    /// Statements that failed around it.
    pub failed_statements: u64,
    /// Connections lost around it.
    pub dropped_connections: u64,
    /// Step and milliseconds.
    pub steps: Vec<(String, String)>,
}

/// One VERIFY.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Validation {
    /// When.
    pub when: String,
    /// Rows compared.
    pub rows: u64,
    /// Tables compared.
    pub tables: u64,
    /// Rows that differ.
    pub differences: u64,
    /// Seconds.
    pub seconds: f64,
    /// Which, if any: table, key, column.
    pub examples: Vec<String>,
}

impl Report {
    /// Adds a reason to fail.
    pub fn fail(&mut self, reason: impl Into<String>) {
        self.failures.push(reason.into());
    }

    /// Draws the conclusion. Every expectation is here, so that none depends on how far the story got.
    pub fn conclude(&mut self) {
        for problem in self.problems() {
            if !self.failures.contains(&problem) {
                self.failures.push(problem);
            }
        }
        self.verdict = if self.failures.is_empty() { "pass" } else { "fail" }.to_owned();
    }

    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut zero = |number: u64, what: &str| {
            if number != 0 {
                problems.push(format!("{number} {what}"));
            }
        };
        zero(self.clients.failed_statements, "statements of clients failed");
        zero(self.clients.dropped_connections, "connections of clients were dropped");
        zero(self.served.stale, "reads did not see the client's own acknowledged write");
        zero(self.compare.different, "compared answers differ");
        zero(self.rehearsal.errors, "rehearsed statements failed on the shadow only");
        zero(self.rehearsal.tag_mismatches, "rehearsed statements gave another tag or row count");
        zero(self.schema.rejected, "proposals were rejected");
        zero(self.schema.failed, "proposals failed");
        zero(self.schema.pending, "proposals still wait");
        zero(self.feed.findings, "changes found their row missing or already there");
        zero(self.validation.iter().map(|validation| validation.differences).sum(), "rows differ in a validation");
        zero(self.left_behind.len() as u64, "objects were left behind on the servers");
        if let Some(findings) = self.checker.as_ref().filter(|findings| !findings.is_clean()) {
            problems.push(format!("the clients were told something else than the owner holds: {}", findings.examples.join("; ")));
        }
        for missing in &self.schema.missing_on_shadow {
            problems.push(format!("a schema change did not arrive at the shadow: {missing}"));
        }
        let complete = self.stopped_at.is_none();
        let mut seen = |happened: bool, what: &str| {
            if complete && !happened {
                problems.push(format!("{what} was not seen"));
            }
        };
        seen(self.clients.transactions > 0, "a transaction of a client");
        seen(self.clients.reads_checked > 0, "a client reading back its own write");
        seen(self.copy.rows > 0 && self.copy.bytes > 0, "the copy");
        seen(self.feed.changes > 0, "an applied change");
        seen(self.rehearsal.transactions > 0, "a rehearsed transaction");
        seen(self.compare.same > 0, "a compared answer");
        seen(self.latency.source.count > 0 && self.latency.shadow.count > 0, "the latency of both sides");
        seen(self.schema.auto_applied >= 4, "the automatic adaptation of four schema changes");
        seen(self.schema.approved >= 1, "an approved proposal");
        seen(self.schema.synthetic_values > 0, "a synthetic value in the shadow's own column");
        seen(self.simulated_cutover.reads > 0, "a read served during the simulated cutover");
        seen(self.served.reads > 0, "a served read");
        seen(!self.reverts.is_empty() && self.reverts.iter().all(|revert| revert.triggered), "a revert for every fault");
        seen(self.reverts.iter().all(|revert| revert.reaction_ms <= revert.window_ms), "every revert within its window");
        seen(self.reverts.iter().all(|revert| revert.client_errors == 0), "every fault passing without a client error");
        seen(self.cutover.pause_ms > 0.0, "the cutover");
        seen(self.rollback.pause_ms > 0.0, "the rollback");
        let whens = ["before cutover", "after cutover", "after rollback"];
        seen(
            whens.iter().all(|when| self.validation.iter().any(|validation| validation.when == *when && validation.rows > 0)),
            "every validation",
        );
        seen(self.checker.is_some(), "the checker's comparison");
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Report {
        let latency = LatencySummary { count: 1, ..LatencySummary::default() };
        let validation = |when: &str| Validation { when: when.into(), rows: 1, tables: 1, ..Validation::default() };
        Report {
            clients: Clients { transactions: 1, reads_checked: 1, ..Clients::default() },
            copy: Copy { rows: 1, bytes: 1, ..Copy::default() },
            feed: Feed { changes: 1, ..Feed::default() },
            rehearsal: Rehearsal { transactions: 1, ..Rehearsal::default() },
            compare: Compare { same: 1, ..Compare::default() },
            latency: Latency { source: latency, shadow: latency },
            schema: Schema { auto_applied: 4, approved: 1, synthetic_values: 1, ..Schema::default() },
            simulated_cutover: Simulated { reads: 1, ..Simulated::default() },
            served: Served { reads: 1, ..Served::default() },
            reverts: vec![Revert { triggered: true, ..Revert::default() }],
            cutover: Move { pause_ms: 1.0, ..Move::default() },
            rollback: Move { pause_ms: 1.0, ..Move::default() },
            validation: ["before cutover", "after cutover", "after rollback"].map(validation).to_vec(),
            checker: Some(Findings::default()),
            ..Report::default()
        }
    }

    #[test]
    fn an_early_end_is_not_blamed_for_what_it_did_not_reach() {
        let mut report = Report { stopped_at: Some("h. Cutover".into()), ..Report::default() };
        report.fail("VERIFY found a difference");
        report.conclude();
        assert_eq!((report.verdict.as_str(), report.failures.len()), ("fail", 1));
    }

    #[test]
    fn passes_only_if_every_zero_is_zero_and_everything_happened() {
        let mut report = good();
        report.conclude();
        assert_eq!((report.verdict.as_str(), report.failures.as_slice()), ("pass", &[][..]));
        type Harm = fn(&mut Report);
        let breaks: [(&str, Harm); 17] = [
            ("failed", |r| r.clients.failed_statements = 1),
            ("dropped", |r| r.clients.dropped_connections = 1),
            ("acknowledged write", |r| r.served.stale = 1),
            ("differ", |r| r.compare.different = 1),
            ("tag", |r| r.rehearsal.tag_mismatches = 1),
            ("rejected", |r| r.schema.rejected = 1),
            ("wait", |r| r.schema.pending = 1),
            ("validation", |r| r.validation[1].differences = 1),
            ("left behind", |r| r.left_behind.push("slot".into())),
            ("owner holds", |r| r.checker = Some(Findings { missing: 1, ..Findings::default() })),
            ("revert", |r| r.reverts[0].triggered = false),
            ("client error", |r| r.reverts[0].client_errors = 1),
            ("within its window", |r| r.reverts[0].reaction_ms = 1.0),
            ("cutover", |r| r.cutover.pause_ms = 0.0),
            ("every validation", |r| drop(r.validation.pop())),
            ("checker", |r| r.checker = None),
            ("because we say so", |r| r.fail("because we say so")),
        ];
        for (reason, break_it) in breaks {
            let mut report = good();
            break_it(&mut report);
            report.conclude();
            assert_eq!(report.verdict, "fail", "{reason}");
            assert!(report.failures.iter().any(|failure| failure.contains(reason)), "{reason}: {:?}", report.failures);
        }
        let mut nothing = Report::default();
        nothing.conclude();
        assert_eq!(nothing.verdict, "fail");
    }
}
