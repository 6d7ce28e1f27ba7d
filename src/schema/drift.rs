//! Differences between the owner and the shadow that the stream does not explain: made by hand on the shadow, or refused. Shown, and turned into
//! proposals where something can be done.

use super::{
    Adapter, SchemaError,
    catalog::{Catalog, Column, Table},
    experience,
    fill::{Order, predicted},
    model::Model,
    plan::{ddl, draft},
    quote,
};
use crate::metadata::{Proposal, ProposalDraft};
use serde::Serialize;
use std::collections::BTreeSet;
use tokio_postgres::Client;

/// One difference, for SHOW DRIFT.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct DriftRow {
    /// `schema.table` or `schema.table.column`
    pub object: String,
    /// `table only on the shadow`, `column only on the source`, `type`, `not null`, `default`, `index …`, `constraint …`
    pub kind: String,
    /// On the source; empty: not there.
    pub source: String,
    /// On the shadow; empty: not there.
    pub shadow: String,
    /// The newest proposal about the object, if any.
    pub proposal: Option<i64>,
    /// Percent: how probable it is that the source's table changes within about 20 migrations. The rows are in this order.
    pub changes_soon: Option<u8>,
}

fn row(object: String, kind: &str, source: &str, shadow: &str) -> DriftRow {
    DriftRow { object, kind: kind.to_owned(), source: source.to_owned(), shadow: shadow.to_owned(), proposal: None, changes_soon: None }
}

fn column_rows(source: &Table, shadow: &Table, rows: &mut Vec<DriftRow>) {
    let object = |column: &Column| format!("{}.{}", shadow.plain(), column.name);
    for column in &source.columns {
        let Some(twin) = shadow.column(&column.name) else {
            rows.push(row(object(column), "column only on the source", &column.type_name, ""));
            continue;
        };
        let word = |not_null: bool| if not_null { "NOT NULL" } else { "NULL allowed" };
        if column.type_name != twin.type_name {
            rows.push(row(object(column), "type", &column.type_name, &twin.type_name));
        }
        if column.not_null != twin.not_null {
            rows.push(row(object(column), "not null", word(column.not_null), word(twin.not_null)));
        }
        if column.default.is_some() != twin.default.is_some() {
            // the expressions themselves are spelled differently by different majors, and may hold literals
            let word = |column: &Column| if column.default.is_some() { "has a default" } else { "no default" };
            rows.push(row(object(column), "default", word(column), word(twin)));
        }
    }
    for column in shadow.columns.iter().filter(|column| source.column(&column.name).is_none()) {
        rows.push(row(object(column), "column only on the shadow", "", &column.type_name));
    }
}

fn part_rows(source: &Table, shadow: &Table, rows: &mut Vec<DriftRow>) {
    let names = |table: &Table| {
        let indexes = table
            .indexes
            .iter()
            .filter(|index| index.valid && !index.constraint && !index.inherited)
            .map(|index| ("index", index.name.clone()));
        let constraints = table.constraints.iter().filter(|item| !item.inherited).map(|item| ("constraint", item.name.clone()));
        indexes.chain(constraints).collect::<BTreeSet<_>>()
    };
    let (on_source, on_shadow) = (names(source), names(shadow));
    for (kind, name) in on_source.difference(&on_shadow) {
        rows.push(row(format!("{}.{name}", source.plain()), &format!("{kind} only on the source"), name, ""));
    }
    for (kind, name) in on_shadow.difference(&on_source) {
        rows.push(row(format!("{}.{name}", shadow.plain()), &format!("{kind} only on the shadow"), "", name));
    }
}

/// Tables that will probably change soon come first: a difference there is the next that breaks something.
fn order_by_urgency(rows: &mut [DriftRow], source: &Catalog, seen: &[Proposal]) {
    let soon = Model::shipped().soon.tables(source, seen);
    let of = |row: &DriftRow| {
        let own =
            |table: &&String| row.object == **table || row.object.strip_prefix(table.as_str()).is_some_and(|rest| rest.starts_with('.'));
        soon.iter().filter(|(table, _)| own(table)).max_by_key(|(table, _)| table.len()).map(|(_, p)| *p)
    };
    // stable: within a table as they were
    rows.sort_by(|a, b| of(b).unwrap_or(-1.0).total_cmp(&of(a).unwrap_or(-1.0)));
    rows.iter_mut().for_each(|row| row.changes_soon = of(row).map(|p| (p * 100.0).round() as u8));
}

