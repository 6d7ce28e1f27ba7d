//! The real program as a child process, told what to do through its console and watched through its HTTP side.
#![allow(dead_code)]

use serde_json::Value;
use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use tokio_postgres::{Client, NoTls};
use understudy::{
    config::{Secret, ServerUrl},
    console::{
        ctl::{self, CtlTarget, Output},
        state::{ShadowState, State},
    },
    demo::servers::{Server, free_port},
};

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_understudy");
const READY_MAX: Duration = Duration::from_secs(30);

/// With the password, as proxy.toml wants it.
pub fn url_text(url: &ServerUrl) -> String {
    let password = url.password.as_ref().map(|password| format!(":{}", password.expose())).unwrap_or_default();
    format!("postgres://{}{password}@{}:{}/{}", url.user, url.host, url.port, url.dbname)
}

/// An empty folder below target/tmp.
pub fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("proxy").join(name);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// A running proxy; dropping it ends it.
pub struct Proxy {
    child: Child,
    guard: Child,
    pub listen: u16,
    pub http: u16,
    pub config: PathBuf,
    pub log: PathBuf,
}

impl Proxy {
    /// `[proxy]` gets free ports and `more_of_proxy`; `databases` is the rest of the file.
    pub fn start(name: &str, more_of_proxy: &str, databases: &str) -> Proxy {
        Proxy::start_at(name, "127.0.0.1", more_of_proxy, databases)
    }

    /// Clients are accepted at this address.
    pub fn start_at(name: &str, address: &str, more_of_proxy: &str, databases: &str) -> Proxy {
        let folder = folder(name);
        let (listen, http) = (free_port().unwrap(), free_port().unwrap());
        let metadata = folder.join("metadata.db");
        let text = format!(
            "[proxy]\nlisten = \"{address}:{listen}\"\nhttp = \"127.0.0.1:{http}\"\nmetadata = \"sqlite:{}\"\n{more_of_proxy}\n\n{databases}",
            metadata.display()
        );
        let (config, log) = (folder.join("proxy.toml"), folder.join("proxy.log"));
        fs::write(&config, text).unwrap();
        let output = fs::File::create(&log).unwrap();
        let child = Command::new(PROGRAM)
            .args(["run", "--config"])
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap();
        // should this test be killed, the guard reads end-of-file and ends the proxy
        let mut guard = Command::new("/bin/sh");
        guard.args(["-c", "trap '' INT TERM HUP; cat > /dev/null; kill -KILL \"$1\"", "guard", &child.id().to_string()]);
        guard.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut proxy = Proxy { child, guard: guard.spawn().unwrap(), listen, http, config, log };
        let deadline = Instant::now() + READY_MAX;
        while get(http, "/readyz").is_none_or(|(status, _)| status != 200) {
            assert!(proxy.is_running(), "the proxy ended:\n{}", proxy.log_text());
            assert!(Instant::now() < deadline, "the proxy was not ready in time:\n{}", proxy.log_text());
            std::thread::sleep(Duration::from_millis(30));
        }
        proxy
    }

    /// A console command, through the very code of `understudy ctl --json`.
    pub async fn tell(&self, words: &str) -> Output {
        let target = CtlTarget { host: "127.0.0.1".into(), port: self.listen, user: "operator".into(), password: None };
        tokio::time::timeout(Duration::from_secs(90), ctl::run(target, words, true)).await.unwrap_or_else(|_| panic!("{words}: no answer"))
    }

    /// A console command that must be carried out; its rows.
    pub async fn rows(&self, words: &str) -> Vec<Value> {
        let output = self.tell(words).await;
        assert_eq!(output.code, 0, "{words}: {}", output.stderr);
        serde_json::from_str(&output.stdout).unwrap()
    }

    pub async fn state(&self) -> State {
        understudy::demo::proxy::state(self.http).await.unwrap()
    }

    pub async fn shadow(&self) -> ShadowState {
        self.state().await.databases.remove(0).shadows.remove(0)
    }

