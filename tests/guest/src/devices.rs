//! The small devices, from inside: random numbers, terminal, memory that comes and goes, watchdog.
#![expect(unsafe_code, reason = "the watchdog's registers are mapped")]

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use nix::sys::mman::{MapFlags, ProtFlags, mmap};

use crate::boot;
use crate::console::say;
use crate::supervise;

/// Answers each line that comes by the virtio console, if there is one.
pub(crate) fn spawn() {
    let Ok(terminal) = OpenOptions::new().read(true).write(true).open("/dev/hvc0") else {
        return;
    };
    supervise::spawn("hvc0", move || {
        for line in BufReader::new(&terminal).lines() {
            let Ok(line) = line else { break };
            let _ = writeln!(&terminal, "hvc0: {line}");
        }
        say!("hvc0 has ended");
    });
}

/// What there is: the kernel's source of random numbers with 16 bytes of it, memory in KiB, disks, and how often each
/// receive queue of the card has interrupted.
pub(crate) fn answer() -> String {
    let source = fs::read_to_string("/sys/class/misc/hw_random/rng_current").unwrap_or_default();
    let mut random = [0; 16];
    let read = File::open("/dev/hwrng").and_then(|mut file| file.read_exact(&mut random));
    let random: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    let read_only = fs::read_to_string("/sys/block/vdb/ro").unwrap_or_default();
    let discard = fs::read_to_string("/sys/block/vda/queue/discard_max_bytes").unwrap_or_default();
    let size = fs::read_to_string("/sys/block/vda/size").unwrap_or_default();
    let serial = fs::read_to_string("/sys/block/vda/serial").unwrap_or_default();
    format!(
        "{{\"ok\":{},\"rng\":\"{}\",\"random\":\"{random}\",\"memory_kib\":{},\"hvc0\":{},\"vdb_read_only\":{},\
         \"vda_discard\":{},\"vda_sectors\":{},\"vda_serial\":\"{}\",\"card_interrupts\":{:?}}}",
        read.is_ok(),
        source.trim(),
        boot::memory_mib() * 1024,
        fs::exists("/dev/hvc0").unwrap_or(false),
        read_only.trim() == "1",
        number(&discard),
        number(&size),
        serial.trim(),
        card_interrupts(),
    )
}

fn card_interrupts() -> Vec<u64> {
    let table = fs::read_to_string("/proc/interrupts").unwrap_or_default();
    let queues = table.lines().filter(|line| line.contains("-input."));
    let count = |line: &str| {
        let numbers = line
            .split_whitespace()
            .skip(1)
            .map_while(|word| word.parse::<u64>().ok());
        numbers.sum()
    };
    queues.map(count).collect()
}

fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or(0)
}

/// Uses so many MiB of memory and lets them go.
pub(crate) fn use_memory(mib: &str) -> String {
    let Ok(mib @ 1..=512) = mib.parse::<usize>() else {
        return failed("want 1 to 512 MiB");
    };
    let mut memory = vec![0u8; mib << 20];
    memory
        .iter_mut()
        .step_by(4096)
        .for_each(|byte| *byte = 0xa5);
    let sum: u64 = memory
        .iter()
        .step_by(4096)
        .map(|byte| u64::from(*byte))
        .sum();
    drop(memory);
    format!("{{\"ok\":{}}}", sum == 0xa5 * 256 * mib as u64)
}

/// Starts the watchdog and never feeds it: it barks after twice so many milliseconds.
pub(crate) fn starve(milliseconds: &str) -> String {
    let Ok(milliseconds @ 1..=60_000) = milliseconds.parse::<u32>() else {
        return failed("want 1 to 60000 milliseconds");
    };
    match start_watchdog(milliseconds) {
        Ok(()) => "{\"ok\":true}".to_owned(),
        Err(error) => failed(&error.to_string()),
    }
}

/// What Linux's `i6300esb` does at its start; Debian's cloud kernel 6.1 is built without that driver.
fn start_watchdog(milliseconds: u32) -> io::Result<()> {
    let folder = find(0x8086, 0x25ab)?;
    fs::write(folder.join("enable"), "1")?;
    let open = |name: &str| {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(folder.join(name))
    };
    let (config, registers) = (open("config")?, open("resource0")?);
    let length = std::num::NonZero::new(4096).ok_or(io::ErrorKind::InvalidInput)?;
    let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping of the device's own page; nothing else in this program knows it.
    let page = unsafe {
        mmap(
            None,
            length,
            access,
            MapFlags::MAP_SHARED,
            registers.as_fd(),
            0,
        )
    }?;
    let write = |offset: usize, value: u32| {
        for word in [0x80u16, 0x86] {
            // SAFETY: the reload register, within the page mapped above, aligned.
            unsafe { page.byte_add(0xc).cast::<u16>().write_volatile(word) };
        }
        // SAFETY: a register within the page mapped above, aligned.
        unsafe { page.byte_add(offset).cast::<u32>().write_volatile(value) };
    };
    config.write_all_at(&[3, 0], 0x60)?;
    write(0, milliseconds);
    write(4, milliseconds);
    write(0xc, 0x100);
    config.write_all_at(&[2], 0x68)
}

fn find(vendor: u32, device: u32) -> io::Result<PathBuf> {
    for entry in fs::read_dir("/sys/bus/pci/devices")? {
        let folder = entry?.path();
        let is = |file: &str, wanted: u32| {
            fs::read_to_string(folder.join(file))
                .is_ok_and(|text| text.trim() == format!("{wanted:#06x}"))
        };
        if is("vendor", vendor) && is("device", device) {
            return Ok(folder);
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

fn failed(error: &str) -> String {
    format!("{{\"ok\":false,\"error\":\"{error}\"}}")
}
