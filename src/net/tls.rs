//! rustls' synchronous session, driven over a socket's readiness.

use super::Stream;
use bytes::{Buf, BytesMut};
use rustls::{ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection, pki_types::ServerName};
use std::{
    cell::RefCell,
    fmt,
    io::{self, BufRead, IoSlice, Read, Write},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};
use tokio::io::{AsyncWrite, Interest, ReadBuf, Ready};

/// Ciphertext read at once: two records. One such room per thread serves all sessions.
const READ_BYTES: usize = 32 << 10;
/// Plaintext made into records at once; it is reported as written when all of them have gone out.
const WRITE_BYTES: usize = 64 << 10;
/// Reads in a row that give no plaintext, before others get their turn.
const EMPTY_READS_MAX: usize = 4;

thread_local! {
    static ROOM: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_BYTES].into_boxed_slice());
}

/// A TLS session over a plain stream.
pub struct Tls {
    socket: Stream,
    session: Connection,
    /// Decrypted, and not yet taken.
    plain: BytesMut,
    /// Bytes that are in records already and have not been reported as written.
    accepted: usize,
    /// Nothing more will come.
    ended: bool,
}

impl Tls {
    /// The server's side of the handshake.
    ///
    /// # Errors
    /// From the socket; [`io::ErrorKind::InvalidData`] with rustls' reason inside.
    pub async fn accept(socket: Stream, config: Arc<ServerConfig>) -> io::Result<Stream> {
        let session = ServerConnection::new(config).map_err(invalid)?;
        Self::establish(socket, session.into()).await
    }

    /// The client's side of the handshake.
    ///
    /// # Errors
    /// As [`Tls::accept`].
    pub async fn connect(socket: Stream, config: Arc<ClientConfig>, name: ServerName<'static>) -> io::Result<Stream> {
        let session = ClientConnection::new(config, name).map_err(invalid)?;
        Self::establish(socket, session.into()).await
    }

