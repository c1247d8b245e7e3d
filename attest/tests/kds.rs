//! The key service's client, the cache and bundles, against a real HTTP server with real
//! certificates, and with an emulated root's where AMD's key would be needed.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

#[path = "common/kds_server.rs"]
mod kds_server;

use casemate_attest::chain::SnpTrust;
use casemate_attest::kds::{
    Bundle, Cache, Client, Collateral, Event, Item, KdsError, Lack, Limits, Origin, Pace, Request,
    Source, VcekId,
};
use casemate_attest::processor::snp::forge::{self, Authority, LeafSpec};
use casemate_attest::product::Product;
use casemate_attest::report::{Report, SigningKey};
use kds_server::{Answer, KdsServer};
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

const GENOA_CHAIN: Request = Request::Chain {
    product: Product::Genoa,
    key: SigningKey::Vcek,
};
const GENOA_CRL: Request = Request::Crl {
    product: Product::Genoa,
    key: SigningKey::Vcek,
};

fn vector(path: &str) -> Vec<u8> {
    std::fs::read(format!(
        "{}/tests/vectors/{path}",
        env!("CARGO_MANIFEST_DIR")
    ))
    .unwrap()
}

fn report(id: &str) -> Report {
    Report::parse(&vector(&format!("reports/{id}/report.bin"))).unwrap()
}

/// When the leaves of the vectors that are used here are valid.
fn clock() -> SystemTime {
    humantime::parse_rfc3339("2026-06-01T00:00:00Z").unwrap()
}

fn chain_of(product: &str, intermediate: &str) -> Vec<u8> {
    let part = |name: &str| vector(&format!("chains/{product}/{name}.pem"));
    [part(intermediate), part("ark")].concat()
}

fn genoa_leaf() -> Request {
    Request::Vcek(VcekId::of_report(&report("genoa-v5"), None).unwrap())
}

fn milan_leaf(id: &str) -> Request {
    Request::Vcek(VcekId::of_report(&report(id), Some(Product::Milan)).unwrap())
}

/// As AMD's service would.
fn amd(path: &str) -> Answer {
    let known = |request: &Request| request.path() == path;
    if known(&GENOA_CHAIN) {
        Answer::Body(chain_of("genoa", "ask"))
    } else if known(&genoa_leaf()) {
        Answer::Body(vector("reports/genoa-v5/vcek.der"))
    } else if known(&milan_leaf("milan-v2")) {
        Answer::Body(vector("reports/milan-v2/vcek.der"))
    } else {
        Answer::Status(404, vec![])
    }
}

/// Does not wait, and notes how long it would have.
#[derive(Clone, Default)]
struct NotedPace(Arc<Mutex<Vec<Duration>>>);

impl Pace for NotedPace {
    fn sleep(&self, wait: Duration) {
        self.0.lock().unwrap().push(wait);
    }

    fn random(&self) -> u64 {
        0
    }
}

impl NotedPace {
    fn waits(&self) -> Vec<u64> {
        self.0
            .lock()
            .unwrap()
            .iter()
            .map(Duration::as_secs)
            .collect()
    }
}

fn client(server: &KdsServer, pace: &NotedPace) -> Client {
    client_at(&server.base(), pace, Limits::default())
}

fn client_at(base: &str, pace: &NotedPace, limits: Limits) -> Client {
    Client::with_pace(base.parse().unwrap(), limits, Box::new(pace.clone()))
}

/// Asks a server for one thing, with a cache to see what stays in it.
fn ask(
    request: &Request,
    answer: impl Fn(&str, usize) -> Answer + Send + Sync + 'static,
) -> (Result<Item, KdsError>, Vec<u64>, usize) {
    let server = KdsServer::start(answer);
    let pace = NotedPace::default();
    let client = client(&server, &pace);
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::at(folder.path());
    let trust = SnpTrust::amd();
    let source = Source::new(&trust).with_client(&client).with_cache(&cache);
    let result = source.obtain(request, clock());
    assert_eq!(
        cache.file(request).exists(),
        result.is_ok(),
        "only what verified is kept"
    );
    (result, pace.waits(), server.asked().len())
}

