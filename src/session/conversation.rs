//! The bookkeeping of one client's conversation with its server: pure, no sockets.
//!
//! It follows which request cycles are outstanding (a cycle ends with the ReadyForQuery of a Sync, Query or FunctionCall),
//! which statements exist under which names, what each cycle ran, and what a later move or copy needs to know.
//! Sources: PostgreSQL documentation, "Message Flow: Extended Query, Pipelining, COPY Operations"; `src/backend/tcop/postgres.c`.

use crate::{
    pool::{Known, StatementKey},
    sql::{Class, Classifier, Kind, SessionEffect},
    traffic::{answer::Answer, copies::Operation},
    wire::{
        Message,
        backend::TransactionStatus,
        frontend::{self, Parse},
        take_cstr,
    },
};
use bytes::{Bytes, BytesMut};
use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

mod memory;
mod naming;
mod touched;

pub use memory::Memory;
pub use naming::memmem;
pub use touched::Touched;

/// Prepared statements remembered per session, so that they can be prepared again elsewhere; beyond it a session counts as
/// not movable rather than growing without bound.
const STATEMENTS_MAX: usize = 10_000;
/// Names of custom settings remembered per session.
const CUSTOM_MAX: usize = 64;
/// Longest such name.
const CUSTOM_NAME_BYTES_MAX: usize = 128;
/// Operations remembered per cycle for copies; longer pipelines are not copied.
const OPERATIONS_MAX: usize = 64;

/// A prepared statement of the client.
#[derive(Clone, Debug)]
pub struct Statement {
    /// Text and parameter types.
    pub parse: Arc<Parse>,
    /// What it is.
    pub class: Arc<Class>,
    /// The classifier's generation of facts that say so.
    pub facts: u64,
    /// The server generation on which it exists; see [`Conversation::generation`].
    pub prepared_on: u32,
    /// How many the client has parsed before it.
    pub born: u64,
    /// What it is called on pooled servers; `None`: as the client calls it.
    pub key: Option<StatementKey>,
}

/// Answers that the server owes within a cycle, in order.
#[derive(Debug)]
enum Pending {
    /// ParseComplete for the client.
    Parse { name: Bytes, statement: Statement },
    /// ParseComplete for a statement that was too large to be kept: what had its name before is gone.
    LargeParse { name: Bytes },
    /// ParseComplete for a statement that we prepared again: swallowed.
    Injected { name: Bytes, key: Option<StatementKey> },
    /// CloseComplete of a statement that only we know of: swallowed.
    InjectedClose,
    /// CloseComplete of a statement.
    CloseStatement { name: Bytes },
    /// CloseComplete of a portal.
    ClosePortal,
}

/// One statement of a cycle with what came back.
#[derive(Debug)]
pub struct Executed {
    /// What was run.
    pub operation: Operation,
    /// What it is.
    pub class: Arc<Class>,
    /// Command tags.
    pub tags: Vec<Bytes>,
}

/// A request cycle.
#[derive(Debug)]
pub struct Cycle {
    /// When its last message was taken from the client.
    sent: Option<Instant>,
    /// A Query or FunctionCall: its ReadyForQuery needs no Sync.
    simple: bool,
    /// Has messages of the extended protocol: an error in it makes the server skip to the next Sync.
    extended: bool,
    /// The client has ended the cycle; ReadyForQuery is owed.
    complete: bool,
    /// Messages of the extended protocol that have not been answered: an error meanwhile is theirs, not that of a Query
    /// behind them.
    unanswered: usize,
    /// The server skips everything up to the next Sync.
    skipping: bool,
    /// CopyDone and CopyFail taken from the client in this cycle, before and behind its end, that no COPY has used up.
    copies_ended: [u32; 2],
    /// Some of it has been answered.
    answered: bool,
    pending: VecDeque<Pending>,
    /// Statements that have another name on the server, and the client's, as its messages refer to them.
    named: Vec<(StatementKey, Bytes)>,
    /// What it ran, in order; empty unless copies are wanted.
    pub executed: Vec<Executed>,
    /// How many statements it ran.
    ran: usize,
    /// Some message held several statements.
    several: bool,
    /// Some statement is DDL.
    pub changes_schema: bool,
    /// What it says about the schema, until somebody takes it.
    pub schema_text: Option<Bytes>,
    answering: usize,
    /// Something other than a pure read was asked for.
    pub wrote: bool,
    /// An error came back.
    pub failed: bool,
    /// What statements do to the session, their texts where those count, and how many were parsed before.
    effects: Vec<(SessionEffect, Bytes, u64)>,
    /// More statements than are remembered, or one too large to look at.
    pub opaque: bool,
    /// The answer is being reduced for comparison.
    pub capture: Option<Answer>,
}

