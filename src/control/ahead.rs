//! Schema changes that clients send through the proxy, assessed while they are on their way; and which statements of the live traffic a change
//! concerns. Nothing here waits for a lock, and no client waits for it.

use super::{
    Controller,
    commands::connect,
    managed::{Managed, ManagedShadow, lock},
};
use crate::{
    metadata::{Proposal, Severity},
    schema::{
        catalog::Catalog,
        foresee::{Action, Facts, foresee, parse},
    },
};
use bytes::Bytes;
use serde_json::json;
use std::{sync::Arc, time::Duration};

/// Statements of the traffic that are looked through.
const STATEMENTS_MAX: usize = 500;
/// Of those concerned, as many are named.
const NAMED_MAX: usize = 10;
/// What the assessment of one change may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Words of a statement, as far as names go.
fn says(text: &str, name: &str) -> bool {
    !name.is_empty() && text.split(|c: char| !(c.is_alphanumeric() || c == '_')).any(|word| word.eq_ignore_ascii_case(name))
}

/// Fingerprints of statements seen lately that name the table, and the column if there is one.
pub(super) fn concerned(shadow: &ManagedShadow, table: &str, column: Option<&str>) -> Vec<String> {
    let seen = shadow.route.observations.profile.top(STATEMENTS_MAX);
    let named = |text: &str| says(text, table) && column.is_none_or(|column| says(text, column) || text.contains('*'));
    seen.iter().filter(|query| named(&query.text)).map(|query| query.fingerprint.clone()).take(NAMED_MAX).collect()
}

/// The same for a proposal: the table that it names, and the column of which it speaks.
pub(super) fn concerned_by(shadow: &ManagedShadow, proposal: &Proposal) -> Vec<String> {
    let table = proposal.draft.object.rsplit('.').next().unwrap_or_default().trim_matches('"');
    let column = proposal.draft.change.split_once("column ").and_then(|(_, rest)| rest.split([' ', '(']).next());
    if matches!(proposal.draft.kind.as_str(), "create_index" | "drop_index" | "fill_column") {
        return Vec::new();
    }
    concerned(shadow, table, column)
}

/// Table and column that a step takes away or changes for those who use it.
fn subject(action: &Action) -> Option<(&str, Option<&str>)> {
    match action {
        Action::DropTable { table, .. } | Action::RenameTable { table, .. } | Action::Truncate { table } => Some((&table.name, None)),
        Action::DropColumn { table, column, .. }
        | Action::RenameColumn { table, column, .. }
        | Action::Retype { table, column, .. }
        | Action::SetNotNull { table, column } => Some((&table.name, Some(column))),
        _ => None,
    }
}

/// Assesses what clients send, one at a time, for as long as the process lives.
pub(super) async fn assess(controller: Arc<Controller>, managed: Arc<Managed>) {
    let Some(mut planned) = managed.database.planned.receiver() else { return };
    while let Some(text) = planned.recv().await {
        for shadow in &managed.shadows {
            match tokio::time::timeout(PATIENCE, one(&controller, &managed, shadow, &text)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "a client's schema change could not be assessed"),
                Err(_) => tracing::debug!("a client's schema change was not assessed in time"),
            }
        }
    }
}

async fn one(
    controller: &Controller,
    managed: &Managed,
    shadow: &ManagedShadow,
    text: &Bytes,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    // The engine's own memory of the owner: nothing is asked of a server whose catalog is being changed.
    let Some(adapter) = lock(&shadow.adapter).clone() else { return Ok(()) };
    let actions = parse(std::str::from_utf8(text)?)?;
    let known = adapter.known().await?;
    let there = Catalog::load(&connect(&shadow.config.load().url, "understudy assess").await?).await?;
    let there = if shadow.rules.load().existing { None } else { Some(&there) };
    let steps = foresee(&actions, &known, there, &Facts::default());
    let name = shadow.name();
    let mut subjects = actions.iter().filter(|(_, action)| !matches!(action, Action::Session)).map(|(_, action)| subject(action));
    for step in steps {
        let statements = subjects.next().flatten().map(|(table, column)| concerned(shadow, table, column)).unwrap_or_default();
        let traffic = match statements.len() {
            0 => String::new(),
            count => format!("; {count} kinds of statements of the live traffic name it"),
        };
        let verdict = if step.breaks { "would break" } else { "works" };
        let message = format!("a client changes the schema: {}: {verdict}, shadow {name}: {}{traffic}", step.step, step.shadow);
        let severity = if step.breaks || !statements.is_empty() { Severity::Warning } else { Severity::Info };
        let data = json!({"step": step, "statements": statements});
        controller.repository.record(severity, "schema", &managed.database.name, &name, &message, data);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_words() {
        assert!(says("SELECT total FROM orders o", "ORDERS") && says("SELECT o.total", "total"));
        assert!(!says("SELECT subtotal FROM orders_old", "total") && !says("SELECT 1", ""));
    }
}
