//! Snapshots at rest: any bytes are a header within its bounds or a refusal, an index within its header or a refusal; and
//! nothing opens under a key that sealed nothing.
#![no_main]

use std::io;

use casemate_crypto_migrate::vault::{
    HEADER_SIZE, Header, MAX_DESCRIPTION, MAX_PAGES, MAX_STATE, Reader, Storage, parse_index,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let file = Bytes(bytes);
    assert!(Reader::open(&file, &[7; 32]).is_err(), "sealed by nobody");
    let Some((head, behind)) = bytes.split_first_chunk::<HEADER_SIZE>() else {
        assert!(Reader::claim(&file).is_err());
        return;
    };
    let Ok(header) = Header::parse(head) else {
        assert!(Reader::claim(&file).is_err());
        return;
    };
    assert_eq!(Reader::claim(&file).unwrap(), header);
    assert!(header.pages <= MAX_PAGES && header.data_pages <= header.pages);
    assert!(header.description as usize <= MAX_DESCRIPTION && header.state as usize <= MAX_STATE);
    if let Ok(placed) = parse_index(behind, &header) {
        assert!(placed <= header.data_pages);
    }
});

struct Bytes<'a>(&'a [u8]);

impl Storage for Bytes<'_> {
    fn size(&self) -> io::Result<u64> {
        Ok(self.0.len() as u64)
    }
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let at = usize::try_from(offset).map_err(io::Error::other)?;
        let end = at.checked_add(into.len());
        let from = end.and_then(|end| self.0.get(at..end));
        into.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
    fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
}
