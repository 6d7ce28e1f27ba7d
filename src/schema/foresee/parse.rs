//! A planned migration's text as a list of actions, by PostgreSQL's own grammar. No literal of it is kept, except in expressions that a probe runs.

use crate::schema::SchemaError;
use pg_query::{
    DeparseOptions, Node, NodeEnum,
    protobuf::{self, AlterTableType, ConstrType, ObjectType},
};

/// A table as it was written; the schema is empty where it was left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Name {
    /// Schema, or empty.
    pub schema: String,
    /// Name.
    pub name: String,
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.schema.is_empty() { write!(f, "{}", self.name) } else { write!(f, "{}.{}", self.schema, self.name) }
    }
}

/// A column that a step adds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewColumn {
    /// Name.
    pub name: String,
    /// Type as written.
    pub type_name: String,
    /// NOT NULL or part of the primary key.
    pub not_null: bool,
    /// It has a default, an identity or an expression.
    pub filled: bool,
    /// Its default differs from row to row, so that the table is rewritten.
    pub volatile: bool,
}

/// What one step does.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Action {
    CreateTable {
        table: Name,
        columns: Vec<NewColumn>,
        primary_key: bool,
    },
    DropTable {
        table: Name,
        cascade: bool,
    },
    RenameTable {
        table: Name,
        to: String,
    },
    AddColumn {
        table: Name,
        column: NewColumn,
    },
    DropColumn {
        table: Name,
        column: String,
        cascade: bool,
    },
    RenameColumn {
        table: Name,
        column: String,
        to: String,
    },
    /// `using`: the expression as SQL.
    Retype {
        table: Name,
        column: String,
        type_name: String,
        using: Option<String>,
    },
    SetNotNull {
        table: Name,
        column: String,
    },
    DropNotNull {
        table: Name,
        column: String,
    },
    Default {
        table: Name,
        column: String,
    },
    Unique {
        table: Name,
        columns: Vec<String>,
        primary: bool,
    },
    ForeignKey {
        table: Name,
        columns: Vec<String>,
        parent: Name,
        parent_columns: Vec<String>,
        valid: bool,
    },
    Check {
        table: Name,
        expression: Option<String>,
        valid: bool,
    },
    DropConstraint {
        table: Name,
        name: String,
    },
    Index {
        table: Name,
        columns: Vec<String>,
        unique: bool,
        concurrent: bool,
        partial: bool,
    },
    EnumValue {
        name: String,
    },
    CreateType {
        name: String,
    },
    /// TRUNCATE.
    Truncate {
        table: Name,
    },
    /// INSERT, UPDATE, DELETE, SELECT, COPY: rows travel in the stream like any others.
    Rows,
    /// BEGIN, SET and the like.
    Session,
    /// Not on this list.
    Other(String),
}

fn name_of(relation: Option<&protobuf::RangeVar>) -> Name {
    relation.map_or_else(Name::default, |relation| Name { schema: relation.schemaname.clone(), name: relation.relname.clone() })
}

fn strings(nodes: &[Node]) -> Vec<String> {
    let text = |node: &Node| match &node.node {
        Some(NodeEnum::String(text)) => Some(text.sval.clone()),
        Some(NodeEnum::IndexElem(element)) if !element.name.is_empty() => Some(element.name.clone()),
        _ => None,
    };
    nodes.iter().filter_map(text).collect()
}

/// A type as `format_type` would more or less spell it; aliases are understood by `rules::types`.
fn type_text(found: Option<&protobuf::TypeName>) -> String {
    let Some(found) = found else { return String::new() };
    let mut names = strings(&found.names);
    if names.first().is_some_and(|schema| schema == "pg_catalog") {
        names.remove(0);
    }
    let number = |node: &Node| match &node.node {
        Some(NodeEnum::AConst(value)) => match &value.val {
            Some(protobuf::a_const::Val::Ival(number)) => Some(number.ival.to_string()),
            _ => None,
        },
        _ => None,
    };
    // INTERVAL's modifier is a bit mask of fields first
    let modifiers: Vec<String> = found.typmods.iter().filter_map(number).collect();
    let mut text = names.join(".");
    if !modifiers.is_empty() && text != "interval" && text != "bpchar" {
        text += &format!("({})", modifiers.join(","));
    } else if text == "bpchar" {
        text = format!("character({})", modifiers.first().map_or("1", String::as_str));
    }
    if found.array_bounds.is_empty() { text } else { text + "[]" }
}

