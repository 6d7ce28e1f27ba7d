//! Background tasks of a database: ticks of the owner's position, fences of the shadows, drift,
//! what the servers are doing.

use super::{
    Controller, health,
    managed::{Managed, ManagedShadow, lock},
};
use crate::{
    cdc::{CdcError, Direction},
    config::FeedKind,
    lsn::Lsn,
    metadata::{ProposalState, Severity},
    schema::catalog::Catalog,
    sql::CatalogFacts,
    traffic::{
        database::monotonic_ms,
        fence::{Pending, Tick},
    },
};
use std::{collections::HashSet, sync::Arc, time::Duration};
use tokio::task::JoinSet;

/// How often the owner's position is sampled while a shadow wants it.
const TICK: Duration = Duration::from_millis(10);
/// How often shadows are looked at for changes made behind our back, and volatility facts are refreshed.
const DRIFT_INTERVAL: Duration = Duration::from_secs(3);
/// Sessions that write around the fence and are told of, per change of owner: after so many, one more says nothing new.
const BYPASSES_MAX: usize = 100;
/// After a failure a task tries again after this time.
const RETRY: Duration = Duration::from_millis(500);

/// Starts the tasks of all databases.
pub(super) fn spawn_all(controller: &Arc<Controller>, tasks: &mut JoinSet<()>) {
    tasks.spawn(super::profile::forget(controller.clone()));
    for managed in &controller.databases {
        tasks.spawn(tick(managed.clone()));
        tasks.spawn(refresh_facts(managed.clone()));
        tasks.spawn(bypass(controller.clone(), managed.clone()));
        tasks.spawn(super::ahead::assess(controller.clone(), managed.clone()));
        tasks.spawn(health::watch(
            controller.clone(),
            managed.clone(),
            "source".into(),
            {
                let managed = managed.clone();
                move || managed.config.load().source.clone()
            },
            managed.health.clone(),
        ));
        for shadow in &managed.shadows {
            tasks.spawn(fence(managed.clone(), shadow.clone()));
            tasks.spawn(super::climb::judge_and_climb(controller.clone(), managed.clone(), shadow.clone()));
            tasks.spawn(super::profile::measure(controller.clone(), managed.clone(), shadow.clone()));
            tasks.spawn(drift(controller.clone(), managed.clone(), shadow.clone()));
            tasks.spawn(health::watch(
                controller.clone(),
                managed.clone(),
                shadow.name(),
                {
                    let shadow = shadow.clone();
                    move || shadow.config.load().url.clone()
                },
                shadow.health.clone(),
            ));
        }
    }
}

/// Samples the owner's WAL insert position.
async fn tick(managed: Arc<Managed>) {
    loop {
        let owner = managed.database.route.load().owner.clone();
        let Ok((client, connection)) = crate::backend::control(&owner.url, "understudy ticks").await else {
            tokio::time::sleep(RETRY).await;
            continue;
        };
        let connection = tokio::spawn(connection);
        let mut interval = tokio::time::interval(TICK);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while let Ok(statement) = client.prepare("SELECT (pg_catalog.pg_current_wal_insert_lsn() - '0/0')::int8").await {
            let broken = loop {
                tokio::select! {
                    _ = interval.tick() => {}
                    () = managed.database.ticks.demanded() => {}
                }
                let route = managed.database.route.load_full();
                if route.owner != owner {
                    break false;
                }
                if !route.shadows.iter().any(|shadow| shadow.is_interested()) {
                    continue;
                }
                let started_ms = monotonic_ms();
                let number = managed.database.ticks.start();
                match client.query_one(&statement, &[]).await.and_then(|row| row.try_get::<_, i64>(0)) {
                    Ok(position) => {
                        let position = Lsn(position as u64);
                        managed.database.ticks.found(position);
                        managed.tick.send_replace(Tick { number, position, epoch: route.epoch, started_ms });
                    }
                    Err(_) => break true,
                }
            };
            if broken || managed.database.route.load().owner != owner {
                break;
            }
        }
        connection.abort();
        if managed.database.route.load().owner == owner {
            tokio::time::sleep(RETRY).await;
        } else {
            managed.database.ticks.reset();
        }
    }
}

