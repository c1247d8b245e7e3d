//! Puts together what the guests of demo and tests boot: Debian's kernel as it is, and an initramfs around our
//! init and the agent that guests get their reports with.

use std::fs;
use std::path::PathBuf;

use crate::{
    cpio::Archive,
    error::{OnFile, Result},
    kernel::KernelPackage,
    paths::{Paths, make_dir, read, write_whole},
    prepare::{add_modules, guest_package, lab_package, prepare_packages},
    say,
    tools::Tools,
};

/// Write `vmlinuz`, `vmlinux` and `initrd.cpio`, and the same of the lab's own newer kernel, when what is there is not
/// already the same.
pub fn make(paths: &Paths) -> Result<()> {
    prepare_packages(paths)?;
    make_dir(&paths.guest())?;
    let package = KernelPackage::open(&guest_package(paths))?;
    let initrd = initramfs(paths, &package)?;
    let is = |path: PathBuf, bytes: &[u8]| fs::read(path).is_ok_and(|old| old == bytes);
    if !(is(paths.guest_initrd(), &initrd)
        && paths.guest_kernel().exists()
        && paths.guest_vmlinux().exists())
    {
        let vmlinux = package.vmlinux(&Tools::at(&paths.tools()))?;
        write_whole(&paths.guest_vmlinux(), &vmlinux)?;
        fs::copy(&package.image, paths.guest_kernel()).on("copy", &package.image)?;
        write_whole(&paths.guest_initrd(), &initrd)?;
        said(paths, &package, &initrd);
    }
    let newer = KernelPackage::open(&lab_package(paths))?;
    let initrd = initramfs(paths, &newer)?;
    if !(is(paths.newer_initrd(), &initrd) && paths.newer_kernel().exists()) {
        fs::copy(&newer.image, paths.newer_kernel()).on("copy", &newer.image)?;
        write_whole(&paths.newer_initrd(), &initrd)?;
        said(paths, &newer, &initrd);
    }
    Ok(())
}

fn initramfs(paths: &Paths, package: &KernelPackage) -> Result<Vec<u8>> {
    let init = read(&paths.release.join("casemate-guest"))?;
    let agent = read(&paths.release.join("casemate-agent"))?;
    let mut archive = Archive::default();
    archive.directory("dev");
    archive.device("dev/console", 0o600, (5, 1));
    archive.file("init", 0o755, &init);
    archive.directory("bin");
    archive.file("bin/casemate-agent", 0o755, &agent);
    add_modules(&mut archive, package, &MODULES, &Tools::at(&paths.tools()))?;
    Ok(archive.finish())
}

fn said(paths: &Paths, package: &KernelPackage, initrd: &[u8]) {
    say(&format!(
        "guest image: Linux {}, initramfs of {} KiB, in {}",
        package.release,
        initrd.len() / 1024,
        paths.guest().display()
    ));
}

/// What the guest's devices need: virtio over PCI, disk, network card, socket, random numbers, balloon and terminal; power button, panic device.
const MODULES: [&str; 11] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "vmw_vsock_virtio_transport",
    "af_packet",
    "virtio_rng",
    "virtio_balloon",
    "virtio_console",
    "button",
    "evdev",
    "pvpanic_mmio",
];
