//! What is made while the shadow follows belongs to the same role there, and the same roles may use it: the application connects to the
//! shadow and does so. With the copy, with event triggers, and where the catalog is looked at.

#[path = "support/feed_play.rs"]
mod play;
#[path = "support/feed_servers.rs"]
mod servers;

use play::{catch_up, eventually, spec, start, streaming};
use servers::Server;
use tokio_postgres::{Client, NoTls};
use understudy::{
    cdc::{self, FeedSpec, Start},
    metadata::{Proposal, ProposalState, Repository},
};

const BEFORE: &str = "
    CREATE SCHEMA app AUTHORIZATION app;
    SET ROLE app;
    CREATE TABLE app.early (id int PRIMARY KEY, secret text, public text);
    GRANT USAGE ON SCHEMA app TO reader; GRANT SELECT (id, public) ON app.early TO reader;
    CREATE TYPE app.early_mood AS ENUM ('good');
    CREATE FUNCTION app.early_one() RETURNS int LANGUAGE sql AS 'SELECT 1';
    REVOKE ALL ON FUNCTION app.early_one() FROM PUBLIC; GRANT EXECUTE ON FUNCTION app.early_one() TO reader;
    RESET ROLE";

/// Made by the application while the shadow follows.
const MADE: &str = "
    CREATE SCHEMA shop;
    CREATE TYPE shop.mood AS ENUM ('good', 'bad');
    CREATE DOMAIN shop.positive AS int CHECK (VALUE > 0);
    CREATE TYPE shop.pair AS (a int, b text);
    CREATE SEQUENCE shop.counter;
    CREATE TABLE shop.deal (id serial PRIMARY KEY, mood shop.mood, n shop.positive, secret text);
    CREATE VIEW shop.deals AS SELECT id, mood FROM shop.deal;
    CREATE MATERIALIZED VIEW shop.tally AS SELECT count(*) AS n FROM shop.deal;
    CREATE FUNCTION shop.one(n int) RETURNS int LANGUAGE sql SECURITY DEFINER AS 'SELECT count(*)::int + $1 FROM shop.deal';
    CREATE PROCEDURE shop.add() LANGUAGE sql AS 'INSERT INTO shop.deal (mood) VALUES (''good'')';
    REVOKE ALL ON FUNCTION shop.one(int) FROM PUBLIC;
    REVOKE ALL ON TYPE shop.pair FROM PUBLIC;
    GRANT USAGE ON SCHEMA shop TO reader WITH GRANT OPTION;
    GRANT EXECUTE ON FUNCTION shop.one(int) TO reader;
    GRANT USAGE ON SEQUENCE shop.counter TO reader;
    GRANT SELECT ON shop.deals, shop.tally TO reader;
    GRANT SELECT (id, n) ON shop.deal TO reader;
    GRANT SELECT, INSERT ON app.early TO reader;
    ALTER DEFAULT PRIVILEGES IN SCHEMA shop GRANT SELECT ON TABLES TO reader;
    ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC;
    CREATE TABLE shop.later (id int PRIMARY KEY);
    CREATE FUNCTION shop.hidden() RETURNS int LANGUAGE sql AS 'SELECT 2'";

/// What the application does with it on its new server.
const USED: &str = "
    INSERT INTO shop.deal (mood, n) VALUES ('bad', 3);
    CALL shop.add();
    REFRESH MATERIALIZED VIEW shop.tally;
    SELECT shop.one(1), nextval('shop.counter'), ROW(1, 'x')::shop.pair;
    ALTER TABLE shop.deal ADD COLUMN more int; ALTER TYPE shop.mood ADD VALUE 'so-so';
    CREATE TABLE shop.after (id int PRIMARY KEY); ALTER SCHEMA shop RENAME TO shopping; ALTER SCHEMA shopping RENAME TO shop;
    ALTER SEQUENCE shop.counter INCREMENT 2; ALTER DOMAIN shop.positive SET DEFAULT 1; ALTER TYPE shop.pair ADD ATTRIBUTE c int;
    ALTER FUNCTION shop.one(int) STABLE; ALTER PROCEDURE shop.add() SECURITY DEFINER";

