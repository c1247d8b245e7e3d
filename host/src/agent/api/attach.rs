//! What can be attached to a guest, and what is.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{DeviceName, Limits};
use crate::machine::plan::DiskFormat;

/// A device to be attached.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Attach {
    /// A disk.
    Disk(DiskAttach),
    /// A network card.
    Net(NetAttach),
}

/// A disk to be attached.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskAttach {
    /// Its name: 1 to 20 of a-z, 0-9 and '-'. The guest reads it as the disk's serial number.
    pub id: String,
    /// Absolute path of its image, or a block device.
    pub path: PathBuf,
    /// What the image is; never guessed from its content.
    #[serde(default)]
    pub format: DiskFormat,
    /// Whether the guest may not write.
    #[serde(default)]
    pub read_only: bool,
    /// How much the guest may read and write.
    #[serde(default)]
    pub limits: Limits,
}

/// A network card to be attached.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NetAttach {
    /// Its name: 1 to 64 of a-z, 0-9 and '-'.
    pub id: String,
    /// Name of the tap device, made where there is none; by default one that is made.
    #[serde(default)]
    pub tap: Option<String>,
    /// Bridge that the tap is put on.
    #[serde(default)]
    pub bridge: Option<String>,
    /// Its address; by default one under 52:54:00.
    #[serde(default)]
    pub mac: Option<String>,
    /// IPv4 addresses that are announced after a move.
    #[serde(default)]
    pub announce: Vec<Ipv4Addr>,
    /// How much the guest may send, and receive.
    #[serde(default)]
    pub limits: Limits,
}

/// A device that was attached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AttachedInfo {
    /// In which of the guest's slots, from 0.
    pub slot: u8,
    /// Which.
    pub device: DeviceName,
    /// Its image, or its tap.
    pub source: String,
}
