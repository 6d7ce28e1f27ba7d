//! TLS on both sides, with real servers, psql and the `openssl` program.

#[path = "secure/certificates.rs"]
mod certificates;
#[path = "secure/clients.rs"]
mod clients;
#[path = "proxy/harness.rs"]
mod harness;
#[path = "secure/servers.rs"]
mod servers;
mod support;
#[path = "secure/to_clients.rs"]
mod to_clients;

use certificates::Authority;
use harness::{Proxy, connect, database_text, section, url_text};
use support::{Options, Server};

/// One source without TLS; clients come over TLS.
#[tokio::test(flavor = "multi_thread")]
async fn clients_come_over_tls() {
    let authority = Authority::new();
    let source = Server::start(15, Options::default()).await.unwrap();
    source.create_database("shop").await.unwrap();
    let own = authority.issue("proxy", "proxy", "DNS:localhost,IP:127.0.0.1");
    let more = format!(
        "login_timeout = \"3s\"\n[proxy.tls]\ncertificate = \"{}\"\nkey = \"{}\"\nclient_ca = \"{}\"\n",
        own.certificate.display(),
        own.key.display(),
        authority.certificate().display()
    );
    let proxy = Proxy::start("tls", &more, &database_text(&source));
    let stage = to_clients::Stage { authority, source, proxy, own };
    section("psql with every sslmode", to_clients::sslmodes(&stage)).await;
    section("requests for encryption in any order", to_clients::orders(&stage)).await;
    section("bytes behind a request are refused", to_clients::stuffed(&stage)).await;
    section("direct TLS needs its protocol", to_clients::direct(&stage)).await;
    section("old versions are refused", to_clients::old_versions(&stage)).await;
    section("answers are the same bytes", to_clients::same_bytes(&stage)).await;
    section("a cancel over TLS hits its backend", to_clients::cancel(&stage)).await;
    section("leaving with a word and without", to_clients::leaving(&stage)).await;
    section("byte by byte, and half a handshake", to_clients::slow(&stage)).await;
    section("the console over TLS", to_clients::console(&stage)).await;
    section("new certificates without a restart", to_clients::replaced(&stage)).await;
    section("required is required", to_clients::required(&stage)).await;
}

/// Servers with TLS and without.
#[tokio::test(flavor = "multi_thread")]
async fn servers_are_reached_over_tls() {
    let authority = Authority::new();
    let certificate = authority.issue("server", "server", "DNS:localhost,IP:127.0.0.1");
    let nameless = authority.issue("nameless", "localhost", "");
    let options = |pair: &certificates::Pair| {
        Options::default()
            .set("ssl", "on")
            .set("ssl_cert_file", &pair.certificate.display().to_string())
            .set("ssl_key_file", &pair.key.display().to_string())
            .set("ssl_ca_file", &authority.certificate().display().to_string())
    };
    let source = Server::start(15, options(&certificate)).await.unwrap();
    let shadow = Server::start_like(&source, 18, options(&nameless)).await.unwrap();
    let plain = Server::start(15, Options::default()).await.unwrap();
    for server in [&source, &shadow, &plain] {
        server.create_database("shop").await.unwrap();
    }
    section("every sslmode means what libpq means", servers::sslmodes(&authority, &source, &shadow, &plain)).await;
    section("channel binding", servers::channel_binding(&authority, &source)).await;
    section("check says what a server lacks", servers::check(&source, &plain)).await;
    section("a migration over verify-full", servers::migration(&authority, &source, &shadow, &certificate)).await;
    section("only TLS, or only none", servers::picky(&authority, &source)).await;
    let _ = (connect, url_text);
}
