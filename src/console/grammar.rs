//! The list of all commands: what `SHOW HELP` answers, what a mistyped command is compared with, and what the parser's
//! messages name as expected.

use super::{Answer, command::Topic};

/// One command.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    /// The fixed words at its beginning.
    pub keywords: &'static str,
    /// All of it, in the notation of PostgreSQL's documentation.
    pub usage: &'static str,
    /// What it does, in a line.
    pub what: &'static str,
}

const fn form(keywords: &'static str, usage: &'static str, what: &'static str) -> Form {
    Form { keywords, usage, what }
}

/// All commands, in the order of `SHOW HELP`.
pub const FORMS: &[Form] = &[
    form("SHOW VERSION", "SHOW VERSION", "program version and uptime"),
    form("SHOW CONFIG", "SHOW CONFIG", "settings in force, secrets hidden"),
    form("SHOW DATABASES", "SHOW DATABASES", "each database: owner, clients, requests, errors"),
    form("SHOW SHADOWS", "SHOW SHADOWS", "each shadow: health, feed, lag, shares, comparison, shift"),
    form("SHOW CLIENTS", "SHOW CLIENTS", "client connections, and what keeps a session on the owner"),
    form("SHOW SERVERS", "SHOW SERVERS", "server connections and what the servers are doing"),
    form("SHOW POOLS", "SHOW POOLS", "server connections per database and user"),
    form("SHOW STATS", "SHOW STATS", "requests, transactions, bytes and errors since the start"),
    form("SHOW ROUTES", "SHOW ROUTES", "where statements go, and the shares in force"),
    form("SHOW LATENCY", "SHOW LATENCY", "latency of source and shadow, side by side"),
    form("SHOW LATENCY BY QUERY", "SHOW LATENCY BY QUERY", "the same per statement, costliest first"),
    form("SHOW MISMATCHES", "SHOW MISMATCHES", "reads whose answers differ, and why others are undecided"),
    form("SHOW FEED", "SHOW FEED", "copy progress, positions, lag, findings"),
    form("SHOW SCHEMA", "SHOW SCHEMA", "tables of both sides"),
    form("SHOW DRIFT", "SHOW DRIFT", "differences between the schemas"),
    form("SHOW SCHEMA VERSIONS", "SHOW SCHEMA VERSIONS", "stored versions of both schemas, with their place in the stream"),
    form("SHOW SCHEMA DIFF", "SHOW SCHEMA DIFF <version> <version>", "what differs between two stored versions"),
    form("SHOW MAPPING", "SHOW MAPPING", "where tables and columns are on a shadow whose schema differs, and what a way back loses"),
    form("SHOW PROPOSALS", "SHOW PROPOSALS", "schema adaptations, those that wait for a decision first"),
    form("SHOW EVENTS", "SHOW EVENTS", "what happened, newest first"),
    form("SHOW ALERTS", "SHOW ALERTS", "events that want a person"),
    form("SHOW CUTOVER", "SHOW CUTOVER", "the newest cutover or rollback, step by step"),
    form("SHOW LEFTOVERS", "SHOW LEFTOVERS", "slots, publications, triggers and schemas of ours on the servers, and which are in use"),
    form(
        "SHOW PROFILE",
        "SHOW PROFILE",
        "each statement on both sides: errors, answers, latency, whether it is slower beyond chance, and why",
    ),
    form(
        "SHOW FORECAST",
        "SHOW FORECAST",
        "latency and load of each shadow at the next step and at 100 %, and how true earlier forecasts were",
    ),
    form("SHOW RESOURCES", "SHOW RESOURCES", "what the servers were doing: the newest samples that are kept"),
    form("SHOW REPORT", "SHOW REPORT", "the newest readiness report of each shadow: go or no-go, and why"),
    form("SHOW WHAT IF", "SHOW WHAT IF", "the shadows of a source beside each other: latency, load, indexes, settings"),
    form("SHOW HELP", "SHOW HELP", "this list"),
    form("SET", "SET <shadow> <knob> = <value>", "change a setting until the next RELOAD, such as sample_reads or shift.hold"),
    form("RELOAD", "RELOAD", "read proxy.toml again; a wrong file is refused whole"),
    form("PAUSE", "PAUSE [<database>]", "let clients wait before their next transaction"),
    form("RESUME", "RESUME [<database>]", "let them go on"),
    form("RECONNECT", "RECONNECT [<database>]", "open every session's server connection anew, between two transactions"),
    form("APPROVE", "APPROVE <id> [AS '<sql>']", "apply a proposal, as suggested or with other statements"),
    form("REJECT", "REJECT <id>", "decline a proposal"),
    form(
        "SIMULATE CUTOVER",
        "SIMULATE CUTOVER <shadow> [AT <percent>] [FOR '<time>']",
        "serve some reads from the shadow for a while, and report",
    ),
    form("SHIFT START", "SHIFT START <shadow>", "raise the served share step by step"),
    form("SHIFT STOP", "SHIFT STOP <shadow>", "stop raising it and keep the share reached"),
    form("REVERT", "REVERT <shadow>", "serve nothing from the shadow any more, at once"),
    form("CUTOVER", "CUTOVER <shadow> [DRY RUN]", "make the shadow the owner of the writes, or only say what would be done"),
    form("ROLLBACK", "ROLLBACK <database> [ACCEPT LOSS]", "make the old source the owner again, without losing a row"),
    form("VERIFY", "VERIFY <shadow> [TABLE <table>] [REPAIR]", "compare the rows of both sides, live; REPAIR writes the owner's rows"),
    form("SHADOW START", "SHADOW START <shadow>", "copy schema and rows to the shadow and keep it in step"),
    form(
        "SHADOW RESYNC",
        "SHADOW RESYNC <shadow>",
        "a feed that lost its slot or its owner: compare both sides, write what differs, go on",
    ),
    form("SHADOW STOP", "SHADOW STOP <shadow>", "stop the feed and remove slot, publication and triggers"),
    form("REMOVE LEFTOVERS", "REMOVE LEFTOVERS <database>", "take away what feeds that are not started left on its servers"),
    form("SHUTDOWN", "SHUTDOWN", "end the process in good order"),
];

