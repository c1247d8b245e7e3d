//! The description of a machine as a user writes it (TOML), parsed once into a type that cannot be wrong.
//!
//! Every error names the file, the line, the key, and what would be right. Paths are relative to the
//! description's own folder.

mod boot;
mod confidential;
mod devices;
mod document;
mod resources;

use std::fmt;
use std::fs::{File, FileType};
use std::io::Read;
use std::net::Ipv4Addr;
use std::ops::Range;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use toml::Spanned;

pub use self::boot::{BootSpec, FirmwareSpec, KernelFiles};
pub use self::confidential::{ConfidentialSpec, IdFiles, Offer, SevSpec, SnpSpec, Strongest};
pub use self::document::schema;
use self::document::{Cpu, Disk, Document, Net};
use crate::machine::cpu::{CpuModel, CpuPlan, Topology};
use crate::machine::plan::devices::{HotPlugPlan, Limits, SmallDevices};
use crate::machine::plan::{
    DiskFormat, DiskIo, DiskPlan, MAX_ANNOUNCE, MAX_CMDLINE, MAX_DEVICES, MAX_DISK_ID,
    MAX_LOW_MEMORY, MAX_MEMORY, MAX_PAIRS, MAX_VCPUS, MIN_MEMORY, MachinePlan, NetPlan, is_name,
};
use crate::sandbox::io_limit::IoLimits;
use crate::sandbox::jail::CpuShare;

/// A description that has been read and checked. Files named in it exist and are readable.
#[derive(Clone, Debug)]
pub struct MachineSpec {
    /// The guest's name.
    pub name: String,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// What processor they are.
    pub cpu: CpuPlan,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// What it starts in.
    pub boot: BootSpec,
    /// Kernel command line, without what the VMM appends.
    pub cmdline: String,
    /// Confidential technology and what goes with it.
    pub confidential: ConfidentialSpec,
    /// Disks.
    pub disks: Vec<DiskSpec>,
    /// Network cards.
    pub nets: Vec<NetSpec>,
    /// Guest context id of virtio-vsock.
    pub vsock_cid: Option<u32>,
    /// Random numbers, balloon, console, watchdog.
    pub small: SmallDevices,
    /// Slots for devices that are attached while it runs.
    pub slots: u8,
    /// What it may take of the host's processors.
    pub share: CpuShare,
    /// What it may take of the block devices beneath its disks.
    pub io: Option<IoLimits>,
}

/// One disk of a description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// Its name.
    pub id: String,
    /// Its image.
    pub path: PathBuf,
    /// What the image is.
    pub format: DiskFormat,
    /// Who does its requests.
    pub io: DiskIo,
    /// Whether writes are refused.
    pub read_only: bool,
    /// How much it may read and write.
    pub limits: Limits,
}

/// One network card of a description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetSpec {
    /// Its name.
    pub id: String,
    /// Name of the tap device; made if absent, removed with the guest if made.
    pub tap: String,
    /// Bridge the tap is put on.
    pub bridge: Option<String>,
    /// MAC address.
    pub mac: [u8; 6],
    /// Pairs of queues.
    pub queues: u8,
    /// Addresses to announce after a move.
    pub announce: Vec<Ipv4Addr>,
    /// How much it may send and receive.
    pub limits: Limits,
}

impl MachineSpec {
    /// Reads and checks a description.
    pub fn load(path: &Path) -> Result<Self, SpecError> {
        // A pipe must not hold up its opening.
        let file = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(|e| SpecError::unreadable(path, &e))?;
        Self::parse(path, &Self::read(path, file)?)
    }

    /// The text of a description in an open file; `path` names it in errors.
    pub fn read(path: &Path, file: File) -> Result<String, SpecError> {
        let unreadable = |e: std::io::Error| SpecError::unreadable(path, &e);
        let found = file.metadata().map_err(unreadable)?;
        if !found.is_file() {
            let problem = "is not a regular file; want a description (TOML)";
            return Err(SpecError::whole(path, problem.to_owned()));
        }
        let size = found.len();
        if size > MAX_DESCRIPTION {
            return Err(SpecError::whole(
                path,
                format!("is {size} bytes; a description has at most {MAX_DESCRIPTION}"),
            ));
        }
        let mut text = String::new();
        file.take(MAX_DESCRIPTION)
            .read_to_string(&mut text)
            .map_err(unreadable)?;
        Ok(text)
    }

