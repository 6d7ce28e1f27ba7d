//! From a client that has named its role to a logged-in pair of connections. Either the owner of the writes authenticates
//! and messages are passed on, or it ends here and the proxy logs in at the server by itself.

use super::{
    front_door::FrontDoor,
    pooled::{Pooling, of_session, whole_session},
    start_up::{Client, replicates},
};
use crate::{
    auth::{self, Applicant, Denial, Ended, Keys, Method, Policy, ServerLogin, Stored},
    backend::{self, BackendError, Connection, Encryption},
    net::server_end_point,
    pool::{Backend, Parameters, PoolError, Server, Settings, next},
    traffic::{
        database::{Database, SessionInfo},
        route::Target,
    },
    wire::{self, backend::ErrorFields, backend::TransactionStatus, put, put_cstr, put_sized, take_cstr, take_i32},
};
use bytes::{Bytes, BytesMut};
use std::sync::Arc;
use tokio::io::AsyncWriteExt;

/// The newest protocol that we speak, as a client asks for it.
const PROTOCOL_3_2: i32 = 3 << 16 | 2;
/// Bytes of one log-in that wait for the client; a server's notices and parameters are fewer.
const WAITING_BYTES_MAX: usize = 64 << 10;
/// Roles and their verifiers, which a superuser may read. Whether a role may log in, the owner decides afterwards.
const VERIFIERS: &str = "SELECT rolname, rolpassword FROM pg_catalog.pg_authid WHERE rolname = $1";

/// Both sides are ready for the first statement.
pub(super) struct Admitted {
    /// Of its own.
    pub server: Option<Server>,
    /// Or how to borrow one.
    pub pooling: Option<Box<Pooling>>,
    /// With what other servers can be logged in to.
    pub login: ServerLogin,
    /// Of the protocol, as agreed upon with the client.
    pub version: i32,
}

/// The client's key for CancelRequest, long and cut to what protocol 3.0 knows.
pub(super) struct ClientKey {
    pub pid: i32,
    pub secret: [u8; 32],
}

impl ClientKey {
    /// As a client of that protocol version knows it.
    pub fn of(&self, version: i32) -> (i32, Bytes) {
        let length = if version >= PROTOCOL_3_2 { self.secret.len() } else { 4 };
        (self.pid, Bytes::copy_from_slice(self.secret.get(..length).unwrap_or_default()))
    }
}

/// Logs a client in, up to the first ReadyForQuery, which it has been sent.
pub(super) async fn log_in(
    door: &FrontDoor,
    database: &Arc<Database>,
    client: &mut Client,
    info: &SessionInfo,
    key: &ClientKey,
) -> Result<Admitted, Ended> {
    let policy = door.policy();
    let physical = client.parameter(b"replication").is_some_and(|value| replicates(value) && &value[..] != b"database");
    let tls = client.tls.take();
    let applicant = Applicant {
        user: &info.user,
        database: &database.name,
        tls: tls.as_ref(),
        address: client.peer.address(),
        uid: client.peer.uid(),
        physical_replication: physical,
    };
    let method = auth::method(&policy, &applicant).await.map_err(Ended::Denied)?;
    let result = match method {
        Method::Relay if info.pooled => Err(Ended::Denied(Denial {
            code: "0A000",
            message: format!("database \"{}\" is in transaction mode, which needs log-ins that end at understudy", database.name),
            hint: Some(
                "a rule in [proxy.auth] says relay here: use scram-sha-256 with users = \"query\" or \"file:…\", cert, peer or trust",
            ),
        })),
        Method::Relay => relay(door, database, client, &applicant, key).await,
        method => end_here(door, &policy, database, client, &applicant, method, key, info.pooled).await,
    };
    client.tls = tls;
    result
}

fn unreachable(database: &Database, error: &BackendError) -> Ended {
    tracing::warn!(database = %database.name, %error, "cannot connect a client to the owner of the writes");
    let message = format!("understudy cannot reach the server of database \"{}\"", database.name);
    Ended::Denied(Denial { code: "08006", message, hint: Some("see SHOW SERVERS and the log of understudy") })
}

