//! A server that trusts everybody on loopback, so that log-ins are the same bytes each time.
#![allow(dead_code)]

use crate::support::{Options, Server};
use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf};

/// The server and the folder of its host rules.
pub struct Trusting {
    pub server: Server,
    folder: PathBuf,
}

impl Trusting {
    /// `more`: settings.
    pub async fn start(major: u32, more: &[(&str, &str)]) -> Trusting {
        let name = format!("understudy-hba-{}-{:x}", std::process::id(), fastrand::u64(..));
        let folder = std::env::temp_dir().join(name);
        fs::create_dir(&folder).unwrap();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
        let rules = folder.join("pg_hba.conf");
        fs::write(&rules, "host all all 127.0.0.1/32 trust\nhost replication all 127.0.0.1/32 trust\n").unwrap();
        let mut options = Options::default().set("hba_file", rules.to_str().unwrap()).set("autovacuum", "off");
        for (name, value) in more {
            options = options.set(name, value);
        }
        Trusting { server: Server::start(major, options).await.unwrap(), folder }
    }
}

impl Drop for Trusting {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}
