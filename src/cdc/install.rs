//! What a feed puts on servers, and taking it away again: publication, replica identities, DDL capture and slot on the owner;
//! the schema `understudy` with the progress on the follower.
//!
//! The owner is protected first: every lock has a timeout, and no table is published before it has a replica identity
//! (publishing one without makes the application's UPDATE fail).

use super::{
    CdcError, FeedSpec,
    error::Attempt,
    names::{PREFIX, SCHEMA, feed_name, ident, literal, qualified},
    session,
};
use crate::{
    config::ServerUrl,
    lsn::Lsn,
    schema::capture::{self, Way},
};
use std::time::Duration;
use tokio_postgres::{Client, error::SqlState};

/// Longest time that a lock of ours may make the application queue behind it.
const LOCK_TIMEOUT: &str = "2s";

/// Attempts to get such a lock before giving up, with [`LOCK_PAUSE`] between them.
const LOCK_ATTEMPTS: u32 = 30;

/// Time the application gets between two attempts.
const LOCK_PAUSE: Duration = Duration::from_millis(500);

/// How long a walsender may take to let go of its slot after it was terminated.
const SLOT_RELEASE: Duration = Duration::from_secs(10);

const TARGET_TABLES: &str = "
CREATE SCHEMA IF NOT EXISTS understudy;
COMMENT ON SCHEMA understudy IS 'Kept by understudy (database shadowing): progress of its feeds. Removed with the shadow.';
CREATE TABLE IF NOT EXISTS understudy.progress (
    feed text PRIMARY KEY, phase text NOT NULL, commit_lsn pg_lsn NOT NULL, end_lsn pg_lsn NOT NULL,
    at timestamptz NOT NULL DEFAULT now());
CREATE TABLE IF NOT EXISTS understudy.confirmed (feed text PRIMARY KEY, lsn pg_lsn NOT NULL);
CREATE TABLE IF NOT EXISTS understudy.spool (
    seq bigserial PRIMARY KEY, feed text NOT NULL, schema_name text NOT NULL, table_name text NOT NULL,
    commit_lsn pg_lsn NOT NULL, change bytea NOT NULL);
CREATE TABLE IF NOT EXISTS understudy.held_table (
    feed text NOT NULL, schema_name text NOT NULL, table_name text NOT NULL, proposal bigint NOT NULL DEFAULT 0,
    state text NOT NULL, reason text NOT NULL, since_lsn pg_lsn NOT NULL, recopy boolean NOT NULL DEFAULT false, PRIMARY KEY (feed, schema_name, table_name));
CREATE TABLE IF NOT EXISTS understudy.deferred (
    id bigserial PRIMARY KEY, feed text NOT NULL, proposal bigint NOT NULL, statements text[] NOT NULL);
CREATE TABLE IF NOT EXISTS understudy.copied_table (
    id bigserial PRIMARY KEY, feed text NOT NULL, kind text NOT NULL, ident text NOT NULL);
CREATE TABLE IF NOT EXISTS understudy.copy_part (
    feed text NOT NULL, schema_name text NOT NULL, table_name text NOT NULL, part integer NOT NULL, parts integer NOT NULL,
    PRIMARY KEY (feed, schema_name, table_name, part));
CREATE TABLE IF NOT EXISTS understudy.copy_schema (feed text PRIMARY KEY, post_data text NOT NULL);
CREATE TABLE IF NOT EXISTS understudy.copy_step (feed text NOT NULL, entry integer NOT NULL, PRIMARY KEY (feed, entry));
CREATE TABLE IF NOT EXISTS understudy.owner (feed text PRIMARY KEY, system text NOT NULL, timeline integer NOT NULL);
CREATE TABLE IF NOT EXISTS understudy.look (feed text PRIMARY KEY, catalog text NOT NULL);
";

/// The tables that hold something per feed.
pub(super) const PER_FEED: &[&str] =
    &["progress", "confirmed", "spool", "held_table", "deferred", "copied_table", "copy_part", "copy_schema", "copy_step", "owner", "look"];

/// Makes the schema `understudy` on the follower; safe to repeat.
pub(super) async fn target_tables(client: &Client) -> Result<(), CdcError> {
    let there = client
        // The newest of them: an earlier version of ours may have made only some.
        .query_one("SELECT to_regclass('understudy.owner') IS NOT NULL", &[])
        .await
        .attempt("look for the schema understudy")?;
    if there.get(0) {
        return Ok(());
    }
    client.batch_execute(&format!("BEGIN; {TARGET_TABLES} COMMIT;")).await.attempt("create the schema understudy on the follower")
}

/// Forgets a feed's progress on the follower.
pub(super) async fn forget(client: &Client, feed: &str) -> Result<(), CdcError> {
    for table in PER_FEED {
        client
            .execute(&format!("DELETE FROM {SCHEMA}.{table} WHERE feed = $1"), &[&feed])
            .await
            .attempt("forget the progress of a feed")?;
    }
    Ok(())
}

