"""Judges the images that arrive in a folder."""

import logging
import os
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from defect_detection.inference.judge import Item, Judge, NamedModel
from defect_detection.inference.production import Production
from defect_detection.inference.rows import Output
from defect_detection.inference.sources import walk

log = logging.getLogger(__name__)

GIVE_UP = 10  # seconds without a change after which an undecodable image is called broken
LOOK_EVERY = 0.1  # seconds between two looks, unless a look takes longer


@dataclass
class _Seen:
    """What is known about a file in a watched folder.

    Attributes:
        signature: time of change, size and inode at the last look.
        changed: when the signature changed.
        judged: CRC of the content that has a row; 0 if it had a row before the watch.
        waiting: whether it has no row yet.
    """

    signature: tuple[int, int, int]
    changed: float
    judged: int = 0
    waiting: bool = True


@dataclass(frozen=True)
class Arrival:
    """A new or changed image.

    Attributes:
        path: of the file.
        content: its bytes; the end may still be missing.
        final: whether it has not changed for so long that it must be complete.
        judged: to be called when it has its row.
    """

    path: str
    content: bytes
    final: bool
    judged: Callable[[], None]


class Watch:
    """Finds images that arrive in a folder, by looking at it repeatedly.

    The operating system's events would not do: network shares, where cameras write, send none.
    """

    def __init__(self, folder: str, known: Callable[[str], bool]):
        """Begin a watch.

        Args:
            folder: to watch, with the folders below it.
            known: returns whether a path has a row from an earlier watch.
        """
        self._folder = folder
        self._known = known
        self._seen: dict[str, _Seen] = {}

    def arrivals(self) -> Iterator[Arrival]:
        """Look once; return what is new, and what has changed since it was returned last.

        An image is returned until `judged` was called; then only if another is written in its
        place. One that cannot be decoded yet is returned at each change, at last as `final`.
        """
        there = set()
        for path in walk(self._folder, lambda path, error: None):
            there.add(path)
            try:
                arrival = self._look(path)
            except OSError:  # deleted meanwhile, or not readable yet
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
            return None  # only the time of change was set after the copy

        def judged() -> None:
            seen.judged, seen.waiting = checksum, False

        return Arrival(path, content, now - seen.changed >= GIVE_UP, judged)


def follow(folder: str, judge: Judge, production: Production | None, output: Output) -> None:
    """Judge images as they arrive in a folder, until the process is ended.

    Args:
        folder: to watch.
        judge: its model is replaced when the alias prod moves.
        production: where the model comes from; None if it was given as a folder.
        output: where the rows go.
    """
    watch = Watch(folder, output.take)
    waiting: deque[Arrival] = deque()

    def items() -> Iterator[Item]:
        for arrival in watch.arrivals():
            waiting.append(arrival)
            yield Item(arrival.path, arrival.content)

    log.info("Watching %s; end with Ctrl-C", folder)
    while True:
        started = time.monotonic()
        for rows in judge.rows(items()):
            arrived = [(row, waiting.popleft()) for row in rows]
            # An image that cannot be decoded may not be completely written yet.
            whole = [(r, a) for r, a in arrived if r.verdict != "error" or a.final]
            if whole:
                output.put([row for row, _ in whole])
            for _, arrival in whole:
                arrival.judged()
        output.settle()
        if production is not None and production.moved():
            judge.model = NamedModel.in_production(production)
        time.sleep(max(LOOK_EVERY, time.monotonic() - started))
