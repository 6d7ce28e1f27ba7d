//! What feeds of ours have left on servers (a process that was killed and never started again, a shadow taken out of proxy.toml), and
//! taking it away. What is active, and what a feed of this installation uses, stays.

use super::{
    CdcError,
    error::Attempt,
    install::{self, PER_FEED, with_lock},
    names::{PREFIX, SCHEMA, database_prefix, ident},
    session,
};
use crate::{config::ServerUrl, schema::capture};
use tokio_postgres::Client;

/// One thing of ours on a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftover {
    /// `replication slot`, `publication`, `event trigger`, `progress` or `schema`.
    pub kind: String,
    /// Its name; of progress: the feed's.
    pub name: String,
    /// A connection reads it now.
    pub active: bool,
}

impl std::fmt::Display for Leftover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}{}", self.kind, self.name, if self.active { " (active)" } else { "" })
    }
}

/// Everything of ours in a database, whoever uses it.
///
/// # Errors
/// [`CdcError`]
pub async fn list(url: &ServerUrl) -> Result<Vec<Leftover>, CdcError> {
    list_on(&session::connect(url, "leftovers").await?).await
}

async fn list_on(client: &Client) -> Result<Vec<Leftover>, CdcError> {
    let rows = client
        .query(
            "SELECT 'replication slot', slot_name::text, active FROM pg_replication_slots
             WHERE slot_name LIKE 'understudy\\_%' AND database = current_database()
             UNION ALL SELECT 'publication', pubname::text, false FROM pg_publication WHERE pubname LIKE 'understudy\\_%'
             UNION ALL SELECT 'event trigger', evtname::text, false FROM pg_event_trigger WHERE evtname LIKE 'understudy\\_%'
             UNION ALL SELECT 'schema', nspname::text, false FROM pg_namespace WHERE nspname = 'understudy'
             ORDER BY 1, 2",
            &[],
        )
        .await
        .attempt("look for leftovers")?;
    let mut found: Vec<Leftover> = rows.iter().map(|row| Leftover { kind: row.get(0), name: row.get(1), active: row.get(2) }).collect();
    if progress_is_there(client).await? {
        let rows = client.query("SELECT feed FROM understudy.progress ORDER BY 1", &[]).await.attempt("look for leftovers")?;
        found.extend(rows.iter().map(|row| Leftover { kind: "progress".into(), name: row.get(0), active: false }));
    }
    Ok(found)
}

async fn progress_is_there(client: &Client) -> Result<bool, CdcError> {
    let row = client.query_one("SELECT to_regclass('understudy.progress') IS NOT NULL", &[]).await.attempt("look for leftovers")?;
    Ok(row.get(0))
}

/// Takes away what feeds of `database` (its name in proxy.toml) left on a server, except the feeds in `keep`. Data of users stay.
/// Returns what was removed. Safe to repeat.
///
/// # Errors
/// [`CdcError`]
pub async fn remove(url: &ServerUrl, database: &str, keep: &[String]) -> Result<Vec<Leftover>, CdcError> {
    let client = session::connect(url, "leftovers").await?;
    client.batch_execute("SET default_transaction_read_only = off").await.attempt("set up a session")?;
    let before = list_on(&client).await?;
    let prefix = database_prefix(database);
    let ours = |found: &&Leftover| found.name.starts_with(&prefix) && !keep.contains(&found.name) && !found.active;
    for found in before.iter().filter(ours) {
        match found.kind.as_str() {
            "replication slot" => install::drop_slot(&client, &found.name).await?,
            "publication" => {
                with_lock(&client, &format!("DROP PUBLICATION IF EXISTS {}", ident(&found.name)), "drop a publication").await?;
            }
            "progress" => {
                install::target_tables(&client).await?;
                for table in PER_FEED {
                    client
                        .execute(&format!("DELETE FROM {SCHEMA}.{table} WHERE feed = $1"), &[&found.name])
                        .await
                        .attempt("forget the progress of a feed")?;
                }
            }
            _ => {}
        }
    }
    let published = client
        .query_one("SELECT count(*) FROM pg_publication WHERE starts_with(pubname::text, $1)", &[&PREFIX])
        .await
        .attempt("look for other publications")?
        .get::<_, i64>(0);
    // The capture serves every publication of ours.
    if published == 0 && before.iter().any(|found| found.kind == "event trigger") {
        with_lock(&client, capture::remove_sql().trim().trim_end_matches(';'), "remove the capture of schema changes").await?;
    }
    install::drop_schema_if_unused(&client).await?;
    let after = list_on(&client).await?;
    Ok(before.into_iter().filter(|found| !after.contains(found)).collect())
}
