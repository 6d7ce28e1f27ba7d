//! `postgres://user:secret@host:port/dbname?sslmode=…` as a type that cannot print its secret.
//! Source: PostgreSQL documentation, "Connection Strings" (libpq-connect).

use super::TcpConfig;
use std::{fmt, path::PathBuf, time::Duration};

/// Text that prints as `***` everywhere.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Secret(String);

impl Secret {
    /// Wraps a secret.
    pub fn new(text: impl Into<String>) -> Self {
        Secret(text.into())
    }

    /// The text itself: only for the wire.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// `sslmode`, with libpq's meanings. None of them concerns a Unix socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum SslMode {
    /// Never TLS.
    Disable,
    /// Without, unless the server insists.
    Allow,
    /// TLS if the server speaks it.
    #[default]
    Prefer,
    /// TLS, whoever the server is (with `sslrootcert`: as `verify-ca`).
    Require,
    /// TLS, and the server's certificate comes from a known authority.
    VerifyCa,
    /// The same, and the certificate names the host of the url.
    VerifyFull,
}

/// `channel_binding`: whether SCRAM also proves that nobody sits in the middle of the TLS connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ChannelBinding {
    /// Never.
    Disable,
    /// Where the server offers it.
    #[default]
    Prefer,
    /// A server that does not do it is refused.
    Require,
}

/// `sslrootcert`
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum RootCertificates {
    /// `system`: those of this machine.
    System,
    /// A file of certificates in PEM.
    File(PathBuf),
}

/// What a url says about TLS besides [`SslMode`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct ServerTls {
    /// `sslrootcert`
    pub roots: Option<RootCertificates>,
    /// `sslcert` and `sslkey`: what we show when the server asks.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// `sslnegotiation=direct`: a TLS handshake at once, without SSLRequest (PostgreSQL 17 and newer).
    pub direct: bool,
    /// `channel_binding`
    pub channel_binding: ChannelBinding,
}

/// Where a server is and who we are there. `Display` and `Debug` never show the password.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct ServerUrl {
    /// Host name or address, or a directory (starting with `/`) that holds the server's Unix socket.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// Role.
    pub user: String,
    /// Password, if the URL has one.
    pub password: Option<Secret>,
    /// Database.
    pub dbname: String,
    /// `sslmode`
    pub sslmode: SslMode,
    /// Everything else about TLS.
    pub tls: ServerTls,
    /// `keepalives…` and `tcp_user_timeout`
    pub tcp: TcpConfig,
}

impl SslMode {
    /// As libpq spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            SslMode::Disable => "disable",
            SslMode::Allow => "allow",
            SslMode::Prefer => "prefer",
            SslMode::Require => "require",
            SslMode::VerifyCa => "verify-ca",
            SslMode::VerifyFull => "verify-full",
        }
    }
}

