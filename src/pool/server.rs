//! One connection to the owner of the writes, as sessions hold it.

use super::{Known, Pool, Settings, here};
use crate::{
    backend::Connection,
    net::Stream,
    traffic::route::Target,
    wire::{self, Message, frontend, put},
};
use bytes::{Bytes, BytesMut};
use std::{
    collections::hash_map::DefaultHasher,
    hash::{Hash, Hasher},
    io,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};

/// Longest message that is taken as a whole outside of the relay: notices, parameters, settings.
const MESSAGE_BYTES_MAX: usize = 1 << 20;
/// Longest wait for a server to take our goodbye.
const GOODBYE: Duration = Duration::from_secs(5);

/// A server process: whom a CancelRequest must reach.
#[derive(Debug, PartialEq, Eq)]
pub struct Backend {
    /// Which server.
    pub target: Arc<Target>,
    /// Its process there.
    pub pid: i32,
    /// Its key.
    pub key: Bytes,
}

/// What a server reports by ParameterStatus.
#[derive(Clone, Debug, Default)]
pub struct Parameters {
    list: Vec<(Bytes, Bytes)>,
    /// Of all names and values, whatever their order.
    hash: u64,
}

impl Parameters {
    /// As reported during a log-in.
    pub fn new(list: Vec<(Bytes, Bytes)>) -> Self {
        let hash = list.iter().fold(0u64, |sum, (name, value)| sum.wrapping_add(hash(name, value)));
        Parameters { list, hash }
    }

    /// Takes the body of a ParameterStatus in.
    pub fn note(&mut self, mut body: &[u8]) {
        let (Some(name), Some(value)) = (wire::take_cstr(&mut body), wire::take_cstr(&mut body)) else { return };
        match self.list.iter_mut().find(|(known, _)| known == name) {
            Some((name, known)) => {
                self.hash = self.hash.wrapping_sub(hash(name, known)).wrapping_add(hash(name, value));
                *known = Bytes::copy_from_slice(value);
            }
            None => {
                self.hash = self.hash.wrapping_add(hash(name, value));
                self.list.push((Bytes::copy_from_slice(name), Bytes::copy_from_slice(value)));
            }
        }
    }

    /// Names and values in the order of the server.
    pub fn list(&self) -> &[(Bytes, Bytes)] {
        &self.list
    }

    /// Equal for equal parameters.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// A value.
    pub fn get(&self, name: &[u8]) -> Option<&Bytes> {
        self.list.iter().find(|(known, _)| known == name).map(|(_, value)| value)
    }
}

fn hash(name: &[u8], value: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    (name, value).hash(&mut hasher);
    hasher.finish()
}

/// A place in a pool, given back when the connection is gone, however it went.
#[derive(Debug)]
pub(super) struct Slot(pub Arc<Pool>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.clone().slot_freed();
    }
}

/// What a pool knows of a connection of its own.
#[derive(Debug)]
pub struct Pooled {
    pub(super) slot: Option<Slot>,
    /// Statements that it has under our names.
    pub known: Known,
    /// The settings that it has; they are the client's while it is lent, up to what the client changes.
    pub settings: Arc<Settings>,
    /// Start-up parameters that it was opened with; empty where it serves many sessions.
    pub(super) startup: Arc<Vec<(Bytes, Bytes)>>,
    /// The runtime that watches its socket.
    pub(super) place: u32,
    pub(super) born: Instant,
    /// Session that it was lent to last: that session's unnamed statement is still there.
    pub used_by: u64,
}

impl Pooled {
    /// Where it belongs.
    pub fn pool(&self) -> Option<Arc<Pool>> {
        self.slot.as_ref().map(|slot| slot.0.clone())
    }

    /// Its place is free for another: it is about to be closed, and until then belongs to nobody's count.
    pub fn give_up_slot(&mut self) {
        self.slot = None;
    }
}

/// The connection to the owner.
#[derive(Debug)]
pub struct Server {
    /// The socket.
    pub stream: Stream,
    /// Read and not yet forwarded.
    pub from: BytesMut,
    /// Its process.
    pub backend: Arc<Backend>,
    /// Notifications that came between our own questions, as sent: they are the session's that listens.
    pub heard: BytesMut,
    /// Reported ones.
    pub parameters: Parameters,
    /// Of the ownership under which it was opened.
    pub epoch: i64,
    /// The last read filled its buffer.
    pub bulk: bool,
    /// `None`: opened for one session, whose end it does not survive.
    pub pooled: Option<Box<Pooled>>,
}

impl Server {
    /// From a connection that we opened ourselves.
    pub fn from_connection(connection: Connection, target: Arc<Target>, epoch: i64) -> Self {
        let Connection { stream, buffer, parameters, key: (pid, key) } = connection;
        let backend = Arc::new(Backend { target, pid, key });
        Server {
            stream,
            from: buffer,
            backend,
            heard: BytesMut::new(),
            parameters: Parameters::new(parameters),
            epoch,
            bulk: false,
            pooled: None,
        }
    }

