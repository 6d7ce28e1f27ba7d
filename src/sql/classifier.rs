//! The cache in front of the parser, and the parser's safety: small flat texts are parsed where they are asked for,
//! others on a thread with a large stack and a time limit.
//!
//! Why: libpg_query checks its own stack, but what surrounds it recurses too, and a tokio worker has 2 MiB.

use super::{CatalogFacts, Class, TEXT_CHARS_MAX, analyse, normalise};
use arc_swap::ArcSwap;
use dashmap::DashMap;
use std::{
    cell::RefCell,
    collections::hash_map::DefaultHasher,
    future::Future,
    hash::{Hash, Hasher},
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    task::{Context, Poll, Wake, Waker},
    time::{Duration, Instant},
};
use tokio::sync::oneshot;

/// Longer texts are not parsed: a bulk load, not a statement worth comparing.
const TEXT_BYTES_MAX: usize = 256 << 10;
/// Longest text parsed on the caller's stack.
const INLINE_BYTES_MAX: usize = 2 << 10;
/// Deepest nesting parsed on the caller's stack.
const INLINE_DEPTH_MAX: usize = 6;
/// Most operators parsed on the caller's stack: a chain of them nests as deep as it is long.
const INLINE_OPERATORS_MAX: usize = 24;
/// Cached classes per database; at the limit the cache is emptied, which costs one parse per statement in use.
const CACHE_ENTRIES_MAX: usize = 20_000;
/// Bytes of cached keys and texts per database, likewise.
const CACHE_BYTES_MAX: usize = 64 << 20;
/// Stack of a parser thread (virtual memory; pages are touched as needed).
const PARSER_STACK_BYTES: usize = 256 << 20;
/// Parser threads of the process.
const PARSER_THREADS: usize = 2;
/// Statements waiting for a parser thread; one more is `Unknown`, and asked again next time.
const PARSER_QUEUE_MAX: usize = 64;
/// Longest wait for a parser thread: the client waits too.
const PARSER_TIMEOUT: Duration = Duration::from_millis(200);

/// What is known of a text at once.
#[derive(Debug)]
pub enum LookUp {
    /// Everything.
    Known(Arc<Class>),
    /// It is being parsed on a thread of its own.
    Later(Later),
}

/// A class on its way.
#[derive(Debug)]
pub struct Later {
    receiver: oneshot::Receiver<Arc<Class>>,
    otherwise: Arc<Class>,
}

impl Later {
    /// Waits for it, at most 200 ms: then the text counts as unknown this time.
    pub async fn wait(self) -> Arc<Class> {
        match tokio::time::timeout(PARSER_TIMEOUT, self.receiver).await {
            Ok(Ok(class)) => class,
            Ok(Err(_)) | Err(_) => self.otherwise,
        }
    }
}

/// Classifies the statements of one database. Shared by all its sessions.
#[derive(Debug)]
pub struct Classifier {
    facts: ArcSwap<CatalogFacts>,
    cache: Arc<Cache>,
}

#[derive(Debug, Default)]
struct Cache {
    classes: DashMap<Box<[u8]>, Arc<Class>>,
    bytes: AtomicUsize,
    /// Counts `replace_facts`: a class computed with older facts is not kept.
    generation: AtomicU64,
}

