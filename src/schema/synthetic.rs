//! Synthetic values for columns without data. Deterministic: value = f(keyed hash of seed, table, column, primary key), so the same row gets the
//! same value in a retry, on another shard and after a restart.
//!
//! Precedence: what the operator wrote down, foreign key, list of allowed values (enum, CHECK), semantic name, sister column, model class, type. Unique columns get their
//! values by construction, not by luck. Rare values of other columns never leak: only those seen often are used.

pub use crate::config::FillRule;

use super::{
    catalog::Column,
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
    /// Unique by construction from the key: digits of a permutation, or text with the key in it.
    UniqueInteger(u32),
    /// The stem and the key.
    UniqueText(String),
    /// A UUID that carries the key's permutation.
    UniqueUuid,
}

/// What a column's name says about its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Semantic {
    Email,
    FirstName,
    LastName,
    FullName,
    Phone,
    City,
    Country,
    CountryCode,
    Currency,
    Language,
    Url,
    PostalCode,
    Street,
    Company,
    Tier,
    Status,
    Priority,
    Colour,
    Sentence,
    Code,
}

const FIRST: [&str; 16] =
    ["Ada", "Ben", "Chen", "Dana", "Emil", "Fatima", "Grace", "Hugo", "Ines", "Jamal", "Kira", "Lena", "Mateo", "Nora", "Omar", "Priya"];
const LAST: [&str; 16] = [
    "Abe", "Berg", "Costa", "Diaz", "Endo", "Fischer", "Garcia", "Haas", "Ito", "Jensen", "Kaya", "Lopez", "Meyer", "Novak", "Okoye",
    "Park",
];
const CITIES: [&str; 12] = ["Berlin", "Lagos", "Lima", "Lyon", "Osaka", "Porto", "Pune", "Quito", "Riga", "Seoul", "Tallinn", "Utrecht"];
const WORDS: [&str; 16] = [
    "plain", "first", "review", "sample", "later", "order", "check", "simple", "update", "north", "paper", "signal", "garden", "window",
    "stone", "river",
];

impl Semantic {
    /// From the words of a column's name.
    pub fn of(name: &str) -> Option<Self> {
        let words = tokens(name);
        let has = |word: &str| words.iter().any(|other| other == word);
        let last = words.last().map_or("", String::as_str);
        Some(match last {
            "email" | "mail" => Semantic::Email,
            "firstname" | "forename" => Semantic::FirstName,
            "lastname" | "surname" => Semantic::LastName,
            "name" if has("first") || has("given") => Semantic::FirstName,
            "name" if has("last") || has("family") => Semantic::LastName,
            "name" if has("full") || has("display") || has("contact") => Semantic::FullName,
            "phone" | "mobile" | "telephone" | "fax" => Semantic::Phone,
            "city" | "town" => Semantic::City,
            "country" => Semantic::Country,
            "code" if has("country") => Semantic::CountryCode,
            "code" if has("postal") || has("zip") || has("post") => Semantic::PostalCode,
            "zip" | "postcode" | "zipcode" => Semantic::PostalCode,
            "currency" => Semantic::Currency,
            "language" | "locale" | "lang" => Semantic::Language,
            "url" | "link" | "website" | "homepage" => Semantic::Url,
            "street" => Semantic::Street,
            "company" | "organisation" | "organization" => Semantic::Company,
            "tier" | "plan" | "grade" => Semantic::Tier,
            "level" if has("loyalty") || has("membership") => Semantic::Tier,
            "status" | "state" => Semantic::Status,
            "priority" | "severity" | "urgency" => Semantic::Priority,
            "color" | "colour" => Semantic::Colour,
            "description" | "comment" | "note" | "notes" | "summary" | "remark" | "remarks" => Semantic::Sentence,
            "code" | "sku" | "reference" => Semantic::Code,
            _ => return None,
        })
    }

    /// The longest value it makes: it is used only where that fits.
    fn longest(self) -> i64 {
        match self {
            Semantic::Email => 40,
            Semantic::Url => 40,
            Semantic::Sentence => 40,
            Semantic::FullName | Semantic::Street | Semantic::Company => 20,
            Semantic::Phone => 15,
            Semantic::CountryCode | Semantic::Language => 2,
            Semantic::Currency => 3,
            Semantic::PostalCode => 5,
            _ => 12,
        }
    }

