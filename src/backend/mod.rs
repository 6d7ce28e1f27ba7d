//! Connections that the proxy itself opens to PostgreSQL servers: reach them (TCP, Unix, TLS by libpq's `sslmode`), log in
//! (trust, password, md5, SCRAM with and without channel binding, by password or by keys), send raw messages, read raw
//! messages; and the one place where tokio-postgres clients of the control plane are made.
//!
//! Deliberately absent: pooling policy and routing (that is `session` and `traffic`), SQL of the control plane.
//! Source: PostgreSQL documentation, "Message Flow: Start-up", "SASL Authentication", "SSL Session Encryption".

mod connection;
mod control;
mod error;
mod log_in;
mod reach;

pub use connection::Connection;
pub use control::{ControlError, control};
pub use error::BackendError;
pub use log_in::scram_by_keys;
pub use reach::{Encryption, attempts, cancel, connect, connect_as, is_about_encryption};

use std::time::Duration;

/// Longest time to reach a server and log in.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
