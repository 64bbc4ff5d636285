//! The table of processor times as a bar chart.
//!
//! The table is one of the figures, under a comment `figures: TABLE, IMAGE`. Its first row is what the others
//! are compared with, and its columns are the scenarios.

use std::fmt::Write;

use anyhow::{Context, ensure};

use crate::picture;

const WIDTH: i32 = 420;
/// Where the bars begin and where the longest of them ends.
const LEFT: f64 = 136.0;
const RIGHT: f64 = 366.0;
const TOP: i32 = 44;
const TITLE_STEP: i32 = 26;
const BAR_STEP: i32 = 17;

/// The SVG of a table, which is Markdown; an error if there are no ratios in it.
pub fn draw(id: &str, table: &str) -> anyhow::Result<String> {
    let mut rows =
        table.lines().map(|line| line.trim_matches(['|', ' ']).split('|').map(str::trim));
    let scenarios: Vec<&str> = rows.next().context("an empty table")?.skip(1).collect();
    let rows: Vec<Vec<&str>> = rows.skip(1).map(Iterator::collect).collect();
    let (base, others) = rows.split_first().context("a table without rows")?;
    // Each scenario with its figure of the first row, and with the names and ratios of the others.
    let mut groups = Vec::new();
    for (n, scenario) in scenarios.iter().enumerate() {
        let bars = others.iter().filter_map(|row| {
            let text = *row.get(n + 1)?;
            Some((row[0], text, text.parse::<f64>().ok()?))
        });
        let bars: Vec<_> = bars.collect();
        groups.push((scenario, base.get(n + 1).context("a short row")?, bars));
    }
    let longest = groups.iter().flat_map(|(.., bars)| bars).map(|bar| bar.2).fold(1.0, f64::max);
    let count = groups.iter().map(|(.., bars)| bars.len()).sum::<usize>();
    ensure!(count > 0, "there are no ratios in it");
    let height =
        TOP + TITLE_STEP * i32::try_from(groups.len())? + BAR_STEP * i32::try_from(count)? + 14;

    let at = |ratio: f64| LEFT + (RIGHT - LEFT) * ratio / longest;
    let title = format!("Processor time per reply, relative to the {}", base[0]);
    let desc = format!(
        "A group of bars for each column of the table, a bar for each server, and a line at 1, the {}.",
        base[0]
    );
    let mut svg = picture::start(id, &title, &desc, WIDTH, height);
    writeln!(svg, "  <text class=\"head\" x=\"16\" y=\"26\">{title}</text>")?;
    let mut y = TOP;
    for (scenario, floor, bars) in groups {
        writeln!(
            svg,
            "  <text class=\"b\" x=\"16\" y=\"{}\">{scenario}</text>\
             <text class=\"end\" x=\"404\" y=\"{0}\">{}: {floor} = 1</text>",
            y + 12,
            base[0]
        )?;
        y += TITLE_STEP - 6;
        for (name, text, ratio) in &bars {
            let class = if name.starts_with("reactor-") { "loop" } else { "kernel" };
            writeln!(
                svg,
                "  <text class=\"end\" x=\"{}\" y=\"{}\">{name}</text>\
                 <rect class=\"{class}\" x=\"{LEFT}\" y=\"{}\" width=\"{:.1}\" height=\"13\"/>\
                 <text x=\"{:.1}\" y=\"{1}\">{text}</text>",
                LEFT - 6.0,
                y + 11,
                y,
                at(*ratio) - LEFT,
                at(ratio.max(1.0)) + 6.0,
            )?;
            y += BAR_STEP;
        }
        let rows = BAR_STEP * i32::try_from(bars.len())?;
        writeln!(svg, "  <path class=\"join\" d=\"M{:.1} {}V{}\"/>", at(1.0), y - rows - 4, y)?;
        y += 6;
    }
    Ok(svg + "</svg>\n")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn each_ratio_is_a_bar() {
        let table = "| server      | 1×1 |  2×2 |\n| --- | --: | --: |\n| floor | 5 ns | 7 ns |\n\
            | reactor-v01 | 2.00 | – |\n| peer-mio | 0.50 | 1.00 |\n";
        let svg = draw("a", table).unwrap();
        // From 136 to 366 for the longest, which is 2.
        for width in ["width=\"230.0\"", "width=\"57.5\"", "width=\"115.0\""] {
            assert_eq!(svg.matches(width).count(), 1, "{width}");
        }
        assert_eq!(svg.matches("reactor-v01").count(), 1);
        let err = draw("a", "| server | 1×1 |\n|---|--:|\n| floor | 5 ns |\n").unwrap_err();
        assert!(err.to_string().contains("no ratios"));
    }
}
