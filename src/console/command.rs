//! The console's words as a type. One statement in, one [`Command`] out: [`parse`].

use super::{grammar::TOPICS, lexer::is_word};
pub use super::{
    grammar::{FORMS, Form, help},
    lexer::split,
    parser::{Statement, parse, parse_percent},
};
pub use crate::config::parse_duration;
use std::fmt;

/// A parsed console command.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// `SHOW <topic>`
    Show(Topic),
    /// `SET <shadow> <knob> = <value>` (runtime only; proxy.toml stays as it is)
    Set {
        /// Shadow name.
        shadow: String,
        /// Lower case: `sample_reads`, `serve_reads`, `mirror_writes`, `revert.window`, `shift.hold`, `adapt.auto_approve`, …
        knob: String,
        /// As typed, without quotes; several words or a list are kept as one text. [`parse_percent`] and
        /// [`parse_duration`] read it.
        value: String,
    },
    /// `RELOAD`
    Reload,
    /// `SHOW SCHEMA DIFF <version> <version>`
    SchemaDiff {
        /// Version before.
        before: i64,
        /// Version after.
        after: i64,
    },
    /// `REMOVE LEFTOVERS <db>`
    RemoveLeftovers(String),
    /// `PAUSE [db]`
    Pause(Option<String>),
    /// `RESUME [db]`
    Resume(Option<String>),
    /// `RECONNECT [db]`
    Reconnect(Option<String>),
    /// `APPROVE <id> [AS '<sql>']`
    Approve {
        /// Proposal id.
        id: i64,
        /// SQL to run instead of the suggestion.
        sql: Option<String>,
    },
    /// `REJECT <id>`
    Reject(i64),
    /// `SIMULATE CUTOVER <shadow> [AT <percent>] [FOR '<time>']`
    SimulateCutover {
        /// Shadow name.
        shadow: String,
        /// Percent of the reads; default 5.
        percent: f64,
        /// How long; default 10 s.
        duration: std::time::Duration,
    },
    /// `SHIFT START <shadow>`
    ShiftStart(String),
    /// `SHIFT STOP <shadow>`
    ShiftStop(String),
    /// `REVERT <shadow>`
    Revert(String),
    /// `CUTOVER <shadow> [DRY RUN]`
    Cutover {
        /// Shadow name.
        shadow: String,
        /// Only say what would be done.
        dry_run: bool,
    },
    /// `ROLLBACK <db> [ACCEPT LOSS]`
    Rollback {
        /// Database name.
        database: String,
        /// Although the shadow's mapping cannot give every value back.
        accept_loss: bool,
    },
    /// `VERIFY <shadow> [TABLE t] [REPAIR]`
    Verify {
        /// Shadow name.
        shadow: String,
        /// One table only, schema-qualified or not, as typed without quotes (`public.Orders`).
        table: Option<String>,
        /// Write the owner's rows over the differences.
        repair: bool,
    },
    /// `SHADOW START <shadow>`: create the shadow (schema, copy) and keep it in step.
    ShadowStart(String),
    /// `SHADOW RESYNC <shadow>`: a feed that has lost its place: compare, write what differs, go on.
    ShadowResync(String),
    /// `SHADOW STOP <shadow>`: stop the feed and remove slot, publication and triggers from the servers.
    ShadowStop(String),
    /// `FAULT LOSE CHANGE <shadow>`: for tests of the validation; refused unless the process was started for it.
    FaultLoseChange(String),
    /// `SHUTDOWN`
    Shutdown,
}

/// What `SHOW` can show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Topic {
    Version,
    Config,
    Databases,
    Shadows,
    Clients,
    Servers,
    Pools,
    Stats,
    Routes,
    Latency,
    LatencyByQuery,
    Mismatches,
    Feed,
    Schema,
    Drift,
    Proposals,
    Events,
    Alerts,
    Cutover,
    Mapping,
    SchemaVersions,
    Leftovers,
    Profile,
    Forecast,
    Resources,
    Report,
    WhatIf,
    Help,
}

