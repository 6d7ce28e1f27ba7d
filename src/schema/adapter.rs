//! The engine at its place in the stream: one message in, statements and proposals out.

use super::{
    SchemaError, approval,
    catalog::{Catalog, Table},
    experience,
    mapping::SharedRules,
    message::Message,
    plan::Planned,
    policy,
    quote::{self, parse_object},
    renames::Rename,
};
use crate::{
    lsn::Lsn,
    metadata::{ProposalDraft, ProposalState, Repository},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};
use tokio_postgres::Client;

/// What the applier does about a DDL message.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Adaptation {
    /// Proposal id and statements to run inside this transaction, in order (approved by policy). One savepoint per proposal.
    pub run_now: Vec<(i64, Vec<String>)>,
    /// Proposal id and statements to run after the commit, each outside a transaction (CREATE INDEX CONCURRENTLY, VALIDATE).
    pub run_after: Vec<(i64, Vec<String>)>,
    /// Proposal id, schema, table: rows of the table are spooled until a person decides.
    pub hold: Vec<(i64, String, String)>,
    /// Schema, table whose rows must be copied again, because the owner rewrote them without telling the stream. For a table that is also
    /// in `hold`: after its proposal was decided.
    pub recopy: Vec<(String, String)>,
    /// The applier must commit this transaction before it applies the owner's next one: a new enum label is usable only then
    /// (SQLSTATE 55P04).
    pub commit_alone: bool,
}

/// Messages whose effect on the engine's memory can be taken back, newest last: at least as many as one owner's transaction may reasonably
/// hold, because the applier that starts over delivers a whole transaction again. Older ones are forgotten.
const LOG_LENGTH_MAX: usize = 512;

/// How one message changed the memory.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct LogEntry {
    lsn: Lsn,
    /// What was there before, for what the message changed; `None`: nothing.
    before: Patch,
    /// Proposals it led to.
    proposals: Vec<i64>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Patch {
    tables: BTreeMap<i64, Option<Table>>,
    types: BTreeMap<i64, Option<super::catalog::UserType>>,
    sequences: BTreeMap<i64, Option<super::catalog::Sequence>>,
    schemas: BTreeMap<i64, Option<super::catalog::Namespace>>,
    functions: BTreeMap<i64, Option<super::catalog::Routine>>,
    /// All of them, if any changed.
    default_privileges: Option<Vec<super::catalog::DefaultAccess>>,
}

fn patch_map<T: Clone + PartialEq>(before: &BTreeMap<i64, T>, after: &BTreeMap<i64, T>) -> BTreeMap<i64, Option<T>> {
    let keys: BTreeSet<i64> = before.keys().chain(after.keys()).copied().collect();
    keys.into_iter().filter(|key| before.get(key) != after.get(key)).map(|key| (key, before.get(&key).cloned())).collect()
}

fn restore_map<T>(map: &mut BTreeMap<i64, T>, patch: BTreeMap<i64, Option<T>>) {
    for (key, value) in patch {
        match value {
            Some(value) => map.insert(key, value),
            None => map.remove(&key),
        };
    }
}

/// The owner's schema at the engine's place in the stream.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Memory {
    pub(super) catalog: Catalog,
    log: Vec<LogEntry>,
}

impl Memory {
    fn rewind(&mut self, lsn: Lsn) -> Vec<i64> {
        let Some(at) = self.log.iter().position(|entry| entry.lsn == lsn) else { return vec![] };
        let mut proposals = Vec::new();
        for entry in self.log.drain(at..).rev() {
            restore_map(&mut self.catalog.tables, entry.before.tables);
            restore_map(&mut self.catalog.types, entry.before.types);
            restore_map(&mut self.catalog.sequences, entry.before.sequences);
            restore_map(&mut self.catalog.schemas, entry.before.schemas);
            restore_map(&mut self.catalog.functions, entry.before.functions);
            if let Some(before) = entry.before.default_privileges {
                self.catalog.default_privileges = before;
            }
            proposals.extend(entry.proposals);
        }
        proposals.sort_unstable();
        proposals
    }
}

/// The Schema Adaptation Engine for one shadow.
pub struct Adapter {
    pub(super) database: String,
    pub(super) shadow: String,
    /// Where the memory is kept in the repository: its place in the stream is this feed's own.
    side: String,
    pub(super) repository: Repository,
    auto_approve: Arc<arc_swap::ArcSwap<f64>>,
    pub(super) memory: tokio::sync::Mutex<Option<Memory>>,
    /// Differences that the previous look at the shadow saw: only what is there twice is drift, and not a transaction on its way.
    pub(super) seen_before: std::sync::Mutex<BTreeSet<(String, String)>>,
    /// The shadow's catalog as it was stored last: what has not changed costs no document.
    kept: std::sync::Mutex<Option<Catalog>>,
    /// How the shadow's schema differs on purpose, and whether the rows flow back from it.
    pub(super) rules: SharedRules,
    pub(super) back: bool,
    /// Proposals of a transaction that is being delivered again, to be used again.
    again: std::sync::Mutex<BTreeSet<i64>>,
}

