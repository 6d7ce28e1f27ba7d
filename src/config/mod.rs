//! `proxy.toml`: what was typed ([`raw`]) becomes what it means ([`Config`]); nothing half-valid leaves this room.
//!
//! Deliberately absent: any connection to a server (that is `check`), any default that serves traffic from a shadow.
//! Invariants: unknown keys are errors; a wrong file is refused whole, with line and reason; secrets print as `***`.

mod calendar;
mod gates;
mod limits;
mod load;
mod raw;
mod url;

pub use calendar::Calendar;
pub use limits::{Keepalive, LimitsConfig, TcpConfig};
pub use load::{ConfigError, load, parse, parse_duration};
pub use url::{ChannelBinding, RootCertificates, Secret, ServerTls, ServerUrl, SslMode};

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, time::Duration};

/// The whole file.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// `[proxy]`
    pub proxy: ProxyConfig,
    /// `[[database]]`, in file order, names unique.
    pub databases: Vec<DatabaseConfig>,
}

/// `[proxy]`: where the process listens and keeps its metadata.
#[derive(Clone, Debug, PartialEq)]
pub struct ProxyConfig {
    /// Applications connect here; the database name `understudy` is the console.
    pub listen: SocketAddr,
    /// And on the Unix socket `.s.PGSQL.<port of listen>` in a folder.
    pub unix_socket: Option<UnixSocketConfig>,
    /// Dashboard, metrics and health; `None` switches HTTP off.
    pub http: Option<SocketAddr>,
    /// The SQLite file of the metadata repository.
    pub metadata: PathBuf,
    /// `pool_mode` and `[proxy.pool]`: how client sessions map to server connections, unless a database says otherwise.
    pub pool: PoolConfig,
    /// Who may use the console: `Some((user, password))` asks for that password; `None` admits loopback clients only.
    pub console: Option<ConsoleUser>,
    /// `[proxy.tls]`: TLS towards clients, on the same port.
    pub tls: Option<TlsConfig>,
    /// `[proxy.auth]`: who checks passwords.
    pub auth: AuthConfig,
    /// What clients must keep to.
    pub limits: LimitsConfig,
    /// `[proxy.tcp]`: how dead clients are noticed.
    pub tcp: TcpConfig,
    /// Most bytes of copied statements and answers that all shadow work together may hold in memory.
    pub shadow_memory_bytes_max: usize,
    /// `[proxy.profile]`: how often servers are measured and how long that is kept.
    pub profile: ProfileConfig,
}

/// `[proxy.profile]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProfileConfig {
    /// Between two samples of a server's resources.
    pub interval: Duration,
    /// Age at which measurements are forgotten.
    pub retention: Duration,
}

impl Default for ProfileConfig {
    /// Every few seconds, for as long as it takes to look at yesterday: about 10 MB per server.
    fn default() -> Self {
        ProfileConfig { interval: Duration::from_secs(5), retention: Duration::from_secs(24 * 3600) }
    }
}

/// `unix_socket_dir` and `unix_socket_mode`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnixSocketConfig {
    /// The file, as libpq looks for it.
    pub path: PathBuf,
    /// Permissions: who may connect at all. Who may log in, authentication decides.
    pub mode: u32,
}

/// `[proxy.tls]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsConfig {
    /// Certificate and its chain, PEM.
    pub certificate: PathBuf,
    /// Its key, PEM, without passphrase.
    pub key: PathBuf,
    /// Authorities of client certificates, PEM. Clients may then show one.
    pub client_ca: Option<PathBuf>,
    /// Refuse clients that do not come over TLS.
    pub required: bool,
    /// Oldest TLS version.
    pub min_version: TlsVersion,
}

/// `min_version`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsVersion {
    /// TLS 1.2
    V1_2,
    /// TLS 1.3
    V1_3,
}

/// `[proxy.auth]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuthConfig {
    /// Where names and passwords are checked.
    pub users: UserSource,
    /// Rules in the manner of pg_hba.conf: a file of them.
    pub hba: Option<PathBuf>,
    /// The same, written into proxy.toml; they come before the file's.
    pub rules: Vec<String>,
    /// Maps from names in certificates, or of the operating system's users, to roles, in the manner of pg_ident.conf.
    pub ident: Option<PathBuf>,
}

