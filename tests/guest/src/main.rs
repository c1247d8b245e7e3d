//! The guest's half of the demo and the tests: `/init` of a stock Debian kernel, agent and self-checking workload in one
//! static program.
//!
//! It is process 1, started by the kernel from an initramfs that holds nothing else but this program,
//! `/bin/casemate-agent` and, optionally, `/modules/*.ko` with their load order in `/modules/load` (one file name a line). What it does is chosen on the kernel
//! command line, see [`options`]; what it says on the console begins with `guest: `, a line at a time:
//!
//! ```text
//! guest: up kernel=6.1.0-41-cloud-amd64 vcpus=2 memory_mib=480
//! guest: secret sha256=<64 hex digits>
//! guest: ready
//! guest: tick 1 2040
//! ```
//!
//! Process 1 must never exit: every part runs on its own thread, a panic is printed and the part started again.

mod boot;
mod console;
mod control;
mod devices;
mod disk;
mod echo;
mod fork;
mod hotplug;
mod lines;
mod load;
mod memory;
mod options;
mod pattern;
mod power;
mod report;
mod secret;
mod state;
mod supervise;
mod sys;
mod ticker;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use console::say;
use options::Options;
use state::State;

fn main() -> ExitCode {
    if std::process::id() != 1 {
        eprintln!(
            "casemate-guest is /init of a guest: it loads modules and overwrites /dev/vda. Boot it from an initramfs."
        );
        return ExitCode::from(2);
    }
    boot::mount_all();
    console::open();
    supervise::report_panics();
    if let Err(payload) = std::panic::catch_unwind(start) {
        drop(payload); // the hook has printed it
        say!("FATAL: the start was cut short");
    }
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

/// Brings everything up; afterwards only threads run.
fn start() {
    let options = Options::from_command_line(&boot::command_line());
    for problem in &options.problems {
        say!("option ignored: {problem}");
    }
    say!("up {}", boot::describe());
    boot::load_modules();
    if let Some(host) = options.load {
        boot::network(options.address);
        load::run(host);
        return;
    }
    let secret = options.secret.and_then(secret::take);
    say!(
        "secret {}",
        secret
            .as_deref()
            .map_or_else(|| "none".to_owned(), |digest| format!("sha256={digest}"))
    );
    let state = Arc::new(State::new(secret, options.exit));

    ticker::spawn(&state);
    memory::spawn(&state, options.dirty_mib, options.dirty_pages_per_tick);
    disk::spawn(&state);
    fork::keep(options.address);
    boot::network(options.address);
    echo::spawn(&state);
    devices::spawn();
    control::spawn(&state);
    power::spawn();
    say!("ready");
}
