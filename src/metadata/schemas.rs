//! Both schemas over time.

use super::{MetadataError, Repository, repository::now_ms};
use crate::lsn::Lsn;
use rusqlite::OptionalExtension;

/// Versions kept of one side: each is a whole catalog.
const VERSIONS_MAX: i64 = 200;

/// A stored version of one side's schema.
#[derive(Clone, Debug, PartialEq)]
pub struct SchemaVersion {
    /// Ascending.
    pub id: i64,
    /// Milliseconds since 1970.
    pub at_ms: i64,
    /// Database.
    pub database: String,
    /// `source@<shadow>`: the source at that feed's place; the shadow's name: the shadow.
    pub side: String,
    /// Place in the owner's stream.
    pub lsn: Lsn,
}

impl Repository {
    /// Stores a version of one side's schema (`side`: `source` or the shadow's name), unless it equals the newest.
    ///
    /// # Errors
    /// [`MetadataError`]
    pub fn store_schema(&self, database: &str, side: &str, lsn: Lsn, catalog: &serde_json::Value) -> Result<(), MetadataError> {
        if self.newest_schema(database, side)?.is_some_and(|(_, stored)| stored == *catalog) {
            return Ok(());
        }
        self.lock().execute(
            "INSERT INTO schema_version (at_ms, database, side, lsn, catalog) VALUES (?1,?2,?3,?4,?5)",
            (now_ms(), database, side, lsn.to_string(), catalog.to_string()),
        )?;
        self.lock().execute(
            "DELETE FROM schema_version WHERE database=?1 AND side=?2 AND id <=
             (SELECT id FROM schema_version WHERE database=?1 AND side=?2 ORDER BY id DESC LIMIT 1 OFFSET ?3)",
            (database, side, VERSIONS_MAX),
        )?;
        Ok(())
    }

    /// All stored versions of a database's schemas, oldest first.
    ///
    /// # Errors
    /// [`MetadataError`]
    pub fn schema_versions(&self, database: &str) -> Result<Vec<SchemaVersion>, MetadataError> {
        let connection = self.lock();
        let mut statement =
            connection.prepare_cached("SELECT id, at_ms, database, side, lsn FROM schema_version WHERE database=?1 ORDER BY id")?;
        let rows = statement.query_map([database], |row| {
            let lsn: String = row.get(4)?;
            let (id, at_ms, database, side) = (row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?);
            Ok(SchemaVersion { id, at_ms, database, side, lsn: lsn.parse().unwrap_or_default() })
        })?;
        rows.map(|row| row.map_err(MetadataError::Sqlite)).collect()
    }

    /// One stored version, with its document.
    ///
    /// # Errors
    /// [`MetadataError::NotFound`]
    pub fn schema_version(&self, id: i64) -> Result<serde_json::Value, MetadataError> {
        let stored: Option<String> =
            self.lock().query_row("SELECT catalog FROM schema_version WHERE id=?1", [id], |row| row.get(0)).optional()?;
        let stored = stored.ok_or_else(|| {
            MetadataError::NotFound(format!("there is no stored version {id} of a schema: SHOW SCHEMA VERSIONS lists them"))
        })?;
        Ok(serde_json::from_str(&stored)?)
    }

    /// The newest version of one side's schema.
    ///
    /// # Errors
    /// [`MetadataError`]
    pub fn newest_schema(&self, database: &str, side: &str) -> Result<Option<(Lsn, serde_json::Value)>, MetadataError> {
        let stored: Option<(String, String)> = self
            .lock()
            .query_row(
                "SELECT lsn, catalog FROM schema_version WHERE database=?1 AND side=?2 ORDER BY id DESC LIMIT 1",
                (database, side),
                |row| Ok((row.get(0)?, row.get(1)?)),
            )
            .optional()?;
        stored.map(|(lsn, catalog)| Ok((lsn.parse().unwrap_or_default(), serde_json::from_str(&catalog)?))).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_kept_and_old_ones_go() {
        let repository = Repository::in_memory().unwrap();
        for number in 0..VERSIONS_MAX + 5 {
            repository.store_schema("shop", "pg18", Lsn(number as u64), &serde_json::json!({ "number": number })).unwrap();
        }
        repository.store_schema("shop", "source@pg18", Lsn(7), &serde_json::json!({})).unwrap();
        repository.store_schema("shop", "source@pg18", Lsn(8), &serde_json::json!({})).unwrap();
        let versions = repository.schema_versions("shop").unwrap();
        assert_eq!(versions.len() as i64, VERSIONS_MAX + 1, "the same again is no version");
        assert_eq!(versions[0].lsn, Lsn(5));
        assert_eq!(repository.schema_version(versions[0].id).unwrap()["number"], 5);
        assert!(matches!(repository.schema_version(1), Err(MetadataError::NotFound(_))));
    }
}
