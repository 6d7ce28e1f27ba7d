//! What goes on beside the applier while a feed streams: making progress durable before the owner may forget it, heartbeats for
//! those who wait, sequences, statements that must run outside a transaction, tables that must be copied again.

use super::{
    CdcError,
    applier::Command,
    copy, copy_schema,
    error::{Attempt, Blame, blame, describe},
    mapped,
    names::{ident, qualified},
    poll, sequences, session,
    shared::{HeldState, Shared, TableName, lock},
};
use crate::{
    lsn::Lsn,
    metadata::{Proposal, ProposalState, Severity},
    schema::{capture, plan::ddl},
};
use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{sync::oneshot, task::JoinSet, time::sleep};
use tokio_postgres::error::SqlState;

/// How often the follower's progress is made durable and the owner told what it may forget.
const CONFIRM_PERIOD: Duration = Duration::from_millis(500);

/// How often sequences are looked at.
const SEQUENCE_PERIOD: Duration = Duration::from_secs(2);

/// Between two heartbeats: each is a commit on the owner.
const HEARTBEAT_PERIOD: Duration = Duration::from_millis(20);

/// How often chores are looked for when nobody says there are any.
const CHORE_PERIOD: Duration = Duration::from_secs(5);

/// Messages that are rows have been said as soon as they are committed.
const FORGET_MESSAGES: &str = "DELETE FROM understudy.message WHERE id < (SELECT max(id) FROM understudy.message)";

/// Before something that failed is tried again.
const RETRY_PAUSE: Duration = Duration::from_secs(2);

/// Starts them all; they end when the set is dropped. The first to end brings the feed to reconnect.
pub(super) fn start(shared: &Arc<Shared>) -> JoinSet<Result<(), CdcError>> {
    let mut tasks = JoinSet::new();
    tasks.spawn(confirm(Arc::clone(shared)));
    tasks.spawn(heartbeat(Arc::clone(shared)));
    tasks.spawn(keep_sequences_ahead(Arc::clone(shared)));
    tasks.spawn(run_deferred(Arc::clone(shared)));
    tasks.spawn(copy_again(Arc::clone(shared)));
    tasks.spawn(poll::follow(Arc::clone(shared)));
    tasks.spawn(analyze(Arc::clone(shared)));
    tasks
}

/// Statistics of what a copy has brought. Lost with the process, they come with autovacuum.
async fn analyze(shared: Arc<Shared>) -> Result<(), CdcError> {
    if shared.analyze.swap(false, Ordering::AcqRel) {
        let follower = session::connect(&shared.spec.to, "copy statistics").await?;
        if let Err(error) = copy_schema::analyze(&shared, &follower).await {
            tracing::warn!(feed = shared.feed, %error, "statistics of the copied tables are left to autovacuum");
        }
    }
    std::future::pending().await
}

/// The applier commits without waiting for the disk. Before the owner may forget a position, one synchronous commit behind it
/// makes everything up to it durable; the position is stored in that commit, so that a slot that is ahead of the follower (which was
/// set back to a backup, say) is noticed.
async fn confirm(shared: Arc<Shared>) -> Result<(), CdcError> {
    let follower = session::connect_writer(&shared.spec.to, "feed progress").await?;
    follower.batch_execute("SET synchronous_commit = on").await.attempt("set up a session")?;
    let statement = follower
        .prepare(
            "INSERT INTO understudy.confirmed (feed, lsn) VALUES ($1, $2::text::pg_lsn)
             ON CONFLICT (feed) DO UPDATE SET lsn = greatest(confirmed.lsn, excluded.lsn)",
        )
        .await
        .attempt("prepare a statement on the follower")?;
    loop {
        sleep(CONFIRM_PERIOD).await;
        let applied = shared.applied();
        if applied > shared.confirmed.load() {
            follower.execute(&statement, &[&shared.feed, &applied.to_string()]).await.attempt("store the progress")?;
            shared.confirmed.advance(applied);
            shared.wake.notify_one();
        }
    }
}

