//! What people decide about proposals, on real servers with a running feed: owner 15, follower 18.

#[path = "support/feed_play.rs"]
mod play;
#[path = "support/feed_servers.rs"]
mod servers;

use play::{catch_up, eventually, spec, start, streaming};
use servers::Server;
use understudy::{
    cdc::Start,
    metadata::{Proposal, ProposalState, Repository},
};

fn open(repository: &Repository) -> Vec<Proposal> {
    let open = |proposal: &Proposal| matches!(proposal.state, ProposalState::Pending | ProposalState::Failed);
    repository.proposals(None).unwrap().into_iter().filter(open).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_persons_sql_is_tried_first_and_half_of_it_never_stays() {
    let (source, shadow) = (Server::start(15, ""), Server::start(18, ""));
    let (owner, follower) = (source.create("decide").await, shadow.create("decide").await);
    owner
        .batch_execute(
            "CREATE TABLE a (id int PRIMARY KEY, v text, d date); CREATE TABLE b (id int PRIMARY KEY, n bigint);
             INSERT INTO a VALUES (1, 'x', '2026-03-04'); INSERT INTO b VALUES (1, 5)",
        )
        .await
        .unwrap();
    let repository = Repository::in_memory().unwrap();
    let feed = start(&spec(&source, &shadow, "decide"), Start::Copy, &repository);
    streaming(&feed).await;

    follower.batch_execute("ALTER TABLE a DROP COLUMN v").await.unwrap();
    owner.batch_execute("INSERT INTO a VALUES (2, 'y', '2026-05-06')").await.unwrap();
    eventually("the table set aside", async || feed.state().held_tables == ["public.a"]).await;
    let waiting = open(&repository).remove(0);
    let columns = async || {
        let query = "SELECT string_agg(attname, ',' ORDER BY attname) FROM pg_attribute WHERE attrelid = 'a'::regclass AND attnum > 0 AND NOT attisdropped";
        follower.query_one(query, &[]).await.unwrap().get::<_, String>(0)
    };
    for (sql, reason) in [
        ("ALTER TABLE a ADD COLUMN v text; ALTER TABLE a ADD COLUMN v text", "trial"),
        ("ALTER TABLE a ADD COLUMN v text; COMMIT; SELECT 1", "leave BEGIN, COMMIT and ROLLBACK out"),
        ("ALTER TABEL a ADD COLUMN v text", "not SQL"),
        (" ", "no statement"),
        ("CREATE INDEX CONCURRENTLY i ON a (d)", "by hand"),
        // It works, and what was kept still does not fit.
        ("ALTER TABLE a ADD COLUMN w text", "still do not fit"),
    ] {
        let error = feed.approve(&waiting, Some(sql), "anna").await.unwrap_err().to_string();
        assert!(error.contains(reason), "{sql}: {error}");
        assert_eq!(columns().await, "d,id", "{sql}");
        assert_eq!((feed.state().held_tables, open(&repository).len()), (vec!["public.a".to_owned()], 1), "{sql}");
    }
    // Rejected, the rows go on being kept; a person may change their mind.
    feed.reject(&waiting, "anna").await.unwrap();
    owner.batch_execute("INSERT INTO a VALUES (3, 'z', '2026-07-08')").await.unwrap();
    catch_up(&feed, &owner).await;
    let rejected = repository.proposal(waiting.id).unwrap();
    assert_eq!((rejected.state, rejected.decided_by.as_str()), (ProposalState::Rejected, "anna"));
    assert!(rejected.decided_ms >= rejected.at_ms && !rejected.draft.if_rejected.is_empty());
    // A setting among the statements ends with them: the feed's own sessions read values as before.
    feed.approve(&waiting, Some("SET datestyle = 'German'; SET search_path TO nowhere; ALTER TABLE public.a ADD COLUMN v text"), "bert")
        .await
        .unwrap();
    assert_eq!(repository.proposal(waiting.id).unwrap().decided_by, "bert");
    // The rows that were there before lost their values by hand; the owner writes them again.
    owner.batch_execute("UPDATE a SET v = v || '!'; INSERT INTO a VALUES (4, 'u', '2026-02-03')").await.unwrap();
    catch_up(&feed, &owner).await;
    let rows = "SELECT string_agg(concat_ws(' ', id, v, d), ', ' ORDER BY id) FROM a";
    let (ours, theirs) = (owner.query_one(rows, &[]).await.unwrap(), follower.query_one(rows, &[]).await.unwrap());
    assert_eq!(ours.get::<_, String>(0), theirs.get::<_, String>(0));
    let again = feed.approve(&waiting, None, "carl").await.unwrap_err().to_string();
    assert!(again.contains("already approved"), "{again}");

    // Overtaken by a later change of the same column.
    owner.batch_execute("ALTER TABLE b ALTER COLUMN n TYPE integer").await.unwrap();
    eventually("the first question", async || open(&repository).iter().any(|one| one.draft.kind == "alter_type")).await;
    let first = open(&repository).remove(0);
    owner.batch_execute("ALTER TABLE b ALTER COLUMN n TYPE smallint").await.unwrap();
    eventually("the second question", async || open(&repository).iter().any(|one| one.id > first.id)).await;
    let refused = feed.approve(&first, None, "anna").await.unwrap_err().to_string();
    let second = open(&repository).remove(0);
    assert!(refused.contains("superseded: the owner changed the column again"), "{refused}");
    feed.approve(&second, None, "anna").await.unwrap();
    owner.batch_execute("INSERT INTO b VALUES (2, 32000)").await.unwrap();
    catch_up(&feed, &owner).await;
    let kind = follower.query_one("SELECT pg_typeof(n)::text FROM b LIMIT 1", &[]).await.unwrap();
    assert_eq!(kind.get::<_, &str>(0), "smallint");
    assert!(open(&repository).is_empty(), "{:?}", open(&repository));
    feed.stop().await;
}

/// A build that failed and was forgotten: meanwhile the owner has dropped the index.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_index_that_the_owner_no_longer_has_is_not_built() {
    let (source, shadow) = (Server::start(15, ""), Server::start(18, ""));
    let (owner, follower) = (source.create("stale").await, shadow.create("stale").await);
    owner.batch_execute("CREATE TABLE a (id int PRIMARY KEY, n int); INSERT INTO a VALUES (1, 1)").await.unwrap();
    let repository = Repository::in_memory().unwrap();
    let feed = start(&spec(&source, &shadow, "stale"), Start::Copy, &repository);
    streaming(&feed).await;
    follower.batch_execute("INSERT INTO a VALUES (1000, 7), (1001, 7)").await.unwrap();
    owner.batch_execute("CREATE UNIQUE INDEX gone ON a (n); CREATE UNIQUE INDEX kept ON a (n)").await.unwrap();
    let failed = async || open(&repository).iter().filter(|one| one.state == ProposalState::Failed).count() == 2;
    eventually("both builds failed", failed).await;
    owner.batch_execute("DROP INDEX gone").await.unwrap();
    catch_up(&feed, &owner).await;
    follower.batch_execute("DELETE FROM a WHERE id >= 1000").await.unwrap();

    for one in open(&repository) {
        let answer = feed.approve(&one, None, "anna").await;
        if one.draft.change.contains("gone") {
            let refused = answer.unwrap_err().to_string();
            assert!(refused.contains("the owner dropped or renamed it meanwhile"), "{refused}");
            assert_eq!(repository.proposal(one.id).unwrap().state, ProposalState::Superseded);
        } else {
            answer.unwrap();
        }
    }
    let indexes = "SELECT string_agg(indexrelid::regclass::text, ' ' ORDER BY 1) FROM pg_index WHERE indrelid = 'a'::regclass";
    assert_eq!(follower.query_one(indexes, &[]).await.unwrap().get::<_, &str>(0), "a_pkey kept");
    feed.stop().await;
}
