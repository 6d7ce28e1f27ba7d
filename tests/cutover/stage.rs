//! One source, one shadow and the real program between them, which may be killed and started again.
#![allow(dead_code)] // each of the tests that share it uses a part

use crate::support::{Options, Server, free_port};
use std::{
    collections::BTreeMap,
    io::Write,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio_postgres::{AsyncMessage, Client, NoTls, SimpleQueryMessage};

/// Longest wait for anything that must happen.
const PATIENCE: Duration = Duration::from_secs(60);

/// A row of a console answer.
pub type Row = BTreeMap<String, String>;

pub struct Stage {
    pub source: Server,
    pub shadow: Server,
    listen: u16,
    directory: PathBuf,
}

/// The running program; dropping it kills it as `kill -9` would.
pub struct Proxy {
    child: Child,
    guard: Child,
}

impl Proxy {
    pub fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = self.guard.kill();
        let _ = self.guard.wait();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.end();
    }
}

const SCHEMA: &str = "
    CREATE TABLE entry (id bigint PRIMARY KEY, number bigserial NOT NULL, writer int NOT NULL);
    CREATE TABLE trace (id bigint NOT NULL, number bigint NOT NULL);
    CREATE TABLE account (writer int PRIMARY KEY, n bigint NOT NULL);
    CREATE SEQUENCE ticket;
    CREATE TABLE aside (id bigint PRIMARY KEY);
    INSERT INTO account SELECT i, 0 FROM generate_series(0, 31) i;
    INSERT INTO aside SELECT -i FROM generate_series(1, 2000) i;
";

