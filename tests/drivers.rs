//! Real drivers, unchanged, see the same through the proxy as without it: each runs one programme (types in both formats,
//! prepared statements, pipelines, transactions, errors, COPY, LISTEN, cancel, cursors, large values) and prints what it
//! saw; the two transcripts must be equal.
//!
//! `make test` runs a representative part; `make test-drivers` all of them. `scripts/setup` installs the drivers.

#[path = "proxy/harness.rs"]
mod harness;
mod support;
#[path = "drivers/tokio_postgres.rs"]
mod tokio_postgres_driver;

use harness::{Proxy, database_text};
use std::{
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};
use support::{Options, Server, find_client};
use understudy::config::ServerUrl;

/// A hanging driver fails instead of waiting for ever.
const PROGRAMME_MAX: Duration = Duration::from_secs(120);

/// More than one, since a programme's second client may wait for what its first one has locked.
const POOL: &str = "[proxy.pool]\nsize = 5\n[proxy.auth]\nusers = \"query\"\nrules = [\"host all all 127.0.0.1/32 trust\"]\n";

struct Stage {
    source: Server,
    proxy: Proxy,
}

impl Stage {
    async fn start(name: &str) -> Stage {
        Stage::start_with(name, "", "").await
    }

    /// Clients of the proxy share a few server connections.
    async fn pooled(name: &str) -> Stage {
        Stage::start_with(name, "pool_mode = \"transaction\"", POOL).await
    }

    async fn start_with(name: &str, more_of_proxy: &str, before: &str) -> Stage {
        let source = Server::start(15, Options::default()).await.unwrap();
        source.create_database("shop").await.unwrap();
        let proxy = Proxy::start(name, more_of_proxy, &format!("{before}{}", database_text(&source)));
        Stage { source, proxy }
    }

    fn urls(&self) -> [ServerUrl; 2] {
        let url = self.source.app_url("shop");
        [url.clone(), self.proxy.through(&url)]
    }
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// What `scripts/setup` has installed.
fn installed(path: &str) -> PathBuf {
    let path = root().join(".deps/drivers").join(path);
    assert!(path.exists(), "{} is missing: run `scripts/setup` (all drivers: `scripts/setup drivers`)", path.display());
    path
}

fn with_login(mut command: Command, url: &ServerUrl) -> Command {
    let variables = [("PGHOST", url.host.as_str()), ("PGUSER", &url.user), ("PGDATABASE", &url.dbname)];
    command.envs(variables).env("PGPORT", url.port.to_string()).env("PGPASSWORD", url.password.as_ref().unwrap().expose());
    command.env("LC_ALL", "C.UTF-8").env("PYTHONIOENCODING", "utf-8").env("TZ", "UTC").stdin(Stdio::null());
    command
}

/// Standard output; a failure or a hang is the test's.
async fn transcript(name: &str, command: Command) -> String {
    let mut command = tokio::process::Command::from(command);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let output = tokio::time::timeout(PROGRAMME_MAX, command.output()).await.unwrap_or_else(|_| panic!("{name} hangs")).unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{name}: {}\n{text}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    text
}

/// Runs a programme direct and through the proxy. `lines`: it says at least as much.
async fn alike(stage: &Stage, name: &str, lines: usize, command: impl Fn() -> Command) {
    let mut transcripts = Vec::new();
    for url in stage.urls() {
        let began = std::time::Instant::now();
        transcripts.push(transcript(name, with_login(command(), &url)).await);
        eprintln!("    {name} on port {}: {:.1} s", url.port, began.elapsed().as_secs_f64());
    }
    same(name, lines, &transcripts[0], &transcripts[1]);
}

fn same(name: &str, lines: usize, direct: &str, proxied: &str) {
    assert!(direct.lines().count() >= lines, "{name} says too little:\n{direct}");
    let (mut left, mut right) = (direct.lines(), proxied.lines());
    loop {
        match (left.next(), right.next()) {
            (None, None) => return,
            (one, other) => assert_eq!(one, other, "{name}: direct (left) and through the proxy (right)"),
        }
    }
}

fn python(script: &str) -> Command {
    let mut command = Command::new(installed("python/bin/python"));
    command.arg(root().join("tests/drivers").join(script));
    command
}

fn node(script: &str) -> Command {
    let mut command = Command::new("node");
    command.arg(root().join("tests/drivers").join(script)).env("NODE_PATH", installed("node/node_modules"));
    command
}

fn psql() -> Command {
    let mut command = Command::new(find_client("psql").unwrap());
    command.args(["-X", "-f"]).arg(root().join("tests/drivers/psql.sql"));
    command
}

async fn pgbench(stage: &Stage) {
    for url in stage.urls() {
        let with = |arguments: &[&str]| {
            let mut command = Command::new(find_client("pgbench").unwrap());
            command.args(arguments);
            with_login(command, &url)
        };
        transcript("pgbench", with(&["-i", "-q", "-s", "1"])).await;
        for mode in ["simple", "extended", "prepared"] {
            let text = transcript("pgbench", with(&["-n", "-M", mode, "-c", "4", "-j", "2", "-t", "50"])).await;
            assert!(text.contains("actually processed: 200/200") && !text.contains("failed transactions: 1"), "{mode}: {text}");
        }
        let script = root().join("tests/drivers/pipeline.pgbench");
        let text = transcript("pgbench", with(&["-n", "-M", "prepared", "-c", "4", "-t", "50", "-f", script.to_str().unwrap()])).await;
        assert!(text.contains("actually processed: 200/200"), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn representative_drivers_see_the_same() {
    let stage = Stage::start("drivers").await;
    alike(&stage, "psycopg 3", 60, || python("psycopg3.py")).await;
    alike(&stage, "asyncpg", 40, || python("asyncpg_.py")).await;
    alike(&stage, "node-postgres", 40, || node("node_postgres.cjs")).await;
    alike(&stage, "psql", 60, psql).await;
    pgbench(&stage).await;
}

/// The same with a transaction pool.
#[tokio::test(flavor = "multi_thread")]
async fn representative_drivers_see_the_same_in_a_pool() {
    let stage = Stage::pooled("drivers-pool").await;
    alike(&stage, "psycopg 3", 60, || python("psycopg3.py")).await;
    alike(&stage, "asyncpg", 40, || python("asyncpg_.py")).await;
    alike(&stage, "node-postgres", 40, || node("node_postgres.cjs")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokio_postgres_sees_the_same() {
    let stage = Stage::start("drivers-tokio").await;
    let [direct, proxied] = stage.urls();
    let transcripts = [tokio_postgres_driver::programme(&direct).await, tokio_postgres_driver::programme(&proxied).await];
    same("tokio-postgres", 30, &transcripts[0], &transcripts[1]);
}

/// `make test-drivers`
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs what only `scripts/setup drivers` installs"]
async fn all_other_drivers_see_the_same() {
    for stage in [Stage::start("drivers-all").await, Stage::pooled("drivers-all-pool").await] {
        all_others(&stage).await;
    }
}

async fn all_others(stage: &Stage) {
    alike(stage, "pg8000", 20, || python("pg8000_.py")).await;
    alike(stage, "SQLAlchemy", 10, || python("sqlalchemy_.py")).await;
    alike(stage, "postgres.js", 18, || node("postgres_js.cjs")).await;
    alike(stage, "pgjdbc", 70, || {
        let mut command = Command::new("java");
        command.arg("-cp").arg(installed("java/postgresql.jar")).arg(root().join("tests/drivers/Pgjdbc.java"));
        command
    })
    .await;
}
