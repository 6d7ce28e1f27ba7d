//! Towards clients.

use crate::{
    certificates::{Authority, Pair},
    clients::{GSS_REQUEST, SSL_REQUEST, message, psql, raw, rest, startup, take},
    harness::{Proxy, wait_until},
    support::Server,
};
use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    process::{Command, Stdio},
    time::Duration,
};
use understudy::{
    backend::{self, Connection},
    config::{ServerUrl, SslMode},
};

pub struct Stage {
    pub authority: Authority,
    pub source: Server,
    pub proxy: Proxy,
    pub own: Pair,
}

impl Stage {
    fn url(&self) -> ServerUrl {
        self.proxy.through(&self.source.app_url("shop"))
    }

    fn verified(&self, more: &str) -> ServerUrl {
        let ServerUrl { user, password, .. } = self.url();
        let text = format!(
            "postgres://{user}@localhost:{}/shop?sslmode=verify-full&sslrootcert={}{more}",
            self.proxy.listen,
            self.authority.certificate().display()
        );
        ServerUrl { password, ..ServerUrl::parse(&text).unwrap() }
    }
}

pub async fn sslmodes(stage: &Stage) {
    let url = stage.url();
    let roots = format!("sslrootcert={}", stage.authority.certificate().display());
    for (parameters, tls) in [
        ("sslmode=disable".to_owned(), false),
        ("sslmode=allow".into(), false),
        ("sslmode=prefer".into(), true),
        ("sslmode=require".into(), true),
        (format!("sslmode=verify-ca {roots}"), true),
        (format!("sslmode=verify-full {roots}"), true),
        ("sslmode=require ssl_max_protocol_version=TLSv1.2".into(), true),
        ("sslmode=require ssl_min_protocol_version=TLSv1.3".into(), true),
    ] {
        psql(&url, &parameters, "SELECT 40 + 2").is("42");
        let info = psql(&url, &parameters, "\\conninfo");
        assert_eq!(info.output.contains("SSL connection"), tls, "{parameters}: {info:?}");
    }
    let other = Authority::new();
    psql(&url, &format!("sslmode=verify-ca sslrootcert={}", other.certificate().display()), "SELECT 1").fails("certificate verify failed");
}

pub async fn orders(stage: &Stage) {
    let user = [("user", "nobody"), ("database", "shop")];
    // each once, in any order, then the start-up: the source refuses the name, so it was reached
    for (requests, answers) in [(&[GSS_REQUEST][..], "N"), (&[], "")] {
        let mut stream = raw(&stage.proxy, b"");
        for (request, answer) in requests.iter().zip(answers.bytes()) {
            stream.write_all(request).unwrap();
            assert_eq!(take(&mut stream, 1), [answer]);
        }
        stream.write_all(&startup(3 << 16, &user)).unwrap();
        assert_eq!(message(&mut stream).0, b'R');
    }
    for requests in [&[SSL_REQUEST][..], &[GSS_REQUEST, SSL_REQUEST]] {
        let mut stream = raw(&stage.proxy, b"");
        for request in requests {
            stream.write_all(request).unwrap();
            let expected = if *request == SSL_REQUEST { b'S' } else { b'N' };
            assert_eq!(take(&mut stream, 1), [expected]);
        }
    }
    let mut stream = raw(&stage.proxy, &GSS_REQUEST);
    assert_eq!(take(&mut stream, 1), b"N");
    stream.write_all(&GSS_REQUEST).unwrap();
    let said = String::from_utf8_lossy(&rest(&mut stream)).into_owned();
    assert!(said.contains("0A000") && said.contains("unsupported frontend protocol 1234.5680"), "{said}");
    let mut stream = raw(&stage.proxy, &startup(2 << 16, &user));
    let said = String::from_utf8_lossy(&rest(&mut stream)).into_owned();
    assert!(said.contains("0A000") && said.contains("unsupported frontend protocol 2.0: server supports 3.0 to 3.2"), "{said}");
}

pub async fn stuffed(stage: &Stage) {
    let startup = startup(3 << 16, &[("user", "app"), ("database", "shop")]);
    for (request, name) in [(SSL_REQUEST, "SSL"), (GSS_REQUEST, "GSSAPI encryption")] {
        let mut stream = raw(&stage.proxy, &[&request[..], &startup].concat());
        let said = String::from_utf8_lossy(&rest(&mut stream)).into_owned();
        assert!(said.contains(&format!("received unencrypted data after {name} request")) && said.contains("08P01"), "{said}");
    }
    // put in between the answer and the handshake, it breaks the handshake
    let mut stream = raw(&stage.proxy, &SSL_REQUEST);
    assert_eq!(take(&mut stream, 1), b"S");
    stream.write_all(&startup).unwrap();
    assert!(!rest(&mut stream).contains(&b'R'));
}

