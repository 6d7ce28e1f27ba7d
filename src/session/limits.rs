//! What clients must keep to. Sizes are looked at where a message begins; times by one task for all sessions, which looks at
//! their [`Pulse`](crate::traffic::pulse::Pulse): no session has a timer, and none is touched per query.

use super::{front_door::FrontDoor, relay::Relay};
use crate::{
    net::TcpConfig,
    traffic::{database::monotonic_ms, pulse::Activity},
    wire::{MESSAGE_BYTES_MAX, backend::TransactionStatus},
};
use std::{
    borrow::Cow,
    io,
    sync::{Arc, Weak, atomic::Ordering},
    time::Duration,
};

/// How often the watcher looks, at least and at most, and into how many looks it divides the shortest limit.
const TICK_MIN: Duration = Duration::from_millis(10);
const TICK_MAX: Duration = Duration::from_secs(1);
const TICKS_PER_LIMIT: u32 = 10;

/// Limits of the front door and of sessions.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Client connections at once; the next one gets SQLSTATE 53300.
    pub clients_max: usize,
    /// How long a client may take to say who it is and to log in.
    pub login_timeout: Duration,
    /// Longest message of a client; a longer one gets SQLSTATE 54000.
    pub message_bytes_max: usize,
    /// Bytes remembered of a client's statements and requests; beyond it it gets SQLSTATE 53200.
    pub client_bytes_max: usize,
    /// A transaction whose client does nothing for so long gets SQLSTATE 25P03. `None`: off, here and below.
    pub idle_in_transaction: Option<Duration>,
    /// A client that asks for nothing for so long gets SQLSTATE 57P05.
    pub client_idle: Option<Duration>,
    /// A request not answered for so long gets SQLSTATE 57014.
    pub query: Option<Duration>,
    /// How dead clients are noticed.
    pub tcp: TcpConfig,
}

impl Farewell {
    /// To a message that no client may send, if this is one; PostgreSQL's words (`SocketBackend`, `src/backend/tcop/postgres.c`). It
    /// would be the server's to say, but nothing that a client asks for is answered by it: whom a pooled connection is lent to
    /// next would hear it.
    #[inline]
    pub fn to_unknown(tag: u8) -> Option<Farewell> {
        let known = matches!(tag, b'Q' | b'P' | b'B' | b'D' | b'E' | b'C' | b'H' | b'S' | b'F' | b'X' | b'd' | b'c' | b'f');
        let message = || Cow::Owned(format!("invalid frontend message type {tag}"));
        (!known).then(|| Farewell { code: "08P01", message: message(), hint: None })
    }
}

impl Limits {
    fn of(&self, activity: Activity) -> Option<Duration> {
        match activity {
            Activity::Other => None,
            Activity::Idle => self.client_idle,
            Activity::InTransaction | Activity::Halfway => self.idle_in_transaction,
            Activity::Busy => self.query,
        }
    }

    /// How often to look; `None`: nothing is limited in time.
    fn tick(&self) -> Option<Duration> {
        let shortest = [self.client_idle, self.idle_in_transaction, self.query].into_iter().flatten().min()?;
        Some((shortest / TICKS_PER_LIMIT).clamp(TICK_MIN, TICK_MAX))
    }
}

/// Ends sessions whose time is over, until the front door is gone.
pub(super) async fn watch(door: Weak<FrontDoor>) {
    loop {
        let Some(open) = door.upgrade() else { return };
        let (limits, changed) = (open.limits(), open.limits_changed.clone());
        let tick = limits.tick();
        if tick.is_some() {
            let now = monotonic_ms();
            open.for_each_session(|session| {
                if session.pulse.look(now, |activity| limits.of(activity)) {
                    session.mailbox.post();
                }
            });
        }
        drop(open);
        tokio::select! {
            () = changed.notified() => {}
            () = tokio::time::sleep(tick.unwrap_or_default()), if tick.is_some() => {}
        }
    }
}

/// What a client is told before its connection ends, once everything it has asked for is answered.
#[derive(Clone, Debug)]
pub(super) struct Farewell {
    pub code: &'static str,
    pub message: Cow<'static, str>,
    pub hint: Option<&'static str>,
}

/// A length that cannot be; PostgreSQL's words (`pq_getmessage`, `src/backend/libpq/pqcomm.c`), which it gives to its log only.
pub(super) static LENGTH: Farewell = Farewell { code: "08P01", message: Cow::Borrowed("invalid message length"), hint: None };
pub(super) static TOO_LONG: Farewell = Farewell {
    code: "54000",
    message: Cow::Borrowed("this message is longer than understudy lets clients send"),
    hint: Some("send less at once, or raise max_message in proxy.toml"),
};
pub(super) static TOO_MUCH: Farewell = Farewell {
    code: "53200",
    message: Cow::Borrowed("this client's prepared statements and unanswered requests take more memory than understudy gives to one"),
    hint: Some("close prepared statements, send shorter pipelines, or raise client_memory in proxy.toml"),
};
static IDLE_IN_TRANSACTION: Farewell = Farewell {
    code: "25P03",
    message: Cow::Borrowed("terminating connection due to idle-in-transaction timeout"),
    hint: Some("idle_in_transaction_timeout in proxy.toml says how long a transaction may wait for its client"),
};
static IDLE: Farewell = Farewell {
    code: "57P05",
    message: Cow::Borrowed("terminating connection due to idle-session timeout"),
    hint: Some("client_idle_timeout in proxy.toml says how long a client may ask for nothing"),
};
static QUERY: Farewell = Farewell {
    code: "57014",
    message: Cow::Borrowed("terminating connection due to query timeout"),
    hint: Some("query_timeout in proxy.toml says how long a request may take"),
};

