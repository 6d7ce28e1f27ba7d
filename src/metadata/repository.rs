//! The SQLite file and its schema.

use rusqlite::Connection;
use std::{
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// The repository could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum MetadataError {
    /// From SQLite.
    #[error("metadata repository: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// The file belongs to another process.
    #[error("metadata repository {0} is in use by another understudy process: stop it, or give this one its own `metadata` file")]
    InUse(String),
    /// The file was written by a newer version.
    #[error("metadata repository has schema version {found}, this understudy knows {known}: run the newer understudy")]
    Newer {
        /// In the file.
        found: i64,
        /// In the program.
        known: i64,
    },
    /// Asked for something that is not there.
    #[error("{0}")]
    NotFound(String),
    /// A stored document could not be decoded.
    #[error("metadata repository holds a damaged document: {0}")]
    Damaged(#[from] serde_json::Error),
}

const SCHEMA_VERSION: i64 = 1;

const SCHEMA: &str = "
CREATE TABLE event (
    id INTEGER PRIMARY KEY AUTOINCREMENT, at_ms INTEGER NOT NULL, severity TEXT NOT NULL,
    component TEXT NOT NULL, database TEXT NOT NULL, shadow TEXT NOT NULL, message TEXT NOT NULL, data TEXT NOT NULL);
CREATE TABLE proposal (
    id INTEGER PRIMARY KEY AUTOINCREMENT, at_ms INTEGER NOT NULL, database TEXT NOT NULL, shadow TEXT NOT NULL,
    state TEXT NOT NULL, decided_by TEXT NOT NULL DEFAULT '', decided_ms INTEGER NOT NULL DEFAULT 0,
    applied_sql TEXT NOT NULL DEFAULT '', note TEXT NOT NULL DEFAULT '', draft TEXT NOT NULL);
CREATE TABLE ownership (
    database TEXT PRIMARY KEY, epoch INTEGER NOT NULL, owner TEXT NOT NULL, at_ms INTEGER NOT NULL);
CREATE TABLE journal (
    id INTEGER PRIMARY KEY AUTOINCREMENT, database TEXT NOT NULL, run INTEGER NOT NULL, at_ms INTEGER NOT NULL,
    step TEXT NOT NULL, data TEXT NOT NULL);
CREATE TABLE feed (
    database TEXT NOT NULL, shadow TEXT NOT NULL, started INTEGER NOT NULL, at_ms INTEGER NOT NULL,
    PRIMARY KEY (database, shadow));
CREATE TABLE schema_version (
    id INTEGER PRIMARY KEY AUTOINCREMENT, at_ms INTEGER NOT NULL, database TEXT NOT NULL, side TEXT NOT NULL,
    lsn TEXT NOT NULL, catalog TEXT NOT NULL);
";

/// A handle to the repository; clones share the file. Calls are short and block for at most one disk flush.
#[derive(Clone)]
pub struct Repository {
    connection: Arc<Mutex<Connection>>,
}

impl Repository {
    /// Opens or creates the file and takes it for this process alone.
    ///
    /// # Errors
    /// [`MetadataError`]
    pub fn open(path: &Path) -> Result<Self, MetadataError> {
        Ok(Repository { connection: Arc::new(Mutex::new(Self::connect(path)?)) })
    }

    /// Lets the file go, for a process that takes over. What is recorded until [`Repository::take_again`] reaches the log only.
    ///
    /// # Errors
    /// [`MetadataError`]
    pub fn release(&self) -> Result<(), MetadataError> {
        let memory = Connection::open_in_memory()?;
        memory.execute_batch(SCHEMA)?;
        memory.execute_batch(super::measures::SCHEMA)?;
        *self.lock() = memory;
        Ok(())
    }

    /// Opens the file again after [`Repository::release`].
    ///
    /// # Errors
    /// [`MetadataError`]
    pub fn take_again(&self, path: &Path) -> Result<(), MetadataError> {
        let file = Self::connect(path)?;
        *self.lock() = file;
        Ok(())
    }

    fn connect(path: &Path) -> Result<Connection, MetadataError> {
        let connection = Connection::open(path)?;
        connection.busy_timeout(Duration::from_millis(500))?;
        let in_use = |error: rusqlite::Error| match error.sqlite_error_code() {
            Some(rusqlite::ErrorCode::DatabaseBusy) => MetadataError::InUse(path.display().to_string()),
            _ => MetadataError::Sqlite(error),
        };
        connection
            .execute_batch("PRAGMA locking_mode=EXCLUSIVE; PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; BEGIN EXCLUSIVE; COMMIT;")
            .map_err(in_use)?;
        let found: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
        match found {
            0 => connection.execute_batch(&format!("BEGIN; {SCHEMA} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;"))?,
            SCHEMA_VERSION => {}
            found => return Err(MetadataError::Newer { found, known: SCHEMA_VERSION }),
        }
        connection.execute_batch(super::measures::SCHEMA)?;
        Ok(connection)
    }

    /// A repository in memory, for tests.
    ///
    /// # Errors
    /// [`MetadataError`]
    pub fn in_memory() -> Result<Self, MetadataError> {
        let connection = Connection::open_in_memory()?;
        connection.execute_batch(SCHEMA)?;
        connection.execute_batch(super::measures::SCHEMA)?;
        Ok(Repository { connection: Arc::new(Mutex::new(connection)) })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Connection> {
        self.connection.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Milliseconds since 1970.
pub(super) fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_millis() as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_process_is_told_so() {
        let directory = std::env::temp_dir().join(format!("understudy-metadata-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let path = directory.join("understudy.db");
        let first = Repository::open(&path).unwrap();
        assert!(matches!(Repository::open(&path), Err(MetadataError::InUse(_))));
        first.release().unwrap();
        let second = Repository::open(&path).unwrap();
        assert!(matches!(first.take_again(&path), Err(MetadataError::InUse(_))));
        drop(second);
        first.take_again(&path).unwrap();
        assert!(matches!(Repository::open(&path), Err(MetadataError::InUse(_))));
        std::fs::remove_dir_all(directory).unwrap();
    }
}
