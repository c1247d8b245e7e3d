//! What the VMM process is told to build: shapes only, no path, no key; everything it may use comes as a descriptor.

pub mod devices;

use std::net::Ipv4Addr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::devices::{DeviceChange, DeviceName, HotPlugPlan, Limits, Plugged, SmallDevices};
use crate::machine::cpu::CpuPlan;

/// The plan of one machine. The same at the source and, from the offer, at the destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachinePlan {
    /// The name, 1 to 64 characters of `[a-z0-9-]`.
    pub name: String,
    /// The identity that goes with the guest from host to host.
    pub vm_id: [u8; 16],
    /// Number of vCPUs, 1 to 64.
    pub vcpus: u8,
    /// The processor that each of them is.
    pub cpu: CpuPlan,
    /// Guest memory in bytes, a multiple of 2 MiB, at most 64 GiB; of a confidential guest 3 GiB (all below the PCI hole).
    pub memory_bytes: u64,
    /// Firmware that it starts in; without, its kernel is booted directly.
    pub firmware: Option<FirmwarePlan>,
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
    /// Devices of which there is at most one each, in PCI order behind vsock.
    pub small: SmallDevices,
    /// Slots for what is attached while it runs, behind all other functions, and what is in them.
    pub hotplug: HotPlugPlan,
}

impl MachinePlan {
    /// Whether a plan that came from a peer is one that this version builds; the error says what is wrong.
    pub fn check(&self) -> Result<(), String> {
        let rules = [
            (
                is_name(&self.name),
                "a name that is not 1 to 64 of a-z, 0-9 and '-'",
            ),
            (
                (1..=MAX_VCPUS).contains(&self.vcpus),
                "a number of vCPUs that is not 1 to 64",
            ),
            (
                self.cpu.check(self.vcpus),
                "sockets, cores and threads that do not make its vCPUs",
            ),
            (
                self.memory_bytes.is_multiple_of(2 << 20)
                    && (MIN_MEMORY..=MAX_MEMORY).contains(&self.memory_bytes),
                "a memory size that is not a multiple of 2 MiB from 64 MiB to 64 GiB",
            ),
            (
                self.technology == Technology::None || self.memory_bytes <= MAX_LOW_MEMORY,
                "more than 3 GiB of memory for a confidential guest",
            ),
            (
                self.firmware.is_none_or(|firmware| firmware.fits()),
                "firmware that is not a multiple of 2 MiB, at most 16 MiB",
            ),
            (
                self.firmware.is_none()
                    || self.technology == Technology::None
                    || self.technology.emulated(),
                FIRMWARE_OF_REAL,
            ),
            (
                self.cmdline.len() <= MAX_CMDLINE
                    && self.cmdline.bytes().all(|b| (0x20..0x7f).contains(&b)),
                "a command line that is not printable or is too long",
            ),
            (
                self.disks.len() <= MAX_DEVICES && self.nets.len() <= MAX_DEVICES,
                "more than 8 disks or network cards",
            ),
            (
                self.disks
                    .iter()
                    .all(|d| is_name(&d.id) && d.id.len() <= MAX_DISK_ID),
                "a disk whose name is not 1 to 20 of a-z, 0-9 and '-'",
            ),
            (
                self.disks
                    .iter()
                    .all(|d| d.io != DiskIo::IoUring || d.format == DiskFormat::Raw),
                "io_uring for an image that is not raw",
            ),
            (
                self.nets
                    .iter()
                    .all(|n| is_name(&n.id) && n.mac.first().is_some_and(|b| b & 1 == 0)),
                "a network card with an unusable name or a multicast address",
            ),
            (
                self.nets
                    .iter()
                    .all(|n| (1..=MAX_PAIRS).contains(&n.queues))
                    && self
                        .nets
                        .iter()
                        .map(|n| usize::from(n.queues))
                        .sum::<usize>()
                        <= MAX_PAIRS_OF_ALL,
                "network cards with no queue, more than 8 pairs of queues, or more than 16 together",
            ),
            (
                self.nets.iter().all(|n| n.announce.len() <= MAX_ANNOUNCE),
                "more than 8 addresses of a card",
            ),
            (
                self.vsock_cid
                    .is_none_or(|cid| (3..u32::MAX).contains(&cid)),
                "a vsock context id below 3",
            ),
            (
                self.disks.iter().all(|d| d.limits.are_usable())
                    && self.nets.iter().all(|n| n.limits.are_usable())
                    && self.small.rng.is_none_or(|rng| {
                        let bytes = Some(rng.bytes);
                        let limits = Limits {
                            bytes,
                            operations: None,
                        };
                        limits.are_usable()
                    }),
                "a limit that is not 1 to 2^40 a second, with a burst likewise",
            ),
            (
                self.small.balloon.is_none() || self.technology == Technology::None,
                "a balloon in a confidential guest, whose memory its host cannot take back",
            ),
            (
                self.hotplug.slots == 0 || self.technology == Technology::None,
                "slots for hot-plug in a confidential guest",
            ),
            (
                self.hotplug_fits(),
                "more than 8 slots for hot-plug, or devices that are not in them one by one",
            ),
        ];
        match rules.iter().find(|(kept, _)| !kept) {
            Some((_, problem)) => Err(format!("has {problem}")),
            None => Ok(()),
        }
    }

