//! The catalog queries, as SQL expressions that build JSON. The same text runs inside the capture functions on the
//! owner and in the loader on any server, so that a fact has one spelling whichever way it reached us.
//!
//! All of it is meant to run under `search_path = pg_catalog`: then `format_type`, `pg_get_expr` and their relatives
//! qualify every name that is not built in.

/// What others than its owner may do with an object, from its ACL as it is in effect: a missing one stands for the kind's own.
macro_rules! grants {
    ($acl:literal, $kind:literal, $owner:literal) => {
        concat!(
            "(SELECT jsonb_agg(jsonb_build_object('to', CASE WHEN g.grantee <> 0 THEN pg_get_userbyid(g.grantee) END,
    'privilege', g.privilege_type, 'grantable', g.grantable) ORDER BY g.grantee, g.privilege_type)
    FROM (SELECT x.grantee, x.privilege_type, bool_or(x.is_grantable) AS grantable FROM aclexplode(coalesce(",
            $acl,
            ", acldefault('",
            $kind,
            "', ",
            $owner,
            "))) x WHERE x.grantee <> ",
            $owner,
            " GROUP BY 1, 2) g)"
        )
    };
}

/// One relation (table, partitioned table, view, materialized view, foreign table) `c` in namespace `n`.
pub const RELATION: &str = r"jsonb_build_object(
 'oid', c.oid::bigint, 'schema', n.nspname, 'name', c.relname, 'kind', c.relkind::text, 'persistence', c.relpersistence::text,
 'owner', pg_get_userbyid(c.relowner),
 'grants', (SELECT jsonb_agg(jsonb_build_object('to', CASE WHEN g.grantee <> 0 THEN pg_get_userbyid(g.grantee) END,
    'privilege', g.privilege_type, 'grantable', g.grantable, 'column', g.attname) ORDER BY g.attname NULLS FIRST, g.grantee, g.privilege_type)
    FROM (SELECT NULL::name AS attname, x.grantee, x.privilege_type, bool_or(x.is_grantable) AS grantable FROM aclexplode(c.relacl) x
         WHERE x.grantee <> c.relowner GROUP BY 2, 3
       UNION ALL SELECT a.attname, x.grantee, x.privilege_type, bool_or(x.is_grantable) FROM pg_attribute a, aclexplode(a.attacl) x
         WHERE a.attrelid = c.oid AND NOT a.attisdropped AND x.grantee <> c.relowner GROUP BY 1, 2, 3) g),
 'replica_identity', c.relreplident::text, 'is_partition', c.relispartition,
 'parent', (SELECT i.inhparent::bigint FROM pg_inherits i WHERE i.inhrelid = c.oid ORDER BY i.inhseqno LIMIT 1),
 'parent_name', (SELECT format('%I.%I', pn.nspname, p.relname) FROM pg_inherits i JOIN pg_class p ON p.oid = i.inhparent
   JOIN pg_namespace pn ON pn.oid = p.relnamespace WHERE i.inhrelid = c.oid ORDER BY i.inhseqno LIMIT 1),
 'children', (SELECT jsonb_agg(i.inhrelid::bigint ORDER BY i.inhrelid) FROM pg_inherits i WHERE i.inhparent = c.oid),
 'bound', CASE WHEN c.relispartition THEN pg_get_expr(c.relpartbound, c.oid) END,
 'partition_key', CASE WHEN c.relkind = 'p' THEN pg_get_partkeydef(c.oid) END,
 'options', c.reloptions,
 'definition', CASE WHEN c.relkind IN ('v', 'm') THEN pg_get_viewdef(c.oid) END,
 'columns', coalesce((SELECT jsonb_agg(jsonb_build_object(
    'num', a.attnum, 'name', a.attname, 'type', format_type(a.atttypid, a.atttypmod), 'type_oid', a.atttypid::bigint,
    'typmod', a.atttypmod, 'type_kind', t.typtype::text,
    'collation', CASE WHEN a.attcollation <> t.typcollation THEN (SELECT format('%I.%I', cn.nspname, co.collname)
       FROM pg_collation co JOIN pg_namespace cn ON cn.oid = co.collnamespace WHERE co.oid = a.attcollation) END,
    'not_null', a.attnotnull, 'default', pg_get_expr(d.adbin, d.adrelid),
    'missing', CASE WHEN a.atthasmissing THEN (a.attmissingval::text::text[])[1] END,
    'identity', a.attidentity::text, 'generated', a.attgenerated::text, 'local', a.attislocal) ORDER BY a.attnum)
    FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
    LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
    WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped), '[]'),
 'dropped', (SELECT jsonb_agg(a.attnum ORDER BY a.attnum) FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND a.attisdropped),
 'constraints', coalesce((SELECT jsonb_agg(jsonb_build_object(
    'oid', k.oid::bigint, 'name', k.conname, 'kind', k.contype::text, 'def', pg_get_constraintdef(k.oid), 'validated', k.convalidated,
    'columns', k.conkey, 'inherited', k.conparentid <> 0 OR (k.coninhcount > 0 AND NOT k.conislocal),
    'ref', CASE WHEN k.contype = 'f' THEN (SELECT format('%I.%I', fn.nspname, f.relname) FROM pg_class f
       JOIN pg_namespace fn ON fn.oid = f.relnamespace WHERE f.oid = k.confrelid) END) ORDER BY k.contype DESC, k.oid)
    FROM pg_constraint k WHERE k.conrelid = c.oid AND k.contype IN ('p', 'u', 'f', 'c', 'x')), '[]'),
 'indexes', coalesce((SELECT jsonb_agg(jsonb_build_object(
    'oid', x.indexrelid::bigint, 'name', xc.relname, 'def', pg_get_indexdef(x.indexrelid), 'unique', x.indisunique, 'valid', x.indisvalid,
    'columns', x.indkey::int2[], 'predicate', x.indpred IS NOT NULL,
    'constraint', EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = x.indexrelid AND k.contype IN ('p', 'u', 'x')),
    'inherited', xc.relispartition) ORDER BY x.indexrelid)
    FROM pg_index x JOIN pg_class xc ON xc.oid = x.indexrelid WHERE x.indrelid = c.oid), '[]'),
 'triggers', coalesce((SELECT jsonb_agg(jsonb_build_object(
    'oid', g.oid::bigint, 'name', g.tgname, 'def', pg_get_triggerdef(g.oid), 'enabled', g.tgenabled::text) ORDER BY g.oid)
    FROM pg_trigger g WHERE g.tgrelid = c.oid AND NOT g.tgisinternal AND g.tgparentid = 0), '[]'))";

