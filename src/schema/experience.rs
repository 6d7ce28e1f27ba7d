//! What this installation's people decided before, as evidence about the next suggestion of the same kind. The record is the proposals themselves in the
//! metadata repository. Pure.

use super::fill::Order;
use crate::metadata::{Proposal, ProposalDraft, ProposalState};

/// How many decisions of people a confidence that comes from rules and training counts for.
const PRIOR: f64 = 8.0;
/// A person's own value for a column counts as so many columns of this database.
const LESSON: f64 = 3.0;

/// Decisions of people about suggestions like one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Evidence {
    approved: u32,
    modified: u32,
    rejected: u32,
}

/// What makes two suggestions alike: the kind, and the types that it is about, as our own words name them.
fn pattern(draft: &ProposalDraft) -> (&str, &str) {
    let about = match draft.kind.as_str() {
        "alter_type" => draft.change.split_once(" changed from ").map(|(_, types)| types),
        "add_column" | "drop_column" | "missing_column" | "fill_column" | "shadow_not_null" => {
            draft.change.split_once(" (").and_then(|(_, rest)| rest.split_once(") ")).map(|(name, _)| name)
        }
        _ => None,
    };
    (&draft.kind, about.unwrap_or_default())
}

fn by_a_person(proposal: &Proposal) -> bool {
    !matches!(proposal.decided_by.as_str(), "" | "policy")
}

/// What people said about suggestions like this one.
pub(super) fn evidence(decided: &[Proposal], draft: &ProposalDraft) -> Evidence {
    let mut evidence = Evidence::default();
    for one in decided.iter().filter(|one| by_a_person(one) && pattern(&one.draft) == pattern(draft)) {
        match one.state {
            ProposalState::Approved if one.applied_sql == one.draft.sql.join(";\n") => evidence.approved += 1,
            ProposalState::Approved => evidence.modified += 1,
            ProposalState::Rejected => evidence.rejected += 1,
            ProposalState::Pending | ProposalState::AutoApplied | ProposalState::Failed | ProposalState::Superseded => {}
        }
    }
    evidence
}

/// Lets earlier decisions count: the suggestion's confidence is a rate with [`PRIOR`] decisions behind it, and each real one joins them.
pub(super) fn learn_from(decided: &[Proposal], draft: &mut ProposalDraft) {
    let Evidence { approved, modified, rejected } = evidence(decided, draft);
    let all = f64::from(approved + modified + rejected);
    if all == 0.0 || draft.sql.is_empty() {
        return;
    }
    let confidence = (draft.confidence * PRIOR + f64::from(approved)) / (PRIOR + all);
    draft.confidence = (confidence * 1000.0).round() / 1000.0;
    draft.why = format!(
        "{}; of {all:.0} such suggestions here {approved} were approved as they stood, {modified} changed, {rejected} rejected",
        draft.why
    );
}

/// What a person's decision about a column's value says: the column, the class of the value, and how much it counts.
pub(super) fn lessons(decided: &[Proposal]) -> Vec<(Order, String, f64)> {
    let mut lessons = Vec::new();
    for one in decided.iter().filter(|one| by_a_person(one) && one.draft.kind == "fill_column") {
        let Some(order) = Order::from_sql(&one.draft.sql) else { continue };
        let class = match one.state {
            ProposalState::Rejected => Some("null".to_owned()),
            ProposalState::Approved if one.applied_sql == one.draft.sql.join(";\n") => Some(order.class.clone()),
            ProposalState::Approved => class_given(&one.applied_sql),
            _ => None,
        };
        if let Some(class) = class {
            lessons.push((order, class, LESSON));
        }
    }
    lessons
}

