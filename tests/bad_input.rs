//! Bad input of every kind gets an exit code that scripts can rely on and a message that says what to do.

#[path = "proxy/harness.rs"]
mod harness;
#[path = "bad_input/protocol.rs"]
mod protocol;
mod support;

use harness::{PROGRAM, Proxy, connect, database_text, folder, section, url_text};
use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};
use support::{Options, Server, free_port};

struct Outcome {
    code: Option<i32>,
    output: String,
}

/// Runs the program to its end; one that goes on running is a failure.
fn understudy(arguments: &[&str]) -> Outcome {
    static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let number = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let log = folder(&format!("outcome/{number}")).join("output.txt");
    let output = std::fs::File::create(&log).unwrap();
    let mut child = Command::new(PROGRAM)
        .args(arguments)
        .env_remove("UNDERSTUDY_NOT_SET")
        .stdin(Stdio::null())
        .stdout(output.try_clone().unwrap())
        .stderr(output)
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    let code = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status.code();
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{arguments:?} did not end:\n{}", std::fs::read_to_string(&log).unwrap());
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    Outcome { code, output: std::fs::read_to_string(&log).unwrap() }
}

impl Outcome {
    fn expect(&self, what: &str, code: i32, parts: &[&str]) {
        assert_eq!(self.code, Some(code), "{what}:\n{}", self.output);
        for part in parts {
            assert!(self.output.contains(part), "{what}: \"{part}\" is not said:\n{}", self.output);
        }
        assert!(!self.output.contains("panicked"), "{what}:\n{}", self.output);
    }
}

fn write(folder: &Path, text: &str) -> PathBuf {
    let path = folder.join("proxy.toml");
    std::fs::write(&path, text).unwrap();
    path
}

#[test]
fn a_wrong_file_is_refused_with_line_and_reason_by_every_command() {
    const GOOD: &str = "[proxy]\nlisten = \"127.0.0.1:1\"\n[[database]]\nname = \"shop\"\nsource = \"postgres://app:pw@127.0.0.1:2/shop\"\n\
        [[database.shadow]]\nname = \"pg18\"\nurl = \"postgres://app:pw@127.0.0.1:3/shop\"\nsample_reads = 10.0\n";
    let folder = folder("wrong-file");
    for (from, to, line, part) in [
        ("sample_reads", "sample_raeds", 9, "unknown field"),
        ("= 10.0", "= -1.0", 9, "percentage between 0 and"),
        ("= 10.0", "= 10.0\nserve_reads = 100.5", 10, "between 0 and 100"),
        ("= 10.0", "= 10.0\n[[database.shadow]]\nname = \"pg18\"\nurl = \"postgres://app@127.0.0.1:4/shop\"", 11, "defined twice"),
        (":pw@127.0.0.1:2", ":${UNDERSTUDY_NOT_SET}@127.0.0.1:2", 5, "UNDERSTUDY_NOT_SET is not set"),
        ("127.0.0.1:3", "127.0.0.1:2", 8, "source itself"),
        ("postgres://app:pw@127.0.0.1:3", "mysql://app:pw@127.0.0.1:3", 8, "postgres://"),
        ("[proxy]\n", "[proxy]\npool_mode = \"statement\"\n", 2, "pool_mode"),
        ("[proxy]\n", "[proxy\n", 1, ""),
    ] {
        let config = write(&folder, &GOOD.replacen(from, to, 1));
        let config = config.to_str().unwrap();
        let place = format!("proxy.toml line {line}: ");
        for arguments in [&["run", "--config", config][..], &["check", "--config", config], &["ctl", "--config", config, "SHOW", "VERSION"]]
        {
            let outcome = understudy(arguments);
            outcome.expect(to, 2, &[part, &place]);
            assert!(!outcome.output.contains(":pw@"), "a password is shown: {}", outcome.output);
        }
    }
    let missing = folder.join("nowhere.toml");
    for command in ["run", "check"] {
        understudy(&[command, "--config", missing.to_str().unwrap()]).expect(command, 2, &["nowhere.toml"]);
    }
}

