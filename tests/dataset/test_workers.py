"""What computes for many images at once."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, wait_for
from defect_detection import PipelineError
from defect_detection.dataset import workers

PARENT = """
import os, signal, sys
from defect_detection.dataset import workers
if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with workers.started(workers.MANY) as mapped:
        while True:
            print(*set(mapped(os.getpgid, [os.getpid()] * 100)), flush=True)
"""


INTERRUPTED = """
import os, queue, sys
from defect_detection.dataset import workers
put, calls = queue.Queue.put, []
def interrupted(*arguments):
    calls.append(arguments)
    if len(calls) == 3:
        sys.exit(143)  # as the handler of a signal that comes just now
    put(*arguments)
if __name__ == "__main__":
    with workers.started(workers.MANY) as mapped:
        queue.Queue.put = interrupted
        mapped(os.getpgid, [os.getpid()] * 100)
"""


def written(script: Path, content: str) -> dict:
    """Write a script, and return how subprocess calls it."""
    script.write_text(content)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    return {"args": [sys.executable, script], "env": environment}


def own_pid(number: int) -> tuple[int, int]:
    return number, os.getpid()


def killed(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("images", [1, workers.MANY])
def test_many_images_are_computed_in_processes_and_few_here(images):
    with workers.started(images) as mapped:
        numbers, pids = zip(*mapped(own_pid, range(40)), strict=True)
    assert numbers == tuple(range(40))
    assert (os.getpid() in pids) == (images == 1)


def test_process_that_is_killed_is_one_line():
    with pytest.raises(PipelineError, match="was killed, perhaps since memory is short"):
        with workers.started(workers.MANY) as mapped:
            list(mapped(killed, range(8)))


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_processes_end_with_the_one_that_started_them(tmp_path, number, status):
    call = written(tmp_path / "parent.py", PARENT)
    parent = subprocess.Popen(**call, stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline()
    with open(f"/proc/{parent.pid}/task/{parent.pid}/children") as file:
        children = file.read().split()
    assert len(children) >= 2
    parent.send_signal(number)
    parent.stdout.close()
    assert parent.wait(20) == status
    wait_for(lambda: not any(os.path.exists(f"/proc/{child}") for child in children), 20)


def test_signal_while_images_are_handed_to_processes_ends_it(tmp_path):
    call = written(tmp_path / "interrupted.py", INTERRUPTED)
    assert subprocess.run(**call, timeout=20).returncode == 143
