//! Every device used from inside a Linux guest: disks (qcow2 by threads, a read-only one by io_uring), card, vsock, random numbers, balloon,
//! terminal, watchdog.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod common;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use casemate_e2e::answers::GuestInfo;
use casemate_e2e::connection::Connection;
use casemate_e2e::guest_watch::{GuestWatch, ask, verify};
use casemate_e2e::network::{BRIDGE, GUEST};
use casemate_e2e::owner::text;
use casemate_e2e::world::{BOOT, Extent, Host, World};
use common::*;
use serde::Deserialize;

#[test]
fn a_linux_guest_uses_every_device_and_is_stopped_by_its_watchdog() {
    let world = world("devices", Extent::Direct);
    let description = describe(&world);
    demanded_limits_that_cannot_be_enforced_keep_a_guest_from_starting(&world, &description);
    let info: GuestInfo = world
        .site_a
        .ask(&["run", text(&description).unwrap()])
        .unwrap();
    let mut watch = GuestWatch::new(&info.console);
    watch
        .wait("the guest's `ready`", BOOT, |w| w.ready)
        .unwrap();
    let vsock = info.vsock.clone().unwrap();
    // A qcow2 image on the device thread, a raw one by the kernel's ring, both under the VMM's filters.
    let served: Vec<_> = world.status(Host::A, "devices").unwrap().disks;
    let served: Vec<_> = served
        .iter()
        .map(|d| (d.id.as_str(), d.by.as_str()))
        .collect();
    assert_eq!(
        served,
        [("data", "threads"), ("rom", "io_uring, writes by threads")]
    );

    let devices: Devices = ask(&vsock, "devices").unwrap();
    assert!(
        devices.ok && devices.rng.starts_with("virtio_rng"),
        "{devices:?}"
    );
    let again: Devices = ask(&vsock, "devices").unwrap();
    assert_ne!(devices.random, again.random);
    assert_eq!(
        (devices.vda_sectors, devices.vda_serial.as_str()),
        (DISK / 512, "data")
    );
    assert!(
        devices.vdb_read_only && devices.vda_discard > 0,
        "{devices:?}"
    );

    limits_of_block_devices_are_in_the_kernel(&world, &info);
    both_queues_of_the_card_carry_frames(&world, &vsock);
    the_terminal_answers(info.terminal.as_deref().unwrap());
    memory_that_is_let_go_comes_back(&info);
    watch.wait_ticks(20, Duration::from_secs(30)).unwrap();
    let verified = verify(&vsock).unwrap();
    assert!(verified.ok && verified.blocks_checked > 0, "{verified:?}");

    let starved: Done = ask(&vsock, "starve 300").unwrap();
    assert!(starved.ok);
    let deadline = Instant::now() + Duration::from_secs(20);
    while world.status(Host::A, "devices").unwrap().state != "stopped" {
        assert!(Instant::now() < deadline, "the watchdog sleeps");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_logged(&world.site_a, "Watchdog");
    world.site_a.done(&["stop", "devices"]).unwrap();
    assert_ends_clean(world);
}

/// The first disk's image is on a tmpfs.
fn demanded_limits_that_cannot_be_enforced_keep_a_guest_from_starting(
    world: &World,
    description: &Path,
) {
    let path = world.folder.join("demanded.toml");
    let described = fs::read_to_string(description).unwrap();
    let demanded = described.replace("reads_per_second = 5000", "required = true");
    assert_ne!(demanded, described);
    fs::write(&path, demanded).unwrap();
    let refused = world
        .site_a
        .ask::<GuestInfo>(&["run", text(&path).unwrap()]);
    let refused = format!("{:?}", refused.unwrap_err());
    assert!(refused.contains("cannot be enforced here"), "{refused}");
    assert!(refused.contains("disk `data`"), "{refused}");
}

/// `io.max` of the VMM's group has the device beneath the second disk; the first, on a tmpfs, has none, which is said.
fn limits_of_block_devices_are_in_the_kernel(world: &World, info: &GuestInfo) {
    let group = fs::read_to_string(format!("/proc/{}/cgroup", info.pid)).unwrap();
    let group = group.lines().find_map(|l| l.strip_prefix("0::/")).unwrap();
    let path = Path::new("/sys/fs/cgroup").join(group).join("io.max");
    let limits = fs::read_to_string(&path).unwrap();
    // The lab's disk, which has no partitions.
    let number = fs::metadata(rom(world)).unwrap().dev();
    let device = format!("{}:{}", libc::major(number), libc::minor(number));
    let wanted = format!("{device} rbps=67108864 wbps=max riops=5000 wiops=max\n");
    assert_eq!(limits, wanted);
}

/// A file on the lab's disk, only read here.
fn rom(world: &World) -> &Path {
    &world.product.initrd
}

/// The tap's kernel spreads connections over the queues by their hash; of twelve, all in one is one case in two thousand.
fn both_queues_of_the_card_carry_frames(world: &World, vsock: &Path) {
    let connections: Vec<_> = (0..12)
        .map(|_| Connection::open(&world.network.outside, GUEST).unwrap())
        .collect();
    for connection in &connections {
        connection.wait_lines(2, Duration::from_secs(60)).unwrap();
    }
    let devices: Devices = ask(vsock, "devices").unwrap();
    assert!(
        devices.card_interrupts.len() == 2 && !devices.card_interrupts.contains(&0),
        "{devices:?}"
    );
}

fn the_terminal_answers(path: &Path) {
    let mut terminal = UnixStream::connect(path).unwrap();
    terminal
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    terminal.write_all(b"hello from the host\n").unwrap();
    let mut heard = Vec::new();
    while !String::from_utf8_lossy(&heard).contains("hvc0: hello from the host") {
        let mut bytes = [0; 256];
        let count = terminal.read(&mut bytes).unwrap();
        assert!(
            count > 0,
            "hung up after {:?}",
            String::from_utf8_lossy(&heard)
        );
        heard.extend_from_slice(&bytes[..count]);
    }
}

/// Free page reporting: what the guest has used and let go goes back to the host.
fn memory_that_is_let_go_comes_back(info: &GuestInfo) {
    let used = || {
        let status = fs::read_to_string(format!("/proc/{}/smaps_rollup", info.pid)).unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix("Rss:")).unwrap();
        line.split_whitespace()
            .next()
            .unwrap()
            .parse::<u64>()
            .unwrap()
    };
    let done: Done = ask(info.vsock.as_ref().unwrap(), "use 200").unwrap();
    assert!(done.ok);
    let peak = used();
    let deadline = Instant::now() + Duration::from_secs(60);
    while used() + (150 << 10) > peak {
        assert!(
            Instant::now() < deadline,
            "{} of {peak} KiB are still used",
            used()
        );
        std::thread::sleep(Duration::from_millis(500));
    }
}

