//! Runs copied operations on a server: one connection per role, bounded, with a time limit on everything.

use super::{
    answer::Answer,
    copies::{Identity, Operation},
    database::Database,
    route::Target,
};
use crate::{
    backend::{BackendError, Connection, cancel},
    config::ServerUrl,
    wire::{frontend, put, put_cstr},
};
use bytes::{Bytes, BytesMut};
use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
    time::{Duration, Instant},
};

/// Roles that one runner keeps connections for; beyond it the pool starts anew.
const CONNECTIONS_MAX: usize = 8;
/// Prepared statements per connection; beyond it they are all dropped on the server.
const STATEMENTS_MAX: usize = 500;
/// After a failed log-in a role is left alone for this long.
const LOGIN_RETRY: Duration = Duration::from_secs(2);

/// An operation could not be run.
#[derive(Debug)]
pub enum RunError {
    /// No answer in time; the connection was given up and the statement cancelled.
    Timeout,
    /// The connection could not be opened or broke.
    Connection,
}

impl RunError {
    /// For counters.
    pub fn as_str(&self) -> &'static str {
        match self {
            RunError::Timeout => "no answer in time",
            RunError::Connection => "connection failed",
        }
    }
}

struct Prepared {
    connection: Connection,
    statements: HashMap<u64, ()>,
}

/// Connections to one server.
pub struct Runner {
    database: Arc<Database>,
    target: Arc<Target>,
    /// Run on each new connection.
    set_up: &'static str,
    connections: HashMap<Arc<Identity>, Prepared>,
    refused: HashMap<Arc<Identity>, Instant>,
    limit: Duration,
    /// Answers keep their rows.
    keeping: bool,
}

impl Runner {
    /// For a server; `set_up` is run on each new connection; `limit` bounds every operation.
    pub fn new(database: Arc<Database>, target: Arc<Target>, set_up: &'static str, limit: Duration) -> Self {
        Runner { database, target, set_up, connections: HashMap::new(), refused: HashMap::new(), limit, keeping: false }
    }

    /// Follows a change of owner.
    pub fn retarget(&mut self, target: &Arc<Target>) {
        if *self.target != **target {
            self.target = target.clone();
            self.connections.clear();
            self.refused.clear();
        }
    }

    /// Whether answers to come keep their rows.
    pub fn keep_rows(&mut self, keeping: bool) {
        self.keeping = keeping;
    }

    /// Closes everything.
    pub fn clear(&mut self) {
        self.connections.clear();
    }

    /// Closes everything, and forgets whose log-in was refused.
    pub fn start_over(&mut self) {
        self.connections.clear();
        self.refused.clear();
    }

    /// [`Runner::run`], and once more on a new connection if the old one turns out to have been closed meanwhile. Only for
    /// operations outside a transaction.
    ///
    /// # Errors
    /// [`RunError`]
    pub async fn run_fresh(&mut self, identity: &Arc<Identity>, operation: &Operation) -> Result<(Answer, Duration), RunError> {
        let was_open = self.connections.contains_key(identity);
        match self.run(identity, operation).await {
            Err(RunError::Connection) if was_open => self.run(identity, operation).await,
            result => result,
        }
    }

    /// Runs an operation and returns its answer and how long it took.
    ///
    /// # Errors
    /// [`RunError`]; an error that the server reports is an [`Answer`] with a SQLSTATE.
    pub async fn run(&mut self, identity: &Arc<Identity>, operation: &Operation) -> Result<(Answer, Duration), RunError> {
        if !self.connections.contains_key(identity) {
            self.open(identity).await?;
        }
        let url = self.database.url_for(&self.target, &identity.user);
        let Some(prepared) = self.connections.get_mut(identity) else {
            return Err(RunError::Connection);
        };
        let answer = if self.keeping { Answer::keeping() } else { Answer::default() };
        let (pid, key) = prepared.connection.key.clone();
        match tokio::time::timeout(self.limit, run_on(prepared, operation, answer)).await {
            Ok(Ok(result)) => Ok(result),
            Ok(Err(error)) => {
                tracing::debug!(server = %self.target.name, %error, "a copy could not be run");
                self.connections.remove(identity);
                Err(RunError::Connection)
            }
            Err(_) => {
                self.connections.remove(identity);
                tokio::spawn(async move {
                    let _ = tokio::time::timeout(Duration::from_secs(1), cancel(&url, pid, &key)).await;
                });
                Err(RunError::Timeout)
            }
        }
    }