/// `users` and `query`
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UserSource {
    /// The owner of the writes checks them itself; the proxy only passes messages on.
    Relay,
    /// A file in the format of PgBouncer's userlist.txt.
    File(PathBuf),
    /// A query on the owner of the writes, as the role of its url; `$1` is the name, the second column the verifier.
    Query(String),
}

impl AuthConfig {
    /// Files that are read again when they change.
    pub fn files(&self) -> Vec<PathBuf> {
        let users = match &self.users {
            UserSource::File(path) => Some(path),
            UserSource::Relay | UserSource::Query(_) => None,
        };
        users.into_iter().chain(&self.hba).chain(&self.ident).cloned().collect()
    }
}

impl TlsConfig {
    /// Files that are read again when they change.
    pub fn files(&self) -> Vec<PathBuf> {
        [&self.certificate, &self.key].into_iter().chain(&self.client_ca).cloned().collect()
    }
}

/// `[proxy.console]`
#[derive(Clone, Debug, PartialEq)]
pub struct ConsoleUser {
    /// The user name that the console asks for.
    pub user: String,
    /// Its password.
    pub password: Secret,
}

/// `pool_mode`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolMode {
    /// One server connection per client connection, for its whole life.
    Session,
    /// One per transaction.
    Transaction,
}

impl PoolMode {
    /// As in proxy.toml.
    pub fn as_str(self) -> &'static str {
        match self {
            PoolMode::Session => "session",
            PoolMode::Transaction => "transaction",
        }
    }
}

/// `pool_mode` with `[proxy.pool]` or `[database.pool]`: for each database and role.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolConfig {
    /// `pool_mode`
    pub mode: PoolMode,
    /// Most server connections; `None` (in session mode only): as many as there are clients, and none is used again.
    pub size: Option<usize>,
    /// Server connections that are kept even when nobody has used them for long.
    pub min_size: usize,
    /// Longest wait of a client for a server connection.
    pub queue_timeout: Duration,
    /// Age at which a server connection is closed as soon as nobody uses it.
    pub server_lifetime: Duration,
    /// A server connection that nobody has used for so long is closed.
    pub server_idle_timeout: Duration,
    /// What makes a connection as new again, when a session has left it.
    pub reset_query: String,
    /// Prepared statements kept on each server connection in transaction mode.
    pub prepared_statements: usize,
}

impl Default for PoolConfig {
    fn default() -> Self {
        PoolConfig {
            mode: PoolMode::Session,
            size: None,
            min_size: 0,
            queue_timeout: Duration::from_secs(30),
            server_lifetime: Duration::from_secs(3600),
            server_idle_timeout: Duration::from_secs(600),
            reset_query: "DISCARD ALL".into(),
            prepared_statements: 200,
        }
    }
}

/// `[[database]]`: one source and its shadows.
#[derive(Clone, Debug, PartialEq)]
pub struct DatabaseConfig {
    /// The name clients ask for.
    pub name: String,
    /// The database that owns the writes before any cutover.
    pub source: ServerUrl,
    /// `pool_mode` and `[database.pool]` over those of the proxy.
    pub pool: PoolConfig,
    /// `[[database.user]]`: credentials for sessions whose user is not the one in the URLs, so that their reads can be
    /// served by a shadow and their sessions can be moved at a cutover.
    pub users: Vec<UserConfig>,
    /// `[[database.shadow]]`, in file order, names unique over the whole file.
    pub shadows: Vec<ShadowConfig>,
}

/// `[[database.user]]`
#[derive(Clone, Debug, PartialEq)]
pub struct UserConfig {
    /// Role name.
    pub name: String,
    /// Its password on source and shadows.
    pub password: Secret,
}

/// How fresh the state is from which a shadow may answer a read. What the session itself has written is always in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Consistency {
    /// No more is promised.
    #[default]
    Session,
    /// And everything that anybody had committed this time before; else the owner answers.
    Bounded(Duration),
    /// And everything that anybody had committed before the read came in: it waits until the shadow has that.
    Global,
}

