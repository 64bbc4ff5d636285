//! What all pictures have in common: one style, and the frame of those that are drawn here.

use anyhow::{Context, ensure};

/// For a picture with the id `picture`.
const STYLE: &str = include_str!("picture.css");

/// The picture with the common style in its style element. Each picture has a copy, because it must look
/// right on its own.
pub fn with_style(svg: &str) -> anyhow::Result<String> {
    let id = svg.split_once(" id=\"").and_then(|(_, rest)| rest.split_once('"'));
    let (id, _) = id.context("it has no id")?;
    let (before, rest) = svg.split_once("<style>").context("it has no style element")?;
    let (_, after) = rest.split_once("</style>").context("its style element has no end")?;
    ensure!(!svg.contains("=\"#"), "a colour of its own, which a dark page cannot change");
    let style = STYLE.replace("#picture", &format!("#{id}"));
    Ok(format!("{before}<style>\n{style}  </style>{after}"))
}

/// The start of a picture: its card, and the tip of an arrow.
pub fn start(id: &str, title: &str, desc: &str, width: i32, height: i32) -> String {
    let (inner_width, inner_height) = (width - 1, height - 1);
    format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" id="{id}" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" aria-labelledby="{id}-title {id}-desc">
  <title id="{id}-title">{title}</title>
  <desc id="{id}-desc">{desc}</desc>
  <!-- Drawn by `cargo xtask docs`. -->
  <style></style>
  <defs>
    <marker id="{id}-tip" viewBox="0 0 8 8" refX="7.5" refY="4" markerWidth="8" markerHeight="8" markerUnits="userSpaceOnUse" orient="auto">
      <path class="tip" d="M0 0.5L8 4L0 7.5Z"/>
    </marker>
  </defs>
  <rect class="card" x="0.5" y="0.5" width="{inner_width}" height="{inner_height}" rx="12"/>
"#
    )
}

/// The id of a picture: the name of its file.
pub fn id(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path).trim_end_matches(".svg")
}

/// Text as it stands in a picture.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn each_picture_has_the_style_under_its_own_id() {
        let svg = start("some", "Title", "Description", 20, 10) + "</svg>\n";
        let styled = with_style(&svg).unwrap();
        assert!(styled.contains("#some text {") && !styled.contains("#picture"));
        assert_eq!(with_style(&styled).unwrap(), styled);
        let err = with_style(&svg.replace("class=\"card\"", "fill=\"#fff\"")).unwrap_err();
        assert!(err.to_string().contains("a colour of its own"));
    }
}
