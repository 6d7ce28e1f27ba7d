//! From text to [`Config`]: defaults, ranges, uniqueness, `${ENV_VAR}`. Every refusal names file, line and remedy.

use super::{
    AdaptConfig, AuthConfig, Config, Consistency, ConsoleUser, CopyConfig, DatabaseConfig, FeedKind, FillRule, MapRule, MirrorWrites,
    PoolConfig, PoolMode, ProxyConfig, SchemaSource, Secret, ServerUrl, ShadowConfig, TlsConfig, TlsVersion, UnixSocketConfig, UserConfig,
    UserSource, gates, limits,
    raw::{RawAuth, RawConfig, RawCopy, RawDatabase, RawFill, RawMap, RawPool, RawProxy, RawShadow, RawTls},
};
mod ignore;

use std::{
    collections::{BTreeMap, HashSet},
    net::SocketAddr,
    ops::Range,
    path::Path,
    time::Duration,
};
use toml::Spanned;

/// The file was refused as a whole.
#[derive(Debug, Clone, thiserror::Error, PartialEq)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read {path}: {reason}")]
    Read {
        /// As given.
        path: String,
        /// From the operating system.
        reason: String,
    },
    /// A value is wrong.
    #[error("{path} line {line}: {reason}")]
    Invalid {
        /// As given.
        path: String,
        /// 1-based.
        line: usize,
        /// What is wrong and what to write instead.
        reason: String,
    },
}

/// Reads and checks a file.
///
/// # Errors
/// [`ConfigError`], with line and reason.
pub fn load(path: &Path) -> Result<Config, ConfigError> {
    let shown = path.display().to_string();
    let text = std::fs::read_to_string(path).map_err(|error| ConfigError::Read { path: shown.clone(), reason: error.to_string() })?;
    parse(&text, &shown, &|name| std::env::var(name).ok())
}

/// Checks a text; `path` is only for messages, `environment` expands `${NAME}` in urls and passwords.
///
/// # Errors
/// [`ConfigError::Invalid`]
pub fn parse(text: &str, path: &str, environment: &dyn Fn(&str) -> Option<String>) -> Result<Config, ConfigError> {
    let invalid = |at: usize, reason: String| ConfigError::Invalid { path: path.to_owned(), line: line_of(text, at), reason };
    let raw: RawConfig = toml::from_str(text)
        .map_err(|error| invalid(error.span().map_or(0, |span| span.start), error.message().trim().replace('\n', " ")))?;
    Reader { environment, text }.config(raw).map_err(|refusal| invalid(refusal.at, refusal.reason))
}

fn line_of(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1
}

pub(super) struct Refusal {
    pub at: usize,
    pub reason: String,
}

pub(super) fn refuse<T>(span: Range<usize>, reason: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal { at: span.start, reason: reason.into() })
}

struct Reader<'a> {
    environment: &'a dyn Fn(&str) -> Option<String>,
    text: &'a str,
}