/// The command as it would be typed. Parsing it gives the same command.
impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Command::Show(topic) => write!(f, "SHOW {topic}"),
            Command::SchemaDiff { before, after } => write!(f, "SHOW SCHEMA DIFF {before} {after}"),
            Command::Set { shadow, knob, value } => write!(f, "SET {} {} = {}", Name(shadow), Name(knob), Literal(value)),
            Command::Reload => f.write_str("RELOAD"),
            Command::RemoveLeftovers(name) => write!(f, "REMOVE LEFTOVERS {}", Name(name)),
            Command::Pause(None) => f.write_str("PAUSE"),
            Command::Pause(Some(database)) => write!(f, "PAUSE {}", Name(database)),
            Command::Resume(None) => f.write_str("RESUME"),
            Command::Resume(Some(database)) => write!(f, "RESUME {}", Name(database)),
            Command::Reconnect(None) => f.write_str("RECONNECT"),
            Command::Reconnect(Some(database)) => write!(f, "RECONNECT {}", Name(database)),
            Command::Approve { id, sql: None } => write!(f, "APPROVE {id}"),
            Command::Approve { id, sql: Some(sql) } => write!(f, "APPROVE {id} AS {}", Literal(sql)),
            Command::Reject(id) => write!(f, "REJECT {id}"),
            Command::SimulateCutover { shadow, percent, duration } => {
                write!(f, "SIMULATE CUTOVER {} AT {percent} FOR '{}ms'", Name(shadow), duration.as_secs_f64() * 1_000.0)
            }
            Command::ShiftStart(shadow) => write!(f, "SHIFT START {}", Name(shadow)),
            Command::ShiftStop(shadow) => write!(f, "SHIFT STOP {}", Name(shadow)),
            Command::Revert(shadow) => write!(f, "REVERT {}", Name(shadow)),
            Command::Cutover { shadow, dry_run } => write!(f, "CUTOVER {}{}", Name(shadow), if *dry_run { " DRY RUN" } else { "" }),
            Command::Rollback { database, accept_loss } => {
                write!(f, "ROLLBACK {}{}", Name(database), if *accept_loss { " ACCEPT LOSS" } else { "" })
            }
            Command::Verify { shadow, table, repair } => {
                write!(f, "VERIFY {}", Name(shadow))?;
                if let Some(table) = table {
                    write!(f, " TABLE {}", Name(table))?;
                }
                f.write_str(if *repair { " REPAIR" } else { "" })
            }
            Command::ShadowStart(shadow) => write!(f, "SHADOW START {}", Name(shadow)),
            Command::ShadowResync(shadow) => write!(f, "SHADOW RESYNC {}", Name(shadow)),
            Command::ShadowStop(shadow) => write!(f, "SHADOW STOP {}", Name(shadow)),
            Command::FaultLoseChange(shadow) => write!(f, "FAULT LOSE CHANGE {}", Name(shadow)),
            Command::Shutdown => f.write_str("SHUTDOWN"),
        }
    }
}

impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = TOPICS.iter().find(|(_, topic)| topic == self).map_or("HELP", |(word, _)| word);
        f.write_str(word)
    }
}

/// A name, in quotes where it needs them or could be taken for a keyword.
struct Name<'a>(&'a str);

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const KEYWORDS: [&str; 8] = ["TO", "AS", "AT", "FOR", "TABLE", "REPAIR", "DRY", "RUN"];
        // `SET names …` and `SET session …` are what drivers send.
        const DRIVER_WORDS: [&str; 4] = ["NAMES", "SESSION", "LOCAL", "TIME"];
        let plain = self.0.starts_with(char::is_alphabetic)
            && self.0.chars().all(|c| is_word(c) && !matches!(c, '*' | '/'))
            && !KEYWORDS.iter().chain(&DRIVER_WORDS).any(|word| word.eq_ignore_ascii_case(self.0));
        if plain { f.write_str(self.0) } else { write!(f, "\"{}\"", self.0.replace('"', "\"\"")) }
    }
}

/// A value or SQL in single quotes, doubled inside.
struct Literal<'a>(&'a str);

impl fmt::Display for Literal<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "'{}'", self.0.replace('\'', "''"))
    }
}
