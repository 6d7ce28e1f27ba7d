//! The command line: parses, dispatches, and turns outcomes into exit codes.
//! Exit codes: 0 done, 1 the answer is no, 2 wrong use, 3 could not be carried out.

use crate::{config, console::ctl, control, demo, schema::model};
use clap::{Parser, Subcommand, ValueEnum};
use std::{
    io::IsTerminal,
    net::SocketAddr,
    path::{Path, PathBuf},
};

/// understudy: change the database behind your applications, safely.
#[derive(Parser)]
#[command(name = "understudy", version, about, max_term_width = 110)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the proxy until SHUTDOWN, SIGTERM or Ctrl-C
    Run {
        /// Configuration file
        #[arg(long, default_value = "proxy.toml")]
        config: PathBuf,
        /// error, warn, info, debug or trace
        #[arg(long, default_value = "info")]
        log: tracing::Level,
        /// Take over from the running process: it hands its sockets and feeds over and ends when its sessions have ended
        #[arg(long)]
        takeover: bool,
    },
    /// Assess a migration before it starts; exit status 1 when something blocks it
    Check {
        /// Configuration file
        #[arg(long, default_value = "proxy.toml")]
        config: PathBuf,
        /// A planned migration: what each of its steps will do; exit status 1 when something would break
        #[arg(long, value_name = "FILE")]
        ddl: Option<PathBuf>,
        /// For scripts
        #[arg(long)]
        json: bool,
    },
    /// Send a console command to a running proxy, such as: understudy ctl SHOW SHADOWS
    Ctl {
        #[command(flatten)]
        to: Where,
        /// The command
        #[arg(required = true, trailing_var_arg = true)]
        words: Vec<String>,
    },
    /// Compare a shadow with the owner of the writes, live; exit status 1 when they differ
    Verify {
        #[command(flatten)]
        to: Where,
        /// Name of the shadow
        shadow: String,
        /// One table only
        #[arg(long)]
        table: Option<String>,
        /// Write the owner's rows over the differences
        #[arg(long)]
        repair: bool,
    },
    /// Watch the whole story on servers of its own: shadow, rehearse, shift, revert, cut over, roll back
    Demo {
        /// A shorter run, for tests
        #[arg(long)]
        quick: bool,
        /// Break something on purpose
        #[arg(long = "break", value_enum)]
        break_: Option<Break>,
        /// Keep servers and folders at the end
        #[arg(long)]
        keep: bool,
        /// Where to write the report
        #[arg(long, default_value = "target/demo/report.json")]
        report: PathBuf,
    },
    /// The adaptation model: train, evaluate, predict
    Model {
        #[command(subcommand)]
        command: ModelCommand,
    },
}

#[derive(clap::Args)]
struct Where {
    /// Configuration file of the running proxy
    #[arg(long, default_value = "proxy.toml")]
    config: PathBuf,
    /// postgres://user:password@host:port of the console instead
    #[arg(long)]
    url: Option<String>,
    /// For scripts
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Break {
    /// One value is changed on the shadow behind the feed's back: must be found
    CorruptRow,
    /// One change is dropped before it is applied: must be found
    LoseChange,
    /// The shadow is killed in the middle of the ladder: must end well
    ShadowDown,
}

#[derive(Subcommand)]
enum ModelCommand {
    /// Fit the model on schema histories
    Train {
        /// Folder with the CSV files
        #[arg(long)]
        data: PathBuf,
        /// Where to write the model
        #[arg(long)]
        out: PathBuf,
    },
    /// Cross-validate, grouped by project, against the baselines
    Evaluate {
        /// Folder with the CSV files
        #[arg(long)]
        data: PathBuf,
        /// For scripts
        #[arg(long)]
        json: bool,
    },
    /// Print predictions as CSV
    Predict {
        /// t1, t2, t2t or t5
        task: String,
        /// CSV file
        #[arg(long)]
        data: PathBuf,
        /// Instead of the shipped model
        #[arg(long)]
        model: Option<PathBuf>,
    },
}

/// Runs the program and returns its exit code.
pub fn main() -> i32 {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { 2 } else { 0 };
        }
    };
    if let Command::Model { command } = arguments.command {
        return model_command(command);
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().thread_stack_size(8 << 20).build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(3, &format!("cannot start the runtime: {error}")),
    };
    let code = runtime.block_on(dispatch(arguments.command));
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    code
}

