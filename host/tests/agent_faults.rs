//! What goes wrong in the middle of a move between two real agents: a process killed, the way cut or silent, at each
//! phase. In each case one side has the guest, it counts on without a gap, and the next move succeeds. Needs root.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::counter::{Story, run_counter};
use support::pair::{Pair, Way};
use support::{Host, Ran, until};

/// Phases before the commit that the source waits in, each for an answer that takes [`SLOW`].
const BEFORE: [&str; 4] = ["connect", "agree", "rounds", "manifest"];
/// What comes back takes so long, so that a phase lasts until something has been done about it.
const SLOW: Duration = Duration::from_millis(250);

#[test]
fn a_killed_mover_leaves_the_guest_where_it_was_and_the_next_move_succeeds() {
    let mut stage = Stage::new("mover");
    for phase in BEFORE {
        for at_source in [true, false] {
            if phase == "manifest" && !at_source {
                // Its word that all is well may be on the way already; then it is the commit's matter.
                continue;
            }
            stage.fails(phase, |from, to, _| {
                let host = if at_source { from } else { to };
                // Before the first answer the destination's may not have begun.
                until("a mover runs", || !host.roles_of("mover").is_empty());
                slay(&host.roles_of("mover"));
            });
            stage.moves();
        }
    }
}

#[test]
fn a_killed_vmm_of_the_destination_leaves_the_guest_where_it_was() {
    let mut stage = Stage::new("vmm");
    for phase in ["rounds", "manifest"] {
        stage.fails(phase, |_, to, _| slay(&to.roles_of("vmm")));
        stage.moves();
    }
}

#[test]
fn a_way_that_is_cut_leaves_the_guest_where_it_was_and_the_next_move_succeeds() {
    let mut stage = Stage::new("cut");
    for phase in BEFORE {
        stage.fails(phase, |_, _, way| way.cut());
        stage.moves();
    }
}

#[test]
fn a_way_that_falls_silent_in_the_rounds_is_given_up() {
    let mut stage = Stage::new("silent1");
    let ran = stage.fails("rounds", |_, _, way| way.silence());
    assert!(ran.err.contains("PEER_TIMEOUT"), "{ran:?}");
    stage.moves();
}

#[test]
fn a_way_that_falls_silent_in_the_pause_is_given_up_and_the_guest_goes_on() {
    let mut stage = Stage::new("silent2");
    let ran = stage.fails("manifest", |_, _, way| way.silence());
    assert!(ran.err.contains("PEER_TIMEOUT"), "{ran:?}");
    stage.moves();
}

/// From the commit on nobody knows until the destination is asked; the source holds its copy still until then.
#[test]
fn after_a_commit_without_an_answer_the_destination_says_who_has_the_guest() {
    for victim in ["mover", "way"] {
        let mut stage = Stage::new("commit");
        let ran = stage.attempt("commit", |from, _, way| match victim {
            "mover" => slay(&from.roles_of("mover")),
            _ => way.cut(),
        });
        let (here, there) = stage.sides();
        if victim == "way" {
            ran.refused(1, &["until the peer has been asked"]);
        }
        until("one side has it and the other not", || {
            there.runs("counter") != here.runs("counter")
        });
        if there.runs("counter") {
            assert!(here.listed("counter").is_none());
            stage.arrived();
        } else {
            until("nothing of it is left there", || {
                there.roles_of("vmm").is_empty()
            });
            stage.story.hear(&stage.pair.a, 10);
        }
        let nothing = stage.sides().0.run(&["settle", "counter"]);
        nothing.refused(1, &["NOT_IN_DOUBT"]);
        stage.moves();
    }
}

#[test]
fn a_commit_that_never_arrived_is_taken_back_when_the_destination_has_said_so() {
    let mut stage = Stage::new("lost");
    let ((here, there), (way, name)) = (stage.sides(), stage.way());
    way.slow(SLOW);
    let args = ["counter", "--to", name, "--no-throttle"];
    let ran = here.migrate(&args, |event| match event["phase"].as_str() {
        Some("manifest") => way.lose_what_follows_the_next_answer(),
        Some("commit") => {
            until("the guest has been given up", || {
                here.ownership("counter")["state"] == "handing-over"
            });
            // The commit is on its way to nowhere.
            std::thread::sleep(SLOW);
            slay(&here.roles_of("mover"));
        }
        _ => {}
    });
    let ran = ran.refused(1, &["was asked and does not have it", "runs on here"]);
    assert!(here.runs("counter"), "{ran:?}");
    let record = here.ownership("counter");
    assert_eq!(
        (record["state"].as_str(), record["epoch"].as_u64()),
        (Some("owner"), Some(1))
    );
    until("nothing of it is left there", || {
        there.roles_of("vmm").is_empty()
    });
    assert!(there.listed("counter").is_none());
    let answered = |host: &Host, action: &str| {
        let records = host.records();
        let mut settled = records.iter().filter(|record| record["action"] == action);
        settled.next_back().unwrap()["detail"]["answer"].clone()
    };
    assert_eq!(answered(here, "settle-out"), "never");
    assert_eq!(answered(there, "settle-in"), "never");
    way.mend();
    stage.story.hear(&stage.pair.a, 10);
    stage.moves();
}

