//! Authentication: relayed to the owner, or ended at the proxy; with psql, our own client, and raw bytes.

#[path = "secure/certificates.rs"]
mod certificates;
#[path = "secure/clients.rs"]
mod clients;
#[path = "secure/ended.rs"]
mod ended;
#[path = "proxy/harness.rs"]
mod harness;
#[path = "secure/protocol.rs"]
mod protocol;
mod support;

use certificates::Authority;
use harness::section;
use support::{Options, Server};

/// One source of 15; the proxy knows its users itself.
#[tokio::test(flavor = "multi_thread")]
async fn authentication_ends_at_the_proxy() {
    let source = Server::start(15, Options::default()).await.unwrap();
    source.create_database("shop").await.unwrap();
    let stage = ended::Stage::new(Authority::new(), source).await;
    section("a user list of every kind", ended::user_list(&stage)).await;
    section("unknown names look like known ones", ended::unknown_names(&stage)).await;
    section("rules in the manner of pg_hba", ended::rules(&stage)).await;
    section("certificates and maps", ended::certificates(&stage)).await;
    section("an edit of the files takes effect", ended::edits(&stage)).await;
    section("an auth query, and a changed password", ended::query(&stage)).await;
    section("wrong settings are refused", ended::wrong_settings(&stage)).await;
}

/// Sources of 15 and 18: what they speak is what clients hear.
#[tokio::test(flavor = "multi_thread")]
async fn protocol_versions() {
    for major in [15, 18] {
        let source = Server::start(major, Options::default()).await.unwrap();
        source.create_database("shop").await.unwrap();
        section(&format!("protocol 3.2 and beyond, PostgreSQL {major}"), protocol::versions(&source)).await;
    }
}
