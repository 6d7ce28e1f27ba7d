//! Who decides: the policy by itself, or a person. Pure.

/// What a proposal is, as far as the policy is concerned.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Case {
    /// 0 to 1.
    pub confidence: f64,
    /// Destroys data on the other side, or cannot be undone.
    pub loses_data: bool,
    /// There is something to run.
    pub has_sql: bool,
}

/// A proposal runs without a person only when it keeps all data, says what to run, and is at least as sure as the operator asks for.
pub fn automatic(case: Case, auto_approve: f64) -> bool {
    case.has_sql && !case.loses_data && case.confidence.is_finite() && case.confidence >= auto_approve
}

/// Independent reasons for doubt multiply; the reasons are joined into one line.
pub fn combine(parts: &[(f64, String)]) -> (f64, String) {
    let confidence = parts.iter().map(|(certainty, _)| certainty.clamp(0.0, 1.0)).product::<f64>();
    let why = parts.iter().map(|(_, why)| why.as_str()).filter(|why| !why.is_empty()).collect::<Vec<_>>().join("; ");
    ((confidence * 1000.0).round() / 1000.0, why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_policy() {
        let sure = Case { confidence: 0.99, loses_data: false, has_sql: true };
        for (case, auto_approve, expected) in [
            (sure, 0.95, true),
            (sure, 1.0, false),
            (Case { confidence: 0.95, ..sure }, 0.95, true),
            (Case { confidence: 0.949, ..sure }, 0.95, false),
            (Case { loses_data: true, ..sure }, 0.0, false),
            (Case { has_sql: false, ..sure }, 0.0, false),
            (Case { confidence: f64::NAN, ..sure }, 0.0, false),
        ] {
            assert_eq!(automatic(case, auto_approve), expected, "{case:?} {auto_approve}");
        }
    }

    proptest! {
        #[test]
        fn doubt_never_raises_confidence(parts in proptest::collection::vec(0.0f64..1.0, 1..5)) {
            let named: Vec<_> = parts.iter().map(|part| (*part, "x".to_owned())).collect();
            let least = parts.iter().copied().fold(1.0, f64::min);
            prop_assert!(combine(&named).0 <= least + 0.001);
        }
    }
}
