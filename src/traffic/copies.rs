//! Copies of client statements for a shadow, and the bounded queue they wait in.

use super::{answer::Answer, fence::Needed};
use crate::{auth::ServerLogin, config::ServerUrl, sql::Class, wire::frontend::Parse};
use bytes::Bytes;
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::sync::mpsc;

/// One statement that a client ran, in a form that can be run again elsewhere.
#[derive(Clone, Debug)]
pub enum Operation {
    /// A `Query`: its text.
    Simple(Bytes),
    /// An `Execute`: the statement, and everything of the `Bind` after the names.
    Extended {
        /// Text and parameter types.
        parse: Arc<Parse>,
        /// Parameter formats, parameters, result formats.
        bind: Bytes,
        /// Row limit of the `Execute`; 0: none.
        limit: i32,
        /// The client parsed the statement in the same round trip, so that its latency contains the parsing.
        parsed_here: bool,
    },
}

impl Operation {
    /// The statement.
    pub fn text(&self) -> Option<&str> {
        let text = match self {
            Operation::Simple(text) => text,
            Operation::Extended { parse, .. } => &parse.query,
        };
        std::str::from_utf8(text).ok()
    }

    /// Bytes that the copy holds.
    pub fn bytes(&self) -> usize {
        match self {
            Operation::Simple(text) => text.len(),
            Operation::Extended { parse, bind, .. } => parse.query.len() + bind.len(),
        }
    }
}

/// Who ran it: shadow work runs as the same role with the same start-up parameters.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    /// Role.
    pub user: String,
    /// Start-up parameters besides user, database and replication, in order.
    pub parameters: Vec<(Bytes, Bytes)>,
    /// What its log-in has revealed, for servers where no password is configured.
    pub login: ServerLogin,
}

impl Identity {
    /// With what to log in at a server: a configured password, or what the client's own log-in has revealed.
    pub fn login_at(&self, url: &ServerUrl) -> ServerLogin {
        match &url.password {
            Some(password) => ServerLogin::Password(password.clone()),
            None => self.login.clone(),
        }
    }
}

/// A read whose answer is to be compared.
#[derive(Debug)]
pub struct SampledRead {
    /// Who.
    pub identity: Arc<Identity>,
    /// What.
    pub operation: Operation,
    /// What it is.
    pub class: Arc<Class>,
    /// What the client got.
    pub answer: Answer,
    /// How long the owner took.
    pub owner_latency: Duration,
    /// The shadow must have passed this tick before it is asked.
    pub needed: Needed,
    /// Run it this many times.
    pub times: u64,
}

/// One statement of a READ ONLY transaction.
#[derive(Clone, Debug)]
pub struct SampledStep {
    /// What.
    pub operation: Operation,
    /// What it is.
    pub class: Arc<Class>,
    /// What the client got, where that is compared.
    pub answer: Option<Answer>,
    /// How long the owner took.
    pub owner_latency: Duration,
}

/// A READ ONLY transaction whose answers are to be compared.
#[derive(Clone, Debug)]
pub struct SampledTransaction {
    /// Who.
    pub identity: Arc<Identity>,
    /// Statements, with BEGIN and without COMMIT.
    pub steps: Vec<SampledStep>,
    /// The shadow must have passed this tick before it is asked.
    pub needed: Needed,
}

/// One statement of a write transaction, with what the owner answered.
#[derive(Clone, Debug)]
pub struct RehearsedStep {
    /// What.
    pub operation: Operation,
    /// What it is.
    pub class: Arc<Class>,
    /// Command tags (several for a multi-statement `Query`).
    pub tags: Vec<Bytes>,
    /// How long the owner took; `None` when several statements shared a round trip.
    pub owner_latency: Option<Duration>,
}

/// A committed write transaction to be run again and rolled back.
#[derive(Debug)]
pub struct RehearsedTransaction {
    /// Who.
    pub identity: Arc<Identity>,
    /// Statements, with BEGIN and without COMMIT.
    pub steps: Vec<RehearsedStep>,
    /// The owner's newest known position when the transaction began.
    pub began_at: crate::lsn::Lsn,
    /// The shadow must have passed this tick: the rows and the schema that the transaction found must be there.
    pub needed: Needed,
}

/// What waits in a queue.
#[derive(Debug)]
pub enum Copy {
    /// Compare.
    Read(Box<SampledRead>),
    /// Compare all of them.
    Reads(Box<SampledTransaction>),
    /// Rehearse.
    Write(Box<RehearsedTransaction>),
}

impl Copy {
    /// How many answers are to be compared.
    pub fn answers(&self) -> u64 {
        match self {
            Copy::Read(_) => 1,
            Copy::Reads(transaction) => transaction.steps.iter().filter(|step| step.answer.is_some()).count() as u64,
            Copy::Write(_) => 0,
        }
    }
}

