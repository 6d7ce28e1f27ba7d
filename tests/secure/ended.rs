//! Authentication that ends at the proxy.

use crate::{
    certificates::{Authority, Pair},
    clients::{Said, message, psql, raw, startup},
    harness::{PROGRAM, Proxy, folder, url_text, wait_until, with_password},
    support::Server,
};
use std::{fs, io::Write, path::PathBuf, process::Command, time::Duration};
use understudy::{backend::Connection, config::ServerUrl};

/// Rules that keep to the method that the list allows.
const RULES: &str = "
# type   database  user        address         method
hostnossl all      secretive   all             reject
host      all      banned      127.0.0.0/8     reject
hostssl   all      certified   127.0.0.1/32    cert map=web
host      all      trusted     127.0.0.1/32    trust
host      all      clear       all             password
host      all      modern      all             scram-sha-256
host      shop     all         127.0.0.1 255.255.255.255  md5
";

/// A soft hyphen that is nothing, and a Roman numeral that is two letters.
const COMPOSED: &str = "I\u{ad}X \u{2168}";

fn lengthy() -> String {
    "long".repeat(500)
}

pub struct Stage {
    pub authority: Authority,
    pub source: Server,
    pub proxy: Proxy,
    folder: PathBuf,
    front: Pair,
}

