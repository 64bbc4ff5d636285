//! Latency against load as curves: a colour for each server, solid for an open loop, dashed for a closed one.
//!
//! The figures are those of `tools/bench/latency.json`, under a comment `latency: IMAGE`.

use std::fmt::Write;

use anyhow::ensure;
use bench::latency::{Latency, Line};
use bench::report::Machine;

use crate::picture;

const WIDTH: i32 = 420;
const HEIGHT: i32 = 372;
/// Where the plot is. The labels are on its right.
const LEFT: f64 = 58.0;
const RIGHT: f64 = 298.0;
const TOP: f64 = 62.0;
const BOTTOM: f64 = 298.0;
const LABEL_STEP: f64 = 16.0;

/// The colours of the servers, in their order: on a light page and on a dark one.
const COLORS: [&str; 4] =
    ["#1f5fa8, #8ab8f0", "#2c7a3f, #86cf96", "#b3261e, #ff9d92", "#8a5a00, #e8c068"];

/// The SVG of the figures.
pub fn draw(id: &str, figures: &Latency) -> anyhow::Result<String> {
    let Latency { machine, rounds, seconds, lines } = figures;
    let points = || lines.iter().flat_map(|line| &line.points);
    let (low, high) = points().fold((f64::MAX, 0.0_f64), |(low, high), point| {
        (low.min(point.p99_us.log10().floor()), high.max(point.p99_us.log10().ceil()))
    });
    let most = points().fold(0.0, |most, point| point.rate.max(most));
    ensure!(most > 0.0 && low < high, "there are no figures in it");
    let x = |rate: f64| LEFT + (RIGHT - LEFT) * rate / most;
    let y = |decade: f64| BOTTOM - (BOTTOM - TOP) * (decade - low) / (high - low);

    let mut svg = picture::start(
        id,
        "The 99th percentile of the latency against the throughput",
        "Two curves for each server: an open loop with a rising rate, and a closed loop with more and more \
         unanswered requests.",
        WIDTH,
        HEIGHT,
    );
    writeln!(
        svg,
        "  <text class=\"head\" x=\"16\" y=\"26\">p99 latency against throughput</text>\
         <text x=\"16\" y=\"46\">solid: open loop; dashed: closed loop</text>"
    )?;
    let mut decade = low;
    while decade <= high {
        let label = match decade as i32 {
            ..3 => format!("{} µs", 10_f64.powf(decade)),
            3..6 => format!("{} ms", 10_f64.powf(decade - 3.0)),
            _ => format!("{} s", 10_f64.powf(decade - 6.0)),
        };
        let y = y(decade);
        writeln!(
            svg,
            "  <path class=\"zone\" style=\"stroke-width:.75\" d=\"M{LEFT} {y:.1}H{RIGHT}\"/>\
             <text class=\"end\" x=\"{}\" y=\"{:.1}\">{label}</text>",
            LEFT - 6.0,
            y + 4.0
        )?;
        decade += 1.0;
    }
    // The smallest step of 1, 2 or 5 by which there are at most five labels.
    let power = 10_f64.powf((most / 5.0).log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power);
    let step = steps.into_iter().find(|step| most / step <= 5.0).unwrap_or(most);
    for n in 0..=(most / step) as i32 {
        let rate = f64::from(n) * step;
        writeln!(
            svg,
            "  <text class=\"mid\" x=\"{:.1}\" y=\"{}\">{}</text>",
            x(rate),
            BOTTOM + 17.0,
            // Without the last digits of 3 * 0.1.
            (rate / 10.0).round() / 100.0
        )?;
    }
    let Machine { processor, processors, kernel, commit, .. } = machine;
    let (processor, plural) = (picture::escape(processor), if *rounds == 1 { "" } else { "s" });
    writeln!(
        svg,
        "  <text class=\"mid\" x=\"{}\" y=\"{}\">thousand replies per second</text>\
         <text class=\"small\" x=\"16\" y=\"{}\">{processor}, {processors} processors, Linux {kernel}</text>\
         <text class=\"small\" x=\"16\" y=\"{}\">commit {commit}; medians of {rounds} round{plural} of {seconds} s</text>",
        (LEFT + RIGHT) / 2.0,
        BOTTOM + 34.0,
        HEIGHT - 24,
        HEIGHT - 9,
    )?;

    // Where the open loops end, from the top, each with its server and colour.
    let mut ends = Vec::new();
    for (n, pair) in lines.chunk_by(|one, other| one.server == other.server).enumerate() {
        let color = COLORS[n % COLORS.len()];
        writeln!(svg, "  <g style=\"color: light-dark({color})\">")?;
        for Line { server, open, points } in pair {
            let at = points.iter().map(|point| (x(point.rate), y(point.p99_us.log10())));
            let at: Vec<_> = at.collect();
            let path: Vec<_> = at.iter().map(|(x, y)| format!("{x:.1} {y:.1}")).collect();
            let (dash, width) = if *open { ("none", 2) } else { ("4 3", 1) };
            writeln!(
                svg,
                "    <path style=\"fill: none; stroke: currentColor; stroke-width: {width}; stroke-linejoin: round; \
                 stroke-dasharray: {dash}\" d=\"M{}\"/>",
                path.join("L")
            )?;
            for (x, y) in &at {
                writeln!(
                    svg,
                    "    <circle style=\"fill: currentColor\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2\"/>"
                )?;
            }
            ends.extend(at.last().filter(|_| *open).map(|(x, y)| (*y, *x, server, color)));
        }
        svg += "  </g>\n";
    }
    ends.sort_by(|one, other| one.0.total_cmp(&other.0));
    let mut label = TOP;
    for (y, x, server, color) in ends {
        label = label.max(y);
        writeln!(
            svg,
            "  <g style=\"color: light-dark({color})\">\
             <path style=\"stroke: currentColor; stroke-width: .75\" d=\"M{x:.1} {y:.1}L{} {label:.1}\"/>\
             <text class=\"b\" style=\"fill: currentColor\" x=\"{}\" y=\"{:.1}\">{server}</text></g>",
            RIGHT + 8.0,
            RIGHT + 10.0,
            label + 4.0
        )?;
        label += LABEL_STEP;
    }
    Ok(svg + "</svg>\n")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn each_server_has_two_curves_and_a_label() {
        let json = r#"{"rounds": 1, "seconds": 1.0, "machine": {"processor": "P <1>", "processors": 2,
            "kernel": "K", "congestion_control": "C", "rustc": "R", "commit": "C"}, "lines": [
            {"server": "a", "open": false, "points": [{"rate": 1e6, "p99_us": 10.0}]},
            {"server": "a", "open": true, "points": [{"rate": 1e6, "p99_us": 1e3}, {"rate": 2e6, "p99_us": 1e5}]},
            {"server": "b", "open": true, "points": [{"rate": 2e6, "p99_us": 1e5}]}]}"#;
        let svg = draw("a", &Latency::from_json(json).unwrap()).unwrap();
        // From 58 to 298 for the highest rate, and from 298 to 62 for 10 µs to 100 ms.
        assert!(
            svg.contains("M178.0 298.0\"") && svg.contains("M178.0 180.0L298.0 62.0\""),
            "{svg}"
        );
        for label in
            ["y=\"66.0\">a<", "y=\"82.0\">b<", ">100 µs<", ">100 ms<", ">1500<", "P &lt;1>"]
        {
            assert_eq!(svg.matches(label).count(), 1, "{label} in {svg}");
        }
        let none = json.split("\"lines\"").next().unwrap().to_owned() + "\"lines\": []}";
        let err = draw("a", &Latency::from_json(&none).unwrap()).unwrap_err();
        assert!(err.to_string().contains("no figures"));
    }
}
