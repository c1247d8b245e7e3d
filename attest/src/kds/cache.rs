//! A folder that keeps what the key service answered, one file an answer.
//!
//! The folder is believed no more than the service is: [`Source`](super::Source) verifies what it
//! reads here like an answer, and hands over for writing only what verified. A file is replaced as a
//! whole or not at all, so any number of processes may use one folder.

use super::request::{Request, folder};
use crate::tcb::TcbVersion;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

/// One cache folder.
#[derive(Debug, Clone)]
pub struct Cache {
    dir: PathBuf,
    max_files: usize,
}

/// Why the folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// A file could not be read.
    #[error("{} cannot be read: {source}; mend or remove it", .file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// A file could not be written.
    #[error("{} cannot be written: {source}; mend the folder or name another", .file.display())]
    Write {
        /// The file.
        file: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// A file that is no regular file, or longer than what it stands for.
    #[error("{} is no regular file of at most {max} bytes; remove it", .file.display())]
    Shape {
        /// The file.
        file: PathBuf,
        /// The bound.
        max: usize,
    },
    /// As many files as the cache may have.
    #[error("the cache {} is full ({max} files); remove what is no longer needed", .dir.display())]
    Full {
        /// The folder.
        dir: PathBuf,
        /// The bound.
        max: usize,
    },
}

impl Cache {
    /// The cache in `dir`, which is made when something is first written.
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            max_files: MAX_FILES,
        }
    }

    /// The same with another bound on the number of files.
    pub const fn with_max_files(mut self, max: usize) -> Self {
        self.max_files = max;
        self
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The file that holds the answer to `request`, whether it is there or not.
    pub fn file(&self, request: &Request) -> PathBuf {
        self.dir.join(file_name(request))
    }

    /// What the file for `request` holds, unverified; `None` without such a file.
    pub(super) fn read(&self, request: &Request) -> Result<Option<Vec<u8>>, CacheError> {
        let path = self.file(request);
        let failed = |source| CacheError::Read {
            file: path.clone(),
            source,
        };
        let max = request.max_len();
        let shape = || CacheError::Shape {
            file: path.clone(),
            max,
        };
        // Seen before it is opened: opening a pipe would wait for its writer.
        match fs::symlink_metadata(&path) {
            Ok(meta) if meta.is_file() => {}
            Ok(_) => return Err(shape()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        }
        let mut body = Vec::new();
        File::open(&path)
            .and_then(|file| file.take(max as u64 + 1).read_to_end(&mut body))
            .map_err(failed)?;
        if body.len() > max {
            return Err(shape());
        }
        Ok(Some(body))
    }

    /// Writes `body`, which verified, unless `keep` says that what is there now should stay; returns
    /// what is there in the end. What is there is looked at and replaced under the folder's lock.
    pub(super) fn write(
        &self,
        request: &Request,
        body: &[u8],
        keep: &dyn Fn(&[u8]) -> bool,
    ) -> Result<Vec<u8>, CacheError> {
        let path = self.file(request);
        let failed = |source| CacheError::Write {
            file: path.clone(),
            source,
        };
        let lock = self.lock().map_err(failed)?;
        // A file that cannot be read is no reason to keep it.
        let present = self.read(request).ok().flatten();
        let adds = present.is_none();
        if let Some(there) = present.filter(|there| there == body || keep(there)) {
            return Ok(there);
        }
        if adds && self.count().map_err(failed)? >= self.max_files {
            return Err(CacheError::Full {
                dir: self.dir.clone(),
                max: self.max_files,
            });
        }
        replace(&path, body).map_err(failed)?;
        drop(lock);
        Ok(body.to_vec())
    }

    fn lock(&self) -> io::Result<File> {
        fs::create_dir_all(&self.dir)?;
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.dir.join(LOCK))?;
        lock.lock()?;
        Ok(lock)
    }

    /// How many files there are; under the lock, so a temporary file is one that a crash left.
    fn count(&self) -> io::Result<usize> {
        let mut count: usize = 0;
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let name = entry.file_name();
            if name.to_string_lossy().starts_with(TEMPORARY) {
                fs::remove_file(entry.path())?;
            } else if name != LOCK {
                count = count.saturating_add(1);
            }
        }
        Ok(count)
    }
}

impl CacheError {
    /// A stable name for machines.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Read { .. } => "KDS_CACHE_READ",
            Self::Write { .. } => "KDS_CACHE_WRITE",
            Self::Shape { .. } => "KDS_CACHE_SHAPE",
            Self::Full { .. } => "KDS_CACHE_FULL",
        }
    }
}

/// A new file beside the old one, on the disk before it takes the old one's name.
pub(super) fn replace(path: &Path, body: &[u8]) -> io::Result<()> {
    let folder = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let mut file = tempfile::Builder::new()
        .prefix(TEMPORARY)
        .permissions(fs::Permissions::from_mode(0o644))
        .tempfile_in(folder)?;
    file.write_all(body)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    File::open(folder)?.sync_all()
}

