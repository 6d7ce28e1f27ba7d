//! One database and its shadows as the control plane holds them.

use super::{health::ServerHealth, mirror::Mirrored, profile::Measured};
use crate::{
    cdc::{Direction, Fault, Feed, FeedSpec, Start},
    config::{DatabaseConfig, FeedKind, MirrorWrites, SchemaSource, ShadowConfig},
    console::state::{CutoverState, RevertState},
    lsn::Lsn,
    metadata::{Owner, Repository},
    schema::{
        Adapter,
        mapping::{Rules, SharedRules},
    },
    sql::{CatalogFacts, Classifier, Names},
    traffic::{
        comparator,
        copies::{ByteBudget, CopyQueue},
        database::Database,
        fence::{Fence, Tick},
        ladder::Ladder,
        mirror::{self, Mirror},
        observations::Observations,
        rehearsal::Freshness,
        route::{Breaker, Percent, Route, Serving, ShadowRoute, Target},
    },
};
use arc_swap::ArcSwap;
use std::{
    sync::{Arc, Mutex, MutexGuard, OnceLock, atomic::AtomicBool},
    time::Instant,
};
use tokio::sync::watch;

/// Workers per shadow that compare and rehearse: two keep a small shadow busy without starving its feed.
const COPY_WORKERS: usize = 4;

/// A database.
pub struct Managed {
    /// As loaded last.
    pub config: ArcSwap<DatabaseConfig>,
    /// As sessions see it.
    pub database: Arc<Database>,
    /// In file order.
    pub shadows: Vec<Arc<ManagedShadow>>,
    /// The newest one.
    pub tick: watch::Sender<Tick>,
    /// The newest cutover or rollback.
    pub cutover: Mutex<Option<CutoverState>>,
    /// A cutover or rollback is running: one at a time.
    pub switching: tokio::sync::Mutex<()>,
    /// Held by PAUSE.
    pub paused: AtomicBool,
    /// The process that may still serve sessions of it.
    pub(super) predecessor: OnceLock<super::takeover::Predecessor>,
    /// What is known of the source's server.
    pub health: Arc<Mutex<ServerHealth>>,
}

/// A shadow.
pub struct ManagedShadow {
    /// As loaded last, with what SET changed.
    pub config: ArcSwap<ShadowConfig>,
    /// As sessions see it.
    pub route: Arc<ShadowRoute>,
    /// The feed, while there is one, and which way it flows.
    pub feed: Mutex<Option<(Feed, Direction)>>,
    /// Where it stands on its ladder.
    pub ladder: Mutex<Ladder>,
    /// Reads served when the present step of the ladder began.
    pub served_before_step: std::sync::atomic::AtomicU64,
    /// The newest revert.
    pub reverted: Mutex<Option<RevertState>>,
    /// Confidence from which proposals need no person.
    pub auto_approve: Arc<ArcSwap<f64>>,
    /// How its schema differs from the source's.
    pub rules: SharedRules,
    /// Faults for tests.
    pub fault: Fault,
    /// The adaptation engine of the running feed.
    pub adapter: Mutex<Option<Arc<Adapter>>>,
    /// A simulation or verification is running.
    pub busy: tokio::sync::Mutex<()>,
    /// What is known of its server.
    pub health: Arc<Mutex<ServerHealth>>,
    /// Points of its load curve, forecasts, findings.
    pub measured: Measured,
}

/// Locks a mutex whose holder may have panicked: the values in here are whole at every moment.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

struct FeedFreshness(Feed);

impl Freshness for FeedFreshness {
    fn changed_since(&self, table: &str, position: Lsn) -> bool {
        match table.split_once('.') {
            Some((schema, table)) => self.0.table_changed_since(schema, table, position),
            None => self.0.table_name_changed_since(table, position),
        }
    }

    fn sets_aside(&self, tables: &[String], only: bool) -> bool {
        self.0.sets_aside(tables, only)
    }
}