fn refused(
    request: &Request,
    answer: impl Fn(&str, usize) -> Answer + Send + Sync + 'static,
) -> &'static str {
    let (result, waits, _) = ask(request, answer);
    let error = result.unwrap_err();
    assert!(waits.is_empty(), "{error} was asked again");
    error.code()
}

fn offline(cache: &Cache, request: &Request, at: SystemTime) -> Result<Item, KdsError> {
    let trust = SnpTrust::amd();
    Source::new(&trust).with_cache(cache).obtain(request, at)
}

#[test]
fn what_a_report_needs_is_fetched_once_and_found_offline() {
    let server = KdsServer::start(|path, _| amd(path));
    let pace = NotedPace::default();
    let client = client(&server, &pace);
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::at(folder.path());
    let trust = SnpTrust::amd();
    let online = Source::new(&trust).with_client(&client).with_cache(&cache);
    let report = report("genoa-v5");
    let found = |got: Collateral| {
        (
            got.leaf.as_der().to_vec(),
            got.intermediate,
            got.crl.is_some(),
        )
    };

    let first = found(online.collateral(&report, None, clock()).unwrap());
    assert_eq!(first.0, vector("reports/genoa-v5/vcek.der"));
    assert_eq!(first.1.common_name(), "SEV-Genoa");
    assert!(!first.2, "the service has no list, and that is no pass");
    assert_eq!(server.asked(), [genoa_leaf().path(), GENOA_CRL.path()]);

    let again = online.obtain(&genoa_leaf(), clock()).unwrap();
    assert_eq!(again.origin, Origin::Cached);
    assert_eq!(server.asked().len(), 2);
    let refresh = online.refreshing(true).obtain(&genoa_leaf(), clock());
    assert_eq!(refresh.unwrap().origin, Origin::Fetched);
    assert_eq!(server.asked().len(), 3);

    let offline = Source::new(&trust).with_cache(&cache);
    assert_eq!(
        found(offline.collateral(&report, None, clock()).unwrap()),
        first
    );
    let chain = online.obtain(&GENOA_CHAIN, clock()).unwrap();
    let text = String::from_utf8(chain.body).unwrap();
    assert_eq!(text.matches("BEGIN CERTIFICATE").count(), 2);
    assert_eq!(
        offline.obtain(&GENOA_CHAIN, clock()).unwrap().origin,
        Origin::Cached
    );
}

#[test]
fn a_report_that_does_not_name_its_product_is_found_in_the_cache() {
    let server = KdsServer::start(|path, _| amd(path));
    let client = client(&server, &NotedPace::default());
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::at(folder.path());
    let trust = SnpTrust::amd();
    let online = Source::new(&trust).with_client(&client).with_cache(&cache);
    let report = report("milan-v2");
    let code = |product| {
        online
            .collateral(&report, product, clock())
            .map(|got| got.leaf.product())
            .map_err(|e| e.code())
    };
    assert_eq!(code(None), Err("KDS_PRODUCT_UNKNOWN"));
    assert_eq!(code(Some(Product::Genoa)), Err("KDS_NOT_FOUND"));
    assert_eq!(code(Some(Product::Turin)), Err("KDS_CHIP_LENGTH"));
    assert_eq!(code(Some(Product::Milan)), Ok(Product::Milan));
    assert_eq!(code(None), Ok(Product::Milan));
    let vlek = VcekId::of_report(&self::report("milan-v3-vlek"), None);
    assert_eq!(vlek.unwrap_err().code(), "KDS_VLEK_NOT_SERVED");
    let other = VcekId::of_report(&self::report("genoa-v5"), Some(Product::Milan));
    assert_eq!(other.unwrap_err().code(), "KDS_PRODUCT_CONFLICT");
}

