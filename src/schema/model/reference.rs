//! T5: which table does a column refer to, where no foreign key says so? Name rules, and what the last column of that name referred to.

use super::{
    similarity::{jaro_winkler, trigram},
    t1::tokens,
};

/// `categories`, `category` and `categorys` are one word.
fn singular(word: &str) -> String {
    for (ending, replacement) in [("ies", "y"), ("sses", "ss"), ("xes", "x"), ("ses", "se")] {
        if let Some(stem) = word.strip_suffix(ending) {
            return format!("{stem}{replacement}");
        }
    }
    match word.strip_suffix('s') {
        Some(stem) if !word.ends_with("ss") && stem.len() > 2 => stem.to_owned(),
        _ => word.to_owned(),
    }
}

/// Words that say that a column is a key, not what it refers to.
const KEY_WORDS: [&str; 7] = ["id", "uuid", "fk", "ref", "key", "pk", "ids"];
/// Words for people, and the tables where people are.
const PEOPLE: [&str; 12] =
    ["owner", "author", "creator", "user", "by", "assignee", "actor", "sender", "editor", "inviter", "recipient", "member"];

fn score(column: &[String], own: &[String], candidate: &str) -> f64 {
    let table: Vec<String> = tokens(candidate).iter().map(|word| singular(word)).collect();
    let joined = table.join("_");
    let name = column.join("_");
    if table.is_empty() || column.is_empty() {
        return 0.0;
    }
    let mut score = 0.0;
    if joined == name {
        score += 10.0;
    } else if column.ends_with(&table) {
        score += 6.0 + table.len() as f64 * 0.5;
    } else if table.ends_with(column) {
        // `user_id` in `forum_post` refers to `forum_user`: the schema's own prefix
        score += 5.0 + if table.len() > column.len() && own.first() == table.first() { 1.5 } else { 0.0 };
    } else if table.iter().any(|word| column.contains(word) && word.len() > 2) {
        score += 2.0;
    }
    if column.iter().any(|word| PEOPLE.contains(&word.as_str()))
        && table.last().is_some_and(|word| matches!(word.as_str(), "user" | "account" | "person" | "userinfo"))
    {
        score += 2.5;
    }
    score + trigram(&joined, &name) + 0.5 * jaro_winkler(&joined, &name) - 0.02 * table.len() as f64
}

/// Candidates by plausibility, best first. `last_target`: what the newest foreign key of a column with the same name refers to.
pub fn rank<'a>(table: &str, column: &str, last_target: Option<&str>, candidates: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let words: Vec<String> = tokens(column);
    let stem: Vec<String> = words
        .iter()
        .filter(|word| !KEY_WORDS.contains(&word.as_str()))
        .map(|word| singular(word.strip_suffix("id").filter(|stem| stem.len() > 2).unwrap_or(word)))
        .collect();
    let own: Vec<String> = tokens(table).iter().map(|word| singular(word)).collect();
    let mut scored: Vec<(f64, &str)> = candidates
        .map(|candidate| {
            let known = if last_target == Some(candidate) { 20.0 } else { 0.0 };
            // `parent_id` refers to its own table
            let parent = candidate == table
                && stem.iter().any(|word| matches!(word.as_str(), "parent" | "root" | "previous" | "next" | "original" | "child"));
            (score(&stem, &own, candidate) + known + if parent { 8.0 } else { 0.0 }, candidate)
        })
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
    scored.dedup_by(|a, b| a.1 == b.1);
    scored.into_iter().map(|(_, name)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let tables = ["orders", "customers", "customer_groups", "categories", "users"];
        for (column, last, expected) in [
            ("customer_id", None, "customers"),
            ("categoryId", None, "categories"),
            ("created_by", None, "users"),
            ("parent_id", None, "orders"),
            ("owner", Some("customers"), "customers"),
        ] {
            assert_eq!(rank("orders", column, last, tables.into_iter())[0], expected, "{column}");
        }
    }
}