impl std::fmt::Display for Consistency {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Consistency::Session => f.write_str("session"),
            Consistency::Bounded(bound) => write!(f, "bounded {}ms", bound.as_millis()),
            Consistency::Global => f.write_str("global"),
        }
    }
}

/// `[[database.shadow]]`
#[derive(Clone, Debug, PartialEq)]
pub struct ShadowConfig {
    /// Unique over the whole file: console commands name a shadow by it.
    pub name: String,
    /// Where the shadow is.
    pub url: ServerUrl,
    /// How rows reach it.
    pub feed: FeedKind,
    /// What happens with clients' write transactions.
    pub mirror_writes: MirrorWrites,
    /// Share of reads also run on the shadow, in percent; above 100 repeats them.
    pub sample_reads: f64,
    /// Share of reads answered by the shadow, in percent, 0 to 100. 0 unless the operator says otherwise.
    pub serve_reads: f64,
    /// A served read that has not been answered after this time is asked again on the owner.
    pub hedge_after: Duration,
    /// How fresh an answer of the shadow must be.
    pub consistency: Consistency,
    /// When serving stops by itself.
    pub revert: RevertConfig,
    /// How serving grows.
    pub shift: ShiftConfig,
    /// What schema proposals may do by themselves.
    pub adapt: AdaptConfig,
    /// Limits of the initial copy and the feed.
    pub copy: CopyConfig,
    /// Where the shadow's schema comes from.
    pub schema: SchemaSource,
    /// `[[database.shadow.map]]`: how that schema differs from the source's.
    pub map: Vec<MapRule>,
    /// `[[database.shadow.fill]]`: values for columns that only the shadow has.
    pub fill: Vec<FillRule>,
    /// `[[database.shadow.ignore]]`: differences of answers that are expected.
    pub ignore: Vec<IgnoreRule>,
    /// Reads of one statement copied per second at most; 0: as many as the percentage says.
    pub sample_per_query: u32,
}

/// `[[database.shadow.ignore]]`: what a comparison of answers does not count. Without `fingerprint` and `tables` it concerns every
/// statement.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct IgnoreRule {
    /// Counted by it.
    pub name: String,
    /// Only this statement, as SHOW MISMATCHES writes it.
    pub fingerprint: Option<u64>,
    /// Only statements that name one of these tables.
    pub tables: Vec<String>,
    /// Columns of the answer that are not compared.
    pub columns: Vec<String>,
    /// Kinds of differences that are none: `sqlstate`, `columns`, `rows`, `values`, `order`, `tag`.
    pub differences: Vec<String>,
    /// Relative error of floats.
    pub floats: Option<f64>,
    /// Distance of timestamps.
    pub times: Option<Duration>,
}

impl IgnoreRule {
    /// A statement with this fingerprint that names these tables is concerned.
    pub fn concerns(&self, fingerprint: u64, tables: &[String]) -> bool {
        let bare = |name: &str| name.rsplit_once('.').map_or(name, |(_, table)| table).to_owned();
        let same = |wanted: &String, named: &String| if wanted.contains('.') { wanted == named } else { *wanted == bare(named) };
        self.fingerprint.is_none_or(|only| only == fingerprint)
            && (self.tables.is_empty() || self.tables.iter().any(|wanted| tables.iter().any(|named| same(wanted, named))))
    }
}

/// `[[database.shadow.fill]]`
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct FillRule {
    /// `schema.table.column` on the shadow; without schema: of `public`.
    pub column: String,
    /// One of these each, in text form.
    pub values: Vec<String>,
    /// Or a whole number between these.
    pub range: Option<(i64, i64)>,
    /// Share of rows without a value, 0 to 1.
    pub nulls: f64,
}

/// `schema`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SchemaSource {
    /// The source's schema is copied.
    #[default]
    Copy,
    /// The shadow has its tables already; only rows are copied.
    Existing,
}

