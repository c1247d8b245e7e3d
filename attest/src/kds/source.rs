//! The one way in for what a key service, a cache or a bundle says: verified, and compared with what
//! was asked for.

use super::bundle::Bundle;
use super::cache::{Cache, CacheError};
use super::client::Client;
use super::error::{KdsError, Lack};
use super::request::{Request, RequestError, VcekId, product_of};
use super::response::{parse_chain, parse_crl, parse_leaf};
use super::{Event, Progress};
use crate::chain::{
    self, ChainError, Crl, CrlMode, CrlOutcome, Intermediate, Leaf, Link, Revocation, SnpRoot,
    SnpTrust,
};
use crate::product::Product;
use crate::report::{Report, SigningKey};
use std::time::SystemTime;

/// Where answers come from: a cache, a service, or both. Without a service it is offline; without
/// either there is only what comes with this crate.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    trust: &'a SnpTrust,
    cache: Option<&'a Cache>,
    client: Option<&'a Client>,
    progress: &'a Progress<'a>,
    refresh: bool,
}

/// An answer that verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// What it answers.
    pub request: Request,
    /// The answer: a chain as PEM, a leaf or a list as DER. Nothing in it is beside the point.
    pub body: Vec<u8>,
    /// Where it is from.
    pub origin: Origin,
    /// Whether a software secure processor's root signed it, which the caller named.
    pub emulated: bool,
}

/// What verified, and under which kind of root.
struct Checked {
    body: Vec<u8>,
    emulated: bool,
}

/// Where an answer is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// The service, just now.
    Fetched,
    /// The cache.
    Cached,
    /// A bundle.
    Imported,
}

/// What the verification of a report needs besides the report. All of it verified when it was read;
/// [`chain::verify`] looks again, with the verifier's own demands on revocation.
#[derive(Debug, Clone)]
pub struct Collateral {
    /// The certificate of the key that signed the report, if the report is right.
    pub leaf: Leaf,
    /// The certificate above it.
    pub intermediate: Intermediate,
    /// The root's revocation list, where there is one.
    pub crl: Option<Crl>,
}

impl<'a> Source<'a> {
    /// A source without a cache and without a service.
    pub fn new(trust: &'a SnpTrust) -> Self {
        Self {
            trust,
            cache: None,
            client: None,
            progress: &|_| (),
            refresh: false,
        }
    }

    /// Reads the cache first, and keeps there what it obtains.
    pub const fn with_cache(mut self, cache: &'a Cache) -> Self {
        self.cache = Some(cache);
        self
    }

    /// Asks a service for what is not cached.
    pub const fn with_client(mut self, client: &'a Client) -> Self {
        self.client = Some(client);
        self
    }

    /// Tells `progress` what happens.
    pub const fn with_progress(mut self, progress: &'a Progress<'a>) -> Self {
        self.progress = progress;
        self
    }

    /// Asks the service again for what is cached.
    pub const fn refreshing(mut self, refresh: bool) -> Self {
        self.refresh = refresh;
        self
    }

    /// Obtains one answer and verifies it at `at`: from the cache, else from the service.
    pub fn obtain(&self, request: &Request, at: SystemTime) -> Result<Item, KdsError> {
        let item = |checked: Checked, origin| Item {
            request: request.clone(),
            body: checked.body,
            origin,
            emulated: checked.emulated,
        };
        if !(self.refresh && self.client.is_some())
            && let Some(checked) = self.cached(request, at)?
        {
            return Ok(item(checked, Origin::Cached));
        }
        let Some(client) = self.client else {
            return Err(KdsError::NotCached {
                request: Box::new(request.clone()),
            });
        };
        let answer = client.get(request, self.progress)?;
        let checked = self.check(request, &answer, at, None)?;
        let kept = self.keep(request, checked, at)?;
        Ok(item(kept, Origin::Fetched))
    }

