//! An answer reduced to what can be compared: column names and built-in types, rows in order or as a multiset,
//! command tag, SQLSTATE. Rows are kept as hashes: no value outlives the message it came in.

use crate::wire::{Message, backend};
use bytes::Bytes;
use std::hash::{DefaultHasher, Hash, Hasher};

/// Oids from here on are assigned per database (`FirstNormalObjectId`, `src/include/access/transam.h`): the same type has
/// another oid on another server.
pub const FIRST_USER_OID: u32 = 16_384;

/// What came back from one statement.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// Column names and type oids (0 for types whose oid differs between servers); `None`: not described.
    pub columns: Option<Vec<(Bytes, u32)>>,
    /// Number of rows.
    pub rows: u64,
    /// Depends on the order of the rows.
    in_order: u64,
    /// Does not.
    as_multiset: u64,
    /// Command tags.
    pub tags: Vec<Bytes>,
    /// SQLSTATE of the error, if it failed.
    pub sqlstate: Option<String>,
    /// The rows themselves, for an answer that is looked at row by row.
    kept: Option<Kept>,
    /// Some column is of a user's type in binary format, in which oids are embedded: not comparable by bytes.
    pub binary_user_type: bool,
}

/// Bodies of DataRows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Kept {
    rows: Vec<Bytes>,
    bytes: usize,
}

/// An answer that is kept row by row may be this large: one per worker at a time.
const KEPT_BYTES_MAX: usize = 2 << 20;

/// Why two answers differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Difference {
    /// One failed, or both with different SQLSTATEs.
    Sqlstate,
    /// Column names or types.
    Columns,
    /// Number of rows.
    RowCount,
    /// Values of rows.
    Values,
    /// Same rows in another order, where the statement orders.
    Order,
    /// Command tags.
    Tag,
}

impl Difference {
    /// As a rule in proxy.toml names it.
    pub fn name(self) -> &'static str {
        match self {
            Difference::Sqlstate => "sqlstate",
            Difference::Columns => "columns",
            Difference::RowCount => "rows",
            Difference::Values => "values",
            Difference::Order => "order",
            Difference::Tag => "tag",
        }
    }

    /// For people.
    pub fn as_str(self) -> &'static str {
        match self {
            Difference::Sqlstate => "different outcome (SQLSTATE)",
            Difference::Columns => "different columns",
            Difference::RowCount => "different number of rows",
            Difference::Values => "different values",
            Difference::Order => "different order",
            Difference::Tag => "different command tag",
        }
    }
}

impl Answer {
    /// An answer that keeps its rows, up to 2 MiB.
    pub fn keeping() -> Self {
        Answer { kept: Some(Kept::default()), ..Answer::default() }
    }

    /// The rows, as the bodies of their messages; `None`: not kept, or too many.
    pub fn kept(&self) -> Option<&[Bytes]> {
        self.kept.as_ref().map(|kept| &kept.rows[..])
    }

    /// Takes in one message of the answer; others than RowDescription, DataRow, CommandComplete and ErrorResponse are ignored.
    pub fn take_in(&mut self, message: &Message) {
        match message.tag {
            b'T' => {
                if let Some(description) = backend::RowDescription::parse(&message.body) {
                    let described = description.columns.into_iter().map(|column| {
                        let of_user = column.type_oid >= FIRST_USER_OID;
                        self.binary_user_type |= of_user && column.format == 1;
                        (column.name, if of_user { 0 } else { column.type_oid })
                    });
                    // names are slices of the read buffer: copy, so that a small answer does not keep a large buffer alive
                    self.columns = Some(described.map(|(name, oid)| (Bytes::copy_from_slice(&name), oid)).collect());
                }
            }
            b'D' => {
                self.row(&message.body);
                self.keep(&message.body);
            }
            b'C' => self.tags.push(Bytes::copy_from_slice(&backend::command_tag(&message.body))),
            b'E' => self.sqlstate = Some(backend::ErrorFields::parse(&message.body).code),
            _ => {}
        }
    }

    /// Keeps the hashes only.
    pub fn forget_rows(&mut self) {
        self.kept = None;
    }

