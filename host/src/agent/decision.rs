//! Every request passes here: the policy decides, the ledger keeps the decision, and only then something is done.

use std::io::Read as _;
use std::path::Path;
use std::time::SystemTime;

use casemate_policy::claims::{
    Asking, Firmware, GuestClaims, HostClaims, SandboxLevel, SessionClaims,
};
use casemate_policy::ledger::{Entry, Outcome};
use casemate_policy::{
    Action, ActionKind, Code, Decision, HostPolicy, Inquiry, Timestamp, decide, history, may_ask,
};

use crate::agent::api::{Answer, Failure, Request};
use crate::agent::authority::{Caller, PolicyText};
use crate::agent::processor::OperatedProcessor as _;
use crate::agent::{Agent, files, platform};
use crate::machine::plan::{MachinePlan, Technology};
use crate::machine::spec::MachineSpec;
use crate::vmm::boot::measured_boot::MeasuredBoot;
use crate::vmm::boot::{BootImage, measured};

/// What a request asks of the policy before anything that it names is looked at.
enum Asked<'a> {
    /// All there is to decide.
    Whole(Action, &'a str),
    /// Whether the caller may ask for this at all; what it comes to is decided once that is known.
    First(ActionKind, Option<&'a str>),
}

/// A request that the gate has let through, its file where that really is. Nothing else is done.
pub(super) struct Gated(pub(super) Request);

/// What is known besides the question.
#[derive(Default)]
pub(super) struct Facts {
    /// What was verified of the guest.
    pub(super) guest: GuestClaims,
    /// The session of a move.
    pub(super) session: Option<SessionClaims>,
    /// Files that were named, where they really are.
    pub(super) files: Vec<String>,
}

impl Request {
    /// A request that is not here cannot be compiled.
    fn asked(&self) -> Asked<'_> {
        match self {
            Self::Run { .. } => Asked::First(ActionKind::Launch, None),
            Self::InjectSecret { name, .. } => Asked::First(ActionKind::InjectSecret, Some(name)),
            Self::Migrate { name, .. }
            | Self::Assess { name, .. }
            | Self::Proceed { name }
            | Self::Settle { name }
            | Self::MigrateSet { name, .. } => Asked::First(ActionKind::MigrateOut, Some(name)),
            Self::PolicyLoad { .. } => Asked::First(ActionKind::PolicyLoad, None),
            Self::Approve { .. } => Asked::First(ActionKind::Approve, None),
            Self::EvidenceRotate {} => Asked::Whole(Action::EvidenceKeyRotate, EVIDENCE),
            Self::EvidenceRetain { keep_from } => Asked::Whole(
                Action::EvidenceRetain {
                    keep_from: *keep_from,
                },
                EVIDENCE,
            ),
            Self::Create { .. } => Asked::First(ActionKind::Launch, None),
            Self::Start { name, .. } | Self::Delete { name } => {
                Asked::First(ActionKind::Launch, Some(name))
            }
            Self::List {} | Self::Tasks {} | Self::Metrics {} | Self::Definitions {} => {
                Asked::Whole(Action::List, "")
            }
            Self::Task { .. } | Self::TaskEvents { .. } => Asked::First(ActionKind::Status, None),
            Self::TaskCancel { .. } => Asked::First(ActionKind::Cancel, None),
            Self::Platform { .. } | Self::SnpCertificates { .. } => {
                Asked::Whole(Action::PlatformShow, "")
            }
            Self::PlatformOrder { order, .. } => match order.command() {
                Some(command) => Asked::Whole(Action::PlatformAdmin { command }, platform::OBJECT),
                None => Asked::Whole(Action::PlatformShow, ""),
            },
            Self::Status { name } | Self::Stats { name } | Self::Console { name, .. } => {
                Asked::Whole(Action::Status, name)
            }
            Self::Measurement { name } => Asked::Whole(Action::Measurement, name),
            Self::SandboxReport { name } => Asked::Whole(Action::SandboxReport, name),
            Self::SandboxProbe { name } => Asked::Whole(Action::SandboxProbe, name),
            Self::Stop { name } | Self::Shutdown { name, .. } => Asked::Whole(Action::Stop, name),
            Self::Device {
                name, change: None, ..
            } => Asked::Whole(Action::Status, name),
            Self::Device { name, .. } => Asked::Whole(Action::Resize, name),
            Self::ConsoleOpen { name } => Asked::Whole(Action::Console, name),
            Self::Attach { name, .. } => Asked::Whole(Action::Attach, name),
            Self::Detach { name, .. } => Asked::Whole(Action::Detach, name),
            Self::Pause { name } => Asked::Whole(Action::Pause, name),
            Self::Resume { name } => Asked::Whole(Action::Resume, name),
            Self::Upgrade { name } => Asked::Whole(Action::Upgrade, name),
            Self::Snapshot { name, .. } => Asked::Whole(Action::Snapshot, name),
            Self::Restore { .. } => Asked::First(ActionKind::Launch, None),
            Self::Clone { name, .. } => Asked::First(ActionKind::Clone, Some(name)),
            Self::SnapshotErase { .. } => Asked::First(ActionKind::SnapshotErase, None),
            Self::Nmi { name } => Asked::Whole(Action::Nmi, name),
            Self::Cancel { name } => Asked::Whole(Action::Cancel, name),
        }
    }
}

