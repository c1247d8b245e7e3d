//! `casemate platform`: the secure processor of this host, and its owner's certificate authority.

use std::fs;
use std::path::{Path, PathBuf};

use casemate_attest::legacy::certificate::CERTIFICATE_LEN;
use casemate_attest::legacy::{Generation, SevCertificate};
use casemate_attest::processor::OwnerAuthority;
use casemate_attest::product::Product;
use casemate_attest::tcb::TcbVersion;
use clap::{Args, Subcommand};

use super::attest::files::{MAX_KEY_FILE, read};
use super::attest::tcb;
use super::{from_base64, owner, print_bytes, print_json, show, to_base64};
use crate::agent::api::{
    Answer, Failure, PlatformInfo, PlatformOrderText, ProcessorKind, Request, SnpCertificatesText,
};
use crate::agent::client::{Agent, ask};
use crate::agent::evidence::write_secret;

/// Which processor, and what to do with it.
#[derive(Debug, Args)]
pub struct PlatformArgs {
    /// Which secure processor; by default the one by which guests are launched: the software one where the host's
    /// policy allows it, else AMD's behind /dev/sev.
    #[arg(long, global = true, value_enum)]
    processor: Option<ProcessorKind>,
    /// What to do.
    #[command(subcommand)]
    command: PlatformCommand,
}

/// What can be asked of the secure processor.
#[derive(Debug, Subcommand)]
enum PlatformCommand {
    /// Status: firmware, owner, guests, SEV-ES, SEV-SNP with its TCB, and whether it is emulated.
    Show,
    /// Write its certificates for a guest owner.
    ///
    /// pdh.cert, platform.cert (PEK, OCA, CEK) and amd.cert (ASK, ARK) are those of the SEV API. With an emulated
    /// SEV-SNP there are ark.pem, ask.pem and vcek.pem as well; for a real one AMD's key service has them, and the
    /// command says how to fetch them.
    Export {
        /// The folder for them.
        #[arg(long)]
        out: PathBuf,
    },
    /// Print the chip's id (GET_ID), by which AMD's key service knows it.
    Id,
    /// Write the request that the platform's owner signs (PEK_CSR).
    Csr {
        /// The request, 2084 bytes.
        #[arg(long)]
        out: PathBuf,
    },
    /// Give the platform its owner (PEK_CERT_IMPORT); guests with the policy bit DOMAIN then stay with that owner.
    ///
    /// The platform must own itself and hold no guests. Its PDH changes: owners' sessions that are not used yet fail.
    Import {
        /// The owner's certificate: oca.cert of `oca new`.
        #[arg(long, value_name = "FILE")]
        oca: PathBuf,
        /// The signed request: what `oca sign` wrote.
        #[arg(long, value_name = "FILE")]
        pek: PathBuf,
    },
    /// The owner's certificate authority. Needs no agent; keep it off the hosts that it signs for.
    Oca {
        /// What to do.
        #[command(subcommand)]
        command: OcaCommand,
    },
    /// Make a new PDH (PDH_GEN). Owners' sessions that are not used yet fail; guests go on.
    PdhGen,
    /// Make a new PEK and PDH (PEK_GEN). Ends an owner's hold on the platform; refused while it holds guests.
    PekGen {
        #[command(flatten)]
        sure: Sure,
    },
    /// Forget owner, PEK and PDH (FACTORY_RESET); the chip's own key stays. Refused while it holds guests.
    FactoryReset {
        #[command(flatten)]
        sure: Sure,
    },
    /// SEV-SNP of the platform.
    Snp {
        /// What to do.
        #[command(subcommand)]
        command: SnpCommand,
    },
}

