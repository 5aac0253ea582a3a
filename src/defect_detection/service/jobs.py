"""Retraining as a child process: one at a time, with its state in files.

Each job has a folder with its parameters, its process, its output and, written by the child, its
progress and result. The child inherits two locks: on the file `lock` beside the folders, which
keeps a second one from starting, and on its own log. They are held exactly as long as the child
lives, whatever happens to the process that started it, so the state is never guessed. A process
also remembers the jobs that it started, so that neither a full disk nor a deleted file makes one
immortal.
"""

import os
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from defect_detection import PipelineError, locks
from defect_detection.service import job_files
from defect_detection.service.access import TOKENS
from defect_detection.service.child import Child, Command
from defect_detection.service.job_files import Created, Ended, Job, Process
from defect_detection.settings import RetrainOverrides

GRACE_SECONDS = 10  # between SIGTERM and SIGKILL
POLL_SECONDS = 0.2
KEPT_JOBS = 200  # that have ended
LONGEST_LOG = 1024 * 1024  # bytes of a job's output that are shown


class Busy(Exception):
    """Another job is running, `job`."""

    def __init__(self, job: Job):
        super().__init__(f"The job {job.id} is running")
        self.job = job


class Jobs:
    """The jobs in one folder, which several processes may share."""

    def __init__(
        self,
        folder: Path,
        command: list[str],
        root: Path,
        time_limit: float,
        environment: Mapping[str, str],
    ):
        """Keep state in a folder.

        Args:
            folder: of the jobs.
            command: that a job runs, followed by the options of its parameters.
            root: the working directory of the command.
            time_limit: seconds after which a job is ended.
            environment: of the command; the API's tokens are left out.
        """
        self.folder = folder
        self.command = command
        self.root = root
        self.time_limit = time_limit
        self.environment = {k: v for k, v in environment.items() if k not in TOKENS.values()}
        self._children: dict[str, Child] = {}
        self._ended: dict[str, Ended] = {}  # as long as it is not on the disk
        folder.mkdir(parents=True, exist_ok=True)
        running = self._running()
        if running is not None:  # started by a process that died; its time limit still holds
            self._watch(Child.adopt(folder / running))

    def start(self, overrides: RetrainOverrides, by: str = "") -> Job:
        """Start a job with parameters that replace those of re_train.yaml.

        Args:
            overrides: the parameters.
            by: who starts it.

        Raises:
            Busy: another one runs.
            PipelineError: its files cannot be written, as on a full disk. Nothing was started.
            OSError: its process cannot be started.
        """
        lock = self._lock()
        try:
            self._delete_old()
            now = datetime.now(timezone.utc)
            job_id = job_files.new_id(now, secrets.token_hex(2))
            os.pwrite(lock, job_id.encode(), 0)
            words = [*self.command, *overrides.options()]
            command = Command(words, self.root, self.environment, lock)
            created = Created(job_files.iso(now), overrides.given(), by)
            child = Child.start(self.folder / job_id, created, command)
        finally:
            os.close(lock)  # the child's copy holds the lock on
        self._watch(child)
        return self.get(job_id)

    def all(self, limit: int | None = None, before: str | None = None) -> list[Job]:
        """Return the jobs, newest first.

        Args:
            limit: how many at most; None for all.
            before: only those that started before the job of this id.
        """
        found = []
        ids = sorted({*job_files.ids(self.folder), *self._children}, reverse=True)
        for job_id in [one for one in ids if before is None or one < before][:limit]:
            with suppress(KeyError):  # deleted in this moment
                found.append(self.get(job_id))
        return found

    def running(self) -> Job | None:
        """Return the running job, None if there is none."""
        job_id = self._running()
        return self.get(job_id) if job_id is not None else None

    def get(self, job_id: str) -> Job:
        """Return a job.

        Raises:
            KeyError: there is none of that id.
        """
        folder = self._folder(job_id)
        # Before the result is read, since the child writes that before it ends.
        alive = self._alive(job_id)
        return job_files.read_job(folder, alive, self._ended.get(job_id))

    def log(self, job_id: str) -> str:
        """Return the output of a job so far; of a long one its end.

        Raises:
            KeyError: there is none of that id.
        """
        left_out, text = job_files.tail(self._folder(job_id) / job_files.LOG, LONGEST_LOG)
        return f"({left_out} bytes before this are left out)\n{text}" if left_out else text

    def wait(self, job_id: str) -> Job:
        """Wait until a job has ended and return it."""
        while (job := self.get(job_id)).state == "running":
            time.sleep(0.1)
        return job

    def cancel(self, job_id: str, by: str = "") -> Job:
        """End a job's processes and return the job; one that has ended stays as it is.

        The job still runs if its process cannot be ended, or is not known since process.json is
        damaged.

        Raises:
            KeyError: there is none of that id.
        """
        if self.get(job_id).state == "running":
            self._end(job_id, "cancelled", "Cancelled on request", by)
        return self.get(job_id)

    def _end(
        self, job_id: str, state: Literal["failed", "cancelled"], message: str, by: str = ""
    ) -> None:
        """Kill a job's processes, and only then write down why: a full disk must not stop it."""
        child = self._children.get(job_id)
        process = child.process if child else None
        process = process or job_files.known(self.folder / job_id / job_files.PROCESS, Process)
        if process is None:
            return
        at = job_files.iso(datetime.now(timezone.utc))
        self._ended.setdefault(job_id, Ended(state, message, by, at))
        for sign in (signal.SIGTERM, signal.SIGKILL):
            if not self._alive(job_id):
                break
            try:
                os.killpg(process.pid, sign)
            except (ProcessLookupError, PermissionError):  # macOS forbids it if all are zombies
                break
            deadline = time.monotonic() + GRACE_SECONDS
            while self._alive(job_id) and time.monotonic() < deadline:
                time.sleep(0.02)
        self._write_end(job_id)

    def _write_end(self, job_id: str) -> bool:
        """Write down why a job was ended, if it was; return False if the disk refuses."""
        ended = self._ended.get(job_id)
        if ended is None:
            return True
        try:
            job_files.write(self.folder / job_id / job_files.ENDED, ended)
        except PipelineError:
            return False
        self._ended.pop(job_id, None)
        return True

    def _watch(self, child: Child) -> None:
        """Keep a job's files, end it at its time limit, and take note of its end."""
        job_id = child.folder.name
        self._children[job_id] = child

        def watch() -> None:
            while self._alive(job_id):
                child.restore()
                if time.monotonic() > child.began + self.time_limit:
                    self._end(job_id, "failed", f"Ended after the limit of {self.time_limit:g} s")
                time.sleep(POLL_SECONDS)
            child.collect()
            del self._children[job_id]
            while not self._write_end(job_id):
                time.sleep(GRACE_SECONDS)

        threading.Thread(target=watch, name=f"watch {job_id}", daemon=True).start()

    def _delete_old(self) -> None:
        """Delete all but the newest jobs, and what is left of a start that was cut off."""
        for job_id in job_files.ids(self.folder)[KEPT_JOBS:]:
            with suppress(OSError):
                (self.folder / job_id).rename(self.folder / f".{job_id}")
        for hidden in self.folder.glob(".*"):
            if job_files.is_id(hidden.name[1:]):
                shutil.rmtree(hidden, ignore_errors=True)

    def _folder(self, job_id: str) -> Path:
        # The form comes first, so that a caller's text never becomes a path unchecked.
        folder = self.folder / job_id if job_files.is_id(job_id) else None
        if folder is None or not (job_id in self._children or folder.is_dir()):
            raise KeyError(job_id)
        return folder

    def _lock(self) -> int:
        """Lock out other jobs; return the file descriptor that holds the lock.

        Raises:
            Busy: another one runs.
            PipelineError: something else holds the lock.
        """
        deadline = time.monotonic() + GRACE_SECONDS
        file = self.folder / "lock"
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
            if locks.take(descriptor):
                os.ftruncate(descriptor, 0)  # it names no job that has ended
                # The file may have been deleted, under a running job or in this moment.
                if self._running() is None and _leads_to(file, descriptor):
                    return descriptor
            os.close(descriptor)
            running = self.running()
            if running is not None and running.state == "running":
                raise Busy(running)
            # Held by a job that is starting or ending, or by a look at the lock.
            if time.monotonic() > deadline:
                raise PipelineError(f"{file} is held by a process that is no job. End that process")
            time.sleep(0.005)

    def _running(self) -> str | None:
        """Return the id of the job whose child is alive, None if there is none."""
        known = [*self._children, *job_files.ids(self.folder)]
        named = self._named_by_lock()
        return named or next((job_id for job_id in known if self._holds_its_log(job_id)), None)

    def _alive(self, job_id: str) -> bool:
        """Return whether the child of a job is alive."""
        return self._holds_its_log(job_id) or self._named_by_lock() == job_id

    def _holds_its_log(self, job_id: str) -> bool:
        child = self._children.get(job_id)
        if child is not None and child.holds_its_log():
            return True
        return locks.is_locked(self.folder / job_id / job_files.LOG)

    def _named_by_lock(self) -> str | None:
        """Return the id of the running job that does not hold its log, but only `lock`.

        It was started by a former version, or its log was deleted.
        """
        file = self.folder / "lock"
        job_id = job_files.tail(file, 100)[1] if locks.is_locked(file) else ""
        folder = self.folder / job_id
        if not job_files.is_id(job_id) or not folder.is_dir():
            return None
        process = job_files.known(folder / job_files.PROCESS, Process)
        former = process is not None and process.started is None
        return job_id if former or not (folder / job_files.LOG).exists() else None


def _leads_to(file: Path, descriptor: int) -> bool:
    """Return whether a path still leads to an open file."""
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
