//! Everything that decides about a login, as read at one moment.

use super::{
    hba::{Attempt, ClientCertificate, Method, Rule},
    ident::Maps,
    scram::{Verifier, random},
    stored::{Stored, user_list},
};
use crate::config::{AuthConfig, TlsConfig, UserSource};
use std::{collections::HashMap, path::PathBuf};

/// The settings or files of `[proxy.auth]` are wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// A file could not be read.
    #[error("cannot read {path}, which {key} of [proxy.auth] names: {reason}", path = .path.display())]
    Read {
        /// As configured.
        path: PathBuf,
        /// `users`, `hba` or `ident`.
        key: &'static str,
        /// From the operating system.
        reason: String,
    },
    /// A line of a file.
    #[error("{path} line {line}: {reason}", path = .path.display())]
    Line {
        /// As configured.
        path: PathBuf,
        /// 1-based.
        line: usize,
        /// What is wrong; never a secret.
        reason: String,
    },
    /// An element of `rules`, or rules that contradict the rest.
    #[error("rules of [proxy.auth]: {0}")]
    Rule(String),
}

/// Read once; a reload makes a new one for the next clients.
#[derive(Debug)]
pub struct Policy {
    /// Where names are looked up.
    users: UserSource,
    listed: HashMap<String, Option<Stored>>,
    rules: Vec<Rule>,
    maps: Maps,
    /// Of verifiers for names that do not exist. It changes with a reload, as it does in PostgreSQL with initdb.
    secret: [u8; 32],
}

impl Default for Policy {
    /// The owner of the writes authenticates.
    fn default() -> Self {
        let (users, listed, rules, maps) = (UserSource::Relay, HashMap::new(), Vec::new(), Maps::default());
        Policy { users, listed, rules, maps, secret: random() }
    }
}

impl Policy {
    /// Reads and checks the files.
    ///
    /// # Errors
    /// [`AuthError`]
    pub fn load(config: &AuthConfig, tls: Option<&TlsConfig>) -> Result<Self, AuthError> {
        let read = |path: &PathBuf, key| {
            std::fs::read_to_string(path).map_err(|error| AuthError::Read { path: path.clone(), key, reason: error.to_string() })
        };
        let at = |path: &PathBuf| {
            let path = path.clone();
            move |(line, reason)| AuthError::Line { path, line, reason }
        };
        let listed = match &config.users {
            UserSource::File(path) => user_list(&read(path, "users")?).map_err(at(path))?,
            UserSource::Relay | UserSource::Query(_) => HashMap::new(),
        };
        let mut rules = Vec::new();
        for text in &config.rules {
            rules.extend(Rule::parse(text).map_err(|reason| AuthError::Rule(format!("\"{text}\": {reason}")))?);
        }
        if let Some(path) = &config.hba {
            rules.extend(Rule::parse_all(&read(path, "hba")?).map_err(at(path))?);
            if rules.is_empty() {
                return Err(AuthError::Rule("there are none, so that nobody could log in".into()));
            }
        }
        let maps = match &config.ident {
            Some(path) => Maps::parse(&read(path, "ident")?).map_err(at(path))?,
            None => Maps::default(),
        };
        for rule in &rules {
            if rule.client_certificate != ClientCertificate::No && tls.is_none_or(|tls| tls.client_ca.is_none()) {
                return Err(AuthError::Rule("certificates of clients need client_ca in [proxy.tls]".into()));
            }
            if let Some(map) = rule.map.as_ref().filter(|map| !maps.has(map)) {
                return Err(AuthError::Rule(format!("map={map}: the file that ident names has no such map")));
            }
            if matches!(rule.method, Method::Password | Method::Md5 | Method::Scram) && config.users == UserSource::Relay {
                return Err(AuthError::Rule(
                    "password, md5 and scram-sha-256 need users = \"file:…\" or \"query\"; with users = \"relay\" the method is relay"
                        .into(),
                ));
            }
        }
        Ok(Policy { users: config.users.clone(), listed, rules, maps, secret: random() })
    }

    /// The rule for a connection. `Err`: none fits.
    pub(super) fn rule(&self, attempt: &Attempt<'_>) -> Result<Option<&Rule>, ()> {
        match self.rules.iter().find(|rule| rule.fits(attempt)) {
            Some(rule) => Ok(Some(rule)),
            None if self.rules.is_empty() => Ok(None),
            None => Err(()),
        }
    }

    /// Without a rule.
    pub(super) fn default_method(&self) -> Method {
        match self.users {
            UserSource::Relay => Method::Relay,
            UserSource::File(_) | UserSource::Query(_) => Method::Md5,
        }
    }

    /// Whether a name from a certificate, or of a user of the operating system, may be that role.
    pub(super) fn allows(&self, map: Option<&str>, name: &str, role: &str) -> bool {
        self.maps.allow(map, name, role)
    }

    /// The auth query, where users are looked up with one.
    pub fn query(&self) -> Option<&str> {
        match &self.users {
            UserSource::Query(query) => Some(query),
            UserSource::Relay | UserSource::File(_) => None,
        }
    }

    /// From the user list.
    pub fn listed(&self, user: &str) -> Option<&Stored> {
        self.listed.get(user)?.as_ref()
    }

    /// A verifier that no password fits, for a name that has none.
    pub fn mock(&self, user: &str) -> Verifier {
        Verifier::mock(user, &self.secret)
    }
}
