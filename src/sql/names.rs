//! What is known by name: nodes of the grammar, and built-in functions that volatility alone does not describe.

/// DDL nodes are named by what they do.
pub(super) fn is_schema_change(name: &str) -> bool {
    ["Create", "Alter", "Drop"].iter().any(|verb| name.starts_with(verb)) && name.ends_with("Stmt")
        || matches!(
            name,
            "IndexStmt"
                | "RenameStmt"
                | "CommentStmt"
                | "SecLabelStmt"
                | "GrantStmt"
                | "GrantRoleStmt"
                | "DefineStmt"
                | "RuleStmt"
                | "CompositeTypeStmt"
                | "CreatedbStmt"
                | "DropdbStmt"
                | "ReassignOwnedStmt"
                | "ImportForeignSchemaStmt"
        )
}

/// Nodes of SELECT and DML that do nothing by themselves. Any other node makes the statement `Unknown`.
pub(super) fn is_harmless(name: &str) -> bool {
    name.starts_with("Json")
        || matches!(
            name,
            "RawStmt"
                | "Alias"
                | "ParamRef"
                | "TypeCast"
                | "CollateClause"
                | "AStar"
                | "AIndices"
                | "AArrayExpr"
                | "ResTarget"
                | "MultiAssignRef"
                | "SortBy"
                | "WindowDef"
                | "RangeSubselect"
                | "RangeFunction"
                | "RangeTableFunc"
                | "RangeTableFuncCol"
                | "ColumnDef"
                | "GroupingSet"
                | "WithClause"
                | "CteSearchClause"
                | "CteCycleClause"
                | "CtesearchClause"
                | "CtecycleClause"
                | "Integer"
                | "Float"
                | "Boolean"
                | "String"
                | "BitString"
                | "List"
                | "BoolExpr"
                | "SubLink"
                | "CaseExpr"
                | "CaseWhen"
                | "RowExpr"
                | "CoalesceExpr"
                | "MinMaxExpr"
                | "SqlvalueFunction"
                | "SqlValueFunction"
                | "NullTest"
                | "BooleanTest"
                | "JoinExpr"
                | "NamedArgExpr"
                | "GroupingFunc"
                | "SetToDefault"
                | "XmlExpr"
                | "XmlSerialize"
                | "InferClause"
                | "OnConflictClause"
                | "IndexElem"
                | "MergeWhenClause"
                | "MergeSupportFunc"
                | "ReturningClause"
                | "ReturningOption"
                | "CurrentOfExpr"
                | "DefElem"
        )
}

/// Built-in functions that are stable, and tell about this server, its catalog, its transactions or the session.
pub(super) fn is_about_this_server(name: &str) -> bool {
    let pure = [
        "pg_typeof",
        "pg_size_pretty",
        "pg_size_bytes",
        "pg_input_is_valid",
        "pg_input_error_info",
        "pg_char_to_encoding",
        "pg_encoding_to_char",
        "pg_client_encoding",
        "pg_get_keywords",
    ];
    name.starts_with("pg_") && !pure.contains(&name)
        || ["txid_", "inet_client_", "inet_server_", "has_", "to_reg", "lo_"].iter().any(|prefix| name.starts_with(prefix))
        || matches!(
            name,
            "version"
                | "current_setting"
                | "obj_description"
                | "col_description"
                | "shobj_description"
                | "format_type"
                | "row_security_active"
                | "mxid_age"
                | "icu_unicode_version"
                | "unicode_version"
        )
}

/// Aggregates and window functions whose result depends on the order of rows.
pub(super) fn depends_on_row_order(name: &str) -> bool {
    matches!(
        name,
        "array_agg"
            | "string_agg"
            | "json_agg"
            | "jsonb_agg"
            | "json_agg_strict"
            | "jsonb_agg_strict"
            | "json_object_agg"
            | "xmlagg"
            | "row_number"
            | "lag"
            | "lead"
            | "first_value"
            | "last_value"
            | "nth_value"
            | "ntile"
            | "any_value"
    )
}

/// Functions whose effect a rollback does not undo, or that would keep a rehearsal busy.
pub(super) fn unrehearsable(name: &str) -> Option<&'static str> {
    let starts = |prefixes: &[&str]| prefixes.iter().any(|prefix| name.starts_with(prefix));
    match name {
        "setval" => Some("setval() is not undone by a rollback"),
        "pg_notify" => Some("NOTIFY reaches other sessions"),
        "set_config" => Some("set_config() changes the session"),
        _ if starts(&["dblink", "postgres_fdw_"]) => Some("dblink reaches a third server"),
        _ if starts(&["lo_", "loread", "lowrite"]) => Some("large objects are not replicated"),
        _ if starts(&["pg_advisory_", "pg_try_advisory_"]) => Some("advisory locks belong to the session"),
        _ if starts(&["pg_sleep"]) => Some("pg_sleep() only waits"),
        _ if starts(&["pg_"]) && !starts(&["pg_get_", "pg_typeof", "pg_size_", "pg_column_", "pg_current_", "pg_input_"]) => {
            Some("calls a function of the server's administration")
        }
        _ => None,
    }
}
