//! The cells of a running guest and of its migration, probed from inside; and a host that makes its own platform.

mod common;

use std::net::SocketAddr;
use std::thread;

use casemate_crypto_migrate::dev_ca::DevCa;
use casemate_e2e::answers::{Platform, Probe};
use casemate_e2e::cleanup::{Cleanup, Traces};
use casemate_e2e::network::{Network, SITE_A};
use casemate_e2e::site::{Site, SiteSpec};
use casemate_e2e::world::{DIRECT, Extent};
use common::*;

#[test]
fn whatever_is_tried_from_inside_is_refused() {
    let world = world("sandbox", Extent::Direct);
    let _guest = world.running_guest("vault").unwrap();
    assert_refused(
        &world.site_a.ask(&["sandbox", "probe", "vault"]).unwrap(),
        &["vmm", "psp"],
    );
    let probe = thread::scope(|scope| {
        let mut prober = None;
        let ask = || {
            world
                .site_a
                .ask::<Probe>(&["sandbox", "probe", "vault"])
                .unwrap()
        };
        let moved = world.site_a.migrate("vault", "site-b", &mut |_| {
            prober.get_or_insert_with(|| scope.spawn(ask));
        });
        moved.unwrap().report().unwrap();
        prober.unwrap().join().unwrap()
    });
    assert_refused(&probe, &["vmm", "mover", "psp"]);
    assert_ends_clean(world);
}

fn assert_refused(probe: &Probe, roles: &[&str]) {
    let probed: Vec<_> = probe.reports.iter().map(|r| r.role.as_str()).collect();
    assert_eq!(probed, roles);
    for report in &probe.reports {
        assert!(
            report.attempts.len() > 20,
            "{} tried {} things",
            report.role,
            report.attempts.len()
        );
        let open: Vec<_> = report.attempts.iter().filter(|a| !a.refused).collect();
        assert!(open.is_empty(), "{}: {open:?}", report.role);
    }
}

#[test]
fn a_host_makes_its_own_platform_and_keeps_it() {
    let (product, folder, cleanup) = (product(), folder("platform"), Cleanup::new());
    cleanup.folder(&folder).unwrap();
    let before = Traces::survey(&product.casemate);
    let network = Network::build().unwrap();
    let ca = DevCa::new("test").unwrap();
    let spec = SiteSpec {
        name: "lone",
        namespace: &network.site_a,
        listen: Some(SocketAddr::from((SITE_A, DIRECT))),
        material: &ca.issue("lone.casemate.test").unwrap(),
        authority: ca.certificate_pem(),
        platform: None,
        snp: None,
        trusted_roots: &[],
        peers: Vec::new(),
        disk: None,
        uid_base: 230_000,
    };
    let mut site = Site::start(&spec, &product.casemate, &folder, &cleanup).unwrap();
    site.wait_ready().unwrap();
    let made: Platform = site.ask(&["platform", "show"]).unwrap();
    assert!(made.emulated && made.root_sha256.len() == 64);
    site.stop().unwrap();
    site.start_agent().unwrap();
    site.wait_ready().unwrap();
    let kept: Platform = site.ask(&["platform", "show"]).unwrap();
    assert_eq!(made.root_sha256, kept.root_sha256);
    site.stop().unwrap();
    assert!(!site.folder().join("agent.sock").exists());
    let left = Traces::settle(
        &product.casemate,
        &before,
        std::time::Duration::from_secs(5),
    );
    assert!(left.iter().all(|l| !l.contains("lone")), "{left:?}");
    cleanup.end();
}
