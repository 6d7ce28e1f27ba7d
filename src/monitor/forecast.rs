//! What the shadow's latency and load will be when it answers everything, from what was seen at the shares so far. Pure.
//!
//! A straight line through the logarithms of latency over the rate of reads, by least squares: queueing makes latency grow faster than
//! load, and the logarithm turns that into something near a line over the range that a ladder covers. The interval is that of a new
//! observation (Student's t), so it widens with the noise, with few points, and with the distance from what was seen. A load (cores,
//! sessions) is forecast by what each read costs, over the reverse of the rate: a fixed part and one per read.
//!
//! Where only one level of load was seen nothing is forecast: a line needs two.
//! Source: Draper and Smith, "Applied Regression Analysis", prediction of a new observation.

use serde::{Deserialize, Serialize};

/// Fewer points make no line.
pub const POINTS_MIN: usize = 6;
/// The busiest point must have this many times the reads of the quietest; else it is one level of load.
const SPREAD_MIN: f64 = 1.5;
/// Reads of a point; fewer have no percentile worth a line.
pub const READS_MIN: u64 = 20;
/// Normal quantile of the interval (90 %).
const QUANTILE: f64 = 1.644_854;

/// What was seen during a few seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Percent of the reads that the shadow answered or ran.
    pub share: f64,
    /// Reads per second that ran there.
    pub rate: f64,
    /// Reads per second that would run there at 100 %.
    pub all: f64,
    /// Reads behind the latencies.
    pub reads: u64,
    /// Median on the shadow, in microseconds.
    pub p50_us: u64,
    /// 99th percentile.
    pub p99_us: u64,
    /// Sessions that ran a statement there.
    pub active: f64,
    /// Processor cores in use there; `None`: not to be seen.
    pub cores: Option<f64>,
}

/// A value and where it may lie.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// The line's.
    pub value: f64,
    /// 5 % lie below.
    pub low: f64,
    /// 5 % lie above.
    pub high: f64,
}

impl Interval {
    /// Whether the truth lies in it.
    pub fn holds(&self, truth: f64) -> bool {
        (self.low..=self.high).contains(&truth)
    }
}

/// A forecast.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Forecast {
    /// Percent that it is for.
    pub share: f64,
    /// Reads per second at that share.
    pub rate: f64,
    /// Median, in microseconds.
    pub p50_us: Interval,
    /// 99th percentile, in microseconds.
    pub p99_us: Interval,
    /// Sessions that run a statement.
    pub active: Interval,
    /// Processor cores in use; `None`: not to be seen.
    pub cores: Option<Interval>,
    /// Points it rests on.
    pub points: u64,
    /// How many times the busiest point's rate it goes beyond what was seen; below 1: within.
    pub beyond: f64,
}

/// Forecasts for a share in percent.
///
/// # Errors
/// What is missing, for people.
pub fn forecast(points: &[Point], share: f64) -> Result<Forecast, String> {
    let usable: Vec<&Point> = points.iter().filter(|point| point.reads >= READS_MIN && point.rate > 0.0).collect();
    if usable.len() < POINTS_MIN {
        return Err(format!("{} of {POINTS_MIN} observations with {READS_MIN} reads and more so far", usable.len()));
    }
    let rates = || usable.iter().map(|point| point.rate);
    let (least, most) = (rates().fold(f64::INFINITY, f64::min), rates().fold(0.0, f64::max));
    if most < least * SPREAD_MIN {
        return Err(format!(
            "one level of load so far ({least:.0} to {most:.0} reads/s): a second share is needed (SHIFT START, or SET sample_reads)"
        ));
    }
    let everything = usable.iter().map(|point| point.all).sum::<f64>() / usable.len() as f64;
    let rate = (everything * share / 100.0).max(f64::MIN_POSITIVE);
    let line = |value: &dyn Fn(&Point) -> f64| {
        let points: Vec<(f64, f64)> = usable.iter().map(|point| (point.rate, value(point))).collect();
        predict(&points, rate)
    };
    let latency = |micros: &dyn Fn(&Point) -> u64| {
        let logs = line(&|point| (micros(point).max(1) as f64).ln());
        Interval { value: logs.value.exp(), low: logs.low.exp(), high: logs.high.exp() }
    };
    // what a read costs, over the reads: the noise of a load grows with it
    let load = |value: &dyn Fn(&Point) -> f64| {
        let points: Vec<(f64, f64)> = usable.iter().map(|point| (1.0 / point.rate, value(point) / point.rate)).collect();
        let each = predict(&points, 1.0 / rate);
        let all = |each: f64| (each * rate).max(0.0);
        Interval { value: all(each.value), low: all(each.low), high: all(each.high) }
    };
    let seen = usable.iter().all(|point| point.cores.is_some());
    Ok(Forecast {
        share,
        rate,
        p50_us: latency(&|point| point.p50_us),
        p99_us: latency(&|point| point.p99_us),
        active: load(&|point| point.active),
        cores: seen.then(|| load(&|point| point.cores.unwrap_or(0.0))),
        points: usable.len() as u64,
        beyond: rate / most,
    })
}

