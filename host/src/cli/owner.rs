//! `casemate owner`: the guest owner's side, with keys of its own and no trust in the host.

use std::fs;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use casemate_attest::legacy::{
    ApiVersion, ChainError, GuestPolicy, LegacyChain, MeasureBlob, OwnerSession, TrustAnchors,
    VerifiedChain,
};
use casemate_attest::measure::LaunchDigest;
use casemate_attest::measure::guest::GuestDigest;
use casemate_attest::verify::{
    Component, PlatformEvidence, SevLaunchEvidence, SevLaunchExpected, Verdict, verify_sev_launch,
};
use serde::Serialize;

use crate::agent::api::{Answer, Failure, MeasurementInfo, Request};
use crate::agent::client::{Agent, ask};
use crate::agent::evidence::write_secret;
use crate::cli::args::OwnerCommand;
use crate::cli::{print_bytes, print_json, verdict};
use crate::machine::plan::MachinePlan;
use crate::machine::spec::{ConfidentialSpec, MachineSpec, Offer, Strongest};
use crate::vmm::boot::measured_boot::MeasuredBoot;
use crate::vmm::boot::{BootError, BootImage, measured};

/// Runs an owner's command.
pub fn run(agent: &Agent, command: OwnerCommand, json: bool) -> Result<u8, Failure> {
    match command {
        OwnerCommand::Session {
            platform,
            description,
            allow_emulated,
            out,
        } => session(&platform, &description, allow_emulated.as_deref(), &out),
        OwnerCommand::Release {
            name,
            description,
            session,
            platform,
            allow_emulated,
            secret,
        } => {
            let release = Release {
                name: &name,
                expected: Expected::of(&description)?,
                session: kept_session(&session)?,
                chain: verified_chain(&platform, allow_emulated.as_deref())?,
                allow_emulated: allow_emulated.is_some(),
                secret: read(&secret)?,
            };
            release.run(agent, json)
        }
        OwnerCommand::Measure { description } => measure(&description, json),
    }
}

/// What a description leads to, and nothing that a host says.
struct Described {
    confidential: ConfidentialSpec,
    digest: GuestDigest,
    components: Vec<Component>,
}

impl Described {
    fn read(description: &Path) -> Result<Self, Failure> {
        let spec = MachineSpec::load(description)
            .map_err(|e| Failure::new("DESCRIPTION", e.to_string()))?;
        let refuse = |problem: &str| {
            let text = format!("{} {problem}", description.display());
            Failure::new("DESCRIPTION", text)
        };
        if spec.confidential == ConfidentialSpec::Auto {
            return Err(refuse(
                "leaves the technology to the host; name one, so that there is one measurement to expect",
            ));
        }
        // Neither the identity nor whose processor serves is measured.
        let anywhere = Offer {
            emulated: false,
            strongest: Strongest::Sev,
        };
        let plan = spec.plan([0; 16], anywhere);
        let nothing = || refuse("describes no confidential guest; there is nothing to measure");
        let files = spec.boot.kernel().ok_or_else(nothing)?;
        let (kernel, initrd) = (read(&files.kernel)?, read(&files.initrd)?);
        if let Some(firmware) = spec.boot.firmware() {
            let parts = [read(&firmware.image)?, kernel, initrd];
            return Self::in_firmware(spec.confidential, &plan, &parts)
                .map_err(|e| refuse(&format!("cannot be launched: {}", chain(&e))));
        }
        let image = BootImage::assemble(&plan, &kernel, &initrd)
            .map_err(|e| Failure::new("DESCRIPTION", format!("{}: {e}", description.display())))?;
        let digest = measured::launch_digest(&plan, &image.pieces).ok_or_else(nothing)?;
        let registers = measured::vcpu_states(&plan).concat();
        let registers = (!registers.is_empty()).then_some(("vcpu-registers", registers.as_slice()));
        let parts = image
            .pieces
            .iter()
            .map(|part| (part.name, part.bytes.as_slice()))
            .chain(registers);
        Ok(Self {
            confidential: spec.confidential,
            digest,
            components: parts
                .map(|(name, bytes)| Component {
                    name: name.to_owned(),
                    digest: LaunchDigest::of(bytes),
                })
                .collect(),
        })
    }
}

