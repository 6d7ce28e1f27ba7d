//! What operators do to a running proxy: replace the process under load, have sessions connect anew, learn that a server is down.

#[path = "cutover/stage.rs"]
mod stage;
mod support;

use stage::Stage;
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio_postgres::Client;

/// Clients that connect for each statement, and clients that stay: what each was answered is counted, any error is kept.
struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    tasks: Vec<tokio::task::JoinHandle<Result<(), String>>>,
}

impl Load {
    fn start(stage: &Stage) -> Self {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut tasks = Vec::new();
        for number in 0..8 {
            let (config, stop, done) = (stage.url("app", "shop"), stop.clone(), done.clone());
            tasks.push(tokio::spawn(async move {
                let mut client: Option<Client> = None;
                while !stop.load(Ordering::SeqCst) {
                    if number % 2 == 0 || client.is_none() {
                        client = Some(stage::connect(config.clone()).await.map_err(|error| format!("connect: {error:?}"))?);
                    }
                    let Some(client) = &client else { continue };
                    let row = client.query_one("UPDATE account SET n = n + 1 WHERE writer = $1 RETURNING n", &[&number]).await;
                    row.map_err(|error| format!("statement: {error:?}"))?;
                    done.fetch_add(1, Ordering::SeqCst);
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                Ok(())
            }));
        }
        Load { stop, done, tasks }
    }

    /// Waits for more answers.
    async fn more(&self, count: u64) {
        let from = self.done.load(Ordering::SeqCst);
        while self.done.load(Ordering::SeqCst) < from + count && self.tasks.iter().all(|task| !task.is_finished()) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn end(self) -> u64 {
        self.stop.store(true, Ordering::SeqCst);
        for task in self.tasks {
            task.await.unwrap().unwrap();
        }
        self.done.load(Ordering::SeqCst)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_process_takes_over_without_an_error() {
    takes_over(Stage::new().await).await;
}

/// Two processes, each with a pool of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_process_takes_over_from_pools() {
    let stage = Stage::new().await;
    stage.edit("proxy.toml", |text| {
        let pool = "pool_mode = \"transaction\"\n[proxy.pool]\nsize = 3\nqueue_timeout = \"60s\"\n\
                    [proxy.auth]\nusers = \"query\"\nrules = [\"host all all 127.0.0.1/32 trust\"]\n[[database]]\n";
        text.replacen("[[database]]\n", pool, 1)
    });
    takes_over(stage).await;
}

async fn takes_over(stage: Stage) {
    let first = stage.start(None).await;
    stage.must("SHADOW START pg18").await;
    stage.wait_streaming().await;
    let load = Load::start(&stage);
    load.more(50).await;
    let stays = stage.client().await;

    // One that cannot go on (another listen address) changes nothing.
    stage.edit("other.toml", |text| text.replacen("listen = \"127.0.0.1:", "listen = \"127.0.0.2:", 1));
    let failing = stage.spawn(None, "other.toml", &["--takeover"]);
    assert_eq!(stage.wait_for_death(failing).await, Some(3));
    stage.wait_log("did not become ready", 1).await;
    stage.wait_streaming().await;
    load.more(50).await;

    // Without the flag it is a mistake.
    let second = stage.spawn(None, "proxy.toml", &[]);
    assert_eq!(stage.wait_for_death(second).await, Some(3));

    stage.must("PAUSE shop").await;
    let paused = stage.spawn(None, "proxy.toml", &["--takeover"]);
    assert_eq!(stage.wait_for_death(paused).await, Some(3));
    stage.wait_log("does not hand over: shop is paused", 1).await;
    stage.must("RESUME shop").await;

    let second = stage.spawn(None, "proxy.toml", &["--takeover"]);
    stage.wait_log("the new process is ready", 1).await;
    load.more(100).await;
    stage.wait_streaming().await;

    // A session of the old process: its cancel request arrives at the new one.
    let cancel = stays.cancel_token();
    let sleeping = stays.batch_execute("SELECT pg_sleep(60)");
    let cancelling = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        cancel.cancel_query(tokio_postgres::NoTls).await.unwrap();
    };
    let (cancelled, ()) = tokio::join!(sleeping, cancelling);
    assert_eq!(cancelled.unwrap_err().code().unwrap().code(), "57014");

    // One writer: not while another process has sessions.
    let refused = stage.tell("CUTOVER pg18").await.unwrap_err();
    assert!(refused.contains("still serves") && refused.contains("sessions"), "{refused}");

    drop(stays);
    let done = load.end().await;
    assert_eq!(stage.wait_for_death(first).await, Some(0), "{}", stage.log());
    stage.must("CUTOVER pg18").await;
    let client = stage.client().await;
    let counted = stage::numbers(&client, "SELECT sum(n)::int8 FROM account").await;
    assert_eq!(counted, [i64::try_from(done).unwrap()], "what was acknowledged, once");
    stage.verify("after a takeover").await;
    second.kill();
}

async fn backend(client: &Client) -> i64 {
    stage::numbers(client, "SELECT pg_backend_pid()::int8").await[0]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_connect_anew_and_servers_are_watched() {
    let stage = Stage::new().await;
    let proxy = stage.start(None).await;
    let (idle, busy) = (stage.client().await, stage.client().await);
    idle.batch_execute("SET work_mem = '7MB'; SET application_name = 'kept'").await.unwrap();
    let prepared = idle.prepare("SELECT $1::int8 + 1").await.unwrap();
    busy.batch_execute("BEGIN").await.unwrap();
    let (idle_before, busy_before) = (backend(&idle).await, backend(&busy).await);

    let told = stage.tell("RECONNECT shop").await;
    assert!(told.is_ok(), "{told:?}");
    let idle_after = backend(&idle).await;
    assert_ne!(idle_before, idle_after, "an idle session has a new connection");
    assert_eq!(idle.query_one(&prepared, &[&41_i64]).await.unwrap().get::<_, i64>(0), 42);
    let settings = idle.query_one("SELECT current_setting('work_mem'), current_setting('application_name')", &[]).await.unwrap();
    assert_eq!((settings.get::<_, &str>(0), settings.get::<_, &str>(1)), ("7MB", "kept"));
    assert_eq!(backend(&busy).await, busy_before, "an open transaction keeps its own");
    busy.batch_execute("COMMIT").await.unwrap();
    assert_ne!(backend(&busy).await, busy_before);
    assert!(stage.tell("RECONNECT nothing").await.unwrap_err().contains("SHOW DATABASES"));

    let wait = async |state: &str| {
        for _ in 0..600 {
            let servers = stage.must("SHOW SERVERS").await;
            if servers.iter().any(|row| row["server"] == "pg18" && row["state"] == state) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("SHOW SERVERS never said {state}: {:?}", stage.must("SHOW SERVERS").await);
    };
    wait("up").await;
    stage.shadow.stop(support::Shutdown::Immediate).unwrap();
    wait("down").await;
    let alerts = stage.must("SHOW ALERTS").await;
    let told = alerts.iter().filter(|row| row["message"].contains("shadow pg18 of shop at") && row["message"].contains("does not answer"));
    assert_eq!(told.count(), 1, "{alerts:?}");
    assert_eq!(stage::numbers(&idle, "SELECT 1::int8").await, [1]);
    stage.shadow.restart().unwrap();
    wait("up").await;
    stage.wait_log("shadow pg18 of shop at 127.0.0.1", 2).await;
    proxy.kill();
}