thread_local! {
    static KEY: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl Classifier {
    /// An empty cache over these facts.
    pub fn new(facts: CatalogFacts) -> Self {
        Classifier { facts: ArcSwap::from_pointee(facts), cache: Arc::default() }
    }

    /// What this text is. Blocks the caller for a parse when the text is new (microseconds; at most 200 ms for a long or
    /// deep one). The text is without the protocol's terminating zero.
    pub fn classify(&self, text: &[u8]) -> Arc<Class> {
        match self.look_up(text) {
            LookUp::Known(class) => class,
            LookUp::Later(Later { receiver, otherwise }) => wait_blocking(receiver).unwrap_or(otherwise),
        }
    }

    /// [`Classifier::classify`] for callers that may not block: a long or deep text that is new comes later.
    pub fn look_up(&self, text: &[u8]) -> LookUp {
        let Some(text) = readable(text) else { return LookUp::Known(unreadable(text)) };
        KEY.with_borrow_mut(|key| {
            key.shrink_to(TEXT_BYTES_MAX / 8);
            let shape = match normalise::normalise(text, key) {
                Ok(shape) => shape,
                Err(normalise::Uncertain(reason)) => {
                    return LookUp::Known(Arc::new(Class::unknown(hash(text.as_bytes()), shown(text), reason)));
                }
            };
            if let Some(class) = self.cache.classes.get(&key[..]) {
                return LookUp::Known(Arc::clone(&class));
            }
            self.classify_anew(text, key, shape)
        })
    }

    /// What this text is, if a text like it was classified before.
    pub fn cached(&self, text: &[u8]) -> Option<Arc<Class>> {
        let text = readable(text)?;
        KEY.with_borrow_mut(|key| {
            normalise::normalise(text, key).ok()?;
            self.cache.classes.get(&key[..]).map(|class| Arc::clone(&class))
        })
    }

    /// Grows with every change of facts; never 0.
    pub fn generation(&self) -> u64 {
        self.cache.generation.load(Ordering::Acquire) + 1
    }

    /// After DDL: judges by new facts from now on.
    pub fn replace_facts(&self, facts: CatalogFacts) {
        self.facts.store(Arc::new(facts));
        self.cache.generation.fetch_add(1, Ordering::AcqRel);
        self.cache.clear();
    }

    fn classify_anew(&self, text: &str, key: &[u8], shape: normalise::Shape) -> LookUp {
        let generation = self.cache.generation.load(Ordering::Acquire);
        let facts = self.facts.load_full();
        let flat = shape.depth <= INLINE_DEPTH_MAX && shape.operators <= INLINE_OPERATORS_MAX;
        if text.len() <= INLINE_BYTES_MAX && flat {
            let class = parse(text, key, &facts);
            self.cache.keep(key, &class, generation);
            return LookUp::Known(class);
        }
        let (answer, receiver) = oneshot::channel();
        let job = Job { text: text.to_owned(), key: key.into(), facts, cache: Arc::clone(&self.cache), generation, answer };
        // Not kept: the thread keeps what it finds out, however late, for the next one who asks.
        let otherwise = Arc::new(Class::unknown(hash(key), Arc::from(""), "the parser was busy"));
        match enqueue(job) {
            Some(()) => LookUp::Later(Later { receiver, otherwise }),
            None => LookUp::Known(otherwise),
        }
    }
}

impl Cache {
    fn clear(&self) {
        self.classes.clear();
        self.bytes.store(0, Ordering::Relaxed);
    }

    fn keep(&self, key: &[u8], class: &Arc<Class>, generation: u64) {
        let bytes = key.len() + class.text.len() + size_of::<Class>();
        if self.classes.len() >= CACHE_ENTRIES_MAX || self.bytes.load(Ordering::Relaxed) + bytes > CACHE_BYTES_MAX {
            self.clear();
        }
        if self.classes.insert(key.into(), Arc::clone(class)).is_none() {
            self.bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        // Facts replaced before the insertion emptied the cache without it; those replaced later empty it after it.
        if self.generation.load(Ordering::Acquire) != generation {
            self.classes.remove(key);
        }
    }
}

fn readable(text: &[u8]) -> Option<&str> {
    if text.len() > TEXT_BYTES_MAX { None } else { std::str::from_utf8(text).ok() }
}

fn unreadable(text: &[u8]) -> Arc<Class> {
    let reason = if text.len() > TEXT_BYTES_MAX { "longer than 256 KiB" } else { "not UTF-8" };
    Arc::new(Class::unknown(hash(text.get(..1024).unwrap_or(text)), Arc::from(""), reason))
}

fn shown(text: &str) -> Arc<str> {
    Arc::from(normalise::for_people(text, TEXT_CHARS_MAX))
}

fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

fn parse(text: &str, key: &[u8], facts: &CatalogFacts) -> Arc<Class> {
    let shown = shown(text);
    // The crate casts and indexes in places: a tree it did not expect must not end the session.
    let class = catch_unwind(AssertUnwindSafe(|| analyse::class(text, Arc::clone(&shown), facts))).ok().flatten();
    Arc::new(class.unwrap_or_else(|| Class::unknown(hash(key), shown, "PostgreSQL's grammar refuses it")))
}

struct Job {
    text: String,
    key: Box<[u8]>,
    facts: Arc<CatalogFacts>,
    cache: Arc<Cache>,
    generation: u64,
    answer: oneshot::Sender<Arc<Class>>,
}

/// Parks this thread until the class has come, or the time is over.
fn wait_blocking(mut receiver: oneshot::Receiver<Arc<Class>>) -> Option<Arc<Class>> {
    struct Unpark(std::thread::Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let deadline = Instant::now() + PARSER_TIMEOUT;
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    loop {
        if let Poll::Ready(answer) = Pin::new(&mut receiver).poll(&mut context) {
            return answer.ok();
        }
        let left = deadline.checked_duration_since(Instant::now())?;
        std::thread::park_timeout(left);
    }
}

fn enqueue(job: Job) -> Option<()> {
    static QUEUE: OnceLock<Option<SyncSender<Job>>> = OnceLock::new();
    QUEUE.get_or_init(start_threads).as_ref()?.try_send(job).ok()
}

/// Threads for the life of the process: they own nothing but the job in hand, so nothing waits for them at shutdown.
fn start_threads() -> Option<SyncSender<Job>> {
    let (sender, receiver) = sync_channel::<Job>(PARSER_QUEUE_MAX);
    let receiver = Arc::new(Mutex::new(receiver));
    for number in 0..PARSER_THREADS {
        let receiver = Arc::clone(&receiver);
        let run = move || {
            while let Some(job) = next_job(&receiver) {
                let class = parse(&job.text, &job.key, &job.facts);
                job.cache.keep(&job.key, &class, job.generation);
                // Nobody listens any more when it took too long.
                let _ = job.answer.send(class);
            }
        };
        std::thread::Builder::new().name(format!("sql-parser-{number}")).stack_size(PARSER_STACK_BYTES).spawn(run).ok()?;
    }
    Some(sender)
}

fn next_job(receiver: &Mutex<Receiver<Job>>) -> Option<Job> {
    receiver.lock().unwrap_or_else(PoisonError::into_inner).recv().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sql::Kind;

    #[tokio::test]
    async fn a_long_text_comes_later_and_once() {
        let classifier = Classifier::new(CatalogFacts::builtin_only());
        let text = format!("SELECT 1 WHERE 1 IN ({}1)", "1, ".repeat(INLINE_BYTES_MAX / 2));
        let LookUp::Later(later) = classifier.look_up(text.as_bytes()) else { panic!("parsed on the caller's stack") };
        later.wait().await;
        // what came too late on a loaded machine is in the cache soon
        let deadline = Instant::now() + Duration::from_secs(60);
        while classifier.cached(text.as_bytes()).is_none() {
            assert!(Instant::now() < deadline);
            tokio::task::yield_now().await;
        }
        assert_eq!(classifier.classify(text.as_bytes()).kind, Kind::Read);
        assert!(matches!(classifier.look_up(text.as_bytes()), LookUp::Known(_)));
    }

    #[tokio::test]
    async fn a_parser_that_takes_for_ever_is_not_waited_for() {
        let (_never, receiver) = oneshot::channel();
        let later = Later { receiver, otherwise: Arc::new(Class::unknown(1, Arc::from(""), "the parser was busy")) };
        assert_eq!(later.wait().await.kind, Kind::Unknown);
        let (_never, receiver) = oneshot::channel();
        assert!(wait_blocking(receiver).is_none());
    }

    #[test]
    fn a_short_text_is_known_at_once() {
        let classifier = Classifier::new(CatalogFacts::builtin_only());
        assert!(matches!(classifier.look_up(b"SELECT 1"), LookUp::Known(class) if class.kind == Kind::Read));
    }
}
