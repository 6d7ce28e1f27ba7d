//! How much a client makes the proxy remember.

use super::{Conversation, Cycle, Pending, Statement};

/// Request cycles without an answer. Who sends more waits until the server has answered some: it needs nothing of the client
/// for that, as Syncs that a COPY swallows are counted by the CopyInResponse.
const CYCLES_MAX: usize = 10_000;
/// What a statement takes besides its texts: its names, class, entries of tables.
const STATEMENT_BYTES: usize = 256;
/// It is measured anew after this share of the limit has been added.
const SHARE_MEASURED: usize = 8;

/// What is remembered, against what may be.
#[derive(Debug)]
pub struct Memory {
    /// Most bytes.
    pub bytes_max: usize,
    /// It is more.
    pub is_over: bool,
    /// Added since it was measured.
    unmeasured: usize,
}

impl Default for Memory {
    fn default() -> Self {
        Memory { bytes_max: usize::MAX, is_over: false, unmeasured: 0 }
    }
}

impl Conversation {
    /// So many requests are unanswered that the next one must wait.
    #[inline]
    pub fn is_full(&self) -> bool {
        self.cycles.len() >= CYCLES_MAX
    }

    /// Something is remembered, with so many bytes of text.
    pub(super) fn remembers(&mut self, text_bytes: usize) {
        self.memory.unmeasured = self.memory.unmeasured.saturating_add(text_bytes + STATEMENT_BYTES);
        if self.memory.unmeasured > self.memory.bytes_max / SHARE_MEASURED {
            self.memory.unmeasured = 0;
            self.memory.is_over = self.measure() > self.memory.bytes_max;
        }
    }

    fn measure(&self) -> usize {
        let statements: usize = self.statements.values().map(Statement::bytes).sum();
        let cycles: usize = self.cycles.iter().map(Cycle::bytes).sum();
        let portals: usize = self.portals.iter().map(|(name, _, bind, _)| name.len() + bind.len() + STATEMENT_BYTES).sum();
        statements + cycles + portals
    }
}

impl Statement {
    fn bytes(&self) -> usize {
        self.parse.name.len() + self.parse.query.len() + self.parse.types.len() + STATEMENT_BYTES
    }
}

impl Cycle {
    fn bytes(&self) -> usize {
        let pending = self.pending.iter().map(|pending| match pending {
            Pending::Parse { statement, .. } => statement.bytes(),
            Pending::LargeParse { name } | Pending::Injected { name, .. } | Pending::CloseStatement { name } => {
                name.len() + STATEMENT_BYTES
            }
            Pending::ClosePortal | Pending::InjectedClose => STATEMENT_BYTES,
        });
        let executed = self.executed.iter().map(|executed| executed.operation.bytes());
        size_of::<Cycle>() + pending.sum::<usize>() + executed.sum::<usize>()
    }
}
