//! The load of `cargo bench-devices`: what the disk and the card of this guest give, one JSON line on the console.

mod disk;
mod net;

use std::net::Ipv4Addr;

use crate::console::say;

/// Measures the disk `/dev/vda`, whose content is lost, and the way to `host`; says the figures.
pub(crate) fn run(host: Ipv4Addr) {
    match measure(host) {
        Ok(figures) => say!("load {{{}}}", figures.join(",")),
        Err(error) => say!("load failed: {error}"),
    }
}

fn measure(host: Ipv4Addr) -> std::io::Result<Vec<String>> {
    let mut figures = disk::measure()?;
    figures.extend(net::measure(host)?);
    let word = |(name, value): (String, f64)| format!("\"{name}\":{value:.3}");
    Ok(figures.into_iter().map(word).collect())
}

/// A figure and its name.
type Figure = (String, f64);

/// The value below which `share` of the sorted values are.
fn quantile(sorted: &[u64], share: f64) -> f64 {
    let index = ((sorted.len().saturating_sub(1)) as f64 * share) as usize;
    sorted.get(index).copied().unwrap_or(0) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_what_is_there() {
        let sorted: Vec<u64> = (0..=100).collect();
        assert_eq!(
            (quantile(&sorted, 0.5), quantile(&sorted, 0.99)),
            (50.0, 99.0)
        );
        assert_eq!(quantile(&[], 0.5), 0.0);
    }
}
