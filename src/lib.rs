//! understudy: a PostgreSQL wire-protocol proxy that makes changing the database behind it safe.
//!
//! The rooms and how they may depend on each other are described in ARCHITECTURE.md.

pub mod auth;
pub mod backend;
pub mod cdc;
pub mod check;
pub mod cli;
pub mod config;
pub mod console;
pub mod control;
pub mod cutover;
pub mod demo;
pub mod lsn;
pub mod metadata;
pub mod monitor;
pub mod net;
pub mod pool;
pub mod schema;
pub mod session;
pub mod sql;
pub mod traffic;
pub mod validate;
pub mod wire;
