//! Devices of guests: what they say of themselves, and how they are changed.

use casemate_policy::ledger::{Entry, Outcome};

use crate::agent::api::{Answer, DeviceChange, DeviceName, Failure};
use crate::agent::authority::Caller;
use crate::agent::vmm_process::lock;
use crate::agent::{Agent, plug};
use crate::vmm::protocol::{VmmReply, VmmRequest};

impl Agent {
    /// `casemate vm resize`.
    pub(super) fn device(
        &self,
        caller: &Caller,
        name: &str,
        device: &DeviceName,
        change: Option<DeviceChange>,
    ) -> Result<Answer, Failure> {
        let guest = self.settled_guest(name)?;
        if change.is_some() {
            self.must_own(name)?;
        }
        if let Some(DeviceChange::Limits(limits)) = &change
            && !limits.are_usable()
        {
            let text = "a limit is 1 to 2^40 a second, with a burst likewise";
            return Err(Failure::new("BAD_REQUEST", text));
        }
        // What the VMM knows of a device and what we do are never apart for who takes it along.
        let mover = change.is_some().then(|| lock(&guest.mover));
        if mover.as_ref().is_some_and(|mover| mover.is_some()) {
            return Err(plug::moving(name));
        }
        let request = VmmRequest::Device {
            device: device.clone(),
            change,
        };
        let VmmReply::Device(status) = guest.vmm.call(&request, &[])? else {
            return Err(Failure::new("VMM_GONE", "the VMM answered something else"));
        };
        if let Some(change) = change {
            // A move and a snapshot take it along.
            lock(&guest.changed).note_change(device, &change);
            drop(mover);
            let what = serde_json::json!({ "device": device, "change": change });
            let entry = Entry::new(caller.name(), "resize", name, Outcome::Done)
                .emulated(guest.plan.technology.emulated())
                .with("what", what.to_string());
            self.evidence.record(entry)?;
        }
        Ok(Answer::Device(status))
    }
}
