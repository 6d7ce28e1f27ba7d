//! Whole conversations as tables: what the client sends, what the server answers, what must be known afterwards.

use super::*;
use crate::sql::CatalogFacts;
use proptest::prelude::*;

fn classifier() -> Classifier {
    Classifier::new(CatalogFacts::builtin_only())
}

struct Talk {
    conversation: Conversation,
    classifier: Classifier,
    finished: Vec<Finished>,
}

impl Talk {
    fn new() -> Self {
        Talk { conversation: Conversation { recording: true, ..Conversation::default() }, classifier: classifier(), finished: Vec::new() }
    }

    fn client(&mut self, messages: &[(u8, &[u8])]) -> Vec<bool> {
        messages.iter().map(|(tag, body)| self.conversation.from_client(*tag, body, &self.classifier).before.is_some()).collect()
    }

    /// Returns the tags that reach the client.
    fn server(&mut self, messages: &[(u8, &[u8])]) -> String {
        let mut seen = String::new();
        for (tag, body) in messages {
            match self.conversation.from_server(*tag, body) {
                FromServer::Swallow => continue,
                FromServer::Finished(finished) => self.finished.push(*finished),
                FromServer::Forward => {}
            }
            seen.push(*tag as char);
        }
        seen
    }
}

const P: (u8, &[u8]) = (b'P', b"s1\0select 1\0\0\0");
const B: (u8, &[u8]) = (b'B', b"\0s1\0\0\0\0\0\0\0");
const E: (u8, &[u8]) = (b'E', b"\0\0\0\0\0");
const S: (u8, &[u8]) = (b'S', b"");
const IDLE: (u8, &[u8]) = (b'Z', b"I");
const DONE: (u8, &[u8]) = (b'C', b"SELECT 1\0");
const ERROR: (u8, &[u8]) = (b'E', b"SERROR\0C42601\0\0");

#[test]
fn a_boundary_is_only_where_everything_is_answered() {
    let mut talk = Talk::new();
    assert!(talk.conversation.at_boundary());
    talk.client(&[(b'Q', b"begin\0")]);
    assert!(!talk.conversation.at_boundary());
    talk.server(&[(b'C', b"BEGIN\0"), (b'Z', b"T")]);
    assert!(!talk.conversation.at_boundary(), "inside a transaction");
    talk.client(&[(b'Q', b"commit\0")]);
    talk.server(&[(b'C', b"COMMIT\0"), IDLE]);
    assert!(talk.conversation.at_boundary());
    talk.client(&[P]);
    assert!(!talk.conversation.at_boundary(), "a batch without Sync");
}

#[test]
fn several_syncs_outstanding_are_answered_one_by_one() {
    let mut talk = Talk::new();
    talk.client(&[P, B, E, S, B, E, S]);
    talk.server(&[(b'1', b""), (b'2', b""), DONE, IDLE]);
    assert!(!talk.conversation.at_boundary());
    talk.server(&[(b'2', b""), DONE, IDLE]);
    assert!(talk.conversation.at_boundary());
    assert_eq!(talk.finished.len(), 2);
    assert_eq!(talk.finished[1].cycle.executed[0].tags, [Bytes::from("SELECT 1")]);
}

#[test]
fn a_failed_parse_is_not_remembered() {
    let mut talk = Talk::new();
    talk.client(&[P, B, E, S]);
    talk.server(&[ERROR, IDLE]);
    assert!(talk.conversation.statement(b"s1").is_none());
    assert!(talk.finished[0].cycle.failed);
}

#[test]
fn after_a_move_statements_are_prepared_again_and_nobody_notices() {
    let mut talk = Talk::new();
    talk.client(&[P, S]);
    talk.server(&[(b'1', b""), IDLE]);
    talk.conversation.generation += 1;
    assert_eq!(talk.client(&[B, E, S]), [true, false, false]);
    assert_eq!(talk.server(&[(b'1', b""), (b'2', b""), DONE, IDLE]), "2CZ");
    assert_eq!(talk.client(&[B, E, S]), [false, false, false], "once is enough");
    talk.server(&[(b'2', b""), DONE, IDLE]);
    talk.conversation.generation += 1;
    assert_eq!(talk.client(&[B, E, S]), [true, false, false]);
    talk.server(&[ERROR, IDLE]);
    assert_eq!(talk.client(&[B, E, S]), [true, false, false], "it failed: try again");
}

