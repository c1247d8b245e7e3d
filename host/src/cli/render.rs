//! Answers as tables for people.

use std::fmt::Write as _;

use crate::agent::api::moves::{MovePlan, Settled};
use crate::agent::api::{
    Answer, DefinitionInfo, DeviceName, DeviceStatus, GuestInfo, PlatformInfo, Rate, SnpInfo,
    StatsInfo, TaskInfo, TaskState,
};
use crate::sandbox::report::{ProbeReport, SandboxReport};

/// An answer as text, with a line end.
pub fn answer(answer: &Answer) -> String {
    match answer {
        Answer::Guest(guest) => one_guest(guest),
        Answer::Guests { guests } => guest_table(guests),
        Answer::Measurement(m) => {
            format!(
                "policy {:#x}, API {}.{} build {}{}\n",
                m.policy,
                m.api_major,
                m.api_minor,
                m.build,
                mark(m.emulated)
            )
        }
        Answer::Platform(info) => platform(info),
        Answer::SnpCertificates(found) => match &found.vcek {
            Some(_) => "SEV-SNP certificates; `casemate platform export` writes them\n".to_owned(),
            None => "AMD's key service has the SEV-SNP certificates\n".to_owned(),
        },
        Answer::Ordered(ordered) => format!("{}: {}\n", ordered.what, ordered.bytes),
        Answer::Migrated { outcome } => outcome_text(outcome),
        Answer::Assessed(plan) => plan_text(plan),
        Answer::Settled(settled) => settled_text(settled),
        Answer::Probe { reports } => reports.iter().map(probe).collect(),
        Answer::Sandbox { reports } => reports.iter().map(sandbox).collect(),
        Answer::Policy {
            version,
            digest,
            signers,
        } => format!(
            "policy version {version} is in force\n  sha256    {digest}\n  signers   {}\n",
            signers.join(", ")
        ),
        Answer::Upgraded(info) => format!(
            "{}: from casemate {} to {} (pid {}), stood still for {:.1} ms\n",
            info.name,
            info.from_version,
            info.version,
            info.pid,
            info.pause_us as f64 / 1000.0
        ),
        Answer::Snapshotted(info) => format!(
            "snapshot {} of generation {}: {} MiB in {}, {:.0} ms{}\n",
            info.snapshot_id,
            info.generation,
            (info.pages - info.zero_pages) >> 8,
            info.file.display(),
            info.pause_ms,
            match (info.stopped, info.template) {
                (true, true) => ", guest ended, a template",
                (true, false) => ", guest ended",
                (false, true) => ", a template",
                (false, false) => "",
            }
        ),
        Answer::EvidenceKey { key, old_key } => format!(
            "the ledger goes on under another key; auditors who have the old one need not act\n  new  {key}\n  old  {old_key}\n"
        ),
        Answer::EvidenceRetained { removed_to } => {
            format!("records from {removed_to} on are kept; proofs of the others stay\n")
        }
        Answer::Definition(one) => {
            format!(
                "{} is kept, as in {}\n",
                one.name,
                one.description.display()
            )
        }
        Answer::Definitions { definitions } => definition_table(definitions),
        Answer::Stats(stats) => stats_text(stats),
        Answer::Device(device) => device_text(device),
        // `casemate vm console` writes the bytes themselves.
        Answer::Console { next, .. } => format!("console: {next} bytes so far\n"),
        Answer::ConsoleOpened { socket } => format!("console: {}\n", socket.display()),
        Answer::Task(task) => one_task(task),
        Answer::Tasks { tasks } => task_table(tasks),
        Answer::Metrics { text } => text.clone(),
        Answer::Done => "done\n".to_owned(),
    }
}

/// The progress display of a migration.
#[derive(Debug, Default)]
pub struct Rounds {
    header_shown: bool,
    phase: String,
}

