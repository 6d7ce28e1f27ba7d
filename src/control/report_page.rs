//! A readiness report as a page: no script, nothing from another host, every text escaped.

use super::{readiness::Readiness, show::utc};
use std::fmt::Write;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#1c2430;background:#fff}\
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}.go{color:#0a6b3d}.no{color:#b3261e}table{border-collapse:collapse;width:100%}\
td,th{text-align:left;padding:.3rem .6rem;border-bottom:1px solid #dde3ea;vertical-align:top}td.n{text-align:right;white-space:nowrap}\
code{font:12px ui-monospace,monospace;word-break:break-word}small{color:#5b6775}\
@media(prefers-color-scheme:dark){body{background:#14181e;color:#e3e8ee}td,th{border-color:#2b333d}.go{color:#5fd39b}.no{color:#ff8a80}}";

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// The page, with `__NONCE__` where the Content-Security-Policy's nonce belongs.
pub(super) fn page(report: &Readiness) -> String {
    let mut html = String::new();
    // writing to a String cannot fail
    let class = if report.go { "go" } else { "no" };
    let title = format!("{}: {} to {}", report.verdict(), escaped(&report.database), escaped(&report.shadow));
    let _ = write!(
        html,
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>{title}</title><style nonce=\"__NONCE__\">{STYLE}</style></head><body>\
         <h1>Readiness: <span class=\"{class}\">{}</span></h1><p>{} → {}, {} · {} % of the reads for {} s</p><p>{}</p>",
        report.verdict(),
        escaped(&report.database),
        escaped(&report.shadow),
        utc(report.at_ms),
        report.percent,
        report.seconds,
        escaped(&report.sentence())
    );
    for (heading, list) in [("Blockers", &report.blockers), ("Remarks", &report.remarks)] {
        if !list.is_empty() {
            let _ = write!(html, "<h2>{heading}</h2><ul>");
            for text in list {
                let _ = write!(html, "<li>{}</li>", escaped(text));
            }
            html.push_str("</ul>");
        }
    }
    html.push_str("<h2>Seen</h2><table>");
    for (section, what, value) in report.lines().iter().filter(|line| !matches!(line.0, "verdict" | "blocker" | "remark" | "statement")) {
        let _ = write!(html, "<tr><td>{section}</td><td>{}</td><td class=\"n\">{}</td></tr>", escaped(what), escaped(value));
    }
    html.push_str(
        "</table><h2>Statements</h2><table><tr><th>statement</th><th>verdict</th><th>runs</th><th>source p50, p99 ms</th>\
         <th>shadow p50, p99 ms</th><th>ratio (95 %)</th></tr>",
    );
    for statement in &report.statements {
        let ms = |micros: u64| format!("{:.2}", micros as f64 / 1000.0);
        let ratio =
            statement.comparison.map_or_else(String::new, |found| format!("{:.2} ({:.2} to {:.2})", found.ratio, found.low, found.high));
        let why = report.findings.get(&format!("{:016x}", statement.fingerprint));
        let _ = write!(
            html,
            "<tr><td><code>{}</code>{}</td><td>{}</td><td class=\"n\">{}</td><td class=\"n\">{}, {}</td><td class=\"n\">{}, {}</td><td class=\"n\">{ratio}</td></tr>",
            escaped(&statement.text),
            why.map(|why| format!("<br><small>{}</small>", escaped(why))).unwrap_or_default(),
            statement.verdict(),
            statement.shadow.count,
            ms(statement.source.p50_us),
            ms(statement.source.p99_us),
            ms(statement.shadow.p50_us),
            ms(statement.shadow.p99_us),
        );
    }
    html.push_str("</table></body></html>\n");
    html
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_escaped() {
        let report = Readiness { shadow: "<b>".into(), blockers: vec!["a < b & \"c\"".into()], ..Readiness::default() };
        let page = page(&report);
        assert!(page.contains("&lt;b&gt;") && page.contains("a &lt; b &amp; &quot;c&quot;") && page.contains("no-go"));
        assert!(!page.contains("<b>") && !page.contains("<script"));
    }
}
