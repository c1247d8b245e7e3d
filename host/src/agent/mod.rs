//! The host's agent: it opens what roles may use, builds their cells, decides by policy, and writes down what happened.
//!
//! It holds the host's key and never touches guest memory, nor a byte that a peer sent before a mover has parsed it.

mod amd_processor;
pub mod api;
mod arrivals;
mod assessment;
pub mod authority;
pub mod client;
mod clone;
pub mod config;
mod decision;
mod definitions;
mod devices;
pub mod evidence;
mod files;
mod further;
mod guest;
mod guest_events;
mod incoming;
mod launch;
mod launch_inputs;
mod metrics;
mod move_records;
mod mover_process;
mod moving_disks;
mod outgoing;
mod platform;
pub mod platform_api;
mod plug;
mod processor;
mod program;
mod record;
pub mod restore;
mod roles;
mod room;
mod second_opinion;
mod serial;
mod server;
mod settle;
mod sev;
mod shutdown;
pub mod snapshot;
mod snapshot_keys;
pub mod tap;
mod tasks;
mod transfer;
pub mod upgrade;
mod upkeep;
mod vmm_process;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use casemate_policy::HostPolicy;
use casemate_policy::ledger::{Entry, Outcome};
use tokio::signal::unix::{SignalKind, signal};

use crate::agent::api::{Answer, Failure, GuestInfo, Request};
use crate::agent::arrivals::Arrivals;
use crate::agent::authority::{Authority, Caller};
use crate::agent::config::AgentConfig;
use crate::agent::decision::Gated;
use crate::agent::evidence::Evidence;
use crate::agent::further::Routes;
use crate::agent::guest::Guest;
use crate::agent::metrics::Metrics;
use crate::agent::outgoing::Wish;
use crate::agent::processor::Processor;
use crate::agent::record::{Ownership, OwnershipState, Records};
use crate::agent::roles::{Bounds, is_group_of};
use crate::agent::second_opinion::SecondOpinion;
use crate::agent::tasks::Tasks;
use crate::agent::transfer::{HostCredentials, role_error};
use crate::agent::vmm_process::lock;
use crate::confidential::control::GuestLink;
use crate::machine::plan::MachinePlan;
use crate::machine::spec::{Offer, Strongest};
use crate::mover::protocol::AgentAnswer;
use crate::sandbox::Role;
use crate::sandbox::jail::{end_cgroup, sweep_cgroups};
use crate::vmm::protocol::{HandleKind, RoleError, VmmReply, VmmRequest};

/// Runs the agent until it is told to stop (SIGTERM, SIGINT). Its guests end with it.
pub fn run(config: &Path) -> Result<(), Failure> {
    let config =
        AgentConfig::load(config).map_err(|e| Failure::new("CONFIGURATION", e.to_string()))?;
    let runtime =
        tokio::runtime::Runtime::new().map_err(|e| Failure::new("INTERNAL", e.to_string()))?;
    runtime.block_on(async {
        let agent = Arc::new(Agent::start(config)?);
        let failed = |e: std::io::Error| Failure::new("INTERNAL", e.to_string());
        let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
        let ended = async move {
            tokio::select! { _ = terminate.recv() => {} _ = interrupt.recv() => {} }
        };
        server::serve(Arc::clone(&agent), ended).await?;
        tokio::task::spawn_blocking(move || agent.stop_all())
            .await
            .map_err(|e| Failure::new("INTERNAL", e.to_string()))
    })?;
    // Threads that still wait for a peer end with the process; their roles die with it.
    runtime.shutdown_background();
    Ok(())
}

/// The agent of one host.
pub struct Agent {
    config: AgentConfig,
    authority: Authority,
    second_opinion: SecondOpinion,
    evidence: Arc<Evidence>,
    records: Records,
    identity: Option<HostCredentials>,
    processor: Option<Processor>,
    guests: Mutex<BTreeMap<String, Arc<Guest>>>,
    starting: Mutex<BTreeSet<String>>,
    arrivals: Arrivals,
    routes: Routes,
    tasks: Tasks,
    metrics: Arc<Metrics>,
    next_role: AtomicU32,
    /// cgroups of the roles started so far; none once the agent ends.
    groups: Mutex<Option<BTreeSet<String>>>,
}

