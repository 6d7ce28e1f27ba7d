use super::*;
use proptest::prelude::*;

fn command(text: &str) -> Command {
    match parse(text) {
        Ok(Statement::Command(command)) => command,
        other => panic!("{text}: {other:?}"),
    }
}

fn simulate(percent: f64, duration: Duration) -> Command {
    Command::SimulateCutover { shadow: "pg18".into(), percent, duration }
}

#[test]
fn commands() {
    let set = |knob: &str, value: &str| Command::Set { shadow: "pg18".into(), knob: knob.into(), value: value.into() };
    let verify = |table: Option<&str>, repair| Command::Verify { shadow: "pg18".into(), table: table.map(Into::into), repair };
    let seconds = Duration::from_secs;
    for (text, expected) in [
        ("SHOW SHADOWS", Command::Show(Topic::Shadows)),
        ("  show   Shadows ; ", Command::Show(Topic::Shadows)),
        ("show latency", Command::Show(Topic::Latency)),
        ("show latency by query;", Command::Show(Topic::LatencyByQuery)),
        ("help", Command::Show(Topic::Help)),
        ("SET pg18 sample_reads = 5", set("sample_reads", "5")),
        ("SET pg18 Sample_Reads=5%", set("sample_reads", "5%")),
        ("set 'pg18' shift.hold TO '30s'", set("shift.hold", "30s")),
        ("set \"pg18\" shift.steps = [1, 5, 25]", set("shift.steps", "[1, 5, 25]")),
        ("set pg18 mirror_writes = ''", set("mirror_writes", "")),
        ("RELOAD", Command::Reload),
        ("remove leftovers shop", Command::RemoveLeftovers("shop".into())),
        ("show leftovers", Command::Show(Topic::Leftovers)),
        ("PAUSE", Command::Pause(None)),
        ("RECONNECT", Command::Reconnect(None)),
        ("reconnect shop", Command::Reconnect(Some("shop".into()))),
        ("pause shop;", Command::Pause(Some("shop".into()))),
        ("resume \"My Shop\"", Command::Resume(Some("My Shop".into()))),
        ("APPROVE 3", Command::Approve { id: 3, sql: None }),
        ("approve 3 as 'SELECT ''a;b'''", Command::Approve { id: 3, sql: Some("SELECT 'a;b'".into()) }),
        ("approve 3 as $$SELECT 'a'$$;", Command::Approve { id: 3, sql: Some("SELECT 'a'".into()) }),
        ("REJECT 12", Command::Reject(12)),
        ("SIMULATE CUTOVER pg18", simulate(5.0, seconds(10))),
        ("SIMULATE CUTOVER pg18 AT 0.5%", simulate(0.5, seconds(10))),
        ("simulate cutover pg18 at 5 % for '30s'", simulate(5.0, seconds(30))),
        ("simulate cutover pg18 for 500ms at 100", simulate(100.0, Duration::from_millis(500))),
        ("SHIFT START pg18", Command::ShiftStart("pg18".into())),
        ("shift stop pg-18", Command::ShiftStop("pg-18".into())),
        ("SHADOW START pg18", Command::ShadowStart("pg18".into())),
        ("shadow resync pg18", Command::ShadowResync("pg18".into())),
        ("shadow stop start", Command::ShadowStop("start".into())),
        ("REVERT pg18", Command::Revert("pg18".into())),
        ("CUTOVER pg18", Command::Cutover { shadow: "pg18".into(), dry_run: false }),
        ("cutover pg18 dry run", Command::Cutover { shadow: "pg18".into(), dry_run: true }),
        ("ROLLBACK shop", Command::Rollback("shop".into())),
        ("VERIFY pg18", verify(None, false)),
        ("verify pg18 table public.\"Orders\" repair", verify(Some("public.Orders"), true)),
        ("verify pg18 repair", verify(None, true)),
        ("SHUTDOWN", Command::Shutdown),
        ("/* now */ shutdown -- really", Command::Shutdown),
    ] {
        assert_eq!(command(text), expected, "{text}");
    }
}

#[test]
fn what_drivers_send_is_harmless() {
    for text in ["", "  ", ";", " ;; ", "-- nothing", "/* */"] {
        assert_eq!(parse(text), Ok(Statement::Empty), "{text}");
    }
    for (text, name) in [
        ("SET client_encoding = 'UTF8'", "client_encoding"),
        ("set client_encoding to utf8;", "client_encoding"),
        ("SET DateStyle=ISO", "datestyle"),
        ("SET extra_float_digits = 3", "extra_float_digits"),
        ("SET SESSION statement_timeout TO 0", "statement_timeout"),
        ("SET search_path = a, \"b\"", "search_path"),
        ("SET NAMES 'utf8'", "client_encoding"),
        ("SET TIME ZONE 'UTC'", "timezone"),
    ] {
        assert_eq!(parse(text), Ok(Statement::ClientSetting(name.into())), "{text}");
    }
}