impl Stage {
    pub async fn new() -> Self {
        let (source, listen, http) = (Server::start(15, Options::default()).await.unwrap(), free_port().unwrap(), free_port().unwrap());
        let shadow = Server::start_like(&source, 18, Options::default()).await.unwrap();
        source.create_database("shop").await.unwrap();
        shadow.create_database("shop").await.unwrap();
        let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("stage-{}-{listen}", std::process::id()));
        let _ = std::fs::remove_dir_all(&directory);
        std::fs::create_dir_all(&directory).unwrap();
        let stage = Stage { source, shadow, listen, directory };
        let app = understudy::config::ServerUrl::to_tokio(&stage.source.app_url("shop"), "set-up");
        connect(app).await.unwrap().batch_execute(SCHEMA).await.unwrap();
        let text = format!(
            "[proxy]\nlisten = \"127.0.0.1:{listen}\"\nhttp = \"127.0.0.1:{http}\"\nmetadata = \"sqlite:{directory}/understudy.db\"\n\
             [[database]]\nname = \"shop\"\nsource = \"{source}\"\n\
             [[database.user]]\nname = \"app\"\npassword = \"{password}\"\n\
             [[database.shadow]]\nname = \"pg18\"\nurl = \"{shadow}\"\nfeed = \"cdc\"\nmirror_writes = \"off\"\nsample_reads = 0.0\n",
            directory = stage.directory.display(),
            source = with_password(&stage.source),
            shadow = with_password(&stage.shadow),
            password = stage.source.app_password().expose(),
        );
        std::fs::write(stage.directory.join("proxy.toml"), text).unwrap();
        stage
    }

    /// Starts the program and waits until it is ready.
    pub async fn start(&self, fault: Option<&str>) -> Proxy {
        let mut proxy = self.spawn(fault, "proxy.toml", &[]);
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = proxy.child.try_wait().unwrap() {
                panic!("the proxy ended with {status}\n{}", self.log());
            }
            if self.try_console().await.is_some() {
                return proxy;
            }
            assert!(Instant::now() < deadline, "the proxy was not ready in time\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Starts the program.
    pub fn spawn(&self, fault: Option<&str>, config: &str, more: &[&str]) -> Proxy {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log_path()).unwrap();
        writeln!(&log, "--- start, fault {fault:?}").unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_understudy"));
        command.arg("run").arg("--config").arg(self.directory.join(config)).args(more);
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).env_remove("UNDERSTUDY_FAULT");
        if let Some(fault) = fault {
            command.env("UNDERSTUDY_FAULT", fault);
        }
        let child = command.spawn().unwrap();
        // if the test is killed, the program must not stay: the shell reads end-of-file
        let guard = Command::new("/bin/sh")
            .args(["-c", "cat > /dev/null; kill -KILL \"$1\"", "guard", &child.id().to_string()])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        Proxy { child, guard }
    }

    /// Waits until the program has died by itself, and returns its exit status.
    pub async fn wait_for_death(&self, mut proxy: Proxy) -> Option<i32> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = proxy.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < deadline, "the proxy did not end\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Writes another configuration file beside the first.
    pub fn edit(&self, name: &str, edit: impl FnOnce(String) -> String) {
        let text = std::fs::read_to_string(self.directory.join("proxy.toml")).unwrap();
        std::fs::write(self.directory.join(name), edit(text)).unwrap();
    }

    /// Waits until the program has logged this so many times.
    pub async fn wait_log(&self, text: &str, times: usize) {
        let deadline = Instant::now() + PATIENCE;
        while std::fs::read_to_string(self.log_path()).unwrap_or_default().matches(text).count() < times {
            assert!(Instant::now() < deadline, "not logged {times} times: {text}\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn log_path(&self) -> PathBuf {
        self.directory.join("proxy.log")
    }

    /// The end of the program's log.
    pub fn log(&self) -> String {
        let text = std::fs::read_to_string(self.log_path()).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    pub fn url(&self, user: &str, dbname: &str) -> tokio_postgres::Config {
        let mut config = tokio_postgres::Config::new();
        config.host("127.0.0.1").port(self.listen).user(user).dbname(dbname).application_name("test");
        config.password(self.source.app_password().expose()).connect_timeout(Duration::from_secs(5));
        config
    }

    /// Of `listen`.
    pub fn port(&self) -> u16 {
        self.listen
    }

    /// A client of the application, through the proxy.
    pub async fn client(&self) -> Client {
        connect(self.url("app", "shop")).await.unwrap()
    }

    async fn try_console(&self) -> Option<Client> {
        connect(self.url("operator", "understudy")).await.ok()
    }

    /// Gives a console command.
    pub async fn tell(&self, command: &str) -> Result<Vec<Row>, String> {
        let console = self.try_console().await.ok_or("no console")?;
        let messages = console
            .simple_query(command)
            .await
            .map_err(|error| error.as_db_error().map_or_else(|| format!("connection: {error}"), |error| error.message().to_owned()))?;
        let row = |message| match message {
            SimpleQueryMessage::Row(row) => Some(
                row.columns()
                    .iter()
                    .enumerate()
                    .map(|(i, column)| (column.name().to_owned(), row.get(i).unwrap_or("").to_owned()))
                    .collect(),
            ),
            _ => None,
        };
        Ok(messages.into_iter().filter_map(row).collect())
    }

    pub async fn must(&self, command: &str) -> Vec<Row> {
        self.tell(command).await.unwrap_or_else(|error| panic!("{command}: {error}\n{}", self.log()))
    }

    /// Waits until SHOW CUTOVER says so.
    pub async fn wait_cutover(&self, state: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let rows = self.must("SHOW CUTOVER").await;
            if rows.iter().any(|row| row["state"].starts_with(state)) {
                return;
            }
            assert!(Instant::now() < deadline, "SHOW CUTOVER never said {state}: {rows:?}\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// `source` or `pg18`
    pub async fn owner(&self) -> String {
        self.must("SHOW DATABASES").await[0]["owner"].clone()
    }

    /// Waits until the feed streams towards the follower.
    pub async fn wait_streaming(&self) {
        let direction = if self.owner().await == "source" { "forward" } else { "reverse" };
        let deadline = Instant::now() + PATIENCE;
        loop {
            let feed = self.must("SHOW FEED").await.remove(0);
            if feed["state"] == "streaming" && feed["direction"] == direction {
                return;
            }
            assert!(
                Instant::now() < deadline && !feed["state"].starts_with("failed"),
                "the feed should stream {direction}: {feed:?}\n{}",
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub fn server(&self, name: &str) -> &Server {
        if name == "source" { &self.source } else { &self.shadow }
    }

    pub fn other(&self, name: &str) -> &Server {
        if name == "source" { &self.shadow } else { &self.source }
    }

    /// Equal by VERIFY, and the feed found nothing amiss on its way.
    pub async fn verify(&self, case: &str) {
        self.wait_streaming().await;
        let verified = self.tell("VERIFY pg18").await;
        assert!(verified.is_ok(), "{case}: {verified:?}\n{}", self.log());
        let feed = self.must("SHOW FEED").await.remove(0);
        assert_eq!(feed["findings"], "0", "{case}: {feed:?}\n{}", self.log());
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = std::fs::remove_dir_all(&self.directory);
        }
    }
}

fn with_password(server: &Server) -> String {
    let url = server.superuser_url("shop");
    format!("postgres://{}:{}@{}:{}/shop", url.user, url.password.as_ref().map_or("", |password| password.expose()), url.host, url.port)
}

pub async fn connect(config: tokio_postgres::Config) -> Result<Client, tokio_postgres::Error> {
    let (client, mut connection) = config.connect(NoTls).await?;
    let notices = Arc::new(Mutex::new(Vec::new()));
    tokio::spawn(async move {
        while let Some(Ok(message)) = std::future::poll_fn(|context| connection.poll_message(context)).await {
            if let AsyncMessage::Notice(notice) = message {
                notices.lock().unwrap().push(notice.message().to_owned());
            }
        }
    });
    Ok(client)
}

/// The first column of a query as numbers.
pub async fn numbers(client: &Client, query: &str) -> Vec<i64> {
    client.query(query, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

/// What feeds have made on a server, apart from the rows.
pub async fn leftovers(server: &Server) -> Vec<String> {
    let query = "SELECT 'slot ' || slot_name FROM pg_replication_slots UNION ALL SELECT 'publication ' || pubname FROM pg_publication
        UNION ALL SELECT 'event trigger ' || evtname FROM pg_event_trigger
        UNION ALL SELECT 'subscription ' || subname FROM pg_subscription UNION ALL SELECT 'origin ' || roname FROM pg_replication_origin
        UNION ALL SELECT 'relation ' || c.oid::regclass FROM pg_class c WHERE c.relnamespace = to_regnamespace('understudy')
        UNION ALL SELECT 'function ' || p.oid::regproc FROM pg_proc p WHERE p.pronamespace = to_regnamespace('understudy')
        UNION ALL SELECT 'schema ' || nspname FROM pg_namespace WHERE nspname LIKE 'understudy%' ORDER BY 1";
    let client = server.connect("shop").await.unwrap();
    client.query(query, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

/// The read-only default that a new connection meets.
pub async fn fenced(server: &Server) -> bool {
    let client = server.connect("shop").await.unwrap();
    client.query_one("SHOW default_transaction_read_only", &[]).await.unwrap().get::<_, &str>(0) == "on"
}
