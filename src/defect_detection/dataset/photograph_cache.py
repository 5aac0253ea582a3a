"""Keypoints of images and results for pairs of images, kept by content in a SQLite file.

SQLite notices that a file is damaged by its structure only, so each value has a checksum, which
begins with the images that it is about.
"""

import os
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from defect_detection import PipelineError
from defect_detection.dataset.alignment import SIDE, Keypoints, compare, describe
from defect_detection.dataset.candidates import HASHES, hash_descriptors
from defect_detection.dataset.decoded import read_unchanged
from defect_detection.dataset.workers import Map
from defect_detection.runtime import preprocessing

METHOD = "photographs-3"  # names the file: change it whenever another answer is possible
TABLES = (
    "features (digest TEXT PRIMARY KEY, height INT, points BLOB, descriptors BLOB, hashes BLOB, "
    "pixels BLOB)",
    "pairs (a TEXT, b TEXT, same INT, checksum INT, PRIMARY KEY (a, b)) WITHOUT ROWID",
    "searches (digests TEXT, pairs INT, checksum INT)",
)


class Damaged(PipelineError):
    """The file held something else than was written; it was deleted."""


def describe_file(most_pixels: int, digest: str, path: Path) -> Keypoints:
    """Find the keypoints of a readable image file.

    Args:
        most_pixels: that it may have.
        digest: its SHA-256.
        path: of it.

    Raises:
        PipelineError: it was changed, so that it has another digest.
    """
    content = read_unchanged(path, digest)
    pixels = preprocessing.decode_within(content, SIDE, most_pixels=most_pixels)
    return describe(pixels[..., 0])


@contextmanager
def opened(cache: Path) -> Iterator["PhotographCache"]:
    """Open the file in the folder `cache`.

    Raises:
        Damaged: it was damaged; the next call makes a new one.
        PipelineError: it cannot be read or written.
    """
    path = cache / f"{METHOD}.sqlite"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=60)
        try:
            yield PhotographCache(connection)
        finally:
            connection.close()
    except (sqlite3.DatabaseError, _OtherValue, OSError) as error:
        if not _is_damage(error, path):
            raise PipelineError(
                f"{path}: cannot be used ({error}). If no other process uses it, delete it"
            ) from error
        for one in (path, path.with_name(f"{path.name}-journal")):
            one.unlink(missing_ok=True)
        raise Damaged(f"{path} was damaged ({error}) and is deleted") from error


class _OtherValue(Exception):
    """A value is not what was written."""


def _is_damage(error: Exception, path: Path) -> bool:
    """Return whether an error says that the file is damaged; else it is locked, or the disk full.

    Damage of its first bytes looks like a newer version or like a lack of rights.
    """
    if not isinstance(error, (sqlite3.OperationalError, OSError)):
        return True
    forbidden = "readonly" in str(error) and os.access(path, os.W_OK)
    return forbidden or "unsupported file format" in str(error)


