//! From a change on the owner to statements for the other side, with confidence, undo and what happens if nobody agrees. Pure: the facts about the
//! other side come in as values.
//!
//! Invariants: a statement that a plan marks as safe destroys no data; what the other side already has is not proposed;
//! what it has differently (because somebody mapped it) becomes a question, never an error.

mod columns;
pub mod ddl;
mod retype;
mod table;

pub use table::{TablePlanner, TargetFacts, aside as aside_name};

use crate::metadata::ProposalDraft;

/// A suggestion on its way to becoming a proposal.
#[derive(Clone, Debug, PartialEq)]
pub struct Planned {
    /// What will be stored.
    pub draft: ProposalDraft,
    /// The rows that the owner changed without telling the stream must be copied again.
    pub recopy: bool,
}

/// A draft with the usual answers; the caller overrides what is different.
pub fn draft(object: &str, kind: &str, change: String, sql: Vec<String>, confidence: f64, why: &str) -> ProposalDraft {
    ProposalDraft {
        object: object.to_owned(),
        kind: kind.to_owned(),
        change,
        sql,
        undo: Vec::new(),
        alternatives: Vec::new(),
        confidence,
        why: why.to_owned(),
        loses_data: false,
        holds_table: false,
        outside_transaction: false,
        if_rejected: "the shadow stays as it is; SHOW DRIFT goes on naming the difference".to_owned(),
    }
}

impl From<ProposalDraft> for Planned {
    fn from(draft: ProposalDraft) -> Self {
        Planned { draft, recopy: false }
    }
}
