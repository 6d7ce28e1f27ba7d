//! `[[database.shadow.ignore]]`.

use super::{
    super::{IgnoreRule, raw::RawIgnore},
    Refusal, duration, refuse,
};
use std::time::Duration;
use toml::Spanned;

/// The names of `traffic::answer::Difference`.
const KINDS: [&str; 6] = ["sqlstate", "columns", "rows", "values", "order", "tag"];

pub(super) fn rules(raw: Vec<RawIgnore>) -> Result<Vec<IgnoreRule>, Refusal> {
    let mut rules: Vec<IgnoreRule> = Vec::new();
    for rule in raw {
        let name = rule.name.get_ref().clone();
        if name.trim().is_empty() || rules.iter().any(|known| known.name == name) {
            return refuse(rule.name.span(), "each rule of a shadow needs a name of its own: what it ignores is counted by it");
        }
        if rule.columns.is_empty() && rule.differences.is_empty() && rule.floats.is_none() && rule.times.is_none() {
            return refuse(rule.name.span(), "the rule ignores nothing: give columns, differences, floats or times");
        }
        if let Some(kind) = rule.differences.iter().find(|kind| !KINDS.contains(&kind.get_ref().as_str())) {
            return refuse(kind.span(), format!("differences are {}", KINDS.join(", ")));
        }
        if let Some(floats) = rule.floats.as_ref().filter(|floats| !(0.0..1.0).contains(floats.get_ref())) {
            return refuse(floats.span(), "floats is a relative error, from 0.0 to below 1.0, such as 1e-6");
        }
        let fingerprint = match &rule.fingerprint {
            None => None,
            Some(text) => match u64::from_str_radix(text.get_ref(), 16) {
                Ok(number) => Some(number),
                Err(_) => return refuse(text.span(), "fingerprint is 16 hexadecimal digits, as SHOW MISMATCHES writes them"),
            },
        };
        rules.push(IgnoreRule {
            name,
            fingerprint,
            tables: rule.tables,
            columns: rule.columns,
            differences: rule.differences.into_iter().map(Spanned::into_inner).collect(),
            floats: rule.floats.map(Spanned::into_inner),
            times: rule.times.map(|times| duration(Some(times), "times", Duration::ZERO)).transpose()?,
        });
    }
    Ok(rules)
}
