//! A live report from configfs-tsm, Linux 6.7 and later: `Documentation/ABI/testing/configfs-tsm-report`.
//!
//! Plain files: an entry's `inblob` takes what to bind, `outblob` is the report, `auxblob` the
//! certificate table, `provider` says who makes them, and `generation` counts writes, so that a
//! reader notices when somebody else used the same entry. The kernel and the host behind it can
//! still show anything; only the report's signature settles what it is worth.

use super::{Container, Encoding, Evidence, EvidenceError, table};
use crate::report::REPORT_LEN;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// Where reports are asked for.
#[derive(Debug, Clone)]
pub struct TsmReports {
    place: Place,
}

/// Why there is no live report.
#[derive(Debug, thiserror::Error)]
pub enum TsmError {
    /// No such interface here.
    #[error(
        "there is no {0}: a live report needs an SNP guest, Linux 6.7 or later, the module \
         sev-guest (modprobe sev-guest) and configfs (mount -t configfs none /sys/kernel/config)"
    )]
    Unavailable(PathBuf),
    /// A file of the entry cannot be used.
    #[error("{path} cannot be {doing}: {error}; it takes root, in the guest itself")]
    File {
        /// What was tried.
        doing: &'static str,
        /// With which file.
        path: PathBuf,
        /// What came of it.
        #[source]
        error: io::Error,
    },
    /// Another technology.
    #[error("{path} serves {found:?}, not sev_guest: this is no SNP guest")]
    Provider {
        /// The entry.
        path: PathBuf,
        /// What it says of itself.
        found: String,
    },
    /// Somebody else wrote to the entry meanwhile, or a write did not count.
    #[error(
        "{path} was written {found} times instead of {expected}: somebody else uses it too; ask again"
    )]
    Generation {
        /// The entry.
        path: PathBuf,
        /// Own writes.
        expected: u64,
        /// Counted writes.
        found: u64,
    },
    /// Not what a kernel writes.
    #[error("{path} holds {found:?}, which is no number")]
    NotANumber {
        /// The file.
        path: PathBuf,
        /// What is in it.
        found: String,
    },
    /// A file is longer than the kernel makes them.
    #[error("{path} is longer than {most} bytes")]
    TooLong {
        /// The file.
        path: PathBuf,
        /// The bound.
        most: usize,
    },
    /// The report is no report, or its certificate table none.
    #[error("what the kernel handed out is not usable: {0}")]
    Evidence(#[from] EvidenceError),
    /// The report answers another request.
    #[error("the report does not carry the data that was asked for; ask again")]
    NotBound,
}

impl TsmReports {
    /// The kernel's own place.
    pub fn system() -> Self {
        Self::at(Path::new("/sys/kernel/config/tsm/report"))
    }

    /// A place that holds entries; each report makes one of its own there and removes it.
    pub fn at(base: &Path) -> Self {
        Self {
            place: Place::Base(base.to_owned()),
        }
    }

    /// An entry that somebody made already, for a process that may not make one. It stays.
    pub fn entry(path: &Path) -> Self {
        Self {
            place: Place::Entry(path.to_owned()),
        }
    }

    /// Asks for a report over `report_data`, for privilege level `vmpl` where one is given, and
    /// checks that it is the answer to this request.
    pub fn report(&self, report_data: &[u8; 64], vmpl: Option<u8>) -> Result<Evidence, TsmError> {
        let entry = match &self.place {
            Place::Base(base) => Entry::make(base)?,
            Place::Entry(path) if path.is_dir() => Entry {
                path: path.clone(),
                own: false,
            },
            Place::Entry(path) => return Err(TsmError::Unavailable(path.clone())),
        };
        entry.report(report_data, vmpl)
    }
}

#[derive(Debug, Clone)]
enum Place {
    Base(PathBuf),
    Entry(PathBuf),
}

/// One entry's folder; removed in the end if it was made here.
struct Entry {
    path: PathBuf,
    own: bool,
}

