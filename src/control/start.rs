//! `understudy run`: from proxy.toml to a serving process, and back.

use super::{
    Controller, Managed,
    managed::{ManagedShadow, lock},
    operator::Handle,
    takeover, watch,
};
use crate::{
    auth::{AuthError, Policy},
    cdc::{Direction, Start},
    config::{self, Config, ConfigError, DatabaseConfig, FeedKind, UnixSocketConfig},
    console,
    cutover::recover::{self, Unfinished},
    metadata::{MetadataError, Owner, Repository, Severity},
    net::{Acceptor, Listener, SocketFile, TlsError, UnixError, bind_unix},
    session::{FrontDoor, Limits},
    sql::CatalogFacts,
    traffic::copies::ByteBudget,
};
use arc_swap::ArcSwap;
use serde_json::json;
use std::{
    collections::HashMap,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{
    net::{TcpListener, UnixListener},
    sync::Notify,
    task::{JoinHandle, JoinSet},
};

/// Sessions get this long to end their transactions at shutdown.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);

/// Mirrored transactions that wait at the end get this long.
const MIRROR_DRAIN: Duration = Duration::from_secs(20);

/// Requests to the dashboard that are under way get this long.
const HTTP_DRAIN: Duration = Duration::from_millis(300);

/// Connections that may wait in the socket's queue: enough for all clients of a crowded database to come at once.
const BACKLOG: i32 = 4096;

/// The process could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration is wrong.
    #[error("{0}")]
    Config(#[from] ConfigError),
    /// A port could not be taken.
    #[error("cannot listen on {address}: {source}. Stop whoever uses that port, or change `{key}` in the configuration")]
    Listen {
        /// As configured.
        address: SocketAddr,
        /// `listen` or `http`
        key: &'static str,
        /// From the operating system.
        source: std::io::Error,
    },
    /// The Unix socket could not be made.
    #[error("{0}")]
    Unix(#[from] UnixError),
    /// A server could not be reached.
    #[error(
        "cannot connect to {which} of database {database} at {url}: {reason}. Check the url, the server and its pg_hba.conf; `understudy check` says more"
    )]
    Server {
        /// `the source`, or the shadow that owns the writes.
        which: String,
        /// Name.
        database: String,
        /// Without the password.
        url: String,
        /// From the server or the operating system.
        reason: String,
    },
    /// The metadata repository.
    #[error("{0}")]
    Metadata(#[from] MetadataError),
    /// A cutover that a crash interrupted could not be finished or taken back.
    #[error(
        "a cutover of {database} was interrupted and could not be finished or taken back: {reason}. Both servers must be reachable; then start understudy again"
    )]
    Recovery {
        /// Name.
        database: String,
        /// Why.
        reason: String,
    },
    /// A certificate or key.
    #[error("[proxy.tls]: {0}")]
    Tls(#[from] TlsError),
    /// Rules or users.
    #[error("{0}")]
    Auth(#[from] AuthError),
    /// The running process keeps everything.
    #[error("{0}")]
    Takeover(String),
    /// The configuration no longer names the owner.
    #[error(
        "shadow {shadow} owns the writes of {database} since a cutover, but the configuration does not name it: put it back, or make it the source"
    )]
    OwnerMissing {
        /// Name.
        database: String,
        /// Name.
        shadow: String,
    },
}

