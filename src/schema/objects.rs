//! Plans for what is not a table: types, sequences, functions, schemas, extensions, and what was dropped. Pure, except for the probes that the adapter answers.

use super::{
    access::{Access, Roles},
    catalog::{Catalog, Grant, Namespace, Routine, Sequence, UserType},
    message::{Dropped, Extension, Function, Object},
    plan::{Planned, ddl, draft},
    quote,
};

/// A schema is new or renamed.
pub fn schema(known: Option<&Namespace>, now: &Namespace, target: &Catalog, roles: &Roles) -> Vec<Planned> {
    let access = Access::schema(now);
    let mut planned = schema_itself(known, now, target);
    match known {
        Some(before) if target.has_schema(&before.name) => planned.extend(access.changed(&Access::schema(before), roles)),
        None if !planned.is_empty() => planned.extend(access.missing(roles)),
        _ => {}
    }
    planned
}

fn schema_itself(known: Option<&Namespace>, now: &Namespace, target: &Catalog) -> Vec<Planned> {
    let name = quote::ident(&now.name);
    match known {
        Some(before) if before.name != now.name && target.has_schema(&before.name) => {
            let old = quote::ident(&before.name);
            let mut draft = draft(
                &now.name,
                "rename_schema",
                format!("schema {} was renamed to {} on the owner", before.name, now.name),
                vec![format!("ALTER SCHEMA {old} RENAME TO {name}")],
                0.98,
                "exact by oid, catalog only",
            );
            draft.undo = vec![format!("ALTER SCHEMA {name} RENAME TO {old}")];
            vec![draft.into()]
        }
        Some(_) => vec![],
        None if target.has_schema(&now.name) => vec![],
        None => {
            let mut draft = draft(
                &now.name,
                "create_schema",
                format!("schema {} was created on the owner", now.name),
                [vec![format!("CREATE SCHEMA {name}")], Access::schema(now).of_new()].concat(),
                0.99,
                "nothing is touched",
            );
            draft.undo = vec![format!("DROP SCHEMA {name}")];
            vec![draft.into()]
        }
    }
}

/// A type is new or changed.
pub fn user_type(known: Option<&UserType>, now: &UserType, target: &Catalog, roles: &Roles) -> Vec<Planned> {
    let access = Access::user_type(now);
    let mut planned = type_itself(known, now, target);
    let there = |item: &UserType| target.user_type(&item.schema, &item.name).is_some();
    match known {
        Some(before) if there(before) || there(now) => planned.extend(access.changed(&Access::user_type(before), roles)),
        None if planned.iter().any(|one| one.draft.kind == "create_type") => planned.extend(access.missing(roles)),
        _ => {}
    }
    planned
}

fn type_itself(known: Option<&UserType>, now: &UserType, target: &Catalog) -> Vec<Planned> {
    let object = quote::plain(&now.schema, &now.name);
    let Some(before) = known else {
        return match target.user_type(&now.schema, &now.name) {
            Some(found) if found.kind == now.kind => change_type(found, now, &object),
            _ => {
                let mut draft = draft(
                    &object,
                    "create_type",
                    format!("type {object} was created on the owner"),
                    [vec![ddl::create_type(now)], Access::user_type(now).of_new()].concat(),
                    0.99,
                    "nothing is touched",
                );
                draft.undo = vec![format!("DROP TYPE {}", quote::qualified(&now.schema, &now.name))];
                vec![draft.into()]
            }
        };
    };
    let mut result = Vec::new();
    let word = if now.kind == "d" { "DOMAIN" } else { "TYPE" };
    if before.schema != now.schema && target.user_type(&before.schema, &before.name).is_some() {
        let sql = format!("ALTER {word} {} SET SCHEMA {}", quote::qualified(&before.schema, &before.name), quote::ident(&now.schema));
        result.push(
            draft(&object, "move_type", format!("type {object} moved on the owner"), vec![sql], 0.98, "exact by oid, catalog only").into(),
        );
    }
    if before.name != now.name && target.user_type(&before.schema, &before.name).is_some() {
        let sql = format!("ALTER {word} {} RENAME TO {}", quote::qualified(&now.schema, &before.name), quote::ident(&now.name));
        let mut draft = draft(
            &object,
            "rename_type",
            format!("type {} was renamed to {} on the owner", before.name, now.name),
            vec![sql],
            0.99,
            "exact by oid, catalog only",
        );
        draft.undo = vec![format!("ALTER {word} {} RENAME TO {}", quote::qualified(&now.schema, &now.name), quote::ident(&before.name))];
        result.push(draft.into());
    }
    result.extend(change_type(before, now, &object));
    result
}

