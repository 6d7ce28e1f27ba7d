//! Decoder of pgoutput with logical messages: protocol version 1, and what versions 2 to 4 add for transactions that are sent before
//! they have ended (not their parallel form, not two-phase: neither is asked for). Pure: bytes in, values out; column data are
//! shared slices.
//! Source: PostgreSQL documentation, "Logical Replication Message Formats", "Streaming Replication Protocol";
//! `src/backend/replication/logical/proto.c`.

use crate::{
    lsn::Lsn,
    wire::{take_bytes, take_cstr, take_i16, take_i32},
};
use bytes::Bytes;

/// Most columns of a table (`MaxHeapAttributeNumber`, `src/include/access/htup_details.h`): a larger count is damage.
const COLUMNS_MAX: i16 = 1600;

/// Most tables in one TRUNCATE: bounds an allocation; PostgreSQL's own limit is memory.
const TRUNCATED_MAX: i32 = 1 << 20;

/// Microseconds from 1970-01-01 to 2000-01-01, the epoch of PostgreSQL's timestamps.
const POSTGRES_EPOCH_US: i64 = 946_684_800_000_000;

/// Bytes that are not pgoutput.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The message ended before its fields did, or goes on after them.
    #[error("message {0:?} has the wrong length")]
    Length(char),
    /// A field has a value that it cannot have.
    #[error("message {0:?} has an impossible {1}")]
    Field(char, &'static str),
    /// A message type of another protocol version.
    #[error("message type {0:?} is not part of what was asked for: another server version than expected?")]
    Unknown(char),
}

/// One column's value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// SQL NULL.
    Null,
    /// A TOASTed value that the update did not touch: not sent.
    Unchanged,
    /// In the type's text form.
    Text(Bytes),
}

/// A row, in the order of the relation's columns.
pub type Tuple = Vec<Value>;

/// One column of a relation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// Part of the replica identity.
    pub key: bool,
    /// Name.
    pub name: String,
    /// Type oid on the sender.
    pub type_oid: u32,
}

/// A table as the following changes see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relation {
    /// Oid on the sender: only a key between messages.
    pub oid: u32,
    /// Schema; never empty (the wire's "" means `pg_catalog`).
    pub schema: String,
    /// Table.
    pub name: String,
    /// `d` primary key, `n` nothing, `f` full row, `i` index.
    pub identity: u8,
    /// In order.
    pub columns: Vec<Column>,
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// A transaction begins (it is sent when it has committed).
    Begin {
        /// Position of its commit record.
        commit_lsn: Lsn,
        /// Microseconds since 1970.
        commit_us: i64,
        /// Transaction id.
        xid: u32,
    },
    /// It is complete.
    Commit {
        /// Position of its commit record.
        commit_lsn: Lsn,
        /// Position after it: the resume point.
        end_lsn: Lsn,
        /// Microseconds since 1970.
        commit_us: i64,
    },
    /// The transaction was replayed under a replication origin.
    Origin,
    /// A table's shape.
    Relation(Relation),
    /// A type's name: not needed, the follower knows its own columns.
    Type,
    /// A row was inserted.
    Insert {
        /// Which table.
        relation: u32,
        /// The row.
        new: Tuple,
    },
    /// A row was updated.
    Update {
        /// Which table.
        relation: u32,
        /// The old row (full identity) or its old key, where they were sent.
        old: Option<Tuple>,
        /// The row.
        new: Tuple,
    },
    /// A row was deleted.
    Delete {
        /// Which table.
        relation: u32,
        /// The old row (full identity) or its key.
        old: Tuple,
    },
    /// Tables were truncated.
    Truncate {
        /// Which tables.
        relations: Vec<u32>,
        /// TRUNCATE … CASCADE.
        cascade: bool,
        /// TRUNCATE … RESTART IDENTITY.
        restart_identity: bool,
    },
    /// `pg_logical_emit_message`
    Logical {
        /// Part of a transaction (arrives inside it, in order).
        transactional: bool,
        /// Where it stands.
        lsn: Lsn,
        /// Who it is for.
        prefix: Bytes,
        /// What it says.
        content: Bytes,
    },
}

/// What arrives in a CopyData of the replication connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Envelope {
    /// `w`
    Data {
        /// Position of what it carries.
        start: Lsn,
        /// Newest position known to the server.
        server_end: Lsn,
        /// The pgoutput message.
        payload: Bytes,
    },
    /// `k`
    KeepAlive {
        /// Everything before this has been sent.
        sent: Lsn,
        /// The server wants an answer at once.
        reply: bool,
    },
}

