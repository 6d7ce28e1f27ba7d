//! Identifiers and literals in the SQL that this room writes. Always quoted: what is a reserved word differs between majors.

/// A quoted identifier.
pub fn ident(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A quoted, schema-qualified name.
pub fn qualified(schema: &str, name: &str) -> String {
    format!("{}.{}", ident(schema), ident(name))
}

/// A string literal, safe whatever `standard_conforming_strings` says.
pub fn literal(text: &str) -> String {
    let doubled = text.replace('\'', "''");
    if doubled.contains('\\') { format!("E'{}'", doubled.replace('\\', "\\\\")) } else { format!("'{doubled}'") }
}

/// `schema.table`, as people type it, for proposals and messages.
pub fn plain(schema: &str, name: &str) -> String {
    format!("{schema}.{name}")
}

/// Splits `schema.table`, each part perhaps quoted.
pub fn parse_object(object: &str) -> Option<(String, String)> {
    let mut parts = vec![String::new()];
    let (mut quoted, mut chars) = (false, object.chars().peekable());
    while let Some(c) = chars.next() {
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => {
                chars.next();
                parts.last_mut()?.push('"');
            }
            '"' => quoted = !quoted,
            '.' if !quoted => parts.push(String::new()),
            c => parts.last_mut()?.push(c),
        }
    }
    match <[String; 2]>::try_from(parts) {
        Ok([schema, table]) if !quoted && !schema.is_empty() && !table.is_empty() => Some((schema, table)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn quoting() {
        for (name, quoted) in [("a", "\"a\""), ("Sel\"ect", "\"Sel\"\"ect\""), ("ü b", "\"ü b\"")] {
            assert_eq!(ident(name), quoted);
        }
        for (text, quoted) in [("a", "'a'"), ("o'k", "'o''k'"), ("a\\'", "E'a\\\\'''"), ("", "''")] {
            assert_eq!(literal(text), quoted);
        }
    }

    #[test]
    fn reads_object_names() {
        let some = |schema: &str, table: &str| Some((schema.to_owned(), table.to_owned()));
        for (text, expected) in [
            ("public.orders", some("public", "orders")),
            ("\"a.b\".\"c\"\"d\"", some("a.b", "c\"d")),
            ("größe.ü", some("größe", "ü")),
            ("orders", None),
            ("a.b.c", None),
            ("\"a.b", None),
            (".b", None),
        ] {
            assert_eq!(parse_object(text), expected, "{text}");
        }
    }

    proptest! {
        #[test]
        fn an_identifier_has_no_lone_quote(name in ".{0,30}") {
            let quoted = ident(&name);
            let inner = &quoted[1..quoted.len() - 1];
            prop_assert_eq!(inner.replace("\"\"", ""), name.replace('"', ""));
        }
    }
}
