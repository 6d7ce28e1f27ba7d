//! Making tables of the follower equal to a snapshot of the owner by writing only what differs: for a follower whose feed has lost
//! its place. Each table is one transaction of the follower; the differing keys wait in a temporary table there, so that any
//! number of them needs no memory here.
//!
//! The rows that differ are deleted before the first is written: a unique value that moved from one row to another must not be in
//! the way of itself.

use super::{
    ValidateError,
    compare::{Rows, Step, Tally},
    plan::{self, Order, Plan, Tables, quote},
    session::Session,
};
use crate::config::ServerUrl;
use futures_util::{SinkExt, StreamExt};
use std::{
    pin::pin,
    sync::atomic::{AtomicU64, Ordering},
};

/// Keys handled in one statement.
const BATCH_KEYS: usize = 500;

/// The application name of the session that writes: whoever takes over ends it first.
pub const WRITER: &str = "understudy copy writer";

/// What making one table equal took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settled {
    /// Rows of the owner that were compared.
    pub rows: u64,
    /// Rows of the follower that were removed: changed ones and those that the owner does not have.
    pub removed: u64,
    /// Rows of the owner that were written: changed ones and those that the follower did not have.
    pub written: u64,
}

/// Sessions on both sides, the owner's within one snapshot.
pub struct Settler {
    owner: Session,
    /// Reads the rows that differ, while `owner` still has its own stream.
    fetch: Session,
    follower: Session,
    writer: Session,
    owner_tables: Tables,
    follower_tables: Tables,
}

impl Settler {
    /// Opens them. The follower must be at rest.
    ///
    /// # Errors
    /// [`ValidateError`]
    pub async fn open(owner: &ServerUrl, follower: &ServerUrl, snapshot: &str) -> Result<Settler, ValidateError> {
        let (owner, fetch) = (Session::open(owner, "owner").await?, Session::open(owner, "owner").await?);
        for session in [&owner, &fetch] {
            session.begin(Some(snapshot)).await?;
        }
        let writer = Session::open(follower, "follower").await?;
        let settings = format!(
            "SET application_name = '{WRITER}'; SET session_replication_role = replica; SET default_transaction_read_only = off; \
             SET lock_timeout = 0"
        );
        writer.run("switching triggers off", &settings).await?;
        let follower = Session::open(follower, "follower").await?;
        let (owner_tables, follower_tables) = (plan::load_in_snapshot(&owner).await?, plan::load(&follower).await?);
        Ok(Settler { owner, fetch, follower, writer, owner_tables, follower_tables })
    }

    /// Its connections are there: an error was about rows.
    pub fn is_alive(&self) -> bool {
        [&self.owner, &self.fetch, &self.follower, &self.writer].iter().all(|session| !session.client.is_closed())
    }

    /// Makes one table equal. `note` is run in the transaction that does it. Nothing is changed, and the answer is `None`, when
    /// `still` says (after everything was read) that what was read must not be believed.
    ///
    /// # Errors
    /// [`ValidateError`]; then nothing was changed.
    pub async fn table(
        &self,
        schema: &str,
        name: &str,
        note: &str,
        compared: &AtomicU64,
        still: impl AsyncFnOnce() -> bool,
    ) -> Result<Option<Settled>, ValidateError> {
        let key = (schema.to_owned(), name.to_owned());
        let (Some(ours), Some(theirs)) = (self.owner_tables.get(&key), self.follower_tables.get(&key)) else {
            return Err(ValidateError::NoSuchTable(format!("{schema}.{name}")));
        };
        let rules = crate::schema::mapping::Rules::default();
        let same = plan::Mapping { rules: &rules, back: false };
        let Some(plan) = plan::plan(&key, &key, ours, theirs, &same) else {
            return Err(ValidateError::NoSuchTable(format!("{schema}.{name}")));
        };
        for session in [&self.owner, &self.fetch] {
            session.run("starting a table", "SAVEPOINT one_table").await?;
        }
        let begin = format!("BEGIN; SET CONSTRAINTS ALL DEFERRED; {}", keys_table(&plan));
        self.writer.run("beginning to make a table equal", &begin).await?;
        let result = self.compare_and_write(&plan, compared, still).await;
        let end = match &result {
            Ok(Some(_)) => format!("{note}; COMMIT"),
            _ => "ROLLBACK".to_owned(),
        };
        if !self.writer.client.is_closed() {
            self.writer.run("ending a table", &end).await?;
        }
        for session in [&self.owner, &self.fetch] {
            if !session.client.is_closed() {
                session.run("ending a table", "ROLLBACK TO one_table; RELEASE one_table").await?;
            }
        }
        result
    }

