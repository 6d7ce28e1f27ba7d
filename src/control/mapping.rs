//! A shadow whose schema differs on purpose, and both schemas over time, as operators see them.

use super::{
    Controller,
    commands::connect,
    managed::{Managed, ManagedShadow},
    show::{row, table, utc},
};
use crate::{
    console::{Answer, CommandError},
    metadata::SchemaVersion,
    schema::{DriftRow, catalog::Catalog, mapping::Mapping, version_difference},
};
use serde_json::{Value, json};

impl Controller {
    /// The mapping as both servers have it now; `None`: the schema is the source's.
    async fn mapping_of(&self, managed: &Managed, shadow: &ManagedShadow) -> Result<Option<Mapping>, CommandError> {
        let rules = shadow.rules.load_full();
        if !rules.existing {
            return Ok(None);
        }
        let failed = |error: String| CommandError::Failed(error);
        let source = connect(&managed.config.load().source, "understudy mapping").await.map_err(|error| failed(error.to_string()))?;
        let target = connect(&shadow.config.load().url, "understudy mapping").await.map_err(|error| failed(error.to_string()))?;
        let source = Catalog::load(&source).await.map_err(|error| failed(error.to_string()))?;
        let target = Catalog::load(&target).await.map_err(|error| failed(error.to_string()))?;
        match Mapping::new(rules.written(), &source, &target) {
            Ok(mapping) => Ok(Some(mapping)),
            Err(wrong) => Err(CommandError::Refused(format!("the mapping of {} does not fit: {}", shadow.name(), wrong.join(". ")))),
        }
    }

    /// What the way back from a shadow would not give back.
    pub(super) async fn losses(&self, managed: &Managed, shadow: &ManagedShadow) -> Result<Vec<String>, CommandError> {
        Ok(self.mapping_of(managed, shadow).await?.map(|mapping| mapping.losses()).unwrap_or_default())
    }

    /// `SHOW SCHEMA VERSIONS`
    pub(super) fn schema_versions(&self) -> Result<Answer, CommandError> {
        let mut rows = Vec::new();
        for managed in &self.databases {
            let versions =
                self.repository.schema_versions(&managed.database.name).map_err(|error| CommandError::Failed(error.to_string()))?;
            let cells = |version: SchemaVersion| {
                row([
                    json!(version.id),
                    json!(version.database),
                    json!(version.side),
                    json!(version.lsn.to_string()),
                    json!(utc(version.at_ms)),
                ])
            };
            rows.extend(versions.into_iter().map(cells));
        }
        Ok(table(&["version", "database", "side", "lsn", "at"], rows))
    }

    /// `SHOW SCHEMA DIFF`
    pub(super) fn schema_diff(&self, before: i64, after: i64) -> Result<Answer, CommandError> {
        let found = version_difference(&self.repository, before, after).map_err(|error| CommandError::Unknown(error.to_string()))?;
        let cells = |one: DriftRow| {
            // "only on the source" is what the earlier version alone has.
            let kind = one.kind.replace("only on the source", "only before").replace("only on the shadow", "only after");
            row([json!(one.object), json!(kind), json!(one.source), json!(one.shadow)])
        };
        Ok(table(&["object", "kind", "before", "after"], found.into_iter().map(cells).collect()))
    }

    /// `SHOW MAPPING`
    pub(super) async fn show_mapping(&self) -> Result<Answer, CommandError> {
        let mut rows = Vec::new();
        for managed in &self.databases {
            for shadow in &managed.shadows {
                let Some(mapping) = self.mapping_of(managed, shadow).await? else { continue };
                for mapped in mapping.tables() {
                    let (here, there) =
                        (format!("{}.{}", mapped.source.0, mapped.source.1), format!("{}.{}", mapped.shadow.0, mapped.shadow.1));
                    let mut add = |source: String, target: Value, way_there: &str, way_back: &str, lossless: bool| {
                        rows.push(row([json!(shadow.name()), json!(source), target, json!(way_there), json!(way_back), json!(lossless)]));
                    };
                    for column in &mapped.columns {
                        let way = |written: bool, verdict: &str| if written { "by an expression".to_owned() } else { verdict.to_owned() };
                        add(
                            format!("{here}.{}", column.source),
                            json!(format!("{there}.{}", column.shadow)),
                            &way(column.written.0, column.there.explain()),
                            &way(column.written.1, if column.written.0 { "no expression leads back" } else { column.back.explain() }),
                            column.lossless(),
                        );
                    }
                    for column in &mapped.left_out {
                        add(format!("{here}.{column}"), Value::Null, "left out", "rows written on the shadow have no value", false);
                    }
                    for column in &mapped.added {
                        let back = "what is written there stays on the shadow";
                        add(String::new(), json!(format!("{there}.{column}")), "its default or synthetic values", back, true);
                    }
                }
            }
        }
        Ok(table(&["shadow", "source", "target", "there", "back", "lossless"], rows))
    }
}
