//! Step 1: what each host can and cannot do.

use crate::answers::Diagnosis;
use crate::demo::Demo;
use crate::error::{E2eError, Result};

pub(crate) fn run(demo: &mut Demo) -> Result<()> {
    for site in [&demo.world.site_a, &demo.world.site_b] {
        let said = site.casemate(&["doctor"])?;
        let diagnosis: Diagnosis = serde_json::from_str(&said.stdout).map_err(|e| {
            E2eError::Answer(format!(
                "`casemate doctor --json`: {e}: {}{}",
                said.stdout, said.stderr
            ))
        })?;
        // Both sites are namespaces of one machine: said once.
        if site.name() == demo.world.site_a.name() {
            for subject in &diagnosis.checks {
                demo.screen.say(&format!(
                    "  {:<12} {:<9} {}",
                    subject.name, subject.status, subject.found
                ));
                if subject.status != "ok" && !subject.remedy.is_empty() {
                    demo.screen
                        .say(&format!("  {:<12} {:<9} mend: {}", "", "", subject.remedy));
                }
            }
        }
        let missing: Vec<_> = diagnosis
            .checks
            .iter()
            .filter(|c| c.status == "missing")
            .map(|c| c.name.as_str())
            .collect();
        let found = if missing.is_empty() {
            String::new()
        } else {
            format!("missing: {}", missing.join(", "))
        };
        let held = diagnosis.usable && said.status == 0 && !diagnosis.checks.is_empty();
        demo.table.check(
            1,
            &format!("{} can run confidential guests", site.name()),
            held,
            found,
        );
    }
    Ok(())
}
