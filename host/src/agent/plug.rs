//! Disks and network cards that are put into a guest while it runs, and taken out again. The agent opens what the policy
//! has let through, and hands the VMM an open descriptor; the VMM never hears a name.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use casemate_policy::ledger::{Entry, Outcome};

use crate::agent::Agent;
use crate::agent::api::{Answer, Attach, DeviceName, DiskAttach, Failure, NetAttach};
use crate::agent::authority::Caller;
use crate::agent::guest::{Guest, TapChoice};
use crate::agent::launch::random_id;
use crate::agent::vmm_process::lock;
use crate::agent::{files, tap};
use crate::machine::plan::{Attachment, DiskIo, DiskPlan, MAX_DISK_ID, NetPlan, is_name};
use crate::machine::spec::{is_interface, parse_mac};
use crate::vmm::protocol::{HandleKind, VmmRequest};

/// A device of this host, opened.
struct Opened {
    attachment: Attachment,
    descriptor: OwnedFd,
    resource: Resource,
}

/// What it is on this host.
enum Resource {
    Image(PathBuf),
    Tap(TapChoice),
}

impl Agent {
    /// `casemate vm attach`.
    pub(super) fn attach(
        &self,
        caller: &Caller,
        name: &str,
        device: Attach,
    ) -> Result<Answer, Failure> {
        let guest = self.guest(name)?;
        self.must_own(name)?;
        // Held to the end: no mover learns what the guest is between the VMM's knowing and ours.
        let mover = lock(&guest.mover);
        if mover.is_some() {
            return Err(moving(name));
        }
        let what = serde_json::json!(device).to_string();
        let opened = self.open_device(device)?;
        let mut plan = guest.plan_now();
        let slot = plan.free_slot().ok_or_else(|| no_slot(&guest))?;
        if !plan.plug(slot, opened.attachment.clone()) {
            let text = format!(
                "{name} has a device {:?} already; choose another name",
                opened.attachment.name()
            );
            return Err(Failure::new("DEVICE_EXISTS", text));
        }
        plan.check()
            .map_err(|e| Failure::new("BAD_REQUEST", format!("{name} then {e}")))?;
        let request = VmmRequest::Attach {
            attachment: opened.attachment,
        };
        guest.vmm.call(&request, &[opened.descriptor.as_fd()])?;
        {
            let mut local = lock(&guest.local);
            let number = |count: usize| u8::try_from(count).unwrap_or(u8::MAX);
            let kind = match opened.resource {
                Resource::Image(path) => {
                    local.disks.push(path);
                    HandleKind::Disk(number(local.disks.len() - 1))
                }
                Resource::Tap(choice) => {
                    local.taps.push(choice);
                    HandleKind::Tap {
                        card: number(local.taps.len() - 1),
                        pair: 0,
                    }
                }
            };
            guest.vmm.hold(kind, opened.descriptor);
        }
        *lock(&guest.changed) = plan;
        drop(mover);
        let entry = Entry::new(caller.name(), "attach", name, Outcome::Done)
            .with("slot", u32::from(slot))
            .with("what", what);
        self.evidence.record(entry)?;
        Ok(Answer::Guest(guest.info()?))
    }

    /// `casemate vm detach`: the guest is asked to let go, and has some time. What it keeps is as it was.
    pub(super) fn detach(
        &self,
        caller: &Caller,
        name: &str,
        device: &DeviceName,
        timeout_s: Option<u32>,
    ) -> Result<Answer, Failure> {
        let guest = self.guest(name)?;
        self.must_own(name)?;
        let detaching = {
            let mover = lock(&guest.mover);
            if mover.is_some() {
                return Err(moving(name));
            }
            Detaching::of(&guest)?
        };
        let given = timeout_s.unwrap_or(DEFAULT_TIMEOUT_S).min(MAX_TIMEOUT_S);
        let ask = VmmRequest::AskBack {
            device: device.clone(),
        };
        guest.vmm.call(&ask, &[])?;
        if !wait_until_gone(&guest, device, Duration::from_secs(given.into()))? {
            let text = format!(
                "{name} has not let go of {device:?} within {given} s, and keeps it; is it mounted, or in use, or does \
                 the guest's kernel lack ACPI hot-plug (CONFIG_HOTPLUG_PCI_ACPI)? Ask again with a longer --timeout"
            );
            return Err(Failure::new("STILL_ATTACHED", text));
        }
        let stood = lock(&guest.changed).unplug(device);
        if let Some(stood) = stood {
            let mut local = lock(&guest.local);
            let number = u8::try_from(stood).unwrap_or(u8::MAX);
            guest.vmm.let_go(match device {
                DeviceName::Disk(_) => HandleKind::Disk(number),
                _ => HandleKind::Tap {
                    card: number,
                    pair: 0,
                },
            });
            match device {
                DeviceName::Disk(_) if stood < local.disks.len() => {
                    local.disks.remove(stood);
                }
                DeviceName::Net(_) if stood < local.taps.len() => {
                    local.taps.remove(stood);
                }
                _ => {}
            }
        }
        drop(detaching);
        let entry = Entry::new(caller.name(), "detach", name, Outcome::Done);
        self.evidence
            .record(entry.with("what", serde_json::json!(device).to_string()))?;
        Ok(Answer::Guest(guest.info()?))
    }

