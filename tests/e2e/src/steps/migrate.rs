//! Step 5: to site-b and back while the guest works.

use std::time::Duration;

use serde_json::Value;

use crate::announcement::Announcements;
use crate::answers::MoveReport;
use crate::demo::Demo;
use crate::error::Result;
use crate::network::GUEST;
use crate::site::Moved;
use crate::steps::{GUEST_NAME, workload};
use crate::table::Screen;
use crate::world::{GUEST_MAC, Host};

pub(crate) fn run(demo: &mut Demo) -> Result<()> {
    let there = go(demo, Host::A, Host::B, "site-b")?;
    figures(
        demo,
        &there,
        ["migration to site-b", "downtime", "throughput"],
    );
    let stall = demo.connection()?.held().longest;
    demo.table.figure(
        "longest stall of the TCP connection",
        stall.as_secs_f64() * 1000.0,
        "ms",
        demo.machine.machine,
    );
    let back = go(demo, Host::B, Host::A, "site-a")?;
    figures(
        demo,
        &back,
        [
            "migration back to site-a",
            "downtime back",
            "throughput back",
        ],
    );
    Ok(())
}

/// Moves the guest and checks that it did not notice.
fn go(demo: &mut Demo, from: Host, to: Host, peer: &str) -> Result<MoveReport> {
    let source = demo.world.site(from)?;
    demo.screen.say(&format!("  {} to {peer}", source.name()));
    demo.connection()?.measure_anew();
    let mut announcements = Announcements::listen(demo.world.site(to)?.namespace())?;
    let mut rounds = Rounds::new(demo.screen);
    let report = source
        .migrate(GUEST_NAME, peer, &mut |event| rounds.see(event))?
        .report()?;
    rounds.end();
    let found = format!(
        "{} rounds, {} pages, {:.1} MiB, {} ms, down {:.0} ms, {}",
        report.rounds,
        report.pages,
        report.bytes as f64 / f64::from(1 << 20),
        report.total_ms,
        report.downtime_ms,
        report.tls_suite
    );
    let protected = report.path == "direct" && report.firmware_pages > 0;
    demo.table
        .check(5, &format!("moved to {peer}"), protected, found);
    let heard = announcements.heard(GUEST_MAC, GUEST, Duration::from_secs(5));
    demo.table.check(
        5,
        "announced by gratuitous ARP and RARP",
        heard.gratuitous_arp && heard.rarp,
        format!("{heard:?}"),
    );
    arrived(demo, to, 5)?;
    Ok(report)
}

/// The guest is at `to` now: nothing of it may be missing or twice.
pub(crate) fn arrived(demo: &mut Demo, to: Host, step: u8) -> Result<()> {
    let info = demo.world.status(to, GUEST_NAME)?;
    let guest = demo.guest()?;
    guest.host = to;
    guest.watch.moved_to(&info.console)?;
    unharmed(demo, step, "counter without gap or repeat")?;
    workload::check_inside(demo, step)
}

/// The guest counts on without a problem, and the connection lives.
pub(crate) fn unharmed(demo: &mut Demo, step: u8, name: &str) -> Result<()> {
    let guest = demo.guest()?;
    guest.watch.wait_ticks(10, Duration::from_secs(20))?;
    let (last, problems) = (
        guest.watch.last_tick.unwrap_or_default(),
        guest.watch.problems.clone(),
    );
    demo.table.check(
        step,
        name,
        problems.is_empty(),
        format!("at {last} {}", problems.join("; ")).trim_end(),
    );
    let connection = demo.connection()?;
    let alive = connection.wait_lines(3, Duration::from_secs(20));
    let found = match &alive {
        Ok(()) => format!("longest stall {} ms", connection.held().longest.as_millis()),
        Err(error) => error.to_string(),
    };
    demo.table
        .check(step, "the TCP connection is alive", alive.is_ok(), found);
    Ok(())
}

fn figures(demo: &mut Demo, report: &MoveReport, names: [&'static str; 3]) {
    let (emulated, [total, down, rate]) = (demo.emulated(), names);
    demo.table
        .figure(total, report.total_ms as f64, "ms", emulated);
    demo.table.figure(down, report.downtime_ms, "ms", emulated);
    demo.table
        .figure(rate, report.throughput / 1e6, "MB/s", emulated);
}

/// The progress display: a line a round.
pub(crate) struct Rounds {
    screen: Screen,
    titled: bool,
    last: Option<Value>,
}

impl Rounds {
    pub(crate) fn new(screen: Screen) -> Self {
        Self {
            screen,
            titled: false,
            last: None,
        }
    }

    /// One event of `casemate migrate --json`.
    pub(crate) fn see(&mut self, event: &Value) {
        let phase = event.get("phase").and_then(Value::as_str);
        if !matches!(phase, Some("rounds" | "final")) || number(event, "pages") <= 0.0 {
            return;
        }
        let known = self.last.as_ref().map(|last| number(last, "round"));
        if known.is_some_and(|known| known < number(event, "round")) {
            self.end();
        }
        self.last = Some(event.clone());
    }

    /// Shows the last round.
    pub(crate) fn end(&mut self) {
        let Some(event) = self.last.take() else {
            return;
        };
        if !std::mem::replace(&mut self.titled, true) {
            self.screen
                .say("  round      pages        MiB   dirty pages/s   est. downtime ms");
        }
        let downtime = event.get("estimated_downtime_ms").and_then(Value::as_f64);
        self.screen.say(&format!(
            "  {:>5} {:>10} {:>10.1} {:>15.0} {:>18}",
            number(&event, "round"),
            number(&event, "pages"),
            number(&event, "bytes") / f64::from(1 << 20),
            number(&event, "dirty_rate"),
            downtime.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.0}"))
        ));
    }
}

fn number(event: &Value, key: &str) -> f64 {
    event.get(key).and_then(Value::as_f64).unwrap_or_default()
}

/// The code of a refusal, with the relay's own word if there is none.
pub(crate) fn code(moved: &Moved) -> String {
    match moved {
        Moved::No(said) if said.code().is_empty() => said.stderr.trim().to_owned(),
        other => other.code().to_owned(),
    }
}
