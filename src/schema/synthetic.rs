//! Synthetic values for columns without data. Deterministic: value = f(keyed hash of seed, table, column, primary key), so the same row gets the
//! same value in a retry, on another shard and after a restart.
//!
//! Precedence: what the operator wrote down, foreign key, list of allowed values (enum, CHECK), semantic name, sister column (`distribution`), model class, type. Unique columns get their
//! values by construction, not by luck. Rare values of other columns never leak: only those seen often are used.

pub use super::words::Semantic;
pub use crate::config::FillRule;

use super::{
    catalog::Column,
    distribution::{Form, Learnt, written},
    model::t1::{tokens, type_class},
    rules::types::TypeName,
};

/// SipHash-2-4 (Aumasson and Bernstein, 2012): a keyed hash that is small, fast and the same everywhere.
pub fn siphash(key: (u64, u64), bytes: &[u8]) -> u64 {
    let mut v =
        [key.0 ^ 0x736f_6d65_7073_6575, key.1 ^ 0x646f_7261_6e64_6f6d, key.0 ^ 0x6c79_6765_6e65_7261, key.1 ^ 0x7465_6462_7974_6573];
    let round = |v: &mut [u64; 4]| {
        v[0] = v[0].wrapping_add(v[1]);
        v[1] = v[1].rotate_left(13) ^ v[0];
        v[0] = v[0].rotate_left(32);
        v[2] = v[2].wrapping_add(v[3]);
        v[3] = v[3].rotate_left(16) ^ v[2];
        v[0] = v[0].wrapping_add(v[3]);
        v[3] = v[3].rotate_left(21) ^ v[0];
        v[2] = v[2].wrapping_add(v[1]);
        v[1] = v[1].rotate_left(17) ^ v[2];
        v[2] = v[2].rotate_left(32);
    };
    let mut chunks = bytes.chunks_exact(8);
    for chunk in &mut chunks {
        let word = chunk.iter().rev().fold(0u64, |word, byte| word << 8 | u64::from(*byte));
        v[3] ^= word;
        round(&mut v);
        round(&mut v);
        v[0] ^= word;
    }
    let last = chunks.remainder().iter().rev().fold(0u64, |word, byte| word << 8 | u64::from(*byte)) | (bytes.len() as u64) << 56;
    v[3] ^= last;
    round(&mut v);
    round(&mut v);
    v[0] ^= last;
    v[2] ^= 0xff;
    (0..4).for_each(|_| round(&mut v));
    v[0] ^ v[1] ^ v[2] ^ v[3]
}

/// A bijection of `0..1 << bits` (`bits` even): four rounds of a Feistel network.
pub fn permute(key: (u64, u64), bits: u32, value: u64) -> u64 {
    let half = bits / 2;
    let mask = (1u64 << half) - 1;
    let (mut left, mut right) = (value >> half & mask, value & mask);
    for turn in 0..4u8 {
        let mixed = siphash(key, &[&right.to_le_bytes()[..], &[turn]].concat()) & mask;
        (left, right) = (right, left ^ mixed);
    }
    left << half | right
}

/// Where values come from.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// One of these, with weights; for enums, CHECK lists, sister columns and parent keys.
    Choice(Vec<(String, f64)>),
    /// Always this.
    Constant(String),
    /// By name: which kind of word.
    Words(Semantic),
    /// A whole number between these.
    Integer(i64, i64),
    /// A decimal between these, in hundredths.
    Decimal(i64, i64),
    /// True with this probability.
    Boolean(f64),
    /// A moment within two years before 2026-01-01; true: a date only.
    Moment(bool),
    /// A time of day.
    TimeOfDay,
    /// An interval of seconds.
    Seconds,
    /// A version 4 UUID.
    Uuid,
    /// Bytes as hexadecimal.
    Bytes,
    /// An address of the documentation network.
    Address,
    /// A short text with the column's name in it.
    Label(String),
    /// As in a column of the same name and type elsewhere.
    Learnt(Box<Learnt>, Form),
    /// Unique by construction from the key: digits of a permutation, or text with the key in it.
    UniqueInteger(u32),
    /// The stem and the key.
    UniqueText(String),
    /// A UUID that carries the key's permutation.
    UniqueUuid,
}

