//! Row changes on the follower: a batch folded into sets, or pipelined change by change; when anything about it is not as expected,
//! undone to its savepoint and done again in smaller parts, at last one by one, so that the one row or table at fault is found and
//! the rest goes on.

use super::{
    CdcError, Direction,
    applier::{Applier, BEGIN, Group},
    error::{Attempt, Blame, blame, describe},
    fold::{Kind, Step, fold, tuple},
    pgoutput::{Message, Tuple},
    plan::{Misfit, Plan, Statement, TargetColumn, TargetTable},
    session::Text,
    shared::{HeldState, TableName, lock},
};
use crate::{lsn::Lsn, metadata::Severity};
use bytes::Bytes;
use futures_util::{SinkExt as _, poll};
use std::{
    collections::HashSet,
    pin::{Pin, pin},
    sync::Arc,
    task::Poll,
};

/// Prepared statements kept: an update has one for each set of columns that were sent. Beyond it all are dropped.
const STATEMENTS_MAX: usize = 2_000;

/// What each change costs in a batch besides its bytes.
const CHANGE_BYTES: usize = 128;

/// Changes in a batch from which it is folded. Fewer go out one by one, in the shortest time.
const FOLD_CHANGES_MIN: usize = 48;

/// Bytes of a batch up to which it is folded: a batch is larger only through a single huge row, whose array (each character
/// perhaps escaped) could exceed the 1 GB that the server takes.
const FOLD_BYTES_MAX: usize = 16 << 20;

/// Changes that go out one by one in one go, so that few are done again carefully when one of them is not as expected.
const CAREFUL_CHANGES_MAX: usize = 512;

/// Rows from which COPY, which costs a round trip of its own, beats a statement with arrays.
const COPY_ROWS_MIN: usize = 48;

/// COPY data in one message.
const COPY_PART_BYTES: usize = 256 << 10;

/// One thing to do on the follower.
#[derive(Clone, Debug)]
pub(super) enum Pending {
    /// Apply a row change.
    Row { relation: u32, message: Message, raw: Bytes },
    /// Keep it for later.
    Spool { table: TableName, commit: Lsn, raw: Bytes },
}

impl Pending {
    pub fn bytes(&self) -> usize {
        let (Pending::Row { raw, .. } | Pending::Spool { raw, .. }) = self;
        CHANGE_BYTES + raw.len()
    }

    fn relation(&self) -> Option<u32> {
        match self {
            Pending::Row { relation, .. } => Some(*relation),
            Pending::Spool { .. } => None,
        }
    }
}

/// What goes to the follower.
enum Action {
    /// `rows`: how many it must concern; `None`: at least one.
    Execute { sql: String, parameters: Vec<Text>, rows: Option<u64> },
    /// Rows to be added.
    Copy { sql: String, data: Bytes, rows: u64 },
}

type Answer = Result<u64, tokio_postgres::Error>;
type Sent<'a> = Pin<Box<dyn Future<Output = Answer> + Send + 'a>>;

async fn copy_in(client: &tokio_postgres::Client, statement: &tokio_postgres::Statement, mut data: Bytes) -> Answer {
    let mut sink = pin!(client.copy_in::<_, Bytes>(statement).await?);
    while !data.is_empty() {
        let part = data.split_to(data.len().min(COPY_PART_BYTES));
        sink.as_mut().send(part).await?;
    }
    sink.as_mut().finish().await
}

/// What became of one change.
pub(super) enum Outcome {
    Done,
    /// The table cannot take it, and why (without row values).
    Unfit(String),
}

/// Why a batch must be done again one by one.
enum Redo {
    /// Never mind why: the careful way finds out.
    Careful,
    /// It cannot be done now.
    Give(CdcError),
}

impl From<Misfit> for Redo {
    fn from(_: Misfit) -> Self {
        Redo::Careful
    }
}

const SPOOL: &str = "INSERT INTO understudy.spool (feed, schema_name, table_name, commit_lsn, change)
    VALUES ($1::text, $2::text, $3::text, $4::pg_lsn, $5::bytea)";