fn s_client(stage: &Stage, more: &[&str]) -> String {
    let mut child = Command::new("openssl")
        .args(["s_client", "-connect", &format!("127.0.0.1:{}", stage.proxy.listen)])
        .args(more)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let _ = input.write_all(&startup(3 << 16, &[("user", "app"), ("database", "shop")]));
    let mut bytes = [0; 16 << 10];
    let mut text = String::new();
    let mut output = child.stdout.take().unwrap();
    while let Ok(read @ 1..) = output.read(&mut bytes) {
        text.push_str(&String::from_utf8_lossy(&bytes[..read]));
        if text.contains("SCRAM-SHA-256") {
            break; // the source's word, through TLS
        }
    }
    drop(input);
    let _ = child.kill();
    let _ = child.wait();
    text
}

pub async fn direct(stage: &Stage) {
    let mut connection = Connection::open(&stage.verified("&sslnegotiation=direct"), &[]).await.unwrap();
    assert_eq!(connection.simple_query("SELECT 1").await.unwrap(), [[Some("1".to_owned())]]);
    let said = s_client(stage, &["-alpn", "postgresql"]);
    assert!(said.contains("ALPN protocol: postgresql") && said.contains("SCRAM-SHA-256"), "{said}");
    let said = s_client(stage, &[]);
    assert!(said.contains("No ALPN negotiated") && !said.contains("SCRAM-SHA-256"), "{said}");
    assert!(!s_client(stage, &["-alpn", "http/1.1"]).contains("SCRAM-SHA-256"));
    // inside TLS there is no second one
    let said = s_client(stage, &["-starttls", "postgres"]);
    assert!(said.contains("SCRAM-SHA-256"), "{said}");
}

pub async fn old_versions(stage: &Stage) {
    for version in ["-tls1", "-tls1_1"] {
        let said = s_client(stage, &["-starttls", "postgres", version, "-cipher", "DEFAULT@SECLEVEL=0"]);
        assert!(!said.contains("SCRAM-SHA-256") && !said.contains("BEGIN CERTIFICATE"), "{version}: {said}");
    }
}

pub async fn same_bytes(stage: &Stage) {
    let rows = "COPY (SELECT g, md5(g::text), repeat(chr(65 + g % 26), g % 3000) FROM generate_series(1, 12000) g) TO STDOUT";
    let direct = psql(&stage.source.app_url("shop"), "sslmode=disable", rows);
    let through = psql(&stage.url(), "sslmode=require", rows);
    assert!(direct.ok && direct.output.len() > 15 << 20, "{}", direct.errors);
    assert!(direct.output == through.output, "{} and {} bytes", direct.output.len(), through.output.len());
    // and the other way: a statement that is larger than every buffer
    let url = stage.verified("");
    let mut connection = Connection::open(&url, &[]).await.unwrap();
    let text = "x".repeat(9 << 20);
    let length = connection.query("SELECT length($1), md5($1), $1", &[&text]).await.unwrap();
    assert_eq!(length[0][0].as_deref(), Some(text.len().to_string().as_str()));
    assert_eq!(length[0][2].as_ref(), Some(&text));
    // the protocol's pipelining over TLS: all is sent before anything is read
    let (client, driver) = backend::control(&url, "pipelined").await.unwrap();
    let driver = tokio::spawn(driver);
    let answers = futures_util::future::join_all((0..500).map(|number| {
        let client = &client;
        async move { client.query_one("SELECT $1::int4 + 1, repeat('y', 2000)", &[&number]).await.unwrap().get::<_, i32>(0) }
    }));
    assert_eq!(answers.await, (1..=500).collect::<Vec<i32>>());
    drop(client);
    driver.await.unwrap().unwrap();
}

pub async fn cancel(stage: &Stage) {
    let url = stage.verified("");
    let mut sleeping = Connection::open(&url, &[]).await.unwrap();
    let mut bystander = Connection::open(&url, &[]).await.unwrap();
    let key = sleeping.key.clone();
    let slept = tokio::spawn(async move { sleeping.simple_query("SELECT pg_sleep(60)").await });
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%' AND state = 'active'";
    let mut control = Connection::open(&stage.source.superuser_url("shop"), &[]).await.unwrap();
    while control.simple_query(waits).await.unwrap()[0][0].as_deref() != Some("1") {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    backend::cancel(&url, key.0, b"\0\0\0\0").await.unwrap(); // not the key
    assert_eq!(control.simple_query(waits).await.unwrap()[0][0].as_deref(), Some("1"));
    backend::cancel(&url, key.0, &key.1).await.unwrap();
    let error = slept.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("57014"), "{error}");
    // held at the gate, where no server knows of it
    stage.proxy.rows("PAUSE shop").await;
    let key = bystander.key.clone();
    let held = tokio::spawn(async move { bystander.simple_query("SELECT 'held'").await });
    while !held.is_finished() {
        backend::cancel(&url, key.0, &key.1).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let error = held.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("57014"), "{error}");
    stage.proxy.rows("RESUME shop").await;
}

