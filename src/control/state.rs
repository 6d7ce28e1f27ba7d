//! The whole state as one document.

use super::{
    Controller,
    managed::{Managed, ManagedShadow, lock},
};
use crate::{
    cdc::Direction,
    config::FeedKind,
    console::state::{CompareState, DatabaseState, FeedState, ProposalView, RehearsalState, ServedState, ShadowState, State},
    traffic::database::monotonic_ms,
};
use std::{sync::atomic::Ordering, time::Instant};

/// Newest proposals and events shown.
const RECENT_MAX: usize = 200;
/// Fingerprints shown per shadow.
const QUERIES_MAX: usize = 20;

impl Controller {
    pub(super) fn state(&self) -> State {
        let proposals = self.repository.proposals(None).unwrap_or_default();
        let skip = proposals.len().saturating_sub(RECENT_MAX);
        let proposals = proposals.into_iter().skip(skip).map(|proposal| ProposalView {
            id: proposal.id,
            database: proposal.database,
            shadow: proposal.shadow,
            object: proposal.draft.object,
            kind: proposal.draft.kind,
            change: proposal.draft.change,
            sql: proposal.draft.sql,
            confidence: proposal.draft.confidence,
            why: proposal.draft.why,
            loses_data: proposal.draft.loses_data,
            state: proposal.state,
            decided_by: proposal.decided_by,
            note: proposal.note,
        });
        State {
            version: env!("CARGO_PKG_VERSION").into(),
            uptime_s: self.started.elapsed().as_secs_f64(),
            databases: self.databases.iter().map(|managed| database_state(managed)).collect(),
            proposals: proposals.collect(),
            events: self.repository.events(0, RECENT_MAX, false).unwrap_or_default(),
        }
    }
}

pub(super) fn database_state(managed: &Managed) -> DatabaseState {
    let database = &managed.database;
    let route = database.route.load();
    DatabaseState {
        name: database.name.clone(),
        owner: route.owner.name.clone(),
        epoch: route.epoch,
        held: database.gate.is_closed(),
        clients: database.clients(),
        requests: database.requests.get(),
        transactions: database.transactions.get(),
        errors: database.errors.get(),
        source_url: managed.config.load().source.to_string(),
        latency: database.latency.summary(),
        resources: lock(&managed.health).resources.clone(),
        shadows: managed.shadows.iter().map(|shadow| shadow_state(managed, shadow)).collect(),
        cutover: lock(&managed.cutover).clone(),
    }
}

fn shadow_state(managed: &Managed, shadow: &ManagedShadow) -> ShadowState {
    let (config, route) = (shadow.config.load(), &shadow.route);
    let seen = &route.observations;
    let owner = managed.database.route.load().owner == route.target;
    let health = if owner {
        "owner".to_owned()
    } else if !route.in_step.load(Ordering::SeqCst) {
        "not in step".to_owned()
    } else if !route.breaker.allows(monotonic_ms()) {
        "failing: its reads are kept on the owner".to_owned()
    } else {
        "healthy".to_owned()
    };
    ShadowState {
        name: config.name.clone(),
        url: config.url.to_string(),
        sample_reads: route.sample_reads.get(),
        serve_reads: route.serve_reads.get(),
        resources: lock(&shadow.health).resources.clone(),
        mirror_writes: if config.feed == FeedKind::Mirror {
            "apply".into()
        } else if route.rehearse.load(Ordering::SeqCst) {
            "rehearse".into()
        } else {
            "off".into()
        },
        health,
        feed: feed_state(shadow),
        shift: lock(&shadow.ladder).describe(&config.shift, Instant::now()),
        source_latency: seen.owner_latency.summary(),
        shadow_latency: seen.shadow_latency.summary(),
        compare: CompareState {
            sampled: seen.sampled.get(),
            same: seen.same.get(),
            different: seen.different.get(),
            undecided: seen.undecided.get(),
            dropped: seen.dropped.get(),
            errors: seen.compare_errors.get(),
            reasons: seen.compare_reasons.counts(),
            examples: seen.compare_reasons.examples(),
        },
        rehearsal: RehearsalState {
            transactions: seen.rehearsed.get(),
            errors: seen.rehearsal_errors.get(),
            tag_mismatches: seen.tag_mismatches.get(),
            undecided: seen.rehearsal_reasons.counts(),
            left_out: seen.left_out.counts(),
            examples: seen.rehearsal_reasons.examples(),
        },
        served: ServedState {
            reads: seen.served.get(),
            fallbacks: seen.fallbacks.get(),
            fenced: seen.fenced.get(),
            candidates: seen.candidates.get(),
        },
        revert: lock(&shadow.reverted).clone(),
        queries: seen.profile.top(QUERIES_MAX),
    }
}

pub(super) fn feed_state(shadow: &ManagedShadow) -> FeedState {
    match shadow.feed() {
        None => FeedState { state: "none".into(), ..FeedState::default() },
        Some((feed, _)) if shadow.config.load().feed == FeedKind::Mirror => mirror_state(shadow, feed.state()),
        Some((feed, direction)) => FeedState {
            direction: match direction {
                Direction::Forward => "forward".into(),
                Direction::Reverse => "reverse".into(),
            },
            ..feed.state()
        },
    }
}

/// A feed of mirrored writes: what has diverged takes the place of findings.
fn mirror_state(shadow: &ManagedShadow, state: FeedState) -> FeedState {
    let mirror = &shadow.route.mirror;
    let diverged = mirror.diverged.get();
    let mut shown = FeedState {
        direction: "mirror".into(),
        transactions: mirror.applied.get(),
        findings: diverged,
        finding_examples: mirror.reasons.counts().into_iter().map(|(reason, number)| format!("{number} x {reason}")).collect(),
        ..state
    };
    shown.lag_ms.now = mirror.lag().as_secs_f64() * 1000.0;
    if shown.state == "mirroring" {
        shown.state = format!(
            "mirroring: {} transactions applied, {} wait, {diverged} diverged{}",
            mirror.applied.get(),
            mirror.waiting(),
            if diverged > 0 { " (VERIFY … REPAIR puts rows right)" } else { "" }
        );
    }
    shown
}
