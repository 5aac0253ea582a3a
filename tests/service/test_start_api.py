"""start_api.sh."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, Project, free_port, wait_for


@pytest.fixture
def start_api(project: Project, tmp_path):
    """Run start_api.sh of a copy of the project, from another folder."""
    shutil.copy(ROOT / "start_api.sh", project.root)
    (project.root / ".venv").symlink_to(sys.prefix)
    env = project.environment() | {"API_PORT": str(free_port()), "RUNNER_TRACKING_ID": "github_1"}

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [project.root / "start_api.sh", *arguments],
            cwd=tmp_path,
            env=env | more,
            capture_output=True,
            text=True,
            timeout=100,
        )

    run.root = project.root
    yield run
    run("stop")


def pid(root: Path) -> int:
    return int((root / ".jobs" / "api.pid").read_text())


def test_start_status_again_and_stop(start_api):
    assert start_api("status").returncode == 1
    started = start_api()
    assert started.returncode == 0, started.stderr
    assert "The API is running" in started.stdout
    assert "Serving on http://0.0.0.0:" in (start_api.root / "api.log").read_text()
    first = pid(start_api.root)
    again = start_api()
    assert again.returncode == 0
    assert f"already running (process {first}" in again.stdout
    assert pid(start_api.root) == first
    assert start_api("status").returncode == 0
    assert start_api("stop").returncode == 0
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    assert "not running" in start_api("stop").stdout


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
def test_the_runner_cannot_recognise_the_api_as_its_own(start_api):
    assert start_api().returncode == 0
    environment = Path(f"/proc/{pid(start_api.root)}/environ").read_bytes().split(b"\0")
    assert b"RUNNER_TRACKING_ID=" in environment


def test_pid_file_of_another_program_is_not_believed(start_api):
    (start_api.root / ".jobs").mkdir()
    (start_api.root / ".jobs" / "api.pid").write_text(str(os.getpid()))
    assert start_api("status").returncode == 1
    assert "not running" in start_api("stop").stdout
    assert start_api().returncode == 0
    assert pid(start_api.root) != os.getpid()


def test_api_that_was_killed_can_be_started_again(start_api):
    assert start_api().returncode == 0
    os.kill(pid(start_api.root), signal.SIGKILL)
    wait_for(lambda: start_api("status").returncode == 1)
    assert start_api().returncode == 0


def test_api_that_does_not_start_fails_with_the_end_of_its_log(start_api):
    done = start_api(API_PORT="99999")
    assert done.returncode == 1
    assert "the API did not start. The end of api.log:" in done.stderr
    assert "99999" in done.stderr
    assert not (start_api.root / ".jobs" / "api.pid").exists()


def test_unknown_word_shows_the_usage(start_api):
    done = start_api("restart")
    assert done.returncode == 2
    assert "usage: ./start_api.sh [start|stop|status]" in done.stderr
