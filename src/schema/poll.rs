//! Schema changes without event triggers: the catalog is read again and again, and what differs becomes the same message that the
//! triggers would have written, at the place in the stream where the difference was seen.
//!
//! Exact in this way: names (oids and attribute numbers stay through renames), frozen defaults (`attmissingval`), a name dropped and
//! made again, rewrites (the storage is another). Not known: the order of changes between two looks, what came and went between
//! them, and the words of a USING expression; a column whose type changed is copied again.

use super::describe::{DEFINITION, NAMESPACE_IS_USERS, ROUTINE, catalog_query, not_of_extension};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Reason bits that `table_rewrite` would have given: default and type, because which of them it was is not known.
const REWRITTEN: i64 = 6;

/// Reads everything a look needs, as one JSON text. To be run under `search_path = pg_catalog`.
pub fn query() -> String {
    let free = not_of_extension("pg_proc", "p.oid");
    format!(
        "SELECT (q.catalog::jsonb || jsonb_build_object(
           'functions', coalesce((SELECT jsonb_agg({ROUTINE} || {DEFINITION} || jsonb_build_object(
              'identity', format('%I.%I(%s)', n.nspname, p.proname, pg_get_function_identity_arguments(p.oid))) ORDER BY p.oid)
             FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE {NAMESPACE_IS_USERS} AND {free}), '[]'),
           'extensions', coalesce((SELECT jsonb_agg(jsonb_build_object('oid', x.oid::bigint, 'name', x.extname, 'version', x.extversion,
              'schema', n.nspname) ORDER BY x.oid) FROM pg_extension x JOIN pg_namespace n ON n.oid = x.extnamespace), '[]'),
           'storage', coalesce((SELECT jsonb_object_agg(c.oid::text, c.relfilenode::bigint) FROM pg_class c JOIN pg_namespace n
              ON n.oid = c.relnamespace WHERE c.relkind = 'r' AND {NAMESPACE_IS_USERS}), '{{}}'),
           'touched', coalesce((SELECT jsonb_object_agg(c.oid::text, (SELECT md5(string_agg(a.xmin::text, ',' ORDER BY a.attnum))
              FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0)) FROM pg_class c JOIN pg_namespace n
              ON n.oid = c.relnamespace WHERE c.relkind = 'r' AND {NAMESPACE_IS_USERS}), '{{}}'),
           'attached', coalesce((SELECT jsonb_object_agg(c.oid::text, i.xmin::text) FROM pg_class c JOIN pg_namespace n
              ON n.oid = c.relnamespace JOIN pg_inherits i ON i.inhrelid = c.oid
              WHERE c.relkind IN ('r', 'p') AND c.relispartition AND {NAMESPACE_IS_USERS}), '{{}}')))::text
         FROM ({}) q (catalog)",
        catalog_query("true")
    )
}

/// What one look saw.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Look {
    parts: BTreeMap<&'static str, BTreeMap<i64, Value>>,
    /// File of each table's rows.
    storage: Map<String, Value>,
    default_privileges: Value,
    /// Which transactions wrote each table's columns: what has come and gone shows here.
    touched: Map<String, Value>,
    /// Which transaction attached each partition.
    attached: Map<String, Value>,
}

/// How deep partitions are looked for under one another: a bound for a catalog that contradicts itself.
const PARTITION_DEPTH_MAX: usize = 64;

const PARTS: &[&str] = &["relations", "types", "sequences", "schemas", "functions", "extensions"];

impl Look {
    /// From the answer to [`query`]; `None`: it is damaged.
    pub fn parse(text: &str) -> Option<Self> {
        let mut document: Value = serde_json::from_str(text).ok()?;
        let mut parts = BTreeMap::new();
        for part in PARTS {
            let mut objects = BTreeMap::new();
            for object in document.get_mut(*part).and_then(Value::as_array_mut).map(std::mem::take).unwrap_or_default() {
                objects.insert(object.get("oid")?.as_i64()?, object);
            }
            parts.insert(*part, objects);
        }
        let mut map = |name| document.get_mut(name).and_then(Value::as_object_mut).map(std::mem::take).unwrap_or_default();
        let (storage, touched, attached) = (map("storage"), map("touched"), map("attached"));
        let default_privileges = document.get_mut("default_privileges").map(Value::take).unwrap_or_default();
        Some(Look { parts, storage, default_privileges, touched, attached })
    }

