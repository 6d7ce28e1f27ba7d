//! An operator with fixed figures: the surfaces are tested here, not what stands behind them.

use async_trait::async_trait;
use serde_json::json;
use std::sync::{Mutex, atomic::AtomicBool, atomic::Ordering};
use understudy::{
    config::ConsoleUser,
    console::{
        Answer, CommandError, Metric, Operator, Report,
        command::{Command, Topic},
        state::*,
    },
    lsn::Lsn,
    metadata::{Event, ProposalState, Severity},
    monitor::{LatencySummary, ResourceSample},
};

/// Remembers who asked for what.
#[derive(Default)]
pub struct TestOperator {
    /// Commands as text, with the user.
    pub heard: Mutex<Vec<(String, String)>>,
    /// What `ready` answers.
    pub not_ready: AtomicBool,
    /// What `state` answers.
    pub state: Mutex<State>,
    /// What `console_user` answers.
    pub user: Mutex<Option<ConsoleUser>>,
}

#[async_trait]
impl Operator for TestOperator {
    async fn execute(&self, command: Command, who: &str) -> Result<Answer, CommandError> {
        self.heard.lock().unwrap().push((command.to_string(), who.to_owned()));
        match command {
            Command::Show(Topic::Shadows) => Ok(Answer {
                columns: ["shadow", "sample_reads", "changes", "serving", "note"].map(String::from).to_vec(),
                rows: vec![
                    vec![json!("pg18"), json!(10.5), json!(42), json!(true), json!(null)],
                    vec![json!("pg16|ü"), json!(0), json!(7), json!(false), json!("a\nb")],
                ],
                tag: "SHOW".into(),
                notices: vec![],
            }),
            Command::Show(topic) => Ok(Answer {
                columns: vec!["topic".into()],
                rows: vec![vec![json!(topic.to_string())]],
                tag: "SHOW".into(),
                notices: vec![],
            }),
            Command::Revert(shadow) if shadow != "pg18" => {
                Err(CommandError::Unknown(format!("there is no shadow {shadow}: SHOW SHADOWS lists them")))
            }
            Command::Cutover { .. } => Err(CommandError::Refused("the feed is 3 s behind: wait until SHOW FEED says 0".into())),
            Command::Shutdown => Err(CommandError::Failed("the journal cannot be written: free some space".into())),
            Command::SimulateCutover { percent, .. } => Ok(Answer {
                columns: vec!["served".into(), "percent".into()],
                rows: vec![vec![json!(12), json!(percent)]],
                tag: "SIMULATE CUTOVER".into(),
                notices: vec![],
            }),
            other => Ok(Answer {
                tag: other.to_string().split(' ').next().unwrap_or_default().to_owned(),
                notices: vec![format!("understood: {other}"), "next: SHOW EVENTS".into()],
                ..Answer::default()
            }),
        }
    }

    fn state(&self) -> State {
        self.state.lock().unwrap().clone()
    }

    fn metrics(&self) -> Vec<Metric> {
        vec![Metric {
            name: "understudy_proxy_clients",
            help: "Client connections.",
            kind: "gauge",
            labels: vec![("database", "sh\"op".into())],
            value: 3.0,
        }]
    }

    fn ready(&self) -> Result<(), String> {
        if self.not_ready.load(Ordering::Relaxed) { Err("the source cannot be reached".into()) } else { Ok(()) }
    }

    fn report(&self, shadow: &str) -> Option<Report> {
        (shadow == "pg18")
            .then(|| Report { document: serde_json::json!({"go": true}), page: "<style nonce=\"__NONCE__\"></style>go".into() })
    }

    fn console_user(&self) -> Option<ConsoleUser> {
        self.user.lock().unwrap().clone()
    }
}

fn latency(count: u64, p50_us: u64, factor: f64) -> LatencySummary {
    let at = |multiple: f64| (p50_us as f64 * multiple * factor) as u64;
    LatencySummary { count, p50_us: at(1.0), p90_us: at(2.1), p99_us: at(6.4), p999_us: at(31.0), max_us: at(140.0) }
}

