//! The operators' surfaces from outside: psql, a driver, HTTP by hand, `ctl`.

#[path = "console/operator.rs"]
mod operator;
#[path = "console/server.rs"]
mod server;

use bytes::BytesMut;
use operator::{TestOperator, sample_state};
use serde_json::{Value, json};
use std::{
    net::SocketAddr,
    process::Stdio,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    process::Command,
    sync::oneshot,
    task::JoinHandle,
};
use understudy::{
    config::{ConsoleUser, Secret},
    console::{
        command::FORMS,
        ctl::{CtlTarget, Output, run},
        http::serve_http,
        server::serve as serve_console,
        state::State,
    },
    lsn::Lsn,
    monitor::sample,
};

/// A console on a free port. Dropping it ends the listener.
struct Console {
    address: SocketAddr,
    operator: Arc<TestOperator>,
    listener: JoinHandle<()>,
}

impl Drop for Console {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

async fn console(user: Option<ConsoleUser>) -> Console {
    console_seen_from(user, None).await
}

/// `peer`: the address that the console believes its clients come from.
async fn console_seen_from(user: Option<ConsoleUser>, peer: Option<SocketAddr>) -> Console {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let operator = Arc::new(TestOperator::default());
    let shared = operator.clone();
    let listener = tokio::spawn(async move {
        while let Ok((stream, from)) = listener.accept().await {
            tokio::spawn(serve_console(stream.into(), BytesMut::new(), peer.unwrap_or(from).into(), None, shared.clone(), user.clone()));
        }
    });
    Console { address, operator, listener }
}

fn operator_user() -> Option<ConsoleUser> {
    Some(ConsoleUser { user: "operator".into(), password: Secret::new("pa'ss") })
}

struct Psql {
    stdout: String,
    stderr: String,
    code: i32,
}

async fn psql(console: &Console, user: &str, password: &str, arguments: &[&str], input: &str) -> Psql {
    let port = console.address.port().to_string();
    let mut child = Command::new("psql")
        .args(["-X", "-h", "127.0.0.1", "-p", &port, "-U", user, "-d", "understudy"])
        .args(arguments)
        .env("PGPASSWORD", password)
        .env("PGCONNECT_TIMEOUT", "10")
        .env("PGSSLMODE", "disable")
        .env("PGGSSENCMODE", "disable")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("psql is needed: apt install postgresql-client");
    child.stdin.take().unwrap().write_all(input.as_bytes()).await.unwrap();
    let output = tokio::time::timeout(Duration::from_secs(30), child.wait_with_output()).await.expect("psql hangs").unwrap();
    Psql {
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
        code: output.status.code().unwrap(),
    }
}

#[tokio::test]
async fn psql_shows_tables_with_types() {
    let console = console(None).await;
    let answer = psql(&console, "alice", "", &["-A", "-t", "-P", "null=NULL", "-c", "show shadows;"], "").await;
    assert_eq!((answer.stdout.as_str(), answer.stderr.as_str(), answer.code), ("pg18|10.5|42|t|NULL\npg16|ü|0|7|f|a\nb\n", "", 0));
    assert_eq!(*console.operator.heard.lock().unwrap(), [("SHOW SHADOWS".to_owned(), "alice".to_owned())]);
}

#[tokio::test]
async fn psql_help_lists_all_commands() {
    let console = console(None).await;
    let answer = psql(&console, "alice", "", &["-A", "-t", "-c", "SHOW HELP"], "").await;
    for form in FORMS {
        assert!(answer.stdout.contains(&format!("{}|{}", form.usage, form.what)), "{}", form.usage);
    }
}

#[tokio::test]
async fn psql_runs_several_statements_and_shows_notices() {
    let console = console(None).await;
    let text = "SET client_encoding = 'UTF8'; APPROVE 3 AS 'SELECT '';'''; SHOW FEED;";
    let answer = psql(&console, "alice", "", &["-A", "-t", "-c", text], "").await;
    assert_eq!(answer.stdout, "SET\nAPPROVE\nFEED\n", "{}", answer.stderr);
    assert!(answer.stderr.contains("NOTICE:  understood: APPROVE 3 AS 'SELECT '';'''"), "{}", answer.stderr);
    assert!(answer.stderr.contains("NOTICE:  next: SHOW EVENTS"), "{}", answer.stderr);
}

#[tokio::test]
async fn psql_gets_errors_that_help() {
    let console = console(None).await;
    for (text, code, part) in [
        ("SHOW SHADOW", "42601", "did you mean SHOW SHADOWS?"),
        ("SELECT 1", "42601", "is SQL"),
        ("REVERT nobody", "42704", "SHOW SHADOWS lists them"),
        ("CUTOVER pg18", "55000", "the feed is 3 s behind"),
        ("SHUTDOWN", "58000", "the journal cannot be written"),
    ] {
        let input = format!("\\set VERBOSITY verbose\n{text};\nSHOW STATS;\n");
        let answer = psql(&console, "alice", "", &["-A", "-t"], &input).await;
        assert!(answer.stderr.contains(code) && answer.stderr.contains(part), "{text}: {}", answer.stderr);
        assert_eq!(answer.stdout, "STATS\n", "the connection goes on after {text}");
    }
    // nothing is carried out when one of the statements is no command
    let before = console.operator.heard.lock().unwrap().len();
    let answer = psql(&console, "alice", "", &["-c", "REVERT pg18; SHOW FED"], "").await;
    assert_eq!((answer.code, console.operator.heard.lock().unwrap().len()), (1, before), "{}", answer.stderr);
    // statements before the one that fails have answered
    let answer = psql(&console, "alice", "", &["-A", "-t", "-c", "SHOW STATS; REVERT nobody; SHOW FEED"], "").await;
    assert_eq!((answer.stdout.as_str(), answer.code), ("STATS\n", 1));
}

#[tokio::test]
async fn psql_sends_nothing_and_gets_nothing() {
    let console = console(None).await;
    let answer = psql(&console, "alice", "", &["-c", " ; ;", "-c", "-- only a comment", "-c", "/* */;"], "").await;
    assert_eq!((answer.stdout.as_str(), answer.stderr.as_str(), answer.code), ("", "", 0));
}

#[tokio::test]
async fn what_the_front_door_has_read_is_not_lost() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let operator = Arc::new(TestOperator::default());
    let shared = operator.clone();
    let listener = tokio::spawn(async move {
        while let Ok((mut stream, from)) = listener.accept().await {
            let mut first = BytesMut::zeroed(13);
            stream.read_exact(&mut first).await.unwrap();
            tokio::spawn(serve_console(stream.into(), first, from.into(), None, shared.clone(), operator_user()));
        }
    });
    let console = Console { address, operator, listener };
    let answer = psql(&console, "operator", "pa'ss", &["-A", "-t", "-c", "SHOW STATS"], "").await;
    assert_eq!((answer.stdout.as_str(), answer.code), ("STATS\n", 0), "{}", answer.stderr);
}

