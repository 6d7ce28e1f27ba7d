//! Plans for the changes of one table, against the table as it is on the other side.

use super::{Planned, ddl, draft, retype};
use crate::metadata::ProposalDraft;
use crate::schema::{
    catalog::{Catalog, Column, Constraint, Index, Table},
    diff::Change,
    policy, quote,
};

/// What was asked of the other side before planning.
#[derive(Clone, Debug, Default)]
pub struct TargetFacts {
    /// The table has rows.
    pub has_rows: bool,
    /// (column, object) pairs: views, rules, policies and generated columns that use a column.
    pub dependents: Vec<(String, String)>,
    /// Columns that the owner dropped and that are still there, because nobody has agreed to drop them.
    pub left_behind: Vec<String>,
}

/// Plans the changes of one table in order, following what the table on the other side becomes.
pub struct TablePlanner<'a> {
    /// The owner's table before.
    pub old: &'a Table,
    /// The owner's table now.
    pub new: &'a Table,
    /// The table on the other side; follows the plan.
    pub target: Table,
    /// The other side's catalog, as far as it is known.
    pub catalog: &'a Catalog,
    /// The owner's types, for domains.
    pub source: &'a Catalog,
    /// The owner's other tables in the same message: partitions carry the frozen values.
    pub family: &'a [&'a Table],
    /// Reason bits of `table_rewrite` for the table or a partition of it; 0: none.
    pub rewritten: i32,
    /// One plain ALTER TABLE without USING.
    pub plain: bool,
    /// About the other side.
    pub facts: &'a TargetFacts,
    /// The policy's threshold.
    pub auto_approve: f64,
}

/// `pg_event_trigger_table_rewrite_reason`: a volatile default.
const REWRITE_DEFAULT: i32 = 2;
/// `pg_event_trigger_table_rewrite_reason`: a type change.
const REWRITE_TYPE: i32 = 4;

/// Longest name that PostgreSQL keeps (`NAMEDATALEN` - 1).
const NAME_LENGTH_MAX: usize = 63;

/// A free name for what must step aside.
pub fn aside(name: &str, taken: impl Fn(&str) -> bool) -> String {
    let mut stem = name;
    while stem.len() + 12 > NAME_LENGTH_MAX {
        stem = &stem[..stem.char_indices().next_back().map_or(0, |(at, _)| at)];
    }
    (1..10_000).map(|n| format!("{stem}_dropped_{n}")).find(|candidate| !taken(candidate)).unwrap_or_else(|| format!("{stem}_dropped"))
}

