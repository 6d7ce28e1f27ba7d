//! The cache key of a statement: its bytes with literals replaced by marks, comments and white space reduced. One pass,
//! no parser. Texts with equal keys have equal parse trees up to the values of literals.
//!
//! Source: PostgreSQL `src/backend/parser/scan.l`. Marks are control bytes, which no valid SQL contains outside of
//! literals, quoted names and comments (texts that do are refused), one per kind of literal, because the grammar tells
//! them apart: `-5` is a constant, `-'5'` an operator; `float(24)` needs an integer.

/// An integer up to 2^31-1 (`ICONST`).
const MARK_INTEGER: u8 = 1;
/// Any other decimal number (`FCONST`).
const MARK_NUMBER: u8 = 2;
/// A string: `'…'`, `E'…'`, `$tag$…$tag$` (`SCONST`).
const MARK_STRING: u8 = 3;
/// Bit strings, `U&'…'`, numbers with prefix or underscores: rare, and whether the grammar takes them depends on what is in
/// them, so that they stay in the key as written.
const MARK_KEPT: u8 = 4;

/// What the pass found besides the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) struct Shape {
    /// Deepest nesting of brackets and CASE.
    pub depth: usize,
    /// Operators, commas left out: an upper bound for chains such as `1+1+1`.
    pub operators: usize,
}

/// The text cannot be cut into tokens with certainty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Uncertain(pub &'static str);

/// Words after which a statement's literals may be taken out without changing its structure. In the others (DDL, COPY,
/// NOTIFY, FETCH 5, DO, …) a literal can be part of the tree's structure or of the fingerprint; those keep theirs.
const LITERAL_FREE: [&str; 10] = ["select", "insert", "update", "delete", "merge", "with", "values", "set", "execute", "table"];

/// Longest tag of a dollar-quoted literal: keeps the search for its end linear.
const TAG_BYTES_MAX: usize = 64;

/// Writes the key of `text` into `key` (cleared first).
pub(super) fn normalise(text: &str, key: &mut Vec<u8>) -> Result<Shape, Uncertain> {
    run(text, key, false)
}

fn run(text: &str, key: &mut Vec<u8>, always: bool) -> Result<Shape, Uncertain> {
    key.clear();
    let mut lexer = Lexer { bytes: text.as_bytes(), at: 0, key, shape: Shape::default(), open: 0, replace: true, always, first: true };
    lexer.run()?;
    Ok(lexer.shape)
}

struct Lexer<'a> {
    bytes: &'a [u8],
    at: usize,
    key: &'a mut Vec<u8>,
    shape: Shape,
    open: usize,
    /// Literals of the current statement are replaced.
    replace: bool,
    /// Literals of every statement are replaced.
    always: bool,
    /// The next word begins a statement.
    first: bool,
}

fn is_identifier_start(byte: u8) -> bool {
    byte.is_ascii_alphabetic() || byte == b'_' || byte >= 0x80
}

fn is_identifier(byte: u8) -> bool {
    is_identifier_start(byte) || byte.is_ascii_digit() || byte == b'$'
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c)
}