/// An expression as SQL: deparsed inside `SELECT …`.
fn expression(node: Option<&Node>) -> Option<String> {
    let target = protobuf::ResTarget { val: Some(Box::new(node?.clone())), ..protobuf::ResTarget::default() };
    let select = protobuf::SelectStmt {
        target_list: vec![Node { node: Some(NodeEnum::ResTarget(Box::new(target))) }],
        limit_option: protobuf::LimitOption::Default.into(),
        op: protobuf::SetOperation::SetopNone.into(),
        ..protobuf::SelectStmt::default()
    };
    let text = NodeEnum::SelectStmt(Box::new(select)).deparse(DeparseOptions::default()).ok()?;
    text.strip_prefix("SELECT ").map(str::to_owned)
}

/// Functions whose value is the same for all rows of a statement: no rewrite (PostgreSQL documentation, ALTER TABLE, Notes).
const STABLE_DEFAULTS: [&str; 8] = [
    "now",
    "transaction_timestamp",
    "statement_timestamp",
    "current_setting",
    "timezone",
    "to_timestamp",
    "date_trunc",
    "jsonb_build_object",
];

fn is_volatile(node: Option<&Node>) -> bool {
    let Some(text) = expression(node) else { return false };
    let Ok(parsed) = pg_query::parse(&format!("SELECT {text}"), pg_query::ParserOptions::DEFAULT) else { return true };
    parsed.functions().iter().any(|name| !STABLE_DEFAULTS.contains(&name.rsplit('.').next().unwrap_or(name)))
}

fn new_column(definition: &protobuf::ColumnDef) -> (NewColumn, Vec<&protobuf::Constraint>) {
    let mut column = NewColumn {
        name: definition.colname.clone(),
        type_name: type_text(definition.type_name.as_ref()),
        not_null: definition.is_not_null,
        ..NewColumn::default()
    };
    if matches!(column.type_name.as_str(), "serial" | "bigserial" | "smallserial" | "serial4" | "serial8" | "serial2") {
        (column.not_null, column.filled, column.volatile) = (true, true, true);
    }
    let mut others = Vec::new();
    for constraint in &definition.constraints {
        let Some(NodeEnum::Constraint(constraint)) = &constraint.node else { continue };
        match ConstrType::try_from(constraint.contype) {
            Ok(ConstrType::ConstrNotnull) => column.not_null = true,
            Ok(ConstrType::ConstrDefault) => {
                column.filled = true;
                column.volatile |= is_volatile(constraint.raw_expr.as_deref());
            }
            Ok(ConstrType::ConstrIdentity | ConstrType::ConstrGenerated) => (column.filled, column.volatile) = (true, true),
            Ok(ConstrType::ConstrPrimary) => {
                column.not_null = true;
                others.push(constraint.as_ref());
            }
            Ok(ConstrType::ConstrUnique | ConstrType::ConstrForeign | ConstrType::ConstrCheck) => others.push(constraint.as_ref()),
            _ => {}
        }
    }
    (column, others)
}

