//! From a parse tree to a [`Class`]. Pure: the facts come in as an argument.

use super::{
    Class, Kind, OrderKey, SessionEffect, TransactionVerb,
    facts::{CatalogFacts, Relation, STAYS},
    names::{depends_on_row_order, is_about_this_server, is_harmless, is_schema_change, unrehearsable},
    tree::Tree,
};
use std::sync::Arc;

/// `CURSOR_OPT_HOLD` (`src/include/nodes/parsenodes.h`)
const CURSOR_HOLD: i64 = 0x20;

/// The parser refused, or said something unexpected.
pub(super) fn parse(text: &str) -> Option<Tree> {
    let parsed = pg_query::parse(text, pg_query::ParserOptions::DEFAULT).ok()?;
    Tree::of(&parsed.protobuf)
}

/// The class of a text. `None`: the parser refused.
pub(super) fn class(text: &str, shown: Arc<str>, facts: &CatalogFacts) -> Option<Class> {
    let tree = parse(text)?;
    let fingerprint = pg_query::fingerprint(text, pg_query::ParserOptions::DEFAULT, pg_query::FingerprintOptions::default()).ok()?.value;
    let statements = tree.get("stmts").items();
    let mut walk = Walk::new(facts);
    let mut kind: Option<Kind> = None;
    for statement in statements {
        let statement = statement.get("stmt");
        walk.name_ctes(statement);
        walk.kind = Kind::Read;
        let own = walk.statement(statement);
        let this = own.or_stronger(walk.kind);
        kind = Some(kind.map_or(this, |before| before.or_stronger(this)));
    }
    let kind = kind.unwrap_or(STAYS);
    let single = statements.len() == 1;
    let outermost = statements.last().map_or(&Tree::Empty, |statement| statement.get("stmt"));
    let cut = !outermost.get("sort_clause").is_empty() && is_cut(outermost);
    let left_out = match kind {
        Kind::Write => walk.left_out.or((!single).then_some("several statements in one string")),
        Kind::Unknown => Some(walk.left_out.unwrap_or("its effect is not known")),
        _ => None,
    };
    walk.tables.retain(|table| !walk.ctes.contains(table));
    Some(Class {
        kind,
        single,
        session_effects: walk.effects,
        fingerprint,
        text: shown,
        ordered: !outermost.get("sort_clause").is_empty(),
        limited: walk.limited,
        cut,
        cut_inside: walk.cuts > usize::from(cut),
        asks_time: walk.asks_time,
        reads_them_only: !walk.calls_strange && facts.are_alone(&walk.tables),
        tables: walk.tables,
        returns_rows: walk.returns_rows,
        rehearsable: kind == Kind::Write && single && walk.rehearsal_target && left_out.is_none(),
        left_out: left_out.or((kind == Kind::Write && !walk.rehearsal_target).then_some("calls a volatile function")),
    })
}

/// What kind a SELECT in a definition is.
pub(super) fn reads_only(text: &str, facts: &CatalogFacts) -> Option<Kind> {
    definition(text, facts).map(|(kind, _)| kind)
}

/// What kind a SELECT in a definition is, and whether its rows are not determined by the data alone.
pub(super) fn definition(text: &str, facts: &CatalogFacts) -> Option<(Kind, bool)> {
    let class = class(text, Arc::from(""), facts).filter(|class| class.single)?;
    Some((class.kind, class.limited || class.cut || class.cut_inside))
}

/// LIMIT, OFFSET or FETCH; WITH TIES leaves nothing open.
fn is_cut(select: &Tree) -> bool {
    let with_ties = select.get("limit_option").int() == i64::from(pg_query::protobuf::LimitOption::WithTies as i32);
    !with_ties && !select.get("limit_count").is_empty() || !select.get("limit_offset").is_empty()
}

