"""The append-only log of what people change through the API: one JSON object a line."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from werkzeug.exceptions import HTTPException

from defect_detection import PipelineError

FILE = "changes.jsonl"


class Changes:
    """Writes the log of a folder; lines are only ever added."""

    def __init__(self, folder: Path):
        """Write into `FILE` of a folder, which is made if necessary."""
        self.file = folder / FILE

    @contextmanager
    def recorded(self, by: str, action: str, **details: object) -> Iterator[None]:
        """Write what the block did, or why it failed; whoever asked for it stands beside it.

        Raises:
            PipelineError: the log cannot be written, so the block did not begin.
        """
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            log = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise PipelineError(f"{self.file}: cannot be written ({error.strerror})") from error
        outcome = "done"
        try:
            yield
        except Exception as error:
            told = error.description if isinstance(error, HTTPException) else str(error)
            outcome = f"failed: {told}"
            raise
        finally:
            at = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
            line = {"at": at, "by": by, "action": action, **details, "outcome": outcome}
            try:
                os.write(log, (json.dumps(line) + "\n").encode())
                os.fsync(log)
            finally:
                os.close(log)