/// Most copies waiting per worker; with the byte budget this bounds memory.
const QUEUE_LENGTH_MAX: usize = 256;

/// Bytes that all shadow work of the process together may hold.
#[derive(Debug)]
pub struct ByteBudget {
    used: AtomicUsize,
    max: usize,
}

impl ByteBudget {
    /// With a maximum in bytes.
    pub fn new(max: usize) -> Arc<Self> {
        Arc::new(ByteBudget { used: AtomicUsize::new(0), max })
    }

    /// Takes `bytes` if they fit.
    pub fn take(self: &Arc<Self>, bytes: usize) -> Option<Permit> {
        let before = self.used.fetch_add(bytes, Ordering::Relaxed);
        let permit = Permit { budget: self.clone(), bytes };
        (before + bytes <= self.max).then_some(permit)
    }

    /// Bytes in use.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }
}

/// Bytes taken from a budget, given back on drop.
#[derive(Debug)]
pub struct Permit {
    budget: Arc<ByteBudget>,
    bytes: usize,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// The sessions' end of a shadow's queues: one per worker, so that the copies of one session stay in order.
#[derive(Debug)]
pub struct CopyQueue {
    workers: Vec<mpsc::Sender<(Copy, Permit)>>,
    budget: Arc<ByteBudget>,
}

/// A copy was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dropped {
    /// The workers are behind.
    QueueFull,
    /// All shadow work together holds too many bytes.
    BudgetFull,
}

impl Dropped {
    /// For counters.
    pub fn as_str(self) -> &'static str {
        match self {
            Dropped::QueueFull => "dropped: queue full",
            Dropped::BudgetFull => "dropped: memory budget full",
        }
    }
}

impl CopyQueue {
    /// A queue with the workers' ends.
    pub fn new(workers: usize, budget: Arc<ByteBudget>) -> (Self, Vec<mpsc::Receiver<(Copy, Permit)>>) {
        let (senders, receivers) = (0..workers).map(|_| mpsc::channel(QUEUE_LENGTH_MAX)).unzip();
        (CopyQueue { workers: senders, budget }, receivers)
    }

    /// Would a copy of this session find a place? To be asked before anything is spent on making one.
    pub fn has_room(&self, session: u64) -> bool {
        self.worker(session).is_some_and(|worker| worker.capacity() > 0)
    }

    /// The queue of this session is more than half full.
    pub fn is_pressed(&self, session: u64) -> bool {
        self.worker(session).is_some_and(|worker| worker.capacity() < QUEUE_LENGTH_MAX / 2)
    }

    fn worker(&self, session: u64) -> Option<&mpsc::Sender<(Copy, Permit)>> {
        self.workers.get(session as usize % self.workers.len().max(1))
    }

    /// Hands a copy over; never waits.
    ///
    /// # Errors
    /// [`Dropped`]: the copy is gone, the client is not concerned.
    pub fn offer(&self, session: u64, copy: Copy) -> Result<(), Dropped> {
        /// What a copy costs besides its bytes.
        const OVERHEAD: usize = 512;
        let bytes = match &copy {
            Copy::Read(read) => read.operation.bytes(),
            Copy::Reads(reads) => reads.steps.iter().map(|step| step.operation.bytes() + OVERHEAD).sum(),
            Copy::Write(write) => write.steps.iter().map(|step| step.operation.bytes() + OVERHEAD).sum(),
        };
        let permit = self.budget.take(bytes + OVERHEAD).ok_or(Dropped::BudgetFull)?;
        let worker = self.worker(session).ok_or(Dropped::QueueFull)?;
        worker.try_send((copy, permit)).map_err(|_| Dropped::QueueFull)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_is_never_exceeded_and_given_back() {
        let budget = ByteBudget::new(100);
        let first = budget.take(60).unwrap();
        assert!(budget.take(50).is_none());
        assert_eq!(budget.used(), 60, "a refused permit gives its bytes back");
        drop(first);
        assert!(budget.take(100).is_some());
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn a_full_queue_drops_and_says_so() {
        let (queue, _receivers) = CopyQueue::new(1, ByteBudget::new(usize::MAX / 2));
        let copy = || {
            Copy::Write(Box::new(RehearsedTransaction {
                identity: Arc::new(Identity { user: "a".into(), parameters: vec![], login: ServerLogin::Nothing }),
                steps: vec![],
                began_at: crate::lsn::Lsn::ZERO,
                needed: Needed::default(),
            }))
        };
        for _ in 0..QUEUE_LENGTH_MAX {
            queue.offer(7, copy()).unwrap();
        }
        assert_eq!(queue.offer(7, copy()), Err(Dropped::QueueFull));
    }
}
