//! Where everything lies.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use crate::error::{Error, OnFile, Result};

/// The directories of this workspace and of the lab.
#[derive(Clone, Debug)]
pub struct Paths {
    /// The lab's own executable, which is also the lab's `/init`.
    pub lab: PathBuf,
    /// Where cargo puts the release binaries.
    pub release: PathBuf,
    /// All that the lab keeps: `<target>/lab`, or `LAB_DIR`.
    pub root: PathBuf,
    /// The workspace this lab was built from.
    pub workspace: PathBuf,
}

impl Paths {
    /// From the place of the running executable, `<target>/<triple>/release/lab`.
    pub fn find() -> Result<Self> {
        let lab = env::current_exe().on("find", Path::new("the lab's own executable"))?;
        let parent = |path: &Path| path.parent().map(Path::to_path_buf);
        let release = parent(&lab).ok_or_else(misplaced)?;
        let root = match env::var_os("LAB_DIR") {
            Some(dir) => std::path::absolute(&dir).on("find", Path::new(&dir))?,
            None => parent(&release)
                .and_then(|triple| parent(&triple))
                .ok_or_else(misplaced)?
                .join("lab"),
        };
        fs::create_dir_all(&root).on("create", &root)?;
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR"))
            .ancestors()
            .nth(2)
            .unwrap_or(Path::new("."))
            .to_path_buf();
        Ok(Self {
            lab,
            release,
            root,
            workspace,
        })
    }

    /// Packages as fetched.
    pub fn cache(&self) -> PathBuf {
        self.root.join("cache")
    }

    /// Unpacked QEMU and tools.
    pub fn tools(&self) -> PathBuf {
        self.root.join("tools")
    }

    /// The guest's kernel and initramfs.
    pub fn guest(&self) -> PathBuf {
        self.root.join("guest")
    }

    /// Programs by which tests judge what we write.
    pub fn judges(&self) -> PathBuf {
        self.root.join("judges")
    }

    /// Guest kernel, as Debian ships it.
    pub fn guest_kernel(&self) -> PathBuf {
        self.guest().join("vmlinuz")
    }

    /// The same kernel, uncompressed.
    pub fn guest_vmlinux(&self) -> PathBuf {
        self.guest().join("vmlinux")
    }

    /// Initramfs of `lab bench-boot`.
    pub fn bench_initrd(&self) -> PathBuf {
        self.guest().join("bench.cpio")
    }

    /// Guest initramfs.
    pub fn guest_initrd(&self) -> PathBuf {
        self.guest().join("initrd.cpio")
    }

    /// The lab's own kernel, for guests that need a newer one than Debian's of their release.
    pub fn newer_kernel(&self) -> PathBuf {
        self.guest().join("newer-vmlinuz")
    }

    /// Its initramfs.
    pub fn newer_initrd(&self) -> PathBuf {
        self.guest().join("newer-initrd.cpio")
    }

    /// Scratch directories, one a run.
    pub fn runs(&self) -> PathBuf {
        self.root.join("run")
    }

    /// What the last demo left for auditors.
    pub fn evidence(&self) -> PathBuf {
        self.root.join("evidence")
    }

    /// Booted machines, one directory a key.
    pub fn snapshots(&self) -> PathBuf {
        self.root.join("snapshot")
    }
}

/// Create a directory and its parents.
pub fn make_dir(path: &Path) -> Result<()> {
    fs::create_dir_all(path).on("create", path)
}

/// Write a file so that it appears whole or not at all.
pub fn write_whole(path: &Path, content: &[u8]) -> Result<()> {
    let part = path.with_extension("part");
    fs::write(&part, content).on("write", &part)?;
    fs::rename(&part, path).on("write", path)
}

/// Read a whole file.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).on("read", path)
}

fn misplaced() -> Error {
    Error::Usage("the lab must run from cargo's target directory; or set LAB_DIR".into())
}