impl Described {
    /// The same of a guest that starts in firmware: `parts` are firmware, kernel and initramfs.
    fn in_firmware(
        confidential: ConfidentialSpec,
        plan: &MachinePlan,
        parts: &[Vec<u8>; 3],
    ) -> Result<Self, BootError> {
        let [firmware, kernel, initrd] = parts;
        let boot = MeasuredBoot::new(plan, firmware, kernel, initrd)?;
        let registers = boot.registers().concat();
        let named = [
            ("firmware", firmware.as_slice()),
            ("kernel", kernel),
            ("initrd", initrd),
            ("cmdline", plan.cmdline.as_bytes()),
            ("vcpu-registers", &registers),
        ];
        let named = named.into_iter().filter(|(_, bytes)| !bytes.is_empty());
        Ok(Self {
            confidential,
            digest: boot.digest(),
            components: named
                .map(|(name, bytes)| Component {
                    name: name.to_owned(),
                    digest: LaunchDigest::of(bytes),
                })
                .collect(),
        })
    }
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// What LAUNCH_MEASURE must say of a SEV or SEV-ES guest.
struct Expected {
    policy: GuestPolicy,
    digest: LaunchDigest,
    components: Vec<Component>,
}

impl Expected {
    fn of(description: &Path) -> Result<Self, Failure> {
        let described = Described::read(description)?;
        match (&described.confidential, described.digest) {
            (
                ConfidentialSpec::Sev(sev) | ConfidentialSpec::SevEs(sev),
                GuestDigest::Sev(digest),
            ) => Ok(Self {
                policy: GuestPolicy::from_raw(sev.policy)
                    .map_err(|e| Failure::new("DESCRIPTION", e.to_string()))?,
                digest,
                components: described.components,
            }),
            _ => {
                let text = format!(
                    "{} describes a SEV-SNP guest, which takes no secret at its launch; it proves itself by a report: \
                     `casemate owner measure`, then `casemate attest verify` or `casemate broker`",
                    description.display()
                );
                Err(Failure::new("DESCRIPTION", text))
            }
        }
    }
}

struct Release<'a> {
    name: &'a str,
    expected: Expected,
    session: OwnerSession,
    chain: Result<VerifiedChain, ChainError>,
    allow_emulated: bool,
    secret: Vec<u8>,
}

#[derive(Serialize)]
struct ReleaseResult<'a> {
    verdict: &'a Verdict,
    released: bool,
}

impl Release<'_> {
    fn run(self, agent: &Agent, json: bool) -> Result<u8, Failure> {
        let request = Request::Measurement {
            name: self.name.to_owned(),
        };
        let Answer::Measurement(claimed) = ask(agent, &request, &mut |_| {})? else {
            return Err(Failure::new(
                "AGENT_LOST",
                "the agent answered something else",
            ));
        };
        let measurement = blob(&claimed)?;
        let verdict = self.verdict(&claimed, measurement)?;
        let released = verdict.accepted();
        if released {
            self.inject(agent, &measurement)?;
        }
        if json {
            print_json(&ReleaseResult {
                verdict: &verdict,
                released,
            })?;
        } else {
            print_bytes(table(&verdict, released).as_bytes())?;
        }
        Ok(verdict::exit_status(&verdict))
    }

    fn verdict(
        &self,
        claimed: &MeasurementInfo,
        measurement: MeasureBlob,
    ) -> Result<Verdict, Failure> {
        let evidence = SevLaunchEvidence {
            platform: match &self.chain {
                Ok(chain) => PlatformEvidence::Verified(chain),
                Err(error) => PlatformEvidence::Failed(error),
            },
            measurement,
            api: ApiVersion {
                major: claimed.api_major,
                minor: claimed.api_minor,
            },
            build: claimed.build,
            policy: GuestPolicy::from_raw(claimed.policy)
                .map_err(|e| Failure::new("MEASUREMENT", e.to_string()))?,
            claimed_components: Vec::new(),
        };
        let expected = SevLaunchExpected {
            digest: self.expected.digest,
            components: self.expected.components.clone(),
            policy: self.expected.policy,
            min_api: MIN_API,
            allow_emulated: self.allow_emulated,
        };
        Ok(verify_sev_launch(&evidence, &expected, &self.session))
    }

    fn inject(&self, agent: &Agent, measurement: &MeasureBlob) -> Result<(), Failure> {
        let page = secret_page(&self.secret)?;
        let packet = self
            .session
            .seal_secret(measurement, &page)
            .map_err(|e| Failure::new("SECRET", e.to_string()))?;
        let request = Request::InjectSecret {
            name: self.name.to_owned(),
            header: STANDARD.encode(packet.header.to_bytes()),
            ciphertext: STANDARD.encode(&packet.ciphertext),
        };
        ask(agent, &request, &mut |_| {}).map(drop)
    }
}

fn session(
    platform: &Path,
    description: &Path,
    allow: Option<&str>,
    out: &Path,
) -> Result<u8, Failure> {
    let expected = Expected::of(description)?;
    let chain = verified_chain(platform, allow)?
        .map_err(|e| Failure::new("PLATFORM_UNTRUSTED", e.to_string()))?;
    let (public, keys) = OwnerSession::create(&chain, expected.policy)
        .map_err(|e| Failure::new("OWNER_SESSION", e.to_string()))?;
    let failed = |e: std::io::Error| Failure::new("OUTPUT", format!("{}: {e}", out.display()));
    fs::create_dir_all(out).map_err(failed)?;
    write_secret(&out.join("owner.keys"), &keys.to_bytes()).map_err(failed)?;
    fs::write(out.join("owner.cert"), public.dh_cert.as_bytes()).map_err(failed)?;
    fs::write(out.join("session.bin"), public.session.to_bytes()).map_err(failed)?;
    let kind = if chain.emulated() {
        "emulated, NOT AMD"
    } else {
        "AMD"
    };
    print_bytes(
        format!(
            "session with a verified platform ({kind}) in {}\n",
            out.display()
        )
        .as_bytes(),
    )
}