/// Where the owner is, once new transactions may begin there.
async fn owner(database: &Database) -> (Arc<Target>, i64) {
    database.gate.wait_open().await;
    let route = database.route.load_full();
    (route.owner.clone(), route.epoch)
}

/// A connection to the owner in the `number`th way of its url, if there is one.
async fn reach(database: &Database, number: usize) -> Result<Option<(Server, Arc<Target>, Encryption)>, BackendError> {
    loop {
        let (owner, epoch) = owner(database).await;
        let Some(encryption) = backend::attempts(&owner.url).get(number).copied() else { return Ok(None) };
        let stream = backend::connect_as(&owner.url, encryption).await?;
        if database.route.load().epoch == epoch {
            let backend = Arc::new(Backend { target: owner.clone(), pid: 0, key: Bytes::new() });
            let (from, parameters) = (BytesMut::new(), Parameters::default());
            let server = Server { stream, from, backend, heard: BytesMut::new(), parameters, epoch, bulk: false, pooled: None };
            return Ok(Some((server, owner, encryption)));
        }
    }
}

/// The owner authenticates; its messages and the client's answers are passed on.
async fn relay(
    door: &FrontDoor,
    database: &Database,
    client: &mut Client,
    applicant: &Applicant<'_>,
    key: &ClientKey,
) -> Result<Admitted, Ended> {
    let mut refused = None;
    for number in 0.. {
        let (server, owner, encryption) = match reach(database, number).await {
            Ok(Some(reached)) => reached,
            Ok(None) => break,
            Err(_) if refused.is_some() => break,
            Err(error) => return Err(unreachable(database, &error)),
        };
        let mut relayed = Relayed { encryption, door, database, client, applicant, key, server, to_client: BytesMut::new(), told: false };
        match Box::pin(relayed.run(&owner)).await? {
            Ok((login, version)) => return Ok(Admitted { server: Some(relayed.server), pooling: None, login, version }),
            // its first word was that it does not want us like this: perhaps with, or without, TLS
            Err(said) => refused = refused.or(Some(said)),
        }
    }
    if let Some(said) = refused {
        let _ = client.stream.write_all(&said).await;
        let _ = client.stream.shutdown().await;
    }
    Err(Ended::Gone)
}

/// A log-in whose messages are passed on.
struct Relayed<'a> {
    encryption: Encryption,
    door: &'a FrontDoor,
    database: &'a Database,
    client: &'a mut Client,
    applicant: &'a Applicant<'a>,
    key: &'a ClientKey,
    server: Server,
    to_client: BytesMut,
    /// Something has been sent to the client already.
    told: bool,
}