/// Runs until SHUTDOWN, SIGTERM or SIGINT, or until another process has taken over and the last session has ended. `takeover`: from the
/// running process, if there is one.
///
/// # Errors
/// [`StartError`]
pub async fn run(path: &Path, takeover: bool) -> Result<(), StartError> {
    let config = config::load(path)?;
    raise_descriptors();
    let handover = match takeover {
        true => takeover::ask(&config.proxy.metadata).await.map_err(StartError::Takeover)?,
        false => None,
    };
    // gone with this process, unless another one goes on with the socket
    let (listeners, mut socket_file) = match &handover {
        Some(handover) => (handed(&config, &handover.listeners)?, None),
        None => listen(&config)?,
    };
    let repository = Repository::open(&config.proxy.metadata)?;
    let budget = ByteBudget::new(config.proxy.shadow_memory_bytes_max);
    let mut databases = Vec::new();
    let mut recoveries = Vec::new();
    for database in &config.databases {
        let (managed, recovery) = open(database, &repository, &budget).await?;
        databases.push(managed);
        recoveries.push(recovery);
    }
    let handle: Arc<OnceLock<Arc<Controller>>> = Arc::new(OnceLock::new());
    let door = front_door(&config, &databases, &handle)?;
    let predecessor = handover.as_ref().map(|handover| handover.predecessor);
    if let Some(predecessor) = predecessor {
        for managed in &databases {
            let _ = managed.predecessor.set(predecessor);
        }
        door.ask_about_strangers(Box::new(move |pid, key| Box::pin(predecessor.cancel(pid, key))));
    }
    let controller = Arc::new(Controller {
        config_path: path.to_owned(),
        repository,
        databases,
        door: door.clone(),
        budget,
        started: Instant::now(),
        shutdown: Notify::new(),
        handed_over: AtomicBool::new(false),
        listeners: Mutex::new(Some(listeners)),
        accepting: Mutex::new(None),
        predecessor,
        crash_at: std::env::var("UNDERSTUDY_FAULT").ok().and_then(|fault| fault.strip_prefix("crash-at:").map(str::to_owned)),
        faults_allowed: std::env::var("UNDERSTUDY_FAULT").is_ok_and(|fault| fault == "lose-change"),
        config: ArcSwap::from_pointee(config),
    });
    let _ = handle.set(controller.clone());
    for (managed, recovery) in controller.databases.iter().zip(recoveries) {
        resume(&controller, managed, recovery)?;
    }
    let mut tasks = JoinSet::new();
    watch::spawn_all(&controller, &mut tasks);
    tasks.spawn(controller.clone().watch_file());
    controller.start_listening()?;
    {
        let config = controller.config.load();
        tracing::info!(listen = %config.proxy.listen, unix = ?config.proxy.unix_socket.as_ref().map(|socket| &socket.path), http = ?config.proxy.http, databases = controller.databases.len(), "understudy is ready");
    }
    if let Some(handover) = handover {
        tracing::info!(pid = handover.predecessor.pid, "took over from the running process; it ends when its sessions have ended");
        handover.confirm().await;
        socket_file =
            controller.config.load().proxy.unix_socket.as_ref().and_then(|socket| SocketFile::adopt(&socket.path, socket.mode).ok());
    }
    let succeeded = tokio::select! {
        () = wait_for_the_end(&controller) => false,
        () = serve_what_is_left(&controller) => true,
    };
    // the successor's, even if it has not said yet that it is ready: a file that nobody removes is replaced at the next start
    if let Some(file) = socket_file.take_if(|_| succeeded || controller.handed_over.load(Ordering::SeqCst)) {
        file.keep();
    }
    if succeeded {
        drain_mirrors(&controller, MIRROR_DRAIN).await;
        return Ok(());
    }
    tracing::info!("shutting down: no new clients; sessions end when their transaction has ended");
    drop(lock(&controller.listeners).take()); // who comes now is refused at once, not left waiting in the queue
    door.close();
    let deadline = Instant::now() + DRAIN_TIMEOUT;
    while door.connected() > 0 && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    drain_mirrors(&controller, MIRROR_DRAIN).await;
    for managed in &controller.databases {
        for shadow in &managed.shadows {
            let feed = lock(&shadow.feed).take();
            if let Some((feed, _)) = feed {
                feed.stop().await;
            }
        }
    }
    drop(socket_file); // while it still answers: another process cannot have taken the path yet
    controller.stop_listening().await;
    tasks.abort_all();
    Ok(())
}

/// What waits in this process for mirrored shadows is lost to them when it ends.
async fn drain_mirrors(controller: &Controller, timeout: Duration) {
    let deadline = Instant::now() + timeout;
    for managed in &controller.databases {
        for shadow in managed.shadows.iter().filter(|shadow| shadow.route.mirror.is_applying()) {
            let mirror = &shadow.route.mirror;
            if !mirror.drained(deadline.saturating_duration_since(Instant::now())).await {
                let (name, waiting) = (&managed.database.name, mirror.waiting());
                tracing::warn!(database = %name, shadow = shadow.name(), waiting, "mirrored transactions are lost to the shadow: VERIFY … REPAIR");
            }
        }
    }
}

/// Each client takes two descriptors, and shells give 1024 where the system allows many more.
fn raise_descriptors() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