/// What an owner does with a certificate authority.
#[derive(Debug, Subcommand)]
enum OcaCommand {
    /// Make a certificate authority: oca.key (secret, mode 0600) and oca.cert.
    New {
        /// The folder for them; an authority that is there is not replaced.
        #[arg(long)]
        out: PathBuf,
    },
    /// Sign a platform's request.
    Sign {
        /// The request: what `casemate platform csr` wrote.
        #[arg(long, value_name = "FILE")]
        csr: PathBuf,
        /// The authority's folder.
        #[arg(long, value_name = "FOLDER")]
        oca: PathBuf,
        /// The signed request, for `casemate platform import --pek`.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// Sign only if the request is of this platform (folder made by `casemate platform export`) and its chip is
        /// endorsed by a trusted root. Without it anybody's request is signed.
        #[arg(long, value_name = "FOLDER")]
        platform: Option<PathBuf>,
        /// Accept this emulated root (sha256:…) of --platform.
        #[arg(long, value_name = "SHA256", requires = "platform")]
        allow_emulated: Option<String>,
    },
}

/// What SEV-SNP can be told.
#[derive(Debug, Subcommand)]
enum SnpCommand {
    /// Set what reports show (SNP_CONFIG). All three at once: what is not given is reset.
    Config {
        /// TCB version that reports show, at most the committed one: bl=10,tee=0,snp=23,ucode=84, and fmc=1 on Turin.
        /// By default the committed one.
        #[arg(long, value_name = "PARTS", value_parser = tcb)]
        reported_tcb: Option<TcbVersion>,
        /// Hide the chip's id in reports.
        #[arg(long)]
        mask_chip_id: bool,
        /// Do not sign reports with the chip's key (VCEK).
        #[arg(long)]
        mask_chip_key: bool,
    },
    /// Make the running firmware the lowest that may run (SNP_COMMIT). Cannot be taken back.
    Commit {
        #[command(flatten)]
        sure: Sure,
    },
    /// Load the VLEK of a cloud provider (SNP_VLEK_LOAD).
    VlekLoad {
        /// The wrapped hash stick from AMD's key service, 432 bytes.
        file: PathBuf,
    },
}

/// For what cannot be taken back.
#[derive(Debug, Args)]
struct Sure {
    /// Do it.
    #[arg(long, required = true)]
    yes: bool,
}

/// Runs one of them.
pub fn run(agent: &Agent, args: PlatformArgs, json: bool) -> Result<u8, Failure> {
    let host = HostProcessor {
        agent,
        processor: args.processor,
        json,
    };
    match args.command {
        PlatformCommand::Show => show(
            agent,
            &Request::Platform {
                processor: args.processor,
            },
            json,
        ),
        PlatformCommand::Export { out } => host.export(&out),
        PlatformCommand::Id => host.id(),
        PlatformCommand::Csr { out } => host.csr(&out),
        PlatformCommand::Import { oca, pek } => host.order(PlatformOrderText::Import {
            pek: to_base64(&read(&pek, CERTIFICATE_LEN)?),
            oca: to_base64(&read(&oca, CERTIFICATE_LEN)?),
        }),
        PlatformCommand::Oca { command } => oca(command, json),
        PlatformCommand::PdhGen => host.order(PlatformOrderText::PdhGen),
        PlatformCommand::PekGen { .. } => host.order(PlatformOrderText::PekGen),
        PlatformCommand::FactoryReset { .. } => host.order(PlatformOrderText::FactoryReset),
        PlatformCommand::Snp { command } => host.snp(command),
    }
}

/// The processor as an agent reaches it.
struct HostProcessor<'a> {
    agent: &'a Agent,
    processor: Option<ProcessorKind>,
    json: bool,
}

