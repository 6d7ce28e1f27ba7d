//! Tokens to [`Command`]: exactly the grammar of [`FORMS`](super::grammar::FORMS), and a message for everything else that
//! says what was expected.

use super::{
    CommandError,
    command::{Command, Topic},
    grammar::{FORMS, TOPICS, nearest},
    lexer::{Kind, Token, tokens},
};
use crate::config::parse_duration;
use std::time::Duration;

/// `SIMULATE CUTOVER` without AT.
const SIMULATE_PERCENT: f64 = 5.0;
/// `SIMULATE CUTOVER` without FOR.
const SIMULATE_DURATION: Duration = Duration::from_secs(10);

/// What a statement asks for.
#[derive(Clone, Debug, PartialEq)]
pub enum Statement {
    /// Nothing: only blanks, comments or semicolons.
    Empty,
    /// `SET client_encoding = …` and the like, which drivers send on their own: accepted without effect.
    ClientSetting(String),
    /// A command.
    Command(Command),
}

/// Settings that psql and drivers set on their own, in lower case.
const CLIENT_SETTINGS: &[&str] = &[
    "application_name",
    "bytea_output",
    "client_encoding",
    "client_min_messages",
    "datestyle",
    "default_transaction_isolation",
    "default_transaction_read_only",
    "extra_float_digits",
    "idle_in_transaction_session_timeout",
    "idle_session_timeout",
    "intervalstyle",
    "lc_messages",
    "lc_monetary",
    "lc_numeric",
    "lc_time",
    "lock_timeout",
    "search_path",
    "standard_conforming_strings",
    "statement_timeout",
    "synchronous_commit",
    "timezone",
    "transaction_timeout",
];

/// Parses one statement; a semicolon at its end is allowed.
///
/// # Errors
/// [`CommandError::Syntax`]
pub fn parse(text: &str) -> Result<Statement, CommandError> {
    let mut tokens = tokens(text)?;
    while tokens.last().is_some_and(|token| token.kind == Kind::Semicolon) {
        tokens.pop();
    }
    if tokens.iter().any(|token| token.kind == Kind::Semicolon) {
        return Err(CommandError::Syntax("one command at a time here: leave out what follows the `;`".into()));
    }
    let mut parser = Parser { text, tokens: &tokens, at: 0 };
    let Some(first) = tokens.first() else { return Ok(Statement::Empty) };
    let Some(word) = first.word().map(str::to_ascii_uppercase) else { return Err(unknown(&tokens)) };
    parser.at = 1;
    if word == "SET"
        && let Some(name) = client_setting(&tokens)
    {
        return Ok(Statement::ClientSetting(name));
    }
    let command = parser.command(&word)?;
    parser.end()?;
    Ok(Statement::Command(command))
}

/// `5`, `5%`, `0.1 %` as a number of percent.
pub fn parse_percent(text: &str) -> Option<f64> {
    let number = text.trim().strip_suffix('%').unwrap_or(text).trim();
    number.parse::<f64>().ok().filter(|value| value.is_finite() && *value >= 0.0)
}

struct Parser<'a> {
    text: &'a str,
    tokens: &'a [Token],
    at: usize,
}

