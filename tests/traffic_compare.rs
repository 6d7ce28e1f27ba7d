//! Sampled reads with real servers: nothing that writes is ever copied, what is injected on the shadow is named exactly, and under
//! a busy source nothing is reported that is not so.

#[path = "traffic/alarms.rs"]
mod alarms;
#[path = "proxy/harness.rs"]
mod harness;
#[path = "traffic/stage.rs"]
mod stage;
mod support;
#[path = "traffic/traps.rs"]
mod traps;

use harness::section;
use stage::Stage;

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a minute and more on a loaded machine: make test-comparison"]
async fn what_is_copied_and_what_it_shows() {
    let rules = "[[database.shadow.ignore]]\nname = \"scores are rounded\"\ntables = [\"score\"]\nfloats = 0.01\n\
                 [[database.shadow.ignore]]\nname = \"stamps\"\ncolumns = [\"stamped\"]\n";
    let stage = Stage::start("compare", &format!("{}{}", alarms::SCHEMA, traps::SCHEMA), rules).await;
    stage.set("sample_reads", "100").await;
    section("nothing that may write is copied", traps::sprung(&stage)).await;
    section("READ ONLY transactions and cursors are compared whole", alarms::transactions(&stage)).await;
    alarms::none(&stage).await; // as long as it is told to
    section("what is injected is named", alarms::each(&stage)).await;
    section("rules are counted by name", alarms::rules(&stage)).await;
    section("a frequent statement is limited, a rare one is seen", alarms::quota(&stage)).await;
}
