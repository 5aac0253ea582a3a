"""The output of the frozen layers for images and their variants, computed once.

The frozen layers never change, so all sets, all folds and the next training use the same features.
They are kept in a file from which a fit reads what it needs. Each row has a checksum, since a file
that a crash or a disk has damaged may have the right size.
"""

import fcntl
import hashlib
import itertools
import logging
import mmap
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from queue import Queue
from typing import Any, BinaryIO

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from defect_detection import PipelineError
from defect_detection.dataset.split import Dataset
from defect_detection.runtime import native_output
from defect_detection.settings import Sampling
from defect_detection.training import augmentation, network
from defect_detection.training.augmentation import Augmentation
from defect_detection.training.network import keras, tf

log = logging.getLogger(__name__)

BATCH = 16
MOST_PLAIN = 1000  # images of a class without variation, for validation
# Shares of the variants; a fit weighs both classes the same nevertheless.
GOOD, DEFECTIVE = 0.4, 0.4  # the rest are good parts with a blemish
GENTLE = 0.3  # share of the variants that are gentle
FILES_KEPT, BYTES_KEPT = 3, 500e6  # the files used last; more of them while they are small
LAYOUT = 2  # version of the layout of a file; part of its name
PART, PART_KEPT = ".part", 24 * 3600  # suffix of unfinished files; seconds they are kept


@dataclass(frozen=True)
class Features:
    """Features of plain images and of variants.

    Attributes:
        path: the file of values.
        mapped: the file in memory, so that no other takes its place.
        shape: of its values, (m, height, width, channels).
        rows: (n,) the rows of the file that belong to these features.
        labels: float32 (n,), 1 = defect.
        images: (n,) the number of the image that each comes from.
        photographs: (n,) the number of its photograph.
        varied: bool (n,), false for plain images.
        gentle: bool (n,), variants that differ from the image as shots of one camera do.
        blemished: bool (n,), variants of good parts with a blemish, which count as defects.
    """

    path: Path
    mapped: mmap.mmap
    shape: tuple[int, int, int, int]
    rows: np.ndarray
    labels: np.ndarray
    images: np.ndarray
    photographs: np.ndarray
    varied: np.ndarray
    gentle: np.ndarray
    blemished: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """Return the values of some rows, float16 (k, height, width, channels)."""
        values = np.frombuffer(self.mapped, _kind(self.shape))["values"][self.rows[numbers]]
        self.mapped.madvise(mmap.MADV_DONTNEED)  # else what was read counts as the process's memory
        return values

    def choose(self, numbers: np.ndarray) -> "Features":
        """Return some rows only."""
        whole = ("path", "mapped", "shape")
        names = [field.name for field in fields(self) if field.name not in whole]
        return replace(self, **{name: getattr(self, name)[numbers] for name in names})

    def among(self, images: np.ndarray) -> "Features":
        """Return the features of some images only."""
        return self.choose(np.flatnonzero(np.isin(self.images, images)))


def compute(
    model: keras.Model,
    data: Dataset,
    sampling: Sampling,
    on_share: Callable[[float], None] = lambda share: None,
) -> Features:
    """Compute the features of a data set, or take them from the cache.

    Up to 1,000 images of each class are used without variation. Variants are drawn so that every
    photograph of a class has equally many, whatever its number of images. An interrupted
    computation is resumed.

    Args:
        model: its frozen layers are run; for a model without, the variants are the features.
        data: images of the size that the model takes.
        sampling: how many variants, and where the features are kept.
        on_share: is called with the share of the missing features that is computed, in [0, 1].

    Raises:
        PipelineError: the cache cannot be written, or the disk is too small for the features.
    """
    shares = (GOOD, DEFECTIVE) if not network.is_good_only(model) else (GOOD + DEFECTIVE / 2, 0.0)
    planned = _plan(data, sampling, shares)
    layers = network.frozen(model) if network.has_features(model) else None
    height, width, channels = model.input_shape[1:] if layers is None else layers.output_shape[1:]
    shape = (len(planned.images), height, width, channels)
    path = sampling.cache / f"features-{_key(layers, data, planned, sampling.seed)}"
    batches = partial(_batches, layers, data, planned, sampling.seed)
    try:
        mapped = _complete(path, shape, batches, on_share)
    except OSError as error:
        raise PipelineError(f"{path}: cannot be written ({error.strerror})") from error
    return Features(
        path=path,
        mapped=mapped,
        shape=shape,
        rows=np.arange(len(planned.images)),
        labels=np.where(planned.blemished, 1, data.labels[planned.images]).astype(np.float32),
        images=planned.images,
        photographs=data.photographs[planned.images],
        varied=planned.varied,
        gentle=planned.gentle,
        blemished=planned.blemished,
    )


