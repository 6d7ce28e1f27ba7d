//! Promises 3, 5, 7 and 8: one writer, nothing lost or repeated, and a cutover that finishes or undoes itself, whatever dies when.
//! One source (15), one shadow (18) and the real program, which is killed and started again all the time.

#[path = "cutover/stage.rs"]
mod stage;
mod support;
#[path = "cutover/writers.rs"]
mod writers;

use stage::{Stage, fenced, leftovers, numbers};
use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};
use support::Shutdown;
use understudy::cutover::step::Step;
use writers::Writers;

/// Exactly one side takes writes, and it has everything.
async fn one_owner(stage: &Stage, writers: &Writers, case: &str, owner: &str, was_cut_over: bool) {
    assert_eq!(stage.owner().await, owner, "{case}\n{}", stage.log());
    stage.wait_streaming().await;
    writers.more(stage, 10).await;
    assert!(!fenced(stage.server(owner)).await, "{case}: the owner {owner} is read-only");
    assert_eq!(fenced(stage.other(owner)).await, was_cut_over, "{case}: the fence of the side that is not the owner");
    writers.check(&stage.server(owner).connect("shop").await.unwrap(), case).await;
    stage.verify(case).await;
}

/// Runs a switch that dies at a step, starts again, and returns the owner.
async fn crash(stage: &Stage, writers: &Writers, command: &str, step: Step) -> stage::Proxy {
    let proxy = stage.start(Some(&format!("crash-at:{}", step.name()))).await;
    stage.wait_streaming().await;
    writers.more(stage, 5).await;
    let answer = stage.tell(command).await;
    assert!(answer.is_err(), "{command} should have died at {}: {answer:?}\n{}", step.name(), stage.log());
    stage.wait_for_death(proxy).await;
    stage.start(None).await
}

/// Crashes of rollbacks, spread over the cases that leave the shadow in charge.
const ROLLBACKS: [&[Step]; 7] = [
    &[Step::Hold, Step::Flip],
    &[Step::Marker, Step::Release],
    &[Step::Expel],
    &[Step::OppositeMarker, Step::Prove],
    &[Step::StopFeed],
    &[Step::StartOppositeFeed],
    &[Step::Fence, Step::Done],
];

async fn a_crash_at_every_step(stage: &Stage, writers: &Writers) {
    let mut rollbacks = ROLLBACKS.iter();
    let mut was_cut_over = false;
    for step in Step::ALL {
        let case = format!("crash of the cutover at: {}", step.name());
        let began = Instant::now();
        let mut proxy = crash(stage, writers, "CUTOVER pg18", step).await;
        let owner = if step.is_past_the_point_of_no_return() { "pg18" } else { "source" };
        was_cut_over |= owner == "pg18";
        one_owner(stage, writers, &case, owner, was_cut_over).await;
        println!("{case}: {:.1} s", began.elapsed().as_secs_f64());
        for step in rollbacks.next_if(owner == "pg18") {
            let case = format!("crash of the rollback at: {}", step.name());
            let began = Instant::now();
            proxy.kill();
            proxy = crash(stage, writers, "ROLLBACK shop", *step).await;
            let owner = if step.is_past_the_point_of_no_return() { "source" } else { "pg18" };
            one_owner(stage, writers, &case, owner, true).await;
            println!("{case}: {:.1} s", began.elapsed().as_secs_f64());
        }
        proxy.kill();
    }
}

trait NextIf<'a> {
    fn next_if(&mut self, wanted: bool) -> &'a [Step];
}

impl<'a> NextIf<'a> for std::slice::Iter<'a, &'static [Step]> {
    fn next_if(&mut self, wanted: bool) -> &'a [Step] {
        if wanted { self.next().copied().unwrap_or_default() } else { &[] }
    }
}

