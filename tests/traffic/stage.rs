//! A source of 15, a shadow of 18 in step, and the proxy between.

use crate::{
    harness::{Proxy, connect, database_text, url_text},
    support::{Options, Server},
};
use std::time::{Duration, Instant};
use tokio_postgres::Client;
use understudy::console::state::CompareState;

/// On a loaded machine nothing is quick.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct Stage {
    pub proxy: Proxy,
    pub source: Server,
    pub shadow: Server,
}

impl Stage {
    /// `more`: lines of the shadow's section, and sections behind it.
    pub async fn start(name: &str, schema: &str, more: &str) -> Stage {
        let source = Server::start(15, Options::default()).await.unwrap();
        // who asked what, word for word
        let logging = Options::default().set("log_line_prefix", "|%a|").set("log_statement", "all").set("max_connections", "200");
        let shadow = Server::start_like(&source, 18, logging).await.unwrap();
        for server in [&source, &shadow] {
            server.create_database("shop").await.unwrap();
        }
        source.connect("shop").await.unwrap().batch_execute(schema).await.unwrap();
        let text = format!(
            "{}\n[[database.shadow]]\nname = \"pg18\"\nurl = \"{}\"\nsample_reads = 0.0\nmirror_writes = \"off\"\n{more}\n\
             [database.shadow.revert]\nmin_requests = 1000000\nerror_rate = 100.0\nmismatch_rate = 100.0\nlatency_ratio = 100000.0\nmax_lag = \"1h\"\n",
            database_text(&source),
            url_text(&shadow.superuser_url("shop"))
        );
        let (head, rest) = text.split_once("[database.shadow.revert]").unwrap();
        // an array of tables must stand behind the tables of its parent
        let (plain, arrays) = head.split_at(head.find("[[database.shadow.ignore]]").unwrap_or(head.len()));
        let proxy = Proxy::start(name, "", &format!("{plain}[database.shadow.revert]{rest}\n{arrays}"));
        proxy.rows("SHADOW START pg18").await;
        let stage = Stage { proxy, source, shadow };
        stage.in_step().await;
        stage
    }

    pub async fn in_step(&self) {
        let began = Instant::now();
        loop {
            let shadow = self.proxy.shadow().await;
            if shadow.health == "healthy" && shadow.feed.state == "streaming" {
                return;
            }
            assert!(began.elapsed() < PATIENCE, "{:?}\n{}", shadow.feed, self.proxy.log_text());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub async fn client(&self) -> Client {
        connect(&self.proxy.through(&self.source.superuser_url("shop"))).await
    }

    pub async fn set(&self, knob: &str, value: &str) {
        self.proxy.rows(&format!("SET pg18 {knob} = {value}")).await;
    }

    pub async fn compare(&self) -> CompareState {
        self.proxy.shadow().await.compare
    }

    /// Waits until everything sampled has a verdict.
    pub async fn settled(&self) -> CompareState {
        let began = Instant::now();
        loop {
            let now = self.compare().await;
            if now.same + now.different + now.undecided + now.dropped >= now.sampled {
                return now;
            }
            assert!(began.elapsed() < PATIENCE, "comparisons are not decided: {now:?}");
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    }

    /// Changes the shadow behind the feed's back.
    pub async fn tamper(&self, text: &str) {
        let client = self.shadow.connect("shop").await.unwrap();
        client.batch_execute(&format!("SET session_replication_role = replica; {text}")).await.unwrap();
    }

    /// What our copies have asked the shadow so far.
    pub fn copies_log(&self) -> String {
        let log = std::fs::read(self.shadow.log()).unwrap();
        let log = String::from_utf8_lossy(&log);
        log.lines().filter(|line| line.starts_with("|understudy copies|")).collect::<Vec<_>>().join("\n")
    }
}
