//! Events: what happened, to which database and shadow, and what to do next. An alert is an event that wants a person.

use super::{MetadataError, Repository, repository::now_ms};
use serde::{Deserialize, Serialize};

/// How urgent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// For the record.
    Info,
    /// A person should look at it soon.
    Warning,
    /// A person should look at it now.
    Alert,
}

impl Severity {
    /// Lower-case word.
    pub fn as_str(self) -> &'static str {
        match self {
            Severity::Info => "info",
            Severity::Warning => "warning",
            Severity::Alert => "alert",
        }
    }
}

/// One event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Ascending.
    pub id: i64,
    /// Milliseconds since 1970.
    pub at_ms: i64,
    /// How urgent.
    pub severity: Severity,
    /// `proxy`, `traffic`, `cdc`, `schema`, `cutover`, `validate`, `monitor`, `config`
    pub component: String,
    /// Database, or empty.
    pub database: String,
    /// Shadow, or empty.
    pub shadow: String,
    /// For people: what happened and what to do next. No row values, literals or secrets.
    pub message: String,
    /// For scripts: the figures that led to it.
    pub data: serde_json::Value,
}

impl Repository {
    /// Records an event and logs it. A repository that cannot be written is logged, never an error for the caller:
    /// serving and reverting must work without it.
    pub fn record(&self, severity: Severity, component: &str, database: &str, shadow: &str, message: &str, data: serde_json::Value) {
        match severity {
            Severity::Info => tracing::info!(component, database, shadow, %data, "{message}"),
            Severity::Warning => tracing::warn!(component, database, shadow, %data, "{message}"),
            Severity::Alert => tracing::error!(component, database, shadow, %data, "{message}"),
        }
        let stored = self.lock().execute(
            "INSERT INTO event (at_ms, severity, component, database, shadow, message, data) VALUES (?1,?2,?3,?4,?5,?6,?7)",
            (now_ms(), severity.as_str(), component, database, shadow, message, data.to_string()),
        );
        if let Err(error) = stored {
            tracing::error!(%error, "cannot record an event in the metadata repository");
        }
    }

    /// The newest `limit` events with an id above `after`, oldest first; `alerts_only`: severity alert only.
    ///
    /// # Errors
    /// [`MetadataError`]
    pub fn events(&self, after: i64, limit: usize, alerts_only: bool) -> Result<Vec<Event>, MetadataError> {
        let connection = self.lock();
        let mut statement = connection.prepare_cached(
            "SELECT * FROM (SELECT id, at_ms, severity, component, database, shadow, message, data FROM event
             WHERE id > ?1 AND (NOT ?2 OR severity = 'alert') ORDER BY id DESC LIMIT ?3) ORDER BY id",
        )?;
        let rows = statement.query_map((after, alerts_only, limit as i64), |row| {
            let severity: String = row.get(2)?;
            let data: String = row.get(7)?;
            Ok(Event {
                id: row.get(0)?,
                at_ms: row.get(1)?,
                severity: match severity.as_str() {
                    "alert" => Severity::Alert,
                    "warning" => Severity::Warning,
                    _ => Severity::Info,
                },
                component: row.get(3)?,
                database: row.get(4)?,
                shadow: row.get(5)?,
                message: row.get(6)?,
                data: serde_json::from_str(&data).unwrap_or(serde_json::Value::Null),
            })
        })?;
        rows.map(|row| row.map_err(MetadataError::Sqlite)).collect()
    }
}
