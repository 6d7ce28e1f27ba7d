//! Renames among our own statements: what waits under the old name (a proposal, a table that is set aside) goes on under the new
//! one. Every name in our SQL is quoted, so that replacing one is exact. Pure.

use super::quote;

/// Schema and name.
type Name = (String, String);

/// What one statement renames.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rename {
    /// `ALTER TABLE … RENAME TO`, `ALTER TABLE … SET SCHEMA`
    Table {
        /// Its name before.
        from: Name,
        /// Its name from here on.
        to: Name,
    },
    /// `ALTER TABLE … RENAME COLUMN`
    Column {
        /// Its table.
        table: Name,
        /// Its name before.
        from: String,
        /// Its name from here on.
        to: String,
    },
    /// `ALTER SCHEMA … RENAME TO`
    Schema {
        /// Its name before.
        from: String,
        /// Its name from here on.
        to: String,
    },
}

/// A quoted name at the start of a text, and the rest.
fn name(text: &str) -> Option<(String, &str)> {
    let mut name = String::new();
    let mut rest = text.strip_prefix('"')?;
    loop {
        let end = rest.find('"')?;
        name.push_str(rest.get(..end)?);
        rest = rest.get(end + 1..)?;
        match rest.strip_prefix('"') {
            Some(more) => {
                name.push('"');
                rest = more;
            }
            None => return Some((name, rest)),
        }
    }
}

fn qualified(text: &str) -> Option<(Name, &str)> {
    let (schema, rest) = name(text)?;
    let (table, rest) = name(rest.strip_prefix('.')?)?;
    Some(((schema, table), rest))
}

impl Rename {
    /// Reads one of our own statements; `None`: it renames nothing that others wait for.
    pub fn parse(sql: &str) -> Option<Self> {
        if let Some(rest) = sql.strip_prefix("ALTER SCHEMA ") {
            let (from, rest) = name(rest)?;
            let (to, _) = name(rest.strip_prefix(" RENAME TO ")?)?;
            return Some(Rename::Schema { from, to });
        }
        let (table, rest) = qualified(sql.strip_prefix("ALTER TABLE ")?)?;
        if let Some(rest) = rest.strip_prefix(" RENAME COLUMN ") {
            let (from, rest) = name(rest)?;
            let (to, _) = name(rest.strip_prefix(" TO ")?)?;
            return Some(Rename::Column { table, from, to });
        }
        let to = match (rest.strip_prefix(" RENAME TO "), rest.strip_prefix(" SET SCHEMA ")) {
            (Some(rest), _) => (table.0.clone(), name(rest)?.0),
            (_, Some(rest)) => (name(rest)?.0, table.1.clone()),
            _ => return None,
        };
        Some(Rename::Table { from: table, to })
    }

    /// The new name of a table; `None`: it keeps its own.
    pub fn of(&self, table: &Name) -> Option<Name> {
        match self {
            Rename::Table { from, to } if from == table => Some(to.clone()),
            Rename::Schema { from, to } if *from == table.0 => Some((to.clone(), table.1.clone())),
            _ => None,
        }
    }

    /// A statement of ours about `table` as it must read from here on.
    pub fn in_statement(&self, table: &Name, sql: &str) -> String {
        match self {
            Rename::Table { from, to } => sql.replace(&quote::qualified(&from.0, &from.1), &quote::qualified(&to.0, &to.1)),
            Rename::Schema { from, to } => sql.replace(&format!("{}.", quote::ident(from)), &format!("{}.", quote::ident(to))),
            Rename::Column { table: of, from, to } if of == table => {
                let (from, to) = (quote::ident(from), quote::ident(to));
                let mut out = String::with_capacity(sql.len());
                let mut rest = sql;
                while let Some(at) = rest.find(&from) {
                    let (before, after) = (rest.get(..at).unwrap_or_default(), rest.get(at + from.len()..).unwrap_or_default());
                    out.push_str(before);
                    // Part of a qualified or longer name is another name.
                    let whole = !before.ends_with(['.', '"']) && !after.starts_with(['.', '"']);
                    out.push_str(if whole { &to } else { &from });
                    rest = after;
                }
                out + rest
            }
            Rename::Column { .. } => sql.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(schema: &str, table: &str) -> Name {
        (schema.into(), table.into())
    }

    #[test]
    fn renames_are_read_from_our_own_statements() {
        let table = |from: Name, to: Name| Some(Rename::Table { from, to });
        assert_eq!(Rename::parse(r#"ALTER TABLE "public"."a" RENAME TO "b""#), table(pair("public", "a"), pair("public", "b")));
        assert_eq!(Rename::parse(r#"ALTER TABLE "s"."a.""b" SET SCHEMA "z""#), table(pair("s", "a.\"b"), pair("z", "a.\"b")));
        assert_eq!(
            Rename::parse(r#"ALTER TABLE "s"."a" RENAME COLUMN "x" TO "y""#),
            Some(Rename::Column { table: pair("s", "a"), from: "x".into(), to: "y".into() })
        );
        assert_eq!(Rename::parse(r#"ALTER SCHEMA "s" RENAME TO "z""#), Some(Rename::Schema { from: "s".into(), to: "z".into() }));
        for other in [r#"ALTER INDEX "a" RENAME TO "b""#, r#"ALTER TABLE "s"."a" RENAME CONSTRAINT "x" TO "y""#, "ALTER TABLE \"s", ""] {
            assert_eq!(Rename::parse(other), None, "{other}");
        }
    }

    #[test]
    fn what_waits_follows() {
        let (a, other) = (pair("s", "a"), pair("s", "b"));
        let statement = r#"ALTER TABLE "s"."a" ALTER COLUMN "a" TYPE text USING "a"::text"#;
        let renamed = |sql: &str| Rename::parse(sql).unwrap();
        let moved = renamed(r#"ALTER TABLE "s"."a" RENAME TO "z""#);
        assert_eq!((moved.of(&a), moved.of(&other)), (Some(pair("s", "z")), None));
        assert_eq!(moved.in_statement(&a, statement), r#"ALTER TABLE "s"."z" ALTER COLUMN "a" TYPE text USING "a"::text"#);
        let column = renamed(r#"ALTER TABLE "s"."a" RENAME COLUMN "a" TO "y""#);
        assert_eq!(column.in_statement(&a, statement), r#"ALTER TABLE "s"."a" ALTER COLUMN "y" TYPE text USING "y"::text"#);
        assert_eq!(column.in_statement(&other, statement), statement);
        let schema = renamed(r#"ALTER SCHEMA "s" RENAME TO "z""#);
        assert_eq!(schema.of(&a), Some(pair("z", "a")));
        assert_eq!(schema.in_statement(&a, r#"DROP TABLE "s"."a""#), r#"DROP TABLE "z"."a""#);
    }
}
