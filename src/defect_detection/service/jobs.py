"""Retraining as a child process: one at a time, with its state in files.

Each job has a folder with its parameters, its process, its output and, written by the child, its
progress and result. The child inherits a locked file. The lock is held exactly as long as the
child lives, whatever happens to the process that started it, so the state is never guessed.
"""

import fcntl
import json
import os
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from defect_detection.atomic import replace_atomically
from defect_detection.settings import RetrainOverrides

# Names the job's folder to the child.
FOLDER_VARIABLE = "RETRAIN_JOB_FOLDER"
NICENESS = 10  # of the child, so that inference on the same machine goes first
GRACE_SECONDS = 10  # between SIGTERM and SIGKILL
LAST_LINES = 5


@dataclass(frozen=True)
class Job:
    """One retraining.

    Attributes:
        id: sorts by the time of its start.
        state: "running", "succeeded", "failed" or "cancelled".
        created_at: ISO 8601, UTC.
        ended_at: likewise, None while it runs.
        parameters: those that replace re_train.yaml's values.
        progress: `epoch` of `epochs`, from 0; empty before the fit starts.
        run_id: the MLflow run, None before there is one.
        result: `registry`, `version`, `acc`; empty unless it succeeded.
        message: why it failed or was ended; empty otherwise.
    """

    id: str
    state: str
    created_at: str
    ended_at: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    progress: dict[str, int] = field(default_factory=dict)
    run_id: str | None = None
    result: dict[str, Any] = field(default_factory=dict)
    message: str = ""


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
            environment: of the command; the API's token is left out.
        """
        self.folder = folder
        self.command = command
        self.root = root
        self.time_limit = time_limit
        self.environment = {k: v for k, v in environment.items() if k != "API_TOKEN"}
        folder.mkdir(parents=True, exist_ok=True)
        running = self.running()
        if running is not None:  # started by a process that died; its time limit still holds
            self._watch(running.id, None)

    def start(self, overrides: RetrainOverrides) -> Job:
        """Start a job with parameters that replace those of re_train.yaml.

        Raises:
            Busy: another one runs.
        """
        lock = self._lock()
        try:
            now = datetime.now(timezone.utc)
            job_id = f"{now:%Y%m%d-%H%M%S-%f}-{secrets.token_hex(2)}"
            folder = self.folder / job_id
            folder.mkdir()
            created = {"created_at": _iso(now), "parameters": overrides.given()}
            _write(folder / "job.json", created)
            os.ftruncate(lock, 0)
            os.pwrite(lock, job_id.encode(), 0)
            with (folder / "log").open("wb") as log:
                child = subprocess.Popen(
                    [*self.command, *overrides.options()],
                    cwd=self.root,
                    env=self.environment | {FOLDER_VARIABLE: str(folder), "PYTHONUNBUFFERED": "1"},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # a process group of its own, to be ended as one
                    pass_fds=(lock,),
                )
            _write(folder / "process.json", {"pid": child.pid})
            os.setpriority(os.PRIO_PROCESS, child.pid, NICENESS)
        finally:
            os.close(lock)  # the child's copy holds the lock on
        self._watch(job_id, child)
        return self.get(job_id)

    def all(self) -> list[Job]:
        """Return all jobs, newest first."""
        found = sorted((p.parent.name for p in self.folder.glob("*/job.json")), reverse=True)
        return [self.get(job_id) for job_id in found]

    def running(self) -> Job | None:
        """Return the running job, None if there is none."""
        holder = self._holder()
        return self.get(holder) if holder is not None else None

    def get(self, job_id: str) -> Job:
        """Return a job.

        Raises:
            KeyError: there is none of that id.
        """
        folder = self._folder(job_id)
        asked = _read(folder / "job.json")
        # Before the result is read, since the child writes that before it ends.
        held = self._holder() == job_id
        result, ended = _read(folder / "result.json"), _read(folder / "ended.json")
        progress = _read(folder / "progress.json")
        run_id = progress.pop("run_id", None)
        message, ended_at = "", None
        if result:
            state = "succeeded"
        elif held:
            state = "running"
        else:
            state = ended.get("state", "failed")
            message = ended.get("message") or "\n".join(self._last_lines(folder))
        if state != "running":
            last = folder / ("result.json" if result else "ended.json" if ended else "log")
            if last.exists():
                ended_at = _iso(datetime.fromtimestamp(last.stat().st_mtime, timezone.utc))
        return Job(
            job_id,
            state,
            asked["created_at"],
            ended_at,
            asked["parameters"],
            progress,
            run_id,
            result,
            message,
        )

    def log(self, job_id: str) -> str:
        """Return the output of a job so far.

        Raises:
            KeyError: there is none of that id.
        """
        file = self._folder(job_id) / "log"
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""

    def wait(self, job_id: str) -> Job:
        """Wait until a job has ended and return it."""
        while (job := self.get(job_id)).state == "running":
            time.sleep(0.1)
        return job

    def cancel(self, job_id: str) -> Job:
        """End a job's processes and return the job; one that has ended stays as it is.

        Raises:
            KeyError: there is none of that id.
        """
        if self.get(job_id).state == "running":
            self._end(job_id, "cancelled", "Cancelled on request")
        return self.get(job_id)

    def _end(self, job_id: str, state: str, message: str) -> None:
        folder = self._folder(job_id)
        _write(folder / "ended.json", {"state": state, "message": message})
        group = _read(folder / "process.json").get("pid")
        for sign, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
            if self._holder() != job_id or group is None:
                return
            try:
                os.killpg(group, sign)
            except ProcessLookupError:
                return
            deadline = time.monotonic() + seconds
            while self._holder() == job_id and time.monotonic() < deadline:
                time.sleep(0.02)

    def _watch(self, job_id: str, child: subprocess.Popen[bytes] | None) -> None:
        """End a job at its time limit, and collect its child when it has ended."""

        def watch() -> None:
            started = datetime.fromisoformat(self.get(job_id).created_at).timestamp()
            while self._holder() == job_id:
                if time.time() > started + self.time_limit:
                    self._end(job_id, "failed", f"Ended after the limit of {self.time_limit:g} s")
                time.sleep(0.2)
            if child is not None:
                child.wait()

        threading.Thread(target=watch, name=f"watch {job_id}", daemon=True).start()

    def _folder(self, job_id: str) -> Path:
        folder = self.folder / job_id
        if folder.parent != self.folder or not (folder / "job.json").is_file():
            raise KeyError(job_id)
        return folder

    def _lock(self) -> int:
        """Lock out other jobs; return the file descriptor that holds the lock.

        Raises:
            Busy: another one runs.
        """
        deadline = time.monotonic() + GRACE_SECONDS
        while True:
            descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except BlockingIOError:
                os.close(descriptor)
            # Held by a running job, by one that is starting or ending, or by `_holder`.
            running = self.running()
            if running is not None and running.state == "running":
                raise Busy(running)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.folder / 'lock'} is held by a process that is no job")
            time.sleep(0.005)

    def _holder(self) -> str | None:
        """Return the id of the job whose child is alive, None if there is none."""
        try:
            descriptor = os.open(self.folder / "lock", os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            job_id = os.pread(descriptor, 100, 0).decode()
            return job_id if (self.folder / job_id / "job.json").is_file() else None
        finally:
            os.close(descriptor)

    @staticmethod
    def _last_lines(folder: Path) -> list[str]:
        file = folder / "log"
        if not file.exists():
            return []
        with file.open("rb") as log:
            log.seek(max(0, file.stat().st_size - 4096))
            lines = log.read().decode(errors="replace").splitlines()
        return [line for line in lines if line.strip()][-LAST_LINES:]


class Reporter:
    """The child's side: writes progress and result into the job's folder, if it runs as a job."""

    def __init__(self, environment: Mapping[str, str]):
        folder = environment.get(FOLDER_VARIABLE)
        self.folder = Path(folder) if folder else None

    def progress(self, epoch: int, epochs: int, run_id: str) -> None:
        """Report that `epoch` of `epochs` has ended, in the MLflow run `run_id`."""
        if self.folder is not None:
            report = {"epoch": epoch, "epochs": epochs, "run_id": run_id}
            _write(self.folder / "progress.json", report)

    def result(self, registry: str, version: int, acc: float) -> None:
        """Report what was registered; this makes the job succeed."""
        if self.folder is not None:
            report = {"registry": registry, "version": version, "acc": acc}
            _write(self.folder / "result.json", report)


def _write(path: Path, content: dict[str, Any]) -> None:
    with replace_atomically(path) as temporary:
        temporary.write_text(json.dumps(content))


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds")
