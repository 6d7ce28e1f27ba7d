//! Plays a conversation against a port and collects every byte that comes back.

use crate::script::{Action, Cut, LAST, Script};
use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, tcp::OwnedReadHalf},
    sync::Notify,
};
use tokio_postgres::Client;

/// What has come so far.
#[derive(Default)]
struct Inbox {
    bytes: Mutex<(Vec<u8>, bool)>,
    changed: Notify,
}

impl Inbox {
    fn len(&self) -> usize {
        self.bytes.lock().unwrap().0.len()
    }

    fn ended(&self) -> bool {
        self.bytes.lock().unwrap().1
    }

    async fn fill(self: Arc<Self>, mut half: OwnedReadHalf) {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let read = half.read(&mut buffer).await.unwrap_or(0);
            {
                let mut bytes = self.bytes.lock().unwrap();
                bytes.0.extend_from_slice(&buffer[..read]);
                bytes.1 = read == 0;
            }
            self.changed.notify_waiters();
            if read == 0 {
                return;
            }
        }
    }

    /// Until the condition holds or the time is over.
    async fn wait(&self, at_most: Duration, condition: impl Fn(&Self) -> bool) -> bool {
        let deadline = Instant::now() + at_most;
        loop {
            let changed = self.changed.notified();
            if condition(self) {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || tokio::time::timeout(left, changed).await.is_err() {
                return condition(self);
            }
        }
    }
}

/// What a side said.
pub struct Answer {
    pub bytes: Vec<u8>,
    /// Bytes that had come at each barrier.
    pub at_barriers: Vec<usize>,
}

/// `expected`: as many bytes as the other side had said at each barrier must come here as well before anything more is sent.
pub async fn play(
    port: u16,
    script: &Script,
    seed: u64,
    peer: &Client,
    expected: Option<&[usize]>,
    patience: Duration,
) -> Result<Answer, String> {
    let stream = TcpStream::connect(("127.0.0.1", port)).await.map_err(|error| error.to_string())?;
    stream.set_nodelay(true).unwrap();
    let (read, mut write) = stream.into_split();
    let inbox = Arc::new(Inbox::default());
    let reader = tokio::spawn(inbox.clone().fill(read));
    let mut random = fastrand::Rng::with_seed(seed ^ u64::from(port));
    let mut at_barriers: Vec<usize> = Vec::new();
    let mut barrier = async |inbox: &Inbox, before: usize| match expected {
        None => {
            // What comes here late only makes the demand on the other side weaker.
            inbox.wait(Duration::from_millis(25), |inbox| inbox.len() > before || inbox.ended()).await;
            let mut seen = inbox.len();
            while inbox.wait(Duration::from_millis(3), |inbox| inbox.len() > seen).await {
                seen = inbox.len();
            }
            at_barriers.push(seen);
            Ok(())
        }
        Some(expected) => {
            let wanted = expected.get(at_barriers.len()).copied().unwrap_or_default();
            at_barriers.push(wanted);
            match inbox.wait(patience, |inbox| inbox.len() >= wanted || inbox.ended()).await {
                true => Ok(()),
                false => Err(format!("barrier {}: {} bytes of {wanted} have come, then nothing", at_barriers.len(), inbox.len())),
            }
        }
    };
    let mut failure = None;
    send(&mut write, &script.startup, script.cut, &mut random).await;
    barrier(&inbox, 0).await.unwrap_or_else(|error| failure = Some(error));
    let mut before = inbox.len();
    for action in script.actions() {
        if failure.is_some() {
            break;
        }
        match action {
            Action::Send(bytes) => send(&mut write, &bytes, script.cut, &mut random).await,
            Action::Barrier => {
                barrier(&inbox, before).await.unwrap_or_else(|error| failure = Some(error));
                before = inbox.len();
            }
            Action::Peer(text) => {
                // what the client has asked for before is done when a peer speaks, or what it hears would be chance
                barrier(&inbox, before).await.unwrap_or_else(|error| failure = Some(error));
                before = inbox.len();
                peer.batch_execute(&text).await.map_err(|error| error.to_string())?;
                barrier(&inbox, before).await.unwrap_or_else(|error| failure = Some(error));
            }
            Action::HalfClose => {
                let _ = write.shutdown().await;
            }
            Action::AwaitEnd => {
                if !inbox.wait(patience, Inbox::ended).await {
                    failure = Some("the connection is not closed".into());
                }
            }
        }
    }
    let last = |inbox: &Inbox| {
        let bytes = inbox.bytes.lock().unwrap();
        let wanted = LAST.as_bytes();
        // DataRow, CommandComplete "SELECT 1", ReadyForQuery: 14 + 6 bytes behind the value
        bytes.1 || bytes.0.len() > wanted.len() + 20 && bytes.0[..bytes.0.len() - 20].ends_with(wanted)
    };
    if failure.is_none() && !script.ends_early && !inbox.wait(patience, last).await {
        failure = Some("the end of the conversation is not answered".into());
    }
    if failure.is_none() {
        let _ = write.write_all(b"X\0\0\0\x04").await;
        if !inbox.wait(patience, Inbox::ended).await {
            failure = Some("the connection is not closed after Terminate".into());
        }
    }
    drop(write);
    reader.abort();
    let bytes = std::mem::take(&mut inbox.bytes.lock().unwrap().0);
    match failure {
        None => Ok(Answer { bytes, at_barriers }),
        Some(failure) => Err(format!("{failure}; so far:\n{}", crate::compare::show(&bytes, 12))),
    }
}

/// An error of the socket is the other side's end; what it said last is in the inbox.
async fn send(write: &mut tokio::net::tcp::OwnedWriteHalf, bytes: &[u8], cut: Cut, random: &mut fastrand::Rng) {
    let mut rest = bytes;
    while !rest.is_empty() {
        let length = match cut {
            Cut::Whole => rest.len(),
            Cut::Pieces(most) => random.usize(1..=most).min(rest.len()),
            Cut::Bytes => 1,
        };
        let (piece, tail) = rest.split_at(length);
        if write.write_all(piece).await.is_err() {
            return;
        }
        rest = tail;
        if cut != Cut::Whole && random.u8(..) < 12 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}
