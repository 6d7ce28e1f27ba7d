//! Tables that are set aside, while statements run on the follower: they keep their spool through renames, are copied again when
//! their spooled rows have an older shape than the table, and are forgotten when a person has dropped them.

use super::{
    CdcError,
    applier::{Applier, Group},
    error::Attempt,
    names::qualified,
    shared::{Held, HeldState, TableName, lock},
};
use crate::{
    lsn::Lsn,
    metadata::ProposalState,
    schema::{access::only_access, quote::parse_object, renames::Rename},
};
use std::collections::BTreeSet;

/// A proposal that waits.
pub(super) struct Question {
    pub id: i64,
    pub table: TableName,
    pub kind: String,
}

impl Applier {
    /// Statements of the engine ran at their place in the stream, in the open transaction.
    pub(super) async fn statements_ran(&mut self, group: &Group, statements: &[String]) -> Result<(), CdcError> {
        for sql in statements {
            match Rename::parse(sql) {
                Some(rename @ Rename::Column { .. }) => {
                    self.renamed(&rename).await?;
                    self.reshaped(group, sql).await?;
                }
                Some(rename) => self.renamed(&rename).await?,
                None => self.reshaped(group, sql).await?,
            }
        }
        Ok(())
    }

    /// What is set aside under the old name goes on under the new one.
    pub(super) async fn renamed(&mut self, rename: &Rename) -> Result<(), CdcError> {
        let moved: Vec<(TableName, TableName)> =
            lock(&self.shared.held).keys().filter_map(|table| Some((table.clone(), self.renamed_name(rename, table)?))).collect();
        for (from, to) in moved {
            let what = "rename a table that is set aside";
            let (here, there) = (&self.shared.feed, [&from.0, &from.1, &to.0, &to.1]);
            let values: [&(dyn tokio_postgres::types::ToSql + Sync); 5] = [here, there[0], there[1], there[2], there[3]];
            // A row that came before the message that explains it has set the new name aside already: the older reason is the one to
            // decide, and both spools are one, in order.
            let newer = lock(&self.shared.held).get(&to).cloned();
            if let Some(newer) = &newer {
                self.client
                    .execute(
                        "DELETE FROM understudy.held_table WHERE feed = $1 AND schema_name = $2 AND table_name = $3",
                        &[here, &to.0, &to.1],
                    )
                    .await
                    .attempt(what)?;
                if newer.proposal > 0 {
                    self.decide(newer.proposal, ProposalState::Superseded, "policy", "", "the owner renamed a table to this name");
                }
            }
            for place in ["held_table", "spool"] {
                self.client
                    .execute(
                        &format!(
                            "UPDATE understudy.{place} SET schema_name = $4, table_name = $5
                             WHERE feed = $1 AND schema_name = $2 AND table_name = $3"
                        ),
                        &values,
                    )
                    .await
                    .attempt(what)?;
            }
            let mut held = lock(&self.shared.held);
            if let Some(entry) = held.remove(&from) {
                held.insert(to, entry);
            }
        }
        Ok(())
    }

    /// The new name of a table, as [`Rename::of`]. One whose place is written down has the owner's name here, which no statement of the
    /// follower changes.
    pub(super) fn renamed_name(&self, rename: &Rename, table: &TableName) -> Option<TableName> {
        if self.shared.spec.place(table).is_some() { None } else { rename.of(table) }
    }

    /// A table that is set aside was changed: its spooled rows have the shape from before, and so may a copy that is under way. Once a
    /// person has let go of it, it is copied instead of replayed; one that is being copied is copied once more.
    async fn reshaped(&mut self, group: &Group, sql: &str) -> Result<(), CdcError> {
        // Who may use a table is no part of its shape.
        if only_access(sql) {
            return Ok(());
        }
        let columns = sql.contains(" COLUMN ");
        let concerned: Vec<(TableName, HeldState)> = lock(&self.shared.held)
            .iter()
            .filter(|(_, held)| match held.state {
                HeldState::Waiting | HeldState::Rejected => !held.recopy,
                HeldState::Recopy | HeldState::Copied => columns,
            })
            .filter(|(table, _)| {
                let there = self.shared.spec.name_there(table);
                sql.contains(&qualified(&there.0, &there.1))
            })
            .map(|(table, held)| (table.clone(), held.state))
            .collect();
        for (table, state) in concerned {
            match state {
                HeldState::Waiting | HeldState::Rejected => self.ask_for_copy(&table, None).await?,
                HeldState::Recopy | HeldState::Copied => self.copy_from(&table, group.commit_lsn).await?,
            }
        }
        Ok(())
    }

    /// A copy counts only if it was begun behind this position.
    async fn copy_from(&mut self, table: &TableName, since: Lsn) -> Result<(), CdcError> {
        self.client
            .execute(
                "UPDATE understudy.held_table SET recopy = true, state = 'recopy', since_lsn = $4::text::pg_lsn
                 WHERE feed = $1 AND schema_name = $2 AND table_name = $3",
                &[&self.shared.feed, &table.0, &table.1, &since.to_string()],
            )
            .await
            .attempt("have a table copied again")?;
        if let Some(held) = lock(&self.shared.held).get_mut(table) {
            (held.recopy, held.state, held.since) = (true, HeldState::Recopy, since);
        }
        self.shared.chores.notify_one();
        Ok(())
    }