/// The words after SHOW and what they name.
pub(super) const TOPICS: &[(&str, Topic)] = &[
    ("VERSION", Topic::Version),
    ("CONFIG", Topic::Config),
    ("DATABASES", Topic::Databases),
    ("SHADOWS", Topic::Shadows),
    ("CLIENTS", Topic::Clients),
    ("SERVERS", Topic::Servers),
    ("POOLS", Topic::Pools),
    ("STATS", Topic::Stats),
    ("ROUTES", Topic::Routes),
    ("LATENCY", Topic::Latency),
    ("LATENCY BY QUERY", Topic::LatencyByQuery),
    ("MISMATCHES", Topic::Mismatches),
    ("FEED", Topic::Feed),
    ("SCHEMA", Topic::Schema),
    ("DRIFT", Topic::Drift),
    ("PROPOSALS", Topic::Proposals),
    ("EVENTS", Topic::Events),
    ("ALERTS", Topic::Alerts),
    ("CUTOVER", Topic::Cutover),
    ("MAPPING", Topic::Mapping),
    ("SCHEMA VERSIONS", Topic::SchemaVersions),
    ("LEFTOVERS", Topic::Leftovers),
    ("PROFILE", Topic::Profile),
    ("FORECAST", Topic::Forecast),
    ("RESOURCES", Topic::Resources),
    ("REPORT", Topic::Report),
    ("WHAT IF", Topic::WhatIf),
    ("HELP", Topic::Help),
];

/// The answer to `SHOW HELP`.
pub fn help() -> Answer {
    Answer {
        columns: vec!["command".into(), "what it does".into()],
        rows: FORMS.iter().map(|form| vec![form.usage.into(), form.what.into()]).collect(),
        tag: "SHOW".into(),
        notices: vec!["words may be written in any case; names in double quotes, values and SQL in single quotes or $$…$$".into()],
    }
}

/// The command that `words` (upper case) resemble most, if any is near enough to be meant: first as a whole, then by its
/// first words alone, because names and values follow them.
pub(super) fn nearest(words: &[String]) -> Option<&'static Form> {
    near(words, usize::MAX).or_else(|| (1..=3).rev().find_map(|count| near(words, count)))
}

/// Compares the first `count` words with all commands.
fn near(words: &[String], count: usize) -> Option<&'static Form> {
    let typed = words.get(..count.min(words.len())).unwrap_or_default().join(" ");
    let candidates = FORMS.iter().flat_map(|form| {
        // `SHADOWS` for `SHOW SHADOWS`
        let spellings = [Some(form.keywords), form.keywords.strip_prefix("SHOW ")];
        spellings.into_iter().flatten().map(move |spelling| (spelling, form))
    });
    candidates
        .map(|(spelling, form)| (distance(&typed, spelling), spelling.len(), form))
        .filter(|(found, length, _)| *found <= (length / 3).clamp(1, 4))
        // among equals the full spelling: `CUTOVR` is CUTOVER rather than SHOW CUTOVER
        .min_by_key(|(found, length, form)| (*found, *length != form.keywords.len()))
        .map(|(.., form)| form)
}

/// Levenshtein's distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    // Words of commands are short; a long input is no command anyway.
    for (i, ca) in a.chars().take(60).enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (cell, cb) in row.iter_mut().skip(1).zip(&b) {
            let cost = (*cell + 1).min(left + 1).min(diagonal + usize::from(ca != *cb));
            diagonal = std::mem::replace(cell, cost);
            left = cost;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        for (a, b, expected) in [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("SHOW", "SHW", 1)] {
            assert_eq!(distance(a, b), expected, "{a} {b}");
        }
    }

    #[test]
    fn help_lists_every_topic() {
        for (topic, _) in TOPICS {
            assert!(FORMS.iter().any(|form| form.usage == format!("SHOW {topic}")), "{topic}");
        }
        assert_eq!(help().rows.len(), FORMS.len());
    }

    #[test]
    fn nearest_commands() {
        for (typed, expected) in [
            ("SHOW SHADOW", Some("SHOW SHADOWS")),
            ("SHW SHADOWS", Some("SHOW SHADOWS")),
            ("SHADOWS", Some("SHOW SHADOWS")),
            ("SHOW MISMATCH", Some("SHOW MISMATCHES")),
            ("SHOW LATENCY BY QUERIES", Some("SHOW LATENCY BY QUERY")),
            ("SHOW LATENCY PER QUERY", Some("SHOW LATENCY BY QUERY")),
            ("CUTOVR PG18", Some("CUTOVER")),
            ("CUTOVER PG18 DRYRUN", Some("CUTOVER")),
            ("APROVE 3", Some("APPROVE")),
            ("SIMULATE CUTOFF PG18", Some("SIMULATE CUTOVER")),
            ("SHADOW STRT PG18", Some("SHADOW START")),
            ("ROLBACK SHOP", Some("ROLLBACK")),
            ("HELP", Some("SHOW HELP")),
            ("XYZZY", None),
            ("", None),
        ] {
            let words: Vec<String> = typed.split_whitespace().map(str::to_owned).collect();
            assert_eq!(nearest(&words).map(|form| form.keywords), expected, "{typed}");
        }
    }
}
