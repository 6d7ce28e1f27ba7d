//! Cutover and rollback: the owner of the writes changes, clients wait for a moment, nothing is lost.
//!
//! The two are one procedure with the roles exchanged ([`switch`]): the follower becomes the owner and the old owner its
//! follower, through the opposite feed. Its steps are a closed list ([`step::Step`]); each is journaled in the metadata
//! repository before it is taken, and is safe to repeat. Before the step `flip` everything can be undone; after it
//! everything is finished ([`recover`]).
//!
//! Invariants: "caught up" means that a marker was applied; at no moment do both servers take application writes; a failed
//! attempt ends with the gate open and the old owner in charge.
//! Sources: Vitess SwitchTraffic (order of fence, lock and position); gh-ost (a marker in the stream instead of a lag).

pub mod recover;
pub mod step;
pub mod switch;

/// A cutover or rollback did not happen; the old owner is still in charge unless the message says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum CutoverError {
    /// It was refused before anything was touched.
    #[error("{0}")]
    Refused(String),
    /// A step failed and everything was taken back.
    #[error("step {step} failed: {reason}. Everything was taken back: {owner} still owns the writes, and clients go on there")]
    Undone {
        /// Name of the step.
        step: &'static str,
        /// Why.
        reason: String,
        /// Who owns the writes.
        owner: String,
    },
    /// The new owner is in charge, but a later step failed.
    #[error("the cutover happened and {owner} owns the writes, but step {step} failed: {reason}. It is repeated when understudy restarts")]
    Unfinished {
        /// Name of the step.
        step: &'static str,
        /// Why.
        reason: String,
        /// Who owns the writes.
        owner: String,
    },
}
