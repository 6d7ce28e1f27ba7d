//! Console text as tokens, and several statements as single ones. Quoting follows SQL: `'…'` and `"…"` with doubled
//! quotes, `$tag$…$tag$`, `--` and `/* */` comments.
//! Source: PostgreSQL documentation, "Lexical Structure".

use super::CommandError;

/// A statement longer than this is refused: the longest sensible one is `APPROVE 3 AS '<sql>'`.
pub const STATEMENT_BYTES_MAX: usize = 1 << 20;

/// What a token is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// An unquoted word: keyword, name or number.
    Word(String),
    /// `"…"`, possibly with dots between parts: never a keyword.
    Quoted(String),
    /// `'…'` or `$$…$$`.
    Text(String),
    /// `=`
    Equals,
    /// `;`
    Semicolon,
    /// Anything else, such as `,` or `(`.
    Other(char),
}

/// A token and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Token {
    pub(super) kind: Kind,
    pub(super) start: usize,
    pub(super) end: usize,
}

impl Token {
    /// The unquoted word, if it is one.
    pub(super) fn word(&self) -> Option<&str> {
        match &self.kind {
            Kind::Word(word) => Some(word),
            _ => None,
        }
    }

    /// For messages: the token as typed, but never the inside of a string.
    pub(super) fn shown(&self) -> String {
        match &self.kind {
            Kind::Word(word) => format!("`{}`", word.chars().take(40).collect::<String>()),
            Kind::Quoted(name) => format!("the name \"{}\"", name.chars().take(40).collect::<String>()),
            Kind::Text(_) => "a string".into(),
            Kind::Equals => "`=`".into(),
            Kind::Semicolon => "`;`".into(),
            Kind::Other(c) => format!("`{c}`"),
        }
    }
}

/// All tokens of `text`.
pub(super) fn tokens(text: &str) -> Result<Vec<Token>, CommandError> {
    if text.len() > STATEMENT_BYTES_MAX {
        return Err(CommandError::Syntax(format!("a statement may have at most {STATEMENT_BYTES_MAX} bytes")));
    }
    let mut lexer = Lexer { text, at: 0 };
    let mut tokens = Vec::new();
    while let Some(token) = lexer.next()? {
        tokens.push(token);
    }
    Ok(tokens)
}

/// The statements of `text`, cut at semicolons outside of quotes; empty ones are left out.
///
/// # Errors
/// [`CommandError::Syntax`] when a quote is not closed.
pub fn split(text: &str) -> Result<Vec<&str>, CommandError> {
    let mut statements = Vec::new();
    let mut span: Option<(usize, usize)> = None;
    let mut finish = |span: &mut Option<(usize, usize)>| {
        statements.extend(span.take().and_then(|(start, end)| text.get(start..end)));
    };
    for token in tokens(text)? {
        if token.kind == Kind::Semicolon {
            finish(&mut span);
        } else {
            span = Some((span.map_or(token.start, |(start, _)| start), token.end));
        }
    }
    finish(&mut span);
    Ok(statements)
}