    /// A device was changed: the plan is what the machine is now.
    pub fn note_change(&mut self, name: &DeviceName, change: &DeviceChange) {
        match (name, change) {
            (DeviceName::Disk(id), DeviceChange::Limits(limits)) => {
                let disks = self.disks.iter_mut().filter(|d| d.id == *id);
                disks.for_each(|d| d.limits = *limits);
            }
            (DeviceName::Net(id), DeviceChange::Limits(limits)) => {
                let nets = self.nets.iter_mut().filter(|n| n.id == *id);
                nets.for_each(|n| n.limits = *limits);
            }
            (DeviceName::Console, DeviceChange::Terminal(size)) => {
                self.small.console = self.small.console.map(|_| *size);
            }
            // Size and balloon are state, not plan.
            _ => {}
        }
    }

    /// The limits of a device; none of one that has none.
    pub fn limits_of(&self, name: &DeviceName) -> Limits {
        let found = match name {
            DeviceName::Disk(id) => self.disks.iter().find(|d| d.id == *id).map(|d| d.limits),
            DeviceName::Net(id) => self.nets.iter().find(|n| n.id == *id).map(|n| n.limits),
            DeviceName::Balloon | DeviceName::Console => None,
        };
        found.unwrap_or_default()
    }

    /// Bytes of all that is mapped into the guest, firmware's place with its memory.
    pub fn mapped_bytes(&self) -> u64 {
        let rom = self.firmware.map_or(0, |firmware| firmware.rom_bytes);
        self.memory_bytes.saturating_add(rom)
    }

    /// How much of its memory lies below 4 GiB. Firmware puts the ECAM ranges of all buses there too, Debian 12's from
    /// 2.75 GiB on.
    pub fn low_memory(&self) -> u64 {
        let most = match self.firmware {
            Some(_) => MAX_LOW_MEMORY_OF_FIRMWARE,
            None => MAX_LOW_MEMORY,
        };
        self.memory_bytes.min(most)
    }

    /// How many disks want an io_uring.
    pub fn rings(&self) -> u64 {
        let wants = |disk: &&DiskPlan| disk.io != DiskIo::Threads && disk.format == DiskFormat::Raw;
        self.disks.iter().filter(wants).count() as u64
    }

    /// How many PCI functions the machine has, without the host bridge; a slot for hot-plug is one, also while it is
    /// empty.
    pub fn functions(&self) -> usize {
        self.fixed_functions() + usize::from(self.small.watchdog.is_some()) + self.slots()
    }

    /// How many virtio functions it has beside its slots.
    pub fn fixed_functions(&self) -> usize {
        (self.disks.len() + self.nets.len()).saturating_sub(self.hotplug.plugged.len())
            + usize::from(self.vsock_cid.is_some())
            + self.small.count()
            - usize::from(self.small.watchdog.is_some())
    }

    /// Number of the first slot's device on the PCI bus: behind the host bridge and all other functions.
    pub fn first_slot(&self) -> u8 {
        let behind = 1 + self.functions() - self.slots();
        u8::try_from(behind).unwrap_or(u8::MAX)
    }

    /// In which slot a device is that was attached.
    pub fn slot_of(&self, name: &DeviceName) -> Option<u8> {
        let mut plugged = self.hotplug.plugged.iter();
        plugged.find(|one| one.device == *name).map(|one| one.slot)
    }

    /// The slot of each disk, then of each card, in the plan's order; none of those that were there from the start.
    pub fn slots_in_order(&self) -> Vec<Option<u8>> {
        let disks = self.disks.iter().map(|d| DeviceName::Disk(d.id.clone()));
        let nets = self.nets.iter().map(|n| DeviceName::Net(n.id.clone()));
        disks.chain(nets).map(|name| self.slot_of(&name)).collect()
    }