    async fn establish(socket: Stream, mut session: Connection) -> io::Result<Stream> {
        session.set_buffer_limit(None); // `WRITE_BYTES` is the limit
        let mut tls = Tls { socket, session, plain: BytesMut::new(), accepted: 0, ended: false };
        loop {
            let blocked = match tls.flush_records() {
                Ok(()) => false,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => true,
                Err(error) => return Err(error),
            };
            if !tls.session.is_handshaking() && !blocked {
                return Ok(Stream::Tls(Box::new(tls)));
            }
            let interest = if blocked { Interest::READABLE | Interest::WRITABLE } else { Interest::READABLE };
            Box::pin(tls.socket.ready(interest)).await?;
            let mut plain = std::mem::take(&mut tls.plain); // data may follow the handshake at once
            let read = tls.read_records(&mut plain);
            tls.plain = plain;
            match read {
                Ok(_) if tls.ended => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }

    pub(super) fn rebind(self) -> io::Result<Self> {
        Ok(Tls { socket: self.socket.rebind()?, ..self })
    }

    /// What carries the records.
    pub(super) fn socket(&self) -> &Stream {
        &self.socket
    }

    /// What the handshake has agreed upon.
    pub fn session(&self) -> &Connection {
        &self.session
    }

    pub(super) async fn ready(&mut self, interest: Interest) -> io::Result<Ready> {
        if interest.is_readable() && (!self.plain.is_empty() || self.ended) {
            return Ok(Ready::READABLE);
        }
        loop {
            // records that nobody waits for: the answer to a key update
            let owed = self.session.wants_write() && !interest.is_writable();
            let wanted = if owed { interest | Interest::WRITABLE } else { interest };
            let ready = Box::pin(self.socket.ready(wanted)).await?;
            if owed && ready.is_writable() {
                match self.flush_records() {
                    Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                    _ => {}
                }
            }
            if !owed || ready.is_readable() || ready.is_read_closed() {
                return Ok(ready);
            }
        }
    }

    pub(super) fn poll_read_ready(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.plain.is_empty() || self.ended {
            return Poll::Ready(Ok(()));
        }
        self.socket.poll_read_ready(context)
    }

    pub(super) fn poll_write_ready(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.socket.poll_write_ready(context)
    }

    pub(super) fn try_read_buf(&mut self, buffer: &mut BytesMut) -> io::Result<usize> {
        if !self.plain.is_empty() {
            let bytes = self.plain.len();
            if buffer.is_empty() {
                *buffer = std::mem::take(&mut self.plain);
            } else {
                buffer.extend_from_slice(&std::mem::take(&mut self.plain));
            }
            return Ok(bytes);
        }
        self.read_records(buffer)
    }

    pub(super) fn try_write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.accepted == 0 {
            let part = bytes.get(..WRITE_BYTES).unwrap_or(bytes);
            self.accepted = self.session.writer().write(part)?;
        }
        self.flush_records()?;
        Ok(std::mem::take(&mut self.accepted).min(bytes.len()))
    }

    /// Hands finished records to the socket.
    fn flush_records(&mut self) -> io::Result<()> {
        while self.session.wants_write() {
            if self.session.write_tls(&mut Records(&mut self.socket))? == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
        }
        Ok(())
    }

    /// Reads records and appends their plaintext. 0: the end. Also without a close_notify: PostgreSQL's messages say
    /// themselves where they end, and libpq closes like that.
    fn read_records(&mut self, buffer: &mut BytesMut) -> io::Result<usize> {
        if self.ended {
            return Ok(0);
        }
        ROOM.with_borrow_mut(|room| {
            let before = buffer.len();
            for _ in 0..EMPTY_READS_MAX {
                let got = self.socket.try_read(room)?;
                if got == 0 {
                    self.ended = true;
                    return Ok(0);
                }
                let mut rest = room.get(..got).unwrap_or_default();
                while !rest.is_empty() && !self.ended {
                    if self.session.read_tls(&mut rest)? == 0 {
                        self.ended = true;
                    }
                    let state = match self.session.process_new_packets() {
                        Ok(state) => state,
                        Err(error) => {
                            let _ = self.flush_records(); // the alert says why
                            return Err(invalid(error));
                        }
                    };
                    self.ended |= state.peer_has_closed();
                    self.take_plaintext(buffer)?;
                }
                if buffer.len() > before || self.ended {
                    return Ok(buffer.len() - before);
                }
                if self.session.is_handshaking() {
                    break; // our turn to say something
                }
            }
            Err(io::ErrorKind::WouldBlock.into())
        })
    }

    fn take_plaintext(&mut self, buffer: &mut BytesMut) -> io::Result<()> {
        let mut reader = self.session.reader();
        loop {
            let taken = match reader.fill_buf() {
                Ok(chunk) => {
                    buffer.extend_from_slice(chunk);
                    chunk.len()
                }
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::UnexpectedEof) => 0,
                Err(error) => return Err(error),
            };
            if taken == 0 {
                return Ok(());
            }
            reader.consume(taken);
        }
    }

    pub(super) fn poll_read(&mut self, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            if !self.plain.is_empty() {
                let part = buffer.remaining().min(self.plain.len());
                buffer.put_slice(self.plain.get(..part).unwrap_or_default());
                self.plain.advance(part);
                if self.plain.is_empty() {
                    self.plain = BytesMut::new();
                }
                return Poll::Ready(Ok(()));
            }
            let mut plain = BytesMut::new();
            let read = self.read_records(&mut plain);
            self.plain = plain;
            match read {
                Ok(0) => return Poll::Ready(Ok(())),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready!(self.socket.poll_read_ready(context))?,
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    pub(super) fn poll_write(&mut self, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            match self.try_write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready!(self.socket.poll_write_ready(context))?,
                result => return Poll::Ready(result),
            }
        }
    }

    pub(super) fn poll_flush(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            match self.flush_records() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready!(self.socket.poll_write_ready(context))?,
                result => return Poll::Ready(result),
            }
        }
    }

    pub(super) fn poll_shutdown(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.session.send_close_notify(); // once, however often it is called
        ready!(self.poll_flush(context))?;
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("socket", &self.socket).finish_non_exhaustive()
    }
}

fn invalid(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// A socket as rustls wants it.
struct Records<'a>(&'a mut Stream);

impl Write for Records<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_write(bytes)
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.try_write_vectored(slices)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Records<'_> {
    fn read(&mut self, slice: &mut [u8]) -> io::Result<usize> {
        self.0.try_read(slice)
    }
}