/// The statement of a row change; `None`: nothing to do.
fn statement_of(plan: &Plan, message: &Message) -> Result<Option<Statement>, Misfit> {
    match message {
        Message::Insert { new, .. } => plan.insert(new).map(Some),
        Message::Update { old, new, .. } => plan.update(old.as_ref(), new),
        Message::Delete { old, .. } => plan.delete(old).map(Some),
        _ => Ok(None),
    }
}

/// `\x…`, the text form of a bytea.
fn hex(bytes: &[u8]) -> Bytes {
    let mut text = String::with_capacity(bytes.len() * 2 + 2);
    text.push_str("\\x");
    for byte in bytes {
        for digit in [byte >> 4, byte & 15] {
            text.push(char::from_digit(u32::from(digit), 16).unwrap_or('0'));
        }
    }
    Bytes::from(text)
}

fn text(value: &str) -> Text {
    Text(Some(Bytes::copy_from_slice(value.as_bytes())))
}

impl Applier {
    /// A prepared statement, from the cache.
    pub async fn prepared(&mut self, sql: &str) -> Result<tokio_postgres::Statement, CdcError> {
        if let Some(statement) = self.statements.get(sql) {
            return Ok(statement.clone());
        }
        let statement = self.client.prepare(sql).await.attempt("prepare a statement on the follower")?;
        if self.statements.len() >= STATEMENTS_MAX {
            self.statements.clear();
        }
        self.statements.insert(sql.to_owned(), statement.clone());
        Ok(statement)
    }

    /// What is known about the target may be stale.
    pub fn forget_plans(&mut self) {
        self.plans.clear();
        self.statements.clear();
        self.client.clear_type_cache();
    }

    /// The follower's table as it is now, seen by the applier's own transaction.
    pub async fn target_table(&self, table: &TableName) -> Result<Option<TargetTable>, CdcError> {
        let what = "read the follower's table";
        let rows = self
            .client
            .query(
                "SELECT a.attname::text, format_type(a.atttypid, -1), a.attgenerated <> '', a.attidentity = 'a', c.relkind = 'p',
                        coalesce(t.typarray <> 0 AND t.typcategory <> 'A' AND t.typdelim = ',', false), c.relrowsecurity
                        OR EXISTS (SELECT FROM pg_trigger g WHERE g.tgrelid IN (SELECT c.oid UNION SELECT relid FROM pg_partition_tree(c.oid))
                                     AND g.tgenabled IN ('A', 'R') AND NOT g.tgisinternal)
                        OR EXISTS (SELECT FROM pg_rewrite r WHERE r.ev_class = c.oid AND r.ev_enabled IN ('A', 'R'))
                 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                 LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
                 LEFT JOIN pg_type t ON t.oid = a.atttypid
                 WHERE n.nspname = $1 AND c.relname = $2 AND c.relkind IN ('r', 'p')",
                &[&table.0, &table.1],
            )
            .await
            .attempt(what)?;
        let Some(first) = rows.first() else { return Ok(None) };
        let mut target = TargetTable { partitioned: first.get(4), watched: first.get(6), ..TargetTable::default() };
        for row in &rows {
            let Some(name) = row.get::<_, Option<String>>(0) else { continue };
            let column = TargetColumn { type_name: row.get(1), generated: row.get(2), identity_always: row.get(3), listable: row.get(5) };
            target.columns.insert(name, column);
        }
        let key = self
            .client
            .query(
                "SELECT a.attname::text FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid JOIN pg_namespace n ON n.oid = c.relnamespace
                 CROSS JOIN LATERAL unnest(i.indkey::int2[]) WITH ORDINALITY k (attnum, position)
                 JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
                 WHERE n.nspname = $1 AND c.relname = $2 AND i.indisprimary AND i.indimmediate AND k.position <= i.indnkeyatts ORDER BY k.position",
                &[&table.0, &table.1],
            )
            .await
            .attempt(what)?;
        target.primary_key = key.iter().map(|row| row.get(0)).collect();
        let unique = self
            .client
            .query(
                "SELECT CASE WHEN i.indimmediate AND i.indpred IS NULL AND i.indexprs IS NULL AND NOT i.indisexclusion THEN
                          ARRAY(SELECT a.attname::text FROM unnest(i.indkey::int2[]) WITH ORDINALITY k (attnum, position)
                                JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum WHERE k.position <= i.indnkeyatts)
                        ELSE '{}' END
                 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                 JOIN pg_index i ON i.indrelid IN (SELECT c.oid UNION SELECT relid FROM pg_partition_tree(c.oid))
                 WHERE n.nspname = $1 AND c.relname = $2 AND (i.indisunique OR i.indisexclusion)",
                &[&table.0, &table.1],
            )
            .await
            .attempt(what)?;
        target.unique = unique.iter().map(|row| row.get(0)).collect();
        Ok(Some(target))
    }

