//! Chapters h and i: the shadow becomes the owner under load, every row is validated, and the way back is taken.

use super::{DATABASE, Play, SHADOW, actors, load_line, shorten};
use crate::demo::{
    Break, DemoError,
    proxy::{ProxyError, Reply},
    report::{Move, Report, Validation},
    stage::grouped,
};
use std::time::{Duration, Instant};

/// Waits of clients that a change of owner caused have ended by then.
const AFTERMATH: Duration = Duration::from_millis(1500);
/// A lost change that a later one of the same row repairs is not to be found any more: then another one is lost.
const LOSSES_MAX: usize = 6;

impl Play<'_> {
    /// No operator cuts over to a shadow that has not been compared row by row.
    pub(super) async fn validate_before_cutover(&mut self, report: &mut Report) -> Result<(), DemoError> {
        self.stage.chapter("i. Validation before the cutover: every row of every table, live");
        if self.is_breaking(Break::CorruptRow) {
            self.corrupt_a_row().await?;
        }
        if !self.is_breaking(Break::LoseChange) {
            return self.verify(report, "before cutover").await;
        }
        for _ in 0..LOSSES_MAX {
            self.tell(&format!("FAULT LOSE CHANGE {SHADOW}")).await?;
            self.stage.notice("one change is dropped before it is applied");
            self.pass_time(Duration::from_secs(1), load_line).await?;
            self.verify(report, "before cutover").await?;
            self.stage.line("a later change of the same row has repaired it: once more");
        }
        Err(DemoError::Failed(format!("{LOSSES_MAX} changes were lost and VERIFY found no difference")))
    }

    /// Behind the feed's back: no trigger, no change stream, one value.
    async fn corrupt_a_row(&mut self) -> Result<(), DemoError> {
        let failed = |error: tokio_postgres::Error| DemoError::Failed(format!("the demo could not corrupt a row: {error}"));
        let client = self.shadow.connect(DATABASE).await?;
        client
            .batch_execute(
                "BEGIN; SET LOCAL session_replication_role = replica;
                 UPDATE customer SET name = name || '?' WHERE id = md5('customer7')::uuid; COMMIT",
            )
            .await
            .map_err(failed)?;
        self.stage.notice("one value of public.customer was changed on the shadow behind the feed's back (column name)");
        Ok(())
    }

    /// Chapter h, and validation of the new owner's follower.
    pub(super) async fn cut_over(&mut self, report: &mut Report) -> Result<(), DemoError> {
        self.stage.chapter("h. Cutover under load");
        report.cutover = self.change_owner(&format!("CUTOVER {SHADOW}"), SHADOW).await?;
        self.pass_time(self.pace.calm, owner_line).await?;
        self.stage.chapter("i. Validation: the old source follows the new owner");
        self.verify(report, "after cutover").await
    }

    /// The way back.
    pub(super) async fn roll_back(&mut self, report: &mut Report) -> Result<(), DemoError> {
        self.stage.chapter("i. Rollback under load: the source takes over again, with everything written meanwhile");
        report.rollback = self.change_owner(&format!("ROLLBACK {DATABASE}"), "source").await?;
        self.pass_time(self.pace.calm, owner_line).await?;
        self.verify(report, "after rollback").await
    }

    async fn change_owner(&mut self, command: &str, new_owner: &str) -> Result<Move, DemoError> {
        let failures = self.tally.failures();
        self.tally.take_slowest_us();
        let reply = self.tell(command).await?;
        tokio::time::sleep(AFTERMATH).await;
        let outcome = move_of(&reply, self.tally.take_slowest_us())?;
        let since = self.tally.failures().since(failures);
        let outcome = Move { failed_statements: since.failed_statements, dropped_connections: since.dropped_connections, ..outcome };

        let state = self.state().await?;
        let (database, _) = actors(&state)?;
        if database.owner != new_owner {
            return Err(DemoError::Failed(format!("after `{command}` the owner is {}, not {new_owner}", database.owner)));
        }
        self.stage.good(format!(
            "{} owns the writes (epoch {}); paused {:.1} ms, longest wait of a client {:.1} ms, {} failed statements, {} dropped connections",
            database.owner, database.epoch, outcome.pause_ms, outcome.client_pause_ms, outcome.failed_statements, outcome.dropped_connections
        ));
        Ok(outcome)
    }

    /// VERIFY; a difference ends the story.
    async fn verify(&mut self, report: &mut Report, when: &str) -> Result<(), DemoError> {
        let begun = Instant::now();
        match self.tell(&format!("VERIFY {SHADOW}")).await {
            Ok(reply) => {
                let validation = validation_of(when, &reply)?;
                self.stage.good(format!(
                    "{} rows in {} tables compared in {:.1} s under load: {} differences",
                    grouped(validation.rows),
                    validation.tables,
                    validation.seconds,
                    validation.differences
                ));
                let differences = validation.differences;
                report.validation.push(validation);
                if differences == 0 { Ok(()) } else { Err(DemoError::Failed(format!("VERIFY {when}: {differences} rows differ"))) }
            }
            Err(ProxyError::Refused { message, .. }) => {
                report.validation.push(Validation {
                    when: when.to_owned(),
                    differences: first_number(&message).unwrap_or(1).max(1),
                    seconds: begun.elapsed().as_secs_f64(),
                    examples: message.lines().map(|line| shorten(line, 300)).collect(),
                    ..Validation::default()
                });
                Err(DemoError::Failed(format!("VERIFY {when}: {message}")))
            }
            Err(error) => Err(error.into()),
        }
    }
}