/// Owners and effective privileges of everything that is not the server's, as text.
async fn rights(client: &Client) -> Vec<String> {
    let acl = |acl: &str, kind: &str, owner: &str| {
        format!(
            "' owner ' || pg_get_userbyid({owner}) || ': ' || coalesce((SELECT string_agg(CASE WHEN g.grantee = 0 THEN 'PUBLIC' ELSE pg_get_userbyid(g.grantee)::text END
               || ' ' || g.privilege_type || g.is_grantable, ', ' ORDER BY g.grantee::regrole::text, g.privilege_type)
             FROM aclexplode(coalesce({acl}, acldefault('{kind}', {owner}))) g WHERE g.grantee <> {owner}), '')"
        )
    };
    let query = format!(
        "SELECT x FROM (
           SELECT 'relation ' || c.relname || {}, n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE relkind IN ('r', 'v', 'm')
           UNION ALL SELECT 'sequence ' || c.relname || {}, n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE relkind = 'S'
           UNION ALL SELECT 'column ' || c.relname || '.' || a.attname || {}, n.nspname FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
             JOIN pg_namespace n ON n.oid = c.relnamespace WHERE a.attacl IS NOT NULL
           UNION ALL SELECT 'type ' || t.typname || {}, n.nspname FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace LEFT JOIN pg_class c ON c.oid = t.typrelid
             WHERE t.typtype IN ('e', 'd') OR c.relkind = 'c'
           UNION ALL SELECT 'routine ' || p.proname || {}, n.nspname FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
           UNION ALL SELECT 'schema ' || n.nspname || {}, n.nspname FROM pg_namespace n
           UNION ALL SELECT 'default ' || pg_get_userbyid(defaclrole) || coalesce(defaclnamespace::regnamespace::text, '') || defaclobjtype::text
             || coalesce((SELECT string_agg(g.grantee::regrole || g.privilege_type, ' ' ORDER BY g.grantee, g.privilege_type)
                          FROM aclexplode(defaclacl) g WHERE g.grantee <> defaclrole), ''), 'app' FROM pg_default_acl
         ) q (x, schema) WHERE schema IN ('app', 'shop') ORDER BY 1",
        acl("c.relacl", "r", "c.relowner"),
        acl("c.relacl", "s", "c.relowner"),
        acl("a.attacl", "c", "c.relowner"),
        acl("t.typacl", "T", "t.typowner"),
        acl("p.proacl", "f", "p.proowner"),
        acl("n.nspacl", "n", "n.nspowner"),
    );
    client.query(&query, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

async fn login(server: &Server, database: &str, role: &str) -> Client {
    let mut url = server.url(database);
    url.user = role.into();
    let (client, connection) = url.to_tokio("application").connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

fn open(repository: &Repository) -> Vec<Proposal> {
    let open = |one: &Proposal| !matches!(one.state, ProposalState::AutoApplied | ProposalState::Approved);
    repository.proposals(None).unwrap().into_iter().filter(open).collect()
}

struct Stage<'a> {
    old: &'a Server,
    new: &'a Server,
    spec: FeedSpec,
    owner: Client,
    follower: Client,
    repository: Repository,
}

impl Stage<'_> {
    /// Both sides say the same of owners and privileges.
    async fn same(&self, what: &str) {
        let mut differences = Vec::new();
        eventually(what, async || {
            let (left, right) = (rights(&self.owner).await, rights(&self.follower).await);
            let only = |side: &str, these: &[String], those: &[String]| -> Vec<String> {
                these.iter().filter(|line| !those.contains(line)).map(|line| format!("{side} only: {line}")).collect()
            };
            let now = [only("owner", &left, &right), only("follower", &right, &left)].concat();
            if now != differences {
                println!("{what}: {now:#?}");
                differences = now;
            }
            differences.is_empty()
        })
        .await;
    }
}

