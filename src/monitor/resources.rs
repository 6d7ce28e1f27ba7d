//! What a server is doing, from its own statistics views. Works on PostgreSQL 13 to 18 with the rights of any role;
//! without `pg_monitor` the states and ages of other roles' sessions are not seen.
//! What it does not say by itself (processor time) is read from the host, where that is ours. Source: PostgreSQL documentation, "The Cumulative Statistics System", "pg_locks", "pg_replication_slots".

use super::host;
use crate::lsn::Lsn;
use serde::{Deserialize, Serialize};
use std::time::Duration;
use tokio_postgres::Client;

/// A sample could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum ResourceError {
    /// The server refused or the connection is gone.
    #[error("cannot read the server's statistics (connect again, and check that the role may read pg_stat_database): {0}")]
    Query(#[from] tokio_postgres::Error),
    /// The server answers in a way we do not know.
    #[error("the server reported `{0}`, which is not a write-ahead log position: check that it is PostgreSQL 14 to 18")]
    Position(String),
}

/// One sample of one server. Counters are since the server's statistics were reset; [`rates_since`](Self::rates_since)
/// turns two samples into rates.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ResourceSample {
    /// `server_version_num`, such as 180001.
    pub server_version_num: u32,
    /// The server is a standby.
    pub in_recovery: bool,
    /// Connections to all databases of the server, ours included.
    pub connections: u64,
    /// `max_connections`
    pub connections_max: u64,
    /// Client connections that run a statement now, this one left out.
    pub active: u64,
    /// Client connections that are idle inside a transaction.
    pub idle_in_transaction: u64,
    /// Transactions committed in this database.
    pub commits: u64,
    /// Transactions rolled back in this database.
    pub rollbacks: u64,
    /// Pages found in shared buffers.
    pub blocks_hit: u64,
    /// Pages read from the operating system.
    pub blocks_read: u64,
    /// Share of pages found in shared buffers, 0 to 1; 1 when nothing was read yet.
    pub cache_hit_ratio: f64,
    /// Bytes written to temporary files by sorts and hashes that did not fit in work_mem.
    pub temp_bytes: u64,
    /// Deadlocks in this database.
    pub deadlocks: u64,
    /// Size of this database.
    pub database_bytes: u64,
    /// Write-ahead log insert position; on a standby the replayed one.
    pub wal_lsn: Lsn,
    /// Lock requests that wait, in the whole server.
    pub locks_waiting: u64,
    /// Age of the oldest running transaction, in seconds.
    pub longest_transaction_s: f64,
    /// Transactions since the oldest snapshot that vacuum must respect: sessions, slots and prepared transactions.
    pub oldest_xmin_age: u64,
    /// Bytes of write-ahead log that the most backward replication slot retains.
    pub slot_retained_bytes: u64,
    /// Milliseconds that backends waited for reads of data files; 0 where `track_io_timing` is off.
    #[serde(default)]
    pub read_ms: f64,
    /// Milliseconds that backends waited for writes of data files; 0 where `track_io_timing` is off.
    #[serde(default)]
    pub write_ms: f64,
    /// Checkpoints that came with time.
    #[serde(default)]
    pub checkpoints_timed: u64,
    /// Checkpoints that were asked for, mostly because the write-ahead log had grown.
    #[serde(default)]
    pub checkpoints_requested: u64,
    /// Pages that checkpoints have written.
    #[serde(default)]
    pub checkpoint_blocks: u64,
    /// Servers and feeds that receive the write-ahead log.
    #[serde(default)]
    pub receivers: u64,
    /// Bytes of write-ahead log that the slowest of them has not confirmed.
    #[serde(default)]
    pub receivers_behind_bytes: u64,
    /// Share of rows in this database's tables that are dead, 0 to 1: how bloated it is. Looked at once a minute.
    #[serde(default)]
    pub dead_rows_ratio: f64,
    /// Seconds of processor time of all its processes since it started; `None`: it is on another host.
    #[serde(default)]
    pub cpu_s: Option<f64>,
    /// Processor cores in use since the sample before; `None`: on another host, or a first sample.
    #[serde(default)]
    pub cpu_cores: Option<f64>,
    /// Bytes written to temporary files per second since the sample before; 0 in a first sample.
    #[serde(default)]
    pub temp_bytes_per_s: f64,
    /// Pages read from the operating system per second since the sample before; 0 in a first sample.
    #[serde(default)]
    pub blocks_read_per_s: f64,
    /// Commits and rollbacks per second since the sample before; 0 in a first sample.
    pub transactions_per_s: f64,
    /// Bytes of write-ahead log per second since the sample before; 0 in a first sample.
    pub wal_bytes_per_s: f64,
}

