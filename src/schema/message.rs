//! The capture's message as types.

use super::catalog::{DefaultAccess, Namespace, Routine, Sequence, Table, UserType};
use serde::{Deserialize, Deserializer};

fn null_to_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// One object named by `pg_event_trigger_ddl_commands()`.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Object {
    /// Catalog, such as `pg_class`.
    pub class: String,
    /// Oid.
    pub oid: i64,
    /// `ALTER TABLE`
    #[serde(default)]
    pub tag: String,
    /// Quoted where needed.
    #[serde(default)]
    pub identity: String,
}

/// One object named by `pg_event_trigger_dropped_objects()`.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Dropped {
    /// Oid.
    pub oid: i64,
    /// Attribute number, or 0.
    #[serde(default)]
    pub sub: i32,
    /// Named in the command.
    #[serde(default)]
    pub original: bool,
    /// Went along by CASCADE.
    #[serde(default)]
    pub normal: bool,
    /// `table`, `view`, `function`, …
    #[serde(default, rename = "type")]
    pub kind: String,
    /// Schema.
    #[serde(default, deserialize_with = "null_to_default")]
    pub schema: String,
    /// Unqualified name, where the type has one.
    #[serde(default, deserialize_with = "null_to_default")]
    pub name: String,
    /// Quoted where needed.
    #[serde(default)]
    pub identity: String,
}

/// `table_rewrite`
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Rewritten {
    /// Table.
    pub oid: i64,
    /// Reason bits.
    pub reason: i32,
}

/// A function or procedure.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Function {
    /// Its name, owner and privileges.
    #[serde(flatten)]
    pub routine: Routine,
    /// `pg_get_functiondef`; none for aggregates.
    #[serde(default)]
    pub definition: Option<String>,
}

/// An extension.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Extension {
    /// Name.
    pub name: String,
    /// Schema.
    #[serde(default)]
    pub schema: String,
}

/// One DDL message.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Message {
    /// `ddl`, `drop`, `capture_failed`
    #[serde(default)]
    pub event: String,
    /// Command tag.
    #[serde(default)]
    pub tag: String,
    /// Why capturing failed.
    #[serde(default)]
    pub error: String,
    /// One plain ALTER TABLE without USING.
    #[serde(default, deserialize_with = "null_to_default")]
    pub plain: bool,
    /// What the command named.
    #[serde(default, deserialize_with = "null_to_default")]
    pub commands: Vec<Object>,
    /// What went.
    #[serde(default, deserialize_with = "null_to_default")]
    pub dropped: Vec<Dropped>,
    /// Schema and name of tables that took rows before this message which may have been meant otherwise. Only from looks at the catalog.
    #[serde(default, deserialize_with = "null_to_default")]
    pub recopy: Vec<(String, String)>,
    /// Relations as they are now.
    #[serde(default, deserialize_with = "null_to_default")]
    pub relations: Vec<Table>,
    /// Rewritten so far in this command.
    #[serde(default, deserialize_with = "null_to_default")]
    pub rewritten: Vec<Rewritten>,
    /// Sequences as they are now.
    #[serde(default, deserialize_with = "null_to_default")]
    pub sequences: Vec<Sequence>,
    /// Types as they are now.
    #[serde(default, deserialize_with = "null_to_default")]
    pub types: Vec<UserType>,
    /// Functions as they are now.
    #[serde(default, deserialize_with = "null_to_default")]
    pub functions: Vec<Function>,
    /// Schemas as they are now.
    #[serde(default, deserialize_with = "null_to_default")]
    pub schemas: Vec<Namespace>,
    /// Extensions as they are now.
    #[serde(default, deserialize_with = "null_to_default")]
    pub extensions: Vec<Extension>,
    /// What roles give to others by default, all of it; none: unchanged.
    #[serde(default)]
    pub default_privileges: Option<Vec<DefaultAccess>>,
}

impl Message {
    /// Reads a message; one that cannot be read is one whose capture failed: a person must look, and the feed goes on.
    pub fn parse(json: &[u8]) -> Self {
        serde_json::from_slice(json).unwrap_or_else(|error| Message {
            event: "capture_failed".into(),
            tag: "a change of the schema".into(),
            error: format!("the message is damaged ({error})"),
            ..Message::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_are_a_message(bytes: Vec<u8>) {
            Message::parse(&bytes);
        }
    }

    #[test]
    fn damage_becomes_a_question() {
        assert_eq!(Message::parse(b"{\"relations\":7}").event, "capture_failed");
    }
}
