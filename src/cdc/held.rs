//! Schema changes in the stream, tables that are set aside, and what people decide about them. Everything here happens at its
//! place in the stream, in the applier's transaction.

use super::{
    CdcError,
    applier::{Applier, BEGIN, Command, Group},
    batch::Pending,
    error::{Attempt, Blame, blame, describe},
    names::qualified,
    pgoutput::{Message, Relation, encode_truncate},
    plan::{Misfit, Plan},
    rows::Outcome,
    session,
    shared::{Held, HeldState, TableName, lock},
};
use crate::{
    lsn::Lsn,
    metadata::{Proposal, ProposalDraft, ProposalState, Severity},
    schema::{approval, quote::parse_object, renames::Rename},
};
use bytes::Bytes;
use std::{collections::HashMap, sync::Arc};

/// Kind of the proposals that this room makes itself: a table that cannot take its rows.
pub(super) const HELD_KIND: &str = "held_table";

/// Spooled changes read at a time.
const REPLAY_ROWS: i64 = 1_000;

impl Applier {
    pub(super) fn decide(&self, id: i64, state: ProposalState, by: &str, sql: &str, note: &str) {
        if let Err(error) = self.shared.repository.decide(id, state, by, sql, note) {
            tracing::error!(%error, proposal = id, "cannot record the decision about a proposal");
        }
    }

    /// A schema change of the owner, at its place.
    pub(super) async fn adapt(&mut self, group: &mut Group, content: &[u8], lsn: Lsn) -> Result<(), CdcError> {
        self.flush(group).await?;
        self.begin(group).await?;
        self.client.batch_execute("SAVEPOINT understudy_ddl").await.attempt("set a savepoint on the follower")?;
        let adapter = Arc::clone(&self.shared.adapter);
        let adaptation = match adapter.adapt(content, lsn, &self.client).await {
            Ok(adaptation) => {
                self.client.batch_execute("RELEASE SAVEPOINT understudy_ddl").await.attempt("release a savepoint")?;
                adaptation
            }
            Err(error) => {
                self.client.batch_execute("ROLLBACK TO SAVEPOINT understudy_ddl").await.attempt("undo on the follower")?;
                self.shared.event(
                    Severity::Alert,
                    "a schema change of the owner could not be understood: tables whose rows no longer fit will be set aside; compare \
                     both schemas (SHOW DRIFT)",
                    serde_json::json!({"reason": error.to_string(), "lsn": lsn.to_string()}),
                );
                return Ok(());
            }
        };
        for (id, statements) in adaptation.run_now {
            match self.run_in_savepoint(&statements).await? {
                Ok(()) => {
                    self.statements_ran(group, &statements).await?;
                    group.decided.push((id, statements.join(";\n")));
                }
                Err(reason) => self.adaptation_failed(group, id, &statements, &reason).await?,
            }
        }
        for (id, statements) in adaptation.run_after {
            self.client
                .execute(
                    "INSERT INTO understudy.deferred (feed, proposal, statements) VALUES ($1, $2, $3)",
                    &[&self.shared.feed, &id, &statements],
                )
                .await
                .attempt("store statements for later")?;
            group.chores = true;
        }
        for (id, schema, table) in adaptation.hold {
            self.hold(group, &(schema, table), id, HeldState::Waiting, "a schema change waits for approval").await?;
        }
        for (schema, table) in adaptation.recopy {
            self.hold(
                group,
                &(schema, table),
                0,
                HeldState::Recopy,
                "the owner rewrote the table, or rows may have been taken for others: its rows are copied again",
            )
            .await?;
            group.chores = true;
        }
        group.alone |= adaptation.commit_alone;
        self.forget_plans();
        Ok(())
    }

    async fn adaptation_failed(&mut self, group: &mut Group, id: i64, sql: &[String], reason: &str) -> Result<(), CdcError> {
        self.decide(id, ProposalState::Failed, "policy", &sql.join(";\n"), reason);
        self.shared.event(
            Severity::Alert,
            "an adaptation failed on the follower and was undone; APPROVE it with other statements",
            serde_json::json!({"proposal": id, "reason": reason}),
        );
        if let Some(table) = self.shared.repository.proposal(id).ok().and_then(|proposal| parse_object(&proposal.draft.object))
            && self.target_table(&table).await?.is_some()
        {
            let here = self.shared.spec.name_here(&table);
            self.hold(group, &here, id, HeldState::Waiting, "an adaptation of this table failed").await?;
        }
        Ok(())
    }

