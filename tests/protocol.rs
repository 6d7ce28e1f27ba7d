//! The checklist of what proxies trip on, point by point, with the real program in front of a real server. The
//! differential test (`tests/protocol_differential.rs`, "diff" below) compares generated conversations byte for byte.
//!
//! | point | where |
//! |---|---|
//! | 1 bytes behind an SSLRequest | `encryption`, `tests/tls.rs` (`stuffed`) |
//! | 2 GSSENC and SSL in any order | `encryption` |
//! | 3 direct TLS | `tests/tls.rs` (`direct`) |
//! | 4 protocol 3.2 and `_pq_` options | `start_up`, `tests/auth.rs` (`protocol_versions`: relayed and ended, 15 and 18) |
//! | 5 start-up packets | `start_up`, diff; `tests/auth.rs` (a search_path does not reach the auth query) |
//! | 6 CancelRequest | `cancels`, `tests/proxy.rs`, `tests/tls.rs` (`cancel`), `tests/auth.rs` (long keys) |
//! | 7 leaving after `N`, with and without close_notify, by a reset | `encryption`, `tests/tls.rs` (`leaving`) |
//! | 8 health checks | `encryption` |
//! | 9 Unix sockets, peer authentication | `tests/unix_sockets.rs` |
//! | 10 SASL variants | `tests/auth.rs`, `tests/tls.rs` (`channel_binding`), `auth::scram`; hostile servers: `tests/protocol_fuzz.rs` |
//! | 11 refusals before authentication, notices and settings during it | `start_up`, `tests/proxy.rs` |
//! | 12 several statements, 13 empty queries | `simple`, diff; `sql::tests` (the strongest counts) |
//! | 14 large messages, wrong lengths | `large`, `tests/limits.rs` (1 GB; lengths), `tests/bad_input.rs`, `tests/protocol_fuzz.rs` |
//! | 15 COPY in every way, COPY BOTH | `copy`, `replication`, diff |
//! | 16 Flush is not Sync, 19 errors come at once | `flush`, diff (barriers) |
//! | 17 error skips to Sync, 18 Query in a batch, 20 many Syncs | `pipelines`, `copy`, diff |
//! | 21 portals suspended, 22 Describe, 24 Close of nothing | `portals`, diff |
//! | 23 names taken, failed Parse, 25 replanning, 26 DEALLOCATE, 31 unnamed statements | `statements`, diff; `session::conversation` |
//! | 27 parameters and formats | `parameters`, diff |
//! | 28 cache keys with types | only where statements are shared between clients: the pool's tests |
//! | 29 dying between Parse and Sync, 37 vanishing in a transaction | `vanishing` |
//! | 30 FunctionCall | `function_calls`, diff |
//! | 32 transaction status | `simple` |
//! | 33 ParameterStatus | `state`, diff |
//! | 34 notices and notifications | diff (peers), `tests/proxy.rs` (idle) |
//! | 35 what pins | `pins`, `replication`, `session::conversation` |
//! | 36 terminated backends | `endings`, `tests/proxy.rs`, diff |
//! | 38 cancel races | `cancels`; `tests/limits.rs` (no client let in any more, held at the gate), `tests/operations.rs` (two processes) |
//! | 39 cancel reaches the shadow | `tests/limits.rs` (`served`); copies are made of answered statements only |
//! | 40 back-pressure | `slow` |
//! | 41 half-close; machines that vanish; TLS records | `endings`, diff; `tests/limits.rs` (`machines`), `net::tcp`; `tests/tls.rs` (`same_bytes`) |
//! | 42 any split of the bytes | diff (pieces, single bytes), `start_up` |
//! | 43 unknown messages | `endings`, diff; from servers: `session::conversation` |
//! | 44 oids in comparisons | `traffic::answer` |
//! | 45 settings after a change of server | `tests/proxy.rs` (`sessions_survive_cutover_and_rollback`) |
//! | 46 our own key, 47 encodings | `state`, `tests/proxy.rs`, diff |
//! | 48 messages verbatim | `start_up`, diff |
//! | 49 what is not compared, 50 comments in texts | `traffic::answer`, `sql::tests` |

#[path = "protocol/connections.rs"]
mod connections;
#[path = "proxy/harness.rs"]
mod harness;
#[path = "protocol/messages.rs"]
mod messages;
#[path = "protocol/raw.rs"]
mod raw;
#[path = "protocol/stage.rs"]
mod stage;
#[path = "protocol/streams.rs"]
mod streams;
mod support;

use harness::{Proxy, connect, section, url_text};
use raw::Raw;
use stage::Trusting;

struct Stage {
    source: Trusting,
    proxy: Proxy,
}

impl Stage {
    async fn start(name: &str) -> Stage {
        let source = Trusting::start(15, &[("max_connections", "200"), ("max_wal_senders", "10")]).await;
        source.server.create_database("shop").await.unwrap();
        let schema = "CREATE TABLE item (id int PRIMARY KEY, v int, note text)";
        connect(&source.server.app_url("shop")).await.batch_execute(schema).await.unwrap();
        let operator = source.server.connect("shop").await.unwrap();
        operator.batch_execute("CREATE ROLE locked_out NOLOGIN; CREATE ROLE limited LOGIN CONNECTION LIMIT 0").await.unwrap();
        let text = format!("[[database]]\nname = \"shop\"\nsource = \"{}\"\n", url_text(&source.server.superuser_url("shop")));
        let proxy = Proxy::start(name, "", &text);
        Stage { source, proxy }
    }

    async fn raw(&self) -> Raw {
        Raw::open(self.proxy.listen, "shop").await
    }

    async fn in_transaction(&self) -> u64 {
        self.proxy.rows("SHOW POOLS").await[0]["in_transaction"].as_u64().unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_mean_what_they_mean_to_the_server() {
    let stage = Stage::start("protocol-messages").await;
    section("simple queries and transaction status", messages::simple(&stage)).await;
    section("Flush is not Sync", messages::flush(&stage)).await;
    section("pipelines", messages::pipelines(&stage)).await;
    section("portals", messages::portals(&stage)).await;
    section("prepared statements", messages::statements(&stage)).await;
    section("parameters and formats", messages::parameters(&stage)).await;
    section("COPY", messages::copy(&stage)).await;
    section("function calls", messages::function_calls(&stage)).await;
    section("settings, keys, encodings", messages::state(&stage)).await;
    section("what pins a session", messages::pins(&stage)).await;
    section("clients that vanish", messages::vanishing(&stage)).await;
    section("what ends a connection", messages::endings(&stage)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_come_and_go() {
    let stage = Stage::start("protocol-connections").await;
    section("encryption asked for", connections::encryption(&stage)).await;
    section("start-up packets", connections::start_up(&stage)).await;
    section("cancels", connections::cancels(&stage)).await;
    section("replication", streams::replication(&stage)).await;
    section("floods", connections::floods(&stage)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_slow_and_hostile_clients_hurt_nobody() {
    let stage = Stage::start("protocol-streams").await;
    section("large values", streams::large(&stage)).await;
    section("slow readers", streams::slow(&stage)).await;
    section("hostile texts", streams::hostile(&stage)).await;
}
