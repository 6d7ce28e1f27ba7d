//! The control plane: holds the feeds, writes the routing snapshots, carries out the operators' commands, judges health.
//!
//! DESIGN.md draws no room for what joins the components; this is it. Every task here is owned by the [`Controller`] and
//! ends with it. Deliberately absent: bytes of clients. The data plane goes on serving when anything in here fails.

mod ahead;
mod climb;
mod commands;
mod explain;
mod feeds;
mod health;
mod managed;
mod mapping;
mod metrics;
mod mirror;
mod operator;
mod profile;
mod readiness;
mod reload;
mod report_page;
mod shift;
mod show;
mod show_profile;
mod show_servers;
mod simulate;
mod start;
mod state;
mod takeover;
mod watch;
mod what_if;

pub use health::ServerHealth;
pub use managed::{Managed, ManagedShadow};
pub use start::{StartError, run};

use crate::{config::Config, metadata::Repository, session::FrontDoor, traffic::copies::ByteBudget};
use arc_swap::ArcSwap;
use std::{
    path::PathBuf,
    sync::{Arc, Mutex, atomic::AtomicBool},
    time::Instant,
};
use tokio::sync::Notify;

/// The running process.
pub struct Controller {
    /// As loaded last.
    pub config: ArcSwap<Config>,
    /// Where it was loaded from.
    pub config_path: PathBuf,
    /// What survives the process.
    pub repository: Repository,
    /// One per `[[database]]`.
    pub databases: Vec<Arc<Managed>>,
    /// The listener's side.
    pub door: Arc<FrontDoor>,
    /// Memory of shadow work.
    pub budget: Arc<ByteBudget>,
    /// When the process started.
    pub started: Instant,
    /// SHUTDOWN was asked for.
    pub shutdown: Notify,
    /// The command `FAULT LOSE CHANGE` is allowed (environment variable `UNDERSTUDY_FAULT=lose-change`, for tests).
    pub faults_allowed: bool,
    /// Another process has taken over: this one only serves the sessions it has.
    pub handed_over: AtomicBool,
    /// The sockets that this process listens on; `None` once it shuts down.
    listeners: Mutex<Option<takeover::Listeners>>,
    /// The tasks that accept on them.
    accepting: Mutex<Option<start::Accepting>>,
    /// The process that this one has taken over from.
    predecessor: Option<takeover::Predecessor>,
    /// The cutover step at which the process dies (`UNDERSTUDY_FAULT=crash-at:<step>`, for tests).
    pub crash_at: Option<String>,
}

impl std::fmt::Debug for Controller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Controller").field("config_path", &self.config_path).finish_non_exhaustive()
    }
}
