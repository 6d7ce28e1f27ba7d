//! Authentication that ends at the proxy: who may log in and how (rules in the manner of pg_hba), what is known of a name
//! (a user list, or a row of the auth query), the conversation with the client, and the credentials for servers that come
//! out of it.
//!
//! Deliberately absent: connections to servers (the auth query is `session`'s, logging in is `backend`'s), relaying.
//! Invariants: no secret has a `Debug` or `Display` that shows it; a name that does not exist is treated like one whose
//! password is wrong, message for message; secrets are compared in constant time.
//! Sources: PostgreSQL documentation, "Client Authentication" and "SASL Authentication"; RFC 5802 and 7677;
//! `src/backend/libpq/auth-scram.c` for the words of errors; PgBouncer's userlist.txt.

mod door;
mod hba;
mod ident;
mod policy;
pub mod scram;
mod stored;

pub(crate) use door::initial_response;
pub use door::{Applicant, Denial, Ended, authenticate, method, next_answer, prove};
pub use hba::{Method, Rule};
pub use policy::{AuthError, Policy};
pub use scram::Keys;
pub(crate) use stored::md5_answer;
pub use stored::{Stored, user_list};

use crate::config::Secret;

/// What a session can log in to servers with, besides configured passwords. In memory only, for as long as the session.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum ServerLogin {
    /// Nothing: works where the server trusts this machine.
    #[default]
    Nothing,
    /// The password.
    Password(Secret),
    /// `md5` and the hash of password and name: as good as the password where the server asks for md5.
    Md5(Secret),
    /// What a SCRAM proof has revealed: as good as the password where the server stores the same verifier.
    Scram(Keys),
}

impl ServerLogin {
    /// A password that a client has given.
    pub fn password(text: impl Into<String>) -> Self {
        ServerLogin::Password(Secret::new(text))
    }
}

impl From<Option<&Secret>> for ServerLogin {
    fn from(password: Option<&Secret>) -> Self {
        password.map_or(ServerLogin::Nothing, |password| ServerLogin::Password(password.clone()))
    }
}
