//! A shadow behind a transaction pool, and the pool that follows the owner of the writes.

use crate::{
    harness::{ask, wait_until},
    shadow::Pair,
    stage::{AUTH, PATIENCE},
};
use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

const CLIENTS: usize = 40;
/// Every client writes at least this often on each side of a move.
const ROUNDS: usize = 5;

/// Tables of the crowd.
pub const TABLES: &str = "
    CREATE TABLE ledger (client int, round int, PRIMARY KEY (client, round));
    CREATE SCHEMA odd; CREATE SCHEMA even;
    CREATE TABLE odd.whose (name text PRIMARY KEY); INSERT INTO odd.whose VALUES ('odd');
    CREATE TABLE even.whose (name text PRIMARY KEY); INSERT INTO even.whose VALUES ('even');
";

/// Of proxy.toml, before the database.
pub fn pool(size: usize) -> String {
    format!("[proxy.pool]\nsize = {size}\nqueue_timeout = \"120s\"\n{AUTH}")
}

/// The knobs that copy, all on: clients write through named statements and read what they wrote.
pub async fn everything(pair: &Pair) {
    for (knob, value) in [("sample_reads", "100"), ("serve_reads", "50"), ("mirror_writes", "rehearse")] {
        pair.set(knob, value).await;
    }
    let before = pair.proxy.shadow().await;
    let mut clients = Vec::new();
    for id in 1..=8i32 {
        let client = pair.client().await;
        clients.push(tokio::spawn(async move {
            // who has settings of its own is served, not compared or rehearsed: as with a server connection each
            let set = id > 4;
            if set {
                client.batch_execute(&format!("SET application_name = 'client {id}'; SET search_path = public, pg_catalog")).await.unwrap();
            }
            let write = client.prepare("UPDATE counter SET v = $2 WHERE id = $1").await.unwrap();
            let read = client.prepare("SELECT v FROM counter WHERE id = $1").await.unwrap();
            for round in 1..=40i64 {
                if round % 2 == 0 {
                    client.execute(&write, &[&id, &round]).await.unwrap();
                } else {
                    client.batch_execute("BEGIN").await.unwrap();
                    client.execute(&write, &[&id, &round]).await.unwrap();
                    client.batch_execute("COMMIT").await.unwrap();
                }
                for _ in 0..3 {
                    assert_eq!(client.query_one(&read, &[&id]).await.unwrap().get::<_, i64>(0), round, "client {id} read backwards");
                    tokio::time::sleep(std::time::Duration::from_millis(3)).await;
                }
                assert_eq!(ask(&client, "SELECT note FROM item WHERE id = 7").await, "note 7");
                if set {
                    assert_eq!(ask(&client, "SHOW application_name").await, format!("client {id}"));
                }
            }
        }));
    }
    for client in clients {
        client.await.unwrap();
    }
    wait_until("reads are compared and served, writes rehearsed", PATIENCE, || async {
        let now = pair.proxy.shadow().await;
        now.compare.same > before.compare.same + 20
            && now.rehearsal.transactions > before.rehearsal.transactions + 20
            && now.served.reads > before.served.reads + 20
    })
    .await;
    let after = pair.proxy.shadow().await;
    assert_eq!(after.compare.different, before.compare.different, "{:?}", after.compare.examples);
    assert_eq!((after.rehearsal.tag_mismatches, after.rehearsal.errors), (0, 0), "{:?}", after.rehearsal.examples);
    assert_eq!(after.feed.findings, 0, "{:?}", after.feed.finding_examples);
    for (knob, value) in [("sample_reads", "0"), ("serve_reads", "0"), ("mirror_writes", "off")] {
        pair.set(knob, value).await;
    }
}

