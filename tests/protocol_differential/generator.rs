//! Conversations from a seed.

use crate::{
    raw::{Request, startup},
    script::{Action, Cut, Script, Unit},
    texts::{PARAMETERISED, PLAIN, Parameterised, SESSION},
};
use bytes::BytesMut;
use fastrand::Rng;

const NAMES: [&str; 4] = ["", "a", "b\u{e4}", "c"];
/// A Bind, Query or Parse of this size is streamed through by the proxy without being looked at.
const GIANT_BYTES: usize = 300_000;

/// The same seed gives the same conversation.
pub fn conversation(seed: u64) -> Script {
    let mut random = Rng::with_seed(seed);
    let units = random.usize(1..14);
    let mut script = Script {
        startup: startup_packet(&mut random),
        units: (0..units).map(|_| unit(&mut random)).collect(),
        cut: match random.u32(..10) {
            0..4 => Cut::Whole,
            4..6 => Cut::Pieces(7),
            6..9 => Cut::Pieces(400),
            _ => Cut::Bytes,
        },
        ends_early: false,
    };
    if random.u32(..100) < 15 {
        script.units.push(ending(&mut random));
        script.ends_early = true;
    }
    let length: usize = script.actions().iter().map(|action| if let Action::Send(bytes) = action { bytes.len() } else { 0 }).sum();
    if length > 20_000 && script.cut != Cut::Whole {
        script.cut = Cut::Pieces(60_000); // a giant in single bytes takes minutes and shows nothing more
    }
    script
}

fn pick<'a, T>(random: &mut Rng, from: &'a [T]) -> &'a T {
    &from[random.usize(..from.len())]
}

fn startup_packet(random: &mut Rng) -> BytesMut {
    let mut parameters: Vec<(&[u8], &[u8])> = vec![(b"user", b"app"), (b"database", b"shop")];
    let more: [(&[u8], &[u8]); 12] = [
        (b"application_name", b"generated"),
        (b"client_encoding", b"LATIN1"),
        (b"client_encoding", b"'utf-8'"),
        (b"DateStyle", b"German"),
        (b"TimeZone", b"America/New_York"),
        (b"options", b"-c statement_timeout=20s -c DateStyle=SQL\\ ,DMY"),
        (b"options", b"--search_path=public -c app.tenant=4"),
        (b"extra_float_digits", b"2"),
        (b"replication", b"false"),
        (b"application_name", b"twice"),
        (b"app.tenant", b"start"),
        (b"default_transaction_isolation", b"repeatable read"),
    ];
    for _ in 0..random.usize(..3) {
        parameters.push(*pick(random, &more));
    }
    startup(196_608, &parameters)
}

fn query(random: &mut Rng) -> String {
    match random.u32(..10) {
        0..4 => (*pick(random, PLAIN)).to_owned(),
        4..7 => (*pick(random, SESSION)).to_owned(),
        _ => {
            let count = random.usize(2..5);
            let parts = (0..count).map(|_| if random.u32(..3) == 0 { *pick(random, SESSION) } else { *pick(random, PLAIN) });
            parts.collect::<Vec<_>>().join("; ")
        }
    }
}

fn unit(random: &mut Rng) -> Unit {
    match random.u32(..100) {
        0..18 => simple(random),
        18..38 => soup(random),
        38..52 => extended(random),
        52..60 => pipeline(random),
        60..68 => Unit::send(copy_in_simple(random)),
        68..74 => copy_in_extended(random),
        74..78 => copy_out(random),
        78..82 => function_call(random),
        82..87 => notified(random),
        87..91 => giant(random),
        91..95 => replanned(random),
        _ => malformed(random),
    }
}

fn simple(random: &mut Rng) -> Unit {
    let mut request = Request::new();
    for _ in 0..random.usize(1..4) {
        let text = query(random);
        request = request.query(text);
    }
    let unit = Unit::send(request);
    if random.u32(..3) == 0 { unit.barrier() } else { unit }
}

/// Single messages in any order, right and wrong ones. With one exception: what a failed simple Query leaves in the unnamed
/// portal of an aborted transaction must not be executed, PostgreSQL (15.18) then reads memory that it has freed and dies.
fn soup(random: &mut Rng) -> Unit {
    let mut request = Request::new();
    let mut bound_here = false;
    for _ in 0..random.usize(1..16) {
        let name = pick(random, &NAMES);
        let other = pick(random, &NAMES);
        request = match random.u32(..100) {
            0..8 => request.query(query(random)),
            8..18 => request.parse(name, if random.bool() { pick(random, PLAIN) } else { pick(random, SESSION) }, &[]),
            18..30 => {
                let statement = pick(random, PARAMETERISED);
                request.parse(name, statement.text, statement.types)
            }
            30..50 => {
                let bound = pick(random, PARAMETERISED);
                bound_here |= other.is_empty();
                bind(random, request, other, name, bound)
            }
            50..58 => request.describe(*pick(random, b"SP"), name),
            58..76 if !name.is_empty() || bound_here => request.execute(name, random.i32(-1..4)),
            76..80 => request.flush(),
            80..87 => request.close(*pick(random, b"SP"), name),
            _ => {
                bound_here = false;
                request.sync()
            }
        };
    }
    let unit = Unit::send(request);
    if random.u32(..4) == 0 { unit.barrier() } else { unit }
}

