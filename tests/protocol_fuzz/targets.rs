//! What must hold for any bytes that a peer sends. A target says no by panicking.

use bytes::{Bytes, BytesMut};
use understudy::{
    cdc::pgoutput,
    config::ServerUrl,
    console,
    session::conversation::{Conversation, FromServer, WholeCycle, whole_cycle},
    sql::{CatalogFacts, Classifier, Kind},
    traffic::answer::Answer,
    wire::{self, Message, backend, frontend, put},
};

/// Name, what is tried, bytes to start from, and how many inputs one of `make test` costs.
pub struct Target {
    pub name: &'static str,
    pub run: fn(&[u8]),
    pub corpus: fn() -> Vec<Vec<u8>>,
    pub inputs: u64,
}

pub const TARGETS: &[Target] = &[
    Target { name: "frontend", run: frontend, corpus: requests, inputs: 8_000 },
    Target { name: "startup", run: startup, corpus: startups, inputs: 8_000 },
    Target { name: "backend", run: backend, corpus: answers, inputs: 8_000 },
    Target { name: "conversation", run: conversation, corpus: dialogues, inputs: 20_000 },
    Target { name: "sql", run: sql, corpus: texts, inputs: 1_500 },
    Target { name: "pgoutput", run: decode, corpus: changes, inputs: 8_000 },
    Target { name: "console", run: command, corpus: commands, inputs: 8_000 },
    Target { name: "url", run: url, corpus: urls, inputs: 8_000 },
    Target { name: "config", run: config, corpus: configs, inputs: 1_000 },
];

/// Framing gives back exactly the bytes it took; a message that is read and written again is the same message.
fn frontend(bytes: &[u8]) {
    let mut buffer = BytesMut::from(bytes);
    let mut again = BytesMut::new();
    while let Ok(Some(message)) = wire::take(&mut buffer) {
        put(&mut again, message.tag, |b| b.extend_from_slice(&message.body));
        if let Some(parse) = frontend::Parse::parse(&message.body) {
            let mut written = BytesMut::new();
            parse.put_as(&mut written, &parse.name);
            assert_eq!(&written[5..], &message.body[..]);
        }
        if let Some(bind) = frontend::Bind::parse(&message.body) {
            let mut written = BytesMut::new();
            bind.put_as(&mut written, &bind.portal, &bind.statement);
            assert_eq!(&written[5..], &message.body[..]);
            let _ = frontend::result_formats(&bind.rest);
        }
        let _ = (frontend::target(&message.body), frontend::execute(&message.body), frontend::query_text(&message.body));
    }
    again.extend_from_slice(&buffer);
    assert_eq!(again, bytes);
    if let Some(WholeCycle::Simple { len, .. } | WholeCycle::Extended { len, .. }) = whole_cycle(bytes, 64 << 10) {
        assert!(len <= bytes.len());
    }
}

fn startup(bytes: &[u8]) {
    let body = Bytes::copy_from_slice(bytes);
    match frontend::Startup::parse(&body) {
        Some(frontend::Startup::Parameters { version, parameters }) => {
            let mut written = BytesMut::new();
            frontend::put_startup(&mut written, version, parameters.iter().map(|(name, value)| (&name[..], &value[..])));
            let again = frontend::Startup::parse(&written.freeze().slice(4..));
            assert_eq!(again, Some(frontend::Startup::Parameters { version, parameters }));
        }
        Some(frontend::Startup::Cancel { pid, key }) => {
            let mut written = BytesMut::new();
            frontend::put_cancel(&mut written, pid, &key);
            assert_eq!(&written[4..], bytes);
        }
        Some(frontend::Startup::Ssl | frontend::Startup::GssEncryption) | None => {}
    }
}

