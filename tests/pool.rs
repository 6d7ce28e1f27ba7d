//! Transaction mode (and the bounded session mode) as clients and operators see it: real servers, the real program.

#[path = "proxy/conversations.rs"]
#[allow(dead_code, reason = "the tables of it are used")]
mod conversations;
#[path = "pool/ends.rs"]
mod ends;
#[path = "pool/follow.rs"]
mod follow;
#[path = "pool/halves.rs"]
mod halves;
#[path = "proxy/harness.rs"]
mod harness;
#[path = "proxy/ownership.rs"]
mod ownership;
#[path = "pool/queue.rs"]
mod queue;
#[path = "protocol/raw.rs"]
mod raw;
#[path = "pool/session_mode.rs"]
mod session_mode;
#[path = "proxy/shadow.rs"]
#[allow(dead_code, reason = "what a frozen shadow costs is measured without a pool")]
mod shadow;
#[path = "pool/stage.rs"]
mod stage;
#[path = "pool/statements.rs"]
mod statements;
#[path = "pool/states.rs"]
mod states;
mod support;

use harness::section;
use stage::Stage;

/// Two server connections for many clients.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_has_follows_it() {
    let stage = Stage::start("follows", 15, "size = 2", "").await;
    section("a connection is lent for a transaction", states::lent(&stage)).await;
    section("settings follow, and stay away from others", states::settings(&stage)).await;
    section("settings of what SQL EXECUTE runs follow, too", states::executed(&stage)).await;
    section("settings of the start-up hold, and come back after RESET and DISCARD ALL", states::start_up(&stage)).await;
    section("what pins is said, and released", states::pins(&stage)).await;
    section("LISTEN hears while idle", states::listen(&stage)).await;
    section("a ParameterStatus tells of a hidden SET", states::hidden(&stage)).await;
    section("named statements are prepared where they are missing", statements::named(&stage)).await;
    section("a statement's constants are its own", statements::constants(&stage)).await;
    section("errors of statements are the server's own", statements::errors(&stage)).await;
    section("DEALLOCATE, DISCARD ALL and SQL PREPARE", statements::sql(&stage)).await;
    section("what a failed cycle did not prepare is prepared behind it", statements::skipped(&stage)).await;
    section("the unnamed statement outlives its transaction", statements::unnamed(&stage)).await;
    section("a stale plan is prepared again", statements::stale(&stage)).await;
    section("large and many statements", statements::large(&stage)).await;
}

/// A pool of one or a few, and more clients than that.
#[tokio::test(flavor = "multi_thread")]
async fn a_pool_is_shared_in_order_and_left_clean() {
    let stage = Stage::start("shared", 15, "size = 1\nqueue_timeout = \"60s\"\nserver_idle_timeout = \"1h\"", "").await;
    section("who waits is served in order, and may be cancelled", queue::order(&stage)).await;
    section("who waits too long is told why", queue::timeout(&stage)).await;
    section("a cancel hits its own statement only", queue::cancels(&stage)).await;
    section("who leaves inside a transaction leaves nothing", ends::leaves(&stage)).await;
    section("what a listener has not heard dies with it", ends::notifications(&stage)).await;
    section("a message that is none is answered to its sender", ends::unknown_messages(&stage)).await;
    section("terminated connections are replaced", ends::terminated(&stage)).await;
    section("PAUSE, RESUME, RECONNECT, RELOAD", ends::operators(&stage)).await;
    section("lifetime and idle time end connections", ends::ages(&stage)).await;
    section("a server that is away is waited for", ends::away(&stage)).await;
}

/// One source of 15 and a shadow of 18: what holds of sessions that have a server connection each holds here too.
#[tokio::test(flavor = "multi_thread")]
async fn a_shadow_helps_pooled_sessions() {
    let pair = shadow::Pair::start_with("pool-shadow", "pool_mode = \"transaction\"", &follow::pool(3), "").await;
    shadow::helps(&pair).await;
    section("sampled, served and rehearsed at once", follow::everything(&pair)).await;
}

/// The same pair: sessions live through a cutover and back.
#[tokio::test(flavor = "multi_thread")]
async fn pools_follow_cutover_and_rollback() {
    let pair = shadow::Pair::start_with("pool-ownership", "pool_mode = \"transaction\"", &follow::pool(5), follow::TABLES).await;
    section("a session that cannot move is named", ownership::named_obstacle(&pair)).await;
    section("a dry run changes nothing", ownership::dry_run(&pair)).await;
    section("pinned sessions move and come back", ownership::live_sessions(&pair)).await;
    section("many clients of few connections move and come back", follow::crowd(&pair)).await;
}

/// Between the server and understudy something that holds the second half of an answer back.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_sent_behind_what_begins_again() {
    halves::apart().await;
}

/// pgbench, 200 clients over five connections.
#[tokio::test(flavor = "multi_thread")]
async fn many_clients_over_few_connections() {
    let stage = Stage::start("many", 15, "size = 5", "").await;
    section("pgbench in its three modes", queue::pgbench(&stage)).await;
}

/// Sessions over a bounded pool of whole connections.
#[tokio::test(flavor = "multi_thread")]
async fn session_mode_with_a_size() {
    session_mode::bounded().await;
}
