//! The CDC Agent (interface; being built).

use crate::{config::ServerUrl, lsn::Lsn};

/// Which way the rows flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Source to shadow.
    Forward,
    /// Shadow to source, after a cutover.
    Reverse,
}

/// What a feed connects.
#[derive(Clone, Debug)]
pub struct FeedSpec {
    /// Database name in proxy.toml.
    pub database: String,
    /// Shadow name in proxy.toml.
    pub shadow: String,
    /// Which way.
    pub direction: Direction,
    /// The owner of the writes.
    pub from: ServerUrl,
    /// The follower.
    pub to: ServerUrl,
    /// Tables copied at the same time.
    pub copy_workers: usize,
}

/// A feed could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum CdcError {
    /// Placeholder until the room is built.
    #[error("{0}")]
    Other(String),
}

/// Placeholder.
pub struct Feed;

impl Feed {
    /// Placeholder.
    pub fn applied(&self) -> Lsn {
        Lsn::ZERO
    }
}
