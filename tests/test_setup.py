"""Making .venv: which Python is taken, and what is said if there is none."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT


@pytest.fixture
def setup(tmp_path):
    """Run .ci/setup in a copy with only the given stand-ins for Python on the PATH."""
    project, bin_ = tmp_path / "project", tmp_path / "bin"
    (project / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "setup", project / ".ci")
    (project / "requirements.txt").write_text("")
    bin_.mkdir()
    for tool in ("dirname", "touch", "sh"):
        (bin_ / tool).symlink_to(shutil.which(tool))

    def run(**stand_ins: str) -> subprocess.CompletedProcess:
        for name, script in stand_ins.items():
            (bin_ / name).write_text(f"#!/bin/sh\n{script}\n")
            (bin_ / name).chmod(0o755)
        return subprocess.run(
            ["sh", project / ".ci" / "setup"],
            env={**os.environ, "PATH": str(bin_)},
            capture_output=True,
            text=True,
        )

    run.project = project
    return run


def python(version: str) -> str:
    """Return a stand-in that answers like a Python of this version and notes what it makes."""
    fits = int(version in ("3.10.1", "3.11.2", "3.12.3")) ^ 1
    return (
        'case "$*" in\n'
        f"  *python_version*) echo {version};;\n"
        f"  *version_info*) exit {fits};;\n"
        '  *"-m venv"*) /bin/mkdir -p .venv/bin; echo "exit 0" > .venv/bin/python;\n'
        f"    /bin/chmod +x .venv/bin/python; echo {version} > made-by;;\n"
        "esac"
    )


def test_no_python_at_all_is_one_line_that_says_which_and_why(setup):
    done = setup()
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert "Python 3.10, 3.11 or 3.12 is needed, since TensorFlow 2.16.2" in done.stderr


def test_other_versions_are_named_in_that_line(setup):
    done = setup(python3=python("3.13.0"), python=python("2.7.18"))
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert "python3 is 3.13.0; python is 2.7.18;" in done.stderr


def test_stub_that_only_prints_an_error_is_passed_over(setup):
    stub = "echo 'command not found' >&2; exit 127"
    done = setup(**{"python3": python("3.9.1"), "python3.11": stub, "python3.12": python("3.12.3")})
    assert done.returncode == 0, done.stderr
    assert (setup.project / "made-by").read_text() == "3.12.3\n"
    assert (setup.project / ".venv" / ".installed").exists()


def test_environment_of_another_python_is_not_touched(setup):
    old = setup.project / ".venv" / "bin" / "python"
    old.parent.mkdir(parents=True)
    old.write_text(f"#!/bin/sh\n{python('3.13.0')}\n")
    old.chmod(0o755)
    done = setup(python3=python("3.11.2"))
    assert done.returncode != 0
    assert ".venv holds Python 3.13.0" in done.stderr
    assert "delete .venv" in done.stderr
    assert not Path(setup.project / "made-by").exists()
