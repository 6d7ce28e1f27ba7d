//! What the source's catalog knows: which functions, operators, types and relations are harmless to read.
//!
//! `builtins.txt` (for [`CatalogFacts::builtin_only`]) was written by psql on an empty PostgreSQL 18: the distinct names
//! of `pg_proc` by `provolatile`, of `pg_type` and of `pg_operator` in `pg_catalog`.

use super::{Kind, SessionEffect, analyse};
use std::collections::{HashMap, HashSet};
use tokio_postgres::Client;

/// Definitions of views are followed this deep; a deeper one is not a read.
const VIEW_DEPTH_MAX: usize = 32;

/// The catalog's facts that classification needs. Loaded once per database and again after DDL.
#[derive(Clone, Debug, Default)]
pub struct CatalogFacts {
    /// Function names, folded over schemas and overloads: `true` if any of them is volatile.
    functions: HashMap<String, bool>,
    /// Volatile functions that `row.name` or `(row).name` would call.
    attribute_functions: HashSet<String>,
    /// Operator names: `true` if any of that name is volatile.
    operators: HashMap<String, bool>,
    /// Type names: `true` if a conversion to one of that name, or its check, is volatile.
    types: HashMap<String, bool>,
    /// An implicit cast calls a volatile function: nothing that is not spelled out can be trusted.
    volatile_implicit_cast: bool,
    /// Functions and operators that are not PostgreSQL's own: what they read is not known.
    strange: HashSet<String>,
    /// Ordinary tables without policies, parents and children, by `name` and by `schema.name`: reading one reads nothing else.
    alone: HashSet<String>,
    /// By `name` and by `schema.name`; `None`: relations are not known, each counts as a table.
    relations: Option<HashMap<String, Relation>>,
}

/// What reading a relation means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Relation {
    /// An ordinary, replicated table, or a view over such.
    Readable,
    /// As `Readable`, a view whose rows are not determined by the data: LIMIT, DISTINCT ON, row_number().
    Vague,
    /// Reading it makes the statement at least this.
    Refused(Kind),
    /// As `Refused`, and a write to it cannot be rehearsed: it is elsewhere.
    Foreign,
}

/// Stays on the source, changes nothing.
pub(super) const STAYS: Kind = Kind::Session(SessionEffect::Other);

impl Relation {
    fn worse(self, other: Relation) -> Relation {
        match (self, other) {
            (Relation::Foreign, _) | (_, Relation::Foreign) => Relation::Foreign,
            (Relation::Refused(a), Relation::Refused(b)) => Relation::Refused(a.or_stronger(b)),
            (Relation::Refused(a), Relation::Readable | Relation::Vague) | (Relation::Readable | Relation::Vague, Relation::Refused(a)) => {
                Relation::Refused(a)
            }
            (Relation::Vague, _) | (_, Relation::Vague) => Relation::Vague,
            (Relation::Readable, Relation::Readable) => Relation::Readable,
        }
    }
}

impl CatalogFacts {
    /// The built-in names of PostgreSQL 18; every relation counts as a table. For unit tests, and while no catalog is known.
    pub fn builtin_only() -> Self {
        let mut facts = CatalogFacts::default();
        for line in include_str!("builtins.txt").lines() {
            let mut words = line.split(' ');
            let kind = words.next().unwrap_or_default();
            for name in words {
                match kind {
                    "volatile" => drop(facts.functions.insert(name.to_owned(), true)),
                    "stable" => drop(facts.functions.insert(name.to_owned(), false)),
                    "types" => drop(facts.types.insert(name.to_owned(), false)),
                    "operators" => drop(facts.operators.insert(name.to_owned(), false)),
                    _ => {}
                }
            }
        }
        facts
    }

    /// Reads the facts of the connected database.
    ///
    /// # Errors
    /// The server's. A role that may not read `pg_catalog` does not exist, so these are broken connections.
    pub async fn load(client: &Client) -> Result<Self, tokio_postgres::Error> {
        let mut facts = CatalogFacts::default();
        for row in client.query(FUNCTIONS, &[]).await? {
            let (name, volatile, attribute): (String, bool, bool) = (row.get(0), row.get(1), row.get(2));
            if volatile && attribute {
                facts.attribute_functions.insert(name.clone());
            }
            if row.get(3) {
                facts.strange.insert(name.clone());
            }
            facts.functions.insert(name, volatile);
        }
        for row in client.query(OPERATORS, &[]).await? {
            let name: String = row.get(0);
            if row.get(2) {
                facts.strange.insert(name.clone());
            }
            facts.operators.insert(name, row.get(1));
        }
        let mut checks = Vec::new();
        for row in client.query(TYPES, &[]).await? {
            let (name, volatile, check): (String, bool, Option<String>) = (row.get(0), row.get(1), row.get(2));
            if let Some(check) = check {
                checks.push((name.clone(), check));
            }
            facts.types.insert(name, volatile);
        }
        facts.volatile_implicit_cast = !client.query(VOLATILE_IMPLICIT_CASTS, &[]).await?.is_empty();
        for (name, check) in checks {
            // pg_get_constraintdef says CHECK (…), possibly NOT VALID behind it; `VALUE` is a column to the parser.
            let expression = check.trim_start_matches("CHECK").trim().trim_end_matches("NOT VALID");
            if analyse::reads_only(&format!("SELECT {expression}"), &facts) != Some(Kind::Read) {
                facts.types.insert(name, true);
            }
        }
        facts.load_relations(client).await?;
        Ok(facts)
    }

