//! What a pooled session may have changed on its server, to be asked for when the transaction is over.

use crate::{
    pool::one_setting,
    sql::{Class, Kind, SessionEffect},
    traffic::database::pin,
};

/// Names asked for one by one; with more, all are.
const NAMES_MAX: usize = 16;

/// Whatever is not in here is as it was.
#[derive(Debug, Default)]
pub struct Touched {
    /// Settings, by name.
    pub names: Vec<String>,
    /// Any setting.
    pub all: bool,
    /// What pins a session.
    pub pins: bool,
}

impl Touched {
    /// Nothing may have changed.
    #[inline]
    pub fn is_empty(&self) -> bool {
        !self.all && !self.pins && self.names.is_empty()
    }

    /// Whatever there is may have changed.
    pub fn everything(&mut self) {
        (self.all, self.pins) = (true, true);
    }

    /// A statement is about to be run.
    #[inline]
    pub fn note(&mut self, class: &Class, text: &[u8], pins: &[&'static str]) {
        match class.kind {
            Kind::Unknown => self.everything(),
            // DROP of a temporary table; something created in pg_temp
            Kind::SchemaChange => self.pins = true,
            Kind::Session(SessionEffect::DeclareCursor) if pins.contains(&pin::HELD_CURSOR) => self.pins = true,
            _ => {}
        }
        for effect in &class.session_effects {
            match effect {
                SessionEffect::Set => match one_setting(text).filter(|_| class.single && self.names.len() < NAMES_MAX) {
                    Some(name) if !self.names.contains(&name) => self.names.push(name),
                    Some(_) => {}
                    None => self.all = true,
                },
                SessionEffect::Reset => self.all = true,
                SessionEffect::DiscardAll => self.everything(),
                SessionEffect::Deallocate => self.pins |= pins.contains(&pin::SQL_PREPARE),
                SessionEffect::DeclareCursor => {}
                SessionEffect::SqlExecute => self.everything(), // of whatever
                SessionEffect::Listen
                | SessionEffect::Unlisten
                | SessionEffect::TempTable
                | SessionEffect::DeclareHold
                | SessionEffect::SqlPrepare
                | SessionEffect::AdvisoryLock
                | SessionEffect::Load
                | SessionEffect::Other => self.pins = true,
            }
        }
    }
}
