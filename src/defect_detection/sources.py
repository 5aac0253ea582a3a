"""Which pictures are asked about: files, folders, globs, lists; those that arrive in a folder."""

import glob
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from defect_detection import PipelineError
from defect_detection.images import SUFFIXES, is_picture

GIVE_UP = 10  # seconds without a change after which a picture that cannot be decoded is broken


def expand(given: list[str]) -> Iterator[str]:
    """Return the pictures that are named, in the folders that are named and that globs match.

    Paths are found one by one, so that a folder of any size takes no memory for them.

    Raises:
        PipelineError: a folder holds no pictures or a glob matches none; before the first path.
    """
    for name in given:
        if next(_of(name), None) is None:
            what = "holds no" if os.path.isdir(name) else "matches no"
            raise PipelineError(f"{name} {what} {', '.join(SUFFIXES)} files")
    return (path for name in given for path in _of(name))


def _of(name: str) -> Iterator[str]:
    if os.path.isdir(name):
        yield from walk(name)
    elif glob.has_magic(name) and not os.path.lexists(name):
        for path in sorted(glob.iglob(name, recursive=True)):
            if os.path.isfile(path) and is_picture(os.path.basename(path)):
                yield path
    else:
        yield name


def walk(folder: str) -> Iterator[str]:
    """Return the pictures in a folder and those below it, sorted; hidden ones are left out."""
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files.sort()
        for name in files:
            if is_picture(name):
                yield os.path.join(here, name)


def listed(lines: Iterable[str]) -> Iterator[str]:
    """Return the paths of a list, one a line; empty lines are left out."""
    return (path for line in lines if (path := line.rstrip("\r\n")))


@dataclass
class _Seen:
    """What is known of a file in a watched folder.

    Attributes:
        signature: time of change, size and inode when it was looked at last.
        changed: when that was seen to be new.
        judged: CRC of the content that has a row; 0 of one that had it before the watch.
        waiting: whether it has no row yet.
    """

    signature: tuple[int, int, int]
    changed: float
    judged: int = 0
    waiting: bool = True


@dataclass(frozen=True)
class Arrival:
    """A new or changed picture.

    Attributes:
        path: of the file.
        content: its bytes, of which the last may still be missing.
        final: whether it has not changed for so long that no more is to come.
        judged: to be called when it has its row.
    """

    path: str
    content: bytes
    final: bool
    judged: Callable[[], None]


class Watch:
    """Finds pictures that arrive in a folder, by looking again and again.

    Not by the events of the operating system: a network share, where cameras write, sends none.
    """

    def __init__(self, folder: str, known: Callable[[str], bool]):
        """Begin a watch.

        Args:
            folder: is looked into, with the folders below it.
            known: says which paths have a row from an earlier watch.
        """
        self._folder = folder
        self._known = known
        self._seen: dict[str, _Seen] = {}

    def arrivals(self) -> Iterator[Arrival]:
        """Look once; return what is new, and what has changed since it was returned last.

        A picture is returned until `judged` was called; then only if another is written in its
        place. One that cannot be decoded yet is returned at each change, at last as `final`.
        """
        there = set()
        for path in walk(self._folder):
            there.add(path)
            try:
                arrival = self._look(path)
            except OSError:  # gone meanwhile, or not to be read yet
                continue
            if arrival is not None:
                yield arrival
        for path in self._seen.keys() - there:
            del self._seen[path]

    def _look(self, path: str) -> Arrival | None:
        now, status = time.monotonic(), os.stat(path)
        signature = (status.st_mtime_ns, status.st_size, status.st_ino)
        seen = self._seen.get(path)
        if seen is None:
            seen = self._seen[path] = _Seen(signature, now, waiting=not self._known(path))
            if not seen.waiting:
                return None
        elif seen.signature != signature:
            seen.signature, seen.changed = signature, now
        elif not seen.waiting or now - seen.changed < GIVE_UP:
            return None
        content = Path(path).read_bytes()
        checksum = zlib.crc32(content)
        if not seen.waiting and checksum == seen.judged:
            return None  # a copy that got its time of change afterwards

        def judged() -> None:
            seen.judged, seen.waiting = checksum, False

        return Arrival(path, content, now - seen.changed >= GIVE_UP, judged)
