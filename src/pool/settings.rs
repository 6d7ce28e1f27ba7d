//! Session settings that follow a client from server to server: what it said at start-up and what it has SET since, over
//! what a fresh connection of its role has. Pure: texts out, rows in.
//!
//! What SET, RESET, set_config() and their rollbacks have left is asked of the server itself, after the transaction; texts
//! only tell what must be asked for.

use bytes::Bytes;
use std::{
    hash::{BuildHasher, RandomState},
    sync::OnceLock,
};

/// Names and values, by name; those that do not differ from a fresh connection's are not in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Settings(Vec<(String, String)>);

/// Settings that are not changed through `set_config`.
const ROLE: &str = "role";
const SESSION_AUTHORIZATION: &str = "session_authorization";
/// Those that no statement's meaning depends on.
const WITHOUT_MEANING: [&str; 7] = [
    "application_name",
    "client_min_messages",
    "idle_in_transaction_session_timeout",
    "idle_session_timeout",
    "lock_timeout",
    "statement_timeout",
    "transaction_timeout",
];
/// Settings remembered per session: more than PostgreSQL 18 has.
const SETTINGS_MAX: usize = 500;

impl Settings {
    /// From what a client says at start-up. `Err`: why that cannot be done.
    ///
    /// # Errors
    /// A switch in `options` that is not a setting.
    pub fn of_startup(parameters: &[(Bytes, Bytes)]) -> Result<Self, String> {
        let mut settings = Settings::default();
        for (name, value) in parameters {
            let (name, value) = (String::from_utf8_lossy(name), String::from_utf8_lossy(value));
            if name == "options" {
                for (name, value) in switches(&value)? {
                    settings.set(&name, &value);
                }
            }
        }
        // what stands in a parameter of its own comes behind `options`, as in PostgreSQL
        for (name, value) in parameters.iter().filter(|(name, _)| &name[..] != b"options") {
            settings.set(&String::from_utf8_lossy(name), &String::from_utf8_lossy(value));
        }
        Ok(settings)
    }

    /// A value.
    pub fn get(&self, name: &str) -> Option<&str> {
        let at = self.0.binary_search_by(|(known, _)| known.as_str().cmp(name)).ok()?;
        self.0.get(at).map(|(_, value)| value.as_str())
    }

    /// Names are the same in any case.
    pub fn set(&mut self, name: &str, value: &str) {
        let name = name.to_ascii_lowercase();
        match self.0.binary_search_by(|(known, _)| known.cmp(&name)) {
            Ok(at) => {
                if let Some(entry) = self.0.get_mut(at) {
                    entry.1 = value.to_owned();
                }
            }
            Err(at) if self.0.len() < SETTINGS_MAX => self.0.insert(at, (name, value.to_owned())),
            Err(_) => {}
        }
    }

    /// Back to what a fresh connection has.
    pub fn remove(&mut self, name: &str) {
        self.0.retain(|(known, _)| known != name);
    }

    /// These, and of the others those that are not among them.
    pub fn over(&self, defaults: &Settings) -> Settings {
        let mut all = defaults.clone();
        self.0.iter().for_each(|(name, value)| all.set(name, value));
        all
    }

    /// Nothing differs from a fresh connection.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Stands for what decides the meaning of a statement when it is prepared: of its names, and of literals, which become
    /// constants then (`TimeZone`, `DateStyle`, any setting that an input function reads).
    pub fn salt(&self) -> u64 {
        static KEY: OnceLock<RandomState> = OnceLock::new();
        let decides: Vec<_> = self.0.iter().filter(|(name, _)| !WITHOUT_MEANING.contains(&name.as_str())).collect();
        KEY.get_or_init(RandomState::new).hash_one(decides)
    }

