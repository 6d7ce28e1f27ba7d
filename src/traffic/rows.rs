//! Two answers to one statement, row by row: what a hash has found to differ is looked at here, in text form, with the
//! rules that say what does not count. Values never leave this room: evidence names columns and lengths.

use super::answer::{Answer, Difference};
use crate::{
    config::IgnoreRule,
    sql::{Class, OrderKey},
    wire::{take_i16, take_i32},
};
use bytes::Bytes;
use std::cmp::Ordering;

/// Sums of floats depend on the order of addition: this relative error of a float8 is none.
const FLOAT8_TOLERANCE: f64 = 1e-9;
/// Of a float4.
const FLOAT4_TOLERANCE: f64 = 1e-5;
/// Rows looked through for the nearest partner of a row that has none.
const PARTNERS_MAX: usize = 100;
/// Cells shown of a row.
const CELLS_SHOWN_MAX: usize = 20;

const FLOAT4: u32 = 700;
const FLOAT8: u32 = 701;
const TIMESTAMPS: [u32; 2] = [1114, 1184];

/// What comparing has shown.
#[derive(Debug, PartialEq)]
pub enum Outcome {
    /// The same; if not to the letter, by which rule.
    Same(Option<String>),
    /// Different: how, and where, without values.
    Different(Difference, String),
    /// It cannot be said.
    Undecided(&'static str),
}

/// Compares the owner's answer with a shadow's. Both have kept their rows, in text form.
/// `order`: what the statement orders by.
pub fn compare(owner: &Answer, shadow: &Answer, class: &Class, order: &[OrderKey], rules: &[IgnoreRule]) -> Outcome {
    if owner.difference(shadow, class.ordered).is_none() {
        return Outcome::Same(None);
    }
    let rules: Vec<&IgnoreRule> = rules.iter().filter(|rule| rule.concerns(class.fingerprint, &class.tables)).collect();
    let mut last = compare_by(owner, shadow, (class, order), &[], false);
    if matches!(last, Outcome::Same(_)) {
        return Outcome::Same(Some("equal but for rows that tie in ORDER BY".into()));
    }
    if matches!(last, Outcome::Different(..)) {
        last = match compare_by(owner, shadow, (class, order), &[], true) {
            Outcome::Same(_) => return Outcome::Same(Some("equal but for the last digits of floats".into())),
            other => other,
        };
    }
    // one more rule each time: the one that makes them equal is the one that counts
    for number in 1..=rules.len() {
        if matches!(last, Outcome::Same(_)) {
            break;
        }
        let some = rules.get(..number).unwrap_or_default();
        last = match compare_by(owner, shadow, (class, order), some, true) {
            Outcome::Same(_) => Outcome::Same(some.last().map(|rule| format!("ignored by rule {}", rule.name))),
            other => other,
        };
    }
    last
}

/// How a column's values are compared.
#[derive(Clone, Copy, Debug, PartialEq)]
enum By {
    Bytes,
    /// Numbers within a relative error.
    Relative(f64),
    /// Moments within seconds.
    Seconds(f64),
    Nothing,
}

/// One row: what must be equal to the letter, and numbers that need not.
#[derive(Debug, PartialEq)]
struct Row<'a> {
    exact: Vec<Option<&'a [u8]>>,
    near: Vec<f64>,
}