/// What is known about the column when a generator is made.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Keys of the table that it refers to, sorted; `Some` and empty: there is no parent.
    pub parents: Option<Vec<String>>,
    /// Allowed values: enum labels, or those of a CHECK list.
    pub allowed: Vec<String>,
    /// What a column of the same name and type elsewhere teaches.
    pub learnt: Option<Learnt>,
    /// What a CHECK allows of numbers.
    pub limits: (Option<f64>, Option<f64>),
    /// A moment of the same row that comes first (`true`) or last, by their names; its column.
    pub beside: Option<(String, bool)>,
    /// The model's best class.
    pub class: String,
    /// What the operator wrote down for the column: it comes before everything else.
    pub written: Option<FillRule>,
    /// Values must differ.
    pub unique: bool,
    /// The primary key is one whole number.
    pub integer_key: bool,
}

/// Makes values for one column.
#[derive(Clone, Debug, PartialEq)]
pub struct Generator {
    key: (u64, u64),
    source: Source,
    null_share: f64,
    length: Option<usize>,
    limits: (Option<f64>, Option<f64>),
    /// The column of the same row that the value is not before (`true`) or not after.
    pub beside: Option<(String, bool)>,
    /// Of a choice: the weights up to and with each value, so that one is found in a few steps.
    cumulative: Vec<f64>,
    /// Why these values, for people.
    pub why: String,
}

fn length_of(parsed: &TypeName) -> Option<usize> {
    match (parsed.base.as_str(), parsed.modifiers.first()) {
        ("varchar" | "char", Some(length)) if !parsed.array => usize::try_from(*length).ok(),
        ("char", None) if !parsed.array => Some(1),
        _ => None,
    }
}

impl Generator {
    /// Chooses how to make values; `None`: nothing plausible fits (a unique column that cannot be served, a type without a rule).
    pub fn new(seed: &str, table: &str, column: &Column, facts: &Facts) -> Option<Self> {
        let name = format!("{seed}|{table}|{}", column.name);
        let key = (siphash((1, 2), name.as_bytes()), siphash((3, 4), name.as_bytes()));
        let kind = if column.type_kind == "e" { format!("enum:{}", column.type_name) } else { column.type_name.clone() };
        let class = type_class(&kind);
        let parsed = TypeName::parse(&column.type_name, &column.type_kind);
        let length = length_of(&parsed);
        let (source, null_share, why) = choose(column, class, length, facts)?;
        let null_share = if column.not_null { 0.0 } else { null_share };
        let mut sum = 0.0;
        let cumulative = match &source {
            Source::Choice(choices) => choices
                .iter()
                .map(|(_, weight)| {
                    sum += weight;
                    sum
                })
                .collect(),
            _ => Vec::new(),
        };
        let beside = facts.beside.clone().filter(|_| matches!(source, Source::Moment(_) | Source::Learnt(_, Form::Moment(_))));
        let why = match &beside {
            Some((other, true)) => format!("{why}, never before {other}"),
            Some((other, false)) => format!("{why}, never after {other}"),
            None => why,
        };
        Some(Generator { key, source, null_share, length, limits: facts.limits, beside, cumulative, why })
    }

    /// The value for a row whose other moment is known, in seconds since 1970.
    pub fn value_beside(&self, primary_key: &str, other: Option<f64>) -> Option<String> {
        let date_only = match &self.source {
            Source::Moment(date_only) | Source::Learnt(_, Form::Moment(date_only)) => *date_only,
            _ => return self.value(primary_key),
        };
        let value = self.value(primary_key)?;
        let (Some(other), Some((_, after))) = (other.filter(|other| other.is_finite()), &self.beside) else { return Some(value) };
        let apart = (siphash((self.key.0 ^ 1, self.key.1), primary_key.as_bytes()) % APART_MAX) as f64;
        Some(written(if *after { other + apart } else { other - apart }, Form::Moment(date_only)))
    }

