"""The folders on the runner from which the pipeline, the API and retrainings run."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import ROOT

pytestmark = pytest.mark.slow  # a second for each clone

# Stands in for Python: makes an environment in which pip only says that it was called.
PYTHON = """#!/bin/sh
case "$*" in
    *"-m venv"*)
        for folder; do :; done
        mkdir -p "$folder/bin"
        cp "$0" "$folder/bin/python";;
    *"-m pip"*) echo installed >> "$HOME/pip"; [ ! -e "$HOME/broken" ];;
    -V | *python_version*) cat "$HOME/version";;
esac
"""


class Checkout:
    """A work tree as checkout leaves it, on a machine of its own."""

    def __init__(self, root: Path):
        self.tree, self.home = root / "work tree", root / "home"
        self.kept = self.home / "defect-detection"
        for folder in (self.tree / ".ci", self.home / "bin"):
            folder.mkdir(parents=True)
        for script in ("release", "setup"):
            shutil.copy(ROOT / ".ci" / script, self.tree / ".ci")
        shutil.copy(ROOT / ".gitignore", self.tree)
        (self.home / "bin" / "python3").write_text(PYTHON)
        (self.home / "bin" / "python3").chmod(0o755)
        (self.home / "version").write_text("3.11.7\n")
        self.env = os.environ | {"HOME": str(self.home)}
        self.env["PATH"] = f"{self.home / 'bin'}:{os.environ['PATH']}"
        self.git("init", "-q")
        self.commit("first")

    def git(self, *arguments: str) -> str:
        command = ["git", "-C", self.tree, "-c", "user.name=t", "-c", "user.email=t@localhost"]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def commit(self, content: str) -> str:
        """Commit a change of requirements.txt; return the commit."""
        (self.tree / "requirements.txt").write_text(content)
        self.git("add", ".")
        self.git("commit", "-q", "--allow-empty", "-m", content)
        return self.git("rev-parse", "HEAD")

    def release(self, path: str = "") -> Path:
        done = self.run(path)
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.strip())

    def run(self, path: str = "") -> subprocess.CompletedProcess:
        env = self.env | ({"PATH": f"{path}:{self.env['PATH']}"} if path else {})
        return subprocess.run(
            [self.tree / ".ci" / "release"], env=env, capture_output=True, text=True
        )

    def installations(self) -> int:
        return (self.home / "pip").read_text().count("installed")

    def names(self, folder: str) -> set[str]:
        return {path.name for path in (self.kept / folder).iterdir()}


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.fixture
def start() -> Iterator:
    """Start processes that do nothing until the test ends."""
    started: list[subprocess.Popen] = []

    def run(*arguments: object, cwd: Path) -> subprocess.Popen:
        idle = "import time\nprint(flush=True)\ntime.sleep(600)"
        command = [sys.executable, "-c", idle, *map(str, arguments)]
        process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE)
        process.stdout.readline()
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def test_release_is_the_commit_with_an_environment_outside_of_the_work_tree(checkout):
    release = checkout.release()
    commit = checkout.git("rev-parse", "HEAD")
    assert release.parent == checkout.kept / "releases" and release.name.startswith(commit)
    found = subprocess.run(
        ["git", "-C", release, "rev-parse", "HEAD"], capture_output=True, text=True
    )
    assert found.stdout.strip() == commit
    (venv,) = (checkout.kept / "venvs").iterdir()
    assert (release / ".venv").resolve() == venv and (venv / ".installed").exists()
    assert (release / ".cache").resolve() == checkout.kept / "cache"
    # The next checkout deletes what git ignores.
    checkout.git("clean", "-ffdxq")
    command = [release / ".venv" / "bin" / "python", "-V"]
    assert subprocess.run(command, env=checkout.env).returncode == 0


def test_the_same_commit_again_is_the_same_release_and_installs_nothing(checkout):
    release = checkout.release()
    (release / "api.log").write_text("of the API that runs")
    assert checkout.release() == release
    assert (release / "api.log").exists()
    assert checkout.installations() == 1


def test_environment_is_one_for_each_requirements_and_python(checkout):
    checkout.release()
    checkout.commit("first")  # the same requirements
    checkout.release()
    assert checkout.installations() == len(checkout.names("venvs")) == 1
    checkout.commit("second")
    checkout.release()
    assert checkout.installations() == len(checkout.names("venvs")) == 2
    (checkout.home / "version").write_text("3.11.8\n")
    checkout.release()
    assert checkout.installations() == 3


def test_installation_that_was_cut_off_is_repeated(checkout):
    (checkout.home / "broken").touch()
    assert checkout.run().returncode != 0
    (checkout.home / "broken").unlink()
    release = checkout.release()
    assert checkout.installations() == 2
    (release / ".venv" / "bin" / "python").unlink()  # of a Python that was removed
    checkout.release()
    assert checkout.installations() == 3


def test_clone_that_was_cut_off_is_made_again(checkout):
    (checkout.kept / "releases" / "new" / "half").mkdir(parents=True)
    release = checkout.release()
    assert checkout.names("releases") == {release.name}
    assert not (release / "half").exists()


def releases(checkout: Checkout, names: str) -> list[Path]:
    made = []
    for name in names:
        checkout.commit(name)
        made.append(checkout.release())
        os.utime(made[-1], (ord(name), ord(name)))  # in this order, however fast they are made
    return made


def test_three_releases_stay_and_those_that_something_runs_from(checkout, start):
    first = releases(checkout, "ab")
    api = start(cwd=first[0])  # as start_api.sh starts it: its command line names no folder
    job = start(first[1] / "re_train" / "re_train.py", cwd=checkout.home)
    later = releases(checkout, "cdef")
    newest = {path.name for path in later[1:]}
    assert checkout.names("releases") == newest | {path.name for path in first}
    assert len(checkout.names("venvs")) == 5
    assert (first[0] / ".venv" / "bin" / "python").exists()
    for process in (api, job):
        process.kill()
        process.wait()
    checkout.git("checkout", "-q", first[0].name[:40])  # the run of an older commit is repeated
    assert checkout.release() == first[0]
    assert checkout.names("releases") == {first[0].name} | {path.name for path in later[2:]}
    assert len(checkout.names("venvs")) == 3


def test_environment_of_what_runs_stays_when_python_is_another_one(checkout, start):
    release = checkout.release()
    (venv,) = (checkout.kept / "venvs").iterdir()
    start(cwd=release)
    (checkout.home / "version").write_text("3.11.8\n")
    other = checkout.release()  # of the same commit
    assert (release / ".venv").resolve() == venv and (venv / "bin" / "python").exists()
    assert (other / ".venv").resolve() != venv
    assert checkout.release() == other


def test_folder_that_is_no_clone_is_made_anew(checkout):
    release = checkout.release()
    shutil.rmtree(release)
    (release / "data").mkdir(parents=True)  # as by what ran on
    assert checkout.release() == release
    assert (release / ".venv").exists() and not (release / "data").exists()


def lsof(folder: Path, says: str) -> str:
    """Return a folder with a stand-in for lsof, which macOS has and Linux may lack."""
    folder.mkdir()
    (folder / "lsof").write_text(f"#!/bin/sh\n{says}\n")
    (folder / "lsof").chmod(0o755)
    return str(folder)


def test_working_directories_are_known_by_lsof_too(checkout, tmp_path):
    first = releases(checkout, "a")[0]
    says = f"printf 'p1\\nn%s\\np2\\nn%s\\n' {first} \"$PWD\"; exit 1"
    path = lsof(tmp_path / "bin", says)
    for name in "bcde":
        checkout.commit(name)
        checkout.release(path)
    assert first.name in checkout.names("releases")
    assert len(checkout.names("releases")) == 4


def test_nothing_is_deleted_if_working_directories_are_not_known(checkout, tmp_path):
    path = lsof(tmp_path / "bin", "exit 1")
    for name in "abcde":
        checkout.commit(name)
        checkout.release(path)
    assert len(checkout.names("releases")) == len(checkout.names("venvs")) == 5
    done = checkout.run(path)
    assert "No release is deleted, since" in done.stderr
    assert Path(done.stdout.strip()).is_dir()


def test_a_push_takes_nothing_away_from_what_runs(checkout, start):
    """What the next push does: checkout cleans the work tree, then its pipeline begins."""
    release = checkout.release()
    retraining = start(release / "re_train.py", cwd=release)
    before = sorted(path for path in release.rglob("*") if ".git/" not in str(path))
    for name in "abcdef":
        checkout.commit(name)
        checkout.git("clean", "-ffdxq")
        checkout.release()
    assert sorted(path for path in release.rglob("*") if ".git/" not in str(path)) == before
    assert (release / ".venv" / "bin" / "python").exists()
    assert retraining.poll() is None
