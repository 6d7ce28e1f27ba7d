//! When the ladder may climb: hours of the week in a time zone that the file names. Time is an argument.

use jiff::{Timestamp, civil::Weekday, tz::TimeZone};
use serde::{Serialize, Serializer};

const MINUTES_PER_DAY: u16 = 24 * 60;
const DAYS: [(&str, Weekday); 7] = [
    ("mon", Weekday::Monday),
    ("tue", Weekday::Tuesday),
    ("wed", Weekday::Wednesday),
    ("thu", Weekday::Thursday),
    ("fri", Weekday::Friday),
    ("sat", Weekday::Saturday),
    ("sun", Weekday::Sunday),
];

/// Hours of some days, such as `mon-fri 22:00-05:00`; those that go past midnight belong to the day on which they begin.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Hours {
    text: String,
    /// From Monday.
    days: [bool; 7],
    from: u16,
    to: u16,
}

impl Hours {
    fn parse(text: &str) -> Option<Hours> {
        let (days, hours) = text.trim().rsplit_once(' ').unwrap_or(("daily", text.trim()));
        let (from, to) = hours.split_once('-')?;
        let (from, to) = (minute(from)?, minute(to)?);
        if from == to || from == MINUTES_PER_DAY {
            return None;
        }
        Some(Hours { text: text.trim().to_owned(), days: parse_days(days)?, from, to })
    }

    /// `day`: from Monday.
    fn holds(&self, day: usize, minute: u16) -> bool {
        let on = |day: usize| self.days.get(day % 7).copied().unwrap_or(false);
        if self.from < self.to {
            return on(day) && (self.from..self.to).contains(&minute);
        }
        on(day) && minute >= self.from || on(day + 6) && minute < self.to
    }
}

fn minute(text: &str) -> Option<u16> {
    let (hour, minute) = text.trim().split_once(':')?;
    let two_digits = |text: &str| text.parse::<u16>().ok().filter(|_| text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_digit()));
    let (hour, minute) = (two_digits(hour)?, two_digits(minute)?);
    (minute < 60 && hour * 60 + minute <= MINUTES_PER_DAY).then_some(hour * 60 + minute)
}

fn parse_days(text: &str) -> Option<[bool; 7]> {
    let day = |word: &str| DAYS.iter().position(|(name, _)| word.trim().eq_ignore_ascii_case(name));
    if text.trim().eq_ignore_ascii_case("daily") {
        return Some([true; 7]);
    }
    let mut days = [false; 7];
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (day(first)?, day(last)?);
        for step in 0..=(last + 7 - first) % 7 {
            *days.get_mut((first + step) % 7)? = true;
        }
    }
    Some(days)
}

/// `shift.allow`, `shift.quiet` and `shift.timezone`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Calendar {
    zone: TimeZone,
    zone_name: String,
    allow: Vec<Hours>,
    quiet: Vec<Hours>,
}

impl Default for Calendar {
    /// At any time.
    fn default() -> Self {
        Calendar { zone: TimeZone::UTC, zone_name: "UTC".into(), allow: Vec::new(), quiet: Vec::new() }
    }
}

impl Calendar {
    /// From what was typed.
    ///
    /// # Errors
    /// What is wrong with it, for the file's author.
    pub fn new(zone: Option<&str>, allow: &[String], quiet: &[String]) -> Result<Calendar, String> {
        if zone.is_none() && !(allow.is_empty() && quiet.is_empty()) {
            return Err("allow and quiet need a timezone, such as timezone = \"Europe/Zurich\" or \"UTC\"".into());
        }
        let zone_name = zone.unwrap_or("UTC").to_owned();
        let zone = if zone_name.eq_ignore_ascii_case("UTC") {
            TimeZone::UTC
        } else {
            TimeZone::get(&zone_name).map_err(|_| {
                format!("there is no time zone \"{zone_name}\" on this machine: names are those of /usr/share/zoneinfo (package tzdata), such as \"Europe/Zurich\", or \"UTC\"")
            })?
        };
        let parse = |texts: &[String]| -> Result<Vec<Hours>, String> {
            texts
                .iter()
                .map(|text| Hours::parse(text).ok_or_else(|| format!("\"{text}\" is not understood: hours are written like \"mon-fri 22:00-05:00\", \"sat,sun 00:00-24:00\" or \"daily 01:00-05:00\"")))
                .collect()
        };
        Ok(Calendar { zone, zone_name, allow: parse(allow)?, quiet: parse(quiet)? })
    }

