//! Fetches Debian packages with apt into the lab's own directories; the machine's file system stays as it is.
//!
//! apt runs with a private source list, list directory and cache, so that neither root nor a change of the machine's
//! sources is needed. The mirror is the one the machine is configured for; packages are verified by apt as always.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use nix::sys::signal::Signal;

use crate::{
    command::{output, tied},
    error::{Error, OnFile, Result},
    paths::{Paths, make_dir, write_whole},
};

/// apt with the lab's private configuration.
pub struct Apt {
    dir: PathBuf,
    cache: PathBuf,
}

impl Apt {
    /// Write the private configuration and fetch the package lists.
    pub fn open(paths: &Paths) -> Result<Self> {
        let sources = sources(&configured_targets()?)?;
        Self::with_sources(paths, "apt", &sources)
    }

    /// The same of another release of Debian and of nothing else, from the machine's mirror, verified like all: for one
    /// package that Debian 12 has not. Nothing else shall come from there, so its lists are apart.
    pub fn of_release(paths: &Paths, release: &str) -> Result<Self> {
        let sources = sources_of_release(&configured_targets()?, release)?;
        Self::with_sources(paths, &format!("apt-{release}"), &sources)
    }

    fn with_sources(paths: &Paths, folder: &str, sources: &str) -> Result<Self> {
        let apt = Self {
            dir: paths.root.join(folder),
            cache: paths.cache(),
        };
        for sub in ["lists/partial", "cache/archives/partial"] {
            make_dir(&apt.dir.join(sub))?;
        }
        make_dir(&apt.cache)?;
        write_whole(&apt.sources(), sources.as_bytes())?;
        output(apt.command("apt-get").args(["-qq", "update"]))?;
        Ok(apt)
    }

    /// The newest package whose name is `linux-image-<series>…+deb12…-cloud-amd64`, signed or not.
    pub fn newest_kernel(&self, series: &str) -> Result<String> {
        let names = output(
            self.command("apt-cache")
                .args(["pkgnames", &format!("linux-image-{series}")]),
        )?;
        let mut kernels: Vec<&str> = names.lines().filter(|name| is_cloud_kernel(name)).collect();
        kernels.sort_by_key(|name| std::cmp::Reverse(version_numbers(name)));
        for name in kernels {
            if has_candidate(&output(self.command("apt-cache").args(["policy", name]))?) {
                return Ok(name.to_owned());
            }
        }
        Err(Error::Packages(format!(
            "the Debian mirror has no linux-image-{series}*+deb12-cloud-amd64 ({BACKPORTS})"
        )))
    }

    /// The one kernel image package that the meta package `meta` stands for.
    pub fn kernel_of(&self, meta: &str) -> Result<String> {
        let text = output(
            self.command("apt-cache")
                .args(["depends", "--important", meta]),
        )?;
        let name = text
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .find(|n| n.starts_with("linux-image-"));
        name.map(str::to_owned)
            .ok_or_else(|| Error::Packages(format!("package {meta} depends on no kernel image")))
    }

    /// `wanted`, and whatever of their dependencies this machine lacks, as names for [`Self::fetch`].
    pub fn with_missing_dependencies(&self, wanted: &[&str]) -> Result<Vec<String>> {
        let mut simulate = self.command("apt-get");
        simulate
            .args(["--simulate", "--no-install-recommends", "install"])
            .args(wanted);
        let plan = output(&mut simulate)?;
        let named: BTreeSet<&str> = wanted
            .iter()
            .filter_map(|name| name.split('/').next())
            .collect();
        let mut all: Vec<String> = wanted.iter().map(|name| (*name).to_owned()).collect();
        all.extend(
            installations(&plan)
                .into_iter()
                .filter(|(name, _)| !named.contains(name))
                .map(|(n, v)| format!("{n}={v}")),
        );
        Ok(all)
    }

