//! What is installed on the owner of the writes so that DDL travels in the stream, at its place.
//!
//! Event triggers emit a transactional logical message (`pg_logical_emit_message`, prefix [`PREFIX`]) with the catalog's
//! facts after each DDL statement, never the statement's text: `current_query()` is the whole client string and replaying
//! it runs things twice. (Its words are looked at once, to find out whether a USING expression can be ruled out.)
//! Before 14 pgoutput carries no messages: they are rows of a published table instead.
//! A failing capture must never fail the application's DDL: it emits a message that says so.
//!
//! The triggers stay ENABLE (origin), so that what an applier does under `session_replication_role = replica` is not
//! captured again. Source: PostgreSQL documentation, "Event Triggers", "Event Trigger Functions".

use super::{
    describe::{
        DEFAULT_PRIVILEGES, DEFINITION, NAMESPACE_IS_USERS, RELATION, ROUTINE, SCHEMA, SEQUENCE, SEQUENCE_IS_FREE, TYPE, not_of_extension,
    },
    quote,
};

/// Prefix of the logical messages that carry DDL.
pub const PREFIX: &str = "understudy.ddl";

/// How something gets into the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// `pg_logical_emit_message`, which pgoutput carries from 14 on.
    Messages,
    /// A row of a published table of ours: for 13.
    Rows,
}

/// The table of [`Way::Rows`], published with the others. What is in it has been said.
pub const MESSAGE_TABLE: &str = "CREATE SCHEMA IF NOT EXISTS understudy;
CREATE TABLE IF NOT EXISTS understudy.message (id bigserial PRIMARY KEY, prefix text NOT NULL, content text NOT NULL)";

impl Way {
    /// For a server of this `server_version_num`.
    pub fn of(version: u32) -> Self {
        if version >= 140_000 { Way::Messages } else { Way::Rows }
    }

    /// The statement that says `content` (an SQL expression) under `prefix`, in the transaction that runs it; `call` is the word
    /// before a function call: `SELECT`, or `PERFORM` in PL/pgSQL.
    pub fn say(self, call: &str, prefix: &str, content: &str) -> String {
        let prefix = quote::literal(prefix);
        match self {
            Way::Messages => format!("{call} pg_catalog.pg_logical_emit_message(true, {prefix}, {content})"),
            Way::Rows => format!("INSERT INTO understudy.message (prefix, content) VALUES ({prefix}, {content})"),
        }
    }
}