impl Rounds {
    /// The text for one progress event; empty when there is nothing new to show.
    pub fn line(&mut self, event: &serde_json::Value) -> String {
        let mut text = String::new();
        let phase = event
            .get("phase")
            .and_then(|p| p.as_str())
            .unwrap_or_default();
        if phase != self.phase {
            phase.clone_into(&mut self.phase);
            let _ = writeln!(text, "  phase {phase}");
        }
        let number = |key: &str| event.get(key).and_then(serde_json::Value::as_u64);
        if let (Some(round), Some(pages)) = (number("round"), number("pages")) {
            if !self.header_shown {
                self.header_shown = true;
                let _ = writeln!(
                    text,
                    "  round     pages       KiB  dirty pages/s   est. downtime ms"
                );
            }
            let bytes = number("bytes").unwrap_or(0);
            let rate = number("dirty_rate").unwrap_or(0);
            let estimate =
                number("estimated_downtime_ms").map_or_else(|| "-".to_owned(), |ms| ms.to_string());
            let _ = writeln!(
                text,
                "  {round:>5} {pages:>9} {:>9} {rate:>14} {estimate:>18}",
                bytes / 1024
            );
        }
        text
    }
}

fn device_text(device: &DeviceStatus) -> String {
    let mut text = format!("size        {} bytes\n", device.size);
    if device.held > 0 || device.returned > 0 {
        let _ = writeln!(
            text,
            "balloon     {} bytes held, {} bytes back with the host",
            device.held, device.returned
        );
    }
    let rates = [
        ("bytes", device.limits.bytes),
        ("operations", device.limits.operations),
    ];
    for (what, rate) in rates {
        if let Some(Rate { per_second, burst }) = rate {
            let _ = writeln!(text, "limit       {per_second} {what}/s, {burst} at once");
        }
    }
    text
}

fn platform(info: &PlatformInfo) -> String {
    let mut text = format!(
        "secure processor: API {}.{} build {}{}\n",
        info.api_major,
        info.api_minor,
        info.build,
        mark(info.emulated)
    );
    let owner = match &info.owner_sha256 {
        Some(sha256) => format!("sha256:{sha256}"),
        None if info.owned => "an outside one".to_owned(),
        None => "the platform itself".to_owned(),
    };
    let es = if info.sev_es {
        "initialised"
    } else {
        "not initialised"
    };
    let _ = writeln!(
        text,
        "  state         {}, {} guests",
        info.state, info.guests
    );
    let _ = writeln!(text, "  owner         {owner}");
    let _ = writeln!(text, "  SEV-ES        {es}");
    match &info.snp {
        None => text.push_str("  SEV-SNP       not initialised\n"),
        Some(snp) => snp_lines(&mut text, snp),
    }
    let root = match info.root_sha256.as_str() {
        "" => "root unknown; see `casemate platform export`".to_owned(),
        sha256 => format!("root sha256:{sha256}"),
    };
    text + &root + "\n"
}

fn snp_lines(text: &mut String, snp: &SnpInfo) {
    let product = snp.product.as_deref().unwrap_or("unknown product");
    let _ = writeln!(
        text,
        "  SEV-SNP       API {}.{} build {}, {product}, {} guests",
        snp.api_major, snp.api_minor, snp.build, snp.guests
    );
    for (name, tcb) in [
        ("current TCB", &snp.current_tcb),
        ("reported TCB", &snp.reported_tcb),
    ] {
        let shown = match &tcb.parts {
            Some(parts) => parts.to_string(),
            None => format!("0x{}", tcb.raw),
        };
        let _ = writeln!(text, "    {name:<13} {shown}");
    }
    let mask = |masked: bool| if masked { "masked" } else { "shown" };
    let key = match (snp.mask_chip_key, snp.vlek_loaded) {
        (_, true) => "VLEK loaded",
        (true, false) => "masked",
        (false, false) => "VCEK",
    };
    let _ = writeln!(
        text,
        "    reports       chip id {}, signing key {key}",
        mask(snp.mask_chip_id)
    );
}

fn outcome_text(outcome: &serde_json::Value) -> String {
    let mut text = "migrated; the destination runs the guest\n".to_owned();
    if let Some(fields) = outcome.as_object() {
        for (key, value) in fields {
            let _ = writeln!(text, "  {key:<22} {value}");
        }
    }
    text
}

