//! A server's schema as a value: relations by oid, columns by attribute number. Loadable from a live server and from capture messages,
//! which share their JSON (`describe`).

use super::{SchemaError, describe, quote};
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::BTreeMap;

/// Largest attribute number that PostgreSQL gives (`MaxHeapAttributeNumber` with room for dropped ones).
pub type AttNum = i16;

fn null_to_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// A column.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Column {
    /// `pg_attribute.attnum`: stays the same through a rename.
    pub num: AttNum,
    /// Name.
    pub name: String,
    /// `format_type`, qualified unless built in.
    #[serde(rename = "type")]
    pub type_name: String,
    /// Oid of the type on that server.
    #[serde(default)]
    pub type_oid: i64,
    /// Length, precision and the like; -1: none.
    #[serde(default)]
    pub typmod: i32,
    /// `b` base, `e` enum, `d` domain, `c` composite, `r` range.
    #[serde(default)]
    pub type_kind: String,
    /// Only where it differs from the type's own; quoted and qualified.
    #[serde(default)]
    pub collation: Option<String>,
    /// NOT NULL.
    #[serde(default)]
    pub not_null: bool,
    /// `pg_get_expr` of the default or of the generation expression.
    #[serde(default)]
    pub default: Option<String>,
    /// What rows have that were there before the column: the frozen value of its default (`attmissingval`).
    #[serde(default)]
    pub missing: Option<String>,
    /// `a` always, `d` by default, empty: none.
    #[serde(default)]
    pub identity: String,
    /// `s` stored, `v` virtual, empty: none.
    #[serde(default)]
    pub generated: String,
    /// Declared here, not only inherited.
    #[serde(default = "yes")]
    pub local: bool,
}

fn yes() -> bool {
    true
}

/// A table constraint. NOT NULL is a property of the column here, whatever the major.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Constraint {
    /// Oid on that server.
    pub oid: i64,
    /// Name.
    pub name: String,
    /// `p` primary key, `u` unique, `f` foreign key, `c` check, `x` exclusion.
    pub kind: String,
    /// `pg_get_constraintdef`.
    pub def: String,
    /// Checked for all rows.
    #[serde(default = "yes")]
    pub validated: bool,
    /// Columns by number.
    #[serde(default, deserialize_with = "null_to_default")]
    pub columns: Vec<AttNum>,
    /// Comes from the parent.
    #[serde(default)]
    pub inherited: bool,
    /// Foreign key: the table referred to, quoted.
    #[serde(default, rename = "ref")]
    pub references: Option<String>,
}

/// An index.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Index {
    /// Oid on that server.
    pub oid: i64,
    /// Name.
    pub name: String,
    /// `pg_get_indexdef`.
    pub def: String,
    /// UNIQUE.
    #[serde(default)]
    pub unique: bool,
    /// Usable.
    #[serde(default = "yes")]
    pub valid: bool,
    /// Columns by number; 0: an expression.
    #[serde(default, deserialize_with = "null_to_default")]
    pub columns: Vec<AttNum>,
    /// Partial.
    #[serde(default)]
    pub predicate: bool,
    /// Backs a constraint, which brings it.
    #[serde(default)]
    pub constraint: bool,
    /// Part of a partitioned index.
    #[serde(default)]
    pub inherited: bool,
}

/// A trigger that people made.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Trigger {
    /// Oid on that server.
    pub oid: i64,
    /// Name.
    pub name: String,
    /// `pg_get_triggerdef`.
    pub def: String,
    /// `O` origin, `D` disabled, `R` replica, `A` always.
    #[serde(default)]
    pub enabled: String,
}

/// A privilege on a relation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Grant {
    /// Role; `None`: PUBLIC.
    #[serde(default)]
    pub to: Option<String>,
    /// `SELECT`, `INSERT`, …
    pub privilege: String,
    /// WITH GRANT OPTION.
    #[serde(default)]
    pub grantable: bool,
    /// On this column only.
    #[serde(default)]
    pub column: Option<String>,
}

