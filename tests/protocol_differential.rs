//! No client can tell the proxy from PostgreSQL: generated conversations, direct and through the proxy, on the same kind of
//! fresh state, must be answered with the same bytes, leave the same rows behind, and leave nothing open.
//!
//! - `UNDERSTUDY_PROTOCOL_CONVERSATIONS=5000` plays more of them than `make test` does.
//! - `UNDERSTUDY_PROTOCOL_SEED=17` begins at that seed (and, without a number of conversations, plays only that one); the
//!   failure names it and shows the smallest part of the conversation that still fails.

#[path = "protocol_differential/compare.rs"]
mod compare;
#[path = "protocol_differential/generator.rs"]
mod generator;
#[path = "proxy/harness.rs"]
mod harness;
#[path = "protocol_differential/player.rs"]
mod player;
#[path = "protocol/raw.rs"]
mod raw;
#[path = "protocol_differential/script.rs"]
mod script;
#[path = "protocol/stage.rs"]
mod stage;
mod support;
#[path = "protocol_differential/texts.rs"]
mod texts;

use harness::{Proxy, ask, connect, url_text, wait_until};
use raw::PATIENCE;
use script::{Action, Script};
use stage::Trusting;
use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};
use support::Options;
use tokio_postgres::Client;
use understudy::demo::servers::Server;

/// In `make test`, each.
const CONVERSATIONS: u64 = 60;
/// While the smallest failing part is looked for, what has not come after this time counts as missing.
const IMPATIENCE: Duration = Duration::from_secs(3);
/// Longest search for it.
const SEARCH_MAX: Duration = Duration::from_secs(40);

/// Few connections, so that each serves one client after the other.
const POOL: &str =
    "[proxy.pool]\nsize = 2\nqueue_timeout = \"60s\"\n[proxy.auth]\nusers = \"query\"\nrules = [\"host all all 127.0.0.1/32 trust\"]\n";

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text}: not a number")))
}

/// Two databases of one server, alike to the oid: clients of one are direct, clients of the other come through the proxy.
struct Twins {
    source: Trusting,
    proxy: Proxy,
    peers: [Client; 2],
    admins: [Client; 2],
    shadow: Option<Server>,
    pooled: bool,
}

impl Twins {
    /// `pooled`: clients of the proxy share a few server connections.
    async fn start(name: &str, shadowed: bool, pooled: bool) -> Twins {
        let source = Trusting::start(15, &[]).await;
        let server = &source.server;
        server.create_database("model").await.unwrap();
        let model = connect(&server.app_url("model")).await;
        model.batch_execute(texts::SCHEMA).await.unwrap();
        let newest: u32 = ask(&model, "SELECT max(oid) FROM pg_class").await.parse().unwrap();
        compare::FIRST_NEW_OID.store(newest + 1, Ordering::Relaxed);
        drop(model);
        let operator = server.connect("postgres").await.unwrap();
        wait_until("the model is left alone", Duration::from_secs(60), || async {
            ask(&operator, "SELECT count(*) FROM pg_stat_activity WHERE datname = 'model'").await == "0"
        })
        .await;
        // the direct clients ask for the database `shop` too: a start-up packet is the same bytes for both
        for twin in ["shop", "proxied"] {
            operator.batch_execute(&format!("CREATE DATABASE {twin} TEMPLATE model OWNER app")).await.unwrap();
        }
        let urls = [server.app_url("shop"), server.app_url("proxied")];
        let pool = if pooled { POOL } else { "" };
        let mut text = format!("{pool}[[database]]\nname = \"shop\"\nsource = \"{}\"\n", url_text(&server.superuser_url("proxied")));
        let mut shadow = None;
        if shadowed {
            let other = Server::start_like(server, 18, Options::default()).await.unwrap();
            other.create_database("shop").await.unwrap();
            text.push_str(&format!(
                "[[database.user]]\nname = \"app\"\npassword = \"{}\"\n[[database.shadow]]\nname = \"pg18\"\nurl = \"{}\"\n\
                 mirror_writes = \"rehearse\"\nsample_reads = 100.0\n",
                server.app_password().expose(),
                url_text(&other.superuser_url("shop"))
            ));
            shadow = Some(other);
        }
        let proxy = Proxy::start(name, if pooled { "pool_mode = \"transaction\"" } else { "" }, &text);
        if shadowed {
            proxy.rows("SHADOW START pg18").await;
            wait_until("the shadow is in step", Duration::from_secs(60), || async {
                let shadow = proxy.shadow().await;
                shadow.health == "healthy" && shadow.feed.state == "streaming"
            })
            .await;
        }
        let peers = [connect(&urls[0]).await, connect(&urls[1]).await];
        let admins = [connect(&urls[0]).await, connect(&urls[1]).await];
        Twins { source, proxy, peers, admins, shadow, pooled }
    }

