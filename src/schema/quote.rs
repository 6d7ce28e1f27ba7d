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

    proptest! {
        #[test]
        fn an_identifier_has_no_lone_quote(name in ".{0,30}") {
            let quoted = ident(&name);
            let inner = &quoted[1..quoted.len() - 1];
            prop_assert_eq!(inner.replace("\"\"", ""), name.replace('"', ""));
        }
    }
}
