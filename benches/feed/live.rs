//! Following live: how long a committed row takes to be visible on the follower, at a steady load, and what following costs the
//! source, by our feed and by a native subscription.

use super::{
    Figures, Outcome, Settings,
    catchup::Pair,
    place::{PATIENCE, Place, position, start, streaming, text, until},
};
use std::{
    fs,
    time::{Duration, Instant},
};
use tokio_postgres::Client;
use understudy::cdc::Start;

/// Between two probes.
const PROBE_PAUSE: Duration = Duration::from_millis(5);

/// A probe that is not visible after this counts as this.
const PROBE_MAX: Duration = Duration::from_secs(5);

pub async fn round(place: &Place, pair: &Pair, settings: &Settings, round: u64, figures: &mut Figures) -> Outcome<()> {
    println!("live, round {}", round + 1);
    let owner = place.on_source("bench").await?;
    for turn in 0..3 {
        match (turn + round) % 3 {
            0 => load(place, settings, "no follower", None, figures).await?,
            1 => {
                let feed = start(&pair.ours, Start::Resume)?;
                streaming(&feed).await?;
                feed.wait_applied(position(&owner).await?, PATIENCE).await.map_err(text)?;
                load(place, settings, "understudy", Some("ours"), figures).await?;
                feed.wait_applied(position(&owner).await?, PATIENCE).await.map_err(text)?;
                feed.stop().await;
            }
            _ => {
                let follower = place.on_target("native").await?;
                follower.batch_execute("ALTER SUBSCRIPTION native ENABLE").await.map_err(text)?;
                reached(&owner).await?;
                load(place, settings, "native subscription", Some("native"), figures).await?;
                reached(&owner).await?;
                follower.batch_execute("ALTER SUBSCRIPTION native DISABLE").await.map_err(text)?;
                until(&owner, "the end of the subscription", "SELECT NOT active FROM pg_replication_slots WHERE slot_name = 'native'")
                    .await?;
            }
        }
    }
    // Both end the round with the source's rows.
    let feed = start(&pair.ours, Start::Resume)?;
    feed.wait_applied(position(&owner).await?, PATIENCE).await.map_err(text)?;
    feed.stop().await;
    let follower = place.on_target("native").await?;
    follower.batch_execute("ALTER SUBSCRIPTION native ENABLE").await.map_err(text)?;
    reached(&owner).await?;
    follower.batch_execute("ALTER SUBSCRIPTION native DISABLE").await.map_err(text)?;
    until(&owner, "the end of the subscription", "SELECT NOT active FROM pg_replication_slots WHERE slot_name = 'native'").await
}

async fn reached(owner: &Client) -> Outcome<()> {
    let end = position(owner).await?;
    let sql = format!("SELECT coalesce(max(replay_lsn) >= '{end}', false) FROM pg_stat_replication WHERE application_name = 'native'");
    until(owner, "the native subscription's catching up", &sql).await
}

async fn load(place: &Place, settings: &Settings, method: &str, follower: Option<&str>, figures: &mut Figures) -> Outcome<()> {
    // At a steady rate: lag, and the source's own work per transaction.
    let script = format!("pgbench -p $S -n -c 4 -j 1 -R {} -T {} bench 2>&1", settings.tps, settings.seconds);
    let before = source_cpu(place).await?;
    let probing = async {
        match follower {
            Some(database) => probe(place, database, Duration::from_secs(settings.seconds.saturating_sub(1))).await,
            None => Ok(Vec::new()),
        }
    };
    let (output, lags) = tokio::join!(place.run(&script), probing);
    let (output, mut lags) = (output?, lags?);
    let cpu = source_cpu(place).await? - before;
    let done = number(&output, "number of transactions actually processed").ok_or("pgbench said nothing that could be read")?;
    let steady = format!("live at {} tps", settings.tps);
    figures.add(&steady, method, "tps", number(&output, "tps").unwrap_or_default());
    figures.add(&steady, method, "source CPU us/tx", cpu / done * 1e6);
    lags.sort();
    for (measure, share) in [("lag p50 ms", 0.5), ("lag p99 ms", 0.99)] {
        if let Some(lag) = lags.get(((lags.len() as f64 * share) as usize).min(lags.len().saturating_sub(1))) {
            figures.add(&steady, method, measure, lag.as_secs_f64() * 1000.0);
        }
    }
    // As fast as the source can, everything on one machine.
    let output = place.run(&format!("pgbench -p $S -n -c 4 -j 1 -T {} bench 2>&1", settings.seconds)).await?;
    figures.add("source at full speed", method, "tps", number(&output, "tps").unwrap_or_default());
    Ok(())
}

/// Writes a row on the source and looks for it on the follower, again and again: from the acknowledgement of the commit to the row
/// being visible.
async fn probe(place: &Place, database: &str, time: Duration) -> Outcome<Vec<Duration>> {
    let (owner, follower) = (place.on_source("bench").await?, place.on_target(database).await?);
    let write = owner.prepare("UPDATE pgbench_branches SET filler = $1::text WHERE bid = 1").await.map_err(text)?;
    let read = follower.prepare("SELECT trim(filler) FROM pgbench_branches WHERE bid = 1").await.map_err(text)?;
    let (begun, mut lags) = (Instant::now(), Vec::new());
    while begun.elapsed() < time {
        let word = format!("{}-{}", lags.len(), fastrand::u64(..));
        owner.execute(&write, &[&word]).await.map_err(text)?;
        let written = Instant::now();
        loop {
            let row = follower.query_one(&read, &[]).await.map_err(text)?;
            if row.get::<_, Option<&str>>(0) == Some(&word) || written.elapsed() > PROBE_MAX {
                break;
            }
            tokio::time::sleep(Duration::from_micros(500)).await;
        }
        lags.push(written.elapsed());
        tokio::time::sleep(PROBE_PAUSE).await;
    }
    Ok(lags)
}

fn number(output: &str, prefix: &str) -> Option<f64> {
    let line = output.lines().find(|line| line.starts_with(prefix))?;
    line.split(['=', ':']).nth(1)?.split_whitespace().next()?.split('/').next()?.parse().ok()
}

/// CPU seconds of all processes of the source, those that have ended included: /proc counts in hundredths.
async fn source_cpu(place: &Place) -> Outcome<f64> {
    let client = place.on_source("bench").await?;
    let path = super::place::value(&client, "SELECT current_setting('data_directory')").await?;
    let pid = fs::read_to_string(format!("{path}/postmaster.pid")).map_err(text)?.lines().next().unwrap_or_default().to_owned();
    let mut total = 0.0;
    for entry in fs::read_dir("/proc").map_err(text)?.flatten() {
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks = |range: std::ops::Range<usize>| -> f64 {
            fields.get(range).map(|fields| fields.iter().filter_map(|field| field.parse::<f64>().ok()).sum()).unwrap_or_default()
        };
        if entry.file_name().to_string_lossy() == pid {
            total += ticks(11..15);
        } else if fields.get(1) == Some(&pid.as_str()) {
            total += ticks(11..13);
        }
    }
    Ok(total / 100.0)
}
