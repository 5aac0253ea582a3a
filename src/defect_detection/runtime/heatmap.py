"""An image with the evidence of a defect drawn over it."""

import numpy as np
from PIL import Image

GLOW = np.array([255, 72, 0])  # the colour of evidence
MOST_EVIDENCE = 88.0  # LiteRT's softplus returns infinity soon after


def draw(image: np.ndarray, evidence: np.ndarray, strength: float = 1.0) -> Image.Image:
    """Draw evidence over an image: the more evidence, the stronger the colour.

    Args:
        image: uint8 (height, width).
        evidence: 0 or more, (h, w) of any size.
        strength: opacity of the colour where the evidence is strongest, in [0, 1].
    """
    height, width = image.shape
    evidence = np.minimum(evidence, MOST_EVIDENCE)
    smooth = Image.fromarray(evidence / max(evidence.max(), 1e-9)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    opacity = strength * np.clip(np.asarray(smooth), 0, 1)[..., np.newaxis]
    grey = image[..., np.newaxis].astype(float)
    return Image.fromarray((grey * (1 - opacity) + GLOW * opacity).astype(np.uint8))