/// The stream carries only what the owner has written to disk; the end of an idle owner's WAL may stay in memory for seconds. A
/// small synchronous commit brings it out.
async fn heartbeat(shared: Arc<Shared>) -> Result<(), CdcError> {
    let owner = session::connect(&shared.spec.from, "feed heartbeat").await?;
    owner.batch_execute("SET synchronous_commit = local").await.attempt("set up a session")?;
    loop {
        shared.nudge.notified().await;
        owner
            .batch_execute("SELECT pg_catalog.pg_logical_emit_message(true, 'understudy.heartbeat', '')")
            .await
            .attempt("send a heartbeat")?;
        shared.wake.notify_one();
        sleep(HEARTBEAT_PERIOD).await;
    }
}

async fn keep_sequences_ahead(shared: Arc<Shared>) -> Result<(), CdcError> {
    let owner = session::connect(&shared.spec.from, "feed sequences").await?;
    let follower = session::connect_writer(&shared.spec.to, "feed sequences").await?;
    let mut warned = false;
    let says_by_rows = capture::Way::of(session::version(&owner).await?) == capture::Way::Rows;
    loop {
        sleep(SEQUENCE_PERIOD).await;
        if says_by_rows {
            owner.batch_execute(FORGET_MESSAGES).await.attempt("forget old messages on the owner")?;
        }
        if !shared.is_streaming() {
            continue;
        }
        match sequences::advance(&owner, &follower, &shared.spec).await {
            Ok(_) => warned = false,
            Err(error) if owner.is_closed() || follower.is_closed() => return Err(error),
            Err(error) => {
                // A sequence dropped in between is gone in the next round.
                if warned {
                    tracing::debug!(%error, "sequences are not kept ahead");
                } else {
                    warned = true;
                    let data = serde_json::json!({"reason": error.to_string()});
                    shared.event(Severity::Warning, "the follower's sequences are not kept ahead; tried again", data);
                }
            }
        }
    }
}

/// How often statements are tried whose object is not there: a rename may not have been committed yet.
const DEFERRED_ATTEMPTS: u32 = 4;

/// Statements stored by the applier, such as CREATE INDEX CONCURRENTLY. Each is forgotten only when it is done or has failed.
async fn run_deferred(shared: Arc<Shared>) -> Result<(), CdcError> {
    let follower = session::connect_writer(&shared.spec.to, "feed deferred").await?;
    let mut attempts: HashMap<i64, u32> = HashMap::new();
    loop {
        let rows = follower
            .query("SELECT id, proposal, statements FROM understudy.deferred WHERE feed = $1 ORDER BY id", &[&shared.feed])
            .await
            .attempt("read stored statements")?;
        let mut again = false;
        for row in &rows {
            let (id, proposal, stored): (i64, i64, Vec<String>) = (row.get(0), row.get(1), row.get(2));
            let statements = match shared.repository.proposal(proposal) {
                // Decided before a crash, or by a person before the statements were stored.
                Ok(decided) if decided.state != ProposalState::Pending => {
                    forget(&follower, id).await?;
                    continue;
                }
                // Renames of the owner are followed there.
                Ok(proposal) if proposal.draft.kind == "create_index" => as_it_is_now(&shared, proposal).await?,
                Ok(proposal) => proposal.draft.sql,
                Err(_) => stored,
            };
            let sql = statements.join(";\n");
            let mut result = Ok(());
            for statement in &statements {
                result = follower.batch_execute(statement).await;
                if result.is_err() {
                    break;
                }
            }
            let (state, note) = match &result {
                Ok(()) if dropped_meanwhile(&shared, proposal).await? => {
                    undo_half(&shared, &follower, proposal).await;
                    (ProposalState::Superseded, "the owner dropped or renamed it meanwhile".to_owned())
                }
                Ok(()) => (ProposalState::AutoApplied, String::new()),
                Err(error) if follower.is_closed() => {
                    return Err(CdcError::Protocol(format!("the follower went away: {}", describe(error))));
                }
                Err(error) if is_missing(error) => {
                    let tried = attempts.entry(id).or_default();
                    *tried += 1;
                    if *tried < DEFERRED_ATTEMPTS {
                        again = true;
                        continue;
                    }
                    validate_renamed(&shared, &follower).await?;
                    (ProposalState::Superseded, describe(error))
                }
                Err(error) if blame(error) == Blame::Moment => {
                    let data = serde_json::json!({"proposal": proposal, "reason": describe(error)});
                    shared.event(Severity::Warning, "a statement that runs outside a transaction did not get through; tried again", data);
                    undo_half(&shared, &follower, proposal).await;
                    again = true;
                    continue;
                }
                Err(error) => (ProposalState::Failed, describe(error)),
            };
            attempts.remove(&id);
            // First the decision: what is neither stored nor decided is a person's to run.
            if let Err(error) = shared.repository.decide(proposal, state, "policy", &sql, &note) {
                tracing::error!(%error, proposal, "cannot record the decision about a proposal");
            }
            forget(&follower, id).await?;
            if state == ProposalState::Failed {
                shared.event(
                    Severity::Alert,
                    "a statement that runs outside a transaction failed on the follower: run it there by hand",
                    serde_json::json!({"proposal": proposal, "reason": note}),
                );
            }
        }
        if again {
            sleep(RETRY_PAUSE).await;
            continue;
        }
        tokio::select! {
            () = shared.chores_deferred.notified() => {}
            () = sleep(CHORE_PERIOD) => {}
        }
    }
}