/// Each client has settings and named statements, of which some have been used and others have not; all write all the time.
pub async fn crowd(pair: &Pair) {
    let owner = pair.client().await;
    let stop = Arc::new(AtomicBool::new(false));
    let done: Arc<Vec<AtomicUsize>> = Arc::new((0..CLIENTS).map(|_| AtomicUsize::new(0)).collect());
    let mut tasks = Vec::new();
    for id in 0..CLIENTS {
        let (client, stop, done) = (pair.client().await, stop.clone(), done.clone());
        tasks.push(tokio::spawn(async move {
            let mine = if id % 2 == 0 { "even" } else { "odd" };
            client.batch_execute(&format!("SET search_path = {mine}, public; SET application_name = 'crowd {id}'")).await.unwrap();
            let insert = client.prepare("INSERT INTO ledger VALUES ($1, $2)").await.unwrap();
            // means another table to every second client
            let whose = client.prepare("SELECT name, current_setting('application_name') FROM whose").await.unwrap();
            let unused = client.prepare("SELECT count(*) FROM ledger WHERE client = $1").await.unwrap();
            let mut round = 0i32;
            while !stop.load(Ordering::SeqCst) {
                round += 1;
                let written = [&(id as i32) as &(dyn tokio_postgres::types::ToSql + Sync), &round];
                if round % 3 == 0 {
                    client.batch_execute("BEGIN").await.unwrap();
                    client.execute(&insert, &written).await.unwrap();
                    client.batch_execute("COMMIT").await.unwrap();
                } else {
                    assert_eq!(client.execute(&insert, &written).await.unwrap(), 1);
                }
                let row = client.query_one(&whose, &[]).await.unwrap();
                let seen: (String, String) = (row.get(0), row.get(1));
                assert_eq!(seen, (mine.to_owned(), format!("crowd {id}")), "round {round}");
                done[id].fetch_add(1, Ordering::SeqCst);
            }
            assert_eq!(client.query_one(&unused, &[&(id as i32)]).await.unwrap().get::<_, i64>(0), i64::from(round));
            assert_eq!(ask(&client, "SHOW search_path").await, format!("{mine}, public"));
            round
        }));
    }
    let all_go_on = async || {
        let before: Vec<usize> = done.iter().map(|rounds| rounds.load(Ordering::SeqCst)).collect();
        wait_until("every client goes on", PATIENCE, || async {
            assert!(!tasks.iter().any(|task| task.is_finished()), "a client saw an error\n{}", pair.proxy.log_text());
            done.iter().zip(&before).all(|(now, before)| now.load(Ordering::SeqCst) >= before + ROUNDS)
        })
        .await;
    };
    let few = async |server: &crate::support::Server, at_most: i64| {
        let admin = server.connect("shop").await.unwrap();
        const TEXT: &str = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app' AND backend_type = 'client backend'";
        wait_until("the pool keeps to its size", PATIENCE, || async { ask(&admin, TEXT).await.parse::<i64>().unwrap() <= at_most }).await;
    };
    all_go_on().await;
    for (words, owner, major) in [("CUTOVER pg18", "pg18", "18"), ("ROLLBACK shop", "source", "15")] {
        // a lag of the many writers is not what is tried here
        let mut told = pair.proxy.tell(words).await;
        for _ in 0..5 {
            if told.code == 0 {
                break;
            }
            eprintln!("    {words}: {}", told.stderr);
            tokio::time::sleep(std::time::Duration::from_secs(1)).await;
            told = pair.proxy.tell(words).await;
        }
        assert_eq!(told.code, 0, "{words}: {}\n{}", told.stderr, pair.proxy.log_text());
        assert_eq!(pair.proxy.state().await.databases[0].owner, owner);
        assert_eq!(ask(&pair.client().await, "SELECT current_setting('server_version_num')::int / 10000").await, major);
        all_go_on().await;
        let (now, before) = if major == "18" { (&pair.shadow, &pair.source) } else { (&pair.source, &pair.shadow) };
        few(now, 5).await;
        few(before, 0).await;
    }
    stop.store(true, Ordering::SeqCst);
    let mut total = 0;
    for task in tasks {
        total += i64::from(task.await.expect("no client saw an error"));
    }
    assert_eq!(ask(&owner, "SELECT count(*) FROM ledger").await, total.to_string(), "nothing lost, nothing twice");
}
