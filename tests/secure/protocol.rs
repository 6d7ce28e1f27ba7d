//! Minor versions and options of the protocol: direct, relayed and ended at the proxy.

use crate::{
    clients::{message, startup},
    harness::{Proxy, url_text},
    support::Server,
};
use std::{io::Write, net::TcpStream, time::Duration};
use understudy::backend::{self, Connection};

/// Up to the first request for authentication: tags and bodies.
fn first_words(port: u16, packet: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    stream.write_all(packet).unwrap();
    let mut words = Vec::new();
    loop {
        let word = message(&mut stream);
        let last = matches!(word.0, b'R' | b'E');
        words.push(word);
        if last {
            return words;
        }
    }
}

pub async fn versions(source: &Server) {
    let list = format!(
        "[proxy.auth]\nusers = \"query\"\n\n[[database]]\nname = \"shop\"\nsource = \"{}\"\n",
        url_text(&source.superuser_url("shop"))
    );
    let ended = Proxy::start("versions-ended", "", &list);
    let relayed = Proxy::start("versions-relayed", "", &list.replace("\"query\"", "\"relay\""));
    let user = [("user", "app"), ("database", "shop")];
    let with = |more: &[(&'static str, &'static str)]| [&user[..], more].concat();
    for (version, parameters) in [
        (3 << 16, user.to_vec()),
        (3 << 16 | 1, user.to_vec()),
        (3 << 16 | 2, user.to_vec()),
        (3 << 16 | 3, user.to_vec()),
        (3 << 16 | 9999, with(&[("_pq_.test_protocol_negotiation", "")])),
        (3 << 16, with(&[("_pq_.one", "1"), ("_pq_.two", "2"), ("application_name", "x")])),
    ] {
        let packet = startup(version, &parameters);
        let direct = first_words(source.port(), &packet);
        assert_eq!(first_words(relayed.listen, &packet), direct, "relayed, version {version:x}");
        if source.major() == 18 {
            assert_eq!(first_words(ended.listen, &packet), direct, "ended, version {version:x}");
        }
    }
    // keys for cancelling: as long as the version says, and they work
    let app = source.app_url("shop");
    for (proxy, longest) in [(&ended, 32), (&relayed, if source.major() == 18 { 32 } else { 4 })] {
        for (version, length) in [(3 << 16, 4), (3 << 16 | 2, longest)] {
            let url = proxy.through(&app);
            let login = understudy::auth::ServerLogin::from(url.password.as_ref());
            let mut connection = Connection::open_version(version, &url, "app", &login, &[]).await.unwrap();
            let (pid, key) = connection.key.clone();
            assert_eq!(key.len(), length, "version {version:x}");
            let mut control = Connection::open(&source.superuser_url("shop"), &[]).await.unwrap();
            let asleep = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%' AND state = 'active'";
            let slept = tokio::spawn(async move { connection.simple_query("SELECT pg_sleep(60)").await });
            while control.simple_query(asleep).await.unwrap()[0][0].as_deref() != Some("1") {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            let mut wrong = key.to_vec();
            wrong[key.len() - 1] ^= 1;
            backend::cancel(&url, pid, &wrong).await.unwrap();
            assert_eq!(control.simple_query(asleep).await.unwrap()[0][0].as_deref(), Some("1"), "another key");
            backend::cancel(&url, pid, &key).await.unwrap();
            assert!(slept.await.unwrap().unwrap_err().to_string().contains("57014"));
        }
    }
}
