//! Clients over the Unix socket: libpq finds it, the kernel says who they are, its file comes and goes with its last owner.

#[path = "cutover/stage.rs"]
mod stage;
mod support;

use stage::Stage;
use std::{
    os::unix::{fs::MetadataExt, net as unix},
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};
use support::find_client;
use understudy::net::socket_path;

/// A folder that every user may enter, below a short path; gone at the end.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        let folder = PathBuf::from(format!("/tmp/understudy-unix-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::set_permissions(&folder, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        Folder(folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn me() -> String {
    String::from_utf8(Command::new("id").arg("-un").output().unwrap().stdout).unwrap().trim().to_owned()
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|found| found.uid() == 0)
}

/// psql through the socket, as another user of the system where `as_uid` says so.
async fn psql(stage: &Stage, folder: &Path, user: &str, dbname: &str, command: &str, as_uid: Option<u32>) -> Output {
    let mut run = match as_uid {
        Some(uid) => {
            let mut run = Command::new("setpriv");
            run.args([&format!("--reuid={uid}"), &format!("--regid={uid}"), "--clear-groups"]).arg(psql_program());
            run
        }
        None => Command::new(psql_program()),
    };
    run.args(["-XAtw", "-U", user, "-d", dbname, "-c", command, "-p", &stage.port().to_string(), "-h"]).arg(folder);
    run.env("PGPASSWORD", stage.source.app_password().expose()).env("PGCONNECT_TIMEOUT", "60").env("PGSSLMODE", "prefer");
    tokio::task::spawn_blocking(move || run.output().unwrap()).await.unwrap()
}

fn psql_program() -> PathBuf {
    find_client("psql").unwrap_or_else(|| "psql".into())
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).trim().to_owned() + String::from_utf8_lossy(&output.stderr).trim()
}