fn bind(random: &mut Rng, request: Request, portal: &str, statement: &str, bound: &Parameterised) -> Request {
    let binary = random.u32(..3) == 0 && bound.parameters.iter().all(|(text, binary)| text.is_some() == binary.is_some());
    let values: Vec<Option<&[u8]>> = bound.parameters.iter().map(|(text, other)| if binary { *other } else { *text }).collect();
    let formats: Vec<i16> = match random.u32(..3) {
        0 if !binary => Vec::new(),
        1 => vec![i16::from(binary); values.len()],
        _ => vec![i16::from(binary)],
    };
    let results: &[i16] = match random.u32(..8) {
        0..4 => &[],
        4..6 => &[1],
        6 => &[0],
        _ => &[0, 1, 0],
    };
    request.bind(portal, statement, &formats, &values, results)
}

/// Statements and portals used as they are meant to be, several at a time, suspended and resumed.
fn extended(random: &mut Rng) -> Unit {
    let mut unit = Unit::default();
    let mut request = Request::new();
    if random.bool() {
        request = request.query("BEGIN");
    }
    let mut portals: Vec<&str> = Vec::new();
    for _ in 0..random.usize(1..4) {
        let (name, portal) = (pick(random, &NAMES), pick(random, &NAMES));
        let statement = pick(random, PARAMETERISED);
        if random.u32(..4) > 0 {
            request = request.close(b'S', name); // or its second Parse is an error, which is also wanted
        }
        request = request.parse(name, statement.text, statement.types);
        if random.bool() {
            request = request.describe(b'S', name);
        }
        if random.u32(..4) == 0 {
            request = request.flush();
            unit = unit.then(std::mem::take(&mut request)).barrier();
        }
        if random.u32(..4) == 0 {
            request = request.sync();
            portals.retain(|portal| !portal.is_empty());
        }
        request = bind(random, request, portal, name, statement);
        portals.push(portal);
        if random.bool() {
            request = request.describe(b'P', portal);
        }
        for _ in 0..random.usize(1..4) {
            let rows = random.i32(..5).max(0);
            let portal = pick(random, &portals);
            request = request.execute(portal, rows);
            match random.u32(..8) {
                0 => request = request.flush(),
                1 => request = request.close(b'P', portal),
                2 => {
                    request = request.flush();
                    unit = unit.then(std::mem::take(&mut request)).barrier();
                }
                _ => {}
            }
        }
    }
    if random.u32(..5) > 0 {
        request = request.sync();
    }
    if random.u32(..3) == 0 {
        request = request.query(*pick(random, &["COMMIT", "ROLLBACK"]));
    }
    unit.then(request)
}

/// Many cycles before the first answer is awaited.
fn pipeline(random: &mut Rng) -> Unit {
    let mut request = Request::new();
    let statement = pick(random, PARAMETERISED);
    let name = pick(random, &NAMES);
    request = request.parse(name, statement.text, statement.types);
    for _ in 0..random.usize(2..20) {
        if random.u32(..6) == 0 {
            request = request.run(pick(random, PLAIN));
        }
        request = bind(random, request, "", name, statement);
        if random.bool() {
            request = request.describe(b'P', "");
        }
        request = request.execute("", 0);
        if random.u32(..5) > 0 {
            request = request.sync();
        }
        if random.u32(..8) == 0 {
            request = request.query(query(random));
        }
    }
    Unit::send(request.sync())
}

/// What follows the CopyInResponse: never a message other than those of COPY, Flush and Sync.
fn copy_lines(random: &mut Rng, mut request: Request) -> Request {
    for _ in 0..random.usize(..6) {
        let key = random.u32(1..60);
        request = match random.u32(..12) {
            0..6 => request.copy_data(format!("{key}\ttext {key}\t2024-01-0{}\n", random.u32(1..9)).as_bytes()),
            6 => request.copy_data(format!("{key}\tcut in").as_bytes()).copy_data(b" two\t\\N\n"),
            7 => request.copy_data(b""),
            8 => request.copy_data(b"not a number\tx\t\\N\n"),
            9 => request.copy_data(b"61\ttoo\tfew\tor\tmany\n"),
            10 => request.flush(),
            _ => request.sync(),
        };
    }
    match random.u32(..5) {
        0 => request.copy_fail("the client gives up"),
        _ => request.copy_done(),
    }
}

