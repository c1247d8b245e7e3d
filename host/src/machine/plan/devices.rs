//! What a plan says of devices beyond disks, cards and sockets: limits, random numbers, balloon, console, watchdog.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How much of something a device may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Rate {
    /// Bytes or operations a second, at least 1.
    pub per_second: u64,
    /// What may pass at once after a rest, at least 1.
    pub burst: u64,
}

/// The limits of one device; what is absent is not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Limits {
    /// Bytes read and written, together.
    pub bytes: Option<Rate>,
    /// Requests of a disk, frames of a card.
    pub operations: Option<Rate>,
}

impl Limits {
    /// Whether every rate is one that means something.
    pub fn are_usable(&self) -> bool {
        let usable = |rate: &Rate| {
            (1..=MAX_RATE).contains(&rate.per_second) && (1..=MAX_RATE).contains(&rate.burst)
        };
        [self.bytes, self.operations].iter().flatten().all(usable)
    }
}

/// Devices of which a machine has at most one each, in PCI order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SmallDevices {
    /// A source of random numbers.
    pub rng: Option<RngPlan>,
    /// A balloon; only of a guest whose memory its host can take back.
    pub balloon: Option<BalloonPlan>,
    /// A virtio console, beside COM1.
    pub console: Option<ConsolePlan>,
    /// A watchdog.
    pub watchdog: Option<WatchdogPlan>,
}

impl SmallDevices {
    /// How many PCI functions they are.
    pub fn count(&self) -> usize {
        [
            self.rng.is_some(),
            self.balloon.is_some(),
            self.console.is_some(),
            self.watchdog.is_some(),
        ]
        .iter()
        .filter(|there| **there)
        .count()
    }
}

/// A source of random numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngPlan {
    /// Most bytes a second.
    pub bytes: Rate,
}

/// A balloon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonPlan {
    /// The guest tells which pages it does not use, and the host takes them back.
    pub free_page_reporting: bool,
    /// The guest may take pages out of the balloon rather than kill a process.
    pub deflate_on_oom: bool,
}

/// A virtio console.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ConsolePlan {
    /// Columns of the terminal, 0 if nobody knows.
    pub columns: u16,
    /// Its rows.
    pub rows: u16,
}

/// A watchdog.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchdogPlan {
    /// What happens when the guest does not feed it.
    pub action: WatchdogAction,
}

/// What a watchdog does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum WatchdogAction {
    /// The guest is stopped, as if it had reset itself, with the reason `watchdog`.
    Stop,
    /// The host is told, and the guest runs on.
    Report,
    /// The guest is paused as it is, for somebody to look at; it can be resumed.
    Pause,
}

/// Slots on the PCI bus into which devices can be put, and taken out of again, while the guest runs. Their number stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HotPlugPlan {
    /// How many, at most [`MAX_SLOTS`](super::MAX_SLOTS).
    pub slots: u8,
    /// Disks and cards of the plan that are in one.
    pub plugged: Vec<Plugged>,
}

/// What is in a slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plugged {
    /// Which slot, from 0.
    pub slot: u8,
    /// Which of the plan's disks or cards.
    pub device: DeviceName,
}

/// A device of a running guest, by its name in the plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceName {
    /// A disk.
    Disk(String),
    /// A network card.
    Net(String),
    /// The balloon.
    Balloon,
    /// The virtio console.
    Console,
}

/// A change to a device while its guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceChange {
    /// Disk, network card: new limits, in place of all that held.
    Limits(Limits),
    /// Disk: its image has another size now, which the guest is told.
    Resized,
    /// Balloon: so much memory the guest shall give back, in bytes.
    Balloon(u64),
    /// Console: the terminal's size.
    Terminal(ConsolePlan),
}

/// What a device says of itself when it has been changed or asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DeviceStatus {
    /// Disk: its size in bytes. Balloon: what it shall hold.
    pub size: u64,
    /// Balloon: what it holds, as the guest says.
    pub held: u64,
    /// Balloon: what the host has taken back in all, inflated or reported.
    pub returned: u64,
    /// Disk, network card: the limits that hold.
    pub limits: Limits,
}

/// Most bytes, or operations, a second: more is no limit.
pub const MAX_RATE: u64 = 1 << 40;
