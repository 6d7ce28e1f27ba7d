//! What operators do to a running proxy, and what it must not tell them.

use crate::{
    harness::{Proxy, ask, connect, get, sqlstate, try_connect, wait_until},
    support::Server,
};
use std::time::{Duration, Instant};
use understudy::config::ServerUrl;

fn app(server: &Server, proxy: &Proxy) -> ServerUrl {
    proxy.through(&server.app_url("shop"))
}

pub async fn pause(server: &Server, proxy: &Proxy) {
    let url = app(server, proxy);
    let (running, held) = (connect(&url).await, connect(&url).await);
    running.batch_execute("BEGIN; UPDATE item SET v = v + 1 WHERE id = 1").await.unwrap();
    let began = Instant::now();
    let before = ask(&held, "SELECT v FROM item WHERE id = 1").await.parse::<i32>().unwrap();
    let (paused, ()) = tokio::join!(proxy.tell("PAUSE shop"), async {
        wait_until("the gate is closed", Duration::from_secs(5), || async { proxy.state().await.databases[0].held }).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        running.batch_execute("COMMIT").await.unwrap();
    });
    assert_eq!(paused.code, 0, "{}", paused.stderr);
    assert!(began.elapsed() >= Duration::from_millis(200), "PAUSE waits for the running transaction");
    let operator = server.connect("shop").await.unwrap();
    let began = Instant::now();
    let (seen, written, newcomer, ()) = tokio::join!(
        held.query_one("SELECT v FROM item WHERE id = 1", &[]),
        running.batch_execute("UPDATE item SET v = v + 1 WHERE id = 1"),
        try_connect(&url),
        async {
            tokio::time::sleep(Duration::from_millis(400)).await;
            assert_eq!(ask(&operator, "SELECT v FROM item WHERE id = 1").await, (before + 1).to_string(), "held means not carried out");
            proxy.rows("RESUME shop").await;
        }
    );
    assert!(began.elapsed() >= Duration::from_millis(400));
    written.unwrap();
    newcomer.unwrap();
    assert!([before + 1, before + 2].contains(&seen.unwrap().get::<_, i32>(0)));
    assert_eq!(ask(&operator, "SELECT v FROM item WHERE id = 1").await, (before + 2).to_string());
    let wrong = proxy.tell("PAUSE nowhere").await;
    assert_eq!(wrong.code, 2, "{}", wrong.stderr);
    assert!(wrong.stderr.contains("SHOW DATABASES"), "{}", wrong.stderr);
}

async fn setting(proxy: &Proxy, name: &str) -> String {
    let rows = proxy.rows("SHOW CONFIG").await;
    let row = rows.iter().find(|row| row["setting"] == name).unwrap_or_else(|| panic!("{name}: {rows:?}"));
    row["value"].as_str().map_or_else(|| row["value"].to_string(), str::to_owned)
}

async fn sample_reads(proxy: &Proxy) -> f64 {
    setting(proxy, "shop.pg18.sample_reads").await.parse().unwrap()
}

pub async fn reload(server: &Server, proxy: &Proxy) {
    let client = connect(&app(server, proxy)).await;
    let pid = ask(&client, "SELECT pg_backend_pid()").await;
    proxy.edit("sample_reads = 10.0", "sample_reads = 20.0");
    wait_until("the edit is noticed", Duration::from_secs(5), || async { sample_reads(proxy).await == 20.0 }).await;

    let line = std::fs::read_to_string(&proxy.config).unwrap().lines().position(|line| line.starts_with("sample_reads")).unwrap() + 1;
    for (wrong, reason) in [
        ("sample_reads = -5.0", "percentage"),
        ("sample_raeds = 30.0", "unknown field"),
        ("sample_reads = 30.0\nserve_reads = 200.0", "between 0 and 100"),
        ("sample_reads = 30.0\nfeed = \"none\"", "cannot change in a running process"),
    ] {
        proxy.edit("sample_reads = 20.0", wrong);
        let refused = proxy.tell("RELOAD").await;
        assert_eq!(refused.code, 1, "{wrong}: {}", refused.stderr);
        assert!(refused.stderr.contains(reason) && refused.stderr.contains("settings stay"), "{wrong}: {}", refused.stderr);
        if !reason.contains("running process") {
            let line = if wrong.contains('\n') { line + 1 } else { line };
            assert!(refused.stderr.contains(&format!("line {line}: ")), "{}", refused.stderr);
        }
        assert_eq!(sample_reads(proxy).await, 20.0);
        proxy.edit(wrong, "sample_reads = 20.0");
    }
    // without RELOAD a wrong edit is refused all the same, and tells so
    proxy.edit("sample_reads = 20.0", "sample_reads = \"many\"");
    wait_until("the wrong edit is an alert", Duration::from_secs(5), || async {
        proxy.rows("SHOW ALERTS").await.iter().any(|row| row.to_string().contains("an edit of the configuration was refused"))
    })
    .await;
    assert_eq!(sample_reads(proxy).await, 20.0);
    proxy.edit("sample_reads = \"many\"", "sample_reads = 10.0");
    proxy.rows("RELOAD").await;
    assert_eq!(sample_reads(proxy).await, 10.0);
    assert_eq!(ask(&client, "SELECT pg_backend_pid()").await, pid, "no connection was dropped");
}

