//! Who owns an object and who may use it: statements that carry both over, for every kind of object alike. Pure.
//!
//! What is made while the shadow follows would otherwise belong to the feed's role there, and the application could not use it after a
//! cutover. Privileges are compared as they are in effect (a missing ACL counts as the kind's own), so that default privileges of the
//! owner's roles explain themselves. Deliberately absent: creating roles (they belong to the whole server and may carry passwords); a
//! role that the shadow lacks becomes a proposal, and nothing else waits for it.
//!
//! Source: PostgreSQL documentation, "Privileges", "ALTER DEFAULT PRIVILEGES".

use super::{
    SchemaError,
    catalog::{DefaultAccess, Grant, Namespace, Routine, Sequence, Table, UserType},
    plan::{Planned, draft},
    quote,
};
use std::collections::{BTreeMap, BTreeSet};
use tokio_postgres::Client;

/// Kind of the proposal about roles that the other side lacks.
pub const MISSING_ROLE: &str = "missing_role";

/// The first version with the privilege MAINTAIN.
const MAINTAIN: u32 = 170_000;

/// Roles of the other side by name; `true`: the feed may give objects to it.
pub type Roles = BTreeMap<String, bool>;

/// What the statements name.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    /// `TABLE`, `SCHEMA`, `SEQUENCE`, `TYPE`, `ROUTINE`; quoted name.
    Object(&'static str, String),
    /// Objects that a role makes later: the role, the schema, `TABLES` and the like.
    Future(String, Option<String>, &'static str),
}

/// Owner and privileges of one object.
#[derive(Clone, Debug)]
pub struct Access<'a> {
    place: Place,
    /// For people.
    object: String,
    /// None: it follows something else's.
    owner: Option<&'a str>,
    grants: &'a [Grant],
}

impl<'a> Access<'a> {
    /// Of a table or view, under the name that it has on the other side.
    pub fn table_as(table: &'a Table, schema: &str, name: &str) -> Self {
        let place = Place::Object("TABLE", quote::qualified(schema, name));
        Access { place, object: quote::plain(schema, name), owner: Some(&table.owner), grants: &table.grants }
    }

    /// Of a table or view.
    pub fn table(table: &'a Table) -> Self {
        Self::table_as(table, &table.schema, &table.name)
    }

    /// Of a schema.
    pub fn schema(schema: &'a Namespace) -> Self {
        let place = Place::Object("SCHEMA", quote::ident(&schema.name));
        Access { place, object: schema.name.clone(), owner: Some(&schema.owner), grants: &schema.grants }
    }

    /// Of a type or domain.
    pub fn user_type(item: &'a UserType) -> Self {
        let place = Place::Object("TYPE", quote::qualified(&item.schema, &item.name));
        Access { place, object: quote::plain(&item.schema, &item.name), owner: Some(&item.owner), grants: &item.grants }
    }

    /// Of a sequence; one that belongs to a column has its table's owner.
    pub fn sequence(item: &'a Sequence) -> Self {
        let place = Place::Object("SEQUENCE", quote::qualified(&item.schema, &item.name));
        let owner = item.owned_by.is_none().then_some(item.owner.as_str());
        Access { place, object: quote::plain(&item.schema, &item.name), owner, grants: &item.grants }
    }

    /// Of a function, procedure or aggregate.
    pub fn routine(item: &'a Routine) -> Self {
        let place = Place::Object("ROUTINE", format!("{}({})", quote::qualified(&item.schema, &item.name), item.arguments));
        let object = format!("{}({})", quote::plain(&item.schema, &item.name), item.arguments);
        Access { place, object, owner: Some(&item.owner), grants: &item.grants }
    }

    /// Of what a role will make; `None`: a kind of object that is not known here.
    fn future(item: &'a DefaultAccess) -> Option<Self> {
        let word = match item.kind.as_str() {
            "r" => "TABLES",
            "S" => "SEQUENCES",
            "f" => "FUNCTIONS",
            "T" => "TYPES",
            "n" => "SCHEMAS",
            _ => return None,
        };
        let place = Place::Future(item.role.clone(), item.schema.clone(), word);
        Some(Access { place, object: format!("default privileges of {}", item.role), owner: None, grants: &item.grants })
    }

    fn grant(&self, grant: &Grant) -> String {
        let option = if grant.grantable { " WITH GRANT OPTION" } else { "" };
        let (head, on) = self.words();
        format!("{head}GRANT {} ON {on} TO {}{option}", privilege(grant), grantee(grant))
    }

    fn revoke(&self, grant: &Grant, only_option: bool) -> String {
        let what = if only_option { "GRANT OPTION FOR " } else { "" };
        let (head, on) = self.words();
        format!("{head}REVOKE {what}{} ON {on} FROM {}", privilege(grant), grantee(grant))
    }

    fn words(&self) -> (String, String) {
        match &self.place {
            Place::Object(word, name) => (String::new(), format!("{word} {name}")),
            Place::Future(role, schema, word) => {
                let schema = schema.as_ref().map(|schema| format!("IN SCHEMA {} ", quote::ident(schema))).unwrap_or_default();
                (format!("ALTER DEFAULT PRIVILEGES FOR ROLE {} {schema}", quote::ident(role)), (*word).to_owned())
            }
        }
    }