impl Lexer<'_> {
    fn peek(&self, ahead: usize) -> u8 {
        self.bytes.get(self.at + ahead).copied().unwrap_or(0)
    }

    fn run(&mut self) -> Result<(), Uncertain> {
        while let Some(&byte) = self.bytes.get(self.at) {
            match byte {
                byte if is_space(byte) => self.space()?,
                b'-' if self.peek(1) == b'-' => self.space()?,
                b'/' if self.peek(1) == b'*' => self.space()?,
                0x00..=0x1f | 0x7f => return Err(Uncertain("control characters outside of a literal")),
                b'\'' => self.string(self.at, 0, MARK_STRING, false)?,
                b'"' => self.quoted_name()?,
                b'$' => self.dollar()?,
                b'0'..=b'9' => self.number(),
                b'.' if self.peek(1).is_ascii_digit() && self.number_may_follow() => self.number(),
                byte if is_identifier_start(byte) => self.word()?,
                _ => self.punctuation(byte),
            }
        }
        while matches!(self.key.last(), Some(b' ' | b'\n' | b';')) {
            self.key.pop();
        }
        Ok(())
    }

    /// `a.5` never occurs in SQL, `a[.5]` and `(.5)` do; after `.` (as in `1..5`) a number would swallow it.
    fn number_may_follow(&self) -> bool {
        self.key.last().is_none_or(|last| *last != b'.')
    }

    /// White space and comments: one blank, or one line end if any is among them (`'a' ⏎ 'b'` is one literal).
    fn space(&mut self) -> Result<(), Uncertain> {
        let mut line_end = false;
        loop {
            match self.peek(0) {
                byte if self.at < self.bytes.len() && is_space(byte) => {
                    line_end |= byte == b'\n' || byte == b'\r';
                    self.at += 1;
                }
                b'-' if self.peek(1) == b'-' => {
                    while self.at < self.bytes.len() && !matches!(self.peek(0), b'\n' | b'\r') {
                        self.at += 1;
                    }
                }
                b'/' if self.peek(1) == b'*' => self.block_comment()?,
                _ => break,
            }
        }
        if !self.key.is_empty() {
            self.key.push(if line_end { b'\n' } else { b' ' });
        }
        Ok(())
    }

    fn block_comment(&mut self) -> Result<(), Uncertain> {
        let mut depth = 0usize;
        while self.at < self.bytes.len() {
            match (self.peek(0), self.peek(1)) {
                (b'/', b'*') => {
                    depth += 1;
                    self.at += 2;
                }
                (b'*', b'/') => {
                    depth -= 1;
                    self.at += 2;
                    if depth == 0 {
                        return Ok(());
                    }
                }
                _ => self.at += 1,
            }
        }
        Err(Uncertain("an unterminated comment"))
    }

    /// A literal whose opening quote is `prefix` bytes after `start`.
    fn string(&mut self, start: usize, prefix: usize, mark: u8, escapes: bool) -> Result<(), Uncertain> {
        self.at = start + prefix + 1;
        loop {
            let Some(&byte) = self.bytes.get(self.at) else { return Err(Uncertain("an unterminated literal")) };
            self.at += 1;
            match byte {
                b'\\' if escapes => self.at += 1,
                // With standard_conforming_strings off, or in a continuation of E'…', this quote would not end the literal.
                b'\\' if self.peek(0) == b'\'' => return Err(Uncertain("a backslash before a quote in a plain literal")),
                b'\'' if self.peek(0) == b'\'' => self.at += 1,
                b'\'' => break,
                _ => {}
            }
        }
        self.emit(start, mark);
        Ok(())
    }

    fn emit(&mut self, start: usize, mark: u8) {
        if self.always || self.replace && mark != MARK_KEPT {
            self.key.push(mark);
        } else {
            let end = self.at.min(self.bytes.len());
            self.key.extend_from_slice(self.bytes.get(start..end).unwrap_or_default());
        }
    }

    fn quoted_name(&mut self) -> Result<(), Uncertain> {
        let start = self.at;
        self.at += 1;
        loop {
            let Some(&byte) = self.bytes.get(self.at) else { return Err(Uncertain("an unterminated quoted name")) };
            self.at += 1;
            match byte {
                b'"' if self.peek(0) == b'"' => self.at += 1,
                b'"' => break,
                0x00..=0x1f => return Err(Uncertain("control characters in a name")),
                _ => {}
            }
        }
        self.copy(start);
        self.first = false;
        Ok(())
    }

    fn copy(&mut self, start: usize) {
        self.key.extend_from_slice(self.bytes.get(start..self.at).unwrap_or_default());
    }

    /// `$1`, or `$tag$…$tag$`.
    fn dollar(&mut self) -> Result<(), Uncertain> {
        let start = self.at;
        let mut end = start + 1;
        if self.bytes.get(end).copied().is_some_and(is_identifier_start) {
            while self.bytes.get(end).copied().is_some_and(|byte| is_identifier(byte) && byte != b'$') {
                end += 1;
            }
        }
        if self.bytes.get(end) == Some(&b'$') {
            let tag = self.bytes.get(start..=end).unwrap_or_default();
            if tag.len() > TAG_BYTES_MAX {
                return Err(Uncertain("a very long dollar-quote tag"));
            }
            let body = self.bytes.get(end + 1..).unwrap_or_default();
            let length = find(body, tag).ok_or(Uncertain("an unterminated dollar-quoted literal"))?;
            self.at = end + 1 + length + tag.len();
            self.emit(start, MARK_STRING);
            return Ok(());
        }
        self.at += 1;
        while self.peek(0).is_ascii_digit() {
            self.at += 1;
        }
        self.copy(start);
        Ok(())
    }

    fn number(&mut self) {
        let start = self.at;
        let mut mark = MARK_INTEGER;
        if self.peek(0) == b'0' && matches!(self.peek(1), b'x' | b'X' | b'o' | b'O' | b'b' | b'B') && self.peek(2).is_ascii_alphanumeric() {
            mark = MARK_KEPT;
            self.at += 2;
            while self.peek(0).is_ascii_alphanumeric() || self.peek(0) == b'_' {
                self.at += 1;
            }
        } else {
            let digits = |lexer: &mut Self, mark: &mut u8| {
                while lexer.peek(0).is_ascii_digit() || lexer.peek(0) == b'_' && lexer.peek(1).is_ascii_digit() {
                    if lexer.peek(0) == b'_' {
                        *mark = MARK_KEPT;
                    }
                    lexer.at += 1;
                }
            };
            digits(self, &mut mark);
            if self.peek(0) == b'.' && self.peek(1) != b'.' {
                mark = mark.max(MARK_NUMBER);
                self.at += 1;
                digits(self, &mut mark);
            }
            let sign = usize::from(matches!(self.peek(1), b'+' | b'-'));
            if matches!(self.peek(0), b'e' | b'E') && self.peek(1 + sign).is_ascii_digit() {
                mark = mark.max(MARK_NUMBER);
                self.at += 1 + sign;
                digits(self, &mut mark);
            }
        }
        if mark == MARK_INTEGER {
            let text = self.bytes.get(start..self.at).and_then(|digits| std::str::from_utf8(digits).ok()).unwrap_or_default();
            if text.parse::<i32>().is_err() {
                mark = MARK_NUMBER;
            }
        }
        // `1abc` is junk; `float(53)` is another type than `float(24)`.
        let junk = is_identifier(self.peek(0));
        if junk || self.follows_float() {
            self.copy(start);
        } else {
            self.emit(start, mark);
        }
    }

    fn follows_float(&self) -> bool {
        let mut before = self.key.iter().rev().copied().skip_while(|byte| is_space(*byte));
        if before.next() != Some(b'(') {
            return false;
        }
        let mut word = before.skip_while(|byte| is_space(*byte));
        b"taolf".iter().all(|expected| word.next().is_some_and(|byte| byte.eq_ignore_ascii_case(expected)))
    }

    fn word(&mut self) -> Result<(), Uncertain> {
        let start = self.at;
        match (self.peek(0).to_ascii_lowercase(), self.peek(1), self.peek(2)) {
            (b'e', b'\'', _) => return self.string(start, 1, MARK_STRING, true),
            // The grammar reads NCHAR 'x', a cast; the literal is next.
            (b'n', b'\'', _) => {
                self.first = false;
                self.at += 1;
                self.copy(start);
                return Ok(());
            }
            (b'b', b'\'', _) => return self.string(start, 1, MARK_KEPT, false),
            (b'x', b'\'', _) => return self.string(start, 1, MARK_KEPT, false),
            // Which name it is depends on the literal after UESCAPE.
            (b'u', b'&', b'"') => return Err(Uncertain("a name with Unicode escapes")),
            (b'u', b'&', b'\'') => return self.string(start, 2, MARK_KEPT, false),
            _ => {}
        }
        while self.bytes.get(self.at).copied().is_some_and(is_identifier) {
            self.at += 1;
        }
        let word = self.bytes.get(start..self.at).unwrap_or_default();
        if self.first {
            self.first = false;
            self.replace = self.always || LITERAL_FREE.iter().any(|keyword| word.eq_ignore_ascii_case(keyword.as_bytes()));
        }
        if word.eq_ignore_ascii_case(b"case") {
            self.shape.depth = self.shape.depth.max(self.open + 1);
            self.shape.operators += 1;
        } else if [&b"and"[..], b"or", b"not", b"is", b"union", b"except", b"intersect", b"join", b"collate", b"like", b"between", b"at"]
            .iter()
            .any(|operator| word.eq_ignore_ascii_case(operator))
        {
            self.shape.operators += 1;
        }
        self.copy(start);
        Ok(())
    }

    fn punctuation(&mut self, byte: u8) {
        match byte {
            b'(' | b'[' => {
                self.open += 1;
                self.shape.depth = self.shape.depth.max(self.open);
            }
            b')' | b']' => self.open = self.open.saturating_sub(1),
            b';' => {
                self.first = true;
                self.replace = true;
            }
            b',' => {}
            _ => self.shape.operators += 1,
        }
        self.key.push(byte);
        self.at += 1;
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

/// A statement as people read it: every literal becomes `$n`, counted on from the statement's own parameters. Empty when
/// literals cannot be told from the rest.
pub(super) fn for_people(text: &str, chars_max: usize) -> String {
    let mut key = Vec::new();
    if run(text, &mut key, true).is_err() {
        return String::new();
    }
    let key = String::from_utf8_lossy(&key);
    let own = key.split('$').skip(1).filter_map(|rest| {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        rest.get(..digits)?.parse::<u32>().ok()
    });
    let mut next = own.max().unwrap_or(0);
    let mut shown = String::new();
    for character in key.chars().take(chars_max) {
        match character {
            '\u{1}'..='\u{4}' => {
                next = next.saturating_add(1);
                shown.push_str(&format!("${next}"));
            }
            '\n' => shown.push(' '),
            other => shown.push(other),
        }
    }
    match shown.char_indices().nth(chars_max) {
        Some((end, _)) => shown.get(..end).unwrap_or_default().to_owned(),
        None => shown,
    }
}

/// A text with this key: its marks become literals of their kinds.
#[cfg(test)]
pub(super) fn refill(key: &[u8]) -> String {
    let mut text = Vec::new();
    for byte in key {
        // Two literals side by side are an error; written together they would be one.
        if *byte == MARK_STRING && text.last() == Some(&b'\'') {
            text.push(b' ');
        }
        match *byte {
            MARK_INTEGER => text.extend(b"7"),
            MARK_NUMBER => text.extend(b"7.5"),
            MARK_STRING => text.extend(b"'z'"),
            other => text.push(other),
        }
    }
    String::from_utf8(text).unwrap()
}
