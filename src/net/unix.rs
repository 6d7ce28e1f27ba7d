//! The file of a listening Unix socket: made where nobody answers, never taken from a living process, removed by its last owner.
//!
//! Whether somebody answers is found out by connecting, not by a lock file with a process id in it as PostgreSQL's
//! (`CreateLockFile`, `src/backend/utils/init/miscinit.c`): a process id says nothing across containers that share the folder.

use socket2::{Domain, SockAddr, Socket, Type};
use std::{
    fs::{self, File},
    io,
    os::unix::{
        fs::{FileTypeExt, MetadataExt, PermissionsExt},
        net::UnixListener,
    },
    path::{Path, PathBuf},
    time::Duration,
};

/// How often, a moment apart, another process that is looking at the folder is waited for.
const TURNS_MAX: u32 = 40;
const TURN: Duration = Duration::from_millis(50);

/// A socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum UnixError {
    /// Somebody answers there.
    #[error(
        "another process listens on the Unix socket {path}: stop it, or change `unix_socket_dir` or the port of `listen`",
        path = .path.display()
    )]
    Live {
        /// The file.
        path: PathBuf,
    },
    /// It is not ours to remove.
    #[error("{path} exists and is not a socket: move it away, or change `unix_socket_dir`", path = .path.display())]
    NotASocket {
        /// The file.
        path: PathBuf,
    },
    /// The operating system said no.
    #[error(
        "cannot listen on the Unix socket {path}: {source}. Its folder must exist and be writable by this user; or change `unix_socket_dir`",
        path = .path.display()
    )]
    Io {
        /// The file.
        path: PathBuf,
        /// From the operating system.
        source: io::Error,
    },
}

/// Where libpq looks for a server on this port, given the folder as host.
pub fn socket_path(folder: &Path, port: u16) -> PathBuf {
    folder.join(format!(".s.PGSQL.{port}"))
}

/// Listens on `path`. A file that a dead process has left is replaced.
///
/// # Errors
/// [`UnixError`]
pub fn bind(path: &Path, mode: u32, backlog: i32) -> Result<(UnixListener, SocketFile), UnixError> {
    let failed = |source| UnixError::Io { path: path.to_owned(), source };
    // Two that start at the same moment must not each remove the file of the other. Whoever holds the lock longer than that means
    // mischief or hangs: then it is as without.
    let folder = File::open(path.parent().unwrap_or(Path::new("/"))).map_err(failed)?;
    for _ in 0..TURNS_MAX {
        match folder.try_lock() {
            Err(fs::TryLockError::WouldBlock) => std::thread::sleep(TURN),
            Ok(()) | Err(fs::TryLockError::Error(_)) => break,
        }
    }
    remove_stale(path)?;
    let address = SockAddr::unix(path).map_err(failed)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(failed)?;
    socket.bind(&address).map_err(failed)?;
    let file = SocketFile::of(path).map_err(failed)?;
    // before anybody can connect
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(failed)?;
    socket.listen(backlog).map_err(failed)?;
    Ok((UnixListener::from(std::os::fd::OwnedFd::from(socket)), file))
}

/// Makes room, unless somebody answers.
fn remove_stale(path: &Path) -> Result<(), UnixError> {
    let failed = |source| UnixError::Io { path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(found) if !found.file_type().is_socket() => return Err(UnixError::NotASocket { path: path.to_owned() }),
        Ok(_) => {}
    }
    let probe = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(failed)?;
    // a full queue is an answer, too, and not one to wait for
    probe.set_nonblocking(true).map_err(failed)?;
    match probe.connect(&SockAddr::unix(path).map_err(failed)?) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            tracing::info!(path = %path.display(), "replacing the Unix socket that a process which is gone has left");
            fs::remove_file(path).map_err(failed)
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(failed(error)),
        Ok(()) | Err(_) => Err(UnixError::Live { path: path.to_owned() }),
    }
}

/// The file of a listening socket; dropping it removes the file, if it is still the same one.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode; `None`: not ours any more.
    made: Option<(u64, u64)>,
}

impl SocketFile {
    /// Of a socket that another process has handed over.
    ///
    /// # Errors
    /// From the operating system.
    pub fn adopt(path: &Path, mode: u32) -> io::Result<Self> {
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        Self::of(path)
    }

    fn of(path: &Path) -> io::Result<Self> {
        let found = fs::symlink_metadata(path)?;
        Ok(SocketFile { path: path.to_owned(), made: Some((found.dev(), found.ino())) })
    }

    /// Leaves the file to somebody else.
    pub fn keep(mut self) {
        self.made = None;
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let found = fs::symlink_metadata(&self.path).ok().map(|found| (found.dev(), found.ino()));
        if self.made.is_some() && found == self.made {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_file_is_replaced_and_no_other() {
        let folder = std::env::temp_dir().join(format!("understudy-socket-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        let path = socket_path(&folder, 6432);
        assert!(path.ends_with(".s.PGSQL.6432"));

        let (listener, file) = bind(&path, 0o750, 8).unwrap();
        assert_eq!(fs::symlink_metadata(&path).unwrap().mode() & 0o777, 0o750);
        assert!(matches!(bind(&path, 0o777, 8), Err(UnixError::Live { .. })));
        file.keep();
        drop(listener);
        assert!(path.exists(), "as after a crash");
        let (listener, file) = bind(&path, 0o777, 8).unwrap();
        drop((listener, file));
        assert!(!path.exists());

        let (_listener, file) = bind(&path, 0o777, 8).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "somebody's").unwrap();
        drop(file);
        assert!(path.exists(), "another file is left alone");
        assert!(matches!(bind(&path, 0o777, 8), Err(UnixError::NotASocket { .. })));
        assert!(matches!(bind(&folder.join("none/s"), 0o777, 8), Err(UnixError::Io { .. })));
        fs::remove_dir_all(&folder).unwrap();
    }
}
