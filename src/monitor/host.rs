//! What the host says of a server that runs on it: PostgreSQL does not tell its processor time.
//!
//! Only where the server's processes are ours to see (same host, same process namespace); anything else gives nothing.
//! Source: Linux manual, proc(5), `/proc/<pid>/stat`.

use std::fs;

/// Ticks per second of `/proc/<pid>/stat`: `USER_HZ`, 100 on every Linux that Rust runs on.
const TICKS_PER_S: f64 = 100.0;

struct Process {
    parent: i32,
    /// Ticks, its own and those of children that have ended.
    own: u64,
    ended_children: u64,
}

fn process(pid: i32) -> Option<Process> {
    parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The name, in brackets, may hold anything: fields are counted from the last bracket.
fn parse(stat: &str) -> Option<Process> {
    let (before, after) = stat.rsplit_once(')')?;
    if before.split_once('(')?.1 != "postgres" {
        return None;
    }
    let fields: Vec<&str> = after.split_ascii_whitespace().collect();
    let ticks = |field: usize| fields.get(field).and_then(|text| text.parse::<u64>().ok());
    Some(Process { parent: fields.get(1)?.parse().ok()?, own: ticks(11)? + ticks(12)?, ended_children: ticks(13)? + ticks(14)? })
}

/// Processor seconds of the server that one of its backends belongs to, since it started. `database`: the backend's, which its
/// process title names, so that a process of another namespace with the same number is not taken for it.
pub(super) fn cpu_seconds(backend: i32, database: &str) -> Option<f64> {
    let title = fs::read(format!("/proc/{backend}/cmdline")).ok()?;
    let title = String::from_utf8_lossy(&title);
    if !(title.starts_with("postgres: ") && title.contains(database)) {
        return None;
    }
    let server = process(backend)?.parent;
    let head = process(server)?;
    let mut ticks = head.own + head.ended_children;
    for entry in fs::read_dir("/proc").ok()?.flatten() {
        if let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok())
            && let Some(child) = process(pid).filter(|process| process.parent == server)
        {
            ticks += child.own;
        }
    }
    Some(ticks as f64 / TICKS_PER_S)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_brackets_do_not_shift_the_fields() {
        let stat = "42 (postgres) S 7 42 42 0 -1 4194560 1 2 3 4 150 50 20 10 20 0 1 0";
        let found = parse(stat).unwrap();
        assert_eq!((found.parent, found.own, found.ended_children), (7, 200, 30));
        assert!(parse(&stat.replace("postgres", "a) S 1 (b")).is_none());
        assert!(parse("42 (postgres").is_none() && parse("42 (postgres) S").is_none());
        assert_eq!(cpu_seconds(1, "shop"), None, "the first process is no server");
    }
}