#[test]
fn wrong_words_say_what_was_expected() {
    for (text, part) in [
        ("SHOW SHADOW", "did you mean SHOW SHADOWS?"),
        ("SHOW", "SHOW HELP lists all commands"),
        ("SHOW SHADOWS pg18", "did you mean SHOW SHADOWS?"),
        ("SHOW LATENCY BY", "did you mean SHOW LATENCY"),
        ("shadows", "did you mean SHOW SHADOWS?"),
        ("frobnicate", "`FROBNICATE` is not a command; SHOW HELP"),
        ("SELECT 1", "is SQL"),
        ("BEGIN", "no transactions"),
        ("SET pg18", "expected SET <shadow> <knob> = <value>"),
        ("SET pg18 = 5", "expected SET <shadow> <knob> = <value>"),
        ("SET pg18 sample_reads", "found the end"),
        ("SET pg18 sample_reads =", "found the end"),
        ("SET pg18 sample_reads 5", "found `5`"),
        ("APPROVE", "expected APPROVE <id>"),
        ("APPROVE x", "SHOW PROPOSALS lists the ids"),
        ("APPROVE 0", "SHOW PROPOSALS lists the ids"),
        ("APPROVE 99999999999999999999", "SHOW PROPOSALS lists the ids"),
        ("APPROVE 3 AS", "AS takes the statements"),
        ("APPROVE 3 AS ALTER TABLE t", "AS takes the statements"),
        ("APPROVE 3 'x'", "a string is too much: expected APPROVE <id> [AS '<sql>']"),
        ("REJECT 3 4", "`4` is too much: expected REJECT <id>"),
        ("SIMULATE pg18", "SIMULATE CUTOVER <shadow>"),
        ("SIMULATE CUTOVER", "expected SIMULATE CUTOVER <shadow>"),
        ("SIMULATE CUTOVER pg18 AT 0", "above 0"),
        ("SIMULATE CUTOVER pg18 AT 101", "at most 100"),
        ("SIMULATE CUTOVER pg18 AT nan", "above 0"),
        ("SIMULATE CUTOVER pg18 FOR 30", "FOR takes a time"),
        ("SIMULATE CUTOVER pg18 FOR '0s'", "FOR takes a time"),
        ("SHIFT pg18", "expected SHIFT START <shadow> or SHIFT STOP <shadow>"),
        ("SHIFT START", "expected SHIFT START <shadow>"),
        ("CUTOVER pg18 DRY", "expected CUTOVER <shadow> [DRY RUN]"),
        ("CUTOVER", "SHOW SHADOWS lists the names"),
        ("ROLLBACK", "the console itself has no transactions"),
        ("VERIFY pg18 TABLE", "expected VERIFY <shadow> [TABLE <table>] [REPAIR]"),
        ("SHUTDOWN now", "`now` is too much"),
        ("REVERT 'pg18", "not closed"),
        ("REVERT a; REVERT b", "one command at a time"),
        ("= x", "`=` is not a command"),
    ] {
        match parse(text) {
            Err(CommandError::Syntax(message)) => assert!(message.contains(part), "{text}: {message}"),
            other => panic!("{text}: {other:?}"),
        }
    }
}

fn name() -> impl Strategy<Value = String> {
    prop_oneof!["[a-z][a-z0-9_.-]{0,8}", "(?i)(start|to|as|at|for|table|repair|dry|run|session|names)", "[^\\x00]{1,8}"]
}

fn commands_strategy() -> impl Strategy<Value = Command> {
    let topic = (0..TOPICS.len()).prop_map(|index| Command::Show(TOPICS[index].1));
    let text = "[^\\x00]{0,20}";
    prop_oneof![
        topic,
        (name(), name(), text).prop_map(|(shadow, knob, value)| Command::Set { shadow, knob: knob.to_lowercase(), value }),
        Just(Command::Reload),
        name().prop_map(Command::RemoveLeftovers),
        proptest::option::of(name()).prop_map(Command::Pause),
        proptest::option::of(name()).prop_map(Command::Reconnect),
        proptest::option::of(name()).prop_map(Command::Resume),
        (1i64.., proptest::option::of("[^\\x00]{0,20}[a-z]")).prop_map(|(id, sql)| Command::Approve { id, sql }),
        (1i64..).prop_map(Command::Reject),
        (name(), 0.001f64..=100.0, 1u64..10_000_000).prop_map(|(shadow, percent, ms)| Command::SimulateCutover {
            shadow,
            percent,
            duration: Duration::from_millis(ms)
        }),
        name().prop_map(Command::ShiftStart),
        name().prop_map(Command::ShiftStop),
        name().prop_map(Command::ShadowStart),
        name().prop_map(Command::ShadowResync),
        name().prop_map(Command::ShadowStop),
        name().prop_map(Command::Revert),
        (name(), any::<bool>()).prop_map(|(shadow, dry_run)| Command::Cutover { shadow, dry_run }),
        name().prop_map(Command::Rollback),
        (name(), proptest::option::of(name()), any::<bool>()).prop_map(|(shadow, table, repair)| Command::Verify { shadow, table, repair }),
        Just(Command::Shutdown),
    ]
}

proptest! {
    #[test]
    fn a_command_round_trips_through_its_text(command in commands_strategy()) {
        let text = command.to_string();
        prop_assert_eq!(parse(&text), Ok(Statement::Command(command)), "{}", text);
    }

    #[test]
    fn nothing_panics(text in any::<String>()) {
        let _ = parse(&text);
    }

    #[test]
    fn word_salad_never_panics(words in prop::collection::vec(
        prop_oneof![Just("SHOW"), Just("SET"), Just("AT"), Just("FOR"), Just("'"), Just("$$"), Just("="), Just("5"), Just("pg18"), Just("SIMULATE"), Just("CUTOVER"), Just(";")], 0..8)
    ) {
        let _ = parse(&words.join(" "));
    }
}
