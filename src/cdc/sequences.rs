//! Sequences are not part of a change stream. While a feed runs, the follower's are kept a stride ahead of the owner's, so that
//! neither a rehearsal nor a follower that must take over in a hurry hands out a value twice; the cutover sets them exactly.
//! Source: PostgreSQL documentation, "Restrictions" of logical replication.

use super::{
    CdcError,
    error::Attempt,
    names::{literal, qualified},
};
use tokio_postgres::Client;

/// How many values ahead the follower's sequences are kept. More than an application takes between two rounds (2 s) of
/// [`advance`], and few enough not to matter in a 32-bit sequence.
const STRIDE: i64 = 10_000;

/// Sequences read in one statement: bounds its length.
const CHUNK: usize = 200;

/// One sequence of the owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sequence {
    schema: String,
    name: String,
    last: i64,
    called: bool,
    increment: i64,
    min: i64,
    max: i64,
    cycle: bool,
}

/// The owner's sequences as they are now.
pub(super) async fn read(client: &Client) -> Result<Vec<Sequence>, CdcError> {
    let rows = client
        .query(
            "SELECT n.nspname::text, c.relname::text, s.seqincrement, s.seqmin, s.seqmax, s.seqcycle
             FROM pg_sequence s JOIN pg_class c ON c.oid = s.seqrelid JOIN pg_namespace n ON n.oid = c.relnamespace
             WHERE c.relpersistence <> 't' AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'understudy') ORDER BY 1, 2",
            &[],
        )
        .await
        .attempt("list the owner's sequences")?;
    let mut sequences = Vec::with_capacity(rows.len());
    for chunk in rows.chunks(CHUNK) {
        let parts: Vec<String> = chunk
            .iter()
            .enumerate()
            .map(|(i, row)| format!("SELECT {i}, last_value, is_called FROM {}", qualified(row.get(0), row.get(1))))
            .collect();
        let values = client.query(&format!("{} ORDER BY 1", parts.join(" UNION ALL ")), &[]).await.attempt("read sequences")?;
        for (row, value) in chunk.iter().zip(&values) {
            sequences.push(Sequence {
                schema: row.get(0),
                name: row.get(1),
                last: value.get(1),
                called: value.get(2),
                increment: row.get(2),
                min: row.get(3),
                max: row.get(4),
                cycle: row.get(5),
            });
        }
    }
    Ok(sequences)
}

/// The value that keeps the follower ahead; `None`: a cycling sequence is left alone, ahead means nothing for it.
fn ahead(sequence: &Sequence, stride: i64) -> Option<i64> {
    if sequence.cycle {
        return None;
    }
    Some(sequence.last.saturating_add(stride.saturating_mul(sequence.increment)).clamp(sequence.min, sequence.max))
}

fn rows_of(values: &[(&Sequence, i64, bool)]) -> String {
    let rows: Vec<String> = values
        .iter()
        .map(|(s, value, called)| format!("({}, {value}::int8, {called}, {})", literal(&qualified(&s.schema, &s.name)), s.increment > 0))
        .collect();
    format!("(VALUES {}) v (name, value, called, up)", rows.join(", "))
}

/// Keeps the follower's sequences ahead. Those that are far enough ahead are not touched. Returns how many were moved.
pub(super) async fn advance(from: &Client, to: &Client) -> Result<usize, CdcError> {
    let sequences = read(from).await?;
    let wanted: Vec<(&Sequence, i64, bool)> = sequences.iter().filter_map(|s| ahead(s, STRIDE).map(|value| (s, value, true))).collect();
    let mut moved = 0;
    for chunk in wanted.chunks(CHUNK) {
        // Half a stride of slack, so that a quiet sequence costs no write in each round.
        let halves: Vec<(&Sequence, i64, bool)> =
            chunk.iter().map(|(s, _, called)| (*s, ahead(s, STRIDE / 2).unwrap_or(s.last), *called)).collect();
        let rows = to
            .query(
                &format!(
                    "WITH wanted AS (SELECT to_regclass(name) AS oid, value, up FROM {}),
                          least AS (SELECT to_regclass(name) AS oid, value FROM {})
                     SELECT setval(w.oid, w.value, true) FROM wanted w JOIN least l ON l.oid = w.oid
                     JOIN pg_class c ON c.oid = w.oid AND c.relkind = 'S' JOIN pg_namespace n ON n.oid = c.relnamespace
                     JOIN pg_sequences s ON s.schemaname = n.nspname AND s.sequencename = c.relname
                     WHERE s.last_value IS NULL OR (w.up AND s.last_value < l.value) OR (NOT w.up AND s.last_value > l.value)",
                    rows_of(chunk),
                    rows_of(&halves)
                ),
                &[],
            )
            .await
            .attempt("keep the follower's sequences ahead")?;
        moved += rows.len();
    }
    Ok(moved)
}

/// Gives every sequence of `to` exactly the state it has on `from`. For a cutover, after the fence.
///
/// # Errors
/// [`CdcError`]; a sequence that `to` lacks is an error that names it.
pub async fn sync_sequences_exact(from: &Client, to: &Client) -> Result<usize, CdcError> {
    set_exact(to, &read(from).await?).await
}

/// Gives sequences exactly the state that was read.
pub(super) async fn set_exact(to: &Client, sequences: &[Sequence]) -> Result<usize, CdcError> {
    let exact: Vec<(&Sequence, i64, bool)> = sequences.iter().map(|s| (s, s.last, s.called)).collect();
    for chunk in exact.chunks(CHUNK) {
        let source = rows_of(chunk);
        let missing = to
            .query(&format!("SELECT name FROM {source} WHERE to_regclass(name) IS NULL"), &[])
            .await
            .attempt("look for the follower's sequences")?;
        if let Some(row) = missing.first() {
            return Err(CdcError::Setup(format!(
                "the follower has no sequence {}: create it there, then try again",
                row.get::<_, &str>(0)
            )));
        }
        to.query(&format!("SELECT setval(to_regclass(name), value, called) FROM {source}"), &[])
            .await
            .attempt("set the follower's sequences")?;
    }
    Ok(exact.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ahead_stays_inside_the_sequence() {
        let sequence = |last, increment, min, max, cycle| Sequence {
            schema: "s".into(),
            name: "n".into(),
            last,
            called: true,
            increment,
            min,
            max,
            cycle,
        };
        for (sequence, expected) in [
            (sequence(5, 1, 1, i64::MAX, false), Some(10_005)),
            (sequence(5, 10, 1, i64::MAX, false), Some(100_005)),
            (sequence(32_000, 1, 1, 32_767, false), Some(32_767)),
            (sequence(-5, -1, i64::MIN, -1, false), Some(-10_005)),
            (sequence(i64::MAX - 1, 1, 1, i64::MAX, false), Some(i64::MAX)),
            (sequence(5, i64::MAX, 1, 100, false), Some(100)),
            (sequence(5, 1, 1, 10, true), None),
        ] {
            assert_eq!(ahead(&sequence, STRIDE), expected, "{sequence:?}");
        }
    }
}
