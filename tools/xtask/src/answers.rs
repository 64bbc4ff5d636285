//! The answers to the exercises: patches, each tried on a copy of the workspace.
//!
//! A patch begins with a line `Check: COMMAND`, the command that the answer makes succeed.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

/// A folder with a copy of the workspace that is made anew for each answer, but where only the files
/// that differ are written: so that little has to be built again.
pub struct WorkspaceCopy {
    root: PathBuf,
    copy: PathBuf,
}

impl WorkspaceCopy {
    /// Below the folder that cargo builds in.
    ///
    /// # Errors
    /// It is not known.
    pub fn of(root: &Path) -> anyhow::Result<Self> {
        let target = env::current_exe()?;
        let target = target.ancestors().nth(2).context("a program in a folder of cargo's")?;
        Ok(Self { root: root.to_owned(), copy: target.join("answers") })
    }

    /// Applies the patch to the copy, and runs its check there; then, unless it has to be `quick`,
    /// all tests of the chapter.
    ///
    /// # Errors
    /// It does not apply, or what it makes does not build or fails.
    pub fn check(&self, patch: &Path, quick: bool) -> anyhow::Result<()> {
        let text = fs::read_to_string(patch).with_context(|| patch.display().to_string())?;
        let command = check_of(&text)?;
        self.reset()?;
        self.run("git", &["apply", "--whitespace=error", &patch.display().to_string()])?;
        // As strict as the course is with itself.
        self.run("cargo", &["fmt", "--all", "--check"])?;
        let clippy = "clippy --quiet --locked --workspace --all-targets -- -D warnings";
        self.run("cargo", &clippy.split(' ').collect::<Vec<_>>())?;
        let text = self.run("bash", &["-c", command])?;
        // A filter that no test passes would succeed without a test.
        let ran = text.lines().any(|line| line.starts_with("test ") && line.ends_with(" ok"));
        ensure!(ran, "no test has run:\n{text}");
        let package = package_of(command)?;
        if !quick {
            // And the chapter still does all that it did.
            self.run("cargo", &["test", "--quiet", "--locked", "-p", package])?;
        }
        Ok(())
    }

    /// Makes the copy as the workspace is.
    fn reset(&self) -> anyhow::Result<()> {
        let listed = Command::new("git")
            // The folder may belong to somebody else, who has cloned it.
            .args(["-c", "safe.directory=*", "ls-files", "-z"])
            .args(["--cached", "--others", "--exclude-standard"])
            .current_dir(&self.root)
            .output()?;
        ensure!(listed.status.success(), "git: {}", String::from_utf8_lossy(&listed.stderr));
        let listed = String::from_utf8(listed.stdout)?;
        let mut wanted: Vec<&str> = listed.split_terminator('\0').collect();
        // Without what is deleted, but not committed yet.
        wanted.retain(|name| self.root.join(name).exists());
        for name in &wanted {
            let (from, to) = (self.root.join(name), self.copy.join(name));
            let text = fs::read(&from)?;
            if fs::read(&to).ok() != Some(text) {
                fs::create_dir_all(to.parent().context("a file in a folder")?)?;
                fs::copy(&from, &to)?;
            }
        }
        self.remove_others(&self.copy, &wanted)
    }

    fn remove_others(&self, folder: &Path, wanted: &[&str]) -> anyhow::Result<()> {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            let name = path.strip_prefix(&self.copy)?.display().to_string();
            if path.is_dir() {
                if name != "target" {
                    self.remove_others(&path, wanted)?;
                }
            } else if !wanted.contains(&name.as_str()) {
                fs::remove_file(&path)?;
            }
        }
        Ok(())
    }

    /// Runs a program in the copy and returns what it has printed.
    fn run(&self, program: &str, args: &[&str]) -> anyhow::Result<String> {
        let output = Command::new(program)
            .args(args)
            .current_dir(&self.copy)
            // A repository around the copy is not the patch's.
            .env("GIT_CEILING_DIRECTORIES", self.copy.parent().context("a folder in a folder")?)
            .env("CARGO_TARGET_DIR", self.copy.join("target"))
            .output()
            .with_context(|| format!("cannot run {program}"))?;
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        ensure!(output.status.success(), "{program} {}:\n{text}", args.join(" "));
        Ok(text.into_owned())
    }
}

/// The paths of all answers.
///
/// # Errors
/// Their folder cannot be read.
pub fn all(root: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let folder = root.join("docs/src/answers");
    let entries = fs::read_dir(&folder).with_context(|| folder.display().to_string())?;
    let mut patches = entries.map(|entry| Ok(entry?.path())).collect::<anyhow::Result<Vec<_>>>()?;
    patches.retain(|path| path.extension().is_some_and(|extension| extension == "patch"));
    patches.sort();
    Ok(patches)
}

fn check_of(patch: &str) -> anyhow::Result<&str> {
    let line = patch.lines().next().and_then(|line| line.strip_prefix("Check: "));
    line.context("its first line is not `Check: COMMAND`")
}

fn package_of(command: &str) -> anyhow::Result<&str> {
    let mut words = command.split_whitespace().skip_while(|word| *word != "-p");
    words.nth(1).context("its check names no package, as in `cargo test -p reactor-v01`")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// A workspace of one small package, in a repository of its own.
    fn workspace() -> (tempfile::TempDir, WorkspaceCopy) {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        let write = |name: &str, text: &str| {
            let path = root.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("Cargo.toml", "[package]\nname = \"a\"\nedition = \"2024\"\n\n[workspace]\n");
        write("Cargo.lock", "version = 4\n\n[[package]]\nname = \"a\"\nversion = \"0.0.0\"\n");
        let other = "\n#[test]\nfn other() {\n    assert_eq!(1, 1);\n}\n";
        write("src/lib.rs", &format!("#[test]\nfn one() {{\n    assert_eq!(1, 1);\n}}\n{other}"));
        write("gone.txt", "");
        let status = Command::new("git").args(["init", "--quiet"]).current_dir(&root).status();
        assert!(status.unwrap().success());
        let copy = folder.path().join("copy");
        (folder, WorkspaceCopy { root, copy })
    }

    fn patch(check: &str, line: &str) -> String {
        format!(
            "Check: {check}\n--- a/src/lib.rs\n+++ b/src/lib.rs\n@@ -1,4 +1,4 @@\n #[test]\n fn one() {{\n\
             -    assert_eq!(1, 1);\n+    {line}\n }}\n"
        )
    }

    #[test]
    fn an_answer_that_does_what_it_says_passes_and_others_do_not() {
        let (folder, copy) = workspace();
        let path = folder.path().join("answer.patch");
        let check = |text: String| {
            fs::write(&path, text).unwrap();
            copy.check(&path, false).map_err(|err| format!("{err:#}"))
        };
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
    }
}
