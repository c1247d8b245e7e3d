//! Launching a guest from its description.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use casemate_policy::ledger::{Entry, Outcome};
use casemate_policy::{Action, Technology as PolicyTechnology};

use crate::agent::Agent;
use crate::agent::api::{Answer, Failure, MeasurementInfo, SessionText};
use crate::agent::authority::Caller;
use crate::agent::guest::{Guest, Resources, TapChoice};
use crate::agent::record::{Ownership, OwnershipState};
use crate::agent::vmm_process::lock;
use crate::machine::plan::{MachinePlan, Technology};
use crate::machine::spec::{ConfidentialSpec, MachineSpec};
use crate::vmm::protocol::{MachineState, OwnerSession, VmmReply, VmmRequest};

impl Agent {
    /// `casemate run`.
    pub(super) fn launch(
        &self,
        caller: &Caller,
        description: &Path,
        session: Option<SessionText>,
    ) -> Result<Answer, Failure> {
        let begun = Instant::now();
        let spec = MachineSpec::load(description)
            .map_err(|e| Failure::new("DESCRIPTION", e.to_string()))?;
        let wants_secret = matches!(
            spec.confidential,
            ConfidentialSpec::Sev { secret: true, .. }
        );
        let session = owner_session(&spec.name, wants_secret, session)?;
        let plan = spec.plan(random_id()?, self.emulates());
        let action = Action::Launch {
            technology: policy_technology(plan.technology),
            emulated: plan.technology.emulated(),
            vcpus: plan.vcpus.into(),
            memory_mib: plan.memory_bytes >> 20,
            policy_bits: plan.technology.policy_bits(),
        };
        let claims = self.launch_claims(&spec, &plan)?;
        self.decide_on(caller, &plan.name, &action, claims)?;
        let _reserved = self.reserve(&plan.name)?;
        let guest = self.build(&spec, &plan)?;
        let VmmReply::Launched(measurement) =
            guest.vmm.call(&VmmRequest::Launch { session }, &[])?
        else {
            return Err(Failure::new("VMM_GONE", "the VMM answered something else"));
        };
        self.evidence.record(
            Entry::new(caller.name(), "launch", &plan.name, Outcome::Done)
                .emulated(plan.technology.emulated())
                .with("vm_id", hex::encode(plan.vm_id))
                .with(
                    "measurement",
                    measurement
                        .as_ref()
                        .map(|m| hex::encode(&m.blob))
                        .unwrap_or_default(),
                ),
        )?;
        let state = if wants_secret {
            *lock(&guest.measurement) = measurement;
            MachineState::Measured
        } else {
            self.first_run(&guest)?;
            MachineState::Running
        };
        *lock(&guest.launch_us) = Some(elapsed_us(begun));
        let info = guest.info_in(state);
        lock(&self.guests).insert(plan.name.clone(), guest);
        Ok(Answer::Guest(info))
    }

    /// The measurement of a guest that waits for its owner.
    pub(super) fn measurement(&self, name: &str) -> Result<Answer, Failure> {
        let guest = self.guest(name)?;
        let held = lock(&guest.measurement);
        let measurement = held.as_ref().ok_or_else(|| not_waiting(name))?;
        Ok(Answer::Measurement(MeasurementInfo {
            blob: STANDARD.encode(&measurement.blob),
            api_major: measurement.api.0,
            api_minor: measurement.api.1,
            build: measurement.api.2,
            policy: measurement.policy,
            elapsed_us: measurement.elapsed_us,
            emulated: guest.plan.technology.emulated(),
        }))
    }

