//! The tables of the measurements.
//!
//! A page asks for one by its name, and has it between two comments:
//!
//! ```text
//! <!-- figures: cpu -->
//!
//! | server | ...
//!
//! <!-- end of figures -->
//! ```

use std::fs;
use std::path::Path;

use anyhow::{Context, bail};
use bench::report::{Report, TABLES};

/// At the start of a line, or it is part of a sentence.
const START: &str = "\n<!-- figures: ";
const END: &str = "<!-- end of figures -->";

/// Reads what `scripts/bench.sh --json` has kept.
///
/// # Errors
/// The file cannot be read, or is something else.
pub fn read(path: &Path) -> anyhow::Result<Report> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    Report::from_json(&text).with_context(|| path.display().to_string())
}

/// The page with the tables that it asks for.
///
/// # Errors
/// It asks for a table that does not exist, or does not say where one ends.
pub fn refresh(page: &str, report: &Report) -> anyhow::Result<String> {
    let mut fresh = String::new();
    let mut rest = page;
    while let Some((before, after)) = rest.split_once(START) {
        let number = (fresh.clone() + before).lines().count() + 1;
        let line = || format!("figures in line {number}");
        let (name, after) = after.split_once(" -->\n").with_context(line)?;
        let Some(table) = report.table(name) else {
            let names: Vec<&str> = TABLES.iter().map(|(name, ..)| *name).collect();
            bail!("there is no table {name:?}, but these: {}", names.join(", "));
        };
        let (old, after) = after.split_once(END).with_context(line).context("without an end")?;
        if old.contains(START.trim_start()) {
            return Err(anyhow::anyhow!("without an end").context(line()));
        }
        fresh += &format!("{before}{START}{name} -->\n\n{table}\n{END}");
        rest = after;
    }
    Ok(fresh + rest)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub mod tests {
    use super::*;

    /// What the smallest run would have kept.
    pub fn json() -> String {
        let machine = r#"{"processor": "P", "processors": 2, "kernel": "K",
            "congestion_control": "C", "rustc": "R", "commit": "C"}"#;
        let accepts = r#"[{"server": "floor", "round": 0, "rate": 1234.5, "cpu_ns": 20000}]"#;
        format!(
            r#"{{"machine": {machine}, "rounds": 1, "seconds": 1.0, "servers": ["floor"],
                "scenarios": [], "loads": [], "accepts": {accepts}, "idle": [], "calls": []}}"#
        )
    }

    fn report() -> Report {
        Report::from_json(&json()).unwrap()
    }

    #[test]
    fn stale_figures_are_replaced_and_fresh_ones_left_alone() {
        let page = "a\n<!-- figures: accept -->\nold\n<!-- end of figures -->\nb\n";
        let fresh = refresh(page, &report()).unwrap();
        assert!(fresh.starts_with("a\n<!-- figures: accept -->\n\n| server"), "{fresh}");
        assert!(fresh.contains("| floor  |     1,234 |"), "{fresh}");
        assert!(fresh.ends_with("|\n\n<!-- end of figures -->\nb\n"), "{fresh}");
        assert_eq!(refresh(&fresh, &report()).unwrap(), fresh);
    }

    #[test]
    fn a_page_without_figures_stays_as_it_is() {
        assert_eq!(refresh("a\nb", &report()).unwrap(), "a\nb");
    }

    #[track_caller]
    fn assert_broken(page: &str, what: &str) {
        let err = refresh(page, &report()).unwrap_err();
        assert!(format!("{err:#}").contains(what), "{err:#}");
    }

    #[test]
    fn a_table_that_does_not_exist_is_named() {
        assert_broken("a\n<!-- figures: nothing -->\n<!-- end of figures -->\n", r#""nothing""#);
    }

    #[test]
    fn figures_without_an_end_are_found() {
        assert_broken("a\nb\n<!-- figures: accept -->\n", "without an end");
        let next = "a\n<!-- figures: accept -->\n<!-- figures: idle -->\n<!-- end of figures -->\n";
        assert_broken(next, "without an end");
    }
}
