//! What a person gives with `APPROVE id AS '<sql>'`, read before it is tried, and which waiting proposals a later one overtakes. Pure.

use super::SchemaError;
use crate::metadata::{Proposal, ProposalDraft, ProposalState};
use pg_query::{NodeEnum, protobuf::TransactionStmtKind};

/// How the statements can be tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Given {
    /// In a transaction that is rolled back.
    Transaction,
    /// It is one statement that PostgreSQL runs outside transactions only: it cannot be tried.
    Alone,
}

/// Reads the statements.
///
/// # Errors
/// [`SchemaError::Proposal`]: it is no SQL, nothing, or would end the transaction in which it is tried.
pub fn read(sql: &str) -> Result<Given, SchemaError> {
    let refuse = |reason: String| Err(SchemaError::Proposal(reason));
    let parsed = match pg_query::parse(sql, pg_query::ParserOptions::DEFAULT) {
        Ok(parsed) => parsed,
        // The grammar's message quotes at most the word where it stopped.
        Err(error) => return refuse(format!("the statements behind AS are not SQL that PostgreSQL understands: {error}")),
    };
    let nodes: Vec<&NodeEnum> = parsed.protobuf.stmts.iter().filter_map(|stmt| stmt.stmt.as_ref()?.node.as_ref()).collect();
    if nodes.is_empty() {
        return refuse("there is no statement behind AS: leave AS out to run the suggestion, or REJECT it".into());
    }
    let savepoint = |kind: i32| {
        use TransactionStmtKind as Kind;
        matches!(Kind::try_from(kind), Ok(Kind::TransStmtSavepoint | Kind::TransStmtRelease | Kind::TransStmtRollbackTo))
    };
    if nodes.iter().any(|node| matches!(node, NodeEnum::TransactionStmt(stmt) if !savepoint(stmt.kind))) {
        return refuse(
            "the statements behind AS run in one transaction that understudy begins and ends: leave BEGIN, COMMIT and ROLLBACK out".into(),
        );
    }
    let alone = |node: &&NodeEnum| match node {
        NodeEnum::IndexStmt(stmt) => stmt.concurrent,
        NodeEnum::DropStmt(stmt) => stmt.concurrent,
        NodeEnum::ReindexStmt(stmt) => {
            stmt.params.iter().any(|node| matches!(&node.node, Some(NodeEnum::DefElem(option)) if option.defname == "concurrently"))
        }
        NodeEnum::VacuumStmt(stmt) => stmt.is_vacuumcmd,
        _ => false,
    };
    match (nodes.iter().any(alone), nodes.len()) {
        (false, _) => Ok(Given::Transaction),
        (true, 1) => Ok(Given::Alone),
        (true, _) => {
            refuse("a statement that PostgreSQL runs outside transactions only (CONCURRENTLY, VACUUM) must stand alone behind AS".into())
        }
    }
}

/// What a proposal is about, for telling which ones concern the same thing: an object, and a column of it.
fn subject(draft: &ProposalDraft) -> Option<(&str, &str)> {
    const KINDS: [&str; 4] = ["add_column", "alter_type", "drop_column", "missing_column"];
    if !KINDS.contains(&draft.kind.as_str()) {
        return None;
    }
    // our own words: `column c (type) was …`, `the type of column c changed from …`
    let (_, rest) = draft.change.split_once("column ")?;
    let (name, _) = rest.split_once(" (").or_else(|| rest.split_once(" changed from ")).or_else(|| rest.split_once(' '))?;
    Some((&draft.object, name))
}

/// A later proposal makes `waiting` pointless: both are about one column, and no rows wait for the earlier one that would not wait for the later.
pub(super) fn overtaken(waiting: &Proposal, later: &ProposalDraft) -> bool {
    let open = matches!(waiting.state, ProposalState::Pending | ProposalState::Failed);
    // What has the name of a dropped column is another column: the drop goes on under the name that the old one was moved to.
    let dropped = waiting.draft.kind == "drop_column";
    open && !dropped
        && subject(&waiting.draft).is_some_and(|about| subject(later) == Some(about))
        && (later.holds_table || !waiting.draft.holds_table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_may_stand_behind_as() {
        for (sql, expected) in [
            ("ALTER TABLE a ADD b int; UPDATE a SET b = 1", Some(Given::Transaction)),
            ("SAVEPOINT a; SELECT 1", Some(Given::Transaction)),
            ("CREATE INDEX CONCURRENTLY i ON a (b)", Some(Given::Alone)),
            ("CREATE INDEX CONCURRENTLY i ON a (b); SELECT 1", None),
            ("ALTER TABLE a ADD b int; COMMIT; DROP TABLE a", None),
            ("ROLLBACK", None),
            ("", None),
            ("-- nothing", None),
            ("ALTER TABEL a", None),
        ] {
            assert_eq!(read(sql).ok(), expected, "{sql}");
        }
    }

    #[test]
    fn a_later_change_of_the_same_column_overtakes() {
        let draft = |kind: &str, change: &str, holds| {
            let mut draft = super::super::plan::draft("public.t", kind, change.into(), vec![], 0.5, "");
            draft.holds_table = holds;
            draft
        };
        let waiting = |draft: ProposalDraft, state| Proposal {
            id: 1,
            at_ms: 0,
            database: "d".into(),
            shadow: "s".into(),
            state,
            decided_by: String::new(),
            decided_ms: 0,
            applied_sql: String::new(),
            note: String::new(),
            draft,
        };
        let retype = |holds| draft("alter_type", "the type of column a changed from int to text on the owner", holds);
        let pending = |holds| waiting(retype(holds), ProposalState::Pending);
        assert!(overtaken(&pending(false), &draft("drop_column", "column a (text) was dropped on the owner", false)));
        assert!(!overtaken(&pending(true), &draft("drop_column", "column a (text) was dropped on the owner", false)));
        assert!(overtaken(&pending(true), &retype(true)));
        assert!(!overtaken(&pending(false), &draft("drop_column", "column b (text) was dropped on the owner", false)));
        assert!(!overtaken(&waiting(retype(false), ProposalState::Approved), &retype(false)));
        let dropped = |type_name: &str| draft("drop_column", &format!("column a ({type_name}) was dropped on the owner"), false);
        let again = draft("add_column", "column a (text) was added on the owner", false);
        assert!(!overtaken(&waiting(dropped("int"), ProposalState::Pending), &again));
        assert!(!overtaken(&waiting(dropped("int"), ProposalState::Pending), &dropped("text")));
    }

    proptest! {
        #[test]
        fn any_text_is_read(sql in "\\PC{0,60}") {
            let _ = read(&sql);
        }
    }
}
