//! `[database.shadow.revert]`, `[database.shadow.shift]` and `[proxy.profile]`: what is measured, and what it may lead to.

use super::{
    Calendar, ProfileConfig, RevertConfig, ShiftConfig, ShiftOrder,
    load::{Refusal, duration, in_range, percent, positive, refuse},
    raw::{RawProfile, RawRevert, RawShift},
};
use std::time::Duration;

/// A server that is asked more often is measured by the asking.
const INTERVAL_MIN: Duration = Duration::from_millis(500);

pub(super) fn revert(raw: RawRevert) -> Result<RevertConfig, Refusal> {
    let count = |value, key| match value {
        None => Ok(None),
        value => in_range(value, key, 1..=1_000_000, 1).map(|number| Some(number as u64)),
    };
    Ok(RevertConfig {
        window: duration(raw.window, "window", Duration::from_secs(10))?,
        min_requests: in_range(raw.min_requests, "min_requests", 1..=1_000_000_000, 50)? as u64,
        error_rate: percent(raw.error_rate, "error_rate", 100.0, 1.0)?,
        mismatch_rate: percent(raw.mismatch_rate, "mismatch_rate", 100.0, 0.1)?,
        latency_ratio: positive(raw.latency_ratio, "latency_ratio", 2.0)?,
        latency_floor: duration(raw.latency_floor, "latency_floor", Duration::from_millis(5))?,
        max_lag: duration(raw.max_lag, "max_lag", Duration::from_secs(5))?,
        max_connections: match raw.max_connections {
            None => None,
            value => Some(percent(value, "max_connections", 100.0, 100.0)?),
        },
        max_active: count(raw.max_active, "max_active")?,
        max_cpu_cores: match raw.max_cpu_cores {
            None => None,
            value => Some(positive(value, "max_cpu_cores", 1.0)?),
        },
        max_locks_waiting: count(raw.max_locks_waiting, "max_locks_waiting")?,
    })
}

pub(super) fn shift(raw: RawShift) -> Result<ShiftConfig, Refusal> {
    let steps = match raw.steps {
        None => vec![1.0, 5.0, 25.0, 50.0, 100.0],
        Some(value) => {
            let steps = value.get_ref();
            let ascending = steps.windows(2).all(|pair| pair[0] < pair[1]);
            if steps.is_empty() || !ascending || !steps.iter().all(|step| *step > 0.0 && *step <= 100.0) {
                return refuse(value.span(), "steps are ascending percentages above 0 and up to 100, such as [1, 5, 25, 50, 100]");
            }
            steps.clone()
        }
    };
    let order = match raw.order {
        None => ShiftOrder::All,
        Some(value) => match value.get_ref().as_str() {
            "all" => ShiftOrder::All,
            "proven" => ShiftOrder::Proven,
            other => {
                return refuse(
                    value.span(),
                    format!("order is \"all\" or \"proven\" (statements that sampling has proven move first), not \"{other}\""),
                );
            }
        },
    };
    // the place that is at fault, as well as it is known: the first of what was given
    let spans = [
        raw.timezone.as_ref().map(toml::Spanned::span),
        raw.allow.as_ref().map(toml::Spanned::span),
        raw.quiet.as_ref().map(toml::Spanned::span),
    ];
    let list = |value: &Option<toml::Spanned<Vec<String>>>| value.as_ref().map(|value| value.get_ref().clone()).unwrap_or_default();
    let calendar = match Calendar::new(raw.timezone.as_ref().map(|zone| zone.get_ref().as_str()), &list(&raw.allow), &list(&raw.quiet)) {
        Ok(calendar) => calendar,
        Err(reason) => return refuse(spans.into_iter().flatten().next().unwrap_or(0..0), reason),
    };
    Ok(ShiftConfig {
        steps,
        hold: duration(raw.hold, "hold", Duration::from_secs(300))?,
        min_served: in_range(raw.min_served, "min_served", 1..=1_000_000_000, 1)? as u64,
        order,
        calendar,
    })
}

pub(super) fn profile(raw: RawProfile) -> Result<ProfileConfig, Refusal> {
    let default = ProfileConfig::default();
    let span = raw.interval.as_ref().map_or(0..0, toml::Spanned::span);
    let interval = duration(raw.interval, "interval", default.interval)?;
    if interval < INTERVAL_MIN {
        return refuse(span, "interval is at least \"500ms\": asking more often would measure the asking");
    }
    Ok(ProfileConfig { interval, retention: duration(raw.retention, "retention", default.retention)? })
}
