//! What can go wrong in this room, whose fault it is and whether trying again helps.

use super::pgoutput::DecodeError;
use crate::{
    backend::BackendError, lsn::Lsn, metadata::MetadataError, schema::SchemaError, validate::ValidateError, wire::backend::ErrorFields,
};
use std::time::Duration;
use tokio_postgres::error::{DbError, SqlState};

/// A feed could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum CdcError {
    /// A person must change something first; the text says what. Trying again does not help.
    #[error("{0}")]
    Setup(String),
    /// Rows that wait have a shape that the engine does not know of their table (any more): a copy is right, a replay is not.
    #[error("the rows that wait for {0} have another shape than the table; it is copied again after the next look at the owner's catalog")]
    OtherShape(String),
    /// A statement failed, or a control connection broke.
    #[error("cannot {what}: {}", describe(.source))]
    Postgres {
        /// Verb phrase: what was attempted.
        what: String,
        /// From the driver; printed without row values.
        source: tokio_postgres::Error,
    },
    /// A replication connection failed.
    #[error("cannot {what}: {source}")]
    Backend {
        /// Verb phrase: what was attempted.
        what: &'static str,
        /// From the connection.
        source: BackendError,
    },
    /// A server refused one of the copy's own commands.
    #[error("cannot {what}: {reason}")]
    Refused {
        /// Verb phrase: what was attempted.
        what: String,
        /// The server's words, without row values.
        reason: String,
        /// SQLSTATE
        code: String,
    },
    /// The stream is not what pgoutput sends.
    #[error("the change stream is damaged: {0}")]
    Decode(#[from] DecodeError),
    /// The stream contradicts itself.
    #[error("the change stream is out of order: {0}")]
    Protocol(String),
    /// Something did not happen in time.
    #[error("{what} did not happen within {} ms", .after.as_millis())]
    Timeout {
        /// What was awaited.
        what: String,
        /// How long.
        after: Duration,
    },
    /// `hold_at` came too late.
    #[error("cannot hold at {wanted}: commits up to {applied} are already applied; hold at a newer position")]
    Beyond {
        /// Asked for.
        wanted: Lsn,
        /// End of the newest applied commit.
        applied: Lsn,
    },
    /// The feed was stopped while somebody waited for it.
    #[error("the feed is stopped: {0}")]
    Stopped(String),
    /// From the metadata repository.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// Comparing both sides failed.
    #[error("comparison: {0}")]
    Compare(#[from] ValidateError),
    /// From the Schema Adaptation Engine.
    #[error("schema adaptation: {0}")]
    Schema(#[from] SchemaError),
}

impl CdcError {
    /// A person is needed: trying again gives the same answer.
    pub fn is_permanent(&self) -> bool {
        match self {
            CdcError::Setup(_) => true,
            CdcError::Postgres { source, .. } => matches!(
                source.code(),
                Some(&SqlState::INSUFFICIENT_PRIVILEGE | &SqlState::FEATURE_NOT_SUPPORTED | &SqlState::INVALID_CATALOG_NAME)
            ),
            CdcError::Refused { code, .. } => matches!(code.as_str(), "42501" | "0A000" | "3D000"),
            CdcError::OtherShape(_)
            | CdcError::Backend { .. }
            | CdcError::Decode(_)
            | CdcError::Protocol(_)
            | CdcError::Timeout { .. }
            | CdcError::Beyond { .. }
            | CdcError::Stopped(_)
            | CdcError::Metadata(_)
            | CdcError::Compare(_)
            | CdcError::Schema(_) => false,
        }
    }
}

/// Turns a driver error into ours with a verb phrase.
pub(super) trait Attempt<T> {
    fn attempt(self, what: &str) -> Result<T, CdcError>;
}

impl<T> Attempt<T> for Result<T, tokio_postgres::Error> {
    fn attempt(self, what: &str) -> Result<T, CdcError> {
        self.map_err(|source| CdcError::Postgres { what: what.to_owned(), source })
    }
}

/// An error's text without row values: classes 22 (data exception) and 23 (constraint violation) quote them in message and
/// detail, so only their code and the names of what was hit are shown.
pub fn describe(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(db) => describe_db(db),
        None => error.to_string(),
    }
}

/// The same for a connection of our own.
pub(super) fn describe_fields(fields: &ErrorFields) -> String {
    without_values(&fields.code, &fields.message)
}

fn without_values(code: &str, message: &str) -> String {
    if code.starts_with("22") || code.starts_with("23") { format!("SQLSTATE {code}") } else { format!("{message} (SQLSTATE {code})") }
}

fn describe_db(db: &DbError) -> String {
    let mut text = without_values(db.code().code(), db.message());
    for (word, name) in [("table", db.table()), ("column", db.column()), ("constraint", db.constraint()), ("type", db.datatype())] {
        if let Some(name) = name {
            text.push_str(&format!(", {word} {name}"));
        }
    }
    text
}

/// What an error of one row change on the follower asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Blame {
    /// Connection, lock, shutdown, disk: the same transaction succeeds later.
    Moment,
    /// The row is already there.
    Duplicate,
    /// The table or its data do not fit: it is set aside.
    Table,
}

/// Sorts an error of a row change.
pub(super) fn blame(error: &tokio_postgres::Error) -> Blame {
    error.code().map_or(Blame::Moment, |code| blame_of(code.code()))
}

/// Sorts an SQLSTATE; an empty one is none.
pub(super) fn blame_of(code: &str) -> Blame {
    match code {
        "" => Blame::Moment,
        "23505" => Blame::Duplicate,
        // 55P03 lock timeout, 55006 object in use, 25006 read-only transaction: later it works again.
        "55P03" | "55006" | "25006" => Blame::Moment,
        code => match code.get(..2) {
            // 08 connection, 40 rolled back (deadlock, serialization), 53 resources, 57 operator, 58 system, XX internal
            Some("08" | "40" | "53" | "57" | "58" | "XX") => Blame::Moment,
            _ => Blame::Table,
        },
    }
}
