//! Clients of every kind, each compared with a client that talks to the server directly.

use crate::{
    harness::{Proxy, ask, connect, sqlstate, try_connect, with_password},
    support::{Server, find_client},
};
use bytes::{Bytes, BytesMut};
use futures_util::{SinkExt, StreamExt, TryStreamExt, future::join_all, pin_mut};
use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};
use tokio_postgres::{AsyncMessage, Client, NoTls, SimpleQueryMessage};
use understudy::{
    backend::Connection,
    config::ServerUrl,
    wire::{frontend, put},
};

pub const SCHEMA: &str = "
    CREATE TABLE item (id int PRIMARY KEY, v int NOT NULL, note text);
    INSERT INTO item SELECT k, k * 10, 'note ' || k FROM generate_series(1, 100) k;
    CREATE TABLE loaded (id int PRIMARY KEY, note text);
";

async fn both(server: &Server, proxy: &Proxy) -> [Client; 2] {
    let url = server.app_url("shop");
    [connect(&url).await, connect(&proxy.through(&url)).await]
}

fn describe(result: Result<Vec<SimpleQueryMessage>, tokio_postgres::Error>) -> Vec<String> {
    let messages = match result {
        Ok(messages) => messages,
        Err(error) => return vec![format!("error {:?}", error.code())],
    };
    let one = |message: &SimpleQueryMessage| match message {
        SimpleQueryMessage::Row(row) => (0..row.len()).map(|at| format!("{:?}", row.get(at))).collect::<Vec<_>>().join(","),
        SimpleQueryMessage::CommandComplete(rows) => format!("complete {rows}"),
        other => format!("{other:?}"),
    };
    messages.iter().map(one).collect()
}

async fn simple_extended_prepared_pipelined(client: &mut Client) -> Vec<String> {
    let mut seen = Vec::new();
    for text in [
        "SELECT 1, NULL, 'ä'; SELECT v FROM item WHERE id < 4 ORDER BY id",
        "",
        "BEGIN; UPDATE item SET v = v + 1 WHERE id = 5; SELECT v FROM item WHERE id = 5; ROLLBACK",
        "SELECT 1; SELECT 1 / 0; SELECT 2",
        "SELECT nonsense",
        "SHOW server_encoding",
    ] {
        seen.extend(describe(client.simple_query(text).await));
    }
    for (id, rows) in [(1, 1), (7, 1), (1000, 0)] {
        let found = client.query("SELECT v, note FROM item WHERE id = $1", &[&id]).await.unwrap();
        assert_eq!(found.len(), rows);
        seen.extend(found.iter().map(|row| format!("{} {:?}", row.get::<_, i32>(0), row.get::<_, Option<String>>(1))));
    }
    let statement = client.prepare("SELECT sum(v) FROM item WHERE id BETWEEN $1 AND $2").await.unwrap();
    let sums = (1..=30).map(|low| {
        let (client, statement) = (&*client, &statement);
        async move { client.query_one(statement, &[&low, &(low + 9)]).await.unwrap().get::<_, i64>(0) }
    });
    seen.push(format!("pipelined {:?}", join_all(sums).await));
    let mixed =
        (0..12).map(|k| {
            let client = &*client;
            async move {
                client.query_one("SELECT 12 / ($1::int % 4)", &[&k]).await.map(|row| row.get::<_, i32>(0)).map_err(|e| e.code().cloned())
            }
        });
    seen.push(format!("errors between {:?}", join_all(mixed).await));
    let transaction = client.transaction().await.unwrap();
    let portal = transaction.bind("SELECT id FROM item ORDER BY id", &[]).await.unwrap();
    for _ in 0..3 {
        let rows = transaction.query_portal(&portal, 7).await.unwrap();
        seen.push(format!("portal {:?}", rows.iter().map(|row| row.get::<_, i32>(0)).collect::<Vec<_>>()));
    }
    seen.push(sqlstate(transaction.query("SELECT 1 / 0", &[]).await));
    seen.push(sqlstate(transaction.query("SELECT 1", &[]).await));
    transaction.rollback().await.unwrap();
    seen.push(ask(client, "SELECT count(*) FROM item").await);
    seen
}

pub async fn drivers(server: &Server, proxy: &Proxy) {
    let [mut direct, mut proxied] = both(server, proxy).await;
    let expected = simple_extended_prepared_pipelined(&mut direct).await;
    assert_eq!(simple_extended_prepared_pipelined(&mut proxied).await, expected);
}

fn client_program(name: &str, url: &ServerUrl) -> Command {
    let mut command = Command::new(find_client(name).unwrap());
    command.args(["-h", "127.0.0.1", "-p", &url.port.to_string(), "-U", &url.user]);
    command.env("PGPASSWORD", url.password.as_ref().unwrap().expose()).env("PGSSLMODE", "prefer").env("LC_ALL", "C.UTF-8");
    command
}