/// A suggestion and the owner's table (schema, name) whose rows it may hold back.
pub(super) struct Step {
    pub(super) planned: Planned,
    pub(super) table: Option<(String, String)>,
}

impl Adapter {
    /// An engine for `shadow` of `database`. `auto_approve` is read anew for every message.
    pub fn new(database: String, shadow: String, repository: Repository, auto_approve: Arc<arc_swap::ArcSwap<f64>>) -> Self {
        Adapter {
            side: format!("source@{shadow}"),
            database,
            shadow,
            repository,
            auto_approve,
            memory: tokio::sync::Mutex::default(),
            seen_before: std::sync::Mutex::default(),
            kept: std::sync::Mutex::default(),
            rules: SharedRules::default(),
            back: false,
            again: std::sync::Mutex::default(),
        }
    }

    /// For a shadow whose schema differs on purpose.
    #[must_use]
    pub fn mapped(self, rules: SharedRules, back: bool) -> Self {
        Adapter { rules, back, ..self }
    }

    /// The policy's threshold now.
    pub(super) fn threshold(&self) -> f64 {
        **self.auto_approve.load()
    }

    /// The same engine for the way back, where the shadow is the owner: with a memory of its own.
    #[must_use]
    pub fn reversed(self) -> Self {
        Adapter { side: format!("{0}@{0}", self.shadow), ..self }
    }

    /// The owner's schema is known from an earlier run of this feed.
    ///
    /// # Errors
    /// [`SchemaError`]
    pub fn has_baseline(&self) -> Result<bool, SchemaError> {
        Ok(self.repository.newest_schema(&self.database, &self.side)?.is_some())
    }

    /// The owner has this column, at the engine's place in the stream.
    ///
    /// # Errors
    /// [`SchemaError`]
    pub async fn knows_column(&self, schema: &str, table: &str, column: &str) -> Result<bool, SchemaError> {
        let mut guard = self.memory.lock().await;
        let memory = match guard.take() {
            Some(memory) => memory,
            None => self.recall()?,
        };
        let memory = guard.insert(memory);
        let found = memory.catalog.tables.values().find(|known| known.schema == schema && known.name == table);
        Ok(found.is_some_and(|known| known.columns.iter().any(|known| known.name == column)))
    }

    /// The owner's table with this oid, at the engine's place in the stream.
    ///
    /// # Errors
    /// [`SchemaError`]
    pub async fn known_table(&self, oid: i64) -> Result<Option<Table>, SchemaError> {
        let mut guard = self.memory.lock().await;
        let memory = match guard.take() {
            Some(memory) => memory,
            None => self.recall()?,
        };
        Ok(guard.insert(memory).catalog.tables.get(&oid).cloned())
    }

    /// The owner's schema at the engine's place in the stream.
    ///
    /// # Errors
    /// [`SchemaError`]
    pub async fn known(&self) -> Result<Catalog, SchemaError> {
        let mut guard = self.memory.lock().await;
        let memory = match guard.take() {
            Some(memory) => memory,
            None => self.recall()?,
        };
        Ok(guard.insert(memory).catalog.clone())
    }

    /// Remembers the owner's catalog as it is now, and forgets what was known. To be called when a feed is set up, before its first message.
    ///
    /// # Errors
    /// [`SchemaError`]
    pub async fn baseline(&self, source: &Client) -> Result<(), SchemaError> {
        let memory = Memory { catalog: Catalog::load(source).await?, log: Vec::new() };
        self.store(&memory, Lsn::ZERO)?;
        *self.memory.lock().await = Some(memory);
        Ok(())
    }

    fn store(&self, memory: &Memory, lsn: Lsn) -> Result<(), SchemaError> {
        let document = serde_json::to_value(memory).map_err(|error| SchemaError::Catalog(error.to_string()))?;
        Ok(self.repository.store_schema(&self.database, &self.side, lsn, &document)?)
    }

    /// Stores the shadow's own catalog, if it is another than before, at the engine's place in the stream.
    pub(super) async fn keep_version(&self, shadow: &Catalog) -> Result<(), SchemaError> {
        {
            let mut kept = self.kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            if kept.as_ref() == Some(shadow) {
                return Ok(());
            }
            *kept = Some(shadow.clone());
        }
        let lsn = self.memory.lock().await.as_ref().and_then(|memory| memory.log.last()).map_or(Lsn::ZERO, |entry| entry.lsn);
        let memory = Memory { catalog: shadow.clone(), log: Vec::new() };
        let document = serde_json::to_value(&memory).map_err(|error| SchemaError::Catalog(error.to_string()))?;
        Ok(self.repository.store_schema(&self.database, &self.shadow, lsn, &document)?)
    }

