//! The engine at its place in the stream: one message in, statements and proposals out.

use super::{
    SchemaError,
    catalog::{Catalog, Table},
    diff::{Change, diff},
    message::{Dropped, Message},
    objects::{self, Presence},
    plan::{Planned, TablePlanner, TargetFacts, ddl, draft},
    policy, quote,
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
struct Patch {
    tables: BTreeMap<i64, Option<Table>>,
    types: BTreeMap<i64, Option<super::catalog::UserType>>,
    sequences: BTreeMap<i64, Option<super::catalog::Sequence>>,
    schemas: BTreeMap<i64, Option<super::catalog::Namespace>>,
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
    pub(super) repository: Repository,
    auto_approve: Arc<arc_swap::ArcSwap<f64>>,
    pub(super) memory: tokio::sync::Mutex<Option<Memory>>,
    /// Proposals of a transaction that is being delivered again, to be used again.
    again: std::sync::Mutex<BTreeSet<i64>>,
}

/// A suggestion and the owner's table (schema, name) whose rows it may hold back.
struct Step {
    planned: Planned,
    table: Option<(String, String)>,
}

impl Adapter {
    /// An engine for `shadow` of `database`. `auto_approve` is read anew for every message.
    pub fn new(database: String, shadow: String, repository: Repository, auto_approve: Arc<arc_swap::ArcSwap<f64>>) -> Self {
        Adapter { database, shadow, repository, auto_approve, memory: tokio::sync::Mutex::default(), again: std::sync::Mutex::default() }
    }

    /// The policy's threshold now.
    pub(super) fn threshold(&self) -> f64 {
        **self.auto_approve.load()
    }

    /// Where the memory is kept in the repository: its place in the stream is this shadow's own.
    fn side(&self) -> String {
        format!("source@{}", self.shadow)
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
        Ok(self.repository.store_schema(&self.database, &self.side(), lsn, &document)?)
    }

    pub(super) fn recall(&self) -> Result<Memory, SchemaError> {
        match self.repository.newest_schema(&self.database, &self.side())? {
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
        let (adaptation, proposals) = self.decide(steps, reusable)?;
        memory.log.push(LogEntry {
            lsn,
            before: Patch {
                tables: patch_map(&before.tables, &memory.catalog.tables),
                types: patch_map(&before.types, &memory.catalog.types),
                sequences: patch_map(&before.sequences, &memory.catalog.sequences),
                schemas: patch_map(&before.schemas, &memory.catalog.schemas),
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
        for step in steps {
            let draft = step.planned.draft;
            let id = self.propose(&draft, &mut reusable)?;
            proposals.push(id);
            let case = policy::Case { confidence: draft.confidence, loses_data: draft.loses_data, has_sql: !draft.sql.is_empty() };
            if policy::automatic(case, self.threshold()) {
                adaptation.commit_alone |= draft.kind == "add_enum_value";
                if draft.outside_transaction {
                    adaptation.run_after.push((id, draft.sql));
                } else {
                    if draft.sql.iter().any(|sql| renamed(sql).is_some()) {
                        self.rebase_pending(&draft)?;
                    }
                    adaptation.run_now.push((id, draft.sql));
                }
            } else if let (true, Some((schema, table))) = (draft.holds_table, &step.table) {
                adaptation.hold.push((id, schema.clone(), table.clone()));
            }
            if let (true, Some(table)) = (step.planned.recopy, step.table) {
                if !adaptation.recopy.contains(&table) {
                    adaptation.recopy.push(table);
                }
            }
        }
        *self.again.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = reusable;
        Ok((adaptation, proposals))
    }

    fn propose(&self, draft: &ProposalDraft, reusable: &mut BTreeSet<i64>) -> Result<i64, SchemaError> {
        for id in reusable.iter().copied().collect::<Vec<_>>() {
            if self.repository.proposal(id).is_ok_and(|stored| stored.draft == *draft) {
                reusable.remove(&id);
                return Ok(id);
            }
        }
        Ok(self.repository.propose(&self.database, &self.shadow, draft)?)
    }

    /// A rename overtakes proposals that wait: they are made anew under the new name. Every name in our SQL is quoted, so replacing is exact.
    fn rebase_pending(&self, rename: &ProposalDraft) -> Result<(), SchemaError> {
        let replacements: Vec<(String, String)> = rename.sql.iter().filter_map(|sql| renamed(sql)).collect();
        for waiting in self.repository.proposals(Some(&self.database))? {
            if waiting.shadow != self.shadow || waiting.state != ProposalState::Pending || waiting.draft.holds_table {
                continue;
            }
            let apply = |text: &String| replacements.iter().fold(text.clone(), |text, (from, to)| text.replace(from.as_str(), to));
            let same_table = waiting.draft.object == rename.object;
            let touched = |text: &String| same_table && apply(text) != *text;
            if !waiting.draft.sql.iter().any(touched) {
                continue;
            }
            let draft = ProposalDraft {
                sql: waiting.draft.sql.iter().map(apply).collect(),
                undo: waiting.draft.undo.iter().map(apply).collect(),
                ..waiting.draft.clone()
            };
            let id = self.repository.propose(&self.database, &self.shadow, &draft)?;
            self.repository.decide(waiting.id, ProposalState::Superseded, "policy", "", &format!("a rename overtook it: see proposal {id}"))?;
        }
        Ok(())
    }

    /// Everything the message asks for, in order; brings the memory up to date.
    async fn steps(&self, message: &Message, known: &mut Catalog, target_catalog: &Catalog, target: &Client) -> Result<Vec<Step>, SchemaError> {
        let mut steps = Vec::new();
        let mut plain = |planned: Vec<Planned>| steps.extend(planned.into_iter().map(|planned| Step { planned, table: None }));
        if message.event == "capture_failed" {
            let change = format!("{} on the owner could not be captured: {}", message.tag, message.error);
            plain(vec![objects::manual("(unknown)", "capture_failed", &change)]);
            return Ok(steps);
        }
        for schema in &message.schemas {
            plain(objects::schema(known.schemas.get(&schema.oid), schema, target_catalog));
            if let Some(before) = known.schemas.get(&schema.oid).map(|before| before.name.clone()) {
                known.rename_schema(&before, &schema.name);
            }
            known.schemas.insert(schema.oid, schema.clone());
        }
        for extension in &message.extensions {
            let available = target
                .query_opt("SELECT FROM pg_catalog.pg_available_extensions WHERE name = $1", &[&extension.name])
                .await
                .map_err(|error| SchemaError::server("ask the shadow for its extensions", error))?;
            plain(objects::extension(extension, available.is_some()));
        }
        for item in &message.types {
            plain(objects::user_type(known.types.get(&item.oid), item, target_catalog));
            known.types.insert(item.oid, item.clone());
        }
        let mut sequences = Vec::new();
        for item in &message.sequences {
            sequences.extend(objects::sequence(known.sequences.get(&item.oid), item, target_catalog).into_iter().map(|planned| (item, planned)));
            known.sequences.insert(item.oid, item.clone());
        }
        let first_table = steps.len();
        steps.extend(self.tables(message, known, target_catalog, target).await?);
        // A serial column's sequence comes with its column: created before, owned after.
        for (sequence, planned) in sequences.into_iter().rev() {
            let owner = sequence.owned_by.as_deref();
            let host = steps.iter_mut().skip(first_table).find(|step| {
                let name = step.table.as_ref().map(|(schema, table)| format!("{}.", quote::qualified(schema, table)));
                let owned = owner.map(unquoted).zip(name.map(|name| unquoted(&name))).is_some_and(|(owner, table)| owner.starts_with(&table));
                owned && matches!(step.planned.draft.kind.as_str(), "create_table" | "add_column")
            });
            match (host, planned.draft.kind.as_str()) {
                (Some(host), "create_sequence") => {
                    host.planned.draft.sql.insert(0, ddl::create_sequence(sequence));
                    host.planned.draft.sql.push(ddl::own_sequence(sequence));
                }
                _ => steps.insert(first_table, Step { planned, table: None }),
            }
        }
        let mut plain = |planned: Vec<Planned>| steps.extend(planned.into_iter().map(|planned| Step { planned, table: None }));
        for function in &message.functions {
            plain(objects::function(function));
        }
        for command in message.commands.iter().filter(|command| command.tag == "REFRESH MATERIALIZED VIEW") {
            let sql = vec![format!("REFRESH MATERIALIZED VIEW {}", command.identity)];
            let change = format!("{} was refreshed on the owner", command.identity);
            plain(vec![draft(&command.identity, "refresh", change, sql, 0.96, "computed from the shadow's own rows").into()]);
        }
        plain(objects::untranslated(&message.commands));
        for object in message.dropped.iter().filter(|object| object.sub == 0 && (object.original || object.normal)) {
            steps.extend(self.dropped(object, message, known, target_catalog, target).await?);
        }
        Ok(steps)
    }

    /// The relations of a message: parents first, and what a partition only inherits is left to its parent.
    async fn tables(&self, message: &Message, known: &mut Catalog, target_catalog: &Catalog, target: &Client) -> Result<Vec<Step>, SchemaError> {
        let mut steps = Vec::new();
        let mut order: Vec<&Table> = message.relations.iter().collect();
        let depth = |table: &Table| {
            let mut depth = 0;
            let mut parent = table.parent;
            while let Some(oid) = parent.filter(|_| depth < 64) {
                depth += 1;
                parent = message.relations.iter().find(|other| other.oid == oid).and_then(|other| other.parent);
            }
            depth
        };
        order.sort_by_key(|table| (depth(table), table.oid));
        let mut done: BTreeMap<i64, Vec<String>> = BTreeMap::new();
        let source_after = {
            let mut after = known.clone();
            after.tables.extend(message.relations.iter().map(|table| (table.oid, table.clone())));
            after
        };
        for table in order {
            let key = Some((table.schema.clone(), table.name.clone()));
            let Some(before) = known.tables.get(&table.oid).cloned() else {
                steps.extend(self.created(table, message, &source_after, target_catalog).into_iter().map(|planned| Step { planned, table: key.clone() }));
                known.tables.insert(table.oid, table.clone());
                continue;
            };
            let mut changes = diff(&before, table);
            if let Some(parents) = table.parent.and_then(|parent| done.get(&parent)) {
                changes.retain(|change| change_key(change).is_none_or(|key| !parents.contains(&key)));
            }
            done.insert(table.oid, changes.iter().filter_map(change_key).collect());
            let lost: Vec<Table> = known
                .tables
                .values()
                .filter(|child| child.parent == Some(table.oid) && !table.children.contains(&child.oid))
                .filter(|child| !message.relations.iter().any(|other| other.oid == child.oid))
                .cloned()
                .collect();
            for child in lost {
                let alone = Table { parent: None, parent_name: None, is_partition: false, bound: None, ..child.clone() };
                let changes = [Change::Detach { parent: child.parent_name.clone().unwrap_or_default() }];
                let planned = self.planned(&child, &alone, &changes, message, &source_after, target_catalog, target).await?;
                steps.extend(planned.into_iter().map(|planned| Step { planned, table: Some((child.schema.clone(), child.name.clone())) }));
                known.tables.insert(child.oid, alone);
            }
            known.tables.insert(table.oid, table.clone());
            if changes.is_empty() {
                continue;
            }
            self.supersede(&before, &changes)?;
            let planned = self.planned(&before, table, &changes, message, &source_after, target_catalog, target).await?;
            steps.extend(planned.into_iter().map(|planned| Step { planned, table: key.clone() }));
        }
        Ok(steps)
    }

    /// A later type change or drop of a column makes an earlier, undecided type change of it pointless. What holds rows back stays: only a
    /// person lets them go.
    fn supersede(&self, before: &Table, changes: &[Change]) -> Result<(), SchemaError> {
        for change in changes {
            let column = match change {
                Change::AlterType { old, .. } => &old.name,
                Change::DropColumn(column) => &column.name,
                _ => continue,
            };
            let marker = format!("ALTER COLUMN {} TYPE ", quote::ident(column));
            for waiting in self.repository.proposals(Some(&self.database))? {
                let same = waiting.shadow == self.shadow && waiting.draft.kind == "alter_type" && waiting.draft.object == before.plain();
                let open = waiting.state == ProposalState::Pending && !waiting.draft.holds_table;
                if same && open && waiting.draft.sql.iter().any(|sql| sql.contains(&marker)) {
                    self.repository.decide(waiting.id, ProposalState::Superseded, "policy", "", "the owner changed the column again")?;
                }
            }
        }
        Ok(())
    }

    /// Plans `changes` against the table of the other side.
    #[allow(clippy::too_many_arguments)]
    async fn planned(
        &self,
        before: &Table,
        now: &Table,
        changes: &[Change],
        message: &Message,
        source: &Catalog,
        target_catalog: &Catalog,
        target: &Client,
    ) -> Result<Vec<Planned>, SchemaError> {
        let found = target_catalog.table(&before.schema, &before.name).or_else(|| target_catalog.table(&now.schema, &before.name));
        let Some(found) = found.or_else(|| target_catalog.table(&now.schema, &now.name)) else {
            let mut draft = draft(
                &now.plain(),
                "missing_table",
                format!("table {} changed on the owner and does not exist on the shadow", now.plain()),
                if now.is_view() { ddl::create_view(now, false) } else { ddl::create_table(now) },
                0.5,
                "left out on purpose, or an earlier proposal waits",
            );
            draft.if_rejected = "the table stays away from the shadow, its rows are not applied there".into();
            return Ok(vec![Planned { draft, recopy: now.holds_rows() }]);
        };
        let facts = self.facts(found, changes, target).await?;
        let family: Vec<&Table> = message.relations.iter().filter(|other| other.oid != now.oid).collect();
        let mut rewritten = 0;
        for one in &message.rewritten {
            let descendant = family.iter().any(|member| member.oid == one.oid && is_below(member, now.oid, &family));
            if one.oid == now.oid || descendant {
                rewritten |= one.reason;
            }
        }
        let mut planner = TablePlanner {
            old: before,
            new: now,
            target: found.clone(),
            catalog: target_catalog,
            source,
            family: &family,
            rewritten,
            plain: message.plain,
            facts: &facts,
            auto_approve: self.threshold(),
        };
        Ok(planner.plan(changes))
    }

    async fn facts(&self, table: &Table, changes: &[Change], target: &Client) -> Result<TargetFacts, SchemaError> {
        let mut facts = TargetFacts::default();
        let failed = |error| SchemaError::server("look at the shadow's table", error);
        if table.holds_rows() && changes.iter().any(|change| matches!(change, Change::AddColumn(column) if column.not_null)) {
            let query = format!("SELECT EXISTS (SELECT FROM {})", table.qualified());
            facts.has_rows = target.query_one(&query, &[]).await.map_err(failed)?.get(0);
        }
        if changes.iter().any(|change| matches!(change, Change::AddColumn(_))) {
            let marker = format!("ALTER TABLE {} DROP COLUMN ", table.qualified());
            let open = |state| matches!(state, ProposalState::Pending | ProposalState::Rejected | ProposalState::Failed);
            for one in self.repository.proposals(Some(&self.database))? {
                if one.shadow == self.shadow && one.draft.kind == "drop_column" && open(one.state) {
                    let names = one.draft.sql.iter().filter_map(|sql| sql.strip_prefix(&marker));
                    facts.left_behind.extend(names.map(|name| name.trim_matches('"').replace("\"\"", "\"")));
                }
            }
        }
        if changes.iter().any(|change| matches!(change, Change::AlterType { .. } | Change::DropColumn(_))) {
            let query = format!(
                "SELECT DISTINCT a.attname::text, pg_catalog.pg_describe_object(d.classid, d.objid, 0)
                 FROM pg_catalog.pg_depend d
                 JOIN pg_catalog.pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
                 WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = {}::oid AND d.refobjsubid > 0
                   AND d.classid IN ('pg_rewrite'::regclass, 'pg_policy'::regclass)",
                table.oid
            );
            facts.dependents = target.query(&query, &[]).await.map_err(failed)?.iter().map(|row| (row.get(0), row.get(1))).collect();
        }
        Ok(facts)
    }

    /// A relation that was not there before.
    fn created(&self, table: &Table, message: &Message, source: &Catalog, target_catalog: &Catalog) -> Vec<Planned> {
        let object = table.plain();
        let filled = matches!(message.tag.as_str(), "CREATE TABLE AS" | "SELECT INTO");
        if !matches!(table.kind.as_str(), "r" | "p" | "v" | "m") {
            return vec![objects::manual(&object, "create_foreign_table", &format!("foreign table {object} was created on the owner"))];
        }
        let mut statements = Vec::new();
        let mut why = "nothing is touched".to_owned();
        let found = target_catalog.table(&table.schema, &table.name);
        if let Some(found) = found {
            if same_shape(found, table) {
                return vec![];
            }
            // A table of that name that the owner dropped steps aside; one that somebody made there is a question.
            let pending_drop = self.repository.proposals(Some(&self.database)).is_ok_and(|all| {
                all.iter().any(|one| one.shadow == self.shadow && one.draft.kind == "drop_table" && one.draft.object == object && one.state == ProposalState::Pending)
            });
            if table.is_view() && found.kind == table.kind {
                statements.clear();
            } else if pending_drop && found.holds_rows() {
                let name = super::plan::aside_name(&table.name, |candidate| target_catalog.table(&table.schema, candidate).is_some());
                statements.push(format!("ALTER TABLE {} RENAME TO {}", found.qualified(), quote::ident(&name)));
                why = format!("the shadow's old table steps aside as {name}, nothing is lost");
            } else {
                let mut draft = draft(
                    &object,
                    "create_table",
                    format!("table {object} was created on the owner; the shadow already has another one"),
                    vec![],
                    0.4,
                    "mapped on purpose, or in the way",
                );
                draft.holds_table = true;
                draft.alternatives = vec![format!("rename the shadow's table, then: {}", ddl::create_table(table).join("; "))];
                return vec![draft.into()];
            }
        }
        let (kind, words) = if table.is_view() { ("create_view", "view") } else { ("create_table", "table") };
        statements.extend(if table.is_view() { ddl::create_view(table, found.is_some()) } else { ddl::create_table(table) });
        let confidence = if table.is_view() { 0.97 } else { 0.99 };
        let mut draft = draft(&object, kind, format!("{words} {object} was created on the owner"), statements, confidence, &why);
        draft.undo = vec![format!("DROP {} {}", if table.kind == "m" { "MATERIALIZED VIEW".into() } else { words.to_uppercase() }, table.qualified())];
        draft.holds_table = table.holds_rows();
        draft.if_rejected = format!("the {words} stays away from the shadow");
        let _ = source;
        vec![Planned { draft, recopy: filled && table.holds_rows() }]
    }

    /// An object that is gone on the owner.
    async fn dropped(
        &self,
        object: &Dropped,
        message: &Message,
        known: &mut Catalog,
        target_catalog: &Catalog,
        target: &Client,
    ) -> Result<Vec<Step>, SchemaError> {
        let plain = |planned: Vec<Planned>| planned.into_iter().map(|planned| Step { planned, table: None }).collect();
        match object.kind.as_str() {
            "table" | "foreign table" | "partitioned table" => {
                let before = known.tables.remove(&object.oid);
                let (schema, name) = before.as_ref().map_or((object.schema.as_str(), object.name.as_str()), |table| (&table.schema, &table.name));
                let Some(found) = target_catalog.table(schema, name) else { return Ok(vec![]) };
                let mut steps = Vec::new();
                if let (true, Some(parent)) = (found.is_partition, &found.parent_name) {
                    let bound = found.bound.clone().unwrap_or_default();
                    let sql = vec![format!("ALTER TABLE {parent} DETACH PARTITION {}", found.qualified())];
                    let change = format!("partition {} was dropped on the owner", found.plain());
                    let mut draft = draft(&found.plain(), "detach_partition", change, sql, 0.97, "its rows leave the parent and are kept aside");
                    draft.undo = vec![format!("ALTER TABLE {parent} ATTACH PARTITION {} {bound}", found.qualified())];
                    steps.push(Step { planned: draft.into(), table: None });
                }
                let mut draft = draft(
                    &found.plain(),
                    "drop_table",
                    format!("table {} was dropped on the owner", found.plain()),
                    vec![format!("DROP TABLE {}", found.qualified())],
                    0.9,
                    "dropping it destroys the shadow's rows: a person decides",
                );
                draft.loses_data = true;
                draft.alternatives = vec!["REJECT: the table stays on the shadow and gets no more rows".into()];
                draft.if_rejected = "the table stays on the shadow and gets no more rows".into();
                steps.push(Step { planned: draft.into(), table: None });
                Ok(steps)
            }
            "index" => {
                let owner = known.tables.values().find(|table| table.indexes.iter().any(|index| index.oid == object.oid)).cloned();
                let Some(before) = owner else { return Ok(vec![]) };
                let mut now = before.clone();
                now.indexes.retain(|index| index.oid != object.oid);
                let changes = diff(&before, &now);
                let source = known.clone();
                let planned = self.planned(&before, &now, &changes, message, &source, target_catalog, target).await?;
                known.tables.insert(now.oid, now);
                Ok(plain(planned.into_iter().filter(|planned| planned.draft.kind == "drop_index").collect()))
            }
            "view" | "materialized view" => {
                known.tables.remove(&object.oid);
                let found = target_catalog.table(&object.schema, &object.name).is_some_and(Table::is_view);
                Ok(plain(objects::dropped(object, if found { Presence::Free } else { Presence::Absent })))
            }
            "type" | "domain" => {
                known.types.remove(&object.oid);
                let query = "SELECT t.oid IS NOT NULL, EXISTS (SELECT FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_class c ON c.oid = a.attrelid
                     WHERE NOT a.attisdropped AND c.relkind <> 'c' AND a.atttypid IN (t.oid, (SELECT typarray FROM pg_catalog.pg_type WHERE oid = t.oid)))
                     FROM (SELECT pg_catalog.to_regtype($1)::oid AS oid) t";
                let row = target
                    .query_one(query, &[&object.identity])
                    .await
                    .map_err(|error| SchemaError::server("ask the shadow whether a type is used", error))?;
                let presence = match (row.get(0), row.get(1)) {
                    (false, _) => Presence::Absent,
                    (true, false) => Presence::Free,
                    (true, true) => Presence::Used,
                };
                Ok(plain(objects::dropped(object, presence)))
            }
            "schema" => {
                known.schemas.remove(&object.oid);
                let presence = match target_catalog.schemas.values().find(|schema| quote::ident(&schema.name).trim_matches('"') == object.identity.trim_matches('"')) {
                    None => Presence::Absent,
                    Some(schema) if target_catalog.tables.values().any(|table| table.schema == schema.name) => Presence::Used,
                    Some(_) => Presence::Free,
                };
                Ok(plain(objects::dropped(object, presence)))
            }
            "sequence" => {
                known.sequences.remove(&object.oid);
                let found = target_catalog.sequence(&object.schema, &object.name).is_some();
                Ok(plain(objects::dropped(object, if found { Presence::Free } else { Presence::Absent })))
            }
            // Described by the table that they belong to.
            "trigger" | "table constraint" | "default value" | "table column" | "domain constraint" => Ok(vec![]),
            // A view's own rule and row types go with it.
            "rule" | "composite type" if !object.original => Ok(vec![]),
            _ if !object.original => Ok(vec![]),
            _ => Ok(plain(objects::dropped(object, Presence::Free))),
        }
    }
}

/// `ALTER TABLE x RENAME …` as (from, to), both spelled as in our other statements.
fn renamed(sql: &str) -> Option<(String, String)> {
    let rest = sql.strip_prefix("ALTER TABLE ")?;
    if let Some((table, names)) = rest.split_once(" RENAME COLUMN ") {
        let (from, to) = names.split_once(" TO ")?;
        return Some((format!("ALTER TABLE {table} DROP COLUMN {from}"), format!("ALTER TABLE {table} DROP COLUMN {to}")));
    }
    if let Some((table, to)) = rest.split_once(" RENAME TO ") {
        let schema = table.split_once("\".\"").map(|(schema, _)| format!("{schema}\""))?;
        return Some((table.to_owned(), format!("{schema}.{to}")));
    }
    let (table, schema) = rest.split_once(" SET SCHEMA ")?;
    let name = table.split_once("\".\"").map(|(_, name)| format!("\"{name}"))?;
    Some((table.to_owned(), format!("{schema}.{name}")))
}

/// Names without quotes, for comparing the server's spelling with ours.
fn unquoted(name: &str) -> String {
    name.replace('"', "")
}

/// `member` is a descendant of `ancestor`.
fn is_below(member: &Table, ancestor: i64, family: &[&Table]) -> bool {
    let mut parent = member.parent;
    for _ in 0..64 {
        match parent {
            Some(oid) if oid == ancestor => return true,
            Some(oid) => parent = family.iter().find(|other| other.oid == oid).and_then(|other| other.parent),
            None => return false,
        }
    }
    false
}

/// What makes a partition's change the same as its parent's.
fn change_key(change: &Change) -> Option<String> {
    Some(match change {
        Change::RenameColumn { from, to, .. } => format!("rename {from} {to}"),
        Change::DropColumn(column) => format!("drop {}", column.name),
        Change::AddColumn(column) => format!("add {}", column.name),
        Change::AlterType { new, .. } => format!("type {}", new.name),
        Change::SetDefault { column } | Change::DropDefault { column } => format!("default {}", column.name),
        Change::SetNotNull { column } | Change::DropNotNull { column } => format!("not null {}", column.name),
        Change::DropExpression { column } => format!("expression {}", column.name),
        Change::Identity { column, .. } => format!("identity {}", column.name),
        _ => return None,
    })
}

/// The same columns with the same types, in any order, or the same view.
fn same_shape(one: &Table, other: &Table) -> bool {
    let columns = |table: &Table| {
        let mut list: Vec<_> = table.columns.iter().map(|column| (column.name.clone(), column.type_name.clone())).collect();
        list.sort();
        list
    };
    one.kind == other.kind && columns(one) == columns(other) && (!one.is_view() || one.definition == other.definition)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renames_are_read_from_our_own_statements() {
        for (sql, from, to) in [
            (r#"ALTER TABLE "public"."a" RENAME TO "b""#, r#""public"."a""#, r#""public"."b""#),
            (r#"ALTER TABLE "s"."a" SET SCHEMA "z""#, r#""s"."a""#, r#""z"."a""#),
            (r#"ALTER TABLE "s"."a" RENAME COLUMN "x" TO "y""#, r#"ALTER TABLE "s"."a" DROP COLUMN "x""#, r#"ALTER TABLE "s"."a" DROP COLUMN "y""#),
        ] {
            assert_eq!(renamed(sql), Some((from.to_owned(), to.to_owned())));
        }
        assert_eq!(renamed("ALTER INDEX a RENAME TO b"), None);
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