impl HostProcessor<'_> {
    fn order(&self, order: PlatformOrderText) -> Result<u8, Failure> {
        let processor = self.processor;
        let request = Request::PlatformOrder { processor, order };
        show(self.agent, &request, self.json)
    }

    fn bytes(&self, order: PlatformOrderText) -> Result<(Vec<u8>, bool), Failure> {
        let processor = self.processor;
        let request = Request::PlatformOrder { processor, order };
        match ask(self.agent, &request, &mut |_| {})? {
            Answer::Ordered(ordered) => Ok((from_base64(&ordered.bytes)?, ordered.emulated)),
            _ => Err(unexpected()),
        }
    }

    fn info(&self) -> Result<PlatformInfo, Failure> {
        let processor = self.processor;
        match ask(self.agent, &Request::Platform { processor }, &mut |_| {})? {
            Answer::Platform(info) => Ok(*info),
            _ => Err(unexpected()),
        }
    }

    fn snp(&self, command: SnpCommand) -> Result<u8, Failure> {
        match command {
            SnpCommand::Config {
                reported_tcb,
                mask_chip_id,
                mask_chip_key,
            } => {
                let reported_tcb = reported_tcb.map(|tcb| self.raw_tcb(tcb)).transpose()?;
                self.order(PlatformOrderText::SnpConfig {
                    reported_tcb,
                    mask_chip_id,
                    mask_chip_key,
                })
            }
            SnpCommand::Commit { .. } => self.order(PlatformOrderText::SnpCommit),
            SnpCommand::VlekLoad { file } => {
                let wrapped = to_base64(&read(&file, MAX_KEY_FILE)?);
                self.order(PlatformOrderText::SnpVlekLoad { wrapped })
            }
        }
    }

    /// A TCB version's bytes, whose order is the product's.
    fn raw_tcb(&self, tcb: TcbVersion) -> Result<String, Failure> {
        let snp = self.info()?.snp.ok_or_else(|| {
            let text = "this secure processor has no SEV-SNP; see `casemate platform show`";
            Failure::new("SNP_NOT_ENABLED", text)
        })?;
        let product: Option<Product> = snp.product.and_then(|name| name.parse().ok());
        let product = product.ok_or_else(|| {
            let text = "this processor's product is not known, and with it the order of a TCB version's bytes; \
                        update casemate";
            Failure::new("PRODUCT_UNKNOWN", text)
        })?;
        let raw = tcb.to_raw(product).ok_or_else(|| {
            let text =
                format!("{product} has no TCB version {tcb}: fmc is Turin's, and Turin's only");
            Failure::new("USAGE", text)
        })?;
        Ok(hex::encode(raw.0))
    }

    fn id(&self) -> Result<u8, Failure> {
        let (id, emulated) = self.bytes(PlatformOrderText::Id)?;
        let sockets: Vec<String> = id.chunks(SOCKET_ID).map(hex::encode).collect();
        if self.json {
            return print_json(&serde_json::json!({ "sockets": sockets, "emulated": emulated }));
        }
        print_bytes((sockets.join("\n") + "\n").as_bytes())
    }

    fn csr(&self, out: &Path) -> Result<u8, Failure> {
        let (csr, emulated) = self.bytes(PlatformOrderText::Csr)?;
        fs::write(out, &csr).map_err(|e| unwritable(out, &e))?;
        if self.json {
            return print_json(&serde_json::json!({ "file": out, "emulated": emulated }));
        }
        let text = format!(
            "{}; request written to {}\nsign it: casemate platform oca sign --csr {} --oca FOLDER --out FILE\n",
            kind(emulated),
            out.display(),
            out.display()
        );
        print_bytes(text.as_bytes())
    }

    fn export(&self, out: &Path) -> Result<u8, Failure> {
        let info = self.info()?;
        let processor = self.processor;
        let snp = match &info.snp {
            None => None,
            Some(_) => {
                let request = Request::SnpCertificates { processor };
                match ask(self.agent, &request, &mut |_| {})? {
                    Answer::SnpCertificates(certificates) => Some(certificates),
                    _ => return Err(unexpected()),
                }
            }
        };
        fs::create_dir_all(out).map_err(|e| unwritable(out, &e))?;
        let files = files(&info, snp.as_ref())?;
        for (name, bytes) in &files {
            let path = out.join(name);
            fs::write(&path, bytes).map_err(|e| unwritable(&path, &e))?;
        }
        let notes = self.notes(&info)?;
        if self.json {
            let names: Vec<&str> = files.iter().map(|(name, _)| *name).collect();
            return print_json(&serde_json::json!({
                "folder": out, "files": names, "notes": notes,
                "root_sha256": info.root_sha256, "emulated": info.emulated,
            }));
        }
        let mut text = format!(
            "{}; root sha256:{}\n",
            kind(info.emulated),
            info.root_sha256
        );
        text.push_str(&format!("written to {}\n", out.display()));
        for note in notes {
            text.push_str(&format!("note: {note}\n"));
        }
        print_bytes(text.as_bytes())
    }

    /// What the host itself cannot give, and where it is to be had.
    fn notes(&self, info: &PlatformInfo) -> Result<Vec<String>, Failure> {
        if info.emulated {
            return Ok(Vec::new());
        }
        let (id, _) = self.bytes(PlatformOrderText::Id)?;
        let chip = hex::encode(id.get(..SOCKET_ID).unwrap_or(&id));
        let mut notes = Vec::new();
        if info.amd.is_empty() {
            notes.push(
                "amd.cert is missing: this processor's generation is not known; name a file with AMD's ASK and \
                 ARK as `amd_certificates` in the agent's configuration"
                    .to_owned(),
            );
        }
        if !signed_by_amd(&from_base64(&info.platform)?) {
            notes.push(format!(
                "the chip's certificate has no signature of AMD's, which the processor does not keep: fetch \
                 https://kdsintf.amd.com/cek/id/{chip} and name the file as `chip_certificate` in \
                 the agent's configuration, then export again"
            ));
        }
        if let Some(snp) = &info.snp {
            let tcb = snp.reported_tcb.parts.map(fetch_tcb);
            let tcb = tcb.unwrap_or_else(|| "PARTS".to_owned());
            let product = snp.product.as_deref().unwrap_or("PRODUCT");
            notes.push(format!(
                "the VCEK and its issuers come from AMD's key service: casemate attest fetch --chip {chip} \
                 --product {product} --tcb {tcb} --cache FOLDER"
            ));
        }
        Ok(notes)
    }
}

