//! Applications that write, remember what was acknowledged, and come back when the proxy was away.

use crate::stage::{Stage, connect, numbers};
use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::task::JoinSet;
use tokio_postgres::{Client, SimpleQueryMessage};

/// Between two statements of a writer: the tests are about order, not about load.
const PAUSE: Duration = Duration::from_millis(4);

#[derive(Default)]
struct Memory {
    /// Acknowledged rows.
    rows: Mutex<Vec<i64>>,
    /// Values of the sequence `ticket` that clients got.
    tickets: Mutex<Vec<i64>>,
    /// Acknowledged increments, and those whose fate is unknown, per writer.
    increments: Mutex<HashMap<i64, (i64, i64)>>,
    next: AtomicI64,
    /// Connections lost or refused.
    lost: AtomicUsize,
    /// What servers or the proxy said, instead of carrying a statement out.
    errors: Mutex<Vec<String>>,
    stop: AtomicBool,
}

pub struct Writers {
    memory: Arc<Memory>,
    tasks: JoinSet<()>,
}

impl Writers {
    pub fn start(stage: &Stage, count: i64) -> Self {
        let memory = Arc::new(Memory { next: AtomicI64::new(1), ..Memory::default() });
        let mut tasks = JoinSet::new();
        for writer in 0..count {
            tasks.spawn(write(memory.clone(), stage.url("app", "shop"), writer));
        }
        Writers { memory, tasks }
    }

    /// Statements answered so far.
    pub fn acknowledged(&self) -> usize {
        self.memory.rows.lock().unwrap().len()
    }

    /// Waits for this many more acknowledged rows.
    pub async fn more(&self, stage: &Stage, rows: usize) {
        let (from, deadline) = (self.acknowledged(), std::time::Instant::now() + Duration::from_secs(20));
        while self.acknowledged() < from + rows {
            assert!(std::time::Instant::now() < deadline, "writes do not go on: {:?}\n{}", self.errors(), stage.log());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Connections lost or refused, and errors that somebody answered.
    pub fn trouble(&self) -> (usize, Vec<String>) {
        (self.memory.lost.load(Ordering::SeqCst), self.errors())
    }

    fn errors(&self) -> Vec<String> {
        self.memory.errors.lock().unwrap().clone()
    }

    pub async fn stop(mut self) {
        self.memory.stop.store(true, Ordering::SeqCst);
        while self.tasks.join_next().await.is_some() {}
    }

    /// Everything that was acknowledged is there, once. Rows in flight may be there, too.
    pub async fn check(&self, client: &Client, case: &str) {
        let (acknowledged, increments) = (self.memory.rows.lock().unwrap().clone(), self.memory.increments.lock().unwrap().clone());
        let there: BTreeSet<i64> = numbers(client, "SELECT id FROM entry").await.into_iter().collect();
        let missing: Vec<_> = acknowledged.iter().filter(|id| !there.contains(id)).collect();
        assert!(missing.is_empty(), "{case}: {} acknowledged rows are not there: {:?}", missing.len(), &missing[..missing.len().min(10)]);
        let torn = "SELECT count(*) FROM (SELECT e.id FROM entry e FULL JOIN trace t USING (id, number) GROUP BY 1
                    HAVING count(e.*) <> 1 OR count(t.*) <> 1) x";
        assert_eq!(numbers(client, torn).await, [0], "{case}: rows twice, or half of a transaction");
        let twice = "SELECT count(*) - count(DISTINCT number) FROM entry";
        assert_eq!(numbers(client, twice).await, [0], "{case}: a sequence gave a value twice");
        for row in client.query("SELECT writer::int8, n FROM account ORDER BY 1", &[]).await.unwrap() {
            let (writer, n): (i64, i64) = (row.get(0), row.get(1));
            let (sure, unknown) = increments.get(&writer).copied().unwrap_or_default();
            // the writer goes on meanwhile: at most the increments it asked for since
            let now = self.memory.increments.lock().unwrap().get(&writer).copied().unwrap_or_default();
            assert!(n >= sure && n <= now.0 + now.1 + 1, "{case}: writer {writer} sees {n}, {sure} were acknowledged, {unknown} unknown");
        }
        let tickets = self.memory.tickets.lock().unwrap();
        assert_eq!(tickets.len(), tickets.iter().collect::<BTreeSet<_>>().len(), "{case}: nextval repeated a value");
    }
}

async fn write(memory: Arc<Memory>, config: tokio_postgres::Config, writer: i64) {
    let mut client = None;
    let mut round = 0;
    while !memory.stop.load(Ordering::SeqCst) {
        let Some(connected) = &client else {
            match connect(config.clone()).await {
                Ok(connected) => client = Some(connected),
                Err(error) => {
                    note(&memory, &error);
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
            continue;
        };
        round += 1;
        let outcome = match round % 3 {
            0 => insert(&memory, connected, writer).await,
            1 => transfer(&memory, connected, writer).await,
            _ => ticket(&memory, connected).await,
        };
        if let Err(error) = outcome {
            note(&memory, &error);
            client = None;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

fn note(memory: &Memory, error: &tokio_postgres::Error) {
    match error.as_db_error() {
        Some(said) => memory.errors.lock().unwrap().push(format!("{} {}", said.code().code(), said.message())),
        None => {
            memory.lost.fetch_add(1, Ordering::SeqCst);
        }
    }
}

const INSERT: &str = "WITH e AS (INSERT INTO entry (id, writer) VALUES ({id}, {writer}) RETURNING id, number)
    INSERT INTO trace SELECT id, number FROM e";

fn statement(id: i64, writer: i64) -> String {
    INSERT.replace("{id}", &id.to_string()).replace("{writer}", &writer.to_string())
}

/// One statement, extended protocol.
async fn insert(memory: &Memory, client: &Client, writer: i64) -> Result<(), tokio_postgres::Error> {
    let id = memory.next.fetch_add(1, Ordering::SeqCst);
    client.execute(&statement(id, writer), &[]).await?;
    memory.rows.lock().unwrap().push(id);
    Ok(())
}

/// One transaction of several messages: a row and an increment.
async fn transfer(memory: &Memory, client: &Client, writer: i64) -> Result<(), tokio_postgres::Error> {
    let id = memory.next.fetch_add(1, Ordering::SeqCst);
    client.batch_execute("BEGIN").await?;
    client.batch_execute(&statement(id, writer)).await?;
    client.batch_execute(&format!("UPDATE account SET n = n + 1 WHERE writer = {writer}")).await?;
    memory.increments.lock().unwrap().entry(writer).or_default().1 += 1;
    client.batch_execute("COMMIT").await?;
    let mut increments = memory.increments.lock().unwrap();
    let (sure, unknown) = increments.entry(writer).or_default();
    (*sure, *unknown) = (*sure + 1, *unknown - 1);
    memory.rows.lock().unwrap().push(id);
    Ok(())
}

async fn ticket(memory: &Memory, client: &Client) -> Result<(), tokio_postgres::Error> {
    for message in client.simple_query("SELECT nextval('ticket')").await? {
        if let SimpleQueryMessage::Row(row) = message {
            memory.tickets.lock().unwrap().push(row.get(0).unwrap().parse().unwrap());
        }
    }
    Ok(())
}
