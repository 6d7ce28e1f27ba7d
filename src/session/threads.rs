//! The threads that relay: each has a runtime of its own, and a session stays on its thread.
//!
//! Measured on two cores against one work-stealing runtime (ARCHITECTURE.md, "Session threads"): a woken session that changes
//! threads costs a futex, an inter-processor interrupt and a cold cache, which together are half of a query. Logging in (key
//! derivation, TLS) and everything of the control plane stays on the work-stealing runtime, where it delays nobody's query.
//!
//! They run under SCHED_BATCH (sched(7)): a thread that is woken does not push aside who is running. On a busy machine the
//! messages of several sessions then wait together for one wake-up, instead of each being two context switches.

use std::{
    future::Future,
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};
use thread_priority::{
    NormalThreadSchedulePolicy, ThreadPriority, ThreadPriorityValue, ThreadSchedulePolicy, set_thread_priority_and_policy, thread_native_id,
};
use tokio::{
    runtime::{Builder, Handle},
    task::JoinHandle,
};

/// Stack of a session thread: classifying parses on it.
const STACK_BYTES: usize = 8 << 20;

/// One thread.
struct Thread {
    runtime: Handle,
    sessions: Arc<AtomicUsize>,
}

/// All of them. They end with the process.
pub(super) struct Threads {
    threads: Vec<Thread>,
    /// The runtime of everything else.
    background: Handle,
}

/// How many threads relay on a machine with this many cores: the kernel's side of the sockets, the log-ins and the control
/// plane want the other half, and one thread forwards some 80,000 queries per second.
pub(super) fn number(cores: usize) -> usize {
    (cores / 2).max(1)
}

impl Threads {
    /// Starts them. Must be called on the runtime that is to do everything else; where no thread can be started, that
    /// relays, too.
    pub fn start() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = (0..number(cores)).filter_map(|at| match start_one(at) {
            Ok(thread) => Some(thread),
            Err(error) => {
                tracing::error!(%error, "cannot start a session thread");
                None
            }
        });
        Threads { threads: threads.collect(), background: Handle::current() }
    }

    /// Runs a session on the thread that has the fewest.
    pub fn spawn(&self, session: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
        match self.threads.iter().min_by_key(|thread| thread.sessions.load(Ordering::Relaxed)) {
            Some(thread) => {
                let counted = Counted::new(&thread.sessions);
                let session = Box::pin(session); // or the task would have its room twice
                thread.runtime.spawn(async move {
                    session.await;
                    drop(counted);
                })
            }
            None => self.background.spawn(session),
        }
    }

    /// Where log-ins happen.
    pub fn background(&self) -> &Handle {
        &self.background
    }
}

struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn new(of: &Arc<AtomicUsize>) -> Self {
        of.fetch_add(1, Ordering::Relaxed);
        Counted(of.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn start_one(at: usize) -> io::Result<Thread> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let handle = runtime.handle().clone();
    std::thread::Builder::new().name(format!("sessions-{at}")).stack_size(STACK_BYTES).spawn(move || {
        crate::pool::set_here(at as u32 + 1);
        wake_politely();
        runtime.block_on(std::future::pending::<()>());
    })?;
    Ok(Thread { runtime: handle, sessions: Arc::default() })
}

/// Puts the calling thread under SCHED_BATCH with its niceness as it was. Where that is refused, the thread works all the same.
fn wake_politely() {
    /// The library cannot leave the niceness alone: this is 0 on its scale of 0 to 99.
    const NICE_0: u8 = 47;
    let nice = rustix::process::getpriority_process(None);
    let policy = ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Batch);
    let priority = ThreadPriorityValue::try_from(NICE_0).map(ThreadPriority::Crossplatform);
    let asked = priority.map(|priority| set_thread_priority_and_policy(thread_native_id(), priority, policy));
    if !matches!(asked, Ok(Ok(()))) {
        tracing::debug!(?asked, "a session thread keeps its scheduling policy or niceness");
    }
    if let Ok(nice) = nice {
        let _ = rustix::process::setpriority_process(None, nice);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{collections::HashMap, sync::Mutex};

    #[test]
    fn a_thread_becomes_a_batch_thread_and_keeps_its_niceness() {
        let told = std::thread::spawn(|| {
            let before = rustix::process::getpriority_process(None).unwrap();
            wake_politely();
            let policy = thread_priority::thread_schedule_policy().unwrap();
            (before, rustix::process::getpriority_process(None).unwrap(), policy)
        });
        let (before, after, policy) = told.join().unwrap();
        assert_eq!(before, after);
        assert_eq!(policy, ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Batch));
    }

    #[test]
    fn one_core_has_a_thread_too() {
        assert_eq!([1, 2, 3, 8, 64].map(number), [1, 1, 1, 4, 32]);
    }

    #[tokio::test]
    async fn sessions_are_spread_and_counted_down() {
        let threads = Threads { threads: (0..3).map(|at| start_one(at).unwrap()).collect(), background: Handle::current() };
        let seen = Arc::new(Mutex::new(HashMap::new()));
        let (release, _) = tokio::sync::broadcast::channel::<()>(1);
        let run = || {
            let (seen, mut released) = (seen.clone(), release.subscribe());
            threads.spawn(async move {
                *seen.lock().unwrap().entry(std::thread::current().name().unwrap().to_owned()).or_insert(0) += 1;
                let _ = released.recv().await;
            })
        };
        let all = futures_util::future::join_all((0..9).map(|_| run()));
        let let_go = async {
            while seen.lock().unwrap().values().sum::<i32>() < 9 {
                tokio::task::yield_now().await;
            }
            release.send(()).unwrap();
        };
        futures_util::join!(all, let_go);
        let mut counts: Vec<_> = seen.lock().unwrap().values().copied().collect();
        counts.sort_unstable();
        assert_eq!(counts, [3, 3, 3]);
        assert!(threads.threads.iter().all(|thread| thread.sessions.load(Ordering::Relaxed) == 0));
    }

    #[tokio::test]
    async fn a_panic_ends_its_session_only() {
        let threads = Threads { threads: vec![start_one(0).unwrap()], background: Handle::current() };
        assert!(threads.spawn(async { panic!("on purpose") }).await.is_err());
        threads.spawn(async {}).await.unwrap();
        assert_eq!(threads.threads[0].sessions.load(Ordering::Relaxed), 0);
    }
}