fn files(
    info: &PlatformInfo,
    snp: Option<&SnpCertificatesText>,
) -> Result<Vec<(&'static str, Vec<u8>)>, Failure> {
    let mut files = vec![
        ("pdh.cert", from_base64(&info.pdh)?),
        ("platform.cert", from_base64(&info.platform)?),
    ];
    if !info.amd.is_empty() {
        files.push(("amd.cert", from_base64(&info.amd)?));
    }
    let Some(snp) = snp else { return Ok(files) };
    for (name, certificate) in [
        ("ark.pem", &snp.ark),
        ("ask.pem", &snp.ask),
        ("vcek.pem", &snp.vcek),
    ] {
        if let Some(text) = certificate {
            files.push((name, pem(&from_base64(text)?)));
        }
    }
    Ok(files)
}

fn signed_by_amd(platform: &[u8]) -> bool {
    let cek = platform.get(2 * CERTIFICATE_LEN..).unwrap_or_default();
    SevCertificate::parse(cek).is_ok_and(|cek| Generation::that_signed(&cek).is_some())
}

/// As `casemate attest fetch --tcb` takes it.
fn fetch_tcb(tcb: TcbVersion) -> String {
    let fmc = tcb.fmc.map(|fmc| format!("fmc={fmc},")).unwrap_or_default();
    let TcbVersion {
        boot_loader,
        tee,
        snp,
        microcode,
        ..
    } = tcb;
    format!("{fmc}bl={boot_loader},tee={tee},snp={snp},ucode={microcode}")
}

fn pem(der: &[u8]) -> Vec<u8> {
    let digits = to_base64(der);
    let mut text = b"-----BEGIN CERTIFICATE-----\n".to_vec();
    for line in digits.as_bytes().chunks(64) {
        text.extend_from_slice(line);
        text.push(b'\n');
    }
    text.extend_from_slice(b"-----END CERTIFICATE-----\n");
    text
}