    /// The first slot in which there is nothing.
    pub fn free_slot(&self) -> Option<u8> {
        let taken = |slot: &u8| self.hotplug.plugged.iter().any(|one| one.slot == *slot);
        (0..self.hotplug.slots).find(|slot| !taken(slot))
    }

    /// Puts a device into a slot, behind all disks or cards; false if there is one of its name.
    pub fn plug(&mut self, slot: u8, attachment: Attachment) -> bool {
        let device = attachment.name();
        if self.function_of(&device).is_some() {
            return false;
        }
        match attachment {
            Attachment::Disk(disk) => self.disks.push(disk),
            Attachment::Net(net) => self.nets.push(net),
        }
        self.hotplug.plugged.push(Plugged { slot, device });
        true
    }

    /// Takes out what is in a slot, and says where it stood among the disks, or the cards.
    pub fn unplug(&mut self, name: &DeviceName) -> Option<usize> {
        let place = self
            .hotplug
            .plugged
            .iter()
            .position(|one| one.device == *name)?;
        let stood = match name {
            DeviceName::Disk(id) => self.disks.iter().position(|d| d.id == *id),
            DeviceName::Net(id) => self.nets.iter().position(|n| n.id == *id),
            DeviceName::Balloon | DeviceName::Console => None,
        }?;
        match name {
            DeviceName::Disk(_) => drop(self.disks.remove(stood)),
            _ => drop(self.nets.remove(stood)),
        }
        self.hotplug.plugged.remove(place);
        Some(stood)
    }

    fn slots(&self) -> usize {
        self.hotplug.slots.into()
    }

    fn hotplug_fits(&self) -> bool {
        let plugged = &self.hotplug.plugged;
        let there = |name: &DeviceName| match name {
            DeviceName::Disk(id) => self.disks.iter().any(|d| d.id == *id),
            DeviceName::Net(id) => self.nets.iter().any(|n| n.id == *id),
            DeviceName::Balloon | DeviceName::Console => false,
        };
        let alone = plugged.iter().enumerate().all(|(index, one)| {
            let others = plugged.iter().skip(index + 1);
            one.slot < self.hotplug.slots
                && there(&one.device)
                && others
                    .clone()
                    .all(|other| other.slot != one.slot && other.device != one.device)
        });
        self.hotplug.slots <= MAX_SLOTS && alone
    }

    /// Which virtio function a device is: those that were there from the start in PCI order, then the slots.
    pub fn function_of(&self, name: &DeviceName) -> Option<usize> {
        if let Some(slot) = self.slot_of(name) {
            return Some(self.fixed_functions() + usize::from(slot));
        }
        let slots = self.slots_in_order();
        let fixed = |from: usize, count: usize| {
            let of_kind = slots.iter().skip(from).take(count);
            of_kind.filter(|slot| slot.is_none()).count()
        };
        let (disks, cards) = (self.disks.len(), self.nets.len());
        let nets = fixed(0, disks);
        let rng = nets + fixed(disks, cards) + usize::from(self.vsock_cid.is_some());
        let balloon = rng + usize::from(self.small.rng.is_some());
        let console = balloon + usize::from(self.small.balloon.is_some());
        match name {
            DeviceName::Disk(id) => {
                let at = self.disks.iter().position(|d| d.id == *id)?;
                Some(fixed(0, at))
            }
            DeviceName::Net(id) => {
                let at = self.nets.iter().position(|n| n.id == *id)?;
                Some(nets + fixed(disks, at))
            }
            DeviceName::Balloon => self.small.balloon.map(|_| balloon),
            DeviceName::Console => self.small.console.map(|_| console),
        }
    }
}

/// Whether a name is 1 to 64 characters of `[a-z0-9-]`, not beginning with a hyphen.
pub fn is_name(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && !name.starts_with('-')
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

/// Firmware of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FirmwarePlan {
    /// Room for the image in front of 4 GiB, in bytes: a multiple of [`FIRMWARE_UNIT`].
    pub rom_bytes: u64,
}

impl FirmwarePlan {
    /// Room for an image of `length` bytes, if there is so much.
    pub fn for_image(length: u64) -> Option<Self> {
        let plan = Self {
            rom_bytes: length.checked_next_multiple_of(FIRMWARE_UNIT)?,
        };
        plan.fits().then_some(plan)
    }

