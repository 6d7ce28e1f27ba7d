//! SCRAM-SHA-256 and SCRAM-SHA-256-PLUS, both sides, without sockets. The server's side learns from a right proof the keys
//! with which the client's side logs in at the next server, as PgBouncer's pass-through does.

use base64::{Engine, engine::general_purpose::STANDARD};
use ring::{
    digest, hmac,
    rand::{SecureRandom, SystemRandom},
};
use std::fmt;
use subtle::ConstantTimeEq;

/// Without channel binding.
pub const SCRAM: &str = "SCRAM-SHA-256";
/// With it.
pub const SCRAM_PLUS: &str = "SCRAM-SHA-256-PLUS";
/// What the binding is called in messages.
const BOUND: &str = "p=tls-server-end-point,,";
const KEY_BYTES: usize = 32;
/// Random bytes of a nonce (`SCRAM_RAW_NONCE_LEN`, `src/include/common/scram-common.h`).
const NONCE_BYTES: usize = 18;
/// Salt and iterations of a verifier for a name that does not exist: PostgreSQL's defaults.
const MOCK_SALT_BYTES: usize = 16;
const MOCK_ITERATIONS: u32 = 4096;
/// Messages longer than this are not SCRAM: names, nonces and proofs are short.
const MESSAGE_BYTES_MAX: usize = 4 << 10;

type Key = [u8; KEY_BYTES];

/// Why an exchange ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScramError {
    /// Not a message of the mechanism, or out of its order. SQLSTATE 08P01.
    #[error("malformed SCRAM message: {0}")]
    Malformed(&'static str),
    /// Somebody sits in the middle, or the client is confused about TLS. SQLSTATE 28000.
    #[error("{0}")]
    Binding(&'static str),
    /// The proof does not fit. SQLSTATE 28P01.
    #[error("the password does not fit")]
    Wrong,
}

use ScramError::Malformed;

/// What a server stores of a password.
#[derive(Clone, PartialEq, Eq)]
pub struct Verifier {
    iterations: u32,
    salt: Vec<u8>,
    stored_key: Key,
    server_key: Key,
}

/// What a right proof reveals: enough to log in where the same verifier is stored.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Keys {
    client_key: Key,
    server_key: Key,
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Verifier(***)")
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keys(***)")
    }
}

impl Verifier {
    /// From `SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>`.
    pub fn parse(text: &str) -> Option<Self> {
        let (numbers, keys) = text.strip_prefix("SCRAM-SHA-256$")?.split_once('$')?;
        let ((iterations, salt), (stored, server)) = (numbers.split_once(':')?, keys.split_once(':')?);
        let key = |text: &str| -> Option<Key> { STANDARD.decode(text).ok()?.try_into().ok() };
        Some(Verifier {
            iterations: iterations.parse().ok().filter(|iterations| *iterations > 0)?,
            salt: STANDARD.decode(salt).ok()?,
            stored_key: key(stored)?,
            server_key: key(server)?,
        })
    }

    /// Of a password in clear.
    pub fn of_password(password: &str) -> Option<Self> {
        Self::parse(&postgres_protocol::password::scram_sha_256(password.as_bytes()))
    }

    /// For a name that has none: the same salt each time it is asked, and no proof fits.
    pub fn mock(name: &str, secret: &Key) -> Self {
        let of = |what: &str| hmac(secret, format!("{what}{name}").as_bytes());
        let salt = of("salt:").get(..MOCK_SALT_BYTES).unwrap_or_default().to_vec();
        Verifier { iterations: MOCK_ITERATIONS, salt, stored_key: of("stored:"), server_key: of("server:") }
    }

    /// Whether it is of this password.
    pub fn fits(&self, password: &str) -> bool {
        // both sides of an exchange, played here, so that there is one code for preparing passwords
        let mut client = postgres_protocol::authentication::sasl::ScramSha256::new(
            password.as_bytes(),
            postgres_protocol::authentication::sasl::ChannelBinding::unsupported(),
        );
        let Ok((server, first)) = Server::begin(self.clone(), None, false, client.message()) else { return false };
        client.update(first.as_bytes()).is_ok() && server.finish(client.message()).is_ok()
    }
}

