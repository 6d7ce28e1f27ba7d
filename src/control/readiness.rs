//! The readiness report of a simulated cutover: what was seen, and from it go or no-go with the reasons. Pure; `simulate` gathers.

use crate::{
    config::RevertConfig,
    monitor::{Forecast, LatencySummary, StatementProfile},
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Statements in the report, costliest first.
pub(super) const STATEMENTS_MAX: usize = 50;
/// Share of comparisons that were undecided from which it is worth a word.
const UNDECIDED_MANY: f64 = 0.1;

/// How long clients will wait, in milliseconds, and what that is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Pause {
    /// Until running transactions have ended: the longest of 95 % of the looks during the simulation.
    pub transactions_ms: f64,
    /// Until the shadow has applied a marker: the slowest of those that were really sent.
    pub marker_ms: f64,
    /// Round trips and journal entries of the other steps.
    pub steps_ms: f64,
    /// When nothing runs at that moment.
    pub low_ms: f64,
    /// When the longest of 95 % runs.
    pub high_ms: f64,
}

impl Pause {
    /// From its parts.
    pub fn new(transactions_ms: f64, marker_ms: f64, steps_ms: f64) -> Self {
        let low_ms = marker_ms + steps_ms;
        Pause { transactions_ms, marker_ms, steps_ms, low_ms, high_ms: low_ms + transactions_ms }
    }
}

/// A report.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Readiness {
    /// Database.
    pub database: String,
    /// Shadow.
    pub shadow: String,
    /// Milliseconds since 1970 of its end.
    pub at_ms: i64,
    /// Percent of the reads that were to be served.
    pub percent: f64,
    /// How long.
    pub seconds: f64,
    /// Whether a cutover can be recommended.
    pub go: bool,
    /// What stands in the way; empty: go.
    pub blockers: Vec<String>,
    /// What should be known before.
    pub remarks: Vec<String>,
    /// Reads that could have been served.
    pub candidates: u64,
    /// Reads that were.
    pub served: u64,
    /// Of those, run again on the owner.
    pub fallbacks: u64,
    /// Kept on the owner by the fence.
    pub fenced: u64,
    /// Errors that servers sent to clients meanwhile, their own mistakes included.
    pub client_errors: u64,
    /// Comparisons that came out the same.
    pub same: u64,
    /// Different.
    pub different: u64,
    /// Neither.
    pub undecided: u64,
    /// Reads that failed on the shadow only.
    pub compare_errors: u64,
    /// Write transactions rehearsed.
    pub rehearsed: u64,
    /// Statements of them that failed on the shadow only.
    pub rehearsal_errors: u64,
    /// Command tags that differed.
    pub tag_mismatches: u64,
    /// Write transactions that were not rehearsed: reason → number.
    pub left_out: BTreeMap<String, u64>,
    /// Owner's latency of reads.
    pub owner: LatencySummary,
    /// Shadow's.
    pub shadow_latency: LatencySummary,
    /// Why reads went back during the simulation.
    pub reverted: Option<String>,
    /// What a dry run of the cutover says stands in the way.
    pub obstacles: Vec<String>,
    /// Predicted.
    pub pause: Pause,
    /// Longest transaction that was seen running, in milliseconds.
    pub longest_transaction_ms: f64,
    /// At 100 %.
    pub forecast: Option<Forecast>,
    /// Why there is none.
    pub no_forecast: Option<String>,
    /// By statement, costliest first, since the start.
    pub statements: Vec<StatementProfile>,
    /// Fingerprint → why it is slower, and what would help.
    pub findings: BTreeMap<String, String>,
}

