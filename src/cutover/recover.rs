//! After a crash: finish or take back what the journal says was under way.

use super::{step::Step, switch};
use crate::{
    cdc::{self, Feed, FeedSpec},
    metadata::{JournalEntry, MetadataError, Repository},
    traffic::route::Target,
};
use serde_json::json;
use std::time::Duration;

/// The old feed gets this long to carry over what was written behind the marker.
const CARRY_OVER_TIMEOUT: Duration = Duration::from_secs(30);

/// What the journal of the newest run asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unfinished {
    /// Nothing: it ended, or there was none.
    No,
    /// Before the point of no return: the old owner goes on.
    TakeBack {
        /// Number of the run.
        run: i64,
        /// Whom it was about.
        shadow: String,
        /// The old owner was the source.
        from_source: bool,
        /// The side that did not become the owner was read-only before.
        was_fenced: bool,
    },
    /// After it: the new owner goes on, and the rest is repeated.
    Finish {
        /// Number of the run.
        run: i64,
        /// Whom it was about.
        shadow: String,
        /// The old owner was the source.
        from_source: bool,
        /// The marker from which the opposite feed applies.
        marker: String,
        /// Nobody wrote behind the marker, or what was written has been carried over: the old feed is not needed any more.
        proven: bool,
    },
}

/// Reads a journal. Pure.
pub fn judge(journal: &[JournalEntry]) -> Unfinished {
    let (Some(first), Some(last)) = (journal.first(), journal.last()) else { return Unfinished::No };
    if last.step == Step::Done.name() || last.step == "undone" {
        return Unfinished::No;
    }
    let text = |key: &str| first.data.get(key).and_then(serde_json::Value::as_str).unwrap_or_default().to_owned();
    let (run, shadow, from_source) = (first.run, text("shadow"), text("from") == "source");
    if !journal.iter().any(|entry| entry.step == Step::Flip.name()) {
        // a former source is always behind its fence
        let was_fenced = !from_source || first.data.get("was_fenced").and_then(serde_json::Value::as_bool).unwrap_or_default();
        return Unfinished::TakeBack { run, shadow, from_source, was_fenced };
    }
    let proven = journal.iter().any(|entry| entry.step == Step::StopFeed.name());
    Unfinished::Finish { run, shadow, from_source, marker: switch::opposite(&text("marker")), proven }
}

/// Takes back what was begun: the old owner is writable, the prepared way back is gone. The inner error says that the other
/// side could not be reached: what is left there hurts nobody, and the next start or the next attempt removes it.
///
/// # Errors
/// A sentence; the next start tries again.
pub async fn take_back(
    repository: &Repository,
    database: &str,
    run: i64,
    from: &Target,
    to: &Target,
    opposite: &FeedSpec,
    was_fenced: bool,
) -> Result<Result<(), String>, String> {
    let client = switch::connect(from).await?;
    switch::writable(&client, from, true).await?;
    if let Err(error) = switch::clear_the_way(to, opposite, was_fenced).await {
        return Ok(Err(error));
    }
    journal(repository, database, run, "undone").map(Ok)
}

/// Fences the old owner and rids it of other clients: from here on nobody writes there.
///
/// # Errors
/// A sentence; the next start tries again.
pub async fn fence(from: &Target) -> Result<(), String> {
    let client = switch::connect(from).await?;
    switch::writable(&client, from, false).await?;
    switch::expel(&client).await
}

/// The locks on the old owner died with the process, so that somebody who goes around it may have written there: carries that
/// over. Returns how many row changes it were.
///
/// # Errors
/// A sentence.
pub async fn carry_over(from: &Target, marker: &str, feed: &Feed) -> Result<u64, String> {
    let client = switch::connect(from).await?;
    let proof = format!("{marker}-recovered");
    cdc::emit_marker(&client, &proof).await.map_err(|error| error.to_string())?;
    feed.wait_marker(&proof, CARRY_OVER_TIMEOUT).await.map_err(|error| error.to_string())?;
    Ok(feed.state().changes)
}

/// Removes the feed that is no longer needed. The caller starts the opposite feed.
///
/// # Errors
/// A sentence; the next start tries again.
pub async fn finish(repository: &Repository, database: &str, run: i64, feed: &FeedSpec) -> Result<(), String> {
    journal(repository, database, run, Step::StopFeed.name())?;
    cdc::disarm(feed).await.map_err(|error| error.to_string())?;
    journal(repository, database, run, Step::StartOppositeFeed.name())
}

/// Notes the end of a recovered run.
///
/// # Errors
/// A sentence.
pub fn journal(repository: &Repository, database: &str, run: i64, step: &str) -> Result<(), String> {
    repository.journal(database, run, step, json!({"recovered": true})).map_err(|error: MetadataError| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal_up_to(last: usize) -> Vec<JournalEntry> {
        let data = json!({"kind": "cutover", "shadow": "pg18", "from": "source", "to": "pg18", "marker": "shop-1-cutover"});
        let entry = |(id, step): (usize, &Step)| JournalEntry {
            id: id as i64,
            run: 1,
            at_ms: 0,
            step: step.name().into(),
            data: if id == 0 { data.clone() } else { json!({}) },
        };
        Step::ALL.iter().enumerate().take(last).map(entry).collect()
    }

    /// A crash after any journal entry leads to exactly one owner.
    #[test]
    fn every_prefix_of_the_journal_has_an_answer() {
        for last in 0..=Step::ALL.len() {
            let unfinished = judge(&journal_up_to(last));
            match (last, unfinished) {
                (0 | 15, Unfinished::No) => {}
                (1..=8, Unfinished::TakeBack { from_source: true, .. }) => {}
                (9..=14, Unfinished::Finish { marker, from_source: true, proven, .. }) => {
                    assert_eq!(marker, "shop-1-cutover-opposite");
                    assert_eq!(proven, last >= 13);
                }
                (last, other) => panic!("after {last} entries: {other:?}"),
            }
        }
        let mut undone = journal_up_to(5);
        undone.push(JournalEntry { id: 9, run: 1, at_ms: 0, step: "undone".into(), data: json!({}) });
        assert_eq!(judge(&undone), Unfinished::No);
    }
}
