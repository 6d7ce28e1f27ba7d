//! A server, and a proxy in front of it that pools.
#![allow(dead_code)]

use crate::{
    harness::{Proxy, ask, connect, url_text, wait_until},
    raw::{Raw, startup},
    support::{Options, Server},
};
use serde_json::Value;
use std::time::Duration;
use tokio_postgres::Client;

pub const PATIENCE: Duration = Duration::from_secs(60);
/// The role with a password; everybody else is trusted by understudy.
pub const AUTH: &str =
    "[proxy.auth]\nusers = \"query\"\nrules = [\"host all sesame 127.0.0.1/32 scram-sha-256\", \"host all all 127.0.0.1/32 trust\"]\n";

pub struct Stage {
    pub proxy: Proxy,
    pub server: Server,
}

impl Stage {
    /// `pool`: lines of `[proxy.pool]`; `more`: of `[proxy]`.
    pub async fn start(name: &str, major: u32, pool: &str, more: &str) -> Stage {
        Self::start_behind(name, major, pool, more, |port| port).await
    }

    /// `way`: from the server's port to the one under which understudy finds it.
    pub async fn start_behind(name: &str, major: u32, pool: &str, more: &str, way: impl FnOnce(u16) -> u16) -> Stage {
        let server = Server::start(major, Options::default()).await.unwrap();
        server.create_database("shop").await.unwrap();
        let admin = server.connect("shop").await.unwrap();
        admin
            .batch_execute(
                "CREATE ROLE sesame LOGIN PASSWORD 'open'; GRANT ALL ON SCHEMA public TO PUBLIC;
                 CREATE TABLE item (id int PRIMARY KEY, v int NOT NULL); INSERT INTO item SELECT k, k * 10 FROM generate_series(1, 100) k;
                 GRANT ALL ON item TO PUBLIC; GRANT pg_signal_backend TO app",
            )
            .await
            .unwrap();
        let mut source = server.superuser_url("shop");
        source.port = way(source.port);
        let text = format!(
            "[proxy.pool]\n{pool}\n{AUTH}[[database]]\nname = \"shop\"\nsource = \"{}\"\n[[database.user]]\nname = \"app\"\npassword = \"{}\"\n",
            url_text(&source),
            server.app_password().expose()
        );
        let proxy = Proxy::start(name, &format!("pool_mode = \"transaction\"\n{more}"), &text);
        Stage { proxy, server }
    }

    pub async fn client(&self) -> Client {
        connect(&self.proxy.through(&self.server.app_url("shop"))).await
    }

    /// Around the proxy.
    pub async fn direct(&self) -> Client {
        self.server.connect("shop").await.unwrap()
    }

    pub async fn raw(&self) -> Raw {
        Raw::open(self.proxy.listen, "shop").await
    }

    pub async fn raw_with(&self, parameters: &[(&[u8], &[u8])]) -> Raw {
        let all: Vec<_> = [(&b"user"[..], &b"app"[..]), (b"database", b"shop")].into_iter().chain(parameters.iter().copied()).collect();
        Raw::open_with(self.proxy.listen, &startup(196_608, &all)).await
    }

    /// A column of the row of SHOW POOLS.
    pub async fn pool(&self, column: &str) -> Value {
        let rows = self.proxy.rows("SHOW POOLS").await;
        let row = rows.iter().find(|row| row["user"] == "app").unwrap_or_else(|| panic!("{rows:?}"));
        row[column].clone()
    }

    pub async fn until(&self, column: &str, value: u64) {
        wait_until(&format!("{column} is {value}"), PATIENCE, || async { self.pool(column).await == value }).await;
    }

    /// What SHOW CLIENTS says of the only client with that application_name.
    pub async fn shown(&self, application: &str, column: &str) -> String {
        let rows = self.proxy.rows("SHOW CLIENTS").await;
        let row = rows.iter().find(|row| row["application"] == application).unwrap_or_else(|| panic!("{application}: {rows:?}"));
        row[column].as_str().unwrap_or_default().to_owned()
    }

    pub async fn until_shown(&self, application: &str, column: &str, value: &str) {
        wait_until(&format!("{column} of {application} is {value}"), PATIENCE, || async { self.shown(application, column).await == value })
            .await;
    }
}

/// The process at the other end.
pub async fn pid(client: &Client) -> String {
    ask(client, "SELECT pg_backend_pid()").await
}
