//! Who owns the writes of a database, and the journal of the cutovers that change it.

use super::{MetadataError, Repository, repository::now_ms};
use rusqlite::OptionalExtension;
use serde::{Deserialize, Serialize};

/// The owner of a database's writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Owner {
    /// The configured source.
    Source,
    /// The shadow of that name.
    Shadow(String),
}

impl std::fmt::Display for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Owner::Source => f.write_str("source"),
            Owner::Shadow(name) => f.write_str(name),
        }
    }
}

/// Ownership with its version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ownership {
    /// Grows by one with each change of owner.
    pub epoch: i64,
    /// Who.
    pub owner: Owner,
}

/// One step of a cutover or rollback, written before the step is taken.
#[derive(Clone, Debug, PartialEq)]
pub struct JournalEntry {
    /// Ascending.
    pub id: i64,
    /// All entries of one cutover share it.
    pub run: i64,
    /// Milliseconds since 1970.
    pub at_ms: i64,
    /// Name of the step.
    pub step: String,
    /// What the step needs to be repeated or undone.
    pub data: serde_json::Value,
}

impl Repository {
    /// Who owns the writes; the source, epoch 0, where nothing is stored.
    ///
    /// # Errors
    /// [`MetadataError`]
    pub fn ownership(&self, database: &str) -> Result<Ownership, MetadataError> {
        let stored: Option<(i64, String)> = self
            .lock()
            .query_row("SELECT epoch, owner FROM ownership WHERE database=?1", [database], |row| Ok((row.get(0)?, row.get(1)?)))
            .optional()?;
        Ok(match stored {
            None => Ownership { epoch: 0, owner: Owner::Source },
            Some((epoch, owner)) => Ownership { epoch, owner: serde_json::from_str(&owner)? },
        })
    }

    /// Makes `owner` the owner and journals it in one transaction: the point of no return of a cutover.
    ///
    /// # Errors
    /// [`MetadataError`]
    pub fn flip(&self, database: &str, run: i64, owner: &Owner) -> Result<Ownership, MetadataError> {
        let epoch = self.ownership(database)?.epoch + 1;
        let mut connection = self.lock();
        let transaction = connection.transaction()?;
        transaction.execute(
            "INSERT INTO ownership (database, epoch, owner, at_ms) VALUES (?1,?2,?3,?4)
             ON CONFLICT (database) DO UPDATE SET epoch=excluded.epoch, owner=excluded.owner, at_ms=excluded.at_ms",
            (database, epoch, serde_json::to_string(owner)?, now_ms()),
        )?;
        transaction.execute(
            "INSERT INTO journal (database, run, at_ms, step, data) VALUES (?1,?2,?3,'flipped',?4)",
            (database, run, now_ms(), serde_json::json!({"epoch": epoch, "owner": owner}).to_string()),
        )?;
        transaction.commit()?;
        Ok(Ownership { epoch, owner: owner.clone() })
    }

    /// A new epoch with the same owner: sessions connect to it anew.
    ///
    /// # Errors
    /// [`MetadataError`]
    pub fn renew(&self, database: &str) -> Result<Ownership, MetadataError> {
        let Ownership { epoch, owner } = self.ownership(database)?;
        self.lock().execute(
            "INSERT INTO ownership (database, epoch, owner, at_ms) VALUES (?1,?2,?3,?4)
             ON CONFLICT (database) DO UPDATE SET epoch=excluded.epoch, at_ms=excluded.at_ms",
            (database, epoch + 1, serde_json::to_string(&owner)?, now_ms()),
        )?;
        Ok(Ownership { epoch: epoch + 1, owner })
    }

    /// Remembers that an operator started (or stopped) a shadow, so that a restart goes on with it.
    ///
    /// # Errors
    /// [`MetadataError`]
    pub fn set_started(&self, database: &str, shadow: &str, started: bool) -> Result<(), MetadataError> {
        self.lock().execute(
            "INSERT INTO feed (database, shadow, started, at_ms) VALUES (?1,?2,?3,?4)
             ON CONFLICT (database, shadow) DO UPDATE SET started=excluded.started, at_ms=excluded.at_ms",
            (database, shadow, started, now_ms()),
        )?;
        Ok(())
    }

    /// Whether an operator has started a shadow.
    ///
    /// # Errors
    /// [`MetadataError`]
    pub fn is_started(&self, database: &str, shadow: &str) -> Result<bool, MetadataError> {
        let stored: Option<bool> = self
            .lock()
            .query_row("SELECT started FROM feed WHERE database=?1 AND shadow=?2", [database, shadow], |row| row.get(0))
            .optional()?;
        Ok(stored.unwrap_or(false))
    }

    /// A number for a new cutover of this database.
    ///
    /// # Errors
    /// [`MetadataError`]
    pub fn next_run(&self, database: &str) -> Result<i64, MetadataError> {
        Ok(self.lock().query_row("SELECT coalesce(max(run), 0) + 1 FROM journal WHERE database=?1", [database], |row| row.get(0))?)
    }

    /// Writes a step into the journal. On disk when this returns.
    ///
    /// # Errors
    /// [`MetadataError`]
    pub fn journal(&self, database: &str, run: i64, step: &str, data: serde_json::Value) -> Result<(), MetadataError> {
        self.lock().execute(
            "INSERT INTO journal (database, run, at_ms, step, data) VALUES (?1,?2,?3,?4,?5)",
            (database, run, now_ms(), step, data.to_string()),
        )?;
        Ok(())
    }

    /// The entries of the newest cutover of a database, in order; empty if there was none.
    ///
    /// # Errors
    /// [`MetadataError`]
    pub fn last_run(&self, database: &str) -> Result<Vec<JournalEntry>, MetadataError> {
        let connection = self.lock();
        let mut statement = connection.prepare_cached(
            "SELECT id, run, at_ms, step, data FROM journal
             WHERE database=?1 AND run=(SELECT max(run) FROM journal WHERE database=?1) ORDER BY id",
        )?;
        let rows = statement.query_map([database], |row| {
            let data: String = row.get(4)?;
            Ok(JournalEntry {
                id: row.get(0)?,
                run: row.get(1)?,
                at_ms: row.get(2)?,
                step: row.get(3)?,
                data: serde_json::from_str(&data).unwrap_or(serde_json::Value::Null),
            })
        })?;
        rows.map(|row| row.map_err(MetadataError::Sqlite)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flip_is_stored_with_its_journal_entry() {
        let repository = Repository::in_memory().unwrap();
        assert_eq!(repository.ownership("shop").unwrap(), Ownership { epoch: 0, owner: Owner::Source });
        let run = repository.next_run("shop").unwrap();
        repository.journal("shop", run, "hold", serde_json::json!({})).unwrap();
        repository.flip("shop", run, &Owner::Shadow("pg18".into())).unwrap();
        assert_eq!(repository.ownership("shop").unwrap(), Ownership { epoch: 1, owner: Owner::Shadow("pg18".into()) });
        let steps: Vec<_> = repository.last_run("shop").unwrap().into_iter().map(|entry| entry.step).collect();
        assert_eq!(steps, ["hold", "flipped"]);
        assert_eq!(repository.next_run("shop").unwrap(), run + 1);
    }
}
