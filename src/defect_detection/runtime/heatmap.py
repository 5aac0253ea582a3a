"""An image with the evidence of a defect drawn over it."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from defect_detection.runtime.preprocessing import ImageFormat

GLOW = np.array([255, 72, 0])  # the colour of evidence
FONT_SIZE, MARGIN, SCALE_HEIGHT = 13, 6, 6  # pixels of the caption
MOST_OPAQUE = 0.85  # what lies below stays visible
MOST_EVIDENCE = 88.0  # LiteRT's softplus returns infinity soon after


def draw(
    image: np.ndarray, evidence: np.ndarray, takes: ImageFormat, full: float | None
) -> Image.Image:
    """Draw evidence over an image: the more evidence, the stronger the colour.

    Args:
        image: uint8 (height, width, 1 or 3).
        evidence: 0 or more, (h, w) of any size, for the whole of what the model took.
        takes: how the model took the image.
        full: evidence that is drawn in full colour; None for the strongest of this image.
    """
    height, width = tall, wide = image.shape[:2]
    if takes.fit == "letterbox":  # with the borders
        tall = max(height, round(width * takes.height / takes.width))
        wide = max(width, round(height * takes.width / takes.height))
    evidence = np.minimum(evidence, MOST_EVIDENCE)
    full = float(evidence.max()) if full is None else full
    whole = Image.fromarray((evidence / max(full, 1e-9)).astype(np.float32)).resize(
        (wide, tall), Image.Resampling.BICUBIC
    )
    left, top = (wide - width) // 2, (tall - height) // 2
    smooth = whole.crop((left, top, left + width, top + height))
    opacity = MOST_OPAQUE * np.clip(np.asarray(smooth), 0, 1)[..., np.newaxis]
    return Image.fromarray((image * (1 - opacity) + GLOW * opacity).astype(np.uint8))


def captioned(drawn: Image.Image, caption: str) -> Image.Image:
    """Return an image with lines of text below it, and the scale of the evidence."""
    font = ImageFont.load_default(FONT_SIZE)
    pen = ImageDraw.Draw(drawn)
    left, top, right, bottom = pen.multiline_textbbox((0, 0), caption, font)
    height = int(bottom + 3 * MARGIN + SCALE_HEIGHT)
    width = max(drawn.width, int(right) + 2 * MARGIN)
    whole = Image.new("RGB", (width, drawn.height + height), "white")
    whole.paste(drawn, (0, 0))
    pen = ImageDraw.Draw(whole)
    pen.multiline_text((MARGIN, drawn.height + MARGIN / 2), caption, "black", font)
    scale = np.linspace(0, MOST_OPAQUE, width - 2 * MARGIN)[np.newaxis, :, np.newaxis]
    strip = np.repeat(255 * (1 - scale) + GLOW * scale, SCALE_HEIGHT, axis=0)
    whole.paste(
        Image.fromarray(strip.astype(np.uint8)), (MARGIN, whole.height - MARGIN - SCALE_HEIGHT)
    )
    return whole