#[test]
fn a_busy_service_is_asked_again_when_it_says() {
    let (result, waits, asked) = ask(&genoa_leaf(), |path, before| match before {
        0 => Answer::Status(429, vec![("Retry-After", "7".into())]),
        1 => Answer::Status(429, vec![("Retry-After", "11".into())]),
        _ => amd(path),
    });
    assert_eq!(result.unwrap().origin, Origin::Fetched);
    assert_eq!((waits, asked), (vec![7, 11], 3));
    // Without a word from the service the waits double.
    let (result, waits, asked) = ask(&genoa_leaf(), |_, _| Answer::Status(500, vec![]));
    let error = result.unwrap_err();
    assert_eq!(
        (error.code(), error.lack()),
        ("KDS_BUSY", Lack::Unavailable)
    );
    assert!(error.to_string().contains("after 6 attempts"), "{error}");
    assert_eq!((waits, asked), (vec![1, 2, 4, 8, 16], 6));
    // A wait that is too long is not begun.
    let (result, waits, asked) = ask(&genoa_leaf(), |_, _| {
        Answer::Status(503, vec![("Retry-After", "3600".into())])
    });
    let error = result.unwrap_err();
    assert_eq!((error.code(), asked, waits.len()), ("KDS_BUSY", 1, 0));
    assert!(error.to_string().contains("asks to wait 1h"), "{error}");
}

#[test]
fn what_happens_is_told() {
    let server = KdsServer::start(|path, before| match before {
        0 => Answer::Status(502, vec![]),
        _ => amd(path),
    });
    let client = client(&server, &NotedPace::default());
    let told = Mutex::new(Vec::new());
    let progress = |event: &Event<'_>| {
        told.lock().unwrap().push(match event {
            Event::Asking { url, attempt } => format!("{attempt} {}", url.len()),
            Event::Waiting { reason, wait } => format!("{} {wait:?}", reason.code()),
            Event::Refused(error) => error.code().to_owned(),
        });
    };
    let trust = SnpTrust::amd();
    let source = Source::new(&trust)
        .with_client(&client)
        .with_progress(&progress);
    source.obtain(&GENOA_CHAIN, clock()).unwrap();
    let url = format!("{}{}", server.base(), GENOA_CHAIN.path()).len();
    let told = told.lock().unwrap();
    assert_eq!(
        *told,
        [format!("1 {url}"), "KDS_BUSY 1s".into(), format!("2 {url}")]
    );
}

#[test]
fn other_statuses_and_redirects_are_final() {
    let elsewhere = Arc::new(KdsServer::start(|path, _| amd(path)));
    let to = format!("{}{}", elsewhere.base(), genoa_leaf().path());
    for status in [301, 302, 307, 308] {
        let to = to.clone();
        let code = refused(&genoa_leaf(), move |_, _| {
            Answer::Status(status, vec![("Location", to.clone())])
        });
        assert_eq!(code, "KDS_REDIRECT");
    }
    assert!(elsewhere.asked().is_empty(), "a redirect was followed");
    for (status, code) in [
        (404, "KDS_NOT_FOUND"),
        (403, "KDS_STATUS"),
        (204, "KDS_STATUS"),
    ] {
        let answer = move |_: &str, _| Answer::Status(status, vec![]);
        assert_eq!(refused(&genoa_leaf(), answer), code);
    }
}