fn hmac(key: &[u8], message: &[u8]) -> Key {
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), message);
    tag.as_ref().try_into().unwrap_or_default()
}

fn hash(bytes: &[u8]) -> Key {
    digest::digest(&digest::SHA256, bytes).as_ref().try_into().unwrap_or_default()
}

fn xor(left: &Key, right: &Key) -> Key {
    let mut result = *left;
    result.iter_mut().zip(right).for_each(|(byte, other)| *byte ^= other);
    result
}

/// Random bytes of the operating system. Without them nothing secret can be made, so the process must not go on.
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    if SystemRandom::new().fill(&mut bytes).is_err() {
        tracing::error!("the operating system gives no random numbers");
        std::process::abort();
    }
    bytes
}

fn nonce() -> String {
    STANDARD.encode(random::<NONCE_BYTES>())
}

/// The value of the attribute at the front, up to the comma.
fn take<'a>(rest: &mut &'a str, name: &str) -> Option<&'a str> {
    let value = rest.strip_prefix(name)?.strip_prefix('=')?;
    let (value, tail) = value.split_once(',').unwrap_or((value, ""));
    *rest = tail;
    Some(value)
}

fn text(message: &[u8]) -> Result<&str, ScramError> {
    if message.len() > MESSAGE_BYTES_MAX {
        return Err(Malformed("too long"));
    }
    std::str::from_utf8(message).map_err(|_| Malformed("not UTF-8"))
}

/// The server's side, after the client's first message.
#[derive(Debug)]
pub struct Server {
    verifier: Verifier,
    nonce: String,
    /// What the client must repeat in its last message.
    bound_to: Vec<u8>,
    /// The messages so far, as they are signed.
    messages: String,
}

impl Server {
    /// Takes `client-first-message`. `end_point`: our certificate's, if the mechanism with channel binding was offered;
    /// `plus`: the client has chosen it. Returns `server-first-message`.
    ///
    /// # Errors
    /// [`ScramError`], never [`ScramError::Wrong`].
    pub fn begin(verifier: Verifier, end_point: Option<&[u8]>, plus: bool, message: &[u8]) -> Result<(Self, String), ScramError> {
        let message = text(message)?;
        let (flag, rest) = message.split_once(',').ok_or(Malformed("no header"))?;
        let mut bound_to = Vec::new();
        match (flag, end_point, plus) {
            ("n" | "y", _, true) => return Err(Malformed("the client selected channel binding and sent none")),
            ("n", _, false) | ("y", None, false) => {}
            ("y", Some(_), false) => {
                return Err(ScramError::Binding(
                    "SCRAM channel binding negotiation error: the client thinks that channel binding is not offered here, but it is",
                ));
            }
            ("p=tls-server-end-point", Some(end_point), true) => bound_to.extend_from_slice(end_point),
            ("p=tls-server-end-point", _, _) => return Err(Malformed("channel binding without its mechanism")),
            _ => return Err(Malformed("unexpected channel binding")),
        }
        let bare = rest.strip_prefix(',').ok_or(Malformed("an authorization identity, which is not supported"))?;
        let header = message.get(..message.len() - bare.len()).unwrap_or_default();
        let mut attributes = bare;
        take(&mut attributes, "n").ok_or(Malformed("no name"))?; // the name is that of the start-up packet
        let theirs = take(&mut attributes, "r").filter(|nonce| !nonce.is_empty() && nonce.bytes().all(|byte| byte.is_ascii_graphic()));
        let nonce = format!("{}{}", theirs.ok_or(Malformed("no nonce"))?, nonce());
        let first = format!("r={nonce},s={},i={}", STANDARD.encode(&verifier.salt), verifier.iterations);
        let messages = format!("{bare},{first}");
        let bound_to = [header.as_bytes(), &bound_to].concat();
        Ok((Server { verifier, nonce, bound_to, messages }, first))
    }

