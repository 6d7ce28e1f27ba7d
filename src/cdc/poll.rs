//! Schema changes of an owner on which we may not create event triggers: its catalog is looked at every other second, and what is
//! different is written into its own stream as the message that the triggers would have written (which needs no privilege). A row
//! that came before the message and no longer fitted has set its table aside; behind the message that is taken back.

use super::{
    CdcError, MARKER_PREFIX,
    applier::Command,
    error::Attempt,
    install,
    names::literal,
    session,
    shared::{HeldState, Shared, lock},
};
use crate::{
    metadata::{ProposalState, Severity},
    schema::{
        capture,
        poll::{Look, query},
    },
};
use std::{
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
            None => now.remembered(&shared.adapter.known().await?),
        };
        let messages = now.messages(&earlier);
        if !messages.is_empty() {
            publish(&shared, &owner, &now, &earlier).await;
            // Publishing may have changed a replica identity: the look that counts is the one whose message is sent.
            let now = look(&owner, &query).await?;
            send(&shared, &owner, &now.messages(&earlier)).await?;
            before = Some(now);
        } else {
            before = Some(now);
        }
        take_back(&shared).await?;
    }
}

async fn look(owner: &Client, query: &str) -> Result<Look, CdcError> {
    let row = owner.query_one(query, &[]).await.attempt("look at the owner's catalog")?;
    Look::parse(row.get(0)).ok_or_else(|| CdcError::Protocol("the owner's catalog could not be read".into()))
}

/// New tables join the publication, with a replica identity.
async fn publish(shared: &Shared, owner: &Client, now: &Look, earlier: &Look) {
    if now.new_tables(earlier).is_empty() {
        return;
    }
    if let Err(error) = install::prepare_owner(owner, &shared.feed).await {
        let data = serde_json::json!({"reason": error.to_string()});
        shared.event(Severity::Alert, "new tables of the owner could not be published: their rows do not reach the follower", data);
    }
}

/// Writes the messages into the owner's stream, in one transaction, and waits until they are applied.
async fn send(shared: &Shared, owner: &Client, messages: &[serde_json::Value]) -> Result<(), CdcError> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let id = format!("catalog-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
    let mut sql = "BEGIN;".to_owned();
    for message in messages {
        sql.push_str(&format!("SELECT pg_logical_emit_message(true, {}, {});", literal(capture::PREFIX), literal(&message.to_string())));
    }
    sql.push_str(&format!("SELECT pg_logical_emit_message(true, {}, {}); COMMIT", literal(MARKER_PREFIX), literal(&id)));
    owner.batch_execute(&sql).await.attempt("write a schema change into the stream")?;
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

/// Tables that were set aside because a row came before the message that explains it: what was spooled is tried again.
async fn take_back(shared: &Shared) -> Result<(), CdcError> {
    let waiting: Vec<i64> = lock(&shared.held)
        .values()
        .filter(|held| held.state == HeldState::Waiting && held.proposal > 0 && !held.recopy)
        .map(|held| held.proposal)
        .collect();
    for id in waiting {
        let Ok(proposal) = shared.repository.proposal(id) else { continue };
        if proposal.state != ProposalState::Pending || proposal.draft.kind != "held_table" {
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