    /// The value of a sample of /metrics by the beginning of its line.
    pub fn metric(&self, start: &str) -> f64 {
        let (_, text) = get(self.http, "/metrics").unwrap();
        let line = text.lines().find(|line| line.starts_with(start)).unwrap_or_else(|| panic!("{start} is not among the metrics:\n{text}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    /// The same login, but here.
    pub fn through(&self, url: &ServerUrl) -> ServerUrl {
        ServerUrl { port: self.listen, ..url.clone() }
    }

    pub fn log_text(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Replaces a part of proxy.toml in one step, as editors do.
    pub fn edit(&self, from: &str, to: &str) {
        let text = fs::read_to_string(&self.config).unwrap();
        assert!(text.contains(from), "{from} is not in the file");
        let new = self.config.with_extension("new");
        fs::write(&new, text.replacen(from, to, 1)).unwrap();
        fs::rename(new, &self.config).unwrap();
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    pub async fn exit_code(&mut self, at_most: Duration) -> Option<i32> {
        let deadline = Instant::now() + at_most;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("the proxy did not end:\n{}", self.log_text())
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.guard.kill();
        let _ = self.guard.wait();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// GET, HTTP/1.0. `None`: no answer.
pub fn get(port: u16, path: &str) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).ok()?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\n\r\n").ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = answer.split_once("\r\n\r\n")?;
    Some((head.split(' ').nth(1)?.parse().ok()?, body.to_owned()))
}

/// A client as applications are: not one of ours.
pub async fn try_connect(url: &ServerUrl) -> Result<Client, tokio_postgres::Error> {
    let mut config = tokio_postgres::Config::new();
    config.host(&url.host).port(url.port).user(&url.user).dbname(&url.dbname).application_name("shop-test");
    config.ssl_mode(tokio_postgres::config::SslMode::Disable).connect_timeout(Duration::from_secs(10));
    if let Some(password) = &url.password {
        config.password(password.expose());
    }
    let (client, connection) = config.connect(NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

pub async fn connect(url: &ServerUrl) -> Client {
    try_connect(url).await.unwrap()
}

pub fn with_password(url: &ServerUrl, password: &str) -> ServerUrl {
    ServerUrl { password: Some(Secret::new(password)), ..url.clone() }
}

/// First column of the first row, simple protocol.
pub async fn ask(client: &Client, text: &str) -> String {
    let messages = client.simple_query(text).await.unwrap_or_else(|error| panic!("{text}: {error:?}"));
    let row = messages.iter().find_map(|message| match message {
        tokio_postgres::SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or("NULL").to_owned()),
        _ => None,
    });
    row.unwrap_or_else(|| panic!("{text}: no row"))
}

/// SQLSTATE of a failure that a server sent.
pub fn sqlstate<T>(result: Result<T, tokio_postgres::Error>) -> String {
    match result {
        Ok(_) => "00000".into(),
        Err(error) => error.code().map_or_else(|| format!("no SQLSTATE: {error:?}"), |code| code.code().to_owned()),
    }
}

/// Until the condition holds.
pub async fn wait_until<F: Future<Output = bool>>(what: &str, at_most: Duration, mut condition: impl FnMut() -> F) {
    let deadline = Instant::now() + at_most;
    while !condition().await {
        assert!(Instant::now() < deadline, "not within {at_most:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The part of proxy.toml about one database and its application's role.
pub fn database_text(source: &Server) -> String {
    format!(
        "[[database]]\nname = \"shop\"\nsource = \"{}\"\n\n[[database.user]]\nname = \"{}\"\npassword = \"{}\"\n",
        url_text(&source.superuser_url("shop")),
        Server::APP,
        source.app_password().expose()
    )
}

/// Says which part runs, so that a failure is found.
pub async fn section<T>(name: &str, work: impl Future<Output = T>) -> T {
    let began = Instant::now();
    eprintln!("    {name} …");
    let result = tokio::time::timeout(Duration::from_secs(120), work).await.unwrap_or_else(|_| panic!("{name}: hangs"));
    eprintln!("    {name}: {:.1} s", began.elapsed().as_secs_f64());
    result
}
