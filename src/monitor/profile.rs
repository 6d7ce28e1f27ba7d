//! Latency of source and shadow per query fingerprint: which statement will be slower after the move.

use super::{
    LatencySummary,
    histogram::{empty, locked, record_us, summarize, to_us},
};
use crate::console::state::QueryState;
use dashmap::{DashMap, Entry as Slot};
use hdrhistogram::Histogram;
use std::{
    cmp::Reverse,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

/// Fingerprints kept apart per shadow. An application has hundreds; one that builds statements by hand would have no end,
/// and everything beyond counts as `other`. At two digits a pair of histograms takes 5 to 20 kB: 40 MB at the very most.
pub const FINGERPRINTS_MAX: usize = 2_000;

/// Characters of statement text kept for people: enough to recognise a statement.
const TEXT_CHARS_MAX: usize = 1_000;

const DIGITS: u8 = 2;

/// The profile of one shadow.
#[derive(Debug)]
pub struct QueryProfile {
    entries: DashMap<u64, Entry>,
    known: AtomicUsize,
    other: Mutex<Entry>,
}

#[derive(Debug)]
struct Entry {
    text: Arc<str>,
    source: Histogram<u32>,
    shadow: Histogram<u32>,
    total_us: u64,
}

impl Default for QueryProfile {
    fn default() -> Self {
        Self::new()
    }
}

impl QueryProfile {
    /// An empty profile.
    pub fn new() -> Self {
        let other = Entry::new("all statements beyond the number kept apart".into());
        QueryProfile { entries: DashMap::new(), known: AtomicUsize::new(0), other: Mutex::new(other) }
    }

    /// Records one statement that ran on both sides. `text` is the normalised statement, without literals.
    pub fn record_pair(&self, fingerprint: u64, text: &Arc<str>, source: Duration, shadow: Duration) {
        match self.entries.entry(fingerprint) {
            Slot::Occupied(mut entry) => return entry.get_mut().record(source, shadow),
            Slot::Vacant(slot) => {
                if self.known.fetch_add(1, Ordering::Relaxed) < FINGERPRINTS_MAX {
                    return slot.insert(Entry::new(bounded(text))).record(source, shadow);
                }
                self.known.fetch_sub(1, Ordering::Relaxed);
            }
        }
        locked(&self.other).record(source, shadow);
    }

    /// The `n` fingerprints that took the most time on both sides together, costliest first.
    pub fn top(&self, n: usize) -> Vec<QueryState> {
        let mut costs: Vec<(u64, u64)> = self.entries.iter().map(|entry| (entry.total_us, *entry.key())).collect();
        costs.sort_unstable_by_key(|(cost, fingerprint)| (Reverse(*cost), *fingerprint));
        let mut states: Vec<(u64, QueryState)> = costs
            .into_iter()
            .take(n)
            .filter_map(|(cost, key)| Some((cost, self.entries.get(&key)?.state(format!("{key:016x}")))))
            .collect();
        let other = locked(&self.other);
        if other.total_us > 0 {
            let place = states.partition_point(|(cost, _)| *cost >= other.total_us);
            states.insert(place, (other.total_us, other.state("other".into())));
            states.truncate(n);
        }
        states.into_iter().map(|(_, state)| state).collect()
    }

    /// Forgets everything.
    pub fn reset(&self) {
        self.entries.clear();
        self.known.store(0, Ordering::Relaxed);
        let mut other = locked(&self.other);
        *other = Entry::new(other.text.clone());
    }
}

impl Entry {
    fn new(text: Arc<str>) -> Self {
        Entry { text, source: empty(DIGITS), shadow: empty(DIGITS), total_us: 0 }
    }

    fn record(&mut self, source: Duration, shadow: Duration) {
        for (histogram, latency) in [(&mut self.source, source), (&mut self.shadow, shadow)] {
            record_us(histogram, to_us(latency));
            self.total_us = self.total_us.saturating_add(to_us(latency));
        }
    }

    fn state(&self, fingerprint: String) -> QueryState {
        let [source, shadow]: [LatencySummary; 2] = [summarize(&self.source), summarize(&self.shadow)];
        QueryState { fingerprint, text: self.text.to_string(), source, shadow }
    }
}

fn bounded(text: &Arc<str>) -> Arc<str> {
    match text.char_indices().nth(TEXT_CHARS_MAX) {
        None => text.clone(),
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_costliest_come_first() {
        let profile = QueryProfile::new();
        for (fingerprint, text, times, shadow) in [(1, "SELECT $1", 10, MS), (2, "SELECT $1, $2", 2, 40 * MS), (3, "SELECT a", 1, MS)] {
            for _ in 0..times {
                profile.record_pair(fingerprint, &Arc::from(text), MS, shadow);
            }
        }
        let top = profile.top(2);
        assert_eq!(top.iter().map(|q| q.text.as_str()).collect::<Vec<_>>(), ["SELECT $1, $2", "SELECT $1"]);
        assert_eq!(top[0].fingerprint, "0000000000000002");
        assert_eq!((top[0].source.count, top[0].shadow.count), (2, 2));
        assert!(top[0].source.p50_us <= 1_010 && top[0].shadow.p50_us >= 39_000);
        profile.reset();
        assert!(profile.top(5).is_empty());
    }

    #[test]
    fn the_number_of_fingerprints_is_bounded() {
        let profile = QueryProfile::new();
        let text: Arc<str> = "é".repeat(3_000).into();
        for fingerprint in 0..3 * FINGERPRINTS_MAX as u64 {
            profile.record_pair(fingerprint, &text, MS, MS);
            profile.record_pair(fingerprint, &text, MS, MS);
        }
        let all = profile.top(usize::MAX);
        assert_eq!(all.len(), FINGERPRINTS_MAX + 1);
        assert_eq!((all[0].fingerprint.as_str(), all[0].source.count), ("other", 4 * FINGERPRINTS_MAX as u64));
        assert_eq!(all[1].text.chars().count(), TEXT_CHARS_MAX + 1);
        assert_eq!(profile.top(1).len(), 1);
    }
}
