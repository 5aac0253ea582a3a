"""The process of a running job, as the API knows it whatever becomes of the job's files."""

import fcntl
import os
import shutil
import signal
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from defect_detection import PipelineError, locks
from defect_detection.registry.promotion import STARTED_BY
from defect_detection.service import job_files
from defect_detection.service.job_files import Created, Process
from defect_detection.service.reporter import FOLDER_VARIABLE

NICENESS = 10  # so that inference on the same machine goes first


@dataclass(frozen=True)
class Command:
    """What a job runs.

    Attributes:
        words: the command with its options.
        root: its working directory.
        environment: all its variables but those of the job.
        lock: descriptor of a lock that the process inherits.
    """

    words: list[str]
    root: Path
    environment: dict[str, str]
    lock: int


class Child:
    """The process of a running job.

    It holds a lock on the job's log, which shows that it lives also where the log was deleted.

    Attributes:
        folder: of the job.
        began: when, in seconds of `time.monotonic`, which no change of the clock moves.
        created: content of job.json, None if that could not be read.
        process: likewise of process.json.
    """

    def __init__(
        self, folder: Path, began: float, created: Created | None, process: Process | None
    ):
        self.folder, self.began, self.created, self.process = folder, began, created, process
        self._log: int | None = None
        self._collect: subprocess.Popen[bytes] | None = None
        self._looking = threading.Lock()  # the log is not closed while its lock is looked at

    @classmethod
    def start(cls, folder: Path, created: Created, command: Command) -> "Child":
        """Start a job in a new folder; if that fails, nothing is left of it.

        Raises:
            PipelineError: its files cannot be written, as on a full disk.
            OSError: the command cannot be run.
        """
        # The folder appears at once with all that makes it a job, its lock held.
        hidden = folder.with_name(f".{folder.name}")
        try:
            hidden.mkdir()
            job_files.write(hidden / job_files.JOB, created)
            lock = os.open(hidden / job_files.LOG, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                hidden.rename(folder)
                return cls._run(folder, created, command, lock)
            finally:
                os.close(lock)  # the process's copy holds the lock on
        except BaseException:
            for one in (hidden, folder):
                shutil.rmtree(one, ignore_errors=True)
            raise

    @classmethod
    def _run(cls, folder: Path, created: Created, command: Command, lock: int) -> "Child":
        job = {FOLDER_VARIABLE: str(folder), STARTED_BY: created.started_by}
        child = cls(folder, time.monotonic(), created, None)
        with (folder / job_files.LOG).open("ab") as log:
            child._collect = subprocess.Popen(
                command.words,
                cwd=command.root,
                env=command.environment | job | {"PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a process group of its own, to be ended as one
                pass_fds=(command.lock, lock),
            )
        pid = child._collect.pid
        child.process = Process(pid, child.began)
        try:
            # Without it, no other process could end the job.
            job_files.write(folder / job_files.PROCESS, child.process)
            child._log = os.open(folder / job_files.LOG, os.O_RDONLY)
        except BaseException:
            os.killpg(pid, signal.SIGKILL)
            child._collect.wait()
            raise
        with suppress(ProcessLookupError):  # it has ended already
            os.setpriority(os.PRIO_PROCESS, pid, NICENESS)
        return child

    @classmethod
    def adopt(cls, folder: Path) -> "Child":
        """Return the process of a running job that another process started."""
        created = job_files.known(folder / job_files.JOB, Created)
        process = job_files.known(folder / job_files.PROCESS, Process)
        now = time.monotonic()
        child = cls(folder, now, created, process)
        if process and process.started is not None and process.started <= now:
            child.began = process.started
        elif created:  # of a former version
            since = datetime.fromisoformat(created.created_at).timestamp()
            child.began -= max(0.0, time.time() - since)
        with suppress(OSError):
            child._log = os.open(folder / job_files.LOG, os.O_RDONLY | os.O_NONBLOCK)
        return child

    def holds_its_log(self) -> bool:
        """Return whether it lives, as its lock shows; one of a former version has none."""
        with self._looking:
            return self._log is not None and locks.is_held(self._log)

    def restore(self) -> None:
        """Write job.json and process.json again if they were deleted or damaged meanwhile."""
        for name, content in ((job_files.JOB, self.created), (job_files.PROCESS, self.process)):
            if content and job_files.known(self.folder / name, type(content)) != content:
                with suppress(PipelineError):  # the disk is full: at the next time
                    job_files.write(self.folder / name, content)

    def collect(self) -> None:
        """Take note that it has ended, and let go of its log."""
        if self._collect is not None:
            self._collect.wait()
        with self._looking:
            if self._log is not None:
                os.close(self._log)
            self._log = None
