"""Verdicts to be logged, drawn without what takes seconds to import."""

import io
from types import SimpleNamespace

import numpy as np
from PIL import Image

from defect_detection.inference.judge import Item, Judged, NamedModel
from defect_detection.inference.verdict_log import Rules
from defect_detection.runtime.classifier import Verdict
from defect_detection.runtime.decision import OperatingPoint
from defect_detection.runtime.preprocessing import ImageFormat

_file = io.BytesIO()
Image.linear_gradient("L").save(_file, "JPEG")
PART = _file.getvalue()
CLASSIFIER = SimpleNamespace(
    point=OperatingPoint(0.5, 0.4, 0.6), takes=ImageFormat(32, 32), full_evidence=None
)
MODEL = NamedModel("Production_Reg/1", CLASSIFIER)  # type: ignore[arg-type]
OK = Verdict("ok", 0.1, False, evidence=np.ones((4, 4), np.float32))
NOBODY = Rules(audit_share=0.0)  # waits for a person at random


def judged(name: str = "part_7.jpeg", verdict: Verdict = OK, content: object = PART) -> Judged:
    """Return an image with its verdict."""
    return Judged(Item(name, content), verdict, MODEL, 1.5)
