//! Findings for people and for scripts.

use super::{Finding, Severity};
use std::fmt::Write;

/// As text (`colour`: with terminal colours), or as one JSON object `{"blockers", "warnings", "infos", "findings"}`.
pub fn render(findings: &[Finding], json: bool, colour: bool) -> String {
    let count = |severity| findings.iter().filter(|finding| finding.severity == severity).count();
    let (blockers, warnings, infos) = (count(Severity::Blocker), count(Severity::Warning), count(Severity::Info));
    if json {
        let value = serde_json::json!({"blockers": blockers, "warnings": warnings, "infos": infos, "findings": findings});
        return format!("{value:#}\n");
    }
    let paint = |code: &str, text: &str| if colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() };
    let mut text = String::new();
    let mut place = None;
    for finding in findings {
        let here = (&finding.database, &finding.shadow);
        if place != Some(here) {
            place = Some(here);
            let title = match finding.shadow.as_str() {
                "" => format!("{}: source", finding.database),
                shadow => format!("{}: shadow {shadow}", finding.database),
            };
            let _ = writeln!(text, "{}", paint("1", &title));
        }
        let word = match finding.severity {
            Severity::Blocker => paint("31;1", "BLOCKER"),
            Severity::Warning => paint("33", "warning"),
            Severity::Info => paint("2", "info   "),
        };
        let _ = writeln!(text, "  {word}  {}: {}", finding.subject, finding.message);
        if !finding.remedy.is_empty() {
            let _ = writeln!(text, "           -> {}", finding.remedy);
        }
    }
    let verdict = match blockers {
        0 => paint("32", "ready"),
        1 => paint("31;1", "not ready: 1 blocker"),
        n => paint("31;1", &format!("not ready: {n} blockers")),
    };
    let _ = writeln!(text, "{verdict}, {warnings} warnings, {infos} notes");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(severity: Severity, shadow: &str) -> Finding {
        let (database, subject) = ("shop".to_owned(), "wal_level".to_owned());
        Finding { severity, database, shadow: shadow.into(), subject, message: "is replica".into(), remedy: "set it".into() }
    }

    #[test]
    fn text_groups_by_place_and_json_counts() {
        let findings = [finding(Severity::Blocker, ""), finding(Severity::Info, ""), finding(Severity::Warning, "pg18")];
        let expected = "shop: source\n  BLOCKER  wal_level: is replica\n           -> set it\n  info     wal_level: is replica\n           \
                        -> set it\nshop: shadow pg18\n  warning  wal_level: is replica\n           -> set it\n\
                        not ready: 1 blocker, 1 warnings, 1 notes\n";
        assert_eq!(render(&findings, false, false), expected);
        assert!(render(&findings, false, true).contains("\x1b[31;1mBLOCKER\x1b[0m"));
        let json: serde_json::Value = serde_json::from_str(&render(&findings, true, true)).unwrap();
        assert_eq!((json["blockers"].as_u64(), json["findings"][2]["shadow"].as_str()), (Some(1), Some("pg18")));
        assert_eq!(render(&[], false, false), "ready, 0 warnings, 0 notes\n");
    }
}