/// Table, partitioned table, view, materialized view or foreign table.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// Oid on that server: stays the same through renames and rewrites.
    pub oid: i64,
    /// Schema.
    pub schema: String,
    /// Name.
    pub name: String,
    /// `r`, `p`, `v`, `m`, `f`.
    pub kind: String,
    /// `p` permanent, `u` unlogged.
    #[serde(default)]
    pub persistence: String,
    /// Role that owns it.
    #[serde(default)]
    pub owner: String,
    /// Privileges of others.
    #[serde(default, deserialize_with = "null_to_default")]
    pub grants: Vec<Grant>,
    /// `d`, `n`, `f`, `i`.
    #[serde(default)]
    pub replica_identity: String,
    /// A partition (not merely a child).
    #[serde(default)]
    pub is_partition: bool,
    /// Oid of the (first) parent.
    #[serde(default)]
    pub parent: Option<i64>,
    /// Its quoted name.
    #[serde(default)]
    pub parent_name: Option<String>,
    /// Oids of the children.
    #[serde(default, deserialize_with = "null_to_default")]
    pub children: Vec<i64>,
    /// `FOR VALUES …`
    #[serde(default)]
    pub bound: Option<String>,
    /// `RANGE (…)`
    #[serde(default)]
    pub partition_key: Option<String>,
    /// Storage parameters.
    #[serde(default, deserialize_with = "null_to_default")]
    pub options: Vec<String>,
    /// Views: the query.
    #[serde(default)]
    pub definition: Option<String>,
    /// Live columns, by number.
    #[serde(default, deserialize_with = "null_to_default")]
    pub columns: Vec<Column>,
    /// Without NOT NULL.
    #[serde(default, deserialize_with = "null_to_default")]
    pub constraints: Vec<Constraint>,
    /// All indexes.
    #[serde(default, deserialize_with = "null_to_default")]
    pub indexes: Vec<Index>,
    /// User triggers.
    #[serde(default, deserialize_with = "null_to_default")]
    pub triggers: Vec<Trigger>,
}

impl Table {
    /// `"schema"."name"`
    pub fn qualified(&self) -> String {
        quote::qualified(&self.schema, &self.name)
    }

    /// `schema.name`, for people.
    pub fn plain(&self) -> String {
        quote::plain(&self.schema, &self.name)
    }

    /// A column by name.
    pub fn column(&self, name: &str) -> Option<&Column> {
        self.columns.iter().find(|column| column.name == name)
    }

    /// A column by number.
    pub fn column_by_num(&self, num: AttNum) -> Option<&Column> {
        self.columns.iter().find(|column| column.num == num)
    }

    /// Holds rows that travel in the stream.
    pub fn holds_rows(&self) -> bool {
        matches!(self.kind.as_str(), "r" | "p")
    }

    /// View or materialized view.
    pub fn is_view(&self) -> bool {
        matches!(self.kind.as_str(), "v" | "m")
    }

    /// Names of the primary key's columns, in key order.
    pub fn primary_key(&self) -> Vec<&str> {
        self.constraints
            .iter()
            .find(|constraint| constraint.kind == "p")
            .map(|key| key.columns.iter().filter_map(|num| self.column_by_num(*num)).map(|column| column.name.as_str()).collect())
            .unwrap_or_default()
    }
}

/// A label of an enum; the oid survives RENAME VALUE.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Label {
    /// `pg_enum.oid`
    pub oid: i64,
    /// Text.
    pub label: String,
}

/// A named check of a domain.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NamedCheck {
    /// Name.
    pub name: String,
    /// `CHECK (…)`
    pub def: String,
}

/// A field of a composite type.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Attribute {
    /// Number.
    pub num: AttNum,
    /// Name.
    pub name: String,
    /// Type.
    #[serde(rename = "type")]
    pub type_name: String,
}

/// Enum, domain or composite type.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct UserType {
    /// Oid on that server.
    pub oid: i64,
    /// Schema.
    pub schema: String,
    /// Name.
    pub name: String,
    /// `e`, `d`, `c`.
    pub kind: String,
    /// Enum labels in order.
    #[serde(default, deserialize_with = "null_to_default")]
    pub labels: Vec<Label>,
    /// Domain: base type.
    #[serde(default)]
    pub base: Option<String>,
    /// Domain: NOT NULL.
    #[serde(default, deserialize_with = "null_to_default")]
    pub not_null: bool,
    /// Domain: default.
    #[serde(default)]
    pub default: Option<String>,
    /// Domain: checks.
    #[serde(default, deserialize_with = "null_to_default")]
    pub checks: Vec<NamedCheck>,
    /// Composite: fields.
    #[serde(default, deserialize_with = "null_to_default")]
    pub attributes: Vec<Attribute>,
    /// Role that owns it; empty: not known.
    #[serde(default)]
    pub owner: String,
    /// What others may do with it, whether said or by default.
    #[serde(default, deserialize_with = "null_to_default")]
    pub grants: Vec<Grant>,
}

