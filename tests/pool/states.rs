//! Settings and what pins.

use crate::{
    harness::{ask, sqlstate},
    raw::{Request, codes, tags},
    stage::{Stage, pid},
};
use understudy::wire::backend::ErrorFields;

/// Holds connections inside of transactions, so that the next client gets another one.
pub async fn lent(stage: &Stage) {
    let (one, two, three) = (stage.client().await, stage.client().await, stage.client().await);
    let mut pids = vec![];
    for client in [&one, &two, &three, &one] {
        pids.push(pid(client).await);
    }
    assert!(pids.iter().all(|pid| *pid == pids[0]), "one after the other they share one: {pids:?}");
    one.batch_execute("BEGIN").await.unwrap();
    let (held, other) = (pid(&one).await, pid(&two).await);
    assert_ne!(held, other);
    assert_eq!(pid(&three).await, other);
    one.batch_execute("COMMIT").await.unwrap();
    stage.until("sv_idle", 2).await;
    assert_eq!((stage.pool("pool_size").await, stage.pool("mode").await), (2.into(), "transaction".into()));
    // the role with a password logs in with it, here and there
    let mut url = stage.proxy.through(&stage.server.app_url("shop"));
    (url.user, url.password) = ("sesame".into(), Some(understudy::config::Secret::new("open")));
    let sesame = crate::harness::connect(&url).await;
    assert_eq!(ask(&sesame, "SELECT current_user").await, "sesame");
    url.password = Some(understudy::config::Secret::new("shut"));
    assert_eq!(sqlstate(crate::harness::try_connect(&url).await), "28P01");
}

/// Two clients that use the same connection in turn.
pub async fn settings(stage: &Stage) {
    let holder = stage.client().await; // of the other connection
    holder.batch_execute("BEGIN").await.unwrap();
    let (one, two) = (stage.client().await, stage.client().await);
    let same = async || assert_eq!(pid(&one).await, pid(&two).await, "else the test shows nothing");
    let show = async |client, name: &str| ask(client, &format!("SHOW {name}")).await;
    for (set, name, value, usual) in [
        ("SET work_mem = '5MB'", "work_mem", "5MB", "4MB"),
        ("SET search_path TO pg_catalog, public", "search_path", "pg_catalog, public", "\"$user\", public"),
        ("SET TIME ZONE 'Asia/Tokyo'", "TimeZone", "Asia/Tokyo", "Etc/UTC"),
        ("SELECT set_config('statement_timeout', '77s', false)", "statement_timeout", "77s", "0"),
        (
            "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE",
            "default_transaction_isolation",
            "serializable",
            "read committed",
        ),
        ("BEGIN; SET lock_timeout = '3s'; COMMIT", "lock_timeout", "3s", "0"),
        ("DO $$ BEGIN PERFORM set_config('lock_timeout', '4s', false); END $$", "lock_timeout", "4s", "0"),
        ("SET application_name = 'it''s \\ me'", "application_name", "it's \\ me", "shop-test"),
    ] {
        one.batch_execute(set).await.unwrap();
        assert_eq!(show(&one, name).await, value, "{set}");
        let found = show(&two, name).await;
        assert!(found == usual || (name == "TimeZone" && found != value), "{set} reached another client: {found}");
        assert_eq!(show(&one, name).await, value, "{set}: lost after another client");
        same().await;
        one.batch_execute(&format!("RESET {name}")).await.unwrap();
        assert_eq!(show(&one, name).await, found, "{set}, then RESET");
    }
    // what is rolled back or local leaves nothing
    one.batch_execute("BEGIN; SET work_mem = '9MB'; ROLLBACK").await.unwrap();
    one.batch_execute("BEGIN; SET LOCAL work_mem = '9MB'; COMMIT").await.unwrap();
    one.batch_execute("BEGIN; SAVEPOINT s; SET work_mem = '9MB'; ROLLBACK TO s; SET lock_timeout = '1s'; COMMIT").await.unwrap();
    assert_eq!((show(&one, "work_mem").await, show(&one, "lock_timeout").await), ("4MB".into(), "1s".into()));
    assert_eq!(show(&two, "lock_timeout").await, "0");
    // settings of applications, and with parameters
    one.query("SELECT set_config($1, $2, false)", &[&"app.tenant", &"7"]).await.unwrap();
    assert_eq!(ask(&two, "SELECT coalesce(current_setting('app.tenant', true), '')").await, "");
    assert_eq!(show(&one, "app.tenant").await, "7");
    // roles
    stage.direct().await.batch_execute("DROP ROLE IF EXISTS guest; CREATE ROLE guest; GRANT guest TO app").await.unwrap();
    one.batch_execute("SET ROLE guest").await.unwrap();
    assert_eq!(ask(&two, "SELECT current_user").await, "app");
    assert_eq!(ask(&one, "SELECT current_user").await, "guest");
    one.batch_execute("RESET ROLE").await.unwrap();
    assert_eq!(ask(&one, "SELECT current_user").await, "app");
    same().await;
    // RESET ALL and DISCARD ALL
    for reset in ["RESET ALL", "DISCARD ALL"] {
        one.batch_execute("SET work_mem = '6MB'; SET lock_timeout = '2s'").await.unwrap();
        two.batch_execute("SET work_mem = '8MB'").await.unwrap();
        one.batch_execute(reset).await.unwrap();
        assert_eq!((show(&one, "work_mem").await, show(&one, "lock_timeout").await), ("4MB".into(), "0".into()), "{reset}");
        assert_eq!((show(&one, "application_name").await, show(&two, "work_mem").await), ("shop-test".into(), "8MB".into()), "{reset}");
    }
}