/// The class of the value that an `UPDATE t SET c = value` gives; `None`: it is not a constant that one can name.
fn class_given(sql: &str) -> Option<String> {
    let (_, value) = sql.split_once('=')?;
    let value = value.trim().trim_end_matches(';').trim();
    let end = value.to_ascii_lowercase().find(" where ").unwrap_or(value.len());
    let value = value.get(..end)?.trim();
    let lower = value.to_ascii_lowercase();
    Some(
        match lower.as_str() {
            "null" | "false" | "true" => &lower,
            "now()" | "current_timestamp" => "now",
            "''" => "empty_str",
            "'{}'" => "empty_obj",
            "'[]'" => "empty_array",
            number if number.parse::<f64>().is_ok() => match number.parse::<f64>() {
                Ok(0.0) => "zero",
                Ok(1.0) => "one",
                _ => "num_other",
            },
            text if text.starts_with('\'') && text.ends_with('\'') => "str_const",
            _ => "computed",
        }
        .to_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decided(draft: &ProposalDraft, state: ProposalState, by: &str, sql: &str) -> Proposal {
        Proposal {
            id: 1,
            at_ms: 0,
            database: "d".into(),
            shadow: "s".into(),
            state,
            decided_by: by.into(),
            decided_ms: 1,
            applied_sql: sql.into(),
            note: String::new(),
            draft: draft.clone(),
        }
    }

    fn suggestion(change: &str, kind: &str, confidence: f64) -> ProposalDraft {
        super::super::plan::draft("public.t", kind, change.into(), vec!["SELECT 1".into()], confidence, "rule")
    }

    #[test]
    fn approvals_raise_and_rejections_lower_what_is_alike() {
        let first = suggestion("the type of column a changed from bigint to integer on the owner", "alter_type", 0.9);
        let yes = decided(&first, ProposalState::Approved, "anna", "SELECT 1");
        let changed = decided(&first, ProposalState::Approved, "anna", "SELECT 2");
        let no = decided(&first, ProposalState::Rejected, "anna", "");
        let policy = decided(&first, ProposalState::Approved, "policy", "SELECT 1");
        let next = |decided: &[Proposal], change: &str| {
            let mut draft = suggestion(change, "alter_type", 0.9);
            learn_from(decided, &mut draft);
            draft
        };
        let alike = "the type of column other changed from bigint to integer on the owner";
        assert!(next(&[yes.clone(), yes.clone()], alike).confidence > 0.9);
        assert!(next(&vec![yes.clone(); 9], alike).confidence >= 0.95, "asked often enough, it need not be asked again");
        assert!(next(&[no], alike).confidence < 0.85);
        let mixed = next(&[yes.clone(), changed], alike);
        assert!(
            mixed.confidence < 0.9 && mixed.why.contains("of 2 such suggestions here 1 were approved as they stood, 1 changed, 0 rejected")
        );
        assert_eq!(next(&[policy], alike).confidence, 0.9);
        assert_eq!(next(&[yes], "the type of column a changed from text to integer on the owner").confidence, 0.9);
    }

    #[test]
    fn what_a_person_gave_is_a_lesson() {
        for (sql, class) in [
            ("UPDATE t SET a = 0", Some("zero")),
            ("UPDATE t SET a = 'x' WHERE a IS NULL;", Some("str_const")),
            ("UPDATE t SET a = now()", Some("now")),
            ("UPDATE t SET a = b + 1", Some("computed")),
            ("SELECT 1", None),
        ] {
            assert_eq!(class_given(sql).as_deref(), class, "{sql}");
        }
        let order = Order { schema: "public".into(), table: "t".into(), column: "a".into(), class: "zero".into(), not_null: true };
        let mut draft = suggestion("column a (integer) exists on the shadow only, and its rows have no value", "fill_column", 0.5);
        draft.sql = vec![order.to_sql()];
        let learnt = lessons(&[
            decided(&draft, ProposalState::Rejected, "anna", ""),
            decided(&draft, ProposalState::Approved, "anna", "UPDATE t SET a = 1"),
            decided(&draft, ProposalState::AutoApplied, "policy", &order.to_sql()),
        ]);
        assert_eq!(learnt.iter().map(|(_, class, _)| class.as_str()).collect::<Vec<_>>(), ["null", "one"]);
    }
}