fn change_type(before: &UserType, now: &UserType, object: &str) -> Vec<Planned> {
    let name = quote::qualified(&now.schema, &now.name);
    let mut result = Vec::new();
    match now.kind.as_str() {
        "e" => enum_labels(before, now, &name, object, &mut result),
        "d" => {
            let mut step = |kind: &str, change: &str, action: String| {
                let sql = vec![format!("ALTER DOMAIN {name} {action}")];
                result.push(
                    draft(
                        object,
                        kind,
                        format!("{change} of domain {object} changed on the owner"),
                        sql,
                        0.97,
                        "the owner's values satisfy it",
                    )
                    .into(),
                );
            };
            for gone in before.checks.iter().filter(|check| !now.checks.iter().any(|other| other.name == check.name)) {
                step("alter_domain", "a check", format!("DROP CONSTRAINT IF EXISTS {}", quote::ident(&gone.name)));
            }
            for new in now.checks.iter().filter(|check| !before.checks.iter().any(|other| other.name == check.name)) {
                step("alter_domain", "a check", format!("ADD CONSTRAINT {} {}", quote::ident(&new.name), new.def));
            }
            if before.not_null != now.not_null {
                step("alter_domain", "NOT NULL", format!("{} NOT NULL", if now.not_null { "SET" } else { "DROP" }));
            }
            if before.default != now.default {
                step(
                    "alter_domain",
                    "the default",
                    now.default.as_ref().map_or("DROP DEFAULT".into(), |default| format!("SET DEFAULT {default}")),
                );
            }
        }
        _ => {
            for attribute in &now.attributes {
                let action = match before.attributes.iter().find(|other| other.num == attribute.num || other.name == attribute.name) {
                    None => format!("ADD ATTRIBUTE {} {} CASCADE", quote::ident(&attribute.name), attribute.type_name),
                    Some(other) if other.name != attribute.name => {
                        format!("RENAME ATTRIBUTE {} TO {} CASCADE", quote::ident(&other.name), quote::ident(&attribute.name))
                    }
                    Some(_) => continue,
                };
                let sql = vec![format!("ALTER TYPE {name} {action}")];
                result.push(
                    draft(object, "alter_composite", format!("type {object} changed on the owner"), sql, 0.96, "every value is kept")
                        .into(),
                );
            }
            for gone in
                before.attributes.iter().filter(|one| !now.attributes.iter().any(|other| other.num == one.num || other.name == one.name))
            {
                let sql = vec![format!("ALTER TYPE {name} DROP ATTRIBUTE {} CASCADE", quote::ident(&gone.name))];
                let mut draft = draft(
                    object,
                    "alter_composite",
                    format!("attribute {} of {object} was dropped on the owner", gone.name),
                    sql,
                    0.85,
                    "its values are destroyed",
                );
                draft.loses_data = true;
                result.push(draft.into());
            }
        }
    }
    result
}