    /// Notes that a table's rows are to be copied again; with a state, that this is what it waits for.
    pub(super) async fn ask_for_copy(&mut self, table: &TableName, state: Option<HeldState>) -> Result<(), CdcError> {
        self.client
            .execute(
                "UPDATE understudy.held_table SET recopy = true, state = coalesce($4, state)
                 WHERE feed = $1 AND schema_name = $2 AND table_name = $3",
                &[&self.shared.feed, &table.0, &table.1, &state.map(HeldState::as_str)],
            )
            .await
            .attempt("have a table copied again")?;
        if let Some(held) = lock(&self.shared.held).get_mut(table) {
            held.recopy = true;
            held.state = state.unwrap_or(held.state);
        }
        Ok(())
    }

    /// A table whose spooled rows must not be believed, or that took rows which were meant for another, is copied again.
    pub(super) async fn copy_again(&mut self, table: &TableName) -> Result<(), CdcError> {
        let held = lock(&self.shared.held).get(table).cloned();
        match held {
            Some(held) if held.state == HeldState::Waiting => {
                self.ask_for_copy(table, Some(HeldState::Recopy)).await?;
                self.decide(held.proposal, ProposalState::Superseded, "policy", "", "the table is copied again instead");
            }
            // What is being copied may have been read before what is known now.
            Some(held) if matches!(held.state, HeldState::Recopy | HeldState::Copied) => {
                let since = self.shared.last_commit.load();
                self.copy_from(table, since).await?;
            }
            // Not wanted.
            Some(_) => return Ok(()),
            None => {
                let (reason, since) = ("the owner gave one of its names to something else", self.shared.last_commit.load());
                self.client
                    .execute(
                        "INSERT INTO understudy.held_table (feed, schema_name, table_name, state, reason, since_lsn, recopy)
                         VALUES ($1, $2, $3, 'recopy', $4, $5::text::pg_lsn, true)",
                        &[&self.shared.feed, &table.0, &table.1, &reason, &since.to_string()],
                    )
                    .await
                    .attempt("have a table copied again")?;
                let entry = Held { proposal: 0, state: HeldState::Recopy, reason: reason.into(), since, recopy: true };
                lock(&self.shared.held).insert(table.clone(), entry);
            }
        }
        self.shared.chores.notify_one();
        Ok(())
    }

    /// Tables of the follower that somebody waits for: set aside, or named by a proposal. Without those whose place is written down:
    /// that their table is not there means that the mapping is to be corrected, not that their rows are not wanted.
    pub(super) async fn awaited_tables(&self) -> Result<BTreeSet<TableName>, CdcError> {
        let mut names: BTreeSet<TableName> = lock(&self.shared.held).keys().cloned().collect();
        names.extend(self.open_proposals()?.into_iter().map(|question| question.table));
        names.retain(|table| self.shared.spec.place(table).is_none());
        let (schemas, tables): (Vec<String>, Vec<String>) = names.into_iter().unzip();
        let there = self
            .client
            .query(
                "SELECT s, t FROM unnest($1::text[], $2::text[]) AS x (s, t) WHERE to_regclass(format('%I.%I', s, t)) IS NOT NULL",
                &[&schemas, &tables],
            )
            .await
            .attempt("look for tables on the follower")?;
        Ok(there.iter().map(|row| (row.get(0), row.get(1))).collect())
    }

    pub(super) fn open_proposals(&self) -> Result<Vec<Question>, CdcError> {
        let all = self.shared.repository.proposals(Some(&self.shared.spec.database))?;
        Ok(all
            .into_iter()
            .filter(|one| one.shadow == self.shared.spec.shadow && one.state == ProposalState::Pending)
            .filter_map(|one| Some(Question { id: one.id, table: parse_object(&one.draft.object)?, kind: one.draft.kind }))
            .collect())
    }

    /// Forgets that tables were set aside, and what was spooled for them (it has been replayed, or a person has just dropped them), in the
    /// open transaction.
    pub(super) async fn forget_spools(&self, tables: &[TableName]) -> Result<(), CdcError> {
        for table in tables {
            for place in ["spool", "held_table"] {
                self.client
                    .execute(
                        &format!("DELETE FROM understudy.{place} WHERE feed = $1 AND schema_name = $2 AND table_name = $3"),
                        &[&self.shared.feed, &table.0, &table.1],
                    )
                    .await
                    .attempt("forget spooled changes")?;
            }
        }
        Ok(())
    }

    /// What else was suggested for tables that are gone cannot be carried out any more.
    pub(super) fn supersede(&self, gone: &[TableName], but: i64) -> Result<(), CdcError> {
        for question in self.open_proposals()? {
            if question.id != but && gone.contains(&question.table) {
                self.decide(question.id, ProposalState::Superseded, "policy", "", &format!("proposal {but} has dropped the table"));
            }
        }
        Ok(())
    }
}