/// A constraint on a table; `column`: it was written behind this column.
fn constraint(table: &Name, found: &protobuf::Constraint, column: Option<&str>) -> Option<Action> {
    let own = |keys: &[Node]| if keys.is_empty() { column.map(str::to_owned).into_iter().collect() } else { strings(keys) };
    let table = table.clone();
    Some(match ConstrType::try_from(found.contype) {
        // USING INDEX: the index has made sure already
        Ok(ConstrType::ConstrPrimary | ConstrType::ConstrUnique) if !found.indexname.is_empty() => {
            Action::Other("ADD CONSTRAINT USING INDEX".into())
        }
        Ok(kind @ (ConstrType::ConstrPrimary | ConstrType::ConstrUnique)) => {
            Action::Unique { table, columns: own(&found.keys), primary: kind == ConstrType::ConstrPrimary }
        }
        Ok(ConstrType::ConstrForeign) => Action::ForeignKey {
            table,
            columns: own(&found.fk_attrs),
            parent: name_of(found.pktable.as_ref()),
            parent_columns: strings(&found.pk_attrs),
            valid: !found.skip_validation,
        },
        Ok(ConstrType::ConstrCheck) => {
            Action::Check { table, expression: expression(found.raw_expr.as_deref()), valid: !found.skip_validation }
        }
        _ => return None,
    })
}

fn alter_table(table: &Name, command: &protobuf::AlterTableCmd) -> Vec<Action> {
    let (table, column) = (table.clone(), command.name.clone());
    let cascade = command.behavior == i32::from(protobuf::DropBehavior::DropCascade);
    let definition = command.def.as_ref().and_then(|node| node.node.as_ref());
    let kind = AlterTableType::try_from(command.subtype).unwrap_or(AlterTableType::Undefined);
    match (kind, definition) {
        (AlterTableType::AtAddColumn, Some(NodeEnum::ColumnDef(definition))) => {
            let (column, others) = new_column(definition);
            let name = column.name.clone();
            let mut actions = vec![Action::AddColumn { table: table.clone(), column }];
            actions.extend(others.into_iter().filter_map(|found| constraint(&table, found, Some(&name))));
            actions
        }
        (AlterTableType::AtDropColumn, _) => vec![Action::DropColumn { table, column, cascade }],
        (AlterTableType::AtAlterColumnType, Some(NodeEnum::ColumnDef(definition))) => vec![Action::Retype {
            table,
            column,
            type_name: type_text(definition.type_name.as_ref()),
            using: expression(definition.raw_default.as_deref()),
        }],
        (AlterTableType::AtSetNotNull, _) => vec![Action::SetNotNull { table, column }],
        (AlterTableType::AtDropNotNull, _) => vec![Action::DropNotNull { table, column }],
        (AlterTableType::AtColumnDefault, _) => vec![Action::Default { table, column }],
        (AlterTableType::AtAddConstraint, Some(NodeEnum::Constraint(found))) => {
            vec![constraint(&table, found, None).unwrap_or_else(|| Action::Other("ADD CONSTRAINT".into()))]
        }
        (AlterTableType::AtDropConstraint, _) => vec![Action::DropConstraint { table, name: column }],
        (kind, _) => vec![Action::Other(format!("ALTER TABLE {table}: {}", kind.as_str_name()))],
    }
}

fn rename(found: &protobuf::RenameStmt) -> Action {
    let table = name_of(found.relation.as_ref());
    match ObjectType::try_from(found.rename_type) {
        Ok(ObjectType::ObjectTable) => Action::RenameTable { table, to: found.newname.clone() },
        Ok(ObjectType::ObjectColumn) => Action::RenameColumn { table, column: found.subname.clone(), to: found.newname.clone() },
        Ok(other) => Action::Other(format!("RENAME {}", other.as_str_name())),
        Err(_) => Action::Other("RENAME".into()),
    }
}