/// A statement prepared by SQL is run by a text that says nothing of what it does.
pub async fn executed(stage: &Stage) {
    let (mut raw, mut other, mut holder) = (stage.raw().await, stage.raw().await, stage.raw().await);
    holder.query("BEGIN").await; // of the other connection
    raw.query("PREPARE p AS SELECT set_config('work_mem', '3MB', false)").await;
    raw.query("EXECUTE p").await;
    raw.query("DEALLOCATE p").await;
    let own = raw.value("SELECT pg_backend_pid()").await;
    assert_eq!((raw.value("SHOW work_mem").await, other.value("SHOW work_mem").await), ("3MB".into(), "4MB".into()));
    assert_eq!(other.value("SELECT pg_backend_pid()").await, own, "else the test shows nothing");
}

pub async fn start_up(stage: &Stage) {
    let options: &[(&[u8], &[u8])] = &[
        (b"options", b"-c work_mem=3MB --lock-timeout=5s -c app.x=a\\ b"),
        (b"client_encoding", b"LATIN1"),
        (b"application_name", b"started"),
        (b"DateStyle", b"German"),
    ];
    let (mut raw, mut plain) = (stage.raw_with(options).await, stage.raw().await);
    let greeting: Vec<_> = raw.greeting.iter().filter(|m| m.tag == b'S').map(|m| String::from_utf8_lossy(&m.body).into_owned()).collect();
    for told in ["client_encoding\0LATIN1\0", "application_name\0started\0", "DateStyle\0German, DMY\0"] {
        assert!(greeting.iter().any(|parameter| parameter == told), "{told}: {greeting:?}");
    }
    for _ in 0..2 {
        let values = ["work_mem", "lock_timeout", "app.x", "client_encoding", "application_name"];
        for (name, value) in values.iter().zip(["3MB", "5s", "a b", "LATIN1", "started"]) {
            assert_eq!(raw.value(&format!("SHOW {name}")).await, value);
        }
        assert_eq!(plain.value("SHOW work_mem").await, "4MB");
        assert_eq!(plain.value("SELECT coalesce(current_setting('app.x', true), '')").await, "");
        for back in ["DISCARD ALL", "SET work_mem TO DEFAULT", "RESET work_mem"] {
            raw.query("SET work_mem = '1MB'").await;
            plain.query("SELECT 1").await;
            raw.query(back).await;
            assert_eq!(raw.value("SHOW work_mem").await, "3MB", "{back}");
        }
    }
    // a name that is not ASCII needs UTF-8 on its way, and only there
    let latin: (&[u8], &[u8]) = (b"client_encoding", b"LATIN1");
    let mut first = stage.raw_with(&[latin]).await;
    let mut named = stage.raw_with(&[latin, (b"application_name", "B\u{fc}ro".as_bytes())]).await;
    for raw in [&mut first, &mut named] {
        assert_eq!(raw.value("SHOW client_encoding").await, "LATIN1");
    }
    let answer = named.query("SELECT chr(252)").await;
    let row = answer.iter().find(|message| message.tag == b'D').unwrap();
    assert_eq!(understudy::wire::backend::data_row(&row.body).unwrap()[0], Some(&b"\xfc"[..]));
    // refused as a server refuses: at the start, with its code
    for (name, value, code) in [("client_encoding", "nonsense", "22023"), ("no_such_setting", "1", "42704"), ("options", "-d 5", "0A000")] {
        let packet = crate::raw::startup(196_608, &[(b"user", b"app"), (b"database", b"shop"), (name.as_bytes(), value.as_bytes())]);
        let mut refused = crate::raw::Raw::connect(stage.proxy.listen).await;
        refused.send(&packet).await;
        let seen = refused.until_closed().await;
        let fields = ErrorFields::parse(&seen.last().unwrap().body);
        assert_eq!((fields.severity.as_str(), fields.code.as_str()), ("FATAL", code), "{name}: {fields:?}");
    }
}

