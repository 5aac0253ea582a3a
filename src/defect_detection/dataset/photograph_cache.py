"""Keypoints of images and results for pairs of images, kept by content in a SQLite file."""

import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from defect_detection import PipelineError
from defect_detection.dataset.alignment import SIDE, Keypoints, compare, describe
from defect_detection.dataset.candidates import HASHES, hash_descriptors
from defect_detection.runtime import preprocessing

T = TypeVar("T")

METHOD = "photographs-2"  # names the file: change it whenever another answer is possible


def describe_files(paths: Iterable[Path]) -> list[Keypoints]:
    """Find the keypoints of readable image files, several at a time."""
    return _parallel(lambda path: describe(preprocessing.decode_within(path, SIDE)[..., 0]), paths)


@contextmanager
def opened(cache: Path) -> Iterator["PhotographCache"]:
    """Open the file in the folder `cache`.

    Raises:
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
    except (sqlite3.Error, OSError) as error:
        raise PipelineError(f"{path}: cannot be used ({error}). Delete it") from error


class PhotographCache:
    """Keypoints and compared pairs of all images that were ever grouped, by content."""

    def __init__(self, connection: sqlite3.Connection):
        self._db = connection
        with self._db:
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS features (digest TEXT PRIMARY KEY, height INT, "
                "points BLOB, descriptors BLOB, hashes BLOB, pixels BLOB)"
            )
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS pairs (a TEXT, b TEXT, same INT, PRIMARY KEY (a, b)) "
                "WITHOUT ROWID"
            )
            self._db.execute("CREATE TABLE IF NOT EXISTS searches (digests TEXT)")

    def lacking(self, digests: Sequence[str]) -> list[str]:
        """Return the images without stored keypoints."""
        known = {digest for (digest,) in self._db.execute("SELECT digest FROM features")}
        return [digest for digest in digests if digest not in known]

    def searched(self, digests: Sequence[str]) -> set[str]:
        """Return the largest set of these images among which all pairs were searched."""
        wanted = set(digests)
        return max((wanted & one for _, one in self._searches()), key=len, default=set())

    def keep_searched(self, digests: Sequence[str]) -> None:
        """Remember that all pairs among these images were searched."""
        wanted = set(digests)
        inside = [(row,) for row, one in self._searches() if one <= wanted]
        with self._db:
            self._db.executemany("DELETE FROM searches WHERE rowid = ?", inside)
            self._db.execute("INSERT INTO searches VALUES (?)", ("\n".join(digests),))

    def _searches(self) -> Iterator[tuple[int, set[str]]]:
        for row, digests in self._db.execute("SELECT rowid, digests FROM searches").fetchall():
            yield row, set(digests.split("\n"))

    def keep_features(self, digests: Sequence[str], features: Sequence[Keypoints]) -> None:
        """Store the keypoints of images."""
        rows = (
            (
                digest,
                len(one.pixels),
                *(
                    array.tobytes()
                    for array in (
                        one.points,
                        one.descriptors,
                        hash_descriptors(one.descriptors),
                        one.pixels,
                    )
                ),
            )
            for digest, one in zip(digests, features, strict=True)
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
            (blob,) = self._one("hashes", digest)
            yield np.frombuffer(blob, np.uint16).reshape(-1, HASHES)

    def descriptors(self, digests: Sequence[str]) -> Iterator[np.ndarray]:
        """Yield the descriptors of each image."""
        for digest in digests:
            (blob,) = self._one("descriptors", digest)
            yield np.frombuffer(blob, np.uint8).reshape(-1, 128)

    def _features(self, digest: str) -> Keypoints:
        height, points, descriptors, pixels = self._one(
            "height, points, descriptors, pixels", digest
        )
        return Keypoints(
            np.frombuffer(pixels, np.uint8).reshape(height, -1),
            np.frombuffer(points, np.float32).reshape(-1, 4),
            np.frombuffer(descriptors, np.uint8).reshape(-1, 128),
        )

    def _one(self, columns: str, digest: str) -> tuple:
        query = f"SELECT {columns} FROM features WHERE digest = ?"
        return self._db.execute(query, (digest,)).fetchone()

    def pairs(self) -> Iterator[tuple[str, str, int]]:
        """Yield all pairs that were compared, and whether they come from one photograph."""
        return self._db.execute("SELECT a, b, same FROM pairs")

    def compare(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Compare pairs of images and store whether each comes from one photograph."""
        a, b = ([self._features(pair[side]) for pair in pairs] for side in (0, 1))
        same = [likeness.same_photograph for likeness in _parallel(compare, a, b)]
        with self._db:
            self._db.executemany(
                "INSERT OR IGNORE INTO pairs VALUES (?, ?, ?)",
                [(*pair, one) for pair, one in zip(pairs, same, strict=True)],
            )
        return same


def _parallel(function: Callable[..., T], *arguments: Iterable) -> list[T]:
    # One BLAS thread in each of several threads.
    with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(function, *arguments))
