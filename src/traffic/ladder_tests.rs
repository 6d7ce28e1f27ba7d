//! The controller by seeds: healthy runs with ordinary noise climb to the end, and every fault at each step is answered within a window.

use super::*;
use crate::traffic::{
    judge::{Load, tests::limits},
    observations::Observations,
};

const WINDOW: Duration = Duration::from_secs(2);
const STEPS: [f64; 4] = [5.0, 25.0, 50.0, 100.0];

fn shift() -> ShiftConfig {
    ShiftConfig {
        steps: STEPS.to_vec(),
        hold: Duration::from_secs(3),
        min_served: 20,
        order: Default::default(),
        calendar: Default::default(),
    }
}

fn gates() -> RevertConfig {
    RevertConfig { window: WINDOW, latency_floor: Duration::from_millis(2), min_requests: 20, ..limits() }
}

/// What a server's answers look like: lognormal with a heavy tail, now and then a stall that delays everybody.
struct Server {
    chance: fastrand::Rng,
    median_us: f64,
    stalled_until: Duration,
}

impl Server {
    fn new(seed: u64, median_us: f64) -> Self {
        Server { chance: fastrand::Rng::with_seed(seed), median_us, stalled_until: Duration::ZERO }
    }

    fn answer(&mut self, at: Duration) -> Duration {
        // Box-Muller
        let (u, v) = (self.chance.f64().max(1e-12), self.chance.f64());
        let normal = (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos();
        let mut us = self.median_us * (0.8 * normal).exp();
        if self.chance.f64() < 0.002 {
            us *= 20.0; // a checkpoint, a cold page
        }
        if self.chance.f64() < 0.000_005 {
            self.stalled_until = at + Duration::from_millis(self.chance.u64(20..120));
        }
        Duration::from_micros(us as u64) + self.stalled_until.saturating_sub(at)
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    Slow,
    Errors,
    WrongAnswers,
    Lag,
    /// Refuses connections: sessions keep their reads, and say so.
    Dead,
    /// Takes connections and never answers: each read is given up after `hedge_after`.
    HalfOpen,
    /// Its server has no connections left.
    Full,
}

const FAULTS: [(Fault, &str); 7] = [
    (Fault::Slow, "latency"),
    (Fault::Errors, "error"),
    (Fault::WrongAnswers, "mismatch"),
    (Fault::Lag, "lag"),
    (Fault::Dead, "error"),
    (Fault::HalfOpen, "error"),
    (Fault::Full, "connections"),
];

struct Run {
    /// When each decision was made that changes something.
    decisions: Vec<(Duration, Decision)>,
    /// When the fault began.
    began: Option<Duration>,
}

/// Plays a shift with 1,000 reads per second: each is answered by the shadow or the owner by the share, a tenth of the owner's is sampled;
/// the controller looks every 100 ms. `fault`: what happens 1 s after the ladder has reached that step.
fn play(seed: u64, fault: Option<(Fault, f64)>) -> Run {
    let (gates, shift) = (gates(), shift());
    let observations = Observations::new(WINDOW);
    let (mut owner, mut shadow) = (Server::new(seed, 700.0), Server::new(seed ^ 0x5eed, 800.0));
    let mut chance = fastrand::Rng::with_seed(!seed);
    let start = Instant::now();
    let (mut ladder, mut share) = Ladder::start(&shift, start);
    let (mut served, mut reached) = (0, Duration::ZERO);
    let mut run = Run { decisions: Vec::new(), began: None };
    for read in 0..16_000_u64 {
        let at = Duration::from_millis(read);
        let now = start + at;
        if let Some((_, step)) = fault
            && run.began.is_none()
            && share == step
            && at >= reached + Duration::from_secs(1)
        {
            run.began = Some(at);
        }
        let ill = fault.map(|(fault, _)| fault).filter(|_| run.began.is_some());
        let serves = chance.f64() * 100.0 < share;
        if !serves {
            observations.owner_outcome(owner.answer(at), now);
        }
        if serves || chance.u32(0..10) == 0 {
            let (slower, fails) = match ill {
                Some(Fault::Slow) => (10.0, 0.0),
                Some(Fault::Errors) => (1.0, 0.2),
                _ => (1.0, 0.0005), // ordinary noise: one in two thousand fails on the shadow only
            };
            let latency = shadow.answer(at).mul_f64(slower);
            match ill {
                Some(Fault::Dead) => {}
                Some(Fault::HalfOpen) => observations.shadow_outcome(Duration::from_millis(250), true, now),
                _ => {
                    observations.shadow_outcome(latency, chance.f64() < fails, now);
                    served += u64::from(serves);
                    if !serves {
                        observations.decided(ill == Some(Fault::WrongAnswers) && chance.f64() < 0.2, now);
                    }
                }
            }
        }
        if read % 100 != 0 {
            continue;
        }
        if ill == Some(Fault::Dead) {
            observations.unavailable(now);
        }
        // a feed that has stopped falls behind as time goes by; max_lag is shorter here, so that a window can see it
        let lag = if ill == Some(Fault::Lag) { at - run.began.unwrap_or(at) } else { Duration::from_millis(chance.u64(0..300)) };
        let (mut health, _) = observations.health(lag, &gates, now);
        health.load = Some(Load { connections: if ill == Some(Fault::Full) { 99.0 } else { 40.0 }, ..Load::default() });
        let gates = RevertConfig { max_lag: Duration::from_secs(1), ..gates.clone() };
        let (next, decision) = ladder.decide(&Seen { health: &health, served, closed: None, now }, &gates, &shift);
        ladder = next;
        match &decision {
            Decision::Stay | Decision::Hold(_) => continue,
            Decision::Promote(percent) => {
                (share, served, reached) = (*percent, 0, at);
            }
            Decision::Finish | Decision::Revert(_) => {}
        }
        run.decisions.push((at, decision.clone()));
        if matches!(decision, Decision::Revert(_)) {
            break;
        }
    }
    run
}

#[test]
fn a_hundred_healthy_runs_climb_to_the_end_without_a_revert() {
    for seed in 0..100 {
        let decisions: Vec<Decision> = play(seed, None).decisions.into_iter().map(|(_, decision)| decision).collect();
        assert_eq!(
            decisions,
            [Decision::Promote(25.0), Decision::Promote(50.0), Decision::Promote(100.0), Decision::Finish],
            "seed {seed}"
        );
    }
}

#[test]
fn every_fault_at_each_step_goes_back_within_one_window() {
    for (fault, word) in FAULTS {
        // At 100 % the owner answers nothing that an answer could be compared with: what is wrong must have been seen below.
        let steps = STEPS.into_iter().filter(|step| fault != Fault::WrongAnswers || *step < 100.0);
        for step in steps {
            for seed in 0..2 {
                let run = play(seed, Some((fault, step)));
                let began = run.began.unwrap_or_else(|| panic!("{fault:?} at {step} %: never reached"));
                let Some((at, Decision::Revert(reason))) = run.decisions.last() else {
                    panic!("{fault:?} at {step} %, seed {seed}: not noticed: {:?}", run.decisions);
                };
                assert!(reason.starts_with(word) && *at >= began, "{fault:?} at {step} %, seed {seed}: {reason}");
                assert!(*at - began <= WINDOW, "{fault:?} at {step} %, seed {seed}: after {:?}", *at - began);
            }
        }
    }
}

fn healthy() -> Health {
    Health::default()
}

#[test]
fn climbs_step_by_step_and_stays_at_the_top() {
    let (gates, shift) = (gates(), ShiftConfig { steps: vec![5.0, 50.0, 100.0], hold: Duration::from_secs(10), min_served: 1, ..shift() });
    let start = Instant::now();
    let at = |seconds| start + Duration::from_secs(seconds);
    let (mut ladder, percent) = Ladder::start(&shift, start);
    assert_eq!(percent, 5.0);
    let mut told = Vec::new();
    for second in 0..60 {
        let (next, decision) = ladder.decide(&Seen { health: &healthy(), served: 1, closed: None, now: at(second) }, &gates, &shift);
        ladder = next;
        if decision != Decision::Stay {
            told.push((second, decision));
        }
    }
    assert_eq!(told, [(10, Decision::Promote(50.0)), (20, Decision::Promote(100.0)), (30, Decision::Finish)]);
    assert_eq!(ladder, Ladder::Done);
    assert_eq!(Ladder::start(&shift, start).0.describe(&shift, at(1)), "step 1 of 3 (5 %), 9 s left");
}

#[test]
fn holds_are_told_with_their_reason() {
    let (gates, shift) = (gates(), shift());
    let start = Instant::now();
    let (ladder, _) = Ladder::start(&shift, start);
    let health = healthy();
    let few = Seen { health: &health, served: 19, closed: None, now: start + shift.hold };
    assert_eq!(ladder.decide(&few, &gates, &shift), (ladder, Decision::Hold("19 reads were served on this step, min_served is 20".into())));
    let quiet = Seen { served: 20, closed: Some("quiet hours"), ..few };
    assert_eq!(ladder.decide(&quiet, &gates, &shift), (ladder, Decision::Hold("quiet hours".into())));
    let open = Seen { closed: None, ..quiet };
    assert_eq!(ladder.decide(&open, &gates, &shift).1, Decision::Promote(25.0));
    // the calendar delays steps, never the way back
    let ill = Health { lag: Duration::from_secs(60), ..health };
    let (next, decision) = ladder.decide(&Seen { health: &ill, ..quiet }, &gates, &shift);
    assert!(next == Ladder::Reverted && matches!(decision, Decision::Revert(_)));
    let (after, decision) = Ladder::Reverted.decide(&open, &gates, &shift);
    assert_eq!((after, decision), (Ladder::Reverted, Decision::Stay), "a revert is left by a person only");
    let (idle, decision) = Ladder::Idle.decide(&Seen { health: &ill, ..open }, &gates, &shift);
    assert!(idle == Ladder::Idle && matches!(decision, Decision::Revert(_)), "served without a ladder is judged, too");
}
