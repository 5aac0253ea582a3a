"""Locks on files, which end with the process that holds them, whatever ends it."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


def take(descriptor: int) -> bool:
    """Lock an open file for this process and its heirs; return False if another holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def take_on_share(descriptor: int, path: Path, say: bool = True) -> bool:
    """Lock an open file as `take` does; return True where there are no locks.

    Args:
        descriptor: of the file.
        path: of the file.
        say: whether to log that there are no locks, as on some network shares.
    """
    try:
        return take(descriptor)
    except OSError as error:
        if say:
            log.warning(
                "%s: there are no locks here (%s). Make sure that no other run writes there",
                *(path, error.strerror),
            )
        return True


@contextmanager
def held(file: Path, make: bool = False, share: bool = False) -> Iterator[bool]:
    """Lock a file for the block; yield whether no other process has, and the file is there.

    Args:
        file: to lock.
        make: whether it is made if only its folder is there.
        share: whether it may lie on a network share that has no locks; there it is free.
    """
    try:
        descriptor = os.open(file, os.O_RDWR | (os.O_CREAT if make else 0), 0o644)
    except FileNotFoundError:
        yield False
        return
    try:
        free = take_on_share(descriptor, file) if share else take(descriptor)
        yield free and file.exists()
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
