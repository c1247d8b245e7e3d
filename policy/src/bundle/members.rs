//! A bundle's members in and out: a tar file with nothing of its maker in it, or a folder.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::Path;

use ring::digest::{Context, SHA256};

use super::{BundleError, MANIFEST, RECORDS};

/// Writes members that are the same for the same contents.
pub(super) struct Packer<W: Write> {
    archive: tar::Builder<W>,
}

impl<W: Write> Packer<W> {
    pub(super) fn new(out: W) -> Self {
        Self {
            archive: tar::Builder::new(out),
        }
    }

    pub(super) fn member(&mut self, name: &str, size: u64, from: impl Read) -> io::Result<()> {
        self.archive.append(&header(name, size)?, from)
    }

    pub(super) fn finish(self) -> io::Result<W> {
        self.archive.into_inner()
    }
}

/// The small members, all in memory, and then the records, line by line.
pub(super) fn read(
    path: &Path,
    small: &mut dyn FnMut(BTreeMap<String, Vec<u8>>) -> Result<(), BundleError>,
    line: &mut dyn FnMut(&[u8]) -> Result<(), BundleError>,
) -> Result<Digest, BundleError> {
    if path.is_dir() {
        read_folder(path, small, line)
    } else {
        read_archive(File::open(path)?, small, line)
    }
}

fn read_folder(
    path: &Path,
    small: &mut dyn FnMut(BTreeMap<String, Vec<u8>>) -> Result<(), BundleError>,
    line: &mut dyn FnMut(&[u8]) -> Result<(), BundleError>,
) -> Result<Digest, BundleError> {
    let mut members = BTreeMap::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_str().unwrap_or("?").to_owned();
        if name != RECORDS {
            let bytes = bounded(File::open(entry.path())?, &name)?;
            members.insert(name, bytes);
        }
        if members.len() > MAX_MEMBERS {
            return Err(BundleError::malformed(MANIFEST, "too many members"));
        }
    }
    small(members)?;
    lines(File::open(path.join(RECORDS))?, line)
}

/// The one header of a member of this name and size.
fn header(name: &str, size: u64) -> io::Result<tar::Header> {
    let mut header = tar::Header::new_ustar();
    header.set_path(name)?;
    header.set_size(size);
    header.set_mode(0o644);
    header.set_entry_type(tar::EntryType::Regular);
    header.set_cksum();
    Ok(header)
}

/// The same of a tar file's bytes, of which there is one spelling: no bit of a bundle is without a meaning, so none can
/// be changed unseen.
pub(super) fn read_archive(
    from: impl Read,
    small: &mut dyn FnMut(BTreeMap<String, Vec<u8>>) -> Result<(), BundleError>,
    line: &mut dyn FnMut(&[u8]) -> Result<(), BundleError>,
) -> Result<Digest, BundleError> {
    let mut from = BufReader::new(from);
    let mut members = BTreeMap::new();
    let mut digest = None;
    while let Some((name, size)) = next_member(&mut from)? {
        if digest.is_some() {
            return Err(BundleError::malformed(&name, "out of place"));
        }
        let mut content = (&mut from).take(size);
        if name == RECORDS {
            small(std::mem::take(&mut members))?;
            digest = Some(lines(&mut content, line)?);
        } else {
            let bytes = bounded(&mut content, &name)?;
            if members.insert(name.clone(), bytes).is_some() || members.len() > MAX_MEMBERS {
                return Err(BundleError::malformed(&name, "a member too many"));
            }
        }
        if content.limit() > 0 {
            return Err(BundleError::malformed(&name, "cut off"));
        }
        zeros(&mut from, size.next_multiple_of(BLOCK) - size)?;
    }
    digest.ok_or_else(|| BundleError::malformed(RECORDS, "missing"))
}

/// Name and size of the next member; none at the end, behind which there is nothing.
fn next_member(from: &mut impl Read) -> Result<Option<(String, u64)>, BundleError> {
    let other = || BundleError::malformed("the bundle", "not a tar file as it was written");
    let mut block = [0; BLOCK as usize];
    from.read_exact(&mut block).map_err(|_| other())?;
    if block == [0; BLOCK as usize] {
        zeros(from, BLOCK)?;
        let more = from.read(&mut block)?;
        return if more == 0 { Ok(None) } else { Err(other()) };
    }
    let found = tar::Header::from_byte_slice(&block);
    let name = String::from_utf8(found.path_bytes().into_owned()).map_err(|_| other())?;
    let size = found.entry_size().map_err(|_| other())?;
    let written = header(&name, size).map_err(|_| other())?;
    if size > u64::MAX - BLOCK || written.as_bytes() != &block {
        return Err(other());
    }
    Ok(Some((name, size)))
}

fn zeros(from: &mut impl Read, count: u64) -> Result<(), BundleError> {
    let mut padding = Vec::new();
    from.take(count).read_to_end(&mut padding)?;
    let right = padding.len() as u64 == count && padding.iter().all(|byte| *byte == 0);
    right
        .then_some(())
        .ok_or_else(|| BundleError::malformed("the bundle", "cut off, or filled up"))
}

/// A SHA-256 in hex.
pub(super) type Digest = String;

pub(super) fn sha256(bytes: &[u8]) -> Digest {
    hex::encode(ring::digest::digest(&SHA256, bytes))
}

/// SHA-256 of a whole file.
pub(super) fn sha256_of(mut file: impl Read) -> io::Result<Digest> {
    let mut context = Context::new(&SHA256);
    let mut buffer = vec![0; 64 << 10];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex::encode(context.finish())),
            read => context.update(buffer.get(..read).unwrap_or_default()),
        }
    }
}

fn lines(
    from: impl Read,
    line: &mut dyn FnMut(&[u8]) -> Result<(), BundleError>,
) -> Result<Digest, BundleError> {
    let mut reader = BufReader::with_capacity(256 << 10, from);
    let mut context = Context::new(&SHA256);
    let mut buffer = Vec::new();
    loop {
        buffer.clear();
        let read = (&mut reader)
            .take(MAX_LINE)
            .read_until(b'\n', &mut buffer)?;
        if read == 0 {
            return Ok(hex::encode(context.finish()));
        }
        context.update(&buffer);
        let text = buffer.strip_suffix(b"\n");
        line(text.ok_or_else(|| BundleError::malformed(RECORDS, "a line does not end"))?)?;
    }
}

fn bounded(from: impl Read, name: &str) -> Result<Vec<u8>, BundleError> {
    let mut bytes = Vec::new();
    from.take(MAX_MEMBER + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_MEMBER {
        return Err(BundleError::malformed(name, "larger than 256 MiB"));
    }
    Ok(bytes)
}

/// Of a tar file.
const BLOCK: u64 = 512;
const MAX_MEMBERS: usize = 16;
/// Proofs of a large selection are the largest small member: some 700 bytes a record.
const MAX_MEMBER: u64 = 256 << 20;
const MAX_LINE: u64 = (64 << 10) + 1;
