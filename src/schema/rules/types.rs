//! The verdict for `ALTER COLUMN TYPE`: a table lookup plus arithmetic on lengths, precisions and array elements.

use std::{collections::HashMap, sync::OnceLock};

/// What PostgreSQL does with the rows when a column's type changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Catalog only.
    Free,
    /// Accepted without USING, rewritten, nothing lost.
    Rewrite,
    /// Accepted without USING, silently loses.
    Lossy,
    /// Accepted without USING, fails on some data (never loses).
    DataDependent,
    /// Needs USING; lossless.
    UsingSafe,
    /// Needs USING; loses.
    UsingLossy,
    /// Needs USING; fails on some data.
    UsingDataDependent,
    /// Text to be parsed: needs USING, fails on some data.
    Parse,
    /// No cast even through text: an expression is needed.
    NoCast,
}

impl Verdict {
    /// The statement works without USING.
    pub fn works_alone(self) -> bool {
        matches!(self, Verdict::Free | Verdict::Rewrite | Verdict::Lossy | Verdict::DataDependent)
    }

    /// May destroy what a row holds.
    pub fn loses_data(self) -> bool {
        matches!(self, Verdict::Lossy | Verdict::UsingLossy | Verdict::NoCast)
    }

    /// How sure it is that carrying out the change as the rule says is what a person would do.
    pub fn confidence(self) -> f64 {
        match self {
            Verdict::Free => 0.99,
            Verdict::Rewrite => 0.98,
            Verdict::DataDependent => 0.90,
            Verdict::Lossy | Verdict::UsingSafe => 0.85,
            Verdict::UsingDataDependent | Verdict::UsingLossy => 0.65,
            Verdict::Parse => 0.6,
            Verdict::NoCast => 0.35,
        }
    }

    /// For people.
    pub fn explain(self) -> &'static str {
        match self {
            Verdict::Free => "a catalog change only, no row is touched",
            Verdict::Rewrite => "the table is rewritten, every value is kept",
            Verdict::Lossy => "PostgreSQL accepts it and silently loses digits, time of day or order",
            Verdict::DataDependent => "it fails on values that do not fit, and loses none",
            Verdict::UsingSafe => "it needs a USING expression, which keeps every value",
            Verdict::UsingLossy => "it needs a USING expression, which loses information",
            Verdict::UsingDataDependent => "it needs a USING expression, which fails on some values",
            Verdict::Parse => "text must be parsed: the USING expression fails on values that do not parse",
            Verdict::NoCast => "there is no cast: only an expression that a person confirms can say what is meant",
        }
    }

    fn from_code(code: &str) -> Option<Self> {
        Some(match code {
            "F" => Verdict::Free,
            "R" => Verdict::Rewrite,
            "L" => Verdict::Lossy,
            "D" => Verdict::DataDependent,
            "U" => Verdict::UsingSafe,
            "UL" => Verdict::UsingLossy,
            "UD" => Verdict::UsingDataDependent,
            "P" => Verdict::Parse,
            "x" => Verdict::NoCast,
            _ => return None,
        })
    }
}

/// A type taken apart: `timestamp(3) without time zone` is `timestamp` with `[3]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TypeName {
    /// Short name without modifiers and array brackets; `enum` for enums.
    pub base: String,
    /// Modifiers.
    pub modifiers: Vec<i64>,
    /// An array of it.
    pub array: bool,
}

impl TypeName {
    /// From `format_type` text and `pg_type.typtype`; a domain must be resolved to its base type before.
    pub fn parse(text: &str, kind: &str) -> Self {
        let (text, array) = match text.strip_suffix("[]") {
            Some(element) => (element, true),
            None => (text, false),
        };
        let (name, modifiers) = match (text.find('('), text.find(')')) {
            (Some(open), Some(close)) if open < close => {
                let modifiers = text[open + 1..close].split(',').filter_map(|part| part.trim().parse().ok()).collect();
                (format!("{}{}", &text[..open], &text[close + 1..]), modifiers)
            }
            _ => (text.to_owned(), Vec::new()),
        };
        let base = match name.trim() {
            "character varying" => "varchar",
            "character" | "bpchar" => "char",
            "timestamp without time zone" => "timestamp",
            "timestamp with time zone" => "timestamptz",
            "time without time zone" => "time",
            "time with time zone" => "timetz",
            "bool" => "boolean",
            "int" | "int4" => "integer",
            "int2" => "smallint",
            "int8" => "bigint",
            "float4" => "real",
            "float8" => "double precision",
            "decimal" => "numeric",
            other => other.rsplit('.').next().unwrap_or(other).trim_matches('"'),
        };
        let base = if kind == "e" && !array { "enum" } else { base };
        TypeName { base: base.to_owned(), modifiers, array }
    }

