//! Launching a guest from its description.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use casemate_attest::measure::id_block::{IdAuth, IdBlock, IdBlockError};
use casemate_policy::ledger::{Entry, Outcome};
use casemate_policy::{Action, ActionKind};

use crate::agent::api::{Answer, Failure, MeasurementInfo, SessionText};
use crate::agent::authority::Caller;
use crate::agent::decision::Facts;
use crate::agent::guest::{Guest, Resources, TapChoice, cpu_baseline};
use crate::agent::launch_inputs::{LaunchInputs, sha256};
use crate::agent::record::{Ownership, OwnershipState};
use crate::agent::roles::VmmShare;
use crate::agent::vmm_process::lock;
use crate::agent::{Agent, files};
use crate::machine::plan::MachinePlan;
use crate::machine::spec::{ConfidentialSpec, MachineSpec, SnpSpec};
use crate::vmm::protocol::{
    LaunchBinding, MachineState, OwnerSession, SnpBinding, SnpId, VmmReply, VmmRequest,
};

impl Agent {
    /// `casemate run`.
    pub(super) fn launch(
        &self,
        caller: &Caller,
        description: &Path,
        session: Option<SessionText>,
    ) -> Result<Answer, Failure> {
        let text = description_text(description)?;
        let spec = MachineSpec::parse(description, &text)
            .map_err(|e| Failure::new("DESCRIPTION", e.to_string()))?;
        self.launch_described(caller, &spec, session)
    }

    /// The same, with the description read.
    pub(super) fn launch_described(
        &self,
        caller: &Caller,
        spec: &MachineSpec,
        session: Option<SessionText>,
    ) -> Result<Answer, Failure> {
        let begun = Instant::now();
        let files = files::in_words(spec.files());
        self.may_ask(caller, ActionKind::Launch, Some(&spec.name), files.clone())?;
        let binding = Box::new(binding(spec, session)?);
        let plan = spec.plan(random_id()?, self.offer(spec.vsock_cid));
        let action = Action::Launch {
            technology: plan.technology.in_policy(),
            emulated: plan.technology.emulated(),
            vcpus: plan.vcpus.into(),
            memory_mib: plan.memory_bytes >> 20,
            policy_bits: plan.technology.policy_bits(),
        };
        let facts = Facts {
            guest: self.launch_claims(spec, &plan)?,
            files,
            ..Facts::default()
        };
        self.decide_knowing(caller, &plan.name, &action, facts)?;
        let launched = self.launch_decided(caller, spec, &plan, binding, begun);
        if let Err(failure) = &launched {
            self.record_failure(caller.name(), "launch", &plan, failure);
        }
        launched
    }

