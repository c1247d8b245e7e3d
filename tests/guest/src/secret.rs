//! The launch secret: injected by the host's firmware into a reserved page, read through `/dev/mem`.
//!
//! The page holds a little-endian 32-bit length and that many bytes. Its content is the owner's and is never printed;
//! what is printed is its SHA-256.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use zeroize::Zeroizing;

use crate::console::say;
use crate::options::SecretRange;
use crate::sys;

/// The SHA-256 of the secret in hex, or nothing if there is none. Every copy made here is wiped.
pub(crate) fn take(range: SecretRange) -> Option<String> {
    let page = match read(range) {
        Ok(page) => page,
        Err(error) => {
            say!("secret unreadable at {:#x}: {error}", range.gpa);
            return None;
        }
    };
    match parse(&page) {
        Ok(secret) => {
            secret.map(|secret| hex::encode(ring::digest::digest(&ring::digest::SHA256, secret)))
        }
        Err(length) => {
            say!(
                "secret malformed: length {length} in a range of {}",
                range.size
            );
            None
        }
    }
}

fn read(range: SecretRange) -> io::Result<Zeroizing<Vec<u8>>> {
    let memory = File::open("/dev/mem")?;
    let mut page = Zeroizing::new(vec![0; range.size]);
    match memory.read_exact_at(&mut page, range.gpa) {
        Ok(()) => Ok(page),
        Err(_) => sys::map_and_copy(&memory, range.gpa, range.size),
    }
}

/// The secret in a page: none if the length is 0, an error with the length if it does not fit.
fn parse(page: &[u8]) -> Result<Option<&[u8]>, u32> {
    let (length, rest) = page.split_first_chunk::<4>().unwrap_or((&[0; 4], &[]));
    let length = u32::from_le_bytes(*length);
    let secret = rest.get(..length as usize).ok_or(length)?;
    Ok((length > 0).then_some(secret))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_parse() {
        assert_eq!(parse(&[0; 4096]), Ok(None));
        assert_eq!(parse(b"\x03\0\0\0abcdef"), Ok(Some(&b"abc"[..])));
        assert_eq!(parse(b"\x06\0\0\0abcdef"), Ok(Some(&b"abcdef"[..])));
        assert_eq!(parse(b"\x07\0\0\0abcdef"), Err(7));
        assert_eq!(parse(&[0xff; 64]), Err(u32::MAX));
        assert_eq!(parse(b"\x01\0"), Ok(None));
    }
}
