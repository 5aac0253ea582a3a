"""The served model, the one way to a verdict: pictures in, verdicts out, without TensorFlow."""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import yaml
from ai_edge_litert.interpreter import Interpreter

from defect_detection import PipelineError, images, metrics, native_output
from defect_detection.images import UnreadableImage
from defect_detection.metrics import PLAIN, OperatingPoint
from defect_detection.scope import Scope

# A flavour of the registered model, beside MLflow's own: its entry in the file MLmodel.
FLAVOUR = "litert"
MODEL_FILE, SCOPE_FILE = "model.tflite", "scope.npz"
PROBABILITY, MAP = "defect_probability", "defect_map"  # outputs of the LiteRT model
BATCH = 1  # what a core keeps near it: with 16 each picture takes half as long again


@dataclass(frozen=True)
class Verdict:
    """What the model says of one picture.

    Attributes:
        verdict: "defect"; "ok"; "unknown", of a picture unlike those that the model learned from;
            "error", of one that cannot be decoded.
        probability: of a defect, in [0, 1]; None with an error.
        review: whether a person should look: it is neither defect nor ok, or too near to the
            threshold.
        reason: why it is unknown or an error, else "".
        evidence: of a defect at each place, float32 (h, w) of the model's own, 0 or more.
    """

    verdict: str
    probability: float | None
    review: bool
    reason: str = ""
    evidence: np.ndarray | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        """Say it in a line."""
        shown = "" if self.probability is None else f"  {self.probability:.4f}"
        why = f"  {self.reason}" if self.reason else ""
        return f"{self.verdict}{shown}{'  review' if self.review else ''}{why}"

    def as_dict(self) -> dict[str, str | float | bool | None]:
        """Return all but the evidence, by name."""
        names = ("verdict", "probability", "review", "reason")
        return {name: getattr(self, name) for name in names}