#[tokio::test]
async fn psql_binds_without_parameters_only() {
    let version = Command::new("psql").arg("--version").output().await.unwrap();
    let major: u32 = String::from_utf8(version.stdout).unwrap().split([' ', '.']).find_map(|word| word.parse().ok()).unwrap();
    assert!(major >= 14, "psql {major}");
    let console = console(None).await;
    // `\bind` arrived with psql 16; the driver test below covers the protocol for older ones
    if major >= 16 {
        let answer = psql(&console, "alice", "", &["-A", "-t"], "SHOW FEED \\bind \\g\n").await;
        assert_eq!((answer.stdout.as_str(), answer.stderr.as_str()), ("FEED\n", ""));
    }
    let (client, _guard) = driver(&console).await;
    let error = client.query("SHOW FEED", &[&1i32]).await.unwrap_err();
    assert!(error.to_string().contains("parameter"), "{error}");
}

/// tokio-postgres uses the extended protocol for everything.
async fn driver(console: &Console) -> (tokio_postgres::Client, JoinHandle<()>) {
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(console.address.port()).user("driver").dbname("understudy");
    let (client, connection) = config.connect(tokio_postgres::NoTls).await.unwrap();
    let guard = tokio::spawn(async move {
        let _ = connection.await;
    });
    (client, guard)
}