/// One user-made type `t` in namespace `n`: enum, domain or free-standing composite.
pub const TYPE: &str = concat!(
    "jsonb_build_object('owner', pg_get_userbyid(t.typowner), 'grants', ",
    grants!("t.typacl", "T", "t.typowner"),
    r", 'oid', t.oid::bigint, 'schema', n.nspname, 'name', t.typname, 'kind', t.typtype::text,
 'labels', (SELECT jsonb_agg(jsonb_build_object('oid', e.oid::bigint, 'label', e.enumlabel) ORDER BY e.enumsortorder)
    FROM pg_enum e WHERE e.enumtypid = t.oid),
 'base', CASE WHEN t.typtype = 'd' THEN format_type(t.typbasetype, t.typtypmod) END,
 'not_null', t.typnotnull, 'default', t.typdefault,
 'checks', (SELECT jsonb_agg(jsonb_build_object('name', k.conname, 'def', pg_get_constraintdef(k.oid)) ORDER BY k.conname)
    FROM pg_constraint k WHERE k.contypid = t.oid AND k.contype = 'c'),
 'attributes', CASE WHEN t.typtype = 'c' THEN (SELECT jsonb_agg(jsonb_build_object(
    'num', a.attnum, 'name', a.attname, 'type', format_type(a.atttypid, a.atttypmod)) ORDER BY a.attnum)
    FROM pg_attribute a WHERE a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped) END)"
);

/// One sequence `s` (pg_sequence) with class `c` in namespace `n`; not those of identity columns.
pub const SEQUENCE: &str = concat!(
    "jsonb_build_object('owner', pg_get_userbyid(c.relowner), 'grants', ",
    grants!("c.relacl", "s", "c.relowner"),
    r", 'oid', c.oid::bigint, 'schema', n.nspname, 'name', c.relname, 'type', format_type(s.seqtypid, NULL), 'start', s.seqstart::text,
 'increment', s.seqincrement::text, 'min', s.seqmin::text, 'max', s.seqmax::text, 'cache', s.seqcache::text, 'cycle', s.seqcycle,
 'owned_table', (SELECT format('%I.%I', tn.nspname, tc.relname) FROM pg_depend d JOIN pg_class tc ON tc.oid = d.refobjid
    JOIN pg_namespace tn ON tn.oid = tc.relnamespace
    WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.refclassid = 'pg_class'::regclass AND d.deptype = 'a'),
 'owned_by', (SELECT format('%I.%I.%I', tn.nspname, tc.relname, a.attname) FROM pg_depend d JOIN pg_class tc ON tc.oid = d.refobjid
    JOIN pg_namespace tn ON tn.oid = tc.relnamespace JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
    WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.refclassid = 'pg_class'::regclass AND d.deptype = 'a'))"
);

