"""Judges the images that arrive in a folder."""

import itertools
import logging
import os
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from defect_detection.inference.judge import Item, Judge
from defect_detection.inference.production import Production
from defect_detection.inference.rows import Output
from defect_detection.inference.sources import names_image, reason, unreadable, walk
from defect_detection.inference.verdict_log import Origin, VerdictLog
from defect_detection.runtime.preprocessing import UnreadableImage, read_file

log = logging.getLogger(__name__)

GIVE_UP = 10  # seconds without a change after which an undecodable image is called broken
LOOK_EVERY = 0.1  # seconds between two looks, unless a look takes longer
ANSWER_WITHIN = 5  # seconds after which a file or folder is said not to answer
Signature = tuple[int, int, int]  # time of change, size and inode
REMEMBERED = 100_000  # files that are kept in mind while their folder is away


@dataclass
class _Seen:
    """What is known about a file in a watched folder.

    Attributes:
        signature: of the file at the last look; None if it could not be asked.
        changed: when the signature changed, or reading it was last tried in vain.
        visit: how often the folder had been away when the file was last there.
        judged: CRC of the content that has a row; None if there is none or it is not known.
        waiting: whether it has no row yet.
        unread: whether its row says that it cannot be read.
    """

    signature: Signature | None
    changed: float
    visit: int
    judged: int | None = None
    waiting: bool = True
    unread: bool = False

    @property
    def from_before(self) -> bool:
        """Whether it had its row before the watch."""
        return self.judged is None and not self.waiting and not self.unread


@dataclass(frozen=True)
class Arrival:
    """A new or changed image.

    Attributes:
        path: of the file.
        content: its bytes, of which the end may still be missing; or why it cannot be read.
        written: when the file was changed last, in nanoseconds; None if it cannot be asked.
        final: whether it has not changed for so long that it must be complete.
        judged: to be called when it has its row.
    """

    path: str
    content: bytes | UnreadableImage
    written: int | None
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
            known: returns whether a path has a row from an earlier watch; asked once.
        """
        self._folder = folder
        self._known = known
        self._seen: dict[str, _Seen] = {}
        self._root: tuple[int, int] | None = None
        self._away = False
        self._visit = 0
        self._asked: float | None = None  # when a file or folder was asked that has not answered
        self._late = False
        self._failing: set[str] = set()  # folders that could not be searched at the last look
        self._named: set[str] = set()  # those of them that were named

    def arrivals(self) -> Iterator[Arrival]:
        """Look once; return what is new, and what has changed since it was returned last.

        An image is returned until `judged` was called; then only if another is written in its
        place. One that cannot be decoded yet is returned at each change, at last as `final`; one
        that cannot be read only as `final`.

        While the folder is away, its files are kept in mind, so that they are not returned again
        when it is back. A file that is deleted from a folder that is there is forgotten.
        """
        self._asked = time.monotonic()
        try:
            yield from self._arrivals()
        finally:
            self._asked = None

    def say_whether_it_answers(self) -> None:
        """Log when the folder stops answering, and when it answers again.

        To be called from time to time, by another thread: a hanging share holds up whoever asks.
        """
        asked = self._asked
        late = asked is not None and time.monotonic() - asked > ANSWER_WITHIN
        if late != self._late:
            self._late = late
            log.warning("%s %s", self._folder, "does not answer" if late else "answers again")

    def _arrivals(self) -> Iterator[Arrival]:
        failed: dict[str, OSError] = {}
        paths = self._paths(failed)
        try:
            root = _identity(self._folder)
            first = next(paths, None)
            if self._folder in failed:
                raise failed[self._folder]
        except OSError as error:
            self._say_away(error.strerror)
            return
        if first is None and self._seen and (self._away or root != self._root):
            self._say_away("an empty folder is in its place, as after a share is unmounted")
            return
        if self._away or root != self._root:
            self._come_back(root)
        there = set()
        for path in itertools.chain([first] if first is not None else [], paths):
            there.add(path)
            with suppress(FileNotFoundError):  # deleted meanwhile
                arrival = self._look(path)
                self._asked = None
                if arrival is not None:
                    yield arrival
            self._asked = time.monotonic()
        self._name_failing(failed)
        self._forget(there, failed, root)

    def _paths(self, failed: dict[str, OSError]) -> Iterator[str]:
        yield from walk(self._folder, failed.__setitem__)
        yield from filter(names_image, list(failed))  # links to images that are not there

    def _say_away(self, why: str | None) -> None:
        if not self._away:
            log.warning("%s is away (%s). Waiting until it is back", self._folder, why)
        self._away = True

    def _come_back(self, root: tuple[int, int]) -> None:
        if self._away:
            log.warning("%s is back", self._folder)
        self._root, self._away = root, False
        self._visit += 1

    def _name_failing(self, failed: dict[str, OSError]) -> None:
        """Log once which folders cannot be searched; at a single look, one may be being deleted."""
        for path in failed.keys() & self._failing - self._named:
            if names_image(path):
                continue  # it gets a row
            log.warning("%s: not searched (%s)", path, failed[path].strerror)
            self._named.add(path)
        self._failing = set(failed)
        self._named &= self._failing

    def _forget(self, there: set[str], failed: dict[str, OSError], root: tuple[int, int]) -> None:
        """Forget files that were deleted, but not those whose folder is away."""
        try:
            if _identity(self._folder) != root:  # it went away during the look
                return
        except OSError:
            return
        away = tuple(os.path.join(path, "") for path in failed)
        missing = [
            path for path in self._seen.keys() - there - failed.keys() if not path.startswith(away)
        ]
        deleted = [path for path in missing if self._seen[path].visit == self._visit]
        lost = [path for path in missing if self._seen[path].visit != self._visit]
        lost.sort(key=lambda path: self._seen[path].visit, reverse=True)
        for path in [*deleted, *lost[REMEMBERED:]]:
            del self._seen[path]

    def _look(self, path: str) -> Arrival | None:
        now, signature = time.monotonic(), _signature(path)
        seen = self._seen.get(path)
        if seen is None:
            waiting = not self._known(path)
            seen = self._seen[path] = _Seen(signature, now, self._visit, waiting=waiting)
            if not waiting:
                return None
        elif not self._may_have_changed(seen, signature, now):
            return None
        final = now - seen.changed >= GIVE_UP
        content = _content(path)
        if isinstance(content, UnreadableImage):
            if seen.unread and not seen.waiting:
                seen.changed = now  # it is tried again later
                return None
            seen.waiting = True
            checksum = None
        else:
            checksum = zlib.crc32(content)
            seen.waiting = checksum != seen.judged  # else only the time of change was set

        def judged() -> None:
            seen.judged, seen.waiting, seen.unread = checksum, False, checksum is None

        if not seen.waiting or (checksum is None and not final):
            return None
        written = signature[0] if signature is not None else None
        return Arrival(path, content, written, final, judged)

    def _may_have_changed(self, seen: _Seen, signature: Signature | None, now: float) -> bool:
        """Return whether a file may have another content than at the last look."""
        returned, seen.visit = seen.visit != self._visit, self._visit
        if returned and seen.waiting:
            seen.changed = now
        if signature is not None and seen.signature != signature:
            former, seen.signature = seen.signature, signature
            # No content to compare. Inodes may have other numbers after a share was away.
            unchanged = former is None or (returned and former[:2] == signature[:2])
            if seen.from_before and unchanged:
                return False
            seen.changed = now
            return True
        return (seen.waiting or seen.unread) and now - seen.changed >= GIVE_UP


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _signature(path: str) -> Signature | None:
    """Return time of change, size and inode of a file; None if it cannot be asked.

    Raises:
        FileNotFoundError: it was deleted.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not os.path.lexists(path):
            raise
        return None  # such as a link that leads nowhere
    return status.st_mtime_ns, status.st_size, status.st_ino


