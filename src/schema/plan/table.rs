//! Plans for the changes of one table, against the table as it is on the other side.

use super::{Planned, ddl, draft};
use crate::metadata::ProposalDraft;
use crate::schema::{
    catalog::{Catalog, Constraint, Index, Table},
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

    pub(super) fn automatic(&self, draft: &ProposalDraft) -> bool {
        let case = policy::Case { confidence: draft.confidence, loses_data: draft.loses_data, has_sql: !draft.sql.is_empty() };
        policy::automatic(case, self.auto_approve)
    }

    pub(super) fn draft(&self, kind: &str, change: String, action: &str, confidence: f64, why: &str) -> ProposalDraft {
        let sql = if action.is_empty() { vec![] } else { vec![format!("ALTER TABLE {} {action}", self.target.qualified())] };
        draft(&self.target.plain(), kind, change, sql, confidence, why)
    }

    /// The other side lacks what the change is about: somebody mapped it, or an earlier proposal waits.
    pub(super) fn question(&self, kind: &str, change: String, missing: &str, hold: bool) -> Vec<Planned> {
        let mut draft =
            self.draft(kind, change, "", 0.4, &format!("the shadow has no {missing}: mapped on purpose, or an earlier proposal waits"));
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
                let mut draft =
                    self.draft("drop_trigger", format!("trigger {} was dropped on the owner", trigger.name), "", 0.97, "no data in it");
                draft.sql = vec![format!("DROP TRIGGER IF EXISTS {} ON {}", quote::ident(&trigger.name), self.target.qualified())];
                draft.undo = vec![trigger.def.clone()];
                vec![draft.into()]
            }
            Change::AddTrigger(trigger) => {
                let mut draft = self.draft(
                    "create_trigger",
                    format!("trigger {} was created on the owner", trigger.name),
                    "",
                    0.96,
                    "does not fire for the feed's rows",
                );
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
                vec![
                    self.draft(
                        "alter_trigger",
                        format!("trigger {} was switched on the owner", trigger.name),
                        &action,
                        0.96,
                        "catalog only",
                    )
                    .into(),
                ]
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
                let draft =
                    self.draft("set_persistence", "the table's persistence changed on the owner".into(), action, 0.96, "every row is kept");
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
        draft.undo =
            vec![format!("ALTER TABLE {} SET SCHEMA {}", quote::qualified(to, &self.target.name), quote::ident(&self.target.schema))];
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
        let mut undo =
            vec![format!("ALTER TABLE {} RENAME TO {}", quote::qualified(&self.target.schema, to), quote::ident(&self.target.name))];
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

    pub(super) fn rename_in_target(&mut self, from: &str, to: &str) {
        if let Some(column) = self.target.columns.iter_mut().find(|column| column.name == from) {
            column.name = to.to_owned();
        }
    }

    /// Renames a column of the other side that only it has any more, so that its name is free.
    pub(super) fn step_aside(&mut self, name: &str) -> (String, String) {
        let free = aside(name, |candidate| self.target.column(candidate).is_some() || self.new.column(candidate).is_some());
        let statement = format!("ALTER TABLE {} RENAME COLUMN {} TO {}", self.target.qualified(), quote::ident(name), quote::ident(&free));
        self.rename_in_target(name, &free);
        (statement, free)
    }

    fn rename_constraint(&mut self, from: &str, to: &str) -> Vec<Planned> {
        let Some(constraint) = self.target.constraints.iter_mut().find(|constraint| constraint.name == from) else { return vec![] };
        constraint.name = to.to_owned();
        let action = format!("RENAME CONSTRAINT {} TO {}", quote::ident(from), quote::ident(to));
        let mut draft = self.draft(
            "rename_constraint",
            format!("constraint {from} was renamed to {to} on the owner"),
            &action,
            0.99,
            "exact by oid, catalog only",
        );
        draft.undo =
            vec![format!("ALTER TABLE {} RENAME CONSTRAINT {} TO {}", self.target.qualified(), quote::ident(to), quote::ident(from))];
        vec![draft.into()]
    }

    fn rename_index(&mut self, from: &str, to: &str) -> Vec<Planned> {
        let Some(index) = self.target.indexes.iter_mut().find(|index| index.name == from) else { return vec![] };
        index.name = to.to_owned();
        let mut draft =
            self.draft("rename_index", format!("index {from} was renamed to {to} on the owner"), "", 0.99, "exact by oid, catalog only");
        let rename =
            |from: &str, to: &str| format!("ALTER INDEX {} RENAME TO {}", quote::qualified(&self.target.schema, from), quote::ident(to));
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
        let mut draft = self.draft(
            "detach_partition",
            format!("{} was detached from {parent} on the owner", self.new.plain()),
            "",
            0.98,
            "every row is kept",
        );
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
        let mut draft = self.draft(
            "attach_partition",
            format!("{} was attached to {parent} on the owner", self.new.plain()),
            "",
            0.97,
            "every row is kept",
        );
        draft.sql = vec![if partition {
            format!("ALTER TABLE {parent} ATTACH PARTITION {name} {bound}")
        } else {
            format!("ALTER TABLE {name} INHERIT {parent}")
        }];
        draft.undo = vec![if partition {
            format!("ALTER TABLE {parent} DETACH PARTITION {name}")
        } else {
            format!("ALTER TABLE {name} NO INHERIT {parent}")
        }];
        draft.holds_table = true;
        // Rows that arrived while it was no part of the published parent were not in the stream.
        vec![draft.into()]
    }

    fn drop_constraint(&mut self, constraint: &Constraint) -> Vec<Planned> {
        if !self.target.constraints.iter().any(|found| found.name == constraint.name) {
            return vec![];
        }
        let action = format!("DROP CONSTRAINT {}", quote::ident(&constraint.name));
        let mut draft = self.draft(
            "drop_constraint",
            format!("constraint {} was dropped on the owner", constraint.name),
            &action,
            0.97,
            "rows are untouched; without it the shadow refuses nothing that the owner takes",
        );
        draft.undo =
            vec![format!("ALTER TABLE {} ADD CONSTRAINT {} {}", self.target.qualified(), quote::ident(&constraint.name), constraint.def)];
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
            let mut draft = self.draft(
                kind,
                change,
                &action,
                0.97,
                "the owner's rows satisfy it at this point of the stream, and the shadow's are the same",
            );
            draft.undo = undo;
            if !self.automatic(&draft) {
                return vec![draft.into()];
            }
            result.push(draft.into());
        } else {
            // A foreign key on a partitioned table cannot be NOT VALID before major 18.
            let at_once = constraint.kind == "f" && self.target.kind == "p";
            let late = !at_once && !constraint.def.ends_with("NOT VALID");
            let suffix = if late { " NOT VALID" } else { "" };
            let action = format!("ADD CONSTRAINT {name} {}{suffix}", constraint.def);
            let mut draft =
                self.draft(kind, change, &action, 0.97, "no row is read under the lock; the check of old rows follows by itself");
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
        self.target
            .indexes
            .iter()
            .find(|found| found.name == before.name && found.valid && !found.constraint)
            .map(|found| found.name.clone())
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
        let mut draft = self.draft(
            "drop_index",
            format!("index {} was dropped on the owner", index.name),
            "",
            0.98,
            "no data in it, can be built again",
        );
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
        let mut draft = self.draft(
            "create_index",
            format!("index {} was created on the owner", index.name),
            "",
            0.98,
            "no data changes; built without blocking writes",
        );
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

    fn replace_view(&mut self) -> Vec<Planned> {
        if self.target.definition == self.new.definition {
            return vec![];
        }
        let before: Vec<(&str, &str)> =
            self.target.columns.iter().map(|column| (column.name.as_str(), column.type_name.as_str())).collect();
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