    fn give(&self, role: &str) -> Option<String> {
        match &self.place {
            Place::Object(word, name) => Some(format!("ALTER {word} {name} OWNER TO {}", quote::ident(role))),
            Place::Future(..) => None,
        }
    }

    /// What an object of this kind allows others when it is made, or a role's default privileges are when nothing was said.
    fn at_first(&self) -> Vec<Grant> {
        let everybody = |privilege: &str| vec![Grant { privilege: privilege.into(), ..Grant::default() }];
        match &self.place {
            Place::Object("ROUTINE", _) | Place::Future(_, None, "FUNCTIONS") => everybody("EXECUTE"),
            Place::Object("TYPE", _) | Place::Future(_, None, "TYPES") => everybody("USAGE"),
            _ => vec![],
        }
    }

    /// Statements behind the one that makes the object, which must not fail with them: as far as the other server has the roles and
    /// lets us. Privileges first: who gave the object away may not grant any more.
    pub fn of_new(&self) -> Vec<String> {
        let mut statements = Vec::new();
        for Difference { sql, grant, .. } in self.difference(&self.at_first()) {
            let mut condition = Vec::new();
            condition.extend(
                grant.to.as_ref().map(|role| format!("EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = {})", quote::literal(role))),
            );
            if grant.privilege == "MAINTAIN" {
                condition.push(format!("pg_catalog.current_setting('server_version_num')::int >= {MAINTAIN}"));
            }
            statements.push(if condition.is_empty() { sql } else { guarded(&condition.join(" AND "), &sql) });
        }
        if let Some((owner, sql)) = self.owner.filter(|owner| !owner.is_empty()).and_then(|owner| Some((owner, self.give(owner)?))) {
            let condition = format!(
                "EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = {} AND rolname <> current_user AND pg_has_role(oid, 'MEMBER'))",
                quote::literal(owner)
            );
            statements.push(guarded(&condition, &sql));
        }
        statements
    }

    /// Statements from `before` to these privileges, each with the grant it is about.
    fn difference(&self, before: &[Grant]) -> Vec<Difference> {
        let same = |one: &Grant, other: &Grant| (&one.to, &one.privilege, &one.column) == (&other.to, &other.privilege, &other.column);
        let mut statements = Vec::new();
        for old in before {
            match self.grants.iter().find(|now| same(old, now)) {
                None => statements.push(Difference { sql: self.revoke(old, false), grant: old.clone(), revoke: true }),
                Some(now) if old.grantable && !now.grantable => {
                    statements.push(Difference { sql: self.revoke(old, true), grant: old.clone(), revoke: true });
                }
                Some(_) => {}
            }
        }
        for now in self.grants {
            if !before.iter().any(|old| same(old, now) && (old.grantable || !now.grantable)) {
                statements.push(Difference { sql: self.grant(now), grant: now.clone(), revoke: false });
            }
        }
        statements
    }

    /// What is asked of the other side when the object was there `before`, with that owner and those privileges.
    pub fn changed(&self, before: &Access<'_>, roles: &Roles) -> Vec<Planned> {
        let mut run = Vec::new();
        let mut lacking = Lacking::default();
        let mut there = |role: Option<&str>, sql: String| match role.filter(|role| !roles.contains_key(*role)) {
            Some(role) => lacking.add(role, sql),
            None => run.push(sql),
        };
        let author = match &self.place {
            Place::Future(role, ..) => Some(role.as_str()),
            Place::Object(..) => None,
        };
        for Difference { sql, grant, revoke } in self.difference(before.grants) {
            // What a role that is not there may not do needs no saying.
            if !revoke || grant.to.as_ref().is_none_or(|role| roles.contains_key(role)) {
                there(author.filter(|role| !roles.contains_key(*role)).or(grant.to.as_deref()), sql);
            }
        }
        let owner = self.owner.filter(|owner| !owner.is_empty() && before.owner.is_some_and(|old| !old.is_empty() && old != *owner));
        if let Some((owner, sql)) = owner.and_then(|owner| Some((owner, self.give(owner)?))) {
            there(Some(owner), sql);
        }
        let mut planned = Vec::new();
        if !run.is_empty() {
            let undo = Access { place: self.place.clone(), object: String::new(), owner: None, grants: before.grants };
            let change = format!("owner or privileges of {} changed on the owner", self.object);
            let mut draft = draft(&self.object, "alter_access", change, run, 0.97, "the same roles may do the same; no data in it");
            draft.undo = undo.difference(self.grants).into_iter().map(|one| one.sql).collect();
            if let Some(old) = before.owner.filter(|_| owner.is_some()) {
                draft.undo.extend(self.give(old));
            }
            draft.if_rejected =
                "the object keeps its owner and privileges on the shadow: after a cutover the application may lack a right".into();
            planned.push(draft.into());
        }
        planned.extend(lacking.planned(&self.object));
        planned
    }

