"""What the pretrained layers make of pictures and of their variants, computed once.

These layers keep their weights, so every set, every fold and the next training take the same
features: they are kept in a file, of which a fit reads what it needs.
"""

import fcntl
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from defect_detection import PipelineError, augmentation, images
from defect_detection import model as network
from defect_detection.augmentation import Augmentation
from defect_detection.dataset import Dataset
from defect_detection.model import keras, tf
from defect_detection.settings import Sampling

log = logging.getLogger(__name__)

BATCH = 16
MOST_AS_THEY_ARE = 1000  # pictures of a class that are held back in turn, to choose and calibrate
# Shares of the variants; of what is learned from, half is weighed as defects all the same.
GOOD, DEFECTIVE = 0.4, 0.4  # the rest are good parts that get a blemish
FILES_KEPT = 3
PART, PART_KEPT = ".part", 24 * 3600  # of a computation that was interrupted; seconds
SAY_AFTER = 15  # seconds


@dataclass(frozen=True)
class Features:
    """Features of pictures as they are and of variants, row by row.

    Attributes:
        path: the file of values, float16 (m, height, width, channels).
        shape: of these.
        rows: (n,) the rows of the file that are spoken of.
        labels: float32 (n,), 1 = defect.
        pictures: (n,) the number of the picture that each was made from.
        photographs: (n,) the number of its photograph.
        varied: bool (n,), false of pictures as they are.
    """

    path: Path
    shape: tuple[int, int, int, int]
    rows: np.ndarray
    labels: np.ndarray
    pictures: np.ndarray
    photographs: np.ndarray
    varied: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """Return values, float16 (k, height, width, channels).

        The file is mapped for each call: else what was read once counts as memory of the process.
        """
        return np.memmap(self.path, np.float16, "r", shape=self.shape)[self.rows[numbers]]

    def among(self, pictures: np.ndarray) -> "Features":
        """Return the features that were made from some of the pictures only."""
        kept = np.isin(self.pictures, pictures)
        names = ("rows", "labels", "pictures", "photographs", "varied")
        return replace(self, **{name: getattr(self, name)[kept] for name in names})


def compute(
    model: keras.Model, data: Dataset, photographs: np.ndarray, sampling: Sampling
) -> Features:
    """Compute features, or take them from the cache.

    Up to 1,000 pictures of each class are taken as they are. The variants are drawn so that every
    photograph of a class has as many, however many pictures there are of it. A computation that
    was interrupted is gone on with.

    Args:
        model: its pretrained layers are run; of a model without, the variants are the features.
        data: pictures at the size that the model takes.
        photographs: (n,) number of the photograph that each picture was made from.
        sampling: how many variants, and where the features are kept.

    Raises:
        PipelineError: the cache cannot be written, or the disk has no room for the features.
    """
    seed, cache = sampling.seed, sampling.cache
    planned = _plan(data.labels, photographs, sampling.variants, seed)
    layers = network.frozen(model) if network.has_features(model) else None
    shape = model.input_shape[1:] if layers is None else layers.output_shape[1:]
    path = cache / f"features-{_key(layers, data, planned, seed)}"
    bytes_each = int(np.prod(shape)) * 2
    needed = len(planned.pictures) * bytes_each
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # One process at a time computes them; others wait and find them.
        part = path.with_suffix(PART)
        with part.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists() and path.stat().st_size == needed:
                part.unlink(missing_ok=True)
            else:
                _delete_old(cache)
                begun = file.seek(0, os.SEEK_END) // (BATCH * bytes_each) * BATCH
                file.truncate(begun * bytes_each)
                _require_room(cache, needed - begun * bytes_each)
                for values in _batches(layers, data, planned, seed, begun):
                    file.write(np.ascontiguousarray(values, np.float16))
                file.flush()
                os.fsync(file.fileno())
                part.rename(path)
            os.utime(path)  # used now
    except OSError as error:
        raise PipelineError(f"{path}: cannot be written ({error.strerror})") from error
    return Features(
        path=path,
        shape=(len(planned.pictures), *shape),
        rows=np.arange(len(planned.pictures)),
        labels=np.where(planned.blemished, 1, data.labels[planned.pictures]).astype(np.float32),
        pictures=planned.pictures,
        photographs=photographs[planned.pictures],
        varied=planned.varied,
    )


@dataclass(frozen=True)
class _Plan:
    pictures: np.ndarray
    varied: np.ndarray
    blemished: np.ndarray


