//! The workspace: where it is and which files it has.

use std::env;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

/// The workspace. All paths are relative to its root.
pub struct Workspace {
    /// Its folder.
    pub root: PathBuf,
    /// All files that git tracks or would track, so without build output.
    pub files: Vec<String>,
}

impl Workspace {
    /// The workspace of this package.
    pub fn current() -> anyhow::Result<Self> {
        // cargo sets this when it runs the program, so the folder may be moved after a build.
        let package = env::var_os("CARGO_MANIFEST_DIR").context("run it as `cargo xtask`")?;
        // A workspace has one lock file, at its root.
        let mut folders = Path::new(&package).ancestors();
        let root = folders.find(|folder| folder.join("Cargo.lock").is_file());
        Self::at(root.context("no Cargo.lock above this package")?)
    }

    /// The workspace with this root.
    pub fn at(root: &Path) -> anyhow::Result<Self> {
        let output = Command::new("git")
            // The clone may belong to another user.
            .args(["-c", "safe.directory=*", "ls-files", "-z"])
            .args(["--cached", "--others", "--exclude-standard"])
            .current_dir(root)
            .output()
            .context("cannot run git")?;
        ensure!(output.status.success(), "git: {}", String::from_utf8_lossy(&output.stderr));
        let output = String::from_utf8(output.stdout)?;
        let mut files: Vec<String> = output.split_terminator('\0').map(str::to_owned).collect();
        // A file may be deleted without a commit yet.
        files.retain(|file| root.join(file).exists());
        files.sort();
        Ok(Self { root: root.to_owned(), files })
    }

    /// Whether there is a file or a folder at this path.
    pub fn has(&self, path: &str) -> bool {
        self.root.join(path).exists()
    }

    /// The text of a file.
    pub fn read(&self, path: &str) -> anyhow::Result<String> {
        fs::read_to_string(self.root.join(path)).with_context(|| path.to_owned())
    }

    /// Builds packages, and returns the folder of their programs.
    pub fn build(
        &self,
        packages: impl IntoIterator<Item = impl AsRef<str>>,
    ) -> anyhow::Result<PathBuf> {
        let mut cargo = Command::new(env::var_os("CARGO").context("run it as `cargo xtask`")?);
        cargo.args(["build", "--quiet", "--locked"]).current_dir(&self.root);
        for package in packages {
            cargo.args(["--package", package.as_ref()]);
        }
        ensure!(cargo.status()?.success(), "the chapters do not build");
        // They are in the folder of this program: target/debug, wherever that is.
        Ok(env::current_exe()?.parent().context("a program in a folder")?.to_owned())
    }

    /// The files whose paths have this start and this end.
    pub fn files<'a>(&'a self, start: &'a str, end: &'a str) -> impl Iterator<Item = &'a str> {
        let files = self.files.iter().map(String::as_str);
        files.filter(move |file| file.starts_with(start) && file.ends_with(end))
    }

    /// The pages: README.md and all of docs.
    pub fn pages(&self) -> impl Iterator<Item = &str> {
        self.files("README.md", "").chain(self.files("docs/", ".md"))
    }

    /// The answers to the exercises.
    pub fn answers(&self) -> impl Iterator<Item = &str> {
        self.files("docs/src/answers/", ".patch")
    }
}

/// Resolves the path `to` in a page: `./v02.md` in `docs/src/v01.md` is `docs/src/v02.md`.
pub fn beside(page: &str, to: &str) -> anyhow::Result<String> {
    let mut path = PathBuf::from(page);
    path.pop();
    for component in Path::new(to).components() {
        match component {
            Component::ParentDir => ensure!(path.pop(), "{to} is outside the repository"),
            Component::CurDir => {}
            other => path.push(other),
        }
    }
    Ok(path.display().to_string())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub mod tests {
    use super::*;

    /// A repository with these files, uncommitted.
    pub fn repository(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let git = Command::new("git").args(["init", "--quiet"]).current_dir(&folder).status();
        assert!(git.unwrap().success());
        folder
    }
}
