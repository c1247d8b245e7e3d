//! Kernel and initramfs as they come: bytes at hand, or a file of which only what is needed is read.
//!
//! What is read from a file twice may differ. So headers are read once, and what is measured is read once and whole.

use std::borrow::Cow;
use std::fs::File;
use std::os::unix::fs::FileExt;

use super::BootError;

/// An image.
#[derive(Clone, Copy, Debug)]
pub enum Image<'a> {
    /// Bytes at hand.
    Bytes(&'a [u8]),
    /// A file, and its length when it was opened.
    File(&'a File, u64),
}

impl<'a> Image<'a> {
    /// An open file, whatever its position.
    pub fn of(file: &'a File) -> Result<Self, BootError> {
        let length = file.metadata().map_err(BootError::Read)?.len();
        if length > MAX_IMAGE {
            return Err(BootError::Kernel("or initramfs is larger than 1 GiB"));
        }
        Ok(Self::File(file, length))
    }

    /// Length in bytes.
    pub fn length(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File(_, length) => *length,
        }
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.length() == 0
    }

    /// Bytes of it; `None` where it ends before.
    pub fn read(&self, offset: u64, length: u64) -> Result<Option<Cow<'a, [u8]>>, BootError> {
        let Some(end) = offset
            .checked_add(length)
            .filter(|end| *end <= self.length())
        else {
            return Ok(None);
        };
        match self {
            // No longer than what is in memory.
            Self::Bytes(bytes) => Ok(bytes.get(offset as usize..end as usize).map(Cow::Borrowed)),
            Self::File(file, _) => {
                // At most MAX_IMAGE.
                let mut bytes = vec![0u8; length as usize];
                file.read_exact_at(&mut bytes, offset)
                    .map_err(BootError::Read)?;
                Ok(Some(Cow::Owned(bytes)))
            }
        }
    }

    /// All of it.
    pub fn whole(&self) -> Result<Cow<'a, [u8]>, BootError> {
        Ok(self.read(0, self.length())?.unwrap_or_default())
    }
}

impl<'a> From<&'a [u8]> for Image<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self::Bytes(bytes)
    }
}

impl<'a> From<&'a Vec<u8>> for Image<'a> {
    fn from(bytes: &'a Vec<u8>) -> Self {
        Self::Bytes(bytes)
    }
}

impl<'a, const N: usize> From<&'a [u8; N]> for Image<'a> {
    fn from(bytes: &'a [u8; N]) -> Self {
        Self::Bytes(bytes)
    }
}

/// What goes from an image to guest memory as it is, and is not measured: of plain guests only.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// `kernel` or `initrd`.
    pub name: &'static str,
    /// Where it goes.
    pub gpa: u64,
    /// From where.
    pub image: Image<'a>,
    /// From which byte on.
    pub offset: u64,
    /// How many bytes.
    pub length: u64,
}

const MAX_IMAGE: u64 = 1 << 30;

#[cfg(test)]
mod tests {
    use std::io::{Seek as _, SeekFrom, Write as _};

    use super::*;

    #[test]
    fn a_file_reads_as_its_bytes_do_and_neither_beyond_its_end() {
        let bytes = b"0123456789";
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file.seek(SeekFrom::Start(7)).unwrap();
        for image in [Image::from(bytes), Image::of(&file).unwrap()] {
            assert_eq!(image.read(2, 3).unwrap().unwrap(), &b"234"[..]);
            assert_eq!(image.whole().unwrap(), &bytes[..]);
            for (offset, length) in [(8, 3), (11, 0), (u64::MAX, 2)] {
                assert_eq!(image.read(offset, length).unwrap(), None);
            }
        }
    }

    #[test]
    fn a_file_that_shrinks_or_is_too_long_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(100).unwrap();
        let image = Image::of(&file).unwrap();
        file.set_len(50).unwrap();
        assert!(matches!(image.whole(), Err(BootError::Read(_))));
        file.set_len(MAX_IMAGE + 1).unwrap();
        assert!(matches!(Image::of(&file), Err(BootError::Kernel(_))));
    }
}