/// `ALTER TYPE … ADD VALUE` may run in a transaction from major 12 on; the label can be used once that has committed, which is how the owner
/// used it too. The applier must therefore not merge later transactions of the owner into this one.
fn enum_labels(before: &UserType, now: &UserType, name: &str, object: &str, result: &mut Vec<Planned>) {
    let mut have: Vec<String> = before.labels.iter().map(|label| label.label.clone()).collect();
    for label in &now.labels {
        let renamed = before.labels.iter().find(|other| other.oid == label.oid && other.oid != 0 && other.label != label.label);
        if let Some(other) = renamed.filter(|_| !have.contains(&label.label)) {
            let sql = format!("ALTER TYPE {name} RENAME VALUE {} TO {}", quote::literal(&other.label), quote::literal(&label.label));
            let undo = format!("ALTER TYPE {name} RENAME VALUE {} TO {}", quote::literal(&label.label), quote::literal(&other.label));
            let mut draft = draft(
                object,
                "rename_enum_value",
                format!("a label of {object} was renamed on the owner"),
                vec![sql],
                0.98,
                "exact by oid",
            );
            draft.undo = vec![undo];
            result.push(draft.into());
            have.iter_mut().filter(|known| **known == other.label).for_each(|known| known.clone_from(&label.label));
        }
    }
    for (at, label) in now.labels.iter().enumerate() {
        if have.contains(&label.label) {
            continue;
        }
        let place = match at.checked_sub(1).and_then(|before| now.labels.get(before)) {
            Some(previous) => format!(" AFTER {}", quote::literal(&previous.label)),
            None => have.first().map(|first| format!(" BEFORE {}", quote::literal(first))).unwrap_or_default(),
        };
        have.insert(at.min(have.len()), label.label.clone());
        let sql = format!("ALTER TYPE {name} ADD VALUE IF NOT EXISTS {}{place}", quote::literal(&label.label));
        let change = format!("label {} was added to {object} on the owner", label.label);
        let mut draft = draft(object, "add_enum_value", change, vec![sql], 0.99, "nothing is touched; cannot be taken back");
        draft.if_rejected = "rows with the new label cannot be applied".into();
        result.push(draft.into());
    }
}

/// A sequence is new or changed; its owner is set by the caller's statements.
pub fn sequence(known: Option<&Sequence>, now: &Sequence, target: &Catalog, roles: &Roles) -> Vec<Planned> {
    let access = Access::sequence(now);
    let mut planned = sequence_itself(known, now, target);
    let there = |item: &Sequence| target.sequence(&item.schema, &item.name).is_some();
    match known {
        Some(before) if there(before) || there(now) => planned.extend(access.changed(&Access::sequence(before), roles)),
        None if !planned.is_empty() => planned.extend(access.missing(roles)),
        _ => {}
    }
    planned
}

fn sequence_itself(known: Option<&Sequence>, now: &Sequence, target: &Catalog) -> Vec<Planned> {
    let object = quote::plain(&now.schema, &now.name);
    let Some(before) = known else {
        if target.sequence(&now.schema, &now.name).is_some() {
            return vec![];
        }
        let mut statements = vec![ddl::create_sequence(now)];
        if now.owned_by.is_some() {
            statements.extend(ddl::own_sequence(now));
        }
        statements.extend(Access::sequence(now).of_new());
        let mut draft = draft(
            &object,
            "create_sequence",
            format!("sequence {object} was created on the owner"),
            statements,
            0.99,
            "nothing is touched",
        );
        draft.undo = vec![format!("DROP SEQUENCE {}", quote::qualified(&now.schema, &now.name))];
        return vec![draft.into()];
    };
    let mut statements = Vec::new();
    if before.schema != now.schema {
        statements.push(format!(
            "ALTER SEQUENCE {} SET SCHEMA {}",
            quote::qualified(&before.schema, &before.name),
            quote::ident(&now.schema)
        ));
    }
    if before.name != now.name {
        statements.push(format!("ALTER SEQUENCE {} RENAME TO {}", quote::qualified(&now.schema, &before.name), quote::ident(&now.name)));
    }
    let options = |item: &Sequence| Sequence {
        oid: 0,
        schema: String::new(),
        name: String::new(),
        owned_table: None,
        owned_by: None,
        owner: String::new(),
        grants: vec![],
        ..item.clone()
    };
    if options(now) != options(before) {
        statements.push(ddl::alter_sequence(now));
    }
    if before.owned_by != now.owned_by && before.name == now.name {
        statements.extend(ddl::own_sequence(now));
    }
    // Already moved along with its table (SET SCHEMA moves owned sequences), or not there on purpose.
    if statements.is_empty() || target.sequence(&before.schema, &before.name).is_none() {
        return vec![];
    }
    vec![
        draft(
            &object,
            "alter_sequence",
            format!("sequence {object} changed on the owner"),
            statements,
            0.97,
            "its position is carried over at a cutover",
        )
        .into(),
    ]
}