    pub(super) fn recall(&self) -> Result<Memory, SchemaError> {
        match self.repository.newest_schema(&self.database, &self.side)? {
            Some((_, document)) => serde_json::from_value(document).map_err(|error| SchemaError::Catalog(error.to_string())),
            None => Ok(Memory::default()),
        }
    }

    /// Takes one DDL message at its place in the stream. `target` is the applier's connection, inside the open transaction in which the
    /// messages and rows before this one were applied. Given the same message again (after a crash or a rolled back transaction), the
    /// answer is the same and no second proposal is made.
    ///
    /// # Errors
    /// [`SchemaError`]: the shadow or the repository could not be asked; nothing was changed.
    pub async fn adapt(&self, ddl_json: &[u8], lsn: Lsn, target: &Client) -> Result<Adaptation, SchemaError> {
        let message = Message::parse(ddl_json);
        let mut guard = self.memory.lock().await;
        let mut memory = match guard.as_ref() {
            Some(memory) => memory.clone(),
            None => self.recall()?,
        };
        let again = memory.rewind(lsn);
        let target_catalog = Catalog::load(target).await?;
        let before = memory.catalog.clone();
        let steps = self.steps(&message, &mut memory.catalog, &target_catalog, target).await?;
        let reusable = {
            let mut waiting = self.again.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            waiting.extend(again);
            waiting.clone()
        };
        let (mut adaptation, proposals) = self.decide(steps, reusable)?;
        for table in message.recopy {
            if !adaptation.recopy.contains(&table) {
                adaptation.recopy.push(table);
            }
        }
        memory.log.push(LogEntry {
            lsn,
            before: Patch {
                tables: patch_map(&before.tables, &memory.catalog.tables),
                types: patch_map(&before.types, &memory.catalog.types),
                sequences: patch_map(&before.sequences, &memory.catalog.sequences),
                schemas: patch_map(&before.schemas, &memory.catalog.schemas),
                functions: patch_map(&before.functions, &memory.catalog.functions),
                default_privileges: (before.default_privileges != memory.catalog.default_privileges).then_some(before.default_privileges),
            },
            proposals,
        });
        let surplus = memory.log.len().saturating_sub(LOG_LENGTH_MAX);
        memory.log.drain(..surplus);
        self.store(&memory, lsn)?;
        *guard = Some(memory);
        Ok(adaptation)
    }

    /// Stores proposals and sorts them by what happens next.
    fn decide(&self, steps: Vec<Step>, mut reusable: BTreeSet<i64>) -> Result<(Adaptation, Vec<i64>), SchemaError> {
        let mut adaptation = Adaptation::default();
        let mut proposals = Vec::new();
        let decided = self.repository.proposals(Some(&self.database))?;
        for step in steps {
            let mut draft = step.planned.draft;
            experience::learn_from(&decided, &mut draft);
            let id = self.propose(&draft, &mut reusable)?;
            proposals.push(id);
            self.overtake(&draft, id)?;
            let case = policy::Case { confidence: draft.confidence, loses_data: draft.loses_data, has_sql: !draft.sql.is_empty() };
            if policy::automatic(case, self.threshold()) {
                adaptation.commit_alone |= draft.kind == "add_enum_value";
                if draft.outside_transaction {
                    adaptation.run_after.push((id, draft.sql));
                } else {
                    self.rebase_pending(&draft.sql)?;
                    adaptation.run_now.push((id, draft.sql));
                }
            } else if let (true, Some((schema, table))) = (draft.holds_table, &step.table) {
                adaptation.hold.push((id, schema.clone(), table.clone()));
            }
            if let (true, Some(table)) = (step.planned.recopy, step.table)
                && !adaptation.recopy.contains(&table)
            {
                adaptation.recopy.push(table);
            }
        }
        *self.again.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = reusable;
        Ok((adaptation, proposals))
    }

    fn propose(&self, draft: &ProposalDraft, reusable: &mut BTreeSet<i64>) -> Result<i64, SchemaError> {
        let stored: Vec<_> = reusable.iter().filter_map(|id| self.repository.proposal(*id).ok()).collect();
        // What people decided meanwhile may have moved the confidence.
        let same = stored.iter().find(|stored| {
            let stored = &stored.draft;
            (&stored.object, &stored.kind, &stored.change, &stored.sql) == (&draft.object, &draft.kind, &draft.change, &draft.sql)
        });
        // A later rename of the same transaction has revised it; that comes again, too.
        let revised = || stored.iter().find(|stored| (&stored.draft.kind, &stored.draft.change) == (&draft.kind, &draft.change));
        if let Some(found) = same.or_else(revised) {
            if found.draft != *draft {
                self.repository.revise(found.id, draft)?;
            }
            reusable.remove(&found.id);
            return Ok(found.id);
        }
        Ok(self.repository.propose(&self.database, &self.shadow, draft)?)
    }

