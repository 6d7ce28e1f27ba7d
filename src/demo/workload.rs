//! The second workload: richer types and shapes than pgbench, and clients that remember what they were told.
//!
//! Each client owns the keys it writes, so that it knows what a read must give. After every acknowledged write it reads
//! the row back on the same connection; an answer without the write is `stale`. What it was told goes to the [`Ledger`].

mod operations;

use super::{checker::Ledger, pgbench::Target, tally::Tally};
use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use tokio::task::JoinSet;
use tokio_postgres::{
    Client as Connection, Error, Row, SimpleQueryMessage, Statement,
    types::{ToSql, Type},
};

/// The tables of this workload, to be created by the role that owns them.
pub const SCHEMA: &str = include_str!("schema.sql");

/// A client that cannot connect tries again this often.
const RECONNECT_EVERY: Duration = Duration::from_millis(200);
/// Keys of its own that a client keeps in mind for updates and later reads.
const REMEMBERED_MAX: usize = 64;

/// How a client sends its statements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    /// Named statements, prepared once per connection.
    Prepared,
    /// Parse, Bind, Execute each time, unnamed.
    Unnamed,
}

/// Running clients.
pub struct Workload {
    stop: Arc<AtomicBool>,
    tasks: JoinSet<()>,
}

impl Workload {
    /// Starts `clients` clients, each of which waits about `pace` between operations.
    pub fn start(target: &Target, clients: usize, pace: Duration, tally: &Arc<Tally>, ledger: &Arc<Ledger>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut tasks = JoinSet::new();
        for number in 0..clients {
            let (target, tally, ledger, stop) = (target.clone(), tally.clone(), ledger.clone(), stop.clone());
            tasks.spawn(async move { client_life(number, &target, pace, &tally, &ledger, &stop).await });
        }
        Workload { stop, tasks }
    }

    /// Lets every client end its operation and waits for them.
    pub async fn finish(mut self) {
        self.stop.store(true, Relaxed);
        while self.tasks.join_next().await.is_some() {}
    }
}

async fn client_life(number: usize, target: &Target, pace: Duration, tally: &Tally, ledger: &Ledger, stop: &AtomicBool) {
    let mut memory = Memory::new(number);
    while !stop.load(Relaxed) {
        let connection = match target.connect(&format!("shop-{number}")).await {
            Ok(connection) => connection,
            Err(error) => {
                tally.connection_dropped(format!("workload client {number} could not connect: {}", brief(&error)));
                tokio::time::sleep(RECONNECT_EVERY).await;
                continue;
            }
        };
        let manner = if number.is_multiple_of(2) { Manner::Prepared } else { Manner::Unnamed };
        let mut client = Client { connection, manner, statements: HashMap::new(), memory: &mut memory, tally, ledger };
        while !stop.load(Relaxed) {
            let begun = Instant::now();
            match client.operate().await {
                Ok(()) => tally.waited(begun.elapsed()),
                Err(error) if client.recover(&error).await => {}
                Err(_) => break,
            }
            // Between half and one and a half paces: clients do not march in step.
            tokio::time::sleep(pace.mul_f64(0.5 + client.memory.random.f64())).await;
        }
    }
}

/// What a client knows, whatever happens to its connection.
struct Memory {
    number: usize,
    random: fastrand::Rng,
    counter: u64,
    /// Journal token → revision that was acknowledged.
    journals: Vec<(String, i32)>,
    /// Customer → revision, and what does not change with it.
    customers: Vec<operations::Customer>,
    /// Transfer token → its row as text.
    transfers: Vec<(String, String)>,
    /// Account → the version that this client's own transfer gave it.
    versions: HashMap<i32, i64>,
}

impl Memory {
    fn new(number: usize) -> Self {
        // The run differs from the next one: what is checked does not depend on chance.
        Memory {
            number,
            random: fastrand::Rng::new(),
            counter: 0,
            journals: Vec::new(),
            customers: Vec::new(),
            transfers: Vec::new(),
            versions: HashMap::new(),
        }
    }

    /// A key nobody else uses.
    fn token(&mut self, kind: &str) -> String {
        self.counter += 1;
        format!("{kind}-{}-{}", self.number, self.counter)
    }
}

fn remember<T>(list: &mut Vec<T>, item: T, random: &mut fastrand::Rng) {
    if list.len() < REMEMBERED_MAX {
        list.push(item);
    } else if let Some(slot) = random.choice(list.iter_mut()) {
        *slot = item;
    }
}

/// A parameter with its type: nothing has to be asked of the server first.
type Parameter<'a> = (&'a (dyn ToSql + Sync), Type);

struct Client<'a> {
    connection: Connection,
    manner: Manner,
    statements: HashMap<&'static str, Statement>,
    memory: &'a mut Memory,
    tally: &'a Tally,
    ledger: &'a Ledger,
}