impl ResourceSample {
    /// The same sample with rates and cache ratio over the time since `earlier`. Counters that went backward (statistics
    /// reset, another server) give 0.
    #[must_use]
    pub fn rates_since(mut self, earlier: &ResourceSample, elapsed: Duration) -> Self {
        let seconds = elapsed.as_secs_f64();
        if seconds <= 0.0 {
            return self;
        }
        let finished = |sample: &ResourceSample| sample.commits.saturating_add(sample.rollbacks);
        self.transactions_per_s = finished(&self).saturating_sub(finished(earlier)) as f64 / seconds;
        self.wal_bytes_per_s = self.wal_lsn.bytes_since(earlier.wal_lsn) as f64 / seconds;
        let hit = self.blocks_hit.saturating_sub(earlier.blocks_hit);
        let read = self.blocks_read.saturating_sub(earlier.blocks_read);
        if hit + read > 0 {
            self.cache_hit_ratio = ratio(hit, read);
        }
        self.blocks_read_per_s = read as f64 / seconds;
        self.temp_bytes_per_s = self.temp_bytes.saturating_sub(earlier.temp_bytes) as f64 / seconds;
        self.cpu_cores = self.cpu_s.zip(earlier.cpu_s).map(|(now, before)| (now - before).max(0.0) / seconds);
        self
    }
}

/// One statement, so that the figures belong together. pg_locks rather than wait events: every role sees all of it.
const QUERY: &str = "
SELECT current_setting('server_version_num')::int8,
       pg_is_in_recovery(),
       s.connections, s.active, s.idle_in_transaction,
       current_setting('max_connections')::int8,
       d.xact_commit, d.xact_rollback, d.blks_hit, d.blks_read, d.temp_bytes, d.deadlocks,
       CASE WHEN has_database_privilege(current_database(), 'CONNECT') THEN pg_database_size(current_database()) ELSE 0 END,
       w.lsn::text,
       (SELECT count(*) FROM pg_catalog.pg_locks WHERE NOT granted),
       s.longest_transaction_s,
       greatest(s.xmin_age, r.xmin_age,
                (SELECT coalesce(max(age(transaction)), 0) FROM pg_catalog.pg_prepared_xacts))::int8,
       coalesce(r.retained, 0)::int8,
       coalesce(d.blk_read_time, 0)::float8, coalesce(d.blk_write_time, 0)::float8,
       p.receivers, coalesce(p.behind, 0)::int8,
       pg_backend_pid(),
       CASE WHEN inet_server_addr() IS NULL OR inet_server_addr() = inet_client_addr() THEN current_database()::text END
FROM (SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END AS lsn) AS w,
     pg_catalog.pg_stat_database AS d,
     (SELECT (SELECT sum(numbackends)::int8 FROM pg_catalog.pg_stat_database) AS connections,
             count(*) FILTER (WHERE state = 'active' AND pid <> pg_backend_pid() AND backend_type = 'client backend') AS active,
             count(*) FILTER (WHERE state LIKE 'idle in transaction%') AS idle_in_transaction,
             greatest(coalesce(extract(epoch FROM max(clock_timestamp() - xact_start)
                 FILTER (WHERE pid <> pg_backend_pid() AND backend_type = 'client backend')), 0), 0)::float8 AS longest_transaction_s,
             coalesce(max(age(backend_xmin)) FILTER (WHERE pid <> pg_backend_pid()), 0) AS xmin_age
      FROM pg_catalog.pg_stat_activity) AS s,
     (SELECT greatest(coalesce(max(age(xmin)), 0), coalesce(max(age(catalog_xmin)), 0)) AS xmin_age,
             max(pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END,
                                 restart_lsn)) AS retained
      FROM pg_catalog.pg_replication_slots) AS r,
     (SELECT count(*) AS receivers,
             max(pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END,
                                 coalesce(replay_lsn, flush_lsn, sent_lsn))) AS behind
      FROM pg_catalog.pg_stat_replication) AS p
WHERE d.datname = current_database()";

const CHECKPOINTS: &str = "SELECT num_timed, num_requested, buffers_written FROM pg_catalog.pg_stat_checkpointer";
const CHECKPOINTS_BEFORE_17: &str = "SELECT checkpoints_timed, checkpoints_req, buffers_checkpoint FROM pg_catalog.pg_stat_bgwriter";
const DEAD_ROWS: &str =
    "SELECT coalesce(sum(n_dead_tup) / nullif(sum(n_dead_tup + n_live_tup), 0), 0)::float8 FROM pg_catalog.pg_stat_user_tables";