#[test]
fn answers_that_are_cut_too_long_or_too_slow_are_refused() {
    let cut = |_: &str, _| Answer::Truncated(vector("reports/genoa-v5/vcek.der"));
    let (result, waits, asked) = ask(&genoa_leaf(), cut);
    assert_eq!(result.unwrap_err().code(), "KDS_INTERRUPTED");
    assert_eq!(
        (waits.len(), asked),
        (5, 6),
        "a broken connection may hold later"
    );
    // The client is told the true length, and hangs up all the same.
    let long = |_: &str, _| Answer::Body(vec![0x30; 9 << 20]);
    assert_eq!(refused(&genoa_leaf(), long), "KDS_ANSWER_TOO_LONG");
    let endless = |_: &str, _| Answer::Endless;
    for request in [genoa_leaf(), GENOA_CHAIN, GENOA_CRL] {
        assert_eq!(refused(&request, endless), "KDS_ANSWER_TOO_LONG");
    }
    for slow in [Answer::Drip, Answer::DripHead] {
        let server = KdsServer::start(move |_, _| slow.clone());
        let limits = Limits {
            deadline: Duration::from_millis(200),
            ..Limits::default()
        };
        let client = client_at(&server.base(), &NotedPace::default(), limits);
        let error = client.get(&genoa_leaf(), &|_| ()).unwrap_err();
        assert_eq!(error.code(), "KDS_DEADLINE");
    }
}

#[test]
fn a_service_that_is_not_there_is_reported_with_the_way_out() {
    // A port that was free a moment ago, and where nobody listens now.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let base = format!("http://{}", free.local_addr().unwrap());
    drop(free);
    let pace = NotedPace::default();
    let client = client_at(&base, &pace, Limits::default());
    let error = client.get(&GENOA_CHAIN, &|_| ()).unwrap_err();
    assert_eq!(error.code(), "KDS_UNREACHABLE");
    assert!(error.to_string().contains("import a bundle"), "{error}");
    assert!(pace.waits().is_empty());
    // Something that speaks no TLS.
    let plain = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let base = format!("https://{}", plain.local_addr().unwrap());
    let answering = std::thread::spawn(move || {
        let (mut stream, _) = plain.accept().unwrap();
        let _ = stream.read(&mut [0; 1024]);
        let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
    });
    let client = client_at(&base, &pace, Limits::default());
    let error = client.get(&GENOA_CHAIN, &|_| ()).unwrap_err();
    assert_eq!(error.code(), "KDS_TLS", "{error}");
    answering.join().unwrap();
}

#[test]
fn what_is_not_amd_s_or_not_asked_for_is_refused() {
    let body = |bytes: Vec<u8>| move |_: &str, _: usize| Answer::Body(bytes.clone());
    let chain = |bytes| refused(&GENOA_CHAIN, body(bytes));
    assert_eq!(chain(chain_of("milan", "ask")), "KDS_OTHER_ANSWER");
    assert_eq!(chain(chain_of("genoa", "asvk")), "KDS_OTHER_ANSWER");
    let mixed = [
        vector("chains/genoa/ask.pem"),
        vector("chains/milan/ark.pem"),
    ]
    .concat();
    assert_eq!(chain(mixed), "KDS_OTHER_ANSWER");
    let turned = [
        vector("chains/genoa/ark.pem"),
        vector("chains/genoa/ask.pem"),
    ]
    .concat();
    assert_eq!(chain(turned), "ROOT_NOT_PINNED");
    let html = b"<!DOCTYPE html><html>sign in</html>".to_vec();
    assert_eq!(chain(html.clone()), "KDS_ANSWER_HTML");
    assert_eq!(
        chain(vector("reports/genoa-v5/vcek.der")),
        "KDS_ANSWER_NOT_PEM"
    );

    let leaf = |bytes| refused(&genoa_leaf(), body(bytes));
    assert_eq!(leaf(html.clone()), "KDS_ANSWER_HTML");
    assert_eq!(leaf(chain_of("genoa", "ask")), "KDS_ANSWER_NOT_DER");
    assert_eq!(
        leaf(vector("reports/milan-v2/vcek.der")),
        "KDS_OTHER_ANSWER"
    );
    // AMD's, of the same product and the same TCB version, but of another chip.
    let other_chip = body(vector("reports/milan-v2-b/vcek.der"));
    assert_eq!(
        refused(&milan_leaf("milan-v2"), other_chip),
        "KDS_OTHER_ANSWER"
    );
    // The right names and a signature that is not AMD's.
    let mut forged = vector("reports/genoa-v5/vcek.der");
    let last = forged.len() - 1;
    forged[last] ^= 1;
    assert_eq!(leaf(forged), "LEAF_SIGNATURE");
    let crl = |bytes| refused(&GENOA_CRL, body(bytes));
    assert_eq!(crl(html), "KDS_ANSWER_HTML");
    assert_eq!(crl(vector("reports/genoa-v5/vcek.der")), "CRL_MALFORMED");
}

