//! Which statements a pooled connection has prepared, under names of ours: a name is a hash of what is prepared, so that
//! all clients that prepare the same share one.

use bytes::Bytes;
use std::{
    collections::HashMap,
    hash::{BuildHasher, RandomState},
    sync::OnceLock,
};

/// What a statement is: a hash of its text, its parameter types and the settings that decide what its names mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StatementKey(u128);

impl StatementKey {
    /// `salt` stands for the settings.
    pub fn of(query: &[u8], types: &[u8], salt: u64) -> Self {
        // keyed anew in each process: nobody can make two statements that share a name
        static KEYS: OnceLock<[RandomState; 2]> = OnceLock::new();
        let keys = KEYS.get_or_init(|| [RandomState::new(), RandomState::new()]);
        let [high, low] = keys.each_ref().map(|key| key.hash_one((query, types, salt)));
        StatementKey(u128::from(high) << 64 | u128::from(low))
    }

    /// On the server.
    pub fn name(self) -> Bytes {
        Bytes::from(format!("understudy_{:032x}", self.0))
    }
}

/// Least recently used first out.
#[derive(Debug, Default)]
pub struct Known {
    statements: HashMap<StatementKey, u64>,
    clock: u64,
    limit: usize,
    /// Names of clients that have been left on the server and must be closed before others use it.
    pub leftovers: Vec<Bytes>,
}

impl Known {
    /// With room for this many statements.
    pub fn new(limit: usize) -> Self {
        Known { limit: limit.max(1), ..Known::default() }
    }

    /// Whether it is there; used just now.
    pub fn touch(&mut self, key: StatementKey) -> bool {
        self.clock += 1;
        match self.statements.get_mut(&key) {
            Some(used) => {
                *used = self.clock;
                true
            }
            None => false,
        }
    }

    /// It is about to be prepared. Returns whom it displaces.
    pub fn insert(&mut self, key: StatementKey) -> Option<StatementKey> {
        self.clock += 1;
        let full = self.statements.len() >= self.limit && !self.statements.contains_key(&key);
        let oldest = if full { self.statements.iter().min_by_key(|(_, used)| **used).map(|(key, _)| *key) } else { None };
        if let Some(oldest) = oldest {
            self.statements.remove(&oldest);
        }
        self.statements.insert(key, self.clock);
        oldest
    }

    /// It is not there (any more), or may not be.
    pub fn remove(&mut self, key: StatementKey) {
        self.statements.remove(&key);
    }

    /// None may be there.
    pub fn clear(&mut self) {
        self.statements.clear();
    }

    /// How many are there.
    pub fn len(&self) -> usize {
        self.statements.len()
    }

    /// None is there.
    pub fn is_empty(&self) -> bool {
        self.statements.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_least_recently_used_goes() {
        let [a, b, c] = [b"a", b"b", b"c"].map(|text| StatementKey::of(text, b"", 0));
        let mut known = Known::new(2);
        assert_eq!((known.insert(a), known.insert(b)), (None, None));
        assert!(known.touch(a));
        assert_eq!(known.insert(c), Some(b));
        assert!(known.touch(a) && known.touch(c) && !known.touch(b));
        assert_eq!(known.insert(c), None, "it is there already");
        assert_ne!(a.name(), StatementKey::of(b"a", b"", 1).name(), "under other settings it is another");
        assert_ne!(StatementKey::of(b"ab", b"c", 0), StatementKey::of(b"a", b"bc", 0));
    }

    proptest! {
        #[test]
        fn never_more_than_the_limit(steps: Vec<(u8, bool)>) {
            let mut known = Known::new(5);
            for (key, insert) in steps {
                let key = StatementKey::of(&[key], b"", 0);
                if insert { known.insert(key); prop_assert!(known.touch(key)); } else { known.remove(key); }
                prop_assert!(known.len() <= 5);
            }
        }
    }
}