fn settled_text(settled: &Settled) -> String {
    let Settled {
        name,
        peer,
        epoch,
        peer_has_it,
        runs_here,
    } = settled;
    match (peer_has_it, runs_here) {
        (true, _) => format!(
            "{name} has moved: {peer} was asked and has it under epoch {epoch}; the copy here has ended\n"
        ),
        (false, true) => {
            format!(
                "{name} has not moved: {peer} was asked and does not have it; it runs on here\n"
            )
        }
        (false, false) => format!(
            "{name} has not moved: {peer} was asked and does not have it; here it ended with the agent and may be started anew\n"
        ),
    }
}

fn plan_text(plan: &MovePlan) -> String {
    let mut text = format!(
        "{} could move to {}; nothing has moved\n",
        plan.name, plan.to
    );
    for check in &plan.checks {
        let _ = writeln!(text, "  {:<16} {}", check.check, check.found);
    }
    let _ = writeln!(
        text,
        "  {:<16} {} MiB, {} KiB of it hold anything, {} KiB/s written",
        "memory", plan.memory_mib, plan.populated_kib, plan.dirty_kib_per_s
    );
    let _ = writeln!(
        text,
        "  {:<16} {} KiB/s, round trip {:.1} ms",
        "way", plan.throughput_kib_per_s, plan.round_trip_ms
    );
    let _ = writeln!(
        text,
        "  {:<16} {} rounds, {:.0} ms, paused for {:.0} ms ({} asked for), {}, throttled to {} %, {} connections",
        "forecast",
        plan.rounds,
        plan.total_ms,
        plan.downtime_ms,
        plan.downtime_limit_ms,
        plan.convergence,
        plan.throttle_percent,
        plan.streams
    );
    text
}

fn one_guest(guest: &GuestInfo) -> String {
    let mut text = String::new();
    let _ = writeln!(text, "{} ({})", guest.name, state(guest));
    if let Some(reason) = &guest.stopped {
        let _ = writeln!(text, "  stopped by  {reason}");
    }
    let _ = writeln!(
        text,
        "  technology  {}{}",
        guest.technology,
        mark(guest.emulated)
    );
    let _ = writeln!(
        text,
        "  size        {} vCPU ({}), {} MiB",
        guest.vcpus,
        guest.cpu.name(),
        guest.memory_mib
    );
    let _ = writeln!(text, "  identity    {} epoch {}", guest.vm_id, guest.epoch);
    let _ = writeln!(
        text,
        "  vmm         casemate {}, pid {}",
        guest.vmm_version, guest.pid
    );
    let _ = writeln!(text, "  console     {}", guest.console.display());
    for one in &guest.attached {
        let (kind, id) = match &one.device {
            DeviceName::Disk(id) => ("disk", id.as_str()),
            DeviceName::Net(id) => ("card", id.as_str()),
            DeviceName::Balloon => ("balloon", ""),
            DeviceName::Console => ("console", ""),
        };
        let _ = writeln!(
            text,
            "  attached    slot {}: {kind} {id} ({})",
            one.slot, one.source
        );
    }
    if let Some(terminal) = &guest.terminal {
        let _ = writeln!(text, "  terminal    {}", terminal.display());
    }
    if let Some(vsock) = &guest.vsock {
        let _ = writeln!(text, "  vsock       {}", vsock.display());
    }
    for disk in &guest.disks {
        let _ = writeln!(text, "  disk {:<6} by {}", disk.id, disk.by);
    }
    if let Some(us) = guest.launch_us {
        let _ = writeln!(text, "  launched in {} ms", us / 1000);
    }
    text
}

fn guest_table(guests: &[GuestInfo]) -> String {
    let mut text = format!(
        "{:<20} {:<10} {:<14} {:>5} {:>8} {:>6}\n",
        "NAME", "STATE", "TECHNOLOGY", "VCPUS", "MIB", "EPOCH"
    );
    for guest in guests {
        let technology = if guest.emulated {
            format!("{} emulated", guest.technology)
        } else {
            guest.technology.clone()
        };
        let _ = writeln!(
            text,
            "{:<20} {:<10} {technology:<14} {:>5} {:>8} {:>6}",
            guest.name,
            state(guest),
            guest.vcpus,
            guest.memory_mib,
            guest.epoch
        );
    }
    text
}

