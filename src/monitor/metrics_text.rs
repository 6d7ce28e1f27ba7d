//! The Prometheus text exposition format, version 0.0.4.
//! Source: <https://prometheus.io/docs/instrumenting/exposition_formats/>.

use crate::console::Metric;
use std::fmt::Write;

/// All samples as text: samples of one name stand together under one HELP and one TYPE line, names in order of first use.
pub fn metrics_text(metrics: &[Metric]) -> String {
    let mut groups: Vec<(&str, Vec<&Metric>)> = Vec::new();
    let mut places = std::collections::HashMap::new();
    for metric in metrics {
        let place = *places.entry(metric.name).or_insert_with(|| {
            groups.push((metric.name, Vec::new()));
            groups.len() - 1
        });
        if let Some((_, samples)) = groups.get_mut(place) {
            samples.push(metric);
        }
    }
    let mut text = String::new();
    for (name, samples) in groups {
        if let Some(first) = samples.first() {
            let help = first.help.replace('\\', "\\\\").replace('\n', "\\n");
            // writing to a String cannot fail
            let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {}\n", first.kind);
        }
        for sample in samples {
            text.push_str(name);
            write_labels(&mut text, &sample.labels);
            let _ = writeln!(text, " {}", number(sample.value));
        }
    }
    text
}

fn write_labels(text: &mut String, labels: &[(&'static str, String)]) {
    for (index, (name, value)) in labels.iter().enumerate() {
        let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let _ = write!(text, "{}{name}=\"{value}\"", if index == 0 { '{' } else { ',' });
    }
    if !labels.is_empty() {
        text.push('}');
    }
}

fn number(value: f64) -> String {
    if value.is_nan() {
        "NaN".into()
    } else if value.is_infinite() {
        if value > 0.0 { "+Inf".into() } else { "-Inf".into() }
    } else {
        value.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metric(name: &'static str, kind: &'static str, labels: Vec<(&'static str, String)>, value: f64) -> Metric {
        Metric { name, help: "One \\ line.\nReally.", kind, labels, value }
    }

    #[test]
    fn names_are_grouped_and_labels_escaped() {
        let text = metrics_text(&[
            metric("understudy_a_total", "counter", vec![("database", "sh\"op".into()), ("shadow", "a\\b\nc".into())], 3.0),
            metric("understudy_b", "gauge", vec![], 0.25),
            metric("understudy_a_total", "counter", vec![("database", "x".into())], 1e18),
        ]);
        assert_eq!(
            text,
            "# HELP understudy_a_total One \\\\ line.\\nReally.\n\
             # TYPE understudy_a_total counter\n\
             understudy_a_total{database=\"sh\\\"op\",shadow=\"a\\\\b\\nc\"} 3\n\
             understudy_a_total{database=\"x\"} 1000000000000000000\n\
             # HELP understudy_b One \\\\ line.\\nReally.\n\
             # TYPE understudy_b gauge\n\
             understudy_b 0.25\n"
        );
    }

    #[test]
    fn special_numbers() {
        for (value, expected) in [(f64::NAN, "NaN"), (f64::INFINITY, "+Inf"), (f64::NEG_INFINITY, "-Inf"), (-0.5, "-0.5"), (0.0, "0")] {
            assert_eq!(number(value), expected);
        }
    }
}
