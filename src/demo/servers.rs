//! Real PostgreSQL servers on loopback, for the demo and for the integration tests: a fresh cluster in a temporary
//! directory, SCRAM passwords, logical WAL, gone at the end whatever happens to us.
//!
//! PostgreSQL refuses to run as root, so root gives the cluster to an unprivileged user (`postgres`, else `nobody`).
//! `fsync` is off: a cluster that is thrown away has nothing to lose; every figure of the demo is measured under it.

mod system;

pub(crate) use system::tail;
pub use system::{find_client, find_programs, free_port};

use crate::config::{Secret, ServerTls, ServerUrl, SslMode, TcpConfig};
use std::{
    fs, io,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use system::{children_of, create_directory, give_to, random_secret, signal, unprivileged_user, wait_for_exit};

/// How long a server may take to answer after its start, or to end after it was told to.
const SERVER_WAIT_MAX: Duration = Duration::from_secs(60);

/// A server could not be prepared, started or stopped.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// No programs for this major version.
    #[error(
        "PostgreSQL {major} is not installed here: run `scripts/setup`, or set UNDERSTUDY_PG_{major}_BIN to the directory \
         that holds its `postgres` and `initdb`"
    )]
    Missing {
        /// Major version.
        major: u32,
    },
    /// The file system or a process said no.
    #[error("cannot {action}: {source}")]
    Io {
        /// Verb phrase.
        action: String,
        /// Cause.
        source: io::Error,
    },
    /// A program of PostgreSQL failed.
    #[error("{program} failed: {output}")]
    Program {
        /// Which.
        program: String,
        /// The end of its output.
        output: String,
    },
    /// The server did not become ready.
    #[error("PostgreSQL {major} on port {port} did not start within {SERVER_WAIT_MAX:?}: {output}")]
    NotReady {
        /// Major version.
        major: u32,
        /// Port.
        port: u16,
        /// The end of its log.
        output: String,
    },
    /// SQL on the new server failed.
    #[error("cannot {action}: {source}")]
    Sql {
        /// Verb phrase.
        action: &'static str,
        /// Cause.
        source: tokio_postgres::Error,
    },
}

fn io_error(action: impl Into<String>) -> impl FnOnce(io::Error) -> ServerError {
    let action = action.into();
    move |source| ServerError::Io { action, source }
}

/// What may differ from one server to the next.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Lines of postgresql.conf, after ours: `("wal_level", "replica")`.
    pub settings: Vec<(String, String)>,
    /// Where the server's log goes; default: into its own directory, which is removed with the server.
    pub log: Option<PathBuf>,
}

impl Options {
    /// Adds a line to postgresql.conf.
    pub fn set(mut self, name: &str, value: &str) -> Self {
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Keeps the log in this file.
    pub fn log(mut self, path: impl Into<PathBuf>) -> Self {
        self.log = Some(path.into());
        self
    }
}

/// How to stop a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    /// Roll back what runs, end connections, write a checkpoint.
    Fast,
    /// Like a crash, but told; the next start recovers.
    Immediate,
}

/// A running cluster. Dropping it stops the server and removes its directory.
pub struct Server {
    major: u32,
    port: u16,
    directory: PathBuf,
    programs: PathBuf,
    log: PathBuf,
    owner: Option<(u32, u32)>,
    superuser_password: Secret,
    app_password: Secret,
    process: Mutex<Option<Child>>,
    /// Holds the write end of a pipe: when we die, whatever the reason, the watchdog reads end-of-file and cleans up.
    watchdog: Option<Child>,
}

impl Server {
    /// The role that owns applications' tables.
    pub const APP: &'static str = "app";
    /// The superuser.
    pub const SUPERUSER: &'static str = "postgres";

