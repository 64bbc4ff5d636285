//! Tests the answers to the exercises: each is a patch, applied to a copy of the workspace.
//!
//! A patch begins with a line `Check: COMMAND`. The command succeeds with the answer.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

use crate::workspace::Workspace;

/// A folder with a copy of the workspace. It is reset for each answer, but only files that differ
/// are written, so that cargo has little to build again.
pub struct WorkspaceCopy {
    root: PathBuf,
    copy: PathBuf,
}

impl WorkspaceCopy {
    /// The copy is below the folder that cargo builds in.
    pub fn of(workspace: &Workspace) -> anyhow::Result<Self> {
        let target = env::current_exe()?;
        let target = target.ancestors().nth(2).context("a program in a folder of cargo's")?;
        Ok(Self { root: workspace.root.clone(), copy: target.join("answers") })
    }

    /// Applies the patch to the copy and runs its check there. Then it runs all tests of the
    /// chapter, unless `quick`. A quick check lints only the chapter and what it depends on.
    pub fn check(&self, patch: &Path, quick: bool) -> anyhow::Result<()> {
        let text = fs::read_to_string(patch).with_context(|| patch.display().to_string())?;
        let command = text.lines().next().and_then(|line| line.strip_prefix("Check: "));
        let command = command.context("its first line is not `Check: COMMAND`")?;
        let package = command.split_whitespace().skip_while(|word| *word != "-p").nth(1);
        let package = package.context("its check names no package, as `-p reactor-v01` does")?;
        self.reset()?;
        self.run(&format!("git apply --whitespace=error '{}'", patch.display()))?;
        // The course has to pass these too.
        self.run("cargo fmt --all --check")?;
        let linted = if quick { format!("-p {package}") } else { "--workspace".to_owned() };
        self.run(&format!("cargo clippy --quiet --locked {linted} --all-targets -- -D warnings"))?;
        let text = self.run(command)?;
        // cargo succeeds even if no test has the name.
        let ran = text.lines().any(|line| line.starts_with("test ") && line.ends_with(" ok"));
        ensure!(ran, "no test has run:\n{text}");
        if !quick {
            self.run(&format!("cargo test --quiet --locked -p {package}"))?;
        }
        Ok(())
    }

    /// Makes the copy equal to the workspace.
    fn reset(&self) -> anyhow::Result<()> {
        let files = Workspace::at(&self.root)?.files;
        for name in &files {
            let (from, to) = (self.root.join(name), self.copy.join(name));
            let text = fs::read(&from)?;
            if fs::read(&to).ok() != Some(text) {
                fs::create_dir_all(to.parent().context("a file in a folder")?)?;
                fs::copy(&from, &to)?;
            }
        }
        self.remove_others(&self.copy, &files)
    }

    fn remove_others(&self, folder: &Path, files: &[String]) -> anyhow::Result<()> {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            let name = path.strip_prefix(&self.copy)?.display().to_string();
            if path.is_dir() {
                if name != "target" {
                    self.remove_others(&path, files)?;
                    // This succeeds if it is empty: cargo rejects a reactor-* without a manifest.
                    let _ = fs::remove_dir(&path);
                }
            } else if !files.contains(&name) {
                fs::remove_file(&path)?;
            }
        }
        Ok(())
    }

    /// Runs a command in the copy and returns its output.
    fn run(&self, command: &str) -> anyhow::Result<String> {
        let output = Command::new("bash")
            .args(["-c", command])
            .current_dir(&self.copy)
            // git would apply the patch to the repository around the copy.
            .env("GIT_CEILING_DIRECTORIES", self.copy.parent().context("a folder in a folder")?)
            .env("CARGO_TARGET_DIR", self.copy.join("target"))
            // Saves a third of the time to build; no debugger is used.
            .env("CARGO_PROFILE_DEV_DEBUG", "0")
            .output()?;
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        ensure!(output.status.success(), "{command}:\n{text}");
        Ok(text.into_owned())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::workspace::tests::repository;

    fn patch(check: &str, line: &str) -> String {
        format!(
            "Check: {check}\n--- a/src/lib.rs\n+++ b/src/lib.rs\n@@ -1,4 +1,4 @@\n #[test]\n fn one() {{\n\
             -    assert_eq!(1, 1);\n+    {line}\n }}\n"
        )
    }

    #[test]
    fn an_answer_that_does_what_it_says_passes_and_others_do_not() {
        let function = "#[test]\nfn one() {\n    assert_eq!(1, 1);\n}\n";
        let workspace = repository(&[
            ("Cargo.toml", "[package]\nname = \"a\"\nedition = \"2024\"\n\n[workspace]\n"),
            ("Cargo.lock", "version = 4\n\n[[package]]\nname = \"a\"\nversion = \"0.0.0\"\n"),
            ("src/lib.rs", &format!("{function}\n{}", function.replace("one", "other"))),
            ("gone.txt", ""),
        ]);
        let folder = tempfile::tempdir().unwrap();
        let root = workspace.path().to_owned();
        let copy = WorkspaceCopy { root, copy: folder.path().join("copy") };
        let path = folder.path().join("answer.patch");
        let check_as = |text: String, quick: bool| {
            fs::write(&path, text).unwrap();
            copy.check(&path, quick).map_err(|err| format!("{err:#}"))
        };
        let check = |text| check_as(text, false);
        let test = "cargo test -p a one";
        check(patch(test, "assert_eq!(2, 2);")).unwrap();
        assert!(copy.copy.join("gone.txt").exists());
        fs::remove_file(copy.root.join("gone.txt")).unwrap();
        check(patch(test, "assert_eq!(2, 2);")).unwrap();
        assert!(!copy.copy.join("gone.txt").exists());
        for (text, what) in [
            (patch(test, "assert_eq!(1, 2);"), "cargo test"),
            (patch(test, "assert_eq!(1, x);"), "cannot find value"),
            (patch(test, "let x = 1;"), "unused variable"),
            (patch(test, "assert_eq!( 1, 1 );"), "Diff in"),
            (patch("cargo test -p a third", "assert_eq!(2, 2);"), "no test has run"),
            (patch("cargo test -p a other", "assert_eq!(1, 2);"), "cargo test"),
            (patch(test, "assert_eq!(2, 2);").replace("fn one", "fn two"), "git apply"),
            (patch(test, "assert_eq!(2, 2);").replace("Check: ", ""), "first line"),
        ] {
            let err = check(text).unwrap_err();
            assert!(err.contains(what), "{what}: {err}");
        }
        check_as(patch("cargo test -p a other", "assert_eq!(1, 2);"), true).unwrap();
        let err = check_as(patch(test, "let x = 1;"), true).unwrap_err();
        assert!(err.contains("unused variable"), "{err}");
    }
}