fn compare_by(owner: &Answer, shadow: &Answer, (class, keys): (&Class, &[OrderKey]), rules: &[&IgnoreRule], tolerant: bool) -> Outcome {
    let ignored = |difference: Difference| rules.iter().any(|rule| rule.differences.iter().any(|name| name == difference.name()));
    if owner.sqlstate != shadow.sqlstate && !ignored(Difference::Sqlstate) {
        let said = |answer: &Answer| answer.sqlstate.clone().map_or("succeeded".into(), |code| format!("SQLSTATE {code}"));
        return Outcome::Different(Difference::Sqlstate, format!("{} on the owner, {} on the shadow", said(owner), said(shadow)));
    }
    if let (Some(ours), Some(theirs)) = (&owner.columns, &shadow.columns)
        && ours != theirs
        && !ignored(Difference::Columns)
    {
        return Outcome::Different(Difference::Columns, columns_differ(ours, theirs));
    }
    if owner.sqlstate.is_some() || shadow.sqlstate.is_some() {
        return Outcome::Same(None);
    }
    let (Some(ours), Some(theirs)) = (owner.kept(), shadow.kept()) else {
        return Outcome::Undecided("the answer is too large to be looked at row by row");
    };
    let no_columns = Vec::new();
    let columns = owner.columns.as_ref().unwrap_or(&no_columns);
    let by: Vec<By> = columns.iter().map(|(name, oid)| column_by(name, *oid, rules, tolerant)).collect();
    let (Some(mut left), Some(mut right)) = (read(ours, &by), read(theirs, &by)) else {
        return Outcome::Undecided("the answer cannot be read row by row");
    };
    let order = order(&left, &right, columns, &by, keys);
    left.sort_by(sorting);
    right.sort_by(sorting);
    let (only_left, only_right) = unmatched(&left, &right, &by);
    if !only_left.is_empty() || !only_right.is_empty() {
        let difference = if ours.len() == theirs.len() { Difference::Values } else { Difference::RowCount };
        return match ignored(difference) {
            true => Outcome::Same(None),
            false => Outcome::Different(difference, rows_differ(&only_left, &only_right, columns, &by)),
        };
    }
    match order {
        Some(Ok(at)) if class.ordered && !ignored(Difference::Order) => {
            Outcome::Different(Difference::Order, format!("from row {} on", at + 1))
        }
        Some(Err(reason)) if class.ordered && !ignored(Difference::Order) => Outcome::Undecided(reason),
        _ if owner.tags != shadow.tags && !ignored(Difference::Tag) => {
            Outcome::Different(Difference::Tag, format!("{} on the owner, {} on the shadow", tags(owner), tags(shadow)))
        }
        _ => Outcome::Same(None),
    }
}

fn tags(answer: &Answer) -> String {
    let tags: Vec<_> = answer.tags.iter().map(|tag| String::from_utf8_lossy(tag)).collect();
    tags.join(", ")
}

fn column_by(name: &Bytes, oid: u32, rules: &[&IgnoreRule], tolerant: bool) -> By {
    if rules.iter().any(|rule| rule.columns.iter().any(|column| column.as_bytes() == &name[..])) {
        return By::Nothing;
    }
    let floats = rules.iter().filter_map(|rule| rule.floats).fold(0.0, f64::max);
    let seconds = rules.iter().filter_map(|rule| rule.times).map(|time| time.as_secs_f64()).fold(0.0, f64::max);
    match oid {
        FLOAT8 if tolerant => By::Relative(floats.max(FLOAT8_TOLERANCE)),
        FLOAT4 if tolerant => By::Relative(floats.max(FLOAT4_TOLERANCE)),
        oid if TIMESTAMPS.contains(&oid) && seconds > 0.0 => By::Seconds(seconds),
        _ => By::Bytes,
    }
}

/// `None`: not the bodies of DataRows with these columns.
fn read<'a>(rows: &'a [Bytes], by: &[By]) -> Option<Vec<Row<'a>>> {
    let one = |body: &'a Bytes| {
        let mut rest = &body[..];
        let count = usize::try_from(take_i16(&mut rest)?).ok()?;
        let mut row = Row { exact: Vec::with_capacity(count), near: Vec::with_capacity(count) };
        for number in 0..count {
            let cell = match usize::try_from(take_i32(&mut rest)?) {
                Err(_) => None,
                Ok(length) => {
                    let (cell, after) = rest.split_at_checked(length)?;
                    rest = after;
                    Some(cell)
                }
            };
            let (exact, near) = match (by.get(number).copied().unwrap_or(By::Bytes), cell) {
                (By::Nothing, _) => (None, 0.0),
                (By::Relative(_), Some(cell)) => number_of(cell).map_or((Some(cell), 0.0), |value| (Some(&b"~"[..]), value)),
                (By::Seconds(_), Some(cell)) => moment_of(cell).map_or((Some(cell), 0.0), |value| (Some(&b"~"[..]), value)),
                (_, cell) => (cell, 0.0),
            };
            row.exact.push(exact);
            row.near.push(near);
        }
        Some(row)
    };
    rows.iter().map(one).collect()
}