impl Agent {
    fn start(config: AgentConfig) -> Result<Self, Failure> {
        std::fs::create_dir_all(&config.state_dir)
            .map_err(|e| Failure::new("STATE", format!("{}: {e}", config.state_dir.display())))?;
        let (authority, admitted) = Authority::open(&config)?;
        let evidence = Arc::new(Evidence::open(&config.state_dir, &config.name)?);
        let records = Records::open(&config.state_dir.join("ownership"))
            .map_err(|e| Failure::new("STATE", e.to_string()))?;
        let identity = config
            .identity
            .as_ref()
            .map(HostCredentials::load)
            .transpose()?;
        if config.listen.is_some() && identity.is_none() {
            let text = "`listen` accepts migrations, and this host has no identity for them; add [identity] to the agent's configuration, or remove `listen`";
            return Err(Failure::new("IDENTITY", text));
        }
        // The ledger is locked: whoever made these groups has ended.
        let swept = sweep_cgroups(|name| is_group_of(&config.name, name));
        if swept > 0 {
            tracing::warn!(swept, "removed the cgroups that a killed agent left behind");
        }
        let mut agent = Self {
            authority,
            second_opinion: SecondOpinion::open(config.rego.as_ref())?,
            evidence,
            records,
            identity,
            processor: None,
            guests: Mutex::new(BTreeMap::new()),
            starting: Mutex::new(BTreeSet::new()),
            arrivals: Arrivals::default(),
            routes: Routes::default(),
            tasks: Tasks::default(),
            metrics: Arc::default(),
            next_role: AtomicU32::new(0),
            groups: Mutex::new(Some(BTreeSet::new())),
            config,
        };
        let digest = admitted.mark().digest.to_string();
        agent.evidence.record_start(&agent.config.name, &digest)?;
        agent.authority.put_in_force(&agent.evidence, admitted)?;
        if agent.policy().technologies.allow_emulated {
            let (process, channel) = agent.spawn(Role::Psp, Bounds::default())?;
            let peer_roots = agent.emulated_roots();
            let snp = agent
                .policy()
                .technologies
                .allowed
                .contains(&casemate_policy::Technology::SevSnp);
            agent.processor = Some(Processor::start(
                process,
                channel,
                &agent.config.state_dir,
                &peer_roots,
                snp,
            )?);
        }
        Ok(agent)
    }

    fn handle(
        &self,
        caller: &Caller,
        request: Request,
        progress: &mut dyn FnMut(serde_json::Value),
    ) -> Result<Answer, Failure> {
        let gated = self.gate_counted(caller, request)?;
        self.perform(caller, gated, progress)
    }

    /// [`Agent::gate`], with a refusal in the metrics.
    fn gate_counted(&self, caller: &Caller, request: Request) -> Result<Gated, Failure> {
        let operation = request.operation();
        self.gate(caller, request)
            .inspect_err(|failure| self.metrics.ended(operation, Err(failure)))
    }

    /// Does what the gate has let through.
    fn perform(
        &self,
        caller: &Caller,
        Gated(request): Gated,
        progress: &mut dyn FnMut(serde_json::Value),
    ) -> Result<Answer, Failure> {
        let operation = request.operation();
        let undone = request.undone_by_nobody();
        let result = self.dispatch(caller, request, progress);
        if let (Err(failure), Some((action, object))) = (&result, undone) {
            self.record_undone(caller.name(), action, &object, failure);
        }
        self.metrics.ended(operation, result.as_ref());
        result
    }