    /// Runs statements; what the follower refuses is undone and given back as text.
    async fn run_in_savepoint(&mut self, statements: &[String]) -> Result<Result<(), String>, CdcError> {
        self.client.batch_execute("SAVEPOINT understudy_run").await.attempt("set a savepoint on the follower")?;
        for statement in statements {
            if let Err(source) = self.client.batch_execute(statement).await {
                if blame(&source) == Blame::Moment {
                    return Err(CdcError::Postgres { what: "adapt the follower's schema".into(), source });
                }
                let reason = describe(&source);
                self.client.batch_execute("ROLLBACK TO SAVEPOINT understudy_run").await.attempt("undo on the follower")?;
                return Ok(Err(reason));
            }
        }
        self.client.batch_execute("RELEASE SAVEPOINT understudy_run").await.attempt("release a savepoint")?;
        Ok(Ok(()))
    }

    /// Sets a table aside from here on. `proposal` 0 with [`HeldState::Waiting`]: nobody has proposed anything yet, so this does.
    pub(super) async fn hold(
        &mut self,
        group: &mut Group,
        table: &TableName,
        proposal: i64,
        state: HeldState,
        reason: &str,
    ) -> Result<(), CdcError> {
        self.begin(group).await?;
        let proposal = if proposal == 0 && state == HeldState::Waiting { self.propose(group, table, reason)? } else { proposal };
        let recopy = state == HeldState::Recopy;
        // A rejected table stays rejected; a table that waits for a person also waits when it must be copied again.
        self.client
            .execute(
                "INSERT INTO understudy.held_table (feed, schema_name, table_name, proposal, state, reason, since_lsn, recopy)
                 VALUES ($1, $2, $3, $4, $5, $6, $7::text::pg_lsn, $8)
                 ON CONFLICT (feed, schema_name, table_name) DO UPDATE SET
                   proposal = CASE WHEN excluded.proposal > 0 THEN excluded.proposal ELSE held_table.proposal END,
                   state = CASE WHEN held_table.state IN ('rejected', 'waiting') THEN held_table.state ELSE excluded.state END,
                   reason = excluded.reason, recopy = held_table.recopy OR excluded.recopy,
                   since_lsn = CASE WHEN excluded.recopy THEN excluded.since_lsn ELSE held_table.since_lsn END",
                &[&self.shared.feed, &table.0, &table.1, &proposal, &state.as_str(), &reason, &group.commit_lsn.to_string(), &recopy],
            )
            .await
            .attempt("set a table aside")?;
        let mut held = lock(&self.shared.held);
        let new = !held.contains_key(table);
        let entry =
            held.entry(table.clone()).or_insert(Held { proposal, state, reason: reason.to_owned(), since: group.commit_lsn, recopy });
        if recopy {
            entry.recopy = true;
            entry.since = group.commit_lsn;
        }
        if proposal > 0 {
            entry.proposal = proposal;
        }
        if !matches!(entry.state, HeldState::Rejected | HeldState::Waiting) {
            entry.state = state;
        }
        drop(held);
        if new {
            let severity = if state == HeldState::Recopy { Severity::Warning } else { Severity::Alert };
            self.shared.event(
                severity,
                "a table is set aside: its changes are spooled on the follower, all others go on",
                serde_json::json!({"table": format!("{}.{}", table.0, table.1), "reason": reason, "proposal": proposal,
                    "what_next": if state == HeldState::Recopy { "nothing: it is copied again" } else { "APPROVE or REJECT the proposal" }}),
            );
        }
        Ok(())
    }

