//! Queries, statements, portals, transactions, COPY: what must be true whatever the differential test draws.

use crate::{
    Stage,
    harness::wait_until,
    raw::{Raw, Request, codes, startup, tags},
};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use understudy::wire::{Message, backend::ErrorFields};

const INT4: u32 = 23;

async fn answer(raw: &mut Raw, request: Request, ready: usize) -> Vec<Message> {
    raw.send(&request.0).await;
    raw.until_ready(ready).await
}

/// 12, 13, 32: several statements are one transaction; nothing is a query, too; the status is the server's word.
pub async fn simple(stage: &Stage) {
    let mut raw = stage.raw().await;
    assert_eq!(tags(&raw.query("SELECT 1; SELECT 2; SELECT 1 / 0; SELECT 3").await), "TDCTDCEZ");
    raw.query("CREATE TEMP TABLE one (k int)").await;
    raw.query("INSERT INTO one VALUES (1); SELECT 1 / 0").await;
    assert_eq!(raw.value("SELECT count(*) FROM one").await, "0", "one implicit transaction");
    raw.query("INSERT INTO one VALUES (1); COMMIT; SELECT 1 / 0").await;
    assert_eq!(raw.value("SELECT count(*) FROM one").await, "1", "COMMIT in the middle");
    for text in ["", ";", " ; ;; ", "-- nothing", "/* nothing */"] {
        assert_eq!(tags(&raw.query(text).await), "IZ", "{text:?}");
    }
    let status = async |raw: &mut Raw, text: &str| {
        let seen = raw.query(text).await;
        let tag = seen.iter().find(|message| message.tag == b'C').map(|message| message.body.clone()).unwrap_or_default();
        (seen[seen.len() - 1].body[0] as char, String::from_utf8_lossy(&tag).into_owned())
    };
    assert_eq!(status(&mut raw, "SELECT 1; BEGIN; SELECT 2").await.0, 'T');
    assert_eq!(status(&mut raw, "SAVEPOINT a; SELECT nonsense").await.0, 'E');
    assert_eq!(status(&mut raw, "COMMIT AND CHAIN").await, ('T', "ROLLBACK\0".into()), "COMMIT of a failed transaction");
    assert_eq!(status(&mut raw, "COMMIT").await, ('I', "COMMIT\0".into()));
    // a procedure that commits, where it may and where it may not
    raw.query("CREATE PROCEDURE pg_temp.commits() LANGUAGE plpgsql AS 'BEGIN COMMIT; END'").await;
    assert_eq!(status(&mut raw, "CALL pg_temp.commits()").await, ('I', "CALL\0".into()));
    assert_eq!(status(&mut raw, "BEGIN; CALL pg_temp.commits()").await.0, 'E');
    assert_eq!(status(&mut raw, "ROLLBACK").await, ('I', "ROLLBACK\0".into()));
}

/// 16, 19: Flush gives what is there and ends nothing; an error comes at once; Sync ends an implicit transaction.
pub async fn flush(stage: &Stage) {
    let mut raw = stage.raw().await;
    let begin = Request::new().parse("", "SELECT generate_series(1, 9)", &[]).bind("p", "", &[], &[], &[]).execute("p", 3).flush();
    raw.send(&begin.0).await;
    let mut seen = Vec::new();
    while tags(&seen).len() < 6 {
        seen.push(raw.receive().await);
    }
    assert_eq!(tags(&seen), "12DDDs", "without a Sync");
    raw.send(&Request::new().execute("p", 3).flush().0).await;
    let mut seen = Vec::new();
    while tags(&seen).len() < 4 {
        seen.push(raw.receive().await);
    }
    assert_eq!(tags(&seen), "DDDs", "the portal has outlived the Flush");
    let seen = answer(&mut raw, Request::new().sync().execute("p", 0).sync(), 2).await;
    assert_eq!((tags(&seen).as_str(), codes(&seen)), ("ZEZ", vec!["34000".to_owned()]), "and not the Sync");
    raw.send(&Request::new().parse("", "SELEC", &[]).0).await;
    assert_eq!(raw.receive().await.tag, b'E', "without Flush or Sync");
    assert_eq!(tags(&answer(&mut raw, Request::new().sync(), 1).await), "Z");
}