    fn dispatch(
        &self,
        caller: &Caller,
        request: Request,
        progress: &mut dyn FnMut(serde_json::Value),
    ) -> Result<Answer, Failure> {
        match request {
            Request::Run {
                description,
                session,
            } => self.launch(caller, &description, session),
            Request::Create { description } => self.create(caller, &description),
            Request::Definitions {} => self.definitions(),
            Request::Start { name, session } => self.start_defined(caller, &name, session),
            Request::Delete { name } => self.delete(caller, &name),
            Request::Stats { name } => self.stats(&name),
            Request::Console { name, from } => self.console(&name, from),
            Request::ConsoleOpen { name } => self.console_open(caller, &name),
            Request::List {} => self.list(),
            Request::Status { name } => Ok(Answer::Guest(self.guest(&name)?.info()?)),
            Request::Stop { name } => self.stop(caller, &name),
            Request::Shutdown {
                name,
                timeout_s,
                force,
            } => self.shut_down(caller, &name, timeout_s, force),
            Request::Device {
                name,
                device,
                change,
            } => self.device(caller, &name, &device, change),
            Request::Attach { name, device } => self.attach(caller, &name, device),
            Request::Detach {
                name,
                device,
                timeout_s,
            } => self.detach(caller, &name, &device, timeout_s),
            Request::Pause { name } => self.order(caller, &name, &VmmRequest::Pause, "pause"),
            Request::Resume { name } => self.order(caller, &name, &VmmRequest::Resume, "resume"),
            Request::Nmi { name } => self.order(caller, &name, &VmmRequest::InjectNmi, "nmi"),
            Request::Measurement { name } => self.measurement(&name),
            Request::InjectSecret {
                name,
                header,
                ciphertext,
            } => self.inject_secret(caller, &name, &header, &ciphertext),
            Request::Migrate {
                name,
                to,
                downtime_limit_ms,
                time_limit_s,
                bandwidth_mib,
                unthrottled,
                read_back,
                streams,
                copy_disks,
            } => {
                let wish = Wish {
                    to: &to,
                    assess: false,
                    downtime_limit_ms,
                    time_limit_s,
                    bandwidth_mib,
                    unthrottled,
                    read_back,
                    streams,
                    copy_disks: &copy_disks,
                };
                self.migrate(caller, &name, &wish, progress)
            }
            Request::Assess {
                name,
                to,
                downtime_limit_ms,
                bandwidth_mib,
                unthrottled,
                streams,
                copy_disks,
            } => {
                let wish = Wish {
                    to: &to,
                    assess: true,
                    downtime_limit_ms,
                    bandwidth_mib,
                    unthrottled,
                    streams,
                    copy_disks: &copy_disks,
                    ..Wish::default()
                };
                self.assess(caller, &name, &wish, progress)
            }
            Request::Proceed { name } => self.proceed(caller, &name),
            Request::Settle { name } => self.settle(caller, &name),
            Request::MigrateSet {
                name,
                bandwidth_mib,
            } => self.migrate_set(caller, &name, bandwidth_mib),
            Request::Upgrade { name } => self.upgrade(caller, &name, progress),
            Request::Snapshot {
                name,
                file,
                stop,
                template,
            } => {
                let wish = snapshot::SnapshotWish {
                    file: &file,
                    stop,
                    template,
                };
                self.snapshot(caller, &name, wish)
            }
            Request::SnapshotErase { id } => self.erase_snapshot(caller, &id),
            Request::Restore {
                file,
                name,
                memory,
                allow_older,
                allow_changed_disks,
            } => {
                let wanted = restore::Wanted {
                    name,
                    memory,
                    allow_older,
                    allow_changed_disks,
                    copy: None,
                };
                self.restore(caller, &file, wanted, progress)
            }
            Request::Clone {
                file,
                name,
                memory,
                disks,
                allow_changed_disks,
            } => {
                let wanted = restore::Wanted {
                    name: Some(name),
                    memory,
                    allow_older: true,
                    allow_changed_disks,
                    copy: Some(restore::CopyWish { disks }),
                };
                self.restore(caller, &file, wanted, progress)
            }
            Request::Cancel { name } => self.cancel(&name),
            Request::Platform { processor } => self.platform(processor),
            Request::SnpCertificates { processor } => self.snp_certificates(processor),
            Request::PlatformOrder { processor, order } => {
                self.platform_order(caller, processor, &order)
            }
            Request::SandboxProbe { name } => self.probe(caller, &name),
            Request::SandboxReport { name } => self.sandbox_report(&name),
            Request::PolicyLoad { policy } => self.load_policy(caller, &policy),
            Request::Approve { id } => self.approve(caller, &id),
            Request::EvidenceRotate {} => self.rotate_evidence_key(caller),
            Request::EvidenceRetain { keep_from } => self.retain_evidence(caller, keep_from),
            Request::Tasks {} => Ok(Answer::Tasks {
                tasks: self.tasks.infos(),
            }),
            Request::Task { id } | Request::TaskEvents { id } => {
                Ok(Answer::Task(self.task_of(caller, &id)?.info()))
            }
            Request::TaskCancel { id } => self.cancel_task(caller, &id),
            Request::Metrics {} => self.metrics_text(),
        }
    }

