//! `understudy check --ddl` on real servers: what is foretold is compared with what the source then does.

#[path = "support/schema_servers.rs"]
mod servers;

use servers::Server;
use understudy::{check, config};

const SETUP: &str = "
CREATE TABLE item (id int PRIMARY KEY, tag text, code varchar(20), amount numeric(10,4), parent int, at timestamp, dup int);
INSERT INTO item SELECT g, CASE WHEN g % 25 = 0 THEN 'x' || g ELSE g::text END, 'c' || g, g / 3.0, nullif(g % 10, 0), now(), g % 40
FROM generate_series(1, 50) g;
CREATE TABLE parent (id int PRIMARY KEY);
INSERT INTO parent SELECT g FROM generate_series(1, 8) g;
CREATE VIEW codes AS SELECT code FROM item;
CREATE FUNCTION total() RETURNS numeric LANGUAGE plpgsql AS $$ BEGIN RETURN (SELECT sum(amount) FROM item); END $$;
ANALYZE";

/// Each statement alone, and whether it breaks. The source is asked afterwards; `false` for what succeeds but breaks something later.
const STEPS: [(&str, bool); 18] = [
    ("ALTER TABLE item ADD COLUMN a int NOT NULL", true),
    ("ALTER TABLE item ADD COLUMN a int NOT NULL DEFAULT 1", false),
    ("ALTER TABLE item ALTER tag TYPE int", true),
    ("ALTER TABLE item ALTER tag TYPE int USING tag::int", true),
    ("ALTER TABLE item ALTER tag TYPE int USING nullif(regexp_replace(tag, '\\D', '', 'g'), '')::int", false),
    ("ALTER TABLE item ALTER tag TYPE varchar(2)", true),
    ("ALTER TABLE item ALTER tag TYPE varchar(3)", false),
    ("ALTER TABLE item ALTER code TYPE text", true),
    ("ALTER TABLE item ALTER id TYPE bigint", false),
    ("ALTER TABLE item ALTER parent SET NOT NULL", true),
    ("ALTER TABLE item ALTER at SET NOT NULL", false),
    ("ALTER TABLE item ADD UNIQUE (dup)", true),
    ("ALTER TABLE item ADD FOREIGN KEY (parent) REFERENCES parent", true),
    ("ALTER TABLE item ADD FOREIGN KEY (parent) REFERENCES parent NOT VALID", false),
    ("ALTER TABLE item ADD CHECK (dup < 39)", true),
    ("ALTER TABLE item ADD CHECK (dup < 40)", false),
    ("ALTER TABLE item DROP code", true),
    ("ALTER TABLE item ALTER amount TYPE numeric(10,1)", false),
];

#[tokio::test(flavor = "multi_thread")]
async fn what_check_foretells_is_what_the_source_does() {
    let (source, shadow) = (Server::start(15), Server::start(18));
    let client = source.connect("postgres").await;
    client.batch_execute(SETUP).await.unwrap();
    let url = |server: &Server| format!("postgres://postgres@127.0.0.1:{}/postgres", server.port);
    let text = format!(
        "[[database]]\nname = \"shop\"\nsource = \"{}\"\n[[database.shadow]]\nname = \"next\"\nurl = \"{}\"\n",
        url(&source),
        url(&shadow)
    );
    let config = config::parse(&text, "proxy.toml", &|_| None).unwrap();
    for (sql, breaks) in STEPS {
        let forecast = check::forecast(&config, sql).await.unwrap();
        let shown = check::render_forecast(&forecast, false);
        assert_eq!(check::breaks(&forecast), breaks, "{sql}\n{shown}");
        client.batch_execute("BEGIN").await.unwrap();
        let done = client.batch_execute(sql).await;
        client.batch_execute("ROLLBACK").await.unwrap();
        assert_eq!(done.is_err(), breaks, "{sql}: {done:?}\n{shown}");
        if let Some(code) = done.err().and_then(|error| error.code().map(|code| code.code().to_owned())) {
            assert!(shown.contains(&code), "{sql} fails with {code}\n{shown}");
        }
    }
    // Examples are keys, values stay on the server; what only breaks later is named.
    let shown =
        check::render_forecast(&check::forecast(&config, "ALTER TABLE item ALTER tag TYPE int USING tag::int").await.unwrap(), false);
    assert!(shown.contains("2 of 50 rows fail, for instance key 25, 50") && !shown.contains("x25"), "{shown}");
    let shown = check::render_forecast(&check::forecast(&config, "ALTER TABLE item RENAME amount TO sum").await.unwrap(), false);
    assert!(shown.contains("BREAKS") && shown.contains("total()"), "{shown}");
    let lossy = check::forecast(&config, "ALTER TABLE item ALTER amount TYPE numeric(10,1)").await.unwrap();
    assert!(lossy[0].steps[0].rollback.starts_with("not lossless") && lossy[0].steps[0].shadow.contains("asks a person"));
    assert!(check::forecast(&config, "ALTER TABEL item").await.unwrap_err().to_string().contains("not SQL"));
    let unchanged: i64 = client.query_one("SELECT count(*) FROM item WHERE tag LIKE 'x%'", &[]).await.unwrap().get(0);
    assert_eq!(unchanged, 2);
}
