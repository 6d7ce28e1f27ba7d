//! `understudy check --ddl`: a planned migration, step by step, against the servers of the configuration. Reads only.

use crate::{
    config::{Config, ServerUrl},
    schema::{
        SchemaError,
        catalog::Catalog,
        foresee::{Action, Facts, Step, foresee, parse, probe},
    },
};
use serde::Serialize;
use std::fmt::Write;
use tokio_postgres::{Client, NoTls};

/// What the migration does to one database, and to one of its shadows (empty: it has none).
#[derive(Clone, Debug, Serialize)]
pub struct Forecast {
    /// `[[database]]` name.
    pub database: String,
    /// `[[database.shadow]]` name.
    pub shadow: String,
    /// The steps.
    pub steps: Vec<Step>,
}

async fn connect(url: &ServerUrl) -> Result<Client, SchemaError> {
    let (client, connection) =
        url.to_tokio("understudy check").connect(NoTls).await.map_err(|error| SchemaError::server(&format!("connect to {url}"), error))?;
    tokio::spawn(async move {
        // A broken connection shows in the query that was running.
        let _ = connection.await;
    });
    Ok(client)
}

async fn facts(client: &Client, catalog: &Catalog, actions: &[(usize, Action)]) -> Result<Facts, SchemaError> {
    let mut facts = Facts::default();
    for table in catalog.tables.values().filter(|table| table.holds_rows()) {
        let named = actions.iter().any(|(_, action)| format!("{action:?}").contains(&format!("{:?}", table.name)));
        if named {
            facts.tables.insert(table.oid, probe::table_facts(client, table).await?);
        }
    }
    for (number, (_, action)) in actions.iter().enumerate() {
        match probe::ask(client, catalog, action).await {
            Ok(None) => {}
            Ok(Some(found)) => drop(facts.probes.insert(number, Ok(found))),
            Err(error) => drop(facts.probes.insert(number, Err(error.to_string()))),
        }
    }
    Ok(facts)
}

/// Foresees a migration for every database and shadow.
///
/// # Errors
/// [`SchemaError`]: the text is no SQL, or a server cannot be asked.
pub async fn forecast(config: &Config, migration: &str) -> Result<Vec<Forecast>, SchemaError> {
    let actions = parse(migration)?;
    let mut forecasts = Vec::new();
    for database in &config.databases {
        let client = connect(&database.source).await?;
        let catalog = Catalog::load(&client).await?;
        let facts = facts(&client, &catalog, &actions).await?;
        let mut add = |shadow: &str, twin: Option<&Catalog>| {
            let steps = foresee(&actions, &catalog, twin, &facts);
            forecasts.push(Forecast { database: database.name.clone(), shadow: shadow.to_owned(), steps });
        };
        if database.shadows.is_empty() {
            add("", None);
        }
        for shadow in &database.shadows {
            let twin = Catalog::load(&connect(&shadow.url).await?).await?;
            add(&shadow.name, Some(&twin));
        }
    }
    Ok(forecasts)
}

/// Something would break.
pub fn breaks(forecasts: &[Forecast]) -> bool {
    forecasts.iter().any(|forecast| forecast.steps.iter().any(|step| step.breaks))
}

/// For people, or as JSON.
pub fn render_forecast(forecasts: &[Forecast], json: bool) -> String {
    if json {
        return format!("{:#}\n", serde_json::json!({"breaks": breaks(forecasts), "forecasts": forecasts}));
    }
    let mut text = String::new();
    for forecast in forecasts {
        let _ = writeln!(text, "{} {}", forecast.database, forecast.shadow);
        for step in &forecast.steps {
            let verdict = if step.breaks { "BREAKS" } else { "works" };
            let _ = writeln!(text, "  line {}: {} — {verdict}, confidence {:.2}", step.line, step.step, step.confidence);
            for (side, words) in [
                ("source", &step.source),
                ("shadow", &step.shadow),
                ("feed", &step.feed),
                ("traffic", &step.traffic),
                ("rollback", &step.rollback),
                ("better", &step.remedy),
            ] {
                if !words.is_empty() {
                    let _ = writeln!(text, "    {side:<9}{words}");
                }
            }
        }
    }
    let count = forecasts.iter().flat_map(|forecast| &forecast.steps).filter(|step| step.breaks).count();
    let _ = writeln!(text, "{}", if count == 0 { "nothing breaks".to_owned() } else { format!("{count} steps would break") });
    text
}