    /// A proposal for a table that cannot take its rows, so that a person can let go of it with APPROVE … AS.
    fn propose(&self, group: &Group, table: &TableName, reason: &str) -> Result<i64, CdcError> {
        let object = format!("{}.{}", table.0, table.1);
        let waiting = self.shared.repository.proposals(Some(&self.shared.spec.database))?.into_iter().find(|proposal| {
            proposal.state == ProposalState::Pending
                && proposal.shadow == self.shared.spec.shadow
                && proposal.draft.object == object
                // Run in this very transaction and only not recorded yet: nobody will be asked about it.
                && !group.decided.iter().any(|(id, _)| *id == proposal.id)
                && (proposal.draft.kind == HELD_KIND || proposal.draft.holds_table)
        });
        if let Some(proposal) = waiting {
            return Ok(proposal.id);
        }
        let draft = ProposalDraft {
            object: object.clone(),
            kind: HELD_KIND.into(),
            change: format!("{object} cannot take its rows on the follower: {reason}"),
            sql: Vec::new(),
            undo: Vec::new(),
            alternatives: Vec::new(),
            confidence: 0.0,
            why: "the feed met a row that does not fit; what would make it fit is for a person to say: APPROVE … AS '<sql>', or APPROVE \
                  after putting it right by hand"
                .into(),
            loses_data: false,
            holds_table: true,
            outside_transaction: false,
            if_rejected: "the table stays set aside, its changes are spooled on the follower".into(),
        };
        Ok(self.shared.repository.propose(&self.shared.spec.database, &self.shared.spec.shadow, &draft)?)
    }

    /// Keeps a change of a held table, behind its relation's shape if this session has not kept that yet.
    pub(super) async fn spool(&mut self, group: &mut Group, relation: u32, raw: Bytes) -> Result<(), CdcError> {
        self.begin(group).await?;
        let table = self.table_of(relation)?;
        let commit = group.commit_lsn;
        if self.spooled_shapes.insert(relation)
            && let Some((_, shape)) = self.relations.get(&relation)
        {
            let shape = shape.clone();
            self.push(group, Pending::Spool { table: table.clone(), commit, raw: shape }).await?;
        }
        self.push(group, Pending::Spool { table, commit, raw }).await
    }

    /// The same, at once: from inside a flush.
    pub(super) async fn spool_now(&mut self, group: &mut Group, relation: u32, raw: &[u8]) -> Result<(), CdcError> {
        let table = self.table_of(relation)?;
        let mut parts: Vec<Bytes> = Vec::new();
        if self.spooled_shapes.insert(relation)
            && let Some((_, shape)) = self.relations.get(&relation)
        {
            parts.push(shape.clone());
        }
        parts.push(Bytes::copy_from_slice(raw));
        for part in parts {
            self.client
                .execute(
                    "INSERT INTO understudy.spool (feed, schema_name, table_name, commit_lsn, change)
                     VALUES ($1, $2, $3, $4::text::pg_lsn, $5)",
                    &[&self.shared.feed, &table.0, &table.1, &group.commit_lsn.to_string(), &&part[..]],
                )
                .await
                .attempt("spool a change on the follower")?;
        }
        Ok(())
    }

    /// TRUNCATE of several tables in one statement, as on the owner; those that are held keep theirs for later.
    pub(super) async fn truncate(&mut self, group: &mut Group, relations: &[u32], restart: bool) -> Result<(), CdcError> {
        group.changes += relations.len() as u64;
        self.flush(group).await?;
        self.begin(group).await?;
        let (mut names, mut live) = (Vec::new(), Vec::new());
        for relation in relations {
            let table = self.table_of(*relation)?;
            if self.passed_over(&table).await? {
                continue;
            }
            if lock(&self.shared.held).contains_key(&table) {
                self.spool(group, *relation, encode_truncate(*relation, restart).into()).await?;
                continue;
            }
            let there = self.shared.spec.name_there(&table);
            let (target, other) = (self.target_table(&there).await?, self.is_another(*relation, &table).await?);
            match target {
                Some(_) if other => {
                    self.hold(group, &table, 0, HeldState::Waiting, &Misfit::Ahead.to_string()).await?;
                    self.spool(group, *relation, encode_truncate(*relation, restart).into()).await?;
                }
                Some(target) => {
                    let only = if target.partitioned { "" } else { "ONLY " };
                    names.push(format!("{only}{}", qualified(&there.0, &there.1)));
                    live.push((*relation, table));
                }
                None => {
                    self.hold(group, &table, 0, HeldState::Waiting, "the follower has no such table").await?;
                    self.spool(group, *relation, encode_truncate(*relation, restart).into()).await?;
                }
            }
        }
        if names.is_empty() {
            return Ok(());
        }
        let sql = format!("TRUNCATE {}{}", names.join(", "), if restart { " RESTART IDENTITY" } else { "" });
        if let Err(reason) = self.run_in_savepoint(&[sql]).await? {
            for (relation, table) in live {
                self.hold(group, &table, 0, HeldState::Waiting, &reason).await?;
                self.spool(group, relation, encode_truncate(relation, restart).into()).await?;
            }
        }
        Ok(())
    }

