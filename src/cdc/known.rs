//! Where the owner's catalog is looked at, rows come before the message that says what their table has become: then a name, of a table or
//! of a column, may mean another thing than the follower's. Rows are believed only in the shape that the engine knows at this place; others
//! set their table aside, and what became of it is found out at the look that follows.

use super::{
    CdcError,
    applier::Applier,
    error::Attempt,
    held::HELD_KIND,
    names::SCHEMA,
    pgoutput::{Message, Relation},
    shared::{HeldState, TableName, lock},
};
use crate::{metadata::ProposalState, schema::catalog::Table};
use bytes::Bytes;
use std::{
    collections::{BTreeSet, HashMap},
    sync::atomic::Ordering,
};

/// Where the rows of each of the owner's tables go, by its oid there, as a look saw it.
pub(super) type Places = HashMap<i64, TableName>;

/// The columns of the stream are those of the table, in the same order.
fn same_columns(known: &Table, relation: &Relation) -> bool {
    let sent = known.columns.iter().filter(|column| column.generated.is_empty());
    let same = |(known, sent): (&crate::schema::catalog::Column, &super::pgoutput::Column)| {
        known.name == sent.name && (known.type_oid == 0 || known.type_oid == i64::from(sent.type_oid))
    };
    sent.clone().count() == relation.columns.len() && sent.zip(&relation.columns).all(same)
}

impl Applier {
    /// Rows of this shape may mean something else than the follower's table of this name; never so where messages come at their place.
    pub(super) async fn misunderstood(&self, relation: &Relation, table: &TableName) -> Result<bool, CdcError> {
        if !self.shared.polled.load(Ordering::Acquire) || relation.schema == SCHEMA {
            return Ok(false);
        }
        let known = self.shared.adapter.known_table(i64::from(relation.oid)).await?;
        Ok(!known.is_some_and(|known| (&known.schema, &known.name) == (&table.0, &table.1) && same_columns(&known, relation)))
    }

    /// The same for a TRUNCATE, which has no columns.
    pub(super) async fn is_another(&self, relation: u32, table: &TableName) -> Result<bool, CdcError> {
        if !self.shared.polled.load(Ordering::Acquire) {
            return Ok(false);
        }
        let known = self.shared.adapter.known_table(i64::from(relation)).await?;
        Ok(known.is_none_or(|known| (&known.schema, &known.name) != (&table.0, &table.1)))
    }

    /// What is to become of a table that rows have set aside, after a look that began later and whose message is applied: its rows are
    /// replayed where they have the shape that is known now; else it is copied again, as is each table whose rows came under its name. A
    /// name that no table has any more is forgotten.
    pub(super) async fn take_back(&mut self, table: &TableName, places: &Places) -> Result<(), CdcError> {
        let held = lock(&self.shared.held).get(table).cloned();
        let Some(held) = held.filter(|held| held.state == HeldState::Waiting && held.proposal > 0) else { return Ok(()) };
        let Ok(proposal) = self.shared.repository.proposal(held.proposal) else { return Ok(()) };
        if proposal.state != ProposalState::Pending || proposal.draft.kind != HELD_KIND {
            return Ok(());
        }
        let (oids, mut doubtful) = self.spooled_relations(table).await?;
        let owners: BTreeSet<TableName> = oids.iter().filter_map(|oid| places.get(oid).cloned()).collect();
        doubtful |= held.recopy || oids.iter().any(|oid| places.get(oid) != Some(table));
        for other in owners.iter().filter(|other| *other != table) {
            self.copy_again(other).await?;
        }
        if !places.values().any(|place| place == table) {
            self.forget_spools(std::slice::from_ref(table)).await?;
            lock(&self.shared.held).remove(table);
            self.spooled_shapes.clear();
            self.decide(held.proposal, ProposalState::Superseded, "policy", "", "the owner has no table of this name any more");
            return Ok(());
        }
        if doubtful { self.copy_again(table).await } else { self.approve(&proposal, None, "policy").await.map(|_| ()) }
    }

    /// The owner's oids of the tables whose rows wait under a name, and whether any of them has another shape than the one known now.
    async fn spooled_relations(&self, table: &TableName) -> Result<(BTreeSet<i64>, bool), CdcError> {
        let rows = self
            .client
            .query(
                "SELECT change FROM understudy.spool WHERE feed = $1 AND schema_name = $2 AND table_name = $3
                   AND substr(change, 1, 1) IN ('\\x52', '\\x54')",
                &[&self.shared.feed, &table.0, &table.1],
            )
            .await
            .attempt("read spooled changes")?;
        let (mut oids, mut doubtful) = (BTreeSet::new(), false);
        for row in &rows {
            match Message::decode(&Bytes::copy_from_slice(row.get(0)))? {
                Message::Relation(relation) => {
                    doubtful |= self.misunderstood(&relation, table).await?;
                    oids.insert(i64::from(relation.oid));
                }
                Message::Truncate { relations, .. } => oids.extend(relations.into_iter().map(i64::from)),
                _ => {}
            }
        }
        Ok((oids, doubtful))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::catalog::Column;

    #[test]
    fn another_order_name_type_or_number_of_columns_is_another_shape() {
        let known = |name: &str, type_oid: i64, generated: &str| Column {
            name: name.into(),
            type_oid,
            generated: generated.into(),
            ..Column::default()
        };
        let table = Table { columns: vec![known("a", 23, ""), known("g", 23, "s"), known("b", 23, "")], ..Table::default() };
        let relation = |columns: &[(&str, u32)]| {
            let columns = columns
                .iter()
                .map(|(name, type_oid)| super::super::pgoutput::Column { key: false, name: (*name).into(), type_oid: *type_oid })
                .collect();
            Relation { oid: 1, schema: "s".into(), name: "t".into(), identity: b'd', columns }
        };
        assert!(same_columns(&table, &relation(&[("a", 23), ("b", 23)])));
        for other in [
            &[("b", 23), ("a", 23)][..],
            &[("a", 23)],
            &[("a", 23), ("b", 25)],
            &[("a", 23), ("c", 23)],
            &[("a", 23), ("g", 23), ("b", 23)],
        ] {
            assert!(!same_columns(&table, &relation(other)), "{other:?}");
        }
    }
}