impl Reader<'_> {
    fn config(&self, raw: RawConfig) -> Result<Config, Refusal> {
        let proxy = self.proxy(raw.proxy)?;
        let mut databases = Vec::new();
        let mut database_names = HashSet::new();
        let mut shadow_names = HashSet::new();
        for database in raw.database {
            let span = database.name.span();
            let database = self.database(database, &proxy, &mut shadow_names)?;
            if !database_names.insert(database.name.clone()) {
                return refuse(span, format!("database `{}` is defined twice: names must be unique", database.name));
            }
            databases.push(database);
        }
        if databases.is_empty() {
            return refuse(0..0, "no [[database]] is defined: add one with `name` and `source`");
        }
        Ok(Config { proxy, databases })
    }

    fn proxy(&self, raw: RawProxy) -> Result<ProxyConfig, Refusal> {
        let limits = limits::limits(&raw)?;
        let metadata = match raw.metadata {
            None => "understudy.db".into(),
            Some(value) => match value.get_ref().strip_prefix("sqlite:") {
                Some(path) if !path.is_empty() => path.into(),
                _ if value.get_ref().starts_with("postgres") => {
                    return refuse(
                        value.span(),
                        "a metadata repository on PostgreSQL comes with fleets of proxies, which this version does not have: use \"sqlite:FILE\"",
                    );
                }
                _ => return refuse(value.span(), "metadata must be \"sqlite:FILE\""),
            },
        };
        let auth = auth(raw.auth)?;
        let pool = pool(raw.pool_mode, raw.pool, &PoolConfig::default(), &auth)?;
        let console = match raw.console {
            None => None,
            Some(console) => Some(ConsoleUser { user: console.user, password: Secret::new(self.expand(&console.password)?) }),
        };
        let listen = address(raw.listen, "listen", "127.0.0.1:6432")?.expect("has a default");
        Ok(ProxyConfig {
            listen,
            unix_socket: unix_socket(raw.unix_socket_dir, raw.unix_socket_mode, listen.port())?,
            http: address(raw.http, "http", "")?,
            metadata,
            pool,
            console,
            tls: raw.tls.map(tls).transpose()?,
            auth,
            limits,
            tcp: limits::tcp(raw.tcp)?,
            shadow_memory_bytes_max: match raw.shadow_memory {
                None => 64 << 20,
                Some(value) => bytes(&value)?,
            },
            profile: gates::profile(raw.profile)?,
        })
    }

    fn database(&self, raw: RawDatabase, proxy: &ProxyConfig, shadow_names: &mut HashSet<String>) -> Result<DatabaseConfig, Refusal> {
        let name = name(&raw.name, "database")?;
        if name == "understudy" {
            return refuse(raw.name.span(), "the database name `understudy` is the console's: choose another name");
        }
        let source = self.url(&raw.source)?;
        let pool = pool(raw.pool_mode, raw.pool, &proxy.pool, &proxy.auth)?;
        let mut users = Vec::new();
        for user in raw.user {
            users.push(UserConfig { name: name_of(&user.name), password: Secret::new(self.expand(&user.password)?) });
        }
        let mut shadows = Vec::new();
        for shadow in raw.shadow {
            let (name_span, url_span) = (shadow.name.span(), shadow.url.span());
            let shadow = self.shadow(shadow)?;
            if !shadow_names.insert(shadow.name.clone()) {
                return refuse(name_span, format!("shadow `{}` is defined twice: names must be unique over the whole file", shadow.name));
            }
            if (&shadow.url.host, shadow.url.port, &shadow.url.dbname) == (&source.host, source.port, &source.dbname) {
                return refuse(url_span, format!("shadow `{}` is the source itself: give the url of another database", shadow.name));
            }
            shadows.push(shadow);
        }
        Ok(DatabaseConfig { name, source, pool, users, shadows })
    }

    fn shadow(&self, raw: RawShadow) -> Result<ShadowConfig, Refusal> {
        let name = name(&raw.name, "shadow")?;
        let feed = match &raw.feed {
            None => FeedKind::Cdc,
            Some(value) => match value.get_ref().as_str() {
                "cdc" => FeedKind::Cdc,
                "none" => FeedKind::None,
                "mirror" => FeedKind::Mirror,
                other => return refuse(value.span(), format!("feed is \"cdc\", \"mirror\" or \"none\", not \"{other}\"")),
            },
        };
        let mirror_writes = match &raw.mirror_writes {
            None if feed == FeedKind::Mirror => MirrorWrites::Apply,
            None => MirrorWrites::Off,
            Some(value) => match (value.get_ref().as_str(), feed) {
                ("apply", FeedKind::Mirror) => MirrorWrites::Apply,
                ("apply", _) => return refuse(value.span(), "mirror_writes \"apply\" belongs to feed \"mirror\": use \"rehearse\""),
                ("off" | "rehearse", FeedKind::Mirror) => {
                    return refuse(value.span(), "feed \"mirror\" lives by mirrored writes: leave mirror_writes out, or say \"apply\"");
                }
                ("off", _) => MirrorWrites::Off,
                ("rehearse", _) => MirrorWrites::Rehearse,
                (other, _) => return refuse(value.span(), format!("mirror_writes is \"off\", \"rehearse\" or \"apply\", not \"{other}\"")),
            },
        };
        let schema = match &raw.schema {
            None => SchemaSource::Copy,
            Some(value) => match value.get_ref().as_str() {
                "copy" => SchemaSource::Copy,
                "existing" => SchemaSource::Existing,
                other => return refuse(value.span(), format!("schema is \"copy\" or \"existing\", not \"{other}\"")),
            },
        };
        if let (Some(value), SchemaSource::Existing) = (raw.schema.as_ref().filter(|_| feed != FeedKind::Cdc), schema) {
            return refuse(value.span(), "schema \"existing\" needs feed = \"cdc\": nothing else translates rows");
        }
        if let (Some(value), FeedKind::Mirror) = (raw.serve_reads.as_ref().filter(|value| *value.get_ref() > 0.0), feed) {
            return refuse(value.span(), "a shadow with feed \"mirror\" answers no reads: its rows are not proven to be the owner's");
        }
        Ok(ShadowConfig {
            name,
            url: self.url(&raw.url)?,
            feed,
            mirror_writes,
            sample_reads: percent(raw.sample_reads, "sample_reads", 10_000.0, 0.0)?,
            serve_reads: percent(raw.serve_reads, "serve_reads", 100.0, 0.0)?,
            hedge_after: duration(raw.hedge_after, "hedge_after", Duration::from_millis(250))?,
            consistency: consistency(raw.consistency)?,
            revert: gates::revert(raw.revert)?,
            shift: gates::shift(raw.shift)?,
            adapt: AdaptConfig {
                auto_approve: match raw.adapt.auto_approve {
                    None => 0.95,
                    Some(value) if (0.5..=1.0).contains(value.get_ref()) => *value.get_ref(),
                    Some(value) => return refuse(value.span(), "auto_approve is a confidence between 0.5 and 1.0"),
                },
            },
            copy: copy(raw.copy)?,
            schema,
            fill: raw.fill.into_iter().map(fill).collect::<Result<_, _>>()?,
            ignore: ignore::rules(raw.ignore)?,
            sample_per_query: match raw.sample_per_query {
                None => 0,
                Some(value) => u32::try_from(*value.get_ref())
                    .or_else(|_| refuse(value.span(), "sample_per_query is a number of reads per second; 0: no limit"))?,
            },
            map: raw.map.into_iter().map(|map| self.map(map, schema)).collect::<Result<_, _>>()?,
        })
    }

    fn map(&self, raw: RawMap, schema: SchemaSource) -> Result<MapRule, Refusal> {
        if schema != SchemaSource::Existing {
            let reason = "a map needs schema = \"existing\" beside the shadow's url: where the source's schema is copied, nothing differs";
            return refuse(raw.source.span(), reason);
        }
        if raw.left_out && (raw.shadow.is_some() || !raw.columns.is_empty() || !raw.using.is_empty()) {
            return refuse(raw.source.span(), "a table that is left out has no other keys: remove left_out = true or the others");
        }
        for (column, expression) in raw.using.iter().chain(&raw.back) {
            if raw.columns.get(column).is_some_and(|name| name.get_ref().is_empty()) {
                return refuse(expression.span(), format!("column {column} is left out and has an expression: remove one of them"));
            }
            if expression.get_ref().trim().is_empty() {
                return refuse(expression.span(), format!("the expression of column {column} is empty"));
            }
        }
        if let Some((column, expression)) = raw.back.iter().find(|(column, _)| !raw.using.contains_key(*column)) {
            return refuse(expression.span(), format!("column {column} has a way back without a way there: give it in `using`, too"));
        }
        let plain = |map: BTreeMap<String, Spanned<String>>| map.into_iter().map(|(name, value)| (name, value.into_inner())).collect();
        Ok(MapRule {
            line: line_of(self.text, raw.source.span().start),
            source: raw.source.into_inner(),
            shadow: raw.shadow.map(Spanned::into_inner).unwrap_or_default(),
            left_out: raw.left_out,
            columns: plain(raw.columns),
            using: plain(raw.using),
            back: plain(raw.back),
        })
    }

    fn url(&self, value: &Spanned<String>) -> Result<ServerUrl, Refusal> {
        ServerUrl::parse(&self.expand(value)?).or_else(|reason| refuse(value.span(), reason))
    }

    /// `${NAME}` becomes the environment variable's value.
    fn expand(&self, value: &Spanned<String>) -> Result<String, Refusal> {
        let mut expanded = String::new();
        let mut rest = value.get_ref().as_str();
        while let Some((before, after)) = rest.split_once("${") {
            let Some((variable, after)) = after.split_once('}') else {
                return refuse(value.span(), "`${` without `}`: write ${NAME}");
            };
            match (self.environment)(variable) {
                Some(found) => expanded.extend([before, &found]),
                None => return refuse(value.span(), format!("the environment variable {variable} is not set")),
            }
            rest = after;
        }
        expanded.push_str(rest);
        Ok(expanded)
    }
}

