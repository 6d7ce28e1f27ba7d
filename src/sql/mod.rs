//! What a statement is: read, write, session change, schema change, or unknown. By PostgreSQL's own grammar (libpg_query)
//! and the source's catalog, cached by the statement's text with its literals taken out.
//!
//! Deliberately absent: routing (that is `traffic`), the transaction state (only ReadyForQuery tells it), any I/O besides
//! [`CatalogFacts::load`].
//!
//! Invariants
//! - `Kind::Read` is said only of what is known: every function, operator, type and relation that the statement names is
//!   in the facts and not volatile, and every node of the tree is on a list. Everything else is something stronger.
//! - No text can kill the process: parsing happens inline only when it is small and flat, otherwise on a thread with a
//!   large stack and a time limit; whatever fails is `Kind::Unknown`, which passes to the source untouched.
//! - The lexer that makes the cache key assumes `standard_conforming_strings = on`. Where the other setting would end a
//!   literal elsewhere (a backslash before a quote in a plain literal) the answer is `Unknown`.
//! - Functions are judged by name alone (any overload, any schema), as `search_path` is the session's secret. What a
//!   function declares (STABLE, IMMUTABLE) is believed, as PostgreSQL's planner believes it.
//!
//! Sources: PostgreSQL `src/backend/parser/{scan.l,gram.y}`, "Function Volatility Categories", "Lexical Structure".

mod analyse;
mod classifier;
mod facts;
mod names;
mod normalise;
mod ties;
mod translate;
mod tree;

#[cfg(test)]
mod tests;

pub use classifier::{Classifier, Later, LookUp};
pub use facts::CatalogFacts;
pub use ties::{order_of, with_ties};
pub use translate::{Names, TableNames, Theirs};

use std::sync::Arc;

/// What a statement (or a string of several) does, as far as routing is concerned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Reads replicated tables and reaches nothing volatile.
    Read,
    /// Writes, locks rows, or calls something that may.
    Write,
    /// Begins or ends a transaction or savepoint.
    Transaction(TransactionVerb),
    /// Concerns the session, or reads what only this server knows (catalog, settings, sequences): stays on the source.
    /// `SqlExecute` runs a statement that is not in the text: count it as a possible write.
    Session(SessionEffect),
    /// DDL.
    SchemaChange,
    /// COPY, either direction: count it as a write.
    Copy,
    /// Not parsed, or its effect cannot be known: counts as a write, goes to the source only.
    Unknown,
}

/// Transaction control.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TransactionVerb {
    /// `BEGIN`, `START TRANSACTION`
    Begin {
        /// `READ ONLY` was said.
        read_only: bool,
    },
    /// `COMMIT`, `END`
    Commit,
    /// `ROLLBACK`, `ABORT`
    Rollback,
    /// `SAVEPOINT`, `RELEASE`, `ROLLBACK TO`
    Savepoint,
    /// Two-phase commit: `PREPARE TRANSACTION`, `COMMIT PREPARED`, `ROLLBACK PREPARED`
    Prepared,
}

/// What changes a session or pins it to its server.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum SessionEffect {
    /// `SET`, `set_config()`
    Set,
    /// `RESET`
    Reset,
    /// `LISTEN`
    Listen,
    /// `UNLISTEN`
    Unlisten,
    /// A temporary table, view or sequence
    TempTable,
    /// `DECLARE` without hold, and what uses cursors
    DeclareCursor,
    /// `DECLARE … WITH HOLD`
    DeclareHold,
    /// SQL `PREPARE`
    SqlPrepare,
    /// SQL `EXECUTE`
    SqlExecute,
    /// `DEALLOCATE`
    Deallocate,
    /// `DISCARD ALL`
    DiscardAll,
    /// `pg_advisory_lock()` and family
    AdvisoryLock,
    /// `LOAD`
    Load,
    /// Anything else that belongs to this server and session
    Other,
}

