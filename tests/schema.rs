//! The Schema Adaptation Engine on real servers: owner 15, shadow 18.

#[path = "support/schema_servers.rs"]
mod servers;

use servers::Server;
use std::{
    collections::BTreeMap,
    sync::{Arc, LazyLock, Mutex, Weak},
};
use tokio_postgres::Client;
use understudy::{
    lsn::Lsn,
    metadata::{Proposal, ProposalState, Repository},
    schema::{Adaptation, Adapter, capture, catalog::Catalog},
};

const PUBLICATION: &str = "understudy_shop";

/// One pair of servers for all tests that run at the same time; each test has its own databases.
static SERVERS: LazyLock<Mutex<Weak<(Server, Server)>>> = LazyLock::new(Mutex::default);

fn servers() -> Arc<(Server, Server)> {
    let mut shared = SERVERS.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    shared.upgrade().unwrap_or_else(|| {
        let started = Arc::new((Server::start(15), Server::start(18)));
        *shared = Arc::downgrade(&started);
        started
    })
}

struct Bench {
    source: Client,
    shadow: Client,
    adapter: Adapter,
    repository: Repository,
    slot: String,
    _servers: Arc<(Server, Server)>,
}

/// Servers of one test alone.
fn own_servers(source: u32, shadow: u32) -> Arc<(Server, Server)> {
    Arc::new((Server::start(source), Server::start(shadow)))
}

#[derive(Debug, Default)]
struct Outcome {
    adaptations: Vec<Adaptation>,
    failures: Vec<String>,
}

impl Outcome {
    fn hold(&self) -> Vec<(String, String)> {
        self.adaptations.iter().flat_map(|one| one.hold.iter().map(|(_, schema, table)| (schema.clone(), table.clone()))).collect()
    }

    fn recopy(&self) -> Vec<(String, String)> {
        self.adaptations.iter().flat_map(|one| one.recopy.clone()).collect()
    }
}

impl Bench {
    /// Databases `name` on both servers, `setup` run on both, capture and a slot on the owner, baseline taken.
    async fn new(name: &str, setup: &str) -> Self {
        Self::on(servers(), name, setup).await
    }

    async fn on(servers: Arc<(Server, Server)>, name: &str, setup: &str) -> Self {
        for server in [&servers.0, &servers.1] {
            server.connect("postgres").await.batch_execute(&format!("CREATE DATABASE {name}")).await.unwrap();
        }
        let source = servers.0.connect(name).await;
        let shadow = servers.1.connect(name).await;
        source.batch_execute(setup).await.unwrap();
        shadow.batch_execute(setup).await.unwrap();
        source.batch_execute(&format!("CREATE PUBLICATION {PUBLICATION}")).await.unwrap();
        source.batch_execute(&capture::install_sql(PUBLICATION, capture::Way::Messages)).await.unwrap();
        source.batch_execute(&capture::install_sql(PUBLICATION, capture::Way::Messages)).await.unwrap();
        let slot = format!("{name}_slot");
        source.query("SELECT pg_create_logical_replication_slot($1, 'test_decoding')", &[&slot]).await.unwrap();
        let repository = Repository::in_memory().unwrap();
        let threshold = Arc::new(arc_swap::ArcSwap::from_pointee(0.95));
        let adapter = Adapter::new("shop".into(), "pg18".into(), repository.clone(), threshold);
        adapter.baseline(&source).await.unwrap();
        Bench { source, shadow, adapter, repository, slot, _servers: servers }
    }

    async fn messages(&self) -> Vec<(Lsn, String)> {
        let rows =
            self.source.query("SELECT lsn::text, data FROM pg_logical_slot_get_changes($1, NULL, NULL)", &[&self.slot]).await.unwrap();
        rows.iter()
            .filter_map(|row| {
                let (lsn, data): (String, String) = (row.get(0), row.get(1));
                let content = data.strip_prefix("message: transactional: 1 prefix: understudy.ddl,")?.split_once("content:")?.1.to_owned();
                Some((lsn.parse().unwrap(), content))
            })
            .collect()
    }

    /// What the applier does: a transaction, a savepoint for each proposal, the rest after the commit.
    async fn apply(&self) -> Outcome {
        let mut outcome = Outcome::default();
        for (lsn, content) in self.messages().await {
            self.shadow.batch_execute("BEGIN; SET LOCAL session_replication_role = replica").await.unwrap();
            let adaptation = self.adapter.adapt(content.as_bytes(), lsn, &self.shadow).await.unwrap();
            for (id, statements) in &adaptation.run_now {
                self.shadow.batch_execute("SAVEPOINT one").await.unwrap();
                match self.shadow.batch_execute(&statements.join(";\n")).await {
                    Ok(()) => self.repository.decide(*id, ProposalState::AutoApplied, "policy", &statements.join("; "), "").unwrap(),
                    Err(error) => {
                        self.shadow.batch_execute("ROLLBACK TO SAVEPOINT one").await.unwrap();
                        outcome.failures.push(format!("{statements:?}: {:?}", error.as_db_error()));
                        self.repository.decide(*id, ProposalState::Failed, "policy", "", "failed").unwrap();
                    }
                }
            }
            self.shadow.batch_execute("COMMIT").await.unwrap();
            for (id, statements) in &adaptation.run_after {
                for statement in statements {
                    if let Err(error) = self.shadow.batch_execute(statement).await {
                        outcome.failures.push(format!("{statement}: {:?}", error.as_db_error()));
                    }
                }
                self.repository.decide(*id, ProposalState::AutoApplied, "policy", &statements.join("; "), "").unwrap();
            }
            outcome.adaptations.push(adaptation);
        }
        outcome
    }

    async fn ddl(&self, sql: &str) -> Outcome {
        self.source.batch_execute(sql).await.unwrap();
        self.apply().await
    }