/// After a takeover: until the last session has ended.
async fn serve_what_is_left(controller: &Arc<Controller>) {
    takeover::offer(controller).await;
    let answering = tokio::spawn(takeover::answer_successor(controller.clone()));
    while controller.door.connected() + controller.door.arriving() > 0 {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    answering.abort();
    tracing::info!("the last session has ended");
}

fn listen(config: &Config) -> Result<(takeover::Listeners, Option<SocketFile>), StartError> {
    let bind = |address: SocketAddr, key: &'static str| {
        let listener = std::net::TcpListener::bind(address).and_then(|listener| {
            rustix::net::listen(&listener, BACKLOG)?; // the library asks for 128
            Ok(listener)
        });
        listener.map_err(|source| StartError::Listen { address, key, source })
    };
    let http = config.proxy.http.map(|address| bind(address, "http")).transpose()?;
    let clients = bind(config.proxy.listen, "listen")?;
    let socket = config.proxy.unix_socket.as_ref().map(|socket| bind_unix(&socket.path, socket.mode, BACKLOG)).transpose()?;
    let (unix, file) = socket.unzip();
    Ok((takeover::Listeners { clients, http, unix }, file))
}

/// The sockets of the running process, if they are those that the configuration names.
fn handed(config: &Config, sockets: &takeover::Listeners) -> Result<takeover::Listeners, StartError> {
    let of = |socket: &std::net::TcpListener| socket.local_addr().ok();
    let path = |socket: &std::os::unix::net::UnixListener| socket.local_addr().ok()?.as_pathname().map(Path::to_owned);
    let found = (of(&sockets.clients), sockets.http.as_ref().and_then(of), sockets.unix.as_ref().and_then(path));
    let wanted = config.proxy.unix_socket.as_ref().map(|socket| socket.path.clone());
    if found != (Some(config.proxy.listen), config.proxy.http, wanted) {
        return Err(StartError::Takeover(
            "listen, http and unix_socket_dir of [proxy] are not those of the running process: a takeover cannot change them. The running process goes on"
                .into(),
        ));
    }
    sockets.duplicate().map_err(|error| StartError::Takeover(format!("cannot take the sockets over: {error}")))
}

/// The tasks that accept.
pub(super) struct Accepting {
    /// By TCP, and over the Unix socket.
    clients: Vec<JoinHandle<()>>,
    http: Option<(JoinHandle<()>, Arc<Notify>)>,
}

impl Controller {
    /// Accepts clients, consoles and HTTP.
    pub(super) fn start_listening(self: &Arc<Self>) -> Result<(), StartError> {
        let config = self.config.load();
        let runtime = |socket: std::net::TcpListener, address: SocketAddr, key: &'static str| {
            let listener = socket.set_nonblocking(true).and_then(|()| TcpListener::from_std(socket));
            listener.map_err(|source| StartError::Listen { address, key, source })
        };
        let duplicate = lock(&self.listeners).as_ref().map(takeover::Listeners::duplicate).transpose();
        let duplicate = duplicate.map_err(|source| StartError::Listen { address: config.proxy.listen, key: "listen", source })?;
        let Some(sockets) = duplicate else { return Ok(()) };
        let tcp = Listener::Tcp(runtime(sockets.clients, config.proxy.listen, "listen")?);
        let unix = match (sockets.unix, &config.proxy.unix_socket) {
            (Some(socket), Some(UnixSocketConfig { path, .. })) => {
                let listener = socket.set_nonblocking(true).and_then(|()| UnixListener::from_std(socket));
                Some(Listener::Unix(listener.map_err(|source| UnixError::Io { path: path.clone(), source })?))
            }
            _ => None,
        };
        let clients = std::iter::once(tcp).chain(unix).map(|listener| tokio::spawn(self.door.clone().listen(listener))).collect();
        let http = match (sockets.http, config.proxy.http) {
            (Some(socket), Some(address)) => {
                let (listener, stop) = (runtime(socket, address, "http")?, Arc::new(Notify::new()));
                let (operator, stopped) = (Arc::new(Handle(self.clone())), stop.clone());
                let serving = async move { console::http::serve_http(listener, operator, async move { stopped.notified().await }).await };
                Some((tokio::spawn(serving), stop))
            }
            _ => None,
        };
        *lock(&self.accepting) = Some(Accepting { clients, http });
        Ok(())
    }

    /// Leaves who waits in the sockets' queues there.
    pub(super) async fn stop_listening(&self) {
        let Some(Accepting { clients, http }) = lock(&self.accepting).take() else { return };
        clients.iter().for_each(JoinHandle::abort);
        for listening in clients {
            let _ = listening.await;
        }
        if let Some((mut serving, stop)) = http {
            stop.notify_one();
            if tokio::time::timeout(HTTP_DRAIN, &mut serving).await.is_err() {
                serving.abort();
            }
        }
    }

    /// Sessions that the process before this one still serves; `None`: it has ended, or there was none.
    pub(super) async fn predecessor_sessions(&self) -> Option<usize> {
        self.predecessor?.sessions().await
    }
}