/// What a session needs of the limits, at hand.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub message_bytes_max: usize,
    /// Some time is limited: [`Relay::beat`].
    pub watched: bool,
    /// [`Relay::client_reads`] at the last beat.
    reads_at_beat: u64,
}

impl Default for Bounds {
    fn default() -> Self {
        Bounds { message_bytes_max: MESSAGE_BYTES_MAX, watched: false, reads_at_beat: 0 }
    }
}

impl Relay {
    /// Takes the limits over as they are now; `changed`: the socket is told, too.
    pub(super) fn take_limits(&mut self, changed: bool) {
        let limits = self.door.limits();
        self.bounds.message_bytes_max = limits.message_bytes_max;
        self.bounds.watched = limits.tick().is_some();
        self.conversation.memory.bytes_max = limits.client_bytes_max;
        if let Some(socket) = self.client.tcp().filter(|_| changed) {
            crate::net::tune(socket, &limits.tcp);
        }
    }

    /// Says what is about to be waited for.
    pub(super) fn beat(&mut self, held: bool) {
        let requests = self.info.requests.load(Ordering::Relaxed);
        let talk = &self.conversation;
        let in_transaction = talk.status() != TransactionStatus::Idle;
        let (activity, count) = if held && !self.from_client.is_empty() {
            (Activity::Other, requests) // it waits for us
        } else if self.client_skip > 0 {
            (if in_transaction { Activity::InTransaction } else { Activity::Idle }, requests.wrapping_add(self.client_reads))
        } else if talk.owes_answers()
            || !(talk.is_answered() || talk.takes_data())
            || !self.to_server.is_empty()
            || !self.to_client.is_empty()
        {
            (Activity::Busy, requests)
        } else if talk.at_boundary() {
            (Activity::Idle, requests)
        } else if talk.newest().is_none() {
            (Activity::InTransaction, requests)
        } else {
            (Activity::Halfway, self.client_reads)
        };
        self.bounds.reads_at_beat = self.client_reads;
        self.info.pulse.beat(activity, count);
    }

    /// Ends the session if what it waited for has lasted too long.
    pub(super) fn end_if_overdue(&mut self) -> Result<(), io::Error> {
        // bytes that have come since count, although the verdict was faster
        let overdue = self.info.pulse.overdue().filter(|_| self.bounds.watched && self.bounds.reads_at_beat == self.client_reads);
        let farewell = match overdue {
            None | Some(Activity::Other) => return Ok(()),
            Some(Activity::Idle) => &IDLE,
            Some(Activity::InTransaction | Activity::Halfway) => &IDLE_IN_TRANSACTION,
            Some(Activity::Busy) => {
                // a server that works does not look whether its client is still there
                let works = self.conversation.owes_answers() || !self.conversation.is_answered();
                if let Some(announced) = works.then(|| self.door.announce_cancel(&self.cancel)).flatten() {
                    let door = self.door.clone();
                    tokio::spawn(async move { door.send_cancel(announced).await });
                }
                &QUERY
            }
        };
        tracing::info!(session = self.info.id, sqlstate = farewell.code, reason = &*farewell.message, "a client has come to a limit");
        self.say_goodbye(farewell)
    }
}

impl FrontDoor {
    /// Takes new limits over, for the next clients and for those who are there.
    pub fn set_limits(&self, limits: Limits) {
        self.limits.store(Arc::new(limits));
        self.limits_changed.notify_one();
        self.for_each_session(|session| session.mailbox.post());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watcher_looks_as_rarely_as_the_shortest_limit_allows() {
        let limits = |idle: Option<u64>, query: Option<u64>| Limits {
            clients_max: 1,
            login_timeout: Duration::from_secs(1),
            message_bytes_max: 1,
            client_bytes_max: 1,
            idle_in_transaction: None,
            client_idle: idle.map(Duration::from_millis),
            query: query.map(Duration::from_millis),
            tcp: TcpConfig::CLIENTS,
        };
        assert_eq!(limits(None, None).tick(), None, "nobody looks");
        assert_eq!(limits(Some(3_600_000), None).tick(), Some(TICK_MAX));
        assert_eq!(limits(Some(3_600_000), Some(2_000)).tick(), Some(Duration::from_millis(200)));
        assert_eq!(limits(Some(1), None).tick(), Some(TICK_MIN));
        assert_eq!(limits(Some(5), None).of(Activity::Busy), None);
    }
}
