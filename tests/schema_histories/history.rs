//! Facts about a project's migrations (`events.csv`) turned back into DDL, and rows for its tables. Deterministic for a seed.

use std::collections::BTreeMap;

/// One line of events.csv.
#[derive(Clone, Debug, Default)]
struct Event {
    kind: String,
    tid: String,
    table: String,
    column: String,
    new_name: String,
    type_name: String,
    not_null: bool,
    default: String,
    literal: String,
    detail: String,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Column {
    pub name: String,
    pub type_name: String,
    pub not_null: bool,
    /// What it was called when the history was forked; empty: it was not there.
    pub born: String,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table {
    pub name: String,
    pub born: String,
    pub columns: Vec<Column>,
    keyed: bool,
}

/// A project's schema and what is still to come.
pub struct History {
    migrations: Vec<Vec<Event>>,
    pub at: usize,
    pub tables: BTreeMap<String, Table>,
    enums: BTreeMap<String, Vec<String>>,
    random: fastrand::Rng,
    number: u64,
}

fn fields(line: &str) -> Vec<String> {
    let (mut all, mut one, mut quoted) = (Vec::new(), String::new(), false);
    for letter in line.chars() {
        match letter {
            '"' => quoted = !quoted,
            ',' if !quoted => all.push(std::mem::take(&mut one)),
            letter => one.push(letter),
        }
    }
    all.push(one);
    all
}

pub fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// The projects of a file, in order.
pub fn projects(text: &str) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with('#')).skip(1) {
        let name = line.split(',').next().unwrap().to_owned();
        if names.last() != Some(&name) {
            names.push(name);
        }
    }
    names
}

impl History {
    pub fn new(text: &str, project: &str, seed: u64) -> Self {
        let mut migrations: BTreeMap<u64, Vec<Event>> = BTreeMap::new();
        for line in text.lines().filter(|line| !line.starts_with('#')).skip(1).filter(|line| line.starts_with(&format!("{project},"))) {
            let mut cells = fields(line).into_iter().skip(1);
            let mut cell = || cells.next().unwrap_or_default();
            let seq = cell().parse().unwrap();
            let (kind, tid, table, column, new_name, type_name) = (cell(), cell(), cell(), cell(), cell(), cell());
            let _old_type = cell();
            let (not_null, default, literal) = (cell() == "1", cell(), cell());
            let _using = cell();
            let detail = cell();
            let event = Event { kind, tid, table, column, new_name, type_name, not_null, default, literal, detail };
            migrations.entry(seq).or_default().push(event);
        }
        History {
            migrations: migrations.into_values().collect(),
            at: 0,
            tables: BTreeMap::new(),
            enums: BTreeMap::new(),
            random: fastrand::Rng::with_seed(seed),
            number: 0,
        }
    }

    pub fn len(&self) -> usize {
        self.migrations.len()
    }

    /// From here on names are remembered: another schema starts as this one is now.
    pub fn fork(&mut self) {
        for table in self.tables.values_mut() {
            table.born.clone_from(&table.name);
            for column in &mut table.columns {
                column.born.clone_from(&column.name);
            }
        }
    }

    fn sql_type(&self, name: &str) -> String {
        let (base, array) = name.strip_suffix("[]").map_or((name, ""), |base| (base, "[]"));
        if let Some(label) = base.strip_prefix("enum:") {
            return if self.enums.contains_key(label) { format!("{}{array}", quote(label)) } else { format!("text{array}") };
        }
        let word = base.split('(').next().unwrap();
        let known = match word {
            "double" => "double precision",
            "real" | "integer" | "bigint" | "smallint" | "text" | "uuid" | "boolean" | "jsonb" | "json" | "bytea" | "date" | "time"
            | "inet" | "interval" | "timestamptz" | "timestamp" | "varchar" | "char" | "numeric" | "pg_lsn" => base,
            _ => "text",
        };
        format!("{known}{array}")
    }

