//! CancelRequests that come when nobody else is let in, and for statements of which no server, or another one, knows.

use crate::{
    Raw, Stage,
    harness::{Proxy, ask, connect, url_text, wait_until},
    raw::{PATIENCE, Request, codes, tags},
    stage::Trusting,
    support::{Options, Server},
};
use bytes::BytesMut;
use tokio::io::AsyncReadExt;
use understudy::wire::frontend;

/// Sends a CancelRequest and waits until its connection is closed.
async fn cancel(port: u16, raw: &Raw) {
    let mut other = Raw::connect(port).await;
    let mut request = BytesMut::new();
    frontend::put_cancel(&mut request, raw.key.0, &raw.key.1);
    other.send(&request).await;
    other.stream.read_to_end(&mut Vec::new()).await.unwrap();
}

/// With as many clients as there may be, a cancel is let in.
pub async fn saturated(stage: &Stage) {
    stage.reload("max_clients = 300", "max_clients = 2").await;
    let operator = stage.source.server.connect("shop").await.unwrap();
    let (mut one, _two) = (stage.raw().await, stage.raw().await);
    let mut third = Raw::connect(stage.proxy.listen).await;
    third.send(&crate::raw::startup(196_608, &[(b"user", b"app"), (b"database", b"shop")])).await;
    assert_eq!(crate::last_words(&mut third).await.1, "53300");
    one.send(&Request::new().query("SELECT pg_sleep(300)").0).await;
    let asleep = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
    wait_until("it sleeps", PATIENCE, || async { ask(&operator, asleep).await == "1" }).await;
    cancel(stage.proxy.listen, &one).await;
    assert_eq!(codes(&one.until_ready(1).await), ["57014"]);
    stage.reload("max_clients = 2", "max_clients = 300").await;
}

/// What waits at the gate is cancelled there; what comes behind it is not, and a cancel that finds nothing harms nothing.
pub async fn at_the_gate(stage: &Stage) {
    let [mut simple, mut extended, mut patient] = [stage.raw().await, stage.raw().await, stage.raw().await];
    stage.proxy.rows("PAUSE shop").await;
    simple.send(&Request::new().query("SELECT 'first'").query("SELECT 'second'").0).await;
    let batch = Request::new().parse("kept", "SELECT 'third'", &[]).bind("", "kept", &[], &[], &[]).execute("", 0).sync();
    extended.send(&batch.clone().0).await;
    patient.send(&Request::new().query("SELECT 'fourth'").0).await;
    for raw in [&mut simple, &mut extended] {
        // it may not have come to the gate yet: such a cancel finds nothing
        let mut seen = Vec::new();
        while tags(&seen) != "EZ" {
            cancel(stage.proxy.listen, raw).await;
            while let Ok(message) = tokio::time::timeout(std::time::Duration::from_millis(200), raw.receive()).await {
                seen.push(message);
                if seen.len() == 2 {
                    break;
                }
            }
        }
        assert_eq!(codes(&seen), ["57014"]);
    }
    stage.proxy.rows("RESUME shop").await;
    let seen = simple.until_ready(1).await;
    assert!(tags(&seen) == "TDCZ" && seen[1].body.ends_with(b"second"), "{seen:?}");
    assert_eq!(tags(&patient.until_ready(1).await), "TDCZ");
    // nothing of the cancelled batch was carried out, and nothing waits for its end
    extended.send(&Request::new().bind("", "kept", &[], &[], &[]).sync().0).await;
    assert_eq!(codes(&extended.until_ready(1).await), ["26000"]);
    extended.send(&batch.0).await;
    assert_eq!(tags(&extended.until_ready(1).await), "12DCZ");
    assert_eq!(simple.value("SELECT 1").await, "1", "no late cancel");
}

/// A read that a shadow answers is cancelled there, and not asked again on the owner.
pub async fn served() {
    let source = Trusting::start(15, &[]).await;
    let shadow = Server::start_like(&source.server, 18, Options::default()).await.unwrap();
    for server in [&source.server, &shadow] {
        server.create_database("shop").await.unwrap();
    }
    connect(&source.server.app_url("shop")).await.batch_execute("CREATE TABLE item (id int PRIMARY KEY)").await.unwrap();
    let user = format!("[[database.user]]\nname = \"app\"\npassword = \"{}\"\n", source.server.app_password().expose());
    let text = format!(
        "[[database]]\nname = \"shop\"\nsource = \"{}\"\n{user}\n[[database.shadow]]\nname = \"pg18\"\nurl = \"{}\"\nserve_reads = 0.0\n\
         hedge_after = \"10m\"\n[database.shadow.revert]\nmin_requests = 1000000\nlatency_ratio = 1000000.0\nmax_lag = \"1h\"\n",
        url_text(&source.server.superuser_url("shop")),
        url_text(&shadow.superuser_url("shop")),
    );
    let proxy = Proxy::start("limits-served", "", &text);
    proxy.rows("SHADOW START pg18").await;
    wait_until("in step", PATIENCE, || async {
        proxy.shadow().await.feed.state == "streaming" && proxy.shadow().await.health == "healthy"
    })
    .await;
    proxy.rows("SET pg18 serve_reads = 100").await;
    let mut raw = Raw::open(proxy.listen, "shop").await;
    let deadline = std::time::Instant::now() + PATIENCE;
    while proxy.shadow().await.served.reads == 0 {
        assert_eq!(raw.value("SELECT 1").await, "1");
        assert!(std::time::Instant::now() < deadline, "no read is served: {:?}", proxy.shadow().await.served);
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let (at_owner, at_shadow) = (source.server.connect("shop").await.unwrap(), shadow.connect("shop").await.unwrap());
    let runs = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%generate_series(1, 2000000000)%' AND state = 'active' AND pid <> pg_backend_pid()";
    raw.send(&Request::new().query("SELECT count(*) FROM generate_series(1, 2000000000)").query("SELECT 'next'").0).await;
    wait_until("the shadow works", PATIENCE, || async { ask(&at_shadow, runs).await == "1" }).await;
    cancel(proxy.listen, &raw).await;
    let seen = raw.until_ready(2).await;
    assert_eq!((tags(&seen).as_str(), codes(&seen)), ("EZTDCZ", vec!["57014".to_owned()]));
    for server in [&at_owner, &at_shadow] {
        assert_eq!(ask(server, runs).await, "0");
    }
}
