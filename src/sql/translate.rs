//! A statement in another schema's names: the client's own text with table and column names replaced where the parse tree says they stand. What cannot be
//! said exactly in the other schema (`*`, a column that is not there, a name that could be two things) is not said at all. Pure.

use super::tree::Tree;
use std::collections::{BTreeMap, HashMap};

/// A column of ours on the other side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Theirs {
    /// Its name there; `None`: it is not there.
    pub name: Option<String>,
    /// Its values read the same there, in text form.
    pub alike: bool,
    /// Its type is the same there.
    pub same_type: bool,
}

/// One of our tables on the other side.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TableNames {
    /// Our schema.
    pub schema: String,
    /// Schema and name there; `None`: it is not there.
    pub there: Option<(String, String)>,
    /// All our columns.
    pub columns: HashMap<String, Theirs>,
    /// Columns there that none of ours became.
    pub added: Vec<String>,
    /// Same names, types and order on both sides: nothing needs to be said.
    pub same: bool,
}

/// How our tables are called on the other side.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    tables: HashMap<String, Vec<TableNames>>,
    /// Not known yet: every statement that names a table may be concerned.
    unknown: bool,
}

/// Replaces a stretch of the text.
type Edits = BTreeMap<usize, (usize, String)>;

impl Names {
    /// While nothing is known.
    pub fn unknown() -> Self {
        Names { unknown: true, ..Names::default() }
    }

    /// Adds a table of ours.
    pub fn add(&mut self, name: &str, table: TableNames) {
        self.tables.entry(name.to_owned()).or_default().push(table);
    }

    /// A statement that names these tables (`schema.table` or `table`) means something else, or nothing, there.
    pub fn concerns(&self, tables: &[String]) -> bool {
        let differs = |table: &String| {
            let name = table.rsplit_once('.').map_or(table.as_str(), |(_, name)| name);
            self.tables.get(name).is_some_and(|known| known.iter().any(|table| !table.same))
        };
        if self.unknown { !tables.is_empty() } else { tables.iter().any(differs) }
    }

    /// The statement in the other side's names. `binary`: values may travel in binary form.
    ///
    /// # Errors
    /// Why it cannot be said there, for a counter.
    pub fn translate(&self, text: &str, binary: bool) -> Result<String, &'static str> {
        if self.unknown {
            return Err("mapped: the shadow's schema is not known yet");
        }
        let parsed = pg_query::parse(text, pg_query::ParserOptions::DEFAULT).map_err(|_| "mapped: not understood")?;
        let tree = Tree::with_places(&parsed.protobuf).ok_or("mapped: not understood")?;
        let statements = tree.get("stmts").items();
        let [statement] = statements else { return Err("mapped: several statements in one message") };
        let statement = statement.get("stmt");
        if !matches!(statement.name(), "SelectStmt" | "InsertStmt" | "UpdateStmt" | "DeleteStmt") {
            return Err("mapped: a statement of this kind is not translated");
        }
        let mut scope = Scope { names: self, text, binary, tables: Vec::new(), edits: Edits::new() };
        scope.collect(statement)?;
        scope.rewrite(statement)?;
        let mut out = String::with_capacity(text.len() + 64);
        let mut from = 0;
        for (at, (end, replacement)) in scope.edits {
            out.push_str(text.get(from..at).ok_or("mapped: not understood")?);
            out.push_str(&replacement);
            from = end;
        }
        out.push_str(text.get(from..).ok_or("mapped: not understood")?);
        Ok(out)
    }
}

fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// The identifier at the beginning of a text: what it names and how long it is.
fn identifier(text: &str) -> Option<(String, usize)> {
    if let Some(rest) = text.strip_prefix('"') {
        let mut name = String::new();
        let mut letters = rest.char_indices().peekable();
        while let Some((at, letter)) = letters.next() {
            match (letter, letters.peek()) {
                ('"', Some((_, '"'))) => {
                    letters.next();
                    name.push('"');
                }
                ('"', _) => return Some((name, at + 2)),
                _ => name.push(letter),
            }
        }
        return None;
    }
    let len = text.find(|c: char| !(c.is_alphanumeric() || c == '_' || c == '$')).unwrap_or(text.len());
    (len > 0).then(|| text.get(..len).map(|name| (name.to_ascii_lowercase(), len))).flatten()
}