/// Checks that a server can be the owner of a feed.
pub(super) async fn check_owner(client: &Client, url: &ServerUrl) -> Result<u32, CdcError> {
    let version = session::version(client).await?;
    let server = format!("{}:{}", url.host, url.port);
    if version < 130_000 {
        return Err(CdcError::Setup(format!(
            "{server} runs PostgreSQL {}: the feed needs 13 or newer (it cannot publish a partitioned table as one before); upgrade it, or \
             use feed = \"mirror\"",
            version / 10_000
        )));
    }
    let row = client
        .query_one(
            "SELECT current_setting('wal_level'), pg_is_in_recovery(),
                    (SELECT rolsuper OR rolreplication FROM pg_roles WHERE rolname = current_user)",
            &[],
        )
        .await
        .attempt("read the owner's settings")?;
    if row.get::<_, &str>(0) != "logical" {
        return Err(CdcError::Setup(format!(
            "{server} has wal_level={}: set wal_level = logical (ALTER SYSTEM SET wal_level = logical) and restart it",
            row.get::<_, &str>(0)
        )));
    }
    if row.get(1) {
        return Err(CdcError::Setup(format!("{server} is a standby: point the feed at the primary")));
    }
    if !row.get::<_, bool>(2) {
        return Err(CdcError::Setup(format!("role {} may not replicate from {server}: ALTER ROLE … REPLICATION", url.user)));
    }
    Ok(version)
}

/// Runs a statement that needs a strong lock, in short attempts.
pub(super) async fn with_lock(client: &Client, sql: &str, what: &str) -> Result<(), CdcError> {
    for attempt in 1.. {
        let result = client.batch_execute(&format!("BEGIN; SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'; {sql}; COMMIT")).await;
        match result {
            Ok(()) => return Ok(()),
            Err(source) => {
                let busy = matches!(source.code(), Some(&SqlState::LOCK_NOT_AVAILABLE | &SqlState::T_R_DEADLOCK_DETECTED));
                client.batch_execute("ROLLBACK").await.attempt("roll back")?;
                if !busy || attempt >= LOCK_ATTEMPTS {
                    return Err(CdcError::Postgres { what: what.to_owned(), source });
                }
                tokio::time::sleep(LOCK_PAUSE).await;
            }
        }
    }
    Ok(())
}

/// A table that a feed carries.
pub(super) struct Published {
    pub schema: String,
    pub table: String,
}

/// Every ordinary and partitioned user table that is not a partition, temporary or unlogged, or an extension's own.
const USER_TABLES: &str = "
SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relpersistence = 'p'
  AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'understudy') AND n.nspname !~ '^pg_'
  AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
ORDER BY 1, 2";

/// Tables (partitions too) whose rows could not be told apart in an UPDATE: no primary key that counts, no usable index.
const WITHOUT_IDENTITY: &str = "
SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p') AND c.relpersistence = 'p'
  AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'understudy') AND n.nspname !~ '^pg_'
  AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
  AND CASE c.relreplident
        WHEN 'f' THEN false
        WHEN 'd' THEN NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary AND i.indimmediate AND i.indisvalid)
        WHEN 'i' THEN NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisreplident AND i.indisvalid)
        ELSE true END
ORDER BY 1, 2";

/// Tables of the owner that a feed carries.
pub(super) async fn user_tables(client: &Client) -> Result<Vec<Published>, CdcError> {
    let rows = client.query(USER_TABLES, &[]).await.attempt("list the owner's tables")?;
    Ok(rows.iter().map(|row| Published { schema: row.get(0), table: row.get(1) }).collect())
}

