//! A shadow in step with its source: sampled, served, rehearsed, broken.

use crate::{
    conversations::SCHEMA,
    harness::{Proxy, ask, connect, database_text, section, sqlstate, url_text, wait_until},
    support::{Options, Server},
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio_postgres::Client;
use understudy::sql::{CatalogFacts, Classifier};

const MORE: &str = "
    CREATE TABLE counter (id int PRIMARY KEY, v bigint NOT NULL);
    INSERT INTO counter SELECT k, 0 FROM generate_series(1, 8) k;
    CREATE SEQUENCE numbers;
    CREATE FUNCTION dice() RETURNS int LANGUAGE sql VOLATILE AS 'SELECT 4';
    CREATE VIEW thrown AS SELECT id, dice() AS pips FROM item;
    CREATE TABLE aside (id int PRIMARY KEY, v bigint NOT NULL);
    CREATE VIEW onlooker AS SELECT * FROM aside;
    CREATE FUNCTION sum_aside() RETURNS numeric LANGUAGE sql STABLE AS 'SELECT sum(v) FROM aside';
    CREATE TYPE mood AS ENUM ('calm', 'cross');
    CREATE TABLE felt (id int PRIMARY KEY, m mood);
    INSERT INTO felt VALUES (1, 'calm');
";
const MEMORY_MAX: f64 = 1024.0 * 1024.0;

/// Source, shadow and proxy; the feed is streaming. The proxy ends first.
pub struct Pair {
    pub proxy: Proxy,
    pub source: Server,
    pub shadow: Server,
}

impl Pair {
    pub async fn start(name: &str) -> Pair {
        Pair::start_with(name, "", "", "").await
    }

    /// `more_of_proxy`: lines of `[proxy]`; `before`: between them and the database; `tables`: SQL of more of them.
    pub async fn start_with(name: &str, more_of_proxy: &str, before: &str, tables: &str) -> Pair {
        let source = Server::start(15, Options::default()).await.unwrap();
        let shadow = Server::start_like(&source, 18, Options::default()).await.unwrap();
        source.create_database("shop").await.unwrap();
        shadow.create_database("shop").await.unwrap();
        connect(&source.app_url("shop")).await.batch_execute(&format!("{SCHEMA}{MORE}{tables}")).await.unwrap();
        // Limits far out of reach: these tests break the shadow on purpose and look at what sessions do, not at the judge.
        let text = format!(
            "{before}{}\n[[database.shadow]]\nname = \"pg18\"\nurl = \"{}\"\nmirror_writes = \"off\"\nsample_reads = 0.0\nserve_reads = 0.0\n\
             hedge_after = \"2s\"\n[database.shadow.revert]\nmin_requests = 1000000\nerror_rate = 100.0\nmismatch_rate = 100.0\n\
             latency_ratio = 100000.0\nmax_lag = \"1h\"\n",
            database_text(&source),
            url_text(&shadow.superuser_url("shop"))
        );
        let proxy = Proxy::start(name, &format!("shadow_memory = \"1MB\"\n{more_of_proxy}"), &text);
        proxy.rows("SHADOW START pg18").await;
        let pair = Pair { proxy, source, shadow };
        pair.in_step().await;
        pair
    }

    pub async fn in_step(&self) {
        let began = Instant::now();
        loop {
            let shadow = self.proxy.shadow().await;
            if shadow.health == "healthy" && shadow.feed.state == "streaming" {
                return;
            }
            assert!(began.elapsed() < Duration::from_secs(40), "{:?}\n{}", shadow.feed, self.proxy.log_text());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub async fn client(&self) -> Client {
        connect(&self.proxy.through(&self.source.app_url("shop"))).await
    }

    pub async fn set(&self, knob: &str, value: &str) {
        self.proxy.rows(&format!("SET pg18 {knob} = {value}")).await;
    }

    pub async fn served(&self) -> u64 {
        self.proxy.shadow().await.served.reads
    }

    /// Changes the shadow behind the feed's back.
    async fn tamper(&self, text: &str) {
        let client = self.shadow.connect("shop").await.unwrap();
        client.batch_execute(&format!("BEGIN; SET LOCAL session_replication_role = replica; {text}; COMMIT")).await.unwrap();
    }

    /// Reads until this session's reads are served.
    async fn warm_up(&self, client: &Client) {
        let before = self.served().await;
        wait_until("reads are served", Duration::from_secs(15), || async {
            ask(client, "SELECT 1").await;
            self.served().await > before
        })
        .await;
    }

    /// Sessions whose reads are served.
    async fn warm_sessions(&self, number: usize) -> Vec<Client> {
        let mut sessions = Vec::new();
        for _ in 0..number {
            let client = self.client().await;
            self.warm_up(&client).await;
            sessions.push(client);
        }
        sessions
    }
}

/// What holds of every shadow that answers, however sessions come by their connections.
pub async fn helps(pair: &Pair) {
    section("served reads come from the shadow", served(pair)).await;
    section("a failing shadow falls back", falls_back(pair)).await;
    section("session settings hold for served reads", settings(pair)).await;
    section("what is not a pure read is never served", never_served(pair)).await;
    section("nobody reads backwards while the feed is held", no_stale_reads(pair)).await;
    section("nobody is told of what the shadow does not have yet", consistency(pair)).await;
    section("a table that is set aside is not read", set_aside(pair)).await;
    section("a corrupted row is found, moving rows are not", compared(pair)).await;
}

async fn served(pair: &Pair) {
    let client = pair.client().await;
    pair.set("serve_reads", "100").await;
    pair.warm_up(&client).await;
    pair.tamper("UPDATE item SET v = -1 WHERE id = 1").await;
    let read = client.prepare("SELECT v FROM item WHERE id = $1").await.unwrap();
    let before = pair.served().await;
    for _ in 0..20 {
        assert_eq!(ask(&client, "SELECT v FROM item WHERE id = 1").await, "-1", "the shadow answers the simple protocol");
        assert_eq!(client.query_one(&read, &[&1]).await.unwrap().get::<_, i32>(0), -1, "and prepared statements");
    }
    for _ in 0..20 {
        let row = client.query_one("SELECT v, note FROM item WHERE id = $1", &[&1]).await.unwrap();
        assert_eq!(row.get::<_, i32>(0), -1, "and statements prepared for one use");
    }
    assert!(pair.served().await >= before + 60);
    // inside a transaction that may write, the owner answers
    client.batch_execute("BEGIN").await.unwrap();
    assert_eq!(ask(&client, "SELECT v FROM item WHERE id = 1").await, "10");
    client.batch_execute("COMMIT").await.unwrap();
    pair.tamper("UPDATE item SET v = 10 WHERE id = 1").await;
    pair.set("serve_reads", "0").await;
    let before = pair.served().await;
    assert_eq!(ask(&client, "SELECT v FROM item WHERE id = 1").await, "10");
    assert_eq!(pair.served().await, before);
}

async fn falls_back(pair: &Pair) {
    let client = pair.client().await;
    pair.set("serve_reads", "100").await;
    pair.warm_up(&client).await;
    let before = pair.proxy.shadow().await.served;
    pair.tamper("ALTER TABLE item RENAME TO item_away").await;
    for id in 1..=20 {
        assert_eq!(ask(&client, &format!("SELECT v FROM item WHERE id = {id}")).await, (id * 10).to_string());
        assert_eq!(client.query_one("SELECT v FROM item WHERE id = $1", &[&id]).await.unwrap().get::<_, i32>(0), id * 10);
    }
    // what fails on both fails for the client, once
    assert_eq!(sqlstate(client.simple_query("SELECT 1 / (id - 3) FROM item").await), "22012");
    let after = pair.proxy.shadow().await.served;
    assert!(after.fallbacks > before.fallbacks, "{after:?}");
    pair.tamper("ALTER TABLE item_away RENAME TO item").await;
    pair.warm_up(&client).await;
    pair.set("serve_reads", "0").await;
}

async fn settings(pair: &Pair) {
    let client = pair.client().await;
    pair.set("serve_reads", "100").await;
    pair.warm_up(&client).await;
    client.batch_execute("SET TimeZone = 'Asia/Tokyo'; SET DateStyle = 'German'").await.unwrap();
    for _ in 0..30 {
        assert_eq!(ask(&client, "SELECT timestamptz '2024-01-31 12:00:00+00'").await, "31.01.2024 21:00:00 JST");
        assert_eq!(ask(&client, "SELECT current_setting('TimeZone')").await, "Asia/Tokyo");
    }
    client.batch_execute("SET search_path = pg_catalog").await.unwrap();
    assert_eq!(sqlstate(client.simple_query("SELECT v FROM item").await), "42P01", "the session's own search_path decides");
    client.batch_execute("RESET ALL").await.unwrap();
    assert_eq!(ask(&client, "SELECT timestamptz '2024-01-31 12:00:00+00'").await, "2024-01-31 12:00:00+00");
    assert_eq!(ask(&client, "SELECT v FROM item WHERE id = 1").await, "10");
    pair.set("serve_reads", "0").await;
}

async fn never_served(pair: &Pair) {
    let client = pair.client().await;
    pair.set("serve_reads", "100").await;
    pair.warm_up(&client).await;
    let before = pair.served().await;
    for round in 1..=5 {
        assert_eq!(ask(&client, "SELECT nextval('numbers')").await, round.to_string());
        for text in [
            "SELECT dice()",
            "SELECT * FROM thrown WHERE id = 1",
            "SELECT id FROM item WHERE dice() = 4 AND id = 1",
            "SELECT v FROM item WHERE id = 1 FOR UPDATE",
            "SELECT id FROM item WHERE id = 1 FOR KEY SHARE",
            "WITH changed AS (UPDATE item SET v = v WHERE id = 1 RETURNING id) SELECT * FROM changed",
            "SELECT pg_advisory_lock(7), pg_advisory_unlock(7)",
            "SELECT set_config('application_name', 'x', false)",
            "SELECT pg_backend_pid()",
            "SELECT txid_current()",
            "SELECT 1; SELECT 2",
        ] {
            client.simple_query(text).await.unwrap_or_else(|error| panic!("{text}: {error}"));
            // the write before it must not be what kept it on the owner
            tokio::time::sleep(Duration::from_millis(5)).await;
            assert_eq!(pair.served().await, before, "{text}");
        }
    }
    pair.set("serve_reads", "0").await;
}

async fn no_stale_reads(pair: &Pair) {
    const LOOPS: i64 = 150;
    let reader = pair.client().await;
    pair.set("serve_reads", "100").await;
    pair.warm_up(&reader).await;
    let before = pair.served().await;
    let stop = Arc::new(AtomicBool::new(false));
    // EXCLUSIVE lets readers in and keeps the feed's writes out: the shadow lags while it answers
    let holder = pair.shadow.connect("shop").await.unwrap();
    let (done, held_ms) = (stop.clone(), Arc::new(AtomicI64::new(0)));
    let counted = held_ms.clone();
    let holding = tokio::spawn(async move {
        while !done.load(Ordering::SeqCst) {
            holder.batch_execute("BEGIN; LOCK TABLE counter IN EXCLUSIVE MODE").await.unwrap();
            tokio::time::sleep(Duration::from_millis(250)).await;
            counted.fetch_add(250, Ordering::SeqCst);
            holder.batch_execute("COMMIT").await.unwrap();
            tokio::time::sleep(Duration::from_millis(60)).await;
        }
    });
    let mut writers = Vec::new();
    for id in 1..=4i32 {
        let client = pair.client().await;
        writers.push(tokio::spawn(async move {
            let write = client.prepare("UPDATE counter SET v = $2 WHERE id = $1").await.unwrap();
            let read = client.prepare("SELECT v FROM counter WHERE id = $1").await.unwrap();
            for round in 1..=LOOPS {
                client.execute(&write, &[&id, &round]).await.unwrap();
                for look in 0..3 {
                    let seen: i64 = client.query_one(&read, &[&id]).await.unwrap().get(0);
                    assert_eq!(seen, round, "client {id} read backwards, look {look}");
                    if look == 1 {
                        tokio::time::sleep(Duration::from_millis(fastrand::u64(0..30))).await;
                    }
                }
            }
        }));
    }
    let done = stop.clone();
    let reading = tokio::spawn(async move {
        while !done.load(Ordering::SeqCst) {
            // nobody changes item: any state of the shadow is as good
            assert_eq!(ask(&reader, "SELECT v FROM item WHERE id = 9").await, "90");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
    for writer in writers {
        writer.await.unwrap();
    }
    stop.store(true, Ordering::SeqCst);
    holding.await.unwrap();
    reading.await.unwrap();
    let served = pair.served().await - before;
    assert!(held_ms.load(Ordering::SeqCst) >= 500 && served > 200, "{served} reads served, feed held {held_ms:?} ms");
    assert!(pair.proxy.shadow().await.served.fenced > 0, "the fence kept reads on the owner");
    pair.set("serve_reads", "0").await;
}

/// Sessions that tell each other what they have written, a writer around understudy, and a feed that is held again and again.
async fn consistency(pair: &Pair) {
    const ROUNDS: i64 = 60;
    pair.set("serve_reads", "100").await;
    let sessions = pair.warm_sessions(4).await;
    let read = "SELECT v FROM counter WHERE id = 8";
    let around = pair.source.connect("shop").await.unwrap();
    let hold = pair.shadow.connect("shop").await.unwrap();

    // What `session` does not promise, so that the check below is known to be able to fail.
    hold.batch_execute("BEGIN; LOCK TABLE counter IN EXCLUSIVE MODE").await.unwrap();
    sessions[0].batch_execute("UPDATE counter SET v = -5 WHERE id = 8").await.unwrap();
    assert_eq!(ask(&sessions[0], read).await, "-5", "its own write");
    assert_eq!(ask(&sessions[1], read).await, "0", "another session's write, while the feed is held");
    // The shadow may stay behind as long as the bound says, then the owner answers.
    pair.set("consistency", "'bounded 300ms'").await;
    wait_until("the owner answers", Duration::from_secs(15), || async { ask(&sessions[1], read).await == "-5" }).await;
    hold.batch_execute("COMMIT").await.unwrap();
    let before = pair.served().await;
    wait_until("the shadow answers again", Duration::from_secs(15), || async {
        assert_eq!(ask(&sessions[1], read).await, "-5");
        pair.served().await > before
    })
    .await;

    pair.set("consistency", "global").await;
    let (before, stop) = (pair.proxy.shadow().await.served, Arc::new(AtomicBool::new(false)));
    let done = stop.clone();
    let holding = tokio::spawn(async move {
        while !done.load(Ordering::SeqCst) {
            hold.batch_execute("BEGIN; LOCK TABLE counter IN EXCLUSIVE MODE").await.unwrap();
            tokio::time::sleep(Duration::from_millis(40)).await;
            hold.batch_execute("COMMIT").await.unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    for round in 1..=ROUNDS {
        let writer = if round % 4 == 0 { &around } else { &sessions[round as usize % 4] };
        writer.batch_execute(&format!("UPDATE counter SET v = {round} WHERE id = 8")).await.unwrap();
        for reader in &sessions {
            assert_eq!(ask(reader, read).await, round.to_string(), "handed over in round {round}");
        }
    }
    stop.store(true, Ordering::SeqCst);
    holding.await.unwrap();
    let served = pair.proxy.shadow().await.served.reads - before.reads;
    assert!(served > ROUNDS as u64, "{served} of {} reads were served", 4 * ROUNDS);
    // A shadow that does not come to the position is not waited for beyond hedge_after.
    let hold = pair.shadow.connect("shop").await.unwrap();
    hold.batch_execute("BEGIN; LOCK TABLE counter IN EXCLUSIVE MODE").await.unwrap();
    pair.set("hedge_after", "200ms").await;
    around.batch_execute("UPDATE counter SET v = 777 WHERE id = 8").await.unwrap();
    let fenced = pair.proxy.shadow().await.served.fenced;
    assert_eq!(ask(&sessions[2], read).await, "777");
    assert!(pair.proxy.shadow().await.served.fenced > fenced);
    hold.batch_execute("COMMIT").await.unwrap();
    pair.set("hedge_after", "2s").await;
    pair.set("consistency", "session").await;
    pair.set("serve_reads", "0").await;
}

/// A table whose rows the feed holds back is not read on the shadow, whoever asks, and by whatever way.
async fn set_aside(pair: &Pair) {
    pair.set("serve_reads", "100").await;
    let client = pair.client().await;
    pair.warm_up(&client).await;
    let ways = ["SELECT sum(v) FROM aside", "SELECT sum(v) FROM public.aside", "SELECT sum(v) FROM onlooker", "SELECT sum_aside()"];
    client.batch_execute("INSERT INTO aside VALUES (1, 1)").await.unwrap();
    for way in ways {
        let before = pair.served().await;
        wait_until("it is served", Duration::from_secs(15), || async {
            assert_eq!(ask(&client, way).await, "1", "{way}");
            pair.served().await > before
        })
        .await;
    }
    pair.tamper("ALTER TABLE aside ADD CONSTRAINT small CHECK (v < 100)").await;
    client.batch_execute("INSERT INTO aside VALUES (2, 1000)").await.unwrap();
    let held = || async { !pair.proxy.shadow().await.feed.held_tables.is_empty() };
    for level in ["session", "global"] {
        pair.set("consistency", level).await;
        wait_until("the table is set aside", Duration::from_secs(30), || async {
            assert_eq!(ask(&client, ways[0]).await, "1001", "its own write");
            held().await
        })
        .await;
        for round in 0..20 {
            for way in ways {
                assert_eq!(ask(&client, way).await, "1001", "{way}, {level}, round {round}");
            }
        }
        let before = pair.served().await;
        wait_until("other tables are served", Duration::from_secs(15), || async {
            assert_eq!(ask(&client, "SELECT v FROM item WHERE id = 9").await, "90");
            pair.served().await > before
        })
        .await;
    }
    pair.set("consistency", "session").await;
    pair.tamper("ALTER TABLE aside DROP CONSTRAINT small").await;
    for proposal in pair.proxy.rows("SHOW PROPOSALS").await {
        if proposal["state"] == "pending" {
            pair.proxy.rows(&format!("APPROVE {}", proposal["id"])).await;
        }
    }
    wait_until("its rows are back", Duration::from_secs(30), || async { !held().await }).await;
    let before = pair.served().await;
    wait_until("it is served again", Duration::from_secs(15), || async {
        assert_eq!(ask(&client, ways[2]).await, "1001");
        pair.served().await > before
    })
    .await;
    // An answer that cannot be served does not stand in the way of those that can.
    let cannot = client.prepare("SELECT m FROM felt WHERE id = $1").await.unwrap();
    let can = client.prepare("SELECT v FROM item WHERE id = $1").await.unwrap();
    // the driver has asked the catalog about the type, which only the owner answers
    let before = pair.served().await;
    wait_until("prepared reads are served", Duration::from_secs(15), || async {
        client.query_one(&can, &[&9]).await.unwrap();
        pair.served().await > before
    })
    .await;
    let fallbacks = pair.proxy.shadow().await.served.fallbacks;
    let before = pair.served().await;
    for _ in 0..30 {
        client.query_one(&cannot, &[&1]).await.unwrap();
        assert_eq!(client.query_one(&can, &[&9]).await.unwrap().get::<_, i32>(0), 90);
    }
    assert!(pair.served().await > before + 20, "served {} of 30", pair.served().await - before);
    assert_eq!(pair.proxy.shadow().await.served.fallbacks, fallbacks, "{:?}", pair.proxy.shadow().await.served);
    pair.set("serve_reads", "0").await;
}

/// The share that was promised, not one that chance makes of it.
pub async fn shares(pair: &Pair) {
    const EACH: u64 = 1000;
    pair.set("serve_reads", "100").await;
    let sessions = pair.warm_sessions(4).await;
    pair.set("serve_reads", "25").await;
    let before = pair.proxy.shadow().await.served;
    for client in &sessions {
        for _ in 0..EACH {
            assert_eq!(ask(client, "SELECT 1").await, "1");
        }
    }
    let now = pair.proxy.shadow().await.served;
    let (all, served) = (4 * EACH, now.reads - before.reads);
    assert_eq!(now.fallbacks, before.fallbacks);
    let percent = 100.0 * served as f64 / all as f64;
    assert!((percent - 25.0).abs() <= 0.5, "{served} of {all} were served: {percent} % instead of 25");
    pair.set("serve_reads", "0").await;
}

async fn compared(pair: &Pair) {
    let client = pair.client().await;
    pair.set("sample_reads", "100").await;
    let start = pair.proxy.shadow().await.compare;
    // concurrent updates: what moves is not different
    let mut clients = Vec::new();
    for id in 1..=3i32 {
        let client = pair.client().await;
        clients.push(tokio::spawn(async move {
            for round in 0..120i64 {
                client.execute("UPDATE counter SET v = $2 WHERE id = $1", &[&id, &round]).await.unwrap();
                client.query("SELECT id, v FROM counter ORDER BY id", &[]).await.unwrap();
                client.query("SELECT sum(v) FROM counter", &[]).await.unwrap();
            }
        }));
    }
    for client in clients {
        client.await.unwrap();
    }
    let began = Instant::now();
    loop {
        let now = pair.proxy.shadow().await.compare;
        if now.same > start.same + 20 && now.same + now.different + now.undecided + now.dropped >= now.sampled {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(20), "comparisons are not decided: {now:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let calm = pair.proxy.shadow().await.compare;
    assert_eq!(calm.different, start.different, "a false alarm: {:?}", calm.examples);

    const TEXT: &str = "SELECT note FROM item WHERE id = 55";
    pair.tamper("UPDATE item SET note = 'rotten quince' WHERE id = 55").await;
    wait_until("the corrupted row is found", Duration::from_secs(15), || async {
        assert_eq!(ask(&client, TEXT).await, "note 55", "the client gets the source's answer");
        pair.proxy.shadow().await.compare.different > calm.different
    })
    .await;
    // a prepared statement's answer comes without a description of its columns
    let read = client.prepare("SELECT id, note FROM item WHERE id = $1").await.unwrap();
    let found = pair.proxy.shadow().await.compare.different;
    wait_until("and through a prepared statement", Duration::from_secs(15), || async {
        assert_eq!(client.query_one(&read, &[&55]).await.unwrap().get::<_, String>(1), "note 55");
        pair.proxy.shadow().await.compare.different > found
    })
    .await;
    let fingerprint = format!("{:016x}", Classifier::new(CatalogFacts::default()).classify(TEXT.as_bytes()).fingerprint);
    let shown = serde_json::to_string(&pair.proxy.rows("SHOW MISMATCHES").await).unwrap();
    assert!(shown.contains(&fingerprint) && shown.contains("different values"), "{fingerprint}: {shown}");
    for value in ["rotten", "quince", "note 55", "= 55"] {
        assert!(!shown.contains(value), "{value} is shown: {shown}");
        assert!(!pair.proxy.log_text().contains(value), "{value} is in the log");
    }
    let verified = pair.proxy.tell("VERIFY pg18 TABLE item").await;
    assert_eq!(verified.code, 1, "{}", verified.stderr);
    assert!(verified.stderr.contains("id=55") && !verified.stderr.contains("quince"), "{}", verified.stderr);
    pair.proxy.tell("VERIFY pg18 TABLE item REPAIR").await;
    let verified = pair.proxy.tell("VERIFY pg18 TABLE item").await;
    assert_eq!(verified.code, 0, "{}", verified.stderr);
    pair.set("sample_reads", "0").await;
}

/// Median latency in microseconds of a fixed mix; every statement must succeed.
async fn median(clients: &[Client]) -> u128 {
    let each = clients.iter().enumerate().map(|(id, client)| async move {
        let mut latencies = Vec::new();
        for round in 0..60i64 {
            let began = Instant::now();
            if round % 4 == 0 {
                client.execute("UPDATE counter SET v = $2 WHERE id = $1", &[&(id as i32 + 1), &round]).await.unwrap();
            } else {
                assert_eq!(client.query("SELECT id, v, note FROM item WHERE id <= 20 ORDER BY id", &[]).await.unwrap().len(), 20);
            }
            latencies.push(began.elapsed().as_micros());
        }
        latencies
    });
    let mut all: Vec<u128> = futures_util::future::join_all(each).await.into_iter().flatten().collect();
    all.sort_unstable();
    all[all.len() / 2]
}

/// Last: the shadow does not survive it.
pub async fn cannot_hurt(pair: &Pair) {
    let clients = [pair.client().await, pair.client().await, pair.client().await, pair.client().await];
    median(&clients).await;
    let calm = median(&clients).await;
    pair.set("sample_reads", "100").await;
    pair.set("mirror_writes", "rehearse").await;
    median(&clients).await;
    wait_until("writes are rehearsed", Duration::from_secs(20), || async {
        let rehearsed = pair.proxy.shadow().await.rehearsal;
        rehearsed.transactions > 0 || !rehearsed.left_out.is_empty() || !rehearsed.undecided.is_empty()
    })
    .await;
    let sampled = pair.proxy.shadow().await.compare.sampled;
    let bound = 3 * calm + 3_000;
    pair.shadow.pause().unwrap();
    for round in 0..3 {
        let now = median(&clients).await;
        assert!(now <= bound, "round {round}: median {now} µs with a frozen shadow, {calm} µs without");
        let held = pair.proxy.metric("understudy_traffic_copies_bytes");
        assert!(held <= MEMORY_MAX, "shadow work holds {held} bytes");
    }
    let compare = pair.proxy.shadow().await.compare;
    assert!(compare.sampled >= sampled + 400, "copies went on being made: {compare:?}");
    pair.shadow.kill9().unwrap();
    for round in 0..3 {
        let now = median(&clients).await;
        assert!(now <= bound, "round {round}: median {now} µs with a dead shadow, {calm} µs without");
    }
    assert!(pair.proxy.metric("understudy_traffic_copies_bytes") <= MEMORY_MAX);
    for client in &clients {
        assert_eq!(ask(client, "SELECT v FROM item WHERE id = 2").await, "20");
    }
}
