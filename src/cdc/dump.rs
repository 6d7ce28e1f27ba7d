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
        .env("PGAPPNAME", "understudy pg_dump")
        .env_remove("PGOPTIONS")
        .env_remove("PGSERVICE")
        .env_remove("PGPASSWORD")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    if let Some(password) = &url.password {
        command.env("PGPASSWORD", password.expose());
    }
    for (name, value) in url.tls_environment() {
        command.env(name, value);
    }
    let failed = |reason: &str| CdcError::Setup(format!("{} could not read the owner's schema: {reason}", pg_dump.display()));
    let output = command.output().await.map_err(|error| failed(&error.to_string()))?;
    if !output.status.success() {
        let reason = String::from_utf8_lossy(&output.stderr);
        let line = reason.lines().next().unwrap_or("no reason given");
        if ["permission denied", "server version mismatch", "password"].iter().any(|words| reason.contains(words)) {
            return Err(failed(line));
        }
        // A connection that broke, a lock that was not free: later it works.
        return Err(CdcError::Refused {
            what: "read the owner's schema with pg_dump".into(),
            reason: line.to_owned(),
            code: String::new(),
        });
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
        let without = (kind == "TYPE" && target_version < MULTIRANGES).then(|| without_multirange(entry)).flatten();
        let entry = without.as_deref().unwrap_or(entry);
        for line in entry.split_inclusive('\n') {
            let unknown_setting = number == 0 && target_version < 170_000 && line.starts_with("SET transaction_timeout");
            if line.starts_with("\\restrict ") || line.starts_with("\\unrestrict ") || unknown_setting {
                continue;
            }
            // Their contents were copied before.
            if let (true, Some(oid)) = (kind.starts_with("BLOB"), line.trim_end().strip_prefix("SELECT pg_catalog.lo_create('")) {
                let oid: String = oid.chars().take_while(char::is_ascii_digit).collect();
                out.push_str(&format!(
                    "SELECT pg_catalog.lo_create({oid}) WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_largeobject_metadata WHERE oid = {oid});\n"
                ));
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

/// The first version that makes a multirange with each range.
const MULTIRANGES: u32 = 140_000;

/// A range type as an older server makes it.
fn without_multirange(entry: &str) -> Option<String> {
    let (before, rest) = entry.split_once(",\n    multirange_type_name = ")?;
    let end = rest.find('\n')?;
    let (name, after) = rest.split_at(end);
    Some(format!("{before}{}{after}", if name.ends_with(',') { "," } else { "" }))
}

/// One entry of pg_dump's text output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry<'a> {
    pub name: &'a str,
    /// `INDEX`, `CONSTRAINT`, `FK CONSTRAINT`, …
    pub kind: &'a str,
    pub sql: &'a str,
}

impl<'a> Entry<'a> {
    /// Concerns one table only, and nothing of its own kind needs it.
    pub fn builds_on_one_table(&self) -> bool {
        matches!(self.kind, "INDEX" | "CONSTRAINT") && self.table().is_some()
    }

    /// Allows others beside it on the same table.
    pub fn is_index(&self) -> bool {
        self.kind == "INDEX" && !self.sql.contains("\nALTER ")
    }

    /// The table it is built on, as the statement spells it.
    pub fn table(&self) -> Option<&'a str> {
        let statement =
            self.sql.lines().map(str::trim_start).find(|line| line.starts_with("CREATE ") || line.starts_with("ALTER TABLE "))?;
        let (_, rest) = match self.kind {
            "INDEX" => statement.split_once(" ON ")?,
            "CONSTRAINT" => statement.split_once("ALTER TABLE ")?,
            _ => return None,
        };
        let rest = rest.strip_prefix("ONLY ").unwrap_or(rest);
        let mut quoted = false;
        let end = rest.find(|c: char| {
            quoted ^= c == '"';
            c.is_whitespace() && !quoted
        });
        rest.get(..end.unwrap_or(rest.len())).filter(|table| !table.is_empty())
    }
}

/// The settings at the beginning of pg_dump's output, and its entries.
pub(super) fn entries(text: &str) -> (&str, Vec<Entry<'_>>) {
    let mut parts = text.split(ENTRY);
    let preamble = parts.next().unwrap_or_default();
    let entries = parts.map(|part| {
        let (header, sql) = part.split_once('\n').unwrap_or((part, ""));
        let (name, rest) = header.split_once("; Type: ").unwrap_or((header, ""));
        Entry { name, kind: rest.split(';').next().unwrap_or_default(), sql }
    });
    (preamble, entries.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_say_what_they_build_on() {
        let text = "SET a = 1;\n\n--\n-- Name: t t_pkey; Type: CONSTRAINT; Schema: s; Owner: o\n--\n\nALTER TABLE ONLY s.t\n    ADD CONSTRAINT t_pkey PRIMARY KEY (id);\n\n\n\
                    --\n-- Name: i; Type: INDEX; Schema: s; Owner: o\n--\n\nCREATE UNIQUE INDEX i ON s.\"a b\" USING btree (v);\n\
                    \n--\n-- Name: p; Type: INDEX; Schema: s; Owner: o\n--\n\nCREATE INDEX p ON ONLY s.p USING btree (v);\nALTER TABLE s.p CLUSTER ON p;\n\
                    \n--\n-- Name: t f; Type: FK CONSTRAINT; Schema: s; Owner: o\n--\n\nALTER TABLE ONLY s.t ADD CONSTRAINT f FOREIGN KEY (x) REFERENCES s.u;\n";
        let (preamble, entries) = entries(text);
        assert_eq!(preamble, "SET a = 1;\n");
        let seen: Vec<_> = entries.iter().map(|e| (e.name, e.kind, e.table(), e.builds_on_one_table(), e.is_index())).collect();
        assert_eq!(
            seen,
            [
                ("t t_pkey", "CONSTRAINT", Some("s.t"), true, false),
                ("i", "INDEX", Some("s.\"a b\""), true, true),
                ("p", "INDEX", Some("s.p"), true, false),
                ("t f", "FK CONSTRAINT", None, false, false),
            ]
        );
    }

    #[test]
    fn an_older_server_gets_ranges_without_multiranges() {
        let text = |more: &str| {
            format!(
                "SET a = 1;\n{ENTRY}span; Type: TYPE; Schema: s; Owner: o\n--\n\nCREATE TYPE s.span AS RANGE (\n    subtype = integer{more}\n);\n"
            )
        };
        let with = text(",\n    multirange_type_name = s.m,\n    subtype_diff = d");
        assert_eq!(fit(&with, 130_000), text(",\n    subtype_diff = d"));
        assert_eq!(fit(&text(",\n    multirange_type_name = s.m"), 130_000), text(""));
        assert_eq!(fit(&with, 140_000), with);
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