async fn forget(follower: &tokio_postgres::Client, id: i64) -> Result<(), CdcError> {
    follower.execute("DELETE FROM understudy.deferred WHERE id = $1", &[&id]).await.attempt("forget a stored statement")?;
    Ok(())
}

/// A constraint that the owner has renamed before it was validated here has another name than the statement: those that the owner
/// counts as valid are validated by the name that they have now.
async fn validate_renamed(shared: &Shared, follower: &tokio_postgres::Client) -> Result<(), CdcError> {
    let known = shared.adapter.known().await?;
    let rows = follower
        .query(
            "SELECT n.nspname::text, c.relname::text, k.conname::text FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid
             JOIN pg_namespace n ON n.oid = c.relnamespace WHERE NOT k.convalidated AND k.contype IN ('c', 'f')",
            &[],
        )
        .await
        .attempt("look for constraints that are not valid yet")?;
    for row in &rows {
        let (schema, table, name): (&str, &str, &str) = (row.get(0), row.get(1), row.get(2));
        let owners = known.tables.values().find(|known| known.schema == schema && known.name == table);
        if owners.is_some_and(|known| known.constraints.iter().any(|one| one.name == name && one.validated)) {
            let sql = format!("ALTER TABLE {} VALIDATE CONSTRAINT {}", qualified(schema, table), ident(name));
            if let Err(error) = follower.batch_execute(&sql).await {
                tracing::warn!(feed = shared.feed, reason = describe(&error), "a renamed constraint is not valid on the follower yet");
            }
        }
    }
    Ok(())
}

/// The statements of an index with the definition that the owner's has now: columns may have been renamed meanwhile.
pub(super) async fn as_it_is_now(shared: &Shared, proposal: Proposal) -> Result<Vec<String>, CdcError> {
    let known = shared.adapter.known().await?;
    let undone = |name: &str| proposal.draft.undo.iter().any(|sql| sql.starts_with("DROP INDEX ") && sql.ends_with(name));
    let found = known.tables.values().find_map(|table| {
        let index = table.indexes.iter().find(|index| undone(&qualified(&table.schema, &index.name)))?;
        Some(ddl::create_index(&index.def, table.kind == "p", true))
    });
    Ok(match found {
        Some(now) => proposal
            .draft
            .sql
            .into_iter()
            .map(|sql| if sql.contains(" INDEX CONCURRENTLY IF NOT EXISTS ") { now.clone() } else { sql })
            .collect(),
        None => proposal.draft.sql,
    })
}

fn is_missing(error: &tokio_postgres::Error) -> bool {
    let missing = [SqlState::UNDEFINED_OBJECT, SqlState::UNDEFINED_TABLE, SqlState::UNDEFINED_COLUMN];
    error.code().is_some_and(|code| missing.contains(code))
}

