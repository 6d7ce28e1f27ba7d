//! What a feed costs the owner, watched for as long as it lives: WAL that its slot holds back, the age of the catalog rows that it
//! keeps from being vacuumed, a slot about to be lost. Each is told once when it passes its budget, and once when it is over.
//! Source: PostgreSQL documentation, "pg_replication_slots", "Routine Vacuuming".

use super::{CdcError, error::Attempt, session, shared::Shared};
use crate::metadata::Severity;
use std::time::Duration;
use tokio_postgres::Client;

/// How often the owner is looked at.
const PERIOD: Duration = Duration::from_secs(5);

/// WAL that the slot may hold back before somebody is told: as much as a busy server writes in some minutes, and less than what
/// most have room for.
const HELD_BACK_BYTES_MAX: i64 = 4 << 30;

/// A slot whose WAL may be removed after this much more is about to be lost.
const SAFE_BYTES_MIN: i64 = 256 << 20;

/// Transactions for which vacuum may not clean the catalogs before somebody is told: half of what makes autovacuum run against
/// wraparound (`autovacuum_freeze_max_age`).
const CATALOG_AGE_MAX: i64 = 100_000_000;

/// One thing that is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Strain {
    HeldBack,
    NearlyLost,
    CatalogAge,
}

/// What the owner says about a slot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Cost {
    held_back_bytes: i64,
    /// `None`: no limit is set.
    safe_bytes: Option<i64>,
    status: String,
    catalog_age: i64,
}

impl Cost {
    fn strains(&self) -> Vec<Strain> {
        let mut strains = Vec::new();
        if self.held_back_bytes > HELD_BACK_BYTES_MAX {
            strains.push(Strain::HeldBack);
        }
        if matches!(self.status.as_str(), "unreserved" | "lost") || self.safe_bytes.is_some_and(|bytes| bytes < SAFE_BYTES_MIN) {
            strains.push(Strain::NearlyLost);
        }
        if self.catalog_age > CATALOG_AGE_MAX {
            strains.push(Strain::CatalogAge);
        }
        strains
    }
}

/// Watches until the feed ends. The owner being away is the feed's own trouble, told elsewhere.
pub(super) async fn watch(shared: &Shared) {
    let mut told: Vec<Strain> = Vec::new();
    loop {
        if let Ok(owner) = session::connect(&shared.spec.from, "feed guard").await {
            while let Ok(cost) = look(&owner, &shared.feed).await {
                let now = cost.as_ref().map(Cost::strains).unwrap_or_default();
                for strain in now.iter().filter(|strain| !told.contains(strain)) {
                    tell(shared, *strain, &cost.clone().unwrap_or_default());
                }
                if now.is_empty() && !told.is_empty() {
                    shared.event(Severity::Info, "the feed's slot is within its budget again", serde_json::json!({"slot": shared.feed}));
                }
                told = now;
                tokio::time::sleep(PERIOD).await;
            }
        }
        tokio::time::sleep(PERIOD).await;
    }
}

/// `None`: there is no slot (yet).
async fn look(owner: &Client, feed: &str) -> Result<Option<Cost>, CdcError> {
    let row = owner
        .query_opt(
            "SELECT coalesce(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn), 0)::int8, safe_wal_size::int8, coalesce(wal_status, ''),
                    coalesce(age(catalog_xmin), 0)::int8
             FROM pg_replication_slots WHERE slot_name = $1 AND NOT pg_is_in_recovery()",
            &[&feed],
        )
        .await
        .attempt("look at the replication slot")?;
    Ok(row.map(|row| Cost { held_back_bytes: row.get(0), safe_bytes: row.get(1), status: row.get(2), catalog_age: row.get(3) }))
}

fn tell(shared: &Shared, strain: Strain, cost: &Cost) {
    let message = match strain {
        Strain::HeldBack => {
            "the feed's slot holds back much WAL on the owner: see why the feed does not get on (SHOW FEED), or end it (SHADOW STOP) \
             before the disk is full"
        }
        Strain::NearlyLost => {
            "the feed's slot is about to be lost, or is (max_slot_wal_keep_size on the owner): raise that limit; a slot that \
             is lost needs SHADOW RESYNC"
        }
        Strain::CatalogAge => {
            "the feed's slot has kept the owner's catalogs from being vacuumed for long: let the feed get on, or end it (SHADOW STOP)"
        }
    };
    let data = serde_json::json!({"slot": shared.feed, "held_back_bytes": cost.held_back_bytes, "safe_bytes": cost.safe_bytes,
        "wal_status": cost.status, "catalog_xmin_age": cost.catalog_age});
    shared.event(Severity::Alert, message, data);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets() {
        let quiet = Cost { held_back_bytes: 1 << 30, safe_bytes: None, status: "reserved".into(), catalog_age: 1000 };
        for (cost, expected) in [
            (quiet.clone(), vec![]),
            (Cost { held_back_bytes: 5 << 30, ..quiet.clone() }, vec![Strain::HeldBack]),
            (Cost { safe_bytes: Some(1 << 20), ..quiet.clone() }, vec![Strain::NearlyLost]),
            (Cost { safe_bytes: Some(1 << 30), ..quiet.clone() }, vec![]),
            (Cost { status: "unreserved".into(), ..quiet.clone() }, vec![Strain::NearlyLost]),
            (Cost { status: "extended".into(), ..quiet.clone() }, vec![]),
            (Cost { catalog_age: 200_000_000, held_back_bytes: 5 << 30, ..quiet }, vec![Strain::HeldBack, Strain::CatalogAge]),
        ] {
            assert_eq!(cost.strains(), expected, "{cost:?}");
        }
    }
}
