//! An SNP launch on the emulated secure processor, and the guest's report: what a host does with
//! the firmware, what the guest does, and what an owner can see in the result.
//!
//! ```text
//! cargo run --release -p casemate-attest --example snp_launch
//! ```

use casemate_attest::measure::id_block::{IdAuth, IdBlock, IdSigningKey};
use casemate_attest::measure::snp::{PageType, SnpLaunchDigester, VMSA_GPA};
use casemate_attest::processor::snp::{
    CaKeySize, GuestChannel, IdBlockParameters, KeyRequest, KeySelect, LaunchPage, Personality,
    SnpIdentity, SnpLaunchFinish, SnpLaunchStart, SnpProcessor,
};
use casemate_attest::report::{Report, SnpPolicy};
use std::error::Error;

const POLICY: SnpPolicy = SnpPolicy(0x3_0000);
const FIRMWARE_GPA: u64 = 0xffff_e000;
const SECRETS_GPA: u64 = 0x80_d000;

fn main() -> Result<(), Box<dyn Error>> {
    // The host: an installation of its own. 4096-bit keys, as AMD's, take some seconds to make.
    let identity = SnpIdentity::generate_with(CaKeySize::Rsa2048)?;
    println!("emulated root {}", hex::encode(identity.root_fingerprint()));
    let mut processor = SnpProcessor::new(identity, Personality::genoa())?;
    processor.init()?;

    // The owner: what will be launched, and a signed word on it.
    let (firmware, vcpu) = ([[0xf1; 4096], [0xf2; 4096]], [0x5a; 4096]);
    let mut digester = SnpLaunchDigester::new();
    digester.normal(FIRMWARE_GPA, &firmware);
    digester.without_content(PageType::Secrets, SECRETS_GPA, 1);
    digester.vmsa(&vcpu, 1);
    let expected = digester.finish();
    let key = IdSigningKey::from_pkcs8(&IdSigningKey::generate()?)?;
    let block = IdBlock {
        launch_digest: expected,
        family_id: *b"example family..",
        image_id: *b"example image...",
        guest_svn: 1,
        policy: POLICY,
    };
    let auth = IdAuth::sign(&block, &key, None)?;

    // The host: the launch, page by page. The firmware fills the secrets page.
    let handle = processor.gctx_create()?;
    let start = SnpLaunchStart {
        policy: POLICY,
        desired_tsc_khz: 0,
        gosvw: [0; 16],
    };
    processor.launch_start(handle, start)?;
    processor.activate(handle, 1)?;
    let guest = processor.guest(handle)?;
    for (mut page, gpa) in firmware.into_iter().zip((FIRMWARE_GPA..).step_by(4096)) {
        guest.launch_update(LaunchPage::new(PageType::Normal, gpa), &mut page)?;
    }
    let mut secrets = [0; 4096];
    guest.launch_update(
        LaunchPage::new(PageType::Secrets, SECRETS_GPA),
        &mut secrets,
    )?;
    let mut page = vcpu;
    guest.launch_update(LaunchPage::new(PageType::Vmsa, VMSA_GPA), &mut page)?;
    let finish = SnpLaunchFinish {
        id: Some(IdBlockParameters {
            block: &block.to_bytes(),
            auth: auth.as_bytes(),
            author_key_en: false,
        }),
        host_data: [0; 32],
        vcek_disabled: false,
    };
    processor.launch_finish(handle, &finish)?;

    // The guest: a report with the owner's nonce, and a key that only this image gets. The host
    // carries the messages and cannot read them.
    let mut channel = GuestChannel::new(&secrets, 0)?;
    let request = channel.report_request(&[0x4e; 64], 0, KeySelect::Any)?;
    let reply = processor.guest_request(handle, &request)?;
    let report = Report::parse(&channel.report(&reply)?)?;
    let measured = KeyRequest {
        fields: 1 << 3,
        ..KeyRequest::default()
    };
    let request = channel.key_request(&measured)?;
    let reply = processor.guest_request(handle, &request)?;
    let key = channel.key(&reply)?;

    // The owner: the parts of a verdict. The chain ends at a root that says NOT AMD.
    println!(
        "report        {}, {}",
        report.version(),
        report.signing_key()
    );
    println!("measurement   {}", hex::encode(report.measurement()));
    println!(
        "as expected   {}",
        report.measurement() == *expected.as_bytes()
    );
    println!("nonce         {}", report.report_data() == [0x4e; 64]);
    println!("derived key   {} bytes", key.len());
    let leaf = processor.endorsement(report.signing_key())?;
    println!(
        "leaf          {} bytes of DER, emulated",
        leaf.certificate().len()
    );
    Ok(())
}
