//! The operators' commands, carried out.

use super::{
    Controller,
    managed::{Managed, ManagedShadow, lock},
    mirror::{MirrorFollower, Mirrored},
    show::utc,
};
use crate::{
    backend::{self, ControlError},
    cdc::{self, Direction, Start},
    config::{FeedKind, ServerUrl},
    console::{Answer, CommandError, command::Command, state::CutoverState},
    cutover::{CutoverError, switch::Switch},
    metadata::{Owner, Proposal, ProposalState, Severity},
    validate,
};
use serde_json::json;
use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use tokio_postgres::Client;

/// A control connection.
pub(super) async fn connect(url: &ServerUrl, name: &str) -> Result<Client, ControlError> {
    let (client, connection) = backend::control(url, name).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// Longest wait of PAUSE for running transactions.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(60);

pub(super) fn failed(error: impl std::fmt::Display) -> CommandError {
    CommandError::Failed(error.to_string())
}

/// Refuses what was decided before, or overtaken by a later change, and says by whom, when and why.
fn undecided(proposal: &Proposal) -> Result<(), CommandError> {
    if matches!(proposal.state, ProposalState::Pending | ProposalState::Failed) {
        return Ok(());
    }
    let (id, state, by) = (proposal.id, proposal.state.as_str(), &proposal.decided_by);
    let note = if proposal.note.is_empty() { String::new() } else { format!(": {}", proposal.note) };
    Err(CommandError::Refused(format!("proposal {id} is already {state} (by {by}, {}){note}", utc(proposal.decided_ms))))
}

pub(super) fn tagged(tag: &str, notice: impl Into<String>) -> Answer {
    Answer { tag: tag.into(), notices: vec![notice.into()], ..Answer::default() }
}

impl Controller {
    /// Carries out a command.
    pub(super) async fn execute(self: Arc<Self>, command: Command, who: &str) -> Result<Answer, CommandError> {
        if self.handed_over.load(Ordering::SeqCst) && !matches!(command, Command::Show(_) | Command::Shutdown) {
            let reason = "another process has taken over from this one: connect to the console again to reach it";
            return Err(CommandError::Refused(reason.into()));
        }
        match command {
            Command::Show(topic) => self.show(topic).await,
            Command::SchemaDiff { before, after } => self.schema_diff(before, after),
            Command::Set { shadow, knob, value } => self.set(&shadow, &knob, &value, who),
            Command::Reload => self.reload(),
            Command::RemoveLeftovers(name) => self.remove_leftovers(&name, who).await,
            Command::Pause(name) => self.pause(name.as_deref()).await,
            Command::Resume(name) => self.resume(name.as_deref()),
            Command::Reconnect(name) => self.reconnect(name.as_deref(), who),
            Command::Approve { id, sql } => self.approve(id, sql.as_deref(), who).await,
            Command::Reject(id) => self.reject(id, who).await,
            Command::SimulateCutover { shadow, percent, duration } => self.simulate(&shadow, percent, duration).await,
            Command::ShiftStart(name) => self.shift_start(&name, who),
            Command::ShiftStop(name) => self.shift_stop(&name, who),
            Command::Revert(name) => self.revert(&name, who),
            Command::Cutover { shadow, dry_run } => self.cutover(&shadow, dry_run).await,
            Command::Rollback { database, accept_loss } => self.rollback(&database, accept_loss).await,
            Command::Verify { shadow, table, repair } => self.verify(&shadow, table, repair, who).await,
            Command::ShadowStart(name) => self.shadow_start(&name),
            Command::ShadowResync(name) => self.shadow_resync(&name, who).await,
            Command::ShadowStop(name) => self.shadow_stop(&name).await,
            Command::FaultLoseChange(name) => self.lose_change(&name),
            Command::Shutdown => {
                self.shutdown.notify_one();
                Ok(tagged("SHUTDOWN", "understudy stops accepting; sessions end when their transaction has ended"))
            }
        }
    }

    /// A shadow and its database by the shadow's name.
    pub(super) fn shadow(&self, name: &str) -> Result<(&Arc<Managed>, &Arc<ManagedShadow>), CommandError> {
        let found = self
            .databases
            .iter()
            .find_map(|managed| managed.shadows.iter().find(|shadow| shadow.name() == name).map(|shadow| (managed, shadow)));
        found.ok_or_else(|| CommandError::Unknown(format!("there is no shadow \"{name}\": SHOW SHADOWS lists them")))
    }

    pub(super) fn database(&self, name: &str) -> Result<&Arc<Managed>, CommandError> {
        let found = self.databases.iter().find(|managed| managed.database.name == name);
        found.ok_or_else(|| CommandError::Unknown(format!("there is no database \"{name}\": SHOW DATABASES lists them")))
    }

    fn some_databases(&self, name: Option<&str>) -> Result<Vec<&Arc<Managed>>, CommandError> {
        match name {
            Some(name) => Ok(vec![self.database(name)?]),
            None => Ok(self.databases.iter().collect()),
        }
    }

    async fn pause(&self, name: Option<&str>) -> Result<Answer, CommandError> {
        for managed in self.some_databases(name)? {
            let Ok(_turn) = managed.switching.try_lock() else {
                return Err(CommandError::Refused(format!("a cutover of {} is running", managed.database.name)));
            };
            managed.database.gate.close();
            managed.paused.store(true, Ordering::SeqCst);
            if tokio::time::timeout(PAUSE_TIMEOUT, managed.database.gate.drained()).await.is_err() {
                let open = managed.database.gate.active();
                managed.paused.store(false, Ordering::SeqCst);
                managed.database.gate.open();
                return Err(CommandError::Failed(format!(
                    "{open} transactions of {} were still open after {} s; nothing is paused: see SHOW CLIENTS",
                    managed.database.name,
                    PAUSE_TIMEOUT.as_secs()
                )));
            }
        }
        Ok(tagged("PAUSE", "no transaction is running; new ones wait until RESUME"))
    }

    fn resume(&self, name: Option<&str>) -> Result<Answer, CommandError> {
        for managed in self.some_databases(name)? {
            if managed.paused.swap(false, Ordering::SeqCst) {
                managed.database.gate.open();
            }
        }
        Ok(tagged("RESUME", "waiting transactions go on"))
    }

    fn reconnect(&self, name: Option<&str>, who: &str) -> Result<Answer, CommandError> {
        let mut sessions = 0;
        for managed in self.some_databases(name)? {
            let database = &managed.database.name;
            let Ok(_turn) = managed.switching.try_lock() else {
                return Err(CommandError::Refused(format!("a cutover of {database} is running: it gives every session a new connection")));
            };
            let owner = managed.database.route.load().owner.clone();
            let renewed = self.repository.renew(database).map_err(failed)?;
            managed.route_to(owner, renewed.epoch, None);
            sessions += managed.database.clients();
            let message = format!("{who} asked the sessions of {database} to connect to its servers anew");
            self.repository.record(Severity::Info, "control", database, "", &message, json!({"epoch": renewed.epoch}));
        }
        Ok(tagged(
            "RECONNECT",
            format!(
                "{sessions} sessions open a new server connection when their transaction has ended; those whose log-in understudy does not \
                 know keep theirs: SHOW CLIENTS"
            ),
        ))
    }

    async fn approve(&self, id: i64, sql: Option<&str>, who: &str) -> Result<Answer, CommandError> {
        let proposal = self.repository.proposal(id).map_err(|error| CommandError::Unknown(error.to_string()))?;
        // A rejected one may be approved after all: its table's changes were kept.
        if proposal.state != ProposalState::Rejected {
            undecided(&proposal)?;
        }
        let (_, shadow) = self.shadow(&proposal.shadow)?;
        let note = if proposal.draft.kind == "fill_column" && sql.is_none() {
            let adapter =
                lock(&shadow.adapter).clone().ok_or_else(|| CommandError::Refused("the feed is not running: SHADOW START first".into()))?;
            let client = connect(&shadow.config.load().url, "understudy fill").await.map_err(failed)?;
            let rows = adapter.fill(&proposal, &client).await.map_err(failed)?;
            let note = format!("{rows} rows filled");
            self.repository.decide(id, ProposalState::Approved, who, &proposal.draft.sql.join(";\n"), &note).map_err(failed)?;
            note
        } else {
            let (feed, _) = shadow.feed().ok_or_else(|| CommandError::Refused("the feed is not running: SHADOW START first".into()))?;
            feed.approve(&proposal, sql, who).await.map_err(failed)?
        };
        self.repository.record(
            Severity::Info,
            "schema",
            &proposal.database,
            &proposal.shadow,
            &format!("proposal {id} approved by {who}: {}", proposal.draft.change),
            json!({"proposal": id}),
        );
        Ok(tagged("APPROVE", format!("proposal {id} is carried out. {note}")))
    }

    async fn reject(&self, id: i64, who: &str) -> Result<Answer, CommandError> {
        let proposal = self.repository.proposal(id).map_err(|error| CommandError::Unknown(error.to_string()))?;
        undecided(&proposal)?;
        let (_, shadow) = self.shadow(&proposal.shadow)?;
        match shadow.feed() {
            Some((feed, _)) => feed.reject(&proposal, who).await.map_err(failed)?,
            None => self.repository.decide(id, ProposalState::Rejected, who, "", "").map_err(failed)?,
        }
        Ok(tagged("REJECT", format!("proposal {id} is rejected. {}", proposal.draft.if_rejected)))
    }

    pub(super) fn switch(&self, managed: &Arc<Managed>, shadow: &Arc<ManagedShadow>, to_shadow: bool) -> Result<Switch, CommandError> {
        let (forward, backward) = (Direction::Forward, Direction::Reverse);
        let (kind, from, to, direction, opposite) = match to_shadow {
            true => ("cutover", managed.source(), shadow.route.target.clone(), forward, backward),
            false => ("rollback", shadow.route.target.clone(), managed.source(), backward, forward),
        };
        let feed = shadow.feed().filter(|(_, flows)| *flows == direction).map(|(feed, _)| feed);
        let feed = feed.ok_or_else(|| CommandError::Refused(format!("there is no feed from {} to {}: SHOW FEED", from.name, to.name)))?;
        let (publish_to, start_to, report_to) =
            (managed.clone(), (managed.clone(), shadow.clone(), self.repository.clone()), managed.clone());
        Ok(Switch {
            kind,
            database: managed.database.clone(),
            repository: self.repository.clone(),
            shadow: shadow.name(),
            from,
            to,
            next: if to_shadow { Owner::Shadow(shadow.name()) } else { Owner::Source },
            feed,
            feed_spec: managed.feed_spec(shadow, direction),
            opposite: managed.feed_spec(shadow, opposite),
            publish: Box::new(move |owner, epoch, standby| publish_to.route_to(owner, epoch, standby)),
            start_opposite: Box::new(move |marker| {
                let (managed, shadow, repository) = &start_to;
                managed.start_feed(shadow, opposite, Start::AfterMarker(marker), repository);
            }),
            crash_at: self.crash_at.clone(),
            report: Box::new(move |state: CutoverState| *lock(&report_to.cutover) = Some(state)),
        })
    }

    async fn cutover(&self, name: &str, dry_run: bool) -> Result<Answer, CommandError> {
        let (managed, shadow) = self.shadow(name)?;
        if shadow.config.load().feed == FeedKind::Mirror {
            return Err(CommandError::Refused(mirror_is_less(shadow)));
        }
        if managed.database.route.load().owner == shadow.route.target {
            return Err(CommandError::Refused(format!("{name} already owns the writes of {}", managed.database.name)));
        }
        if managed.database.route.load().owner.name != "source" {
            return Err(CommandError::Refused(format!(
                "another shadow owns the writes of {}: ROLLBACK {} first",
                managed.database.name, managed.database.name
            )));
        }
        self.change_owner(managed, shadow, true, dry_run).await
    }

    async fn rollback(&self, name: &str, accept_loss: bool) -> Result<Answer, CommandError> {
        let managed = self.database(name)?;
        let owner = managed.database.route.load().owner.clone();
        let Some(shadow) = managed.shadows.iter().find(|shadow| shadow.route.target == owner) else {
            return Err(CommandError::Refused(format!("the source owns the writes of {name}: there is nothing to roll back")));
        };
        let losses = self.losses(managed, shadow).await?;
        if !(losses.is_empty() || accept_loss) {
            return Err(CommandError::Refused(format!(
                "the way back from {} cannot give every value back: {}. Nothing was changed; ROLLBACK {name} ACCEPT LOSS does it all the same",
                shadow.name(),
                losses.join("; ")
            )));
        }
        self.change_owner(managed, shadow, false, false).await
    }

    async fn change_owner(
        &self,
        managed: &Arc<Managed>,
        shadow: &Arc<ManagedShadow>,
        to_shadow: bool,
        dry_run: bool,
    ) -> Result<Answer, CommandError> {
        let _turn = managed
            .switching
            .try_lock()
            .map_err(|_| CommandError::Refused("a cutover or rollback is already running: SHOW CUTOVER".into()))?;
        if managed.paused.load(Ordering::SeqCst) {
            return Err(CommandError::Refused(format!("{} is paused: RESUME {} first", managed.database.name, managed.database.name)));
        }
        if let Some(left) = self.predecessor_sessions().await {
            return Err(CommandError::Refused(format!(
                "the process that this one has taken over from still serves {left} sessions, which would go on writing to the old owner: wait for \
                 their end, or end that process (SIGTERM lets their transactions end)"
            )));
        }
        let switch = self.switch(managed, shadow, to_shadow)?;
        if dry_run {
            let obstacles = switch.obstacles().await;
            let steps = crate::cutover::step::Step::ALL.iter().map(|step| vec![json!(step.name()), json!(step.describe())]);
            let answer = Answer {
                columns: vec!["step".into(), "what it does".into()],
                rows: steps.collect(),
                tag: "CUTOVER".into(),
                notices: vec!["nothing stands in the way".into()],
            };
            return if obstacles.is_empty() {
                Ok(answer)
            } else {
                Err(CommandError::Refused(format!("{} is not possible now: {}", switch.kind, obstacles.join("; "))))
            };
        }
        // Shadow work on the next owner ends before it takes writes; serving ends with the change of owner.
        let route = &shadow.route;
        let knobs = (route.sample_reads.get(), route.rehearse.load(Ordering::SeqCst));
        route.rehearse.store(false, Ordering::SeqCst);
        route.sample_reads.set(0.0);
        let outcome = switch.run().await;
        match &outcome {
            Err(CutoverError::Refused(_) | CutoverError::Undone { .. }) => {
                // serve_reads was left alone: what a revert has done meanwhile stays
                route.sample_reads.set(knobs.0);
                route.rehearse.store(knobs.1, Ordering::SeqCst);
            }
            Ok(_) | Err(CutoverError::Unfinished { .. }) => {
                // after a rollback the shadow serves nothing until told to; copies go on as configured
                shadow.stop_serving();
                let config = shadow.config.load();
                route.sample_reads.set(config.sample_reads);
                route.rehearse.store(config.mirror_writes == crate::config::MirrorWrites::Rehearse, Ordering::SeqCst);
            }
        }
        let state = outcome.map_err(|error| match error {
            CutoverError::Refused(reason) => CommandError::Refused(reason),
            error => CommandError::Failed(error.to_string()),
        })?;
        let mut rows: Vec<_> = state.steps.iter().map(|(step, ms)| vec![json!(step), json!((ms * 10.0).round() / 10.0)]).collect();
        rows.push(vec![json!("pause"), json!((state.pause_ms * 10.0).round() / 10.0)]);
        let notice = format!("{} owns the writes of {} now; clients waited {:.0} ms", state.to, managed.database.name, state.pause_ms);
        Ok(Answer { columns: vec!["step".into(), "ms".into()], rows, tag: state.kind.to_uppercase(), notices: vec![notice] })
    }

    async fn verify(&self, name: &str, table: Option<String>, repair: bool, who: &str) -> Result<Answer, CommandError> {
        let (managed, shadow) = self.shadow(name)?;
        let _turn = shadow
            .busy
            .try_lock()
            .map_err(|_| CommandError::Refused(format!("another simulation or verification of {name} is running")))?;
        let (feed, direction) =
            shadow.feed().ok_or_else(|| CommandError::Refused(format!("shadow {name} has no feed: SHADOW START {name} first")))?;
        let spec = managed.feed_spec(shadow, direction);
        let options = validate::Options {
            tables: table.map(|table| vec![table]),
            repair,
            rules: shadow.rules.load_full(),
            back: direction == Direction::Reverse,
            ..validate::Options::default()
        };
        let progress = validate::Progress::default();
        let report = if shadow.config.load().feed == FeedKind::Mirror {
            let follower = MirrorFollower(Mirrored::new(managed.clone(), shadow.clone()));
            validate::verify(&spec.from, &spec.to, Some(&follower), &options, &progress).await.map_err(failed)?
        } else {
            validate::verify(&spec.from, &spec.to, Some(&FeedFollower(feed)), &options, &progress).await.map_err(failed)?
        };
        let columns = ["table", "rows", "differences", "seconds", "examples"].map(String::from).to_vec();
        let describe = |table: &validate::TableReport| {
            let examples = table.examples.iter().map(|difference| difference.to_string()).collect::<Vec<_>>().join("; ");
            table.skipped.clone().map_or(examples.clone(), |skipped| format!("skipped: {skipped} {examples}"))
        };
        let mut rows: Vec<_> = report
            .tables
            .iter()
            .map(|table| {
                vec![
                    json!(format!("{}.{}", table.schema, table.name)),
                    json!(table.rows),
                    json!(table.differences),
                    json!(table.seconds),
                    json!(describe(table)),
                ]
            })
            .collect();
        rows.push(vec![
            json!("total"),
            json!(report.rows),
            json!(report.differences),
            json!(report.seconds),
            json!(format!("at {}", report.lsn)),
        ]);
        let what = format!("{} rows of {} tables compared at {}", report.rows, report.tables.len(), report.lsn);
        let data = json!({"rows": report.rows, "tables": report.tables.len(), "differences": report.differences, "seconds": report.seconds, "pause_ms": report.pause_ms});
        let skipped: Vec<_> = report
            .tables
            .iter()
            .filter_map(|table| table.skipped.as_ref().map(|why| format!("{}.{} could not be read: {why}", table.schema, table.name)))
            .collect();
        if report.differences == 0 && report.unread > 0 {
            let message = format!(
                "{name} and the owner could not be compared in full: {}. {what}. Mend that and VERIFY {name} again",
                skipped.join("; ")
            );
            self.repository.record(Severity::Alert, "validate", &managed.database.name, name, &message, data);
            return Err(CommandError::Refused(message));
        }
        if report.differences == 0 {
            let message = format!("{name} and the owner are equal: {what}");
            self.repository.record(Severity::Info, "validate", &managed.database.name, name, &message, data);
            return Ok(Answer { columns, rows, tag: "VERIFY".into(), notices: vec![message] });
        }
        let details: Vec<_> = report
            .tables
            .iter()
            .filter(|table| table.differences > 0)
            .map(|table| format!("{}.{}: {} ({})", table.schema, table.name, table.differences, describe(table)))
            .collect();
        let repaired = if repair {
            format!(" They were repaired, as {who} asked: VERIFY {name} again")
        } else {
            format!(" To write the owner's rows over them: VERIFY {name} REPAIR")
        };
        let message = format!("{} differences between {name} and the owner: {}. {what}.{repaired}", report.differences, details.join("; "));
        self.repository.record(Severity::Alert, "validate", &managed.database.name, name, &message, data);
        Err(CommandError::Refused(message))
    }
}

/// Why a shadow that is fed by mirrored writes cannot take over, with what is known of it.
fn mirror_is_less(shadow: &ManagedShadow) -> String {
    let mirror = &shadow.route.mirror;
    format!(
        "{} is fed by mirrored writes, for which no cutover is offered: it ran clients' statements, not the source's rows, so that now(), \
         random() and sequences under concurrency may have given it other values; writes that went around understudy are not there; {} \
         transactions are known to have diverged (SHOW FEED). There is no way back from it either, since nothing carries its writes to the \
         source. To move to it all the same: PAUSE, VERIFY {} REPAIR until nothing differs, then point the applications at it",
        shadow.name(),
        mirror.diverged.get(),
        shadow.name()
    )
}

/// The feed as the validator sees it.
struct FeedFollower(cdc::Feed);

#[async_trait::async_trait]
impl validate::Follower for FeedFollower {
    type Hold = cdc::HoldGuard;

    fn hold(&self) -> Self::Hold {
        self.0.hold_now()
    }

    async fn advance(&self, hold: &Self::Hold, lsn: crate::lsn::Lsn, timeout: Duration) -> Result<(), String> {
        self.0.advance(hold, lsn, timeout).await.map_err(|error| error.to_string())
    }
}
