//! The story, chapter by chapter, as an operator would live it: real servers, real clients, the console's own words.

mod finale;
mod ownership;
mod prepare;
mod rehearse;
mod shift;

use super::{
    Break, DemoError, DemoOptions,
    checker::Ledger,
    pgbench::PgBench,
    proxy::{Console, Proxy, ProxyError, Reply},
    report::Report,
    servers::Server,
    stage::Stage,
    tally::Tally,
    workload::Workload,
};
use crate::console::state::{DatabaseState, ShadowState, State};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// The shadow's name in proxy.toml.
const SHADOW: &str = "pg18";
/// The database's name, on the servers and in proxy.toml.
const DATABASE: &str = "shop";
/// The steps of the ladder, as in proxy.toml; faults come at the second.
const FAULT_AT_PERCENT: f64 = 25.0;
/// How often the state is asked for while something is awaited.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Rows of a console answer that are shown.
const SHOWN_ROWS_MAX: usize = 24;

/// How long and how hard.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// pgbench's scale: 100,000 rows each.
    pub scale: u32,
    /// Transactions a second, per pgbench process (there are three).
    pub bench_rate: u32,
    /// Clients of the second workload.
    pub clients: usize,
    /// What each of them waits between operations.
    pub client_pace: Duration,
    /// Rehearsing and sampling before anything else.
    pub rehearse: Duration,
    /// The simulated cutover.
    pub simulate: Duration,
    /// Each step of the ladder.
    pub hold: Duration,
    /// Load between a change of owner and its validation.
    pub calm: Duration,
    /// What all of it takes on a small machine, for the time left.
    pub expected: Duration,
}

impl Pace {
    /// For people.
    pub const FULL: Pace = Pace {
        scale: 10,
        bench_rate: 60,
        clients: 6,
        client_pace: Duration::from_millis(30),
        rehearse: Duration::from_secs(15),
        simulate: Duration::from_secs(5),
        hold: Duration::from_millis(2000),
        calm: Duration::from_secs(6),
        expected: Duration::from_secs(85),
    };
    /// For tests.
    pub const QUICK: Pace = Pace {
        scale: 1,
        bench_rate: 40,
        clients: 4,
        client_pace: Duration::from_millis(40),
        rehearse: Duration::from_secs(5),
        simulate: Duration::from_secs(3),
        hold: Duration::from_millis(1500),
        calm: Duration::from_secs(2),
        expected: Duration::from_secs(52),
    };
}

/// Everything that is on the stage.
pub struct Play<'a> {
    options: &'a DemoOptions,
    pace: Pace,
    stage: Stage,
    source: Arc<Server>,
    shadow: Arc<Server>,
    proxy: Proxy,
    console: Console,
    tally: Arc<Tally>,
    ledger: Arc<Ledger>,
    bench: Option<PgBench>,
    workload: Option<Workload>,
}

