//! No false alarm, no miss.

use crate::{
    harness::{ask, wait_until},
    stage::{PATIENCE, Stage},
};
use std::time::{Duration, Instant};
use tokio_postgres::Client;

pub const SCHEMA: &str = "
    CREATE TYPE mood AS ENUM ('calm', 'wild');
    CREATE TABLE item (id int PRIMARY KEY, v int NOT NULL, note text, mood mood DEFAULT 'calm', tags text[] DEFAULT '{a,b}');
    INSERT INTO item SELECT k, k * 10, 'note ' || k FROM generate_series(1, 200) k;
    CREATE TABLE account (id int PRIMARY KEY, grp int NOT NULL, balance bigint NOT NULL, weight float8 NOT NULL);
    INSERT INTO account SELECT k, k % 7, 1000, k / 3.0 FROM generate_series(1, 400) k;
    CREATE TABLE log (id bigserial PRIMARY KEY, account int, delta int, at timestamptz DEFAULT now());
    CREATE TABLE score (id int PRIMARY KEY, points float8, stamped timestamptz DEFAULT now());
    INSERT INTO score SELECT k, k / 7.0 FROM generate_series(1, 20) k;
    CREATE TABLE moods (m mood); INSERT INTO moods VALUES ('calm'), ('wild');
    CREATE VIEW top AS SELECT id, v FROM item ORDER BY v DESC LIMIT 5;
";

/// How long the busy source is kept busy; `make test-comparison SECONDS_BUSY=600` raises it.
fn busy_time() -> Duration {
    let seconds = std::env::var("UNDERSTUDY_SECONDS").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(3))
}

async fn write(client: &Client, random: &mut fastrand::Rng) {
    let (from, to, amount) = (random.i32(1..=400), random.i32(1..=400), random.i64(1..50));
    match random.u8(0..4) {
        0 => {
            client.execute("UPDATE item SET v = v + 1 WHERE id = $1", &[&random.i32(101..=200)]).await.unwrap();
        }
        1 => {
            client.execute("INSERT INTO log (account, delta) VALUES ($1, 1)", &[&from]).await.unwrap();
        }
        _ => {
            let (first, second) = (from.min(to), from.max(to)); // one order of locks: no deadlocks
            let text = format!(
                "BEGIN; UPDATE account SET balance = balance - {amount} WHERE id = {first};
                 UPDATE account SET balance = balance + {amount} WHERE id = {second}; COMMIT"
            );
            client.batch_execute(&text).await.unwrap();
        }
    }
}

async fn read(client: &Client, random: &mut fastrand::Rng) {
    let id = random.i32(1..=200);
    match random.u8(0..12) {
        0 => drop(client.query("SELECT * FROM item WHERE id = $1", &[&id]).await.unwrap()),
        1 => drop(client.simple_query(&format!("SELECT id, note, mood, tags FROM item WHERE id = {id}")).await.unwrap()),
        2 => drop(client.query("SELECT grp, sum(weight), avg(weight) FROM account GROUP BY grp", &[]).await.unwrap()),
        3 => drop(client.query("SELECT id, grp FROM account ORDER BY grp LIMIT 9", &[]).await.unwrap()),
        4 => drop(client.query("SELECT id, balance FROM account WHERE id < $1 ORDER BY id", &[&20i32]).await.unwrap()),
        5 => drop(client.query("SELECT a.id, i.note FROM account a JOIN item i USING (id) WHERE a.grp = $1", &[&3i32]).await.unwrap()),
        6 => drop(client.simple_query("SELECT now(), id FROM item WHERE id = 1").await.unwrap()),
        7 => drop(client.query("SELECT id FROM top", &[]).await.unwrap()),
        8 => assert!(client.query("SELECT 1 / (id - id) FROM item WHERE id = $1", &[&id]).await.is_err()),
        9 => drop(
            client
                .query("SELECT mood, count(*) FROM item WHERE mood = ANY($1::text[]::mood[]) GROUP BY mood", &[&vec!["calm"]])
                .await
                .unwrap(),
        ),
        10 => {
            let text = "BEGIN READ ONLY; SELECT 1; COMMIT";
            drop(client.simple_query(text).await.unwrap());
        }
        _ => {
            client.batch_execute("BEGIN READ ONLY").await.unwrap();
            client.query("SELECT id, note FROM item WHERE id BETWEEN $1 AND $2 ORDER BY id", &[&id, &(id + 5)]).await.unwrap();
            client.query("SELECT count(*) FROM item", &[]).await.unwrap();
            client.batch_execute("COMMIT").await.unwrap();
        }
    }
}

