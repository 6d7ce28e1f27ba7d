//! The console's words as a type. One statement in, one [`Command`] out.

/// A parsed console command.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// `SHOW <topic>`
    Show(Topic),
    /// `SET <shadow> <knob> = <value>` (runtime only; proxy.toml stays as it is)
    Set {
        /// Shadow name.
        shadow: String,
        /// `sample_reads`, `serve_reads`, `mirror_writes`, `revert.window`, `shift.hold`, `adapt.auto_approve`, …
        knob: String,
        /// As typed, without quotes.
        value: String,
    },
    /// `RELOAD`
    Reload,
    /// `PAUSE [db]`
    Pause(Option<String>),
    /// `RESUME [db]`
    Resume(Option<String>),
    /// `APPROVE <id> [AS '<sql>']`
    Approve {
        /// Proposal id.
        id: i64,
        /// SQL to run instead of the suggestion.
        sql: Option<String>,
    },
    /// `REJECT <id>`
    Reject(i64),
    /// `SIMULATE CUTOVER <shadow> [AT <percent>] [FOR '<time>']`
    SimulateCutover {
        /// Shadow name.
        shadow: String,
        /// Percent of the reads; default 5.
        percent: f64,
        /// How long; default 10 s.
        duration: std::time::Duration,
    },
    /// `SHIFT START <shadow>`
    ShiftStart(String),
    /// `SHIFT STOP <shadow>`
    ShiftStop(String),
    /// `REVERT <shadow>`
    Revert(String),
    /// `CUTOVER <shadow> [DRY RUN]`
    Cutover {
        /// Shadow name.
        shadow: String,
        /// Only say what would be done.
        dry_run: bool,
    },
    /// `ROLLBACK <db>`
    Rollback(String),
    /// `VERIFY <shadow> [TABLE t] [REPAIR]`
    Verify {
        /// Shadow name.
        shadow: String,
        /// One table only, schema-qualified or not.
        table: Option<String>,
        /// Write the owner's rows over the differences.
        repair: bool,
    },
    /// `SHADOW START <shadow>`: create the shadow (schema, copy) and keep it in step.
    ShadowStart(String),
    /// `SHADOW STOP <shadow>`: stop the feed and remove slot, publication and triggers from the servers.
    ShadowStop(String),
    /// `SHUTDOWN`
    Shutdown,
}

/// What `SHOW` can show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Topic {
    Version,
    Config,
    Databases,
    Shadows,
    Clients,
    Servers,
    Pools,
    Stats,
    Routes,
    Latency,
    LatencyByQuery,
    Mismatches,
    Feed,
    Schema,
    Drift,
    Proposals,
    Events,
    Alerts,
    Cutover,
    Help,
}
