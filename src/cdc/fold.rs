//! Folding: many row changes of a table become few sets (delete these keys, update these, insert these), so that the follower runs
//! some statements instead of thousands. Pure.
//!
//! Triggers and foreign keys do not fire where the changes are applied, so the order between tables does not matter; within a table
//! the last state of each key does, as long as nothing but the key is unique. What does not fold keeps its place: everything of its
//! table before it is done before it. Each set says how many rows it must concern: a row that is missing or already there changes
//! that number, and the caller does the batch again one by one, which names the row.

use super::{
    batch::Pending,
    pgoutput::{Message, Tuple, Value},
    plan::{Folding, Plan},
};
use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
};

/// A row of a set: one of the batch as it was sent, or several merged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Row {
    At(usize),
    Made(Tuple),
}

/// What is done with the rows of a set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Rows with these keys are there and go.
    Delete,
    /// Rows that came and went in between: there must be none.
    Absent,
    /// Rows with these keys are there and get these values; positions of columns that keep theirs.
    Update(Vec<usize>),
    /// Rows that come, in this order.
    Insert,
}

/// One thing to do on the follower.
#[derive(Debug)]
pub(super) enum Step {
    /// One change of the batch, as it is.
    One(usize),
    /// Many rows of one table.
    Set { plan: Arc<Plan>, kind: Kind, rows: Vec<Row> },
}

/// The changes of one key contradict each other: the follower or the stream is not what it should be.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Contradiction;

#[derive(PartialEq, Eq, Hash)]
enum Key<'a> {
    One(&'a [u8]),
    Many(Vec<&'a [u8]>),
}

/// What the changes so far have made of a key.
enum State {
    Inserted(Row),
    Updated(Row),
    Deleted(usize),
    /// Deleted, then inserted.
    Replaced(usize, Row),
    /// Inserted, then deleted.
    Nothing(usize),
}

/// The changes of one table that are not in a step yet.
struct Table<'a> {
    plan: Arc<Plan>,
    places: HashMap<Key<'a>, usize>,
    states: Vec<State>,
}

/// The row that a change brings, or the one it takes away.
pub(super) fn tuple<'a>(batch: &'a [Pending], row: &'a Row) -> Option<&'a Tuple> {
    match row {
        Row::Made(tuple) => Some(tuple),
        Row::At(at) => match batch.get(*at)? {
            Pending::Row { message: Message::Insert { new, .. } | Message::Update { new, .. }, .. } => Some(new),
            Pending::Row { message: Message::Delete { old, .. }, .. } => Some(old),
            _ => None,
        },
    }
}

fn key<'a>(plan: &Plan, tuple: &'a Tuple) -> Option<Key<'a>> {
    let value = |position: &usize| match tuple.get(*position) {
        Some(Value::Text(bytes)) => Some(&bytes[..]),
        _ => None,
    };
    match plan.key() {
        [] => None,
        [only] => value(only).map(Key::One),
        several => several.iter().map(value).collect::<Option<_>>().map(Key::Many),
    }
}

/// The newer row with what was not sent taken from the older one.
fn merge(batch: &[Pending], older: &Row, newer: usize) -> Row {
    let at = Row::At(newer);
    let (Some(old), Some(new)) = (tuple(batch, older), tuple(batch, &at)) else { return at };
    if !new.contains(&Value::Unchanged) {
        return Row::At(newer);
    }
    let merged = new.iter().zip(old).map(|(new, old)| if *new == Value::Unchanged { old.clone() } else { new.clone() });
    Row::Made(merged.collect())
}

