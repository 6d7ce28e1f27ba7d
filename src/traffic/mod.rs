//! The Traffic Manager: where each statement goes, what is copied for the shadows, what the copies prove, and when
//! serving grows, stops or goes back.
//!
//! Two halves. The hot half ([`route`], [`gate`], [`fence`], [`copies`], [`quota`], [`answer`]) is called by sessions: it reads one
//! immutable [`route::Route`] and writes bounded queues. The cold half ([`comparator`], [`rows`], [`rehearsal`], [`mirror`], [`judge`],
//! [`ladder`]) works on the copies in tasks of its own.
//!
//! Deliberately absent: sockets of clients (that is `session`), SQL grammar (that is `sql`), any wait of a client for a
//! shadow's sake. Invariants: every queue is bounded and counts what it drops; no lock is held across an await.

pub mod again;
pub mod answer;
pub mod cancelling;
pub mod comparator;
mod confirming;
pub mod copies;
pub mod database;
pub mod fence;
pub mod gate;
pub mod judge;
pub mod ladder;
pub mod mirror;
pub mod observations;
pub mod pulse;
pub mod quota;
pub mod rehearsal;
pub mod route;
pub mod rows;
mod runner;