fn dropped(found: &protobuf::DropStmt) -> Vec<Action> {
    let cascade = found.behavior == i32::from(protobuf::DropBehavior::DropCascade);
    if ObjectType::try_from(found.remove_type) != Ok(ObjectType::ObjectTable) {
        let kind = ObjectType::try_from(found.remove_type).map_or("DROP", |kind| kind.as_str_name());
        return vec![Action::Other(format!("DROP {kind}"))];
    }
    let table = |node: &Node| match &node.node {
        Some(NodeEnum::List(list)) => {
            let mut parts = strings(&list.items);
            let name = parts.pop().unwrap_or_default();
            Action::DropTable { table: Name { schema: parts.pop().unwrap_or_default(), name }, cascade }
        }
        _ => Action::Other("DROP TABLE".into()),
    };
    found.objects.iter().map(table).collect()
}

/// What an empty table is declared with cannot fail on its rows: only its columns and its key count.
fn created(found: &protobuf::CreateStmt) -> Vec<Action> {
    let table = name_of(found.relation.as_ref());
    let (mut columns, mut primary_key) = (Vec::new(), false);
    for element in &found.table_elts {
        match &element.node {
            Some(NodeEnum::ColumnDef(definition)) => {
                let (column, others) = new_column(definition);
                primary_key |= others.iter().any(|other| ConstrType::try_from(other.contype) == Ok(ConstrType::ConstrPrimary));
                columns.push(column);
            }
            Some(NodeEnum::Constraint(found)) => {
                primary_key |= ConstrType::try_from(found.contype) == Ok(ConstrType::ConstrPrimary);
            }
            _ => {}
        }
    }
    vec![Action::CreateTable { table, columns, primary_key }]
}

fn actions(node: &NodeEnum) -> Vec<Action> {
    match node {
        NodeEnum::AlterTableStmt(found) if ObjectType::try_from(found.objtype) == Ok(ObjectType::ObjectTable) => {
            let table = name_of(found.relation.as_ref());
            let command = |node: &Node| match &node.node {
                Some(NodeEnum::AlterTableCmd(command)) => alter_table(&table, command),
                _ => vec![],
            };
            found.cmds.iter().flat_map(command).collect()
        }
        NodeEnum::CreateStmt(found) => created(found),
        NodeEnum::DropStmt(found) => dropped(found),
        NodeEnum::RenameStmt(found) => vec![rename(found)],
        NodeEnum::IndexStmt(found) => vec![Action::Index {
            table: name_of(found.relation.as_ref()),
            columns: strings(&found.index_params),
            unique: found.unique,
            concurrent: found.concurrent,
            partial: found.where_clause.is_some(),
        }],
        NodeEnum::AlterEnumStmt(found) if found.old_val.is_empty() => {
            vec![Action::EnumValue { name: strings(&found.type_name).join(".") }]
        }
        NodeEnum::CreateEnumStmt(found) => vec![Action::CreateType { name: strings(&found.type_name).join(".") }],
        NodeEnum::TruncateStmt(found) => {
            let table = |node: &Node| match &node.node {
                Some(NodeEnum::RangeVar(relation)) => Some(Action::Truncate { table: name_of(Some(relation)) }),
                _ => None,
            };
            found.relations.iter().filter_map(table).collect()
        }
        NodeEnum::InsertStmt(_)
        | NodeEnum::UpdateStmt(_)
        | NodeEnum::DeleteStmt(_)
        | NodeEnum::MergeStmt(_)
        | NodeEnum::SelectStmt(_)
        | NodeEnum::CopyStmt(_) => vec![Action::Rows],
        NodeEnum::TransactionStmt(_) | NodeEnum::VariableSetStmt(_) | NodeEnum::LockStmt(_) | NodeEnum::CommentStmt(_) => {
            vec![Action::Session]
        }
        other => {
            let debug = format!("{other:?}");
            vec![Action::Other(debug.split(['(', ' ']).next().unwrap_or("statement").trim_end_matches("Stmt").to_owned())]
        }
    }
}

/// Most text that is taken for a migration.
const TEXT_MAX: usize = 4 << 20;