    /// Checks a description that has been read from `path`.
    pub fn parse(path: &Path, text: &str) -> Result<Self, SpecError> {
        let document: Document = toml::from_str(text).map_err(|e| {
            let line = e.span().map(|span| line_of(text, &span));
            SpecError {
                file: path.to_owned(),
                line,
                problem: with_key(text, line, e.message()),
            }
        })?;
        Reader { path, text }.spec(document)
    }

    /// Every file and folder that the description names, where each really is.
    pub fn files(&self) -> Vec<&Path> {
        let boot = self.boot.files();
        let disks = self.disks.iter().map(|disk| disk.path.as_path());
        let others = self.confidential.files();
        boot.into_iter().chain(disks).chain(others).collect()
    }

    /// The plan for a VMM on a host with this offer.
    pub fn plan(&self, vm_id: [u8; 16], offer: Offer) -> MachinePlan {
        MachinePlan {
            name: self.name.clone(),
            vm_id,
            vcpus: self.vcpus,
            cpu: self.cpu.clone(),
            memory_bytes: self.memory_bytes,
            firmware: self.boot.firmware().map(|firmware| firmware.plan),
            cmdline: self.cmdline.clone(),
            technology: self.confidential.technology(offer),
            disks: self
                .disks
                .iter()
                .map(|d| DiskPlan {
                    id: d.id.clone(),
                    format: d.format,
                    io: d.io,
                    read_only: d.read_only,
                    limits: d.limits,
                })
                .collect(),
            nets: self
                .nets
                .iter()
                .map(|n| NetPlan {
                    id: n.id.clone(),
                    mac: n.mac,
                    queues: n.queues,
                    announce: n.announce.clone(),
                    limits: n.limits,
                })
                .collect(),
            vsock_cid: self.vsock_cid,
            small: self.small.clone(),
            hotplug: HotPlugPlan {
                slots: self.slots,
                plugged: Vec::new(),
            },
        }
    }
}

/// A description that cannot be used.
#[derive(Debug, PartialEq, Eq)]
pub struct SpecError {
    /// The file.
    pub file: PathBuf,
    /// The line, from 1, where one can be named.
    pub line: Option<usize>,
    /// The key, what is wrong with it, and what would be right.
    pub problem: String,
}

impl SpecError {
    fn whole(file: &Path, problem: String) -> Self {
        Self {
            file: file.to_owned(),
            line: None,
            problem,
        }
    }

    fn unreadable(file: &Path, error: &std::io::Error) -> Self {
        Self::whole(file, format!("cannot be read: {error}"))
    }
}

impl std::error::Error for SpecError {}

impl fmt::Display for SpecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        write!(f, ": {}", self.problem)
    }
}

/// `52:54:00:12:34:56` as six bytes.
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0u8; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|p| p.len() == 2)?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

/// Turns a parsed document into a specification; knows where each value stood.
struct Reader<'a> {
    path: &'a Path,
    text: &'a str,
}

