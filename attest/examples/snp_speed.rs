//! How fast the emulated SNP processor measures pages, beside plain SHA-384 over the same pages in
//! the same run; and what reports and installations cost.
//!
//! ```text
//! cargo run --release -p casemate-attest --example snp_speed
//! ```

use casemate_attest::measure::snp::PageType;
use casemate_attest::processor::snp::{
    CaKeySize, GuestChannel, KeySelect, LaunchPage, Personality, SnpIdentity, SnpLaunchFinish,
    SnpLaunchStart, SnpProcessor,
};
use casemate_attest::report::SnpPolicy;
use ring::digest::{SHA384, digest};
use std::error::Error;
use std::hint::black_box;
use std::time::{Duration, Instant};

const PAGES: usize = 16 << 10;
const ROUNDS: usize = 5;

fn main() -> Result<(), Box<dyn Error>> {
    let begun = Instant::now();
    let identity = SnpIdentity::generate_with(CaKeySize::Rsa4096)?;
    println!("installation with 4096-bit keys: {:.1?}", begun.elapsed());
    let mut processor = SnpProcessor::new(identity, Personality::genoa())?;
    processor.init()?;

    // Pages that differ, as a kernel's and an initrd's do.
    let mut pages = vec![[0u8; 4096]; PAGES];
    for (n, page) in pages.iter_mut().enumerate() {
        for (at, byte) in page.iter_mut().enumerate() {
            *byte = (n.wrapping_mul(31) ^ at) as u8;
        }
    }
    let (mut plain, mut launch) = (Duration::MAX, Duration::MAX);
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        for page in &pages {
            black_box(digest(&SHA384, page));
        }
        plain = plain.min(begun.elapsed());
        launch = launch.min(measure(&mut processor, &mut pages)?);
    }
    let rate = |time: Duration| PAGES as f64 / time.as_secs_f64();
    let mib = |time: Duration| rate(time) * 4096.0 / f64::from(1 << 20);
    println!("best of {ROUNDS}, {PAGES} pages each, one thread");
    println!(
        "plain SHA-384   {:>8.0} pages/s  {:>5.0} MiB/s",
        rate(plain),
        mib(plain)
    );
    println!(
        "LAUNCH_UPDATE   {:>8.0} pages/s  {:>5.0} MiB/s",
        rate(launch),
        mib(launch)
    );
    println!(
        "share of SHA-384's speed: {:.3}",
        rate(launch) / rate(plain)
    );
    reports(&mut processor)
}

fn started(
    processor: &mut SnpProcessor,
) -> Result<casemate_attest::processor::snp::SnpGuestHandle, Box<dyn Error>> {
    let handle = processor.gctx_create()?;
    let start = SnpLaunchStart {
        policy: SnpPolicy(0x3_0000),
        desired_tsc_khz: 0,
        gosvw: [0; 16],
    };
    processor.launch_start(handle, start)?;
    processor.activate(handle, 1)?;
    Ok(handle)
}

fn measure(
    processor: &mut SnpProcessor,
    pages: &mut [[u8; 4096]],
) -> Result<Duration, Box<dyn Error>> {
    let handle = started(processor)?;
    let guest = processor.guest(handle)?;
    let begun = Instant::now();
    for (page, gpa) in pages.iter_mut().zip((0x10_0000..).step_by(4096)) {
        guest.launch_update(LaunchPage::new(PageType::Normal, gpa), page)?;
    }
    let taken = begun.elapsed();
    processor.decommission(handle)?;
    Ok(taken)
}

fn reports(processor: &mut SnpProcessor) -> Result<(), Box<dyn Error>> {
    let handle = started(processor)?;
    let mut secrets = [0; 4096];
    let page = LaunchPage::new(PageType::Secrets, 0x1000);
    processor.guest(handle)?.launch_update(page, &mut secrets)?;
    let finish = SnpLaunchFinish {
        id: None,
        host_data: [0; 32],
        vcek_disabled: false,
    };
    processor.launch_finish(handle, &finish)?;
    let mut channel = GuestChannel::new(&secrets, 0)?;
    let mut ask = || -> Result<(), Box<dyn Error>> {
        let request = channel.report_request(&[0; 64], 0, KeySelect::Any)?;
        channel.report(&processor.guest_request(handle, &request)?)?;
        Ok(())
    };
    let begun = Instant::now();
    ask()?;
    println!(
        "first report, with the VCEK's certificate: {:.1?}",
        begun.elapsed()
    );
    let (begun, count) = (Instant::now(), 200);
    for _ in 0..count {
        ask()?;
    }
    println!("further reports: {:.2?} each", begun.elapsed() / count);
    Ok(())
}
