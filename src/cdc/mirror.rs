//! The copy for a shadow that is fed by mirrored writes: one snapshot without a slot, taken while no client's transaction is open,
//! so that each of them is either in the snapshot or mirrored, never both, never neither.
//!
//! Deliberately absent: going on with an interrupted copy (without a slot nothing says what came between), positions, schema changes
//! by structure (they are mirrored as clients write them).

use super::{
    CdcError, copy,
    copy::Ends,
    copy_objects, copy_plan, copy_rows, copy_schema,
    dump::{self, Section},
    error::Attempt,
    feed::fail,
    install, roles, sequences, session,
    shared::{Phase, Shared, lock},
};
use crate::{lsn::Lsn, metadata::Severity};
use async_trait::async_trait;
use std::{
    collections::BTreeSet,
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, atomic::Ordering},
    time::Duration,
};
use tokio_postgres::Client;

/// What is done while nobody writes.
pub type AtRest<'a> = Pin<Box<dyn Future<Output = Result<(), CdcError>> + Send + 'a>>;

/// Whoever lets clients' transactions through, and has their writes mirrored.
#[async_trait]
pub trait Boundary: Send + Sync {
    /// Lets running transactions end and new ones wait, has everything behind this recorded, does `take`, and lets clients go on.
    async fn at_rest(&self, take: AtRest<'_>) -> Result<(), CdcError>;

    /// Records (on): the shadow is there.
    fn resume(&self);

    /// Records no more, and forgets what was recorded: it belongs to no shadow.
    fn abandon(&self);

    /// Waits until nothing that was recorded earlier is being run on the shadow.
    async fn idle(&self) -> Result<(), CdcError>;

    /// The shadow is there: what was recorded may be applied.
    fn ready(&self);
}

/// The phase of a shadow that is fed in this way.
const PHASE: &str = "mirroring";

/// First pause after a failure that may pass; it doubles up to [`RETRY_MAX`]. Long, as a copy starts over, and lets clients wait.
const RETRY_MIN: Duration = Duration::from_secs(1);

/// Longest pause.
const RETRY_MAX: Duration = Duration::from_secs(30);

/// Tries until the shadow follows, or a person is needed.
pub(super) async fn keep_trying(shared: &Shared, boundary: &Arc<dyn Boundary>) {
    let mut pause = RETRY_MIN;
    while let Err(error) = run(shared, boundary).await {
        if error.is_permanent() {
            boundary.abandon();
            return fail(shared, &error);
        }
        tracing::warn!(feed = shared.feed, %error, "the mirrored shadow could not be started; trying again");
        shared.set_phase(Phase::Retrying(error.to_string()));
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY_MAX);
    }
}

/// Makes the shadow, or goes on with one that was made.
async fn run(shared: &Shared, boundary: &Arc<dyn Boundary>) -> Result<(), CdcError> {
    let (spec, feed) = (&shared.spec, shared.feed.as_str());
    if spec.existing() {
        return Err(CdcError::Setup(
            "mirrored writes run as clients write them, which only the source's own schema understands: use feed = \"cdc\", or \
             schema = \"copy\""
                .into(),
        ));
    }
    let owner = session::connect(&spec.from, "copy").await?;
    let version = session::version(&owner).await?;
    let follower = session::connect_writer(&spec.to, "copy").await?;
    install::target_tables(&follower).await?;
    let stored =
        follower.query_opt("SELECT phase FROM understudy.progress WHERE feed = $1", &[&feed]).await.attempt("read the feed's progress")?;
    match stored.as_ref().map(|row| row.get::<_, &str>(0)) {
        Some(PHASE) => {
            boundary.resume();
            boundary.ready();
            shared.copy.done.store(true, Ordering::Relaxed);
            let message = "the shadow is mirrored again; transactions that waited when the process ended, and writes that went around it \
                           since, are not on the shadow: VERIFY … REPAIR puts them right";
            shared.event(Severity::Warning, message, serde_json::json!({}));
            following(shared);
            return Ok(());
        }
        Some("streaming" | "resync") => {
            return Err(CdcError::Setup(
                "this shadow was fed by logical replication before: SHADOW STOP it (with feed = \"cdc\"), give it an empty database, and \
                 start it again"
                    .into(),
            ));
        }
        Some(_) | None => {}
    }
    boundary.abandon();
    boundary.idle().await?;
    if stored.is_some() {
        copy_rows::end_predecessors(&follower).await?;
        copy::clean(shared, &follower).await?;
    }
    shared.set_phase(Phase::Copying);
    shared.copy.reset();
    let target_version = session::version(&follower).await?;
    let ends = Ends { shared, owner, follower, versions: (version, target_version) };
    // What was recorded behind the snapshot of a copy that failed belongs to no shadow.
    copy(&ends, boundary).await.inspect_err(|_| boundary.abandon())?;
    boundary.ready();
    shared.copy.end();
    let state = shared.state().copy;
    shared.event(
        Severity::Info,
        "the copy is complete; mirrored writes follow from its snapshot",
        serde_json::json!({"tables": state.tables, "rows": state.rows, "bytes": state.bytes, "seconds": state.seconds}),
    );
    following(shared);
    Ok(())
}