#[test]
fn wrong_words_on_the_command_line() {
    for arguments in
        [&["rum"][..], &["run", "--confg", "x"], &["ctl"], &["verify"], &["demo", "--break", "everything"], &["model", "train"], &[]]
    {
        understudy(arguments).expect(&format!("{arguments:?}"), 2, &["--help"]);
    }
    understudy(&["--help"]).expect("--help", 0, &["check", "ctl", "demo"]);
    let port = free_port().unwrap();
    let url = format!("postgres://operator@127.0.0.1:{port}");
    understudy(&["ctl", "--url", &url, "SHOW", "VERSION"]).expect("nobody listens", 3, &["is understudy running"]);
    understudy(&["verify", "--url", &url, "pg18"]).expect("nobody listens", 3, &["is understudy running"]);
    understudy(&["ctl", "--url", "nonsense", "SHOW", "VERSION"]).expect("not a url", 2, &["postgres://"]);
}

/// One server whose WAL cannot be decoded, and a proxy in front of it.
#[tokio::test(flavor = "multi_thread")]
async fn servers_that_do_not_fit_and_clients_that_talk_nonsense() {
    let source = Server::start(15, Options::default().set("wal_level", "replica")).await.unwrap();
    for name in ["shop", "later"] {
        source.create_database(name).await.unwrap();
    }
    connect(&source.app_url("shop")).await.batch_execute("CREATE TABLE item (id int PRIMARY KEY, v int)").await.unwrap();
    let shadow = |url: &str| format!("\n[[database.shadow]]\nname = \"pg18\"\nurl = \"{url}\"\n");
    let text = format!("{}{}", database_text(&source), shadow(&url_text(&source.superuser_url("later"))));
    let mut proxy = Proxy::start("bad-input", "", &text);

    section("an unreachable server", unreachable(&source)).await;
    section("a port or a metadata file in use", in_use(&source, &proxy, &text)).await;
    section("words that the console does not know", words(&proxy)).await;
    section("a source that cannot be followed", cannot_follow(&source, &proxy)).await;
    section("a role without the privileges", lacks_privileges(&source)).await;
    section("bytes that are not the protocol", protocol::nonsense(&source, &mut proxy)).await;
}

async fn unreachable(source: &Server) {
    let folder = folder("unreachable");
    let proxy = format!("[proxy]\nlisten = \"127.0.0.1:{}\"\nmetadata = \"sqlite:{}/m.db\"\n", free_port().unwrap(), folder.display());
    let nowhere = format!("postgres://app:hush@127.0.0.1:{}/shop", free_port().unwrap());
    let here = url_text(&source.superuser_url("shop"));
    let file = |source: &str, shadow: &str| {
        let text = format!(
            "{proxy}[[database]]\nname = \"shop\"\nsource = \"{source}\"\n[[database.shadow]]\nname = \"pg18\"\nurl = \"{shadow}\"\n"
        );
        write(&folder, &text).to_str().unwrap().to_owned()
    };
    let config = file(&nowhere, &here);
    let outcome = understudy(&["run", "--config", &config]);
    outcome.expect("run, source unreachable", 3, &["cannot connect to the source of database shop", "Check the url", "understudy check"]);
    assert!(!outcome.output.contains("hush"), "{}", outcome.output);
    understudy(&["check", "--config", &config]).expect("check, source unreachable", 1, &["blocker", "source"]);
    let config = file(&here, &nowhere);
    understudy(&["check", "--config", &config]).expect("check, shadow unreachable", 1, &["blocker", "shadow"]);
    let wrong = here.replacen(&format!(":{}@", source.superuser_url("shop").password.unwrap().expose()), ":hush@", 1);
    let outcome = understudy(&["run", "--config", &file(&wrong, &nowhere)]);
    outcome.expect("run, wrong password", 3, &["password authentication failed", "Check the url"]);
    assert!(!outcome.output.contains("hush"), "{}", outcome.output);
    let absent = here.replacen("/shop", "/absent", 1);
    understudy(&["run", "--config", &file(&absent, &nowhere)]).expect("run, no such database", 3, &["absent"]);
}