fn describe(world: &World) -> std::path::PathBuf {
    let disk = world.folder.join("disk.qcow2");
    fs::write(&disk, empty_qcow2(DISK)).unwrap();
    let described = format!(
        "name = \"devices\"\nvcpus = 2\nmemory = \"512 MiB\"\n\n[boot]\nkernel = \"{}\"\ninitrd = \"{}\"\n\
         cmdline = \"console=ttyS0 quiet panic=-1 reboot=k casemate.ip={GUEST}/24 casemate.dirty_mib=8\"\n\n\
         [[disk]]\nid = \"data\"\npath = \"{}\"\nformat = \"qcow2\"\n\
         limit = {{ bytes_per_second = \"100 MiB\", operations_per_second = 2000 }}\n\n\
         [[disk]]\nid = \"rom\"\npath = \"{}\"\nread_only = true\n\n\
         [[net]]\nid = \"net0\"\ntap = \"tap0\"\nbridge = \"{BRIDGE}\"\nmac = \"52:54:00:00:00:77\"\nqueues = 2\n\n\
         [vsock]\ncid = 30\n[rng]\n[balloon]\n[console]\ncolumns = 80\nrows = 25\n[watchdog]\naction = \"stop\"\n\
         [resources]\nio_max = {{ read_bytes_per_second = \"64 MiB\", reads_per_second = 5000 }}\n",
        world.product.kernel.display(),
        world.product.initrd.display(),
        disk.display(),
        rom(world).display(),
    );
    let path = world.folder.join("devices.toml");
    fs::write(&path, described).unwrap();
    path
}

#[derive(Debug, Deserialize)]
struct Devices {
    ok: bool,
    rng: String,
    random: String,
    vdb_read_only: bool,
    vda_discard: u64,
    vda_sectors: u64,
    vda_serial: String,
    card_interrupts: Vec<u64>,
}

#[derive(Debug, Deserialize)]
struct Done {
    ok: bool,
}

const DISK: u64 = 64 << 20;
