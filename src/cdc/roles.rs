//! Roles that the copied schema and the application need: those that own or may use something in the database, or can log in.
//! Passwords are carried over as verifiers, never in clear, and never appear in an error or event.

use super::{
    CdcError,
    error::Attempt,
    names::{ident, literal},
};
use std::collections::BTreeSet;
use tokio_postgres::Client;

/// Creates on the follower the roles it lacks, with attributes, verifier and memberships. Returns what could not be done.
pub(super) async fn copy(from: &Client, to: &Client) -> Result<Vec<String>, CdcError> {
    let mut problems = Vec::new();
    let existing: BTreeSet<String> = to
        .query("SELECT rolname::text FROM pg_roles", &[])
        .await
        .attempt("list the follower's roles")?
        .iter()
        .map(|row| row.get(0))
        .collect();
    let readable: bool =
        from.query_one("SELECT has_table_privilege('pg_catalog.pg_authid', 'SELECT')", &[]).await.attempt("read own privileges")?.get(0);
    let (catalog, verifier) = if readable { ("pg_authid", "r.rolpassword") } else { ("pg_roles", "NULL::text") };
    let rows = from
        .query(
            &format!(
                "SELECT r.rolname::text, r.rolsuper, r.rolinherit, r.rolcreaterole, r.rolcreatedb, r.rolcanlogin, r.rolreplication,
                        r.rolbypassrls, r.rolconnlimit, {verifier}
                 FROM {catalog} r WHERE r.rolname !~ '^pg_' AND (r.rolcanlogin OR EXISTS (SELECT FROM pg_shdepend d
                   WHERE d.refclassid = 'pg_authid'::regclass AND d.refobjid = r.oid
                     AND d.dbid IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))))
                 ORDER BY 1"
            ),
            &[],
        )
        .await
        .attempt("list the owner's roles")?;
    let mut present = existing.clone();
    for row in &rows {
        let name: String = row.get(0);
        if existing.contains(&name) {
            continue;
        }
        let mut sql = format!("CREATE ROLE {}", ident(&name));
        let attributes = ["SUPERUSER", "INHERIT", "CREATEROLE", "CREATEDB", "LOGIN", "REPLICATION", "BYPASSRLS"];
        for (index, attribute) in attributes.iter().enumerate() {
            sql.push_str(if row.get::<_, bool>(index + 1) { " " } else { " NO" });
            sql.push_str(attribute);
        }
        sql.push_str(&format!(" CONNECTION LIMIT {}", row.get::<_, i32>(8)));
        if let Some(verifier) = row.get::<_, Option<&str>>(9) {
            sql.push_str(&format!(" PASSWORD {}", literal(verifier)));
        } else if row.get::<_, bool>(5) {
            problems.push(format!("role {name} was created on the follower without a password: set one there if it logs in with one"));
        }
        // The statement holds a verifier: neither it nor the server's message about it is shown.
        match to.batch_execute(&sql).await {
            Ok(()) => {
                present.insert(name);
            }
            Err(error) => problems.push(format!(
                "role {name} could not be created on the follower (SQLSTATE {}): create it there by hand",
                error.code().map_or("none", |code| code.code())
            )),
        }
    }
    let members = from
        .query(
            "SELECT g.rolname::text, m.rolname::text, bool_or(a.admin_option) FROM pg_auth_members a
             JOIN pg_roles g ON g.oid = a.roleid JOIN pg_roles m ON m.oid = a.member GROUP BY 1, 2 ORDER BY 1, 2",
            &[],
        )
        .await
        .attempt("list the owner's memberships")?;
    for row in &members {
        let (group, member): (String, String) = (row.get(0), row.get(1));
        // Memberships of roles that the follower had before are the follower's own affair.
        if existing.contains(&member) || !present.contains(&member) || !present.contains(&group) {
            continue;
        }
        let admin = if row.get(2) { " WITH ADMIN OPTION" } else { "" };
        if to.batch_execute(&format!("GRANT {} TO {}{admin}", ident(&group), ident(&member))).await.is_err() {
            problems.push(format!("role {member} could not be made a member of {group} on the follower: grant it by hand"));
        }
    }
    Ok(problems)
}
