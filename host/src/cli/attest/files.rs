//! Files that the commands read and write, each with a bound.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use casemate_attest::measure::kernel_hashes::FileHash;
use zeroize::Zeroizing;

use crate::agent::api::Failure;
use crate::agent::evidence::write_secret;

/// The whole content of a file of at most `max` bytes.
pub fn read(path: &Path, max: usize) -> Result<Vec<u8>, Failure> {
    let mut content = Vec::new();
    open(path)?
        .take(max as u64 + 1)
        .read_to_end(&mut content)
        .map_err(|e| unreadable(path, &e))?;
    if content.len() > max {
        return Err(unreadable(path, &format_args!("longer than {max} bytes")));
    }
    Ok(content)
}

/// The hash of a file, of which only a piece is in memory at a time.
pub fn hash(path: &Path) -> Result<FileHash, Failure> {
    FileHash::read(&mut open(path)?, MAX_BOOT_FILE).map_err(|e| unreadable(path, &e))
}

/// Writes a result.
pub fn write(path: &Path, content: &[u8]) -> Result<(), Failure> {
    std::fs::write(path, content).map_err(|e| unwritable(path, &e))
}

/// Writes a private key as PEM, mode 0600; never over another file.
pub fn write_key(path: &Path, pkcs8: &[u8]) -> Result<(), Failure> {
    let digits = Zeroizing::new(STANDARD.encode(pkcs8));
    let mut pem = Zeroizing::new(b"-----BEGIN PRIVATE KEY-----\n".to_vec());
    for line in digits.as_bytes().chunks(64) {
        pem.extend_from_slice(line);
        pem.push(b'\n');
    }
    pem.extend_from_slice(b"-----END PRIVATE KEY-----\n");
    write_secret(path, &pem).map_err(|e| unwritable(path, &e))
}

fn open(path: &Path) -> Result<File, Failure> {
    File::open(path).map_err(|e| unreadable(path, &e))
}

fn unreadable(path: &Path, error: &dyn std::fmt::Display) -> Failure {
    Failure::new(
        "FILE",
        format!("{} cannot be read: {error}", path.display()),
    )
}

fn unwritable(path: &Path, error: &dyn std::fmt::Display) -> Failure {
    let text = format!("{} cannot be written: {error}", path.display());
    Failure::new("OUTPUT", text)
}

/// The longest kernel or initrd, in bytes; a guest's memory ends there too.
const MAX_BOOT_FILE: u64 = 4 << 30;
/// The longest file with a key, in bytes.
pub const MAX_KEY_FILE: usize = 64 << 10;