fn backend(bytes: &[u8]) {
    let mut buffer = BytesMut::from(bytes);
    let mut answer = Answer::default();
    while let Ok(Some(message)) = wire::take(&mut buffer) {
        if let Some(values) = backend::data_row(&message.body) {
            let length: usize = values.iter().flatten().map(|value| value.len() + 4).sum();
            assert!(length <= message.body.len());
        }
        if let Some(row) = backend::RowDescription::parse(&message.body) {
            assert!(row.columns.len() * 19 <= message.body.len());
        }
        let _ = (backend::ErrorFields::parse(&message.body), backend::command_tag(&message.body));
        let _ = backend::TransactionStatus::parse(&message.body);
        answer.take_in(&message);
    }
    assert!(answer.difference(&answer, true).is_none(), "an answer equals itself");
}

/// Messages of both sides in any order: even ones are the client's. Whatever comes, enough answers lead to a boundary.
fn conversation(bytes: &[u8]) {
    thread_local! {
        static CLASSIFIER: Classifier = Classifier::new(CatalogFacts::builtin_only());
    }
    let mut buffer = BytesMut::from(bytes);
    let mut talk = Conversation::default();
    talk.recording = bytes.len().is_multiple_of(2);
    while let Ok(Some(Message { tag, body })) = wire::take(&mut buffer) {
        if let Some(tag) = tag.checked_sub(128) {
            if tag == b'S' && body.len() == 1 {
                talk.generation += 1; // another server
            }
            let _ = talk.from_server(tag, &body);
            continue;
        }
        let before = CLASSIFIER.with(|classifier| talk.from_client(tag, &body, classifier).before);
        if let Some(mut before) = before {
            while let Some(message) = wire::take(&mut before).expect("what is put before is the protocol") {
                assert_eq!(message.tag, b'P');
            }
        }
    }
    CLASSIFIER.with(|classifier| {
        talk.from_client(b'f', b"\0", classifier);
        talk.from_client(b'S', b"", classifier);
    });
    for _ in 0..=bytes.len() {
        if talk.at_boundary() {
            return;
        }
        let finished = matches!(talk.from_server(b'Z', b"I"), FromServer::Finished(_));
        assert!(finished || talk.at_boundary(), "a ReadyForQuery ends a cycle");
    }
    assert!(talk.at_boundary());
}

fn sql(bytes: &[u8]) {
    thread_local! {
        static LONG_LIVED: Classifier = Classifier::new(CatalogFacts::builtin_only());
    }
    let fresh = Classifier::new(CatalogFacts::builtin_only());
    let class = fresh.classify(bytes);
    assert!(class.text.chars().count() <= understudy::sql::TEXT_CHARS_MAX + 1, "{} characters", class.text.chars().count());
    let known = LONG_LIVED.with(|classifier| classifier.classify(bytes));
    if known.kind == Kind::Unknown || class.kind == Kind::Unknown {
        return; // on a busy machine the parser's time may be over
    }
    assert_eq!(known.kind, class.kind, "the cache knows better: {}", bytes.escape_ascii());
    assert_eq!(known.session_effects, class.session_effects, "the cache knows better: {}", bytes.escape_ascii());
}

fn decode(bytes: &[u8]) {
    let body = Bytes::copy_from_slice(bytes);
    if let Ok(pgoutput::Envelope::Data { payload, .. }) = pgoutput::Envelope::decode(&body) {
        assert!(payload.len() < body.len());
        let _ = pgoutput::Message::decode(&payload);
    }
    if let Ok(message) = pgoutput::Message::decode(&body) {
        assert_eq!(pgoutput::Message::decode(&body).ok(), Some(message));
    }
}

