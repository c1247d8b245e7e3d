//! A kernel image with one byte changed: it still parses, and it is another kernel.

use std::fs;
use std::path::Path;

use crate::error::{E2eError, OnFile, Result};

/// Copies a bzImage and flips one bit in the middle of its compressed payload; returns the byte's offset.
pub fn tamper(kernel: &Path, copy: &Path) -> Result<usize> {
    let mut image = fs::read(kernel).on("read", kernel)?;
    let offset = middle_of_payload(&image).ok_or_else(|| {
        E2eError::Answer(format!(
            "{} is no bzImage with a compressed payload",
            kernel.display()
        ))
    })?;
    if let Some(byte) = image.get_mut(offset) {
        *byte ^= 1;
    }
    fs::write(copy, image).on("write", copy)?;
    Ok(offset)
}

/// Fields of the setup header: Linux, Documentation/arch/x86/boot.rst.
fn middle_of_payload(image: &[u8]) -> Option<usize> {
    let word =
        |at: usize| Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?) as usize);
    (image.get(0x202..0x206)? == b"HdrS").then_some(())?;
    let setup = match *image.get(0x1f1)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let middle = (setup + 1) * 512 + word(0x248)? + word(0x24c)? / 2;
    (middle < image.len()).then_some(middle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_one_bit_differs_and_what_is_no_kernel_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (kernel, copy) = (folder.path().join("k"), folder.path().join("c"));
        let mut image = vec![0u8; 8192];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x1f1] = 3;
        image[0x248] = 100;
        image[0x24d] = 2;
        fs::write(&kernel, &image).unwrap();
        assert_eq!(tamper(&kernel, &copy).unwrap(), 2048 + 100 + 256);
        let changed = fs::read(&copy).unwrap();
        let different: u32 = image
            .iter()
            .zip(&changed)
            .map(|(a, b)| (a ^ b).count_ones())
            .sum();
        assert_eq!(different, 1);
        fs::write(&kernel, b"MZ").unwrap();
        assert!(tamper(&kernel, &copy).is_err());
    }
}
