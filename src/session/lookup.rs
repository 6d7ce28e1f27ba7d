//! What the owner of the writes knows about a role's password, asked with the auth query and remembered for a while.

use crate::{
    auth::Stored,
    backend::{BackendError, Connection},
    traffic::database::Database,
};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

/// A changed password is noticed after this time at the latest; at once by whoever fails with the old one.
const REMEMBERED: Duration = Duration::from_secs(30);
/// Names remembered; an attacker's invented ones make it start over.
const NAMES_MAX: usize = 10_000;

type Known = HashMap<(String, String), (Instant, Option<Arc<Stored>>)>;

/// Shared by all sessions.
#[derive(Default)]
pub(super) struct Lookup {
    known: Mutex<Known>,
    /// One connection for each database, opened when needed: however many clients come at once, the server sees one.
    lines: Mutex<HashMap<String, Arc<Line>>>,
}

/// The connection to a database's owner, and the epoch of that ownership.
type Line = tokio::sync::Mutex<Option<(i64, Connection)>>;

impl Lookup {
    /// The stored secret of a role; `None`: no such role, or it has none.
    pub async fn find(&self, database: &Database, query: &str, user: &str) -> Result<Option<Arc<Stored>>, BackendError> {
        let key = (database.name.clone(), user.to_owned());
        if let Some((since, stored)) = self.lock().get(&key)
            && since.elapsed() < REMEMBERED
        {
            return Ok(stored.clone());
        }
        if user.contains('\0') {
            return Ok(None);
        }
        let stored = self.ask(database, query, user).await?;
        let mut known = self.lock();
        if known.len() >= NAMES_MAX {
            known.clear();
        }
        known.insert(key, (Instant::now(), stored.clone()));
        Ok(stored)
    }

    /// It did not fit: the next one is asked for anew.
    pub fn forget(&self, database: &Database, user: &str) {
        self.lock().remove(&(database.name.clone(), user.to_owned()));
    }

    /// After a reload.
    pub fn forget_all(&self) {
        self.lock().clear();
    }

    async fn ask(&self, database: &Database, query: &str, user: &str) -> Result<Option<Arc<Stored>>, BackendError> {
        let line = {
            let mut lines = self.lines.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            lines.entry(database.name.clone()).or_default().clone()
        };
        let mut line = line.lock().await;
        database.gate.wait_open().await;
        let route = database.route.load_full();
        // taken out for the time of the query: one that is given up half-way is not used again
        if let Some((epoch, mut connection)) = line.take()
            && epoch == route.epoch
            && let Ok(rows) = connection.query(query, &[user]).await
        {
            *line = Some((epoch, connection));
            return Ok(secret(rows));
        }
        // what a client says about its session (search_path, options) has no part in this one (CVE-2025-12819)
        let mut connection = Connection::open(&route.owner.url, &[(b"application_name", b"understudy auth")]).await?;
        let rows = connection.query(query, &[user]).await?;
        *line = Some((route.epoch, connection));
        Ok(secret(rows))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// The second column of the first row.
fn secret(rows: Vec<Vec<Option<String>>>) -> Option<Arc<Stored>> {
    let text = rows.into_iter().next()?.into_iter().nth(1)??;
    Stored::parse(&text).map(Arc::new)
}
