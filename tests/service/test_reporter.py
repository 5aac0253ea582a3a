"""The side of a job's process."""

import errno
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from conftest import ROOT
from defect_detection import PipelineError
from defect_detection.service.reporter import Reporter


@pytest.fixture
def full_disk(monkeypatch):
    """Return a call after which this process writes no file any more."""

    def mkstemp(*_arguments, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda: monkeypatch.setattr(tempfile, "mkstemp", mkstemp)


def test_progress_that_cannot_be_written_is_warned_of_once_and_ends_nothing(
    tmp_path, full_disk, caplog
):
    reporter = Reporter({"RETRAIN_JOB_FOLDER": str(tmp_path)})
    full_disk()
    with caplog.at_level(logging.WARNING):
        for epoch in range(3):
            reporter.progress(epoch, 3, "run-1")
    (warning,) = caplog.messages
    assert "The progress is not shown" in warning and "No space left" in warning


def test_prepared_result_needs_no_room_on_the_disk(tmp_path, full_disk):
    reporter = Reporter({"RETRAIN_JOB_FOLDER": str(tmp_path)})
    reporter.prepare("Production_Reg", 3, 0.9)
    assert not (tmp_path / "result.json").exists()
    full_disk()
    reporter.result("Production_Reg", 3, 0.9)
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
    report = json.loads((tmp_path / "result.json").read_text())
    assert report == {"registry": "Production_Reg", "version": 3, "acc": 0.9}


def test_result_that_cannot_be_prepared_is_an_error_before_anything_changes(tmp_path, full_disk):
    reporter = Reporter({"RETRAIN_JOB_FOLDER": str(tmp_path)})
    full_disk()
    with pytest.raises(PipelineError, match="No space left"):
        reporter.prepare("Production_Reg", 3, 0.9)
    assert list(tmp_path.iterdir()) == []


def test_without_a_job_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reporter, streams = Reporter({}), (sys.stdout, sys.stderr)
    reporter.outlive_full_disk()
    reporter.progress(1, 2, "run-1")
    reporter.prepare("Production_Reg", 3, 0.9)
    reporter.result("Production_Reg", 3, 0.9)
    assert list(tmp_path.iterdir()) == []
    assert (sys.stdout, sys.stderr) == streams


PRINTS = f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "src")!r})
from defect_detection.service.reporter import Reporter
Reporter(dict(os.environ)).outlive_full_disk()
for number in range(3):
    print("line", number)
print("error", file=sys.stderr)
Path("reached").touch()
"""


def run(folder: Path, out: Path) -> None:
    """Run PRINTS as a job whose output goes to `out`."""
    job = {"RETRAIN_JOB_FOLDER": str(folder), "PYTHONUNBUFFERED": "1"}
    with out.open("w") as file:
        command, env = [sys.executable, "-c", PRINTS], os.environ | job
        subprocess.run(command, env=env, cwd=folder, stdout=file, stderr=file)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_printing_to_a_full_disk_ends_nothing(tmp_path):
    run(tmp_path, Path("/dev/full"))
    assert (tmp_path / "reached").exists()


def test_what_a_job_prints_comes_in_order(tmp_path):
    run(tmp_path, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "line 0\nline 1\nline 2\nerror\n"