/// Ordinary least squares at `x`, with the interval of a new observation. At least three points, not all at one place.
fn predict(points: &[(f64, f64)], x: f64) -> Interval {
    let n = points.len() as f64;
    let (mean_x, mean_y) = (points.iter().map(|point| point.0).sum::<f64>() / n, points.iter().map(|point| point.1).sum::<f64>() / n);
    let spread: f64 = points.iter().map(|point| (point.0 - mean_x).powi(2)).sum();
    let together: f64 = points.iter().map(|point| (point.0 - mean_x) * (point.1 - mean_y)).sum();
    let slope = together / spread;
    let at = |x: f64| mean_y + slope * (x - mean_x);
    let freedom = n - 2.0;
    let rest = (points.iter().map(|point| (point.1 - at(point.0)).powi(2)).sum::<f64>() / freedom).sqrt();
    let half = student(freedom) * rest * (1.0 + 1.0 / n + (x - mean_x).powi(2) / spread).sqrt();
    Interval { value: at(x), low: at(x) - half, high: at(x) + half }
}

/// The quantile of Student's t (Cornish and Fisher's expansion: 1 % off at 3 degrees of freedom, nothing at 10).
fn student(freedom: f64) -> f64 {
    let z = QUANTILE;
    let first = (z.powi(3) + z) / 4.0;
    let second = (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / 96.0;
    z + first / freedom + second / freedom.powi(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server with a limit of 1,000 reads/s, seen at a share of 200 reads/s, with noise.
    fn seen(chance: &mut fastrand::Rng, share: f64, limit: f64) -> Point {
        let rate = 2.0 * share * (0.95 + chance.f64() / 10.0);
        let latency = 1_000.0 / (1.0 - rate / limit) * (0.9 + chance.f64() / 5.0);
        Point {
            share,
            rate,
            all: 200.0,
            reads: (rate * 5.0) as u64,
            p50_us: latency as u64,
            p99_us: (latency * 5.0) as u64,
            active: rate * latency / 1e6,
            cores: Some(rate / 500.0 * (0.9 + chance.f64() / 5.0)),
        }
    }

    #[test]
    fn the_truth_lies_in_the_interval_nine_times_of_ten() {
        let mut held = (0, 0);
        for seed in 0..200 {
            let mut chance = fastrand::Rng::with_seed(seed);
            let points: Vec<Point> = [10.0, 25.0, 50.0]
                .iter()
                .flat_map(|share| (0..8).map(move |_| *share))
                .map(|share| seen(&mut chance, share, 1_000.0))
                .collect();
            let forecast = forecast(&points, 100.0).unwrap();
            let truth = seen(&mut chance, 100.0, 1_000.0);
            held.0 += u32::from(forecast.p99_us.holds(truth.p99_us as f64));
            held.1 += u32::from(forecast.cores.unwrap().holds(truth.cores.unwrap()));
            assert!((forecast.rate - 200.0).abs() < 1.0 && forecast.beyond > 1.5, "{forecast:?}");
        }
        assert!(held.0 >= 165 && held.1 >= 165, "held {held:?} of 200");
    }

    #[test]
    fn the_interval_widens_with_the_distance() {
        let mut chance = fastrand::Rng::with_seed(7);
        let points: Vec<Point> = [1.0, 5.0]
            .iter()
            .flat_map(|share| (0..8).map(move |_| *share))
            .map(|share| Point { reads: 100, ..seen(&mut chance, share, 1_000.0) })
            .collect();
        let width = |share: f64| forecast(&points, share).map(|found| (found.p99_us.high / found.p99_us.low).ln()).unwrap();
        assert!(width(5.0) < width(50.0) && width(50.0) < width(100.0));
    }

    #[test]
    fn what_is_missing_is_said() {
        assert!(forecast(&[], 100.0).unwrap_err().contains("0 of 6"));
        let same = vec![Point { rate: 10.0, reads: 50, all: 100.0, p50_us: 1, p99_us: 1, ..Point::default() }; 20];
        assert!(forecast(&same, 100.0).unwrap_err().contains("one level of load"));
        let few = vec![Point { rate: 10.0, reads: READS_MIN - 1, ..Point::default() }; 20];
        assert!(forecast(&few, 100.0).is_err());
    }

    #[test]
    fn quantiles_of_student() {
        for (freedom, expected) in [(4.0, 2.132), (10.0, 1.812), (30.0, 1.697)] {
            assert!((student(freedom) - expected).abs() < 0.02, "{freedom}: {}", student(freedom));
        }
    }
}