pub async fn pgbench(server: &Server, proxy: &Proxy) {
    let url = proxy.through(&server.app_url("shop"));
    let initialised = client_program("pgbench", &url).args(["-i", "-q", "-s", "1", "shop"]).output().unwrap();
    assert!(initialised.status.success(), "{}", String::from_utf8_lossy(&initialised.stderr));
    for mode in ["simple", "extended", "prepared"] {
        let run = client_program("pgbench", &url).args(["-n", "-M", mode, "-c", "4", "-t", "50", "shop"]).output().unwrap();
        let text = format!("{}{}", String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr));
        assert!(run.status.success() && text.contains("actually processed: 200/200"), "{mode}: {text}");
    }
    let client = connect(&server.app_url("shop")).await;
    assert_eq!(ask(&client, "SELECT count(*) FROM pgbench_history").await, "600");
    let balanced = "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(delta) FROM pgbench_history)";
    assert_eq!(ask(&client, balanced).await, "t");
    // as many transactions went through the proxy as pgbench counted
    assert!(proxy.state().await.databases[0].transactions >= 600);
}

pub async fn psql(server: &Server, proxy: &Proxy) {
    const SCRIPT: &str = r"
\set VERBOSITY verbose
\d item
SELECT id, v FROM item ORDER BY id LIMIT 3 \gdesc
SELECT id AS first FROM item ORDER BY id LIMIT 1 \gset
SELECT :first + 1;
BEGIN; SELECT 1 / 0; SELECT 1; ROLLBACK;
COPY (SELECT id, note FROM item WHERE id < 4 ORDER BY id) TO STDOUT;
CREATE TEMP TABLE t (id int, note text);
COPY t FROM STDIN;
1	a
2	\N
\.
COPY t FROM STDIN;
x	a
\.
SELECT * FROM t ORDER BY id;
\set FETCH_COUNT 10
SELECT id FROM item WHERE id < 25 ORDER BY id;
DO $$ BEGIN RAISE NOTICE 'seen'; END $$;
SELECT 'x' AS crosstab \crosstabview
\echo :SERVER_VERSION_NUM :ENCODING
";
    let run = |url: &ServerUrl| {
        let mut child = client_program("psql", url)
            .args(["-X", "-d", "shop"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), SCRIPT.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let url = server.app_url("shop");
    let direct = run(&url);
    assert!(direct.0.contains("note 3") && direct.1.contains("22012") && direct.1.contains("22P02"), "{direct:?}");
    assert_eq!(run(&proxy.through(&url)), direct);
}

pub async fn copy(server: &Server, proxy: &Proxy) {
    let [direct, proxied] = both(server, proxy).await;
    // extended protocol, larger than every buffer on the way
    let sink = proxied.copy_in("COPY loaded FROM STDIN").await.unwrap();
    pin_mut!(sink);
    for block in 0..100 {
        let rows: String = (0..500).map(|row| format!("{}\tsome text of row {row}\n", block * 500 + row)).collect();
        sink.send(Bytes::from(rows)).await.unwrap();
    }
    assert_eq!(sink.finish().await.unwrap(), 50_000);
    let mut out = [String::new(), String::new()];
    for (client, text) in [&direct, &proxied].into_iter().zip(&mut out) {
        let rows: Vec<Bytes> =
            client.copy_out("COPY (SELECT * FROM loaded ORDER BY id) TO STDOUT").await.unwrap().try_collect().await.unwrap();
        *text = rows.iter().map(|row| String::from_utf8_lossy(row).into_owned()).collect();
    }
    assert!(out[0].len() > 1_000_000 && out[0] == out[1]);
    // a wrong row, a client that gives up, a read that fails on the way: each leaves the session usable
    let sink = proxied.copy_in("COPY loaded FROM STDIN").await.unwrap();
    pin_mut!(sink);
    sink.send(Bytes::from_static(b"not a number\tx\n")).await.unwrap();
    assert_eq!(sqlstate(sink.finish().await), "22P02");
    {
        let abandoned = proxied.copy_in::<_, Bytes>("COPY loaded FROM STDIN").await.unwrap();
        pin_mut!(abandoned);
        abandoned.send(Bytes::from_static(b"999999\tx\n")).await.unwrap();
    }
    let stream = proxied.copy_out("COPY (SELECT 1 / (id - 3000) FROM loaded ORDER BY id) TO STDOUT").await.unwrap();
    pin_mut!(stream);
    let failure = loop {
        match stream.next().await {
            Some(Ok(_)) => {}
            Some(Err(error)) => break error.code().unwrap().code().to_owned(),
            None => break "none".into(),
        }
    };
    assert_eq!(failure, "22012");
    assert_eq!(ask(&proxied, "SELECT count(*) FROM loaded").await, "50000");

    // what a client still sends after the server has given up its COPY belongs to no transaction: nothing waits for its end
    let mut raw = Connection::open(&proxy.through(&server.app_url("shop")), &[]).await.unwrap();
    let mut bytes = BytesMut::new();
    frontend::put_query(&mut bytes, b"COPY loaded FROM STDIN");
    put(&mut bytes, b'd', |b| b.extend_from_slice(b"wrong\n"));
    raw.send(&bytes).await.unwrap();
    while raw.receive().await.unwrap().tag != b'Z' {}
    bytes.clear();
    put(&mut bytes, b'd', |b| b.extend_from_slice(b"1\tlate\n"));
    put(&mut bytes, b'c', |_| {});
    raw.send(&bytes).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let paused = tokio::time::timeout(Duration::from_secs(5), proxy.tell("PAUSE shop")).await.expect("late CopyData holds a PAUSE up");
    assert_eq!(paused.code, 0, "{}", paused.stderr);
    proxy.rows("RESUME shop").await;
    assert_eq!(raw.simple_query("SELECT 7").await.unwrap(), [[Some("7".to_owned())]]);
    proxied.batch_execute("TRUNCATE loaded").await.unwrap();
}

pub async fn notifications(server: &Server, proxy: &Proxy) {
    let url = proxy.through(&server.app_url("shop"));
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(url.port).user(&url.user).dbname("shop").password(url.password.as_ref().unwrap().expose());
    let (client, mut connection) = config.connect(NoTls).await.unwrap();
    let (sender, mut receiver) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(Ok(message)) = std::future::poll_fn(|context| connection.poll_message(context)).await {
            if let AsyncMessage::Notification(notification) = message {
                let _ = sender.send((notification.channel().to_owned(), notification.payload().to_owned()));
            }
        }
    });
    client.batch_execute("LISTEN news").await.unwrap();
    let other = connect(&server.app_url("shop")).await;
    for payload in ["one", "zwei ä"] {
        other.batch_execute(&format!("NOTIFY news, '{payload}'")).await.unwrap();
        let seen = tokio::time::timeout(Duration::from_secs(5), receiver.recv()).await.expect("an idle session is told").unwrap();
        assert_eq!(seen, ("news".to_owned(), payload.to_owned()));
    }
    assert_eq!(ask(&client, "SELECT 1").await, "1");
}

