//! What a session is doing and since when, for time limits: the session says it each time it begins to wait, whoever enforces
//! the limits looks from time to time. No timer belongs to a session, and none is set per query.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// Whose turn it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// Nothing that a limit concerns.
    Other,
    /// The client's, outside of a transaction.
    Idle,
    /// The client's, inside of one.
    InTransaction,
    /// The client's, in the middle of a request.
    Halfway,
    /// The server's.
    Busy,
}

const ALL: [Activity; 5] = [Activity::Other, Activity::Idle, Activity::InTransaction, Activity::Halfway, Activity::Busy];
const ACTIVITY_BITS: u32 = 3;

/// One session's.
#[derive(Debug, Default)]
pub struct Pulse {
    /// Activity and a count of what is done, as last said; 0: never.
    now: AtomicU64,
    /// The watcher's: what it saw last, and since when.
    seen: AtomicU64,
    since_ms: AtomicU64,
    /// What has lasted too long.
    overdue: AtomicU64,
}

impl Pulse {
    /// The session's: says what it is about to wait for. The same activity with another `count` is a new one.
    #[inline]
    pub fn beat(&self, activity: Activity, count: u64) {
        self.now.store(count << ACTIVITY_BITS | activity as u64, Ordering::Relaxed);
    }

    /// The session's: what it said last has lasted too long.
    pub fn overdue(&self) -> Option<Activity> {
        let now = self.now.load(Ordering::Relaxed);
        (now != 0 && now == self.overdue.load(Ordering::SeqCst)).then(|| activity_of(now))
    }

    /// The watcher's, one at a time: true when what lasts has come to its limit, each time it is asked.
    pub fn look(&self, now_ms: u64, limit: impl Fn(Activity) -> Option<Duration>) -> bool {
        let now = self.now.load(Ordering::Relaxed);
        if now != self.seen.swap(now, Ordering::Relaxed) {
            self.since_ms.store(now_ms, Ordering::Relaxed);
            return false;
        }
        let lasted = Duration::from_millis(now_ms.saturating_sub(self.since_ms.load(Ordering::Relaxed)));
        let over = now != 0 && limit(activity_of(now)).is_some_and(|limit| lasted >= limit);
        if over {
            self.overdue.store(now, Ordering::SeqCst);
        }
        over
    }
}

fn activity_of(said: u64) -> Activity {
    let code = said & ((1 << ACTIVITY_BITS) - 1);
    ALL.into_iter().find(|activity| *activity as u64 == code).unwrap_or(Activity::Other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_lasts_unchanged_is_overdue() {
        let pulse = Pulse::default();
        let limit = |activity| (activity == Activity::InTransaction).then_some(Duration::from_millis(100));
        assert!(!pulse.look(0, limit) && !pulse.look(1_000, limit), "a session that says nothing has no limits");
        pulse.beat(Activity::InTransaction, 1);
        assert!(!pulse.look(1_000, limit) && !pulse.look(1_099, limit));
        assert_eq!(pulse.overdue(), None);
        pulse.beat(Activity::InTransaction, 2); // another request has been answered meanwhile
        assert!(!pulse.look(1_101, limit) && !pulse.look(1_200, limit));
        assert!(pulse.look(1_201, limit));
        assert_eq!(pulse.overdue(), Some(Activity::InTransaction));
        assert!(pulse.look(1_300, limit), "said again until it is heard");
        pulse.beat(Activity::Busy, 2);
        assert_eq!(pulse.overdue(), None, "it goes on: too late for a verdict");
        assert!(!pulse.look(1_400, limit) && !pulse.look(9_000, limit), "no limit on this");
        for activity in ALL {
            pulse.beat(activity, 77);
            assert_eq!(activity_of(pulse.now.load(Ordering::Relaxed)), activity);
        }
    }
}