/// CREATE FUNCTION, CREATE PROCEDURE and their ALTERs, by definition. `only_access`: nothing but its privileges changed.
pub fn function(known: Option<&Routine>, now: &Function, only_access: bool, target: &Catalog, roles: &Roles) -> Vec<Planned> {
    let (routine, access) = (&now.routine, Access::routine(&now.routine));
    let same_name = |other: &Routine| (&other.schema, &other.name) == (&routine.schema, &routine.name);
    let there = target.functions.values().any(same_name);
    let mut planned = Vec::new();
    if !only_access {
        planned.extend(known.filter(|before| !same_name(before) && !there).and_then(|before| renamed_function(before, routine, target)));
        planned.push(function_itself(known, now, &access));
    }
    let before = match known {
        Some(before) => Routine { schema: routine.schema.clone(), name: routine.name.clone(), ..before.clone() },
        // It was there before anybody remembered functions: what nobody knows is taken to be what every new one has.
        None if only_access => Routine { owner: String::new(), ..at_first() },
        None => {
            planned.extend(access.missing(roles));
            return planned;
        }
    };
    if there || !only_access {
        planned.extend(access.changed(&Access::routine(&before), roles));
    }
    planned
}

/// A function as it is made: everybody may run it.
fn at_first() -> Routine {
    Routine { grants: vec![Grant { privilege: "EXECUTE".into(), ..Grant::default() }], ..Routine::default() }
}

fn renamed_function(before: &Routine, now: &Routine, target: &Catalog) -> Option<Planned> {
    let old = target.functions.values().find(|other| (&other.schema, &other.name) == (&before.schema, &before.name))?;
    let name = |schema: &str, name: &str| format!("{}({})", quote::qualified(schema, name), now.arguments);
    let mut statements = Vec::new();
    if before.schema != now.schema {
        statements.push(format!("ALTER ROUTINE {} SET SCHEMA {}", name(&old.schema, &old.name), quote::ident(&now.schema)));
    }
    if before.name != now.name {
        statements.push(format!("ALTER ROUTINE {} RENAME TO {}", name(&now.schema, &before.name), quote::ident(&now.name)));
    }
    let object = format!("{}({})", quote::plain(&now.schema, &now.name), now.arguments);
    let change = format!("function {} became {object} on the owner", quote::plain(&before.schema, &before.name));
    Some(draft(&object, "rename_function", change, statements, 0.97, "exact by oid, catalog only").into())
}

fn function_itself(known: Option<&Routine>, now: &Function, access: &Access<'_>) -> Planned {
    let routine = &now.routine;
    let object = format!("{}({})", quote::plain(&routine.schema, &routine.name), routine.arguments);
    let Some(definition) = &now.definition else {
        return manual(&object, "create_aggregate", &format!("aggregate {object} was created or changed on the owner"));
    };
    let mut statements = vec!["SET LOCAL check_function_bodies = off".to_owned(), definition.clone()];
    if known.is_none() {
        statements.extend(access.of_new());
    }
    draft(
        &object,
        "create_function",
        format!("function {object} was created or changed on the owner"),
        statements,
        0.96,
        "the server's own definition",
    )
    .into()
}

/// CREATE EXTENSION; `available`: the other server has it.
pub fn extension(now: &Extension, available: bool) -> Vec<Planned> {
    let sql = format!("CREATE EXTENSION IF NOT EXISTS {} SCHEMA {}", quote::ident(&now.name), quote::ident(&now.schema));
    let (confidence, why) = if available {
        (0.96, "the shadow's server has it")
    } else {
        (0.3, "the shadow's server does not have it: install its package first")
    };
    vec![
        draft(&now.name, "create_extension", format!("extension {} was created on the owner", now.name), vec![sql], confidence, why).into(),
    ]
}

/// A change that is seen but not translated: a person carries it over.
pub fn manual(object: &str, kind: &str, change: &str) -> Planned {
    let mut draft = draft(
        object,
        kind,
        change.to_owned(),
        vec![],
        0.3,
        "this kind of change is not translated: carry it over by hand, then REJECT or APPROVE AS '<sql>'",
    );
    draft.alternatives = vec!["APPROVE id AS '<your sql>'".into(), "REJECT id: the shadow is meant to differ".into()];
    draft.into()
}