impl Relayed<'_> {
    /// Until the first ReadyForQuery. `Err` inside: refused at the first word, with what the server said.
    async fn run(&mut self, owner: &Arc<Target>) -> Result<Result<(ServerLogin, i32), BytesMut>, Ended> {
        let mut login = ServerLogin::Nothing;
        let mut version = self.client.version.min(PROTOCOL_3_2);
        self.send(&self.startup(owner)).await?;
        loop {
            let message = next(&mut self.server.stream, &mut self.server.from).await.ok_or(Ended::Gone)?;
            let mut body = &message.body[..];
            match message.tag {
                b'v' => version = version.min(take_i32(&mut body).ok_or(Ended::Gone)?),
                b'K' => {
                    let pid = take_i32(&mut body).ok_or(Ended::Gone)?;
                    let key = message.body.slice_ref(body);
                    self.server.backend = Arc::new(Backend { target: owner.clone(), pid, key });
                    let (pid, secret) = self.key.of(version);
                    put(&mut self.to_client, b'K', |b| {
                        b.extend_from_slice(&pid.to_be_bytes());
                        b.extend_from_slice(&secret);
                    });
                    continue;
                }
                b'S' => self.server.parameters.note(body),
                b'R' => match take_i32(&mut body).ok_or(Ended::Gone)? {
                    10 => {
                        if let Some(found) = self.sasl(body).await? {
                            login = found;
                        }
                        continue;
                    }
                    kind @ (3 | 5 | 7 | 8 | 9 | 11) => {
                        put(&mut self.to_client, b'R', |b| b.extend_from_slice(&message.body));
                        let answer = self.ask().await?;
                        if kind == 3 {
                            let password = take_cstr(&mut &answer[..]).map(String::from_utf8_lossy).unwrap_or_default();
                            login = ServerLogin::password(password);
                        }
                        self.answer(&answer).await?;
                        continue;
                    }
                    _ => {}
                },
                _ => {}
            }
            put(&mut self.to_client, message.tag, |b| b.extend_from_slice(&message.body));
            if message.tag == b'E' {
                let code = ErrorFields::parse(&message.body).code;
                if !self.told && backend::is_about_encryption(&code, self.encryption, &self.server.stream) {
                    return Ok(Err(std::mem::take(&mut self.to_client)));
                }
                self.tell().await?;
                let _ = self.client.stream.shutdown().await;
                return Err(Ended::Gone);
            }
            let ready = message.tag == b'Z' && TransactionStatus::parse(&message.body).is_some();
            if ready || self.to_client.len() > WAITING_BYTES_MAX {
                self.tell().await?;
            }
            if ready {
                return Ok(Ok((login, version)));
            }
        }
    }

    /// The client's own start-up message, for the owner's database.
    fn startup(&self, owner: &Target) -> BytesMut {
        let mut startup = BytesMut::new();
        put_sized(&mut startup, |b| {
            b.extend_from_slice(&self.client.version.to_be_bytes());
            for (name, value) in self.client.parameters.iter().filter(|(name, _)| &name[..] != b"database") {
                put_cstr(b, name);
                put_cstr(b, value);
            }
            put_cstr(b, b"database");
            put_cstr(b, owner.url.dbname.as_bytes());
            b.extend_from_slice(&[0]);
        });
        startup
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<(), Ended> {
        self.server.stream.write_all(bytes).await.map_err(|_| Ended::Gone)
    }

    async fn tell(&mut self) -> Result<(), Ended> {
        self.told = true;
        let bytes = std::mem::take(&mut self.to_client);
        self.client.stream.write_all(&bytes).await.map_err(|_| Ended::Gone)
    }

    async fn ask(&mut self) -> Result<Bytes, Ended> {
        self.tell().await?;
        auth::next_answer(&mut self.client.stream, &mut self.client.buffer).await
    }

    async fn answer(&mut self, body: &[u8]) -> Result<(), Ended> {
        let mut bytes = BytesMut::new();
        put(&mut bytes, b'p', |b| b.extend_from_slice(body));
        self.send(&bytes).await
    }

    /// AuthenticationSASL. Channel binding ties a proof to one TLS connection, and there are two: it cannot be passed on. Where
    /// the owner tells us the role's verifier, the proof is taken here and given to the owner anew, bound on either side.
    /// Else the mechanism is left out.
    async fn sasl(&mut self, mut offered: &[u8]) -> Result<Option<ServerLogin>, Ended> {
        let mut names = Vec::new();
        while let Some(name) = take_cstr(&mut offered).filter(|name| !name.is_empty()) {
            names.push(name);
        }
        let plus = auth::scram::SCRAM_PLUS.as_bytes();
        let bindable = names.contains(&plus);
        if bindable && self.applicant.tls.is_some() {
            let found = self.door.lookup.find(self.database, VERIFIERS, self.applicant.user).await;
            if let Err(error) = &found {
                tracing::debug!(%error, "the url's role may not read verifiers: channel binding is left out");
            }
            if let Ok(found) = found {
                // a name without a verifier is offered the same as one that has it
                let verifier = match found.as_deref() {
                    Some(Stored::Scram(verifier)) => verifier.clone(),
                    _ => self.door.policy().mock(self.applicant.user),
                };
                let end_point = self.applicant.tls.and_then(|tls| tls.end_point.as_deref());
                self.tell().await?;
                let Client { stream, buffer, .. } = &mut *self.client;
                let proven = auth::prove(stream, buffer, self.applicant.user, &verifier, end_point).await;
                if let Err(Ended::Denied(_)) = &proven {
                    self.door.lookup.forget(self.database, self.applicant.user);
                }
                let keys = proven?;
                self.prove_again(&keys).await?;
                return Ok(Some(ServerLogin::Scram(keys)));
            }
        }
        put(&mut self.to_client, b'R', |b| {
            b.extend_from_slice(&10i32.to_be_bytes());
            for name in names.iter().filter(|name| **name != plus) {
                put_cstr(b, name);
            }
            b.extend_from_slice(&[0]);
        });
        let answer = self.ask().await?;
        if bindable && auth::initial_response(&answer).is_some_and(|(_, first)| first.starts_with(b"y")) {
            return Err(Ended::Denied(Denial {
                code: "28000",
                message: "understudy cannot pass channel binding on: there are two TLS connections".into(),
                hint: Some(
                    "connect with channel_binding=disable, or let understudy read the verifiers: users = \"query\" or \"file:…\" in \
                     [proxy.auth], or a superuser in the url",
                ),
            }));
        }
        self.answer(&answer).await?;
        Ok(None)
    }

    /// Gives the owner a proof of our own. AuthenticationOk is left for the caller.
    async fn prove_again(&mut self, keys: &Keys) -> Result<(), Ended> {
        let end_point = server_end_point(&self.server.stream);
        let (mut state, first) = backend::scram_by_keys(keys, end_point.as_deref());
        self.send(&first).await?;
        let broken = |_| Ended::Gone;
        for step in [11, 12] {
            let message = next(&mut self.server.stream, &mut self.server.from).await.ok_or(Ended::Gone)?;
            let mut body = &message.body[..];
            if message.tag != b'R' || take_i32(&mut body) != Some(step) {
                put(&mut self.to_client, message.tag, |b| b.extend_from_slice(&message.body));
                self.tell().await?;
                return Err(Ended::Gone);
            }
            match step {
                11 => {
                    let text = state.answer(body).map_err(broken)?;
                    self.answer(text.as_bytes()).await?;
                }
                _ => state.finish(body).map_err(broken)?,
            }
        }
        Ok(())
    }
}

