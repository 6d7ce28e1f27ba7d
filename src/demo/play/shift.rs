//! Chapters f and g: reads move to the shadow, come back by themselves when it suffers, and move again.

use super::{DATABASE, FAULT_AT_PERCENT, Play, SHADOW, actors, load_line};
use crate::demo::{
    Break, DemoError,
    proxy::REVERT_WINDOW,
    report::{Report, Revert},
    servers::Server,
    stage::{grouped, millis},
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// A revert that takes longer than this did not happen.
const REVERT_WAIT_MAX: Duration = Duration::from_secs(10);
const CLIMB_WAIT_MAX: Duration = Duration::from_secs(60);
const HEAL_WAIT_MAX: Duration = Duration::from_secs(45);
/// Longer than the window: what was bad has left it.
const AFTER_HEALING: Duration = Duration::from_millis(2500);
/// Climbs without a fault of ours. More than one is needed only if the machine itself stalls.
const CLIMBS_MAX: usize = 3;
/// The slow shadow: all its processes stand still this long, …
const FROZEN: Duration = Duration::from_millis(250);
/// … and run this long.
const THAWED: Duration = Duration::from_millis(50);
const SIMULATED_PERCENT: f64 = 5.0;
const TOP_PERCENT: f64 = 100.0;

/// What is done to the shadow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// Freezes again and again, like a stalling disk.
    Slow,
    /// Ends the application's connections and refuses new ones.
    Failing,
    /// Killed, all processes at once.
    Down,
}

impl Fault {
    fn describe(self) -> &'static str {
        match self {
            Fault::Slow => "became slow",
            Fault::Failing => "failed",
            Fault::Down => "was killed",
        }
    }
}

/// How one attempt to climb ended.
enum Climb {
    Arrived,
    Reverted { reason: String },
}

