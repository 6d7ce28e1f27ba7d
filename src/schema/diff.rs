//! What changed between two versions of one table of one lineage: by attribute number and oid, so that a rename is a fact and not a guess.

use super::catalog::{AttNum, Column, Constraint, Index, Table, Trigger};

/// One change of a table. Names of columns are those after renames; `RenameColumn` has both.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Change {
    RenameTable { from: String, to: String },
    MoveSchema { from: String, to: String },
    RenameColumn { num: AttNum, from: String, to: String },
    RenameConstraint { from: String, to: String },
    RenameIndex { from: String, to: String },
    Detach { parent: String },
    Attach { parent: String, bound: String, partition: bool },
    DropTrigger(Trigger),
    DropConstraint(Constraint),
    DropIndex(Index),
    DropColumn(Column),
    AlterType { old: Column, new: Column },
    AddColumn(Column),
    SetDefault { column: Column },
    DropDefault { column: Column },
    DropExpression { column: Column },
    Identity { old: String, column: Column },
    SetNotNull { column: Column },
    DropNotNull { column: Column },
    AddConstraint(Constraint),
    ValidateConstraint(Constraint),
    AddIndex(Index),
    AddTrigger(Trigger),
    EnableTrigger(Trigger),
    ReplaceView,
    Persistence { logged: bool },
}

/// All changes from `old` to `new`, in an order in which they can be carried out: renames, then what goes, then what changes, then what comes.
pub fn diff(old: &Table, new: &Table) -> Vec<Change> {
    let mut changes = Vec::new();
    if old.schema != new.schema {
        changes.push(Change::MoveSchema { from: old.schema.clone(), to: new.schema.clone() });
    }
    if old.name != new.name {
        changes.push(Change::RenameTable { from: old.name.clone(), to: new.name.clone() });
    }
    for column in &new.columns {
        if let Some(before) = old.column_by_num(column.num).filter(|before| before.name != column.name) {
            changes.push(Change::RenameColumn { num: column.num, from: before.name.clone(), to: column.name.clone() });
        }
    }
    if new.is_view() {
        if old.definition != new.definition {
            changes.push(Change::ReplaceView);
        }
        return changes;
    }
    renames_of_parts(old, new, &mut changes);
    family(old, new, &mut changes);
    for trigger in &old.triggers {
        if !new.triggers.iter().any(|after| after.oid == trigger.oid && same_trigger(trigger, after)) {
            changes.push(Change::DropTrigger(trigger.clone()));
        }
    }
    for constraint in old.constraints.iter().filter(|constraint| !constraint.inherited) {
        if !new.constraints.iter().any(|after| after.oid == constraint.oid) {
            // A column's drop or retype takes constraints along or makes them anew; the plan asks the target what is left to do.
            let replaced = new.constraints.iter().any(|after| after.name == constraint.name && after.def == constraint.def);
            if !replaced {
                changes.push(Change::DropConstraint(constraint.clone()));
            }
        }
    }
    for index in old.indexes.iter().filter(|index| !index.constraint && !index.inherited) {
        if !new.indexes.iter().any(|after| after.oid == index.oid || (after.name == index.name && after.def == index.def)) {
            changes.push(Change::DropIndex(index.clone()));
        }
    }
    columns(old, new, &mut changes);
    for constraint in new.constraints.iter().filter(|constraint| !constraint.inherited) {
        let same = |before: &&Constraint| before.oid == constraint.oid || (before.name == constraint.name && before.def == constraint.def);
        match old.constraints.iter().find(same) {
            None => changes.push(Change::AddConstraint(constraint.clone())),
            Some(before) if constraint.validated && !before.validated => changes.push(Change::ValidateConstraint(constraint.clone())),
            Some(_) => {}
        }
    }
    for index in new.indexes.iter().filter(|index| index.valid && !index.constraint && !index.inherited) {
        if !old
            .indexes
            .iter()
            .any(|before| before.valid && (before.oid == index.oid || (before.name == index.name && before.def == index.def)))
        {
            changes.push(Change::AddIndex(index.clone()));
        }
    }
    for trigger in &new.triggers {
        match old.triggers.iter().find(|before| before.oid == trigger.oid && same_trigger(before, trigger)) {
            None => {
                changes.push(Change::AddTrigger(trigger.clone()));
                if trigger.enabled != "O" {
                    changes.push(Change::EnableTrigger(trigger.clone()));
                }
            }
            Some(before) if before.enabled != trigger.enabled => changes.push(Change::EnableTrigger(trigger.clone())),
            Some(_) => {}
        }
    }
    if old.persistence != new.persistence && !old.persistence.is_empty() && !new.persistence.is_empty() {
        changes.push(Change::Persistence { logged: new.persistence == "p" });
    }
    changes
}

/// The definition contains the table's and the columns' names, which renames change: compared by what follows only where names stayed.
fn same_trigger(before: &Trigger, after: &Trigger) -> bool {
    before.def == after.def || before.oid == after.oid && before.name == after.name
}