    /// Creates a cluster of `major`, starts it on a free port and creates the role [`Server::APP`] (no superuser).
    ///
    /// # Errors
    /// [`ServerError`]; a missing version says to run `scripts/setup`.
    pub async fn start(major: u32, options: Options) -> Result<Server, ServerError> {
        let server = tokio::task::spawn_blocking(move || Server::create(major, &options, None))
            .await
            .map_err(|error| io_error("create a cluster")(io::Error::other(error)))??;
        server.create_app_role().await?;
        Ok(server)
    }

    /// As [`Server::start`], with the app role's password given: a shadow has the same roles as its source.
    ///
    /// # Errors
    /// [`ServerError`]
    pub async fn start_like(other: &Server, major: u32, options: Options) -> Result<Server, ServerError> {
        let password = other.app_password.clone();
        let server = tokio::task::spawn_blocking(move || Server::create(major, &options, Some(password)))
            .await
            .map_err(|error| io_error("create a cluster")(io::Error::other(error)))??;
        server.create_app_role().await?;
        Ok(server)
    }

    fn create(major: u32, options: &Options, app_password: Option<Secret>) -> Result<Server, ServerError> {
        let programs = find_programs(major).ok_or(ServerError::Missing { major })?;
        let owner = unprivileged_user()?;
        let directory = create_directory(owner)?;
        let log = options.log.clone().unwrap_or_else(|| directory.join("server.log"));
        let mut server = Server {
            major,
            port: 0,
            directory,
            programs,
            log,
            owner,
            superuser_password: random_secret(),
            app_password: app_password.unwrap_or_else(random_secret),
            process: Mutex::new(None),
            watchdog: None,
        };
        server.watchdog = Some(server.spawn_watchdog()?);
        server.initdb()?;
        // Another program may take the port between our look and the server's bind: look again.
        for attempt in 1.. {
            server.port = free_port().map_err(io_error("find a free port"))?;
            server.write_settings(options)?;
            match server.launch() {
                Ok(()) => break,
                Err(ServerError::NotReady { output, .. }) if attempt < 5 && output.contains("could not bind") => {}
                Err(error) => return Err(error),
            }
        }
        Ok(server)
    }

    /// Major version.
    pub fn major(&self) -> u32 {
        self.major
    }

    /// TCP port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The server's log.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The directory of `psql`, `pgbench` and others of this installation, where it has them.
    pub fn programs(&self) -> &Path {
        &self.programs
    }

    /// This server, as the superuser.
    pub fn superuser_url(&self, dbname: &str) -> ServerUrl {
        self.url(Self::SUPERUSER, &self.superuser_password, dbname)
    }

    /// This server, as the application's role.
    pub fn app_url(&self, dbname: &str) -> ServerUrl {
        self.url(Self::APP, &self.app_password, dbname)
    }

    /// The application role's password.
    pub fn app_password(&self) -> &Secret {
        &self.app_password
    }

    fn url(&self, user: &str, password: &Secret, dbname: &str) -> ServerUrl {
        ServerUrl {
            host: "127.0.0.1".into(),
            port: self.port,
            user: user.to_owned(),
            password: Some(password.clone()),
            dbname: dbname.to_owned(),
            sslmode: SslMode::Disable,
            tls: ServerTls::default(),
            tcp: TcpConfig::SERVERS,
        }
    }

    /// A control connection as superuser, not through any proxy.
    ///
    /// # Errors
    /// [`ServerError::Sql`]
    pub async fn connect(&self, dbname: &str) -> Result<tokio_postgres::Client, ServerError> {
        let mut config = self.superuser_url(dbname).to_tokio("operator");
        config.application_name("operator");
        let (client, connection) = config
            .connect(tokio_postgres::NoTls)
            .await
            .map_err(|source| ServerError::Sql { action: "connect to the server as superuser", source })?;
        tokio::spawn(connection);
        Ok(client)
    }

    async fn create_app_role(&self) -> Result<(), ServerError> {
        let client = self.connect("postgres").await?;
        // The password is ours: hexadecimal digits only.
        client
            .batch_execute(&format!("CREATE ROLE {} LOGIN PASSWORD '{}'", Self::APP, self.app_password.expose()))
            .await
            .map_err(|source| ServerError::Sql { action: "create the application's role", source })
    }

