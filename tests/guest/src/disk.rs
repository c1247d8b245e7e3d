//! The disk workload: twice a second one block of `/dev/vda` is written through to the disk, after what was written
//! there before has been read back and verified.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::console::say;
use crate::pattern::{Block, PAGE, Page, boot_key};
use crate::state::State;
use crate::supervise::{self, lock};

/// Starts the workload, if there is a disk.
pub(crate) fn spawn(state: &Arc<State>) {
    let path = Path::new("/dev/vda");
    if !path.exists() {
        return;
    }
    match Disk::open(path) {
        Ok(disk) => {
            say!("disk /dev/vda {} positions", disk.versions.len());
            *lock(&state.disk) = Some(disk);
        }
        Err(error) => return say!("disk /dev/vda not used: {error}"),
    }
    let state = Arc::clone(state);
    supervise::spawn("disk", move || {
        loop {
            thread::sleep(PERIOD);
            if let Some(disk) = lock(&state.disk).as_mut() {
                let problem = disk.step().err();
                if problem.is_none() {
                    state.disk_writes.add(1);
                }
                report(&state, problem.as_slice());
            }
        }
    });
}

/// Counts the errors and prints the first few.
pub(crate) fn report(state: &State, problems: &[String]) {
    for problem in problems {
        if state.disk_errors.add(1) <= PRINTED_ERRORS {
            say!("DISK ERROR {problem}");
        }
    }
}

/// The disk, and which version each position must hold.
pub(crate) struct Disk {
    file: File,
    key: u64,
    /// The version last written to each position; 0 before the first write.
    versions: Vec<u64>,
    /// How many writes were begun.
    sequence: u64,
    page: Page,
    block: Box<Block>,
}

impl Disk {
    /// Opens it past the page cache (`O_DIRECT`), each write durable when it returns (`O_DSYNC`).
    fn open(path: &Path) -> io::Result<Self> {
        let flags = libc::O_DIRECT | libc::O_DSYNC | libc::O_CLOEXEC;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(path)?;
        Self::new(file)
    }

    fn new(mut file: File) -> io::Result<Self> {
        let blocks = file.seek(SeekFrom::End(0))? / PAGE as u64;
        let positions = (0..POSITIONS)
            .take_while(|position| block_of(*position) < blocks)
            .count();
        if positions == 0 {
            return Err(io::Error::other("smaller than two blocks"));
        }
        let block = Box::new(Block([0; PAGE]));
        Ok(Self {
            file,
            key: boot_key(),
            versions: vec![0; positions],
            sequence: 0,
            page: Page::ZERO,
            block,
        })
    }

    /// Verifies the next position and writes its next version. An error may leave the old version there.
    fn step(&mut self) -> Result<(), String> {
        let position = self.sequence % self.versions.len() as u64;
        self.sequence += 1;
        let verified = self.check(position);
        self.page.fill(self.key, block_of(position), self.sequence);
        self.page.to_bytes(&mut self.block);
        let offset = block_of(position) * PAGE as u64;
        let written = self
            .file
            .write_all_at(&self.block.0, offset)
            .map_err(|error| format!("write at {offset}: {error}"));
        if let (Ok(()), Some(version)) = (&written, self.versions.get_mut(position as usize)) {
            *version = self.sequence;
        }
        verified.and(written)
    }

    /// Verifies every position written so far; returns their number and what is wrong.
    pub(crate) fn verify(&mut self) -> (usize, Vec<String>) {
        let wrong: Vec<_> = (0..self.versions.len() as u64)
            .filter_map(|position| self.check(position).err())
            .collect();
        (
            self.versions.iter().filter(|version| **version > 0).count(),
            wrong,
        )
    }

    fn check(&mut self, position: u64) -> Result<(), String> {
        let version = self.versions.get(position as usize).copied().unwrap_or(0);
        if version == 0 {
            return Ok(());
        }
        let offset = block_of(position) * PAGE as u64;
        self.file
            .read_exact_at(&mut self.block.0, offset)
            .map_err(|error| format!("read at {offset}: {error}"))?;
        self.page.load(&self.block);
        self.page
            .check(self.key, block_of(position), version)
            .map_err(|mismatch| format!("block {mismatch}"))
    }
}

/// Positions, spread over the first 16 MiB; each comes round every half minute.
const POSITIONS: u64 = 64;
const STRIDE: u64 = 63;
const PERIOD: Duration = Duration::from_millis(500);
const PRINTED_ERRORS: u64 = 20;

/// The block of a position: never block 0, where a label may be.
fn block_of(position: u64) -> u64 {
    1 + position * STRIDE
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A scratch file that is removed at the end.
    struct Scratch(std::path::PathBuf);
    impl Scratch {
        fn new(name: &str, size: u64) -> (Self, File) {
            let path =
                std::env::temp_dir().join(format!("casemate-guest-{name}-{}", std::process::id()));
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .open(&path)
                .unwrap();
            file.set_len(size).unwrap();
            (Self(path), file)
        }
    }
    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    #[test]
    fn rounds_verify_and_block_0_stays() {
        let (scratch, file) = Scratch::new("rounds", 16 << 20);
        let mut disk = Disk::new(file).unwrap();
        assert_eq!(disk.versions.len(), 64);
        assert_eq!(disk.verify(), (0, vec![]));
        for _ in 0..150 {
            disk.step().unwrap();
        }
        assert_eq!(disk.verify(), (64, vec![]));
        let bytes = std::fs::read(&scratch.0).unwrap();
        assert_eq!(bytes.len(), 16 << 20);
        assert!(bytes[..PAGE].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_lost_write_is_found() {
        let (scratch, file) = Scratch::new("lost", 1 << 20);
        let mut disk = Disk::new(file).unwrap();
        disk.step().unwrap();
        let old = std::fs::read(&scratch.0).unwrap();
        for _ in 0..disk.versions.len() {
            disk.step().unwrap();
        }
        std::fs::write(&scratch.0, old).unwrap();
        let (checked, wrong) = disk.verify();
        assert_eq!(
            (checked, wrong.len()),
            (disk.versions.len(), disk.versions.len())
        );
        assert!(
            disk.step()
                .unwrap_err()
                .starts_with("block 64 version 2: found 0 version 0,")
        );
    }

    #[test]
    fn small_disks_are_used_or_refused() {
        let (_scratch, file) = Scratch::new("small", 64 * 4096 + 4096);
        assert_eq!(Disk::new(file).unwrap().versions.len(), 2);
        let (_scratch, file) = Scratch::new("tiny", 4096);
        assert!(Disk::new(file).is_err());
    }
}
