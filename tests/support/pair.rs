//! Real PostgreSQL servers for the tests of `validate` and `check`: started on free ports, stopped and removed at the end.

use std::{
    fs,
    net::TcpListener,
    os::unix::{
        fs::{MetadataExt, chown},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};
use tokio_postgres::{Client, NoTls};
use understudy::config::ServerUrl;

/// `nobody` and `nogroup`: PostgreSQL refuses to run as root.
const UNPRIVILEGED: u32 = 65534;

pub struct Server {
    folder: PathBuf,
    programs: PathBuf,
    pub port: u16,
}

fn programs(major: u32) -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join(".deps/postgresql").join(major.to_string()).join("bin");
    let packaged = PathBuf::from(format!("/usr/lib/postgresql/{major}/bin"));
    let found = [packaged, own].into_iter().find(|folder| folder.join("initdb").exists());
    found.unwrap_or_else(|| panic!("PostgreSQL {major} is not installed: run `make test`, which installs it"))
}

fn root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
}

fn run(mut command: Command) {
    if root() {
        command.uid(UNPRIVILEGED).gid(UNPRIVILEGED);
    }
    let output = command.current_dir("/tmp").stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{command:?}: {}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
}

impl Server {
    pub fn start(major: u32, settings: &[&str]) -> Server {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("understudy-pair-{}-{number}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        if root() {
            chown(&folder, Some(UNPRIVILEGED), Some(UNPRIVILEGED)).unwrap();
        }
        let programs = fs::canonicalize(programs(major)).unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let server = Server { folder, programs, port };
        let mut initdb = Command::new(server.programs.join("initdb"));
        initdb.args(["-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C", "-D"]).arg(server.data());
        run(initdb);
        let mut options =
            format!("-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off -c max_connections=50");
        for setting in settings {
            options.push_str(&format!(" -c {setting}"));
        }
        let mut start = Command::new(server.programs.join("pg_ctl"));
        start.args(["-w", "-t", "60", "-o", &options, "-l"]).arg(server.folder.join("log")).arg("-D").arg(server.data()).arg("start");
        start.stdout(Stdio::null());
        if root() {
            start.uid(UNPRIVILEGED).gid(UNPRIVILEGED);
        }
        // The server inherits pg_ctl's output: a pipe would never end.
        let status = start.current_dir("/tmp").stdin(Stdio::null()).stderr(Stdio::null()).status().unwrap();
        assert!(status.success(), "{}", fs::read_to_string(server.folder.join("log")).unwrap_or_default());
        server
    }

    fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    pub fn url(&self, user: &str, database: &str) -> ServerUrl {
        ServerUrl::parse(&format!("postgres://{user}@127.0.0.1:{}/{database}", self.port)).unwrap()
    }

    pub async fn client(&self, database: &str) -> Client {
        let (client, connection) = self.url("postgres", database).to_tokio("test").connect(NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    }

    pub async fn run(&self, database: &str, text: &str) {
        self.client(database).await.batch_execute(text).await.unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let mut stop = Command::new(self.programs.join("pg_ctl"));
        stop.args(["-m", "immediate", "-w", "-D"]).arg(self.data()).arg("stop");
        if root() {
            stop.uid(UNPRIVILEGED).gid(UNPRIVILEGED);
        }
        let _ = stop.current_dir("/tmp").stdout(Stdio::null()).stderr(Stdio::null()).status();
        let _ = fs::remove_dir_all(&self.folder);
    }
}
