//! A statement that a client ran, asked again in a form that can be compared row by row: results as text, nothing cut by the
//! client, and rows that tie with the last one. Pure.

use super::{answer::FIRST_USER_OID, copies::Operation};
use crate::{
    sql::{self, Class},
    wire::{frontend::Parse, take_bytes, take_i16, take_i32},
};
use bytes::{BufMut, Bytes, BytesMut};
use std::sync::Arc;

/// The statement with its whole answer, as text.
///
/// # Errors
/// Why it cannot be asked that way.
pub fn whole(operation: &Operation, class: &Class) -> Result<Operation, &'static str> {
    let tied = |text: &Bytes| -> Result<Bytes, &'static str> {
        if !class.cut {
            return Ok(text.clone());
        }
        let text = std::str::from_utf8(text).ok().and_then(sql::with_ties);
        text.map(Bytes::from).ok_or("LIMIT may cut between equal rows")
    };
    match operation {
        Operation::Simple(text) => Ok(Operation::Simple(tied(text)?)),
        Operation::Extended { parse, bind, .. } => {
            let bind = text_results(bind).ok_or("its parameters cannot be read")?;
            let parse = Arc::new(Parse { query: tied(&parse.query)?, ..(**parse).clone() });
            Ok(Operation::Extended { parse, bind, limit: 0, parsed_here: true })
        }
    }
}

/// Its plan.
pub fn explain(operation: &Operation) -> Operation {
    let explained = |text: &Bytes| Bytes::from([b"EXPLAIN (FORMAT JSON) ", &text[..]].concat());
    match operation {
        Operation::Simple(text) => Operation::Simple(explained(text)),
        Operation::Extended { parse, bind, .. } => {
            let parse = Arc::new(Parse { query: explained(&parse.query), ..(**parse).clone() });
            let bind = text_results(bind).unwrap_or_else(|| bind.clone());
            Operation::Extended { parse, bind, limit: 0, parsed_here: true }
        }
    }
}

/// The rest of a Bind with all results as text.
fn text_results(bind: &Bytes) -> Option<Bytes> {
    let mut rest = &bind[..];
    for _ in 0..take_i16(&mut rest)? {
        take_i16(&mut rest)?;
    }
    for _ in 0..take_i16(&mut rest)? {
        if let Ok(length) = usize::try_from(take_i32(&mut rest)?) {
            take_bytes(&mut rest, length)?;
        }
    }
    let mut text = BytesMut::from(bind.get(..bind.len() - rest.len())?);
    text.put_i16(0);
    Some(text.freeze())
}

/// Types of the user have other oids elsewhere: left to the other server to find out. `None`: there are none.
pub fn without_user_types(operation: &Operation) -> Option<Operation> {
    let Operation::Extended { parse, bind, limit, parsed_here } = operation else { return None };
    let mut rest = &parse.types[..];
    let mut types = BytesMut::new();
    let mut found = false;
    let count = take_i16(&mut rest)?;
    types.put_i16(count);
    for _ in 0..count {
        let oid = take_i32(&mut rest)?;
        let of_user = u32::from_ne_bytes(oid.to_ne_bytes()) >= FIRST_USER_OID;
        found |= of_user;
        types.put_i32(if of_user { 0 } else { oid });
    }
    let parse = Arc::new(Parse { types: types.freeze(), ..(**parse).clone() });
    found.then(|| Operation::Extended { parse, bind: bind.clone(), limit: *limit, parsed_here: *parsed_here })
}

/// Some parameter travels in binary form.
pub fn has_binary_parameters(operation: &Operation) -> bool {
    let Operation::Extended { bind, .. } = operation else { return false };
    let mut rest = &bind[..];
    let formats = take_i16(&mut rest).unwrap_or_default();
    (0..formats).any(|_| take_i16(&mut rest) == Some(1))
}

/// A plan of `EXPLAIN (FORMAT JSON)` in one line: nodes, tables and indexes, no expression (they hold literals).
pub fn plan_in_words(json: &str) -> Option<String> {
    /// Longest line shown.
    const CHARS_MAX: usize = 400;
    let plans: serde_json::Value = serde_json::from_str(json).ok()?;
    let mut said = String::new();
    say(plans.get(0)?.get("Plan")?, &mut said);
    Some(said.chars().take(CHARS_MAX).collect())
}

fn say(node: &serde_json::Value, said: &mut String) {
    let field = |name: &str| node.get(name).and_then(serde_json::Value::as_str);
    said.push_str(field("Node Type").unwrap_or("?"));
    if let Some(index) = field("Index Name") {
        said.push_str(&format!(" {index}"));
    }
    if let Some(relation) = field("Relation Name").or(field("CTE Name")).or(field("Function Name")) {
        said.push_str(&format!(" on {relation}"));
    }
    let children = node.get("Plans").and_then(serde_json::Value::as_array);
    for (number, child) in children.into_iter().flatten().enumerate() {
        said.push_str(if number == 0 { " (" } else { ", " });
        say(child, said);
    }
    if children.is_some_and(|children| !children.is_empty()) {
        said.push(')');
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sql::{CatalogFacts, Classifier};

    fn extended(query: &'static str, types: &[u32], limit: i32) -> Operation {
        let mut oids = BytesMut::new();
        oids.put_i16(types.len() as i16);
        types.iter().for_each(|oid| oids.put_u32(*oid));
        // one binary parameter of four bytes, results in binary
        let bind = Bytes::from_static(b"\0\x01\0\x01\0\x01\0\0\0\x04abcd\0\x01\0\x01");
        let parse = Parse { name: Bytes::new(), query: Bytes::from_static(query.as_bytes()), types: oids.freeze() };
        Operation::Extended { parse: Arc::new(parse), bind, limit, parsed_here: false }
    }

    #[test]
    fn the_whole_answer_is_asked_for_as_text() {
        let query = "select a from t where b = $1 order by a limit 3";
        let class = Classifier::new(CatalogFacts::builtin_only()).classify(query.as_bytes());
        let Ok(Operation::Extended { parse, bind, limit, .. }) = whole(&extended(query, &[23], 2), &class) else { panic!() };
        assert_eq!((&bind[..], limit), (&b"\0\x01\0\x01\0\x01\0\0\0\x04abcd\0\0"[..], 0));
        assert!(String::from_utf8_lossy(&parse.query).to_ascii_lowercase().ends_with("with ties"), "{:?}", parse.query);
        let offset = "select a from t order by a limit 3 offset 1";
        let class = Classifier::new(CatalogFacts::builtin_only()).classify(offset.as_bytes());
        assert!(whole(&Operation::Simple(Bytes::from(offset)), &class).is_err());
    }

    #[test]
    fn user_types_are_left_to_the_other_server() {
        assert!(without_user_types(&extended("select $1", &[23], 0)).is_none());
        let Some(Operation::Extended { parse, .. }) = without_user_types(&extended("select $1, $2", &[23, 16_400], 0)) else { panic!() };
        assert_eq!(&parse.types[..], b"\0\x02\0\0\0\x17\0\0\0\0");
        assert!(has_binary_parameters(&extended("select $1", &[23], 0)));
    }

    #[test]
    fn a_plan_is_said_without_its_literals() {
        let json = r#"[{"Plan": {"Node Type": "Limit", "Plans": [{"Node Type": "Index Scan", "Index Name": "item_pkey",
            "Relation Name": "item", "Index Cond": "(id = 4711)"}]}}]"#;
        assert_eq!(plan_in_words(json).unwrap(), "Limit (Index Scan item_pkey on item)");
        assert_eq!(plan_in_words("[]"), None);
    }
}
