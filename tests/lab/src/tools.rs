//! The unpacked host programs: QEMU, mke2fs, decompressors, with the libraries this machine lacks.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use nix::sys::signal::Signal;

use crate::{
    command::{output, tied},
    error::{Error, Result},
};

/// Programs below one directory, run with the libraries unpacked beside them.
#[derive(Clone, Debug)]
pub struct Tools {
    root: PathBuf,
}

impl Tools {
    /// The packages that hold the programs.
    pub const PACKAGES: [&'static str; 8] = [
        "qemu-system-x86/bookworm-backports",
        "qemu-system-common/bookworm-backports",
        "qemu-system-data/bookworm-backports",
        "seabios/bookworm-backports",
        "ipxe-qemu",
        "e2fsprogs",
        "xz-utils",
        "zstd",
    ];

    /// The programs unpacked below `root`.
    pub fn at(root: &Path) -> Self {
        Self {
            root: root.to_path_buf(),
        }
    }

    /// A program, tied to our life. It dies by SIGKILL: none of these has state worth saving.
    pub fn command(&self, program: &str) -> Command {
        let places =
            ["usr/bin", "usr/sbin", "bin", "sbin"].map(|dir| self.root.join(dir).join(program));
        let path = places
            .into_iter()
            .find(|path| path.exists())
            .unwrap_or_else(|| program.into());
        let mut command = tied(path, Signal::SIGKILL);
        let mut libraries: Vec<_> = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"]
            .map(|dir| self.root.join(dir))
            .into();
        libraries.extend(
            env::var_os("LD_LIBRARY_PATH")
                .iter()
                .flat_map(env::split_paths)
                .collect::<Vec<_>>(),
        );
        if let Ok(joined) = env::join_paths(libraries) {
            command.env("LD_LIBRARY_PATH", joined);
        }
        command.env(
            "QEMU_MODULE_DIR",
            self.root.join("usr/lib/x86_64-linux-gnu/qemu"),
        );
        command.env("MKE2FS_CONFIG", self.root.join("etc/mke2fs.conf"));
        command
    }

    /// Where QEMU is unpacked.
    pub fn qemu_program(&self) -> PathBuf {
        self.root.join("usr/bin").join(QEMU)
    }

    /// QEMU, told where its firmware lies.
    pub fn qemu(&self) -> Command {
        let mut command = self.command(QEMU);
        for dir in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
            command.arg("-L").arg(self.root.join(dir));
        }
        command
    }

    /// QEMU's version, by running it: so all its libraries are there.
    pub fn qemu_version(&self) -> Result<String> {
        let text = output(self.qemu().arg("--version"))?;
        let version = text
            .lines()
            .next()
            .and_then(|line| line.split("version ").nth(1));
        version
            .map(str::to_owned)
            .ok_or_else(|| Error::Packages(format!("QEMU does not tell its version: {text}")))
    }
}

const QEMU: &str = "qemu-system-x86_64";