fn number_of(cell: &[u8]) -> Option<f64> {
    std::str::from_utf8(cell).ok()?.parse::<f64>().ok().filter(|value| value.is_finite())
}

/// Seconds of `2024-01-31 12:00:00.5+05:30` (DateStyle ISO) since 1970; other styles are compared to the letter.
fn moment_of(cell: &[u8]) -> Option<f64> {
    let text = std::str::from_utf8(cell).ok()?;
    let (date, time) = text.split_once(' ')?;
    let mut parts = date.splitn(3, '-').map(|part| part.parse::<i64>().ok());
    let (year, month, day) = (parts.next()??, parts.next()??, parts.next()??);
    let zone_at = time.find(['+', '-']).unwrap_or(time.len());
    let (clock, zone) = (time.get(..zone_at)?, time.get(zone_at..)?);
    let mut sixty = clock.splitn(3, ':').map(|part| part.parse::<f64>().ok());
    let seconds = sixty.next()?? * 3600.0 + sixty.next()?? * 60.0 + sixty.next()??;
    let mut offset = zone.get(1..).unwrap_or_default().splitn(3, ':').map(|part| part.parse::<f64>().unwrap_or(0.0));
    let offset = offset.next().unwrap_or(0.0) * 3600.0 + offset.next().unwrap_or(0.0) * 60.0 + offset.next().unwrap_or(0.0);
    let offset = if zone.starts_with('-') { -offset } else { offset };
    // days from the civil date, Hinnant's algorithm
    let (y, m) = if month <= 2 { (year - 1, month + 9) } else { (year, month - 3) };
    let of_era = y.rem_euclid(400) * 365 + y.rem_euclid(400) / 4 - y.rem_euclid(400) / 100 + (153 * m + 2) / 5 + day - 1;
    let days = y.div_euclid(400) * 146_097 + of_era - 719_468;
    Some(days as f64 * 86_400.0 + seconds - offset)
}

fn sorting(a: &Row<'_>, b: &Row<'_>) -> Ordering {
    let near = || a.near.iter().zip(&b.near).map(|(a, b)| a.total_cmp(b)).find(|order| order.is_ne()).unwrap_or(Ordering::Equal);
    a.exact.cmp(&b.exact).then_with(near)
}

fn is_near(by: By, a: f64, b: f64) -> bool {
    match by {
        By::Relative(error) => a == b || (a - b).abs() <= error * a.abs().max(b.abs()),
        By::Seconds(seconds) => (a - b).abs() <= seconds,
        By::Bytes | By::Nothing => true,
    }
}

fn cell_agrees(a: &Row<'_>, b: &Row<'_>, by: &[By], at: usize) -> bool {
    let near = |row: &Row<'_>| row.near.get(at).copied().unwrap_or(0.0);
    a.exact.get(at) == b.exact.get(at) && is_near(by.get(at).copied().unwrap_or(By::Bytes), near(a), near(b))
}

fn agree(a: &Row<'_>, b: &Row<'_>, by: &[By]) -> bool {
    a.exact.len() == b.exact.len() && (0..a.exact.len()).all(|at| cell_agrees(a, b, by, at))
}

