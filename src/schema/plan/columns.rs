//! Plans for the columns of one table.

use super::{Planned, TablePlanner, ddl, retype};
use crate::schema::{
    catalog::{Catalog, Column},
    quote,
};

/// `pg_event_trigger_table_rewrite_reason`: a volatile default.
const REWRITE_DEFAULT: i32 = 2;
/// `pg_event_trigger_table_rewrite_reason`: a type change.
const REWRITE_TYPE: i32 = 4;

impl TablePlanner<'_> {
    pub(super) fn drop_column(&mut self, column: &Column) -> Vec<Planned> {
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

    pub(super) fn dependents(&self, column: &str) -> Vec<String> {
        self.facts.dependents.iter().filter(|(used, _)| used == column).map(|(_, object)| object.clone()).collect()
    }

    /// What rows that were there before the column have in it, if the owner froze it.
    fn frozen(&self, column: &Column) -> Option<String> {
        column.missing.clone().or_else(|| {
            let mut family = self.family.iter().filter(|member| member.parent == Some(self.new.oid) || member.is_partition);
            family.find_map(|member| member.column(&column.name).and_then(|inherited| inherited.missing.clone()))
        })
    }

    pub(super) fn add_column(&mut self, column: &Column) -> Vec<Planned> {
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
        let volatile = self.rewritten & REWRITE_DEFAULT != 0
            && column.generated.is_empty()
            && (column.default.is_some() || !column.identity.is_empty());
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
                    Some(default) if *default != value => {
                        statements.push(format!("ALTER TABLE {table} ALTER COLUMN {name} SET DEFAULT {default}"))
                    }
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

    pub(super) fn alter_type(&mut self, old: &Column, new: &Column) -> Vec<Planned> {
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
        if self.automatic(&planned.draft)
            && let Some(column) = self.target.columns.iter_mut().find(|column| column.name == new.name)
        {
            column.type_name.clone_from(&new.type_name);
            column.type_oid = 0;
            column.type_kind.clone_from(&new.type_kind);
            column.collation.clone_from(&new.collation);
            column.default.clone_from(&new.default);
        }
        vec![planned]
    }

    pub(super) fn default(&mut self, column: &Column) -> Vec<Planned> {
        let Some(found) = self.target.column(&column.name) else { return vec![] };
        if found.default == column.default {
            return vec![];
        }
        let name = quote::ident(&column.name);
        let action = |default: &Option<String>| match default {
            Some(default) => format!("ALTER COLUMN {name} SET DEFAULT {default}"),
            None => format!("ALTER COLUMN {name} DROP DEFAULT"),
        };
        let mut draft = self.draft(
            "set_default",
            format!("the default of column {} changed on the owner", column.name),
            &action(&column.default),
            0.98,
            "catalog only; rows from the feed carry their values",
        );
        draft.undo = vec![format!("ALTER TABLE {} {}", self.target.qualified(), action(&found.default))];
        vec![draft.into()]
    }

    pub(super) fn drop_expression(&mut self, column: &Column) -> Vec<Planned> {
        if self.target.column(&column.name).is_none_or(|found| found.generated.is_empty()) {
            return vec![];
        }
        let action = format!("ALTER COLUMN {} DROP EXPRESSION", quote::ident(&column.name));
        let mut draft = self.draft(
            "drop_expression",
            format!("column {} is no longer generated on the owner", column.name),
            &action,
            0.97,
            "values are kept",
        );
        draft.holds_table = true;
        vec![draft.into()]
    }

    pub(super) fn identity(&mut self, old: &str, column: &Column) -> Vec<Planned> {
        let Some(found) = self.target.column(&column.name) else { return vec![] };
        if found.identity == column.identity {
            return vec![];
        }
        let name = quote::ident(&column.name);
        let word = if column.identity == "a" { "ALWAYS" } else { "BY DEFAULT" };
        let action = match (found.identity.is_empty(), column.identity.is_empty()) {
            (_, true) => format!("ALTER COLUMN {name} DROP IDENTITY IF EXISTS"),
            (true, false) if !found.not_null => {
                format!("ALTER COLUMN {name} SET NOT NULL, ALTER COLUMN {name} ADD GENERATED {word} AS IDENTITY")
            }
            (true, false) => format!("ALTER COLUMN {name} ADD GENERATED {word} AS IDENTITY"),
            (false, false) => format!("ALTER COLUMN {name} SET GENERATED {word}"),
        };
        let from = if old.is_empty() { "not an identity" } else { "an identity" };
        let draft = self.draft(
            "alter_identity",
            format!("column {} was {from} column and changed on the owner", column.name),
            &action,
            0.96,
            "catalog only",
        );
        vec![draft.into()]
    }

    pub(super) fn set_not_null(&mut self, column: &Column) -> Vec<Planned> {
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

    pub(super) fn drop_not_null(&mut self, column: &Column) -> Vec<Planned> {
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
        if self.automatic(&draft)
            && let Some(found) = self.target.columns.iter_mut().find(|found| found.name == column.name)
        {
            found.not_null = false;
        }
        vec![draft.into()]
    }
}