/// `a.b.c` at a place, each part as it must be: where the last begins and where it ends.
fn names_at(text: &str, at: usize, parts: &[&str]) -> Result<(usize, usize), &'static str> {
    const STRANGE: &str = "mapped: a name is spelled in a way that is not followed";
    let (mut start, mut end) = (at, at);
    for (number, part) in parts.iter().enumerate() {
        if number > 0 {
            // No comments and no space around the dot: who writes names so is left out.
            if text.as_bytes().get(end) != Some(&b'.') {
                return Err(STRANGE);
            }
            start = end + 1;
        }
        let (name, len) = text.get(start..).and_then(identifier).ok_or(STRANGE)?;
        if name != *part {
            return Err(STRANGE);
        }
        end = start + len;
    }
    Ok((start, end))
}

struct Scope<'a> {
    names: &'a Names,
    text: &'a str,
    binary: bool,
    /// What the statement calls a table anywhere in it, and which table it is; `None`: one that we know nothing of.
    tables: Vec<(String, Option<&'a TableNames>)>,
    edits: Edits,
}

impl<'a> Scope<'a> {
    /// Every table of the statement, and refuses what would need a deeper understanding.
    fn collect(&mut self, tree: &Tree) -> Result<(), &'static str> {
        match tree.name() {
            "RangeVar" => {
                let (schema, name) = (tree.get("schemaname").text(), tree.get("relname").text());
                let known = match self.names.tables.get(name).map(Vec::as_slice) {
                    None => None,
                    Some([one]) if schema.is_empty() || one.schema == schema => Some(one),
                    Some([_]) => None,
                    Some(several) if schema.is_empty() => {
                        if several.iter().any(|table| !table.same) {
                            return Err("mapped: several schemas have a table of this name");
                        }
                        None
                    }
                    Some(several) => several.iter().find(|table| table.schema == schema),
                };
                let called = match tree.get("alias").get("aliasname").text() {
                    "" => name,
                    alias => alias,
                };
                if !tree.get("alias").get("colnames").is_empty() {
                    return Err("mapped: a table's alias renames its columns");
                }
                self.tables.push((called.to_owned(), known));
                return Ok(());
            }
            "CommonTableExpr" if self.names.tables.contains_key(tree.get("ctename").text()) => {
                return Err("mapped: a WITH has the name of a table");
            }
            "JoinExpr" if !tree.get("using_clause").is_empty() || !tree.get("is_natural").is_empty() => {
                return Err("mapped: USING or NATURAL join");
            }
            "JoinExpr" if !tree.get("alias").is_empty() => return Err("mapped: a join with a name of its own"),
            // What it calls its columns is not followed.
            "RangeSubselect" | "RangeFunction" | "RangeTableFunc" | "JsonTable" => {
                self.tables.push((tree.get("alias").get("aliasname").text().to_owned(), None));
            }
            "OnConflictClause" | "MergeStmt" | "IntoClause" | "LockingClause" => {
                return Err("mapped: a clause of this kind is not translated");
            }
            _ => {}
        }
        for child in children(tree) {
            self.collect(child)?;
        }
        Ok(())
    }

    fn differs(&self) -> bool {
        self.tables.iter().any(|(_, table)| table.is_some_and(|table| !table.same))
    }

    fn edit(&mut self, at: usize, end: usize, replacement: String) {
        self.edits.insert(at, (end, replacement));
    }

    /// What a column is called there; `None`: it is none of a table's, or keeps its name.
    fn column(&self, table: Option<&str>, name: &str) -> Result<Option<String>, &'static str> {
        let (mut found, mut foreign): (Option<&Theirs>, bool) = (None, false);
        for (called, known) in &self.tables {
            if table.is_some_and(|table| table != called) {
                continue;
            }
            let Some(known) = known else {
                foreign = true;
                continue;
            };
            match known.columns.get(name) {
                Some(theirs) if found.is_none_or(|before| before == theirs) => found = Some(theirs),
                Some(_) => return Err("mapped: a column could be that of two tables"),
                // There it would mean a column that does not exist here.
                None if known.added.iter().any(|added| added == name)
                    || known.columns.values().any(|t| t.name.as_deref() == Some(name)) =>
                {
                    return Err("mapped: a name means something else there");
                }
                None => {}
            }
        }
        let Some(theirs) = found else { return Ok(None) };
        if !theirs.alike || (self.binary && !theirs.same_type) {
            return Err("mapped: a column of another type");
        }
        match &theirs.name {
            None => Err("mapped: a column that is left out"),
            Some(there) if there != name && foreign => Err("mapped: a column could be that of a subquery or view"),
            Some(there) => Ok((there != name).then(|| there.clone())),
        }
    }

    fn rewrite(&mut self, tree: &Tree) -> Result<(), &'static str> {
        let place = || usize::try_from(tree.get("location").int()).map_err(|_| "mapped: not understood");
        match tree.name() {
            "RangeVar" => return self.table(tree, place()?),
            "ColumnRef" => return self.reference(tree, place()?).map(|_| ()),
            "InsertStmt" => {
                if tree.get("cols").is_empty() && self.target_differs(tree) {
                    return Err("mapped: an INSERT without a list of columns");
                }
                self.assigned(tree, "cols")?;
                return self.others(tree, &["cols"]);
            }
            "UpdateStmt" => {
                self.assigned(tree, "target_list")?;
                return self.others(tree, &["target_list"]);
            }
            "ResTarget" if tree.get("name").is_empty() && tree.get("val").name() == "ColumnRef" => {
                // The answer's columns keep their names.
                let reference = tree.get("val");
                let at = usize::try_from(reference.get("location").int()).map_err(|_| "mapped: not understood")?;
                if let (Some(end), name) = (self.reference(reference, at)?, reference.get("fields").last_string()) {
                    let name = quote(name);
                    if let Some((_, replacement)) = self.edits.values_mut().find(|(to, _)| *to == end) {
                        replacement.push_str(&format!(" AS {name}"));
                    }
                }
                return Ok(());
            }
            "ResTarget" if !tree.get("name").is_empty() && self.column(None, tree.get("name").text()) != Ok(None) => {
                return Err("mapped: an answer's column has the name of a mapped one");
            }
            _ => {}
        }
        self.others(tree, &[])
    }

    fn others(&mut self, tree: &Tree, but: &[&str]) -> Result<(), &'static str> {
        match tree {
            Tree::Struct(_, fields) => {
                for (_, value) in fields.iter().filter(|(name, _)| !but.contains(name)) {
                    self.rewrite(value)?;
                }
            }
            Tree::List(items) => {
                for item in items {
                    self.rewrite(item)?;
                }
            }
            Tree::Empty | Tree::Int(_) | Tree::Text(_) => {}
        }
        Ok(())
    }

    fn target_differs(&self, tree: &Tree) -> bool {
        let name = tree.get("relation").get("relname").text();
        self.names.tables.get(name).is_some_and(|tables| tables.iter().any(|table| !table.same))
    }

    /// The columns that a statement assigns, and what it assigns to them.
    fn assigned(&mut self, tree: &Tree, list: &str) -> Result<(), &'static str> {
        let target = tree.get("relation");
        let called = match target.get("alias").get("aliasname").text() {
            "" => target.get("relname").text(),
            alias => alias,
        };
        for item in tree.get(list).items() {
            let name = item.get("name").text();
            if let Some(there) = self.column(Some(called), name)? {
                let at = usize::try_from(item.get("location").int()).map_err(|_| "mapped: not understood")?;
                let (start, end) = names_at(self.text, at, &[name])?;
                self.edit(start, end, quote(&there));
            }
            self.rewrite(item.get("val"))?;
            for index in item.get("indirection").items() {
                self.rewrite(index)?;
            }
        }
        Ok(())
    }

    fn table(&mut self, tree: &Tree, at: usize) -> Result<(), &'static str> {
        let (schema, name) = (tree.get("schemaname").text(), tree.get("relname").text());
        let known = self.names.tables.get(name).and_then(|tables| tables.iter().find(|table| schema.is_empty() || table.schema == schema));
        let Some(known) = known.filter(|known| !known.same) else { return Ok(()) };
        let Some((to_schema, to_name)) = &known.there else { return Err("mapped: a table that is left out") };
        let parts: Vec<&str> = [schema, name].into_iter().filter(|part| !part.is_empty()).collect();
        let (_, end) = names_at(self.text, at, &parts)?;
        let mut there = format!("{}.{}", quote(to_schema), quote(to_name));
        // References through the table's own name go on working.
        if tree.get("alias").is_empty() {
            there.push_str(&format!(" AS {}", quote(name)));
        }
        self.edit(at, end, there);
        Ok(())
    }

    /// A reference to a column; the end of what was replaced, if it was.
    fn reference(&mut self, tree: &Tree, at: usize) -> Result<Option<usize>, &'static str> {
        let fields = tree.get("fields").items();
        if fields.iter().any(|field| field.name() == "AStar") {
            return if self.differs() { Err("mapped: * is another list of columns there") } else { Ok(None) };
        }
        let parts: Vec<&str> = fields.iter().map(Tree::string).collect();
        let (table, column) = match parts.as_slice() {
            [column] => (None, *column),
            [table, column] => (Some(*table), *column),
            _ if self.differs() => return Err("mapped: a column's name has three parts"),
            _ => return Ok(None),
        };
        // `SELECT t FROM t`: a whole row.
        let whole_row = |(called, known): &(String, Option<&TableNames>)| called == column && known.is_some_and(|known| !known.same);
        if table.is_none() && self.tables.iter().any(whole_row) {
            return Err("mapped: a whole row is another one there");
        }
        let Some(there) = self.column(table, column)? else { return Ok(None) };
        let (start, end) = names_at(self.text, at, &parts)?;
        self.edit(start, end, quote(&there));
        Ok(Some(end))
    }
}

