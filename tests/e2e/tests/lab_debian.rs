//! Debian that debootstrap made, from its disk through OVMF and systemd-boot; its own programs use every device.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod common;

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use casemate_e2e::answers::GuestInfo;
use casemate_e2e::connection::Connection;
use casemate_e2e::network::{GUEST, OUTSIDE};
use casemate_e2e::owner::text;
use casemate_e2e::world::{Extent, Host, World};
use common::debian::*;
use common::*;
use ring::digest;

#[test]
fn debian_boots_from_its_disk_through_ovmf_and_uses_every_device() {
    let world = world("debian", Extent::Direct);
    let description = describe(&world);
    let run = ["run", text(&description).unwrap()];
    let info: GuestInfo = world.site_a.ask(&run).unwrap();
    let mut debian = Debian::up(&world.site_a, &info);
    let said = debian.said();
    assert!(said.contains("BdsDxe: starting Boot"), "{said}");
    let system = debian.system();
    assert!(system.loader.starts_with("systemd-boot 252"), "{system:?}");
    assert!(
        system.cmdline.contains("root=LABEL=debian ro"),
        "{system:?}"
    );

    raw_disk(&debian, &world);
    qcow2_disk(&debian);
    rom(&debian, &world);
    disk_that_grows(&debian, &world);
    disk_that_comes_and_goes(&debian, &world);
    card(&debian, &world);
    random_numbers(&debian);
    balloon(&debian, &world);
    login_on(info.terminal.as_deref().unwrap());
    interrupts(&debian);

    debian.watch.update().unwrap();
    assert_eq!(debian.watch.problems, Vec::<String>::new());
    assert!(
        debian.said().contains("debian login:"),
        "no getty on the serial line"
    );
    watchdog(&debian, &world);
    world.site_a.done(&["stop", "debian"]).unwrap();
    assert_ends_clean(world);
}

/// What Debian wrote is in the image, and what it discarded or zeroed is not.
fn raw_disk(debian: &Debian, world: &World) {
    let disk: Disk = debian.asked("disk data");
    assert_eq!((disk.size, disk.read_only), (DISK, 0), "{disk:?}");
    assert!(
        disk.flushes >= 3 && disk.discards >= 1 && disk.zeroes_max >= MIB,
        "{disk:?}"
    );
    let mut image = File::open(world.folder.join("disk.raw")).unwrap();
    let mut mebibyte = |at: u64| {
        let mut bytes = vec![0xaa; MIB as usize];
        image.seek(SeekFrom::Start(at * MIB)).unwrap();
        image.read_exact(&mut bytes).unwrap();
        bytes
    };
    assert_eq!(sha256(&mebibyte(8)), disk.sha256);
    assert!(
        mebibyte(16)
            .iter()
            .chain(&mebibyte(24))
            .all(|byte| *byte == 0)
    );
    // Discarded: the image has a hole there.
    let hole = nix::unistd::lseek(&image, 16 << 20, nix::unistd::Whence::SeekHole).unwrap();
    assert_eq!(hole, 16 << 20);
    let files: Files = debian.asked("files data");
    assert!(files.trimmed > DISK / 2, "{files:?}");
}

fn qcow2_disk(debian: &Debian) {
    let disk: Disk = debian.asked("disk cow");
    assert_eq!((disk.size, disk.read_only), (DISK, 0), "{disk:?}");
    assert!(
        disk.flushes >= 3 && disk.discards >= 1 && disk.zeroes_max >= MIB,
        "{disk:?}"
    );
}

fn rom(debian: &Debian, world: &World) {
    let rom: Rom = debian.asked("rom rom");
    assert_eq!((rom.read_only, rom.refused), (1, true));
    let image = fs::read(world.folder.join("rom.raw")).unwrap();
    assert_eq!(rom.sha256, sha256(&image));
    assert!(image == rom_content());
}

fn disk_that_grows(debian: &Debian, world: &World) {
    let image = File::options()
        .write(true)
        .open(world.folder.join("disk.raw"))
        .unwrap();
    image.set_len(DISK + 8 * MIB).unwrap();
    let grown = ["vm", "resize", "debian", "--disk", "data"];
    world.site_a.done(&grown).unwrap();
    debian.until("size data", |disk: &Size| disk.size == DISK + 8 * MIB);
}

fn disk_that_comes_and_goes(debian: &Debian, world: &World) {
    let path = world.folder.join("extra.raw");
    File::create(&path).unwrap().set_len(32 * MIB).unwrap();
    let there: There = debian.asked("there extra");
    assert!(!there.there);
    let disk = ["--disk", "extra"];
    let attach = ["vm", "attach", "debian", "--path", text(&path).unwrap()];
    world.site_a.done(&[&attach[..], &disk].concat()).unwrap();
    // Waits for udev to name it.
    let disk_there: Disk = debian.asked("disk extra");
    assert_eq!(disk_there.size, 32 * MIB);
    let detach = ["vm", "detach", "debian", "--timeout", "60"];
    world.site_a.done(&[&detach[..], &disk].concat()).unwrap();
    debian.until("there extra", |extra: &There| !extra.there);
    let image = fs::read(&path).unwrap();
    assert_eq!(sha256(&image[8 << 20..9 << 20]), disk_there.sha256);
}

