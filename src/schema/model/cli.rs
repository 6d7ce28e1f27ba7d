//! `understudy model train | evaluate | predict`, without the command line itself.

use super::{Model, data, evaluate, matching, reference, t1, train};
use crate::schema::SchemaError;
use std::{collections::HashMap, fmt::Write, path::Path};

/// Trains on `data` and writes the model to `out`; returns a line for people.
///
/// # Errors
/// [`SchemaError::Model`]
pub fn cli_train(data: &Path, out: &Path) -> Result<String, SchemaError> {
    let started = std::time::Instant::now();
    let model = train(data)?;
    // sorted keys: the same data gives the same bytes
    let text = serde_json::to_value(&model)
        .and_then(|value| serde_json::to_string(&value))
        .map_err(|error| SchemaError::Model(error.to_string()))?;
    std::fs::write(out, &text).map_err(|error| SchemaError::Model(format!("{} cannot be written: {error}", out.display())))?;
    Ok(format!(
        "{}: {} bytes, {} count keys, trained in {:.1} s on permissively licensed projects only",
        out.display(),
        text.len(),
        model.t1_tables.keys.len(),
        started.elapsed().as_secs_f64()
    ))
}

/// Cross-validation grouped by project, as text or JSON.
///
/// # Errors
/// [`SchemaError::Model`]
pub fn cli_evaluate(data: &Path, json: bool) -> Result<String, SchemaError> {
    let report = evaluate(data)?;
    if json {
        return serde_json::to_string_pretty(&report).map_err(|error| SchemaError::Model(error.to_string()));
    }
    let mut text = String::new();
    let mut line = |words: std::fmt::Arguments<'_>| {
        let _ = text.write_fmt(words);
        text.push('\n');
    };
    line(format_args!("cross-validation grouped by project, {} rows for T1", report.t1_rows));
    for (slice, models) in &report.t1 {
        line(format_args!("\nT1 value for existing rows, {slice}\n{:<24}{:>8}{:>8}{:>8}{:>8}", "", "top-1", "top-3", "ECE", "Brier"));
        for (name, score) in models {
            line(format_args!("{name:<24}{:>8.3}{:>8.3}{:>8.3}{:>8.3}", score.top1, score.top3, score.ece, score.brier));
        }
        if let Some(pooling) = models.get("pooling") {
            line(format_args!("reliability of pooling, said→right (rows): {}", bins(&pooling.reliability)));
        }
    }
    for (slice, models) in &report.t2 {
        line(format_args!("\nT2 {slice}\n{:<32}{:>8}{:>8}{:>8}{:>8}", "", "P", "R", "F1", "ECE"));
        for (name, score) in models {
            let ece = score.ece.map_or("-".to_owned(), |ece| format!("{ece:.3}"));
            line(format_args!("{name:<32}{:>8.3}{:>8.3}{:>8.3}{ece:>8}", score.precision, score.recall, score.f1));
        }
        if let Some(model) = models.get("model") {
            line(format_args!("reliability of the model, said→right (rows): {}", bins(&model.reliability)));
        }
    }
    line(format_args!("\nT4 tables that change within 20 migrations (orders warnings)\n{:<24}{:>8}{:>8}{:>8}", "", "AUC", "ECE", "Brier"));
    for (name, score) in &report.t4 {
        let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.3}"));
        line(format_args!("{name:<24}{:>8.3}{:>8}{:>8}", score.auc, number(score.ece), number(score.brier)));
    }
    if let Some(model) = report.t4.get("model") {
        line(format_args!("reliability of the model, said→right (rows): {}", bins(&model.reliability)));
    }
    line(format_args!("\nT5 table that a column refers to, top-1"));
    for (name, share) in &report.t5 {
        line(format_args!("{name:<24}{share:>8.3}"));
    }
    Ok(text)
}

fn bins(reliability: &[(f64, f64, f64)]) -> String {
    reliability.iter().map(|(said, right, rows)| format!("{said:.2}→{right:.2} ({rows:.0})")).collect::<Vec<_>>().join("  ")
}