/// A sequence that is not behind an identity column.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sequence {
    /// Oid on that server.
    pub oid: i64,
    /// Schema.
    pub schema: String,
    /// Name.
    pub name: String,
    /// Value type.
    #[serde(rename = "type")]
    pub type_name: String,
    /// START
    pub start: String,
    /// INCREMENT
    pub increment: String,
    /// MINVALUE
    pub min: String,
    /// MAXVALUE
    pub max: String,
    /// CACHE
    pub cache: String,
    /// CYCLE
    pub cycle: bool,
    /// The owning column's table, quoted.
    #[serde(default)]
    pub owned_table: Option<String>,
    /// Quoted `schema.table.column`.
    #[serde(default)]
    pub owned_by: Option<String>,
    /// Role that owns it; empty: not known.
    #[serde(default)]
    pub owner: String,
    /// What others may do with it, whether said or by default.
    #[serde(default, deserialize_with = "null_to_default")]
    pub grants: Vec<Grant>,
}

/// A schema (namespace).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Namespace {
    /// Oid on that server.
    pub oid: i64,
    /// Name.
    pub name: String,
    /// Role that owns it; empty: not known.
    #[serde(default)]
    pub owner: String,
    /// What others may do with it, whether said or by default.
    #[serde(default, deserialize_with = "null_to_default")]
    pub grants: Vec<Grant>,
}

/// Function, procedure or aggregate: who owns it and who may run it. Its definition travels in messages.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Routine {
    /// Oid on that server.
    #[serde(default)]
    pub oid: i64,
    /// Schema.
    pub schema: String,
    /// Name.
    pub name: String,
    /// Types of the arguments, for `DROP`.
    #[serde(default)]
    pub arguments: String,
    /// Role that owns it; empty: not known.
    #[serde(default)]
    pub owner: String,
    /// What others may do with it, whether said or by default.
    #[serde(default, deserialize_with = "null_to_default")]
    pub grants: Vec<Grant>,
}

/// What a role gives to others on objects that it makes later.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DefaultAccess {
    /// The role.
    pub role: String,
    /// Only in this schema.
    #[serde(default)]
    pub schema: Option<String>,
    /// `r` tables, `S` sequences, `f` functions, `T` types, `n` schemas.
    pub kind: String,
    /// To whom.
    #[serde(default, deserialize_with = "null_to_default")]
    pub grants: Vec<Grant>,
}

/// The document that `describe::catalog_query` gives.
#[derive(Clone, Debug, Default, Deserialize)]
struct Document {
    #[serde(default, deserialize_with = "null_to_default")]
    relations: Vec<Table>,
    #[serde(default, deserialize_with = "null_to_default")]
    types: Vec<UserType>,
    #[serde(default, deserialize_with = "null_to_default")]
    sequences: Vec<Sequence>,
    #[serde(default, deserialize_with = "null_to_default")]
    schemas: Vec<Namespace>,
    #[serde(default, deserialize_with = "null_to_default")]
    functions: Vec<Routine>,
    #[serde(default, deserialize_with = "null_to_default")]
    default_privileges: Vec<DefaultAccess>,
}

/// One server's schema.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Catalog {
    /// Relations by oid.
    pub tables: BTreeMap<i64, Table>,
    /// Types by oid.
    pub types: BTreeMap<i64, UserType>,
    /// Sequences by oid.
    pub sequences: BTreeMap<i64, Sequence>,
    /// Schemas by oid.
    pub schemas: BTreeMap<i64, Namespace>,
    /// Functions, procedures and aggregates by oid.
    #[serde(default)]
    pub functions: BTreeMap<i64, Routine>,
    /// Of all roles.
    #[serde(default)]
    pub default_privileges: Vec<DefaultAccess>,
}

impl Catalog {
    /// Reads a server's catalog; works inside and outside a transaction and leaves `search_path` as it was.
    ///
    /// # Errors
    /// [`SchemaError`]
    pub async fn load(client: &tokio_postgres::Client) -> Result<Self, SchemaError> {
        Self::load_filtered(client, "true").await
    }