impl Reader<'_> {
    fn spec(&self, document: Document) -> Result<MachineSpec, SpecError> {
        let name = self.name("name", document.name)?;
        let vcpus = self.vcpus(document.vcpus)?;
        let cpu = document
            .cpu
            .map_or(Ok(CpuPlan::default()), |cpu| self.cpu(cpu, vcpus))?;
        let memory_span = document.memory.span();
        let memory_bytes = self.memory(document.memory)?;
        let confidential = document
            .confidential
            .map_or(Ok(ConfidentialSpec::None), |c| self.confidential(c))?;
        if confidential != ConfidentialSpec::None && memory_bytes > MAX_LOW_MEMORY {
            let problem = "`memory` of a confidential guest is at most 3 GiB in this version";
            return Err(self.at(memory_span, problem.to_owned()));
        }
        let plain = matches!(confidential, ConfidentialSpec::None);
        let (boot, cmdline) = self.boot(document.boot, plain)?;
        self.names("disk", document.disk.iter().map(|d| &d.id))?;
        self.names("net", document.net.iter().map(|n| &n.id))?;
        let disks = document
            .disk
            .into_iter()
            .map(|d| self.disk(d))
            .collect::<Result<Vec<_>, _>>()?;
        let nets = document
            .net
            .into_iter()
            .map(|n| self.net(n))
            .collect::<Result<Vec<_>, _>>()?;
        let vsock_cid = document.vsock.map(|v| self.vsock(v.cid)).transpose()?;
        let small = devices::Small {
            rng: document.rng,
            balloon: document.balloon,
            console: document.console,
            watchdog: document.watchdog,
        };
        let small = self.small(small, !plain)?;
        let slots = self.slots(document.hotplug, plain)?;
        let mut resources = document.resources;
        let io = resources.as_mut().and_then(|r| r.io_max.take());
        let io = io.map(|io| self.io_max(io)).transpose()?;
        let share = resources.map(|r| self.resources(r)).transpose()?;
        Ok(MachineSpec {
            io,
            share: share.unwrap_or_default(),
            name,
            vcpus,
            cpu,
            memory_bytes,
            boot,
            cmdline,
            confidential,
            disks,
            nets,
            vsock_cid,
            small,
            slots,
        })
    }

    fn name(&self, key: &str, value: Spanned<String>) -> Result<String, SpecError> {
        if is_name(value.get_ref()) {
            return Ok(value.into_inner());
        }
        let problem = format!(
            "`{key}` is {:?}; want 1 to 64 characters of a-z, 0-9 and '-'",
            value.get_ref()
        );
        Err(self.at(value.span(), problem))
    }

    fn vcpus(&self, value: Spanned<u64>) -> Result<u8, SpecError> {
        u8::try_from(*value.get_ref())
            .ok()
            .filter(|n| (1..=MAX_VCPUS).contains(n))
            .ok_or_else(|| {
                self.at(
                    value.span(),
                    format!("`vcpus` is {}; want 1 to {MAX_VCPUS}", value.get_ref()),
                )
            })
    }

    fn cpu(&self, value: Cpu, vcpus: u8) -> Result<CpuPlan, SpecError> {
        let model = match &value.model {
            None => CpuModel::default(),
            Some(name) => CpuModel::named(name.get_ref()).ok_or_else(|| {
                let names: Vec<&str> = CpuModel::ALL.iter().map(|m| m.name()).collect();
                let problem = format!(
                    "`cpu.model` is {:?}; want one of {}",
                    name.get_ref(),
                    names.join(", ")
                );
                self.at(name.span(), problem)
            })?,
        };
        let topology = match &value.cores {
            None if value.sockets.is_none() && value.threads.is_none() => None,
            None => {
                let problem = "`cpu.cores` is missing; it stands beside `sockets` and `threads`";
                return Err(SpecError::whole(self.path, problem.to_owned()));
            }
            Some(cores) => {
                let topology = Topology {
                    sockets: value.sockets.unwrap_or(1),
                    cores: *cores.get_ref(),
                    threads: value.threads.unwrap_or(1),
                };
                if let Some(problem) = topology.problem(vcpus) {
                    return Err(self.at(cores.span(), format!("`cpu`: {problem}")));
                }
                Some(topology)
            }
        };
        Ok(CpuPlan {
            model,
            topology,
            baseline: None,
        })
    }

    fn memory(&self, value: Spanned<String>) -> Result<u64, SpecError> {
        let wanted = "want a size such as \"512 MiB\", a multiple of 2 MiB from 64 MiB to 64 GiB";
        let bytes = parse_size(value.get_ref()).ok_or_else(|| {
            self.at(
                value.span(),
                format!("`memory` is {:?}; {wanted}", value.get_ref()),
            )
        })?;
        let fits = bytes % (2 << 20) == 0 && (MIN_MEMORY..=MAX_MEMORY).contains(&bytes);
        fits.then_some(bytes).ok_or_else(|| {
            self.at(
                value.span(),
                format!("`memory` is {:?}; {wanted}", value.get_ref()),
            )
        })
    }

    fn cmdline(&self, value: Spanned<String>) -> Result<String, SpecError> {
        let text = value.get_ref();
        if text.len() <= MAX_CMDLINE && text.bytes().all(|b| (0x20..0x7f).contains(&b)) {
            return Ok(value.into_inner());
        }
        Err(self.at(
            value.span(),
            format!("`boot.cmdline` wants printable ASCII, at most {MAX_CMDLINE} bytes"),
        ))
    }

    fn disk(&self, value: Disk) -> Result<DiskSpec, SpecError> {
        let id_span = value.id.span();
        let id = self.name("disk.id", value.id)?;
        if id.len() > MAX_DISK_ID {
            return Err(self.at(
                id_span,
                format!("`disk.id` is {id:?}; want at most {MAX_DISK_ID} characters"),
            ));
        }
        let path = self.image("disk.path", value.path)?;
        if let Some(io) = &value.io
            && *io.get_ref() == DiskIo::IoUring
            && value.format != DiskFormat::Raw
        {
            let problem =
                "`disk.io` is \"io_uring\", which is for raw images; want \"auto\" or \"threads\"";
            return Err(self.at(io.span(), problem.to_owned()));
        }
        Ok(DiskSpec {
            id,
            path,
            format: value.format,
            io: value.io.map(Spanned::into_inner).unwrap_or_default(),
            read_only: value.read_only,
            limits: self.limits("disk", value.limit)?,
        })
    }

    fn net(&self, value: Net) -> Result<NetSpec, SpecError> {
        let id = self.name("net.id", value.id)?;
        let tap = self.interface("net.tap", value.tap)?;
        let bridge = value
            .bridge
            .map(|b| self.interface("net.bridge", b))
            .transpose()?;
        let mac = parse_mac(value.mac.get_ref())
            .filter(|mac| mac[0] & 1 == 0)
            .ok_or_else(|| {
                let problem = format!(
                    "`net.mac` is {:?}; want a unicast address such as 52:54:00:12:34:56",
                    value.mac.get_ref()
                );
                self.at(value.mac.span(), problem)
            })?;
        let queues = match &value.queues {
            Some(queues) if !(1..=MAX_PAIRS).contains(queues.get_ref()) => {
                let problem = format!(
                    "`net.queues` is {}; want 1 to {MAX_PAIRS} pairs of queues",
                    queues.get_ref()
                );
                return Err(self.at(queues.span(), problem));
            }
            Some(queues) => *queues.get_ref(),
            None => 1,
        };
        if value.announce.len() > MAX_ANNOUNCE {
            return Err(self.at(
                value.mac.span(),
                format!("`net.announce` wants at most {MAX_ANNOUNCE} addresses"),
            ));
        }
        Ok(NetSpec {
            id,
            tap,
            bridge,
            mac,
            queues,
            announce: value.announce,
            limits: self.limits("net", value.limit)?,
        })
    }

    fn interface(&self, key: &str, value: Spanned<String>) -> Result<String, SpecError> {
        if is_interface(value.get_ref()) {
            return Ok(value.into_inner());
        }
        let problem = format!(
            "`{key}` is {:?}; want 1 to 15 characters of a-z, A-Z, 0-9, '-', '_'",
            value.get_ref()
        );
        Err(self.at(value.span(), problem))
    }

    fn vsock(&self, cid: Spanned<u32>) -> Result<u32, SpecError> {
        if (3..u32::MAX).contains(cid.get_ref()) {
            return Ok(cid.into_inner());
        }
        Err(self.at(
            cid.span(),
            format!("`vsock.cid` is {}; want 3 to 4294967294", cid.get_ref()),
        ))
    }

    /// A regular file, where it really is.
    fn file(&self, key: &str, value: Spanned<PathBuf>) -> Result<PathBuf, SpecError> {
        self.found(key, value, "a regular file", FileType::is_file)
    }

    /// A regular file or a block device.
    fn image(&self, key: &str, value: Spanned<PathBuf>) -> Result<PathBuf, SpecError> {
        let fits = |kind: &FileType| kind.is_file() || kind.is_block_device();
        self.found(key, value, "a regular file or a block device", fits)
    }

    fn found(
        &self,
        key: &str,
        value: Spanned<PathBuf>,
        wanted: &str,
        fits: impl Fn(&FileType) -> bool,
    ) -> Result<PathBuf, SpecError> {
        let path = self.beside(&value);
        let real = path.canonicalize();
        match real.and_then(|real| Ok((std::fs::metadata(&real)?, real))) {
            Ok((meta, real)) if fits(&meta.file_type()) => Ok(real),
            Ok(_) => Err(self.at(
                value.span(),
                format!(
                    "`{key}` names {}, which is not {wanted}; {FILE_WANTED}",
                    path.display()
                ),
            )),
            Err(e) => Err(self.at(
                value.span(),
                format!(
                    "`{key}` names {}, which cannot be used: {e}; {FILE_WANTED}",
                    path.display()
                ),
            )),
        }
    }

    /// A folder, where it really is.
    fn folder(&self, key: &str, value: Spanned<PathBuf>) -> Result<PathBuf, SpecError> {
        let path = self.beside(&value);
        match path.canonicalize() {
            Ok(real) if real.is_dir() => Ok(real),
            _ => {
                let problem = format!("`{key}` names {}, which is no folder", path.display());
                Err(self.at(value.span(), problem))
            }
        }
    }

    fn beside(&self, value: &Spanned<PathBuf>) -> PathBuf {
        let folder = self.path.parent().unwrap_or(Path::new(""));
        folder.join(value.get_ref())
    }

    /// Not too many devices of a kind, each with a name of its own.
    fn names<'s>(
        &self,
        kind: &str,
        ids: impl Iterator<Item = &'s Spanned<String>>,
    ) -> Result<(), SpecError> {
        let mut seen = std::collections::BTreeSet::new();
        for id in ids {
            if seen.len() == MAX_DEVICES {
                let problem =
                    format!("`{kind}` stands more often than {MAX_DEVICES} times; want fewer");
                return Err(self.at(id.span(), problem));
            }
            if !seen.insert(id.get_ref()) {
                let problem = format!(
                    "`{kind}.id` {:?} stands twice; want distinct names",
                    id.get_ref()
                );
                return Err(self.at(id.span(), problem));
            }
        }
        Ok(())
    }

    fn at(&self, span: Range<usize>, problem: String) -> SpecError {
        SpecError {
            file: self.path.to_owned(),
            line: Some(line_of(self.text, &span)),
            problem,
        }
    }
}

/// `512 MiB` or `2 GiB` in bytes.
pub fn parse_size(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim_start() {
        "MiB" => 20,
        "GiB" => 30,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// Whether a name can be a network interface's.
pub fn is_interface(name: &str) -> bool {
    (1..=15).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

/// A parser's message with the key on its line, where the message does not name it.
fn with_key(text: &str, line: Option<usize>, message: &str) -> String {
    let written = line.and_then(|line| text.lines().nth(line.saturating_sub(1)));
    let key = written
        .and_then(|w| w.split_once('='))
        .map(|(key, _)| key.trim());
    match key {
        Some(key) if !key.is_empty() && !message.contains(key) => format!("`{key}`: {message}"),
        _ => message.to_owned(),
    }
}

fn line_of(text: &str, span: &Range<usize>) -> usize {
    text.bytes()
        .take(span.start)
        .filter(|&b| b == b'\n')
        .count()
        + 1
}

const FILE_WANTED: &str = "want a file's path, from the description's own folder or absolute";
const MAX_DESCRIPTION: u64 = 64 * 1024;
#[cfg(test)]
mod tests;