pub async fn encodings(server: &Server, proxy: &Proxy) {
    let url = server.app_url("shop");
    let mut answers = Vec::new();
    for url in [url.clone(), proxy.through(&url)] {
        let mut connection = Connection::open(&url, &[(b"client_encoding", b"LATIN1")]).await.unwrap();
        let parameters = connection.parameters.clone();
        let mut bytes = BytesMut::new();
        // é is one byte that is not UTF-8; in a literal, in a name, in an error
        for text in
            [&b"SELECT '\xe9' AS \"\xe9\", length('\xe9\xe8'), convert_to('\xe9', 'UTF8')"[..], b"SELECT \"\xe9\"", b"SELECT U&'\\20AC'"]
        {
            frontend::put_query(&mut bytes, text);
        }
        put(&mut bytes, b'P', |b| b.extend_from_slice(b"s\xe9\0SELECT $1 || '\xe8'\0\0\x01\0\0\0\x19"));
        put(&mut bytes, b'B', |b| b.extend_from_slice(b"\0s\xe9\0\0\0\0\x01\0\0\0\x01\xe9\0\0"));
        put(&mut bytes, b'E', |b| b.extend_from_slice(b"\0\0\0\0\0"));
        frontend::put_sync(&mut bytes);
        connection.send(&bytes).await.unwrap();
        let (mut seen, mut ready) = (Vec::new(), 0);
        while ready < 4 {
            let message = connection.receive().await.unwrap();
            ready += usize::from(message.tag == b'Z');
            seen.push((message.tag, message.body));
        }
        answers.push((parameters, seen));
    }
    let all: Vec<u8> = answers[0].1.iter().flat_map(|(_, body)| body.to_vec()).collect();
    assert!(all.windows(2).any(|pair| pair == b"\xe9\xe8"), "the parameter came back in LATIN1");
    assert_eq!(answers[0], answers[1]);
    let proxied = connect(&proxy.through(&url)).await;
    assert_eq!(ask(&proxied, "SELECT '日本語😀' || length('日本語😀')").await, "日本語😀4");
}

