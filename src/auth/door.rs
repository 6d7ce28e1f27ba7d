//! The conversation with a client that authenticates here. What it says is limited in size; how long it may take is the
//! caller's business.

use super::{
    Policy, ServerLogin,
    hba::{Attempt, ClientCertificate, Method},
    scram::{self, SCRAM, SCRAM_PLUS, ScramError, Verifier},
    stored::Stored,
};
use crate::{
    config::Secret,
    net::{ClientTls, Stream},
    wire::{self, put, put_cstr, take_cstr, take_i32},
};
use bytes::{Bytes, BytesMut};
use std::net::IpAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Longest answer of a client (`PG_MAX_AUTH_TOKEN_LENGTH`, `src/include/libpq/auth.h`).
const ANSWER_BYTES_MAX: usize = 65_535;

/// Who wants to log in.
#[derive(Clone, Copy, Debug)]
pub struct Applicant<'a> {
    /// Role.
    pub user: &'a str,
    /// Database, as named by the client.
    pub database: &'a str,
    /// What came of TLS; `None`: it is not on TLS.
    pub tls: Option<&'a ClientTls>,
    /// `None`: a Unix socket.
    pub address: Option<IpAddr>,
    /// Of the process at the other end of a Unix socket.
    pub uid: Option<u32>,
    /// `replication=true`
    pub physical_replication: bool,
}

/// What the client is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denial {
    /// SQLSTATE
    pub code: &'static str,
    /// As PostgreSQL would put it.
    pub message: String,
    /// What to do.
    pub hint: Option<&'static str>,
}

/// Why nothing came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// To be told to the client.
    Denied(Denial),
    /// It went away; there is nobody to tell.
    Gone,
}

impl Ended {
    fn denied(code: &'static str, message: impl Into<String>) -> Self {
        Ended::Denied(Denial { code, message: message.into(), hint: None })
    }

    fn wrong_password(user: &str) -> Self {
        Self::denied("28P01", format!("password authentication failed for user \"{user}\""))
    }
}

/// How a connection must authenticate.
///
/// # Errors
/// No rule fits, or one rejects, or a certificate is missing, or the operating system knows the client by another name.
pub async fn method(policy: &Policy, applicant: &Applicant<'_>) -> Result<Method, Denial> {
    let Applicant { user, database, tls, address, uid, physical_replication } = *applicant;
    let shown = || {
        let host = address.map_or("[local]".to_owned(), |address| address.to_canonical().to_string());
        let encryption = if tls.is_some() { "SSL encryption" } else { "no encryption" };
        format!("host \"{host}\", user \"{user}\", database \"{database}\", {encryption}")
    };
    let deny = |message| Denial { code: "28000", message, hint: None };
    let attempt = Attempt { tls: tls.is_some(), address, database, user, physical_replication };
    let rule = policy.rule(&attempt).map_err(|()| deny(format!("no hba rule of understudy for {}", shown())))?;
    let Some(rule) = rule else { return Ok(policy.default_method()) };
    if rule.method == Method::Reject {
        return Err(deny(format!("an hba rule of understudy rejects connection for {}", shown())));
    }
    if rule.client_certificate != ClientCertificate::No && !tls.is_some_and(|tls| tls.has_certificate) {
        return Err(deny("connection requires a valid client certificate".into()));
    }
    if rule.client_certificate == ClientCertificate::VerifyFull {
        let name = tls.and_then(|tls| tls.common_name.as_deref());
        if !name.is_some_and(|name| policy.allows(rule.map.as_deref(), name, user)) {
            return Err(deny(format!("certificate authentication failed for user \"{user}\"")));
        }
    }
    if rule.method == Method::Peer {
        let name = match uid {
            Some(uid) => system_user(uid).await,
            None => None,
        };
        if !name.as_deref().is_some_and(|name| policy.allows(rule.map.as_deref(), name, user)) {
            tracing::info!(uid, system_user = name, role = user, "peer authentication failed");
            return Err(deny(format!("Peer authentication failed for user \"{user}\"")));
        }
    }
    Ok(rule.method)
}

