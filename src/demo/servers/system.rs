//! What the servers need from the system they run on: programs, an unprivileged user, a directory, signals.

use super::{SERVER_WAIT_MAX, ServerError, io_error};
use crate::config::Secret;
use std::{
    fs, io,
    net::TcpListener,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    process::{Child, Command},
    time::{Duration, Instant},
};

/// The directory that holds `postgres` and `initdb` of a major version, as a real path (PostgreSQL finds its own files
/// from there): `UNDERSTUDY_PG_<major>_BIN`, `.deps` of this project, then where distributions put it.
pub fn find_programs(major: u32) -> Option<PathBuf> {
    let has_server = |directory: PathBuf| {
        let directory = directory.canonicalize().ok()?;
        (directory.join("postgres").is_file() && directory.join("initdb").is_file()).then_some(directory)
    };
    if let Some(directory) = std::env::var_os(format!("UNDERSTUDY_PG_{major}_BIN")) {
        return has_server(directory.into());
    }
    let mut places: Vec<PathBuf> = project_directories().map(|place| place.join(format!(".deps/postgresql/{major}/bin"))).collect();
    places.push(format!("/usr/lib/postgresql/{major}/bin").into());
    places.push(format!("/usr/pgsql-{major}/bin").into());
    places.into_iter().find_map(has_server)
}

/// A client program (`pgbench`, `psql`, `pg_dump`): PostgreSQL 15's or newer, then whatever `PATH` has.
pub fn find_client(name: &str) -> Option<PathBuf> {
    let mut places: Vec<PathBuf> = vec!["/usr/lib/postgresql/15/bin".into()];
    places.extend(project_directories().map(|place| place.join(".deps/postgresql-client/18/bin")));
    places.extend(std::env::var_os("PATH").iter().flat_map(std::env::split_paths));
    places.into_iter().map(|place| place.join(name)).find(|path| path.is_file())
}

/// Where `.deps` may be: here, above the program, where it was built.
fn project_directories() -> impl Iterator<Item = PathBuf> {
    let program = std::env::current_exe().ok();
    let above = program.iter().flat_map(|path| path.ancestors().skip(1).map(Path::to_owned)).collect::<Vec<_>>();
    std::env::current_dir().ok().into_iter().chain(above).chain([PathBuf::from(env!("CARGO_MANIFEST_DIR"))])
}

/// Root: the user that owns the cluster. Others: `None`, they own it themselves.
pub(super) fn unprivileged_user() -> Result<Option<(u32, u32)>, ServerError> {
    // The kernel makes /proc/self belong to the effective user.
    if fs::metadata("/proc/self").map_err(io_error("find out who we are"))?.uid() != 0 {
        return Ok(None);
    }
    let passwd = fs::read_to_string("/etc/passwd").map_err(io_error("read /etc/passwd"))?;
    ["postgres", "nobody"]
        .into_iter()
        .find_map(|name| {
            let line = passwd.lines().find(|line| line.split(':').next() == Some(name))?;
            let mut fields = line.split(':').skip(2);
            Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
        })
        .map(Some)
        .ok_or_else(|| io_error("find an unprivileged user for the servers")(io::Error::other("/etc/passwd has no postgres and no nobody")))
}

/// A new directory with an unguessable name, reachable by the owner alone.
pub(super) fn create_directory(owner: Option<(u32, u32)>) -> Result<PathBuf, ServerError> {
    // Root's TMPDIR is often a place that nobody else may enter.
    let base = if owner.is_some() { PathBuf::from("/tmp") } else { std::env::temp_dir() };
    let directory = base.join(format!("understudy-{:016x}", fastrand::u64(..)));
    fs::create_dir(&directory).map_err(io_error(format!("create {}", directory.display())))?;
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o700)).map_err(io_error("protect the server's directory"))?;
    give_to(&directory, owner)?;
    Ok(directory)
}

pub(super) fn give_to(path: &Path, owner: Option<(u32, u32)>) -> Result<(), ServerError> {
    match owner {
        Some((uid, gid)) => chown(path, Some(uid), Some(gid)).map_err(io_error(format!("give {} to the server's user", path.display()))),
        None => Ok(()),
    }
}

pub(super) fn random_secret() -> Secret {
    Secret::new(format!("{:032x}", fastrand::u128(..)))
}

/// A port that nobody listens on right now.
///
/// # Errors
/// The system's.
pub fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

/// Processes whose parent is `parent` (field 4 of /proc/PID/stat, proc(5)).
pub(super) fn children_of(parent: u32) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| {
            let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
            // The name in parentheses may hold spaces: count from behind it.
            stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse::<u32>().ok()) == Some(parent)
        })
        .collect()
}

/// The shell's own `kill`: no program to install, no unsafe code. A process that has gone is no error.
pub(super) fn signal(name: &str, pids: &[u32]) -> io::Result<()> {
    let script = r#"name=$1; shift; for pid in "$@"; do kill -s "$name" "$pid" 2> /dev/null; done; exit 0"#;
    let status = Command::new("/bin/sh").args(["-c", script, "signal", name]).args(pids.iter().map(u32::to_string)).status()?;
    if status.success() { Ok(()) } else { Err(io::Error::other(format!("kill: {status}"))) }
}

pub(super) fn wait_for_exit(child: &mut Child) -> io::Result<()> {
    let deadline = Instant::now() + SERVER_WAIT_MAX;
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// The last lines of a text.
pub(crate) fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines.get(lines.len().saturating_sub(8)..).unwrap_or_default().join("\n")
}