/// Takes one sample on `client`, of its server and its database.
///
/// `thorough`: tables are looked at as well, which takes longer the more there are; else that figure is 0.
///
/// # Errors
/// [`ResourceError`]
pub async fn sample(client: &Client, thorough: bool) -> Result<ResourceSample, ResourceError> {
    let row = client.query_one(QUERY, &[]).await?;
    let number = |index: usize| -> Result<u64, tokio_postgres::Error> {
        Ok(row.try_get::<_, Option<i64>>(index)?.and_then(|value| u64::try_from(value).ok()).unwrap_or(0))
    };
    let lsn: Option<String> = row.try_get(13)?;
    let wal_lsn = match lsn {
        Some(text) => text.parse().map_err(|_| ResourceError::Position(text))?,
        None => Lsn::ZERO,
    };
    let (blocks_hit, blocks_read) = (number(8)?, number(9)?);
    let server_version_num = u32::try_from(number(0)?).unwrap_or(0);
    let checkpoints = client.query_one(if server_version_num >= 170_000 { CHECKPOINTS } else { CHECKPOINTS_BEFORE_17 }, &[]).await?;
    let checkpoint = |index: usize| -> Result<u64, tokio_postgres::Error> {
        Ok(checkpoints.try_get::<_, Option<i64>>(index)?.and_then(|value| u64::try_from(value).ok()).unwrap_or(0))
    };
    let dead_rows_ratio = if thorough { client.query_one(DEAD_ROWS, &[]).await?.try_get(0)? } else { 0.0 };
    let backend: i32 = row.try_get(22)?;
    Ok(ResourceSample {
        read_ms: row.try_get(18)?,
        write_ms: row.try_get(19)?,
        receivers: number(20)?,
        receivers_behind_bytes: number(21)?,
        checkpoints_timed: checkpoint(0)?,
        checkpoints_requested: checkpoint(1)?,
        checkpoint_blocks: checkpoint(2)?,
        dead_rows_ratio,
        cpu_s: row.try_get::<_, Option<String>>(23)?.and_then(|database| host::cpu_seconds(backend, &database)),
        cpu_cores: None,
        temp_bytes_per_s: 0.0,
        blocks_read_per_s: 0.0,
        server_version_num,
        in_recovery: row.try_get(1)?,
        connections: number(2)?,
        active: number(3)?,
        idle_in_transaction: number(4)?,
        connections_max: number(5)?,
        commits: number(6)?,
        rollbacks: number(7)?,
        blocks_hit,
        blocks_read,
        cache_hit_ratio: ratio(blocks_hit, blocks_read),
        temp_bytes: number(10)?,
        deadlocks: number(11)?,
        database_bytes: number(12)?,
        wal_lsn,
        locks_waiting: number(14)?,
        longest_transaction_s: row.try_get(15)?,
        oldest_xmin_age: number(16)?,
        slot_retained_bytes: number(17)?,
        transactions_per_s: 0.0,
        wal_bytes_per_s: 0.0,
    })
}

fn ratio(hit: u64, read: u64) -> f64 {
    let all = hit.saturating_add(read);
    if all == 0 { 1.0 } else { hit as f64 / all as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_come_from_two_samples() {
        let earlier = ResourceSample { commits: 100, rollbacks: 5, blocks_hit: 1_000, wal_lsn: Lsn(1_000), ..Default::default() };
        let later = ResourceSample {
            commits: 290,
            rollbacks: 15,
            blocks_hit: 1_090,
            blocks_read: 10,
            cache_hit_ratio: 0.99,
            wal_lsn: Lsn(5_000),
            ..Default::default()
        };
        let rated = later.clone().rates_since(&earlier, Duration::from_secs(2));
        let busy = ResourceSample { cpu_s: Some(7.0), temp_bytes: 600, ..Default::default() };
        let busy = busy.rates_since(&ResourceSample { cpu_s: Some(4.0), ..Default::default() }, Duration::from_secs(2));
        assert_eq!((busy.cpu_cores, busy.temp_bytes_per_s, rated.cpu_cores), (Some(1.5), 300.0, None));
        assert_eq!((rated.transactions_per_s, rated.wal_bytes_per_s, rated.cache_hit_ratio), (100.0, 2_000.0, 0.9));
        let reset = earlier.rates_since(&later, Duration::from_secs(2));
        assert_eq!((reset.transactions_per_s, reset.wal_bytes_per_s), (0.0, 0.0));
        assert_eq!(later.clone().rates_since(&rated, Duration::ZERO), later);
    }
}
