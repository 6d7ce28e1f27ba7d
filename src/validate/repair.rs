//! Making the follower equal where it differed: by key, from a fresh snapshot of the owner, while the feed is held at that
//! very position. What the stream brings afterwards is applied on top, as if nothing had happened.

use super::{
    ValidateError,
    plan::{Order, Plan, quote},
    session::Session,
    snapshot::Pair,
};
use crate::config::ServerUrl;
use futures_util::{SinkExt, StreamExt};
use std::pin::pin;

/// Rows taken over in one statement.
const BATCH_ROWS: usize = 500;

/// Repairs one table; the number of rows deleted or written on the follower.
pub(super) async fn table<H>(pair: &Pair<H>, follower_url: &ServerUrl, plan: &Plan, keys: &[Vec<String>]) -> Result<u64, ValidateError> {
    let Some(owner) = pair.owners.first() else { return Ok(0) };
    // Not the session that holds the follower's snapshot: that one is read only.
    let follower = Session::open(follower_url, "follower").await?;
    follower.run("switching triggers off", "BEGIN READ WRITE; SET LOCAL session_replication_role = replica").await?;
    let mut touched = 0;
    for batch in keys.chunks(BATCH_ROWS) {
        touched += rows(owner, &follower, plan, batch).await?;
    }
    follower.run("committing the repair", "COMMIT").await?;
    Ok(touched)
}

async fn rows(owner: &Session, follower: &Session, plan: &Plan, keys: &[Vec<String>]) -> Result<u64, ValidateError> {
    let target = format!("{}.{}", quote(&plan.follower_table.0), quote(&plan.follower_table.1));
    let columns: Vec<String> = plan.writable.iter().map(|(_, column)| quote(&column.name)).collect();
    let columns = columns.join(", ");
    let values: Vec<String> =
        keys.iter().map(|key| format!("({})", key.iter().map(|text| literal(text)).collect::<Vec<_>>().join(", "))).collect();
    let names: Vec<String> = (0..plan.key.len()).map(|number| format!("k{number}")).collect();
    let wanted = format!("(VALUES {}) AS wanted ({})", values.join(", "), names.join(", "));
    // Compared as text, as the comparison did; integers by value, so that the index serves.
    let matches = |columns: &mut dyn Iterator<Item = &String>| {
        let terms: Vec<String> = columns
            .zip(&plan.key)
            .zip(&names)
            .map(|((column, (_, order)), name)| match order {
                Order::Integer => format!("x.{} = wanted.{name}::bigint", quote(column)),
                Order::Native => format!("x.{} = wanted.{name}::uuid", quote(column)),
                Order::Text => format!("x.{}::text = wanted.{name}", quote(column)),
            })
            .collect();
        terms.join(" AND ")
    };
    let there = matches(&mut plan.follower_key.iter());
    let here = matches(&mut plan.key.iter().map(|(name, _)| name));

    let delete = format!("DELETE FROM {} AS x USING {wanted} WHERE {there}", plan.follower_from);
    let deleted = follower.client.execute(&delete, &[]).await.map_err(|error| follower.error("deleting rows to repair", &error))?;
    let from = &plan.owner_from;
    let selected: Vec<&str> = plan.writable.iter().map(|(value, _)| value.as_str()).collect();
    let read = format!("COPY (SELECT {} FROM {from} AS x JOIN {wanted} ON {here}) TO STDOUT", selected.join(", "));
    let source = owner.client.copy_out(&read).await.map_err(|error| owner.error("reading rows to repair", &error))?;
    let write = format!("COPY {target} ({columns}) FROM STDIN");
    let sink = follower.client.copy_in(&write).await.map_err(|error| follower.error("writing rows to repair", &error))?;
    let (mut source, mut sink) = (pin!(source), pin!(sink));
    while let Some(chunk) = source.next().await {
        let chunk = chunk.map_err(|error| owner.error("reading rows to repair", &error))?;
        sink.feed(chunk).await.map_err(|error| follower.error("writing rows to repair", &error))?;
    }
    let written = sink.finish().await.map_err(|error| follower.error("writing rows to repair", &error))?;
    Ok(deleted.max(written))
}

/// A text literal, whatever `standard_conforming_strings` says.
fn literal(text: &str) -> String {
    format!("E'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
}
