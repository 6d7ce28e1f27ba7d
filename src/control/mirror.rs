//! Shadows that are fed by mirrored writes: bringing clients to rest for a moment, so that a snapshot of the source and the writes
//! behind it meet exactly, and the same for comparing.

use super::managed::{Managed, ManagedShadow};
use crate::{
    cdc::{AtRest, Boundary, CdcError},
    lsn::Lsn,
    traffic::{gate::Gate, mirror},
    validate,
};
use async_trait::async_trait;
use std::{
    future::Future,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

/// Longest wait for running transactions to end; clients' new ones wait as long. As in a cutover.
const REST_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest time for what is done at rest: clients wait, and a lock or a frozen server would keep them waiting.
const WORK_TIMEOUT: Duration = Duration::from_secs(2);

/// Longest wait for what is recorded to be applied, before a comparison is given up. No client waits.
const APPLY_TIMEOUT: Duration = Duration::from_secs(10);

/// The same for what little is left when clients wait.
const REST_APPLY_TIMEOUT: Duration = Duration::from_secs(1);

/// One shadow and its database.
pub struct Mirrored {
    managed: Arc<Managed>,
    shadow: Arc<ManagedShadow>,
    /// What is recorded is not applied before the copy is there.
    waits: std::sync::Mutex<Option<mirror::Pause>>,
}

/// Opens the gate, whatever happens.
struct Opened<'a>(&'a Gate);

impl Drop for Opened<'_> {
    fn drop(&mut self) {
        self.0.open();
    }
}

impl Mirrored {
    pub fn new(managed: Arc<Managed>, shadow: Arc<ManagedShadow>) -> Self {
        Mirrored { managed, shadow, waits: std::sync::Mutex::default() }
    }

    /// For a copy: what is recorded waits until it is there.
    pub fn waiting(self) -> Self {
        *self.waits.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(mirror::pause(&self.shadow.route));
        self
    }

    /// Does something while no transaction of a client is open; new ones wait meanwhile.
    async fn while_at_rest<T>(&self, work: impl Future<Output = Result<T, String>>) -> Result<T, String> {
        let name = &self.managed.database.name;
        let _turn = self.managed.switching.try_lock().map_err(|_| format!("a cutover of {name} is running"))?;
        if self.managed.paused.load(Ordering::SeqCst) {
            return Err(format!("{name} is paused: RESUME {name} first"));
        }
        // This gate does not stop them, and what they write is mirrored by their process.
        if let Some(predecessor) = self.managed.predecessor.get()
            && let Some(left) = predecessor.sessions().await
        {
            return Err(format!(
                "the process that this one has taken over from still serves {left} sessions: wait for their end, or end that process"
            ));
        }
        let gate = &self.managed.database.gate;
        gate.close();
        let _open = Opened(gate);
        if tokio::time::timeout(REST_TIMEOUT, gate.drained()).await.is_err() {
            let open = gate.active();
            return Err(format!("{open} transactions were still open after {} s (SHOW CLIENTS): try again", REST_TIMEOUT.as_secs()));
        }
        tokio::time::timeout(WORK_TIMEOUT, work).await.unwrap_or_else(|_| {
            Err(format!(
                "a server did not answer within {} s, and clients do not wait longer: look for locks (pg_stat_activity), and try again",
                WORK_TIMEOUT.as_secs()
            ))
        })
    }
}

#[async_trait]
impl Boundary for Mirrored {
    async fn at_rest(&self, take: AtRest<'_>) -> Result<(), CdcError> {
        // Whether it may be tried again is known of what failed; a person decides when clients shall wait once more.
        let work = async {
            let taken = take.await;
            if taken.is_ok() {
                self.shadow.route.mirror.record_anew();
            }
            Ok(taken)
        };
        self.while_at_rest(work).await.map_err(|reason| CdcError::Setup(format!("the copy's snapshot was not taken: {reason}")))?
    }

    fn resume(&self) {
        self.shadow.route.mirror.record(true);
    }

    fn abandon(&self) {
        self.shadow.route.mirror.abandon();
    }

    async fn idle(&self) -> Result<(), CdcError> {
        if self.shadow.route.mirror.at_rest(APPLY_TIMEOUT).await {
            return Ok(());
        }
        Err(CdcError::Timeout { what: "the end of the mirrored transaction that still runs on the shadow".into(), after: APPLY_TIMEOUT })
    }

    fn ready(&self) {
        self.waits.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
    }
}

/// The mirror as the validator sees it.
pub struct MirrorFollower(pub Mirrored);

#[async_trait]
impl validate::Follower for MirrorFollower {
    type Hold = mirror::Pause;

    fn hold(&self) -> Self::Hold {
        mirror::pause(&self.0.shadow.route)
    }

    async fn advance(&self, _: &Self::Hold, _: Lsn, _: Duration) -> Result<(), String> {
        Err("a shadow that is fed by mirrored writes knows no positions".into())
    }

    fn has_positions(&self) -> bool {
        false
    }

    async fn at_rest(&self, take: validate::AtRest<'_>) -> Result<Self::Hold, String> {
        let mirror = &self.0.shadow.route.mirror;
        // First what has piled up, so that clients wait only for the rest.
        let drained = async |timeout| match mirror.drained(timeout).await {
            true => Ok(()),
            false => Err(format!("{} mirrored transactions still wait: try again when there are fewer", mirror.waiting())),
        };
        drained(APPLY_TIMEOUT).await?;
        self.0
            .while_at_rest(async {
                drained(REST_APPLY_TIMEOUT).await?;
                let hold = self.hold();
                take.await.map_err(|error| error.to_string())?;
                Ok(hold)
            })
            .await
    }
}