fn fail(code: i32, message: &str) -> i32 {
    eprintln!("understudy: {message}");
    code
}

async fn dispatch(command: Command) -> i32 {
    match command {
        Command::Run { config, log, takeover } => {
            let colour = std::io::stderr().is_terminal();
            tracing_subscriber::fmt().with_max_level(log).with_writer(std::io::stderr).with_ansi(colour).with_target(false).init();
            match control::run(&config, takeover).await {
                Ok(()) => 0,
                Err(error @ control::StartError::Config(_)) => fail(2, &error.to_string()),
                Err(error) => fail(3, &error.to_string()),
            }
        }
        Command::Check { config, ddl, json } => check(&config, ddl.as_deref(), json).await,
        Command::Ctl { to, words } => match target(&to) {
            Ok(target) => ctl::ctl(target, &words.join(" "), to.json).await,
            Err(message) => fail(2, &message),
        },
        Command::Verify { to, shadow, table, repair } => {
            let mut words = format!("VERIFY {shadow}");
            if let Some(table) = table {
                words.push_str(&format!(" TABLE {table}"));
            }
            if repair {
                words.push_str(" REPAIR");
            }
            match target(&to) {
                Ok(target) => ctl::ctl(target, &words, to.json).await,
                Err(message) => fail(2, &message),
            }
        }
        Command::Demo { quick, break_, keep, report } => {
            let break_ = break_.map(|break_| match break_ {
                Break::CorruptRow => demo::Break::CorruptRow,
                Break::LoseChange => demo::Break::LoseChange,
                Break::ShadowDown => demo::Break::ShadowDown,
            });
            demo::run(demo::DemoOptions { broken: break_, keep, quick, report }).await
        }
        Command::Model { .. } => fail(2, "handled before"),
    }
}

async fn check(path: &Path, ddl: Option<&Path>, json: bool) -> i32 {
    let config = match config::load(path) {
        Ok(config) => config,
        Err(error) => return fail(2, &error.to_string()),
    };
    if let Some(ddl) = ddl {
        let migration = match std::fs::read_to_string(ddl) {
            Ok(migration) => migration,
            Err(error) => return fail(2, &format!("{} cannot be read: {error}", ddl.display())),
        };
        return match crate::check::forecast(&config, &migration).await {
            Ok(forecasts) => {
                print!("{}", crate::check::render_forecast(&forecasts, json));
                i32::from(crate::check::breaks(&forecasts))
            }
            Err(error @ crate::schema::SchemaError::Proposal(_)) => fail(2, &error.to_string()),
            Err(error) => fail(3, &error.to_string()),
        };
    }
    let findings = crate::check::assess(&config).await;
    print!("{}", crate::check::render(&findings, json, !json && std::io::stdout().is_terminal()));
    i32::from(findings.iter().any(|finding| finding.severity == crate::check::Severity::Blocker))
}

fn target(to: &Where) -> Result<ctl::CtlTarget, String> {
    if let Some(url) = &to.url {
        let url = config::ServerUrl::parse(url)?;
        return Ok(ctl::CtlTarget { host: url.host, port: url.port, user: url.user, password: url.password });
    }
    let config = config::load(&to.config).map_err(|error| error.to_string())?;
    let listen = config.proxy.listen;
    let host = if listen.ip().is_unspecified() { SocketAddr::from(([127, 0, 0, 1], listen.port())) } else { listen };
    let (user, password) = match config.proxy.console {
        Some(console) => (console.user, Some(console.password)),
        None => (std::env::var("USER").unwrap_or_else(|_| "operator".into()), None),
    };
    Ok(ctl::CtlTarget { host: host.ip().to_string(), port: host.port(), user, password })
}

fn model_command(command: ModelCommand) -> i32 {
    let outcome = match command {
        ModelCommand::Train { data, out } => model::cli_train(&data, &out),
        ModelCommand::Evaluate { data, json } => model::cli_evaluate(&data, json),
        ModelCommand::Predict { task, data, model } => model::cli_predict(&task, &data, model.as_deref()),
    };
    match outcome {
        Ok(text) => {
            print!("{text}");
            0
        }
        Err(error) => fail(3, &error.to_string()),
    }
}
