//! What rules cannot know, learnt from the histories of real schemas: the value that existing rows get in a new column (T1), which removed
//! and added columns and tables are the same (T2), which tables will change soon (T4, to order warnings), which table a column refers to (T5). Own code, plain numbers, no run-time dependency.
//!
//! Deliberately absent: type-change verdicts and same-lineage renames (PostgreSQL answers these exactly: `rules`, `diff`), anything keyed
//! by project. The shipped model is trained on permissively licensed projects only.
//!
//! Invariants: one prediction costs microseconds; the file is below 1 MB; probabilities are calibrated out of project (`evaluate`).

pub mod cli;
pub mod columns;
mod data;
mod evaluate;
pub mod learn;
pub mod live;
pub mod matching;
pub mod reference;
pub mod similarity;
pub mod soon;
pub mod t1;
pub mod tables;

pub use cli::{cli_evaluate, cli_predict, cli_train};
pub use evaluate::{Report, evaluate};

use crate::schema::SchemaError;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeSet, path::Path, sync::OnceLock};

/// Version of the file's layout.
const FORMAT: u32 = 3;

/// All that was learnt.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct Model {
    /// Layout version.
    pub format: u32,
    /// T1: shared weights.
    pub t1_weights: Vec<f64>,
    /// T1: count tables.
    pub t1_tables: t1::Tables,
    /// T2 columns, without and with ordinal positions.
    pub t2_columns: learn::Matcher,
    /// T2 columns with ordinal positions.
    pub t2_columns_positions: learn::Matcher,
    /// T2 tables.
    pub t2_tables: learn::Matcher,
    /// T4.
    pub soon: soon::Soon,
}

/// Trains on a folder of CSV files, on the permissively licensed projects only.
///
/// # Errors
/// [`SchemaError::Model`]
pub fn train(folder: &Path) -> Result<Model, SchemaError> {
    let permitted = data::permissive(folder)?;
    let rows: Vec<t1::Row> =
        data::t1_rows(&folder.join("t1_default.csv"))?.into_iter().filter(|row| permitted.contains(&row.project)).collect();
    let (mut t1_tables, t1_weights) = train_t1(&rows.iter().collect::<Vec<_>>());
    t1::prune(&mut t1_tables);
    let permitted_pairs = |file: &str, kind| -> Result<Vec<matching::Pair>, SchemaError> {
        let pairs = matching::pairs(&folder.join(file), kind)?;
        Ok(pairs.into_iter().filter(|pair| permitted.contains(&pair.project)).collect())
    };
    let columns = permitted_pairs("t2_column_match.csv", matching::Kind::Columns)?;
    let tables = permitted_pairs("t2_table_match.csv", matching::Kind::Tables)?;
    let column_features = columns::features(&columns);
    let fit = |pairs: &[matching::Pair], features: &[&[f64]], shape| matching::train(&pairs.iter().collect::<Vec<_>>(), features, shape);
    let plain: Vec<&[f64]> = column_features.iter().map(|features| &features[..columns::PLAIN]).collect();
    let all: Vec<&[f64]> = column_features.iter().map(Vec::as_slice).collect();
    let table_features = tables::features(&tables);
    let of_tables: Vec<&[f64]> = table_features.iter().map(Vec::as_slice).collect();
    let round = |value: f64| (value * 1e4).round() / 1e4;
    Ok(Model {
        format: FORMAT,
        t1_weights: t1_weights.into_iter().map(round).collect(),
        t1_tables,
        t2_columns: fit(&columns, &plain, columns::SHAPE),
        t2_columns_positions: fit(&columns, &all, columns::SHAPE_WITH_POSITION),
        t2_tables: fit(&tables, &of_tables, tables::SHAPE),
        soon: {
            let rows = soon::rows(&folder.join("t4_table_drift.csv"))?;
            soon::Soon::fit(&rows.iter().filter(|row| permitted.contains(&row.project)).collect::<Vec<_>>())
        },
    })
}

