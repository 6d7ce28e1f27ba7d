//! Two servers, their clients, and a feed of ours between two of their databases.

use super::Outcome;
use arc_swap::ArcSwap;
use std::{
    fs,
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio_postgres::Client;
use understudy::{
    cdc::{Direction, Fault, Feed, FeedSpec, Start},
    config::ServerUrl,
    demo::servers::{Options, Server, find_client},
    lsn::Lsn,
    metadata::Repository,
    schema::Adapter,
};

/// Longest time for anything that is measured.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// Source and target server, and the passwords of both in a file for client programs.
pub struct Place {
    pub source: Server,
    pub target: Server,
    passwords: PathBuf,
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.passwords);
    }
}

/// An error's text with its causes: the driver's own says only "db error".
pub fn text(error: impl std::error::Error) -> String {
    let mut said = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        said.push_str(&format!(": {inner}"));
        cause = inner.source();
    }
    said
}

impl Place {
    pub async fn start() -> Outcome<Place> {
        let options = || {
            Options::default()
                .set("shared_buffers", "512MB")
                .set("max_wal_size", "8GB")
                .set("maintenance_work_mem", "256MB")
                .set("max_replication_slots", "20")
                .set("max_wal_senders", "20")
                .set("max_logical_replication_workers", "12")
                .set("max_worker_processes", "20")
                .set("autovacuum_naptime", "1h")
        };
        let source = Server::start(15, options()).await.map_err(text)?;
        let target = Server::start(15, options()).await.map_err(text)?;
        let passwords = std::env::current_dir().map_err(text)?.join(format!("target/bench/passwords-{}", std::process::id()));
        let lines: Vec<String> = [&source, &target]
            .map(|server| {
                let url = server.superuser_url("postgres");
                let secret = url.password.as_ref().map(|secret| secret.expose().to_owned()).unwrap_or_default();
                format!("127.0.0.1:{}:*:{}:{secret}\n", url.port, url.user)
            })
            .to_vec();
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&passwords).map_err(text)?;
        std::io::Write::write_all(&mut file, lines.concat().as_bytes()).map_err(text)?;
        Ok(Place { source, target, passwords })
    }

    /// A command of the shell with `$S`, `$T` (ports) and the passwords known to libpq.
    pub fn shell(&self, script: &str) -> Command {
        let mut command = Command::new("bash");
        let folder = find_client("pgbench").and_then(|path| path.parent().map(PathBuf::from)).unwrap_or_default();
        let path = format!("{}:{}", folder.display(), std::env::var("PATH").unwrap_or_default());
        command
            .args(["-euo", "pipefail", "-c", script])
            .env("PATH", path)
            .env("PGPASSFILE", &self.passwords)
            .env("PGUSER", Server::SUPERUSER)
            .env("PGHOST", "127.0.0.1")
            .env("S", self.source.port().to_string())
            .env("T", self.target.port().to_string())
            .env("TMP_FOLDER", std::env::temp_dir().join(format!("understudy-bench-feed-{}", std::process::id())))
            .stdin(Stdio::null());
        command
    }

    /// Runs one to its end, off the runtime's threads, and gives its output.
    pub async fn run(&self, script: &str) -> Outcome<String> {
        let mut command = self.shell(script);
        let script = script.to_owned();
        tokio::task::spawn_blocking(move || {
            let output = command.output().map_err(text)?;
            if output.status.success() {
                return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
            }
            let said = String::from_utf8_lossy(&output.stderr);
            let end: String = said.lines().rev().take(12).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n");
            Err(format!("`{script}` failed: {end}"))
        })
        .await
        .map_err(text)?
    }

    /// libpq's words for a database on the source, password included, as a native subscription wants them.
    pub fn source_words(&self, database: &str) -> String {
        let url = self.source.superuser_url(database);
        let secret = url.password.as_ref().map(|secret| secret.expose().to_owned()).unwrap_or_default();
        format!("host=127.0.0.1 port={} user={} password={secret} dbname={database}", url.port, url.user)
    }

    pub async fn on_source(&self, database: &str) -> Outcome<Client> {
        self.source.connect(database).await.map_err(text)
    }

    pub async fn on_target(&self, database: &str) -> Outcome<Client> {
        self.target.connect(database).await.map_err(text)
    }

    /// An empty database on the target, whatever was there.
    pub async fn fresh(&self, database: &str) -> Outcome<()> {
        let client = self.on_target("postgres").await?;
        client.batch_execute(&format!("DROP DATABASE IF EXISTS {database} WITH (FORCE)")).await.map_err(text)?;
        client.batch_execute(&format!("CREATE DATABASE {database}")).await.map_err(text)
    }

    pub fn spec(&self, from: &str, to: &str) -> FeedSpec {
        let url = |server: &Server, database: &str| -> ServerUrl { server.superuser_url(database) };
        FeedSpec {
            database: from.to_owned(),
            shadow: to.to_owned(),
            direction: Direction::Forward,
            from: url(&self.source, from),
            to: url(&self.target, to),
            copy: understudy::config::CopyConfig::default(),
        }
    }
}

pub fn start(spec: &FeedSpec, start: Start) -> Outcome<Feed> {
    let repository = Repository::in_memory().map_err(text)?;
    let adapter = Adapter::new(spec.database.clone(), spec.shadow.clone(), repository.clone(), Arc::new(ArcSwap::from_pointee(0.95)));
    Ok(Feed::start(spec.clone(), start, Arc::new(adapter), repository, Fault::default()))
}

pub async fn streaming(feed: &Feed) -> Outcome<()> {
    let begun = Instant::now();
    while !feed.is_streaming() {
        let state = feed.state().state;
        if state.starts_with("failed") || begun.elapsed() > PATIENCE {
            return Err(format!("the feed does not stream: {state}"));
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(())
}

pub async fn value(client: &Client, sql: &str) -> Outcome<String> {
    let row = client.query_one(&format!("SELECT ({sql})::text"), &[]).await.map_err(text)?;
    Ok(row.get::<_, Option<String>>(0).unwrap_or_default())
}

/// Waits until a query says `t`.
pub async fn until(client: &Client, what: &str, sql: &str) -> Outcome<()> {
    let begun = Instant::now();
    while value(client, sql).await? != "true" {
        if begun.elapsed() > PATIENCE {
            return Err(format!("{what} did not happen"));
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

pub async fn position(client: &Client) -> Outcome<Lsn> {
    value(client, "pg_current_wal_insert_lsn()").await?.parse().map_err(text)
}