fn fill(raw: RawFill) -> Result<FillRule, Refusal> {
    let parts = raw.column.get_ref().split('.').count();
    if !(2..=3).contains(&parts) {
        return refuse(raw.column.span(), "column is table.column or schema.table.column, as the shadow has it");
    }
    if raw.values.is_empty() == raw.range.is_none() {
        return refuse(raw.column.span(), "give either values = [\"…\"] or range = [from, to]");
    }
    if let Some(range) = raw.range.as_ref().filter(|range| range.get_ref()[0] > range.get_ref()[1]) {
        return refuse(range.span(), "range is [from, to], the smaller number first");
    }
    if let Some(nulls) = raw.nulls.as_ref().filter(|nulls| !(0.0..=1.0).contains(nulls.get_ref())) {
        return refuse(nulls.span(), "nulls is a share between 0.0 and 1.0");
    }
    Ok(FillRule {
        column: raw.column.into_inner(),
        values: raw.values,
        range: raw.range.map(|range| range.into_inner().into()),
        nulls: raw.nulls.map_or(0.0, Spanned::into_inner),
    })
}

/// What a section leaves out is as in `above`.
fn pool(mode: Option<Spanned<String>>, raw: RawPool, above: &PoolConfig, auth: &AuthConfig) -> Result<PoolConfig, Refusal> {
    let written = mode.as_ref().map(Spanned::span);
    let mode = match &mode {
        None => above.mode,
        Some(value) => match value.get_ref().as_str() {
            "session" => PoolMode::Session,
            "transaction" => PoolMode::Transaction,
            other => return refuse(value.span(), format!("pool_mode is \"session\" or \"transaction\", not \"{other}\"")),
        },
    };
    if let (PoolMode::Transaction, Some(span)) = (mode, written)
        && auth.users == UserSource::Relay
        && auth.rules.is_empty()
        && auth.hba.is_none()
    {
        return refuse(
            span,
            "pool_mode \"transaction\" needs log-ins that end at understudy, which must open server connections by itself: set users = \"query\" \
             or \"file:PATH\" (or rules) in [proxy.auth]",
        );
    }
    let default_size = if mode == PoolMode::Transaction { Some(above.size.unwrap_or(POOL_SIZE)) } else { above.size };
    let size = match &raw.size {
        None => default_size,
        Some(_) => Some(in_range(raw.size, "size", 1..=100_000, 0)? as usize),
    };
    let min_span = raw.min_size.as_ref().map(Spanned::span);
    let min_size = in_range(raw.min_size, "min_size", 0..=100_000, above.min_size as i64)? as usize;
    if let Some(span) = min_span
        && size.is_none_or(|size| size < min_size)
    {
        return refuse(span, "min_size must not be above size, which must be set");
    }
    let reset_query = match &raw.reset_query {
        None => above.reset_query.clone(),
        Some(text) if text.get_ref().trim().is_empty() || text.get_ref().contains('\0') => {
            return refuse(text.span(), "reset_query must not be empty: \"DISCARD ALL\" makes a connection as new");
        }
        Some(text) => text.get_ref().clone(),
    };
    Ok(PoolConfig {
        mode,
        size,
        min_size: min_size.min(size.unwrap_or(0)),
        queue_timeout: duration(raw.queue_timeout, "queue_timeout", above.queue_timeout)?,
        server_lifetime: duration(raw.server_lifetime, "server_lifetime", above.server_lifetime)?,
        server_idle_timeout: duration(raw.server_idle_timeout, "server_idle_timeout", above.server_idle_timeout)?,
        reset_query,
        prepared_statements: in_range(raw.prepared_statements, "prepared_statements", 1..=100_000, above.prepared_statements as i64)?
            as usize,
    })
}

