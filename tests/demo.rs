//! The story as a whole, and the three ways to break it, with the real program on real servers.

use serde_json::Value;
use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// A quick run takes about a minute on a free machine; a busy one gets more.
const RUN_MAX: Duration = Duration::from_secs(300);

struct Outcome {
    status: Option<i32>,
    output: String,
    report: Value,
    directory: PathBuf,
}

/// Runs `understudy demo --quick` with `arguments` in a directory of its own.
fn demo(name: &str, arguments: &[&str]) -> Outcome {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("demo").join(name);
    let _ = std::fs::remove_dir_all(&directory);
    std::fs::create_dir_all(&directory).unwrap();
    let report = directory.join("report.json");
    let output = std::fs::File::create(directory.join("output.txt")).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_understudy"))
        .args(["demo", "--quick", "--report"])
        .arg(&report)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(output.try_clone().unwrap())
        .stderr(output)
        .spawn()
        .unwrap();
    let deadline = Instant::now() + RUN_MAX;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            break child.wait().unwrap();
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    let output = std::fs::read_to_string(directory.join("output.txt")).unwrap();
    let report = std::fs::read_to_string(&report).ok().and_then(|text| serde_json::from_str(&text).ok()).unwrap_or(Value::Null);
    Outcome { status: status.code(), output, report, directory }
}

impl Outcome {
    /// A figure of the report.
    fn number(&self, pointer: &str) -> f64 {
        self.report.pointer(pointer).and_then(Value::as_f64).unwrap_or_else(|| panic!("{pointer} is not a number\n{}", self.context()))
    }

    fn context(&self) -> String {
        let log = std::fs::read_to_string(self.directory.join("proxy.log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        format!("{}\n--- the end of the proxy's log\n{}", self.output, lines[lines.len().saturating_sub(30)..].join("\n"))
    }

    fn expect_status(&self, status: i32) {
        assert_eq!(self.status, Some(status), "exit status\n{}", self.context());
    }
}

const ZEROS: [&str; 11] = [
    "/clients/failed_statements",
    "/clients/dropped_connections",
    "/compare/different",
    "/rehearsal/errors",
    "/rehearsal/tag_mismatches",
    "/schema/rejected",
    "/served/stale",
    "/revert/client_errors",
    "/cutover/failed_statements",
    "/rollback/failed_statements",
    "/checker/missing",
];
const POSITIVE: [&str; 13] = [
    "/clients/transactions",
    "/copy/rows",
    "/copy/bytes",
    "/feed/changes",
    "/rehearsal/transactions",
    "/compare/sampled",
    "/compare/same",
    "/latency/source/count",
    "/latency/shadow/count",
    "/schema/proposals",
    "/served/reads",
    "/cutover/pause_ms",
    "/rollback/pause_ms",
];

/// One after the other: each run has two servers, a proxy and a crowd of clients, and is measured.
#[test]
fn the_demo_and_the_three_ways_to_break_it() {
    let plain = demo("plain", &[]);
    plain.expect_status(0);
    assert_eq!(plain.report["verdict"], "pass", "{}", plain.context());
    for pointer in ZEROS {
        assert_eq!(plain.number(pointer), 0.0, "{pointer}\n{}", plain.context());
    }
    for pointer in POSITIVE {
        assert!(plain.number(pointer) > 0.0, "{pointer}\n{}", plain.context());
    }
    let validations = plain.report["validation"].as_array().unwrap();
    assert_eq!(validations.len(), 3);
    for validation in validations {
        assert_eq!(validation["differences"], 0, "{validation}");
        assert!(validation["rows"].as_u64() > Some(100_000) && validation["tables"].as_u64() > Some(8), "{validation}");
    }
    let reverts = plain.report["reverts"].as_array().unwrap();
    assert_eq!(reverts.len(), 2, "a slow shadow and a failing one");
    for revert in reverts {
        assert_eq!(revert["triggered"], true, "{revert}");
    }

    let corrupt = demo("corrupt-row", &["--break", "corrupt-row"]);
    corrupt.expect_status(1);
    assert_eq!(corrupt.report["verdict"], "fail");
    let failures = corrupt.report["failures"].to_string();
    for part in ["customer", "name", "81162e1e-f3d9-3f96-b36d-3712ca52bca5"] {
        assert!(failures.contains(part), "{part} is not named in {failures}\n{}", corrupt.context());
    }
    assert_eq!(corrupt.number("/clients/failed_statements"), 0.0);

    let lost = demo("lose-change", &["--break", "lose-change"]);
    lost.expect_status(1);
    assert_eq!(lost.report["verdict"], "fail");
    assert!(lost.report["failures"].to_string().contains("VERIFY"), "{}", lost.context());
    assert_eq!(lost.number("/clients/failed_statements"), 0.0);

    let down = demo("shadow-down", &["--break", "shadow-down"]);
    down.expect_status(0);
    assert_eq!(down.report["verdict"], "pass", "{}", down.context());
    assert_eq!(down.report["revert"]["triggered"], true);
    for pointer in ZEROS {
        assert_eq!(down.number(pointer), 0.0, "{pointer}\n{}", down.context());
    }
}

#[test]
fn the_settings_for_docker_are_accepted() {
    let text = include_str!("../docker/proxy.toml");
    let config = understudy::config::parse(text, "docker/proxy.toml", &|_| Some("secret".into())).unwrap();
    assert_eq!(config.databases[0].shadows[0].name, "pg18");
    assert!(config.proxy.console.is_some());
}
