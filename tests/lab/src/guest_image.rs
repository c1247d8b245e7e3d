//! Puts together what the guests of demo and tests boot: Debian's kernel as it is, and an initramfs around our
//! init and the agent that guests get their reports with.

use std::fs;

use crate::{
    cpio::Archive,
    error::{OnFile, Result},
    kernel::KernelPackage,
    paths::{Paths, make_dir, read, write_whole},
    prepare::{add_modules, guest_package, prepare_packages},
    say,
    tools::Tools,
};

/// Write `vmlinuz`, `vmlinux` and `initrd.cpio`, when what is there is not already the same.
pub fn make(paths: &Paths) -> Result<()> {
    prepare_packages(paths)?;
    make_dir(&paths.guest())?;
    let package = KernelPackage::open(&guest_package(paths))?;
    let init = read(&paths.release.join("casemate-guest"))?;
    let agent = read(&paths.release.join("casemate-agent"))?;
    let mut archive = Archive::default();
    archive.directory("dev");
    archive.device("dev/console", 0o600, (5, 1));
    archive.file("init", 0o755, &init);
    archive.directory("bin");
    archive.file("bin/casemate-agent", 0o755, &agent);
    add_modules(&mut archive, &package, &MODULES, &Tools::at(&paths.tools()))?;
    let initrd = archive.finish();
    if fs::read(paths.guest_initrd()).is_ok_and(|old| old == initrd)
        && paths.guest_kernel().exists()
        && paths.guest_vmlinux().exists()
    {
        return Ok(());
    }
    let vmlinux = package.vmlinux(&Tools::at(&paths.tools()))?;
    write_whole(&paths.guest_vmlinux(), &vmlinux)?;
    fs::copy(&package.image, paths.guest_kernel()).on("copy", &package.image)?;
    write_whole(&paths.guest_initrd(), &initrd)?;
    say(&format!(
        "guest image: Linux {}, initramfs of {} KiB, in {}",
        package.release,
        initrd.len() / 1024,
        paths.guest().display()
    ));
    Ok(())
}

/// What the guest's devices need: virtio over PCI, disk, network card, socket, random numbers, balloon and terminal; power button.
const MODULES: [&str; 10] = [
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
];