/// 17, 18, 20: one ReadyForQuery per Sync; an error skips to the next one, a Query on the way, too; many outstanding.
pub async fn pipelines(stage: &Stage) {
    let mut raw = stage.raw().await;
    let request = Request::new().run("SELECT 1 / 0").query("SELECT 'skipped'").run("SELECT 'skipped'").sync().query("SELECT 2");
    assert_eq!(tags(&answer(&mut raw, request, 2).await), "1EZTDCZ");
    assert_eq!(tags(&answer(&mut raw, Request::new().run("SELECT 1").query("SELECT 2"), 1).await), "12DCTDCZ");
    let mut request = Request::new();
    for k in 0..400 {
        request = request.run(if k % 3 == 0 { "SELECT 1 / 0" } else { "SELECT repeat('x', 2000)" }).sync();
    }
    let seen = tags(&answer(&mut raw, request, 400).await);
    assert_eq!(seen, (0..400).map(|k| if k % 3 == 0 { "1EZ" } else { "12DCZ" }).collect::<String>());
    // an implicit transaction lasts up to the Sync
    raw.query("CREATE TEMP TABLE one (k int)").await;
    let request = Request::new().run("INSERT INTO one VALUES (1)").run("SELECT 1 / 0").sync();
    answer(&mut raw, request, 1).await;
    assert_eq!(raw.value("SELECT count(*) FROM one").await, "0");
}

/// 21, 22, 24: portals are suspended, resumed, interleaved and closed; both kinds are described.
pub async fn portals(stage: &Stage) {
    let mut raw = stage.raw().await;
    let request = Request::new().query("BEGIN").parse("s", "SELECT generate_series(1, $1)", &[INT4]).describe(b'S', "s");
    let request = request.bind("a", "s", &[], &[Some(b"4")], &[1]).bind("b", "s", &[], &[Some(b"3")], &[]).describe(b'P', "a");
    let request = request.execute("a", 2).execute("b", 2).execute("a", 2).execute("b", 2).execute("a", 2).close(b'P', "b");
    let request = request.execute("b", 1).sync().query("ROLLBACK");
    let seen = answer(&mut raw, request, 3).await;
    assert_eq!(tags(&seen), "CZ1tT22TDDsDDsDDsDCC3EZCZ");
    assert!(seen.iter().filter(|message| message.tag == b'D').any(|message| message.body.ends_with(&[0, 0, 0, 4])), "binary");
    let request = Request::new().parse("n", "SET search_path = public", &[]).describe(b'S', "n").bind("", "n", &[], &[], &[]);
    let request = request.describe(b'P', "").close(b'S', "never").close(b'P', "never").sync();
    assert_eq!(tags(&answer(&mut raw, request, 1).await), "1tn2n33Z");
}

/// 23, 25, 26, 31: lives and deaths of statements.
pub async fn statements(stage: &Stage) {
    let mut raw = stage.raw().await;
    let parse = |name: &str, text: &str| Request::new().parse(name, text, &[]);
    let run = |name: &str| Request::new().run_prepared(name).sync();
    assert_eq!(tags(&answer(&mut raw, parse("a", "SELECT 1").sync(), 1).await), "1Z");
    assert_eq!(codes(&answer(&mut raw, parse("a", "SELECT 2").sync(), 1).await), ["42P05"]);
    assert_eq!(codes(&answer(&mut raw, parse("b", "SELEC").sync(), 1).await), ["42601"]);
    assert_eq!(codes(&answer(&mut raw, run("b"), 1).await), ["26000"], "a failed Parse makes nothing");
    assert_eq!(tags(&answer(&mut raw, parse("", "SELECT 1").parse("", "SELECT 2", &[]).sync(), 1).await), "11Z");
    assert_eq!(tags(&answer(&mut raw, run("").query("BEGIN"), 2).await), "2DCZCZ", "the unnamed one, later");
    assert_eq!(codes(&answer(&mut raw, run(""), 1).await), ["26000"], "a Query has replaced it");
    raw.query("ROLLBACK").await;
    for text in ["DEALLOCATE a", "DEALLOCATE ALL", "DISCARD ALL"] {
        answer(&mut raw, Request::new().close(b'S', "a").sync(), 1).await;
        // deallocated behind the Parse, in the same breath
        let seen = answer(&mut raw, parse("a", "SELECT 1").sync().query(text).bind("", "a", &[], &[], &[]).sync(), 3).await;
        assert_eq!(codes(&seen), ["26000"], "{text}");
    }
    raw.query("PREPARE a AS SELECT 7").await;
    assert_eq!(tags(&answer(&mut raw, run("a"), 1).await), "2DCZ", "SQL and protocol share the names");
    raw.query("CREATE TEMP TABLE plan (k int)").await;
    answer(&mut raw, parse("p", "SELECT * FROM plan").run_prepared("p").sync(), 1).await;
    raw.query("ALTER TABLE plan ADD COLUMN more int").await;
    let seen = answer(&mut raw, run("p"), 1).await;
    assert_eq!(codes(&seen), ["0A000"]);
}