struct Lexer<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Lexer<'a> {
    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or_default()
    }

    fn next(&mut self) -> Result<Option<Token>, CommandError> {
        self.skip_blanks_and_comments()?;
        let start = self.at;
        let rest = self.rest();
        let Some(first) = rest.chars().next() else { return Ok(None) };
        let kind = match first {
            '\'' => Kind::Text(self.quoted('\'')?),
            '$' => match self.dollar_quoted()? {
                Some(text) => Kind::Text(text),
                None => self.single(first),
            },
            '=' | ';' => self.single(first),
            _ if first == '"' || is_word(first) => self.name()?,
            _ => self.single(first),
        };
        Ok(Some(Token { kind, start, end: self.at }))
    }

    fn single(&mut self, c: char) -> Kind {
        self.at += c.len_utf8();
        match c {
            '=' => Kind::Equals,
            ';' => Kind::Semicolon,
            _ => Kind::Other(c),
        }
    }

    fn skip_blanks_and_comments(&mut self) -> Result<(), CommandError> {
        loop {
            let rest = self.rest();
            let trimmed = rest.trim_start();
            self.at += rest.len() - trimmed.len();
            if trimmed.starts_with("--") {
                self.at += trimmed.find('\n').unwrap_or(trimmed.len());
            } else if trimmed.starts_with("/*") {
                let end = trimmed.find("*/").ok_or_else(|| CommandError::Syntax("the comment is not closed: add */".into()))?;
                self.at += end + 2;
            } else {
                return Ok(());
            }
        }
    }

    /// Words and quoted parts that touch or are joined by dots: `public.orders`, `public."Orders"`.
    fn name(&mut self) -> Result<Kind, CommandError> {
        let mut name = String::new();
        let mut quoted = false;
        loop {
            let rest = self.rest();
            if rest.starts_with('"') {
                quoted = true;
                name.push_str(&self.quoted('"')?);
                continue;
            }
            let word = rest.split(|c| !is_word(c)).next().unwrap_or_default();
            if word.is_empty() {
                break;
            }
            name.push_str(word);
            self.at += word.len();
        }
        Ok(if quoted { Kind::Quoted(name) } else { Kind::Word(name) })
    }

    fn quoted(&mut self, quote: char) -> Result<String, CommandError> {
        let mut text = String::new();
        let mut chars = self.rest().char_indices().skip(1).peekable();
        while let Some((offset, c)) = chars.next() {
            if c != quote {
                text.push(c);
            } else if chars.next_if(|(_, next)| *next == quote).is_some() {
                text.push(quote);
            } else {
                self.at += offset + 1;
                return Ok(text);
            }
        }
        Err(CommandError::Syntax(format!("the quote {quote} is not closed: add {quote} (write {quote}{quote} for one inside)")))
    }

    fn dollar_quoted(&mut self) -> Result<Option<String>, CommandError> {
        let rest = self.rest();
        let Some(length) = rest.get(1..).and_then(|tail| tail.find(|c: char| !c.is_alphanumeric() && c != '_')) else {
            return Ok(None);
        };
        let Some(tag) = rest.get(..length + 2).filter(|tag| tag.ends_with('$')) else { return Ok(None) };
        let body = rest.get(tag.len()..).unwrap_or_default();
        let end = body.find(tag).ok_or_else(|| CommandError::Syntax(format!("the quote {tag} is not closed: add {tag}")))?;
        self.at += tag.len() + end + tag.len();
        Ok(body.get(..end).map(str::to_owned))
    }
}

/// Characters of unquoted words: generous, because shadows are called `pg-18` and times `2.5s`.
pub(super) fn is_word(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '_' | '.' | '-' | '+' | '%' | ':' | '/' | '*' | '[' | ']' | '?')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn statements_are_cut_outside_of_quotes() {
        for (text, expected) in [
            ("", vec![]),
            (" ; ;; ", vec![]),
            ("SHOW A", vec!["SHOW A"]),
            (" SHOW A ; SHOW B; ", vec!["SHOW A", "SHOW B"]),
            ("APPROVE 1 AS 'a;b'';c'; x", vec!["APPROVE 1 AS 'a;b'';c'", "x"]),
            ("REVERT \"a;\"\"b\";x", vec!["REVERT \"a;\"\"b\"", "x"]),
            ("a $$;'$$; b $q$ $$;$q$", vec!["a $$;'$$", "b $q$ $$;$q$"]),
            ("-- nothing; here\nSHOW A /* ; */ ;", vec!["SHOW A"]),
        ] {
            assert_eq!(split(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn open_quotes_are_named() {
        for (text, part) in [("a 'b", "quote '"), ("a \"b", "quote \""), ("a $x$b$x", "$x$"), ("/* a", "comment")] {
            assert!(split(text).unwrap_err().to_string().contains(part), "{text}");
        }
        assert!(split(&"x".repeat(STATEMENT_BYTES_MAX + 1)).is_err());
    }

    proptest! {
        #[test]
        fn never_panics_and_spans_are_valid(text in any::<String>()) {
            if let Ok(tokens) = tokens(&text) {
                for token in tokens {
                    prop_assert!(text.get(token.start..token.end).is_some_and(|t| !t.is_empty()));
                }
            }
        }

        #[test]
        fn quoting_noise_never_panics(text in "[ '\"$a;/*\\-é]{0,30}") {
            let _ = split(&text);
        }
    }
}
