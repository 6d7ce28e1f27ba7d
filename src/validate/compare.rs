//! Merging two ordered streams of COPY lines. The decisions are pure; [`Rows`] reads the stream.
//! Source: PostgreSQL documentation, COPY, "Text Format".

use super::{
    Difference, DifferenceKind, ValidateError,
    plan::{Order, Plan},
    session::describe,
};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use std::{
    borrow::Cow,
    cmp::Ordering,
    hash::{DefaultHasher, Hash, Hasher},
    pin::Pin,
};
use tokio_postgres::CopyOutStream;

/// Longest key in a report, in characters: enough to find the row, not enough to carry a document.
const KEY_CHARS_MAX: usize = 120;
/// Keys kept for repair per table; what is beyond stays for the next pass.
pub(super) const REPAIR_KEYS_MAX: usize = 50_000;

/// What one table's comparison found.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub rows: u64,
    pub differences: u64,
    pub examples: Vec<Difference>,
    /// Texts of the key columns of rows that differ, in the plan's order.
    pub keys: Vec<Vec<String>>,
}

impl Tally {
    fn add(&mut self, plan: &Plan, kind: DifferenceKind, line: &[u8], other: Option<&[u8]>, examples_max: usize) {
        self.differences += 1;
        if plan.keyed && self.keys.len() < REPAIR_KEYS_MAX {
            self.keys.push(key_texts(plan, line));
        }
        if self.examples.len() < examples_max {
            let columns = other.map(|other| changed_columns(plan, line, other)).unwrap_or_default();
            self.examples.push(Difference { kind, key: describe_key(plan, line), columns });
        }
    }

    /// What the pair of heads means, and which side goes on.
    pub fn step(&mut self, plan: &Plan, owner: Option<&[u8]>, follower: Option<&[u8]>, examples_max: usize) -> Step {
        let order = match (owner, follower) {
            (None, None) => return Step::Done,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(a), Some(b)) if a == b => Ordering::Equal,
            (Some(a), Some(b)) => compare_keys(plan, a, b),
        };
        match (order, owner, follower) {
            (Ordering::Less, Some(a), _) => {
                self.rows += 1;
                self.add(plan, DifferenceKind::Missing, a, None, examples_max);
                Step::Owner
            }
            (Ordering::Greater, _, Some(b)) => {
                self.add(plan, DifferenceKind::Extra, b, None, examples_max);
                Step::Follower
            }
            (_, Some(a), Some(b)) => {
                self.rows += 1;
                if a != b {
                    self.add(plan, DifferenceKind::Changed, a, Some(b), examples_max);
                }
                Step::Both
            }
            _ => Step::Done,
        }
    }
}

/// Which stream to read on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Owner,
    Follower,
    Both,
    Done,
}

fn fields(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    line.split(|byte| *byte == b'\t')
}

/// `None` is SQL's null.
fn unescape(field: &[u8]) -> Option<Cow<'_, [u8]>> {
    if field == b"\\N" {
        return None;
    }
    if !field.contains(&b'\\') {
        return Some(Cow::Borrowed(field));
    }
    let mut text = Vec::with_capacity(field.len());
    let mut rest = field.iter().copied();
    while let Some(byte) = rest.next() {
        text.push(match (byte, byte == b'\\') {
            (_, false) => byte,
            (_, true) => match rest.next() {
                Some(b'b') => 8,
                Some(b'f') => 12,
                Some(b'n') => b'\n',
                Some(b'r') => b'\r',
                Some(b't') => b'\t',
                Some(b'v') => 11,
                Some(other) => other,
                None => b'\\',
            },
        });
    }
    Some(Cow::Owned(text))
}

fn integer(field: &[u8]) -> Option<i64> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

fn compare_keys(plan: &Plan, a: &[u8], b: &[u8]) -> Ordering {
    for ((_, order), (a, b)) in plan.key.iter().zip(fields(a).zip(fields(b))) {
        let ordering = match (order, integer(a), integer(b)) {
            (Order::Integer, Some(a), Some(b)) => a.cmp(&b),
            _ if a == b => Ordering::Equal,
            // `None` is less than any `Some`: NULLS FIRST.
            _ => unescape(a).cmp(&unescape(b)),
        };
        if ordering != Ordering::Equal {
            return ordering;
        }
    }
    Ordering::Equal
}

fn changed_columns(plan: &Plan, a: &[u8], b: &[u8]) -> Vec<String> {
    let names = plan.key.iter().map(|(name, _)| name).chain(&plan.others);
    names.zip(fields(a).zip(fields(b))).filter(|(_, (a, b))| a != b).map(|(name, _)| name.clone()).collect()
}

fn key_texts(plan: &Plan, line: &[u8]) -> Vec<String> {
    let text = |field| unescape(field).map(|text| String::from_utf8_lossy(&text).into_owned()).unwrap_or_default();
    fields(line).take(plan.key.len()).map(text).collect()
}

fn describe_key(plan: &Plan, line: &[u8]) -> String {
    if !plan.keyed {
        let mut hasher = DefaultHasher::new();
        line.hash(&mut hasher);
        return format!("row hash {:016x}", hasher.finish());
    }
    let pairs = plan.key.iter().zip(key_texts(plan, line)).map(|((name, _), text)| format!("{name}={text}"));
    let key = pairs.collect::<Vec<_>>().join(", ");
    match key.char_indices().nth(KEY_CHARS_MAX) {
        Some((end, _)) => format!("{}…", key.get(..end).unwrap_or_default()),
        None => key,
    }
}

/// The lines of a COPY.
pub(super) struct Rows {
    stream: Pin<Box<CopyOutStream>>,
    side: &'static str,
    partial: BytesMut,
}

