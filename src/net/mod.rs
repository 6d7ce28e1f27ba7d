//! Byte streams of both sides: TCP, Unix sockets, and TLS over either, behind one readiness interface; the sockets that clients come
//! to, and who they are as the operating system knows it.
//!
//! Deliberately absent: the PostgreSQL protocol (who asks for TLS, and when, is `session` and `backend`), name resolution.
//! Invariants: the plain path costs one `match`; a TLS session is boxed, so that an idle plain client stays small; a write
//! counts as done only when its records have been handed to the socket, so that callers need no rule of their own for TLS.
//! Sources: rustls' manual, `Connection::read_tls` and `write_tls`; RFC 5929 for the channel binding.

mod acceptor;
pub mod certificate;
mod connector;
mod files;
mod listener;
mod stream;
mod tcp;
mod tls;
mod unix;

pub use crate::config::TcpConfig;
pub use acceptor::{Acceptor, ClientTls};
pub use connector::{connect as connect_tls, server_end_point};
pub use files::{TlsError, changed_at};
pub use listener::{Listener, Peer};
pub use stream::Stream;
pub use tcp::tune;
pub use tls::Tls;
pub use unix::{SocketFile, UnixError, bind as bind_unix, socket_path};