/// Objects of `commands` that no fact in the message speaks for.
pub fn untranslated(commands: &[Object]) -> Vec<Planned> {
    let mut seen = std::collections::BTreeSet::new();
    commands
        .iter()
        .filter(|object| !matches!(object.tag.as_str(), "COMMENT" | "GRANT" | "REVOKE" | "SECURITY LABEL" | "ALTER DEFAULT PRIVILEGES"))
        .filter(|object| {
            !matches!(
                object.class.as_str(),
                "pg_class" | "pg_type" | "pg_proc" | "pg_namespace" | "pg_extension" | "pg_trigger" | "pg_constraint" | "pg_attrdef"
            )
        })
        .filter(|object| seen.insert((object.class.clone(), object.oid)))
        .map(|object| manual(&object.identity, "other", &format!("{} {} on the owner", object.tag, object.identity)))
        .collect()
}

/// What the adapter found out about a dropped object on the other side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// Not there.
    Absent,
    /// There, and nothing else needs it.
    Free,
    /// There, and in use.
    Used,
}

/// An object other than a table, an index or a part of a table was dropped.
pub fn dropped(object: &Dropped, presence: Presence) -> Vec<Planned> {
    if presence == Presence::Absent {
        return vec![];
    }
    let (words, safe) = match object.kind.as_str() {
        "view" => ("VIEW", true),
        "materialized view" => ("MATERIALIZED VIEW", true),
        "function" | "procedure" => ("ROUTINE", true),
        "aggregate" => ("AGGREGATE", true),
        "type" => ("TYPE", true),
        "domain" => ("DOMAIN", true),
        "schema" => ("SCHEMA", true),
        "sequence" => ("SEQUENCE", false),
        "extension" => ("EXTENSION", false),
        other => return vec![manual(&object.identity, "other", &format!("{other} {} was dropped on the owner", object.identity))],
    };
    let kind = format!("drop_{}", object.kind.replace(' ', "_"));
    let change = format!("{} {} was dropped on the owner", object.kind, object.identity);
    let sql = vec![format!("DROP {words} IF EXISTS {}", object.identity)];
    let (confidence, why) = match (safe, presence) {
        (true, Presence::Free) => (0.97, "no data in it"),
        (true, _) => (0.5, "something on the shadow still uses it"),
        (false, _) => (0.85, "its state is destroyed: a person decides"),
    };
    let mut draft = draft(&object.identity, &kind, change, sql, confidence, why);
    draft.loses_data = !safe;
    vec![draft.into()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::catalog::Label;

    fn labels(list: &[(i64, &str)]) -> UserType {
        UserType {
            oid: 1,
            schema: "public".into(),
            name: "mood".into(),
            kind: "e".into(),
            labels: list.iter().map(|(oid, label)| Label { oid: *oid, label: (*label).into() }).collect(),
            ..UserType::default()
        }
    }

    #[test]
    fn enum_changes() {
        let before = labels(&[(1, "a"), (2, "b")]);
        let now = labels(&[(3, "zero"), (1, "a"), (2, "bee"), (4, "c")]);
        let sql: Vec<String> =
            user_type(Some(&before), &now, &Catalog::default(), &Roles::new()).into_iter().flat_map(|planned| planned.draft.sql).collect();
        assert_eq!(
            sql,
            [
                "ALTER TYPE \"public\".\"mood\" RENAME VALUE 'b' TO 'bee'",
                "ALTER TYPE \"public\".\"mood\" ADD VALUE IF NOT EXISTS 'zero' BEFORE 'a'",
                "ALTER TYPE \"public\".\"mood\" ADD VALUE IF NOT EXISTS 'c' AFTER 'bee'",
            ]
        );
    }

    #[test]
    fn drops() {
        let object = |kind: &str| Dropped { kind: kind.into(), identity: "public.x".into(), ..Dropped::default() };
        assert!(dropped(&object("view"), Presence::Absent).is_empty());
        assert!(!dropped(&object("view"), Presence::Free)[0].draft.loses_data);
        assert!(dropped(&object("sequence"), Presence::Free)[0].draft.loses_data);
        assert!(dropped(&object("type"), Presence::Used)[0].draft.confidence < 0.9);
        assert!(dropped(&object("policy"), Presence::Free)[0].draft.sql.is_empty());
    }
}
