"""The log of all verdicts: one SQLite file that the API and watched folders write.

A verdict never waits long for it: what cannot be written, as while the disk is full, waits in
memory for a while, and what is then lost is counted. Processes may be killed at any time; a verdict
that `add` returned an id for stays.
"""

import contextlib
import hashlib
import io
import logging
import random
import re
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from defect_detection.inference.verdict_file import (
    FILE,
    OtherSchema,
    connect,
    identity,
    transaction,
)
from defect_detection.names import printable
from defect_detection.retention import Retention
from defect_detection.runtime import preprocessing
from defect_detection.runtime.preprocessing import UnreadableImage

if TYPE_CHECKING:
    import numpy as np

    from defect_detection.inference.judge import Judged
    from defect_detection.settings import Line

log = logging.getLogger(__name__)

ANSWER_WITHIN = 0.25  # seconds that a caller of `add` waits for the disk
ROOM_WITHIN = 5.0  # seconds that it waits for room in memory while the disk is only busy
AGAIN = 0.5  # seconds between two tries
MOST_WAITING, MOST_WAITING_BYTES = 2_000, 64_000_000  # verdicts in memory
BATCH = 64  # verdicts in a transaction
PRUNED = 200  # rows that are deleted after a batch, at most
NEWEST = 5  # images that are kept in any case, as a page may show them now
THUMBNAIL, QUALITY = 96, 80  # pixels of the longer side; of JPEGs, of 100
LONGEST_NAME, LONGEST_REASON = 200, 500  # characters

COLUMNS = (
    *("at", "source", "name", "path", "part", "verdict", "probability", "threshold", "review"),
    *("reason", "model", "milliseconds", "sha256", "written", "waits", "settled"),
)
INSERT = (
    f"INSERT INTO verdicts ({', '.join(COLUMNS)}) VALUES (:{', :'.join(COLUMNS)}) "
    f"ON CONFLICT (path, written, sha256) WHERE path IS NOT NULL DO NOTHING"
)
# What the disk is to blame for, and not a verdict. SQLite's other errors are subclasses of
# DatabaseError, which itself says that the file is no database, or damaged.
DISK = (sqlite3.OperationalError, OSError, OtherSchema)


@dataclass(frozen=True)
class Origin:
    """Where an image came from.

    Attributes:
        source: "predict", "camera" or "watch".
        path: of a watched file, else None.
        written: its time of change in nanoseconds; with the same one it is logged only once, also
            if its folder is watched anew.
    """

    source: str
    path: str | None = None
    written: int | None = None


@dataclass(frozen=True)
class Rules:
    """What is logged of a verdict.

    Attributes:
        part_id: regular expression that finds the id of the part in a file's name.
        audit_share: share of the parts that pass that a person looks at.
        keep: what the file keeps.
    """

    part_id: str = r"^[^.]+"
    audit_share: float = 0.02
    keep: Retention = Retention()

    @classmethod
    def of(cls, line: "Line") -> "Rules":
        """Return what the configuration says."""
        return cls(line.part_id, line.audit_share, line.keep)

    def part_of(self, name: str) -> str:
        """Return the id of the part in the name of an image's file, "" if it has none."""
        found = re.search(self.part_id, name[:LONGEST_NAME])
        if found is None:
            return ""
        return printable(found.group(found.re.groups) or "", LONGEST_NAME)


@dataclass
class _Entry:
    """A verdict on its way to the file."""

    row: dict[str, object]  # by the names of the columns
    thumbnail: bytes | None
    evidence: "np.ndarray | None"
    aspect: float | None
    content: bytes
    id: int | None = None
    done: threading.Event = field(default_factory=threading.Event)


