//! Towards servers.

use crate::{
    certificates::{Authority, Pair},
    clients::psql,
    harness::{PROGRAM, Proxy, url_text, wait_until},
    support::Server,
};
use std::{fs, path::Path, process::Command, time::Duration};
use understudy::{
    backend::{self, Connection},
    config::ServerUrl,
};

const OVER_TLS: &str = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";

/// The superuser's url with more parameters; the host may be another name of this machine.
pub fn url(server: &Server, host: &str, parameters: &str) -> String {
    let text = url_text(&server.superuser_url("shop")).replace("127.0.0.1", host);
    format!("{text}?{parameters}")
}

async fn over_tls(text: &str) -> Result<bool, String> {
    let url = ServerUrl::parse(text)?;
    let mut raw = Connection::open(&url, &[]).await.map_err(|error| error.to_string())?;
    let raw = raw.simple_query(OVER_TLS).await.unwrap()[0][0].as_deref() == Some("t");
    let (client, connection) = backend::control(&url, "understudy test").await.map_err(|error| error.to_string())?;
    tokio::spawn(connection);
    let control: bool = client.query_one(OVER_TLS, &[]).await.unwrap().get(0);
    assert_eq!(raw, control, "{url}");
    Ok(raw)
}

pub async fn sslmodes(authority: &Authority, source: &Server, shadow: &Server, plain: &Server) {
    let other = Authority::new();
    let (known, unknown) = (authority.certificate(), other.certificate());
    let (known, unknown) = (format!("sslrootcert={}", known.display()), format!("sslrootcert={}", unknown.display()));
    let server_itself = format!("sslrootcert={}", authority.certificate().with_file_name("server.crt").display());
    for (server, host, parameters, expected) in [
        (source, "127.0.0.1", "sslmode=disable", Ok(false)),
        (source, "127.0.0.1", "sslmode=allow", Ok(false)),
        (source, "127.0.0.1", "sslmode=prefer", Ok(true)),
        (source, "127.0.0.1", "sslmode=require", Ok(true)),
        (source, "127.0.0.1", &format!("sslmode=verify-ca&{known}"), Ok(true)),
        (source, "127.0.0.1", &format!("sslmode=verify-full&{known}"), Ok(true)),
        (source, "localhost", &format!("sslmode=verify-full&{known}"), Ok(true)),
        (source, "127.0.0.1", &format!("sslmode=verify-full&{server_itself}"), Ok(true)),
        (source, "127.0.0.2", &format!("sslmode=prefer&{unknown}"), Err("cannot reach")),
        (source, "127.0.0.1", &format!("sslmode=prefer&{unknown}"), Ok(true)),
        (source, "127.0.0.1", &format!("sslmode=require&{unknown}"), Err("comes from none of the authorities")),
        (source, "127.0.0.1", &format!("sslmode=verify-ca&{unknown}"), Err("comes from none of the authorities")),
        (source, "127.0.0.1", "sslmode=verify-ca&sslrootcert=/nowhere.crt", Err("/nowhere.crt")),
        // its certificate has a common name only
        (shadow, "localhost", &format!("sslmode=verify-full&{known}"), Ok(true)),
        (shadow, "127.0.0.1", &format!("sslmode=verify-full&{known}"), Err("is not for the address 127.0.0.1")),
        (shadow, "127.0.0.1", &format!("sslmode=verify-ca&{known}"), Ok(true)),
        (shadow, "localhost", &format!("sslmode=verify-full&sslnegotiation=direct&{known}"), Ok(true)),
        (source, "localhost", &format!("sslmode=verify-full&sslnegotiation=direct&{known}"), Err("PostgreSQL 17 or newer")),
        (plain, "127.0.0.1", "sslmode=disable", Ok(false)),
        (plain, "127.0.0.1", "sslmode=allow", Ok(false)),
        (plain, "127.0.0.1", "sslmode=prefer", Ok(false)),
        (plain, "127.0.0.1", "sslmode=require", Err("does not speak TLS, which sslmode=require")),
        (plain, "127.0.0.1", &format!("sslmode=verify-full&{known}"), Err("does not speak TLS, which sslmode=verify-full")),
    ] {
        let found = over_tls(&url(server, host, parameters)).await;
        match (&found, expected) {
            (Ok(found), Ok(expected)) => assert_eq!(*found, expected, "{parameters} at {host}"),
            (Err(found), Err(part)) => assert!(found.contains(part), "{parameters} at {host}: {found}"),
            _ => panic!("{parameters} at {host}: {found:?} instead of {expected:?}"),
        }
    }
}