/// The name says all that is asked for, and consists of nothing that a caller chose freely.
pub(super) fn file_name(request: &Request) -> String {
    match request {
        Request::Chain { product, key } => format!("{product}-{}-chain.pem", folder(*key)),
        Request::Crl { product, key } => format!("{product}-{}.crl", folder(*key)),
        Request::Vcek(id) => {
            let TcbVersion {
                fmc,
                boot_loader,
                tee,
                snp,
                microcode,
            } = id.tcb();
            let fmc = fmc.map_or_else(String::new, |fmc| format!("fmc{fmc}-"));
            format!(
                "{}-vcek-{}-{fmc}bl{boot_loader}-tee{tee}-snp{snp}-ucode{microcode}.der",
                id.product(),
                id.chip_hex()
            )
        }
    }
}

/// About a hundred megabytes of certificates: more chips than a cache has to know.
const MAX_FILES: usize = 65_536;

/// Held while something is written.
const LOCK: &str = "lock";

/// What is not yet whole.
const TEMPORARY: &str = ".new-";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kds::VcekId;
    use crate::product::Product;
    use crate::report::SigningKey;

    const CRL: Request = Request::Crl {
        product: Product::Genoa,
        key: SigningKey::Vlek,
    };

    fn vcek(chip: u8) -> Request {
        let tcb = TcbVersion {
            fmc: Some(1),
            boot_loader: 2,
            tee: 3,
            snp: 4,
            microcode: 255,
        };
        Request::Vcek(VcekId::new(Product::Turin, &[chip; 8], tcb).unwrap())
    }

    #[test]
    fn a_file_is_named_after_what_it_answers() {
        assert_eq!(
            file_name(&vcek(0xab)),
            "turin-vcek-abababababababab-fmc1-bl2-tee3-snp4-ucode255.der"
        );
        assert_eq!(file_name(&CRL), "genoa-vlek.crl");
    }

    #[test]
    fn what_is_written_is_read_and_may_be_kept() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().join("made/when/needed"));
        assert!(cache.read(&CRL).unwrap().is_none());
        cache.write(&CRL, b"one", &|_| true).unwrap();
        cache.write(&CRL, b"two", &|there| there == b"one").unwrap();
        assert_eq!(cache.read(&CRL).unwrap().unwrap(), b"one");
        cache.write(&CRL, b"two", &|_| false).unwrap();
        assert_eq!(cache.read(&CRL).unwrap().unwrap(), b"two");
    }

    #[test]
    fn other_files_pipes_and_long_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let code = || cache.read(&CRL).map_err(|e| e.code());
        fs::create_dir(cache.file(&CRL)).unwrap();
        assert_eq!(code(), Err("KDS_CACHE_SHAPE"));
        fs::remove_dir(cache.file(&CRL)).unwrap();
        std::os::unix::fs::symlink("/dev/zero", cache.file(&CRL)).unwrap();
        assert_eq!(code(), Err("KDS_CACHE_SHAPE"));
        fs::remove_file(cache.file(&CRL)).unwrap();
        fs::write(cache.file(&CRL), vec![0; CRL.max_len() + 1]).unwrap();
        assert_eq!(code(), Err("KDS_CACHE_SHAPE"));
    }

    #[test]
    fn a_full_cache_says_so_and_still_replaces_what_it_has() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path()).with_max_files(2);
        cache.write(&vcek(1), b"1", &|_| false).unwrap();
        fs::write(dir.path().join(".new-left"), b"by a crash").unwrap();
        cache.write(&vcek(2), b"2", &|_| false).unwrap();
        assert!(!dir.path().join(".new-left").exists());
        let third = cache.write(&vcek(3), b"3", &|_| false);
        assert_eq!(third.unwrap_err().code(), "KDS_CACHE_FULL");
        cache.write(&vcek(2), b"new", &|_| false).unwrap();
        assert_eq!(cache.read(&vcek(2)).unwrap().unwrap(), b"new");
    }

    #[test]
    fn many_writers_leave_one_whole_file() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let bodies: Vec<Vec<u8>> = (0..8).map(|n| vec![n; 4096]).collect();
        std::thread::scope(|scope| {
            for body in &bodies {
                let cache = &cache;
                scope.spawn(move || {
                    for _ in 0..20 {
                        cache.write(&CRL, body, &|_| false).unwrap();
                        let seen = cache.read(&CRL).unwrap().unwrap();
                        assert!(seen.len() == 4096 && seen.iter().all(|b| *b == seen[0]));
                    }
                });
            }
        });
        let names = fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(names, 2, "the file and the lock");
    }
}