async fn everything_can_be_used(database: &str, superuser: bool) {
    let (old, new) = (Server::start(15, ""), Server::start(18, ""));
    let roles = "CREATE ROLE app LOGIN REPLICATION; CREATE ROLE reader LOGIN; CREATE ROLE other LOGIN; GRANT other TO app";
    for server in [&old, &new] {
        server.client("postgres").await.batch_execute(roles).await.unwrap();
    }
    old.client("postgres").await.batch_execute("CREATE ROLE stranger").await.unwrap();
    let (owner, follower) = (old.create(database).await, new.create(database).await);
    owner.batch_execute(&format!("ALTER DATABASE {database} OWNER TO app; {BEFORE}")).await.unwrap();
    follower.batch_execute(&format!("ALTER DATABASE {database} OWNER TO app")).await.unwrap();
    let mut spec = spec(&old, &new, database);
    if !superuser {
        spec.from.user = "app".into();
    }
    let stage = Stage { old: &old, new: &new, spec, owner, follower, repository: Repository::in_memory().unwrap() };
    let feed = start(&stage.spec, Start::Copy, &stage.repository);
    streaming(&feed).await;
    stage.same("the copy of owners and privileges").await;

    let app = login(stage.old, database, "app").await;
    for statement in MADE.split(";\n") {
        app.batch_execute(statement).await.unwrap();
    }
    catch_up(&feed, &stage.owner).await;
    stage.same("owners and privileges of new objects").await;

    let changes = "REVOKE SELECT ON shop.deals FROM reader; REVOKE GRANT OPTION FOR USAGE ON SCHEMA shop FROM reader; GRANT USAGE ON TYPE shop.pair TO PUBLIC;
        REVOKE ALL ON ALL TABLES IN SCHEMA app FROM reader; ALTER SEQUENCE shop.counter OWNER TO other; ALTER TYPE shop.pair OWNER TO other;
        GRANT ALL ON SCHEMA shop TO other; ALTER VIEW shop.deals OWNER TO other; ALTER FUNCTION shop.hidden() OWNER TO other;
        GRANT CREATE ON SCHEMA app TO other; ALTER SCHEMA app OWNER TO other; REVOKE EXECUTE ON FUNCTION app.early_one() FROM reader;
        ALTER TABLE shop.later OWNER TO other; GRANT EXECUTE ON PROCEDURE shop.add() TO reader; ALTER DEFAULT PRIVILEGES IN SCHEMA shop REVOKE SELECT ON TABLES FROM reader";
    // Whoever gives away a type needs the right to make one there: CREATE of the new owner comes first.
    app.batch_execute("GRANT ALL ON SCHEMA shop TO other").await.unwrap();
    app.batch_execute(changes).await.unwrap();
    catch_up(&feed, &stage.owner).await;
    stage.same("owners and privileges that changed").await;
    app.batch_execute("REASSIGN OWNED BY other TO app; GRANT SELECT ON shop.deals TO reader").await.unwrap();
    catch_up(&feed, &stage.owner).await;
    stage.same("owners that changed back").await;
    eventually("the end of the open proposals", async || open(&stage.repository).is_empty()).await;

    // A role that only the owner has: one question, and the object arrives.
    app.batch_execute("CREATE TABLE shop.strange (id int PRIMARY KEY); GRANT SELECT ON shop.strange TO stranger").await.unwrap();
    eventually("the question about a missing role", async || {
        let open = open(&stage.repository);
        !open.is_empty() && open.iter().all(|one| one.draft.kind == "missing_role")
    })
    .await;
    let questions = open(&stage.repository);
    let [question] = &questions[..] else { panic!("{questions:#?}") };
    assert!(question.draft.kind == "missing_role" && question.draft.change.contains("stranger"), "{question:?}");
    assert!(feed.approve(question, None, "test").await.is_err(), "a role that is not there was granted something");
    new.client("postgres").await.batch_execute("CREATE ROLE stranger").await.unwrap();
    feed.approve(question, None, "test").await.unwrap();
    stage.same("privileges of a role that came later").await;
    eventually("the end of the copies", async || feed.state().held_tables.is_empty()).await;

    feed.stop().await;
    cdc::disarm(&stage.spec).await.unwrap();
    let application = login(stage.new, database, "app").await;
    for statement in USED.split(";\n").flat_map(|line| line.split("; ")) {
        application.batch_execute(statement).await.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
    }
    let reader = login(stage.new, database, "reader").await;
    reader
        .batch_execute("SELECT shop.one(2), nextval('shop.counter'); SELECT * FROM shop.deals; SELECT id, n FROM shop.deal")
        .await
        .unwrap();
    for refused in ["SELECT secret FROM shop.deal", "SELECT shop.hidden()", "SELECT * FROM app.early", "SELECT app.early_one()"] {
        assert!(reader.batch_execute(refused).await.is_err(), "{refused} was allowed");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_made_meanwhile_can_be_used_on_the_shadow() {
    everything_can_be_used("captured", true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_made_meanwhile_can_be_used_without_event_triggers() {
    everything_can_be_used("looked_at", false).await;
}
