//! What the proxy costs: pgbench -S direct, through understudy, and through PgBouncer (session mode) where it is
//! installed; in simple, extended and prepared mode; rounds interleaved in one run, medians reported.
//!
//! `make bench-proxy` runs it. Arguments after `--`: rounds, seconds per run. Writes target/bench/proxy.json.
//! CPU seconds per million queries (user + system, from /proc) tell more than throughput on a small machine.

use serde_json::json;
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};
use understudy::demo::servers::{Options, Server};

const MODES: [&str; 3] = ["simple", "extended", "prepared"];
const CLIENTS: [u32; 2] = [1, 8];
const SCALE: &str = "5";

struct Target {
    name: &'static str,
    port: u16,
    pid: Option<u32>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Run {
    tps: f64,
    latency_ms: f64,
    cpu_s_per_million: f64,
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let arguments: Vec<u64> = std::env::args().filter_map(|argument| argument.parse().ok()).collect();
    let (rounds, seconds) = (arguments.first().copied().unwrap_or(3), arguments.get(1).copied().unwrap_or(4));
    if let Err(problem) = runtime.block_on(bench(rounds, seconds)) {
        eprintln!("bench-proxy: {problem}");
        std::process::exit(3);
    }
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn bench(rounds: u64, seconds: u64) -> Result<(), String> {
    let folder = PathBuf::from("target/bench");
    fs::create_dir_all(&folder).map_err(|error| error.to_string())?;
    let server = Server::start(15, Options::default()).await.map_err(|error| error.to_string())?;
    server.create_database("bench").await.map_err(|error| error.to_string())?;
    let password = server.app_password().expose().to_owned();
    pgbench(server.port(), &password, &["-i", "-q", "-s", SCALE])?;
    let mut targets = vec![Target { name: "direct", port: server.port(), pid: None }];
    let understudy = start_understudy(&server, &folder)?;
    targets.push(Target { name: "understudy", port: understudy.1, pid: Some(understudy.0.0.id()) });
    let bouncer = start_pgbouncer(&server, &password)?;
    match &bouncer {
        Some((child, port, _)) => targets.push(Target { name: "pgbouncer", port: *port, pid: Some(child.0.id()) }),
        None => println!("pgbouncer is not installed (apt-get install pgbouncer): left out"),
    }
    let mut results: Vec<(String, u32, &str, Vec<Run>)> = Vec::new();
    for _ in 0..rounds {
        for mode in MODES {
            for clients in CLIENTS {
                for target in &targets {
                    let run = one(target, &password, mode, clients, seconds)?;
                    match results.iter_mut().find(|(m, c, n, _)| m == mode && *c == clients && *n == target.name) {
                        Some((.., runs)) => runs.push(run),
                        None => results.push((mode.to_owned(), clients, target.name, vec![run])),
                    }
                }
            }
        }
    }
    println!("{:<10} {:>7} {:<11} {:>9} {:>11} {:>16}", "mode", "clients", "through", "tps", "latency ms", "CPU s/1M queries");
    let mut report = Vec::new();
    for (mode, clients, name, runs) in &results {
        let median = |value: fn(&Run) -> f64| {
            let mut values: Vec<f64> = runs.iter().map(value).collect();
            values.sort_by(f64::total_cmp);
            values.get(values.len() / 2).copied().unwrap_or_default()
        };
        let (tps, latency, cpu) = (median(|run| run.tps), median(|run| run.latency_ms), median(|run| run.cpu_s_per_million));
        println!("{mode:<10} {clients:>7} {name:<11} {tps:>9.0} {latency:>11.3} {cpu:>16.1}");
        report.push(json!({"mode": mode, "clients": clients, "through": name, "tps": tps, "latency_ms": latency, "cpu_s_per_million": cpu, "rounds": runs.len()}));
    }
    fs::write(folder.join("proxy.json"), serde_json::to_string_pretty(&report).unwrap_or_default()).map_err(|error| error.to_string())?;
    Ok(())
}

fn one(target: &Target, password: &str, mode: &str, clients: u32, seconds: u64) -> Result<Run, String> {
    let before = target.pid.map(cpu_seconds).unwrap_or_default();
    let (clients_text, seconds_text) = (clients.to_string(), seconds.to_string());
    let threads = clients.min(2).to_string();
    let output = pgbench(target.port, password, &["-S", "-n", "-M", mode, "-c", &clients_text, "-j", &threads, "-T", &seconds_text])?;
    let number = |prefix: &str| {
        let line = output.lines().find(|line| line.starts_with(prefix))?;
        line.split(['=', ':']).nth(1)?.split_whitespace().next()?.split('/').next()?.parse::<f64>().ok()
    };
    let queries = number("number of transactions actually processed").ok_or("pgbench said nothing that could be read")?;
    let cpu = target.pid.map(cpu_seconds).unwrap_or_default() - before;
    Ok(Run {
        tps: number("tps").unwrap_or_default(),
        latency_ms: number("latency average").unwrap_or_default(),
        cpu_s_per_million: cpu / queries.max(1.0) * 1e6,
    })
}

fn pgbench(port: u16, password: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new("pgbench")
        .args(["-h", "127.0.0.1", "-p", &port.to_string(), "-U", "app"])
        .args(arguments)
        .arg("bench")
        .env("PGPASSWORD", password)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("cannot run pgbench: {error}. scripts/setup installs it"))?;
    if !output.status.success() {
        return Err(format!("pgbench {arguments:?} failed: {}", String::from_utf8_lossy(&output.stderr)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// User and system time of a process, in seconds; /proc/PID/stat counts in hundredths.
fn cpu_seconds(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).unwrap_or_default();
    (ticks(11) + ticks(12)) / 100.0
}

fn free_port() -> Result<u16, String> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").map_err(|error| error.to_string())?;
    listener.local_addr().map(|address| address.port()).map_err(|error| error.to_string())
}

fn start_understudy(server: &Server, folder: &Path) -> Result<(Killed, u16), String> {
    let port = free_port()?;
    let url = server.superuser_url("bench");
    let secret = url.password.as_ref().map(|password| password.expose()).unwrap_or_default();
    let metadata = folder.join("bench.db");
    for suffix in ["", "-wal", "-shm"] {
        let _ = fs::remove_file(format!("{}{suffix}", metadata.display()));
    }
    let config = format!(
        "[proxy]\nlisten = \"127.0.0.1:{port}\"\nmetadata = \"sqlite:{}\"\n[[database]]\nname = \"bench\"\nsource = \"postgres://{}:{secret}@127.0.0.1:{}/bench\"\n",
        metadata.display(),
        url.user,
        server.port()
    );
    let path = folder.join("bench.toml");
    fs::write(&path, config).map_err(|error| error.to_string())?;
    let child = Command::new(env!("CARGO_BIN_EXE_understudy"))
        .args(["run", "--log", "warn", "--config"])
        .arg(&path)
        .stdin(Stdio::null())
        .spawn()
        .map_err(|error| error.to_string())?;
    let child = Killed(child);
    wait_for(port)?;
    Ok((child, port))
}

/// PgBouncer in session mode, if it is installed; as root it needs another user.
fn start_pgbouncer(server: &Server, password: &str) -> Result<Option<(Killed, u16, PathBuf)>, String> {
    let Some(program) = ["/usr/sbin/pgbouncer", "/usr/bin/pgbouncer"].iter().find(|path| Path::new(path).exists()) else { return Ok(None) };
    let port = free_port()?;
    let folder = std::env::temp_dir().join(format!("understudy-bench-{}", std::process::id()));
    fs::create_dir_all(&folder).map_err(|error| error.to_string())?;
    let (ini, users) = (folder.join("pgbouncer.ini"), folder.join("users.txt"));
    fs::write(&users, format!("\"app\" \"{password}\"\n")).map_err(|error| error.to_string())?;
    let text = format!(
        "[databases]\nbench = host=127.0.0.1 port={} dbname=bench\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = scram-sha-256\nauth_file = {}\npool_mode = session\ndefault_pool_size = 40\nlogfile = {}\n",
        server.port(),
        users.display(),
        folder.join("log").display()
    );
    fs::write(&ini, text).map_err(|error| error.to_string())?;
    let _ = Command::new("chmod").args(["-R", "a+rwX"]).arg(&folder).status();
    let child = Command::new("setpriv")
        .args(["--reuid=nobody", "--regid=nogroup", "--clear-groups", program, "-q"])
        .arg(&ini)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| error.to_string())?;
    let child = Killed(child);
    wait_for(port)?;
    Ok(Some((child, port, folder)))
}

fn wait_for(port: u16) -> Result<(), String> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        if std::net::TcpStream::connect(("127.0.0.1", port)).is_ok() {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(50));
    }
    Err(format!("nothing listens on port {port} after 10 s"))
}
