//! `pool_mode = "session"` with a size: connections are used again by whoever starts up the same way.

use crate::{
    harness::{Proxy, sqlstate, try_connect, url_text},
    raw::{Raw, startup},
    stage::{AUTH, Stage},
    support::{Options, Server},
};

pub async fn bounded() {
    let server = Server::start(15, Options::default()).await.unwrap();
    server.create_database("shop").await.unwrap();
    let text = format!(
        "[proxy.pool]\nsize = 2\nqueue_timeout = \"5s\"\n{AUTH}[[database]]\nname = \"shop\"\nsource = \"{}\"\n[[database.user]]\nname = \"app\"\npassword = \"{}\"\n",
        url_text(&server.superuser_url("shop")),
        server.app_password().expose()
    );
    let stage = Stage { proxy: Proxy::start("session-mode", "", &text), server };
    let named = async |name: &'static [u8]| {
        let packet = startup(196_608, &[(b"user", b"app"), (b"database", b"shop"), (b"application_name", name)]);
        Raw::open_with(stage.proxy.listen, &packet).await
    };
    let mut one = named(b"a").await;
    let own = one.value("SELECT pg_backend_pid()").await;
    one.query("CREATE TEMP TABLE mine (id int); SET work_mem = '9MB'; PREPARE p AS SELECT 1").await;
    drop(one);
    stage.until("sv_idle", 1).await;
    // the same start-up: the same connection, as new
    let mut one = named(b"a").await;
    assert_eq!(one.value("SELECT pg_backend_pid()").await, own);
    for (text, value) in [
        ("SHOW work_mem", "4MB"),
        ("SHOW application_name", "a"),
        ("SELECT to_regclass('mine') IS NULL", "t"),
        ("SELECT count(*) FROM pg_prepared_statements", "0"),
    ] {
        assert_eq!(one.value(text).await, value, "{text}");
    }
    // another start-up: another connection, and the size holds
    let mut two = named(b"b").await;
    assert_ne!(two.value("SELECT pg_backend_pid()").await, own);
    let url = stage.proxy.through(&stage.server.app_url("shop"));
    assert_eq!(sqlstate(try_connect(&url).await), "53300");
    // an idle one with another start-up gives way
    drop(two);
    stage.until("sv_idle", 1).await;
    let mut three = named(b"c").await;
    assert_eq!(three.value("SHOW application_name").await, "c");
    // inside a transaction: rolled back before it is used again
    three.query("BEGIN; CREATE TABLE never (id int)").await;
    let own = three.value("SELECT pg_backend_pid()").await;
    drop(three);
    stage.until("sv_idle", 1).await;
    let mut again = named(b"c").await;
    assert_eq!(again.value("SELECT pg_backend_pid()").await, own);
    assert_eq!(again.value("SELECT to_regclass('never') IS NULL").await, "t");
    assert_eq!((stage.pool("mode").await, stage.pool("clients").await), ("session".into(), 2.into()));
}