impl Request {
    /// What the gate decides whole and what changes something: nothing else records that it did not come about.
    pub(super) fn undone_by_nobody(&self) -> Option<(&'static str, String)> {
        match self.asked() {
            Asked::Whole(Action::PlatformAdmin { .. }, _) | Asked::First(..) => None,
            Asked::Whole(action, _) if action.kind().reads() => None,
            Asked::Whole(action, object) => {
                let object = object.chars().take(MAX_OBJECT).collect();
                Some((action.name(), object))
            }
        }
    }
}

impl Agent {
    /// Decides a request as far as it can be decided unseen.
    pub(super) fn gate(&self, caller: &Caller, request: Request) -> Result<Gated, Failure> {
        let request = request.with_real_file();
        let files = files::in_words(request.file());
        match request.asked() {
            Asked::Whole(action, object) => {
                let facts = Facts {
                    files,
                    ..Facts::default()
                };
                self.decide_knowing(caller, object, &action, facts)?;
            }
            Asked::First(kind, object) => self.may_ask(caller, kind, object, files)?,
        }
        Ok(Gated(request))
    }

    /// Whether somebody may ask for a kind of action at all; on this guest, if it is known which.
    pub(super) fn may_ask(
        &self,
        caller: &Caller,
        kind: ActionKind,
        object: Option<&str>,
        files: Vec<String>,
    ) -> Result<(), Failure> {
        let policy = self.policy();
        let asking = Asking {
            actor: caller.actor().clone(),
            kind,
            object: object.map(|object| object.chars().take(MAX_OBJECT).collect()),
            files,
        };
        let decision = may_ask(&policy, &asking);
        if decision.allowed {
            return Ok(());
        }
        let name = caller.name();
        let entry = history::entry_of_asking(name, &asking, &decision, policy.digest());
        self.evidence.record(entry)?;
        Err(self.refusal(&decision))
    }

    /// Asks the policy, and writes the decision down before it is acted upon.
    pub(super) fn decide(
        &self,
        caller: &Caller,
        object: &str,
        action: &Action,
    ) -> Result<(), Failure> {
        self.decide_knowing(caller, object, action, Facts::default())
    }

    /// [`Agent::decide`], with what else is known. Looking that is allowed leaves no record.
    pub(super) fn decide_knowing(
        &self,
        caller: &Caller,
        object: &str,
        action: &Action,
        facts: Facts,
    ) -> Result<(), Failure> {
        let policy = self.policy();
        let clock = Timestamp::of(SystemTime::now());
        let object: String = object.chars().take(MAX_OBJECT).collect();
        let mut inquiry = Inquiry::new(caller.actor().clone(), &object, action.clone(), clock);
        inquiry.guest = facts.guest;
        inquiry.session = facts.session;
        inquiry.files = facts.files;
        inquiry.host = self.host_claims(&policy, action);
        inquiry.approvals = self.authority.approvals(&inquiry);
        let decision = decide(&policy, &inquiry);
        let decision = self.second_opinion.restrict(&inquiry, decision);
        if !(decision.allowed && action.kind().reads()) {
            let entry = history::entry(caller.name(), &inquiry, &decision, policy.digest());
            let of_guest = self.guest(&object).ok();
            let emulated = of_guest.is_some_and(|guest| guest.plan.technology.emulated());
            let emulated = emulated || action.technology().is_some_and(|(_, emulated)| emulated);
            self.evidence.record(entry.emulated(emulated))?;
        }
        if decision.allowed {
            self.authority.spend(&inquiry);
            return Ok(());
        }
        let mut refusal = self.refusal(&decision);
        let alone = decision.refusals().all(|r| r.code == Code::ApprovalMissing);
        if alone {
            let id = self.authority.wait_for_second(&inquiry);
            refusal.error.push_str(&format!(
                ". It waits 15 minutes: a second person runs `casemate policy approve {id}`, then ask again."
            ));
        }
        Err(refusal)
    }

    /// `casemate policy load`.
    pub(super) fn load_policy(&self, caller: &Caller, file: &Path) -> Result<Answer, Failure> {
        let _one = self.authority.loading();
        let text = PolicyText::read(file)?;
        let (action, digest) = self.authority.proposal(&text)?;
        self.decide(caller, &digest.to_string(), &action)?;
        let ready = match self.authority.admit(text) {
            Ok(ready) => ready,
            Err(failure) => {
                let entry = Entry::new(
                    caller.name(),
                    "policy-load",
                    &digest.to_string(),
                    Outcome::Failed,
                );
                self.evidence.record(entry.code(&failure.code))?;
                return Err(failure);
            }
        };
        let answer = Answer::Policy {
            version: ready.mark().version,
            digest: digest.to_string(),
            signers: ready.signers().map(ToString::to_string).collect(),
        };
        self.authority.put_in_force(&self.evidence, ready)?;
        self.open_socket()?;
        Ok(answer)
    }

