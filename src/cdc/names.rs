//! Names of what a feed makes on servers, and quoting.

use super::{Direction, FeedSpec};

/// The schema that holds everything we keep on a server.
pub const SCHEMA: &str = "understudy";

/// Every slot, publication, event trigger and origin of ours starts with this.
pub const PREFIX: &str = "understudy_";

/// Longest name of a slot or publication in bytes (`NAMEDATALEN` - 1, `src/include/pg_config_manual.h`).
const NAME_BYTES_MAX: usize = 63;

/// The feed's name: slot and publication on the owner, key of the progress on the follower. Slots allow only `[a-z0-9_]`.
/// A name that is too long, or that had other characters, ends in a hash of the original, so that two never meet.
pub fn feed_name(spec: &FeedSpec) -> String {
    let suffix = match spec.direction {
        Direction::Forward => "fwd",
        Direction::Reverse => "rev",
    };
    let plain =
        |text: &str| -> String { text.chars().map(|c| if c.is_ascii_lowercase() || c.is_ascii_digit() { c } else { '_' }).collect() };
    let (database, shadow) = (plain(&spec.database), plain(&spec.shadow));
    let name = format!("{PREFIX}{database}_{shadow}_{suffix}");
    if name.len() <= NAME_BYTES_MAX && database == spec.database && shadow == spec.shadow {
        return name;
    }
    let hash = fnv(format!("{}\0{}", spec.database, spec.shadow).as_bytes());
    let tail = format!("_{:08x}_{suffix}", hash as u32);
    let head: String = format!("{PREFIX}{database}_{shadow}").chars().take(NAME_BYTES_MAX - tail.len()).collect();
    format!("{head}{tail}")
}

/// What the names of all feeds of a database (its name in proxy.toml) begin with.
pub fn database_prefix(database: &str) -> String {
    let plain = database.chars().map(|c| if c.is_ascii_lowercase() || c.is_ascii_digit() { c } else { '_' });
    // A name that had to be cut keeps its beginning.
    let longest = NAME_BYTES_MAX - "_00000000_fwd".len();
    format!("{PREFIX}{}_", plain.collect::<String>()).chars().take(longest).collect()
}

/// FNV-1a, 64 bits: stable over versions of the program (the standard library's hasher promises nothing).
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// `"identifier"`, always quoted.
pub fn ident(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// `"schema"."table"`
pub fn qualified(schema: &str, table: &str) -> String {
    format!("{}.{}", ident(schema), ident(table))
}

/// `'literal'`, for utility commands that take no parameters. A backslash makes it an `E''` literal, so that it is right
/// under any `standard_conforming_strings`.
pub fn literal(text: &str) -> String {
    let quoted = text.replace('\'', "''");
    if quoted.contains('\\') { format!("E'{}'", quoted.replace('\\', "\\\\")) } else { format!("'{quoted}'") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ServerUrl;

    fn spec(database: &str, shadow: &str, direction: Direction) -> FeedSpec {
        let url = ServerUrl::parse("postgres://a@h/d").unwrap();
        FeedSpec {
            database: database.into(),
            shadow: shadow.into(),
            direction,
            from: url.clone(),
            to: url,
            copy: crate::config::CopyConfig::default(),
        }
    }

    #[test]
    fn names_are_valid_and_distinct() {
        assert_eq!(feed_name(&spec("shop", "pg18", Direction::Forward)), "understudy_shop_pg18_fwd");
        let long = "x".repeat(80);
        let names: Vec<String> = [("Shop", "pg18"), ("shop", "pg-18"), ("shop", "pg.18"), (&long, "a"), (&long, "b"), ("größe", "x")]
            .into_iter()
            .flat_map(|(d, s)| [Direction::Forward, Direction::Reverse].map(|direction| feed_name(&spec(d, s, direction))))
            .collect();
        for name in &names {
            assert!(name.len() <= NAME_BYTES_MAX && name.starts_with(PREFIX), "{name}");
            assert!(name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_'), "{name}");
        }
        for name in ["shop", "größe", &long] {
            assert!(feed_name(&spec(name, "pg18", Direction::Forward)).starts_with(&database_prefix(name)), "{name}");
        }
        assert!(!feed_name(&spec("shopping", "x", Direction::Forward)).starts_with(&database_prefix("shop")));
        let distinct: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!(distinct.len(), names.len());
    }

    #[test]
    fn quotes_whatever_comes() {
        assert_eq!(qualified("a\"b", "größe"), "\"a\"\"b\".\"größe\"");
        assert_eq!(literal("it's"), "'it''s'");
        assert_eq!(literal("a\\'b"), "E'a\\\\''b'");
    }
}
