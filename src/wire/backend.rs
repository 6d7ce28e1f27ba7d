//! What servers send, as far as a decision needs it.

use super::{put, put_cstr, take_bytes, take_cstr, take_i16, take_i32};
use bytes::{Bytes, BytesMut};

/// Transaction status of a ReadyForQuery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransactionStatus {
    /// `I`
    Idle,
    /// `T`
    InTransaction,
    /// `E`
    Failed,
}

impl TransactionStatus {
    /// From the body of a ReadyForQuery.
    pub fn parse(body: &[u8]) -> Option<Self> {
        match body {
            b"I" => Some(Self::Idle),
            b"T" => Some(Self::InTransaction),
            b"E" => Some(Self::Failed),
            _ => None,
        }
    }
}

/// The fields of an ErrorResponse or NoticeResponse that are used. Text is lossy UTF-8: for logs, never for relaying.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ErrorFields {
    /// `V`, else `S`
    pub severity: String,
    /// `C`; servers of the field have been seen without it, so it may be empty.
    pub code: String,
    /// `M`
    pub message: String,
    /// `D`
    pub detail: String,
}

impl ErrorFields {
    /// Never fails: fields that are not there stay empty.
    pub fn parse(mut body: &[u8]) -> Self {
        let mut fields = ErrorFields::default();
        while let Some((kind, rest)) = body.split_first() {
            body = rest;
            if *kind == 0 {
                break;
            }
            let Some(text) = take_cstr(&mut body) else { break };
            let text = || String::from_utf8_lossy(text).into_owned();
            match kind {
                b'V' => fields.severity = text(),
                b'S' if fields.severity.is_empty() => fields.severity = text(),
                b'C' => fields.code = text(),
                b'M' => fields.message = text(),
                b'D' => fields.detail = text(),
                _ => {}
            }
        }
        fields
    }
}

/// Appends an ErrorResponse of our own.
pub fn put_error(buffer: &mut BytesMut, severity: &str, code: &str, message: &str, hint: Option<&str>) {
    put(buffer, b'E', |b| {
        for (kind, text) in [(b'S', severity), (b'V', severity), (b'C', code), (b'M', message)] {
            b.extend_from_slice(&[kind]);
            put_cstr(b, text.as_bytes());
        }
        if let Some(hint) = hint {
            b.extend_from_slice(b"H");
            put_cstr(b, hint.as_bytes());
        }
        b.extend_from_slice(&[0]);
    });
}

/// One column of a RowDescription.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// Name as the server sent it.
    pub name: Bytes,
    /// Type oid.
    pub type_oid: u32,
    /// 0 text, 1 binary.
    pub format: i16,
}

/// A RowDescription.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RowDescription {
    /// In order.
    pub columns: Vec<Column>,
}

impl RowDescription {
    /// `None` when the body is cut short.
    pub fn parse(body: &Bytes) -> Option<Self> {
        let mut rest = &body[..];
        let count = take_i16(&mut rest)?;
        let mut columns = Vec::with_capacity(count.clamp(0, 1664) as usize);
        for _ in 0..count.max(0) {
            let name = body.slice_ref(take_cstr(&mut rest)?);
            take_bytes(&mut rest, 6)?;
            let type_oid = take_i32(&mut rest)? as u32;
            take_bytes(&mut rest, 6)?;
            let format = take_i16(&mut rest)?;
            columns.push(Column { name, type_oid, format });
        }
        Some(RowDescription { columns })
    }
}

/// The values of a DataRow; `None` inside is SQL NULL.
pub fn data_row(body: &[u8]) -> Option<Vec<Option<&[u8]>>> {
    let mut rest = body;
    let count = take_i16(&mut rest)?;
    let mut values = Vec::with_capacity(count.clamp(0, 1664) as usize);
    for _ in 0..count.max(0) {
        let length = take_i32(&mut rest)?;
        values.push(match length {
            -1 => None,
            length => Some(take_bytes(&mut rest, usize::try_from(length).ok()?)?),
        });
    }
    Some(values)
}

/// The tag of a CommandComplete, without its terminator.
pub fn command_tag(body: &Bytes) -> Bytes {
    match body.split_last() {
        Some((0, _)) => body.slice(..body.len() - 1),
        _ => body.clone(),
    }
}
