//! The profile of a shadow, the ladder's settings and the simulated cutover, with the real program in front of real servers.

#[path = "proxy/harness.rs"]
mod harness;
mod support;

use harness::{Proxy, connect, database_text, get, section, url_text, wait_until};
use serde_json::Value;
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};
use support::{Options, Server};

/// For a condition on a slow, loaded machine.
const PATIENCE: Duration = Duration::from_secs(100);
const SCHEMA: &str = "
    CREATE TABLE item (id int PRIMARY KEY, v int NOT NULL);
    INSERT INTO item SELECT k, k * 10 FROM generate_series(1, 1000) k;
    CREATE TABLE orders (id int PRIMARY KEY, customer int NOT NULL, total int NOT NULL);
    INSERT INTO orders SELECT k, k / 10, k % 100 FROM generate_series(1, 200000) k;
    CREATE INDEX orders_customer ON orders (customer);
    ANALYZE;
";
const BY_CUSTOMER: &str = "SELECT sum(total)::int8 FROM orders WHERE customer = $1";
const BY_KEY: &str = "SELECT v FROM item WHERE id = $1";

/// One source of 15 with two shadows on one server of 18: one loses an index, the other has another setting.
struct Stage {
    proxy: Proxy,
    source: Server,
    shadow: Server,
}

impl Stage {
    async fn start() -> Stage {
        let source = Server::start(15, Options::default()).await.unwrap();
        let shadow = Server::start_like(&source, 18, Options::default()).await.unwrap();
        source.create_database("shop").await.unwrap();
        connect(&source.app_url("shop")).await.batch_execute(SCHEMA).await.unwrap();
        let mut text = database_text(&source);
        for (name, database) in [("pg18", "shop"), ("tuned", "tuned")] {
            shadow.create_database(database).await.unwrap();
            text.push_str(&format!(
                "\n[[database.shadow]]\nname = \"{name}\"\nurl = \"{}\"\nsample_reads = 0.0\nhedge_after = \"10s\"\n[database.shadow.revert]\n\
                 window = \"2s\"\nmin_requests = 1000000\nerror_rate = 100.0\nlatency_ratio = 100000.0\nmax_lag = \"1h\"\n\
                 [database.shadow.shift]\nsteps = [50, 100]\nhold = \"1h\"\n",
                url_text(&shadow.superuser_url(database))
            ));
        }
        let proxy = Proxy::start("profile", "[proxy.profile]\ninterval = \"500ms\"\nretention = \"2h\"", &text);
        for name in ["pg18", "tuned"] {
            proxy.rows(&format!("SHADOW START {name}")).await;
        }
        let stage = Stage { proxy, source, shadow };
        wait_until("both shadows are in step", PATIENCE, || async {
            let shadows = stage.proxy.state().await.databases.remove(0).shadows;
            shadows.iter().all(|shadow| shadow.health == "healthy" && shadow.feed.state == "streaming")
        })
        .await;
        let on_shadow = stage.shadow.connect("shop").await.unwrap();
        on_shadow.batch_execute("DROP INDEX orders_customer; ANALYZE").await.unwrap();
        let on_tuned = stage.shadow.connect("tuned").await.unwrap();
        on_tuned.batch_execute("ALTER DATABASE tuned SET work_mem = '77MB'; ANALYZE").await.unwrap();
        stage
    }

    async fn set(&self, shadow: &str, knob: &str, value: &str) {
        self.proxy.rows(&format!("SET {shadow} {knob} = {value}")).await;
    }

    async fn statement(&self, shadow: &str, part: &str) -> Option<Value> {
        let rows = self.proxy.rows("SHOW PROFILE").await;
        rows.into_iter().find(|row| row["shadow"] == shadow && row["query"].as_str().is_some_and(|text| text.contains(part)))
    }

    async fn served(&self) -> u64 {
        self.proxy.shadow().await.served.reads
    }
}

/// A column of several kinds of values comes as text.
fn number(value: &Value) -> Option<f64> {
    value.as_f64().or_else(|| value.as_str()?.parse().ok())
}

