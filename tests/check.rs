//! `understudy check` on real servers: a healthy pair, and each obstacle by name.

#[path = "support/pair.rs"]
mod pair;

use pair::Server;
use understudy::{
    cdc::pg_dump,
    check::{Finding, Severity, assess, render},
    config,
};

async fn check(source: &str, shadow: &str) -> Vec<Finding> {
    check_feed(source, shadow, "cdc").await
}

async fn check_feed(source: &str, shadow: &str, feed: &str) -> Vec<Finding> {
    let text = format!(
        "[[database]]\nname = \"shop\"\nsource = \"{source}\"\n[[database.shadow]]\nname = \"next\"\nurl = \"{shadow}\"\nfeed = \"{feed}\"\n"
    );
    assess(&config::parse(&text, "proxy.toml", &|_| None).unwrap()).await
}

fn url(server: &Server, user: &str, database: &str) -> String {
    server.url(user, database).to_string()
}

fn blockers(findings: &[Finding]) -> Vec<(&str, &str)> {
    let blockers = findings.iter().filter(|finding| finding.severity == Severity::Blocker);
    blockers.map(|finding| (finding.shadow.as_str(), finding.subject.as_str())).collect()
}

fn find<'a>(findings: &'a [Finding], subject: &str) -> &'a Finding {
    findings.iter().find(|finding| finding.subject == subject).unwrap_or_else(|| panic!("no finding on {subject}: {findings:#?}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_healthy_pair_is_ready_and_obstacles_are_named() {
    let logical = ["wal_level=logical", "max_prepared_transactions=5"];
    let (source, shadow, poor) = (Server::start(15, &logical), Server::start(18, &logical), Server::start(18, &["wal_level=replica"]));
    source
        .run(
            "postgres",
            "CREATE TABLE keyed (id serial PRIMARY KEY); CREATE TABLE keyless (a int); CREATE UNLOGGED TABLE quick (a int);
             CREATE MATERIALIZED VIEW m AS SELECT 1 AS a; SELECT lo_create(0); CREATE ROLE app LOGIN; CREATE ROLE weak LOGIN;
             CREATE EXTENSION IF NOT EXISTS plpgsql",
        )
        .await;
    let (good, next) = (url(&source, "postgres", "postgres"), url(&shadow, "postgres", "postgres"));

    let findings = check(&good, &next).await;
    assert_eq!(blockers(&findings), [], "{}", render(&findings, false, false));
    assert!(find(&findings, "tables without a key").message.contains("public.keyless:"));
    assert!(find(&findings, "unlogged tables").message.contains("public.quick"));
    assert!(find(&findings, "materialized views").message.contains("public.m"));
    assert_eq!(find(&findings, "large objects").severity, Severity::Warning);
    assert!(find(&findings, "roles").message.contains("app"));
    assert!(find(&findings, "contents").message.contains("empty"));
    assert!(
        !findings.iter().any(|finding| finding.subject == "default_transaction_read_only"),
        "the check's own setting is not the server's"
    );
    assert!(render(&findings, false, false).ends_with(" notes\n"));

    // A source that writes no logical WAL; then a shadow that could not feed back.
    let findings = check(&url(&poor, "postgres", "postgres"), &next).await;
    assert_eq!(blockers(&findings), [("", "wal_level")]);
    assert!(find(&findings, "wal_level").remedy.contains("ALTER SYSTEM"));
    let findings = check(&good, &url(&poor, "postgres", "postgres")).await;
    assert_eq!(blockers(&findings), []);
    assert!(find(&findings, "rollback").message.contains("wal_level"));

    // Mirrored writes need no logical WAL; what they do not promise is said.
    let findings = check_feed(&url(&poor, "postgres", "postgres"), &next, "mirror").await;
    assert_eq!(blockers(&findings), [], "{findings:#?}");
    assert!(find(&findings, "feed").remedy.contains("REPAIR"));
    assert!(find(&check_feed(&good, &next, "mirror").await, "feed").remedy.contains("cdc"));
    assert!(!findings.iter().any(|finding| finding.subject == "rollback"));

    // Roles that lack privileges, on either side.
    shadow.run("postgres", "CREATE ROLE weak LOGIN; GRANT CREATE ON DATABASE postgres TO weak").await;
    let findings = check(&url(&source, "weak", "postgres"), &next).await;
    assert_eq!(blockers(&findings), [("", "privilege REPLICATION"), ("", "privilege CREATE"), ("", "table ownership")], "{findings:#?}");
    let findings = check(&good, &url(&shadow, "weak", "postgres")).await;
    assert_eq!(blockers(&findings), [("next", "privilege session_replication_role")]);
    assert!(find(&findings, "privilege session_replication_role").remedy.contains("GRANT SET ON PARAMETER"));
    shadow.run("postgres", "GRANT SET ON PARAMETER session_replication_role TO weak").await;
    assert_eq!(blockers(&check(&good, &url(&shadow, "weak", "postgres")).await), []);

    shadow.run("postgres", "CREATE DATABASE taken").await;
    shadow.run("taken", "CREATE TABLE keyed (id int)").await;
    let findings = check_feed(&good, &url(&shadow, "postgres", "taken"), "mirror").await;
    assert_eq!(blockers(&findings), [("next", "contents")]);

    // Nobody there; no such database.
    let findings = check(&good, "postgres://app:geheim@127.0.0.1:1/shop").await;
    assert_eq!(blockers(&findings), [("next", "shadow connection")]);
    assert!(!format!("{findings:?}").contains("geheim"));
    let findings = check(&url(&source, "postgres", "nope"), &next).await;
    assert_eq!(blockers(&findings), [("", "source connection")]);
    assert!(find(&findings, "source connection").message.contains("nope"));

    // The same database twice; a shadow with tables of its own making.
    assert_eq!(blockers(&check(&good, &good.replace("127.0.0.1", "localhost")).await), [("next", "url")]);
    shadow.run("postgres", "CREATE DATABASE full_one").await;
    shadow.run("full_one", "CREATE TABLE keyed (id int)").await;
    assert_eq!(blockers(&check(&good, &url(&shadow, "postgres", "full_one")).await), [("next", "contents")]);
    shadow.run("postgres", "CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0").await;
    assert_eq!(blockers(&check(&good, &url(&shadow, "postgres", "latin")).await), [("next", "encoding")]);

    // What makes the copy wait, and what an earlier run left behind.
    source.run("postgres", "SELECT pg_create_logical_replication_slot('understudy_old', 'pgoutput')").await;
    source.run("postgres", "BEGIN; INSERT INTO keyed DEFAULT VALUES; PREPARE TRANSACTION 'half'").await;
    let findings = check(&good, &next).await;
    assert!(find(&findings, "leftovers").message.contains("understudy_old"));
    assert!(find(&findings, "prepared transactions").message.contains("half"));
    source.run("postgres", "ROLLBACK PREPARED 'half'").await;
    source.run("postgres", "SELECT pg_drop_replication_slot('understudy_old')").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_extension_that_the_shadow_lacks_is_a_blocker() {
    let (source, shadow) = (Server::start(15, &["wal_level=logical"]), Server::start(18, &["wal_level=logical"]));
    let client = shadow.client("postgres").await;
    let available: Vec<String> =
        client.query("SELECT name::text FROM pg_available_extensions", &[]).await.unwrap().iter().map(|row| row.get(0)).collect();
    let candidates = client_extensions(&source).await;
    // Debian's server brings the contrib extensions, or at least one that the other lacks; else the catalog is told so.
    match candidates.iter().find(|name| !available.contains(name)) {
        Some(name) => source.run("postgres", &format!("CREATE EXTENSION \"{name}\" CASCADE")).await,
        None => {
            let text = "INSERT INTO pg_extension VALUES (99999, 'far_away', 10, 11, true, '1.0', NULL, NULL)";
            source.run("postgres", &format!("SET allow_system_table_mods = on; {text}")).await;
        }
    }
    let findings = check(&url(&source, "postgres", "postgres"), &url(&shadow, "postgres", "postgres")).await;
    let found = blockers(&findings);
    assert!(
        !found.is_empty() && found.iter().all(|(shadow, subject)| *shadow == "next" && subject.starts_with("extension ")),
        "{findings:#?}"
    );
}

/// Trusted ones without libraries of other packages.
async fn client_extensions(server: &Server) -> Vec<String> {
    let text = "SELECT DISTINCT name::text FROM pg_available_extension_versions WHERE trusted AND requires IS NULL AND name IN ('hstore', 'citext', 'ltree', 'pg_trgm')";
    server.client("postgres").await.query(text, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

#[tokio::test]
async fn pg_dump_is_found_by_version() {
    assert!(pg_dump::find(15).await.is_ok_and(|path| path.is_file()));
    let refusal = pg_dump::find(99).await.unwrap_err();
    assert!(refusal.contains("99 or newer"), "{refusal}");
}