pub async fn none(stage: &Stage) {
    let start = stage.settled().await;
    let until = Instant::now() + busy_time();
    let mut clients = Vec::new();
    for number in 0..6u64 {
        let client = stage.client().await;
        clients.push(tokio::spawn(async move {
            let mut random = fastrand::Rng::with_seed(number);
            while Instant::now() < until {
                if number < 2 { write(&client, &mut random).await } else { read(&client, &mut random).await }
            }
        }));
    }
    for client in clients {
        client.await.unwrap();
    }
    let end = stage.settled().await;
    let (same, undecided) = (end.same - start.same, end.undecided - start.undecided);
    eprintln!(
        "    {} sampled, {same} same, {undecided} undecided, {} dropped; {:?}",
        end.sampled - start.sampled,
        end.dropped - start.dropped,
        end.reasons
    );
    assert_eq!(end.different, start.different, "a false alarm: {:?}", end.examples);
    assert!(same >= 100, "{end:?}");
    // on a loaded machine a few more move too fast
    assert!(undecided * 20 <= same, "{end:?}");
}

pub async fn transactions(stage: &Stage) {
    let client = stage.client().await;
    let start = stage.settled().await;
    client.batch_execute("BEGIN READ ONLY").await.unwrap();
    client.simple_query("SELECT v FROM item WHERE id = 1 /* whole 1 */").await.unwrap();
    client.simple_query("SHOW work_mem").await.unwrap();
    client.query("SELECT note FROM item WHERE id = $1 /* whole 2 */", &[&2i32]).await.unwrap();
    client.simple_query("DECLARE c CURSOR FOR SELECT id FROM item ORDER BY id /* whole 3 */").await.unwrap();
    client.simple_query("FETCH 10 FROM c").await.unwrap();
    client.simple_query("CLOSE c").await.unwrap();
    client.batch_execute("COMMIT").await.unwrap();
    // one that turns out not to be copied leaves nothing behind
    client.batch_execute("BEGIN READ ONLY").await.unwrap();
    client.simple_query("SELECT v FROM item WHERE id = 1 /* half */").await.unwrap();
    client.simple_query("SELECT pg_advisory_xact_lock(1)").await.unwrap();
    client.batch_execute("ROLLBACK").await.unwrap();
    // a portal that the client takes in pieces
    let mut client = client;
    let transaction = client.build_transaction().read_only(true).start().await.unwrap();
    let statement = transaction.prepare("SELECT id, note FROM item ORDER BY id /* whole 4 */").await.unwrap();
    let portal = transaction.bind(&statement, &[]).await.unwrap();
    assert_eq!(transaction.query_portal(&portal, 5).await.unwrap().len(), 5);
    transaction.commit().await.unwrap();
    let end = stage.settled().await;
    assert_eq!((end.different, end.errors), (start.different, start.errors), "{end:?}");
    assert!(end.same >= start.same + 3, "{start:?} {end:?}");
    let log = stage.copies_log();
    for whole in ["BEGIN READ ONLY", "/* whole 1 */", "/* whole 2 */", "/* whole 3 */", "FETCH 10 FROM c"] {
        assert!(log.contains(whole), "{whole}: {log}");
    }
    assert!(!log.contains("/* half */"), "{log}");
    // a difference inside a transaction is found like any other
    stage.tamper("UPDATE item SET note = 'rotten' WHERE id = 2").await;
    wait_until("a difference inside a transaction is found", PATIENCE, || async {
        client.batch_execute("BEGIN READ ONLY").await.unwrap();
        client.simple_query("SELECT note FROM item WHERE id = 2").await.unwrap();
        client.batch_execute("COMMIT").await.unwrap();
        stage.compare().await.different > start.different
    })
    .await;
    stage.settled().await;
    stage.tamper("UPDATE item SET note = 'note 2' WHERE id = 2").await;
}

/// What is done to the shadow, undone, and asked; what the report must say, and must not.
struct Injected {
    what: &'static str,
    done: &'static str,
    undone: &'static str,
    asked: &'static str,
    said: &'static [&'static str],
}

