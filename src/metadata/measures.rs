//! What was measured, kept for a while: resource use, profiles of statements, forecasts, reports. Documents with a time.

use super::{MetadataError, Repository, repository::now_ms};
use serde_json::Value;

/// Reports and forecasts kept of a shadow, whatever their age: they are few, and looked up months later.
const NEWEST_KEPT: i64 = 50;

/// Part of the schema since version 1; made where it is missing, so that a file of an older program keeps working with both.
pub(super) const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS measure (
    id INTEGER PRIMARY KEY AUTOINCREMENT, at_ms INTEGER NOT NULL, kind TEXT NOT NULL, database TEXT NOT NULL,
    shadow TEXT NOT NULL, data TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS measure_place ON measure (kind, database, shadow, at_ms);
";

/// What a document is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MeasureKind {
    /// A server's resource use; `shadow` names the server, empty is the source.
    Resources,
    /// Statements of a shadow.
    Profile,
    /// A point of the curve that forecasts are made from.
    Point,
    /// A forecast, and later how true it was.
    Forecast,
    /// Why a statement is slower.
    Finding,
    /// A readiness report.
    Report,
}

impl MeasureKind {
    fn as_str(self) -> &'static str {
        match self {
            MeasureKind::Resources => "resources",
            MeasureKind::Profile => "profile",
            MeasureKind::Point => "point",
            MeasureKind::Forecast => "forecast",
            MeasureKind::Finding => "finding",
            MeasureKind::Report => "report",
        }
    }

    /// Few and small: the newest stay.
    fn stays(self) -> bool {
        matches!(self, MeasureKind::Forecast | MeasureKind::Report | MeasureKind::Finding)
    }
}

/// A document.
#[derive(Clone, Debug, PartialEq)]
pub struct Measure {
    /// Ascending.
    pub id: i64,
    /// Milliseconds since 1970.
    pub at_ms: i64,
    /// Shadow, or empty for the source.
    pub shadow: String,
    /// The document.
    pub data: Value,
}

impl Repository {
    /// Keeps a document.
    ///
    /// # Errors
    /// [`MetadataError`]
    pub fn keep(&self, kind: MeasureKind, database: &str, shadow: &str, data: &Value) -> Result<i64, MetadataError> {
        let connection = self.lock();
        connection.execute(
            "INSERT INTO measure (at_ms, kind, database, shadow, data) VALUES (?1,?2,?3,?4,?5)",
            (now_ms(), kind.as_str(), database, shadow, data.to_string()),
        )?;
        Ok(connection.last_insert_rowid())
    }

    /// Writes over a document: a forecast gets its truth.
    ///
    /// # Errors
    /// [`MetadataError`]
    pub fn amend(&self, id: i64, data: &Value) -> Result<(), MetadataError> {
        self.lock().execute("UPDATE measure SET data = ?2 WHERE id = ?1", (id, data.to_string()))?;
        Ok(())
    }

    /// The newest `limit` documents of a kind, oldest first.
    ///
    /// # Errors
    /// [`MetadataError`]
    pub fn measures(&self, kind: MeasureKind, database: &str, shadow: &str, limit: usize) -> Result<Vec<Measure>, MetadataError> {
        let connection = self.lock();
        let mut statement = connection.prepare_cached(
            "SELECT * FROM (SELECT id, at_ms, shadow, data FROM measure WHERE kind = ?1 AND database = ?2 AND shadow = ?3
             ORDER BY at_ms DESC, id DESC LIMIT ?4) ORDER BY at_ms, id",
        )?;
        let rows = statement.query_map((kind.as_str(), database, shadow, i64::try_from(limit).unwrap_or(i64::MAX)), |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get::<_, String>(3)?))
        })?;
        rows.map(|row| {
            let (id, at_ms, shadow, data) = row?;
            Ok(Measure { id, at_ms, shadow, data: serde_json::from_str(&data)? })
        })
        .collect()
    }

    /// Forgets what is older than `age_ms`, and all but the newest of what stays. Returns how many.
    ///
    /// # Errors
    /// [`MetadataError`]
    pub fn forget_measures(&self, age_ms: i64) -> Result<usize, MetadataError> {
        self.forget_measures_before(now_ms().saturating_sub(age_ms))
    }

    fn forget_measures_before(&self, before_ms: i64) -> Result<usize, MetadataError> {
        let connection = self.lock();
        let kinds = [
            MeasureKind::Resources,
            MeasureKind::Profile,
            MeasureKind::Point,
            MeasureKind::Forecast,
            MeasureKind::Finding,
            MeasureKind::Report,
        ];
        let mut gone = 0;
        for kind in kinds {
            gone += if kind.stays() {
                connection.execute(
                    "DELETE FROM measure WHERE id IN (SELECT id FROM (SELECT id, row_number() OVER (PARTITION BY database, shadow ORDER BY id DESC) AS place
                     FROM measure WHERE kind = ?1) WHERE place > ?2)",
                    (kind.as_str(), NEWEST_KEPT),
                )?
            } else {
                connection.execute("DELETE FROM measure WHERE kind = ?1 AND at_ms < ?2", (kind.as_str(), before_ms))?
            };
        }
        Ok(gone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn documents_come_back_are_amended_and_forgotten() {
        let repository = Repository::in_memory().unwrap();
        for number in 0..60 {
            repository.keep(MeasureKind::Resources, "shop", "", &json!({"n": number})).unwrap();
            repository.keep(MeasureKind::Report, "shop", "pg18", &json!({"n": number})).unwrap();
        }
        let id = repository.keep(MeasureKind::Forecast, "shop", "pg18", &json!({"truth": null})).unwrap();
        repository.amend(id, &json!({"truth": 7})).unwrap();
        let newest = |kind, shadow| repository.measures(kind, "shop", shadow, 2).unwrap();
        assert_eq!(newest(MeasureKind::Forecast, "pg18")[0].data, json!({"truth": 7}));
        let resources = newest(MeasureKind::Resources, "");
        assert_eq!(resources.iter().map(|measure| measure.data["n"].clone()).collect::<Vec<_>>(), [58, 59]);
        assert!(repository.measures(MeasureKind::Resources, "other", "", 9).unwrap().is_empty());
        assert_eq!(repository.forget_measures(3_600_000).unwrap(), 10, "all but 50 reports");
        assert_eq!(repository.forget_measures_before(i64::MAX).unwrap(), 60, "the resources");
        assert_eq!(repository.measures(MeasureKind::Report, "shop", "pg18", 99).unwrap().len(), 50);
    }
}