    /// Download `packages` (`name`, `name/suite` or `name=version`) and unpack them below `to`.
    pub fn fetch(&self, packages: &[String], to: &Path) -> Result<()> {
        // What an interrupted attempt left may be half a file.
        for stale in self.debs()? {
            fs::remove_file(&stale).on("remove", &stale)?;
        }
        let mut download = self.command("apt-get");
        download
            .current_dir(&self.cache)
            .args(["-qq", "download"])
            .args(packages);
        output(&mut download)?;
        for deb in &self.debs()? {
            output(
                tied("dpkg-deb", Signal::SIGTERM)
                    .arg("--extract")
                    .arg(deb)
                    .arg(to),
            )?;
            fs::remove_file(deb).on("remove", deb)?;
        }
        Ok(())
    }

    fn debs(&self) -> Result<BTreeSet<PathBuf>> {
        let entries = fs::read_dir(&self.cache).on("list", &self.cache)?;
        let debs = entries.filter_map(|entry| Some(entry.ok()?.path()));
        Ok(debs
            .filter(|path| path.extension().is_some_and(|ext| ext == "deb"))
            .collect())
    }

    fn sources(&self) -> PathBuf {
        self.dir.join("lab.sources")
    }

    fn command(&self, tool: &str) -> Command {
        let mut command = tied(tool, Signal::SIGTERM);
        let settings = [
            ("Dir::Etc::sourcelist", self.sources()),
            ("Dir::Etc::sourceparts", "/nonexistent".into()),
            ("Dir::Etc::preferencesparts", "/nonexistent".into()),
            ("Dir::State::lists", self.dir.join("lists")),
            ("Dir::Cache", self.dir.join("cache")),
            // The download user of apt cannot write below a private home directory.
            ("APT::Sandbox::User", "root".into()),
            ("Acquire::Retries", "3".into()),
        ];
        for (key, value) in settings {
            command.arg("-o").arg(format!("{key}={}", value.display()));
        }
        command
            .env("LC_ALL", "C")
            .env("DEBIAN_FRONTEND", "noninteractive");
        command
    }
}

/// Archive and release of every configured source, one `uri|release` a line.
fn configured_targets() -> Result<String> {
    let mut query = tied("apt-get", Signal::SIGTERM);
    query.args([
        "indextargets",
        "--no-release-info",
        "--format",
        "$(REPO_URI)|$(RELEASE)",
        "Created-By: Packages",
    ]);
    output(&mut query)
}

/// Where the machine has Debian 12 from.
pub fn mirror() -> Result<String> {
    let targets = configured_targets()?;
    main_archive(&targets)
        .map(|uri| uri.trim_end_matches('/').to_owned())
        .ok_or_else(|| {
            Error::Packages(format!(
                "no source for Debian 12 ({CODENAME}) is configured in /etc/apt"
            ))
        })
}

/// The lab's source list: the machine's own Debian 12 archives, and backports from the same mirror.
fn sources(targets: &str) -> Result<String> {
    let mut archives: BTreeSet<(&str, String)> = BTreeSet::new();
    for (uri, release) in targets.lines().filter_map(|line| line.split_once('|')) {
        if release == CODENAME {
            archives.insert((uri, BACKPORTS.to_owned()));
        }
        if release == CODENAME
            || RELEASES
                .iter()
                .any(|part| release == format!("{CODENAME}-{part}"))
        {
            archives.insert((uri, release.to_owned()));
        }
    }
    if archives.is_empty() {
        return Err(Error::Packages(format!(
            "no source for Debian 12 ({CODENAME}) is configured in /etc/apt: the lab takes its QEMU and kernels from there; \
             add one, or use a machine with hardware virtualisation"
        )));
    }
    Ok(archives
        .iter()
        .map(|(uri, suite)| stanza(uri, suite))
        .collect())
}

/// The source list of another release: the archive that the machine has Debian 12 from.
fn sources_of_release(targets: &str, release: &str) -> Result<String> {
    let uri = main_archive(targets).ok_or_else(|| {
        Error::Packages(format!(
            "no source for Debian 12 ({CODENAME}) is configured in /etc/apt, so there is no mirror to take {release} from"
        ))
    })?;
    Ok(stanza(uri, release))
}

fn main_archive(targets: &str) -> Option<&str> {
    let mut archives = targets.lines().filter_map(|line| line.split_once('|'));
    let (uri, _) = archives.find(|(_, configured)| *configured == CODENAME)?;
    Some(uri)
}

