//! The two pages that firmware has a hand in: it fills the secrets page and checks the CPUID page.
//! Publication 56860, "Secrets Page" and "CPUID Page".

use super::super::FirmwareError;
use crate::bytes;
use std::collections::BTreeSet;

/// One page of guest memory.
pub type PageBytes = [u8; 4096];

/// What goes into the secrets page.
pub(super) struct SecretsPage<'a> {
    pub(super) fms: u32,
    pub(super) gosvw: &'a [u8; 16],
    pub(super) vmpcks: &'a [[u8; 32]; 4],
}

impl SecretsPage<'_> {
    /// Overwrites the page, all of it.
    pub(super) fn fill(&self, page: &mut PageBytes) {
        page.fill(0);
        put(page, 0x00, &SECRETS_VERSION.to_le_bytes());
        // 0x04: no initial migration image.
        put(page, 0x08, &self.fms.to_le_bytes());
        put(page, 0x10, self.gosvw);
        for (at, key) in (VMPCK_AT..).step_by(32).zip(self.vmpcks) {
            put(page, at, key);
        }
    }
}

/// A VMPCK out of a filled secrets page; `None` for an index above 3.
pub(super) fn vmpck_of(page: &PageBytes, vmpck: u8) -> Option<[u8; 32]> {
    (vmpck < 4)
        .then(|| bytes::array(page, VMPCK_AT + 32 * usize::from(vmpck)))
        .flatten()
}

/// Checks what the host wants the guest to believe of the processor. Features that firmware never
/// lets an SNP guest have are taken out of the page, and the page is refused with INVALID_PARAM,
/// so that a host can show it to the guest's owner or submit it corrected.
///
/// Real firmware compares with its own processor. Here the rules are only those that VMMs have
/// met and work around: no TSC deadline timer, no TSC_ADJUST, no SPEC_CTRL, no virtual SSBD.
pub(super) fn check_cpuid(page: &mut PageBytes) -> Result<(), FirmwareError> {
    let count = bytes::le32(page, 0).ok_or(FirmwareError::InvalidParam)? as usize;
    let reserved: [u8; 12] = bytes::array(page, 4).ok_or(FirmwareError::InvalidParam)?;
    if count > CPUID_MAX || reserved != [0; 12] {
        return Err(FirmwareError::InvalidParam);
    }
    let mut seen = BTreeSet::new();
    let mut good = true;
    for at in (CPUID_TABLE_AT..).step_by(CPUID_ENTRY_LEN).take(count) {
        let input: [u8; 24] = bytes::array(page, at).ok_or(FirmwareError::InvalidParam)?;
        let reserved: [u8; 8] = bytes::array(page, at + 40).ok_or(FirmwareError::InvalidParam)?;
        if reserved != [0; 8] || !seen.insert(input) {
            return Err(FirmwareError::InvalidParam);
        }
        let function = (bytes::le32(page, at), bytes::le32(page, at + 4));
        for (leaf, register, bit) in NEVER {
            let (eax, ecx) = *leaf;
            if function.0 != Some(eax) || ecx.is_some_and(|ecx| function.1 != Some(ecx)) {
                continue;
            }
            let register = at + *register;
            let value = bytes::le32(page, register).unwrap_or_default();
            if value & bit != 0 {
                put(page, register, &(value & !bit).to_le_bytes());
                good = false;
            }
        }
    }
    match good {
        true => Ok(()),
        false => Err(FirmwareError::InvalidParam),
    }
}

fn put(page: &mut PageBytes, at: usize, bytes: &[u8]) {
    for (to, from) in page.iter_mut().skip(at).zip(bytes) {
        *to = *from;
    }
}