pub async fn pins(stage: &Stage) {
    let mut raw = stage.raw_with(&[(b"application_name", b"pinned")]).await;
    let mut other = stage.raw().await;
    for (text, pin, check, release) in [
        ("CREATE TEMP TABLE scratch AS SELECT 1 AS one", "temporary table", "SELECT one FROM scratch", "DROP TABLE scratch"),
        ("SELECT 1 AS one INTO TEMP scratch", "temporary table", "SELECT one FROM scratch", "DISCARD TEMP"),
        (
            "CREATE FUNCTION pg_temp.f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
            "temporary table",
            "SELECT pg_temp.f()",
            "DROP FUNCTION pg_temp.f()",
        ),
        ("SELECT pg_advisory_lock(7)", "advisory lock", "SELECT 1", "SELECT pg_advisory_unlock(7)"),
        ("SELECT pg_advisory_lock(7), pg_advisory_lock(8)", "advisory lock", "SELECT 1", "SELECT pg_advisory_unlock_all()"),
        ("PREPARE p AS SELECT 1", "SQL PREPARE", "EXECUTE p", "DEALLOCATE p"),
        ("PREPARE p AS SELECT 1", "SQL PREPARE", "EXECUTE p", "DEALLOCATE ALL"),
        (
            "BEGIN; DECLARE c CURSOR WITH HOLD FOR SELECT 1 FROM generate_series(1, 9); COMMIT",
            "cursor WITH HOLD",
            "FETCH 1 FROM c",
            "CLOSE c",
        ),
        ("LISTEN news", "LISTEN", "SELECT 1", "UNLISTEN news"),
        ("LISTEN news", "LISTEN", "SELECT 1", "UNLISTEN *"),
        ("CREATE TEMP TABLE scratch AS SELECT 1 AS one", "temporary table", "SELECT one FROM scratch", "DISCARD ALL"),
    ] {
        assert_eq!(codes(&raw.query(text).await), [""; 0], "{text}");
        stage.until_shown("pinned", "pinned_by", pin).await;
        stage.until_shown("pinned", "state", "pinned").await;
        let own = raw.value("SELECT pg_backend_pid()").await;
        assert_ne!(other.value("SELECT pg_backend_pid()").await, own, "{text}");
        assert_eq!(raw.value(check).await, "1", "{text}");
        assert_eq!(codes(&raw.query(release).await), [""; 0], "{release}");
        stage.until_shown("pinned", "pinned_by", "").await;
        stage.until_shown("pinned", "state", "idle").await;
    }
    // what ends with its transaction does not pin, nor what fails
    for text in [
        "BEGIN; CREATE TEMP TABLE scratch (id int) ON COMMIT DROP; COMMIT",
        "BEGIN; CREATE TEMP TABLE scratch (id int); ROLLBACK",
        "BEGIN; SELECT pg_advisory_xact_lock(7); COMMIT",
        "BEGIN; DECLARE c CURSOR FOR SELECT 1; COMMIT",
        "LISTEN \"",
    ] {
        raw.query(text).await;
        stage.until_shown("pinned", "pinned_by", "").await;
        stage.until_shown("pinned", "state", "idle").await;
    }
    // both connections pinned: a third client waits, and gets one when it is released
    other.query("SELECT pg_advisory_lock(1)").await;
    raw.query("SELECT pg_advisory_lock(2)").await;
    let mut third = stage.raw().await;
    third.send(&Request::new().query("SELECT 3").0).await;
    stage.until("cl_waiting", 1).await;
    raw.query("SELECT pg_advisory_unlock(2)").await;
    assert_eq!(tags(&third.until_ready(1).await), "TDCZ");
    drop(other); // its lock goes with it
    let mut fourth = stage.raw().await;
    assert_eq!(fourth.value("SELECT pg_advisory_lock(1) IS NOT NULL").await, "t");
    fourth.query("SELECT pg_advisory_unlock(1)").await;
}