/// An index was built that the owner no longer has: when it was dropped there, there was nothing to drop here.
pub(super) async fn dropped_meanwhile(shared: &Shared, proposal: i64) -> Result<bool, CdcError> {
    let Ok(proposal) = shared.repository.proposal(proposal) else { return Ok(false) };
    let Some(undo) = proposal.draft.undo.iter().find(|sql| sql.starts_with("DROP INDEX ")) else { return Ok(false) };
    let known = shared.adapter.known().await?;
    let mut indexes = known.tables.values().flat_map(|table| {
        let (schema, _) = shared.spec.name_here(&(table.schema.clone(), table.name.clone()));
        table.indexes.iter().map(move |index| qualified(&schema, &index.name))
    });
    Ok(!indexes.any(|name| undo.ends_with(&name)))
}

/// An index that was not built to its end is in the way of the next attempt.
pub(super) async fn undo_half(shared: &Shared, follower: &tokio_postgres::Client, proposal: i64) {
    let Ok(proposal) = shared.repository.proposal(proposal) else { return };
    for sql in proposal.draft.undo.iter().filter(|sql| sql.starts_with("DROP INDEX ")) {
        if let Err(error) = follower.batch_execute(sql).await {
            tracing::debug!(%error, "an index that was not built to its end stays");
        }
    }
}

/// Tables that the owner rewrote: a rewrite emits no rows.
async fn copy_again(shared: Arc<Shared>) -> Result<(), CdcError> {
    // One that cannot be copied yet lets the others go first.
    let mut failed: BTreeSet<TableName> = BTreeSet::new();
    let mut told: BTreeSet<TableName> = BTreeSet::new();
    loop {
        let next = lock(&shared.held)
            .iter()
            .find(|(table, held)| matches!(held.state, HeldState::Recopy | HeldState::Copied) && !failed.contains(*table))
            .map(|(table, held)| (table.clone(), held.clone()));
        let Some((table, held)) = next else {
            tokio::select! {
                () = shared.chores.notified() => shared.chores_deferred.notify_one(),
                () = sleep(if failed.is_empty() { CHORE_PERIOD } else { RETRY_PAUSE }) => {}
            }
            failed.clear();
            continue;
        };
        let result = match held.state {
            HeldState::Copied => release(&shared, &table, held.since).await,
            _ => recopy(&shared, &table, held.since).await,
        };
        match result {
            Ok(()) => {
                told.remove(&table);
            }
            Err(error) => {
                let data = serde_json::json!({"table": format!("{}.{}", table.0, table.1), "reason": error.to_string()});
                if told.insert(table.clone()) {
                    let message = "a table could not be copied again yet; tried again, its changes are spooled meanwhile";
                    shared.event(Severity::Warning, message, data);
                } else {
                    tracing::debug!(feed = shared.feed, %error, "a table could not be copied again yet");
                }
                failed.insert(table);
            }
        }
    }
}