impl Cycle {
    /// How long ago its last message was taken from the client.
    pub fn latency(&self) -> Duration {
        self.sent.map_or(Duration::ZERO, |sent| sent.elapsed())
    }

    fn new() -> Self {
        Cycle {
            sent: None,
            simple: false,
            extended: false,
            complete: false,
            unanswered: 0,
            skipping: false,
            copies_ended: [0; 2],
            answered: false,
            pending: VecDeque::new(),
            named: Vec::new(),
            executed: Vec::new(),
            ran: 0,
            several: false,
            changes_schema: false,
            schema_text: None,
            answering: 0,
            wrote: false,
            failed: false,
            effects: Vec::new(),
            opaque: false,
            capture: None,
        }
    }
}

/// What a ReadyForQuery ended.
#[derive(Debug)]
pub struct Finished {
    /// The cycle.
    pub cycle: Cycle,
    /// Transaction status after it.
    pub status: TransactionStatus,
    /// Session state changed in a way that another server would have to be told.
    pub state_changed: bool,
}

/// What to do with a message of the client.
#[derive(Debug, Default, PartialEq)]
pub struct Forward {
    /// Bytes to send to the server before the message: statements prepared again.
    pub before: Option<BytesMut>,
    /// How many bytes of the message's body, from its start, they stand for, header included: those are not sent themselves.
    pub instead: usize,
}

/// What to do with a message of the server.
#[derive(Debug)]
pub enum FromServer {
    /// To the client.
    Forward,
    /// The client did not ask for it.
    Swallow,
    /// To the client; a cycle has ended.
    Finished(Box<Finished>),
}

/// One client's conversation.
#[derive(Debug)]
pub struct Conversation {
    cycles: VecDeque<Cycle>,
    /// Messages of the client since its last Sync or Query belong to an unfinished cycle.
    batch_open: bool,
    /// The server is in COPY IN for an extended Execute: it ignores Sync until CopyDone or CopyFail.
    copy_in: bool,
    /// Names of settings with a dot that the client may have set.
    custom: Vec<String>,
    /// The server waits for CopyData of either protocol.
    data_wanted: bool,
    status: TransactionStatus,
    statements: HashMap<Bytes, Statement>,
    portals: Vec<(Bytes, Statement, Bytes, bool)>,
    /// Statements parsed so far.
    parsed: u64,
    /// Grows with each change of server: statements of older generations are prepared again before use.
    pub generation: u32,
    /// What keeps the session where it is.
    pub pins: Vec<&'static str>,
    /// Copies are wanted: remember operations.
    pub recording: bool,
    /// More statements were prepared than are remembered.
    pub forgot_statements: bool,
    /// The class of the Query or Parse that is taken in next, where it is known already.
    pub class_ahead: Option<Arc<Class>>,
    /// Of the pooled connection that is lent to the session; `None`: it has one of its own, or none.
    pub known: Option<Known>,
    /// Stands for the settings that give a statement's names their meaning, in pooled sessions.
    pub salt: u64,
    /// What a pooled session may have changed since it was last looked at.
    pub touched: Touched,
    /// How much of it there is.
    pub memory: Memory,
}

impl Default for Conversation {
    fn default() -> Self {
        Conversation {
            cycles: VecDeque::new(),
            batch_open: false,
            copy_in: false,
            custom: Vec::new(),
            data_wanted: false,
            status: TransactionStatus::Idle,
            statements: HashMap::new(),
            portals: Vec::new(),
            parsed: 0,
            generation: 1,
            pins: Vec::new(),
            recording: false,
            forgot_statements: false,
            class_ahead: None,
            known: None,
            salt: 0,
            touched: Touched::default(),
            memory: Memory::default(),
        }
    }
}

impl Conversation {
    /// Between two transactions, nothing outstanding: the only moment at which a session may be held, moved or served.
    #[inline]
    pub fn at_boundary(&self) -> bool {
        self.cycles.is_empty() && !self.batch_open && self.status == TransactionStatus::Idle
    }

    /// A query for those settings of extensions and applications (`app.tenant`) that the client may have set: pg_settings does
    /// not list them. Empty: none.
    pub fn custom_settings(&self) -> String {
        let names = self.custom.iter().map(|name| format!("SELECT '{name}', pg_catalog.current_setting('{name}', true)"));
        names.collect::<Vec<_>>().join(" UNION ALL ")
    }