    /// A warning for what [`Access::of_new`] leaves out because the other server lacks a role, or does not let us.
    pub fn missing(&self, roles: &Roles) -> Option<Planned> {
        let mut lacking = Lacking::default();
        for Difference { sql, grant, .. } in self.difference(&self.at_first()) {
            if let Some(role) = grant.to.as_deref().filter(|role| !roles.contains_key(*role)) {
                lacking.add(role, sql);
            }
        }
        if let Some(owner) = self.owner.filter(|owner| !owner.is_empty() && !roles.get(*owner).copied().unwrap_or_default())
            && let Some(sql) = self.give(owner)
        {
            lacking.refused = roles.contains_key(owner);
            lacking.add(owner, sql);
        }
        lacking.planned(&self.object)
    }
}

/// One statement on the way from some privileges to others.
struct Difference {
    sql: String,
    grant: Grant,
    revoke: bool,
}

/// Roles that are not there, and the statements that want them.
#[derive(Default)]
struct Lacking {
    roles: BTreeSet<String>,
    sql: Vec<String>,
    refused: bool,
}

impl Lacking {
    fn add(&mut self, role: &str, sql: String) {
        self.roles.insert(role.to_owned());
        self.sql.push(sql);
    }

    fn planned(self, object: &str) -> Option<Planned> {
        if self.sql.is_empty() {
            return None;
        }
        let names: Vec<&str> = self.roles.iter().map(String::as_str).collect();
        let (names, many) = (names.join(", "), names.len() > 1);
        let (change, why) = if self.refused && !many {
            (
                format!("{object} belongs to role {names} on the owner; the feed's role may not give it to that role on the shadow"),
                "make the feed's role on the shadow a member of it, then APPROVE",
            )
        } else {
            let roles = if many { "roles" } else { "role" };
            (
                format!("{object} belongs to or is used by {roles} {names} on the owner; the shadow has no such {roles}"),
                "create what is missing on the shadow's server, then APPROVE",
            )
        };
        let mut draft = draft(object, MISSING_ROLE, change, self.sql, 0.3, why);
        draft.alternatives = vec!["REJECT: the shadow is meant to have other roles".into()];
        draft.if_rejected =
            "the object belongs to the feed's role on the shadow: an application that logs in as another role cannot use it".into();
        Some(draft.into())
    }
}

fn privilege(grant: &Grant) -> String {
    match &grant.column {
        Some(column) => format!("{} ({})", grant.privilege, quote::ident(column)),
        None => grant.privilege.clone(),
    }
}

fn grantee(grant: &Grant) -> String {
    grant.to.as_ref().map_or_else(|| "PUBLIC".to_owned(), |role| quote::ident(role))
}

/// A statement that runs under a condition, and whose refusal for want of rights is a warning.
fn guarded(condition: &str, statement: &str) -> String {
    let body = format!(
        "BEGIN IF {condition} THEN {statement}; END IF; EXCEPTION WHEN insufficient_privilege THEN RAISE WARNING '%', SQLERRM; END"
    );
    format!("DO {}", quote::literal(&body))
}

/// The statement changes who may do what and nothing else.
pub fn only_access(sql: &str) -> bool {
    let plain = ["GRANT ", "REVOKE ", "ALTER DEFAULT PRIVILEGES "].iter().any(|word| sql.starts_with(word));
    plain
        || sql.starts_with("DO 'BEGIN IF EXISTS (SELECT FROM pg_catalog.pg_roles ")
        || sql.starts_with("ALTER ") && sql.contains(" OWNER TO ")
}

/// Changes of what roles give to others by default. Both lists are whole.
pub fn defaults(before: &[DefaultAccess], now: &[DefaultAccess], roles: &Roles) -> Vec<Planned> {
    let key = |item: &DefaultAccess| (item.role.clone(), item.schema.clone(), item.kind.clone());
    let keys: BTreeSet<_> = before.iter().chain(now).map(key).collect();
    let mut planned = Vec::new();
    for wanted in keys {
        let find = |list: &[DefaultAccess]| {
            list.iter().find(|item| key(item) == wanted).cloned().or_else(|| {
                let nothing = DefaultAccess { role: wanted.0.clone(), schema: wanted.1.clone(), kind: wanted.2.clone(), grants: vec![] };
                let grants = Access::future(&nothing)?.at_first();
                Some(DefaultAccess { grants, ..nothing })
            })
        };
        let (Some(old), Some(new)) = (find(before), find(now)) else { continue };
        if let (Some(old), Some(new)) = (Access::future(&old), Access::future(&new)) {
            planned.extend(new.changed(&old, roles));
        }
    }
    planned
}

/// Asks the other side for its roles.
///
/// # Errors
/// [`SchemaError::Server`]
pub async fn roles(target: &Client) -> Result<Roles, SchemaError> {
    let rows = target
        .query("SELECT rolname::text, pg_catalog.pg_has_role(oid, 'MEMBER') FROM pg_catalog.pg_roles", &[])
        .await
        .map_err(|error| SchemaError::server("ask the shadow for its roles", error))?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}