    /// Does what somebody asked for, between two transactions.
    pub(super) async fn command(&mut self, command: Command) -> Result<(), CdcError> {
        // A reply that nobody waits for any more is no error.
        match command {
            Command::Approve { proposal, sql, who, reply } => {
                let result = self.approve(&proposal, sql.as_deref(), &who).await;
                let result = self.settle(result).await?;
                let _ = reply.send(result);
            }
            Command::Reject { proposal, who, reply } => {
                let result = self.reject(&proposal, &who).await;
                let result = self.settle(result).await?;
                let _ = reply.send(result);
            }
            Command::TakeBack { table, places, reply } => {
                let result = self.take_back(&table, &places).await;
                let result = self.settle(result).await?;
                let _ = reply.send(result);
            }
            Command::Release { table, reply } => {
                let result = self.release(&table).await;
                let result = self.settle(result).await?;
                let _ = reply.send(result);
            }
        }
        Ok(())
    }

    /// Leaves no transaction open behind a failed command. A broken connection ends the applier.
    async fn settle<T>(&mut self, result: Result<T, CdcError>) -> Result<Result<T, CdcError>, CdcError> {
        self.forget_plans();
        if result.is_err() {
            self.client.batch_execute("ROLLBACK").await.attempt("undo on the follower")?;
            self.load_held().await?;
        }
        Ok(result)
    }

    pub(super) async fn approve(&mut self, proposal: &Proposal, sql: Option<&str>, who: &str) -> Result<String, CdcError> {
        // It may have been decided, overtaken, or given other names by the stream while the request waited for its turn.
        let proposal = &self.shared.repository.proposal(proposal.id)?;
        approvable(proposal)?;
        let statements = sql.map_or_else(|| proposal.draft.sql.clone(), |sql| vec![sql.to_owned()]);
        let run = format!("run the statements of proposal {}", proposal.id);
        if let Some(sql) = sql {
            if approval::read(sql)? == approval::Given::Alone {
                return Err(CdcError::Setup(format!(
                    "proposal {} is carried out inside a transaction of the feed, where such a statement cannot run: run it on the follower by \
                     hand, then APPROVE {} AS 'SELECT 1'. Nothing was changed",
                    proposal.id, proposal.id
                )));
            }
            // People write names as they would in psql. First a trial: a typing error must not disturb anything.
            self.client.batch_execute(&format!("{BEGIN}; SET LOCAL search_path TO DEFAULT")).await.attempt("try the statements")?;
            let tried = self.client.batch_execute(sql).await;
            self.client.batch_execute("ROLLBACK").await.attempt("undo the trial")?;
            tried.attempt("run the statements as a trial (nothing was changed, the proposal waits on)")?;
        }
        // The decision is recorded elsewhere: a crash of the follower must not forget what it says was done.
        let begin = format!("{BEGIN}; SET LOCAL synchronous_commit = on");
        self.client.batch_execute(&begin).await.attempt("begin a transaction on the follower")?;
        if sql.is_some() {
            self.client.batch_execute("SET LOCAL search_path TO DEFAULT").await.attempt("set up a session")?;
        }
        let before = self.awaited_tables().await?;
        for statement in &statements {
            self.client.batch_execute(statement).await.attempt(&run)?;
        }
        self.client.batch_execute("SET LOCAL search_path TO pg_catalog").await.attempt("set up a session")?;
        self.forget_plans();
        let mut moved = before;
        for rename in statements.iter().filter_map(|sql| Rename::parse(sql)) {
            self.renamed(&rename).await?;
            moved = moved.into_iter().map(|table| self.renamed_name(&rename, &table).unwrap_or(table)).collect();
        }
        let there = self.awaited_tables().await?;
        let gone: Vec<TableName> = moved.into_iter().filter(|table| !there.contains(table)).collect();
        self.forget_spools(&gone).await?;
        let tables: Vec<TableName> = lock(&self.shared.held)
            .iter()
            .filter(|(table, _)| !gone.contains(table))
            .filter(|(_, held)| held.proposal == proposal.id && matches!(held.state, HeldState::Waiting | HeldState::Rejected))
            .map(|(table, _)| table.clone())
            .collect();
        // A table that the owner also rewrote is copied again now; its spool is replayed behind the copy.
        let (again, tables): (Vec<TableName>, Vec<TableName>) =
            tables.into_iter().partition(|table| lock(&self.shared.held).get(table).is_some_and(|held| held.recopy));
        for table in &again {
            self.ask_for_copy(table, Some(HeldState::Recopy)).await?;
        }
        let mut replayed = 0;
        for table in &tables {
            replayed += self.replay(table, Lsn::ZERO).await?;
        }
        self.client.batch_execute("COMMIT").await.attempt("commit on the follower")?;
        if sql.is_some() {
            // A SET among the statements must not outlive them: this session goes on applying rows.
            session::pin_writer(&self.client).await?;
        }
        self.let_go(&tables, proposal.id)?;
        self.let_go(&gone, proposal.id)?;
        self.supersede(&gone, proposal.id)?;
        self.shared.adapter.rebase_pending(&statements)?;
        if !again.is_empty() {
            self.shared.chores.notify_one();
        }
        let ran = statements.join(";\n");
        self.decide(proposal.id, ProposalState::Approved, who, &ran, "");
        let names: Vec<String> = tables.iter().map(|(schema, table)| format!("{schema}.{table}")).collect();
        self.shared.event(
            Severity::Info,
            "a proposal was approved and applied",
            serde_json::json!({"proposal": proposal.id, "by": who, "tables_released": names, "changes_replayed": replayed}),
        );
        Ok(ran)
    }