fn children(tree: &Tree) -> impl Iterator<Item = &Tree> {
    let (fields, items) = match tree {
        Tree::Struct(_, fields) => (fields.as_slice(), &[][..]),
        Tree::List(items) => (&[][..], items.as_slice()),
        Tree::Empty | Tree::Int(_) | Tree::Text(_) => (&[][..], &[][..]),
    };
    fields.iter().map(|(_, value)| value).chain(items)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn names() -> Names {
        let theirs = |name: Option<&str>, alike| Theirs { name: name.map(str::to_owned), alike, same_type: alike };
        let mut names = Names::default();
        let orders = TableNames {
            schema: "public".into(),
            there: Some(("sales".into(), "purchases".into())),
            columns: [
                ("id", theirs(Some("id"), true)),
                ("total", Theirs { name: Some("amount".into()), alike: true, same_type: false }),
                ("who", theirs(Some("buyer"), true)),
                ("note", theirs(None, true)),
                ("at", theirs(Some("at"), false)),
            ]
            .map(|(name, theirs)| (name.to_owned(), theirs))
            .into(),
            added: vec!["tier".into()],
            same: false,
        };
        names.add("orders", orders);
        let people = [("id", theirs(Some("id"), true)), ("who", theirs(Some("who"), true)), ("nick", theirs(Some("nick"), true))];
        names.add(
            "people",
            TableNames {
                schema: "public".into(),
                there: Some(("public".into(), "people".into())),
                columns: people.map(|(name, theirs)| (name.to_owned(), theirs)).into(),
                same: true,
                ..TableNames::default()
            },
        );
        names
    }

    #[test]
    fn names_are_replaced_where_they_stand() {
        let table = r#""sales"."purchases""#;
        for (text, expected) in [
            ("SELECT total FROM orders WHERE id = 1", format!(r#"SELECT "amount" AS "total" FROM {table} AS "orders" WHERE id = 1"#)),
            (
                "select o.total + 1 as x, 'total' from public.orders o where o.who like 'orders%' order by total",
                format!(r#"select o."amount" + 1 as x, 'total' from {table} o where o."buyer" like 'orders%' order by "amount""#),
            ),
            ("SELECT count(*) FROM orders", format!(r#"SELECT count(*) FROM {table} AS "orders""#)),
            (
                "SELECT x.total FROM (SELECT o.total FROM orders o) x",
                format!(r#"SELECT x.total FROM (SELECT o."amount" AS "total" FROM {table} o) x"#),
            ),
            (
                "INSERT INTO orders (id, total, who) VALUES ($1, $2, 'total') RETURNING total",
                format!(
                    r#"INSERT INTO {table} AS "orders" (id, "amount", "buyer") VALUES ($1, $2, 'total') RETURNING "amount" AS "total""#
                ),
            ),
            (
                "UPDATE orders SET total = total * 2, who = orders.who WHERE id IN (SELECT p.id FROM people p WHERE p.who = 'x')",
                format!(
                    r#"UPDATE {table} AS "orders" SET "amount" = "amount" * 2, "buyer" = orders."buyer" WHERE id IN (SELECT p.id FROM people p WHERE p.who = 'x')"#
                ),
            ),
            ("DELETE FROM \"orders\" WHERE total < 0", format!(r#"DELETE FROM {table} AS "orders" WHERE "amount" < 0"#)),
            ("SELECT * FROM people", "SELECT * FROM people".to_owned()),
        ] {
            assert_eq!(names().translate(text, false), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_cannot_be_said_exactly_is_left_out() {
        for (text, reason) in [
            ("SELECT * FROM orders", "list of columns"),
            ("SELECT o.* FROM orders o", "list of columns"),
            ("SELECT orders FROM orders", "whole row"),
            ("SELECT note FROM orders", "left out"),
            ("SELECT at FROM orders", "another type"),
            ("SELECT tier FROM orders", "something else"),
            ("SELECT who AS amount FROM orders GROUP BY amount, who", "has the name"),
            ("SELECT who FROM orders GROUP BY amount, who", "something else"),
            ("SELECT orders.total FROM orders JOIN people USING (id)", "USING"),
            ("SELECT who FROM orders, people", "two tables"),
            ("INSERT INTO orders VALUES (1)", "without a list"),
            ("INSERT INTO orders (id) VALUES (1) ON CONFLICT DO NOTHING", "clause"),
            ("WITH orders AS (SELECT 1) SELECT total FROM orders", "WITH"),
            ("SELECT total FROM orders, a_view", "subquery or view"),
            ("SELECT total FROM (SELECT id AS total FROM people) x, orders o", "subquery or view"),
            ("SELECT -total AS total FROM orders ORDER BY total", "has the name"),
            ("SELECT j.total FROM (orders o JOIN people p ON o.id = p.id) AS j", "name of its own"),
            ("SELECT public.orders.total FROM orders", "three parts"),
            ("SELECT o . total FROM orders o", "spelled"),
            ("SELECT total FROM orders FOR UPDATE", "clause"),
            ("SELECT 1; SELECT total FROM orders", "several"),
            ("TRUNCATE orders", "kind"),
        ] {
            let refused = names().translate(text, false).unwrap_err();
            assert!(refused.contains(reason), "{text}: {refused}");
        }
        assert!(names().translate("SELECT total FROM orders", true).is_err());
        assert!(names().translate("SELECT who FROM orders", true).is_ok());
        assert!(Names::unknown().concerns(&["people".into()]) && !Names::unknown().concerns(&[]));
        assert!(names().concerns(&["public.orders".into()]) && !names().concerns(&["people".into()]));
    }

    proptest! {
        #[test]
        fn any_text_is_answered(text in "\\PC{0,80}") {
            let _ = names().translate(&text, false);
        }

        #[test]
        fn any_name_is_found_again(name in "\\PC{1,12}") {
            prop_assert_eq!(identifier(&format!("{} x", quote(&name))), Some((name.clone(), quote(&name).len())));
        }
    }
}
