//! The checker: it keeps what every client was told, and compares it with what the final owner of the data holds.
//!
//! Each key is written by one client only, so what a row must be is known without asking a database: the ledger holds
//! the last acknowledged value, and the values that are possible because a connection broke between statement and
//! answer (in doubt). Everything else is a lost, doubled, wrong or invented row.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Examples kept per kind of finding: enough to look for the cause.
const EXAMPLES_MAX: usize = 10;

/// What a row may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// No such row.
    Absent,
    /// The row reads as this text.
    Is(String),
    /// The row exists; the server alone knew the value (a sequence number) and its answer was lost.
    Any,
}

impl Value {
    fn admits(&self, found: Option<&str>) -> bool {
        match (self, found) {
            (Value::Absent, None) | (Value::Any, Some(_)) => true,
            (Value::Is(text), Some(found)) => text == found,
            _ => false,
        }
    }
}

#[derive(Clone, Debug)]
struct Claim {
    certain: Value,
    possible: Vec<Value>,
}

/// What the clients know. Shared by all of them.
#[derive(Default)]
pub struct Ledger {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    claims: HashMap<(&'static str, String), Claim>,
    /// Product → (acknowledged increments, increments in doubt).
    increments: BTreeMap<i32, (i64, i64)>,
}

impl Ledger {
    /// A write is about to be sent: from now on `value` is possible.
    pub fn begin(&self, table: &'static str, key: &str, value: Value) {
        let mut state = self.lock();
        let claim = state.claims.entry((table, key.to_owned())).or_insert(Claim { certain: Value::Absent, possible: Vec::new() });
        claim.possible.push(value);
    }

    /// The client was told that it is committed.
    pub fn acknowledged(&self, table: &'static str, key: &str, value: Value) {
        self.lock().claims.insert((table, key.to_owned()), Claim { certain: value, possible: Vec::new() });
    }

    /// The client was told that it is not: the newest possible value is taken back.
    pub fn refused(&self, table: &'static str, key: &str) {
        let mut state = self.lock();
        let slot = (table, key.to_owned());
        if let Some(claim) = state.claims.get_mut(&slot) {
            claim.possible.pop();
            if claim.possible.is_empty() && claim.certain == Value::Absent {
                state.claims.remove(&slot);
            }
        }
    }

