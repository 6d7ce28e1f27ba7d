//! SQL and data of a set of rows of one table: statements whose parameters are one array per column, and COPY. Pure.
//!
//! Values travel in text form and are read by their types' own input functions, as in the statements of single rows: as elements of
//! an array of the column's type, or, where there is no such array that takes one element per row (arrays themselves, types with
//! another delimiter), as texts that are cast one by one.

use super::{
    names::ident,
    pgoutput::{Tuple, Value},
    plan::Plan,
    session::Text,
};
use bytes::{BufMut, Bytes, BytesMut};

/// SQL whose parameters are arrays, and the positions of the columns that they hold.
pub(super) struct Many {
    pub sql: String,
    pub positions: Vec<usize>,
}

impl Plan {
    /// `unnest($1::type[], …) AS u (c0, …)`, and how to name the columns of `u`.
    fn unnest(&self, positions: &[usize]) -> (String, Vec<String>) {
        let (mut arrays, mut names, mut values) = (Vec::new(), Vec::new(), Vec::new());
        for (number, position) in positions.iter().enumerate() {
            let Some(target) = self.columns.get(*position) else { continue };
            let as_is = target.listable && target.using.is_none();
            let kind = if as_is { target.type_name.as_str() } else { "text" };
            arrays.push(format!("${}::{kind}[]", number + 1));
            names.push(format!("c{number}"));
            values.push(if as_is { format!("u.c{number}") } else { target.value(&format!("u.c{number}")) });
        }
        (format!("unnest({}) AS u ({})", arrays.join(", "), names.join(", ")), values)
    }

    fn name(&self, position: usize) -> String {
        self.relation.columns.get(position).map(|column| ident(&column.name)).unwrap_or_default()
    }

    fn same_key(&self, values: &[String]) -> String {
        let terms: Vec<String> =
            self.key().iter().zip(values).map(|(position, value)| format!("t.{} = {value}", self.name(*position))).collect();
        terms.join(" AND ")
    }

    /// Deletes the rows with the keys given.
    pub fn delete_many(&self) -> Many {
        let positions = self.key().to_vec();
        let (unnest, values) = self.unnest(&positions);
        Many { sql: format!("DELETE FROM {} AS t USING {unnest} WHERE {}", self.rows_of(), self.same_key(&values)), positions }
    }

    /// Gives the rows with the keys given new values, except in the columns `kept`; `None`: nothing to change.
    pub fn update_many(&self, kept: &[usize]) -> Option<Many> {
        let mut positions = self.key().to_vec();
        for (position, target) in self.columns.iter().enumerate() {
            if !(target.generated || target.identity_always || positions.contains(&position) || kept.contains(&position)) {
                positions.push(position);
            }
        }
        let (unnest, values) = self.unnest(&positions);
        let keys = self.key().len();
        let set: Vec<String> =
            positions.iter().zip(&values).skip(keys).map(|(position, value)| format!("{} = {value}", self.name(*position))).collect();
        if set.is_empty() {
            return None;
        }
        let sql = format!("UPDATE {} AS t SET {} FROM {unnest} WHERE {}", self.rows_of(), set.join(", "), self.same_key(&values));
        Some(Many { sql, positions })
    }

    fn written(&self) -> Vec<usize> {
        self.columns.iter().enumerate().filter(|(_, target)| !target.generated).map(|(position, _)| position).collect()
    }

    fn written_names(&self, positions: &[usize]) -> String {
        positions.iter().map(|position| self.name(*position)).collect::<Vec<_>>().join(", ")
    }

    /// Inserts rows.
    pub fn insert_many(&self) -> Many {
        let positions = self.written();
        let (unnest, values) = self.unnest(&positions);
        let names = self.written_names(&positions);
        let sql = format!("INSERT INTO {} ({names}) OVERRIDING SYSTEM VALUE SELECT {} FROM {unnest}", self.target(), values.join(", "));
        Many { sql, positions }
    }

    /// COPY can take its rows: nothing has to be computed.
    pub fn takes_copy(&self) -> bool {
        self.columns.iter().all(|column| column.using.is_none())
    }

    /// Takes rows as COPY data.
    pub fn copy_many(&self) -> Many {
        let positions = self.written();
        Many { sql: format!("COPY {} ({}) FROM STDIN", self.target(), self.written_names(&positions)), positions }
    }
}

impl Many {
    /// One array per column.
    pub fn arrays<'a>(&self, rows: impl Iterator<Item = &'a Tuple> + Clone) -> Vec<Text> {
        let array = |position: &usize| {
            let mut out = BytesMut::new();
            out.put_u8(b'{');
            for (number, row) in rows.clone().enumerate() {
                if number > 0 {
                    out.put_u8(b',');
                }
                put_element(&mut out, row.get(*position));
            }
            out.put_u8(b'}');
            Text(Some(out.freeze()))
        };
        self.positions.iter().map(array).collect()
    }

    /// COPY's text format.
    pub fn lines<'a>(&self, rows: impl Iterator<Item = &'a Tuple>) -> Bytes {
        let mut out = BytesMut::new();
        for row in rows {
            for (number, position) in self.positions.iter().enumerate() {
                if number > 0 {
                    out.put_u8(b'\t');
                }
                put_field(&mut out, row.get(*position));
            }
            out.put_u8(b'\n');
        }
        out.freeze()
    }
}

