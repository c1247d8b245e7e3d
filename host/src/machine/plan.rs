//! What the VMM process is told to build: shapes only, no path, no key; everything it may use comes as a descriptor.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

/// The plan of one machine. The same at the source and, from the offer, at the destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachinePlan {
    /// The name, 1 to 64 characters of `[a-z0-9-]`.
    pub name: String,
    /// The identity that goes with the guest from host to host.
    pub vm_id: [u8; 16],
    /// Number of vCPUs, 1 to 64.
    pub vcpus: u8,
    /// Guest memory in bytes, a multiple of 2 MiB, at most 3 GiB (all below the PCI hole) for now.
    pub memory_bytes: u64,
    /// Kernel command line, without what the VMM appends.
    pub cmdline: String,
    /// Confidential technology.
    pub technology: Technology,
    /// Disks, in PCI order.
    pub disks: Vec<DiskPlan>,
    /// Network cards, in PCI order behind the disks.
    pub nets: Vec<NetPlan>,
    /// Guest context id of virtio-vsock, if there is one; at least 3.
    pub vsock_cid: Option<u32>,
}

/// Confidential technology of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Technology {
    /// A plain guest.
    None,
    /// AMD SEV.
    Sev {
        /// Whether the software secure processor stands in for AMD's.
        emulated: bool,
        /// Guest policy, 32 bit (SEV API, chapter 3).
        policy: u32,
    },
}

/// One virtio disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskPlan {
    /// Name of the disk in the description; also its virtio serial; at most 20 bytes.
    pub id: String,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// One virtio network card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetPlan {
    /// Name of the card in the description.
    pub id: String,
    /// MAC address.
    pub mac: [u8; 6],
    /// Addresses announced by gratuitous ARP after a move (RARP for the MAC is always sent).
    pub announce: Vec<Ipv4Addr>,
}