impl Readiness {
    /// Fills in blockers, remarks and verdict. `drain_ms`: how long a cutover waits for running transactions.
    #[must_use]
    pub fn judged(mut self, limits: &RevertConfig, drain_ms: f64) -> Self {
        let mut blockers = self.obstacles.clone();
        let mut block = |blocks: bool, reason: String| {
            if blocks {
                blockers.push(reason);
            }
        };
        if let Some(reason) = &self.reverted {
            block(true, format!("reads went back to the owner during the simulation: {reason}"));
        }
        block(
            self.served == 0,
            "the shadow answered no read: nothing was shown (SHOW MISMATCHES and SHOW CLIENTS say what keeps reads on the owner)".into(),
        );
        block(self.different > 0, format!("{} answers differ (SHOW MISMATCHES)", self.different));
        let ran = self.served + self.same + self.different + self.undecided;
        let failed = self.fallbacks + self.compare_errors;
        let rate = 100.0 * failed as f64 / ran.max(1) as f64;
        block(
            rate > limits.error_rate && failed > 2,
            format!("{failed} of {ran} reads failed on the shadow: {rate:.1} %, error_rate is {} %", limits.error_rate),
        );
        block(
            self.rehearsal_errors > 0,
            format!("{} rehearsed statements fail on the shadow only (SHOW MISMATCHES)", self.rehearsal_errors),
        );
        block(
            self.tag_mismatches > 0,
            format!("{} rehearsed statements concern another number of rows on the shadow (SHOW MISMATCHES)", self.tag_mismatches),
        );
        block(
            self.pause.transactions_ms > drain_ms,
            format!(
                "transactions run for {:.1} s, and a cutover waits {:.0} s for them, then gives up: end them, or choose an hour without",
                self.pause.transactions_ms / 1000.0,
                drain_ms / 1000.0
            ),
        );
        let mut remarks = Vec::new();
        let slower: Vec<String> = self
            .statements
            .iter()
            .filter(|statement| statement.slower)
            .map(|statement| format!("{:016x}", statement.fingerprint))
            .collect();
        if !slower.is_empty() {
            remarks.push(format!("{} kinds of statements are slower on the shadow beyond chance: {}", slower.len(), slower.join(", ")));
        }
        let compared = self.same + self.different + self.undecided;
        if compared == 0 {
            remarks.push("no answer was compared: raise sample_reads".into());
        } else if self.undecided as f64 > UNDECIDED_MANY * compared as f64 {
            remarks.push(format!("{} of {compared} comparisons are undecided", self.undecided));
        }
        if self.rehearsed == 0 {
            remarks.push("no write was rehearsed: none came, or all were left out".into());
        }
        let left_out: u64 = self.left_out.values().sum();
        if left_out > 0 {
            remarks.push(format!("{left_out} write transactions were not rehearsed (SHOW MISMATCHES says why)"));
        }
        if self.longest_transaction_ms > drain_ms {
            remarks.push(format!(
                "one transaction ran for {:.1} s; a cutover at that moment would have been taken back",
                self.longest_transaction_ms / 1000.0
            ));
        }
        if let Some(reason) = &self.no_forecast {
            remarks.push(format!("no forecast for 100 %: {reason}"));
        }
        (self.go, self.blockers, self.remarks) = (blockers.is_empty(), blockers, remarks);
        self
    }

