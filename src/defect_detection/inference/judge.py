"""Judges images on all cores: a stream of images in, a stream of rows out."""

import hashlib
import io
import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import numpy as np

from defect_detection import PipelineError
from defect_detection.inference.rows import Row
from defect_detection.runtime.classifier import Classifier, Verdict
from defect_detection.runtime.preprocessing import UnreadableImage, read_file

if TYPE_CHECKING:
    from PIL import Image

    from defect_detection.inference.production import Production

log = logging.getLogger(__name__)

CHUNK = 16  # images that a thread decodes and judges at a time
HEATMAP_SIDE = 320  # pixels of the longer side
SOURCE = "source"  # the field of a heatmap that says which image it shows


@dataclass(frozen=True)
class Item:
    """An image to judge: its name in the row, and its file, its content, or why there is none."""

    path: str
    source: Path | bytes | UnreadableImage


@dataclass(frozen=True)
class NamedModel:
    """A classifier and its name in the rows."""

    name: str
    classifier: Classifier

    @classmethod
    def load(cls, name: str, folder: str, checksum: str = "") -> "NamedModel":
        """Load a model from its folder, for use by one thread for each core.

        Args:
            name: in the rows.
            folder: of the model.
            checksum: the SHA-256 of its checksums, "" if that is not known.

        Raises:
            PipelineError: the folder holds no model that can be served, or a damaged one.
        """
        return cls(name, Classifier.load(Path(folder), threads=1, expected=checksum))

    @classmethod
    def in_production(cls, production: "Production") -> "NamedModel":
        """Wait for the version in production and load it.

        Raises:
            PipelineError: there is none.
        """
        version = production.current()
        model = cls.load(f"{version.name}/{version.number}", version.folder, version.checksum)
        log.info("%s, test accuracy %.4f", version, version.acc)
        return model

    def followed(self, production: "Production") -> "NamedModel":
        """Load the version that got the alias prod; return this model if that one is damaged."""
        try:
            return self.in_production(production)
        except PipelineError as error:
            log.warning("Continuing with %s: %s", self.name, error)
            production.put_back()
            return self


@dataclass(frozen=True)
class Judged:
    """An image with its verdict.

    Attributes:
        item: the image.
        verdict: on it.
        model: that gave it.
        milliseconds: that it took to decode and judge it.
    """

    item: Item
    verdict: Verdict
    model: NamedModel
    milliseconds: float

    @property
    def row(self) -> Row:
        """The verdict as it is written."""
        return Row.of(self.item.path, self.verdict, self.model.name)

    @property
    def name(self) -> str:
        """The name of the image's file, without its folder."""
        return os.path.basename(self.item.path)

    @property
    def content(self) -> bytes:
        """The content of the image's file; empty if that could not be read, or was not yet."""
        return self.item.source if isinstance(self.item.source, bytes) else b""

    def evidence_levels(self) -> np.ndarray | None:
        """Return the evidence, uint8 (h, w), 255 for what heatmaps draw in full colour."""
        if self.verdict.evidence is None:
            return None
        from defect_detection.runtime import heatmap

        levels = heatmap.relative(self.verdict.evidence, self.model.classifier.full_evidence)
        return np.rint(255 * np.clip(levels, 0, 1)).astype(np.uint8)


def judge(model: NamedModel, items: Sequence[Item]) -> list[Judged]:
    """Judge images; what cannot be read or decoded gets the verdict "error"."""
    started = time.perf_counter()
    readable = [i.source for i in items if not isinstance(i.source, UnreadableImage)]
    verdicts = iter(model.classifier.classify_all(readable))
    found = [
        Verdict("error", None, True, str(item.source))
        if isinstance(item.source, UnreadableImage)
        else next(verdicts)
        for item in items
    ]
    milliseconds = 1000 * (time.perf_counter() - started) / max(1, len(items))
    return [Judged(i, v, model, milliseconds) for i, v in zip(items, found, strict=True)]


class Heatmaps:
    """Writes images with the evidence over them into a folder, as PNG, under their own names."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._lock = threading.Lock()

    def write(self, item: Item, verdict: Verdict, classifier: Classifier) -> None:
        """Write one, if the image could be judged.

        Raises:
            PipelineError: it cannot be written.
        """
        if verdict.evidence is None or isinstance(item.source, UnreadableImage):
            return
        from defect_detection.runtime import heatmap, preprocessing

        takes = classifier.takes
        image = preprocessing.decode_within(
            item.source, HEATMAP_SIDE, takes.channels, takes.bits, takes.most_pixels
        )
        drawn = heatmap.draw(image, verdict.evidence, takes, classifier.full_evidence)
        path = PurePath("stdin" if item.path == "-" else os.path.abspath(item.path))
        name = path.name.encode(errors="replace").decode()
        caption = f"{name}\n{verdict}\nthreshold {classifier.point.threshold:.4f}"
        try:
            self._save(heatmap.captioned(drawn, caption), path)
        except OSError as error:
            raise PipelineError(f"{self._folder}: cannot be written ({error.strerror})") from error

    def _save(self, drawn: "Image.Image", path: PurePath) -> None:
        """Save under the image's name, with a hash of its path if another image has that name.

        The file says by that hash which image it shows, so no run overwrites another's map.
        """
        from PIL import PngImagePlugin

        digest = hashlib.sha256(os.fsencode(path)).hexdigest()
        text = PngImagePlugin.PngInfo()
        text.add_text(SOURCE, digest)
        content = io.BytesIO()
        drawn.save(content, "PNG", pnginfo=text, compress_level=1)
        self._folder.mkdir(parents=True, exist_ok=True)
        target = self._folder / f"{path.name}.png"
        with self._lock:
            if target.exists() and _source(target) != digest:
                target = self._folder / f"{path.stem}-{digest[:8]}{path.suffix}.png"
            target.write_bytes(content.getvalue())


def _source(heatmap: Path) -> str | None:
    """Return the hash of the image's path that a heatmap shows, None if it does not say."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(read_file(heatmap))) as opened:
            return opened.info.get(SOURCE)
    except (OSError, UnreadableImage):
        return None


class Judge:
    """Judges with a model that may be replaced between two streams of images.

    Attributes:
        model: judges the images.
    """

    def __init__(self, model: NamedModel, heatmaps: Path | None, pool: ThreadPoolExecutor):
        """Judge with `model` in the threads of `pool`; write heatmaps into a folder if given."""
        self.model = model
        self._heatmaps = Heatmaps(heatmaps) if heatmaps is not None else None
        self._pool = pool

    def judged(self, items: Iterable[Item]) -> Iterator[list[Judged]]:
        """Judge images; yield them with their verdicts, in order, in chunks.

        Few chunks wait at a time.

        Raises:
            PipelineError: a heatmap cannot be written.
        """
        items = iter(items)
        waiting: deque[Future[list[Judged]]] = deque()
        while chunk := list(itertools.islice(items, CHUNK)):
            waiting.append(self._pool.submit(self._judge, self.model, chunk))
            if len(waiting) > 2 * (os.cpu_count() or 1):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _judge(self, model: NamedModel, chunk: list[Item]) -> list[Judged]:
        found = judge(model, chunk)
        if self._heatmaps is not None:
            for one in found:
                self._heatmaps.write(one.item, one.verdict, model.classifier)
        return found