    fn first(&self) -> Option<i64> {
        self.modifiers.first().copied()
    }

    /// Text of any length.
    pub fn is_unlimited_text(&self) -> bool {
        !self.array && (matches!(self.base.as_str(), "text" | "citext") || (self.base == "varchar" && self.modifiers.is_empty()))
    }
}

/// Lengths that the measured table stands for: shorter than this counts as `varchar(10)`, else as `varchar(50)`.
const LONG_TEXT: i64 = 50;

fn matrix() -> &'static HashMap<(String, String), Verdict> {
    static MATRIX: OnceLock<HashMap<(String, String), Verdict>> = OnceLock::new();
    MATRIX.get_or_init(|| {
        let mut lines = include_str!("type_changes.csv").lines().filter(|line| !line.starts_with('#'));
        let header: Vec<&str> = lines.next().unwrap_or("").split(';').skip(1).collect();
        let mut table = HashMap::new();
        for line in lines {
            let mut cells = line.split(';');
            let old = cells.next().unwrap_or("");
            for (new, code) in header.iter().zip(cells) {
                if let Some(verdict) = Verdict::from_code(code) {
                    table.insert((old.to_owned(), (*new).to_owned()), verdict);
                }
            }
        }
        table
    })
}

/// What a column of type `old` becoming `new` means for its rows.
pub fn verdict(old: &TypeName, new: &TypeName) -> Verdict {
    if old.array && new.array {
        return match verdict(&TypeName { array: false, ..old.clone() }, &TypeName { array: false, ..new.clone() }) {
            // the whole array is rewritten as soon as its elements are
            kept @ (Verdict::Free | Verdict::Rewrite | Verdict::Lossy | Verdict::DataDependent) => kept,
            Verdict::UsingSafe => Verdict::UsingSafe,
            other => other,
        };
    }
    if old.array || new.array {
        return lookup(&representative(old, new.is_unlimited_text()), &representative(new, false));
    }
    if old.base == new.base {
        return same_base(old, new);
    }
    match (old.base.as_str(), new.base.as_str()) {
        ("varchar", "text") => Verdict::Free,
        ("text", "varchar") if new.modifiers.is_empty() => Verdict::Free,
        _ => lookup(&representative(old, true), &representative(new, false)),
    }
}

fn same_base(old: &TypeName, new: &TypeName) -> Verdict {
    if old.modifiers == new.modifiers && old.base != "enum" {
        return Verdict::Free;
    }
    match old.base.as_str() {
        "enum" => Verdict::UsingDataDependent,
        "varchar" | "varbit" => match (old.first(), new.first()) {
            (_, None) => Verdict::Free,
            (Some(from), Some(to)) if to >= from => Verdict::Free,
            _ => Verdict::DataDependent,
        },
        "char" | "bit" => match (old.first().unwrap_or(1), new.first().unwrap_or(1)) {
            (from, to) if to >= from => Verdict::Rewrite,
            _ => Verdict::DataDependent,
        },
        "numeric" => match (old.modifiers.as_slice(), new.modifiers.as_slice()) {
            (_, []) => Verdict::Free,
            ([], _) => Verdict::Lossy,
            (from, to) => {
                let (precision_from, scale_from) = (from[0], from.get(1).copied().unwrap_or(0));
                let (precision_to, scale_to) = (to[0], to.get(1).copied().unwrap_or(0));
                match () {
                    () if scale_to < scale_from => Verdict::Lossy,
                    () if precision_to - scale_to < precision_from - scale_from => Verdict::DataDependent,
                    () if scale_to == scale_from => Verdict::Free,
                    () => Verdict::Rewrite,
                }
            }
        },
        "timestamp" | "timestamptz" | "time" | "timetz" | "interval" => match (old.first().unwrap_or(6), new.first().unwrap_or(6)) {
            (from, to) if to >= from => Verdict::Free,
            _ => Verdict::Lossy,
        },
        _ => Verdict::NoCast,
    }
}

