//! From facts to findings. Pure.

use super::{
    Book,
    Severity::{Blocker, Info, Warning},
    facts::ServerFacts,
};
use crate::config::FeedKind;
use std::path::PathBuf;

/// Versions whose logical decoding the feed is tested with.
const SOURCE_MAJORS: std::ops::RangeInclusive<u32> = 13..=18;
/// Names listed in one message.
const NAMES_MAX: usize = 10;
/// A writing transaction open for longer than that is no ordinary one: the copy would wait for it.
const TRANSACTION_SECONDS_MAX: f64 = 60.0;
/// A shorter `wal_sender_timeout` ends the feed's connection on a short pause of the network or of the shadow.
const SENDER_TIMEOUT_MS_MIN: i64 = 10_000;
/// Connections that a feed, its copy and a verification open on each server.
const CONNECTIONS_NEEDED: i64 = 10;

fn list(names: &[String]) -> String {
    let shown = names.iter().take(NAMES_MAX).map(String::as_str).collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(NAMES_MAX) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

fn size(bytes: i64) -> String {
    let (mut value, mut unit) = (bytes as f64, "bytes");
    for next in ["kB", "MB", "GB", "TB"] {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    if unit == "bytes" { format!("{bytes} bytes") } else { format!("{value:.1} {unit}") }
}

/// The source, for `feeds` shadows that are fed from it.
pub(super) fn source(book: &mut Book, source: &ServerFacts, feeds: usize) {
    let sequences = source.sequences;
    let contents = format!("PostgreSQL {}, {}, {} tables, {sequences} sequences", source.major(), size(source.bytes), source.tables.len());
    book.add(Info, "source", contents, "");
    if source.in_recovery {
        book.add(Blocker, "source", "the url points at a standby", "use the primary's address: writes go there, and slots are made there");
    }
    if source.setting("standard_conforming_strings") == "off" {
        let remedy = "set standard_conforming_strings = on (the default since 9.1)";
        book.add(Warning, "standard_conforming_strings", "is off: statements with backslashes in literals stay on the source", remedy);
    }
    if feeds > 0 {
        source_of_feeds(book, source, feeds);
    }
    contents_of_source(book, source);
}

fn source_of_feeds(book: &mut Book, source: &ServerFacts, feeds: usize) {
    let major = source.major();
    if major < *SOURCE_MAJORS.start() {
        let message = format!("PostgreSQL {major} is older than {}", SOURCE_MAJORS.start());
        book.add(
            Blocker,
            "version",
            message,
            "feed = \"cdc\" needs PostgreSQL 13 or newer at the source: upgrade it, or set feed = \"none\"",
        );
    } else if major > *SOURCE_MAJORS.end() {
        let message = format!("PostgreSQL {major} is newer than what the feed is tested with ({})", SOURCE_MAJORS.end());
        book.add(Warning, "version", message, "rehearse on a copy first");
    }
    wal_level(book, source, "source");
    capacity(book, source, feeds);
    privileges(book, source);
    writers(book, source);
    if !source.slots_inactive.is_empty() {
        let message = format!("replication slots of understudy that nobody reads: {}; they hold back WAL", list(&source.slots_inactive));
        let remedy = "if no feed of yours is merely stopped: SELECT pg_drop_replication_slot('…')";
        book.add(Warning, "leftovers", message, remedy);
    } else if !source.leftovers.is_empty() {
        book.add(Info, "leftovers", format!("made by understudy on the source: {}", list(&source.leftovers)), "");
    }
}

fn wal_level(book: &mut Book, source: &ServerFacts, role: &str) {
    let level = source.setting("wal_level");
    if level != "logical" {
        let remedy = "ALTER SYSTEM SET wal_level = 'logical', then restart that server";
        book.add(Blocker, "wal_level", format!("is {level} on the {role}: changes cannot be decoded"), remedy);
    }
    match source.number("wal_sender_timeout") {
        0 => book.add(Info, "wal_sender_timeout", "is 0: the server never notices a feed that vanished", "set it to 60s"),
        milliseconds if milliseconds < SENDER_TIMEOUT_MS_MIN => {
            let message = format!("is {milliseconds} ms: a short pause of the network ends the feed's connection");
            book.add(Warning, "wal_sender_timeout", message, "ALTER SYSTEM SET wal_sender_timeout = '60s', then SELECT pg_reload_conf()");
        }
        _ => {}
    }
    if source.number("max_slot_wal_keep_size") < 0 {
        let message = "is unlimited: a feed that stands still lets the source's disk fill with WAL";
        let remedy = "watch the feed's lag, or set a limit that leaves room on the disk (a feed beyond it must be copied again)";
        book.add(Info, "max_slot_wal_keep_size", message, remedy);
    }
}

fn capacity(book: &mut Book, source: &ServerFacts, feeds: usize) {
    let ours = source.leftovers.iter().filter(|name| name.starts_with("slot ")).count();
    // A verification opens one more for a moment.
    let needed = feeds.saturating_sub(ours) as i64;
    for (setting, used) in [("max_replication_slots", source.slots_used), ("max_wal_senders", source.senders_used)] {
        let (limit, free) = (source.number(setting), source.number(setting) - used);
        let remedy = format!("ALTER SYSTEM SET {setting} = {}, then restart the source", limit + needed + 1 - free.max(0));
        let message = format!("is {limit}, {used} in use: {needed} more needed for feeds and 1 for verification");
        match free - needed {
            spare if spare < 0 => book.add(Blocker, setting, message, remedy),
            0 => book.add(Warning, setting, message, remedy),
            _ => {}
        }
    }
    connections(book, source, "source");
}

fn connections(book: &mut Book, server: &ServerFacts, role: &str) {
    if server.connections_free < CONNECTIONS_NEEDED {
        let message = format!(
            "{} connections are free on the {role}; copy, feed and verification use up to {CONNECTIONS_NEEDED}",
            server.connections_free
        );
        book.add(Warning, "max_connections", message, "ALTER SYSTEM SET max_connections to a higher value and restart that server");
    }
}

fn privileges(book: &mut Book, source: &ServerFacts) {
    let user = &source.user;
    if !source.superuser && !source.replication {
        let message = format!("role {user} may not replicate");
        book.add(
            Blocker,
            "privilege REPLICATION",
            message,
            format!("ALTER ROLE \"{user}\" REPLICATION (on managed services: grant their replication role)"),
        );
    }
    if source.superuser {
        return;
    }
    if !source.create_in_database {
        let remedy = format!("GRANT CREATE ON DATABASE … TO \"{user}\"");
        book.add(Blocker, "privilege CREATE", format!("role {user} may not create a publication in the source database"), remedy);
    }
    if !source.tables_not_owned.is_empty() {
        let message = format!(
            "role {user} does not own {}: it can neither publish nor set a replica identity on them",
            list(&source.tables_not_owned)
        );
        book.add(Blocker, "table ownership", message, format!("use a superuser, or GRANT the owning role TO \"{user}\""));
    }
    let message =
        format!("role {user} cannot create event triggers: schema changes are noticed a moment later, from the stream and by polling");
    book.add(Warning, "event triggers", message, "use a superuser in the source's url to have them travel in the stream");
}

/// Slot creation waits for every transaction that has written.
fn writers(book: &mut Book, source: &ServerFacts) {
    let long: Vec<String> = source
        .open_transactions
        .iter()
        .filter(|transaction| transaction.seconds > TRANSACTION_SECONDS_MAX)
        .map(|transaction| format!("pid {} ({}, since {:.0} s)", transaction.pid, transaction.state, transaction.seconds))
        .collect();
    if !long.is_empty() {
        let remedy = "let them end, or SELECT pg_terminate_backend(pid): the copy cannot start before";
        book.add(Warning, "open transactions", format!("have written and are still open: {}", list(&long)), remedy);
    }
    let (old, young): (Vec<_>, Vec<_>) = source.prepared_transactions.iter().partition(|(_, seconds)| *seconds > TRANSACTION_SECONDS_MAX);
    for (found, severity) in [(old, Blocker), (young, Warning)] {
        let names: Vec<String> = found.iter().map(|(gid, seconds)| format!("{gid} (since {seconds:.0} s)")).collect();
        if !names.is_empty() {
            let remedy = "COMMIT PREPARED or ROLLBACK PREPARED them: the copy cannot start before";
            book.add(severity, "prepared transactions", format!("are waiting for their end: {}", list(&names)), remedy);
        }
    }
}

fn contents_of_source(book: &mut Book, source: &ServerFacts) {
    let named = [
        (
            &source.tables_without_key,
            Info,
            "tables without a key",
            "get REPLICA IDENTITY FULL when the feed starts (their updates write more WAL, and verification sorts whole rows)",
            "add a primary key where one makes sense",
        ),
        (
            &source.tables_unlogged,
            Warning,
            "unlogged tables",
            "are not in the change stream: their rows stay behind",
            "ALTER TABLE … SET LOGGED if their rows matter",
        ),
        (
            &source.tables_foreign,
            Info,
            "foreign tables",
            "are not copied; reads of them stay on the source",
            "give the shadow its own server and user mapping before a cutover",
        ),
        (
            &source.views_materialized,
            Info,
            "materialized views",
            "are filled from the shadow's own data, not from the source's",
            "REFRESH MATERIALIZED VIEW on the shadow as often as on the source",
        ),
    ];
    for (names, severity, subject, consequence, remedy) in named {
        if !names.is_empty() {
            book.add(severity, subject, format!("{}: {consequence}", list(names)), remedy);
        }
    }
    if source.large_objects {
        let remedy = "move them into bytea columns, or copy them by hand before the cutover (pg_dump --large-objects)";
        book.add(Warning, "large objects", "exist and are not in the change stream", remedy);
    }
    if source.sequences > 0 {
        let message = format!("{} sequences are not in the change stream: the cutover carries their values over", source.sequences);
        book.add(Info, "sequences", message, "");
    }
}

/// A shadow next to its source.
pub(super) fn shadow(book: &mut Book, source: &ServerFacts, shadow: &ServerFacts, feed: FeedKind) {
    book.add(Info, "shadow", format!("PostgreSQL {}, {}, {} tables", shadow.major(), size(shadow.bytes), shadow.tables.len()), "");
    if shadow.identity == source.identity {
        let remedy = "give the shadow's url another server or another database";
        return book.add(Blocker, "url", "source and shadow are one and the same database", remedy);
    }
    if shadow.in_recovery {
        book.add(Blocker, "shadow", "the url points at a standby, which cannot be written to", "use a primary for the shadow");
    }
    if shadow.major() < source.major() {
        let message = format!("PostgreSQL {} is older than the source's {}", shadow.major(), source.major());
        book.add(
            Warning,
            "version",
            message,
            "what the newer version knows (syntax, types, functions) may fail on the shadow: rehearse with mirror_writes",
        );
    }
    environment(book, source, shadow, feed);
    connections(book, shadow, "shadow");
    match feed {
        FeedKind::None => {}
        FeedKind::Mirror => {
            feed_target(book, source, shadow);
            mirrored(book, source);
        }
        FeedKind::Cdc => {
            feed_target(book, source, shadow);
            way_back(book, source, shadow);
        }
    }
}

fn environment(book: &mut Book, source: &ServerFacts, shadow: &ServerFacts, feed: FeedKind) {
    if source.encoding != shadow.encoding {
        let message = format!("the source is {}, the shadow {}", source.encoding, shadow.encoding);
        let severity = if shadow.encoding == "UTF8" { Warning } else { Blocker };
        book.add(
            severity,
            "encoding",
            message,
            format!("create the shadow database with ENCODING '{}' or UTF8 TEMPLATE template0", source.encoding),
        );
    }
    if source.locale != shadow.locale {
        let message =
            format!("the source sorts by {}, the shadow by {}: answers with ORDER BY on text may differ", source.locale, shadow.locale);
        book.add(Warning, "collation", message, "create the shadow database with the source's LC_COLLATE and LC_CTYPE, TEMPLATE template0");
    } else if let (Some(ours), Some(theirs)) = (&source.collation_version, &shadow.collation_version)
        && ours != theirs
    {
        let message = format!("the source's is of version {ours}, the shadow's {theirs}: text may sort differently");
        book.add(Warning, "collation", message, "compare answers (sample_reads) before serving reads; or use ICU collations on both");
    }
    for (name, installed) in &source.extensions {
        let subject = format!("extension {name}");
        let there = shadow.extensions.iter().find(|(other, _)| other == name).map(|(_, version)| version);
        match (there, shadow.extensions_available.get(name)) {
            (None, None) => {
                let severity = if feed == FeedKind::Cdc { Blocker } else { Warning };
                let remedy =
                    format!("install the package that brings {name} on the shadow's server, or DROP EXTENSION {name} on the source");
                book.add(
                    severity,
                    &subject,
                    format!("{name} {installed} is used at the source and not available on the shadow's server"),
                    remedy,
                );
            }
            (Some(version), _) if version != installed => {
                book.add(Info, &subject, format!("{installed} at the source, {version} on the shadow"), "");
            }
            (None, Some(available)) if !shadow.superuser => {
                let message =
                    format!("{available} is available on the shadow and not installed; its role may lack the right to install it");
                book.add(Warning, &subject, message, format!("as a superuser on the shadow: CREATE EXTENSION {name}"));
            }
            _ => {}
        }
    }
    let missing: Vec<String> = source.roles.iter().filter(|role| !shadow.roles.contains(role)).cloned().collect();
    if !missing.is_empty() {
        let message = format!("the shadow lacks {}", list(&missing));
        match feed == FeedKind::Cdc && shadow.create_role {
            true => book.add(Info, "roles", format!("{message}: they are created with the schema"), ""),
            false => book.add(
                Warning,
                "roles",
                message,
                "create them there (pg_dumpall --roles-only): their sessions cannot be served or moved otherwise",
            ),
        }
    }
}

/// What a feed of mirrored writes does not promise, here.
fn mirrored(book: &mut Book, source: &ServerFacts) {
    let message = "feed = \"mirror\" runs each write on the shadow as the client wrote it: what goes around understudy, COPY … FROM STDIN and \
                   two-phase commits never come, and its shadow answers no read and takes no cutover";
    let remedy = if source.setting("wal_level") == "logical" && (source.superuser || source.replication) {
        "this source can be decoded: leave `feed` out (\"cdc\")"
    } else {
        "have every writer go through understudy; VERIFY … REPAIR finds and repairs what came otherwise"
    };
    book.add(Warning, "feed", message, remedy);
    if !source.tables_without_key.is_empty() {
        let message = format!("{}: VERIFY … REPAIR leaves them alone, so that what diverges there stays", list(&source.tables_without_key));
        book.add(Warning, "tables without a key", message, "add a primary key where one makes sense");
    }
    if !source.prepared_transactions.is_empty() {
        let message = "are waiting for their end: the snapshot is taken without them, and their COMMIT PREPARED is not mirrored";
        book.add(Warning, "prepared transactions", message, "COMMIT PREPARED or ROLLBACK PREPARED them before SHADOW START");
    }
}

fn feed_target(book: &mut Book, source: &ServerFacts, shadow: &ServerFacts) {
    if !shadow.may_set_replication_role {
        let message =
            format!("role {} may not set session_replication_role on the shadow: triggers and foreign keys would run twice", shadow.user);
        let remedy = match shadow.major() {
            0..15 => format!("ALTER ROLE \"{}\" SUPERUSER on the shadow", shadow.user),
            _ => format!("as a superuser on the shadow: GRANT SET ON PARAMETER session_replication_role TO \"{}\"", shadow.user),
        };
        book.add(Blocker, "privilege session_replication_role", message, remedy);
    }
    if !shadow.create_in_database {
        let remedy = format!("GRANT CREATE ON DATABASE … TO \"{}\" on the shadow", shadow.user);
        book.add(Blocker, "privilege CREATE", format!("role {} may not create schemas in the shadow database", shadow.user), remedy);
    }
    if shadow.setting("default_transaction_read_only") == "on" && !shadow.filled_by_us {
        book.add(Info, "default_transaction_read_only", "is on at the shadow; the feed's own sessions switch it off", "");
    }
    let known: Vec<String> = shadow.tables.iter().filter(|table| source.tables.contains(table)).cloned().collect();
    match (shadow.filled_by_us, shadow.tables.is_empty(), known.is_empty()) {
        (true, _, _) => book.add(Info, "contents", "filled by understudy before: the feed goes on where it stopped", ""),
        (false, true, _) => {
            let message = format!("the shadow is empty: schema and {} of data are copied when the feed starts", size(source.bytes));
            book.add(Info, "contents", message, "");
        }
        (false, false, false) => {
            let message = format!("the shadow already has tables of the source, and understudy did not make them: {}", list(&known));
            book.add(Blocker, "contents", message, "give the shadow an empty database, or drop these tables there");
        }
        (false, false, true) => {
            let message = format!("the shadow has tables that the source does not have: {}", list(&shadow.tables));
            book.add(Warning, "contents", message, "they are left alone; an empty database keeps them from being in the way");
        }
    }
}

/// After a cutover the changes flow back, so that a rollback loses nothing.
fn way_back(book: &mut Book, source: &ServerFacts, shadow: &ServerFacts) {
    let mut lacking = Vec::new();
    if shadow.setting("wal_level") != "logical" {
        lacking.push("wal_level = logical on the shadow");
    }
    if shadow.number("max_replication_slots") <= shadow.slots_used {
        lacking.push("a free replication slot on the shadow (max_replication_slots)");
    }
    if shadow.number("max_wal_senders") <= shadow.senders_used {
        lacking.push("a free WAL sender on the shadow (max_wal_senders)");
    }
    if !shadow.superuser && !shadow.replication {
        lacking.push("REPLICATION for the role on the shadow");
    }
    if !source.may_set_replication_role {
        lacking.push("the right to set session_replication_role on the source");
    }
    if !lacking.is_empty() {
        let message = format!("a rollback without loss after the cutover needs {}", lacking.join(", "));
        book.add(Warning, "rollback", message, "put it in place before the cutover: the reverse feed cannot be armed otherwise");
    }
}

/// The schema is copied by pg_dump.
pub(super) fn schema_copy(book: &mut Book, found: Result<PathBuf, String>) {
    match found {
        Ok(path) => book.add(Info, "pg_dump", format!("the schema is copied by {}", path.display()), ""),
        Err(reason) => {
            let remedy = "install the source's version of the PostgreSQL client package (Debian: postgresql-client-<major>), or set UNDERSTUDY_PG_DUMP";
            book.add(Blocker, "pg_dump", reason, remedy);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Finding, Severity};
    use super::*;

    fn healthy(major: i32, identity: &str) -> ServerFacts {
        let settings = [
            ("wal_level", "logical"),
            ("max_replication_slots", "10"),
            ("max_wal_senders", "10"),
            ("wal_sender_timeout", "60000"),
            ("max_slot_wal_keep_size", "1024"),
            ("standard_conforming_strings", "on"),
        ];
        ServerFacts {
            version_num: major * 10_000,
            identity: identity.into(),
            superuser: true,
            replication: true,
            create_in_database: true,
            create_role: true,
            may_set_replication_role: true,
            user: "app".into(),
            settings: settings.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
            connections_free: 90,
            encoding: "UTF8".into(),
            locale: "C C".into(),
            ..ServerFacts::default()
        }
    }

    fn judge(change: impl FnOnce(&mut ServerFacts, &mut ServerFacts)) -> Vec<Finding> {
        let (mut a, mut b) = (healthy(15, "a"), healthy(18, "b"));
        change(&mut a, &mut b);
        let mut book = Book { findings: Vec::new(), database: "d".into(), shadow: String::new() };
        source(&mut book, &a, 1);
        shadow(&mut book, &a, &b, FeedKind::Cdc);
        book.findings
    }

    #[test]
    fn a_healthy_pair_has_only_notes() {
        let findings = judge(|_, _| {});
        assert!(findings.iter().all(|finding| finding.severity == Severity::Info), "{findings:#?}");
    }

    #[test]
    fn each_obstacle_is_named_with_a_remedy() {
        type Change = fn(&mut ServerFacts, &mut ServerFacts);
        let table: [(&str, Severity, Change); 27] = [
            ("wal_level", Blocker, |a, _| drop(a.settings.insert("wal_level".into(), "replica".into()))),
            ("version", Blocker, |a, _| a.version_num = 120_000),
            ("version", Warning, |a, _| a.version_num = 190_000),
            ("version", Warning, |_, b| b.version_num = 140_000),
            ("source", Blocker, |a, _| a.in_recovery = true),
            ("shadow", Blocker, |_, b| b.in_recovery = true),
            ("url", Blocker, |a, b| b.identity.clone_from(&a.identity)),
            ("max_replication_slots", Blocker, |a, _| a.slots_used = 10),
            ("max_replication_slots", Warning, |a, _| a.slots_used = 9),
            ("max_wal_senders", Blocker, |a, _| a.senders_used = 10),
            ("wal_sender_timeout", Warning, |a, _| drop(a.settings.insert("wal_sender_timeout".into(), "1000".into()))),
            ("privilege REPLICATION", Blocker, |a, _| (a.superuser, a.replication) = (false, false)),
            ("event triggers", Warning, |a, _| a.superuser = false),
            ("privilege CREATE", Blocker, |a, _| (a.superuser, a.create_in_database) = (false, false)),
            ("table ownership", Blocker, |a, _| {
                a.superuser = false;
                a.tables_not_owned.push("public.t".into())
            }),
            ("privilege session_replication_role", Blocker, |_, b| b.may_set_replication_role = false),
            ("rollback", Warning, |_, b| drop(b.settings.insert("wal_level".into(), "replica".into()))),
            ("open transactions", Warning, |a, _| {
                a.open_transactions.push(super::super::facts::OpenTransaction { pid: 5, seconds: 99.0, state: "idle".into() })
            }),
            ("prepared transactions", Blocker, |a, _| a.prepared_transactions.push(("x".into(), 99.0))),
            ("prepared transactions", Warning, |a, _| a.prepared_transactions.push(("x".into(), 1.0))),
            ("unlogged tables", Warning, |a, _| a.tables_unlogged.push("public.t".into())),
            ("large objects", Warning, |a, _| a.large_objects = true),
            ("extension postgis", Blocker, |a, _| a.extensions.push(("postgis".into(), "3".into()))),
            ("encoding", Blocker, |_, b| b.encoding = "LATIN1".into()),
            ("collation", Warning, |_, b| b.locale = "de de".into()),
            ("contents", Blocker, |a, b| {
                a.tables.push("public.t".into());
                b.tables.push("public.t".into())
            }),
            ("leftovers", Warning, |a, _| a.slots_inactive.push("understudy_x".into())),
        ];
        for (subject, severity, change) in table {
            let findings = judge(change);
            let found = findings.iter().find(|finding| finding.subject == subject && finding.severity == severity);
            assert!(found.is_some_and(|finding| !finding.remedy.is_empty()), "{subject}: {findings:#?}");
        }
    }

    #[test]
    fn long_lists_and_sizes_are_short() {
        let names: Vec<String> = (0..12).map(|number| number.to_string()).collect();
        assert_eq!(list(&names), "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more");
        assert_eq!((size(5), size(3 << 20)), ("5 bytes".to_owned(), "3.0 MB".to_owned()));
    }
}
