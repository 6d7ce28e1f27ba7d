//! Promises 3, 5, 7 and 8: one writer, nothing lost or repeated, and a cutover that finishes or undoes itself, whatever dies when.
//! One source (15), one shadow (18) and the real program, which is killed and started again all the time.

#[path = "cutover/stage.rs"]
mod stage;
mod support;
#[path = "cutover/writers.rs"]
mod writers;

use stage::{Stage, fenced, numbers};
use std::time::Instant;
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cutovers_finish_or_undo_themselves() {
    let stage = Stage::new().await;
    let proxy = stage.start(None).await;
    stage.must("SHADOW START pg18").await;
    stage.wait_streaming().await;
    let writers = Writers::start(&stage, 4);
    writers.more(&stage, 20).await;
    stage.verify("after the copy").await;
    proxy.kill();

    a_crash_at_every_step(&stage, &writers).await;
    let (_lost, errors) = writers.trouble();
    assert_eq!(errors, Vec::<String>::new(), "clients were told errors");
    let client = stage.source.connect("shop").await.unwrap();
    assert!(numbers(&client, "SELECT count(*) FROM entry").await[0] > 500);
    writers.stop().await;
}
