//! Transactions that the owner sends before they have ended: their changes wait on disk, outside of memory, until the commit brings
//! them in as a whole or an abort (also of a part) drops them. A file has no name (it is removed as soon as it is open), so nothing
//! is left behind however we end; after a reconnection the owner sends everything that had not ended anew.

use super::{
    CdcError,
    pgoutput::{DecodeError, Message, Relation},
    shared::TableName,
};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use std::{
    collections::{HashMap, HashSet},
    io::SeekFrom,
    path::PathBuf,
    sync::atomic::{AtomicU64, Ordering},
};
use tokio::{
    fs::{File, OpenOptions, remove_file},
    io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt},
};

/// What one transaction may keep in memory before it goes to disk. The owner sends the largest first, so few are open at a time.
const MEMORY_BYTES_MAX: usize = 64 << 10;

/// Read from a file at a time.
const READ_BYTES: usize = 256 << 10;

/// Sub-transaction and length in front of each change.
const HEADER_BYTES: usize = 8;

/// The limit was reached, or the disk said no.
#[derive(Debug, thiserror::Error)]
pub(super) enum SpoolError {
    #[error("the limit of {0} MiB is reached (copy.spool_max in proxy.toml)")]
    Full(u64),
    #[error("{} cannot be written (copy.spool_folder in proxy.toml): {source}", .folder.display())]
    Disk { folder: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Decode(#[from] DecodeError),
}

impl From<SpoolError> for CdcError {
    fn from(error: SpoolError) -> Self {
        CdcError::Protocol(format!("changes of an unfinished transaction could not be kept: {error}"))
    }
}

/// All transactions that have not ended.
pub(super) struct Spool {
    open: HashMap<u32, Spooled>,
    bytes: u64,
    mib_max: u64,
    folder: PathBuf,
}

/// One of them.
#[derive(Default)]
struct Spooled {
    file: Option<File>,
    written: u64,
    buffer: BytesMut,
    /// Sub-transactions that were rolled back.
    aborted: HashSet<u32>,
    names: HashMap<u32, TableName>,
    /// Sub-transactions and the tables that they changed.
    touched: HashSet<(u32, u32)>,
}

/// A transaction that has committed, on its way to the applier.
pub(super) struct Replay {
    file: Option<File>,
    /// What was still in memory.
    tail: Option<BytesMut>,
    buffer: BytesMut,
    aborted: HashSet<u32>,
    folder: PathBuf,
    /// Tables that it changed, by name where its own part of the stream named them.
    pub touched: Vec<(u32, Option<TableName>)>,
}

impl Spool {
    /// All files of a feed are in `folder` and together no larger than `mib_max`.
    pub fn at(folder: PathBuf, mib_max: u64) -> Self {
        Spool { open: HashMap::new(), bytes: 0, mib_max, folder }
    }

    /// Keeps a change: `kind` and `rest` are the message without the sub-transaction in it.
    pub async fn add(&mut self, xid: u32, subxid: u32, kind: u8, rest: &[u8]) -> Result<(), SpoolError> {
        let bytes = HEADER_BYTES + 1 + rest.len();
        if self.bytes + bytes as u64 > self.mib_max << 20 {
            return Err(SpoolError::Full(self.mib_max));
        }
        let spooled = self.open.entry(xid).or_default();
        spooled.note(subxid, kind, rest)?;
        spooled.buffer.put_u32(subxid);
        spooled.buffer.put_u32((1 + rest.len()) as u32);
        spooled.buffer.put_u8(kind);
        spooled.buffer.put_slice(rest);
        self.bytes += bytes as u64;
        if spooled.buffer.len() >= MEMORY_BYTES_MAX {
            let disk = |source| SpoolError::Disk { folder: self.folder.clone(), source };
            spooled.flush(&self.folder).await.map_err(disk)?;
        }
        Ok(())
    }

    /// The transaction, or one inside it, was rolled back.
    pub fn abort(&mut self, xid: u32, subxid: u32) {
        if xid == subxid {
            self.forget(xid);
        } else if let Some(spooled) = self.open.get_mut(&xid) {
            spooled.aborted.insert(subxid);
        }
    }

    fn forget(&mut self, xid: u32) -> Option<Spooled> {
        let spooled = self.open.remove(&xid)?;
        self.bytes = self.bytes.saturating_sub(spooled.written + spooled.buffer.len() as u64);
        Some(spooled)
    }

    /// The transaction has committed: its changes, without those of parts that were rolled back.
    pub async fn commit(&mut self, xid: u32) -> Result<Replay, SpoolError> {
        let mut spooled = self.forget(xid).unwrap_or_default();
        if let Some(file) = &mut spooled.file {
            // tokio's file reports a failed write at the next operation.
            let rewound = match file.flush().await {
                Ok(()) => file.seek(SeekFrom::Start(0)).await.map(|_| ()),
                Err(error) => Err(error),
            };
            rewound.map_err(|source| SpoolError::Disk { folder: self.folder.clone(), source })?;
        }
        let Spooled { file, buffer, aborted, names, touched, .. } = spooled;
        let touched: HashSet<u32> =
            touched.into_iter().filter(|(subxid, _)| !aborted.contains(subxid)).map(|(_, relation)| relation).collect();
        let touched = touched.into_iter().map(|relation| (relation, names.get(&relation).cloned())).collect();
        Ok(Replay { file, tail: Some(buffer), buffer: BytesMut::new(), aborted, folder: self.folder.clone(), touched })
    }
}

impl Spooled {
    /// What must be known the moment the commit arrives.
    fn note(&mut self, subxid: u32, kind: u8, rest: &[u8]) -> Result<(), DecodeError> {
        let oid = |bytes: &[u8]| bytes.first_chunk::<4>().map(|bytes| u32::from_be_bytes(*bytes)).ok_or(DecodeError::Length(kind as char));
        match kind {
            b'I' | b'U' | b'D' => {
                self.touched.insert((subxid, oid(rest)?));
            }
            b'R' | b'T' => {
                let mut whole = BytesMut::with_capacity(rest.len() + 1);
                whole.put_u8(kind);
                whole.put_slice(rest);
                match Message::decode(&whole.freeze())? {
                    Message::Relation(Relation { oid, schema, name, .. }) => {
                        self.names.insert(oid, (schema, name));
                    }
                    Message::Truncate { relations, .. } => self.touched.extend(relations.into_iter().map(|relation| (subxid, relation))),
                    _ => {}
                }
            }
            _ => {}
        }
        Ok(())
    }

    async fn flush(&mut self, folder: &std::path::Path) -> Result<(), std::io::Error> {
        if self.file.is_none() {
            self.file = Some(nameless(folder).await?);
        }
        let Some(file) = &mut self.file else { return Ok(()) };
        self.written += self.buffer.len() as u64;
        file.write_all(&self.buffer).await?;
        self.buffer.clear();
        Ok(())
    }
}

/// A file that nobody else can open and that goes with us.
async fn nameless(folder: &std::path::Path) -> Result<File, std::io::Error> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let name = format!("understudy-spool-{}-{}-{:x}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed), fastrand::u64(..));
    let path = folder.join(name);
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path).await?;
    remove_file(&path).await?;
    Ok(file)
}

impl Replay {
    /// The next change as it would have arrived in a transaction that is sent when it has committed.
    pub async fn next(&mut self) -> Result<Option<Bytes>, SpoolError> {
        loop {
            while let Some((header, _)) = self.buffer.split_first_chunk::<HEADER_BYTES>() {
                let [a, b, c, d, e, f, g, h] = *header;
                let (subxid, length) = (u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h]) as usize);
                if self.buffer.len() < HEADER_BYTES + length {
                    break;
                }
                self.buffer.advance(HEADER_BYTES);
                let change = self.buffer.split_to(length).freeze();
                if !self.aborted.contains(&subxid) {
                    return Ok(Some(change));
                }
            }
            let Some(file) = &mut self.file else {
                match self.tail.take() {
                    Some(tail) => self.buffer.extend_from_slice(&tail),
                    None if self.buffer.is_empty() => return Ok(None),
                    None => return Err(DecodeError::Length('S').into()),
                }
                continue;
            };
            self.buffer.reserve(READ_BYTES);
            let read = file.read_buf(&mut self.buffer).await;
            if read.map_err(|source| SpoolError::Disk { folder: self.folder.clone(), source })? == 0 {
                self.file = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn insert(relation: u32, size: usize) -> Vec<u8> {
        let mut bytes = relation.to_be_bytes().to_vec();
        bytes.extend_from_slice(b"N\0\x01t");
        bytes.extend_from_slice(&(size as u32).to_be_bytes());
        bytes.extend(std::iter::repeat_n(b'x', size));
        bytes
    }

    async fn sizes(replay: &mut Replay) -> Vec<usize> {
        let mut sizes = Vec::new();
        while let Some(change) = replay.next().await.unwrap() {
            assert!(Message::decode(&change).is_ok());
            sizes.push(change.len());
        }
        sizes
    }

    #[tokio::test]
    async fn keeps_what_commits_and_drops_what_does_not() {
        let mut spool = Spool::at(std::env::temp_dir(), 100);
        let big = MEMORY_BYTES_MAX / 2;
        for round in 0..5_usize {
            spool.add(7, 7, b'I', &insert(1, big + round)).await.unwrap();
            spool.add(7, 8, b'I', &insert(2, big)).await.unwrap();
            spool.add(9, 9, b'I', &insert(3, 10)).await.unwrap();
        }
        spool.abort(7, 8);
        spool.abort(9, 9);
        let mut replay = spool.commit(7).await.unwrap();
        assert_eq!(replay.touched, [(1, None)]);
        assert_eq!(sizes(&mut replay).await, (0..5).map(|round| 1 + 12 + big + round).collect::<Vec<_>>());
        // A transaction that was never heard of is empty, and nothing counts any more.
        assert_eq!(sizes(&mut spool.commit(9).await.unwrap()).await, Vec::<usize>::new());
        assert_eq!((spool.bytes, spool.open.len()), (0, 0));
    }

    #[tokio::test]
    async fn the_limit_counts_all_transactions() {
        let mut spool = Spool::at(std::env::temp_dir(), 1);
        spool.add(1, 1, b'I', &insert(1, 600 << 10)).await.unwrap();
        assert!(matches!(spool.add(2, 2, b'I', &insert(1, 600 << 10)).await, Err(SpoolError::Full(1))));
        spool.abort(1, 1);
        spool.add(2, 2, b'I', &insert(1, 600 << 10)).await.unwrap();
        let mut nowhere = Spool::at("/nonexistent".into(), 1);
        assert!(matches!(nowhere.add(1, 1, b'I', &insert(1, 100 << 10)).await, Err(SpoolError::Disk { .. })));
    }

    #[tokio::test]
    async fn a_name_is_known_at_the_commit() {
        let mut spool = Spool::at(std::env::temp_dir(), 1);
        let shape = b"\0\0\0\x05public\0t\0d\0\x01\x01id\0\0\0\0\x17\xff\xff\xff\xff";
        spool.add(1, 1, b'R', shape).await.unwrap();
        spool.add(1, 1, b'T', b"\0\0\0\x01\0\0\0\0\x05").await.unwrap();
        let replay = spool.commit(1).await.unwrap();
        assert_eq!(replay.touched, [(5, Some(("public".to_owned(), "t".to_owned())))]);
        assert!(spool.add(1, 1, b'I', b"\0").await.is_err());
    }
}
