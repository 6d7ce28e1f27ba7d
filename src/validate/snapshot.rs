//! The exact pair: sessions on both sides that see the databases as of one position of the owner's log.

use super::{Follower, ValidateError, session::Session};
use crate::{
    backend::{BackendError, Connection, cancel},
    config::ServerUrl,
    lsn::Lsn,
};
use bytes::BytesMut;
use std::time::{Duration, Instant};

/// Slot creation waits for every transaction that has written; longer than that, a person must look.
const SLOT_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the feed may take to arrive at the position.
const HOLD_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the end of the slot's connection is awaited.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Sessions in snapshots that belong together.
pub(super) struct Pair<H> {
    pub lsn: Lsn,
    pub owners: Vec<Session>,
    pub followers: Vec<Session>,
    pub pause: Duration,
    /// The feed's hold, if the caller asked to keep it: it ends with the pair.
    pub _hold: Option<H>,
}

/// Opens `sessions` snapshots on each side. With `keep_hold` the feed stays held until the pair is dropped.
pub(super) async fn pair<F: Follower>(
    owner: &ServerUrl,
    follower_url: &ServerUrl,
    follower: Option<&F>,
    sessions: usize,
    keep_hold: bool,
) -> Result<Pair<F::Hold>, ValidateError> {
    let sessions = sessions.max(1);
    let (mut owners, mut followers) = (Vec::new(), Vec::new());
    for _ in 0..sessions {
        owners.push(Session::open(owner, "owner").await?);
        followers.push(Session::open(follower_url, "follower").await?);
    }
    let (Some(first_owner), Some(first_follower)) = (owners.first(), followers.first()) else {
        return Err(ValidateError::Connect { side: "owner", reason: "no session was opened".into() });
    };
    let one_server = identity(first_owner).await? == identity(first_follower).await?;

    let Some(feed) = follower else {
        // Nothing to be exact about: no feed connects the two.
        let lsn = open_both(&owners, &followers, one_server).await?;
        return Ok(Pair { lsn, owners, followers, pause: Duration::ZERO, _hold: None });
    };
    if !feed.has_positions() {
        let (began, lsn) = (Instant::now(), std::sync::OnceLock::new());
        let take = async {
            let _ = lsn.set(open_both(&owners, &followers, one_server).await?);
            Ok(())
        };
        let hold = feed.at_rest(Box::pin(take)).await.map_err(ValidateError::Rest)?;
        let lsn = lsn.get().copied().unwrap_or(Lsn::ZERO);
        return Ok(Pair { lsn, owners, followers, pause: began.elapsed(), _hold: keep_hold.then_some(hold) });
    }

    // The feed stops first: under load it would have passed the slot's position by the time it heard of it.
    let held = Instant::now();
    let hold = feed.hold();
    let mut slot = Slot::create(owner, first_owner).await?;
    let lsn = slot.lsn;
    import(Some(&owners), Some(&slot.snapshot)).await?;
    feed.advance(&hold, lsn, HOLD_TIMEOUT).await.map_err(|reason| ValidateError::Hold { lsn, reason })?;
    open_followers(&followers, one_server.then_some(slot.snapshot.as_str())).await?;
    let hold = keep_hold.then_some(hold);
    let pause = held.elapsed();
    slot.close().await;
    Ok(Pair { lsn, owners, followers, pause, _hold: hold })
}

/// Snapshots on both sides as they are now: exact only while nobody writes. Returns the owner's position.
async fn open_both(owners: &[Session], followers: &[Session], one_server: bool) -> Result<Lsn, ValidateError> {
    let Some(first) = owners.first() else { return Ok(Lsn::ZERO) };
    first.begin(None).await?;
    let lsn = position(first).await?;
    let snapshot = first.export().await?;
    import(owners.get(1..), Some(&snapshot)).await?;
    open_followers(followers, one_server.then_some(snapshot.as_str())).await?;
    Ok(lsn)
}

/// Two URLs can mean one database.
async fn identity(session: &Session) -> Result<String, ValidateError> {
    let text = "SELECT pg_catalog.concat_ws('/', s.system_identifier, pg_catalog.pg_postmaster_start_time(), pg_catalog.current_database()) \
                FROM pg_catalog.pg_control_system() s";
    session.value("identifying the server", text).await
}

