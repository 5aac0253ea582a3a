"""The served model: pictures in, verdicts out, by the LiteRT runtime. Never imports TensorFlow."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import yaml
from ai_edge_litert.interpreter import Interpreter

from defect_detection import PipelineError, images, metrics, native_output
from defect_detection.metrics import PLAIN, OperatingPoint

# A flavour of the registered model, beside MLflow's own: its entry in the file MLmodel.
FLAVOUR = "litert"
MODEL_FILE = "model.tflite"
PROBABILITY, MAP = "defect_probability", "defect_map"  # outputs of the LiteRT model
BATCH = 64


@dataclass(frozen=True)
class Verdict:
    """What the model says of one picture.

    Attributes:
        verdict: "defect" or "ok".
        probability: of a defect, in [0, 1].
        review: whether it is too near to the threshold to go by: a person should look.
    """

    verdict: str
    probability: float
    review: bool

    def __str__(self) -> str:
        """Say it in a line."""
        return f"{self.verdict}  {self.probability:.4f}" + ("  review" if self.review else "")


class Classifier:
    """A LiteRT model with the image size and operating point that it was saved with."""

    def __init__(self, model: bytes, image_size: tuple[int, int], point: OperatingPoint = PLAIN):
        self.image_size = image_size
        self.point = point
        with native_output.held_back():
            self._interpreter = Interpreter(model_content=model, num_threads=os.cpu_count())
            self._input = self._interpreter.get_input_details()[0]["index"]
            outputs = self._interpreter.get_signature_runner().get_output_details()
            self._outputs = {name: detail["index"] for name, detail in outputs.items()}
            self._batch = 0
            self._invoke(np.zeros((1, *image_size, 1), np.uint8))  # the first call builds kernels

    @classmethod
    def load(cls, folder: Path) -> "Classifier":
        """Load a registered model from its folder.

        Raises:
            PipelineError: the folder holds no model with the LiteRT flavour, or a damaged one.
        """
        try:
            flavour = yaml.safe_load((folder / "MLmodel").read_text())["flavors"][FLAVOUR]
            # Versions that were registered before thresholds were chosen have none.
            point = OperatingPoint(**flavour.get("operating_point", asdict(PLAIN)))
            model = (folder / flavour["data"]).read_bytes()
            return cls(model, tuple(flavour["image_size"]), point)
        # The runtime raises ValueError of what is no model, RuntimeError of what is half of one.
        except (OSError, KeyError, ValueError, RuntimeError) as error:
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
            Probabilities, float32 (n,), and maps, float32 (n, height / 4, width / 4): the evidence
            at each place, 0 or more; the probability grows with its power mean.
        """
        parts = [self._invoke(pictures[i : i + BATCH]) for i in range(0, len(pictures), BATCH)]
        if not parts:
            height, width = self.image_size
            return np.empty(0, np.float32), np.empty((0, height // 4, width // 4), np.float32)
        probabilities, maps = (np.concatenate(part) for part in zip(*parts, strict=True))
        return probabilities, maps

    def classify(self, source: Path | bytes) -> Verdict:
        """Decode and judge one picture.

        Raises:
            UnreadableImage: it cannot be decoded.
        """
        picture = images.decode(source, self.image_size)
        return self.verdict(float(self.probabilities(picture[np.newaxis])[0]))

    def verdict(self, probability: float) -> Verdict:
        """Decide on a probability of a defect."""
        found = metrics.is_defect(probability, self.point.threshold)
        return Verdict(
            "defect" if found else "ok", probability, bool(self.point.review(probability))
        )

    def _invoke(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if len(pictures) != self._batch:
            self._interpreter.resize_tensor_input(self._input, pictures.shape)
            self._interpreter.allocate_tensors()
            self._batch = len(pictures)
        self._interpreter.set_tensor(self._input, pictures.astype(np.float32))
        self._interpreter.invoke()
        probabilities = self._interpreter.get_tensor(self._outputs[PROBABILITY])
        return probabilities[:, 0], self._interpreter.get_tensor(self._outputs[MAP])[..., 0]