    /// A look in which everything that can be compared with what the engine remembers is unknown, so that it is compared, and the
    /// objects that it remembers and that are gone are still there. The engine remembers no functions and extensions: those that the
    /// `follower` does not have in the same way count as changed. Which tables were rewritten since is not known: those whose columns
    /// changed count as rewritten.
    pub fn remembered(&self, known: &super::catalog::Catalog, follower: &Look) -> Look {
        let mut look = self.clone();
        for part in ["functions", "extensions"] {
            let facts = |object: &Value| {
                ["schema", "name", "identity", "definition"].map(|key| object.get(key).and_then(Value::as_str).map(str::to_owned))
            };
            let theirs: BTreeSet<_> = follower.part(part).map(|(_, object)| facts(object)).collect();
            look.parts.entry(part).or_default().retain(|_, object| theirs.contains(&facts(object)));
        }
        // Who owns and may run the others is remembered.
        let access = |object: &Value| {
            let oid = object.get("oid").and_then(Value::as_i64).unwrap_or_default();
            known.functions.get(&oid).filter(|routine| !routine.owner.is_empty()).is_none_or(|routine| {
                let now: Result<super::catalog::Routine, _> = serde_json::from_value(object.clone());
                now.is_ok_and(|now| (&now.owner, &now.grants) == (&routine.owner, &routine.grants))
            })
        };
        look.parts.entry("functions").or_default().retain(|_, object| access(object));
        look.default_privileges = serde_json::to_value(&known.default_privileges).unwrap_or_default();
        for table in known.tables.values() {
            let columns = |columns: &Value| -> BTreeSet<String> {
                let one =
                    |column: &Value| ["name", "type", "num"].map(|key| column.get(key).map(Value::to_string).unwrap_or_default()).join(" ");
                columns.as_array().into_iter().flatten().map(one).collect()
            };
            let now = self.parts.get("relations").and_then(|relations| relations.get(&table.oid)).and_then(|now| now.get("columns"));
            let before =
                json!(table.columns.iter().map(|c| json!({"name": c.name, "type": c.type_name, "num": c.num})).collect::<Vec<_>>());
            if now.is_some_and(|now| columns(now) != columns(&before)) {
                look.storage.insert(table.oid.to_string(), Value::Null);
            }
        }
        let gone = |part: &'static str, oid: i64, object: Value| (part, oid, object);
        let tables = known.tables.values().map(|t| {
            let columns: Vec<Value> =
                t.columns.iter().map(|c| json!({"name": c.name, "type": c.type_name, "num": c.num, "generated": c.generated})).collect();
            gone(
                "relations",
                t.oid,
                json!({"schema": t.schema, "name": t.name, "kind": t.kind, "columns": columns, "is_partition": t.is_partition}),
            )
        });
        let types = known.types.values().map(|t| gone("types", t.oid, json!({"schema": t.schema, "name": t.name, "kind": t.kind})));
        let sequences = known.sequences.values().map(|s| gone("sequences", s.oid, json!({"schema": s.schema, "name": s.name})));
        let schemas = known.schemas.values().map(|s| gone("schemas", s.oid, json!({"name": s.name})));
        for part in ["relations", "types", "sequences", "schemas"] {
            look.parts.insert(part, BTreeMap::new());
        }
        for (part, oid, object) in tables.chain(types).chain(sequences).chain(schemas) {
            look.parts.entry(part).or_default().insert(oid, object);
        }
        look
    }

    fn part(&self, name: &str) -> impl Iterator<Item = (&i64, &Value)> {
        self.parts.get(name).into_iter().flatten()
    }

    /// Where the rows of each table go, by oid: those of a partition are those of its root.
    pub fn places(&self) -> HashMap<i64, (String, String)> {
        let tables: BTreeMap<&i64, &Value> =
            self.part("relations").filter(|(_, object)| matches!(object.get("kind").and_then(Value::as_str), Some("r" | "p"))).collect();
        let root = |object: &Value| {
            let mut object = object;
            for _ in 0..PARTITION_DEPTH_MAX {
                let parent = object.get("parent").and_then(Value::as_i64).filter(|_| is_partition(object));
                let Some(parent) = parent.and_then(|oid| tables.get(&oid).copied()) else { break };
                object = parent;
            }
            table_name(object)
        };
        tables.iter().map(|(oid, object)| (**oid, root(object))).collect()
    }