#[test]
fn a_killed_agent_of_the_destination_leaves_the_guest_where_it_was() {
    let mut stage = Stage::new("agent");
    let b = stage.pair.b.pid();
    stage.fails("rounds", |_, _, _| slay(&[b]));
    stage.pair.b.end(Signal::SIGKILL);
    stage.pair.b.start();
    stage.moves();
}

/// With its agent, or its VMM, a guest ends: it must not come to life where it was going.
#[test]
fn a_guest_that_ends_in_its_move_runs_nowhere() {
    for victim in ["vmm", "agent"] {
        let mut stage = Stage::new("ends");
        let a = stage.pair.a.pid();
        stage.attempt("rounds", |from, _, _| match victim {
            "agent" => slay(&[a]),
            _ => slay(&from.roles_of("vmm")),
        });
        let pair = &mut stage.pair;
        pair.b.quiet(1);
        assert!(pair.b.listed("counter").is_none());
        if victim == "agent" {
            pair.a.end(Signal::SIGKILL);
            pair.a.start();
            assert!(pair.a.listed("counter").is_none());
        } else {
            assert!(!pair.a.runs("counter"));
            pair.a.run(&["stop", "counter"]).expect(0);
        }
        run_counter(&pair.a, "again");
    }
}

#[test]
fn twenty_times_there_and_back_without_a_gap() {
    let mut stage = Stage::new("twenty");
    for _ in 0..40 {
        stage.moves();
    }
    let counted = stage.story.hear(&stage.pair.a, 10);
    let epoch = stage.pair.a.listed("counter").unwrap()["epoch"].clone();
    assert_eq!(epoch, 41);
    eprintln!("40 moves, {counted} rounds counted");
}

/// A guest between two hosts.
struct Stage {
    pair: Pair,
    story: Story,
    at_a: bool,
}

impl Stage {
    fn new(tag: &str) -> Self {
        let pair = Pair::new(tag, ["", ""]);
        run_counter(&pair.a, "counter");
        let mut story = Story::of("counter");
        story.hear(&pair.a, 1);
        Self {
            pair,
            story,
            at_a: true,
        }
    }

    /// Where the guest is, and where it is to go.
    fn sides(&self) -> (&Host, &Host) {
        match self.at_a {
            true => (&self.pair.a, &self.pair.b),
            false => (&self.pair.b, &self.pair.a),
        }
    }

    fn way(&self) -> (&Way, &'static str) {
        match self.at_a {
            true => (&self.pair.there, "b"),
            false => (&self.pair.back, "a"),
        }
    }

    /// A slow move in which something happens when its source comes to a phase.
    fn attempt(&mut self, phase: &str, act: impl FnOnce(&Host, &Host, &Way)) -> Ran {
        let ((from, to), (way, name)) = (self.sides(), self.way());
        way.slow(SLOW);
        let mut act = Some(act);
        // Many rounds, so that the phase is not over at once.
        let args = [
            "counter",
            "--to",
            name,
            "--downtime-limit",
            "1",
            "--no-throttle",
        ];
        let ran = from.migrate(&args, |event| {
            if event["phase"] == phase
                && let Some(act) = act.take()
            {
                act(from, to, way);
            }
        });
        assert!(act.is_none(), "no phase {phase}: {ran:?}");
        way.mend();
        ran
    }

    /// The same, after which the guest is where it was and nothing of it elsewhere.
    #[track_caller]
    fn fails(&mut self, phase: &str, act: impl FnOnce(&Host, &Host, &Way)) -> Ran {
        let ran = self.attempt(phase, act).expect(1);
        let (from, to) = if self.at_a {
            (&self.pair.a, &self.pair.b)
        } else {
            (&self.pair.b, &self.pair.a)
        };
        assert!(from.runs("counter"), "{phase}: {ran:?}");
        self.story.hear(from, 10);
        until("nothing of it is left there", || {
            to.roles_of("vmm").is_empty()
        });
        ran
    }

    /// A move that succeeds, memory compared.
    #[track_caller]
    fn moves(&mut self) {
        let (_, name) = self.way();
        let ((from, to), args) = (self.sides(), ["counter", "--to", name, "--read-back"]);
        from.migrate(&args, |_| {}).expect(0);
        assert!(from.listed("counter").is_none());
        // Its agent hears of it when the source does.
        until("it is listed there", || to.runs("counter"));
        self.arrived();
    }

    /// The guest is on the other side now.
    #[track_caller]
    fn arrived(&mut self) {
        let (from, to) = if self.at_a {
            (&self.pair.a, &self.pair.b)
        } else {
            (&self.pair.b, &self.pair.a)
        };
        self.story.leave(from);
        self.story.hear(to, 3);
        self.at_a = !self.at_a;
    }
}

fn slay(processes: &[u32]) {
    assert!(!processes.is_empty(), "there is nobody to kill");
    for id in processes {
        let id = Pid::from_raw((*id).try_into().unwrap());
        // One that has ended by itself meanwhile is as dead.
        let _ = kill(id, Signal::SIGKILL);
    }
}