fn oca(command: OcaCommand, json: bool) -> Result<u8, Failure> {
    match command {
        OcaCommand::New { out } => new_authority(&out, json),
        OcaCommand::Sign {
            csr,
            oca,
            out,
            platform,
            allow_emulated,
        } => {
            let request = read(&csr, CERTIFICATE_LEN)?;
            let request = SevCertificate::parse(&request)
                .map_err(|e| Failure::new("REQUEST", format!("{}: {e}", csr.display())))?;
            if let Some(folder) = &platform {
                check_request(&request, folder, allow_emulated.as_deref())?;
            }
            let key = zeroize::Zeroizing::new(read(&oca.join(OCA_KEY), MAX_KEY_FILE)?);
            let authority = OwnerAuthority::from_bytes(&key)
                .map_err(|e| Failure::new("OWNER_AUTHORITY", format!("{}: {e}", oca.display())))?;
            let signed = authority
                .sign_pek(&request)
                .map_err(|e| Failure::new("REQUEST", format!("{}: {e}", csr.display())))?;
            fs::write(&out, signed.as_bytes()).map_err(|e| unwritable(&out, &e))?;
            if json {
                return print_json(
                    &serde_json::json!({ "file": out, "checked": platform.is_some() }),
                );
            }
            let checked = match platform {
                Some(_) => "of the platform whose certificates were given",
                None => "NOT checked to be any particular platform's (no --platform)",
            };
            let text = format!(
                "signed the request, {checked}\nimport it there: casemate platform import --oca {} --pek {}\n",
                oca.join(OCA_CERT).display(),
                out.display()
            );
            print_bytes(text.as_bytes())
        }
    }
}

fn new_authority(out: &Path, json: bool) -> Result<u8, Failure> {
    let authority =
        OwnerAuthority::generate().map_err(|e| Failure::new("OWNER_AUTHORITY", e.to_string()))?;
    fs::create_dir_all(out).map_err(|e| unwritable(out, &e))?;
    let (key, certificate) = (out.join(OCA_KEY), out.join(OCA_CERT));
    write_secret(&key, &authority.to_bytes()).map_err(|e| unwritable(&key, &e))?;
    fs::write(&certificate, authority.certificate().as_bytes())
        .map_err(|e| unwritable(&certificate, &e))?;
    let sha256 = hex::encode(authority.certificate().fingerprint());
    if json {
        return print_json(&serde_json::json!({ "folder": out, "owner_sha256": sha256 }));
    }
    let text = format!(
        "owner sha256:{sha256}\n{} is secret (mode 0600); {} goes to the platforms\n",
        key.display(),
        certificate.display()
    );
    print_bytes(text.as_bytes())
}

/// The request's key is the PEK of a platform whose chip a trusted root endorses.
fn check_request(
    request: &SevCertificate,
    folder: &Path,
    allow: Option<&str>,
) -> Result<(), Failure> {
    let chain = owner::verified_chain(folder, allow)?
        .map_err(|e| Failure::new("PLATFORM_UNTRUSTED", e.to_string()))?;
    if request.public_key() == chain.pek().public_key() {
        return Ok(());
    }
    let text = format!(
        "the request is not of the platform in {}: another PEK; export and csr again, with nothing in between",
        folder.display()
    );
    Err(Failure::new("REQUEST", text))
}

fn kind(emulated: bool) -> &'static str {
    match emulated {
        true => "emulated, NOT AMD",
        false => "AMD",
    }
}

fn unexpected() -> Failure {
    Failure::new("AGENT_LOST", "the agent answered something else")
}

fn unwritable(path: &Path, error: &std::io::Error) -> Failure {
    let text = format!("{} cannot be written: {error}", path.display());
    Failure::new("OUTPUT", text)
}

/// Bytes of one socket's id.
const SOCKET_ID: usize = 64;
const OCA_KEY: &str = "oca.key";
const OCA_CERT: &str = "oca.cert";