    /// What differs, if anything does.
    async fn compare(&self, script: &Script, seed: u64, patience: Duration) -> Option<String> {
        let content = async |admin: &Client| ask(admin, texts::CONTENT).await;
        for admin in &self.admins {
            admin.batch_execute("SET lock_timeout = '60s'; SELECT reset_state()").await.unwrap();
        }
        let [direct_peer, proxied_peer] = &self.peers;
        let direct = match player::play(self.source.server.port(), script, seed, direct_peer, None, patience).await {
            Ok(answer) => answer,
            Err(reason) => return Some(format!("the conversation is wrong, it fails directly: {reason}")),
        };
        let proxied = match player::play(self.proxy.listen, script, seed, proxied_peer, Some(&direct.at_barriers), patience).await {
            Ok(answer) => answer,
            Err(reason) => return Some(format!("through the proxy: {reason}\n--- direct\n{}", compare::show(&direct.bytes, 12))),
        };
        if let Some(difference) = compare::difference(&direct.bytes, &proxied.bytes) {
            return Some(difference);
        }
        let [one, other] = [content(&self.admins[0]).await, content(&self.admins[1]).await];
        (one != other).then(|| "the rows left behind differ".to_owned())
    }

    /// Leaves units out as long as the rest still fails.
    async fn smallest(&self, script: &Script, seed: u64, first: String) -> (Script, String) {
        let (mut smallest, mut reason) = (script.clone(), first);
        let mut at = smallest.units.len();
        let began = Instant::now();
        while at > 0 && began.elapsed() < SEARCH_MAX {
            at -= 1;
            let mut fewer = smallest.clone();
            let removed = fewer.units.remove(at);
            if removed.actions.iter().any(|action| matches!(action, Action::AwaitEnd)) {
                fewer.ends_early = false;
            }
            if let Some(still) = self.compare(&fewer, seed, IMPATIENCE).await {
                (smallest, reason) = (fewer, still);
            }
        }
        (smallest, reason)
    }

    fn show(script: &Script) -> String {
        let mut text = String::new();
        for action in script.actions() {
            text.push_str(&match action {
                Action::Send(bytes) => compare::show_requests(&bytes),
                Action::Barrier => "    (waits)".into(),
                Action::Peer(statement) => format!("    (a peer: {statement})"),
                Action::HalfClose => "    (half-closes)".into(),
                Action::AwaitEnd => "    (waits for the end)".into(),
            });
            text.push('\n');
        }
        text
    }

    async fn explain(&self, script: &Script, seed: u64, first: String) -> String {
        let (script, reason) = self.smallest(script, seed, first).await;
        format!("seed {seed} (UNDERSTUDY_PROTOCOL_SEED={seed}), cut {:?}\n{reason}\n--- the client\n{}", script.cut, Self::show(&script))
    }
}

/// What a transaction pool answers otherwise: SQL EXECUTE of a statement that the protocol has prepared, and a Bind sent
/// before a DISCARD ALL, DEALLOCATE or second Parse of its name has failed (README.md names them); RESET of a setting that came with the start-up, whose
/// ParameterStatus first shows the connection's own value and then, with the next transaction, the client's; a setting of
/// applications that another client has had on the connection, which a server shows as empty from then on, not as NULL.
/// Not legitimate, a limit (README.md): a notification that comes while the server is asked what a transaction has left is lost.
fn comparable(script: &Script) -> bool {
    let has = |bytes: &[u8], text: &str| bytes.windows(text.len()).any(|part| part == text.as_bytes());
    let plain = raw::startup(196_608, &[(b"user", b"app"), (b"database", b"shop")]);
    let mut texts = vec!["EXECUTE ", "DISCARD ALL", "DEALLOCATE", "current_setting('app.tenant'", "LISTEN"];
    if script.startup.len() > plain.len() {
        texts.extend(["RESET ", "TO DEFAULT"]);
    }
    let mut sent = bytes::BytesMut::new();
    for action in script.actions() {
        if let Action::Send(bytes) = action {
            sent.extend_from_slice(&bytes);
        }
    }
    if texts.iter().any(|text| has(&sent, text)) {
        return false;
    }
    let mut names = std::collections::HashSet::new();
    while let Ok(Some(message)) = understudy::wire::take(&mut sent) {
        let name = message.body.split(|byte| *byte == 0).next().unwrap_or_default();
        if message.tag == b'P' && !name.is_empty() && !names.insert(name.to_vec()) {
            return false;
        }
    }
    true
}

