//! Where a CancelRequest finds a session when its own server knows of no statement: held at the gate, or asking a shadow.

use std::sync::atomic::{AtomicU8, Ordering};

const NOWHERE: u8 = 0;
const CANCELLED: u8 = 1;

/// Where a request of the client is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Place {
    /// In the session's own buffer.
    Gate = 2,
    /// On a shadow, which answers for the owner.
    Shadow = 4,
}

/// One value, so that a cancel meets the request that was waiting, or none: never the next one.
#[derive(Debug, Default)]
pub struct Cancelling(AtomicU8);

impl Cancelling {
    /// The session's: a request waits there.
    pub fn begin(&self, place: Place) {
        self.0.store(place as u8, Ordering::SeqCst);
    }

    /// The session's: it waits no longer. True: it shall not be carried out.
    pub fn end(&self) -> bool {
        self.0.swap(NOWHERE, Ordering::SeqCst) & CANCELLED != 0
    }

    /// Asks that what waits is given up. `None`: nothing does.
    pub fn ask(&self) -> Option<Place> {
        [Place::Gate, Place::Shadow].into_iter().find(|place| {
            let (waits, asked) = (*place as u8, *place as u8 | CANCELLED);
            self.0.compare_exchange(waits, asked, Ordering::SeqCst, Ordering::SeqCst).is_ok() || self.0.load(Ordering::SeqCst) == asked
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cancel_meets_what_waits_or_nothing() {
        let cancelling = Cancelling::default();
        assert_eq!(cancelling.ask(), None);
        for place in [Place::Gate, Place::Shadow] {
            cancelling.begin(place);
            assert!(!cancelling.end(), "nobody asked");
            assert_eq!(cancelling.ask(), None, "too late");
            cancelling.begin(place);
            assert_eq!((cancelling.ask(), cancelling.ask()), (Some(place), Some(place)), "twice is once");
            assert!(cancelling.end());
            cancelling.begin(place);
            assert!(!cancelling.end(), "the next one is not concerned");
        }
    }
}
