//! Figures of several guests under one VMM, and their medians.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail};

/// Figure by name.
pub type Figures = BTreeMap<String, f64>;

/// What one VMM's guests said.
pub struct Series {
    pub name: String,
    samples: Vec<Figures>,
    /// Guests that failed and were started again.
    pub faults: u32,
}

impl Series {
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            samples: Vec::new(),
            faults: 0,
        }
    }

    /// Guests fault now and then under emulated nested virtualisation: such a one is counted and started again.
    pub fn add(&mut self, run: &dyn Fn() -> Result<String>) -> Result<()> {
        loop {
            let figures = run().and_then(|line| {
                serde_json::from_str::<Figures>(&line).with_context(|| format!("figures: {line}"))
            });
            match figures {
                Ok(figures) => {
                    eprintln!("casemate-bench-devices: {} {figures:?}", self.name);
                    self.samples.push(figures);
                    return Ok(());
                }
                Err(error) => {
                    self.faults += 1;
                    eprintln!("casemate-bench-devices: {}: {error:#}", self.name);
                    if self.faults > MOST_FAULTS {
                        bail!("too many guests under {} failed", self.name);
                    }
                }
            }
        }
    }

    /// The median of each figure by itself, with the least and the most.
    pub fn medians(&self) -> BTreeMap<String, [f64; 3]> {
        let names = self.samples.first().map(|first| first.keys());
        let spread = |name: &String| {
            let all = self.samples.iter().filter_map(|sample| sample.get(name));
            let mut all: Vec<f64> = all.copied().collect();
            all.sort_by(f64::total_cmp);
            let at = |index: usize| all.get(index).copied().unwrap_or(f64::NAN);
            [at(all.len() / 2), at(0), at(all.len().saturating_sub(1))]
        };
        names
            .into_iter()
            .flatten()
            .map(|name| (name.clone(), spread(name)))
            .collect()
    }
}

const MOST_FAULTS: u32 = 4;

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn medians_are_of_each_figure_by_itself_and_faults_are_tried_again() {
        let mut series = Series::new("test");
        let call = Cell::new(0);
        let say = || {
            call.set(call.get() + 1);
            match call.get() {
                2 => bail!("a fault"),
                n => Ok(format!("{{\"a\":{n}.0,\"b\":{}.0}}", 10 - n)),
            }
        };
        for _ in 0..3 {
            series.add(&say).unwrap();
        }
        let medians = series.medians();
        assert_eq!(medians.get("a"), Some(&[3.0, 1.0, 4.0]));
        assert_eq!(medians.get("b"), Some(&[7.0, 6.0, 9.0]));
        assert_eq!(series.faults, 1);
        assert!(Series::new("none").add(&|| bail!("always")).is_err());
    }
}