async fn in_use(source: &Server, proxy: &Proxy, databases: &str) {
    let folder = folder("in-use");
    let metadata = proxy.config.parent().unwrap().join("metadata.db");
    let file = |listen: u16, http: u16, metadata: &Path| {
        let text = format!(
            "[proxy]\nlisten = \"127.0.0.1:{listen}\"\nhttp = \"127.0.0.1:{http}\"\nmetadata = \"sqlite:{}\"\n{databases}",
            metadata.display()
        );
        write(&folder, &text).to_str().unwrap().to_owned()
    };
    let free = || free_port().unwrap();
    let own = folder.join("own.db");
    for (listen, http, metadata, parts) in [
        (proxy.listen, free(), &own, ["cannot listen on", "change `listen`"]),
        (free(), proxy.http, &own, ["cannot listen on", "change `http`"]),
        (source.port(), free(), &own, ["cannot listen on", "Stop whoever uses that port"]),
        (free(), free(), &metadata, ["in use by another understudy process", "its own `metadata` file"]),
    ] {
        understudy(&["run", "--config", &file(listen, http, metadata)]).expect(parts[1], 3, &parts);
    }
    assert_eq!(proxy.tell("SHOW VERSION").await.code, 0, "the first one goes on");
}

async fn words(proxy: &Proxy) {
    let config = proxy.config.to_str().unwrap();
    let ctl = |words: &[&str]| understudy(&[&["ctl", "--config", config][..], words].concat());
    ctl(&["SHOW", "VERSION"]).expect("right words", 0, &["understudy"]);
    for (words, part) in [
        (&["SHOE", "VERSION"][..], "SHOW"),
        (&["SHOW", "EVERYTHING"], "SHOW"),
        (&["CUTOVER"], "CUTOVER"),
        (&["SET", "pg18", "sample_reads"], "SET"),
        (&["APPROVE", "one"], "APPROVE"),
        (&["SIMULATE", "CUTOVER", "pg18", "AT", "400"], ""),
        (&["SHADOW", "START", "pg17"], "SHOW SHADOWS"),
        (&["CUTOVER", "pg17"], "SHOW SHADOWS"),
        (&["ROLLBACK", "shoop"], "SHOW DATABASES"),
        (&["APPROVE", "4711"], "4711"),
        (&["SELECT", "1"], ""),
    ] {
        ctl(words).expect(&words.join(" "), 2, &[part]);
    }
    for (words, part) in [
        (&["CUTOVER", "pg18"][..], "SHOW FEED"),
        (&["ROLLBACK", "shop"], "nothing to roll back"),
        (&["SHIFT", "START", "pg18"], "SHOW FEED"),
        (&["VERIFY", "pg18"], "SHADOW START"),
        (&["FAULT", "LOSE", "CHANGE", "pg18"], "UNDERSTUDY_FAULT"),
    ] {
        ctl(words).expect(&words.join(" "), 1, &[part]);
    }
    understudy(&["verify", "--config", config, "pg17"]).expect("verify of nobody", 2, &["SHOW SHADOWS"]);
}

async fn feed_failure(proxy: &Proxy) -> String {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let state = proxy.shadow().await.feed.state;
        if state.starts_with("failed") {
            return state;
        }
        assert!(Instant::now() < deadline, "the feed does not fail, it is \"{state}\"");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn cannot_follow(source: &Server, proxy: &Proxy) {
    let config = proxy.config.to_str().unwrap();
    understudy(&["check", "--config", config]).expect("check", 1, &["wal_level", "ALTER SYSTEM SET wal_level"]);
    proxy.rows("SHADOW START pg18").await;
    let state = feed_failure(proxy).await;
    assert!(state.contains("wal_level=replica") && state.contains("ALTER SYSTEM SET wal_level = logical"), "{state}");
    let client = connect(&proxy.through(&source.app_url("shop"))).await;
    assert_eq!(harness::ask(&client, "SELECT count(*) FROM item").await, "0", "clients do not notice");
    assert_eq!(proxy.tell("CUTOVER pg18").await.code, 1);
    assert_eq!(proxy.tell("SHADOW STOP pg18").await.code, 0);
}

async fn lacks_privileges(source: &Server) {
    let folder = folder("privileges");
    let text = format!(
        "[proxy]\nmetadata = \"sqlite:{}/m.db\"\n[[database]]\nname = \"shop\"\nsource = \"{}\"\n[[database.shadow]]\nname = \"pg18\"\nurl = \"{}\"\n",
        folder.display(),
        url_text(&source.app_url("shop")),
        url_text(&source.app_url("later"))
    );
    let config = write(&folder, &text);
    understudy(&["check", "--config", config.to_str().unwrap()]).expect("check as a plain role", 1, &["blocker", "REPLICATION"]);
}