    /// Tables of which rows, sent between the two looks, may have been taken for another table's, or values for another column's, because
    /// a name means something else than before; those that were rewritten while their columns changed, if only for a moment, since
    /// then values may have come from nowhere; those that were a partition, if only for a moment not: as tables of their own
    /// nobody had published them; and those of which another table became a partition.
    pub fn doubtful_tables(&self, before: &Look) -> BTreeSet<(String, String)> {
        let old: BTreeMap<&i64, &Value> = before.part("relations").collect();
        let mut found = BTreeSet::new();
        let places = self.places();
        for (oid, xmin) in &self.attached {
            let Ok(number) = oid.parse::<i64>() else { continue };
            // One that is new has no rows that could have been taken for others.
            if before.attached.get(oid) != Some(xmin)
                && old.contains_key(&number)
                && let Some(root) = places.get(&number)
            {
                found.insert(root.clone());
            }
        }
        for (oid, now) in self.part("relations") {
            let key = oid.to_string();
            let rewritten = before.storage.get(&key).is_some_and(|file| self.storage.get(&key) != Some(file));
            let Some((then, root)) = old.get(oid).zip(places.get(oid)).filter(|_| rewritten) else { continue };
            if columns(now) != columns(then) || self.touched.get(&key) != before.touched.get(&key) {
                found.insert(root.clone());
            }
        }
        for (oid, now) in self.tables() {
            let Some(then) = old.get(oid) else { continue };
            let (name, earlier) = (table_name(now), table_name(then));
            let had =
                |look: &Look, name: &(String, String)| look.tables().any(|(other, object)| other != oid && table_name(object) == *name);
            let taken = name != earlier && (had(self, &earlier) || had(before, &name));
            let (then_columns, detached) = (columns(then), is_partition(then));
            let meant = columns(now).iter().any(|(name, (number, generated))| {
                then_columns.get(name).is_some_and(|(before, computed)| before != number || computed != generated)
            });
            if taken || detached || meant {
                found.insert(name);
            }
        }
        found
    }

    /// Tables that are none of another's partitions.
    fn tables(&self) -> impl Iterator<Item = (&i64, &Value)> {
        self.part("relations").filter(|(_, object)| {
            let kind = object.get("kind").and_then(Value::as_str);
            matches!(kind, Some("r" | "p")) && !is_partition(object)
        })
    }

    /// Oids of tables that were not there before.
    pub fn new_tables(&self, before: &Look) -> BTreeSet<i64> {
        let known: BTreeSet<&i64> = before.part("relations").map(|(oid, _)| oid).collect();
        self.part("relations").map(|(oid, _)| *oid).filter(|oid| !known.contains(oid)).collect()
    }

    /// Tables and columns of which another one has the name now step aside first, as they were before: in one step two of them cannot change
    /// their names with each other.
    fn passing_names(&self, before: &Look) -> Vec<Value> {
        let now: BTreeMap<&i64, &Value> = self.part("relations").collect();
        let taken: BTreeMap<(String, String), &i64> = now.iter().map(|(oid, object)| (table_name(object), *oid)).collect();
        let mut passing = Vec::new();
        for (oid, then) in before.part("relations") {
            // What is only remembered has no oid in it and is not whole.
            let Some(object) = now.get(oid).filter(|_| then.get("oid").is_some()) else { continue };
            let mut aside = then.clone();
            let name = table_name(then);
            if table_name(object) != name && taken.get(&name).is_some_and(|other| *other != oid) {
                aside["name"] = json!(format!("understudy_{oid}"));
            }
            let meanings = columns(object);
            for column in aside.get_mut("columns").and_then(Value::as_array_mut).into_iter().flatten() {
                let (Some(name), Some(number)) = (column.get("name").and_then(Value::as_str), column.get("num").and_then(Value::as_i64))
                else {
                    continue;
                };
                let kept = meanings.values().any(|(other, _)| *other == number);
                if kept && meanings.get(name).is_some_and(|(other, _)| *other != number) {
                    column["name"] = json!(format!("understudy_{number}"));
                }
            }
            if aside != *then {
                passing.push(aside);
            }
        }
        passing
    }