impl Play<'_> {
    /// Chapter f.
    pub(super) async fn simulate_cutover(&mut self, report: &mut Report) -> Result<(), DemoError> {
        self.stage.chapter("f. Simulated cutover: the shadow answers a few of the reads");
        let failures = self.tally.failures();
        let served = self.served_reads().await?;
        let begun = Instant::now();
        let (planned, seconds) = (self.pace.simulate, self.pace.simulate.as_secs());
        self.tell(&format!("SIMULATE CUTOVER {SHADOW} AT {SIMULATED_PERCENT} FOR '{seconds}s'")).await?;
        // It ends by itself: that, not the clock, is awaited.
        self.watch(
            planned + REVERT_WAIT_MAX,
            |_, shadow| {
                format!(
                    "{} % of the reads: {} served, {} kept back by the fence",
                    shadow.serve_reads,
                    grouped(shadow.served.reads),
                    grouped(shadow.served.fenced)
                )
            },
            |_, _, shadow| (shadow.serve_reads == 0.0 && begun.elapsed() >= planned.mul_f64(0.9)).then_some(()),
        )
        .await?
        .ok_or_else(|| DemoError::Failed("the simulated cutover did not end by itself".into()))?;
        let outcome = &mut report.simulated_cutover;
        outcome.percent = SIMULATED_PERCENT;
        outcome.seconds = begun.elapsed().as_secs_f64();
        outcome.reads = self.served_reads().await?.saturating_sub(served);
        outcome.failed_statements = self.tally.failures().since(failures).total();
        let (checked, stale) = self.tally.reads();
        self.stage.good(format!(
            "{} reads served, {} failed statements; {} own writes read back since the start, {stale} stale",
            grouped(outcome.reads),
            outcome.failed_statements,
            grouped(checked)
        ));
        Ok(())
    }

    /// Chapter g.
    pub(super) async fn climb_the_ladder(&mut self, report: &mut Report) -> Result<(), DemoError> {
        self.stage.chapter("g. The shift ladder, with faults in the shadow");
        let faults: &[Fault] = if self.is_breaking(Break::ShadowDown) { &[Fault::Down] } else { &[Fault::Slow, Fault::Failing] };
        for fault in faults {
            let revert = self.climb_into(*fault, report).await?;
            if revert.triggered {
                self.stage.good(format!(
                    "reads were back at the owner {:.0} ms after the shadow {}, {} client errors: {}",
                    revert.reaction_ms, revert.fault, revert.client_errors, revert.reason
                ));
            } else {
                self.stage.bad(format!("the shadow {} and nothing reverted", revert.fault));
            }
            report.reverts.push(revert);
        }
        let slowest = report.reverts.iter().max_by(|left, right| left.reaction_ms.total_cmp(&right.reaction_ms));
        report.revert = slowest.cloned().unwrap_or_default();
        report.revert.triggered = report.reverts.iter().all(|revert| revert.triggered);
        report.revert.client_errors = report.reverts.iter().map(|revert| revert.client_errors).sum();

        self.climb(TOP_PERCENT, report).await?;
        let state = self.state().await?;
        let (_, shadow) = actors(&state)?;
        self.stage.good(format!(
            "all steps healthy: {} reads served, {} fell back, p99 {} (source {})",
            grouped(shadow.served.reads),
            shadow.served.fallbacks,
            millis(shadow.shadow_latency.p99_us),
            millis(shadow.source_latency.p99_us)
        ));
        self.take_figures(report).await
    }

    /// Starts the ladder, breaks the shadow at the second step, waits for the revert, heals.
    async fn climb_into(&mut self, fault: Fault, report: &mut Report) -> Result<Revert, DemoError> {
        self.climb(FAULT_AT_PERCENT, report).await?;
        // Half a step of normal life there.
        tokio::time::sleep(self.pace.hold / 2).await;
        let state = self.state().await?;
        let (_, shadow) = actors(&state)?;
        let earlier = shadow.revert.as_ref().map_or(0, |revert| revert.count);
        let failures = self.tally.failures();

        self.stage.notice(format!("now the shadow {} (served: {} %)", fault.describe(), shadow.serve_reads));
        let begun = Instant::now();
        let harm = Harm::inflict(fault, &self.shadow).await?;
        let reverted = self.await_revert(begun).await?;
        let state = self.state().await?;
        let newest = actors(&state)?.1.revert.clone().filter(|revert| revert.count > earlier);
        // What was already under way at the shadow must end well, too.
        tokio::time::sleep(Duration::from_millis(500)).await;
        harm.heal(&self.shadow).await?;
        tokio::time::sleep(AFTER_HEALING).await;
        self.await_health(HEAL_WAIT_MAX).await?;
        Ok(Revert {
            triggered: reverted.is_some() && newest.is_some(),
            fault: fault.describe().to_owned(),
            reason: newest.as_ref().map(|revert| revert.reason.clone()).unwrap_or_default(),
            reaction_ms: reverted.map_or(0.0, |after| after.as_secs_f64() * 1000.0),
            window_ms: REVERT_WINDOW.as_secs_f64() * 1000.0,
            reported_ms: newest.map_or(0.0, |revert| revert.reaction_ms),
            client_errors: self.tally.failures().since(failures).total(),
        })
    }

    /// Looks more often than elsewhere: this is measured.
    async fn await_revert(&mut self, begun: Instant) -> Result<Option<Duration>, DemoError> {
        while begun.elapsed() < REVERT_WAIT_MAX {
            let state = self.state().await?;
            let (database, shadow) = actors(&state)?;
            if shadow.serve_reads == 0.0 {
                return Ok(Some(begun.elapsed()));
            }
            self.stage.live(ladder_line(database, shadow));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(None)
    }

    /// Climbs until the shadow serves this share. A revert that nobody provoked is counted, told, and waited out.
    async fn climb(&mut self, percent: f64, report: &mut Report) -> Result<(), DemoError> {
        for _ in 0..CLIMBS_MAX {
            match self.try_to_climb(percent).await? {
                Climb::Arrived => return Ok(()),
                Climb::Reverted { reason } => {
                    report.unexplained_reverts += 1;
                    self.stage.notice(format!("reverted without a fault of ours (a busy machine?): {reason}"));
                    tokio::time::sleep(AFTER_HEALING).await;
                    self.await_health(HEAL_WAIT_MAX).await?;
                }
            }
        }
        Err(DemoError::Failed(format!("the ladder did not reach {percent} % in {CLIMBS_MAX} attempts")))
    }

    async fn try_to_climb(&mut self, percent: f64) -> Result<Climb, DemoError> {
        let reverts = |shadow: &crate::console::state::ShadowState| shadow.revert.as_ref().map_or(0, |revert| revert.count);
        let state = self.state().await?;
        let earlier = reverts(actors(&state)?.1);
        self.tell(&format!("SHIFT START {SHADOW}")).await?;
        self.watch(CLIMB_WAIT_MAX, ladder_line, |_, _, shadow| {
            if let Some(revert) = shadow.revert.as_ref().filter(|revert| revert.count > earlier) {
                return Some(Climb::Reverted { reason: revert.reason.clone() });
            }
            let whole = percent < TOP_PERCENT || shadow.shift.starts_with("done");
            (shadow.serve_reads >= percent && whole).then_some(Climb::Arrived)
        })
        .await?
        .ok_or_else(|| DemoError::Failed(format!("the ladder did not reach {percent} % within {CLIMB_WAIT_MAX:?}")))
    }

    async fn served_reads(&mut self) -> Result<u64, DemoError> {
        let state = self.state().await?;
        Ok(actors(&state)?.1.served.reads)
    }
}