/// Rows of either side without a partner on the other; both sorted.
fn unmatched<'a>(left: &'a [Row<'a>], right: &'a [Row<'a>], by: &[By]) -> (Vec<&'a Row<'a>>, Vec<&'a Row<'a>>) {
    let (mut only_left, mut only_right) = (Vec::new(), Vec::new());
    let (mut lefts, mut rights) = (left.iter().peekable(), right.iter().peekable());
    loop {
        match (lefts.peek(), rights.peek()) {
            (Some(a), Some(b)) if agree(a, b, by) => drop((lefts.next(), rights.next())),
            (Some(a), Some(b)) if sorting(a, b).is_le() => only_left.extend(lefts.next()),
            (_, Some(_)) => only_right.extend(rights.next()),
            (Some(_), None) => only_left.extend(lefts.next()),
            (None, None) => return (only_left, only_right),
        }
    }
}

/// Whether the rows stand in another order: the first row that ORDER BY would have elsewhere; an error where that cannot be
/// seen; `None`: the same order. Both hold the same rows.
fn order(
    left: &[Row<'_>],
    right: &[Row<'_>],
    columns: &[(Bytes, u32)],
    by: &[By],
    order: &[OrderKey],
) -> Option<Result<usize, &'static str>> {
    if left.iter().zip(right).all(|(a, b)| agree(a, b, by)) {
        return None;
    }
    let mut complete = true;
    let mut keys = Vec::new();
    for key in order {
        let found = match key {
            OrderKey::Position(at) => Some(*at),
            OrderKey::Name(name) => {
                let mut named = columns.iter().enumerate().filter(|(_, (column, _))| &column[..] == name.as_bytes());
                named.next().map(|(at, _)| at).filter(|_| named.next().is_none())
            }
            OrderKey::Hidden => None,
        };
        match found {
            Some(at) => keys.push(at),
            None => {
                complete = false;
                break;
            }
        }
    }
    let moved = left.iter().zip(right).position(|(a, b)| keys.iter().any(|at| !cell_agrees(a, b, by, *at)));
    match moved {
        Some(at) => Some(Ok(at)),
        None if complete => None,
        None => Some(Err("rows in another order: ORDER BY uses what the answer does not show, and may leave ties open")),
    }
}

fn columns_differ(ours: &[(Bytes, u32)], theirs: &[(Bytes, u32)]) -> String {
    if ours.len() != theirs.len() {
        return format!("{} columns on the owner, {} on the shadow", ours.len(), theirs.len());
    }
    let named = |(name, oid): &(Bytes, u32)| {
        let of = tokio_postgres::types::Type::from_oid(*oid).map_or("a user's type".to_owned(), |known| known.name().to_owned());
        format!("{} {of}", String::from_utf8_lossy(name))
    };
    let differing = ours.iter().zip(theirs).enumerate().filter(|(_, (a, b))| a != b).take(CELLS_SHOWN_MAX);
    let said: Vec<_> =
        differing.map(|(at, (a, b))| format!("column {}: {} on the owner, {} on the shadow", at + 1, named(a), named(b))).collect();
    said.join("; ")
}

/// The first row without a partner, beside the one on the other side that is most like it.
fn rows_differ(only_left: &[&Row<'_>], only_right: &[&Row<'_>], columns: &[(Bytes, u32)], by: &[By]) -> String {
    let counts = format!("{} rows only on the owner, {} only on the shadow", only_left.len(), only_right.len());
    let name = |at: usize| columns.get(at).map_or(format!("column {}", at + 1), |(name, _)| String::from_utf8_lossy(name).into_owned());
    let size = |cell: Option<&&[u8]>, near: bool| match (cell, near) {
        (None, _) => "NULL".to_owned(),
        (Some(_), true) => "a number".to_owned(),
        (Some(cell), false) => format!("{} bytes", cell.len()),
    };
    let is_near = |at: usize| !matches!(by.get(at), None | Some(By::Bytes | By::Nothing));
    let cell = |row: &Row<'_>, at: usize| size(row.exact.get(at).and_then(Option::as_ref), is_near(at));
    let alike = |a: &Row<'_>, b: &Row<'_>| (0..a.exact.len()).filter(|at| cell_agrees(a, b, by, *at)).count();
    let shown = match (only_left.first(), only_right.first()) {
        (Some(ours), Some(_)) => {
            let partner = only_right.iter().take(PARTNERS_MAX).max_by_key(|row| alike(ours, row));
            let Some(theirs) = partner else { return counts };
            let cells =
                (0..ours.exact.len().max(theirs.exact.len())).take(CELLS_SHOWN_MAX).map(|at| match cell_agrees(ours, theirs, by, at) {
                    true => format!("{} =", name(at)),
                    false => format!("{} {} on the owner, {} on the shadow", name(at), cell(ours, at), cell(theirs, at)),
                });
            cells.collect::<Vec<_>>().join(", ")
        }
        (Some(row), None) | (None, Some(row)) => {
            (0..row.exact.len()).take(CELLS_SHOWN_MAX).map(|at| format!("{} {}", name(at), cell(row, at))).collect::<Vec<_>>().join(", ")
        }
        (None, None) => return counts,
    };
    format!("{counts}; one: ({shown})")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sql::{CatalogFacts, Classifier};
    use crate::wire::Message;
    use std::{sync::Arc, time::Duration};

    const TEXT: u32 = 25;
    const INT: u32 = 23;

    fn answer(columns: &[(&'static str, u32)], rows: &[&[Option<&str>]]) -> Answer {
        let mut answer = Answer::keeping();
        answer.columns = Some(columns.iter().map(|(name, oid)| (Bytes::from(*name), *oid)).collect());
        for row in rows {
            let mut body = (row.len() as i16).to_be_bytes().to_vec();
            for cell in *row {
                match cell {
                    None => body.extend((-1i32).to_be_bytes()),
                    Some(cell) => {
                        body.extend((cell.len() as i32).to_be_bytes());
                        body.extend(cell.as_bytes());
                    }
                }
            }
            answer.take_in(&Message { tag: b'D', body: body.into() });
        }
        answer
    }

    fn class(text: &str) -> Arc<Class> {
        Classifier::new(CatalogFacts::builtin_only()).classify(text.as_bytes())
    }

    fn rule(name: &str) -> IgnoreRule {
        IgnoreRule { name: name.into(), ..IgnoreRule::default() }
    }

    const COLUMNS: [(&str, u32); 2] = [("id", INT), ("v", TEXT)];

    #[test]
    fn each_injected_difference_is_named() {
        let ours = answer(&COLUMNS, &[&[Some("1"), Some("geheim")], &[Some("2"), Some("b")]]);
        let by_id = class("select id, v from t order by id");
        let named = |theirs: &Answer| match compare(&ours, theirs, &by_id, &crate::sql::order_of(&by_id.text), &[]) {
            Outcome::Different(difference, evidence) => {
                assert!(!evidence.contains("geheim") && !evidence.contains("anders"), "{evidence}");
                (difference, evidence)
            }
            other => panic!("{other:?}"),
        };
        let (difference, evidence) = named(&answer(&COLUMNS, &[&[Some("1"), Some("ganz anders")], &[Some("2"), Some("b")]]));
        assert_eq!(difference, Difference::Values);
        assert!(evidence.contains("id =, v 6 bytes on the owner, 11 bytes on the shadow"), "{evidence}");
        let (difference, evidence) = named(&answer(&COLUMNS, &[&[Some("2"), Some("b")]]));
        assert_eq!(difference, Difference::RowCount);
        assert!(evidence.starts_with("1 rows only on the owner, 0 only on the shadow"), "{evidence}");
        let swapped = answer(&COLUMNS, &[&[Some("2"), Some("b")], &[Some("1"), Some("geheim")]]);
        assert_eq!(named(&swapped), (Difference::Order, "from row 1 on".into()));
        let (difference, evidence) = named(&answer(&[("id", 20), ("v", TEXT)], &[&[Some("1"), Some("geheim")], &[Some("2"), Some("b")]]));
        assert_eq!((difference, evidence.as_str()), (Difference::Columns, "column 1: id int4 on the owner, id int8 on the shadow"));
        let mut failed = Answer::keeping();
        failed.sqlstate = Some("42P01".into());
        assert_eq!(named(&failed), (Difference::Sqlstate, "succeeded on the owner, SQLSTATE 42P01 on the shadow".into()));
        let null = answer(&COLUMNS, &[&[Some("1"), None], &[Some("2"), Some("b")]]);
        assert!(named(&null).1.contains("NULL on the shadow"));
    }

    #[test]
    fn ties_are_no_difference_and_hidden_keys_are_undecided() {
        let ours = answer(&COLUMNS, &[&[Some("1"), Some("x")], &[Some("2"), Some("x")]]);
        let theirs = answer(&COLUMNS, &[&[Some("2"), Some("x")], &[Some("1"), Some("x")]]);
        let of = |text: &str| compare(&ours, &theirs, &class(text), &crate::sql::order_of(text), &[]);
        for tied in ["select id, v from t order by v", "select id, v from t order by 2", "select id, v from t"] {
            assert!(matches!(of(tied), Outcome::Same(_)), "{tied}");
        }
        for decided in ["select id, v from t order by v, id", "select id, v from t order by 1 desc", "select t.id, v from t order by t.id"]
        {
            assert!(matches!(of(decided), Outcome::Different(Difference::Order, _)), "{decided}");
        }
        for hidden in
            ["select id, v from t order by w", "select id, v from t order by lower(v)", "select -id as id, v from t order by t.id"]
        {
            assert!(matches!(of(hidden), Outcome::Undecided(_)), "{hidden}");
        }
    }

    #[test]
    fn floats_agree_but_for_their_last_digits() {
        let columns = [("id", INT), ("f", FLOAT8)];
        let ours = answer(&columns, &[&[Some("1"), Some("0.30000000000000004")], &[Some("1"), Some("7")]]);
        let sum = class("select id, sum(f) as f from t group by id");
        let same = answer(&columns, &[&[Some("1"), Some("7")], &[Some("1"), Some("0.3")]]);
        assert!(matches!(compare(&ours, &same, &sum, &[], &[]), Outcome::Same(Some(_))));
        let other = answer(&columns, &[&[Some("1"), Some("7")], &[Some("1"), Some("0.3001")]]);
        assert!(matches!(compare(&ours, &other, &sum, &[], &[]), Outcome::Different(Difference::Values, _)));
        let wide = [IgnoreRule { floats: Some(0.01), ..rule("rounding") }];
        assert_eq!(compare(&ours, &other, &sum, &[], &wide), Outcome::Same(Some("ignored by rule rounding".into())));
    }

    #[test]
    fn rules_concern_what_they_name_and_count_by_name() {
        let columns = [("id", INT), ("seen", 1184)];
        let at = |seen| answer(&columns, &[&[Some("1"), Some(seen)]]);
        let (ours, theirs) = (at("2024-01-31 23:59:59.5+00"), at("2024-02-01 01:00:00+01"));
        let reading = class("select id, seen from t");
        let rules = |rule: IgnoreRule| [IgnoreRule { columns: vec!["other".into()], ..super::tests::rule("first") }, rule];
        let by = |rule| compare(&ours, &theirs, &reading, &[], &rules(rule));
        let ignored = Outcome::Same(Some("ignored by rule clock".into()));
        assert_eq!(by(IgnoreRule { columns: vec!["seen".into()], ..rule("clock") }), ignored);
        assert_eq!(by(IgnoreRule { times: Some(Duration::from_secs(1)), ..rule("clock") }), ignored);
        assert_eq!(by(IgnoreRule { differences: vec!["values".into()], ..rule("clock") }), ignored);
        assert_eq!(by(IgnoreRule { columns: vec!["seen".into()], tables: vec!["t".into()], ..rule("clock") }), ignored);
        for elsewhere in [
            IgnoreRule { columns: vec!["seen".into()], tables: vec!["u".into()], ..rule("clock") },
            IgnoreRule { columns: vec!["seen".into()], fingerprint: Some(1), ..rule("clock") },
            IgnoreRule { times: Some(Duration::from_millis(100)), ..rule("clock") },
        ] {
            assert!(matches!(by(elsewhere), Outcome::Different(..)));
        }
    }
}