fn following(shared: &Shared) {
    shared.set_phase(Phase::Mirroring);
    shared.connected.store(true, Ordering::Release);
}

async fn copy(ends: &Ends<'_>, boundary: &Arc<dyn Boundary>) -> Result<(), CdcError> {
    let Ends { shared, owner, follower, versions } = ends;
    let (spec, feed) = (&shared.spec, shared.feed.as_str());
    let pg_dump = dump::find(versions.0 / 10_000).await?;
    copy::refuse_conflicts(shared, owner, follower).await?;
    install::forget(follower, feed).await?;
    follower
        .execute("INSERT INTO understudy.progress (feed, phase, commit_lsn, end_lsn) VALUES ($1, 'copying', '0/0', '0/0')", &[&feed])
        .await
        .attempt("store the feed's progress")?;
    let keeper = session::connect(&spec.from, "copy keeper").await?;
    let taken: Mutex<Option<(String, Vec<sequences::Sequence>)>> = Mutex::new(None);
    // Sequences belong to no snapshot: they are read while nobody moves them.
    boundary
        .at_rest(Box::pin(async {
            let snapshot = export(&keeper).await?;
            let positions = sequences::read(owner, spec).await?;
            *lock(&taken) = Some((snapshot, positions));
            Ok(())
        }))
        .await?;
    let taken = lock(&taken).take();
    let Some((snapshot, positions)) = taken else { return Err(CdcError::Protocol("no snapshot was taken".into())) };
    shared.event(
        Severity::Info,
        "the copy began at one snapshot of the owner; writes from here on are mirrored",
        serde_json::json!({"workers": spec.copy.workers}),
    );
    copy::warn_of_what_stays_behind(shared, &keeper).await?;
    for problem in roles::copy(&keeper, follower).await? {
        shared.event(Severity::Warning, &problem, serde_json::json!({}));
    }
    let (first, second) = futures_util::future::try_join(
        dump::run(&pg_dump, &spec.from, Section::PreData, &snapshot),
        dump::run(&pg_dump, &spec.from, Section::PostData, &snapshot),
    )
    .await?;
    copy_objects::copy(shared, &keeper, follower).await?;
    shared.adapter.baseline(&keeper).await?;
    copy_schema::restore(shared, &dump::fit(&first, versions.1), &dump::fit(&second, versions.1), Lsn::ZERO).await?;
    let plan = copy_plan::make(&keeper, spec, None, *versions, &BTreeSet::new()).await?;
    let left = ends.copy_rows(&plan, &snapshot, 0).await?;
    // Its snapshot holds vacuum back, and its locks DDL: not for as long as indexes are built.
    drop(keeper);
    if let Some(((schema, table), why)) = left.first_key_value() {
        let why = match why {
            copy_rows::Left::Changed(reason) | copy_rows::Left::Refused { reason, .. } => reason,
        };
        return Err(CdcError::Setup(format!(
            "{} tables could not be copied, the first is {schema}.{table}: {why}. Without a change stream nothing can bring the rest: take \
             the cause away, then SHADOW START again",
            left.len()
        )));
    }
    copy_schema::build(shared, follower).await?;
    sequences::set_exact(follower, &positions).await?;
    copy_schema::refresh_materialized_views(shared, owner, follower).await?;
    copy_schema::analyze(shared, follower).await?;
    follower
        .execute("UPDATE understudy.progress SET phase = $2, at = now() WHERE feed = $1", &[&feed, &PHASE])
        .await
        .attempt("store the feed's progress")?;
    Ok(())
}

async fn export(keeper: &Client) -> Result<String, CdcError> {
    keeper
        .batch_execute("SET row_security = off; BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        .await
        .attempt("take the copy's snapshot")?;
    Ok(keeper.query_one("SELECT pg_export_snapshot()", &[]).await.attempt("take the copy's snapshot")?.get(0))
}