/// The name of a user of the operating system. On a thread that may wait: it can be a directory server's to say.
async fn system_user(uid: u32) -> Option<String> {
    let found = tokio::task::spawn_blocking(move || nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(uid))).await;
    match found {
        Ok(Ok(user)) => user.map(|user| user.name),
        Ok(Err(error)) => {
            tracing::warn!(uid, %error, "cannot look a user of the operating system up");
            None
        }
        Err(_) => None,
    }
}

/// Authenticates by a method other than `reject` and `relay`. AuthenticationOk is left to the caller. `stored` is what is
/// known of the user; `None`: nothing, which the client cannot tell from a wrong password.
///
/// # Errors
/// [`Ended`]
pub async fn authenticate(
    stream: &mut Stream,
    buffer: &mut BytesMut,
    policy: &Policy,
    applicant: &Applicant<'_>,
    method: Method,
    stored: Option<&Stored>,
) -> Result<ServerLogin, Ended> {
    let user = applicant.user;
    let scram = match (method, stored) {
        (Method::Trust | Method::Cert | Method::Peer | Method::Reject | Method::Relay, _) => return Ok(ServerLogin::Nothing),
        (Method::Password, _) => {
            let password = cleartext(stream, buffer).await?;
            return match stored {
                Some(stored @ (Stored::Plain(..) | Stored::Scram(_))) if stored.fits(user, password.expose()) => {
                    Ok(ServerLogin::Password(password))
                }
                Some(Stored::Plain(..) | Stored::Scram(_)) => Err(Ended::wrong_password(user)),
                stored => {
                    // takes as long as for a name that has a verifier
                    let _ = policy.mock(user).fits(password.expose());
                    let fits = stored.is_some_and(|stored| stored.fits(user, password.expose()));
                    if fits { Ok(ServerLogin::Password(password)) } else { Err(Ended::wrong_password(user)) }
                }
            };
        }
        (Method::Md5, Some(Stored::Md5(own))) => {
            let salt: [u8; 4] = scram::random();
            let mut request = 5i32.to_be_bytes().to_vec();
            request.extend_from_slice(&salt);
            let answer = ask(stream, buffer, &request).await?;
            let mut rest = &answer[..];
            let answer = take_cstr(&mut rest).map(String::from_utf8_lossy).unwrap_or_default();
            let fits = stored.is_some_and(|stored| stored.fits_md5(user, salt, &answer));
            return if fits { Ok(ServerLogin::Md5(own.clone())) } else { Err(Ended::wrong_password(user)) };
        }
        (Method::Md5 | Method::Scram, stored) => stored.and_then(Stored::verifier),
    };
    let mock;
    let verifier = match scram {
        Some(verifier) => verifier,
        None => {
            mock = policy.mock(user);
            &mock
        }
    };
    let end_point = applicant.tls.and_then(|tls| tls.end_point.as_deref());
    let keys = prove(stream, buffer, user, verifier, end_point).await?;
    Ok(match stored {
        // also good where the server stores another verifier of the same password
        Some(Stored::Plain(password, _)) => ServerLogin::Password(password.clone()),
        _ => ServerLogin::Scram(keys),
    })
}