/// Clients that read and write until they are told to stop.
struct Load {
    stop: Arc<AtomicBool>,
    errors: Arc<AtomicU64>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    async fn start(stage: &Stage) -> Load {
        let (stop, errors) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut tasks = Vec::new();
        for number in 0..4 {
            let client = connect(&stage.proxy.through(&stage.source.app_url("shop"))).await;
            let (stop, errors) = (stop.clone(), errors.clone());
            tasks.push(tokio::spawn(async move {
                let (by_customer, by_key) = (client.prepare(BY_CUSTOMER).await.unwrap(), client.prepare(BY_KEY).await.unwrap());
                for round in number.. {
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                    let mut outcome = client.query_one(&by_key, &[&(1 + round % 1000)]).await.map(|_| ());
                    if round % 4 == 0 {
                        outcome = outcome.and(client.query_one(&by_customer, &[&(round % 20_000)]).await.map(|_| ()));
                    }
                    if round % 16 == 0 && number == 0 {
                        outcome =
                            outcome.and(client.execute("UPDATE item SET v = v + 0 WHERE id = $1", &[&(1 + round % 7)]).await.map(|_| ()));
                    }
                    errors.fetch_add(u64::from(outcome.is_err()), Ordering::SeqCst);
                    tokio::time::sleep(Duration::from_millis(4)).await;
                }
            }));
        }
        Load { stop, errors, tasks }
    }

    async fn end(self) {
        self.stop.store(true, Ordering::SeqCst);
        for task in self.tasks {
            task.await.unwrap();
        }
        assert_eq!(self.errors.load(Ordering::SeqCst), 0, "no client saw an error");
    }
}

/// A statement that lost its index is found slower beyond chance, with the plans and what would help; the other is not.
async fn slower_statements(stage: &Stage) {
    stage.set("pg18", "sample_reads", "100").await;
    stage.set("tuned", "sample_reads", "100").await;
    let why = |row: &Option<Value>| row.as_ref().and_then(|row| row["why"].as_str()).unwrap_or_default().to_owned();
    wait_until("the slower statement is explained", PATIENCE, || async { !why(&stage.statement("pg18", "FROM orders").await).is_empty() })
        .await;
    let found = stage.statement("pg18", "FROM orders").await.unwrap();
    assert_eq!(found["verdict"], "slower", "{found}");
    assert!(found["ratio_low"].as_f64().unwrap() > 1.2, "{found}");
    let why = why(&Some(found));
    for expected in
        ["Seq Scan", "orders_customer", "missing index, which the source uses for it: CREATE INDEX orders_customer ON public.orders"]
    {
        assert!(why.contains(expected), "{expected}: {why}");
    }
    let events = stage.proxy.rows("SHOW EVENTS").await;
    let told = events.iter().filter(|event| event["message"].as_str().is_some_and(|text| text.contains("times slower on pg18"))).count();
    assert_eq!(told, 1, "told once");
    wait_until("answers prove the other statement", PATIENCE, || async {
        stage.statement("pg18", "FROM item").await.is_some_and(|row| row["verdict"] == "proven")
    })
    .await;
}

async fn resources(stage: &Stage) {
    wait_until("both servers are measured", PATIENCE, || async {
        let rows = stage.proxy.rows("SHOW RESOURCES").await;
        let measured = |server: &str| {
            rows.iter()
                .filter(|row| row["server"] == server && row["connections"].as_u64() > Some(0) && row["cpu_cores"].is_number())
                .count()
        };
        measured("source") >= 2 && measured("pg18") >= 2 && measured("tuned") >= 2
    })
    .await;
}

/// The shadows beside each other: what differs is the index and the setting.
async fn what_if(stage: &Stage) {
    wait_until("enough pairs on both shadows", PATIENCE, || async {
        let rows = stage.proxy.rows("SHOW WHAT IF").await;
        rows.iter().any(|row| row["section"] == "traffic" && number(&row["pg18"]).is_some() && number(&row["tuned"]).is_some())
    })
    .await;
    let rows = stage.proxy.rows("SHOW WHAT IF").await;
    let find = |section: &str, part: &str| {
        let found = rows.iter().find(|row| row["section"] == section && row["what"].as_str().is_some_and(|text| text.contains(part)));
        found.unwrap_or_else(|| panic!("{section} {part}: {rows:#?}")).clone()
    };
    let index = find("index", "orders");
    assert_eq!(
        (index["source"].as_str(), index["pg18"].as_str(), index["tuned"].as_str()),
        (Some("orders_customer"), Some("none"), Some("orders_customer"))
    );
    let setting = find("setting", "work_mem");
    assert!(setting["tuned"].as_str().unwrap().starts_with("78848") && setting["tuned"] != setting["pg18"], "{setting}");
    let ratio = find("ratio", "FROM orders");
    assert!(number(&ratio["pg18"]) > number(&ratio["tuned"]), "{ratio}");
    stage.set("tuned", "sample_reads", "0").await;
}