    fn proposals(&self, kind: &str) -> Vec<Proposal> {
        self.repository.proposals(None).unwrap().into_iter().filter(|proposal| proposal.draft.kind == kind).collect()
    }

    async fn assert_equal(&self) {
        let (owner, shadow) = (facts(&Catalog::load(&self.source).await.unwrap()), facts(&Catalog::load(&self.shadow).await.unwrap()));
        for (name, value) in &owner {
            assert_eq!(
                Some(value),
                shadow.get(name),
                "{name}\n{:#?}",
                self.repository.proposals(None).unwrap().iter().rev().take(3).collect::<Vec<_>>()
            );
        }
        for name in shadow.keys() {
            assert!(owner.contains_key(name), "only on the shadow: {name}");
        }
    }
}

/// A catalog without oids, attribute numbers and what is not part of the contract between two majors.
fn facts(catalog: &Catalog) -> BTreeMap<String, String> {
    let mut facts = BTreeMap::new();
    for table in catalog.tables.values() {
        let name = table.plain();
        facts
            .insert(format!("table {name}"), format!("{} {:?} {:?} {:?}", table.kind, table.parent_name, table.bound, table.partition_key));
        for column in &table.columns {
            let column_facts = format!(
                "{} {:?} {} {:?} {} {}",
                column.type_name, column.collation, column.not_null, column.default, column.identity, column.generated
            );
            facts.insert(format!("column {name}.{}", column.name), column_facts);
        }
        for constraint in table.constraints.iter().filter(|constraint| !constraint.inherited) {
            facts.insert(format!("constraint {name}.{}", constraint.name), format!("{} {}", constraint.def, constraint.validated));
        }
        for index in table.indexes.iter().filter(|index| !index.inherited) {
            facts.insert(format!("index {name}.{}", index.name), index.def.clone());
        }
        for trigger in &table.triggers {
            facts.insert(format!("trigger {name}.{}", trigger.name), format!("{} {}", trigger.def, trigger.enabled));
        }
    }
    for item in catalog.types.values() {
        let labels: Vec<_> = item.labels.iter().map(|label| &label.label).collect();
        let attributes: Vec<_> = item.attributes.iter().map(|attribute| (&attribute.name, &attribute.type_name)).collect();
        let checks: Vec<_> = item.checks.iter().map(|check| (&check.name, &check.def)).collect();
        facts.insert(
            format!("type {}.{}", item.schema, item.name),
            format!("{labels:?} {attributes:?} {checks:?} {:?} {:?}", item.base, item.not_null),
        );
    }
    for sequence in catalog.sequences.values() {
        facts.insert(
            format!("sequence {}.{}", sequence.schema, sequence.name),
            format!("{} {} {:?}", sequence.type_name, sequence.increment, sequence.owned_by),
        );
    }
    for schema in catalog.schemas.values() {
        facts.insert(format!("schema {}", schema.name), String::new());
    }
    facts
}