    async fn load_relations(&mut self, client: &Client) -> Result<(), tokio_postgres::Error> {
        let mut known: HashMap<String, Relation> = HashMap::new();
        let mut pending: Vec<(String, String, Vec<String>)> = Vec::new();
        let mut related = HashSet::new();
        for row in client.query(RELATIONS, &[]).await? {
            let (schema, name, kind): (String, String, String) = (row.get(0), row.get(1), row.get(2));
            let (persistence, definition): (String, Option<String>) = (row.get(3), row.get(4));
            let policies: Vec<String> = row.get(5);
            let alone = kind == "r" && !row.get::<_, bool>(6);
            for key in [name.clone(), format!("{schema}.{name}")] {
                if !alone {
                    related.insert(key.clone());
                }
                self.alone.insert(key);
            }
            match (kind.as_str(), persistence.as_str()) {
                ("r" | "p", "p") if policies.is_empty() => remember(&mut known, &schema, &name, Relation::Readable),
                ("r" | "p", "p") => pending.push((schema, name, policies.iter().map(|p| format!("SELECT {p}")).collect())),
                ("v", _) => pending.push((schema, name, definition.into_iter().collect())),
                ("f", _) => remember(&mut known, &schema, &name, Relation::Foreign),
                // Sequences, materialized views, unlogged and temporary tables: no feed carries their rows.
                _ => remember(&mut known, &schema, &name, Relation::Refused(STAYS)),
            }
        }
        self.alone.retain(|name| !related.contains(name));
        // A view can be judged once everything it names is known; views on views need a round each.
        self.relations = Some(known);
        for _ in 0..VIEW_DEPTH_MAX {
            let waiting: HashSet<String> =
                pending.iter().flat_map(|(schema, name, _)| [name.clone(), format!("{schema}.{name}")]).collect();
            let (ready, rest): (Vec<_>, Vec<_>) = pending.into_iter().partition(|(_, _, texts)| {
                texts.iter().all(|text| analyse::relations(text).is_some_and(|named| named.iter().all(|name| !waiting.contains(name))))
            });
            pending = rest;
            if ready.is_empty() {
                break;
            }
            for (schema, name, texts) in ready {
                let mut relation = Relation::Readable;
                for text in &texts {
                    match analyse::definition(text, self) {
                        Some((Kind::Read, false)) => {}
                        Some((Kind::Read, true)) => relation = relation.worse(Relation::Vague),
                        Some((kind, _)) => relation = relation.worse(Relation::Refused(kind)),
                        None => relation = relation.worse(Relation::Refused(Kind::Unknown)),
                    }
                }
                if let Some(known) = &mut self.relations {
                    remember(known, &schema, &name, relation);
                }
            }
        }
        if let Some(known) = &mut self.relations {
            for (schema, name, _) in pending {
                remember(known, &schema, &name, Relation::Refused(Kind::Unknown));
            }
        }
        Ok(())
    }

    /// `None`: no function of that name.
    pub(super) fn function_is_volatile(&self, name: &str) -> Option<bool> {
        self.functions.get(name).copied()
    }

    /// A statement that names these relations, and calls nothing [strange](Self::is_strange), reads no other.
    pub(super) fn are_alone(&self, relations: &[String]) -> bool {
        self.relations.is_none() || relations.iter().all(|name| self.alone.contains(name))
    }

    /// A function or operator that is not PostgreSQL's own.
    pub(super) fn is_strange(&self, name: &str) -> bool {
        self.strange.contains(name)
    }

    pub(super) fn attribute_is_volatile(&self, name: &str) -> bool {
        self.attribute_functions.contains(name)
    }

    pub(super) fn operator_is_volatile(&self, name: &str) -> Option<bool> {
        self.operators.get(name).copied()
    }

    pub(super) fn type_is_volatile(&self, name: &str) -> Option<bool> {
        self.types.get(name).copied()
    }

    /// Something that no name in the statement shows could be volatile: an implicit cast, or the comparison behind
    /// DISTINCT, GROUP BY, ORDER BY, USING, IN, UNION.
    pub(super) fn hidden_volatility(&self) -> bool {
        self.volatile_implicit_cast || ["=", "<", ">"].iter().any(|name| self.operator_is_volatile(name) == Some(true))
    }

