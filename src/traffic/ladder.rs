//! The shift ladder: a pure controller. A window of observations, the calendar and the time come in as arguments; out comes what to
//! do and why. It knows no store, no lock and no clock, so that going back waits for nothing.

use super::judge::{self, Health};
use crate::config::{RevertConfig, ShiftConfig};
use std::time::{Duration, Instant};

/// What the controller looks at.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a> {
    /// The window of observations.
    pub health: &'a Health,
    /// Reads that the shadow has answered since the present step began.
    pub served: u64,
    /// Why the calendar allows no step now.
    pub closed: Option<&'a str>,
    /// The time.
    pub now: Instant,
}

/// What to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Decision {
    /// Nothing is due.
    Stay,
    /// A step is due and is not taken, for this reason.
    Hold(String),
    /// Serve so many percent from now on.
    Promote(f64),
    /// The last step was held long enough: reads stay there.
    Finish,
    /// Serve nothing any more, for this reason.
    Revert(String),
}

/// Where a shadow stands on its ladder.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ladder {
    /// Not started, or stopped by an operator.
    Idle,
    /// On a step, healthy since.
    Step {
        /// Index into the configured steps.
        index: usize,
        /// When this step began.
        since: Instant,
    },
    /// The last step was held long enough: reads stay there.
    Done,
    /// The judge went back.
    Reverted,
}

impl Ladder {
    /// Starts at the first step and returns its percentage.
    pub fn start(config: &ShiftConfig, now: Instant) -> (Self, f64) {
        (Ladder::Step { index: 0, since: now }, config.steps.first().copied().unwrap_or(0.0))
    }

    /// Health first, whatever the ladder does; then, on a step, whether the next is due and may be taken. A shadow that answers reads
    /// without a ladder (SET, SIMULATE CUTOVER) is judged all the same.
    #[must_use]
    pub fn decide(self, seen: &Seen<'_>, revert: &RevertConfig, shift: &ShiftConfig) -> (Self, Decision) {
        if let Some(reason) = judge::verdict(seen.health, revert) {
            let next = match self {
                Ladder::Step { .. } | Ladder::Done => Ladder::Reverted,
                Ladder::Idle => Ladder::Idle,
                Ladder::Reverted => Ladder::Reverted,
            };
            return (next, Decision::Revert(reason));
        }
        match self {
            Ladder::Idle => (Ladder::Idle, Decision::Stay),
            Ladder::Done => (Ladder::Done, Decision::Stay),
            Ladder::Reverted => (Ladder::Reverted, Decision::Stay),
            Ladder::Step { index, since } => {
                let stays = Ladder::Step { index, since };
                if seen.now.saturating_duration_since(since) < shift.hold {
                    return (stays, Decision::Stay);
                }
                if seen.served < shift.min_served {
                    // silence is not health
                    let served = seen.served;
                    return (stays, Decision::Hold(format!("{served} reads were served on this step, min_served is {}", shift.min_served)));
                }
                match (shift.steps.get(index + 1), seen.closed) {
                    (None, _) => (Ladder::Done, Decision::Finish),
                    (Some(_), Some(reason)) => (stays, Decision::Hold(reason.to_owned())),
                    (Some(percent), None) => (Ladder::Step { index: index + 1, since: seen.now }, Decision::Promote(*percent)),
                }
            }
        }
    }

    /// On a step that has another one above it.
    pub fn is_climbing(self, config: &ShiftConfig) -> bool {
        matches!(self, Ladder::Step { index, .. } if index + 1 < config.steps.len())
    }

    /// For people.
    pub fn describe(self, config: &ShiftConfig, now: Instant) -> String {
        match self {
            Ladder::Idle => "idle".into(),
            Ladder::Done => "done".into(),
            Ladder::Reverted => "reverted".into(),
            Ladder::Step { index, since } => {
                let left = config.hold.saturating_sub(now.saturating_duration_since(since));
                let percent = config.steps.get(index).copied().unwrap_or(0.0);
                format!("step {} of {} ({percent} %), {} s left", index + 1, config.steps.len(), ceil_seconds(left))
            }
        }
    }
}

fn ceil_seconds(left: Duration) -> u64 {
    left.as_secs() + u64::from(left.subsec_nanos() > 0)
}

#[cfg(test)]
#[path = "ladder_tests.rs"]
mod tests;