/// Server connections per database and role in transaction mode, as PgBouncer's default.
const POOL_SIZE: usize = 20;

fn tls(raw: RawTls) -> Result<TlsConfig, Refusal> {
    let min_version = match &raw.min_version {
        None => TlsVersion::V1_2,
        Some(value) => match value.get_ref().as_str() {
            "1.2" => TlsVersion::V1_2,
            "1.3" => TlsVersion::V1_3,
            other => return refuse(value.span(), format!("min_version is \"1.2\" or \"1.3\", not \"{other}\"")),
        },
    };
    Ok(TlsConfig {
        certificate: raw.certificate.into(),
        key: raw.key.into(),
        client_ca: raw.client_ca.map(Into::into),
        required: raw.required,
        min_version,
    })
}

/// Names and verifiers of roles that may log in and whose password has not expired.
const AUTH_QUERY: &str = "SELECT rolname, CASE WHEN rolvaliduntil < pg_catalog.now() THEN NULL ELSE rolpassword END \
                          FROM pg_catalog.pg_authid WHERE rolname = $1 AND rolcanlogin";

fn auth(raw: RawAuth) -> Result<AuthConfig, Refusal> {
    let users = match &raw.users {
        None => UserSource::Relay,
        Some(value) => match value.get_ref().as_str() {
            "relay" => UserSource::Relay,
            "query" => UserSource::Query(raw.query.as_ref().map_or(AUTH_QUERY, |query| query.get_ref().as_str()).to_owned()),
            file => match file.strip_prefix("file:") {
                Some(path) if !path.is_empty() => UserSource::File(path.into()),
                _ => return refuse(value.span(), format!("users is \"relay\", \"query\" or \"file:PATH\", not \"{file}\"")),
            },
        },
    };
    if let (Some(query), UserSource::Relay | UserSource::File(_)) = (&raw.query, &users) {
        return refuse(query.span(), "query belongs to users = \"query\"");
    }
    if let (Some(query), false) = (&raw.query, raw.query.as_ref().is_some_and(|query| query.get_ref().contains("$1"))) {
        return refuse(query.span(), "query must contain $1, which stands for the name, and return name and verifier");
    }
    Ok(AuthConfig { users, hba: raw.hba.map(Into::into), rules: raw.rules, ident: raw.ident.map(Into::into) })
}

