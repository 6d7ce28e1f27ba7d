//! What the proxy costs, beside what it replaces, on one PostgreSQL in one run: direct, haproxy (tcp), PgBouncer (session and
//! transaction) and understudy; pgbench -S in three modes, a shadow in five states, large results and COPY, idle connections.
//! Rounds are interleaved and medians reported, because a small machine is never the same twice.
//!
//! `make bench-proxy` runs it; arguments are words: `rounds=3 seconds=4 clients=1,8,32 modes=simple,extended,prepared
//! parts=pgbench,shadow,bulk,idle idle=1000 pooled_idle=5000` (idle clients in session and in transaction mode). Two plain
//! numbers are rounds and seconds. Prints tables, writes target/bench/proxy.json. CPU seconds per million queries (user and
//! system, from /proc) tell more than throughput where pgbench and PostgreSQL share the cores with what is measured.

mod load;
mod programs;

use load::Run;
use programs::{Fleet, Programs};
use serde_json::{Value, json};
use std::{fs, path::PathBuf, time::Duration};
use understudy::demo::servers::{Options, Server};

/// What to run.
struct Plan {
    rounds: usize,
    seconds: u64,
    clients: Vec<u32>,
    modes: Vec<String>,
    parts: Vec<String>,
    idle: usize,
    pooled_idle: usize,
}

impl Plan {
    fn from_arguments(arguments: impl Iterator<Item = String>) -> Result<Plan, String> {
        let list = |text: &str| text.split(',').map(str::to_owned).collect::<Vec<_>>();
        let mut plan = Plan {
            rounds: 3,
            seconds: 4,
            clients: vec![1, 8, 32],
            modes: list("simple,extended,prepared"),
            parts: list("pgbench,shadow,bulk,idle"),
            idle: 1000,
            pooled_idle: 5000,
        };
        let mut plain = 0;
        for argument in arguments.filter(|argument| !argument.starts_with("--")) {
            let wrong = |_| format!("{argument}: not a number");
            match argument.split_once('=') {
                Some(("rounds", value)) => plan.rounds = value.parse().map_err(wrong)?,
                Some(("seconds", value)) => plan.seconds = value.parse().map_err(wrong)?,
                Some(("idle", value)) => plan.idle = value.parse().map_err(wrong)?,
                Some(("pooled_idle", value)) => plan.pooled_idle = value.parse().map_err(wrong)?,
                Some(("clients", value)) => {
                    plan.clients = list(value).iter().map(|n| n.parse().map_err(wrong)).collect::<Result<_, _>>()?
                }
                Some(("modes", value)) => plan.modes = list(value),
                Some(("parts", value)) => plan.parts = list(value),
                None if plain == 0 => (plan.rounds, plain) = (argument.parse().map_err(wrong)?, 1),
                None if plain == 1 => (plan.seconds, plain) = (argument.parse().map_err(wrong)?, 2),
                _ => return Err(format!("{argument}: not understood; see the first lines of benches/proxy/main.rs")),
            }
        }
        Ok(plan)
    }

    fn wants(&self, part: &str) -> bool {
        self.parts.iter().any(|wanted| wanted == part)
    }
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let result = Plan::from_arguments(std::env::args().skip(1)).and_then(|plan| runtime.block_on(bench(&plan)));
    if let Err(problem) = result {
        eprintln!("bench-proxy: {problem}");
        std::process::exit(3);
    }
}

async fn bench(plan: &Plan) -> Result<(), String> {
    let folder = PathBuf::from("target/bench");
    fs::create_dir_all(&folder).map_err(|error| error.to_string())?;
    let text = |error: &dyn std::fmt::Display| error.to_string();
    // every idle client of a session-mode proxy has a server process of its own
    let connections = (plan.idle + 100).to_string();
    let options = Options::default().set("max_connections", if plan.wants("idle") { &connections } else { "200" });
    let server = Server::start(15, options).await.map_err(|error| text(&error))?;
    server.create_database("bench").await.map_err(|error| text(&error))?;
    let password = server.app_password().expose().to_owned();
    load::prepare(&server, &password).await?;
    let programs = Programs { server: &server, password: &password, folder: &folder };
    let mut report = serde_json::Map::new();
    if plan.wants("pgbench") {
        let fleet = programs.everyone()?;
        report.insert("pgbench".into(), pgbench(plan, &fleet, &password)?);
    }
    if plan.wants("shadow") {
        report.insert("shadow".into(), shadow(plan, &programs).await?);
    }
    if plan.wants("bulk") {
        let fleet = programs.everyone()?;
        report.insert("bulk".into(), bulk(plan, &fleet, &server).await?);
    }
    if plan.wants("idle") {
        report.insert("idle".into(), idle(plan, &programs).await?);
    }
    let path = folder.join("proxy.json");
    fs::write(&path, serde_json::to_string_pretty(&Value::Object(report)).unwrap_or_default()).map_err(|error| error.to_string())?;
    println!("\nwritten: {}", path.display());
    Ok(())
}

/// Measurements of one kind, in the order in which they first came.
#[derive(Default)]
struct Table(Vec<(Vec<String>, Vec<Run>)>);

impl Table {
    fn add(&mut self, key: &[&str], run: Run) {
        match self.0.iter_mut().find(|(known, _)| known == key) {
            Some((_, runs)) => runs.push(run),
            None => self.0.push((key.iter().map(|&part| part.to_owned()).collect(), vec![run])),
        }
    }

