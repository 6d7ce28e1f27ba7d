//! What is known of a user: as PostgreSQL stores it, or in clear; and PgBouncer's file of such lines.

use super::scram::Verifier;
use crate::config::Secret;
use md5::{Digest, Md5};
use std::collections::HashMap;
use subtle::ConstantTimeEq;

/// A user's secret.
#[derive(Clone, Debug)]
pub enum Stored {
    /// The password. Its verifier is made once, because that takes thousands of hashes.
    Plain(Secret, Verifier),
    /// `md5` and 32 hexadecimal digits of password and name.
    Md5(Secret),
    /// `SCRAM-SHA-256$…`
    Scram(Verifier),
}

impl Stored {
    /// From the text of a user list or of `pg_authid.rolpassword`. `None`: empty, no way to log in with a password.
    pub fn parse(text: &str) -> Option<Self> {
        if let Some(digits) = text.strip_prefix("md5").filter(|digits| digits.len() == 32)
            && digits.bytes().all(|byte| byte.is_ascii_hexdigit())
        {
            return Some(Stored::Md5(Secret::new(text.to_ascii_lowercase())));
        }
        if let Some(verifier) = Verifier::parse(text) {
            return Some(Stored::Scram(verifier));
        }
        match text {
            "" => None,
            text => Some(Stored::Plain(Secret::new(text), Verifier::of_password(text)?)),
        }
    }

    /// Whether this password is the user's.
    pub fn fits(&self, user: &str, password: &str) -> bool {
        match self {
            // as slow as for a verifier and for a name that does not exist
            Stored::Plain(_, verifier) => verifier.fits(password),
            Stored::Md5(own) => own.expose().as_bytes().ct_eq(md5_of(user, password).as_bytes()).into(),
            Stored::Scram(verifier) => verifier.fits(password),
        }
    }

    /// Whether this is the answer to an md5 challenge. SCRAM verifiers cannot tell.
    pub fn fits_md5(&self, user: &str, salt: [u8; 4], answer: &str) -> bool {
        let inner = match self {
            Stored::Plain(own, _) => md5_of(user, own.expose()),
            Stored::Md5(own) => own.expose().to_owned(),
            Stored::Scram(_) => return false,
        };
        md5_answer(&inner, salt).as_bytes().ct_eq(answer.as_bytes()).into()
    }

    /// For a SCRAM exchange. md5 hashes cannot do it.
    pub fn verifier(&self) -> Option<&Verifier> {
        match self {
            Stored::Plain(_, verifier) | Stored::Scram(verifier) => Some(verifier),
            Stored::Md5(_) => None,
        }
    }
}

fn hex(digest: impl AsRef<[u8]>) -> String {
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn md5_of(user: &str, password: &str) -> String {
    format!("md5{}", hex(Md5::digest(format!("{password}{user}"))))
}

/// The answer to an md5 challenge, from `md5` and the stored digits.
pub(crate) fn md5_answer(stored: &str, salt: [u8; 4]) -> String {
    let digits = stored.strip_prefix("md5").unwrap_or(stored);
    format!("md5{}", hex(Md5::digest([digits.as_bytes(), &salt].concat())))
}

/// Reads a user list: lines of `"name" "secret"`, quotes doubled inside, `;` or `#` before comments.
///
/// # Errors
/// The number of the line and what is wrong with it; never what it holds.
pub fn user_list(text: &str) -> Result<HashMap<String, Option<Stored>>, (usize, String)> {
    let mut users = HashMap::new();
    for (index, line) in text.lines().enumerate() {
        let mut rest = line.trim();
        if rest.is_empty() || rest.starts_with([';', '#']) {
            continue;
        }
        let wrong = || (index + 1, "a line is \"name\" \"password, md5… or SCRAM-SHA-256$…\", both in double quotes".to_owned());
        let name = quoted(&mut rest).filter(|name| !name.is_empty()).ok_or_else(wrong)?;
        let secret = quoted(&mut rest).ok_or_else(wrong)?;
        if users.insert(name, Stored::parse(&secret)).is_some() {
            return Err((index + 1, "this name has a line already".into()));
        }
    }
    Ok(users)
}

fn quoted(rest: &mut &str) -> Option<String> {
    let mut text = String::new();
    let mut left = rest.trim_start().strip_prefix('"')?;
    loop {
        let (part, tail) = left.split_once('"')?;
        text.push_str(part);
        match tail.strip_prefix('"') {
            Some(more) => {
                text.push('"');
                left = more;
            }
            None => {
                *rest = tail;
                return Some(text);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_list_is_read_as_pgbouncer_reads_it() {
        let scram = postgres_protocol::password::scram_sha_256(b"s");
        let text = format!("; comment\n\"a\" \"plain\"\n\n\"b\" \"md5{}\" more\n\"c\"\"d\" \"{scram}\"\n\"e\" \"\"\n", "0".repeat(32));
        let users = user_list(&text).unwrap();
        assert!(matches!(users["a"], Some(Stored::Plain(..))));
        assert!(matches!(users["b"], Some(Stored::Md5(_))));
        assert!(matches!(users["c\"d"], Some(Stored::Scram(_))));
        assert!(users["e"].is_none());
        assert!(!format!("{users:?}").contains("plain"));
        for (wrong, line) in [("\"a\"", 1), ("\n\"a\" b", 2), ("a \"b\"", 1), ("\"a\" \"b\"\n\"a\" \"c\"", 2), ("\"a\" \"b", 1)] {
            assert_eq!(user_list(wrong).unwrap_err().0, line, "{wrong}");
        }
    }

    #[test]
    fn each_kind_of_secret_knows_its_password() {
        let hash = "md5".to_owned() + &hex(Md5::digest("s3cretapp"));
        for text in ["s3cret", &hash, &postgres_protocol::password::scram_sha_256(b"s3cret")] {
            let stored = Stored::parse(text).unwrap();
            assert!(stored.fits("app", "s3cret") && !stored.fits("app", "S3cret") && !stored.fits("app", ""));
        }
        let salt = [1, 2, 3, 4];
        let answer = postgres_protocol::authentication::md5_hash(b"app", b"s3cret", salt);
        for text in ["s3cret", &hash] {
            assert!(Stored::parse(text).unwrap().fits_md5("app", salt, &answer));
        }
        assert_eq!(md5_answer(&hash, salt), answer);
    }
}