/// `[[database.shadow.map]]`: what one table of the source is on the shadow.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct MapRule {
    /// Line in proxy.toml; 0: proposed, not written.
    pub line: usize,
    /// `schema.table` on the source; without schema: of `public`.
    pub source: String,
    /// `schema.table` on the shadow; empty: the same name.
    pub shadow: String,
    /// The shadow does not have it.
    pub left_out: bool,
    /// Source column → shadow column; an empty name: left out. What is not named keeps its name.
    pub columns: BTreeMap<String, String>,
    /// By source column: the shadow's value as an expression over that column.
    pub using: BTreeMap<String, String>,
    /// By source column: its value again, as an expression over the shadow's column.
    pub back: BTreeMap<String, String>,
}

/// `feed`
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FeedKind {
    /// Logical replication; our applier is the only writer.
    Cdc,
    /// Clients' writes are run on the shadow as well, and committed: for sources without logical decoding.
    Mirror,
    /// Nothing keeps the shadow in step.
    None,
}

/// `mirror_writes`
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum MirrorWrites {
    /// Writes are not mirrored.
    Off,
    /// Run, measured, compared and rolled back.
    Rehearse,
    /// Committed: what feed "mirror" does, and only it.
    Apply,
}

/// `[database.shadow.revert]`: any one of these drops `serve_reads` to 0 and raises an alert.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct RevertConfig {
    /// Length of the sliding window that is judged.
    #[serde(serialize_with = "serialize_seconds")]
    pub window: Duration,
    /// Fewer requests than this in the window decide nothing (lag decides always).
    pub min_requests: u64,
    /// Percent of served or sampled requests that fail on the shadow only.
    pub error_rate: f64,
    /// Percent of decided comparisons that differ.
    pub mismatch_rate: f64,
    /// Shadow p99 over source p99.
    pub latency_ratio: f64,
    /// A shadow p99 below this is never judged: the difference would be noise.
    #[serde(serialize_with = "serialize_seconds")]
    pub latency_floor: Duration,
    /// Age of the oldest unapplied change.
    #[serde(serialize_with = "serialize_seconds")]
    pub max_lag: Duration,
    /// Percent of the shadow's `max_connections` in use; `None`: not judged.
    pub max_connections: Option<f64>,
    /// Sessions that run a statement on the shadow at the same time; `None`: not judged.
    pub max_active: Option<u64>,
    /// Processor cores that the shadow's server uses, where its host can be seen; `None`: not judged.
    pub max_cpu_cores: Option<f64>,
    /// Requests for locks that wait on the shadow; `None`: not judged.
    pub max_locks_waiting: Option<u64>,
}

/// `[database.shadow.shift]`: the ladder.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct ShiftConfig {
    /// Percentages, ascending, each above 0 and at most 100.
    pub steps: Vec<f64>,
    /// How long each step must stay healthy.
    #[serde(serialize_with = "serialize_seconds")]
    pub hold: Duration,
    /// Reads that the shadow must have answered on a step before the next: silence is not health.
    pub min_served: u64,
    /// Which statements move first.
    pub order: ShiftOrder,
    /// When steps may be taken.
    pub calendar: Calendar,
}

/// `shift.order`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ShiftOrder {
    /// All reads alike, by chance.
    #[default]
    All,
    /// Statements whose sampled answers were the same and not slower first; the others at the last step only.
    Proven,
}

/// `[database.shadow.adapt]`
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct AdaptConfig {
    /// Confidence (0 to 1) from which a data-preserving proposal needs no person.
    pub auto_approve: f64,
}

/// `[database.shadow.copy]`
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct CopyConfig {
    /// Tables copied at the same time.
    pub workers: usize,
    /// Where big transactions wait that have not ended.
    pub spool_folder: PathBuf,
    /// How much of them may wait, in MiB.
    pub spool_mib_max: u64,
}

impl Default for CopyConfig {
    /// As much spooled as a busy server spills itself, well below what a disk for temporary files has.
    fn default() -> Self {
        CopyConfig { workers: 2, spool_folder: std::env::temp_dir(), spool_mib_max: 4_096 }
    }
}

/// Durations as seconds in JSON.
pub(crate) fn serialize_seconds<S: serde::Serializer>(value: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(value.as_secs_f64())
}
