"""The append-only log of what people change through the API: one JSON object a line."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from werkzeug.exceptions import HTTPException

from defect_detection import PipelineError

log = logging.getLogger("api")

FILE = "changes.jsonl"


class Changes:
    """Writes the log of a folder; lines are only ever added."""

    def __init__(self, folder: Path):
        """Write into `FILE` of a folder, which is made if necessary."""
        self.file = folder / FILE

    @contextmanager
    def recorded(self, by: str, action: str, **details: object) -> Iterator[None]:
        """Write what the block is going to do, then whether it did; who asked stands beside it.

        Raises:
            PipelineError: the log cannot be written, so the block did not begin.
        """
        self._write({"by": by, "action": action, **details, "outcome": "begun"})
        outcome = "done"
        try:
            yield
        except Exception as error:
            told = error.description if isinstance(error, HTTPException) else str(error)
            outcome = f"failed: {told}"
            raise
        finally:
            try:
                self._write({"by": by, "action": action, **details, "outcome": outcome})
            except PipelineError as error:  # it is done nevertheless
                log.warning("%s", error)

    def _write(self, line: dict[str, object]) -> None:
        """Add a line.

        Raises:
            PipelineError: the file cannot be written.
        """
        at = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, (json.dumps({"at": at, **line}) + "\n").encode())
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise PipelineError(f"{self.file}: cannot be written ({error.strerror})") from error