/// With TSC_FACTOR.
const SECRETS_VERSION: u32 = 3;
const VMPCK_AT: usize = 0x20;
const CPUID_MAX: usize = 64;
const CPUID_TABLE_AT: usize = 16;
const CPUID_ENTRY_LEN: usize = 48;
const EBX: usize = 28;
const ECX: usize = 32;
const EDX: usize = 36;
/// Function (EAX, and ECX where it matters), register, bit.
#[expect(clippy::type_complexity, reason = "a table that is read in one place")]
const NEVER: &[((u32, Option<u32>), usize, u32)] = &[
    ((0x1, None), ECX, 1 << 24),
    ((0x7, Some(0)), EBX, 1 << 1),
    ((0x7, Some(0)), EDX, 1 << 26),
    ((0x8000_0008, None), EBX, 1 << 25),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn table(entries: &[[u32; 10]]) -> Box<PageBytes> {
        let mut page = Box::new([0; 4096]);
        put(&mut page, 0, &(entries.len() as u32).to_le_bytes());
        for (at, entry) in (CPUID_TABLE_AT..).step_by(CPUID_ENTRY_LEN).zip(entries) {
            let [eax_in, ecx_in, xcr0, xss, a, b, c, d, rsv, _] = *entry;
            for (at, value) in [
                (at, eax_in),
                (at + 4, ecx_in),
                (at + 8, xcr0),
                (at + 16, xss),
                (at + 24, a),
                (at + EBX, b),
                (at + ECX, c),
                (at + EDX, d),
                (at + 40, rsv),
            ] {
                put(&mut page, at, &value.to_le_bytes());
            }
        }
        page
    }

    #[test]
    fn a_modest_table_passes_unchanged() {
        let mut page = table(&[
            [1, 0, 0, 0, 0x00a0_0f11, 0, 1 << 31, 0, 0, 0],
            [7, 0, 0, 0, 0, 1, 0, 0, 0, 0],
            // TSC_ADJUST's bit in another subfunction says something else.
            [7, 1, 0, 0, 0, 2, 0, 0, 0, 0],
            [0xd, 0, 1, 0, 0, 0, 0, 0, 0, 0],
            [0xd, 0, 3, 0, 0, 0, 0, 0, 0, 0],
        ]);
        let before = page.clone();
        assert_eq!(check_cpuid(&mut page), Ok(()));
        assert_eq!(page, before);
        assert_eq!(check_cpuid(&mut [0; 4096]), Ok(()));
    }

    #[test]
    fn forbidden_features_are_taken_out_and_the_page_is_refused_once() {
        for (leaf, register, bit) in [
            (1, ECX, 1u32 << 24),
            (7, EBX, 2),
            (7, EDX, 1 << 26),
            (0x8000_0008, EBX, 1 << 25),
        ] {
            let mut page = table(&[[leaf, 0, 0, 0, 0, 0, 0, 0, 0, 0]]);
            let good = page.clone();
            put(&mut page, CPUID_TABLE_AT + register, &bit.to_le_bytes());
            assert_eq!(check_cpuid(&mut page), Err(FirmwareError::InvalidParam));
            assert_eq!(page, good, "{leaf:#x}");
            assert_eq!(check_cpuid(&mut page), Ok(()));
        }
    }

    #[test]
    fn malformed_tables_are_refused_as_they_are() {
        let twice = table(&[[1, 0, 0, 0, 0, 0, 0, 0, 0, 0]; 2]);
        let reserved = table(&[[1, 0, 0, 0, 0, 0, 0, 0, 1, 0]]);
        let mut header = table(&[]);
        header[4] = 1;
        let mut long = table(&[]);
        long[0] = 65;
        for mut page in [twice, reserved, header, long] {
            let before = page.clone();
            assert_eq!(check_cpuid(&mut page), Err(FirmwareError::InvalidParam));
            assert_eq!(page, before);
        }
    }

    #[test]
    fn the_secrets_page_has_its_fields_in_their_places() {
        let vmpcks = [[1; 32], [2; 32], [3; 32], [4; 32]];
        let mut page = [0xee; 4096];
        let secrets = SecretsPage {
            fms: 0x00a0_0f11,
            gosvw: &[9; 16],
            vmpcks: &vmpcks,
        };
        secrets.fill(&mut page);
        assert_eq!(page[..8], [3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(page[8..16], [0x11, 0x0f, 0xa0, 0, 0, 0, 0, 0]);
        assert_eq!(page[0x10..0x20], [9; 16]);
        for (n, key) in vmpcks.iter().enumerate() {
            assert_eq!(vmpck_of(&page, n as u8), Some(*key));
        }
        assert_eq!(vmpck_of(&page, 4), None);
        assert!(page[0xa0..].iter().all(|byte| *byte == 0));
    }
}
