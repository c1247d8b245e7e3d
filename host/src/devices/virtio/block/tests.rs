//! The disk under a small driver, by threads and by io_uring: what works, what is refused, whose it is.

use std::cell::Cell;
use std::io::{Read, Seek, SeekFrom, Write};

use proptest::prelude::*;

use super::super::driver::{Buffer, Driver, used};
use super::*;
use crate::machine::plan::devices::Rate;

const DATA: u64 = 0x10_0000;
const HEAD: u64 = 0x8000;
const STATUS: u64 = 0x9000;
const ALL: u64 = u64::MAX;

struct Rig {
    driver: Driver,
    block: Block,
    file: File,
}

thread_local! {
    static BY_URING: Cell<bool> = const { Cell::new(false) };
}

/// Each of these tests twice: with every request done at once, and with a ring.
macro_rules! both {
    ($(#[$about:meta] fn $name:ident() $body:block)*) => {
        $(mod $name {
            use super::*;

            fn test() $body

            #[test]
            fn by_threads() {
                BY_URING.set(false);
                test();
            }

            #[test]
            fn by_uring() {
                BY_URING.set(true);
                test();
            }
        })*
    };
}

fn disk(file: File, read_only: bool) -> Block {
    let mut block = Block::new(file, "disk-0", read_only).expect("a disk");
    if BY_URING.get() {
        block.use_uring(true).expect("this kernel has io_uring");
    }
    block
}

/// A disk of 64 sectors, each filled with its number.
fn rig(read_only: bool) -> Rig {
    let mut file = tempfile::tempfile().expect("a temporary file");
    for sector in 0..64u8 {
        file.write_all(&[sector; 512]).expect("space");
    }
    let driver = Driver::new(1);
    let mut block = disk(file.try_clone().expect("clone"), read_only);
    block.activate(driver.activation(ALL));
    block.acquire().expect("nobody else has it");
    Rig {
        driver,
        block,
        file,
    }
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

impl Rig {
    /// Sends one request with these data buffers; status and bytes written.
    fn request(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
        self.driver.put(STATUS, &[0xee]);
        let mut chain = vec![Buffer::read(HEAD, &header(kind, sector))];
        chain.extend_from_slice(data);
        chain.push(Buffer::write(STATUS, 1));
        let head = self.driver.offer(0, &chain);
        self.notify();
        let (used, written) = self.driver.used(0).expect("answered");
        assert_eq!(used, head);
        assert_eq!(self.driver.interrupts.take(), [0]);
        (self.driver.bytes(STATUS, 1)[0], written)
    }

    /// The driver's notification, and what the device thread does until all is answered.
    fn notify(&mut self) {
        self.block.queue_event(0);
        let begun = std::time::Instant::now();
        while self.block.uring.as_ref().is_some_and(Uring::is_busy) {
            assert!(begun.elapsed().as_secs() < 10, "no answer");
            self.block.fd_event(URING);
        }
    }

    fn on_disk(&mut self, sector: u64) -> Vec<u8> {
        let mut bytes = vec![0; 512];
        self.file
            .seek(SeekFrom::Start(sector * 512))
            .expect("in range");
        self.file.read_exact(&mut bytes).expect("in range");
        bytes
    }
}

both! {
#[cfg(test)]
fn reads_into_scattered_memory_and_marks_the_pages() {
    let mut rig = rig(false);
    rig.driver.clear_dirty();
    let answer = rig.request(
        0,
        3,
        &[Buffer::write(DATA, 700), Buffer::write(DATA + 0x3000, 324)],
    );
    assert_eq!(answer, (0, 1025));
    assert_eq!(rig.driver.bytes(DATA, 512), [3; 512]);
    assert_eq!(rig.driver.bytes(DATA + 512, 188), [4; 188]);
    assert_eq!(rig.driver.bytes(DATA + 0x3000, 324), [4; 324]);
    let dirty = rig.driver.dirty();
    for page in [DATA, DATA + 0x3000, STATUS & !0xfff, used(0)] {
        assert!(
            dirty.contains(&page),
            "{page:#x} was written but not marked: {dirty:x?}"
        );
    }
    assert!(
        !dirty.contains(&(DATA + 0x1000)),
        "a page nobody wrote is marked"
    );
}
}

both! {
#[cfg(test)]
fn writes_flushes_and_names_itself() {
    let mut rig = rig(false);
    let answer = rig.request(
        1,
        10,
        &[
            Buffer::read(DATA, &[0xaa; 512]),
            Buffer::read(DATA + 0x2000, &[0xbb; 512]),
        ],
    );
    assert_eq!(answer, (0, 1));
    assert_eq!(rig.on_disk(10), [0xaa; 512]);
    assert_eq!(rig.on_disk(11), [0xbb; 512]);
    assert_eq!(rig.on_disk(12), [12; 512]);
    assert_eq!(rig.request(4, 0, &[]), (0, 1));
    assert_eq!(rig.request(8, 0, &[Buffer::write(DATA, 20)]), (0, 21));
    assert_eq!(rig.driver.bytes(DATA, 8), b"disk-0\0\0");
    assert_eq!(rig.block.faults(), 0);
}
}

both! {
// Sector 8 is the first of the second block of 4 KiB.
#[cfg(test)]
fn a_copier_hears_of_every_block_that_a_request_changed() {
    let mut rig = rig(false);
    let write = [Buffer::read(DATA, &[0xaa; 512])];
    assert_eq!(rig.request(1, 1, &write), (0, 1));
    assert_eq!(rig.block.take_written(), None, "nobody copies");
    assert_eq!(rig.block.track_writes().expect("a raw image"), [0xff]);
    assert_eq!(rig.block.take_written(), Some(vec![0]));
    assert_eq!(rig.request(1, 7, &write), (0, 1));
    assert_eq!(rig.request(0, 40, &[Buffer::write(DATA, 512)]), (0, 513));
    assert_eq!(rig.block.take_written(), Some(vec![1 << 0]));
    let range = |sector: u64, count: u32| {
        let mut bytes = sector.to_le_bytes().to_vec();
        bytes.extend(count.to_le_bytes());
        bytes.extend([0; 4]);
        [Buffer::read(DATA, &bytes)]
    };
    assert_eq!(rig.request(11, 0, &range(8, 16)), (0, 1));
    assert_eq!(rig.block.take_written(), Some(vec![0b110]));
    assert_eq!(rig.request(13, 0, &range(63, 1)), (0, 1));
    assert_eq!(rig.block.take_written(), Some(vec![1 << 7]));
    rig.block.forget_writes();
    assert_eq!(rig.request(1, 1, &write), (0, 1));
    assert_eq!(rig.block.take_written(), None);
}
}

both! {
#[cfg(test)]
fn discards_and_zeroes() {
    let mut rig = rig(false);
    let range = |sector: u64, count: u32, flags: u32| {
        let mut bytes = sector.to_le_bytes().to_vec();
        bytes.extend(count.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        [Buffer::read(DATA, &bytes)]
    };
    assert_eq!(rig.request(11, 0, &range(8, 8, 0)), (0, 1));
    assert_eq!(rig.request(13, 0, &range(20, 1, 0)), (0, 1));
    assert_eq!(rig.request(13, 0, &range(22, 1, 1)), (0, 1));
    for (sector, byte) in [
        (7, 7),
        (8, 0),
        (15, 0),
        (16, 16),
        (20, 0),
        (21, 21),
        (22, 0),
    ] {
        assert_eq!(rig.on_disk(sector), [byte; 512], "sector {sector}");
    }
    assert_eq!(rig.request(11, 0, &range(8, 8, 1)), (2, 1));
    assert_eq!(rig.request(13, 0, &range(8, 8, 2)), (2, 1));
    assert_eq!(rig.request(13, 0, &range(60, 5, 0)), (1, 1));
    assert_eq!(rig.request(11, 0, &range(u64::MAX, 1, 0)), (1, 1));
    assert_eq!(rig.request(11, 0, &[Buffer::read(DATA, &[0; 15])]), (1, 1));
    assert_eq!(rig.block.faults(), 3);
}
}

both! {
#[cfg(test)]
fn refuses_what_is_out_of_range() {
    let mut rig = rig(false);
    let sector = |n| [Buffer::write(DATA, n)];
    assert_eq!(rig.request(0, 63, &sector(512)), (0, 513));
    assert_eq!(rig.request(0, 64, &sector(512)), (1, 1));
    assert_eq!(rig.request(0, 63, &sector(1024)), (1, 1));
    assert_eq!(rig.request(0, u64::MAX, &sector(512)), (1, 1));
    assert_eq!(rig.request(0, u64::MAX / 512, &sector(512)), (1, 1));
    assert_eq!(rig.request(0, 0, &sector(511)), (1, 1));
    assert_eq!(rig.request(1, 64, &[Buffer::read(DATA, &[1; 512])]), (1, 1));
    assert_eq!(rig.block.faults(), 6);
    assert_eq!(rig.request(77, 0, &[]), (2, 1));
    let length = rig.file.seek(SeekFrom::End(0)).expect("a file");
    assert_eq!(length, 64 * 512, "the image grew");
}
}

both! {
#[cfg(test)]
fn read_only_is_read_only() {
    let mut rig = rig(true);
    assert_ne!(rig.block.features() & (1 << VIRTIO_BLK_F_RO), 0);
    assert_eq!(
        rig.request(1, 3, &[Buffer::read(DATA, &[0xaa; 512])]),
        (1, 1)
    );
    assert_eq!(
        rig.request(
            11,
            0,
            &[Buffer::read(
                DATA,
                &[0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
            )]
        ),
        (1, 1)
    );
    assert_eq!(rig.on_disk(3), [3; 512]);
    assert_eq!(rig.on_disk(0), [0; 512]);
    assert_eq!(rig.request(0, 3, &[Buffer::write(DATA, 512)]), (0, 513));
    assert_eq!(rig.request(4, 0, &[]), (0, 1));
}
}

both! {
#[cfg(test)]
fn malformed_requests_are_answered() {
    let mut rig = rig(false);
    // Data outside guest memory: the status byte still exists, and says so.
    assert_eq!(
        rig.request(0, 0, &[Buffer::write(0xffff_0000, 512)]),
        (1, 1)
    );
    let lone = [
        vec![
            Buffer::read(HEAD, &header(0, 0)[..15]),
            Buffer::write(STATUS, 1),
        ],
        vec![Buffer::read(HEAD, &header(1, 0))],
        vec![Buffer::write(STATUS, 1)],
        vec![Buffer::write(STATUS, 1), Buffer::read(HEAD, &header(4, 0))],
    ];
    for chain in lone {
        rig.driver.offer(0, &chain);
    }
    rig.notify();
    for written in [1, 0, 1, 0] {
        assert_eq!(
            rig.driver.used(0).map(|(_, written)| written),
            Some(written)
        );
    }
    assert_eq!(rig.block.faults(), 5);
    rig.driver.interrupts.take();
    assert_eq!(
        rig.request(0, 1, &[Buffer::write(DATA, 512)]),
        (0, 513),
        "the disk still works"
    );
}
}

#[test]
fn one_holder_at_a_time() {
    let named = tempfile::NamedTempFile::new().expect("a temporary file");
    named.as_file().set_len(1 << 20).expect("space");
    let open = |read_only: bool| {
        let file = File::options()
            .read(true)
            .write(!read_only)
            .open(named.path())
            .expect("it exists");
        Block::new(file, "db", read_only).expect("a disk")
    };
    let (mut one, mut two) = (open(false), open(false));
    one.acquire().expect("free");
    let error = two.acquire().expect_err("taken");
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    assert!(error.to_string().contains("`db`"), "{error}");
    assert!(open(true).acquire().is_err(), "a reader beside a writer");
    one.release().expect("flushed");
    two.acquire().expect("free again");
    two.release().expect("flushed");
    let (mut three, mut four) = (open(true), open(true));
    three.acquire().expect("readers share");
    four.acquire().expect("readers share");
    assert!(one.acquire().is_err(), "a writer beside readers");
}

both! {
#[cfg(test)]
fn nothing_is_served_without_the_lock_and_nothing_is_lost() {
    let mut rig = rig(false);
    rig.block.release().expect("flushed");
    rig.driver.offer(
        0,
        &[
            Buffer::read(HEAD, &header(1, 5)),
            Buffer::read(DATA, &[9; 512]),
            Buffer::write(STATUS, 1),
        ],
    );
    rig.block.queue_event(0);
    assert_eq!(rig.driver.used(0), None);
    assert_eq!(rig.on_disk(5), [5; 512]);

    // The move: the same queues and memory, a fresh device on the same image.
    let mut arrived = disk(rig.file.try_clone().expect("clone"), false);
    arrived.restore(&rig.block.save()).expect("the same disk");
    arrived.activate(Activation {
        queues: rig.block.queues(),
        ..rig.driver.activation(ALL)
    });
    arrived.queue_event(0);
    assert_eq!(rig.driver.used(0), None);
    arrived.acquire().expect("free");
    arrived.drain();
    assert_eq!(rig.driver.used(0), Some((0, 1)));
    assert_eq!(rig.on_disk(5), [9; 512]);
    assert_eq!(rig.driver.interrupts.take(), [0]);
}
}

#[test]
fn restores_only_the_same_disk() {
    let rig = rig(false);
    assert_eq!(
        rig.block.save(),
        [1, 64, 0],
        "the released format of version 1"
    );
    for (state, right) in [
        (&[1, 64, 0][..], true),
        (&[1, 63, 0], false),
        (&[1, 64, 1], false),
        (&[2, 64, 0], false),
        (&[], false),
    ] {
        let mut fresh =
            Block::new(rig.file.try_clone().expect("clone"), "disk-0", false).expect("a disk");
        assert_eq!(fresh.restore(state).is_ok(), right, "{state:?}");
    }
}

#[test]
fn configuration_says_what_is_offered() {
    let rig = rig(false);
    let mut config = [0xff; 64];
    rig.block.read_config(0, &mut config);
    assert_eq!(config[..8], 64u64.to_le_bytes());
    assert_eq!(config[8..12], SIZE_MAX.to_le_bytes());
    assert_eq!(config[12..16], SEG_MAX.to_le_bytes());
    assert_eq!(config[20..24], 512u32.to_le_bytes());
    assert_eq!(config[60..], [0; 4]);
    rig.block.read_config(u64::MAX, &mut config);
    assert_eq!(config, [0; 64]);
}

both! {
#[cfg(test)]
fn a_grown_image_is_told_and_a_shrunk_one_bounds_what_is_asked() {
    let mut rig = rig(false);
    assert_eq!(rig.request(0, 64, &[Buffer::write(DATA, 512)]), (1, 1));
    rig.file.set_len(96 * 512).expect("space");
    assert_eq!(
        rig.request(0, 64, &[Buffer::write(DATA, 512)]),
        (1, 1),
        "not yet"
    );
    rig.block.change(&DeviceChange::Resized).expect("a file");
    assert_eq!(rig.driver.interrupts.config_changes(), 1);
    assert_eq!(rig.block.status().size, 96 * 512);
    assert_eq!(rig.request(0, 64, &[Buffer::write(DATA, 512)]), (0, 513));
    rig.block.change(&DeviceChange::Resized).expect("a file");
    assert_eq!(rig.driver.interrupts.config_changes(), 1, "nothing changed");
    rig.file.set_len(32 * 512).expect("a file");
    rig.block.change(&DeviceChange::Resized).expect("a file");
    assert_eq!(rig.request(0, 40, &[Buffer::write(DATA, 512)]), (1, 1));
    assert!(rig.block.change(&DeviceChange::Balloon(1)).is_err());
}
}

both! {
#[cfg(test)]
fn limits_hold_and_are_changed_while_it_runs() {
    let mut rig = rig(false);
    let rate = |per_second| {
        Some(Rate {
            per_second,
            burst: 1,
        })
    };
    let slow = Limits {
        bytes: None,
        operations: rate(10),
    };
    rig.block
        .change(&DeviceChange::Limits(slow))
        .expect("usable");
    for n in 0..3 {
        rig.driver.put(HEAD + n * 64, &header(4, 0));
        let (head, status) = (HEAD + n * 64, STATUS + n);
        rig.driver.offer(
            0,
            &[Buffer::read(head, &header(4, 0)), Buffer::write(status, 1)],
        );
    }
    rig.notify();
    assert!(rig.driver.used(0).is_some() && rig.driver.used(0).is_none());
    let waits = |rig: &Rig| rig.block.poll_fds().iter().any(|(_, token)| *token == TIMER);
    assert!(waits(&rig), "the timer");
    rig.notify();
    assert!(rig.driver.used(0).is_none(), "asking again does not help");
    std::thread::sleep(std::time::Duration::from_millis(110));
    rig.block.fd_event(TIMER);
    rig.notify();
    assert!(rig.driver.used(0).is_some() && rig.driver.used(0).is_none());
    let none = Limits::default();
    rig.block
        .change(&DeviceChange::Limits(none))
        .expect("usable");
    rig.notify();
    assert!(rig.driver.used(0).is_some(), "no limit any more");
    assert!(!waits(&rig));
    rig.driver.interrupts.take();
    let bytes = Limits {
        bytes: rate(1),
        operations: None,
    };
    rig.block
        .change(&DeviceChange::Limits(bytes))
        .expect("usable");
    assert_eq!(
        rig.request(0, 1, &[Buffer::write(DATA, 512)]),
        (0, 513),
        "once"
    );
    rig.driver.offer(
        0,
        &[Buffer::read(HEAD, &header(4, 0)), Buffer::write(STATUS, 1)],
    );
    rig.notify();
    assert!(rig.driver.used(0).is_none(), "529 bytes at one a second");
    let useless = Limits {
        bytes: rate(0),
        operations: None,
    };
    assert!(rig.block.change(&DeviceChange::Limits(useless)).is_err());
}
}

fn any_buffer() -> impl Strategy<Value = Buffer> {
    let addr = prop_oneof![
        0..Driver::RAM,
        Just(HEAD),
        Just(Driver::RAM - 100),
        any::<u64>()
    ];
    let len = prop_oneof![0..2048u32, Just(16), Just(512), any::<u32>()];
    (
        addr,
        len,
        prop_oneof![0..8u16, any::<u16>()],
        prop_oneof![0..64u16, any::<u16>()],
    )
        .prop_map(|(addr, len, flags, next)| Buffer::raw(addr, len, flags, next))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn no_chain_makes_the_disk_fall(buffers in prop::collection::vec(any_buffer(), 1..12), kind in 0u32..16, sector in 0u64..70, by_uring: bool) {
        BY_URING.set(by_uring);
        let mut rig = rig(false);
        rig.driver.put(HEAD, &header(kind, sector));
        rig.driver.offer_as_is(0, &buffers);
        rig.notify();
        prop_assert!(rig.file.metadata().expect("a file").len() == 64 * 512);
    }
}

const MANY: u64 = 20;

/// Offers many reads of one sector each, to a page each.
fn offer_many(rig: &Rig, kind: u32) {
    for n in 0..MANY {
        let (head, data) = (HEAD + n * 64, DATA + n * 0x1000);
        let data = match kind {
            0 => Buffer::write(data, 512),
            _ => Buffer::read(data, &[0x80 + n as u8; 512]),
        };
        rig.driver.offer(
            0,
            &[
                Buffer::read(head, &header(kind, n)),
                data,
                Buffer::write(STATUS + n, 1),
            ],
        );
    }
}

fn all_used(rig: &Rig) -> usize {
    std::iter::from_fn(|| rig.driver.used(0)).count()
}

both! {
    #[cfg(test)]
    fn a_pause_a_reset_and_a_release_leave_nothing_under_way() {
        for end in [Block::drain, Block::reset, |block: &mut Block| block.release().expect("flushed")] {
            let mut rig = Rig { driver: Driver::with_size(1, 128), ..rig(false) };
            rig.block.reset();
            rig.block.activate(rig.driver.activation(ALL));
            rig.driver.clear_dirty();
            offer_many(&rig, 0);
            rig.block.queue_event(0);
            end(&mut rig.block);
            assert_eq!(all_used(&rig), MANY as usize);
            let dirty = rig.driver.dirty();
            for n in 0..MANY {
                assert_eq!(rig.driver.bytes(STATUS + n, 1), [0]);
                assert_eq!(rig.driver.bytes(DATA + n * 0x1000, 512), [n as u8; 512]);
                assert!(dirty.contains(&(DATA + n * 0x1000)), "{n}");
            }
            assert!(rig.block.uring.as_ref().is_none_or(|uring| !uring.is_busy()));
        }
    }
}

both! {
    #[cfg(test)]
    fn more_than_fit_in_a_ring_are_all_answered() {
        let mut rig = Rig {
            driver: Driver::with_size(1, 256),
            ..rig(false)
        };
        rig.block.reset();
        rig.block.activate(rig.driver.activation(ALL));
        // The descriptors go round: a guest that offers more than it has.
        for _ in 0..200 {
            rig.driver.offer(
                0,
                &[Buffer::read(HEAD, &header(4, 0)), Buffer::write(STATUS, 1)],
            );
        }
        rig.notify();
        assert_eq!(all_used(&rig), 200);
        assert_eq!(rig.block.faults(), 0);
    }
}

#[test]
fn writes_can_be_kept_out_of_the_ring() {
    BY_URING.set(false);
    let mut rig = rig(false);
    rig.block
        .use_uring(false)
        .expect("this kernel has io_uring");
    rig.block.reset();
    rig.block.activate(rig.driver.activation(ALL));
    offer_many(&rig, 1);
    rig.block.queue_event(0);
    assert_eq!(all_used(&rig), MANY as usize, "each is done at once");
    rig.driver.interrupts.take();
    assert_eq!(rig.on_disk(3), [0x83; 512]);
    assert_eq!(rig.request(4, 0, &[]), (0, 1), "a flush goes through it");
    assert_eq!(rig.request(0, 3, &[Buffer::write(DATA, 512)]), (0, 513));
    assert_eq!(
        rig.block.service().as_deref(),
        Some("io_uring, writes by threads")
    );
}

#[test]
fn a_ring_is_for_raw_images_and_goes_with_its_disk() {
    BY_URING.set(true);
    let rig = rig(false);
    offer_many(&rig, 0);
    let Rig {
        mut block, driver, ..
    } = rig;
    block.queue_event(0);
    // Whatever is under way is waited for, and memory that is gone is not written to.
    drop(block);
    drop(driver);
}
