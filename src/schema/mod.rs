//! Being built.
mod adapter;
pub use adapter::{Adaptation, Adapter, SchemaError, capture};