    /// What makes a connection with these settings have the client's. Empty: nothing to do.
    pub fn text_to(&self, wanted: &Settings) -> String {
        let mut text = String::new();
        let special = [SESSION_AUTHORIZATION, ROLE];
        let identity_differs = special.iter().any(|name| self.get(name) != wanted.get(name));
        let plain = |(name, _): &&(String, String)| !special.contains(&name.as_str());
        let gone: Vec<_> = self.0.iter().filter(plain).filter(|(name, _)| wanted.get(name).is_none()).collect();
        let new: Vec<_> = wanted.0.iter().filter(plain).filter(|(name, value)| self.get(name) != Some(value)).collect();
        if gone.is_empty() && new.is_empty() && !identity_differs {
            return text;
        }
        // what the log-in's role may set, the other one perhaps may not
        let identity = special.iter().any(|name| self.get(name).is_some() || wanted.get(name).is_some());
        if identity {
            text.push_str("RESET ROLE; RESET SESSION AUTHORIZATION; ");
        }
        for (name, _) in gone {
            let quoted: Vec<_> = name.split('.').map(|part| format!("\"{}\"", part.replace('"', "\"\""))).collect();
            text.push_str(&format!("RESET {}; ", quoted.join(".")));
        }
        for (name, value) in new {
            text.push_str(&format!("SELECT pg_catalog.set_config({}, {}, false); ", literal(name), literal(value)));
        }
        if let Some(role) = wanted.get(SESSION_AUTHORIZATION) {
            text.push_str(&format!("SET SESSION AUTHORIZATION {}; ", literal(role)));
        }
        if let Some(role) = wanted.get(ROLE) {
            text.push_str(&format!("SET ROLE {}; ", literal(role)));
        }
        text
    }

    /// Some value is not ASCII: it means something in one encoding only.
    pub fn needs_utf8(&self) -> bool {
        !self.0.iter().all(|(_, value)| value.is_ascii())
    }
}

