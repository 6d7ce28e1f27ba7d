//! What the pure parts of the hot path cost: framing, classification, the bookkeeping of a cycle, the reduction and comparison
//! of answers. `make bench-micro`.

use bytes::{Bytes, BytesMut};
use divan::{Bencher, black_box, counter::BytesCount, counter::ItemsCount};
use understudy::{
    schema::{
        catalog::Column,
        distribution::Learnt,
        synthetic::{Facts, Generator},
    },
    session::conversation::Conversation,
    sql::{CatalogFacts, Classifier},
    traffic::answer::Answer,
    wire::{self, put},
};

fn main() {
    divan::main();
}

const SHORT: &[u8] = b"SELECT abalance FROM pgbench_accounts WHERE aid = 12345";

fn rows(number: usize) -> Bytes {
    let mut buffer = BytesMut::new();
    for row in 0..number {
        put(&mut buffer, b'D', |b| {
            b.extend_from_slice(&2i16.to_be_bytes());
            let (first, second) = (row.to_string(), "x".repeat(40));
            for value in [&first, &second] {
                b.extend_from_slice(&(value.len() as i32).to_be_bytes());
                b.extend_from_slice(value.as_bytes());
            }
        });
    }
    buffer.freeze()
}

/// Looks at the header of each of 1,000 rows, as the relay does.
#[divan::bench]
fn framing_1000_rows(bencher: Bencher) {
    let buffer = rows(1000);
    bencher.counter(ItemsCount::new(1000usize)).counter(BytesCount::new(buffer.len())).bench(|| {
        let mut rest = black_box(&buffer[..]);
        let mut found = 0;
        while let Ok(Some(header)) = wire::peek(rest) {
            found += usize::from(header.tag == b'D');
            rest = rest.get(header.len..).unwrap_or_default();
        }
        found
    });
}

/// A statement whose like was seen before, with other literals.
#[divan::bench(args = [0, 10, 100])]
fn classification_cached(bencher: Bencher, columns: usize) {
    let classifier = Classifier::new(CatalogFacts::builtin_only());
    let names: String = (0..columns).map(|n| format!("column_{n}, ")).collect();
    let text = format!("SELECT {names}abalance FROM pgbench_accounts WHERE aid = 12345");
    classifier.classify(text.as_bytes());
    bencher.counter(BytesCount::new(text.len())).bench(|| classifier.classify(black_box(text.as_bytes())));
}

/// A statement that is new: the grammar and the facts are asked.
#[divan::bench]
fn classification_of_a_new_statement(bencher: Bencher) {
    let classifier = Classifier::new(CatalogFacts::builtin_only());
    let mut number = 0u64;
    bencher.bench_local(|| {
        number += 1;
        classifier.classify(format!("SELECT abalance FROM accounts_{number} WHERE aid = 12345").as_bytes())
    });
}

/// A Query and its answer.
#[divan::bench(args = [false, true])]
fn cycle_of_a_query(bencher: Bencher, recording: bool) {
    let classifier = Classifier::new(CatalogFacts::builtin_only());
    let mut conversation = Conversation::default();
    conversation.recording = recording;
    let body = [SHORT, b"\0"].concat();
    bencher.bench_local(|| {
        conversation.from_client(b'Q', black_box(&body), &classifier);
        for (tag, body) in [(b'T', &b"\0\0"[..]), (b'C', b"SELECT 1\0"), (b'Z', b"I")] {
            black_box(conversation.from_server(tag, body));
        }
    });
}

/// Bind, Describe, Execute and Sync of a prepared statement, and the answer.
#[divan::bench(args = [false, true])]
fn cycle_of_a_prepared_statement(bencher: Bencher, recording: bool) {
    let classifier = Classifier::new(CatalogFacts::builtin_only());
    let mut conversation = Conversation::default();
    conversation.recording = recording;
    conversation.from_client(b'P', &[b"s1\0", SHORT, b"\0\0\0"].concat(), &classifier);
    conversation.from_client(b'S', b"", &classifier);
    conversation.from_server(b'1', b"");
    conversation.from_server(b'Z', b"I");
    bencher.bench_local(|| {
        for (tag, body) in [(b'B', &b"\0s1\0\0\0\0\0\0\0"[..]), (b'D', b"P\0"), (b'E', b"\0\0\0\0\0"), (b'S', b"")] {
            conversation.from_client(tag, black_box(body), &classifier);
        }
        for (tag, body) in [(b'2', &b""[..]), (b'T', b"\0\0"), (b'C', b"SELECT 1\0"), (b'Z', b"I")] {
            black_box(conversation.from_server(tag, body));
        }
    });
}

/// Reduces 1,000 rows to what is compared.
#[divan::bench]
fn reduction_of_1000_rows(bencher: Bencher) {
    let buffer = rows(1000);
    bencher.counter(ItemsCount::new(1000usize)).counter(BytesCount::new(buffer.len())).bench(|| {
        let mut answer = Answer::default();
        let mut rest = black_box(&buffer[..]);
        while let Ok(Some(header)) = wire::peek(rest) {
            answer.row(rest.get(5..header.len).unwrap_or_default());
            rest = rest.get(header.len..).unwrap_or_default();
        }
        answer
    });
}

/// Compares two reduced answers.
#[divan::bench]
fn comparison(bencher: Bencher) {
    let buffer = rows(10);
    let mut answer = Answer::default();
    answer.row(&buffer);
    let other = answer.clone();
    bencher.bench(|| black_box(&answer).difference(black_box(&other), true));
}

/// Values for a column without data: a list of 10,000 parents, words of a name, a frequency table, a learnt histogram, a learnt format, whole numbers, unique texts. The bar is
/// 500,000 values per second and core.
#[divan::bench(args = ["parents", "email", "shares", "histogram", "format", "integer", "unique"])]
fn synthetic_1000_values(bencher: Bencher, kind: &str) {
    let (type_name, facts) = match kind {
        "parents" => ("text", Facts { parents: Some((0..10_000).map(|key| format!("parent-{key}")).collect()), ..Facts::default() }),
        "shares" => {
            let shares = [("a", 0.5), ("b", 0.3), ("c", 0.2)].map(|(value, share)| (value.to_owned(), share)).to_vec();
            ("text", Facts { learnt: Some(Learnt { nulls: 0.1, frequent: shares, ..Learnt::default() }), ..Facts::default() })
        }
        "histogram" | "format" => {
            let rows: Vec<_> = (0..10_000u32)
                .map(|at| (Some(format!("INV-{:06}-x", at.wrapping_mul(2_654_435_761) % 1_000_000)), Some(f64::from(at * at))))
                .collect();
            let type_name = if kind == "format" { "text" } else { "bigint" };
            (type_name, Facts { learnt: Some(Learnt::from_sample(&rows)), ..Facts::default() })
        }
        "integer" => ("integer", Facts::default()),
        "unique" => ("text", Facts { unique: true, integer_key: true, ..Facts::default() }),
        _ => ("text", Facts::default()),
    };
    let name = if kind == "email" { "email" } else { "c" };
    let column = Column { name: name.into(), type_name: type_name.into(), type_kind: "b".into(), ..Column::default() };
    let generator = Generator::new("shop", "public.t", &column, &facts).expect("a generator for the bench's column");
    let keys: Vec<String> = (0..1_000).map(|key| key.to_string()).collect();
    bencher
        .counter(ItemsCount::new(keys.len()))
        .bench(|| keys.iter().filter_map(|key| generator.value(black_box(key))).map(|value| value.len()).sum::<usize>());
}
