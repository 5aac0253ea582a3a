"""Runs scripts in processes that have imported TensorFlow and MLflow already.

Importing them takes a process 7 s, and the tests start a hundred. A server forks a process for each
script (`multiprocessing.forkserver`); nothing of this project is imported before the script is.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
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
    "sklearn.metrics",
    "matplotlib.pyplot",
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


def run(call: Call, seconds: float) -> subprocess.CompletedProcess:
    """Run a script; return its exit status and what it wrote.

    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [os.path.join(folder, name) for name in ("out", "err")]
        process = processes().Process(target=_become, args=(call, outputs))
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(call.arguments, seconds)
        wrote = [Path(output).read_text() for output in outputs]
    return subprocess.CompletedProcess(call.arguments, process.exitcode, *wrote)


def _become(call: Call, outputs: list[str]) -> None:
    """Be a process that was started with a script."""
    for number, output in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), number)
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
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
