//! One backlog of pgbench transactions, three readers of it: our feed, a native subscription, and pg_recvlogical into nothing.

use super::{
    Figures, Outcome, Settings,
    place::{PATIENCE, Place, position, start, streaming, text, until, value},
};
use std::time::Instant;
use understudy::cdc::{FeedSpec, Start};

/// The follower databases, both with the source's rows and at rest.
pub struct Pair {
    pub ours: FeedSpec,
}

pub async fn prepare(place: &Place, settings: &Settings) -> Outcome<Pair> {
    let source = place.on_source("postgres").await?;
    source.batch_execute("CREATE DATABASE bench").await.map_err(text)?;
    place.run(&format!("pgbench -p $S -i -q -s {} bench 2>&1", settings.scale)).await?;
    for database in ["ours", "native"] {
        place.fresh(database).await?;
    }
    let spec = place.spec("bench", "ours");
    let feed = start(&spec, Start::Copy)?;
    streaming(&feed).await?;
    feed.stop().await;
    place.run("pgbench -p $T -i -q -I tp native 2>&1").await?;
    let owner = place.on_source("bench").await?;
    let tables = "pgbench_accounts, pgbench_branches, pgbench_tellers, pgbench_history";
    owner.batch_execute(&format!("CREATE PUBLICATION peers FOR TABLE {tables}")).await.map_err(text)?;
    owner.query("SELECT pg_create_logical_replication_slot('decode_only', 'pgoutput')", &[]).await.map_err(text)?;
    let follower = place.on_target("native").await?;
    follower
        .batch_execute(&format!("CREATE SUBSCRIPTION native CONNECTION '{}' PUBLICATION peers", place.source_words("bench")))
        .await
        .map_err(text)?;
    until(&follower, "the native copy", "SELECT bool_and(srsubstate = 'r') FROM pg_subscription_rel").await?;
    follower.batch_execute("ALTER SUBSCRIPTION native DISABLE").await.map_err(text)?;
    for database in ["ours", "native"] {
        place.on_target(database).await?.batch_execute("VACUUM ANALYZE").await.map_err(text)?;
    }
    Ok(Pair { ours: spec })
}

pub async fn round(place: &Place, pair: &Pair, settings: &Settings, round: u64, figures: &mut Figures) -> Outcome<()> {
    let owner = place.on_source("bench").await?;
    let clients = 8;
    let each = settings.transactions.div_ceil(clients);
    println!("catch-up, round {}: writing {} transactions", round + 1, each * clients);
    place.run(&format!("PGOPTIONS='-c synchronous_commit=off' pgbench -p $S -n -c {clients} -j 2 -t {each} bench 2>&1")).await?;
    owner.batch_execute("CHECKPOINT").await.map_err(text)?;
    place.on_target("postgres").await?.batch_execute("CHECKPOINT").await.map_err(text)?;
    let end = position(&owner).await?;
    let rate = |begun: Instant| (each * clients) as f64 / begun.elapsed().as_secs_f64();
    for turn in 0..3 {
        match (turn + round) % 3 {
            0 => {
                let (begun, before) = (Instant::now(), cpu_seconds("self"));
                let feed = start(&pair.ours, Start::Resume)?;
                feed.wait_applied(end, PATIENCE).await.map_err(text)?;
                figures.add("catch-up", "understudy", "transactions/s", rate(begun));
                let per = |seconds: f64| seconds / (each * clients) as f64 * 1e6;
                figures.add("catch-up", "understudy", "agent CPU us/tx", per(cpu_seconds("self") - before));
                let follower = place.on_target("ours").await?;
                let pid = value(&follower, "SELECT min(pid) FROM pg_stat_activity WHERE application_name = 'understudy applier'").await?;
                figures.add("catch-up", "understudy", "follower CPU us/tx", per(cpu_seconds(&pid)));
                let state = feed.state();
                if state.findings > 0 || !state.held_tables.is_empty() {
                    return Err(format!("the feed found differences: {:?}", state.finding_examples));
                }
                feed.stop().await;
            }
            1 => {
                let follower = place.on_target("native").await?;
                let begun = Instant::now();
                follower.batch_execute("ALTER SUBSCRIPTION native ENABLE").await.map_err(text)?;
                let reached = format!(
                    "SELECT coalesce(max(replay_lsn) >= '{end}', false) FROM pg_stat_replication WHERE application_name = 'native'"
                );
                until(&owner, "the native catch-up", &reached).await?;
                figures.add("catch-up", "native subscription", "transactions/s", rate(begun));
                follower.batch_execute("ALTER SUBSCRIPTION native DISABLE").await.map_err(text)?;
                until(&owner, "the end of the subscription", "SELECT NOT active FROM pg_replication_slots WHERE slot_name = 'native'")
                    .await?;
            }
            _ => {
                let script = format!(
                    "pg_recvlogical -p $S -d bench -S decode_only --start -f /dev/null --endpos={end} -o proto_version=1 -o publication_names=peers"
                );
                let begun = Instant::now();
                place.run(&script).await?;
                figures.add("catch-up", "decode only", "transactions/s", rate(begun));
                // The position that it confirmed may lie before the end: the next round must not see these again.
                owner
                    .query(
                        &format!(
                            "SELECT pg_replication_slot_advance(slot_name, '{end}') FROM pg_replication_slots
                             WHERE slot_name = 'decode_only' AND confirmed_flush_lsn < '{end}'"
                        ),
                        &[],
                    )
                    .await
                    .map_err(text)?;
            }
        }
    }
    Ok(())
}

/// User and system time of a process; /proc counts in hundredths.
fn cpu_seconds(pid: &str) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).unwrap_or_default();
    (ticks(11) + ticks(12)) / 100.0
}

/// Nobody's figure counts unless the rows are the same.
pub async fn compare(place: &Place) -> Outcome<()> {
    let sums = "SELECT (SELECT count(*) || '/' || sum(abs(delta)) FROM pgbench_history) || ' ' || (SELECT sum(abalance * aid::bigint) FROM pgbench_accounts)
                || ' ' || (SELECT sum(tbalance * tid::bigint) FROM pgbench_tellers) || ' ' || (SELECT sum(bbalance * bid::bigint) FROM pgbench_branches)";
    let wanted = value(&place.on_source("bench").await?, sums).await?;
    for database in ["ours", "native"] {
        let found = value(&place.on_target(database).await?, sums).await?;
        if found != wanted {
            return Err(format!("{database} differs from the source: {found} instead of {wanted}"));
        }
    }
    println!("rows are equal on all three: {wanted}");
    Ok(())
}
