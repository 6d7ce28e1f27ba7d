//! The model's view of a live database: its own columns and their defaults are its memory from the first minute.

use super::t1::{ColumnCase, ProjectMemory, class_of};
use crate::schema::catalog::{Catalog, Column, Table};

/// The spelling of the training data.
fn type_of(column: &Column) -> String {
    match column.type_kind.as_str() {
        "e" => format!("enum:{}", column.type_name),
        _ => column.type_name.clone(),
    }
}

/// A column of a table as a case for the model.
pub fn case(table: &Table, column: &Column) -> ColumnCase {
    let single = |kinds: &[&str]| table.constraints.iter().any(|item| kinds.contains(&item.kind.as_str()) && item.columns == [column.num]);
    ColumnCase {
        table: table.name.clone(),
        column: column.name.clone(),
        type_name: type_of(column),
        not_null: column.not_null,
        foreign_key: table.constraints.iter().any(|item| item.kind == "f" && item.columns.contains(&column.num)),
        indexed: table.indexes.iter().any(|index| index.columns.contains(&column.num)),
        unique: single(&["p", "u"]) || table.indexes.iter().any(|index| index.unique && index.columns == [column.num]),
        siblings: table.columns.iter().filter(|other| other.num != column.num).map(|other| (other.name.clone(), type_of(other))).collect(),
        check_list: table.constraints.iter().any(|item| item.kind == "c" && item.columns == [column.num] && item.def.contains("ANY")),
        // a table that holds rows is past its first migrations
        old_table: true,
    }
}

/// The class of a default expression; `None`: it says nothing about a value (a sequence, an expression of its own).
pub fn class_of_default(column: &Column) -> Option<usize> {
    if !column.identity.is_empty() || !column.generated.is_empty() {
        return None;
    }
    let Some(default) = column.default.as_deref() else {
        // NOT NULL without a default: the application gives the value
        return if column.not_null { None } else { class_of("null") };
    };
    let name = match default.trim() {
        "false" => "false",
        "true" => "true",
        text if text.starts_with("NULL") => "null",
        text if text.contains("nextval(") => return None,
        text if text.starts_with("now()")
            || text.starts_with("CURRENT_")
            || text.contains("clock_timestamp")
            || text.contains("transaction_timestamp") =>
        {
            "now"
        }
        text => match text.strip_prefix('\'') {
            Some(rest) => {
                let value = rest.split("'::").next().unwrap_or("").trim_end_matches('\'');
                match (value, column.type_kind.as_str()) {
                    (_, "e") => "enum_label",
                    ("", _) => "empty_str",
                    ("{}", _) if column.type_name.ends_with("[]") => "empty_array",
                    ("{}", _) => "empty_obj",
                    ("[]", _) => "empty_array",
                    (value, _) if value.parse::<f64>().is_ok() => numeric(value),
                    _ => "str_const",
                }
            }
            None if text.starts_with("ARRAY[]") => "empty_array",
            None if text.trim_matches(['(', ')']).parse::<f64>().is_ok() => numeric(text.trim_matches(['(', ')'])),
            None => "other",
        },
    };
    class_of(name)
}

fn numeric(text: &str) -> &'static str {
    match text.parse::<f64>() {
        Ok(0.0) => "zero",
        Ok(1.0) => "one",
        _ => "num_other",
    }
}

/// What this database does: every column of every table, except one that is being asked about.
pub fn memory(catalog: &Catalog, except: Option<(&str, &str, &str)>) -> ProjectMemory {
    let mut memory = ProjectMemory::default();
    for table in catalog.tables.values().filter(|table| table.holds_rows() && !table.is_partition) {
        for column in &table.columns {
            if except == Some((&table.schema, &table.name, &column.name)) {
                continue;
            }
            if let Some(class) = class_of_default(column) {
                memory.learn(&case(table, column), class, 1.0);
            }
        }
    }
    memory
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::model::t1::CLASSES;

    #[test]
    fn defaults() {
        for (type_name, kind, default, expected) in [
            ("boolean", "b", "false", Some("false")),
            ("text", "b", "'x'::text", Some("str_const")),
            ("text", "b", "''::text", Some("empty_str")),
            ("integer", "b", "0", Some("zero")),
            ("numeric(10,2)", "b", "1.5", Some("num_other")),
            ("numeric", "b", "'-1'::integer", Some("num_other")),
            ("public.mood", "e", "'ok'::public.mood", Some("enum_label")),
            ("jsonb", "b", "'{}'::jsonb", Some("empty_obj")),
            ("text[]", "b", "'{}'::text[]", Some("empty_array")),
            ("timestamp with time zone", "b", "now()", Some("now")),
            ("bigint", "b", "nextval('public.s'::regclass)", None),
        ] {
            let column = Column { type_name: type_name.into(), type_kind: kind.into(), default: Some(default.into()), ..Column::default() };
            assert_eq!(class_of_default(&column).map(|class| CLASSES[class]), expected, "{default}");
        }
        assert_eq!(class_of_default(&Column::default()), class_of("null"));
        assert_eq!(class_of_default(&Column { not_null: true, ..Column::default() }), None);
    }
}