    /// Hands the socket to the runtime that this is called on, unless it is there.
    ///
    /// # Errors
    /// From the operating system.
    pub fn here(mut self) -> io::Result<Self> {
        let place = here();
        match &mut self.pooled {
            Some(pooled) if pooled.place == place => return Ok(self),
            Some(pooled) => pooled.place = place,
            None => {}
        }
        self.rebind()
    }

    /// Hands the socket to the runtime that this is called on.
    ///
    /// # Errors
    /// From the operating system.
    pub fn rebind(self) -> io::Result<Self> {
        let Server { stream, from, backend, heard, parameters, epoch, bulk, pooled } = self;
        Ok(Server { stream: stream.rebind()?, from, backend, heard, parameters, epoch, bulk, pooled })
    }

    /// Nothing has to be done before it works for a session with these settings on this thread.
    #[inline]
    pub fn is_ready_for(&self, settings: &Arc<Settings>) -> bool {
        self.pooled.as_ref().is_some_and(|pooled| pooled.place == here() && Arc::ptr_eq(&pooled.settings, settings))
    }

    /// Ends the connection the way clients do.
    pub async fn terminate(mut self) {
        let mut bytes = BytesMut::new();
        put(&mut bytes, b'X', |_| {});
        let goodbye = async {
            let _ = self.stream.write_all(&bytes).await;
            let _ = self.stream.shutdown().await;
        };
        let _ = tokio::time::timeout(GOODBYE, goodbye).await;
    }

    /// Takes in what came while nothing was asked. False: the server has said goodbye, or closed, or speaks in riddles.
    pub fn is_alive(&mut self) -> bool {
        let mut came = false;
        loop {
            match self.stream.try_read_buf(&mut self.from) {
                Ok(0) => return false,
                Ok(_) => came = true,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return false,
            }
            if self.from.len() > MESSAGE_BYTES_MAX {
                return false;
            }
            self.from.reserve(4 << 10);
        }
        if !came {
            return true;
        }
        loop {
            match wire::take(&mut self.from) {
                Ok(Some(message)) if message.tag == b'S' => self.parameters.note(&message.body),
                Ok(Some(message)) if message.tag == b'N' => {}
                Ok(None) if self.from.is_empty() => {
                    self.from = BytesMut::new();
                    return true;
                }
                // a FATAL, half a message, or something that belongs to a request that somebody has not waited for
                Ok(_) | Err(_) => return false,
            }
        }
    }

    /// Runs texts between two transactions (or inside of one) and returns the rows of the last one that has some. `Err`: the
    /// first error; `None` inside: the connection is broken.
    ///
    /// # Errors
    /// The body of the server's ErrorResponse.
    pub async fn run(&mut self, text: &str) -> Result<Vec<Vec<Option<String>>>, Option<Bytes>> {
        let mut request = BytesMut::new();
        frontend::put_query(&mut request, text.as_bytes());
        self.exchange(&request).await
    }

    /// Sends requests that end in one ReadyForQuery.
    ///
    /// # Errors
    /// As [`Server::run`].
    pub async fn exchange(&mut self, request: &[u8]) -> Result<Vec<Vec<Option<String>>>, Option<Bytes>> {
        self.stream.write_all(request).await.map_err(|_| None)?;
        let (mut rows, mut failed) = (Vec::new(), None);
        loop {
            let message = next(&mut self.stream, &mut self.from).await.ok_or(None)?;
            match message.tag {
                // what we set here must not reach the client later as the value of its start-up
                b'S' => self.parameters.note(&message.body),
                b'T' => rows.clear(),
                b'D' => {
                    let values = wire::backend::data_row(&message.body).ok_or(None)?;
                    rows.push(values.into_iter().map(|value| value.map(|bytes| String::from_utf8_lossy(bytes).into_owned())).collect());
                }
                b'A' => wire::put(&mut self.heard, b'A', |b| b.extend_from_slice(&message.body)),
                b'E' => failed = failed.or(Some(message.body)),
                b'Z' => return failed.map_or(Ok(rows), |body| Err(Some(body))),
                _ => {}
            }
        }
    }
}

/// The next whole message. `None`: the other side has closed or sent what is not the protocol.
pub async fn next<S: AsyncRead + Unpin>(stream: &mut S, buffer: &mut BytesMut) -> Option<Message> {
    loop {
        if wire::peek(buffer).ok()?.is_some_and(|header| header.len > MESSAGE_BYTES_MAX) {
            return None;
        }
        if let Some(message) = wire::take(buffer).ok()? {
            return Some(message);
        }
        buffer.reserve(4 << 10);
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_parameters_have_equal_hashes_whatever_their_order_and_history() {
        let pair = |name: &str, value: &str| (Bytes::copy_from_slice(name.as_bytes()), Bytes::copy_from_slice(value.as_bytes()));
        let mut one = Parameters::new(vec![pair("a", "1"), pair("b", "2")]);
        let other = Parameters::new(vec![pair("b", "3"), pair("a", "1")]);
        assert_ne!(one.hash(), other.hash());
        one.note(b"b\x003\0");
        assert_eq!(one.hash(), other.hash());
        one.note(b"c\x001\0");
        assert_ne!(one.hash(), other.hash());
        assert_eq!(one.get(b"b").map(|value| &value[..]), Some(&b"3"[..]));
    }
}
