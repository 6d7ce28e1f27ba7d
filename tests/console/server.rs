//! A PostgreSQL server of a given major for one test, in a folder of its own, on a free port of 127.0.0.1.

use std::{
    net::TcpListener,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

/// Stopped and removed when dropped.
pub struct Server {
    binaries: PathBuf,
    folder: PathBuf,
    pub port: u16,
}

impl Server {
    pub fn start(major: u32) -> Server {
        let fetched = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!(".deps/postgresql/{major}/bin"));
        let packaged = PathBuf::from(format!("/usr/lib/postgresql/{major}/bin"));
        let binaries =
            [fetched, packaged].into_iter().find_map(|folder| folder.join("initdb").exists().then(|| folder.canonicalize().unwrap()));
        let binaries = binaries.unwrap_or_else(|| panic!("PostgreSQL {major} is needed for this test: make test installs it"));
        let folder = std::env::temp_dir().join(format!("understudy-console-{}-{major}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o777)).unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let server = Server { binaries, folder, port };
        server.run("initdb", &["-A", "trust", "-U", "postgres", "-N", "--no-instructions"]);
        let options = format!("-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c shared_buffers=16MB -c fsync=off");
        server.run("pg_ctl", &["start", "-w", "-t", "60", "-o", &options, "-l", server.folder.join("log").to_str().unwrap()]);
        server
    }

    /// Runs a program of the server, as an unprivileged user if we are root: servers refuse to run as root.
    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.binaries.join(program));
        command.arg("-D").arg(self.folder.join("data")).args(arguments).current_dir(&self.folder);
        if Command::new("id").arg("-u").output().unwrap().stdout == b"0\n" {
            command.uid(65_534).gid(65_534);
        }
        command.stdin(Stdio::null());
        command
    }

    fn run(&self, program: &str, arguments: &[&str]) {
        // pg_ctl's server inherits the pipes of its parent: only initdb's could be read to their end
        let status = self.command(program, arguments).stdout(Stdio::null()).stderr(Stdio::inherit()).status().unwrap();
        assert!(status.success(), "{program} {arguments:?}: {status}");
    }

    pub async fn client(&self) -> tokio_postgres::Client {
        let mut config = tokio_postgres::Config::new();
        config.host("127.0.0.1").port(self.port).user("postgres").dbname("postgres").connect_timeout(Duration::from_secs(10));
        let (client, connection) = config.connect(tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(async move {
            let _ = connection.await;
        });
        client
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.folder.join("data/postmaster.pid").exists() {
            self.command("pg_ctl", &["stop", "-m", "immediate"]).output().ok();
        }
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