    fn fits(self) -> bool {
        (FIRMWARE_UNIT..=MAX_FIRMWARE).contains(&self.rom_bytes)
            && self.rom_bytes.is_multiple_of(FIRMWARE_UNIT)
    }
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
    /// AMD SEV-ES: the policy has bit 2.
    SevEs {
        /// As for SEV.
        emulated: bool,
        /// As for SEV.
        policy: u32,
    },
    /// AMD SEV-SNP.
    SevSnp {
        /// As for SEV.
        emulated: bool,
        /// Guest policy, 64 bit (SNP firmware ABI, publication 56860, section 4.3).
        policy: u64,
    },
}

impl Technology {
    /// As descriptions and policies write it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Sev { .. } => "sev",
            Self::SevEs { .. } => "sev-es",
            Self::SevSnp { .. } => "sev-snp",
        }
    }

    /// Whether the software secure processor stands in for AMD's.
    pub fn emulated(&self) -> bool {
        match self {
            Self::None => false,
            Self::Sev { emulated, .. }
            | Self::SevEs { emulated, .. }
            | Self::SevSnp { emulated, .. } => *emulated,
        }
    }

    /// The guest policy given to the firmware; 0 for a plain guest.
    pub fn policy_bits(&self) -> u64 {
        match self {
            Self::None => 0,
            Self::Sev { policy, .. } | Self::SevEs { policy, .. } => (*policy).into(),
            Self::SevSnp { policy, .. } => *policy,
        }
    }

    /// Whether the vCPUs' first registers are measured.
    pub fn measures_registers(&self) -> bool {
        matches!(self, Self::SevEs { .. } | Self::SevSnp { .. })
    }

    /// The same in the policy's words.
    pub fn in_policy(&self) -> casemate_policy::Technology {
        use casemate_policy::Technology as Policy;
        match self {
            Self::None => Policy::None,
            Self::Sev { .. } => Policy::Sev,
            Self::SevEs { .. } => Policy::SevEs,
            Self::SevSnp { .. } => Policy::SevSnp,
        }
    }
}

/// One virtio disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskPlan {
    /// Name of the disk in the description; also its virtio serial; at most 20 bytes.
    pub id: String,
    /// What its image is. Said, never guessed.
    pub format: DiskFormat,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Who does its requests.
    pub io: DiskIo,
    /// How much it may read and write.
    pub limits: Limits,
}

/// Who does a disk's requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DiskIo {
    /// A raw image's reads and flushes by the kernel's ring, where there is one, and its writes by the devices' thread.
    #[default]
    #[serde(rename = "auto")]
    Auto,
    /// All by the kernel's ring, which can do nothing else. A host without io_uring refuses the guest.
    #[serde(rename = "io_uring")]
    IoUring,
    /// The devices' thread, one at a time.
    #[serde(rename = "threads")]
    Threads,
}

/// A device that is put into a slot while the guest runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Attachment {
    /// A disk.
    Disk(DiskPlan),
    /// A network card.
    Net(NetPlan),
}

impl Attachment {
    /// Its name.
    pub fn name(&self) -> DeviceName {
        match self {
            Self::Disk(disk) => DeviceName::Disk(disk.id.clone()),
            Self::Net(net) => DeviceName::Net(net.id.clone()),
        }
    }
}

/// What a disk's image is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DiskFormat {
    /// The disk's bytes.
    #[default]
    Raw,
    /// QEMU's.
    Qcow2,
}

/// One virtio network card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetPlan {
    /// Name of the card in the description.
    pub id: String,
    /// MAC address.
    pub mac: [u8; 6],
    /// Pairs of a receive and a transmit queue: 1 to [`MAX_PAIRS`].
    pub queues: u8,
    /// Addresses announced by gratuitous ARP after a move (RARP for the MAC is always sent).
    pub announce: Vec<Ipv4Addr>,
    /// How much it may send and receive.
    pub limits: Limits,
}

