//! The report for people.

use super::Report;
use crate::demo::stage;

impl Report {
    /// The report for people.
    pub fn show(&self, stage: &stage::Stage) {
        let number = stage::grouped;
        stage.line(format!("{:<26}{:>12}{:>12}", "", "source", "shadow"));
        let (source, shadow) = (&self.latency.source, &self.latency.shadow);
        for (name, left, right) in [
            ("p50", source.p50_us, shadow.p50_us),
            ("p90", source.p90_us, shadow.p90_us),
            ("p99", source.p99_us, shadow.p99_us),
            ("p99.9", source.p999_us, shadow.p999_us),
            ("max", source.max_us, shadow.max_us),
        ] {
            stage.line(format!("{:<26}{:>12}{:>12}", format!("latency {name}"), stage::millis(left), stage::millis(right)));
        }
        stage.line(format!("{:<26}{:>12}{:>12}", "statements on both sides", number(source.count), number(shadow.count)));
        stage.line("");
        let clients = &self.clients;
        for (name, text) in [
            (
                "clients",
                format!(
                    "{} transactions, {} failed statements, {} dropped connections",
                    number(clients.transactions),
                    clients.failed_statements,
                    clients.dropped_connections
                ),
            ),
            ("copy", format!("{} rows, {}, {:.1} s", number(self.copy.rows), stage::bytes(self.copy.bytes), self.copy.seconds)),
            (
                "feed",
                format!(
                    "{} changes, lag p50 {:.1} ms, p99 {:.1} ms",
                    number(self.feed.changes),
                    self.feed.lag_ms.p50,
                    self.feed.lag_ms.p99
                ),
            ),
            (
                "rehearsed writes",
                format!(
                    "{} transactions, {} errors, {} other tags or row counts",
                    number(self.rehearsal.transactions),
                    self.rehearsal.errors,
                    self.rehearsal.tag_mismatches
                ),
            ),
            (
                "compared reads",
                format!(
                    "{} sampled: {} same, {} different, {} undecided, {} left out",
                    number(self.compare.sampled),
                    number(self.compare.same),
                    self.compare.different,
                    number(self.compare.undecided),
                    number(self.compare.dropped)
                ),
            ),
            (
                "schema",
                format!(
                    "{} changes, {} proposals: {} by policy, {} approved, {} synthetic values",
                    self.schema.changes,
                    self.schema.proposals,
                    self.schema.auto_applied,
                    self.schema.approved,
                    number(self.schema.synthetic_values)
                ),
            ),
            (
                "served reads",
                format!(
                    "{}, {} fell back, {} kept back by the fence; {} own writes read back, {} stale",
                    number(self.served.reads),
                    self.served.fallbacks,
                    number(self.served.fenced),
                    number(clients.reads_checked),
                    self.served.stale
                ),
            ),
        ] {
            stage.line(format!("{name:<20}{text}"));
        }
        for revert in &self.reverts {
            let text = if revert.triggered {
                format!("{:.0} ms after the shadow {}, {} client errors", revert.reaction_ms, revert.fault, revert.client_errors)
            } else {
                format!("none, although the shadow {}", revert.fault)
            };
            stage.line(format!("{:<20}{text}", "revert"));
        }
        if self.unexplained_reverts > 0 {
            stage.line(format!(
                "{:<20}{} without a fault of ours (a busy machine?), then climbed again",
                "revert", self.unexplained_reverts
            ));
        }
        for (name, step) in [("cutover", &self.cutover), ("rollback", &self.rollback)] {
            let text = format!(
                "paused {:.1} ms (longest wait of a client {:.1} ms), {} failed statements, {} dropped connections",
                step.pause_ms, step.client_pause_ms, step.failed_statements, step.dropped_connections
            );
            stage.line(format!("{name:<20}{text}"));
        }
        for validation in &self.validation {
            let text = format!(
                "{}: {} rows in {} tables, {} differences, {:.1} s",
                validation.when,
                number(validation.rows),
                validation.tables,
                validation.differences,
                validation.seconds
            );
            stage.line(format!("{:<20}{text}", "validation"));
        }
        if let Some(checker) = &self.checker {
            let text = format!(
                "{} acknowledged rows: {} missing, {} duplicated, {} wrong, {} invented; {} in doubt",
                number(checker.acknowledged),
                checker.missing,
                checker.duplicated,
                checker.wrong + checker.balances_wrong + checker.stocks_wrong,
                checker.unexpected,
                checker.in_doubt
            );
            stage.line(format!("{:<20}{text}", "what clients know"));
        }
    }
}
