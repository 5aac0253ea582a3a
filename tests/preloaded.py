"""Runs scripts in processes that have imported TensorFlow and MLflow already.

Importing them takes a process 7 s, and the tests start a hundred. A server forks a process for each
script (`multiprocessing.forkserver`); nothing of this project is imported before the script is.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

# What the scripts import and this project has not written.
LIBRARIES = [
    "mlflow",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.tensorflow",
    "tensorflow",
    "sklearn.linear_model",
    "sklearn.metrics",
    "matplotlib.pyplot",
    "ai_edge_litert.interpreter",
    "git",
    "jinja2",
    "mlflow.tracing.processor.base_mlflow",
    "warmed",
]


@dataclass(frozen=True)
class Call:
    """A call of a script, as a shell would make it."""

    arguments: list[str]  # the script's path first
    folder: Path
    env: dict[str, str]


def processes() -> multiprocessing.context.ForkServerContext:
    """Return what makes processes that have imported the libraries, and nothing of this project."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    with mock.patch.dict(os.environ, TF_CPP_MIN_LOG_LEVEL="3"):  # else the import writes lines
        forkserver.ensure_running()
    return context


class Started:
    """A script that runs, with what the tests use of `subprocess.Popen`.

    Args:
        call: of the script.
        out, err: files for what it writes; it is appended to them.
    """

    def __init__(self, call: Call, out: Path, err: Path):
        self.call = call
        # A daemon is killed when the tests end and have not ended it.
        self._process = processes().Process(
            target=_become, args=(call, (str(out), str(err))), daemon=True
        )
        self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (status := self.poll()) is None:
            raise subprocess.TimeoutExpired(self.call.arguments, timeout)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(call: Call, out: Path, err: Path) -> Started | subprocess.Popen:
    """Start a script; append what it writes to files."""
    with out.open("a") as written, err.open("a") as errors:
        if sys.platform == "linux":
            return Started(call, out, err)
        return subprocess.Popen(
            [sys.executable, *call.arguments],
            cwd=call.folder,
            env=call.env,
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=errors,
        )


def run(call: Call, seconds: float) -> subprocess.CompletedProcess:
    """Run a script; return its exit status and what it wrote.

    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("out", "err")]
        process = start(call, *outputs)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        wrote = [output.read_text() for output in outputs]
    return subprocess.CompletedProcess(call.arguments, status, *wrote)


def _become(call: Call, outputs: tuple[str, str]) -> None:
    """Be a process that was started with a script."""
    multiprocessing.current_process().daemon = False  # a daemon may start no processes
    for number, output in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, m) for n, m in ((0, "r"), (1, "w"), (2, "w")))
    os.environ.clear()
    os.environ.update(call.env)
    os.chdir(call.folder)
    sys.argv = call.arguments
    kept = [one for one in sys.path if "site-packages" in one or one.startswith(sys.base_prefix)]
    sys.path[:] = [str(Path(call.arguments[0]).parent), *kept]
    status = 0
    try:
        runpy.run_path(call.arguments[0], run_name="__main__")
    except SystemExit as error:
        status = error.code or 0
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # waits for threads that are no daemons, and for those of pools
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
