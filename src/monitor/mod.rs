//! What the process measures: latency histograms (HDR) per database, shadow and query fingerprint, sliding windows for
//! decisions, the resource use of servers, and the Prometheus text of all figures.
//!
//! Deliberately absent: any decision (reverting is `traffic`'s), any statement text with literals, any clock: where a
//! figure depends on time, the time is an argument.
//! Invariants: recording takes one uncontended lock and never waits for a reader longer than one histogram copy; memory
//! is bounded by named limits; all latencies are in microseconds.
//! Sources: hdrhistogram.org; PostgreSQL documentation, "The Cumulative Statistics System"; Prometheus, "Exposition
//! formats".

mod forecast;
mod histogram;
mod host;
mod metrics_text;
mod paired;
pub mod plans;
mod profile;
mod resources;
mod window;

pub use forecast::{Forecast, Interval, Point, READS_MIN, forecast};
pub use histogram::{LATENCY_MAX_US, LatencyHistogram};
pub use metrics_text::metrics_text;
pub use paired::{Comparison, MARGIN, PAIRS_MIN};
pub use profile::{FINGERPRINTS_MAX, PROVEN_ANSWERS_MIN, QueryProfile, StatementProfile};
pub use resources::{ResourceError, ResourceSample, sample};
pub use window::{SlowShare, Window, WindowCounts};

use serde::{Deserialize, Serialize};

/// A summary of a histogram, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LatencySummary {
    /// Values recorded.
    pub count: u64,
    /// Median.
    pub p50_us: u64,
    /// 90th percentile.
    pub p90_us: u64,
    /// 99th percentile.
    pub p99_us: u64,
    /// 99.9th percentile.
    pub p999_us: u64,
    /// Largest.
    pub max_us: u64,
}
