//! USING expressions for type changes that need one; each was run on PostgreSQL 15. `{c}` is the quoted column.

use super::types::TypeName;

/// An expression and the ones that are as plausible.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Using {
    /// Best first; never empty.
    pub expressions: Vec<String>,
}

fn is_text(base: &str) -> bool {
    matches!(base, "text" | "varchar" | "char" | "citext")
}

fn is_integer(base: &str) -> bool {
    matches!(base, "smallint" | "integer" | "bigint")
}

fn is_number(base: &str) -> bool {
    is_integer(base) || matches!(base, "real" | "double precision" | "numeric")
}

/// Expressions that turn `column` (quoted) from `old` into `new`; `new_sql` is the new type as SQL.
pub fn using(old: &TypeName, new: &TypeName, new_sql: &str, column: &str) -> Using {
    let templates = templates(old, new);
    let mut expressions: Vec<String> = templates.iter().map(|template| template.replace("{c}", column).replace("{t}", new_sql)).collect();
    for general in ["{c}::{t}", "{c}::text::{t}"] {
        let expression = general.replace("{c}", column).replace("{t}", new_sql);
        if !expressions.contains(&expression) {
            expressions.push(expression);
        }
    }
    Using { expressions }
}

fn templates(old: &TypeName, new: &TypeName) -> &'static [&'static str] {
    match (old.base.as_str(), old.array, new.base.as_str(), new.array) {
        ("text" | "varchar", false, "text" | "varchar", true) => &["ARRAY[{c}]", "string_to_array({c}, ',')"],
        ("text" | "varchar", true, "text" | "varchar", false) => &["array_to_string({c}, ',')"],
        (_, true, "json" | "jsonb", false) => &["to_jsonb({c})::{t}"],
        ("json" | "jsonb", false, _, true) => &["translate({c}::text, '[]', '{}')::{t}"],
        (_, true, _, true) => &["{c}::{t}"],
        (_, true, _, _) | (_, _, _, true) => &[],
        ("boolean", _, "bigint" | "smallint", _) => &["{c}::int::{t}"],
        (old, _, "boolean", _) if is_number(old) => &["{c} <> 0"],
        ("timestamptz" | "timestamp", _, "bigint", _) => &["(extract(epoch FROM {c}) * 1000)::bigint", "extract(epoch FROM {c})::bigint"],
        (old, _, "timestamptz", _) if is_integer(old) => &["to_timestamp({c})", "to_timestamp({c} / 1000.0)"],
        ("timestamp", _, "timestamptz", _) | ("timestamptz", _, "timestamp", _) => &["{c} AT TIME ZONE 'UTC'"],
        (old, _, "jsonb" | "json", _) if is_text(old) => &["{c}::{t}", "to_json({c})::{t}"],
        ("jsonb", _, new, _) if is_text(new) => &["{c} #>> '{}'"],
        ("uuid", _, "bytea", _) => &["uuid_send({c})"],
        ("bytea", _, "uuid", _) => &["encode({c}, 'hex')::uuid"],
        ("bytea", _, new, _) if is_text(new) => &["convert_from({c}, 'UTF8')"],
        (old, _, "bytea", _) if is_text(old) => &["convert_to({c}, 'UTF8')"],
        (old, _, new, _) if is_text(old) && is_integer(new) => &["nullif(trim({c}), '')::{t}"],
        (old, _, new, _) if is_text(old) && is_number(new) => &["nullif(trim({c}), '')::{t}", "replace({c}, ',', '.')::{t}"],
        ("date", _, new, _) if is_integer(new) => &["to_char({c}, 'YYYYMMDD')::{t}"],
        (old, _, "date", _) if is_integer(old) => &["to_date({c}::text, 'YYYYMMDD')"],
        (old, _, "interval", _) if is_integer(old) => &["make_interval(secs => {c})"],
        ("interval", _, new, _) if is_integer(new) => &["extract(epoch FROM {c})::{t}"],
        (old, _, "enum", _) if is_text(old) => &["{c}::{t}", "lower({c})::{t}"],
        (old, _, "enum", _) if is_integer(old) => &["(enum_range(NULL::{t}))[{c}]"],
        ("enum", _, "enum", _) => &["{c}::text::{t}"],
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions() {
        for (old, old_kind, new, new_kind, expected) in [
            ("text", "b", "integer", "b", "nullif(trim(\"c\"), '')::integer"),
            ("boolean", "b", "bigint", "b", "\"c\"::int::bigint"),
            ("integer", "b", "boolean", "b", "\"c\" <> 0"),
            ("text", "b", "public.mood", "e", "\"c\"::public.mood"),
            ("public.a", "e", "public.b", "e", "\"c\"::text::public.b"),
            ("text", "b", "text[]", "b", "ARRAY[\"c\"]"),
            ("inet", "b", "uuid", "b", "\"c\"::uuid"),
        ] {
            let found = using(&TypeName::parse(old, old_kind), &TypeName::parse(new, new_kind), new, "\"c\"");
            assert_eq!(found.expressions[0], expected);
        }
    }
}