/// Statements that install the capture for `publication`, to be run as one simple query by a superuser. Running them again
/// (also for another publication) replaces what is there.
pub fn install_sql(publication: &str, way: Way) -> String {
    let publication_literal = quote::literal(publication);
    let publication_ident = quote::literal(&quote::ident(publication));
    let emit = way.say(
        "PERFORM",
        PREFIX,
        &format!(
            r"(facts || jsonb_build_object(
    'version', 1, 'event', event,
    'rewritten', (SELECT jsonb_agg(jsonb_build_object('oid', split_part(r, ':', 1)::bigint, 'reason', split_part(r, ':', 2)::int))
       FROM regexp_split_to_table(trim(rewritten), ' ') r WHERE r <> ''),
    -- true: the client sent one plain ALTER TABLE without USING. Anything else (a DO block, a function) counts as unknown.
    'plain', query ~* '^\s*alter\s+table' AND query !~* '\m(using|select|do|call|execute|perform)\M',
    'relations', coalesce((SELECT jsonb_agg({RELATION} ORDER BY c.oid) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
       WHERE c.oid = ANY (described) AND c.relkind IN ('r', 'p', 'v', 'm', 'f') AND c.relpersistence <> 't' AND {NAMESPACE_IS_USERS}), '[]')
  ))::text"
        ),
    );
    let failed =
        way.say("PERFORM", PREFIX, "jsonb_build_object('version', 1, 'event', 'capture_failed', 'tag', tag, 'error', reason)::text");
    let (free_relation, free_routine, free_type) =
        (not_of_extension("pg_class", "c.oid"), not_of_extension("pg_proc", "p.oid"), not_of_extension("pg_type", "t.oid"));
    // A row counts with the start of its record, a message with the end of its own, which is the start of the next: a row right behind
    // the message would be at the same place and could come first. It overtakes this one instead, which says nothing.
    let after = match way {
        Way::Messages => "PERFORM pg_logical_emit_message(true, 'understudy.after', '');",
        Way::Rows => "",
    };
    format!(
        r#"
CREATE SCHEMA IF NOT EXISTS understudy;

CREATE OR REPLACE FUNCTION understudy.ddl_emit(event text, facts jsonb, touched oid[]) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET standard_conforming_strings = on AS $understudy$
DECLARE
  described oid[];
  rewritten text := coalesce(current_setting('understudy.rewritten', true), '');
  query text := coalesce(current_query(), '');
BEGIN
  WITH RECURSIVE t(oid) AS (
    SELECT unnest(touched) UNION SELECT i.inhrelid FROM pg_inherits i JOIN t ON i.inhparent = t.oid
  ) SELECT array_agg(oid) INTO described FROM t;
  {emit};
  {after}
END $understudy$;

CREATE OR REPLACE FUNCTION understudy.ddl_failed(tag text, reason text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET standard_conforming_strings = on AS $understudy$
BEGIN
  {failed};
EXCEPTION WHEN OTHERS THEN NULL;
END $understudy$;

-- Keeps new tables in the publication, and tables without a key able to UPDATE and DELETE while they are published.
CREATE OR REPLACE FUNCTION understudy.ddl_publish(touched oid[]) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET standard_conforming_strings = on AS $understudy$
DECLARE
  publication pg_publication;
  relation record;
BEGIN
  SELECT * INTO publication FROM pg_publication WHERE pubname = {publication_literal};
  IF NOT FOUND THEN RETURN; END IF;
  PERFORM set_config('understudy.busy', 'on', true);
  FOR relation IN
    SELECT c.oid, c.relkind, c.relispartition, c.relreplident, format('%I.%I', n.nspname, c.relname) AS name,
      EXISTS (SELECT FROM pg_publication_rel r WHERE r.prpubid = publication.oid AND r.prrelid = c.oid) AS published,
      EXISTS (SELECT FROM pg_index x WHERE x.indrelid = c.oid AND x.indisprimary) AS keyed
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    -- A partition that was detached is not named by the command, and is a table of its own from now on.
    WHERE (c.oid = ANY (touched) OR NOT c.relispartition
        AND NOT EXISTS (SELECT FROM pg_publication_rel r WHERE r.prpubid = publication.oid AND r.prrelid = c.oid))
      AND c.relkind IN ('r', 'p') AND c.relpersistence = 'p' AND {NAMESPACE_IS_USERS}
      AND NOT EXISTS (SELECT FROM pg_depend x WHERE x.classid = 'pg_class'::regclass AND x.objid = c.oid AND x.deptype = 'e')
  LOOP
    IF NOT relation.keyed AND relation.relreplident = 'd' THEN
      EXECUTE format('ALTER TABLE %s REPLICA IDENTITY FULL', relation.name);
    END IF;
    IF NOT publication.puballtables AND NOT relation.relispartition AND NOT relation.published THEN
      EXECUTE format('ALTER PUBLICATION %s ADD TABLE %s', {publication_ident}, relation.name);
    END IF;
  END LOOP;
  PERFORM set_config('understudy.busy', 'off', true);
END $understudy$;

CREATE OR REPLACE FUNCTION understudy.ddl_rewrite() RETURNS event_trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET standard_conforming_strings = on AS $understudy$
BEGIN
  PERFORM set_config('understudy.rewritten', coalesce(current_setting('understudy.rewritten', true), '')
    || format('%s:%s ', pg_event_trigger_table_rewrite_oid()::bigint, pg_event_trigger_table_rewrite_reason()), true);
EXCEPTION WHEN OTHERS THEN PERFORM understudy.ddl_failed('table rewrite', SQLERRM);
END $understudy$;

-- What this transaction has written to the catalog: the newest of it is what the statement did. What others have written since it
-- began comes along, and says nothing new.
CREATE OR REPLACE FUNCTION understudy.ddl_granted(text) RETURNS TABLE (class text, oid oid, sub int, tag text, identity text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET standard_conforming_strings = on AS $understudy$
  WITH own(age) AS (SELECT age(pg_current_xact_id()::xid))
  SELECT 'pg_class', c.oid, 0, $1, format('%I.%I', n.nspname, c.relname) FROM own, pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S') AND c.relpersistence <> 't' AND {NAMESPACE_IS_USERS} AND {free_relation}
      AND (age(c.xmin) <= own.age OR EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND age(a.xmin) <= own.age))
  UNION ALL SELECT 'pg_proc', p.oid, 0, $1, format('%I.%I', n.nspname, p.proname) FROM own, pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
    WHERE {NAMESPACE_IS_USERS} AND {free_routine} AND age(p.xmin) <= own.age
  UNION ALL SELECT 'pg_type', t.oid, 0, $1, format('%I.%I', n.nspname, t.typname) FROM own, pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace
    LEFT JOIN pg_class tc ON tc.oid = t.typrelid
    WHERE (t.typtype IN ('e', 'd') OR (t.typtype = 'c' AND tc.relkind = 'c')) AND {NAMESPACE_IS_USERS} AND {free_type} AND age(t.xmin) <= own.age
  UNION ALL SELECT 'pg_namespace', n.oid, 0, $1, quote_ident(n.nspname) FROM own, pg_namespace n
    WHERE {NAMESPACE_IS_USERS} AND age(n.xmin) <= own.age
$understudy$;

CREATE OR REPLACE FUNCTION understudy.ddl_end() RETURNS event_trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET standard_conforming_strings = on AS $understudy$
DECLARE
  commands jsonb;
  touched oid[];
  more jsonb;
  granted boolean;
BEGIN
  IF current_setting('understudy.busy', true) = 'on' THEN RETURN; END IF;
  SELECT jsonb_agg(jsonb_build_object('class', d.classid::regclass::text, 'oid', d.objid::bigint, 'sub', d.objsubid,
           'tag', d.command_tag, 'type', d.object_type, 'schema', d.schema_name, 'identity', d.object_identity)),
         array_agg(DISTINCT CASE
           WHEN d.classid = 'pg_class'::regclass THEN coalesce((SELECT x.indrelid FROM pg_index x WHERE x.indexrelid = d.objid), d.objid)
           WHEN d.classid = 'pg_trigger'::regclass THEN (SELECT g.tgrelid FROM pg_trigger g WHERE g.oid = d.objid)
           WHEN d.classid = 'pg_constraint'::regclass THEN (SELECT k.conrelid FROM pg_constraint k WHERE k.oid = d.objid)
           WHEN d.classid = 'pg_attrdef'::regclass THEN (SELECT a.adrelid FROM pg_attrdef a WHERE a.oid = d.objid)
           WHEN d.classid = 'pg_type'::regclass THEN (SELECT nullif(t.typrelid, 0) FROM pg_type t WHERE t.oid = d.objid) END)
    INTO commands, touched
    FROM pg_event_trigger_ddl_commands() d
    WHERE d.objid IS NOT NULL AND NOT d.in_extension AND coalesce(d.schema_name, '') NOT IN ('understudy', 'pg_temp', 'pg_toast')
      AND d.object_identity !~ '^pg_temp\.'
      AND NOT (d.classid = 'pg_class'::regclass AND EXISTS (SELECT FROM pg_class c WHERE c.oid = d.objid AND c.relpersistence = 't'))
      AND NOT (d.classid = 'pg_namespace'::regclass AND d.object_identity = 'understudy')
      AND NOT (d.classid = 'pg_publication'::regclass OR d.classid = 'pg_publication_rel'::regclass OR d.object_type = 'publication');
  -- GRANT names nothing that it changed.
  SELECT bool_or(d.command_tag IN ('GRANT', 'REVOKE', 'ALTER DEFAULT PRIVILEGES')) INTO granted
    FROM pg_event_trigger_ddl_commands() d WHERE NOT d.in_extension;
  granted := coalesce(granted, false) OR tg_tag IN ('DROP OWNED', 'REASSIGN OWNED');
  IF granted THEN
    SELECT jsonb_agg(to_jsonb(g) || jsonb_build_object('oid', g.oid::bigint)), array_agg(g.oid) FILTER (WHERE g.class = 'pg_class') || touched INTO more, touched
      FROM understudy.ddl_granted(tg_tag) g;
    commands := coalesce(commands, '[]') || coalesce(more, '[]');
    IF commands = '[]' AND tg_tag <> 'ALTER DEFAULT PRIVILEGES' THEN commands := NULL; END IF;
  END IF;
  IF commands IS NULL THEN
    PERFORM set_config('understudy.rewritten', '', true);
    RETURN;
  END IF;
  PERFORM understudy.ddl_publish(touched);
  PERFORM understudy.ddl_emit('ddl', jsonb_build_object('tag', tg_tag, 'commands', commands,
    'sequences', (SELECT jsonb_agg({SEQUENCE} ORDER BY c.oid) FROM pg_sequence s JOIN pg_class c ON c.oid = s.seqrelid
       JOIN pg_namespace n ON n.oid = c.relnamespace
       WHERE c.oid IN (SELECT (e->>'oid')::oid FROM jsonb_array_elements(commands) e WHERE e->>'class' = 'pg_class')
         AND c.relpersistence <> 't' AND {NAMESPACE_IS_USERS} AND {SEQUENCE_IS_FREE}),
    'types', (SELECT jsonb_agg({TYPE} ORDER BY t.oid) FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace
       LEFT JOIN pg_class tc ON tc.oid = t.typrelid
       WHERE (t.oid IN (SELECT (e->>'oid')::oid FROM jsonb_array_elements(commands) e WHERE e->>'class' = 'pg_type')
           OR (t.typtype = 'c' AND t.typrelid IN (SELECT (e->>'oid')::oid FROM jsonb_array_elements(commands) e WHERE e->>'class' = 'pg_class'))
           OR t.oid IN (SELECT k.contypid FROM jsonb_array_elements(commands) e JOIN pg_constraint k ON k.oid = (e->>'oid')::oid
               WHERE e->>'class' = 'pg_constraint'))
         AND (t.typtype IN ('e', 'd') OR (t.typtype = 'c' AND tc.relkind = 'c')) AND {NAMESPACE_IS_USERS}),
    'functions', (SELECT jsonb_agg({ROUTINE} || {DEFINITION} ORDER BY p.oid)
       FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
       WHERE p.oid IN (SELECT (e->>'oid')::oid FROM jsonb_array_elements(commands) e WHERE e->>'class' = 'pg_proc') AND {NAMESPACE_IS_USERS}),
    'schemas', (SELECT jsonb_agg({SCHEMA} ORDER BY n.oid) FROM pg_namespace n
       WHERE n.oid IN (SELECT (e->>'oid')::oid FROM jsonb_array_elements(commands) e WHERE e->>'class' = 'pg_namespace') AND {NAMESPACE_IS_USERS}),
    'extensions', (SELECT jsonb_agg(jsonb_build_object('name', x.extname, 'version', x.extversion, 'schema', n.nspname)) FROM pg_extension x
       JOIN pg_namespace n ON n.oid = x.extnamespace
       WHERE x.oid IN (SELECT (e->>'oid')::oid FROM jsonb_array_elements(commands) e WHERE e->>'class' = 'pg_extension'))
    ) || CASE WHEN granted THEN jsonb_build_object('default_privileges', {DEFAULT_PRIVILEGES}) ELSE '{{}}' END, touched);
  PERFORM set_config('understudy.rewritten', '', true);
EXCEPTION WHEN OTHERS THEN PERFORM understudy.ddl_failed(tg_tag, SQLERRM);
END $understudy$;

CREATE OR REPLACE FUNCTION understudy.ddl_drop() RETURNS event_trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET standard_conforming_strings = on AS $understudy$
DECLARE
  dropped jsonb;
  touched oid[];
BEGIN
  IF current_setting('understudy.busy', true) = 'on' THEN RETURN; END IF;
  SELECT jsonb_agg(jsonb_build_object('class', d.classid::regclass::text, 'oid', d.objid::bigint, 'sub', d.objsubid,
           'original', d.original, 'normal', d.normal, 'type', d.object_type, 'schema', d.schema_name, 'name', d.object_name,
           'identity', d.object_identity, 'names', d.address_names, 'args', d.address_args)),
         array_agg(DISTINCT CASE
           WHEN d.objsubid > 0 THEN d.objid
           WHEN d.object_type IN ('table constraint', 'default value', 'trigger', 'rule', 'policy') AND cardinality(d.address_names) >= 2
             THEN to_regclass(format('%I.%I', d.address_names[1], d.address_names[2]))::oid END)
    INTO dropped, touched
    FROM pg_event_trigger_dropped_objects() d
    WHERE NOT d.is_temporary AND coalesce(d.schema_name, '') NOT IN ('understudy', 'pg_temp', 'pg_toast') AND d.object_identity <> 'understudy'
      AND d.object_type NOT IN ('toast table', 'publication relation', 'publication', 'event trigger')
      AND d.object_identity !~ '^pg_(temp|toast)';
  IF dropped IS NULL THEN RETURN; END IF;
  PERFORM understudy.ddl_publish(touched);
  PERFORM understudy.ddl_emit('drop', jsonb_build_object('tag', tg_tag, 'dropped', dropped), touched);
EXCEPTION WHEN OTHERS THEN PERFORM understudy.ddl_failed(tg_tag, SQLERRM);
END $understudy$;

REVOKE ALL ON FUNCTION understudy.ddl_end(), understudy.ddl_drop(), understudy.ddl_rewrite(), understudy.ddl_emit(text, jsonb, oid[]),
  understudy.ddl_failed(text, text), understudy.ddl_publish(oid[]), understudy.ddl_granted(text) FROM PUBLIC;
DROP EVENT TRIGGER IF EXISTS understudy_ddl_end;
DROP EVENT TRIGGER IF EXISTS understudy_ddl_drop;
DROP EVENT TRIGGER IF EXISTS understudy_ddl_rewrite;
CREATE EVENT TRIGGER understudy_ddl_end ON ddl_command_end EXECUTE FUNCTION understudy.ddl_end();
CREATE EVENT TRIGGER understudy_ddl_drop ON sql_drop EXECUTE FUNCTION understudy.ddl_drop();
CREATE EVENT TRIGGER understudy_ddl_rewrite ON table_rewrite EXECUTE FUNCTION understudy.ddl_rewrite();
"#
    )
}

