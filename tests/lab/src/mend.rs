//! Mends a fault of the emulator that a guest with firmware meets every few seconds.
//!
//! When a nested guest writes CR8 while an interrupt window is open for it, QEMU's `helper_write_crN` raises an
//! interrupt of its own CPU without the big lock, and the assertion in `tcg_handle_interrupt` ends QEMU. EDK II writes
//! CR8 at the end of every interrupt. The CPU's own thread may set the bit without the lock, as QEMU's `helper_vmrun`
//! does beside it: the assertion alone is taken out, of our unpacked copy, if it is there as we know it.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use crate::{
    error::{OnFile, Result},
    paths::{read, write_whole},
    say,
};

/// Take the assertion out, if it is in there.
pub fn mend(qemu: &Path) -> Result<()> {
    let mut image = read(qemu)?;
    let Some(at) = assertion(&image) else {
        return Ok(());
    };
    if let Some(branch) = image.get_mut(at) {
        *branch = JMP;
    }
    write_whole(qemu, &image)?;
    let executable = fs::Permissions::from_mode(0o755);
    fs::set_permissions(qemu, executable).on("make executable", qemu)?;
    say("took an assertion out of the lab's QEMU that ends it when a nested guest writes CR8");
    Ok(())
}

/// Where in the file the branch is that passes the assertion by.
fn assertion(image: &[u8]) -> Option<usize> {
    let start = symbol(image, FUNCTION)?;
    let code = image.get(start..start.checked_add(REACH)?)?;
    // call bql_locked; test al, al; jne
    let call = code
        .windows(8)
        .position(|w| w.first() == Some(&CALL) && w.ends_with(TEST_AND_JNE))?;
    Some(start + call + 7)
}

/// File offset of a function among the dynamic symbols of a 64-bit ELF file whose code is mapped where it lies.
fn symbol(image: &[u8], name: &[u8]) -> Option<usize> {
    let (symbols, names) = dynamic_symbols(image)?;
    let (entries, _) = symbols.as_chunks::<SYMBOL>();
    let found = entries.iter().find(|entry| {
        let [a, b, c, d, ..] = **entry;
        let at = u32::from_le_bytes([a, b, c, d]) as usize;
        names.get(at..).is_some_and(|text| {
            text.strip_prefix(name)
                .is_some_and(|rest| rest.first() == Some(&0))
        })
    })?;
    word(found, 8)
}

/// The sections of dynamic symbols and of their names.
fn dynamic_symbols(image: &[u8]) -> Option<(&[u8], &[u8])> {
    if !image.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let table = word(image, 0x28)?;
    let count = usize::from(u16::from_le_bytes(*image.get(0x3c..)?.first_chunk()?));
    let section = |index: usize| {
        let at = table.checked_add(index.checked_mul(SECTION)?)?;
        image.get(at..at.checked_add(SECTION)?)
    };
    let body = |header: &[u8]| {
        let start = word(header, 0x18)?;
        image.get(start..start.checked_add(word(header, 0x20)?)?)
    };
    let kind = |header: &[u8]| header.get(4..8) == Some(&DYNSYM.to_le_bytes());
    let symbols = (0..count).filter_map(section).find(|header| kind(header))?;
    let link = u32::from_le_bytes(*symbols.get(0x28..)?.first_chunk()?);
    Some((body(symbols)?, body(section(link as usize)?)?))
}

fn word(bytes: &[u8], at: usize) -> Option<usize> {
    let word = bytes.get(at..)?.first_chunk()?;
    usize::try_from(u64::from_le_bytes(*word)).ok()
}

const FUNCTION: &[u8] = b"tcg_handle_interrupt";
/// How far into the function the assertion is sought.
const REACH: usize = 32;
const CALL: u8 = 0xe8;
const TEST_AND_JNE: &[u8] = &[0x84, 0xc0, 0x75];
const JMP: u8 = 0xeb;
const SECTION: usize = 64;
const SYMBOL: usize = 24;
const DYNSYM: u32 = 11;

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF file with one dynamic symbol and `code` as its function.
    fn elf(name: &[u8], code: &[u8]) -> Vec<u8> {
        let mut image = vec![0u8; 0x400];
        let mut set = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        set(0, b"\x7fELF\x02\x01");
        set(0x28, &0x40u64.to_le_bytes());
        set(0x3c, &2u16.to_le_bytes());
        set(0x40 + 4, &DYNSYM.to_le_bytes());
        set(0x40 + 0x18, &0x100u64.to_le_bytes());
        set(0x40 + 0x20, &(2 * SYMBOL as u64).to_le_bytes());
        set(0x40 + 0x28, &1u32.to_le_bytes());
        set(0x80 + 0x18, &0x200u64.to_le_bytes());
        set(0x80 + 0x20, &64u64.to_le_bytes());
        set(0x100 + SYMBOL, &1u32.to_le_bytes());
        set(0x100 + SYMBOL + 8, &0x300u64.to_le_bytes());
        set(0x201, name);
        set(0x300, code);
        image
    }

    #[test]
    fn the_branch_past_the_assertion_is_always_taken_and_once_only() {
        let code = [0x55, 0xe8, 1, 2, 3, 4, 0x84, 0xc0, 0x75, 0x24];
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qemu");
        fs::write(&path, elf(FUNCTION, &code)).unwrap();
        mend(&path).unwrap();
        let mended = fs::read(&path).unwrap();
        assert_eq!(
            mended[0x300..0x30a],
            [0x55, 0xe8, 1, 2, 3, 4, 0x84, 0xc0, 0xeb, 0x24]
        );
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o755
        );
        assert_eq!(assertion(&mended), None);
    }

    #[test]
    fn what_is_not_as_we_know_it_stays_as_it_is() {
        let good = [0xe8, 1, 2, 3, 4, 0x84, 0xc0, 0x75];
        let other = [0xe8, 1, 2, 3, 4, 0x84, 0xc0, 0x74];
        for image in [
            elf(b"tcg_handle_interrupts", &good),
            elf(FUNCTION, &other),
            elf(FUNCTION, &good)[..0x302].to_vec(),
            b"#!/bin/sh\n".to_vec(),
            Vec::new(),
        ] {
            assert_eq!(assertion(&image), None);
        }
        assert_eq!(assertion(&elf(FUNCTION, &good)), Some(0x307));
    }
}
