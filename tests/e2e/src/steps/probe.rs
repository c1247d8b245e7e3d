//! Step 7: what must be refused was tried from inside, and was refused.

use crate::answers::{Probe, ProbeReport};
use crate::demo::Demo;
use crate::error::{E2eError, Result};
use crate::steps::GUEST_NAME;

pub(crate) fn run(demo: &mut Demo) -> Result<()> {
    let host = demo.guest()?.host;
    let running: Probe = demo
        .world
        .site(host)?
        .ask(&["sandbox", "probe", GUEST_NAME])?;
    judge(demo, "of a running guest", &["vmm"], &running.reports);
    let missing = || {
        Err(E2eError::Answer(
            "no progress event came, so nothing was probed".into(),
        ))
    };
    match demo.probe_in_move.take().unwrap_or_else(missing) {
        Ok(moving) => judge(
            demo,
            "during a migration",
            &["vmm", "mover"],
            &moving.reports,
        ),
        Err(error) => demo
            .table
            .check(7, "probe during a migration", false, error.to_string()),
    }
    let refused = |report: &ProbeReport| report.refused() as f64;
    let total: f64 = running.reports.iter().map(refused).sum();
    demo.table
        .figure("refused attempts from inside", total, "", false);
    Ok(())
}

fn judge(demo: &mut Demo, when: &str, roles: &[&str], reports: &[ProbeReport]) {
    for report in reports {
        let open: Vec<_> = report
            .attempts
            .iter()
            .filter(|a| !a.refused)
            .map(|a| a.what.as_str())
            .collect();
        let all = open.is_empty() && !report.attempts.is_empty();
        let found = format!(
            "{} of {} refused {}",
            report.refused(),
            report.attempts.len(),
            open.join(", ")
        );
        demo.table
            .check(7, &format!("{} {when}", report.role), all, found.trim_end());
    }
    for role in roles
        .iter()
        .filter(|role| !reports.iter().any(|r| r.role == **role))
    {
        demo.table
            .check(7, &format!("{role} {when}"), false, "it was not probed");
    }
}
