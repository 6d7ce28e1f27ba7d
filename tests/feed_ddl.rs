//! Random schema changes and rows on the owner, by seed; at the end both sides have the same catalog and the same rows.
//!
//! `UNDERSTUDY_SEED=…` plays a run again, `UNDERSTUDY_ROUNDS=200` makes it long.

#[path = "support/feed_play.rs"]
mod play;
#[path = "support/feed_servers.rs"]
mod servers;

use fastrand::Rng;
use play::{assert_equal, catch_up, spec, start, streaming};
use servers::Server;
use std::time::{Duration, Instant};
use tokio_postgres::Client;
use understudy::{
    cdc::{self, Feed, Start},
    metadata::{ProposalState, Repository},
};

/// What the test knows of one of its tables.
#[derive(Clone, Debug)]
struct Table {
    schema: String,
    name: String,
    /// Name and type of the columns besides `id`.
    columns: Vec<(String, &'static str)>,
}

impl Table {
    fn qualified(&self) -> String {
        format!("{}.{}", self.schema, self.name)
    }
}

/// Writes statements that succeed, and remembers what they made.
struct Author {
    rng: Rng,
    next: u32,
    tables: Vec<Table>,
    enums: Vec<String>,
    schemas: Vec<String>,
    functions: Vec<String>,
    views: Vec<(String, String)>,
    indexes: Vec<(String, String)>,
    sequences: Vec<String>,
    /// The owner's schema changes are captured by event triggers.
    triggers: bool,
}

const VALUES: &[(&str, &str)] = &[
    ("integer", "g"),
    ("bigint", "g * 10"),
    ("text", "'t' || g"),
    ("numeric(12,2)", "g / 7.0"),
    ("timestamptz", "now()"),
    ("boolean", "g % 2 = 0"),
    ("varchar(40)", "'v' || g"),
    ("jsonb", "jsonb_build_object('g', g)"),
];

impl Author {
    fn fresh(&mut self, prefix: &str) -> String {
        self.next += 1;
        format!("{prefix}{}", self.next)
    }

    fn table(&mut self) -> Option<usize> {
        (!self.tables.is_empty()).then(|| self.rng.usize(0..self.tables.len()))
    }

    fn type_name(&mut self) -> &'static str {
        VALUES[self.rng.usize(0..VALUES.len())].0
    }

    /// Rows for a table, and changes to those it has.
    fn rows(&mut self, index: usize) -> String {
        let table = self.tables[index].clone();
        let from = self.next * 100;
        self.next += 1;
        let names: String = table.columns.iter().map(|(name, _)| format!(", {name}")).collect();
        let values: String =
            table.columns.iter().map(|(_, kind)| format!(", {}", VALUES.iter().find(|(name, _)| name == kind).unwrap().1)).collect();
        let t = table.qualified();
        let mut sql = format!("INSERT INTO {t} (id{names}) SELECT g{values} FROM generate_series({from}, {from} + 20) g;");
        sql.push_str(&format!(
            "UPDATE {t} SET id = -id WHERE id % 17 = 0 AND id > 0; DELETE FROM {t} WHERE id % 13 = {};",
            self.rng.u32(0..13)
        ));
        if let Some((column, kind)) = table.columns.first() {
            let value = VALUES.iter().find(|(name, _)| name == kind).unwrap().1.replace('g', "id");
            let value = value.replace("jsonb_build_object('id'", "jsonb_build_object('g'");
            if !value.contains("idenerate") && *kind != "jsonb" {
                sql.push_str(&format!("UPDATE {t} SET {column} = {value} WHERE id % 5 = 0;"));
            }
        }
        sql
    }

    /// One change of the schema.
    fn change(&mut self) -> String {
        loop {
            if let Some(sql) = self.try_change() {
                return sql;
            }
        }
    }

