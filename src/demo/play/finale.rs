//! The end: the load stops, what clients know is compared with the owner, and nothing is left on the servers.

use super::{DATABASE, Play, SHADOW, actors};
use crate::demo::{
    DemoError, checker,
    report::{Clients, Compare, Feed, Lag, Latency, Rehearsal, Report},
    servers::Server,
};
use crate::metadata::ProposalState;
use std::time::{Duration, Instant};

/// Objects and connections of ours that go away a moment after they were told to.
const CLEAN_WAIT_MAX: Duration = Duration::from_secs(10);
const SHUTDOWN_WAIT_MAX: Duration = Duration::from_secs(30);

const OBJECTS: &str = "SELECT 'replication slot ' || slot_name FROM pg_replication_slots
    UNION ALL SELECT 'publication ' || pubname FROM pg_publication
    UNION ALL SELECT 'replication origin ' || roname FROM pg_replication_origin
    UNION ALL SELECT 'event trigger ' || evtname FROM pg_event_trigger
    UNION ALL SELECT 'trigger ' || tgname FROM pg_trigger WHERE tgname LIKE 'understudy%'
    UNION ALL SELECT 'setting ' || array_to_string(setconfig, ', ') FROM pg_db_role_setting
    UNION ALL SELECT 'setting ' || name FROM pg_file_settings WHERE sourcefile LIKE '%postgresql.auto.conf'
    UNION ALL SELECT 'schema ' || nspname FROM pg_namespace WHERE nspname LIKE 'understudy%'";
const CONNECTIONS: &str = "SELECT 'connection ' || application_name FROM pg_stat_activity WHERE application_name LIKE 'understudy%'";