fn name_of(value: &Spanned<String>) -> String {
    value.get_ref().clone()
}

fn name(value: &Spanned<String>, what: &str) -> Result<String, Refusal> {
    let text = value.get_ref();
    let fits = !text.is_empty() && text.len() <= 40 && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
    if !fits {
        return refuse(value.span(), format!("a {what} name has 1 to 40 letters, digits, `_` or `-`, not \"{text}\""));
    }
    Ok(text.clone())
}

fn address(value: Option<Spanned<String>>, key: &str, default: &str) -> Result<Option<SocketAddr>, Refusal> {
    match value {
        None if default.is_empty() => Ok(None),
        None => Ok(Some(default.parse().expect("a constant"))),
        Some(value) => match value.get_ref().parse() {
            Ok(address) => Ok(Some(address)),
            Err(_) => refuse(value.span(), format!("{key} must be ADDRESS:PORT such as 127.0.0.1:6432, not \"{}\"", value.get_ref())),
        },
    }
}

/// Longest path of a Unix socket: `sun_path` of unix(7), without its end.
const SOCKET_PATH_BYTES_MAX: usize = 107;

fn unix_socket(folder: Option<Spanned<String>>, mode: Option<Spanned<String>>, port: u16) -> Result<Option<UnixSocketConfig>, Refusal> {
    let folder = match (folder, &mode) {
        (Some(folder), _) => folder,
        (None, Some(mode)) => return refuse(mode.span(), "unix_socket_mode belongs to unix_socket_dir, which is not there"),
        (None, None) => return Ok(None),
    };
    if !folder.get_ref().starts_with('/') || folder.get_ref().contains('\0') {
        return refuse(folder.span(), "unix_socket_dir is a folder's whole path, such as \"/run/understudy\"");
    }
    let path = crate::net::socket_path(Path::new(folder.get_ref()), port);
    if path.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
        let reason =
            format!("{} is longer than the {SOCKET_PATH_BYTES_MAX} bytes of a Unix socket's path: name another folder", path.display());
        return refuse(folder.span(), reason);
    }
    let mode = match mode {
        None => 0o777, // as PostgreSQL's: the file lets everybody knock, authentication decides who comes in
        Some(mode) => match u32::from_str_radix(mode.get_ref(), 8) {
            Ok(bits) if bits <= 0o777 => bits,
            _ => return refuse(mode.span(), "unix_socket_mode is octal, such as \"0777\" or \"0770\""),
        },
    };
    Ok(Some(UnixSocketConfig { path, mode }))
}

pub(super) fn in_range(value: Option<Spanned<i64>>, key: &str, range: std::ops::RangeInclusive<i64>, default: i64) -> Result<i64, Refusal> {
    match value {
        None => Ok(default),
        Some(value) if range.contains(value.get_ref()) => Ok(*value.get_ref()),
        Some(value) => refuse(value.span(), format!("{key} must be between {} and {}", range.start(), range.end())),
    }
}

pub(super) fn percent(value: Option<Spanned<f64>>, key: &str, max: f64, default: f64) -> Result<f64, Refusal> {
    match value {
        None => Ok(default),
        Some(value) if (0.0..=max).contains(value.get_ref()) => Ok(*value.get_ref()),
        Some(value) => refuse(value.span(), format!("{key} is a percentage between 0 and {max}, not {}", value.get_ref())),
    }
}

pub(super) fn positive(value: Option<Spanned<f64>>, key: &str, default: f64) -> Result<f64, Refusal> {
    match value {
        None => Ok(default),
        Some(value) if *value.get_ref() > 0.0 && value.get_ref().is_finite() => Ok(*value.get_ref()),
        Some(value) => refuse(value.span(), format!("{key} must be above 0")),
    }
}

