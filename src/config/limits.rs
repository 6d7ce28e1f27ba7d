//! What clients must keep to, and how TCP notices that a peer is gone.
//! Sources: PostgreSQL documentation, "Connections and Authentication", "Client Connection Defaults"; tcp(7).

use super::{
    load::{Refusal, bytes, duration, in_range, refuse},
    raw::{RawProxy, RawTcp},
};
use crate::wire::MESSAGE_BYTES_MAX;
use std::time::Duration;
use toml::Spanned;

/// Less than this is too little for one statement of ordinary length.
const MESSAGE_BYTES_LEAST: usize = 16 << 10;
/// Less than this is too little for a handful of prepared statements.
const CLIENT_BYTES_LEAST: usize = 256 << 10;
/// TCP's timers take no longer times (`MAX_TCP_KEEPIDLE`, `include/net/tcp.h` of Linux: 32,767 s).
const TCP_TIME_MAX: Duration = Duration::from_secs(9 * 3600);

/// The limits of `[proxy]`. `None`: off, as in PostgreSQL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LimitsConfig {
    /// Most client connections at once; the next one is refused with SQLSTATE 53300.
    pub clients_max: usize,
    /// How long a client may take to say who it is and to log in.
    pub login_timeout: Duration,
    /// Longest message that a client may send (SQLSTATE 54000).
    pub message_bytes_max: usize,
    /// Most bytes that the proxy remembers of one client: prepared statements, requests not yet answered (SQLSTATE 53200).
    pub client_bytes_max: usize,
    /// How long a client may do nothing inside a transaction (SQLSTATE 25P03).
    pub idle_in_transaction_timeout: Option<Duration>,
    /// How long a client may do nothing outside of one (SQLSTATE 57P05).
    pub client_idle_timeout: Option<Duration>,
    /// How long the server may take to answer a request (SQLSTATE 57014).
    pub query_timeout: Option<Duration>,
}

/// When a silent connection is probed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Keepalive {
    /// Silence before the first probe. `None`: the operating system's.
    pub idle: Option<Duration>,
    /// Time between probes. `None`: the operating system's.
    pub interval: Option<Duration>,
    /// Probes without an answer before the peer counts as gone. `None`: the operating system's.
    pub count: Option<u32>,
}

/// How TCP notices that a peer is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TcpConfig {
    /// `None`: never probed.
    pub keepalive: Option<Keepalive>,
    /// How long sent bytes may go unacknowledged, or wait for a peer that takes none. `None`: the operating system's.
    pub user_timeout: Option<Duration>,
}

impl TcpConfig {
    /// Towards clients: one whose machine has gone is noticed within two minutes. A client that reads nothing for a long time is
    /// none of TCP's business, so the user timeout is off, as in PostgreSQL.
    pub const CLIENTS: TcpConfig = TcpConfig::probing(60, 10, 6);
    /// Towards servers: within a minute.
    pub const SERVERS: TcpConfig = TcpConfig::probing(30, 10, 3);

    const fn probing(idle: u64, interval: u64, count: u32) -> TcpConfig {
        let keepalive =
            Keepalive { idle: Some(Duration::from_secs(idle)), interval: Some(Duration::from_secs(interval)), count: Some(count) };
        TcpConfig { keepalive: Some(keepalive), user_timeout: None }
    }
}

pub(super) fn limits(raw: &RawProxy) -> Result<LimitsConfig, Refusal> {
    let size = |value: &Option<Spanned<String>>, key: &str, least: usize, most: usize, default: usize| match value {
        None => Ok(default),
        Some(value) => match bytes(value)? {
            // PostgreSQL's limit is a byte below 1 GB
            size if size == 1 << 30 => Ok(most),
            size if size > most => refuse(value.span(), format!("{key} is 1GB at most, as in PostgreSQL")),
            size if size < least => refuse(value.span(), format!("{key} must be at least {} kB", least >> 10)),
            size => Ok(size),
        },
    };
    Ok(LimitsConfig {
        clients_max: in_range(raw.max_clients.clone(), "max_clients", 1..=1_000_000, 10_000)? as usize,
        login_timeout: duration(raw.login_timeout.clone(), "login_timeout", Duration::from_secs(60))?,
        message_bytes_max: size(&raw.max_message, "max_message", MESSAGE_BYTES_LEAST, MESSAGE_BYTES_MAX, MESSAGE_BYTES_MAX)?,
        client_bytes_max: size(&raw.client_memory, "client_memory", CLIENT_BYTES_LEAST, 1 << 30, 64 << 20)?,
        idle_in_transaction_timeout: or_off(&raw.idle_in_transaction_timeout, "idle_in_transaction_timeout", None)?,
        client_idle_timeout: or_off(&raw.client_idle_timeout, "client_idle_timeout", None)?,
        query_timeout: or_off(&raw.query_timeout, "query_timeout", None)?,
    })
}

pub(super) fn tcp(raw: RawTcp) -> Result<TcpConfig, Refusal> {
    let time =
        |value: &Option<Spanned<String>>, key: &str, default: Option<u64>| match or_off(value, key, default.map(Duration::from_secs))? {
            Some(time) if time > TCP_TIME_MAX => refuse(value.as_ref().map_or(0..0, Spanned::span), format!("{key} is at most 9h")),
            time => Ok(time),
        };
    let idle = time(&raw.keepalive_idle, "keepalive_idle", Some(60))?;
    let interval = time(&raw.keepalive_interval, "keepalive_interval", Some(10))?;
    let count = in_range(raw.keepalive_count, "keepalive_count", 1..=127, 6)?;
    Ok(TcpConfig {
        keepalive: idle.map(|idle| Keepalive { idle: Some(idle), interval, count: u32::try_from(count).ok() }),
        user_timeout: time(&raw.user_timeout, "user_timeout", None)?,
    })
}

/// A time, or `"off"`.
fn or_off(value: &Option<Spanned<String>>, key: &str, default: Option<Duration>) -> Result<Option<Duration>, Refusal> {
    match value {
        None => Ok(default),
        Some(value) if matches!(value.get_ref().trim(), "off" | "0") => Ok(None),
        Some(value) => duration(Some(value.clone()), key, Duration::ZERO)
            .map(Some)
            .map_err(|refusal| Refusal { reason: format!("{}, or \"off\"", refusal.reason), ..refusal }),
    }
}
