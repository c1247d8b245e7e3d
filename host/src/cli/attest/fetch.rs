//! `casemate attest fetch`: fills a cache on a connected machine, carries a bundle to one that is not.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;
use std::time::SystemTime;

use casemate_attest::chain::SnpTrust;
use casemate_attest::kds::{
    BaseUrl, Bundle, Cache, Client, Event, Item, KdsError, Lack, Limits, Origin, Request,
    RequestError, Source, VcekId, product_of,
};
use casemate_attest::product::Product;
use casemate_attest::report::{REPORT_LEN, Report, SigningKey};
use casemate_attest::tcb::{TcbPart, TcbVersion};
use clap::Args;
use serde::Serialize;

use super::shared::{TrustArgs, read, usage};
use crate::agent::api::Failure;
use crate::cli::{print_bytes, print_json};

/// What to fetch, and where to.
#[derive(Debug, Args)]
pub struct FetchArgs {
    /// Reports (1184 bytes each) that are to be verified.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    report: Vec<PathBuf>,
    /// A chip id, as reports show it.
    #[arg(long, value_name = "HEX", requires_all = ["product", "tcb"])]
    chip: Option<String>,
    /// The product (milan, genoa, turin): of --chip, of reports of version 2, or alone for its chains.
    #[arg(long, value_name = "NAME")]
    product: Option<Product>,
    /// The TCB version of --chip: bl=10,tee=0,snp=23,ucode=84, and fmc=1 on Turin.
    #[arg(long, value_name = "PARTS", requires = "chip", value_parser = tcb)]
    tcb: Option<TcbVersion>,
    /// Also fetch the revocation lists.
    #[arg(long)]
    crl: bool,
    /// The cache folder; read first, written to.
    #[arg(long, value_name = "DIR", env = "CASEMATE_KDS_CACHE")]
    cache: Option<PathBuf>,
    /// Write what was obtained to a file, for a machine that is not connected.
    #[arg(long, value_name = "FILE")]
    bundle: Option<PathBuf>,
    /// Verify a bundle and take it into the cache.
    #[arg(long, value_name = "BUNDLE", requires = "cache",
          conflicts_with_all = ["report", "chip", "product", "crl", "bundle", "base_url", "offline", "refresh"])]
    import: Option<PathBuf>,
    /// The key service: AMD's own, or a mirror, which needs no trust.
    #[arg(long, value_name = "URL")]
    base_url: Option<String>,
    /// Ask nobody; say what the cache has.
    #[arg(long, requires = "cache", conflicts_with_all = ["base_url", "refresh"])]
    offline: bool,
    /// Ask again for what is cached.
    #[arg(long)]
    refresh: bool,
    #[command(flatten)]
    trust: TrustArgs,
}

/// Runs the command.
pub fn run(args: &FetchArgs, json: bool) -> Result<u8, Failure> {
    let trust = args.trust.trust()?;
    let at = args.trust.clock();
    let cache = args.cache.as_ref().map(Cache::at);
    let outcome = match &args.import {
        Some(bundle) => import(bundle, cache.as_ref(), &trust, at)?,
        None => fetch(args, cache.as_ref(), &trust, at)?,
    };
    if json {
        print_json(&outcome)?;
    } else {
        print_bytes(outcome.table().as_bytes())?;
    }
    Ok(outcome.status())
}

fn import(
    file: &std::path::Path,
    cache: Option<&Cache>,
    trust: &SnpTrust,
    at: SystemTime,
) -> Result<Outcome, Failure> {
    let mut outcome = Outcome::default();
    let mut source = Source::new(trust);
    if let Some(cache) = cache {
        source = source.with_cache(cache);
    }
    let items = Bundle::read(file)
        .map_err(KdsError::from)
        .and_then(|bundle| source.import(&bundle, at));
    match items {
        Ok(items) => items.iter().for_each(|item| outcome.add(item, cache)),
        Err(error) => outcome.fail(file.display().to_string(), &error),
    }
    Ok(outcome)
}

