//! The demo: the main job, whole, in nine steps.

use std::path::PathBuf;
use std::time::Instant;

use serde_json::Value;

use crate::answers::Probe;
use crate::cleanup::Cleanup;
use crate::connection::Connection;
use crate::error::{E2eError, Result};
use crate::guest_watch::GuestWatch;
use crate::owner::Session;
use crate::steps;
pub use crate::steps::evidence::EvidenceFolder;
use crate::table::{Machine, Screen, Table};
use crate::world::{Extent, Host, Product, World};

/// What to demonstrate, and how to say it.
#[derive(Clone, Debug)]
pub struct Options {
    /// Programs and images.
    pub product: Product,
    /// One JSON object last on stdout; everything for people on stderr.
    pub json: bool,
    /// An empty or absent folder for all files; removed at the end.
    pub work: Option<PathBuf>,
    /// Where the evidence stays.
    pub evidence: EvidenceFolder,
}

/// The state that steps hand on.
pub(crate) struct Demo {
    pub(crate) screen: Screen,
    pub(crate) table: Table,
    pub(crate) world: World,
    pub(crate) machine: Machine,
    pub(crate) guest: Option<Guest>,
    pub(crate) connection: Option<Connection>,
    pub(crate) probe_in_move: Option<Result<Probe>>,
    pub(crate) evidence: EvidenceFolder,
}

/// The guest of the demo.
pub(crate) struct Guest {
    pub(crate) session: Session,
    pub(crate) watch: GuestWatch,
    pub(crate) description: PathBuf,
    pub(crate) host: Host,
}

impl Demo {
    pub(crate) fn guest(&mut self) -> Result<&mut Guest> {
        self.guest
            .as_mut()
            .ok_or_else(|| E2eError::Answer("no guest was launched".into()))
    }

    pub(crate) fn connection(&self) -> Result<&Connection> {
        self.connection
            .as_ref()
            .ok_or_else(|| E2eError::Answer("no connection was opened".into()))
    }

    /// Whether times on this machine say nothing of hardware.
    pub(crate) fn emulated(&self) -> bool {
        self.machine.machine || self.machine.secure_processor
    }
}

/// Runs the demo; true if everything held. An error before the end is one more thing that did not hold.
pub fn run(options: &Options) -> Result<bool> {
    let begun = Instant::now();
    let screen = Screen { json: options.json };
    let cleanup = Cleanup::new();
    cleanup.on_signals()?;
    let folder = work_folder(options)?;
    screen.say("Casemate: launch, prove, move. Two sites in namespaces of their own, one guest.");
    let machine = Machine {
        machine: std::env::var_os("LAB_INSIDE").is_some(),
        secure_processor: true,
    };
    let built = World::build(&options.product, &folder, &cleanup, Extent::WithGateway);
    let world = match built {
        Ok(world) => world,
        Err(error) => {
            cleanup.end();
            let table = Table::new(screen);
            finish(&table, screen, begun, &machine, Some(&error.to_string()));
            return Ok(false);
        }
    };
    let mut demo = Demo {
        screen,
        table: Table::new(screen),
        world,
        machine,
        guest: None,
        connection: None,
        probe_in_move: None,
        evidence: options.evidence.clone(),
    };
    let error = perform(&mut demo, begun).err().map(|error| {
        screen.say(&format!("  FAILED {error}"));
        for site in [&demo.world.site_a, &demo.world.site_b]
            .into_iter()
            .chain(&demo.world.site_b_gw)
        {
            screen.say(&format!(
                "  the agent's log of {} ends:\n{}",
                site.name(),
                site.log_tail()
            ));
        }
        error.to_string()
    });
    let Demo {
        mut table,
        world,
        machine,
        connection,
        ..
    } = demo;
    drop(connection);
    let left = world.end();
    cleanup.end();
    match left {
        Ok(left) => table.check(
            9,
            "no process, tap, cgroup or file is left",
            left.is_empty(),
            left.join("; "),
        ),
        Err(error) => table.check(9, "the sites end", false, error.to_string()),
    }
    finish(&table, screen, begun, &machine, error.as_deref());
    Ok(table.ok() && error.is_none())
}

fn perform(demo: &mut Demo, begun: Instant) -> Result<()> {
    for (number, (title, step)) in (1u8..).zip(STEPS) {
        let at = begun.elapsed().as_secs();
        demo.screen
            .say(&format!("\n{number}. {title}  [at {at} s]"));
        step(demo)?;
        match number {
            LAUNCHED => steps::evidence::begin(demo)?,
            ATTACKED => steps::evidence::keep(demo)?,
            _ => {}
        }
    }
    demo.screen.say("\n9. What was measured");
    Ok(())
}

fn finish(table: &Table, screen: Screen, begun: Instant, machine: &Machine, error: Option<&str>) {
    let elapsed = begun.elapsed();
    screen.say(&format!("\n{}", table.render(elapsed)));
    if machine.machine {
        screen.say(
            "  The machine is emulated: times say how the parts compare, not how fast hardware is.",
        );
    }
    if machine.secure_processor {
        screen.say("  The secure processor is a software one: it protects nothing from this host.");
    }
    screen.say(if table.ok() && error.is_none() {
        "\nAll of it held."
    } else {
        "\nNot all of it held."
    });
    if screen.json {
        let object: Value = table.json(elapsed, error, machine);
        println!("{object}");
    }
}

/// A folder of our own: what lies in one that was named is somebody's.
fn work_folder(options: &Options) -> Result<PathBuf> {
    let Some(folder) = &options.work else {
        return Ok(std::env::temp_dir().join(format!("casemate-demo-{}", std::process::id())));
    };
    let folder = std::path::absolute(folder).map_err(crate::error::io("find the work folder"))?;
    let empty = std::fs::read_dir(&folder).map_or(true, |mut entries| entries.next().is_none());
    if empty {
        Ok(folder)
    } else {
        Err(E2eError::Answer(format!(
            "--work {} is not empty, and all in it would be removed at the end",
            folder.display()
        )))
    }
}

type Step = fn(&mut Demo) -> Result<()>;

const STEPS: [(&str, Step); 8] = [
    (
        "What the hosts can do (`casemate doctor`)",
        steps::doctor::run,
    ),
    (
        "Launch on site-a: a stock Linux guest under SEV",
        steps::launch::run,
    ),
    (
        "The owner: measure, compare, only then release the secret",
        steps::owner::run,
    ),
    ("The workload", steps::workload::run),
    ("Live migration to site-b, and back", steps::migrate::run),
    (
        "The attack drill: a relay with a valid certificate",
        steps::attack::run,
    ),
    ("The sandbox, probed from inside", steps::probe::run),
    (
        "The evidence: handed over, verified, forged",
        steps::evidence::run,
    ),
];
const LAUNCHED: u8 = 2;
const ATTACKED: u8 = 6;