    async fn compare_and_write(
        &self,
        plan: &Plan,
        compared: &AtomicU64,
        still: impl AsyncFnOnce() -> bool,
    ) -> Result<Option<Settled>, ValidateError> {
        let mut tally = Tally::default();
        let mut noted = 0_usize;
        {
            let start = async |session: &Session, query: &str| {
                let stream = session.client.copy_out(query).await.map_err(|error| session.error("reading a table", &error))?;
                Ok::<_, ValidateError>(Rows::new(stream, session.side))
            };
            let mut rows_owner = start(&self.owner, &plan.owner_query).await?;
            let mut rows_follower = start(&self.follower, &plan.follower_query).await?;
            let (mut ours, mut theirs) = (rows_owner.next().await?, rows_follower.next().await?);
            loop {
                let before = tally.rows;
                let step = tally.step(plan, ours.as_deref(), theirs.as_deref(), 0);
                compared.fetch_add(tally.rows - before, Ordering::Relaxed);
                if tally.keys.len() >= BATCH_KEYS || step == Step::Done {
                    noted += tally.keys.len();
                    self.note_keys(plan, &std::mem::take(&mut tally.keys)).await?;
                }
                match step {
                    Step::Owner => ours = rows_owner.next().await?,
                    Step::Follower => theirs = rows_follower.next().await?,
                    Step::Both => (ours, theirs) = (rows_owner.next().await?, rows_follower.next().await?),
                    Step::Done => break,
                }
            }
        }
        let mut settled = Settled { rows: tally.rows, ..Settled::default() };
        if tally.differences > 0 {
            (settled.removed, settled.written) =
                if plan.keyed { self.write_keys(plan, noted).await? } else { self.write_all(plan).await? };
        }
        Ok(still().await.then_some(settled))
    }

    async fn note_keys(&self, plan: &Plan, keys: &[Vec<String>]) -> Result<(), ValidateError> {
        if keys.is_empty() {
            return Ok(());
        }
        let values: Vec<String> =
            keys.iter().map(|key| format!("({})", key.iter().map(|text| literal(text)).collect::<Vec<_>>().join(", "))).collect();
        let names: Vec<String> = (0..plan.key.len()).map(|number| format!("k{number}")).collect();
        self.writer
            .run(
                "noting rows that differ",
                &format!("INSERT INTO pg_temp.understudy_keys ({}) VALUES {}", names.join(", "), values.join(", ")),
            )
            .await
    }

    /// Deletes the noted rows, and writes those of them that the owner has.
    async fn write_keys(&self, plan: &Plan, noted: usize) -> Result<(u64, u64), ValidateError> {
        let Settler { writer, .. } = self;
        let delete = format!("DELETE FROM {} AS x USING pg_temp.understudy_keys AS wanted WHERE {}", plan.follower_from, matches(plan));
        let removed = writer.client.execute(&delete, &[]).await.map_err(|error| writer.error("deleting rows that differ", &error))?;
        let names: Vec<String> = (0..plan.key.len()).map(|number| format!("k{number}")).collect();
        let mut written = 0;
        for first in (0..noted).step_by(BATCH_KEYS) {
            let query = format!(
                "SELECT {} FROM pg_temp.understudy_keys WHERE n > {first} AND n <= {} ORDER BY n",
                names.join(", "),
                first + BATCH_KEYS
            );
            let rows = writer.client.query(&query, &[]).await.map_err(|error| writer.error("reading noted keys", &error))?;
            let values: Vec<String> = rows
                .iter()
                .map(|row| {
                    let key = (0..names.len()).map(|at| literal(row.get::<_, &str>(at)));
                    format!("({})", key.collect::<Vec<_>>().join(", "))
                })
                .collect();
            if values.is_empty() {
                break;
            }
            let wanted = format!("(VALUES {}) AS wanted ({})", values.join(", "), names.join(", "));
            let source = format!("SELECT {} FROM {} AS x JOIN {wanted} ON {}", selected(plan), plan.owner_from, matches(plan));
            written += self.carry(plan, &source).await?;
        }
        Ok((removed, written))
    }