    /// Tables take their rows again. Questions about why they did not are no longer asked, but for the one that is being decided.
    fn let_go(&mut self, tables: &[TableName], but: i64) -> Result<(), CdcError> {
        let mut held = lock(&self.shared.held);
        for table in tables {
            held.remove(table);
        }
        // What is spooled from here on needs its shape again.
        self.spooled_shapes.clear();
        for question in self.open_proposals()? {
            if question.id != but && question.kind == HELD_KIND && tables.contains(&question.table) {
                self.decide(question.id, ProposalState::Superseded, "policy", "", "the table takes its rows again");
            }
        }
        Ok(())
    }

    async fn reject(&mut self, proposal: &Proposal, who: &str) -> Result<(), CdcError> {
        // As with an approval: a crash of the follower must not forget what is recorded as decided elsewhere.
        let begin = format!("{BEGIN}; SET LOCAL synchronous_commit = on");
        self.client.batch_execute(&begin).await.attempt("begin a transaction on the follower")?;
        self.client
            .execute(
                "UPDATE understudy.held_table SET state = 'rejected' WHERE feed = $1 AND proposal = $2",
                &[&self.shared.feed, &proposal.id],
            )
            .await
            .attempt("set a table aside for good")?;
        self.client.batch_execute("COMMIT").await.attempt("commit on the follower")?;
        let mut tables = Vec::new();
        for (table, held) in lock(&self.shared.held).iter_mut().filter(|(_, held)| held.proposal == proposal.id) {
            held.state = HeldState::Rejected;
            tables.push(format!("{}.{}", table.0, table.1));
        }
        self.decide(proposal.id, ProposalState::Rejected, who, "", "");
        if !tables.is_empty() {
            self.shared.event(
                Severity::Alert,
                "a rejected proposal leaves its table set aside for good: its changes go on being spooled on the follower \
                 (understudy.spool); APPROVE the proposal later, or leave the table out of the shadow",
                serde_json::json!({"proposal": proposal.id, "by": who, "tables": tables}),
            );
        }
        Ok(())
    }

    /// A table was copied again: replays what was spooled behind the copy and lets go of it.
    async fn release(&mut self, table: &TableName) -> Result<(), CdcError> {
        let since = lock(&self.shared.held).get(table).filter(|held| held.state == HeldState::Copied).map(|held| held.since);
        let Some(since) = since else { return Ok(()) };
        if self.shared.applied() < since {
            return Err(CdcError::Protocol("a table was to be released before its copy's position was reached".into()));
        }
        self.client.batch_execute(BEGIN).await.attempt("begin a transaction on the follower")?;
        self.forget_plans();
        let replayed = match self.replay(table, since).await {
            // It was changed again, perhaps back: the next copy finds it as it is then.
            Err(CdcError::OtherShape(_)) => {
                self.client.batch_execute("ROLLBACK").await.attempt("undo on the follower")?;
                return self.copy_again(table).await;
            }
            replayed => replayed?,
        };
        self.client.batch_execute("COMMIT").await.attempt("commit on the follower")?;
        self.let_go(std::slice::from_ref(table), 0)?;
        self.shared.event(
            Severity::Info,
            "a table was copied again and follows the stream",
            serde_json::json!({"table": format!("{}.{}", table.0, table.1), "lsn": since.to_string(), "changes_replayed": replayed}),
        );
        Ok(())
    }

