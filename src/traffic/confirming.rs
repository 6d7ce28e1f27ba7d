//! Before anything is called a difference: the sandwich of owner, shadow, owner, compared row by row, and the evidence.

use super::{
    again,
    answer::{Answer, Difference},
    comparator::{Asked, Verdict, Worker},
    copies::{Identity, Operation},
    database::monotonic_ms,
    rows::{self, Outcome},
    runner::{RunError, Runner},
};
use crate::{sql::Class, wire::take_i32};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// Sandwiches in a row that must show the same difference.
const CONFIRMATIONS: usize = 2;
/// Sandwiches tried before a moving source makes it undecided.
const ATTEMPTS_MAX: usize = 8;
/// The same for a statement that asks for the time: it may never agree with itself.
const ATTEMPTS_ON_TIME_MAX: usize = 4;
/// A source that moves is left alone for a while between two of them; longer each time.
const PATIENCE: Duration = Duration::from_millis(10);
/// While the shadow catches up the owner is asked again this often.
const WATCH_EVERY: Duration = Duration::from_millis(2);
/// At most this many times: a confirmation must not become a load.
const WATCHED_MAX: usize = 24;
/// Plans of one statement are asked for once in this time.
const PLANS_EVERY: Duration = Duration::from_secs(60);
/// Statements whose plans were asked for; beyond it they are all forgotten.
const EXPLAINED_MAX: usize = 500;

impl Worker {
    /// Owner, shadow, owner: until the owner agrees with itself around a shadow's answer often enough.
    pub(super) async fn confirm(&mut self, read: &Asked<'_>, first: Difference) -> Verdict {
        if read.class.limited && !matches!(first, Difference::Sqlstate | Difference::Columns) {
            return Verdict::Undecided("LIMIT, DISTINCT ON, a sample, a window or an aggregate without an order leaves rows open");
        }
        let whole = match again::whole(read.operation, read.class) {
            Ok(whole) => whole,
            // what it does not say about rows it says about columns and outcome
            Err(_) if matches!(first, Difference::Sqlstate | Difference::Columns) => read.operation.clone(),
            Err(reason) => return Verdict::Undecided(reason),
        };
        let there = match self.there(&whole, read.class) {
            Ok(there) => there.unwrap_or_else(|| whole.clone()),
            Err(reason) => return Verdict::Undecided(reason),
        };
        let owner = self.database.route.load().owner.clone();
        self.on_owner.retarget(&owner);
        self.on_shadow.keep_rows(true);
        let verdict = self.sandwiches(read, &whole, &there).await;
        self.on_shadow.keep_rows(false);
        verdict
    }

    async fn sandwiches(&mut self, read: &Asked<'_>, whole: &Operation, there: &Operation) -> Verdict {
        let mut confirmed = 0;
        let order = read.operation.text().map_or_else(Vec::new, crate::sql::order_of);
        let mut moved = 0;
        let attempts = if read.class.asks_time { ATTEMPTS_ON_TIME_MAX } else { ATTEMPTS_MAX };
        for attempt in 0..attempts {
            if attempt > CONFIRMATIONS {
                tokio::time::sleep(PATIENCE * attempt as u32).await;
            }
            let (before, mut history) = match self.watch_owner(read, whole).await {
                Ok(watched) => watched,
                Err(reason) => return Verdict::Undecided(reason),
            };
            let Ok((mut on_shadow, _)) = self.on_shadow.run_fresh(read.identity, there).await else {
                return Verdict::Undecided("shadow failed while a difference was being confirmed");
            };
            if self.shadow.differs(&read.class.tables) {
                on_shadow.typed_like(&before);
            }
            let Ok((after, _)) = self.on_owner.run_fresh(read.identity, whole).await else {
                return Verdict::Undecided("the owner could not be asked again");
            };
            let rules = self.shadow.ignore.load_full();
            let look = |owner: &Answer, other: &Answer, rules: &[_]| rows::compare(owner, other, read.class, &order, rules);
            let steady = history.is_empty() && matches!(look(&before, &after, &[]), Outcome::Same(_));
            match look(&before, &on_shadow, &rules) {
                Outcome::Same(None) => return Verdict::Same,
                Outcome::Same(Some(rule)) => return Verdict::Excused(rule),
                // it moved, and the shadow is where it was on its way
                _ if !steady => {
                    let passed = |one: &Answer| one.difference(&on_shadow, read.class.ordered).is_none();
                    if matches!(look(&after, &on_shadow, &rules), Outcome::Same(_)) || history.drain(..).any(|one| passed(&one)) {
                        return Verdict::Same;
                    }
                    confirmed = 0;
                    moved += 1;
                }
                Outcome::Undecided(reason) => return Verdict::Undecided(reason),
                Outcome::Different(found, evidence) => {
                    confirmed += 1;
                    if confirmed == CONFIRMATIONS {
                        if let Some(reason) = may_vary(read.class, &before, found) {
                            return Verdict::Undecided(reason);
                        }
                        return Verdict::Confirmed(found, self.evidence(read, whole, there, evidence).await);
                    }
                }
            }
        }
        if read.class.asks_time && moved == attempts {
            self.shadow.quota.mark_noise(read.class.fingerprint, monotonic_ms());
            return Verdict::Undecided("the answer depends on the time");
        }
        Verdict::Undecided("the owner's answer kept changing")
    }

