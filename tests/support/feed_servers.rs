//! Real PostgreSQL servers for the feed's tests: one folder under /tmp each, loopback only, stopped when dropped.

use std::{
    net::TcpListener,
    os::unix::{fs::chown, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
};
use tokio_postgres::{Client, NoTls};
use understudy::config::ServerUrl;

/// Servers refuse to run as root: then they run as `nobody`.
const NOBODY: u32 = 65_534;

pub struct Server {
    bin: PathBuf,
    folder: PathBuf,
    pub port: u16,
}

fn bin_of(major: u32) -> PathBuf {
    let debian = PathBuf::from(format!("/usr/lib/postgresql/{major}/bin"));
    if debian.join("initdb").exists() { debian } else { PathBuf::from(format!(".deps/postgresql/{major}/bin")).canonicalize().unwrap() }
}

fn root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0)
}

fn run(program: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(program);
    command.args(arguments).current_dir("/tmp").stdin(Stdio::null());
    if root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    command.output().unwrap_or_else(|error| panic!("{}: {error}", program.display()))
}

impl Server {
    pub fn start(major: u32, settings: &str) -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let bin = bin_of(major);
        let folder = PathBuf::from(format!("/tmp/cdc-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed)));
        std::fs::create_dir_all(&folder).unwrap();
        if root() {
            chown(&folder, Some(NOBODY), Some(NOBODY)).unwrap();
        }
        let data = folder.join("data");
        let data = data.to_str().unwrap();
        let made = run(&bin.join("initdb"), &["-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "-N"]);
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let conf = format!(
            "{}\nport = {port}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = ''\nwal_level = logical\nfsync = off\n\
             max_wal_senders = 20\nmax_replication_slots = 20\nshared_buffers = 64MB\nmax_connections = 60\n{settings}\n",
            std::fs::read_to_string(format!("{data}/postgresql.conf")).unwrap()
        );
        std::fs::write(format!("{data}/postgresql.conf"), conf).unwrap();
        let server = Server { bin, folder, port };
        server.boot();
        server
    }

    fn boot(&self) {
        let log = self.folder.join("log");
        let arguments = ["-w", "-D", &self.data(), "-l", log.to_str().unwrap(), "start"];
        // Its output is not captured: the server would keep the pipe open.
        let mut command = Command::new(self.bin.join("pg_ctl"));
        command.args(arguments).current_dir("/tmp").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        if root() {
            command.uid(NOBODY).gid(NOBODY);
        }
        assert!(command.status().unwrap().success(), "{}", std::fs::read_to_string(&log).unwrap_or_default());
    }

    fn data(&self) -> String {
        self.folder.join("data").to_str().unwrap().to_owned()
    }

    /// Restarts as after a crash.
    #[allow(dead_code)]
    pub fn crash(&self) {
        run(&self.bin.join("pg_ctl"), &["-w", "-D", &self.data(), "-m", "immediate", "stop"]);
        self.boot();
    }

    /// Stops it and keeps a copy of its files as they are now.
    #[allow(dead_code)]
    pub fn stop_and_keep(&self) {
        run(&self.bin.join("pg_ctl"), &["-w", "-D", &self.data(), "-m", "fast", "stop"]);
        let kept = self.folder.join("kept");
        run(Path::new("/bin/cp"), &["-a", &self.data(), kept.to_str().unwrap()]);
    }

    /// Starts it again.
    #[allow(dead_code)]
    pub fn start_again(&self) {
        self.boot();
    }

    /// A failover: it goes on as a standby that was promoted, from the files that were kept or from its own.
    #[allow(dead_code)]
    pub fn fail_over(&self, kept: bool) {
        let data = self.data();
        run(&self.bin.join("pg_ctl"), &["-w", "-D", &data, "-m", "fast", "stop"]);
        if kept {
            run(Path::new("/bin/rm"), &["-rf", &data]);
            run(Path::new("/bin/cp"), &["-a", self.folder.join("kept").to_str().unwrap(), &data]);
        }
        run(Path::new("/usr/bin/touch"), &[&format!("{data}/standby.signal")]);
        self.boot();
        let promoted = run(&self.bin.join("pg_ctl"), &["-w", "-D", &data, "promote"]);
        assert!(promoted.status.success(), "{}", String::from_utf8_lossy(&promoted.stderr));
    }

    /// Kills every process of the server with SIGKILL, the postmaster first, and starts it again.
    #[allow(dead_code)]
    pub fn kill(&self) {
        self.kill_only();
        self.boot_again();
    }

    /// Kills every process of the server with SIGKILL, the postmaster first.
    #[allow(dead_code)]
    pub fn kill_only(&self) {
        let file = std::fs::read_to_string(format!("{}/postmaster.pid", self.data())).unwrap();
        let postmaster = file.lines().next().unwrap().to_owned();
        let children: Vec<String> = std::fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| {
                let pid = entry.ok()?.file_name().into_string().ok()?;
                let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
                let parent = stat.rsplit_once(") ")?.1.split(' ').nth(1)?.to_owned();
                (parent == postmaster).then_some(pid)
            })
            .collect();
        for pid in std::iter::once(&postmaster).chain(&children) {
            Command::new("kill").args(["-9", pid]).stderr(Stdio::null()).status().unwrap();
        }
        for pid in std::iter::once(&postmaster).chain(&children) {
            // Gone, or a zombie that nobody has waited for.
            while std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z ")) {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
        }
    }

    /// Starts a server that was killed.
    #[allow(dead_code)]
    pub fn boot_again(&self) {
        // Nobody else has this folder: the file of the killed one would only make pg_ctl doubt.
        let _ = std::fs::remove_file(format!("{}/postmaster.pid", self.data()));
        self.boot();
    }

    pub fn url(&self, database: &str) -> ServerUrl {
        ServerUrl::parse(&format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)).unwrap()
    }

    pub async fn client(&self, database: &str) -> Client {
        let (client, connection) = self.url(database).to_tokio("test").connect(NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    }

    pub async fn create(&self, database: &str) -> Client {
        self.client("postgres").await.batch_execute(&format!("CREATE DATABASE {database}")).await.unwrap();
        self.client(database).await
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        run(&self.bin.join("pg_ctl"), &["-w", "-D", &self.data(), "-m", "immediate", "stop"]);
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