fn definition_table(definitions: &[DefinitionInfo]) -> String {
    let mut text = format!("{:<20} {:<8} {}\n", "NAME", "PRESENT", "DESCRIPTION");
    for one in definitions {
        let present = if one.present { "yes" } else { "no" };
        let _ = writeln!(
            text,
            "{:<20} {present:<8} {}",
            one.name,
            one.description.display()
        );
    }
    text
}

fn stats_text(stats: &StatsInfo) -> String {
    format!(
        "{}\n  processor   {}.{:03} s\n  resident    {} MiB, guest memory included\n  threads     {}\n  console     {} bytes\n",
        stats.name,
        stats.cpu_ms / 1000,
        stats.cpu_ms % 1000,
        stats.resident_bytes >> 20,
        stats.threads,
        stats.console_bytes
    )
}

fn one_task(task: &TaskInfo) -> String {
    let mut text = format!("task {} ({})\n", task.id, task_state(task));
    let _ = writeln!(text, "  operation   {}", task.operation);
    if let Some(guest) = &task.guest {
        let _ = writeln!(text, "  guest       {guest}");
    }
    let _ = writeln!(text, "  asked by    {} at {}", task.asked_by, task.begun);
    if let Some(event) = &task.last_event {
        let _ = writeln!(text, "  last event  {event}");
    }
    if let Some(failure) = &task.failure {
        let _ = writeln!(text, "  failure     {failure}");
    }
    text
}

fn task_table(tasks: &[TaskInfo]) -> String {
    let mut text = format!(
        "{:<16} {:<10} {:<8} {:<20} {:<16} {}\n",
        "ID", "OPERATION", "STATE", "GUEST", "ASKED BY", "BEGUN"
    );
    for task in tasks {
        let _ = writeln!(
            text,
            "{:<16} {:<10} {:<8} {:<20} {:<16} {}",
            task.id,
            task.operation,
            task_state(task),
            task.guest.as_deref().unwrap_or("-"),
            task.asked_by,
            task.begun
        );
    }
    text
}

fn task_state(task: &TaskInfo) -> &'static str {
    match task.state {
        TaskState::Running => "running",
        TaskState::Done => "done",
        TaskState::Failed => "failed",
    }
}

fn probe(report: &ProbeReport) -> String {
    let mut text = format!("{}:\n", report.role);
    for attempt in &report.attempts {
        let verdict = if attempt.refused {
            "refused"
        } else {
            "NOT REFUSED"
        };
        let _ = writeln!(text, "  {:<44} {verdict} ({})", attempt.what, attempt.by);
    }
    let held = report.attempts.iter().filter(|a| a.refused).count();
    let _ = writeln!(text, "  {held} of {} refused", report.attempts.len());
    text
}

fn sandbox(report: &SandboxReport) -> String {
    let mut text = format!("{}: uid {} gid {}\n", report.role, report.uid, report.gid);
    let _ = writeln!(text, "  namespaces    {}", report.namespaces.join(" "));
    let capabilities = if report.capabilities.is_empty() {
        "none".to_owned()
    } else {
        report.capabilities.join(" ")
    };
    let _ = writeln!(
        text,
        "  capabilities  {capabilities}; no_new_privs {}",
        report.no_new_privs
    );
    let _ = writeln!(
        text,
        "  dumpable      {}; {} descriptors open",
        report.dumpable, report.descriptors
    );
    let _ = writeln!(
        text,
        "  landlock      ABI {}; {}; sha256:{}",
        report.landlock_abi,
        report.landlock.join("; "),
        report.landlock_sha256
    );
    for thread in &report.threads {
        let _ = writeln!(
            text,
            "  thread        {:<14} {} sha256:{}",
            thread.name, thread.filter, thread.filter_sha256
        );
    }
    text
}

fn state(guest: &GuestInfo) -> String {
    serde_json::to_value(guest.state)
        .ok()
        .and_then(|v| v.as_str().map(str::to_owned))
        .unwrap_or_default()
}

fn mark(emulated: bool) -> &'static str {
    if emulated { " (emulated, NOT AMD)" } else { "" }
}
