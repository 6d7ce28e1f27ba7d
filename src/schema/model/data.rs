//! Reads the training data. Its columns are described in the data's own README.

use super::t1;
use crate::schema::SchemaError;
use std::{
    collections::{HashMap, HashSet},
    path::Path,
};

/// A CSV file with a header, row by row.
pub struct Table {
    header: HashMap<String, usize>,
    records: Vec<csv::StringRecord>,
}

impl Table {
    /// Reads a file.
    ///
    /// # Errors
    /// [`SchemaError::Model`]
    pub fn read(path: &Path) -> Result<Self, SchemaError> {
        let wrong = |error: csv::Error| SchemaError::Model(format!("{} cannot be read: {error}", path.display()));
        let mut reader = csv::ReaderBuilder::new().flexible(true).from_path(path).map_err(wrong)?;
        let header = reader.headers().map_err(wrong)?.iter().enumerate().map(|(at, name)| (name.to_owned(), at)).collect();
        let records = reader.records().collect::<Result<Vec<_>, _>>().map_err(wrong)?;
        Ok(Table { header, records })
    }

    /// A file must have these columns.
    ///
    /// # Errors
    /// [`SchemaError::Model`]
    pub fn require(&self, path: &Path, columns: &[&str]) -> Result<(), SchemaError> {
        match columns.iter().find(|column| !self.header.contains_key(**column)) {
            Some(column) => Err(SchemaError::Model(format!("{} has no column `{column}`", path.display()))),
            None => Ok(()),
        }
    }

    /// The rows.
    pub fn rows(&self) -> impl Iterator<Item = Record<'_>> {
        self.records.iter().map(|record| Record { table: self, record })
    }
}

/// One row; missing fields are empty.
#[derive(Clone, Copy)]
pub struct Record<'a> {
    table: &'a Table,
    record: &'a csv::StringRecord,
}

impl<'a> Record<'a> {
    /// A field.
    pub fn get(&self, column: &str) -> &'a str {
        self.table.header.get(column).and_then(|at| self.record.get(*at)).unwrap_or("")
    }

    /// A flag.
    pub fn flag(&self, column: &str) -> bool {
        self.get(column) == "1"
    }

    /// A number; 0 where there is none.
    pub fn number(&self, column: &str) -> f64 {
        self.get(column).parse().unwrap_or(0.0)
    }
}

/// Projects whose licence permits shipping what was learnt from them.
///
/// # Errors
/// [`SchemaError::Model`]
pub fn permissive(folder: &Path) -> Result<HashSet<String>, SchemaError> {
    let path = folder.join("projects.csv");
    let table = Table::read(&path)?;
    table.require(&path, &["project", "licence_class"])?;
    Ok(table.rows().filter(|row| row.get("licence_class") == "permissive").map(|row| row.get("project").to_owned()).collect())
}

/// A table older than this many migrations is not being set up any more.
const OLD_TABLE: f64 = 5.0;

/// T1 rows of a file, in file order.
///
/// # Errors
/// [`SchemaError::Model`]
pub fn t1_rows(path: &Path) -> Result<Vec<t1::Row>, SchemaError> {
    let table = Table::read(path)?;
    table.require(path, &["row_id", "table", "column", "type"])?;
    Ok(table
        .rows()
        .map(|row| {
            let siblings = row.get("sibs").split_whitespace().filter_map(|entry| {
                let (name, type_name) = entry.split_once(':')?;
                Some((name.to_owned(), type_name.trim_end_matches('!').to_owned()))
            });
            t1::Row {
                id: row.get("row_id").to_owned(),
                project: row.get("project").to_owned(),
                seq: row.number("seq") as i64,
                case: t1::ColumnCase {
                    table: row.get("table").to_owned(),
                    column: row.get("column").to_owned(),
                    type_name: row.get("type").to_owned(),
                    not_null: row.flag("nn_soon"),
                    foreign_key: !row.get("fk_ref").is_empty(),
                    indexed: row.flag("indexed"),
                    unique: row.flag("uniq") || row.flag("pk"),
                    siblings: siblings.collect(),
                    check_list: !row.get("check_vals").is_empty(),
                    old_table: row.number("tage") > OLD_TABLE,
                },
                class: if row.flag("runpython") { None } else { t1::class_of(row.get("label")) },
                weight: match row.number("dup_weight") {
                    weight if weight > 0.0 => weight,
                    _ => 1.0,
                },
                default_visible: row.get("default_visible").to_owned(),
            }
        })
        .collect())
}
