//! Tables that are set aside, while statements run on the follower: they keep their spool through renames, are copied again when
//! their spooled rows have an older shape than the table, and are forgotten when a person has dropped them.

use super::{
    CdcError,
    applier::Applier,
    error::Attempt,
    held::HELD_KIND,
    names::qualified,
    shared::{Held, HeldState, TableName, lock},
};
use crate::{
    metadata::ProposalState,
    schema::{access::only_access, quote::parse_object, renames::Rename},
};
use std::{collections::BTreeSet, sync::atomic::Ordering};

impl Applier {
    /// Statements of the engine ran at their place in the stream, in the open transaction.
    pub(super) async fn statements_ran(&mut self, statements: &[String]) -> Result<(), CdcError> {
        for sql in statements {
            match Rename::parse(sql) {
                Some(rename @ Rename::Column { .. }) => {
                    self.renamed(&rename).await?;
                    self.reshaped(sql).await?;
                }
                Some(rename) => self.renamed(&rename).await?,
                None => self.reshaped(sql).await?,
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

    /// A table that waits for a person was changed: its spooled rows have the shape from before, so its rows are copied again in
    /// place of a replay once it is let go.
    async fn reshaped(&mut self, sql: &str) -> Result<(), CdcError> {
        // Who may use a table is no part of its shape.
        if only_access(sql) {
            return Ok(());
        }
        let waiting: Vec<(TableName, i64)> = lock(&self.shared.held)
            .iter()
            .filter(|(_, held)| matches!(held.state, HeldState::Waiting | HeldState::Rejected) && !held.recopy)
            .filter(|(table, _)| {
                let there = self.shared.spec.name_there(table);
                sql.contains(&qualified(&there.0, &there.1))
            })
            .map(|(table, held)| (table.clone(), held.proposal))
            .collect();
        for (table, proposal) in waiting {
            // Where the catalog is looked at, rows come before the change that explains them: theirs is the newer shape.
            let expected = self.shared.polled.load(Ordering::Acquire)
                && self.shared.repository.proposal(proposal).is_ok_and(|proposal| proposal.draft.kind == HELD_KIND);
            if !expected || replay_would_compute(sql) {
                self.ask_for_copy(&table, None).await?;
            }
        }
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
            // On its way already, or not wanted.
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
        names.extend(self.open_proposals()?.into_iter().map(|(_, table)| table));
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

    fn open_proposals(&self) -> Result<Vec<(i64, TableName)>, CdcError> {
        let all = self.shared.repository.proposals(Some(&self.shared.spec.database))?;
        Ok(all
            .into_iter()
            .filter(|one| one.shadow == self.shared.spec.shadow && one.state == ProposalState::Pending)
            .filter_map(|one| Some((one.id, parse_object(&one.draft.object)?)))
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
        for (id, table) in self.open_proposals()? {
            if id != but && gone.contains(&table) {
                self.decide(id, ProposalState::Superseded, "policy", "", &format!("proposal {but} has dropped the table"));
            }
        }
        Ok(())
    }
}

/// Rows that waited may be older than a column, and then have in it what the owner froze. Replayed without that column they would
/// get the follower's default: the same where it is a constant, another where it is computed or has been taken away.
fn replay_would_compute(sql: &str) -> bool {
    let computed = |expression: &str| expression.contains('(') || expression.starts_with("CURRENT_") || expression.starts_with("LOCALTIME");
    sql.ends_with(" DROP DEFAULT") || sql.split_once(" SET DEFAULT ").is_some_and(|(_, expression)| computed(expression))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_that_a_replay_would_compute() {
        let column = r#"ALTER TABLE "public"."t" ALTER COLUMN "c""#;
        for (action, expected) in [
            ("SET DEFAULT now()", true),
            ("SET DEFAULT CURRENT_TIMESTAMP", true),
            ("DROP DEFAULT", true),
            ("SET DEFAULT 7", false),
            ("SET DEFAULT 't'::text", false),
            ("SET NOT NULL", false),
        ] {
            assert_eq!(replay_would_compute(&format!("{column} {action}")), expected, "{action}");
        }
    }
}
