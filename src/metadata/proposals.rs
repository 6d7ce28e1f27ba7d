//! Proposals of the Schema Adaptation Engine and what people decided about them.

use super::{MetadataError, Repository, repository::now_ms};
use rusqlite::OptionalExtension;
use serde::{Deserialize, Serialize};

/// What the engine suggests.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProposalDraft {
    /// Schema-qualified table it concerns, or another object's name.
    pub object: String,
    /// Kind of change, such as `add_column`, `alter_type`, `drop_column`, `create_index`, `fill_column`.
    pub kind: String,
    /// What changed, for people: "column note (text) was added on the source".
    pub change: String,
    /// The suggestion: statements to run on the other side, in order. May be empty (nothing to do).
    pub sql: Vec<String>,
    /// Statements that undo it, where that is possible.
    pub undo: Vec<String>,
    /// Other suggestions, best first.
    pub alternatives: Vec<String>,
    /// Calibrated probability (0 to 1) that the suggestion is what a person would choose.
    pub confidence: f64,
    /// Why, in a line.
    pub why: String,
    /// Running `sql` destroys data on the other side, or cannot be undone: always asks a person.
    pub loses_data: bool,
    /// Rows of `object` cannot be applied until this is decided: they are spooled meanwhile.
    pub holds_table: bool,
    /// Must run outside a transaction (CREATE INDEX CONCURRENTLY).
    pub outside_transaction: bool,
    /// What happens if it is rejected, or nothing is done.
    pub if_rejected: String,
}

/// Where a proposal stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProposalState {
    /// Waits for a person.
    Pending,
    /// Applied by policy.
    AutoApplied,
    /// Approved by a person and applied.
    Approved,
    /// Rejected by a person.
    Rejected,
    /// Could not be applied; `note` says why.
    Failed,
    /// A later change made it pointless.
    Superseded,
}

impl ProposalState {
    /// Snake-case word.
    pub fn as_str(self) -> &'static str {
        match self {
            ProposalState::Pending => "pending",
            ProposalState::AutoApplied => "auto_applied",
            ProposalState::Approved => "approved",
            ProposalState::Rejected => "rejected",
            ProposalState::Failed => "failed",
            ProposalState::Superseded => "superseded",
        }
    }

    fn parse(text: &str) -> Self {
        [Self::AutoApplied, Self::Approved, Self::Rejected, Self::Failed, Self::Superseded]
            .into_iter()
            .find(|state| state.as_str() == text)
            .unwrap_or(Self::Pending)
    }
}

/// A stored proposal.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Proposal {
    /// Named in `APPROVE id`.
    pub id: i64,
    /// Milliseconds since 1970.
    pub at_ms: i64,
    /// Database.
    pub database: String,
    /// Shadow.
    pub shadow: String,
    /// Where it stands.
    pub state: ProposalState,
    /// `policy`, or the console user.
    pub decided_by: String,
    /// Milliseconds since 1970; 0: undecided.
    pub decided_ms: i64,
    /// What was really run.
    pub applied_sql: String,
    /// Why it failed, or what a person should know.
    pub note: String,
    /// What was suggested.
    #[serde(flatten)]
    pub draft: ProposalDraft,
}

const COLUMNS: &str = "id, at_ms, database, shadow, state, decided_by, decided_ms, applied_sql, note, draft";

fn from_row(row: &rusqlite::Row<'_>) -> rusqlite::Result<Result<Proposal, serde_json::Error>> {
    let state: String = row.get(4)?;
    let draft: String = row.get(9)?;
    let draft = match serde_json::from_str(&draft) {
        Ok(draft) => draft,
        Err(error) => return Ok(Err(error)),
    };
    Ok(Ok(Proposal {
        id: row.get(0)?,
        at_ms: row.get(1)?,
        database: row.get(2)?,
        shadow: row.get(3)?,
        state: ProposalState::parse(&state),
        decided_by: row.get(5)?,
        decided_ms: row.get(6)?,
        applied_sql: row.get(7)?,
        note: row.get(8)?,
        draft,
    }))
}