pub(super) fn duration(value: Option<Spanned<String>>, key: &str, default: Duration) -> Result<Duration, Refusal> {
    match value {
        None => Ok(default),
        Some(value) => match parse_duration(value.get_ref()) {
            Some(duration) if !duration.is_zero() => Ok(duration),
            _ => refuse(value.span(), format!("{key} is a time such as \"500ms\", \"10s\", \"5m\" or \"1h\", not \"{}\"", value.get_ref())),
        },
    }
}

fn consistency(value: Option<Spanned<String>>) -> Result<Consistency, Refusal> {
    let Some(value) = value else { return Ok(Consistency::Session) };
    let mut words = value.get_ref().split_whitespace();
    let bound = |text: &str| parse_duration(text).filter(|bound| bound.as_millis() > 0).map(Consistency::Bounded);
    let found = match (words.next(), words.next(), words.next()) {
        (Some("session"), None, None) => Some(Consistency::Session),
        (Some("global"), None, None) => Some(Consistency::Global),
        (Some("bounded"), Some(time), None) => bound(time),
        (_, _, _) => None,
    };
    match found {
        Some(found) => Ok(found),
        None => refuse(
            value.span(),
            format!(
                "consistency is \"session\", \"global\" or \"bounded\" with a time, such as \"bounded 2s\", not \"{}\"",
                value.get_ref()
            ),
        ),
    }
}

/// `500ms`, `10s`, `5m`, `1h`, `2.5s`.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let text = text.trim();
    let split = text.find(|c: char| c.is_ascii_alphabetic())?;
    let (number, unit) = text.split_at(split);
    let number: f64 = number.trim().parse().ok()?;
    let seconds = match unit {
        "ms" => 0.001,
        "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => return None,
    };
    Duration::try_from_secs_f64(number * seconds).ok()
}

pub(super) fn bytes(value: &Spanned<String>) -> Result<usize, Refusal> {
    let text = value.get_ref().trim();
    let split = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = match unit.trim() {
        "kB" => 1usize << 10,
        "MB" => 1 << 20,
        "GB" => 1 << 30,
        _ => 0,
    };
    match number.trim().parse::<usize>() {
        Ok(number) if factor > 0 && number > 0 => Ok(number.saturating_mul(factor)),
        _ => refuse(value.span(), format!("a size is written like \"64MB\" (kB, MB, GB), not \"{text}\"")),
    }
}