impl ServerUrl {
    /// Parses a connection URL.
    ///
    /// # Errors
    /// A sentence that says which part is wrong; never contains the password.
    pub fn parse(text: &str) -> Result<Self, String> {
        let rest = text
            .strip_prefix("postgres://")
            .or_else(|| text.strip_prefix("postgresql://"))
            .ok_or("a server url starts with postgres:// or postgresql://")?;
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, dbname) = rest.split_once('/').unwrap_or((rest, ""));
        let (credentials, host_port) = authority.rsplit_once('@').unwrap_or(("", authority));
        let (user, password) = match credentials.split_once(':') {
            Some((user, password)) => (user, Some(decode(password)?)),
            None => (credentials, None),
        };
        if user.is_empty() {
            return Err("the url names no user: write postgres://USER@host:port/dbname".into());
        }
        let (host, port) = match host_port.rsplit_once(':') {
            Some((host, port)) if !host.ends_with(':') && !port.ends_with(']') => {
                (host, port.parse::<u16>().ok().filter(|p| *p != 0).ok_or(format!("`{port}` is not a port (1 to 65535)"))?)
            }
            _ => (host_port, 5432),
        };
        let mut host = decode(host.trim_start_matches('[').trim_end_matches(']'))?;
        let mut query_tls = QueryTls::default();
        let mut tcp = TcpConfig::SERVERS;
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            match (key, decode(value)?.as_str()) {
                ("host", value) if host.is_empty() => host = value.to_owned(),
                ("keepalives" | "keepalives_idle" | "keepalives_interval" | "keepalives_count" | "tcp_user_timeout", value) => {
                    take_tcp(&mut tcp, key, value)?;
                }
                (key, value) => query_tls.take(key, value)?,
            }
        }
        if host.is_empty() {
            return Err("the url names no host: write postgres://user@HOST:port/dbname".into());
        }
        let user = decode(user)?;
        let dbname = if dbname.is_empty() { user.clone() } else { decode(dbname)? };
        let (sslmode, tls) = query_tls.finish()?;
        Ok(ServerUrl { host, port, user, password: password.map(Secret::new), dbname, sslmode, tls, tcp })
    }

    /// The same server, as another user.
    pub fn with_credentials(&self, user: &str, password: Option<Secret>) -> Self {
        ServerUrl { user: user.to_owned(), password, ..self.clone() }
    }

    /// What the url says about TLS, in the environment variables of libpq, for its programs.
    pub fn tls_environment(&self) -> Vec<(&'static str, std::ffi::OsString)> {
        let mut variables = vec![("PGSSLMODE", self.sslmode.as_str().into())];
        match &self.tls.roots {
            Some(RootCertificates::File(path)) => variables.push(("PGSSLROOTCERT", path.into())),
            Some(RootCertificates::System) => variables.push(("PGSSLROOTCERT", "system".into())),
            None => {}
        }
        if let Some((certificate, key)) = &self.tls.identity {
            variables.extend([("PGSSLCERT", certificate.into()), ("PGSSLKEY", key.into())]);
        }
        if self.tls.direct {
            variables.push(("PGSSLNEGOTIATION", "direct".into()));
        }
        let binding = match self.tls.channel_binding {
            ChannelBinding::Disable => Some("disable"),
            ChannelBinding::Prefer => None,
            ChannelBinding::Require => Some("require"),
        };
        variables.extend(binding.map(|binding| ("PGCHANNELBINDING", binding.into())));
        variables
    }

    /// A tokio-postgres configuration for control connections. `application_name` starts with `understudy`.
    pub fn to_tokio(&self, application_name: &str) -> tokio_postgres::Config {
        let mut config = tokio_postgres::Config::new();
        if self.host.starts_with('/') {
            config.host_path(&self.host);
        } else {
            config.host(&self.host);
        }
        config.port(self.port).user(&self.user).dbname(&self.dbname).application_name(application_name);
        config.connect_timeout(Duration::from_secs(10)).ssl_mode(tokio_postgres::config::SslMode::Disable);
        config.keepalives(true).keepalives_idle(Duration::from_secs(30));
        if let Some(password) = &self.password {
            config.password(password.expose());
        }
        config
    }
}

/// The url's parameters about TLS, as they come.
#[derive(Default)]
struct QueryTls {
    sslmode: Option<SslMode>,
    roots: Option<RootCertificates>,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
    direct: bool,
    channel_binding: ChannelBinding,
}

