//! tokio-postgres: pipelines by polling together, binary everywhere.

use bytes::Bytes;
use futures_util::{SinkExt, TryStreamExt, future::join_all, pin_mut};
use std::fmt::Write;
use tokio_postgres::{AsyncMessage, Client, Error, NoTls, SimpleQueryMessage, types::Type};
use understudy::config::ServerUrl;

async fn open(url: &ServerUrl) -> (Client, tokio::sync::mpsc::UnboundedReceiver<String>) {
    let mut config = tokio_postgres::Config::new();
    config.host(&url.host).port(url.port).user(&url.user).dbname(&url.dbname).password(url.password.as_ref().unwrap().expose());
    let (client, mut connection) = config.connect(NoTls).await.unwrap();
    let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(Ok(message)) = std::future::poll_fn(|context| connection.poll_message(context)).await {
            let _ = match message {
                AsyncMessage::Notification(one) => sender.send(format!("{}: {}", one.channel(), one.payload())),
                AsyncMessage::Notice(one) => sender.send(format!("{} {}", one.severity(), one.message())),
                _ => Ok(()),
            };
        }
    });
    (client, receiver)
}

fn code<T>(result: Result<T, Error>) -> String {
    match result {
        Ok(_) => "went well".into(),
        Err(error) => error.as_db_error().map_or_else(|| error.to_string(), |one| format!("{} {}", one.code().code(), one.message())),
    }
}

pub async fn programme(url: &ServerUrl) -> String {
    let mut out = String::new();
    let (mut client, mut heard) = open(url).await;
    client
        .batch_execute("SET client_min_messages = warning; DROP TABLE IF EXISTS d; CREATE TABLE d (id int PRIMARY KEY, t text, n float8)")
        .await
        .unwrap();
    let row = client
        .query_one(
            "SELECT $1::int, $2::bigint, $3::float8, $4::text, $5::bytea, $6::bool, $7::int[], $8::text, $9::oid",
            &[&42i32, &(1i64 << 40), &1.5f64, &"wörd 😀", &&b"\x00\xff"[..], &true, &vec![Some(1), None], &None::<String>, &7u32],
        )
        .await
        .unwrap();
    for column in row.columns() {
        writeln!(out, "column {} {}", column.name(), column.type_()).unwrap();
    }
    writeln!(out, "{:?} {:?} {:?}", row.get::<_, i32>(0), row.get::<_, &str>(3), row.get::<_, Vec<Option<i32>>>(6)).unwrap();
    let insert = client.prepare_typed("INSERT INTO d VALUES ($1, $2, $3)", &[Type::INT4, Type::TEXT, Type::FLOAT8]).await.unwrap();
    let inserted = (0..50i32).map(|key| {
        let (client, insert) = (&client, &insert);
        async move { client.execute(insert, &[&key, &format!("row {key}"), &f64::from(key)]).await.unwrap() }
    });
    writeln!(out, "pipelined {:?}", join_all(inserted).await).unwrap();
    let mixed = (0..12i32).map(|key| {
        let client = &client;
        async move { client.query_one("SELECT 12 / ($1::int % 4)", &[&key]).await.map(|row| row.get::<_, i32>(0)) }
    });
    for one in join_all(mixed).await {
        writeln!(out, "mixed {:?}", one.as_ref().ok()).unwrap();
        writeln!(out, "mixed {}", code(one)).unwrap();
    }
    let mut transaction = client.transaction().await.unwrap();
    let portal = transaction.bind("SELECT id FROM d ORDER BY id", &[]).await.unwrap();
    for _ in 0..3 {
        let rows = transaction.query_portal(&portal, 7).await.unwrap();
        writeln!(out, "portal {:?}", rows.iter().map(|row| row.get::<_, i32>(0)).collect::<Vec<_>>()).unwrap();
    }
    {
        let inner = transaction.transaction().await.unwrap();
        writeln!(out, "inner {}", code(inner.execute("INSERT INTO d (id) VALUES (1)", &[]).await)).unwrap();
        inner.rollback().await.unwrap();
    }
    transaction.execute("UPDATE d SET t = 'changed' WHERE id = 1", &[]).await.unwrap();
    transaction.commit().await.unwrap();
    for text in ["SELECT nonsense", "SELEC", "SELECT t FROM d WHERE id = 1; SELECT 2", "", "SELECT 1 / 0"] {
        match client.simple_query(text).await {
            Ok(messages) => {
                for message in messages {
                    if let SimpleQueryMessage::Row(row) = message {
                        writeln!(out, "simple {:?}", row.get(0)).unwrap();
                    }
                }
            }
            failed => writeln!(out, "{text}: {}", code(failed)).unwrap(),
        }
    }
    let sink = client.copy_in("COPY d (id, t) FROM STDIN").await.unwrap();
    pin_mut!(sink);
    for block in 0..40 {
        let rows: String = (0..100).map(|row| format!("{}\tcopied\n", 1000 + block * 100 + row)).collect();
        sink.send(Bytes::from(rows)).await.unwrap();
    }
    writeln!(out, "copied {}", sink.finish().await.unwrap()).unwrap();
    let sink = client.copy_in("COPY d (id) FROM STDIN").await.unwrap();
    pin_mut!(sink);
    sink.send(Bytes::from_static(b"x\n")).await.unwrap();
    writeln!(out, "wrong row {}", code(sink.finish().await)).unwrap();
    let rows: Vec<Bytes> = client.copy_out("COPY (SELECT id, t FROM d ORDER BY id) TO STDOUT").await.unwrap().try_collect().await.unwrap();
    writeln!(out, "copied out {} {}", rows.len(), rows.iter().map(Bytes::len).sum::<usize>()).unwrap();
    let (other, _) = open(url).await;
    client.batch_execute("LISTEN news").await.unwrap();
    other.batch_execute("NOTIFY news, 'one'; NOTIFY news, 'zwei ä'").await.unwrap();
    client.batch_execute("SET client_min_messages = notice; DO $$ BEGIN RAISE WARNING 'seen'; END $$").await.unwrap();
    let mut messages = Vec::new();
    for _ in 0..3 {
        messages.push(tokio::time::timeout(std::time::Duration::from_secs(60), heard.recv()).await.unwrap().unwrap());
    }
    messages.sort();
    writeln!(out, "heard {messages:?}").unwrap();
    let token = client.cancel_token();
    let (slept, ()) = tokio::join!(client.simple_query("SELECT pg_sleep(60)"), async {
        tokio::time::sleep(std::time::Duration::from_millis(400)).await;
        token.cancel_query(NoTls).await.unwrap();
    });
    writeln!(out, "cancelled {}", code(slept)).unwrap();
    let large = "0123456789".repeat(300_000);
    let row = client.query_one("SELECT $1::text, md5($1)", &[&large]).await.unwrap();
    writeln!(out, "large {} {}", row.get::<_, &str>(0) == large, row.get::<_, &str>(1)).unwrap();
    client.batch_execute("DROP TABLE d").await.unwrap();
    out
}