def _content(path: str) -> bytes | UnreadableImage:
    try:
        return unreadable(path) or read_file(Path(path))
    except UnreadableImage as error:
        return error
    except OSError as error:
        return reason(error)


def follow(
    folder: str,
    judge: Judge,
    production: Production | None,
    output: Output,
    verdicts: VerdictLog,
) -> None:
    """Judge images as they arrive in a folder, until the process is ended.

    Args:
        folder: to watch.
        judge: its model is replaced when the alias prod moves.
        production: where the model comes from; None if it was given as a folder.
        output: where the rows go.
        verdicts: the log that they go to as well.
    """
    watch = Watch(folder, output.take)
    waiting: deque[Arrival] = deque()

    def items() -> Iterator[Item]:
        for arrival in watch.arrivals():
            waiting.append(arrival)
            yield Item(arrival.path, arrival.content)

    def guard() -> None:
        while True:
            time.sleep(1)
            watch.say_whether_it_answers()

    threading.Thread(target=guard, daemon=True).start()
    log.info("Watching %s; end with Ctrl-C", folder)
    while True:
        started = time.monotonic()
        for judged in judge.judged(items()):
            arrived = [(one, waiting.popleft()) for one in judged]
            # An image that cannot be decoded may not be completely written yet.
            whole = [(j, a) for j, a in arrived if j.verdict.verdict != "error" or a.final]
            if whole:
                origins = [Origin("watch", os.path.abspath(a.path), a.written) for _, a in whole]
                verdicts.add([one for one, _ in whole], origins)
                output.put([one.row for one, _ in whole])
            for _, arrival in whole:
                arrival.judged()
        output.settle()
        if production is not None and production.moved():
            judge.model = judge.model.followed(production)
        time.sleep(max(LOOK_EVERY, time.monotonic() - started))
