"""What the verdict log holds, as the pages show it."""

import math
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from defect_detection import PipelineError
from defect_detection.evaluation.metrics import Rate
from defect_detection.inference import rows, verdict_file
from defect_detection.service import shifts

OPEN = "waits != '' AND NOT settled"  # as the index `waiting` has it
# Of the verdicts on several images of one part, the first of these counts; "review" as in `kind`.
WORST_FIRST = ("defect", "review", "error", "unknown", "ok")
BLOCK = 5_000  # verdicts that are counted at a time
COUNT_EVERY = 0.5  # seconds between two counts of what waits


class Unreadable(PipelineError):
    """The verdict log cannot be read."""


@dataclass(frozen=True)
class Logged:
    """A verdict in the log; times in seconds since 1970, otherwise as in its schema."""

    id: int
    at: float
    source: str
    name: str
    part: str
    verdict: str
    probability: float | None
    threshold: float
    review: bool
    reason: str
    model: str
    milliseconds: float
    sha256: str
    waits: str
    settled: bool

    @property
    def kind(self) -> str:
        """How it is shown: as itself, or as "review" if a person decides between defect and ok."""
        return rows.kind(self.verdict, self.review)


@dataclass(frozen=True)
class View:
    """What is kept to show an image.

    Attributes:
        thumbnail: a small JPEG, None if the image could not be decoded.
        levels: float32 (h, w) in [0, 1], evidence of a defect; None for an error.
        aspect: as `heatmap.spread` takes it.
    """

    thumbnail: bytes | None
    levels: np.ndarray | None
    aspect: float | None


@dataclass(frozen=True)
class Shift:
    """The parts of a shift. A part with several images counts once, by the worst verdict.

    Attributes:
        began: seconds since 1970.
        parts: how many were judged.
        rejected: those with a defect.
        unknown: those that could not be judged, errors among them.
        to_person: those that a person should look at, the random sample among them.
    """

    began: float
    parts: int
    rejected: Rate
    unknown: Rate
    to_person: Rate

    @property
    def started(self) -> str:
        """When it began, as a clock here shows it."""
        return datetime.fromtimestamp(self.began).strftime("%H:%M")


_COLUMNS = ", ".join(one.name for one in fields(Logged))


