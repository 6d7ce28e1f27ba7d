//! The Metadata Repository: what must survive the process. Proposals and decisions, schema versions, feeds, ownership
//! and the journal of cutovers, events and alerts, and for a while what was measured. One SQLite file in WAL mode.
//!
//! Deliberately absent: row data, literals, secrets; the feed's progress (it lives in the shadow, in the same
//! transaction as the rows). The data plane never calls this room: serving and reverting work without it.
//! Invariants: what decides ownership is on disk (`synchronous=FULL`) before it is acted upon.

mod events;
mod measures;
mod ownership;
mod proposals;
mod repository;
mod schemas;

pub use events::{Event, Severity};
pub use measures::{Measure, MeasureKind};
pub use ownership::{JournalEntry, Owner, Ownership};
pub use proposals::{Proposal, ProposalDraft, ProposalState};
pub use repository::{MetadataError, Repository};
pub use schemas::SchemaVersion;