fn front_door(config: &Config, databases: &[Arc<Managed>], handle: &Arc<OnceLock<Arc<Controller>>>) -> Result<Arc<FrontDoor>, StartError> {
    let by_name: HashMap<_, _> = databases.iter().map(|managed| (managed.database.name.clone(), managed.database.clone())).collect();
    let handle = handle.clone();
    let console = Box::new(move |stream, first, peer, tls| -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>> {
        let handle = handle.clone();
        Box::pin(async move {
            if let Some(controller) = handle.get() {
                // as loaded last: a changed password holds from the next login on
                let user = controller.config.load().proxy.console.clone();
                console::server::serve(stream, first, peer, tls, Arc::new(Handle(controller.clone())), user).await;
            }
        })
    });
    let door = FrontDoor::new(by_name, limits(config), console);
    let (acceptor, policy) = access(config)?;
    door.set_tls(acceptor);
    door.set_policy(policy);
    Ok(door)
}

/// What clients must keep to.
pub(super) fn limits(config: &Config) -> Limits {
    let config::LimitsConfig {
        clients_max,
        login_timeout,
        message_bytes_max,
        client_bytes_max,
        idle_in_transaction_timeout,
        client_idle_timeout,
        query_timeout,
    } = config.proxy.limits;
    Limits {
        clients_max,
        login_timeout,
        message_bytes_max,
        client_bytes_max,
        idle_in_transaction: idle_in_transaction_timeout,
        client_idle: client_idle_timeout,
        query: query_timeout,
        tcp: config.proxy.tcp,
    }
}

/// Reads the files that say who may come in.
pub(super) fn access(config: &Config) -> Result<(Option<Acceptor>, Policy), StartError> {
    let tls = config.proxy.tls.as_ref();
    Ok((tls.map(Acceptor::load).transpose()?, Policy::load(&config.proxy.auth, tls)?))
}

