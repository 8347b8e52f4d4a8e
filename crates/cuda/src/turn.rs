//! Whose turn it is to use a stream. While one thread records a pass, what others ask for would be recorded with it, so
//! they wait.

use std::sync::{Condvar, Mutex, MutexGuard};
use std::thread::{self, ThreadId};

/// Calls of all threads may be under way, or one thread's alone.
#[derive(Default)]
pub(crate) struct Turns {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Calls under way.
    calls: usize,
    /// The thread that has the stream to itself.
    alone: Option<ThreadId>,
}

/// A call under way.
pub(crate) struct Turn<'a>(&'a Turns);

/// The stream to oneself; calls of the same thread are free.
pub(crate) struct Alone<'a>(&'a Turns);

impl Turns {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while it is held")
    }

    /// Waits until no other thread has the stream to itself.
    pub(crate) fn begin(&self) -> Turn<'_> {
        let own = thread::current().id();
        let other = |state: &mut State| state.alone.is_some_and(|alone| alone != own);
        let mut state = self.changed.wait_while(self.state(), other).expect("no panic while it is held");
        state.calls += 1;
        Turn(self)
    }

    /// Waits until no call is under way; the thread itself must have none, or it waits for ever.
    pub(crate) fn alone(&self) -> Alone<'_> {
        let busy = |state: &mut State| state.calls > 0 || state.alone.is_some();
        let mut state = self.changed.wait_while(self.state(), busy).expect("no panic while it is held");
        state.alone = Some(thread::current().id());
        Alone(self)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.state().calls -= 1;
        self.0.changed.notify_all();
    }
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        self.0.state().alone = None;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn nobody_calls_while_one_is_alone() {
        let (turns, calls) = (Turns::default(), AtomicUsize::new(0));
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let _turn = turns.begin();
                        let _nested = turns.begin();
                        calls.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
            scope.spawn(|| {
                for _ in 0..200 {
                    let _alone = turns.alone();
                    let before = calls.load(Ordering::SeqCst);
                    let _own = turns.begin();
                    thread::yield_now();
                    assert_eq!(calls.load(Ordering::SeqCst), before);
                }
            });
        });
        assert_eq!(calls.into_inner(), 800);
    }
}