    fn list(&self) -> Result<Answer, Failure> {
        let guests: Vec<Arc<Guest>> = lock(&self.guests).values().cloned().collect();
        let guests = guests
            .iter()
            .map(|g| g.info())
            .collect::<Result<Vec<GuestInfo>, Failure>>()?;
        Ok(Answer::Guests { guests })
    }

    fn stop(&self, caller: &Caller, name: &str) -> Result<Answer, Failure> {
        let guest = self.settled_guest(name)?;
        self.end(caller.name(), name, &guest)?;
        lock(&self.guests).remove(name);
        Ok(Answer::Done)
    }

    fn stop_all(&self) {
        let guests = std::mem::take(&mut *lock(&self.guests));
        for (name, guest) in guests {
            if let Err(failure) = self.end("agent", &name, &guest) {
                tracing::warn!(code = failure.code, "{name}: {}", failure.error);
            }
        }
        // What other threads still hold (a move, a launch, the processor) is not dropped before the process ends.
        let groups = lock(&self.groups).take();
        groups.iter().flatten().for_each(|name| end_cgroup(name));
    }

    fn end(&self, who: &str, name: &str, guest: &Guest) -> Result<(), Failure> {
        guest.vmm.kill();
        let epoch = *lock(&guest.epoch);
        let vm_id = hex::encode(guest.plan.vm_id);
        let owned = self
            .records
            .read(name)
            .ok()
            .flatten()
            .is_none_or(|r| r.state == OwnershipState::Owner);
        if owned {
            self.record_ownership(
                name,
                &Ownership {
                    vm_id,
                    epoch,
                    state: OwnershipState::Ended,
                    peer: None,
                },
            )?;
        }
        let entry = Entry::new(who, "stop", name, Outcome::Done);
        self.evidence
            .record(entry.emulated(guest.plan.technology.emulated()))
    }

    fn order(
        &self,
        caller: &Caller,
        name: &str,
        request: &VmmRequest,
        action: &str,
    ) -> Result<Answer, Failure> {
        let guest = self.settled_guest(name)?;
        self.must_own(name)?;
        guest.vmm.call(request, &[])?;
        let entry = Entry::new(caller.name(), action, name, Outcome::Done);
        self.evidence
            .record(entry.emulated(guest.plan.technology.emulated()))?;
        Ok(Answer::Guest(guest.info()?))
    }