/// Predicts rows of a CSV file: `t1` prints `row_id` and `p_<class>`, `t2` and `t2t` print `row_id,p`, `t5` prints `row_id,g1,g2,g3`
/// (it needs `table_lifetimes.csv` next to the file). `model`: a file instead of the shipped one.
///
/// # Errors
/// [`SchemaError::Model`]
pub fn cli_predict(task: &str, data: &Path, model: Option<&Path>) -> Result<String, SchemaError> {
    let own;
    let model = match model {
        Some(path) => {
            own = Model::read(path)?;
            &own
        }
        None => Model::shipped(),
    };
    match task {
        "t1" => predict_values(model, data),
        "t2" => {
            let pairs = matching::pairs(data, matching::Kind::Columns)?;
            let positions = pairs.iter().any(|pair| pair.old.ordinal != 0.0 || pair.new.ordinal != 0.0);
            Ok(probabilities(&pairs, &model.same_columns(&pairs, positions)))
        }
        "t2t" => {
            let pairs = matching::pairs(data, matching::Kind::Tables)?;
            Ok(probabilities(&pairs, &model.same_tables(&pairs)))
        }
        "t5" => predict_references(data),
        other => Err(SchemaError::Model(format!("`{other}` is not a task: t1, t2 (columns), t2t (tables) or t5"))),
    }
}

fn predict_values(model: &Model, data: &Path) -> Result<String, SchemaError> {
    let rows = data::t1_rows(data)?;
    let mut text = String::from("row_id");
    t1::CLASSES.iter().for_each(|class| text += &format!(",p_{class}"));
    text.push('\n');
    let lines = t1::with_memory(&rows.iter().collect::<Vec<_>>(), |row, memory| {
        let answer = model.value_for_existing_rows(&row.case, memory);
        row.id.clone() + &answer.iter().map(|p| format!(",{p:.6}")).collect::<String>()
    });
    lines.iter().for_each(|line| text += &format!("{line}\n"));
    Ok(text)
}

fn probabilities(pairs: &[matching::Pair], probabilities: &[f64]) -> String {
    let mut text = String::from("row_id,p\n");
    for (pair, probability) in pairs.iter().zip(probabilities) {
        let _ = writeln!(text, "{},{probability:.6}", pair.id);
    }
    text
}

/// A column whose target is looked for.
pub(super) struct ReferenceRow {
    id: String,
    pub(super) table: String,
    pub(super) column: String,
    pub(super) truth: String,
    pub(super) last_target: Option<String>,
    pub(super) candidates: Vec<String>,
}

/// T5 rows with the tables that were alive then.
pub(super) fn reference_rows(path: &Path, lifetimes: &Path) -> Result<Vec<ReferenceRow>, SchemaError> {
    let rows = data::Table::read(path)?;
    rows.require(path, &["row_id", "project", "seq", "table", "column"])?;
    let alive = data::Table::read(lifetimes)?;
    alive.require(lifetimes, &["project", "table", "from_seq", "to_seq"])?;
    let mut tables: HashMap<&str, Vec<(&str, f64, f64)>> = HashMap::new();
    for row in alive.rows() {
        tables.entry(row.get("project")).or_default().push((row.get("table"), row.number("from_seq"), row.number("to_seq")));
    }
    Ok(rows
        .rows()
        .map(|row| {
            let seq = row.number("seq");
            let mut candidates: Vec<String> = tables
                .get(row.get("project"))
                .into_iter()
                .flatten()
                .filter(|(_, from, to)| *from <= seq && (*to < 0.0 || *to > seq))
                .map(|(name, _, _)| (*name).to_owned())
                .collect();
            candidates.push(row.get("table").to_owned());
            ReferenceRow {
                id: row.get("row_id").to_owned(),
                table: row.get("table").to_owned(),
                column: row.get("column").to_owned(),
                truth: row.get("ref").to_owned(),
                last_target: Some(row.get("last_target_same_column_name").to_owned()).filter(|name| !name.is_empty()),
                candidates,
            }
        })
        .collect())
}

fn predict_references(data: &Path) -> Result<String, SchemaError> {
    let lifetimes = data.with_file_name("table_lifetimes.csv");
    let mut text = String::from("row_id,g1,g2,g3\n");
    for row in reference_rows(data, &lifetimes)? {
        let ranked = reference::rank(&row.table, &row.column, row.last_target.as_deref(), row.candidates.iter().map(String::as_str));
        let guess = |at: usize| ranked.get(at).copied().unwrap_or("");
        let _ = writeln!(text, "{},{},{},{}", row.id, guess(0), guess(1), guess(2));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_use_says_what_to_do() {
        let error = cli_predict("t9", Path::new("/nowhere"), None).unwrap_err().to_string();
        assert!(error.contains("t1, t2"), "{error}");
        assert!(cli_predict("t1", Path::new("/nowhere/x.csv"), None).unwrap_err().to_string().contains("/nowhere/x.csv"));
        assert!(cli_train(Path::new("/nowhere"), Path::new("/tmp/x")).is_err());
    }
}