impl Play<'_> {
    /// Copies the proxy's figures into the report. Called before the owner changes (what is measured then is the other
    /// way round) and at the end.
    pub(super) async fn take_figures(&mut self, report: &mut Report) -> Result<(), DemoError> {
        let state = self.state().await?;
        let (database, shadow) = actors(&state)?;
        if database.owner == "source" && report.cutover.pause_ms == 0.0 {
            report.latency = Latency { source: shadow.source_latency, shadow: shadow.shadow_latency };
            let lag = &shadow.feed.lag_ms;
            report.feed.lag_ms = Lag { p50: lag.p50, p99: lag.p99, max: lag.max };
        }
        if shadow.feed.changes >= report.feed.changes {
            let lag_ms = std::mem::take(&mut report.feed.lag_ms);
            report.feed =
                Feed { changes: shadow.feed.changes, transactions: shadow.feed.transactions, lag_ms, findings: report.feed.findings };
        }
        report.feed.findings = report.feed.findings.max(shadow.feed.findings);
        let compare = &shadow.compare;
        if compare.sampled >= report.compare.sampled {
            report.compare = Compare {
                sampled: compare.sampled,
                same: compare.same,
                different: compare.different.max(report.compare.different),
                undecided: compare.undecided,
                dropped: compare.dropped,
                errors: compare.errors,
                reasons: compare.reasons.clone(),
                examples: compare.examples.clone(),
            };
        }
        let rehearsal = &shadow.rehearsal;
        if rehearsal.transactions >= report.rehearsal.transactions {
            report.rehearsal = Rehearsal {
                transactions: rehearsal.transactions,
                errors: rehearsal.errors,
                tag_mismatches: rehearsal.tag_mismatches,
                undecided: rehearsal.undecided.clone(),
                left_out: rehearsal.left_out.clone(),
                examples: rehearsal.examples.clone(),
            };
        }
        report.served.reads = report.served.reads.max(shadow.served.reads);
        report.served.fallbacks = report.served.fallbacks.max(shadow.served.fallbacks);
        report.served.fenced = report.served.fenced.max(shadow.served.fenced);
        let count = |wanted: ProposalState| state.proposals.iter().filter(|proposal| proposal.state == wanted).count() as u64;
        report.schema.proposals = state.proposals.len() as u64;
        report.schema.auto_applied = count(ProposalState::AutoApplied);
        report.schema.approved = count(ProposalState::Approved);
        report.schema.rejected = count(ProposalState::Rejected);
        report.schema.failed = count(ProposalState::Failed);
        report.schema.pending = count(ProposalState::Pending);
        Ok(())
    }

    /// Says how to look at what stays up.
    pub fn invite(&self) {
        self.stage.notice(format!(
            "everything stays up until Ctrl-C: psql -h 127.0.0.1 -p {} understudy, http://127.0.0.1:{}/",
            self.proxy.listen(),
            self.proxy.http()
        ));
    }

    /// Chapter j, as far as it can be told.
    pub(super) async fn close(&mut self, report: &mut Report) -> Result<(), DemoError> {
        self.stage.chapter("j. The load ends; what clients were told is compared with what the owner holds");
        self.stage.live("every client ends what it has begun");
        if let Some(workload) = self.workload.take() {
            workload.finish().await;
        }
        if let Some(bench) = self.bench.take() {
            report.clients.pgbench_rounds = bench.finish().await;
        }
        let failures = self.tally.failures();
        let (reads_checked, stale) = self.tally.reads();
        report.served.stale = stale;
        report.clients = Clients {
            transactions: self.tally.transactions(),
            failed_statements: failures.failed_statements,
            dropped_connections: failures.dropped_connections,
            pgbench_rounds: report.clients.pgbench_rounds,
            reads_checked,
            latency: self.tally.latency(),
            messages: self.tally.messages(),
        };
        for message in report.clients.messages.iter().take(5) {
            self.stage.bad(message);
        }
        self.take_figures(report).await?;
        self.compare_ledger(report).await?;
        if report.stopped_at.is_none() && !self.options.keep {
            self.leave_nothing(report).await?;
        }
        Ok(())
    }

    async fn compare_ledger(&mut self, report: &mut Report) -> Result<(), DemoError> {
        let state = self.state().await?;
        let (database, _) = actors(&state)?;
        let owner = if database.owner == "source" { &self.source } else { &self.shadow };
        let client = owner.connect(DATABASE).await?;
        let findings = checker::compare(&self.ledger, &client)
            .await
            .map_err(|error| DemoError::Failed(format!("cannot compare what clients know with the owner: {error}")))?;
        if findings.is_clean() {
            self.stage.good(format!("{} acknowledged rows: all there, once, as acknowledged", findings.acknowledged));
        } else {
            findings.examples.iter().for_each(|example| self.stage.bad(example));
        }
        report.checker = Some(findings);
        Ok(())
    }

    async fn leave_nothing(&mut self, report: &mut Report) -> Result<(), DemoError> {
        self.tell(&format!("SHADOW STOP {SHADOW}")).await?;
        report.left_behind = self.await_absence(OBJECTS).await?;
        self.stage.command("SHUTDOWN");
        // The process may be gone before its answer is.
        let _ = self.console.tell("SHUTDOWN").await;
        match self.proxy.wait_for_end(SHUTDOWN_WAIT_MAX).await? {
            Some(0) => {}
            status => report.fail(format!("the proxy ended with status {status:?} after SHUTDOWN")),
        }
        report.left_behind.extend(self.await_absence(CONNECTIONS).await?);
        if report.left_behind.is_empty() {
            self.stage.good("nothing of ours is left on either server: no slot, publication, trigger, schema or connection");
        } else {
            report.left_behind.iter().for_each(|object| self.stage.bad(format!("left behind: {object}")));
        }
        Ok(())
    }

    async fn await_absence(&self, question: &str) -> Result<Vec<String>, DemoError> {
        let deadline = Instant::now() + CLEAN_WAIT_MAX;
        loop {
            let mut found = Vec::new();
            for (name, server) in [("source", &self.source), ("shadow", &self.shadow)] {
                found.extend(ask(server, question).await?.into_iter().map(|object| format!("{object} on the {name}")));
            }
            if found.is_empty() || Instant::now() > deadline {
                return Ok(found);
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}

async fn ask(server: &Server, question: &str) -> Result<Vec<String>, DemoError> {
    let client = server.connect(DATABASE).await?;
    let rows = client.query(question, &[]).await.map_err(|error| DemoError::Failed(format!("cannot look for what is left: {error}")))?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}
