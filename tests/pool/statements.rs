//! Prepared statements that follow a client.

use crate::{
    harness::ask,
    raw::{Raw, Request, codes, tags},
    stage::Stage,
};
use understudy::wire::{Message, backend::ErrorFields};

fn value(messages: &[Message]) -> String {
    let row = messages.iter().find(|message| message.tag == b'D').unwrap_or_else(|| panic!("{} {:?}", tags(messages), codes(messages)));
    String::from_utf8_lossy(understudy::wire::backend::data_row(&row.body).unwrap()[0].unwrap()).into_owned()
}

async fn run(raw: &mut Raw, request: Request) -> Vec<Message> {
    raw.send(&request.sync().0).await;
    raw.until_ready(1).await
}

fn call(name: &str, parameter: &str) -> Request {
    Request::new().bind("", name, &[], &[Some(parameter.as_bytes())], &[]).describe(b'P', "").execute("", 0)
}

/// Two clients, two connections, changing places: while `holder` is inside a transaction, the others get the other one.
pub async fn named(stage: &Stage) {
    let (mut one, mut two, mut holder) = (stage.raw().await, stage.raw().await, stage.raw().await);
    run(&mut one, Request::new().parse("s", "SELECT v + $1::int FROM item WHERE id = 1", &[])).await;
    run(&mut two, Request::new().parse("s", "SELECT v - $1::int FROM item WHERE id = 2", &[])).await;
    for round in 0..6 {
        if round % 2 == 0 {
            holder.query("BEGIN").await;
        } else {
            holder.query("COMMIT").await;
        }
        let seen = run(&mut one, call("s", "1")).await;
        assert_eq!((tags(&seen).as_str(), value(&seen).as_str()), ("2TDCZ", "11"), "{:?}", codes(&seen));
        let seen = run(&mut two, call("s", "1")).await;
        assert_eq!((tags(&seen).as_str(), value(&seen).as_str()), ("2TDCZ", "19"), "{:?}", codes(&seen));
        let seen = run(&mut one, Request::new().describe(b'S', "s")).await;
        assert_eq!(tags(&seen), "tTZ");
    }
    // parse, use, close and parse again in one batch; and several cycles at once
    let batch =
        Request::new().parse("t", "SELECT 1", &[]).bind("", "t", &[], &[], &[]).execute("", 0).close(b'S', "t").parse("t", "SELECT 2", &[]);
    let batch = batch.bind("", "t", &[], &[], &[]).execute("", 0).close(b'S', "t");
    assert_eq!(tags(&run(&mut one, batch).await), "12DC312DC3Z");
    let pipeline = (0..20).fold(Request::new(), |request, k| {
        let request = request.parse(&format!("p{k}"), format!("SELECT {k}"), &[]).bind("", &format!("p{k}"), &[], &[], &[]);
        request.execute("", 0).sync()
    });
    one.send(&pipeline.0).await;
    assert_eq!(tags(&one.until_ready(20).await), "12DCZ".repeat(20));
    // the same text and types are one statement on a connection, whatever clients call it
    let mut names = Vec::new();
    for k in 0..5 {
        let mut raw = stage.raw().await;
        let name = format!("mine{k}");
        run(&mut raw, Request::new().parse(&name, "SELECT 'shared'", &[])).await;
        run(&mut raw, Request::new().bind("", &name, &[], &[], &[]).execute("", 0)).await;
        names.push(raw.value("SELECT count(*) FROM pg_prepared_statements WHERE statement = 'SELECT ''shared'''").await);
    }
    assert!(names.iter().all(|count| count == "1"), "{names:?}");
    // under another search_path the same text is another statement
    stage.direct().await.batch_execute("CREATE SCHEMA IF NOT EXISTS s2; CREATE TABLE s2.item AS SELECT 'other'::text AS v; GRANT USAGE ON SCHEMA s2 TO PUBLIC; GRANT ALL ON s2.item TO PUBLIC").await.unwrap();
    two.query("SET search_path TO s2").await;
    for (raw, expected) in [(&mut one, "10"), (&mut two, "other")] {
        run(raw, Request::new().parse("path", "SELECT v FROM item LIMIT 1", &[])).await;
        assert_eq!(value(&run(raw, Request::new().bind("", "path", &[], &[], &[]).execute("", 0)).await), expected);
    }
}