#[test]
fn a_cached_file_is_verified_at_each_reading() {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::at(folder.path());
    let file = cache.file(&genoa_leaf());
    let code = || offline(&cache, &genoa_leaf(), clock()).unwrap_err().code();
    assert_eq!(code(), "KDS_NOT_CACHED");
    let good = vector("reports/genoa-v5/vcek.der");
    for at in (0..good.len()).step_by(61) {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        std::fs::write(&file, bad).unwrap();
        assert_eq!(code(), "KDS_CACHE_REFUSED", "byte {at}");
    }
    for bad in [&good[..700], b"", &[0x30; 100_000]] {
        std::fs::write(&file, bad).unwrap();
        assert_eq!(code(), "KDS_CACHE_REFUSED");
    }
    // Another chip's good certificate under this one's name.
    std::fs::write(&file, vector("reports/milan-v2/vcek.der")).unwrap();
    assert_eq!(code(), "KDS_CACHE_REFUSED");

    let server = KdsServer::start(|path, _| amd(path));
    let client = client(&server, &NotedPace::default());
    let told = Mutex::new(Vec::new());
    let progress = |event: &Event<'_>| {
        if let Event::Refused(error) = event {
            told.lock().unwrap().push(error.code());
        }
    };
    let trust = SnpTrust::amd();
    let online = Source::new(&trust)
        .with_client(&client)
        .with_cache(&cache)
        .with_progress(&progress);
    let mended = online.obtain(&genoa_leaf(), clock()).unwrap();
    assert_eq!(mended.origin, Origin::Fetched);
    assert_eq!(*told.lock().unwrap(), ["KDS_CACHE_REFUSED"]);
    assert_eq!(std::fs::read(&file).unwrap(), good);
    // Before it was issued it is not valid, from wherever it comes.
    let early = humantime::parse_rfc3339("2026-01-01T00:00:00Z").unwrap();
    let error = offline(&cache, &genoa_leaf(), early).unwrap_err();
    assert_eq!(error.code(), "KDS_CACHE_REFUSED");
}

/// A lab: an emulated root with a service of its own.
struct Lab {
    trust: SnpTrust,
    leaf: Request,
    leaf_der: Vec<u8>,
    chain: Vec<u8>,
}

impl Lab {
    fn new() -> Self {
        let authority = Authority::shared();
        let root = authority.identity().root_fingerprint();
        let trust = SnpTrust::amd()
            .with_emulated_root(authority.ark(), &[root])
            .unwrap();
        let tcb = forge::tcb(Product::Genoa);
        let spec = LeafSpec::vcek(Product::Genoa, tcb, &[9; 64]);
        Self {
            trust,
            leaf: Request::Vcek(VcekId::new(Product::Genoa, &[9; 64], tcb).unwrap()),
            leaf_der: authority.leaf(&spec).certificate().to_vec(),
            chain: [pem(authority.ask()), pem(authority.ark())].concat(),
        }
    }
}

fn pem(der: &[u8]) -> Vec<u8> {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    format!("-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----\n").into_bytes()
}

/// A list made `made` days ago that holds for `holds` more.
fn crl(authority: &Authority, made: u64, holds: u64) -> Vec<u8> {
    authority.crl(|spec| {
        spec.this_update = forge::ago(made * 86_400);
        spec.next_update = Some(forge::ahead(holds * 86_400));
    })
}