fn ladder_line(database: &crate::console::state::DatabaseState, shadow: &crate::console::state::ShadowState) -> String {
    format!(
        "{:.0} % served by the shadow ({}): {} reads, {} fell back; {}",
        shadow.serve_reads,
        shadow.shift,
        grouped(shadow.served.reads),
        shadow.served.fallbacks,
        load_line(database, shadow)
    )
}

/// A fault that lasts until it is healed. Dropping it lets a frozen server go on.
struct Harm {
    fault: Fault,
    pulse: Option<(Arc<AtomicBool>, tokio::task::JoinHandle<()>)>,
}

impl Harm {
    async fn inflict(fault: Fault, shadow: &Arc<Server>) -> Result<Self, DemoError> {
        let mut pulse = None;
        match fault {
            Fault::Slow => {
                let (stop, server) = (Arc::new(AtomicBool::new(false)), shadow.clone());
                let stopped = stop.clone();
                let task = tokio::task::spawn_blocking(move || {
                    while !stopped.load(Relaxed) {
                        let _ = server.pause();
                        std::thread::sleep(FROZEN);
                        let _ = server.resume();
                        std::thread::sleep(THAWED);
                    }
                    let _ = server.resume();
                });
                pulse = Some((stop, task));
            }
            Fault::Failing => {
                let sql = format!(
                    "ALTER ROLE {} NOLOGIN; SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{0}'",
                    Server::APP
                );
                run(shadow, &sql).await?;
            }
            Fault::Down => shadow.kill9()?,
        }
        Ok(Harm { fault, pulse })
    }

    async fn heal(mut self, shadow: &Arc<Server>) -> Result<(), DemoError> {
        match self.fault {
            Fault::Slow => {
                if let Some((stop, task)) = self.pulse.take() {
                    stop.store(true, Relaxed);
                    let _ = task.await;
                }
            }
            Fault::Failing => run(shadow, &format!("ALTER ROLE {} LOGIN", Server::APP)).await?,
            Fault::Down => {
                let server = shadow.clone();
                tokio::task::spawn_blocking(move || server.restart())
                    .await
                    .map_err(|error| DemoError::Failed(format!("cannot start the shadow again: {error}")))??;
            }
        }
        Ok(())
    }
}

impl Drop for Harm {
    fn drop(&mut self) {
        if let Some((stop, _)) = &self.pulse {
            stop.store(true, Relaxed);
        }
    }
}

async fn run(server: &Server, sql: &str) -> Result<(), DemoError> {
    let failed = |error: tokio_postgres::Error| DemoError::Failed(format!("the demo could not break or heal the shadow: {error}"));
    server.connect(DATABASE).await?.batch_execute(sql).await.map_err(failed)
}