    /// The value for the row with this primary key, as text; `None`: NULL.
    pub fn value(&self, primary_key: &str) -> Option<String> {
        let hash = siphash(self.key, primary_key.as_bytes());
        let second = siphash((self.key.1, self.key.0), primary_key.as_bytes());
        let unit = (second >> 11) as f64 / (1u64 << 53) as f64;
        if unit < self.null_share {
            return None;
        }
        let between = |low: i64, high: i64| low + (hash % (high - low + 1).max(1) as u64) as i64;
        let text = match &self.source {
            Source::Choice(choices) => {
                let point = (hash >> 11) as f64 / (1u64 << 53) as f64 * self.cumulative.last()?;
                let at = self.cumulative.partition_point(|upper| *upper <= point);
                choices.get(at).or(choices.last()).map(|(value, _)| value.clone())?
            }
            Source::Constant(value) => value.clone(),
            Source::Learnt(learnt, form) => {
                let text = learnt.value(*form, (hash >> 11) as f64 / (1u64 << 53) as f64, second)?;
                self.limited(text, *form)
            }
            Source::Words(semantic) => semantic.value(hash),
            Source::Integer(low, high) => between(*low, *high).to_string(),
            Source::Decimal(low, high) => {
                let cents = between(*low, *high);
                format!("{}{}.{:02}", if cents < 0 { "-" } else { "" }, cents.abs() / 100, cents.abs() % 100)
            }
            Source::Boolean(share) => ((hash >> 11) as f64 / (1u64 << 53) as f64 <= *share).to_string(),
            Source::Moment(date_only) => moment(hash, *date_only),
            Source::TimeOfDay => format!("{:02}:{:02}:{:02}", hash % 24, hash >> 8 & 31, hash >> 16 & 31),
            Source::Seconds => format!("{} seconds", hash % 86_400),
            Source::Uuid => uuid(hash, second),
            Source::Bytes => format!("\\x{hash:016x}"),
            Source::Address => format!("192.0.2.{}", hash % 254 + 1),
            Source::Label(stem) => format!("{stem} {:04x}", hash & 0xffff),
            Source::UniqueInteger(bits) => permute(self.key, *bits, integer_key(primary_key) & ((1 << bits) - 1)).to_string(),
            Source::UniqueText(stem) => format!("{stem}-{primary_key}"),
            Source::UniqueUuid => uuid(permute(self.key, 62, integer_key(primary_key) & ((1 << 62) - 1)), 0),
        };
        Some(match self.length {
            Some(length) => text.chars().take(length).collect(),
            None => text,
        })
    }
}

impl Generator {
    /// Within what a CHECK allows.
    fn limited(&self, text: String, form: Form) -> String {
        if self.limits == (None, None) || matches!(form, Form::Text | Form::Moment(_)) {
            return text;
        }
        let Ok(number) = text.parse::<f64>() else { return text };
        let within = number.max(self.limits.0.unwrap_or(f64::MIN)).min(self.limits.1.unwrap_or(f64::MAX));
        if within == number { text } else { written(within, form) }
    }
}

/// Two moments of a row are at most this far apart: a week.
const APART_MAX: u64 = 7 * 86_400;

fn integer_key(text: &str) -> u64 {
    text.parse::<i64>().unwrap_or(0) as u64
}

fn uuid(high: u64, low: u64) -> String {
    // version and variant bits leave 122 bits; the upper 62 bits of a unique uuid survive in the first and second group and the tail
    let (a, b) = (high >> 30 & 0xffff_ffff, high >> 14 & 0xffff);
    let tail = (high & 0x3fff) << 34 | low >> 30;
    format!("{a:08x}-{b:04x}-4{:03x}-8{:03x}-{:012x}", low & 0xfff, low >> 12 & 0xfff, tail & 0xffff_ffff_ffff)
}