/// Lets a shadow pass the ticks that it has applied.
async fn fence(managed: Arc<Managed>, shadow: Arc<ManagedShadow>) {
    let mut ticks = managed.tick.subscribe();
    let mut pending = Pending::default();
    loop {
        if pending.oldest().is_none() {
            if ticks.changed().await.is_err() {
                return;
            }
            pending.push(*ticks.borrow_and_update());
        }
        let Some(tick) = pending.oldest() else { continue };
        let Some((feed, direction)) = shadow.feed() else {
            pending.clear();
            continue;
        };
        if shadow.config.load().feed == FeedKind::Mirror {
            // What was acknowledged before the tick has been handed over before it.
            if feed.is_streaming() && shadow.route.mirror.drained(Duration::from_secs(2)).await {
                shadow.route.fence.pass(tick.number, tick.started_ms);
            }
            pending.clear();
            continue;
        }
        // a position means something to a feed from the server it was read on only
        let comparable = || managed.database.route.load().epoch == tick.epoch && managed.feeds_from_owner(direction);
        if !comparable() {
            pending.clear();
            continue;
        }
        let mut applied = std::pin::pin!(feed.wait_applied(tick.position, Duration::from_secs(2)));
        let outcome = loop {
            tokio::select! {
                outcome = &mut applied => break outcome,
                changed = ticks.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    pending.push(*ticks.borrow_and_update());
                }
            }
        };
        match outcome {
            Ok(()) if comparable() => {
                if let Some(reached) = pending.reached(feed.applied()).filter(|reached| reached.epoch == tick.epoch) {
                    shadow.route.fence.pass(reached.number, reached.started_ms);
                }
            }
            // Far behind: the oldest is waited for on.
            Err(CdcError::Timeout { .. }) => {}
            Ok(()) | Err(_) => pending.clear(),
        }
    }
}

/// Looks for changes that somebody made on the shadow itself, and carries out what policy allows.
async fn drift(controller: Arc<Controller>, managed: Arc<Managed>, shadow: Arc<ManagedShadow>) {
    let mut interval = tokio::time::interval(DRIFT_INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let streaming = shadow.feed().is_some_and(|(feed, direction)| direction == Direction::Forward && feed.is_streaming());
        let adapter = lock(&shadow.adapter).clone();
        let (true, Some(adapter)) = (streaming, adapter) else { continue };
        if let Err(error) = look_for_drift(&controller, &managed, &shadow, &adapter).await {
            tracing::warn!(database = %managed.database.name, shadow = %shadow.name(), %error, "cannot look for schema drift on the shadow");
        }
    }
}

async fn look_for_drift(
    controller: &Controller,
    managed: &Managed,
    shadow: &ManagedShadow,
    adapter: &crate::schema::Adapter,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let source = super::commands::connect(&managed.config.load().source, "understudy drift").await?;
    let target = super::commands::connect(&shadow.config.load().url, "understudy drift").await?;
    let rules = shadow.rules.load_full();
    if rules.existing {
        let (ours, theirs) = (Catalog::load(&source).await?, Catalog::load(&target).await?);
        shadow.route.names.store(Some(Arc::new(rules.names(&ours, &theirs))));
    }
    // rows that came since a column was filled get their values, too
    adapter.refill(&target).await?;
    for id in adapter.shadow_drift(&source, &target).await? {
        let proposal = controller.repository.proposal(id)?;
        let allowed = proposal.draft.confidence >= shadow.config.load().adapt.auto_approve && !proposal.draft.loses_data;
        if proposal.state == ProposalState::Pending && proposal.draft.kind == "fill_column" && allowed {
            let rows = adapter.fill(&proposal, &target).await?;
            let note = format!("{rows} rows filled");
            controller.repository.decide(id, ProposalState::AutoApplied, "policy", &proposal.draft.sql.join(";\n"), &note)?;
        } else {
            let message =
                format!("proposal {id} waits: {}. Look: SHOW PROPOSALS; decide: APPROVE {id} or REJECT {id}", proposal.draft.change);
            let data = serde_json::json!({"proposal": id, "confidence": proposal.draft.confidence});
            controller.repository.record(Severity::Warning, "schema", &managed.database.name, &shadow.name(), &message, data);
        }
    }
    Ok(())
}

