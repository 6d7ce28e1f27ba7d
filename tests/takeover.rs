//! A new process takes over from the running one under load: no client is refused or dropped, the feed goes on, cancels reach the
//! session wherever it is, and a new process that fails changes nothing.

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
    let stage = Stage::new().await;
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