async fn play_all(twins: &mut Twins) {
    let seed = number("UNDERSTUDY_PROTOCOL_SEED");
    let count = number("UNDERSTUDY_PROTOCOL_CONVERSATIONS").unwrap_or(match (seed, twins.pooled) {
        (Some(_), _) => 1,
        (None, true) => 3 * CONVERSATIONS, // most are left out
        (None, false) => CONVERSATIONS,
    });
    let first = seed.unwrap_or(1);
    let began = Instant::now();
    eprintln!("    conversations of seeds {first} to {}", first + count - 1);
    let (mut failures, mut left_out) = (Vec::new(), 0);
    for seed in first..first + count {
        let script = generator::conversation(seed);
        if twins.pooled && !comparable(&script) {
            left_out += 1;
            continue;
        }
        if let Some(reason) = twins.compare(&script, seed, PATIENCE).await {
            eprintln!("    seed {seed} differs; looking for the smallest part that does\n{reason}");
            failures.push(twins.explain(&script, seed, reason).await);
            eprintln!("{}", failures[failures.len() - 1]);
        }
        assert!(twins.proxy.is_running(), "seed {seed}: the proxy ended:\n{}", twins.proxy.log_text());
        assert!(failures.len() < 5, "{} conversations differ; the last:\n{}", failures.len(), failures[failures.len() - 1]);
    }
    eprintln!("    {count} conversations, {left_out} of them left out, in {:.1} s", began.elapsed().as_secs_f64());
    assert!(failures.is_empty(), "{} conversations differ; the first:\n{}", failures.len(), failures[0]);
    // everybody has gone: nobody is counted, and nothing holds a PAUSE up
    wait_until("no client is left", Duration::from_secs(60), || async { twins.proxy.state().await.databases[0].clients == 0 }).await;
    let paused = tokio::time::timeout(Duration::from_secs(60), twins.proxy.tell("PAUSE shop")).await.expect("something holds a PAUSE up");
    assert_eq!(paused.code, 0, "{}", paused.stderr);
    twins.proxy.rows("RESUME shop").await;
    let log = twins.proxy.log_text();
    assert!(!log.contains("panicked"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn conversations_are_answered_alike() {
    let mut twins = Twins::start("differential", false, false).await;
    play_all(&mut twins).await;
}

/// Every read is sampled, every write rehearsed: no client may see anything of it, and no difference may be reported.
#[tokio::test(flavor = "multi_thread")]
async fn and_alike_with_a_shadow_that_copies_everything() {
    let mut twins = Twins::start("differential-shadow", true, false).await;
    play_all(&mut twins).await;
    let shadow = twins.proxy.shadow().await;
    let (compare, rehearsal) = (&shadow.compare, &shadow.rehearsal);
    eprintln!("    {} reads compared, {} transactions rehearsed", compare.sampled, rehearsal.transactions);
    // a replay of few conversations may have nothing for it
    let replay = number("UNDERSTUDY_PROTOCOL_SEED").is_some();
    assert!(replay || (compare.same > 0 && rehearsal.transactions > 0), "the shadow has taken part in nothing: {compare:?} {rehearsal:?}");
    assert_eq!((compare.different, compare.errors), (0, 0), "{:?}", compare.examples);
    assert_eq!((rehearsal.tag_mismatches, rehearsal.errors), (0, 0), "{:?}", rehearsal.examples);
    assert_eq!(shadow.feed.findings, 0, "{:?}", shadow.feed.finding_examples);
    drop(twins.shadow.take());
}

/// The same with a transaction pool, for conversations that are comparable; each gets a connection that those before it have used.
#[tokio::test(flavor = "multi_thread")]
async fn and_alike_over_pooled_connections() {
    let mut twins = Twins::start("differential-pool", false, true).await;
    play_all(&mut twins).await;
}