class VerdictLog:
    """Writes verdicts into the file, in a thread of its own.

    Attributes:
        unlogged: verdicts that were lost since this process began.
        trouble: why nothing can be written at present, "" if it can.
    """

    def __init__(self, folder: Path, rules: Rules):
        """Write into the file of a folder, which is made if necessary."""
        self.file = folder / FILE
        self.rules = rules
        self.unlogged = 0
        self.trouble = ""
        self._connection: sqlite3.Connection | None = None
        self._opened: tuple[int, int] | None = None  # device and inode of the file
        self._waiting: deque[_Entry] = deque()
        self._writing = 0  # verdicts that are being written
        self._said_lost = False
        self._changed = threading.Condition()
        self._chance = random.SystemRandom()
        threading.Thread(target=self._write_all, name="verdict log", daemon=True).start()

    def add(self, judged: Sequence["Judged"], origins: Sequence[Origin]) -> list[int | None]:
        """Log verdicts; return the id of each, None for one that is not on the disk yet.

        None is also returned for a watched file that was logged before, or is older than what the
        log keeps.
        """
        entries = [
            None if self._too_old(origin) else self._entry(one, origin)
            for one, origin in zip(judged, origins, strict=True)
        ]
        new = [entry for entry in entries if entry is not None]
        for entry in new:
            with self._changed:
                # A busy disk is waited for, a broken one is not.
                self._changed.wait_for(self._has_room, ROOM_WITHIN)
                self._waiting.append(entry)
                if self.trouble:
                    self._drop_surplus()
                self._changed.notify_all()
        deadline = time.monotonic() + (0 if self.trouble else ANSWER_WITHIN)
        for entry in new:
            entry.done.wait(max(0, deadline - time.monotonic()))
        return [None if entry is None else entry.id for entry in entries]

    def flush(self, seconds: float) -> int:
        """Wait until all is written, for some seconds at most; return how many are not."""
        with self._changed:
            self._changed.wait_for(lambda: not self.waiting(), seconds)
            return self.waiting()

    def waiting(self) -> int:
        """Return how many verdicts are not on the disk yet."""
        return len(self._waiting) + self._writing

    def _has_room(self) -> bool:
        held = sum(len(entry.content) for entry in self._waiting)
        return bool(self.trouble) or not self._waiting or held < MOST_WAITING_BYTES

    def _too_old(self, origin: Origin) -> bool:
        """Return whether a watched file is older than what is kept: a watch begun anew meets it."""
        oldest = time.time() - self.rules.keep.days * 86_400
        return origin.written is not None and origin.written / 1e9 < oldest

    def _entry(self, judged: "Judged", origin: Origin) -> _Entry:
        content, name, verdict = judged.content, judged.name, judged.verdict
        waits = ""
        if verdict.verdict in ("unknown", "error"):
            waits = verdict.verdict
        elif verdict.review:
            waits = "band"
        elif verdict.verdict == "ok" and self._chance.random() < self.rules.audit_share:
            waits = "audit"
        classifier = judged.model.classifier
        takes = classifier.takes
        row = {
            "at": time.time(),
            "source": origin.source,
            "name": printable(name, LONGEST_NAME),
            "path": _text(origin.path),
            "part": self.rules.part_of(name),
            "verdict": verdict.verdict,
            "probability": verdict.probability,
            "threshold": classifier.point.threshold,
            "review": verdict.review,
            "reason": printable(verdict.reason, LONGEST_REASON),
            "model": printable(judged.model.name),
            "milliseconds": judged.milliseconds,
            "sha256": hashlib.sha256(content).hexdigest(),
            "written": _integer(origin.written),
            "waits": waits,
            "settled": False,
        }
        return _Entry(
            row,
            _thumbnail(content, judged),
            judged.evidence_levels(),
            takes.width / takes.height if takes.fit == "letterbox" else None,
            content,
        )

    def _drop_surplus(self) -> None:
        """Forget images of the oldest verdicts, then verdicts, if too many wait for the disk."""
        held = sum(len(entry.content) for entry in self._waiting)
        for entry in self._waiting:
            if held <= MOST_WAITING_BYTES:
                break
            held -= len(entry.content)
            entry.content = b""
        while len(self._waiting) > MOST_WAITING:
            self._waiting.popleft().done.set()
            self.unlogged += 1
            if not self._said_lost:
                log.warning("Verdicts are lost for the log: %s", self.trouble)
            self._said_lost = True

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
                self._writing = len(batch)
            try:
                self._write(batch)
                left: list[_Entry] = []
            except DISK as error:
                self._say_trouble(error)
                left = batch
            except Exception:  # one that cannot be written must not stop the others
                left = self._one_by_one(batch)
            with self._changed:
                self._waiting.extendleft(reversed(left))
                self._writing = 0
                if left:
                    self._drop_surplus()
                else:
                    self._say_recovered()
                for entry in batch[: len(batch) - len(left)]:
                    entry.done.set()
                self._changed.notify_all()
            if left:
                time.sleep(AGAIN)

    def _one_by_one(self, batch: list[_Entry]) -> list[_Entry]:
        """Write the verdicts of a batch singly, without those that fail; return what is left."""
        for place, entry in enumerate(batch):
            try:
                self._write([entry])
            except DISK as error:
                self._say_trouble(error)
                return batch[place:]
            except Exception:
                log.exception("A verdict cannot be logged")
                self.unlogged += 1
        return []

    def _say_trouble(self, error: Exception) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None
        if not self.trouble:
            log.warning("%s: cannot be written (%s). Verdicts go on", self.file, error)
        strerror = error.strerror if isinstance(error, OSError) else None
        self.trouble = strerror or str(error) or type(error).__name__

    def _say_recovered(self) -> None:
        if self.trouble:
            log.warning("%s can be written again; %d verdicts lost", self.file, self.unlogged)
        self.trouble, self._said_lost = "", False

    def _write(self, batch: list[_Entry]) -> None:
        """Write a batch in one transaction.

        Raises:
            DISK: it cannot be written now.
        """
        try:
            self._write_now(batch)
        except sqlite3.DatabaseError as error:
            if type(error) is sqlite3.DatabaseError:  # damaged, or no database
                raise OSError(0, str(error)) from error
            raise

    def _write_now(self, batch: list[_Entry]) -> None:
        if self._connection is None or self._opened != identity(self.file):
            if self._connection is not None:  # the file was deleted or replaced
                self._connection.close()
            self._connection = connect(self.file)
            self._opened = identity(self.file)
        connection = self._connection
        ids: list[int | None] = []
        with transaction(connection):
            for entry in batch:
                ids.append(self._insert(connection, entry))
            self._prune(connection)
        for entry, number in zip(batch, ids, strict=True):
            entry.id = number

    @staticmethod
    def _insert(connection: sqlite3.Connection, entry: _Entry) -> int | None:
        made = connection.execute(INSERT, entry.row)
        if not made.rowcount:  # a watched file that was logged before
            return None
        number, evidence = made.lastrowid, entry.evidence
        shape = (None, None) if evidence is None else evidence.shape
        packed = None if evidence is None else evidence.tobytes()
        connection.execute(
            "INSERT INTO views VALUES (?, ?, ?, ?, ?, ?)",
            (number, entry.thumbnail, packed, *shape, entry.aspect),
        )
        connection.execute(
            "INSERT INTO images VALUES (?, ?, ?)", (number, bool(entry.row["waits"]), entry.content)
        )
        connection.execute(
            "INSERT INTO totals VALUES (?, ?, 1) ON CONFLICT DO UPDATE SET count = count + 1",
            (entry.row["source"], entry.row["verdict"]),
        )
        return number

    def _prune(self, connection: sqlite3.Connection) -> None:
        """Delete what is more than is kept, some rows at a time."""
        keep = self.rules.keep
        newest = connection.execute("SELECT max(id) FROM verdicts").fetchone()[0] or 0
        least, since = newest - keep.verdicts, time.time() - keep.days * 86_400
        for _ in range(PRUNED):
            oldest = connection.execute("SELECT id, at FROM verdicts ORDER BY id LIMIT 1")
            number, at = oldest.fetchone() or (newest, since)
            if number > least and at >= since:
                break
            for table in ("verdicts", "views", "images"):
                connection.execute(f"DELETE FROM {table} WHERE id = ?", (number,))
        for _ in range(PRUNED):
            if connection.execute("SELECT bytes FROM kept").fetchone()[0] <= keep.megabytes * 1e6:
                break
            connection.execute(
                "DELETE FROM images WHERE id = (SELECT id FROM images WHERE id <= ? "
                "ORDER BY wanted, id LIMIT 1)",
                (newest - NEWEST,),
            )