    /// Applies what was spooled for a table by transactions whose commit record lies at or behind `since`, and forgets the spool
    /// and the hold, all in the open transaction. A change that still does not fit is an error: nothing is lost, all stays held.
    async fn replay(&mut self, table: &TableName, since: Lsn) -> Result<u64, CdcError> {
        let (mut shapes, mut position, mut count) = (HashMap::<u32, Shape>::new(), 0_i64, 0_u64);
        loop {
            let rows = self
                .client
                .query(
                    "SELECT seq, commit_lsn::text, change FROM understudy.spool
                     WHERE feed = $1 AND schema_name = $2 AND table_name = $3 AND seq > $4 ORDER BY seq LIMIT $5",
                    &[&self.shared.feed, &table.0, &table.1, &position, &REPLAY_ROWS],
                )
                .await
                .attempt("read spooled changes")?;
            for row in &rows {
                position = row.get(0);
                let commit = session::lsn(row.get(1))?;
                let message = Message::decode(&Bytes::copy_from_slice(row.get(2)))?;
                match &message {
                    Message::Relation(relation) => {
                        // Looked at when a row needs it: rows that the copy has already may have a shape that the table has lost.
                        shapes.insert(relation.oid, Shape::Sent(relation.clone()));
                    }
                    Message::Truncate { restart_identity, .. } if commit >= since => {
                        let restart = if *restart_identity { " RESTART IDENTITY" } else { "" };
                        let there = self.shared.spec.name_there(table);
                        let sql = format!("TRUNCATE {}{restart}", qualified(&there.0, &there.1));
                        self.client.batch_execute(&sql).await.attempt("replay a TRUNCATE")?;
                        count += 1;
                    }
                    Message::Insert { relation, .. } | Message::Update { relation, .. } | Message::Delete { relation, .. }
                        if commit >= since =>
                    {
                        let missing = || CdcError::Protocol("a spooled change of a table that was not described".into());
                        let plan = match shapes.get(relation).ok_or_else(missing)? {
                            Shape::Planned(plan) => Arc::clone(plan),
                            Shape::Sent(sent) => {
                                if self.misunderstood(sent, table).await? {
                                    return Err(CdcError::OtherShape(format!("{}.{}", table.0, table.1)));
                                }
                                let (sent, target) = self.fit(sent, table).await?;
                                let plan = Plan::new(&sent, target.as_ref()).map_err(|misfit| still_unfit(table, &misfit.to_string()))?;
                                let plan = Arc::new(plan);
                                shapes.insert(*relation, Shape::Planned(Arc::clone(&plan)));
                                plan
                            }
                        };
                        if let Outcome::Unfit(reason) = self.careful(&plan, &message, true).await? {
                            return Err(still_unfit(table, &reason));
                        }
                        count += 1;
                    }
                    _ => {}
                }
            }
            if rows.len() < REPLAY_ROWS as usize {
                break;
            }
        }
        self.forget_spools(std::slice::from_ref(table)).await?;
        Ok(count)
    }
}

/// What a person may still decide, or why not.
pub(super) fn approvable(proposal: &Proposal) -> Result<(), CdcError> {
    match proposal.state {
        ProposalState::Pending | ProposalState::Failed | ProposalState::Rejected => Ok(()),
        state => {
            let note = if proposal.note.is_empty() { String::new() } else { format!(": {}", proposal.note) };
            Err(CdcError::Setup(format!("proposal {} is already {}{note}. Nothing was changed", proposal.id, state.as_str())))
        }
    }
}

/// A relation of the spool.
enum Shape {
    Sent(Relation),
    Planned(Arc<Plan>),
}

fn still_unfit(table: &TableName, reason: &str) -> CdcError {
    CdcError::Setup(format!(
        "the changes spooled for {}.{} still do not fit: {reason}. Nothing was changed and the table stays set aside; approve with other \
         statements",
        table.0, table.1
    ))
}
