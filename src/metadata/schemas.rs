//! Both schemas over time.

use super::{MetadataError, Repository, repository::now_ms};
use crate::lsn::Lsn;
use rusqlite::OptionalExtension;

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
        Ok(())
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