#[tokio::test]
async fn drivers_use_the_extended_protocol() {
    let console = console(None).await;
    let (client, _guard) = driver(&console).await;
    let rows = client.query("SHOW SHADOWS", &[]).await.unwrap();
    let names: Vec<&str> = rows.iter().map(|row| row.get("shadow")).collect();
    assert_eq!(names, ["pg18", "pg16|ü"]);
    assert_eq!(rows[0].get::<_, Option<&str>>("note"), None);
    assert_eq!((rows[0].get::<_, &str>("changes"), rows[0].get::<_, &str>("serving")), ("42", "t"));

    // anything but SHOW runs once, although the driver asks for its columns first
    console.operator.heard.lock().unwrap().clear();
    let rows = client.query("SIMULATE CUTOVER pg18 AT 5% FOR '1s'", &[]).await.unwrap();
    assert_eq!(rows[0].get::<_, &str>("answer"), "served=12, percent=5.0");
    assert_eq!(client.execute("PAUSE shop", &[]).await.unwrap(), 0);
    assert_eq!(console.operator.heard.lock().unwrap().len(), 2);

    assert_eq!(client.execute("SET statement_timeout = 0", &[]).await.unwrap(), 0);
    let error = client.query("REVERT nobody", &[]).await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "42704");
    let error = client.query("SHOW FED", &[]).await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "42601");
    assert_eq!(client.query("SHOW FEED", &[]).await.unwrap().len(), 1, "the connection goes on after errors");
    assert_eq!(client.simple_query("").await.unwrap().len(), 1);
}

#[tokio::test]
async fn without_a_password_others_are_turned_away() {
    let console = console_seen_from(None, Some("192.0.2.7:5000".parse().unwrap())).await;
    let answer = psql(&console, "alice", "", &["-c", "SHOW STATS"], "").await;
    assert_eq!(answer.code, 2);
    assert!(answer.stderr.contains("FATAL") && answer.stderr.contains("loopback clients only"), "{}", answer.stderr);
    assert!(console.operator.heard.lock().unwrap().is_empty());
}

#[tokio::test]
async fn the_configured_user_needs_the_password() {
    let console = console_seen_from(operator_user(), Some("192.0.2.7:5000".parse().unwrap())).await;
    let answer = psql(&console, "operator", "pa'ss", &["-A", "-t", "-c", "SHOW STATS"], "").await;
    assert_eq!((answer.stdout.as_str(), answer.code), ("STATS\n", 0), "{}", answer.stderr);
    for (user, password) in [("operator", "wrong"), ("operator", ""), ("alice", "pa'ss")] {
        let answer = psql(&console, user, password, &["-w", "-c", "SHOW STATS"], "").await;
        assert_eq!(answer.code, 2, "{user} {}", answer.stdout);
    }
    assert_eq!(console.operator.heard.lock().unwrap().len(), 1);
}

fn target(console: &Console) -> CtlTarget {
    CtlTarget { host: "127.0.0.1".into(), port: console.address.port(), user: "operator".into(), password: Some(Secret::new("pa'ss")) }
}

