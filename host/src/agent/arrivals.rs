//! Moves in that are under way, by guest: one at a time, and one that its source asks about can be ended before it has taken
//! the guest over, and not afterwards.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::agent::api::Failure;
use crate::agent::mover_process::MoverProcess;
use crate::agent::vmm_process::lock;

/// All of them.
#[derive(Default)]
pub struct Arrivals {
    all: Mutex<BTreeMap<String, One>>,
    /// One of them has ended.
    ended: Condvar,
}

struct One {
    /// The peer's name.
    peer: String,
    mover: Arc<MoverProcess>,
    stage: Stage,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The guest is being built and filled.
    Filling,
    /// This host's record says that the guest is its own.
    TakenOver,
    /// Its source gave it up, or was told that this host will never have it.
    Ended,
}

/// An entry; it ends with this value.
pub struct UnderWay<'a> {
    arrivals: &'a Arrivals,
    name: String,
}

impl Arrivals {
    /// A guest is being taken in. Whoever offers it anew has given up what it had begun before.
    pub fn begin(
        &self,
        name: &str,
        peer: &str,
        mover: &Arc<MoverProcess>,
    ) -> Result<UnderWay<'_>, Failure> {
        let mut all = lock(&self.all);
        if let Some(one) = all.get_mut(name).filter(|one| one.peer == peer) {
            one.end();
            let under_way = |all: &mut BTreeMap<_, _>| all.contains_key(name);
            let waited = self.ended.wait_timeout_while(all, END_TIME, under_way);
            all = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        if all.contains_key(name) {
            let text = format!("a guest {name} is being moved here already");
            return Err(Failure::new("ALREADY_HERE", text));
        }
        let one = One {
            peer: peer.to_owned(),
            mover: Arc::clone(mover),
            stage: Stage::Filling,
        };
        all.insert(name.to_owned(), one);
        Ok(UnderWay {
            arrivals: self,
            name: name.to_owned(),
        })
    }

    /// Ends the move of a guest for whoever it comes from; an error if it is too late, or if it comes from another.
    pub fn end_for(&self, name: &str, peer: &str) -> Result<(), Failure> {
        let mut all = lock(&self.all);
        let Some(one) = all.get_mut(name) else {
            return Ok(());
        };
        let later = |text: String| Err(Failure::new("SETTLE_LATER", text));
        if one.peer != peer {
            return later(format!("{name} is being moved here by another host"));
        }
        match one.end() {
            true => Ok(()),
            false => later(format!(
                "{name} is being taken over at this moment; ask again"
            )),
        }
    }
}

impl One {
    /// Ends it, unless it is too late.
    fn end(&mut self) -> bool {
        if self.stage == Stage::Filling {
            self.stage = Stage::Ended;
            self.mover.end();
        }
        self.stage == Stage::Ended
    }
}

impl UnderWay<'_> {
    /// This host takes the guest over by `record`, unless the source was told that it never will.
    pub fn take_over(&self, record: impl FnOnce() -> Result<(), Failure>) -> Result<(), Failure> {
        let mut all = lock(&self.arrivals.all);
        let one = all
            .get_mut(&self.name)
            .filter(|one| one.stage == Stage::Filling);
        let Some(one) = one else {
            let text = format!(
                "the source of {} was told that this host does not have it",
                self.name
            );
            return Err(Failure::new("EPOCH_FENCED", text));
        };
        record()?;
        one.stage = Stage::TakenOver;
        Ok(())
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        lock(&self.arrivals.all).remove(&self.name);
        self.arrivals.ended.notify_all();
    }
}

/// How long the machine of a move that was ended may take to go.
const END_TIME: Duration = Duration::from_secs(5);
