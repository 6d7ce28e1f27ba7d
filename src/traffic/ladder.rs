//! The shift ladder: a pure state machine. Time comes in as an argument; the only effect is the percentage it returns.

use crate::config::ShiftConfig;
use std::time::{Duration, Instant};

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

    /// Moves on when the hold time of a step has passed and the shadow has answered reads meanwhile (`evidence`): silence
    /// is not health. Returns the percentage to set when it changes.
    #[must_use]
    pub fn tick(self, config: &ShiftConfig, evidence: bool, now: Instant) -> (Self, Option<f64>) {
        match self {
            Ladder::Idle => (Ladder::Idle, None),
            Ladder::Done => (Ladder::Done, None),
            Ladder::Reverted => (Ladder::Reverted, None),
            Ladder::Step { index, since } if !evidence || now.saturating_duration_since(since) < config.hold => {
                (Ladder::Step { index, since }, None)
            }
            Ladder::Step { index, .. } => match config.steps.get(index + 1) {
                Some(percent) => (Ladder::Step { index: index + 1, since: now }, Some(*percent)),
                None => (Ladder::Done, None),
            },
        }
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
mod tests {
    use super::*;

    #[test]
    fn climbs_step_by_step_and_stays_at_the_top() {
        let config = ShiftConfig { steps: vec![5.0, 50.0, 100.0], hold: Duration::from_secs(10) };
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let (mut ladder, percent) = Ladder::start(&config, start);
        assert_eq!(percent, 5.0);
        let mut set = Vec::new();
        for second in 0..60 {
            let (next, percent) = ladder.tick(&config, true, at(second));
            ladder = next;
            set.extend(percent.map(|percent| (second, percent)));
        }
        assert_eq!(set, [(10, 50.0), (20, 100.0)]);
        assert_eq!(ladder, Ladder::Done);
        assert_eq!(Ladder::Reverted.tick(&config, true, at(99)), (Ladder::Reverted, None), "a revert is left by a person only");
        assert_eq!(Ladder::start(&config, start).0.tick(&config, false, at(99)).1, None, "no read was served: nothing is known");
        assert_eq!(Ladder::start(&config, start).0.describe(&config, at(1)), "step 1 of 3 (5 %), 9 s left");
    }
}