const COPY_IN: [&str; 7] = [
    "COPY sink FROM STDIN",
    "COPY sink (id, note, day) FROM STDIN",
    "COPY sink FROM STDIN WITH (FORMAT csv, DELIMITER E'\\t', NULL '\\N')",
    "COPY sink FROM STDIN WITH (FORMAT binary)",
    "COPY nowhere FROM STDIN",
    "COPY item (id) FROM STDIN",
    "COPY sink (nothing) FROM STDIN",
];

fn copy_in_simple(random: &mut Rng) -> Request {
    let text = *pick(random, &COPY_IN);
    let mut request = Request::new();
    request = match random.u32(..6) {
        0 => request.query(format!("SELECT 1; {text}; SELECT 2")),
        1 => request.query(format!("BEGIN; {text}")),
        2 => request.query(format!("{text}; {}", pick(random, PLAIN))),
        _ => request.query(text),
    };
    request = copy_lines(random, request);
    if random.u32(..4) == 0 {
        // what a client still sends to a COPY that has failed
        request = request.copy_data(b"62\tlate\t\\N\n").copy_done();
    }
    if random.bool() { request.query("SELECT count(*) FROM sink") } else { request }
}

fn copy_in_extended(random: &mut Rng) -> Unit {
    let text = *pick(random, &COPY_IN);
    let mut unit = Unit::default();
    let mut request = Request::new();
    if random.u32(..4) == 0 {
        request = request.run(pick(random, PLAIN));
    }
    request = request.parse("", text, &[]).bind("", "", &[], &[], &[]);
    if random.bool() {
        request = request.describe(b'P', "");
    }
    request = request.execute("", 0);
    match random.u32(..4) {
        0 => request = request.sync(), // before the data: the server ignores it, unless the COPY never began
        1 => {
            request = request.flush();
            unit = unit.then(std::mem::take(&mut request)).barrier();
        }
        _ => {}
    }
    request = copy_lines(random, request);
    if random.u32(..3) == 0 {
        request = request.run(pick(random, PLAIN));
    }
    request = request.sync();
    if random.u32(..3) == 0 {
        request = request.sync();
    }
    unit = unit.then(request);
    if random.u32(..3) == 0 { unit.barrier() } else { unit }
}

fn copy_out(random: &mut Rng) -> Unit {
    let text = *pick(
        random,
        &[
            "COPY (SELECT generate_series(1, 400)) TO STDOUT",
            "COPY (SELECT id, note FROM item ORDER BY id) TO STDOUT WITH (FORMAT csv, HEADER)",
            "COPY (SELECT id, note FROM item ORDER BY id) TO STDOUT WITH (FORMAT binary)",
            "COPY (SELECT 1 / (9 - id) FROM item ORDER BY id) TO STDOUT",
            "COPY (SELECT repeat('z', 300000)) TO STDOUT",
            "COPY nowhere TO STDOUT",
        ],
    );
    Unit::send(match random.u32(..3) {
        0 => Request::new().query(text),
        1 => Request::new().query(format!("SELECT 1; {text}; {text}")),
        _ => {
            let request = Request::new().parse("", text, &[]).bind("", "", &[], &[], &[]).describe(b'P', "").execute("", random.i32(..3));
            request.execute("", 0).sync()
        }
    })
}

fn function_call(random: &mut Rng) -> Unit {
    const ARGUMENTS: [&[&[u8]]; 4] = [&[b"1", b"2"], &[b"1"], &[], &[b"x", b"y"]];
    let arguments = ARGUMENTS[random.usize(..ARGUMENTS.len())];
    // int4pl, int4div, no function at all
    let oid = *pick(random, &[177, 154, 1]);
    let format = random.i16(..3).max(0);
    let request = Request::new().call(oid, arguments, format);
    Unit::send(if random.bool() { request.call(154, &[b"1", b"0"], 0).query("SELECT 1") } else { request })
}

fn notified(random: &mut Rng) -> Unit {
    let mut unit = Unit::send(Request::new().query("LISTEN news").query(*pick(random, &["SELECT 1", "BEGIN", "LISTEN other"]))).barrier();
    for k in 0..random.usize(1..4) {
        unit = unit.peer(format!("NOTIFY {}, 'from a peer {k}'", pick(random, &["news", "other", "elsewhere"])));
        if random.bool() {
            unit = unit.then(Request::new().query(query(random)));
        }
    }
    unit.then(Request::new().query("SELECT 'woken'"))
}

