//! Prepared statements of pooled sessions: what the client calls `s1` has on every server the name that its content gives it
//! ([`StatementKey`]), and is prepared where it is missing.
//!
//! The server itself says what goes wrong: a name that the client has not prepared is passed on as it is, and does not exist
//! there either; a name that it prepares twice exists there, because we put one there first.

use super::{Conversation, Forward, OPERATIONS_MAX, Pending, Statement};
use crate::{
    pool::{Known, StatementKey},
    sql::{Class, SessionEffect},
    traffic::database::pin,
    wire::{
        frontend::{self, Parse},
        put, put_cstr,
    },
};
use bytes::{Bytes, BytesMut};
use std::sync::atomic::{AtomicU64, Ordering};

/// What a DEALLOCATE takes away.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Deallocated {
    All,
    One(Bytes),
}

/// `DEALLOCATE [PREPARE] { name | ALL }`
pub(super) fn deallocated(text: &[u8]) -> Option<Deallocated> {
    let text = String::from_utf8_lossy(text);
    let words = text.split(|c: char| c.is_whitespace() || c == ';').filter(|word| !word.is_empty());
    let name = words.skip(1).find(|word| !word.eq_ignore_ascii_case("prepare"))?;
    Some(match name {
        name if name.eq_ignore_ascii_case("all") => Deallocated::All,
        name if name.starts_with('"') => Deallocated::One(name.trim_matches('"').replace("\"\"", "\"").into_bytes().into()),
        name => Deallocated::One(name.to_lowercase().into_bytes().into()),
    })
}

pub(super) fn put_close(bytes: &mut BytesMut, name: &[u8]) {
    put(bytes, b'C', |b| {
        b.extend_from_slice(b"S");
        put_cstr(b, name);
    });
}

/// Where a text stands in another.
pub fn memmem(text: &[u8], wanted: &[u8]) -> Option<usize> {
    text.windows(wanted.len()).position(|part| part == wanted)
}

impl Conversation {
    /// Gives a statement its name on the server. `len`: of the whole Parse message.
    pub(super) fn parse_as(&mut self, statement: &mut Statement, len: usize) -> Forward {
        if self.known.is_none() || statement.parse.name.is_empty() {
            return Forward::default();
        }
        let name = statement.parse.name.clone();
        if self.will_exist(&name) {
            // the server shall refuse the second one, in its own words
            let mut bytes = BytesMut::new();
            self.put_dummy(&mut bytes, &name);
            return Forward { before: Some(bytes), instead: 0 };
        }
        let key = StatementKey::of(&statement.parse.query, &statement.parse.types, self.salt_now());
        statement.key = Some(key);
        let mut bytes = BytesMut::new();
        self.put_closes(&mut bytes, key);
        statement.parse.put_as(&mut bytes, &key.name());
        Forward { before: Some(bytes), instead: len }
    }

    /// A Bind under the statement's name on the server. `len`: of the whole message; `rest`: what stands behind the names, or
    /// `None` where that is still to come.
    pub(super) fn bind_as(&mut self, portal: &[u8], name: &[u8], len: usize, rest: Option<&[u8]>) -> Forward {
        let (mut bytes, on_server) = match self.make_known(name) {
            Some(made) => made,
            None => return Forward { before: self.inject(name), instead: 0 },
        };
        let names = portal.len() + name.len() + 2;
        let instead = match rest {
            Some(rest) => {
                put(&mut bytes, b'B', |b| {
                    put_cstr(b, portal);
                    put_cstr(b, &on_server);
                    b.extend_from_slice(rest);
                });
                len
            }
            None => {
                // a message that is streamed: its new length, its names; the rest follows as it comes
                bytes.extend_from_slice(b"B");
                let length = (len - 1 - name.len() + on_server.len()) as u32;
                bytes.extend_from_slice(&length.to_be_bytes());
                put_cstr(&mut bytes, portal);
                put_cstr(&mut bytes, &on_server);
                5 + names
            }
        };
        Forward { before: Some(bytes), instead }
    }

    /// A Describe of a statement, likewise.
    pub(super) fn describe_as(&mut self, name: &[u8], len: usize) -> Forward {
        let Some((mut bytes, on_server)) = self.make_known(name) else {
            return Forward { before: self.inject(name), instead: 0 };
        };
        put(&mut bytes, b'D', |b| {
            b.extend_from_slice(b"S");
            put_cstr(b, &on_server);
        });
        Forward { before: Some(bytes), instead: len }
    }