const SETUP: &str = "
CREATE TYPE mood AS ENUM ('sad', 'ok');
CREATE TABLE customer (id serial PRIMARY KEY, name text NOT NULL, mood mood DEFAULT 'ok', note varchar(20), old int NOT NULL, m mood);
CREATE TABLE item (id int PRIMARY KEY, customer_id int, n int, amount numeric(10,2) DEFAULT 0, tag text DEFAULT 'x');
CREATE INDEX item_n ON item (n);
CREATE TABLE part (id int, at date NOT NULL, v text, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
CREATE TABLE part_1 PARTITION OF part FOR VALUES FROM ('2026-01-01') TO ('2026-02-01');
CREATE TABLE part_2 PARTITION OF part FOR VALUES FROM ('2026-02-01') TO ('2026-03-01');
CREATE TABLE alone (id int, at date NOT NULL, v text, PRIMARY KEY (id, at));
CREATE TABLE keyless (a int, b text);
INSERT INTO customer (name, old) SELECT 'c' || g, g FROM generate_series(1, 50) g;
INSERT INTO item SELECT g, g, g, g FROM generate_series(1, 50) g;
INSERT INTO part SELECT g, '2026-01-05', 'v' FROM generate_series(1, 5) g;
";

#[tokio::test]
async fn a_long_list_of_changes_leaves_both_sides_equal() {
    let bench = Bench::new("long_list", SETUP).await;
    for ddl in [
        "ALTER TABLE customer ADD COLUMN a text, ADD COLUMN b int NOT NULL DEFAULT 7, ADD COLUMN c timestamptz NOT NULL DEFAULT now()",
        "ALTER TABLE customer ADD COLUMN frozen_only int NOT NULL DEFAULT 5; ALTER TABLE customer ALTER COLUMN frozen_only DROP DEFAULT",
        "ALTER TABLE customer ADD COLUMN later int, ALTER COLUMN later SET DEFAULT 9",
        "ALTER TABLE customer ADD COLUMN doubled int GENERATED ALWAYS AS (old * 2) STORED",
        "ALTER TABLE customer ADD COLUMN \"Weird \"\"Name\" text DEFAULT E'it''s \\\\ ok'",
        "ALTER TABLE customer ADD COLUMN tags text[] NOT NULL DEFAULT '{a,\"b c\"}'",
        "ALTER TABLE customer RENAME COLUMN a TO a2; ALTER TABLE customer RENAME COLUMN b TO a; ALTER TABLE customer RENAME COLUMN a2 TO b",
        "DO $$ BEGIN EXECUTE 'ALTER TABLE item ADD COLUMN done boolean NOT NULL DEFAULT false'; EXECUTE 'ALTER TABLE item ALTER done DROP NOT NULL'; END $$",
        "BEGIN; SAVEPOINT s; ALTER TABLE item ADD COLUMN never int; ROLLBACK TO s; ALTER TABLE item ADD COLUMN kept int; COMMIT",
        "ALTER TABLE item ALTER n TYPE bigint; ALTER TABLE item ALTER tag TYPE varchar(40); ALTER TABLE item ALTER tag TYPE text",
        "ALTER TABLE item ALTER amount TYPE numeric(12,2), ALTER amount SET DEFAULT 1.5, ALTER id TYPE bigint",
        "ALTER TABLE item ALTER customer_id SET NOT NULL; ALTER TABLE item ALTER customer_id DROP NOT NULL",
        "ALTER TABLE item ADD CONSTRAINT item_customer FOREIGN KEY (customer_id) REFERENCES customer (id)",
        "ALTER TABLE item ADD CONSTRAINT n_ok CHECK (n > 0), ADD CONSTRAINT n_unique UNIQUE (n)",
        "ALTER TABLE item RENAME CONSTRAINT n_ok TO n_positive; ALTER TABLE item DROP CONSTRAINT n_unique",
        "CREATE INDEX item_tag ON item (tag) WHERE n > 3; ALTER INDEX item_tag RENAME TO item_tag_idx; DROP INDEX item_n",
        "CREATE UNIQUE INDEX customer_name ON customer (lower(name))",
        "CREATE UNIQUE INDEX item_n_u ON item (n)",
        "ALTER TABLE item ADD CONSTRAINT item_n_key UNIQUE USING INDEX item_n_u",
        "CREATE TYPE colour AS ENUM ('red'); ALTER TYPE colour ADD VALUE 'blue' BEFORE 'red'; ALTER TYPE colour RENAME VALUE 'red' TO 'crimson'",
        "CREATE TABLE painted (id bigserial PRIMARY KEY, colour colour NOT NULL DEFAULT 'blue', x int GENERATED BY DEFAULT AS IDENTITY, CHECK (x > 0))",
        "CREATE TABLE child (id int PRIMARY KEY, painted_id bigint REFERENCES painted ON DELETE CASCADE, UNIQUE (painted_id))",
        "ALTER TYPE mood RENAME TO feeling; ALTER TYPE feeling ADD VALUE 'great'",
        "CREATE TYPE feeling_new AS ENUM ('sad', 'ok', 'great', 'super'); ALTER TABLE customer ALTER m TYPE feeling_new USING m::text::feeling_new",
        "CREATE DOMAIN positive AS int CHECK (VALUE > 0); ALTER DOMAIN positive SET DEFAULT 3; CREATE TYPE pair AS (a int, b text)",
        "ALTER TYPE pair ADD ATTRIBUTE c date; CREATE TABLE uses (id int PRIMARY KEY, p pair, d positive)",
        "ALTER TABLE item ADD COLUMN serial_no serial",
        "CREATE SCHEMA sales; CREATE TABLE sales.deal (id int PRIMARY KEY); ALTER SCHEMA sales RENAME TO selling; ALTER TABLE child SET SCHEMA selling",
        "ALTER TABLE selling.deal RENAME TO deals; ALTER TABLE selling.deals ADD COLUMN x int; ALTER TABLE selling.deals REPLICA IDENTITY FULL",
        "CREATE TABLE part_3 PARTITION OF part FOR VALUES FROM ('2026-03-01') TO ('2026-04-01'); ALTER TABLE part ADD COLUMN w timestamptz DEFAULT now()",
        "ALTER TABLE part ATTACH PARTITION part_4 FOR VALUES FROM ('2026-04-01') TO ('2026-05-01')",
        "ALTER TABLE part DETACH PARTITION part_2; CREATE INDEX part_v ON part (v); ALTER TABLE part ALTER v SET NOT NULL",
        "CREATE VIEW v AS SELECT id, name FROM customer; CREATE OR REPLACE VIEW v AS SELECT id, name, mood FROM customer",
        "CREATE MATERIALIZED VIEW mv AS SELECT count(*) AS n FROM item; REFRESH MATERIALIZED VIEW mv",
        "CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.note := 'x'; RETURN NEW; END $$",
        "CREATE TRIGGER touch BEFORE UPDATE ON customer FOR EACH ROW EXECUTE FUNCTION touch(); ALTER TABLE customer DISABLE TRIGGER touch",
        "CREATE VIEW gone AS SELECT 1 AS x; DROP VIEW gone; CREATE FUNCTION f(int, text) RETURNS int LANGUAGE sql AS 'SELECT 1'; DROP FUNCTION f(int, text)",
        "CREATE SEQUENCE counter INCREMENT 5; ALTER SEQUENCE counter INCREMENT 3; ALTER SEQUENCE counter RENAME TO counters",
        "CREATE TEMP TABLE scratch (a int); ALTER TABLE scratch ADD COLUMN b int; DROP TABLE scratch",
        "CREATE TABLE inh (LIKE item INCLUDING ALL); CREATE TABLE sub (extra int) INHERITS (inh); ALTER TABLE inh ADD COLUMN more int DEFAULT 3",
        "ALTER TABLE customer ALTER note TYPE text COLLATE \"C\"; ALTER TABLE customer ALTER doubled DROP EXPRESSION",
        "ALTER TABLE customer ALTER id DROP DEFAULT; ALTER TABLE keyless ADD PRIMARY KEY (a)",
        "COMMENT ON TABLE item IS 'x'; GRANT SELECT ON item TO PUBLIC",
        "CREATE UNLOGGED TABLE quick (id int PRIMARY KEY)",
    ] {
        // part_4 is made from a standalone table
        let ddl = ddl.replace(
            "ALTER TABLE part ATTACH",
            "ALTER TABLE alone RENAME TO part_4; ALTER TABLE part_4 ADD COLUMN w timestamptz DEFAULT now(); ALTER TABLE part ATTACH",
        );
        let outcome = bench.ddl(&ddl).await;
        assert!(outcome.failures.is_empty(), "{ddl}: {:?}", outcome.failures);
        assert!(outcome.hold().is_empty(), "{ddl}: {:?}", outcome.adaptations);
        bench.assert_equal().await;
    }
    let waiting: Vec<_> = bench.repository.proposals(None).unwrap().into_iter().filter(|one| one.state == ProposalState::Pending).collect();
    assert!(waiting.is_empty(), "{waiting:#?}");
    let published: i64 = bench
        .source
        .query_one(
            "SELECT count(*) FROM pg_publication_rel r JOIN pg_class c ON c.oid = prrelid WHERE relname IN ('painted', 'deals', 'child')",
            &[],
        )
        .await
        .unwrap()
        .get(0);
    assert_eq!(published, 3);
    bench.source.batch_execute(&capture::remove_sql()).await.unwrap();
    let left: i64 = bench.source.query_one("SELECT count(*) FROM pg_namespace WHERE nspname = 'understudy'", &[]).await.unwrap().get(0);
    assert_eq!(left, 0);
}

#[tokio::test]
async fn the_frozen_now_is_carried() {
    let bench = Bench::new("frozen", SETUP).await;
    let outcome = bench.ddl("ALTER TABLE customer ADD COLUMN since timestamptz NOT NULL DEFAULT now(); ALTER TABLE part ADD COLUMN since timestamptz DEFAULT now()").await;
    assert!(outcome.failures.is_empty() && outcome.recopy().is_empty(), "{:?}", outcome.adaptations);
    for table in ["customer", "part"] {
        let query = format!("SELECT since::text, count(*) FROM {table} GROUP BY 1");
        let read = async |client: &Client| {
            client.batch_execute("SET timezone = 'UTC'").await.unwrap();
            client.query(&query, &[]).await.unwrap().iter().map(|row| (row.get::<_, String>(0), row.get::<_, i64>(1))).collect::<Vec<_>>()
        };
        let owner = read(&bench.source).await;
        assert_eq!(owner.len(), 1);
        assert_eq!(owner, read(&bench.shadow).await, "{table}");
    }
}

#[tokio::test]
async fn a_volatile_default_and_an_unseen_expression_are_copied_again() {
    let bench = Bench::new("volatile", SETUP).await;
    let outcome = bench.ddl("ALTER TABLE item ADD COLUMN token uuid NOT NULL DEFAULT gen_random_uuid()").await;
    assert_eq!(outcome.recopy(), [("public".to_owned(), "item".to_owned())]);
    assert!(outcome.failures.is_empty(), "{:?}", outcome.failures);
    let outcome = bench.ddl("ALTER TABLE item ALTER n TYPE bigint USING n * 100").await;
    assert_eq!(outcome.recopy(), [("public".to_owned(), "item".to_owned())]);
    let outcome = bench.ddl("CREATE TABLE copied AS SELECT * FROM item").await;
    assert_eq!(outcome.recopy(), [("public".to_owned(), "copied".to_owned())]);
    let outcome = bench.ddl("ALTER TABLE item ALTER customer_id TYPE bigint").await;
    assert!(outcome.recopy().is_empty());
    bench.assert_equal().await;
}

#[tokio::test]
async fn what_loses_data_waits_and_holds_nothing_that_can_flow() {
    let bench = Bench::new("losing", SETUP).await;
    let outcome = bench.ddl("ALTER TABLE customer DROP COLUMN old; DROP TABLE keyless; ALTER TABLE item DROP COLUMN tag").await;
    assert!(outcome.hold().is_empty() && outcome.failures.is_empty());
    for kind in ["drop_column", "drop_table"] {
        for proposal in bench.proposals(kind) {
            assert!(proposal.state == ProposalState::Pending && proposal.draft.loses_data, "{proposal:?}");
        }
    }
    assert_eq!((bench.proposals("drop_column").len(), bench.proposals("drop_table").len()), (2, 1));
    // the column left behind takes rows that come without it
    bench.shadow.batch_execute("INSERT INTO customer (id, name) VALUES (1000, 'x')").await.unwrap();
    // the name is used again: the old column steps aside with its values
    let outcome = bench.ddl("ALTER TABLE customer ADD COLUMN old text DEFAULT 'new'; CREATE TABLE keyless (z int PRIMARY KEY)").await;
    assert!(outcome.failures.is_empty() && outcome.hold().is_empty(), "{:?}", outcome.failures);
    let kept: i64 = bench.shadow.query_one("SELECT count(old_dropped_1) FROM customer", &[]).await.unwrap().get(0);
    assert_eq!(kept, 50);
    bench.shadow.batch_execute("SELECT a FROM keyless_dropped_1").await.unwrap();
    // the same names again in one transaction, and a rename of the table under a waiting drop
    let outcome = bench.ddl("ALTER TABLE item RENAME TO items").await;
    assert!(outcome.failures.is_empty());
    let waiting: Vec<_> = bench.proposals("drop_column").into_iter().filter(|one| one.state == ProposalState::Pending).collect();
    assert!(waiting.iter().any(|one| one.draft.sql == [r#"ALTER TABLE "public"."items" DROP COLUMN "tag""#]), "{waiting:#?}");
}

#[tokio::test]
async fn the_same_message_again_gives_the_same_answer_and_no_second_proposal() {
    let bench = Bench::new("again", SETUP).await;
    bench
        .source
        .batch_execute("ALTER TABLE item ADD COLUMN x int; ALTER TABLE item RENAME x TO y; ALTER TABLE item DROP COLUMN tag")
        .await
        .unwrap();
    let messages = bench.messages().await;
    let mut first = Vec::new();
    bench.shadow.batch_execute("BEGIN").await.unwrap();
    for (lsn, content) in &messages {
        let adaptation = bench.adapter.adapt(content.as_bytes(), *lsn, &bench.shadow).await.unwrap();
        for (_, statements) in &adaptation.run_now {
            bench.shadow.batch_execute(&statements.join(";")).await.unwrap();
        }
        first.push(adaptation);
    }
    bench.shadow.batch_execute("ROLLBACK").await.unwrap();
    // a new process: nothing but the repository
    let threshold = Arc::new(arc_swap::ArcSwap::from_pointee(0.95));
    let adapter = Adapter::new("shop".into(), "pg18".into(), bench.repository.clone(), threshold);
    let count = bench.repository.proposals(None).unwrap().len();
    bench.shadow.batch_execute("BEGIN").await.unwrap();
    for ((lsn, content), before) in messages.iter().zip(&first) {
        let adaptation = adapter.adapt(content.as_bytes(), *lsn, &bench.shadow).await.unwrap();
        assert_eq!(adaptation, *before);
        for (_, statements) in &adaptation.run_now {
            bench.shadow.batch_execute(&statements.join(";")).await.unwrap();
        }
    }
    bench.shadow.batch_execute("COMMIT").await.unwrap();
    assert_eq!(bench.repository.proposals(None).unwrap().len(), count);
    bench.shadow.batch_execute("SELECT y, tag FROM item").await.unwrap();
}

#[tokio::test]
async fn a_mapped_shadow_gives_a_question_and_never_an_error() {
    let bench = Bench::new("mapped", SETUP).await;
    bench.shadow.batch_execute("ALTER TABLE item DROP COLUMN tag; ALTER TABLE item ADD COLUMN extra text; DROP TABLE alone").await.unwrap();
    let outcome = bench
        .ddl("ALTER TABLE item ALTER tag DROP DEFAULT, ALTER tag TYPE jsonb USING to_jsonb(tag); ALTER TABLE item RENAME tag TO label; ALTER TABLE item ADD COLUMN extra int; ALTER TABLE alone ADD COLUMN q int")
        .await;
    assert!(outcome.failures.is_empty(), "{:?}", outcome.failures);
    let questions: Vec<_> =
        bench.repository.proposals(None).unwrap().into_iter().filter(|one| one.state == ProposalState::Pending).collect();
    let kinds: Vec<&str> = questions.iter().map(|one| one.draft.kind.as_str()).collect();
    assert_eq!(kinds, ["alter_type", "rename_column", "add_column", "missing_table"]);
    for question in questions {
        let draft = question.draft;
        assert!(draft.confidence < 0.9 && !draft.why.is_empty() && !draft.if_rejected.is_empty(), "{draft:?}");
    }
}

#[tokio::test]
async fn damaged_messages_become_questions() {
    let bench = Bench::new("damaged", SETUP).await;
    for (lsn, bytes) in [(1, &b"\xff\x00"[..]), (2, b"{}"), (3, b"{\"event\":\"capture_failed\",\"tag\":\"ALTER TABLE\",\"error\":\"x\"}")]
    {
        let adaptation = bench.adapter.adapt(bytes, Lsn(lsn), &bench.shadow).await.unwrap();
        assert_eq!(adaptation, Adaptation::default());
    }
    assert_eq!(bench.proposals("capture_failed").len(), 2);
}

/// AdaptSchema: COLUMN_ADDED missing on the target → type, default by rules, added, synthetic data.
#[tokio::test]
async fn adapt_schema_column_added() {
    let bench = Bench::new("column_added", SETUP).await;
    let outcome = bench.ddl("ALTER TABLE customer ADD COLUMN is_vip boolean NOT NULL DEFAULT false").await;
    let added = bench.proposals("add_column").pop().unwrap();
    assert!(outcome.failures.is_empty() && added.state == ProposalState::AutoApplied && added.draft.confidence >= 0.95);
    assert_eq!(added.draft.undo, [r#"ALTER TABLE "public"."customer" DROP COLUMN "is_vip""#]);
    bench.assert_equal().await;

    // a column that only the shadow has, and whose rows lack values
    bench
        .shadow
        .batch_execute(
            "ALTER TABLE customer ADD COLUMN loyalty_tier text; ALTER TABLE item ADD COLUMN is_priority boolean;
             ALTER TABLE item ADD COLUMN referrer int REFERENCES customer; CREATE TABLE mine (id int)",
        )
        .await
        .unwrap();
    assert!(bench.adapter.shadow_drift(&bench.source, &bench.shadow).await.unwrap().is_empty(), "seen once is not drift yet");
    let ids = bench.adapter.shadow_drift(&bench.source, &bench.shadow).await.unwrap();
    assert_eq!(ids.len(), 3);
    assert!(bench.adapter.shadow_drift(&bench.source, &bench.shadow).await.unwrap().is_empty(), "once is enough");
    let drift = bench.adapter.drift(&bench.source, &bench.shadow).await.unwrap();
    assert!(drift.iter().any(|row| row.object == "public.customer.loyalty_tier" && row.proposal.is_some()), "{drift:?}");
    assert!(drift.iter().any(|row| row.object == "public.mine" && row.kind == "table only on the shadow"));
    let proposals = bench.proposals("fill_column");
    for proposal in &proposals {
        assert!(proposal.draft.why.contains("model:") && !proposal.draft.loses_data, "{:?}", proposal.draft);
        let rows = bench.adapter.fill(proposal, &bench.shadow).await.unwrap();
        assert_eq!(rows, 50);
        assert_eq!(bench.adapter.fill(proposal, &bench.shadow).await.unwrap(), 0, "filled once");
    }
    let read = async || -> Vec<String> {
        let rows = bench.shadow.query("SELECT loyalty_tier FROM customer ORDER BY id", &[]).await.unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    };
    let values = read().await;
    assert!(values.iter().collect::<std::collections::BTreeSet<_>>().len() > 1, "{values:?}");
    let orphans: i64 = bench
        .shadow
        .query_one("SELECT count(*) FROM item LEFT JOIN customer c ON c.id = referrer WHERE c.id IS NULL", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(orphans, 0);
    // broken off half-way and run again: the same values
    bench.shadow.batch_execute("UPDATE customer SET loyalty_tier = NULL WHERE id % 3 = 0").await.unwrap();
    let proposal = proposals.iter().find(|one| one.draft.change.contains("loyalty_tier")).unwrap();
    assert!(bench.adapter.fill(proposal, &bench.shadow).await.unwrap() > 0);
    assert_eq!(read().await, values);
    // rows that come through the feed later get theirs too
    bench.repository.decide(proposal.id, ProposalState::Approved, "alice", "", "").unwrap();
    bench.shadow.batch_execute("INSERT INTO customer (id, name, old, is_vip) VALUES (77, 'late', 1, false)").await.unwrap();
    assert_eq!(bench.adapter.refill(&bench.shadow).await.unwrap(), 1);
    assert_eq!(bench.adapter.refill(&bench.shadow).await.unwrap(), 0);
}

/// Rare values of other columns stay where they are; what people decided before counts; what is written down comes first.
#[tokio::test]
async fn the_data_and_the_people_of_this_database_count() {
    let setup = "CREATE TABLE lot (id int PRIMARY KEY, flavour text); CREATE TABLE batch (id int PRIMARY KEY);
        INSERT INTO lot SELECT i, CASE WHEN i <= 60 THEN 'sweet' WHEN i <= 98 THEN 'sour' ELSE 'Jane Roe 555-' || i END FROM generate_series(1, 100) i;
        INSERT INTO batch SELECT generate_series(1, 500)";
    let bench = Bench::new("people_count", setup).await;
    let found = async |column: &str| -> Proposal {
        for _ in 0..2 {
            bench.adapter.shadow_drift(&bench.source, &bench.shadow).await.unwrap();
        }
        bench.proposals("fill_column").into_iter().find(|one| one.draft.change.contains(&format!("column {column} "))).unwrap()
    };
    bench.shadow.batch_execute("ALTER TABLE batch ADD COLUMN flavour text").await.unwrap();
    let first = found("flavour").await;
    bench.adapter.fill(&first, &bench.shadow).await.unwrap();
    let row = bench
        .shadow
        .query_one("SELECT array_agg(DISTINCT flavour ORDER BY flavour), col_description('batch'::regclass, 2) FROM batch", &[])
        .await
        .unwrap();
    assert_eq!(row.get::<_, Vec<String>>(0), ["sour", "sweet"], "names of people are rare values");
    assert!(row.get::<_, String>(1).contains("synthetic"));

    // One rejection, and the next suggestion like it is less sure and says why.
    bench.shadow.batch_execute("ALTER TABLE batch ADD COLUMN one text").await.unwrap();
    let one = found("one").await;
    bench.repository.decide(one.id, ProposalState::Rejected, "anna", "", "").unwrap();
    bench.shadow.batch_execute("ALTER TABLE batch ADD COLUMN two text").await.unwrap();
    let two = found("two").await;
    assert!(two.draft.confidence < one.draft.confidence, "{} {}", one.draft.confidence, two.draft.confidence);
    assert!(two.draft.why.contains("0 were approved as they stood, 0 changed, 1 rejected"), "{}", two.draft.why);
    assert!(two.draft.why.contains("1 decisions of people about values"), "{}", two.draft.why);

    // Written down: nothing else is asked.
    let rule = understudy::config::FillRule { column: "batch.grade".into(), values: vec!["A".into(), "B".into()], ..Default::default() };
    let rules = understudy::schema::mapping::Rules::default().filling(&[rule]).shared();
    let threshold = Arc::new(arc_swap::ArcSwap::from_pointee(0.95));
    let adapter = Adapter::new("shop".into(), "pg18".into(), bench.repository.clone(), threshold).mapped(rules, false);
    bench.shadow.batch_execute("ALTER TABLE batch ADD COLUMN grade text").await.unwrap();
    for _ in 0..2 {
        adapter.shadow_drift(&bench.source, &bench.shadow).await.unwrap();
    }
    let written = bench.proposals("fill_column").into_iter().find(|one| one.draft.change.contains("column grade ")).unwrap();
    assert!(written.draft.why.contains("written in proxy.toml"), "{}", written.draft.why);
    adapter.fill(&written, &bench.shadow).await.unwrap();
    let row = bench.shadow.query_one("SELECT array_agg(DISTINCT grade ORDER BY grade) FROM batch", &[]).await.unwrap();
    assert_eq!(row.get::<_, Vec<String>>(0), ["A", "B"]);

    // Both sides' versions are kept, and any two can be compared.
    let versions = bench.repository.schema_versions("shop").unwrap();
    let of_shadow: Vec<i64> = versions.iter().filter(|version| version.side == "pg18").map(|version| version.id).collect();
    let source = versions.iter().find(|version| version.side == "source@pg18").unwrap().id;
    let rows = understudy::schema::version_difference(&bench.repository, source, *of_shadow.last().unwrap()).unwrap();
    let added: Vec<&str> = rows.iter().map(|row| row.object.as_str()).collect();
    assert_eq!(added, ["public.batch.flavour", "public.batch.grade", "public.batch.one", "public.batch.two"]);
    assert!(
        understudy::schema::version_difference(&bench.repository, source, 9_999).unwrap_err().to_string().contains("SHOW SCHEMA VERSIONS")
    );
}

/// At 10,000 rows: distributions, formats, NULLs, checks and the order of moments as in a column of the same name elsewhere; the same row gets the
/// same value although that column has changed since.
#[tokio::test]
async fn synthetic_values_are_like_those_of_a_column_of_the_same_name() {
    let setup = "
        CREATE TABLE sale (id int PRIMARY KEY, points int, price numeric(10,2), serial text, kind text, at timestamptz, created_at timestamptz);
        CREATE TABLE other (id int PRIMARY KEY, created_at timestamptz NOT NULL);
        INSERT INTO sale SELECT g, (g * 7919 % 10000)::bigint * (g * 7919 % 10000) / 1000, (g * 31 % 10000) / 7.0, 'INV-' || lpad((g * 77 % 99991)::text, 5, '0') || 'x',
            CASE WHEN g % 5 = 0 THEN NULL WHEN g % 3 = 0 THEN 'a' WHEN g % 7 < 5 THEN 'b' WHEN g = 13 THEN 'Jane Roe' ELSE 'c' END,
            '2020-01-01'::timestamptz + (g * g / 50000) * interval '1 hour', '2024-01-01' FROM generate_series(1, 10000) g;
        INSERT INTO other SELECT g, '2024-05-05'::timestamptz + g * interval '1 minute' FROM generate_series(1, 10000) g";
    let bench = Bench::new("like_a_sister", setup).await;
    let columns = "ALTER TABLE other ADD points int CHECK (points >= 10), ADD price numeric(10,2), ADD serial text, ADD kind text, ADD at timestamptz, ADD updated_at timestamptz, ADD qty int CHECK (qty > 0 AND qty <= 20)";
    bench.shadow.batch_execute(columns).await.unwrap();
    for _ in 0..2 {
        bench.adapter.shadow_drift(&bench.source, &bench.shadow).await.unwrap();
    }
    let proposals = bench.proposals("fill_column");
    assert_eq!(proposals.len(), 7, "{proposals:#?}");
    let fill = async || {
        for proposal in &proposals {
            bench.adapter.fill(proposal, &bench.shadow).await.unwrap();
        }
        let digest = "SELECT md5(string_agg(o::text, '|' ORDER BY id)) FROM other o";
        bench.shadow.query_one(digest, &[]).await.unwrap().get::<_, String>(0)
    };
    let filled = fill().await;
    let number = async |sql: &str| bench.shadow.query_one(sql, &[]).await.unwrap().get::<_, f64>(0);
    for column in ["points", "price", "extract(epoch FROM at)"] {
        // Kolmogorov-Smirnov: the largest distance of the two distribution functions, at every value of either
        let sql = format!(
            "WITH v AS (SELECT {column}::float8 AS x, 1 AS mine FROM other UNION ALL SELECT {column}::float8, 0 FROM sale),
               f AS (SELECT x, sum(mine) OVER w / 10000.0 AS f, sum(1 - mine) OVER w / 10000.0 AS g FROM v WINDOW w AS (ORDER BY x))
             SELECT max(abs(f - g))::float8 FROM f"
        );
        let distance = number(&sql).await;
        assert!(distance <= 0.05, "{column}: {distance}");
    }
    let variation = "WITH a AS (SELECT kind, count(*) / sum(count(*)) OVER () AS p FROM other WHERE kind IS NOT NULL GROUP BY 1),
        b AS (SELECT kind, count(*) / sum(count(*)) OVER () AS p FROM sale WHERE kind IS NOT NULL GROUP BY 1)
        SELECT (sum(abs(coalesce(a.p, 0) - coalesce(b.p, 0))) / 2)::float8 FROM a FULL JOIN b USING (kind)";
    assert!(number(variation).await <= 0.05);
    assert!((number("SELECT (count(*) FILTER (WHERE kind IS NULL) / 10000.0)::float8 FROM other").await - 0.2).abs() <= 0.01);
    for wrong in [
        "kind NOT IN ('a', 'b', 'c')",
        "serial !~ '^INV-[0-9]{5}x$'",
        "updated_at < created_at",
        "updated_at IS NULL",
        "qty IS NULL",
        "points < 10",
    ] {
        assert_eq!(number(&format!("SELECT count(*)::float8 FROM other WHERE {wrong}")).await, 0.0, "{wrong}");
    }

    bench.shadow.batch_execute("UPDATE sale SET points = 5, price = 1, serial = 'x', kind = 'z', at = now()").await.unwrap();
    bench
        .shadow
        .batch_execute("UPDATE other SET points = NULL, price = NULL, serial = NULL, kind = NULL, at = NULL WHERE id % 2 = 0")
        .await
        .unwrap();
    assert_eq!(fill().await, filled, "the same row got another value");
}

/// AdaptSchema: DATA_TYPE_CHANGED → conversion possible → suggested, otherwise a conflict reported.
#[tokio::test]
async fn adapt_schema_data_type_changed() {
    let bench = Bench::new(
        "type_changed",
        &format!("{SETUP}; CREATE TABLE t (id int PRIMARY KEY, a int, b text DEFAULT 'x', c text, d boolean, e varchar(50), f date)"),
    )
    .await;
    let outcome = bench.ddl("ALTER TABLE t ALTER a TYPE bigint").await;
    assert!(outcome.failures.is_empty() && outcome.hold().is_empty());
    assert_eq!(bench.proposals("alter_type").pop().unwrap().state, ProposalState::AutoApplied);

    // narrowing: asked, but the shadow's wider column goes on taking the rows
    let outcome = bench.ddl("ALTER TABLE t ALTER e TYPE varchar(10)").await;
    let narrowed = bench.proposals("alter_type").pop().unwrap();
    assert!(outcome.hold().is_empty() && narrowed.state == ProposalState::Pending, "{narrowed:?}");

    // text to integer: the conversion is suggested with its USING, and text takes the new values meanwhile; the rows are asked
    for side in [&bench.source, &bench.shadow] {
        side.batch_execute("INSERT INTO t (id, c) SELECT g, CASE WHEN g = 7 THEN 'x' ELSE g::text END FROM generate_series(1, 9) g")
            .await
            .unwrap();
    }
    bench.source.batch_execute("UPDATE t SET c = '7' WHERE id = 7").await.unwrap();
    bench.ddl("ALTER TABLE t ALTER c TYPE integer USING c::integer").await;
    let parsed = bench.proposals("alter_type").pop().unwrap();
    assert!(parsed.draft.sql[0].contains("USING nullif(trim(\"c\"), '')::integer") && !parsed.draft.holds_table, "{parsed:?}");
    assert!(parsed.draft.why.ends_with("probe: 1 of 9 rows fail, for instance key 7") && parsed.draft.confidence <= 0.2, "{parsed:?}");
    bench.shadow.batch_execute("UPDATE t SET c = '7' WHERE id = 7").await.unwrap();
    bench.shadow.batch_execute(&parsed.draft.sql[0]).await.unwrap();

    // boolean to integer: the shadow's column cannot take the new values: suggested, and the table waits
    let outcome = bench.ddl("ALTER TABLE t ALTER d TYPE integer USING d::integer").await;
    assert_eq!(outcome.hold(), [("public".to_owned(), "t".to_owned())]);
    let held = bench.proposals("alter_type").pop().unwrap();
    assert!(held.draft.holds_table && held.state == ProposalState::Pending);
    bench.shadow.batch_execute(&held.draft.sql[0]).await.unwrap();

    // no conversion exists: a conflict with a low confidence and alternatives
    bench.ddl("ALTER TABLE t ALTER f TYPE boolean USING f > '2026-01-01'").await;
    let conflict = bench.proposals("alter_type").pop().unwrap();
    assert!(conflict.draft.confidence < 0.5 && conflict.draft.loses_data && conflict.draft.holds_table, "{conflict:?}");
    assert!(!conflict.draft.alternatives.is_empty() && conflict.draft.why.contains("no cast"));
}

#[tokio::test]
async fn every_major_can_be_the_owner() {
    for (source, shadow) in [(14, 18), (16, 15), (17, 15), (18, 15)] {
        let bench = Bench::on(own_servers(source, shadow), "shop", SETUP).await;
        for ddl in [
            "ALTER TABLE customer ADD COLUMN b int NOT NULL DEFAULT 7, ADD COLUMN c timestamptz NOT NULL DEFAULT now()",
            "ALTER TABLE customer RENAME COLUMN b TO bb; ALTER TABLE customer ALTER bb DROP NOT NULL; ALTER TABLE customer ALTER bb SET NOT NULL",
            "ALTER TABLE item ALTER n TYPE bigint, ADD CONSTRAINT n_ok CHECK (n > 0); CREATE INDEX item_tag ON item (tag)",
            "CREATE TABLE t (id bigserial PRIMARY KEY, x int NOT NULL REFERENCES customer, y int GENERATED ALWAYS AS (x * 2) STORED, m mood[])",
            "ALTER TYPE mood ADD VALUE 'great'; ALTER TABLE part ADD COLUMN w text DEFAULT 'q'",
            "CREATE TABLE part_3 PARTITION OF part FOR VALUES FROM ('2026-03-01') TO ('2026-04-01'); ALTER TABLE part DETACH PARTITION part_2",
            "CREATE VIEW v AS SELECT id FROM item; DROP VIEW v; DROP INDEX item_n; ALTER TABLE keyless RENAME TO no_key",
        ] {
            let outcome = bench.ddl(ddl).await;
            assert!(outcome.failures.is_empty() && outcome.hold().is_empty(), "{source} to {shadow}: {ddl}: {outcome:?}");
            bench.assert_equal().await;
        }
        bench.source.batch_execute(&capture::remove_sql()).await.unwrap();
    }
}

#[tokio::test]
async fn an_application_without_privileges_can_change_its_schema() {
    let bench = Bench::new("application", "CREATE SCHEMA own").await;
    let role = "DO $$ BEGIN CREATE ROLE app_role LOGIN; CREATE ROLE reader_role; EXCEPTION WHEN duplicate_object THEN NULL; END $$; ALTER SCHEMA own OWNER TO app_role";
    bench.source.batch_execute(role).await.unwrap();
    bench.shadow.batch_execute(role).await.unwrap();
    bench.source.batch_execute("SET ROLE app_role; SET search_path = own").await.unwrap();
    let ddl = "CREATE TABLE t (id serial PRIMARY KEY); CREATE TABLE no_key (a int);
        ALTER TABLE t ADD COLUMN x uuid DEFAULT gen_random_uuid(); ALTER TABLE t RENAME x TO y; DROP TABLE IF EXISTS nothing;
        CREATE TEMP TABLE s AS SELECT 1; DROP TABLE s; ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO reader_role;
        CREATE TABLE readable (id serial PRIMARY KEY); CREATE VIEW readable_too AS SELECT * FROM readable;
        ALTER TABLE readable ADD COLUMN n serial";
    bench.source.batch_execute(ddl).await.unwrap();
    bench.source.batch_execute("UPDATE no_key SET a = 1; RESET ROLE; RESET search_path").await.unwrap();
    let outcome = bench.apply().await;
    assert!(outcome.failures.is_empty(), "{:?}", outcome.failures);
    assert!(bench.proposals("capture_failed").is_empty(), "{:?}", bench.proposals("capture_failed"));
    bench.assert_equal().await;
    let published: i64 = bench.source.query_one("SELECT count(*) FROM pg_publication_rel", &[]).await.unwrap().get(0);
    assert_eq!(published, 3);
    let rights = "SELECT pg_get_userbyid(relowner)::text || has_table_privilege('reader_role', oid, 'SELECT') FROM pg_class WHERE relname IN ('readable', 'readable_too')";
    for row in bench.shadow.query(rights, &[]).await.unwrap() {
        assert_eq!(row.get::<_, String>(0), "app_roletrue");
    }
}
