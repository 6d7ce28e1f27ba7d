//! The few facts of a certificate that rustls does not tell: a walk over its DER, bounds checked, nothing trusted.
//! Sources: RFC 5280 (structure), RFC 5929 section 4.1 (the digest that binds a channel to a certificate).

use ring::digest;
use rustls::pki_types::CertificateDer;

const SEQUENCE: u8 = 0x30;
const OBJECT_IDENTIFIER: u8 = 0x06;
/// `id-at-commonName`, 2.5.4.3
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
/// `id-ce-subjectAltName`, 2.5.29.17
const SUBJECT_ALTERNATIVE_NAME: &[u8] = &[0x55, 0x1d, 0x11];
/// `sha256WithRSAEncryption` and its neighbours, without the last byte.
const RSA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01];
/// `ecdsa-with-SHA256` and its neighbours, without the last byte.
const ECDSA_SHA2: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03];
/// `ecdsa-with-SHA1`
const ECDSA_SHA1: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x01];

/// Takes one element: its tag and content.
fn take<'a>(rest: &mut &'a [u8]) -> Option<(u8, &'a [u8])> {
    let [tag, first, tail @ ..] = *rest else { return None };
    let (length, tail) = match *first {
        short @ 0..=0x7f => (usize::from(short), tail),
        long @ 0x81..=0x84 => {
            let (bytes, tail) = tail.split_at_checked(usize::from(long & 0x7f))?;
            (bytes.iter().fold(0usize, |length, byte| length << 8 | usize::from(*byte)), tail)
        }
        _ => return None,
    };
    let (content, tail) = tail.split_at_checked(length)?;
    *rest = tail;
    Some((*tag, content))
}

fn take_tagged<'a>(rest: &mut &'a [u8], wanted: u8) -> Option<&'a [u8]> {
    take(rest).filter(|(tag, _)| *tag == wanted).map(|(_, content)| content)
}

/// What stands behind the version: serial number, signature, issuer, validity, subject, key, extensions.
fn to_be_signed<'a>(certificate: &'a CertificateDer<'_>) -> Option<&'a [u8]> {
    let mut body = take_tagged(&mut certificate.as_ref(), SEQUENCE)?;
    let mut fields = take_tagged(&mut body, SEQUENCE)?;
    if fields.first() == Some(&0xa0) {
        take(&mut fields)?; // the version; absent in version 1
    }
    Some(fields)
}

/// The first common name of the subject, if it is text.
pub fn common_name(certificate: &CertificateDer<'_>) -> Option<String> {
    let mut fields = to_be_signed(certificate)?;
    for _ in 0..4 {
        take(&mut fields)?;
    }
    let mut subject = take_tagged(&mut fields, SEQUENCE)?;
    while let Some((_, mut set)) = take(&mut subject) {
        while let Some((SEQUENCE, mut attribute)) = take(&mut set) {
            if take_tagged(&mut attribute, OBJECT_IDENTIFIER)? != COMMON_NAME {
                continue;
            }
            let (kind, value) = take(&mut attribute)?;
            // UTF8String, PrintableString, TeletexString, IA5String; a zero byte is an attack (CVE-2009-4034)
            let readable = matches!(kind, 0x0c | 0x13 | 0x14 | 0x16) && !value.contains(&0);
            return readable.then(|| String::from_utf8(value.to_vec()).ok()).flatten();
        }
    }
    None
}

/// The certificate says itself which hosts it is for, so that its common name does not count.
pub fn names_hosts(certificate: &CertificateDer<'_>) -> bool {
    let Some(mut fields) = to_be_signed(certificate) else { return false };
    while let Some((tag, mut content)) = take(&mut fields) {
        if tag != 0xa3 {
            continue;
        }
        let Some(mut extensions) = take_tagged(&mut content, SEQUENCE) else { return false };
        while let Some(mut extension) = take_tagged(&mut extensions, SEQUENCE) {
            if take_tagged(&mut extension, OBJECT_IDENTIFIER) == Some(SUBJECT_ALTERNATIVE_NAME) {
                return true;
            }
        }
    }
    false
}

/// The `tls-server-end-point` binding: the certificate's digest by its own signature's hash, SHA-256 in place of what is
/// weaker. `None`: the signature has no such hash (Ed25519), and PostgreSQL does no channel binding either.
pub fn end_point(certificate: &CertificateDer<'_>) -> Option<Vec<u8>> {
    let mut body = take_tagged(&mut certificate.as_ref(), SEQUENCE)?;
    take(&mut body)?;
    let mut algorithm = take_tagged(&mut body, SEQUENCE)?;
    let identifier = take_tagged(&mut algorithm, OBJECT_IDENTIFIER)?;
    let hash = match identifier.split_last()? {
        (kind, RSA) => match kind {
            0x04 | 0x05 | 0x0b => &digest::SHA256,
            0x0c => &digest::SHA384,
            0x0d => &digest::SHA512,
            0x0a => pss_hash(algorithm)?,
            _ => return None,
        },
        (kind, ECDSA_SHA2) => match kind {
            0x02 => &digest::SHA256,
            0x03 => &digest::SHA384,
            0x04 => &digest::SHA512,
            _ => return None,
        },
        _ if identifier == ECDSA_SHA1 => &digest::SHA256,
        _ => return None,
    };
    Some(digest::digest(hash, certificate.as_ref()).as_ref().to_vec())
}

/// RSASSA-PSS names its hash in its parameters; SHA-1 if it does not.
fn pss_hash(mut parameters: &[u8]) -> Option<&'static digest::Algorithm> {
    let mut fields = take_tagged(&mut parameters, SEQUENCE)?;
    let Some((0xa0, mut hash)) = take(&mut fields) else { return Some(&digest::SHA256) };
    let mut algorithm = take_tagged(&mut hash, SEQUENCE)?;
    match take_tagged(&mut algorithm, OBJECT_IDENTIFIER)? {
        [0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01] => Some(&digest::SHA256),
        [0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x02] => Some(&digest::SHA384),
        [0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x03] => Some(&digest::SHA512),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_have_an_answer(bytes: Vec<u8>) {
            let certificate = CertificateDer::from(bytes);
            let _ = (common_name(&certificate), names_hosts(&certificate), end_point(&certificate));
        }
    }
}
