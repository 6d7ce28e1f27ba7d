//! Chapters b to e: the shadow is created, rehearsed, compared, and follows the source's schema.

use super::{DATABASE, Play, SHADOW, actors, load_line, shorten};
use crate::demo::{
    DemoError,
    report::{Copy, Report},
    stage::{bytes, grouped, millis},
};
use crate::metadata::ProposalState;
use std::time::{Duration, Instant};

/// What the developers of the source do meanwhile, through the proxy.
const CHANGES: [&str; 5] = [
    "ALTER TABLE customer ADD COLUMN tier integer NOT NULL DEFAULT 1",
    "ALTER TABLE transfer ADD COLUMN booked timestamptz NOT NULL DEFAULT now()",
    "ALTER TABLE product ALTER COLUMN stock TYPE bigint",
    "CREATE INDEX transfer_note ON transfer (note)",
    "ALTER TABLE customer DROP COLUMN nickname",
];
/// What the people who prepare the new database do on the shadow alone.
const SHADOW_CHANGE: &str = "ALTER TABLE customer ADD COLUMN segment text";
/// What must be true on the shadow afterwards: (what, question).
const ARRIVED: [(&str, &str); 5] = [
    ("customer.tier", "SELECT count(*) > 0 FROM pg_attribute WHERE attrelid = 'customer'::regclass AND attname = 'tier'"),
    ("transfer.booked", "SELECT count(*) > 0 FROM pg_attribute WHERE attrelid = 'transfer'::regclass AND attname = 'booked'"),
    (
        "product.stock as bigint",
        "SELECT count(*) > 0 FROM pg_attribute WHERE attrelid = 'product'::regclass AND attname = 'stock' AND atttypid = 'bigint'::regtype",
    ),
    ("index transfer_note", "SELECT coalesce((SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('transfer_note')), false)"),
    ("customer.nickname dropped", "SELECT count(*) = 0 FROM pg_attribute WHERE attrelid = 'customer'::regclass AND attname = 'nickname'"),
];
const COPY_WAIT_MAX: Duration = Duration::from_secs(90);
const ADAPT_WAIT_MAX: Duration = Duration::from_secs(30);
/// Percent of reads sampled from the first comparison on.
const SAMPLE_PERCENT: u32 = 20;

