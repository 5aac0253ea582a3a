"""The files of a saved model that serving reads, and their format.

A registered model is an MLflow model with several flavours. This module owns the flavour `litert`:
the entry in `MLmodel`, the LiteRT model and the out-of-distribution limits. Registered versions
outlive this code, so the names in the files must never change.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from defect_detection import PipelineError
from defect_detection.runtime.decision import (
    CLASSES,
    DEFAULT_OPERATING_POINT,
    POSITIVE,
    OperatingPoint,
)
from defect_detection.runtime.ood import OodDetector
from defect_detection.runtime.opening import MOST_PIXELS
from defect_detection.runtime.preprocessing import ImageFormat

FLAVOUR = "litert"
MODEL_FILE, OOD_FILE = "model.tflite", "scope.npz"


@dataclass(frozen=True)
class ServedModel:
    """All that turns an image into a verdict.

    Attributes:
        litert: content of the LiteRT file.
        takes: the pixels that it takes.
        point: how its probabilities become verdicts.
        ood: finds images unlike the training images; None for models saved without.
        quantize: how its weights are stored, one of `settings.QUANTIZE`.
        full_evidence: evidence that heatmaps draw in full colour, so that those of a model can be
            compared; None for models saved without, of which each image has its own scale.
    """

    litert: bytes
    takes: ImageFormat
    point: OperatingPoint = DEFAULT_OPERATING_POINT
    ood: OodDetector | None = None
    quantize: str = "none"
    full_evidence: float | None = None

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the files into a folder; return the flavour's entry in `MLmodel`."""
        (folder / MODEL_FILE).write_bytes(self.litert)
        entry: dict[str, Any] = {
            "data": MODEL_FILE,
            "image_size": [self.takes.height, self.takes.width],
            "channels": self.takes.channels,
            "fit": self.takes.fit,
            "bits": self.takes.bits,
            "most_pixels": self.takes.most_pixels,
            "class_names": list(CLASSES),
            "positive_class": POSITIVE,
            "quantize": self.quantize,
            "operating_point": asdict(self.point),
            "full_evidence": self.full_evidence,
        }
        if self.ood is not None:
            self.ood.save(folder / OOD_FILE)
            entry["scope"] = OOD_FILE
        return entry

    @classmethod
    def load(cls, folder: Path) -> "ServedModel":
        """Read a model from its folder.

        Raises:
            PipelineError: the folder holds no model with this flavour, or a damaged one.
        """
        try:
            entry = yaml.safe_load((folder / "MLmodel").read_text())["flavors"][FLAVOUR]
            height, width = entry["image_size"]
            takes = ImageFormat(
                *(height, width, entry.get("channels", 1)),
                fit=entry.get("fit", "stretch"),
                bits=entry.get("bits", 16),
                most_pixels=entry.get("most_pixels", MOST_PIXELS),
            )
            # Versions registered before these were saved have none.
            point = OperatingPoint(**entry.get("operating_point", asdict(DEFAULT_OPERATING_POINT)))
            return cls(
                litert=(folder / entry["data"]).read_bytes(),
                takes=takes,
                point=point,
                ood=OodDetector.load(folder / entry["scope"]) if "scope" in entry else None,
                quantize=entry.get("quantize", "none"),
                full_evidence=entry.get("full_evidence"),
            )
        # NumPy raises EOFError for an empty archive.
        except (OSError, KeyError, TypeError, ValueError, EOFError) as error:
            raise damaged(folder, error) from error


def damaged(folder: Path, error: Exception) -> PipelineError:
    """Return the error that says why a folder holds no model that can be served."""
    why = " ".join(str(error).split())
    return PipelineError(
        f"{folder} holds no model that this version can serve ({why}). Train a new one"
    )