    /// A value of a type as SQL; the same number gives the same value.
    fn value(&self, type_name: &str, number: u64) -> String {
        if type_name.ends_with("[]") {
            return "'{}'".into();
        }
        if let Some(labels) = type_name.strip_prefix("enum:").and_then(|label| self.enums.get(label)) {
            let label = &labels[number as usize % labels.len()];
            return format!("'{}'", label.replace('\'', "''"));
        }
        let word = type_name.split('(').next().unwrap();
        match word {
            "integer" | "bigint" | "numeric" | "double" | "real" => format!("{}", number % 1_000_000),
            "smallint" => format!("{}", number % 30_000),
            "boolean" => format!("{}", number.is_multiple_of(3)),
            "uuid" => format!("md5('{number}')::uuid"),
            "json" | "jsonb" => format!("'{{\"n\": {number}}}'"),
            "bytea" => format!("'\\x{:04x}'", number % 65_536),
            "date" => format!("date '2024-01-01' + {}", number % 900),
            "time" => "'03:04:05'".into(),
            "interval" => format!("'{number} seconds'"),
            "timestamp" | "timestamptz" => format!("timestamp '2024-01-01' + interval '{number} minutes'"),
            "inet" => format!("'10.0.{}.{}'", number / 256 % 256, number % 256),
            "char" | "varchar" => {
                let length = type_name.split_once('(').and_then(|(_, rest)| rest.trim_end_matches(')').parse().ok()).unwrap_or(20_usize);
                let text = format!("{number}x");
                format!("'{}'", text.chars().take(length.min(12)).collect::<String>())
            }
            "pg_lsn" => format!("'0/{number:X}'"),
            _ => format!("'text {number}'"),
        }
    }

    fn default(&self, class: &str, literal: &str, type_name: &str) -> Option<String> {
        let literal_is_whole = !literal.is_empty() && !literal.starts_with("<len:");
        Some(match class {
            "false" | "true" => class.to_owned(),
            "zero" => "0".into(),
            "one" => "1".into(),
            "num_other" if literal_is_whole && literal.parse::<f64>().is_ok() => literal.to_owned(),
            "empty_str" => "''".into(),
            "empty_obj" => "'{}'".into(),
            "empty_array" if type_name.starts_with("json") => "'[]'".into(),
            "empty_array" => "'{}'".into(),
            "str_const" | "enum_label" if literal_is_whole => format!("'{}'", literal.replace('\'', "''")),
            "now" => "now()".into(),
            "uuid" => "gen_random_uuid()".into(),
            _ => return None,
        })
    }

    /// The statements of the next migration: alternatives for each event, the first that the owner takes counts.
    pub fn next(&mut self) -> Option<Vec<Vec<String>>> {
        let events = self.migrations.get(self.at)?.clone();
        self.at += 1;
        Some(events.iter().map(|event| self.statements(event)).filter(|alternatives| !alternatives.is_empty()).collect())
    }

