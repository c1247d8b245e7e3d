//! Who does the bulk of the cryptography: TLS and the seals. Both speak the same algorithms, so two ends may differ.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use serde::{Serialize, Serializer};

/// An implementation of TLS's primitives and of AES-256-GCM for seals. Key derivation, signatures and the session's
/// own key agreement are ring's in either case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provider {
    /// AWS-LC: faster in large pieces (AVX-512), and X25519MLKEM768 in TLS.
    #[cfg(feature = "aws-lc")]
    AwsLc,
    /// ring.
    Ring,
}

impl Provider {
    /// Those of this build, the default first.
    pub const ALL: &'static [Provider] = &[
        #[cfg(feature = "aws-lc")]
        Provider::AwsLc,
        Provider::Ring,
    ];

    /// Its name.
    pub const fn as_str(self) -> &'static str {
        match self {
            #[cfg(feature = "aws-lc")]
            Provider::AwsLc => "aws-lc",
            Provider::Ring => "ring",
        }
    }

    /// The TLS primitives: AES-256-GCM only; the provider's key exchange groups, its best first.
    pub(crate) fn tls(self) -> Arc<CryptoProvider> {
        let mut provider = match self {
            #[cfg(feature = "aws-lc")]
            Provider::AwsLc => CryptoProvider {
                kx_groups: AWS_LC_GROUPS.to_vec(),
                ..rustls::crypto::aws_lc_rs::default_provider()
            },
            Provider::Ring => rustls::crypto::ring::default_provider(),
        };
        let suite = rustls::CipherSuite::TLS13_AES_256_GCM_SHA384;
        provider.cipher_suites.retain(|one| one.suite() == suite);
        Arc::new(provider)
    }
}

/// The hybrid first: a stream recorded today stays closed to a quantum computer.
#[cfg(feature = "aws-lc")]
const AWS_LC_GROUPS: &[&dyn rustls::crypto::SupportedKxGroup] = &[
    rustls::crypto::aws_lc_rs::kx_group::X25519MLKEM768,
    rustls::crypto::aws_lc_rs::kx_group::X25519,
    rustls::crypto::aws_lc_rs::kx_group::SECP256R1,
    rustls::crypto::aws_lc_rs::kx_group::SECP384R1,
];

impl Default for Provider {
    fn default() -> Self {
        Self::ALL.first().copied().unwrap_or(Provider::Ring)
    }
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Provider {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().find(|one| one.as_str() == name);
        found.copied().ok_or_else(|| {
            let names: Vec<&str> = Self::ALL.iter().map(|one| one.as_str()).collect();
            format!(
                "no provider {name:?} in this build; it has {}",
                names.join(", ")
            )
        })
    }
}

impl Serialize for Provider {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}