/// Makes steps of a batch. `plan`: of a relation; `None` leaves its changes as they are.
pub(super) fn fold<'a>(batch: &'a [Pending], mut plan: impl FnMut(u32) -> Option<Arc<Plan>>) -> Result<Vec<Step>, Contradiction> {
    let mut steps = Vec::new();
    // In the order of their first change: the same batch always gives the same steps.
    let (mut tables, mut numbers): (Vec<Option<Table<'a>>>, HashMap<u32, usize>) = (Vec::new(), HashMap::new());
    for (at, pending) in batch.iter().enumerate() {
        let Pending::Row { relation, message, .. } = pending else {
            steps.push(Step::One(at));
            continue;
        };
        let number = *numbers.entry(*relation).or_insert_with(|| {
            let table = plan(*relation).filter(|plan| plan.folding() != Folding::Never);
            tables.push(table.map(|plan| Table { plan, places: HashMap::new(), states: Vec::new() }));
            tables.len() - 1
        });
        let Some(Some(table)) = tables.get_mut(number) else {
            steps.push(Step::One(at));
            continue;
        };
        if !table.take(batch, at, message)? {
            table.close(batch, &mut steps);
            steps.push(Step::One(at));
        }
    }
    for table in tables.iter_mut().flatten() {
        table.close(batch, &mut steps);
    }
    Ok(steps)
}

impl<'a> Table<'a> {
    /// `false`: the change must keep its place.
    fn take(&mut self, batch: &'a [Pending], at: usize, message: &'a Message) -> Result<bool, Contradiction> {
        let keyed = self.plan.folding() == Folding::ByKey;
        let fits = |tuple: &Tuple| tuple.len() == self.plan.relation.columns.len();
        let found = match message {
            Message::Insert { new, .. } if !fits(new) || new.contains(&Value::Unchanged) => return Ok(false),
            Message::Insert { .. } if !keyed => {
                self.states.push(State::Inserted(Row::At(at)));
                return Ok(true);
            }
            _ if !keyed => return Ok(false),
            Message::Insert { new, .. } => key(&self.plan, new),
            Message::Update { old, new, .. } => {
                let found = key(&self.plan, new);
                let same = old.as_ref().is_none_or(|old| key(&self.plan, old) == found);
                if fits(new) && same { found } else { None }
            }
            Message::Delete { old, .. } if fits(old) => key(&self.plan, old),
            _ => None,
        };
        let Some(found) = found else { return Ok(false) };
        let place = match self.places.entry(found) {
            Entry::Vacant(vacant) => {
                vacant.insert(self.states.len());
                self.states.push(match message {
                    Message::Insert { .. } => State::Inserted(Row::At(at)),
                    Message::Update { .. } => State::Updated(Row::At(at)),
                    _ => State::Deleted(at),
                });
                return Ok(true);
            }
            Entry::Occupied(occupied) => *occupied.get(),
        };
        let Some(state) = self.states.get_mut(place) else { return Err(Contradiction) };
        let next = match (&*state, message) {
            (State::Inserted(row), Message::Update { .. }) => State::Inserted(merge(batch, row, at)),
            (State::Updated(row), Message::Update { .. }) => State::Updated(merge(batch, row, at)),
            (State::Replaced(gone, row), Message::Update { .. }) => State::Replaced(*gone, merge(batch, row, at)),
            (State::Inserted(_), Message::Delete { .. }) => State::Nothing(at),
            (State::Updated(_), Message::Delete { .. }) => State::Deleted(at),
            (State::Replaced(gone, _), Message::Delete { .. }) => State::Deleted(*gone),
            (State::Deleted(gone), Message::Insert { .. }) => State::Replaced(*gone, Row::At(at)),
            (State::Nothing(_), Message::Insert { .. }) => State::Inserted(Row::At(at)),
            _ => return Err(Contradiction),
        };
        *state = next;
        Ok(true)
    }

    /// Turns what was taken so far into steps: keys that go first, so that those that come find them free.
    fn close(&mut self, batch: &[Pending], steps: &mut Vec<Step>) {
        self.places.clear();
        let (mut deleted, mut absent, mut inserted) = (Vec::new(), Vec::new(), Vec::new());
        let mut updated: Vec<(Vec<usize>, Vec<Row>)> = Vec::new();
        for state in self.states.drain(..) {
            match state {
                State::Deleted(at) => deleted.push(Row::At(at)),
                State::Nothing(at) => absent.push(Row::At(at)),
                State::Inserted(row) => inserted.push(row),
                State::Replaced(at, row) => {
                    deleted.push(Row::At(at));
                    inserted.push(row);
                }
                State::Updated(row) => {
                    let kept: Vec<usize> = tuple(batch, &row)
                        .map(|tuple| (0..tuple.len()).filter(|position| tuple.get(*position) == Some(&Value::Unchanged)).collect())
                        .unwrap_or_default();
                    match updated.iter_mut().find(|(same, _)| *same == kept) {
                        Some((_, rows)) => rows.push(row),
                        None => updated.push((kept, vec![row])),
                    }
                }
            }
        }
        let sets = [(Kind::Delete, deleted), (Kind::Absent, absent)]
            .into_iter()
            .chain(updated.into_iter().map(|(kept, rows)| (Kind::Update(kept), rows)))
            .chain([(Kind::Insert, inserted)]);
        for (kind, rows) in sets.filter(|(_, rows)| !rows.is_empty()) {
            steps.push(Step::Set { plan: Arc::clone(&self.plan), kind, rows });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cdc::{
        pgoutput::{Column, Relation},
        plan::{TargetColumn, TargetTable},
    };
    use bytes::Bytes;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const RELATION: u32 = 1;

    fn plan(unique: &[&[&str]]) -> Arc<Plan> {
        let column = |name: &str, key| Column { key, name: name.into(), type_oid: 23 };
        let columns = vec![column("id", true), column("v", false), column("w", false)];
        let relation = Relation { oid: RELATION, schema: "s".into(), name: "t".into(), identity: b'd', columns };
        let target = |name: &str| {
            (
                name.to_owned(),
                TargetColumn { type_name: "integer".into(), generated: false, identity_always: false, listable: true, using: None },
            )
        };
        let table = TargetTable {
            columns: ["id", "v", "w"].map(target).into_iter().collect(),
            primary_key: vec!["id".into()],
            unique: unique.iter().map(|index| index.iter().map(|name| (*name).to_owned()).collect()).collect(),
            ..TargetTable::default()
        };
        Arc::new(Plan::new(&relation, Some(&table)).unwrap())
    }

    fn text(number: u32) -> Value {
        Value::Text(Bytes::from(number.to_string()))
    }

    fn pending(message: Message) -> Pending {
        Pending::Row { relation: RELATION, message, raw: Bytes::new() }
    }

    fn insert(row: [u32; 3]) -> Pending {
        pending(Message::Insert { relation: RELATION, new: row.map(text).to_vec() })
    }

    /// `None`: a value that was not sent.
    fn update(old: Option<u32>, row: [Option<u32>; 3]) -> Pending {
        let old = old.map(|id| vec![text(id), Value::Null, Value::Null]);
        let new = row.map(|value| value.map_or(Value::Unchanged, text)).to_vec();
        pending(Message::Update { relation: RELATION, old, new })
    }

    fn delete(id: u32) -> Pending {
        pending(Message::Delete { relation: RELATION, old: vec![text(id), Value::Null, Value::Null] })
    }

    type Model = BTreeMap<Vec<u8>, Tuple>;

    fn id(tuple: &Tuple) -> Vec<u8> {
        match tuple.first() {
            Some(Value::Text(bytes)) => bytes.to_vec(),
            other => panic!("{other:?} is not a key"),
        }
    }

    fn change(model: &mut Model, key: &[u8], new: &Tuple) {
        let old = model.remove(key).expect("an updated row is there");
        let row: Tuple = new.iter().zip(&old).map(|(new, old)| if *new == Value::Unchanged { old.clone() } else { new.clone() }).collect();
        assert_eq!(model.insert(id(&row), row), None, "the new key is free");
    }

    fn apply_one(model: &mut Model, pending: &Pending) {
        match pending {
            Pending::Row { message: Message::Insert { new, .. }, .. } => assert_eq!(model.insert(id(new), new.clone()), None),
            Pending::Row { message: Message::Update { old, new, .. }, .. } => change(model, &id(old.as_ref().unwrap_or(new)), new),
            Pending::Row { message: Message::Delete { old, .. }, .. } => assert!(model.remove(&id(old)).is_some()),
            other => panic!("{other:?}"),
        }
    }

    fn apply(model: &mut Model, batch: &[Pending], steps: &[Step]) {
        for step in steps {
            match step {
                Step::One(at) => apply_one(model, &batch[*at]),
                Step::Set { kind, rows, .. } => {
                    for row in rows.iter().map(|row| tuple(batch, row).unwrap()) {
                        match kind {
                            Kind::Delete => assert!(model.remove(&id(row)).is_some()),
                            Kind::Absent => assert!(!model.contains_key(&id(row))),
                            Kind::Update(kept) => {
                                assert!(kept.iter().all(|position| row[*position] == Value::Unchanged));
                                change(model, &id(row), row);
                            }
                            Kind::Insert => assert_eq!(model.insert(id(row), row.clone()), None),
                        }
                    }
                }
            }
        }
    }

    fn kinds(batch: &[Pending], unique: &[&[&str]]) -> Vec<String> {
        let steps = fold(batch, |_| Some(plan(unique))).unwrap();
        let name = |step: &Step| match step {
            Step::One(at) => format!("one {at}"),
            Step::Set { kind, rows, .. } => format!("{kind:?} {}", rows.len()),
        };
        steps.iter().map(name).collect()
    }

    #[test]
    fn the_last_state_of_a_key_wins() {
        let key: &[&[&str]] = &[&["id"]];
        let cases: Vec<(Vec<Pending>, &[&str])> = vec![
            (vec![update(None, [Some(1), Some(1), None]), update(None, [Some(1), None, Some(2)])], &["Update([]) 1"]),
            (vec![insert([1, 1, 1]), update(None, [Some(1), None, Some(2)])], &["Insert 1"]),
            (vec![insert([1, 1, 1]), delete(1)], &["Absent 1"]),
            (vec![delete(1), insert([1, 2, 2])], &["Delete 1", "Insert 1"]),
            (vec![delete(1), insert([1, 2, 2]), delete(1)], &["Delete 1"]),
            (vec![update(None, [Some(1), Some(1), Some(1)]), delete(1), insert([2, 0, 0])], &["Delete 1", "Insert 1"]),
            // A row gets another key: in its place.
            (
                vec![delete(2), update(Some(1), [Some(2), None, None]), update(None, [Some(2), Some(5), None])],
                &["Delete 1", "one 1", "Update([2]) 1"],
            ),
        ];
        for (batch, expected) in cases {
            assert_eq!(kinds(&batch, key), expected, "{batch:?}");
        }
    }

    #[test]
    fn order_is_kept_where_something_else_is_unique() {
        let batch = [insert([1, 1, 1]), insert([2, 2, 2]), update(None, [Some(1), Some(3), None]), insert([3, 1, 1])];
        for unique in [&[&["id"][..], &["v"][..]][..], &[&["id"][..], &[][..]][..], &[][..]] {
            assert_eq!(kinds(&batch, unique), ["Insert 2", "one 2", "Insert 1"], "{unique:?}");
        }
        // An index that holds the key can only be hit by the key.
        assert_eq!(kinds(&batch, &[&["id"], &["v", "id"]]), ["Insert 3"]);
    }

    #[test]
    fn changes_that_contradict_each_other_do_not_fold() {
        for batch in [
            [insert([1, 1, 1]), insert([1, 1, 1])],
            [delete(1), delete(1)],
            [delete(1), update(None, [Some(1), Some(1), None])],
            [update(None, [Some(1), Some(1), None]), insert([1, 1, 1])],
        ] {
            assert_eq!(fold(&batch, |_| Some(plan(&[&["id"]]))).map(|steps| steps.len()), Err(Contradiction), "{batch:?}");
        }
    }

    proptest! {
        /// Folded or not, the follower ends with the same rows, and each set concerns exactly the rows that it names.
        #[test]
        fn folding_changes_nothing(there: [bool; 6], choices in proptest::collection::vec((0..6_u32, 0..4_u8, 0..6_u32, any::<bool>()), 0..60)) {
            let mut initial = Model::new();
            for (number, _) in there.iter().enumerate().filter(|(_, there)| **there) {
                apply_one(&mut initial, &insert([number as u32, 100, 100]));
            }
            let (mut model, mut batch) = (initial.clone(), Vec::new());
            for (number, (key, what, other, sent)) in choices.into_iter().enumerate() {
                let value = number as u32;
                let present = |key: u32| model.contains_key(key.to_string().as_bytes());
                let next = match (present(key), what) {
                    (false, _) => insert([key, value, value]),
                    (true, 0) => delete(key),
                    (true, 1) if !present(other) => update(Some(key), [Some(other), Some(value), sent.then_some(value)]),
                    (true, _) => update(None, [Some(key), sent.then_some(value), Some(value)]),
                };
                apply_one(&mut model, &next);
                batch.push(next);
            }
            let steps = fold(&batch, |_| Some(plan(&[&["id"]]))).unwrap();
            let mut folded = initial;
            apply(&mut folded, &batch, &steps);
            prop_assert_eq!(folded, model);
        }
    }
}
