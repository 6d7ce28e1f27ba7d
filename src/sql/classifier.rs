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
    hash::{Hash, Hasher},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    time::Duration,
};

/// Longer texts are not parsed: a bulk load, not a statement worth comparing.
const TEXT_BYTES_MAX: usize = 256 << 10;
/// Longest text parsed on the caller's stack.
const INLINE_BYTES_MAX: usize = 2 << 10;
/// Deepest nesting parsed on the caller's stack.
const INLINE_DEPTH_MAX: usize = 12;
/// Most operators parsed on the caller's stack: a chain of them nests as deep as it is long.
const INLINE_OPERATORS_MAX: usize = 120;
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
        let Some(text) = readable(text) else { return unreadable(text) };
        KEY.with_borrow_mut(|key| {
            key.shrink_to(TEXT_BYTES_MAX / 8);
            let shape = match normalise::normalise(text, key) {
                Ok(shape) => shape,
                Err(normalise::Uncertain(reason)) => return Arc::new(Class::unknown(hash(text.as_bytes()), shown(text), reason)),
            };
            if let Some(class) = self.cache.classes.get(&key[..]) {
                return Arc::clone(&class);
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

    fn classify_anew(&self, text: &str, key: &[u8], shape: normalise::Shape) -> Arc<Class> {
        let generation = self.cache.generation.load(Ordering::Acquire);
        let facts = self.facts.load_full();
        let flat = shape.depth <= INLINE_DEPTH_MAX && shape.operators <= INLINE_OPERATORS_MAX;
        if text.len() <= INLINE_BYTES_MAX && flat {
            let class = parse(text, key, &facts);
            self.cache.keep(key, &class, generation);
            return class;
        }
        let (answer, receiver) = sync_channel(1);
        let job = Job { text: text.to_owned(), key: key.into(), facts, cache: Arc::clone(&self.cache), generation, answer };
        // Not kept: the thread keeps what it finds out, however late, for the next one who asks.
        enqueue(job)
            .and_then(|()| receiver.recv_timeout(PARSER_TIMEOUT).ok())
            .unwrap_or_else(|| Arc::new(Class::unknown(hash(key), shown(text), "the parser was busy")))
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
    answer: SyncSender<Arc<Class>>,
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
                let _ = job.answer.try_send(class);
            }
        };
        std::thread::Builder::new().name(format!("sql-parser-{number}")).stack_size(PARSER_STACK_BYTES).spawn(run).ok()?;
    }
    Some(sender)
}

fn next_job(receiver: &Mutex<Receiver<Job>>) -> Option<Job> {
    receiver.lock().unwrap_or_else(PoisonError::into_inner).recv().ok()
}