impl Entry {
    fn make(base: &Path) -> Result<Self, TsmError> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        if !base.is_dir() {
            return Err(TsmError::Unavailable(base.to_owned()));
        }
        // A process that died may have left an entry of the same name.
        let mut attempts = 0..MAX_ATTEMPTS;
        loop {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = base.join(format!("casemate-{}-{number}", std::process::id()));
            match fs::create_dir(&path) {
                Ok(()) => return Ok(Self { path, own: true }),
                Err(error)
                    if error.kind() == io::ErrorKind::AlreadyExists
                        && attempts.next().is_some() => {}
                Err(error) => {
                    let doing = "made";
                    return Err(TsmError::File { doing, path, error });
                }
            }
        }
    }

    fn report(&self, report_data: &[u8; 64], vmpl: Option<u8>) -> Result<Evidence, TsmError> {
        let provider = self.text("provider")?;
        if provider != "sev_guest" {
            return Err(TsmError::Provider {
                path: self.path.clone(),
                found: provider,
            });
        }
        let before = self.generation()?;
        let mut expected: u64 = 1;
        if let Some(vmpl) = vmpl {
            self.write("privlevel", vmpl.to_string().as_bytes())?;
            expected = 2;
        }
        self.write("inblob", report_data)?;
        let report = self.read("outblob", MAX_OUTBLOB)?;
        let certificates = match self.read("auxblob", table::MAX_TABLE) {
            Ok(table) => table,
            // Not every kernel has it.
            Err(TsmError::File { error, .. }) if error.kind() == io::ErrorKind::NotFound => {
                Vec::new()
            }
            Err(error) => return Err(error),
        };
        let found = self.generation()?.wrapping_sub(before);
        if found != expected {
            return Err(TsmError::Generation {
                path: self.path.clone(),
                expected,
                found,
            });
        }
        let evidence = Evidence::of_report(&report, Encoding::Binary, Container::ConfigfsTsm)
            .ok_or(EvidenceError::Unknown(report.len()))?;
        bound(evidence, report_data)?
            .with_certificate_table(&certificates)
            .map_err(TsmError::Evidence)
    }

    fn generation(&self) -> Result<u64, TsmError> {
        let found = self.text("generation")?;
        found.parse().map_err(|_| TsmError::NotANumber {
            path: self.path.join("generation"),
            found,
        })
    }

    fn text(&self, name: &str) -> Result<String, TsmError> {
        let bytes = self.read(name, MAX_TEXT)?;
        Ok(String::from_utf8_lossy(bytes.trim_ascii()).into_owned())
    }

    fn read(&self, name: &str, most: usize) -> Result<Vec<u8>, TsmError> {
        let path = self.path.join(name);
        let mut bytes = Vec::new();
        let limit = u64::try_from(most).unwrap_or(u64::MAX).saturating_add(1);
        let result =
            fs::File::open(&path).and_then(|file| file.take(limit).read_to_end(&mut bytes));
        match result {
            Ok(_) if bytes.len() > most => Err(TsmError::TooLong { path, most }),
            Ok(_) => Ok(bytes),
            Err(error) => Err(TsmError::File {
                doing: "read",
                path,
                error,
            }),
        }
    }

    /// Attributes are there already: nothing is created or cut.
    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), TsmError> {
        let path = self.path.join(name);
        fs::OpenOptions::new()
            .write(true)
            .open(&path)
            .and_then(|mut file| file.write_all(bytes))
            .map_err(|error| TsmError::File {
                doing: "written",
                path,
                error,
            })
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        if self.own {
            // An entry that stays does no harm, and there is nobody to tell.
            let _ = fs::remove_dir(&self.path);
        }
    }
}

/// Whether the report carries what was asked for.
fn bound(evidence: Evidence, report_data: &[u8; 64]) -> Result<Evidence, TsmError> {
    let carried = evidence.report.get(super::REPORT_DATA);
    if carried == Some(report_data.as_slice()) {
        Ok(evidence)
    } else {
        Err(TsmError::NotBound)
    }
}

const MAX_ATTEMPTS: u32 = 16;
/// The kernel's own bound is 32 KiB; a report is shorter.
const MAX_OUTBLOB: usize = REPORT_LEN;
const MAX_TEXT: usize = 64;

#[cfg(test)]
mod tests;