    /// Makes sure that a statement of the client is on the server; its name there, and the bytes that prepare it. `None`: not
    /// one that has another name there.
    fn make_known(&mut self, name: &[u8]) -> Option<(BytesMut, Bytes)> {
        if name.is_empty() {
            return None;
        }
        self.known.as_ref()?;
        if !self.will_exist(name) {
            return None;
        }
        let (statement, _) = self.lookup(name)?;
        let mut key = statement.key?;
        let mut bytes = BytesMut::new();
        let mut there = self.known.as_mut()?.touch(key);
        let now = if there { key } else { StatementKey::of(&statement.parse.query, &statement.parse.types, self.salt_now()) };
        if now != key {
            // prepared under the settings of now it would mean something else to others who share its old name
            key = now;
            if let Some(stored) = self.statements.get_mut(name).filter(|stored| stored.parse == statement.parse) {
                stored.key = Some(key);
            }
            there = self.known.as_mut()?.touch(key);
        }
        if !there || self.may_be_skipped(name, key) {
            self.put_closes(&mut bytes, key);
            statement.parse.put_as(&mut bytes, &key.name());
            let cycle = self.open();
            cycle.unanswered += 1;
            cycle.pending.push_back(Pending::Injected { name: Bytes::copy_from_slice(name), key: Some(key) });
        }
        let named = &mut self.open().named;
        if named.len() < OPERATIONS_MAX && !named.iter().any(|(known, _)| *known == key) {
            named.push((key, statement.parse.name.clone()));
        }
        Some((bytes, key.name()))
    }

    /// It counts as prepared, but by an earlier cycle of the pipeline, not answered yet: an error there may skip that.
    fn may_be_skipped(&self, name: &[u8], key: StatementKey) -> bool {
        self.cycles.iter().take(self.earlier_cycles()).flat_map(|cycle| &cycle.pending).any(|pending| match pending {
            Pending::Injected { key: Some(prepared), .. } => *prepared == key,
            // if the client's own Parse is skipped, it has no such statement
            Pending::Parse { name: parsed, statement } => statement.key == Some(key) && parsed != name,
            _ => false,
        })
    }

    /// How many cycles are outstanding before the one that is open or about to be.
    pub(super) fn earlier_cycles(&self) -> usize {
        self.cycles.len() - usize::from(self.batch_open && !self.cycles.is_empty())
    }

    /// The client's name of a statement whose name on the server stands in an error for the cycle that is being answered,
    /// and that one.
    pub fn named_in(&self, error: &[u8]) -> Option<(Bytes, Bytes)> {
        let named = self.cycles.front()?.named.iter();
        named.map(|(key, name)| (key.name(), name.clone())).find(|(on_server, _)| memmem(error, on_server).is_some())
    }

    /// Closes what must not be there when this statement is prepared: itself, and whom it displaces.
    fn put_closes(&mut self, bytes: &mut BytesMut, key: StatementKey) {
        let displaced = self.known.as_mut().and_then(|known: &mut Known| known.insert(key));
        for close in displaced.into_iter().chain([key]) {
            put_close(bytes, &close.name());
            let cycle = self.open();
            cycle.extended = true;
            cycle.unanswered += 1;
            cycle.pending.push_back(Pending::InjectedClose);
        }
    }

    /// Puts a statement of this name, whatever it is, on the server; to be closed later.
    fn put_dummy(&mut self, bytes: &mut BytesMut, name: &Bytes) {
        put_close(bytes, name);
        Parse { name: name.clone(), query: Bytes::new(), types: Bytes::from_static(&[0, 0]) }.put_as(bytes, name);
        let cycle = self.open();
        cycle.extended = true;
        cycle.unanswered += 2;
        cycle.pending.push_back(Pending::InjectedClose);
        cycle.pending.push_back(Pending::Injected { name: name.clone(), key: None });
        if let Some(known) = self.known.as_mut().filter(|known| !known.leftovers.contains(name)) {
            known.leftovers.push(name.clone());
        }
    }

    /// Whether the client has, or will have when this message is reached, a statement of that name.
    fn will_exist(&self, name: &[u8]) -> bool {
        for cycle in self.cycles.iter().rev() {
            for pending in cycle.pending.iter().rev() {
                match pending {
                    Pending::Parse { name: parsed, statement } if parsed == name => return statement.key.is_some(),
                    Pending::CloseStatement { name: closed } if closed == name => return false,
                    _ => {}
                }
            }
            let forgets = |(effect, text, _): &(SessionEffect, Bytes, u64)| match effect {
                SessionEffect::DiscardAll => true,
                SessionEffect::Deallocate => deallocated(text).is_none_or(|what| match what {
                    Deallocated::All => true,
                    Deallocated::One(one) => one == name,
                }),
                _ => false,
            };
            if cycle.effects.iter().any(forgets) {
                return false;
            }
        }
        self.statements.get(name).is_some_and(|statement| statement.key.is_some())
    }

    /// While settings change, a statement is nobody's but this session's.
    fn salt_now(&self) -> u64 {
        static UNSETTLED: AtomicU64 = AtomicU64::new(0);
        let settled = !self.touched.all && self.touched.names.is_empty();
        if settled { self.salt } else { UNSETTLED.fetch_add(1, Ordering::Relaxed) }
    }