impl Rows {
    pub fn new(stream: CopyOutStream, side: &'static str) -> Self {
        Rows { stream: Box::pin(stream), side, partial: BytesMut::new() }
    }

    /// The next line, without its end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ValidateError> {
        loop {
            if let Some(end) = self.partial.iter().position(|byte| *byte == b'\n') {
                let mut line = self.partial.split_to(end + 1);
                line.truncate(end);
                return Ok(Some(line.freeze()));
            }
            match self.stream.next().await {
                // PostgreSQL sends a line per message; the protocol does not promise it.
                Some(Ok(chunk)) => {
                    let end = chunk.len().saturating_sub(1);
                    let whole = self.partial.is_empty() && chunk.iter().position(|byte| *byte == b'\n') == Some(end);
                    if whole {
                        return Ok(Some(chunk.slice(..end)));
                    }
                    self.partial.extend_from_slice(&chunk);
                }
                Some(Err(error)) => {
                    return Err(ValidateError::Sql { side: self.side, action: "reading a table", reason: describe(&error) });
                }
                None if self.partial.is_empty() => return Ok(None),
                None => return Ok(Some(self.partial.split().freeze())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn plan(key: &[(&str, Order)], keyed: bool, others: &[&str]) -> Plan {
        Plan {
            schema: "s".into(),
            name: "t".into(),
            key: key.iter().map(|(name, order)| ((*name).to_owned(), *order)).collect(),
            keyed,
            others: others.iter().map(|name| (*name).to_owned()).collect(),
            notes: Vec::new(),
            rows_estimated: 0,
            bytes: 0,
            owner_query: String::new(),
            follower_query: String::new(),
            owner_from: String::new(),
            follower_from: String::new(),
            writable: Vec::new(),
            follower_table: Default::default(),
            follower_key: Vec::new(),
        }
    }

    fn merge(plan: &Plan, owner: &[&[u8]], follower: &[&[u8]]) -> Tally {
        let (mut tally, mut a, mut b) = (Tally::default(), owner.iter(), follower.iter());
        let (mut head_a, mut head_b) = (a.next(), b.next());
        loop {
            match tally.step(plan, head_a.copied(), head_b.copied(), 10) {
                Step::Owner => head_a = a.next(),
                Step::Follower => head_b = b.next(),
                Step::Both => (head_a, head_b) = (a.next(), b.next()),
                Step::Done => return tally,
            }
        }
    }

    #[test]
    fn finds_each_kind_by_integer_key() {
        let plan = plan(&[("id", Order::Integer)], true, &["v", "w"]);
        let tally = merge(&plan, &[b"-1\ta\tx", b"2\tb\tx", b"10\tc\tx"], &[b"-1\ta\tx", b"3\tb\tx", b"10\tC\tx"]);
        let found: Vec<_> = tally.examples.iter().map(|d| (d.kind, d.key.as_str(), d.columns.clone())).collect();
        assert_eq!(
            found,
            [
                (DifferenceKind::Missing, "id=2", vec![]),
                (DifferenceKind::Extra, "id=3", vec![]),
                (DifferenceKind::Changed, "id=10", vec!["v".to_owned()]),
            ]
        );
        assert_eq!((tally.rows, tally.differences), (3, 3));
        assert_eq!(tally.keys, [["2"], ["3"], ["10"]]);
    }

    #[test]
    fn escaped_bytes_keep_their_order() {
        // Written as \t, a tab would sort after A; it sorts before.
        let plan = plan(&[("k", Order::Text)], true, &[]);
        let tally = merge(&plan, &[b"\\t", b"A", b"\\\\", "é".as_bytes()], &[b"\\t", b"A", b"\\\\"]);
        assert_eq!((tally.differences, tally.examples[0].key.as_str()), (1, "k=é"));
    }

    #[test]
    fn rows_without_key_are_a_multiset_and_keep_their_values() {
        let plan = plan(&[("a", Order::Text), ("b", Order::Text)], false, &[]);
        let tally = merge(&plan, &[b"\\N\tx", b"p\tq", b"p\tq"], &[b"\\N\tx", b"p\tq", b"p\tr"]);
        assert_eq!(tally.differences, 2);
        assert!(tally.examples.iter().all(|d| d.key.starts_with("row hash ") && d.key.len() == 25));
        assert!(tally.keys.is_empty());
    }

    proptest! {
        /// Whatever is taken away, added or changed is found, and nothing else.
        #[test]
        fn counts_are_exact(base in proptest::collection::btree_map(-50i64..50, 0u8..4, 0..40), other in proptest::collection::btree_map(-50i64..50, 0u8..4, 0..40)) {
            let plan = plan(&[("id", Order::Integer)], true, &["v"]);
            let lines = |map: &std::collections::BTreeMap<i64, u8>| map.iter().map(|(k, v)| format!("{k}\t{v}").into_bytes()).collect::<Vec<_>>();
            let (a, b) = (lines(&base), lines(&other));
            let tally = merge(&plan, &a.iter().map(Vec::as_slice).collect::<Vec<_>>(), &b.iter().map(Vec::as_slice).collect::<Vec<_>>());
            let expected = base.iter().filter(|(k, v)| other.get(k) != Some(v)).count() + other.keys().filter(|k| !base.contains_key(k)).count();
            prop_assert_eq!(tally.differences, expected as u64);
            prop_assert_eq!(tally.rows, base.len() as u64);
        }

        #[test]
        fn any_bytes_merge_to_an_end(a: Vec<Vec<u8>>, b: Vec<Vec<u8>>) {
            let plan = plan(&[("a", Order::Integer), ("b", Order::Text)], true, &["c"]);
            merge(&plan, &a.iter().map(Vec::as_slice).collect::<Vec<_>>(), &b.iter().map(Vec::as_slice).collect::<Vec<_>>());
        }
    }
}