#[test]
fn close_and_deallocate_forget() {
    let mut talk = Talk::new();
    talk.client(&[P, S]);
    talk.server(&[(b'1', b""), IDLE]);
    talk.client(&[(b'C', b"Ss1\0"), S]);
    talk.server(&[(b'3', b""), IDLE]);
    assert!(talk.conversation.statement(b"s1").is_none());
    for text in [&b"DEALLOCATE s1\0"[..], b"deallocate prepare S1\0", b"DEALLOCATE ALL\0"] {
        talk.client(&[P, S]);
        talk.server(&[(b'1', b""), IDLE]);
        assert!(talk.conversation.statement(b"s1").is_some());
        talk.client(&[(b'Q', text)]);
        talk.server(&[(b'C', b"DEALLOCATE\0"), IDLE]);
        assert!(talk.conversation.statement(b"s1").is_none());
    }
}

#[test]
fn half_an_answer_is_not_compared() {
    for early in [false, true] {
        let mut talk = Talk::new();
        talk.client(&[P, B, E]);
        if early {
            talk.server(&[ERROR]); // servers send errors at once
        }
        talk.client(&[S]);
        talk.conversation.capture_newest();
        assert_eq!(talk.conversation.is_capturing(), !early);
    }
}

#[test]
fn a_copy_of_a_query_swallows_syncs_too() {
    let copy: (u8, &[u8]) = (b'Q', b"COPY t FROM STDIN\0");
    for late in [false, true] {
        let mut talk = Talk::new();
        talk.client(&[copy]);
        if late {
            talk.server(&[(b'G', b"")]);
        }
        talk.client(&[S, (b'd', b"1\n"), S, (b'c', b""), (b'Q', b"SELECT 1\0")]);
        if !late {
            talk.server(&[(b'G', b"")]);
        }
        talk.server(&[(b'C', b"COPY 1\0"), IDLE, DONE]);
        assert!(!talk.conversation.at_boundary(), "the Query behind the COPY is not answered");
        talk.server(&[IDLE]);
        assert!(talk.conversation.at_boundary(), "late: {late}");
        assert_eq!(talk.finished.len(), 2);
    }
}

#[test]
fn what_was_sent_behind_a_copy_is_answered_by_itself() {
    // all in one breath: the first Sync is swallowed, the second ends the copy, the third ends what follows
    let mut talk = Talk::new();
    talk.client(&[P, B, E, S, (b'd', b"1\n"), (b'c', b""), S, B, E, S]);
    talk.server(&[(b'1', b""), (b'2', b""), (b'G', b""), (b'C', b"COPY 1\0"), IDLE]);
    assert!(!talk.conversation.at_boundary());
    talk.server(&[(b'2', b""), DONE, IDLE]);
    assert!(talk.conversation.at_boundary());
    // the end of the copy was there before the answer: the Sync behind it is real
    talk.client(&[B, E, (b'd', b"1\n"), (b'c', b""), S, B, E, S]);
    talk.server(&[(b'2', b""), (b'G', b""), ERROR, IDLE]);
    assert!(!talk.conversation.at_boundary());
    talk.server(&[(b'2', b""), DONE, IDLE]);
    assert!(talk.conversation.at_boundary());
}

#[test]
fn sync_is_ignored_while_copying_in() {
    let mut talk = Talk::new();
    talk.client(&[(b'P', b"\0copy t from stdin\0\0\0"), (b'B', b"\0\0\0\0\0\0\0\0"), E, S]);
    talk.server(&[(b'1', b""), (b'2', b""), (b'G', b"\0\0\0")]);
    talk.client(&[S, (b'd', b"1\n"), (b'c', b""), S]);
    talk.server(&[(b'C', b"COPY 1\0"), IDLE]);
    assert!(talk.conversation.at_boundary());
    talk.client(&[(b'Q', b"copy t from stdin\0")]);
    talk.server(&[(b'G', b"\0\0\0")]);
    talk.client(&[(b'd', b"1\n"), (b'c', b"")]);
    talk.server(&[(b'C', b"COPY 1\0"), IDLE]);
    assert!(talk.conversation.at_boundary());
}

#[test]
fn a_query_in_an_unsynced_failed_batch_is_skipped_by_the_server() {
    let mut talk = Talk::new();
    talk.client(&[P, B, E, (b'Q', b"select 1\0")]);
    talk.server(&[ERROR]);
    talk.client(&[S]);
    talk.server(&[IDLE]);
    assert!(talk.conversation.at_boundary());
}

#[test]
fn session_effects_count_only_when_they_succeed() {
    let mut talk = Talk::new();
    talk.client(&[(b'Q', b"set work_mem = '1MB'\0")]);
    talk.server(&[ERROR, IDLE]);
    assert!(talk.conversation.pins.is_empty());
    talk.client(&[(b'Q', b"set work_mem = '1MB'\0")]);
    talk.server(&[(b'C', b"SET\0"), IDLE]);
    assert_eq!(talk.conversation.pins.len(), 1);
    assert!(talk.finished[1].state_changed);
    talk.client(&[(b'Q', b"discard all\0")]);
    talk.server(&[(b'C', b"DISCARD ALL\0"), IDLE]);
    assert!(talk.conversation.pins.is_empty());
}

