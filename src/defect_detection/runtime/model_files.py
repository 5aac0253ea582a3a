"""The files of a saved model that serving reads, and their format.

A registered model is an MLflow model with several flavours. This module owns the flavour `litert`:
the entry in `MLmodel`, the LiteRT model and the out-of-distribution limits. Registered versions
outlive this code, so the names in the files must never change.
"""

import io
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args
from zipfile import BadZipFile

import yaml

from defect_detection import PipelineError
from defect_detection.runtime import checksums
from defect_detection.runtime.decision import (
    CLASSES,
    DEFAULT_OPERATING_POINT,
    POSITIVE,
    OperatingPoint,
)
from defect_detection.runtime.ood import OodDetector
from defect_detection.runtime.opening import MOST_PIXELS
from defect_detection.runtime.preprocessing import DEPTHS, ImageFormat, Shaping

FLAVOUR = "litert"
SIDES = range(16, 2049)  # pixels; src/config.yaml allows the same
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
            "checksums": checksums.FILE,
        }
        if self.ood is not None:
            self.ood.save(folder / OOD_FILE)
            entry["scope"] = OOD_FILE
        return entry

    def save_alone(self, folder: Path) -> None:
        """Write a folder that `load` reads, without MLflow's other flavours."""
        described = {"flavors": {FLAVOUR: self.save(folder)}}
        (folder / "MLmodel").write_text(yaml.safe_dump(described))
        checksums.write(folder)

    @classmethod
    def load(cls, folder: Path, expected: str = "") -> "ServedModel":
        """Read a model from its folder, and compare each file that is read with its checksum.

        Args:
            folder: of the model.
            expected: the SHA-256 of its checksums, "" if that is not known.

        Raises:
            PipelineError: the folder holds no model with this flavour, or a damaged one.
        """
        try:
            return cls._load(folder, expected)
        # NumPy raises EOFError for an empty archive and BadZipFile for a broken one.
        except (
            *(OSError, KeyError, TypeError, ValueError, AttributeError, EOFError),
            *(yaml.YAMLError, RecursionError, BadZipFile),
        ) as error:
            raise damaged(folder, error) from error

    @classmethod
    def _load(cls, folder: Path, expected: str) -> "ServedModel":
        known = checksums.read(folder, expected)
        described = yaml.safe_load(checksums.content(folder, "MLmodel", known))
        entry = described["flavors"][FLAVOUR]
        if "checksums" in entry and not known:
            raise ValueError(f"{checksums.FILE} is missing")
        # Versions registered before these were saved have none.
        point = OperatingPoint(**entry.get("operating_point", asdict(DEFAULT_OPERATING_POINT)))
        height, width = entry["image_size"]
        found = cls(
            litert=checksums.content(folder, entry["data"], known),
            takes=ImageFormat(
                *(height, width, entry.get("channels", 1)),
                fit=entry.get("fit", "stretch"),
                bits=entry.get("bits", 16),
                most_pixels=entry.get("most_pixels", MOST_PIXELS),
            ),
            point=point,
            ood=(
                OodDetector.load(io.BytesIO(checksums.content(folder, entry["scope"], known)))
                if "scope" in entry
                else None
            ),
            quantize=entry.get("quantize", "none"),
            full_evidence=entry.get("full_evidence"),
        )
        found._require_known_values()
        classes = *entry.get("class_names", CLASSES), entry.get("positive_class", POSITIVE)
        if classes != (*CLASSES, POSITIVE):
            raise ValueError(f"its classes are not {', '.join(CLASSES)}")
        return found

    def _require_known_values(self) -> None:
        takes, full = self.takes, self.full_evidence
        if takes.channels not in (1, 3) or takes.bits not in DEPTHS:
            raise ValueError(f"it takes {takes.channels} channels of {takes.bits} bits")
        # LiteRT ends the whole process if it cannot take such images.
        if not all(type(side) is int and side in SIDES for side in (takes.height, takes.width)):
            raise ValueError(f"it takes images of {takes.height} x {takes.width}")
        if takes.fit not in get_args(Shaping):
            raise ValueError(f"fit is {takes.fit}")
        if full is not None and not 0 < full < math.inf:
            raise ValueError(f"full_evidence is {full}")


def damaged(folder: Path, error: Exception) -> PipelineError:
    """Return the error that says why a folder holds no model that can be served."""
    why = " ".join(str(error).split())
    return PipelineError(
        f"{folder} holds no model that this version can serve ({why}). Train a new one"
    )