    fn open_device(&self, device: Attach) -> Result<Opened, Failure> {
        match device {
            Attach::Disk(disk) => open_disk(disk),
            Attach::Net(net) => self.open_card(net),
        }
    }

    fn open_card(&self, net: NetAttach) -> Result<Opened, Failure> {
        let interfaces = net.tap.iter().chain(&net.bridge);
        if !is_name(&net.id) || !interfaces.clone().all(|name| is_interface(name)) {
            let text = "a card wants an `id` of 1 to 64 of a-z, 0-9 and '-', a tap and a bridge of 1 to 15 of a-z, \
                        A-Z, 0-9, '-' and '_'";
            return Err(Failure::new("BAD_REQUEST", text));
        }
        let mac = match &net.mac {
            Some(text) => parse_mac(text).filter(|mac| mac[0] & 1 == 0),
            None => Some(own_mac()?),
        };
        let mac = mac.ok_or_else(|| {
            let text = "`mac` wants a unicast address such as 52:54:00:12:34:56";
            Failure::new("BAD_REQUEST", text)
        })?;
        let choice = TapChoice {
            tap: net.tap.unwrap_or_else(|| self.fresh_tap()),
            bridge: net.bridge,
        };
        let descriptor = tap::open(&choice.tap, choice.bridge.as_deref())
            .map_err(|e| Failure::new("TAP", e.to_string()))?;
        Ok(Opened {
            attachment: Attachment::Net(NetPlan {
                id: net.id,
                mac,
                queues: 1,
                announce: net.announce,
                limits: net.limits,
            }),
            descriptor,
            resource: Resource::Tap(choice),
        })
    }
}

fn open_disk(disk: DiskAttach) -> Result<Opened, Failure> {
    if !is_name(&disk.id) || disk.id.len() > MAX_DISK_ID {
        let text = format!("a disk's `id` is 1 to {MAX_DISK_ID} of a-z, 0-9 and '-'");
        return Err(Failure::new("BAD_REQUEST", text));
    }
    let file = files::open(&disk.path, !disk.read_only).map_err(|e| {
        let text = format!("{} cannot be used: {e}", disk.path.display());
        Failure::new("RESOURCE", text)
    })?;
    Ok(Opened {
        attachment: Attachment::Disk(DiskPlan {
            id: disk.id,
            format: disk.format,
            read_only: disk.read_only,
            // A ring is made before the VMM has its filter.
            io: DiskIo::Threads,
            limits: disk.limits,
        }),
        descriptor: file.into(),
        resource: Resource::Image(disk.path),
    })
}

/// An address under the prefix that KVM's guests have, the rest at random.
fn own_mac() -> Result<[u8; 6], Failure> {
    let [a, b, c, ..] = random_id()?;
    Ok([0x52, 0x54, 0, a, b, c])
}

/// Whether the guest has let go by then. If not, it has been told that it may keep it.
fn wait_until_gone(guest: &Guest, device: &DeviceName, time: Duration) -> Result<bool, Failure> {
    let there = |request: &VmmRequest| match guest.vmm.call(request, &[]) {
        Ok(_) => Ok(true),
        Err(failure) if failure.code == "NO_SUCH_DEVICE" => Ok(false),
        Err(failure) => Err(failure),
    };
    let look = VmmRequest::Device {
        device: device.clone(),
        change: None,
    };
    let limit = Instant::now() + time;
    while there(&look)? {
        if Instant::now() >= limit {
            let keep = VmmRequest::Keep {
                device: device.clone(),
            };
            return Ok(!there(&keep)?);
        }
        std::thread::sleep(BETWEEN);
    }
    Ok(true)
}

/// That a guest is being asked for a device: no move begins meanwhile.
struct Detaching<'a>(&'a Guest);

impl<'a> Detaching<'a> {
    fn of(guest: &'a Guest) -> Result<Self, Failure> {
        match guest.detaching.swap(true, Ordering::SeqCst) {
            true => Err(detaching(&guest.plan.name)),
            false => Ok(Self(guest)),
        }
    }
}

impl Drop for Detaching<'_> {
    fn drop(&mut self) {
        self.0.detaching.store(false, Ordering::SeqCst);
    }
}

/// What is refused while a guest is asked for a device.
pub(super) fn detaching(name: &str) -> Failure {
    let text = format!("{name} is being asked to let go of a device; wait for that, and ask again");
    Failure::new("DETACHING", text)
}

pub(super) fn moving(name: &str) -> Failure {
    let text = format!("{name} is being moved or snapshot; wait for that, or cancel it first");
    Failure::new("ALREADY_MOVING", text)
}

fn no_slot(guest: &Guest) -> Failure {
    let (name, slots) = (&guest.plan.name, guest.plan.hotplug.slots);
    let text = format!(
        "none of the {slots} slots of {name} is free; detach something, or give it more (`[hotplug] slots`, up to 8, \
         read at its next start)"
    );
    Failure::new("NO_FREE_SLOT", text)
}

const DEFAULT_TIMEOUT_S: u32 = 15;
const MAX_TIMEOUT_S: u32 = 60 * 60;
const BETWEEN: Duration = Duration::from_millis(50);
