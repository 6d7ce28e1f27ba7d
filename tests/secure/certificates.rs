//! An authority of our own and what it has signed, made by the `openssl` program.
#![allow(dead_code)] // each of the tests that share it uses a part

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Files of one authority; dropping it removes them.
pub struct Authority {
    folder: PathBuf,
}

/// Certificate and key.
#[derive(Clone)]
pub struct Pair {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

fn openssl(folder: &Path, arguments: &[&str]) {
    let output = Command::new("openssl").args(arguments).current_dir(folder).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "openssl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

const EC: [&str; 5] = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];

impl Authority {
    pub fn new() -> Self {
        let folder = PathBuf::from(format!("/tmp/understudy-certificates-{:016x}", fastrand::u64(..)));
        fs::create_dir(&folder).unwrap();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
        let mut arguments = vec!["req", "-x509", "-keyout", "ca.key", "-out", "ca.crt", "-days", "2", "-subj", "/CN=test authority"];
        arguments.extend(EC);
        openssl(&folder, &arguments);
        Authority { folder }
    }

    pub fn certificate(&self) -> PathBuf {
        self.folder.join("ca.crt")
    }

    /// A certificate with this common name, for these hosts (`DNS:x`, `IP:y`; none: without the extension).
    pub fn issue(&self, name: &str, common_name: &str, hosts: &str) -> Pair {
        let (key, request, certificate) = (format!("{name}.key"), format!("{name}.csr"), format!("{name}.crt"));
        let subject = format!("/CN={common_name}");
        let mut arguments = vec!["req", "-keyout", &key, "-out", &request, "-subj", &subject];
        arguments.extend(EC);
        openssl(&self.folder, &arguments);
        let names = if hosts.is_empty() { String::new() } else { format!("subjectAltName={hosts}\n") };
        fs::write(self.folder.join("extensions"), format!("basicConstraints=CA:FALSE\n{names}")).unwrap();
        let mut arguments = vec!["x509", "-req", "-in", &request, "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial"];
        arguments.extend(["-days", "2", "-out", &certificate, "-extfile", "extensions"]);
        openssl(&self.folder, &arguments);
        let pair = Pair { certificate: self.folder.join(certificate), key: self.folder.join(key) };
        protect(&pair.key);
        pair
    }

    /// Another certificate takes the place of this one, under its names.
    pub fn replace(&self, old: &Pair, new: &Pair) {
        fs::copy(&new.key, &old.key).unwrap();
        fs::copy(&new.certificate, &old.certificate).unwrap();
    }
}

/// PostgreSQL wants keys to be its own, or root's with its group.
fn protect(key: &Path) {
    let mode = if fs::metadata("/proc/self").unwrap().uid() == 0 {
        let passwd = fs::read_to_string("/etc/passwd").unwrap();
        let group = ["postgres", "nobody"].into_iter().find_map(|name| {
            let line = passwd.lines().find(|line| line.split(':').next() == Some(name))?;
            line.split(':').nth(3)?.parse().ok()
        });
        chown(key, Some(0), group).unwrap();
        0o640
    } else {
        0o600
    };
    fs::set_permissions(key, fs::Permissions::from_mode(mode)).unwrap();
}

impl Drop for Authority {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}
