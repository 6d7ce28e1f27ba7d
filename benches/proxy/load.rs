//! The loads: pgbench, raw bulk transfers, idle connections.

use crate::programs::Target;
use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use understudy::{
    backend::Connection,
    config::ServerUrl,
    demo::servers::Server,
    wire::{frontend, put},
};

const SCALE: &str = "5";
/// Share of the transactions whose latency pgbench writes down: all of them would measure the log.
const LOGGED: &str = "0.1";

/// What one pgbench run showed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Run {
    pub tps: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    pub cpu_s_per_million: f64,
    pub rss_bytes: f64,
}

/// What is moved in bulk.
#[derive(Clone, Copy)]
pub enum Bulk {
    Select,
    CopyOut,
    CopyIn,
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// Fills the database.
pub async fn prepare(server: &Server, password: &str) -> Result<(), String> {
    run_pgbench(server.port(), password, Path::new("."), &["-i", "-q", "-s", SCALE])?;
    let owner = server.connect("bench").await.map_err(|error| error.to_string())?;
    owner
        .batch_execute("CREATE UNLOGGED TABLE bulk (line text); ALTER TABLE bulk OWNER TO app; ALTER TABLE pgbench_history ADD PRIMARY KEY (tid, bid, aid, mtime);")
        .await
        .map_err(|error| error.to_string())
}

pub fn pgbench(target: &Target, password: &str, mode: &str, clients: u32, seconds: u64) -> Result<Run, String> {
    let folder = std::env::temp_dir().join(format!("understudy-bench-log-{}", std::process::id()));
    fs::create_dir_all(&folder).map_err(|error| error.to_string())?;
    let before = target.pid.map(cpu_seconds).unwrap_or_default();
    let (clients_text, seconds_text) = (clients.to_string(), seconds.to_string());
    let threads = clients.min(2).to_string();
    let arguments = ["-S", "-n", "-M", mode, "-c", &clients_text, "-j", &threads, "-T", &seconds_text, "-l", "--sampling-rate", LOGGED];
    let output = run_pgbench(target.port, password, &folder, &arguments)?;
    let number = |prefix: &str| {
        let line = output.lines().find(|line| line.starts_with(prefix))?;
        line.split(['=', ':']).nth(1)?.split_whitespace().next()?.split('/').next()?.parse::<f64>().ok()
    };
    let queries = number("number of transactions actually processed").ok_or("pgbench said nothing that could be read")?;
    let cpu = target.pid.map(cpu_seconds).unwrap_or_default() - before;
    let mut latencies = latencies(&folder)?;
    let _ = fs::remove_dir_all(&folder);
    latencies.sort_by(f64::total_cmp);
    let at = |share: f64| latencies.get((latencies.len() as f64 * share) as usize).copied().unwrap_or_default();
    Ok(Run {
        tps: number("tps").unwrap_or_default(),
        p50_us: at(0.5),
        p99_us: at(0.99),
        cpu_s_per_million: cpu / queries.max(1.0) * 1e6,
        rss_bytes: target.pid.map(resident).unwrap_or_default(),
    })
}

/// The third field of pgbench's log, in microseconds.
fn latencies(folder: &Path) -> Result<Vec<f64>, String> {
    let mut all = Vec::new();
    for file in fs::read_dir(folder).map_err(|error| error.to_string())?.flatten() {
        let text = fs::read_to_string(file.path()).map_err(|error| error.to_string())?;
        all.extend(text.lines().filter_map(|line| line.split_whitespace().nth(2)?.parse::<f64>().ok()));
    }
    Ok(all)
}

fn run_pgbench(port: u16, password: &str, folder: &Path, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new("pgbench")
        .args(["-h", "127.0.0.1", "-p", &port.to_string(), "-U", "app"])
        .args(arguments)
        .arg("bench")
        .current_dir(folder)
        .env("PGPASSWORD", password)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("cannot run pgbench: {error}. scripts/setup installs it"))?;
    if !output.status.success() {
        return Err(format!("pgbench {arguments:?} failed: {}", String::from_utf8_lossy(&output.stderr)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn url(target: &Target, server: &Server) -> ServerUrl {
    ServerUrl { port: target.port, ..server.app_url("bench") }
}

/// Bytes per second that this client sees. It looks at nothing but the end, so that it is not what is measured.
pub async fn bulk(target: &Target, server: &Server, kind: Bulk) -> Result<f64, String> {
    const ROWS: usize = 400_000;
    const LINES: usize = 256 << 10;
    let mut connection = Connection::open(&url(target, server), &[]).await.map_err(|error| error.to_string())?;
    let mut request = bytes::BytesMut::new();
    let select = format!("SELECT n, repeat('x', 200) FROM generate_series(1, {ROWS}) n");
    match kind {
        Bulk::Select => frontend::put_query(&mut request, select.as_bytes()),
        Bulk::CopyOut => frontend::put_query(&mut request, format!("COPY ({select}) TO STDOUT").as_bytes()),
        Bulk::CopyIn => {
            connection.simple_query("TRUNCATE bulk").await.map_err(|error| error.to_string())?;
            frontend::put_query(&mut request, b"COPY bulk FROM STDIN");
        }
    }
    let began = Instant::now();
    connection.send(&request).await.map_err(|error| error.to_string())?;
    let mut moved = 0;
    if matches!(kind, Bulk::CopyIn) {
        let started = connection.receive().await.map_err(|error| error.to_string())?;
        if started.tag != b'G' {
            return Err(format!("COPY was not started but answered with {:?}", started.tag as char));
        }
        let mut part = bytes::BytesMut::new();
        while part.len() < LINES {
            put(&mut part, b'd', |b| b.extend_from_slice(&[b"y".repeat(1000), b"\n".to_vec()].concat()));
        }
        for _ in 0..400 {
            connection.send(&part).await.map_err(|error| error.to_string())?;
            moved += part.len();
        }
        let mut end = bytes::BytesMut::new();
        put(&mut end, b'c', |_| {});
        connection.send(&end).await.map_err(|error| error.to_string())?;
    }
    let mut room = vec![0; 256 << 10];
    let (mut end, mut received) = ([0; 6], 0);
    while end != *b"Z\0\0\0\x05I" {
        let got = connection.stream.read(&mut room).await.map_err(|error| error.to_string())?;
        if got == 0 {
            return Err("the connection ended in the middle of a large answer".into());
        }
        received += got;
        let last = &room[..got];
        let keep = end.len().min(got);
        end.copy_within(keep.., 0);
        let at = end.len() - keep;
        end[at..].copy_from_slice(&last[got - keep..]);
    }
    let seconds = began.elapsed().as_secs_f64();
    let _ = connection.stream.shutdown().await;
    Ok((moved + received) as f64 / seconds)
}

/// Opens connections, gives each a little to do, and returns the resident bytes that each adds when all are idle.
pub async fn idle(target: &Target, server: &Server, clients: usize) -> Result<f64, String> {
    let pid = target.pid.ok_or("nothing to measure")?;
    let url = url(target, server);
    let open = |number: usize| {
        let url = url.clone();
        async move {
            let mut open = Vec::new();
            for _ in 0..number {
                let mut connection = Connection::open(&url, &[]).await.map_err(|error| error.to_string())?;
                connection.simple_query("SELECT 1").await.map_err(|error| error.to_string())?;
                let rows = connection.query("SELECT repeat('x', $1::int)", &["3000"]).await;
                rows.map_err(|error| error.to_string())?;
                open.push(connection);
            }
            Ok::<_, String>(open)
        }
    };
    let few = open(50).await?; // what the first ones allocate is not each one's
    let before = resident(pid);
    let many = open(clients - 50).await?;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let after = resident(pid);
    drop((few, many));
    Ok((after - before) / (clients - 50) as f64)
}

/// User and system time of a process, in seconds; /proc/PID/stat counts in hundredths.
fn cpu_seconds(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).unwrap_or_default();
    (ticks(11) + ticks(12)) / 100.0
}

/// Resident bytes of a process.
fn resident(pid: u32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok()).unwrap_or_default() * 1024.0
}
