"""Locks on files, which end with the process that holds them, whatever ends it."""

import fcntl
import os
from pathlib import Path


def take(descriptor: int) -> bool:
    """Lock an open file for this process and its heirs; return False if another holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_held(descriptor: int) -> bool:
    """Return whether somebody locked an open file by another descriptor."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False


def is_locked(file: Path) -> bool:
    """Return whether somebody locked a file; one that is not there is not locked."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would hold it up
    except OSError:
        return False
    try:
        return is_held(descriptor)
    finally:
        os.close(descriptor)
