//! Single row changes on the follower: what the target table is, and one change done carefully, so that the one row or table at
//! fault is found and the rest goes on.

use super::{
    CdcError, Direction,
    applier::{Applier, Group},
    batch::Pending,
    error::{Attempt, Blame, blame, describe},
    pgoutput::{Message, Tuple},
    plan::{Misfit, Plan, Statement, TargetColumn, TargetTable},
    session::Text,
    shared::{HeldState, TableName, lock},
};
use crate::{lsn::Lsn, metadata::Severity};
use bytes::Bytes;
use std::sync::{Arc, atomic::Ordering};

/// Prepared statements kept: an update has one for each set of columns that were sent. Beyond it all are dropped.
const STATEMENTS_MAX: usize = 2_000;

/// What became of one change.
pub(super) enum Outcome {
    Done,
    /// The table cannot take it, and why (without row values).
    Unfit(String),
}

const SPOOL: &str = "INSERT INTO understudy.spool (feed, schema_name, table_name, commit_lsn, change)
    VALUES ($1::text, $2::text, $3::text, $4::pg_lsn, $5::bytea)";

/// The statement of a row change; `None`: nothing to do.
pub(super) fn statement_of(plan: &Plan, message: &Message) -> Result<Option<Statement>, Misfit> {
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
        self.passed_over.clear();
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
            let column = TargetColumn {
                type_name: row.get(1),
                generated: row.get(2),
                identity_always: row.get(3),
                listable: row.get(5),
                using: None,
            };
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
        let Some((shape, _)) = self.relations.get(&relation) else {
            return Err(CdcError::Protocol("a change of a table that was not described".into()));
        };
        let (shape, mut target) = self.fit(&shape.clone(), table).await?;
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
            table_there.columns.insert(
                name.clone(),
                TargetColumn { type_name: "text".into(), generated: true, identity_always: false, listable: true, using: None },
            );
            fitted = Plan::new(&shape, target.as_ref());
        }
        let mut plan = fitted.map(Arc::new);
        if plan.is_ok()
            && let Some((sent, _)) = self.relations.get(&relation)
            && self.misunderstood(sent, table).await?
        {
            plan = Err(Misfit::Ahead);
        }
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

    pub(super) fn spool_statement(&self, table: &TableName, commit: Lsn, raw: &[u8]) -> Statement {
        let parameters = vec![text(&self.shared.feed), text(&table.0), text(&table.1), text(&commit.to_string()), Text(Some(hex(raw)))];
        (SPOOL.to_owned(), parameters)
    }

    pub(super) async fn one_by_one(&mut self, group: &mut Group, pending: &Pending) -> Result<(), CdcError> {
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
                    let believed = !self.shared.polled.load(Ordering::Acquire);
                    match self.careful(&plan, message, believed).await? {
                        Outcome::Done => return Ok(()),
                        Outcome::Unfit(reason) => self.hold(group, &table, 0, HeldState::Waiting, &reason).await?,
                    }
                }
                self.spool_now(group, relation, raw).await
            }
        }
    }

    /// One change under its own savepoint. A row that is missing or already there is a finding, and put right; unless what is known of
    /// the owner's schema is not `believed`: then it may come of a change that the next look finds, and sets its table aside.
    pub async fn careful(&mut self, plan: &Plan, message: &Message, believed: bool) -> Result<Outcome, CdcError> {
        let table = (plan.relation.schema.clone(), plan.relation.name.clone());
        let tried = match statement_of(plan, message) {
            Ok(Some(statement)) => self.attempt(statement).await?,
            Ok(None) => return Ok(Outcome::Done),
            Err(misfit) => return Ok(Outcome::Unfit(misfit.to_string())),
        };
        match (tried, message) {
            (Tried::Rows(0), Message::Update { .. } | Message::Delete { .. }) if !believed => {
                Ok(Outcome::Unfit("a row that the owner changed is not there".to_owned()))
            }
            (Tried::Duplicate(reason), _) if !believed => Ok(Outcome::Unfit(reason)),
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
