//! The migrations of real projects, played on an owner (15) under load, with a shadow (18) that follows: one that began equal, and one that began
//! with an older schema under a mapping. Replication never stops, every change is applied, proposed or asked, and nothing is lost.
//!
//! `make histories` (or `UNDERSTUDY_HISTORIES=<folder with events.csv and projects.csv>`) plays all permissively licensed projects of a folder;
//! `UNDERSTUDY_SEED` plays a run again.

#[path = "schema_histories/history.rs"]
mod history;
#[path = "support/feed_play.rs"]
mod play;
#[path = "support/feed_servers.rs"]
mod servers;

use history::{History, Table, projects, quote};
use play::{catch_up, seed, streaming};
use servers::Server;
use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio_postgres::Client;
use understudy::{
    cdc::{Fault, Feed, FeedSpec, Start},
    config::MapRule,
    metadata::{ProposalState, Repository, Severity},
    schema::{
        Adapter,
        mapping::{Rules, SharedRules},
    },
    validate,
};

const EVENTS: &str = include_str!("schema_histories/events.csv");

/// What a play did.
#[derive(Debug, Default)]
struct Tally {
    migrations: usize,
    statements: usize,
    refused_by_owner: usize,
    writes: usize,
    by_policy: usize,
    by_person: usize,
    asked: usize,
}

/// One migration in one transaction; each event by the first alternative that the owner takes.
async fn migrate(owner: &Client, events: Vec<Vec<String>>, tally: &mut Tally) {
    // A label that is added in a transaction cannot be used in it.
    let (alone, together): (Vec<_>, Vec<_>) = events.into_iter().partition(|one| one[0].starts_with("ALTER TYPE"));
    for event in alone {
        tally.statements += 1;
        tally.refused_by_owner += usize::from(owner.batch_execute(&event[0]).await.is_err());
    }
    owner.batch_execute("BEGIN").await.unwrap();
    for event in together {
        tally.statements += 1;
        let mut taken = false;
        for alternative in &event {
            owner.batch_execute("SAVEPOINT one").await.unwrap();
            taken = owner.batch_execute(alternative).await.is_ok();
            owner.batch_execute(if taken { "RELEASE one" } else { "ROLLBACK TO one" }).await.unwrap();
            if taken {
                break;
            }
        }
        if !taken && std::env::var_os("UNDERSTUDY_SHOW").is_some() {
            println!("refused by the owner: {event:?}");
        }
        tally.refused_by_owner += usize::from(!taken);
    }
    owner.batch_execute("COMMIT").await.unwrap();
    tally.migrations += 1;
}

async fn write(owner: &Client, history: &mut History, count: usize, tally: &mut Tally) {
    for statement in history.writes(count) {
        tally.writes += usize::from(owner.batch_execute(&statement).await.is_ok());
    }
}

/// Says yes to everything that has statements, and to what holds rows; the rest stays asked.
async fn decide(feed: &Feed, repository: &Repository, tally: &mut Tally) {
    for _ in 0..4 {
        for proposal in repository.proposals(None).unwrap() {
            let open = matches!(proposal.state, ProposalState::Pending | ProposalState::Failed);
            if open
                && (!proposal.draft.sql.is_empty() || proposal.draft.holds_table)
                && feed.approve(&proposal, None, "a person").await.is_ok()
            {
                tally.by_person += 1;
            }
        }
    }
}

struct Pair {
    source: Server,
    shadow: Server,
}

