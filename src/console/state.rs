//! The state of the whole process as one document: `GET /api/state`, the dashboard, and what scripts read.

use crate::{
    lsn::Lsn,
    metadata::{Event, ProposalState},
    monitor::{LatencySummary, ResourceSample},
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Everything.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct State {
    /// Version of the program.
    pub version: String,
    /// Seconds since the process started.
    pub uptime_s: f64,
    /// One per `[[database]]`.
    pub databases: Vec<DatabaseState>,
    /// Newest last, bounded.
    pub proposals: Vec<ProposalView>,
    /// Newest last, bounded.
    pub events: Vec<Event>,
}

/// A proposal, for the page and for scripts.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProposalView {
    /// Named in APPROVE.
    pub id: i64,
    /// Database.
    pub database: String,
    /// Shadow.
    pub shadow: String,
    /// Table or other object.
    pub object: String,
    /// Kind of change.
    pub kind: String,
    /// For people.
    pub change: String,
    /// Suggested statements.
    pub sql: Vec<String>,
    /// 0 to 1.
    pub confidence: f64,
    /// Why.
    pub why: String,
    /// Destroys data.
    pub loses_data: bool,
    /// What becomes of the rows when it is rejected, or nothing is done.
    #[serde(default)]
    pub if_rejected: String,
    /// Where it stands.
    pub state: ProposalState,
    /// Who decided.
    pub decided_by: String,
    /// Milliseconds since 1970; 0: undecided.
    #[serde(default)]
    pub decided_ms: i64,
    /// Why it failed.
    pub note: String,
}

/// One database.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct DatabaseState {
    /// Name clients ask for.
    pub name: String,
    /// `source` or a shadow's name.
    pub owner: String,
    /// Grows with each change of owner.
    pub epoch: i64,
    /// Paused by an operator or held by a cutover.
    pub held: bool,
    /// Client connections.
    pub clients: u64,
    /// Finished request cycles since start.
    pub requests: u64,
    /// Finished transactions since start.
    pub transactions: u64,
    /// Errors that servers sent to clients since start.
    pub errors: u64,
    /// Where the source is, without the password.
    pub source_url: String,
    /// Latency of the owner's answers to clients.
    pub latency: LatencySummary,
    /// What the source's server was doing at the newest sample, at most a few seconds ago; `None`: not known.
    #[serde(default)]
    pub resources: Option<ResourceSample>,
    /// One per `[[database.shadow]]`.
    pub shadows: Vec<ShadowState>,
    /// The newest cutover or rollback, if any.
    pub cutover: Option<CutoverState>,
}

/// One shadow.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ShadowState {
    /// Name.
    pub name: String,
    /// Where it is, without the password.
    pub url: String,
    /// Percent.
    pub sample_reads: f64,
    /// Percent.
    pub serve_reads: f64,
    /// What its server was doing at the newest sample, at most a few seconds ago; `None`: not known.
    #[serde(default)]
    pub resources: Option<ResourceSample>,
    /// `off` or `rehearse`
    pub mirror_writes: String,
    /// `healthy`, or why not.
    pub health: String,
    /// The feed towards the follower (after a cutover: the reverse feed).
    pub feed: FeedState,
    /// The shift ladder: `idle`, `step 2 of 5 (5 %), 12 s left`, `done`, `reverted`.
    pub shift: String,
    /// Source side of the paired executions.
    pub source_latency: LatencySummary,
    /// Shadow side of the paired executions (sampled and served reads, rehearsed statements).
    pub shadow_latency: LatencySummary,
    /// Sampled reads.
    pub compare: CompareState,
    /// Mirrored writes.
    pub rehearsal: RehearsalState,
    /// Reads answered by the shadow.
    pub served: ServedState,
    /// The newest revert, if any.
    pub revert: Option<RevertState>,
    /// The costliest fingerprints, by total time.
    pub queries: Vec<QueryState>,
}