/// Between 2024-01-01 and 2025-12-31: fixed, so that the same key gives the same value whenever it is asked.
fn moment(hash: u64, date_only: bool) -> String {
    let month = hash % 24;
    let (year, month, day) = (2024 + month / 12, month % 12 + 1, (hash >> 8) % 28 + 1);
    match date_only {
        true => format!("{year}-{month:02}-{day:02}"),
        false => format!("{year}-{month:02}-{day:02} {:02}:{:02}:{:02}+00", (hash >> 16) % 24, (hash >> 24) % 60, (hash >> 32) % 60),
    }
}

fn choose(column: &Column, class: &str, length: Option<usize>, facts: &Facts) -> Option<(Source, f64, String)> {
    if let Some(rule) = &facts.written {
        let source = match (&rule.values[..], rule.range) {
            ([], Some((low, high))) => Source::Integer(low, high),
            ([one], _) => Source::Constant(one.clone()),
            (values, _) => Source::Choice(values.iter().map(|value| (value.clone(), 1.0)).collect()),
        };
        // one value for all rows cannot be unique
        return (!facts.unique).then(|| (source, rule.nulls, "written in proxy.toml".into()));
    }
    let even = |values: &[String]| values.iter().map(|value| (value.clone(), 1.0)).collect::<Vec<_>>();
    if let Some(parents) = &facts.parents {
        if parents.is_empty() || facts.unique {
            return None;
        }
        return Some((Source::Choice(even(parents)), 0.0, format!("foreign key: one of {} parents", parents.len())));
    }
    if facts.unique {
        return unique(column, class, length, facts);
    }
    if !facts.allowed.is_empty() {
        // the first label is the usual start: three of four enum columns begin there
        let choices = facts.allowed.iter().enumerate().map(|(at, value)| (value.clone(), if at == 0 { 3.0 } else { 1.0 }));
        return Some((Source::Choice(choices.collect()), 0.0, format!("one of {} allowed values", facts.allowed.len())));
    }
    if let (Some(semantic), "text") = (Semantic::of(&column.name), class)
        && length.is_none_or(|length| semantic.longest() <= length as i64)
    {
        return Some((Source::Words(semantic), 0.0, format!("its name says {semantic:?}")));
    }
    let form = form_of(column, class);
    if let Some(learnt) = facts.learnt.as_ref().filter(|learnt| learnt.is_useful(form)) {
        let why = "distributed as a column of the same name and type".into();
        return Some((Source::Learnt(Box::new(learnt.clone()), form), learnt.nulls, why));
    }
    let constant = match (facts.class.as_str(), class) {
        ("false", "bool") => Some("false"),
        ("true", "bool") => Some("true"),
        ("zero", "int" | "num") => Some("0"),
        ("one", "int" | "num") => Some("1"),
        ("empty_str", "text") => Some(""),
        ("empty_obj", "json") => Some("{}"),
        ("empty_array", "json") => Some("[]"),
        ("empty_array", "array") => Some("{}"),
        _ => None,
    };
    let allowed = |text: &&str| {
        text.parse::<f64>()
            .is_ok_and(|number| facts.limits.0.is_none_or(|low| number >= low) && facts.limits.1.is_none_or(|high| number <= high))
    };
    if let Some(constant) = constant.filter(|text| facts.limits == (None, None) || allowed(text)) {
        return Some((Source::Constant(constant.to_owned()), 0.0, format!("such columns start as {constant:?}")));
    }
    by_type(column, class).map(|source| (limited(source, facts.limits), 0.0, format!("plausible values of type {}", column.type_name)))
}

/// How the column's values are written.
fn form_of(column: &Column, class: &str) -> Form {
    match class {
        "int" => Form::Integer,
        "num" => match TypeName::parse(&column.type_name, "b").modifiers.as_slice() {
            [_, scale] => Form::Decimal(usize::try_from(*scale).unwrap_or(2)),
            [_] => Form::Decimal(0),
            _ => Form::Decimal(2),
        },
        "ts" => Form::Moment(false),
        "date" => Form::Moment(true),
        _ => Form::Text,
    }
}