/// Count tables and weights from rows; each project's features leave its own counts out, as they will be for a project never seen.
fn train_t1(rows: &[&t1::Row]) -> (t1::Tables, Vec<f64>) {
    let projects: BTreeSet<&str> = rows.iter().map(|row| row.project.as_str()).collect();
    let own: Vec<(&str, t1::Tables)> = projects
        .iter()
        .map(|project| (*project, t1::project_tables(&rows.iter().copied().filter(|row| row.project == *project).collect::<Vec<_>>())))
        .collect();
    let tables = t1::merge(own.iter().map(|(_, tables)| tables));
    let examples: Vec<_> = t1::with_memory(rows, |row, memory| {
        let own = own.iter().find(|(project, _)| *project == row.project).map(|(_, tables)| tables);
        row.class.map(|class| (t1::features(&row.case, &tables, memory, own), class, row.weight))
    });
    let examples: Vec<_> = examples.into_iter().flatten().collect();
    let weights = t1::fit(&examples);
    (tables, weights)
}

impl Model {
    /// The model that ships with the program.
    pub fn shipped() -> &'static Model {
        static SHIPPED: OnceLock<Model> = OnceLock::new();
        // A damaged file cannot be built: a test reads it. Without tables the answers fall back to a flat prior of confidence near 0.
        SHIPPED.get_or_init(|| serde_json::from_str(include_str!("shipped.json")).unwrap_or_default())
    }

    /// Reads a model file.
    ///
    /// # Errors
    /// [`SchemaError::Model`]
    pub fn read(path: &Path) -> Result<Self, SchemaError> {
        let text =
            std::fs::read_to_string(path).map_err(|error| SchemaError::Model(format!("{} cannot be read: {error}", path.display())))?;
        let model: Model =
            serde_json::from_str(&text).map_err(|error| SchemaError::Model(format!("{} is not a model: {error}", path.display())))?;
        if model.format != FORMAT {
            return Err(SchemaError::Model(format!(
                "{} has format {}, this understudy reads {FORMAT}: train it again",
                path.display(),
                model.format
            )));
        }
        Ok(model)
    }

    /// T2: probability that each pair of columns is the same column. `positions`: both sides are one lineage, so that their order means something.
    pub fn same_columns(&self, pairs: &[matching::Pair], positions: bool) -> Vec<f64> {
        let (model, shape, width) = match positions {
            true => (&self.t2_columns_positions, columns::SHAPE_WITH_POSITION, usize::MAX),
            false => (&self.t2_columns, columns::SHAPE, columns::PLAIN),
        };
        columns::features(pairs).iter().map(|features| model.predict(&features[..width.min(features.len())], shape)).collect()
    }

    /// T2: probability that each pair of tables is the same table.
    pub fn same_tables(&self, pairs: &[matching::Pair]) -> Vec<f64> {
        tables::features(pairs).iter().map(|features| self.t2_tables.predict(features, tables::SHAPE)).collect()
    }

    /// T1: probabilities of [`t1::CLASSES`].
    pub fn value_for_existing_rows(&self, case: &t1::ColumnCase, memory: &t1::ProjectMemory) -> t1::Counts {
        t1::softmax(&t1::features(case, &self.t1_tables, memory, None), &self.t1_weights)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_model_is_whole_small_and_fast() {
        let text = include_str!("shipped.json");
        assert!(text.len() < 1_000_000, "{} bytes", text.len());
        let model: Model = serde_json::from_str(text).unwrap();
        assert_eq!(model.format, FORMAT);
        assert_eq!(model.t1_weights.len(), t1::FEATURES);
        assert!(!text.contains('/'), "nothing may be keyed by project");
        let case = t1::ColumnCase {
            table: "orders".into(),
            column: "is_priority".into(),
            type_name: "boolean".into(),
            not_null: true,
            ..Default::default()
        };
        let answer = model.value_for_existing_rows(&case, &t1::ProjectMemory::default());
        let best = (0..t1::CLASS_COUNT).max_by(|a, b| answer[*a].total_cmp(&answer[*b])).unwrap();
        assert_eq!(t1::CLASSES[best], "false");
        let started = std::time::Instant::now();
        for _ in 0..1000 {
            std::hint::black_box(model.value_for_existing_rows(std::hint::black_box(&case), &t1::ProjectMemory::default()));
        }
        assert!(started.elapsed().as_micros() < 50 * 1000 * 4, "{:?} for 1,000", started.elapsed());
    }
}