impl Play<'_> {
    /// All chapters after the preparation. `report` is filled as it goes, so that an early end still has its figures.
    ///
    /// # Errors
    /// [`DemoError`]
    pub async fn perform(&mut self, report: &mut Report) -> Result<(), DemoError> {
        let outcome = self.chapters(report).await;
        if let Err(error) = &outcome {
            self.stage.bad(error.to_string());
            report.stopped_at.get_or_insert_with(|| error.to_string());
        }
        // Whatever happened: what clients know is compared, and the figures are taken.
        if !matches!(outcome, Err(DemoError::Interrupted)) {
            self.close(report).await?;
        }
        outcome
    }

    async fn chapters(&mut self, report: &mut Report) -> Result<(), DemoError> {
        self.create_shadow(report).await?;
        self.rehearse_and_compare(report).await?;
        self.change_schema(report).await?;
        self.simulate_cutover(report).await?;
        self.climb_the_ladder(report).await?;
        self.validate_before_cutover(report).await?;
        self.cut_over(report).await?;
        self.roll_back(report).await
    }

    /// Gives a command and shows the answer.
    async fn tell(&self, command: &str) -> Result<Reply, ProxyError> {
        self.stage.command(command);
        let reply = self.console.tell(command).await?;
        self.show(&reply);
        Ok(reply)
    }

    fn show(&self, reply: &Reply) {
        if !reply.rows.is_empty() {
            let mut widths: Vec<usize> = reply.columns.iter().map(|name| name.chars().count()).collect();
            for row in reply.rows.iter().take(SHOWN_ROWS_MAX) {
                for (width, value) in widths.iter_mut().zip(row) {
                    *width = (*width).max(value.chars().count()).min(60);
                }
            }
            let print = |values: &[String]| {
                let cells: Vec<String> =
                    values.iter().zip(&widths).map(|(value, width)| format!("{:<width$}", shorten(value, 60))).collect();
                self.stage.quote(cells.join("  ").trim_end());
            };
            print(&reply.columns);
            reply.rows.iter().take(SHOWN_ROWS_MAX).for_each(|row| print(row));
            if reply.rows.len() > SHOWN_ROWS_MAX {
                self.stage.quote(&format!("({} more rows)", reply.rows.len() - SHOWN_ROWS_MAX));
            }
        }
        for notice in &reply.notices {
            self.stage.quote(notice);
        }
    }

    async fn state(&mut self) -> Result<State, DemoError> {
        match self.proxy.state().await {
            Ok(state) => Ok(state),
            Err(error) => {
                // A proxy that has ended says why in its log: a better answer than "connection refused".
                self.proxy.check_alive()?;
                Err(error.into())
            }
        }
    }

    /// Looks at the state until `done` gives a value; `None` when the time is up. `line` is shown meanwhile.
    async fn watch<T>(
        &mut self,
        at_most: Duration,
        line: impl Fn(&DatabaseState, &ShadowState) -> String,
        mut done: impl FnMut(&State, &DatabaseState, &ShadowState) -> Option<T>,
    ) -> Result<Option<T>, DemoError> {
        let deadline = Instant::now() + at_most;
        loop {
            let state = self.state().await?;
            let (database, shadow) = actors(&state)?;
            if let Some(value) = done(&state, database, shadow) {
                return Ok(Some(value));
            }
            if Instant::now() > deadline {
                return Ok(None);
            }
            self.stage.live(line(database, shadow));
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Lets the load go on for a while, showing what happens.
    async fn pass_time(&mut self, time: Duration, line: impl Fn(&DatabaseState, &ShadowState) -> String) -> Result<(), DemoError> {
        let begun = Instant::now();
        let text = |database: &DatabaseState, shadow: &ShadowState| {
            format!("{} ({:.0} s left)", line(database, shadow), time.saturating_sub(begun.elapsed()).as_secs_f64().ceil())
        };
        self.watch(time, text, |_, _, _| None::<()>).await?;
        Ok(())
    }

    /// Waits until the shadow is in step and healthy.
    async fn await_health(&mut self, at_most: Duration) -> Result<(), DemoError> {
        let healthy = self
            .watch(
                at_most,
                |_, shadow| {
                    format!("waiting for the shadow: {}, feed {}, lag {:.0} ms", shadow.health, shadow.feed.state, shadow.feed.lag_ms.now)
                },
                |_, _, shadow| {
                    (["healthy", "owner"].contains(&shadow.health.as_str())
                        && shadow.feed.state == "streaming"
                        && shadow.feed.lag_ms.now < 1000.0)
                        .then_some(())
                },
            )
            .await?;
        if healthy.is_some() {
            return Ok(());
        }
        let state = self.state().await?;
        let (_, shadow) = actors(&state)?;
        Err(DemoError::Failed(format!(
            "the shadow did not become healthy within {at_most:?}: {}, feed {}, lag {:.0} ms",
            shadow.health, shadow.feed.state, shadow.feed.lag_ms.now
        )))
    }

    fn is_breaking(&self, how: Break) -> bool {
        self.options.broken == Some(how)
    }
}

/// The database and its shadow in the state.
fn actors(state: &State) -> Result<(&DatabaseState, &ShadowState), DemoError> {
    let database = state.databases.iter().find(|database| database.name == DATABASE);
    let shadow = database.and_then(|database| database.shadows.iter().find(|shadow| shadow.name == SHADOW));
    database.zip(shadow).ok_or_else(|| DemoError::Failed(format!("/api/state names no database {DATABASE} with a shadow {SHADOW}")))
}

/// At most `width` characters.
fn shorten(text: &str, width: usize) -> String {
    let flat = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if flat.chars().count() <= width { flat } else { flat.chars().take(width.saturating_sub(1)).chain(['…']).collect() }
}

/// What the load looks like, in a line.
fn load_line(database: &DatabaseState, shadow: &ShadowState) -> String {
    format!(
        "{} clients, {} transactions; sampled {} ({} same, {} different), rehearsed {}; lag {:.0} ms",
        database.clients,
        super::stage::grouped(database.transactions),
        super::stage::grouped(shadow.compare.sampled),
        super::stage::grouped(shadow.compare.same),
        shadow.compare.different,
        super::stage::grouped(shadow.rehearsal.transactions),
        shadow.feed.lag_ms.now
    )
}
