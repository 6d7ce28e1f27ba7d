//! The verdicts for type changes are data (`src/schema/rules/type_changes.csv`). Here real servers of major 15 and 18 are asked again.
//!
//! After a change of the probe or its samples `UNDERSTUDY_WRITE_TYPE_CHANGES=1` writes the file anew from what 15 says.

#[path = "support/schema_servers.rs"]
mod servers;

use servers::Server;
use std::{collections::BTreeMap, fmt::Write};
use tokio_postgres::SimpleQueryMessage;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/schema/rules/type_changes.csv");
/// What majors after 15 do differently: casts between bytea and integers came with 18. A lookup that does not know them asks a person once more.
const SINCE_18: [(&str, &str); 4] = [("bytea", "smallint"), ("bytea", "integer"), ("bytea", "bigint"), ("bytea", "pos")];

type Pair = (String, String);

fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

fn samples() -> Vec<(String, Vec<String>)> {
    let lines = include_str!("schema_types/samples.csv").lines().skip(1);
    lines.map(|line| line.split_once(';').unwrap()).map(|(name, values)| (name.into(), serde_json::from_str(values).unwrap())).collect()
}

fn recorded() -> BTreeMap<Pair, String> {
    let text = std::fs::read_to_string(FILE).unwrap();
    let mut lines = text.lines().filter(|line| !line.starts_with('#'));
    let header: Vec<&str> = lines.next().unwrap().split(';').skip(1).collect();
    let mut table = BTreeMap::new();
    for line in lines {
        let (old, cells) = line.split_once(';').unwrap();
        let cells = header.iter().zip(cells.split(';')).filter(|(_, cell)| *cell != ".");
        table.extend(cells.map(|(new, cell)| ((old.to_owned(), (*new).to_owned()), cell.to_owned())));
    }
    table
}

/// What a server of that major says about the pairs.
async fn asked(major: u32) -> BTreeMap<Pair, String> {
    let server = Server::start(major);
    let client = server.connect("postgres").await;
    client
        .batch_execute(
            "CREATE EXTENSION hstore; CREATE EXTENSION citext; CREATE TYPE e1 AS ENUM ('a', 'b'); CREATE TYPE e2 AS ENUM ('b', 'c');
             CREATE DOMAIN pos AS int CHECK (VALUE > 0); SET TimeZone = 'Europe/Berlin'; SET client_min_messages = error",
        )
        .await
        .unwrap();
    client.batch_execute(include_str!("schema_types/probe.sql")).await.unwrap();
    let samples = samples();
    let pairs = samples.iter().flat_map(|(old, values)| samples.iter().map(move |(new, _)| (old, new, values)));
    let mut verdicts = BTreeMap::new();
    for (old, new, values) in pairs.filter(|(old, new, _)| old != new) {
        let values = values.iter().map(|value| literal(value)).collect::<Vec<_>>().join(", ");
        let query = format!("SELECT probe({}, {}, ARRAY[{values}])", literal(old), literal(new));
        let answer = client.simple_query(&query).await.unwrap_or_else(|error| panic!("{old} to {new}: {error:?}"));
        let verdict = answer.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
            _ => None,
        });
        verdicts.insert((old.clone(), new.clone()), verdict.unwrap());
    }
    verdicts
}

fn write(verdicts: &BTreeMap<Pair, String>) {
    let old = std::fs::read_to_string(FILE).unwrap();
    let mut text = old.lines().take_while(|line| line.starts_with('#')).fold(String::new(), |text, line| text + line + "\n");
    let names: Vec<String> = samples().into_iter().map(|(name, _)| name).collect();
    writeln!(text, "old\\new;{}", names.join(";")).unwrap();
    for from in &names {
        let cells: Vec<&str> = names.iter().map(|to| verdicts.get(&(from.clone(), to.clone())).map_or(".", String::as_str)).collect();
        writeln!(text, "{from};{}", cells.join(";")).unwrap();
    }
    std::fs::write(FILE, text).unwrap();
}

#[tokio::test]
async fn the_verdicts_for_type_changes_are_what_servers_of_major_15_and_18_say() {
    let (on_15, on_18) = tokio::join!(asked(15), asked(18));
    if std::env::var_os("UNDERSTUDY_WRITE_TYPE_CHANGES").is_some() {
        write(&on_15);
    }
    let recorded = recorded();
    assert_eq!(recorded.len(), 1482);
    let mut wrong = Vec::new();
    for (major, verdicts) in [(15, on_15), (18, on_18)] {
        assert_eq!(verdicts.len(), 1482);
        for ((old, new), verdict) in verdicts {
            let recorded = &recorded[&(old.clone(), new.clone())];
            let new_cast = major > 15 && SINCE_18.contains(&(old.as_str(), new.as_str()));
            if *recorded != verdict && !new_cast {
                wrong.push(format!("{major}: {old} to {new} is {verdict}, recorded {recorded}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
