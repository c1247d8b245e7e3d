//! The balloon under a small driver, over memory that is a file, as a guest's is.

use std::os::fd::AsFd;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use vm_memory::{FileOffset, GuestAddress};

use super::super::driver::{Buffer, Driver};
use super::*;

struct Rig {
    driver: Driver,
    balloon: Balloon,
    file: std::fs::File,
}

fn rig() -> Rig {
    let flags = nix::sys::memfd::MFdFlags::MFD_ALLOW_SEALING;
    let file = std::fs::File::from(nix::sys::memfd::memfd_create(c"ram", flags).unwrap());
    file.set_len(Driver::RAM).unwrap();
    let mut driver = Driver::new(3);
    let offset = FileOffset::new(file.try_clone().unwrap(), 0);
    let range = (GuestAddress(0), Driver::RAM as usize, Some(offset));
    driver.ram = GuestRam::from_ranges_with_files([range]).unwrap();
    let plan = BalloonPlan {
        free_page_reporting: true,
        deflate_on_oom: true,
    };
    let mut balloon = Balloon::new(plan, Driver::RAM);
    balloon.activate(driver.activation(u64::MAX));
    balloon.acquire().unwrap();
    for page in 0x100..0x200 {
        driver.put(page * PAGE, &[page as u8; 4096]);
    }
    driver.clear_dirty();
    Rig {
        driver,
        balloon,
        file,
    }
}

impl Rig {
    fn ask(&mut self, queue: u16, buffers: &[Buffer]) {
        self.driver.offer(usize::from(queue), buffers);
        self.balloon.queue_event(queue);
        assert!(self.driver.used(usize::from(queue)).is_some(), "answered");
    }

    fn inflate(&mut self, pages: &[u32]) {
        let bytes: Vec<u8> = pages.iter().flat_map(|p| p.to_le_bytes()).collect();
        self.ask(INFLATE, &[Buffer::read(0x8000, &bytes)]);
    }

    fn is_hole(&self, page: u64) -> bool {
        use nix::unistd::{Whence, lseek};
        let at = (page * PAGE) as i64;
        lseek(&self.file, at, Whence::SeekHole).unwrap() == at
    }
}

#[test]
fn pages_given_up_go_back_and_no_others() {
    let mut rig = rig();
    rig.inflate(&[0x110, 0x112, 0x111, 0x120, 0x120]);
    for page in 0x100..0x200u64 {
        let taken = (0x110..0x113).contains(&page) || page == 0x120;
        assert_eq!(rig.is_hole(page), taken, "{page:#x}");
        let byte = if taken { 0 } else { page as u8 };
        assert_eq!(rig.driver.bytes(page * PAGE, 4096), [byte; 4096]);
    }
    assert_eq!(rig.balloon.status().returned, 4 * PAGE);
    assert!(
        rig.driver.dirty().contains(&(0x111 * PAGE)),
        "its content changed"
    );
    // Given back to the guest it is memory as before.
    rig.ask(DEFLATE, &[Buffer::read(0x8000, &0x110u32.to_le_bytes())]);
    rig.driver.put(0x110 * PAGE, b"again");
    assert_eq!(rig.driver.bytes(0x110 * PAGE, 5), b"again");
    assert_eq!(rig.balloon.faults(), 0);
}

#[test]
fn reported_pages_go_back() {
    let mut rig = rig();
    let ranges = [
        Buffer::write(0x140 * PAGE, 0x10 * PAGE as u32),
        Buffer::write(0x180 * PAGE, PAGE as u32),
    ];
    rig.ask(REPORT, &ranges);
    assert!(rig.is_hole(0x140) && rig.is_hole(0x14f) && rig.is_hole(0x180));
    assert!(!rig.is_hole(0x13f) && !rig.is_hole(0x150) && !rig.is_hole(0x181));
    assert_eq!(rig.balloon.status().returned, 0x11 * PAGE);
}

#[test]
fn what_is_not_the_guests_is_not_taken() {
    let mut rig = rig();
    let outside = (Driver::RAM / PAGE) as u32;
    for pages in [&[outside][..], &[u32::MAX], &[outside - 1, outside]] {
        rig.inflate(pages);
    }
    rig.ask(INFLATE, &[Buffer::read(0x8000, &[1; 7])]);
    rig.ask(INFLATE, &[Buffer::write(0x150 * PAGE, 4096)]);
    rig.ask(REPORT, &[Buffer::write(0x150 * PAGE + 16, 4096)]);
    rig.ask(REPORT, &[Buffer::write(0x150 * PAGE, 100)]);
    assert_eq!(rig.balloon.faults(), 7);
    assert_eq!(rig.balloon.status().returned, 0);
    assert!(!rig.is_hole(0x150));
}

#[test]
fn sealed_memory_stays() {
    let mut rig = rig();
    let seal = FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_FUTURE_WRITE);
    fcntl(rig.file.as_fd(), seal).unwrap();
    rig.inflate(&[0x110]);
    assert!(!rig.is_hole(0x110));
    assert_eq!(
        (rig.balloon.faults(), rig.balloon.status().returned),
        (0, 0)
    );
}

#[test]
fn the_guest_is_told_its_target_and_tells_what_it_holds() {
    let mut rig = rig();
    let config = |balloon: &Balloon| {
        let mut bytes = [0; 8];
        balloon.read_config(0, &mut bytes);
        bytes
    };
    assert!(
        rig.balloon
            .change(&DeviceChange::Balloon(Driver::RAM))
            .is_err()
    );
    assert!(rig.balloon.change(&DeviceChange::Resized).is_err());
    rig.balloon.change(&DeviceChange::Balloon(1 << 20)).unwrap();
    assert_eq!(rig.driver.interrupts.config_changes(), 1);
    assert_eq!(config(&rig.balloon), [0, 1, 0, 0, 0, 0, 0, 0]);
    rig.balloon.write_config(0, &[9; 4]);
    rig.balloon.write_config(4, &[9; 2]);
    assert_eq!(config(&rig.balloon), [0, 1, 0, 0, 0, 0, 0, 0]);
    rig.balloon.write_config(4, &0x80u32.to_le_bytes());
    let status = rig.balloon.status();
    assert_eq!((status.size, status.held), (1 << 20, 0x80 * PAGE));

    assert_eq!(
        rig.balloon.save(),
        [1, 0x80, 2, 0x80, 1],
        "the released format of version 1"
    );
    let mut arrived = Balloon::new(rig.balloon.plan, Driver::RAM);
    arrived.restore(&rig.balloon.save()).unwrap();
    assert_eq!(arrived.status().held, 0x80 * PAGE);
    assert!(arrived.restore(&[1, 0]).is_err());
    assert!(arrived.restore(&[1, 0x80, 8, 0]).is_err(), "all there is");
}
