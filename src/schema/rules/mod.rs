//! What PostgreSQL does, as data: verdicts for type changes and the USING expressions for those that need one.
//!
//! Source: measured on PostgreSQL 15 over 1,482 ordered pairs of types (`type_changes.csv`).

pub mod types;
pub mod using;