/// Authenticates here, then logs in at the owner, or finds out what a pool needs to know.
#[allow(clippy::too_many_arguments)]
async fn end_here(
    door: &FrontDoor,
    policy: &Policy,
    database: &Arc<Database>,
    client: &mut Client,
    applicant: &Applicant<'_>,
    method: Method,
    key: &ClientKey,
    pooled: bool,
) -> Result<Admitted, Ended> {
    let user = applicant.user;
    let version = client.version.min(PROTOCOL_3_2);
    negotiate(client, version).await?;
    let found = match (policy.query(), method) {
        (Some(query), Method::Password | Method::Md5 | Method::Scram) => {
            door.lookup.find(database, query, user).await.map_err(|error| {
                tracing::warn!(database = %database.name, %error, "the auth query failed");
                let message = "understudy cannot look users up at the server".into();
                Ended::Denied(Denial { code: "08006", message, hint: Some("see the log of understudy: the auth query failed") })
            })?
        }
        _ => None,
    };
    let stored = found.as_deref().or_else(|| policy.listed(user));
    let proven = auth::authenticate(&mut client.stream, &mut client.buffer, policy, applicant, method, stored).await;
    if let Err(Ended::Denied(_)) = &proven {
        door.lookup.forget(database, user);
    }
    let login = proven?;
    if pooled {
        let settings = Settings::of_startup(&of_session(&client.parameters)).map_err(PoolError::Startup);
        let pool = door.pools().of(database, user, &login);
        let welcome = match settings {
            Ok(settings) => pool.welcome(settings).await,
            Err(error) => Err(error),
        };
        let welcome = welcome.map_err(|error| not_lent(database, user, error))?;
        greet(client, &welcome.parameters, key, version).await?;
        return Ok(Admitted { server: None, pooling: Some(Pooling::new(pool, welcome)), login, version });
    }
    let replication = client.parameter(b"replication").is_some_and(|value| replicates(value));
    if database.pool.load().size.is_some() && !replication {
        let pool = door.pools().of(database, user, &login);
        let server = whole_session(&pool, of_session(&client.parameters)).await.map_err(|error| not_lent(database, user, error))?;
        greet(client, &server.parameters, key, version).await?;
        return Ok(Admitted { server: Some(server), pooling: None, login, version });
    }
    let (connection, owner, epoch) = loop {
        let (owner, epoch) = owner(database).await;
        let url = database.url_for(&owner, user);
        let known = ServerLogin::from(url.password.as_ref());
        let own = [&b"user"[..], b"database"];
        let parameters = client.parameters.iter().filter(|(name, _)| !own.contains(&&name[..]) && !name.starts_with(b"_pq_."));
        let parameters: Vec<(&[u8], &[u8])> = parameters.map(|(name, value)| (&name[..], &value[..])).collect();
        let known = if known == ServerLogin::Nothing { &login } else { &known };
        let connection = Connection::open_version(version, &url, user, known, &parameters).await;
        let connection = connection.map_err(|error| not_admitted(database, user, error))?;
        if database.route.load().epoch == epoch {
            break (connection, owner, epoch);
        }
    };
    let server = Server::from_connection(connection, owner, epoch);
    greet(client, &server.parameters, key, version).await?;
    Ok(Admitted { server: Some(server), pooling: None, login, version })
}