async fn position(session: &Session) -> Result<Lsn, ValidateError> {
    let text = "SELECT (CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_last_wal_replay_lsn() \
                ELSE pg_catalog.pg_current_wal_insert_lsn() END)::text";
    let value = session.value("reading the log position", text).await?;
    value.parse().map_err(|_| ValidateError::Sql {
        side: session.side,
        action: "reading the log position",
        reason: "not a position".into(),
    })
}

async fn import(sessions: Option<&[Session]>, snapshot: Option<&str>) -> Result<(), ValidateError> {
    for session in sessions.unwrap_or_default() {
        session.begin(snapshot).await?;
    }
    Ok(())
}

async fn open_followers(followers: &[Session], snapshot: Option<&str>) -> Result<(), ValidateError> {
    if snapshot.is_some() {
        return import(Some(followers), snapshot).await;
    }
    let Some((first, others)) = followers.split_first() else { return Ok(()) };
    first.begin(None).await?;
    // The first statement takes the snapshot; alone, it needs no export.
    let snapshot = first.export().await?;
    import(Some(others), Some(&snapshot)).await
}

/// A temporary slot, which ends with its connection, and the snapshot it exported, which ends with its next command.
struct Slot {
    connection: Connection,
    lsn: Lsn,
    snapshot: String,
}

impl Slot {
    async fn create(owner: &ServerUrl, control: &Session) -> Result<Slot, ValidateError> {
        let parameters = [(&b"replication"[..], &b"database"[..]), (b"application_name", b"understudy verify")];
        let mut connection = Connection::open(owner, &parameters).await.map_err(ValidateError::Slot)?;
        let name = format!("understudy_verify_{:016x}", fastrand::u64(..));
        // This spelling is understood by every version (15 and later have a second one).
        let command = format!("CREATE_REPLICATION_SLOT {name} TEMPORARY LOGICAL pgoutput EXPORT_SNAPSHOT");
        let (pid, key) = connection.key.clone();
        let rows = match tokio::time::timeout(SLOT_TIMEOUT, connection.simple_query(&command)).await {
            Ok(rows) => rows.map_err(ValidateError::Slot)?,
            Err(_) => {
                let holders = holders(control).await.unwrap_or_else(|error| error.to_string());
                // Without this the server would go on waiting for them.
                let _ = cancel(owner, pid, &key).await;
                return Err(ValidateError::OpenTransactions { seconds: SLOT_TIMEOUT.as_secs(), holders });
            }
        };
        let row = rows.into_iter().next().unwrap_or_default();
        let field = |index: usize| row.get(index).cloned().flatten();
        let lsn = field(1).and_then(|text| text.parse().ok());
        match (lsn, field(2)) {
            (Some(lsn), Some(snapshot)) => Ok(Slot { connection, lsn, snapshot }),
            _ => Err(ValidateError::Slot(BackendError::Protocol("CREATE_REPLICATION_SLOT gave no position or snapshot".into()))),
        }
    }

    /// Ends the connection and waits for the server to notice, so that the slot is gone when this returns.
    async fn close(&mut self) {
        let mut terminate = BytesMut::new();
        crate::wire::put(&mut terminate, b'X', |_| {});
        let ending = async {
            if self.connection.send(&terminate).await.is_ok() {
                while self.connection.receive().await.is_ok() {}
            }
        };
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, ending).await;
    }
}

/// Who keeps slot creation waiting.
async fn holders(control: &Session) -> Result<String, ValidateError> {
    let text = "SELECT coalesce(pg_catalog.string_agg(h, ', '), 'none is visible to this role') FROM ( \
            SELECT pg_catalog.format('pid %s (since %s s, %s)', pid, \
                pg_catalog.floor(extract(epoch FROM pg_catalog.now() - xact_start)), state) AS h \
            FROM pg_catalog.pg_stat_activity WHERE backend_xid IS NOT NULL AND pid <> pg_catalog.pg_backend_pid() \
            UNION ALL SELECT pg_catalog.format('prepared transaction %L', gid) FROM pg_catalog.pg_prepared_xacts \
            LIMIT 10) x";
    control.value("looking for open transactions", text).await
}