/// Everything known about a statement text. Cached per normalised text, shared by `Arc`.
#[derive(Clone, PartialEq, Debug)]
pub struct Class {
    /// A string of several statements takes the strongest:
    /// `Unknown > SchemaChange > Write > Copy > Session > Transaction > Read`.
    pub kind: Kind,
    /// Exactly one statement.
    pub single: bool,
    /// All lasting effects of all statements, without repetition. `SET LOCAL`, `SHOW`, `FETCH` and transaction-level
    /// advisory locks leave none.
    pub session_effects: Vec<SessionEffect>,
    /// libpg_query's fingerprint (ignores literals, comments, list lengths); a hash of the normalised text if it has none.
    pub fingerprint: u64,
    /// For people: literals replaced by `$n`, bounded to [`TEXT_CHARS_MAX`].
    pub text: Arc<str>,
    /// The outermost SELECT has ORDER BY: answers compare in order, else as multisets. (Ties may still come in any order.)
    pub ordered: bool,
    /// The answer is not determined by the data: LIMIT/OFFSET/FETCH or DISTINCT ON without ORDER BY, TABLESAMPLE, an
    /// order-sensitive aggregate or window function without an order; directly or in a view.
    pub limited: bool,
    /// The outermost SELECT is ordered and cut (LIMIT, OFFSET, FETCH): rows that tie at the cut may differ.
    pub cut: bool,
    /// As `cut`, somewhere inside: a subquery, DISTINCT ON, a window or an aggregate with an order.
    pub cut_inside: bool,
    /// Asks for the time: `now()`, CURRENT_TIMESTAMP.
    pub asks_time: bool,
    /// Relations named, as written (`schema.table` or `table`), without repetition, CTEs left out.
    pub tables: Vec<String>,
    /// It reads no other rows than theirs: they are ordinary tables, and no function that it calls is a user's.
    pub reads_them_only: bool,
    /// Sends rows: SELECT, VALUES, SHOW, RETURNING.
    pub returns_rows: bool,
    /// A write that may be run on a shadow and rolled back.
    pub rehearsable: bool,
    /// Why a write is not rehearsable.
    pub left_out: Option<&'static str>,
}

/// One expression of an ORDER BY.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum OrderKey {
    /// The answer's column of this number, from 0.
    Position(usize),
    /// The answer's column of this name, if there is exactly one.
    Name(String),
    /// It is not in the answer, or cannot be found there.
    Hidden,
}

/// Longest `Class::text`, in characters: enough to recognise a statement, little enough for a table on a screen.
pub const TEXT_CHARS_MAX: usize = 300;

impl Class {
    /// The class of a statement that was never looked at (too large, or streamed through).
    pub fn unclassified() -> Arc<Self> {
        Arc::new(Class::unknown(0, Arc::from("(not looked at)"), "too large to be looked at"))
    }

    /// Changes nothing anywhere, though it says nothing that could be compared either: SHOW, currval(), what a built-in function
    /// tells about this server. A relation may be a view that was created a moment ago, and is not looked through here.
    pub fn is_idle(&self) -> bool {
        matches!(self.kind, Kind::Session(SessionEffect::Other)) && self.session_effects.is_empty() && self.tables.is_empty()
    }

    /// The class of what could not be understood.
    fn unknown(fingerprint: u64, text: Arc<str>, reason: &'static str) -> Self {
        Class {
            kind: Kind::Unknown,
            single: false,
            session_effects: Vec::new(),
            fingerprint,
            text,
            ordered: false,
            limited: false,
            cut: false,
            cut_inside: false,
            asks_time: false,
            tables: Vec::new(),
            reads_them_only: false,
            returns_rows: false,
            rehearsable: false,
            left_out: Some(reason),
        }
    }
}

impl Kind {
    /// Position in the order of strength.
    fn strength(self) -> u8 {
        match self {
            Kind::Read => 0,
            Kind::Transaction(_) => 1,
            Kind::Session(_) => 2,
            Kind::Copy => 3,
            Kind::Write => 4,
            Kind::SchemaChange => 5,
            Kind::Unknown => 6,
        }
    }

    /// The stronger of two; the first one when they are equally strong.
    fn or_stronger(self, other: Kind) -> Kind {
        if other.strength() > self.strength() { other } else { self }
    }
}
