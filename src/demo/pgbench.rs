//! Real `pgbench` processes through the proxy: one per protocol mode, in rounds of a few seconds, because pgbench only
//! ends without breaking a transaction when its time is up. Its exit status, its messages and its per-transaction log
//! are what is counted; a summary that disagrees with the log is itself a failure.

use super::{servers::find_client, tally::Tally};
use std::{
    path::{Path, PathBuf},
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    process::Command,
    task::JoinSet,
};

/// Length of a round, in seconds.
const ROUND_S: u64 = 5;

/// Where the clients connect.
#[derive(Clone)]
pub struct Target {
    /// Port on 127.0.0.1.
    pub port: u16,
    /// Database.
    pub dbname: String,
    /// Role.
    pub user: String,
    /// Password.
    pub password: crate::config::Secret,
}

impl Target {
    /// A connection of our own to the same place.
    ///
    /// # Errors
    /// The server's, or the proxy's.
    pub async fn connect(&self, application_name: &str) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
        let mut config = tokio_postgres::Config::new();
        config.host("127.0.0.1").port(self.port).user(&self.user).password(self.password.expose()).dbname(&self.dbname);
        config.application_name(application_name).connect_timeout(Duration::from_secs(10));
        config.ssl_mode(tokio_postgres::config::SslMode::Disable);
        let (client, connection) = config.connect(tokio_postgres::NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }
}

/// The three ways in which pgbench speaks the protocol. Every one writes (tpcb-like) and reads (select-only).
const MODES: [&str; 3] = ["simple", "extended", "prepared"];

/// Running pgbench processes.
pub struct PgBench {
    stop: Arc<AtomicBool>,
    tasks: JoinSet<()>,
    rounds: Arc<AtomicU64>,
}

/// pgbench is not installed.
#[derive(Debug, thiserror::Error)]
#[error("pgbench is not installed here: run `scripts/setup`")]
pub struct NoPgBench;

/// Creates pgbench's tables directly on a server.
///
/// # Errors
/// What pgbench said.
pub async fn initialise(target: &Target, scale: u32) -> Result<(), String> {
    let output = command(target)
        .map_err(|error| error.to_string())?
        .args(["--initialize", "--init-steps=dtGvp", "--quiet", "--scale", &scale.to_string()])
        .arg(&target.dbname)
        .output()
        .await
        .map_err(|error| format!("cannot run pgbench: {error}"))?;
    if output.status.success() {
        Ok(())
    } else {
        Err(format!("pgbench --initialize failed: {}", super::servers::tail(&String::from_utf8_lossy(&output.stderr))))
    }
}

fn command(target: &Target) -> Result<Command, NoPgBench> {
    let mut command = Command::new(find_client("pgbench").ok_or(NoPgBench)?);
    command.args(["--host", "127.0.0.1", "--port", &target.port.to_string(), "--username", &target.user]);
    command.env("PGPASSWORD", target.password.expose()).env("LC_ALL", "C.UTF-8").stdin(Stdio::null());
    command.process_group(0).kill_on_drop(true);
    Ok(command)
}

impl PgBench {
    /// Starts one process per mode, each with two clients and `rate` transactions a second. `logs` is an existing directory.
    ///
    /// # Errors
    /// [`NoPgBench`]
    pub fn start(target: &Target, rate: u32, logs: &Path, tally: &Arc<Tally>) -> Result<Self, NoPgBench> {
        command(target)?;
        let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut tasks = JoinSet::new();
        for (index, mode) in MODES.into_iter().enumerate() {
            let (target, logs, tally) = (target.clone(), logs.to_owned(), tally.clone());
            let (stop, rounds) = (stop.clone(), rounds.clone());
            tasks.spawn(async move {
                // Not all in step: at any moment most processes are in the middle of a round.
                tokio::time::sleep(Duration::from_millis(ROUND_S * 1000 * index as u64 / MODES.len() as u64)).await;
                while !stop.load(Relaxed) {
                    let number = rounds.fetch_add(1, Relaxed);
                    run_round(&target, mode, rate, &logs.join(format!("{mode}-{number}")), &tally).await;
                }
            });
        }
        Ok(PgBench { stop, tasks, rounds })
    }

    /// Lets the running rounds end and waits for them.
    pub async fn finish(mut self) -> u64 {
        self.stop.store(true, Relaxed);
        while self.tasks.join_next().await.is_some() {}
        self.rounds.load(Relaxed)
    }
}