    /// Why no step may be taken at this time; `None`: it may.
    pub fn closed(&self, now: Timestamp) -> Option<String> {
        if self.allow.is_empty() && self.quiet.is_empty() {
            return None;
        }
        let local = now.to_zoned(self.zone.clone());
        let day = DAYS.iter().position(|(_, day)| *day == local.weekday()).unwrap_or(0);
        let minute = u16::try_from(i32::from(local.hour()) * 60 + i32::from(local.minute())).unwrap_or(0);
        let clock =
            format!("{} {:02}:{:02} in {}", DAYS.get(day).map_or("", |(name, _)| name), local.hour(), local.minute(), self.zone_name);
        if let Some(hours) = self.quiet.iter().find(|hours| hours.holds(day, minute)) {
            return Some(format!("quiet hours \"{}\" (it is {clock})", hours.text));
        }
        if self.allow.is_empty() || self.allow.iter().any(|hours| hours.holds(day, minute)) {
            return None;
        }
        let texts: Vec<&str> = self.allow.iter().map(|hours| hours.text.as_str()).collect();
        Some(format!("steps are allowed at \"{}\" only (it is {clock})", texts.join("\", \"")))
    }
}

impl Serialize for Calendar {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let texts = |hours: &[Hours]| hours.iter().map(|hours| hours.text.clone()).collect::<Vec<_>>();
        (&self.zone_name, texts(&self.allow), texts(&self.quiet)).serialize(serializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn texts(list: &[&str]) -> Vec<String> {
        list.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn hours_of_the_week_in_a_zone_with_summer_time() {
        let calendar = Calendar::new(Some("Europe/Zurich"), &texts(&["mon-fri 22:00-05:00"]), &texts(&["daily 02:00-02:30"])).unwrap();
        for (time, open) in [
            ("2026-11-23T20:59:00Z", false), // Monday 21:59, winter: UTC+1
            ("2026-11-23T21:00:00Z", true),
            ("2026-11-24T00:59:00Z", true),
            ("2026-11-24T01:15:00Z", false), // 02:15: quiet
            ("2026-11-24T03:59:00Z", true),
            ("2026-11-24T04:00:00Z", false),
            ("2026-07-06T20:00:00Z", true),  // Monday 22:00, summer: UTC+2
            ("2026-11-28T02:00:00Z", true),  // Saturday 03:00 belongs to Friday's night
            ("2026-11-28T22:00:00Z", false), // Saturday's own does not exist
            ("2026-11-23T02:00:00Z", false), // Monday 03:00 belongs to Sunday
        ] {
            assert_eq!(calendar.closed(at(time)).is_none(), open, "{time}: {:?}", calendar.closed(at(time)));
        }
        assert!(calendar.closed(at("2026-11-23T12:00:00Z")).unwrap().contains("mon 13:00 in Europe/Zurich"));
        assert_eq!(Calendar::default().closed(at("2026-11-23T12:00:00Z")), None);
        let weekend = Calendar::new(Some("UTC"), &[], &texts(&["fri-mon 00:00-24:00"])).unwrap();
        assert!(weekend.closed(at("2026-11-22T23:59:59Z")).is_some() && weekend.closed(at("2026-11-24T00:00:00Z")).is_none());
    }

    #[test]
    fn what_is_wrong_is_said() {
        assert!(Calendar::new(None, &texts(&["daily 01:00-02:00"]), &[]).unwrap_err().contains("timezone"));
        assert!(Calendar::new(Some("Mars/Base"), &[], &[]).unwrap_err().contains("zoneinfo"));
        for text in
            ["", "mon", "mon 9:00-10:00", "mon 10:00-10:00", "mon 24:00-25:00", "someday 01:00-02:00", "mon 10:60-11:00", "mon 10-11"]
        {
            assert!(Calendar::new(Some("UTC"), &texts(&[text]), &[]).unwrap_err().contains("mon-fri 22:00-05:00"), "{text}");
        }
    }
}