    /// Closes what waits about the same column of the same table: the newer suggestion was made knowing the older one's place.
    fn overtake(&self, draft: &ProposalDraft, id: i64) -> Result<(), SchemaError> {
        for waiting in self.repository.proposals(Some(&self.database))? {
            if waiting.shadow == self.shadow && waiting.id < id && approval::overtaken(&waiting, draft) {
                let note = format!("a later change of the same column overtook it: see proposal {id}");
                self.repository.decide(waiting.id, ProposalState::Superseded, "policy", "", &note)?;
            }
        }
        Ok(())
    }

    /// A rename overtakes proposals that wait: they go on under the new name.
    ///
    /// # Errors
    /// [`SchemaError`]
    pub fn rebase_pending(&self, ran: &[String]) -> Result<(), SchemaError> {
        let renames: Vec<Rename> = ran.iter().filter_map(|sql| Rename::parse(sql)).collect();
        if renames.is_empty() {
            return Ok(());
        }
        for waiting in self.repository.proposals(Some(&self.database))? {
            if waiting.shadow != self.shadow || waiting.state != ProposalState::Pending {
                continue;
            }
            let Some(mut table) = parse_object(&waiting.draft.object) else { continue };
            let mut draft = waiting.draft.clone();
            for rename in &renames {
                for sql in draft.sql.iter_mut().chain(&mut draft.undo) {
                    *sql = rename.in_statement(&table, sql);
                }
                if let Some(name) = rename.of(&table) {
                    draft.object = quote::plain(&name.0, &name.1);
                    table = name;
                }
            }
            if draft != waiting.draft {
                self.repository.revise(waiting.id, &draft)?;
            }
        }
        Ok(())
    }
}

/// What differs between two stored versions, of one side or of both.
///
/// # Errors
/// [`SchemaError::Metadata`]: there is no such version; [`SchemaError::Catalog`]: it cannot be read.
pub fn version_difference(repository: &Repository, before: i64, after: i64) -> Result<Vec<super::DriftRow>, SchemaError> {
    let read = |id: i64| -> Result<Catalog, SchemaError> {
        let memory: Memory =
            serde_json::from_value(repository.schema_version(id)?).map_err(|error| SchemaError::Catalog(error.to_string()))?;
        Ok(memory.catalog)
    };
    Ok(super::drift::compare(&read(before)?, &read(after)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_memory_from_before_owners_and_functions_were_remembered_is_read() {
        let old = r#"{"catalog": {"tables": {}, "types": {"5": {"oid": 5, "schema": "s", "name": "t", "kind": "e"}}, "sequences": {},
            "schemas": {"7": {"oid": 7, "name": "s"}}}, "log": [{"lsn": "0/A", "before": {"tables": {}, "types": {}, "sequences": {},
            "schemas": {"7": null}}, "proposals": [1]}]}"#;
        let lsn = serde_json::to_value(Lsn(10)).unwrap().to_string();
        let mut memory: Memory = serde_json::from_str(&old.replace("\"0/A\"", &lsn)).unwrap();
        assert!(memory.catalog.schemas[&7].owner.is_empty() && memory.catalog.functions.is_empty());
        assert_eq!(memory.rewind(Lsn(10)), [1]);
    }

    #[test]
    fn a_message_seen_again_finds_the_memory_as_it_was() {
        let table = |name: &str| Table { oid: 1, schema: "public".into(), name: name.into(), ..Table::default() };
        let mut memory = Memory::default();
        memory.catalog.tables.insert(1, table("c"));
        memory.log.push(LogEntry {
            lsn: Lsn(10),
            before: Patch { tables: BTreeMap::from([(1, Some(table("a")))]), ..Patch::default() },
            proposals: vec![7],
        });
        memory.log.push(LogEntry {
            lsn: Lsn(5),
            before: Patch { tables: BTreeMap::from([(1, Some(table("b"))), (2, None)]), ..Patch::default() },
            proposals: vec![8],
        });
        assert_eq!(memory.rewind(Lsn(99)), Vec::<i64>::new());
        assert_eq!(memory.rewind(Lsn(10)), [7, 8]);
        assert_eq!(memory.catalog.tables[&1].name, "a");
        assert!(memory.log.is_empty());
    }
}