pub async fn large(server: &Server, proxy: &Proxy) {
    let proxied = connect(&proxy.through(&server.app_url("shop"))).await;
    let value = "0123456789".repeat(2_000_000);
    let row = proxied.query_one("SELECT md5($1::text), length($1::text), $1::text", &[&value]).await.unwrap();
    assert_eq!(row.get::<_, i32>(1), 20_000_000);
    assert!(row.get::<_, String>(2) == value, "20 MB there and back");
    let hash: String = row.get(0);
    assert_eq!(ask(&proxied, "SELECT md5(repeat('0123456789', 2000000))").await, hash);
    let text = ask(&proxied, &format!("SELECT '{value}'")).await;
    assert!(text == value, "20 MB as a simple query");
    let terms: Vec<String> = (1..=4_000).map(|k| format!("id = {k}")).collect();
    assert_eq!(ask(&proxied, &format!("SELECT count(*) FROM item WHERE {}", terms.join(" OR "))).await, "100");
    let sum: Vec<String> = (1..=4_000).map(|k| k.to_string()).collect();
    assert_eq!(ask(&proxied, &format!("SELECT {}", sum.join(" + "))).await, "8002000");
    assert_eq!(ask(&proxied, "SELECT 1").await, "1");
}

pub async fn cancel(server: &Server, proxy: &Proxy) {
    let url = proxy.through(&server.app_url("shop"));
    let (wanted, bystander) = (connect(&url).await, connect(&url).await);
    let token = wanted.cancel_token();
    let began = Instant::now();
    let (cancelled, left_alone, ()) =
        tokio::join!(wanted.simple_query("SELECT pg_sleep(30)"), bystander.simple_query("SELECT pg_sleep(1)"), async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            token.cancel_query(NoTls).await.unwrap();
        });
    assert_eq!(sqlstate(cancelled), "57014");
    assert!(began.elapsed() < Duration::from_secs(10));
    left_alone.unwrap();
    // an invented key cancels nothing
    let sleeping = bystander.simple_query("SELECT pg_sleep(0.5)");
    let forged = async {
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", proxy.listen)).await.unwrap();
        let mut request = BytesMut::new();
        for pid in 1..20 {
            frontend::put_cancel(&mut request, pid, b"\0\0\0\0");
            tokio::io::AsyncWriteExt::write_all(&mut stream, &request).await.ok();
            stream = tokio::net::TcpStream::connect(("127.0.0.1", proxy.listen)).await.unwrap();
            request.clear();
        }
    };
    tokio::join!(sleeping, forged).0.unwrap();
    assert_eq!(ask(&wanted, "SELECT 1").await, "1");
}

pub async fn refused(server: &Server, proxy: &Proxy) {
    let url = proxy.through(&server.app_url("shop"));
    assert_eq!(sqlstate(try_connect(&with_password(&url, "wrong")).await), "28P01");
    assert_eq!(sqlstate(try_connect(&ServerUrl { user: "nobody_here".into(), ..url.clone() }).await), "28P01");
    assert_eq!(sqlstate(try_connect(&ServerUrl { dbname: "elsewhere".into(), ..url.clone() }).await), "3D000");
    // earlier sections' clients may still be leaving
    crate::harness::wait_until("no client is left", Duration::from_secs(10), || async { proxy.state().await.databases[0].clients == 0 })
        .await;
    proxy.edit("max_clients = 60", "max_clients = 2");
    proxy.rows("RELOAD").await;
    let held = [connect(&url).await, connect(&url).await];
    assert_eq!(sqlstate(try_connect(&url).await), "53300");
    assert_eq!(ask(&held[0], "SELECT 1").await, "1");
    drop(held);
    crate::harness::wait_until("places are free again", Duration::from_secs(5), || async { try_connect(&url).await.is_ok() }).await;
    proxy.edit("max_clients = 2", "max_clients = 60");
    proxy.rows("RELOAD").await;
}

pub async fn terminated(server: &Server, proxy: &Proxy) {
    let mut victim = Connection::open(&proxy.through(&server.app_url("shop")), &[]).await.unwrap();
    let pid = victim.simple_query("SELECT pg_backend_pid()").await.unwrap()[0][0].clone().unwrap();
    let operator = server.connect("shop").await.unwrap();
    assert_eq!(ask(&operator, &format!("SELECT pg_terminate_backend({pid})")).await, "t");
    let mut seen = Vec::new();
    while let Ok(Ok(message)) = tokio::time::timeout(Duration::from_secs(5), victim.receive()).await {
        seen.push((message.tag, understudy::wire::backend::ErrorFields::parse(&message.body)));
    }
    let [(b'E', fatal)] = &seen[..] else { panic!("exactly one FATAL, not {seen:?}") };
    assert_eq!((fatal.severity.as_str(), fatal.code.as_str()), ("FATAL", "57P01"));
}
