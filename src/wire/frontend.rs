//! What clients send, as far as a decision needs it, and what we send as a client.

use super::{put, put_cstr, put_sized, take_bytes, take_cstr, take_i16, take_i32};
use bytes::{Bytes, BytesMut};

/// `Parse`: statement name, text, parameter type oids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parse {
    /// Empty: the unnamed statement.
    pub name: Bytes,
    /// Query text in the client's encoding.
    pub query: Bytes,
    /// Everything after the text: number of parameter types and their oids.
    pub types: Bytes,
}

impl Parse {
    /// `None` when the body is cut short.
    pub fn parse(body: &Bytes) -> Option<Self> {
        let mut rest = &body[..];
        let name = body.slice_ref(take_cstr(&mut rest)?);
        let query = body.slice_ref(take_cstr(&mut rest)?);
        Some(Parse { name, query, types: body.slice_ref(rest) })
    }

    /// Appends this statement under another name.
    pub fn put_as(&self, buffer: &mut BytesMut, name: &[u8]) {
        put(buffer, b'P', |b| {
            put_cstr(b, name);
            put_cstr(b, &self.query);
            b.extend_from_slice(&self.types);
        });
    }
}

/// `Bind`: portal name, statement name, and the rest as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bind {
    /// Empty: the unnamed portal.
    pub portal: Bytes,
    /// Empty: the unnamed statement.
    pub statement: Bytes,
    /// Parameter formats, parameters, result formats.
    pub rest: Bytes,
}

impl Bind {
    /// `None` when the body is cut short.
    pub fn parse(body: &Bytes) -> Option<Self> {
        let mut rest = &body[..];
        let portal = body.slice_ref(take_cstr(&mut rest)?);
        let statement = body.slice_ref(take_cstr(&mut rest)?);
        Some(Bind { portal, statement, rest: body.slice_ref(rest) })
    }

    /// Appends this Bind for another statement and portal.
    pub fn put_as(&self, buffer: &mut BytesMut, portal: &[u8], statement: &[u8]) {
        put(buffer, b'B', |b| {
            put_cstr(b, portal);
            put_cstr(b, statement);
            b.extend_from_slice(&self.rest);
        });
    }
}

/// `Describe` or `Close`: `S` or `P`, and the name.
pub fn target(body: &Bytes) -> Option<(u8, Bytes)> {
    let (kind, mut rest) = body.split_first()?;
    Some((*kind, body.slice_ref(take_cstr(&mut rest)?)))
}

/// `Execute`: portal and maximum number of rows (0: all).
pub fn execute(body: &Bytes) -> Option<(Bytes, i32)> {
    let mut rest = &body[..];
    let portal = body.slice_ref(take_cstr(&mut rest)?);
    Some((portal, take_i32(&mut rest)?))
}

/// The text of a `Query`, without its terminator.
pub fn query_text(body: &Bytes) -> Bytes {
    match body.split_last() {
        Some((0, _)) => body.slice(..body.len() - 1),
        _ => body.clone(),
    }
}

/// Appends a `Query`.
pub fn put_query(buffer: &mut BytesMut, text: &[u8]) {
    put(buffer, b'Q', |b| put_cstr(b, text));
}

/// Appends `Sync`.
pub fn put_sync(buffer: &mut BytesMut) {
    put(buffer, b'S', |_| {});
}

/// The first message of a connection, which has no type byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Startup {
    /// SSLRequest (80877103).
    Ssl,
    /// GSSENCRequest (80877104).
    GssEncryption,
    /// CancelRequest (80877102): process id and key.
    Cancel {
        /// Process id given in BackendKeyData.
        pid: i32,
        /// 4 bytes in protocol 3.0, up to 256 in 3.2.
        key: Bytes,
    },
    /// A start-up message: protocol version and parameters in order.
    Parameters {
        /// Major in the upper 16 bits, minor in the lower.
        version: i32,
        /// Names and values in the client's encoding.
        parameters: Vec<(Bytes, Bytes)>,
    },
}

/// Longest start-up packet (`MAX_STARTUP_PACKET_LENGTH`, `src/include/libpq/pqcomm.h`).
pub const STARTUP_BYTES_MAX: usize = 10_000;

impl Startup {
    /// From what follows the length word. `None`: not a start-up message.
    pub fn parse(body: &Bytes) -> Option<Self> {
        let mut rest = &body[..];
        match take_i32(&mut rest)? {
            80_877_103 => Some(Startup::Ssl),
            80_877_104 => Some(Startup::GssEncryption),
            80_877_102 => {
                let pid = take_i32(&mut rest)?;
                let fits = (4..=256).contains(&rest.len());
                fits.then(|| Startup::Cancel { pid, key: body.slice_ref(rest) })
            }
            version if version >> 16 == 3 => {
                let mut parameters = Vec::new();
                loop {
                    let name = take_cstr(&mut rest)?;
                    if name.is_empty() {
                        break;
                    }
                    let value = take_cstr(&mut rest)?;
                    parameters.push((body.slice_ref(name), body.slice_ref(value)));
                }
                Some(Startup::Parameters { version, parameters })
            }
            _ => None,
        }
    }
}

/// Appends a start-up message of a protocol version.
pub fn put_startup<'a>(buffer: &mut BytesMut, version: i32, parameters: impl IntoIterator<Item = (&'a [u8], &'a [u8])>) {
    put_sized(buffer, |b| {
        b.extend_from_slice(&version.to_be_bytes());
        for (name, value) in parameters {
            put_cstr(b, name);
            put_cstr(b, value);
        }
        b.extend_from_slice(&[0]);
    });
}

/// Appends a CancelRequest.
pub fn put_cancel(buffer: &mut BytesMut, pid: i32, key: &[u8]) {
    put_sized(buffer, |b| {
        b.extend_from_slice(&80_877_102i32.to_be_bytes());
        b.extend_from_slice(&pid.to_be_bytes());
        b.extend_from_slice(key);
    });
}

/// Skips the parameter formats of [`Bind::rest`] and returns the result formats: empty means all text.
pub fn result_formats(bind_rest: &[u8]) -> Option<Vec<i16>> {
    let mut rest = bind_rest;
    for _ in 0..take_i16(&mut rest)?.max(0) {
        take_i16(&mut rest)?;
    }
    for _ in 0..take_i16(&mut rest)?.max(0) {
        let length = take_i32(&mut rest)?;
        if length >= 0 {
            take_bytes(&mut rest, length as usize)?;
        }
    }
    let count = take_i16(&mut rest)?.max(0);
    (0..count).map(|_| take_i16(&mut rest)).collect()
}