/// All differences of two catalogs, by name.
pub fn compare(source: &Catalog, shadow: &Catalog) -> Vec<DriftRow> {
    let mut rows = Vec::new();
    let kind = |table: &Table| if table.is_view() { "view" } else { "table" };
    for table in source.tables.values() {
        match shadow.table(&table.schema, &table.name) {
            None => rows.push(row(table.plain(), &format!("{} only on the source", kind(table)), kind(table), "")),
            Some(twin) if table.holds_rows() => {
                column_rows(table, twin, &mut rows);
                part_rows(table, twin, &mut rows);
            }
            Some(_) => {}
        }
    }
    for table in shadow.tables.values().filter(|table| source.table(&table.schema, &table.name).is_none()) {
        rows.push(row(table.plain(), &format!("{} only on the shadow", kind(table)), "", kind(table)));
    }
    rows.sort();
    rows
}

impl Adapter {
    /// Differences now. What is merely on its way in the stream is left out: a difference counts only if it is one against the source as it is and
    /// against the source as it was at the shadow's place in the stream.
    async fn differences(&self, source: &Client, shadow: &Client) -> Result<(Vec<DriftRow>, Catalog, Catalog), SchemaError> {
        // The memory first: what the stream brings after this moment is missing from both comparisons alike.
        let memory = match self.memory.lock().await.as_ref() {
            Some(memory) => memory.catalog.clone(),
            None => self.recall()?.catalog,
        };
        let (source, shadow) = (Catalog::load(source).await?, Catalog::load(shadow).await?);
        // What differs on purpose is no drift.
        let rules = self.rules.load();
        let source = rules.as_on_shadow(&source);
        let memory = if self.back { memory } else { rules.as_on_shadow(&memory) };
        let mut rows = compare(&source, &shadow);
        if !memory.tables.is_empty() {
            let then = compare(&memory, &shadow);
            rows.retain(|row| then.iter().any(|other| (&other.object, &other.kind) == (&row.object, &row.kind)));
        }
        Ok((rows, source, shadow))
    }

    /// What differs between the source and the shadow, for SHOW DRIFT.
    ///
    /// # Errors
    /// [`SchemaError`]
    pub async fn drift(&self, source: &Client, shadow: &Client) -> Result<Vec<DriftRow>, SchemaError> {
        let (mut rows, source_catalog, _) = self.differences(source, shadow).await?;
        let proposals = self.repository.proposals(Some(&self.database))?;
        for row in &mut rows {
            let about = |object: &str| row.object == object || row.object.strip_prefix(object).is_some_and(|rest| rest.starts_with('.'));
            row.proposal = proposals.iter().rev().find(|one| one.shadow == self.shadow && about(&one.draft.object)).map(|one| one.id);
        }
        order_by_urgency(&mut rows, &source_catalog, &proposals);
        Ok(rows)
    }

    /// Proposes what can be done about drift made on the shadow, once for each finding: columns without data that only the shadow has
    /// (`fill_column`), columns there that would refuse the feed's rows, and tables and columns that it lacks. Returns the ids of new proposals.
    /// To be called every few seconds: a difference must be there in two calls, because between `adapt` and the applier's commit it is none.
    ///
    /// # Errors
    /// [`SchemaError`]
    pub async fn shadow_drift(&self, source: &Client, shadow: &Client) -> Result<Vec<i64>, SchemaError> {
        let (mut rows, source_catalog, shadow_catalog) = self.differences(source, shadow).await?;
        self.keep_version(&shadow_catalog).await?;
        {
            let key = |row: &DriftRow| (row.object.clone(), row.kind.clone());
            let mut before = self.seen_before.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let now: BTreeSet<_> = rows.iter().map(key).collect();
            rows.retain(|row| before.contains(&key(row)));
            *before = now;
        }
        let known = self.repository.proposals(Some(&self.database))?;
        let mut ids = Vec::new();
        for row in rows {
            for mut draft in self.remedy(&row, &source_catalog, &shadow_catalog, shadow).await? {
                experience::learn_from(&known, &mut draft);
                let seen = known.iter().any(|one| {
                    let about_column = one.draft.kind == "drop_column"
                        && one.draft.object == draft.object
                        && one.draft.sql.iter().any(|sql| same_column(sql, &row.object));
                    let same = one.draft.kind == draft.kind && one.draft.object == draft.object && one.draft.change == draft.change;
                    let missing = draft.kind == "missing_table" && one.draft.object == draft.object && one.draft.kind == "create_table";
                    let coming = draft.kind == "missing_column"
                        && one.draft.kind == "add_column"
                        && one.draft.object == draft.object
                        && one.draft.change.starts_with(&format!("column {} ", last_name(&row.object)));
                    one.shadow == self.shadow && (same || about_column || missing || coming)
                });
                if !seen {
                    ids.push(self.repository.propose(&self.database, &self.shadow, &draft)?);
                }
            }
        }
        Ok(ids)
    }

