//! The report for people: one HTML file without scripts or anything from elsewhere.

use super::{Control, DISCLAIMER, Observed, Report, ReportError};

/// The report as a page.
pub fn html(report: &Report) -> Result<String, ReportError> {
    let source = report.source.as_ref().ok_or(ReportError::Unverified)?;
    let trusted = if source.key_trusted {
        "given by the reader"
    } else {
        "<strong>taken from beside the records: compare it with one from elsewhere</strong>"
    };
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <title>Evidence of {origin}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n\
         <h1>Evidence of {origin}</h1>\n<p class=\"note\">{DISCLAIMER}</p>\n\
         <table>\n<tr><th>Records under the checkpoint</th><td>{size}</td></tr>\n\
         <tr><th>Root</th><td><code>{root}</code></td></tr>\n\
         <tr><th>Key</th><td><code>{key}</code>, {trusted}</td></tr>\n\
         <tr><th>Made</th><td>{time}</td></tr>\n<tr><th>Observed</th><td>{all}</td></tr>\n</table>\n",
        origin = escaped(&source.origin),
        size = source.size,
        root = escaped(&source.root),
        key = escaped(&source.key),
        time = escaped(&source.time),
        all = escaped(&report.all.sentence()),
    );
    if report.all.emulated > 0 {
        page.push_str(&format!(
            "<p class=\"warning\">{} records say <strong>emulated</strong>: software stood in for AMD's secure processor, \
             and protected nothing from its host.</p>\n",
            report.all.emulated
        ));
    }
    page.push_str("<h2>Policies in force</h2>\n<ul>\n");
    for policy in &report.policies {
        page.push_str(&format!(
            "<li>from record {}: <code>{}</code></li>\n",
            policy.seq,
            escaped(&policy.digest)
        ));
    }
    page.push_str("</ul>\n");
    for framework in &report.frameworks {
        page.push_str(&format!(
            "<h2>{}</h2>\n<table>\n<tr><th>Control</th><th>What the records show</th><th>Observed</th>\
             <th>Not covered</th></tr>\n",
            escaped(&framework.title)
        ));
        framework
            .control
            .iter()
            .for_each(|control| page.push_str(&row(control)));
        page.push_str("</table>\n");
    }
    page.push_str("</body>\n</html>\n");
    Ok(page)
}

fn row(control: &Control) -> String {
    let class = if control.observed.records == 0 {
        " class=\"none\""
    } else {
        ""
    };
    format!(
        "<tr{class}><td><strong>{}</strong><br>{}</td><td>{}</td><td>{}{}</td><td>{}</td></tr>\n",
        escaped(&control.id),
        escaped(&control.title),
        escaped(&control.shows),
        escaped(&control.observed.sentence()),
        named(&control.observed),
        escaped(&control.not_covered),
    )
}

fn named(observed: &Observed) -> String {
    let first: Vec<String> = observed.first.iter().map(ToString::to_string).collect();
    match observed.last {
        Some(last) if observed.records > first.len() as u64 => {
            format!("<br>Records {}, … {last}", first.join(", "))
        }
        Some(_) => format!("<br>Records {}", first.join(", ")),
        None => String::new(),
    }
}

fn escaped(text: &str) -> String {
    text.chars().fold(String::new(), |mut out, c| {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
        out
    })
}

const STYLE: &str = "body{font:15px/1.45 sans-serif;max-width:75em;margin:2em auto;padding:0 1em;color:#222}\
    table{border-collapse:collapse;width:100%;margin:1em 0}td,th{border:1px solid #bbb;padding:.4em .6em;\
    text-align:left;vertical-align:top}th{background:#eee}code{overflow-wrap:anywhere}.none td{color:#777}\
    .warning{background:#fff1c9;padding:.6em}.note{font-style:italic}";