/// The end of TLS said, not said, and a reset: the session ends, and its transaction with it.
pub async fn leaving(stage: &Stage) {
    for way in ["close_notify", "nothing", "a reset"] {
        let mut connection = Connection::open(&stage.verified(""), &[]).await.unwrap();
        connection.simple_query("BEGIN").await.unwrap();
        match way {
            "close_notify" => tokio::io::AsyncWriteExt::shutdown(&mut connection.stream).await.unwrap(),
            "a reset" => socket2::SockRef::from(connection.stream.tcp().unwrap()).set_linger(Some(Duration::ZERO)).unwrap(),
            _ => {}
        }
        drop(connection);
        wait_until(way, Duration::from_secs(60), || async {
            stage.proxy.state().await.databases[0].clients == 0 && stage.proxy.rows("SHOW POOLS").await[0]["in_transaction"] == 0
        })
        .await;
    }
}

/// Gives each byte of the client a packet of its own.
fn drip(proxy: u16) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        let mut server = TcpStream::connect(("127.0.0.1", proxy)).unwrap();
        server.set_nodelay(true).unwrap();
        let (mut back_from, mut back_to) = (server.try_clone().unwrap(), client.try_clone().unwrap());
        std::thread::spawn(move || {
            let mut byte = [0];
            while let Ok(1) = back_from.read(&mut byte) {
                if back_to.write_all(&byte).is_err() {
                    break;
                }
            }
        });
        let mut byte = [0];
        while let Ok(1) = client.read(&mut byte) {
            if server.write_all(&byte).is_err() {
                break;
            }
        }
    });
    port
}

pub async fn slow(stage: &Stage) {
    for more in ["", "&sslnegotiation=direct"] {
        let url = ServerUrl { port: drip(stage.proxy.listen), ..stage.verified(more) };
        let mut connection = Connection::open(&url, &[]).await.unwrap();
        assert_eq!(connection.simple_query("SELECT 1").await.unwrap().len(), 1);
    }
    let mut half: Vec<TcpStream> = (0..40)
        .map(|number| match number % 4 {
            0 => raw(&stage.proxy, b""),
            1 => raw(&stage.proxy, &SSL_REQUEST[..5]),
            2 => raw(&stage.proxy, &SSL_REQUEST),
            _ => raw(&stage.proxy, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
        })
        .collect();
    Connection::open(&stage.verified(""), &[]).await.unwrap();
    // login_timeout ends them all
    for stream in &mut half {
        let _ = rest(stream);
    }
    // a name, and then silence: told why
    let mut silent = raw(&stage.proxy, &startup(3 << 16, &[("user", "app"), ("database", "shop")]));
    assert_eq!(message(&mut silent).0, b'R');
    let said = String::from_utf8_lossy(&rest(&mut silent)).into_owned();
    assert!(said.contains("57014") && said.contains("canceling authentication due to timeout"), "{said}");
}

pub async fn console(stage: &Stage) {
    let url = ServerUrl { dbname: "understudy".into(), user: "operator".into(), password: None, ..stage.url() };
    for mode in ["disable", "require"] {
        let said = psql(&url, &format!("sslmode={mode}"), "SHOW VERSION");
        assert!(said.ok && said.output.contains(env!("CARGO_PKG_VERSION")), "{mode}: {said:?}");
        let said = psql(&url, &format!("sslmode={mode}"), "SHOW NOTHING");
        assert!(!said.ok && said.errors.contains("42601"), "{mode}: {said:?}");
    }
}

pub async fn replaced(stage: &Stage) {
    let other = Authority::new();
    let new = other.issue("next", "proxy", "DNS:localhost,IP:127.0.0.1");
    let mut before = Connection::open(&stage.verified(""), &[]).await.unwrap();
    other.replace(&stage.own, &new);
    let url = stage.url();
    let parameters = format!("sslmode=verify-full sslrootcert={}", other.certificate().display());
    wait_until("the new certificate is shown", Duration::from_secs(60), || async { psql(&url, &parameters, "SELECT 1").ok }).await;
    before.simple_query("SELECT 1").await.unwrap();
    // half a replacement is refused as a whole, and the old pair goes on
    std::fs::write(&stage.own.key, "nonsense").unwrap();
    let output = stage.proxy.tell("RELOAD").await;
    assert!(output.code != 0 && output.stderr.contains("private key"), "{}", output.stderr);
    psql(&url, &parameters, "SELECT 1").is("1");
    other.replace(&stage.own, &new);
    stage.proxy.rows("RELOAD").await;
}

pub async fn required(stage: &Stage) {
    let url = stage.url();
    psql(&url, "sslmode=disable", "SELECT 1").is("1");
    stage.proxy.edit("[proxy.tls]\n", "[proxy.tls]\nrequired = true\n");
    wait_until("TLS is required", Duration::from_secs(60), || async { !psql(&url, "sslmode=disable", "SELECT 1").ok }).await;
    psql(&url, "sslmode=disable", "SELECT 1").fails("understudy takes connections over TLS only");
    psql(&url, "sslmode=allow", "SELECT 1").is("1");
    let _ = SslMode::Require;
}