    /// Remembers every word that may be the name of such a setting; one too many does no harm.
    fn note_custom_settings(&mut self, text: &[u8]) {
        let plain = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'$');
        for word in text.split(|byte| !plain(byte)) {
            let parts = || word.split(|byte| *byte == b'.');
            let named =
                parts().count() > 1 && parts().all(|part| part.first().is_some_and(|first| !first.is_ascii_digit() && *first != b'$'));
            let Ok(word) = std::str::from_utf8(word) else { continue };
            if named
                && word.len() < CUSTOM_NAME_BYTES_MAX
                && self.custom.len() < CUSTOM_MAX
                && !self.custom.iter().any(|known| known == word)
            {
                self.custom.push(word.to_owned());
            }
        }
    }

    /// The client has asked for something that the server can still answer without another byte of the client.
    pub fn owes_answers(&self) -> bool {
        !self.data_wanted && self.cycles.iter().any(|cycle| cycle.complete)
    }

    /// Every message of the client that has been taken is answered. Not so, and nothing is owed: the server may be at work, or keep
    /// its answers until a Flush or Sync. What it skips behind an error is answered by that.
    pub fn is_answered(&self) -> bool {
        self.cycles.iter().all(|cycle| cycle.unanswered == 0 || cycle.skipping)
    }

    /// A COPY waits for the client's data.
    pub fn takes_data(&self) -> bool {
        self.data_wanted
    }

    /// Transaction status of the last ReadyForQuery.
    pub fn status(&self) -> TransactionStatus {
        self.status
    }

    /// A statement by name.
    pub fn statement(&self, name: &[u8]) -> Option<&Statement> {
        self.statements.get(name)
    }

    /// The open cycle, made if there is none.
    fn open(&mut self) -> &mut Cycle {
        if !self.batch_open {
            self.batch_open = true;
            self.cycles.push_back(Cycle::new());
            self.portals.clear();
        }
        let last = self.cycles.len() - 1;
        &mut self.cycles[last]
    }

    /// Marks the newest cycle for comparison of its answer.
    pub fn capture_newest(&mut self) {
        // an error is sent before the client's Sync, rows behind a Flush as well: half an answer would be compared
        if let Some(cycle) = self.cycles.back_mut().filter(|cycle| !cycle.answered) {
            cycle.capture = Some(Answer::default());
        }
    }

    /// The newest cycle.
    pub fn newest(&self) -> Option<&Cycle> {
        self.cycles.back()
    }

    /// The schema change that the cycle just taken from the client contains, once.
    pub fn take_schema_text(&mut self) -> Option<Bytes> {
        self.cycles.back_mut().filter(|cycle| cycle.changes_schema)?.schema_text.take()
    }

    /// Only one cycle is outstanding: it began at a boundary.
    pub fn is_alone(&self) -> bool {
        self.cycles.len() == 1
    }

    /// The head cycle's answer is being captured.
    pub fn is_capturing(&self) -> bool {
        self.cycles.front().is_some_and(|cycle| cycle.capture.is_some())
    }

    /// Gives up capturing the head cycle's answer when it is too large.
    pub fn drop_capture_if(&mut self, too_large: bool) {
        if let Some(cycle) = self.cycles.front_mut().filter(|_| too_large) {
            cycle.capture = None;
        }
    }

    /// A message too large to be looked at is about to be streamed to the server; `len`: its bytes, header included; `start`:
    /// what has come of its body, names included.
    pub fn large_message(&mut self, tag: u8, len: usize, start: &[u8]) -> Forward {
        let mut rest = start;
        if self.known.is_some() && tag != b'd' {
            self.touched.everything();
        }
        match tag {
            b'd' => {}
            b'Q' | b'F' if self.batch_open && self.open().skipping => {}
            b'Q' | b'F' => {
                let cycle = self.open();
                (cycle.wrote, cycle.opaque, cycle.simple, cycle.complete) = (true, true, true, true);
                cycle.sent = Some(Instant::now());
                self.batch_open = false;
            }
            _ => {
                let cycle = self.open();
                (cycle.wrote, cycle.opaque, cycle.extended) = (true, true, true);
                cycle.unanswered += 1;
                if tag == b'P' {
                    // its ParseComplete is owed, but we will not be able to prepare it again
                    let name = Bytes::copy_from_slice(take_cstr(&mut rest).unwrap_or_default());
                    self.keep_large_statement(&name);
                    let cycle = self.open();
                    cycle.pending.push_back(Pending::LargeParse { name });
                    self.forgot_statements = true;
                }
                if tag == b'B'
                    && let (Some(portal), Some(name)) = (take_cstr(&mut rest), take_cstr(&mut rest))
                {
                    self.portals.retain(|(existing, ..)| existing != portal);
                    return self.bind_as(portal, name, len, None);
                }
            }
        }
        Forward::default()
    }

    /// The text whose class a message of the client is about to need.
    #[inline]
    pub fn text_in(tag: u8, body: &[u8]) -> Option<&[u8]> {
        match tag {
            b'Q' => Some(body.strip_suffix(b"\0").unwrap_or(body)),
            b'P' => {
                let mut rest = body;
                take_cstr(&mut rest)?;
                take_cstr(&mut rest)
            }
            _ => None,
        }
    }

    /// Takes in a whole message of the client.
    pub fn from_client(&mut self, tag: u8, body: &[u8], classifier: &Classifier) -> Forward {
        let mut forward = Forward::default();
        // a Flush that is not empty is an error, and errors of the extended protocol skip to the next Sync
        if matches!(tag, b'P' | b'B' | b'D' | b'E' | b'C') || (tag == b'H' && !body.is_empty()) {
            let cycle = self.open();
            cycle.extended = true;
            cycle.unanswered += 1;
        }
        match tag {
            b'Q' | b'F' if self.batch_open && self.open().skipping => {} // the server skips it, and answers the Sync to come
            b'Q' => {
                let text = body.strip_suffix(b"\0").unwrap_or(body);
                let class = self.class_ahead.take().unwrap_or_else(|| classifier.classify(text));
                let recording = self.recording;
                if class.session_effects.contains(&SessionEffect::Set) {
                    self.note_custom_settings(text);
                }
                if self.known.is_some() {
                    forward.before = self.before_query(&class, text);
                }
                let parsed = self.parsed;
                let cycle = self.open();
                cycle.note(&class, text, parsed);
                if recording {
                    let operation = Operation::Simple(Bytes::copy_from_slice(text));
                    cycle.executed.push(Executed { operation, class, tags: Vec::new() });
                }
                (cycle.simple, cycle.complete) = (true, true);
                cycle.sent = Some(Instant::now());
                self.batch_open = false;
            }
            b'F' => {
                self.touched.everything();
                let cycle = self.open();
                (cycle.wrote, cycle.opaque, cycle.simple, cycle.complete) = (true, true, true, true);
                cycle.sent = Some(Instant::now());
                self.batch_open = false;
            }
            b'P' => forward = self.parse(body, classifier),
            b'B' => {
                let mut rest = body;
                if let (Some(portal), Some(name)) = (take_cstr(&mut rest), take_cstr(&mut rest)) {
                    forward = self.bind_as(portal, name, body.len() + 5, Some(rest));
                    self.bind(portal, name, rest, classifier);
                } else {
                    self.open().opaque = true;
                }
            }
            b'D' => {
                if let Some((b'S', name)) = split_target(body) {
                    forward = self.describe_as(name, body.len() + 5);
                }
                self.open();
            }
            b'E' => forward.before = self.execute(body),
            b'C' => {
                let pending = match split_target(body) {
                    Some((b'S', name)) => Pending::CloseStatement { name: Bytes::copy_from_slice(name) },
                    _ => Pending::ClosePortal,
                };
                self.open().pending.push_back(pending);
                self.remembers(0);
            }
            // alone it asks for nothing and nothing answers it
            b'H' => {}
            b'S' if self.copy_in => {} // the server ignores Sync while it copies in
            b'S' => {
                let cycle = self.open();
                cycle.complete = true;
                cycle.sent = Some(Instant::now());
                self.batch_open = false;
            }
            b'c' | b'f' => {
                if let Some(cycle) = self.cycles.back_mut().filter(|_| !self.copy_in) {
                    cycle.copies_ended[usize::from(cycle.complete)] += 1;
                }
                (self.copy_in, self.data_wanted) = (false, false);
            }
            _ => {}
        }
        forward
    }

    fn parse(&mut self, body: &[u8], classifier: &Classifier) -> Forward {
        let mut rest = body;
        let (Some(name), Some(text)) = (take_cstr(&mut rest), take_cstr(&mut rest)) else {
            self.open().opaque = true;
            return Forward::default();
        };
        let facts = classifier.generation();
        let class = self.class_ahead.take().unwrap_or_else(|| classifier.classify(text));
        let name = Bytes::copy_from_slice(name);
        let parse = Arc::new(Parse { name: name.clone(), query: Bytes::copy_from_slice(text), types: Bytes::copy_from_slice(rest) });
        self.parsed += 1;
        let mut statement = Statement { parse, class, facts, prepared_on: self.generation, born: self.parsed, key: None };
        let forward = self.parse_as(&mut statement, body.len() + 5);
        let bytes = statement.parse.query.len();
        self.open().pending.push_back(Pending::Parse { name, statement });
        self.remembers(bytes);
        forward
    }

    /// The statement of that name as the client sees it now, and whether it was parsed earlier in this very cycle. A
    /// Parse may also be outstanding in an earlier cycle of the pipeline.
    fn lookup(&self, name: &[u8]) -> Option<(Statement, bool)> {
        let newest_first = self.cycles.iter().rev().enumerate();
        let parsed = newest_first.flat_map(|(age, cycle)| cycle.pending.iter().rev().map(move |pending| (age, pending)));
        let outstanding = parsed.into_iter().find_map(|(age, pending)| match pending {
            Pending::Parse { name: parsed, statement } if parsed == name => Some(Some((statement.clone(), age))),
            Pending::LargeParse { name: parsed } if parsed == name => Some(None),
            _ => None,
        });
        match outstanding {
            Some(found) => found.map(|(statement, age)| (statement, age == 0 && self.batch_open)),
            None => self.statements.get(name).map(|statement| (statement.clone(), false)),
        }
    }

    /// If the statement does not exist on the present server yet, the bytes that prepare it there, under the client's name.
    fn inject(&mut self, name: &[u8]) -> Option<BytesMut> {
        let generation = self.generation;
        let (statement, parsed_here) = self.lookup(name)?;
        // by an earlier cycle of the pipeline: an error there may skip that
        let injected = |pending: &Pending| matches!(pending, Pending::Injected { name: injected, .. } if injected == name);
        let uncertain = self.cycles.iter().take(self.earlier_cycles()).any(|cycle| cycle.pending.iter().any(injected));
        if parsed_here || (statement.prepared_on == generation && !uncertain) {
            return None;
        }
        let mut bytes = BytesMut::new();
        if uncertain {
            naming::put_close(&mut bytes, name);
            let cycle = self.open();
            (cycle.extended, cycle.unanswered) = (true, cycle.unanswered + 1);
            cycle.pending.push_back(Pending::InjectedClose);
        }
        statement.parse.put_as(&mut bytes, name);
        let name = Bytes::copy_from_slice(name);
        if let Some(stored) = self.statements.get_mut(&name) {
            stored.prepared_on = generation;
        }
        let cycle = self.open();
        cycle.unanswered += 1;
        cycle.pending.push_back(Pending::Injected { name, key: None });
        Some(bytes)
    }

    fn bind(&mut self, portal: &[u8], name: &[u8], rest: &[u8], classifier: &Classifier) {
        let mut found = self.lookup(name);
        if let Some((statement, _)) = &mut found
            && statement.facts != classifier.generation()
        {
            // what it reaches may have changed since it was parsed
            statement.facts = classifier.generation();
            statement.class = classifier.classify(&statement.parse.query);
            if let Some(stored) = self.statements.get_mut(name).filter(|stored| stored.parse == statement.parse) {
                (stored.facts, stored.class) = (statement.facts, statement.class.clone());
            }
        }
        self.open();
        let recording = self.recording;
        // whatever the name meant before: an Execute must not take the old portal for this one
        self.portals.retain(|(existing, ..)| existing != portal);
        if let Some((statement, parsed_here)) = found {
            if statement.class.session_effects.contains(&SessionEffect::Set) {
                self.note_custom_settings(&statement.parse.query);
                self.note_custom_settings(rest); // set_config($1, $2, $3)
            }
            let bind = if recording { Bytes::copy_from_slice(rest) } else { Bytes::new() };
            if self.portals.len() < OPERATIONS_MAX {
                self.portals.push((Bytes::copy_from_slice(portal), statement, bind, parsed_here));
            }
        }
    }

    fn execute(&mut self, body: &[u8]) -> Option<BytesMut> {
        let mut rest = body;
        let portal = take_cstr(&mut rest).unwrap_or_default();
        let limit = crate::wire::take_i32(&mut rest).unwrap_or_default();
        let found = self.portals.iter().find(|(name, ..)| name == portal).cloned();
        let recording = self.recording;
        let mut before = None;
        if let (Some(_), Some((_, statement, ..))) = (&self.known, &found) {
            before = self.before_execution(&statement.class, &statement.parse.query);
        } else if found.is_none() {
            self.touched.everything();
        }
        let parsed = self.parsed;
        let cycle = self.open();
        match found {
            Some((_, statement, bind, parsed_here)) => {
                let class = statement.class.clone();
                cycle.note(&class, &statement.parse.query, parsed);
                if cycle.ran > OPERATIONS_MAX {
                    // what it does to the session counts all the same
                    cycle.opaque = true;
                    return before;
                }
                if recording {
                    let operation = Operation::Extended { parse: statement.parse, bind, limit, parsed_here };
                    cycle.executed.push(Executed { operation, class, tags: Vec::new() });
                }
            }
            None => (cycle.opaque, cycle.wrote) = (true, true),
        }
        before
    }

    /// Takes in a message of the server.
    pub fn from_server(&mut self, tag: u8, body: &[u8]) -> FromServer {
        let Some(cycle) = self.cycles.front_mut() else {
            if tag == b'Z' {
                self.status = TransactionStatus::parse(body).unwrap_or(TransactionStatus::Failed);
            }
            return FromServer::Forward;
        };
        match tag {
            b'W' => self.data_wanted = true,
            b'C' | b'E' | b'Z' => self.data_wanted = false,
            _ => {}
        }
        cycle.answered |= !matches!(tag, b'A' | b'N' | b'S');
        let of_extended = cycle.unanswered > 0 && !cycle.skipping;
        if matches!(tag, b'1' | b'2' | b'3' | b'T' | b'n' | b'C' | b'I' | b's') {
            cycle.unanswered = cycle.unanswered.saturating_sub(1);
        }
        match tag {
            b'1' => match cycle.pending.pop_front() {
                Some(Pending::Injected { name, .. }) => {
                    if let Some(stored) = self.statements.get_mut(&name) {
                        stored.prepared_on = self.generation; // an earlier try may have failed
                    }
                    return FromServer::Swallow;
                }
                Some(Pending::Parse { name, statement }) => self.remember(name, statement),
                Some(Pending::LargeParse { name }) => {
                    self.statements.remove(&name);
                }
                Some(Pending::CloseStatement { .. } | Pending::ClosePortal | Pending::InjectedClose) | None => {}
            },
            b'3' => match cycle.pending.pop_front() {
                Some(Pending::InjectedClose) => return FromServer::Swallow,
                Some(Pending::CloseStatement { name }) => {
                    self.statements.remove(&name);
                }
                _ => {}
            },
            b'C' => {
                let tag = body.strip_suffix(b"\0").unwrap_or(body);
                if let Some(executed) = cycle.executed.get_mut(cycle.answering) {
                    executed.tags.push(Bytes::copy_from_slice(tag));
                    cycle.answering += usize::from(!cycle.simple);
                }
            }
            b'I' | b's' => cycle.answering += usize::from(!cycle.simple),
            b'E' => self.failed(of_extended),
            b'G' => self.enter_copy_in(),
            b'Z' => return self.ready(body),
            _ => {}
        }
        if let Some(capture) = self.cycles.front_mut().and_then(|cycle| cycle.capture.as_mut()) {
            match tag {
                b'D' => capture.row(body),
                b'T' | b'C' | b'E' => capture.take_in(&Message { tag, body: Bytes::copy_from_slice(body) }),
                _ => {}
            }
        }
        FromServer::Forward
    }

    /// `CopyInResponse`: the server ignores every Sync up to the next CopyDone or CopyFail, also those already sent.
    fn enter_copy_in(&mut self) {
        let Some(mut cycle) = self.cycles.pop_front() else { return };
        let mut ended = cycle.use_copy_end(false);
        if cycle.simple {
            ended = ended || cycle.use_copy_end(true);
            while !ended && self.cycles.front().is_some_and(|later| later.complete && !later.simple && !later.extended) {
                ended = self.cycles.pop_front().is_some_and(|mut swallowed| swallowed.use_copy_end(true));
            }
        } else if !ended && cycle.complete {
            // its Sync was swallowed: the cycle goes on until the next Sync behind the copy
            ended = cycle.use_copy_end(true);
            cycle.complete = false;
            while let Some(mut later) = (!cycle.complete).then(|| self.cycles.pop_front()).flatten() {
                ended = ended || later.use_copy_end(false);
                cycle.complete = ended && later.complete;
                cycle.simple = ended && later.simple;
                ended = ended || later.use_copy_end(true);
                cycle.absorb(later);
            }
            self.batch_open |= !cycle.complete;
        }
        (self.copy_in, self.data_wanted) = (!ended, !ended);
        self.cycles.push_front(cycle);
    }

    /// The rest of the head cycle is skipped by the server.
    fn failed(&mut self, of_extended: bool) {
        let mut not_prepared = Vec::new();
        if let Some(cycle) = self.cycles.front_mut() {
            cycle.failed = true;
        }
        if of_extended {
            self.skip_to_sync();
        }
        if let Some(cycle) = self.cycles.front_mut() {
            for pending in cycle.pending.drain(..) {
                forget_in(&mut self.known, &pending);
                if let Pending::Injected { name, .. } = pending {
                    not_prepared.push(name);
                }
            }
        }
        self.copy_in = false;
        for name in not_prepared {
            if let Some(statement) = self.statements.get_mut(&name) {
                statement.prepared_on = 0;
            }
        }
    }

    /// Whatever the client has sent behind the failed message up to its next Sync is skipped by the server, a Query too.
    fn skip_to_sync(&mut self) {
        let Some(mut cycle) = self.cycles.pop_front() else { return };
        while cycle.simple || !cycle.complete {
            cycle.simple = false;
            cycle.complete = false;
            let Some(later) = self.cycles.pop_front() else {
                cycle.skipping = true;
                self.batch_open = true;
                break;
            };
            (cycle.simple, cycle.complete) = (later.simple, later.complete);
            (cycle.wrote, cycle.opaque) = (cycle.wrote | later.wrote, true);
            cycle.pending.extend(later.pending);
        }
        self.cycles.push_front(cycle);
    }

    fn remember(&mut self, name: Bytes, statement: Statement) {
        if self.statements.len() >= STATEMENTS_MAX && !self.statements.contains_key(&name) {
            self.forgot_statements = true;
            return;
        }
        self.statements.insert(name, statement);
    }

    /// Remembers the unnamed statement of a read that a shadow served: the owner has not seen it.
    pub fn served_unnamed(&mut self, parse: Arc<Parse>, class: Arc<Class>) {
        self.remember(Bytes::new(), Statement { parse, class, facts: 0, prepared_on: 0, born: self.parsed, key: None });
    }

    fn ready(&mut self, body: &[u8]) -> FromServer {
        let Some(cycle) = self.cycles.pop_front() else { return FromServer::Forward };
        if self.cycles.is_empty() && !cycle.complete {
            // the server ended a cycle that the client has not: it knows better
            self.batch_open = false;
        }
        self.copy_in = false;
        for pending in &cycle.pending {
            // taken from the client after the error: the server has skipped it
            forget_in(&mut self.known, pending);
            if let Pending::Injected { name, .. } = pending
                && let Some(statement) = self.statements.get_mut(name)
            {
                statement.prepared_on = 0;
            }
        }
        self.status = TransactionStatus::parse(body).unwrap_or(TransactionStatus::Failed);
        let mut state_changed = false;
        // of several statements some may have taken effect before one failed, and a lock outlives the error behind it
        let several = cycle.opaque || cycle.ran > 1 || cycle.several;
        for (effect, text, parsed) in &cycle.effects {
            let forgets = matches!(effect, SessionEffect::Deallocate | SessionEffect::DiscardAll);
            if !cycle.failed || (several && !forgets) || *effect == SessionEffect::AdvisoryLock {
                state_changed |= self.apply(*effect, text, *parsed);
            }
        }
        FromServer::Finished(Box::new(Finished { cycle, status: self.status, state_changed }))
    }

    /// Applies a session effect; `parsed`: how many statements had been parsed before. True: another server would have to be told.
    fn apply(&mut self, effect: SessionEffect, text: &[u8], parsed: u64) -> bool {
        use crate::traffic::database::pin;
        let pin = match effect {
            SessionEffect::Set | SessionEffect::Reset => pin::SETTINGS,
            SessionEffect::Listen | SessionEffect::Unlisten => pin::LISTEN,
            SessionEffect::TempTable => pin::TEMPORARY_TABLE,
            SessionEffect::DeclareHold => pin::HELD_CURSOR,
            SessionEffect::SqlPrepare => pin::SQL_PREPARE,
            SessionEffect::AdvisoryLock => pin::ADVISORY_LOCK,
            SessionEffect::Load => pin::OTHER,
            SessionEffect::Deallocate => {
                self.deallocate(text, parsed);
                return true;
            }
            SessionEffect::DiscardAll => {
                self.statements.retain(|_, statement| statement.born > parsed);
                self.pins.clear();
                return true;
            }
            SessionEffect::Other if self.known.is_some() => pin::OTHER,
            SessionEffect::DeclareCursor | SessionEffect::SqlExecute | SessionEffect::Other => return false,
        };
        if !self.pins.contains(&pin) {
            self.pins.push(pin);
        }
        true
    }

    /// What was parsed behind it in the same pipeline is not meant.
    fn deallocate(&mut self, text: &[u8], parsed: u64) {
        match naming::deallocated(text) {
            Some(naming::Deallocated::All) => self.statements.retain(|name, statement| name.is_empty() || statement.born > parsed),
            Some(naming::Deallocated::One(one)) => self.statements.retain(|name, statement| *name != one || statement.born > parsed),
            None => {}
        }
    }
}