fn resources(server_version_num: u32, transactions_per_s: f64) -> ResourceSample {
    ResourceSample {
        server_version_num,
        connections: 34,
        connections_max: 100,
        active: 3,
        cache_hit_ratio: 0.997,
        database_bytes: 188_231_003,
        transactions_per_s,
        wal_bytes_per_s: 812_331.0,
        ..ResourceSample::default()
    }
}

/// A migration in full swing at `t` seconds, with everything that the page can show.
pub fn sample_state(t: f64) -> State {
    let wave = |period: f64| (t / period).sin();
    let requests = (t * 1_830.0 + 300.0 * wave(3.0)) as u64;
    let event = |id: i64, severity, component: &str, shadow: &str, message: &str| Event {
        id,
        at_ms: 1_795_000_000_000 + id * 7_300,
        severity,
        component: component.into(),
        database: "shop".into(),
        shadow: shadow.into(),
        message: message.into(),
        data: json!({}),
    };
    let proposal = |id, state, kind: &str, change: &str, sql: &str, confidence, loses_data| ProposalView {
        id,
        database: "shop".into(),
        shadow: "pg18".into(),
        object: "public.orders".into(),
        kind: kind.into(),
        change: change.into(),
        sql: vec![sql.into()],
        confidence,
        why: "rule: same change on both sides".into(),
        loses_data,
        if_rejected: "the shadow stays as it is".into(),
        state,
        decided_ms: 0,
        decided_by: if state == ProposalState::Pending { "".into() } else { "policy".into() },
        note: "".into(),
    };
    let query = |n: u64, text: &str, factor| QueryState {
        fingerprint: format!("{:016x}", n * 0x9e37_79b9),
        text: text.into(),
        source: latency(4_000 / n, 180 * n, 1.0),
        shadow: latency(4_000 / n, 180 * n, factor),
    };
    let pg18 = ShadowState {
        name: "pg18".into(),
        url: "postgres://app:***@10.0.0.2:5432/shop".into(),
        sample_reads: 10.0,
        serve_reads: 25.0,
        resources: Some(resources(180_004, 61.0)),
        mirror_writes: "rehearse".into(),
        health: "healthy".into(),
        feed: FeedState {
            state: "streaming".into(),
            direction: "forward".into(),
            applied_lsn: Lsn(0x16_b374_d848),
            received_lsn: Lsn(0x16_b374_d9a0),
            changes: (t * 912.0) as u64,
            transactions: (t * 304.0) as u64,
            lag_ms: LagState { now: (18.0 + 14.0 * wave(4.0) + 6.0 * wave(1.3)).max(0.0), p50: 6.1, p99: 48.0, max: 212.0 },
            copy: CopyState {
                tables_done: 12,
                tables: 12,
                rows: 1_204_331,
                rows_estimated: 1_200_000,
                bytes: 188_231_003,
                seconds: 9.4,
                seconds_left: None,
                done: true,
            },
            held_tables: vec!["public.orders".into()],
            findings: 0,
            finding_examples: vec![],
        },
        shift: "step 3 of 5 (25 %), 12 s left".into(),
        source_latency: latency(18_211, 310, 1.0),
        shadow_latency: latency(18_202, 310, 0.74),
        compare: CompareState {
            sampled: 18_230,
            same: 17_911,
            different: 0,
            undecided: 301,
            dropped: 18,
            errors: 0,
            reasons: [("rows moved meanwhile".to_owned(), 240), ("answer not stable on the source".to_owned(), 61)].into(),
            examples: vec![],
        },
        rehearsal: RehearsalState {
            transactions: 8_120,
            errors: 2,
            tag_mismatches: 0,
            undecided: [("lock busy".to_owned(), 12)].into(),
            left_out: [("COPY".to_owned(), 4)].into(),
            examples: vec!["UPDATE accounts SET abalance = abalance + $1: could not obtain lock".into()],
        },
        served: ServedState { reads: (t * 330.0) as u64, fallbacks: 3, fenced: 118, candidates: (t * 1_310.0) as u64 },
        revert: Some(RevertState {
            at_ms: 1_795_000_061_000,
            reason: "shadow p99 214 ms is 18.2 times the source's 11.8 ms (limit 2) over 10 s, 412 requests".into(),
            reaction_ms: 1_840.0,
            count: 1,
        }),
        queries: vec![
            query(1, "SELECT abalance FROM pgbench_accounts WHERE aid = $1", 0.7),
            query(
                2,
                "SELECT o.id, o.total, array_agg(l.sku ORDER BY l.position) FROM orders o JOIN order_lines l ON l.order_id = o.id WHERE o.customer_id = $1 AND o.created_at > $2 GROUP BY o.id ORDER BY o.created_at DESC LIMIT $3",
                1.4,
            ),
            query(7, "SELECT <script>alert('x')</script> & \"quotes\" FROM t WHERE doc @> $1", 3.1),
        ],
    };
    let pg17 = ShadowState {
        name: "pg17-whatif".into(),
        url: "postgres://app:***@10.0.0.3:5432/shop".into(),
        sample_reads: 200.0,
        mirror_writes: "off".into(),
        health: "cannot connect: connection refused".into(),
        feed: FeedState {
            state: "copying".into(),
            direction: "forward".into(),
            copy: CopyState {
                tables_done: 5,
                tables: 12,
                rows: (380_000.0 + t * 9_000.0) as u64 % 1_200_000,
                rows_estimated: 1_200_000,
                bytes: 66_123_008,
                seconds: 4.1,
                seconds_left: Some(38.0),
                done: false,
            },
            ..FeedState::default()
        },
        shift: "idle".into(),
        ..ShadowState::default()
    };
    State {
        version: "0.1.0".into(),
        uptime_s: t,
        databases: vec![DatabaseState {
            name: "shop".into(),
            owner: "source".into(),
            epoch: 3,
            held: false,
            clients: 24,
            requests,
            transactions: requests * 2 / 3,
            errors: 0,
            source_url: "postgres://app:***@10.0.0.1:5432/shop".into(),
            latency: latency(requests, 290, 1.0),
            resources: Some(resources(150_018, 304.0)),
            shadows: vec![pg18, pg17],
            cutover: Some(CutoverState {
                kind: "rollback".into(),
                state: "done".into(),
                from: "pg18".into(),
                to: "source".into(),
                pause_ms: 61.4,
                steps: [
                    ("check", 0.0),
                    ("hold", 2.1),
                    ("drained", 9.8),
                    ("fenced", 14.0),
                    ("marker applied", 38.5),
                    ("sequences", 47.0),
                    ("flipped", 55.2),
                    ("released", 61.4),
                ]
                .map(|(name, ms)| (name.to_owned(), ms))
                .to_vec(),
            }),
        }],
        proposals: vec![
            proposal(
                1,
                ProposalState::AutoApplied,
                "add_column",
                "column note (text) was added on the source",
                "ALTER TABLE public.orders ADD COLUMN note text",
                0.99,
                false,
            ),
            proposal(
                2,
                ProposalState::Rejected,
                "create_index",
                "index orders_note was created on the source",
                "CREATE INDEX CONCURRENTLY orders_note ON public.orders (note)",
                0.91,
                false,
            ),
            proposal(
                3,
                ProposalState::Pending,
                "alter_type",
                "column total was widened from numeric(10,2) to numeric(14,4)",
                "ALTER TABLE public.orders ALTER COLUMN total TYPE numeric(14,4)",
                0.93,
                false,
            ),
            proposal(
                4,
                ProposalState::Pending,
                "drop_column",
                "column legacy_code was dropped on the source",
                "ALTER TABLE public.orders DROP COLUMN legacy_code",
                0.62,
                true,
            ),
        ],
        events: vec![
            event(1, Severity::Info, "cdc", "pg18", "copied 12 tables, 1,204,331 rows in 9.4 s"),
            event(2, Severity::Info, "traffic", "pg18", "shift ladder: 5 % of the reads are served"),
            event(
                3,
                Severity::Alert,
                "traffic",
                "pg18",
                "serving stopped: shadow p99 is 18.2 times the source's. Look at SHOW LATENCY BY QUERY, then SHIFT START pg18",
            ),
            event(4, Severity::Warning, "schema", "pg18", "public.orders is held back until proposal 3 is decided: APPROVE 3 or REJECT 3"),
            event(5, Severity::Info, "cutover", "pg18", "rolled back to source, clients waited 61 ms"),
        ],
    }
}
