//! The operators' surfaces over one set of words: psql console ([`server`]), dashboard and HTTP endpoints ([`http`]),
//! `understudy ctl` ([`ctl`]).
//!
//! Deliberately absent: any decision. A command is parsed here and carried out by the [`Operator`] that `control` gives;
//! the console itself answers only `SHOW HELP` and what drivers send on their own (`SET client_encoding …`).
//! Invariants: no secret is shown; every refusal says what to do; one grammar for all surfaces ([`command::FORMS`]);
//! nothing of a message is carried out when one of its statements is no command; commands over HTTP come from this
//! machine only, and where the console asks for a password, so do they; the page asks no other host.
//! Sources: PostgreSQL documentation, "Frontend/Backend Protocol" and "Error Codes"; pgbouncer's admin console.

mod auth;
pub mod command;
pub mod ctl;
mod dispatch;
mod extended;
mod grammar;
pub mod http;
mod lexer;
mod parser;
pub mod server;
pub mod state;

pub use parser::{Statement, parse};

use crate::config::ConsoleUser;
use async_trait::async_trait;
use command::Command;

/// What the console can ask of the running process. Implemented by `control`.
#[async_trait]
pub trait Operator: Send + Sync + 'static {
    /// Carries out a command. `who` is the console user, for the record of decisions.
    async fn execute(&self, command: Command, who: &str) -> Result<Answer, CommandError>;
    /// Everything, for `/api/state` and the dashboard.
    fn state(&self) -> state::State;
    /// Everything, for `/metrics`.
    fn metrics(&self) -> Vec<Metric>;
    /// Ready to take clients; else why not.
    fn ready(&self) -> Result<(), String>;
    /// `[proxy.console]`: whose name and password commands need; `None`: none, from this machine only.
    fn console_user(&self) -> Option<ConsoleUser>;
    /// The newest readiness report of a shadow.
    fn report(&self, shadow: &str) -> Option<Report>;
}

/// A readiness report.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// For scripts.
    pub document: serde_json::Value,
    /// For people: HTML without scripts, with `__NONCE__` where the style's nonce belongs.
    pub page: String,
}

/// A table of results; an empty `columns` means that only the tag is sent.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// Column names.
    pub columns: Vec<String>,
    /// Values: null, bool, number or string; others are shown as JSON text.
    pub rows: Vec<Vec<serde_json::Value>>,
    /// Command tag, such as `SHOW` or `APPROVE`.
    pub tag: String,
    /// Sent to psql as NOTICE: what happened and what to do next.
    pub notices: Vec<String>,
}

/// A command could not be carried out.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum CommandError {
    /// The words are not a command: exit code 2, SQLSTATE 42601.
    #[error("{0}")]
    Syntax(String),
    /// A name or id does not exist: exit code 2, SQLSTATE 42704.
    #[error("{0}")]
    Unknown(String),
    /// The answer is no (a check failed, a difference was found, a gate is closed): exit code 1, SQLSTATE 55000.
    #[error("{0}")]
    Refused(String),
    /// It could not be carried out: exit code 3, SQLSTATE 58000.
    #[error("{0}")]
    Failed(String),
}

/// One sample for Prometheus.
#[derive(Clone, Debug, PartialEq)]
pub struct Metric {
    /// `understudy_<component>_<noun>_<unit>[_total]`
    pub name: &'static str,
    /// One line.
    pub help: &'static str,
    /// `counter` or `gauge`
    pub kind: &'static str,
    /// Label names and values.
    pub labels: Vec<(&'static str, String)>,
    /// Value.
    pub value: f64,
}
