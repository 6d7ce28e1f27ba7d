//! Fences on the read side: nothing is added to writes.
//!
//! The control plane samples the owner's WAL insert position on a tick. A session that finished a write while tick `n`
//! was the newest one started may be answered by a shadow once the shadow has applied the position of tick `n + 1`:
//! that position was read after the write had been acknowledged, so it lies behind the write's commit record.

use crate::lsn::{AtomicLsn, Lsn};
use std::{
    collections::VecDeque,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};
use tokio::sync::Notify;

/// The owner's side: how many ticks have been started.
#[derive(Debug, Default)]
pub struct Ticks {
    started: AtomicU64,
    newest: AtomicLsn,
    wanted: Notify,
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

    /// A tick is started at once: whoever asks waits for one that is newer than the question, and shares it with all who ask meanwhile.
    /// It sees every commit of anybody before the question (the "ReadIndex" of Raft: Ongaro, 2014, §6.4).
    pub fn demand(&self) -> Needed {
        let needed = self.needed_now();
        self.wanted.notify_one();
        needed
    }

    /// Until somebody demands one.
    pub async fn demanded(&self) {
        self.wanted.notified().await;
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
    /// When that tick was started.
    started_ms: AtomicU64,
    news: Notify,
}

impl Fence {
    /// The shadow has applied the position of tick `number`, which was started at that time (milliseconds of
    /// [`monotonic_ms`](super::database::monotonic_ms)).
    pub fn pass(&self, number: u64, started_ms: u64) {
        self.started_ms.fetch_max(started_ms, Ordering::SeqCst);
        self.passed.fetch_max(number, Ordering::SeqCst);
        self.news.notify_waiters();
    }

    /// May a session with this need be answered by the shadow?
    pub fn allows(&self, needed: Needed) -> bool {
        self.passed.load(Ordering::SeqCst) >= needed.0
    }

    /// Has the shadow everything that was committed until `bound` ago?
    pub fn is_within(&self, bound: Duration, now_ms: u64) -> bool {
        let bound = u64::try_from(bound.as_millis()).unwrap_or(u64::MAX);
        self.passed.load(Ordering::SeqCst) > 0 && now_ms.saturating_sub(self.started_ms.load(Ordering::SeqCst)) <= bound
    }

    /// Waits until [`allows`](Self::allows) is true.
    pub async fn wait(&self, needed: Needed) {
        loop {
            let news = self.news.notified();
            if self.allows(needed) {
                return;
            }
            news.await;
        }
    }
}

/// A tick that has found its position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tick {
    /// Grows by one from tick to tick.
    pub number: u64,
    /// The owner's, read after the tick was started.
    pub position: Lsn,
    /// The ownership in which it was read: positions of two owners cannot be compared.
    pub epoch: i64,
    /// When it was started, in milliseconds of [`monotonic_ms`](super::database::monotonic_ms).
    pub started_ms: u64,
}

/// Most ticks that are remembered. Beyond it every second one is forgotten: a shadow far behind passes in bigger steps.
const PENDING_MAX: usize = 256;

/// Ticks that a shadow has not applied yet, oldest first. Without them a shadow that lags would have to reach the newest
/// position before it may pass any.
#[derive(Debug, Default)]
pub struct Pending(VecDeque<Tick>);

impl Pending {
    /// A newer one. Those of another ownership go.
    pub fn push(&mut self, tick: Tick) {
        if self.0.back().is_some_and(|last| last.epoch != tick.epoch) {
            self.0.clear();
        }
        if self.0.len() >= PENDING_MAX {
            let mut keep = false;
            self.0.retain(|_| {
                keep = !keep;
                keep
            });
        }
        self.0.push_back(tick);
    }

    /// The next to be reached.
    pub fn oldest(&self) -> Option<Tick> {
        self.0.front().copied()
    }

    /// Takes those that are reached out and returns the newest of them.
    pub fn reached(&mut self, applied: Lsn) -> Option<Tick> {
        let mut newest = None;
        while let Some(tick) = self.0.pop_front_if(|tick| tick.position <= applied) {
            newest = Some(tick);
        }
        newest
    }

    /// Nothing is waited for any more.
    pub fn clear(&mut self) {
        self.0.clear();
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
        fence.pass(running, 0);
        assert!(!fence.allows(needed));
        let next = ticks.start();
        ticks.found(Lsn(200));
        fence.pass(next, 0);
        assert!(fence.allows(needed));
    }

    #[test]
    fn who_never_wrote_needs_nothing() {
        assert!(Fence::default().allows(Needed::default()));
    }

    #[test]
    fn a_bound_counts_from_the_start_of_the_tick() {
        let (ticks, fence) = (Ticks::default(), Fence::default());
        let bound = Duration::from_millis(100);
        assert!(!fence.is_within(bound, 50), "nothing was applied yet, whatever the clock says");
        fence.pass(ticks.start(), 1000);
        assert!(fence.is_within(bound, 1100));
        assert!(!fence.is_within(bound, 1101));
    }

    #[test]
    fn a_shadow_that_lags_passes_old_ticks() {
        let mut pending = Pending::default();
        let tick = |number: u64, epoch| Tick { number, position: Lsn(number * 10), epoch, started_ms: number };
        for number in 1..=1000 {
            pending.push(tick(number, 1));
        }
        assert!(pending.0.len() <= PENDING_MAX);
        assert_eq!((pending.oldest(), pending.reached(Lsn(9))), (Some(tick(1, 1)), None));
        assert_eq!(pending.reached(Lsn(19)), Some(tick(1, 1)));
        let half = pending.reached(Lsn(5000)).unwrap();
        assert!((490..=500).contains(&half.number), "{half:?}");
        assert_eq!(pending.reached(Lsn(10_000)), Some(tick(1000, 1)));
        pending.push(tick(1001, 1));
        pending.push(tick(1002, 2));
        assert_eq!(pending.oldest(), Some(tick(1002, 2)), "positions of two owners cannot be compared");
    }

    #[tokio::test]
    async fn whoever_waits_is_woken() {
        let (ticks, fence) = (Ticks::default(), std::sync::Arc::new(Fence::default()));
        let needed = ticks.demand();
        ticks.demanded().await;
        let waiting = tokio::spawn({
            let fence = fence.clone();
            async move { fence.wait(needed).await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        fence.pass(ticks.start(), 0);
        waiting.await.unwrap();
    }
}
