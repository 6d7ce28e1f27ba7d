//! One byte stream, whatever it runs over.

use super::Tls;
use bytes::BytesMut;
use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf, Ready},
    net::{TcpStream, UnixStream},
};

/// A client's or a server's connection.
///
/// The hot path waits with [`Stream::ready`] (or the poll variants) and moves bytes with the `try_` methods, as with tokio's
/// own sockets: [`io::ErrorKind::WouldBlock`] means "wait again". `AsyncRead` and `AsyncWrite` are for everything slow.
#[derive(Debug)]
pub enum Stream {
    /// TCP, with Nagle's algorithm off.
    Tcp(TcpStream),
    /// A Unix-domain socket.
    Unix(UnixStream),
    /// TLS over one of the others.
    Tls(Box<Tls>),
}

impl From<TcpStream> for Stream {
    fn from(stream: TcpStream) -> Self {
        Stream::Tcp(stream)
    }
}

impl From<UnixStream> for Stream {
    fn from(stream: UnixStream) -> Self {
        Stream::Unix(stream)
    }
}

impl Stream {
    /// Waits until reading or writing may succeed. Cancel-safe. Readiness is a hint: the next `try_` may still say `WouldBlock`.
    ///
    /// # Errors
    /// From the operating system.
    #[inline]
    pub async fn ready(&mut self, interest: Interest) -> io::Result<Ready> {
        match self {
            Stream::Tcp(stream) => stream.ready(interest).await,
            Stream::Unix(stream) => stream.ready(interest).await,
            Stream::Tls(tls) => Box::pin(tls.ready(interest)).await,
        }
    }

    /// Like [`Stream::ready`] for reading. Only the last waker of the two poll variants and of reads is kept.
    #[inline]
    pub fn poll_read_ready(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Stream::Tcp(stream) => stream.poll_read_ready(context),
            Stream::Unix(stream) => stream.poll_read_ready(context),
            Stream::Tls(tls) => tls.poll_read_ready(context),
        }
    }

    /// Like [`Stream::ready`] for writing.
    #[inline]
    pub fn poll_write_ready(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Stream::Tcp(stream) => stream.poll_write_ready(context),
            Stream::Unix(stream) => stream.poll_write_ready(context),
            Stream::Tls(tls) => tls.poll_write_ready(context),
        }
    }

    /// Appends what has come; 0: the other side has ended. TLS may append more than the buffer's spare room.
    ///
    /// # Errors
    /// `WouldBlock`: nothing has come. Anything else: the connection is of no more use.
    #[inline]
    pub fn try_read_buf(&mut self, buffer: &mut BytesMut) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.try_read_buf(buffer),
            Stream::Unix(stream) => stream.try_read_buf(buffer),
            Stream::Tls(tls) => tls.try_read_buf(buffer),
        }
    }

    /// Writes from the front of `bytes` and returns how many went out. After `WouldBlock` the same bytes must come first
    /// again (more may follow them): TLS has made records of them already.
    ///
    /// # Errors
    /// `WouldBlock`: no room now. Anything else: the connection is of no more use.
    #[inline]
    pub fn try_write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.try_write(bytes),
            Stream::Unix(stream) => stream.try_write(bytes),
            Stream::Tls(tls) => tls.try_write(bytes),
        }
    }

    /// [`Stream::try_write`] from several slices in turn. TLS takes the first that is not empty.
    ///
    /// # Errors
    /// As [`Stream::try_write`].
    #[inline]
    pub fn try_write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.try_write_vectored(slices),
            Stream::Unix(stream) => stream.try_write_vectored(slices),
            Stream::Tls(tls) => match slices.iter().find(|slice| !slice.is_empty()) {
                Some(slice) => tls.try_write(slice),
                None => Ok(0),
            },
        }
    }

    /// Hands the socket to the runtime that this is called on: a session is logged in on one and relayed on another.
    ///
    /// # Errors
    /// From the operating system: no more descriptors can be watched.
    pub fn rebind(self) -> io::Result<Self> {
        match self {
            Stream::Tcp(stream) => TcpStream::from_std(stream.into_std()?).map(Stream::Tcp),
            Stream::Unix(stream) => UnixStream::from_std(stream.into_std()?).map(Stream::Unix),
            Stream::Tls(tls) => tls.rebind().map(|tls| Stream::Tls(Box::new(tls))),
        }
    }

    /// The TCP connection below, if that is what there is.
    pub fn tcp(&self) -> Option<&TcpStream> {
        match self {
            Stream::Tcp(stream) => Some(stream),
            Stream::Unix(_) => None,
            Stream::Tls(tls) => tls.socket().tcp(),
        }
    }

    /// The TLS session, if there is one.
    pub fn tls(&self) -> Option<&Tls> {
        match self {
            Stream::Tls(tls) => Some(tls),
            Stream::Tcp(_) | Stream::Unix(_) => None,
        }
    }

    /// Reads into a slice: for TLS, whose records come from one of the others.
    pub(super) fn try_read(&mut self, slice: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.try_read(slice),
            Stream::Unix(stream) => stream.try_read(slice),
            Stream::Tls(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_read(context, buffer),
            Stream::Unix(stream) => Pin::new(stream).poll_read(context, buffer),
            Stream::Tls(tls) => tls.poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_write(context, bytes),
            Stream::Unix(stream) => Pin::new(stream).poll_write(context, bytes),
            Stream::Tls(tls) => tls.poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_flush(context),
            Stream::Unix(stream) => Pin::new(stream).poll_flush(context),
            Stream::Tls(tls) => tls.poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_shutdown(context),
            Stream::Unix(stream) => Pin::new(stream).poll_shutdown(context),
            Stream::Tls(tls) => tls.poll_shutdown(context),
        }
    }
}
