//! What ORDER BY leaves open. `ORDER BY … LIMIT n` cuts between rows that tie at will. The same statement `WITH TIES` has no such freedom: what two servers with
//! equal data answer to it is equal.

use super::{OrderKey, analyse, normalise};
use pg_query::{NodeEnum, protobuf::LimitOption};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Longer and deeper texts are not rewritten: the parser works on the caller's stack.
const TEXT_BYTES_MAX: usize = 2 << 10;
const DEPTH_MAX: usize = 6;
const OPERATORS_MAX: usize = 24;

/// The statement with the rows that tie with its last one. `None`: it cannot be said (OFFSET, no ORDER BY, too long).
pub fn with_ties(text: &str) -> Option<String> {
    if !is_small(text) {
        return None;
    }
    catch_unwind(AssertUnwindSafe(|| rewrite(text))).ok().flatten()
}

/// What the outermost ORDER BY orders by, as far as the answer shows it. Not part of a class: `ORDER BY 1` and `ORDER BY 2` are of
/// the same one.
pub fn order_of(text: &str) -> Vec<OrderKey> {
    let keys = || {
        let tree = analyse::parse(text)?;
        Some(analyse::order_keys(tree.get("stmts").items().last()?.get("stmt")))
    };
    let keys = if is_small(text) { catch_unwind(AssertUnwindSafe(keys)).ok().flatten() } else { None };
    keys.unwrap_or_else(|| vec![OrderKey::Hidden])
}

fn is_small(text: &str) -> bool {
    let Ok(shape) = normalise::normalise(text, &mut Vec::new()) else { return false };
    text.len() <= TEXT_BYTES_MAX && shape.depth <= DEPTH_MAX && shape.operators <= OPERATORS_MAX
}

fn rewrite(text: &str) -> Option<String> {
    let mut parsed = pg_query::parse(text, pg_query::ParserOptions::DEFAULT).ok()?.protobuf;
    let [statement] = parsed.stmts.as_mut_slice() else { return None };
    let NodeEnum::SelectStmt(select) = statement.stmt.as_mut()?.node.as_mut()? else { return None };
    let plain = select.limit_option == LimitOption::Count as i32 && select.limit_offset.is_none() && !select.sort_clause.is_empty();
    if !plain {
        return None;
    }
    select.limit_option = LimitOption::WithTies as i32;
    pg_query::deparse(&parsed, pg_query::DeparseOptions::default()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_is_made_whole() {
        let again = with_ties("select a, b from t where c = $1 order by a desc limit 5").unwrap();
        assert!(again.to_ascii_lowercase().ends_with("fetch first 5 rows with ties"), "{again}");
        assert!(again.contains("$1"), "{again}");
        let parameter = with_ties("select a from t order by a limit $2").unwrap();
        assert!(parameter.to_ascii_lowercase().contains("with ties") && parameter.contains("$2"), "{parameter}");
        for text in
            ["select a from t limit 5", "select a from t order by a", "select a from t order by a limit 5 offset 2", "update t set a = 1"]
        {
            assert_eq!(with_ties(text), None, "{text}");
        }
    }
}
