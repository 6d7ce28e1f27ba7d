//! Waiting for both sockets of a session at once, with as few system calls and bytes as that can be done.
//!
//! A read that does not fill its buffer has emptied the socket, so that tokio forgets the readiness without another system
//! call (`PollEvented::poll_read`); a `try_read` would have to be told so by `EWOULDBLOCK`. Buffers are lent by the thread for
//! as long as bytes are in them: an idle session has none.

use super::relay::Relay;
use bytes::{Buf, BytesMut};
use std::{
    cell::RefCell,
    future::Future,
    io,
    pin::{Pin, pin},
    task::{Context, Poll},
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};

/// Bytes read at once.
const READ_BYTES: usize = 16 << 10;
/// Bytes read at once after a read that filled its buffer: rows in bulk, COPY.
const BULK_BYTES: usize = 128 << 10;
/// Rest of a buffer that is still worth a read.
const ROOM_BYTES_MIN: usize = 4 << 10;
/// Buffers kept per thread: 1 MiB, more than are ever in use at once while nobody is slow.
const SPARE_MAX: usize = 64;
/// Large buffers kept per thread.
const SPARE_BULK_MAX: usize = 4;

#[derive(Default)]
struct Spare {
    usual: Vec<BytesMut>,
    bulk: Vec<BytesMut>,
}

thread_local! {
    static SPARE: RefCell<Spare> = RefCell::default();
}

/// A buffer with room for a read.
fn lend(bulk: bool) -> BytesMut {
    let (spare, bytes) = SPARE.with_borrow_mut(|spare| match bulk {
        true => (spare.bulk.pop(), BULK_BYTES),
        false => (spare.usual.pop(), READ_BYTES),
    });
    spare.unwrap_or_else(|| BytesMut::with_capacity(bytes))
}

/// Gives the room of an empty buffer back to the thread.
#[inline]
pub(super) fn give_back(buffer: &mut BytesMut) {
    if !buffer.is_empty() || buffer.capacity() == 0 {
        return;
    }
    let mut buffer = std::mem::take(buffer);
    SPARE.with_borrow_mut(|spare| {
        if spare.usual.len() < SPARE_MAX && buffer.capacity() <= READ_BYTES && buffer.try_reclaim(READ_BYTES) {
            spare.usual.push(buffer);
        } else if spare.bulk.len() < SPARE_BULK_MAX && buffer.capacity() <= BULK_BYTES && buffer.try_reclaim(BULK_BYTES) {
            spare.bulk.push(buffer);
        }
    });
}

/// Reads what has come; `bulk` follows whether the reads fill their buffers.
#[inline]
fn poll_fill<S: AsyncRead + Unpin>(
    stream: &mut S,
    buffer: &mut BytesMut,
    bulk: &mut bool,
    context: &mut Context<'_>,
) -> Poll<io::Result<usize>> {
    if buffer.capacity() == 0 {
        *buffer = lend(*bulk);
    } else if buffer.capacity() - buffer.len() < ROOM_BYTES_MIN {
        buffer.reserve(if *bulk { BULK_BYTES } else { READ_BYTES });
    }
    let polled = pin!(stream.read_buf(buffer)).poll(context);
    if polled.is_ready() {
        *bulk = buffer.len() == buffer.capacity();
    }
    give_back(buffer);
    polled
}

#[inline]
fn poll_drain<S: AsyncWrite + Unpin>(stream: &mut S, bytes: &mut BytesMut, context: &mut Context<'_>) -> Poll<io::Result<()>> {
    match Pin::new(stream).poll_write(context, bytes) {
        Poll::Ready(Ok(written)) => {
            bytes.advance(written);
            if bytes.is_empty() {
                *bytes = BytesMut::new();
            }
            Poll::Ready(Ok(()))
        }
        Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
        Poll::Pending => Poll::Pending,
    }
}

/// Which reads are wanted.
#[derive(Clone, Copy)]
pub(super) struct Wanted {
    pub client: bool,
    pub server: bool,
}

impl Relay {
    /// Ready when bytes have come or gone, a side has ended, or the mailbox has news.
    pub(super) fn poll_sockets(&mut self, wanted: Wanted, context: &mut Context<'_>) -> Poll<()> {
        let mut progress = self.info.mailbox.poll_news(&mut self.registered, context);
        if let Some(server) = self.server.as_mut().filter(|_| !self.server_gone) {
            if !self.to_server.is_empty()
                && let Poll::Ready(written) = poll_drain(&mut server.stream, &mut self.to_server, context)
            {
                self.server_gone |= written.is_err();
                progress = true;
            }
            if wanted.server
                && let Poll::Ready(read) = poll_fill(&mut server.stream, &mut server.from, &mut server.bulk, context)
            {
                self.server_gone |= !matches!(read, Ok(1..));
                progress = true;
            }
        }
        if !self.client_gone {
            if !self.to_client.is_empty()
                && let Poll::Ready(written) = poll_drain(&mut self.client, &mut self.to_client, context)
            {
                self.client_gone |= written.is_err();
                progress = true;
            }
            if wanted.client
                && let Poll::Ready(read) = poll_fill(&mut self.client, &mut self.from_client, &mut self.client_bulk, context)
            {
                match read {
                    Ok(0) => self.client_ended = true,
                    Ok(_) => self.client_reads += 1,
                    Err(_) => self.client_gone = true,
                }
                progress = true;
            }
        }
        if progress { Poll::Ready(()) } else { Poll::Pending }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_goes_back_to_the_thread_and_is_lent_again() {
        let mut buffer = lend(false);
        buffer.extend_from_slice(b"some bytes");
        let place = buffer.as_ptr();
        give_back(&mut buffer);
        assert!(!buffer.is_empty(), "bytes in it: it stays");
        buffer.advance(10);
        give_back(&mut buffer);
        assert_eq!(buffer.capacity(), 0);
        let again = lend(false);
        assert_eq!((again.as_ptr(), again.capacity()), (place, READ_BYTES));
    }

    #[test]
    fn large_and_shared_rooms_are_not_hoarded() {
        let mut large = BytesMut::with_capacity(BULK_BYTES + 1);
        give_back(&mut large);
        let mut shared = BytesMut::with_capacity(READ_BYTES);
        shared.extend_from_slice(b"held elsewhere");
        let held = shared.split_to(4).freeze();
        shared.clear();
        give_back(&mut shared);
        SPARE.with_borrow(|spare| assert_eq!((spare.usual.len(), spare.bulk.len()), (0, 0)));
        assert_eq!(&held[..], b"held");
    }
}
