//! PostgreSQL protocol 3: framing and the few messages a decision needs, on shared slices. No sockets in here.
//!
//! Deliberately absent: decoding for relaying (the relay forwards the client's own bytes), any I/O.
//! Invariants: input is never indexed unchecked; a length below 4 or above the limit is an error, not a panic.
//! Source: PostgreSQL documentation, "Frontend/Backend Protocol", "Message Formats".

pub mod backend;
pub mod frontend;

use bytes::{Buf, Bytes, BytesMut};

/// Longest message that PostgreSQL itself accepts (`PQ_LARGE_MESSAGE_LIMIT`, `src/include/libpq/libpq.h`).
pub const MESSAGE_BYTES_MAX: usize = 0x3fff_ffff;

/// The other side sent bytes that are not the protocol.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum WireError {
    /// A length word below 4 or above [`MESSAGE_BYTES_MAX`].
    #[error("invalid message length {0}")]
    Length(u32),
    /// A message ended before its fields did.
    #[error("message of type {0:?} is cut short")]
    Truncated(char),
}

/// Type and total length (type byte and length word included) of the message at the start of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Message type byte.
    pub tag: u8,
    /// Bytes of the whole message, at least 5.
    pub len: usize,
}

/// Looks at the next message without consuming it. `None`: fewer than five bytes so far.
///
/// # Errors
/// [`WireError::Length`]
#[inline]
pub fn peek(buffer: &[u8]) -> Result<Option<Header>, WireError> {
    let [tag, a, b, c, d, ..] = *buffer else { return Ok(None) };
    let length = u32::from_be_bytes([a, b, c, d]);
    if length < 4 || length as usize > MESSAGE_BYTES_MAX {
        return Err(WireError::Length(length));
    }
    Ok(Some(Header { tag, len: length as usize + 1 }))
}

/// One whole message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Message type byte.
    pub tag: u8,
    /// What follows the length word.
    pub body: Bytes,
}

/// Takes the next whole message out of a buffer; `None` when it has not arrived in full.
///
/// # Errors
/// [`WireError::Length`]
pub fn take(buffer: &mut BytesMut) -> Result<Option<Message>, WireError> {
    match peek(buffer)? {
        Some(header) if buffer.len() >= header.len => {
            let mut message = buffer.split_to(header.len).freeze();
            message.advance(5);
            Ok(Some(Message { tag: header.tag, body: message }))
        }
        _ => Ok(None),
    }
}

/// Takes a zero-terminated string from the front of a slice.
pub fn take_cstr<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let end = rest.iter().position(|byte| *byte == 0)?;
    let (text, tail) = rest.split_at_checked(end)?;
    *rest = tail.get(1..)?;
    Some(text)
}

/// Takes a big-endian 16-bit integer from the front of a slice.
pub fn take_i16(rest: &mut &[u8]) -> Option<i16> {
    let (head, tail) = rest.split_first_chunk::<2>()?;
    *rest = tail;
    Some(i16::from_be_bytes(*head))
}

/// Takes a big-endian 32-bit integer from the front of a slice.
pub fn take_i32(rest: &mut &[u8]) -> Option<i32> {
    let (head, tail) = rest.split_first_chunk::<4>()?;
    *rest = tail;
    Some(i32::from_be_bytes(*head))
}

/// Takes `n` bytes from the front of a slice.
pub fn take_bytes<'a>(rest: &mut &'a [u8], n: usize) -> Option<&'a [u8]> {
    let (head, tail) = rest.split_at_checked(n)?;
    *rest = tail;
    Some(head)
}

/// Appends a message: type byte, length word, whatever `body` writes.
pub fn put(buffer: &mut BytesMut, tag: u8, body: impl FnOnce(&mut BytesMut)) {
    buffer.extend_from_slice(&[tag]);
    put_sized(buffer, body);
}

/// Appends a length word and whatever `body` writes (start-up messages have no type byte).
pub fn put_sized(buffer: &mut BytesMut, body: impl FnOnce(&mut BytesMut)) {
    let start = buffer.len();
    buffer.extend_from_slice(&[0; 4]);
    body(buffer);
    let length = (buffer.len() - start) as u32;
    buffer[start..start + 4].copy_from_slice(&length.to_be_bytes());
}

/// Appends a zero-terminated string.
pub fn put_cstr(buffer: &mut BytesMut, text: &[u8]) {
    buffer.extend_from_slice(text);
    buffer.extend_from_slice(&[0]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_are_a_value_or_an_error(bytes: Vec<u8>) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(message)) = take(&mut buffer) {
                let _ = backend::ErrorFields::parse(&message.body);
                let _ = frontend::Bind::parse(&message.body);
                let _ = frontend::Parse::parse(&message.body);
                let _ = backend::RowDescription::parse(&message.body);
                let _ = backend::data_row(&message.body);
            }
        }

        #[test]
        fn split_anywhere_gives_the_same_messages(bodies in proptest::collection::vec(any::<Vec<u8>>(), 0..8), cut: usize) {
            let mut whole = BytesMut::new();
            for body in &bodies {
                put(&mut whole, b'D', |b| b.extend_from_slice(body));
            }
            let cut = if whole.is_empty() { 0 } else { cut % whole.len() };
            let mut buffer = BytesMut::from(&whole[..cut]);
            let mut seen = Vec::new();
            while let Some(message) = take(&mut buffer).unwrap() { seen.push(message.body.to_vec()); }
            buffer.extend_from_slice(&whole[cut..]);
            while let Some(message) = take(&mut buffer).unwrap() { seen.push(message.body.to_vec()); }
            prop_assert_eq!(seen, bodies);
        }
    }

    #[test]
    fn a_bad_length_is_refused() {
        assert_eq!(peek(&[b'Q', 0, 0, 0, 3]), Err(WireError::Length(3)));
        assert_eq!(peek(&[b'Q', 0x7f, 0, 0, 0]), Err(WireError::Length(0x7f00_0000)));
        assert_eq!(peek(b"Q\0\0"), Ok(None));
    }
}