impl Envelope {
    /// Opens a CopyData.
    ///
    /// # Errors
    /// [`DecodeError`]
    pub fn decode(body: &Bytes) -> Result<Self, DecodeError> {
        let (&kind, mut rest) = body.split_first().ok_or(DecodeError::Length('d'))?;
        let tag = kind as char;
        match kind {
            b'w' => {
                let start = lsn(&mut rest, tag)?;
                let server_end = lsn(&mut rest, tag)?;
                long(&mut rest, tag)?;
                Ok(Envelope::Data { start, server_end, payload: body.slice_ref(rest) })
            }
            b'k' => {
                let sent = lsn(&mut rest, tag)?;
                long(&mut rest, tag)?;
                let reply = byte(&mut rest, tag)? != 0;
                Ok(Envelope::KeepAlive { sent, reply })
            }
            _ => Err(DecodeError::Unknown(tag)),
        }
    }
}

/// What surrounds the changes of a transaction that is sent before it has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// What follows, up to the stop, belongs to this transaction.
    Start {
        /// Its id.
        xid: u32,
    },
    /// The end of a part.
    Stop,
    /// It has committed.
    Commit {
        /// Its id.
        xid: u32,
        /// Position of its commit record.
        commit_lsn: Lsn,
        /// Position after it: the resume point.
        end_lsn: Lsn,
        /// Microseconds since 1970.
        commit_us: i64,
    },
    /// It, or a transaction inside it, was rolled back.
    Abort {
        /// Its id.
        xid: u32,
        /// What was rolled back: equal to `xid` for the whole.
        subxid: u32,
    },
}

impl Control {
    /// Decodes one message; `None`: it is something else.
    ///
    /// # Errors
    /// [`DecodeError`]
    pub fn decode(body: &[u8]) -> Result<Option<Self>, DecodeError> {
        let (&kind, mut rest) = body.split_first().ok_or(DecodeError::Length('w'))?;
        let (tag, rest) = (kind as char, &mut rest);
        let control = match kind {
            b'S' => {
                let xid = int(rest, tag)? as u32;
                byte(rest, tag)?;
                Control::Start { xid }
            }
            b'E' => Control::Stop,
            b'c' => {
                let xid = int(rest, tag)? as u32;
                byte(rest, tag)?;
                Control::Commit { xid, commit_lsn: lsn(rest, tag)?, end_lsn: lsn(rest, tag)?, commit_us: time(rest, tag)? }
            }
            b'A' => Control::Abort { xid: int(rest, tag)? as u32, subxid: int(rest, tag)? as u32 },
            _ => return Ok(None),
        };
        if rest.is_empty() { Ok(Some(control)) } else { Err(DecodeError::Length(tag)) }
    }

    /// Takes a change between start and stop apart: the transaction (perhaps one inside) that it belongs to, its kind, and the rest.
    ///
    /// # Errors
    /// [`DecodeError`]
    pub fn split(body: &[u8]) -> Result<(u32, u8, &[u8]), DecodeError> {
        let (&kind, mut rest) = body.split_first().ok_or(DecodeError::Length('w'))?;
        let xid = int(&mut rest, kind as char)? as u32;
        Ok((xid, kind, rest))
    }
}

fn byte(rest: &mut &[u8], tag: char) -> Result<u8, DecodeError> {
    let (first, tail) = rest.split_first().ok_or(DecodeError::Length(tag))?;
    *rest = tail;
    Ok(*first)
}

fn long(rest: &mut &[u8], tag: char) -> Result<i64, DecodeError> {
    let (head, tail) = rest.split_first_chunk::<8>().ok_or(DecodeError::Length(tag))?;
    *rest = tail;
    Ok(i64::from_be_bytes(*head))
}

fn lsn(rest: &mut &[u8], tag: char) -> Result<Lsn, DecodeError> {
    long(rest, tag).map(|value| Lsn(value as u64))
}

fn time(rest: &mut &[u8], tag: char) -> Result<i64, DecodeError> {
    long(rest, tag).map(|value| value.saturating_add(POSTGRES_EPOCH_US))
}

