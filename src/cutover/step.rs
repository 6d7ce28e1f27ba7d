//! The steps, in order, and which side of the point of no return each is on.

/// One step of a cutover or rollback.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// Slot and capture for the opposite feed on the next owner.
    ArmOppositeFeed,
    /// Sessions open connections to the next owner.
    ArmSessions,
    /// The feed is at most a moment behind.
    CatchUp,
    /// New transactions wait; running ones end.
    Hold,
    /// The old owner refuses other writers: read-only default, tables locked.
    Fence,
    /// A marker behind the last write has been applied on the next owner.
    Marker,
    /// Sequences are carried over.
    Sequences,
    /// A marker from which the opposite feed will apply.
    OppositeMarker,
    /// The point of no return: the repository names the next owner.
    Flip,
    /// Clients go on at the new owner.
    Release,
    /// Connections of others to the old owner are ended.
    Expel,
    /// No foreign commit lies behind the marker.
    Prove,
    /// The feed that is no longer needed is removed.
    StopFeed,
    /// The opposite feed applies.
    StartOppositeFeed,
    /// Done.
    Done,
}

impl Step {
    /// All, in order.
    pub const ALL: [Step; 15] = [
        Step::ArmOppositeFeed,
        Step::ArmSessions,
        Step::CatchUp,
        Step::Hold,
        Step::Fence,
        Step::Marker,
        Step::Sequences,
        Step::OppositeMarker,
        Step::Flip,
        Step::Release,
        Step::Expel,
        Step::Prove,
        Step::StopFeed,
        Step::StartOppositeFeed,
        Step::Done,
    ];

    /// Name in the journal and for people.
    pub fn name(self) -> &'static str {
        match self {
            Step::ArmOppositeFeed => "arm opposite feed",
            Step::ArmSessions => "arm sessions",
            Step::CatchUp => "catch up",
            Step::Hold => "hold",
            Step::Fence => "fence",
            Step::Marker => "marker applied",
            Step::Sequences => "sequences",
            Step::OppositeMarker => "opposite marker",
            Step::Flip => "flipped",
            Step::Release => "release",
            Step::Expel => "expel",
            Step::Prove => "prove",
            Step::StopFeed => "stop feed",
            Step::StartOppositeFeed => "start opposite feed",
            Step::Done => "done",
        }
    }

    /// What it does, for a dry run.
    pub fn describe(self) -> &'static str {
        match self {
            Step::ArmOppositeFeed => "create publication, schema capture and slot for the way back on the next owner",
            Step::ArmSessions => "let every session open its connection to the next owner",
            Step::CatchUp => "wait until the feed is no more than a moment behind",
            Step::Hold => "let new transactions wait and running ones end",
            Step::Fence => "make the old owner read-only for others and lock its tables",
            Step::Marker => "write a marker behind the last write and wait until the next owner has applied it",
            Step::Sequences => "carry the sequences over",
            Step::OppositeMarker => "write the marker from which the way back applies",
            Step::Flip => "POINT OF NO RETURN: store the new owner",
            Step::Release => "let the clients go on at the new owner",
            Step::Expel => "end other connections to the old owner",
            Step::Prove => "prove that nobody wrote behind the marker",
            Step::StopFeed => "remove the feed that is no longer needed",
            Step::StartOppositeFeed => "start the way back",
            Step::Done => "done",
        }
    }

    /// From here on a cutover is finished, not undone.
    pub fn is_past_the_point_of_no_return(self) -> bool {
        self >= Step::Flip
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_is_the_journal_order_and_the_owner_flips_once() {
        assert!(Step::ALL.windows(2).all(|pair| pair[0] < pair[1]));
        let past: Vec<_> = Step::ALL.iter().map(|step| step.is_past_the_point_of_no_return()).collect();
        assert_eq!(past.iter().filter(|past| !**past).count(), 8);
        assert!(past.is_sorted());
    }
}