/// What the answer shows of an ORDER BY.
pub(super) fn order_keys(select: &Tree) -> Vec<OrderKey> {
    let key = |item: &Tree| {
        let node = item.get("node");
        let position = node.get("val").get("ival").int();
        let column = node.get("fields");
        match node.name() {
            "AConst" => usize::try_from(position - 1).map_or(OrderKey::Hidden, OrderKey::Position),
            "ColumnRef" if column.last_string().is_empty() => OrderKey::Hidden,
            "ColumnRef" if column.items().len() > 1 && is_renamed(select, column.last_string()) => OrderKey::Hidden,
            "ColumnRef" => OrderKey::Name(column.last_string().to_owned()),
            _ => OrderKey::Hidden,
        }
    };
    select.get("sort_clause").items().iter().map(key).collect()
}

/// The answer's column of that name may be something else than the table's.
fn is_renamed(select: &Tree, name: &str) -> bool {
    select.get("target_list").items().iter().any(|target| {
        let (alias, value) = (target.get("name").text(), target.get("val"));
        match value.name() {
            "ColumnRef" => alias == name && value.get("fields").last_string() != name,
            _ => alias == name || alias.is_empty() && value.get("funcname").last_string() == name,
        }
    })
}

/// The relations that a definition names.
pub(super) fn relations(text: &str) -> Option<Vec<String>> {
    class(text, Arc::from(""), &CatalogFacts::default()).map(|class| class.tables)
}

struct Walk<'a> {
    facts: &'a CatalogFacts,
    /// The strongest thing that the current statement reaches.
    kind: Kind,
    effects: Vec<SessionEffect>,
    tables: Vec<String>,
    ctes: Vec<String>,
    calls_strange: bool,
    limited: bool,
    /// SELECTs, windows and aggregates whose rows are cut or taken in an order.
    cuts: usize,
    asks_time: bool,
    returns_rows: bool,
    rehearsal_target: bool,
    left_out: Option<&'static str>,
}

impl<'a> Walk<'a> {
    fn new(facts: &'a CatalogFacts) -> Self {
        Walk {
            facts,
            kind: Kind::Read,
            effects: Vec::new(),
            tables: Vec::new(),
            ctes: Vec::new(),
            calls_strange: false,
            limited: false,
            cuts: 0,
            asks_time: false,
            returns_rows: false,
            rehearsal_target: false,
            left_out: None,
        }
    }

    fn at_least(&mut self, kind: Kind) {
        self.kind = self.kind.or_stronger(kind);
    }

    fn effect(&mut self, effect: SessionEffect) {
        if !self.effects.contains(&effect) {
            self.effects.push(effect);
        }
    }

    fn leave_out(&mut self, reason: &'static str) {
        self.left_out.get_or_insert(reason);
    }

    fn session(&mut self, effect: SessionEffect) -> Kind {
        self.effect(effect);
        Kind::Session(effect)
    }

    fn unrehearsed(&mut self, reason: &'static str) -> Kind {
        self.leave_out(reason);
        Kind::Write
    }