/// Copies one table at a snapshot of its own into a transaction that replaces all its rows.
async fn recopy(shared: &Shared, table: &TableName, asked: Lsn) -> Result<(), CdcError> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let owner = session::connect(&shared.spec.from, "recopy").await?;
    let version = session::version(&owner).await?;
    let mut exporter = session::connect_replication(&shared.spec.from).await?;
    // A temporary slot belongs to its connection and goes with it.
    let slot = format!("understudy_recopy_{}_{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
    let (consistent, snapshot) = copy::create_slot(shared, &owner, &mut exporter, version, &slot, true).await?;
    let reader = copy::import(shared, &snapshot, "recopy reader").await?;
    drop(exporter);
    let name = qualified(&table.0, &table.1);
    // The follower's name for it is the one of the stream's place; the owner may have renamed it since.
    let known = shared.adapter.known().await?.tables.values().find(|t| (&t.schema, &t.name) == (&table.0, &table.1)).map(|t| t.oid);
    let columns = reader
        .query(
            "SELECT a.attname::text, c.relkind = 'p', n.nspname::text, c.relname::text FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
             JOIN pg_namespace n ON n.oid = c.relnamespace
             WHERE CASE WHEN $3::int8 IS NULL THEN n.nspname = $1 AND c.relname = $2 ELSE c.oid::int8 = $3 END
               AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '' ORDER BY a.attnum",
            &[&table.0, &table.1, &known],
        )
        .await
        .attempt("read the table's columns")?;
    if columns.first().is_some_and(|row| (row.get::<_, &str>(2), row.get::<_, &str>(3)) != (table.0.as_str(), table.1.as_str())) {
        return Err(CdcError::Protocol("it was renamed on the owner; it is copied once the stream has brought that".into()));
    }
    let partitioned = columns.first().is_some_and(|first| first.get(1));
    let names: Vec<String> = columns.iter().map(|row| row.get(0)).collect();
    let from = if partitioned { name } else { format!("ONLY {name}") };
    let (out, into) = mapped::copy_commands(&shared.spec.rules.load(), shared.spec.direction, table, &from, &names, "");
    let there = shared.spec.name_there(table);
    let name = qualified(&there.0, &there.1);
    // Without ONLY, tables that inherit from it would be emptied, too.
    let only = if partitioned { "" } else { "ONLY " };
    let writer = session::connect_writer(&shared.spec.to, "recopy writer").await?;
    writer.batch_execute("BEGIN; SAVEPOINT emptied").await.attempt("begin a transaction on the follower")?;
    if writer.batch_execute(&format!("TRUNCATE {only}{name}")).await.is_err() {
        // Referenced by a foreign key.
        writer.batch_execute("ROLLBACK TO SAVEPOINT emptied").await.attempt("undo on the follower")?;
        writer.batch_execute(&format!("DELETE FROM {only}{name}")).await.attempt("empty the follower's table")?;
    }
    // A table that the owner has dropped since has no rows; the stream says what becomes of it.
    if !columns.is_empty() {
        copy::stream_table(&reader, &writer, &out, &into, &name, |_| ()).await?;
    }
    // Its snapshot and its lock on the owner's table end here: what follows may wait as long as the feed is behind.
    drop(reader);
    let marked = writer
        .execute(
            "UPDATE understudy.held_table SET state = 'copied', since_lsn = $4::text::pg_lsn
             WHERE feed = $1 AND schema_name = $2 AND table_name = $3 AND state = 'recopy' AND since_lsn = $5::text::pg_lsn",
            // A second rewrite in the meantime asks for another copy.
            &[&shared.feed, &table.0, &table.1, &consistent.to_string(), &asked.to_string()],
        )
        .await
        .attempt("store the position of the copy")?;
    if marked != 1 {
        return Err(CdcError::Protocol("the table was changed again meanwhile".into()));
    }
    writer.batch_execute("COMMIT").await.attempt("commit on the follower")?;
    // The applier may have asked for another copy since the commit.
    if let Some(held) = lock(&shared.held).get_mut(table).filter(|held| held.state == HeldState::Recopy && held.since == asked) {
        held.state = HeldState::Copied;
        held.since = consistent;
    }
    release(shared, table, consistent).await
}

/// Once everything before the copy is applied (spooled, for this table), the applier replays the rest.
async fn release(shared: &Shared, table: &TableName, since: Lsn) -> Result<(), CdcError> {
    let mut applied = shared.applied_watch.subscribe();
    let waiting = shared.waiting();
    loop {
        if *applied.borrow_and_update() >= since {
            break;
        }
        let stuck = tokio::time::timeout(HEARTBEAT_PERIOD, applied.changed()).await;
        if matches!(stuck, Ok(Err(_))) {
            return Err(CdcError::Stopped("the feed is gone".into()));
        }
        shared.nudge.notify_one();
    }
    drop(waiting);
    let (reply, answer) = oneshot::channel();
    let gone = |_| CdcError::Stopped("the feed is gone".into());
    shared
        .commands
        .send(Command::Release { table: table.clone(), reply })
        .await
        .map_err(|_| CdcError::Stopped("the feed is gone".into()))?;
    answer.await.map_err(gone)?
}