/// Pings from inside, TCP from outside.
fn card(debian: &Debian, world: &World) {
    let card: Card = debian.asked(&format!("card {MAC} {GUEST} {OUTSIDE}"));
    assert_eq!((card.driver.as_str(), card.answered), ("virtio_net", 3));
    let connection = Connection::open(&world.network.outside, GUEST).unwrap();
    connection.wait_lines(5, Duration::from_secs(30)).unwrap();
}

fn random_numbers(debian: &Debian) {
    let [first, second]: [Rng; 2] = [debian.asked("rng"), debian.asked("rng")];
    assert!(first.source.starts_with("virtio_rng"), "{first:?}");
    assert_eq!(first.bytes.len(), 64);
    assert_ne!(first.bytes, second.bytes);
}

/// Debian's driver gives 128 MiB to the host, page by page, and takes all of it back.
fn balloon(debian: &Debian, world: &World) {
    let before: Balloon = debian.asked("balloon");
    assert_eq!(before.inflated, before.deflated);
    let resize = |size| {
        let order = ["vm", "resize", "debian", "--balloon", size];
        world.site_a.done(&order).unwrap();
    };
    resize("128 MiB");
    let pages = (128 << 20) / 4096;
    debian.until("balloon", |now: &Balloon| {
        now.inflated - now.deflated == pages
    });
    resize("0 MiB");
    debian.until("balloon", |now: &Balloon| now.inflated == now.deflated);
}

/// systemd has put a login prompt on the virtio console.
fn login_on(terminal: &Path) {
    let mut terminal = UnixStream::connect(terminal).unwrap();
    let step = Duration::from_secs(1);
    terminal.set_read_timeout(Some(step)).unwrap();
    let deadline = Instant::now() + Duration::from_secs(90);
    let mut heard = String::new();
    // The prompt may have been printed before anybody was there.
    terminal.write_all(b"\n").unwrap();
    for (expected, answer) in [
        ("debian login:", "nobody-here\n"),
        ("Password:", "wrong\n"),
        ("Login incorrect", ""),
    ] {
        while !heard.contains(expected) {
            assert!(Instant::now() < deadline, "no {expected:?} after {heard:?}");
            let mut bytes = [0; 512];
            if let Ok(count) = terminal.read(&mut bytes) {
                assert!(count > 0, "hung up after {heard:?}");
                heard += &String::from_utf8_lossy(&bytes[..count]);
            }
        }
        terminal.write_all(answer.as_bytes()).unwrap();
    }
}

/// Every kind of device has had interrupts, and all by messages.
fn interrupts(debian: &Debian) {
    let interrupts: Interrupts = debian.asked("interrupts");
    for driver in [
        "virtio_blk",
        "virtio_net",
        "vmw_vsock_virtio_transport",
        "virtio_rng",
        "virtio_balloon",
        "virtio_console",
    ] {
        let mut of = interrupts
            .of
            .iter()
            .filter(|(name, _)| name.ends_with(driver));
        assert!(of.any(|(_, count)| *count > 0), "{driver}: {interrupts:?}");
    }
}

/// Debian's driver starts it, and nobody feeds it.
fn watchdog(debian: &Debian, world: &World) {
    let watchdog: Watchdog = debian.asked("watchdog");
    assert_eq!(
        (watchdog.identity.as_str(), watchdog.state.as_str()),
        ("i6300ESB timer", "inactive")
    );
    let Done {} = debian.asked("starve 4");
    let deadline = Instant::now() + Duration::from_secs(60);
    while world.status(Host::A, "debian").unwrap().state != "stopped" {
        assert!(Instant::now() < deadline, "the watchdog sleeps");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_logged(&world.site_a, "Watchdog");
}

/// The published example, and further devices.
fn describe(world: &World) -> PathBuf {
    let file = |name: &str| world.folder.join(name);
    let raw = File::create(file("disk.raw")).unwrap();
    raw.set_len(DISK).unwrap();
    fs::write(file("cow.qcow2"), empty_qcow2(DISK)).unwrap();
    fs::write(file("rom.raw"), rom_content()).unwrap();
    let path = file("debian.toml");
    let (firmware, disk) = (shipped("LAB_FIRMWARE"), shipped("LAB_DEBIAN_DISK"));
    let replaced = [
        ("/usr/share/ovmf/OVMF.fd", text(&firmware).unwrap()),
        ("\"debian.raw\"", &format!("{disk:?}")),
        ("2 GiB", "768 MiB"),
    ];
    let more = format!(
        "\n[[disk]]\nid = \"data\"\npath = {:?}\n[[disk]]\nid = \"cow\"\npath = {:?}\nformat = \"qcow2\"\n\
         [[disk]]\nid = \"rom\"\npath = {:?}\nread_only = true\n\
         [balloon]\n[console]\n[watchdog]\naction = \"stop\"\n",
        file("disk.raw"),
        file("cow.qcow2"),
        file("rom.raw")
    );
    described(EXAMPLE, &replaced, &more, &path);
    path
}

fn rom_content() -> Vec<u8> {
    b"only read "
        .iter()
        .copied()
        .cycle()
        .take(1 << 20)
        .collect()
}

fn sha256(bytes: &[u8]) -> String {
    hex::encode(digest::digest(&digest::SHA256, bytes))
}

const EXAMPLE: &str = include_str!("../../../host/examples/debian-uefi.toml");
/// As the example has it.
const MAC: &str = "52:54:00:00:00:10";
const MIB: u64 = 1 << 20;
const DISK: u64 = 64 * MIB;