    /// An increment of a product's stock: acknowledged, or in doubt.
    pub fn incremented(&self, product: i32, acknowledged: bool) {
        let mut state = self.lock();
        let (certain, doubt) = state.increments.entry(product).or_default();
        if acknowledged {
            *certain += 1;
        } else {
            *doubt += 1;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the comparison found. All but the first two must be zero.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Findings {
    /// Rows that clients were told about.
    pub acknowledged: u64,
    /// Rows whose answer was lost with a connection; either outcome is right.
    pub in_doubt: u64,
    /// Acknowledged and not there.
    pub missing: u64,
    /// There more than once.
    pub duplicated: u64,
    /// There with another value.
    pub wrong: u64,
    /// There although no client wrote it, or although it was refused or deleted.
    pub unexpected: u64,
    /// Accounts whose balance or version is not what their transfers make it.
    pub balances_wrong: u64,
    /// Products whose stock is not the number of acknowledged increments.
    pub stocks_wrong: u64,
    /// Some of the above: table, key, kind.
    pub examples: Vec<String>,
}

impl Findings {
    /// Whether the database holds exactly what the clients were told.
    pub fn is_clean(&self) -> bool {
        self.missing + self.duplicated + self.wrong + self.unexpected + self.balances_wrong + self.stocks_wrong == 0
    }

    fn example(&mut self, text: String) {
        if self.examples.len() < EXAMPLES_MAX {
            self.examples.push(text);
        }
    }
}

/// Key and canonical text of every row that the workload writes. `workload` writes the same texts without a database.
pub const CANONICAL: [(&str, &str); 5] = [
    ("transfer", "SELECT token, from_account || '|' || to_account || '|' || amount || '|' || note FROM transfer"),
    ("journal", "SELECT token, client || '|' || revision || '|' || (payload->>'text') FROM journal"),
    ("ticket", "SELECT token, number::text FROM ticket"),
    ("measurement", "SELECT token, device || '|' || value || '|' || array_to_string(readings, ',') FROM measurement"),
    (
        "customer",
        "SELECT id::text, name || '|' || mood || '|' || (home).zip || '|' || array_to_string(tags, ',') || '|' ||
                (profile->>'revision') || '|' || octet_length(photo) FROM customer WHERE NOT seeded",
    ),
];

/// Compares the ledger with a database. Nothing may write to it meanwhile.
///
/// # Errors
/// The database's.
pub async fn compare(ledger: &Ledger, owner: &tokio_postgres::Client) -> Result<Findings, tokio_postgres::Error> {
    let mut found: HashMap<(&'static str, String), Vec<String>> = HashMap::new();
    for (table, sql) in CANONICAL {
        for row in owner.query(sql, &[]).await? {
            let text: Option<String> = row.get(1);
            found.entry((table, row.get(0))).or_default().push(text.unwrap_or_else(|| "a NULL in the row".to_owned()));
        }
    }
    let stocks: Vec<(i32, i64)> =
        owner.query("SELECT id, stock::bigint FROM product", &[]).await?.iter().map(|row| (row.get(0), row.get(1))).collect();
    // Balances: each account must be what it began with, plus what came, minus what went, and as many versions.
    let accounts = owner
        .query(
            "WITH moved AS (
                 SELECT to_account AS id, amount FROM transfer UNION ALL SELECT from_account, -amount FROM transfer
             ), sums AS (SELECT id, sum(amount) AS amount, count(*) AS moves FROM moved GROUP BY id)
             SELECT a.id FROM account a LEFT JOIN sums s USING (id)
             WHERE a.balance <> a.opening + coalesce(s.amount, 0) OR a.version <> coalesce(s.moves, 0) ORDER BY a.id",
            &[],
        )
        .await?;
    let mut findings = judge(&ledger.lock(), &found, &stocks);
    findings.balances_wrong = accounts.len() as u64;
    for row in &accounts {
        findings.example(format!("account {}: its balance is not the sum of its transfers", row.get::<_, i32>(0)));
    }
    Ok(findings)
}

fn judge(state: &State, found: &HashMap<(&'static str, String), Vec<String>>, stocks: &[(i32, i64)]) -> Findings {
    let mut findings = Findings::default();
    for ((table, key), claim) in &state.claims {
        let rows = found.get(&(*table, key.clone())).map(Vec::as_slice).unwrap_or_default();
        if claim.certain != Value::Absent {
            findings.acknowledged += 1;
        }
        if !claim.possible.is_empty() {
            findings.in_doubt += 1;
        }
        let row = rows.first().map(String::as_str);
        let fits = claim.certain.admits(row) || claim.possible.iter().any(|value| value.admits(row));
        let kind = match rows.len() {
            2.. => {
                findings.duplicated += 1;
                "is there more than once"
            }
            _ if fits => continue,
            0 => {
                findings.missing += 1;
                "was acknowledged and is not there"
            }
            _ if claim.certain == Value::Absent => {
                findings.unexpected += 1;
                "was deleted and is there"
            }
            _ => {
                findings.wrong += 1;
                "has another value than the one acknowledged"
            }
        };
        findings.example(format!("{table} {key} {kind}"));
    }
    for (table, key) in found.keys().filter(|slot| !state.claims.contains_key(slot)) {
        findings.unexpected += 1;
        findings.example(format!("{table} {key} is there although no client was told so"));
    }
    for (product, stock) in stocks {
        let (certain, doubt) = state.increments.get(product).copied().unwrap_or_default();
        if !(certain..=certain + doubt).contains(stock) {
            findings.stocks_wrong += 1;
            findings.example(format!("product {product}: {certain} increments were acknowledged, its stock is {stock}"));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is(text: &str) -> Value {
        Value::Is(text.to_owned())
    }

    fn judged(ledger: &Ledger, rows: &[(&'static str, &str, &str)], stocks: &[(i32, i64)]) -> Findings {
        let mut found: HashMap<(&'static str, String), Vec<String>> = HashMap::new();
        for (table, key, text) in rows {
            found.entry((table, (*key).to_owned())).or_default().push((*text).to_owned());
        }
        judge(&ledger.lock(), &found, stocks)
    }

    #[test]
    fn tells_lost_doubled_wrong_and_invented_rows_apart() {
        let ledger = Ledger::default();
        for key in ["kept", "lost", "twice", "changed", "deleted"] {
            ledger.begin("journal", key, is("1"));
            ledger.acknowledged("journal", key, is("1"));
        }
        ledger.begin("journal", "deleted", Value::Absent);
        ledger.acknowledged("journal", "deleted", Value::Absent);
        ledger.begin("journal", "refused", is("1"));
        ledger.refused("journal", "refused");
        let rows = [
            ("journal", "kept", "1"),
            ("journal", "twice", "1"),
            ("journal", "twice", "1"),
            ("journal", "changed", "2"),
            ("journal", "deleted", "1"),
            ("journal", "refused", "1"),
            ("journal", "invented", "1"),
        ];
        let findings = judged(&ledger, &rows, &[]);
        assert_eq!((findings.acknowledged, findings.missing, findings.duplicated, findings.wrong, findings.unexpected), (4, 1, 1, 1, 3));
        assert!(!findings.is_clean() && findings.examples.len() == 6);
    }

    #[test]
    fn a_lost_answer_allows_both_outcomes_and_no_third() {
        for (found, clean) in [(None, false), (Some("1"), true), (Some("2"), true), (Some("3"), false)] {
            let ledger = Ledger::default();
            ledger.acknowledged("customer", "c", is("1"));
            ledger.begin("customer", "c", is("2"));
            let rows: Vec<_> = found.iter().map(|text| ("customer", "c", *text)).collect();
            let findings = judged(&ledger, &rows, &[]);
            assert_eq!((findings.is_clean(), findings.in_doubt), (clean, 1), "{found:?}");
        }
        for (found, clean) in [(None, true), (Some("77"), true)] {
            let ledger = Ledger::default();
            ledger.begin("ticket", "t", Value::Any);
            let rows: Vec<_> = found.iter().map(|text| ("ticket", "t", *text)).collect();
            assert_eq!(judged(&ledger, &rows, &[]).is_clean(), clean, "{found:?}");
        }
    }

    #[test]
    fn counts_increments() {
        let ledger = Ledger::default();
        ledger.incremented(1, true);
        ledger.incremented(1, true);
        ledger.incremented(1, false);
        for (stock, wrong) in [(1, 1), (2, 0), (3, 0), (4, 1)] {
            assert_eq!(judged(&ledger, &[], &[(1, stock)]).stocks_wrong, wrong, "{stock}");
        }
        assert_eq!(judged(&Ledger::default(), &[], &[(9, 1)]).stocks_wrong, 1);
    }
}