/// Literals become constants when a statement is prepared: under whose settings must not depend on who came first.
pub async fn constants(stage: &Stage) {
    let text = "SELECT timestamptz '2024-01-01 00:00' = timestamptz '2024-01-01 00:00+00'";
    let zone = |zone: &'static [u8]| [(&b"TimeZone"[..], zone)];
    let (mut utc, mut york) = (stage.raw_with(&zone(b"UTC")).await, stage.raw_with(&zone(b"America/New_York")).await);
    let go = || Request::new().bind("", "s", &[], &[], &[]).execute("", 0);
    run(&mut utc, Request::new().parse("s", text, &[])).await;
    assert_eq!(value(&run(&mut utc, go()).await), "t");
    run(&mut york, Request::new().parse("s", text, &[])).await;
    for (raw, expected) in [(&mut utc, "t"), (&mut york, "f")] {
        assert_eq!(value(&run(raw, go()).await), expected);
    }
    // who changes its settings behind the Parse does not prepare for others under them
    let (mut mover, mut other) = (stage.raw_with(&zone(b"UTC")).await, stage.raw_with(&zone(b"UTC")).await);
    for raw in [&mut mover, &mut other] {
        run(raw, Request::new().parse("s", text, &[])).await;
    }
    mover.query("SET TimeZone = 'Asia/Tokyo'").await;
    york.query("DEALLOCATE ALL").await; // whoever comes next prepares anew
    run(&mut mover, go()).await;
    assert_eq!(value(&run(&mut other, go()).await), "t");
}

pub async fn errors(stage: &Stage) {
    let (mut pooled, mut direct) = (stage.raw().await, direct(stage).await);
    let requests = [
        Request::new().parse("a", "SELECT 1", &[]),
        Request::new().parse("a", "SELECT 2", &[]),
        Request::new().bind("", "a", &[], &[], &[]).execute("", 0),
        Request::new().bind("", "never", &[], &[], &[]).execute("", 0),
        Request::new().describe(b'S', "never"),
        Request::new().close(b'S', "never"),
        Request::new().parse("wrong", "SELEC 1", &[]).bind("", "wrong", &[], &[], &[]),
        Request::new().bind("", "wrong", &[], &[], &[]).execute("", 0),
        Request::new().parse("wrong", "SELECT 3", &[]).bind("", "wrong", &[], &[], &[]).execute("", 0),
        Request::new().parse("b", "SELECT 1", &[]).parse("c", "SELECT nonsense", &[]).parse("d", "SELECT 1", &[]),
        Request::new().bind("", "b", &[], &[], &[]).execute("", 0),
        Request::new().bind("", "d", &[], &[], &[]).execute("", 0),
        Request::new().parse("e", "SELECT 1/0", &[]).bind("", "e", &[], &[], &[]).execute("", 0).parse("f", "SELECT 1", &[]),
        Request::new().bind("", "f", &[], &[], &[]).execute("", 0),
        Request::new().parse("f", "SELECT 5", &[]).bind("", "f", &[], &[], &[]).execute("", 0),
        Request::new().close(b'S', "f").bind("", "f", &[], &[], &[]),
        Request::new()
            .parse("b", "SELECT 1", &[])
            .sync()
            .close(b'S', "b")
            .sync()
            .parse("b", "SELECT 7", &[])
            .sync()
            .bind("", "b", &[], &[], &[])
            .execute("", 0),
        // an error that names the statement names the client's
        Request::new().bind("", "b", &[], &[Some(b"one too many")], &[]).execute("", 0),
    ];
    for (at, request) in requests.into_iter().enumerate() {
        let syncs = 1 + [0, 3][usize::from(at == 16)];
        let mut seen = Vec::new();
        for raw in [&mut pooled, &mut direct] {
            raw.send(&request.clone().sync().0).await;
            let messages = raw.until_ready(syncs).await;
            let errors: Vec<_> = messages.iter().filter(|m| m.tag == b'E').map(|m| ErrorFields::parse(&m.body)).collect();
            seen.push((tags(&messages), errors.into_iter().map(|e| (e.code, e.message)).collect::<Vec<_>>()));
        }
        assert_eq!(seen[0], seen[1], "request {at}");
    }
    // nothing of it is left for others on the connection
    let mut other = stage.raw().await;
    assert_eq!(other.value("SELECT count(*) FROM pg_prepared_statements WHERE name NOT LIKE 'understudy%'").await, "0");
}

