//! What a server says about itself: plain facts, no judgement.

use crate::config::ServerUrl;
use std::collections::BTreeMap;
use tokio_postgres::Client;

/// Longest time for one catalog query: a check must not sit behind a lock.
const QUERY_LIMITS: &str =
    "SET statement_timeout = '15s'; SET lock_timeout = '3s'; SET default_transaction_read_only = on; SET search_path = ''";

/// The facts could not be had.
pub(super) enum Unreadable {
    /// Not reached, or not admitted.
    Connect(String),
    /// A query failed.
    Query { what: &'static str, reason: String },
}

/// A transaction that has written and is still open.
#[derive(Clone, Debug)]
pub(super) struct OpenTransaction {
    pub pid: i32,
    pub seconds: f64,
    pub state: String,
}

/// One database of one server.
#[derive(Clone, Debug, Default)]
pub(super) struct ServerFacts {
    pub version_num: i32,
    pub identity: String,
    pub in_recovery: bool,
    pub superuser: bool,
    pub replication: bool,
    pub create_in_database: bool,
    pub create_role: bool,
    pub may_set_replication_role: bool,
    pub user: String,
    pub settings: BTreeMap<String, String>,
    pub slots_used: i64,
    pub senders_used: i64,
    pub connections_free: i64,
    pub encoding: String,
    pub locale: String,
    pub collation_version: Option<String>,
    pub bytes: i64,
    pub filled_by_us: bool,
    pub tables: Vec<String>,
    pub tables_not_owned: Vec<String>,
    pub tables_without_key: Vec<String>,
    pub tables_unlogged: Vec<String>,
    pub tables_foreign: Vec<String>,
    pub views_materialized: Vec<String>,
    pub sequences: i64,
    pub large_objects: bool,
    pub extensions: Vec<(String, String)>,
    pub extensions_available: BTreeMap<String, String>,
    pub roles: Vec<String>,
    pub open_transactions: Vec<OpenTransaction>,
    pub prepared_transactions: Vec<(String, f64)>,
    pub leftovers: Vec<String>,
    pub slots_inactive: Vec<String>,
}

impl ServerFacts {
    pub fn major(&self) -> u32 {
        u32::try_from(self.version_num / 10_000).unwrap_or(0)
    }

    pub fn setting(&self, name: &str) -> &str {
        self.settings.get(name).map_or("", String::as_str)
    }

    /// A numeric setting in the unit that `pg_settings` gives it.
    pub fn number(&self, name: &str) -> i64 {
        self.setting(name).parse().unwrap_or(0)
    }
}

fn describe(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(db) => format!("{} (SQLSTATE {})", db.message(), db.code().code()),
        None => std::error::Error::source(error).map_or_else(|| error.to_string(), |source| format!("{error}: {source}")),
    }
}

/// Connects, reads, disconnects.
pub(super) async fn load(url: &ServerUrl) -> Result<ServerFacts, Unreadable> {
    let connect = |error: crate::backend::ControlError| Unreadable::Connect(error.to_string());
    let (client, connection) = crate::backend::control(url, "understudy check").await.map_err(connect)?;
    let task = tokio::spawn(async move {
        // A broken connection shows in the query that was running.
        let _ = connection.await;
    });
    let facts = read(&client).await;
    task.abort();
    facts
}

