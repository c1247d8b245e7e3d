//! The peer: QEMU with nothing but what the guest needs.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use casemate_bench::PATIENCE;

use crate::Guest;
use crate::guest::MARKER;
use crate::measure::{CMDLINE, MEMORY_MIB, Sample};

/// One of its machines.
pub struct Qemu<'a> {
    command: &'a [String],
    machine: &'static str,
    guest: &'a Guest,
}

impl<'a> Qemu<'a> {
    pub fn new(command: &'a [String], machine: &'static str, guest: &'a Guest) -> Self {
        Self {
            command,
            machine,
            guest,
        }
    }

    /// Boots until the first line of user space.
    pub fn boot(&self) -> Result<Sample> {
        let (program, before) = self.command.split_first().context("no --qemu")?;
        let memory = format!("{MEMORY_MIB}M");
        let begun = Instant::now();
        let mut child = Command::new(program)
            .args(before)
            .args([
                "-M",
                self.machine,
                "-accel",
                "kvm",
                "-cpu",
                "host",
                "-m",
                &memory,
            ])
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
            ])
            .args([
                "-name",
                "guest,debug-threads=on",
                "-serial",
                "stdio",
                "-append",
                CMDLINE,
            ])
            .arg("-kernel")
            .arg(&self.guest.kernel)
            .arg("-initrd")
            .arg(&self.guest.initrd)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {program}"))?;
        let sample = watch(&mut child, begun).with_context(|| format!("QEMU {}", self.machine));
        // It is gone at the end in any case.
        let _ = child.kill();
        let _ = child.wait();
        sample
    }
}

fn watch(child: &mut Child, begun: Instant) -> Result<Sample> {
    let output = child.stdout.take().context("no output")?;
    let (sender, seen) = channel();
    thread::spawn(move || {
        for line in BufReader::new(output).lines() {
            if !line.is_ok_and(|line| sender.send(line).is_ok()) {
                return;
            }
        }
    });
    let limit = begun + PATIENCE;
    let mut said = Vec::new();
    loop {
        let left = limit.saturating_duration_since(Instant::now());
        match seen.recv_timeout(left) {
            Ok(line) if line.contains(MARKER) => return Sample::take(child.id(), begun),
            Ok(line) => said.push(line),
            Err(_) => bail!("no line of user space: {}", said.join("\n")),
        }
    }
}
