//! The comparison, for people and for programs.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::{Value, json};

use super::figures::Series;

/// One JSON object, or a table. A ratio above 1 is Casemate's advantage, whichever way a figure counts.
pub fn print(series: &[Series], as_json: bool) -> Result<()> {
    let rows: Vec<_> = series.iter().map(|one| (one, one.medians())).collect();
    let Some((_, ours)) = rows.first() else {
        return Ok(());
    };
    if as_json {
        let mut all = serde_json::Map::new();
        for (one, medians) in &rows {
            let figure = |(name, [median, least, most]): (&String, &[f64; 3])| {
                let value = json!({ "median": median, "min": least, "max": most });
                (name.clone(), value)
            };
            let figures: serde_json::Map<String, Value> = medians.iter().map(figure).collect();
            let row = json!({ "figures": figures, "faults": one.faults });
            all.insert(one.name.clone(), row);
        }
        for (one, medians) in rows.iter().skip(1) {
            let name = format!("casemate_to_{}", one.name);
            all.insert(name, json!(ratios(ours, medians)));
        }
        println!("{}", Value::Object(all));
        return Ok(());
    }
    print!("{:<28}", "medians");
    for (one, _) in &rows {
        print!(" {:>28}", one.name);
    }
    println!("  ours better than …");
    for name in ours.keys() {
        print!("{name:<28}");
        for (_, medians) in &rows {
            let [median, least, most] = medians.get(name).copied().unwrap_or([f64::NAN; 3]);
            print!(" {:>28}", format!("{median:.1} ({least:.1}-{most:.1})"));
        }
        for (_, medians) in rows.iter().skip(1) {
            let ratio = ratios(ours, medians).get(name).copied();
            print!("  {:.2}", ratio.unwrap_or(f64::NAN));
        }
        println!();
    }
    Ok(())
}

fn ratios(
    ours: &BTreeMap<String, [f64; 3]>,
    theirs: &BTreeMap<String, [f64; 3]>,
) -> BTreeMap<String, f64> {
    let ratio = |name: &String| {
        let (ours, theirs) = (ours.get(name)?[0], theirs.get(name)?[0]);
        let ratio = if name.ends_with("_us") {
            theirs / ours
        } else {
            ours / theirs
        };
        Some((name.clone(), ratio))
    };
    ours.keys().filter_map(ratio).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_is_better_and_less_time_is_better() {
        let row = |iops: f64, micros: f64| {
            BTreeMap::from([
                ("a_iops".to_owned(), [iops, 0.0, 0.0]),
                ("a_us".to_owned(), [micros, 0.0, 0.0]),
            ])
        };
        let ratios = ratios(&row(200.0, 50.0), &row(100.0, 100.0));
        assert_eq!(ratios.values().copied().collect::<Vec<_>>(), [2.0, 2.0]);
    }
}
