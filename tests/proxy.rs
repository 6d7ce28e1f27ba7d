//! What clients and operators may rely on, with the real program in front of real servers.

#[path = "proxy/conversations.rs"]
mod conversations;
#[path = "proxy/differential.rs"]
mod differential;
#[path = "proxy/harness.rs"]
mod harness;
#[path = "proxy/operators.rs"]
mod operators;
#[path = "proxy/ownership.rs"]
mod ownership;
#[path = "proxy/shadow.rs"]
mod shadow;
mod support;

use harness::{Proxy, connect, database_text, section, url_text};
use support::{Options, Server};

/// Held for writing by who compares latencies: what the other tests of this file do to the machine would be in them.
static MEASURING: tokio::sync::RwLock<()> = tokio::sync::RwLock::const_new(());

/// One source; the shadow named in the file is never started.
#[tokio::test(flavor = "multi_thread")]
async fn clients_and_operators_of_a_proxy() {
    let _beside = MEASURING.read().await;
    let source = Server::start(15, Options::default()).await.unwrap();
    source.create_database("shop").await.unwrap();
    source.create_database("later").await.unwrap();
    connect(&source.app_url("shop")).await.batch_execute(conversations::SCHEMA).await.unwrap();
    let shadow =
        format!("\n[[database.shadow]]\nname = \"pg18\"\nurl = \"{}\"\nsample_reads = 10.0\n", url_text(&source.superuser_url("later")));
    let mut proxy = Proxy::start("clients", "max_clients = 60", &format!("{}{shadow}", database_text(&source)));

    let (server, proxied) = (&source, &proxy);
    section("drivers see the same results", conversations::drivers(server, proxied)).await;
    section("pgbench runs in its three modes", conversations::pgbench(server, proxied)).await;
    section("psql prints the same", conversations::psql(server, proxied)).await;
    section("COPY in and out, and its failures", conversations::copy(server, proxied)).await;
    section("notifications reach an idle session", conversations::notifications(server, proxied)).await;
    section("other encodings pass unchanged", conversations::encodings(server, proxied)).await;
    section("large values and long statements", conversations::large(server, proxied)).await;
    section("a cancel request hits its own backend", conversations::cancel(server, proxied)).await;
    section("refused logins have their SQLSTATE", conversations::refused(server, proxied)).await;
    section("a terminated backend's FATAL arrives once", conversations::terminated(server, proxied)).await;
    section("generated conversations are answered byte for byte", differential::generated(server, proxied)).await;
    section("PAUSE waits and holds, RESUME releases", operators::pause(server, proxied)).await;
    section("an edit takes effect, a wrong one is refused", operators::reload(server, proxied)).await;
    section("SET refuses what is not a setting", operators::set(proxied)).await;
    section("passwords are shown nowhere", operators::secrets(server, proxied)).await;
    section("SHUTDOWN lets transactions end", operators::shutdown(server, &mut proxy)).await;
}

/// One source of 15 and a shadow of 18, in step.
#[tokio::test(flavor = "multi_thread")]
async fn a_shadow_helps_and_cannot_hurt() {
    let pair = shadow::Pair::start("shadow").await;
    shadow::helps(&pair).await;
    section("shares are exact", shadow::shares(&pair)).await;
    let _alone = MEASURING.write().await;
    section("a frozen, then dead shadow hurts nobody", shadow::cannot_hurt(&pair)).await;
}

/// One source of 15 and a shadow of 18: sessions live through a cutover and back.
#[tokio::test(flavor = "multi_thread")]
async fn sessions_survive_cutover_and_rollback() {
    let _beside = MEASURING.read().await;
    let pair = shadow::Pair::start("ownership").await;
    section("a session that cannot move is named", ownership::named_obstacle(&pair)).await;
    section("a dry run changes nothing", ownership::dry_run(&pair)).await;
    section("live sessions move and come back", ownership::live_sessions(&pair)).await;
}