    /// Creates a database that [`Server::APP`] owns. `name` is a plain identifier.
    ///
    /// # Errors
    /// [`ServerError::Sql`]
    pub async fn create_database(&self, name: &str) -> Result<(), ServerError> {
        let client = self.connect("postgres").await?;
        client
            .batch_execute(&format!("CREATE DATABASE {name} OWNER {}", Self::APP))
            .await
            .map_err(|source| ServerError::Sql { action: "create a database", source })
    }

    /// Stops the server; [`Server::restart`] starts it again on the same port, with its data.
    ///
    /// # Errors
    /// [`ServerError::Io`] if it does not end.
    pub fn stop(&self, how: Shutdown) -> Result<(), ServerError> {
        let mut process = self.process();
        if let Some(child) = process.as_mut() {
            let _ = self.signal_all("CONT", child.id());
            signal(if how == Shutdown::Fast { "INT" } else { "QUIT" }, &[child.id()]).map_err(io_error("stop the server"))?;
            wait_for_exit(child).map_err(io_error("wait for the server to stop"))?;
        }
        *process = None;
        Ok(())
    }

    /// Kills the server and all its processes as a power cut would.
    ///
    /// # Errors
    /// [`ServerError::Io`]
    pub fn kill9(&self) -> Result<(), ServerError> {
        let mut process = self.process();
        if let Some(child) = process.as_mut() {
            self.signal_all("KILL", child.id())?;
            wait_for_exit(child).map_err(io_error("wait for the killed server"))?;
        }
        *process = None;
        Ok(())
    }

    /// Freezes every process of the server: connections stay open and nothing answers.
    ///
    /// # Errors
    /// [`ServerError::Io`]
    pub fn pause(&self) -> Result<(), ServerError> {
        match self.process().as_ref() {
            Some(child) => self.signal_all("STOP", child.id()),
            None => Ok(()),
        }
    }

    /// Lets a frozen server go on.
    ///
    /// # Errors
    /// [`ServerError::Io`]
    pub fn resume(&self) -> Result<(), ServerError> {
        match self.process().as_ref() {
            Some(child) => self.signal_all("CONT", child.id()),
            None => Ok(()),
        }
    }

    /// Starts the server again (stopping it first if it runs), same port, same data.
    ///
    /// # Errors
    /// [`ServerError`]
    pub fn restart(&self) -> Result<(), ServerError> {
        self.stop(Shutdown::Fast)?;
        self.launch()
    }