    /// `casemate policy approve`.
    pub(super) fn approve(&self, caller: &Caller, id: &str) -> Result<Answer, Failure> {
        let (kind, object) = self.authority.waiting(id).ok_or_else(|| {
            Failure::new(
                "NOT_WAITING",
                format!("nothing waits for a second person under {id:?}; ask for it again"),
            )
        })?;
        self.decide(caller, &object, &Action::Approve { action: kind })?;
        self.authority.agree(id, caller.actor());
        let entry = Entry::new(caller.name(), "approve", &object, Outcome::Done);
        self.evidence
            .record(entry.with("approved", kind.as_str()).with("id", id))?;
        Ok(Answer::Done)
    }

    /// The launch digest, where an owner's rules need it: what this host's firmware is going to measure.
    pub(super) fn launch_claims(
        &self,
        spec: &MachineSpec,
        plan: &MachinePlan,
    ) -> Result<GuestClaims, Failure> {
        let mut claims = GuestClaims::default();
        let policy = self.policy();
        let wanted = policy.guests().is_some_and(|book| {
            book.of(&plan.name)
                .iter()
                .any(|r| r.launch_digests.is_some())
        });
        if !wanted || plan.technology == Technology::None {
            return Ok(claims);
        }
        let failed = |path: &Path, e: &dyn std::fmt::Display| {
            Failure::new("DESCRIPTION", format!("{}: {e}", path.display()))
        };
        let read = |path: &Path| {
            let mut bytes = Vec::new();
            let read = files::open(path, false).and_then(|mut f| f.read_to_end(&mut bytes));
            read.map(|_| bytes).map_err(|e| failed(path, &e))
        };
        // Only a plain guest has none, of which nothing is measured.
        let Some(boot) = spec.boot.kernel() else {
            return Ok(claims);
        };
        let (kernel, initrd) = (read(&boot.kernel)?, read(&boot.initrd)?);
        let digest = match spec.boot.firmware() {
            Some(firmware) => {
                let image = read(&firmware.image)?;
                let boot = MeasuredBoot::new(plan, &image, &kernel, &initrd);
                Some(boot.map_err(|e| failed(&firmware.image, &e))?.digest())
            }
            None => {
                let image = BootImage::assemble(plan, &kernel, &initrd);
                let image = image.map_err(|e| failed(&boot.kernel, &e))?;
                measured::launch_digest(plan, &image.pieces)
            }
        };
        claims.launch_digest = digest.and_then(|digest| digest.to_string().parse().ok());
        Ok(claims)
    }

    fn host_claims(&self, policy: &HostPolicy, action: &Action) -> HostClaims {
        let Some((technology, _)) = action.technology() else {
            return HostClaims::default();
        };
        let firmware = policy.firmware(technology).and_then(|_| {
            let status = self.processor.as_ref()?.status().ok()?;
            Some(Firmware {
                major: status.api.0,
                minor: status.api.1,
                build: status.api.2,
            })
        });
        HostClaims {
            landlock_abi: Some(crate::sandbox::landlock_abi()),
            // A role in which anything of its cell is not in force refuses to start.
            sandbox: Some(SandboxLevel::Full),
            firmware,
        }
    }

    /// What the caller is told. Who may not ask learns nothing of the other rules.
    fn refusal(&self, decision: &Decision) -> Failure {
        let of_people = |code: Code| {
            matches!(
                code,
                Code::PersonUnknown | Code::RoleNotAllowed | Code::GuestNotTheirs
            )
        };
        let outsider = decision.refusals().any(|r| of_people(r.code));
        let shown: Vec<_> = decision
            .refusals()
            .filter(|r| !outsider || of_people(r.code))
            .collect();
        let reasons = shown.iter().map(|r| {
            let (rule, wanted, found, remedy) = (r.rule, &r.wanted, &r.found, r.remedy);
            let text = format!("{rule}: want {wanted}, found {found}. {remedy}");
            text.trim_end().to_owned()
        });
        let reasons: Vec<String> = reasons.collect();
        let first = shown.first().map_or(decision.code, |r| r.code);
        let code = first.as_str().to_uppercase().replace('-', "_");
        Failure {
            code: format!("POLICY_{code}"),
            error: format!(
                "the policy of {} refuses: {}",
                self.config.name,
                reasons.join("; ")
            ),
        }
    }
}

/// The ledger, as an object.
const EVIDENCE: &str = "ledger";
/// The longest object in an inquiry, in characters; guests' names are shorter.
const MAX_OBJECT: usize = 128;

#[cfg(test)]
mod file_tests;
#[cfg(test)]
pub(super) mod tests;
