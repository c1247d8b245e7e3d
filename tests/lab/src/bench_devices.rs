//! `cargo bench-devices`: disk and card under Casemate, jailed and not, beside QEMU, all inside one lab.

use crate::{
    bench_boot::beside_qemu, error::Result, guest_image, paths::Paths, prepare::prepare, say,
    tasks::build,
};

/// Get what is missing, build, and measure; returns the exit status.
pub fn bench(paths: &Paths, runs: u32, json: bool) -> Result<i32> {
    prepare(paths, false)?;
    let packages = [
        "casemate",
        "casemate-guest",
        "casemate-agent",
        "casemate-bench",
    ];
    let code = build(paths, &packages)?;
    if code != 0 {
        return Ok(code);
    }
    guest_image::make(paths)?;
    say(&format!("measuring {runs} guests of each"));
    let program = paths.release.join("casemate-bench-devices");
    beside_qemu(paths, &program, &paths.guest_initrd(), runs, json)
}
