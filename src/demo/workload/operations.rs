//! What one client does: writes of every table with the text that the row must read as, and reads worth comparing.

use super::{super::checker::Value, Client, is_doubtful, remember};
use tokio_postgres::{
    Error, Row,
    types::{Json, Type},
};

/// A customer that this client created.
#[derive(Clone)]
pub(super) struct Customer {
    id: String,
    revision: i32,
    zip: i32,
}

const MOODS: [&str; 3] = ["calm", "curious", "überglücklich"];
/// Multi-byte text of two, three and four bytes a character.
const NOTES: [&str; 4] = ["grüße", "給料", "перевод", "🎭 stage"];
/// Above the TOAST threshold (2 kB), so that updates of other columns leave it out of the change.
const PHOTO_BYTES: usize = 3000;
const ACCOUNTS: i32 = 40;
const PRODUCTS: i32 = 1000;

impl Client<'_> {
    /// One operation, chosen by chance.
    pub(super) async fn operate(&mut self) -> Result<(), Error> {
        match self.memory.random.u32(0..100) {
            0..18 => self.transfer().await,
            18..30 => self.journal_insert().await,
            30..38 => self.journal_update().await,
            38..46 => self.ticket().await,
            46..52 => self.measure().await,
            52..58 => self.customer_insert().await,
            58..64 => self.customer_update().await,
            64..66 => self.customer_delete().await,
            66..72 => self.take_stock().await,
            72..78 => self.read_own_past().await,
            _ => self.browse().await,
        }
    }

    /// Counts a write and tells the ledger how it ended.
    fn settle<T>(&self, table: &'static str, key: &str, value: Value, result: &Result<T, Error>) {
        self.tally.committed(u64::from(result.is_ok()));
        self.record(table, key, value, result);
    }

    fn record<T>(&self, table: &'static str, key: &str, value: Value, result: &Result<T, Error>) {
        match result {
            Ok(_) => self.ledger.acknowledged(table, key, value),
            Err(error) if is_doubtful(error) => {}
            Err(_) => self.ledger.refused(table, key),
        }
    }

    /// The first column of the answer must be `expected`: the write has been acknowledged on this connection.
    fn check(&self, rows: &[Row], expected: &str, what: &str) {
        let found: Option<&str> = rows.first().and_then(|row| row.get(0));
        self.tally.committed(1);
        self.tally.read_checked(found == Some(expected), what);
    }

    /// Money from one account to another, in a transaction of several statements.
    async fn transfer(&mut self) -> Result<(), Error> {
        let from = self.memory.random.i32(1..=ACCOUNTS);
        let to = 1 + (from + self.memory.random.i32(0..ACCOUNTS - 1)) % ACCOUNTS;
        let cents = self.memory.random.i64(1..10_000);
        let amount = format!("{}.{:02}", cents / 100, cents % 100);
        let note = self.memory.random.choice(NOTES).unwrap_or("");
        let token = self.memory.token("transfer");
        let text = format!("{from}|{to}|{amount}|{note}");
        self.ledger.begin("transfer", &token, Value::Is(text.clone()));
        let result = self.transfer_steps(&token, from, to, &amount, note).await;
        self.settle("transfer", &token, Value::Is(text.clone()), &result);
        for (account, version) in result? {
            self.memory.versions.insert(account, version);
        }
        remember(&mut self.memory.transfers, (token.clone(), text.clone()), &mut self.memory.random);
        self.read_transfer(&token, &text).await?;
        let rows = self.query("SELECT version FROM account WHERE id = $1", &[(&from, Type::INT4)]).await?;
        let version: i64 = rows.first().map_or(-1, |row| row.get(0));
        let own = self.memory.versions.get(&from).copied().unwrap_or_default();
        self.tally.committed(1);
        self.tally.read_checked(version >= own, "an account after a transfer");
        Ok(())
    }

    async fn transfer_steps(&mut self, token: &str, from: i32, to: i32, amount: &str, note: &str) -> Result<Vec<(i32, i64)>, Error> {
        self.connection.batch_execute("BEGIN").await?;
        // In the order of their numbers: no deadlocks.
        self.query("SELECT id FROM account WHERE id = ANY ($1) ORDER BY id FOR UPDATE", &[(&vec![from, to], Type::INT4_ARRAY)]).await?;
        const MOVE: &str = "UPDATE account SET balance = balance + $2::text::numeric, version = version + 1, changed = now() WHERE id = $1 RETURNING id, version";
        let negative = format!("-{amount}");
        let mut versions = Vec::new();
        for (account, by) in [(from, negative.as_str()), (to, amount)] {
            let rows = self.query(MOVE, &[(&account, Type::INT4), (&by, Type::TEXT)]).await?;
            versions.extend(rows.iter().map(|row| (row.get(0), row.get(1))));
        }
        self.query(
            "INSERT INTO transfer (token, from_account, to_account, amount, note) VALUES ($1, $2, $3, $4::text::numeric, $5) RETURNING id",
            &[(&token, Type::TEXT), (&from, Type::INT4), (&to, Type::INT4), (&amount, Type::TEXT), (&note, Type::TEXT)],
        )
        .await?;
        self.connection.batch_execute("COMMIT").await?;
        Ok(versions)
    }

    async fn read_transfer(&mut self, token: &str, text: &str) -> Result<(), Error> {
        let rows = self
            .query(
                "SELECT from_account || '|' || to_account || '|' || amount || '|' || note FROM transfer WHERE token = $1",
                &[(&token, Type::TEXT)],
            )
            .await?;
        self.check(&rows, text, "a transfer");
        Ok(())
    }

    /// A row of the table without a key.
    async fn journal_insert(&mut self) -> Result<(), Error> {
        let token = self.memory.token("journal");
        self.journal_write(&token, 1, "INSERT INTO journal (client, token, revision, payload) VALUES ($1, $2, $3, $4) RETURNING revision")
            .await?;
        remember(&mut self.memory.journals, (token, 1), &mut self.memory.random);
        Ok(())
    }

    async fn journal_update(&mut self) -> Result<(), Error> {
        let Some((token, revision)) = self.memory.random.choice(&self.memory.journals).cloned() else { return Ok(()) };
        self.journal_write(
            &token,
            revision + 1,
            "UPDATE journal SET client = $1, revision = $3, payload = $4 WHERE token = $2 RETURNING revision",
        )
        .await?;
        if let Some(entry) = self.memory.journals.iter_mut().find(|entry| entry.0 == token) {
            entry.1 = revision + 1;
        }
        Ok(())
    }

    async fn journal_write(&mut self, token: &str, revision: i32, sql: &'static str) -> Result<(), Error> {
        let client = self.memory.number as i32;
        let note = self.memory.random.choice(NOTES).unwrap_or("");
        let payload = serde_json::json!({ "text": note, "deep": { "list": [revision, null, true] } });
        let text = format!("{client}|{revision}|{note}");
        self.ledger.begin("journal", token, Value::Is(text.clone()));
        let parameters: [super::Parameter<'_>; 4] =
            [(&client, Type::INT4), (&token, Type::TEXT), (&revision, Type::INT4), (&Json(payload), Type::JSONB)];
        let result = self.query(sql, &parameters).await;
        self.settle("journal", token, Value::Is(text.clone()), &result);
        result?;
        self.read_journal(token, &text).await
    }

    async fn read_journal(&mut self, token: &str, text: &str) -> Result<(), Error> {
        // Tokens are letters, digits and hyphens.
        let sql = format!("SELECT client || '|' || revision || '|' || (payload->>'text') FROM journal WHERE token = '{token}'");
        let found = self.simple(&sql).await?;
        self.tally.committed(1);
        self.tally.read_checked(found.as_deref() == Some(text), "a journal entry");
        Ok(())
    }

    /// A number from a sequence: a second owner that does not carry it over would give it out twice.
    async fn ticket(&mut self) -> Result<(), Error> {
        let token = self.memory.token("ticket");
        self.ledger.begin("ticket", &token, Value::Any);
        let result = self.query("INSERT INTO ticket (token) VALUES ($1) RETURNING number::text", &[(&token, Type::TEXT)]).await;
        let number = result.as_ref().ok().and_then(|rows| rows.first()).map(|row| row.get::<_, String>(0)).unwrap_or_default();
        self.settle("ticket", &token, Value::Is(number.clone()), &result);
        result?;
        let rows = self.query("SELECT number::text FROM ticket WHERE token = $1", &[(&token, Type::TEXT)]).await?;
        self.check(&rows, &number, "a ticket");
        Ok(())
    }

    /// Several rows of the partitioned table at once.
    async fn measure(&mut self) -> Result<(), Error> {
        let rows: Vec<(i32, String, f64)> = (0..4)
            .map(|_| {
                let token = self.memory.token("measurement");
                // Halves are exact in binary: sums do not depend on the order of the rows.
                (self.memory.random.i32(0..100), token, f64::from(self.memory.random.i32(0..1000)) / 2.0)
            })
            .collect();
        let text = |device: i32, value: f64| format!("{device}|{value}|{value},{}", value + 1.0);
        for (device, token, value) in &rows {
            self.ledger.begin("measurement", token, Value::Is(text(*device, *value)));
        }
        let devices: Vec<i32> = rows.iter().map(|row| row.0).collect();
        let tokens: Vec<&str> = rows.iter().map(|row| row.1.as_str()).collect();
        let values: Vec<f64> = rows.iter().map(|row| row.2).collect();
        let result = self
            .query(
                "INSERT INTO measurement (device, token, value, readings)
                 SELECT d, t, v, ARRAY[v, v + 1]::numeric[] FROM unnest($1, $2, $3) AS m (d, t, v)",
                &[(&devices, Type::INT4_ARRAY), (&tokens, Type::TEXT_ARRAY), (&values, Type::FLOAT8_ARRAY)],
            )
            .await;
        for (device, token, value) in &rows {
            self.record("measurement", token, Value::Is(text(*device, *value)), &result);
        }
        self.tally.committed(u64::from(result.is_ok()));
        result?;
        let Some((device, token, value)) = rows.first() else { return Ok(()) };
        let found = self
            .query(
                "SELECT device || '|' || value || '|' || array_to_string(readings, ',') FROM measurement WHERE token = $1",
                &[(token, Type::TEXT)],
            )
            .await?;
        self.check(&found, &text(*device, *value), "a measurement");
        Ok(())
    }

    async fn customer_insert(&mut self) -> Result<(), Error> {
        let random = &mut self.memory.random;
        let id = format!(
            "{:08x}-{:04x}-4{:03x}-8{:03x}-{:012x}",
            random.u32(..),
            random.u16(..),
            random.u16(..0x1000),
            random.u16(..0x1000),
            random.u64(..1 << 48)
        );
        let customer = Customer { id, revision: 1, zip: random.i32(1000..10_000) };
        let photo: Vec<u8> = (0..PHOTO_BYTES).map(|_| random.u8(..)).collect();
        let text = customer_text(&customer);
        self.ledger.begin("customer", &customer.id, Value::Is(text.clone()));
        let home = format!("(\"Gasse 1, Hof\",\"Köln, {}\",{})", NOTES[1], customer.zip);
        let parameters: [super::Parameter<'_>; 7] = [
            (&customer.id, Type::TEXT),
            (&customer_name(&customer), Type::TEXT),
            (&customer_mood(&customer), Type::TEXT),
            (&home, Type::TEXT),
            (&customer_tags(&customer), Type::TEXT_ARRAY),
            (&Json(serde_json::json!({ "revision": 1, "scores": [1.5, -2] })), Type::JSONB),
            (&photo, Type::BYTEA),
        ];
        let result = self
            .query(
                "INSERT INTO customer (id, name, mood, home, tags, profile, photo)
                 VALUES ($1::text::uuid, $2, $3::text::mood, $4::text::address, $5, $6, $7)",
                &parameters,
            )
            .await;
        self.settle("customer", &customer.id, Value::Is(text.clone()), &result);
        result?;
        self.read_customer(&customer.id, &text).await?;
        remember(&mut self.memory.customers, customer, &mut self.memory.random);
        Ok(())
    }

    /// Leaves the photo alone: PostgreSQL does not send an unchanged large value again.
    async fn customer_update(&mut self) -> Result<(), Error> {
        let Some(mut customer) = self.memory.random.choice(&self.memory.customers).cloned() else { return Ok(()) };
        customer.revision += 1;
        let text = customer_text(&customer);
        self.ledger.begin("customer", &customer.id, Value::Is(text.clone()));
        let parameters: [super::Parameter<'_>; 5] = [
            (&customer.id, Type::TEXT),
            (&customer_name(&customer), Type::TEXT),
            (&customer_mood(&customer), Type::TEXT),
            (&customer_tags(&customer), Type::TEXT_ARRAY),
            (&customer.revision, Type::INT4),
        ];
        let result = self
            .query(
                "UPDATE customer SET name = $2, mood = $3::text::mood, tags = $4, profile = jsonb_set(profile, '{revision}', to_jsonb($5::int))
                 WHERE id = $1::text::uuid",
                &parameters,
            )
            .await;
        self.settle("customer", &customer.id, Value::Is(text.clone()), &result);
        result?;
        if let Some(known) = self.memory.customers.iter_mut().find(|known| known.id == customer.id) {
            known.revision = customer.revision;
        }
        self.read_customer(&customer.id, &text).await
    }

    async fn customer_delete(&mut self) -> Result<(), Error> {
        if self.memory.customers.is_empty() {
            return Ok(());
        }
        let index = self.memory.random.usize(..self.memory.customers.len());
        let customer = self.memory.customers.swap_remove(index);
        self.ledger.begin("customer", &customer.id, Value::Absent);
        let result = self.query("DELETE FROM customer WHERE id = $1::text::uuid", &[(&customer.id, Type::TEXT)]).await;
        self.settle("customer", &customer.id, Value::Absent, &result);
        result?;
        let rows = self.query("SELECT name FROM customer WHERE id = $1::text::uuid", &[(&customer.id, Type::TEXT)]).await?;
        self.tally.committed(1);
        self.tally.read_checked(rows.is_empty(), "a deleted customer");
        Ok(())
    }

    async fn read_customer(&mut self, id: &str, text: &str) -> Result<(), Error> {
        let rows = self
            .query(
                "SELECT name || '|' || mood || '|' || (home).zip || '|' || array_to_string(tags, ',') || '|' ||
                        (profile->>'revision') || '|' || octet_length(photo) FROM customer WHERE id = $1::text::uuid",
                &[(&id, Type::TEXT)],
            )
            .await?;
        self.check(&rows, text, "a customer");
        Ok(())
    }

    /// The column that is widened under load.
    async fn take_stock(&mut self) -> Result<(), Error> {
        let product = self.memory.random.i32(1..=PRODUCTS);
        let result = self.query("UPDATE product SET stock = stock + 1 WHERE id = $1 RETURNING name", &[(&product, Type::INT4)]).await;
        match &result {
            Ok(_) => {
                self.ledger.incremented(product, true);
                self.tally.committed(1);
            }
            Err(error) if is_doubtful(error) => self.ledger.incremented(product, false),
            Err(_) => {}
        }
        result.map(drop)
    }

    /// Rows that this client wrote some time ago.
    async fn read_own_past(&mut self) -> Result<(), Error> {
        if let Some((token, text)) = self.memory.random.choice(&self.memory.transfers).cloned() {
            self.read_transfer(&token, &text).await?;
        }
        if let Some(customer) = self.memory.random.choice(&self.memory.customers).cloned() {
            self.read_customer(&customer.id, &customer_text(&customer)).await?;
        }
        Ok(())
    }

    /// Reads of other people's rows: every type, with and without an order, and some that are never twice the same.
    async fn browse(&mut self) -> Result<(), Error> {
        let account = self.memory.random.i32(1..=ACCOUNTS);
        match self.memory.random.u32(0..10) {
            0 => {
                let sql = "SELECT count(*), sum(amount), max(at) FROM transfer WHERE from_account = $1";
                self.query(sql, &[(&account, Type::INT4)]).await?;
            }
            1 => {
                let price = format!("{}.50", self.memory.random.i32(1..90));
                let sql = "SELECT id, name, price::text FROM product WHERE price > $1::text::numeric ORDER BY id LIMIT 20";
                self.query(sql, &[(&price, Type::TEXT)]).await?;
            }
            2 => {
                let tag = format!("tag{}", self.memory.random.u32(0..7));
                let sql = "SELECT name, mood::text, tags FROM customer WHERE seeded AND $1 = ANY (tags)";
                self.query(sql, &[(&tag, Type::TEXT)]).await?;
            }
            3 => {
                self.query("SELECT profile->'scores', created FROM customer WHERE seeded ORDER BY created, id LIMIT 10", &[]).await?;
            }
            4 => {
                self.query(
                    "SELECT device, count(*), sum(value) FROM measurement WHERE device < $1 GROUP BY device",
                    &[(&account, Type::INT4)],
                )
                .await?;
            }
            5 => {
                self.simple("SELECT id, mood, home, photo FROM customer WHERE seeded ORDER BY id LIMIT 3").await?;
            }
            6 => {
                self.simple("SELECT number, now() - opened AS age FROM ticket ORDER BY number DESC LIMIT 5").await?;
            }
            7 => {
                let sql = "SELECT balance::text, transfers FROM account_activity WHERE id = $1";
                self.query(sql, &[(&account, Type::INT4)]).await?;
            }
            8 => {
                self.query("SELECT name, stock::bigint FROM product WHERE id = $1", &[(&(account * 7), Type::INT4)]).await?;
            }
            _ => {
                self.simple("SELECT name FROM product WHERE description LIKE 'besch%' LIMIT 5").await?;
            }
        }
        self.tally.committed(1);
        Ok(())
    }
}

fn customer_name(customer: &Customer) -> String {
    format!("Ångström {}", customer.revision)
}

fn customer_mood(customer: &Customer) -> &'static str {
    MOODS[customer.revision.unsigned_abs() as usize % MOODS.len()]
}

fn customer_tags(customer: &Customer) -> Vec<String> {
    vec![format!("r{}", customer.revision), "größe".to_owned()]
}

/// What the checker reads for this customer.
fn customer_text(customer: &Customer) -> String {
    let tags = customer_tags(customer).join(",");
    format!("{}|{}|{}|{tags}|{}|{PHOTO_BYTES}", customer_name(customer), customer_mood(customer), customer.zip, customer.revision)
}