    async fn remedy(
        &self,
        row: &DriftRow,
        source: &Catalog,
        shadow_catalog: &Catalog,
        shadow: &Client,
    ) -> Result<Vec<ProposalDraft>, SchemaError> {
        match row.kind.as_str() {
            "table only on the source" => {
                let Some(table) = source.tables.values().find(|table| table.plain() == row.object) else { return Ok(vec![]) };
                let mut missing = draft(
                    &row.object,
                    "missing_table",
                    format!("table {} is on the owner and not on the shadow", row.object),
                    ddl::create_table(table),
                    0.5,
                    "left out on purpose, or lost: its rows must be copied again",
                );
                missing.if_rejected = "the table stays away from the shadow".into();
                Ok(vec![missing])
            }
            "column only on the source" => {
                let found = source.tables.values().find_map(|table| Some((table, column_named(table, &row.object)?)));
                let Some((table, column)) = found else { return Ok(vec![]) };
                let nullable = Column { not_null: false, ..column.clone() };
                let sql = vec![format!("ALTER TABLE {} ADD COLUMN {}", table.qualified(), ddl::column(&nullable))];
                let change = format!("column {} ({}) of the owner is missing on the shadow", column.name, column.type_name);
                Ok(vec![draft(
                    &table.plain(),
                    "missing_column",
                    change,
                    sql,
                    0.6,
                    "left out on purpose, or lost: the table's rows must be copied again",
                )])
            }
            "column only on the shadow" => {
                let found = shadow_catalog.tables.values().find_map(|table| Some((table, column_named(table, &row.object)?)));
                let Some((table, column)) = found else { return Ok(vec![]) };
                if !table.holds_rows() || table.is_partition || column.name.contains("_dropped_") {
                    return Ok(vec![]);
                }
                self.shadow_column(source, table, column, shadow_catalog, shadow).await
            }
            _ => Ok(vec![]),
        }
    }