def _plan(labels: np.ndarray, photographs: np.ndarray, variants: int, seed: int) -> _Plan:
    rng = np.random.default_rng(seed)
    good, defective = np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)
    counts = [round(variants * GOOD), round(variants * DEFECTIVE)]
    parts = [
        *(_evenly(rows, photographs, MOST_AS_THEY_ARE, rng)[0] for rows in (good, defective)),
        _evenly(good, photographs, counts[0], rng)[1],
        _evenly(defective, photographs, counts[1], rng)[1],
        _evenly(good, photographs, variants - sum(counts), rng)[1],
    ]
    number = np.repeat(range(len(parts)), [len(part) for part in parts])
    return _Plan(np.concatenate(parts), number >= 2, number == 4)


def _evenly(
    rows: np.ndarray, photographs: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Choose pictures so that each photograph has as many as the others, as far as it has any.

    Returns:
        Up to `count`, each picture once; and `count`, those of small photographs repeatedly, in
        any order, since the fill of a turned variant goes by its place.
    """
    rows = rng.permutation(rows)
    of = list(_by_photograph(rows, photographs))
    of = [of[number] for number in rng.permutation(len(of))]
    turns = range(max(len(pictures) for pictures in of))
    once = [pictures[turn] for turn in turns for pictures in of if turn < len(pictures)]
    again = [of[i % len(of)][i // len(of) % len(of[i % len(of)])] for i in range(count)]
    return np.array(once[:count]), rng.permutation(again)


def _by_photograph(rows: np.ndarray, photographs: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the rows of each photograph, in their order."""
    _, of = np.unique(photographs[rows], return_inverse=True)
    order = np.argsort(of, kind="stable")
    yield from np.split(rows[order], np.cumsum(np.bincount(of))[:-1])


def _key(layers: keras.Model | None, data: Dataset, planned: _Plan, seed: int) -> str:
    total = hashlib.sha256(Path(augmentation.__file__).read_bytes())
    settled = (data.digest, images.PREPROCESSING, data.images.shape, seed, BATCH)
    total.update(repr(settled).encode())
    for array in (planned.pictures, planned.varied, planned.blemished):
        total.update(array.tobytes())
    if layers is not None:
        # Without the numbers that Keras counts layers by in a process.
        total.update(re.sub(r"_\d+\b", "", layers.to_json()).encode())
        for weight in layers.get_weights():
            total.update(weight.tobytes())
    return total.hexdigest()[:24]


def _batches(
    layers: keras.Model | None, data: Dataset, planned: _Plan, seed: int, begun: int
) -> Iterator[np.ndarray]:
    """Compute the features from row `begun` on; the same seed gives the same."""
    augment = Augmentation(data.images.shape[1:3])

    def run(
        images: tf.Tensor, varied: tf.Tensor, blemished: tf.Tensor, seed: tf.Tensor
    ) -> tf.Tensor:
        images = tf.cast(images, tf.float32)
        images = tf.cond(
            tf.reduce_any(varied),
            lambda: tf.where(
                tf.reshape(varied, (-1, 1, 1, 1)), augment(images, blemished, seed), images
            ),
            lambda: images,
        )
        return tf.cast(images if layers is None else layers(images, training=False), tf.float16)

    run = tf.function(run, reduce_retracing=True, autograph=False)
    count = len(planned.pictures)
    said = started = time.monotonic()
    for start in range(begun, count, BATCH):
        rows = slice(start, start + BATCH)
        yield run(
            data.images[planned.pictures[rows]],
            planned.varied[rows],
            planned.blemished[rows],
            tf.constant([seed, start], tf.int64),
        ).numpy()
        if time.monotonic() - said > SAY_AFTER:
            said = time.monotonic()
            done = min(start + BATCH, count)
            left = (said - started) * (count - done) / (done - begun)
            log.info("Features of pictures: %d of %d, %.0f s to go", done, count, left)


def _require_room(cache: Path, needed: int) -> None:
    """Find out before the work whether the features will fit on the disk."""
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise PipelineError(
            f"{cache}: the features take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free. "
            f"Make room, or lower variants or image_size"
        )


def _delete_old(cache: Path) -> None:
    """Make room for one file more: keep those used last, and what was interrupted not long ago."""
    used = {}
    for path in cache.glob("features-*"):
        with suppress(FileNotFoundError):  # another process deleted it
            used[path] = path.stat().st_mtime
    whole = sorted((path for path in used if path.suffix != PART), key=used.get, reverse=True)
    stale = [p for p in used if p.suffix == PART and time.time() - used[p] > PART_KEPT]
    for old in whole[FILES_KEPT - 1 :] + stale:
        old.unlink(missing_ok=True)
