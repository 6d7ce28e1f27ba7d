//! What a real catalog adds to classification: the names that a statement does not show to be volatile.

#[path = "support/pair.rs"]
mod pair;

use pair::Server;
use understudy::sql::{CatalogFacts, Classifier, Kind, SessionEffect};

const STAYS: Kind = Kind::Session(SessionEffect::Other);

const SCHEMA: &str = "
    CREATE SCHEMA app;
    CREATE TABLE t (id int PRIMARY KEY, v text); CREATE TABLE app.orders (id int);
    CREATE UNLOGGED TABLE quick (id int); CREATE SEQUENCE s; CREATE MATERIALIZED VIEW m AS SELECT 1 AS a;
    CREATE FUNCTION app.writes(int) RETURNS int LANGUAGE sql AS 'INSERT INTO t VALUES ($1) RETURNING id';
    CREATE FUNCTION app.reads(int) RETURNS int LANGUAGE sql STABLE AS 'SELECT $1';
    CREATE FUNCTION mixed(int) RETURNS int LANGUAGE sql STABLE AS 'SELECT $1';
    CREATE FUNCTION mixed(text) RETURNS int LANGUAGE sql VOLATILE AS 'SELECT 1';
    CREATE FUNCTION total(t) RETURNS int LANGUAGE sql VOLATILE AS 'SELECT 1';
    CREATE FUNCTION step(int, int) RETURNS int LANGUAGE sql VOLATILE AS 'SELECT $1 + $2';
    CREATE AGGREGATE adds (int) (sfunc = step, stype = int); CREATE AGGREGATE calm (int) (sfunc = int4pl, stype = int);
    CREATE OPERATOR <!> (leftarg = int, rightarg = int, function = step);
    CREATE OPERATOR <~> (leftarg = int, rightarg = int, function = int4pl);
    CREATE PROCEDURE proc() LANGUAGE sql AS 'SELECT 1';
    CREATE TYPE parcel AS (a int);
    CREATE FUNCTION unpack(text) RETURNS parcel LANGUAGE sql VOLATILE AS 'SELECT ROW(1)::parcel';
    CREATE CAST (text AS parcel) WITH FUNCTION unpack(text);
    CREATE DOMAIN fine AS int CHECK (VALUE > 0); CREATE DOMAIN costly AS int CHECK (app.writes(VALUE) > 0);
    CREATE VIEW plain AS SELECT id, upper(v) AS v FROM t;
    CREATE VIEW over_plain AS SELECT * FROM plain WHERE id > 0;
    CREATE VIEW numbered AS SELECT nextval('s') AS n, id FROM t;
    CREATE VIEW over_numbered AS SELECT id FROM numbered;
    CREATE VIEW over_m AS SELECT * FROM m;
    CREATE VIEW over_catalog AS SELECT relname FROM pg_class;
    CREATE TABLE guarded (id int); ALTER TABLE guarded ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON guarded USING (app.writes(id) > 0);
    CREATE TABLE private (id int); ALTER TABLE private ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON private USING (id > 0);
    CREATE TABLE parts (id int) PARTITION BY HASH (id); CREATE TABLE parts_0 PARTITION OF parts FOR VALUES WITH (modulus 1, remainder 0);
";

#[tokio::test(flavor = "multi_thread")]
async fn a_live_catalog_decides_what_is_a_read() {
    for major in [15, 18] {
        let server = Server::start(major, &[]);
        server.run("postgres", SCHEMA).await;
        let client = server.client("postgres").await;
        let classifier = Classifier::new(CatalogFacts::load(&client).await.unwrap());
        for (text, kind) in [
            ("SELECT * FROM t", Kind::Read),
            ("SELECT * FROM app.orders", Kind::Read),
            ("SELECT * FROM orders", Kind::Read),
            ("SELECT * FROM parts JOIN parts_0 USING (id)", Kind::Read),
            ("SELECT app.reads(1), lower(v), count(*) FILTER (WHERE id > 1) FROM t GROUP BY v", Kind::Read),
            ("SELECT app.writes(1)", Kind::Write),
            ("SELECT writes(1)", Kind::Write),
            ("SELECT mixed(1)", Kind::Write),
            ("SELECT t.total FROM t", Kind::Write),
            ("SELECT (t).total FROM t", Kind::Write),
            ("SELECT adds(id) FROM t", Kind::Write),
            ("SELECT calm(id) FROM t", Kind::Read),
            ("SELECT 1 <!> 2", Kind::Write),
            ("SELECT 1 OPERATOR(public.<!>) 2", Kind::Write),
            ("SELECT 1 <~> 2", Kind::Read),
            ("SELECT 'x'::text::parcel", Kind::Write),
            ("SELECT 1::fine", Kind::Read),
            ("SELECT 1::costly", Kind::Write),
            ("SELECT * FROM plain", Kind::Read),
            ("SELECT * FROM over_plain", Kind::Read),
            ("SELECT * FROM numbered", Kind::Write),
            ("SELECT id FROM over_numbered", Kind::Write),
            ("SELECT id FROM public.over_numbered", Kind::Write),
            ("SELECT * FROM over_m", STAYS),
            ("SELECT * FROM over_catalog", STAYS),
            ("SELECT * FROM m", STAYS),
            ("SELECT * FROM quick", STAYS),
            ("SELECT last_value FROM s", STAYS),
            ("SELECT * FROM guarded", Kind::Write),
            ("SELECT * FROM private", Kind::Read),
            ("SELECT * FROM nowhere", STAYS),
            ("INSERT INTO t VALUES (1)", Kind::Write),
            ("CALL proc()", Kind::Unknown),
        ] {
            assert_eq!(classifier.classify(text.as_bytes()).kind, kind, "{text} on {major}");
        }
        // What is called a read is one to the server, too.
        client.batch_execute("BEGIN READ ONLY; SELECT * FROM over_plain; SELECT calm(id) FROM t; SELECT 1 <~> 2; ROLLBACK").await.unwrap();

        server.run("postgres", "CREATE OR REPLACE VIEW plain AS SELECT (nextval('s'))::int AS id, v FROM t").await;
        classifier.replace_facts(CatalogFacts::load(&client).await.unwrap());
        assert_eq!(classifier.classify(b"SELECT * FROM over_plain").kind, Kind::Write);
    }
}

/// Every function that the built-in list calls harmless is not volatile on any version that we know.
#[tokio::test(flavor = "multi_thread")]
async fn the_built_in_list_agrees_with_servers() {
    let builtin = Classifier::new(CatalogFacts::builtin_only());
    for major in [15, 18] {
        let server = Server::start(major, &[]);
        let client = server.client("postgres").await;
        let text = "SELECT DISTINCT proname::text FROM pg_proc WHERE provolatile = 'v' AND pronamespace = 'pg_catalog'::regnamespace";
        for row in client.query(text, &[]).await.unwrap() {
            let name: String = row.get(0);
            let text = format!("SELECT pg_catalog.\"{name}\"()");
            assert_ne!(builtin.classify(text.as_bytes()).kind, Kind::Read, "{name} on {major}");
        }
    }
}