impl Parser<'_> {
    fn command(&mut self, word: &str) -> Result<Command, CommandError> {
        Ok(match word {
            "SHOW" => Command::Show(self.topic()?),
            "HELP" => Command::Show(Topic::Help),
            "SET" => self.set()?,
            "RELOAD" => Command::Reload,
            "REMOVE" if self.take("LEFTOVERS") => Command::RemoveLeftovers(self.name("REMOVE LEFTOVERS")?),
            "PAUSE" => Command::Pause(self.optional_name()),
            "RECONNECT" => Command::Reconnect(self.optional_name()),
            "RESUME" => Command::Resume(self.optional_name()),
            "APPROVE" => {
                let id = self.id("APPROVE")?;
                let sql = if self.take("AS") { Some(self.sql()?) } else { None };
                Command::Approve { id, sql }
            }
            "REJECT" => Command::Reject(self.id("REJECT")?),
            "SIMULATE" => {
                if !self.take("CUTOVER") {
                    return Err(self.expected("SIMULATE CUTOVER"));
                }
                self.simulate()?
            }
            "SHIFT" if self.take("START") => Command::ShiftStart(self.name("SHIFT START")?),
            "SHIFT" if self.take("STOP") => Command::ShiftStop(self.name("SHIFT STOP")?),
            "SHADOW" if self.take("START") => Command::ShadowStart(self.name("SHADOW START")?),
            "SHADOW" if self.take("RESYNC") => Command::ShadowResync(self.name("SHADOW RESYNC")?),
            "SHADOW" if self.take("STOP") => Command::ShadowStop(self.name("SHADOW STOP")?),
            "REVERT" => Command::Revert(self.name("REVERT")?),
            "CUTOVER" => {
                let shadow = self.name("CUTOVER")?;
                let dry_run = self.take("DRY");
                if dry_run && !self.take("RUN") {
                    return Err(self.expected("CUTOVER"));
                }
                Command::Cutover { shadow, dry_run }
            }
            "ROLLBACK" => Command::Rollback(self.name("ROLLBACK")?),
            "VERIFY" => {
                let shadow = self.name("VERIFY")?;
                let table = if self.take("TABLE") { Some(self.name("VERIFY")?) } else { None };
                Command::Verify { shadow, table, repair: self.take("REPAIR") }
            }
            "FAULT" if self.take("LOSE") && self.take("CHANGE") => Command::FaultLoseChange(self.name("SHADOW STOP")?),
            "SHUTDOWN" => Command::Shutdown,
            _ => return Err(unknown(self.tokens)),
        })
    }

    fn topic(&mut self) -> Result<Topic, CommandError> {
        let words: Vec<String> = self.tokens.iter().skip(1).filter_map(Token::word).map(str::to_ascii_uppercase).collect();
        let typed = words.join(" ");
        let found = TOPICS.iter().find(|(topic, _)| *topic == typed && words.len() + 1 == self.tokens.len());
        match found {
            Some((_, topic)) => {
                self.at = self.tokens.len();
                Ok(*topic)
            }
            None => Err(unknown(self.tokens)),
        }
    }

    fn set(&mut self) -> Result<Command, CommandError> {
        let shadow = self.name("SET")?;
        let knob = self.name("SET")?;
        let equals = self.peek().is_some_and(|token| token.kind == Kind::Equals);
        if equals {
            self.at += 1;
        } else if !self.take("TO") {
            return Err(self.expected("SET"));
        }
        let rest = self.tokens.get(self.at..).unwrap_or_default();
        let value = match rest {
            [] => return Err(self.expected("SET")),
            [Token { kind: Kind::Text(text) | Kind::Quoted(text), .. }] => text.clone(),
            [first, .., last] => self.text.get(first.start..last.end).unwrap_or_default().to_owned(),
            [only] => self.text.get(only.start..only.end).unwrap_or_default().to_owned(),
        };
        self.at = self.tokens.len();
        Ok(Command::Set { shadow, knob: knob.to_lowercase(), value })
    }

    fn simulate(&mut self) -> Result<Command, CommandError> {
        let shadow = self.name("SIMULATE CUTOVER")?;
        let (mut percent, mut duration) = (None, None);
        loop {
            if percent.is_none() && self.take("AT") {
                let value = self.value().as_deref().and_then(parse_percent).filter(|value| *value > 0.0 && *value <= 100.0);
                let Some(value) = value else {
                    return Err(syntax("AT takes a percentage above 0 and at most 100, such as AT 5 or AT 5%", "SIMULATE CUTOVER"));
                };
                // `5 %`
                if self.peek().and_then(Token::word) == Some("%") {
                    self.at += 1;
                }
                percent = Some(value);
            } else if duration.is_none() && self.take("FOR") {
                let value = self.value().as_deref().and_then(parse_duration).filter(|value| !value.is_zero());
                let Some(value) = value else {
                    return Err(syntax("FOR takes a time, such as FOR '500ms', FOR '30s' or FOR '5m'", "SIMULATE CUTOVER"));
                };
                duration = Some(value);
            } else {
                break;
            }
        }
        Ok(Command::SimulateCutover {
            shadow,
            percent: percent.unwrap_or(SIMULATE_PERCENT),
            duration: duration.unwrap_or(SIMULATE_DURATION),
        })
    }

    fn sql(&mut self) -> Result<String, CommandError> {
        let sql = match self.peek().map(|token| &token.kind) {
            Some(Kind::Text(sql)) if !sql.trim().is_empty() => sql.clone(),
            _ => {
                return Err(syntax(
                    "AS takes the statements in single quotes (doubled inside) or between $$ and $$, such as AS $$ALTER TABLE t ADD c text$$",
                    "APPROVE",
                ));
            }
        };
        self.at += 1;
        Ok(sql)
    }

    fn id(&mut self, keywords: &str) -> Result<i64, CommandError> {
        let id = self.peek().and_then(Token::word).and_then(|word| word.parse::<i64>().ok()).filter(|id| *id > 0);
        let Some(id) = id else { return Err(self.expected(keywords)) };
        self.at += 1;
        Ok(id)
    }

    /// The name of a shadow, database, knob or table: a word, or quoted.
    fn name(&mut self, keywords: &str) -> Result<String, CommandError> {
        match self.optional_name() {
            Some(name) => Ok(name),
            None => Err(self.expected(keywords)),
        }
    }

    fn optional_name(&mut self) -> Option<String> {
        let name = match &self.peek()?.kind {
            Kind::Word(name) | Kind::Quoted(name) | Kind::Text(name) if !name.is_empty() => name.clone(),
            _ => return None,
        };
        self.at += 1;
        Some(name)
    }

    fn value(&mut self) -> Option<String> {
        self.optional_name()
    }

    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at)
    }

    fn take(&mut self, keyword: &str) -> bool {
        let found = self.peek().and_then(Token::word).is_some_and(|word| word.eq_ignore_ascii_case(keyword));
        self.at += usize::from(found);
        found
    }

    /// The current token is not what the command with these first words goes on with.
    fn expected(&self, keywords: &str) -> CommandError {
        let found = self.peek().map_or_else(|| "the end".to_owned(), Token::shown);
        let hint = match keywords {
            "APPROVE" | "REJECT" => " (SHOW PROPOSALS lists the ids)",
            "ROLLBACK" => " (SHOW DATABASES lists the names; the console itself has no transactions)",
            "SET" => " (SHOW CONFIG lists the knobs)",
            _ => " (SHOW SHADOWS lists the names)",
        };
        CommandError::Syntax(format!("expected {}{hint}, found {found}", usage(keywords)))
    }

    fn end(&self) -> Result<(), CommandError> {
        match self.peek() {
            None => Ok(()),
            Some(token) => {
                let words: Vec<String> = self.tokens.iter().filter_map(Token::word).map(str::to_ascii_uppercase).collect();
                // The command whose first words were typed, longest first.
                let form = FORMS.iter().filter(|form| words.join(" ").starts_with(form.keywords)).max_by_key(|form| form.keywords.len());
                let expected = form.map_or_else(String::new, |form| format!(": expected {}", form.usage));
                Err(CommandError::Syntax(format!("{} is too much{expected}", token.shown())))
            }
        }
    }
}