async fn read(client: &Client) -> Result<ServerFacts, Unreadable> {
    let fail = |what: &'static str| move |error: tokio_postgres::Error| Unreadable::Query { what, reason: describe(&error) };
    client.batch_execute(QUERY_LIMITS).await.map_err(fail("the session's limits"))?;
    let mut facts = ServerFacts::default();

    let row = client.query_one(SERVER, &[]).await.map_err(fail("the server's state"))?;
    facts.version_num = row.get(0);
    facts.in_recovery = row.get(1);
    facts.superuser = row.get(2);
    facts.replication = row.get(3);
    facts.create_role = row.get(4);
    facts.create_in_database = row.get(5);
    facts.user = row.get(6);
    facts.slots_used = row.get(7);
    facts.senders_used = row.get(8);
    facts.connections_free = row.get(9);
    facts.encoding = row.get(10);
    facts.locale = row.get(11);
    facts.bytes = row.get(12);
    facts.filled_by_us = row.get(13);
    facts.sequences = row.get(14);
    facts.large_objects = row.get(15);
    facts.identity = row.get(16);
    if facts.version_num >= 150_000 {
        let text = "SELECT datcollversion FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()";
        facts.collation_version = client.query_one(text, &[]).await.map_err(fail("the collation's version"))?.get(0);
        let text = "SELECT pg_catalog.has_parameter_privilege('session_replication_role', 'SET')";
        facts.may_set_replication_role = client.query_one(text, &[]).await.map_err(fail("privileges"))?.get(0);
    }
    facts.may_set_replication_role |= facts.superuser;

    for row in client.query(SETTINGS, &[]).await.map_err(fail("settings"))? {
        facts.settings.insert(row.get(0), row.get(1));
    }
    for row in client.query(RELATIONS, &[]).await.map_err(fail("relations"))? {
        let (name, kind, persistence): (String, String, String) = (row.get(0), row.get(1), row.get(2));
        let (owned, keyed): (bool, bool) = (row.get(3), row.get(4));
        match (kind.as_str(), persistence.as_str()) {
            ("f", _) => facts.tables_foreign.push(name),
            ("m", _) => facts.views_materialized.push(name),
            (_, "u") => facts.tables_unlogged.push(name),
            _ => {
                if !owned {
                    facts.tables_not_owned.push(name.clone());
                }
                if !keyed {
                    facts.tables_without_key.push(name.clone());
                }
                facts.tables.push(name);
            }
        }
    }
    for row in client.query(EXTENSIONS, &[]).await.map_err(fail("extensions"))? {
        let (name, installed, available): (String, Option<String>, Option<String>) = (row.get(0), row.get(1), row.get(2));
        if let Some(installed) = installed {
            facts.extensions.push((name.clone(), installed));
        }
        if let Some(available) = available {
            facts.extensions_available.insert(name, available);
        }
    }
    facts.roles = strings(client, ROLES).await.map_err(fail("roles"))?;
    for row in client.query(OPEN_TRANSACTIONS, &[]).await.map_err(fail("open transactions"))? {
        facts.open_transactions.push(OpenTransaction { pid: row.get(0), seconds: row.get(1), state: row.get(2) });
    }
    for row in client.query(PREPARED_TRANSACTIONS, &[]).await.map_err(fail("prepared transactions"))? {
        facts.prepared_transactions.push((row.get(0), row.get(1)));
    }
    facts.leftovers = strings(client, LEFTOVERS).await.map_err(fail("replication objects"))?;
    facts.slots_inactive = strings(client, SLOTS_INACTIVE).await.map_err(fail("replication slots"))?;
    Ok(facts)
}

async fn strings(client: &Client, text: &str) -> Result<Vec<String>, tokio_postgres::Error> {
    Ok(client.query(text, &[]).await?.iter().map(|row| row.get(0)).collect())
}

const SERVER: &str = "
    SELECT pg_catalog.current_setting('server_version_num')::int, pg_catalog.pg_is_in_recovery(), r.rolsuper, r.rolreplication,
           r.rolcreaterole OR r.rolsuper, pg_catalog.has_database_privilege(d.oid, 'CREATE'), r.rolname::text,
           (SELECT count(*) FROM pg_catalog.pg_replication_slots),
           (SELECT count(*) FROM pg_catalog.pg_stat_activity WHERE backend_type = 'walsender'),
           pg_catalog.current_setting('max_connections')::bigint - (SELECT count(*) FROM pg_catalog.pg_stat_activity WHERE backend_type = 'client backend'),
           pg_catalog.pg_encoding_to_char(d.encoding)::text, pg_catalog.concat_ws(' ', d.datcollate, d.datctype),
           pg_catalog.pg_database_size(d.oid),
           EXISTS (SELECT FROM pg_catalog.pg_namespace WHERE nspname = 'understudy'),
           (SELECT count(*) FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
            WHERE c.relkind = 'S' AND n.nspname <> 'understudy'),
           EXISTS (SELECT FROM pg_catalog.pg_largeobject_metadata),
           pg_catalog.concat_ws('/', s.system_identifier, pg_catalog.pg_postmaster_start_time(), d.datname)
    FROM pg_catalog.pg_database d, pg_catalog.pg_roles r, pg_catalog.pg_control_system() s
    WHERE d.datname = pg_catalog.current_database() AND r.rolname = current_user";