    /// What `report` needs to be verified at `at`. `product` is for reports of version 2, which do
    /// not name theirs; without it the cache is searched. The revocation list is as
    /// [`crl`](Self::crl) has it; one that is there and was tampered with is an error.
    pub fn collateral(
        &self,
        report: &Report,
        product: Option<Product>,
        at: SystemTime,
    ) -> Result<Collateral, KdsError> {
        let request = self.leaf_of(report, product)?;
        let item = self.obtain(&request, at)?;
        let leaf = Leaf::parse(&item.body).map_err(|e| unverified(&request, e))?;
        let (intermediate, _) = self.verify(&request, &leaf, at, None)?;
        let crl = self.crl(leaf.product(), leaf.kind(), at)?;
        Ok(Collateral {
            leaf,
            intermediate,
            crl,
        })
    }

    /// The root's revocation list; `None` where it is neither cached nor to be had. One that is out
    /// of date at `at`, with no newer one to be had, is returned as it is: whoever verifies refuses
    /// it as stale, which is not the same as absent.
    pub fn crl(
        &self,
        product: Product,
        key: SigningKey,
        at: SystemTime,
    ) -> Result<Option<Crl>, KdsError> {
        let request = Request::Crl { product, key };
        match self.obtain(&request, at) {
            Ok(item) => {
                let crl = Crl::parse(&item.body).map_err(|e| unverified(&request, e))?;
                Ok(Some(crl))
            }
            Err(error) if error.lack() == Lack::Unavailable => {
                Ok(self.stale_crl(&request, product, at))
            }
            Err(error) => Err(error),
        }
    }

    /// Verifies all of a bundle at `at`, and only then keeps it in the cache. Where one item does
    /// not verify, none is kept.
    pub fn import(&self, bundle: &Bundle, at: SystemTime) -> Result<Vec<Item>, KdsError> {
        let offline = Self {
            client: None,
            ..*self
        };
        let verified: Vec<(&Request, Checked)> = bundle
            .items()
            .map(|(request, body)| Ok((request, offline.check(request, body, at, Some(bundle))?)))
            .collect::<Result<_, KdsError>>()?;
        let keep = |(request, checked): (&Request, Checked)| {
            let kept = offline.keep(request, checked, at)?;
            Ok(Item {
                request: request.clone(),
                body: kept.body,
                origin: Origin::Imported,
                emulated: kept.emulated,
            })
        };
        verified.into_iter().map(keep).collect()
    }

    fn stale_crl(&self, request: &Request, product: Product, at: SystemTime) -> Option<Crl> {
        let body = self.cache?.read(request).ok().flatten()?;
        let checked = self.check_crl(request, product, &body, at);
        checked
            .is_err_and(|error| is_stale(&error))
            .then(|| Crl::parse(&body).ok())
            .flatten()
    }

