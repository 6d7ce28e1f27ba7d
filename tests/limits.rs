//! What clients must keep to, and clients that do not: time and size limits, machines that vanish, floods, cancels where no
//! server knows of the statement. Nobody else notices, and memory comes back.

#[path = "limits/cancels.rs"]
mod cancels;
#[path = "limits/crowds.rs"]
mod crowds;
#[path = "limits/gone.rs"]
mod gone;
#[path = "proxy/harness.rs"]
mod harness;
#[path = "protocol/raw.rs"]
mod raw;
#[path = "limits/sizes.rs"]
mod sizes;
#[path = "protocol/stage.rs"]
mod stage;
mod support;
#[path = "limits/times.rs"]
mod times;

use harness::{Proxy, connect, section, url_text};
use raw::Raw;
use stage::Trusting;
use understudy::wire::{Message, backend::ErrorFields};

struct Stage {
    source: Trusting,
    proxy: Proxy,
}

impl Stage {
    async fn start(name: &str, more_of_proxy: &str) -> Stage {
        let source = Trusting::start(15, &[("max_connections", "400")]).await;
        source.server.create_database("shop").await.unwrap();
        connect(&source.server.app_url("shop"))
            .await
            .batch_execute("CREATE TABLE item (id int PRIMARY KEY, v int, note text)")
            .await
            .unwrap();
        let text = format!("[[database]]\nname = \"shop\"\nsource = \"{}\"\n", url_text(&source.server.superuser_url("shop")));
        let proxy = Proxy::start(name, more_of_proxy, &text);
        Stage { source, proxy }
    }

    async fn raw(&self) -> Raw {
        Raw::open(self.proxy.listen, "shop").await
    }

    /// Replaces settings in the running proxy.
    async fn reload(&self, from: &str, to: &str) {
        self.proxy.edit(from, to);
        self.proxy.rows("RELOAD").await;
    }

    async fn clients(&self) -> u64 {
        self.proxy.state().await.databases[0].clients
    }
}

/// The last words before a connection ends: severity, SQLSTATE, message; and whether the hint names proxy.toml.
async fn last_words(raw: &mut Raw) -> (String, String, String) {
    let seen = raw.until_closed().await;
    let errors: Vec<ErrorFields> = errors(&seen);
    let [error] = &errors[..] else { panic!("{} errors: {errors:?}", errors.len()) };
    (error.severity.clone(), error.code.clone(), error.message.clone())
}

fn errors(seen: &[Message]) -> Vec<ErrorFields> {
    seen.iter().filter(|message| message.tag == b'E').map(|message| ErrorFields::parse(&message.body)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_are_kept_and_follow_a_reload() {
    let stage = Stage::start("limits", "max_clients = 50").await;
    section("transactions whose client does nothing", times::idle_in_transaction(&stage)).await;
    section("clients that ask for nothing", times::idle(&stage)).await;
    section("requests that take too long", times::queries(&stage)).await;
    section("lengths that cannot be", sizes::lengths(&stage)).await;
    section("messages that are too long", sizes::messages(&stage)).await;
    section("memory per client", sizes::memory(&stage)).await;
    section("many requests without reading", sizes::unread(&stage)).await;
    section("a gigabyte in one message", sizes::gigabyte(&stage)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn machines_vanish() {
    gone::machines().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn crowds_do_no_harm() {
    let stage = Stage::start("crowds", "login_timeout = \"20s\"\nmax_clients = 300").await;
    section("cancels while nobody else is let in", cancels::saturated(&stage)).await;
    section("cancels at a closed gate", cancels::at_the_gate(&stage)).await;
    section("idle clients are small", crowds::idle(&stage)).await;
    section("floods", crowds::floods(&stage)).await;
    section("one byte at a time, for ever", crowds::dripping(&stage)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_reaches_the_shadow_and_comes_over_tls() {
    cancels::served().await;
}