    /// What the policy has allowed.
    fn launch_decided(
        &self,
        caller: &Caller,
        spec: &MachineSpec,
        plan: &MachinePlan,
        binding: Box<LaunchBinding>,
        begun: Instant,
    ) -> Result<Answer, Failure> {
        let _reserved = self.reserve(&plan.name)?;
        let mut plan = plan.clone();
        plan.cpu.baseline = Some(cpu_baseline(plan.cpu.model)?);
        let inputs = LaunchInputs::begin(spec, &plan);
        let guest = self.build(spec, &plan)?;
        let VmmReply::Launched(measurement) =
            guest.vmm.call(&VmmRequest::Launch { binding }, &[])?
        else {
            return Err(Failure::new("VMM_GONE", "the VMM answered something else"));
        };
        self.record_cell(caller, &guest)?;
        let blob = measurement.as_ref().map(|m| hex::encode(&m.blob));
        let entry = Entry::launched(caller.name(), &plan.name, &blob.unwrap_or_default(), &[]);
        let entry = entry
            .emulated(plan.technology.emulated())
            .with("technology", plan.technology.name())
            .with("vm_id", hex::encode(plan.vm_id));
        self.evidence.record(inputs.describe(entry)?)?;
        let state = if spec.confidential.secret() {
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
            technology: guest.plan.technology.in_policy(),
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
        let packet = match &request {
            VmmRequest::InjectSecret { ciphertext, .. } => sha256(ciphertext),
            _ => String::new(),
        };
        if let Err(failure) = guest.vmm.call(&request, &[]) {
            self.record_failure("owner", "inject-secret", &guest.plan, &failure);
            return Err(failure);
        }
        // Sealed to this launch: what is in it only the owner and the guest know.
        let entry = Entry::secret_released("owner", name, "launch-secret")
            .with("asked_by", caller.name())
            .with("packet_sha256", packet);
        self.evidence
            .record(entry.emulated(guest.plan.technology.emulated()))?;
        self.first_run(&guest)?;
        *held = None;
        Ok(Answer::Guest(guest.info_in(MachineState::Running)))
    }

    /// What was allowed and did not come about. The caller hears the failure itself, also where it cannot be recorded.
    fn record_failure(&self, actor: &str, action: &str, plan: &MachinePlan, failure: &Failure) {
        let entry = Entry::failed(actor, action, &plan.name, &failure.code, &failure.error)
            .emulated(plan.technology.emulated());
        if let Err(unrecorded) = self.evidence.record(entry) {
            tracing::error!(code = unrecorded.code, "{}", unrecorded.error);
        }
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
        let processor = self.processor_for(plan)?;
        let folder = self.guest_folder(&plan.name);
        let resources =
            Resources::open(plan, &folder, &disks, &taps, processor)?.with_boot(&spec.boot)?;
        let share = VmmShare {
            held: spec.boot.held_bytes(),
            cpu: spec.share.clone(),
            io: spec.io.clone().map(|io| io.of_disks(resources.disks(plan))),
        };
        let vmm = self.spawn_vmm(plan, share)?;
        resources.prepare(vmm, plan.clone(), FIRST_EPOCH)
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
        let VmmReply::Started { digest, cpu_us } = guest.vmm.call(&VmmRequest::Run, &[])? else {
            return Err(Failure::new("VMM_GONE", "the VMM answered something else"));
        };
        *lock(&guest.start_cpu_us) = Some(cpu_us);
        let Some(digest) = digest else { return Ok(()) };
        let entry = Entry::new("agent", "measured", &guest.plan.name, Outcome::Done);
        self.evidence.record(
            entry
                .emulated(guest.plan.technology.emulated())
                .with("launch_digest", digest),
        )
    }
}

/// What the description and the request bind the launch to.
fn binding(spec: &MachineSpec, session: Option<SessionText>) -> Result<LaunchBinding, Failure> {
    let given = session.map(decoded).transpose()?;
    let mut binding = LaunchBinding::default();
    match &spec.confidential {
        ConfidentialSpec::Sev(sev) | ConfidentialSpec::SevEs(sev) => {
            let described = sev.owner_session.as_deref().map(kept).transpose()?;
            binding.session = owner_session(&spec.name, sev.secret, given.or(described))?;
        }
        ConfidentialSpec::SevSnp(snp) => {
            owner_session(&spec.name, false, given)?;
            binding.snp = snp_binding(snp)?;
        }
        ConfidentialSpec::None | ConfidentialSpec::Auto => {
            owner_session(&spec.name, false, given)?;
        }
    }
    Ok(binding)
}

fn owner_session(
    name: &str,
    wanted: bool,
    given: Option<OwnerSession>,
) -> Result<Option<OwnerSession>, Failure> {
    match (wanted, given) {
        (true, None) => Err(Failure::new(
            "OWNER_SESSION",
            format!(
                "{name} waits for its owner's secret (`confidential.secret`): give --owner-session, describe \
                 `confidential.owner_session`, or set it to false"
            ),
        )),
        (false, Some(_)) => Err(Failure::new(
            "OWNER_SESSION",
            format!(
                "{name} takes no secret, so no owner's session either; set `confidential.secret = true`"
            ),
        )),
        (_, given) => Ok(given),
    }
}

fn decoded(text: SessionText) -> Result<OwnerSession, Failure> {
    Ok(OwnerSession {
        certificate: bytes(&text.certificate)?,
        blob: bytes(&text.blob)?,
    })
}

/// A session as `casemate owner session` writes it.
fn kept(folder: &Path) -> Result<OwnerSession, Failure> {
    Ok(OwnerSession {
        certificate: small_file(&folder.join("owner.cert"))?,
        blob: small_file(&folder.join("session.bin"))?,
    })
}

fn snp_binding(snp: &SnpSpec) -> Result<SnpBinding, Failure> {
    let id = snp.id.as_ref().map(|files| {
        let (block, auth) = (small_file(&files.block)?, small_file(&files.auth)?);
        let wrong = |e: IdBlockError| Failure::new("ID_BLOCK", e.to_string());
        let wanted = IdBlock::parse(&block).map_err(wrong)?;
        let author_key = IdAuth::parse(&auth)
            .map_err(wrong)?
            .claimed_keys()
            .author_key
            .is_some();
        let policy = wanted.policy.0;
        if policy != snp.policy {
            return Err(Failure::new(
                "ID_BLOCK",
                format!(
                    "the ID block wants guest policy {policy:#x}, the description says {:#x}",
                    snp.policy
                ),
            ));
        }
        Ok(SnpId {
            block,
            auth,
            author_key,
        })
    });
    Ok(SnpBinding {
        host_data: snp.host_data,
        id: id.transpose()?,
        vcek_disabled: snp.vcek_disabled,
    })
}

/// The text of a description, from where it really is.
pub(super) fn description_text(path: &Path) -> Result<String, Failure> {
    let wrong = |e: &dyn std::fmt::Display| Failure::new("DESCRIPTION", e.to_string());
    let file = files::open(path, false).map_err(|e| {
        let text = format!(
            "{} cannot be read: {e}; want a description (TOML)",
            path.display()
        );
        wrong(&text)
    })?;
    MachineSpec::read(path, file).map_err(|e| wrong(&e))
}

/// A file that a description names and that is at most a few pages long.
fn small_file(path: &Path) -> Result<Vec<u8>, Failure> {
    let unusable = |problem: String| {
        Failure::new(
            "DESCRIPTION",
            format!("{} cannot be used: {problem}", path.display()),
        )
    };
    let file = files::open(path, false).map_err(|e| unusable(e.to_string()))?;
    let mut bytes = Vec::new();
    file.take(MAX_SMALL_FILE + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| unusable(e.to_string()))?;
    if bytes.len() as u64 > MAX_SMALL_FILE {
        return Err(unusable(format!("it has more than {MAX_SMALL_FILE} bytes")));
    }
    Ok(bytes)
}

fn bytes(text: &str) -> Result<Vec<u8>, Failure> {
    STANDARD.decode(text).map_err(|e| {
        Failure::new(
            "BASE64",
            format!("a field of the request is not base64: {e}"),
        )
    })
}

pub(super) fn random_id() -> Result<[u8; 16], Failure> {
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

/// Longest session, certificate or ID page in bytes.
const MAX_SMALL_FILE: u64 = 16 * 1024;
/// The epoch of a guest that has never moved.
const FIRST_EPOCH: u64 = 1;