pub async fn listen(stage: &Stage) {
    let mut raw = stage.raw_with(&[(b"application_name", b"listener")]).await;
    raw.query("LISTEN news").await;
    stage.until_shown("listener", "state", "pinned").await;
    let client = stage.client().await;
    client.batch_execute("NOTIFY news, 'one'").await.unwrap();
    let message = raw.receive().await;
    assert_eq!(message.tag, b'A');
    assert!(message.body.ends_with(b"news\0one\0"));
    // each SET makes understudy ask the server something: what comes meanwhile is heard, too
    const NEWS: usize = 400;
    let crier = tokio::spawn(async move {
        for number in 0..NEWS {
            client.batch_execute(&format!("NOTIFY news, '{number}'")).await.unwrap();
        }
        client
    });
    let mut heard = 0;
    while heard < NEWS {
        let answer = if crier.is_finished() { vec![raw.receive().await] } else { raw.query("SET statement_timeout = 0").await };
        for message in answer.iter().filter(|message| message.tag == b'A') {
            let text = format!("news\0{heard}\0");
            assert!(message.body.ends_with(text.as_bytes()), "the next one is {heard}");
            heard += 1;
        }
    }
    let client = crier.await.unwrap();
    raw.query("UNLISTEN *").await;
    stage.until_shown("listener", "state", "idle").await;
    client.batch_execute("NOTIFY news, 'two'").await.unwrap();
    assert_eq!(tags(&raw.query("SELECT 1").await), "TDCZ", "nothing is heard any more");
}

pub async fn hidden(stage: &Stage) {
    stage
        .direct()
        .await
        .batch_execute(
            "CREATE OR REPLACE FUNCTION sly() RETURNS int LANGUAGE plpgsql AS $$ BEGIN SET TimeZone = 'Asia/Kolkata'; RETURN 1; END $$",
        )
        .await
        .unwrap();
    let (one, two) = (stage.client().await, stage.client().await);
    ask(&one, "SELECT sly()").await;
    assert_ne!(ask(&two, "SHOW TimeZone").await, "Asia/Kolkata");
    assert_eq!(ask(&one, "SHOW TimeZone").await, "Asia/Kolkata");
}