/// A string literal that is right whatever `standard_conforming_strings` says.
pub fn literal(text: &str) -> String {
    format!(" E'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
}

/// `-c name=value`, `-cname=value`, `--name=value`, split at blanks, with backslashes before blanks and backslashes
/// (`pg_split_opts` in `src/backend/utils/init/postinit.c`).
fn switches(options: &str) -> Result<Vec<(String, String)>, String> {
    let mut words = vec![];
    let mut chars = options.chars().peekable();
    loop {
        while chars.peek().is_some_and(|c| c.is_ascii_whitespace()) {
            chars.next();
        }
        let mut word = String::new();
        while let Some(c) = chars.next_if(|c| !c.is_ascii_whitespace()) {
            match c {
                '\\' => word.extend(chars.next()),
                c => word.push(c),
            }
        }
        if word.is_empty() {
            break;
        }
        words.push(word);
    }
    let mut words = words.into_iter();
    let mut found = Vec::new();
    while let Some(word) = words.next() {
        let assignment = match (word.strip_prefix("--"), word.strip_prefix("-c")) {
            (Some(assignment), _) => assignment.to_owned(),
            (None, Some("")) => words.next().unwrap_or_default(),
            (None, Some(assignment)) => assignment.to_owned(),
            (None, None) => return Err(format!("\"{}\" in options", word.split('=').next().unwrap_or_default())),
        };
        let Some((name, value)) = assignment.split_once('=') else {
            return Err(format!("\"{assignment}\" in options has no value"));
        };
        found.push((name.replace('-', "_"), value.to_owned()));
    }
    Ok(found)
}

/// The one setting that a statement of the form `SET [SESSION] name {TO | =} …` names. `None`: it may be any, or it is set
/// back, and then what the client said at its start-up counts.
pub fn one_setting(text: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(text).ok()?;
    let text = text.trim_start();
    let mut words = text.split(|c: char| c.is_ascii_whitespace() || c == '=').filter(|word| !word.is_empty());
    let mut next = || words.next().map(str::to_ascii_lowercase);
    if next()? != "set" {
        return None;
    }
    let mut name = next()?;
    if name == "session" {
        name = next()?;
    }
    if words.any(|word| ["default", "local"].iter().any(|back| word.to_ascii_lowercase().contains(back))) {
        return None;
    }
    let plain = |name: &str| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.'));
    match name.as_str() {
        "authorization" | "characteristics" | "transaction" | "xml" | "catalog" | "seed" | "local" => None,
        "schema" => Some("search_path".into()),
        "names" => Some("client_encoding".into()),
        "time" => Some("timezone".into()),
        "role" => Some(ROLE.into()),
        name if plain(name) && !name.is_empty() && name != SESSION_AUTHORIZATION => Some(name.to_owned()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn settings(pairs: &[(&str, &str)]) -> Settings {
        let mut settings = Settings::default();
        pairs.iter().for_each(|(name, value)| settings.set(name, value));
        settings
    }

    #[test]
    fn options_are_split_as_postgres_splits_them() {
        let of = |options: &str| Settings::of_startup(&[(Bytes::from_static(b"options"), Bytes::copy_from_slice(options.as_bytes()))]);
        assert_eq!(of(""), Ok(settings(&[])));
        assert_eq!(
            of(r"-c search_path=a,\ b  -cwork_mem=1MB --statement-timeout=5s"),
            Ok(settings(&[("search_path", "a, b"), ("statement_timeout", "5s"), ("work_mem", "1MB")]))
        );
        assert!(of("-d 5").is_err() && of("-c x").is_err());
        let both = [("options", "-c timezone=UTC"), ("TimeZone", "CET")].map(|(n, v)| (Bytes::from(n), Bytes::from(v)));
        assert_eq!(Settings::of_startup(&both).unwrap().get("timezone"), Some("CET"));
    }

    #[test]
    fn only_differences_are_told() {
        let (none, one) = (settings(&[]), settings(&[("work_mem", "1MB")]));
        assert_eq!(one.text_to(&one), "");
        assert_eq!(none.text_to(&one), "SELECT pg_catalog.set_config( E'work_mem',  E'1MB', false); ");
        assert_eq!(one.text_to(&none), "RESET \"work_mem\"; ");
        assert_eq!(settings(&[("app.id", "1")]).text_to(&none), "RESET \"app\".\"id\"; ");
        let role = settings(&[("role", "o'x"), ("work_mem", "1MB")]);
        assert_eq!(one.text_to(&role), "RESET ROLE; RESET SESSION AUTHORIZATION; SET ROLE  E'o''x'; ");
        assert!(role.text_to(&one).starts_with("RESET ROLE"));
        assert_eq!(role.text_to(&role), "");
    }

    #[test]
    fn a_salt_stands_for_what_statements_mean() {
        let salt = |pairs: &[(&str, &str)]| settings(pairs).salt();
        assert_eq!(salt(&[]), salt(&[("application_name", "x"), ("statement_timeout", "1s")]));
        for name in ["timezone", "datestyle", "search_path", "role", "app.locale"] {
            assert_ne!(salt(&[]), salt(&[(name, "x")]), "{name}");
        }
    }

    #[test]
    fn the_setting_that_a_text_names() {
        for (text, name) in [
            ("SET search_path TO a, b", Some("search_path")),
            ("set  Session work_mem='1MB'", Some("work_mem")),
            ("SET app.tenant = '7'", Some("app.tenant")),
            ("SET TIME ZONE 'UTC'", Some("timezone")),
            ("SET NAMES 'latin1'", Some("client_encoding")),
            ("SET SCHEMA 'x'", Some("search_path")),
            ("SET ROLE x", Some("role")),
            ("SET SESSION AUTHORIZATION x", None),
            ("SET session_authorization = x", None),
            ("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY", None),
            ("SET /* x */ work_mem = 1", None),
            ("SET \"Weird\" = 1", None),
            ("SELECT set_config('a', 'b', false)", None),
            ("RESET ALL", None),
            ("SET work_mem TO DEFAULT", None),
            ("set timezone=default;", None),
            ("SET TIME ZONE LOCAL", None),
            ("SET default_transaction_read_only = on", Some("default_transaction_read_only")),
        ] {
            assert_eq!(one_setting(text.as_bytes()).as_deref(), name, "{text}");
        }
    }

    proptest! {
        #[test]
        fn later_values_count_and_names_are_sorted(pairs in proptest::collection::vec(("[a-c]{1,2}", "[a-z']{0,3}"), 0..12)) {
            let mut settings = Settings::default();
            for (name, value) in &pairs {
                settings.set(name, value);
            }
            for (name, _) in &pairs {
                let last = pairs.iter().rev().find(|(known, _)| known == name).map(|(_, value)| value.as_str());
                prop_assert_eq!(settings.get(name), last);
            }
            prop_assert!(settings.0.windows(2).all(|pair| pair[0].0 < pair[1].0));
            prop_assert_eq!(settings.text_to(&settings), "");
        }

        #[test]
        fn any_text_names_one_setting_or_none(text: Vec<u8>, options in ".{0,40}") {
            let _ = one_setting(&text);
            let _ = switches(&options);
        }
    }
}
