//! The demo room.
pub mod checker;
pub mod pgbench;
pub mod servers;
pub mod stage;
pub mod tally;
pub mod workload;
