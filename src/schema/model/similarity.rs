//! How much two names, word lists or column lists look alike. Everything is 0 to 1 unless said otherwise.

use super::t1::tokens;
use std::collections::BTreeSet;

/// Longest name that is compared letter by letter: identifiers have at most 63 bytes; a longer one is cut.
const NAME_MAX: usize = 128;

fn letters(name: &str) -> Vec<char> {
    name.chars().take(NAME_MAX).flat_map(char::to_lowercase).collect()
}

/// Levenshtein distance turned into a similarity.
pub fn levenshtein_ratio(a: &str, b: &str) -> f64 {
    let (a, b) = (letters(a), letters(b));
    let longest = a.len().max(b.len());
    if longest == 0 {
        return 1.0;
    }
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let cost = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = cost.min(row[j] + 1).min(diagonal + 1);
        }
    }
    1.0 - row[b.len()] as f64 / longest as f64
}

/// Jaro-Winkler similarity.
pub fn jaro_winkler(a: &str, b: &str) -> f64 {
    let (a, b) = (letters(a), letters(b));
    if a.is_empty() || b.is_empty() {
        return f64::from(u8::from(a == b));
    }
    let window = (a.len().max(b.len()) / 2).saturating_sub(1);
    let mut taken = vec![false; b.len()];
    let mut matched = Vec::new();
    for (i, x) in a.iter().enumerate() {
        let from = i.saturating_sub(window);
        let found = (from..b.len().min(i + window + 1)).find(|j| !taken[*j] && b[*j] == *x);
        if let Some(j) = found {
            taken[j] = true;
            matched.push(*x);
        }
    }
    if matched.is_empty() {
        return 0.0;
    }
    let other: Vec<char> = b.iter().zip(&taken).filter(|(_, taken)| **taken).map(|(letter, _)| *letter).collect();
    let swaps = matched.iter().zip(&other).filter(|(x, y)| x != y).count() as f64 / 2.0;
    let m = matched.len() as f64;
    let jaro = (m / a.len() as f64 + m / b.len() as f64 + (m - swaps) / m) / 3.0;
    let prefix = a.iter().zip(&b).take(4).take_while(|(x, y)| x == y).count() as f64;
    jaro + prefix * 0.1 * (1.0 - jaro)
}

/// Shared members by all members.
pub fn jaccard<T: Ord>(a: &BTreeSet<T>, b: &BTreeSet<T>) -> f64 {
    let union = a.union(b).count();
    if union == 0 { 0.0 } else { a.intersection(b).count() as f64 / union as f64 }
}

/// Jaccard of three-letter pieces.
pub fn trigram(a: &str, b: &str) -> f64 {
    let pieces = |name: &str| {
        let padded: Vec<char> = std::iter::once(' ').chain(letters(name)).chain(std::iter::once(' ')).collect();
        padded.windows(3).map(|piece| piece.iter().collect::<String>()).collect::<BTreeSet<_>>()
    };
    jaccard(&pieces(a), &pieces(b))
}

/// `categories` and `category` are one word.
pub fn singular(word: &str) -> String {
    if let Some(stem) = word.strip_suffix("ies").filter(|stem| stem.len() > 1) {
        return format!("{stem}y");
    }
    match word.strip_suffix('s') {
        Some(stem) if !word.ends_with("ss") && stem.len() > 2 => stem.to_owned(),
        _ => word.to_owned(),
    }
}

/// Two words: inflections, abbreviations (`desc`, `description`) and misspellings count, less than equality.
fn soft(a: &str, b: &str) -> f64 {
    if a == b {
        return 1.0;
    }
    if singular(a) == singular(b) {
        return 0.95;
    }
    let (short, long) = if a.len() < b.len() { (a, b) } else { (b, a) };
    if short.len() >= 3 && long.starts_with(short) {
        return 0.8;
    }
    let ratio = levenshtein_ratio(a, b);
    if ratio >= 0.75 { 0.8 * ratio } else { 0.0 }
}

/// Two word lists with a weight for each word: soft Jaccard, and how much of the lighter list is in the other.
pub fn soft_overlap(a: &[String], b: &[String], weight: &dyn Fn(&str) -> f64) -> (f64, f64) {
    let total = |words: &[String]| words.iter().map(|word| weight(word)).sum::<f64>();
    let covered = |one: &[String], other: &[String]| {
        one.iter().map(|x| weight(x) * other.iter().map(|y| soft(x, y)).fold(0.0, f64::max)).sum::<f64>()
    };
    let (weight_a, weight_b) = (total(a), total(b));
    let shared = f64::midpoint(covered(a, b), covered(b, a));
    let lighter = weight_a.min(weight_b);
    let union = (weight_a + weight_b - shared).max(1e-9);
    (if weight_a + weight_b > 0.0 { shared / union } else { 0.0 }, if lighter > 0.0 { (shared / lighter).min(1.0) } else { 0.0 })
}

/// Length of the longest common subsequence.
pub fn common_subsequence<T: PartialEq>(a: &[T], b: &[T]) -> usize {
    let mut row = vec![0usize; b.len() + 1];
    for x in a {
        let mut diagonal = 0;
        for (j, y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if x == y { diagonal + 1 } else { above.max(row[j]) };
            diagonal = above;
        }
    }
    row[b.len()]
}

/// The words of each name that the other has not: `user_ban`, `person_ban` → `user`, `person`.
pub fn replaced_words(a: &[String], b: &[String]) -> (String, String) {
    let rest = |one: &[String], other: &[String]| {
        one.iter().filter(|word| !other.contains(word)).map(String::as_str).collect::<Vec<_>>().join("_")
    };
    (rest(a, b), rest(b, a))
}

/// `isActive` style.
pub fn is_camel(name: &str) -> bool {
    name.chars().any(char::is_uppercase) && name.chars().any(char::is_lowercase) && !name.contains('_')
}

/// Words joined by underscores, whatever the style.
pub fn snake(name: &str) -> String {
    tokens(name).join("_")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn similarities() {
        assert!((jaro_winkler("martha", "marhta") - 0.961).abs() < 0.001);
        assert!((levenshtein_ratio("kitten", "sitting") - 4.0 / 7.0).abs() < 1e-9);
        assert_eq!(trigram("abc", "abc"), 1.0);
        assert_eq!(common_subsequence(&[1, 2, 3, 4], &[2, 4, 3]), 2);
        assert_eq!(replaced_words(&tokens("user_ban"), &tokens("person_ban")), ("user".into(), "person".into()));
        for (plural, one) in [("categories", "category"), ("users", "user"), ("class", "class"), ("ies", "ies")] {
            assert_eq!(singular(plural), one);
        }
    }

    proptest! {
        #[test]
        fn similarities_stay_between_0_and_1(a in ".{0,20}", b in ".{0,20}") {
            let (soft, contained) = soft_overlap(&tokens(&a), &tokens(&b), &|_| 1.0);
            for value in [jaro_winkler(&a, &b), levenshtein_ratio(&a, &b), trigram(&a, &b), soft, contained] {
                prop_assert!((0.0..=1.0 + 1e-9).contains(&value));
            }
        }
    }
}