pub async fn set(proxy: &Proxy) {
    for (words, part) in [
        ("SET pg18 sample_raeds = 5", "the knobs are"),
        ("SET pg18 sample_reads = -1", "percentage"),
        ("SET pg18 serve_reads = 101", "between 0 and 100"),
        ("SET pg18 serve_reads = lots", ""),
        ("SET pg18 mirror_writes = maybe", "rehearse"),
        ("SET pg18 shift.steps = '5, 1'", "ascending"),
        ("SET pg19 sample_reads = 5", "SHOW SHADOWS"),
    ] {
        let refused = proxy.tell(words).await;
        assert_eq!(refused.code, 2, "{words}: {}", refused.stderr);
        assert!(refused.stderr.contains(part), "{words}: {}", refused.stderr);
    }
    let early = proxy.tell("SET pg18 serve_reads = 5").await;
    assert_eq!(early.code, 1, "nothing is served before the shadow is in step: {}", early.stderr);
    proxy.rows("SET pg18 sample_reads = 250").await;
    assert_eq!(sample_reads(proxy).await, 250.0);
    proxy.rows("SET pg18 sample_reads = 10 %").await;
    assert_eq!(sample_reads(proxy).await, 10.0);
}

pub async fn secrets(server: &Server, proxy: &Proxy) {
    let mut texts = vec![("the log", proxy.log_text())];
    for words in
        ["SHOW CONFIG", "SHOW SERVERS", "SHOW EVENTS", "SHOW ALERTS", "SHOW DATABASES", "SHOW SHADOWS", "SHOW CLIENTS", "SHOW POOLS"]
    {
        let output = proxy.tell(words).await;
        assert_eq!(output.code, 0, "{words}: {}", output.stderr);
        texts.push((words, output.stdout + &output.stderr));
    }
    for path in ["/api/state", "/metrics", "/"] {
        let (status, text) = get(proxy.http, path).unwrap();
        assert_eq!(status, 200, "{path}");
        texts.push((path, text));
    }
    let password = |url: ServerUrl| url.password.unwrap().expose().to_owned();
    for secret in [password(server.superuser_url("shop")), password(server.app_url("shop"))] {
        for (place, text) in &texts {
            assert!(!text.contains(&secret), "a password is shown in {place}");
        }
    }
    assert!(texts[1].1.contains("***") || texts[1].1.contains("postgres@127.0.0.1"), "{}", texts[1].1);
}

pub async fn shutdown(server: &Server, proxy: &mut Proxy) {
    let url = app(server, proxy);
    let (idle, running) = (connect(&url).await, connect(&url).await);
    running.batch_execute("BEGIN; UPDATE item SET note = 'last words' WHERE id = 2").await.unwrap();
    assert_eq!(proxy.tell("SHUTDOWN").await.code, 0);
    wait_until("an idle session is asked to leave", Duration::from_secs(5), || async { idle.is_closed() }).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(proxy.is_running(), "a transaction is still open");
    assert_ne!(sqlstate(try_connect(&url).await), "00000", "nobody new is let in");
    running.batch_execute("UPDATE item SET v = 0 WHERE id = 2").await.unwrap();
    running.batch_execute("COMMIT").await.unwrap();
    assert_eq!(proxy.exit_code(Duration::from_secs(20)).await, Some(0));
    let operator = server.connect("shop").await.unwrap();
    assert_eq!(ask(&operator, "SELECT note FROM item WHERE id = 2").await, "last words");
    assert_eq!(ask(&operator, "SELECT count(*) FROM pg_replication_slots").await, "0");
}
