//! Gives a running guest the pages it waits for, and the others meanwhile.

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};

use casemate_crypto_migrate::guest::PAGE_SIZE;
use casemate_crypto_migrate::vault::Reader;

use crate::userfault::{Faults, Placed};
use crate::vmm::protocol::RoleError;

/// Serves the faults of one guest.
pub struct Pager<'a> {
    faults: Faults,
    snapshot: &'a Reader<'a, File>,
}

impl<'a> Pager<'a> {
    /// Nothing is served yet.
    pub fn new(faults: Faults, snapshot: &'a Reader<'a, File>) -> Self {
        Self { faults, snapshot }
    }

    /// Serves faults; once `running`, fills the rest meanwhile, and returns when nothing is missing any more.
    pub fn serve(
        &self,
        running: &AtomicBool,
        cancelled: impl Fn() -> bool,
    ) -> Result<(), RoleError> {
        let mut slice = vec![0u8; SLICE_PAGES as usize * PAGE_SIZE];
        while !running.load(Ordering::Acquire) {
            if cancelled() {
                return Err(given_up());
            }
            self.faults.wait(PATIENCE_MS)?;
            self.answer(&mut slice)?;
        }
        for (first, count) in self.snapshot.runs() {
            let mut page = first;
            while page < first + count {
                if cancelled() {
                    return Err(given_up());
                }
                self.answer(&mut slice)?;
                let pages = SLICE_PAGES.min(first + count - page);
                self.give(page, pages, &mut slice)?;
                page += pages;
            }
        }
        // What is missing now is zero, and the kernel's to give.
        Ok(self.faults.end()?)
    }

    /// All faults that wait.
    fn answer(&self, slice: &mut [u8]) -> Result<(), RoleError> {
        while let Some(page) = self.faults.next()? {
            if page >= self.snapshot.header().pages {
                return Err(RoleError::new(
                    "ROLE_PROTOCOL",
                    "a fault outside guest memory",
                ));
            }
            self.give(page, 1, slice)?;
        }
        Ok(())
    }

    fn give(&self, page: u64, pages: u64, slice: &mut [u8]) -> Result<(), RoleError> {
        let bytes = slice
            .get_mut(..pages as usize * PAGE_SIZE)
            .unwrap_or_default();
        self.snapshot.read(page, bytes)?;
        if self.faults.place(page, bytes)? == Placed::All {
            return Ok(());
        }
        // Some of them were asked for before: one by one then.
        for (page, bytes) in (page..).zip(bytes.chunks_exact(PAGE_SIZE)) {
            self.faults.place(page, bytes)?;
        }
        Ok(())
    }
}

fn given_up() -> RoleError {
    RoleError::new("CANCELLED", "the restore was given up")
}

const SLICE_PAGES: u64 = 64;
const PATIENCE_MS: u16 = 5;