/// One schema `n`.
pub const SCHEMA: &str = concat!(
    "jsonb_build_object('oid', n.oid::bigint, 'name', n.nspname, 'owner', pg_get_userbyid(n.nspowner), 'grants', ",
    grants!("n.nspacl", "n", "n.nspowner"),
    ")"
);

/// One function, procedure or aggregate `p` in schema `n`, without its definition.
pub const ROUTINE: &str = concat!(
    "jsonb_build_object('oid', p.oid::bigint, 'schema', n.nspname, 'name', p.proname, 'kind', p.prokind::text,
 'arguments', pg_get_function_identity_arguments(p.oid), 'owner', pg_get_userbyid(p.proowner), 'grants', ",
    grants!("p.proacl", "f", "p.proowner"),
    ")"
);

/// Its definition, to be added to [`ROUTINE`].
pub const DEFINITION: &str = "jsonb_build_object('definition', CASE WHEN p.prokind IN ('f', 'p', 'w') THEN pg_get_functiondef(p.oid) END)";

/// What every role gives to others on objects that it makes later, as one list. Only what is granted to others than the role itself.
pub const DEFAULT_PRIVILEGES: &str = "coalesce((SELECT jsonb_agg(jsonb_build_object('role', pg_get_userbyid(d.defaclrole),
 'schema', (SELECT n.nspname FROM pg_namespace n WHERE n.oid = d.defaclnamespace), 'kind', d.defaclobjtype::text,
 'grants', (SELECT jsonb_agg(jsonb_build_object('to', CASE WHEN g.grantee <> 0 THEN pg_get_userbyid(g.grantee) END,
    'privilege', g.privilege_type, 'grantable', g.is_grantable) ORDER BY g.grantee, g.privilege_type)
    FROM aclexplode(d.defaclacl) g WHERE g.grantee <> d.defaclrole)) ORDER BY d.oid) FROM pg_default_acl d), '[]')";

/// Not a sequence behind an identity column (those come with the column).
pub const SEQUENCE_IS_FREE: &str = r"NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid
 AND d.refclassid = 'pg_class'::regclass AND d.deptype = 'i')";

/// Objects that belong to the server, to an extension or to us are not the application's schema.
pub const NAMESPACE_IS_USERS: &str =
    r"n.nspname NOT IN ('pg_catalog', 'information_schema', 'understudy') AND n.nspname !~ '^pg_(toast|temp)'";

/// `classid`, `objid` is no member of an extension.
pub fn not_of_extension(class: &str, oid: &str) -> String {
    format!("NOT EXISTS (SELECT FROM pg_depend x WHERE x.classid = '{class}'::regclass AND x.objid = {oid} AND x.deptype = 'e')")
}

/// A query for the whole catalog of a database as one JSON document; `filter` restricts the relations (alias `c`, `n`).
pub fn catalog_query(filter: &str) -> String {
    let relation_free = not_of_extension("pg_class", "c.oid");
    let routine_free = not_of_extension("pg_proc", "p.oid");
    let type_free = not_of_extension("pg_type", "t.oid");
    format!(
        "SELECT jsonb_build_object(
          'relations', coalesce((SELECT jsonb_agg({RELATION} ORDER BY c.oid) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
             WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND c.relpersistence <> 't' AND {NAMESPACE_IS_USERS} AND {relation_free} AND ({filter})), '[]'),
          'types', coalesce((SELECT jsonb_agg({TYPE} ORDER BY t.oid) FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace
             LEFT JOIN pg_class tc ON tc.oid = t.typrelid
             WHERE (t.typtype IN ('e', 'd') OR (t.typtype = 'c' AND tc.relkind = 'c')) AND {NAMESPACE_IS_USERS} AND {type_free}), '[]'),
          'sequences', coalesce((SELECT jsonb_agg({SEQUENCE} ORDER BY c.oid) FROM pg_sequence s JOIN pg_class c ON c.oid = s.seqrelid
             JOIN pg_namespace n ON n.oid = c.relnamespace
             WHERE c.relpersistence <> 't' AND {NAMESPACE_IS_USERS} AND {SEQUENCE_IS_FREE} AND {relation_free}), '[]'),
          'schemas', (SELECT jsonb_agg({SCHEMA} ORDER BY n.oid) FROM pg_namespace n WHERE {NAMESPACE_IS_USERS}),
          'functions', coalesce((SELECT jsonb_agg({ROUTINE} ORDER BY p.oid) FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
             WHERE {NAMESPACE_IS_USERS} AND {routine_free}), '[]'),
          'default_privileges', {DEFAULT_PRIVILEGES})::text"
    )
}
