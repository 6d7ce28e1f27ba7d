//! A follower whose schema differs on purpose ([`crate::schema::mapping`]): where the stream's tables and columns go there, and the copy into
//! tables that are there already. Without rules nothing in here changes anything.

use super::{
    CdcError, Direction, FeedSpec,
    applier::Applier,
    error::Attempt,
    names::{ident, literal, qualified},
    pgoutput::Relation,
    plan::{TargetColumn, TargetTable, Using},
    session,
    shared::{Shared, TableName},
};
use crate::{
    lsn::Lsn,
    metadata::Severity,
    schema::{
        catalog::Catalog,
        mapping::{Mapping, Place, Rules},
    },
};
use tokio_postgres::Client;

/// Rows with which an expression and its way back are tried before a copy.
const PROBE_ROWS: usize = 100_000;

impl FeedSpec {
    /// From the shadow to the source.
    fn back(&self) -> bool {
        self.direction == Direction::Reverse
    }

    /// Where a table of the owner goes on the follower; `None`: nothing is written about it.
    pub(super) fn place(&self, table: &TableName) -> Option<Place> {
        self.rules.load().place(self.back(), &table.0, &table.1).cloned()
    }

    /// Its name on the follower.
    pub(super) fn name_there(&self, table: &TableName) -> TableName {
        self.place(table).map_or_else(|| table.clone(), |place| (place.schema, place.table))
    }

    /// The owner's name of a table of the follower.
    pub(super) fn name_here(&self, table: &TableName) -> TableName {
        let rules = self.rules.load();
        rules.place(!self.back(), &table.0, &table.1).map_or_else(|| table.clone(), |place| (place.schema.clone(), place.table.clone()))
    }

    /// The shadow has a schema of its own.
    pub(super) fn existing(&self) -> bool {
        self.rules.load().existing
    }
}

impl Applier {
    /// The rows of this table do not go to the follower: it is left out there, or, on the way back, only the shadow has it.
    pub(super) async fn passed_over(&mut self, table: &TableName) -> Result<bool, CdcError> {
        if !self.shared.spec.existing() {
            return Ok(false);
        }
        if let Some(known) = self.passed_over.get(table) {
            return Ok(*known);
        }
        let passed = match self.shared.spec.place(table) {
            Some(place) => place.left_out,
            None => self.shared.spec.back() && self.target_table(table).await?.is_none(),
        };
        if passed && self.shared.spec.back() {
            let message = format!("{}.{} exists only on the shadow: its rows do not go back to the source", table.0, table.1);
            self.shared.event(Severity::Warning, &message, serde_json::json!({"table": format!("{}.{}", table.0, table.1)}));
        }
        self.passed_over.insert(table.clone(), passed);
        Ok(passed)
    }

    /// A relation under the follower's names, and the follower's table.
    pub(super) async fn fit(&self, relation: &Relation, table: &TableName) -> Result<(Relation, Option<TargetTable>), CdcError> {
        let Some(place) = self.shared.spec.place(table) else {
            // Rows that waited may have been sent under the name that their table had then.
            let named = Relation { schema: table.0.clone(), name: table.1.clone(), ..relation.clone() };
            return Ok((named, self.target_table(table).await?));
        };
        let mut target = self.target_table(&(place.schema.clone(), place.table.clone())).await?;
        let mut fitted = Relation { schema: place.schema.clone(), name: place.table.clone(), ..relation.clone() };
        let Some(there) = target.as_mut() else { return Ok((fitted, None)) };
        for column in &mut fitted.columns {
            let goes = place.column(&column.name);
            let Some(name) = goes.name else {
                // A name that nothing can have, for a column that is never written.
                column.name.push_str("\u{0} (left out)");
                let nowhere =
                    TargetColumn { type_name: "text".into(), generated: true, identity_always: false, listable: true, using: None };
                there.columns.insert(column.name.clone(), nowhere);
                continue;
            };
            if let (Some(expression), Some(found)) = (goes.using, there.columns.get_mut(name)) {
                let type_name = self.type_of(table, &column.name).await?;
                found.using = Some(Using { column: column.name.clone(), type_name, expression: expression.to_owned() });
            }
            column.name = name.to_owned();
        }
        Ok((fitted, target))
    }

    /// The type of an owner's column, as the engine knows it.
    async fn type_of(&self, table: &TableName, column: &str) -> Result<String, CdcError> {
        let known = self.shared.adapter.known().await?;
        let found = known.table(&table.0, &table.1).and_then(|table| table.column(column)).map(|column| column.type_name.clone());
        found.ok_or_else(|| CdcError::Protocol(format!("the type of {}.{}.{column} is not known yet", table.0, table.1)))
    }
}

/// The two COPY commands of a part that goes into a table with a place of its own: text, because types may differ.
pub(super) fn copy_commands(
    rules: &Rules,
    direction: Direction,
    table: &TableName,
    from: &str,
    columns: &[String],
    range: &str,
) -> (String, String) {
    let (mut out, mut into) = (Vec::new(), Vec::new());
    let place = rules.place(direction == Direction::Reverse, &table.0, &table.1);
    for column in columns {
        match place.map(|place| place.column(column)) {
            None => {
                out.push(ident(column));
                into.push(ident(column));
            }
            Some(goes) => {
                let Some(name) = goes.name else { continue };
                out.push(goes.using.map_or_else(|| ident(column), |expression| format!("({expression})")));
                into.push(ident(name));
            }
        }
    }
    let name = place.map_or_else(|| qualified(&table.0, &table.1), |place| qualified(&place.schema, &place.table));
    (format!("COPY (SELECT {} FROM {from}{range}) TO STDOUT", out.join(", ")), format!("COPY {name} ({}) FROM STDIN", into.join(", ")))
}

