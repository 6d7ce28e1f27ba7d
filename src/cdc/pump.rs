//! COPY from one server to another as runs of bytes: what the source sends as CopyData is what the target reads as CopyData, so
//! frames are followed by their headers and never taken apart or gathered. A row of 1 GB passes through the same buffer.
//! Source: PostgreSQL documentation, "COPY Operations" in "Message Flow".

use super::{
    CdcError,
    error::{Blame, blame_of, describe_fields},
};
use crate::{
    backend::{BackendError, Connection},
    wire::{self, Message, backend::ErrorFields, frontend, put, put_cstr},
};
use bytes::{Buf, BytesMut};
use futures_util::FutureExt;
use std::io;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Bytes read at once: some hundred rows, less than what a socket holds.
const CHUNK_BYTES: usize = 128 << 10;

/// Takes note of progress, and slows it down where that is asked for.
pub(super) trait Meter {
    /// Rows begun and bytes moved since the last call. Waits while the source must be spared.
    async fn moved(&self, rows: u64, bytes: u64);
}

/// One COPY that did not come to its end. Both connections are usable, in failed transactions, unless the error is of the moment.
#[derive(Debug)]
pub(super) struct Broken {
    pub blame: Blame,
    pub error: CdcError,
}

impl Broken {
    fn connection(what: &'static str, source: BackendError) -> Self {
        Broken { blame: Blame::Moment, error: CdcError::Backend { what, source } }
    }

    fn server(what: &str, name: &str, fields: &ErrorFields) -> Self {
        let error = CdcError::Refused { what: format!("{what} {name}"), reason: describe_fields(fields), code: fields.code.clone() };
        Broken { blame: blame_of(&fields.code), error }
    }
}

/// How far one side has come.
enum Side {
    Copying,
    Failed(ErrorFields),
}

/// What one COPY carried.
#[derive(Clone, Copy, Debug)]
pub(super) struct Carried {
    /// Rows that the target stored.
    pub rows: u64,
    /// CopyData messages: the binary form has one more than rows, its end.
    pub frames: u64,
}

/// Copies what `out` gives into what `into` takes.
pub(super) async fn run(
    source: &mut Connection,
    target: &mut Connection,
    (out, into, name): (&str, &str, &str),
    meter: &impl Meter,
) -> Result<Carried, Broken> {
    if let Side::Failed(fields) = begin(source, out, b'H', "read from the owner").await? {
        return Err(Broken::server("read", name, &fields));
    }
    if let Side::Failed(fields) = begin(target, into, b'G', "write to the follower").await? {
        drain(source).await?;
        return Err(Broken::server("write", name, &fields));
    }
    // Of the frame that is under way: bytes to come from the source, and bytes that the target has not got yet.
    let (mut left, mut owed) = (0, 0);
    let (mut refused, mut frames) = (None, 0);
    let failed = loop {
        let (run, rows) =
            whole_frames(&source.buffer, &mut left).map_err(|error| Broken::connection("read from the owner", error.into()))?;
        frames += rows;
        if run > 0 {
            // Once the target has refused a row the rest need not be sent, except the rest of a frame that has begun.
            let needed = if refused.is_none() { run } else { run.min(owed) };
            if needed > 0 {
                let bytes = source.buffer.get(..needed).unwrap_or_default();
                target.stream.write_all(bytes).await.map_err(|error| Broken::connection("write to the follower", error.into()))?;
                owed = if refused.is_none() { left } else { owed - needed };
                // Not again once it has: what comes next is the end of the command, which `finish` waits for.
                if refused.is_none() {
                    refused = refusal(target).await?;
                }
            }
            source.buffer.advance(run);
            meter.moved(rows, run as u64).await;
            continue;
        }
        match wire::take(&mut source.buffer).map_err(|error| Broken::connection("read from the owner", error.into()))? {
            Some(Message { tag: b'c', .. }) => break None,
            Some(Message { tag: b'E', body }) => break Some(ErrorFields::parse(&body)),
            Some(_) => {}
            None => read(source).await.map_err(|error| Broken::connection("read from the owner", error))?,
        }
    };
    let ended = finish(source, "read from the owner").await?;
    let mut end = BytesMut::new();
    match &failed {
        None => put(&mut end, b'c', |_| ()),
        Some(_) => put(&mut end, b'f', |body| put_cstr(body, b"the owner could not be read to the end")),
    }
    target.send(&end).await.map_err(|error| Broken::connection("write to the follower", error))?;
    let stored = finish(target, "write to the follower").await;
    // What the owner said comes first: the follower only repeats that there was something.
    if let Some(fields) = failed.as_ref().or(ended.as_ref().err()) {
        return Err(Broken::server("read", name, fields));
    }
    match (refused, stored?) {
        (Some(fields), _) | (None, Err(fields)) => Err(Broken::server("write", name, &fields)),
        (None, Ok(rows)) => Ok(Carried { rows, frames }),
    }
}

