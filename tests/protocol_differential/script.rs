//! What a conversation consists of.

use crate::raw::Request;
use bytes::BytesMut;

/// One thing a client does.
#[derive(Clone)]
pub enum Action {
    /// Sends bytes, cut anywhere.
    Send(BytesMut),
    /// Waits for as much as a server has to say without hearing more.
    Barrier,
    /// Another session of the same database runs this.
    Peer(String),
    /// Stops sending, reads on to the end.
    HalfClose,
    /// Reads on until the server closes.
    AwaitEnd,
}

/// A part of a conversation that can be left out as a whole.
#[derive(Clone, Default)]
pub struct Unit {
    pub actions: Vec<Action>,
}

impl Unit {
    pub fn send(request: Request) -> Self {
        Unit { actions: vec![Action::Send(request.0)] }
    }

    pub fn then(mut self, request: Request) -> Self {
        self.actions.push(Action::Send(request.0));
        self
    }

    pub fn barrier(mut self) -> Self {
        self.actions.push(Action::Barrier);
        self
    }

    pub fn peer(mut self, text: impl Into<String>) -> Self {
        self.actions.push(Action::Peer(text.into()));
        self
    }

    pub fn last(mut self, action: Action) -> Self {
        self.actions.push(action);
        self
    }
}

/// How a client cuts its bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Cut {
    /// As the actions are.
    Whole,
    /// Pieces of 1 to this many bytes.
    Pieces(usize),
    /// One byte each.
    Bytes,
}

/// A whole conversation.
#[derive(Clone)]
pub struct Script {
    pub startup: BytesMut,
    pub units: Vec<Unit>,
    pub cut: Cut,
    /// The server or the client ends it before the common end.
    pub ends_early: bool,
}

/// The row that ends every conversation, whatever state it is in.
pub const LAST: &str = "the end of it";

impl Script {
    pub fn actions(&self) -> Vec<Action> {
        let mut actions: Vec<Action> = self.units.iter().flat_map(|unit| unit.actions.clone()).collect();
        if !self.ends_early {
            // CopyFail and Sync lead out of everything; both are harmless where they lead out of nothing
            let end = Request::new().copy_fail("the end").sync().query("ROLLBACK").query(format!("SELECT '{LAST}'"));
            actions.push(Action::Send(end.0));
        }
        actions
    }
}
