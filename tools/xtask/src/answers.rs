//! Tests the answers to the exercises: each is a patch, applied to a copy of the workspace.
//!
//! A patch begins with a line `Check: COMMAND`. The command succeeds with the answer, and fails with
//! its tests alone, which so grade a learner's solution too.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, bail, ensure};

use crate::grade::report;
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

    /// Applies only the patch's tests to the copy. Its check has to build there, and to fail: else it
    /// could not grade a solution.
    pub fn check_tests(&self, patch: &Path) -> anyhow::Result<()> {
        let command = &self.start(patch, true)?;
        self.run(&command.replacen("cargo test", "cargo test --no-run", 1))?;
        // A test that waits for what never comes would wait for half a minute.
        let passes = self.output(&format!("timeout 1 {command}"))?.status.success();
        ensure!(!passes, "{command}: it has to fail without the answer");
        Ok(())
    }

    /// Applies the patch to the copy and runs its check there. Then it runs all tests of the
    /// chapter, unless `quick`. A quick check lints only the chapter and what it depends on.
    pub fn check(&self, patch: &Path, quick: bool) -> anyhow::Result<()> {
        let command = &self.start(patch, false)?;
        let package = command.split_whitespace().skip_while(|word| *word != "-p").nth(1);
        let package = package.context("its check names no package, as `-p reactor-v01` does")?;
        // The course has to pass these too.
        self.run("cargo fmt --all --check")?;
        let linted = if quick { format!("-p {package}") } else { "--workspace".to_owned() };
        self.run(&format!("cargo clippy --quiet --locked {linted} --all-targets -- -D warnings"))?;
        if let Some((why, _)) = self.failure(command)? {
            bail!("{command}:\n{why}");
        }
        if !quick {
            self.run(&format!("cargo test --quiet --locked -p {package}"))?;
        }
        Ok(())
    }

    /// Runs the tests of an answer on the workspace as it is, the learner's solution. Returns
    /// whether they pass.
    pub fn grade(&self, workspace: &Workspace, id: &str) -> anyhow::Result<bool> {
        let id_of = |path: &str| Some(Path::new(path).file_stem()?.to_str()?.to_owned());
        let mut ids = workspace.answers().filter_map(id_of).collect::<Vec<_>>();
        ids.sort();
        ensure!(ids.iter().any(|it| it == id), "no exercise {id:?}, but {}", ids.join(", "));
        let patch = format!("docs/src/answers/{id}.patch");
        let command = self.start(&self.root.join(&patch), true).context(
            "the exercise's tests don't fit into yours; take back the files that git names here, for \
             example by `git checkout main -- tests`",
        )?;
        let Some((why, place)) = self.failure(&command)? else {
            println!("{id} pass");
            return Ok(true);
        };
        println!("{id} FAIL\n");
        for line in why.lines() {
            println!("  {line}");
        }
        println!("\n  test   {}", self.copy.join(place).display());
        for page in workspace.files("docs/src/", ".md") {
            let text = workspace.read(page)?;
            if let Some((before, _)) = text.split_once(&format!("(answers/{id}.patch)")) {
                let title = before.rsplit("\n### ").next().and_then(|text| text.lines().next());
                println!("  read   {page}, {}", title.unwrap_or_default());
            }
        }
        println!("  answer {patch}, for afterwards");
        println!("  again  scripts/grade.sh exercise {id}");
        Ok(false)
    }

    /// Applies a patch, or only its tests, to a fresh copy of the workspace. Returns its check.
    fn start(&self, patch: &Path, tests: bool) -> anyhow::Result<String> {
        let text = fs::read_to_string(patch).with_context(|| patch.display().to_string())?;
        let command = text.lines().next().and_then(|line| line.strip_prefix("Check: "));
        let command = command.context("its first line is not `Check: COMMAND`")?;
        self.reset()?;
        // With less context, a test that the learner has added at the end of a file is no conflict.
        let options = if tests { format!("-C2 {}", only_tests(command)) } else { String::new() };
        self.run(&format!("git apply --whitespace=error {options} '{}'", patch.display()))?;
        Ok(command.to_owned())
    }

    /// Runs a check. If it fails, returns what the tests say and the place of the first failure, or
    /// what the compiler says.
    fn failure(&self, command: &str) -> anyhow::Result<Option<(String, String)>> {
        let output = self.output(command)?;
        let [stdout, stderr] =
            [output.stdout, output.stderr].map(|it| String::from_utf8_lossy(&it).into_owned());
        if output.status.success() {
            // cargo succeeds even if no test has the name.
            let ran = stdout.lines().any(|line| line.starts_with("test ") && line.ends_with(" ok"));
            ensure!(ran, "no test has run:\n{stdout}");
            return Ok(None);
        }
        if let Some((_, place)) = stdout.lines().find_map(|line| line.split_once(" panicked at ")) {
            let place = place.trim_end_matches(':').rsplit("../").next().unwrap_or_default();
            return Ok(Some((report(&stdout), place.to_owned())));
        }
        let errors = stderr.lines().skip_while(|line| !line.starts_with("error"));
        Ok(Some((errors.collect::<Vec<_>>().join("\n"), String::new())))
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

    /// Runs a command in the copy. It has to succeed.
    fn run(&self, command: &str) -> anyhow::Result<()> {
        let output = self.output(command)?;
        let text = [output.stdout, output.stderr].concat();
        ensure!(output.status.success(), "{command}:\n{}", String::from_utf8_lossy(&text));
        Ok(())
    }

    /// Runs a command in the copy.
    fn output(&self, command: &str) -> anyhow::Result<Output> {
        let mut bash = Command::new("bash");
        bash.args(["-c", command])
            .current_dir(&self.copy)
            // git would apply the patch to the repository around the copy.
            .env("GIT_CEILING_DIRECTORIES", self.copy.parent().context("a folder in a folder")?)
            .env("CARGO_TARGET_DIR", self.copy.join("target"))
            // Saves a third of the time to build; no debugger is used.
            .env("CARGO_PROFILE_DEV_DEBUG", "0")
            .env_remove("REACTOR_CMD")
            .env_remove("RUST_BACKTRACE");
        Ok(bash.output()?)
    }
}