class PhotographCache:
    """Keypoints and compared pairs of all images that were ever grouped, by content.

    Its methods raise an exception that `opened` handles if a value is not what was written.
    """

    def __init__(self, connection: sqlite3.Connection):
        self._db = connection
        self._db.text_factory = partial(str, encoding="utf-8", errors="replace")
        with self._db:
            for table in TABLES:
                self._db.execute(f"CREATE TABLE IF NOT EXISTS {table}")
        query = "SELECT sql FROM sqlite_master WHERE type = 'table'"
        if {sql for (sql,) in self._db.execute(query)} != {f"CREATE TABLE {one}" for one in TABLES}:
            raise _OtherValue("other tables")

    def lacking(self, digests: Sequence[str]) -> list[str]:
        """Return the images without stored keypoints."""
        known = {digest for (digest,) in self._db.execute("SELECT digest FROM features")}
        return [digest for digest in digests if digest not in known]

    def searched(self, digests: Sequence[str]) -> tuple[set[str], int]:
        """Return the largest set of these images among which all pairs were searched.

        The second value is the least number of pairs that must be stored if that is true.
        """
        wanted, searches = set(digests), list(self._searches())
        found = max((wanted & among for _, among, _ in searches), key=len, default=set())
        return found, max((pairs for _, _, pairs in searches), default=0)

    def keep_searched(self, digests: Sequence[str]) -> None:
        """Remember that all pairs among these images were searched."""
        wanted = set(digests)
        inside = [(row,) for row, one, _ in self._searches() if one <= wanted]
        with self._db:
            (pairs,) = self._db.execute("SELECT count(*) FROM pairs").fetchone()
            self._db.executemany("DELETE FROM searches WHERE rowid = ?", inside)
            row = ("\n".join(digests), pairs)
            self._db.execute("INSERT INTO searches VALUES (?, ?, ?)", (*row, _checksum(*row)))

    def _searches(self) -> Iterator[tuple[int, set[str], int]]:
        query = "SELECT rowid, digests, pairs, checksum FROM searches"
        for row, digests, pairs, checksum in self._db.execute(query).fetchall():
            _require(checksum, digests, pairs)
            yield row, set(digests.split("\n")), pairs

    def keep_features(self, digests: Sequence[str], features: Sequence[Keypoints]) -> None:
        """Store the keypoints of images."""
        rows = []
        for digest, one in zip(digests, features, strict=True):
            height = len(one.pixels)
            rows.append(
                (
                    *(digest, height),
                    _sealed(one.points, digest, "points"),
                    _sealed(one.descriptors, digest, "descriptors"),
                    _sealed(hash_descriptors(one.descriptors), digest, "hashes"),
                    _sealed(one.pixels, digest, "pixels", height),
                )
            )
        with self._db:
            self._db.executemany(
                "INSERT OR IGNORE INTO features "
                "(digest, height, points, descriptors, hashes, pixels) VALUES (?, ?, ?, ?, ?, ?)",
                rows,
            )

    def hashes(self, digests: Sequence[str]) -> Iterator[np.ndarray]:
        """Yield the hashes of each image's keypoints."""
        for digest in digests:
            (sealed,) = self._one("hashes", digest)
            yield _unsealed(sealed, np.uint16, digest, "hashes").reshape(-1, HASHES)

    def descriptors(self, digests: Sequence[str]) -> Iterator[np.ndarray]:
        """Yield the descriptors of each image."""
        for digest in digests:
            (sealed,) = self._one("descriptors", digest)
            yield _unsealed(sealed, np.uint8, digest, "descriptors").reshape(-1, 128)

    def _features(self, digest: str) -> Keypoints:
        columns = "height, points, descriptors, pixels"
        height, points, descriptors, pixels = self._one(columns, digest)
        return Keypoints(
            _unsealed(pixels, np.uint8, digest, "pixels", height).reshape(height, -1),
            _unsealed(points, np.float32, digest, "points").reshape(-1, 4),
            _unsealed(descriptors, np.uint8, digest, "descriptors").reshape(-1, 128),
        )

    def _one(self, columns: str, digest: str) -> tuple:
        query = f"SELECT {columns} FROM features WHERE digest = ?"
        row = self._db.execute(query, (digest,)).fetchone()
        if row is None:
            raise _OtherValue("a row is missing")
        return row

    def pairs(self, at_least: int) -> Iterator[tuple[str, str, int]]:
        """Yield all pairs that were compared, and whether they come from one photograph.

        Raises the exception for `opened` if fewer than `at_least` are stored.
        """
        count = 0
        for a, b, same, checksum in self._db.execute("SELECT a, b, same, checksum FROM pairs"):
            _require(checksum, a, b, same)
            count += 1
            yield a, b, same
        if count < at_least:
            raise _OtherValue("rows are missing")

    def compare(self, pairs: Sequence[tuple[str, str]], mapped: Map) -> list[bool]:
        """Compare pairs of images and store whether each comes from one photograph."""
        a, b = ([self._features(pair[side]) for pair in pairs] for side in (0, 1))
        same = [likeness.same_photograph for likeness in mapped(compare, a, b)]
        rows = [(*pair, int(one)) for pair, one in zip(pairs, same, strict=True)]
        with self._db:
            self._db.executemany(
                "INSERT OR IGNORE INTO pairs VALUES (?, ?, ?, ?)",
                [(*row, _checksum(*row)) for row in rows],
            )
        return same


def _checksum(*values: object) -> int:
    return zlib.crc32(repr(values).encode(errors="replace"))


def _require(checksum: object, *values: object) -> None:
    if checksum != _checksum(*values):
        raise _OtherValue("a value is not what was written")


def _sealed(values: np.ndarray, *about: object) -> bytes:
    """Return values with their checksum at the end."""
    content = values.tobytes()
    return content + zlib.crc32(content, _checksum(*about)).to_bytes(4, "big")


def _unsealed(sealed: object, kind: type, *about: object) -> np.ndarray:
    if isinstance(sealed, bytes):
        content, checksum = sealed[:-4], sealed[-4:]
        if zlib.crc32(content, _checksum(*about)).to_bytes(4, "big") == checksum:
            return np.frombuffer(content, kind)
    raise _OtherValue("a value is not what was written")