/// Two levels of load make a forecast; it is kept, and the truth is found out later.
async fn forecast(stage: &Stage) {
    let now = || async { stage.proxy.rows("SHOW FORECAST").await.into_iter().find(|row| row["shadow"] == "pg18" && row["made"] == "now") };
    // What comparing can keep up with depends on the machine: the share that makes a second level of load is looked for.
    let began = std::time::Instant::now();
    let mut shares = ["40", "20", "10", "5"].iter().cycle();
    while now().await.is_none() {
        assert!(began.elapsed() < PATIENCE, "no forecast: {:?}", stage.proxy.rows("SHOW FORECAST").await);
        let began = std::time::Instant::now();
        stage.set("pg18", "sample_reads", shares.next().unwrap()).await;
        while began.elapsed() < Duration::from_secs(8) && now().await.is_none() {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
    let found = now().await.unwrap();
    let value = |key: &str| found[key].as_f64().unwrap_or_else(|| panic!("{key}: {found}"));
    assert!(value("p99_low_ms") <= value("p99_ms") && value("p99_ms") <= value("p99_high_ms"), "{found}");
    stage.set("pg18", "serve_reads", "50").await;
    let kept = || async {
        let rows = stage.proxy.rows("SHOW FORECAST").await;
        rows.into_iter()
            .find(|row| row["shadow"] == "pg18" && row["made"] != "now" && row["made_at_percent"] == 50.0 && row["for_percent"] == 100.0)
    };
    wait_until("a forecast is kept", PATIENCE, || async { kept().await.is_some() }).await;
    stage.set("pg18", "serve_reads", "100").await;
    wait_until("its truth is found out", PATIENCE, || async {
        kept().await.is_some_and(|row| row["truth_p99_ms"].is_number() && row["held"].is_boolean())
    })
    .await;
    stage.set("pg18", "serve_reads", "0").await;
    stage.set("pg18", "sample_reads", "100").await;
}

/// `order = "proven"`: before the last step only statements that sampling has proven are served.
async fn proven_first(stage: &Stage) {
    stage.set("pg18", "shift.order", "proven").await;
    stage.set("pg18", "shift.steps", "[99, 100]").await;
    stage.proxy.rows("SHIFT START pg18").await;
    let client = connect(&stage.proxy.through(&stage.source.app_url("shop"))).await;
    let (by_customer, by_key) = (client.prepare(BY_CUSTOMER).await.unwrap(), client.prepare(BY_KEY).await.unwrap());
    let before = stage.served().await;
    wait_until("the proven one is served", PATIENCE, || async {
        client.query_one(&by_key, &[&1]).await.unwrap();
        stage.served().await > before
    })
    .await;
    let before = stage.served().await;
    for customer in 0..200 {
        client.query_one(&by_customer, &[&customer]).await.unwrap();
    }
    assert_eq!(stage.served().await, before, "the slower one waits for the last step");
    stage.proxy.rows("REVERT pg18").await;
    stage.set("pg18", "shift.order", "all").await;
}

async fn quiet_hours(stage: &Stage) {
    stage.proxy.edit("hold = \"1h\"", "hold = \"1h\"\ntimezone = \"UTC\"\nquiet = [\"daily 00:00-24:00\"]");
    stage.proxy.rows("RELOAD").await;
    let refused = stage.proxy.tell("SHIFT START pg18").await;
    assert_eq!(refused.code, 1, "{refused:?}");
    assert!(refused.stderr.contains("quiet hours \"daily 00:00-24:00\"") && refused.stderr.contains("in UTC"), "{}", refused.stderr);
    stage.proxy.edit("quiet = [\"daily 00:00-24:00\"]", "quiet = []");
    stage.proxy.rows("RELOAD").await;
}

/// Go while all is well; no-go with the reasons when a session cannot be moved and an answer differs.
async fn simulation(stage: &Stage, load: Load) {
    let find = |rows: &[Value], section: &str, part: &str| -> Option<Value> {
        rows.iter().find(|row| row["section"] == section && row["what"].as_str().is_some_and(|text| text.contains(part))).cloned()
    };
    stage.set("pg18", "sample_reads", "0").await;
    // the first reads of a session open its connection to the shadow; on a slow machine that takes a moment
    let rows = stage.proxy.rows("SIMULATE CUTOVER pg18 AT 50 FOR '8s'").await;
    assert!(find(&rows, "verdict", "go").is_some_and(|row| row["what"] == "go"), "{rows:#?}");
    assert!(find(&rows, "remark", "slower").is_some() && find(&rows, "statement", "FROM orders").is_some(), "{rows:#?}");
    let report = &stage.proxy.rows("SHOW REPORT").await[0]["document"];
    let report: Value = serde_json::from_str(report.as_str().unwrap_or("null")).unwrap_or_else(|_| report.clone());
    let count = |key: &str| report[key].as_u64().unwrap_or_else(|| panic!("{key}: {report:#}"));
    assert!(count("served") > 0 && count("same") > 0 && count("rehearsed") > 0 && count("different") == 0, "{report:#}");
    assert!(report["pause"]["low_ms"].as_f64() > Some(0.0) && report["pause"]["high_ms"].as_f64() >= report["pause"]["low_ms"].as_f64());
    let (status, page) = get(stage.proxy.http, "/report/pg18").unwrap();
    assert!(status == 200 && page.contains("Readiness: <span class=\"go\">go") && !page.contains("__NONCE__"), "{page}");
    let (status, document) = get(stage.proxy.http, "/api/report/pg18").unwrap();
    assert!(status == 200 && serde_json::from_str::<Value>(&document).unwrap()["go"] == true, "{document}");
    assert_eq!(get(stage.proxy.http, "/report/nobody").unwrap().0, 404);
    let shadow = stage.proxy.shadow().await;
    assert_eq!((shadow.serve_reads, shadow.sample_reads, shadow.mirror_writes.as_str()), (0.0, 0.0, "off"), "all is as it was before");

    let pinned = connect(&stage.proxy.through(&stage.source.app_url("shop"))).await;
    pinned.batch_execute("CREATE TEMPORARY TABLE mine (id int)").await.unwrap();
    let tampering = stage.shadow.connect("shop").await.unwrap();
    tampering
        .batch_execute("BEGIN; SET LOCAL session_replication_role = replica; UPDATE item SET v = -1 WHERE id > 500; COMMIT")
        .await
        .unwrap();
    stage.set("pg18", "sample_reads", "100").await;
    let rows = stage.proxy.rows("SIMULATE CUTOVER pg18 AT 20 FOR '8s'").await;
    assert!(find(&rows, "verdict", "no-go").is_some(), "{rows:#?}");
    assert!(find(&rows, "blocker", "temporary table").is_some() && find(&rows, "blocker", "answers differ").is_some(), "{rows:#?}");
    assert!(get(stage.proxy.http, "/report/pg18").unwrap().1.contains("class=\"no\">no-go"));
    load.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_operator_knows_before_moving() {
    let stage = Stage::start().await;
    let load = Load::start(&stage).await;
    section("slower statements are found and explained", slower_statements(&stage)).await;
    section("both servers' resources are kept", resources(&stage)).await;
    section("shadows are compared with each other", what_if(&stage)).await;
    section("a forecast and its truth", forecast(&stage)).await;
    section("proven statements move first", async {
        load.stop.store(true, Ordering::SeqCst);
        proven_first(&stage).await
    })
    .await;
    section("quiet hours", quiet_hours(&stage)).await;
    load.end().await;
    let load = Load::start(&stage).await;
    section("the simulated cutover ends with a report", simulation(&stage, load)).await;
}