impl Managed {
    /// Builds a database from its configuration and the stored ownership.
    pub fn new(config: &DatabaseConfig, facts: CatalogFacts, owner: &Owner, epoch: i64, budget: &Arc<ByteBudget>) -> Arc<Self> {
        let source = Arc::new(Target { name: "source".into(), url: config.source.clone() });
        let mut queues = Vec::new();
        let shadows: Vec<_> = config
            .shadows
            .iter()
            .map(|shadow| {
                let (queue, ends) = CopyQueue::new(COPY_WORKERS, budget.clone());
                queues.push(ends);
                Arc::new(ManagedShadow::new(shadow, queue, budget))
            })
            .collect();
        let owner_target = match owner {
            Owner::Source => source,
            Owner::Shadow(name) => {
                shadows.iter().find(|shadow| shadow.name() == *name).map_or(source, |shadow| shadow.route.target.clone())
            }
        };
        let route = Route {
            epoch,
            shadows: shadows.iter().filter(|shadow| shadow.route.target != owner_target).map(|shadow| shadow.route.clone()).collect(),
            owner: owner_target,
            standby: None,
        };
        let database = Arc::new(Database::new(config.name.clone(), route, Classifier::new(facts), config.users.clone()));
        database.pool.store(Arc::new(config.pool.clone()));
        for (shadow, ends) in shadows.iter().zip(queues) {
            for end in ends {
                tokio::spawn(comparator::work(database.clone(), shadow.route.clone(), end));
            }
        }
        for shadow in shadows.iter().filter(|shadow| shadow.config.load().feed == FeedKind::Mirror) {
            tokio::spawn(mirror::apply(database.clone(), shadow.route.clone()));
        }
        Arc::new(Managed {
            config: ArcSwap::from_pointee(config.clone()),
            database,
            shadows,
            tick: watch::Sender::new(Tick { number: 0, position: Lsn::ZERO, epoch, started_ms: 0 }),
            cutover: Mutex::new(None),
            switching: tokio::sync::Mutex::new(()),
            paused: AtomicBool::new(false),
            predecessor: OnceLock::new(),
            health: Arc::default(),
        })
    }

    /// A feed of this direction brings a shadow what clients write now. While another shadow owns the writes, the feeds from
    /// the source are quiet, and quiet must not look like being in step.
    pub fn feeds_from_owner(&self, direction: Direction) -> bool {
        direction == Direction::Forward && self.database.route.load().owner.name == "source"
    }

    /// The configured source as a target.
    pub fn source(&self) -> Arc<Target> {
        Arc::new(Target { name: "source".into(), url: self.config.load().source.clone() })
    }

    /// Publishes a route with another owner or standby; shadows that are the owner get no copies.
    pub fn route_to(&self, owner: Arc<Target>, epoch: i64, standby: Option<Arc<Target>>) {
        let shadows = self.shadows.iter().filter(|shadow| shadow.route.target != owner).map(|shadow| shadow.route.clone()).collect();
        self.database.swap_route(Route { epoch, owner, standby, shadows });
    }

    /// The source and the shadows, by name.
    pub fn servers(&self) -> Vec<(String, crate::config::ServerUrl)> {
        let shadows = self.shadows.iter().map(|shadow| (shadow.name(), shadow.config.load().url.clone()));
        std::iter::once(("source".to_owned(), self.config.load().source.clone())).chain(shadows).collect()
    }

    /// The feed between source and this shadow in one direction.
    pub fn feed_spec(&self, shadow: &ManagedShadow, direction: Direction) -> FeedSpec {
        let config = shadow.config.load();
        let (source, shadow_url) = (self.config.load().source.clone(), config.url.clone());
        let (from, to) = match direction {
            Direction::Forward => (source, shadow_url),
            Direction::Reverse => (shadow_url, source),
        };
        FeedSpec {
            database: self.database.name.clone(),
            shadow: config.name.clone(),
            direction,
            from,
            to,
            copy: config.copy.clone(),
            rules: shadow.rules.clone(),
        }
    }

    /// Starts a feed that lives by mirrored writes. `again`: it was started before, and clients' writes belong to it from now on; if it
    /// turns out to have no finished copy, they are forgotten.
    pub fn start_mirror(self: &Arc<Self>, shadow: &Arc<ManagedShadow>, repository: &Repository, again: bool) {
        let adapter = Arc::new(Adapter::new(self.database.name.clone(), shadow.name(), repository.clone(), shadow.auto_approve.clone()));
        let boundary = Arc::new(Mirrored::new(self.clone(), shadow.clone()).waiting());
        if again {
            shadow.route.mirror.record(true);
        }
        let feed = Feed::start_mirrored(self.feed_spec(shadow, Direction::Forward), boundary, adapter.clone(), repository.clone());
        *lock(&shadow.adapter) = Some(adapter);
        *lock(&shadow.feed) = Some((feed, Direction::Forward));
    }

