//! Byte streams of both sides: TCP, Unix sockets, and TLS over either, behind one readiness interface.
//!
//! Deliberately absent: the PostgreSQL protocol (who asks for TLS, and when, is `session` and `backend`), name resolution.
//! Invariants: the plain path costs one `match`; a TLS session is boxed, so that an idle plain client stays small; a write
//! counts as done only when its records have been handed to the socket, so that callers need no rule of their own for TLS.
//! Sources: rustls' manual, `Connection::read_tls` and `write_tls`; RFC 5929 for the channel binding.

mod acceptor;
pub mod certificate;
mod connector;
mod files;
mod stream;
mod tcp;
mod tls;

pub use crate::config::TcpConfig;
pub use acceptor::{Acceptor, ClientTls};
pub use connector::{connect as connect_tls, server_end_point};
pub use files::{TlsError, changed_at};
pub use stream::Stream;
pub use tcp::tune;
pub use tls::Tls;