impl Pair {
    async fn play(&self, number: usize, events: &str, project: &str, seed: u64, older: bool) -> Tally {
        let database = format!("h{number}");
        let (owner, follower) = (self.source.create(&database).await, self.shadow.create(&database).await);
        owner.batch_execute("CREATE TABLE ticker (id bigint PRIMARY KEY, n bigint)").await.unwrap();
        let mut history = History::new(events, project, seed);
        let mut tally = Tally::default();
        let first = history.len() / 4;
        while history.at < first {
            let events = history.next().unwrap();
            migrate(&owner, events, &mut tally).await;
            write(&owner, &mut history, 4, &mut tally).await;
        }
        let rules: SharedRules = SharedRules::default();
        if older {
            // The shadow stays with what was; the source goes on; the map says what became of it.
            copy_schema(&owner, &follower, &history.tables).await;
            history.fork();
            while history.at < history.len() / 2 {
                let events = history.next().unwrap();
                migrate(&owner, events, &mut tally).await;
                write(&owner, &mut history, 2, &mut tally).await;
            }
            rules.store(Arc::new(Rules::new(true, &map(&owner, &follower, &history.tables).await)));
        }
        let repository = Repository::in_memory().unwrap();
        let spec = FeedSpec { rules: rules.clone(), ..play::spec(&self.source, &self.shadow, &database) };
        let adapter =
            Adapter::new(spec.database.clone(), spec.shadow.clone(), repository.clone(), Arc::new(arc_swap::ArcSwap::from_pointee(0.95)));
        let adapter = Arc::new(adapter.mapped(rules.clone(), false));
        let feed = Feed::start(spec.clone(), Start::Copy, adapter.clone(), repository.clone(), Fault::default());
        streaming(&feed).await;
        let stop = Arc::new(AtomicBool::new(false));
        let ticking = tokio::spawn(tick(self.source.client(&database).await, stop.clone()));
        while let Some(events) = history.next() {
            migrate(&owner, events, &mut tally).await;
            write(&owner, &mut history, 4, &mut tally).await;
            if history.at.is_multiple_of(8) {
                catch_up(&feed, &owner).await;
                decide(&feed, &repository, &mut tally).await;
            }
        }
        stop.store(true, Ordering::Relaxed);
        let ticks = ticking.await.unwrap();
        catch_up(&feed, &owner).await;
        decide(&feed, &repository, &mut tally).await;
        play::eventually("every table is back in the stream", async || {
            decide(&feed, &repository, &mut Tally::default()).await;
            feed.state().held_tables.is_empty() || older
        })
        .await;
        catch_up(&feed, &owner).await;
        let case = format!("{project} (seed {seed}, older {older})");
        assert!(feed.is_streaming(), "{case}: {:?}", feed.state());
        for event in repository.events(0, 100_000, false).unwrap() {
            assert!(!event.message.contains("the feed stopped") && !event.message.contains("cannot go on"), "{case}: {event:?}");
            assert!(event.severity != Severity::Alert || !event.message.contains("could not be understood"), "{case}: {event:?}");
        }
        assert_eq!(feed.state().findings, 0, "{case}: {:?}", feed.state().finding_examples);
        let held = feed.state().held_tables;
        let options = validate::Options { rules: rules.load_full(), ..validate::Options::default() };
        let report =
            validate::verify::<validate::NoFollower>(&spec.from, &spec.to, None, &options, &validate::Progress::default()).await.unwrap();
        for table in &report.tables {
            let name = format!("{}.{}", table.schema, table.name);
            if held.contains(&name) {
                continue;
            }
            let proposals: Vec<_> = repository.proposals(None).unwrap().into_iter().filter(|one| one.draft.object == name).collect();
            assert_eq!(table.differences, 0, "{case}: {table:?}\n{proposals:#?}");
        }
        let count = follower.query_one("SELECT count(*) FROM ticker", &[]).await.unwrap().get::<_, i64>(0);
        assert_eq!(count as u64, ticks, "{case}");
        for proposal in repository.proposals(None).unwrap() {
            match proposal.state {
                ProposalState::AutoApplied => tally.by_policy += 1,
                ProposalState::Pending => tally.asked += 1,
                ProposalState::Approved | ProposalState::Superseded | ProposalState::Rejected => {}
                ProposalState::Failed => {
                    assert!(!proposal.note.is_empty(), "{case}: {proposal:?}");
                    tally.asked += 1;
                }
            }
        }
        println!("{case}: {tally:?}, {ticks} ticks, held at the end: {held:?}");
        feed.stop().await;
        understudy::cdc::disarm(&spec).await.unwrap();
        tally
    }
}

