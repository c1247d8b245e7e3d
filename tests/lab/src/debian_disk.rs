//! Makes the Debian disk that lab tests boot, by the script that users are given (`host/examples/debian-disk.sh`) and with
//! the tests' own units in it.

use std::{
    env,
    ffi::OsString,
    fs::{self, File},
    path::{Path, PathBuf},
};

use ring::digest;

use crate::{
    apt::mirror,
    command::output,
    error::{Error, OnFile, Result},
    machine::SYSTEM_SIZE,
    paths::{Paths, make_dir, read, write_whole},
    prepare::{fetch_packages, remove},
    say,
    tools::Tools,
};

/// Make it anew if the script, the tests' files or the mirror are others than those that it was made from.
pub fn make(paths: &Paths) -> Result<()> {
    let script = paths.workspace.join("host/examples/debian-disk.sh");
    let tree = paths.workspace.join("tests/e2e/debian");
    let mirror = mirror()?;
    let key = key(&script, &tree, &mirror)?;
    let vouched = paths.debian().join(KEY);
    let is_made = || fs::read_to_string(&vouched).is_ok_and(|made| made == key);
    if is_made() {
        return Ok(());
    }
    if !nix::unistd::geteuid().is_root() {
        return Err(Error::Usage(
            "making a Debian disk needs root: debootstrap makes devices and uses chroot".into(),
        ));
    }
    let _turn = turn(paths)?;
    if is_made() {
        return Ok(());
    }
    let tools = paths.root.join("debian-tools");
    if !tools.join(DEBOOTSTRAP).exists() {
        fetch_packages(paths, &PACKAGES.map(str::to_owned), &tools)?;
    }
    say("making a Debian disk with debootstrap: this takes a minute or two");
    let part = paths.root.join("debian.part");
    remove(&part)?;
    run(&tools, &script, &part, &tree, &mirror)?;
    write_whole(&part.join(KEY), key.as_bytes())?;
    remove(&paths.debian())?;
    fs::rename(&part, paths.debian()).on("create", &paths.debian())?;
    say(&format!("Debian disk: {}", paths.debian_disk().display()));
    Ok(())
}

impl Paths {
    /// Debian's disk, and its kernel and initramfs.
    pub fn debian(&self) -> PathBuf {
        self.root.join("debian")
    }

    /// The disk.
    pub fn debian_disk(&self) -> PathBuf {
        self.debian().join("debian.raw")
    }

    /// The kernel on it.
    pub fn debian_kernel(&self) -> PathBuf {
        self.debian().join("vmlinuz")
    }

    /// The initramfs on it.
    pub fn debian_initrd(&self) -> PathBuf {
        self.debian().join("initrd.img")
    }
}

/// One maker at a time. The lab's own lock is for moments; this takes minutes, and needs that lock on its way.
fn turn(paths: &Paths) -> Result<File> {
    let path = paths.root.join("debian.lock");
    let file = File::create(&path).on("create", &path)?;
    if file.try_lock().is_err() {
        say("another process makes the Debian disk: waiting for it");
        file.lock().on("lock", &path)?;
    }
    Ok(file)
}

fn run(tools: &Path, script: &Path, to: &Path, tree: &Path, mirror: &str) -> Result<()> {
    // By SIGKILL: `unshare`, which the script becomes, takes all that it started along.
    let mut command = Tools::at(tools).command("bash");
    command.arg(script).arg(to).arg(tree);
    command.env("PATH", search_path(tools)?);
    command.env("DEBOOTSTRAP_DIR", tools.join("usr/share/debootstrap"));
    command.env("MIRROR", mirror);
    command.env("SIZE_MIB", (SYSTEM_SIZE >> 20).to_string());
    for unset in ["KERNEL", "PACKAGES", "PASSWORD"] {
        command.env_remove(unset);
    }
    output(&mut command).map(drop)
}

/// The unpacked programs in front of the machine's own.
fn search_path(tools: &Path) -> Result<OsString> {
    let own = ["usr/sbin", "usr/bin", "sbin", "bin"].map(|dir| tools.join(dir));
    let machine = env::var_os("PATH").unwrap_or_default();
    env::join_paths(own.into_iter().chain(env::split_paths(&machine)))
        .map_err(|error| Error::Usage(format!("PATH: {error}")))
}

/// Over everything that decides what is made, but for the packages, which get newer.
fn key(script: &Path, tree: &Path, mirror: &str) -> Result<String> {
    let mut files = Vec::new();
    collect(tree, &mut files)?;
    files.sort();
    files.insert(0, script.to_owned());
    let mut context = digest::Context::new(&digest::SHA256);
    let mut add = |bytes: &[u8]| {
        context.update(&(bytes.len() as u64).to_le_bytes());
        context.update(bytes);
    };
    add(mirror.as_bytes());
    add(&SYSTEM_SIZE.to_le_bytes());
    for file in &files {
        // By its name in the tree: another clone's disk is the same. The script has none.
        let name = file.strip_prefix(tree).unwrap_or(Path::new(""));
        add(name.as_os_str().as_encoded_bytes());
        // A link says where it leads: it may be no file here.
        match fs::read_link(file) {
            Ok(target) => add(target.as_os_str().as_encoded_bytes()),
            Err(_) => add(&read(file)?),
        }
    }
    Ok(hex::encode(context.finish()))
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    make_dir(folder)?;
    for entry in fs::read_dir(folder).on("list", folder)? {
        let entry = entry.on("list", folder)?;
        if entry.file_type().on("look at", &entry.path())?.is_dir() {
            collect(&entry.path(), files)?;
        } else {
            files.push(entry.path());
        }
    }
    Ok(())
}

/// Written into the finished folder.
const KEY: &str = "made-from";
const DEBOOTSTRAP: &str = "usr/sbin/debootstrap";
const PACKAGES: [&str; 5] = ["debootstrap", "dosfstools", "e2fsprogs", "fdisk", "mtools"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_script_tree_or_mirror_is_another_disk() {
        let dir = tempfile::tempdir().unwrap();
        let (script, tree) = (dir.path().join("script"), dir.path().join("tree"));
        fs::write(&script, "a").unwrap();
        fs::create_dir_all(tree.join("etc")).unwrap();
        fs::write(tree.join("etc/unit"), "b").unwrap();
        let first = key(&script, &tree, "http://a").unwrap();
        assert_eq!(first, key(&script, &tree, "http://a").unwrap());
        assert_ne!(first, key(&script, &tree, "http://b").unwrap());
        let (moved, elsewhere) = (dir.path().join("moved"), dir.path().join("elsewhere"));
        fs::copy(&script, &moved).unwrap();
        fs::create_dir_all(elsewhere.join("etc")).unwrap();
        fs::copy(tree.join("etc/unit"), elsewhere.join("etc/unit")).unwrap();
        assert_eq!(first, key(&moved, &elsewhere, "http://a").unwrap());
        fs::rename(elsewhere.join("etc/unit"), elsewhere.join("etc/other")).unwrap();
        assert_ne!(first, key(&moved, &elsewhere, "http://a").unwrap());
        fs::write(tree.join("etc/unit"), "c").unwrap();
        let second = key(&script, &tree, "http://a").unwrap();
        assert_ne!(first, second);
        std::os::unix::fs::symlink("/nowhere", tree.join("etc/link")).unwrap();
        let third = key(&script, &tree, "http://a").unwrap();
        assert_ne!(second, third);
        fs::write(&script, "d").unwrap();
        assert_ne!(third, key(&script, &tree, "http://a").unwrap());
    }
}