/// Statements that remove the capture, to be run as one simple query by a superuser. Harmless where nothing is installed; other
/// objects in the schema `understudy` (the feed's progress, say) stay, and with them the schema.
pub fn remove_sql() -> String {
    r"
DROP EVENT TRIGGER IF EXISTS understudy_ddl_end;
DROP EVENT TRIGGER IF EXISTS understudy_ddl_drop;
DROP EVENT TRIGGER IF EXISTS understudy_ddl_rewrite;
DROP FUNCTION IF EXISTS understudy.ddl_end(), understudy.ddl_drop(), understudy.ddl_rewrite(),
  understudy.ddl_emit(text, jsonb, oid[]), understudy.ddl_failed(text, text), understudy.ddl_publish(oid[]), understudy.ddl_granted(text);
DO $understudy$ BEGIN
  IF EXISTS (SELECT FROM pg_namespace WHERE nspname = 'understudy') THEN DROP SCHEMA understudy RESTRICT; END IF;
EXCEPTION WHEN dependent_objects_still_exist THEN NULL;
END $understudy$;
"
    .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_publication_name_cannot_break_out() {
        let sql = install_sql("pub'\"x", Way::Messages);
        assert!(sql.contains(r#"pubname = 'pub''"x'"#));
        assert!(sql.contains(r#"'"pub''""x"'"#));
        assert!(!sql.contains("ENABLE ALWAYS"));
        assert!(!install_sql("p", Way::Rows).contains("pg_logical_emit_message"));
    }
}
