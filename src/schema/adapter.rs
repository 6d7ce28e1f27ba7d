//! The CDC Agent's face of the Schema Adaptation Engine.

use crate::{lsn::Lsn, metadata::Repository};
use arc_swap::ArcSwap;
use std::sync::Arc;

/// Could not adapt.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    /// From a server.
    #[error("{0}")]
    Postgres(#[from] tokio_postgres::Error),
}

/// Decides what a schema change means for the other side.
pub struct Adapter {}

/// What to do.
#[derive(Default, Debug)]
pub struct Adaptation {
    /// Inside the transaction.
    pub run_now: Vec<(i64, Vec<String>)>,
    /// After it.
    pub run_after: Vec<(i64, Vec<String>)>,
    /// Hold.
    pub hold: Vec<(i64, String, String)>,
    /// Copy again.
    pub recopy: Vec<(String, String)>,
}

impl Adapter {
    /// New.
    pub fn new(_database: String, _shadow: String, _repository: Repository, _auto_approve: Arc<ArcSwap<f64>>) -> Self {
        Adapter {}
    }

    /// Decide.
    pub async fn adapt(&self, _ddl_json: &[u8], _lsn: Lsn, _target: &tokio_postgres::Client) -> Result<Adaptation, SchemaError> {
        Ok(Adaptation::default())
    }

    /// Remember.
    pub async fn baseline(&self, _source: &tokio_postgres::Client) -> Result<(), SchemaError> {
        Ok(())
    }
}

/// Capture on the source.
pub mod capture {
    /// Install.
    pub fn install_sql(_publication: &str) -> String {
        "CREATE SCHEMA IF NOT EXISTS understudy;".into()
    }

    /// Remove.
    pub fn remove_sql() -> String {
        String::new()
    }
}