    /// `None`: no relation of that name (a temporary table, a CTE, or created a moment ago).
    pub(super) fn relation(&self, schema: &str, name: &str) -> Option<Relation> {
        let Some(relations) = &self.relations else { return Some(Relation::Readable) };
        match schema {
            "" => relations.get(name).copied(),
            schema => relations.get(&format!("{schema}.{name}")).copied(),
        }
    }

    /// For tests of what a catalog would add.
    #[cfg(test)]
    pub(super) fn with(mut self, functions: &[(&str, bool)], relations: &[(&str, Relation)]) -> Self {
        self.functions.extend(functions.iter().map(|(name, volatile)| ((*name).to_owned(), *volatile)));
        let known = self.relations.get_or_insert_default();
        known.extend(relations.iter().map(|(name, relation)| ((*name).to_owned(), *relation)));
        self
    }
}

fn remember(known: &mut HashMap<String, Relation>, schema: &str, name: &str, relation: Relation) {
    for key in [name.to_owned(), format!("{schema}.{name}")] {
        known.entry(key).and_modify(|old| *old = old.worse(relation)).or_insert(relation);
    }
}

/// Aggregates always say IMMUTABLE: what counts is their support functions.
const FUNCTIONS: &str = "
    SELECT p.proname::text,
           bool_or(p.prokind = 'p' OR p.provolatile = 'v' OR coalesce(agg.volatile, false)),
           bool_or(p.pronamespace <> 'pg_catalog'::regnamespace AND p.pronargs > 0 AND t.typtype IN ('c', 'p')),
           bool_or(p.pronamespace <> 'pg_catalog'::regnamespace)
    FROM pg_catalog.pg_proc p
    LEFT JOIN pg_catalog.pg_type t ON t.oid = p.proargtypes[0]
    LEFT JOIN LATERAL (
        SELECT bool_or(s.provolatile = 'v') AS volatile FROM pg_catalog.pg_aggregate a
        JOIN pg_catalog.pg_proc s ON s.oid IN (a.aggtransfn, a.aggfinalfn, a.aggcombinefn, a.aggmtransfn, a.aggminvtransfn, a.aggmfinalfn)
        WHERE a.aggfnoid = p.oid) agg ON p.prokind = 'a'
    GROUP BY 1";

const OPERATORS: &str = "
    SELECT o.oprname::text, bool_or(coalesce(p.provolatile = 'v', true)), bool_or(o.oprnamespace <> 'pg_catalog'::regnamespace)
    FROM pg_catalog.pg_operator o LEFT JOIN pg_catalog.pg_proc p ON p.oid = o.oprcode GROUP BY 1";

/// Row types of tables are types, too. One row per domain check.
const TYPES: &str = "
    SELECT t.typname::text,
           coalesce(i.provolatile = 'v', false) OR EXISTS (
               SELECT FROM pg_catalog.pg_cast c JOIN pg_catalog.pg_proc p ON p.oid = c.castfunc
               WHERE c.casttarget = t.oid AND p.provolatile = 'v'),
           pg_catalog.pg_get_constraintdef(k.oid)
    FROM pg_catalog.pg_type t
    LEFT JOIN pg_catalog.pg_proc i ON i.oid = t.typinput
    LEFT JOIN pg_catalog.pg_constraint k ON k.contypid = t.oid AND k.contype = 'c'
    ORDER BY 1, 2";

const VOLATILE_IMPLICIT_CASTS: &str = "
    SELECT 1 FROM pg_catalog.pg_cast c JOIN pg_catalog.pg_proc p ON p.oid = c.castfunc
    WHERE c.castcontext = 'i' AND p.provolatile = 'v' LIMIT 1";

/// System schemas are judged by their names (see `analyse`), except that views' definitions may name them.
const RELATIONS: &str = "
    SELECT n.nspname::text, c.relname::text, c.relkind::text, c.relpersistence::text,
           CASE WHEN c.relkind = 'v' THEN pg_catalog.pg_get_viewdef(c.oid) END,
           CASE WHEN c.relrowsecurity THEN ARRAY(
               SELECT pg_catalog.pg_get_expr(p.polqual, p.polrelid) FROM pg_catalog.pg_policy p
               WHERE p.polrelid = c.oid AND p.polqual IS NOT NULL) ELSE '{}' END,
           c.relrowsecurity OR EXISTS (SELECT FROM pg_catalog.pg_inherits i WHERE c.oid IN (i.inhrelid, i.inhparent))
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S') AND n.nspname NOT IN ('pg_catalog', 'information_schema')
      AND n.nspname !~ '^pg_(toast|temp)'";
