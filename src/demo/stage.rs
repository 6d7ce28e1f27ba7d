//! What people see: headings, lines, one live line with the time left. Colours and overwriting only on a terminal.

use std::{
    io::{IsTerminal, Write},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Where output is a file or a pipe, a live line is printed this often instead of being overwritten.
const PLAIN_LIVE_EVERY: Duration = Duration::from_secs(5);

/// The terminal, shared by everything that talks to it.
#[derive(Clone)]
pub struct Stage {
    inner: Arc<Inner>,
}

struct Inner {
    terminal: bool,
    started: Instant,
    expected: Duration,
    live: Mutex<Live>,
}

#[derive(Default)]
struct Live {
    shown: bool,
    printed: Option<Instant>,
}

impl Stage {
    /// `expected`: how long the whole run usually takes, for the time left.
    pub fn new(expected: Duration) -> Self {
        let terminal = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Stage { inner: Arc::new(Inner { terminal, started: Instant::now(), expected, live: Mutex::default() }) }
    }

    /// Since the start.
    pub fn elapsed(&self) -> Duration {
        self.inner.started.elapsed()
    }

    /// A heading.
    pub fn chapter(&self, title: &str) {
        let left = match self.inner.expected.checked_sub(self.elapsed()) {
            Some(left) if self.elapsed() > Duration::from_secs(1) => format!(", about {} s left", left.as_secs().max(1)),
            _ => String::new(),
        };
        let clock = format!("[{:>3} s{left}]", self.elapsed().as_secs());
        self.put(&format!("\n{} {}", self.paint("1", title), self.paint("2", &clock)));
    }

    /// A line of the story.
    pub fn line(&self, text: impl AsRef<str>) {
        self.put(&format!("  {}", text.as_ref()));
    }

    /// Something that went as it should.
    pub fn good(&self, text: impl AsRef<str>) {
        self.put(&format!("  {} {}", self.paint("32", "✓"), text.as_ref()));
    }

    /// Something to look at, expected in a rehearsal.
    pub fn notice(&self, text: impl AsRef<str>) {
        self.put(&format!("  {} {}", self.paint("33", "!"), text.as_ref()));
    }

    /// Something that must not happen.
    pub fn bad(&self, text: impl AsRef<str>) {
        self.put(&format!("  {} {}", self.paint("31", "✗"), text.as_ref()));
    }

    /// A block of another program's output.
    pub fn quote(&self, text: &str) {
        for line in text.lines() {
            self.put(&format!("    {} {line}", self.paint("2", "│")));
        }
    }

    /// A command that the operator gives.
    pub fn command(&self, text: &str) {
        self.put(&format!("  {} {}", self.paint("36", "understudy=#"), self.paint("1", text)));
    }

    /// The line that changes in place.
    pub fn live(&self, text: impl AsRef<str>) {
        let mut live = self.inner.live.lock().unwrap_or_else(PoisonError::into_inner);
        let mut out = std::io::stdout().lock();
        if self.inner.terminal {
            live.shown = true;
            let _ = write!(out, "\r\x1b[K  {} {}", self.paint("2", "…"), text.as_ref());
        } else if live.printed.is_none_or(|printed| printed.elapsed() > PLAIN_LIVE_EVERY) {
            live.printed = Some(Instant::now());
            let _ = writeln!(out, "  … {}", text.as_ref());
        }
        let _ = out.flush();
    }

    /// Bold, where there are colours.
    pub fn strong(&self, text: &str) -> String {
        self.paint("1", text)
    }

    fn put(&self, text: &str) {
        let mut live = self.inner.live.lock().unwrap_or_else(PoisonError::into_inner);
        let mut out = std::io::stdout().lock();
        if live.shown {
            let _ = write!(out, "\r\x1b[K");
            live.shown = false;
        }
        live.printed = None;
        // A closed pipe (`| head`) is no reason to stop half-way.
        let _ = writeln!(out, "{text}");
        let _ = out.flush();
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.inner.terminal { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// `1234567` as `1,234,567`.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Bytes with a unit.
pub fn bytes(number: u64) -> String {
    match number {
        0..10_000 => format!("{number} B"),
        10_000..10_000_000 => format!("{:.1} kB", number as f64 / 1e3),
        _ => format!("{:.1} MB", number as f64 / 1e6),
    }
}

/// Microseconds as milliseconds with a sensible number of digits.
pub fn millis(us: u64) -> String {
    match us {
        0..10_000 => format!("{:.2} ms", us as f64 / 1e3),
        10_000..100_000 => format!("{:.1} ms", us as f64 / 1e3),
        _ => format!("{:.0} ms", us as f64 / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_for_people() {
        for (number, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(grouped(number), text);
        }
        for (number, text) in [(12, "12 B"), (12_345, "12.3 kB"), (12_345_678, "12.3 MB")] {
            assert_eq!(bytes(number), text);
        }
        for (us, text) in [(950, "0.95 ms"), (15_250, "15.2 ms"), (250_000, "250 ms")] {
            assert_eq!(millis(us), text);
        }
    }
}
