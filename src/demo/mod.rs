//! The one-command story: a real PostgreSQL 15 under load moves to a real PostgreSQL 18 and back, by way of the real
//! program, its real console and real clients; then a report in which every figure was measured.
//!
//! Deliberately absent: any shortcut into the proxy. This room is an operator and a crowd of applications; what it knows
//! of the proxy it reads from `/api/state` and the console, as anyone could. `servers` also serves the integration tests.
//!
//! Invariants: nothing of ours outlives the run, however it ends; the verdict is `pass` only if every zero is a zero and
//! everything that was to happen was seen ([`report::Report::conclude`]).

pub mod checker;
pub mod pgbench;
pub mod play;
pub mod proxy;
pub mod report;
pub mod servers;
pub mod stage;
pub mod tally;
pub mod workload;

use play::{Pace, Play};
use report::Report;
use stage::Stage;
use std::{fs, path::PathBuf, str::FromStr};
use tokio::signal::unix::{SignalKind, signal};

/// Ways to break the demo, to see that it can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Break {
    /// One value is changed behind the feed's back on the shadow: VERIFY must find it, exit status 1.
    CorruptRow,
    /// One change is dropped before it is applied: VERIFY must find it, exit status 1.
    LoseChange,
    /// The shadow is killed in the middle of the ladder: a revert, no client error, exit status 0.
    ShadowDown,
}

impl Break {
    /// As on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Break::CorruptRow => "corrupt-row",
            Break::LoseChange => "lose-change",
            Break::ShadowDown => "shadow-down",
        }
    }
}

impl FromStr for Break {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Break::CorruptRow, Break::LoseChange, Break::ShadowDown]
            .into_iter()
            .find(|way| way.as_str() == text)
            .ok_or_else(|| format!("`{text}` is not a way to break the demo: corrupt-row, lose-change or shadow-down"))
    }
}

/// What the demo was asked for.
#[derive(Clone, Debug)]
pub struct DemoOptions {
    /// Break it.
    pub broken: Option<Break>,
    /// Stay up at the end until Ctrl-C.
    pub keep: bool,
    /// Shorter, with less data: for tests.
    pub quick: bool,
    /// Where report.json goes; logs and proxy.toml go next to it.
    pub report: PathBuf,
}

impl Default for DemoOptions {
    fn default() -> Self {
        DemoOptions { broken: None, keep: false, quick: false, report: PathBuf::from("target/demo/report.json") }
    }
}

impl DemoOptions {
    /// The directory of the report, as an absolute path; created if missing.
    fn directory(&self) -> Result<PathBuf, DemoError> {
        let parent = self.report.parent().filter(|parent| !parent.as_os_str().is_empty()).map_or_else(|| PathBuf::from("."), PathBuf::from);
        let cannot = |error| DemoError::Cannot(format!("cannot create {}: {error}", parent.display()));
        fs::create_dir_all(&parent).map_err(cannot)?;
        parent.canonicalize().map_err(cannot)
    }
}

/// The story ended early.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// It could not begin: exit status 3.
    #[error("{0}")]
    Cannot(String),
    /// Something that the product promises did not happen: exit status 1.
    #[error("{0}")]
    Failed(String),
    /// Ctrl-C or SIGTERM: exit status 3.
    #[error("interrupted; everything was cleaned up")]
    Interrupted,
}

impl From<servers::ServerError> for DemoError {
    fn from(error: servers::ServerError) -> Self {
        DemoError::Cannot(error.to_string())
    }
}

impl From<proxy::ProxyError> for DemoError {
    fn from(error: proxy::ProxyError) -> Self {
        DemoError::Failed(error.to_string())
    }
}

/// Runs the demo and returns the exit status: 0 it went as it should, 1 it did not, 3 it could not be carried out.
pub async fn run(options: DemoOptions) -> i32 {
    let stage = Stage::new(if options.quick { Pace::QUICK } else { Pace::FULL }.expected);
    stage.line("A PostgreSQL 15 under load moves to a PostgreSQL 18 and back; its clients notice nothing.");
    stage.line("Both servers are real and temporary (fsync off); nothing that you have is touched.");
    let mut report = Report { broken: options.broken.map(|way| way.as_str().to_owned()), quick: options.quick, ..Report::default() };
    let mut status = None;
    // Dropping the story stops every server and every process that it started.
    let ended = tokio::select! {
        () = tell(&options, &stage, &mut report, &mut status) => true,
        () = interrupted() => false,
    };
    match status {
        Some(status) => status,
        None if ended => 3,
        None => finish(&options, &stage, &mut report, Err(DemoError::Interrupted)),
    }
}

async fn tell(options: &DemoOptions, stage: &Stage, report: &mut Report, status: &mut Option<i32>) {
    match Play::prepare(options, stage, report).await {
        Err(error) => *status = Some(finish(options, stage, report, Err(error))),
        Ok(mut play) => {
            let outcome = play.perform(report).await;
            *status = Some(finish(options, stage, report, outcome));
            if options.keep {
                play.invite();
                std::future::pending::<()>().await;
            }
        }
    }
}

async fn interrupted() {
    let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}

/// Draws the conclusion, writes report.json, shows the report; returns the exit status.
fn finish(options: &DemoOptions, stage: &Stage, report: &mut Report, outcome: Result<(), DemoError>) -> i32 {
    let hopeless = match &outcome {
        Ok(()) => false,
        Err(error) => {
            report.stopped_at.get_or_insert_with(|| error.to_string());
            report.fail(error.to_string());
            !matches!(error, DemoError::Failed(_))
        }
    };
    report.seconds = stage.elapsed().as_secs_f64();
    report.conclude();
    let written = options.directory().and_then(|directory| {
        let text = serde_json::to_string_pretty(report).map_err(|error| DemoError::Cannot(format!("cannot write the report: {error}")))?;
        fs::write(&options.report, text + "\n")
            .map_err(|error| DemoError::Cannot(format!("cannot write {}: {error}", options.report.display())))?;
        Ok(directory)
    });
    stage.chapter("Report");
    if !hopeless {
        report.show(stage);
    }
    stage.line("");
    for failure in &report.failures {
        stage.bad(failure);
    }
    if report.failures.is_empty() {
        let sentence = format!("pass, in {:.0} s. Nothing was lost, nothing was doubled, no client saw an error.", report.seconds);
        stage.good(stage.strong(&sentence));
    } else {
        stage.bad(stage.strong(&format!("fail, after {:.0} s", report.seconds)));
    }
    match written {
        Ok(directory) => {
            stage.line(format!("report: {}, logs: {}/{{proxy,source,shadow}}.log", options.report.display(), directory.display()));
            if hopeless { 3 } else { i32::from(!report.failures.is_empty()) }
        }
        Err(error) => {
            stage.bad(error.to_string());
            3
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_to_break_it() {
        for way in [Break::CorruptRow, Break::LoseChange, Break::ShadowDown] {
            assert_eq!(way.as_str().parse::<Break>(), Ok(way));
        }
        assert!("other".parse::<Break>().unwrap_err().contains("shadow-down"));
    }
}