/// 27: parameters none, one and as many as there can be; formats none, one, each; NULL; binary per column.
pub async fn parameters(stage: &Stage) {
    let mut raw = stage.raw().await;
    let places: Vec<String> = (1..=65_535).map(|k| format!("${k}")).collect();
    let values: Vec<Option<&[u8]>> = (0..65_535).map(|k| if k % 2 == 0 { Some(&b"7"[..]) } else { None }).collect();
    let text = format!("SELECT 7 IN ({})", places.join(","));
    let request = Request::new().parse("", text, &[]).bind("", "", &[], &values, &[1]).execute("", 0).sync();
    let seen = answer(&mut raw, request, 1).await;
    assert_eq!(tags(&seen), "12DCZ");
    let request = Request::new().parse("", "SELECT $1::int, $2::text, $3::int", &[]);
    let mixed = [Some(&[0, 0, 0, 5][..]), Some(b"x"), None];
    let request = request.bind("", "", &[1, 0, 1], &mixed, &[0, 0, 1]).execute("", 0).sync();
    assert_eq!(answer(&mut raw, request, 1).await[2].body, &b"\0\x03\0\0\0\x015\0\0\0\x01x\xff\xff\xff\xff"[..]);
    assert_eq!(codes(&answer(&mut raw, Request::new().bind("", "", &[1, 0], &mixed, &[]).sync(), 1).await), ["08P01"]);
}

/// 15, 17: COPY ends well, badly, or is given up; a Sync in it is nobody's; what comes too late is swallowed.
pub async fn copy(stage: &Stage) {
    let mut raw = stage.raw().await;
    raw.query("CREATE TEMP TABLE sink (k int)").await;
    let row = Request::new().copy_data(b"1\n");
    let extended = Request::new().run("COPY sink FROM STDIN");
    for (what, request, ready, expected) in [
        ("in the middle", Request::new().query("SELECT 1; COPY sink FROM STDIN; SELECT 2").raw_after(&row).copy_done(), 1, "TDCGCTDCZ"),
        ("nothing at all", Request::new().query("COPY sink FROM STDIN").copy_data(b"").copy_done(), 1, "GCZ"),
        ("Sync and Flush inside", Request::new().query("COPY sink FROM STDIN").sync().flush().raw_after(&row).copy_done(), 1, "GCZ"),
        ("given up", Request::new().query("COPY sink FROM STDIN").raw_after(&row).copy_fail("no"), 1, "GEZ"),
        ("a wrong row and more", Request::new().query("COPY sink FROM STDIN").copy_data(b"x\n").raw_after(&row).copy_done(), 1, "GEZ"),
        ("extended", extended.clone().raw_after(&row).copy_done().sync(), 1, "12GCZ"),
        ("extended, synced early", extended.clone().sync().raw_after(&row).copy_done().sync(), 1, "12GCZ"),
        (
            "extended, more behind it",
            extended.clone().sync().raw_after(&row).copy_done().describe(b'S', "").sync().query(""),
            2,
            "12GCtnZIZ",
        ),
        ("extended, given up", extended.clone().raw_after(&row).copy_fail("no").sync(), 1, "12GEZ"),
        ("extended, wrong", extended.clone().sync().copy_data(b"x\n").raw_after(&row).copy_done().sync().query(""), 2, "12GEZIZ"),
        ("never begun", Request::new().query("COPY nowhere FROM STDIN").raw_after(&row).copy_done().query(""), 2, "EZIZ"),
    ] {
        assert_eq!(tags(&answer(&mut raw, request, ready).await), expected, "{what}");
        assert_eq!(stage.in_transaction().await, 0, "{what}: still counted as inside a transaction");
    }
    assert_eq!(raw.value("SELECT count(*) FROM sink").await, "5");
    let seen = raw.query("COPY (SELECT 1 / (3 - k) FROM generate_series(1, 5) k) TO STDOUT").await;
    assert_eq!((tags(&seen).as_str(), codes(&seen)), ("HddEZ", vec!["22012".to_owned()]));
    // nothing is owed that would keep the connection: Terminate ends it
    raw.send(b"X\0\0\0\x04").await;
    assert!(raw.until_closed().await.is_empty());
}