    /// The owner's secret: injected once, then the guest starts.
    pub(super) fn inject_secret(
        &self,
        caller: &Caller,
        name: &str,
        header: &str,
        ciphertext: &str,
    ) -> Result<Answer, Failure> {
        let guest = self.guest(name)?;
        let action = Action::InjectSecret {
            technology: policy_technology(guest.plan.technology),
            emulated: guest.plan.technology.emulated(),
        };
        self.decide(caller, name, &action)?;
        let mut held = lock(&guest.measurement);
        if held.is_none() {
            return Err(not_waiting(name));
        }
        let request = VmmRequest::InjectSecret {
            header: bytes(header)?,
            ciphertext: bytes(ciphertext)?,
        };
        guest.vmm.call(&request, &[])?;
        let entry = Entry::new("owner", "inject-secret", name, Outcome::Done);
        self.evidence
            .record(entry.emulated(guest.plan.technology.emulated()))?;
        self.first_run(&guest)?;
        *held = None;
        Ok(Answer::Guest(guest.info_in(MachineState::Running)))
    }

    fn build(&self, spec: &MachineSpec, plan: &MachinePlan) -> Result<Arc<Guest>, Failure> {
        let disks: Vec<&Path> = spec.disks.iter().map(|d| d.path.as_path()).collect();
        let taps: Vec<TapChoice> = spec
            .nets
            .iter()
            .map(|n| TapChoice {
                tap: n.tap.clone(),
                bridge: n.bridge.clone(),
            })
            .collect();
        let processor = self.processor_for(plan.technology)?;
        let folder = self.guest_folder(&plan.name);
        let resources = Resources::open(plan, &folder, &disks, &taps, processor)?
            .with_boot(&spec.kernel, &spec.initrd)?;
        resources.prepare(self.spawn_vmm(plan)?, plan.clone(), FIRST_EPOCH)
    }

    /// Ownership is on the disk before the first instruction.
    fn first_run(&self, guest: &Guest) -> Result<(), Failure> {
        let record = Ownership {
            vm_id: hex::encode(guest.plan.vm_id),
            epoch: FIRST_EPOCH,
            state: OwnershipState::Owner,
            peer: None,
        };
        self.record_ownership(&guest.plan.name, &record)?;
        guest.vmm.call(&VmmRequest::Run, &[]).map(drop)
    }
}

/// The technology in the policy's words.
pub fn policy_technology(technology: Technology) -> PolicyTechnology {
    match technology {
        Technology::None => PolicyTechnology::None,
        Technology::Sev { .. } => PolicyTechnology::Sev,
    }
}

impl Technology {
    /// The guest policy given to the firmware; 0 for a plain guest.
    pub fn policy_bits(&self) -> u64 {
        match self {
            Self::None => 0,
            Self::Sev { policy, .. } => (*policy).into(),
        }
    }
}

fn owner_session(
    name: &str,
    wanted: bool,
    given: Option<SessionText>,
) -> Result<Option<OwnerSession>, Failure> {
    match (wanted, given) {
        (true, None) => Err(Failure::new(
            "OWNER_SESSION",
            format!(
                "{name} waits for its owner's secret (`confidential.secret`): give --owner-session, or set it to false"
            ),
        )),
        (false, Some(_)) => Err(Failure::new(
            "OWNER_SESSION",
            format!(
                "{name} takes no secret, so no owner's session either; set `confidential.secret = true`"
            ),
        )),
        (_, given) => given
            .map(|text| {
                Ok(OwnerSession {
                    certificate: bytes(&text.certificate)?,
                    blob: bytes(&text.blob)?,
                })
            })
            .transpose(),
    }
}

fn bytes(text: &str) -> Result<Vec<u8>, Failure> {
    STANDARD.decode(text).map_err(|e| {
        Failure::new(
            "BASE64",
            format!("a field of the request is not base64: {e}"),
        )
    })
}

fn random_id() -> Result<[u8; 16], Failure> {
    use ring::rand::SecureRandom as _;
    let mut id = [0u8; 16];
    ring::rand::SystemRandom::new()
        .fill(&mut id)
        .map_err(|_| Failure::new("RANDOM", "the kernel gives no random bytes"))?;
    Ok(id)
}

fn not_waiting(name: &str) -> Failure {
    Failure::new("NOT_WAITING", format!("{name} does not wait for a secret"))
}

fn elapsed_us(begun: Instant) -> u64 {
    u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX)
}

/// The epoch of a guest that has never moved.
const FIRST_EPOCH: u64 = 1;