/// Most vCPUs.
pub const MAX_VCPUS: u8 = 64;
/// Least memory in bytes.
pub const MIN_MEMORY: u64 = 64 << 20;
/// Most memory in bytes: its dirty log fits the exchange memory, its addresses every processor's.
pub const MAX_MEMORY: u64 = 64 << 30;
/// Most memory below 4 GiB in bytes, and most of a confidential guest.
pub const MAX_LOW_MEMORY: u64 = 3 << 30;
/// Most memory below 4 GiB of a guest with firmware, in bytes.
pub const MAX_LOW_MEMORY_OF_FIRMWARE: u64 = 2 << 30;
/// The unit of firmware's place in memory, in bytes.
pub const FIRMWARE_UNIT: u64 = 2 << 20;
/// Most firmware in bytes.
pub const MAX_FIRMWARE: u64 = 16 << 20;
/// Why no real one has it: what [`MachinePlan::check`] and all others say.
pub const FIRMWARE_OF_REAL: &str = "firmware in a guest of AMD's own processor, where its launch has not been shown: it lies \
    in memory that the guest can only read, which KVM refuses SEV-ES and SEV-SNP guests";
/// Longest command line in bytes.
pub const MAX_CMDLINE: usize = 1600;
/// Longest disk name: a virtio serial has 20 bytes.
pub const MAX_DISK_ID: usize = 20;
/// Most disks and most network cards.
pub const MAX_DEVICES: usize = 8;
/// Most pairs of queues of a card.
pub const MAX_PAIRS: u8 = 8;
/// Most pairs of queues of all cards together: each is a descriptor, three events and two interrupts.
pub const MAX_PAIRS_OF_ALL: usize = 16;
/// Most slots for hot-plug.
pub const MAX_SLOTS: u8 = 8;
/// Slots of a plain guest whose description does not say.
pub const DEFAULT_SLOTS: u8 = 4;
/// Most announced addresses of a card.
pub const MAX_ANNOUNCE: usize = 8;

#[cfg(test)]
mod tests {
    use super::devices::{BalloonPlan, ConsolePlan, Rate, RngPlan};
    use super::*;
    use crate::machine::cpu::Topology;

    fn plan() -> MachinePlan {
        MachinePlan {
            name: "vault".into(),
            vm_id: [1; 16],
            vcpus: 2,
            cpu: Default::default(),
            memory_bytes: 512 << 20,
            firmware: None,
            cmdline: "console=ttyS0".into(),
            technology: Technology::None,
            disks: vec![DiskPlan {
                id: "data".into(),
                format: DiskFormat::Raw,
                io: Default::default(),
                read_only: false,
                limits: Limits::default(),
            }],
            nets: vec![NetPlan {
                id: "net0".into(),
                mac: [0x52, 0, 0, 0, 0, 1],
                queues: 1,
                announce: vec![],
                limits: Limits::default(),
            }],
            vsock_cid: Some(3),
            small: Default::default(),
            hotplug: Default::default(),
        }
    }

    fn plugged(plan: &mut MachinePlan, slots: u8, disks: &[(u8, &str)]) {
        plan.hotplug.slots = slots;
        let plugged = disks.iter().map(|(slot, id)| Plugged {
            slot: *slot,
            device: DeviceName::Disk((*id).into()),
        });
        plan.hotplug.plugged = plugged.collect();
    }

    #[test]
    fn devices_are_found_by_their_names_in_pci_order() {
        let mut plan = plan();
        let net = DeviceName::Net("net0".into());
        assert_eq!(plan.function_of(&DeviceName::Disk("data".into())), Some(0));
        assert_eq!(plan.function_of(&net), Some(1));
        assert_eq!(plan.function_of(&DeviceName::Disk("net0".into())), None);
        assert_eq!(plan.function_of(&DeviceName::Balloon), None);
        let bytes = Rate {
            per_second: 1,
            burst: 1,
        };
        plan.small.rng = Some(RngPlan { bytes });
        plan.small.balloon = Some(BalloonPlan::default());
        plan.small.console = Some(ConsolePlan::default());
        assert_eq!(plan.function_of(&DeviceName::Balloon), Some(4));
        assert_eq!(plan.function_of(&DeviceName::Console), Some(5));
        assert_eq!(plan.functions(), 6);
    }

