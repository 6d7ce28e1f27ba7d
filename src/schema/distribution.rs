//! What a column of the same name and type elsewhere teaches about values: frequent values, equally full ranges of numbers and moments,
//! formats of text, the share of NULL. Pure; `fill` asks the server.
//!
//! Invariants: no value that few rows have is ever repeated: numbers are drawn between bounds, text from its format. The same point
//! gives the same value.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A value seen less often may identify somebody: never used.
pub const COUNT_MIN: usize = 5;
/// Frequent values that are kept, as many as PostgreSQL keeps by default.
const FREQUENT_MAX: usize = 100;
/// Equally full ranges.
const RANGES: usize = 100;
/// Rows that a format needs, so that what all of them have in one place says nothing about one of them.
const FORMAT_ROWS_MIN: usize = 20;
/// Formats that are kept.
const FORMATS_MAX: usize = 20;
/// Longest text of which the format is kept.
const FORMAT_LENGTH_MAX: usize = 64;

/// One place of a text's format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Slot {
    /// The same in every value of this format.
    Fixed(char),
    /// A digit.
    Digit,
    /// A capital letter.
    Upper,
    /// A small letter.
    Lower,
}

/// How numbers are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Whole.
    Integer,
    /// With this many digits behind the point.
    Decimal(usize),
    /// Seconds since 1970; `true`: a date only.
    Moment(bool),
    /// No numbers.
    Text,
}

/// What was learnt.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Learnt {
    /// Share of NULL in all rows.
    pub nulls: f64,
    /// Frequent values with their share of the other rows.
    pub frequent: Vec<(String, f64)>,
    /// Bounds of equally full ranges of what is not frequent.
    pub bounds: Vec<f64>,
    /// Formats of what is not frequent, with weights.
    pub formats: Vec<(Vec<Slot>, f64)>,
}

impl Learnt {
    /// From a sample of rows: the text, and the number that it stands for.
    pub fn from_sample(rows: &[(Option<String>, Option<f64>)]) -> Self {
        let values: Vec<(&str, Option<f64>)> = rows.iter().filter_map(|(text, number)| Some((text.as_deref()?, *number))).collect();
        let nulls = (rows.len() - values.len()) as f64 / rows.len().max(1) as f64;
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        values.iter().for_each(|(text, _)| *counts.entry(text).or_default() += 1);
        let mut often: Vec<(&str, usize)> = counts.into_iter().filter(|(_, count)| *count >= COUNT_MIN).collect();
        often.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(b.0)));
        often.truncate(FREQUENT_MAX);
        let total = values.len().max(1) as f64;
        let frequent: Vec<(String, f64)> = often.iter().map(|(text, count)| ((*text).to_owned(), *count as f64 / total)).collect();
        let rest: Vec<(&str, Option<f64>)> = values.into_iter().filter(|(text, _)| !often.iter().any(|(known, _)| known == text)).collect();
        let mut numbers: Vec<f64> = rest.iter().filter_map(|(_, number)| *number).filter(|number| number.is_finite()).collect();
        numbers.sort_by(f64::total_cmp);
        let texts: Vec<&str> = rest.iter().map(|(text, _)| *text).collect();
        Learnt { nulls, frequent, bounds: bounds(&numbers), formats: formats(&texts) }
    }

    /// Something of it can be used.
    pub fn is_useful(&self, form: Form) -> bool {
        !self.frequent.is_empty() || if form == Form::Text { !self.formats.is_empty() } else { self.bounds.len() > 1 }
    }

    /// The value at a `point` of `0.0..1.0`; `chance` decides what the point leaves open.
    pub fn value(&self, form: Form, point: f64, chance: u64) -> Option<String> {
        let rest = if form == Form::Text { !self.formats.is_empty() } else { self.bounds.len() > 1 };
        let often: f64 = self.frequent.iter().map(|(_, share)| share).sum();
        // Without a rest the frequent values share its part.
        let whole = if rest { often.max(1.0) } else { often };
        let mut left = point * whole;
        for (value, share) in &self.frequent {
            left -= share;
            if left < 0.0 {
                return Some(value.clone());
            }
        }
        let place = (left / (whole - often).max(1e-12)).clamp(0.0, 1.0);
        match form {
            Form::Text => self.format(place, chance).or_else(|| self.frequent.last().map(|(value, _)| value.clone())),
            _ => self.between(place).map(|number| written(number, form)).or_else(|| self.frequent.last().map(|(value, _)| value.clone())),
        }
    }

    /// The number at a place of the ranges.
    fn between(&self, place: f64) -> Option<f64> {
        let ranges = self.bounds.len().checked_sub(1).filter(|ranges| *ranges > 0)?;
        let at = ((place * ranges as f64) as usize).min(ranges - 1);
        let (low, high) = (self.bounds.get(at)?, self.bounds.get(at + 1)?);
        Some(low + (place * ranges as f64 - at as f64) * (high - low))
    }

    fn format(&self, place: f64, mut chance: u64) -> Option<String> {
        let total: f64 = self.formats.iter().map(|(_, weight)| weight).sum();
        let mut left = place * total;
        let (slots, _) = self.formats.iter().find(|(_, weight)| {
            left -= weight;
            left < 0.0
        })?;
        let mut next = |many: u64| {
            // xorshift (Marsaglia, 2003): enough for letters
            chance = chance.max(1);
            chance ^= chance << 13;
            chance ^= chance >> 7;
            chance ^= chance << 17;
            (chance >> 11) % many
        };
        let letter = |first: u8, at: u64| char::from(first + at as u8);
        Some(
            slots
                .iter()
                .map(|slot| match slot {
                    Slot::Fixed(letter) => *letter,
                    Slot::Digit => letter(b'0', next(10)),
                    Slot::Upper => letter(b'A', next(26)),
                    Slot::Lower => letter(b'a', next(26)),
                })
                .collect(),
        )
    }
}

