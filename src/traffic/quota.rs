//! Which reads of a share are copied: a rare statement is seen, and a frequent one does not drown it. Bounded, without a lock:
//! fingerprints share slots, which makes a quota stricter, never wider.

use std::sync::atomic::{AtomicU64, Ordering};

/// Slots, each 16 bytes: several times the statements that an application has.
const SLOTS: usize = 2048;
/// A statement that was not copied for this long is copied the next time it comes, whatever the share.
const UNSEEN_SECONDS: u64 = 60;
/// A statement that was found to be noise is tried again after this time.
const NOISE_MS: u64 = 600_000;
/// While the queue is more than half full, each statement gets this many places of it per second.
const FAIR_SHARE: u32 = 16;

#[derive(Debug, Default)]
struct Slot {
    /// The second, and how many were copied in it.
    recent: AtomicU64,
    /// The minute in which it was last copied, from 1 on.
    seen: AtomicU64,
    /// A statement whose answers say nothing, and until when nobody asks for them.
    noise: AtomicU64,
    noise_until_ms: AtomicU64,
}

/// The copies of one shadow by statement.
#[derive(Debug)]
pub struct Quota {
    slots: Box<[Slot]>,
}

impl Default for Quota {
    fn default() -> Self {
        Quota { slots: (0..SLOTS).map(|_| Slot::default()).collect() }
    }
}

impl Quota {
    fn slot(&self, fingerprint: u64) -> Option<&Slot> {
        self.slots.get((fingerprint.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize % SLOTS)
    }

    /// It has not been copied for about a minute. Looking does not count.
    pub fn is_unseen(&self, fingerprint: u64, now_ms: u64) -> bool {
        self.slot(fingerprint).is_some_and(|slot| slot.seen.load(Ordering::Relaxed) != now_ms / 1000 / UNSEEN_SECONDS + 1)
    }

    /// The owner disagrees with itself on this statement: it is not copied for a while.
    pub fn is_noise(&self, fingerprint: u64, now_ms: u64) -> bool {
        self.slot(fingerprint)
            .is_some_and(|slot| slot.noise.load(Ordering::Relaxed) == fingerprint && now_ms < slot.noise_until_ms.load(Ordering::Relaxed))
    }

    /// Says so.
    pub fn mark_noise(&self, fingerprint: u64, now_ms: u64) {
        let Some(slot) = self.slot(fingerprint) else { return };
        slot.noise.store(fingerprint, Ordering::Relaxed);
        slot.noise_until_ms.store(now_ms + NOISE_MS, Ordering::Relaxed);
    }

    /// Takes a place for one copy. `per_second`: 0 for no limit. `pressed`: the queue is filling up.
    pub fn take(&self, fingerprint: u64, now_ms: u64, per_second: u32, pressed: bool) -> bool {
        let Some(slot) = self.slot(fingerprint) else { return false };
        let second = (now_ms / 1000) & 0xffff_ffff;
        let recent = slot.recent.load(Ordering::Relaxed);
        let count = if recent >> 32 == second { recent as u32 } else { 0 };
        if per_second > 0 && count >= per_second || pressed && count >= FAIR_SHARE {
            return false;
        }
        // two sessions at once may count one: it is a limit against drowning, not a meter
        slot.recent.store(second << 32 | u64::from(count.saturating_add(1)), Ordering::Relaxed);
        slot.seen.store(now_ms / 1000 / UNSEEN_SECONDS + 1, Ordering::Relaxed);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frequent_statement_leaves_room_for_a_rare_one() {
        let quota = Quota::default();
        let taken = (0..10_000).filter(|_| quota.take(7, 1_500, 0, true)).count();
        assert_eq!(taken, FAIR_SHARE as usize);
        assert!(quota.take(8, 1_500, 0, true), "another one has its own share");
        assert!(quota.take(7, 1_600, 0, false), "room enough: no limit");
        assert!(quota.take(7, 2_500, 0, true), "the next second");
        assert_eq!((0..100).filter(|_| quota.take(9, 5_000, 30, false)).count(), 30);
    }

    #[test]
    fn noise_is_left_alone_for_a_while() {
        let quota = Quota::default();
        assert!(!quota.is_noise(0, 0) && !quota.is_noise(7, 5));
        quota.mark_noise(7, 5);
        assert!(quota.is_noise(7, 6) && !quota.is_noise(7, NOISE_MS + 5));
        assert!(!quota.is_noise(7 + (1 << 60), 6), "another one of the same slot, or of another");
    }

    #[test]
    fn a_rare_statement_is_seen_once_a_minute() {
        let quota = Quota::default();
        assert!(quota.is_unseen(7, 0) && quota.is_unseen(7, 0));
        assert!(quota.take(7, 0, 0, false));
        assert!(!quota.is_unseen(7, 59_000));
        assert!(quota.is_unseen(7, 61_000));
    }
}