    fn keep(&mut self, body: &Bytes) {
        let Some(kept) = &mut self.kept else { return };
        kept.bytes += body.len() + size_of::<Bytes>();
        if kept.bytes > KEPT_BYTES_MAX {
            self.kept = None;
        } else {
            kept.rows.push(Bytes::copy_from_slice(body));
        }
    }

    /// Takes in the body of a DataRow.
    pub fn row(&mut self, body: &[u8]) {
        let mut hasher = DefaultHasher::new();
        body.hash(&mut hasher);
        let hash = hasher.finish();
        self.rows += 1;
        self.as_multiset = self.as_multiset.wrapping_add(hash);
        self.in_order = self.in_order.rotate_left(5).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(hash);
    }

    /// Takes the types of another answer's columns where the names are the same: for an answer from a schema in which they differ on purpose and
    /// their values read the same.
    pub fn typed_like(&mut self, other: &Answer) {
        if let (Some(ours), Some(theirs)) = (&mut self.columns, &other.columns) {
            for (mine, other) in ours.iter_mut().zip(theirs).filter(|(mine, other)| mine.0 == other.0) {
                mine.1 = other.1;
            }
        }
    }

    /// Compares the owner's answer with a shadow's. `ordered`: the statement fixes the order.
    pub fn difference(&self, shadow: &Answer, ordered: bool) -> Option<Difference> {
        if self.sqlstate != shadow.sqlstate {
            return Some(Difference::Sqlstate);
        }
        if let (Some(ours), Some(theirs)) = (&self.columns, &shadow.columns)
            && ours != theirs
        {
            return Some(Difference::Columns);
        }
        if self.rows != shadow.rows {
            return Some(Difference::RowCount);
        }
        if self.as_multiset != shadow.as_multiset {
            return Some(Difference::Values);
        }
        if ordered && self.in_order != shadow.in_order {
            return Some(Difference::Order);
        }
        (self.tags != shadow.tags).then_some(Difference::Tag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn answer(rows: &[&str]) -> Answer {
        let mut answer = Answer::default();
        for row in rows {
            answer.row(row.as_bytes());
        }
        answer
    }

    #[test]
    fn each_kind_of_difference_is_found() {
        let base = answer(&["a", "b"]);
        assert_eq!(base.difference(&answer(&["a", "b"]), true), None);
        assert_eq!(base.difference(&answer(&["b", "a"]), true), Some(Difference::Order));
        assert_eq!(base.difference(&answer(&["b", "a"]), false), None);
        assert_eq!(base.difference(&answer(&["a"]), false), Some(Difference::RowCount));
        assert_eq!(base.difference(&answer(&["a", "c"]), false), Some(Difference::Values));
        let failed = Answer { sqlstate: Some("42P01".into()), ..answer(&["a", "b"]) };
        assert_eq!(base.difference(&failed, false), Some(Difference::Sqlstate));
        let named = |name: &'static str| Answer { columns: Some(vec![(Bytes::from(name), 23)]), ..answer(&["a", "b"]) };
        assert_eq!(named("x").difference(&named("y"), false), Some(Difference::Columns));
        assert_eq!(named("x").difference(&base, false), None, "not described on one side");
        let tagged = Answer { tags: vec![Bytes::from("SELECT 2")], ..answer(&["a", "b"]) };
        assert_eq!(base.difference(&tagged, false), Some(Difference::Tag));
    }

    #[test]
    fn duplicates_do_not_cancel_out() {
        assert_eq!(answer(&["a", "a", "b", "b"]).difference(&answer(&["c", "c", "d", "d"]), false), Some(Difference::Values));
    }

    proptest! {
        #[test]
        fn a_permutation_is_the_same_multiset(mut rows: Vec<String>, seed: u64) {
            let before = answer(&rows.iter().map(String::as_str).collect::<Vec<_>>());
            fastrand::Rng::with_seed(seed).shuffle(&mut rows);
            let after = answer(&rows.iter().map(String::as_str).collect::<Vec<_>>());
            prop_assert_eq!(before.difference(&after, false), None);
        }
    }
}
