//! How long a decision takes under so many owners' rules, each for a guest of its own, in CPU time.
//!
//! Run with `cargo run --release --example bench -p casemate-policy`.

use std::hint::black_box;
use std::time::Duration;

use casemate_policy::action::Action;
use casemate_policy::claims::{Actor, GuestClaims, Inquiry, Tcb};
use casemate_policy::{HostPolicy, Technology, decide};
use nix::time::{ClockId, clock_gettime};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("{:>8} {:>14} {:>14}", "rules", "launch, ns", "attest, ns");
    for rules in [1, 10, 100, 1_000, 2_500] {
        let policy = HostPolicy::parse("bench", &document(rules))?;
        let clock = "2026-06-01T00:00:00Z".parse()?;
        let name = format!("guest-{}", rules / 2);
        let launch = Action::Launch {
            technology: Technology::SevSnp,
            emulated: false,
            vcpus: 2,
            memory_mib: 512,
            policy_bits: 0x30000,
        };
        let attest = Action::Attest {
            technology: Technology::SevSnp,
            emulated: false,
            verified: true,
        };
        let mut times = [0, 0];
        for (time, action) in times.iter_mut().zip([launch, attest]) {
            let mut inquiry = Inquiry::new(Actor::Local { uid: 7 }, &name, action, clock);
            inquiry.guest = claims()?;
            if !decide(&policy, &inquiry).allowed {
                return Err(format!("{:?}", decide(&policy, &inquiry)).into());
            }
            let begun = worked()?;
            for _ in 0..ROUNDS {
                let _ = black_box(decide(black_box(&policy), black_box(&inquiry)));
            }
            *time = (worked()? - begun).as_nanos() / ROUNDS;
        }
        let [launch, attest] = times;
        println!("{rules:>8} {launch:>14} {attest:>14}");
    }
    Ok(())
}

/// The time that this thread has had a core: what else runs on the machine does not count.
fn worked() -> nix::Result<Duration> {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from)
}

fn claims() -> Result<GuestClaims, Box<dyn std::error::Error>> {
    Ok(GuestClaims {
        launch_digest: Some("a".repeat(96).parse()?),
        product: Some(casemate_policy::claims::Product::Milan),
        tcb: Some(Tcb {
            boot_loader: 4,
            microcode: 213,
            ..Tcb::default()
        }),
        policy_bits: Some(0x30000),
        vmpl: Some(0),
        nonce_matches: Some(true),
        evidence_age_s: Some(10),
        ..GuestClaims::default()
    })
}

/// An owner for each guest, and one for all.
fn document(rules: usize) -> String {
    let mut text = "version = 1\nnot_after = '2027-01-01T00:00:00Z'\n[host]\nname = 'h'\nsite = 's'\n[technologies]\nallowed = ['sev-snp']\n\
        [limits]\nmax_vcpus = 4\nmax_memory_mib = 1024\n[[person]]\nname = 'p'\nrole = 'operator'\nuid = 7\n"
        .to_owned();
    let digest = "a".repeat(96);
    for number in 0..rules {
        text.push_str(&format!(
            "[[guest]]\nowner = 'o{number}'\nnames = ['guest-{number}']\nlaunch_digests = ['{digest}']\nnonce = true\n\
             max_evidence_age_s = 300\nmax_vmpl = 1\nsites = ['s']\n[guest.tcb.milan]\nboot_loader = 4\nmicrocode = 200\n"
        ));
    }
    text.push_str("[[guest]]\nowner = 'all'\nnames = ['*']\nforbidden_policy_bits = 0x80000\n");
    text
}

const ROUNDS: u128 = 20_000;
