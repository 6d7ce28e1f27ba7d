//! The proxy under test: this very program, started as an operator would start it, with a proxy.toml of its own,
//! watched through `/api/state` and told what to do through its console.

use super::servers::tail;
use crate::{config::Secret, console::state::State};
use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    process::{Child, Command},
};
use tokio_postgres::{AsyncMessage, NoTls, SimpleQueryMessage};

/// `revert.window` in proxy.toml: how fast serving has to stop when the shadow fails.
pub const REVERT_WINDOW: Duration = Duration::from_secs(2);
/// How long the proxy may take until it is ready.
const READY_WAIT_MAX: Duration = Duration::from_secs(30);
/// One request to the HTTP side. Long, because a loaded machine is no failure.
const HTTP_WAIT_MAX: Duration = Duration::from_secs(10);
/// The state document is bounded by the proxy; this protects us from a proxy that forgot.
const HTTP_BYTES_MAX: u64 = 64 << 20;
/// The longest console command is a VERIFY of everything.
const COMMAND_WAIT_MAX: Duration = Duration::from_secs(120);

/// The proxy could not be started, asked or told.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// The system said no.
    #[error("cannot {action}: {source}")]
    Io {
        /// Verb phrase.
        action: String,
        /// Cause.
        source: io::Error,
    },
    /// It ended, or never became ready.
    #[error("the proxy {what}; its log is {log}:\n{tail}")]
    NotRunning {
        /// What happened.
        what: String,
        /// Where.
        log: String,
        /// The end of it.
        tail: String,
    },
    /// Its HTTP side did not answer as it should.
    #[error("GET {path}: {reason}")]
    Http {
        /// Path.
        path: String,
        /// Why.
        reason: String,
    },
    /// The console refused: the answer is no (SQLSTATE 55000).
    #[error("`{command}` was refused: {message}")]
    Refused {
        /// Command.
        command: String,
        /// Message.
        message: String,
    },
    /// The console could not carry it out.
    #[error("`{command}` failed: {message}")]
    Console {
        /// Command.
        command: String,
        /// Message.
        message: String,
    },
}

/// What goes into proxy.toml.
pub struct Settings {
    /// Applications.
    pub listen: u16,
    /// Dashboard and state.
    pub http: u16,
    /// The source, with password.
    pub source: String,
    /// The shadow, with password.
    pub shadow: String,
    /// The application's role.
    pub user: &'static str,
    /// Its password.
    pub password: Secret,
    /// Seconds that each step of the ladder is held.
    pub hold_s: f64,
}

impl Settings {
    fn text(&self, metadata: &Path) -> String {
        let Settings { listen, http, source, shadow, user, hold_s, .. } = self;
        format!(
            r#"# Written by `understudy demo`. The servers are temporary and so are the passwords.
[proxy]
listen   = "127.0.0.1:{listen}"
http     = "127.0.0.1:{http}"
metadata = "sqlite:{metadata}"

[[database]]
name   = "shop"
source = "{source}"

[[database.user]]
name     = "{user}"
password = "{password}"

[[database.shadow]]
name          = "pg18"
url           = "{shadow}"
feed          = "cdc"
mirror_writes = "rehearse"
sample_reads  = 0.0                 # raised with SET once the shadow is in step

[database.shadow.revert]
window        = "{window}s"
min_requests  = 20
error_rate    = 2.0
mismatch_rate = 0.1
latency_ratio = 8.0                 # two servers, a proxy and all clients share this machine's cores
max_lag       = "{max_lag}ms"                # a feed that stands still is seen within the window, too

[database.shadow.shift]
steps = [5, 25, 50, 100]
hold  = "{hold}ms"

[database.shadow.adapt]
auto_approve = 0.9
"#,
            window = REVERT_WINDOW.as_secs(),
            max_lag = (REVERT_WINDOW * 2 / 3).as_millis(),
            metadata = metadata.display(),
            password = self.password.expose(),
            hold = (hold_s * 1000.0).round(),
        )
    }
}

