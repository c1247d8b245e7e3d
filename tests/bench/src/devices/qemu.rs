//! The peer: QEMU's q35 with one virtio disk and one virtio card, as their defaults are: the page cache on, worker
//! threads for the disk, no vhost.

use std::fs::{self, File};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};

use super::net::{MAC, TAP};
use super::vmm::{Guest, MEMORY_MIB, VCPUS, cmdline, figures};

pub fn run(command: &[String], guest: &Guest) -> Result<String> {
    let (program, before) = command.split_first().context("no --qemu")?;
    let _ = fs::remove_file(&guest.console);
    let log = guest.console.with_extension("log");
    let mut child = Command::new(program)
        .args(before)
        .args(["-M", "q35", "-accel", "kvm", "-cpu", "host"])
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .arg("-no-reboot")
        .args(["-m", &format!("{MEMORY_MIB}M"), "-smp", &VCPUS.to_string()])
        .args(["-append", &cmdline()])
        .arg("-kernel")
        .arg(&guest.kernel)
        .arg("-initrd")
        .arg(&guest.initrd)
        .args(["-serial", &format!("file:{}", guest.console.display())])
        .args([
            "-drive",
            &format!(
                "if=none,id=data,format=raw,cache=writeback,aio=threads,file={}",
                guest.disk.display()
            ),
        ])
        .args(["-device", "virtio-blk-pci,drive=data,disable-legacy=on"])
        .args([
            "-netdev",
            &format!("tap,id=net0,ifname={TAP},script=no,downscript=no,vhost=off"),
        ])
        .args([
            "-device",
            &format!("virtio-net-pci,netdev=net0,mac={MAC},disable-legacy=on,romfile="),
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(&log).context("make QEMU's log")?)
        .spawn()
        .with_context(|| format!("start {program}"))?;
    let said = figures(&guest.console)
        .with_context(|| format!("QEMU: {}", fs::read_to_string(&log).unwrap_or_default()));
    // It is gone at the end in any case.
    let _ = child.kill();
    let _ = child.wait();
    said
}