    async fn shadow_column(
        &self,
        source: &Catalog,
        table: &Table,
        column: &Column,
        shadow_catalog: &Catalog,
        shadow: &Client,
    ) -> Result<Vec<ProposalDraft>, SchemaError> {
        if !column.generated.is_empty() || !column.identity.is_empty() {
            return Ok(vec![]);
        }
        let name = quote::ident(&column.name);
        let (class, p_class, p_null, why) =
            predicted(source, table, column, &experience::lessons(&self.repository.proposals(Some(&self.database))?));
        let mut drafts = Vec::new();
        if column.not_null && column.default.is_none() {
            let value = constant_of(class, column);
            let mut refuse = draft(
                &table.plain(),
                "shadow_not_null",
                format!(
                    "column {} ({}) exists on the shadow only and is NOT NULL without a default: the feed's rows fail",
                    column.name, column.type_name
                ),
                match &value {
                    Some(value) => vec![format!("ALTER TABLE {} ALTER COLUMN {name} SET DEFAULT {value}", table.qualified())],
                    None => vec![format!("ALTER TABLE {} ALTER COLUMN {name} DROP NOT NULL", table.qualified())],
                },
                if value.is_some() { p_class } else { 0.5 },
                &why,
            );
            refuse.alternatives = vec![format!("ALTER TABLE {} ALTER COLUMN {name} DROP NOT NULL", table.qualified())];
            refuse.holds_table = true;
            refuse.if_rejected = "new rows of the table cannot be applied".into();
            drafts.push(refuse);
        }
        let empty = format!("SELECT EXISTS (SELECT FROM {} WHERE {name} IS NULL)", table.qualified());
        let lacks: bool =
            shadow.query_one(&empty, &[]).await.map_err(|error| SchemaError::server("look for rows without a value", error))?.get(0);
        if !lacks {
            return Ok(drafts);
        }
        let order = Order {
            schema: table.schema.clone(),
            table: table.name.clone(),
            column: column.name.clone(),
            class: class.to_owned(),
            not_null: column.not_null,
        };
        let generator = self.generator(shadow_catalog, table, column, class, shadow).await?;
        // Is a value wanted at all, and is it this one? Where values are free to choose, any plausible one will do.
        let written = self.rules.load().fill(&table.schema, &table.name, &column.name).is_some();
        let wanted = if written { 1.0 } else { 1.0 - p_null };
        let (confidence, how) = match &generator {
            Some(generator) => (wanted, generator.why.clone()),
            None => (0.0, "no plausible values: give your own UPDATE".to_owned()),
        };
        let mut fill = draft(
            &table.plain(),
            "fill_column",
            format!("column {} ({}) exists on the shadow only, and its rows have no value", column.name, column.type_name),
            if generator.is_some() { vec![order.to_sql()] } else { vec![] },
            (confidence * 1000.0).round() / 1000.0,
            &format!("{why}; {how}"),
        );
        fill.undo = vec![format!("UPDATE {} SET {name} = NULL", table.qualified())];
        fill.alternatives =
            vec!["REJECT: the rows stay NULL".into(), format!("APPROVE id AS 'UPDATE {} SET {name} = …'", table.qualified())];
        fill.outside_transaction = true;
        fill.if_rejected = "the column stays NULL for these rows; reads that use it differ from the source anyway".into();
        drafts.push(fill);
        Ok(drafts)
    }
}

/// The last part of `schema.table.column`.
fn last_name(object: &str) -> &str {
    object.rsplit('.').next().unwrap_or(object)
}

fn column_named<'a>(table: &'a Table, object: &str) -> Option<&'a Column> {
    let name = object.strip_prefix(&table.plain())?.strip_prefix('.')?;
    table.column(name)
}

/// `sql` drops the column that `object` (`schema.table.column`) names.
fn same_column(sql: &str, object: &str) -> bool {
    sql.ends_with(&format!("DROP COLUMN {}", quote::ident(last_name(object))))
}

/// A default that stands for a class.
fn constant_of(class: &str, column: &Column) -> Option<String> {
    let text = match class {
        "false" | "true" => return Some(class.to_owned()),
        "zero" => return Some("0".into()),
        "one" => return Some("1".into()),
        "now" => return Some("now()".into()),
        "empty_str" => "",
        "empty_obj" => "{}",
        "empty_array" if column.type_name.starts_with("json") => "[]",
        "empty_array" => "{}",
        _ => return None,
    };
    Some(format!("{}::{}", quote::literal(text), column.type_name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn catalog(columns: &[(&str, &str)]) -> Catalog {
        let columns = columns.iter().enumerate().map(|(at, (name, type_name))| Column {
            num: at as i16 + 1,
            name: (*name).into(),
            type_name: (*type_name).into(),
            ..Column::default()
        });
        let table =
            Table { oid: 1, schema: "public".into(), name: "t".into(), kind: "r".into(), columns: columns.collect(), ..Table::default() };
        Catalog { tables: [(1, table)].into(), ..Catalog::default() }
    }

    #[test]
    fn differences_are_named() {
        let rows = compare(&catalog(&[("a", "text"), ("b", "integer")]), &catalog(&[("b", "bigint"), ("c", "text")]));
        let found: Vec<(&str, &str)> = rows.iter().map(|row| (row.object.as_str(), row.kind.as_str())).collect();
        assert_eq!(
            found,
            [("public.t.a", "column only on the source"), ("public.t.b", "type"), ("public.t.c", "column only on the shadow")]
        );
        assert!(compare(&catalog(&[("a", "text")]), &catalog(&[("a", "text")])).is_empty());
    }
}
