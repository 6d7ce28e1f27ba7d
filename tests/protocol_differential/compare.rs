//! Two answers are the same, up to what PostgreSQL itself leaves open: keys, process ids, oids of objects that the
//! conversation made, and the moment of notifications.

use bytes::{Bytes, BytesMut};
use std::sync::atomic::{AtomicU32, Ordering};
use understudy::wire::{self, Message};

/// Oids from here on were drawn anew, by objects of a conversation; set once the fixed objects exist.
pub static FIRST_NEW_OID: AtomicU32 = AtomicU32::new(u32::MAX);

/// Messages with the open parts blanked; notifications apart, sorted.
pub struct Heard {
    pub messages: Vec<Message>,
    pub notifications: Vec<Vec<u8>>,
    /// Bytes behind the last whole message.
    pub rest: Vec<u8>,
}

pub fn heard(bytes: &[u8]) -> Heard {
    let mut buffer = BytesMut::from(bytes);
    let (mut messages, mut notifications, mut oids) = (Vec::new(), Vec::new(), Vec::new());
    while let Ok(Some(message)) = wire::take(&mut buffer) {
        match message.tag {
            b'A' => notifications.push(message.body[4..].to_vec()),
            b'K' => messages.push(Message { tag: b'K', body: Bytes::new() }),
            b'T' => messages.push(Message { tag: b'T', body: without_new_oids(&message.body, &mut oids) }),
            _ => messages.push(message),
        }
    }
    notifications.sort();
    Heard { messages, notifications, rest: buffer.to_vec() }
}

/// Table oids of a RowDescription by order of appearance.
fn without_new_oids(body: &Bytes, known: &mut Vec<u32>) -> Bytes {
    let first_new = FIRST_NEW_OID.load(Ordering::Relaxed);
    let mut bytes = body.to_vec();
    let mut at = 2;
    while let Some(end) = bytes.get(at..).and_then(|rest| rest.iter().position(|byte| *byte == 0)) {
        at += end + 1;
        let Some(field) = bytes.get_mut(at..at + 4) else { break };
        let oid = u32::from_be_bytes([field[0], field[1], field[2], field[3]]);
        if oid >= first_new {
            let place = known.iter().position(|one| *one == oid).unwrap_or_else(|| {
                known.push(oid);
                known.len() - 1
            });
            field.copy_from_slice(&(first_new + place as u32).to_be_bytes());
        }
        at += 18;
    }
    bytes.into()
}

/// What differs first, for people.
pub fn difference(direct: &[u8], proxied: &[u8]) -> Option<String> {
    let (a, b) = (heard(direct), heard(proxied));
    if let Some(at) = (0..a.messages.len().max(b.messages.len())).find(|at| a.messages.get(*at) != b.messages.get(*at)) {
        let side = |messages: &[Message]| {
            let from = at.saturating_sub(6);
            let shown = messages.iter().enumerate().skip(from).take(at + 4 - from);
            shown
                .map(|(place, message)| format!("{}{}", if place == at { "> " } else { "  " }, one(message)))
                .collect::<Vec<_>>()
                .join("\n")
        };
        return Some(format!("message {at} differs\n--- direct\n{}\n--- proxy\n{}", side(&a.messages), side(&b.messages)));
    }
    if a.notifications != b.notifications {
        let list = |heard: &Heard| heard.notifications.iter().map(|one| one.escape_ascii().to_string()).collect::<Vec<_>>().join(", ");
        return Some(format!("notifications differ\n--- direct\n{}\n--- proxy\n{}", list(&a), list(&b)));
    }
    (a.rest != b.rest).then(|| format!("half a message at the end: {:?} direct, {:?} through the proxy", a.rest, b.rest))
}

fn one(message: &Message) -> String {
    let body = &message.body[..message.body.len().min(160)];
    format!("{} {:>6} {}", message.tag as char, message.body.len(), body.escape_ascii())
}

/// The last messages of an answer.
pub fn show(bytes: &[u8], count: usize) -> String {
    let heard = heard(bytes);
    let from = heard.messages.len().saturating_sub(count);
    heard.messages[from..].iter().map(one).collect::<Vec<_>>().join("\n")
}

/// What a client sends, for people.
pub fn show_requests(bytes: &[u8]) -> String {
    let mut buffer = BytesMut::from(bytes);
    let mut lines = Vec::new();
    while let Ok(Some(message)) = wire::take(&mut buffer) {
        lines.push(format!("    {}", one(&message)));
    }
    if !buffer.is_empty() {
        lines.push(format!("    and {} bytes: {}", buffer.len(), buffer[..buffer.len().min(60)].escape_ascii()));
    }
    lines.join("\n")
}