impl QueryTls {
    fn take(&mut self, key: &str, value: &str) -> Result<(), String> {
        match (key, value) {
            ("sslmode", mode) => {
                self.sslmode = Some(match mode {
                    "disable" => SslMode::Disable,
                    "allow" => SslMode::Allow,
                    "prefer" => SslMode::Prefer,
                    "require" => SslMode::Require,
                    "verify-ca" => SslMode::VerifyCa,
                    "verify-full" => SslMode::VerifyFull,
                    _ => return Err(format!("`{mode}` is not an sslmode (disable, allow, prefer, require, verify-ca, verify-full)")),
                });
            }
            ("sslrootcert", "system") => self.roots = Some(RootCertificates::System),
            ("sslrootcert", file) => self.roots = Some(RootCertificates::File(file.into())),
            ("sslcert", file) => self.certificate = Some(file.into()),
            ("sslkey", file) => self.key = Some(file.into()),
            ("sslnegotiation", "postgres") => self.direct = false,
            ("sslnegotiation", "direct") => self.direct = true,
            ("sslnegotiation", other) => return Err(format!("sslnegotiation is postgres or direct, not `{other}`")),
            ("channel_binding", "disable") => self.channel_binding = ChannelBinding::Disable,
            ("channel_binding", "prefer") => self.channel_binding = ChannelBinding::Prefer,
            ("channel_binding", "require") => self.channel_binding = ChannelBinding::Require,
            ("channel_binding", other) => return Err(format!("channel_binding is disable, prefer or require, not `{other}`")),
            (key, _) => {
                return Err(format!(
                    "`{key}` is not a url parameter that understudy knows (host, sslmode, sslrootcert, sslcert, sslkey, \
                     sslnegotiation, channel_binding, keepalives, keepalives_idle, keepalives_interval, keepalives_count, tcp_user_timeout)"
                ));
            }
        }
        Ok(())
    }

    /// Refuses what contradicts itself, as libpq does.
    fn finish(self) -> Result<(SslMode, ServerTls), String> {
        let system = self.roots == Some(RootCertificates::System);
        let sslmode = match self.sslmode {
            None if system => SslMode::VerifyFull,
            None => SslMode::default(),
            Some(weak) if system && weak != SslMode::VerifyFull => {
                return Err("sslrootcert=system needs sslmode=verify-full: anybody can get a certificate from a public authority".into());
            }
            Some(mode) => mode,
        };
        if matches!(sslmode, SslMode::VerifyCa | SslMode::VerifyFull) && self.roots.is_none() {
            return Err("verifying the server needs sslrootcert=FILE with the certificate of its authority, or sslrootcert=system".into());
        }
        if self.direct && matches!(sslmode, SslMode::Disable | SslMode::Allow | SslMode::Prefer) {
            return Err("sslnegotiation=direct needs sslmode=require or stronger".into());
        }
        let identity = match (self.certificate, self.key) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            _ => return Err("sslcert and sslkey belong together: give both or neither".into()),
        };
        Ok((sslmode, ServerTls { roots: self.roots, identity, direct: self.direct, channel_binding: self.channel_binding }))
    }
}

/// Seconds, probes and (for `tcp_user_timeout`) milliseconds; 0: the operating system's.
fn take_tcp(tcp: &mut TcpConfig, key: &str, value: &str) -> Result<(), String> {
    let number: u32 = value.parse().ok().filter(|number| *number <= 32_767 || key == "tcp_user_timeout").ok_or_else(|| {
        let unit = if key == "tcp_user_timeout" { "milliseconds" } else { "0 to 32767" };
        format!("{key} is a number ({unit}), not `{value}`")
    })?;
    let seconds = (number > 0).then(|| Duration::from_secs(number.into()));
    match (key, &mut tcp.keepalive) {
        ("keepalives", keepalive) if number == 0 => *keepalive = None,
        ("tcp_user_timeout", _) => tcp.user_timeout = (number > 0).then(|| Duration::from_millis(number.into())),
        ("keepalives_idle", Some(keepalive)) => keepalive.idle = seconds,
        ("keepalives_interval", Some(keepalive)) => keepalive.interval = seconds,
        ("keepalives_count", Some(keepalive)) => keepalive.count = (number > 0).then_some(number.min(127)),
        _ => {} // switched off: how is of no concern
    }
    Ok(())
}

impl fmt::Display for ServerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let password = if self.password.is_some() { ":***" } else { "" };
        write!(f, "postgres://{}{password}@{}:{}/{}", self.user, self.host, self.port, self.dbname)
    }
}