    /// Rows that cannot be told apart: all of them anew.
    async fn write_all(&self, plan: &Plan) -> Result<(u64, u64), ValidateError> {
        let Settler { writer, .. } = self;
        let delete = format!("DELETE FROM {}", plan.follower_from);
        let removed = writer.client.execute(&delete, &[]).await.map_err(|error| writer.error("emptying a table without a key", &error))?;
        let written = self.carry(plan, &format!("SELECT {} FROM {} AS x", selected(plan), plan.owner_from)).await?;
        Ok((removed, written))
    }

    async fn carry(&self, plan: &Plan, query: &str) -> Result<u64, ValidateError> {
        let Settler { fetch, writer, .. } = self;
        let columns: Vec<String> = plan.writable.iter().map(|column| quote(&column.name)).collect();
        let (read, write) = ("reading rows that differ", "writing rows that differ");
        let into = format!("COPY {}.{} ({}) FROM STDIN", quote(&plan.schema), quote(&plan.name), columns.join(", "));
        let source = fetch.client.copy_out(&format!("COPY ({query}) TO STDOUT")).await.map_err(|error| fetch.error(read, &error))?;
        let sink = writer.client.copy_in(&into).await.map_err(|error| writer.error(write, &error))?;
        let (mut source, mut sink) = (pin!(source), pin!(sink));
        while let Some(chunk) = source.next().await {
            let chunk = chunk.map_err(|error| fetch.error(read, &error))?;
            sink.feed(chunk).await.map_err(|error| writer.error(write, &error))?;
        }
        sink.finish().await.map_err(|error| writer.error(write, &error))
    }
}

fn selected(plan: &Plan) -> String {
    plan.writable.iter().map(|column| format!("x.{}", quote(&column.name))).collect::<Vec<_>>().join(", ")
}

fn keys_table(plan: &Plan) -> String {
    let columns: Vec<String> = (0..plan.key.len()).map(|number| format!("k{number} text")).collect();
    let columns = if columns.is_empty() { String::new() } else { format!(", {}", columns.join(", ")) };
    format!("CREATE TEMP TABLE understudy_keys (n bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY{columns}) ON COMMIT DROP")
}

/// By the type's own equality, so that an index serves, and by the text, because some types count different texts as equal.
fn matches(plan: &Plan) -> String {
    let one = |(number, (column, order)): (usize, &(String, Order))| {
        let name = quote(column);
        let sql_type = plan.writable.iter().find(|writable| writable.name == *column).map_or("text", |writable| writable.sql_type.as_str());
        match order {
            Order::Integer => format!("x.{name} = wanted.k{number}::bigint"),
            Order::Native => format!("x.{name} = wanted.k{number}::uuid"),
            Order::Text if sql_type == "text" => {
                format!("x.{name} = wanted.k{number} AND x.{name}::text COLLATE pg_catalog.\"C\" = wanted.k{number}")
            }
            Order::Text => {
                format!("x.{name} = wanted.k{number}::{sql_type} AND x.{name}::text COLLATE pg_catalog.\"C\" = wanted.k{number}")
            }
        }
    };
    plan.key.iter().enumerate().map(one).collect::<Vec<_>>().join(" AND ")
}

/// A text literal, whatever `standard_conforming_strings` says.
fn literal(text: &str) -> String {
    format!("E'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
}
