//! `postgres://user:secret@host:port/dbname?sslmode=…` as a type that cannot print its secret.
//! Source: PostgreSQL documentation, "Connection Strings" (libpq-connect).

use std::{fmt, time::Duration};

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

/// `sslmode`. Only what does not need TLS is accepted today; the rest is refused when the file is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SslMode {
    /// Never TLS.
    Disable,
    /// TLS if the server insists; today: without.
    Prefer,
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
        let mut sslmode = SslMode::Prefer;
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            match (key, decode(value)?.as_str()) {
                ("sslmode", "disable") => sslmode = SslMode::Disable,
                ("sslmode", "allow" | "prefer") => sslmode = SslMode::Prefer,
                ("sslmode", mode @ ("require" | "verify-ca" | "verify-full")) => {
                    return Err(format!(
                        "sslmode={mode} asks for TLS to the server, which this version cannot speak yet: \
                         use sslmode=disable or prefer on a trusted network or behind a tunnel"
                    ));
                }
                ("sslmode", mode) => return Err(format!("`{mode}` is not an sslmode")),
                ("host", value) if host.is_empty() => host = value.to_owned(),
                (key, _) => return Err(format!("`{key}` is not a url parameter that understudy knows (sslmode, host)")),
            }
        }
        if host.is_empty() {
            return Err("the url names no host: write postgres://user@HOST:port/dbname".into());
        }
        let user = decode(user)?;
        let dbname = if dbname.is_empty() { user.clone() } else { decode(dbname)? };
        Ok(ServerUrl { host, port, user, password: password.map(Secret::new), dbname, sslmode })
    }

    /// The same server, as another user.
    pub fn with_credentials(&self, user: &str, password: Option<Secret>) -> Self {
        ServerUrl { user: user.to_owned(), password, ..self.clone() }
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
    fn says_what_is_wrong() {
        for (text, part) in [
            ("http://x", "postgres://"),
            ("postgres://host/db", "no user"),
            ("postgres://a@h:0/d", "not a port"),
            ("postgres://a@h:x/d", "not a port"),
            ("postgres://a@/d", "no host"),
            ("postgres://a:%zz@h/d", "hexadecimal"),
            ("postgres://a@h/d?sslmode=verify-full", "TLS"),
            ("postgres://a@h/d?foo=1", "`foo`"),
        ] {
            let error = ServerUrl::parse(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