const INJECTED: [Injected; 8] = [
    Injected {
        what: "one value",
        done: "UPDATE item SET note = 'rotten quince' WHERE id = 55",
        undone: "UPDATE item SET note = 'note 55' WHERE id = 55",
        asked: "SELECT id, v, note FROM item WHERE id = 55",
        said: &["different values", "id =, v =, note 7 bytes on the owner, 13 bytes on the shadow", "at LSN ", "plan on", " on item"],
    },
    Injected {
        what: "one value behind a LIMIT",
        done: "UPDATE item SET note = NULL WHERE id = 3",
        undone: "UPDATE item SET note = 'note 3' WHERE id = 3",
        asked: "SELECT id, note FROM item ORDER BY id LIMIT 3",
        said: &["different values", "note 6 bytes on the owner, NULL on the shadow"],
    },
    Injected {
        what: "a missing row",
        done: "DELETE FROM item WHERE id = 7",
        undone: "INSERT INTO item VALUES (7, 70, 'note 7')",
        asked: "SELECT id FROM item WHERE id < 10",
        said: &["different number of rows", "1 rows only on the owner, 0 only on the shadow"],
    },
    Injected {
        what: "an extra row",
        done: "INSERT INTO item VALUES (-1, 1, 'x')",
        undone: "DELETE FROM item WHERE id = -1",
        asked: "SELECT count(*) AS n, id FROM item WHERE id < 1 GROUP BY id",
        said: &["different number of rows", "0 rows only on the owner, 1 only on the shadow"],
    },
    Injected {
        what: "a wrong order",
        done: "ALTER TYPE mood RENAME VALUE 'calm' TO 'c'; ALTER TYPE mood RENAME VALUE 'wild' TO 'calm'; ALTER TYPE mood RENAME VALUE 'c' TO 'wild'; UPDATE moods SET m = CASE m WHEN 'calm' THEN 'wild'::mood ELSE 'calm' END",
        undone: "ALTER TYPE mood RENAME VALUE 'calm' TO 'c'; ALTER TYPE mood RENAME VALUE 'wild' TO 'calm'; ALTER TYPE mood RENAME VALUE 'c' TO 'wild'; UPDATE moods SET m = CASE m WHEN 'calm' THEN 'wild'::mood ELSE 'calm' END",
        asked: "SELECT m FROM moods ORDER BY m",
        said: &["different order", "from row 1 on"],
    },
    Injected {
        what: "a changed type",
        done: "ALTER TABLE score ALTER points TYPE numeric",
        undone: "ALTER TABLE score ALTER points TYPE float8",
        asked: "SELECT id, points FROM score WHERE id = 7",
        said: &["different columns", "column 2: points float8 on the owner, points numeric on the shadow"],
    },
    Injected {
        what: "a changed name",
        done: "ALTER TABLE log RENAME delta TO change",
        undone: "ALTER TABLE log RENAME change TO delta",
        asked: "SELECT * FROM log WHERE id = 0",
        said: &["different columns", "column 3: delta int4 on the owner, change int4 on the shadow"],
    },
    Injected {
        what: "a changed error",
        done: "ALTER TABLE account RENAME TO account_away",
        undone: "ALTER TABLE account_away RENAME TO account",
        asked: "SELECT 1 / (id - id) FROM account WHERE id = 1",
        said: &["different outcome (SQLSTATE)", "SQLSTATE 22012 on the owner, SQLSTATE 42P01 on the shadow"],
    },
];

pub async fn each(stage: &Stage) {
    let client = stage.client().await;
    for injected in &INJECTED {
        let before = stage.settled().await;
        stage.tamper(injected.done).await;
        for prepared in [false, true] {
            let found = stage.settled().await.different;
            let statement = if prepared { client.prepare(injected.asked).await.ok() } else { None };
            wait_until(injected.what, PATIENCE, || async {
                match &statement {
                    Some(statement) => drop(client.query(statement, &[]).await),
                    None => drop(client.simple_query(injected.asked).await),
                }
                stage.settled().await.different > found
            })
            .await;
        }
        let after = stage.settled().await;
        let new: Vec<&String> = after.examples.iter().filter(|example| !before.examples.contains(example)).collect();
        let all = new.iter().map(|example| example.as_str()).collect::<Vec<_>>().join("\n");
        for said in injected.said {
            assert!(all.contains(said), "{}: `{said}` is not said: {all}\n{:?}", injected.what, after.reasons);
        }
        for value in ["rotten", "quince", "note 55"] {
            assert!(!all.contains(value), "{}: {value} is shown: {all}", injected.what);
        }
        stage.tamper(injected.undone).await;
        // and it is the same again
        let same = stage.settled().await.same;
        wait_until("all is well again", PATIENCE, || async {
            drop(client.simple_query(injected.asked).await);
            stage.settled().await.same > same
        })
        .await;
    }
}

pub async fn rules(stage: &Stage) {
    let client = stage.client().await;
    stage.tamper("UPDATE score SET points = points * 1.001, stamped = stamped + interval '1 hour'").await;
    let before = stage.settled().await;
    wait_until("rules are applied", PATIENCE, || async {
        client.simple_query("SELECT id, points FROM score ORDER BY id").await.unwrap();
        client.query("SELECT id, stamped FROM score", &[]).await.unwrap();
        let reasons = stage.settled().await.reasons;
        reasons.contains_key("ignored by rule scores are rounded") && reasons.contains_key("ignored by rule stamps")
    })
    .await;
    let after = stage.settled().await;
    assert_eq!(after.different, before.different, "{:?}", after.examples);
    let shown = serde_json::to_string(&stage.proxy.rows("SHOW CONFIG").await).unwrap();
    assert!(shown.contains("shop.pg18.ignore.scores are rounded"), "{shown}");
}

pub async fn quota(stage: &Stage) {
    stage.set("sample_reads", "0.01").await;
    let client = stage.client().await;
    let before = stage.settled().await.sampled;
    // a share of one in ten thousand, and yet a statement that nobody has seen is copied
    wait_until("a rare statement is seen", PATIENCE, || async {
        ask(&client, "SELECT count(*) FROM item WHERE id < 17 AND v > 3").await;
        stage.settled().await.sampled > before
    })
    .await;
    stage.set("sample_reads", "100").await;
}