impl Repository {
    /// Stores a new proposal as pending and returns its id.
    ///
    /// # Errors
    /// [`MetadataError`]
    pub fn propose(&self, database: &str, shadow: &str, draft: &ProposalDraft) -> Result<i64, MetadataError> {
        let connection = self.lock();
        connection.execute(
            "INSERT INTO proposal (at_ms, database, shadow, state, draft) VALUES (?1,?2,?3,'pending',?4)",
            (now_ms(), database, shadow, serde_json::to_string(draft)?),
        )?;
        Ok(connection.last_insert_rowid())
    }

    /// Replaces what a proposal suggests: the owner has renamed what it is about.
    ///
    /// # Errors
    /// [`MetadataError`]
    pub fn revise(&self, id: i64, draft: &ProposalDraft) -> Result<(), MetadataError> {
        self.lock().execute("UPDATE proposal SET draft=?2 WHERE id=?1", (id, serde_json::to_string(draft)?))?;
        Ok(())
    }

    /// Records what became of a proposal.
    ///
    /// # Errors
    /// [`MetadataError`]
    pub fn decide(&self, id: i64, state: ProposalState, by: &str, applied_sql: &str, note: &str) -> Result<(), MetadataError> {
        let changed = self.lock().execute(
            "UPDATE proposal SET state=?2, decided_by=?3, decided_ms=?4, applied_sql=?5, note=?6 WHERE id=?1",
            (id, state.as_str(), by, now_ms(), applied_sql, note),
        )?;
        if changed == 0 {
            return Err(MetadataError::NotFound(format!("there is no proposal {id}: SHOW PROPOSALS lists them")));
        }
        Ok(())
    }

    /// One proposal.
    ///
    /// # Errors
    /// [`MetadataError::NotFound`]
    pub fn proposal(&self, id: i64) -> Result<Proposal, MetadataError> {
        let found = self
            .lock()
            .query_row(&format!("SELECT {COLUMNS} FROM proposal WHERE id=?1"), [id], from_row)
            .optional()?
            .ok_or_else(|| MetadataError::NotFound(format!("there is no proposal {id}: SHOW PROPOSALS lists them")))?;
        Ok(found?)
    }

    /// All proposals, oldest first; `database`: of that database only.
    ///
    /// # Errors
    /// [`MetadataError`]
    pub fn proposals(&self, database: Option<&str>) -> Result<Vec<Proposal>, MetadataError> {
        let connection = self.lock();
        let mut statement =
            connection.prepare_cached(&format!("SELECT {COLUMNS} FROM proposal WHERE ?1 IS NULL OR database=?1 ORDER BY id"))?;
        let rows = statement.query_map([database], from_row)?;
        rows.map(|row| Ok(row??)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decision_is_kept() {
        let repository = Repository::in_memory().unwrap();
        let draft = ProposalDraft {
            object: "public.orders".into(),
            kind: "drop_column".into(),
            change: "column note was dropped on the source".into(),
            sql: vec!["ALTER TABLE public.orders DROP COLUMN note".into()],
            undo: vec![],
            alternatives: vec!["keep the column".into()],
            confidence: 0.9,
            why: "rule".into(),
            loses_data: true,
            holds_table: false,
            outside_transaction: false,
            if_rejected: "the column stays".into(),
        };
        let id = repository.propose("shop", "pg18", &draft).unwrap();
        assert_eq!(repository.proposal(id).unwrap().state, ProposalState::Pending);
        repository.decide(id, ProposalState::Approved, "alice", &draft.sql[0], "").unwrap();
        let stored = &repository.proposals(Some("shop")).unwrap()[0];
        assert_eq!((stored.state, stored.decided_by.as_str(), &stored.draft), (ProposalState::Approved, "alice", &draft));
        assert!(repository.proposals(Some("other")).unwrap().is_empty());
        assert!(matches!(repository.decide(99, ProposalState::Rejected, "x", "", ""), Err(MetadataError::NotFound(_))));
    }
}
