//! The owner's schema as SQL text: pg_dump is found, run at the copy's snapshot, and its output made fit for one batch.
//!
//! Deliberately absent: our own idea of DDL. pg_dump of the owner's version or newer knows everything there is.

use super::{CdcError, names::PREFIX};
use crate::config::ServerUrl;
use std::{
    path::{Path, PathBuf},
    process::Stdio,
};
use tokio::process::Command;

/// Most text that is kept of a schema: a schema of 100,000 tables is about 100 MB.
const SCHEMA_BYTES_MAX: usize = 512 << 20;

/// Which half of the schema.
#[derive(Clone, Copy, Debug)]
pub(super) enum Section {
    /// Everything rows need to be stored.
    PreData,
    /// Indexes, constraints, triggers, rules: after the rows.
    PostData,
}

/// Places where a pg_dump may be, in order.
fn candidates() -> Vec<PathBuf> {
    let mut found = Vec::new();
    if let Some(path) = std::env::var_os("UNDERSTUDY_PG_DUMP") {
        found.push(PathBuf::from(path));
    }
    if let Some(path) = std::env::var_os("PATH") {
        found.extend(std::env::split_paths(&path).map(|folder| folder.join("pg_dump")));
    }
    let children = |folder: &Path| -> Vec<PathBuf> {
        let mut list: Vec<PathBuf> =
            std::fs::read_dir(folder).map(|entries| entries.flatten().map(|entry| entry.path()).collect()).unwrap_or_default();
        list.sort();
        list
    };
    for folder in children(Path::new("/usr/lib/postgresql")) {
        found.push(folder.join("bin/pg_dump"));
    }
    for kind in children(Path::new(".deps")) {
        found.push(kind.join("bin/pg_dump"));
        for version in children(&kind) {
            found.push(version.join("bin/pg_dump"));
        }
    }
    found.retain(|path| path.is_file());
    found
}