/// The measured type that stands for `name`.
fn representative(name: &TypeName, is_old: bool) -> String {
    if name.array {
        return match name.base.as_str() {
            "text" => "text[]".into(),
            "varchar" => "varchar(50)[]".into(),
            "integer" => "integer[]".into(),
            other => format!("{other}[]"),
        };
    }
    match name.base.as_str() {
        // an old length says little about what fits; a new one below the longest text form of a number or date can fail
        "varchar" => match name.first() {
            None => "varchar".into(),
            Some(length) if is_old || length >= LONG_TEXT => "varchar(50)".into(),
            Some(_) => "varchar(10)".into(),
        },
        "char" => "char(10)".into(),
        "numeric" if !name.modifiers.is_empty() => "numeric(10,2)".into(),
        "bit" => "bit(8)".into(),
        "enum" => "e1".into(),
        other => other.to_owned(),
    }
}

fn lookup(old: &str, new: &str) -> Verdict {
    if let Some(verdict) = matrix().get(&(old.to_owned(), new.to_owned())) {
        return *verdict;
    }
    match new {
        // the assignment through text output exists for every type
        "text" | "varchar" => Verdict::Rewrite,
        "varchar(50)" | "varchar(10)" | "char(10)" => Verdict::DataDependent,
        _ if matches!(old, "text" | "varchar" | "varchar(50)" | "varchar(10)" | "char(10)" | "citext") => Verdict::Parse,
        _ => Verdict::NoCast,
    }
}

/// A column that still has type `old` takes the text of every value of type `new`, and loses nothing of it.
pub fn accepts(old: &TypeName, new: &TypeName) -> bool {
    old.is_unlimited_text() || matches!(verdict(new, old), Verdict::Free | Verdict::Rewrite)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(old: &str, new: &str) -> Verdict {
        verdict(&TypeName::parse(old, "b"), &TypeName::parse(new, "b"))
    }

    #[test]
    fn the_table_is_complete() {
        assert_eq!(matrix().len(), 1482);
    }

    #[test]
    fn verdicts() {
        for (old, new, expected) in [
            ("integer", "bigint", Verdict::Rewrite),
            ("bigint", "integer", Verdict::DataDependent),
            ("character varying(20)", "character varying(40)", Verdict::Free),
            ("character varying(40)", "character varying(20)", Verdict::DataDependent),
            ("character varying(40)", "text", Verdict::Free),
            ("text", "character varying", Verdict::Free),
            ("text", "character varying(9)", Verdict::DataDependent),
            ("numeric(10,2)", "numeric(12,2)", Verdict::Free),
            ("numeric(10,2)", "numeric(12,4)", Verdict::Rewrite),
            ("numeric(10,2)", "numeric(10,4)", Verdict::DataDependent),
            ("numeric(10,2)", "numeric(10,1)", Verdict::Lossy),
            ("numeric(10,2)", "numeric", Verdict::Free),
            ("timestamp(3) without time zone", "timestamp(6) without time zone", Verdict::Free),
            ("timestamp with time zone", "date", Verdict::Lossy),
            ("timestamp without time zone", "timestamp with time zone", Verdict::Lossy),
            ("text", "integer", Verdict::Parse),
            ("boolean", "integer", Verdict::UsingSafe),
            ("integer", "boolean", Verdict::UsingLossy),
            ("date", "integer", Verdict::NoCast),
            ("integer[]", "bigint[]", Verdict::Rewrite),
            ("json", "jsonb", Verdict::Lossy),
            ("point", "text", Verdict::Rewrite),
            ("text", "point", Verdict::Parse),
        ] {
            assert_eq!(check(old, new), expected, "{old} -> {new}");
        }
        assert_eq!(verdict(&TypeName::parse("public.a", "e"), &TypeName::parse("public.b", "e")), Verdict::UsingDataDependent);
    }

    #[test]
    fn what_an_old_column_takes() {
        let accepts = |old, new| accepts(&TypeName::parse(old, "b"), &TypeName::parse(new, "b"));
        assert!(accepts("text", "jsonb") && accepts("bigint", "integer") && accepts("character varying(50)", "character varying(10)"));
        assert!(!accepts("integer", "text") && !accepts("integer", "bigint") && !accepts("boolean", "integer"));
    }

    proptest! {
        #[test]
        fn any_text_is_a_type_name(old in ".{0,40}", new in ".{0,40}", kind in "[bedcr]") {
            let (old, new) = (TypeName::parse(&old, &kind), TypeName::parse(&new, &kind));
            verdict(&old, &new);
            accepts(&old, &new);
        }

        #[test]
        fn widening_is_free_and_narrowing_is_not(a in 1i64..5000, b in 1i64..5000) {
            let verdict = check(&format!("character varying({a})"), &format!("character varying({b})"));
            prop_assert_eq!(verdict, if b >= a { Verdict::Free } else { Verdict::DataDependent });
        }
    }
}
