//! The secrets page, through `/dev/mem`: where it is, its key, its count.
//!
//! The page is reserved in the memory map and below the end of RAM, so that `/dev/mem` reads and
//! writes it even with CONFIG_STRICT_DEVMEM.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use casemate_attest::processor::snp::PageBytes;
use zeroize::Zeroizing;

use super::MessagesError;

pub(super) struct SecretsPage {
    memory: File,
    path: PathBuf,
    gpa: u64,
}

impl SecretsPage {
    /// Its address, as the kernel command line at `path` says. What the VMM writes is last.
    pub(super) fn address(path: &Path) -> Result<u64, MessagesError> {
        let text = fs::read(path).map_err(|error| MessagesError::File {
            doing: "read",
            path: path.to_owned(),
            error,
            remedy: "mount /proc",
        })?;
        let text = String::from_utf8_lossy(&text);
        let word = text
            .split_ascii_whitespace()
            .rev()
            .find_map(|word| word.strip_prefix(WORD));
        let word = word.ok_or_else(|| MessagesError::NotEmulated(path.to_owned()))?;
        pages(word).ok_or_else(|| MessagesError::Word(format!("{WORD}{word}")))
    }

    pub(super) fn open(memory: &Path, gpa: u64) -> Result<Self, MessagesError> {
        let opened = OpenOptions::new().read(true).write(true).open(memory);
        let path = memory.to_owned();
        match opened {
            Ok(memory) => Ok(Self { memory, path, gpa }),
            Err(error) => Err(MessagesError::File {
                doing: "opened",
                path,
                error,
                remedy: "it takes root, a kernel with CONFIG_DEVMEM, and no lockdown",
            }),
        }
    }

    /// The page and its count.
    pub(super) fn read(&self) -> Result<(Zeroizing<PageBytes>, u32), MessagesError> {
        let mut page = Zeroizing::new([0; 4096]);
        self.memory
            .read_exact_at(page.as_mut_slice(), self.gpa)
            .map_err(|error| self.failed("read", error))?;
        let key = page.iter().skip(VMPCK0_AT).take(VMPCK_LEN);
        if key.fold(0, |any, byte| any | byte) == 0 {
            return Err(MessagesError::NoKey(self.gpa));
        }
        let mut count = [0; 4];
        for (to, from) in count.iter_mut().zip(page.iter().skip(COUNT_AT)) {
            *to = *from;
        }
        Ok((page, u32::from_le_bytes(count)))
    }

    pub(super) fn set_count(&self, count: u32) -> Result<(), MessagesError> {
        let at = self.gpa + COUNT_AT as u64;
        self.memory
            .write_all_at(&count.to_le_bytes(), at)
            .map_err(|error| self.failed("written", error))
    }

    fn failed(&self, doing: &'static str, error: std::io::Error) -> MessagesError {
        MessagesError::File {
            doing,
            path: self.path.clone(),
            error,
            remedy: "the secrets page must be reserved in the memory map, below the end of RAM",
        }
    }
}

/// The first of two different pages above 1 MiB, where `/dev/mem` gives access to what is reserved.
fn pages(word: &str) -> Option<u64> {
    let (secrets, cpuid) = word.split_once(',')?;
    let page = |text: &str| {
        let digits = text.strip_prefix("0x")?;
        let plain = digits.bytes().all(|digit| digit.is_ascii_hexdigit());
        let gpa = u64::from_str_radix(digits, 16).ok().filter(|_| plain)?;
        let good = gpa.is_multiple_of(4096) && (1 << 20..1 << 52).contains(&gpa);
        good.then_some(gpa)
    };
    let (secrets, cpuid) = (page(secrets)?, page(cpuid)?);
    (secrets != cpuid).then_some(secrets)
}

const WORD: &str = "casemate.snp=";
/// Publication 56860, "Secrets Page".
const VMPCK0_AT: usize = 0x20;
const VMPCK_LEN: usize = 32;
/// Linux, `struct secrets_os_area`: `msg_seqno_0`, 32 bits, little-endian.
const COUNT_AT: usize = 0xa0;

#[cfg(test)]
mod tests {
    use super::*;

    fn address(line: &str) -> Result<u64, MessagesError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cmdline");
        fs::write(&path, line).unwrap();
        SecretsPage::address(&path)
    }

    #[test]
    fn the_last_word_names_the_page() {
        for line in [
            "console=ttyS0 casemate.snp=0xffe000,0xffd000\n",
            "casemate.snp=0x100000,0x101000 -- x casemate.snp=0xffe000,0xFFD000 casemate.ip=1",
        ] {
            assert_eq!(address(line).unwrap(), 0xff_e000);
        }
        for line in ["", "console=ttyS0 xcasemate.snp=0xffe000,0xffd000"] {
            assert!(matches!(address(line), Err(MessagesError::NotEmulated(_))));
        }
        let refused = SecretsPage::address(Path::new("/nowhere/cmdline"));
        assert!(matches!(refused, Err(MessagesError::File { .. })));
    }

    #[test]
    fn other_words_are_refused() {
        for pages in [
            "",
            "0xffe000",
            "0xffe000,",
            "ffe000,ffd000",
            "0xffe000,0xffe000",
            "0xffe001,0xffd000",
            "0xff000,0xffd000",
            "0x10000000000000,0xffd000",
            "0x,0xffd000",
            "0x+ffe000,0xffd000",
            "0xffe000,0xffd000,0xffc000",
        ] {
            let line = format!("quiet casemate.snp={pages}");
            let refused = address(&line).unwrap_err();
            assert!(matches!(refused, MessagesError::Word(_)), "{line}");
        }
    }

    #[test]
    fn a_page_without_a_key_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let memory = folder.path().join("mem");
        fs::write(&memory, [0; 0x3000]).unwrap();
        let page = SecretsPage::open(&memory, 0x1000).unwrap();
        assert!(matches!(page.read(), Err(MessagesError::NoKey(0x1000))));
        page.memory.write_all_at(&[1], 0x1000 + 0x3f).unwrap();
        page.set_count(0x0102_0304).unwrap();
        assert_eq!(page.read().unwrap().1, 0x0102_0304);
        let raw = fs::read(&memory).unwrap();
        assert_eq!(raw[0x10a0..0x10a8], [4, 3, 2, 1, 0, 0, 0, 0]);
        let beyond = SecretsPage::open(&memory, 0x3000).unwrap();
        assert!(matches!(beyond.read(), Err(MessagesError::File { .. })));
        assert!(SecretsPage::open(Path::new("/nowhere/mem"), 0x1000).is_err());
    }
}
