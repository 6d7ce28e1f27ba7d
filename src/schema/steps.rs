//! One message taken apart: what each of its facts asks of the other side, in an order in which it can be carried out.

use super::{
    Adapter, SchemaError,
    access::{self, Access, Roles},
    adapter::Step,
    catalog::{Catalog, Table},
    diff::{Change, diff},
    foresee::probe,
    mapping,
    message::{Dropped, Message},
    objects::{self, Presence},
    plan::{Planned, TablePlanner, TargetFacts, ddl, draft},
    quote,
};
use crate::metadata::ProposalState;
use std::collections::BTreeMap;
use tokio_postgres::Client;

/// From here on a type change cannot fail on rows: nobody needs to be asked.
const CONFIDENT: f64 = 0.97;
/// The suggestion would be refused by rows that were counted: the owner must have used another expression.
const REFUSED: f64 = 0.2;

impl Adapter {
    /// Everything the message asks for, in order; brings the memory up to date.
    pub(super) async fn steps(
        &self,
        message: &Message,
        known: &mut Catalog,
        target_catalog: &Catalog,
        target: &Client,
    ) -> Result<Vec<Step>, SchemaError> {
        let mut steps = Vec::new();
        let mut plain = |planned: Vec<Planned>| steps.extend(planned.into_iter().map(|planned| Step { planned, table: None }));
        if message.event == "capture_failed" {
            let change = format!("{} on the owner could not be captured: {}", message.tag, message.error);
            plain(vec![objects::manual("(unknown)", "capture_failed", &change)]);
            return Ok(steps);
        }
        let roles = &access::roles(target).await?;
        for schema in &message.schemas {
            plain(objects::schema(known.schemas.get(&schema.oid), schema, target_catalog, roles));
            if let Some(before) = known.schemas.get(&schema.oid).map(|before| before.name.clone()) {
                known.rename_schema(&before, &schema.name);
            }
            known.schemas.insert(schema.oid, schema.clone());
        }
        let target_catalog = &with_schemas(target_catalog, message);
        for extension in &message.extensions {
            let available = target
                .query_opt("SELECT FROM pg_catalog.pg_available_extensions WHERE name = $1", &[&extension.name])
                .await
                .map_err(|error| SchemaError::server("ask the shadow for its extensions", error))?;
            plain(objects::extension(extension, available.is_some()));
        }
        for item in &message.types {
            plain(objects::user_type(known.types.get(&item.oid), item, target_catalog, roles));
            known.types.insert(item.oid, item.clone());
        }
        let mut sequences = Vec::new();
        for item in &message.sequences {
            let planned = objects::sequence(known.sequences.get(&item.oid), item, target_catalog, roles);
            sequences.extend(planned.into_iter().map(|planned| (item, planned)));
            known.sequences.insert(item.oid, item.clone());
        }
        let first_table = steps.len();
        steps.extend(self.tables(message, known, target_catalog, target, roles).await?);
        // A serial column's sequence comes with its column: created before, owned after.
        for (sequence, planned) in sequences.into_iter().rev() {
            let owner = sequence.owned_by.as_deref();
            let host = steps.iter_mut().skip(first_table).find(|step| {
                let name = step.table.as_ref().map(|(schema, table)| format!("{}.", quote::qualified(schema, table)));
                let owned =
                    owner.map(unquoted).zip(name.map(|name| unquoted(&name))).is_some_and(|(owner, table)| owner.starts_with(&table));
                owned && matches!(step.planned.draft.kind.as_str(), "create_table" | "add_column")
            });
            match (host, planned.draft.kind.as_str()) {
                (Some(host), "create_sequence") => {
                    host.planned.draft.sql.insert(0, ddl::create_sequence(sequence));
                    // before the table changes hands: its sequences go along
                    let statements = &mut host.planned.draft.sql;
                    let at = statements.iter().position(|sql| sql.starts_with("DO ")).unwrap_or(statements.len());
                    statements.splice(at..at, ddl::own_sequence(sequence));
                    statements.extend(Access::sequence(sequence).of_new());
                }
                // Behind the table's own: it may name a role for the first time.
                (_, "alter_access" | access::MISSING_ROLE) => steps.push(Step { planned, table: None }),
                _ => steps.insert(first_table, Step { planned, table: None }),
            }
        }
        let mut plain = |planned: Vec<Planned>| steps.extend(planned.into_iter().map(|planned| Step { planned, table: None }));
        for function in &message.functions {
            let oid = function.routine.oid;
            let mut tags = message.commands.iter().filter(|command| command.class == "pg_proc" && command.oid == oid).peekable();
            let granted = tags.peek().is_some() && tags.all(|command| is_grant(&command.tag));
            let before = known.functions.insert(oid, function.routine.clone());
            let aggregate = function.definition.is_none() && before.as_ref().is_some_and(|before| *before != function.routine);
            plain(objects::function(before.as_ref(), function, granted || aggregate, target_catalog, roles));
        }
        if let Some(now) = &message.default_privileges {
            plain(access::defaults(&known.default_privileges, now, roles));
            known.default_privileges.clone_from(now);
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
    async fn tables(
        &self,
        message: &Message,
        known: &mut Catalog,
        target_catalog: &Catalog,
        target: &Client,
        roles: &Roles,
    ) -> Result<Vec<Step>, SchemaError> {
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
                let mut planned = self.created(table, message, target_catalog);
                if planned.iter().any(|one| one.draft.kind.starts_with("create_") && !one.draft.sql.is_empty()) {
                    planned.extend(Access::table(table).missing(roles));
                }
                steps.extend(planned.into_iter().map(|planned| Step { planned, table: key.clone() }));
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
            let access: Vec<_> = self.table_access(&before, table, target_catalog, roles);
            if changes.is_empty() {
                steps.extend(access.into_iter().map(|planned| Step { planned, table: None }));
                continue;
            }
            self.supersede(&before, &changes)?;
            if let Some(place) = self.rules.load().place(self.back, &before.schema, &before.name) {
                if let Some(there) = target_catalog.table(&place.schema, &place.table).filter(|_| !place.left_out) {
                    let questions = mapping::questions(&before, table, &changes, place, there);
                    steps.extend(questions.into_iter().map(|planned| Step { planned, table: key.clone() }));
                }
            } else {
                let planned = self.planned(&before, table, &changes, message, &source_after, target_catalog, target).await?;
                steps.extend(planned.into_iter().map(|planned| Step { planned, table: key.clone() }));
            }
            steps.extend(access.into_iter().map(|planned| Step { planned, table: None }));
        }
        Ok(steps)
    }

    /// Owner and privileges of a table that was there before, under the name that it has on the other side once its other changes are made.
    fn table_access(&self, before: &Table, now: &Table, target_catalog: &Catalog, roles: &Roles) -> Vec<Planned> {
        if (&before.owner, &before.grants) == (&now.owner, &now.grants) {
            return vec![];
        }
        // Privileges on columns go along with their names, and away with them.
        let mut old = before.clone();
        old.grants.retain_mut(|grant| {
            let Some(name) = &grant.column else { return true };
            let column = before.column(name).and_then(|column| now.column_by_num(column.num));
            grant.column = column.map(|column| column.name.clone());
            grant.column.is_some()
        });
        let mut new = now.clone();
        let rules = self.rules.load();
        let (schema, name) = match rules.place(self.back, &before.schema, &before.name) {
            Some(place) if place.left_out => return vec![],
            Some(place) => {
                for table in [&mut old, &mut new] {
                    table.grants.retain_mut(|grant| match &grant.column {
                        None => true,
                        Some(column) => {
                            grant.column = place.column(column).name.map(str::to_owned);
                            grant.column.is_some()
                        }
                    });
                }
                (place.schema.as_str(), place.table.as_str())
            }
            None => (now.schema.as_str(), now.name.as_str()),
        };
        let there = [(before.schema.as_str(), before.name.as_str()), (now.schema.as_str(), before.name.as_str()), (schema, name)];
        if !there.iter().any(|(schema, name)| target_catalog.table(schema, name).is_some()) {
            return vec![];
        }
        Access::table_as(&new, schema, name).changed(&Access::table_as(&old, schema, name), roles)
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
        let mut planned = planner.plan(changes);
        for one in planned.iter_mut().filter(|one| one.draft.kind == "alter_type" && one.draft.confidence < CONFIDENT) {
            if let Some(probe) = probe::inside_transaction(target, found, &one.draft.sql).await.filter(|probe| probe.rows > 0) {
                one.draft.why = format!("{}; {}", one.draft.why, probe.words());
                if probe.failing > 0 {
                    one.draft.confidence = one.draft.confidence.min(REFUSED);
                }
            }
        }
        Ok(planned)
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
    fn created(&self, table: &Table, message: &Message, target_catalog: &Catalog) -> Vec<Planned> {
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
                all.iter().any(|one| {
                    one.shadow == self.shadow
                        && one.draft.kind == "drop_table"
                        && one.draft.object == object
                        && one.state == ProposalState::Pending
                })
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
        draft.undo = vec![format!(
            "DROP {} {}",
            if table.kind == "m" { "MATERIALIZED VIEW".into() } else { words.to_uppercase() },
            table.qualified()
        )];
        draft.holds_table = table.holds_rows();
        draft.if_rejected = format!("the {words} stays away from the shadow");
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
                let (schema, name) =
                    before.as_ref().map_or((object.schema.as_str(), object.name.as_str()), |table| (&table.schema, &table.name));
                let rules = self.rules.load();
                let found = match rules.place(self.back, schema, name) {
                    Some(place) => target_catalog.table(&place.schema, &place.table).filter(|_| !place.left_out),
                    None => target_catalog.table(schema, name),
                };
                let Some(found) = found else { return Ok(vec![]) };
                let mut steps = Vec::new();
                if let (true, Some(parent)) = (found.is_partition, &found.parent_name) {
                    let bound = found.bound.clone().unwrap_or_default();
                    let sql = vec![format!("ALTER TABLE {parent} DETACH PARTITION {}", found.qualified())];
                    let change = format!("partition {} was dropped on the owner", found.plain());
                    let mut draft =
                        draft(&found.plain(), "detach_partition", change, sql, 0.97, "its rows leave the parent and are kept aside");
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
                let presence = match target_catalog
                    .schemas
                    .values()
                    .find(|schema| quote::ident(&schema.name).trim_matches('"') == object.identity.trim_matches('"'))
                {
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
            "function" | "procedure" | "aggregate" if object.original => {
                known.functions.remove(&object.oid);
                Ok(plain(objects::dropped(object, Presence::Free)))
            }
            // Described by the table that they belong to.
            "trigger" | "table constraint" | "default value" | "table column" | "domain constraint" => Ok(vec![]),
            // Told whole behind it.
            "default acl" => Ok(vec![]),
            // A view's own rule and row types go with it.
            "rule" | "composite type" if !object.original => Ok(vec![]),
            _ if !object.original => Ok(vec![]),
            _ => Ok(plain(objects::dropped(object, Presence::Free))),
        }
    }
}

/// The other side's catalog with the schemas that the message makes: its tables may move there.
fn with_schemas(catalog: &Catalog, message: &Message) -> Catalog {
    let mut catalog = catalog.clone();
    for schema in &message.schemas {
        if !catalog.has_schema(&schema.name) {
            // Its oid is the owner's: a negative one meets none of the catalog's own.
            catalog.schemas.insert(-schema.oid, schema.clone());
        }
    }
    catalog
}

/// A statement that changes nothing but privileges.
fn is_grant(tag: &str) -> bool {
    matches!(tag, "GRANT" | "REVOKE" | "ALTER DEFAULT PRIVILEGES" | "DROP OWNED" | "REASSIGN OWNED")
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