def _kind(shape: tuple[int, int, int, int]) -> np.dtype:
    """Return the type of a row of a file: its values and their checksum."""
    return np.dtype([("values", np.float16, shape[1:]), ("checksum", np.uint32)])


def _complete(
    path: Path,
    shape: tuple[int, int, int, int],
    batches: Callable[[int], Iterator[np.ndarray]],
    on_share: Callable[[float], None],
) -> mmap.mmap:
    """Write what is missing of a file of values and map it; `batches` yields it from a row on.

    One process at a time computes values; others wait for it and use them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished, size = path.with_suffix(PART), shape[0] * _kind(shape).itemsize
    with unfinished.open("ab+") as part:
        fcntl.flock(part, fcntl.LOCK_EX)
        os.utime(part.fileno())  # used now, so that it is not deleted as an old one
        if path.exists():
            with path.open("rb") as file:
                if file.seek(0, os.SEEK_END) == size and _sound(file, path, shape) == shape[0]:
                    unfinished.unlink(missing_ok=True)
                    os.utime(path)  # used now
                    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            log.warning("%s is damaged: the features are computed again", path)
            path.unlink()
        _write(part, path, shape, batches, on_share)
        unfinished.rename(path)
        os.utime(path)
        return mmap.mmap(part.fileno(), 0, access=mmap.ACCESS_READ)


def _write(
    part: BinaryIO,
    path: Path,
    shape: tuple[int, int, int, int],
    batches: Callable[[int], Iterator[np.ndarray]],
    on_share: Callable[[float], None],
) -> None:
    """Write the rows that an interrupted computation left to do."""
    kind = _kind(shape)
    _delete_old(path.parent)
    begun = _sound(part, path, shape) // BATCH * BATCH
    part.truncate(begun * kind.itemsize)
    _require_room(path.parent, (shape[0] - begun) * kind.itemsize)
    done = begun
    for values in batches(begun):
        rows = np.empty(len(values), kind)
        rows["values"] = values
        rows["checksum"] = _checksums(rows, path)
        part.write(rows.tobytes())
        done += len(values)
        on_share((done - begun) / (shape[0] - begun))
    part.flush()
    os.fsync(part.fileno())


def _sound(file: BinaryIO, path: Path, shape: tuple[int, int, int, int]) -> int:
    """Return how many rows from the first on are what was written for the file `path`."""
    kind = _kind(shape)
    count = min(shape[0], file.seek(0, os.SEEK_END) // kind.itemsize)

    def sound(first: int) -> np.ndarray:
        size = min(BATCH, count - first) * kind.itemsize
        rows = np.frombuffer(os.pread(file.fileno(), size, first * kind.itemsize), kind)
        return rows["checksum"] == _checksums(rows, path)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [*pool.map(sound, range(0, count, BATCH)), np.zeros(1, bool)]
    return int(np.argmin(np.concatenate(found)))


def _checksums(rows: np.ndarray, path: Path) -> list[int]:
    """Return checksums of rows; they begin with the name of the file, which says what they are."""
    start = zlib.crc32(path.name.encode())
    return [zlib.crc32(values, start) for values in rows["values"]]


@dataclass(frozen=True)
class _Plan:
    images: np.ndarray
    varied: np.ndarray
    gentle: np.ndarray
    blemished: np.ndarray


def _plan(data: Dataset, sampling: Sampling, shares: tuple[float, float]) -> _Plan:
    """Plan which images are varied; `shares` are those of good and of defective parts."""
    rng = np.random.default_rng(sampling.seed)
    photographs, variants = data.photographs, sampling.variants
    good, defective = np.flatnonzero(data.labels == 0), np.flatnonzero(data.labels == 1)
    counts = [round(variants * share) for share in shares]
    parts = [
        *(_evenly(rows, photographs, MOST_PLAIN, rng)[0] for rows in (good, defective)),
        _evenly(good, photographs, counts[0], rng)[1],
        _evenly(defective, photographs, counts[1], rng)[1],
        _evenly(good, photographs, variants - sum(counts), rng)[1],
    ]
    number = np.repeat(range(len(parts)), [len(part) for part in parts])
    varied = number >= 2
    gentle = varied & (rng.random(len(number)) < GENTLE)
    return _Plan(np.concatenate(parts), varied, gentle, number == 4)


def _evenly(
    rows: np.ndarray, photographs: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Choose images so that each photograph has equally many.

    Returns:
        Up to `count` different images; and `count` images, repeated where a photograph has too
        few, in random order, since the place in a batch decides what fills rotated corners.
    """
    if not len(rows):
        return rows, rows
    rows = rng.permutation(rows)
    of = list(_by_photograph(rows, photographs))
    of = [of[number] for number in rng.permutation(len(of))]
    turns = range(max(len(rows) for rows in of))
    once = [rows[turn] for turn in turns for rows in of if turn < len(rows)]
    again = [of[i % len(of)][i // len(of) % len(of[i % len(of)])] for i in range(count)]
    return np.array(once[:count], int), rng.permutation(np.array(again, int))


def _by_photograph(rows: np.ndarray, photographs: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the rows of each photograph, in the given order."""
    _, of = np.unique(photographs[rows], return_inverse=True)
    order = np.argsort(of, kind="stable")
    yield from np.split(rows[order], np.cumsum(np.bincount(of))[:-1])


def _key(layers: keras.Model | None, data: Dataset, planned: _Plan, seed: int) -> str:
    total = hashlib.sha256(Path(augmentation.__file__).read_bytes())
    settled = (data.digest, data.format.key, len(data), seed, BATCH, LAYOUT)
    total.update(repr(settled).encode())
    for array in (planned.images, planned.varied, planned.gentle, planned.blemished):
        total.update(array.tobytes())
    if layers is not None:
        # Without the numbers that Keras appends to names of layers.
        total.update(re.sub(r"_\d+\b", "", layers.to_json()).encode())
        for weight in layers.get_weights():
            total.update(weight.tobytes())
    return total.hexdigest()[:24]


def _batches(
    layers: keras.Model | None, data: Dataset, planned: _Plan, seed: int, begun: int
) -> Iterator[np.ndarray]:
    """Yield the features from row `begun` on; the same seed gives the same features."""
    augment = Augmentation(data.format.height, data.format.width)

    def vary(
        images: tf.Tensor,
        varied: tf.Tensor,
        blemished: tf.Tensor,
        gentle: tf.Tensor,
        seed: tf.Tensor,
    ) -> tf.Tensor:
        images = tf.cast(images, tf.float32)
        return tf.cond(
            tf.reduce_any(varied),
            lambda: tf.where(
                tf.reshape(varied, (-1, 1, 1, 1)),
                augment(images, blemished, gentle, seed),
                images,
            ),
            lambda: images,
        )

    vary = tf.function(vary, reduce_retracing=True, autograph=False)
    run = _runner(layers)
    for start in range(begun, len(planned.images), BATCH):
        rows = slice(start, start + BATCH)
        images = vary(
            data.images[planned.images[rows]],
            planned.varied[rows],
            planned.blemished[rows],
            planned.gentle[rows],
            tf.constant([seed, start], tf.int64),
        )
        yield run(images)


def _runner(layers: keras.Model | None) -> Callable[[tf.Tensor], np.ndarray]:
    """Return what computes features of images, (n, height, width, channels).

    On a CPU this is LiteRT, one image on each core: it takes half as long as TensorFlow.
    """
    if layers is None:
        return lambda images: images.numpy()
    if "CPU" not in (tf.zeros(1) + 1).device:
        in_graph = tf.function(partial(layers, training=False), autograph=False)
        return lambda images: in_graph(images).numpy()
    content = network.frozen_to_litert(layers)
    idle: Queue[Any] = Queue()
    with native_output.suppressed():
        for _ in range(os.cpu_count() or 1):
            interpreter = Interpreter(model_content=content, num_threads=1)
            interpreter.allocate_tensors()
            idle.put(interpreter.get_signature_runner())
    pool = ThreadPoolExecutor(idle.qsize())

    def one(image: np.ndarray) -> np.ndarray:
        runner = idle.get()
        try:
            return runner(images=image[np.newaxis])[network.FEATURES]
        finally:
            idle.put(runner)

    return lambda images: np.concatenate(list(pool.map(one, images.numpy())))


def _require_room(cache: Path, needed: int) -> None:
    """Raise PipelineError if the features will not fit on the disk."""
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise PipelineError(
            f"{cache}: the features take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free. "
            f"Make room, or lower variants or image_size"
        )


def _delete_old(cache: Path) -> None:
    """Delete what was used longest ago, and unfinished files that are old."""
    used = {}
    for path in cache.glob("features-*"):
        with suppress(FileNotFoundError):  # another process deleted it
            used[path] = path.stat()
    whole = sorted(
        (path for path in used if path.suffix != PART),
        key=lambda path: used[path].st_mtime,
        reverse=True,
    )
    sizes = itertools.accumulate(used[path].st_size for path in whole)
    old = [
        path
        for number, (path, size) in enumerate(zip(whole, sizes, strict=True))
        if number >= FILES_KEPT - 1 and size > BYTES_KEPT
    ]
    stale = [p for p in used if p.suffix == PART and time.time() - used[p].st_mtime > PART_KEPT]
    for path in old + stale:
        path.unlink(missing_ok=True)