class Verdicts:
    """Reads the verdict log. Any number of threads may use it."""

    def __init__(self, folder: Path, begin: Sequence[str]):
        """Read the log of a folder, which need not exist yet.

        Args:
            folder: of the line.
            begin: when shifts begin, such as "06:00", in local time.
        """
        self.file = folder / verdict_file.FILE
        self._shifts = begin
        self._here = threading.local()
        self._backlog: tuple[float, Counter[str]] = -math.inf, Counter()
        self._counting = threading.Lock()
        self._count = _Count(0.0, None, 0)

    def newest(self, most: int) -> list[Logged]:
        """Return the newest verdicts, the newest first."""
        return self._select("1 ORDER BY id DESC LIMIT ?", most)

    def one(self, number: int) -> Logged:
        """Return a verdict.

        Raises:
            KeyError: there is none of that id.
        """
        for found in self._select("id = ?", number):
            return found
        raise KeyError(number)

    def waiting(self, most: int) -> list[Logged]:
        """Return verdicts that wait for a person, the oldest first, the random sample last."""
        of_line = self._select(f"{OPEN} AND waits != 'audit' ORDER BY id LIMIT ?", most)
        left = most - len(of_line)
        return of_line + self._select(f"{OPEN} AND waits = 'audit' ORDER BY id LIMIT ?", left)

    def backlog(self) -> Counter[str]:
        """Return how many verdicts wait for a person, by the reason.

        With a hundred thousand of them, counting takes 15 ms, so it is not done for each screen.
        """
        counted, found = self._backlog
        if time.monotonic() - counted > COUNT_EVERY:
            counting = f"SELECT waits, count(*) FROM verdicts WHERE {OPEN} GROUP BY waits"
            found = Counter(dict(self._query(counting)))
            self._backlog = time.monotonic(), found
        return found

    def totals(self) -> list[tuple[str, str, int]]:
        """Return how many verdicts there were since the log was made, by source and verdict."""
        return self._query("SELECT source, verdict, count FROM totals")

    def view(self, number: int) -> View:
        """Return what is kept to show an image.

        Raises:
            KeyError: there is none of that id.
        """
        found = self._query(
            "SELECT thumbnail, evidence, height, width, aspect FROM views WHERE id = ?", number
        )
        if not found:
            raise KeyError(number)
        thumbnail, evidence, height, width, aspect = found[0]
        levels = None
        if evidence is not None:
            levels = np.frombuffer(evidence, np.uint8).reshape(height, width) / np.float32(255)
        return View(thumbnail, levels, aspect)

    def has_image(self, number: int) -> bool:
        """Return whether the image of a verdict is kept; that of a file that was empty is."""
        return bool(self._query("SELECT 1 FROM images WHERE id = ?", number))

    def content(self, number: int) -> bytes | None:
        """Return the content of an image's file, None if it is kept no longer."""
        found = self._query("SELECT content FROM images WHERE id = ?", number)
        return bytes(found[0][0]) if found else None

    def settle(self, number: int, settled: bool) -> None:
        """Take a verdict out of what waits for a person, or put it back.

        Raises:
            Unreadable: the log cannot be written.
        """
        with self._writing() as connection:
            connection.execute("UPDATE verdicts SET settled = ? WHERE id = ?", (settled, number))
            connection.execute("UPDATE images SET wanted = ? WHERE id = ?", (not settled, number))

    def settle_without_image(self) -> None:
        """Take all verdicts whose image is not kept out of what waits for a person.

        Raises:
            Unreadable: the log cannot be written.
        """
        with self._writing() as connection:
            connection.execute(
                f"UPDATE verdicts SET settled = 1 WHERE {OPEN} AND NOT EXISTS "
                "(SELECT 1 FROM images WHERE images.id = verdicts.id)"
            )

    def shift_began(self) -> float:
        """Return when the present shift began, in seconds since 1970."""
        return shifts.began(self._shifts, datetime.now().astimezone()).timestamp()

    def shift(self, now: datetime) -> Shift:
        """Return the parts of the present shift."""
        began = shifts.began(self._shifts, now).timestamp()
        with self._counting:
            here = verdict_file.identity(self.file)
            if (self._count.began, self._count.file) != (began, here):
                self._count = _Count(began, here, self._before(began))
            count = self._count
            while more := self._query(
                "SELECT id, part, verdict, waits FROM verdicts WHERE id > ? ORDER BY id LIMIT ?",
                *(count.last, BLOCK),
            ):
                count.add(more)
            return count.shift()

    def _before(self, began: float) -> int:
        """Return the id before the first verdict since a moment."""
        found = self._query(
            "SELECT coalesce((SELECT min(id) FROM verdicts WHERE at >= ?) - 1, "
            "(SELECT max(id) FROM verdicts), 0)",
            began,
        )
        return int(found[0][0]) if found else 0

    def _select(self, where: str, *values: object) -> list[Logged]:
        found = self._query(f"SELECT {_COLUMNS} FROM verdicts WHERE {where}", *values)
        return [_logged(row) for row in found]

    def _query(self, text: str, *values: object) -> list[Any]:
        here = verdict_file.identity(self.file)
        if here is None:
            return []
        try:
            with self._connection(here) as connection:
                return connection.execute(text, values).fetchall()
        except OverflowError:  # an id that SQLite cannot hold
            return []
        except (sqlite3.Error, verdict_file.OtherSchema, OSError) as error:
            raise Unreadable(f"{self.file}: cannot be read ({error})") from error

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(verdict_file.connect(self.file)) as connection:
                yield connection
        except (sqlite3.Error, OSError, verdict_file.OtherSchema) as error:
            raise Unreadable(f"{self.file}: cannot be written ({error})") from error
        self._backlog = -math.inf, Counter()

    @contextmanager
    def _connection(self, identity: tuple[int, int]) -> Iterator[sqlite3.Connection]:
        """Lend this thread's connection to a file; a new one after another file, or an error."""
        known = getattr(self._here, "connection", None)
        if known is None or known[0] != identity:
            if known is not None:
                known[1].close()
            known = self._here.connection = identity, verdict_file.connect(self.file)
        try:
            yield known[1]
        except sqlite3.Error:
            self._here.connection = None
            known[1].close()
            raise


class _Count:
    """Counts the parts of a shift, verdict by verdict."""

    def __init__(self, began: float, file: tuple[int, int] | None, last: int):
        self.began, self.file, self.last = began, file, last
        self._worst: dict[str, int] = {}  # by part, the place in WORST_FIRST
        self._to_person: set[str] = set()

    def add(self, more: list[tuple[int, str, str, str]]) -> None:
        for number, part, verdict, waits in more:
            part = part or f"\0{number}"  # without an id, each image is a part of its own
            worst = min(WORST_FIRST.index(verdict), self._worst.get(part, len(WORST_FIRST)))
            self._worst[part] = worst
            if waits:
                self._to_person.add(part)
        self.last = more[-1][0]

    def shift(self) -> Shift:
        counts = Counter(self._worst.values())
        parts = len(self._worst)
        unknown = counts[WORST_FIRST.index("unknown")] + counts[WORST_FIRST.index("error")]
        return Shift(
            self.began,
            parts,
            Rate(counts[WORST_FIRST.index("defect")], parts),
            Rate(unknown, parts),
            Rate(len(self._to_person), parts),
        )


def _logged(row: Sequence[Any]) -> Logged:
    values = dict(zip((one.name for one in fields(Logged)), row, strict=True))
    values["review"], values["settled"] = bool(values["review"]), bool(values["settled"])
    return Logged(**values)