    #[test]
    fn what_is_attached_is_behind_all_others_and_moves_nobody() {
        let mut plan = plan();
        plan.hotplug.slots = 4;
        plan.small.console = Some(ConsolePlan::default());
        assert_eq!((plan.functions(), plan.first_slot()), (8, 5));
        let disk = |id: &str| {
            let mut disk = plan.disks[0].clone();
            disk.id = id.into();
            Attachment::Disk(disk)
        };
        let (a, b) = (disk("a"), disk("b"));
        let mut net = plan.nets[0].clone();
        net.id = "n".into();
        let mut now = plan.clone();
        assert!(
            now.plug(0, a.clone()) && now.plug(1, Attachment::Net(net)) && now.plug(3, b.clone())
        );
        assert!(!now.plug(2, a.clone()), "the name is taken");
        assert_eq!(now.check(), Ok(()));
        assert_eq!(
            (now.functions(), now.first_slot(), now.free_slot()),
            (8, 5, Some(2))
        );
        let net0 = DeviceName::Net("net0".into());
        for (name, function) in [
            (DeviceName::Disk("data".into()), 0),
            (net0.clone(), 1),
            (DeviceName::Console, 3),
            (a.name(), 4),
            (DeviceName::Net("n".into()), 5),
            (b.name(), 7),
        ] {
            assert_eq!(now.function_of(&name), Some(function), "{name:?}");
        }
        assert_eq!(
            now.slots_in_order(),
            [None, Some(0), Some(3), None, Some(1)]
        );
        assert_eq!((now.unplug(&net0), now.slot_of(&net0)), (None, None));
        assert_eq!(now.unplug(&a.name()), Some(1));
        assert_eq!(now.unplug(&DeviceName::Net("n".into())), Some(1));
        assert_eq!(now.unplug(&b.name()), Some(1));
        assert_eq!(now, plan);
    }

    #[test]
    fn what_a_peer_may_not_ask_for_is_refused() {
        plan().check().unwrap();
        type Spoil = fn(&mut MachinePlan);
        let spoil: [(&str, Spoil); 24] = [
            ("hot-plug", |p| p.hotplug.slots = 9),
            ("hot-plug", |p| plugged(p, 1, &[(0, "nobody")])),
            ("hot-plug", |p| plugged(p, 1, &[(1, "data")])),
            ("hot-plug", |p| plugged(p, 4, &[(0, "data"), (1, "data")])),
            ("hot-plug", |p| {
                p.disks.push(DiskPlan {
                    id: "b".into(),
                    ..p.disks[0].clone()
                });
                plugged(p, 4, &[(2, "data"), (2, "b")]);
            }),
            ("hot-plug in a confidential", |p| {
                p.hotplug.slots = 1;
                p.technology = Technology::Sev {
                    emulated: true,
                    policy: 1,
                };
            }),
            ("name", |p| p.name = "../vault".into()),
            ("vCPUs", |p| p.vcpus = 65),
            ("threads", |p| {
                p.cpu.topology = Some(Topology {
                    sockets: 1,
                    cores: 3,
                    threads: 1,
                });
            }),
            ("memory", |p| p.memory_bytes = 1 << 40),
            ("confidential", |p| {
                p.technology = Technology::Sev {
                    emulated: true,
                    policy: 1,
                };
                p.memory_bytes = 4 << 30;
            }),
            ("2 MiB, at most 16", |p| {
                p.firmware = Some(FirmwarePlan { rom_bytes: 1 << 20 });
            }),
            ("firmware in a guest of AMD's own", |p| {
                p.firmware = FirmwarePlan::for_image(1);
                p.technology = Technology::Sev {
                    emulated: false,
                    policy: 1,
                };
            }),
            ("command line", |p| p.cmdline = "a\nb".into()),
            ("disk whose name", |p| p.disks[0].id = String::new()),
            ("multicast", |p| p.nets[0].mac = [1; 6]),
            ("no queue", |p| p.nets[0].queues = 0),
            ("more than 8 pairs", |p| p.nets[0].queues = 9),
            ("more than 16 together", |p| {
                let card = |n: u8| NetPlan {
                    queues: 6,
                    id: format!("n{n}"),
                    ..p.nets[0].clone()
                };
                p.nets = (0..3).map(card).collect();
            }),
            ("more than 8 disks", |p| {
                p.nets[0].queues = 8;
                p.nets = vec![p.nets[0].clone(); 1000];
            }),
            ("more than 8 disks", |p| {
                p.disks = vec![p.disks[0].clone(); 9]
            }),
            ("vsock", |p| p.vsock_cid = Some(2)),
            ("limit", |p| {
                let rate = Rate {
                    per_second: 0,
                    burst: 1,
                };
                p.disks[0].limits.bytes = Some(rate);
            }),
            ("balloon", |p| {
                p.small.balloon = Some(BalloonPlan::default());
                p.technology = Technology::Sev {
                    emulated: true,
                    policy: 1,
                };
            }),
        ];
        for (words, spoil) in spoil {
            let mut bad = plan();
            spoil(&mut bad);
            let error = bad.check().unwrap_err();
            assert!(error.contains(words), "{words}: {error}");
        }
    }
}
