//! Latency of source and shadow per query fingerprint: which statement will be slower after the move.

use super::{
    LatencySummary,
    histogram::{empty, locked, record_us, summarize, to_us},
    paired::{Comparison, FALSE_DISCOVERIES, Pairs, discoveries},
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
/// and everything beyond counts as `other`. At two digits a pair of histograms takes 5 to 20 kB, the newest pairs 2 kB: 44 MB at the
/// very most.
pub const FINGERPRINTS_MAX: usize = 2_000;

/// Characters of statement text kept for people: enough to recognise a statement.
const TEXT_CHARS_MAX: usize = 1_000;

const DIGITS: u8 = 2;

/// A median on the shadow that is less than this above the source's is never called slower, whatever the ratio: the way to another
/// machine takes as long.
const SLOWER_BY_US: u64 = 100;

/// Answers that must have been compared before a statement counts as proven.
pub const PROVEN_ANSWERS_MIN: u64 = 20;

/// A statement as it fares on both sides.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct StatementProfile {
    /// Key.
    pub fingerprint: u64,
    /// Literals replaced by `$n`, bounded.
    pub text: String,
    /// Source side of the paired executions.
    pub source: LatencySummary,
    /// Shadow side.
    pub shadow: LatencySummary,
    /// Time that both sides took for it, in microseconds.
    pub total_us: u64,
    /// Executions that failed on the shadow only.
    pub errors: u64,
    /// Answers that were the same.
    pub same: u64,
    /// Answers that were different.
    pub different: u64,
    /// Shadow against source; `None`: too few pairs.
    pub comparison: Option<Comparison>,
    /// Slower on the shadow beyond chance, among all statements that were tested with it.
    pub slower: bool,
}

impl StatementProfile {
    /// In one word, for people and for the ladder that moves proven statements first.
    pub fn verdict(&self) -> &'static str {
        if self.different > 0 {
            "differs"
        } else if self.errors * 100 > self.shadow.count {
            "fails" // more than one of a hundred: a restart of the shadow is no property of the statement
        } else if self.slower {
            "slower"
        } else if self.same >= PROVEN_ANSWERS_MIN {
            "proven"
        } else {
            "too few"
        }
    }
}

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
    pairs: Pairs,
    errors: u64,
    same: u64,
    different: u64,
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
        self.with_entry(fingerprint, text, |entry| entry.record(source, shadow));
    }

    /// Counts an execution that failed on the shadow only.
    pub fn record_failure(&self, fingerprint: u64, text: &Arc<str>) {
        self.with_entry(fingerprint, text, |entry| entry.errors += 1);
    }

    /// Counts a decided comparison of answers.
    pub fn record_verdict(&self, fingerprint: u64, text: &Arc<str>, same: bool) {
        self.with_entry(fingerprint, text, |entry| {
            entry.same += u64::from(same);
            entry.different += u64::from(!same);
        });
    }

    fn with_entry(&self, fingerprint: u64, text: &Arc<str>, change: impl FnOnce(&mut Entry)) {
        match self.entries.entry(fingerprint) {
            Slot::Occupied(mut entry) => return change(entry.get_mut()),
            Slot::Vacant(slot) => {
                if self.known.fetch_add(1, Ordering::Relaxed) < FINGERPRINTS_MAX {
                    return change(&mut slot.insert(Entry::new(bounded(text))));
                }
                self.known.fetch_sub(1, Ordering::Relaxed);
            }
        }
        change(&mut locked(&self.other));
    }

    /// All statements that are kept apart, costliest first, and which of them are slower on the shadow beyond chance.
    pub fn statements(&self) -> Vec<StatementProfile> {
        let mut all: Vec<StatementProfile> = self.entries.iter().map(|entry| entry.profile(*entry.key())).collect();
        let values: Vec<f64> = all.iter().filter_map(|statement| statement.comparison.map(|comparison| comparison.p)).collect();
        let mut found = discoveries(&values, FALSE_DISCOVERIES).into_iter();
        for statement in &mut all {
            let slower = statement.comparison.is_some() && found.next().unwrap_or(false);
            statement.slower = slower && statement.shadow.p50_us >= statement.source.p50_us + SLOWER_BY_US;
        }
        all.sort_by_key(|statement| (Reverse(statement.total_us), statement.fingerprint));
        all
    }

    /// Pairs of one statement that were ever recorded.
    pub fn pairs_seen(&self, fingerprint: u64) -> u64 {
        self.entries.get(&fingerprint).map_or(0, |entry| entry.pairs.seen())
    }

    /// One statement against the pairs that came after the first `after`: a second opinion from other pairs than the first.
    pub fn compare_after(&self, fingerprint: u64, after: u64) -> Option<Comparison> {
        self.entries.get(&fingerprint)?.pairs.compare(after)
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
        let (source, shadow) = (empty(DIGITS), empty(DIGITS));
        Entry { text, source, shadow, total_us: 0, pairs: Pairs::default(), errors: 0, same: 0, different: 0 }
    }

    fn profile(&self, fingerprint: u64) -> StatementProfile {
        StatementProfile {
            fingerprint,
            text: self.text.to_string(),
            source: summarize(&self.source),
            shadow: summarize(&self.shadow),
            total_us: self.total_us,
            errors: self.errors,
            same: self.same,
            different: self.different,
            comparison: self.pairs.compare(0),
            slower: false,
        }
    }

    fn record(&mut self, source: Duration, shadow: Duration) {
        for (histogram, latency) in [(&mut self.source, source), (&mut self.shadow, shadow)] {
            record_us(histogram, to_us(latency));
            self.total_us = self.total_us.saturating_add(to_us(latency));
        }
        self.pairs.add(to_us(source), to_us(shadow));
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
    fn each_statement_is_judged_by_its_own_pairs() {
        let profile = QueryProfile::new();
        let text: Arc<str> = "SELECT $1".into();
        for pair in 0..100_u32 {
            let noise = Duration::from_micros(u64::from(pair * 7 % 13) * 20);
            profile.record_pair(1, &text, MS + noise, MS + noise);
            profile.record_pair(2, &text, MS + noise, 3 * MS + noise);
            profile.record_pair(3, &text, Duration::from_micros(10), Duration::from_micros(40)); // far below what matters
            profile.record_verdict(1, &text, true);
            profile.record_verdict(3, &text, pair > 0);
        }
        profile.record_failure(4, &text);
        let statements = profile.statements();
        let verdict = |fingerprint| statements.iter().find(|found| found.fingerprint == fingerprint).unwrap().verdict();
        assert_eq!([1, 2, 3, 4].map(verdict), ["proven", "slower", "differs", "fails"]);
        assert_eq!(statements[0].fingerprint, 2, "the costliest first");
        assert_eq!((profile.pairs_seen(2), profile.compare_after(2, 90)), (100, None));
        assert!(profile.compare_after(2, 50).unwrap().low > 2.0);
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
