//! The gate that holds new transactions during a cutover or a PAUSE: clients wait, running transactions end.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use tokio::sync::Notify;

/// One per database. A session enters before the first byte of a transaction is forwarded and leaves when the
/// transaction has ended.
#[derive(Debug, Default)]
pub struct Gate {
    closed: AtomicBool,
    active: AtomicUsize,
    opened: Notify,
    left: Notify,
}

impl Gate {
    /// Enters unless the gate is closed. The order (count first, then look) pairs with [`Gate::close`]
    /// (close first, then count): either the closer sees us or we see the closed gate.
    #[must_use]
    pub fn try_enter(&self) -> bool {
        self.active.fetch_add(1, Ordering::SeqCst);
        if !self.closed.load(Ordering::SeqCst) {
            return true;
        }
        self.leave();
        false
    }

    /// Leaves after [`Gate::try_enter`] returned true.
    pub fn leave(&self) {
        if self.active.fetch_sub(1, Ordering::SeqCst) == 1 && self.closed.load(Ordering::SeqCst) {
            self.left.notify_waiters();
        }
    }

    /// Waits until the gate is open. Cancel-safe.
    pub async fn wait_open(&self) {
        loop {
            let opened = self.opened.notified();
            if !self.is_closed() {
                return;
            }
            opened.await;
        }
    }

    /// Closes the gate: nobody enters from now on.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    /// Waits until everyone inside has left. Cancel-safe; call after [`Gate::close`].
    pub async fn drained(&self) {
        loop {
            let left = self.left.notified();
            if self.active() == 0 {
                return;
            }
            left.await;
        }
    }

    /// Opens the gate and wakes everyone who waits.
    pub fn open(&self) {
        self.closed.store(false, Ordering::SeqCst);
        self.opened.notify_waiters();
    }

    /// Closed now?
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Transactions inside.
    pub fn active(&self) -> usize {
        self.active.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{sync::Arc, time::Duration};

    #[tokio::test]
    async fn running_ones_end_and_new_ones_wait() {
        let gate = Arc::new(Gate::default());
        assert!(gate.try_enter());
        gate.close();
        assert!(!gate.try_enter());
        assert!(tokio::time::timeout(Duration::from_millis(20), gate.drained()).await.is_err());
        let waiting = tokio::spawn({
            let gate = gate.clone();
            async move {
                gate.wait_open().await;
                gate.try_enter()
            }
        });
        gate.leave();
        gate.drained().await;
        gate.open();
        assert!(waiting.await.unwrap());
        assert_eq!(gate.active(), 1);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn nobody_is_inside_after_a_drain() {
        let gate = Arc::new(Gate::default());
        let mut tasks = Vec::new();
        for _ in 0..8 {
            let gate = gate.clone();
            tasks.push(tokio::spawn(async move {
                for _ in 0..2000 {
                    while !gate.try_enter() {
                        gate.wait_open().await;
                    }
                    tokio::task::yield_now().await;
                    gate.leave();
                }
            }));
        }
        for _ in 0..50 {
            gate.close();
            gate.drained().await;
            // try_enter counts itself for a moment before it looks: what matters is that none stays
            assert!(!gate.try_enter());
            gate.open();
            tokio::task::yield_now().await;
        }
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(gate.active(), 0);
    }
}
