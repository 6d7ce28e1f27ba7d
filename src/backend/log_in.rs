//! The client's side of authentication.

use super::{BackendError, Connection};
use crate::{
    auth::{
        Keys, ServerLogin, md5_answer,
        scram::{self, SCRAM, SCRAM_PLUS},
    },
    config::ChannelBinding,
    net::server_end_point,
    wire::{WireError, backend::ErrorFields, put, put_cstr, take_cstr, take_i32},
};
use bytes::{Bytes, BytesMut};
use postgres_protocol::authentication::{md5_hash, sasl};

/// A SCRAM exchange under way.
enum Scram {
    Password(sasl::ScramSha256),
    Keys(scram::Client),
}

const NONE_CONFIGURED: &str = "the server asks for a password and none is known: put it into the url or add a [[database.user]]";

impl Connection {
    /// Until AuthenticationOk. `binding`: the url's wish for channel binding.
    pub(super) async fn log_in(&mut self, user: &str, login: &ServerLogin, binding: ChannelBinding) -> Result<(), BackendError> {
        let refuse = |reason: &str| BackendError::Authentication { user: user.to_owned(), reason: reason.to_owned() };
        let mut scram: Option<Scram> = None;
        let mut bound = false;
        loop {
            let message = self.receive().await?;
            match message.tag {
                b'E' => return Err(BackendError::Server(ErrorFields::parse(&message.body))),
                b'R' => {}
                b'N' | b'v' => continue,
                tag => return Err(BackendError::Protocol(format!("unexpected message {:?} during log-in", tag as char))),
            }
            let mut rest = &message.body[..];
            let mut answer = BytesMut::new();
            match take_i32(&mut rest).ok_or(WireError::Truncated('R'))? {
                0 if binding == ChannelBinding::Require && !bound => {
                    return Err(refuse("channel_binding=require, and the server did not ask for SCRAM-SHA-256-PLUS over TLS"));
                }
                0 => return Ok(()),
                3 => match login {
                    ServerLogin::Password(password) => put(&mut answer, b'p', |b| put_cstr(b, password.expose().as_bytes())),
                    ServerLogin::Nothing => return Err(refuse(NONE_CONFIGURED)),
                    ServerLogin::Md5(_) | ServerLogin::Scram(_) => {
                        return Err(refuse("the server asks for the password in clear, of which only a proof is known here"));
                    }
                },
                5 => {
                    let salt: [u8; 4] = rest.try_into().map_err(|_| WireError::Truncated('R'))?;
                    let hash = match login {
                        ServerLogin::Password(password) => md5_hash(user.as_bytes(), password.expose().as_bytes(), salt),
                        ServerLogin::Md5(stored) => md5_answer(stored.expose(), salt),
                        ServerLogin::Nothing => return Err(refuse(NONE_CONFIGURED)),
                        ServerLogin::Scram(_) => return Err(refuse("the server asks for md5, and only a SCRAM proof is known here")),
                    };
                    put(&mut answer, b'p', |b| put_cstr(b, hash.as_bytes()));
                }
                10 => {
                    let (begun, first) = self.begin_scram(rest, login, binding).map_err(|reason| refuse(&reason))?;
                    bound = first.windows(SCRAM_PLUS.len()).any(|window| window == SCRAM_PLUS.as_bytes());
                    answer = BytesMut::from(&first[..]);
                    scram = Some(begun);
                }
                11 => {
                    let failed = |error: &dyn std::fmt::Display| refuse(&format!("SCRAM failed: {error}"));
                    let text = match scram.as_mut() {
                        Some(Scram::Password(state)) => {
                            state.update(rest).map_err(|error| failed(&error))?;
                            state.message().to_vec()
                        }
                        Some(Scram::Keys(state)) => state.answer(rest).map_err(|error| failed(&error))?.into_bytes(),
                        None => return Err(BackendError::Protocol("SASL out of order".into())),
                    };
                    put(&mut answer, b'p', |b| b.extend_from_slice(&text));
                }
                12 => {
                    let proven = match scram.as_mut() {
                        Some(Scram::Password(state)) => state.finish(rest).map_err(|error| error.to_string()),
                        Some(Scram::Keys(state)) => state.finish(rest).map_err(|error| error.to_string()),
                        None => return Err(BackendError::Protocol("SASL out of order".into())),
                    };
                    proven.map_err(|error| refuse(&format!("the server failed to prove that it knows the password: {error}")))?;
                    continue;
                }
                kind => return Err(refuse(&format!("the server asks for authentication method {kind}, which understudy cannot do"))),
            }
            self.send(&answer).await?;
        }
    }

    /// Chooses the mechanism and makes the whole SASLInitialResponse.
    fn begin_scram(&self, offered: &[u8], login: &ServerLogin, binding: ChannelBinding) -> Result<(Scram, Bytes), String> {
        let end_point = server_end_point(&self.stream).filter(|_| binding != ChannelBinding::Disable);
        let plus = mechanisms(offered).any(|name| name == SCRAM_PLUS.as_bytes()) && end_point.is_some();
        if !plus && !mechanisms(offered).any(|name| name == SCRAM.as_bytes()) {
            return Err("the server offers no SASL mechanism that understudy knows (SCRAM-SHA-256)".into());
        }
        if binding == ChannelBinding::Require && !plus {
            return Err("channel_binding=require, and the server does not offer SCRAM-SHA-256-PLUS".into());
        }
        match login {
            ServerLogin::Password(password) => {
                let binding = match end_point {
                    Some(end_point) if plus => sasl::ChannelBinding::tls_server_end_point(end_point),
                    Some(_) => sasl::ChannelBinding::unrequested(),
                    None => sasl::ChannelBinding::unsupported(),
                };
                let state = sasl::ScramSha256::new(password.expose().as_bytes(), binding);
                let first = initial(plus, state.message());
                Ok((Scram::Password(state), first))
            }
            ServerLogin::Scram(keys) => {
                let (state, first) = scram_by_keys(keys, end_point.as_deref().filter(|_| plus));
                Ok((Scram::Keys(state), first))
            }
            ServerLogin::Nothing => Err(NONE_CONFIGURED.into()),
            ServerLogin::Md5(_) => Err("the server asks for SCRAM, and only an md5 hash is known here".into()),
        }
    }
}

/// Begins SCRAM with keys; `end_point`: with channel binding. Returns the whole SASLInitialResponse.
pub fn scram_by_keys(keys: &Keys, end_point: Option<&[u8]>) -> (scram::Client, Bytes) {
    let (state, first) = scram::Client::begin(keys.clone(), end_point);
    let message = initial(end_point.is_some(), first.as_bytes());
    (state, message)
}

fn initial(plus: bool, first: &[u8]) -> Bytes {
    let mut message = BytesMut::new();
    put(&mut message, b'p', |b| {
        put_cstr(b, if plus { SCRAM_PLUS } else { SCRAM }.as_bytes());
        b.extend_from_slice(&(first.len() as i32).to_be_bytes());
        b.extend_from_slice(first);
    });
    message.freeze()
}

fn mechanisms(mut rest: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || take_cstr(&mut rest).filter(|name| !name.is_empty()))
}