impl fmt::Debug for ServerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Percent-decoding (RFC 3986 section 2.1).
fn decode(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |byte: Option<u8>| byte.and_then(|b| (b as char).to_digit(16));
        match (digit(rest.next()), digit(rest.next())) {
            (Some(high), Some(low)) => bytes.push((high * 16 + low) as u8),
            _ => return Err("a `%` in the url is not followed by two hexadecimal digits (write %25 for a percent sign)".into()),
        }
    }
    String::from_utf8(bytes).map_err(|_| "the url is not UTF-8 after percent-decoding".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Keepalive;

    #[test]
    fn parses_and_hides_the_password() {
        let url = ServerUrl::parse("postgres://app:s%40cret@10.0.0.1:5433/shop?sslmode=disable").unwrap();
        assert_eq!((url.host.as_str(), url.port, url.user.as_str(), url.dbname.as_str()), ("10.0.0.1", 5433, "app", "shop"));
        assert_eq!(url.password.as_ref().unwrap().expose(), "s@cret");
        for text in [format!("{url}"), format!("{url:?}")] {
            assert!(!text.contains("cret"), "{text}");
        }
    }

    #[test]
    fn fills_in_defaults() {
        let url = ServerUrl::parse("postgresql://app@db").unwrap();
        assert_eq!((url.port, url.dbname.as_str()), (5432, "app"));
        assert_eq!(ServerUrl::parse("postgres://app@[::1]:6000/x").unwrap().host, "::1");
        assert_eq!(ServerUrl::parse("postgres://app@/x?host=/tmp").unwrap().host, "/tmp");
    }

    #[test]
    fn says_how_to_be_sure_of_the_server() {
        let url = ServerUrl::parse("postgres://a@h/d?sslmode=verify-ca&sslrootcert=%2Fca.crt&sslcert=c&sslkey=k&channel_binding=require");
        let ServerUrl { sslmode, tls, .. } = url.unwrap();
        assert_eq!(sslmode, SslMode::VerifyCa);
        assert_eq!(tls.roots, Some(RootCertificates::File("/ca.crt".into())));
        assert_eq!(tls.identity, Some(("c".into(), "k".into())));
        assert_eq!((tls.direct, tls.channel_binding), (false, ChannelBinding::Require));
        assert_eq!(ServerUrl::parse("postgres://a@h/d?sslrootcert=system").unwrap().sslmode, SslMode::VerifyFull);
        assert_eq!(ServerUrl::parse("postgres://a@h/d").unwrap().sslmode, SslMode::Prefer);
    }

    #[test]
    fn says_when_a_server_counts_as_gone() {
        let url = |query: &str| ServerUrl::parse(&format!("postgres://a@h/d?{query}")).unwrap().tcp;
        assert_eq!(url(""), TcpConfig::SERVERS);
        assert_eq!(url("keepalives=0&keepalives_idle=5").keepalive, None);
        let tcp = url("keepalives_idle=5&keepalives_interval=0&keepalives_count=2&tcp_user_timeout=1500");
        assert_eq!(tcp.keepalive, Some(Keepalive { idle: Some(Duration::from_secs(5)), interval: None, count: Some(2) }));
        assert_eq!(tcp.user_timeout, Some(Duration::from_millis(1500)));
    }

    #[test]
    fn says_what_is_wrong() {
        for (text, part) in [
            ("http://x", "postgres://"),
            ("postgres://host/db", "no user"),
            ("postgres://a@h:0/d", "not a port"),
            ("postgres://a@h:x/d", "not a port"),
            ("postgres://a@/d", "no host"),
            ("postgres://a:%zz@h/d", "hexadecimal"),
            ("postgres://a@h/d?sslmode=verify-full", "sslrootcert=FILE"),
            ("postgres://a@h/d?sslmode=always", "verify-full"),
            ("postgres://a@h/d?sslmode=require&sslrootcert=system", "verify-full"),
            ("postgres://a@h/d?sslnegotiation=direct", "sslmode=require"),
            ("postgres://a@h/d?sslcert=x.crt", "both"),
            ("postgres://a@h/d?channel_binding=yes", "require"),
            ("postgres://a@h/d?keepalives_idle=soon", "keepalives_idle is a number"),
            ("postgres://a@h/d?foo=1", "`foo`"),
        ] {
            let error = ServerUrl::parse(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