    /// The plan of a relation, or why there is none.
    pub async fn try_plan(&mut self, relation: u32, table: &TableName) -> Result<Result<Arc<Plan>, Misfit>, CdcError> {
        if let Some(plan) = self.plans.get(&relation) {
            return Ok(Ok(Arc::clone(plan)));
        }
        let target = self.target_table(table).await?;
        let Some((shape, _)) = self.relations.get(&relation) else {
            return Err(CdcError::Protocol("a change of a table that was not described".into()));
        };
        let (shape, mut target) = (shape.clone(), target);
        let mut fitted = Plan::new(&shape, target.as_ref());
        while let (Direction::Reverse, Err(Misfit::NoColumn(name)), Some(table_there)) =
            (self.shared.spec.direction, &fitted, target.as_mut())
        {
            // On the way back the source's schema rules: what only the shadow had before the cutover stays there. A column
            // that the engine does not know yet is another matter: its message is still to come.
            if !self.shared.adapter.knows_column(&table.0, &table.1, name).await? {
                break;
            }
            let message = format!(
                "column {name} of {}.{} exists only on {}: on the way back its values are left out, and a rollback does without them",
                table.0, table.1, self.shared.spec.shadow
            );
            self.shared.event(
                Severity::Warning,
                &message,
                serde_json::json!({"table": format!("{}.{}", table.0, table.1), "column": name}),
            );
            table_there
                .columns
                .insert(name.clone(), TargetColumn { type_name: "text".into(), generated: true, identity_always: false, listable: true });
            fitted = Plan::new(&shape, target.as_ref());
        }
        let plan = fitted.map(Arc::new);
        if let Ok(plan) = &plan {
            self.plans.insert(relation, Arc::clone(plan));
        }
        Ok(plan)
    }

    /// The plan of a relation; `None`: it does not fit and is now held.
    pub async fn plan(&mut self, group: &mut Group, relation: u32, table: &TableName) -> Result<Option<Arc<Plan>>, CdcError> {
        match self.try_plan(relation, table).await? {
            Ok(plan) => Ok(Some(plan)),
            Err(misfit) => {
                self.hold(group, table, 0, HeldState::Waiting, &misfit.to_string()).await?;
                Ok(None)
            }
        }
    }

    /// Sends the batch: folded when it is long, else change by change. What does not go as it should is undone and done again in
    /// smaller parts, down to single rows.
    pub async fn flush(&mut self, group: &mut Group) -> Result<(), CdcError> {
        if group.batch.is_empty() {
            return Ok(());
        }
        let batch = std::mem::take(&mut group.batch);
        let bytes = std::mem::take(&mut group.batch_bytes);
        if batch.len() >= FOLD_CHANGES_MIN && bytes <= FOLD_BYTES_MAX {
            let folded = fold(&batch, |relation| self.plans.get(&relation).cloned());
            if let Ok(steps) = folded
                && self.send(group, &batch, &steps).await?
            {
                return Ok(());
            }
        }
        for part in batch.chunks(CAREFUL_CHANGES_MAX) {
            let steps: Vec<Step> = (0..part.len()).map(Step::One).collect();
            // A table that was set aside by the part before keeps its order: what is left of it goes behind its spool.
            if self.concerns_held(part)? || !self.send(group, part, &steps).await? {
                self.begin(group).await?;
                for pending in part {
                    self.one_by_one(group, pending).await?;
                }
            }
        }
        Ok(())
    }

