//! The programs that are compared, each on a port of its own, all ended at the end.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};
use understudy::{config::ServerUrl, demo::servers::Server};

/// Server connections of a pool: more than clients at work.
const POOL: usize = 40;

/// Where a load can be sent.
#[derive(Clone, Copy)]
pub struct Target {
    pub name: &'static str,
    pub port: u16,
    /// Whose CPU and memory count.
    pub pid: Option<u32>,
    /// Pools by transaction.
    pub transactions: bool,
    /// Keeps prepared statements while it does.
    pub prepares: bool,
}

/// A running program.
pub struct Running {
    child: Child,
    port: u16,
    config: PathBuf,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Everyone who is measured, and the programs behind them.
pub struct Fleet {
    pub targets: Vec<Target>,
    _running: Vec<Running>,
}

/// What is needed to start them.
pub struct Programs<'a> {
    pub server: &'a Server,
    pub password: &'a str,
    pub folder: &'a Path,
}

impl Running {
    pub fn target(&self, name: &'static str) -> Target {
        Target { name, port: self.port, pid: Some(self.child.id()), transactions: false, prepares: true }
    }

    /// Gives understudy a console command and returns what it said.
    pub async fn tell(&self, words: &str) -> Result<String, String> {
        let output = Command::new(env!("CARGO_BIN_EXE_understudy"))
            .args(["ctl", "--config"])
            .arg(&self.config)
            .args(words.split(' '))
            .stdin(Stdio::null())
            .output()
            .map_err(|error| error.to_string())?;
        if !output.status.success() {
            return Err(format!("{words}: {}", String::from_utf8_lossy(&output.stderr)));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Until the shadow's feed streams.
    pub async fn until_in_step(&self) -> Result<(), String> {
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            let said = self.tell("SHOW SHADOWS").await?;
            if said.contains("healthy") && said.contains("streaming") {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(format!("the shadow did not get in step:\n{said}"));
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}

impl Programs<'_> {
    /// Everyone that is installed.
    pub fn everyone(&self) -> Result<Fleet, String> {
        let direct = Target { name: "direct", port: self.server.port(), pid: None, transactions: false, prepares: true };
        let mut fleet = Fleet { targets: vec![direct], _running: Vec::new() };
        fleet.add("haproxy", self.haproxy()?, |target| target);
        fleet.add("pgbouncer session", self.pgbouncer("session", POOL)?, |target| target);
        fleet.add("pgbouncer transaction", self.pgbouncer("transaction", POOL)?, |target| Target {
            transactions: true,
            prepares: false,
            ..target
        });
        fleet.add("understudy session", Some(self.understudy(None)?), |target| target);
        fleet.add("understudy transaction", Some(self.pooled(POOL)?), |target| Target { transactions: true, ..target });
        Ok(fleet)
    }

    /// One program for so many clients; `None`: it is not installed.
    pub fn one(&self, name: &str, mode: &str, clients: usize) -> Result<Option<Running>, String> {
        match (name, mode) {
            ("pgbouncer", "session") => self.pgbouncer(mode, clients),
            ("pgbouncer", _) => self.pgbouncer(mode, POOL),
            (_, "session") => self.understudy(None).map(Some),
            _ => self.pooled(POOL).map(Some),
        }
    }

    /// understudy in session mode, with a shadow if there is one.
    pub fn understudy(&self, shadow: Option<&Server>) -> Result<Running, String> {
        self.understudy_with("", shadow)
    }

    /// understudy in transaction mode, with a pool of this size.
    fn pooled(&self, size: usize) -> Result<Running, String> {
        let users = self.open_folder()?.join("understudy-users.txt");
        fs::write(&users, format!("\"app\" \"{}\"\n", self.password)).map_err(|error| error.to_string())?;
        let text = format!("pool_mode = \"transaction\"\npool.size = {size}\nauth.users = \"file:{}\"\n", users.display());
        self.understudy_with(&text, None)
    }

    fn understudy_with(&self, more: &str, shadow: Option<&Server>) -> Result<Running, String> {
        let (port, http) = (free_port()?, free_port()?);
        let metadata = self.folder.join(format!("bench-{port}.db"));
        for suffix in ["", "-wal", "-shm"] {
            let _ = fs::remove_file(format!("{}{suffix}", metadata.display()));
        }
        let mut text = format!(
            "[proxy]\nlisten = \"127.0.0.1:{port}\"\nhttp = \"127.0.0.1:{http}\"\nmetadata = \"sqlite:{}\"\nmax_clients = 20000\n{more}\
             [[database]]\nname = \"bench\"\nsource = \"{}\"\n",
            metadata.display(),
            with_secret(&self.server.superuser_url("bench"))
        );
        if let Some(shadow) = shadow {
            // limits out of reach: what sessions do is measured, not the judge
            text.push_str(&format!(
                "[[database.user]]\nname = \"app\"\npassword = \"{}\"\n[[database.shadow]]\nname = \"other\"\nurl = \"{}\"\nmirror_writes = \"off\"\n\
                 sample_reads = 0.0\n[database.shadow.revert]\nmin_requests = 1000000000\nmax_lag = \"1h\"\n",
                self.password,
                with_secret(&shadow.superuser_url("bench"))
            ));
        }
        let config = self.folder.join(format!("bench-{port}.toml"));
        fs::write(&config, text).map_err(|error| error.to_string())?;
        let mut command = Command::new(env!("CARGO_BIN_EXE_understudy"));
        command.args(["run", "--log", "error", "--config"]).arg(&config);
        start(command, port, config)
    }

    fn pgbouncer(&self, mode: &str, size: usize) -> Result<Option<Running>, String> {
        let Some(program) = installed("pgbouncer") else { return Ok(None) };
        let port = free_port()?;
        let folder = self.open_folder()?;
        let (ini, users) = (folder.join(format!("pgbouncer-{port}.ini")), folder.join("users.txt"));
        fs::write(&users, format!("\"app\" \"{}\"\n", self.password)).map_err(|error| error.to_string())?;
        let text = format!(
            "[databases]\nbench = host=127.0.0.1 port={} dbname=bench\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
             unix_socket_dir =\nauth_type = scram-sha-256\nauth_file = {}\npool_mode = {mode}\ndefault_pool_size = {size}\n\
             max_client_conn = 20000\nlogfile = {}\n",
            self.server.port(),
            users.display(),
            folder.join("log").display()
        );
        fs::write(&ini, text).map_err(|error| error.to_string())?;
        let mut command = unprivileged(&program);
        command.arg("-q").arg(&ini);
        start(command, port, ini).map(Some)
    }

    fn haproxy(&self) -> Result<Option<Running>, String> {
        let Some(program) = installed("haproxy") else { return Ok(None) };
        let port = free_port()?;
        let file = self.open_folder()?.join("haproxy.cfg");
        let text = format!(
            "global\n  nbthread 1\n  maxconn 1000\ndefaults\n  mode tcp\n  timeout connect 5s\n  timeout client 1h\n  timeout server 1h\n\
             listen bench\n  bind 127.0.0.1:{port}\n  server one 127.0.0.1:{}\n",
            self.server.port()
        );
        fs::write(&file, text).map_err(|error| error.to_string())?;
        let mut command = Command::new(program);
        command.args(["-db", "-f"]).arg(&file);
        start(command, port, file).map(Some)
    }

    /// A folder that programs without privileges can read and write.
    fn open_folder(&self) -> Result<PathBuf, String> {
        let folder = std::env::temp_dir().join(format!("understudy-bench-{}", std::process::id()));
        fs::create_dir_all(&folder).map_err(|error| error.to_string())?;
        let _ = Command::new("chmod").arg("a+rwX").arg(&folder).status();
        Ok(folder)
    }
}

impl Fleet {
    fn add(&mut self, name: &'static str, running: Option<Running>, change: impl Fn(Target) -> Target) {
        match running {
            Some(running) => {
                self.targets.push(change(running.target(name)));
                self._running.push(running);
            }
            None => println!("{name}: not installed, left out (apt-get install haproxy pgbouncer)"),
        }
    }
}

fn with_secret(url: &ServerUrl) -> String {
    let secret = url.password.as_ref().map(|password| password.expose()).unwrap_or_default();
    format!("postgres://{}:{secret}@{}:{}/{}", url.user, url.host, url.port, url.dbname)
}

fn installed(name: &str) -> Option<PathBuf> {
    ["/usr/sbin", "/usr/bin"].iter().map(|folder| Path::new(folder).join(name)).find(|path| path.exists())
}

/// PgBouncer refuses root.
fn unprivileged(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=nobody", "--regid=nogroup", "--clear-groups"]).arg(program);
    command
}

fn free_port() -> Result<u16, String> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").map_err(|error| error.to_string())?;
    listener.local_addr().map(|address| address.port()).map_err(|error| error.to_string())
}

fn start(mut command: Command, port: u16, config: PathBuf) -> Result<Running, String> {
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let running = Running { child: child.map_err(|error| error.to_string())?, port, config };
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        if std::net::TcpStream::connect(("127.0.0.1", port)).is_ok() {
            return Ok(running);
        }
        thread::sleep(Duration::from_millis(50));
    }
    Err(format!("nothing listens on port {port} after 10 s ({})", running.config.display()))
}