fn copy(raw: RawCopy) -> Result<CopyConfig, Refusal> {
    let default = CopyConfig::default();
    let spool_folder = match raw.spool_folder {
        None => default.spool_folder,
        Some(value) if value.get_ref().starts_with('/') => value.get_ref().into(),
        Some(value) => return refuse(value.span(), "spool_folder is a folder's whole path, such as \"/var/tmp\""),
    };
    let spool_mib_max = match raw.spool_max {
        None => default.spool_mib_max,
        Some(value) => match bytes(&value)? >> 20 {
            0 => return refuse(value.span(), "spool_max is at least \"1MB\""),
            mib => mib as u64,
        },
    };
    Ok(CopyConfig { workers: in_range(raw.workers, "workers", 1..=64, default.workers as i64)? as usize, spool_folder, spool_mib_max })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
[proxy]
listen = "127.0.0.1:6432"
[[database]]
name = "shop"
source = "postgres://app:${SHOP_PASSWORD}@10.0.0.1:5432/shop"
[[database.shadow]]
name = "pg18"
url = "postgres://app@10.0.0.2:5432/shop"
sample_reads = 10.0
"#;

    fn read(text: &str) -> Result<Config, ConfigError> {
        parse(text, "proxy.toml", &|name| (name == "SHOP_PASSWORD").then(|| "pw".to_owned()))
    }

    #[test]
    fn the_shipped_file_is_good() {
        let text = include_str!("../../proxy.toml");
        let config = parse(text, "proxy.toml", &|_| Some("x".into())).unwrap();
        assert_eq!(config.databases[0].shadows[0].serve_reads, 0.0, "a new shadow serves nothing until told to");
    }

    #[test]
    fn expands_the_environment_and_fills_in_safe_defaults() {
        let config = read(GOOD).unwrap();
        let database = &config.databases[0];
        assert_eq!(database.source.password.as_ref().unwrap().expose(), "pw");
        let shadow = &database.shadows[0];
        assert_eq!((shadow.sample_reads, shadow.serve_reads), (10.0, 0.0));
        assert_eq!((shadow.feed, shadow.mirror_writes), (FeedKind::Cdc, MirrorWrites::Off));
        assert!(!format!("{config:?}").contains("\"pw\""));
    }

    #[test]
    fn a_wrong_file_is_refused_with_line_and_reason() {
        for (from, to, line, part) in [
            ("sample_reads = 10.0", "sample_raeds = 10.0", 10, "unknown field"),
            ("sample_reads = 10.0", "sample_reads = -1.0", 10, "percentage"),
            ("sample_reads = 10.0", "serve_reads = 101.0", 10, "between 0 and 100"),
            ("sample_reads = 10.0", "feed = \"cdcc\"", 10, "feed is"),
            ("sample_reads = 10.0", "shift.steps = [5, 1]", 10, "ascending"),
            ("sample_reads = 10.0", "shift.hold = \"soon\"", 10, "500ms"),
            ("sample_reads = 10.0", "revert.min_requests = 0", 10, "between"),
            ("sample_reads = 10.0", "revert.max_connections = 101", 10, "percentage"),
            ("sample_reads = 10.0", "revert.max_cpu_cores = 0", 10, "above 0"),
            ("sample_reads = 10.0", "shift.order = \"best\"", 10, "proven"),
            ("sample_reads = 10.0", "shift.quiet = [\"daily 01:00-02:00\"]", 10, "timezone"),
            ("sample_reads = 10.0", "shift.timezone = \"Mars/Base\"", 10, "zoneinfo"),
            ("sample_reads = 10.0", "[[database.shadow]]\nname = \"pg18\"\nurl = \"postgres://app@h/x\"", 11, "defined twice"),
            ("sample_reads = 10.0", "fill = [{ column = \"tier\", values = [\"a\"] }]", 10, "table.column"),
            ("sample_reads = 10.0", "fill = [{ column = \"t.tier\" }]", 10, "either values"),
            ("sample_reads = 10.0", "fill = [{ column = \"t.n\", range = [5, 1] }]", 10, "smaller"),
            ("sample_reads = 10.0", "schema = \"mine\"", 10, "existing"),
            ("sample_reads = 10.0", "[[database.shadow.map]]\nsource = \"orders\"", 11, "schema = \"existing\""),
            (
                "sample_reads = 10.0",
                "schema = \"existing\"\n[[database.shadow.map]]\nsource = \"orders\"\nleft_out = true\nshadow = \"x\"",
                12,
                "left out",
            ),
            ("sample_reads = 10.0", "schema = \"existing\"\nmap = [{ source = \"a\", back = { b = \"c\" } }]", 11, "way there"),
            ("sample_reads = 10.0", "feed = \"mirror\"\nmirror_writes = \"rehearse\"", 11, "leave mirror_writes out"),
            ("sample_reads = 10.0", "feed = \"mirror\"\nserve_reads = 5.0", 11, "answers no reads"),
            ("sample_reads = 10.0", "mirror_writes = \"apply\"", 10, "belongs to feed"),
            ("sample_reads = 10.0", "copy.spool_folder = \"tmp\"", 10, "whole path"),
            ("sample_reads = 10.0", "sample_per_query = -1", 10, "per second"),
            ("sample_reads = 10.0", "ignore = [{ name = \"a\" }]", 10, "ignores nothing"),
            ("sample_reads = 10.0", "ignore = [{ name = \"a\", differences = [\"row\"] }]", 10, "sqlstate, columns"),
            ("sample_reads = 10.0", "ignore = [{ name = \"a\", floats = 2.0 }]", 10, "relative error"),
            ("sample_reads = 10.0", "ignore = [{ name = \"a\", fingerprint = \"xyz\", floats = 0.1 }]", 10, "hexadecimal"),
            ("sample_reads = 10.0", "copy.spool_max = \"1kB\"", 10, "1MB"),
            ("${SHOP_PASSWORD}", "${NOPE}", 6, "NOPE is not set"),
            ("10.0.0.2", "10.0.0.1", 9, "source itself"),
            ("name = \"shop\"", "name = \"understudy\"", 5, "console"),
            ("listen = \"127.0.0.1:6432\"", "listen = \"6432\"", 3, "ADDRESS:PORT"),
            ("listen = \"127.0.0.1:6432\"", "tls = { certificate = \"c\", key = \"k\", min_version = \"1.1\" }", 3, "1.2"),
            ("listen = \"127.0.0.1:6432\"", "client_idle_timeout = \"soon\"", 3, "or \"off\""),
            ("listen = \"127.0.0.1:6432\"", "max_message = \"2GB\"", 3, "1GB"),
            ("listen = \"127.0.0.1:6432\"", "client_memory = \"8kB\"", 3, "at least"),
            ("listen = \"127.0.0.1:6432\"", "tcp.keepalive_count = 0", 3, "between 1 and"),
            ("listen = \"127.0.0.1:6432\"", "tcp.keepalive_idle = \"10h\"", 3, "at most 9h"),
            ("listen = \"127.0.0.1:6432\"", "auth.users = \"passwd\"", 3, "file:PATH"),
            ("listen = \"127.0.0.1:6432\"", "auth = { users = \"query\", query = \"SELECT 1\" }", 3, "$1"),
            ("listen = \"127.0.0.1:6432\"", "unix_socket_dir = \"run\"", 3, "whole path"),
            ("listen = \"127.0.0.1:6432\"", "unix_socket_mode = \"0777\"", 3, "belongs to"),
            ("listen = \"127.0.0.1:6432\"", "unix_socket_dir = \"/run\"\nunix_socket_mode = \"0888\"", 4, "octal"),
            ("listen = \"127.0.0.1:6432\"", &format!("unix_socket_dir = \"/{}\"", "x".repeat(95)), 3, "107 bytes"),
            ("listen = \"127.0.0.1:6432\"", "listen = ", 3, ""),
            ("listen = \"127.0.0.1:6432\"", "pool_mode = \"statement\"", 3, "pool_mode is"),
            ("listen = \"127.0.0.1:6432\"", "pool_mode = \"transaction\"", 3, "users = \"query\""),
            ("listen = \"127.0.0.1:6432\"", "pool.size = 0", 3, "between"),
            ("listen = \"127.0.0.1:6432\"", "pool.min_size = 1", 3, "min_size"),
            ("listen = \"127.0.0.1:6432\"", "pool.reset_query = \"\"", 3, "DISCARD ALL"),
            ("name = \"shop\"", "name = \"shop\"\npool_mode = \"transaction\"", 6, "users = \"query\""),
        ] {
            assert!(GOOD.contains(from));
            match read(&GOOD.replace(from, to)) {
                Err(ConfigError::Invalid { line: found, reason, .. }) => {
                    assert!(reason.contains(part), "{to}: {reason}");
                    assert_eq!(found, line, "{to}: {reason}");
                }
                other => panic!("{to}: {other:?}"),
            }
        }
    }

    #[test]
    fn the_unix_socket_is_where_libpq_looks() {
        let socket = |more: &str| read(&GOOD.replace("listen = \"127.0.0.1:6432\"", more)).unwrap().proxy.unix_socket;
        assert_eq!(socket("listen = \"127.0.0.1:6432\""), None);
        let path = "/run/understudy/.s.PGSQL.7000".into();
        let given = "listen = \"0.0.0.0:7000\"\nunix_socket_dir = \"/run/understudy\"";
        assert_eq!(socket(given), Some(UnixSocketConfig { path, mode: 0o777 }));
        assert_eq!(socket("unix_socket_dir = \"/run/\"\nunix_socket_mode = \"0770\"").unwrap().mode, 0o770);
    }

    #[test]
    fn a_database_has_the_pool_of_the_proxy_but_for_what_it_says_itself() {
        let text = GOOD.replace(
            "listen = \"127.0.0.1:6432\"",
            "pool_mode = \"transaction\"\npool = { size = 7, queue_timeout = \"3s\" }\nauth.users = \"query\"",
        );
        let database = |text: &str| read(text).unwrap().databases[0].pool.clone();
        let pool = database(&text);
        assert_eq!((pool.mode, pool.size, pool.queue_timeout), (PoolMode::Transaction, Some(7), Duration::from_secs(3)));
        let own = text.replace("name = \"shop\"", "name = \"shop\"\npool.size = 9\npool.min_size = 2");
        assert_eq!((database(&own).size, database(&own).min_size, database(&own).mode), (Some(9), 2, PoolMode::Transaction));
        let session = text.replace("name = \"shop\"", "name = \"shop\"\npool_mode = \"session\"");
        assert_eq!(database(&session).mode, PoolMode::Session);
        assert_eq!(database(GOOD), PoolConfig::default());
        assert_eq!(database(&text.replace("size = 7, ", "")).size, Some(POOL_SIZE));
    }

    #[test]
    fn durations() {
        assert_eq!(parse_duration("500ms"), Some(Duration::from_millis(500)));
        assert_eq!(parse_duration("2.5s"), Some(Duration::from_millis(2500)));
        for text in ["", "s", "5", "-1s", "1d", "nan s"] {
            assert_eq!(parse_duration(text), None, "{text}");
        }
    }
}