/// A transaction that does not end: the cutover gives up, says which one it was, and leaves nothing behind.
async fn an_open_transaction(stage: &Stage, writers: &Writers) {
    let before = leftovers(&stage.shadow).await;
    let client = stage.client().await;
    client.batch_execute("BEGIN; INSERT INTO aside VALUES (1)").await.unwrap();
    let refused = stage.tell("CUTOVER pg18").await.unwrap_err();
    assert!(refused.contains("hold") && refused.contains("1 transactions") && refused.contains("application \"test\""), "{refused}");
    assert_eq!(leftovers(&stage.shadow).await, before, "left behind on the shadow");
    writers.more(stage, 20).await;
    client.batch_execute("INSERT INTO aside VALUES (2); COMMIT").await.unwrap();
    one_owner(stage, writers, "after an open transaction", "source", true).await;
    stage.must("CUTOVER pg18").await;
    one_owner(stage, writers, "after the transaction has ended", "pg18", true).await;
    assert_eq!(numbers(&client, "SELECT count(*) FROM aside WHERE id IN (1, 2)").await, [2]);
    stage.must("ROLLBACK shop").await;
    one_owner(stage, writers, "and back", "source", true).await;
}

/// The shadow stops answering: before the cutover begins, and while clients wait.
async fn a_shadow_that_hangs(stage: &Stage, writers: &Writers) {
    stage.shadow.pause().unwrap();
    let refused = stage.tell("CUTOVER pg18").await.unwrap_err();
    assert!(refused.contains("pg18"), "{refused}");
    writers.more(stage, 20).await;
    stage.shadow.resume().unwrap();
    one_owner(stage, writers, "after a shadow that hung before", "source", true).await;

    let client = stage.client().await;
    client.batch_execute("BEGIN; INSERT INTO aside VALUES (3)").await.unwrap();
    let (cutover, hang) = tokio::join!(stage.tell("CUTOVER pg18"), async {
        stage.wait_cutover("running: hold").await;
        stage.shadow.pause().unwrap();
        client.batch_execute("COMMIT").await.unwrap();
        let began = Instant::now();
        stage.wait_cutover("running: marker applied").await;
        // clients wait, and then they go on while the shadow still hangs
        writers.more(stage, 20).await;
        stage.shadow.resume().unwrap();
        began.elapsed()
    });
    let refused = cutover.unwrap_err();
    assert!(refused.contains("marker") && refused.contains("source still owns"), "{refused}");
    assert!(hang < Duration::from_secs(9), "clients waited {hang:?}");
    one_owner(stage, writers, "after a shadow that hung during the hold", "source", true).await;
}

/// Reads were served by a former owner, which is fenced: its connections must not become those that write.
async fn a_session_that_reads_from_a_former_owner(stage: &Stage, writers: &Writers) {
    let client = stage::connect(stage.url("app", "shop").application_name("reader").clone()).await.unwrap();
    stage.must("SET pg18 serve_reads = 100").await;
    let deadline = Instant::now() + Duration::from_secs(10);
    let shadow = stage.shadow.connect("shop").await.unwrap();
    let attached = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'reader'";
    while numbers(&shadow, attached).await == [0] {
        client.simple_query("SELECT count(*) FROM aside").await.unwrap();
        assert!(Instant::now() < deadline, "no read is served: {:?}", stage.must("SHOW SHADOWS").await);
    }
    for _ in 0..20 {
        client.simple_query("SELECT count(*) FROM aside").await.unwrap();
    }
    stage.must("CUTOVER pg18").await;
    client.batch_execute("INSERT INTO aside VALUES (4)").await.unwrap();
    one_owner(stage, writers, "after served reads", "pg18", true).await;
    stage.must("ROLLBACK shop").await;
    client.batch_execute("INSERT INTO aside VALUES (5)").await.unwrap();
    one_owner(stage, writers, "after served reads, and back", "source", true).await;
}

