//! The lab's `/init`: mounts, modules, then the agent that runs one program and reports how it ended.
//!
//! The runner is believed (it is us); the program under test is not: it may leave children, closed pipes or a flood.

mod agent;

use std::{
    fs::{self, File},
    os::unix::fs::symlink,
    path::Path,
    thread,
    time::Duration,
};

use anyhow::Context;
use nix::{
    mount::{MsFlags, mount},
    unistd::{chdir, chroot, sethostname},
};

use crate::sys;

/// Never returns while the machine lives; an error ends the machine.
pub fn main() {
    // The console shows it, and the runner prints the console's end.
    if let Err(error) = set_up().and_then(|()| agent::serve()) {
        eprintln!("lab init: {error:#}");
    }
    // Let the serial port drain.
    thread::sleep(Duration::from_millis(100));
    let _ = sys::restart();
}

/// Load the modules that `/modules/load` lists and for which `wanted` holds.
fn load_modules(wanted: impl Fn(&str) -> bool) -> anyhow::Result<()> {
    let order = fs::read_to_string("/modules/load")?;
    for name in order.lines().filter(|name| wanted(name)) {
        let file = File::open(Path::new("/modules").join(name))
            .with_context(|| format!("open module {name}"))?;
        sys::load_module(&file).with_context(|| format!("load module {name}"))?;
    }
    Ok(())
}

fn set_up() -> anyhow::Result<()> {
    leave_rootfs()?;
    for (kind, at, options) in MOUNTS {
        fs::create_dir_all(at)?;
        mount(Some(kind), at, Some(kind), MsFlags::empty(), options)
            .with_context(|| format!("mount {at}"))?;
    }
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "fd/0"),
        ("/dev/stdout", "fd/1"),
        ("/dev/stderr", "fd/2"),
    ] {
        if !Path::new(link).exists() {
            symlink(target, link)?;
        }
    }
    for dir in ["/etc", "/root", "/var/tmp", "/out"] {
        fs::create_dir_all(dir)?;
    }
    fs::write(
        "/etc/passwd",
        "root:x:0:0:root:/root:/\nnobody:x:65534:65534:nobody:/:/\n",
    )?;
    fs::write("/etc/group", "root:x:0:\nnogroup:x:65534:\n")?;
    fs::write("/etc/hosts", "127.0.0.1 localhost lab\n")?;
    sethostname("lab")?;
    sys::loopback_up()?;
    // The block driver waits: it shall meet the disk of the run, not the one of the snapshot.
    load_modules(|name| name != BLOCK_DRIVER)
}

/// Move to a tmpfs: `pivot_root`, which jails use, refuses to work below the initial root file system.
fn leave_rootfs() -> anyhow::Result<()> {
    let new = "/newroot";
    fs::create_dir(new)?;
    mount(
        Some("root"),
        new,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("mode=755"),
    )?;
    // Moving frees the initial copy of each file.
    fs::create_dir("/newroot/modules")?;
    for entry in fs::read_dir("/modules")? {
        let entry = entry?;
        fs::copy(
            entry.path(),
            Path::new("/newroot/modules").join(entry.file_name()),
        )?;
        fs::remove_file(entry.path())?;
    }
    chdir(new)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
    chroot(".")?;
    chdir("/")?;
    Ok(())
}

/// Loaded only after the snapshot is restored.
const BLOCK_DRIVER: &str = "virtio_blk.ko";

/// Type, place, options; in this order.
const MOUNTS: [(&str, &str, Option<&str>); 10] = [
    ("proc", "/proc", None),
    ("sysfs", "/sys", None),
    ("devtmpfs", "/dev", None),
    ("devpts", "/dev/pts", Some("ptmxmode=666")),
    ("tmpfs", "/dev/shm", Some("mode=1777")),
    ("tmpfs", "/tmp", Some("mode=1777")),
    ("tmpfs", "/run", Some("mode=755")),
    ("cgroup2", "/sys/fs/cgroup", None),
    ("debugfs", "/sys/kernel/debug", None),
    ("securityfs", "/sys/kernel/security", None),
];