    /// Asks the owner until the shadow has passed its first answer: that one, and those that came to differ meanwhile, without rows.
    /// The shadow's next answer is one that the owner gave within this time, or it is different.
    async fn watch_owner(&mut self, read: &Asked<'_>, whole: &Operation) -> Result<(Answer, Vec<Answer>), &'static str> {
        const LOST: &str = "the owner could not be asked again";
        let (before, _) = self.on_owner.run_fresh(read.identity, whole).await.map_err(|_| LOST)?;
        let needed = self.database.ticks.needed_now();
        let mut history: Vec<Answer> = Vec::new();
        for _ in 0..WATCHED_MAX {
            if self.shadow.fence.allows(needed) {
                break;
            }
            tokio::time::sleep(WATCH_EVERY).await;
            let (mut now, _) = self.on_owner.run_fresh(read.identity, whole).await.map_err(|_| LOST)?;
            if history.last().unwrap_or(&before).difference(&now, read.class.ordered).is_some() {
                now.forget_rows();
                history.push(now);
            }
        }
        let passed = self.shadow.caught_up(needed).await;
        passed.then_some((before, history)).ok_or("shadow did not catch up in time")
    }

    /// Where it was seen, and how both sides come to their answers.
    async fn evidence(&mut self, read: &Asked<'_>, whole: &Operation, there: &Operation, rows: String) -> String {
        let mut evidence = format!("{rows}; at LSN {}", self.database.ticks.newest());
        let seen = self.explained.get(&read.class.fingerprint).is_some_and(|at| at.elapsed() < PLANS_EVERY);
        if seen {
            return evidence;
        }
        if self.explained.len() >= EXPLAINED_MAX {
            self.explained.clear();
        }
        self.explained.insert(read.class.fingerprint, Instant::now());
        let ours = plan(&mut self.on_owner, read.identity, whole).await;
        let theirs = plan(&mut self.on_shadow, read.identity, there).await;
        if let (Some(ours), Some(theirs)) = (ours, theirs) {
            match ours == theirs {
                true => evidence.push_str(&format!("; plan on both sides: {ours}")),
                false => evidence.push_str(&format!("; plan on the owner: {ours}; plan on the shadow: {theirs}")),
            }
        }
        evidence
    }
}

async fn plan(runner: &mut Runner, identity: &Arc<Identity>, operation: &Operation) -> Option<String> {
    let answer: Result<_, RunError> = runner.run_fresh(identity, &again::explain(operation)).await;
    let (answer, _) = answer.ok()?;
    let mut row = answer.kept()?.first()?.get(2..)?;
    let length = usize::try_from(take_i32(&mut row)?).ok()?;
    again::plan_in_words(std::str::from_utf8(row.get(..length)?).ok()?)
}

/// Answers that may differ between two servers with equal data, by the SQL standard or by floating point.
fn may_vary(class: &Class, answer: &Answer, difference: Difference) -> Option<&'static str> {
    const FLOATS: [u32; 4] = [700, 701, 1021, 1022];
    let of_rows = matches!(difference, Difference::Values | Difference::Order | Difference::RowCount);
    if of_rows && class.cut_inside {
        return Some("LIMIT, DISTINCT ON, a window or an aggregate inside may treat equal rows either way");
    }
    let has_floats = answer.columns.as_ref().is_some_and(|columns| columns.iter().any(|(_, oid)| FLOATS.contains(oid)));
    let text = class.text.to_ascii_lowercase();
    let sums = ["sum(", "avg(", "stddev", "var_", "variance(", "corr(", "regr_"].iter().any(|word| text.contains(word));
    if difference == Difference::Values && has_floats && sums {
        return Some("floating point sums depend on the order of rows");
    }
    None
}
