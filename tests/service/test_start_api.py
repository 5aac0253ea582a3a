"""start_api.sh."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, Project, free_port, long, wait_for


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

    run.root, run.env = project.root, env
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


@pytest.mark.long
def test_pid_file_of_another_program_is_not_believed(start_api):
    (start_api.root / ".jobs").mkdir()
    (start_api.root / ".jobs" / "api.pid").write_text(str(os.getpid()))
    assert start_api("status").returncode == 1
    assert "not running" in start_api("stop").stdout
    assert start_api().returncode == 0
    assert pid(start_api.root) != os.getpid()


@pytest.fixture
def namesake(tmp_path):
    """The process of another `python3 api.py`."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "api.py").write_text("import time\ntime.sleep(600)")
    process = subprocess.Popen(["python3", "api.py"], cwd=tmp_path / "other")
    yield process
    process.kill()
    process.wait()


@pytest.mark.long
def test_another_api_behind_a_stale_number_is_never_ended(start_api, namesake):
    assert start_api().returncode == 0
    os.kill(pid(start_api.root), signal.SIGKILL)
    wait_for(lambda: start_api("status").returncode == 1)
    (start_api.root / ".jobs" / "api.pid").write_text(str(namesake.pid))
    assert start_api("status").returncode == 1
    assert "not running" in start_api("stop").stdout
    assert start_api().returncode == 0
    assert pid(start_api.root) != namesake.pid
    assert "is stopped" in start_api("stop").stdout
    assert namesake.poll() is None


@pytest.mark.long
def test_api_of_a_former_version_which_locked_nothing_is_stopped(start_api):
    env = start_api.env
    api = subprocess.Popen(
        [start_api.root / ".venv" / "bin" / "python", "api.py"],
        cwd=start_api.root,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        (start_api.root / ".jobs").mkdir(exist_ok=True)
        (start_api.root / ".jobs" / "api.pid").write_text(str(api.pid))
        wait_for(lambda: start_api("status").returncode == 0)
        stopped = subprocess.Popen([start_api.root / "start_api.sh", "stop"], env=env)
        assert api.wait(60) is not None
        assert stopped.wait(60) == 0
    finally:
        api.kill()
        api.wait()


def test_second_api_with_the_same_pid_file_is_refused_in_one_line(start_api):
    assert start_api().returncode == 0
    first = pid(start_api.root)
    command = [sys.executable, "api.py", "--pid-file", ".jobs/api.pid", "--port", str(free_port())]
    done = subprocess.run(
        command, cwd=start_api.root, env=start_api.env, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "error: The API is running already, as .jobs/api.pid shows\n"
    assert pid(start_api.root) == first


def test_api_that_breaks_down_before_it_logs_says_so_in_its_log(start_api):
    (start_api.root / "api.py").write_text("raise ValueError('broken')")
    done = start_api()
    assert done.returncode == 1
    assert "ValueError: broken" in done.stderr
    assert "ValueError: broken" in (start_api.root / "api.log").read_text()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("API_PORT", "abc"),
        long("API_PORT", "50 01"),
        ("RETRAIN_TIME_LIMIT", "soon"),
        long("RETRAIN_TIME_LIMIT", "nan"),
    ],
)
def test_variable_that_is_no_number_is_one_line(start_api, name, value):
    done = subprocess.run(
        [sys.executable, "api.py"],
        cwd=start_api.root,
        env=start_api.env | {name: value},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ") and name in done.stderr and value in done.stderr
    started = start_api(**{name: value})
    assert started.returncode == 1
    assert started.stderr.splitlines()[-1].startswith("error: ")
    assert name in started.stderr and value in started.stderr


def test_api_runs_by_the_real_path_of_its_environment(start_api):
    (start_api.root / "api.py").write_text("import sys; sys.exit(sys.executable)")
    assert start_api().returncode == 1
    started = (start_api.root / "api.log").read_text().splitlines()[-1]
    assert started == str(Path(sys.prefix).resolve() / "bin" / "python")


@pytest.mark.long
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
