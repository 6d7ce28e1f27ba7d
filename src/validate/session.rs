//! Control connections with pinned settings, so that equal values have equal texts.

use super::ValidateError;
use crate::config::ServerUrl;
use tokio::task::JoinHandle;
use tokio_postgres::Client;

/// Longest wait for a lock on a table: the comparison must not queue up before the application's own DDL.
const SETTINGS: &str = "SET datestyle = 'ISO, MDY'; SET timezone = 'UTC'; SET intervalstyle = 'postgres'; SET extra_float_digits = 1; \
    SET bytea_output = 'hex'; SET lc_monetary = 'C'; SET xmlbinary = 'base64'; SET search_path = ''; SET row_security = off; \
    SET statement_timeout = 0; SET lock_timeout = '10s'; SET idle_in_transaction_session_timeout = 0; \
    SET synchronize_seqscans = off";

/// A logged-in client and the task that drives it; both end when it is dropped.
pub(super) struct Session {
    pub client: Client,
    pub side: &'static str,
    task: JoinHandle<()>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// SQLSTATE and message, without values: detail lines hold them, and messages of classes 22 and 23.
pub(super) fn describe(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(_) => crate::cdc::describe(error),
        None => match std::error::Error::source(error) {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        },
    }
}

impl Session {
    pub async fn open(url: &ServerUrl, side: &'static str) -> Result<Session, ValidateError> {
        let refuse = |error| ValidateError::Connect { side, reason: format!("{url}: {error}") };
        let (client, connection) = crate::backend::control(url, "understudy verify").await.map_err(refuse)?;
        let task = tokio::spawn(async move {
            // What ends a connection is reported by the statement that was running on it.
            let _ = connection.await;
        });
        let session = Session { client, side, task };
        session.run("preparing the session", SETTINGS).await?;
        Ok(session)
    }

    pub async fn run(&self, action: &'static str, text: &str) -> Result<(), ValidateError> {
        self.client.batch_execute(text).await.map_err(|error| self.error(action, &error))
    }

    pub fn error(&self, action: &'static str, error: &tokio_postgres::Error) -> ValidateError {
        ValidateError::Sql { side: self.side, action, reason: describe(error) }
    }

    /// One value, as text.
    pub async fn value(&self, action: &'static str, text: &str) -> Result<String, ValidateError> {
        let row = self.client.query_one(text, &[]).await.map_err(|error| self.error(action, &error))?;
        row.try_get::<_, String>(0).map_err(|error| self.error(action, &error))
    }

    /// A transaction on its own or an exported snapshot.
    pub async fn begin(&self, snapshot: Option<&str>) -> Result<(), ValidateError> {
        let import = snapshot.map(|name| format!("; SET TRANSACTION SNAPSHOT '{}'", name.replace('\'', "''"))).unwrap_or_default();
        self.run("opening a snapshot", &format!("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY{import}")).await
    }

    pub async fn export(&self) -> Result<String, ValidateError> {
        self.value("exporting a snapshot", "SELECT pg_catalog.pg_export_snapshot()").await
    }
}