/// 30: FunctionCall has its own ReadyForQuery; large objects are written with it.
pub async fn function_calls(stage: &Stage) {
    let mut raw = stage.raw().await;
    let oid = async |raw: &mut Raw, name: &str| raw.value(&format!("SELECT '{name}'::regprocedure::oid")).await.parse::<u32>().unwrap();
    let (create, length) = (oid(&mut raw, "lo_from_bytea(oid,bytea)").await, oid(&mut raw, "lo_get(oid)").await);
    let seen = answer(&mut raw, Request::new().call(create, &[b"0", b"\\xdeadbeef"], 0), 1).await;
    assert_eq!(tags(&seen), "VZ");
    let object = seen[0].body.slice(4..);
    let seen = answer(&mut raw, Request::new().call(length, &[&object], 1).call(length, &[b"0"], 0).query("SELECT 1"), 3).await;
    assert_eq!(tags(&seen), "VZEZTDCZ");
    assert_eq!(seen[0].body, &b"\0\0\0\x04\xde\xad\xbe\xef"[..]);
}

/// 33, 46, 47: settings are reported whenever they change; the key is ours; bytes are not taken for UTF-8.
pub async fn state(stage: &Stage) {
    let mut raw = stage.raw().await;
    let seen = raw.query("SET TimeZone = 'Asia/Tokyo'; SET DateStyle = 'German'; SET application_name = 'x'; SELECT 1").await;
    assert_eq!(seen.iter().filter(|message| message.tag == b'S').count(), 3);
    for (text, reports) in [("BEGIN", 0), ("SET DateStyle = 'ISO'", 1), ("ROLLBACK", 1)] {
        assert_eq!(raw.query(text).await.iter().filter(|message| message.tag == b'S').count(), reports, "{text}: there and back");
    }
    assert_ne!(raw.value("SELECT pg_backend_pid()").await, raw.key.0.to_string());
    for encoding in ["SJIS", "EUC_JP", "LATIN1", "WIN1251", "GB18030"] {
        let parameters: [(&[u8], &[u8]); 3] = [(b"user", b"app"), (b"database", b"shop"), (b"client_encoding", encoding.as_bytes())];
        let packet = startup(196_608, &parameters);
        let [mut direct, mut proxied] =
            [Raw::open_with(stage.source.server.port(), &packet).await, Raw::open_with(stage.proxy.listen, &packet).await];
        // a second byte that is a backslash, a quote's neighbour, bytes that are nothing in UTF-8, half a character
        for text in [&b"SELECT '\x95\x5c', '\xe9\xe8' || 'x'"[..], b"SELECT 1 AS \"\x83\x5c\"", b"SELECT \x95\x5c", b"SELECT '\x95"] {
            let request = Request::new().query(text).parse("\u{e9}", text, &[]).sync();
            let seen = answer(&mut proxied, request.clone(), 2).await;
            assert_eq!(seen, answer(&mut direct, request, 2).await, "{encoding}: {}", text.escape_ascii());
        }
    }
}