/// A running proxy process.
pub struct Proxy {
    child: Child,
    guard: std::process::Child,
    config: PathBuf,
    log: PathBuf,
    listen: u16,
    http: u16,
}

/// Writes proxy.toml into `directory` and returns its path. The metadata of an earlier run is removed.
///
/// # Errors
/// [`ProxyError::Io`]
pub fn write_config(directory: &Path, settings: &Settings) -> Result<PathBuf, ProxyError> {
    let error = |action: &str| {
        let action = action.to_owned();
        move |source| ProxyError::Io { action, source }
    };
    let metadata = directory.join("metadata.db");
    for suffix in ["", "-wal", "-shm"] {
        match fs::remove_file(format!("{}{suffix}", metadata.display())) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(error("remove the metadata of an earlier run")(source)),
            _ => {}
        }
    }
    let path = directory.join("proxy.toml");
    fs::write(&path, settings.text(&metadata)).map_err(error("write proxy.toml"))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(error("protect proxy.toml"))?;
    Ok(path)
}

/// A command of this program; its output is captured. Returns its exit status and both outputs.
///
/// # Errors
/// [`ProxyError::Io`]
pub async fn run_subcommand(arguments: &[&str], config: &Path) -> Result<(i32, String), ProxyError> {
    let output = this_program()?
        .args(arguments)
        .arg("--config")
        .arg(config)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|source| ProxyError::Io { action: format!("run understudy {}", arguments.join(" ")), source })?;
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    Ok((output.status.code().unwrap_or(-1), text))
}

fn this_program() -> Result<Command, ProxyError> {
    let program = std::env::current_exe().map_err(|source| ProxyError::Io { action: "find this program".into(), source })?;
    Ok(Command::new(program))
}