fn giant(random: &mut Rng) -> Unit {
    let filler = "g".repeat(GIANT_BYTES + random.usize(..9));
    let name = *pick(random, &NAMES);
    Unit::send(match random.u32(..6) {
        0 => Request::new().query(format!("SELECT length('{filler}')")),
        1 => Request::new().query(format!("SELECT '{filler}'; SELECT 1 / 0; SELECT 2")),
        2 => {
            let request = Request::new().close(b'S', name).parse(name, "SELECT length($1), $1", &[25]);
            request.bind("", name, &[], &[Some(filler.as_bytes())], &[]).describe(b'P', "").execute("", 0).sync()
        }
        3 => {
            let request = Request::new().close(b'S', name).parse(name, format!("SELECT length('{filler}')"), &[]);
            request.bind("", name, &[], &[], &[1]).execute("", 0).sync().bind("", name, &[], &[], &[]).execute("", 0).sync()
        }
        4 => {
            let request = Request::new().query("COPY sink FROM STDIN").copy_data(format!("63\t{filler}\t\\N\n").as_bytes());
            if random.bool() { request.copy_done() } else { request.copy_fail(&filler[..9000]) }
        }
        _ => Request::new().query(format!("SELECT repeat('h', {GIANT_BYTES} + id), id FROM item WHERE id < 5 ORDER BY id")),
    })
}

/// A statement whose plan must change under it.
fn replanned(random: &mut Rng) -> Unit {
    let name = *pick(random, &NAMES);
    let mut request = Request::new().query("CREATE TEMP TABLE IF NOT EXISTS plan (k int, t text)").close(b'S', name);
    request = request.parse(name, "SELECT * FROM plan ORDER BY k", &[]).run_prepared(name).sync();
    request = request.query(*pick(random, &["ALTER TABLE plan ADD COLUMN more int", "DROP TABLE plan", "ALTER TABLE plan RENAME t TO u"]));
    for _ in 0..2 {
        request = request.bind("", name, &[], &[], &[1]).describe(b'P', "").execute("", 0).sync();
    }
    Unit::send(request)
}

/// Wrong, but the server goes on.
fn malformed(random: &mut Rng) -> Unit {
    let mut request = Request::new();
    request = match random.u32(..14) {
        0 => request.raw(b'P', b"a"),
        1 => request.raw(b'P', b"a\0SELECT 1\0\0"),
        2 => request.raw(b'B', b"\0a\0\0\x01"),
        3 => request.raw(b'B', b"\0a\0\0\x02\0\0\0\0\0\x01\0\0\0\x011\0\0"),
        4 => request.raw(b'D', b"Xa\0"),
        5 => request.raw(b'C', b"Qa\0"),
        6 => request.raw(b'E', b"\0\0\0"),
        7 => request.raw(b'E', b"\0\0\0\0\0and more"),
        8 => request.raw(b'S', b"more"),
        9 => request.raw(b'H', b"more"),
        10 => request.raw(b'Q', b"SELECT 1\0SELECT 2\0"),
        11 => request.raw(b'P', b"a\0SELECT $1\0\0\x02\0\0\0\x17"),
        12 => request.raw(b'F', b"\0\0\0\xb1\0"),
        _ => request.raw(b'B', b"nowhere\0nothing\0\0\0\0\0\0\0"),
    };
    Unit::send(if random.bool() { request.sync() } else { request.query("SELECT 1").sync() })
}

/// The connection ends here.
fn ending(random: &mut Rng) -> Unit {
    let out = Request::new().copy_fail("the end").sync().query("ROLLBACK").query("RESET ALL");
    let unit = Unit::send(out).barrier();
    match random.u32(..9) {
        0 => unit.then(Request::new().raw(b'X', b"")).last(Action::AwaitEnd),
        1 => unit
            .then(Request::new().query(query(random)).query("SELECT generate_series(1, 5000)"))
            .last(Action::HalfClose)
            .last(Action::AwaitEnd),
        2 => unit.then(Request::new().raw(*pick(random, b"\x01zA?\xff"), b"who knows")).last(Action::AwaitEnd),
        3 => unit.then(Request::new().raw(b'p', b"password\0")).last(Action::AwaitEnd),
        4 => unit.then(Request::new().query("SELECT pg_terminate_backend(pg_backend_pid())")).last(Action::AwaitEnd),
        5 => {
            let request = Request::new().query("BEGIN; SET idle_in_transaction_session_timeout = '30ms'");
            unit.then(request).barrier().last(Action::AwaitEnd)
        }
        6 => unit.then(Request::new().query("COPY sink FROM STDIN").query("SELECT 1")).last(Action::AwaitEnd),
        7 => unit.then(Request::new().run("SELECT generate_series(1, 3000)").sync().raw(b'X', b"")).last(Action::AwaitEnd),
        _ => unit.then(Request::new().query("SELECT 1").raw(b'Q', b"never finished")).last(Action::HalfClose).last(Action::AwaitEnd),
    }
}