    fn concerns_held(&self, part: &[Pending]) -> Result<bool, CdcError> {
        if lock(&self.shared.held).is_empty() {
            return Ok(false);
        }
        let relations: HashSet<u32> = part.iter().filter_map(Pending::relation).collect();
        for relation in relations {
            let table = self.table_of(relation)?;
            if lock(&self.shared.held).contains_key(&table) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Sends steps in one go; `false`: something was not as expected, and all of them are undone.
    async fn send(&mut self, group: &mut Group, batch: &[Pending], steps: &[Step]) -> Result<bool, CdcError> {
        let first = !group.begun;
        if !first {
            self.client.batch_execute("SAVEPOINT understudy_batch").await.attempt("set a savepoint on the follower")?;
        }
        match self.pipeline(batch, steps, first).await {
            Ok(()) => {
                group.begun = true;
                if !first {
                    self.client.batch_execute("RELEASE SAVEPOINT understudy_batch").await.attempt("release a savepoint")?;
                }
                return Ok(true);
            }
            Err(Redo::Give(error)) => return Err(error),
            Err(Redo::Careful) => {}
        }
        let undo = if first { "ROLLBACK" } else { "ROLLBACK TO SAVEPOINT understudy_batch" };
        self.client.batch_execute(undo).await.attempt("undo a batch on the follower")?;
        self.forget_plans();
        // The next part needs them again; a table that no longer fits is met in its careful turn.
        let relations: HashSet<u32> = batch.iter().filter_map(Pending::relation).collect();
        for relation in relations {
            let table = self.table_of(relation)?;
            let _ = self.try_plan(relation, &table).await?;
        }
        Ok(false)
    }

    /// What a step sends, and what must come back.
    fn action(&self, batch: &[Pending], step: &Step) -> Result<Option<Action>, Redo> {
        match step {
            Step::One(at) => match batch.get(*at) {
                Some(Pending::Row { relation, message, .. }) => {
                    let Some(plan) = self.plans.get(relation) else { return Err(Redo::Careful) };
                    let statement = statement_of(plan, message)?;
                    Ok(statement.map(|(sql, parameters)| Action::Execute { sql, parameters, rows: None }))
                }
                Some(Pending::Spool { table, commit, raw }) => {
                    let (sql, parameters) = self.spool_statement(table, *commit, raw);
                    Ok(Some(Action::Execute { sql, parameters, rows: None }))
                }
                None => Err(Redo::Careful),
            },
            Step::Set { plan, kind, rows } => {
                let count = rows.len() as u64;
                let tuples = rows.iter().filter_map(|row| tuple(batch, row));
                let (many, expected) = match kind {
                    Kind::Insert if rows.len() >= COPY_ROWS_MIN => {
                        let many = plan.copy_many();
                        return Ok(Some(Action::Copy { data: many.lines(tuples), sql: many.sql, rows: count }));
                    }
                    Kind::Insert => (plan.insert_many(), count),
                    Kind::Delete => (plan.delete_many(), count),
                    Kind::Absent => (plan.delete_many(), 0),
                    Kind::Update(kept) => match plan.update_many(kept) {
                        Some(many) => (many, count),
                        None => return Ok(None),
                    },
                };
                Ok(Some(Action::Execute { parameters: many.arrays(tuples), sql: many.sql, rows: Some(expected) }))
            }
        }
    }

    /// Sends all steps, then looks at the answers.
    async fn pipeline(&mut self, batch: &[Pending], steps: &[Step], first: bool) -> Result<(), Redo> {
        let mut actions = Vec::with_capacity(steps.len());
        for step in steps {
            let Some(action) = self.action(batch, step)? else { continue };
            let (Action::Execute { sql, .. } | Action::Copy { sql, .. }) = &action;
            let statement = match self.prepared(sql).await {
                Ok(statement) => statement,
                Err(CdcError::Postgres { source, .. }) if blame(&source) != Blame::Moment => return Err(Redo::Careful),
                Err(error) => return Err(Redo::Give(error)),
            };
            actions.push((statement, action));
        }
        let give = |source| Redo::Give(CdcError::Postgres { what: "apply changes on the follower".into(), source });
        // Each is polled once, in order, which sends it; the answers are awaited afterwards.
        let mut begin = first.then(|| Box::pin(self.client.batch_execute(BEGIN)));
        let early = match &mut begin {
            Some(begin) => match poll!(begin.as_mut()) {
                Poll::Ready(result) => Some(result),
                Poll::Pending => None,
            },
            None => None,
        };
        let mut sent: Vec<(Sent<'_>, Option<Answer>, Option<u64>)> = Vec::with_capacity(actions.len());
        let mut verdict = Ok(());
        for (statement, action) in &actions {
            let (mut future, expected): (Sent<'_>, _) = match action {
                Action::Execute { parameters, rows, .. } => {
                    (Box::pin(self.client.execute_raw(statement, parameters.iter().cloned())), *rows)
                }
                Action::Copy { data, rows, .. } => (Box::pin(copy_in(&self.client, statement, data.clone())), Some(*rows)),
            };
            let early = match (poll!(future.as_mut()), action) {
                (Poll::Ready(answer), _) => Some(answer),
                (Poll::Pending, Action::Execute { .. }) => None,
                // Rows of a COPY go out only when the server has asked for them, and before the next statement.
                (Poll::Pending, Action::Copy { .. }) => Some(future.as_mut().await),
            };
            let failed = matches!(early, Some(Err(_)));
            sent.push((future, early, expected));
            if failed {
                break;
            }
        }
        if let Some(begin) = begin {
            match early {
                Some(result) => result.map_err(give)?,
                None => begin.await.map_err(give)?,
            }
        }
        // All answers are awaited, also behind an error: the next statement must not meet a pipeline in flight.
        for (future, early, expected) in sent {
            let answer = match early {
                Some(answer) => answer,
                None => future.await,
            };
            match answer {
                Ok(rows) if verdict.is_ok() && expected.map_or(rows == 0, |expected| rows != expected) => verdict = Err(Redo::Careful),
                Ok(_) => {}
                Err(_) if verdict.is_err() => {}
                Err(source) => {
                    verdict = Err(if blame(&source) == Blame::Moment { give(source) } else { Redo::Careful });
                }
            }
        }
        verdict
    }

    fn spool_statement(&self, table: &TableName, commit: Lsn, raw: &[u8]) -> Statement {
        let parameters = vec![text(&self.shared.feed), text(&table.0), text(&table.1), text(&commit.to_string()), Text(Some(hex(raw)))];
        (SPOOL.to_owned(), parameters)
    }

    async fn one_by_one(&mut self, group: &mut Group, pending: &Pending) -> Result<(), CdcError> {
        match pending {
            Pending::Spool { table, commit, raw } => {
                let (sql, parameters) = self.spool_statement(table, *commit, raw);
                self.client.execute_raw(&sql, parameters).await.attempt("spool a change on the follower").map(|_| ())
            }
            Pending::Row { relation, message, raw } => {
                let (relation, table) = (*relation, self.table_of(*relation)?);
                if !lock(&self.shared.held).contains_key(&table)
                    && let Some(plan) = self.plan(group, relation, &table).await?
                {
                    match self.careful(&plan, message).await? {
                        Outcome::Done => return Ok(()),
                        Outcome::Unfit(reason) => self.hold(group, &table, 0, HeldState::Waiting, &reason).await?,
                    }
                }
                self.spool_now(group, relation, raw).await
            }
        }
    }

    /// One change under its own savepoint. A row that is missing or already there is a finding, and put right.
    pub async fn careful(&mut self, plan: &Plan, message: &Message) -> Result<Outcome, CdcError> {
        let table = (plan.relation.schema.clone(), plan.relation.name.clone());
        let tried = match statement_of(plan, message) {
            Ok(Some(statement)) => self.attempt(statement).await?,
            Ok(None) => return Ok(Outcome::Done),
            Err(misfit) => return Ok(Outcome::Unfit(misfit.to_string())),
        };
        match (tried, message) {
            (Tried::Rows(0), Message::Update { old, new, .. }) => {
                let shared = Arc::clone(&self.shared);
                shared.finding(&table, &plan.key_text(old.as_ref().unwrap_or(new)), "an updated row was missing");
                match plan.whole(old.as_ref(), new) {
                    Some(row) => self.put_right(plan, &row).await,
                    // The value that was not sent is nowhere in the stream: VERIFY … REPAIR brings the row.
                    None => Ok(Outcome::Done),
                }
            }
            (Tried::Rows(0), Message::Delete { old, .. }) => {
                self.shared.finding(&table, &plan.key_text(old), "a deleted row was missing");
                Ok(Outcome::Done)
            }
            (Tried::Rows(_), _) => Ok(Outcome::Done),
            (Tried::Duplicate(reason), Message::Insert { new, .. }) => {
                if !plan.keyed() {
                    return Ok(Outcome::Unfit(reason));
                }
                self.shared.finding(&table, &plan.key_text(new), "an inserted row was already there");
                self.overwrite(plan, new, reason).await
            }
            (Tried::Duplicate(reason) | Tried::Unfit(reason), _) => Ok(Outcome::Unfit(reason)),
        }
    }

    /// Inserts a row that should have been there.
    async fn put_right(&mut self, plan: &Plan, row: &Tuple) -> Result<Outcome, CdcError> {
        let statement = match plan.insert(row) {
            Ok(statement) => statement,
            Err(misfit) => return Ok(Outcome::Unfit(misfit.to_string())),
        };
        match self.attempt(statement).await? {
            Tried::Rows(_) => Ok(Outcome::Done),
            Tried::Duplicate(reason) if plan.keyed() => self.overwrite(plan, row, reason).await,
            Tried::Duplicate(reason) | Tried::Unfit(reason) => Ok(Outcome::Unfit(reason)),
        }
    }

    /// Gives the row with this key these values. If there is none, another unique index was hit: not ours to put right.
    async fn overwrite(&mut self, plan: &Plan, row: &Tuple, reason: String) -> Result<Outcome, CdcError> {
        let statement = match plan.update(None, row) {
            Ok(Some(statement)) => statement,
            Ok(None) => return Ok(Outcome::Done),
            Err(misfit) => return Ok(Outcome::Unfit(misfit.to_string())),
        };
        match self.attempt(statement).await? {
            Tried::Rows(0) => Ok(Outcome::Unfit(reason)),
            Tried::Rows(_) => Ok(Outcome::Done),
            Tried::Duplicate(reason) | Tried::Unfit(reason) => Ok(Outcome::Unfit(reason)),
        }
    }

    async fn attempt(&mut self, (sql, parameters): Statement) -> Result<Tried, CdcError> {
        self.client.batch_execute("SAVEPOINT understudy_row").await.attempt("set a savepoint on the follower")?;
        let result = match self.prepared(&sql).await {
            Ok(statement) => self.client.execute_raw(&statement, parameters).await,
            Err(CdcError::Postgres { source, .. }) => Err(source),
            Err(error) => return Err(error),
        };
        let (end, tried) = match result {
            Ok(rows) => ("RELEASE SAVEPOINT understudy_row", Tried::Rows(rows)),
            Err(source) => {
                let reason = describe(&source);
                let tried = match blame(&source) {
                    Blame::Moment => return Err(CdcError::Postgres { what: "apply a change on the follower".into(), source }),
                    Blame::Duplicate => Tried::Duplicate(reason),
                    Blame::Table => Tried::Unfit(reason),
                };
                ("ROLLBACK TO SAVEPOINT understudy_row", tried)
            }
        };
        self.client.batch_execute(end).await.attempt("end a savepoint on the follower")?;
        Ok(tried)
    }
}

enum Tried {
    Rows(u64),
    Duplicate(String),
    Unfit(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_bytea_text() {
        assert_eq!(&hex(&[0, 0x7f, 0xff])[..], b"\\x007fff");
    }
}