fn usage(keywords: &str) -> &str {
    FORMS.iter().find(|form| form.keywords == keywords).map_or(keywords, |form| form.usage)
}

fn syntax(message: &str, keywords: &str) -> CommandError {
    CommandError::Syntax(format!("{message}: expected {}", usage(keywords)))
}

/// `SET [SESSION|LOCAL] <setting> {=|TO} …`, `SET NAMES …`, `SET TIME ZONE …` with a setting that clients send.
fn client_setting(tokens: &[Token]) -> Option<String> {
    let word = |index: usize| match tokens.get(index).map(|token| &token.kind) {
        Some(Kind::Word(word) | Kind::Quoted(word)) => word.to_lowercase(),
        _ => String::new(),
    };
    let assigns = |index: usize| {
        tokens
            .get(index)
            .is_some_and(|token| token.kind == Kind::Equals || token.word().is_some_and(|word| word.eq_ignore_ascii_case("to")))
            && tokens.len() > index + 1
    };
    let known = |name: String| CLIENT_SETTINGS.contains(&name.as_str()).then_some(name);
    match word(1).as_str() {
        "session" | "local" if assigns(3) => known(word(2)),
        "names" if tokens.len() == 3 => Some("client_encoding".into()),
        "time" if word(2) == "zone" && tokens.len() == 4 => Some("timezone".into()),
        _ if assigns(2) => known(word(1)),
        _ => None,
    }
}

/// The words are no command at all.
fn unknown(tokens: &[Token]) -> CommandError {
    let words: Vec<String> = tokens.iter().take(5).map_while(Token::word).map(str::to_ascii_uppercase).collect();
    let typed = match words.first() {
        None => tokens.first().map_or_else(|| "nothing".to_owned(), Token::shown),
        Some(first) if first == "SHOW" || first == "SHIFT" || first == "SHADOW" => {
            format!("`{}`", words.iter().take(2).cloned().collect::<Vec<_>>().join(" "))
        }
        Some(first) => format!("`{}`", first.chars().take(40).collect::<String>()),
    };
    let help = "SHOW HELP lists all commands";
    let sql = ["SELECT", "INSERT", "UPDATE", "DELETE", "WITH", "CREATE", "ALTER", "DROP", "COPY", "TABLE", "VALUES", "EXPLAIN"];
    let transactions = ["BEGIN", "START", "COMMIT", "END", "ABORT", "SAVEPOINT", "RELEASE"];
    let first = words.first().map(String::as_str).unwrap_or_default();
    CommandError::Syntax(if sql.contains(&first) {
        format!("{typed} is SQL, and this is understudy's console: connect to a database that SHOW DATABASES lists to run SQL; {help}")
    } else if transactions.contains(&first) {
        format!("{typed}: the console has no transactions, switch your driver to autocommit; {help}")
    } else if let Some(form) = nearest(&words) {
        format!("{typed} is not a command: did you mean {}? {help}", form.usage)
    } else if first == "SHIFT" || first == "SHADOW" {
        format!("{typed} is not a command: expected {first} START <shadow> or {first} STOP <shadow>; {help}")
    } else {
        format!("{typed} is not a command; {help}")
    })
}

#[cfg(test)]
#[path = "parser_tests.rs"]
mod tests;