/// The actions of a migration with the line that each statement starts on.
///
/// # Errors
/// [`SchemaError::Proposal`]: it is too long, or no SQL that PostgreSQL's grammar knows.
pub fn parse(text: &str) -> Result<Vec<(usize, Action)>, SchemaError> {
    if text.len() > TEXT_MAX {
        return Err(SchemaError::Proposal(format!("the migration is longer than {TEXT_MAX} bytes: check it in parts")));
    }
    let parsed = pg_query::parse(text, pg_query::ParserOptions::DEFAULT)
        .map_err(|error| SchemaError::Proposal(format!("the migration is not SQL that PostgreSQL understands: {error}")))?;
    let mut result = Vec::new();
    for statement in &parsed.protobuf.stmts {
        let start = usize::try_from(statement.stmt_location).unwrap_or(0).min(text.len());
        let blank = text.as_bytes()[start..].iter().take_while(|byte| byte.is_ascii_whitespace()).count();
        let line = 1 + text.as_bytes()[..start + blank].iter().filter(|byte| **byte == b'\n').count();
        if let Some(node) = statement.stmt.as_ref().and_then(|node| node.node.as_ref()) {
            result.extend(actions(node).into_iter().map(|action| (line, action)));
        }
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn one(sql: &str) -> Action {
        parse(sql).unwrap().remove(0).1
    }

    fn table(name: &str) -> Name {
        Name { schema: String::new(), name: name.into() }
    }

    #[test]
    fn actions_of_statements() {
        let column = |type_name: &str, not_null, filled, volatile| NewColumn {
            name: "c".into(),
            type_name: type_name.into(),
            not_null,
            filled,
            volatile,
        };
        for (sql, expected) in [
            ("ALTER TABLE t ADD c int", Action::AddColumn { table: table("t"), column: column("int4", false, false, false) }),
            (
                "ALTER TABLE t ADD c varchar(9) NOT NULL DEFAULT 'x'",
                Action::AddColumn { table: table("t"), column: column("varchar(9)", true, true, false) },
            ),
            (
                "ALTER TABLE t ADD c timestamptz DEFAULT now()",
                Action::AddColumn { table: table("t"), column: column("timestamptz", false, true, false) },
            ),
            (
                "ALTER TABLE t ADD c uuid DEFAULT gen_random_uuid()",
                Action::AddColumn { table: table("t"), column: column("uuid", false, true, true) },
            ),
            ("ALTER TABLE t ADD c bigserial", Action::AddColumn { table: table("t"), column: column("bigserial", true, true, true) }),
            ("ALTER TABLE t DROP c CASCADE", Action::DropColumn { table: table("t"), column: "c".into(), cascade: true }),
            (
                "ALTER TABLE t ALTER c TYPE int USING c::int + 1",
                Action::Retype { table: table("t"), column: "c".into(), type_name: "int4".into(), using: Some("c::int + 1".into()) },
            ),
            ("ALTER TABLE t RENAME c TO d", Action::RenameColumn { table: table("t"), column: "c".into(), to: "d".into() }),
            (
                "ALTER TABLE t ADD CONSTRAINT x CHECK (c > 0) NOT VALID",
                Action::Check { table: table("t"), expression: Some("c > 0".into()), valid: false },
            ),
            ("ALTER TYPE mood ADD VALUE 'x'", Action::EnumValue { name: "mood".into() }),
            ("DROP TABLE a.b", Action::DropTable { table: Name { schema: "a".into(), name: "b".into() }, cascade: false }),
            ("UPDATE t SET c = 1", Action::Rows),
            ("BEGIN", Action::Session),
        ] {
            assert_eq!(one(sql), expected, "{sql}");
        }
        assert_eq!(parse("\n-- x\nSELECT 1;\n\n  DROP TABLE t").unwrap().iter().map(|(line, _)| *line).collect::<Vec<_>>(), [3, 5]);
        assert!(parse("ALTER TABLE").unwrap_err().to_string().contains("not SQL"));
    }

    proptest! {
        #[test]
        fn any_text_is_answered(text in "\\PC{0,60}") {
            let _ = parse(&text);
        }
    }
}