#[tokio::test]
async fn ctl_prints_tables_and_json() {
    let console = console(operator_user()).await;
    let table = run(target(&console), "show shadows", false).await;
    assert_eq!(
        table.stdout.lines().collect::<Vec<_>>(),
        [
            " shadow | sample_reads | changes | serving | note",
            "--------+--------------+---------+---------+------",
            " pg18   |         10.5 |      42 | t       |",
            " pg16|ü |            0 |       7 | f       | a\\nb",
            "(2 rows)",
        ]
    );
    let Output { stdout, stderr, code } = run(target(&console), "SHOW SHADOWS", true).await;
    assert_eq!((stderr.as_str(), code), ("", 0));
    assert_eq!(
        serde_json::from_str::<Value>(&stdout).unwrap(),
        json!([
            {"shadow": "pg18", "sample_reads": 10.5, "changes": 42, "serving": true, "note": null},
            {"shadow": "pg16|ü", "sample_reads": 0, "changes": 7, "serving": false, "note": "a\nb"},
        ])
    );
    let Output { stdout, stderr, code } = run(target(&console), "REJECT 4", false).await;
    assert_eq!((stdout.as_str(), stderr.as_str(), code), ("REJECT\n", "understood: REJECT 4\nnext: SHOW EVENTS\n", 0));
    assert_eq!(run(target(&console), "REJECT 4", true).await.stdout, "[]\n");
}

#[tokio::test]
async fn ctl_exit_codes() {
    let console = console(operator_user()).await;
    for (words, code, part) in [
        ("SHOW SHADOW", 2, "did you mean"),
        ("", 0, ""),
        ("REVERT nobody", 2, "SHOW SHADOWS lists them"),
        ("CUTOVER pg18", 1, "the feed is 3 s behind"),
        ("SHUTDOWN", 3, "free some space"),
        ("SHOW\0FEED", 2, "zero byte"),
    ] {
        let output = run(target(&console), words, false).await;
        assert_eq!(output.code, code, "{words}: {output:?}");
        assert!(output.stderr.contains(part), "{words}: {output:?}");
    }
    let wrong = CtlTarget { password: Some(Secret::new("wrong")), ..target(&console) };
    let output = run(wrong, "SHOW STATS", false).await;
    assert!(output.code == 3 && output.stderr.contains("[proxy.console]"), "{output:?}");
    let nowhere = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let output = run(CtlTarget { port: nowhere.port(), ..target(&console) }, "SHOW STATS", false).await;
    assert!(output.code == 3 && output.stderr.contains("is understudy running"), "{output:?}");
}

/// HTTP on a free port.
struct Http {
    address: SocketAddr,
    operator: Arc<TestOperator>,
    stop: oneshot::Sender<()>,
    server: JoinHandle<()>,
}

async fn http() -> Http {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let operator = Arc::new(TestOperator::default());
    let (stop, stopped) = oneshot::channel();
    let server = tokio::spawn(serve_http(listener, operator.clone(), async {
        let _ = stopped.await;
    }));
    Http { address, operator, stop, server }
}

struct Reply {
    status: u16,
    head: String,
    body: String,
}

async fn request(http: &Http, method: &str, path: &str, headers: &[&str], body: &str) -> Reply {
    let mut stream = TcpStream::connect(http.address).await.unwrap();
    let mut text = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\nContent-Length: {}\r\n", body.len());
    for header in headers {
        text += &format!("{header}\r\n");
    }
    text += &format!("\r\n{body}");
    stream.write_all(text.as_bytes()).await.unwrap();
    let mut reply = Vec::new();
    tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut reply)).await.unwrap().unwrap();
    let reply = String::from_utf8(reply).unwrap();
    let (head, body) = reply.split_once("\r\n\r\n").unwrap();
    Reply { status: head.split(' ').nth(1).unwrap().parse().unwrap(), head: head.to_lowercase(), body: body.to_owned() }
}

const HOST: &str = "Host: 127.0.0.1:6480";