impl TablePlanner<'_> {
    /// All suggestions for `changes`, in the order in which they must run.
    pub fn plan(&mut self, changes: &[Change]) -> Vec<Planned> {
        changes.iter().flat_map(|change| self.one(change)).collect()
    }

    fn automatic(&self, draft: &ProposalDraft) -> bool {
        let case = policy::Case { confidence: draft.confidence, loses_data: draft.loses_data, has_sql: !draft.sql.is_empty() };
        policy::automatic(case, self.auto_approve)
    }

    fn draft(&self, kind: &str, change: String, action: &str, confidence: f64, why: &str) -> ProposalDraft {
        let sql = if action.is_empty() { vec![] } else { vec![format!("ALTER TABLE {} {action}", self.target.qualified())] };
        draft(&self.target.plain(), kind, change, sql, confidence, why)
    }

    /// The other side lacks what the change is about: somebody mapped it, or an earlier proposal waits.
    fn question(&self, kind: &str, change: String, missing: &str, hold: bool) -> Vec<Planned> {
        let mut draft = self.draft(kind, change, "", 0.4, &format!("the shadow has no {missing}: mapped on purpose, or an earlier proposal waits"));
        draft.holds_table = hold;
        draft.alternatives = vec!["APPROVE with your own SQL (APPROVE id AS '…')".into(), "REJECT: the shadow is meant to differ".into()];
        vec![draft.into()]
    }

    fn one(&mut self, change: &Change) -> Vec<Planned> {
        match change {
            Change::MoveSchema { to, .. } => self.move_schema(to),
            Change::RenameTable { from, to } => self.rename_table(from, to),
            Change::RenameColumn { from, to, .. } => self.rename_column(from, to),
            Change::RenameConstraint { from, to } => self.rename_constraint(from, to),
            Change::RenameIndex { from, to } => self.rename_index(from, to),
            Change::Detach { parent } => self.detach(parent),
            Change::Attach { parent, bound, partition } => self.attach(parent, bound, *partition),
            Change::DropTrigger(trigger) => {
                let mut draft = self.draft("drop_trigger", format!("trigger {} was dropped on the owner", trigger.name), "", 0.97, "no data in it");
                draft.sql = vec![format!("DROP TRIGGER IF EXISTS {} ON {}", quote::ident(&trigger.name), self.target.qualified())];
                draft.undo = vec![trigger.def.clone()];
                vec![draft.into()]
            }
            Change::AddTrigger(trigger) => {
                let mut draft = self.draft("create_trigger", format!("trigger {} was created on the owner", trigger.name), "", 0.96, "does not fire for the feed's rows");
                draft.sql = vec![
                    format!("DROP TRIGGER IF EXISTS {} ON {}", quote::ident(&trigger.name), self.target.qualified()),
                    trigger.def.clone(),
                ];
                draft.undo = vec![draft.sql[0].clone()];
                vec![draft.into()]
            }
            Change::EnableTrigger(trigger) => {
                let how = match trigger.enabled.as_str() {
                    "D" => "DISABLE",
                    "R" => "ENABLE REPLICA",
                    "A" => "ENABLE ALWAYS",
                    _ => "ENABLE",
                };
                let action = format!("{how} TRIGGER {}", quote::ident(&trigger.name));
                vec![self.draft("alter_trigger", format!("trigger {} was switched on the owner", trigger.name), &action, 0.96, "catalog only").into()]
            }
            Change::DropConstraint(constraint) => self.drop_constraint(constraint),
            Change::AddConstraint(constraint) => self.add_constraint(constraint),
            Change::ValidateConstraint(constraint) => self.validate(&constraint.name),
            Change::DropIndex(index) => self.drop_index(index),
            Change::AddIndex(index) => self.add_index(index),
            Change::DropColumn(column) => self.drop_column(column),
            Change::AddColumn(column) => self.add_column(column),
            Change::AlterType { old, new } => self.alter_type(old, new),
            Change::SetDefault { column } | Change::DropDefault { column } => self.default(column),
            Change::DropExpression { column } => self.drop_expression(column),
            Change::Identity { old, column } => self.identity(old, column),
            Change::SetNotNull { column } => self.set_not_null(column),
            Change::DropNotNull { column } => self.drop_not_null(column),
            Change::ReplaceView => self.replace_view(),
            Change::Persistence { logged } => {
                let action = if *logged { "SET LOGGED" } else { "SET UNLOGGED" };
                let draft = self.draft("set_persistence", "the table's persistence changed on the owner".into(), action, 0.96, "every row is kept");
                vec![Planned { draft, recopy: *logged }]
            }
        }
    }

    fn move_schema(&mut self, to: &str) -> Vec<Planned> {
        if self.target.schema == to {
            return vec![];
        }
        let change = format!("table {} moved to schema {to} on the owner", self.target.plain());
        if !self.catalog.has_schema(to) {
            return self.question("move_table", change, &format!("schema {to}"), true);
        }
        let mut draft = self.draft("move_table", change, &format!("SET SCHEMA {}", quote::ident(to)), 0.98, "catalog only, exact by oid");
        draft.undo = vec![format!("ALTER TABLE {} SET SCHEMA {}", quote::qualified(to, &self.target.name), quote::ident(&self.target.schema))];
        draft.holds_table = true;
        if self.automatic(&draft) {
            self.target.schema = to.to_owned();
        }
        vec![draft.into()]
    }

    fn rename_table(&mut self, from: &str, to: &str) -> Vec<Planned> {
        if self.target.name == to {
            return vec![];
        }
        let change = format!("table {from} was renamed to {to} on the owner");
        let mut statements = Vec::new();
        let mut undo = vec![format!("ALTER TABLE {} RENAME TO {}", quote::qualified(&self.target.schema, to), quote::ident(&self.target.name))];
        let mut confidence = 0.99;
        let mut why = "exact by oid, catalog only".to_owned();
        if let Some(other) = self.catalog.table(&self.target.schema, to) {
            if self.source.table(&self.target.schema, to).is_some_and(|table| table.oid != self.new.oid) {
                return self.question("rename_table", change, &format!("free name {to}"), true);
            }
            let name = aside(to, |candidate| self.catalog.table(&self.target.schema, candidate).is_some());
            statements.push(format!("ALTER TABLE {} RENAME TO {}", other.qualified(), quote::ident(&name)));
            undo.push(format!("ALTER TABLE {} RENAME TO {}", quote::qualified(&other.schema, &name), quote::ident(to)));
            confidence = 0.96;
            why = format!("{to} on the shadow is a table that the owner no longer has: it steps aside as {name}, nothing is lost");
        }
        statements.push(format!("ALTER TABLE {} RENAME TO {}", self.target.qualified(), quote::ident(to)));
        let mut draft = self.draft("rename_table", change, "", confidence, &why);
        draft.sql = statements;
        draft.undo = undo;
        draft.holds_table = true;
        draft.if_rejected = "rows of the table cannot be applied under its new name".into();
        if self.automatic(&draft) {
            self.target.name = to.to_owned();
        }
        vec![draft.into()]
    }

    fn rename_column(&mut self, from: &str, to: &str) -> Vec<Planned> {
        let change = format!("column {from} was renamed to {to} on the owner");
        match (self.target.column(from).is_some(), self.target.column(to).is_some()) {
            (false, true) => vec![],
            (false, false) => self.question("rename_column", change, &format!("column {from}"), true),
            (true, taken) => {
                let mut statements = Vec::new();
                let mut why = "exact by attribute number, catalog only".to_owned();
                if taken {
                    if self.new.column(to).is_some_and(|column| self.old.column(to).is_some_and(|before| before.num == column.num)) {
                        return self.question("rename_column", change, &format!("free name {to}"), true);
                    }
                    let (statement, name) = self.step_aside(to);
                    why = format!("{to} on the shadow is no longer on the owner: it steps aside as {name}, nothing is lost");
                    statements.push(statement);
                }
                statements.push(format!(
                    "ALTER TABLE {} RENAME COLUMN {} TO {}",
                    self.target.qualified(),
                    quote::ident(from),
                    quote::ident(to)
                ));
                let mut draft = self.draft("rename_column", change, "", if taken { 0.96 } else { 0.99 }, &why);
                draft.sql = statements;
                draft.undo =
                    vec![format!("ALTER TABLE {} RENAME COLUMN {} TO {}", self.target.qualified(), quote::ident(to), quote::ident(from))];
                draft.holds_table = true;
                draft.if_rejected = format!("rows that name {to} cannot be applied");
                if self.automatic(&draft) {
                    self.rename_in_target(from, to);
                }
                vec![draft.into()]
            }
        }
    }

    fn rename_in_target(&mut self, from: &str, to: &str) {
        if let Some(column) = self.target.columns.iter_mut().find(|column| column.name == from) {
            column.name = to.to_owned();
        }
    }

    /// Renames a column of the other side that only it has any more, so that its name is free.
    fn step_aside(&mut self, name: &str) -> (String, String) {
        let free = aside(name, |candidate| self.target.column(candidate).is_some() || self.new.column(candidate).is_some());
        let statement = format!("ALTER TABLE {} RENAME COLUMN {} TO {}", self.target.qualified(), quote::ident(name), quote::ident(&free));
        self.rename_in_target(name, &free);
        (statement, free)
    }

    fn rename_constraint(&mut self, from: &str, to: &str) -> Vec<Planned> {
        let Some(constraint) = self.target.constraints.iter_mut().find(|constraint| constraint.name == from) else { return vec![] };
        constraint.name = to.to_owned();
        let action = format!("RENAME CONSTRAINT {} TO {}", quote::ident(from), quote::ident(to));
        let mut draft = self.draft("rename_constraint", format!("constraint {from} was renamed to {to} on the owner"), &action, 0.99, "exact by oid, catalog only");
        draft.undo = vec![format!("ALTER TABLE {} RENAME CONSTRAINT {} TO {}", self.target.qualified(), quote::ident(to), quote::ident(from))];
        vec![draft.into()]
    }

    fn rename_index(&mut self, from: &str, to: &str) -> Vec<Planned> {
        let Some(index) = self.target.indexes.iter_mut().find(|index| index.name == from) else { return vec![] };
        index.name = to.to_owned();
        let mut draft = self.draft("rename_index", format!("index {from} was renamed to {to} on the owner"), "", 0.99, "exact by oid, catalog only");
        let rename = |from: &str, to: &str| format!("ALTER INDEX {} RENAME TO {}", quote::qualified(&self.target.schema, from), quote::ident(to));
        draft.sql = vec![rename(from, to)];
        draft.undo = vec![rename(to, from)];
        vec![draft.into()]
    }

    fn detach(&mut self, parent: &str) -> Vec<Planned> {
        if self.target.parent.is_none() {
            return vec![];
        }
        let name = self.target.qualified();
        let (sql, undo) = if self.target.is_partition {
            let bound = self.target.bound.clone().unwrap_or_default();
            (format!("ALTER TABLE {parent} DETACH PARTITION {name}"), format!("ALTER TABLE {parent} ATTACH PARTITION {name} {bound}"))
        } else {
            (format!("ALTER TABLE {name} NO INHERIT {parent}"), format!("ALTER TABLE {name} INHERIT {parent}"))
        };
        let mut draft = self.draft("detach_partition", format!("{} was detached from {parent} on the owner", self.new.plain()), "", 0.98, "every row is kept");
        draft.sql = vec![sql];
        draft.undo = vec![undo];
        self.target.parent = None;
        vec![draft.into()]
    }

    fn attach(&mut self, parent: &str, bound: &str, partition: bool) -> Vec<Planned> {
        if self.target.parent_name.as_deref() == Some(parent) && self.target.parent.is_some() {
            return vec![];
        }
        let name = self.target.qualified();
        let mut draft = self.draft("attach_partition", format!("{} was attached to {parent} on the owner", self.new.plain()), "", 0.97, "every row is kept");
        draft.sql = vec![if partition {
            format!("ALTER TABLE {parent} ATTACH PARTITION {name} {bound}")
        } else {
            format!("ALTER TABLE {name} INHERIT {parent}")
        }];
        draft.undo =
            vec![if partition { format!("ALTER TABLE {parent} DETACH PARTITION {name}") } else { format!("ALTER TABLE {name} NO INHERIT {parent}") }];
        draft.holds_table = true;
        // Rows that arrived while it was no part of the published parent were not in the stream.
        vec![draft.into()]
    }

    fn drop_constraint(&mut self, constraint: &Constraint) -> Vec<Planned> {
        if !self.target.constraints.iter().any(|found| found.name == constraint.name) {
            return vec![];
        }
        let action = format!("DROP CONSTRAINT {}", quote::ident(&constraint.name));
        let mut draft =
            self.draft("drop_constraint", format!("constraint {} was dropped on the owner", constraint.name), &action, 0.97, "rows are untouched; without it the shadow refuses nothing that the owner takes");
        draft.undo = vec![format!("ALTER TABLE {} ADD CONSTRAINT {} {}", self.target.qualified(), quote::ident(&constraint.name), constraint.def)];
        if self.automatic(&draft) {
            self.target.constraints.retain(|found| found.name != constraint.name);
            self.target.indexes.retain(|index| index.name != constraint.name);
        }
        vec![draft.into()]
    }

    fn add_constraint(&mut self, constraint: &Constraint) -> Vec<Planned> {
        if self.target.constraints.iter().any(|found| found.name == constraint.name) {
            return vec![];
        }
        let table = self.target.qualified();
        let name = quote::ident(&constraint.name);
        let kind = match constraint.kind.as_str() {
            "p" => "add_primary_key",
            "u" => "add_unique",
            "f" => "add_foreign_key",
            "x" => "add_exclusion",
            _ => "add_check",
        };
        let change = format!("constraint {} was added on the owner", constraint.name);
        let undo = vec![format!("ALTER TABLE {table} DROP CONSTRAINT {name}")];
        let mut result = Vec::new();
        if matches!(constraint.kind.as_str(), "p" | "u" | "x") {
            let reused = self.index_that_became(constraint);
            let action = match reused {
                Some(index) => {
                    let word = if constraint.kind == "p" { "PRIMARY KEY" } else { "UNIQUE" };
                    format!("ADD CONSTRAINT {name} {word} USING INDEX {}", quote::ident(&index))
                }
                None => format!("ADD CONSTRAINT {name} {}", constraint.def),
            };
            let mut draft = self.draft(kind, change, &action, 0.97, "the owner's rows satisfy it at this point of the stream, and the shadow's are the same");
            draft.undo = undo;
            if !self.automatic(&draft) {
                return vec![draft.into()];
            }
            result.push(draft.into());
        } else {
            // A foreign key on a partitioned table cannot be NOT VALID before major 18.
            let late = !constraint.def.ends_with("NOT VALID") && !(constraint.kind == "f" && self.target.kind == "p");
            let suffix = if late { " NOT VALID" } else { "" };
            let action = format!("ADD CONSTRAINT {name} {}{suffix}", constraint.def);
            let mut draft = self.draft(kind, change, &action, 0.97, "no row is read under the lock; the check of old rows follows by itself");
            draft.undo = undo;
            let agreed = self.automatic(&draft);
            result.push(draft.into());
            if late && agreed {
                result.extend(self.validate(&constraint.name));
            }
        }
        self.target.constraints.push(constraint.clone());
        result
    }

    /// ADD CONSTRAINT … USING INDEX on the owner: the index keeps its oid and takes the constraint's name.
    fn index_that_became(&self, constraint: &Constraint) -> Option<String> {
        let index = self.new.indexes.iter().find(|index| index.constraint && index.name == constraint.name)?;
        let before = self.old.indexes.iter().find(|before| before.oid == index.oid && !before.constraint)?;
        self.target.indexes.iter().find(|found| found.name == before.name && found.valid && !found.constraint).map(|found| found.name.clone())
    }

    fn validate(&self, constraint: &str) -> Vec<Planned> {
        let action = format!("VALIDATE CONSTRAINT {}", quote::ident(constraint));
        let mut draft = self.draft(
            "validate_constraint",
            format!("constraint {constraint} holds for all rows on the owner"),
            &action,
            0.98,
            "reads the table under a lock that lets writes through",
        );
        draft.outside_transaction = true;
        draft.if_rejected = "the constraint holds for new rows only".into();
        vec![draft.into()]
    }

    fn drop_index(&mut self, index: &Index) -> Vec<Planned> {
        if !self.target.indexes.iter().any(|found| found.name == index.name) {
            return vec![];
        }
        let mut draft = self.draft("drop_index", format!("index {} was dropped on the owner", index.name), "", 0.98, "no data in it, can be built again");
        draft.sql = vec![format!("DROP INDEX IF EXISTS {}", quote::qualified(&self.target.schema, &index.name))];
        draft.undo = vec![index.def.clone()];
        draft.if_rejected = "the index stays on the shadow: reads may be faster there than they will be".into();
        vec![draft.into()]
    }

    fn add_index(&mut self, index: &Index) -> Vec<Planned> {
        if self.target.indexes.iter().any(|found| found.name == index.name && found.valid) {
            return vec![];
        }
        let partitioned = self.target.kind == "p";
        let mut draft = self.draft("create_index", format!("index {} was created on the owner", index.name), "", 0.98, "no data changes; built without blocking writes");
        draft.sql = vec![ddl::create_index(&index.def, partitioned, true)];
        if !partitioned && self.target.indexes.iter().any(|found| found.name == index.name) {
            // left behind invalid by a build that was broken off
            draft.sql.insert(0, format!("DROP INDEX CONCURRENTLY IF EXISTS {}", quote::qualified(&self.target.schema, &index.name)));
        }
        draft.undo = vec![format!("DROP INDEX IF EXISTS {}", quote::qualified(&self.target.schema, &index.name))];
        draft.outside_transaction = !partitioned;
        draft.if_rejected = "reads on the shadow do without the index".into();
        vec![draft.into()]
    }

    fn drop_column(&mut self, column: &Column) -> Vec<Planned> {
        let Some(found) = self.target.column(&column.name).cloned() else { return vec![] };
        let name = quote::ident(&found.name);
        let mut result: Vec<Planned> = Vec::new();
        let fills_itself = found.default.is_some() || !found.identity.is_empty() || !found.generated.is_empty();
        let in_key = self.target.primary_key().contains(&found.name.as_str());
        if found.not_null && !fills_itself && !in_key {
            let mut draft = self.draft(
                "drop_not_null",
                format!("column {} was dropped on the owner and is NOT NULL without a default on the shadow", found.name),
                &format!("ALTER COLUMN {name} DROP NOT NULL"),
                0.99,
                "new rows come without the column; nothing is lost",
            );
            draft.undo = vec![format!("ALTER TABLE {} ALTER COLUMN {name} SET NOT NULL", self.target.qualified())];
            draft.holds_table = true;
            result.push(draft.into());
        }
        let mut draft = self.draft(
            "drop_column",
            format!("column {} ({}) was dropped on the owner", found.name, found.type_name),
            &format!("DROP COLUMN {name}"),
            0.9,
            "dropping it destroys the shadow's values: a person decides",
        );
        let dependents = self.dependents(&found.name);
        if !dependents.is_empty() {
            draft.confidence = 0.4;
            draft.why = format!("{}; {} on the shadow uses it", draft.why, dependents.join(", "));
        }
        draft.loses_data = true;
        draft.holds_table = in_key;
        draft.alternatives = vec!["REJECT: the column stays on the shadow".into()];
        draft.if_rejected = "the column stays on the shadow; rows that come from now on have NULL or its default there".into();
        result.push(draft.into());
        result
    }

    fn dependents(&self, column: &str) -> Vec<String> {
        self.facts.dependents.iter().filter(|(used, _)| used == column).map(|(_, object)| object.clone()).collect()
    }

    /// What rows that were there before the column have in it, if the owner froze it.
    fn frozen(&self, column: &Column) -> Option<String> {
        column.missing.clone().or_else(|| {
            let mut family = self.family.iter().filter(|member| member.parent == Some(self.new.oid) || member.is_partition);
            family.find_map(|member| member.column(&column.name).and_then(|inherited| inherited.missing.clone()))
        })
    }

    fn add_column(&mut self, column: &Column) -> Vec<Planned> {
        let mut statements = Vec::new();
        let change = format!("column {} ({}) was added on the owner", column.name, column.type_name);
        let mut why_aside = String::new();
        if let Some(found) = self.target.column(&column.name) {
            let was_dropped = self.old.column(&column.name).is_some() || self.facts.left_behind.contains(&column.name);
            if !was_dropped {
                if found.type_name == column.type_name {
                    return vec![];
                }
                let mut draft = self.draft(
                    "add_column",
                    change,
                    "",
                    0.4,
                    &format!("the shadow already has a column {} of type {}: mapped on purpose?", column.name, found.type_name),
                );
                draft.alternatives = vec![format!(
                    "ALTER TABLE {} ALTER COLUMN {} TYPE {}",
                    self.target.qualified(),
                    quote::ident(&column.name),
                    ddl::typed(column)
                )];
                draft.if_rejected = "the shadow's own column gets the values as text, as far as it takes them".into();
                return vec![draft.into()];
            }
            let (statement, name) = self.step_aside(&column.name);
            statements.push(statement);
            why_aside = format!("the shadow's old column steps aside as {name}, nothing is lost");
        }
        let table = self.target.qualified();
        let name = quote::ident(&column.name);
        let frozen = self.frozen(column);
        let volatile = self.rewritten & REWRITE_DEFAULT != 0 && column.generated.is_empty() && (column.default.is_some() || !column.identity.is_empty());
        let computed = !column.generated.is_empty() || !column.identity.is_empty();
        let (why, recopy, unfilled) = match (&frozen, &column.default) {
            _ if computed || volatile => {
                statements.push(format!("ALTER TABLE {table} ADD COLUMN {}", ddl::column(column)));
                match column.generated.is_empty() {
                    true => ("old rows got a value each on the owner: they are copied again", true, false),
                    false => ("computed from the row on either side", false, false),
                }
            }
            (Some(literal), default) => {
                let value = ddl::frozen(column, literal);
                let constant = Column { default: Some(value.clone()), ..column.clone() };
                statements.push(format!("ALTER TABLE {table} ADD COLUMN {}", ddl::column(&constant)));
                match default {
                    Some(default) if *default != value => statements.push(format!("ALTER TABLE {table} ALTER COLUMN {name} SET DEFAULT {default}")),
                    Some(_) => {}
                    None => statements.push(format!("ALTER TABLE {table} ALTER COLUMN {name} DROP DEFAULT")),
                }
                ("old rows get exactly the value that the owner froze; no rewrite", false, false)
            }
            (None, default) => {
                // No frozen value and no rewrite: old rows are NULL there (the default came after the column, or there was no row).
                let unfilled = column.not_null && self.facts.has_rows;
                let without = Column { default: None, not_null: column.not_null && !unfilled, ..column.clone() };
                statements.push(format!("ALTER TABLE {table} ADD COLUMN {}", ddl::column(&without)));
                if let Some(default) = default {
                    statements.push(format!("ALTER TABLE {table} ALTER COLUMN {name} SET DEFAULT {default}"));
                }
                ("nothing to fill; catalog only", false, unfilled)
            }
        };
        let why = if why_aside.is_empty() { why.to_owned() } else { format!("{why}; {why_aside}") };
        let mut draft = self.draft("add_column", change, "", if recopy { 0.97 } else { 0.99 }, &why);
        draft.sql = statements;
        draft.undo = vec![format!("ALTER TABLE {table} DROP COLUMN {name}")];
        draft.holds_table = true;
        draft.if_rejected = "rows that carry the column cannot be applied in full".into();
        let agreed = self.automatic(&draft);
        if agreed {
            self.target.columns.push(column.clone());
        }
        let mut result = vec![Planned { draft, recopy }];
        if unfilled {
            let mut draft = self.draft(
                "set_not_null",
                format!("column {} is NOT NULL on the owner, where the table was empty; the shadow has rows", column.name),
                &format!("ALTER COLUMN {name} SET NOT NULL"),
                0.5,
                "the shadow's own rows have no value for it: fill them first (a fill_column proposal follows)",
            );
            draft.if_rejected = "the column stays nullable on the shadow".into();
            result.push(draft.into());
        }
        result
    }

    fn alter_type(&mut self, old: &Column, new: &Column) -> Vec<Planned> {
        let change = format!("the type of column {} changed from {} to {} on the owner", new.name, old.type_name, new.type_name);
        let Some(found) = self.target.column(&new.name).cloned() else {
            return self.question("alter_type", change, &format!("column {}", new.name), false);
        };
        if found.type_name == new.type_name && found.collation == new.collation {
            return vec![];
        }
        let resolve = |catalog: &Catalog, column: &Column| match column.type_kind.as_str() {
            "d" => catalog
                .types
                .values()
                .find(|item| item.oid == column.type_oid)
                .and_then(|item| item.base.clone())
                .map_or((column.type_name.clone(), "d".to_owned()), |base| (base, "b".to_owned())),
            kind => (column.type_name.clone(), kind.to_owned()),
        };
        let labels = |catalog: &Catalog, column: &Column| {
            let item = catalog.types.get(&column.type_oid).filter(|item| item.kind == "e")?;
            Some(item.labels.iter().map(|label| label.label.clone()).collect::<Vec<_>>())
        };
        let planned = retype::plan(&retype::Retype {
            labels: labels(self.catalog, &found).zip(labels(self.source, new)),
            target: &self.target,
            target_column: &found,
            new,
            resolved: (resolve(self.catalog, &found), resolve(self.source, new)),
            plain: self.plain,
            rewritten: self.rewritten & REWRITE_TYPE != 0,
            dependents: &self.dependents(&new.name),
        });
        if self.automatic(&planned.draft) {
            if let Some(column) = self.target.columns.iter_mut().find(|column| column.name == new.name) {
                column.type_name.clone_from(&new.type_name);
                column.type_oid = 0;
                column.type_kind.clone_from(&new.type_kind);
                column.collation.clone_from(&new.collation);
                column.default.clone_from(&new.default);
            }
        }
        vec![planned]
    }

    fn default(&mut self, column: &Column) -> Vec<Planned> {
        let Some(found) = self.target.column(&column.name) else { return vec![] };
        if found.default == column.default {
            return vec![];
        }
        let name = quote::ident(&column.name);
        let action = |default: &Option<String>| match default {
            Some(default) => format!("ALTER COLUMN {name} SET DEFAULT {default}"),
            None => format!("ALTER COLUMN {name} DROP DEFAULT"),
        };
        let mut draft =
            self.draft("set_default", format!("the default of column {} changed on the owner", column.name), &action(&column.default), 0.98, "catalog only; rows from the feed carry their values");
        draft.undo = vec![format!("ALTER TABLE {} {}", self.target.qualified(), action(&found.default))];
        vec![draft.into()]
    }

    fn drop_expression(&mut self, column: &Column) -> Vec<Planned> {
        if self.target.column(&column.name).is_none_or(|found| found.generated.is_empty()) {
            return vec![];
        }
        let action = format!("ALTER COLUMN {} DROP EXPRESSION", quote::ident(&column.name));
        let mut draft = self.draft("drop_expression", format!("column {} is no longer generated on the owner", column.name), &action, 0.97, "values are kept");
        draft.holds_table = true;
        vec![draft.into()]
    }

    fn identity(&mut self, old: &str, column: &Column) -> Vec<Planned> {
        let Some(found) = self.target.column(&column.name) else { return vec![] };
        if found.identity == column.identity {
            return vec![];
        }
        let name = quote::ident(&column.name);
        let word = if column.identity == "a" { "ALWAYS" } else { "BY DEFAULT" };
        let action = match (found.identity.is_empty(), column.identity.is_empty()) {
            (_, true) => format!("ALTER COLUMN {name} DROP IDENTITY IF EXISTS"),
            (true, false) if !found.not_null => format!("ALTER COLUMN {name} SET NOT NULL, ALTER COLUMN {name} ADD GENERATED {word} AS IDENTITY"),
            (true, false) => format!("ALTER COLUMN {name} ADD GENERATED {word} AS IDENTITY"),
            (false, false) => format!("ALTER COLUMN {name} SET GENERATED {word}"),
        };
        let from = if old.is_empty() { "not an identity" } else { "an identity" };
        let draft = self.draft("alter_identity", format!("column {} was {from} column and changed on the owner", column.name), &action, 0.96, "catalog only");
        vec![draft.into()]
    }

    fn set_not_null(&mut self, column: &Column) -> Vec<Planned> {
        let Some(found) = self.target.columns.iter_mut().find(|found| found.name == column.name) else { return vec![] };
        if found.not_null {
            return vec![];
        }
        let name = quote::ident(&column.name);
        let mut draft = self.draft(
            "set_not_null",
            format!("column {} became NOT NULL on the owner", column.name),
            &format!("ALTER COLUMN {name} SET NOT NULL"),
            0.97,
            "the owner has no NULL in it at this point of the stream, and the shadow's rows are the same",
        );
        draft.undo = vec![format!("ALTER TABLE {} ALTER COLUMN {name} DROP NOT NULL", self.target.qualified())];
        vec![draft.into()]
    }

    fn drop_not_null(&mut self, column: &Column) -> Vec<Planned> {
        let in_key = self.target.primary_key().contains(&column.name.as_str());
        let Some(found) = self.target.columns.iter_mut().find(|found| found.name == column.name) else { return vec![] };
        if !found.not_null || in_key {
            return vec![];
        }
        let name = quote::ident(&column.name);
        let mut draft = self.draft(
            "drop_not_null",
            format!("column {} may be NULL on the owner now", column.name),
            &format!("ALTER COLUMN {name} DROP NOT NULL"),
            0.99,
            "catalog only; rows with NULL could not be applied without it",
        );
        draft.undo = vec![format!("ALTER TABLE {} ALTER COLUMN {name} SET NOT NULL", self.target.qualified())];
        draft.holds_table = true;
        if self.automatic(&draft) {
            if let Some(found) = self.target.columns.iter_mut().find(|found| found.name == column.name) {
                found.not_null = false;
            }
        }
        vec![draft.into()]
    }

    fn replace_view(&mut self) -> Vec<Planned> {
        if self.target.definition == self.new.definition {
            return vec![];
        }
        let before: Vec<(&str, &str)> = self.target.columns.iter().map(|column| (column.name.as_str(), column.type_name.as_str())).collect();
        let grows = self
            .new
            .columns
            .iter()
            .map(|column| (column.name.as_str(), column.type_name.as_str()))
            .take(before.len())
            .eq(before.iter().copied());
        let mut draft = self.draft("replace_view", "the view's query changed on the owner".into(), "", 0.97, "no data in it");
        draft.sql = ddl::create_view(self.new, true);
        if !grows && self.new.kind == "v" {
            draft.sql.insert(0, format!("DROP VIEW {}", self.target.qualified()));
        }
        draft.undo = ddl::create_view(&self.target, true);
        vec![draft.into()]
    }
}
