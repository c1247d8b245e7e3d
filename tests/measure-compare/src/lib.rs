//! Launch digests beside those of `sev-snp-measure`, the tool that everybody compares with.
//!
//! It is fetched from PyPI by pip into cargo's target directory, at a pinned version, and asked
//! for all its answers in one Python process.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "support of tests, which fail by panicking"
)]

pub mod guests;
pub mod images;
pub mod peer;