    fn probe(&self, caller: &Caller, name: &str) -> Result<Answer, Failure> {
        let guest = self.guest(name)?;
        let VmmReply::Probe(vmm) = guest.vmm.call(&VmmRequest::SandboxProbe, &[])? else {
            return Err(Failure::new("VMM_GONE", "the VMM answered something else"));
        };
        let mover = lock(&guest.mover).clone();
        let mut reports = vec![vmm];
        reports.extend(mover.map(|m| m.probe()).transpose()?);
        reports.extend(self.processor.as_ref().map(Processor::probe).transpose()?);
        let held = reports.iter().flat_map(|r| &r.attempts).all(|a| a.refused);
        let outcome = if held { Outcome::Done } else { Outcome::Failed };
        self.evidence
            .record(Entry::new(caller.name(), "sandbox-probe", name, outcome))?;
        Ok(Answer::Probe { reports })
    }

    /// What holds a guest's VMM, in the ledger: its filters by thread, and its Landlock rules, by their hashes.
    fn record_cell(&self, caller: &Caller, guest: &Guest) -> Result<(), Failure> {
        let VmmReply::Report(cell) = guest.vmm.call(&VmmRequest::SandboxReport, &[])? else {
            return Err(Failure::new("VMM_GONE", "the VMM answered something else"));
        };
        let threads = cell.threads.iter();
        let filters =
            threads.map(|t| format!("{}: {} sha256:{}", t.name, t.filter, t.filter_sha256));
        let entry = Entry::new(caller.name(), "sandbox", &guest.plan.name, Outcome::Done)
            .emulated(guest.plan.technology.emulated())
            .with("landlock", format!("sha256:{}", cell.landlock_sha256))
            .with("filters", filters.collect::<Vec<_>>());
        self.evidence.record(entry)
    }

    fn sandbox_report(&self, name: &str) -> Result<Answer, Failure> {
        let guest = self.guest(name)?;
        let VmmReply::Report(vmm) = guest.vmm.call(&VmmRequest::SandboxReport, &[])? else {
            return Err(Failure::new("VMM_GONE", "the VMM answered something else"));
        };
        let mover = lock(&guest.mover).clone();
        let mut reports = vec![vmm];
        reports.extend(mover.map(|m| m.sandbox_report()).transpose()?);
        reports.extend(
            self.processor
                .as_ref()
                .map(Processor::sandbox_report)
                .transpose()?,
        );
        Ok(Answer::Sandbox { reports })
    }

    fn guest(&self, name: &str) -> Result<Arc<Guest>, Failure> {
        let unknown = || {
            Failure::new(
                "NO_SUCH_GUEST",
                format!("no guest {name} on this host; see `casemate list`"),
            )
        };
        lock(&self.guests).get(name).cloned().ok_or_else(unknown)
    }

    /// A guest that is not being moved.
    fn settled_guest(&self, name: &str) -> Result<Arc<Guest>, Failure> {
        let guest = self.guest(name)?;
        if lock(&guest.mover).is_some() {
            return Err(Failure::new(
                "ALREADY_MOVING",
                format!("{name} is being moved; cancel that first"),
            ));
        }
        Ok(guest)
    }

    fn must_own(&self, name: &str) -> Result<(), Failure> {
        let record = self.ownership(name)?;
        if record.is_none_or(|r| r.state != OwnershipState::Owner) {
            return Err(Failure::new(
                "NOT_OWNER",
                format!("this host does not own {name}; see its ownership record"),
            ));
        }
        Ok(())
    }

