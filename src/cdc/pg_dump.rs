//! Finding a `pg_dump` that is new enough: it reads servers of its own major version and older ones.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};
use tokio::process::Command;

/// Longest time that `pg_dump --version` may take: a hanging wrapper script must not hang the check.
const VERSION_TIMEOUT: Duration = Duration::from_secs(5);
/// How deep `.deps` is searched for a folder named `bin`.
const DEPS_DEPTH_MAX: usize = 5;

/// The oldest `pg_dump` whose major version is at least `major`. Looks at `$UNDERSTUDY_PG_DUMP`, `PATH`,
/// `/usr/lib/postgresql/*/bin` and `.deps/**/bin`.
///
/// # Errors
/// A sentence that names what was found and what to install.
pub async fn find(major: u32) -> Result<PathBuf, String> {
    let named = std::env::var_os("UNDERSTUDY_PG_DUMP").map(PathBuf::from);
    if let Some(path) = &named {
        // Said by a person: used, or refused, but not passed over.
        return match version(path).await {
            Some(found) if found >= major => Ok(path.clone()),
            Some(found) => Err(format!("UNDERSTUDY_PG_DUMP ({}) is version {found}, the source needs {major} or newer", path.display())),
            None => Err(format!("UNDERSTUDY_PG_DUMP ({}) does not run", path.display())),
        };
    }
    let (mut best, mut seen): (Option<(u32, PathBuf)>, Vec<String>) = (None, Vec::new());
    for path in candidates() {
        let Some(found) = version(&path).await else { continue };
        seen.push(format!("{} (version {found})", path.display()));
        if found >= major && best.as_ref().is_none_or(|(known, _)| found < *known) {
            best = Some((found, path));
        }
    }
    best.map(|(_, path)| path).ok_or_else(|| {
        let seen = if seen.is_empty() { "none was found".to_owned() } else { format!("found only {}", seen.join(", ")) };
        format!("no pg_dump of version {major} or newer: {seen}")
    })
}

fn candidates() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect()).unwrap_or_default();
    folders.extend(children(Path::new("/usr/lib/postgresql")).into_iter().map(|folder| folder.join("bin")));
    bin_folders(Path::new(".deps"), DEPS_DEPTH_MAX, &mut folders);
    folders.into_iter().map(|folder| folder.join("pg_dump")).filter(|path| path.is_file()).collect()
}

fn bin_folders(folder: &Path, depth: usize, found: &mut Vec<PathBuf>) {
    for child in children(folder) {
        if child.ends_with("bin") {
            found.push(child);
        } else if depth > 1 {
            bin_folders(&child, depth - 1, found);
        }
    }
}

/// Folders in a folder, by name; symbolic links below it are not followed, so that there is an end.
fn children(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut list: Vec<PathBuf> =
        entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect();
    list.sort();
    list
}

async fn version(path: &Path) -> Option<u32> {
    let output = Command::new(path).arg("--version").stdin(Stdio::null()).kill_on_drop(true).output();
    let output = tokio::time::timeout(VERSION_TIMEOUT, output).await.ok()?.ok()?;
    major(&String::from_utf8_lossy(&output.stdout))
}

/// From `pg_dump (PostgreSQL) 15.14 (Debian …)`.
fn major(output: &str) -> Option<u32> {
    let version = output.split_once("(PostgreSQL)")?.1.trim_start();
    let end = version.find(|c: char| !c.is_ascii_digit()).unwrap_or(version.len());
    version.get(..end)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_versions() {
        for (output, expected) in [
            ("pg_dump (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)\n", Some(15)),
            ("pg_dump (PostgreSQL) 18beta1", Some(18)),
            ("pg_dump (PostgreSQL) ", None),
            ("something else", None),
        ] {
            assert_eq!(major(output), expected, "{output}");
        }
    }
}