#[tokio::test]
async fn http_answers() {
    let http = http().await;
    let page = request(&http, "GET", "/", &[HOST], "").await;
    assert_eq!(page.status, 200);
    let policy = page.head.lines().find(|line| line.starts_with("content-security-policy:")).unwrap();
    let nonce = policy.split("script-src 'nonce-").nth(1).unwrap().split('\'').next().unwrap();
    assert!(policy.contains("default-src 'none'") && !policy.contains("unsafe"), "{policy}");
    assert!(page.body.contains(&format!("<script nonce=\"{nonce}\">")) && !page.body.contains("__NONCE__"));
    let again = request(&http, "GET", "/", &[HOST], "").await;
    assert!(!again.body.contains(nonce), "a nonce is used once");

    let metrics = request(&http, "GET", "/metrics", &[HOST], "").await;
    assert!(metrics.head.contains("text/plain; version=0.0.4"), "{}", metrics.head);
    assert!(metrics.body.contains("understudy_proxy_clients{database=\"sh\\\"op\"} 3\n"), "{}", metrics.body);

    assert_eq!(request(&http, "GET", "/healthz", &[HOST], "").await.status, 200);
    assert_eq!(request(&http, "GET", "/readyz", &[HOST], "").await.status, 200);
    http.operator.not_ready.store(true, Ordering::Relaxed);
    let ready = request(&http, "GET", "/readyz", &[HOST], "").await;
    assert_eq!((ready.status, ready.body.as_str()), (503, "not ready: the source cannot be reached\n"));
    assert_eq!(request(&http, "GET", "/healthz", &[HOST], "").await.status, 200);

    *http.operator.state.lock().unwrap() = sample_state(60.0);
    let state = request(&http, "GET", "/api/state", &[HOST], "").await;
    assert_eq!(serde_json::from_str::<State>(&state.body).unwrap().databases[0].shadows[0].name, "pg18");
    assert_eq!(request(&http, "GET", "/nothing", &[HOST], "").await.status, 404);
    assert_eq!(request(&http, "GET", "/api/command", &[HOST], "").await.status, 405);
}