#[test]
fn tags_of_a_multi_statement_query_belong_to_it() {
    let mut talk = Talk::new();
    talk.client(&[(b'Q', b"insert into t values (1); update t set a = 2\0")]);
    talk.server(&[(b'C', b"INSERT 0 1\0"), (b'C', b"UPDATE 1\0"), IDLE]);
    assert_eq!(talk.finished[0].cycle.executed[0].tags.len(), 2);
    assert!(talk.finished[0].cycle.wrote);
}

#[test]
fn whole_cycles_are_recognised() {
    let mut buffer = BytesMut::new();
    for (tag, body) in [(b'B', &b"\0s1\0\0\0\0\0\0\0"[..]), (b'D', b"P\0"), (b'E', b"\0\0\0\0\0"), (b'S', b"")] {
        crate::wire::put(&mut buffer, tag, |b| b.extend_from_slice(body));
    }
    for cut in 0..buffer.len() {
        assert_eq!(whole_cycle(&buffer[..cut], 1000), None, "incomplete");
    }
    match whole_cycle(&buffer, 1000) {
        Some(WholeCycle::Extended { len, parse: None, describe: true, limit: 0, bind }) => {
            assert_eq!((len, &bind.statement[..]), (buffer.len(), &b"s1"[..]));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(whole_cycle(&buffer, 10), None, "too long");
}

#[test]
fn queries_behind_a_failed_message_are_skipped_up_to_the_sync() {
    let query: (u8, &[u8]) = (b'Q', b"select 1\0");
    // sent before the error is known, and after it
    for early in [0, 1, 2, 3, 4] {
        let mut talk = Talk::new();
        let messages = [P, query, query, S];
        talk.client(&messages[..early.max(1)]);
        talk.server(&[ERROR]);
        talk.client(&messages[early.max(1)..]);
        assert!(!talk.conversation.at_boundary(), "the Sync's answer is owed");
        talk.server(&[IDLE]);
        assert!(talk.conversation.at_boundary(), "{early} messages before the error");
    }
    // the error of the Query itself ends it
    let mut talk = Talk::new();
    talk.client(&[P, query, query]);
    talk.server(&[(b'1', b""), ERROR, IDLE]);
    assert!(!talk.conversation.at_boundary());
    talk.server(&[DONE, IDLE]);
    assert!(talk.conversation.at_boundary());
}

#[test]
fn what_the_server_ignores_leaves_the_boundary() {
    let mut talk = Talk::new();
    talk.client(&[(b'Q', b"copy t from stdin\0")]);
    talk.server(&[(b'G', b"\0\0\0")]);
    talk.client(&[(b'd', b"x\n")]);
    talk.server(&[ERROR, IDLE]);
    talk.client(&[(b'd', b"y\n"), (b'c', b"")]);
    assert!(talk.conversation.at_boundary(), "CopyData behind the error");
    talk.client(&[(b'H', b"")]);
    assert!(talk.conversation.at_boundary(), "Flush with nothing to flush");
}

#[test]
fn a_statement_of_an_unknown_name_is_not_taken_for_the_portal_before_it() {
    let mut talk = Talk::new();
    talk.client(&[P, B, E, (b'B', b"\0sql_prepared\0\0\0\0\0\0\0"), E, S]);
    talk.server(&[(b'1', b""), (b'2', b""), DONE, (b'2', b""), (b'C', b"INSERT 0 1\0"), IDLE]);
    assert!(talk.finished[0].cycle.wrote && talk.finished[0].cycle.opaque);
}

#[test]
fn a_statement_prepared_again_behind_an_error_is_prepared_again_later() {
    let mut talk = Talk::new();
    talk.client(&[P, S]);
    talk.server(&[(b'1', b""), IDLE]);
    talk.conversation.generation += 1;
    talk.client(&[(b'P', b"\0nonsense\0\0\0")]);
    talk.server(&[ERROR]);
    assert_eq!(talk.client(&[B, E, S]), [true, false, false]);
    talk.server(&[IDLE]);
    assert_eq!(talk.client(&[B, E, S]), [true, false, false], "the server skipped it");
}

#[test]
fn a_statement_prepared_again_in_a_cycle_that_fails_is_there_for_the_next() {
    let mut talk = Talk::new();
    talk.client(&[P, S]);
    talk.server(&[(b'1', b""), IDLE]);
    talk.conversation.generation += 1;
    talk.client(&[(b'P', b"\0nonsense\0\0\0")]);
    assert_eq!(talk.client(&[B, E, S, B, E, S]), [true, false, false, true, false, false], "the first may be skipped");
    assert_eq!(talk.server(&[ERROR, IDLE, (b'3', b""), (b'1', b""), (b'2', b""), DONE, IDLE]), "EZ2CZ");
    assert_eq!(talk.client(&[B, E, S]), [false, false, false]);
}

#[test]
fn large_messages_are_known_by_their_names() {
    let mut talk = Talk::new();
    talk.client(&[P, S]);
    talk.server(&[(b'1', b""), IDLE]);
    talk.conversation.generation += 1;
    assert!(talk.conversation.large_message(b'B', 300_000, b"\0s1\0\0\0").before.is_some(), "prepared on the new server first");
    talk.client(&[E, S]);
    assert_eq!(talk.server(&[(b'1', b""), (b'2', b""), DONE, IDLE]), "2CZ");
    talk.client(&[(b'C', b"Ss1\0")]);
    assert!(talk.conversation.large_message(b'P', 300_000, b"s1\0select").before.is_none());
    talk.client(&[S]);
    talk.server(&[(b'3', b""), (b'1', b""), IDLE]);
    assert!(talk.conversation.statement(b"s1").is_none(), "what it is now is not known");
}

#[test]
fn answers_are_owed_only_while_the_server_can_give_them() {
    let mut talk = Talk::new();
    talk.client(&[P]);
    assert!(!talk.conversation.owes_answers(), "no Sync");
    talk.client(&[B, E, S]);
    assert!(talk.conversation.owes_answers());
    talk.server(&[(b'1', b""), (b'2', b""), DONE, IDLE]);
    assert!(!talk.conversation.owes_answers());
    talk.client(&[(b'Q', b"copy t from stdin\0")]);
    assert!(talk.conversation.owes_answers());
    talk.server(&[(b'G', b"\0\0\0")]);
    assert!(!talk.conversation.owes_answers(), "it waits for data that cannot come any more");
    talk.client(&[(b'c', b"")]);
    assert!(talk.conversation.owes_answers());
}

#[test]
fn settings_with_a_dot_are_asked_for_by_name() {
    let mut talk = Talk::new();
    assert_eq!(talk.conversation.custom_settings(), "");
    talk.client(&[(b'Q', b"set app.tenant = '4.2'\0"), (b'Q', b"select set_config('my.\\user', 'x', false)\0")]);
    talk.client(&[(b'P', b"\0select set_config($1, $2, false)\0\0\0"), (b'B', b"\0\0\0\0\0\x02\0\0\0\x07app.who\0\0\0\x011\0\0"), E, S]);
    let text = talk.conversation.custom_settings();
    assert_eq!(
        text,
        "SELECT 'app.tenant', pg_catalog.current_setting('app.tenant', true) UNION ALL \
         SELECT 'app.who', pg_catalog.current_setting('app.who', true)"
    );
}

#[test]
fn a_prepared_statement_is_judged_by_the_facts_of_today() {
    let mut talk = Talk::new();
    talk.client(&[P, S]);
    talk.server(&[(b'1', b""), IDLE]);
    let facts = talk.conversation.statement(b"s1").unwrap().facts;
    talk.classifier.replace_facts(CatalogFacts::builtin_only());
    talk.client(&[B, E, S]);
    talk.server(&[(b'2', b""), DONE, IDLE]);
    assert_eq!(talk.conversation.statement(b"s1").unwrap().facts, facts + 1);
}

#[test]
fn a_lock_taken_before_an_error_pins() {
    let mut talk = Talk::new();
    talk.client(&[(b'Q', b"select pg_advisory_lock(1), 1/0\0")]);
    talk.server(&[ERROR, IDLE]);
    assert_eq!(talk.conversation.pins.len(), 1);
}

proptest! {
    /// No sequence of messages of either side makes the bookkeeping panic, and a boundary has nothing outstanding.
    #[test]
    fn any_conversation_is_survived(messages in proptest::collection::vec((any::<bool>(), any::<u8>(), proptest::collection::vec(any::<u8>(), 0..24)), 0..60)) {
        let mut talk = Talk::new();
        let tags = b"QPBDECHSFcdfX123CZEGTDIsSnt";
        for (client, tag, body) in messages {
            let tag = tags[tag as usize % tags.len()];
            if client {
                talk.client(&[(tag, &body)]);
            } else {
                talk.server(&[(tag, &body)]);
            }
        }
        let _ = talk.conversation.at_boundary();
    }
}