fn measure(description: &Path, json: bool) -> Result<u8, Failure> {
    #[derive(Serialize)]
    struct Measured {
        launch_digest: String,
        components: Vec<Component>,
    }
    let expected = Described::read(description)?;
    if json {
        let launch_digest = expected.digest.to_string();
        return print_json(&Measured {
            launch_digest,
            components: expected.components,
        });
    }
    let mut text = format!("launch digest {}\n", expected.digest);
    for part in &expected.components {
        text.push_str(&format!("  {:<14} {}\n", part.name, part.digest));
    }
    print_bytes(text.as_bytes())
}

fn kept_session(folder: &Path) -> Result<OwnerSession, Failure> {
    OwnerSession::from_bytes(&read(&folder.join("owner.keys"))?)
        .map_err(|e| Failure::new("OWNER_SESSION", e.to_string()))
}

/// The outer error is a file or an argument that cannot be used; the inner is a chain that is not trusted.
pub(super) fn verified_chain(
    folder: &Path,
    allow: Option<&str>,
) -> Result<Result<VerifiedChain, ChainError>, Failure> {
    let mut trust = TrustAnchors::amd();
    if let Some(text) = allow {
        let refuse = || {
            Failure::new(
                "USAGE",
                format!("--allow-emulated wants sha256: and 64 hex digits, not {text:?}"),
            )
        };
        let digits = text.strip_prefix("sha256:").unwrap_or(text);
        let root = hex::decode(digits)
            .ok()
            .and_then(|b| <[u8; 32]>::try_from(b).ok())
            .ok_or_else(refuse)?;
        trust = trust
            .with_emulated_root(root)
            .map_err(|e| Failure::new("USAGE", e.to_string()))?;
    }
    let files = [
        read(&folder.join("pdh.cert"))?,
        read(&folder.join("platform.cert"))?,
        read(&folder.join("amd.cert"))?,
    ];
    let [pdh, platform, amd] = &files;
    Ok(LegacyChain::parse(pdh, platform, amd).and_then(|chain| chain.verify(&trust)))
}

/// What the guest finds in its secret page: the length in four bytes, little-endian, then the secret. Whole 16-byte blocks.
fn secret_page(secret: &[u8]) -> Result<Vec<u8>, Failure> {
    if secret.is_empty() || secret.len() > MAX_SECRET {
        return Err(Failure::new(
            "SECRET",
            format!(
                "a secret has 1 to {MAX_SECRET} bytes, this one has {}",
                secret.len()
            ),
        ));
    }
    let length = u32::try_from(secret.len()).map_err(|e| Failure::new("SECRET", e.to_string()))?;
    let mut page = length.to_le_bytes().to_vec();
    page.extend_from_slice(secret);
    page.resize(page.len().next_multiple_of(16), 0);
    Ok(page)
}

fn blob(claimed: &MeasurementInfo) -> Result<MeasureBlob, Failure> {
    let refuse = |e: &dyn std::fmt::Display| {
        Failure::new("MEASUREMENT", format!("the agent's measurement: {e}"))
    };
    let bytes = STANDARD.decode(&claimed.blob).map_err(|e| refuse(&e))?;
    MeasureBlob::from_bytes(&bytes).map_err(|e| refuse(&e))
}

fn table(verdict: &Verdict, released: bool) -> String {
    let outcome = if released {
        "secret released"
    } else {
        "secret NOT released"
    };
    let mark = verdict::mark(verdict);
    format!("{}{outcome}{mark}\n", verdict::table(verdict))
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    fs::read(path)
        .map_err(|e| Failure::new("FILE", format!("{} cannot be read: {e}", path.display())))
}

/// Largest secret in bytes.
const MAX_SECRET: usize = 2048;
/// The oldest firmware API an owner accepts here: the first whose measurement binds API and build.
const MIN_API: ApiVersion = ApiVersion {
    major: 0,
    minor: 17,
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_page_says_its_length_and_is_whole_blocks() {
        let page = secret_page(b"secret").unwrap();
        assert_eq!(page.len(), 16);
        assert_eq!(page.get(..10), Some(&b"\x06\0\0\0secret"[..]));
        assert!(secret_page(b"").is_err());
        assert!(secret_page(&[0; MAX_SECRET + 1]).is_err());
    }
}
