//! `understudy ctl`: console words from a shell. A table or JSON on standard output, everything else on standard error,
//! and an exit status that scripts can rely on: 0 done, 1 the answer is no, 2 wrong use, 3 could not be carried out.

use super::dispatch::exit_code_of;
use crate::{
    backend::{BackendError, Connection},
    config::{Secret, ServerTls, ServerUrl, SslMode, TcpConfig},
    wire::{
        WireError,
        backend::{ErrorFields, RowDescription, data_row},
        frontend::put_query,
    },
};
use bytes::BytesMut;
use postgres_protocol::Oid;
use serde_json::{Map, Value};
use std::{fmt::Write as _, io::Write as _};

/// Where the console is.
#[derive(Clone, Debug)]
pub struct CtlTarget {
    /// Host name or address.
    pub host: String,
    /// TCP port of the proxy.
    pub port: u16,
    /// Console user; also the name in the record of decisions.
    pub user: String,
    /// Console password, if `[proxy.console]` sets one.
    pub password: Option<Secret>,
}

/// What a run of `ctl` prints, and its exit status.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// Tables or JSON.
    pub stdout: String,
    /// Notices and errors.
    pub stderr: String,
    /// 0, 1, 2 or 3.
    pub code: i32,
}

/// Sends `words` to the console, prints the answer and returns the exit status.
pub async fn ctl(target: CtlTarget, words: &str, json: bool) -> i32 {
    let output = run(target, words, json).await;
    // A reader that has gone away (`… | head`) is no reason to fail.
    let _ = std::io::stdout().lock().write_all(output.stdout.as_bytes());
    let _ = std::io::stderr().lock().write_all(output.stderr.as_bytes());
    output.code
}

/// The same without printing.
pub async fn run(target: CtlTarget, words: &str, json: bool) -> Output {
    let place = format!("{}:{}", target.host, target.port);
    let url = ServerUrl {
        host: target.host,
        port: target.port,
        user: target.user,
        password: target.password,
        dbname: "understudy".into(),
        sslmode: SslMode::Disable,
        tls: ServerTls::default(),
        tcp: TcpConfig::SERVERS,
    };
    let mut output = Output::default();
    let result = async {
        let mut connection = Connection::open(&url, &[(b"application_name", b"understudy ctl")]).await?;
        converse(&mut connection, words, json, &mut output).await
    };
    if let Err(error) = result.await {
        let (message, code) = explain(&error, &place);
        let _ = writeln!(output.stderr, "understudy ctl: {message}");
        output.code = code;
    }
    output
}

/// What to tell a person, and the exit status.
fn explain(error: &BackendError, place: &str) -> (String, i32) {
    match error {
        BackendError::Server(fields) if fields.code.starts_with("28") => {
            (format!("{}: give the user and password of section [proxy.console]", fields.message), 3)
        }
        BackendError::Server(fields) if fields.code.starts_with("3D") => {
            (format!("{}: is it understudy that listens on {place}?", fields.message), 3)
        }
        BackendError::Server(fields) => (fields.message.clone(), exit_code_of(&fields.code)),
        BackendError::Tls(_) | BackendError::NoTls { .. } => (format!("{error}"), 3),
        BackendError::Connect { .. } | BackendError::Timeout { .. } => (
            format!(
                "{error}: is understudy running (understudy run), and is this its `listen` address? --config or --url says where to connect"
            ),
            3,
        ),
        BackendError::Authentication { .. } => (format!("{error}: give the user and password of section [proxy.console]"), 3),
        BackendError::Io(_) => {
            (format!("{error}: whether the command was carried out is unknown; SHOW EVENTS tells once understudy answers again"), 3)
        }
        BackendError::Protocol(_) => (format!("{error}: is it understudy that listens on {place}?"), 3),
    }
}

/// One simple query: all its results and notices.
async fn converse(connection: &mut Connection, words: &str, json: bool, output: &mut Output) -> Result<(), BackendError> {
    if words.contains('\0') {
        return Err(BackendError::Server(ErrorFields {
            code: "42601".into(),
            message: "a command cannot contain a zero byte".into(),
            ..ErrorFields::default()
        }));
    }
    let mut request = BytesMut::new();
    put_query(&mut request, words.as_bytes());
    connection.send(&request).await?;
    let (mut table, mut failure) = (None::<Table>, None);
    loop {
        let message = connection.receive().await?;
        match message.tag {
            b'T' => {
                let description = RowDescription::parse(&message.body).ok_or(WireError::Truncated('T'))?;
                let columns = description.columns.iter().map(|c| (String::from_utf8_lossy(&c.name).into_owned(), c.type_oid)).collect();
                table = Some(Table { columns, rows: Vec::new() });
            }
            b'D' => {
                let values = data_row(&message.body).ok_or(WireError::Truncated('D'))?;
                let row = values.into_iter().map(|value| value.map(|v| String::from_utf8_lossy(v).into_owned())).collect();
                if let Some(table) = &mut table {
                    table.rows.push(row);
                }
            }
            b'C' => match table.take() {
                Some(table) => output.stdout.push_str(&if json { table.json() } else { table.text() }),
                None if json => output.stdout.push_str("[]\n"),
                None => {
                    let tag = String::from_utf8_lossy(&message.body);
                    let _ = writeln!(output.stdout, "{}", tag.trim_end_matches('\0'));
                }
            },
            b'N' => {
                let _ = writeln!(output.stderr, "{}", printable(&ErrorFields::parse(&message.body).message));
            }
            b'E' => failure = Some(ErrorFields::parse(&message.body)),
            b'Z' => return failure.map_or(Ok(()), |fields| Err(BackendError::Server(fields))),
            _ => {}
        }
    }
}