#[tokio::test]
async fn http_commands() {
    let http = http().await;
    let good = [HOST, "X-Understudy: 1", "Content-Type: application/json"];
    for (body, status, expected) in [
        (r#"{"command": "show feed;"}"#, 200, json!({"columns": ["topic"], "rows": [["FEED"]], "tag": "SHOW", "notices": []})),
        (
            r#"{"command": "APPROVE 3"}"#,
            200,
            json!({"columns": [], "rows": [], "tag": "APPROVE", "notices": ["understood: APPROVE 3", "next: SHOW EVENTS"]}),
        ),
        (r#"{"command": "REVERT nobody"}"#, 404, json!({"kind": "unknown", "error": "there is no shadow nobody: SHOW SHADOWS lists them"})),
        (r#"{"command": "CUTOVER pg18"}"#, 409, json!({"kind": "refused", "error": "the feed is 3 s behind: wait until SHOW FEED says 0"})),
        (r#"{"command": "SHUTDOWN"}"#, 500, json!({"kind": "failed", "error": "the journal cannot be written: free some space"})),
    ] {
        let reply = request(&http, "POST", "/api/command", &good, body).await;
        assert_eq!((reply.status, serde_json::from_str::<Value>(&reply.body).unwrap()), (status, expected), "{body}");
    }
    assert!(http.operator.heard.lock().unwrap().iter().all(|(_, who)| who == "dashboard"));

    let before = http.operator.heard.lock().unwrap().len();
    for (headers, body, status, kind) in [
        (&good[..], r#"{"command": "SHOW FED"}"#, 400, "syntax"),
        (&good[..], r#"{"command": "PAUSE; RESUME"}"#, 400, "syntax"),
        (&good[..], r#"{"command": "PAUSE", "x": 1}"#, 400, "syntax"),
        (&good[..], "PAUSE", 400, "syntax"),
        (&[HOST, "X-Understudy: 1"][..], r#"{"command": "PAUSE"}"#, 400, "syntax"),
        (&[HOST, "Content-Type: application/json"][..], r#"{"command": "PAUSE"}"#, 403, "forbidden"),
        (&["Host: evil.example", "X-Understudy: 1", "Content-Type: application/json"][..], r#"{"command": "PAUSE"}"#, 403, "forbidden"),
    ] {
        let reply = request(&http, "POST", "/api/command", headers, body).await;
        assert_eq!(reply.status, status, "{headers:?} {body}: {}", reply.body);
        assert_eq!(serde_json::from_str::<Value>(&reply.body).unwrap()["kind"], kind, "{}", reply.body);
    }
    assert_eq!(http.operator.heard.lock().unwrap().len(), before, "nothing was carried out");
}

#[tokio::test]
async fn http_commands_need_the_configured_user() {
    let http = http().await;
    *http.operator.user.lock().unwrap() = operator_user();
    let plain = [HOST, "X-Understudy: 1", "Content-Type: application/json"];
    // printf %s "operator:pa'ss" | base64, and with another password
    let (right, wrong) = ("Authorization: Basic b3BlcmF0b3I6cGEnc3M=", "Authorization: Basic b3BlcmF0b3I6cGEnc3g=");
    let body = r#"{"command": "APPROVE 3"}"#;
    for headers in [plain.to_vec(), [&plain[..], &[wrong]].concat()] {
        let reply = request(&http, "POST", "/api/command", &headers, body).await;
        assert_eq!(reply.status, 401, "{}", reply.body);
        assert!(reply.head.contains("www-authenticate: basic realm=\"understudy\""), "{}", reply.head);
        let answer = serde_json::from_str::<Value>(&reply.body).unwrap();
        assert!(answer["error"].as_str().unwrap().contains("[proxy.console]"), "{answer}");
    }
    assert!(http.operator.heard.lock().unwrap().is_empty(), "nothing was carried out");
    let reply = request(&http, "POST", "/api/command", &[&plain[..], &[right]].concat(), body).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert_eq!(http.operator.heard.lock().unwrap()[0].1, "operator", "the record of decisions names who it was");
    // the password does not replace the header that other sites' pages cannot send
    let forged = request(&http, "POST", "/api/command", &[HOST, "Content-Type: application/json", right], body).await;
    assert_eq!(forged.status, 403, "{}", forged.body);
    assert_eq!(request(&http, "GET", "/api/state", &[HOST], "").await.status, 200, "reading stays open");
}

#[tokio::test]
async fn http_shuts_down_although_a_client_stays() {
    let http = http().await;
    let _idle = TcpStream::connect(http.address).await.unwrap();
    assert_eq!(request(&http, "GET", "/healthz", &[HOST], "").await.status, 200);
    http.stop.send(()).unwrap();
    tokio::time::timeout(Duration::from_secs(10), http.server).await.expect("the HTTP server does not end").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn resources_of_two_majors() {
    for major in [15, 18] {
        let server = server::Server::start(major);
        let client = server.client().await;
        client.batch_execute("CREATE ROLE plain LOGIN; CREATE TABLE t (i int)").await.unwrap();
        let first = sample(&client, true).await.unwrap();
        assert_eq!(first.server_version_num / 10_000, major);
        assert!(!first.in_recovery && first.wal_lsn > Lsn::ZERO && first.database_bytes > 1_000_000 && first.connections_max > 0);
        assert!((0.0..=1.0).contains(&first.cache_hit_ratio));

        // one holds a lock in an open transaction, one waits for it
        let (holder, waiter) = (server.client().await, server.client().await);
        holder.batch_execute("BEGIN; LOCK TABLE t").await.unwrap();
        let waiting = tokio::spawn(async move { waiter.batch_execute("INSERT INTO t SELECT generate_series(1, 5000)").await });
        let started = std::time::Instant::now();
        let busy = loop {
            let now = sample(&client, true).await.unwrap();
            if now.locks_waiting == 1 && now.connections >= 3 {
                break now;
            }
            assert!(started.elapsed() < Duration::from_secs(20), "{major}: {now:?}");
        };
        assert!((busy.active, busy.idle_in_transaction) == (1, 1) && busy.longest_transaction_s > 0.0, "{major}: {busy:?}");
        holder.batch_execute("COMMIT").await.unwrap();
        waiting.await.unwrap().unwrap();
        let after = sample(&client, true).await.unwrap().rates_since(&first, started.elapsed());
        assert!(after.wal_bytes_per_s > 0.0 && after.locks_waiting == 0, "{major}: {after:?}");

        // any role may ask
        client.batch_execute("SET ROLE plain").await.unwrap();
        assert_eq!(sample(&client, true).await.unwrap().server_version_num / 10_000, major);
    }
}
