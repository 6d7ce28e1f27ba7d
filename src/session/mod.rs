//! Client sessions: accept, start up, relay, and follow the routing snapshot.
//!
//! A connection is met by [`arrival`] (encryption, direct TLS, cancels) and logged in by [`log_in`] (relayed or ended here).
//! The protocol's bookkeeping is pure ([`conversation`]); sockets are moved by [`relay`]; [`serving`] answers a read from a
//! shadow; [`moving`] takes a session to a new owner between two transactions; [`pooled`] borrows a server connection for each
//! transaction.
//!
//! Deliberately absent: every name of the control plane (cdc, schema, metadata, cutover, validate, console, config). A
//! session reads one routing snapshot and writes bounded queues.
//! Invariants: the client's own bytes are forwarded; what is not understood passes through; nothing of a shadow is ever
//! waited for, except an answer that the session has chosen to serve, and that only for a bounded time.

mod arrival;
pub mod conversation;
mod front_door;
mod limits;
mod log_in;
mod lookup;
mod moving;
mod observing;
mod pooled;
mod relay;
mod serving;
mod sockets;
mod start_up;
mod threads;

pub use front_door::FrontDoor;
pub use limits::Limits;
