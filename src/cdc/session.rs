//! Connections of a feed: control and apply sessions with every setting pinned that changes how values are written or read,
//! and replication connections.

use super::error::{Attempt, CdcError, describe_fields};
use crate::{
    backend::{self, BackendError, Connection, ControlError},
    config::ServerUrl,
    lsn::Lsn,
};
use bytes::{Bytes, BytesMut};
use std::error::Error;
use tokio_postgres::{
    Client,
    types::{Format, IsNull, ToSql, Type, to_sql_checked},
};

/// Text forms of values must mean the same on both ends: these settings decide them. `search_path` makes names in values
/// (regclass and the like) and in format_type() qualified.
const PINNED: &[(&str, &str)] = &[
    ("datestyle", "ISO"),
    ("intervalstyle", "postgres"),
    ("extra_float_digits", "3"),
    ("timezone", "UTC"),
    ("bytea_output", "hex"),
    ("xmloption", "content"),
    ("lc_monetary", "C"),
    ("search_path", "pg_catalog"),
    ("statement_timeout", "0"),
    ("idle_in_transaction_session_timeout", "0"),
    ("default_transaction_isolation", "read committed"),
];

/// A control session with pinned settings. `role` is part of the application name, for people who look at pg_stat_activity.
pub(super) async fn connect(url: &ServerUrl, role: &str) -> Result<Client, CdcError> {
    let server = format!("reach {}:{}", url.host, url.port);
    let (client, connection) = backend::control(url, &format!("understudy {role}")).await.map_err(|error| match error {
        ControlError::LogIn(source) => CdcError::Postgres { what: server, source },
        ControlError::Reach(source) => CdcError::Backend { what: "open a control connection", source },
    })?;
    // Ends when the client is dropped; its errors also reach the client's callers.
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a control connection of a feed ended");
        }
    });
    client.batch_execute(&pinned()).await.attempt("set up a session")?;
    Ok(client)
}

fn pinned() -> String {
    PINNED.iter().map(|(name, value)| format!("SET {name} = '{value}';")).collect()
}

/// Makes a writing session what it was before somebody's statements ran in it.
pub(super) async fn pin_writer(client: &Client) -> Result<(), CdcError> {
    client.batch_execute(&format!("RESET SESSION AUTHORIZATION; RESET ROLE; {} {WRITER}", pinned())).await.attempt("set up a session again")
}

const WRITER: &str = "SET session_replication_role = replica; SET default_transaction_read_only = off; SET synchronous_commit = off;
    SET lock_timeout = 0";

/// A session that writes to the follower: no triggers or foreign keys fire, and it may write where clients may not.
/// Every such setting is read back: one that did not take would double or lose rows (pgcopydb issue 1034).
pub(super) async fn connect_writer(url: &ServerUrl, role: &str) -> Result<Client, CdcError> {
    let client = connect(url, role).await?;
    client.batch_execute(WRITER).await.map_err(|source| {
        if source.code() == Some(&tokio_postgres::error::SqlState::INSUFFICIENT_PRIVILEGE) {
            CdcError::Setup(format!(
                "role {} may not set session_replication_role on {}:{}: use a superuser, or GRANT SET ON PARAMETER \
                     session_replication_role TO it (PostgreSQL 15 and newer)",
                url.user, url.host, url.port
            ))
        } else {
            CdcError::Postgres { what: "set up a writing session".into(), source }
        }
    })?;
    // In a deadlock with somebody else on the follower (a rehearsal, a report) the other one notices first and gives way. Only
    // superusers may set it; without it the feed sometimes starts its transaction over.
    let _ = client.batch_execute("SET deadlock_timeout = '30s'").await;
    let row = client
        .query_one("SELECT current_setting('session_replication_role'), current_setting('default_transaction_read_only')", &[])
        .await
        .attempt("read session settings back")?;
    if (row.get::<_, &str>(0), row.get::<_, &str>(1)) != ("replica", "off") {
        return Err(CdcError::Setup(format!(
            "{}:{} did not accept session_replication_role=replica: is a pooler in between? The feed needs a direct connection",
            url.host, url.port
        )));
    }
    Ok(client)
}

/// A replication connection with the same pinned settings.
pub(super) async fn connect_replication(url: &ServerUrl) -> Result<Connection, CdcError> {
    connect_raw(url, "feed", &[(b"replication", b"database")]).await
}

/// A connection of our own with the same pinned settings, for what the driver cannot do.
pub(super) async fn connect_raw(url: &ServerUrl, role: &str, more: &[(&[u8], &[u8])]) -> Result<Connection, CdcError> {
    let application = format!("understudy {role}");
    let mut parameters: Vec<(&[u8], &[u8])> = vec![(b"application_name", application.as_bytes()), (b"client_encoding", b"UTF8")];
    parameters.extend_from_slice(more);
    parameters.extend(PINNED.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())));
    Connection::open(url, &parameters).await.map_err(|source| CdcError::Backend { what: "open a connection", source })
}

/// As [`connect_writer`], raw. To be used beside a session of [`connect_writer`], which has said what may be missing.
pub(super) async fn connect_raw_writer(url: &ServerUrl, role: &str) -> Result<Connection, CdcError> {
    let mut connection = connect_raw(url, role, &[]).await?;
    run_raw(&mut connection, WRITER, "set up a writing session").await?;
    let rows = connection.simple_query("SHOW session_replication_role").await;
    match rows.as_ref().ok().and_then(|rows| rows.first()).map(Vec::as_slice) {
        Some([Some(role)]) if role == "replica" => Ok(connection),
        _ => Err(CdcError::Setup(format!("{}:{} did not accept session_replication_role=replica", url.host, url.port))),
    }
}

/// Runs statements on a connection of our own.
pub(super) async fn run_raw(connection: &mut Connection, sql: &str, what: &'static str) -> Result<Vec<Vec<Option<String>>>, CdcError> {
    connection.simple_query(sql).await.map_err(|source| match source {
        BackendError::Server(fields) => CdcError::Refused { what: what.into(), reason: describe_fields(&fields), code: fields.code },
        source => CdcError::Backend { what, source },
    })
}

/// `server_version_num` of a session's server.
pub(super) async fn version(client: &Client) -> Result<u32, CdcError> {
    let row = client.query_one("SELECT current_setting('server_version_num')::int4", &[]).await.attempt("read the server's version")?;
    Ok(row.get::<_, i32>(0).max(0) as u32)
}

/// A position out of a text column.
pub(super) fn lsn(text: &str) -> Result<Lsn, CdcError> {
    text.parse().map_err(|error| CdcError::Protocol(format!("{error}")))
}

/// A parameter in text form, as the owner sent it; `None` is NULL. The server reads it with the type's own input function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Text(pub Option<Bytes>);

impl ToSql for Text {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        match &self.0 {
            None => Ok(IsNull::Yes),
            Some(bytes) => {
                out.extend_from_slice(bytes);
                Ok(IsNull::No)
            }
        }
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    fn encode_format(&self, _: &Type) -> Format {
        Format::Text
    }

    to_sql_checked!();
}