    /// The messages that say what is different since `before`: what is gone first, so that its names are free; types and schemas last, which
    /// may have been in use until then, unless something else has their name now.
    pub fn messages(&self, before: &Look) -> Vec<Value> {
        let mut messages = Vec::new();
        let (mut dropped, mut dropped_late) = (Vec::new(), Vec::new());
        for part in PARTS.iter().filter(|part| **part != "extensions") {
            let now: BTreeSet<&i64> = self.part(part).map(|(oid, _)| oid).collect();
            for (oid, object) in before.part(part).filter(|(oid, _)| !now.contains(oid)) {
                let late =
                    matches!(*part, "types" | "schemas") && !self.part(part).any(|(_, other)| table_name(other) == table_name(object));
                if late { &mut dropped_late } else { &mut dropped }.push(gone(part, *oid, object));
            }
        }
        if !dropped.is_empty() {
            messages.push(json!({"version": 1, "event": "drop", "tag": "DROP", "dropped": dropped}));
        }
        let passing = self.passing_names(before);
        if !passing.is_empty() {
            messages.push(json!({"version": 1, "event": "ddl", "tag": "ALTER", "plain": false, "relations": passing}));
        }
        // By themselves: what else is different is found on the other side under the names from then on.
        let schemas = self.changed("schemas", before);
        if !schemas.is_empty() {
            messages.push(json!({"version": 1, "event": "ddl", "tag": "ALTER", "plain": false, "schemas": schemas}));
        }
        let mut message = json!({"version": 1, "event": "ddl", "tag": "ALTER", "plain": false});
        let mut different = false;
        for part in PARTS.iter().filter(|part| **part != "schemas") {
            let changed = self.changed(part, before);
            different |= !changed.is_empty();
            message[*part] = json!(changed);
        }
        if access_of(&self.default_privileges) != access_of(&before.default_privileges) {
            different = true;
            message["default_privileges"] = self.default_privileges.clone();
        }
        if !self.new_tables(before).is_empty() {
            // Rows that were written before anybody looked are in no stream: as if the table had been made with rows.
            message["tag"] = json!("CREATE TABLE AS");
        }
        let rewritten: Vec<Value> = self
            .storage
            .iter()
            .filter(|(oid, file)| before.storage.get(*oid).is_some_and(|earlier| earlier != *file))
            .filter_map(|(oid, _)| Some(json!({"oid": oid.parse::<i64>().ok()?, "reason": REWRITTEN})))
            .collect();
        message["rewritten"] = json!(rewritten);
        let doubtful = self.doubtful_tables(before);
        message["recopy"] = json!(doubtful);
        if different || !doubtful.is_empty() {
            messages.push(message);
        }
        if !dropped_late.is_empty() {
            messages.push(json!({"version": 1, "event": "drop", "tag": "DROP", "dropped": dropped_late}));
        }
        messages
    }

    /// Objects of one part that are new or another than before.
    fn changed(&self, part: &str, before: &Look) -> Vec<&Value> {
        let old: BTreeMap<&i64, &Value> = before.part(part).collect();
        self.part(part).filter(|(oid, object)| old.get(oid) != Some(object)).map(|(_, object)| object).collect()
    }
}

/// Number and generation of each column.
fn columns(table: &Value) -> BTreeMap<&str, (i64, &str)> {
    let columns = table.get("columns").and_then(Value::as_array).into_iter().flatten();
    let generated = |column: &'_ Value| column.get("generated").and_then(Value::as_str).is_some_and(|kind| !kind.is_empty());
    columns.filter_map(|c| Some((c.get("name")?.as_str()?, (c.get("num")?.as_i64()?, if generated(c) { "g" } else { "" })))).collect()
}

fn is_partition(table: &Value) -> bool {
    table.get("is_partition").and_then(Value::as_bool) == Some(true)
}

/// Default privileges as values: what is left out is what is empty.
fn access_of(list: &Value) -> Vec<super::catalog::DefaultAccess> {
    serde_json::from_value(list.clone()).unwrap_or_default()
}

fn table_name(object: &Value) -> (String, String) {
    let text = |key: &str| object.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    (text("schema"), text("name"))
}