/// The options of `git apply` for only the files of the tests that a check names.
fn only_tests(command: &str) -> String {
    let (mut options, mut words) = (String::new(), command.split_whitespace());
    while words.any(|word| word == "--test") {
        options += &format!("--include='*tests/{}.rs' ", words.next().unwrap_or_default());
    }
    options
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

    #[test]
    fn an_exercise_is_graded_by_the_tests_of_its_answer_alone() {
        let (lib, test) = ("pub fn one() -> i32 {\n    2\n}\n", "//! A.\n#[test]\nfn old() {}\n");
        let answer = "Check: cargo test -p a --test a one\n--- a/src/lib.rs\n+++ b/src/lib.rs\n@@ -1,3 +1,3 @@\n \
            pub fn one() -> i32 {\n-    2\n+    3 - 2\n }\n--- a/tests/a.rs\n+++ b/tests/a.rs\n\
            @@ -1,3 +1,8 @@\n //! A.\n #[test]\n fn old() {}\n+\n+#[test]\n+fn one() {\n+    \
            assert_eq!(a::one(), 1);\n+}\n";
        let folder = repository(&[
            ("Cargo.toml", "[package]\nname = \"a\"\nedition = \"2024\"\n\n[workspace]\n"),
            ("Cargo.lock", "version = 4\n\n[[package]]\nname = \"a\"\nversion = \"0.0.0\"\n"),
            ("src/lib.rs", lib),
            ("tests/a.rs", test),
            ("docs/src/v01.md", "# One\n\n### 1. One\n\n[answer](answers/v01-1.patch)\n"),
            ("docs/src/answers/v01-1.patch", answer),
        ]);
        let root = folder.path().to_owned();
        let copies = tempfile::tempdir().unwrap();
        let copy = WorkspaceCopy { root: root.clone(), copy: copies.path().join("copy") };
        let grade = |id| {
            let passed = copy.grade(&Workspace::at(&root).unwrap(), id);
            passed.map_err(|err| format!("{err:#}"))
        };
        let patch = root.join("docs/src/answers/v01-1.patch");
        copy.check_tests(&patch).unwrap();
        copy.check(&patch, true).unwrap();
        assert_eq!(grade("v01-1"), Ok(false));
        let (why, place) = copy.failure("cargo test -p a --test a one").unwrap().unwrap();
        assert!(why.contains("left: 2") && place.starts_with("tests/a.rs:7:"), "{place}: {why}");
        // A solution of the learner's own, with a new file and a test.
        fs::write(root.join("src/lib.rs"), "mod own;\npub use own::one;\n").unwrap();
        assert_eq!(grade("v01-1"), Ok(false), "it does not compile");
        let (why, _) = copy.failure("cargo test -p a --test a one").unwrap().unwrap();
        assert!(why.starts_with("error[E0583]: file not found for module `own`"), "{why}");
        fs::write(root.join("src/own.rs"), lib.replace(" 2", " 1")).unwrap();
        let own = format!("{test}\n#[test]\nfn own() {{}}\n");
        fs::write(root.join("tests/a.rs"), &own).unwrap();
        assert_eq!(grade("v01-1"), Ok(true));
        assert_eq!(fs::read_to_string(root.join("tests/a.rs")).unwrap(), own);
        fs::write(root.join("tests/a.rs"), test).unwrap();
        let err = copy.check_tests(&patch).unwrap_err().to_string();
        assert!(err.ends_with("it has to fail without the answer"), "{err}");
        assert_eq!(grade("v01-2").unwrap_err(), "no exercise \"v01-2\", but v01-1");
        fs::write(root.join("tests/a.rs"), "").unwrap();
        let err = grade("v01-1").unwrap_err();
        assert!(err.contains("don't fit into yours") && err.contains("tests/a.rs"), "{err}");
    }
}