    /// The VCEK that a report asks for. Without a product it is the one that is cached.
    fn leaf_of(&self, report: &Report, product: Option<Product>) -> Result<Request, KdsError> {
        let named = |product| VcekId::of_report(report, Some(product)).map(Request::Vcek);
        match product_of(report, product) {
            Ok(product) => Ok(named(product)?),
            Err(RequestError::ProductUnknown) => {
                let cached = |request: &Request| {
                    self.cache
                        .is_some_and(|cache| cache.file(request).is_file())
                };
                // Reports that do not name their product are from before Turin.
                [Product::Milan, Product::Genoa]
                    .into_iter()
                    .filter_map(|product| named(product).ok())
                    .find(cached)
                    .ok_or(KdsError::Request(RequestError::ProductUnknown))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// What the cache has and what verifies of it; a refused file is an error only where there is no
    /// service to ask instead.
    fn cached(&self, request: &Request, at: SystemTime) -> Result<Option<Checked>, KdsError> {
        let Some(cache) = self.cache else {
            return Ok(None);
        };
        let checked = match cache.read(request) {
            Ok(Some(body)) => self.check(request, &body, at, None),
            Ok(None) => return Ok(None),
            Err(error) => Err(error.into()),
        };
        let file = cache.file(request);
        let refused = match checked {
            Ok(checked) => return Ok(Some(checked)),
            Err(error @ KdsError::Cache(CacheError::Read { .. })) => error,
            Err(error) if is_stale(&error) => KdsError::Stale {
                file,
                source: Box::new(error),
            },
            Err(error) => KdsError::Refused {
                file,
                source: Box::new(error),
            },
        };
        if self.client.is_none() {
            return Err(refused);
        }
        (self.progress)(&Event::Refused(&refused));
        Ok(None)
    }

    /// Keeps what verified, and returns what is kept: a revocation list never gives way to an older
    /// one, which a mirror or a bundle could bring.
    fn keep(
        &self,
        request: &Request,
        checked: Checked,
        at: SystemTime,
    ) -> Result<Checked, KdsError> {
        let Some(cache) = self.cache else {
            return Ok(checked);
        };
        let made = |body: &[u8]| Crl::parse(body).ok().map(|crl| crl.this_update());
        let newer = |there: &[u8]| {
            matches!(request, Request::Crl { .. })
                && made(there) > made(&checked.body)
                && self
                    .check(request, there, at, None)
                    .is_ok_and(|there| there.emulated == checked.emulated)
        };
        Ok(Checked {
            body: cache.write(request, &checked.body, &newer)?,
            emulated: checked.emulated,
        })
    }

    /// Verifies an answer and compares it with what was asked for. `bundle` is what came with it.
    fn check(
        &self,
        request: &Request,
        answer: &[u8],
        at: SystemTime,
        bundle: Option<&Bundle>,
    ) -> Result<Checked, KdsError> {
        let shape = |source| KdsError::Response {
            request: Box::new(request.clone()),
            source,
        };
        match request {
            Request::Chain { product, key } => {
                self.check_chain(request, *product, *key, answer, at)
            }
            Request::Vcek(id) => {
                let der = parse_leaf(answer).map_err(shape)?;
                let leaf = Leaf::parse(der).map_err(|e| unverified(request, e))?;
                check_leaf_is(request, id, &leaf)?;
                let (_, emulated) = self.verify(request, &leaf, at, bundle)?;
                Ok(Checked {
                    body: der.to_vec(),
                    emulated,
                })
            }
            Request::Crl { product, .. } => {
                let der = parse_crl(answer).map_err(shape)?;
                let emulated = self.check_crl(request, *product, der, at)?;
                Ok(Checked {
                    body: der.to_vec(),
                    emulated,
                })
            }
        }
    }

    fn check_chain(
        &self,
        request: &Request,
        product: Product,
        key: SigningKey,
        answer: &[u8],
        at: SystemTime,
    ) -> Result<Checked, KdsError> {
        let refused = |source| unverified(request, source);
        let chain = parse_chain(answer).map_err(|source| KdsError::Response {
            request: Box::new(request.clone()),
            source,
        })?;
        let root = self.trust.recognise(&chain.root).map_err(refused)?;
        let intermediate = Intermediate::parse(&chain.intermediate).map_err(refused)?;
        let trusted = self
            .trust
            .trust_intermediate(&intermediate, at)
            .map_err(refused)?;
        let asked = trusted.product().is_none_or(|found| found == product);
        if trusted.root() == root && trusted.kind() == key && asked {
            return Ok(Checked {
                body: chain.to_pem().into_bytes(),
                emulated: trusted.emulated(),
            });
        }
        Err(KdsError::Other {
            request: Box::new(request.clone()),
            found: format!("`{}`", intermediate.common_name()),
        })
    }

    fn check_crl(
        &self,
        request: &Request,
        product: Product,
        der: &[u8],
        at: SystemTime,
    ) -> Result<bool, KdsError> {
        let crl = Crl::parse(der).map_err(|e| unverified(request, e))?;
        let outcome = match crl.signer(self.trust) {
            Some(SnpRoot::Amd(found)) if found != product => {
                return Err(KdsError::Other {
                    request: Box::new(request.clone()),
                    found: format!("the {found} root"),
                });
            }
            None => CrlOutcome::BadSignature,
            Some(_) if at < crl.this_update() => CrlOutcome::NotYetValid(crl.this_update()),
            Some(_) if at > crl.next_update() => CrlOutcome::Stale(crl.next_update()),
            Some(signer) => return Ok(signer == SnpRoot::Emulated),
        };
        Err(unverified(request, ChainError::Revocation(outcome)))
    }

    /// Verifies a leaf, and returns the certificate that it verified under, and whether its root is
    /// emulated. It is the one that comes with this crate, or, where AMD has issued another since, the one that the bundle, the cache or the
    /// service has. Revocation is for whoever verifies the report.
    fn verify(
        &self,
        request: &Request,
        leaf: &Leaf,
        at: SystemTime,
        bundle: Option<&Bundle>,
    ) -> Result<(Intermediate, bool), KdsError> {
        let under = |intermediate: &Intermediate| {
            let issuer = self.trust.trust_intermediate(intermediate, at)?;
            let revocation = Revocation {
                mode: CrlMode::IfPresent,
                ..Revocation::default()
            };
            chain::verify(leaf, &issuer, &revocation, at).map(|leaf| leaf.emulated())
        };
        let refused = |error| unverified(request, error);
        let own = Intermediate::amd(leaf.product(), leaf.kind()).map_err(refused)?;
        let error = match under(&own) {
            Ok(emulated) => return Ok((own, emulated)),
            Err(error) => error,
        };
        if !may_have_another_issuer(&error) {
            return Err(refused(error));
        }
        let chain = Request::Chain {
            product: leaf.product(),
            key: leaf.kind(),
        };
        let carried = bundle.and_then(|bundle| bundle.get(&chain));
        let body = match carried {
            Some(body) => self.check(&chain, body, at, None).map(|chain| chain.body),
            None => self.obtain(&chain, at).map(|item| item.body),
        };
        // Without another issuer the first word stands.
        let other = body.ok().and_then(|body| parse_chain(&body).ok());
        let Some(other) = other.filter(|chain| chain.intermediate != own.as_der()) else {
            return Err(refused(error));
        };
        let other = Intermediate::parse(&other.intermediate).map_err(refused)?;
        let emulated = under(&other).map_err(refused)?;
        Ok((other, emulated))
    }
}

/// The leaf is the one that was asked for: no other chip's, and for no other TCB version.
fn check_leaf_is(request: &Request, id: &VcekId, leaf: &Leaf) -> Result<(), KdsError> {
    let same = leaf.kind() == SigningKey::Vcek
        && leaf.product() == id.product()
        && leaf.hwid() == Some(id.chip())
        && leaf.tcb() == id.tcb();
    if same {
        return Ok(());
    }
    let owner = match (leaf.hwid(), leaf.csp_id()) {
        (Some(hwid), _) => {
            let short: String = hex::encode(hwid).chars().take(16).collect();
            format!("chip {short}")
        }
        (None, provider) => format!("provider {}", provider.unwrap_or_default()),
    };
    Err(KdsError::Other {
        request: Box::new(request.clone()),
        found: format!("{} {owner}, {}", leaf.product(), leaf.tcb()),
    })
}

/// Whether the error is one that another issuer's certificate can mend.
const fn may_have_another_issuer(error: &ChainError) -> bool {
    matches!(
        error,
        ChainError::Signature(Link::Leaf)
            | ChainError::Expired(Link::Intermediate)
            | ChainError::EmulationMismatch
    )
}

/// Whether the only fault is that a newer list is due.
const fn is_stale(error: &KdsError) -> bool {
    matches!(
        error,
        KdsError::Unverified {
            source: ChainError::Revocation(CrlOutcome::Stale(_)),
            ..
        }
    )
}

fn unverified(request: &Request, source: impl Into<ChainError>) -> KdsError {
    KdsError::Unverified {
        request: Box::new(request.clone()),
        source: source.into(),
    }
}

impl std::fmt::Debug for Source<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Source")
            .field("cache", &self.cache)
            .field("client", &self.client)
            .field("refresh", &self.refresh)
            .finish_non_exhaustive()
    }
}
