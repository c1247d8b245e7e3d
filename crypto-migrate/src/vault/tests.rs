//! A snapshot opens untouched, and each way of touching it has its own code.

use std::sync::Mutex;

use super::*;
use crate::guest::PAGE_SIZE;

struct Memory(Mutex<Vec<u8>>);

impl Memory {
    fn new(bytes: Vec<u8>) -> Self {
        Self(Mutex::new(bytes))
    }
}

impl Storage for Memory {
    fn size(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().len() as u64)
    }
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let bytes = self.0.lock().unwrap();
        let at = offset as usize;
        let from = bytes.get(at..at + into.len());
        into.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
    fn write_at(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        let mut bytes = self.0.lock().unwrap();
        let end = offset as usize + from.len();
        let size = bytes.len().max(end);
        bytes.resize(size, 0);
        bytes[offset as usize..end].copy_from_slice(from);
        Ok(())
    }
}

const SECRET: [u8; 32] = [9; 32];

fn facts(snapshot: u8, generation: u64) -> Facts {
    Facts {
        snapshot_id: [snapshot; 16],
        vm_id: [2; 16],
        generation,
        pages: 1000,
    }
}

/// Pages 3, 4, 5 and 900 hold their number.
fn snapshot(facts: Facts) -> Vec<u8> {
    let storage = Memory::new(Vec::new());
    let mut writer = Writer::new(&storage, &SECRET, facts).unwrap();
    for page in [3, 4, 5, 6, 900] {
        let value = if page == 6 { 0 } else { page as u8 };
        writer.page(page, &[value; PAGE_SIZE]).unwrap();
    }
    writer.finish(b"a guest", b"its state").unwrap();
    storage.0.into_inner().unwrap()
}

/// Opens it, and every page.
fn code(bytes: &[u8]) -> &'static str {
    let storage = Memory::new(bytes.to_vec());
    let all = || {
        let reader = Reader::open(&storage, &SECRET)?;
        let mut page = [0; PAGE_SIZE];
        (0..1000).try_for_each(|n| reader.read(n, &mut page))
    };
    all().map_or_else(|e: VaultError| e.code(), |()| "OK")
}

fn pages_of(count: u64) -> usize {
    4096 + count as usize * PAGE_SIZE
}

#[test]
fn an_untouched_snapshot_opens_in_any_order_and_is_ciphertext() {
    let bytes = snapshot(facts(1, 7));
    assert!(!bytes.windows(16).any(|w| w == [3; 16]), "ciphertext");
    assert!(!bytes.windows(7).any(|w| w == b"a guest"), "ciphertext");
    assert_eq!(bytes.len() / PAGE_SIZE, 5, "zero pages take no room");
    let storage = Memory::new(bytes);
    let claim = Reader::claim(&storage).unwrap();
    assert_eq!((claim.generation, claim.data_pages, claim.runs), (7, 4, 2));
    let reader = Reader::open(&storage, &SECRET).unwrap();
    assert_eq!(
        (reader.description(), reader.state()),
        (&b"a guest"[..], &b"its state"[..])
    );
    assert_eq!(reader.runs().collect::<Vec<_>>(), [(3, 3), (900, 1)]);
    for page in [900u64, 5, 0, 3, 6, 999] {
        let mut body = [0xff; PAGE_SIZE];
        reader.read(page, &mut body).unwrap();
        let wanted = if [3, 4, 5, 900].contains(&page) {
            page as u8
        } else {
            0
        };
        assert_eq!(body, [wanted; PAGE_SIZE], "{page}");
    }
    assert_eq!(
        reader.read(1000, &mut [0; PAGE_SIZE]).unwrap_err().code(),
        "SNAPSHOT_ORDER"
    );
}

#[test]
fn every_changed_byte_is_refused_by_the_part_it_is_in() {
    let good = snapshot(facts(1, 7));
    assert_eq!(code(&good), "OK");
    let (index, description, state) = (
        pages_of(4),
        good.len() - 32 - 9 - 32 - 7,
        good.len() - 32 - 9,
    );
    for (at, expected) in [
        (0, "SNAPSHOT_MALFORMED"),
        (8, "SNAPSHOT_VERSION"),
        (20, "SNAPSHOT_HEADER"),
        (40, "SNAPSHOT_HEADER"),
        (48, "SNAPSHOT_HEADER"),
        (100, "SNAPSHOT_MALFORMED"),
        (130, "SNAPSHOT_HEADER"),
        (pages_of(0), "SNAPSHOT_PAGE"),
        (pages_of(4) - 1, "SNAPSHOT_PAGE"),
        (index, "SNAPSHOT_SPLICED"),
        (index + 20, "SNAPSHOT_CHANGED"),
        (description + 3, "SNAPSHOT_SPLICED"),
        (description + 17, "SNAPSHOT_CHANGED"),
        (state, "SNAPSHOT_SPLICED"),
        (good.len() - 1, "SNAPSHOT_CHANGED"),
    ] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        assert_eq!(code(&bad), expected, "byte {at}");
    }
}

