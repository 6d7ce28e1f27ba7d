//! What the feed does against its peers, in one run: catching up with a backlog (a native subscription, and decoding alone as the
//! limit), following live, what it costs the source, and the initial copy (pg_dump | psql, pg_dump -j | pg_restore -j, pgcopydb,
//! a native subscription). Rounds are interleaved, each round in another order; medians are reported.
//!
//! `make bench-feed` runs all of it; `BENCH_ARGS="parts=catchup rounds=1 transactions=20000"` a part of it. Arguments:
//! parts=catchup,live,copy · rounds=3 · scale=10 (pgbench) · transactions=60000 (of the backlog) · tps=2000 · seconds=10 (live) ·
//! rows=1000000 (big table) · tables=200 (many tables). Writes target/bench/feed.json.
//!
//! Source and followers are PostgreSQL 15 (Debian's) on one machine, `fsync` off on both: nobody's figure is the disk's.

#[path = "feed/catchup.rs"]
mod catchup;
#[path = "feed/copy.rs"]
mod copy;
#[path = "feed/live.rs"]
mod live;
#[path = "feed/place.rs"]
mod place;

use serde_json::json;
use std::{collections::BTreeMap, fs};

type Outcome<T> = Result<T, String>;

/// What was asked for on the command line.
pub struct Settings {
    parts: Vec<String>,
    rounds: u64,
    scale: u64,
    transactions: u64,
    tps: u64,
    seconds: u64,
    rows: u64,
    tables: u64,
}

impl Settings {
    fn read(arguments: impl Iterator<Item = String>) -> Outcome<Settings> {
        let mut settings = Settings {
            parts: ["catchup", "live", "copy"].map(str::to_owned).to_vec(),
            rounds: 3,
            scale: 10,
            transactions: 60_000,
            tps: 2_000,
            seconds: 10,
            rows: 1_000_000,
            tables: 200,
        };
        for argument in arguments.filter(|argument| !argument.starts_with("--")) {
            let (name, value) = argument.split_once('=').ok_or_else(|| format!("{argument}: name=value is expected"))?;
            let number = || value.parse::<u64>().map_err(|_| format!("{argument}: a number is expected"));
            match name {
                "parts" => settings.parts = value.split(',').map(str::to_owned).collect(),
                "rounds" => settings.rounds = number()?,
                "scale" => settings.scale = number()?,
                "transactions" => settings.transactions = number()?,
                "tps" => settings.tps = number()?,
                "seconds" => settings.seconds = number()?,
                "rows" => settings.rows = number()?,
                "tables" => settings.tables = number()?,
                _ => return Err(format!("{argument}: not an argument of this benchmark")),
            }
        }
        Ok(settings)
    }

    fn has(&self, part: &str) -> bool {
        self.parts.iter().any(|name| name == part)
    }
}

/// Figures by part, then by method, then by measure: one value per round.
#[derive(Default)]
pub struct Figures(BTreeMap<(String, String), BTreeMap<&'static str, Vec<f64>>>);

impl Figures {
    fn add(&mut self, part: &str, method: &str, measure: &'static str, value: f64) {
        self.0.entry((part.to_owned(), method.to_owned())).or_default().entry(measure).or_default().push(value);
        println!("  {part:<22} {method:<26} {measure:<22} {value:>12.2}");
    }

    fn report(&self) -> serde_json::Value {
        println!("\n{:<22} {:<26} {:<22} {:>12} {:>12} {:>12}", "part", "method", "measure", "median", "min", "max");
        let mut rows = Vec::new();
        for ((part, method), measures) in &self.0 {
            for (measure, values) in measures {
                let mut sorted = values.clone();
                sorted.sort_by(f64::total_cmp);
                let (Some(min), Some(max)) = (sorted.first(), sorted.last()) else { continue };
                let median = sorted.get(sorted.len() / 2).copied().unwrap_or_default();
                println!("{part:<22} {method:<26} {measure:<22} {median:>12.2} {min:>12.2} {max:>12.2}");
                rows.push(json!({"part": part, "method": method, "measure": measure, "median": median, "rounds": values}));
            }
        }
        // What following costs at a given rate, which the machine has room for.
        let medians: BTreeMap<(&str, &str), f64> = self
            .0
            .iter()
            .filter(|((part, _), _)| part.starts_with("live at"))
            .filter_map(|((part, method), measures)| {
                let mut values = measures.get("tps")?.clone();
                values.sort_by(f64::total_cmp);
                Some(((part.as_str(), method.as_str()), *values.get(values.len() / 2)?))
            })
            .collect();
        for ((part, method), tps) in &medians {
            if let Some(alone) = medians.get(&(*part, "no follower")).filter(|_| *method != "no follower") {
                let loss = (1.0 - tps / alone) * 100.0;
                println!("{part:<22} {method:<26} {:<22} {loss:>12.2}", "tps lost, percent");
                rows.push(json!({"part": part, "method": method, "measure": "tps lost, percent", "median": loss, "rounds": []}));
            }
        }
        json!(rows)
    }
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let result = Settings::read(std::env::args().skip(1)).and_then(|settings| runtime.block_on(bench(&settings)));
    if let Err(problem) = result {
        eprintln!("bench-feed: {problem}");
        std::process::exit(3);
    }
}

async fn bench(settings: &Settings) -> Outcome<()> {
    fs::create_dir_all("target/bench").map_err(|error| error.to_string())?;
    let mut figures = Figures::default();
    if settings.has("catchup") || settings.has("live") {
        let place = place::Place::start().await?;
        let pair = catchup::prepare(&place, settings).await?;
        if settings.has("catchup") {
            for round in 0..settings.rounds {
                catchup::round(&place, &pair, settings, round, &mut figures).await?;
            }
        }
        if settings.has("live") {
            for round in 0..settings.rounds {
                live::round(&place, &pair, settings, round, &mut figures).await?;
            }
        }
        catchup::compare(&place).await?;
    }
    if settings.has("copy") {
        let place = place::Place::start().await?;
        copy::prepare(&place, settings).await?;
        for round in 0..settings.rounds {
            copy::round(&place, round, &mut figures).await?;
        }
    }
    let report = figures.report();
    fs::write("target/bench/feed.json", serde_json::to_string_pretty(&report).unwrap_or_default()).map_err(|error| error.to_string())
}