fn renames_of_parts(old: &Table, new: &Table, changes: &mut Vec<Change>) {
    for constraint in &new.constraints {
        if let Some(before) = old.constraints.iter().find(|before| before.oid == constraint.oid && before.name != constraint.name) {
            changes.push(Change::RenameConstraint { from: before.name.clone(), to: constraint.name.clone() });
        }
    }
    for index in new.indexes.iter().filter(|index| !index.constraint) {
        if let Some(before) = old.indexes.iter().find(|before| before.oid == index.oid && before.name != index.name)
            && before.constraint == index.constraint
        {
            changes.push(Change::RenameIndex { from: before.name.clone(), to: index.name.clone() });
        }
    }
}

fn family(old: &Table, new: &Table, changes: &mut Vec<Change>) {
    if old.parent == new.parent {
        return;
    }
    if let Some(parent) = &old.parent_name {
        changes.push(Change::Detach { parent: parent.clone() });
    }
    if let Some(parent) = &new.parent_name {
        changes.push(Change::Attach { parent: parent.clone(), bound: new.bound.clone().unwrap_or_default(), partition: new.is_partition });
    }
}

fn columns(old: &Table, new: &Table, changes: &mut Vec<Change>) {
    for column in &old.columns {
        if new.column_by_num(column.num).is_none() {
            changes.push(Change::DropColumn(column.clone()));
        }
    }
    for column in &new.columns {
        let Some(before) = old.column_by_num(column.num) else { continue };
        // By oid where it is known: the spelling also changes when a type is renamed.
        let same_type = match (before.type_oid, column.type_oid) {
            (0, _) | (_, 0) => before.type_name == column.type_name,
            (old_oid, new_oid) => old_oid == new_oid && before.typmod == column.typmod,
        };
        let retyped = !same_type || before.collation != column.collation;
        if retyped {
            changes.push(Change::AlterType { old: before.clone(), new: column.clone() });
        }
        if before.generated != column.generated && column.generated.is_empty() {
            changes.push(Change::DropExpression { column: column.clone() });
        } else if column.generated.is_empty() && before.default != column.default {
            match &column.default {
                Some(_) => changes.push(Change::SetDefault { column: column.clone() }),
                None => changes.push(Change::DropDefault { column: column.clone() }),
            }
        }
        if before.not_null && !column.not_null {
            changes.push(Change::DropNotNull { column: column.clone() });
        }
        if column.not_null && !before.not_null {
            changes.push(Change::SetNotNull { column: column.clone() });
        }
        if before.identity != column.identity {
            changes.push(Change::Identity { old: before.identity.clone(), column: column.clone() });
        }
    }
    for column in &new.columns {
        if old.column_by_num(column.num).is_none() {
            changes.push(Change::AddColumn(column.clone()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn column(num: AttNum, name: &str, type_name: &str) -> Column {
        Column { num, name: name.into(), type_name: type_name.into(), local: true, ..Column::default() }
    }

    fn table(columns: Vec<Column>) -> Table {
        Table { oid: 1, schema: "public".into(), name: "t".into(), kind: "r".into(), columns, ..Table::default() }
    }

    #[test]
    fn renames_are_exact_and_drop_plus_add_is_not_a_rename() {
        let old = table(vec![column(1, "a", "text"), column(2, "b", "text")]);
        let renamed = table(vec![column(1, "b2", "text"), column(2, "b", "text")]);
        assert_eq!(diff(&old, &renamed), [Change::RenameColumn { num: 1, from: "a".into(), to: "b2".into() }]);
        let replaced = table(vec![column(2, "b", "text"), column(3, "a", "text")]);
        assert_eq!(diff(&old, &replaced), [Change::DropColumn(column(1, "a", "text")), Change::AddColumn(column(3, "a", "text"))]);
    }

    #[test]
    fn flags_of_a_column() {
        let plain = column(1, "a", "text");
        type Case = (Column, Column, fn(&Change) -> bool);
        let cases: [Case; 5] = [
            (plain.clone(), Column { not_null: true, ..plain.clone() }, |change| matches!(change, Change::SetNotNull { .. })),
            (Column { not_null: true, ..plain.clone() }, plain.clone(), |change| matches!(change, Change::DropNotNull { .. })),
            (plain.clone(), Column { default: Some("1".into()), ..plain.clone() }, |change| matches!(change, Change::SetDefault { .. })),
            (plain.clone(), column(1, "a", "integer"), |change| matches!(change, Change::AlterType { .. })),
            (plain.clone(), Column { identity: "a".into(), ..plain.clone() }, |change| matches!(change, Change::Identity { .. })),
        ];
        for (before, after, is) in cases {
            let changes = diff(&table(vec![before]), &table(vec![after]));
            assert!(changes.len() == 1 && is(&changes[0]), "{changes:?}");
        }
    }

    proptest! {
        #[test]
        fn no_change_is_no_change(names in proptest::collection::hash_set("[a-z]{1,8}", 0..10)) {
            let columns = names.iter().enumerate().map(|(i, name)| column(i as AttNum + 1, name, "text")).collect();
            let table = table(columns);
            prop_assert!(diff(&table, &table.clone()).is_empty());
        }
    }
}
