//! Is the owner still the server that the feed was made with, with everything that the follower has? After a failover or a restore
//! it may lack commits that the follower holds; going on would skip as many of its new ones, since positions are all that tells them
//! apart.

use super::{CdcError, error::Attempt, session};
use crate::{backend::Connection, config::ServerUrl, lsn::Lsn};
use tokio_postgres::Client;

/// What an operator can do about a feed that has lost its place.
pub(super) fn again(shadow: &str) -> String {
    format!(
        "SHADOW RESYNC {shadow} compares both sides, writes what differs and goes on (rows that only the follower has are deleted); or copy \
         it anew: SHADOW STOP, an empty database, SHADOW START"
    )
}

/// A server's history: what IDENTIFY_SYSTEM says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    /// Made by initdb, kept by copies and standbys.
    system: String,
    /// Grows by one with each promotion.
    timeline: i32,
    /// End of its WAL.
    position: Lsn,
}

/// What a timeline's history file says of those before it: number, and where it was left.
fn left_at(history: &str, timeline: i32) -> Option<Lsn> {
    history.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let number: i32 = words.next()?.parse().ok()?;
        let lsn = words.next()?.parse().ok()?;
        (number == timeline).then_some(lsn)
    })
}

/// Whether a follower that has everything up to `end` of an owner may go on with what answers now. Pure.
fn judge(known: Option<&(String, i32)>, now: &Identity, history: &str, end: Lsn, (server, again): (&str, &str)) -> Result<(), String> {
    if let Some((system, timeline)) = known {
        if *system != now.system {
            return Err(format!("{server} is another database cluster than the one that the feed was made with: {again}"));
        }
        if now.timeline < *timeline {
            return Err(format!("{server} was set back to an older timeline ({} after {timeline}): {again}", now.timeline));
        }
        if now.timeline > *timeline {
            match left_at(history, *timeline) {
                Some(left) if end > left => {
                    return Err(format!(
                        "{server} failed over (timeline {} after {timeline}) at {left}, but the follower has commits up to {end}, which are \
                         not there any more: {again}",
                        now.timeline
                    ));
                }
                Some(_) => {}
                None => return Err(format!("timeline {} of {server} does not come from {timeline}: {again}", now.timeline)),
            }
        }
    }
    if end > now.position {
        return Err(format!(
            "{server} is at {}, the follower has commits up to {end}: it was restored from a backup, or failed over and lost them: {again}",
            now.position
        ));
    }
    Ok(())
}

async fn identify(connection: &mut Connection) -> Result<Identity, CdcError> {
    let failed = |source| CdcError::Backend { what: "ask the owner who it is", source };
    let rows = connection.simple_query("IDENTIFY_SYSTEM").await.map_err(failed)?;
    let mut values = rows.into_iter().flatten().flatten();
    let (Some(system), Some(timeline), Some(position)) = (values.next(), values.next(), values.next()) else {
        return Err(CdcError::Protocol("IDENTIFY_SYSTEM gave no answer".into()));
    };
    let timeline = timeline.parse().map_err(|_| CdcError::Protocol("IDENTIFY_SYSTEM gave no timeline".into()))?;
    Ok(Identity { system, timeline, position: session::lsn(&position)? })
}

/// Compares the owner with what the follower remembers of it, and remembers what it is now. `true`: it has failed over since, and
/// everything is there.
pub(super) async fn check(url: &ServerUrl, follower: &Client, feed: &str, shadow: &str, end: Lsn) -> Result<bool, CdcError> {
    let mut connection = session::connect_replication(url).await?;
    let now = identify(&mut connection).await?;
    let what = "read what is known of the owner";
    let row = follower.query_opt("SELECT system, timeline FROM understudy.owner WHERE feed = $1", &[&feed]).await.attempt(what)?;
    let known: Option<(String, i32)> = row.map(|row| (row.get(0), row.get(1)));
    let moved = known.as_ref().is_some_and(|(_, timeline)| now.timeline > *timeline);
    let history = if moved {
        let failed = |source| CdcError::Backend { what: "read the owner's timeline history", source };
        let rows = connection.simple_query(&format!("TIMELINE_HISTORY {}", now.timeline)).await.map_err(failed)?;
        rows.into_iter().flatten().flatten().nth(1).unwrap_or_default()
    } else {
        String::new()
    };
    judge(known.as_ref(), &now, &history, end, (&format!("{}:{}", url.host, url.port), &again(shadow))).map_err(CdcError::Setup)?;
    follower
        .execute(
            "INSERT INTO understudy.owner (feed, system, timeline) VALUES ($1, $2, $3)
             ON CONFLICT (feed) DO UPDATE SET system = excluded.system, timeline = excluded.timeline",
            &[&feed, &now.system, &now.timeline],
        )
        .await
        .attempt("remember the owner")?;
    Ok(moved)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_that_lost_commits_is_refused() {
        let now = |timeline, position| Identity { system: "7".into(), timeline, position: Lsn(position) };
        let known = |timeline| Some(("7".to_owned(), timeline));
        let history = "1\t0/100\tno recovery target specified\n\n2\t0/200\tno recovery target specified\n";
        for (known, now, end, expected) in [
            (None, now(1, 100), 100, None),
            (known(1), now(1, 100), 100, None),
            (known(1), now(1, 100), 101, Some("restored from a backup")),
            (known(2), now(3, 0x300), 0x200, None),
            (known(2), now(3, 0x300), 0x201, Some("which are not there any more")),
            (known(1), now(3, 0x300), 0x101, Some("which are not there any more")),
            (known(4), now(5, 0x300), 0x10, Some("does not come from")),
            (known(2), now(1, 0x300), 0x10, Some("older timeline")),
            (Some(("8".to_owned(), 1)), now(1, 0x300), 0x10, Some("another database cluster")),
        ] {
            let verdict = judge(known.as_ref(), &now, history, Lsn(end), ("h:1", "SHADOW RESYNC"));
            match expected {
                None => assert_eq!(verdict, Ok(()), "{now:?} {end:x}"),
                Some(words) => {
                    assert!(verdict.as_ref().is_err_and(|text| text.contains(words) && text.contains("SHADOW RESYNC")), "{verdict:?}")
                }
            }
        }
    }
}
