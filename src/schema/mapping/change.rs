//! A change of the owner on a table whose place on the shadow is written down: always a question to a person, never an error. Pure.

use super::Place;
use crate::schema::{
    catalog::{Column, Table},
    diff::Change,
    plan::{Planned, ddl, draft},
    quote,
};

/// A person would add the column under its own name more often than not; but the table differs on purpose.
const ADD: f64 = 0.9;
const ASK: f64 = 0.5;

/// What a table's changes ask of the table that it is mapped to; `there`: that table.
pub(in crate::schema) fn questions(before: &Table, now: &Table, changes: &[Change], place: &Place, there: &Table) -> Vec<Planned> {
    let mut questions = Vec::new();
    let mut others = 0;
    let (object, relation) = (there.plain(), there.qualified());
    let edit = |what: &str| {
        format!(
            "{what} in proxy.toml ([[database.shadow.map]] of {}), RELOAD, then APPROVE: the changes kept meanwhile follow",
            before.plain()
        )
    };
    for change in changes {
        match change {
            Change::AddColumn(column) => {
                let goes = place.column(&column.name);
                if goes.name.is_none_or(|name| there.column(name).is_some()) {
                    continue;
                }
                let nullable = Column { not_null: column.not_null && column.missing.is_some(), ..column.clone() };
                let sql = vec![format!("ALTER TABLE {relation} ADD COLUMN {}", ddl::column(&nullable))];
                let change = format!(
                    "column {} ({}) was added on the owner to {}, which is {object} here",
                    column.name,
                    column.type_name,
                    now.plain()
                );
                let mut draft = draft(&object, "add_column", change, sql, ADD, "the table is mapped: the column may be meant to stay away");
                draft.undo = vec![format!("ALTER TABLE {relation} DROP COLUMN {}", quote::ident(&column.name))];
                draft.alternatives =
                    vec![edit(&format!("leave it out: write columns = {{ {} = \"\" }}", column.name)) + " with AS 'SELECT 1'"];
                draft.holds_table = true;
                draft.if_rejected = "the table's changes are kept aside on the shadow until it is approved".into();
                // Old rows have a value that only the owner knows.
                questions.push(Planned { draft, recopy: column.default.is_some() && column.missing.is_none() });
            }
            Change::DropColumn(column) => {
                let Some(name) = place.column(&column.name).name.filter(|name| there.column(name).is_some()) else { continue };
                let sql = vec![format!("ALTER TABLE {relation} DROP COLUMN {}", quote::ident(name))];
                let change = format!("column {} ({}) was dropped on the owner; here it is {name}", column.name, column.type_name);
                let mut draft =
                    draft(&object, "drop_column", change, sql, ADD, "dropping it destroys the shadow's values: a person decides");
                draft.loses_data = true;
                draft.if_rejected = "the column stays on the shadow; rows that come from now on have NULL or its default there".into();
                questions.push(draft.into());
            }
            Change::RenameColumn { from, to, .. } => {
                if place.column(from).name.is_none() && place.column(to).name.is_none() {
                    continue;
                }
                let what = format!("column {from} was renamed to {to} on the owner, and the table is mapped");
                questions.push(ask(&object, what, &edit(&format!("write {to} for {from}")), true));
            }
            Change::RenameTable { .. } | Change::MoveSchema { .. } => {
                let what = format!("table {} became {} on the owner, and it is mapped", before.plain(), now.plain());
                questions.push(ask(&object, what, &edit(&format!("write source = \"{}\"", now.plain())), true));
            }
            Change::AlterType { old, new } => {
                let Some(name) = place.column(&new.name).name else { continue };
                let what = format!("the type of column {} changed from {} to {} on the owner", new.name, old.type_name, new.type_name);
                let type_there = there.column(name).map(|column| column.type_name.as_str()).unwrap_or_default();
                let why = format!("the table is mapped: the values go on into {name} ({type_there}) as far as that takes them");
                questions.push(ask(&object, what, &why, false));
            }
            _ => others += 1,
        }
    }
    if others > 0 {
        let what = format!("{others} defaults, constraints, indexes or triggers of {} changed on the owner", now.plain());
        questions.push(ask(&object, what, "the table is mapped: its own are for a person to change, and rows need none of them", false));
    }
    questions
}

fn ask(object: &str, change: String, why: &str, hold: bool) -> Planned {
    let mut draft = draft(object, "mapped_table", change, vec![], ASK, why);
    draft.holds_table = hold;
    if hold {
        draft.if_rejected = "the table's changes are kept aside on the shadow until it is approved".into();
    }
    draft.into()
}