/// Longest schema change that is assessed while it is on its way.
const SCHEMA_TEXT_MAX: usize = 64 << 10;

/// A statement whose preparation the server has skipped is not there.
fn forget_in(known: &mut Option<Known>, pending: &Pending) {
    let key = match pending {
        Pending::Parse { statement, .. } => statement.key,
        Pending::Injected { key, .. } => *key,
        Pending::LargeParse { .. } | Pending::InjectedClose | Pending::CloseStatement { .. } | Pending::ClosePortal => None,
    };
    if let (Some(known), Some(key)) = (known, key) {
        known.remove(key);
    }
}

impl Cycle {
    /// Takes a CopyDone or CopyFail that the client has sent before (or behind) the end of this cycle. False: there is none.
    fn use_copy_end(&mut self, behind: bool) -> bool {
        let ends = &mut self.copies_ended[usize::from(behind)];
        let there = *ends > 0;
        *ends = ends.saturating_sub(1);
        there
    }

    /// What the client took for a later cycle belongs to this one.
    fn absorb(&mut self, later: Cycle) {
        self.opaque |= later.opaque || later.ran > 0;
        self.ran += later.ran;
        self.several |= later.several;
        self.changes_schema |= later.changes_schema;
        self.wrote |= later.wrote;
        self.unanswered += later.unanswered;
        self.pending.extend(later.pending);
        self.effects.extend(later.effects);
        let [before, behind] = later.copies_ended;
        if self.complete {
            self.copies_ended[0] += before;
            self.copies_ended[1] += behind;
        } else {
            self.copies_ended[0] += before + behind;
        }
    }