async fn direct(stage: &Stage) -> Raw {
    // the server wants a password; the pooled client's requests are what counts
    let mut raw = Raw::connect(stage.server.port()).await;
    raw.send(&crate::raw::startup(196_608, &[(b"user", b"app"), (b"database", b"shop")])).await;
    let mut log_in = understudy::backend::Connection::open(&stage.server.app_url("shop"), &[]).await.unwrap();
    log_in.simple_query("SELECT 1").await.unwrap();
    let understudy::net::Stream::Tcp(stream) = log_in.stream else { panic!("not TCP") };
    raw.stream = stream;
    raw
}

pub async fn sql(stage: &Stage) {
    let (mut one, mut other) = (stage.raw_with(&[(b"application_name", b"sql")]).await, stage.raw().await);
    let prepare = |raw: &'static str| Request::new().parse(raw, "SELECT 'there'", &[]);
    let there = |name: &str| Request::new().bind("", name, &[], &[], &[]).execute("", 0);
    // DEALLOCATE of what was prepared by protocol, by both protocols (psycopg does)
    for by_query in [true, false] {
        run(&mut one, prepare("_pg3_0")).await;
        assert_eq!(tags(&run(&mut one, there("_pg3_0")).await), "2DCZ");
        let text = "DEALLOCATE \"_pg3_0\"";
        let seen = match by_query {
            true => one.query(text).await,
            false => run(&mut one, Request::new().parse("", text, &[]).bind("", "", &[], &[], &[]).execute("", 0)).await,
        };
        assert_eq!(tags(&seen), if by_query { "CZ" } else { "12CZ" }, "{:?}", codes(&seen));
        assert_eq!(codes(&run(&mut one, there("_pg3_0")).await), ["26000"]);
        assert_eq!(codes(&one.query(text).await), ["26000"]);
    }
    // ALL: also in one batch with what comes behind it
    for text in ["DEALLOCATE ALL", "DISCARD ALL"] {
        run(&mut one, prepare("x")).await;
        run(&mut other, prepare("x")).await;
        one.query(text).await;
        assert_eq!(codes(&run(&mut one, there("x")).await), ["26000"], "{text}");
        assert_eq!(tags(&run(&mut other, there("x")).await), "2DCZ", "{text} of one client is not another's");
        run(&mut other, Request::new().close(b'S', "x")).await;
    }
    run(&mut one, prepare("y")).await;
    let batch =
        Request::new().parse("", "DEALLOCATE ALL", &[]).bind("", "", &[], &[], &[]).execute("", 0).parse("y", "SELECT 'again'", &[]);
    assert_eq!(tags(&run(&mut one, batch.bind("", "y", &[], &[], &[]).execute("", 0)).await), "12C12DCZ");
    assert_eq!(value(&run(&mut one, there("y")).await), "again");
    // SQL PREPARE: the session keeps its connection, and both ways to prepare see each other
    one.query("PREPARE z AS SELECT 'by sql'").await;
    stage.until_shown("sql", "pinned_by", "SQL PREPARE").await;
    assert_eq!(value(&run(&mut one, there("z")).await), "by sql");
    assert_eq!(value(&one.query("EXECUTE z").await), "by sql");
    assert_eq!(codes(&other.query("EXECUTE z").await), ["26000"]);
    one.query("DEALLOCATE z").await;
    stage.until_shown("sql", "state", "idle").await;
    assert_eq!(codes(&one.query("EXECUTE z").await), ["26000"]);
    // the server's own memory was emptied behind our back
    let mut victim = stage.raw().await;
    run(&mut victim, prepare("v")).await;
    one.query("DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$").await;
    assert_eq!(value(&run(&mut victim, there("v")).await), "there", "prepared again, and no error seen");
}

