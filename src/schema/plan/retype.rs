//! A column's type changed on the owner.

use super::{Planned, ddl, draft};
use crate::schema::{
    catalog::{Column, Table},
    policy, quote,
    rules::{
        types::{TypeName, Verdict, accepts, verdict},
        using::using,
    },
};

/// What is known when a type change is planned.
pub struct Retype<'a> {
    /// The table on the other side.
    pub target: &'a Table,
    /// The column there.
    pub target_column: &'a Column,
    /// The column on the owner now.
    pub new: &'a Column,
    /// Base types where domains are involved: (of the target's column, of the new one), with their kinds.
    pub resolved: ((String, String), (String, String)),
    /// Labels where both are enums: of the target's column, of the new one.
    pub labels: Option<(Vec<String>, Vec<String>)>,
    /// The owner ran one plain ALTER TABLE, without USING.
    pub plain: bool,
    /// The owner rewrote the table for it.
    pub rewritten: bool,
    /// Views and the like on the other side that forbid it.
    pub dependents: &'a [String],
}

/// The suggestion.
pub fn plan(case: &Retype<'_>) -> Planned {
    let column = quote::ident(&case.target_column.name);
    let table = case.target.qualified();
    let old_type = TypeName::parse(&case.resolved.0.0, &case.resolved.0.1);
    let new_type = TypeName::parse(&case.resolved.1.0, &case.resolved.1.1);
    let both_enums = old_type.base == "enum" && new_type.base == "enum";
    let found =
        if case.target_column.type_name == case.new.type_name && !both_enums { Verdict::Free } else { verdict(&old_type, &new_type) };
    let type_sql = ddl::typed(case.new);
    let mut actions = Vec::new();
    let has_default = case.target_column.default.is_some() && case.target_column.generated.is_empty();
    // A default that cannot be cast by itself makes the whole statement fail (42804): off before, on after.
    if has_default {
        actions.push(format!("ALTER COLUMN {column} DROP DEFAULT"));
    }
    let mut alternatives = Vec::new();
    let mut alter = format!("ALTER COLUMN {column} TYPE {type_sql}");
    if !found.works_alone() {
        let expressions = using(&old_type, &new_type, &case.new.type_name, &column).expressions;
        alter += &format!(" USING {}", expressions[0]);
        alternatives.extend(
            expressions.iter().skip(1).map(|other| format!("ALTER TABLE {table} ALTER COLUMN {column} TYPE {type_sql} USING {other}")),
        );
    }
    actions.push(alter);
    if let (Some(default), true) = (&case.new.default, case.new.generated.is_empty()) {
        actions.push(format!("ALTER COLUMN {column} SET DEFAULT {default}"));
    }
    // One ALTER TABLE cannot drop, retype and set a default of one column reliably in every order across majors: passes are fixed
    // (drop, type, default), so the order of our actions is the server's own.
    let sql = vec![format!("ALTER TABLE {table} {}", actions.join(", "))];
    let from = &case.target_column.type_name;
    let to = &case.new.type_name;
    let unseen_expression = case.rewritten && !case.plain;
    let mut reasons = vec![(found.confidence(), format!("{from} to {to}: {}", found.explain()))];
    let mut takes = accepts(&old_type, &new_type);
    if let Some((old_labels, new_labels)) = &case.labels {
        takes = new_labels.iter().all(|label| old_labels.contains(label));
        reasons[0] = match old_labels.iter().filter(|label| !new_labels.contains(label)).count() {
            0 => (0.97, "the new enum has every label of the old one".into()),
            lost => (0.9, format!("{lost} label(s) are gone: the owner had no such rows left, or mapped them")),
        };
    }
    // The values that the owner computed are copied again, so the conversion here only has to succeed.
    let loses = found.loses_data() && !unseen_expression || found == Verdict::NoCast;
    if unseen_expression {
        reasons.push((1.0, "the owner may have used an expression of its own: its values are copied again".into()));
    }
    if !case.dependents.is_empty() {
        reasons.push((0.4, format!("{} on the shadow depends on the column and forbids it", case.dependents.join(", "))));
    }
    let (confidence, why) = policy::combine(&reasons);
    let mut draft = draft(
        &case.target.plain(),
        "alter_type",
        format!("the type of column {} changed from {from} to {to} on the owner", case.target_column.name),
        sql,
        confidence,
        &why,
    );
    draft.loses_data = loses;
    draft.alternatives = alternatives;
    draft.undo = if found.loses_data() {
        Vec::new()
    } else {
        let back = if verdict(&new_type, &old_type).works_alone() { String::new() } else { format!(" USING {column}::text::{from}") };
        vec![format!("ALTER TABLE {table} ALTER COLUMN {column} TYPE {from}{back}")]
    };
    draft.holds_table = !takes;
    draft.if_rejected = if takes {
        format!("the column stays {from}, which takes every {to}; the table goes on being fed")
    } else {
        format!("the column stays {from}; rows that it cannot take stop the table: it must be mapped or copied again")
    };
    Planned { draft, recopy: unseen_expression || (case.rewritten && !found.works_alone()) }
}