/// Replica identities, publication, DDL capture. Returns what an operator should know. Safe to repeat.
pub(super) async fn prepare_owner(client: &Client, feed: &str) -> Result<Vec<String>, CdcError> {
    let mut warnings = Vec::new();
    let superuser: bool =
        client.query_one("SELECT rolsuper FROM pg_roles WHERE rolname = current_user", &[]).await.attempt("read own privileges")?.get(0);
    client.batch_execute("SET default_transaction_read_only = off").await.attempt("set up a session")?;
    if superuser {
        // Capture of an earlier installation must not see what we do here.
        client.batch_execute("SET session_replication_role = replica").await.attempt("set up a session")?;
    }
    for row in client.query(WITHOUT_IDENTITY, &[]).await.attempt("look for tables without a replica identity")? {
        let table = qualified(row.get(0), row.get(1));
        with_lock(client, &format!("ALTER TABLE {table} REPLICA IDENTITY FULL"), &format!("set the replica identity of {table}")).await?;
    }
    let way = Way::of(session::version(client).await?);
    let mut tables = user_tables(client).await?;
    if way == Way::Rows {
        client.batch_execute(capture::MESSAGE_TABLE).await.attempt("create the table of messages on the owner")?;
        tables.push(Published { schema: SCHEMA.into(), table: "message".into() });
    }
    let exists = client.query_opt("SELECT FROM pg_publication WHERE pubname = $1", &[&feed]).await.attempt("look for the publication")?;
    if exists.is_none() {
        let list: Vec<String> = tables.iter().map(|t| qualified(&t.schema, &t.table)).collect();
        let list = if list.is_empty() { String::new() } else { format!("FOR TABLE {}", list.join(", ")) };
        let sql = format!("CREATE PUBLICATION {} {list} WITH (publish_via_partition_root = true)", ident(feed));
        with_lock(client, &sql, "create the publication").await?;
    } else {
        let published = client
            .query("SELECT schemaname::text, tablename::text FROM pg_publication_tables WHERE pubname = $1", &[&feed])
            .await
            .attempt("read the publication")?;
        for table in &tables {
            if published.iter().any(|row| row.get::<_, &str>(0) == table.schema && row.get::<_, &str>(1) == table.table) {
                continue;
            }
            let name = qualified(&table.schema, &table.table);
            with_lock(client, &format!("ALTER PUBLICATION {} ADD TABLE {name}", ident(feed)), &format!("publish {name}")).await?;
        }
    }
    if superuser {
        with_lock(client, &capture::install_sql(feed, way), "install the capture of schema changes").await?;
    } else {
        warnings.push(
            "the owner's role is not a superuser, so no event triggers were installed: schema changes are found by looking at the \
             catalog every other second; tables whose rows no longer fit wait that long"
                .to_owned(),
        );
    }
    if superuser {
        client.batch_execute("RESET session_replication_role").await.attempt("set up a session")?;
    }
    Ok(warnings)
}

/// Prepares the owner and makes the slot, without a copy: for a follower that equals the owner already. Safe to repeat.
///
/// # Errors
/// [`CdcError`]
pub async fn arm(spec: &FeedSpec) -> Result<(), CdcError> {
    let feed = feed_name(spec);
    let owner = session::connect(&spec.from, "feed set-up").await?;
    check_owner(&owner, &spec.from).await?;
    for warning in prepare_owner(&owner, &feed).await? {
        tracing::warn!(feed, "{warning}");
    }
    let there = owner
        .query_opt("SELECT FROM pg_replication_slots WHERE slot_name = $1 AND database = current_database()", &[&feed])
        .await
        .attempt("look for the slot")?;
    if there.is_some() {
        return Ok(());
    }
    // A new slot makes old progress meaningless: it goes first, so that a crash in between leaves neither.
    let follower = session::connect_writer(&spec.to, "feed set-up").await?;
    target_tables(&follower).await?;
    forget(&follower, &feed).await?;
    owner
        .query_one("SELECT lsn::text FROM pg_create_logical_replication_slot($1, 'pgoutput')", &[&feed])
        .await
        .attempt("create the replication slot")?;
    Ok(())
}

/// The phase of a feed that applies behind a marker and has not met it yet.
const AFTER: &str = "after:";

/// The marker that a stored phase waits for.
pub(super) fn awaited_marker(phase: &str) -> Option<&str> {
    phase.strip_prefix(AFTER)
}

/// As [`arm`], and remembers on the follower that the feed begins at a marker: however often it is interrupted before it has met
/// the marker, it goes on from there. Safe to repeat.
///
/// # Errors
/// [`CdcError`]
pub async fn arm_behind(spec: &FeedSpec, marker: &str) -> Result<(), CdcError> {
    arm(spec).await?;
    let follower = session::connect_writer(&spec.to, "feed set-up").await?;
    target_tables(&follower).await?;
    follower
        .execute(
            "INSERT INTO understudy.progress (feed, phase, commit_lsn, end_lsn) VALUES ($1, $2, '0/0', '0/0')
             ON CONFLICT (feed) DO UPDATE SET phase = excluded.phase, commit_lsn = '0/0', end_lsn = '0/0'",
            &[&feed_name(spec), &format!("{AFTER}{marker}")],
        )
        .await
        .attempt("store the feed's marker")?;
    Ok(())
}

/// Drops a slot, ending whoever reads it. Nothing to do when it is not there.
pub(super) async fn drop_slot(owner: &Client, feed: &str) -> Result<(), CdcError> {
    let deadline = tokio::time::Instant::now() + SLOT_RELEASE;
    loop {
        owner
            .query("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = $1 AND active AND database = current_database()", &[&feed])
            .await
            .attempt("end the reader of a slot")?;
        let dropped =
            owner.query("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = $1", &[&feed]).await;
        match dropped {
            Ok(_) => return Ok(()),
            Err(error) if error.code() == Some(&SqlState::OBJECT_IN_USE) && tokio::time::Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            // Dropped by somebody else in between.
            Err(error) if error.code() == Some(&SqlState::UNDEFINED_OBJECT) => return Ok(()),
            Err(source) => return Err(CdcError::Postgres { what: format!("drop the replication slot {feed}"), source }),
        }
    }
}

