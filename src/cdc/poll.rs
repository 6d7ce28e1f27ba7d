//! Schema changes of an owner on which we may not create event triggers: its catalog is looked at every other second, and what is
//! different is written into its own stream as the message that the triggers would have written (which needs no privilege). A row
//! that came before the message and no longer fitted has set its table aside; behind the message that is taken back.

use super::{
    CdcError, MARKER_PREFIX,
    applier::Command,
    error::Attempt,
    held::HELD_KIND,
    install,
    names::literal,
    session,
    shared::{HeldState, Shared, TableName, lock},
};
use crate::{
    metadata::{ProposalState, Severity},
    schema::{
        capture::{self, Way},
        poll::{Look, query},
    },
};
use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{sync::oneshot, time::sleep};
use tokio_postgres::Client;

/// How often the catalog is looked at.
const PERIOD: Duration = Duration::from_secs(2);

/// How long the stream may take to bring our own message before tables are tried again anyway at the next look.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(60);

/// Follows the catalog; for ever at rest where event triggers do that.
pub(super) async fn follow(shared: Arc<Shared>) -> Result<(), CdcError> {
    let owner = session::connect(&shared.spec.from, "feed catalog").await?;
    let captured = owner
        .query_one("SELECT EXISTS (SELECT FROM pg_event_trigger WHERE evtname = 'understudy_ddl_end' AND evtenabled IN ('O', 'A'))", &[])
        .await
        .attempt("look for the capture of schema changes")?;
    if captured.get(0) {
        return std::future::pending().await;
    }
    shared.polled.store(true, Ordering::Release);
    let query = query();
    let mut before: Option<Look> = None;
    loop {
        sleep(PERIOD).await;
        // Up to the marker that it awaits a feed skips everything: what would be written now would be skipped, too.
        if !shared.is_streaming() {
            continue;
        }
        let now = look(&owner, &query).await?;
        let earlier = match before.take() {
            Some(earlier) => earlier,
            None => {
                let follower = session::connect(&shared.spec.to, "feed catalog").await?;
                now.remembered(&shared.adapter.known().await?, &look(&follower, &query).await?)
            }
        };
        let mut changed = BTreeSet::new();
        if !now.messages(&earlier).is_empty() {
            publish(&shared, &owner).await;
            // Publishing may have changed a replica identity: the look that counts is the one whose message is sent.
            let now = look(&owner, &query).await?;
            send(&shared, &owner, &now.messages(&earlier)).await?;
            for table in now.confusable_tables(&earlier) {
                copy_again(&shared, table).await?;
            }
            changed = now.changed_tables(&earlier);
            before = Some(now);
        } else {
            before = Some(now);
        }
        take_back(&shared, &changed).await?;
    }
}

/// Writes what the engine does not know of the owner's schema into its stream: changes while there was no stream. Returns at once.
pub(super) async fn tell_what_changed(shared: &Shared, owner: &Client) -> Result<(), CdcError> {
    let query = query();
    let now = look(owner, &query).await?;
    let follower = session::connect(&shared.spec.to, "feed catalog").await?;
    let messages = now.messages(&now.remembered(&shared.adapter.known().await?, &look(&follower, &query).await?));
    if messages.is_empty() { Ok(()) } else { write(owner, &messages, "resync").await }
}

async fn look(owner: &Client, query: &str) -> Result<Look, CdcError> {
    let row = owner.query_one(query, &[]).await.attempt("look at the owner's catalog")?;
    Look::parse(row.get(0)).ok_or_else(|| CdcError::Protocol("the owner's catalog could not be read".into()))
}

/// New tables, and partitions that were detached, join the publication, with a replica identity.
async fn publish(shared: &Shared, owner: &Client) {
    if let Err(error) = install::prepare_owner(owner, &shared.feed).await {
        let data = serde_json::json!({"reason": error.to_string()});
        shared.event(Severity::Alert, "new tables of the owner could not be published: their rows do not reach the follower", data);
    }
}

/// Writes the messages into the owner's stream, in one transaction, and waits until they are applied.
async fn send(shared: &Shared, owner: &Client, messages: &[serde_json::Value]) -> Result<(), CdcError> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let id = format!("catalog-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
    write(owner, messages, &id).await?;
    let _waiting = shared.waiting();
    let mut applied = shared.applied_watch.subscribe();
    let seen = async {
        while shared.marker(&id).is_none() {
            if applied.changed().await.is_err() {
                return;
            }
        }
    };
    let _ = tokio::time::timeout(MESSAGE_TIMEOUT, seen).await;
    Ok(())
}

/// The messages and a marker, in one transaction.
async fn write(owner: &Client, messages: &[serde_json::Value], marker: &str) -> Result<(), CdcError> {
    let way = Way::of(session::version(owner).await?);
    let mut sql = "BEGIN;".to_owned();
    for message in messages {
        sql.push_str(&way.say("SELECT", capture::PREFIX, &literal(&message.to_string())));
        sql.push(';');
    }
    sql.push_str(&way.say("SELECT", MARKER_PREFIX, &literal(marker)));
    sql.push_str("; COMMIT");
    owner.batch_execute(&sql).await.attempt("write a schema change into the stream")
}

/// Tables that were set aside because a row came before the message that explains it: what was spooled is tried again, unless the
/// table itself has `changed`. Then rows from before and behind the change are in the spool, and only a copy is right.
async fn take_back(shared: &Shared, changed: &BTreeSet<TableName>) -> Result<(), CdcError> {
    let waiting: Vec<(TableName, i64)> = lock(&shared.held)
        .iter()
        .filter(|(_, held)| held.state == HeldState::Waiting && held.proposal > 0 && !held.recopy)
        .map(|(table, held)| (table.clone(), held.proposal))
        .collect();
    for (table, id) in waiting {
        let Ok(proposal) = shared.repository.proposal(id) else { continue };
        if proposal.state != ProposalState::Pending || proposal.draft.kind != HELD_KIND {
            continue;
        }
        if changed.contains(&table) {
            copy_again(shared, table).await?;
            continue;
        }
        let (reply, answer) = oneshot::channel();
        let command = Command::Approve { proposal: Box::new(proposal), sql: None, who: "policy".into(), reply };
        shared.commands.send(command).await.map_err(|_| CdcError::Stopped("the feed is gone".into()))?;
        // What still does not fit stays set aside, and waits for a person.
        if let Ok(Err(error)) = answer.await {
            tracing::debug!(%error, "a table that is set aside does not fit yet");
        }
    }
    Ok(())
}

async fn copy_again(shared: &Shared, table: TableName) -> Result<(), CdcError> {
    let gone = || CdcError::Stopped("the feed is gone".into());
    let (reply, answer) = oneshot::channel();
    shared.commands.send(Command::CopyAgain { table, reply }).await.map_err(|_| gone())?;
    answer.await.map_err(|_| gone())?
}