    /// Takes `client-final-message`. Returns what the proof reveals, and `server-final-message`.
    ///
    /// # Errors
    /// [`ScramError`]
    pub fn finish(self, message: &[u8]) -> Result<(Keys, String), ScramError> {
        let message = text(message)?;
        let (without_proof, proof) = message.rsplit_once(",p=").ok_or(Malformed("no proof"))?;
        let mut attributes = without_proof;
        let binding = take(&mut attributes, "c").and_then(|binding| STANDARD.decode(binding).ok()).ok_or(Malformed("no binding"))?;
        if !bool::from(binding.ct_eq(&self.bound_to)) {
            return Err(ScramError::Binding("SCRAM channel binding check failed"));
        }
        if take(&mut attributes, "r") != Some(&self.nonce) {
            return Err(Malformed("nonce does not match"));
        }
        let proof: Key = STANDARD.decode(proof).ok().and_then(|proof| proof.try_into().ok()).ok_or(Malformed("proof of another size"))?;
        let signed = format!("{},{without_proof}", self.messages);
        let client_key = xor(&proof, &hmac(&self.verifier.stored_key, signed.as_bytes()));
        if !bool::from(hash(&client_key).ct_eq(&self.verifier.stored_key)) {
            return Err(ScramError::Wrong);
        }
        let signature = STANDARD.encode(hmac(&self.verifier.server_key, signed.as_bytes()));
        Ok((Keys { client_key, server_key: self.verifier.server_key }, format!("v={signature}")))
    }
}

/// The client's side, with keys in place of a password.
#[derive(Debug)]
pub struct Client {
    keys: Keys,
    bound_to: Vec<u8>,
    first_bare: String,
    nonce: String,
    signed: String,
}

impl Client {
    /// `end_point`: of the server's certificate, if its mechanism with channel binding is used. Returns
    /// `client-first-message`.
    pub fn begin(keys: Keys, end_point: Option<&[u8]>) -> (Self, String) {
        let nonce = nonce();
        let first_bare = format!("n=,r={nonce}");
        // never "y": whoever has only keys got them here, where it is known which mechanisms there are
        let header = if end_point.is_some() { BOUND } else { "n,," };
        let bound_to = [header.as_bytes(), end_point.unwrap_or_default()].concat();
        let first = format!("{header}{first_bare}");
        (Client { keys, bound_to, first_bare, nonce, signed: String::new() }, first)
    }

    /// Takes `server-first-message`, returns `client-final-message`.
    ///
    /// # Errors
    /// [`ScramError::Malformed`]
    pub fn answer(&mut self, message: &[u8]) -> Result<String, ScramError> {
        let first = text(message)?;
        let mut attributes = first;
        let nonce = take(&mut attributes, "r").filter(|nonce| nonce.len() > self.nonce.len() && nonce.starts_with(&self.nonce));
        let nonce = nonce.ok_or(Malformed("the server does not repeat our nonce"))?;
        let without_proof = format!("c={},r={nonce}", STANDARD.encode(&self.bound_to));
        self.signed = format!("{},{first},{without_proof}", self.first_bare);
        let signature = hmac(&hash(&self.keys.client_key), self.signed.as_bytes());
        Ok(format!("{without_proof},p={}", STANDARD.encode(xor(&self.keys.client_key, &signature))))
    }

