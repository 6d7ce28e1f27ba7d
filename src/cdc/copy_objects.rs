//! Large objects of a copy: as they are at its snapshot. The change stream knows nothing of them, so what happens to them later stays
//! on the owner, and an operator is told.
//! Source: PostgreSQL documentation, "Large Objects", "Restrictions" of logical replication.

use super::{CdcError, error::Attempt, shared::Shared};
use crate::metadata::Severity;
use tokio_postgres::Client;

/// Bytes carried at a time.
const CHUNK_BYTES: i32 = 4 << 20;

/// Copies all large objects that `keeper` sees. Safe to repeat: what is there is overwritten.
pub(super) async fn copy(shared: &Shared, keeper: &Client, follower: &Client) -> Result<(), CdcError> {
    let objects =
        keeper.query("SELECT oid FROM pg_largeobject_metadata ORDER BY 1", &[]).await.attempt("list the owner's large objects")?;
    if objects.is_empty() {
        return Ok(());
    }
    let read = keeper.prepare("SELECT lo_get($1, $2, $3)").await.attempt("read a large object")?;
    let write = follower.prepare("SELECT lo_put($1, $2, $3)").await.attempt("write a large object")?;
    let mut refused = 0_u64;
    for row in &objects {
        let oid: u32 = row.get(0);
        let mut at = 0_i64;
        loop {
            // One that this role may not read is left out and counted, the others go on.
            keeper.batch_execute("SAVEPOINT object").await.attempt("read a large object")?;
            let chunk = match keeper.query_one(&read, &[&oid, &at, &CHUNK_BYTES]).await {
                Ok(chunk) => chunk,
                Err(source) if source.as_db_error().is_some() => {
                    keeper.batch_execute("ROLLBACK TO SAVEPOINT object").await.attempt("read a large object")?;
                    refused += 1;
                    break;
                }
                Err(source) => return Err(CdcError::Postgres { what: "read a large object".into(), source }),
            };
            keeper.batch_execute("RELEASE SAVEPOINT object").await.attempt("read a large object")?;
            if at == 0 {
                let empty = format!(
                    "SELECT lo_create({oid}) WHERE NOT EXISTS (SELECT FROM pg_largeobject_metadata WHERE oid = {oid});
                     BEGIN; SELECT lo_truncate64(lo_open({oid}, x'60000'::integer), 0); COMMIT"
                );
                follower.batch_execute(&empty).await.attempt("make a large object on the follower")?;
            }
            let bytes: &[u8] = chunk.get(0);
            if !bytes.is_empty() {
                follower.execute(&write, &[&oid, &at, &bytes]).await.attempt("write a large object")?;
                at += bytes.len() as i64;
            }
            if bytes.len() < CHUNK_BYTES as usize {
                break;
            }
        }
    }
    let message = "large objects were copied as they were at the snapshot; the change stream does not carry what happens to them later: move \
                   them to bytea columns, or copy them again by hand at the cutover";
    shared.event(Severity::Warning, message, serde_json::json!({"large_objects": objects.len(), "not_readable": refused}));
    Ok(())
}