/// Somebody goes around the proxy.
async fn a_writer_that_goes_around(stage: &Stage, writers: &Writers) {
    let stop = Arc::new(AtomicBool::new(false));
    let config = {
        let mut config = stage.source.app_url("shop").to_tokio("direct");
        config.application_name("direct");
        config
    };
    let (seen, around) = (stop.clone(), config.clone());
    let direct = tokio::spawn(async move {
        let (mut acknowledged, mut refusals, mut client) = (Vec::new(), BTreeSet::new(), None);
        for id in 1_000.. {
            if seen.load(Ordering::SeqCst) {
                break;
            }
            if client.is_none() {
                client = stage::connect(around.clone()).await.ok();
            }
            let Some(connected) = &client else { continue };
            let connected: &tokio_postgres::Client = connected;
            match connected.execute("INSERT INTO aside VALUES ($1)", &[&i64::from(id)]).await {
                Ok(_) => acknowledged.push(i64::from(id)),
                Err(error) => {
                    refusals.insert(error.code().map_or("lost".to_owned(), |code| code.code().to_owned()));
                    client = None;
                }
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        (acknowledged, refusals)
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    // a busy writer may keep the lock from us for its two seconds: then the operator tries again
    let mut attempts = 0;
    while let Err(error) = stage.tell("CUTOVER pg18").await {
        attempts += 1;
        assert!(attempts < 3, "{error}\n{}", stage.log());
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    stop.store(true, Ordering::SeqCst);
    let (acknowledged, refusals) = direct.await.unwrap();
    let owner = stage.shadow.connect("shop").await.unwrap();
    let there: BTreeSet<i64> = numbers(&owner, "SELECT id FROM aside").await.into_iter().collect();
    let missing: Vec<_> = acknowledged.iter().filter(|id| !there.contains(id)).collect();
    assert!(acknowledged.len() > 20 && missing.is_empty(), "{missing:?} of {} are not on the new owner", acknowledged.len());
    assert!(refusals.contains("25006"), "the old owner should refuse to write: {refusals:?}");
    one_owner(stage, writers, "after a writer that went around", "pg18", true).await;
    // whoever switches the fence off for himself is told of, and VERIFY finds what he wrote
    let stubborn = stage::connect(config).await.unwrap();
    stubborn.batch_execute("SET default_transaction_read_only = off").await.unwrap();
    stubborn.batch_execute("BEGIN; INSERT INTO aside VALUES (-1000000)").await.unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while !stage.must("SHOW ALERTS").await.iter().any(|row| row["message"].contains("around understudy and its fence")) {
        assert!(Instant::now() < deadline, "no alert about a writer that goes around the fence");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    stubborn.batch_execute("COMMIT").await.unwrap();
    let found = stage.tell("VERIFY pg18").await.unwrap_err();
    assert!(found.contains("1 differences") && found.contains("aside"), "{found}");
    stubborn.batch_execute("DELETE FROM aside WHERE id = -1000000").await.unwrap();
    stage.must("ROLLBACK shop").await;
    one_owner(stage, writers, "after a writer that went around, and back", "source", true).await;
}

/// The process dies behind the point of no return, and its locks on the old owner with it: what a session from before writes
/// there until the next start is carried over, told of, and the session is ended.
async fn a_write_between_crash_and_recovery(stage: &Stage, writers: &Writers) {
    let around = stage::connect(stage.source.app_url("shop").to_tokio("x").application_name("direct").clone()).await.unwrap();
    let proxy = stage.start(Some("crash-at:expel")).await;
    stage.wait_streaming().await;
    stage.tell("CUTOVER pg18").await.unwrap_err();
    stage.wait_for_death(proxy).await;
    around.batch_execute("INSERT INTO aside VALUES (-2000000)").await.unwrap();
    let proxy = stage.start(None).await;
    stage.wait_streaming().await;
    assert_eq!(stage.owner().await, "pg18");
    assert!(around.batch_execute("INSERT INTO aside VALUES (-2000001)").await.is_err(), "the session should have been ended");
    let owner = stage.shadow.connect("shop").await.unwrap();
    assert_eq!(numbers(&owner, "SELECT id FROM aside WHERE id <= -2000000").await, [-2_000_000]);
    assert!(stage.must("SHOW ALERTS").await.iter().any(|row| row["message"].contains("behind the cutover's marker")));
    writers.more(stage, 10).await;
    writers.check(&owner, "after a write between crash and recovery").await;
    stage.must("VERIFY pg18").await;
    stage.must("ROLLBACK shop").await;
    one_owner(stage, writers, "after a write between crash and recovery, and back", "source", true).await;
    proxy.kill();
}

/// Promise 5: kill anything at any time.
async fn kills_under_load(stage: &Stage, writers: &Writers, mut proxy: stage::Proxy, random: &mut fastrand::Rng) -> stage::Proxy {
    for round in 0..3 {
        tokio::time::sleep(Duration::from_millis(random.u64(10..700))).await;
        proxy.kill();
        proxy = stage.start(None).await;
        writers.more(stage, 5).await;
        println!("killed the proxy, round {round}");
    }
    let (_, errors) = writers.trouble();
    stage.shadow.kill9().unwrap();
    writers.more(stage, 20).await;
    stage.shadow.restart().unwrap();
    tokio::time::sleep(Duration::from_millis(random.u64(10..300))).await;
    stage.shadow.stop(Shutdown::Immediate).unwrap();
    stage.shadow.restart().unwrap();
    one_owner(stage, writers, "after kills under load", "source", true).await;
    assert_eq!(writers.trouble().1, errors, "a dying shadow hurt clients");
    // and at any moment of a switch
    for round in 0..4 {
        let command = if stage.owner().await == "source" { "CUTOVER pg18" } else { "ROLLBACK shop" };
        let delay = Duration::from_millis(random.u64(0..250));
        let switch = tokio::join!(stage.tell(command), async {
            tokio::time::sleep(delay).await;
            proxy.kill();
        });
        proxy = stage.start(None).await;
        let (case, owner) = (format!("{command} killed after {delay:?}, round {round}: {:?}", switch.0.is_ok()), stage.owner().await);
        println!("{case}: {owner}");
        one_owner(stage, writers, &case, &owner, true).await;
    }
    if stage.owner().await != "source" {
        stage.must("ROLLBACK shop").await;
        one_owner(stage, writers, "after kills", "source", true).await;
    }
    proxy
}

async fn timed<T>(what: &str, work: impl Future<Output = T>) -> T {
    let began = Instant::now();
    let result = work.await;
    println!("{what}: {:.1} s", began.elapsed().as_secs_f64());
    result
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cutovers_finish_or_undo_themselves() {
    let seed = std::env::var("UNDERSTUDY_TEST_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(20_261_122);
    println!("seed {seed} (UNDERSTUDY_TEST_SEED)");
    let mut random = fastrand::Rng::with_seed(seed);
    let stage = Stage::new().await;
    let proxy = stage.start(None).await;
    stage.must("SHADOW START pg18").await;
    stage.wait_streaming().await;
    let writers = Writers::start(&stage, 4);
    writers.more(&stage, 20).await;
    stage.verify("after the copy").await;
    proxy.kill();

    a_crash_at_every_step(&stage, &writers).await;
    assert_eq!(writers.trouble().1, Vec::<String>::new(), "clients were told errors");

    timed("a write between crash and recovery", a_write_between_crash_and_recovery(&stage, &writers)).await;
    let proxy = stage.start(None).await;
    writers.more(&stage, 20).await;
    stage.wait_streaming().await;
    let before = writers.trouble();
    timed("an open transaction", an_open_transaction(&stage, &writers)).await;
    timed("a shadow that hangs", a_shadow_that_hangs(&stage, &writers)).await;
    timed("served reads", a_session_that_reads_from_a_former_owner(&stage, &writers)).await;
    timed("a writer that goes around", a_writer_that_goes_around(&stage, &writers)).await;
    assert_eq!(writers.trouble(), before, "clients noticed something\n{}", stage.log());

    let proxy = timed("kills", kills_under_load(&stage, &writers, proxy, &mut random)).await;
    assert_eq!(writers.trouble().1, Vec::<String>::new(), "clients were told errors");
    writers.stop().await;
    stage.must("SHADOW STOP pg18").await;
    for server in [&stage.source, &stage.shadow] {
        assert_eq!(leftovers(server).await, Vec::<String>::new(), "left on PostgreSQL {}", server.major());
    }
    proxy.kill();
    // a start afterwards has nothing to take up
    let proxy = stage.start(None).await;
    assert_eq!(stage.must("SHOW FEED").await[0]["state"], "none");
    proxy.kill();
}
