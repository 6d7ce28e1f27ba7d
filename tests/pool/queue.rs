//! Who waits for a connection, and what a cancel hits.

use crate::{
    harness::{ask, wait_until},
    raw::{PATIENCE, Raw, Request, codes, tags},
    stage::Stage,
    support::find_client,
};
use bytes::BytesMut;
use std::process::{Command, Stdio};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use understudy::wire::{backend::ErrorFields, frontend};

async fn cancel(stage: &Stage, raw: &Raw) {
    let mut request = BytesMut::new();
    frontend::put_cancel(&mut request, raw.key.0, &raw.key.1);
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", stage.proxy.listen)).await.unwrap();
    stream.write_all(&request).await.unwrap();
    let _ = tokio::time::timeout(PATIENCE, stream.read(&mut [0; 8])).await.expect("closed when it is done");
}

pub async fn order(stage: &Stage) {
    let mut holder = stage.raw().await;
    holder.query("BEGIN").await;
    let mut waiters = Vec::new();
    stage
        .direct()
        .await
        .batch_execute("CREATE TABLE IF NOT EXISTS came (n serial, who int); GRANT ALL ON came, came_n_seq TO PUBLIC")
        .await
        .unwrap();
    for k in 0..6 {
        let mut raw = stage.raw().await;
        let text = format!("INSERT INTO came (who) VALUES ({k})");
        let request = match k % 2 {
            0 => Request::new().query(text),
            _ => Request::new().parse("", text, &[]).bind("", "", &[], &[], &[]).execute("", 0).sync(),
        };
        raw.send(&request.0).await;
        waiters.push(raw);
        stage.until("cl_waiting", k + 1).await;
    }
    // two of them change their mind; one more goes away
    for k in [1, 4] {
        cancel(stage, &waiters[k]).await;
        let seen = waiters[k].until_ready(1).await;
        assert_eq!((tags(&seen).as_str(), codes(&seen)), ("EZ", vec!["57014".to_owned()]));
    }
    stage.until("cl_waiting", 4).await;
    holder.query("COMMIT").await;
    for k in [0, 2, 3, 5] {
        assert!(tags(&waiters[k].until_ready(1).await).ends_with("CZ"));
    }
    let client = stage.client().await;
    assert_eq!(ask(&client, "SELECT string_agg(who::text, ',' ORDER BY n) FROM came").await, "0,2,3,5");
    // who was refused goes on
    assert_eq!(tags(&waiters[1].query("SELECT 1").await), "TDCZ");
    assert_eq!(tags(&waiters[4].query("SELECT 1").await), "TDCZ");
    stage.until("sv_idle", 1).await;
}

pub async fn timeout(stage: &Stage) {
    stage.proxy.edit("queue_timeout = \"60s\"", "queue_timeout = \"300ms\"");
    stage.proxy.rows("RELOAD").await;
    let mut holder = stage.raw().await;
    holder.query("BEGIN").await;
    let mut waiting = stage.raw().await;
    let batch = Request::new().parse("", "SELECT 1", &[]).bind("", "", &[], &[], &[]).execute("", 0).sync();
    for request in [Request::new().query("SELECT 1"), batch] {
        waiting.send(&request.0).await;
        let seen = waiting.until_ready(1).await;
        assert_eq!(tags(&seen), "EZ");
        let fields = ErrorFields::parse(&seen[0].body);
        assert_eq!((fields.severity.as_str(), fields.code.as_str()), ("ERROR", "53300"));
        assert!(fields.message.contains("app@shop") && fields.message.contains("0.3 s") && fields.message.contains("1 of 1"), "{fields:?}");
    }
    holder.query("COMMIT").await;
    assert_eq!(tags(&waiting.query("SELECT 1").await), "TDCZ");
    stage.proxy.edit("queue_timeout = \"300ms\"", "queue_timeout = \"60s\"");
    stage.proxy.rows("RELOAD").await;
}

/// One connection, two clients: the cancel of the one must not hit the other.
pub async fn cancels(stage: &Stage) {
    let (mut one, mut two) = (stage.raw().await, stage.raw().await);
    one.send(&Request::new().query("SELECT pg_sleep(100)").0).await;
    let direct = stage.direct().await;
    let sleeping =
        "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(100)%' AND state = 'active' AND pid <> pg_backend_pid()";
    wait_until("it sleeps", PATIENCE, || async { ask(&direct, sleeping).await == "1" }).await;
    cancel(stage, &two).await;
    assert_eq!(ask(&direct, sleeping).await, "1", "a client that has no connection has nothing to cancel");
    cancel(stage, &one).await;
    assert_eq!(codes(&one.until_ready(1).await), ["57014"]);
    // cancels at any moment, while the other uses the connection: it never sees one
    for round in 0..60 {
        one.send(&Request::new().query("SELECT 1").0).await;
        let other = async {
            for _ in 0..3 {
                assert_eq!(codes(&two.query("SELECT pg_sleep(0.001)").await), [""; 0], "round {round}: hit by another's cancel");
            }
        };
        let mut request = BytesMut::new();
        frontend::put_cancel(&mut request, one.key.0, &one.key.1);
        let canceller = async {
            let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", stage.proxy.listen)).await.unwrap();
            stream.write_all(&request).await.unwrap();
        };
        futures_util::join!(other, canceller);
        one.until_ready(1).await;
    }
}

/// 200 clients over five connections.
pub async fn pgbench(stage: &Stage) {
    let url = stage.proxy.through(&stage.server.app_url("shop"));
    let program = |arguments: &[&str]| {
        let mut command = Command::new(find_client("pgbench").unwrap());
        command.args(["-h", "127.0.0.1", "-p", &url.port.to_string(), "-U", &url.user]).args(arguments).arg("shop");
        command.stdin(Stdio::null()).env("LC_ALL", "C.UTF-8");
        let output = command.output().unwrap();
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{arguments:?}: {text}");
        text
    };
    tokio::task::block_in_place(|| program(&["-i", "-q", "-s", "1"]));
    // a thread per client: pgbench waits for the answer to a Parse, and with it all clients of its thread, who may hold connections
    for mode in ["simple", "extended", "prepared"] {
        let text = tokio::task::block_in_place(|| program(&["-n", "-M", mode, "-c", "200", "-j", "200", "-t", "10"]));
        assert!(text.contains("actually processed: 2000/2000"), "{mode}: {text}");
    }
    let client = stage.client().await;
    assert_eq!(ask(&client, "SELECT count(*) FROM pgbench_history").await, "6000");
    let balanced = "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(delta) FROM pgbench_history)
        AND (SELECT sum(bbalance) FROM pgbench_branches) = (SELECT sum(delta) FROM pgbench_history)";
    assert_eq!(ask(&client, balanced).await, "t");
    let connections = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app'";
    assert!(ask(&stage.direct().await, connections).await.parse::<u32>().unwrap() <= 5);
}