def _integer(nanoseconds: int | None) -> int | None:
    """Return a time that SQLite can hold; a file may say that it is from the year 2300."""
    return None if nanoseconds is None else max(-(2**63), min(nanoseconds, 2**63 - 1))


def _text(path: str | None) -> str | None:
    """Return a path as a text that SQLite takes, whatever bytes it has."""
    return None if path is None else path.encode(errors="surrogateescape").decode(errors="replace")


def _thumbnail(content: bytes, judged: "Judged") -> bytes | None:
    """Return a small JPEG of an image, None if it cannot be decoded."""
    if judged.verdict.verdict == "error":
        return None
    takes = judged.model.classifier.takes
    try:
        return jpeg_within(content, THUMBNAIL, takes.channels, takes.most_pixels)
    except UnreadableImage:
        return None


def jpeg_within(content: bytes, longest: int, channels: int, most_pixels: int) -> bytes:
    """Return an image as a JPEG whose longer side has so many pixels.

    Raises:
        UnreadableImage: it cannot be decoded.
    """
    pixels = preprocessing.decode_within(content, longest, channels, most_pixels=most_pixels)
    made = io.BytesIO()
    Image.fromarray(pixels if channels == 3 else pixels[..., 0]).save(made, "JPEG", quality=QUALITY)
    return made.getvalue()
