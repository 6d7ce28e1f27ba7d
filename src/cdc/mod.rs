//! The CDC Agent: brings a follower's rows into step with the owner of the writes and keeps them there, losing nothing and
//! repeating nothing. Snapshot copy with the slot, pgoutput stream, exactly-once apply, schema changes at their place in the stream,
//! positions and fences for the rest of the product, and the same in reverse after a cutover.
//!
//! Deliberately absent: deciding what a schema change means (`schema`), comparing rows (`validate`), when to cut over (`cutover`).
//!
//! Invariants
//! - Progress is a commit fact: it is stored on the follower in the transaction that holds the rows. A keep-alive moves only the
//!   position in memory, and only when it is taken from the queue outside a transaction.
//! - The owner may forget a position only after the follower holds it durably ([`chores`]).
//! - A slot that has forgotten more than the follower has is an error, never a start.
//! - A table is copied at one snapshot, whole or not at all; a part of a copy and the note that it is there are one transaction.
//! - A table that changed behind the copy's snapshot is copied again, never taken for empty.
//! - A row that is missing or already there is a finding, never a silent skip. A table that does not fit is set aside with its
//!   changes spooled on the follower; the others go on.
//! - No table is published without a replica identity; no lock of ours waits long on the owner.
//!
//! Tasks of a feed: the supervisor (connects, retries) runs the applier; beside it the reader and the chores. All end with it.
//!
//! Sources: PostgreSQL documentation, "Logical Decoding", "Logical Replication", "Streaming Replication Protocol",
//! "Logical Replication Message Formats"; `src/backend/replication/{walsender,pgoutput,logical}`.

mod applier;
mod aside;
mod batch;
mod chores;
mod copy;
mod copy_objects;
mod copy_plan;
mod copy_rows;
mod copy_schema;
mod dump;
mod error;
mod feed;
mod fold;
mod guard;
mod held;
mod install;
mod known;
pub mod leftovers;
mod mapped;
mod mirror;
mod names;
mod owner;
pub mod pg_dump;
pub mod pgoutput;
mod plan;
mod poll;
mod pump;
mod resync;
mod roles;
mod rows;
mod sequences;
mod session;
mod sets;
mod shared;
mod spool;
mod stream;

pub use error::{CdcError, describe};
pub use feed::{Fault, Feed, HoldGuard, Start};
pub use install::{arm, arm_behind, disarm, emit_marker, leftovers};
pub use mirror::{AtRest, Boundary};
pub use names::feed_name;
pub use sequences::sync_sequences_exact;

use crate::{
    config::{CopyConfig, ServerUrl},
    schema::mapping::SharedRules,
};

/// Prefix of the logical messages that mark a place in the stream.
pub const MARKER_PREFIX: &str = "understudy.marker";

/// Which way the rows flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Source to shadow.
    Forward,
    /// Shadow to source, after a cutover.
    Reverse,
}

/// What a feed connects.
#[derive(Clone, Debug)]
pub struct FeedSpec {
    /// Database name in proxy.toml.
    pub database: String,
    /// Shadow name in proxy.toml.
    pub shadow: String,
    /// Which way.
    pub direction: Direction,
    /// The owner of the writes.
    pub from: ServerUrl,
    /// The follower.
    pub to: ServerUrl,
    /// Limits of the copy and of the stream.
    pub copy: CopyConfig,
    /// How the shadow's schema differs from the source's.
    pub rules: SharedRules,
}