#[test]
fn a_cut_or_longer_or_unfinished_file_is_refused() {
    let good = snapshot(facts(1, 7));
    assert_eq!(code(&good[..good.len() - 1]), "SNAPSHOT_TRUNCATED");
    assert_eq!(code(&good[..HEADER_SIZE]), "SNAPSHOT_TRUNCATED");
    assert_eq!(code(&good[..HEADER_SIZE - 1]), "SNAPSHOT_MALFORMED");
    assert_eq!(code(&[good.as_slice(), &[0]].concat()), "SNAPSHOT_TRAILING");
    let mut unfinished = good.clone();
    unfinished[..HEADER_SIZE].fill(0);
    assert_eq!(code(&unfinished), "SNAPSHOT_MALFORMED");
    assert_eq!(code(&[]), "SNAPSHOT_MALFORMED");
}

#[test]
fn parts_and_pages_of_another_snapshot_of_the_same_guest_are_refused() {
    let (one, two) = (snapshot(facts(1, 7)), snapshot(facts(5, 8)));
    let graft = |range: std::ops::Range<usize>| {
        let mut bytes = one.clone();
        bytes[range.clone()].copy_from_slice(&two[range]);
        code(&bytes)
    };
    let end = one.len();
    assert_eq!(graft(pages_of(1)..pages_of(2)), "SNAPSHOT_PAGE");
    assert_eq!(graft(pages_of(4)..end - 48 - 39), "SNAPSHOT_SPLICED");
    assert_eq!(graft(end - 41..end), "SNAPSHOT_SPLICED");
    assert_eq!(graft(0..HEADER_SIZE), "SNAPSHOT_SPLICED");
    let mut swapped = one.clone();
    let (a, b) = (pages_of(0)..pages_of(1), pages_of(1)..pages_of(2));
    swapped[a.clone()].copy_from_slice(&one[b.clone()]);
    swapped[b].copy_from_slice(&one[a]);
    assert_eq!(code(&swapped), "SNAPSHOT_PAGE");
}

#[test]
fn another_secret_opens_nothing_and_pages_come_ascending() {
    let storage = Memory::new(snapshot(facts(1, 7)));
    let error = Reader::open(&storage, &[8; 32]).err().unwrap();
    assert_eq!(error.code(), "SNAPSHOT_HEADER");
    let empty = Memory::new(Vec::new());
    let mut writer = Writer::new(&empty, &SECRET, facts(1, 1)).unwrap();
    writer.page(5, &[1; PAGE_SIZE]).unwrap();
    assert!(writer.page(5, &[1; PAGE_SIZE]).is_err());
    assert!(writer.page(1000, &[1; PAGE_SIZE]).is_err());
}

#[test]
fn numbers_out_of_bounds_are_refused_before_they_are_used() {
    let good = snapshot(facts(1, 7));
    for (at, bytes) in [
        (56, &[0xff; 8][..]),
        (64, &[0xff; 8]),
        (72, &[0xff; 4]),
        (76, &[0xff; 4]),
        (80, &[0xff; 4]),
    ] {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        assert_eq!(code(&bad), "SNAPSHOT_BOUNDS", "{at}");
    }
}

#[test]
fn an_index_whose_runs_overlap_go_back_or_leave_memory_is_refused() {
    let header = Reader::claim(&Memory::new(snapshot(facts(1, 7)))).unwrap();
    let index = |runs: [(u64, u64); 2], tags: usize| {
        let words = runs.iter().flat_map(|(first, count)| [*first, *count]);
        let mut bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        bytes.resize(32 + tags * 16, 0);
        parse_index(&bytes, &header).ok()
    };
    assert_eq!(index([(3, 3), (900, 1)], 4), Some(4));
    assert_eq!(index([(3, 3), (5, 1)], 4), None, "overlap");
    assert_eq!(index([(900, 1), (3, 3)], 4), None, "back");
    assert_eq!(index([(3, 3), (1000, 1)], 4), None, "outside");
    assert_eq!(index([(3, u64::MAX), (900, 1)], 4), None, "overflow");
    assert_eq!(index([(3, 4), (900, 0)], 4), None, "empty");
    assert_eq!(index([(3, 3), (900, 1)], 3), None, "a tag too few");
    assert_eq!(index([(3, 3), (900, 1)], 5), None, "a tag too many");
    assert_eq!(
        index([(3, 3), (900, 2)], 4),
        None,
        "more than the header says"
    );
}