    fn value(self, hash: u64) -> String {
        let pick = |list: &[&str], part: u32| list.get((hash >> part) as usize % list.len().max(1)).copied().unwrap_or("").to_owned();
        match self {
            Semantic::Email => format!("{}.{}{}@example.com", pick(&FIRST, 3).to_lowercase(), pick(&LAST, 11).to_lowercase(), hash >> 40),
            Semantic::FirstName => pick(&FIRST, 3),
            Semantic::LastName => pick(&LAST, 11),
            Semantic::FullName => format!("{} {}", pick(&FIRST, 3), pick(&LAST, 11)),
            Semantic::Phone => format!("+1555{:07}", hash % 10_000_000),
            Semantic::City => pick(&CITIES, 5),
            Semantic::Country => pick(&["Brazil", "Estonia", "France", "Germany", "India", "Japan", "Kenya", "Peru", "Portugal"], 5),
            Semantic::CountryCode => pick(&["BR", "DE", "EE", "FR", "IN", "JP", "KE", "PE", "PT"], 5),
            Semantic::Currency => pick(&["EUR", "USD", "GBP", "JPY", "CHF"], 5),
            Semantic::Language => pick(&["en", "de", "fr", "es", "pt", "ja"], 5),
            Semantic::Url => format!("https://example.com/{}/{:x}", pick(&WORDS, 5), hash >> 40),
            Semantic::PostalCode => format!("{:05}", hash % 100_000),
            Semantic::Street => format!("{} Street {}", pick(&LAST, 9), hash % 200 + 1),
            Semantic::Company => format!("{} {}", pick(&LAST, 9), pick(&["Ltd", "GmbH", "Inc", "SA"], 20)),
            Semantic::Tier => pick(&["standard", "standard", "standard", "silver", "silver", "gold", "gold", "platinum"], 5),
            Semantic::Status => pick(&["active", "active", "active", "pending", "inactive"], 5),
            Semantic::Priority => pick(&["normal", "normal", "normal", "low", "high"], 5),
            Semantic::Colour => pick(&["red", "green", "blue", "black", "white"], 5),
            Semantic::Sentence => format!("{} {} {}", pick(&WORDS, 3), pick(&WORDS, 13), pick(&WORDS, 23)),
            Semantic::Code => format!("{}-{:05}", pick(&["A", "B", "C", "D"], 5), hash % 100_000),
        }
    }
}

/// What is known about the column when a generator is made.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Keys of the table that it refers to, sorted; `Some` and empty: there is no parent.
    pub parents: Option<Vec<String>>,
    /// Allowed values: enum labels, or those of a CHECK list.
    pub allowed: Vec<String>,
    /// Values of a column of the same name and type elsewhere with their shares, frequent ones only, and its share of NULL.
    pub sister: Option<(Vec<(String, f64)>, f64)>,
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
        Some(Generator { key, source, null_share, length, cumulative, why })
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
            Source::Words(semantic) => semantic.value(hash),
            Source::Integer(low, high) => between(*low, *high).to_string(),
            Source::Decimal(low, high) => {
                let cents = between(*low, *high);
                format!("{}.{:02}", cents / 100, cents % 100)
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
    if let Some((values, null_share)) = facts.sister.as_ref().filter(|(values, _)| !values.is_empty()) {
        return Some((Source::Choice(values.clone()), *null_share, "the frequent values of a column of the same name and type".into()));
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
    if let Some(constant) = constant {
        return Some((Source::Constant(constant.to_owned()), 0.0, format!("such columns start as {constant:?}")));
    }
    by_type(column, class).map(|source| (source, 0.0, format!("plausible values of type {}", column.type_name)))
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
        let facts = Facts { sister: Some((vec![("a".into(), 0.8), ("b".into(), 0.2)], 0.25)), ..Facts::default() };
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
        let sister = Some((shares.iter().map(|(value, share)| ((*value).to_owned(), *share)).collect(), 0.0));
        let facts = Facts { sister, ..Facts::default() };
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
