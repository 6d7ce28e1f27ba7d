//! Real PostgreSQL servers for the schema tests: one data folder under /tmp each, stopped and removed on drop.

use std::{
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
};

/// A running server.
pub struct Server {
    binaries: PathBuf,
    folder: PathBuf,
    pub port: u16,
}

fn binaries(major: u32) -> PathBuf {
    let local = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!(".deps/postgresql/{major}/bin"));
    if local.join("postgres").exists() { local } else { PathBuf::from(format!("/usr/lib/postgresql/{major}/bin")) }
}

/// `nobody`: servers refuse to run as root.
const NOBODY: u32 = 65534;

fn is_root() -> bool {
    std::os::unix::fs::MetadataExt::uid(&std::fs::metadata("/proc/self").unwrap()) == 0
}

fn run(binary: &Path, arguments: &[&str]) {
    let mut command = Command::new(binary);
    command.args(arguments).stdout(std::process::Stdio::null()).env_remove("LD_LIBRARY_PATH").current_dir("/tmp");
    if is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    let status = command.status().unwrap_or_else(|error| panic!("{}: {error}", binary.display()));
    assert!(status.success(), "{} {arguments:?}: {status}", binary.display());
}

impl Server {
    /// Starts a server of that major, `wal_level=logical`, trust for everybody on the loopback address.
    pub fn start(major: u32) -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let folder = PathBuf::from(format!("/tmp/understudy-schema-{}-{major}-{port}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        if is_root() {
            std::os::unix::fs::chown(&folder, Some(NOBODY), Some(NOBODY)).unwrap();
        }
        let binaries = binaries(major);
        let data = folder.join("data").display().to_string();
        run(&binaries.join("initdb"), &["-D", &data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]);
        let options = format!(
            "-c port={port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c wal_level=logical -c fsync=off \
             -c shared_buffers=16MB -c max_connections=60 -c autovacuum=off -c max_wal_senders=2 -c max_replication_slots=20"
        );
        let log = folder.join("log").display().to_string();
        run(&binaries.join("pg_ctl"), &["-D", &data, "-l", &log, "-o", &options, "-w", "-t", "60", "start"]);
        Server { binaries, folder, port }
    }

    /// A connection.
    pub async fn connect(&self, database: &str) -> tokio_postgres::Client {
        let settings = format!("host=127.0.0.1 port={} user=postgres dbname={database} application_name=understudy-test", self.port);
        let (client, connection) = tokio_postgres::connect(&settings, tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let data = self.folder.join("data").display().to_string();
        let mut command = Command::new(self.binaries.join("pg_ctl"));
        command.args(["-D", &data, "-m", "immediate", "-w", "stop"]).stdout(std::process::Stdio::null()).current_dir("/tmp");
        if is_root() {
            command.uid(NOBODY).gid(NOBODY);
        }
        let _ = command.status();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