/// Length of the CopyData frames (the last may go on behind it) at the start of a buffer, and how many begin in it.
fn whole_frames(buffer: &[u8], left: &mut usize) -> Result<(usize, u64), wire::WireError> {
    let (mut at, mut rows) = (0, 0);
    loop {
        let step = (*left).min(buffer.len() - at);
        at += step;
        *left -= step;
        let rest = buffer.get(at..).unwrap_or_default();
        match wire::peek(rest)? {
            Some(header) if header.tag == b'd' => {
                rows += 1;
                *left = header.len;
            }
            _ => return Ok((at, rows)),
        }
    }
}

async fn read(connection: &mut Connection) -> Result<(), BackendError> {
    connection.buffer.reserve(CHUNK_BYTES);
    match connection.stream.read_buf(&mut connection.buffer).await? {
        0 => Err(BackendError::Io(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection"))),
        _ => Ok(()),
    }
}

/// Starts a COPY and waits for its first message.
async fn begin(connection: &mut Connection, sql: &str, answer: u8, what: &'static str) -> Result<Side, Broken> {
    let mut request = BytesMut::new();
    frontend::put_query(&mut request, sql.as_bytes());
    connection.send(&request).await.map_err(|error| Broken::connection(what, error))?;
    loop {
        let message = connection.receive().await.map_err(|error| Broken::connection(what, error))?;
        match message.tag {
            tag if tag == answer => return Ok(Side::Copying),
            b'E' => {
                let fields = ErrorFields::parse(&message.body);
                let _ = finish(connection, what).await?;
                return Ok(Side::Failed(fields));
            }
            b'Z' => return Err(Broken::connection(what, BackendError::Protocol("a COPY that did not begin".into()))),
            _ => {}
        }
    }
}

/// What the target has said already, without waiting for it.
async fn refusal(target: &mut Connection) -> Result<Option<ErrorFields>, Broken> {
    while let Some(result) = read(target).now_or_never() {
        result.map_err(|error| Broken::connection("write to the follower", error))?;
    }
    let message = wire::take(&mut target.buffer).map_err(|error| Broken::connection("write to the follower", error.into()))?;
    Ok(message.filter(|message| message.tag == b'E').map(|message| ErrorFields::parse(&message.body)))
}

/// Reads to the end of a command. The rows it says it moved, or its error.
async fn finish(connection: &mut Connection, what: &'static str) -> Result<Result<u64, ErrorFields>, Broken> {
    let mut result = Ok(0);
    loop {
        let message = connection.receive().await.map_err(|error| Broken::connection(what, error))?;
        match message.tag {
            b'E' => result = Err(ErrorFields::parse(&message.body)),
            b'C' => {
                let tag = String::from_utf8_lossy(&message.body);
                result = result.map(|_| tag.trim_end_matches('\0').rsplit(' ').next().and_then(|rows| rows.parse().ok()).unwrap_or(0));
            }
            b'Z' => return Ok(result),
            _ => {}
        }
    }
}

/// Reads a COPY that nobody wants to its end.
async fn drain(source: &mut Connection) -> Result<(), Broken> {
    finish(source, "read from the owner").await.map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// However the bytes arrive, the frames are the same, and nothing behind them is taken.
        #[test]
        fn frames_are_followed(sizes in proptest::collection::vec(0_usize..40, 0..20), cut in 1_usize..17) {
            let mut stream = BytesMut::new();
            for size in &sizes {
                put(&mut stream, b'd', |body| body.extend_from_slice(&vec![b'c'; *size]));
            }
            let data = stream.len();
            put(&mut stream, b'c', |_| ());
            let (mut buffer, mut left, mut moved, mut rows) = (BytesMut::new(), 0, 0, 0);
            for piece in stream.chunks(cut) {
                buffer.extend_from_slice(piece);
                let (run, begun) = whole_frames(&buffer, &mut left).unwrap();
                buffer.advance(run);
                moved += run;
                rows += begun;
            }
            prop_assert_eq!((moved, rows, left), (data, sizes.len() as u64, 0));
            prop_assert_eq!(wire::take(&mut buffer).unwrap().unwrap().tag, b'c');
        }
    }
}