pub async fn channel_binding(authority: &Authority, source: &Server) {
    let _ = authority;
    over_tls(&url(source, "127.0.0.1", "sslmode=require&channel_binding=require")).await.unwrap();
    over_tls(&url(source, "127.0.0.1", "sslmode=require&channel_binding=disable")).await.unwrap();
    let refused = over_tls(&url(source, "127.0.0.1", "sslmode=disable&channel_binding=require")).await.unwrap_err();
    assert!(refused.contains("SCRAM-SHA-256-PLUS"), "{refused}");
}

pub async fn check(source: &Server, plain: &Server) {
    let folder = crate::harness::folder("check-tls");
    let file = folder.join("proxy.toml");
    let text = format!(
        "[[database]]\nname = \"shop\"\nsource = \"{}\"\n[[database.shadow]]\nname = \"s\"\nurl = \"{}\"\n",
        url(source, "127.0.0.1", "sslmode=require"),
        url(plain, "127.0.0.1", "sslmode=require")
    );
    fs::write(&file, text).unwrap();
    let output = Command::new(PROGRAM).args(["check", "--config"]).arg(&file).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("does not speak TLS") && said.contains("ssl = on"), "{said}");
}

fn hba_of(server: &Server, file: &str, lines: &str) {
    let _ = server;
    let old = fs::read_to_string(file).unwrap();
    fs::write(file, format!("{lines}\n{old}")).unwrap();
}

async fn admin(server: &Server, sql: &str) -> Option<String> {
    let client = server.connect("shop").await.unwrap();
    client.query_one(sql, &[]).await.unwrap().try_get(0).ok()
}

pub async fn migration(authority: &Authority, source: &Server, shadow: &Server, _own: &Pair) {
    let known = format!("sslmode=verify-full&sslrootcert={}", authority.certificate().display());
    let front = authority.issue("front", "front", "IP:127.0.0.1");
    let databases = format!(
        "[[database]]\nname = \"shop\"\nsource = \"{}\"\n[[database.shadow]]\nname = \"pg18\"\nurl = \"{}\"\nsample_reads = 100.0\n",
        url(source, "127.0.0.1", &known),
        url(shadow, "localhost", &known)
    );
    let more = format!("[proxy.tls]\ncertificate = \"{}\"\nkey = \"{}\"\n", front.certificate.display(), front.key.display());
    let app = source.app_url("shop");
    psql(&app, "", "CREATE TABLE item (id int PRIMARY KEY, v text); INSERT INTO item SELECT g, 'v' || g FROM generate_series(1, 1000) g")
        .is("CREATE TABLE\nINSERT 0 1000");
    // as the copy of roles does it: the same verifier, not only the same password
    let verifier = admin(source, "SELECT rolpassword FROM pg_authid WHERE rolname = 'app'").await.unwrap();
    shadow.connect("shop").await.unwrap().batch_execute(&format!("ALTER ROLE app PASSWORD '{verifier}'")).await.unwrap();
    let proxy = Proxy::start("tls-servers", &more, &databases);
    let through = proxy.through(&app);
    // TLS on both sides: the proof is taken here and given to the source anew, bound on either side
    for parameters in ["sslmode=disable", "sslmode=require", "sslmode=require channel_binding=require"] {
        psql(&through, parameters, OVER_TLS).is("t");
        let wrong = crate::harness::with_password(&through, "wrong");
        psql(&wrong, parameters, "SELECT 1").fails("password authentication failed for user");
    }
    proxy.rows("SHADOW START pg18").await;
    wait_until("the shadow is in step", Duration::from_secs(60), || async {
        let shadow = proxy.shadow().await;
        shadow.health == "healthy" && shadow.feed.state == "streaming"
    })
    .await;
    psql(&through, "sslmode=require", "INSERT INTO item VALUES (1001, 'new')").is("INSERT 0 1");
    let rows = proxy.rows("VERIFY pg18").await;
    assert!(!rows.is_empty());
    let all = "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE application_name LIKE 'understudy%' AND NOT ssl";
    for server in [source, shadow] {
        let client = server.connect("shop").await.unwrap();
        assert_eq!(client.query_one(all, &[]).await.unwrap().get::<_, i64>(0), 0, "connections of ours in clear");
    }
    // no password of this role is configured: its session follows the cutover with what its own proof has revealed
    let url = ServerUrl {
        tls: Default::default(),
        ..ServerUrl::parse(&format!("postgres://app@127.0.0.1:{}/shop?sslmode=require", proxy.listen)).unwrap()
    };
    let mut session = Connection::open(&ServerUrl { password: app.password.clone(), ..url }, &[]).await.unwrap();
    session.simple_query("SET search_path = public; SELECT 1").await.unwrap();
    proxy.rows("CUTOVER pg18").await;
    let version = "SELECT current_setting('server_version_num')::int / 10000";
    assert_eq!(session.simple_query(version).await.unwrap()[0][0].as_deref(), Some("18"));
    psql(&through, "sslmode=require channel_binding=require", version).is("18");
    psql(&through, "sslmode=require", "INSERT INTO item VALUES (1002, 'newer')").is("INSERT 0 1");
    wait_until("the way back streams, and is taken", Duration::from_secs(60), || async { proxy.tell("ROLLBACK shop").await.code == 0 })
        .await;
    assert_eq!(session.simple_query(version).await.unwrap()[0][0].as_deref(), Some("15"));
}