    /// Starts a feed and makes the shadow follow it.
    pub fn start_feed(&self, shadow: &ManagedShadow, direction: Direction, start: Start, repository: &Repository) -> Feed {
        let adapter = Adapter::new(self.database.name.clone(), shadow.name(), repository.clone(), shadow.auto_approve.clone())
            .mapped(shadow.rules.clone(), direction == Direction::Reverse);
        let adapter = Arc::new(if direction == Direction::Reverse { adapter.reversed() } else { adapter });
        let feed = Feed::start(self.feed_spec(shadow, direction), start, adapter.clone(), repository.clone(), shadow.fault.clone());
        shadow.route.freshness.store(Some(Arc::new(Box::new(FeedFreshness(feed.clone())))));
        *lock(&shadow.adapter) = Some(adapter);
        *lock(&shadow.feed) = Some((feed.clone(), direction));
        feed
    }
}

impl ManagedShadow {
    fn new(config: &ShadowConfig, queue: CopyQueue, budget: &Arc<ByteBudget>) -> Self {
        let route = ShadowRoute {
            target: Arc::new(Target { name: config.name.clone(), url: config.url.clone() }),
            sample_reads: Percent::new(config.sample_reads),
            serve_reads: Percent::new(config.serve_reads),
            rehearse: AtomicBool::new(config.mirror_writes == MirrorWrites::Rehearse && config.feed == FeedKind::Cdc),
            in_step: AtomicBool::new(false),
            fence: Fence::default(),
            freshness: arc_swap::ArcSwapOption::empty(),
            names: arc_swap::ArcSwapOption::new((config.schema == SchemaSource::Existing).then(|| Arc::new(Names::unknown()))),
            mirror: Mirror::new(budget.clone()),
            queue,
            quota: crate::traffic::quota::Quota::default(),
            sample_per_query: std::sync::atomic::AtomicU32::new(config.sample_per_query),
            ignore: ArcSwap::from_pointee(config.ignore.clone()),
            observations: Observations::new(config.revert.window),
            breaker: Breaker::default(),
            copy_breaker: Breaker::default(),
            serving: ArcSwap::from_pointee(Serving { hedge_after: config.hedge_after, consistency: config.consistency }),
            first: arc_swap::ArcSwapOption::empty(),
        };
        ManagedShadow {
            route: Arc::new(route),
            feed: Mutex::new(None),
            ladder: Mutex::new(Ladder::Idle),
            served_before_step: std::sync::atomic::AtomicU64::new(0),
            reverted: Mutex::new(None),
            auto_approve: Arc::new(ArcSwap::from_pointee(config.adapt.auto_approve)),
            rules: Rules::new(config.schema == SchemaSource::Existing, &config.map).filling(&config.fill).shared(),
            fault: Fault::default(),
            adapter: Mutex::new(None),
            busy: tokio::sync::Mutex::new(()),
            health: Arc::default(),
            measured: Measured::default(),
            config: ArcSwap::from_pointee(config.clone()),
        }
    }

    /// Name.
    pub fn name(&self) -> String {
        self.config.load().name.clone()
    }

    /// The running feed.
    pub fn feed(&self) -> Option<(Feed, Direction)> {
        lock(&self.feed).clone()
    }

    /// Stops serving and climbing, together: the ladder sets its percentages under the same lock.
    pub fn stop_serving(&self) {
        let mut ladder = lock(&self.ladder);
        *ladder = Ladder::Idle;
        self.route.serve_reads.set(0.0);
        self.route.first.store(None);
    }

    /// Stops serving at once and remembers why. Needs nothing but memory.
    pub fn revert(&self, reason: &str, first_bad: Option<Instant>) -> RevertState {
        self.route.serve_reads.set(0.0);
        let now = Instant::now();
        {
            let mut ladder = lock(&self.ladder);
            if matches!(*ladder, Ladder::Step { .. } | Ladder::Done) {
                *ladder = Ladder::Reverted;
            }
            self.route.serve_reads.set(0.0); // once more: a step may have been taken while we waited for the lock
        }
        let mut reverted = lock(&self.reverted);
        let state = RevertState {
            at_ms: std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_millis() as i64),
            reason: reason.to_owned(),
            reaction_ms: first_bad.map_or(0.0, |since| now.saturating_duration_since(since).as_secs_f64() * 1000.0),
            count: reverted.as_ref().map_or(0, |earlier| earlier.count) + 1,
        };
        *reverted = Some(state.clone());
        self.route.observations.forget(self.config.load().revert.window);
        state
    }
}