/// What a new session gets: the settings of this one are its own.
const SETTINGS: &str = "
    SELECT name, reset_val FROM pg_catalog.pg_settings WHERE name IN ('wal_level', 'max_replication_slots', 'max_wal_senders',
        'wal_sender_timeout', 'max_slot_wal_keep_size', 'default_transaction_read_only', 'standard_conforming_strings')";

/// Keyed: UPDATE and DELETE can be published as things are.
const RELATIONS: &str = "
    SELECT pg_catalog.format('%I.%I', n.nspname, c.relname), c.relkind::text, c.relpersistence::text,
           pg_catalog.pg_has_role(c.relowner, 'USAGE'),
           c.relreplident IN ('f', 'i') OR c.relreplident = 'd' AND EXISTS (
               SELECT FROM pg_catalog.pg_index i WHERE i.indrelid = c.oid AND i.indisprimary AND i.indisvalid)
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p', 'f', 'm') AND c.relpersistence <> 't' AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'understudy')
      AND n.nspname !~ '^pg_(toast|temp)' AND NOT EXISTS (
          SELECT FROM pg_catalog.pg_depend x WHERE x.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND x.objid = c.oid AND x.deptype = 'e')
    ORDER BY 1";

const EXTENSIONS: &str = "
    SELECT coalesce(e.extname::text, a.name::text), e.extversion, a.default_version
    FROM pg_catalog.pg_extension e FULL JOIN pg_catalog.pg_available_extensions() a ON a.name = e.extname ORDER BY 1";

/// Those that can log in, or own or may use something here.
const ROLES: &str = "
    SELECT r.rolname::text FROM pg_catalog.pg_roles r WHERE r.rolname !~ '^pg_' AND (r.rolcanlogin OR EXISTS (
        SELECT FROM pg_catalog.pg_shdepend d WHERE d.refclassid = 'pg_catalog.pg_authid'::pg_catalog.regclass AND d.refobjid = r.oid
          AND d.dbid IN (0, (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()))))
    ORDER BY 1";

/// Slot creation waits for all of them, in every database of the server.
const OPEN_TRANSACTIONS: &str = "
    SELECT pid, extract(epoch FROM pg_catalog.now() - xact_start)::float8, coalesce(state, 'unknown')
    FROM pg_catalog.pg_stat_activity
    WHERE backend_xid IS NOT NULL AND xact_start IS NOT NULL AND pid <> pg_catalog.pg_backend_pid() ORDER BY xact_start LIMIT 20";

const PREPARED_TRANSACTIONS: &str = "
    SELECT gid, extract(epoch FROM pg_catalog.now() - prepared)::float8 FROM pg_catalog.pg_prepared_xacts ORDER BY prepared LIMIT 20";

const LEFTOVERS: &str = "
    SELECT 'slot ' || slot_name FROM pg_catalog.pg_replication_slots
    WHERE slot_name LIKE 'understudy\\_%' AND NOT temporary AND database = pg_catalog.current_database()
    UNION ALL SELECT 'publication ' || pubname FROM pg_catalog.pg_publication WHERE pubname LIKE 'understudy\\_%'
    UNION ALL SELECT 'event trigger ' || evtname FROM pg_catalog.pg_event_trigger WHERE evtname LIKE 'understudy\\_%'
    ORDER BY 1";

const SLOTS_INACTIVE: &str = "
    SELECT slot_name::text FROM pg_catalog.pg_replication_slots
    WHERE slot_name LIKE 'understudy\\_%' AND NOT active AND database = pg_catalog.current_database() ORDER BY 1";