#[test]
fn a_leaf_under_an_issuer_that_is_new_here_makes_its_chain_be_fetched() {
    let lab = Lab::new();
    let now = SystemTime::now();
    let (leaf_path, leaf_der, chain) = (lab.leaf.path(), lab.leaf_der.clone(), lab.chain.clone());
    let server = KdsServer::start(move |path, _| match path {
        path if path == leaf_path => Answer::Body(leaf_der.clone()),
        path if path == GENOA_CHAIN.path() => Answer::Body(chain.clone()),
        _ => Answer::Status(404, vec![]),
    });
    let client = client(&server, &NotedPace::default());
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::at(folder.path());
    let online = |trust| Source::new(trust).with_client(&client).with_cache(&cache);
    let untrusting = SnpTrust::amd();
    let error = online(&untrusting).obtain(&lab.leaf, now).unwrap_err();
    assert_eq!(
        (error.code(), error.lack()),
        ("EMULATION_MISMATCH", Lack::Unverified)
    );
    assert!(!cache.file(&lab.leaf).exists() && !cache.file(&GENOA_CHAIN).exists());
    online(&lab.trust).obtain(&lab.leaf, now).unwrap();
    let offline = Source::new(&lab.trust).with_cache(&cache);
    assert_eq!(offline.obtain(&lab.leaf, now).unwrap().body, lab.leaf_der);
    // What an emulated root signed is worth nothing to whoever has not named it.
    let error = Source::new(&untrusting)
        .with_cache(&cache)
        .obtain(&lab.leaf, now)
        .unwrap_err();
    assert_eq!(error.code(), "KDS_CACHE_REFUSED");
}

#[test]
fn a_revocation_list_is_kept_until_the_next_is_due_and_never_gives_way_to_an_older() {
    let lab = Lab::new();
    let authority = Authority::shared();
    let now = SystemTime::now();
    let old = crl(authority, 9, 90);
    let new = crl(authority, 2, 5);
    let serve = Arc::new(Mutex::new(new.clone()));
    let served = Arc::clone(&serve);
    let server = KdsServer::start(move |_, _| Answer::Body(served.lock().unwrap().clone()));
    let client = client(&server, &NotedPace::default());
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::at(folder.path());
    let offline = Source::new(&lab.trust).with_cache(&cache);
    let online = offline.with_client(&client);
    let asked = || server.asked().len();

    assert_eq!(online.obtain(&GENOA_CRL, now).unwrap().body, new);
    assert_eq!(
        online.obtain(&GENOA_CRL, now).unwrap().origin,
        Origin::Cached
    );
    assert_eq!(asked(), 1);
    // A mirror that goes back to an older list, which still holds, changes nothing.
    *serve.lock().unwrap() = old.clone();
    assert_eq!(
        online
            .refreshing(true)
            .obtain(&GENOA_CRL, now)
            .unwrap()
            .body,
        new
    );
    assert_eq!(asked(), 2);
    assert_eq!(offline.obtain(&GENOA_CRL, now).unwrap().body, new);
    // Past its next update it is asked for again, or said to be out of date.
    let later = now + Duration::from_secs(6 * 86_400);
    let error = offline.obtain(&GENOA_CRL, later).unwrap_err();
    assert_eq!(
        (error.code(), error.lack()),
        ("KDS_CACHE_STALE", Lack::Unavailable)
    );
    // For whoever verifies that is not the same as no list at all.
    let due = offline
        .crl(Product::Genoa, SigningKey::Vcek, later)
        .unwrap();
    let due = due.unwrap().next_update();
    assert!(now < due && due < later);
    let none = Source::new(&lab.trust).crl(Product::Genoa, SigningKey::Vcek, now);
    assert!(none.unwrap().is_none());
    assert_eq!(online.obtain(&GENOA_CRL, later).unwrap().body, old);
    assert_eq!(asked(), 3);

    let mut cut = new.clone();
    let last = cut.len() - 1;
    cut[last] ^= 1;
    for (body, code) in [
        (cut, "CRL_SIGNATURE"),
        (crl(Authority::other(), 1, 1), "CRL_SIGNATURE"),
        (
            authority.crl(|spec| spec.this_update = forge::ahead(3600)),
            "CRL_NOT_YET_VALID",
        ),
        (
            authority.crl(|spec| spec.next_update = Some(forge::ago(60))),
            "CRL_STALE",
        ),
    ] {
        *serve.lock().unwrap() = body;
        let fresh = Source::new(&lab.trust).with_client(&client);
        assert_eq!(fresh.obtain(&GENOA_CRL, now).unwrap_err().code(), code);
    }
}