/// Bounds of equally full ranges of sorted numbers; too few of them say nothing.
fn bounds(sorted: &[f64]) -> Vec<f64> {
    if sorted.len() < FORMAT_ROWS_MIN {
        return vec![];
    }
    let ranges = RANGES.min(sorted.len() / 4).max(1);
    (0..=ranges).filter_map(|at| sorted.get(at * (sorted.len() - 1) / ranges)).copied().collect()
}

/// The formats that many texts have.
fn formats(texts: &[&str]) -> Vec<(Vec<Slot>, f64)> {
    let kind = |letter: char| match letter {
        '0'..='9' => Slot::Digit,
        'A'..='Z' => Slot::Upper,
        'a'..='z' => Slot::Lower,
        // Letters of other scripts stay letters: as a fixed place they would tell which.
        letter if letter.is_alphabetic() => Slot::Lower,
        other => Slot::Fixed(other),
    };
    let mut found: BTreeMap<String, (Vec<Slot>, Vec<Vec<char>>)> = BTreeMap::new();
    for text in texts.iter().filter(|text| text.chars().count() <= FORMAT_LENGTH_MAX) {
        let slots: Vec<Slot> = text.chars().map(kind).collect();
        let key = format!("{slots:?}");
        found.entry(key).or_insert_with(|| (slots, Vec::new())).1.push(text.chars().collect());
    }
    let mut formats: Vec<(Vec<Slot>, f64)> = found
        .into_values()
        .filter(|(_, rows)| rows.len() >= FORMAT_ROWS_MIN)
        .map(|(slots, rows)| {
            let settled = slots.iter().enumerate().map(|(at, slot)| {
                let first = rows.first().and_then(|row| row.get(at)).copied();
                let same = rows.iter().all(|row| row.get(at).copied() == first);
                first.filter(|_| same).map_or(*slot, Slot::Fixed)
            });
            (settled.collect::<Vec<_>>(), rows.len() as f64)
        })
        // Where nothing is left open, the value would be one that a row has.
        .filter(|(slots, _)| slots.iter().any(|slot| !matches!(slot, Slot::Fixed(_))))
        .collect();
    formats.sort_by(|a, b| b.1.total_cmp(&a.1));
    formats.truncate(FORMATS_MAX);
    formats
}

/// A number as text of its type.
pub fn written(number: f64, form: Form) -> String {
    match form {
        Form::Integer | Form::Text => format!("{:.0}", number),
        Form::Decimal(digits) => format!("{number:.digits$}"),
        Form::Moment(date_only) => moment(number as i64, date_only),
    }
}

/// Seconds since 1970 as a moment in UTC. Source: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms" (`civil_from_days`).
fn moment(seconds: i64, date_only: bool) -> String {
    let (days, clock) = (seconds.div_euclid(86_400) + 719_468, seconds.rem_euclid(86_400));
    let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = era * 400 + year_of_era + i64::from(month <= 2);
    let (year, suffix) = if year > 0 { (year, "") } else { (1 - year, " BC") };
    match date_only {
        true => format!("{year:04}-{month:02}-{day:02}{suffix}"),
        false => format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}+00{suffix}", clock / 3600, clock / 60 % 60, clock % 60),
    }
}