    /// What the statement itself is; what it reaches goes into `self.kind`.
    fn statement(&mut self, tree: &Tree) -> Kind {
        match tree.name() {
            "SelectStmt" => {
                self.returns_rows = tree.get("into_clause").is_empty();
                self.visit(tree);
                Kind::Read
            }
            "InsertStmt" | "UpdateStmt" | "DeleteStmt" | "MergeStmt" => {
                self.returns_rows |= !tree.get("returning_clause").is_empty();
                self.visit(tree);
                Kind::Write
            }
            "TransactionStmt" => transaction(tree),
            "VariableSetStmt" => {
                let reset = matches!(tree.get("kind").int(), 5 | 6);
                let effect = if reset { SessionEffect::Reset } else { SessionEffect::Set };
                // SET LOCAL and SET TRANSACTION end with the transaction.
                if tree.get("is_local").is_empty() && !matches!(tree.get("name").text(), "TRANSACTION" | "TRANSACTION SNAPSHOT") {
                    self.effect(effect);
                }
                Kind::Session(effect)
            }
            "VariableShowStmt" => {
                self.returns_rows = true;
                STAYS
            }
            "DiscardStmt" => self.session(if tree.get("target").int() == 1 { SessionEffect::DiscardAll } else { SessionEffect::Other }),
            "ListenStmt" => self.session(SessionEffect::Listen),
            "UnlistenStmt" => self.session(SessionEffect::Unlisten),
            "NotifyStmt" => self.unrehearsed("NOTIFY reaches other sessions"),
            "DeclareCursorStmt" => {
                let hold = tree.get("options").int() & CURSOR_HOLD != 0;
                self.visit(tree.get("query"));
                self.session(if hold { SessionEffect::DeclareHold } else { SessionEffect::DeclareCursor })
            }
            "FetchStmt" => {
                self.returns_rows |= tree.get("ismove").is_empty();
                Kind::Session(SessionEffect::DeclareCursor)
            }
            "ClosePortalStmt" => Kind::Session(SessionEffect::DeclareCursor),
            "PrepareStmt" => self.session(SessionEffect::SqlPrepare),
            "ExecuteStmt" => {
                self.returns_rows = true;
                self.session(SessionEffect::SqlExecute)
            }
            "DeallocateStmt" => self.session(SessionEffect::Deallocate),
            "LoadStmt" => self.session(SessionEffect::Load),
            "ConstraintsSetStmt" => STAYS,
            "CopyStmt" => {
                self.name_tables(tree);
                Kind::Copy
            }
            "LockStmt" => {
                self.name_tables(tree);
                self.unrehearsed("LOCK holds a table lock")
            }
            "TruncateStmt" => {
                self.name_tables(tree);
                self.unrehearsed("TRUNCATE holds an exclusive table lock")
            }
            "VacuumStmt" | "ClusterStmt" | "ReindexStmt" | "CheckPointStmt" | "RefreshMatViewStmt" => {
                self.name_tables(tree);
                self.unrehearsed("maintenance")
            }
            "DoStmt" | "CallStmt" => {
                self.leave_out("DO and CALL run code that is not in the statement");
                Kind::Unknown
            }
            "ExplainStmt" => {
                self.returns_rows = true;
                self.leave_out("EXPLAIN shows this server's own plan");
                Kind::Unknown
            }
            "CreateStmt" | "CreateSeqStmt" | "ViewStmt" | "CreateTableAsStmt" => {
                self.name_tables(tree);
                let target = ["relation", "sequence", "view"].map(|field| tree.get(field));
                let target = target.into_iter().find(|target| !target.is_empty()).unwrap_or(tree.get("into").get("rel"));
                if is_temporary(target) { self.session(SessionEffect::TempTable) } else { Kind::SchemaChange }
            }
            name if is_schema_change(name) => {
                self.name_tables(tree);
                Kind::SchemaChange
            }
            _ => Kind::Unknown,
        }
    }

    /// Relations only.
    fn name_tables(&mut self, tree: &Tree) {
        if tree.name() == "RangeVar" {
            self.table(tree);
        }
        children(tree, |child| self.name_tables(child));
    }

    /// All of them at once: a tree names a CTE's uses before the CTE. Scopes are not followed; a name that the catalog
    /// knows as something else is judged by that as well.
    fn name_ctes(&mut self, tree: &Tree) {
        let cte = tree.get("ctename").text();
        if tree.name() == "CommonTableExpr" && !self.ctes.iter().any(|known| known == cte) {
            self.ctes.push(cte.to_owned());
        }
        children(tree, |child| self.name_ctes(child));
    }

    fn table(&mut self, range: &Tree) {
        let (schema, name) = (range.get("schemaname").text(), range.get("relname").text());
        let written = if schema.is_empty() { name.to_owned() } else { format!("{schema}.{name}") };
        if !self.tables.contains(&written) {
            self.tables.push(written);
        }
    }

    /// SELECT and DML, all the way down.
    fn visit(&mut self, tree: &Tree) {
        match tree {
            Tree::Struct(name, _) => self.node(name, tree),
            Tree::List(items) => items.iter().for_each(|item| self.visit(item)),
            Tree::Empty | Tree::Int(_) | Tree::Text(_) => {}
        }
    }

