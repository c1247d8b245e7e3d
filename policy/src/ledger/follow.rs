//! The records of a ledger that another process writes, as they come; nothing is verified.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::LedgerError;
use super::frame::{self, Kind};
use super::record::Record;

/// A place in a ledger that is being written.
pub struct Follower {
    path: PathBuf,
    file: File,
    /// Bytes of a line that has not ended yet.
    begun: Vec<u8>,
}

impl Follower {
    /// Begins at the start of the newest file.
    pub fn open(path: &Path) -> Result<Self, LedgerError> {
        Ok(Self {
            path: path.to_owned(),
            file: File::open(path).map_err(LedgerError::Io)?,
            begun: Vec::new(),
        })
    }

    /// The records that came since the last call; also across a change to the next file.
    pub fn poll(&mut self) -> Result<Vec<Record>, LedgerError> {
        let mut records = self.read()?;
        let (now, ours) = (std::fs::metadata(&self.path), self.file.metadata());
        if let (Ok(now), Ok(ours)) = (now, ours)
            && (now.dev(), now.ino()) != (ours.dev(), ours.ino())
        {
            // What was written before the change has been read to its end or is read now.
            records.extend(self.read()?);
            *self = Self::open(&self.path)?;
            records.extend(self.read()?);
        } else if self.file.metadata().map_err(LedgerError::Io)?.len()
            < self.file.stream_position().map_err(LedgerError::Io)?
        {
            // A torn end was cut off.
            self.file.seek(SeekFrom::End(0)).map_err(LedgerError::Io)?;
            self.begun.clear();
        }
        Ok(records)
    }

    fn read(&mut self) -> Result<Vec<Record>, LedgerError> {
        let mut records = Vec::new();
        let mut block = vec![0; 64 << 10];
        loop {
            let read = self.file.read(&mut block).map_err(LedgerError::Io)?;
            if read == 0 {
                return Ok(records);
            }
            self.begun
                .extend_from_slice(block.get(..read).unwrap_or_default());
            while let Some(end) = self.begun.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.begun.drain(..=end).collect();
                let decoded = line.strip_suffix(b"\n").and_then(frame::decode);
                if let Some((Kind::Record, payload)) = decoded {
                    records.extend(Record::from_canonical(payload));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::{Entry, Ledger, Outcome, Signer};

    #[test]
    fn records_are_seen_as_they_come_and_across_files() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ledger");
        let signer = Signer::from_seed("log.test", &[1; 32]).unwrap();
        let mut ledger = Ledger::open(&path, signer).unwrap();
        let mut follower = Follower::open(&path).unwrap();
        let mut seen = Vec::new();
        for n in 0..6 {
            let entry = Entry::new("a", "b", "c", Outcome::Done);
            ledger.append_signed(entry).unwrap();
            if n == 3 {
                ledger.rotate_file().unwrap();
            }
            if n % 2 == 1 {
                seen.extend(follower.poll().unwrap().iter().map(|record| record.seq));
            }
        }
        assert_eq!(seen, [0, 1, 2, 3, 4, 5]);
        assert!(follower.poll().unwrap().is_empty());
    }
}