fn owner_line(database: &crate::console::state::DatabaseState, shadow: &crate::console::state::ShadowState) -> String {
    format!("{} owns the writes; {}", database.owner, load_line(database, shadow))
}

/// Rows `step, ms`; the last one is `pause`.
fn move_of(reply: &Reply, slowest_us: u64) -> Result<Move, DemoError> {
    let mut steps = Vec::new();
    for row in &reply.rows {
        if let (Some(step), Some(ms)) = (reply.field(row, "step"), reply.field(row, "ms")) {
            steps.push((step.to_owned(), ms.to_owned()));
        }
    }
    let pause = steps.iter().rfind(|(step, _)| step == "pause").and_then(|(_, ms)| ms.parse::<f64>().ok());
    let pause_ms = pause.ok_or_else(|| DemoError::Failed("the console's answer names no pause".into()))?;
    Ok(Move { pause_ms, client_pause_ms: slowest_us as f64 / 1000.0, steps, ..Move::default() })
}

/// A row per table; the last one is the total.
fn validation_of(when: &str, reply: &Reply) -> Result<Validation, DemoError> {
    let unreadable = || DemoError::Failed("VERIFY answered something else than rows and differences per table".into());
    let (total, tables) = reply.rows.split_last().ok_or_else(unreadable)?;
    let figure = |row: &[String], column: &str| reply.field(row, column).and_then(|text| text.parse::<f64>().ok());
    let examples = reply.rows.iter().filter_map(|row| reply.field(row, "examples"));
    Ok(Validation {
        when: when.to_owned(),
        rows: figure(total, "rows").ok_or_else(unreadable)? as u64,
        tables: tables.len() as u64,
        differences: figure(total, "differences").ok_or_else(unreadable)? as u64,
        seconds: figure(total, "seconds").ok_or_else(unreadable)?,
        examples: examples.filter(|text| !text.is_empty()).map(str::to_owned).collect(),
    })
}

fn first_number(text: &str) -> Option<u64> {
    text.split(|letter: char| !letter.is_ascii_digit()).find(|part| !part.is_empty())?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(columns: &[&str], rows: &[&[&str]]) -> Reply {
        let texts = |values: &[&str]| values.iter().map(|value| (*value).to_owned()).collect::<Vec<_>>();
        Reply { columns: texts(columns), rows: rows.iter().map(|row| texts(row)).collect(), notices: Vec::new() }
    }

    #[test]
    fn reads_the_answers_of_the_console() {
        let moved = move_of(&reply(&["step", "ms"], &[&["hold", "1.5"], &["pause", "42.25"]]), 50_000).unwrap();
        assert_eq!((moved.pause_ms, moved.client_pause_ms, moved.steps.len()), (42.25, 50.0, 2));
        assert!(move_of(&reply(&["step", "ms"], &[&["hold", "1.5"]]), 0).is_err());

        let columns = ["table", "rows", "differences", "seconds", "examples"];
        let rows: [&[&str]; 3] =
            [&["public.a", "10", "0", "0.1", ""], &["public.b", "5", "0", "0.1", ""], &["total", "15", "0", "0.2", ""]];
        let validation = validation_of("now", &reply(&columns, &rows)).unwrap();
        assert_eq!((validation.rows, validation.tables, validation.differences), (15, 2, 0));
        assert!(validation_of("now", &reply(&columns, &[])).is_err());
        assert!(validation_of("now", &reply(&["other"], &[&["1"]])).is_err());
        assert_eq!(first_number("found 12 differences in 3"), Some(12));
    }
}