    fn create(&mut self) -> String {
        let (name, keyed) = (self.fresh("t"), self.rng.u32(0..4) > 0);
        let schema = self.schemas[self.rng.usize(0..self.schemas.len())].clone();
        let columns: Vec<(String, &'static str)> = (0..self.rng.usize(1..4)).map(|_| (self.fresh("c"), self.type_name())).collect();
        let list: String = columns.iter().map(|(name, kind)| format!(", {name} {kind}")).collect();
        let key = if keyed { "PRIMARY KEY" } else { "" };
        let sql = format!("CREATE TABLE {schema}.{name} (id integer {key}{list});");
        self.tables.push(Table { schema, name, columns });
        let rows = self.rows(self.tables.len() - 1);
        sql + &rows
    }

    fn try_change(&mut self) -> Option<String> {
        if self.tables.len() < 3 {
            return Some(self.create());
        }
        let index = self.table()?;
        let table = self.tables[index].clone();
        let t = table.qualified();
        let viewed = self.views.iter().any(|(_, on)| *on == t);
        let column = (!table.columns.is_empty()).then(|| self.rng.usize(0..table.columns.len()));
        Some(match self.rng.u32(0..38) {
            0 => self.create(),
            1 if self.tables.len() > 4 && !viewed => {
                self.tables.remove(index);
                self.indexes.retain(|(_, on)| *on != t);
                format!("DROP TABLE {t};")
            }
            2 => {
                let name = self.fresh("r");
                self.moved(&t, &format!("{}.{name}", table.schema));
                self.tables[index].name.clone_from(&name);
                format!("ALTER TABLE {t} RENAME TO {name};")
            }
            3..=7 => {
                let (name, kind) = (self.fresh("c"), self.type_name());
                let value = VALUES.iter().find(|(n, _)| *n == kind).unwrap().1.replace("g * 10", "70").replace("g / 7.0", "1.5");
                let value = value.replace("g % 2 = 0", "true").replace("'t' || g", "'t'").replace("'v' || g", "'v'");
                let value = value.replace("jsonb_build_object('g', g)", "'{\"a\": 1}'");
                let value = if value == "g" { "7".to_owned() } else { value };
                self.tables[index].columns.push((name.clone(), kind));
                match self.rng.u32(0..4) {
                    0 => format!("ALTER TABLE {t} ADD COLUMN {name} {kind};"),
                    1 => format!("ALTER TABLE {t} ADD COLUMN {name} {kind} NOT NULL DEFAULT {value};"),
                    2 if kind == "integer" || kind == "bigint" => {
                        format!("ALTER TABLE {t} ADD COLUMN {name} {kind} DEFAULT (random() * 1000000)::{kind};")
                    }
                    _ => format!("ALTER TABLE {t} ADD COLUMN {name} {kind} DEFAULT {value};"),
                }
            }
            8 | 9 if !viewed => {
                let (name, _) = self.tables[index].columns.remove(column?);
                self.indexes.clear();
                format!("ALTER TABLE {t} DROP COLUMN {name};")
            }
            10 => {
                let name = self.fresh("n");
                let old = std::mem::replace(&mut self.tables[index].columns[column?].0, name.clone());
                format!("ALTER TABLE {t} RENAME COLUMN {old} TO {name};")
            }
            11 | 12 if !viewed => {
                let at = column?;
                let (name, kind) = table.columns[at].clone();
                let (to, using) = match kind {
                    "integer" => ("bigint", String::new()),
                    "varchar(40)" => ("text", String::new()),
                    "bigint" => ("numeric(12,2)", String::new()),
                    "boolean" => ("text", format!(" USING CASE WHEN {name} THEN 'yes' ELSE 'no' END")),
                    _ => return None,
                };
                self.tables[index].columns[at].1 = to;
                format!("ALTER TABLE {t} ALTER COLUMN {name} DROP DEFAULT, ALTER COLUMN {name} TYPE {to}{using};")
            }
            13 => {
                let (name, kind) = table.columns[column?].clone();
                match kind {
                    "timestamptz" => format!("ALTER TABLE {t} ALTER COLUMN {name} SET DEFAULT now();"),
                    "text" => format!("ALTER TABLE {t} ALTER COLUMN {name} SET DEFAULT 'd''e';"),
                    _ => format!("ALTER TABLE {t} ALTER COLUMN {name} DROP DEFAULT;"),
                }
            }
            14 => {
                let (name, _) = table.columns[column?].clone();
                format!("ALTER TABLE {t} ALTER COLUMN {name} DROP NOT NULL;")
            }
            // The same name again, for another column.
            15 if !viewed => {
                let at = column?;
                let (name, _) = table.columns[at].clone();
                self.indexes.clear();
                self.tables[index].columns.remove(at);
                self.tables[index].columns.push((name.clone(), "text"));
                format!("ALTER TABLE {t} DROP COLUMN {name}; ALTER TABLE {t} ADD COLUMN {name} text DEFAULT 'again';")
            }
            16 | 17 => {
                let (name, kind) = table.columns[column?].clone();
                if kind == "jsonb" {
                    return None;
                }
                let i = self.fresh("i");
                self.indexes.push((format!("{}.{i}", table.schema), t.clone()));
                format!("CREATE INDEX {i} ON {t} ({name}, id);")
            }
            18 => {
                let (i, _) = self.indexes.pop()?;
                format!("DROP INDEX IF EXISTS {i};")
            }
            19 => {
                let c = self.fresh("k");
                match self.rng.u32(0..2) {
                    0 => format!("ALTER TABLE {t} ADD CONSTRAINT {c} CHECK (id < 100000000);"),
                    _ => format!("ALTER TABLE {t} ADD CONSTRAINT {c} CHECK (id < 100000000); ALTER TABLE {t} DROP CONSTRAINT {c};"),
                }
            }
            20 => {
                let v = format!("public.{}", self.fresh("v"));
                self.views.push((v.clone(), t.clone()));
                format!("CREATE VIEW {v} AS SELECT id, count(*) AS n FROM {t} GROUP BY id;")
            }
            21 => {
                let (v, _) = self.views.pop()?;
                format!("DROP VIEW {v};")
            }
            22 => {
                let f = match self.functions.first() {
                    Some(f) if self.rng.bool() => f.clone(),
                    _ => {
                        let f = format!("public.{}", self.fresh("f"));
                        self.functions.push(f.clone());
                        f
                    }
                };
                format!("CREATE OR REPLACE FUNCTION {f}(a integer) RETURNS integer LANGUAGE sql AS 'SELECT a + {}';", self.next)
            }
            23 => {
                let e = format!("public.{}", self.fresh("e"));
                self.enums.push(e.clone());
                format!("CREATE TYPE {e} AS ENUM ('a', 'b');")
            }
            24 => {
                let e = self.enums.first()?.clone();
                let label = self.fresh("l");
                format!("ALTER TYPE {e} ADD VALUE '{label}' BEFORE 'b';")
            }
            25 => {
                let s = self.fresh("s");
                self.schemas.push(s.clone());
                format!("CREATE SCHEMA {s};")
            }
            26 => {
                let s = self.schemas[self.rng.usize(0..self.schemas.len())].clone();
                if s == table.schema {
                    return None;
                }
                self.moved(&t, &format!("{s}.{}", table.name));
                self.tables[index].schema.clone_from(&s);
                for (i, on) in &mut self.indexes {
                    if *on == format!("{s}.{}", table.name) {
                        *i = format!("{s}.{}", i.split_once('.').unwrap().1);
                    }
                }
                format!("ALTER TABLE {t} SET SCHEMA {s};")
            }
            27 => {
                let q = format!("public.{}", self.fresh("q"));
                self.sequences.push(q.clone());
                format!("CREATE SEQUENCE {q} START 100 INCREMENT 5;")
            }
            28 => {
                let q = self.sequences.pop()?;
                match self.rng.u32(0..2) {
                    0 => format!("DROP SEQUENCE {q};"),
                    _ => {
                        let name = self.fresh("q");
                        self.sequences.push(format!("public.{name}"));
                        format!("ALTER SEQUENCE {q} INCREMENT 7 MAXVALUE 1000000; ALTER SEQUENCE {q} RENAME TO {name};")
                    }
                }
            }
            29 => {
                let p = self.fresh("p");
                format!(
                    "CREATE TABLE {p} (id integer, at integer, v text, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
                     CREATE TABLE {p}_1 PARTITION OF {p} FOR VALUES FROM (0) TO (10);
                     INSERT INTO {p} SELECT g, g % 10, 'a' FROM generate_series(1, 30) g;
                     CREATE TABLE {p}_2 (id integer NOT NULL, at integer NOT NULL, v text, PRIMARY KEY (id, at));
                     INSERT INTO {p}_2 SELECT g, 15, 'b' FROM generate_series(1, 5) g;
                     ALTER TABLE {p} ATTACH PARTITION {p}_2 FOR VALUES FROM (10) TO (20);
                     UPDATE {p} SET at = 12 WHERE at = 3;
                     ALTER TABLE {p} DETACH PARTITION {p}_1;{}",
                    // Looks at the catalog come too late for rows of a table that has only just become one of its own.
                    if self.triggers { format!(" INSERT INTO {p}_1 VALUES (100, 1, 'c');") } else { String::new() }
                )
            }
            30 => {
                let at = self.functions.len().checked_sub(1)?;
                format!("DROP FUNCTION {}(integer);", self.functions.remove(at))
            }
            31 => format!("DROP TYPE {};", self.enums.pop()?),
            32 => {
                let (at, name) = (self.enums.len().checked_sub(1)?, self.fresh("e"));
                let old = std::mem::replace(&mut self.enums[at], format!("public.{name}"));
                format!("ALTER TYPE {old} RENAME TO {name};")
            }
            33 => {
                let (at, name) = (self.indexes.len().checked_sub(1)?, self.fresh("i"));
                let schema = self.indexes[at].0.split_once('.').unwrap().0.to_owned();
                let old = std::mem::replace(&mut self.indexes[at].0, format!("{schema}.{name}"));
                format!("ALTER INDEX IF EXISTS {old} RENAME TO {name};")
            }
            34 => {
                let c = self.fresh("u");
                format!("ALTER TABLE {t} ADD CONSTRAINT {c} CHECK (id > -100000000); ALTER TABLE {t} RENAME CONSTRAINT {c} TO {c}_r;")
            }
            35 => {
                let (at, name) = (self.views.len().checked_sub(1)?, self.fresh("v"));
                let old = std::mem::replace(&mut self.views[at].0, format!("public.{name}"));
                format!("ALTER VIEW {old} RENAME TO {name};")
            }
            36 => {
                let at = self.schemas.len().checked_sub(1).filter(|at| *at > 0)?;
                let name = self.fresh("s");
                let old = std::mem::replace(&mut self.schemas[at], name.clone());
                for table in self.tables.iter_mut().filter(|table| table.schema == old) {
                    table.schema.clone_from(&name);
                }
                let prefix = format!("{old}.");
                let names = self.views.iter_mut().map(|(_, on)| on).chain(self.indexes.iter_mut().flat_map(|(index, on)| [index, on]));
                for one in names.filter(|one| one.starts_with(&prefix)) {
                    *one = format!("{name}.{}", one.split_once('.').unwrap().1);
                }
                format!("ALTER SCHEMA {old} RENAME TO {name};")
            }
            37 => {
                let c = self.fresh("y");
                format!("CREATE TYPE public.{c} AS (a integer, b text); ALTER TYPE public.{c} ADD ATTRIBUTE c numeric;")
            }
            _ => return None,
        })
    }

    fn moved(&mut self, from: &str, to: &str) {
        for on in self.views.iter_mut().map(|(_, on)| on).chain(self.indexes.iter_mut().map(|(_, on)| on)) {
            if on == from {
                *on = to.to_owned();
            }
        }
    }

    /// Changes and rows as an application would send them: alone, in one transaction, in a DO block, rolled back to a savepoint.
    fn script(&mut self) -> String {
        let rows = self.table().map(|t| self.rows(t)).unwrap_or_default();
        match self.rng.u32(0..7) {
            0 => format!("BEGIN; {rows} {} {} COMMIT", self.change(), self.change()),
            1 => {
                let ddl = self.change();
                if ddl.contains("ADD VALUE") { ddl } else { format!("DO $do$ BEGIN {ddl} END $do$") }
            }
            2 => {
                let t = self.table().map(|t| self.tables[t].qualified());
                let gone =
                    t.map(|t| format!("ALTER TABLE {t} ADD COLUMN never integer DEFAULT 1; DROP TABLE {t} CASCADE;")).unwrap_or_default();
                format!("BEGIN; SAVEPOINT s; {gone} ROLLBACK TO s; {} COMMIT", self.change())
            }
            3 => format!("BEGIN; {} {rows} ROLLBACK", "CREATE TABLE nobody (id integer); INSERT INTO nobody VALUES (1);"),
            _ => {
                let ddl = self.change();
                let rows = self.table().map(|t| self.rows(t)).unwrap_or_default();
                format!("{ddl} {rows}")
            }
        }
    }
}

/// Until the feed has taken over everything; what waits for a person is approved, in order. Tables that rows have set aside before the catalog
/// was looked at come back by themselves.
async fn settle(superuser: bool, feed: &Feed, owner: &Client, repository: &Repository, history: &[String]) {
    let deadline = Instant::now() + play::PATIENCE;
    let mut refused = String::new();
    loop {
        catch_up(feed, owner).await;
        let pending: Vec<_> =
            repository.proposals(None).unwrap().into_iter().filter(|proposal| proposal.state == ProposalState::Pending).collect();
        for proposal in pending.iter().filter(|proposal| superuser || proposal.draft.kind != "held_table") {
            if let Err(error) = feed.approve(proposal, None, "test").await {
                refused = format!("{} ({:?}): {error}", proposal.draft.change, proposal.draft.sql);
            }
        }
        let held = feed.state().held_tables;
        if pending.is_empty() && held.is_empty() {
            return;
        }
        if Instant::now() > deadline {
            let events: Vec<_> =
                repository.events(0, 1000, false).unwrap().iter().rev().take(25).map(|e| format!("{} {}", e.message, e.data)).collect();
            panic!(
                "not settled: {held:?}; {} proposals, {:?}; {refused}\n{}\n{}",
                pending.len(),
                pending.first().map(|p| (&p.draft.change, &p.draft.sql)),
                events.join("\n"),
                history.join("\n")
            );
        }
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
}

/// What differs between both catalogs.
async fn catalogs(owner: &Client, follower: &Client) -> Vec<String> {
    let (left, right) = (play::catalog(owner).await, play::catalog(follower).await);
    let only = |side: &str, these: &[String], those: &[String]| -> Vec<String> {
        these.iter().filter(|line| !those.contains(line)).map(|line| format!("{side} only: {line}")).collect()
    };
    [only("owner", &left, &right), only("follower", &right, &left)].concat()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_changes_of_the_schema_arrive() {
    random_changes("random_changes_of_the_schema_arrive", true, play::rounds(2)).await;
}

/// The owner's role may not create event triggers: its catalog is looked at instead.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_changes_arrive_without_event_triggers() {
    random_changes("random_changes_arrive_without_event_triggers", false, play::rounds(2)).await;
}

async fn random_changes(test: &str, superuser: bool, runs: usize) {
    let seed = play::seed(test);
    let (old, new) = (Server::start(15, ""), Server::start(18, ""));
    let mut rng = Rng::with_seed(seed);
    old.client("postgres").await.batch_execute("CREATE ROLE app LOGIN REPLICATION").await.unwrap();
    for run in 0..runs {
        let database = format!("ddl{run}");
        let (_, follower) = (old.create(&database).await, new.create(&database).await);
        let mut spec = spec(&old, &new, &database);
        if !superuser {
            old.client("postgres").await.batch_execute(&format!("ALTER DATABASE {database} OWNER TO app")).await.unwrap();
            spec.from.user = "app".into();
        }
        let (owner, connection) = spec.from.to_tokio("application").connect(tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        let mut author = Author {
            rng: rng.fork(),
            next: 0,
            tables: vec![],
            enums: vec![],
            schemas: vec!["public".into()],
            functions: vec![],
            views: vec![],
            indexes: vec![],
            sequences: vec![],
            triggers: superuser,
        };
        let mut history = Vec::new();
        for _ in 0..5 {
            let sql = author.script();
            owner.batch_execute(&sql).await.unwrap_or_else(|error| panic!("the test wrote a wrong statement: {sql}: {error:?}"));
            history.push(sql);
        }
        history.push("-- the copy".into());
        let repository = Repository::in_memory().unwrap();
        let feed = start(&spec, Start::Copy, &repository);
        streaming(&feed).await;
        for _ in 0..25 {
            let sql = author.script();
            history.push(sql.clone());
            owner.batch_execute(&sql).await.unwrap_or_else(|error| panic!("the test wrote a wrong statement: {sql}: {error:?}"));
            if author.rng.u32(0..5) == 0 {
                settle(superuser, &feed, &owner, &repository, &history).await;
            }
        }
        println!("{}", history.join("\n"));
        let deadline = Instant::now() + play::PATIENCE;
        loop {
            settle(superuser, &feed, &owner, &repository, &history).await;
            if superuser || catalogs(&owner, &follower).await.is_empty() || Instant::now() > deadline {
                break;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        settle(superuser, &feed, &owner, &repository, &history).await;
        let decided: Vec<_> = repository
            .proposals(None)
            .unwrap()
            .iter()
            .filter(|proposal| !matches!(proposal.state, ProposalState::AutoApplied | ProposalState::Approved))
            .map(|proposal| format!("{:?}: {} {:?} {}", proposal.state, proposal.draft.change, proposal.draft.sql, proposal.note))
            .collect();
        let differences = catalogs(&owner, &follower).await;
        assert!(differences.is_empty(), "run {run}: {}\n{}", differences.join("\n"), decided.join("\n"));
        assert_equal(&owner, &follower, &format!("run {run}")).await;
        let events =
            || repository.events(0, 1000, false).unwrap().iter().map(|e| format!("{} {}\n", e.message, e.data)).collect::<String>();
        assert_eq!(feed.state().findings, 0, "{:?}\n{}", feed.state(), events());
        feed.stop().await;
        cdc::disarm(&spec).await.unwrap();
    }
}