/// A range of numbers within what a CHECK allows.
fn limited(source: Source, (low, high): (Option<f64>, Option<f64>)) -> Source {
    let within = |from: i64, to: i64, scale: f64| {
        let (width, low, high) = (to - from, low.map(|low| (low * scale).ceil() as i64), high.map(|high| (high * scale).floor() as i64));
        let start = match (low, high) {
            (Some(low), _) if low > from => low,
            (_, Some(high)) if high < from => high.saturating_sub(width),
            _ => from,
        };
        (start, start.saturating_add(width).min(high.unwrap_or(i64::MAX)).max(start))
    };
    match source {
        Source::Integer(from, to) => {
            let (from, to) = within(from, to, 1.0);
            Source::Integer(from, to)
        }
        Source::Decimal(from, to) => {
            let (from, to) = within(from, to, 100.0);
            Source::Decimal(from, to)
        }
        other => other,
    }
}

fn by_type(column: &Column, class: &str) -> Option<Source> {
    let words = tokens(&column.name);
    let last = words.last().map_or("", String::as_str);
    Some(match class {
        "bool" => Source::Boolean(0.3),
        "int" => match last {
            "year" => Source::Integer(2000, 2025),
            "age" => Source::Integer(18, 90),
            "rating" | "stars" => Source::Integer(1, 5),
            "percent" | "score" => Source::Integer(0, 100),
            _ => Source::Integer(0, 1000),
        },
        "num" => match TypeName::parse(&column.type_name, "b").modifiers.as_slice() {
            // precision minus scale digits before the point
            [precision, scale] if *precision - *scale < 4 => {
                Source::Decimal(0, 100 * 10i64.pow((*precision - *scale).clamp(0, 3) as u32) - 1)
            }
            [precision] if *precision < 4 => Source::Integer(0, 10i64.pow((*precision).clamp(0, 3) as u32) - 1),
            _ => Source::Decimal(0, 99_999),
        },
        "text" => Source::Label(column.name.chars().take(40).collect()),
        "ts" => Source::Moment(false),
        "date" => Source::Moment(true),
        "time" => Source::TimeOfDay,
        "interval" => Source::Seconds,
        "json" => Source::Constant("{}".into()),
        "array" => Source::Constant("{}".into()),
        "uuid" => Source::Uuid,
        "bytea" => Source::Bytes,
        "inet" => Source::Address,
        _ => return None,
    })
}