/// As `pg_event_trigger_dropped_objects()` would have named it.
fn gone(part: &str, oid: i64, object: &Value) -> Value {
    let text = |key: &str| object.get(key).and_then(Value::as_str).unwrap_or_default();
    let (schema, name) = (text("schema"), text("name"));
    let kind = match (part, text("kind")) {
        ("relations", "v") => "view",
        ("relations", "m") => "materialized view",
        ("relations", "f") => "foreign table",
        ("relations", _) => "table",
        ("types", "d") => "domain",
        ("types", _) => "type",
        ("sequences", _) => "sequence",
        ("schemas", _) => "schema",
        ("functions", "p") => "procedure",
        ("functions", "a") => "aggregate",
        _ => "function",
    };
    let identity = match part {
        "functions" => text("identity").to_owned(),
        "schemas" => super::quote::ident(name),
        _ => super::quote::qualified(schema, name),
    };
    json!({"oid": oid, "sub": 0, "original": true, "normal": false, "type": kind, "schema": schema, "name": name, "identity": identity})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(relations: Value, storage: Value) -> Look {
        Look::parse(&json!({"relations": relations, "storage": storage}).to_string()).unwrap()
    }

    #[test]
    fn names_that_mean_something_else_are_found() {
        let table = |oid: i64, name: &str, columns: &[(&str, i64)]| {
            let columns: Vec<Value> = columns.iter().map(|(name, num)| json!({"name": name, "num": num, "type": "text"})).collect();
            json!({"oid": oid, "schema": "s", "name": name, "kind": "r", "columns": columns})
        };
        let one = |name: &str, columns: &[(&str, i64)]| look(json!([table(1, name, columns)]), json!({}));
        let before = one("a", &[("x", 1), ("y", 2)]);
        let names = |look: &Look| look.doubtful_tables(&before).into_iter().map(|(_, name)| name).collect::<Vec<_>>();
        for harmless in [one("a", &[("x", 1), ("y", 2), ("z", 3)]), one("b", &[("x", 1), ("y", 2)]), one("a", &[("x", 1), ("n", 2)])] {
            assert!(names(&harmless).is_empty() && !harmless.messages(&before).is_empty());
        }
        assert_eq!(names(&one("a", &[("x", 1), ("y", 3)])), ["a"]);
        assert_eq!(names(&one("a", &[("x", 2), ("y", 1)])), ["a"]);
        assert_eq!(names(&look(json!([table(1, "b", &[("x", 1)]), table(2, "a", &[("x", 1)])]), json!({}))), ["b"]);
    }

    #[test]
    fn what_the_follower_lacks_counts_as_changed() {
        let functions = |list: Value| Look::parse(&json!({"functions": list}).to_string()).unwrap();
        let one = |oid: i64, name: &str, body: &str| json!({"oid": oid, "schema": "s", "name": name, "identity": name, "definition": body});
        let owner = functions(json!([one(1, "same", "a"), one(2, "missing", "a"), one(3, "other", "new")]));
        let follower = functions(json!([one(7, "same", "a"), one(8, "other", "old"), one(9, "its own", "x")]));
        let messages = owner.messages(&owner.remembered(&super::super::catalog::Catalog::default(), &follower));
        let names: Vec<_> = messages[0]["functions"].as_array().unwrap().iter().map(|f| f["name"].clone()).collect();
        assert_eq!((messages.len(), names), (1, vec![json!("missing"), json!("other")]));
    }

    #[test]
    fn says_what_is_different() {
        let before = look(
            json!([{"oid": 1, "schema": "s", "name": "a", "kind": "r"}, {"oid": 2, "schema": "s", "name": "b", "kind": "v"}]),
            json!({"1": 10}),
        );
        assert!(before.messages(&before).is_empty());
        let now = look(json!([{"oid": 1, "schema": "s", "name": "c", "kind": "r"}]), json!({"1": 11}));
        let messages = now.messages(&before);
        assert_eq!(
            messages[0]["dropped"],
            json!([{"oid": 2, "sub": 0, "original": true, "normal": false, "type": "view", "schema": "s", "name": "b",
            "identity": "\"s\".\"b\""}])
        );
        assert_eq!((&messages[1]["tag"], &messages[1]["relations"][0]["name"]), (&json!("ALTER"), &json!("c")));
        assert_eq!(messages[1]["rewritten"], json!([{"oid": 1, "reason": 6}]));
        let born = look(json!([{"oid": 1, "schema": "s", "name": "c", "kind": "r"}, {"oid": 3, "kind": "r"}]), json!({"1": 11, "3": 1}));
        assert_eq!(born.new_tables(&now), BTreeSet::from([3]));
        assert_eq!(born.messages(&now)[0]["tag"], json!("CREATE TABLE AS"));
        assert!(Look::parse("{").is_none() && Look::parse("{\"relations\": [{}]}").is_none());
    }
}