fn int(rest: &mut &[u8], tag: char) -> Result<i32, DecodeError> {
    take_i32(rest).ok_or(DecodeError::Length(tag))
}

fn text(rest: &mut &[u8], tag: char) -> Result<String, DecodeError> {
    let bytes = take_cstr(rest).ok_or(DecodeError::Length(tag))?;
    // client_encoding is UTF8 on this connection: the server converts.
    std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| DecodeError::Field(tag, "name (not UTF-8)"))
}

fn columns(rest: &mut &[u8], tag: char) -> Result<i16, DecodeError> {
    let count = take_i16(rest).ok_or(DecodeError::Length(tag))?;
    if (0..=COLUMNS_MAX).contains(&count) { Ok(count) } else { Err(DecodeError::Field(tag, "number of columns")) }
}

fn tuple(body: &Bytes, rest: &mut &[u8], tag: char) -> Result<Tuple, DecodeError> {
    let count = columns(rest, tag)?;
    let mut values = Vec::with_capacity(count as usize);
    for _ in 0..count {
        values.push(match byte(rest, tag)? {
            b'n' => Value::Null,
            b'u' => Value::Unchanged,
            b't' => {
                let length = usize::try_from(int(rest, tag)?).map_err(|_| DecodeError::Field(tag, "value length"))?;
                Value::Text(body.slice_ref(take_bytes(rest, length).ok_or(DecodeError::Length(tag))?))
            }
            _ => return Err(DecodeError::Field(tag, "kind of value")),
        });
    }
    Ok(values)
}

fn expect(rest: &mut &[u8], tag: char, wanted: u8) -> Result<(), DecodeError> {
    if byte(rest, tag)? == wanted { Ok(()) } else { Err(DecodeError::Field(tag, "kind of row")) }
}

impl Message {
    /// Decodes one message.
    ///
    /// # Errors
    /// [`DecodeError`]
    pub fn decode(body: &Bytes) -> Result<Self, DecodeError> {
        let (&kind, mut rest) = body.split_first().ok_or(DecodeError::Length('w'))?;
        let (tag, rest) = (kind as char, &mut rest);
        let message = match kind {
            b'B' => Message::Begin { commit_lsn: lsn(rest, tag)?, commit_us: time(rest, tag)?, xid: int(rest, tag)? as u32 },
            b'C' => {
                byte(rest, tag)?;
                Message::Commit { commit_lsn: lsn(rest, tag)?, end_lsn: lsn(rest, tag)?, commit_us: time(rest, tag)? }
            }
            b'O' => {
                lsn(rest, tag)?;
                take_cstr(rest).ok_or(DecodeError::Length(tag))?;
                Message::Origin
            }
            b'R' => Message::Relation(relation(rest, tag)?),
            b'Y' => return Ok(Message::Type),
            b'I' => {
                let relation = int(rest, tag)? as u32;
                expect(rest, tag, b'N')?;
                Message::Insert { relation, new: tuple(body, rest, tag)? }
            }
            b'U' => {
                let relation = int(rest, tag)? as u32;
                let old = match byte(rest, tag)? {
                    b'N' => None,
                    b'K' | b'O' => {
                        let old = tuple(body, rest, tag)?;
                        expect(rest, tag, b'N')?;
                        Some(old)
                    }
                    _ => return Err(DecodeError::Field(tag, "kind of row")),
                };
                Message::Update { relation, old, new: tuple(body, rest, tag)? }
            }
            b'D' => {
                let relation = int(rest, tag)? as u32;
                match byte(rest, tag)? {
                    b'K' | b'O' => Message::Delete { relation, old: tuple(body, rest, tag)? },
                    _ => return Err(DecodeError::Field(tag, "kind of row")),
                }
            }
            b'T' => {
                let count = int(rest, tag)?;
                if !(0..=TRUNCATED_MAX).contains(&count) {
                    return Err(DecodeError::Field(tag, "number of tables"));
                }
                let flags = byte(rest, tag)?;
                let relations = (0..count).map(|_| int(rest, tag).map(|oid| oid as u32)).collect::<Result<_, _>>()?;
                Message::Truncate { relations, cascade: flags & 1 != 0, restart_identity: flags & 2 != 0 }
            }
            b'M' => {
                let transactional = byte(rest, tag)? & 1 != 0;
                let lsn = lsn(rest, tag)?;
                let prefix = body.slice_ref(take_cstr(rest).ok_or(DecodeError::Length(tag))?);
                let length = usize::try_from(int(rest, tag)?).map_err(|_| DecodeError::Field(tag, "content length"))?;
                let content = body.slice_ref(take_bytes(rest, length).ok_or(DecodeError::Length(tag))?);
                Message::Logical { transactional, lsn, prefix, content }
            }
            _ => return Err(DecodeError::Unknown(tag)),
        };
        if rest.is_empty() { Ok(message) } else { Err(DecodeError::Length(tag)) }
    }
}