    fn note(&mut self, class: &Class, text: &[u8], parsed: u64) {
        self.wrote |= class.kind != Kind::Read && !class.is_idle();
        if class.kind == Kind::SchemaChange {
            self.changes_schema = true;
            if text.len() <= SCHEMA_TEXT_MAX {
                self.schema_text = Some(Bytes::copy_from_slice(text));
            }
        }
        self.several |= !class.single;
        self.ran += 1;
        if !class.session_effects.is_empty() {
            let discards = naming::is_discard(text);
            let text = if class.session_effects.contains(&SessionEffect::Deallocate) { Bytes::copy_from_slice(text) } else { Bytes::new() };
            for effect in &class.session_effects {
                if *effect == SessionEffect::Other && discards {
                    continue; // it leaves less behind, not more
                }
                match self.effects.iter_mut().find(|(known, of, _)| known == effect && *of == text) {
                    Some((.., at)) => *at = parsed,
                    None => self.effects.push((*effect, text.clone(), parsed)),
                }
            }
        }
    }
}

fn split_target(body: &[u8]) -> Option<(u8, &[u8])> {
    let (kind, mut rest) = body.split_first()?;
    Some((*kind, take_cstr(&mut rest)?))
}

/// A whole request cycle that stands at the start of a buffer and consists of one statement: what serving needs.
#[derive(Debug, PartialEq)]
pub enum WholeCycle {
    /// `Query`
    Simple {
        /// Bytes of the cycle.
        len: usize,
        /// Text.
        text: Bytes,
    },
    /// `[Parse] Bind [Describe portal] Execute Sync`, all on the unnamed portal.
    Extended {
        /// Bytes of the cycle.
        len: usize,
        /// The Parse, if it is part of the cycle (unnamed only).
        parse: Option<Parse>,
        /// The Bind.
        bind: frontend::Bind,
        /// A Describe of the portal is part of it.
        describe: bool,
        /// Row limit of the Execute.
        limit: i32,
    },
}