    /// Whether the server process is alive.
    pub fn is_running(&self) -> bool {
        self.process().as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    fn process(&self) -> MutexGuard<'_, Option<Child>> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The postmaster and its children; children that come and go meanwhile are no error.
    fn signal_all(&self, name: &str, postmaster: u32) -> Result<(), ServerError> {
        let mut pids = vec![postmaster];
        pids.extend(children_of(postmaster));
        signal(name, &pids).map_err(io_error(format!("send SIG{name} to the server")))
    }

    fn data(&self) -> PathBuf {
        self.directory.join("data")
    }

    /// A program of this server, as its owner, with nothing of our environment that could change what it does.
    fn program(&self, name: &str) -> Command {
        let mut command = Command::new(self.programs.join(name));
        command.current_dir(&self.directory).stdin(Stdio::null());
        command.env_clear().env("PATH", "/usr/bin:/bin").env("LC_ALL", "C.UTF-8").env("HOME", &self.directory).env("TZ", "UTC");
        if let Some((uid, gid)) = self.owner {
            command.uid(uid).gid(gid);
        }
        // A group of its own: Ctrl-C in the terminal is ours to handle, not the server's.
        command.process_group(0);
        command
    }

    fn initdb(&self) -> Result<(), ServerError> {
        let password_file = self.directory.join("password");
        fs::write(&password_file, self.superuser_password.expose()).map_err(io_error("write the password file"))?;
        fs::set_permissions(&password_file, fs::Permissions::from_mode(0o600)).map_err(io_error("protect the password file"))?;
        give_to(&password_file, self.owner)?;
        let output = self
            .program("initdb")
            .arg("--pgdata")
            .arg(self.data())
            .args(["--username", Self::SUPERUSER, "--auth", "scram-sha-256", "--pwfile"])
            .arg(&password_file)
            .args(["--encoding", "UTF8", "--locale", "C.UTF-8", "--no-sync"])
            .output()
            .map_err(io_error("run initdb"))?;
        let _ = fs::remove_file(&password_file);
        if output.status.success() {
            return Ok(());
        }
        Err(ServerError::Program {
            program: format!("initdb of PostgreSQL {}", self.major),
            output: tail(&String::from_utf8_lossy(&output.stderr)),
        })
    }

    fn write_settings(&self, options: &Options) -> Result<(), ServerError> {
        let mut text = format!(
            "listen_addresses = '127.0.0.1'\nport = {}\nunix_socket_directories = ''\nmax_connections = 100\n\
             shared_buffers = '64MB'\nwal_level = logical\nmax_wal_senders = 10\nmax_replication_slots = 10\n\
             fsync = off\nfull_page_writes = off\nshared_preload_libraries = ''\npassword_encryption = 'scram-sha-256'\n\
             timezone = 'UTC'\nlog_timezone = 'UTC'\nlog_line_prefix = '%m [%p] %a '\nlog_min_messages = warning\n",
            self.port
        );
        for (name, value) in &options.settings {
            text.push_str(&format!("{name} = '{}'\n", value.replace('\'', "''")));
        }
        // postgresql.auto.conf is read last: ALTER SYSTEM keeps working, and initdb's own lines are overruled.
        let path = self.data().join("understudy.conf");
        fs::write(&path, text).map_err(io_error("write the server's settings"))?;
        give_to(&path, self.owner)?;
        let main = self.data().join("postgresql.conf");
        let existing = fs::read_to_string(&main).map_err(io_error("read postgresql.conf"))?;
        let include = "include = 'understudy.conf'\n";
        if !existing.ends_with(include) {
            fs::write(&main, format!("{existing}\n{include}")).map_err(io_error("write postgresql.conf"))?;
        }
        Ok(())
    }

    fn launch(&self) -> Result<(), ServerError> {
        let log = fs::OpenOptions::new().create(true).append(true).open(&self.log).map_err(io_error("open the server's log"))?;
        let log_start = log.metadata().map(|m| m.len()).unwrap_or(0) as usize;
        let stderr = log.try_clone().map_err(io_error("open the server's log"))?;
        let mut child = self
            .program("postgres")
            .arg("-D")
            .arg(self.data())
            .stdout(Stdio::from(log))
            .stderr(Stdio::from(stderr))
            .spawn()
            .map_err(io_error(format!("run PostgreSQL {}", self.major)))?;
        let deadline = Instant::now() + SERVER_WAIT_MAX;
        loop {
            let ended = matches!(child.try_wait(), Ok(Some(_)) | Err(_));
            if !ended && self.is_ready(child.id()) {
                *self.process() = Some(child);
                return Ok(());
            }
            if ended || Instant::now() > deadline {
                let _ = child.kill();
                let _ = child.wait();
                let text = fs::read_to_string(&self.log).unwrap_or_default();
                let output = tail(text.get(log_start..).unwrap_or(&text));
                return Err(ServerError::NotReady { major: self.major, port: self.port, output });
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Line 1 of postmaster.pid is the process, line 8 its status: what pg_ctl looks at (src/include/utils/pidfile.h).
    fn is_ready(&self, pid: u32) -> bool {
        let Ok(text) = fs::read_to_string(self.data().join("postmaster.pid")) else { return false };
        let mut lines = text.lines();
        lines.next().and_then(|line| line.trim().parse::<u32>().ok()) == Some(pid)
            && lines.nth(6).is_some_and(|line| line.trim() == "ready")
    }

    /// `sh` that waits for end-of-file on the pipe we hold, then stops the server and removes its directory.
    fn spawn_watchdog(&self) -> Result<Child, ServerError> {
        const SCRIPT: &str = r#"
            trap '' INT TERM HUP
            cat > /dev/null
            [ -d "$1" ] || exit 0
            pid=$(head -n 1 "$1/data/postmaster.pid" 2> /dev/null) && [ -n "$pid" ] && {
                for child in $(cat "/proc/$pid/task/$pid/children" 2> /dev/null); do kill -CONT "$child" 2> /dev/null; done
                kill -CONT "$pid" 2> /dev/null
                kill -QUIT "$pid" 2> /dev/null
                for i in 1 2 3 4 5 6 7 8 9 10; do kill -0 "$pid" 2> /dev/null || break; sleep 0.2; done
                kill -KILL "$pid" 2> /dev/null
            }
            rm -rf "$1"
        "#;
        Command::new("/bin/sh")
            .args(["-c", SCRIPT, "understudy-watchdog"])
            .arg(&self.directory)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .map_err(io_error("start the watchdog of the server"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.stop(Shutdown::Immediate).is_err() {
            let _ = self.kill9();
        }
        let _ = fs::remove_dir_all(&self.directory);
        if let Some(mut watchdog) = self.watchdog.take() {
            drop(watchdog.stdin.take());
            let _ = watchdog.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_version_says_what_to_run() {
        assert!(find_programs(3).is_none());
        assert!(ServerError::Missing { major: 3 }.to_string().contains("scripts/setup"));
    }

    #[test]
    fn tail_keeps_the_end() {
        let text = (0..20).map(|n| format!("line {n}\n\n")).collect::<String>();
        assert!(tail(&text).starts_with("line 12\n") && tail(&text).ends_with("line 19"));
        assert_eq!(tail(""), "");
    }

    #[tokio::test]
    async fn a_server_survives_what_the_demo_does_to_it_and_leaves_nothing() {
        let server = Server::start(15, Options::default().set("work_mem", "5MB")).await.unwrap();
        server.create_database("shop").await.unwrap();
        let client = server.connect("shop").await.unwrap();
        client.batch_execute("CREATE TABLE kept (id int PRIMARY KEY); INSERT INTO kept VALUES (1)").await.unwrap();
        for (setting, expected) in [("work_mem", "5MB"), ("wal_level", "logical"), ("fsync", "off")] {
            let value: String = client.query_one(&format!("SHOW {setting}"), &[]).await.unwrap().get(0);
            assert_eq!(value, expected, "{setting}");
        }
        server.pause().unwrap();
        let frozen = tokio::time::timeout(Duration::from_millis(200), client.query_one("SELECT 1", &[])).await;
        assert!(frozen.is_err(), "a frozen server answered");
        server.resume().unwrap();
        client.query_one("SELECT 1", &[]).await.unwrap();

        server.kill9().unwrap();
        assert!(!server.is_running() && client.query_one("SELECT 1", &[]).await.is_err());
        server.restart().unwrap();
        let kept: i64 = server.connect("shop").await.unwrap().query_one("SELECT count(*) FROM kept", &[]).await.unwrap().get(0);
        assert_eq!(kept, 1);

        let directory = server.directory.clone();
        drop(server);
        assert!(!directory.exists());
    }

    #[tokio::test]
    async fn the_watchdog_cleans_up_after_us() {
        let mut server = Server::start(15, Options::default()).await.unwrap();
        let (directory, pid) = (server.directory.clone(), server.process().as_ref().unwrap().id());
        let mut watchdog = server.watchdog.take().unwrap();
        drop(watchdog.stdin.take());
        watchdog.wait().unwrap();
        assert!(!directory.exists());
        // Our own child stays a zombie until we look at it.
        assert!(!server.is_running(), "process {pid} is still there");
    }
}
