//! The demo room.
pub mod servers;