    /// Prints the medians and returns them.
    fn finish(self, title: &str) -> Value {
        println!("\n{title}");
        println!("{:<44} {:>8} {:>8} {:>8} {:>14} {:>8}", "", "tps", "p50 µs", "p99 µs", "CPU s/million", "RSS MB");
        let rows = self.0.into_iter().map(|(key, runs)| {
            let median = |value: fn(&Run) -> f64| load::median(runs.iter().map(value).collect());
            let (tps, p50, p99) = (median(|run| run.tps), median(|run| run.p50_us), median(|run| run.p99_us));
            let (cpu, rss) = (median(|run| run.cpu_s_per_million), median(|run| run.rss_bytes));
            println!("{:<44} {tps:>8.0} {p50:>8.0} {p99:>8.0} {cpu:>14.2} {:>8.1}", key.join(" · "), rss / 1e6);
            json!({"of": key, "tps": tps, "p50_us": p50, "p99_us": p99, "cpu_s_per_million": cpu, "rss_bytes": rss, "rounds": runs.len()})
        });
        Value::Array(rows.collect())
    }
}

fn pgbench(plan: &Plan, fleet: &Fleet, password: &str) -> Result<Value, String> {
    let mut table = Table::default();
    for _ in 0..plan.rounds {
        for mode in &plan.modes {
            for &clients in &plan.clients {
                for target in &fleet.targets {
                    if target.transactions && mode == "prepared" && !target.prepares {
                        continue; // PgBouncer 1.18 cannot
                    }
                    let run = load::pgbench(target, password, mode, clients, plan.seconds)?;
                    table.add(&[mode, &format!("{clients} clients"), target.name], run);
                }
            }
        }
    }
    Ok(table.finish("pgbench -S"))
}

/// Reads of clients while everything is copied for a shadow in five states.
async fn shadow(plan: &Plan, programs: &Programs<'_>) -> Result<Value, String> {
    let follower = Server::start_like(programs.server, 15, Options::default()).await.map_err(|error| error.to_string())?;
    follower.create_database("bench").await.map_err(|error| error.to_string())?;
    let proxy = programs.understudy(Some(&follower))?;
    let target = proxy.target("understudy");
    proxy.tell("SHADOW START other").await?;
    proxy.until_in_step().await?;
    let mut table = Table::default();
    for round in 0..plan.rounds {
        for (state, percent) in
            [("sampling off", 0), ("sampling 10 %", 10), ("sampling 100 %", 100), ("stopped, 100 %", 100), ("dead, 100 %", 100)]
        {
            proxy.tell(&format!("SET other sample_reads = {percent}")).await?;
            let outcome = match state {
                "stopped, 100 %" => follower.pause(),
                "dead, 100 %" => follower.kill9(),
                _ => Ok(()),
            };
            outcome.map_err(|error| error.to_string())?;
            let run = load::pgbench(&target, programs.password, "simple", 8, plan.seconds);
            let outcome = match state {
                "stopped, 100 %" => follower.resume(),
                "dead, 100 %" if round + 1 < plan.rounds => follower.restart(),
                _ => Ok(()),
            };
            outcome.map_err(|error| error.to_string())?;
            table.add(&["8 clients", state], run?);
            if !(state == "dead, 100 %" && round + 1 == plan.rounds) {
                proxy.until_in_step().await?;
            }
        }
    }
    Ok(table.finish("pgbench -S through understudy, by what the shadow does"))
}

/// Bytes per second of what is large.
async fn bulk(plan: &Plan, fleet: &Fleet, server: &Server) -> Result<Value, String> {
    let mut figures: Vec<(&str, &str, Vec<f64>)> = Vec::new();
    for _ in 0..plan.rounds {
        for (what, kind) in [("rows of a SELECT", load::Bulk::Select), ("COPY TO", load::Bulk::CopyOut), ("COPY FROM", load::Bulk::CopyIn)]
        {
            for target in &fleet.targets {
                let rate = load::bulk(target, server, kind).await?;
                match figures.iter_mut().find(|(known, name, _)| *known == what && *name == target.name) {
                    Some((.., rates)) => rates.push(rate),
                    None => figures.push((what, target.name, vec![rate])),
                }
            }
        }
    }
    println!("\nlarge answers and COPY, MB per second");
    let rows = figures.into_iter().map(|(what, name, rates)| {
        let rate = load::median(rates);
        println!("{:<44} {:>8.0}", format!("{what} · {name}"), rate / 1e6);
        json!({"of": [what, name], "bytes_per_s": rate})
    });
    Ok(Value::Array(rows.collect()))
}

/// Resident bytes per idle client. One program after the other: in session mode each client has a process of the server.
async fn idle(plan: &Plan, programs: &Programs<'_>) -> Result<Value, String> {
    println!("\nidle clients: resident bytes each");
    let mut rows = Vec::new();
    for (mode, clients) in [("session", plan.idle), ("transaction", plan.pooled_idle)] {
        for name in ["pgbouncer", "understudy"] {
            let Some(running) = programs.one(name, mode, clients)? else { continue };
            let bytes = load::idle(&running.target("idle"), programs.server, clients).await?;
            println!("{:<44} {bytes:>8.0}", format!("{name} {mode} · {clients} clients"));
            rows.push(json!({"of": [name, mode], "clients": clients, "bytes_per_client": bytes}));
            drop(running);
            tokio::time::sleep(Duration::from_secs(2)).await; // the server's processes end
        }
    }
    Ok(Value::Array(rows))
}