fn command(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    match console::parse(&text) {
        Ok(statement) => assert_eq!(console::parse(&format!("  {text}\n;")).ok(), Some(statement), "blanks and a semicolon"),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

fn url(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    match ServerUrl::parse(&text) {
        Ok(url) => {
            let password = url.password.as_ref().map(|password| password.expose().to_owned()).unwrap_or_default();
            // shorter ones are parts of other words, and one that stands in the text twice is also something else
            let telling = password.len() >= 8 && text.matches("s3cret").count() == 1;
            assert!(!telling || !format!("{url:?}").contains(&password), "a password is shown");
        }
        Err(reason) => assert!(!reason.is_empty()),
    }
}

fn config(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Err(error) = understudy::config::parse(&text, "proxy.toml", &|name| (name == "HOME").then(|| "x".into())) {
        assert!(!error.to_string().is_empty());
    }
}

fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = BytesMut::new();
    put(&mut bytes, tag, |b| b.extend_from_slice(body));
    bytes.to_vec()
}

fn requests() -> Vec<Vec<u8>> {
    let all = [
        message(b'Q', b"SELECT 1\0"),
        message(b'P', b"name\0SELECT $1\0\0\x01\0\0\0\x17"),
        message(b'B', b"portal\0name\0\0\x02\0\0\0\x01\0\x02\0\0\0\x017\xff\xff\xff\xff\0\x01\0\x01"),
        message(b'D', b"Sname\0"),
        message(b'E', b"portal\0\0\0\0\x03"),
        message(b'C', b"Pportal\0"),
        message(b'S', b""),
        message(b'F', b"\0\0\0\xb1\0\0\0\x01\0\0\0\x011\0\0"),
    ];
    let cycle = [message(b'P', b"\0SELECT 1\0\0\0"), message(b'B', b"\0\0\0\0\0\0\0\0"), message(b'D', b"P\0")];
    let cycle = [cycle.concat(), message(b'E', b"\0\0\0\0\0"), message(b'S', b"")].concat();
    let mut corpus = all.to_vec();
    corpus.push(all.concat());
    corpus.push(cycle);
    corpus
}

fn startups() -> Vec<Vec<u8>> {
    vec![
        b"\0\x03\0\0user\0app\0database\0shop\0options\0-c a=b\0\0".to_vec(),
        b"\0\x03\0\x02user\0app\0_pq_.x\0y\0\0".to_vec(),
        b"\x04\xd2\x16\x2f".to_vec(),
        b"\x04\xd2\x16\x30".to_vec(),
        b"\x04\xd2\x16\x2e\0\0\x01\0abcd".to_vec(),
    ]
}

fn answers() -> Vec<Vec<u8>> {
    let all = [
        message(
            b'T',
            b"\0\x02id\0\0\0\x40\0\0\x01\0\0\0\x17\0\x04\xff\xff\xff\xff\0\0t\0\0\0\x40\0\0\x02\0\0\0\x19\xff\xff\xff\xff\xff\xff\0\x01",
        ),
        message(b'D', b"\0\x02\0\0\0\x011\xff\xff\xff\xff"),
        message(b'C', b"SELECT 1\0"),
        message(b'E', b"SERROR\0VERROR\0C22012\0Mdivision by zero\0Dd\0Ff.c\0L1\0\0"),
        message(b'Z', b"I"),
        message(b't', b"\0\x01\0\0\0\x17"),
        message(b'S', b"TimeZone\0UTC\0"),
        message(b'K', b"\0\0\0\x01abcd"),
        message(b'G', b"\0\0\x01\0\0"),
    ];
    let mut corpus = all.to_vec();
    corpus.push(all.concat());
    corpus
}

/// Messages of the server have 128 added to their type.
fn dialogues() -> Vec<Vec<u8>> {
    let server = |tag: u8, body: &[u8]| message(tag + 128, body);
    let (parse, bind) = (message(b'P', b"a\0SELECT 1\0\0\0"), message(b'B', b"\0a\0\0\0\0\0\0\0"));
    let (execute, sync, ready) = (message(b'E', b"\0\0\0\0\0"), message(b'S', b""), server(b'Z', b"I"));
    let run = [&bind[..], &execute, &sync].concat();
    let failed = server(b'E', b"C22012\0\0");
    let copy = message(b'P', b"a\0COPY t FROM STDIN\0\0\0");
    vec![
        [message(b'Q', b"BEGIN\0"), server(b'C', b"BEGIN\0"), server(b'Z', b"T"), message(b'Q', b"COMMIT\0"), ready.clone()].concat(),
        [&parse[..], &run, &server(b'1', b""), &server(b'2', b""), &server(b'C', b"SELECT 1\0"), &ready].concat(),
        [&parse[..], &sync, &server(b'1', b""), &ready, &server(b'S', b"x"), &run].concat(),
        [&copy[..], &run, &server(b'G', b""), &message(b'd', b"1\n"), &message(b'c', b""), &sync, &failed, &ready].concat(),
        [message(b'Q', b"DEALLOCATE a; SET x.y = 1\0"), server(b'C', b"SET\0"), message(b'F', b""), message(b'H', b"x")].concat(),
    ]
}

/// A corpus of texts.
fn lines(texts: &[&str]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

fn texts() -> Vec<Vec<u8>> {
    lines(&[
        "SELECT a, 'it''s', 1.5e3, $1 FROM t WHERE b IN (1, 2, 3) ORDER BY 1",
        "/* c /* nested */ */ INSERT INTO t VALUES (E'\\n', U&'\\00e4', $tag$ x $tag$, B'01', X'1F') -- end",
        "WITH w AS (DELETE FROM t RETURNING *) SELECT * FROM w; SET app.x = 'y'; COMMIT",
        "SELECT set_config('a', $1, false), pg_advisory_lock(1), nextval('s')",
        "PREPARE p AS SELECT 1; EXECUTE p; DEALLOCATE p; DECLARE c CURSOR WITH HOLD FOR SELECT 1",
        "COPY t FROM STDIN; SELECT 'unterminated",
        "CREATE TEMP TABLE \"T\" (a int); LISTEN x; DISCARD ALL",
    ])
}

fn changes() -> Vec<Vec<u8>> {
    let relation = b"R\0\0\x40\x01public\0item\0d\0\x02\x01id\0\0\0\0\x17\xff\xff\xff\xff\0note\0\0\0\0\x19\xff\xff\xff\xff";
    let mut envelope = b"w\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\x03".to_vec();
    envelope.extend_from_slice(relation);
    vec![
        relation.to_vec(),
        envelope,
        b"B\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\x07".to_vec(),
        b"C\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\x03".to_vec(),
        b"I\0\0\x40\x01N\0\x02t\0\0\0\x017n".to_vec(),
        b"U\0\0\x40\x01K\0\x02t\0\0\0\x017nN\0\x02t\0\0\0\x018u".to_vec(),
        b"D\0\0\x40\x01O\0\x02t\0\0\0\x017n".to_vec(),
        b"T\0\0\0\x01\x03\0\0\x40\x01".to_vec(),
        b"M\x01\0\0\0\0\0\0\0\x01understudy\0\0\0\0\x02{}".to_vec(),
        b"k\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x02\x01".to_vec(),
    ]
}

fn commands() -> Vec<Vec<u8>> {
    lines(&[
        "SHOW LATENCY BY QUERY",
        "SET pg18 serve_reads = 5.5",
        "SIMULATE CUTOVER pg18 AT 5 FOR '1m';",
        "APPROVE 7 AS 'ALTER TABLE \"x\" ADD y int'",
        "VERIFY pg18 TABLE public.item REPAIR",
        "/* c */ set client_encoding to 'UTF8'",
    ])
}

fn urls() -> Vec<Vec<u8>> {
    lines(&[
        "postgres://app:s3cret%20word@10.0.0.1:5432/shop?sslmode=require",
        "postgresql://app@[::1]:6432/shop",
        "postgres://%2Fvar%2Frun:1/x",
        "postgres://a:b@h/d?host=/tmp&application_name=x",
    ])
}

fn configs() -> Vec<Vec<u8>> {
    let example = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/proxy.toml")).unwrap();
    let small = "[[database]]\nname = \"shop\"\nsource = \"postgres://app:secret@h:5432/shop\"\n[[database.shadow]]\nname = \"s\"\nurl = \"postgres://a@h/d\"\n";
    vec![example, small.as_bytes().to_vec()]
}