    /// Reads what concerns the relations of these names (and all types, sequences and schemas).
    ///
    /// # Errors
    /// [`SchemaError`]
    pub async fn load_named(client: &tokio_postgres::Client, names: &[(String, String)]) -> Result<Self, SchemaError> {
        let list: Vec<String> =
            names.iter().map(|(schema, name)| format!("({}, {})", quote::literal(schema), quote::literal(name))).collect();
        let filter = if list.is_empty() { "false".to_owned() } else { format!("(n.nspname, c.relname) IN ({})", list.join(", ")) };
        Self::load_filtered(client, &filter).await
    }

    async fn load_filtered(client: &tokio_postgres::Client, filter: &str) -> Result<Self, SchemaError> {
        // One simple query: SET LOCAL then lasts for this (implicit or open) transaction at most, and is undone at its end.
        let query = format!(
            "SELECT set_config('understudy.saved_path', current_setting('search_path'), true); SET LOCAL search_path = pg_catalog; {};
             SELECT set_config('search_path', current_setting('understudy.saved_path'), true)",
            describe::catalog_query(filter)
        );
        let answers = client.simple_query(&query).await.map_err(|error| SchemaError::server("read the catalog", error))?;
        let text = answers
            .iter()
            .filter_map(|message| match message {
                tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0),
                _ => None,
            })
            .nth(1)
            .ok_or_else(|| SchemaError::Catalog("the server sent no catalog".into()))?;
        Self::from_json(text.as_bytes())
    }

    /// From the JSON that [`Catalog::load`] reads.
    ///
    /// # Errors
    /// [`SchemaError::Catalog`]
    pub fn from_json(json: &[u8]) -> Result<Self, SchemaError> {
        let document: Document = serde_json::from_slice(json).map_err(|error| SchemaError::Catalog(error.to_string()))?;
        Ok(Catalog {
            tables: document.relations.into_iter().map(|table| (table.oid, table)).collect(),
            types: document.types.into_iter().map(|item| (item.oid, item)).collect(),
            sequences: document.sequences.into_iter().map(|item| (item.oid, item)).collect(),
            schemas: document.schemas.into_iter().map(|item| (item.oid, item)).collect(),
            functions: document.functions.into_iter().map(|item| (item.oid, item)).collect(),
            default_privileges: document.default_privileges,
        })
    }

    /// A relation by name.
    pub fn table(&self, schema: &str, name: &str) -> Option<&Table> {
        self.tables.values().find(|table| table.schema == schema && table.name == name)
    }

    /// A type by name.
    pub fn user_type(&self, schema: &str, name: &str) -> Option<&UserType> {
        self.types.values().find(|item| item.schema == schema && item.name == name)
    }

    /// A sequence by name.
    pub fn sequence(&self, schema: &str, name: &str) -> Option<&Sequence> {
        self.sequences.values().find(|item| item.schema == schema && item.name == name)
    }

    /// Has a schema of that name.
    pub fn has_schema(&self, name: &str) -> bool {
        self.schemas.values().any(|schema| schema.name == name)
    }

    /// Takes over a schema's new name everywhere.
    pub fn rename_schema(&mut self, old: &str, new: &str) {
        let rename = |name: &mut String| {
            if name == old {
                *name = new.to_owned();
            }
        };
        self.tables.values_mut().for_each(|table| rename(&mut table.schema));
        self.types.values_mut().for_each(|item| rename(&mut item.schema));
        self.sequences.values_mut().for_each(|item| rename(&mut item.schema));
        self.schemas.values_mut().for_each(|item| rename(&mut item.name));
        self.functions.values_mut().for_each(|item| rename(&mut item.schema));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nulls_and_missing_parts_are_defaults() {
        let json = br#"{"relations":[{"oid":5,"schema":"public","name":"t","kind":"r","children":null,"columns":[
            {"num":1,"name":"id","type":"integer"}],"constraints":[{"oid":9,"name":"t_pkey","kind":"p","def":"PRIMARY KEY (id)","columns":[1]}]}],
            "types":null}"#;
        let catalog = Catalog::from_json(json).unwrap();
        let table = catalog.table("public", "t").unwrap();
        assert_eq!(table.primary_key(), ["id"]);
        assert!(table.column("id").unwrap().local && table.column_by_num(2).is_none());
    }

    #[test]
    fn damaged_json_is_an_error() {
        for json in [&b"{"[..], b"{\"relations\":[{}]}", b"\xff"] {
            assert!(Catalog::from_json(json).is_err());
        }
    }
}