impl Client<'_> {
    async fn query(&mut self, sql: &'static str, parameters: &[Parameter<'_>]) -> Result<Vec<Row>, Error> {
        match self.manner {
            Manner::Unnamed => self.connection.query_typed(sql, parameters).await,
            Manner::Prepared => {
                let statement = match self.statements.get(sql) {
                    Some(statement) => statement.clone(),
                    None => {
                        let types: Vec<Type> = parameters.iter().map(|(_, kind)| kind.clone()).collect();
                        let statement = self.connection.prepare_typed(sql, &types).await?;
                        self.statements.insert(sql, statement.clone());
                        statement
                    }
                };
                let values: Vec<&(dyn ToSql + Sync)> = parameters.iter().map(|(value, _)| *value).collect();
                self.connection.query(&statement, &values).await
            }
        }
    }

    /// The first column of the first row, through the simple protocol.
    async fn simple(&self, sql: &str) -> Result<Option<String>, Error> {
        let messages = self.connection.simple_query(sql).await?;
        Ok(messages.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or("NULL").to_owned()),
            _ => None,
        }))
    }

    /// After an error: counts it; `false` if the connection is gone.
    async fn recover(&mut self, error: &Error) -> bool {
        let who = format!("workload client {}: {}", self.memory.number, brief(error));
        if is_doubtful(error) || self.connection.is_closed() {
            self.tally.connection_dropped(who);
            return false;
        }
        self.tally.statement_failed(who);
        // Harmless outside of a transaction; a failure here means that the connection is gone.
        self.connection.batch_execute("ROLLBACK").await.is_ok()
    }
}

/// Whether the outcome of the statement is unknown: no answer, or the server said that it is going away
/// (classes 08 connection exception, 57P operator intervention, XX internal error).
fn is_doubtful(error: &Error) -> bool {
    match error.as_db_error() {
        None => true,
        Some(error) => {
            let code = error.code().code();
            code.starts_with("08") || code.starts_with("57P") || code.starts_with("XX") || error.severity() == "FATAL"
        }
    }
}

/// Code and message of an error; never a value.
fn brief(error: &Error) -> String {
    match error.as_db_error() {
        Some(error) => format!("{} {}", error.code().code(), error.message()),
        None => {
            let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
            format!("{error}{cause}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::{checker, pgbench, servers};

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn without_a_proxy_nothing_is_lost_and_the_checker_notices_what_we_break() {
        let server = servers::Server::start(15, servers::Options::default()).await.unwrap();
        server.create_database("shop").await.unwrap();
        let target = Target {
            port: server.port(),
            dbname: "shop".into(),
            user: servers::Server::APP.into(),
            password: server.app_password().clone(),
        };
        pgbench::initialise(&target, 1).await.unwrap();
        target.connect("test").await.unwrap().batch_execute(SCHEMA).await.unwrap();

        let (tally, ledger) = (Arc::new(Tally::default()), Arc::new(Ledger::default()));
        let logs = std::env::temp_dir().join(format!("understudy-pgbench-{}", std::process::id()));
        std::fs::create_dir_all(&logs).unwrap();
        let bench = pgbench::PgBench::start(&target, 50, &logs, &tally).unwrap();
        let workload = Workload::start(&target, 4, Duration::from_millis(5), &tally, &ledger);
        tokio::time::sleep(Duration::from_secs(4)).await;
        workload.finish().await;
        let rounds = bench.finish().await;
        std::fs::remove_dir_all(&logs).unwrap();

        assert_eq!((tally.failures().total(), tally.messages()), (0, Vec::new()));
        assert!(rounds >= 3 && tally.transactions() > 300, "{rounds} rounds, {} transactions", tally.transactions());
        let (checked, stale) = tally.reads();
        assert!(checked > 100 && stale == 0, "{checked} reads checked, {stale} stale");
        let owner = server.connect("shop").await.unwrap();
        let findings = checker::compare(&ledger, &owner).await.unwrap();
        assert!(findings.is_clean() && findings.acknowledged > 100 && findings.in_doubt == 0, "{findings:?}");

        owner
            .batch_execute(
                "DELETE FROM journal WHERE ctid = (SELECT min(ctid) FROM journal);
                 INSERT INTO journal SELECT * FROM journal WHERE ctid = (SELECT max(ctid) FROM journal);
                 INSERT INTO ticket (token) VALUES ('nobody');
                 UPDATE product SET stock = stock + 1 WHERE id = 7;
                 UPDATE account SET balance = balance + 1 WHERE id = 7;
                 UPDATE measurement SET value = -1 WHERE id = (SELECT min(id) FROM measurement)",
            )
            .await
            .unwrap();
        let findings = checker::compare(&ledger, &owner).await.unwrap();
        let counts =
            (findings.missing, findings.duplicated, findings.unexpected, findings.stocks_wrong, findings.balances_wrong, findings.wrong);
        assert_eq!(counts, (1, 1, 1, 1, 1, 1), "{findings:?}");
    }
}