    fn node(&mut self, name: &'static str, tree: &Tree) {
        match name {
            "AConst" => return,
            "SelectStmt" => self.select(tree),
            "InsertStmt" | "UpdateStmt" | "DeleteStmt" | "MergeStmt" => {
                self.rehearsal_target = true;
                self.at_least(Kind::Write);
            }
            "LockingClause" => {
                self.rehearsal_target = true;
                self.at_least(Kind::Write);
            }
            "IntoClause" => {
                let kind = if is_temporary(tree.get("rel")) { self.session(SessionEffect::TempTable) } else { Kind::SchemaChange };
                self.at_least(kind);
                return self.name_tables(tree);
            }
            "RangeVar" => self.relation(tree),
            "CommonTableExpr" => {}
            "FuncCall" => self.function(tree),
            "AExpr" => self.operator(tree.get("name").last_string()),
            "SubLink" if !tree.get("oper_name").is_empty() => self.operator(tree.get("oper_name").last_string()),
            "SortBy" if !tree.get("use_op").is_empty() => self.operator(tree.get("use_op").last_string()),
            "TypeName" => self.type_name(tree),
            "ColumnRef" => {
                let column = tree.get("fields").last_string();
                if matches!(column, "ctid" | "xmin" | "xmax" | "cmin" | "cmax" | "tableoid") {
                    self.at_least(STAYS);
                }
                if self.facts.attribute_is_volatile(column) {
                    self.at_least(Kind::Write);
                }
            }
            "AIndirection" => {
                let called = tree.get("indirection").items().iter().any(|field| self.facts.attribute_is_volatile(field.string()));
                if called {
                    self.at_least(Kind::Write);
                }
            }
            "RangeTableSample" => self.limited = true,
            "SqlvalueFunction" | "SqlValueFunction" => self.asks_time = true,
            name if is_harmless(name) => {}
            _ => self.at_least(Kind::Unknown),
        }
        children(tree, |child| self.visit(child));
    }

    fn select(&mut self, tree: &Tree) {
        let unordered = tree.get("sort_clause").is_empty();
        let cut = is_cut(tree);
        let distinct_on = tree.get("distinct_clause").items().iter().any(|item| !item.is_empty());
        self.limited |= unordered && (cut || distinct_on);
        self.cuts += usize::from(!unordered && cut) + usize::from(!unordered && distinct_on);
        if self.facts.hidden_volatility() {
            self.at_least(Kind::Write);
        }
    }

    fn relation(&mut self, range: &Tree) {
        self.table(range);
        let (schema, name) = (range.get("schemaname").text(), range.get("relname").text());
        // Catalogs hold oids, statistics and settings of this server, and drivers remember them.
        if matches!(schema, "pg_catalog" | "information_schema" | "pg_temp" | "understudy") || schema.is_empty() && name.starts_with("pg_")
        {
            return self.at_least(STAYS);
        }
        match self.facts.relation(schema, name) {
            Some(Relation::Readable) => {}
            Some(Relation::Vague) => self.limited = true,
            Some(Relation::Refused(kind)) => self.at_least(kind),
            Some(Relation::Foreign) => {
                self.at_least(STAYS);
                self.leave_out("a foreign table's rows are on a third server");
            }
            None if schema.is_empty() && self.ctes.iter().any(|cte| cte == name) => {}
            // A temporary table, or one created since the facts were read.
            None => {
                self.at_least(STAYS);
                self.leave_out("a relation that the catalog did not have when it was read");
            }
        }
    }