/// A copy into tables that are there: checks the mapping whole and that they are empty, writes down that their rows will be ours, and stores the
/// position.
pub(super) async fn adopt(shared: &Shared, keeper: &Client, follower: &Client, consistent: Lsn) -> Result<(), CdcError> {
    let rules = shared.spec.rules.load_full();
    let (source, shadow) = (Catalog::load(keeper).await?, Catalog::load(follower).await?);
    let refused = |reasons: Vec<String>| {
        CdcError::Setup(format!("the shadow's schema does not fit its mapping; nothing was changed. {}", reasons.join(". ")))
    };
    let mapping = Mapping::new(rules.written(), &source, &shadow).map_err(refused)?;
    probe(&rules, &mapping, &source, &shadow, keeper).await.map_err(refused)?;
    let mut full = Vec::new();
    for table in mapping.tables() {
        let name = qualified(&table.shadow.0, &table.shadow.1);
        let row =
            follower.query_one(&format!("SELECT EXISTS (SELECT FROM {name})"), &[]).await.attempt("look into the follower's tables")?;
        if row.get(0) {
            full.push(name);
        }
    }
    if !full.is_empty() {
        return Err(CdcError::Setup(format!(
            "the follower {} has rows in {}: nothing was touched. Empty the tables there, or give the shadow another database",
            shared.spec.to,
            full.join(", ")
        )));
    }
    let losses = mapping.losses();
    if !losses.is_empty() {
        let message = "the mapping loses something on the way there and back: a rollback is refused unless it is told to accept that";
        shared.event(Severity::Warning, message, serde_json::json!({"losses": losses}));
    }
    let feed = literal(&shared.feed);
    let list: Vec<String> =
        mapping.tables().map(|table| format!("({feed}, 'rows', {})", literal(&qualified(&table.shadow.0, &table.shadow.1)))).collect();
    let mut sql = "BEGIN;".to_owned();
    if !list.is_empty() {
        sql.push_str(&format!("INSERT INTO understudy.copied_table (feed, kind, ident) VALUES {};", list.join(", ")));
    }
    sql.push_str(&format!(
        "INSERT INTO understudy.copy_schema (feed, post_data) VALUES ({feed}, '');
         UPDATE understudy.progress SET phase = 'loading', commit_lsn = '{consistent}', end_lsn = '{consistent}', at = now() WHERE feed = {feed};
         COMMIT"
    ));
    let writer = session::connect_writer(&shared.spec.to, "copy schema").await?;
    writer.batch_execute(&sql).await.attempt("store the feed's progress")
}

/// Tries the expressions that are written down on real rows of the owner, and whether the way back gives the same value again.
async fn probe(rules: &Rules, mapping: &Mapping, source: &Catalog, shadow: &Catalog, keeper: &Client) -> Result<(), Vec<String>> {
    let mut wrong = Vec::new();
    for rule in rules.written() {
        let mapped =
            mapping.tables().find(|table| rules.place(false, &table.source.0, &table.source.1).is_some() && named(rule, &table.source));
        let Some(mapped) = mapped else { continue };
        let (Some(from), Some(to)) = (source.table(&mapped.source.0, &mapped.source.1), shadow.table(&mapped.shadow.0, &mapped.shadow.1))
        else {
            continue;
        };
        for (column, there) in &rule.using {
            let Some(goes) = mapped.columns.iter().find(|mapped| mapped.source == *column) else { continue };
            let type_there = to.column(&goes.shadow).map(|column| column.type_name.clone()).unwrap_or_default();
            let rows = format!(
                "SELECT {0} AS understudy_before, ({there})::{type_there} AS {1} FROM (SELECT {0} FROM {2} LIMIT {PROBE_ROWS}) r",
                ident(column),
                ident(&goes.shadow),
                from.qualified()
            );
            let differs = match rule.back.get(column) {
                Some(back) => format!("({back})::text IS DISTINCT FROM understudy_before::text"),
                None => "false".to_owned(),
            };
            let sql = format!("SELECT count(*) FILTER (WHERE {differs}), count({}) FROM ({rows}) p", ident(&goes.shadow));
            // A savepoint: an expression that fails must not cost the snapshot.
            let place = format!("proxy.toml line {}: ", rule.line);
            if let Err(error) = keeper.batch_execute("SAVEPOINT probe").await {
                return Err(vec![super::describe(&error)]);
            }
            match keeper.query_one(&sql, &[]).await {
                Ok(row) if row.get::<_, i64>(0) == 0 => {}
                Ok(row) => wrong.push(format!(
                    "{place}`back` of {}.{column} does not give the value again that `using` was given, in {} of the first rows",
                    from.plain(),
                    row.get::<_, i64>(0)
                )),
                Err(error) => {
                    wrong.push(format!(
                        "{place}an expression of {}.{column} cannot be computed: {}",
                        from.plain(),
                        super::describe(&error)
                    ));
                }
            }
            if let Err(error) = keeper.batch_execute("ROLLBACK TO SAVEPOINT probe").await {
                return Err(vec![super::describe(&error)]);
            }
        }
    }
    if wrong.is_empty() { Ok(()) } else { Err(wrong) }
}

fn named(rule: &crate::schema::mapping::Rule, table: &TableName) -> bool {
    rule.source == format!("{}.{}", table.0, table.1) || (table.0 == "public" && rule.source == table.1)
}

/// Tables that have no place on the follower.
pub(super) fn left_out(rules: &Rules, table: &TableName) -> bool {
    rules.place(false, &table.0, &table.1).is_some_and(|place| place.left_out)
}