fn fetch(
    args: &FetchArgs,
    cache: Option<&Cache>,
    trust: &SnpTrust,
    at: SystemTime,
) -> Result<Outcome, Failure> {
    if cache.is_none() && args.bundle.is_none() {
        return Err(usage("nothing would be kept; give --cache or --bundle"));
    }
    let mut outcome = Outcome::default();
    let requests = wanted(args, &mut outcome)?;
    let client = match args.offline {
        true => None,
        false => Some(Client::new(base(args)?, Limits::default())),
    };
    let mut source = Source::new(trust)
        .with_progress(&tell)
        .refreshing(args.refresh);
    if let Some(cache) = cache {
        source = source.with_cache(cache);
    }
    if let Some(client) = &client {
        source = source.with_client(client);
    }
    let mut bundle = Bundle::default();
    for (at_item, request) in requests.iter().enumerate() {
        if client.is_some() {
            say(&format!("[{}/{}] {request}", at_item + 1, requests.len()));
        }
        match source.obtain(request, at) {
            Ok(item) => {
                outcome.add(&item, cache);
                bundle.insert(item.request, item.body);
            }
            Err(error) => outcome.fail(request.to_string(), &error),
        }
    }
    if let Some(file) = args.bundle.as_ref().filter(|_| !bundle.is_empty()) {
        match bundle.write(file) {
            Ok(()) => outcome.bundle = Some(file.clone()),
            Err(error) => outcome.fail(file.display().to_string(), &error.into()),
        }
    }
    Ok(outcome)
}

/// What is to be had, each once: for a report or a chip its chain, its leaf, and the list if asked for.
fn wanted(args: &FetchArgs, outcome: &mut Outcome) -> Result<Vec<Request>, Failure> {
    let mut wanted = Wanted {
        crl: args.crl,
        ..Wanted::default()
    };
    for file in &args.report {
        let bytes = read(file, REPORT_LEN)?;
        let report = match Report::parse(&bytes) {
            Ok(report) => report,
            Err(error) => {
                outcome.refuse(file.display().to_string(), "REPORT", error.to_string());
                continue;
            }
        };
        let refused = |error: RequestError| (file.display().to_string(), KdsError::from(error));
        if let Ok(product) = product_of(&report, args.product) {
            wanted.of_product(product, report.signing_key());
        }
        match VcekId::of_report(&report, args.product) {
            Ok(id) => wanted.add(Request::Vcek(id)),
            Err(error) => {
                let (file, error) = refused(error);
                outcome.fail(file, &error);
            }
        }
    }
    match (&args.chip, args.product, args.tcb) {
        (Some(chip), Some(product), Some(tcb)) => {
            let chip =
                hex::decode(chip).map_err(|e| usage(format!("--chip is not hexadecimal: {e}")))?;
            let id = VcekId::new(product, &chip, tcb).map_err(|e| usage(e.to_string()))?;
            wanted.of_product(product, SigningKey::Vcek);
            wanted.add(Request::Vcek(id));
        }
        (None, Some(product), None) if args.report.is_empty() => {
            wanted.of_product(product, SigningKey::Vcek);
            wanted.of_product(product, SigningKey::Vlek);
        }
        _ if args.report.is_empty() => {
            return Err(usage("give --report, --chip, --product or --import"));
        }
        _ => {}
    }
    Ok(wanted.requests)
}

#[derive(Default)]
struct Wanted {
    requests: Vec<Request>,
    paths: std::collections::HashSet<String>,
    crl: bool,
}

impl Wanted {
    fn of_product(&mut self, product: Product, key: SigningKey) {
        self.add(Request::Chain { product, key });
        if self.crl {
            self.add(Request::Crl { product, key });
        }
    }

    fn add(&mut self, request: Request) {
        if self.paths.insert(request.path()) {
            self.requests.push(request);
        }
    }
}

fn base(args: &FetchArgs) -> Result<BaseUrl, Failure> {
    args.base_url.as_ref().map_or_else(
        || Ok(BaseUrl::amd()),
        |text| text.parse().map_err(|e: RequestError| usage(e.to_string())),
    )
}

/// `bl=10,tee=0,snp=23,ucode=84`, each part once, `fmc` where the product has it.
pub(in crate::cli) fn tcb(text: &str) -> Result<TcbVersion, String> {
    let mut levels = [None; TcbPart::ALL.len()];
    for part in text.split(',') {
        let refused =
            || format!("`{part}` is no part=level with fmc, bl, tee, snp or ucode and 0 to 255");
        let (name, level) = part.split_once('=').ok_or_else(refused)?;
        let at = TCB_NAMES.iter().position(|known| *known == name.trim());
        let level: u8 = level.trim().parse().map_err(|_| refused())?;
        let slot = at.and_then(|at| levels.get_mut(at)).ok_or_else(refused)?;
        if slot.replace(level).is_some() {
            return Err(format!("`{name}` is given twice"));
        }
    }
    let [
        fmc,
        Some(boot_loader),
        Some(tee),
        Some(snp),
        Some(microcode),
    ] = levels
    else {
        return Err("bl, tee, snp and ucode are all needed".to_owned());
    };
    Ok(TcbVersion {
        fmc,
        boot_loader,
        tee,
        snp,
        microcode,
    })
}