/// A limit that a CHECK sets to a number: `((n > 0) AND (n <= 10))`. What is not understood is no limit: the server is asked in the end.
pub fn limits(definition: &str, column: &str, smallest: f64) -> (Option<f64>, Option<f64>) {
    let (mut low, mut high): (Option<f64>, Option<f64>) = (None, None);
    let body = definition.trim_start_matches("CHECK").replace(['(', ')', '"'], " ");
    if body.contains(" OR ") || body.contains(" NOT ") {
        return (None, None);
    }
    for part in body.split(" AND ") {
        let words: Vec<&str> = part.split_whitespace().collect();
        let [name, operator, value, ..] = words[..] else { continue };
        let cast_only = words.get(3..).is_none_or(|rest| rest.iter().all(|word| word.starts_with("::")));
        let number = value.split("::").next().unwrap_or(value).trim_matches('\'').parse::<f64>().ok();
        let Some(number) = number.filter(|_| name == column && cast_only) else { continue };
        match operator {
            ">" => low = Some(low.unwrap_or(f64::MIN).max(number + smallest)),
            ">=" => low = Some(low.unwrap_or(f64::MIN).max(number)),
            "<" => high = Some(high.unwrap_or(f64::MAX).min(number - smallest)),
            "<=" => high = Some(high.unwrap_or(f64::MAX).min(number)),
            _ => {}
        }
    }
    (low, high)
}

/// Which of two moments of a row comes first, by their names: `true`: `name` is not before `other`. `None`: they say nothing.
pub fn comes_after(name: &[String], other: &[String]) -> Option<bool> {
    const BEGIN: [&str; 9] = ["created", "create", "started", "start", "opened", "begin", "inserted", "ordered", "from"];
    const END: [&str; 16] = [
        "updated",
        "update",
        "modified",
        "changed",
        "ended",
        "end",
        "closed",
        "finished",
        "completed",
        "deleted",
        "expires",
        "expired",
        "shipped",
        "paid",
        "until",
        "due",
    ];
    let has = |words: &[String], list: &[&str]| words.iter().any(|word| list.contains(&word.as_str()));
    match (has(name, &BEGIN), has(name, &END), has(other, &BEGIN), has(other, &END)) {
        (false, true, true, false) => Some(true),
        (true, false, false, true) => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_keep_what_all_have_and_nothing_else() {
        let codes: Vec<String> = (0..200).map(|at| format!("INV-{:04}{}", at * 37 % 10_000, if at % 2 == 0 { 'a' } else { 'b' })).collect();
        let rows: Vec<_> = codes.iter().map(|code| (Some(code.clone()), None)).chain([(Some("Jane Roe 1".into()), None)]).collect();
        let learnt = Learnt::from_sample(&rows);
        assert_eq!(learnt.formats.len(), 1);
        for at in 0..100u64 {
            let value = learnt.value(Form::Text, at as f64 / 100.0, at.wrapping_mul(0x9e37_79b9_7f4a_7c15)).unwrap();
            assert!(value.starts_with("INV-") && value.len() == 9 && value[4..8].bytes().all(|byte| byte.is_ascii_digit()), "{value}");
        }
    }

    #[test]
    fn moments_are_written_as_the_server_reads_them() {
        for (seconds, expected) in [
            (0, "1970-01-01 00:00:00+00"),
            (951_782_400, "2000-02-29 00:00:00+00"),
            (-1, "1969-12-31 23:59:59+00"),
            (1_795_412_089, "2026-11-23 05:34:49+00"),
        ] {
            assert_eq!(moment(seconds, false), expected);
        }
    }

    #[test]
    fn limits_of_checks() {
        for (definition, expected) in [
            ("CHECK ((n > 0))", (Some(1.0), None)),
            ("CHECK (((n >= 1) AND (n <= 5)))", (Some(1.0), Some(5.0))),
            ("CHECK ((n < (100)::numeric))", (None, Some(99.0))),
            ("CHECK (((n > 0) OR (n < 9)))", (None, None)),
            ("CHECK ((other > 0))", (None, None)),
            ("CHECK ((n > (m + 1)))", (None, None)),
        ] {
            assert_eq!(limits(definition, "n", 1.0), expected, "{definition}");
        }
    }

    #[test]
    fn the_order_of_moments_is_in_their_names() {
        let words = |name: &str| name.split('_').map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(comes_after(&words("updated_at"), &words("created_at")), Some(true));
        assert_eq!(comes_after(&words("start_date"), &words("end_date")), Some(false));
        assert_eq!(comes_after(&words("updated_at"), &words("closed_at")), None);
    }
}
