//! `understudy check`: can this migration start, and what stands in its way? Looks at every database and shadow of the
//! configuration and says what is wrong and what to do about it.
//!
//! With `--ddl` it says what a planned migration would do (`ddl`; the thinking is in `schema::foresee`).
//!
//! Deliberately absent: changing anything, judging the load; reading rows, except where a planned migration depends on them.
//!
//! Invariants: read-only; one connection per server at a time; an unreachable server is a finding, not an error; whatever
//! makes the feed or the cutover fail later is a blocker here, with the statement or setting that removes it.
//!
//! Sources: PostgreSQL documentation, "Logical Replication: Restrictions, Configuration Settings", "Event Triggers".

mod ddl;
mod facts;
mod judge;
mod render;

pub use ddl::{Forecast, breaks, forecast, render_forecast};
pub use render::render;

use crate::config::{Config, FeedKind, ServerUrl};
use facts::ServerFacts;
use serde::{Deserialize, Serialize};

/// How much a finding matters, strongest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The migration cannot start, or would lose data.
    Blocker,
    /// It can start; something will be worse than it need be.
    Warning,
    /// Good to know.
    Info,
}

/// One thing that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// How much it matters.
    pub severity: Severity,
    /// `[[database]]` name.
    pub database: String,
    /// `[[database.shadow]]` name; empty when it concerns the source only.
    pub shadow: String,
    /// What it is about: a setting, a privilege, `tables`, `extension postgis`, ….
    pub subject: String,
    /// What is the matter.
    pub message: String,
    /// What to do; empty when nothing needs doing.
    pub remedy: String,
}

/// Looks at every database and shadow. Blockers come first within each of them.
pub async fn assess(config: &Config) -> Vec<Finding> {
    let mut findings = Vec::new();
    for database in &config.databases {
        let feeds = database.shadows.iter().filter(|shadow| shadow.feed == FeedKind::Cdc).count();
        let mut book = Book { findings: Vec::new(), database: database.name.clone(), shadow: String::new() };
        let source = look(&mut book, "source", &database.source).await;
        if let Some(source) = &source {
            judge::source(&mut book, source, feeds);
        }
        for shadow in &database.shadows {
            book.shadow = shadow.name.clone();
            let facts = look(&mut book, "shadow", &shadow.url).await;
            let (Some(source), Some(facts)) = (&source, &facts) else { continue };
            judge::shadow(&mut book, source, facts, shadow.feed);
            if shadow.feed != FeedKind::None && !facts.filled_by_us {
                let found = crate::cdc::pg_dump::find(source.major()).await;
                judge::schema_copy(&mut book, found);
            }
        }
        // Stable: source before shadows, and the order of judging within one severity.
        let order = |finding: &Finding| (database.shadows.iter().position(|shadow| shadow.name == finding.shadow), finding.severity);
        book.findings.sort_by_key(order);
        findings.append(&mut book.findings);
    }
    findings
}

/// Connects and reads; what fails becomes a blocker.
async fn look(book: &mut Book, role: &'static str, url: &ServerUrl) -> Option<ServerFacts> {
    match facts::load(url).await {
        Ok(facts) => Some(facts),
        Err(facts::Unreadable::Connect(reason)) => {
            let remedy = format!(
                "check host, port, user, password and database of the {role}'s url in proxy.toml, that the server runs, and that its \
                 pg_hba.conf admits this machine"
            );
            book.add(Severity::Blocker, &format!("{role} connection"), format!("{url} cannot be reached: {reason}"), remedy);
            None
        }
        Err(facts::Unreadable::Query { what, reason }) => {
            let message = format!("reading {what} from {url} failed: {reason}");
            book.add(Severity::Blocker, &format!("{role} catalog"), message, "use a role that may read the catalogs, then run check again");
            None
        }
    }
}

/// Findings of one database, as they come.
struct Book {
    findings: Vec<Finding>,
    database: String,
    shadow: String,
}

impl Book {
    fn add(&mut self, severity: Severity, subject: &str, message: impl Into<String>, remedy: impl Into<String>) {
        self.findings.push(Finding {
            severity,
            database: self.database.clone(),
            shadow: self.shadow.clone(),
            subject: subject.to_owned(),
            message: message.into(),
            remedy: remedy.into(),
        });
    }
}