async fn wait_for_the_end(controller: &Controller) {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) else {
        controller.shutdown.notified().await;
        return;
    };
    tokio::select! {
        () = controller.shutdown.notified() => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// What [`resume`] has to do for a database.
enum Recovery {
    Nothing,
    StartOpposite { run: i64, shadow: String, to_shadow: bool, marker: String },
}

/// Connects to the owner of a database; finishes or takes back an interrupted cutover first.
async fn open(config: &DatabaseConfig, repository: &Repository, budget: &Arc<ByteBudget>) -> Result<(Arc<Managed>, Recovery), StartError> {
    let stored = repository.ownership(&config.name)?;
    let owner_url = match &stored.owner {
        Owner::Source => &config.source,
        Owner::Shadow(name) => match config.shadows.iter().find(|shadow| shadow.name == *name) {
            Some(shadow) => &shadow.url,
            None => return Err(StartError::OwnerMissing { database: config.name.clone(), shadow: name.clone() }),
        },
    };
    let unreachable = |reason: String| StartError::Server {
        which: match &stored.owner {
            Owner::Source => "the source".into(),
            Owner::Shadow(name) => format!("the owner {name}"),
        },
        database: config.name.clone(),
        url: owner_url.to_string(),
        reason,
    };
    let client = super::commands::connect(owner_url, "understudy start").await.map_err(|error| unreachable(error.to_string()))?;
    let facts = CatalogFacts::load(&client).await.map_err(|error| unreachable(reason(&error)))?;
    let managed = Managed::new(config, facts, &stored.owner, stored.epoch, budget);
    let recovery =
        recover_cutover(&managed, repository).await.map_err(|reason| StartError::Recovery { database: config.name.clone(), reason })?;
    Ok((managed, recovery))
}

/// The server's words, with the cause where the library hides it.
pub(super) fn reason(error: &tokio_postgres::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

async fn recover_cutover(managed: &Arc<Managed>, repository: &Repository) -> Result<Recovery, String> {
    let name = &managed.database.name;
    let find = |wanted: &str| -> Result<&Arc<ManagedShadow>, String> {
        managed.shadows.iter().find(|shadow| shadow.name() == wanted).ok_or_else(|| format!("shadow {wanted} is not in the configuration"))
    };
    let sides = |shadow: &ManagedShadow, from_source: bool| {
        let (source, target) = (managed.source(), shadow.route.target.clone());
        let (forward, reverse) = (managed.feed_spec(shadow, Direction::Forward), managed.feed_spec(shadow, Direction::Reverse));
        if from_source { (source, target, forward, reverse) } else { (target, source, reverse, forward) }
    };
    match recover::judge(&repository.last_run(name).map_err(|error| error.to_string())?) {
        Unfinished::No => Ok(Recovery::Nothing),
        Unfinished::TakeBack { run, shadow, from_source, was_fenced } => {
            let (from, to, _, opposite) = sides(find(&shadow)?, from_source);
            let left = recover::take_back(repository, name, run, &from, &to, &opposite, was_fenced).await?.err();
            let left = left.map_or(String::new(), |error| {
                format!(". The way back that had been prepared on {} could not be removed: {error}. The next start tries again", to.name)
            });
            let message = format!("an interrupted cutover was taken back: {} owns the writes of {name}{left}", from.name);
            repository.record(Severity::Warning, "cutover", name, &shadow, &message, json!({"run": run}));
            Ok(Recovery::Nothing)
        }
        Unfinished::Finish { run, shadow, from_source, marker, proven } => {
            let managed_shadow = find(&shadow)?;
            let (from, to, spec, _) = sides(managed_shadow, from_source);
            recover::fence(&from).await?;
            if !proven {
                let feed = managed.start_feed(managed_shadow, spec.direction, Start::Resume, repository);
                let carried = recover::carry_over(&from, &marker, &feed).await;
                feed.stop().await;
                lock(&managed_shadow.feed).take();
                let alert = match carried {
                    Ok(0) => None,
                    Ok(changes) => Some(format!(
                        "{changes} row changes were committed on {} behind the cutover's marker by somebody who goes around understudy. They were carried to {}; find that client and stop it",
                        from.name, to.name
                    )),
                    Err(error) => Some(format!(
                        "it could not be proven that nobody wrote to {} behind the cutover's marker ({error}): VERIFY {shadow} shows whether {} lacks rows",
                        from.name, to.name
                    )),
                };
                if let Some(message) = alert {
                    repository.record(Severity::Alert, "cutover", name, &shadow, &message, json!({"run": run}));
                }
            }
            recover::finish(repository, name, run, &spec).await?;
            let message = format!("an interrupted cutover was finished: {} owns the writes of {name}", to.name);
            repository.record(Severity::Warning, "cutover", name, &shadow, &message, json!({"run": run}));
            Ok(Recovery::StartOpposite { run, shadow, to_shadow: from_source, marker })
        }
    }
}

/// Ends what a recovery has left, and goes on with the feeds that an operator had started.
fn resume(controller: &Arc<Controller>, managed: &Arc<Managed>, recovery: Recovery) -> Result<(), StartError> {
    let name = &managed.database.name;
    let mut recovered = None;
    if let Recovery::StartOpposite { run, shadow, to_shadow, marker } = recovery {
        let direction = if to_shadow { Direction::Reverse } else { Direction::Forward };
        if let Some(shadow) = managed.shadows.iter().find(|found| found.name() == shadow) {
            // if it had already been started and has stored progress, that counts
            managed.start_feed(shadow, direction, Start::AfterMarker(marker), &controller.repository);
        }
        recover::journal(&controller.repository, name, run, "done")
            .map_err(|reason| StartError::Recovery { database: name.clone(), reason })?;
        recovered = Some(shadow);
    }
    resume_feeds(controller, managed, recovered.as_deref())
}

/// Goes on with the feeds that an operator had started, but for one that runs already.
pub(super) fn resume_feeds(controller: &Controller, managed: &Arc<Managed>, running: Option<&str>) -> Result<(), StartError> {
    let owner = managed.database.route.load().owner.clone();
    let name = &managed.database.name;
    for shadow in &managed.shadows {
        let started = controller.repository.is_started(name, &shadow.name())?;
        if !started || running == Some(&shadow.name()) {
            continue;
        }
        if shadow.config.load().feed == FeedKind::Mirror {
            managed.start_mirror(shadow, &controller.repository, true);
            continue;
        }
        let direction = if shadow.route.target == owner { Direction::Reverse } else { Direction::Forward };
        // a copy that was interrupted is started over; everything else goes on from what the follower has stored
        let start = if direction == Direction::Forward { Start::Copy } else { Start::Resume };
        managed.start_feed(shadow, direction, start, &controller.repository);
    }
    Ok(())
}