fn unique(column: &Column, class: &str, length: Option<usize>, facts: &Facts) -> Option<(Source, f64, String)> {
    let source = match class {
        // the largest even number of bits that fits the type
        "int" if facts.integer_key => match column.type_name.as_str() {
            "bigint" => Source::UniqueInteger(62),
            "integer" => Source::UniqueInteger(30),
            _ => return None,
        },
        "uuid" if facts.integer_key => Source::UniqueUuid,
        "text" if length.is_none_or(|length| length >= column.name.len() + 24) => Source::UniqueText(column.name.clone()),
        _ => return None,
    };
    Some((source, 0.0, "unique by construction from the primary key".into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    fn column(name: &str, type_name: &str) -> Column {
        Column { num: 1, name: name.into(), type_name: type_name.into(), type_kind: "b".into(), ..Column::default() }
    }

    #[test]
    fn the_hash_is_siphash() {
        // reference vector of the paper, appendix A
        let message: Vec<u8> = (0..15).collect();
        assert_eq!(siphash((0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908), &message), 0xa129_ca61_49be_45e5);
    }

    #[test]
    fn the_same_key_gives_the_same_value() {
        let make = || Generator::new("seed", "public.t", &column("loyalty_tier", "text"), &Facts::default()).unwrap();
        let other = Generator::new("seed2", "public.t", &column("loyalty_tier", "text"), &Facts::default()).unwrap();
        let values: Vec<_> = (0..100).map(|key| make().value(&key.to_string())).collect();
        assert_eq!(values, (0..100).map(|key| make().value(&key.to_string())).collect::<Vec<_>>());
        assert_ne!(values, (0..100).map(|key| other.value(&key.to_string())).collect::<Vec<_>>());
        assert!(values.iter().flatten().all(|value| ["standard", "silver", "gold", "platinum"].contains(&value.as_str())));
    }

    #[test]
    fn unique_by_construction() {
        for (name, type_name) in [("code", "text"), ("number", "integer"), ("number", "bigint"), ("token", "uuid")] {
            let facts = Facts { unique: true, integer_key: true, ..Facts::default() };
            let generator = Generator::new("s", "t", &column(name, type_name), &facts).unwrap();
            let values: HashSet<_> = (0..20_000).map(|key| generator.value(&key.to_string()).unwrap()).collect();
            assert_eq!(values.len(), 20_000, "{type_name}");
        }
        let facts = Facts { unique: true, ..Facts::default() };
        assert!(Generator::new("s", "t", &column("n", "integer"), &facts).is_none());
        assert!(Generator::new("s", "t", &column("n", "character varying(5)"), &facts).is_none());
    }

    #[test]
    fn shares_are_kept() {
        let learnt = Learnt { nulls: 0.25, frequent: vec![("a".into(), 0.8), ("b".into(), 0.2)], ..Learnt::default() };
        let facts = Facts { learnt: Some(learnt), ..Facts::default() };
        let generator = Generator::new("s", "t", &column("kind", "text"), &facts).unwrap();
        let values: Vec<_> = (0..10_000).map(|key| generator.value(&key.to_string())).collect();
        let share = |wanted: Option<&str>| values.iter().filter(|value| value.as_deref() == wanted).count() as f64 / 10_000.0;
        assert!((share(None) - 0.25).abs() < 0.01, "{}", share(None));
        assert!((share(Some("a")) - 0.6).abs() < 0.02, "{}", share(Some("a")));
    }

    /// The acceptance figures for 10,000 rows: total variation of categories and the Kolmogorov-Smirnov distance of numbers at most .05.
    #[test]
    fn distributions_are_kept() {
        let shares = [("a", 0.5), ("b", 0.2), ("c", 0.15), ("d", 0.1), ("e", 0.05)];
        let frequent = shares.iter().map(|(value, share)| ((*value).to_owned(), *share)).collect();
        let facts = Facts { learnt: Some(Learnt { frequent, ..Learnt::default() }), ..Facts::default() };
        let generator = Generator::new("s", "t", &column("kind", "text"), &facts).unwrap();
        let values: Vec<String> = (0..10_000).filter_map(|key| generator.value(&key.to_string())).collect();
        let seen = |wanted: &str| values.iter().filter(|value| *value == wanted).count() as f64 / values.len() as f64;
        let variation = shares.iter().map(|(value, share)| (seen(value) - share).abs()).sum::<f64>() / 2.0;
        assert!(variation <= 0.05, "{variation}");
        let generator = Generator::new("s", "t", &column("points", "integer"), &Facts::default()).unwrap();
        let mut numbers: Vec<f64> = (0..10_000).map(|key| generator.value(&key.to_string()).unwrap().parse().unwrap()).collect();
        numbers.sort_by(f64::total_cmp);
        let distance = numbers.iter().enumerate().map(|(at, value)| (at as f64 / 1e4 - value / 1000.0).abs()).fold(0.0, f64::max);
        assert!(distance <= 0.05, "{distance}");
    }

    proptest! {
        #[test]
        fn the_permutation_is_a_bijection(a: u64, b: u64, x in 0u64..1 << 30, y in 0u64..1 << 30) {
            let (px, py) = (permute((a, b), 30, x), permute((a, b), 30, y));
            prop_assert!(px < 1 << 30);
            prop_assert_eq!(px == py, x == y);
        }

        #[test]
        fn length_is_kept(name in "[a-z_]{1,20}", length in 1usize..30, key in ".{0,20}") {
            if let Some(generator) = Generator::new("s", "t", &column(&name, &format!("character varying({length})")), &Facts::default()) {
                prop_assert!(generator.value(&key).is_none_or(|value| value.chars().count() <= length));
            }
        }
    }
}
