//! `proxy.toml` as typed: every value keeps its place in the file, so that a refusal can name the line.

use serde::Deserialize;
use std::collections::BTreeMap;
use toml::Spanned;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawConfig {
    #[serde(default)]
    pub proxy: RawProxy,
    #[serde(default)]
    pub database: Vec<RawDatabase>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct RawProxy {
    pub listen: Option<Spanned<String>>,
    pub http: Option<Spanned<String>>,
    pub unix_socket_dir: Option<Spanned<String>>,
    pub unix_socket_mode: Option<Spanned<String>>,
    pub metadata: Option<Spanned<String>>,
    pub pool_mode: Option<Spanned<String>>,
    #[serde(default)]
    pub pool: RawPool,
    pub console: Option<RawConsole>,
    pub tls: Option<RawTls>,
    #[serde(default)]
    pub auth: RawAuth,
    pub login_timeout: Option<Spanned<String>>,
    pub max_clients: Option<Spanned<i64>>,
    pub max_message: Option<Spanned<String>>,
    pub client_memory: Option<Spanned<String>>,
    pub idle_in_transaction_timeout: Option<Spanned<String>>,
    pub client_idle_timeout: Option<Spanned<String>>,
    pub query_timeout: Option<Spanned<String>>,
    #[serde(default)]
    pub tcp: RawTcp,
    pub shadow_memory: Option<Spanned<String>>,
    #[serde(default)]
    pub profile: RawProfile,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct RawProfile {
    pub interval: Option<Spanned<String>>,
    pub retention: Option<Spanned<String>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct RawPool {
    pub size: Option<Spanned<i64>>,
    pub min_size: Option<Spanned<i64>>,
    pub queue_timeout: Option<Spanned<String>>,
    pub server_lifetime: Option<Spanned<String>>,
    pub server_idle_timeout: Option<Spanned<String>>,
    pub reset_query: Option<Spanned<String>>,
    pub prepared_statements: Option<Spanned<i64>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct RawTcp {
    pub keepalive_idle: Option<Spanned<String>>,
    pub keepalive_interval: Option<Spanned<String>>,
    pub keepalive_count: Option<Spanned<i64>>,
    pub user_timeout: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawTls {
    pub certificate: String,
    pub key: String,
    pub client_ca: Option<String>,
    #[serde(default)]
    pub required: bool,
    pub min_version: Option<Spanned<String>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct RawAuth {
    pub users: Option<Spanned<String>>,
    pub query: Option<Spanned<String>>,
    pub hba: Option<String>,
    #[serde(default)]
    pub rules: Vec<String>,
    pub ident: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawConsole {
    pub user: String,
    pub password: Spanned<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawDatabase {
    pub name: Spanned<String>,
    pub source: Spanned<String>,
    pub pool_mode: Option<Spanned<String>>,
    #[serde(default)]
    pub pool: RawPool,
    #[serde(default)]
    pub user: Vec<RawUser>,
    #[serde(default)]
    pub shadow: Vec<RawShadow>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawUser {
    pub name: Spanned<String>,
    pub password: Spanned<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawShadow {
    pub name: Spanned<String>,
    pub url: Spanned<String>,
    pub feed: Option<Spanned<String>>,
    pub mirror_writes: Option<Spanned<String>>,
    pub sample_reads: Option<Spanned<f64>>,
    pub serve_reads: Option<Spanned<f64>>,
    pub hedge_after: Option<Spanned<String>>,
    pub consistency: Option<Spanned<String>>,
    #[serde(default)]
    pub revert: RawRevert,
    #[serde(default)]
    pub shift: RawShift,
    #[serde(default)]
    pub adapt: RawAdapt,
    #[serde(default)]
    pub copy: RawCopy,
    pub schema: Option<Spanned<String>>,
    #[serde(default)]
    pub map: Vec<RawMap>,
    #[serde(default)]
    pub fill: Vec<RawFill>,
    #[serde(default)]
    pub ignore: Vec<RawIgnore>,
    pub sample_per_query: Option<Spanned<i64>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawIgnore {
    pub name: Spanned<String>,
    pub fingerprint: Option<Spanned<String>>,
    #[serde(default)]
    pub tables: Vec<String>,
    #[serde(default)]
    pub columns: Vec<String>,
    #[serde(default)]
    pub differences: Vec<Spanned<String>>,
    pub floats: Option<Spanned<f64>>,
    pub times: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawFill {
    pub column: Spanned<String>,
    #[serde(default)]
    pub values: Vec<String>,
    pub range: Option<Spanned<[i64; 2]>>,
    pub nulls: Option<Spanned<f64>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawMap {
    pub source: Spanned<String>,
    pub shadow: Option<Spanned<String>>,
    #[serde(default)]
    pub left_out: bool,
    #[serde(default)]
    pub columns: BTreeMap<String, Spanned<String>>,
    #[serde(default)]
    pub using: BTreeMap<String, Spanned<String>>,
    #[serde(default)]
    pub back: BTreeMap<String, Spanned<String>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct RawRevert {
    pub window: Option<Spanned<String>>,
    pub min_requests: Option<Spanned<i64>>,
    pub error_rate: Option<Spanned<f64>>,
    pub mismatch_rate: Option<Spanned<f64>>,
    pub latency_ratio: Option<Spanned<f64>>,
    pub latency_floor: Option<Spanned<String>>,
    pub max_lag: Option<Spanned<String>>,
    pub max_connections: Option<Spanned<f64>>,
    pub max_active: Option<Spanned<i64>>,
    pub max_cpu_cores: Option<Spanned<f64>>,
    pub max_locks_waiting: Option<Spanned<i64>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct RawShift {
    pub steps: Option<Spanned<Vec<f64>>>,
    pub hold: Option<Spanned<String>>,
    pub min_served: Option<Spanned<i64>>,
    pub order: Option<Spanned<String>>,
    pub timezone: Option<Spanned<String>>,
    pub allow: Option<Spanned<Vec<String>>>,
    pub quiet: Option<Spanned<Vec<String>>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct RawAdapt {
    pub auto_approve: Option<Spanned<f64>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct RawCopy {
    pub workers: Option<Spanned<i64>>,
    pub spool_folder: Option<Spanned<String>>,
    pub spool_max: Option<Spanned<String>>,
}