    /// `go` or `no-go`.
    pub fn verdict(&self) -> &'static str {
        if self.go { "go" } else { "no-go" }
    }

    /// In a sentence.
    pub fn sentence(&self) -> String {
        let why = if self.go {
            format!(
                "{} reads served without a revert, {} answers the same, {} write transactions rehearsed; clients would wait {:.0} to {:.0} ms",
                self.served, self.same, self.rehearsed, self.pause.low_ms, self.pause.high_ms
            )
        } else {
            self.blockers.join("; ")
        };
        format!("{}: {why}", self.verdict())
    }

    /// Section, what, value: for a terminal.
    pub fn lines(&self) -> Vec<(&'static str, String, String)> {
        let ms = |micros: u64| format!("{:.2} ms", micros as f64 / 1000.0);
        let mut lines = vec![("verdict", self.verdict().to_owned(), self.sentence())];
        lines.extend(self.blockers.iter().map(|reason| ("blocker", reason.clone(), String::new())));
        lines.extend(self.remarks.iter().map(|remark| ("remark", remark.clone(), String::new())));
        let mut add = |section, what: &str, value: String| lines.push((section, what.to_owned(), value));
        add("reads", "asked for", format!("{} % for {} s", self.percent, self.seconds));
        add("reads", "candidates", self.candidates.to_string());
        add("reads", "served by the shadow", self.served.to_string());
        add("reads", "run again on the owner", self.fallbacks.to_string());
        add("reads", "kept back by the fence", self.fenced.to_string());
        add("reads", "p50, p99 on the owner", format!("{}, {}", ms(self.owner.p50_us), ms(self.owner.p99_us)));
        add("reads", "p50, p99 on the shadow", format!("{}, {}", ms(self.shadow_latency.p50_us), ms(self.shadow_latency.p99_us)));
        add("answers", "same, different, undecided", format!("{}, {}, {}", self.same, self.different, self.undecided));
        add(
            "writes",
            "rehearsed, failed, other row counts",
            format!("{}, {}, {}", self.rehearsed, self.rehearsal_errors, self.tag_mismatches),
        );
        add("clients", "errors from servers", self.client_errors.to_string());
        add("pause", "predicted", format!("{:.0} to {:.0} ms", self.pause.low_ms, self.pause.high_ms));
        add(
            "pause",
            "of which transactions, marker, steps",
            format!("{:.0}, {:.0}, {:.0} ms", self.pause.transactions_ms, self.pause.marker_ms, self.pause.steps_ms),
        );
        if let Some(forecast) = &self.forecast {
            let p99 = forecast.p99_us;
            add("forecast", "p99 at 100 %", format!("{:.2} ms ({:.2} to {:.2})", p99.value / 1e3, p99.low / 1e3, p99.high / 1e3));
        }
        for statement in &self.statements {
            let ratio = statement.comparison.map_or_else(
                || "too few pairs".into(),
                |compared| format!("{:.2} times ({:.2} to {:.2})", compared.ratio, compared.low, compared.high),
            );
            let fingerprint = format!("{:016x}", statement.fingerprint);
            let why = self.findings.get(&fingerprint).map(|why| format!("; {why}")).unwrap_or_default();
            lines.push(("statement", format!("{fingerprint} {}", statement.text), format!("{}, {ratio}{why}", statement.verdict())));
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config, monitor::LatencySummary};

    fn limits() -> RevertConfig {
        let text =
            "[[database]]\nname = \"d\"\nsource = \"postgres://u@h/d\"\n[[database.shadow]]\nname = \"s\"\nurl = \"postgres://u@i/d\"\n";
        config::parse(text, "test", &|_| None).unwrap().databases.remove(0).shadows.remove(0).revert
    }

    fn seen() -> Readiness {
        Readiness {
            served: 500,
            same: 200,
            rehearsed: 100,
            pause: Pause::new(20.0, 5.0, 10.0),
            owner: LatencySummary { count: 500, p99_us: 2_000, ..LatencySummary::default() },
            ..Readiness::default()
        }
    }

    #[test]
    fn go_needs_every_answer_right_and_nothing_in_the_way() {
        let go = seen().judged(&limits(), 5_000.0);
        assert!(go.go && go.sentence().starts_with("go: 500 reads served") && go.sentence().ends_with("15 to 35 ms"), "{}", go.sentence());
        for (report, reason) in [
            (Readiness { served: 0, ..seen() }, "no read"),
            (Readiness { different: 1, ..seen() }, "1 answers differ"),
            (Readiness { fallbacks: 30, ..seen() }, "failed on the shadow"),
            (Readiness { rehearsal_errors: 1, ..seen() }, "fail on the shadow only"),
            (Readiness { tag_mismatches: 1, ..seen() }, "another number of rows"),
            (Readiness { reverted: Some("lag".into()), ..seen() }, "went back"),
            (Readiness { obstacles: vec!["a session cannot be moved".into()], ..seen() }, "cannot be moved"),
            (Readiness { pause: Pause::new(6_000.0, 1.0, 1.0), ..seen() }, "transactions run for 6.0 s"),
        ] {
            let report = report.judged(&limits(), 5_000.0);
            assert!(
                !report.go && report.sentence().starts_with("no-go: ") && report.sentence().contains(reason),
                "{reason}: {}",
                report.sentence()
            );
            assert_eq!(report.lines()[1].0, "blocker");
        }
        let two = Readiness { fallbacks: 2, served: 20, ..seen() }.judged(&limits(), 5_000.0);
        assert!(two.go, "two failures are an accident");
    }

    #[test]
    fn what_should_be_known_is_a_remark() {
        let report = Readiness { rehearsed: 0, undecided: 100, no_forecast: Some("one level of load".into()), ..seen() };
        let report =
            Readiness { left_out: [("COPY".to_owned(), 3)].into(), longest_transaction_ms: 9_000.0, ..report }.judged(&limits(), 5_000.0);
        let remarks = report.remarks.join("\n");
        for expected in ["no write was rehearsed", "100 of 300", "one level of load", "3 write transactions", "9.0 s"] {
            assert!(remarks.contains(expected), "{expected}: {remarks}");
        }
        assert!(report.go);
    }
}