    /// The model of the schema follows what the owner has taken.
    fn statements(&mut self, event: &Event) -> Vec<String> {
        let Event { tid, column, new_name, detail, .. } = event;
        let known = self.tables.get(tid).cloned();
        let relation = quote(known.as_ref().map_or(&event.table, |table| &table.name));
        let has = |name: &str| known.as_ref().is_some_and(|table| table.columns.iter().any(|column| column.name == name));
        let name = quote(column);
        let split = |list: &str| list.split(',').map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).collect::<Vec<_>>();
        let columns = |list: &[String]| list.iter().map(|name| quote(name)).collect::<Vec<_>>().join(", ");
        match event.kind.as_str() {
            "create_enum" => {
                let labels: Vec<String> = detail.split('|').map(str::to_owned).filter(|label| !label.is_empty()).collect();
                if labels.is_empty() || self.enums.contains_key(column) {
                    return vec![];
                }
                let list = labels.iter().map(|label| format!("'{}'", label.replace('\'', "''"))).collect::<Vec<_>>().join(", ");
                self.enums.insert(column.clone(), labels);
                vec![format!("CREATE TYPE {name} AS ENUM ({list})")]
            }
            "enum_add_value" => match self.enums.get_mut(column) {
                // usable only in the next transaction: our values do not use it
                Some(_) => vec![format!("ALTER TYPE {name} ADD VALUE IF NOT EXISTS '{}'", new_name.replace('\'', "''"))],
                None => vec![],
            },
            "create_table" => {
                let mut table = Table { name: event.table.clone(), ..Table::default() };
                let mut parts = Vec::new();
                for entry in detail.split(' ') {
                    let Some((name, rest)) = entry.split_once(':') else { continue };
                    let (type_name, class) = rest.split_once('=').unwrap_or((rest, ""));
                    let (type_name, not_null) = type_name.strip_suffix('!').map_or((type_name, false), |name| (name, true));
                    let mut part = format!("{} {}", quote(name), self.sql_type(type_name));
                    let counts = matches!(type_name, "integer" | "bigint" | "smallint");
                    if class == "sequence" && counts {
                        part.push_str(" GENERATED BY DEFAULT AS IDENTITY");
                    } else if let Some(default) = self.default(class, "", type_name) {
                        part.push_str(&format!(" DEFAULT {default}"));
                    }
                    if not_null {
                        part.push_str(" NOT NULL");
                    }
                    if name == "id" && not_null {
                        part.push_str(" PRIMARY KEY");
                        table.keyed = true;
                    }
                    parts.push(part);
                    table.columns.push(Column { name: name.to_owned(), type_name: type_name.to_owned(), not_null, born: String::new() });
                }
                let sql = format!("CREATE TABLE {} ({})", quote(&event.table), parts.join(", "));
                self.tables.insert(tid.clone(), table);
                vec![sql]
            }
            "drop_table" if known.is_some() => {
                self.tables.remove(tid);
                vec![format!("DROP TABLE {relation}"), format!("DROP TABLE {relation} CASCADE")]
            }
            "rename_table" if known.is_some() => {
                self.tables.get_mut(tid).unwrap().name.clone_from(new_name);
                vec![format!("ALTER TABLE {relation} RENAME TO {}", quote(new_name))]
            }
            "add_column" if known.is_some() && !has(column) => {
                let mut sql = format!("ALTER TABLE {relation} ADD COLUMN {name} {}", self.sql_type(&event.type_name));
                let default = self.default(&event.default, &event.literal, &event.type_name);
                if let Some(default) = &default {
                    sql.push_str(&format!(" DEFAULT {default}"));
                }
                let column =
                    Column { name: column.clone(), type_name: event.type_name.clone(), not_null: event.not_null, born: String::new() };
                self.tables.get_mut(tid).unwrap().columns.push(column);
                let mut filled = sql.clone();
                if event.not_null && default.is_some() {
                    filled.push_str(" NOT NULL");
                } else if event.not_null {
                    // what a migration with data does: nullable, filled, then NOT NULL
                    let value = self.value(&event.type_name, 7);
                    filled.push_str(&format!(
                        "; UPDATE {relation} SET {name} = {value}; ALTER TABLE {relation} ALTER COLUMN {name} SET NOT NULL"
                    ));
                }
                vec![filled, sql]
            }
            "drop_column" if has(column) => {
                self.tables.get_mut(tid).unwrap().columns.retain(|one| one.name != *column);
                vec![format!("ALTER TABLE {relation} DROP COLUMN {name}"), format!("ALTER TABLE {relation} DROP COLUMN {name} CASCADE")]
            }
            "rename_column" if has(column) && !has(new_name) => {
                let table = self.tables.get_mut(tid).unwrap();
                table.columns.iter_mut().filter(|one| one.name == *column).for_each(|one| one.name.clone_from(new_name));
                vec![format!("ALTER TABLE {relation} RENAME COLUMN {name} TO {}", quote(new_name))]
            }
            "alter_type" if has(column) => {
                let new = self.sql_type(&event.type_name);
                let table = self.tables.get_mut(tid).unwrap();
                table.columns.iter_mut().filter(|one| one.name == *column).for_each(|one| one.type_name.clone_from(&event.type_name));
                let alter = format!("ALTER TABLE {relation} ALTER COLUMN {name}");
                let value = self.value(&event.type_name, 3);
                vec![
                    format!("{alter} TYPE {new}"),
                    format!("{alter} TYPE {new} USING {name}::text::{new}"),
                    format!(
                        "{alter} DROP DEFAULT, ALTER COLUMN {name} TYPE {new} USING CASE WHEN {name} IS NOT NULL THEN ({value})::{new} END"
                    ),
                ]
            }
            "set_not_null" if has(column) => {
                let table = self.tables.get_mut(tid).unwrap();
                let found = table.columns.iter_mut().find(|one| one.name == *column).unwrap();
                found.not_null = true;
                let type_name = found.type_name.clone();
                let value = self.value(&type_name, 11);
                vec![format!(
                    "UPDATE {relation} SET {name} = {value} WHERE {name} IS NULL; ALTER TABLE {relation} ALTER COLUMN {name} SET NOT NULL"
                )]
            }
            "drop_not_null" if has(column) => vec![format!("ALTER TABLE {relation} ALTER COLUMN {name} DROP NOT NULL")],
            "set_default" if has(column) => {
                let type_name =
                    known.iter().flat_map(|table| &table.columns).find(|one| one.name == *column).map(|one| one.type_name.clone());
                let default = self.default(&event.default, &event.literal, &type_name.unwrap_or_default());
                default.map(|default| format!("ALTER TABLE {relation} ALTER COLUMN {name} SET DEFAULT {default}")).into_iter().collect()
            }
            "drop_default" if has(column) => vec![format!("ALTER TABLE {relation} ALTER COLUMN {name} DROP DEFAULT")],
            "create_index" | "add_unique" if known.is_some() => {
                let unique = if event.kind == "add_unique" || detail.contains(" unique") { "UNIQUE " } else { "" };
                let list: Vec<String> = split(detail.split(" unique").next().unwrap().trim_end_matches(" partial"));
                if list.is_empty() || !list.iter().all(|name| has(name)) {
                    return vec![];
                }
                let plain = format!("CREATE INDEX ON {relation} ({})", columns(&list));
                vec![format!("CREATE {unique}INDEX ON {relation} ({})", columns(&list)), plain]
            }
            "add_pk" if known.as_ref().is_some_and(|table| !table.keyed) => {
                let list = split(detail);
                if list.is_empty() || !list.iter().all(|name| has(name)) {
                    return vec![];
                }
                vec![format!("ALTER TABLE {relation} ADD PRIMARY KEY ({})", columns(&list))]
            }
            "add_fk" if known.is_some() => {
                let Some((from, to)) = detail.split_once("->") else { return vec![] };
                let Some((parent, target)) = to.split_once('(') else { return vec![] };
                let (from, target) = (split(from), split(target.trim_end_matches(')')));
                if !from.iter().all(|name| has(name)) || !self.tables.values().any(|table| table.name == parent) {
                    return vec![];
                }
                vec![format!(
                    "ALTER TABLE {relation} ADD FOREIGN KEY ({}) REFERENCES {} ({}) NOT VALID",
                    columns(&from),
                    quote(parent),
                    columns(&target)
                )]
            }
            "update" if known.is_some() => {
                let Some((column, _)) = detail.split_once('=') else { return vec![] };
                let found = known.iter().flat_map(|table| &table.columns).find(|one| one.name == column).cloned();
                let Some(found) = found else { return vec![] };
                self.number += 1;
                let value = self.value(&found.type_name, self.number);
                vec![format!("UPDATE {relation} SET {} = {value}", quote(column))]
            }
            _ => vec![],
        }
    }

    /// A few writes on tables as they are now. What constraints refuse is refused.
    pub fn writes(&mut self, count: usize) -> Vec<String> {
        let tables: Vec<Table> = self.tables.values().filter(|table| !table.columns.is_empty()).cloned().collect();
        let mut statements = Vec::new();
        for _ in 0..if tables.is_empty() { 0 } else { count } {
            let table = &tables[self.random.usize(..tables.len())];
            self.number += 1;
            let number = self.number;
            let relation = quote(&table.name);
            let some = &table.columns[self.random.usize(..table.columns.len())];
            let only = table.columns.iter().find(|column| column.name == "id").unwrap_or(&table.columns[0]);
            statements.push(match self.random.u32(..10) {
                0 => {
                    format!("DELETE FROM {relation} WHERE {0} = (SELECT {0} FROM {relation} ORDER BY {0}::text LIMIT 1)", quote(&only.name))
                }
                1..=3 => format!(
                    "UPDATE {relation} SET {} = {} WHERE {2} = (SELECT {2} FROM {relation} ORDER BY {2}::text DESC LIMIT 1)",
                    quote(&some.name),
                    self.value(&some.type_name, number),
                    quote(&only.name)
                ),
                _ => {
                    let (mut names, mut values) = (Vec::new(), Vec::new());
                    for column in &table.columns {
                        if column.not_null || self.random.u32(..3) > 0 {
                            names.push(quote(&column.name));
                            values.push(self.value(&column.type_name, number));
                        }
                    }
                    if names.is_empty() {
                        format!("INSERT INTO {relation} DEFAULT VALUES")
                    } else {
                        format!("INSERT INTO {relation} ({}) VALUES ({})", names.join(", "), values.join(", "))
                    }
                }
            });
        }
        statements
    }
}