fn relation(rest: &mut &[u8], tag: char) -> Result<Relation, DecodeError> {
    let oid = int(rest, tag)? as u32;
    let schema = text(rest, tag)?;
    let schema = if schema.is_empty() { "pg_catalog".to_owned() } else { schema };
    let name = text(rest, tag)?;
    let identity = byte(rest, tag)?;
    if !b"dnfi".contains(&identity) {
        return Err(DecodeError::Field(tag, "replica identity"));
    }
    let count = columns(rest, tag)?;
    let mut list = Vec::with_capacity(count as usize);
    for _ in 0..count {
        let key = byte(rest, tag)? & 1 != 0;
        let name = text(rest, tag)?;
        let type_oid = int(rest, tag)? as u32;
        int(rest, tag)?;
        list.push(Column { key, name, type_oid });
    }
    Ok(Relation { oid, schema, name, identity, columns: list })
}

/// A TRUNCATE of one table, as the server would have sent it: what is spooled when one table of several is held.
pub fn encode_truncate(relation: u32, restart_identity: bool) -> Vec<u8> {
    let mut bytes = vec![b'T', 0, 0, 0, 1, if restart_identity { 2 } else { 0 }];
    bytes.extend_from_slice(&relation.to_be_bytes());
    bytes
}

/// The standby status update: what we have, and what the server may forget.
pub fn encode_status(received: Lsn, confirmed: Lsn, now_us: i64, reply: bool) -> Vec<u8> {
    let mut bytes = vec![b'r'];
    for lsn in [received, confirmed, confirmed] {
        bytes.extend_from_slice(&lsn.0.to_be_bytes());
    }
    bytes.extend_from_slice(&(now_us - POSTGRES_EPOCH_US).to_be_bytes());
    bytes.push(u8::from(reply));
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const RELATION: &[u8] =
        b"R\0\0\x40\x01public\0gr\xc3\xb6\xc3\x9fe\0d\0\x02\x01id\0\0\0\0\x14\xff\xff\xff\xff\0v\0\0\0\0\x19\xff\xff\xff\xff";
    const INSERT: &[u8] = b"I\0\0\x40\x01N\0\x03t\0\0\0\x011nu";

    fn decode(bytes: &[u8]) -> Result<Message, DecodeError> {
        Message::decode(&Bytes::copy_from_slice(bytes))
    }

    #[test]
    fn decodes_what_a_server_sends() {
        let one = Value::Text(Bytes::from_static(b"1"));
        let column = |key, name: &str, type_oid| Column { key, name: name.into(), type_oid };
        let cases: Vec<(&[u8], Message)> = vec![
            (
                b"B\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x01\0\0\x02\0",
                Message::Begin { commit_lsn: Lsn(16), commit_us: POSTGRES_EPOCH_US + 1, xid: 512 },
            ),
            (
                b"C\0\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x20\0\0\0\0\0\0\0\0",
                Message::Commit { commit_lsn: Lsn(16), end_lsn: Lsn(32), commit_us: POSTGRES_EPOCH_US },
            ),
            (
                RELATION,
                Message::Relation(Relation {
                    oid: 0x4001,
                    schema: "public".into(),
                    name: "größe".into(),
                    identity: b'd',
                    columns: vec![column(true, "id", 20), column(false, "v", 25)],
                }),
            ),
            (INSERT, Message::Insert { relation: 0x4001, new: vec![one.clone(), Value::Null, Value::Unchanged] }),
            (
                b"U\0\0\0\x01K\0\x01t\0\0\0\x011N\0\x01n",
                Message::Update { relation: 1, old: Some(vec![one.clone()]), new: vec![Value::Null] },
            ),
            (b"U\0\0\0\x01N\0\x01u", Message::Update { relation: 1, old: None, new: vec![Value::Unchanged] }),
            (b"D\0\0\0\x01O\0\x01t\0\0\0\x011", Message::Delete { relation: 1, old: vec![one] }),
            (b"T\0\0\0\x02\x03\0\0\0\x01\0\0\0\x02", Message::Truncate { relations: vec![1, 2], cascade: true, restart_identity: true }),
            (
                b"M\x01\0\0\0\0\0\0\0\x10p\0\0\0\0\x02{}",
                Message::Logical {
                    transactional: true,
                    lsn: Lsn(16),
                    prefix: Bytes::from_static(b"p"),
                    content: Bytes::from_static(b"{}"),
                },
            ),
            (b"O\0\0\0\0\0\0\0\x10name\0", Message::Origin),
            (b"Y\0\0\0\x01public\0mood\0", Message::Type),
        ];
        for (bytes, expected) in cases {
            assert_eq!(decode(bytes), Ok(expected), "{bytes:?}");
        }
        assert_eq!(decode(&encode_truncate(7, true)), Ok(Message::Truncate { relations: vec![7], cascade: false, restart_identity: true }));
    }

    #[test]
    fn decodes_what_surrounds_unfinished_transactions() {
        type Decoded = Result<Option<Control>, DecodeError>;
        let cases: &[(&[u8], Decoded)] = &[
            (b"S\0\0\x02\0\x01", Ok(Some(Control::Start { xid: 512 }))),
            (b"E", Ok(Some(Control::Stop))),
            (
                b"c\0\0\x02\0\0\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x20\0\0\0\0\0\0\0\0",
                Ok(Some(Control::Commit { xid: 512, commit_lsn: Lsn(16), end_lsn: Lsn(32), commit_us: POSTGRES_EPOCH_US })),
            ),
            (b"A\0\0\x02\0\0\0\x02\x01", Ok(Some(Control::Abort { xid: 512, subxid: 513 }))),
            (b"A\0\0\x02\0\0\0\x02\x01x", Err(DecodeError::Length('A'))),
            (b"S\0\0", Err(DecodeError::Length('S'))),
            (INSERT, Ok(None)),
        ];
        for (bytes, expected) in cases {
            assert_eq!(Control::decode(bytes), *expected, "{bytes:?}");
        }
        assert_eq!(Control::split(b"I\0\0\x02\0\0\0\x40\x01"), Ok((512, b'I', &b"\0\0\x40\x01"[..])));
        assert_eq!(Control::split(b"I\0"), Err(DecodeError::Length('I')));
    }

    #[test]
    fn refuses_what_is_impossible() {
        let cases: &[(&[u8], DecodeError)] = &[
            (b"", DecodeError::Length('w')),
            (b"S\0\0\0\0\x01", DecodeError::Unknown('S')),
            (b"I\0\0\0\x01X\0\0", DecodeError::Field('I', "kind of row")),
            (b"I\0\0\0\x01N\x7f\xff", DecodeError::Field('I', "number of columns")),
            (b"I\0\0\0\x01N\0\x01t\xff\xff\xff\xff", DecodeError::Field('I', "value length")),
            (b"I\0\0\0\x01N\0\x01t\x7f\xff\xff\xff", DecodeError::Length('I')),
            (b"T\x7f\xff\xff\xff\0", DecodeError::Field('T', "number of tables")),
            (b"R\0\0\0\x01a\0b\0x\0\0", DecodeError::Field('R', "replica identity")),
        ];
        for (bytes, expected) in cases {
            assert_eq!(decode(bytes).as_ref(), Err(expected), "{bytes:?}");
        }
        for whole in [RELATION, INSERT] {
            for cut in 0..whole.len() {
                assert!(decode(whole.get(..cut).unwrap()).is_err(), "{cut}");
            }
            assert!(decode(&[whole, b"x"].concat()).is_err());
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_message_or_an_error(bytes: Vec<u8>, tag in proptest::sample::select(&b"BCORYIUDTMwk"[..])) {
            let _ = decode(&bytes);
            let _ = (Control::decode(&bytes), Control::split(&bytes));
            let tagged = Bytes::from([&[tag][..], &bytes].concat());
            let _ = Message::decode(&tagged);
            let _ = Envelope::decode(&tagged);
        }

        #[test]
        fn a_flipped_byte_never_panics(position in 0..RELATION.len(), value: u8) {
            let mut bytes = RELATION.to_vec();
            bytes[position] = value;
            let _ = decode(&bytes);
        }
    }
}
