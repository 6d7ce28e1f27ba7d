//! Before the curtain: two servers, the source's data, proxy.toml, `understudy check`, the proxy, the load.

use super::{DATABASE, Pace, Play};
use crate::demo::{
    Break, DemoError, DemoOptions,
    pgbench::{self, PgBench, Target},
    proxy::{self, Proxy, Settings},
    report::Report,
    servers::{Options, Server, free_port},
    stage::Stage,
    tally::Tally,
    workload::{self, Workload},
};
use std::{fs, net::TcpListener, path::Path, sync::Arc};

/// What a person expects to find; if something listens there already, free ports are taken.
const USUAL_PORTS: (u16, u16) = (6432, 6480);

impl<'a> Play<'a> {
    /// Chapter a, and the load.
    ///
    /// # Errors
    /// [`DemoError`]
    pub async fn prepare(options: &'a DemoOptions, stage: &Stage, report: &mut Report) -> Result<Self, DemoError> {
        let pace = if options.quick { Pace::QUICK } else { Pace::FULL };
        let directory = options.directory()?;
        let logs = directory.join("pgbench");
        let _ = fs::remove_dir_all(&logs);
        fs::create_dir_all(&logs).map_err(|error| DemoError::Cannot(format!("cannot create {}: {error}", logs.display())))?;

        stage.chapter("a. Two servers, the source's data, and a look at both");
        let log = |name: &str| {
            let path = directory.join(name);
            let _ = fs::remove_file(&path);
            Options::default().log(path)
        };
        stage.live("starting a PostgreSQL 15");
        let source = Server::start(15, log("source.log")).await?;
        stage.live("starting a PostgreSQL 18");
        let shadow = Server::start_like(&source, 18, log("shadow.log")).await?;
        for server in [&source, &shadow] {
            server.create_database(DATABASE).await?;
        }
        report.versions.source = version(&source).await?;
        report.versions.shadow = version(&shadow).await?;
        stage.good(format!("source: {} on port {}", report.versions.source, source.port()));
        stage.good(format!("shadow: {} on port {}, empty", report.versions.shadow, shadow.port()));

        stage.live("filling the source");
        let direct = target(&source, source.port());
        pgbench::initialise(&direct, pace.scale).await.map_err(DemoError::Cannot)?;
        create_rich_tables(&source).await?;
        stage.good(format!("source filled: pgbench scale {}, and tables with the types that pgbench does not have", pace.scale));

        let (listen, http) = ports(options.quick)?;
        let settings = Settings {
            listen,
            http,
            source: url(&source),
            shadow: url(&shadow),
            user: Server::APP,
            password: source.app_password().clone(),
            hold_s: pace.hold.as_secs_f64(),
        };
        let config = proxy::write_config(&directory, &settings)?;
        check(stage, &config).await?;

        let fault = (options.broken == Some(Break::LoseChange)).then_some("lose-change");
        let proxy = Proxy::start(config, &settings, directory.join("proxy.log"), fault)
            .await
            .map_err(|error| DemoError::Cannot(error.to_string()))?;
        let console = proxy.console().await?;
        stage.good(format!("proxy on port {}; watch it at http://127.0.0.1:{}/", proxy.listen(), proxy.http()));

        let (tally, ledger) = (Arc::new(Tally::default()), Arc::default());
        let through = target(&source, proxy.listen());
        let bench = PgBench::start(&through, pace.bench_rate, &logs, &tally).map_err(|error| DemoError::Cannot(error.to_string()))?;
        let workload = Workload::start(&through, pace.clients, pace.client_pace, &tally, &ledger);
        stage.good(format!(
            "load through the proxy from here to the end: pgbench in simple, extended and prepared mode ({} transactions/s each), \
             {} clients with richer types",
            pace.bench_rate, pace.clients
        ));
        Ok(Play {
            options,
            pace,
            stage: stage.clone(),
            source: Arc::new(source),
            shadow: Arc::new(shadow),
            proxy,
            console,
            tally,
            ledger,
            bench: Some(bench),
            workload: Some(workload),
        })
    }

    /// A client of the application, through the proxy.
    pub(super) fn target(&self) -> Target {
        target(&self.source, self.proxy.listen())
    }
}

fn target(source: &Server, port: u16) -> Target {
    Target { port, dbname: DATABASE.into(), user: Server::APP.into(), password: source.app_password().clone() }
}

async fn version(server: &Server) -> Result<String, DemoError> {
    let client = server.connect("postgres").await?;
    let row = client
        .query_one("SHOW server_version", &[])
        .await
        .map_err(|error| DemoError::Cannot(format!("cannot ask for the version: {error}")))?;
    Ok(format!("PostgreSQL {}", row.get::<_, String>(0)))
}

async fn create_rich_tables(source: &Server) -> Result<(), DemoError> {
    let failed = |error| DemoError::Cannot(format!("cannot create the tables of the second workload: {error:?}"));
    let (client, connection) = source.app_url(DATABASE).to_tokio("operator").connect(tokio_postgres::NoTls).await.map_err(failed)?;
    tokio::spawn(connection);
    client.batch_execute(workload::SCHEMA).await.map_err(failed)?;
    client.batch_execute("ANALYZE").await.map_err(failed)
}

/// The url as an operator writes it, with the password of a role that may replicate.
fn url(server: &Server) -> String {
    let url = server.superuser_url(DATABASE);
    let password = url.password.as_ref().map(|password| password.expose().to_owned()).unwrap_or_default();
    format!("postgres://{}:{password}@{}:{}/{}?sslmode=disable", url.user, url.host, url.port, url.dbname)
}

fn ports(quick: bool) -> Result<(u16, u16), DemoError> {
    let is_free = |port: u16| TcpListener::bind(("127.0.0.1", port)).is_ok();
    if !quick && is_free(USUAL_PORTS.0) && is_free(USUAL_PORTS.1) {
        return Ok(USUAL_PORTS);
    }
    let free = || free_port().map_err(|error| DemoError::Cannot(format!("cannot find a free port: {error}")));
    Ok((free()?, free()?))
}

async fn check(stage: &Stage, config: &Path) -> Result<(), DemoError> {
    stage.line(stage.strong(&format!("$ understudy check --config {}", config.display())));
    let (status, output) = proxy::run_subcommand(&["check"], config).await?;
    stage.quote(&output);
    match status {
        0 => Ok(()),
        1 => Err(DemoError::Failed("`understudy check` found a blocker".into())),
        status => Err(DemoError::Cannot(format!("`understudy check` ended with status {status}"))),
    }
}
