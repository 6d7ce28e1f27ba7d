//! Where clients come in, and from where.

use super::Stream;
use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
};
use tokio::net::{TcpListener, UnixListener};

/// A socket that clients connect to.
#[derive(Debug)]
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// A Unix-domain socket.
    Unix(UnixListener),
}

impl Listener {
    /// The next connection. Cancel-safe.
    ///
    /// # Errors
    /// From the operating system.
    pub async fn accept(&self) -> io::Result<(Stream, Peer)> {
        match self {
            Listener::Tcp(listener) => listener.accept().await.map(|(stream, address)| (Stream::Tcp(stream), Peer::Tcp(address))),
            Listener::Unix(listener) => {
                let (stream, _) = listener.accept().await?;
                let uid = stream.peer_cred().ok().map(|credentials| credentials.uid());
                Ok((Stream::Unix(stream), Peer::Unix { uid }))
            }
        }
    }
}

/// Who is at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// An address.
    Tcp(SocketAddr),
    /// A process of this machine.
    Unix {
        /// The user it belonged to when it connected, as the kernel says (`SO_PEERCRED`).
        uid: Option<u32>,
    },
}

impl From<SocketAddr> for Peer {
    fn from(address: SocketAddr) -> Self {
        Peer::Tcp(address)
    }
}

impl Peer {
    /// `None`: a Unix socket.
    pub fn address(&self) -> Option<IpAddr> {
        match self {
            Peer::Tcp(address) => Some(address.ip()),
            Peer::Unix { .. } => None,
        }
    }

    /// For a Unix socket only.
    pub fn uid(&self) -> Option<u32> {
        match self {
            Peer::Tcp(_) => None,
            Peer::Unix { uid } => *uid,
        }
    }
}

impl fmt::Display for Peer {
    /// As PgBouncer shows it: an address with its port, or `unix`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peer::Tcp(address) => address.fmt(f),
            Peer::Unix { .. } => f.write_str("unix"),
        }
    }
}
