"""Judges images on all cores: a stream of images in, a stream of rows out."""

import itertools
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from defect_detection import PipelineError
from defect_detection.inference.rows import Row
from defect_detection.runtime.classifier import Classifier, Verdict

if TYPE_CHECKING:
    from defect_detection.inference.production import Production

log = logging.getLogger(__name__)

CHUNK = 16  # images that a thread decodes and judges at a time
HEATMAP_SIDE = 320  # pixels of the longer side


@dataclass(frozen=True)
class Item:
    """An image to judge: its name in the row, and its file or content."""

    path: str
    source: Path | bytes


@dataclass(frozen=True)
class NamedModel:
    """A classifier and its name in the rows."""

    name: str
    classifier: Classifier

    @classmethod
    def load(cls, name: str, folder: str) -> "NamedModel":
        """Load a model from its folder, for use by one thread for each core.

        Raises:
            PipelineError: the folder holds no model that can be served.
        """
        return cls(name, Classifier.load(Path(folder), threads=1))

    @classmethod
    def in_production(cls, production: "Production") -> "NamedModel":
        """Wait for the version in production and load it.

        Raises:
            PipelineError: there is none.
        """
        version = production.current()
        model = cls.load(f"{version.name}/{version.number}", version.folder)
        log.info("%s, test accuracy %.4f", version, version.acc)
        return model


class Judge:
    """Judges with a model that may be replaced between two streams of images.

    Attributes:
        model: judges the images.
    """

    def __init__(self, model: NamedModel, heatmaps: Path | None, pool: ThreadPoolExecutor):
        """Judge with `model` in the threads of `pool`; write heatmaps into a folder if given."""
        self.model = model
        self._heatmaps = heatmaps
        self._pool = pool

    def rows(self, items: Iterable[Item]) -> Iterator[list[Row]]:
        """Judge images; yield their rows in order, in chunks, with few chunks waiting.

        Raises:
            PipelineError: a heatmap cannot be written.
        """
        items = iter(items)
        waiting: deque[Future[list[Row]]] = deque()
        while chunk := list(itertools.islice(items, CHUNK)):
            waiting.append(self._pool.submit(self._judge, self.model, chunk))
            if len(waiting) > 2 * (os.cpu_count() or 1):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _judge(self, model: NamedModel, chunk: list[Item]) -> list[Row]:
        verdicts = model.classifier.classify_all([item.source for item in chunk])
        if self._heatmaps is not None:
            for item, verdict in zip(chunk, verdicts, strict=True):
                if verdict.evidence is not None:
                    _write_heatmap(item, verdict, self._heatmaps)
        return [Row.of(i.path, v, model.name) for i, v in zip(chunk, verdicts, strict=True)]


def _write_heatmap(item: Item, verdict: Verdict, folder: Path) -> None:
    """Write an image with the evidence over it as PNG, below `folder` at the image's own path."""
    from defect_detection.runtime import heatmap, preprocessing

    path = Path(os.path.relpath(item.path))
    if ".." in path.parts:
        path = Path(*Path(os.path.abspath(item.path)).parts[1:])
    target = folder / path.with_name(f"{path.name}.png" if item.path != "-" else "stdin.png")
    image = preprocessing.decode_within(item.source, HEATMAP_SIDE)
    assert verdict.evidence is not None and verdict.probability is not None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        drawn = heatmap.draw(image, verdict.evidence, verdict.probability)
        drawn.save(target, compress_level=1)
    except OSError as error:
        raise PipelineError(f"{target}: cannot be written ({error.strerror})") from error
