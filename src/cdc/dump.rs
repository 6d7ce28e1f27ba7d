//! The owner's schema as SQL text: pg_dump is found, run at the copy's snapshot, and its output made fit for one batch.
//!
//! Deliberately absent: our own idea of DDL. pg_dump of the owner's version or newer knows everything there is.

use super::{CdcError, names::PREFIX, pg_dump};
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

/// A pg_dump that can read a server of this major version.
pub(super) async fn find(server_major: u32) -> Result<PathBuf, CdcError> {
    pg_dump::find(server_major).await.map_err(|reason| {
        CdcError::Setup(format!(
            "the schema of a PostgreSQL {server_major} cannot be copied: {reason}. Install postgresql-client-{server_major}, or set \
             UNDERSTUDY_PG_DUMP to its path"
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