    /// Keeps a name for a launch under way, so that it is launched once.
    fn reserve(&self, name: &str) -> Result<Reserved<'_>, Failure> {
        let taken = || {
            Failure::new(
                "NAME_TAKEN",
                format!("a guest {name} runs on this host already"),
            )
        };
        if lock(&self.guests).contains_key(name) || !lock(&self.starting).insert(name.to_owned()) {
            return Err(taken());
        }
        // From here on every way out gives the name back.
        let reserved = Reserved {
            agent: self,
            name: name.to_owned(),
        };
        let record = self.ownership(name)?;
        match record.map(|r| r.state) {
            Some(
                OwnershipState::HandingOver
                | OwnershipState::HandedOver
                | OwnershipState::GivenBack,
            ) => Err(Failure::new(
                "NOT_OWNER",
                format!(
                    "{name} was given to another host; remove its ownership record only if that host has ended it"
                ),
            )),
            _ => Ok(reserved),
        }
    }

    /// What this host knows of who owns a guest.
    fn ownership(&self, name: &str) -> Result<Option<Ownership>, Failure> {
        let record = self.records.read(name);
        record.map_err(|e| Failure::new("RECORD", format!("record of {name}: {e}")))
    }

    fn record_ownership(&self, name: &str, record: &Ownership) -> Result<(), Failure> {
        self.records
            .write(name, record)
            .map_err(|e| Failure::new("RECORD", format!("record of {name}: {e}")))
    }

    fn credentials(&self) -> Result<&HostCredentials, Failure> {
        self.identity.as_ref().ok_or_else(|| {
            Failure::new("IDENTITY", "this host has no identity for migration; add [identity] to the agent's configuration")
        })
    }

    /// The policy in force.
    fn policy(&self) -> Arc<HostPolicy> {
        self.authority.policy()
    }

    fn host_sign(&self, message: &[u8]) -> Result<AgentAnswer, RoleError> {
        self.credentials()
            .map_err(|e| role_error(&e.code, e.error))?
            .sign(message)
    }

    /// Whether a SEV guest launched here is served by the software secure processor. Where there is no other, a policy
    /// that forbids it must hear the truth.
    fn emulates(&self) -> bool {
        self.processor.is_some() || !sev::present()
    }

    /// What a guest launched here can have. For `auto` the strongest technology that the policy allows too, and whose
    /// reports a guest with this `vsock` gets.
    fn offer(&self, vsock: Option<u32>) -> Offer {
        use casemate_policy::Technology as Policy;
        let policy = self.policy();
        let allowed = &policy.technologies.allowed;
        let has_snp = self.processor.as_ref().is_some_and(Processor::has_snp);
        let emulated = self.emulates();
        let strongest = if !emulated {
            // More than this needs a firmware on a real processor.
            Strongest::Sev
        } else if has_snp && vsock.is_some() && allowed.contains(&Policy::SevSnp) {
            Strongest::SevSnp
        } else if allowed.contains(&Policy::SevEs) {
            Strongest::SevEs
        } else {
            Strongest::Sev
        };
        Offer {
            emulated,
            strongest,
        }
    }

    /// The secure processor as the VMM of a guest gets it: the software one's channels, or `/dev/sev`.
    fn processor_for(&self, plan: &MachinePlan) -> Result<Vec<(HandleKind, OwnedFd)>, Failure> {
        if !plan.technology.emulated() {
            sev::check_boot(plan)?;
            return sev::handles(plan, self.config.amd_certificates.as_deref());
        }
        let processor = self.processor.as_ref().ok_or_else(no_processor)?;
        let snp = processor::needs_messages(plan)?;
        processor.connect(snp).map(GuestLink::into_handles)
    }

    /// The emulated roots, besides this host's own, that policy trusts as targets.
    fn emulated_roots(&self) -> Vec<[u8; 32]> {
        self.policy()
            .migration
            .trusted_emulated_roots
            .iter()
            .map(|f| *f.as_bytes())
            .collect()
    }

    fn guest_folder(&self, name: &str) -> PathBuf {
        self.config.state_dir.join("guests").join(name)
    }

    fn fresh_tap(&self) -> String {
        format!("cm-{}", self.next_role.fetch_add(1, Ordering::Relaxed))
    }
}

/// A name kept for a launch under way.
struct Reserved<'a> {
    agent: &'a Agent,
    name: String,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        lock(&self.agent.starting).remove(&self.name);
    }
}

fn no_processor() -> Failure {
    Failure::new(
        "NO_PROCESSOR",
        "this host has no secure processor that can be used; see `casemate doctor`, or set `allow_emulated` in the policy",
    )
}
