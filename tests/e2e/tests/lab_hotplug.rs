//! A disk and a network card that come and go while a Linux guest runs.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use casemate_e2e::answers::GuestInfo;
use casemate_e2e::connection::Connection;
use casemate_e2e::guest_watch::{GuestWatch, ask};
use casemate_e2e::network::{BRIDGE, GUEST};
use casemate_e2e::owner::text;
use casemate_e2e::world::{BOOT, Extent, World};
use common::*;
use serde::Deserialize;

#[test]
fn a_linux_guest_takes_a_disk_and_a_card_and_lets_go_of_them() {
    let world = world("hotplug", Extent::Direct);
    let description = describe(&world);
    let run = ["run", text(&description).unwrap()];
    let info: GuestInfo = world.site_a.ask(&run).unwrap();
    let mut watch = GuestWatch::new(&info.console);
    watch
        .wait("the guest's `ready`", BOOT, |w| w.ready)
        .unwrap();
    let vsock = info.vsock.clone().unwrap();
    assert!(!asked(&vsock, "block vdb").there);

    let image = world.folder.join("extra.raw");
    let mut content = vec![0; 8 << 20];
    content
        .iter_mut()
        .zip(b"KNOWN CONTENT 42")
        .for_each(|(to, from)| *to = *from);
    fs::write(&image, content).unwrap();
    let image = text(&image).unwrap();
    let attach = [
        "vm", "attach", "hotplug", "--disk", "extra", "--path", image,
    ];
    // Twice: what was taken out can be put in again.
    for _ in 0..2 {
        world.site_a.done(&attach).unwrap();
        let disk = until(&vsock, "block vdb", |disk| disk.there);
        assert_eq!(disk.serial, "extra");
        assert_eq!(disk.head, "4b4e4f574e20434f4e54454e54203432");
        let detach = [
            "vm",
            "detach",
            "hotplug",
            "--disk",
            "extra",
            "--timeout",
            "60",
        ];
        world.site_a.done(&detach).unwrap();
        assert!(!asked(&vsock, "block vdb").there, "the guest has it still");
    }

    let card = format!("card eth0 {GUEST}");
    assert!(!asked(&vsock, &card).there);
    let attach = [
        "vm", "attach", "hotplug", "--net", "net0", "--bridge", BRIDGE,
    ];
    world.site_a.done(&attach).unwrap();
    assert!(until(&vsock, &card, |card| card.there).ok);
    let connection = Connection::open(&world.network.outside, GUEST).unwrap();
    connection.wait_lines(3, Duration::from_secs(20)).unwrap();
    drop(connection);
    let detach = [
        "vm",
        "detach",
        "hotplug",
        "--net",
        "net0",
        "--timeout",
        "60",
    ];
    world.site_a.done(&detach).unwrap();
    assert!(!asked(&vsock, &card).there);

    watch.wait_ticks(20, Duration::from_secs(30)).unwrap();
    assert_eq!(watch.problems, Vec::<String>::new());
    world.site_a.done(&["stop", "hotplug"]).unwrap();
    assert_ends_clean(world);
}

fn asked(vsock: &Path, request: &str) -> Device {
    let device: Device = ask(vsock, request).unwrap();
    assert!(device.ok, "{request}: {device:?}");
    device
}

fn until(vsock: &Path, request: &str, holds: impl Fn(&Device) -> bool) -> Device {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        // A disk that is just coming may not be readable yet.
        if let Ok(device) = ask::<Device>(vsock, request)
            && device.ok
            && holds(&device)
        {
            return device;
        }
        assert!(Instant::now() < deadline, "{request} does not come true");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn describe(world: &World) -> std::path::PathBuf {
    let disk = world.folder.join("disk.raw");
    fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    let described = format!(
        "name = \"hotplug\"\nvcpus = 2\nmemory = \"512 MiB\"\n\n[boot]\nkernel = \"{}\"\ninitrd = \"{}\"\n\
         cmdline = \"console=ttyS0 quiet panic=-1 reboot=k casemate.dirty_mib=8\"\n\n\
         [[disk]]\nid = \"data\"\npath = \"{}\"\n\n[vsock]\ncid = 31\n",
        world.product.kernel.display(),
        world.product.initrd.display(),
        disk.display(),
    );
    let path = world.folder.join("hotplug.toml");
    fs::write(&path, described).unwrap();
    path
}

#[derive(Debug, Deserialize)]
struct Device {
    ok: bool,
    there: bool,
    serial: String,
    head: String,
}
