//! What an init has to do before anything else works: file systems, modules, the network card.

use std::fs::{self, File};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};

use crate::console::say;
use crate::options::Address;
use crate::sys;

/// Mounts `/proc`, `/sys` and `/dev`. There is no console yet to complain on; what is missing shows later.
pub(crate) fn mount_all() {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        let _ = fs::create_dir_all(target);
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
        let _ = mount(Some(kind), target, Some(kind), flags, None::<&str>);
    }
}

/// The kernel command line.
pub(crate) fn command_line() -> String {
    fs::read_to_string("/proc/cmdline").unwrap_or_default()
}

/// `kernel=… vcpus=… memory_mib=…`
pub(crate) fn describe() -> String {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let vcpus = thread::available_parallelism().map_or(0, usize::from);
    format!(
        "kernel={} vcpus={vcpus} memory_mib={}",
        kernel.trim(),
        memory_mib()
    )
}

/// The memory the kernel has, in MiB.
pub(crate) fn memory_mib() -> u64 {
    total_kib(&fs::read_to_string("/proc/meminfo").unwrap_or_default()) / 1024
}

/// Loads the modules that `/modules/load` names, in that order.
pub(crate) fn load_modules() {
    let directory = Path::new("/modules");
    let Ok(order) = fs::read_to_string(directory.join("load")) else {
        return;
    };
    for name in order.lines().map(str::trim).filter(|name| !name.is_empty()) {
        let loaded = File::open(directory.join(name)).and_then(|file| sys::load_module(&file));
        match loaded.map_err(|error| (error.raw_os_error(), error)) {
            Ok(()) | Err((Some(libc::EEXIST), _)) => {}
            Err((Some(libc::ENOENT), _)) => {
                say!("module {name} not loaded: not there, or a module it needs is not loaded yet")
            }
            Err((_, error)) => say!("module {name} not loaded: {error}"),
        }
    }
}

/// Brings up `lo`, and `eth0` with its static address.
pub(crate) fn network(address: Option<Address>) {
    if let Err(error) = sys::interface_up("lo") {
        say!("lo is not up: {error}");
    }
    let Some(address) = address else { return };
    let patience = Instant::now() + Duration::from_secs(3);
    while !Path::new("/sys/class/net/eth0").exists() && Instant::now() < patience {
        thread::sleep(Duration::from_millis(20));
    }
    let set = sys::interface_address("eth0", address.ip, address.mask())
        .and_then(|()| sys::interface_up("eth0"));
    match set {
        Ok(()) => say!("net eth0 {}/{}", address.ip, address.prefix),
        Err(error) => say!("eth0 is not up: {error}"),
    }
}

fn total_kib(meminfo: &str) -> u64 {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"));
    line.and_then(|rest| rest.trim().split(' ').next()?.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_from_meminfo() {
        assert_eq!(
            total_kib("MemTotal:         491520 kB\nMemFree:  1 kB\n"),
            491_520
        );
        assert_eq!(total_kib("nothing"), 0);
    }
}