    fn function(&mut self, tree: &Tree) {
        let name = tree.get("funcname").last_string();
        self.asks_time |= matches!(name, "now" | "transaction_timestamp" | "statement_timestamp" | "age");
        if depends_on_row_order(name) {
            let over = tree.get("over");
            let ordered = !tree.get("agg_order").is_empty()
                || !over.get("order_clause").is_empty()
                || !over.get("name").is_empty()
                || !tree.get("agg_within_group").is_empty();
            self.limited |= !ordered;
            self.cuts += usize::from(ordered);
        }
        if let Some(reason) = unrehearsable(name) {
            self.leave_out(reason);
        }
        match name {
            "set_config" => {
                let kind = self.session(SessionEffect::Set);
                return self.at_least(kind);
            }
            "currval" | "lastval" | "current_query" => return self.at_least(STAYS),
            "setseed" | "pg_export_snapshot" | "pg_replication_origin_session_setup" => {
                let kind = self.session(SessionEffect::Other);
                return self.at_least(kind);
            }
            // What it takes from the sequence a rollback does not give back; the feed keeps a shadow's sequences ahead.
            "nextval" => self.rehearsal_target = true,
            _ if name.starts_with("pg_advisory_") || name.starts_with("pg_try_advisory_") => {
                if !name.contains("_xact_") {
                    self.effect(SessionEffect::AdvisoryLock);
                }
                return self.at_least(Kind::Session(SessionEffect::AdvisoryLock));
            }
            _ => {}
        }
        self.calls_strange |= self.facts.is_strange(name);
        match self.facts.function_is_volatile(name) {
            Some(true) => self.at_least(Kind::Write),
            Some(false) if is_about_this_server(name) => self.at_least(STAYS),
            Some(false) => {}
            None => {
                self.leave_out("calls a function that the catalog did not have when it was read");
                self.at_least(Kind::Unknown);
            }
        }
    }

    fn operator(&mut self, name: &str) {
        // `<>` is also what `!=`, `IS DISTINCT FROM` and `NOT IN` become; BETWEEN and the like carry a word.
        self.calls_strange |= self.facts.is_strange(name);
        let words = name.bytes().any(|byte| byte.is_ascii_alphabetic());
        match self.facts.operator_is_volatile(name) {
            Some(true) => self.at_least(Kind::Write),
            None if !words => self.at_least(Kind::Unknown),
            Some(false) | None => {}
        }
    }

    fn type_name(&mut self, tree: &Tree) {
        let name = tree.get("names").last_string();
        match self.facts.type_is_volatile(name) {
            Some(true) => self.at_least(Kind::Write),
            // Object identifiers differ between servers.
            Some(false) if name == "oid" || name.starts_with("reg") => self.at_least(STAYS),
            Some(false) => {}
            None => self.at_least(Kind::Unknown),
        }
    }
}

fn children(tree: &Tree, mut each: impl FnMut(&Tree)) {
    match tree {
        Tree::Struct(_, fields) => fields.iter().for_each(|(_, value)| each(value)),
        Tree::List(items) => items.iter().for_each(each),
        Tree::Empty | Tree::Int(_) | Tree::Text(_) => {}
    }
}

fn transaction(tree: &Tree) -> Kind {
    use pg_query::protobuf::TransactionStmtKind as K;
    let verb = match K::try_from(i32::try_from(tree.get("kind").int()).unwrap_or(0)) {
        Ok(K::TransStmtBegin | K::TransStmtStart) => {
            let read_only = tree.get("options").items().iter().any(|option| {
                option.get("defname").text() == "transaction_read_only" && option.get("arg").get("val").get("ival").int() != 0
            });
            TransactionVerb::Begin { read_only }
        }
        Ok(K::TransStmtCommit) => TransactionVerb::Commit,
        Ok(K::TransStmtRollback) => TransactionVerb::Rollback,
        Ok(K::TransStmtSavepoint | K::TransStmtRelease | K::TransStmtRollbackTo) => TransactionVerb::Savepoint,
        Ok(K::TransStmtPrepare | K::TransStmtCommitPrepared | K::TransStmtRollbackPrepared) => TransactionVerb::Prepared,
        Ok(K::Undefined) | Err(_) => return Kind::Unknown,
    };
    Kind::Transaction(verb)
}

fn is_temporary(range: &Tree) -> bool {
    range.get("relpersistence").text() == "t" || range.get("schemaname").text() == "pg_temp"
}