async fn run_round(target: &Target, mode: &'static str, rate: u32, log: &Path, tally: &Tally) {
    if let Err(message) = try_round(target, mode, rate, log, tally).await {
        tally.statement_failed(format!("pgbench -M {mode}: {message}"));
        // A proxy that is gone would otherwise be tried thousands of times.
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

async fn try_round(target: &Target, mode: &'static str, rate: u32, log: &Path, tally: &Tally) -> Result<(), String> {
    let mut child = command(target)
        .map_err(|error| error.to_string())?
        .args(["--no-vacuum", "--failures-detailed", "--log", "--client", "2", "--jobs", "1", "--protocol", mode])
        .args(["--builtin=tpcb-like@1", "--builtin=select-only@5"])
        .args(["--time", &ROUND_S.to_string(), "--rate", &rate.to_string()])
        .arg(format!("--log-prefix={}", log.display()))
        .arg(&target.dbname)
        .env("PGAPPNAME", format!("pgbench-{mode}"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("cannot run it: {error}"))?;
    let pid = child.id().unwrap_or_default();
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let summary = async {
        let mut text = String::new();
        if let Some(mut stdout) = stdout {
            let _ = stdout.read_to_string(&mut text).await;
        }
        text
    };
    // Messages are counted when they come, so that they belong to the chapter that caused them.
    let complaints = async {
        let mut reported = 0u64;
        if let Some(stderr) = stderr {
            let mut lines = BufReader::new(stderr).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                reported += u64::from(count_complaint(&line, mode, tally));
            }
        }
        reported
    };
    let (summary, reported) = tokio::join!(summary, complaints);
    let status = child.wait().await.map_err(|error| format!("cannot wait for it: {error}"))?;
    let logged = read_log(&with_suffix(log, pid), tally).await;
    tally.committed(logged.committed);
    for _ in 0..logged.failed {
        tally.statement_failed(format!("pgbench -M {mode}: a transaction failed"));
    }
    if !status.success() && reported == 0 {
        return Err(format!("it ended with {status} and no message"));
    }
    match processed(&summary) {
        Some(processed) if processed == logged.committed => Ok(()),
        Some(processed) => Err(format!("its summary says {processed} transactions, its log {}", logged.committed)),
        None if reported > 0 => Ok(()),
        None => Err("it printed no summary".into()),
    }
}

/// Counts a line of standard error; `true` if it was a failure.
fn count_complaint(line: &str, mode: &str, tally: &Tally) -> bool {
    let dropped = [
        "server closed the connection",
        "could not connect",
        "connection to server",
        "could not send data",
        "could not receive data",
        "backend died",
    ];
    // "Run was aborted; the above results are incomplete." follows the message that was counted.
    if !(line.contains("error:") || line.contains("ERROR") || line.contains("FATAL")) || line.contains("Run was aborted") {
        return false;
    }
    let message = format!("pgbench -M {mode}: {line}");
    if dropped.iter().any(|part| line.contains(part)) {
        tally.connection_dropped(message);
    } else {
        tally.statement_failed(message);
    }
    true
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Logged {
    committed: u64,
    failed: u64,
}

/// `client transaction time_us script epoch us [lag_us]`; the time of a failed one is a word (PostgreSQL documentation, pgbench,
/// "Per-Transaction Logging").
async fn read_log(path: &Path, tally: &Tally) -> Logged {
    let mut logged = Logged::default();
    let Ok(file) = tokio::fs::File::open(path).await else { return logged };
    let mut lines = BufReader::new(file).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        count_logged(&line, &mut logged, tally);
    }
    logged
}

fn count_logged(line: &str, logged: &mut Logged, tally: &Tally) {
    let mut fields = line.split(' ');
    let (Some(time), lag) = (fields.nth(2), fields.nth(3)) else { return };
    match time.parse::<u64>() {
        Ok(time_us) => {
            // The time counts from the scheduled start: the lag is pgbench's own waiting for its turn.
            let lag_us = lag.and_then(|lag| lag.parse::<u64>().ok()).unwrap_or(0);
            tally.had_waited(Duration::from_micros(time_us.saturating_sub(lag_us)));
            logged.committed += 1;
        }
        Err(_) => logged.failed += 1,
    }
}

fn with_suffix(path: &Path, pid: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{pid}"));
    name.into()
}

fn processed(summary: &str) -> Option<u64> {
    let line = summary.lines().find_map(|line| line.strip_prefix("number of transactions actually processed: "))?;
    line.split('/').next()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_logs_and_summaries() {
        let (tally, mut logged) = (Tally::default(), Logged::default());
        for line in ["0 199 2241 0 1175850568 995598 41", "0 200 failed 0 1175850568 998079 3", "1 1 700 1 1 1", "garbage", ""] {
            count_logged(line, &mut logged, &tally);
        }
        assert_eq!(logged, Logged { committed: 2, failed: 1 });
        assert_eq!(tally.latency().count, 2);
        assert_eq!(processed("scaling factor: 1\nnumber of transactions actually processed: 1234\n"), Some(1234));
        assert_eq!(processed("number of transactions actually processed: 12/100\n"), Some(12));
        assert_eq!(processed("nothing"), None);
    }

    #[test]
    fn tells_lost_connections_from_failed_statements() {
        let tally = Tally::default();
        for (line, counted) in [
            ("pgbench (15.18)", false),
            ("pgbench: error: Run was aborted; the above results are incomplete.", false),
            ("pgbench: error: client 0 script 0 aborted in command 5 query 0: ERROR:  deadlock detected", true),
            ("pgbench: error: connection to server at \"127.0.0.1\", port 1 failed: Connection refused", true),
            ("pgbench: error: client 1 aborted in command 3: server closed the connection unexpectedly", true),
        ] {
            assert_eq!(count_complaint(line, "simple", &tally), counted, "{line}");
        }
        let failures = tally.failures();
        assert_eq!((failures.failed_statements, failures.dropped_connections), (1, 2));
    }
}
