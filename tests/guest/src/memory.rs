//! The memory workload: a region rewritten round-robin, each page verified right before.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::boot;
use crate::console::say;
use crate::pattern::{Mismatch, Page, boot_key};
use crate::state::State;
use crate::supervise::{self, lock};

/// Fills the region, then rewrites `pages_per_tick` pages every 100 ms.
pub(crate) fn spawn(state: &Arc<State>, dirty_mib: u32, pages_per_tick: u32) {
    let half = u32::try_from(boot::memory_mib() / 2).unwrap_or(u32::MAX);
    let mib = dirty_mib.min(half);
    if mib < dirty_mib {
        say!("memory: {dirty_mib} MiB are more than half of all, taking {mib}");
    }
    if mib == 0 {
        return;
    }
    let pages = mib as usize * PAGES_PER_MIB;
    let per_tick = pages.min(pages_per_tick as usize);
    let state = Arc::clone(state);
    supervise::spawn("memory", move || {
        lock(&state.region).get_or_insert_with(|| Region::new(pages, boot_key()));
        loop {
            thread::sleep(PERIOD);
            if let Some(region) = lock(&state.region).as_mut() {
                let errors = region.advance(per_tick);
                state.pages_dirtied.add(per_tick as u64);
                state
                    .pattern_rounds
                    .add(region.rounds() - state.pattern_rounds.get());
                report(&state, &errors);
            }
        }
    });
}

/// Counts the errors and prints the first few.
pub(crate) fn report(state: &State, errors: &[Mismatch]) {
    for error in errors {
        if state.pattern_errors.add(1) <= PRINTED_ERRORS {
            say!("PATTERN ERROR page {error}");
        }
    }
}

/// Memory under the pattern. Which version a page must have follows from how far the rewriting has come.
pub(crate) struct Region {
    pages: Vec<Page>,
    key: u64,
    /// Version of the pages before `cursor`; those from `cursor` on have one less.
    round: u64,
    cursor: usize,
}

impl Region {
    /// A region whose pages are all in version 1.
    fn new(pages: usize, key: u64) -> Self {
        let mut region = Self {
            pages: vec![Page::ZERO; pages],
            key,
            round: 2,
            cursor: 0,
        };
        for (index, page) in (0..).zip(&mut region.pages) {
            page.fill(key, index, 1);
        }
        region
    }

    /// Complete rewrites so far.
    fn rounds(&self) -> u64 {
        self.round - 2
    }

    /// Verifies and rewrites the next pages; returns those that were wrong.
    fn advance(&mut self, count: usize) -> Vec<Mismatch> {
        let mut errors = Vec::new();
        for _ in 0..count {
            if self.cursor >= self.pages.len() {
                self.cursor = 0;
                self.round += 1;
            }
            if let Some(page) = self.pages.get_mut(self.cursor) {
                let index = self.cursor as u64;
                errors.extend(page.check(self.key, index, self.round - 1).err());
                page.fill(self.key, index, self.round);
            }
            self.cursor += 1;
        }
        errors
    }

    /// Verifies every page; returns their number and those that are wrong.
    pub(crate) fn verify(&self) -> (usize, Vec<Mismatch>) {
        let wrong = (0..).zip(&self.pages).filter_map(|(index, page)| {
            let version = if index < self.cursor as u64 {
                self.round
            } else {
                self.round - 1
            };
            page.check(self.key, index, version).err()
        });
        (self.pages.len(), wrong.collect())
    }
}

const PERIOD: Duration = Duration::from_millis(100);
const PAGES_PER_MIB: usize = 256;
const PRINTED_ERRORS: u64 = 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_stays_right_through_rounds() {
        let mut region = Region::new(10, 1);
        for step in 1..=15 {
            assert!(region.advance(3).is_empty());
            assert_eq!(region.verify(), (10, vec![]), "step {step}");
        }
        assert_eq!(region.rounds(), 4); // 45 pages: four complete rounds and a half
    }

    #[test]
    fn a_stale_page_is_found_once_by_the_workload_and_by_verify() {
        let mut region = Region::new(10, 1);
        let stale = region.pages[4].clone();
        region.advance(6);
        region.pages[4] = stale;
        assert_eq!(region.verify().1.len(), 1);
        assert_eq!(region.advance(10).len(), 1);
        assert!(region.verify().1.is_empty());
    }

    #[test]
    fn swapped_pages_are_found() {
        let mut region = Region::new(10, 1);
        region.pages.swap(2, 7);
        assert_eq!(region.verify().1.len(), 2);
    }
}