/// While the way back is open: sessions of others that write to the old source all the same. Its fence stops whoever does not
/// switch it off (`SET default_transaction_read_only = off`); those who do are looked for among the open transactions. One that
/// begins and ends between two looks is not seen: its rows are differences that VERIFY finds.
async fn bypass(controller: Arc<Controller>, managed: Arc<Managed>) {
    /// Sessions of others in this database whose transaction has written.
    const WRITERS: &str = "SELECT pid, coalesce(usename::text, ''), coalesce(application_name, ''), coalesce(client_addr::text, 'local'),
            coalesce(extract(epoch FROM backend_start)::int8, 0)
        FROM pg_catalog.pg_stat_activity WHERE datname = pg_catalog.current_database() AND pid <> pg_catalog.pg_backend_pid()
            AND backend_type = 'client backend' AND application_name NOT LIKE 'understudy%' AND backend_xid IS NOT NULL";
    let mut told: HashSet<(i32, i64)> = HashSet::new();
    loop {
        tokio::time::sleep(RETRY).await;
        let owner = managed.database.route.load().owner.clone();
        if owner.name == "source" {
            told.clear();
            continue;
        }
        let source = managed.config.load().source.clone();
        let Ok(client) = super::commands::connect(&source, "understudy watch").await else { continue };
        while managed.database.route.load().owner == owner {
            let Ok(rows) = client.query(WRITERS, &[]).await else { break };
            // a switch that has not ended has clients' connections on both sides
            let switching = lock(&managed.cutover).as_ref().is_some_and(|state| state.state.starts_with("running"));
            if switching || managed.database.route.load().owner != owner {
                tokio::time::sleep(RETRY).await;
                continue;
            }
            for row in rows {
                let (Ok(pid), Ok(user), Ok(application), Ok(address), Ok(since)) = (
                    row.try_get::<_, i32>(0),
                    row.try_get::<_, String>(1),
                    row.try_get::<_, String>(2),
                    row.try_get::<_, String>(3),
                    row.try_get::<_, i64>(4),
                ) else {
                    continue;
                };
                if told.len() >= BYPASSES_MAX || !told.insert((pid, since)) {
                    continue;
                }
                let message = format!(
                    "user {user} (application \"{application}\", from {address}, process {pid}) writes to the old source of {}, around \
                     understudy and its fence, while {} owns the writes: those rows are not carried over. Stop that client, then VERIFY {}",
                    managed.database.name, owner.name, owner.name
                );
                let data = serde_json::json!({"pid": pid, "user": user, "application": application, "address": address});
                controller.repository.record(Severity::Alert, "cutover", &managed.database.name, &owner.name, &message, data);
            }
            tokio::time::sleep(RETRY).await;
        }
    }
}

/// Keeps what the classifier knows about functions, operators and views fresh.
async fn refresh_facts(managed: Arc<Managed>) {
    /// Changes whenever a function, operator, cast, relation, view, rule or policy does.
    const SIGNATURE: &str = "SELECT pg_catalog.md5((SELECT coalesce(pg_catalog.string_agg(oid::text || provolatile::text || proname::text, ',' ORDER BY oid), '')
            FROM pg_catalog.pg_proc WHERE oid >= 16384)
        || (SELECT coalesce(pg_catalog.string_agg(oid::text || ':' || xmin::text, ',' ORDER BY oid), '') FROM pg_catalog.pg_rewrite WHERE oid >= 16384)
        || (SELECT coalesce(pg_catalog.string_agg(oid::text || ':' || xmin::text, ',' ORDER BY oid), '') FROM pg_catalog.pg_operator WHERE oid >= 16384)
        || (SELECT coalesce(pg_catalog.string_agg(oid::text, ',' ORDER BY oid), '') FROM pg_catalog.pg_cast WHERE oid >= 16384)
        || (SELECT coalesce(pg_catalog.string_agg(oid::text || relkind::text || relpersistence::text || relrowsecurity::text || relname::text, ',' ORDER BY oid), '')
            FROM pg_catalog.pg_class WHERE oid >= 16384 AND relkind IN ('r', 'p', 'v', 'm', 'f', 'S'))
        || (SELECT coalesce(pg_catalog.string_agg(oid::text || ':' || xmin::text, ',' ORDER BY oid), '') FROM pg_catalog.pg_policy))";
    let mut known = String::new();
    loop {
        tokio::time::sleep(RETRY).await;
        let owner = managed.database.route.load().owner.clone();
        let Ok(client) = super::commands::connect(&owner.url, "understudy facts").await else { continue };
        while managed.database.route.load().owner == owner {
            let seen = managed.database.schema_changes();
            let signature = match client.query_one(SIGNATURE, &[]).await.and_then(|row| row.try_get::<_, String>(0)) {
                Ok(signature) => signature,
                Err(error) => {
                    tracing::warn!(database = %managed.database.name, %error, "cannot refresh what functions and views do: no read is copied or served meanwhile");
                    break;
                }
            };
            if signature != known {
                let facts = match CatalogFacts::load(&client).await {
                    Ok(facts) => facts,
                    Err(error) => {
                        tracing::warn!(database = %managed.database.name, %error, "cannot refresh what functions and views do: no read is copied or served meanwhile");
                        break;
                    }
                };
                managed.database.classifier.replace_facts(facts);
                known = signature;
            }
            managed.database.facts_refreshed(seen);
            tokio::select! {
                () = managed.database.refresh_facts.notified() => {}
                () = tokio::time::sleep(DRIFT_INTERVAL) => {}
            }
        }
    }
}