/// A load beside the migrations.
async fn tick(client: Client, stop: Arc<AtomicBool>) -> u64 {
    let mut n = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        n += 1;
        client.execute("INSERT INTO ticker VALUES ($1, 0)", &[&(n as i64)]).await.unwrap();
        client.execute("UPDATE ticker SET n = n + 1 WHERE id = $1", &[&(n as i64 / 2)]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    n
}

/// The tables as they are, without rows, made on the other side from the owner's catalog.
async fn copy_schema(owner: &Client, follower: &Client, tables: &BTreeMap<String, Table>) {
    let enums = owner
        .query(
            "SELECT format('CREATE TYPE %I AS ENUM (%s)', t.typname, string_agg(quote_literal(e.enumlabel), ', ' ORDER BY e.enumsortorder))
             FROM pg_type t JOIN pg_enum e ON e.enumtypid = t.oid GROUP BY t.oid, t.typname",
            &[],
        )
        .await
        .unwrap();
    for row in &enums {
        follower.batch_execute(row.get(0)).await.unwrap();
    }
    follower.batch_execute("CREATE TABLE ticker (id bigint PRIMARY KEY, n bigint)").await.unwrap();
    for table in tables.values() {
        let row = owner
            .query_one(
                "SELECT string_agg(format('%I %s', a.attname, format_type(a.atttypid, a.atttypmod)), ', ' ORDER BY a.attnum),
                        (SELECT pg_get_constraintdef(k.oid) FROM pg_constraint k WHERE k.conrelid = $1::text::regclass AND k.contype = 'p')
                 FROM pg_attribute a WHERE a.attrelid = $1::text::regclass AND a.attnum > 0 AND NOT a.attisdropped",
                &[&quote(&table.name)],
            )
            .await
            .unwrap();
        let (columns, key): (String, Option<String>) = (row.get(0), row.get(1));
        let key = key.map(|key| format!(", {key}")).unwrap_or_default();
        follower.batch_execute(&format!("CREATE TABLE {} ({columns}{key})", quote(&table.name))).await.unwrap();
    }
}

/// What became of the tables that the shadow has, written as rules.
async fn map(owner: &Client, follower: &Client, tables: &BTreeMap<String, Table>) -> Vec<MapRule> {
    let mut rules = Vec::new();
    for table in tables.values() {
        let mut rule = MapRule { source: format!("public.{}", table.name), ..MapRule::default() };
        let key = "SELECT a.attname::text FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)
             WHERE i.indrelid = $1::text::regclass AND i.indisprimary";
        let key = owner.query(key, &[&quote(&table.name)]).await.unwrap();
        let unborn =
            |row: &tokio_postgres::Row| table.columns.iter().any(|column| column.name == row.get::<_, &str>(0) && column.born.is_empty());
        // Without its key a row could not be found again: the engine would refuse such a map.
        if table.born.is_empty() || key.iter().any(unborn) {
            rule.left_out = true;
        } else {
            rule.shadow = format!("public.{}", table.born);
            for column in columns_of(owner, &table.name).await {
                let known = table.columns.iter().find(|known| known.name == column);
                rule.columns.insert(column, known.map(|known| known.born.clone()).unwrap_or_default());
            }
            let there = columns_of(follower, &table.born).await;
            rule.columns.retain(|ours, theirs| ours != theirs && (theirs.is_empty() || there.contains(theirs)));
        }
        rules.push(rule);
    }
    rules
}

async fn columns_of(client: &Client, table: &str) -> Vec<String> {
    let query = "SELECT attname::text FROM pg_attribute WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped";
    client.query(query, &[&quote(table)]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn histories_of_real_projects() {
    let seed = seed("histories_of_real_projects");
    let pair = Pair { source: Server::start(15, "max_connections = 100"), shadow: Server::start(18, "max_connections = 100") };
    let folder = std::env::var("UNDERSTUDY_HISTORIES").ok();
    let events = folder.as_ref().map_or(EVENTS.to_owned(), |folder| std::fs::read_to_string(format!("{folder}/events.csv")).unwrap());
    let permissive = folder.as_ref().map(|folder| std::fs::read_to_string(format!("{folder}/projects.csv")).unwrap());
    let wanted = |project: &String| {
        let line = permissive.as_ref().map(|text| text.lines().find(|line| line.starts_with(&format!("{project},"))).unwrap_or_default());
        line.is_none_or(|line| line.contains(",permissive,"))
    };
    let mut all = Tally::default();
    for (number, project) in projects(&events).into_iter().filter(wanted).enumerate() {
        for older in [false, true] {
            let tally = pair.play(number * 2 + usize::from(older), &events, &project, seed.wrapping_add(number as u64), older).await;
            all.migrations += tally.migrations;
            all.statements += tally.statements;
            all.refused_by_owner += tally.refused_by_owner;
            all.writes += tally.writes;
            all.by_policy += tally.by_policy;
            all.by_person += tally.by_person;
            all.asked += tally.asked;
        }
    }
    println!("{all:?}");
    assert!(all.migrations > 250 && all.by_policy > 100 && all.writes > 500, "{all:?}");
    // The facts do not say everything that a migration needs; a generator that plays only half of them shows nothing.
    assert!(all.refused_by_owner * 8 < all.statements, "{all:?}");
}