/// 35: what keeps a session on its server is seen, and said in SHOW CLIENTS.
pub async fn pins(stage: &Stage) {
    for (text, pin) in [
        ("LISTEN news", "LISTEN"),
        ("CREATE TEMP TABLE t (k int)", "temporary table"),
        ("DECLARE c CURSOR WITH HOLD FOR SELECT 1", "cursor WITH HOLD"),
        ("SELECT pg_advisory_lock(1)", "advisory lock"),
        ("PREPARE a AS SELECT 1", "SQL PREPARE"),
        ("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY", "session settings"),
    ] {
        let mut raw = stage.raw().await;
        let pinned = async || stage.proxy.rows("SHOW CLIENTS").await.iter().any(|row| row.to_string().contains(pin));
        assert!(!pinned().await, "{pin}: somebody else");
        raw.query(text).await;
        assert!(pinned().await, "{text}: {:?}", stage.proxy.rows("SHOW CLIENTS").await);
        drop(raw);
        wait_until("it is gone", Duration::from_secs(60), || async { !pinned().await }).await;
    }
}

/// 29, 37: a client that vanishes in the middle of something leaves nothing open.
pub async fn vanishing(stage: &Stage) {
    let operator = stage.source.server.connect("shop").await.unwrap();
    let left = async || crate::harness::ask(&operator, "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'gone'").await;
    let packet = startup(196_608, &[(b"user", b"app"), (b"database", b"shop"), (b"application_name", b"gone")]);
    for request in [
        Request::new().parse("", "SELECT 1", &[]).bind("", "", &[], &[], &[]),
        Request::new().query("BEGIN; LOCK TABLE item"),
        Request::new().query("COPY item FROM STDIN").copy_data(b"1000\t"),
        Request::new().query("SELECT generate_series(1, 3000000)"),
        Request::new().raw(b'Q', b"SELECT"),
    ] {
        let mut raw = Raw::open_with(stage.proxy.listen, &packet).await;
        let cut = request.0.len() - usize::from(request.0.len() < 20);
        raw.send(&request.0[..cut]).await;
        drop(raw);
        wait_until("its backend is gone", Duration::from_secs(60), || async { left().await == "0" }).await;
    }
    assert_eq!(stage.in_transaction().await, 0);
    operator.batch_execute("SET lock_timeout = '60s'; BEGIN; LOCK TABLE item; ROLLBACK").await.unwrap();
}

/// 36, 43: what ends a connection is said once, also to a client that goes on sending.
pub async fn endings(stage: &Stage) {
    let fatal = |seen: &[Message]| {
        let errors: Vec<ErrorFields> = seen.iter().filter(|m| m.tag == b'E').map(|m| ErrorFields::parse(&m.body)).collect();
        errors.iter().map(|error| format!("{} {}", error.severity, error.code)).collect::<Vec<_>>()
    };
    let mut raw = stage.raw().await;
    raw.send(&Request::new().raw(b'z', b"what").0).await;
    assert_eq!(fatal(&raw.until_closed().await), ["FATAL 08P01"], "an unknown message");
    let mut raw = stage.raw().await;
    let mut request = Request::new().query("SELECT pg_terminate_backend(pg_backend_pid())");
    for _ in 0..50 {
        request = request.query("SELECT 1");
    }
    raw.send(&request.0).await;
    assert_eq!(fatal(&raw.until_closed().await), ["FATAL 57P01"], "terminated with a pipeline behind it");
    let mut raw = stage.raw().await;
    raw.query("SET idle_in_transaction_session_timeout = '20ms'").await;
    raw.query("BEGIN").await;
    assert_eq!(fatal(&raw.until_closed().await), ["FATAL 25P03"], "while idle");
    // half-closed: everything that was asked for is answered
    let mut raw = stage.raw().await;
    raw.send(&Request::new().query("SELECT 1").query("SELECT generate_series(1, 20000)").0).await;
    raw.stream.shutdown().await.unwrap();
    assert_eq!(raw.until_closed().await.iter().filter(|message| message.tag == b'D').count(), 20_001);
}

impl Request {
    /// Appends another request.
    pub fn raw_after(mut self, other: &Request) -> Self {
        self.0.extend_from_slice(&other.0);
        self
    }
}