fn md5(user: &str, password: &str) -> String {
    // the inner hash of an md5 answer is what PostgreSQL stores
    let mut child = Command::new("openssl")
        .args(["md5", "-r"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(format!("{password}{user}").as_bytes()).unwrap();
    let text = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
    format!("md5{}", text.split(' ').next().unwrap())
}

impl Stage {
    pub async fn new(authority: Authority, source: Server) -> Stage {
        let mut admin = Connection::open(&source.superuser_url("shop"), &[]).await.unwrap();
        for role in ["plain", "modern", "hashed", "clear", "trusted", "certified", "secretive", "banned", "elsewhere"] {
            let text = format!("CREATE ROLE {role} LOGIN PASSWORD 'pw-{role}'");
            let text = if role == "hashed" { format!("SET password_encryption = 'md5'; {text}; RESET password_encryption") } else { text };
            admin.simple_query(&text).await.unwrap();
        }
        admin.simple_query(&format!("CREATE ROLE lengthy LOGIN PASSWORD '{}'", lengthy())).await.unwrap();
        admin.simple_query(&format!("CREATE ROLE composed LOGIN PASSWORD '{COMPOSED}'")).await.unwrap();
        // in the list with what the server stores
        let stored = admin.simple_query("SELECT rolpassword FROM pg_authid WHERE rolname = 'modern'").await.unwrap();
        let modern = stored[0][0].clone().unwrap();
        let file = admin.simple_query("SELECT current_setting('hba_file')").await.unwrap()[0][0].clone().unwrap();
        let old = fs::read_to_string(&file).unwrap();
        fs::write(&file, format!("host all hashed all md5\nhost all trusted,certified all trust\nhost all clear all password\n{old}"))
            .unwrap();
        admin.simple_query("SELECT pg_reload_conf()").await.unwrap();
        let folder = folder("ended-files");
        let list = format!(
            "; users\n\"plain\" \"pw-plain\"\n\"modern\" \"{modern}\"\n\"hashed\" \"{}\"\n\"clear\" \"pw-clear\"\n\"trusted\" \"\"\n\
             \"lengthy\" \"{}\"\n\"composed\" \"{COMPOSED}\"\n\"secretive\" \"pw-secretive\"\n\"banned\" \"pw-banned\"\n\"elsewhere\" \"not the server's\"\n",
            md5("hashed", "pw-hashed"),
            lengthy()
        );
        fs::write(folder.join("users.txt"), list).unwrap();
        fs::write(folder.join("hba.conf"), RULES).unwrap();
        fs::write(folder.join("ident.conf"), "web  web-1.example  certified\n").unwrap();
        let front = authority.issue("front", "front", "DNS:localhost,IP:127.0.0.1");
        let more = format!(
            "[proxy.tls]\ncertificate = \"{}\"\nkey = \"{}\"\nclient_ca = \"{}\"\n\
             [proxy.auth]\nusers = \"file:{3}/users.txt\"\nhba = \"{3}/hba.conf\"\nident = \"{3}/ident.conf\"\n",
            front.certificate.display(),
            front.key.display(),
            authority.certificate().display(),
            folder.display(),
        );
        let databases = format!("[[database]]\nname = \"shop\"\nsource = \"{}\"\n", url_text(&source.superuser_url("shop")));
        let proxy = Proxy::start("ended", &more, &databases);
        Stage { authority, source, proxy, folder, front }
    }

    fn url(&self, user: &str, password: &str) -> ServerUrl {
        let url = self.proxy.through(&self.source.app_url("shop"));
        with_password(&ServerUrl { user: user.into(), ..url }, password)
    }

    fn psql(&self, user: &str, password: &str, parameters: &str) -> Said {
        psql(&self.url(user, password), parameters, "SELECT current_user || ' ' || session_user")
    }
}

pub async fn user_list(stage: &Stage) {
    for user in ["plain", "modern", "hashed", "clear"] {
        for parameters in ["sslmode=disable", "sslmode=require", "sslmode=require channel_binding=disable"] {
            stage.psql(user, &format!("pw-{user}"), parameters).is(&format!("{user} {user}"));
            let wrong = stage.psql(user, "wrong", parameters);
            wrong.fails(&format!("password authentication failed for user \"{user}\""));
        }
    }
    // longer than proxies like, and other characters for the same password (SASLprep, RFC 4013)
    for (user, password) in [("lengthy", lengthy().as_str()), ("composed", COMPOSED), ("composed", "IX IX")] {
        stage.psql(user, password, "sslmode=disable").is(&format!("{user} {user}"));
        stage.psql(user, &password[1..], "sslmode=disable").fails("password authentication failed");
    }
    for user in ["plain", "modern"] {
        stage.psql(user, &format!("pw-{user}"), "sslmode=require channel_binding=require").is(&format!("{user} {user}"));
    }
    // the list and the server disagree: the client hears it from the server
    stage.psql("elsewhere", "not the server's", "").fails("password authentication failed for user \"elsewhere\"");
    // drivers, with the SQLSTATE
    for (user, password, expected) in [("plain", "pw-plain", "ok"), ("plain", "x", "28P01"), ("nobody", "x", "28P01")] {
        let found = crate::harness::try_connect(&stage.url(user, password)).await;
        let found = found.map_or_else(|error| error.code().unwrap().code().to_owned(), |_| "ok".into());
        assert_eq!(found, expected, "{user}");
    }
    let nowhere = ServerUrl { dbname: "nowhere".into(), ..stage.url("plain", "pw-plain") };
    let error = crate::harness::try_connect(&nowhere).await.err().unwrap();
    assert_eq!(error.code().unwrap().code(), "3D000");
    // start-up parameters reach the server
    psql(
        &stage.url("plain", "pw-plain"),
        "options='-c work_mem=3MB' application_name=mine",
        "SELECT current_setting('work_mem') || current_setting('application_name')",
    )
    .is("3MBmine");
}

/// Salt and iterations that a name is asked with.
fn challenge(stage: &Stage, user: &str) -> (Vec<u8>, String) {
    let mut stream = raw(&stage.proxy, &startup(3 << 16, &[("user", user), ("database", "shop")]));
    let (tag, offer) = message(&mut stream);
    assert_eq!(tag, b'R');
    let first = b"n,,n=,r=abcdefgh";
    let mut body = b"SCRAM-SHA-256\0".to_vec();
    body.extend_from_slice(&(first.len() as i32).to_be_bytes());
    body.extend_from_slice(first);
    let mut answer = vec![b'p'];
    answer.extend_from_slice(&(body.len() as u32 + 4).to_be_bytes());
    answer.extend_from_slice(&body);
    stream.write_all(&answer).unwrap();
    let (_, text) = message(&mut stream);
    let text = String::from_utf8(text[4..].to_vec()).unwrap();
    (offer, text.split_once(",s=").unwrap().1.to_owned())
}

pub async fn unknown_names(stage: &Stage) {
    let (known, unknown) = (challenge(stage, "modern"), challenge(stage, "nobody"));
    assert_eq!(known.0, unknown.0, "the mechanisms offered");
    assert_eq!(known.1.len(), unknown.1.len(), "salt and iterations: {} and {}", known.1, unknown.1);
    assert_eq!(unknown, challenge(stage, "nobody"), "asked twice");
    assert_ne!(unknown.1, challenge(stage, "noone").1);
    let said: Vec<String> = ["modern", "nobody"].map(|user| stage.psql(user, "wrong", "").errors.replace(user, "X")).to_vec();
    assert_eq!(said[0], said[1]);
}

pub async fn rules(stage: &Stage) {
    stage.psql("secretive", "pw-secretive", "sslmode=disable").fails("rejects connection for host \"127.0.0.1\", user \"secretive\"");
    stage.psql("secretive", "pw-secretive", "sslmode=require").is("secretive secretive");
    stage.psql("banned", "pw-banned", "").fails("rejects connection for host");
    stage.psql("trusted", "", "").is("trusted trusted");
    stage.psql("certified", "pw-certified", "sslmode=disable").fails("password authentication failed");
    // replication connections are another database to the rules: none is meant for them
    let error = Connection::open(&stage.url("plain", "pw-plain"), &[(b"replication", b"true")]).await.unwrap_err().to_string();
    assert!(error.contains("no hba rule of understudy for host"), "{error}");
}

pub async fn certificates(stage: &Stage) {
    let web = stage.authority.issue("web", "web-1.example", "");
    let other = stage.authority.issue("other", "web-2.example", "");
    let stranger = Authority::new();
    let strange = stranger.issue("web", "web-1.example", "");
    let show = |pair: &Pair| format!("sslmode=require sslcert={} sslkey={}", pair.certificate.display(), pair.key.display());
    stage.psql("certified", "", &show(&web)).is("certified certified");
    stage.psql("certified", "", &show(&other)).fails("certificate authentication failed for user \"certified\"");
    stage.psql("certified", "", "sslmode=require").fails("connection requires a valid client certificate");
    assert!(!stage.psql("certified", "", &show(&strange)).ok, "an authority that nobody knows");
    // a certificate does not open other doors
    stage.psql("plain", "", &show(&web)).fails("fe_sendauth: no password supplied");
}

pub async fn edits(stage: &Stage) {
    let path = stage.folder.join("users.txt");
    let list = fs::read_to_string(&path).unwrap();
    fs::write(&path, list.replace("pw-plain", "another")).unwrap();
    wait_until("the new list holds", Duration::from_secs(60), || async {
        stage.psql("plain", "pw-plain", "").errors.contains("28P01") || !stage.psql("plain", "pw-plain", "").ok
    })
    .await;
    fs::write(&path, "\"plain\" unquoted\n").unwrap();
    let output = stage.proxy.tell("RELOAD").await;
    assert!(output.code != 0 && output.stderr.contains("users.txt line 1") && !output.stderr.contains("unquoted"), "{}", output.stderr);
    stage.psql("modern", "pw-modern", "").is("modern modern");
    fs::write(&path, list).unwrap();
    stage.proxy.rows("RELOAD").await;
    stage.psql("plain", "pw-plain", "").is("plain plain");
}

pub async fn query(stage: &Stage) {
    let databases = format!("[[database]]\nname = \"shop\"\nsource = \"{}\"\n", url_text(&stage.source.superuser_url("shop")));
    let more = format!(
        "[proxy.tls]\ncertificate = \"{}\"\nkey = \"{}\"\n[proxy.auth]\nusers = \"query\"\n",
        stage.front.certificate.display(),
        stage.front.key.display()
    );
    let proxy = Proxy::start("auth-query", &more, &databases);
    let url = |user: &str, password: &str| {
        with_password(&ServerUrl { user: user.into(), ..proxy.through(&stage.source.app_url("shop")) }, password)
    };
    for (user, parameters) in [("plain", "sslmode=disable"), ("plain", "sslmode=require channel_binding=require"), ("hashed", "")] {
        psql(&url(user, &format!("pw-{user}")), parameters, "SELECT current_user").is(user);
        psql(&url(user, "wrong"), parameters, "SELECT 1").fails("password authentication failed for user");
    }
    psql(&url("nobody", "x"), "", "SELECT 1").fails("password authentication failed for user \"nobody\"");
    psql(&url("x' OR true --", "x"), "", "SELECT 1").fails("password authentication failed for user");
    // the search_path of a client's start-up does not reach the query
    psql(&url("plain", "pw-plain"), "options='-c search_path=evil'", "SELECT current_setting('search_path')").is("evil");
    let mut admin = Connection::open(&stage.source.superuser_url("shop"), &[]).await.unwrap();
    admin.simple_query("ALTER ROLE plain PASSWORD 'changed'").await.unwrap();
    // what is remembered does not fit any more: whoever fails makes it be asked again
    wait_until("the new password is known", Duration::from_secs(60), || async { psql(&url("plain", "changed"), "", "SELECT 1").ok }).await;
    psql(&url("plain", "pw-plain"), "", "SELECT 1").fails("password authentication failed");
    admin.simple_query("ALTER ROLE plain PASSWORD 'pw-plain'").await.unwrap();
    // many at once, with one connection of ours on the server
    let all =
        futures_util::future::join_all((0..30).map(|_| async { Connection::open(&url("modern", "pw-modern"), &[]).await.is_ok() })).await;
    assert!(all.iter().all(|ok| *ok));
    let ours = admin.simple_query("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'understudy auth'").await.unwrap();
    assert_eq!(ours[0][0].as_deref(), Some("1"));
    let log = proxy.log_text();
    for secret in ["pw-plain", "pw-modern", "changed", "SCRAM-SHA-256$", "md5"] {
        assert!(!log.contains(secret), "{secret} in the log:\n{log}");
    }
}

pub async fn wrong_settings(stage: &Stage) {
    let folder = folder("auth-wrong");
    for (auth, part) in [
        ("users = \"file:/nowhere.txt\"", "/nowhere.txt"),
        ("rules = [\"host all all all ldap\"]", "ldap"),
        ("rules = [\"host all all all md5\"]", "users = \\\"relay\\\""),
        ("users = \"query\"\nrules = [\"hostssl all all all cert\"]", "client_ca"),
        ("users = \"query\"\nrules = [\"host all all all md5 map=x\"]", "ident"),
    ] {
        let file = folder.join("proxy.toml");
        let source = url_text(&stage.source.superuser_url("shop"));
        let metadata = folder.join("m.db");
        let text = format!(
            "[proxy]\nlisten = \"127.0.0.1:{}\"\nmetadata = \"sqlite:{}\"\n[proxy.auth]\n{auth}\n[[database]]\nname = \"shop\"\nsource = \"{source}\"\n",
            crate::support::free_port().unwrap(),
            metadata.display()
        );
        fs::write(&file, text).unwrap();
        let output = Command::new(PROGRAM).args(["run", "--config"]).arg(&file).output().unwrap();
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(!output.status.success() && said.contains(&part.replace("\\\"", "\"")), "{auth}: {said}");
    }
}
