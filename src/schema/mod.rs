//! The Schema Adaptation Engine: knows the owner's schema at every place of the change stream, foresees what each change does to the
//! shadow, and turns it into proposals with a confidence; the policy runs the safe ones, a person decides the rest.
//!
//! - `capture`, `describe`: what is installed on the owner and what it says (catalog facts, never statement text)
//! - `catalog`, `diff`: schemas as values; differences by oid and attribute number, so renames are exact
//! - `rules`, `plan`, `policy`: what PostgreSQL does with each change (data), our own DDL for it with its undo, who decides. Pure.
//! - `mapping`: a shadow whose schema differs on purpose. Pure
//! - `access`: owners and privileges of every kind of object. Pure
//! - `approval`: what a person gives instead of a suggestion, and which suggestions a later one overtakes. Pure
//! - `renames`: what waits under an old name goes on under the new one. Pure
//! - `foresee`: what a planned migration would do, before it is run
//! - `experience`: what people here decided before, as evidence about the next suggestion. Pure
//! - `adapter`, `steps`, `objects`, `drift`: the engine at work on servers
//! - `model`, `synthetic`, `words`, `distribution`, `learn`, `fill`: what rules cannot know (the value that old rows get), and plausible values for columns without data
//!
//! Deliberately absent: running the suggestions (the applier and `control` do, under savepoints and with the operator's word), row data
//! in messages or proposals, replaying `current_query()`.
//!
//! Invariants: nothing that loses data is automatic; the same message seen again (the applier starts over) gives the same answer and
//! the same proposals; what the shadow already has is not proposed; a mapped shadow gives a question, never an error.
//!
//! Sources: PostgreSQL documentation "Event Triggers", "ALTER TABLE", "System Catalogs"; the verdicts were measured on PostgreSQL 15.

pub mod access;
mod adapter;
pub mod approval;
pub mod capture;
pub mod catalog;
mod describe;
pub mod diff;
pub mod distribution;
mod drift;
mod experience;
mod fill;
pub mod foresee;
mod learn;
pub mod mapping;
mod message;
pub mod model;
mod objects;
pub mod plan;
pub mod policy;
pub mod poll;
pub mod quote;
pub mod renames;
pub mod rules;
mod steps;
pub mod synthetic;
mod words;

pub use adapter::{Adaptation, Adapter, version_difference};
pub use drift::DriftRow;

/// The engine could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    /// A server refused or went away.
    #[error("cannot {what}: {detail}")]
    Server {
        /// What was attempted.
        what: String,
        /// The server's words, without row values.
        detail: String,
        /// SQLSTATE; empty: the connection failed.
        sqlstate: String,
    },
    /// The catalog could not be understood.
    #[error("the server's catalog could not be read: {0}; is it a PostgreSQL of major 14 to 18?")]
    Catalog(String),
    /// The metadata repository failed.
    #[error(transparent)]
    Metadata(#[from] crate::metadata::MetadataError),
    /// The proposal cannot be carried out this way.
    #[error("{0}")]
    Proposal(String),
    /// Training data or a model file is not what it should be.
    #[error("adaptation model: {0}")]
    Model(String),
}

impl SchemaError {
    /// Wraps a server's error. Its DETAIL may hold row values and is left out.
    pub fn server(what: &str, error: tokio_postgres::Error) -> Self {
        let (detail, sqlstate) = match error.as_db_error() {
            Some(db) => (format!("{} (SQLSTATE {})", db.message(), db.code().code()), db.code().code().to_owned()),
            None => (error.to_string(), String::new()),
        };
        SchemaError::Server { what: what.to_owned(), detail, sqlstate }
    }
}