fn over(stage: &Stage, folder: &Path, user: &str, dbname: &str) -> tokio_postgres::Config {
    let mut config = tokio_postgres::Config::new();
    config.host_path(folder).port(stage.port()).user(user).dbname(dbname).application_name("test");
    config.password(stage.source.app_password().expose()).connect_timeout(Duration::from_secs(60));
    config
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_come_over_the_unix_socket() {
    let folder = Folder::new();
    let folder = &folder.0;
    let stage = Stage::new().await;
    let path = socket_path(folder, stage.port());
    let me = me();
    let role = format!("CREATE ROLE \"{me}\" LOGIN PASSWORD '{}'", stage.source.app_password().expose());
    if me != "postgres" {
        stage.source.connect("shop").await.unwrap().batch_execute(&role).await.unwrap();
    }
    let more = format!("unix_socket_dir = \"{}\"\nunix_socket_mode = \"0777\"\nmax_clients = 20\n[[database]]", folder.display());
    stage.edit("proxy.toml", |text| text.replacen("[[database]]", &more, 1));

    // What a process that is gone has left is replaced.
    drop(unix::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let first = stage.start(None).await;
    stage.wait_log("replacing the Unix socket", 1).await;
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o777);

    relayed(&stage, folder).await;
    peers(&stage, folder, &me).await;
    takeover(&stage, folder, first).await;
    crashed_and_taken(&stage, folder).await;
}

/// The owner asks for the password, as it would by TCP.
async fn relayed(stage: &Stage, folder: &Path) {
    let output = psql(stage, folder, "app", "shop", "SELECT 'in'", None).await;
    assert_eq!(said(&output), "in");
    let client = stage::connect(over(stage, folder, "app", "shop")).await.unwrap();
    let clients = stage.must("SHOW CLIENTS").await;
    assert!(clients.iter().any(|row| row["peer"] == "unix" && row["user"] == "app"), "{clients:?}");

    // no TLS, and none but ours may say so
    let mut raw = tokio::net::UnixStream::connect(socket_path(folder, stage.port())).await.unwrap();
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    for request in [80_877_104_u32, 80_877_103] {
        raw.write_all(&[8_u32.to_be_bytes(), request.to_be_bytes()].concat()).await.unwrap();
        assert_eq!(raw.read_u8().await.unwrap(), b'N');
    }
    drop(raw);

    // a cancel request over the socket
    let cancel = client.cancel_token();
    let cancelling = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        cancel.cancel_query(tokio_postgres::NoTls).await.unwrap();
    };
    let (cancelled, ()) = tokio::join!(client.batch_execute("SELECT pg_sleep(60)"), cancelling);
    assert_eq!(cancelled.unwrap_err().code().unwrap().code(), "57014");

    // the console, and the limit that counts everybody
    assert!(said(&psql(stage, folder, "operator", "understudy", "SHOW CLIENTS", None).await).contains("unix"));
    let mut others = Vec::new();
    let refused = loop {
        match stage::connect(over(stage, folder, "app", "shop")).await {
            Ok(client) => others.push(client),
            Err(error) => break error,
        }
        assert!(others.len() < 20, "max_clients counts no client of the Unix socket");
    };
    assert_eq!(refused.code().unwrap().code(), "53300");
    drop((others, client));
    while !stage.must("SHOW CLIENTS").await.is_empty() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Rules for the socket: the kernel's word is enough.
async fn peers(stage: &Stage, folder: &Path, me: &str) {
    let rules = "[proxy.auth]\nrules = [\"local all app relay\", \"local all all peer\", \"host all all all relay\"]\n";
    let user = format!("[[database.user]]\nname = \"{me}\"\npassword = \"{}\"\n", stage.source.app_password().expose());
    stage.edit("proxy.toml", |text| {
        let text = text.replacen("[[database]]", &format!("{rules}[[database]]"), 1);
        if me == "postgres" {
            return text; // its password is in the url
        }
        text.replacen("[[database.shadow]]", &format!("{user}[[database.shadow]]"), 1)
    });
    stage.must("RELOAD").await;
    let output = psql(stage, folder, me, "shop", "SELECT current_user", None).await;
    assert_eq!(said(&output), me);
    let refused = said(&psql(stage, folder, "somebody", "shop", "SELECT 1", None).await);
    assert!(refused.contains("Peer authentication failed for user \"somebody\""), "{refused}");
    assert_eq!(said(&psql(stage, folder, "app", "shop", "SELECT 'in'", None).await), "in");
    if is_root() {
        let refused = said(&psql(stage, folder, me, "shop", "SELECT 1", Some(65_534)).await);
        assert!(refused.contains(&format!("Peer authentication failed for user \"{me}\"")), "{refused}");
    }
}

/// Connections one after the other, none of which is refused while processes change.
async fn takeover(stage: &Stage, folder: &Path, first: stage::Proxy) {
    let path = socket_path(folder, stage.port());
    let stays = stage::connect(over(stage, folder, "app", "shop")).await.unwrap();
    let coming = async {
        let mut came = 0_u32;
        loop {
            let client = stage::connect(over(stage, folder, "app", "shop")).await.map_err(|error| format!("{error:?}"))?;
            client.batch_execute("SELECT 1").await.map_err(|error| format!("{error:?}"))?;
            came += 1;
            tokio::time::sleep(Duration::from_millis(2)).await;
            if came.is_multiple_of(50) && stage.log().contains("the new process is ready") {
                return Ok::<u32, String>(came);
            }
        }
    };
    let mut second = None;
    let taking = async {
        second = Some(stage.spawn(None, "proxy.toml", &["--takeover"]));
        stage.wait_log("the new process is ready", 1).await;
    };
    let (came, ()) = tokio::join!(coming, taking);
    assert!(came.unwrap() > 0);
    let made = std::fs::metadata(&path).unwrap().ino();
    drop(stays);
    assert_eq!(stage.wait_for_death(first).await, Some(0), "{}", stage.log());
    assert_eq!(std::fs::metadata(&path).unwrap().ino(), made, "the first process has left the file to the second");
    assert_eq!(said(&psql(stage, folder, "app", "shop", "SELECT 'in'", None).await), "in");

    stage.tell("SHUTDOWN").await.ok();
    assert_eq!(stage.wait_for_death(second.unwrap()).await, Some(0), "{}", stage.log());
    assert!(!path.exists(), "the last one takes the file with it");
}

/// A crash leaves the file, which the next start replaces; the socket of a living process stays where it is.
async fn crashed_and_taken(stage: &Stage, folder: &Path) {
    let path = socket_path(folder, stage.port());
    stage.start(None).await.kill();
    assert!(path.exists());
    let proxy = stage.start(None).await;
    assert_eq!(said(&psql(stage, folder, "app", "shop", "SELECT 'in'", None).await), "in");
    proxy.kill();

    std::fs::remove_file(&path).unwrap();
    let living = unix::UnixListener::bind(&path).unwrap();
    let refused = stage.spawn(None, "proxy.toml", &[]);
    assert_eq!(stage.wait_for_death(refused).await, Some(3));
    stage.wait_log("another process listens on the Unix socket", 1).await;
    unix::UnixStream::connect(&path).unwrap();
    drop(living);
}
