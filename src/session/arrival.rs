//! The first packets of a connection, up to the one that says who the client is: requests for encryption in any order,
//! direct TLS, cancels. What PostgreSQL does with each is done here too (`ProcessStartupPacket` and `ProcessSSLStartup` in
//! `src/backend/tcop/backend_startup.c`).

use crate::{
    net::{Acceptor, ClientTls, Stream},
    wire::frontend::{STARTUP_BYTES_MAX, Startup},
};
use bytes::{Bytes, BytesMut};
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// The first byte of a TLS handshake record; no start-up packet begins with it, as it would be of 352 MiB.
const TLS_HANDSHAKE: u8 = 0x16;

/// Who has come.
pub(super) struct Arrival {
    pub stream: Stream,
    /// `None`: not over TLS.
    pub tls: Option<ClientTls>,
    pub startup: Startup,
    /// The start-up packet as it came, and whatever the client has sent behind it.
    pub packet: Bytes,
    pub behind: BytesMut,
}

/// Why nobody came in.
pub(super) enum Turned {
    /// To be told.
    Refused { stream: Stream, code: &'static str, message: String, hint: Option<&'static str> },
    /// There is nobody to tell, or nothing to be told.
    Gone,
}

/// Reads until the client has said who it is. How long that may take is the caller's business.
/// Without an acceptor there is no TLS: on Unix sockets, where PostgreSQL answers `N`, too.
pub(super) async fn arrive(mut stream: Stream, acceptor: Option<Arc<Acceptor>>) -> Result<Arrival, Turned> {
    let mut first = [0];
    if let Stream::Tcp(stream) = &stream
        && !matches!(stream.peek(&mut first).await, Ok(1))
    {
        return Err(Turned::Gone); // a health check that says nothing
    }
    let mut tls = None;
    if first == [TLS_HANDSHAKE] {
        let Some(acceptor) = &acceptor else {
            let message = "direct TLS is not configured here: connect without sslnegotiation=direct, or set [proxy.tls]".into();
            return Err(Turned::Refused { stream, code: "08P01", message, hint: None });
        };
        let (accepted, client) = shake_hands(stream, acceptor).await?;
        if !client.negotiated_protocol {
            // it may mean another protocol (ALPACA, CVE-2021-23214's kin): PostgreSQL closes without a word
            tracing::debug!("a direct TLS connection came without the protocol \"postgresql\" (ALPN)");
            return Err(Turned::Gone);
        }
        (stream, tls) = (accepted, Some(client));
    }
    let (mut ssl_done, mut gss_done) = (false, false);
    let mut buffer = BytesMut::new();
    loop {
        let (packet, body) = match next_packet(&mut stream, &mut buffer).await {
            Ok(Some(packet)) => packet,
            Ok(None) => return Err(Turned::Gone),
            Err(message) => return Err(Turned::Refused { stream, code: "08P01", message: message.into(), hint: None }),
        };
        let startup = match Startup::parse(&body) {
            Some(Startup::Ssl) if ssl_done => None,
            Some(Startup::GssEncryption) if gss_done => None,
            startup => startup,
        };
        match startup {
            Some(Startup::Ssl) => {
                let acceptor = acceptor.as_ref().filter(|_| tls.is_none());
                // Bytes behind the request came unencrypted, and somebody in the middle may have put them there: they must not be
                // taken for the client's (CVE-2021-23214).
                if acceptor.is_some() && !buffer.is_empty() {
                    return Err(stuffed(stream, "SSL"));
                }
                if stream.write_all(if acceptor.is_some() { b"S" } else { b"N" }).await.is_err() {
                    return Err(Turned::Gone);
                }
                if !buffer.is_empty() {
                    return Err(stuffed(stream, "SSL"));
                }
                ssl_done = true;
                if let Some(acceptor) = acceptor {
                    let (accepted, client) = shake_hands(stream, acceptor).await?;
                    (stream, tls, gss_done) = (accepted, Some(client), true);
                }
            }
            Some(Startup::GssEncryption) => {
                if stream.write_all(b"N").await.is_err() {
                    return Err(Turned::Gone);
                }
                if !buffer.is_empty() {
                    return Err(stuffed(stream, "GSSAPI encryption"));
                }
                (gss_done, ssl_done) = (true, tls.is_some()); // having been refused the one, it may ask for the other again
            }
            Some(startup) => return Ok(Arrival { stream, tls, startup, packet, behind: buffer }),
            None => {
                let (code, message) = not_understood(&body);
                return Err(Turned::Refused { stream, code, message, hint: None });
            }
        }
    }
}

async fn shake_hands(stream: Stream, acceptor: &Acceptor) -> Result<(Stream, ClientTls), Turned> {
    // boxed: its room is needed for this moment only, not as long as the session
    Box::pin(acceptor.accept(stream)).await.map_err(|error| {
        tracing::debug!(%error, "a TLS handshake with a client failed");
        Turned::Gone // the TLS alert has said why
    })
}

fn stuffed(stream: Stream, request: &str) -> Turned {
    let message = format!("received unencrypted data after {request} request");
    let hint = "This could be either a client-software bug or evidence of an attempted man-in-the-middle attack.";
    Turned::Refused { stream, code: "08P01", message, hint: Some(hint) }
}

fn not_understood(body: &[u8]) -> (&'static str, String) {
    let version = body.first_chunk::<4>().map(|bytes| u32::from_be_bytes(*bytes)).unwrap_or_default();
    match (version >> 16, version & 0xffff) {
        (3, _) => ("08P01", "invalid startup packet layout: expected terminator as last byte".into()),
        (1234, 5678) => ("08P01", "invalid length of query cancel packet".into()),
        (major, minor) => ("0A000", format!("unsupported frontend protocol {major}.{minor}: server supports 3.0 to 3.2")),
    }
}

/// The next whole packet: as it came, and without its length word. `None`: the client went away.
async fn next_packet(stream: &mut Stream, buffer: &mut BytesMut) -> Result<Option<(Bytes, Bytes)>, &'static str> {
    loop {
        if let Some(length) = buffer.first_chunk::<4>() {
            let length = u32::from_be_bytes(*length) as usize;
            if !(8..=STARTUP_BYTES_MAX).contains(&length) {
                return Err("invalid length of startup packet");
            }
            if buffer.len() >= length {
                let packet = buffer.split_to(length).freeze();
                let body = packet.slice(4..);
                return Ok(Some((packet, body)));
            }
        }
        buffer.reserve(1 << 10);
        match stream.read_buf(buffer).await {
            Ok(0) | Err(_) => return Ok(None),
            Ok(_) => {}
        }
    }
}