    /// Takes `server-final-message`: the server's own proof.
    ///
    /// # Errors
    /// [`ScramError`]
    pub fn finish(&self, message: &[u8]) -> Result<(), ScramError> {
        let mut attributes = text(message)?;
        let signature = take(&mut attributes, "v").and_then(|text| STANDARD.decode(text).ok()).ok_or(Malformed("no signature"))?;
        let expected = hmac(&self.keys.server_key, self.signed.as_bytes());
        if bool::from(signature.ct_eq(&expected[..])) { Ok(()) } else { Err(ScramError::Wrong) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};
    use proptest::prelude::*;

    fn exchange(password: &str, verifier: &Verifier, end_point: Option<&[u8]>) -> Result<Keys, ScramError> {
        let binding = end_point.map_or(ChannelBinding::unsupported(), |end| ChannelBinding::tls_server_end_point(end.to_vec()));
        let mut client = ScramSha256::new(password.as_bytes(), binding);
        let (server, first) = Server::begin(verifier.clone(), end_point, end_point.is_some(), client.message())?;
        client.update(first.as_bytes()).unwrap();
        let (keys, last) = server.finish(client.message())?;
        client.finish(last.as_bytes()).unwrap();
        Ok(keys)
    }

    #[test]
    fn a_driver_gets_in_and_its_keys_open_the_next_server() {
        let verifier = Verifier::of_password("s3cret").unwrap();
        for end_point in [None, Some(&b"certificate"[..])] {
            let keys = exchange("s3cret", &verifier, end_point).unwrap();
            assert_eq!(format!("{keys:?}"), "Keys(***)");
            let (mut client, first) = Client::begin(keys, end_point);
            let (server, first) = Server::begin(verifier.clone(), end_point, end_point.is_some(), first.as_bytes()).unwrap();
            let answer = client.answer(first.as_bytes()).unwrap();
            let (_, last) = server.finish(answer.as_bytes()).unwrap();
            client.finish(last.as_bytes()).unwrap();
            assert_eq!(client.finish(format!("v={}", STANDARD.encode([0; 32])).as_bytes()), Err(ScramError::Wrong));
            assert_eq!(exchange("wrong", &verifier, end_point), Err(ScramError::Wrong));
        }
    }

    #[test]
    fn who_sits_in_the_middle_is_noticed() {
        let verifier = Verifier::of_password("s3cret").unwrap();
        let mut client = ScramSha256::new(b"s3cret", ChannelBinding::tls_server_end_point(b"theirs".to_vec()));
        let (server, first) = Server::begin(verifier.clone(), Some(b"ours"), true, client.message()).unwrap();
        client.update(first.as_bytes()).unwrap();
        assert!(matches!(server.finish(client.message()), Err(ScramError::Binding(_))));
        let downgraded = ScramSha256::new(b"s3cret", ChannelBinding::unrequested());
        assert!(matches!(Server::begin(verifier.clone(), Some(b"ours"), false, downgraded.message()), Err(ScramError::Binding(_))));
        assert!(Server::begin(verifier, None, false, downgraded.message()).is_ok());
    }

    #[test]
    fn unknown_names_look_like_known_ones() {
        let secret = random();
        let (mock, other) = (Verifier::mock("nobody", &secret), Verifier::mock("noone", &secret));
        assert_eq!(mock, Verifier::mock("nobody", &secret), "asked twice, the salt must not change");
        assert_ne!(mock.salt, other.salt);
        let real = Verifier::of_password("x").unwrap();
        assert_eq!((mock.iterations, mock.salt.len()), (real.iterations, real.salt.len()));
        assert_eq!(exchange("x", &mock, None), Err(ScramError::Wrong));
        assert!(real.fits("x") && !real.fits("y") && !mock.fits("x"));
    }

    #[test]
    fn verifiers_are_read_or_refused() {
        let text = postgres_protocol::password::scram_sha_256(b"x");
        assert!(Verifier::parse(&text).unwrap().fits("x"));
        for wrong in ["", "md5abc", "SCRAM-SHA-256$4096:c2FsdA==", "SCRAM-SHA-256$0:c2FsdA==$AA==:AA==", &text[..text.len() - 8]] {
            assert_eq!(Verifier::parse(wrong), None, "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn any_message_is_survived(first: Vec<u8>, last in "c=[a-zA-Z=]{0,8},r=.{0,8}(,p=.{0,12})?", plus: bool, bound: bool) {
            let verifier = Verifier::mock("x", &[7; 32]);
            let end_point = bound.then_some(&b"e"[..]);
            let _ = Server::begin(verifier.clone(), end_point, plus, &first);
            let (server, _) = Server::begin(verifier, None, false, b"n,,n=,r=abc").unwrap();
            prop_assert!(server.finish(last.as_bytes()).is_err());
            let (mut client, _) = Client::begin(Keys { client_key: [1; 32], server_key: [2; 32] }, end_point);
            prop_assert!(client.answer(&first).is_err());
        }
    }
}
