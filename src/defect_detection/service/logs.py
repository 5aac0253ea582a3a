"""What the API logs, where to, and what it repeats of a call."""

import logging
import os
import sys
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path

from defect_detection import cli

LONGEST_LINE = 1000  # characters
FILE_BYTES, OLD_FILES = 5_000_000, 2


def set_up(file: Path | None) -> None:
    """Log to a file that is changed at a size, None for standard error.

    With a file, everything else that this process prints goes there too.
    """
    handler = _Rotating(file) if file else logging.StreamHandler(sys.stderr)
    handler.setFormatter(cli.Formatter(LONGEST_LINE, "    "))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    # Else a line for each call that waits, or whose caller hangs up.
    logging.getLogger("waitress").setLevel(logging.WARNING)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)


class _Rotating(RotatingFileHandler):
    """A file that is followed by standard output and error, to which uncaught errors go."""

    def __init__(self, file: Path):
        super().__init__(file, maxBytes=FILE_BYTES, backupCount=OLD_FILES, encoding="utf-8")

    def _open(self) -> TextIOWrapper:
        stream = super()._open()
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
        return stream
