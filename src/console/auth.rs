//! Who may use the console. With `[proxy.console]`: that user, by SCRAM (bound to the TLS connection where there is one).
//! Without: any name, from loopback addresses and over the Unix socket. pgwire only hears of those who have been let in.
//! Source: PostgreSQL documentation, "SASL Authentication" and "Message Flow", section "Start-up".

use crate::{
    auth::{self, Denial, Ended, scram},
    config::ConsoleUser,
    net::{ClientTls, Peer, Stream},
    wire::frontend::{STARTUP_BYTES_MAX, Startup},
};
use async_trait::async_trait;
use bytes::BytesMut;
use futures_util::Sink;
use pgwire::{
    api::{
        ClientInfo,
        auth::{
            DefaultServerParameterProvider, StartupHandler, finish_authentication, protocol_negotiation,
            save_startup_parameters_to_metadata,
        },
    },
    error::PgWireResult,
    messages::{PgWireBackendMessage, PgWireFrontendMessage},
};
use std::{fmt::Debug, net::IpAddr, time::Duration};
use tokio::io::AsyncReadExt;

/// A client that has not logged in by then is left alone.
const LOGIN_MAX: Duration = Duration::from_secs(60);

/// 127.0.0.0/8, ::1, and 127.0.0.0/8 mapped into IPv6.
pub(super) fn is_loopback(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}

/// Lets a client in, or says why not. Takes its answers out of `first`, and leaves the start-up packet at its front.
pub(super) async fn admit(
    stream: &mut Stream,
    first: &mut BytesMut,
    peer: Peer,
    tls: Option<&ClientTls>,
    user: Option<&ConsoleUser>,
) -> Result<(), Ended> {
    if user.is_none() && peer.address().is_none_or(is_loopback) {
        return Ok(());
    }
    let proving = async {
        // read first in any case: a connection closed with bytes unread loses what was said last
        let (packet, name) = name(stream, first).await.ok_or(Ended::Gone)?;
        let Some(user) = user else {
            return Err(Ended::Denied(Denial {
                code: "28000",
                message: "the console admits loopback clients only: connect from the machine understudy runs on, or set a user and a \
                          password in section [proxy.console] of proxy.toml"
                    .into(),
                hint: None,
            }));
        };
        // a wrong name is asked for a password like a right one, and no answer fits
        let verifier = match name == user.user {
            true => scram::Verifier::of_password(user.password.expose()),
            false => None,
        };
        let verifier = verifier.unwrap_or_else(|| scram::Verifier::mock(&name, &scram::random()));
        let end_point = tls.and_then(|tls| tls.end_point.as_deref());
        auth::prove(stream, first, &name, &verifier, end_point).await?;
        let behind = std::mem::replace(first, packet);
        first.extend_from_slice(&behind);
        Ok(())
    };
    tokio::time::timeout(LOGIN_MAX, proving).await.unwrap_or(Err(Ended::Gone))
}

/// Takes the start-up packet and the name in it.
async fn name(stream: &mut Stream, first: &mut BytesMut) -> Option<(BytesMut, String)> {
    loop {
        if let Some(length) = first.first_chunk::<4>() {
            let length = u32::from_be_bytes(*length) as usize;
            if !(8..=STARTUP_BYTES_MAX).contains(&length) {
                return None;
            }
            if first.len() >= length {
                let packet = first.split_to(length);
                let body = bytes::Bytes::copy_from_slice(packet.get(4..)?);
                let Some(Startup::Parameters { parameters, .. }) = Startup::parse(&body) else { return None };
                let name = parameters.iter().rev().find(|(key, _)| &key[..] == b"user").map(|(_, name)| name.clone())?;
                return Some((packet, String::from_utf8_lossy(&name).into_owned()));
            }
        }
        if stream.read_buf(first).await.ok()? == 0 {
            return None;
        }
    }
}

/// For those who have been let in.
pub(super) struct Admitted;

#[async_trait]
impl StartupHandler for Admitted {
    async fn on_startup<C>(&self, client: &mut C, message: PgWireFrontendMessage) -> PgWireResult<()>
    where
        C: ClientInfo + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::Error: Debug,
        pgwire::error::PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        let PgWireFrontendMessage::Startup(startup) = message else { return Ok(()) };
        protocol_negotiation(client, &startup).await?;
        save_startup_parameters_to_metadata(client, &startup);
        finish_authentication(client, &parameters()).await
    }
}

/// What the console says about itself. The version is one that every psql since 14 takes without a warning; no
/// PostgreSQL answers here.
fn parameters() -> DefaultServerParameterProvider {
    let mut parameters = DefaultServerParameterProvider::default();
    parameters.server_version = concat!("14.0 (understudy ", env!("CARGO_PKG_VERSION"), ")").into();
    parameters.is_superuser = false;
    parameters
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_on_this_machine() {
        for (peer, here) in [
            ("127.0.0.1", true),
            ("127.8.9.10", true),
            ("::1", true),
            ("::ffff:127.0.0.1", true),
            ("10.0.0.1", false),
            ("::ffff:10.0.0.1", false),
            ("fe80::1", false),
            ("0.0.0.0", false),
        ] {
            assert_eq!(is_loopback(peer.parse().unwrap()), here, "{peer}");
        }
    }
}