struct Table {
    columns: Vec<(String, Oid)>,
    rows: Vec<Vec<Option<String>>>,
}

impl Table {
    fn json(&self) -> String {
        let object = |row: &Vec<Option<String>>| {
            let fields = self.columns.iter().zip(row).map(|((name, oid), value)| (name.clone(), json_value(*oid, value.as_deref())));
            Value::Object(fields.collect::<Map<_, _>>())
        };
        format!("{:#}\n", Value::Array(self.rows.iter().map(object).collect()))
    }

    fn text(&self) -> String {
        let cell = |value: &Option<String>| value.as_deref().map(printable).unwrap_or_default();
        let rows: Vec<Vec<String>> = self.rows.iter().map(|row| row.iter().map(cell).collect()).collect();
        let widths: Vec<usize> = (self.columns.iter().enumerate())
            .map(|(index, (name, _))| {
                let cells = rows.iter().filter_map(|row| row.get(index)).map(|cell| cell.chars().count());
                cells.chain([name.chars().count()]).max().unwrap_or(0)
            })
            .collect();
        let mut text = String::new();
        let names: Vec<String> = self.columns.iter().map(|(name, _)| printable(name)).collect();
        self.line(&mut text, &names, &widths, false);
        text.push_str(&widths.iter().map(|width| "-".repeat(width + 2)).collect::<Vec<_>>().join("+"));
        text.push('\n');
        for row in &rows {
            self.line(&mut text, row, &widths, true);
        }
        let _ = writeln!(text, "({} {})", rows.len(), if rows.len() == 1 { "row" } else { "rows" });
        text
    }

    fn line(&self, text: &mut String, cells: &[String], widths: &[usize], align_numbers: bool) {
        let mut line = String::new();
        for (index, ((cell, width), (_, oid))) in cells.iter().zip(widths).zip(&self.columns).enumerate() {
            if index > 0 {
                line.push('|');
            }
            let padding = " ".repeat(width.saturating_sub(cell.chars().count()));
            let right = align_numbers && matches!(*oid, INT8 | FLOAT8);
            let _ = if right { write!(line, " {padding}{cell} ") } else { write!(line, " {cell}{padding} ") };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
}

/// `pg_type.oid` of the types that the console uses.
const BOOL: Oid = 16;
const INT8: Oid = 20;
const FLOAT8: Oid = 701;

fn json_value(oid: Oid, value: Option<&str>) -> Value {
    let Some(value) = value else { return Value::Null };
    let text = || Value::String(value.to_owned());
    match oid {
        BOOL => Value::Bool(value == "t"),
        INT8 | FLOAT8 => serde_json::from_str::<serde_json::Number>(value).map_or_else(|_| text(), Value::Number),
        _ => text(),
    }
}

/// Control characters would move a terminal's cursor, or worse.
fn printable(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect::<Vec<_>>() } else { vec![c] }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        Table {
            columns: vec![("name".into(), 25), ("lag".into(), FLOAT8), ("held".into(), BOOL), ("fingerprint".into(), 25)],
            rows: vec![
                vec![Some("pg18".into()), Some("0.5".into()), Some("f".into()), Some("1234567890123456".into())],
                vec![Some("Bücher\n\u{1b}[2J".into()), Some("1234".into()), None, None],
            ],
        }
    }

    #[test]
    fn tables_are_aligned_and_harmless() {
        let expected = [
            r" name              | lag  | held | fingerprint",
            r"-------------------+------+------+------------------",
            r" pg18              |  0.5 | f    | 1234567890123456",
            r" Bücher\n\u{1b}[2J | 1234 |      |",
            "(2 rows)",
            "",
        ];
        assert_eq!(table().text().split('\n').collect::<Vec<_>>(), expected);
    }

    #[test]
    fn json_keeps_types() {
        let value: Value = serde_json::from_str(&table().json()).unwrap();
        assert_eq!(
            value,
            serde_json::json!([
                {"name": "pg18", "lag": 0.5, "held": false, "fingerprint": "1234567890123456"},
                {"name": "Bücher\n\u{1b}[2J", "lag": 1234, "held": null, "fingerprint": null},
            ])
        );
        assert_eq!(json_value(FLOAT8, Some("NaN")), Value::String("NaN".into()));
    }

    #[test]
    fn errors_say_what_to_do() {
        let server = |code: &str| BackendError::Server(ErrorFields { code: code.into(), message: "m".into(), ..Default::default() });
        for (error, code, part) in [
            (server("42601"), 2, "m"),
            (server("42704"), 2, "m"),
            (server("55000"), 1, "m"),
            (server("58000"), 3, "m"),
            (server("28P01"), 3, "[proxy.console]"),
            (server("3D000"), 3, "is it understudy"),
            (BackendError::Timeout { server: "x".into() }, 3, "understudy run"),
            (BackendError::Io(std::io::ErrorKind::UnexpectedEof.into()), 3, "unknown"),
        ] {
            let (message, found) = explain(&error, "127.0.0.1:1");
            assert_eq!(found, code, "{message}");
            assert!(message.contains(part), "{message}");
        }
    }
}