/// Progress, on the error output; nobody has to read it.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

fn tell(event: &Event<'_>) {
    match event {
        Event::Asking { url, attempt: 1 } => say(&format!("  asking {url}")),
        Event::Asking { attempt, .. } => say(&format!("  asking again ({attempt})")),
        Event::Waiting { reason, wait } => {
            say(&format!("  {}; waiting {:.0?}", reason.code(), wait));
        }
        Event::Refused(error) => say(&format!("  {error}")),
    }
}

/// What became of each item.
#[derive(Debug, Default, Serialize)]
struct Outcome {
    items: Vec<Row>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bundle: Option<PathBuf>,
    /// Whether anything is from an emulated root.
    emulated: bool,
}

#[derive(Debug, Serialize)]
struct Row {
    item: String,
    result: Outcoming,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    emulated: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Outcoming {
    Fetched,
    Cached,
    Imported,
    Unavailable,
    Unverified,
}

impl Outcome {
    fn add(&mut self, item: &Item, cache: Option<&Cache>) {
        self.emulated |= item.emulated;
        self.items.push(Row {
            item: item.request.to_string(),
            result: match item.origin {
                Origin::Fetched => Outcoming::Fetched,
                Origin::Cached => Outcoming::Cached,
                Origin::Imported => Outcoming::Imported,
            },
            file: cache.map(|cache| cache.file(&item.request)),
            code: None,
            error: None,
            emulated: item.emulated,
        });
    }

    fn fail(&mut self, item: String, error: &KdsError) {
        let result = match error.lack() {
            Lack::Unavailable => Outcoming::Unavailable,
            Lack::Unverified => Outcoming::Unverified,
        };
        self.push(item, result, error.code(), error.to_string());
    }

    fn refuse(&mut self, item: String, code: &str, error: String) {
        self.push(item, Outcoming::Unverified, code, error);
    }

    fn push(&mut self, item: String, result: Outcoming, code: &str, error: String) {
        self.items.push(Row {
            item,
            result,
            file: None,
            code: Some(code.to_owned()),
            error: Some(error),
            emulated: false,
        });
    }

    fn status(&self) -> u8 {
        let any = |result| self.items.iter().any(|row| row.result == result);
        if any(Outcoming::Unverified) {
            EXIT_UNVERIFIED
        } else if any(Outcoming::Unavailable) {
            EXIT_UNAVAILABLE
        } else {
            0
        }
    }

    fn table(&self) -> String {
        let mut text = String::new();
        for row in &self.items {
            let result = format!("{:?}", row.result).to_lowercase();
            let mark = if row.emulated {
                " (emulated, NOT AMD)"
            } else {
                ""
            };
            let _ = write!(text, "{result:<12} {}{mark}", row.item);
            let _ = match (&row.code, &row.error) {
                (Some(code), Some(error)) => writeln!(text, "\n{:<13}{code}: {error}", ""),
                _ => writeln!(text),
            };
        }
        if let Some(bundle) = &self.bundle {
            let _ = writeln!(text, "bundle       {}", bundle.display());
        }
        text
    }
}

/// As [`TcbPart::ALL`], in the words of the key service's addresses.
const TCB_NAMES: [&str; TcbPart::ALL.len()] = ["fmc", "bl", "tee", "snp", "ucode"];

/// Something was had that is not what it should be.
const EXIT_UNVERIFIED: u8 = 1;
/// Something could not be had.
const EXIT_UNAVAILABLE: u8 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tcb_version_is_named_part_by_part() {
        let turin = tcb("bl=1, tee=2,snp=3,ucode=255,fmc=4").unwrap();
        assert_eq!(
            turin.to_string(),
            "fmc 4, boot_loader 1, tee 2, snp 3, microcode 255"
        );
        assert_eq!(tcb("bl=1,tee=2,snp=3,ucode=4").unwrap().fmc, None);
        for wrong in [
            "",
            "bl=1,tee=2,snp=3",
            "bl=1,tee=2,snp=3,ucode=256",
            "bl=1,tee=2,snp=3,ucode=4,ucode=5",
            "bl=1,tee=2,snp=3,ucode=4,other=5",
            "bl,tee,snp,ucode",
        ] {
            assert!(tcb(wrong).is_err(), "{wrong}");
        }
    }
}