fn stanza(uri: &str, suite: &str) -> String {
    let keyring = if Path::new(KEYRING).exists() {
        format!("Signed-By: {KEYRING}\n")
    } else {
        String::new()
    };
    format!(
        "Types: deb\nURIs: {uri}\nSuites: {suite}\nComponents: main\nTargets: Packages\n{keyring}\n"
    )
}

/// `(name, version)` of the `Inst` lines of `apt-get --simulate install`.
fn installations(plan: &str) -> Vec<(&str, &str)> {
    let parse = |line| {
        let (name, rest) = str::strip_prefix(line, "Inst ")?.split_once(' ')?;
        Some((name, rest.split_once('(')?.1.split_whitespace().next()?))
    };
    plan.lines().filter_map(parse).collect()
}

fn is_cloud_kernel(name: &str) -> bool {
    name.contains("+deb12")
        && (name.ends_with("-cloud-amd64") || name.ends_with("-cloud-amd64-unsigned"))
}

/// All numbers in a package name, for comparing kernel versions.
fn version_numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit())
        .filter_map(|digits| digits.parse().ok())
        .collect()
}

fn has_candidate(policy: &str) -> bool {
    policy.lines().any(|line| {
        line.trim()
            .strip_prefix("Candidate: ")
            .is_some_and(|version| version != "(none)")
    })
}

/// The suite that has the QEMU and the kernel the lab was measured with.
pub const BACKPORTS: &str = "bookworm-backports";

const CODENAME: &str = "bookworm";
const RELEASES: [&str; 2] = ["updates", "security"];
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backports_come_from_the_configured_mirror() {
        let targets = "http://mirror.test/debian/|bookworm\nhttp://mirror.test/security/|bookworm-security\nhttp://x.test/|nodistro\n";
        let list = sources(targets).unwrap();
        assert!(
            list.contains("URIs: http://mirror.test/debian/\nSuites: bookworm-backports\n"),
            "{list}"
        );
        assert!(
            list.contains("URIs: http://mirror.test/security/\nSuites: bookworm-security\n"),
            "{list}"
        );
        assert!(!list.contains("x.test"), "{list}");
        assert!(sources("http://x.test/|trixie\n").is_err());
    }

    #[test]
    fn another_release_comes_from_the_same_mirror_and_alone() {
        let targets = "http://mirror.test/security/|bookworm-security\nhttp://mirror.test/debian/|bookworm\nhttp://x.test/|forky\n";
        let list = sources_of_release(targets, "forky").unwrap();
        assert!(
            list.contains("URIs: http://mirror.test/debian/\nSuites: forky\n"),
            "{list}"
        );
        assert_eq!(list.matches("URIs:").count(), 1, "{list}");
        assert!(!sources(targets).unwrap().contains("forky"));
        assert!(sources_of_release("http://x.test/|forky\n", "forky").is_err());
    }

    #[test]
    fn the_newest_cloud_kernel_wins() {
        let newer = "linux-image-6.12.117+deb12-cloud-amd64";
        assert!(
            version_numbers(newer)
                > version_numbers("linux-image-6.12.95+deb12-cloud-amd64-unsigned")
        );
        assert!(
            is_cloud_kernel(newer)
                && !is_cloud_kernel("linux-image-6.12.117+deb12-cloud-amd64-dbg")
        );
    }

    #[test]
    fn simulated_installations_are_read() {
        let plan = "Reading...\nInst libfdt1 (1.6.1-4+b1 Debian:12.15/oldstable [amd64])\nInst e2fsprogs [1.47.0-2] (1.47.0-2+b2 Debian [amd64])\nConf libfdt1 (1.6.1-4+b1 Debian)\n";
        assert_eq!(
            installations(plan),
            [("libfdt1", "1.6.1-4+b1"), ("e2fsprogs", "1.47.0-2+b2")]
        );
    }

    #[test]
    fn a_name_without_a_version_is_no_candidate() {
        assert!(has_candidate(
            "linux-image-x:\n  Installed: (none)\n  Candidate: 6.12.95-1\n"
        ));
        assert!(!has_candidate(
            "linux-image-x:\n  Installed: (none)\n  Candidate: (none)\n"
        ));
    }
}