class Classifier:
    """A LiteRT model with the image size, operating point and scope that it was saved with.

    Any number of threads may use it at once.
    """

    def __init__(
        self,
        model: bytes,
        image_size: tuple[int, int],
        point: OperatingPoint = PLAIN,
        scope: Scope | None = None,
        quantize: str = "none",
        threads: int | None = None,
    ):
        """Load a model and run it once, so that the first picture does not wait.

        Args:
            model: content of the .tflite file.
            image_size: height and width in pixels.
            point: what its probabilities are decided by.
            scope: which pictures it judges; None: all.
            quantize: what its weights are kept as, of `settings.QUANTIZE`.
            threads: that one call computes with, by default one a core. Whoever calls from
                several threads at once is quicker with 1.

        Raises:
            ValueError, RuntimeError: it is no model.
        """
        self.image_size = image_size
        self.point = point
        self.scope = scope
        self.quantize = quantize
        self._model = model
        self._threads = threads or os.cpu_count()
        self._making = threading.Lock()
        self._idle = [self._make()]

    @classmethod
    def load(cls, folder: Path, threads: int | None = None) -> "Classifier":
        """Load a registered model from its folder.

        Raises:
            PipelineError: the folder holds no model with the LiteRT flavour, or a damaged one.
        """
        try:
            flavour = yaml.safe_load((folder / "MLmodel").read_text())["flavors"][FLAVOUR]
            # Versions that were registered before these were kept have none.
            point = OperatingPoint(**flavour.get("operating_point", asdict(PLAIN)))
            scope = Scope.load(folder / flavour["scope"]) if "scope" in flavour else None
            model = (folder / flavour["data"]).read_bytes()
            quantize = flavour.get("quantize", "none")
            return cls(model, tuple(flavour["image_size"]), point, scope, quantize, threads)
        # The runtime raises ValueError of what is no model, RuntimeError of what is half of one;
        # NumPy EOFError of an empty archive.
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, EOFError) as error:
            why = " ".join(str(error).split())
            raise PipelineError(
                f"{folder} holds no model that this version can serve ({why}). Train a new one"
            ) from error

    def probabilities(self, pictures: np.ndarray) -> np.ndarray:
        """Return the probability of a defect, float32 (n,), for uint8 (n, height, width, 1)."""
        return self.examine(pictures)[0]

    def examine(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the probability of a defect and where the evidence of it lies.

        Args:
            pictures: uint8 (n, height, width, 1).

        Returns:
            Probabilities, float32 (n,), and maps, float32 (n, h, w): the evidence at each
            place, 0 or more; the probability grows with its power mean.
        """
        if not len(pictures):
            probabilities, maps = self._run(np.zeros((1, *self.image_size, 1), np.float32))
            return probabilities[:0], maps[:0]
        parts = [self._run(batch) for batch in _batches(pictures)]
        return tuple(np.concatenate(part) for part in zip(*parts, strict=True))

    def judge(self, pictures: np.ndarray) -> list[Verdict]:
        """Judge pictures, uint8 (n, height, width, 1)."""
        return [one for batch in _batches(pictures) for one in self._judge(batch)]

    def classify(self, source: Path | bytes) -> Verdict:
        """Decode and judge one picture.

        Raises:
            UnreadableImage: it cannot be decoded.
        """
        return self.judge(images.decode(source, self.image_size)[np.newaxis])[0]

    def classify_all(self, sources: Sequence[Path | bytes]) -> list[Verdict]:
        """Decode and judge pictures; one that cannot be decoded gets the verdict "error"."""
        pictures, errors = [], {}
        for number, source in enumerate(sources):
            try:
                pictures.append(images.decode(source, self.image_size))
            except UnreadableImage as error:
                errors[number] = Verdict("error", None, True, str(error))
        judged = iter(self.judge(np.stack(pictures)) if pictures else ())
        return [errors.get(number) or next(judged) for number in range(len(sources))]

    def outside(self, pictures: np.ndarray) -> list[str]:
        """Say why each picture, uint8 (n, height, width, 1), is out of scope; "" if it is in."""
        return [reason for batch in _batches(pictures) for reason in self._outside(batch)]

    def _judge(self, batch: np.ndarray) -> Iterator[Verdict]:
        probabilities, maps = self._run(batch)
        found = metrics.is_defect(probabilities, self.point.threshold)
        review = self.point.review(probabilities)
        for row, reason in enumerate(self._outside(batch)):
            verdict = "unknown" if reason else "defect" if found[row] else "ok"
            yield Verdict(
                verdict,
                float(probabilities[row]),
                bool(reason or review[row]),
                reason,
                maps[row],
            )

    def _outside(self, batch: np.ndarray) -> list[str]:
        return self.scope.reasons(batch[..., 0]) if self.scope else [""] * len(batch)

    def _run(self, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with self._interpreter() as one:
            return one.run(batch)

    @contextmanager
    def _interpreter(self) -> Iterator["_Interpreter"]:
        """Lend an interpreter that no other thread uses; there are as many as calls at once."""
        try:
            one = self._idle.pop()  # in one step, as `append` is
        except IndexError:
            one = self._make()
        try:
            yield one
        finally:
            self._idle.append(one)

    def _make(self) -> "_Interpreter":
        # One at a time, since what C++ prints is held back for the whole process.
        with self._making, native_output.held_back():
            one = _Interpreter(self._model, self._threads)
            one.run(np.zeros((1, *self.image_size, 1), np.float32))  # the first builds kernels
        return one


class _Interpreter:
    """LiteRT's interpreter, which one thread may use at a time."""

    def __init__(self, model: bytes, threads: int):
        self._interpreter = Interpreter(model_content=model, num_threads=threads)
        self._input = self._interpreter.get_input_details()[0]["index"]
        outputs = self._interpreter.get_signature_runner().get_output_details()
        self._outputs = {name: detail["index"] for name, detail in outputs.items()}
        self._batch = 0

    def run(self, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return probabilities (n,) and maps (n, ...) of float32 (n, height, width, 1)."""
        if len(batch) != self._batch:
            self._interpreter.resize_tensor_input(self._input, batch.shape)
            self._interpreter.allocate_tensors()
            self._batch = len(batch)
        self._interpreter.set_tensor(self._input, batch)
        self._interpreter.invoke()
        probabilities = self._interpreter.get_tensor(self._outputs[PROBABILITY])
        return probabilities[:, 0], self._interpreter.get_tensor(self._outputs[MAP])[..., 0]


def _batches(pictures: np.ndarray) -> Iterator[np.ndarray]:
    """Cut uint8 pictures into batches of float32, as the model takes them."""
    for start in range(0, len(pictures), BATCH):
        yield pictures[start : start + BATCH].astype(np.float32)