/// What understudy prepares in a cycle that fails is not there for the one behind it.
pub async fn skipped(stage: &Stage) {
    let (mut one, mut other) = (stage.raw().await, stage.raw().await);
    let fails = || Request::new().bind("", "twice", &[], &[], &[]).execute("", 0);
    let prepared = Request::new().parse("twice", "INSERT INTO item VALUES (1, 1)", &[]).parse("there", "SELECT 'there'", &[]);
    run(&mut one, prepared.parse("same", "SELECT 'there'", &[])).await;
    for first in [fails().bind("", "there", &[], &[], &[]), fails().parse("third", "SELECT 'there'", &[])] {
        other.query("DEALLOCATE ALL").await; // on the connection nothing is prepared
        one.send(&first.execute("", 0).sync().bind("", "same", &[], &[], &[]).execute("", 0).sync().0).await;
        let seen = one.until_ready(2).await;
        assert_eq!((tags(&seen).as_str(), codes(&seen)), ("2EZ2DCZ", vec!["23505".to_owned()]));
        assert_eq!(value(&seen), "there");
    }
}

pub async fn unnamed(stage: &Stage) {
    let (mut one, mut two) = (stage.raw().await, stage.raw().await);
    let go = || Request::new().bind("", "", &[], &[], &[]).execute("", 0);
    run(&mut one, Request::new().parse("", "SELECT 'one'", &[])).await;
    run(&mut two, Request::new().parse("", "SELECT 'two'", &[])).await;
    for _ in 0..3 {
        assert_eq!(value(&run(&mut one, go()).await), "one");
        assert_eq!(value(&run(&mut two, go()).await), "two");
        assert_eq!(tags(&run(&mut one, Request::new().describe(b'S', "")).await), "tTZ");
    }
    one.query("SELECT 1").await; // a simple query takes it away, as in PostgreSQL
    assert_eq!(codes(&run(&mut one, go()).await), ["26000"]);
    // Flush is not Sync: portal and statement live on
    one.send(&Request::new().parse("", "SELECT generate_series(1, 3)", &[]).bind("", "", &[], &[], &[]).execute("", 1).flush().0).await;
    for tag in "12Ds".bytes() {
        assert_eq!(one.receive().await.tag, tag);
    }
    two.query("SELECT 1").await;
    assert_eq!(tags(&run(&mut one, Request::new().execute("", 0)).await), "DDCZ");
}