fn bundle(items: &[(&Request, &[u8])]) -> Bundle {
    let mut bundle = Bundle::default();
    for (request, body) in items {
        bundle.insert((*request).clone(), body.to_vec());
    }
    Bundle::parse(&bundle.to_json().unwrap()).unwrap()
}

fn imported(bundle: &Bundle, dir: &Path) -> Result<usize, &'static str> {
    let trust = SnpTrust::amd();
    let cache = Cache::at(dir);
    let source = Source::new(&trust).with_cache(&cache);
    source
        .import(bundle, clock())
        .map(|items| items.len())
        .map_err(|e| e.code())
}

#[test]
fn a_bundle_enters_whole_and_verified_or_not_at_all() {
    let leaf = genoa_leaf();
    let chain = chain_of("genoa", "ask");
    let der = vector("reports/genoa-v5/vcek.der");
    let folder = tempfile::tempdir().unwrap();
    let count = || std::fs::read_dir(folder.path()).unwrap().count();

    // The bad one stands last, so that all others have verified by then.
    let last = milan_leaf("milan-v2");
    let mut forged = vector("reports/milan-v2/vcek.der");
    let end = forged.len() - 1;
    forged[end] ^= 1;
    for (body, code) in [
        (forged, "LEAF_SIGNATURE"),
        (vector("reports/milan-v2-b/vcek.der"), "KDS_OTHER_ANSWER"),
    ] {
        let bad = bundle(&[(&GENOA_CHAIN, &chain), (&leaf, &der), (&last, &body)]);
        assert_eq!(imported(&bad, folder.path()), Err(code));
        assert_eq!(count(), 0, "something of a bad bundle was kept");
    }
    let good = bundle(&[(&GENOA_CHAIN, &chain), (&leaf, &der)]);
    assert_eq!(imported(&good, folder.path()), Ok(2));
    let cache = Cache::at(folder.path());
    assert_eq!(offline(&cache, &leaf, clock()).unwrap().body, der);
}

#[test]
fn a_bundle_brings_the_issuer_of_its_leaves() {
    let lab = Lab::new();
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::at(folder.path());
    let source = Source::new(&lab.trust).with_cache(&cache);
    let alone = bundle(&[(&lab.leaf, &lab.leaf_der)]);
    let now = SystemTime::now();
    assert!(source.import(&alone, now).is_err());
    let both = bundle(&[(&lab.leaf, &lab.leaf_der), (&GENOA_CHAIN, &lab.chain)]);
    let items = source.import(&both, now).unwrap();
    assert!(items.iter().all(|item| item.origin == Origin::Imported));
    assert_eq!(
        source.obtain(&lab.leaf, now).unwrap().origin,
        Origin::Cached
    );
}

#[test]
fn many_threads_share_a_client_and_a_cache() {
    let server = KdsServer::start(|path, _| amd(path));
    let client = client(&server, &NotedPace::default());
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::at(folder.path());
    let trust = SnpTrust::amd();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let source = Source::new(&trust).with_client(&client).with_cache(&cache);
                let refresh = source.refreshing(true);
                for _ in 0..4 {
                    refresh.obtain(&genoa_leaf(), clock()).unwrap();
                    source.obtain(&GENOA_CHAIN, clock()).unwrap();
                    let again = Source::new(&trust).with_cache(&cache);
                    again.obtain(&genoa_leaf(), clock()).unwrap();
                }
            });
        }
    });
}
