"""The API's log: files of limited size, one line for a message, whatever a caller wrote."""

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

BEGIN = f"""
import logging, os, sys
from pathlib import Path
sys.path[:0] = [{str(ROOT / "src")!r}, {str(ROOT / "tests")!r}]
from defect_detection.service import logs
"""

FILLS = """
logs.FILE_BYTES = 10_000
logs.set_up(Path("api.log"))
for number in range(1000):
    logging.info("line %d of those that fill the log", number)
print("printed", flush=True)
os.system("echo a child says")
raise ValueError("uncaught")
"""

FORGES = """
from backends import backend, client
logs.set_up(Path("api.log") if len(sys.argv) > 1 else None)
made = backend(Path().absolute())
def fail(job_id):
    raise ValueError(job_id)
made.jobs.get = fail
client = client(made)
for path in ("a%0aforged", "a%0d%0aforged", "a%1b[2Jforged", "a%c2%85forged", "a" * 200_000):
    assert client.get(f"/retrain/{path}").status_code == 500
"""


def run(program: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", BEGIN + program, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_log_is_kept_in_three_files_and_all_output_goes_to_the_newest(tmp_path):
    done = run(FILLS, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["api.log", "api.log.1", "api.log.2"]
    assert all(file.stat().st_size < 12_000 for file in files)
    newest = files[0].read_text().splitlines()
    assert "line 999 of those that fill the log" in newest
    assert newest.index("printed") < newest.index("a child says")
    assert newest[-1] == "ValueError: uncaught"


@pytest.mark.parametrize("where", ["file", "stderr"])
def test_no_call_writes_a_line_of_its_own_into_the_log(tmp_path, where):
    done = run(FORGES, tmp_path, *(["file"] if where == "file" else []))
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "api.log").read_text() if where == "file" else done.stderr
    lines = text.splitlines()
    assert sum(line.startswith("GET /retrain/a") for line in lines) == 5
    assert all(line.startswith(("GET /retrain/a", "    ")) for line in lines)
    assert all(len(line) < 1010 for line in lines)
    assert "\x1b" not in text