pub async fn picky(authority: &Authority, source: &Server) {
    let file = admin(source, "SELECT current_setting('hba_file')").await.unwrap();
    let before = fs::read_to_string(&file).unwrap();
    let pair = authority.issue("app", "app", "");
    for (lines, cases) in [
        (
            "hostnossl all app all reject",
            [("sslmode=disable", Err("28000")), ("sslmode=allow", Ok(true)), ("sslmode=prefer", Ok(true)), ("sslmode=require", Ok(true))],
        ),
        (
            "hostssl all app all reject",
            [
                ("sslmode=disable", Ok(false)),
                ("sslmode=allow", Ok(false)),
                ("sslmode=prefer", Ok(false)),
                ("sslmode=require", Err("28000")),
            ],
        ),
    ] {
        fs::write(&file, &before).unwrap();
        hba_of(source, &file, lines);
        admin(source, "SELECT pg_reload_conf()::text").await;
        let ServerUrl { password, .. } = source.app_url("shop");
        let url = |mode: &str| {
            let url = ServerUrl::parse(&format!("postgres://app@127.0.0.1:{}/shop?{mode}", source.port())).unwrap();
            ServerUrl { password: password.clone(), ..url }
        };
        // the reload is noticed by the next connection only after a moment
        let settled = |mode: &'static str, wanted: bool| {
            let url = url(mode);
            async move { Connection::open(&url, &[]).await.is_ok() == wanted }
        };
        for (mode, expected) in cases {
            wait_until("the server has read its rules", Duration::from_secs(60), || settled(mode, expected.is_ok())).await;
            match (Connection::open(&url(mode), &[]).await, expected) {
                (Ok(mut connection), Ok(tls)) => {
                    let found = connection.simple_query(OVER_TLS).await.unwrap()[0][0].as_deref() == Some("t");
                    assert_eq!(found, tls, "{lines}: {mode}");
                }
                (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{lines}: {mode}: {error}"),
                (found, _) => panic!("{lines}: {mode}: {found:?}"),
            }
        }
        // clients of a proxy whose url says `prefer` or `allow` get in, too, whichever the server wants
        for mode in ["sslmode=prefer", "sslmode=allow"] {
            let databases = format!("[[database]]\nname = \"shop\"\nsource = \"{}\"\n", self::url(source, "127.0.0.1", mode));
            let proxy = Proxy::start("picky", "", &databases);
            psql(&proxy.through(&source.app_url("shop")), "", "SELECT 1").is("1");
        }
    }
    // the server asks for a certificate
    fs::write(&file, format!("hostssl all app all cert\n{before}")).unwrap();
    admin(source, "SELECT pg_reload_conf()::text").await;
    let show = |pair: &Pair| {
        let text = format!(
            "postgres://app@127.0.0.1:{}/shop?sslmode=require&sslcert={}&sslkey={}",
            source.port(),
            pair.certificate.display(),
            pair.key.display()
        );
        ServerUrl::parse(&text).unwrap()
    };
    let url = show(&pair);
    wait_until("the certificate lets us in", Duration::from_secs(60), || async { Connection::open(&url, &[]).await.is_ok() }).await;
    let stranger = Authority::new().issue("app", "app", "");
    assert!(!Path::new(&stranger.key).exists(), "its authority is gone");
    let error = Connection::open(&show(&stranger), &[]).await.unwrap_err().to_string();
    assert!(error.contains("sslcert"), "{error}");
    fs::write(&file, &before).unwrap();
    admin(source, "SELECT pg_reload_conf()::text").await;
}
