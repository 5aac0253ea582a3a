"""The side of a job's process: it writes its progress and its result into the job's folder."""

import errno
import fcntl
import io
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from defect_detection import PipelineError
from defect_detection.service import job_files
from defect_detection.service.job_files import Progress, Result

log = logging.getLogger(__name__)

# Names the job's folder to the process.
FOLDER_VARIABLE = "RETRAIN_JOB_FOLDER"


class Reporter:
    """Writes the files of a job's process, if it runs as a job; else every call does nothing."""

    def __init__(self, environment: Mapping[str, str]):
        folder = environment.get(FOLDER_VARIABLE)
        self.folder = Path(folder) if folder else None
        self._warned = False

    def outlive_full_disk(self) -> None:
        """Drop what is printed while the disk is full, as an error of print would end the job."""
        if self.folder is not None:
            sys.stdout, sys.stderr = _lossy(sys.stdout), _lossy(sys.stderr)

    def progress(self, epoch: int, epochs: int, run_id: str) -> None:
        """Report that `epoch` of `epochs` has ended, in the MLflow run `run_id`.

        A report that cannot be written is lost; the first is warned of.
        """
        if self.folder is None:
            return
        try:
            job_files.write(self.folder / job_files.PROGRESS, Progress(epoch, epochs, run_id))
            self._lock_again()
        except (OSError, PipelineError) as error:
            if not self._warned:
                log.warning("The progress is not shown: %s", error)
            self._warned = True

    def prepare(self, registry: str, version: int, acc: float) -> None:
        """Write down what `result` will report, which takes no more room on the disk then.

        Called before the change that makes the job succeed. If the process dies in between, the
        job's end says that this version was registered.

        Raises:
            PipelineError: it cannot be written, so the change must not be made.
        """
        if self.folder is not None:
            coming = Result(registry, version, acc)
            job_files.write(self.folder / job_files.PREPARED, coming)

    def result(self, registry: str, version: int, acc: float) -> None:
        """Report what was registered; this makes the job succeed, whatever happens after it.

        Raises:
            PipelineError: it was not prepared, and cannot be written.
        """
        if self.folder is None:
            return
        prepared, final = self.folder / job_files.PREPARED, self.folder / job_files.RESULT
        if not prepared.exists():
            self.prepare(registry, version, acc)
        prepared.replace(final)
        os.utime(final)  # its time is that of the job's end

    def _lock_again(self) -> None:
        """Lock the job's log, which shows that this process lives, if the folder was deleted."""
        assert self.folder is not None
        file = self.folder / job_files.LOG
        if not file.exists():
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)  # open until this ends
            fcntl.flock(descriptor, fcntl.LOCK_EX)


class _Lossy(io.FileIO):
    """A file to which writing succeeds also while the disk is full."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return len(data)


def _lossy(stream: Any) -> io.TextIOWrapper:
    """Return a text stream that writes, line by line, where another one does."""
    stream.flush()
    file = io.BufferedWriter(_Lossy(stream.fileno(), "w", closefd=False))
    return io.TextIOWrapper(file, stream.encoding, stream.errors, line_buffering=True)
