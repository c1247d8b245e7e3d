//! Looks for known plaintext: in what a relay sees, where there must be none, and in the memory of an emulated guest,
//! where there must be, or the search would prove nothing.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use crate::error::{E2eError, OnFile, Result};

/// A search for several things at once.
#[derive(Clone, Debug, Default)]
pub struct Search {
    needles: Vec<Needle>,
    pattern: bool,
    bytes: u64,
}

#[derive(Clone, Debug)]
struct Needle {
    name: &'static str,
    bytes: Vec<u8>,
    /// How far a window may move, by its last byte (Horspool).
    steps: Vec<usize>,
    found: bool,
}

impl Search {
    /// For these, by name.
    pub fn new(needles: Vec<(&'static str, Vec<u8>)>) -> Self {
        Self {
            needles: needles.into_iter().map(Needle::new).collect(),
            pattern: false,
            bytes: 0,
        }
    }

    /// Looks through some bytes.
    pub fn look(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        for needle in self.needles.iter_mut().filter(|n| !n.found) {
            needle.found = needle.is_in(bytes);
        }
    }

    /// Looks whether a page (or a firmware packet that carries one) holds the guest's self-checking pattern.
    pub fn look_for_pattern(&mut self, page: Option<&[u8]>) {
        let Some(page) = page else { return };
        self.pattern |= [0, PACKET_HEADER]
            .iter()
            .any(|at| is_pattern(page.get(*at..).unwrap_or_default()));
    }

    /// Names of what was found.
    pub fn found(&self) -> Vec<&'static str> {
        let pattern = self.pattern.then_some(PATTERN);
        self.needles
            .iter()
            .filter(|n| n.found)
            .map(|n| n.name)
            .chain(pattern)
            .collect()
    }

    /// Bytes looked through.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// Looks through the guest memory that a VMM process holds (a memfd, reached through /proc).
pub fn look_through_guest(pid: u32, search: &mut Search) -> Result<()> {
    let mut file = File::open(guest_memory(pid)?).on("open", Path::new("the guest's memory"))?;
    let length = file
        .metadata()
        .on("read", Path::new("the guest's memory"))?
        .len();
    let mut offset = 0;
    let mut buffer = vec![0u8; CHUNK];
    // Pages that were never touched are holes.
    while let Some(start) = seek_data(&file, offset).filter(|start| *start < length) {
        file.seek(SeekFrom::Start(start))
            .on("read", Path::new("the guest's memory"))?;
        let read = file
            .read(&mut buffer)
            .on("read", Path::new("the guest's memory"))?;
        if read == 0 {
            break;
        }
        let bytes = buffer.get(..read).unwrap_or_default();
        search.look(bytes);
        bytes
            .chunks(PAGE)
            .for_each(|page| search.look_for_pattern(Some(page)));
        offset = start + read as u64;
    }
    Ok(())
}

fn guest_memory(pid: u32) -> Result<PathBuf> {
    let folder = PathBuf::from(format!("/proc/{pid}/fd"));
    let mut largest: Option<(u64, PathBuf)> = None;
    for entry in std::fs::read_dir(&folder).on("list", &folder)?.flatten() {
        let target = std::fs::read_link(entry.path()).unwrap_or_default();
        if target.to_string_lossy().starts_with("/memfd:") {
            let size = std::fs::metadata(entry.path())
                .map(|m| m.len())
                .unwrap_or(0);
            largest = largest.max(Some((size, entry.path())));
        }
    }
    let missing = || E2eError::Answer(format!("process {pid} holds no guest memory"));
    largest.map(|(_, path)| path).ok_or_else(missing)
}

fn seek_data(file: &File, offset: u64) -> Option<u64> {
    let offset = i64::try_from(offset).ok()?;
    let start = nix::unistd::lseek(file, offset, nix::unistd::Whence::SeekData).ok()?;
    debug_assert!(file.as_raw_fd() >= 0);
    u64::try_from(start).ok()
}

/// `casemate-guest` fills each page so: its index, its version, then words that grow by [`STEP`].
fn is_pattern(page: &[u8]) -> bool {
    let words: Vec<u64> = page
        .as_chunks::<8>()
        .0
        .iter()
        .take(8)
        .map(|word| u64::from_le_bytes(*word))
        .collect();
    let rest = words.get(2..).unwrap_or_default();
    rest.len() == 6
        && rest
            .iter()
            .zip(rest.iter().skip(1))
            .all(|(a, b)| b.wrapping_sub(*a) == STEP)
}

impl Needle {
    fn new((name, bytes): (&'static str, Vec<u8>)) -> Self {
        let mut steps = vec![bytes.len(); 256];
        for (at, byte) in bytes.iter().enumerate().take(bytes.len().saturating_sub(1)) {
            if let Some(step) = steps.get_mut(usize::from(*byte)) {
                *step = bytes.len() - 1 - at;
            }
        }
        Self {
            name,
            bytes,
            steps,
            found: false,
        }
    }

    fn is_in(&self, hay: &[u8]) -> bool {
        let length = self.bytes.len();
        let mut at = 0;
        while let Some(window) = hay.get(at..at + length) {
            if window == self.bytes {
                return true;
            }
            let last = window.last().copied().unwrap_or_default();
            at += self.steps.get(usize::from(last)).copied().unwrap_or(1);
        }
        false
    }
}

/// The name under which the workload's pattern is reported.
pub const PATTERN: &str = "workload pattern";
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
const PACKET_HEADER: usize = 52;
const PAGE: usize = 4096;
const CHUNK: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_needle_is_found_wherever_it_lies() {
        let search = Search::new(vec![("word", b"abcab".to_vec())]);
        for (hay, found) in [
            (&b"abcab"[..], true),
            (b"ababcab", true),
            (b"xxabcabxx", true),
            (b"abcaabcab", true),
            (b"abcacbab", false),
            (b"abca", false),
            (b"", false),
        ] {
            let mut search = search.clone();
            search.look(hay);
            assert_eq!(
                !search.found().is_empty(),
                found,
                "{}",
                String::from_utf8_lossy(hay)
            );
        }
    }

    #[test]
    fn the_workload_pattern_is_known_by_its_steps() {
        let words = (0..512u64).map(|i| {
            if i < 2 {
                i
            } else {
                STEP.wrapping_mul(i).wrapping_add(77)
            }
        });
        let page: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        let mut search = Search::default();
        search.look_for_pattern(Some(&[5; 4096]));
        search.look_for_pattern(Some(&[0; 4096]));
        search.look_for_pattern(None);
        assert!(search.found().is_empty());
        let packet = [vec![9; PACKET_HEADER], page].concat();
        search.look_for_pattern(Some(&packet));
        assert_eq!(search.found(), [PATTERN]);
    }
}