/// The major version in `pg_dump (PostgreSQL) 15.14 (Debian …)`.
fn major(output: &str) -> Option<u32> {
    let version = output.split_once("(PostgreSQL)")?.1.trim_start();
    let digits: String = version.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

/// A pg_dump that can read a server of this major version.
pub(super) async fn find(server_major: u32) -> Result<PathBuf, CdcError> {
    let mut found = Vec::new();
    for path in candidates() {
        let Ok(output) = Command::new(&path).arg("--version").stdin(Stdio::null()).output().await else { continue };
        if let Some(version) = major(&String::from_utf8_lossy(&output.stdout)) {
            found.push((version, path));
        }
    }
    choose(found, server_major)
}

/// The oldest that is new enough; of equals the first found.
fn choose(found: Vec<(u32, PathBuf)>, server_major: u32) -> Result<PathBuf, CdcError> {
    let best = found.iter().filter(|(version, _)| *version >= server_major).min_by_key(|(version, _)| *version);
    best.map(|(_, path)| path.clone()).ok_or_else(|| {
        let seen: Vec<String> = found.iter().map(|(version, path)| format!("{} ({version})", path.display())).collect();
        let seen = if seen.is_empty() { "none".to_owned() } else { seen.join(", ") };
        CdcError::Setup(format!(
            "copying the schema of a PostgreSQL {server_major} needs a pg_dump of version {server_major} or newer; found: {seen}. \
             Install postgresql-client-{server_major}, or set UNDERSTUDY_PG_DUMP to its path"
        ))
    })
}

/// Runs pg_dump for one section at a snapshot. The password travels in the environment, never in the arguments.
pub(super) async fn run(pg_dump: &Path, url: &ServerUrl, section: Section, snapshot: &str) -> Result<String, CdcError> {
    let mut command = Command::new(pg_dump);
    command
        .arg(match section {
            Section::PreData => "--section=pre-data",
            Section::PostData => "--section=post-data",
        })
        .args(["--no-publications", "--no-subscriptions", "--no-tablespaces", "--exclude-schema=understudy", "--no-password"])
        .args(["--lock-wait-timeout=10000", "--encoding=UTF8"])
        .arg(format!("--snapshot={snapshot}"))
        .env("PGHOST", &url.host)
        .env("PGPORT", url.port.to_string())
        .env("PGUSER", &url.user)
        .env("PGDATABASE", &url.dbname)
        .env("PGSSLMODE", "disable")
        .env("PGAPPNAME", "understudy pg_dump")
        .env_remove("PGOPTIONS")
        .env_remove("PGSERVICE")
        .env_remove("PGPASSWORD")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    if let Some(password) = &url.password {
        command.env("PGPASSWORD", password.expose());
    }
    let failed = |reason: &str| CdcError::Setup(format!("{} could not read the owner's schema: {reason}", pg_dump.display()));
    let output = command.output().await.map_err(|error| failed(&error.to_string()))?;
    if !output.status.success() {
        let reason = String::from_utf8_lossy(&output.stderr);
        return Err(failed(reason.lines().next().unwrap_or("no reason given")));
    }
    if output.stdout.len() > SCHEMA_BYTES_MAX {
        return Err(failed("its output is larger than 512 MiB"));
    }
    String::from_utf8(output.stdout).map_err(|_| failed("its output is not UTF-8"))
}

/// Between two entries of pg_dump's text output.
const ENTRY: &str = "\n--\n-- Name: ";

/// Makes pg_dump's output fit for one batch on a server of `target_version`: no psql commands, no settings the server does not
/// know, nothing of our own, schemas that exist already are kept.
pub(super) fn fit(text: &str, target_version: u32) -> String {
    let mut out = String::with_capacity(text.len());
    for (number, entry) in text.split(ENTRY).enumerate() {
        let header = if number == 0 { "" } else { entry.lines().next().unwrap_or_default() };
        let (name, kind) = match header.split_once("; Type: ") {
            Some((name, rest)) => (name, rest.split(';').next().unwrap_or_default()),
            None => ("", ""),
        };
        let own_trigger = name.trim_start_matches("EVENT TRIGGER ").trim_start_matches('"').starts_with(PREFIX);
        if own_trigger && matches!(kind, "EVENT TRIGGER" | "COMMENT" | "PUBLICATION") {
            continue;
        }
        if number > 0 {
            out.push_str(ENTRY);
        }
        for line in entry.split_inclusive('\n') {
            let unknown_setting = number == 0 && target_version < 170_000 && line.starts_with("SET transaction_timeout");
            if line.starts_with("\\restrict ") || line.starts_with("\\unrestrict ") || unknown_setting {
                continue;
            }
            match line.strip_prefix("CREATE SCHEMA ") {
                Some(rest) if kind == "SCHEMA" => {
                    out.push_str("CREATE SCHEMA IF NOT EXISTS ");
                    out.push_str(rest);
                }
                _ => out.push_str(line),
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_versions() {
        assert_eq!(major("pg_dump (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)\n"), Some(15));
        assert_eq!(major("pg_dump (PostgreSQL) 18beta1"), Some(18));
        assert_eq!(major("pg_dump: x"), None);
    }

    #[test]
    fn chooses_the_oldest_that_is_new_enough() {
        let found = || vec![(15, PathBuf::from("/a")), (18, PathBuf::from("/b")), (17, PathBuf::from("/c")), (15, PathBuf::from("/d"))];
        for (server, expected) in [(14, "/a"), (15, "/a"), (16, "/c"), (17, "/c"), (18, "/b")] {
            assert_eq!(choose(found(), server).unwrap(), PathBuf::from(expected), "{server}");
        }
        let error = choose(found(), 19).unwrap_err().to_string();
        for part in ["PostgreSQL 19", "/a (15)", "UNDERSTUDY_PG_DUMP", "postgresql-client-19"] {
            assert!(error.contains(part), "{error}");
        }
        assert!(choose(Vec::new(), 14).unwrap_err().to_string().contains("found: none"));
    }

    #[test]
    fn leaves_out_what_does_not_belong() {
        let text = "--\n-- PostgreSQL database dump\n--\n\n\\restrict abc\n\nSET statement_timeout = 0;\nSET transaction_timeout = 0;\n\
                    \n--\n-- Name: s; Type: SCHEMA; Schema: -; Owner: o\n--\n\nCREATE SCHEMA s;\n\
                    \n--\n-- Name: f(); Type: FUNCTION; Schema: s; Owner: o\n--\n\nCREATE FUNCTION s.f() AS $$\n\\d\n$$;\n\
                    \n--\n-- Name: understudy_ddl_end; Type: EVENT TRIGGER; Schema: -; Owner: o\n--\n\nCREATE EVENT TRIGGER understudy_ddl_end x;\n\
                    \n--\n-- Name: theirs; Type: EVENT TRIGGER; Schema: -; Owner: o\n--\n\nCREATE EVENT TRIGGER theirs;\n\\unrestrict abc\n";
        let fitted = fit(text, 160_000);
        for gone in ["restrict", "transaction_timeout", "understudy_ddl_end"] {
            assert!(!fitted.contains(gone), "{gone}: {fitted}");
        }
        for kept in ["CREATE SCHEMA IF NOT EXISTS s;", "\\d\n", "CREATE EVENT TRIGGER theirs;", "SET statement_timeout = 0;"] {
            assert!(fitted.contains(kept), "{kept}: {fitted}");
        }
        assert!(fit(text, 180_000).contains("transaction_timeout"));
    }
}