/// From AuthenticationOk to the first ReadyForQuery.
async fn greet(client: &mut Client, parameters: &Parameters, key: &ClientKey, version: i32) -> Result<(), Ended> {
    let mut to_client = BytesMut::new();
    put(&mut to_client, b'R', |b| b.extend_from_slice(&0i32.to_be_bytes()));
    for (name, value) in parameters.list() {
        put(&mut to_client, b'S', |b| {
            put_cstr(b, name);
            put_cstr(b, value);
        });
    }
    let (pid, secret) = key.of(version);
    put(&mut to_client, b'K', |b| {
        b.extend_from_slice(&pid.to_be_bytes());
        b.extend_from_slice(&secret);
    });
    put(&mut to_client, b'Z', |b| b.extend_from_slice(b"I"));
    client.stream.write_all(&to_client).await.map_err(|_| Ended::Gone)
}

/// The pool has nothing for a client.
fn not_lent(database: &Database, user: &str, error: PoolError) -> Ended {
    match error {
        PoolError::Refused(error) => not_admitted(database, user, error),
        error => Ended::Denied(Denial { code: known_code(error.code()), message: error.to_string(), hint: error.hint() }),
    }
}

/// SQLSTATEs that clients act upon are few; the others keep their class.
fn known_code(code: &str) -> &'static str {
    match code {
        "28P01" => "28P01",
        "3D000" => "3D000",
        "42501" => "42501",
        "53300" => "53300",
        "57P03" => "57P03",
        "0A000" => "0A000",
        "22023" => "22023",
        "42704" => "42704",
        "08006" => "08006",
        _ => "28000",
    }
}

/// The proxy is content with the client, and the owner is not with the proxy.
fn not_admitted(database: &Database, user: &str, error: BackendError) -> Ended {
    match error {
        BackendError::Server(fields) => {
            let code = known_code(&fields.code);
            tracing::warn!(database = %database.name, %user, sqlstate = %fields.code, "the server refused a client that understudy had let in");
            Ended::Denied(Denial { code, message: fields.message, hint: None })
        }
        BackendError::Authentication { reason, .. } => {
            tracing::warn!(database = %database.name, %user, %reason, "cannot log a client in at the server");
            let message = format!("understudy cannot log user \"{user}\" in at the server");
            let hint = "see the log of understudy; a [[database.user]] with a password in proxy.toml helps";
            Ended::Denied(Denial { code: "28000", message, hint: Some(hint) })
        }
        error => unreachable(database, &error),
    }
}

/// Tells which of the client's wishes about the protocol are not fulfilled, if there are any, as PostgreSQL 18 does.
async fn negotiate(client: &mut Client, version: i32) -> Result<(), Ended> {
    let unknown: Vec<&Bytes> = client.parameters.iter().map(|(name, _)| name).filter(|name| name.starts_with(b"_pq_.")).collect();
    if client.version <= PROTOCOL_3_2 && unknown.is_empty() {
        return Ok(());
    }
    let mut message = BytesMut::new();
    put(&mut message, b'v', |b| {
        b.extend_from_slice(&version.to_be_bytes());
        b.extend_from_slice(&(unknown.len() as i32).to_be_bytes());
        for name in unknown {
            wire::put_cstr(b, name);
        }
    });
    client.stream.write_all(&message).await.map_err(|_| Ended::Gone)
}
