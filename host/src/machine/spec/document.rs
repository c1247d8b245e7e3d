//! The shape of a description: its keys, their types, and a word on each for the published schema. What the types cannot
//! say is checked by the reader.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::Deserialize;
use toml::Spanned;

use super::boot::Boot;
use super::confidential::Confidential;
use super::devices;
use super::resources::Resources;
use crate::machine::cpu::CpuModel;
use crate::machine::plan::{DiskFormat, DiskIo};

/// A guest, as `casemate run` and `casemate vm create` take it. Paths are relative to the file's own folder.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "Casemate guest")]
pub(super) struct Document {
    /// The guest's name: 1 to 64 of a-z, 0-9 and '-'.
    #[schemars(with = "String", regex(pattern = "^[a-z0-9-]{1,64}$"))]
    pub(super) name: Spanned<String>,
    /// Number of virtual processors.
    #[schemars(with = "u64", range(min = 1, max = 64))]
    pub(super) vcpus: Spanned<u64>,
    /// What processor they are, and how they are arranged.
    pub(super) cpu: Option<Cpu>,
    /// Memory, such as "512 MiB" or "4 GiB": 64 MiB to 64 GiB in steps of 2 MiB; of a confidential guest at most 3 GiB.
    #[schemars(with = "Size")]
    pub(super) memory: Spanned<String>,
    /// What is started.
    #[schemars(with = "Boot")]
    pub(super) boot: Spanned<Boot>,
    /// AMD SEV, SEV-ES or SEV-SNP, and what goes with it.
    pub(super) confidential: Option<Confidential>,
    /// Disks, in the order of the guest's bus.
    #[serde(default)]
    pub(super) disk: Vec<Disk>,
    /// Network cards, likewise.
    #[serde(default)]
    pub(super) net: Vec<Net>,
    /// Sockets between host and guest.
    pub(super) vsock: Option<Vsock>,
    /// A source of random numbers.
    pub(super) rng: Option<devices::Rng>,
    /// A balloon, by which a plain guest gives memory back.
    #[schemars(with = "Option<devices::Balloon>")]
    pub(super) balloon: Option<Spanned<devices::Balloon>>,
    /// A virtio console, beside the serial one.
    pub(super) console: Option<devices::Console>,
    /// A watchdog.
    pub(super) watchdog: Option<devices::Watchdog>,
    /// What can be attached while it runs.
    #[schemars(with = "Option<devices::HotPlug>")]
    pub(super) hotplug: Option<Spanned<devices::HotPlug>>,
    /// What the guest may take of this host; does not move with it.
    pub(super) resources: Option<Resources>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Cpu {
    /// A named model, which every host has to which the guest may move, or "host", which is the default.
    #[schemars(with = "Option<CpuModel>")]
    pub(super) model: Option<Spanned<String>>,
    /// Sockets; times cores and threads, these are the vCPUs.
    pub(super) sockets: Option<u8>,
    /// Cores of each socket.
    #[schemars(with = "Option<u8>")]
    pub(super) cores: Option<Spanned<u8>>,
    /// Threads of each core.
    pub(super) threads: Option<u8>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Disk {
    /// Its name: 1 to 20 of a-z, 0-9 and '-'. The guest reads it as the disk's serial number.
    #[schemars(with = "String", regex(pattern = "^[a-z0-9-]{1,20}$"))]
    pub(super) id: Spanned<String>,
    /// Its image, or a block device.
    #[schemars(with = "String")]
    pub(super) path: Spanned<PathBuf>,
    /// What the image is; never guessed from its content.
    #[serde(default)]
    pub(super) format: DiskFormat,
    /// Who does its requests: "io_uring", the kernel; "threads"; "auto", reads by the kernel and writes by threads.
    #[schemars(with = "Option<DiskIo>")]
    pub(super) io: Option<Spanned<DiskIo>>,
    /// Whether the guest may not write.
    #[serde(default)]
    pub(super) read_only: bool,
    /// How much the guest may read and write.
    pub(super) limit: Option<devices::Limit>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Net {
    /// Its name: 1 to 64 of a-z, 0-9 and '-'.
    #[schemars(with = "String", regex(pattern = "^[a-z0-9-]{1,64}$"))]
    pub(super) id: Spanned<String>,
    /// Name of the tap device; made where there is none.
    #[schemars(with = "String", regex(pattern = "^[A-Za-z0-9_-]{1,15}$"))]
    pub(super) tap: Spanned<String>,
    /// Bridge that the tap is put on.
    #[schemars(with = "Option<String>")]
    pub(super) bridge: Option<Spanned<String>>,
    /// Its address, such as "52:54:00:00:00:01"; the guest sends from no other.
    #[schemars(
        with = "String",
        regex(pattern = "^[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}$")
    )]
    pub(super) mac: Spanned<String>,
    /// Pairs of a receive and a transmit queue, 1 to 8, of all cards together at most 16. The default is 1; one for each
    /// vCPU spares these each other's locks.
    #[schemars(with = "Option<u8>", range(min = 1, max = 8))]
    pub(super) queues: Option<Spanned<u8>>,
    /// IPv4 addresses that are announced after a move.
    #[serde(default)]
    #[schemars(length(max = 8))]
    pub(super) announce: Vec<Ipv4Addr>,
    /// How much the guest may send, and receive.
    pub(super) limit: Option<devices::Limit>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Vsock {
    /// The guest's context id.
    #[schemars(with = "u32", range(min = 3))]
    pub(super) cid: Spanned<u32>,
}

/// A number and "MiB" or "GiB".
#[derive(JsonSchema)]
#[schemars(transparent, inline)]
pub(super) struct Size(
    #[schemars(regex(pattern = "^[0-9]+ *(MiB|GiB)$"))]
    #[expect(dead_code, reason = "a shape")]
    String,
);

/// The JSON Schema of descriptions, from the very types by which they are read.
pub fn schema() -> schemars::Schema {
    schemars::schema_for!(Document)
}
