//! Connections that the proxy itself opens to PostgreSQL servers: connect, log in (trust, password, md5, SCRAM-SHA-256),
//! send raw messages, read raw messages.
//!
//! Deliberately absent: pooling policy and routing (that is `session` and `traffic`), SQL of the control plane (tokio-postgres).
//! Source: PostgreSQL documentation, "Message Flow: Start-up", "SASL Authentication".

mod connection;

pub use connection::{BackendError, Connection, cancel, connect};