impl Play<'_> {
    /// Chapter b.
    pub(super) async fn create_shadow(&mut self, report: &mut Report) -> Result<(), DemoError> {
        self.stage.chapter("b. The shadow is created from the running source");
        self.tell(&format!("SHADOW START {SHADOW}")).await?;
        let begun = Instant::now();
        let streaming = self
            .watch(
                COPY_WAIT_MAX,
                |_, shadow| {
                    let copy = &shadow.feed.copy;
                    let rate = copy.bytes as f64 / copy.seconds.max(0.001);
                    let left = copy.seconds_left.map(|left| format!(", {left:.0} s left")).unwrap_or_default();
                    format!(
                        "{}: {} of about {} rows, {}, {}/s{left}",
                        shadow.feed.state,
                        grouped(copy.rows),
                        grouped(copy.rows_estimated),
                        bytes(copy.bytes),
                        bytes(rate as u64)
                    )
                },
                |_, _, shadow| {
                    let failed = shadow.feed.state.starts_with("failed");
                    (failed || (shadow.feed.copy.done && shadow.feed.state == "streaming")).then(|| shadow.feed.clone())
                },
            )
            .await?
            .ok_or_else(|| DemoError::Failed(format!("the shadow was not in step within {COPY_WAIT_MAX:?}")))?;
        if streaming.state.starts_with("failed") {
            return Err(DemoError::Failed(format!("the feed stopped: {}", streaming.state)));
        }
        let copy = &streaming.copy;
        report.copy = Copy { tables: copy.tables, rows: copy.rows, bytes: copy.bytes, seconds: copy.seconds };
        self.stage.good(format!(
            "{} rows ({}) of {} tables copied in {:.1} s, in step after {:.1} s, under load",
            grouped(copy.rows),
            bytes(copy.bytes),
            copy.tables,
            copy.seconds,
            begun.elapsed().as_secs_f64()
        ));
        Ok(())
    }

    /// Chapters c and d.
    pub(super) async fn rehearse_and_compare(&mut self, report: &mut Report) -> Result<(), DemoError> {
        self.stage.chapter("c, d. The live traffic is rehearsed: writes mirrored and rolled back, reads sampled and compared");
        self.tell(&format!("SET {SHADOW} sample_reads = {SAMPLE_PERCENT}")).await?;
        self.pass_time(self.pace.rehearse, load_line).await?;
        let state = self.state().await?;
        let (_, shadow) = actors(&state)?;
        self.stage.good(format!(
            "{} reads compared: {} the same, {} different, {} undecided",
            grouped(shadow.compare.same + shadow.compare.different + shadow.compare.undecided),
            grouped(shadow.compare.same),
            shadow.compare.different,
            grouped(shadow.compare.undecided)
        ));
        self.stage.good(format!(
            "{} write transactions rehearsed: {} errors, {} other tags or row counts",
            grouped(shadow.rehearsal.transactions),
            shadow.rehearsal.errors,
            shadow.rehearsal.tag_mismatches
        ));
        for example in shadow.compare.examples.iter().chain(&shadow.rehearsal.examples).take(5) {
            self.stage.notice(shorten(example, 200));
        }
        self.stage.line(format!("{:<64}{:>10}{:>10}{:>11}{:>10}", "costliest statements", "source p50", "p99", "shadow p50", "p99"));
        for query in shadow.queries.iter().take(5) {
            self.stage.line(format!(
                "{:<64}{:>10}{:>10}{:>11}{:>10}",
                shorten(&query.text, 62),
                millis(query.source.p50_us),
                millis(query.source.p99_us),
                millis(query.shadow.p50_us),
                millis(query.shadow.p99_us)
            ));
        }
        self.take_figures(report).await
    }

    /// Chapter e.
    pub(super) async fn change_schema(&mut self, report: &mut Report) -> Result<(), DemoError> {
        self.stage.chapter("e. The source's schema changes under load");
        let target = self.target();
        let failed = |error: tokio_postgres::Error| DemoError::Failed(format!("a schema change failed: {error}"));
        let client = target.connect("migration").await.map_err(failed)?;
        for change in CHANGES {
            self.stage.line(format!("source: {change}"));
            client.batch_execute(change).await.map_err(failed)?;
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        drop(client);
        self.stage.line(format!("shadow: {SHADOW_CHANGE}"));
        let shadow = self.shadow.connect(DATABASE).await?;
        shadow.batch_execute(SHADOW_CHANGE).await.map_err(failed)?;
        report.schema.changes = CHANGES.len() as u64 + 1;

        self.decide_proposals(report.schema.changes).await?;
        let deadline = Instant::now() + ADAPT_WAIT_MAX;
        loop {
            let mut missing = Vec::new();
            for (what, question) in ARRIVED {
                if !shadow.query_one(question, &[]).await.map_err(failed)?.get::<_, bool>(0) {
                    missing.push(what.to_owned());
                }
            }
            report.schema.missing_on_shadow = missing;
            if report.schema.missing_on_shadow.is_empty() || Instant::now() > deadline {
                break;
            }
            self.stage.live(format!("waiting for {}", report.schema.missing_on_shadow.join(", ")));
            self.approve_waiting().await?;
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        self.await_health(ADAPT_WAIT_MAX).await?;
        let counted = shadow.query_one("SELECT count(segment) FROM customer", &[]).await.map_err(failed)?;
        report.schema.synthetic_values = counted.get::<_, i64>(0).unsigned_abs();

        let state = self.state().await?;
        for proposal in &state.proposals {
            self.stage.line(format!(
                "{:>3}  {:<13} {:>4.0} %  {:<20} {}",
                proposal.id,
                proposal.state.as_str(),
                proposal.confidence * 100.0,
                shorten(&proposal.object, 20),
                shorten(&proposal.change, 100)
            ));
            if !proposal.note.is_empty() {
                self.stage.line(format!("     {}", shorten(&proposal.note, 140)));
            }
        }
        if report.schema.missing_on_shadow.is_empty() {
            self.stage.good(format!(
                "the shadow has followed, the feed never stopped; {} synthetic values in the column that only the shadow has",
                grouped(report.schema.synthetic_values)
            ));
        } else {
            self.stage.bad(format!("not on the shadow: {}", report.schema.missing_on_shadow.join(", ")));
        }
        Ok(())
    }

    /// Waits until there is a proposal for every change, and says yes to those that ask.
    async fn decide_proposals(&mut self, expected: u64) -> Result<(), DemoError> {
        let waiting = self
            .watch(
                ADAPT_WAIT_MAX,
                |_, shadow| format!("waiting for proposals; feed {}", shadow.feed.state),
                |state, _, _| (state.proposals.len() as u64 >= expected).then_some(()),
            )
            .await?;
        if waiting.is_none() {
            self.stage.notice("there are fewer proposals than changes");
        }
        self.approve_waiting().await
    }

    async fn approve_waiting(&mut self) -> Result<(), DemoError> {
        let state = self.state().await?;
        for proposal in state.proposals.iter().filter(|proposal| proposal.state == ProposalState::Pending) {
            self.stage.notice(format!("proposal {} waits for a person: {}", proposal.id, proposal.change));
            self.stage.line(format!("  {:.0} %: {}", proposal.confidence * 100.0, shorten(&proposal.why, 140)));
            for sql in &proposal.sql {
                self.stage.line(format!("  {}", shorten(sql, 140)));
            }
            self.tell(&format!("APPROVE {}", proposal.id)).await?;
        }
        Ok(())
    }
}