impl Proxy {
    /// Starts `understudy run` and waits until it is ready. `fault`: value of UNDERSTUDY_FAULT.
    ///
    /// # Errors
    /// [`ProxyError`]
    pub async fn start(config: PathBuf, settings: &Settings, log: PathBuf, fault: Option<&str>) -> Result<Self, ProxyError> {
        let open = |source| ProxyError::Io { action: format!("open {}", log.display()), source };
        let output = fs::File::create(&log).map_err(open)?;
        let errors = output.try_clone().map_err(open)?;
        let mut command = this_program()?;
        command.arg("run").arg("--config").arg(&config);
        command.stdin(Stdio::null()).stdout(output).stderr(errors).process_group(0).kill_on_drop(true);
        match fault {
            Some(fault) => command.env("UNDERSTUDY_FAULT", fault),
            None => command.env_remove("UNDERSTUDY_FAULT"),
        };
        let mut child = command.spawn().map_err(|source| ProxyError::Io { action: "start the proxy".into(), source })?;
        // If we are killed, the proxy must not stay: the shell reads end-of-file from our end of the pipe.
        let guard = std::process::Command::new("/bin/sh")
            .args(["-c", "trap '' INT TERM HUP; cat > /dev/null; kill -TERM \"$1\"; sleep 3; kill -KILL \"$1\"", "understudy-guard"])
            .arg(child.id().unwrap_or_default().to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let guard = match guard {
            Ok(guard) => guard,
            Err(source) => {
                let _ = child.start_kill();
                return Err(ProxyError::Io { action: "guard the proxy".into(), source });
            }
        };
        let mut proxy = Proxy { child, guard, config, log, listen: settings.listen, http: settings.http };
        let deadline = Instant::now() + READY_WAIT_MAX;
        loop {
            proxy.check_alive()?;
            let ready = get(proxy.http, "/readyz").await;
            match ready {
                Ok((200, _)) => return Ok(proxy),
                _ if Instant::now() > deadline => return Err(proxy.not_running("was not ready in time")),
                _ => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// Fails if the process has ended.
    ///
    /// # Errors
    /// [`ProxyError::NotRunning`]
    pub fn check_alive(&mut self) -> Result<(), ProxyError> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(self.not_running(&format!("ended with {status}"))),
            Err(source) => Err(ProxyError::Io { action: "look after the proxy".into(), source }),
        }
    }

    fn not_running(&self, what: &str) -> ProxyError {
        let tail = tail(&fs::read_to_string(&self.log).unwrap_or_default());
        ProxyError::NotRunning { what: what.to_owned(), log: self.log.display().to_string(), tail }
    }

    /// The port applications connect to.
    pub fn listen(&self) -> u16 {
        self.listen
    }

    /// The port of the dashboard.
    pub fn http(&self) -> u16 {
        self.http
    }

    /// The file it was started with.
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// `GET /api/state`
    ///
    /// # Errors
    /// [`ProxyError::Http`]
    pub async fn state(&self) -> Result<State, ProxyError> {
        state(self.http).await
    }

    /// Opens the console.
    ///
    /// # Errors
    /// [`ProxyError::Console`]
    pub async fn console(&self) -> Result<Console, ProxyError> {
        Console::open(self.listen).await
    }

    /// Waits until the process has ended by itself and returns its exit status.
    ///
    /// # Errors
    /// [`ProxyError::NotRunning`] if it does not end.
    pub async fn wait_for_end(&mut self, at_most: Duration) -> Result<Option<i32>, ProxyError> {
        match tokio::time::timeout(at_most, self.child.wait()).await {
            Ok(Ok(status)) => Ok(status.code()),
            Ok(Err(source)) => Err(ProxyError::Io { action: "wait for the proxy".into(), source }),
            Err(_) => Err(self.not_running("did not end after SHUTDOWN")),
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // The proxy first: kill_on_drop does not wait, and the guard must not signal a number that is not ours any more.
        let _ = self.guard.kill();
        let _ = self.guard.wait();
        let _ = self.child.start_kill();
    }
}

/// `GET /api/state` from a port on loopback.
///
/// # Errors
/// [`ProxyError::Http`]
pub async fn state(port: u16) -> Result<State, ProxyError> {
    let path = "/api/state";
    let error = |reason: String| ProxyError::Http { path: path.into(), reason };
    let (status, body) = get(port, path).await?;
    if status != 200 {
        return Err(error(format!("status {status}")));
    }
    serde_json::from_slice(&body).map_err(|cause| error(format!("the document is not the one expected: {cause}")))
}

/// A GET as HTTP/1.0: no chunks, the end of the connection is the end of the body.
async fn get(port: u16, path: &str) -> Result<(u16, Vec<u8>), ProxyError> {
    let error = |reason: String| ProxyError::Http { path: path.into(), reason };
    let exchange = async {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
        stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n").as_bytes()).await?;
        let mut answer = Vec::new();
        stream.take(HTTP_BYTES_MAX).read_to_end(&mut answer).await?;
        Ok::<_, io::Error>(answer)
    };
    let answer = tokio::time::timeout(HTTP_WAIT_MAX, exchange)
        .await
        .map_err(|_| error(format!("no answer within {HTTP_WAIT_MAX:?}")))?
        .map_err(|cause| error(cause.to_string()))?;
    split_answer(&answer).ok_or_else(|| error("that is not an HTTP answer".into()))
}

fn split_answer(answer: &[u8]) -> Option<(u16, Vec<u8>)> {
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = std::str::from_utf8(answer.get(..end)?).ok()?;
    let status = head.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.parse().ok()?;
    Some((status, answer.get(end + 4..)?.to_vec()))
}

/// A psql session, in effect.
pub struct Console {
    client: tokio_postgres::Client,
    notices: Arc<Mutex<Vec<String>>>,
}

/// What a command answered.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reply {
    /// Column names.
    pub columns: Vec<String>,
    /// Texts; NULL is empty.
    pub rows: Vec<Vec<String>>,
    /// NOTICEs.
    pub notices: Vec<String>,
}

impl Reply {
    /// A field by column name.
    pub fn field<'a>(&'a self, row: &'a [String], column: &str) -> Option<&'a str> {
        let index = self.columns.iter().position(|name| name == column)?;
        row.get(index).map(String::as_str)
    }
}

impl Console {
    async fn open(port: u16) -> Result<Self, ProxyError> {
        let error = |cause: tokio_postgres::Error| ProxyError::Console { command: "connect".into(), message: describe(&cause) };
        let mut config = tokio_postgres::Config::new();
        config.host("127.0.0.1").port(port).user("operator").dbname("understudy").application_name("demo");
        config.connect_timeout(Duration::from_secs(10)).ssl_mode(tokio_postgres::config::SslMode::Disable);
        let (client, mut connection) = config.connect(NoTls).await.map_err(error)?;
        let notices = Arc::new(Mutex::new(Vec::new()));
        let sink = notices.clone();
        tokio::spawn(async move {
            while let Some(Ok(message)) = std::future::poll_fn(|context| connection.poll_message(context)).await {
                if let AsyncMessage::Notice(notice) = message {
                    sink.lock().unwrap_or_else(PoisonError::into_inner).push(notice.message().to_owned());
                }
            }
        });
        Ok(Console { client, notices })
    }

    /// Gives a command.
    ///
    /// # Errors
    /// [`ProxyError::Refused`] (the answer is no) or [`ProxyError::Console`].
    pub async fn tell(&self, command: &str) -> Result<Reply, ProxyError> {
        let answer = tokio::time::timeout(COMMAND_WAIT_MAX, self.client.simple_query(command)).await;
        let messages = match answer {
            Ok(Ok(messages)) => messages,
            Ok(Err(error)) => {
                let message = describe(&error);
                let refused = error.code().is_some_and(|code| code.code() == "55000");
                let command = command.to_owned();
                return Err(if refused { ProxyError::Refused { command, message } } else { ProxyError::Console { command, message } });
            }
            Err(_) => {
                let message = format!("no answer within {COMMAND_WAIT_MAX:?}");
                return Err(ProxyError::Console { command: command.to_owned(), message });
            }
        };
        let mut reply = Reply::default();
        for message in messages {
            match message {
                SimpleQueryMessage::RowDescription(columns) => {
                    reply.columns = columns.iter().map(|column| column.name().to_owned()).collect()
                }
                SimpleQueryMessage::Row(row) => {
                    reply.rows.push((0..row.len()).map(|index| row.get(index).unwrap_or("").to_owned()).collect());
                }
                _ => {}
            }
        }
        reply.notices = std::mem::take(&mut *self.notices.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(reply)
    }
}

fn describe(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(error) => {
            let part = |label: &str, text: Option<&str>| text.map(|text| format!("\n{label}{text}")).unwrap_or_default();
            format!("{}{}{}", error.message(), part("", error.detail()), part("hint: ", error.hint()))
        }
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_http_answers() {
        for (answer, expected) in [
            (&b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"[..], Some((200, b"{}".to_vec()))),
            (b"HTTP/1.0 503 Service Unavailable\r\n\r\n", Some((503, Vec::new()))),
            (b"HTTP/1.1 200 OK\r\n", None),
            (b"nonsense\r\n\r\n", None),
            (b"", None),
        ] {
            assert_eq!(split_answer(answer), expected);
        }
    }

    #[test]
    fn the_settings_are_accepted_by_the_real_parser() {
        let settings = Settings {
            listen: 6432,
            http: 6480,
            source: "postgres://postgres:abc@127.0.0.1:5001/shop".into(),
            shadow: "postgres://postgres:def@127.0.0.1:5002/shop".into(),
            user: "app",
            password: Secret::new("123"),
            hold_s: 1.5,
        };
        let config = crate::config::parse(&settings.text(Path::new("/tmp/metadata.db")), "proxy.toml", &|_| None).unwrap();
        let shadow = &config.databases[0].shadows[0];
        assert_eq!(shadow.shift.hold, Duration::from_millis(1500));
        assert_eq!((shadow.serve_reads, shadow.sample_reads, shadow.revert.window), (0.0, 0.0, Duration::from_secs(2)));
    }
}
