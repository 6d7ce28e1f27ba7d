//! Schema changes of an owner on which we may not create event triggers: its catalog is looked at every other second, and what is
//! different is written into its own stream as the message that the triggers would have written (which needs no privilege). A row
//! that came before the message and is not understood has set its table aside; behind the message it is found out what becomes of that
//! ([`super::known`]).

use super::{
    CdcError, MARKER_PREFIX,
    applier::Command,
    error::Attempt,
    install,
    known::Places,
    names::literal,
    session,
    shared::{Held, HeldState, Shared, TableName, lock},
};
use crate::{
    metadata::Severity,
    schema::{
        capture::{self, Way},
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

/// Whether event triggers write the owner's schema changes into its stream.
pub(super) async fn is_captured(owner: &Client) -> Result<bool, CdcError> {
    let query = "SELECT EXISTS (SELECT FROM pg_event_trigger WHERE evtname = 'understudy_ddl_end' AND evtenabled IN ('O', 'A'))";
    Ok(owner.query_one(query, &[]).await.attempt("look for the capture of schema changes")?.get(0))
}

/// Follows the catalog; for ever at rest where event triggers do that.
pub(super) async fn follow(shared: Arc<Shared>) -> Result<(), CdcError> {
    if !shared.polled.load(Ordering::Acquire) {
        return std::future::pending().await;
    }
    let owner = session::connect(&shared.spec.from, "feed catalog").await?;
    let follower = session::connect_writer(&shared.spec.to, "feed catalog").await?;
    let query = query();
    let mut before: Option<Look> = None;
    loop {
        sleep(PERIOD).await;
        // Up to the marker that it awaits a feed skips everything: what would be written now would be skipped, too.
        if !shared.is_streaming() {
            continue;
        }
        // What is set aside from here on may be newer than the look.
        let aside = aside(&shared);
        // An object may go while the catalog is read.
        let mut now = match look(&owner, &query).await {
            Ok(now) => now,
            Err(error) if owner.is_closed() => return Err(error),
            Err(error) => {
                tracing::debug!(feed = shared.feed, %error, "the owner's catalog is looked at again");
                continue;
            }
        };
        let earlier = match before.take() {
            Some(earlier) => earlier,
            None => match kept(&shared, &follower).await? {
                Some(kept) => kept,
                None => now.look.remembered(&shared.adapter.known().await?, &look(&follower, &query).await?.look),
            },
        };
        if !now.look.messages(&earlier).is_empty() {
            publish(&shared, &owner).await;
            // Publishing may have changed a replica identity: the look that counts is the one whose message is sent.
            now = look(&owner, &query).await?;
            send(&shared, &owner, &now.look.messages(&earlier)).await?;
            keep(&shared, &follower, &now).await?;
        }
        let places = Arc::new(now.look.places());
        before = Some(now.look);
        take_back(&shared, aside, places).await?;
    }
}

/// Writes what the engine does not know of the owner's schema into its stream: changes while there was no stream. Returns at once.
pub(super) async fn tell_what_changed(shared: &Shared, owner: &Client) -> Result<(), CdcError> {
    let query = query();
    let now = look(owner, &query).await?;
    let follower = session::connect_writer(&shared.spec.to, "feed catalog").await?;
    let messages = now.look.messages(&now.look.remembered(&shared.adapter.known().await?, &look(&follower, &query).await?.look));
    if !messages.is_empty() {
        write(owner, &messages, "resync").await?;
    }
    keep(shared, &follower, &now).await
}

/// What the first look is compared with: the owner's catalog at the snapshot of the copy.
pub(super) async fn begin(shared: &Shared, keeper: &Client, follower: &Client) -> Result<(), CdcError> {
    if is_captured(keeper).await? {
        return Ok(());
    }
    // A snapshot does not keep definitions from going; without this look the first is compared with what the engine remembers.
    keeper.batch_execute("SAVEPOINT look").await.attempt("set a savepoint on the owner")?;
    match look(keeper, &query()).await {
        Ok(seen) => keep(shared, follower, &seen).await,
        Err(error) if keeper.is_closed() => Err(error),
        Err(error) => {
            tracing::debug!(feed = shared.feed, %error, "the owner's catalog could not be kept as it is at the snapshot");
            keeper.batch_execute("ROLLBACK TO SAVEPOINT look").await.attempt("go on with the copy's snapshot")
        }
    }
}

/// A look, and its text.
struct Seen {
    look: Look,
    text: String,
}

async fn look(server: &Client, query: &str) -> Result<Seen, CdcError> {
    let row = server.query_one(query, &[]).await.attempt("look at a server's catalog")?;
    let text: String = row.get(0);
    let look = Look::parse(&text).ok_or_else(|| CdcError::Protocol("a server's catalog could not be read".into()))?;
    Ok(Seen { look, text })
}

/// Keeps a look whose message is in the stream: a process that comes later compares with it. Should this one die between both, the same is
/// said twice, which changes nothing.
async fn keep(shared: &Shared, follower: &Client, seen: &Seen) -> Result<(), CdcError> {
    follower
        .execute(
            "INSERT INTO understudy.look (feed, catalog) VALUES ($1, $2) ON CONFLICT (feed) DO UPDATE SET catalog = excluded.catalog",
            &[&shared.feed, &seen.text],
        )
        .await
        .attempt("keep what the owner's catalog was")
        .map(|_| ())
}

async fn kept(shared: &Shared, follower: &Client) -> Result<Option<Look>, CdcError> {
    let row = follower
        .query_opt("SELECT catalog FROM understudy.look WHERE feed = $1", &[&shared.feed])
        .await
        .attempt("read what the owner's catalog was")?;
    Ok(row.and_then(|row| Look::parse(row.get(0))))
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

/// Tables that rows have set aside, as far as nobody has decided anything about them.
fn aside(shared: &Shared) -> Vec<TableName> {
    let waiting = |held: &Held| held.state == HeldState::Waiting && held.proposal > 0;
    lock(&shared.held).iter().filter(|(_, held)| waiting(held)).map(|(table, _)| table.clone()).collect()
}

/// Tables that were set aside because a row came before the message that explains it: see [`super::known`].
async fn take_back(shared: &Shared, aside: Vec<TableName>, places: Arc<Places>) -> Result<(), CdcError> {
    let gone = || CdcError::Stopped("the feed is gone".into());
    for table in aside {
        let (reply, answer) = oneshot::channel();
        let command = Command::TakeBack { table, places: Arc::clone(&places), reply };
        shared.commands.send(command).await.map_err(|_| gone())?;
        // What still does not fit stays set aside, and waits for a person.
        if let Err(error) = answer.await.map_err(|_| gone())? {
            tracing::debug!(%error, "a table that is set aside does not fit yet");
        }
    }
    Ok(())
}
