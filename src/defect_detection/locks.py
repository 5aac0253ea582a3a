"""Locks on files, which end with the process that holds them, whatever ends it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def take(descriptor: int) -> bool:
    """Lock an open file for this process and its heirs; return False if another holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def held(file: Path, make: bool = False) -> Iterator[bool]:
    """Lock a file for the block; yield whether no other process has, and the file is there.

    Args:
        file: to lock.
        make: whether it is made if only its folder is there.
    """
    try:
        descriptor = os.open(file, os.O_RDWR | (os.O_CREAT if make else 0), 0o644)
    except FileNotFoundError:
        yield False
        return
    try:
        yield take(descriptor) and file.exists()
    finally:
        os.close(descriptor)


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