/// Looks for a [`WholeCycle`]; `None`: something else, incomplete, or longer than `max` bytes.
pub fn whole_cycle(buffer: &[u8], max: usize) -> Option<WholeCycle> {
    let (mut at, mut parse, mut bind, mut describe, mut limit) = (0, None, None, false, None);
    loop {
        let rest = buffer.get(at..)?;
        let header = crate::wire::peek(rest).ok()??;
        let body = rest.get(5..header.len)?;
        at += header.len;
        if at > max {
            return None;
        }
        let own = || Bytes::copy_from_slice(body);
        match (header.tag, &bind, limit) {
            (b'Q', None, _) if at == header.len => return Some(WholeCycle::Simple { len: at, text: frontend::query_text(&own()) }),
            (b'P', None, None) if parse.is_none() => {
                let found = Parse::parse(&own())?;
                if !found.name.is_empty() {
                    return None;
                }
                parse = Some(found);
            }
            (b'B', None, None) => {
                let found = frontend::Bind::parse(&own())?;
                if !found.portal.is_empty() || (parse.is_some() && !found.statement.is_empty()) {
                    return None;
                }
                bind = Some(found);
            }
            (b'D', Some(_), None) if body == b"P\0" && !describe => describe = true,
            (b'E', Some(_), None) => {
                let (portal, rows) = frontend::execute(&own())?;
                if !portal.is_empty() {
                    return None;
                }
                limit = Some(rows);
            }
            (b'S', Some(_), Some(limit)) => {
                return Some(WholeCycle::Extended { len: at, parse, bind: bind?, describe, limit });
            }
            _ => return None,
        }
    }
}

/// Bytes up to the end of the first request cycle in a buffer. `None`: it has not come whole.
pub fn cycle_length(buffer: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        let header = crate::wire::peek(buffer.get(at..)?).ok()??;
        at += header.len;
        if matches!(header.tag, b'Q' | b'F' | b'S') {
            return (at <= buffer.len()).then_some(at);
        }
    }
}

#[cfg(test)]
mod tests;
