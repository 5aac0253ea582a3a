"""The one way to a verdict: images in, verdicts out, without TensorFlow."""

import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from defect_detection.runtime import decision, model_files, native_output, preprocessing
from defect_detection.runtime.model_files import ServedModel
from defect_detection.runtime.preprocessing import UnreadableImage

PROBABILITY, MAP = "defect_probability", "defect_map"  # outputs of the LiteRT model
BATCH = 1  # what stays in a core's cache: with 16, each image takes half as long again

VerdictName = Literal["defect", "ok", "unknown", "error"]


class VerdictDict(TypedDict):
    """A verdict without its evidence."""

    verdict: VerdictName
    probability: float | None
    review: bool
    reason: str


@dataclass(frozen=True)
class Verdict:
    """What the model decides about one image.

    Attributes:
        verdict: "defect"; "ok"; "unknown" for an image unlike the training images; "error" for one
            that cannot be decoded.
        probability: of a defect, in [0, 1]; None for an error.
        review: whether a person should look, because the verdict is neither defect nor ok or the
            probability is too near the threshold.
        reason: why it is unknown or an error, else "".
        evidence: of a defect at each place of the map, float32 (h, w), 0 or more.
    """

    verdict: VerdictName
    probability: float | None
    review: bool
    reason: str = ""
    evidence: np.ndarray | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        """Return the verdict in a line."""
        shown = "" if self.probability is None else f"  {self.probability:.4f}"
        why = f"  {self.reason}" if self.reason else ""
        return f"{self.verdict}{shown}{'  review' if self.review else ''}{why}"

    def as_dict(self) -> VerdictDict:
        """Return all but the evidence, by name."""
        return {
            "verdict": self.verdict,
            "probability": self.probability,
            "review": self.review,
            "reason": self.reason,
        }