    /// A simple Query is about to be sent.
    pub(super) fn before_query(&mut self, class: &Class, text: &[u8]) -> Option<BytesMut> {
        self.statements.remove(&b""[..]); // as the server does
        self.before_execution(class, text)
    }

    /// A statement is about to be run: what it will have done to the connection is noted; what it names is put there.
    pub(super) fn before_execution(&mut self, class: &Class, text: &[u8]) -> Option<BytesMut> {
        let Conversation { touched, pins, .. } = self;
        touched.note(class, text, pins);
        if class.session_effects.is_empty() {
            return None;
        }
        let all = class.session_effects.contains(&SessionEffect::DiscardAll);
        let deallocated = class.session_effects.contains(&SessionEffect::Deallocate).then(|| deallocated(text)).flatten();
        if (all || deallocated == Some(Deallocated::All) || (!class.single && deallocated.is_some()))
            && let Some(known) = &mut self.known
        {
            known.clear();
        }
        match deallocated {
            Some(Deallocated::One(name)) if class.single && self.will_exist(&name) => {
                let mut bytes = BytesMut::new();
                self.put_dummy(&mut bytes, &name);
                Some(bytes)
            }
            _ => None,
        }
    }

    /// A statement too large to be remembered stays where it is, and the session with it.
    pub(super) fn keep_large_statement(&mut self, name: &[u8]) {
        if self.known.is_some() && !name.is_empty() && !self.pins.contains(&pin::LARGE_STATEMENT) {
            self.pins.push(pin::LARGE_STATEMENT);
        }
    }

    /// A ParameterStatus has come. If no statement explains it, a function or the server itself has changed settings.
    pub fn parameter_changed(&mut self) {
        if self.known.is_some() && self.touched.names.is_empty() {
            self.touched.all = true;
        }
    }

    /// Something keeps the session where it is.
    pub fn pin(&mut self, pin: &'static str) {
        if !self.pins.contains(&pin) {
            self.pins.push(pin);
        }
    }

    /// Pins after the server was asked: those that it found, if it was asked for them, and those that it cannot know of.
    pub fn settle_pins(&mut self, found: Option<Vec<&'static str>>, settings_changed: bool) {
        if let Some(found) = found {
            self.pins.retain(|pin| matches!(*pin, pin::OTHER | pin::LARGE_STATEMENT));
            found.into_iter().for_each(|pin| self.pin(pin));
        }
        self.pins.retain(|pin| *pin != pin::SETTINGS);
        if settings_changed {
            self.pin(pin::SETTINGS);
        }
    }

    /// Something is outstanding, or begun and not ended.
    pub fn is_mid_cycle(&self) -> bool {
        !self.cycles.is_empty() || self.batch_open || self.copy_in || self.data_wanted
    }

    /// Names of settings with a dot that the client may have set.
    pub fn custom_names(&self) -> Vec<String> {
        self.custom.clone()
    }

    /// What the server owes for the cycle at the front is not wanted any more: it has been answered with an error that is
    /// nobody's fault, and will be asked for anew.
    pub fn forget_only_cycle(&mut self) {
        self.cycles.clear();
        self.batch_open = false;
        self.portals.clear();
    }

    /// Nothing of the only cycle has been answered, and the client has ended it.
    pub fn is_unanswered(&self) -> bool {
        self.cycles.len() == 1 && self.cycles.front().is_some_and(|cycle| cycle.complete && !cycle.answered && !cycle.simple)
    }

    /// A request that closes what has been left on a connection under names of clients.
    pub fn closing_request(names: &[Bytes]) -> BytesMut {
        let mut bytes = BytesMut::new();
        names.iter().for_each(|name| put_close(&mut bytes, name));
        frontend::put_sync(&mut bytes);
        bytes
    }
}

/// `DISCARD` of something else than `ALL`.
pub(super) fn is_discard(text: &[u8]) -> bool {
    text.trim_ascii_start().get(..7).is_some_and(|word| word.eq_ignore_ascii_case(b"discard"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_deallocated() {
        let one = |name: &'static str| Some(Deallocated::One(Bytes::from(name)));
        for (text, what) in [
            ("DEALLOCATE ALL", Some(Deallocated::All)),
            ("deallocate prepare all;", Some(Deallocated::All)),
            ("DEALLOCATE x", one("x")),
            ("DEALLOCATE PREPARE Xy ;", one("xy")),
            ("DEALLOCATE \"_pg3_0\"", one("_pg3_0")),
            ("DEALLOCATE \"a\"\"B\"", one("a\"B")),
            ("DEALLOCATE", None),
        ] {
            assert_eq!(deallocated(text.as_bytes()), what, "{text}");
        }
    }
}