pub async fn stale(stage: &Stage) {
    let admin = stage.direct().await;
    let go = |name: &str| Request::new().bind("", name, &[], &[], &[]).describe(b'P', "").execute("", 0);
    admin.batch_execute("CREATE TABLE bent (a int); INSERT INTO bent VALUES (1); GRANT ALL ON bent TO PUBLIC").await.unwrap();
    let (mut one, mut two, mut holder) = (stage.raw().await, stage.raw().await, stage.raw().await);
    holder.query("BEGIN").await; // of the other connection: there nothing would be stale
    for raw in [&mut one, &mut two] {
        run(raw, Request::new().parse("bent", "SELECT * FROM bent", &[])).await;
        assert_eq!(tags(&run(raw, go("bent")).await), "2TDCZ");
    }
    admin.batch_execute("ALTER TABLE bent ADD b text DEFAULT 'new'").await.unwrap();
    for raw in [&mut one, &mut two] {
        let seen = run(raw, go("bent")).await;
        assert_eq!(tags(&seen), "2TDCZ", "{:?}", codes(&seen));
        let row = seen.iter().find(|message| message.tag == b'D').unwrap();
        assert_eq!(understudy::wire::backend::data_row(&row.body).unwrap().len(), 2);
    }
    // inside of a transaction nothing can be repeated: the error is the client's, and the next time it works
    admin.batch_execute("ALTER TABLE bent ADD c int").await.unwrap();
    one.query("BEGIN").await;
    assert_eq!(codes(&run(&mut one, go("bent")).await), ["0A000"]);
    one.query("ROLLBACK").await;
    assert_eq!(tags(&run(&mut one, go("bent")).await), "2TDCZ");
    // nor with others behind it in a pipeline
    admin.batch_execute("ALTER TABLE bent ADD d int").await.unwrap();
    one.send(&go("bent").sync().bind("", "bent", &[], &[], &[]).execute("", 0).sync().0).await;
    let seen = one.until_ready(2).await;
    assert_eq!((tags(&seen).as_str(), codes(&seen)), ("EZEZ", vec!["0A000".to_owned(); 2]));
    assert_eq!(tags(&run(&mut one, go("bent")).await), "2TDCZ");
    // what stands before it is done once, and its answer is its own
    admin.batch_execute("CREATE TABLE done (k int); GRANT ALL ON done TO PUBLIC").await.unwrap();
    run(&mut one, Request::new().parse("done", "INSERT INTO done VALUES (1)", &[]).parse("begin", "BEGIN", &[])).await;
    let bad = [(true, "bent", "0A000"), (true, "never", "26000"), (false, "never", "26000")];
    for (number, (pipelined, name, code)) in bad.into_iter().enumerate() {
        admin.batch_execute(&format!("ALTER TABLE bent ADD more{number} int")).await.unwrap();
        let seen = if pipelined {
            one.send(&go("done").sync().0.into_iter().chain(go(name).sync().0).collect::<Vec<u8>>()).await;
            one.until_ready(2).await
        } else {
            let mut seen = run(&mut one, go("done")).await;
            seen.extend(run(&mut one, go(name)).await);
            seen
        };
        assert_eq!((tags(&seen).as_str(), codes(&seen)), ("2nCZEZ", vec![code.to_owned()]), "{name}");
        assert_eq!(one.value("SELECT count(*) FROM done").await, (number + 1).to_string(), "{name}");
    }
    assert_eq!(tags(&run(&mut one, Request::new().bind("", "begin", &[], &[], &[]).execute("", 0)).await), "2CZ");
    assert_eq!(codes(&run(&mut one, go("never")).await), ["26000"], "not 25P02: the transaction was sound until then");
    one.query("ROLLBACK").await;
    // who does not ask for the columns believes in those that it knows: the error is the client's, as from a server
    let mut known = stage.raw().await;
    run(&mut known, Request::new().parse("known", "SELECT * FROM bent ORDER BY a", &[]).describe(b'S', "known")).await;
    admin.batch_execute("ALTER TABLE bent ADD e int").await.unwrap();
    let seen = run(&mut known, Request::new().bind("", "known", &[], &[], &[]).execute("", 0)).await;
    assert_eq!(codes(&seen), ["0A000"]);
    assert_eq!(ask(&stage.client().await, "SELECT count(*) FROM bent").await, "1");
}

pub async fn large(stage: &Stage) {
    let (mut one, mut two) = (stage.raw_with(&[(b"application_name", b"large")]).await, stage.raw().await);
    let big = "x".repeat(400_000);
    // a large parameter: its Bind is streamed, under the other name
    run(&mut one, Request::new().parse("length", "SELECT length($1::text)", &[])).await;
    for _ in 0..2 {
        assert_eq!(
            value(&run(&mut one, Request::new().bind("", "length", &[], &[Some(big.as_bytes())], &[]).execute("", 0)).await),
            "400000"
        );
        two.query("DEALLOCATE ALL").await;
    }
    // a large text stays on its connection
    let text = format!("SELECT length('{big}')");
    run(&mut one, Request::new().parse("text", &text, &[])).await;
    stage.until_shown("large", "pinned_by", "prepared statement above 256 KiB").await;
    for _ in 0..2 {
        assert_eq!(value(&run(&mut one, Request::new().bind("", "text", &[], &[], &[]).execute("", 0)).await), "400000");
        two.query("SELECT 1").await;
    }
    one.query("DEALLOCATE ALL").await;
    drop(one);
    // more than a connection keeps
    let mut one = stage.raw().await;
    for k in 0..250 {
        run(&mut one, Request::new().parse(&format!("m{k}"), format!("SELECT {k}, 'many'"), &[])).await;
    }
    assert_eq!(one.value("SELECT count(*) <= 200 FROM pg_prepared_statements").await, "t");
    for k in (0..250).step_by(49) {
        assert_eq!(value(&run(&mut one, Request::new().bind("", &format!("m{k}"), &[], &[], &[]).execute("", 0)).await), k.to_string());
    }
}