    /// Runs a plain text, such as ROLLBACK.
    ///
    /// # Errors
    /// [`RunError`]
    pub async fn run_text(&mut self, identity: &Arc<Identity>, text: &'static str) -> Result<Answer, RunError> {
        let operation = Operation::Simple(Bytes::from_static(text.as_bytes()));
        let (answer, _) =
            if text == "BEGIN" { self.run_fresh(identity, &operation).await? } else { self.run(identity, &operation).await? };
        Ok(answer)
    }

    async fn open(&mut self, identity: &Arc<Identity>) -> Result<(), RunError> {
        if self.refused.get(identity).is_some_and(|since| since.elapsed() < LOGIN_RETRY) {
            return Err(RunError::Connection);
        }
        if self.connections.len() >= CONNECTIONS_MAX {
            self.connections.clear();
        }
        self.refused.retain(|_, since| since.elapsed() < LOGIN_RETRY);
        let url: ServerUrl = self.database.url_for(&self.target, &identity.user);
        let opened = tokio::time::timeout(self.limit.max(Duration::from_secs(1)), async {
            let mut connection = Connection::open_as(&url, &url.user, &identity.login_at(&url), &own_parameters(identity)).await?;
            connection.simple_query(self.set_up).await?;
            Ok::<_, BackendError>(connection)
        })
        .await;
        match opened {
            Ok(Ok(connection)) => {
                self.connections.insert(identity.clone(), Prepared { connection, statements: HashMap::new() });
                Ok(())
            }
            failed => {
                self.refused.insert(identity.clone(), Instant::now());
                match failed {
                    Ok(Err(error)) => {
                        tracing::warn!(server = %self.target.name, user = %identity.user, %error, "cannot open a connection for copies");
                        Err(RunError::Connection)
                    }
                    _ => Err(RunError::Timeout),
                }
            }
        }
    }
}

/// The client's parameters, but under our application name, so that our connections are told from the clients'.
fn own_parameters(identity: &Identity) -> Vec<(&[u8], &[u8])> {
    let theirs = identity.parameters.iter().filter(|(name, _)| &name[..] != b"application_name");
    theirs.map(|(name, value)| (&name[..], &value[..])).chain([(&b"application_name"[..], &b"understudy copies"[..])]).collect()
}

async fn run_on(prepared: &mut Prepared, operation: &Operation, mut answer: Answer) -> Result<(Answer, Duration), BackendError> {
    let mut request = BytesMut::new();
    match operation {
        Operation::Simple(text) => frontend::put_query(&mut request, text),
        Operation::Extended { parse, bind, limit, parsed_here } => {
            let mut name = Vec::new();
            if *parsed_here {
                parse.put_as(&mut request, b"");
            } else {
                let mut hasher = DefaultHasher::new();
                (&parse.query, &parse.types).hash(&mut hasher);
                let hash = hasher.finish();
                name = format!("u{hash:016x}").into_bytes();
                if !prepared.statements.contains_key(&hash) {
                    prepare(prepared, parse, &name, hash).await?;
                }
            }
            frontend::Bind { portal: Bytes::new(), statement: Bytes::new(), rest: bind.clone() }.put_as(&mut request, b"", &name);
            put(&mut request, b'D', |b| {
                b.extend_from_slice(b"P");
                put_cstr(b, b"");
            });
            put(&mut request, b'E', |b| {
                put_cstr(b, b"");
                b.extend_from_slice(&limit.to_be_bytes());
            });
            frontend::put_sync(&mut request);
        }
    }
    let began = Instant::now();
    prepared.connection.send(&request).await?;
    loop {
        let message = prepared.connection.receive().await?;
        match message.tag {
            b'Z' => return Ok((answer, began.elapsed())),
            b'G' => {
                // a copied COPY FROM STDIN has no data: end it
                let mut fail = BytesMut::new();
                put(&mut fail, b'f', |b| put_cstr(b, b"copies carry no data"));
                prepared.connection.send(&fail).await?;
            }
            _ => answer.take_in(&message),
        }
    }
}

/// Prepares a statement outside the measured time. A refusal shows when it is bound.
async fn prepare(prepared: &mut Prepared, parse: &frontend::Parse, name: &[u8], hash: u64) -> Result<(), BackendError> {
    if prepared.statements.len() >= STATEMENTS_MAX {
        prepared.connection.simple_query("DEALLOCATE ALL").await?;
        prepared.statements.clear();
    }
    let mut request = BytesMut::new();
    parse.put_as(&mut request, name);
    frontend::put_sync(&mut request);
    prepared.connection.send(&request).await?;
    let mut failed = false;
    loop {
        match prepared.connection.receive().await?.tag {
            b'E' => failed = true,
            b'Z' => break,
            _ => {}
        }
    }
    if !failed {
        prepared.statements.insert(hash, ());
    }
    Ok(())
}