/// An element of an array's text form. Only what can mean nothing else goes without quotes.
fn put_element(out: &mut BytesMut, value: Option<&Value>) {
    let Some(Value::Text(bytes)) = value else {
        out.put_slice(b"NULL");
        return;
    };
    if !bytes.is_empty() && bytes.iter().all(|byte| byte.is_ascii_digit() || b"-.:".contains(byte)) {
        out.put_slice(bytes);
        return;
    }
    out.put_u8(b'"');
    for part in bytes.split_inclusive(|byte| matches!(byte, b'"' | b'\\')) {
        match part.split_last() {
            Some((special @ (b'"' | b'\\'), head)) => {
                out.put_slice(head);
                out.put_slice(&[b'\\', *special]);
            }
            _ => out.put_slice(part),
        }
    }
    out.put_u8(b'"');
}

/// A field of a COPY line.
fn put_field(out: &mut BytesMut, value: Option<&Value>) {
    let Some(Value::Text(bytes)) = value else {
        out.put_slice(b"\\N");
        return;
    };
    for part in bytes.split_inclusive(|byte| matches!(byte, b'\\' | b'\n' | b'\r' | b'\t')) {
        match part.split_last() {
            Some((special @ (b'\\' | b'\n' | b'\r' | b'\t'), head)) => {
                out.put_slice(head);
                let letter = match special {
                    b'\n' => b'n',
                    b'\r' => b'r',
                    b'\t' => b't',
                    other => *other,
                };
                out.put_slice(&[b'\\', letter]);
            }
            _ => out.put_slice(part),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cdc::{
        pgoutput::{Column, Relation},
        plan::{TargetColumn, TargetTable},
    };

    fn plan() -> Plan {
        let names = ["id", "a\"b", "list", "g", "i"];
        let columns = names.iter().map(|name| Column { key: *name == "id", name: (*name).into(), type_oid: 23 }).collect();
        let relation = Relation { oid: 1, schema: "s".into(), name: "t".into(), identity: b'd', columns };
        let target = |name: &&str| {
            let (generated, identity_always, listable) = (*name == "g", *name == "i", *name != "list");
            let type_name = if listable { "integer" } else { "integer[]" }.to_owned();
            ((*name).to_owned(), TargetColumn { type_name, generated, identity_always, listable, using: None })
        };
        let table = TargetTable { columns: names.iter().map(target).collect(), ..TargetTable::default() };
        Plan::new(&relation, Some(&table)).unwrap()
    }

    #[test]
    fn writes_statements_for_many_rows() {
        let plan = plan();
        assert_eq!(
            plan.update_many(&[]).unwrap().sql,
            "UPDATE ONLY \"s\".\"t\" AS t SET \"a\"\"b\" = u.c1, \"list\" = u.c2::integer[] FROM unnest($1::integer[], $2::integer[], \
             $3::text[]) AS u (c0, c1, c2) WHERE t.\"id\" = u.c0"
        );
        let partly = plan.update_many(&[1]).unwrap();
        assert_eq!(partly.positions, [0, 2]);
        assert!(plan.update_many(&[1, 2]).is_none());
        assert_eq!(plan.delete_many().sql, "DELETE FROM ONLY \"s\".\"t\" AS t USING unnest($1::integer[]) AS u (c0) WHERE t.\"id\" = u.c0");
        assert_eq!(
            plan.insert_many().sql,
            "INSERT INTO \"s\".\"t\" (\"id\", \"a\"\"b\", \"list\", \"i\") OVERRIDING SYSTEM VALUE SELECT u.c0, u.c1, u.c2::integer[], u.c3 \
             FROM unnest($1::integer[], $2::integer[], $3::text[], $4::integer[]) AS u (c0, c1, c2, c3)"
        );
        assert_eq!(plan.copy_many().sql, "COPY \"s\".\"t\" (\"id\", \"a\"\"b\", \"list\", \"i\") FROM STDIN");
    }

    #[test]
    fn values_survive_arrays_and_copy() {
        let text = |text: &'static str| Value::Text(Bytes::from_static(text.as_bytes()));
        for (value, element, field) in [
            (text("-1.5"), "-1.5", "-1.5"),
            (text(""), "\"\"", ""),
            (text("NULL"), "\"NULL\"", "NULL"),
            (text("\\N"), "\"\\\\N\"", "\\\\N"),
            (text("a,\"b\\"), "\"a,\\\"b\\\\\"", "a,\"b\\\\"),
            (text("x\ty\r\nü"), "\"x\ty\r\nü\"", "x\\ty\\r\\nü"),
            (Value::Null, "NULL", "\\N"),
        ] {
            let (mut array, mut line) = (BytesMut::new(), BytesMut::new());
            put_element(&mut array, Some(&value));
            put_field(&mut line, Some(&value));
            assert_eq!((&array[..], &line[..]), (element.as_bytes(), field.as_bytes()), "{value:?}");
        }
        let rows = [vec![text("1"), Value::Null], vec![text("2"), text("b")]];
        let many = Many { sql: String::new(), positions: vec![1, 0] };
        assert_eq!(many.lines(rows.iter()), "\\N\t1\nb\t2\n");
        assert_eq!(many.arrays(rows.iter()), [Text(Some("{NULL,\"b\"}".into())), Text(Some("{1,2}".into()))]);
    }
}