/// The feed.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct FeedState {
    /// `none`, `starting`, `copying`, `catching up`, `streaming`, `held`, `retrying: …`, `failed: …`, `stopped`
    pub state: String,
    /// `forward` or `reverse`
    pub direction: String,
    /// Applied position.
    pub applied_lsn: Lsn,
    /// Newest position that the server reported.
    pub received_lsn: Lsn,
    /// Row changes applied since start.
    pub changes: u64,
    /// Transactions applied since start.
    pub transactions: u64,
    /// Milliseconds from commit on the owner to commit on the follower.
    pub lag_ms: LagState,
    /// Copy, while and after it ran.
    pub copy: CopyState,
    /// Tables whose rows are spooled because a proposal waits.
    pub held_tables: Vec<String>,
    /// Rows that were missing or already there when a change was applied.
    pub findings: u64,
    /// Newest findings, as `table (key): what`, bounded.
    pub finding_examples: Vec<String>,
}

/// Lag over the recent past, and now.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct LagState {
    /// Age of the oldest change not yet applied; 0 when caught up.
    pub now: f64,
    /// Median since the copy ended.
    pub p50: f64,
    /// 99th percentile since the copy ended.
    pub p99: f64,
    /// Longest since the copy ended.
    pub max: f64,
}

/// The snapshot copy.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct CopyState {
    /// Tables copied / all.
    pub tables_done: u64,
    /// All tables.
    pub tables: u64,
    /// Rows so far.
    pub rows: u64,
    /// Rows expected, from statistics.
    pub rows_estimated: u64,
    /// Bytes of COPY data so far.
    pub bytes: u64,
    /// Seconds from the snapshot to the end, or so far.
    pub seconds: f64,
    /// Estimated seconds left; `None`: unknown or done.
    pub seconds_left: Option<f64>,
    /// The copy has ended.
    pub done: bool,
}

/// Comparison of sampled reads.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct CompareState {
    /// Reads copied for the shadow.
    pub sampled: u64,
    /// Answers equal.
    pub same: u64,
    /// Answers different at one LSN.
    pub different: u64,
    /// Neither could be said.
    pub undecided: u64,
    /// Copies dropped because a queue or the byte budget was full.
    pub dropped: u64,
    /// Reads that failed on the shadow only.
    pub errors: u64,
    /// Why undecided, dropped or different: reason → number.
    pub reasons: BTreeMap<String, u64>,
    /// Newest differences, for people; no row values.
    pub examples: Vec<String>,
}

/// Rehearsed write transactions.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct RehearsalState {
    /// Run and rolled back.
    pub transactions: u64,
    /// Statements that failed on the shadow only.
    pub errors: u64,
    /// Command tags or row counts that differ.
    pub tag_mismatches: u64,
    /// Neither could be said (the feed was faster, a lock was busy): reason → number.
    pub undecided: BTreeMap<String, u64>,
    /// Left out: reason → number.
    pub left_out: BTreeMap<String, u64>,
    /// Newest errors and mismatches, for people; no values.
    pub examples: Vec<String>,
}

/// Served reads.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ServedState {
    /// Answered by the shadow.
    pub reads: u64,
    /// Failed there before the first byte had gone out, and run again on the owner.
    pub fallbacks: u64,
    /// Kept on the owner by the read-your-writes fence.
    pub fenced: u64,
    /// Reads that could have been served, whatever answered them.
    pub candidates: u64,
}

/// Why and how fast serving stopped.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct RevertState {
    /// Milliseconds since 1970.
    pub at_ms: i64,
    /// With figures.
    pub reason: String,
    /// From the first bad observation of the window to serving stopped.
    pub reaction_ms: f64,
    /// Reverts since start.
    pub count: u64,
}

/// Latency of one fingerprint.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct QueryState {
    /// Fingerprint, 16 hexadecimal digits.
    pub fingerprint: String,
    /// Normalised text, literals replaced, bounded.
    pub text: String,
    /// Source side.
    pub source: LatencySummary,
    /// Shadow side.
    pub shadow: LatencySummary,
}

/// The newest cutover or rollback.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct CutoverState {
    /// `cutover` or `rollback`
    pub kind: String,
    /// `running: <step>`, `done`, `undone: <reason>`
    pub state: String,
    /// From which to which.
    pub from: String,
    /// To which.
    pub to: String,
    /// Longest time that a client's statement waited, in milliseconds: hold to release.
    pub pause_ms: f64,
    /// Journal steps with milliseconds since the run began.
    pub steps: Vec<(String, f64)>,
}
