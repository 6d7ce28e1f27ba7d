//! A batch of changes on its way to the follower: folded into sets, or pipelined change by change; when anything about it is not as
//! expected, undone to its savepoint and done again in smaller parts, at last one by one ([`super::rows`]).

use super::{
    CdcError,
    applier::{Applier, BEGIN, Group},
    error::{Attempt, Blame, blame},
    fold::{Kind, Step, fold, tuple},
    pgoutput::Message,
    plan::Misfit,
    rows::statement_of,
    session::Text,
    shared::{TableName, lock},
};
use crate::lsn::Lsn;
use bytes::Bytes;
use futures_util::{SinkExt as _, poll};
use std::{
    collections::HashSet,
    pin::{Pin, pin},
    task::Poll,
};

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

impl Applier {
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
                    Kind::Insert if rows.len() >= COPY_ROWS_MIN && plan.takes_copy() => {
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
}
