//! Who may use the console. With `[proxy.console]`: that user, by md5 challenge (pgwire has SCRAM only together with a
//! second crypto provider). Without: any name, from loopback addresses only.
//! Source: PostgreSQL documentation, "Password Authentication" and "Message Flow", section "Start-up".

use crate::config::ConsoleUser;
use async_trait::async_trait;
use futures_util::Sink;
use pgwire::{
    api::{
        ClientInfo,
        auth::{
            AuthSource, DefaultServerParameterProvider, LoginInfo, Password, StartupHandler, finish_authentication,
            md5pass::{Md5PasswordAuthStartupHandler, hash_md5_password},
            protocol_negotiation, save_startup_parameters_to_metadata,
        },
    },
    error::{ErrorInfo, PgWireError, PgWireResult},
    messages::{PgWireBackendMessage, PgWireFrontendMessage},
};
use std::{
    fmt::Debug,
    hash::{BuildHasher, RandomState},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

/// Decides at start-up.
pub(super) enum Gate {
    /// No password is configured and the peer is on this machine.
    Open,
    /// No password is configured and the peer is elsewhere.
    Closed,
    /// A password is configured.
    Password(Box<Md5PasswordAuthStartupHandler<ConfiguredUser, DefaultServerParameterProvider>>),
}

impl Gate {
    pub(super) fn new(peer: SocketAddr, user: Option<ConsoleUser>) -> Self {
        match user {
            Some(user) => {
                Gate::Password(Box::new(Md5PasswordAuthStartupHandler::new(Arc::new(ConfiguredUser(user)), Arc::new(parameters()))))
            }
            None if is_loopback(peer.ip()) => Gate::Open,
            None => Gate::Closed,
        }
    }
}

/// 127.0.0.0/8, ::1, and 127.0.0.0/8 mapped into IPv6.
pub(super) fn is_loopback(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}

#[async_trait]
impl StartupHandler for Gate {
    async fn on_startup<C>(&self, client: &mut C, message: PgWireFrontendMessage) -> PgWireResult<()>
    where
        C: ClientInfo + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        match self {
            Gate::Password(handler) => handler.on_startup(client, message).await,
            Gate::Open => {
                let PgWireFrontendMessage::Startup(startup) = message else { return Ok(()) };
                protocol_negotiation(client, &startup).await?;
                save_startup_parameters_to_metadata(client, &startup);
                finish_authentication(client, &parameters()).await
            }
            Gate::Closed => Err(PgWireError::UserError(Box::new(ErrorInfo::new(
                "FATAL".into(),
                "28000".into(),
                "the console admits loopback clients only: connect from the machine understudy runs on, or set a user and a \
                 password in section [proxy.console] of proxy.toml"
                    .into(),
            )))),
        }
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

/// `[proxy.console]`
#[derive(Debug)]
pub(super) struct ConfiguredUser(ConsoleUser);

#[async_trait]
impl AuthSource for ConfiguredUser {
    async fn get_password(&self, login: &LoginInfo) -> PgWireResult<Password> {
        let salt = unpredictable().to_le_bytes().first_chunk::<4>().map_or_else(Vec::new, |salt| salt.to_vec());
        let user = login.user().unwrap_or_default();
        // A wrong name is asked for a password like a right one, and no answer fits.
        let expected = if user == self.0.user {
            hash_md5_password(user, self.0.password.expose(), &salt)
        } else {
            format!("{:016x}{:016x}", unpredictable(), unpredictable())
        };
        Ok(Password::new(Some(salt), expected.into_bytes()))
    }
}

/// SipHash under keys that the standard library takes from the operating system: not to be guessed from earlier salts.
fn unpredictable() -> u64 {
    RandomState::new().hash_one(std::time::Instant::now())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Secret;

    #[test]
    fn without_a_password_only_loopback_is_admitted() {
        for (peer, open) in [
            ("127.0.0.1:5000", true),
            ("127.8.9.10:5000", true),
            ("[::1]:5000", true),
            ("[::ffff:127.0.0.1]:5000", true),
            ("10.0.0.1:5000", false),
            ("[::ffff:10.0.0.1]:5000", false),
            ("[fe80::1]:5000", false),
            ("0.0.0.0:5000", false),
        ] {
            let peer: SocketAddr = peer.parse().unwrap();
            let gate = Gate::new(peer, None);
            assert!(matches!((gate, open), (Gate::Open, true) | (Gate::Closed, false)), "{peer}");
            let user = ConsoleUser { user: "operator".into(), password: Secret::new("x") };
            assert!(matches!(Gate::new(peer, Some(user)), Gate::Password(_)), "{peer}");
        }
    }
}
