//! Fences on the read side: nothing is added to writes.
//!
//! The control plane samples the owner's WAL insert position on a tick. A session that finished a write while tick `n`
//! was the newest one started may be answered by a shadow once the shadow has applied the position of tick `n + 1`:
//! that position was read after the write had been acknowledged, so it lies behind the write's commit record.

use crate::lsn::{AtomicLsn, Lsn};
use std::sync::atomic::{AtomicU64, Ordering};

/// The owner's side: how many ticks have been started.
#[derive(Debug, Default)]
pub struct Ticks {
    started: AtomicU64,
    newest: AtomicLsn,
}

/// What a session must wait for: a tick number. 0: nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Needed(pub u64);

impl Ticks {
    /// Called before the position is asked for; the number belongs to that position.
    pub fn start(&self) -> u64 {
        self.started.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// The position that a tick found.
    pub fn found(&self, position: Lsn) {
        self.newest.advance(position);
    }

    /// The newest position found.
    pub fn newest(&self) -> Lsn {
        self.newest.load()
    }

    /// What whoever has just seen a write acknowledged needs: the next tick to start.
    pub fn needed_now(&self) -> Needed {
        Needed(self.started.load(Ordering::SeqCst) + 1)
    }

    /// After a change of owner positions start anew: everything before is behind the cutover's own fence.
    pub fn reset(&self) {
        self.newest.reset(Lsn::ZERO);
    }
}

/// A shadow's side: the newest tick whose position it has applied.
#[derive(Debug, Default)]
pub struct Fence {
    passed: AtomicU64,
}

impl Fence {
    /// The shadow has applied the position of tick `number`.
    pub fn pass(&self, number: u64) {
        self.passed.fetch_max(number, Ordering::SeqCst);
    }

    /// May a session with this need be answered by the shadow?
    pub fn allows(&self, needed: Needed) -> bool {
        self.passed.load(Ordering::SeqCst) >= needed.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_read_before_the_acknowledgement_does_not_count() {
        let (ticks, fence) = (Ticks::default(), Fence::default());
        let running = ticks.start(); // position is being read…
        let needed = ticks.needed_now(); // …while a write is acknowledged
        ticks.found(Lsn(100));
        fence.pass(running);
        assert!(!fence.allows(needed));
        let next = ticks.start();
        ticks.found(Lsn(200));
        fence.pass(next);
        assert!(fence.allows(needed));
    }

    #[test]
    fn who_never_wrote_needs_nothing() {
        assert!(Fence::default().allows(Needed::default()));
    }
}