/// A whole SCRAM exchange with a client, up to the server's own proof.
///
/// # Errors
/// [`Ended`]
pub async fn prove(
    stream: &mut Stream,
    buffer: &mut BytesMut,
    user: &str,
    verifier: &Verifier,
    end_point: Option<&[u8]>,
) -> Result<scram::Keys, Ended> {
    let mut offer = BytesMut::from(&10i32.to_be_bytes()[..]);
    if end_point.is_some() {
        put_cstr(&mut offer, SCRAM_PLUS.as_bytes());
    }
    put_cstr(&mut offer, SCRAM.as_bytes());
    put_cstr(&mut offer, b"");
    let answer = ask(stream, buffer, &offer).await?;
    let (plus, first) = initial_response(&answer).ok_or_else(|| Ended::denied("08P01", "malformed SASL initial response"))?;
    if plus && end_point.is_none() {
        return Err(Ended::denied("08P01", "client selected an invalid SASL authentication mechanism"));
    }
    let explain = |error: ScramError| match error {
        ScramError::Wrong => Ended::wrong_password(user),
        ScramError::Binding(message) => Ended::denied("28000", message),
        ScramError::Malformed(_) => Ended::denied("08P01", error.to_string()),
    };
    let (server, challenge) = scram::Server::begin(verifier.clone(), end_point, plus, &first).map_err(explain)?;
    let mut request = 11i32.to_be_bytes().to_vec();
    request.extend_from_slice(challenge.as_bytes());
    let answer = ask(stream, buffer, &request).await?;
    let (keys, last) = server.finish(&answer).map_err(explain)?;
    let mut message = BytesMut::new();
    put(&mut message, b'R', |b| {
        b.extend_from_slice(&12i32.to_be_bytes());
        b.extend_from_slice(last.as_bytes());
    });
    stream.write_all(&message).await.map_err(|_| Ended::Gone)?;
    Ok(keys)
}

/// Of a SASLInitialResponse: whether channel binding was chosen, and the mechanism's first message.
pub(crate) fn initial_response(body: &Bytes) -> Option<(bool, Bytes)> {
    let mut rest = &body[..];
    let plus = match take_cstr(&mut rest)? {
        name if name == SCRAM.as_bytes() => false,
        name if name == SCRAM_PLUS.as_bytes() => true,
        _ => return None,
    };
    let length = usize::try_from(take_i32(&mut rest)?).ok()?;
    (rest.len() == length).then(|| (plus, body.slice_ref(rest)))
}

async fn cleartext(stream: &mut Stream, buffer: &mut BytesMut) -> Result<Secret, Ended> {
    let answer = ask(stream, buffer, &3i32.to_be_bytes()).await?;
    let mut rest = &answer[..];
    let password =
        take_cstr(&mut rest).filter(|_| rest.is_empty()).ok_or_else(|| Ended::denied("08P01", "invalid password packet size"))?;
    if password.is_empty() {
        return Err(Ended::denied("28P01", "empty password returned by client"));
    }
    Ok(Secret::new(String::from_utf8_lossy(password)))
}

/// Sends a request for authentication and waits for the answer.
async fn ask(stream: &mut Stream, buffer: &mut BytesMut, request: &[u8]) -> Result<Bytes, Ended> {
    let mut message = BytesMut::new();
    put(&mut message, b'R', |b| b.extend_from_slice(request));
    stream.write_all(&message).await.map_err(|_| Ended::Gone)?;
    next_answer(stream, buffer).await
}

/// The client's next message, which must be an answer to a request for authentication.
///
/// # Errors
/// [`Ended`]
pub async fn next_answer(stream: &mut Stream, buffer: &mut BytesMut) -> Result<Bytes, Ended> {
    loop {
        if let Some(header) = wire::peek(buffer).map_err(|_| Ended::denied("08P01", "invalid message length"))? {
            if header.tag != b'p' {
                return Err(Ended::denied("08P01", format!("expected password response, got message type {}", header.tag)));
            }
            if header.len > ANSWER_BYTES_MAX + 5 {
                return Err(Ended::denied("08P01", "invalid message length"));
            }
            if let Ok(Some(message)) = wire::take(buffer) {
                return Ok(message.body);
            }
        }
        buffer.reserve(1 << 10);
        match stream.read_buf(buffer).await {
            Ok(0) | Err(_) => return Err(Ended::Gone),
            Ok(_) => {}
        }
    }
}