class Classifier:
    """A served model that runs. Any number of threads may use it at once."""

    def __init__(self, served: ServedModel, threads: int | None = None):
        """Load a model and run it once, so that the first image does not wait.

        Args:
            served: the model.
            threads: that one call computes with, by default one for each core. A caller that uses
                several threads itself is faster with 1.

        Raises:
            ValueError, RuntimeError: the LiteRT file is damaged.
        """
        self.takes = served.takes
        self.point = served.point
        self.quantize = served.quantize
        self.full_evidence = served.full_evidence
        self._ood = served.ood
        self._litert = served.litert
        self._threads = threads or os.cpu_count()
        self._making = threading.Lock()
        self._idle = [self._make()]

    @property
    def litert_sha256(self) -> str:
        """SHA-256 of the LiteRT model."""
        return hashlib.sha256(self._litert).hexdigest()

    @classmethod
    def load(cls, folder: Path, threads: int | None = None, expected: str = "") -> "Classifier":
        """Load a saved model from its folder.

        Args:
            folder: of the model.
            threads: as for the constructor.
            expected: the SHA-256 of its checksums, "" if that is not known.

        Raises:
            PipelineError: the folder holds no model with the flavour `litert`, or a damaged one.
        """
        served = ServedModel.load(folder, expected)
        try:
            return cls(served, threads)
        # LiteRT raises ValueError for a file that is no model and RuntimeError for half of one;
        # the first versions had outputs with other names.
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise model_files.damaged(folder, error) from error

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Return the probability of a defect, float32 (n,), for uint8 (n, *takes.shape)."""
        return self.examine(images)[0]

    def examine(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the probability of a defect and where the evidence for it lies.

        Args:
            images: uint8 (n, *takes.shape).

        Returns:
            Probabilities, float32 (n,), and maps, float32 (n, h, w): the evidence at each
            place, 0 or more; the probability grows with the map's power mean.
        """
        if not len(images):
            probabilities, maps = self._run(np.zeros((1, *self.takes.shape), np.float32))
            return probabilities[:0], maps[:0]
        parts = [self._run(batch) for batch in _batches(images)]
        return np.concatenate([one for one, _ in parts]), np.concatenate([one for _, one in parts])

    def judge(self, images: np.ndarray) -> list[Verdict]:
        """Return a verdict for each image, uint8 (n, *takes.shape)."""
        return [one for batch in _batches(images) for one in self._judge(batch)]

    def classify(self, source: Path | bytes) -> Verdict:
        """Decode and judge one image.

        Raises:
            UnreadableImage: it cannot be decoded.
        """
        return self.judge(preprocessing.decode(source, self.takes)[np.newaxis])[0]

    def classify_all(self, sources: Sequence[Path | bytes]) -> list[Verdict]:
        """Decode and judge images; one that cannot be decoded gets the verdict "error"."""
        images: list[np.ndarray] = []
        errors: dict[int, Verdict] = {}
        for number, source in enumerate(sources):
            try:
                images.append(preprocessing.decode(source, self.takes))
            except UnreadableImage as error:
                errors[number] = Verdict("error", None, True, str(error))
        judged = iter(self.judge(np.stack(images)) if images else ())
        return [errors.get(number) or next(judged) for number in range(len(sources))]

    def ood_reasons(self, images: np.ndarray) -> list[str]:
        """Return why each image, uint8 (n, *takes.shape), is unknown; "" if it is not."""
        return [reason for batch in _batches(images) for reason in self._ood_reasons(batch)]

    def _judge(self, batch: np.ndarray) -> Iterator[Verdict]:
        probabilities, maps = self._run(batch)
        found = decision.is_defect(probabilities, self.point.threshold)
        review = self.point.needs_review(probabilities)
        for row, reason in enumerate(self._ood_reasons(batch)):
            yield Verdict(
                "unknown" if reason else "defect" if found[row] else "ok",
                float(probabilities[row]),
                bool(reason or review[row]),
                reason,
                maps[row],
            )

    def _ood_reasons(self, batch: np.ndarray) -> list[str]:
        return self._ood.reasons(preprocessing.grey(batch)) if self._ood else [""] * len(batch)

    def _run(self, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with self._interpreter() as one:
            return one.run(batch)

    @contextmanager
    def _interpreter(self) -> Iterator["_Interpreter"]:
        """Lend an interpreter that no other thread uses; there are as many as calls at once."""
        try:
            one = self._idle.pop()  # atomic, as `append` is
        except IndexError:
            one = self._make()
        try:
            yield one
        finally:
            self._idle.append(one)

    def _make(self) -> "_Interpreter":
        # One at a time, since C++ output is suppressed for the whole process.
        with self._making, native_output.suppressed():
            one = _Interpreter(self._litert, self._threads)
            one.run(np.zeros((1, *self.takes.shape), np.float32))  # the first run builds kernels
        return one


class _Interpreter:
    """LiteRT's interpreter, which one thread may use at a time."""

    def __init__(self, litert: bytes, threads: int | None):
        self._interpreter = Interpreter(model_content=litert, num_threads=threads)
        self._input = self._interpreter.get_input_details()[0]["index"]
        outputs = self._interpreter.get_signature_runner().get_output_details()
        self._outputs = {name: detail["index"] for name, detail in outputs.items()}
        self._batch = 0

    def run(self, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return probabilities (n,) and maps (n, ...) for float32 (n, *takes.shape)."""
        if len(batch) != self._batch:
            self._interpreter.resize_tensor_input(self._input, batch.shape)
            self._interpreter.allocate_tensors()
            self._batch = len(batch)
        self._interpreter.set_tensor(self._input, batch)
        self._interpreter.invoke()
        probabilities = self._interpreter.get_tensor(self._outputs[PROBABILITY])
        return probabilities[:, 0], self._interpreter.get_tensor(self._outputs[MAP])[..., 0]


def _batches(images: np.ndarray) -> Iterator[np.ndarray]:
    """Cut uint8 images into batches of float32, as the model takes them."""
    for start in range(0, len(images), BATCH):
        yield images[start : start + BATCH].astype(np.float32)