/// Takes away everything a feed put on both servers. Data of users stay. Safe to repeat.
///
/// # Errors
/// [`CdcError`]
pub async fn disarm(spec: &FeedSpec) -> Result<(), CdcError> {
    let feed = feed_name(spec);
    let owner = session::connect(&spec.from, "feed removal").await?;
    owner.batch_execute("SET default_transaction_read_only = off").await.attempt("set up a session")?;
    drop_slot(&owner, &feed).await?;
    let others = owner
        .query_one(
            "SELECT count(*) FROM pg_publication WHERE pubname LIKE $1 AND pubname <> $2",
            &[&format!("{}%", PREFIX.replace('_', "\\_")), &feed],
        )
        .await
        .attempt("look for other publications")?
        .get::<_, i64>(0);
    if others == 0 {
        let remove = capture::remove_sql();
        if !remove.trim().is_empty() {
            with_lock(&owner, remove.trim().trim_end_matches(';'), "remove the capture of schema changes").await?;
        }
    }
    with_lock(&owner, &format!("DROP PUBLICATION IF EXISTS {}", ident(&feed)), "drop the publication").await?;
    drop_schema_if_unused(&owner).await?;
    let follower = session::connect(&spec.to, "feed removal").await?;
    follower.batch_execute("SET default_transaction_read_only = off").await.attempt("set up a session")?;
    let there =
        follower.query_one("SELECT to_regclass('understudy.progress') IS NOT NULL", &[]).await.attempt("look for the schema understudy")?;
    if there.get(0) {
        target_tables(&follower).await?;
        forget(&follower, &feed).await?;
    }
    drop_schema_if_unused(&follower).await
}

/// Drops our tables when no feed has anything in them, and the schema when nothing is left in it.
pub(super) async fn drop_schema_if_unused(client: &Client) -> Result<(), CdcError> {
    let tables = client
        .query_one("SELECT to_regclass('understudy.owner') IS NOT NULL", &[])
        .await
        .attempt("look for the schema understudy")?
        .get::<_, bool>(0);
    if tables {
        let used: i64 = client.query_one("SELECT count(*) FROM understudy.progress", &[]).await.attempt("look for other feeds")?.get(0);
        if used > 0 {
            return Ok(());
        }
        // What columns of the shadow taught about values (`schema::learn`).
        with_lock(client, &format!("DROP TABLE IF EXISTS {SCHEMA}.learnt"), "drop what was learnt about values").await?;
        let list: Vec<String> = PER_FEED.iter().map(|table| format!("{SCHEMA}.{table}")).collect();
        with_lock(client, &format!("DROP TABLE IF EXISTS {}", list.join(", ")), "drop the progress tables").await?;
    }
    let published = client
        .query_one("SELECT EXISTS (SELECT FROM pg_publication WHERE starts_with(pubname::text, $1))", &[&PREFIX])
        .await
        .attempt("look for other publications")?;
    if !published.get::<_, bool>(0) {
        with_lock(client, &format!("DROP TABLE IF EXISTS {SCHEMA}.message"), "drop the table of messages").await?;
    }
    match client.batch_execute(&format!("DROP SCHEMA IF EXISTS {SCHEMA}")).await {
        Ok(()) => Ok(()),
        // The capture of another feed still lives there.
        Err(error) if error.code() == Some(&SqlState::DEPENDENT_OBJECTS_STILL_EXIST) => Ok(()),
        Err(source) => Err(CdcError::Postgres { what: "drop the schema understudy".into(), source }),
    }
}

/// Writes a transactional marker into the owner's stream and returns a position that its commit lies before.
///
/// # Errors
/// [`CdcError`]
pub async fn emit_marker(client: &Client, id: &str) -> Result<Lsn, CdcError> {
    let say = Way::of(session::version(client).await?).say("SELECT", super::MARKER_PREFIX, &literal(id));
    // Read write, whatever a fence says: before 14 it is a row.
    client.batch_execute(&format!("BEGIN READ WRITE; {say}; COMMIT")).await.attempt("write a marker")?;
    let row = client.query_one("SELECT pg_catalog.pg_current_wal_insert_lsn()::text", &[]).await.attempt("read the WAL position")?;
    session::lsn(row.get(0))
}

/// What feeds of ours have left on a server, for people.
///
/// # Errors
/// [`CdcError`]
pub async fn leftovers(url: &ServerUrl) -> Result<Vec<String>, CdcError> {
    Ok(super::leftovers::list(url).await?.iter().map(ToString::to_string).collect())
}
